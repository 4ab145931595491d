"""Saving and loading: order, retention, scores, what a resume from an older step does, refusals."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file

from trm_fast.train import Checkpoints, read_checkpoint, size_of

from .checks import files, is_state_at, saved, state_at


def steps(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name.removeprefix("step-") for path in checkpoints.directory.glob("step-*"))


def pointer(checkpoints: Checkpoints, name: str) -> str:
    return (checkpoints.directory / name).read_text()


def test_what_is_saved_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1200, state_at(1200), score=0.5, summary={"loss": math.inf, "n": 3})
    assert path == tmp_path / "ckpt" / "step-00001200"
    loaded = Checkpoints(tmp_path).load()
    assert is_state_at(1200, loaded.state)
    assert (loaded.step, loaded.score, loaded.path) == (1200, 0.5, path)
    assert loaded.summary == {"loss": math.inf, "n": 3} and loaded.skipped == []


def test_the_directory_is_as_documented(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": 1}')
    checkpoints = saved(tmp_path, 7)
    names = {path.name for path in (checkpoints.directory / "step-00000007").iterdir()}
    parts = {f"{part}.safetensors" for part in state_at(7)}
    assert names == parts | {"state.json", "config.json", "MANIFEST.json"}
    assert {path.name for path in checkpoints.directory.iterdir()} == {"step-00000007", "LATEST"}
    assert pointer(checkpoints, "LATEST") == "step-00000007\n"
    assert json.loads((tmp_path / "ckpt/step-00000007/config.json").read_text()) == {"lr": 1}


def test_other_tools_read_the_tensors(tmp_path):
    path = Checkpoints(tmp_path).save(7, state_at(7))
    found = load_file(path / "model.safetensors")
    expected = state_at(7)["model"]
    assert sorted(found) == ["layer.bias", "layer.weight"]  # head.weight is layer.weight
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_part_without_tensors_has_no_file(tmp_path):
    path = Checkpoints(tmp_path).save(1, {"trainer": {"step": 1}, "model": torch.ones(2)})
    assert not (path / "trainer.safetensors").exists()
    assert read_checkpoint(path).state["trainer"] == {"step": 1}
    assert read_checkpoint(path).state["model"].tolist() == [1, 1]


def test_parts_are_read_alone(tmp_path):
    checkpoints = saved(tmp_path, 1)
    path = checkpoints.directory / "step-00000001" / "optim.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")  # the damage is in a file that is not read
    assert list(checkpoints.load(parts=["ema", "model"]).state) == ["ema", "model"]
    with pytest.raises(ValueError, match=r"optim.safetensors must have the sha256"):
        checkpoints.load()
    with pytest.raises(ValueError, match=r"parts must be among model, ema, .*; got 'nothing'"):
        checkpoints.load(1, parts=["nothing"])


def test_list_and_size_read_no_tensors(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 5)
    checkpoints.save(6, state_at(6), score=1, summary={"note": "x"})
    monkeypatch.setattr("trm_fast.train.checkpoints.reader.from_safetensors", None)
    first, second = checkpoints.list()
    assert (first.step, first.serial, first.score, first.damage) == (5, 1, None, None)
    assert (second.step, second.serial, second.score, second.summary) == (6, 2, 1.0, {"note": "x"})
    assert second.parts == tuple(state_at(6))
    assert second.size == sum(path.stat().st_size for path in second.path.iterdir())
    # The tied head is stored once: weight 15, bias 3, ema 15, moment 15 and step floats, then carry
    # and random state.
    assert size_of(state_at(6)) == 4 * (15 + 3 + 15 + 15 + 1) + 2 + 8 * 8 + 9


def test_where_nothing_was_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "missing")
    assert checkpoints.list() == [] and checkpoints.verify() == {}
    for which, asked in (("latest", "latest"), ("best", "best"), (3, "step 3")):
        with pytest.raises(ValueError, match=f"checkpoint: {asked} of .* must be whole; got none"):
            checkpoints.load(which)
    assert not (tmp_path / "missing").exists()


def test_one_step_one_name_and_one_path(tmp_path):
    checkpoints = saved(tmp_path, 10, 20)
    path = checkpoints.directory / "step-00000010"
    for which in (10, "step-00000010", str(path), path):
        assert is_state_at(10, checkpoints.load(which).state)
    # What was asked for by name is not replaced by another one.
    (path / "model.safetensors").write_bytes(b"")
    for which in (10, path):
        with pytest.raises(ValueError, match=r"model.safetensors must have"):
            checkpoints.load(which)


# --- which ones stay ---


def test_the_last_ones_stay(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3, 4, 5, keep_last=3)
    assert steps(checkpoints) == ["00000003", "00000004", "00000005"]
    assert not list(checkpoints.directory.glob(".tmp-*"))


def test_the_best_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_best=2)
    for step, score in enumerate([0.1, 0.9, 0.5, 0.8, None, 0.2, 0.3], 1):
        checkpoints.save(step, state_at(step), score=score)
    assert steps(checkpoints) == ["00000002", "00000004", "00000006", "00000007"]
    assert pointer(checkpoints, "BEST") == "step-00000002\n"
    assert checkpoints.load("best").step == 2 and checkpoints.load("best").score == 0.9


def test_of_equal_scores_the_earlier_is_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, state_at(step), score=0.5)
    assert pointer(checkpoints, "BEST") == "step-00000001\n"


def test_without_scores_there_is_no_best(tmp_path):
    checkpoints = saved(tmp_path, 1)
    assert not (checkpoints.directory / "BEST").exists()
    with pytest.raises(ValueError, match=r"best of .* must be whole; got .*BEST must exist"):
        checkpoints.load("best")


def test_keep_best_0_pins_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_best=0)
    for step, score in ((1, 9.0), (2, 0.0), (3, 0.0)):
        checkpoints.save(step, state_at(step), score=score)
    assert steps(checkpoints) == ["00000002", "00000003"]
    assert not (checkpoints.directory / "BEST").exists()


def test_damaged_ones_neither_count_nor_go(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3, keep_last=2)
    (checkpoints.directory / "step-00000003" / "model.safetensors").write_bytes(b"")
    checkpoints.save(4, state_at(4))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state_at(5))
    assert steps(checkpoints) == ["00000003", "00000004", "00000005"]
    damaged = [info.step for info in checkpoints.list() if info.damage]
    assert damaged == [3]


def test_old_ones_that_cannot_be_deleted_are_told_of_and_the_save_counts(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1, 2, keep_last=2)
    rename = os.rename

    def refuse(source, target):
        if ".tmp-" in str(target):
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(UserWarning, match="old ones in .* are not deleted: Permission denied"):
        checkpoints.save(3, state_at(3))
    assert is_state_at(3, checkpoints.load().state)


# --- steps that were saved before ---


def test_a_step_saved_again_gets_its_own_directory(tmp_path):
    checkpoints = saved(tmp_path, 3)
    before = files(checkpoints.directory / "step-00000003")
    newer = state_at(3) | {"trainer": {"second": True}}
    assert checkpoints.save(3, newer).name == "step-00000003-2"
    assert checkpoints.save(3, newer).name == "step-00000003-3"
    assert files(checkpoints.directory / "step-00000003") == before
    assert checkpoints.load().path.name == "step-00000003-3"
    assert checkpoints.load(3).path.name == "step-00000003-3"
    assert pointer(checkpoints, "LATEST") == "step-00000003-3\n"


def test_a_run_taken_up_from_an_older_step_leaves_its_future_behind(tmp_path):
    checkpoints = saved(tmp_path, 100, 200, 300, keep_last=2)
    resumed = Checkpoints(tmp_path, keep_last=2)
    assert steps(resumed) == ["00000200", "00000300"]
    resumed.save(250, state_at(250))
    assert steps(resumed) == ["00000200", "00000250"]
    assert resumed.load().step == 250
    # Damaged, it gives way to what it came from.
    (checkpoints.directory / "step-00000250" / "ema.safetensors").unlink()
    assert resumed.load().step == 200


def test_the_best_of_an_abandoned_future_stays_but_is_not_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, score in ((100, 0.1), (200, 0.2), (300, 0.9)):
        checkpoints.save(step, state_at(step), score=score)
    for step in (250, 260):
        checkpoints.save(step, state_at(step), score=0.3)
    assert steps(checkpoints) == ["00000250", "00000260", "00000300"]
    assert checkpoints.load().step == 260 and checkpoints.load("best").step == 300
    # Also where LATEST is gone: the order of saving decides, not the step.
    (checkpoints.directory / "LATEST").unlink()
    loaded = checkpoints.load()
    assert loaded.step == 260
    assert [line.partition(": ")[2] for line in loaded.skipped] == [
        "LATEST must exist; got no such file"
    ]


def test_a_latest_set_back_by_hand_counts(tmp_path):
    checkpoints = saved(tmp_path, 100, 200)
    (checkpoints.directory / "LATEST").write_text("step-00000100\n")
    loaded = checkpoints.load()
    assert loaded.step == 100
    assert loaded.skipped == [
        f"{checkpoints.directory}/step-00000200: is whole, but LATEST does not name it"
    ]


# --- what is refused before anything is written ---


@pytest.mark.parametrize("part", ["model", "ema", "optim"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_saved(tmp_path, part, dtype, value):
    tensor = torch.zeros(3, 2, dtype=dtype)
    tensor[1, 1] = value
    state = state_at(1) | {part: {"state": {0: {"bad": tensor}}}}
    message = f"checkpoint: {part}.state.0.bad must be finite; got NaN or infinity in 1 of 6"
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).save(1, state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_what_is_not_finite_in_rare_dtypes_is_not_saved(tmp_path, dtype):
    tensor = torch.tensor([1.0, math.nan]).to(dtype)
    with pytest.raises(ValueError, match=r"model.w must be finite; got .* in 1 of 2"):
        Checkpoints(tmp_path).save(1, {"model": {"w": tensor}})


def test_a_sum_that_overflows_is_finite(tmp_path):
    large = torch.full((4,), torch.finfo(torch.float32).max)
    opposed = torch.tensor([math.inf, -math.inf])
    assert Checkpoints(tmp_path).save(1, {"model": large, "carry": opposed}).exists()
    with pytest.raises(ValueError, match=r"model.model must be finite; .* 2 of 2"):
        Checkpoints(tmp_path).save(2, {"model": opposed})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, {}), ValueError, "step must be an int >= 0; got -1"),
        ((True, {}), ValueError, "step must be an int >= 0; got True"),
        ((1.0, {}), ValueError, "step must be an int >= 0; got 1.0"),
        ((10**18, {}), ValueError, "step must be an int >= 0"),
        ((1, {"../a": 1}), ValueError, r"a part must have a plain name .*; got '../a'"),
        ((1, {"": 1}), ValueError, "a part must have a plain name"),
        ((1, {3: 1}), ValueError, "a part must have a plain name"),
        ((1, {"model": {"f": print}}), TypeError, "model.f must be a tensor"),
        ((1, {"trainer": ["x" * (17 << 20)]}), ValueError, "no tensors must take at most"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        Checkpoints(tmp_path).save(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_must_be_finite(tmp_path, score):
    with pytest.raises(ValueError, match="score must be finite or None; got"):
        Checkpoints(tmp_path).save(1, {}, score=score)


def test_a_summary_has_plain_values(tmp_path):
    with pytest.raises(ValueError, match="summary must hold plain values only; got 'w'"):
        Checkpoints(tmp_path).save(1, {}, summary={"w": torch.ones(1)})


def test_how_many_are_kept(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be >= 2; got 1"):
        Checkpoints(tmp_path, keep_last=1)
    with pytest.raises(ValueError, match="keep_best must be >= 0; got -1"):
        Checkpoints(tmp_path, keep_best=-1)
