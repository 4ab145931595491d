"""``.pt`` files from outside: read whole, or refused in one line."""

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from trm_fast._pt import load_pt


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def rewritten(path, change, **options):
    """Writes the archive of a file anew, each entry as ``change(name, data)`` says."""
    before = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(before) as old, zipfile.ZipFile(path, "w", **options) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))


def test_tensors_and_plain_values_are_read_as_torch_reads_them(tmp_path):
    weight = torch.arange(6.0, dtype=torch.bfloat16).view(2, 3)
    values = {
        "state": OrderedDict(a=weight, b=weight, c=weight.T, d=torch.nn.Parameter(weight.float())),
        "plain": [None, 1, 2.5, "x", True, (1, (2,)), torch.float16, {1, 2}],
        7: torch.tensor(3, dtype=torch.int64).expand(4),
    }
    torch.save(values, tmp_path / "a.pt")
    found = load_pt(tmp_path / "a.pt")
    assert found["plain"] == values["plain"] and found[7].tolist() == [3] * 4
    for name, value in values["state"].items():
        assert (
            torch.equal(found["state"][name], value) and found["state"][name].dtype == value.dtype
        )
    assert found["state"]["a"].data_ptr() == found["state"]["b"].data_ptr()


def within(value, levels):
    for _ in range(levels):
        value = [value]
    return value


def itself():
    value = []
    value.append(value)
    return value


REFUSED = {
    "a call": (lambda: Call(print, ("called",)), "a '__builtin__.print'"),
    "memory": (lambda: Call(bytearray, (1 << 33,)), "a '__builtin__.bytearray'"),
    "a class": (lambda: argparse.Namespace(a=1), "a 'argparse.Namespace'"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "_rebuild_sparse_tensor'"),
    "expanded": (lambda: torch.zeros(1).expand(1 << 40), "tensors of 4398046511104 bytes"),
    "deep": (lambda: within(1, 100), "nested more than 64 deep"),
    "itself": (itself, "nested more than 64 deep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused_in_one_line(tmp_path, capsys, case):
    make, reason = REFUSED[case]
    torch.save({"a": make()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"/a\.pt: a file of torch\.save .* is required") as caught:
        load_pt(tmp_path / "a.pt")
    message = str(caught.value)
    assert reason in message and "\n" not in message and "weights_only" not in message
    assert not capsys.readouterr().out


def test_entries_that_unpack_to_more_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.zeros(1 << 20), path)
    rewritten(path, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="got compressed entries"):
        load_pt(path)


@pytest.mark.parametrize("count", [16, 17])
def test_a_tensor_larger_than_its_entry_is_refused(tmp_path, count):
    path = tmp_path / "a.pt"
    torch.save(torch.zeros(16), path)
    # The number of elements in the pickle, behind the device.
    rewritten(path, lambda _, data: data.replace(b"K\x10t", b"K" + bytes([count]) + b"t"))
    if count == 16:
        assert len(load_pt(path)) == 16
        return
    with pytest.raises(ValueError, match="got one that is damaged"):
        load_pt(path)


@pytest.mark.parametrize("data", [b"", b"PK\5\6", b"PK\3\4" + bytes(90), pickle.dumps({"a": 1})])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"/a\.pt: a file of torch\.save .*; got "):
        load_pt(tmp_path / "a.pt")


@pytest.mark.parametrize("second", ["a/DATA.PKL", "B/data.PKL", "b/data.pkl"])
def test_a_pickle_cannot_hide_behind_another_one(second, tmp_path):
    """torch looks for it whatever the case of its letters, and takes the last one."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(2)}, path)
    large = pickle.dumps({"size": 1 << 20}, protocol=2)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(second, large)
    with pytest.raises(ValueError, match=r"an archive with 2 data.pkl"):
        load_pt(path)
