"""The directory of a run: one trainer at a time, whole files, records that can be cut."""

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from trm_fast.train import Checkpoints, RunDirectory, files
from trm_fast.train.run_directory import read_records

from .checks import state_at

HOLD = """
import sys, time
from trm_fast.train import RunDirectory
try:
    with RunDirectory(sys.argv[1]):
        print("holds", flush=True)
        sys.stdin.readline()
except OSError as error:
    print(error, flush=True)
"""


def trainer(run) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(run)], **pipes)


def test_it_makes_the_directory_and_its_parents(tmp_path):
    with RunDirectory(tmp_path / "a" / "b") as run:
        assert run.path.is_dir() and run.existing() == []
        assert (run.path / ".lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"


# --- one trainer ---


def test_a_second_trainer_is_told_who_has_it(tmp_path):
    with RunDirectory(tmp_path):
        second = trainer(tmp_path)
        said = second.communicate()[0].strip()
    host = socket.gethostname()
    assert said == (
        f"run directory: {tmp_path} must not be in use; "
        f"got a trainer with pid {os.getpid()} on host {host}"
    )


def test_also_within_one_process(tmp_path):
    with RunDirectory(tmp_path):
        with pytest.raises(OSError, match=f"got a trainer with pid {os.getpid()} on host"):
            RunDirectory(tmp_path).__enter__()
    with RunDirectory(tmp_path):
        pass


def test_of_trainers_that_start_together_one_proceeds(tmp_path):
    for race in range(5):
        trainers = [trainer(tmp_path / str(race)) for _ in range(3)]
        said = [process.stdout.readline() for process in trainers]
        assert sum(line == "holds\n" for line in said) == 1
        assert sum("must not be in use" in line for line in said) == 2
        for process in trainers:
            process.communicate("")


def test_the_lock_goes_with_a_killed_trainer(tmp_path):
    process = trainer(tmp_path)
    assert process.stdout.readline() == "holds\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with RunDirectory(tmp_path):
        pass


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """The trainer is killed while a process that it forked lives on."""
    told, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        RunDirectory(tmp_path).__enter__()
        if os.fork() == 0:
            os.write(told[1], b"x")
            os.close(done[1])
            os.read(done[0], 1)
            os._exit(0)
        signal.pause()
    os.read(told[0], 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with RunDirectory(tmp_path):
        pass
    for handle in (*told, *done):
        os.close(handle)


def test_the_lock_goes_with_the_block_also_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with RunDirectory(tmp_path):
            _ = 1 / 0
    with RunDirectory(tmp_path):
        pass


# --- what may be wrong with a place ---


@pytest.mark.parametrize(
    ("below", "reason"),
    [
        ("file", "File exists"),
        ("file/run", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("loop", "File exists"),
        ("loop/run", "Too many levels of symbolic links"),
    ],
)
def test_a_place_that_cannot_be_a_run(tmp_path, below, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match=f"^run directory: {tmp_path}.*: {reason}$"):
        RunDirectory(tmp_path / below).__enter__()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, code):
    def refuse(path, *_):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=f"^run directory: {tmp_path}/.lock: ") as caught:
        RunDirectory(tmp_path).__enter__()
    assert caught.value.errno == code and os.strerror(code) in str(caught.value)


def test_free_space(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.require_space(1)
        with pytest.raises(OSError, match=r"must have \d+\.\d MB free; got \d+\.\d MB$"):
            run.require_space(2 * shutil.disk_usage(tmp_path).total)


# --- what is there at the start ---


def below(path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_what_a_crash_left_goes_and_what_others_have_called_alike_stays(tmp_path):
    mark = files.TEMPORARY
    left = [f"{mark}{digit * 32}" for digit in "abc"]
    (tmp_path / "ckpt" / left[0]).mkdir(parents=True)
    (tmp_path / "ckpt" / left[0] / "state.json").write_text("{")
    (tmp_path / "ckpt" / left[1]).write_text("step")
    (tmp_path / "kept").mkdir()
    (tmp_path / left[2]).symlink_to(tmp_path / "kept")
    others = [".tmp-1", f".tmp-{'a' * 32}", f"{mark}mine"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / "ckpt" / name).write_text("mine")
    with RunDirectory(tmp_path) as run:
        assert (tmp_path / "ckpt" / left[1]).exists()  # an entry alone deletes nothing
        run.remove_unfinished()
    kept = [*others, *(f"ckpt/{name}" for name in others), ".lock", "ckpt", "kept"]
    assert below(tmp_path) == sorted(kept)


# --- a directory from a stranger ---

NAMES = [".lock", "config.json", "run.json", "metrics.jsonl", "events.jsonl", "ckpt", "tensorboard"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["file", "directory", "nothing"])
def test_a_link_in_the_place_of_a_file_is_refused_and_its_target_stays(tmp_path, name, target):
    (tmp_path / "file").write_text("1 host\nmine")
    (tmp_path / "directory").mkdir()
    Checkpoints(tmp_path / "directory").save(1, state_at(1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / target)
    before = below(tmp_path)
    with pytest.raises(
        OSError,
        match=rf"^run directory: .*/run/{name} must not be a link, .* got one to {tmp_path}",
    ):
        RunDirectory(tmp_path / "run", files=["run.json"]).__enter__()
    assert {*below(tmp_path)} - {*before} <= {"run/.lock"}
    assert (tmp_path / "file").read_text() == "1 host\nmine"


def test_a_linked_directory_of_a_run_is_the_word_of_its_user(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with RunDirectory(tmp_path / "out") as run:
        run.append("metrics.jsonl", {"step": 1})
        Checkpoints(tmp_path / "out").save(1, state_at(1))
        run.clear()
    assert below(tmp_path / "there") == [".lock"]


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_a_file_of_two_names_is_refused(tmp_path, name):
    (tmp_path / "mine").write_text("1 host\n")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "mine", tmp_path / "run" / name)
    with pytest.raises(OSError, match=f"{name} must be a file of one name; got a hard link"):
        with RunDirectory(tmp_path / "run") as run:
            run.append(name, {"step": 1})
    assert (tmp_path / "mine").read_text() == "1 host\n"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "events.jsonl", "ckpt"])
def test_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=f"/{name} must be a file or a directory; got a pipe"):
        RunDirectory(tmp_path).__enter__()


@pytest.mark.parametrize("read", ["append", "truncate", "read", "said"])
def test_a_pipe_that_comes_later_is_refused_too(tmp_path, read):
    name = "run.json" if read == "said" else "metrics.jsonl"
    arguments = {"append": (name, {"step": 1}), "truncate": (name, 1), "read": (name,), "said": ()}
    with RunDirectory(tmp_path) as run:
        os.mkfifo(tmp_path / name)
        with pytest.raises((OSError, ValueError), match=f"/{name}.* got a pipe") as caught:
            getattr(run, read)(*arguments[read])
    assert "\n" not in str(caught.value)


def test_a_lock_of_something_else_is_refused_and_stays(tmp_path):
    (tmp_path / ".lock").write_text("{}")
    with pytest.raises(OSError, match=r"\.lock must be the lock of a run; got another file"):
        RunDirectory(tmp_path).__enter__()
    assert (tmp_path / ".lock").read_text() == "{}"


def test_a_link_that_comes_later_is_refused_by_the_write(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with RunDirectory(tmp_path / "run") as run:
        (run.path / "metrics.jsonl").symlink_to(tmp_path / "mine")
        for write in (
            lambda: run.append("metrics.jsonl", {}),
            lambda: run.truncate("metrics.jsonl", 0),
        ):
            with pytest.raises(OSError, match="must not be a link"):
                write()
        run.write_json("config.json", {})
        (run.path / "config.json").unlink()
        (run.path / "config.json").symlink_to(tmp_path / "mine")
        run.write_json("config.json", {})  # replaces the link
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("linked", ["other/ckpt", "nothing"])
def test_no_checkpoint_is_saved_or_deleted_through_a_link(tmp_path, linked):
    other = Checkpoints(tmp_path / "other", keep_last=9)
    (tmp_path / "other").mkdir()
    for step in (1, 2, 3, 4):
        other.save(step, state_at(step))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt").symlink_to(tmp_path / linked)
    with pytest.raises(OSError, match=r"^checkpoint: .*/run/ckpt must not be a link"):
        Checkpoints(tmp_path / "run").save(5, state_at(5))
    assert [info.step for info in other.list()] == [1, 2, 3, 4]


def test_a_linked_checkpoint_is_not_deleted(tmp_path):
    (tmp_path / "other").mkdir()
    other = Checkpoints(tmp_path / "other")
    other.save(1, state_at(1))
    run = tmp_path / "run"
    (run / "ckpt").mkdir(parents=True)
    (run / "ckpt" / "step-00000001").symlink_to(other.list()[0].path)
    for step in (2, 3, 4, 5):
        Checkpoints(run).save(step, state_at(step))
    with RunDirectory(run) as directory:
        directory.clear()
    assert other.load().step == 1 and below(run) == [".lock"]


@pytest.mark.parametrize("name", ["notes.txt", "mine.safetensors", "plots/a.png"])
def test_what_a_user_has_put_into_a_checkpoint_stays_and_is_said_once(tmp_path, name):
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(1, state_at(1))
    (first / name).parent.mkdir(exist_ok=True)
    (first / name).write_text("mine")
    said = [f"{first} has other files, which stay: {name.partition('/')[0]}"]
    lines = []
    for step in (2, 3, 4, 5):
        checkpoints.save(step, state_at(step))
        lines += checkpoints.left
    assert lines == said
    assert (first / name).read_text() == "mine" and below(first)[-1] == name
    assert not [path for path in first.iterdir() if path.name in ("state.json", "MANIFEST.json")]
    assert [info.step for info in checkpoints.list()] == [4, 5]
    last = checkpoints.list()[-1].path
    (last / "mine.txt").write_text("mine")
    with RunDirectory(tmp_path) as run:
        assert run.clear() == [f"{last} has other files, which stay: mine.txt"]
        assert run.existing() == [] and run.clear() == []
    assert (first / name).exists() and below(last) == ["mine.txt"]


def test_what_a_crash_has_left_of_a_pruning_is_deleted_without_the_files_of_others(tmp_path):
    path = Checkpoints(tmp_path).save(1, state_at(1))
    (path / "notes.txt").write_text("mine")
    unfinished = path.rename(files.temporary(path.parent))
    with RunDirectory(tmp_path) as run:
        run.remove_unfinished()
    assert below(unfinished) == ["notes.txt"]


def test_a_directory_in_the_place_of_a_file_is_not_deleted(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.append("metrics.jsonl", {"step": 1})
        (tmp_path / "summary.json").mkdir()
        (tmp_path / "summary.json" / "mine").write_text("mine")
        with pytest.raises(OSError, match=r"summary\.json cannot be deleted"):
            run.clear()
    assert (tmp_path / "summary.json" / "mine").exists()


def test_files_of_something_else_are_not_taken_for_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": []}')
    for _ in range(2):  # an attempt leaves no mark
        with RunDirectory(tmp_path) as run:
            message = "must hold a run of trm_fast; got config.json of something else"
            for call in (run.require_ours, run.clear):
                with pytest.raises(OSError, match=message):
                    call()
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("lacking", [".lock", "run.json", "ckpt"])
def test_a_copy_of_a_run_is_known(tmp_path, lacking):
    with RunDirectory(tmp_path, files=["run.json"]) as run:
        run.write_json("run.json", {"trm_fast": "0.1"})
        Checkpoints(tmp_path).save(1, state_at(1))
    files.remove(tmp_path / lacking)
    with RunDirectory(tmp_path, files=["run.json"]) as run:
        run.clear()
    assert below(tmp_path) == [".lock"]


def test_the_runs_of_a_whole_go_with_it(tmp_path):
    for name in ("a", "b", "mine"):
        with RunDirectory(tmp_path / name) as run:
            run.append("metrics.jsonl", {"step": 1})
    (tmp_path / "b" / "notes").write_text("mine")
    with RunDirectory(tmp_path, files=["run.json"]) as run:
        run.write_json("run.json", {"runs": ["a", "b", "../mine", "c", 3]})
        run.clear()
    left = [".lock", "a", "a/.lock", "b", "b/.lock", "b/notes", "mine", "mine/.lock"]
    assert below(tmp_path) == [*left, "mine/metrics.jsonl"]


def test_a_linked_run_of_a_whole_is_not_cleared(tmp_path):
    with RunDirectory(tmp_path / "other") as run:
        run.append("metrics.jsonl", {"step": 1})
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "a").symlink_to(tmp_path / "other")
    with RunDirectory(tmp_path / "whole", files=["run.json"]) as run:
        run.write_json("run.json", {"runs": ["a"]})
        with pytest.raises(OSError, match="whole/a must not be a link"):
            run.clear()
    assert read_records(tmp_path / "other" / "metrics.jsonl") == [{"step": 1}]


def test_overwriting_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "mine").write_text("mine")
    with RunDirectory(tmp_path, files=["accuracy.png"]) as run:
        assert run.existing() == []
        run.write_json("config.json", {})
        run.append("metrics.jsonl", {"step": 1})
        (tmp_path / "accuracy.png").write_text("")
        Checkpoints(tmp_path).save(1, state_at(1), score=1)
        assert run.existing() == ["config.json", "metrics.jsonl", "accuracy.png", "ckpt"]
        run.clear()
        assert run.existing() == []
        run.append("metrics.jsonl", {"step": 2})
        assert run.read("metrics.jsonl") == [{"step": 2}]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == [".lock", "ckpt", "ckpt/mine", "metrics.jsonl", "notes.txt"]


# --- files ---


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    with RunDirectory(tmp_path) as run:
        run.write_json("config.json", {"lr": 1e-4, "betas": (0.9, 0.95), "clip": math.inf})
        text = (tmp_path / "config.json").read_text()
        assert json.loads(text) == {"lr": 1e-4, "betas": [0.9, 0.95], "clip": "Infinity"}

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=f"{tmp_path}/config.json: No space left on device"):
                run.write_json("config.json", {})
        assert (tmp_path / "config.json").read_text() == text
        assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["../config.json", "a/b", "", ".lock", "/tmp/x", "a\n"])
