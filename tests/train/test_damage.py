"""Damaged and hostile checkpoints: found before anything is used, told of, and passed over."""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from trm_fast.train import Checkpoints, read_checkpoint

from .checks import damages, files, is_state_at, saved, sealed, state_at

FILES = [*(f"{part}.safetensors" for part in state_at(0)), "state.json", "MANIFEST.json"]


@pytest.mark.parametrize("name", [*FILES, "config.json"])
def test_any_damage_of_a_file_is_found_and_the_older_one_loads(tmp_path, name):
    (tmp_path / "config.json").write_text('{"lr": 1}')
    checkpoints = saved(tmp_path, 100, 200)
    path = checkpoints.directory / "step-00000200" / name
    data = path.read_bytes()
    for what, damaged in damages(data, random.Random(0), flips=40):
        path.write_bytes(damaged)
        loaded = checkpoints.load()
        assert loaded.step == 100 and is_state_at(100, loaded.state), what
        assert len(loaded.skipped) == 1 and "\n" not in loaded.skipped[0], what
        # A flip in the manifest may show in the file that it speaks of.
        assert name in loaded.skipped[0] or name == "MANIFEST.json", what
    path.write_bytes(data)
    assert checkpoints.load().step == 200


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(tmp_path, name):
    checkpoints = saved(tmp_path, 100, 200)
    (checkpoints.directory / "step-00000200" / name).unlink()
    loaded = checkpoints.load()
    assert is_state_at(100, loaded.state)
    assert loaded.skipped == [
        f"checkpoint: {tmp_path}/ckpt/step-00000200: {name} must exist; got no such file"
    ]


@pytest.mark.parametrize("name", ["LATEST", "BEST"])
def test_damage_of_a_pointer_is_told_and_a_whole_checkpoint_loads(tmp_path, name):
    checkpoints = saved(tmp_path, 199, 200)  # one bit away from 201
    checkpoints.save(201, state_at(201), score=1.0)
    path, which = checkpoints.directory / name, name.lower()
    data = path.read_bytes()
    for what, damaged in damages(data, random.Random(0), flips=len(data) * 16):
        path.write_bytes(damaged)
        loaded = checkpoints.load(which)
        assert is_state_at(loaded.step, loaded.state), what
        # The last line feed is nothing that could be damaged.
        harmless = damaged.removesuffix(b"\n") == data.removesuffix(b"\n")
        assert bool(loaded.skipped) != harmless, what
        assert loaded.step == 201 or (name, loaded.step) == ("LATEST", 200), what
    path.unlink()
    assert checkpoints.load(which).step == 201


def test_the_next_older_one_is_taken_until_none_is_left(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3)
    for step, older in ((3, 2), (2, 1)):
        (checkpoints.directory / f"step-0000000{step}" / "ema.safetensors").write_bytes(b"")
        assert checkpoints.load().step == older
    (checkpoints.directory / "step-00000001" / "MANIFEST.json").unlink()
    with pytest.raises(ValueError) as caught:
        checkpoints.load()
    message = str(caught.value)
    assert message.count("ema.safetensors must have") == 2 and "\n" not in message
    assert "step-00000001: MANIFEST.json must exist" in message


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step, score in ((1, 0.3), (2, 0.9), (3, 0.1), (4, 0.4)):
        checkpoints.save(step, state_at(step), score=score)
    path = checkpoints.directory / "step-00000002" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    loaded = checkpoints.load("best")
    assert loaded.step == 4
    assert re.search("step-00000002: model.safetensors must have the sha256", loaded.skipped[0])


