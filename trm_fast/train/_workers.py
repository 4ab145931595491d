"""Processes of data loaders leave signals to the process that trains: it finishes its step with
their batch, saves, and ends them."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

# A terminal sends these to all processes of a group, and schedulers to all of a job.
_SENT_TO_ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A training process that has sent SIGTERM to its whole group still wants a batch.
_GRACE_S = 5.0


class _Shielded:
    """A ``worker_init_fn`` that holds these signals back, but for a SIGTERM by which the training
    process ends what hangs.

    Args:
        init: the function of the user, or None.
    """

    def __init__(self, init: Callable[[int], object] | None) -> None:
        self.init = init

    def __call__(self, worker: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_TO_ALL)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        if self.init is not None:
            self.init(worker)


def _end_with_parent() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    signal.sigtimedwait({signal.SIGTERM}, _GRACE_S)
    os._exit(0)


def shield(loaders: Iterable[Any]) -> bool:
    """Lets the processes that these loaders will start leave signals alone; returns whether any
    starts one."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return False
    starting = [part for part in loaders if isinstance(part, DataLoader) and part.num_workers > 0]
    for loader in starting:
        if not isinstance(loader.worker_init_fn, _Shielded):
            loader.worker_init_fn = _Shielded(loader.worker_init_fn)
    return bool(starting)


@contextmanager
def held_back() -> Iterator[None]:
    """Holds the signals back, also in processes that start within, which would not have called
    their ``worker_init_fn`` yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_lost_worker(error: RuntimeError) -> bool:
    """Returns whether torch says that a process of a loader has ended."""
    return "DataLoader worker" in str(error)
