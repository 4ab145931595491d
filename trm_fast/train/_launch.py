"""What the environment says of the processes of a run, as ``torchrun`` sets it."""

import os
import socket
import time
from datetime import timedelta

_REMEDY = "Start the run with torchrun, or unset"


def launched() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes, (0, 1) if the environment says
    nothing of any.

    Raises:
        ValueError: it says only half, or something that cannot be.
    """
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    if not given:
        return 0, 1
    for name in ("RANK", "WORLD_SIZE"):
        if name not in given:
            here = " and ".join(f"{each}={os.environ[each]}" for each in given)
            raise ValueError(
                f"Trainer: RANK and WORLD_SIZE must be set together; got {here} without {name}. "
                f"{_REMEDY} {' and '.join(given)}"
            )
    size = _number("WORLD_SIZE", 1, None)
    return _number("RANK", 0, size), size


def local_rank(devices: int, size: int) -> int:
    """Returns which of the GPUs of this machine is that of this process.

    Args:
        devices: number of GPUs.
        size: number of processes.

    Raises:
        ValueError: LOCAL_RANK is no number of a GPU, or missing where there are several processes.
    """
    if "LOCAL_RANK" not in os.environ:
        if size > 1:
            raise ValueError(
                "Trainer: LOCAL_RANK must say which GPU each of several processes has; got none "
                "in the environment. Start the run with torchrun"
            )
        return 0
    return _number("LOCAL_RANK", 0, devices)


def check_master(rank: int) -> None:
    """Waits until the first process can be reached, which torch would do with many words.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is missing or wrong.
        ConnectionError: nobody has answered there in time.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(
                f"Trainer: MASTER_ADDR and MASTER_PORT must say where the first process is; got no "
                f"{name} in the environment. {_REMEDY} RANK and WORLD_SIZE"
            )
    place = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1, 1 << 16)
    # The first process is the one that listens there, unless torchrun itself does.
    patience, start = timeout().total_seconds(), time.monotonic()
    while rank > 0:
        try:
            socket.create_connection(place, timeout=patience).close()
            return
        except OSError as error:
            if time.monotonic() - start > patience:
                raise ConnectionError(
                    f"Trainer: the first process must answer at MASTER_ADDR={place[0]}, "
                    f"MASTER_PORT={place[1]} within {patience:g} s (TRM_FAST_TIMEOUT); "
                    f"got {error.strerror or error}"
                ) from None
            time.sleep(min(0.1, patience))


def timeout() -> timedelta:
    """Returns how long a process waits for the others: TRM_FAST_TIMEOUT in seconds, or 10 minutes.

    Raises:
        ValueError: it is no positive number.
    """
    text = os.environ.get("TRM_FAST_TIMEOUT", "600")
    try:
        # Below a millisecond torch waits without end.
        found = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        found = timedelta(0)
    if found < timedelta(milliseconds=1):
        raise ValueError(f"TRM_FAST_TIMEOUT must be a number of seconds, >= 0.001; got {text!r}")
    return found


def _number(name: str, least: int, below: int | None) -> int:
    text = os.environ[name]
    if text.strip().isdecimal() and least <= int(text) and (below is None or int(text) < below):
        return int(text)
    wanted = f"from {least}" if below is None else f"from {least} to {below - 1}"
    if below == 0:
        wanted = "that of a GPU, and there is none"
    raise ValueError(f"Trainer: {name} must be a whole number {wanted}; got {text!r}")
