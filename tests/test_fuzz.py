"""Mutated files end in a declared error; ``python -m tests.fuzz`` does the same for longer."""

from random import Random

import pytest

from . import fuzz as fuzz_module
from .fuzz import fuzz
from .support.mutations import mutated
from .support.readers import READERS


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(
    "count", [6, pytest.param(400, marks=pytest.mark.long)], ids=["short", "long"]
)
@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_or_refused(tmp_path, name, count, measured):
    if measured:
        count //= 3  # several times slower
    found = fuzz(name, iter(range(count)), 0, tmp_path, measured)
    assert not [said for said in found if said.startswith("!")]
    assert found.total() == count


def test_an_undeclared_exception_is_counted(tmp_path, monkeypatch):
    def read(folder):
        if b"\x93NUMPY" not in (folder / "a.npy").read_bytes():
            raise KeyError("a")

    monkeypatch.setitem(READERS, "npy", READERS["npy"]._replace(read=read))
    found = fuzz("npy", iter(range(40)), 0, tmp_path)
    assert any(said.startswith("!KeyError in test_fuzz.py:") for said in found)


def test_memory_beyond_the_multiple_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_module, "FIXED", 0)
    monkeypatch.setattr(fuzz_module, "MULTIPLE", 0)
    found = fuzz("npy", iter(range(3)), 0, tmp_path, measured=True)
    assert all(said.startswith("!") and " MB for a file of " in said for said in found)


def test_mutations_are_those_of_the_seed():
    data = b'{"a": [1, 2, {"b": "x"}]}'
    one, two = ([mutated(data, Random(seed), ".json") for seed in range(50)] for _ in range(2))
    assert one == two and len({*one}) > 20
