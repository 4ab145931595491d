"""The choice between the compiled generators and those in Python."""

import signal
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

from trm_fast._errors import BackendError
from trm_fast.data import _items, _native, _reference
from trm_fast.data._reference.random import Random, mix
from trm_fast.data.puzzles.sudoku import generate_sudoku


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    monkeypatch.delenv("TRM_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRM_FAST_STRICT", raising=False)


@pytest.fixture
def missing(monkeypatch):
    """As if the module were not built."""
    monkeypatch.setitem(sys.modules, "trm_fast._data", None)
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


def test_the_compiled_module_is_taken_if_it_is_there(built):
    assert _native.choose("me", None).__name__ == "trm_fast._data"
    assert _native.choose("me", True).__name__ == "trm_fast._data"
    assert _native.choose("me", False) is _reference


def test_the_environment_names_a_form(built, monkeypatch):
    monkeypatch.setenv("TRM_FAST_BACKEND", "reference")
    assert _native.choose("me", None) is _reference
    assert _native.choose("me", True).__name__ == "trm_fast._data"


def test_without_the_module_python_runs(missing):
    assert _native.choose("me", None) is _reference
    assert generate_sudoku(1, 4)[0].shape == (1, 16)


@pytest.mark.parametrize(
    ("native", "variable"),
    [(True, None), (None, ("TRM_FAST_BACKEND", "cpp")), (None, ("TRM_FAST_STRICT", "1"))],
)
def test_what_must_be_native_says_how_to_build_it(missing, monkeypatch, native, variable):
    if variable:
        monkeypatch.setenv(*variable)
    message = (
        "generate_sudoku: the C\\+\\+ form must run, but trm_fast._data is not built: build it "
        "with TRM_FAST_DATA=1 pip install --no-build-isolation ."
    )
    with pytest.raises(BackendError, match=message):
        generate_sudoku(1, native=native)


def test_another_revision_is_refused(monkeypatch):
    module = ModuleType("trm_fast._data")
    module.REVISION = _native.REVISION + 1
    monkeypatch.setitem(sys.modules, "trm_fast._data", module)
    _native._load.cache_clear()
    try:
        assert f"has revision {module.REVISION}, not {_native.REVISION}: re" in _native.unusable()
    finally:
        _native._load.cache_clear()


def test_the_module_has_the_functions_of_the_reference(built):
    from trm_fast import _data

    names = {name for name in dir(_data) if not name.startswith("_")} - {"REVISION"}
    assert names == {
        "Items",
        *(f"generate_{task}" for task in ("sudoku", "mazes", "listops")),
        *("solve_sudoku", "solve_mazes", "evaluate_listops"),
    }
    assert all(hasattr(_reference, name) for name in names)


@pytest.mark.parametrize(
    "array", [np.zeros((1, 81)), np.zeros((1, 81), int), np.zeros((1, 162), np.uint8)[:, ::2]]
)
def test_the_module_copies_nothing_silently(built, array):
    from trm_fast import _data

    with pytest.raises(TypeError, match="incompatible function arguments"):
        _data.solve_sudoku(array, 3, 3, 1)


