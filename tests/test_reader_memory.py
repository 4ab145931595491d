"""Reading takes memory in proportion to the files, whatever they are made of.

The bound is that of docs/checkpoints.md. Each file is the costliest of its kind that is known: many
small values, which take far more memory than text. What every reader takes for itself does not
count: the memory of a file is compared with that of one four times as large.
"""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from trm_fast import _json
from trm_fast._pt import MAX_PICKLE, load_pt
from trm_fast.cli._data_check import check
from trm_fast.cli._settings_file import check_file
from trm_fast.data import read_arc_folder, read_identifiers, read_jsonl, read_maze_csv, read_pairs
from trm_fast.data.sources.npy import read_npy
from trm_fast.recipes.pt_file import write_pt
from trm_fast.train.checkpoints.state import from_safetensors, loads, unflatten
from trm_fast.train.run_directory import read_records

MULTIPLE = 100
SIZE = 1 << 14


def array(item, size):
    """JSON of an array of items."""
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


def rows(row, size, head=b""):
    return head + row * (size // len(row))


def read_json(path):
    return _json.read(path)


def read_state(path):
    return unflatten(loads(path.read_bytes(), "state.json"), {})


def read_maze(path):
    return read_maze_csv(path)


def pickled(item, size):
    """An archive of torch.save with a list of pickled items."""
    plain, made = io.BytesIO(), io.BytesIO()
    torch.save([], plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(made, "w") as archive:
        for name in source.namelist():
            items = b"\x80\x02](" + item * (size // len(item)) + b"e."
            archive.writestr(name, items if name.endswith("data.pkl") else source.read(name))
    return made.getvalue()


def tensors(size):
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(size // len(entry))) + "}").encode()
    return len(text).to_bytes(8, "little") + text


def numbers(size):
    file = io.BytesIO()
    np.save(file, np.zeros(size // 8, np.int64))
    return file.getvalue()


def expressions(size):
    """Rows of ListOps and a long one, up to whose length all are padded."""
    long = b"[MAX " + b"1 " * 60 * 4 + b"],1\n"
    return rows(b"[MAX 1 2 ],2\n", size, b"q,a\n") + long


def solved(size):
    pair = {"input": [[0]], "output": [[0]]}
    return json.dumps({"train": [pair] * (size // 35), "test": [pair]}).encode()


FILES = {
    "json lists": ("a.json", lambda size: array(b"[]", size), read_json),
    "json objects": ("a.json", lambda size: array(b'{"":{}}', size), read_json),
    "json words": ("a.json", lambda size: array(b'"\xc3\xa9a"', size), read_json),
    "json quotes": ("a.json", lambda size: array(b'"[["', size), read_json),
    "state lists": ("a.json", lambda size: array(b"[[]]", size), read_state),
    "state objects": ("a.json", lambda size: array(b'{"":{}}', size), read_state),
    "state dicts": ("a.json", lambda size: array(b'{"$dict":[[0,{}]]}', size), read_state),
    "records": ("a.jsonl", lambda size: rows(b'{"":{}}\n', size), read_records),
    "unknown columns": (
        "a.csv", lambda size: rows(b"," * 999 + b"\n", size, b"q,a" + b"," * 998 + b"\n"),
        read_maze,
    ),
    "short rows": ("a.csv", lambda size: rows(b"#,#\n", size, b"q,a\n"), read_maze),
    "one long row": (
        "a.csv", lambda size: rows(b"#", size // 2, b"q,a\n") + b"," + b"#" * (size // 2) + b"\n",
        lambda path: read_pairs(path, "#"),
    ),
    "long fields": (
        "a.jsonl", lambda size: rows(b'{"q":"a","x":[[],[],[],[],{}]}\n', size),
        lambda path: read_jsonl(path, {"q": str}),
    ),
    "padded": ("a.csv", expressions, check),
    "identifiers": (
        "identifiers.json", lambda size: array(b'"ab"', size),
        lambda path: read_identifiers(path.parent),
    ),
    "tasks": ("a.json", solved, lambda path: read_arc_folder(path)),
    "npy": ("a.npy", numbers, read_npy),
    "pickled lists": ("a.pt", lambda size: pickled(b"]", size), load_pt),
    "pickled pairs": ("a.pt", lambda size: pickled(b"]K\x01a", size), load_pt),
    "tensors": ("a.safetensors", tensors, lambda path: from_safetensors(path.read_bytes())),
}  # fmt: skip


REFUSED = {"unknown columns"}


@pytest.mark.parametrize("name", FILES)
def test_memory_grows_by_less_than_the_multiple(tmp_path, name):
    file, make, read = FILES[name]
    sizes, peaks = [], []
    for size in (SIZE, SIZE, 4 * SIZE):  # the first one for what is imported or kept
        (tmp_path / file).write_bytes(make(size))
        tracemalloc.start()
        try:
            read(tmp_path / file)
            outcome = "read"
        except ValueError:  # what is refused takes memory as well
            outcome = "refused"
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append((tmp_path / file).stat().st_size)
    grown = (peaks[2] - peaks[1]) / (sizes[2] - sizes[1])
    assert grown <= MULTIPLE
    assert outcome == ("refused" if name in REFUSED else "read")


def test_settings_are_few():
    # Of YAML it takes 150 times the size, which is why the size is bounded.
    with pytest.raises(ValueError, match=r"a\.yaml: must have at most 65536 characters; got 65537"):
        check_file(" " * 65537, "a.yaml:", {})


def test_values_that_are_no_tensors_are_few(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickled(b"]", MAX_PICKLE))
    with pytest.raises(ValueError, match=r"got 41943\d\d bytes beside the tensors, of which"):
        load_pt(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="x: values that are no tensors must take at most 4194304"):
        write_pt("x", tmp_path / "b.pt", {"a": "x" * MAX_PICKLE})
    assert not (tmp_path / "b.pt").exists()
