"""``python -m trm_fast.recipes.puzzle sudoku|maze|arc``: as ``trm-fast train``."""

import sys

from trm_fast.__main__ import start
from trm_fast.recipes import RECIPES

_OWN = {name: listing.help for name, listing in RECIPES.items() if listing.system == "puzzle"}

if sys.argv[1:2] and sys.argv[1] in _OWN:
    start(["train", *sys.argv[1:]])
asks = sys.argv[1:2] in (["--help"], ["-h"])
stream = sys.stdout if asks else sys.stderr
print(f"usage: python -m trm_fast.recipes.puzzle {'|'.join(_OWN)} [--help | ...]", file=stream)
for name, text in _OWN.items():
    print(f"  {name:8}{text}", file=stream)
sys.exit(0 if asks else 2)
