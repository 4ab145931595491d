"""``Trainer``: the loop of every recipe, from plain torch objects."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trm_fast.nn.evaluating import evaluating
from trm_fast.optim import WeightEMA
from trm_fast.train._ending import ended
from trm_fast.train._guard import NonFiniteError, NonFiniteGuard
from trm_fast.train._rng import fork_rng, seed_everything
from trm_fast.train._run_files import EVENTS, METRICS, RunFiles, describe
from trm_fast.train._signals import StopRequest, graceful_stop
from trm_fast.train._update import Update
from trm_fast.train.batches import Batches, RepeatedBatches, take
from trm_fast.train.callbacks import Callback, Record, is_better, metric
from trm_fast.train.checkpoints.snapshot import restore, snapshot
from trm_fast.train.config import Summary, TrainerConfig
from trm_fast.train.distributed import World, gathered
from trm_fast.train.meter import Meter
from trm_fast.train.objective import FunctionObjective, Objective

Optimizers = Optimizer | Sequence[Optimizer]
Evaluate = Callable[[nn.Module], dict[str, float]]


class Trainer:
    """Trains a model: batches in, updates, evaluations and checkpoints out.

    A run that is stopped or killed goes on from its last checkpoint to the same bits (same machine,
    versions and processes): weights, their average, optimizers, schedules, the objective's carry,
    random generators, place in the data, callbacks and sums of metrics are all in it.

    Args:
        model: the model; it is moved to the device.
        optimizers: one, several, or a function of the model that makes them; FSDP2 needs the
            function, as it replaces the parameters.
        batches: an iterable of batches, which is repeated; or what knows its place itself
            (``Batches``). A batch is a tensor, or a mapping, list or tuple with tensors. With
            several processes each has its own part.
        objective: an ``Objective``, or a function ``(model, batch)`` that returns the loss or a
            ``StepResult``.
        config: the other settings.
        schedules: a function of the optimizers that makes schedules, such as
            ``torch.optim.lr_scheduler``'s, or the schedules; each is stepped once per update.
        evaluate: returns metrics of the model, which has its averaged weights then, is in
            evaluation mode and needs no gradients. With a "count" among them, processes are
            weighted by it.
        callbacks: see ``Callback``.
        out: directory of the run: config.json (settings), run.json (versions, device),
            metrics.jsonl, events.jsonl and checkpoints; None writes nothing.
        device: "auto" (a GPU if there is one), what ``torch.device`` takes, or the ``World`` of the
            processes, for batches that need their rank.
        name: what is trained, for run.json.
        settings: plain values with which the run can be made again, for config.json; None writes
            those of the trainer.
        files: names of further files below ``out`` that ``overwrite`` may remove.
        report: what reports need to know: "percent", a list of the metrics that are in percent and
            not shares in [0, 1]; "examples", the largest number of examples in an update.

    Raises:
        ValueError: a setting is out of range or does not fit the others.

    Example:
        >>> def loss(model, batch):
        ...     features, targets = batch
        ...     return torch.nn.functional.cross_entropy(model(features), targets)
        >>> optimizer = trm_fast.GrokFastAdamW(model.parameters(), lr=1e-3)
        >>> trainer = Trainer(model, optimizer, loader, loss, TrainerConfig(steps=500))
        >>> trainer.fit()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers | Callable[[nn.Module], Optimizers],
        batches: Iterable[Any],
        objective: Objective | Callable[[nn.Module, Any], Any],
        config: TrainerConfig | None = None,
        *,
        schedules: Sequence[Any] | Callable[[list[Optimizer]], Sequence[Any]] = (),
        evaluate: Evaluate | None = None,
        callbacks: Sequence[Callback] = (),
        out: str | Path | None = None,
        device: str | torch.device | World = "auto",
        name: str = "",
        settings: dict[str, Any] | None = None,
        files: Sequence[str] = (),
        report: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config = config or TrainerConfig()
        self.world = device if isinstance(device, World) else World(device)
        self.model = model.to(self.world.device)
        self.wrapped = self.world.wrap(self.model, config.strategy)
        if config.strategy == "fsdp2" and not callable(optimizers):
            raise ValueError(
                "Trainer: optimizers must be a function of the model with strategy 'fsdp2', which "
                f"replaces its parameters; got {type(optimizers).__name__}"
            )
        made: Any = optimizers(self.model) if callable(optimizers) else optimizers
        self.optimizers: list[Optimizer] = [made] if isinstance(made, Optimizer) else list(made)
        plans = schedules(self.optimizers) if callable(schedules) else schedules
        self.schedules: list[Any] = list(plans)
        self.batches = batches if isinstance(batches, Batches) else RepeatedBatches(batches)
        self.objective = (
            objective if isinstance(objective, Objective) else FunctionObjective(objective)
        )
        self.ema = self._average()
        self.evaluator = evaluate
        self.callbacks = list(callbacks)
        self.name = name
        self.settings = settings or {}
        self.report = dict(report or {})
        self.out = None if out is None else Path(out)
        self.files = RunFiles(self.out, self.world, ("run.json", *files), config.keep_last)
        self.meter = Meter(self.world.device)
        self.guard = NonFiniteGuard(self.world.device, config.on_nonfinite, config.max_nonfinite)
        self.step = 0
        self.stop_reason: str | None = None
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.seconds = 0.0
        self._update = Update(
            self.wrapped,
            self.optimizers,
            self.objective,
            self.world,
            None if self.ema is None or self.ema.is_of_optimizer else self.ema,
            config.clip_norm,
            config.precision,
        )
        self.history: list[Record] = []
        self.evaluated_at = -1
        self._clock: Callable[[], float] = lambda: self.seconds
        self._saved: tuple[int, int, Path] | None = None
        self._logged = (0, 0.0)

    def _average(self) -> WeightEMA | None:
        """Returns the averages of the weights, which may be kept by an optimizer."""
        for optimizer in self.optimizers:
            if any(group.get("weight_ema") is not None for group in optimizer.param_groups):
                if self.config.ema is not None:
                    raise ValueError(
                        "Trainer: ema must be None, as an optimizer has weight_ema; got "
                        f"{self.config.ema!r}"
                    )
                return WeightEMA.of(optimizer, self.model)
        return None if self.config.ema is None else WeightEMA(self.model, self.config.ema)

    def fit(self, resume: bool = False, overwrite: bool = False) -> Summary:
        """Trains until ``config.steps``, a callback's stop, the end of the batches, or a signal.

        SIGINT, SIGTERM and SIGHUP let the step that is under way finish and be saved. The random
        generators of the process are given back as they were.

        Args:
            resume: go on from the last valid checkpoint in ``out``, if there is one.
            overwrite: remove the run that is in ``out`` first.

        Returns:
            The ``Summary``.

        Raises:
            ValueError: ``resume`` without ``out``, or no checkpoint of it can be loaded or fits.
            FileExistsError: there is a run in ``out``, and neither ``resume`` nor ``overwrite``.
            OSError: ``out`` cannot be written, or another process trains there.
            NonFiniteError: too many updates in a row were skipped.
        """
        if resume and self.out is None:
            raise ValueError("Trainer: resume needs out, the directory of the run; got None")
        with ExitStack() as stack:
            stack.enter_context(self.files.opened(resume, overwrite))
            stack.enter_context(fork_rng(self.world.device))
            seed_everything(self.config.seed + self.world.rank)
            request = stack.enter_context(graceful_stop(self._say))
            self.stop_reason = None
            if resume:
                self._load()
            if self.world.size == 1:
                self.files.require_space(snapshot(self))
            self.files.write_json("config.json", self.settings or asdict(self.config))
            self.files.write_json("run.json", describe(self))
            self.files.write_json("summary.json", {})  # until the run ends
            for callback in self.callbacks:
                stack.callback(callback.close)
                callback.on_start(self)
            summary = self._train(request)
            self.files.write_json("summary.json", ended(summary, self.world.device))
            for callback in self.callbacks:
                callback.on_end(self, summary)
        return summary

    def try_step(self) -> float:
        """Takes one step, for ``dry_run``, and returns its loss.

        Raises:
            ValueError: there is no batch.
        """
        batches, _ = self._next(iter(self.batches))
        if not batches:
            raise ValueError("Trainer: batches must give at least one; got none")
        self._update(batches, self.meter)
        return self.meter.means()["loss"]

    def _load(self) -> None:
        """Goes back to the last checkpoint that is whole, if there is any."""
        loaded = self.files.load()
        if loaded is None:
            self.history = self.files.rewind(0)
            return self.event("started", "there is no checkpoint yet: starting at the beginning")
        lost = restore(self, loaded.state)
        self.history = self.files.rewind(loaded.step)
        for reason in (*loaded.skipped, *([lost] if lost else [])):
            self.event("checkpoint", reason)
        self.event("resumed", f"resumed at step {loaded.step} from {loaded.path.name}")
        self._saved = (self.step, self.evaluated_at, loaded.path)

    def _train(self, request: StopRequest) -> Summary:
        """Runs the loop; says how it ended."""
        signal = None
        for _ in self.updates():
            signal = self.world.latest_signal(request.signal)
            if signal is not None:
                break
        return self._finish(signal)

    def updates(self) -> Iterator[int]:
        """Takes one update per item, with the metrics, evaluations and checkpoints that are due,
        until the run ends; for those who want the loop in their own hands. ``fit`` is this and what
        surrounds it: directory, seed, signals, the last evaluation and checkpoint.

        Yields:
            The updates so far.
        """
        iterator = iter(self.batches)
        started, before = time.perf_counter(), self.seconds
        self._clock = lambda: before + time.perf_counter() - started
        self._logged = (self.step, self.seconds)
        while self.step < self.config.steps and self.stop_reason is None:
            batches, names = self._next(iterator)
            if not batches:
                return self.stop("the batches have ended")
            finite = self._update(batches, self.meter)
            for schedule in self.schedules:
                schedule.step()
            self.step += 1
            self.guard.note(finite, f"step {self.step}{names}")
            for callback in self.callbacks:
                callback.on_step(self)
            self._after_step()
            yield self.step

    def _next(self, iterator: Iterator[Any]) -> tuple[list[Any], str]:
        return take(iterator, self.batches, self.config.accumulate, self.world.device)

    def _after_step(self) -> None:
        """Does what is due after a step: the guard's look, metrics, evaluation, checkpoint."""
        logs = self._is_due(self.config.log_every)
        if logs or not self._update.on_device:
            self._guarded()
        if logs:
            self._log()
        evaluates = self._is_due(self.config.evaluate_every)
        saves = self._is_due(self.config.save_every)
        if not evaluates and not saves:
            return
        began = self.elapsed()
        if evaluates:
            self._evaluate()
        if saves:
            self.save()
        # Neither belongs to the pace of the steps.
        step, seconds = self._logged
        self._logged = (step, seconds + self.elapsed() - began)

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _guarded(self) -> None:
        try:
            self.guard.check(lambda line: self.event("skipped", line))
        except NonFiniteError as error:
            self.event("stopped", str(error))
            try:
                # Nothing was changed by the steps that were skipped, so nothing is lost.
                self.save()
            except ValueError as reason:
                self.event("checkpoint", f"not written: {reason}")
            raise

    def _log(self) -> None:
        """Writes the means of the interval."""
        means = self.meter.means(self.world.add_up if self.world.size > 1 else None)
        self.meter.clear()
        now = self.elapsed()
        step, seconds = self._logged
        self._logged = (self.step, now)
        pace = (self.step - step) / (now - seconds) if now > seconds else math.nan
        rates = [float(group["lr"]) for o in self.optimizers for group in o.param_groups]
        record: Record = {"kind": "train", "step": self.step, "seconds": round(now, 3), **means}
        record |= {"lr": rates[0], "steps_per_second": round(pace, 3)}
        self._record(record)
        for callback in self.callbacks:
            callback.on_log(self, record)

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics of the model with its averaged weights; nothing of the run changes.

        Raises:
            ValueError: the trainer was given no ``evaluate``.
        """
        if self.evaluator is None:
            raise ValueError("Trainer: evaluate() needs the argument evaluate; got None")
        averaged = nullcontext() if self.ema is None else self.ema.swapped()
        with evaluating(self.model), fork_rng(self.world.device), torch.no_grad(), averaged:
            with gathered(self.wrapped):
                found = self.evaluator(self.model)
        return self.world.mean({name: float(value) for name, value in found.items()})

    def _evaluate(self) -> None:
        """Evaluates, keeps what is best, and tells everyone."""
        if self.evaluator is None or self.evaluated_at == self.step:
            return
        self.metrics = self.evaluate()
        self.evaluated_at = self.step
        now = round(self.elapsed(), 3)
        record: Record = {"kind": "evaluation", "step": self.step, "seconds": now, **self.metrics}
        self._record(record)
        try:
            is_best = self._is_best(record)
        except ValueError:
            # A wrong name shows only now; the steps until here are worth keeping.
            self.save()
            raise
        if is_best:
            self.best = {"step": self.step, **self.metrics}
        for callback in self.callbacks:
            callback.on_evaluate(self, record)
        if is_best:
            self.save()

    def _is_best(self, record: Record) -> bool:
        monitor = self.config.monitor
        if not monitor:
            return False
        value = metric(record, monitor, "Trainer: monitor")
        best = self.best.get(monitor, math.nan)
        return math.isfinite(value) and is_better(value, best, self.config.mode)

    def save(self) -> Path | None:
        """Writes a checkpoint, unless there is one of what is now; it is durable on return.

        Returns:
            Its directory, or None if the trainer writes nothing.

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
            ValueError: a weight or state of an optimizer is not finite.
        """
        now = (self.step, self.evaluated_at)
        checkpoints = self.files.checkpoints
        if checkpoints is None:
            return None
        if self._saved is not None and self._saved[:2] == now:
            return self._saved[2]
        if self._update.on_device:
            self._guarded()
        state = snapshot(self)
        if self.world.is_main:
            path = checkpoints.save(
                self.step, state, score=self._score(), summary=dict(self.metrics)
            )
            self._saved = (*now, path)
            for callback in self.callbacks:
                callback.on_save(self, path)
        else:
            self._saved = (*now, checkpoints.directory)
        self.world.barrier()
        return self._saved[2]

    def _score(self) -> float | None:
        monitor = self.config.monitor
        if monitor not in self.metrics or self.evaluated_at != self.step:
            return None
        score = self.metrics[monitor] * (1.0 if self.config.mode == "max" else -1.0)
        return score if math.isfinite(score) else None

    def _finish(self, signal: int | None) -> Summary:
        self._guarded()
        if signal is None:
            reason = self.stop_reason or f"all {self.config.steps} steps are done"
            self._evaluate()
        else:
            reason = f"interrupted by {Signals(signal).name}"
            self.event("interrupted", reason)
        path = self.save()
        return Summary(
            self.step, reason, signal, self.elapsed(), self.guard.skipped,
            dict(self.metrics), dict(self.best), path,
        )  # fmt: skip

    def stop(self, reason: str) -> None:
        """Lets the run end after this step, with an evaluation and a checkpoint."""
        self.stop_reason = reason

    def elapsed(self) -> float:
        """Returns the wall time of all parts of the run, in seconds."""
        return self._clock()

    def event(self, name: str, message: str) -> None:
        """Records something that must not pass in silence, in events.jsonl and for callbacks."""
        record = {"event": name, "step": self.step, "message": message}
        self.files.append(EVENTS, record)
        for callback in self.callbacks:
            callback.on_event(self, record)

    def _record(self, record: Record) -> None:
        self.history.append(record)
        self.files.append(METRICS, record)

    def _say(self, line: str) -> None:
        # A handler of signals may have interrupted a print, which must not be entered twice.
        if self.world.is_main:
            with suppress(OSError):
                os.write(2, f"{line}\n".encode())
