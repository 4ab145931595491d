"""The trainer's loop: clipping, accumulation, what it writes, and what it refuses."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast.train import (
    Callback,
    Checkpoints,
    Objective,
    RepeatedBatches,
    Run,
    RunDirectory,
    Step,
    StepResult,
    Trainer,
    TrainerConfig,
)
from trm_fast.train.run_directory import read_records

from .runs import MAKE, STEPS, differences, function_run, puzzle_run, result


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).to(dtype)


def examples(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(count, 6, generator=generator, dtype=dtype)
    return features, torch.randint(3, (count,), generator=generator)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def split(size: int, count: int = 36, dtype: torch.dtype = torch.float64) -> list[Any]:
    features, targets = examples(count, dtype)
    return list(zip(features.split(size), targets.split(size), strict=True))


def trained(optimizer: str, batches: list[Any], dtype: torch.dtype, **config: Any) -> list[Tensor]:
    model = network(dtype)
    settings = TrainerConfig(steps=6, **config)
    Trainer(model, MAKE[optimizer], batches, loss, settings, device="cpu").fit()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("clip", [0.05, 0.5, 100.0])
@pytest.mark.parametrize("optimizer", MAKE)
def test_clipping_is_that_of_torch(optimizer, clip):
    model = network()
    theirs = MAKE[optimizer](model)
    for batch in split(6):
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        theirs.step()
        theirs.zero_grad()
    ours = trained(optimizer, split(6), torch.float64, clip_norm=clip)
    # Optimizers of this package are told the scale in float32, as by GradScaler, so that six steps
    # differ by roundings of 2^-24 of gradients; Adam divides by what may be 1000 times smaller.
    # Newton-Schulz runs in bfloat16, whose roundings of 2^-8 may fall to the other side.
    bound = 0.01 * 6 * 2**-8 if optimizer == "muon" else 6 * 0.1 * 2**-24 * 1000
    for mine, theirs_ in zip(ours, model.parameters(), strict=True):
        assert (mine - theirs_).abs().max() <= bound


def test_clipping_bounds_the_step():
    # One step of plain descent: the change of the weights is lr times the clipped gradients.
    model = network()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Trainer(
        model, optimizer, split(6), loss, TrainerConfig(steps=1, clip_norm=0.01), device="cpu"
    ).fit()
    moved = torch.cat(
        [(p - old).flatten() for p, old in zip(model.parameters(), before, strict=True)]
    )
    # torch adds 1e-6 to the norm.
    assert 0.0099 < float(moved.detach().norm()) <= 0.01


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "grokfast", "atan2"])
def test_accumulated_batches_are_one_large_batch(optimizer, count):
    # Means of equal parts: sums of the same numbers in another order, so each gradient differs by
    # some roundings of 2^-53. Six steps of Adam divide them by their own size, where elements may
    # be 10^5 times smaller than the largest; lr is 0.01 and 0.1.
    whole = trained(optimizer, split(6), torch.float64)
    parts = trained(optimizer, split(6 // count), torch.float64, accumulate=count)
    for one, other in zip(whole, parts, strict=True):
        assert (one - other).abs().max() <= 6 * 0.1 * 2**-50 * 1e5


def test_the_last_update_takes_the_batches_that_are_left():
    seen = [0]

    class Count(Objective):
        def losses(self, model: nn.Module, batch: Any) -> Iterator[StepResult]:
            seen[-1] += 1
            yield StepResult(loss(model, batch))

        def commit(self, finite: Tensor) -> None:
            seen.append(0)

    model = network()
    batches = RepeatedBatches(split(9), epochs=1)  # four
    trainer = Trainer(
        model, MAKE["sgd"], batches, Count(), TrainerConfig(accumulate=3), device="cpu"
    )
    summary = trainer.fit()
    assert seen == [3, 1, 0]
    assert (summary.step, summary.reason) == (2, "the batches have ended")
    # The loss of an update is the mean of its batches, however many they are.
    first = sum(float(loss(network(), batch)) for batch in split(9)[:3]) / 3
    assert first == pytest.approx(trainer_loss(split(9)[:3], accumulate=3), rel=1e-12)


def trainer_loss(batches: list[Any], **config: Any) -> float:
    settings = TrainerConfig(steps=1, log_every=1, **config)
    trainer = Trainer(network(), MAKE["sgd"], batches, loss, settings, device="cpu")
    trainer.fit()
    return trainer.history[0]["loss"]


def test_an_average_of_the_trainer_is_that_of_the_optimizer():
    kept = {}
    for name, ema in (("grokfast", None), ("window", 0.9)):
        model = network()
        make = MAKE[name]
        if ema is not None:
            from trm_fast import GrokFastAdamW

            def make(model: nn.Module) -> Any:
                return GrokFastAdamW(model.parameters(), lr=0.01, filter="ema")

        config = TrainerConfig(steps=6, ema=ema)
        trainer = Trainer(model, make, split(6), loss, config, device="cpu")
        trainer.fit()
        kept[name] = trainer.ema.average
    # The same recurrence, in a kernel and by lerp: a rounding each.
    for name, one in kept["grokfast"].items():
        assert torch.allclose(one, kept["window"][name], rtol=1e-14, atol=1e-15)


def test_two_averages_of_the_same_weights_are_refused():
    with pytest.raises(ValueError, match="ema must be None, as an optimizer has weight_ema"):
        trainer = {"device": "cpu"}
        Trainer(network(), MAKE["grokfast"], [], loss, TrainerConfig(ema=0.9), **trainer)


def test_an_evaluation_sees_the_average_and_changes_nothing():
    model = network()
    seen: dict[str, Any] = {}

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen["weights"] = [param.clone() for param in model.parameters()]
        seen["mode"] = (model.training, torch.is_grad_enabled())
        torch.rand(7)
        return {"value": 1.0}

    config = TrainerConfig(steps=4, ema=0.5)
    trainer = Trainer(model, MAKE["sgd"], split(6), loss, config, evaluate=evaluate, device="cpu")
    trainer.fit()
    own = [param.clone() for param in model.parameters()]
    generator = torch.get_rng_state()
    assert trainer.evaluate() == {"value": 1.0}
    assert seen["mode"] == (False, False) and model.training
    assert torch.equal(generator, torch.get_rng_state())
    assert all(map(torch.equal, own, model.parameters()))
    assert all(map(torch.equal, seen["weights"], trainer.ema.average.values()))
    assert not torch.equal(seen["weights"][0], own[0])


def test_fit_gives_the_random_generators_back():
    before = torch.get_rng_state()
    function_run(None).fit()
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(len(name))
        function_run(tmp_path / name, seed=seed).fit()
    a, b, c = (result(tmp_path / name) for name in "abc")
    assert differences(a, b) == []
    assert "model.0.weight" in differences(a, c)


def test_the_loop_can_be_in_other_hands(tmp_path):
    function_run(tmp_path).fit()
    trainer = function_run(None)
    from trm_fast.train.generators import seed_everything

    with torch.random.fork_rng():
        seed_everything(0)
        assert list(trainer.updates()) == [*range(1, STEPS + 1)]
    state = Checkpoints(tmp_path).load().state["model"]
    assert all(
        torch.equal(state[name], value) for name, value in trainer.model.state_dict().items()
    )


def test_what_a_run_writes(tmp_path):
    out = tmp_path / "missing" / "parent"
    summary = puzzle_run(out).fit()
    assert json.loads((out / "config.json").read_text())["train"]["steps"] == STEPS
    told = json.loads((out / "run.json").read_text())
    assert (told["name"], told["processes"], told["torch"]) == ("sudoku", 1, torch.__version__)
    records = read_records(out / "metrics.jsonl")
    assert [(r["step"], r["kind"]) for r in records] == [
        (4, "train"), (5, "evaluation"), (8, "train"), (10, "evaluation"), (12, "train"),
        (12, "evaluation"),
    ]  # fmt: skip
    assert summary.checkpoint == out / "ckpt" / "step-00000012"
    infos = Checkpoints(out).list()
    assert all(info.damage is None for info in infos) and len(infos) <= 3
    scores = [r["lm_loss"] for r in records if r["kind"] == "evaluation"]
    assert summary.best["lm_loss"] == min(scores) == -Checkpoints(out).load("best").score


def test_a_metric_that_is_no_number_is_never_the_best(tmp_path):
    values = iter([float("nan"), 3.0, float("inf"), 2.0, float("-inf")])
    trainer = function_run(tmp_path, steps=10, evaluate_every=2, mode="max", save_every=2)
    trainer.evaluator = lambda model: {"lm_loss": next(values), "noise": 0.0}
    summary = trainer.fit()
    assert summary.best == {"step": 4, "lm_loss": 3.0, "noise": 0.0}
    assert Checkpoints(tmp_path).load("best").step == 4


def test_an_unknown_metric_is_named():
    with pytest.raises(ValueError, match=r"monitor must be a metric .*; got 'nothing', not among"):
        function_run(None, monitor="nothing").fit()


def test_a_wrong_monitor_costs_no_step_that_was_taken(tmp_path):
    with pytest.raises(ValueError, match="monitor must be a metric"):
        function_run(tmp_path, monitor="nothing", evaluate_every=3).fit()
    assert function_run(tmp_path, monitor="").fit(resume=True).step == STEPS
    assert "resumed at step 3" in (tmp_path / "events.jsonl").read_text()


def test_the_evaluation_of_an_interrupted_run_is_saved_when_it_is_taken_up(tmp_path):
    from ..interruptions import Interruption

    last = {"steps": 8, "evaluate_every": 0}
    function_run(tmp_path, (Interruption("signal", 8),), **last).fit()
    assert Checkpoints(tmp_path).load().score is None
    summary = function_run(tmp_path, **last).fit(resume=True)
    assert summary.checkpoint.name == "step-00000008-2"
    assert Checkpoints(tmp_path).load("best").score == -summary.metrics["lm_loss"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": -1}, "steps must be >= 0; got -1"),
        ({"accumulate": 0}, "accumulate must be >= 1; got 0"),
        ({"keep_last": 1}, "keep_last must be >= 2; got 1"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0 and finite, or None; got 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be > 0 and finite, or None; got nan"),
        ({"ema": 1.5}, r"ema must be in \[0, 1\], or None; got 1.5"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16; got 'fp8'"),
        ({"on_nonfinite": "go"}, "on_nonfinite must be one of stop, skip; got 'go'"),
    ],
)
def test_settings_out_of_range_are_refused(config, message):
    with pytest.raises(ValueError, match=f"^TrainerConfig: {message}$"):
        TrainerConfig(**config)


def test_wrong_uses_are_refused_in_one_line():
    with pytest.raises(ValueError, match="resume needs out"):
        function_run(None).fit(resume=True)
    with pytest.raises(ValueError, match=r"evaluate\(\) needs the argument evaluate"):
        function_run(None, evaluate=False).evaluate()
    with pytest.raises(ValueError, match="batches must give at least one"):
        function_run(None, batches=[]).fit()
    with pytest.raises(ValueError, match="device must be auto or one that torch can use"):
        Trainer(network(), MAKE["sgd"], [], loss, device="cuda:99")


# Directories


def test_a_run_is_not_overwritten_unless_that_is_asked_for(tmp_path):
    function_run(tmp_path, steps=4).fit()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="without a run"):
        function_run(tmp_path).fit()
    assert Checkpoints(tmp_path).load().step == 4
    function_run(tmp_path, steps=3).fit(overwrite=True)
    assert [info.step for info in Checkpoints(tmp_path).list()] == [3]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_trainers_cannot_have_one_directory(tmp_path):
    with RunDirectory(tmp_path), pytest.raises(OSError, match=f"pid {os.getpid()} on host"):
        function_run(tmp_path).fit()
    assert os.listdir(tmp_path) == [".lock"]

    class Second(Callback):
        def on_step(self, run: Run, step: Step) -> None:
            if run.step == 6:
                with pytest.raises(OSError, match="must not be in use"):
                    function_run(tmp_path).fit(resume=True)

    assert function_run(tmp_path, (Second(),)).fit().step == STEPS


def test_a_directory_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(OSError) as error:
            function_run(out).fit()
        assert str(error.value).startswith("run directory: ") and "\n" not in str(error.value)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    # Root may write anywhere, so the run is another user's.
    program = (
        "import os, sys; from trm_fast.train import RunDirectory; "
        "os.setuid(65534) if os.getuid() == 0 else None; RunDirectory(sys.argv[1]).__enter__()"
    )
    tmp_path.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, str(tmp_path)], capture_output=True, text=True
        )
    finally:
        tmp_path.chmod(0o755)
    assert "run directory: " in done.stderr.splitlines()[-1], done.stderr
    assert "Permission denied" in done.stderr.splitlines()[-1]


def test_too_little_room_is_found_before_the_first_step(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("trm_fast.train.run_directory.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"must have .* MB free; got 0.0 MB"):
        function_run(tmp_path).fit()


@pytest.mark.parametrize("left", [0, 1, 5, 12])
def test_a_full_disk_leaves_the_earlier_checkpoint(left, tmp_path, monkeypatch):
    write, calls = os.write, 0

    class Fill(Callback):
        def on_step(self, run: Run, step: Step) -> None:
            if run.step == 6:
                monkeypatch.setattr(os, "write", full)

    def full(handle: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    with pytest.raises(OSError, match="No space left on device") as error:
        function_run(tmp_path, (Fill(),)).fit()
    assert "\n" not in str(error.value)
    monkeypatch.setattr(os, "write", write)
    function_run(tmp_path / "whole").fit()
    assert Checkpoints(tmp_path).load().step >= 5
    function_run(tmp_path).fit(resume=True)
    assert differences(result(tmp_path), result(tmp_path / "whole")) == []


def test_no_socket_is_opened_and_nothing_written_elsewhere(tmp_path):
    program = """
