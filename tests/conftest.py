"""Settings and fixtures of the whole suite: Triton's interpreter, backends, what no test leaves."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from .support.kinds import kinds, quick, second_halves

# Triton reads both when it is first imported, so they are set before trm_fast is. Counting devices
# asks the driver without starting CUDA in this process.
NO_GPU = torch.version.cuda is None or torch.cuda.device_count() == 0
if NO_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

BACKENDS = ("reference", "cpp", "cuda", "triton")
EXPECTED = frozenset(filter(None, os.environ.get("TRM_FAST_EXPECT", "").split(",")))

# No example database: every run sees the same examples, and nothing is written into the checkout.
settings.register_profile("trm_fast", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("trm_fast")


def pytest_configure(config: pytest.Config) -> None:
    unknown = EXPECTED - {*BACKENDS}
    if unknown:
        known = ", ".join(BACKENDS)
        raise pytest.UsageError(f"TRM_FAST_EXPECT must list {known}; got {', '.join(unknown)}")
    # A shell lets what it starts in the background ignore SIGINT, and nohup lets it ignore SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="what takes little time, see make quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            for name in kinds(item):
                item.add_marker(name)
    for item in second_halves(items):
        item.add_marker("long")
    if config.getoption("quick"):
        chosen = dict.fromkeys(quick(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def device_of(backend: str) -> torch.device:
    """The device on which the tests run ``backend``."""
    return torch.device("cuda" if backend in ("cuda", "triton") and not NO_GPU else "cpu")


def skip_unless_usable(backend: str) -> None:
    from trm_fast import _dispatch

    reason = _dispatch.unusable(backend, device_of(backend).type)
    if reason and backend in EXPECTED:
        pytest.fail(f"TRM_FAST_EXPECT names {backend}, but it cannot run: {reason}", pytrace=False)
    if reason:
        pytest.skip(f"{backend}: {reason}")


# Wider than a function, because hypothesis runs one test function many times.
@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend; one that cannot run skips with its own reason, or fails if it was expected."""
    skip_unless_usable(request.param)
    return request.param


@pytest.fixture(scope="module")
def device(backend: str) -> torch.device:
    """The device on which ``backend`` is tested."""
    return device_of(backend)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gives each test the same process: its order among the others must not matter."""
    from trm_fast import _dispatch, _slow_paths

    # These tensors are too small for more threads, which show races though.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.default_generator.manual_seed(request.config.getoption("randomly_seed", 0))
    limit, before = sys.getrecursionlimit(), _state()
    # What ran instead of what in other tests is none of this one's.
    for op in _dispatch.OPS.values():
        op.choices.clear()
        op.earlier.clear()
        op.notes.clear()
    _slow_paths._warned.clear()
    yield
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()
    # torch's compiler raises it on the way.
    sys.setrecursionlimit(limit)
    after = _state()
    assert after == before, [name for name in before if after[name] != before[name]]


def _state() -> dict[str, Any]:
    """What belongs to the process and has to be as it was."""
    # The compiler keeps its own there, for as long as the process lives.
    own = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_CACHE_DIR")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "directory": os.getcwd(),
        "environment": variables,
    }


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fills new memory with NaN (integers: the largest value), so that nothing unwritten passes."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled
