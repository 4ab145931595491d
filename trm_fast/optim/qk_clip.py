"""QK-clip: rescales the projections of an attention head whose logits have grown too large.

Source: Kimi K2 (arXiv:2507.20534), section 2.1 and algorithm 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

Report = Callable[[Tensor], None]


@dataclass(frozen=True)
class QKRows:
    """Rows of a projection that make the queries, or the keys, of all heads, head after head.

    Args:
        source: a module with ``weight`` and perhaps ``bias``, which is asked for them at each step,
            or a parameter, or several, as (weight, bias). Rows lie along the first dimension, as in
            ``nn.Linear``.
        start: first row.
        count: number of rows; None means all that follow.
    """

    source: nn.Module | Tensor | Sequence[Tensor]
    start: int = 0
    count: int | None = None

    def tensors(self) -> list[Tensor]:
        """Returns the parameters, checked.

        Raises:
            ValueError: they are no parameters, or have fewer rows.
        """
        tensors = self._found()
        stop = self.start + self.size
        for tensor in tensors:
            # Of a parametrised module, `weight` is a result that nothing would keep.
            if not isinstance(tensor, nn.Parameter):
                raise ValueError(
                    "QKClip: weight and bias must be parameters; got a computed "
                    f"{type(tensor).__name__}: give the parameter from which it is computed"
                )
            if not 0 <= self.start < stop <= tensor.shape[0]:
                raise ValueError(
                    f"QKClip: rows must lie in {tuple(tensor.shape)}; got {self.start} to {stop}"
                )
        return tensors

    @property
    def size(self) -> int:
        """The number of rows."""
        return self._found()[0].shape[0] - self.start if self.count is None else self.count

    def _found(self) -> list[Tensor]:
        source = self.source
        if isinstance(source, nn.Module):
            named = [source.weight, getattr(source, "bias", None)]
            return [tensor for tensor in named if isinstance(tensor, Tensor)]
        return [source] if isinstance(source, Tensor) else list(source)


@dataclass(frozen=True)
class _Layer:
    """What is watched of one attention layer; its heads are ``first`` to ``stop`` of all."""

    name: str
    q: QKRows
    k: QKRows
    shared_keys: bool
    first: int
    stop: int


class QKClip:
    """Keeps the largest attention logit of every head at or below a threshold.

    With ``S`` the largest unmasked ``q . k * scale`` of a head since the last step, over all passes
    through the layer (recursions, micro-batches) and all ranks:

        gamma = threshold / S if S > threshold else 1
        W_q, W_k (and biases) of this head *= sqrt(gamma)
        W_q (and bias) of this head *= gamma, where its keys serve other heads too

    The logits of a clipped head shrink by exactly ``gamma``; no other head changes by a bit.
    Rotary positions commute with the scaling; behind a normalisation of q or k it has no effect.
    A bias of the logits, as of relative positions, is not scaled, so report the logits without it.
    Weights in 16 bits are rounded after the scaling, so that a logit may stay above the threshold
    by that rounding. The optimizer's momentum is left alone.

    Nothing waits for the device: the factors are computed on it for all layers at once. With
    ``torch.distributed``, each step makes one all-reduce of one number per head.

    Attention modules report, and nothing is patched. Each pass hands over its largest logits, which
    ``max_logits`` computes for modules that do not know them:

        class Attention(nn.Module):
            report = None  # set by the caller of clip.watch

            def forward(self, x):
                ...
                if self.report is not None and self.training:
                    self.report(max_logits(q, k))

        clip = QKClip(threshold=100.0)
        for name, layer in model.named_modules():
            if isinstance(layer, Attention):
                layer.report = clip.watch(layer.q_proj, layer.k_proj, heads=8, name=name)
        clip.attach(optimizer)

    A logit that is NaN or +inf says nothing about the size to which weights should shrink. Such
    reports are left out, so that the other passes still clip, and counted in ``nonfinite``.

    Args:
        threshold: largest logit allowed, > 0. Published: 100 (Kimi K2); small models use 30.
        process_group: ranks whose logits count; None means all.

    Raises:
        ValueError: ``threshold`` is not positive and finite.
    """

    def __init__(
        self, threshold: float = 100.0, process_group: dist.ProcessGroup | None = None
    ) -> None:
        if not (isfinite(threshold) and threshold > 0):
            raise ValueError(f"QKClip: threshold must be finite and > 0; got {threshold}")
        self.threshold = threshold
        self._group = process_group
        self._layers: list[_Layer] = []
        # One entry per head of all layers, so that a step needs few operations.
        self._running = torch.empty(0, dtype=torch.float32)
        self._last = torch.empty(0, dtype=torch.float32)
        self._clips = torch.empty(0, dtype=torch.int64)
        self._nonfinite = torch.empty(0, dtype=torch.int64)

    def watch(
        self,
        q: QKRows | nn.Module | Tensor | Sequence[Tensor],
        k: QKRows | nn.Module | Tensor | Sequence[Tensor],
        *,
        heads: int,
        kv_heads: int | None = None,
        shared_keys: bool | None = None,
        name: str | None = None,
    ) -> Report:
        """Starts to watch an attention layer. Layers that share weights are watched once and report
        to the same callable.

        Args:
            q: projection to the queries; ``QKRows(qkv, 0, width)`` for a part of a fused one.
            k: projection to the keys.
            heads: number of query heads, whose rows lie one head after the other.
            kv_heads: number of key heads, of which each serves ``heads / kv_heads`` query heads in
                succession; None means ``heads``.
            shared_keys: True never scales the keys, because something else uses them too; None
                means ``kv_heads < heads``.
            name: under which the layer is listed and saved; None means "attention<number>".

        Returns:
            ``report(max_logits)``, which takes the largest logit per head of one pass, [heads], on
            any device.

        Raises:
            ValueError: head counts and rows do not fit together, the name is taken, or rows are
                watched already.
        """
        q = q if isinstance(q, QKRows) else QKRows(q)
        k = k if isinstance(k, QKRows) else QKRows(k)
        kv_heads = heads if kv_heads is None else kv_heads
        shared = kv_heads < heads if shared_keys is None else shared_keys
        if kv_heads < heads and not shared:
            raise ValueError(
                "QKClip: keys that serve several heads must be shared_keys; got "
                f"{heads} heads, {kv_heads} kv_heads"
            )
        _check_heads(q.size, k.size, heads, kv_heads)
        name = f"attention{len(self._layers)}" if name is None else name
        first = len(self._running)
        layer = _Layer(name, q, k, shared, first, first + heads)
        self._check_new(layer)
        device = q.tensors()[0].device
        self._layers.append(layer)
        self._running = torch.cat([self._running.to(device), _lowest(heads, device)])
        self._last = torch.cat([self._last.to(device), _lowest(heads, device)])
        none = torch.zeros(heads, dtype=torch.int64, device=device)
        self._clips = torch.cat([self._clips.to(device), none])
        self._nonfinite = torch.cat([self._nonfinite.to(device), none])
        return partial(self._report, layer)

    def _check_new(self, layer: _Layer) -> None:
        if layer.name in [known.name for known in self._layers]:
            raise ValueError(f"QKClip: name must be new; got {layer.name!r} again")
        taken = [(known.name, span) for known in self._layers for span in _written(known)]
        for span in _written(layer):
            for name, other in taken:
                if span[0] is other[0] and span[1] < other[2] and other[1] < span[2]:
                    raise ValueError(
                        f"QKClip: rows must be watched once; got {layer.name!r} with rows of "
                        f"{name!r}: report both to one callable, or set shared_keys"
                    )
            taken.append((layer.name, span))

    def _report(self, layer: _Layer, max_logits: Tensor) -> None:
        heads = layer.stop - layer.first
        if max_logits.shape != (heads,):
            raise ValueError(
                f"QKClip: max_logits of {layer.name!r} must be of shape ({heads},); got "
                f"{tuple(max_logits.shape)}"
            )
        if max_logits.device != self._running.device:
            self._follow_parameters()
        with torch.no_grad():
            running = self._running[layer.first : layer.stop]
            logits = max_logits.detach().to(running.device, running.dtype, non_blocking=True)
            usable = logits < inf
            running.copy_(torch.maximum(running, torch.where(usable, logits, -inf)))
            self._nonfinite[layer.first : layer.stop].add_(~usable)

    def _follow_parameters(self) -> None:
        """Moves all entries to where the first layer is now, as after ``model.to(device)``."""
        device = self._layers[0].q.tensors()[0].device
        if self._running.device != device:
            for name in _ENTRIES:
                setattr(self, name, getattr(self, name).to(device))

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        """Clips all heads whose logits were too large since the last step, and starts anew.

        Call it after the optimizer's step, on every rank; ``attach`` does so.

        Args:
            found_inf: not zero if the optimizer's step was skipped, as set by ``GradScaler``.
                Nothing is clipped then, and the largest logits are kept, as the weights are the
                same.
        """
        if not self._layers:
            return
        self._follow_parameters()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._running, dist.ReduceOp.MAX, group=self._group)
        logits = self._running
        taken: Tensor = torch.ones((), dtype=torch.bool, device=logits.device)
        if found_inf is not None:
            taken = found_inf.to(logits.device, non_blocking=True) == 0
        clipped = (logits > self.threshold) & taken
        gamma = torch.where(clipped, self.threshold / logits, 1.0)
        self._scale(gamma, gamma.sqrt())
        self._clips.add_(clipped)
        self._last.copy_(torch.where(taken, logits, self._last))
        logits.masked_fill_(taken, -inf)

    def _scale(self, gamma: Tensor, root: Tensor) -> None:
        for layer in self._layers:
            heads = slice(layer.first, layer.stop)
            for tensor in layer.q.tensors():
                _scale_rows(tensor, layer.q, (gamma if layer.shared_keys else root)[heads])
            for tensor in [] if layer.shared_keys else layer.k.tensors():
                _scale_rows(tensor, layer.k, root[heads])

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Lets every step of ``optimizer`` end with ``step``, skipped where ``GradScaler`` skips.

        Args:
            optimizer: the one that steps the watched projections.

        Returns:
            A handle whose ``remove()`` ends this.
        """
        return optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step(getattr(optimizer, "found_inf", None))

    def reset(self) -> None:
        """Forgets what was reported since the last step."""
        self._running.fill_(-inf)

    @property
    def last(self) -> dict[str, Tensor]:
        """Largest logit per head at the last step, before clipping, by layer; -inf where nothing
        was reported. Views on the device: reading a number waits, holding the dict does not."""
        return self._by_layer(self._last)

    @property
    def clips(self) -> dict[str, Tensor]:
        """Number of steps that clipped each head, by layer; views on the device."""
        return self._by_layer(self._clips)

    @property
    def nonfinite(self) -> dict[str, Tensor]:
        """Number of reports of NaN or +inf for each head on this rank, by layer; views on the
        device."""
        return self._by_layer(self._nonfinite)

    @property
    def clipped_heads(self) -> Tensor:
        """Number of heads that the last step clipped; a tensor without dimensions."""
        return (self._last > self.threshold).sum()

    def _by_layer(self, entries: Tensor) -> dict[str, Tensor]:
        return {layer.name: entries[layer.first : layer.stop] for layer in self._layers}

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of the largest logits so far and all counts, and the layers' names."""
        heads = {layer.name: layer.stop - layer.first for layer in self._layers}
        return {"heads": heads} | {name[1:]: getattr(self, name).clone() for name in _ENTRIES}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what ``state_dict`` returned; the same layers must be watched.

        Raises:
            ValueError: names or head counts of the layers differ; nothing is loaded then.
        """
        own = self.state_dict()["heads"]
        if state_dict["heads"] != own or [*state_dict["heads"]] != [*own]:
            raise ValueError(
                f"QKClip: layers and heads must be those of the state, {state_dict['heads']}; "
                f"got {own}"
            )
        for name in _ENTRIES:
            getattr(self, name).copy_(state_dict[name[1:]])


_ENTRIES = ("_running", "_last", "_clips", "_nonfinite")


def _lowest(heads: int, device: torch.device) -> Tensor:
    return torch.full((heads,), -inf, dtype=torch.float32, device=device)


def _check_heads(q_rows: int, k_rows: int, heads: int, kv_heads: int) -> None:
    fits = heads > 0 and kv_heads > 0 and heads % kv_heads == 0
    if not fits or q_rows % heads or q_rows // heads * kv_heads != k_rows:
        raise ValueError(
            "QKClip: q and k must hold rows of one size per head, and heads be a multiple of "
            f"kv_heads; got {q_rows} rows for {heads} heads and {k_rows} for {kv_heads}"
        )


def _written(layer: _Layer) -> list[tuple[Tensor, int, int]]:
    parts = [layer.q] if layer.shared_keys else [layer.q, layer.k]
    return [(t, part.start, part.start + part.size) for part in parts for t in part.tensors()]


def _scale_rows(tensor: Tensor, rows: QKRows, per_head: Tensor) -> None:
    scale = per_head.to(tensor.device, non_blocking=True)
    scale = scale.repeat_interleave(rows.size // len(scale))
    scale = scale.view(-1, *[1] * (tensor.ndim - 1))
    if hasattr(tensor, "to_local"):
        tensor.mul_(_for_all_rows(tensor, rows, scale))
    else:
        tensor[rows.start : rows.start + rows.size].mul_(scale)


def _for_all_rows(tensor: Any, rows: QKRows, scale: Tensor) -> Tensor:
    """Returns one factor per row of a distributed tensor, from which each rank takes its own."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = scale.new_ones(tensor.shape[0], *scale.shape[1:])
    whole[rows.start : rows.start + rows.size] = scale
    mesh = tensor.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
