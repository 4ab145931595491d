"""``Trainer``: the loop of every recipe, from plain torch objects."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trm_fast._dispatch import slow_paths
from trm_fast._paths import expanded
from trm_fast._slow_paths import SlowPaths
from trm_fast.optim import WeightEMA
from trm_fast.optim._closure import check_closure
from trm_fast.train._evaluations import Evaluations
from trm_fast.train._extra import ExtraUpdates
from trm_fast.train._given import given
from trm_fast.train._guard import NonFiniteError, NonFiniteGuard
from trm_fast.train._interval import Interval, add_metrics, check_names
from trm_fast.train._rescue import Rescue
from trm_fast.train._resume import drop_later, go_back
from trm_fast.train._run_files import EVENTS, METRICS, RunFiles, describe
from trm_fast.train._saving import Saving
from trm_fast.train._schedules import check_later_schedules, check_schedules, takes_metric
from trm_fast.train._signals import Interrupted, StopRequest, graceful_stop
from trm_fast.train._stage_runner import Actions, StageRunner
from trm_fast.train._summary import summary_values
from trm_fast.train._update import Update
from trm_fast.train._workers import is_lost_worker
from trm_fast.train.batches import Batches, to_device
from trm_fast.train.callbacks import Callback, by_name
from trm_fast.train.config import Summary, TrainerConfig
from trm_fast.train.curriculum import Curriculum, Stage
from trm_fast.train.display import warn_from_handler
from trm_fast.train.distributed import World, lost_processes
from trm_fast.train.generators import fork_rng, seed_everything
from trm_fast.train.meter import Meter
from trm_fast.train.objective import Objective, objective_of
from trm_fast.train.run import Evaluate, Record, Step

Optimizers = Optimizer | Sequence[Optimizer]


class Trainer:
    """Trains a model: batches in, updates, evaluations and checkpoints out.

    A run that is stopped or killed goes on from its last checkpoint to the same bits (same machine,
    versions and processes): weights, their average, optimizers, schedules, the objective's carry,
    random generators, place in the data, callbacks and sums of metrics are all in it.

    Args:
        model: the model; it is moved to the device.
        optimizers: one, several, or a function of the model that makes them; FSDP2 needs the
            function, as it replaces the parameters.
        batches: an iterable of batches, which is repeated; what knows its place itself
            (``Batches``); or a ``Curriculum`` for this trainer alone, whose stages have batches. A
            batch is a tensor, or a mapping, list or tuple with tensors. With several processes each
            has its own part.
        objective: an ``Objective``, or a function ``(model, batch)`` that returns the loss or a
            ``StepResult``.
        config: the other settings.
        schedules: a function of the optimizers that makes schedules, such as
            ``torch.optim.lr_scheduler``'s, or the schedules; each is stepped once per update, and
            one that takes a metric, as ``ReduceLROnPlateau``, with ``config.monitor`` of each
            evaluation.
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
        ValueError: a setting is out of range or does not fit the others; an optimizer cannot step
            without a closure, as LBFGS, or a schedule would not get the metric that it takes.

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
        batches: Iterable[Any] | Curriculum,
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
        self.world.prepare(self.model, config.strategy)
        if config.strategy == "fsdp2" and not callable(optimizers):
            raise ValueError(
                "Trainer: optimizers must be a function of the model with strategy 'fsdp2', which "
                f"replaces its parameters; got {type(optimizers).__name__}"
            )
        made: Any = optimizers(self.model) if callable(optimizers) else optimizers
        self.optimizers: list[Optimizer] = [made] if isinstance(made, Optimizer) else list(made)
        for optimizer in self.optimizers:
            check_closure("Trainer: optimizers", optimizer, "One such as AdamW does")
            clipped = getattr(optimizer, "clip_norm", None)
            if len(self.optimizers) > 1 and clipped is not None:
                raise ValueError(
                    "Trainer: clip_norm must be in the TrainerConfig with several optimizers, each "
                    f"of which sees a part of the norm; got {clipped!r} in a "
                    f"{type(optimizer).__name__}"
                )
        plans = schedules(self.optimizers) if callable(schedules) else schedules
        self.schedules: list[Any] = list(plans)
        # A run without stages is one stage that sets nothing.
        staged = isinstance(batches, Curriculum)
        self._curriculum = (
            batches if isinstance(batches, Curriculum) else Curriculum([Stage("train", batches)])
        )
        self._curriculum.check(self, evaluate)
        check_schedules(self.schedules, config, self._curriculum.stages, evaluate)
        check_later_schedules(self._curriculum.stages, self.optimizers, config, evaluate)
        self.given = given(config, self.optimizers, self.schedules, self._curriculum.stages)
        self.objective = objective_of(objective)
        self.ema = self._average()
        self._evaluate_without_stage = evaluate
        self.callbacks = list(callbacks)
        by_name(self.callbacks)  # no two have one name
        self.name = name
        self.settings = settings or {}
        self.report = dict(report or {})
        self.out = None if out is None else expanded(out)
        self.files = RunFiles(self.out, self.world, ("run.json", *files), config.keep_last)
        self.meter = Meter(self.world.device)
        self.guard = NonFiniteGuard(self.world.device, config.on_nonfinite, config.max_nonfinite)
        self.step = 0
        self.stop_reason: str | None = None
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_after = -1  # the step after which the best checkpoint is looked for
        self.seconds = 0.0
        average = None if self.ema is None or self.ema.is_of_optimizer else self.ema
        self._update = Update(self.model, self.optimizers, self.world, average, config.precision)
        self.extra = ExtraUpdates(self._update, self.meter, self.guard, self.objective)
        self.history: list[Record] = []
        self.evaluated_at = -1
        self._clock: Callable[[], float] = lambda: self.seconds
        self._request = StopRequest()
        self._signal: int | None = None
        self._saving = Saving(self, self._guarded)
        self._rescue = Rescue(self, self._update, self._saving, self._say)
        self._evaluations = Evaluations(self, self._saving.save, lambda: self._request.leaving())
        self._interval = Interval()
        self._slow_paths = SlowPaths()
        self._in_step = False
        actions = Actions(
            self._guarded, self._log, self._evaluate, self._saving.save,
            lambda seconds: self._interval.pause(seconds),
        )  # fmt: skip
        self._stages = StageRunner(self, self._curriculum, staged, actions)

    @property
    def batches(self) -> Batches:
        """Those of the present stage."""
        return self._curriculum.sources.of(self._curriculum.index)

    @batches.setter
    def batches(self, batches: Any) -> None:
        raise AttributeError(
            "Trainer: batches must be changed by a Stage of a Curriculum, which is given in their "
            f"place when the trainer is made; got an assignment of {type(batches).__name__}"
        )

    @property
    def evaluator(self) -> Evaluate | None:
        """What evaluates the model: that of the present stage, or that of the trainer."""
        return self._curriculum.stage.evaluate or self._evaluate_without_stage

    @evaluator.setter
    def evaluator(self, evaluate: Evaluate | None) -> None:
        self._evaluate_without_stage = evaluate

    @property
    def curriculum(self) -> Curriculum:
        """The stages; a run without any has one."""
        return self._curriculum

    @property
    def staged(self) -> bool:
        """Whether the run was given stages."""
        return self._stages.staged

    @property
    def epochs(self) -> int:
        """Epochs that are over."""
        return self._curriculum.sources.epochs

    @property
    def extra_updates(self) -> int:
        """Updates so far that are no steps."""
        return self.extra.count

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss with precision "fp16"."""
        return self._update.scaler

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

        SIGINT, SIGTERM and SIGHUP let the step that is under way finish and be saved. One process
        leaves an evaluation at once, several processes save before each one; a resume makes up for
        it. The random generators of the process are given back as they were.

        Args:
            resume: go on from the last valid checkpoint in ``out``, if there is one.
            overwrite: remove the run that is in ``out`` first.

        Returns:
            The ``Summary``.

        Raises:
            ValueError: ``resume`` without ``out``, or no checkpoint of it can be loaded or fits; or
                a weight or state of an optimizer is not finite.
            FileExistsError: there is a run in ``out``, and neither ``resume`` nor ``overwrite``.
            TypeError: a state is none that a checkpoint can hold; the line names its place.
            OSError: ``out`` cannot be written, or another process trains there.
            ConnectionError: another process of the run has ended or stands still.
            NonFiniteError: too many updates in a row were skipped.
        """
        if resume and self.out is None:
            raise ValueError("Trainer: resume needs out, the directory of the run; got None")
        with ExitStack() as stack:
            stack.enter_context(lost_processes())
            self._request = stack.enter_context(graceful_stop(self._say))
            stack.callback(self._forget_signal)
            stack.enter_context(self.files.opened(resume, overwrite))
            stack.enter_context(fork_rng(self.world.device))
            seed_everything(self.config.seed + self.world.rank)
            self._slow_paths = stack.enter_context(slow_paths())
            self.stop_reason = None
            loaded, events = go_back(self, self.files, self._settings()) if resume else (None, [])
            if loaded is not None:
                self._saving.go_on_from(loaded.path)
            self._saving.require_savable()
            for left in self.files.begin(self._settings(), describe(self)):
                self.event("left", left)
            if resume:
                records = 0 if loaded is None else loaded.state["trainer"]["records"]
                for event, message in (*events, *drop_later(self, self.files, records)):
                    self.event(event, message)
            by_name(self.callbacks)
            for callback in self.callbacks:
                stack.callback(callback.close)
                callback.on_start(self)
            self._saving.require_savable()  # what the hooks have added to it
            summary = self._train()
            self.files.write_json("summary.json", summary_values(summary, self.world.device))
            for callback in self.callbacks:
                callback.on_end(self, summary)
        return summary

    def try_step(self) -> float:
        """Takes one step, for ``dry_run``, and returns its loss.

        Raises:
            ValueError: there is no batch.
        """
        if not self._curriculum.entered:
            self._curriculum.enter(self)
        batches, _ = self._next_batches()
        if not batches:
            raise ValueError("Trainer: batches must give at least one; got none")
        return float(self.train_step(batches).loss)

    def _settings(self) -> dict[str, Any]:
        return self.settings or asdict(self.config)

    def _forget_signal(self) -> None:
        self._request, self._signal = StopRequest(), None

    def _train(self) -> Summary:
        """Runs the loop and the last evaluation; says how it ended."""
        try:
            for _ in self.updates():
                pass
            with self._rescue.saved_on_error():
                self._guarded()
                if self._signal is None:
                    self._in_hooks(self._evaluate_at_end)
        except Interrupted:
            self._signal = self._request.signal
            with self._rescue.saved_on_error():
                self.event("evaluation", "left by a signal: it is made when the run is resumed")
        return self._finish()

    def updates(self) -> Iterator[int]:
        """Takes one update per item, with the metrics, evaluations and checkpoints that are due,
        until the run ends; for those who want the loop in their own hands. ``fit`` is this and what
        surrounds it: directory, seed, signals, the last evaluation and checkpoint.

        Yields:
            The updates so far.
        """
        started, before = time.perf_counter(), self.seconds
        self._clock = lambda: before + time.perf_counter() - started
        self._interval = Interval(self.step, self.seconds)
        self._update.clear()
        try:
            self._in_hooks(self._stages.begin)
            while not self._is_interrupted() and self._goes_on():
                self._rescue.begin_step()
                try:
                    batches, names = self._next_batches()
                except RuntimeError as error:
                    if not self._is_lost_to_signal(error):
                        raise
                    continue
                if not batches:
                    self._rescue.end_step()
                    self._in_hooks(self._stages.after_batches)
                    continue
                self._in_step = True
                try:
                    self.train_step(batches, names)
                    self._saving.rehearse()
                    self._report_slow_paths()
                    self._stages.after_step(waits=self._update.on_device)
                finally:
                    self._in_step = False
                yield self.step
        except Exception as error:
            self._rescue.save_before(error)
            raise
        finally:
            # Processes of a loader end now; as garbage they would take seconds.
            self._curriculum.sources.leave()

    def _is_lost_to_signal(self, error: RuntimeError) -> bool:
        """Returns whether the signal that ends the run has ended a process of a loader too. Batches
        that were taken for the same step, and several processes, cannot go without it."""
        alone = self.world.size == 1 and self.config.accumulate == 1
        if self._request.signal is None or not alone or not is_lost_worker(error):
            return False
        self.event("data", f"left by a signal: {' '.join(str(error).split())}")
        return True

    def _is_interrupted(self) -> bool:
        self._signal = self.world.latest_signal(self._request.signal)
        return self._signal is not None

    def _goes_on(self) -> bool:
        return self.step < self.config.steps and self.stop_reason is None

    def _in_hooks(self, function: Callable[[], None]) -> None:
        """Calls what calls hooks; a checkpoint that they ask for waits for the end of it."""
        self._in_step = True
        try:
            function()
        finally:
            self._in_step = False

    def _next_batches(self) -> tuple[list[Any], str]:
        stages = self._curriculum
        return stages.sources.next(stages.index, self.config.accumulate, self.world.device)

    def train_step(self, batches: Sequence[Any], names: str = "") -> Step:
        """Takes one step: gradients, hooks, update, schedules.

        Args:
            batches: on the device; their mean loss is minimised.
            names: of the batches, for messages.
        """
        step = self._update.gradients(self.objective, batches, self.step + 1, self.config.clip_norm)
        for callback in self.callbacks:
            callback.on_gradients(self, step)
        self._update.move(step, self.objective)
        self._rescue.end_step()
        try:
            for metrics in step.metrics:
                self.meter.add(metrics)
            self.meter.add({"loss": (step.loss, 1.0)})
            for schedule in self.schedules:
                if not takes_metric(schedule):
                    schedule.step()
        finally:
            # The weights have moved: whatever else goes wrong, this is a step.
            self.step += 1
            self._curriculum.step += 1
            self.guard.note(step.finite, f"step {self.step}{names}", step.overflow)
        for callback in self.callbacks:
            callback.on_step(self, step)
        self._update.clear()
        return step

    def extra_update(
        self,
        objective: Objective | Callable[[nn.Module, Any], Any],
        batches: Sequence[Any],
        name: str = "extra",
    ) -> Step:
        """Moves the weights once more, with other batches: an update that is no step. It has a
        counter of its own, ``extra_updates``; schedules and callbacks are not called for it, but
        optimizers and averages move as with a step. All processes must call it, between two steps
        or in any hook but ``on_gradients`` and ``on_save``.

        Args:
            objective: as for the trainer. Its state is saved, and comes back with the first call of
                this name after a resume.
            batches: at least one; the mean of their losses is minimised.
            name: stands before its metrics, as in "extra/loss".

        Returns:
            The update; its gradients are gone.

        Raises:
            ValueError: there is no batch, or another objective has this name.
        """
        moved = [to_device(batch, self.world.device) for batch in batches]
        return self.extra.update_once(
            objective_of(objective), moved, name, self.config.clip_norm, self.step
        )

    def _guarded(self) -> None:
        try:
            self.guard.check(lambda line: self.event("skipped", line))
        except NonFiniteError as error:
            self.event("stopped", str(error))
            try:
                # Nothing was changed by the steps that were skipped, so nothing is lost.
                self._saving.save()
            except ValueError as reason:
                self.event("checkpoint", f"not written: {reason}")
            raise

    def _log(self) -> None:
        """Writes the means of the interval, and what callbacks add to them; nothing for an interval
        without a step."""
        if "loss" not in self.meter.totals:
            return
        means, sums = self.meter.means(self.world), self.meter.state_dict()
        self.meter.clear()
        rate = float(self.optimizers[0].param_groups[0]["lr"])
        numbers = means | self._stages.place()
        record = self._interval.record(self.step, self.elapsed(), numbers, rate)
        try:
            check_names(means, "the objective")
            add_metrics(record, by_name(self.callbacks), Meter(self.world.device), self.world)
            self._record(record)
        except Exception as error:
            self.meter.load_state_dict(sums)  # for the record of a resumed run
            if isinstance(error, ValueError):
                # A name that is taken shows only now, in all processes.
                self._saving.save()
            raise
        for callback in self.callbacks:
            callback.on_log(self, record)

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics of the model with its averaged weights; nothing of the run changes.

        Raises:
            ValueError: the trainer was given no ``evaluate``.
            TypeError: that has not returned numbers by name.
        """
        return self._evaluations.metrics()

    def _evaluate(self) -> tuple[Record | None, bool]:
        """Evaluates, keeps what is best, and calls callbacks.

        Returns:
            The record, None without an evaluation, and whether it is the best so far.
        """
        if self.evaluator is None or self.evaluated_at == self.step:
            return None, False
        found = self._evaluations.safe_metrics()
        self._report_slow_paths()
        now = round(self.elapsed(), 3)
        record: Record = {"kind": "evaluation", "step": self.step, "seconds": now}
        record |= found | self._stages.place()
        self._record(record)
        self.metrics, self.evaluated_at = found, self.step
        is_best = self._evaluations.judge(record)
        if is_best:
            self.best = {"step": self.step, **self.metrics}
        for callback in self.callbacks:
            callback.on_evaluate(self, record)
        return record, is_best

    def save(self) -> Path | None:
        """Writes a checkpoint, unless there is one of what is now. All processes must call it.

        In a hook of a step it is written as soon as everything that belongs to the step is done, as
        records, evaluation and the end of a stage: a resume goes on with the next step. Elsewhere
        it is durable on return.

        Returns:
            Its directory; None if the trainer writes nothing, or will write it after the step.

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
            RuntimeError: in ``on_gradients``, where half of a step is done.
            ValueError: a weight or state of an optimizer is not finite.
        """
        if self._update.pending or self._update.is_moving:
            raise RuntimeError(
                "Trainer: save must not come between the gradients of a step and its update; got a "
                "call in on_gradients. Call it in on_step"
            )
        if self._in_step and not self._saving.is_done:
            self._stages.wants_save = True
            return None
        return self._saving.save()

    def _finish(self) -> Summary:
        if self._signal is None:
            reason = self.stop_reason or self._reason_of_end()
        else:
            reason = f"interrupted by {Signals(self._signal).name}"
            with self._rescue.saved_on_error():
                self.event("interrupted", reason)
        path = self._saving.save()
        return Summary(
            self.step, reason, self._signal, self.elapsed(), self.guard.skipped,
            dict(self.metrics), dict(self.best), path,
        )  # fmt: skip

    def _reason_of_end(self) -> str:
        if self.step > self.config.steps:
            return (
                f"nothing is left to do: {self.step} steps were taken, more than the "
                f"{self.config.steps} that are asked for"
            )
        return f"all {self.config.steps} steps are done"

    def _evaluate_at_end(self) -> None:
        self._evaluate()

    def stop(self, reason: str) -> None:
        """Lets the run end after this step, with an evaluation and a checkpoint.

        A run that is interrupted before that goes on when it is resumed: a callback whose reason
        still holds asks again in ``on_start``, as ``EarlyStopping`` does.
        """
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

    def _report_slow_paths(self) -> None:
        for line in self._slow_paths.new():
            self.event("slow", line)

    def _record(self, record: Record) -> None:
        self.files.append(METRICS, record)
        self.history.append(record)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            warn_from_handler(line)
