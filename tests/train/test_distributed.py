"""Two processes train as one does: DDP and FSDP2 with gloo."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from trm_fast.train import Checkpoints
from trm_fast.train.distributed import World
from trm_fast.train.run_directory import read_records

from ..support.processes import needs_gloo, run_ranks
from . import ranks
from .runs import differences, result

pytestmark = needs_gloo


class Played(NamedTuple):
    """The folder in which two processes trained, and what came out of each scene in each."""

    out: Path
    found: list[dict[str, Any]]

    def of(self, name: str) -> list[Any]:
        return [scenes[name] for scenes in self.found]


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Played:
    """All scenes, in one start."""
    out = tmp_path_factory.mktemp("ranks")
    for strategy in ("ddp", "fsdp2"):
        ranks.small(out=out / f"from-one-{strategy}", steps=4, evaluate_every=0).fit()
    return Played(out, run_ranks(ranks.play, out))


def flat(tensors: dict[str, Any]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in tensors.values()])


def assert_same_run(found: list[Any], wanted: dict[str, Any], bound: float) -> None:
    """Each process has the weights, averages and metrics that one process has."""
    for part in found:
        for name in ("model", "average"):
            assert list(part[name]) == list(wanted[name])
            assert (flat(part[name]) - flat(wanted[name])).abs().max() <= bound, name
        for record, other in zip(part["history"], wanted["history"], strict=True):
            assert record == {key: pytest.approx(value, abs=1e-9) for key, value in other.items()}


# Means over processes of means over rows are sums in another order: roundings of 2^-53 of each
# gradient. Adam divides elements by their own size; where they are 10^5 times smaller than what
# was added up, eight steps of 0.01 differ by 8 * 0.01 * 10^5 * 2^-51.
BOUND = 8 * 0.01 * 1e5 * 2**-51


@pytest.mark.parametrize("name", ["ddp", "ddp, accumulated", "fsdp2", "fsdp2, accumulated"])
def test_two_processes_train_a_network_as_one_does(name, played):
    config = {"accumulate": 2} if "accumulated" in name else {}
    wanted = ranks.finished(ranks.small(**config))
    kinds = [record["kind"] for record in wanted["history"]]
    assert kinds == ["train", "evaluation"] * 3
    assert_same_run(played.of(name), wanted, BOUND)


@pytest.mark.parametrize(
    "name",
    ["per step", "per step, accumulated", "joint", "per step, fsdp2", "joint, fsdp2"],
)
def test_two_processes_train_a_puzzle_model_as_one_does(name, played):
    config = {"accumulate": 2, "clip_norm": 1.0} if "accumulated" in name else {}
    supervision = "joint" if "joint" in name else "per step"
    wanted = ranks.finished(ranks.trm(supervision, **config))
    found = played.of(name)
    # The scale of clipping is float32 in the optimizers: 2^-24 in place of 2^-51.
    assert_same_run(found, wanted, BOUND * (2**27 if config else 1))
    tables = [part["model"]["puzzles.table"] for part in (*found, wanted)]
    assert (tables[0] != 0).all(1).sum() >= 3  # as many puzzles as were seen
    # Rows move by their sign: the same steps, but for the rounding of their sums.
    assert all(torch.allclose(table, tables[-1], rtol=0, atol=1e-15) for table in tables)


@pytest.mark.parametrize(
    "name",
    [
        "supervised",
        "supervised, accumulated",
        "supervised, fsdp2",
        "supervised, fsdp2, accumulated",
        "supervised, fsdp2, undeclared",
    ],
)
def test_two_processes_exchange_what_the_end_of_a_batch_adds(name, played):
    """Three losses, whose number may be unknown, and a backward pass of the objective after the
    last one, which reaches weights that the losses have reached too."""
    config = {"accumulate": 2} if "accumulated" in name else {}
    assert_same_run(played.of(name), ranks.finished(ranks.supervised(**config)), BOUND)


def test_a_gradient_that_one_process_lacks_counts_as_zeros(played):
    first, second = played.of("missing")
    assert len(first["grads"]) == 8
    assert all(map(torch.equal, first["grads"], second["grads"]))
    assert all(bool(grad.any()) for grad in first["grads"])
    assert torch.equal(first["head"], second["head"])


def test_buffers_that_change_are_those_of_their_process_also_after_a_resume(played):
    first, second = played.of("remembered")
    assert not torch.equal(first["wanted"], second["wanted"])
    for found in (first, second):
        assert found["step"] == 7 and torch.equal(found["found"], found["wanted"])
    state = Checkpoints(played.out / "memory").load().state
    assert torch.equal(state["model"]["memory"], first["wanted"])
    assert state["process"]["0"]["buffers"] == {}
    assert list(state["process"]["1"]["buffers"]) == ["memory"]
    assert differences(result(played.out / "memory"), result(played.out / "memory-parts")) == []


def test_an_overflow_in_one_process_is_one_in_both(played):
    found = played.of("overflowing")
    for part in found:
        # From 2^16 and 2^15 down to 2^14; none of them ends the run.
        assert part["finite"] == [False, False, True, True, True, True]
        assert part["scale"] == 2.0**14
    assert torch.equal(found[0]["model"], found[1]["model"])


def test_processes_are_told_all_states_and_weigh_metrics_by_their_counts(played):
    first, second = played.of("gathered")
    assert [len(state["own"][0]) for state in first["states"]] == [1, 2]
    assert [state["own"][1:] for state in first["states"]] == [[0, None, "x"], [1, None, "x"]]
    assert second["states"] == []
    for found in (first, second):
        assert found["ranks"] == [0, 1]
        assert found["mean"] == {"a": 0.75, "b": 1.0, "count": 4.0}
        assert found["missing"] == {"a": 7.0, "count": 2.0}
        assert found["nothing"] == {"count": 0.0}
        assert found["plain"] == {"a": 0.5}
        assert found["large"] == 2.0**25 + 2
        assert found["agree"] is False


def test_one_process_is_a_world_of_its_own():
    world = World("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.gather({"a": 1}) == world.collect({"a": 1}) == [{"a": 1}]
    assert world.mean({"a": math.inf}) == {"a": math.inf}
    assert world.latest_signal(15) == 15 and world.latest_signal(None) is None
    world.barrier()


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_to_the_same_bits(played):
    # It is agreed upon one step late.
    assert played.of("stopped") == [4, 4]
    assert played.of("resumed") == played.of("whole") == [9, 9]
    assert differences(result(played.out / "whole"), result(played.out / "parts")) == []
    state = Checkpoints(played.out / "whole").load().state["process"]
    assert not torch.equal(
        *(state[rank]["batches"]["train"]["start"]["torch"] for rank in ("0", "1"))
    )
    events = [event["event"] for event in read_records(played.out / "parts" / "events.jsonl")]
    # A run in float64 takes the reference, and says so in each part.
    assert [event for event in events if event != "slow"] == ["interrupted", "resumed"]


@pytest.mark.parametrize("name", ["spoilt", "spoilt, fsdp2"])
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(name, played):
    found = played.of(name)
    for part in found:
        assert part["skipped"] == 1
        before, after, later = part["weights"][1:4]
        assert torch.equal(before, after) and not torch.equal(after, later)
    assert torch.equal(found[0]["weights"][-1], found[1]["weights"][-1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_of_one_process_is_taken_up_by_two(strategy, played):
    name = "from one" if strategy == "ddp" else "from one, fsdp2"
    saved = Checkpoints(played.out / f"from-one-{strategy}").load()
    for part in played.of(name):
        assert part["step"] == saved.step == 4
        for key in ("model", "optim", "ema"):
            assert same(part[key], saved.state[key]), key
    events = read_records(played.out / f"from-one-{strategy}" / "events.jsonl")
    assert events[0]["message"].startswith("the checkpoint is of 1 processes, now there are 2")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_of_two_processes_is_taken_up_by_one(strategy, played):
    name = "to one" if strategy == "ddp" else "to one, fsdp2"
    out = played.out / f"to-one-{strategy}"
    wanted = played.of(name)[0]
    saved = Checkpoints(out).load().state
    trainer = ranks.small(out=out, steps=9)
    assert trainer.fit(resume=True).step == 9
    assert same(saved["model"], wanted["model"])
    assert same(saved["ema"]["average"], wanted["average"])
    events = [event["event"] for event in read_records(out / "events.jsonl")]
    # There are other processes, and more steps.
    assert events == ["checkpoint", "resumed", "changed", "changed"]


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