def test_verify_names_what_is_damaged(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3)
    second = checkpoints.directory / "step-00000002"
    data = (second / "carry.safetensors").read_bytes()
    (second / "carry.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (checkpoints.directory / "step-00000003" / "state.json").write_text("{}")
    found = {path.name: why for path, why in checkpoints.verify().items()}
    assert found["step-00000001"] is None
    assert "carry.safetensors must have the sha256 of MANIFEST.json" in found["step-00000002"]
    assert "state.json must have" in found["step-00000003"]
    # Sizes alone do not show the flipped bit.
    assert [info.step for info in checkpoints.list() if info.damage] == [3]


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
    checkpoints = saved(tmp_path, 1)
    copied = tmp_path / "ckpt" / "step-00000009"
    shutil.copytree(checkpoints.directory / "step-00000001", copied)
    with pytest.raises(ValueError, match=r"state.json must be of step 9; got 1"):
        read_checkpoint(copied)
    # Under a name of its own it may go anywhere.
    shutil.copytree(copied, tmp_path / "elsewhere")
    assert is_state_at(1, read_checkpoint(tmp_path / "elsewhere").state)


# --- made by a stranger, with a manifest that fits ---


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def described(**changed: object) -> bytes:
    state = {"format": 1, "step": 200, "serial": 2, "score": None, "summary": {}, "parts": {}}
    return json.dumps(state | changed).encode()


def tensors(tree: object) -> bytes:
    return described(parts={"model": tree})


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


OVERLAP = json.dumps({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}).encode()
CONTENTS = {
    "pickle": ("model.safetensors", None),
    "header bomb": ("model.safetensors", header(b"{}", 1 << 40)),
    "header beyond 64 bits": ("model.safetensors", header(b"{}", (1 << 64) - 1)),
    "overlap": ("model.safetensors", header(OVERLAP) + bytes(12)),
    "zip": ("model.safetensors", b"PK\x03\x04" + bytes(200)),
    "empty": ("model.safetensors", b""),
    "deep list": ("state.json", b"[" * 100_000),
    "deep dict": ("state.json", b'{"a":' * 100_000),
    "deep tree": ("state.json", tensors("X").replace(b'"X"', b"[" * 600 + b"]" * 600)),
    "huge int": ("state.json", described().replace(b"200", b"9" * 100_000)),
    "huge step": ("state.json", described(step=10**30)),
    "nan": ("state.json", described().replace(b"null", b"NaN")),
    "pickled json": ("state.json", pickle.dumps({"format": 1})),
    "yaml": ("state.json", b"!!python/object/apply:os.system ['true']"),
    "no dict": ("state.json", b"[]"),
    "missing key": ("state.json", b'{"format":1}'),
    "boolean step": ("state.json", described(step=True)),
    "negative step": ("state.json", described(step=-200)),
    "next format": ("state.json", described(format=2)),
    "serial 0": ("state.json", described(serial=0)),
    "text as score": ("state.json", described(score="1")),
    "list as parts": ("state.json", described(parts=[])),
    "tuple as summary": ("state.json", described(summary={"$tuple": []})),
    "tensor as summary": ("state.json", described(summary={"$tensor": "a"})),
    "unknown tag": ("state.json", tensors({"$eval": "1"})),
    "missing tensor": ("state.json", tensors({"$tensor": "missing"})),
    "part with a path": ("state.json", described(parts={"../model": {"$tensor": "a"}})),
    "unhashable key": ("state.json", tensors({"$dict": [[[], 1]]})),
}


@pytest.fixture
def hostile(tmp_path):
    """A run with a good checkpoint, and the directory of a newer one to be spoilt."""
    checkpoints = saved(tmp_path, 100, 200)
    return checkpoints, checkpoints.directory / "step-00000200"


def assert_refused(checkpoints: Checkpoints, path: Path, reason: str = "") -> None:
    with pytest.raises(ValueError, match=r"^checkpoint: ") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert reason in str(caught.value)
    assert checkpoints.load().step == 100
    assert not (path.parent / "canary").exists()


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_of_a_stranger_are_refused(hostile, case):
    checkpoints, path = hostile
    name, data = CONTENTS[case]
    if data is None:
        data = pickle.dumps(Canary(path.parent / "canary"))
    (path / name).write_bytes(data)
    sealed(path)
    assert_refused(checkpoints, path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_torch_save_is_refused(hostile, legacy):
    checkpoints, path = hostile
    torch.save(
        {"a": Canary(path.parent / "canary")},
        path / "model.safetensors",
        _use_new_zipfile_serialization=not legacy,
    )
    sealed(path)
    assert_refused(checkpoints, path, "model.safetensors must be a safetensors file")


@pytest.mark.parametrize(
    "name",
    [
        "../step-00000100/model.safetensors", "/etc/hostname", "a/b.safetensors", "..", ".",
        "", "model.safetensors\n", "model.safetensors\0", "MANIFEST.json", "LATEST", "x.pt",
        "model.SAFETENSORS", "\u202emodel.safetensors", "a" * 100 + ".safetensors",
        "-x.safetensors",
    ],
)  # fmt: skip
def test_names_that_are_not_ours_are_refused(hostile, name):
    checkpoints, path = hostile
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest, separators=(",", ":")))
    assert_refused(checkpoints, path, "MANIFEST.json must list plain names of ours")