def test_generators_need_no_torch():
    program = (
        "import sys; from trm_fast.data.puzzles import maze, sudoku; "
        "from trm_fast.data.synthetic import listops; "
        "sudoku.generate_sudoku(1, 4); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_streams_are_splitmix64():
    # mix and the golden ratio give the published first outputs of SplitMix64 with seed 0.
    random = Random(0, 0, 0)
    assert random._state == 0
    first = [random._next() for _ in range(3)]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert Random(3, 4, 5)._state == mix((mix((mix(3) + 4) % 2**64) + 5) % 2**64)


def test_bounded_draws_are_uniform():
    random = Random(1, 2, 3)
    counts = np.bincount([random.below(7) for _ in range(70_000)])
    # Binomial: 10,000 each, standard deviation 93; 6 of them.
    assert len(counts) == 7 and abs(counts - 10_000).max() < 6 * 93
    drawn = np.array([random.uniform() for _ in range(10_000)])
    # The mean of n uniform numbers has the deviation 1 / sqrt(12 n).
    assert 0 <= drawn.min() and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 6 / (12 * 10_000) ** 0.5


def test_threads_default_to_the_cores_of_the_process():
    assert _items.thread_count("me", None) >= 1
    assert _items.thread_count("me", 3) == 3


# Called below the checks of the pages.

ITEMS = (1, np.arange(2), 0, 1, 1)
HOSTILE = {
    "a row too short": lambda m: m.solve_sudoku(np.zeros((1, 15), np.uint8), 2, 2, 1),
    "no rows": lambda m: m.solve_sudoku(np.zeros(16, np.uint8), 2, 2, 1),
    "a digit too large": lambda m: m.solve_sudoku(np.full((1, 16), 200, np.uint8), 2, 2, 1),
    "a board too large": lambda m: m.solve_sudoku(np.zeros((1, 1 << 16), np.uint8), 16, 16, 1),
    "a box of nothing": lambda m: m.generate_sudoku(m.Items(*ITEMS), 0, 3, 1, 2, False, 0, -1),
    "a box that overflows": lambda m: m.generate_sudoku(
        m.Items(*ITEMS), 1 << 16, 1 << 16, 1, 2, False, 0, -1
    ),
    "clues in reverse": lambda m: m.generate_sudoku(m.Items(*ITEMS), 2, 2, 9, 4, False, 0, -1),
    "a maze without inside": lambda m: m.generate_mazes(m.Items(*ITEMS), 2, 5, 0, 1),
    "a maze that overflows": lambda m: m.generate_mazes(m.Items(*ITEMS), 1 << 16, 1 << 16, 0, 1),
    "openings below zero": lambda m: m.generate_mazes(m.Items(*ITEMS), 5, 5, -1, 1),
    "another maze": lambda m: m.solve_mazes(np.zeros((1, 24), np.uint8), 5, 5, 1),
    "tokens of no length": lambda m: m.generate_listops(m.Items(*ITEMS), 0, 0, 2, 3, 0.5),
    "one argument": lambda m: m.generate_listops(m.Items(*ITEMS), 1, 9, 2, 1, 0.5),
    "tokens without rows": lambda m: m.evaluate_listops(np.zeros(3, np.uint8), 1),
    "indices of two dimensions": lambda m: m.Items(1, np.zeros((2, 2), np.int64), 0, 1, 1),
    "no threads": lambda m: m.generate_mazes(m.Items(*ITEMS[:4], 0), 5, 5, 0, 1),
    "fewer threads": lambda m: m.solve_mazes(np.full((1, 25), 2, np.uint8), 5, 5, -1),
    "threads beyond number": lambda m: m.evaluate_listops(np.zeros((1, 3), np.uint8), 1 << 30),
    "attempts that overflow": lambda m: m.Items(1, np.arange(2), 1, 2**63 - 1, 1),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_the_module_refuses_what_lies_outside_of_its_arrays(built, case):
    with pytest.raises(ValueError, match="_data: "):
        HOSTILE[case](_native.choose("me", True))


def endless(module: ModuleType, name: str, threads: int) -> None:
    """Makes what cannot be: a Sudoku of one solution without clues, or a path longer than mazes."""
    items = module.Items(0, np.arange(3), 0, 1 << 62, threads)
    if name == "sudoku":
        module.generate_sudoku(items, 3, 3, 0, 0, True, 0, -1)
    elif name == "maze":
        module.generate_mazes(items, 9, 9, 0, 1000)
    else:
        module.generate_listops(items, 1000, 10, 2, 2, 0.5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["sudoku", "maze", "listops"])
def test_an_interrupt_ends_what_would_never_end(built, name, threads):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            endless(_native.choose("me", True), name, threads)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # What is made afterwards is whole.
    same = [generate_sudoku(3, 4, native=native)[0] for native in (True, False)]
    assert np.array_equal(*same)


def test_a_source_tree_that_hides_an_installed_package_is_named(missing, monkeypatch, tmp_path):
    (tmp_path / "trm_fast").mkdir()
    (tmp_path / "trm_fast" / "_data.cpython-311-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    hidden = f"which hides the installed {tmp_path / 'trm_fast'}: leave the folder of the clone, or"
    assert hidden in _native.unusable()
