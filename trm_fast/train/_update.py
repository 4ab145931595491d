"""One update of the weights: backward passes, the guard against non-finite numbers, the step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from trm_fast.optim import WeightEMA
from trm_fast.train.distributed import World
from trm_fast.train.meter import Meter
from trm_fast.train.objective import Objective


class Update:
    """Moves the weights once: gradients of some batches, all-reduced, clipped, checked, applied.

    A step whose loss or gradient norm is not finite changes nothing: no weight, no average, no
    state of an optimizer. Where all optimizers heed ``found_inf``, as those of this package and the
    fused ones of torch do, a GPU decides that for itself, without the host waiting for it.

    Args:
        model: what is called.
        optimizers: whose parameters are watched and stepped.
        objective: computes the losses.
        world: the processes.
        ema: moved after each step, or None.
        clip_norm: largest norm of the gradients of all parameters, or None.
        precision: "bf16" for autocast, or "fp32".
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        objective: Objective,
        world: World,
        ema: WeightEMA | None,
        clip_norm: float | None,
        precision: str,
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.objective = objective
        self.world = world
        self.ema = ema
        self.clip_norm = clip_norm
        self.autocast = precision == "bf16"
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.params: list[Tensor] = [param for group in groups for param in group["params"]]
        heeding = all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)
        self.scales = heeding
        self.on_device = heeding and world.device.type == "cuda"

    def __call__(self, batches: Sequence[Any], meter: Meter) -> Tensor:
        """Takes one step.

        Args:
            batches: whose mean loss is minimised, on the device.
            meter: takes the metrics.

        Returns:
            Whether the step was finite, and so was taken: 0-d, bool, on the device.
        """
        loss = self._gradients(batches, meter)
        self.world.gather_rows(self.params)
        finite = self._finite(loss)
        if self.on_device:
            self._step(found_inf=(~finite).float())
            self.objective.skipped(finite)
        elif finite:
            self._step()
        else:
            self.objective.skipped(finite)
        for optimizer in self.optimizers:
            for name in ("found_inf", "grad_scale"):
                optimizer.__dict__.pop(name, None)
            optimizer.zero_grad()
        return finite

    def _gradients(self, batches: Sequence[Any], meter: Meter) -> Tensor:
        """Runs all forward and backward passes; returns the mean loss, without gradient."""
        total = torch.zeros((), device=self.world.device)
        for slot, batch in enumerate(batches):
            for index in range(self.objective.passes):
                is_last = slot == len(batches) - 1 and index == self.objective.passes - 1
                with self._synchronised(is_last), self._precision():
                    found = self.objective(self.model, batch, slot, index)
                    loss = found.loss / len(batches) if len(batches) > 1 else found.loss
                    loss.backward()
                total = total + loss.detach()
                meter.add(found.metrics)
        meter.add({"loss": (total, 1.0)})
        return total

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients go around once, with the last pass."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        elif isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        return nullcontext()

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    @torch.no_grad()
    def _finite(self, loss: Tensor) -> Tensor:
        """Returns whether loss and gradients are finite in all processes; clips the gradients."""
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
        if self.clip_norm is not None:
            self._clip(dense, norm)
        return finite

    def _clip(self, grads: list[Tensor], norm: Tensor) -> None:
        assert self.clip_norm is not None
        if not self.scales:
            scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, scale)
            return
        # The optimizers divide by it as they read the gradients. The small number is torch's.
        scale = ((norm + 1e-6) / self.clip_norm).clamp(min=1.0).float()
        for optimizer in self.optimizers:
            optimizer.grad_scale = scale  # type: ignore[attr-defined]

    def _step(self, found_inf: Tensor | None = None) -> None:
        for optimizer in self.optimizers:
            if found_inf is not None:
                optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
        if self.ema is not None:
            self.ema.update(found_inf)
