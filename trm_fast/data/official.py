"""The former place of ``trm_fast.data.sources.official``, for programs that import from it."""

from trm_fast.data.sources.official import *  # noqa: F403