def test_names_are_plain(tmp_path, name):
    with RunDirectory(tmp_path) as run:
        for call in (run.read, lambda name: run.append(name, {}), lambda n: run.write_json(n, {})):
            with pytest.raises(ValueError, match="a file must have a plain name; got"):
                call(name)


def test_records_come_back_and_json_is_strict(tmp_path):
    records = [{"step": 1, "loss": 0.5, "words": ["a", "\u00e9\n"]}, {"step": 2, "loss": None}]
    with RunDirectory(tmp_path) as run:
        assert run.read("metrics.jsonl") == []
        for record in records:
            run.append("metrics.jsonl", record)
        run.append("metrics.jsonl", {"a": math.nan, "b": [math.inf, {"c": -math.inf}]})
        expected = [*records, {"a": "NaN", "b": ["Infinity", {"c": "-Infinity"}]}]
        assert run.read("metrics.jsonl") == expected == read_records(tmp_path / "metrics.jsonl")
    assert math.isnan(float("NaN")) and float("-Infinity") == -math.inf
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_record_of_something_else_is_refused(tmp_path):
    with RunDirectory(tmp_path) as run, pytest.raises(TypeError, match="not JSON serializable"):
        run.append("metrics.jsonl", {"a": object()})


def test_records_are_with_the_kernel_at_once(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.append("events.jsonl", {"kind": "start"})
        assert read_records(tmp_path / "events.jsonl") == [{"kind": "start"}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step":3}', b"\0" * 70_000, b"{"])
def test_a_torn_last_line_is_no_record_and_is_not_written_behind(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n' + torn)
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    with RunDirectory(tmp_path) as run:
        run.append("metrics.jsonl", {"step": 3})
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n'


def test_a_file_of_one_torn_line_is_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":')
    with RunDirectory(tmp_path) as run:
        assert run.read("metrics.jsonl") == []
        run.append("metrics.jsonl", {"step": 1})
        assert run.read("metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("line", [b"{", b"", b"[1]", b"3", b"\xff", b"[" * 100_000])
def test_any_other_wrong_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n' + line + b'\n{"step":3}\n')
    with RunDirectory(tmp_path) as run:
        for call in (run.read, lambda name: run.truncate(name, 9)):
            with pytest.raises(ValueError, match=f"^{path}:2: must be .*; got "):
                call("metrics.jsonl")
    assert path.read_bytes().splitlines()[0::2] == [b'{"step":1}', b'{"step":3}']


@pytest.mark.parametrize("kind", [list, dict])
def test_what_readers_refuse_is_not_written(tmp_path, kind):
    cycle = kind()
    cycle.append(cycle) if kind is list else cycle.update(a=cycle)
    with RunDirectory(tmp_path) as run:
        run.append("metrics.jsonl", {"step": 1})
        for write in (run.append, run.write_json):
            message = "run directory: metrics.jsonl must be nested at most 64 deep; got 65"
            with pytest.raises(ValueError, match=message):
                write("metrics.jsonl", {"step": 2, "deep": cycle})
        assert run.read("metrics.jsonl") == [{"step": 1}]


def test_records_beyond_a_step_are_dropped(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.truncate("metrics.jsonl", 3)
        assert not (tmp_path / "metrics.jsonl").exists()
        for step in (1, 2, 3, 4, 5):
            run.append("metrics.jsonl", {"step": step})
        run.append("metrics.jsonl", {"note": "without a step"})
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(b'{"step":')
        run.truncate("metrics.jsonl", 3)
        kept = [{"step": 1}, {"step": 2}, {"step": 3}, {"note": "without a step"}]
        assert run.read("metrics.jsonl") == kept
        run.append("metrics.jsonl", {"step": 4})
        assert run.read("metrics.jsonl") == [*kept, {"step": 4}]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_line_that_did_not_fit_is_taken_back(tmp_path, monkeypatch):
    with RunDirectory(tmp_path) as run:
        run.append("metrics.jsonl", {"step": 1})
        write, count = os.write, iter(range(9))

        def full(handle, data):
            if next(count):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(handle, data[:5])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match=r"metrics\.jsonl: No space left on device"):
                run.append("metrics.jsonl", {"step": 2})
        run.append("metrics.jsonl", {"step": 3})
        assert run.read("metrics.jsonl") == [{"step": 1}, {"step": 3}]


def test_truncate_keeps_so_many_records_at_most(tmp_path):
    with RunDirectory(tmp_path) as run:
        for step, value in ((1, "a"), (2, "b"), (2, "c")):
            run.append("metrics.jsonl", {"step": step, "value": value})
        run.truncate("metrics.jsonl", 2, 2)
        assert [record["value"] for record in run.read("metrics.jsonl")] == ["a", "b"]
