"""``python -m trm_fast.recipes.puzzle sudoku|maze|arc``: as ``trm-fast train``."""

import sys

from trm_fast.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