import sys
seen = []
def hook(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & 3
    if event.startswith("socket.") and event != "socket.gethostname":
        seen.append((event, str(args)))
    elif writes and not str(args[0]).startswith((sys.argv[1], "/dev/")):
        seen.append((event, str(args)))
sys.path.insert(0, sys.argv[2])
sys.dont_write_bytecode = True
from tests.train.runs import puzzle_run
import torch
puzzle_run(None).fit()
sys.addaudithook(hook)
puzzle_run(sys.argv[1]).fit()
puzzle_run(sys.argv[1], steps=14).fit(resume=True)
print(seen)
"""
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", program, str(tmp_path / "out"), str(root)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("optimizer", ["adamw", "grokfast"])
def test_the_average_starts_at_the_weights_before_the_first_update(optimizer):
    """Also at weights that are loaded after the trainer is made."""
    ema = None if optimizer == "grokfast" else 0.9
    trainer = Trainer(
        network(), MAKE[optimizer], split(6), loss, TrainerConfig(steps=1, ema=ema), device="cpu"
    )
    state = {name: value + 5.0 for name, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(state)
    trainer.fit()
    for name, average in trainer.ema.average.items():
        expected = 0.9 * state[name] + 0.1 * trainer.model.get_parameter(name).detach()
        # Three roundings of numbers below 8 in float64; the optimizer knows its decay in float32.
        assert (average - expected).abs().max() <= 3 * 8 * 2**-53 + 2**-24


def test_optimizers_that_clip_a_part_each_are_refused():
    from trm_fast import GrokFastAdamW

    model = network()
    first, *others = model.parameters()
    optimizers = [GrokFastAdamW([first], clip_norm=1.0), GrokFastAdamW(others)]
    with pytest.raises(ValueError, match=r"clip_norm must be in the TrainerConfig .*; got 1.0 in"):
        Trainer(model, optimizers, split(6), loss, TrainerConfig(steps=1), device="cpu")
