"""``python -m trm_fast.recipes.classify``: as ``trm-fast train classify``."""

import sys

from trm_fast.cli import main

sys.exit(main(["train", "classify", *sys.argv[1:]]))
