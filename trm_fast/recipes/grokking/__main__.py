"""``python -m trm_fast.recipes.grokking``: as ``trm-fast train grokking``."""

import sys

from trm_fast.cli import main

sys.exit(main(["train", "grokking", *sys.argv[1:]]))
