"""Kills at random instants, and every prefix of a save with what was not synced lost."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trm_fast.train import Callback, Checkpoints, Run, RunDirectory
from trm_fast.train.checkpoints.state import to_safetensors

from .. import crash
from ..crash import count, look, look_naively, report
from .checks import is_state_at, saved, state_at
from .replay import PAGE, Directory, after, fates, rebuild, record, snapshot
from .runs import differences, function_run, result


def test_kills_cost_nothing(memory):
    wrong, hit, pause = count(25, 0, naive=False, directory=memory)
    print(report(25, wrong, hit, pause, naive=False))
    assert not wrong
    assert sum(hit.values()) == 25 and hit["elsewhere"] < 25  # else no save was hit


def test_what_a_kill_could_cost_would_be_counted(tmp_path):
    """Else the kills above would show nothing."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, crash.state_at(step))
    assert look(tmp_path, 2) == (None, 2)
    assert look(tmp_path, 3) == ("lost", 2)
    newest = tmp_path / "ckpt" / "step-00000002"
    (newest / ".tmp-left").mkdir()
    assert look(tmp_path, 2) == ("leftover", 2)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert look(tmp_path, 2) == ("unloadable", 0)


def test_a_torn_file_would_be_counted(tmp_path):
    data = b"".join(to_safetensors({"weight": crash.state_at(1)["model"]["weight"]}))
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    assert look_naively(tmp_path, 1) == (None, 1)
    for length in (0, 7, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert look_naively(tmp_path, 1) == ("unloadable", 0)


def larger(step: int) -> dict:
    """A state with a file of several pages, so that a write can be torn."""
    return state_at(step) | {"carry": {"z": torch.full((3 * PAGE,), float(step))}}


def loads(run: Path) -> int:
    checkpoints = Checkpoints(run)
    loaded = checkpoints.load()
    # No pointer leads nowhere, and nothing under a final name is a part of a checkpoint.
    assert all("LATEST does not name it" in reason for reason in loaded.skipped)
    assert all(info.damage is None for info in checkpoints.list())
    assert is_state_at(loaded.step, loaded.state | {"carry": state_at(loaded.step)["carry"]})
    assert torch.equal(loaded.state["carry"]["z"], larger(loaded.step)["carry"]["z"])
    return loaded.step


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Directory, list]:
    """A run before a save that does everything - LATEST, BEST, prune - and its calls."""
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text("{}")
    checkpoints = Checkpoints(run, keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(step, larger(step), score=step / 10)
    before = snapshot(run)
    calls = record(run, lambda: checkpoints.save(4, larger(4), score=0.9))
    return before, calls


def test_a_save_is_recorded_whole(recorded, tmp_path):
    before, calls = recorded
    kinds = [call[0] for call in calls]
    assert len(calls) > 40
    assert {"create", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"} == {*kinds}
    for fate in fates(0, 0):
        if fate.names == "kept":
            run = tmp_path / fate.data
            rebuild(after(before, calls), run, fate)
            assert loads(run) == 4
    names = sorted(path.name for path in (run / "ckpt").iterdir())
    assert names == ["BEST", "LATEST", "step-00000003", "step-00000004"]


def published(calls: list) -> int:
    """How many calls it takes until LATEST is durable; a save cannot return earlier."""
    renamed = next(
        number
        for number, call in enumerate(calls)
        if call[0] == "rename" and call[2].name == "LATEST"
    )
    synced = (n for n, call in enumerate(calls) if n > renamed and call[0] == "fsync")
    return next(synced) + 1


def test_nothing_is_deleted_before_latest_is_durable(recorded):
    calls = recorded[1]
    first = next(n for n, call in enumerate(calls) if call[0] in ("unlink", "rmdir"))
    assert first > published(calls)


@pytest.mark.slow
def test_every_prefix_of_a_save_loads_the_old_or_the_new_state(recorded, memory):
    before, calls = recorded
    acknowledged = published(calls)
    run, found = memory / "run", {3: 0, 4: 0}
    for length in range(len(calls) + 1):
        torn = [False] if not length or calls[length - 1][0] != "write" else [False, True]
        for disk in (after(before, calls[:length], tear) for tear in torn):
            for fate in fates(length, draws=4):
                rebuild(disk, run, fate)
                step = loads(run)
                assert step == 4 or length < acknowledged
                found[step] += 1
                shutil.rmtree(run)
    print(f"{len(calls)} calls, {sum(found.values())} disks: {found[3]} old, {found[4]} new")
    assert found[3] > 0 and found[4] > 0 and found.keys() == {3, 4}


def test_what_a_crash_left_is_taken_up(recorded, tmp_path):
    """A start after a crash cleans, loads, and saves again, also under the same step."""
    before, calls = recorded
    for length in range(0, len(calls) + 1, 5):
        run = tmp_path / str(length)
        fate = random.Random(length).choice(list(fates(length, draws=4)))
        rebuild(after(before, calls[:length]), run, fate)
        with RunDirectory(run) as directory:
            directory.remove_unfinished()
            assert not list(run.rglob(".tmp-*"))
            assert loads(run) in (3, 4)
            Checkpoints(run).save(4, larger(4))
            assert loads(run) == 4
            assert sum(info.damage is None for info in Checkpoints(run).list()) >= 2


def test_a_first_save_is_there_whole_or_not_at_all(tmp_path, memory):
    run = tmp_path / "recorded"
    run.mkdir()
    before = snapshot(run)
    calls = record(run, lambda: saved(run, 1))
    acknowledged, places = published(calls), 0
    for length in range(len(calls) + 1):
        for fate in fates(length, draws=4):
            place = memory / "place"
            rebuild(after(before, calls[:length]), place, fate)
            checkpoints = Checkpoints(place)
            if any(info.damage is None for info in checkpoints.list()):
                assert is_state_at(1, checkpoints.load().state)
                places += 1
            else:
                assert length < acknowledged
                with pytest.raises(ValueError, match=r"latest of .* must be whole"):
                    checkpoints.load()
            shutil.rmtree(place)
    assert places > 0


# --- the start of a run ---


class Dead(BaseException):
    """What a process that was killed does no more."""


def killed_at(call: int, action: Callable[[], object]) -> None:
    """Runs ``action`` until its so-many-th call that changes a disk."""
    count = 0

    def counted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def wrapper(*args: object, **options: object) -> object:
            nonlocal count
            reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)  # type: ignore[operator]
            count += not reads
            if count > call:
                raise Dead  # also for what would clean up
            return real(*args, **options)

        return wrapper

    names = (
        "open",
        "write",
        "pwrite",
        "fsync",
        "ftruncate",
        "mkdir",
        "rename",
        "replace",
        "unlink",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(name))
        with pytest.raises(Dead):
            action()


class Started(Callback):
    """Ends a run when it has started, before its first step."""

    happened = False

    def on_start(self, run: Run) -> None:
        self.happened = True
        raise Dead


@pytest.mark.parametrize("overwrites", [False, True])
def test_every_prefix_of_a_start_can_be_resumed_or_started_again(overwrites, memory):
    function_run(memory / "whole", steps=2).fit()
    wanted = result(memory / "whole")
    end, call = Started(), 0
    while not end.happened:
        resumed, again = memory / f"{call}", memory / f"{call}-again"
        for out in (resumed, again):
            if overwrites:
                function_run(out, steps=1).fit()
            run = function_run(out, (end,), steps=2)
            killed_at(call, lambda run=run: run.fit(overwrite=overwrites))
        # What is left of a run that was overwritten is none.
        if not overwrites:
            function_run(resumed, steps=2).fit(resume=True)
            assert differences(wanted, result(resumed)) == []
        function_run(again, steps=2).fit(overwrite=True)
        assert differences(wanted, result(again)) == []
        assert not list(memory.rglob(".tmp-*")) or overwrites
        shutil.rmtree(resumed)
        shutil.rmtree(again)
        call += 1
    assert call > (30 if overwrites else 15)
