"""``python -m trm_fast``: the same as the command ``trm-fast``."""

import sys

from trm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
