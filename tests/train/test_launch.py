"""What the environment says of processes, and what becomes of a run whose processes get lost."""

import os
import signal
import socket
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed import distributed_c10d

from trm_fast.train import Trainer, TrainerConfig
from trm_fast.train._launch import launched, local_rank, timeout
from trm_fast.train.distributed import World

from ..support.processes import needs_gloo, run_ranks, start
from . import ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(monkeypatch, **values: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 without RANK"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 without RANK"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK=1 and LOCAL_RANK=1 without WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be a whole number from 0 to 1; got '2'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number from 0 to 1; got '-1'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK must be a whole number from 0 to 1; got ''"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1; got '0'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number from 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "got no MASTER_ADDR in the environment"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "got no MASTER_PORT"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
            "MASTER_PORT must be a whole number from 1 to 65535; got '70000'",
        ),
    ],
)
def test_half_an_environment_is_refused_by_name(values, names, monkeypatch, tmp_path):
    environment(monkeypatch, **values)
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError) as caught:
        Trainer(
            model, torch.optim.SGD(model.parameters()), [torch.ones(3, 2)],
            lambda model, batch: model(batch).mean(), TrainerConfig(steps=1), out=tmp_path,
            device="cpu",
        )  # fmt: skip
    assert names in str(caught.value) and "\n" not in str(caught.value)


def test_no_environment_and_that_of_one_process_are_one_process(monkeypatch):
    environment(monkeypatch)
    assert launched() == (0, 1)
    environment(monkeypatch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert launched() == (0, 1) and World("cpu").size == 1
    environment(monkeypatch, MASTER_ADDR="node-1", MASTER_PORT="29500")  # says nothing of a rank
    assert launched() == (0, 1)


def test_each_of_several_processes_needs_a_gpu_that_is_there(monkeypatch):
    environment(monkeypatch, LOCAL_RANK="1")
    assert local_rank(2, 2) == 1
    with pytest.raises(ValueError, match="LOCAL_RANK must be a whole number from 0 to 0; got '1'"):
        local_rank(1, 2)
    environment(monkeypatch)
    assert local_rank(2, 1) == 0
    with pytest.raises(ValueError, match="LOCAL_RANK must say which GPU"):
        local_rank(2, 2)


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_the_patience_is_a_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv("TRM_FAST_TIMEOUT", text)
    with pytest.raises(ValueError, match=r"TRM_FAST_TIMEOUT must be a number of seconds"):
        timeout()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_a_first_process_that_does_not_answer_is_named_in_time(monkeypatch):
    port = free_port()
    environment(monkeypatch, RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    monkeypatch.setenv("TRM_FAST_TIMEOUT", "0.2")
    with pytest.raises(ConnectionError, match=rf"MASTER_PORT={port} within 0.2 s"):
        World("cpu")


def alone(rank: int, port: str, number: int, strategy: str) -> int:
    """Joins the other process and trains; the second one ends or stands still at step 3."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRM_FAST_TIMEOUT": "2",
    }  # fmt: skip
    trainer = ranks.small(strategy, steps=1_000_000, log_every=1000, evaluate_every=0)
    trainer.callbacks.append(ranks.AtStep(3, lambda run: os.kill(os.getpid(), number)))
    try:
        trainer.fit()
    except ConnectionError as error:
        print(error)
        return 2
    return 0


@needs_gloo
@pytest.mark.parametrize(
    ("number", "strategy"), [(signal.SIGKILL, "fsdp2"), (signal.SIGSTOP, "ddp")]
)
def test_a_process_that_is_lost_ends_the_others_with_one_line(number, strategy, tmp_path):
    port = free_port()
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = [start(log, alone, rank, port, number, strategy) for rank, log in enumerate(logs)]
    processes[0].join()
    processes[1].kill()
    processes[1].join()
    text = logs[0].read_text()
    assert processes[0].exitcode == 2 and text.count("\n") == 1
    assert "all processes must answer within 2 s (TRM_FAST_TIMEOUT)" in text


def told(rank: int) -> list[object]:
    world = World("cpu")
    own = {"rank": rank, 1: (None, float("-inf")), "rows": torch.arange(3.0) * rank}
    with patch.object(distributed_c10d, "_object_to_tensor", side_effect=AssertionError("pickled")):
        return [world.gather({"rank": rank, 1: (None, "ä" * rank)}), world.collect(own)]


@needs_gloo
def test_nothing_is_pickled_between_processes():
    (gathered, collected), (others, nothing) = run_ranks(told)
    assert gathered == others == [{"rank": rank, 1: (None, "ä" * rank)} for rank in range(2)]
    assert nothing == [] and [part["rank"] for part in collected] == [0, 1]
    assert collected[1][1] == (None, float("-inf"))
    assert collected[1]["rows"].tolist() == [0.0, 1.0, 2.0]
