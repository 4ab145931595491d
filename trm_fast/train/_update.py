"""One update of the weights: backward passes, the guard against non-finite numbers, the move."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from operator import is_
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from trm_fast.optim import WeightEMA
from trm_fast.optim._closure import step_without
from trm_fast.train.distributed import World, reduces_gradients
from trm_fast.train.objective import Metrics, Objective, StepResult
from trm_fast.train.run import Step

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Update:
    """Moves the weights once: gradients of some batches, averaged, clipped, checked, applied.

    An update whose loss or gradient norm is not finite changes nothing: no weight, no average, no
    state of an optimizer. Where all optimizers heed ``found_inf``, as those of this package and the
    fused ones of torch do, a GPU decides that for itself, without the host waiting for it.

    Args:
        model: what is called.
        optimizers: whose parameters are watched and moved.
        world: the processes.
        ema: moved after each update, or None.
        precision: "bf16" or "fp16" for autocast, or "fp32".

    Attributes:
        params: those of the optimizers, as they are since the last update.
        pending: whether there are gradients that have not moved the weights.
        is_moving: whether an update has begun and is not over, or an error has ended it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        world: World,
        ema: WeightEMA | None,
        precision: str,
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.world = world
        self.ema = ema
        self.dtype = _DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(world.device.type) if precision == "fp16" else None
        self._listed: list[Tensor] = []
        self.params: list[Tensor] = []
        self._take_in(drops=False)
        self.scales = all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)
        self.sharded = isinstance(model, FSDPModule)
        self.on_device = self.scales and world.device.type == "cuda"
        self.pending = self.is_moving = False

    def gradients(
        self, objective: Objective, batches: Sequence[Any], index: int, clip_norm: float | None
    ) -> Step:
        """Runs all forward and backward passes; nothing moves.

        Args:
            objective: computes the losses.
            batches: whose mean loss is minimised, on the device.
            index: of the update.
            clip_norm: largest norm of the gradients of all parameters, or None.

        Raises:
            TypeError: the objective yields something else than a ``StepResult`` with a tensor.
            ValueError: the objective yields no loss, or not as many as it declares.
            RuntimeError: another step has gradients and has not moved.
        """
        if self.pending:
            raise RuntimeError(
                "Trainer: extra_update must not come between the gradients of a step and its "
                "update; got a call in on_gradients. Call it in on_step"
            )
        self._take_in()
        total = torch.zeros((), device=self.world.device)
        losses: list[Tensor] = []
        samples: list[Mapping[str, Tensor]] = []
        metrics: list[Metrics] = []
        for slot, batch in enumerate(batches):
            value: Tensor | None = None
            numbers: dict[str, Tensor] = {}
            count = 0
            with self._precision():
                for found in self._results(objective, batch, slot == len(batches) - 1):
                    if not (isinstance(found, StepResult) and isinstance(found.loss, Tensor)):
                        raise _wrong_result(objective, found)
                    if not _is_trainable(found.loss):
                        raise _wrong_loss(objective, found.loss)
                    loss = found.loss / len(batches) if len(batches) > 1 else found.loss
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                    part = loss.detach()
                    total = total + part
                    own = part if len(batches) == 1 else found.loss.detach()
                    value = own if value is None else value + own
                    metrics.append(found.metrics)
                    if found.samples:
                        numbers = {**numbers, **found.samples}
                    count += 1
            if value is None or count != (objective.backwards or count):
                raise _wrong_count(objective, count)
            losses.append(value)
            samples.append(numbers)
        self.world.average_gradients(self.params)
        self.world.gather_rows(self.params)
        norm, finite, overflow = self._verdict(total)
        self.pending = True
        return Step(
            index, batches, total, losses, samples, metrics, norm, finite, clip_norm, overflow
        )

    def _take_in(self, drops: bool = True) -> None:
        """Takes in the parameters that optimizers have been given since.

        Args:
            drops: drop the gradients that these have, which belong to updates before.
        """
        groups = [group["params"] for opt in self.optimizers for group in opt.param_groups]
        listed = list(chain.from_iterable(groups))
        if len(listed) == len(self._listed) and all(map(is_, listed, self._listed)):
            return
        known = {id(param) for param in self.params}
        self._listed = listed
        self.params = list({id(param): param for param in listed}.values())
        for param in self.params if drops else ():
            if id(param) not in known:
                param.grad = None

    def _results(self, objective: Objective, batch: Any, is_last: bool) -> Iterator[StepResult]:
        """Returns the results of a batch. Sharded gradients are exchanged from the last loss of the
        last batch on, or with all of its losses if their number is unknown."""
        results: Any = objective.losses(self.model, batch)
        if type(results) is not GeneratorType and (
            isinstance(results, StepResult) or not hasattr(results, "__iter__")
        ):
            raise _wrong_result(objective, results)
        return (
            self._exchanged(results, objective.backwards or 1, is_last) if self.sharded else results
        )

    def _exchanged(
        self, results: Iterator[StepResult], last: int, is_last: bool
    ) -> Iterator[StepResult]:
        reduces_gradients(self.model, is_last and last == 1)
        for count, found in enumerate(results, 1):
            if count == last > 1:
                reduces_gradients(self.model, is_last)
            yield found

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.dtype)

    @torch.no_grad()
    def _verdict(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the norm of the dense gradients, whether loss and gradients are finite in all
        processes, and whether float16 has overflowed."""
        if self.scaler is not None:
            scale = self.scaler.scale(loss.new_ones(()))
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        grads = [param.grad for param in self.params if param.grad is not None]
        dense = [grad for grad in grads if not grad.is_sparse]
        norm = get_total_norm(dense, foreach=True if loss.is_cuda else None)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = torch.isfinite(norm + loss)
        for grad in grads:
            if grad.is_sparse:
                finite = finite & torch.isfinite(grad._values().sum())
        finite = self.world.all_agree(finite)
        if self.scaler is None:
            return norm, finite, None
        # A gradient that is not finite below a scale of 1 is not so because of the scale.
        mendable = self.world.all_agree(torch.isfinite(loss) & (scale >= 1.0))
        return norm, finite, ~finite & mendable

    def move(self, step: Step, objective: Objective) -> None:
        """Clips and applies the gradients of a step, if it is finite, and tells the objective that
        its losses have come from. Parameters that have come since move from the next one on."""
        self.pending, self.is_moving = False, True
        self._take_in()
        if step.clip_norm is not None:
            self._clip(step.norm, step.clip_norm)
        if self.on_device:
            self._move(found_inf=(~step.finite).float())
        elif step.finite:
            self._move()
        for optimizer in self.optimizers:
            for name in ("found_inf", "grad_scale"):
                optimizer.__dict__.pop(name, None)
        if self.scaler is not None:
            self._rescale(self.scaler, step.finite)
        objective.commit(step.finite)
        self.is_moving = False

    @torch.no_grad()
    def _clip(self, norm: Tensor, clip_norm: float) -> None:
        if not self.scales:
            scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
            every = [param.grad for param in self.params if param.grad is not None]
            torch._foreach_mul_([grad for grad in every if not grad.is_sparse], scale)
            return
        # The optimizers divide by it as they read the gradients. The small number is torch's.
        scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0).float()
        for optimizer in self.optimizers:
            optimizer.grad_scale = scale  # type: ignore[attr-defined]

    def _move(self, found_inf: Tensor | None = None) -> None:
        if self.ema is not None and not self.ema.started:
            self.ema.update()  # it starts at the weights before the first update
        for optimizer in self.optimizers:
            if found_inf is not None:
                optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            step_without("Trainer: optimizers", optimizer, "One such as AdamW does")
        if self.ema is not None:
            self.ema.update(found_inf)

    def _rescale(self, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
        """Adapts the scale of the loss to the verdict, which all processes share."""
        checked = False
        for optimizer in self.optimizers:
            for found_inf in scaler._found_inf_per_device(optimizer).values():
                found_inf.copy_((~finite).float())
                checked = True
        # Where no weight has a gradient, torch has nothing to adapt the scale to.
        scaler.update(None if checked else scaler._scale)

    def clear(self) -> None:
        """Drops the gradients, also those of a step that an error has ended."""
        self.pending = self.is_moving = False
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Puts the gradients away for another update in between, and back after it."""
        self._take_in()
        kept = [(param, param.grad) for param in self.params]
        for param in self.params:
            param.grad = None
        try:
            yield
        finally:
            for param, grad in kept:
                param.grad = grad


def _wrong_count(objective: Objective, count: int) -> ValueError:
    declared = objective.backwards
    wanted = "at least one" if declared is None else f"{declared}, as backwards says"
    return ValueError(
        f"Trainer: losses of {type(objective).__name__} must yield {wanted}; got {count}"
    )


def _is_trainable(loss: Tensor) -> bool:
    """Returns whether a backward pass can begin at a loss."""
    return loss.numel() == 1 and loss.requires_grad and loss.is_floating_point()


def _wrong_loss(objective: Objective, loss: Tensor) -> ValueError:
    return ValueError(
        f"Trainer: the loss of {type(objective).__name__} must be one real number that depends on "
        f"parameters which require gradients; got a {loss.dtype} tensor of shape "
        f"{tuple(loss.shape)}, requires_grad={loss.requires_grad}"
    )


def _wrong_result(objective: Objective, found: Any) -> TypeError:
    got = type(found).__name__
    if isinstance(found, StepResult):
        got = f"one with {type(found.loss).__name__}"
        if isinstance(found.loss, Tensor):
            got = "one that is returned. Write yield in place of return"
    return TypeError(
        f"Trainer: losses of {type(objective).__name__} must yield StepResults, each with the loss "
        f"as a tensor; got {got}"
    )
