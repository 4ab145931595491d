"""A save that fails says so in one line, and what was there before loads as before."""

import errno
import os
import resource
import signal

import pytest

from trm_fast.train import Checkpoints, RunDirectory

from .checks import is_state_at, saved, state_at

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace")


class Disk:
    """Counts the calls that change a disk, and fails from one of them on, or that one only."""

    def __init__(self, monkeypatch, fails_at: int = -1, code: int = errno.ENOSPC) -> None:
        self.count, self.fails_at, self.code = 0, fails_at, code
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, call):
        def wrapper(*args, **options):
            reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_CREAT)
            if not reads:
                self.count += 1
                if self.count == self.fails_at:
                    # Calls on a handle do not tell a name.
                    names = [] if isinstance(args[0], int) else [str(args[0])]
                    raise OSError(self.code, os.strerror(self.code), *names)
            return call(*args, **options)

        return wrapper


def calls_of_a_save(directory) -> int:
    with pytest.MonkeyPatch.context() as patch:
        checkpoints = saved(directory, 1, 2, keep_last=2)
        disk = Disk(patch)
        checkpoints.save(3, state_at(3), score=0.5)
        return disk.count


@pytest.fixture
def run(memory):
    (memory / "run").mkdir()
    return memory / "run"


CODES = [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EXDEV, errno.EIO]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.filterwarnings("ignore:checkpoint. old ones")
def test_a_failure_of_any_call_is_told_and_costs_nothing(run, tmp_path, code):
    calls = calls_of_a_save(tmp_path)
    assert calls > 30  # else nothing was counted
    checkpoints = saved(run, 1, keep_last=2)
    checkpoints.save(2, state_at(2), score=0.1)
    done, step, failed = 2, 2, 0
    for fails_at in range(1, calls + 1):
        step += 1
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fails_at, code)
            try:
                checkpoints.save(step, state_at(step), score=0.1 + step / 1000)
                done = step
            except OSError as error:
                failed += 1
                assert error.errno == code
                assert str(error).startswith("checkpoint: /") and "\n" not in str(error)
                assert os.strerror(code) in str(error)
        loaded = checkpoints.load()
        assert loaded.step >= done and is_state_at(loaded.step, loaded.state)
        best = checkpoints.load("best")
        assert is_state_at(best.step, best.state)
        assert sum(info.damage is None for info in checkpoints.list()) >= 2
    assert failed > 25  # the others are renames of what is pruned, which is told of
    with RunDirectory(run) as directory:
        directory.remove_unfinished()
        assert not list(run.rglob(".tmp-*"))
    checkpoints.save(step + 1, state_at(step + 1))
    assert checkpoints.load().step == step + 1


def test_a_failed_save_leaves_nothing_behind(run):
    """Where deleting works, as on a full disk; else the next start deletes it."""
    checkpoints = saved(run, 1)
    before = sorted(path.name for path in checkpoints.directory.iterdir())
    for fails_at in range(1, 20):
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fails_at)
            with pytest.raises(OSError, match="No space left on device"):
                checkpoints.save(2, state_at(2))
        assert sorted(path.name for path in checkpoints.directory.iterdir()) == before


def test_a_limit_of_the_system(run):
    """The kernel refuses to write beyond a size; in a child, as limits stay."""
    checkpoints = saved(run, 1)
    sizes = [path.stat().st_size for path in (run / "ckpt" / "step-00000001").iterdir()]
    for limit in (0, 1, min(sizes), max(sizes) - 1):
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                Checkpoints(run).save(2, state_at(2))
                code = 1
            except OSError as error:
                code = 0 if "File too large" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert checkpoints.load().step == 1 and len(checkpoints.list()) == 1
        assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.write_text("a file"), "Not a directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
    ids=["missing", "file", "loop"],
)
def test_a_run_directory_that_is_none(tmp_path, make, reason):
    run = tmp_path / "elsewhere"
    make(run)
    with pytest.raises(OSError, match=f"checkpoint: {run}/ckpt.*: {reason}"):
        Checkpoints(run).save(1, state_at(1))


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OSError, match=r"checkpoint: .*: File name too long"):
        Checkpoints(tmp_path / ("x" * 300)).save(1, state_at(1))


def test_an_interrupt_leaves_nothing_behind(run, monkeypatch):
    checkpoints = saved(run, 1)
    fsync, count = os.fsync, iter(range(100))

    def interrupted(handle):
        if next(count) == 3:
            raise KeyboardInterrupt
        fsync(handle)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, state_at(2))
    assert checkpoints.load().step == 1 and not list(run.rglob(".tmp-*"))
