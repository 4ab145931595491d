"""``python -m trm_fast.recipes.classify``: as ``trm-fast train classify``."""

import sys

from trm_fast.__main__ import start

start(["train", "classify", *sys.argv[1:]])
