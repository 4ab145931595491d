"""The former place of ``trm_fast.data.puzzles.arc_corpus``, for programs that import from it."""

from trm_fast.data.puzzles.arc_corpus import *  # noqa: F403