@pytest.mark.parametrize(
    "value",
    [
        None, [], "12", [1], [1, 2, 3], [True, "0" * 64], [-1, "0" * 64], [1.0, "0" * 64],
        [10**300, "0" * 64], [4, "0" * 63], [4, "G" * 64], [4, None], {"size": 4},
    ],
)  # fmt: skip
def test_entries_that_are_not_ours_are_refused(hostile, value):
    checkpoints, path = hostile
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["model.safetensors"] = value
    (path / "MANIFEST.json").write_text(json.dumps(manifest, separators=(",", ":")))
    assert_refused(checkpoints, path)


@pytest.mark.parametrize(
    "manifest",
    [
        b"", b"null", b"[]", b"{}", b'{"format":1}', b'{"format":1,"files":{}}',
        b'{"format":1,"files":[]}', b'{"format":2,"files":{}}', b'{"format":true,"files":{}}',
        b'{"format":1,"files":{},"more":1}', b"{" * 100_000, b"[" * 100_000, b"9" * 100_000,
        b'{"format":1,"files":{"a":' * 50_000, bytes(100), b"\xff\xfe", pickle.dumps({}),
    ],
    ids=lambda data: repr(data[:30]),
)  # fmt: skip
def test_manifests_that_are_not_ours_are_refused(hostile, manifest):
    checkpoints, path = hostile
    (path / "MANIFEST.json").write_bytes(manifest)
    assert_refused(checkpoints, path, "MANIFEST.json")


def test_a_manifest_that_only_looks_different_is_refused(hostile):
    checkpoints, path = hostile
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert_refused(checkpoints, path, "MANIFEST.json must be JSON as it was written")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory", "device"])
def test_what_is_no_regular_file_is_refused(hostile, tmp_path, name, kind):
    checkpoints, path = hostile
    data = (path / name).read_bytes()
    (path / name).unlink()
    if kind == "link":
        (tmp_path / "same").write_bytes(data)
        (path / name).symlink_to(tmp_path / "same")
    elif kind == "dangling link":
        (path / name).symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    else:
        (path / name).mkdir()
    assert_refused(checkpoints, path, f"{name} must be a regular file; got a")


def test_a_link_to_a_checkpoint_is_refused(hostile, tmp_path):
    checkpoints, path = hostile
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert_refused(checkpoints, path, "must be a directory")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
def test_a_sparse_file_of_a_terabyte_is_not_read(hostile, name):
    checkpoints, path = hostile
    with open(path / name, "r+b") as file:
        try:
            file.truncate(1 << 43)
        except OSError as error:
            pytest.skip(f"this file system has no files of 8 TB: {error}")
    if name != "MANIFEST.json":
        manifest = json.loads((path / "MANIFEST.json").read_text())
        manifest["files"][name][0] = 1 << 43
        (path / "MANIFEST.json").write_text(json.dumps(manifest, separators=(",", ":")))
    assert_refused(checkpoints, path, name)


@pytest.mark.parametrize(
    "content",
    [
        b"../step-00000200\n", b"/etc\n", b"step-00000200/../step-00000100\n", b"", b"\n",
        b"step-00000300\n", b"step-200\n", b"\xff", b"step-00000200\0\n", b"x" * 300,
    ],
)  # fmt: skip
def test_a_pointer_of_a_stranger_is_not_followed(tmp_path, content):
    checkpoints = saved(tmp_path, 100, 200)
    (checkpoints.directory / "LATEST").write_bytes(content)
    loaded = checkpoints.load()
    assert loaded.step == 200 and loaded.skipped[0].startswith(f"{tmp_path}/ckpt/LATEST: ")


@pytest.mark.parametrize("target", ["step-00000100", "../../LATEST"])
def test_a_pointer_that_is_a_link_is_not_followed(tmp_path, target):
    checkpoints = saved(tmp_path, 100, 200)
    (checkpoints.directory / "LATEST").unlink()
    (checkpoints.directory / "LATEST").symlink_to(target)
    loaded = checkpoints.load()
    assert loaded.step == 200 and "LATEST must be a regular file; got a link" in loaded.skipped[0]


def test_reading_writes_nothing(tmp_path):
    checkpoints = saved(tmp_path, 100, 200)
    (checkpoints.directory / ".tmp-1").mkdir()
    before = files(tmp_path)
    checkpoints.load(), checkpoints.list(), checkpoints.verify()
    assert files(tmp_path) == before and (checkpoints.directory / ".tmp-1").is_dir()
