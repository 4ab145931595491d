"""Every reader of files from outside, with valid files for it; ``tests.fuzz`` mutates them."""

from .data_readers import DATA_READERS
from .reader import Reader
from .run_readers import RUN_READERS

READERS: dict[str, Reader] = DATA_READERS | RUN_READERS
