"""The two forms of the generators, C++ and Python."""

import pytest

from trm_fast.data import _native

from ..conftest import EXPECTED


def skip_unless_built() -> None:
    reason = _native.unusable()
    if reason and "cpp" in EXPECTED:
        pytest.fail(f"TRM_FAST_EXPECT names cpp, but it cannot run: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session", params=[True, False], ids=["native", "python"])
def native(request: pytest.FixtureRequest) -> bool:
    """Each form; one that is not built skips, or fails if it was expected."""
    if request.param:
        skip_unless_built()
    return request.param


@pytest.fixture(scope="session")
def built() -> None:
    """For tests that compare both forms."""
    skip_unless_built()
