"""``python -m trm_fast.recipes.grokking``: as ``trm-fast train grokking``."""

import sys

from trm_fast.__main__ import start

start(["train", "grokking", *sys.argv[1:]])
