"""``Muon``: momentum whose updates are orthogonalised, for the hidden matrices of a model."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trm_fast.ops import Settings
from trm_fast.ops._newton_schulz_sets import KELLER
from trm_fast.optim._adaptive import AdaptiveOptimizer
from trm_fast.optim._muon_step import RATIOS, Descent, MuonPlan, Orthogonaliser, Shape, block_rows
from trm_fast.optim._plan import Options, StepSpec
from trm_fast.optim._states import Group, Keys
from trm_fast.optim.grokfast_sgd import check_momentum
from trm_fast.optim.options import StepOptions, Unpack, split, with_options

Coefficients = str | Sequence[float] | Sequence[Sequence[float]]


class Muon(AdaptiveOptimizer):
    """Momentum with orthogonalised updates (Jordan et al. 2024); drop-in for ``torch.optim.Muon``.

        g   <- filter(grad)                                 none by default
        buf <- buf + (1 - momentum) * (g - buf)
        u   <- g + momentum * (buf - g) if nesterov else buf
        O   <- newton_schulz(u)                             trm_fast/ops/newton_schulz.py
        p   <- p * (1 - lr * weight_decay) - lr * ratio * O

    For weights of hidden linear layers and convolutions. Embeddings, output and halting heads,
    norms and biases belong to another optimizer: ``MuGrokfast`` has both, and ``split_params``
    tells them apart. The ratio depends on the rows A and columns B of the orthogonalised matrix:

        "original"           sqrt(max(1, A / B))            torch, KellerJordan/Muon
        "match_rms_adamw"    0.2 * sqrt(max(A, B))          Liu et al. 2025, arXiv:2502.16982
        "spectral"           sqrt(A / B)                    microsoft/dion

    A parameter of more than two dimensions is the matrix [first, all others]; with ``batch_dims=k``
    its first k dimensions count matrices (experts). Fused weights are orthogonalised by blocks of
    rows: a split is a choice of algorithm, so it is an option of the group and part of its state.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``; every option below
            may differ between groups, and be changed between steps.
        lr: learning rate, >= 0; a tensor of one element is read on its device.
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        momentum: decay per step of the momentum, in [0, 1).
        nesterov: looks ahead by one step of the momentum.
        ns_coefficients: name of a set for ``newton_schulz``, or its numbers; the default, torch's,
            is "keller".
        eps: least norm that an update is divided by, > 0.
        ns_steps: number of Newton-Schulz steps, >= 1.
        adjust_lr_fn: "original", "match_rms_adamw" or "spectral"; None is "original".
        row_splits: number of equal blocks of rows (2: gate and up; 3: q, k and v; heads), or the
            rows of each block, as (512, 128, 128) of a fused projection with shared keys.
        batch_dims: leading dimensions that count matrices.
        ns_method, ns_dtype: method and dtype of the products of ``newton_schulz``; the dtype None
            is float32, or float64 for float64 parameters.
        filter: gradient filter in front, as in ``GrokFastAdamW``; by default there is none.
        options: those of ``trm_fast.optim.StepOptions``; the momentum is the state
            "momentum_buffer".

    Raises:
        ValueError: an option is out of range or not finite, a filter unknown, or a parameter has
            fewer than two dimensions or rows that ``row_splits`` does not divide.
        TypeError: a parameter is complex, or an option unknown or no number.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
        >>> optimizer = trm_fast.Muon(hidden, lr=0.02, momentum=0.95)
    """

    _more_defaults: Mapping[str, Any] = MappingProxyType({})  # options that a subclass adds

    @with_options(StepOptions)
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = KELLER,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        row_splits: int | Sequence[int] = 1,
        batch_dims: int = 0,
        ns_method: str = "auto",
        ns_dtype: torch.dtype | None = torch.bfloat16,
        filter: str | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "row_splits": row_splits,
            "batch_dims": batch_dims,
            "ns_method": ns_method,
            "ns_dtype": ns_dtype,
            "filter": filter,
            "differentiable": False,
        }
        defaults.update(self._more_defaults)
        of_groups, whole = split(options)
        super().__init__(params, defaults | of_groups, **whole)

    def _orthogonalises(self, group: Group) -> bool:
        """Returns whether the parameters of a group are hidden matrices."""
        return True

    def _moments_of(self, group: Group) -> Keys:
        if not self._orthogonalises(group):
            return super()._moments_of(group)
        return {"exp_avg": "momentum_buffer"}

    def _settings(self, group: Group) -> Settings:
        return Settings(
            0.0,
            check_momentum(type(self).__name__, group["momentum"]),
            rule="momentum",
            nesterov=bool(group["nesterov"]),
            **self._filter_settings(group),
        )

    def _check_param(self, param: Tensor, group: Group) -> None:
        super()._check_param(param, group)
        if not self._orthogonalises(group):
            return
        name, label = type(self).__name__, _label(param, group)
        if not param.is_floating_point():
            raise TypeError(f"{name}: {label} must be real and floating; got {param.dtype}")
        block_rows(param, shape_of(name, group), label)

    def _options(self, group: Group) -> Options:
        settings, spec, _ = options = super()._options(group)
        if not self._orthogonalises(group):
            return options
        orthogonaliser = self._orthogonaliser(group)
        orthogonaliser([])  # has its options checked
        matrices = (shape_of(type(self).__name__, group), orthogonaliser)
        spec = StepSpec(spec.keys, spec.needed, spec.backend, MuonPlan, matrices)
        return Options(settings, spec, Descent(self._descent(group)))

    def _orthogonaliser(self, group: Group) -> Orthogonaliser:
        return Orthogonaliser(
            group["ns_steps"],
            group["ns_coefficients"],
            group["ns_method"],
            group["ns_dtype"],
            group["eps"],
            self._named_backend(group),
        )

    def _descent(self, group: Group) -> Settings:
        """Returns the settings of the second half of a step."""
        return Settings(
            group["lr"],
            weight_decay=group["weight_decay"],
            rule="sgd",
            weight_ema=0.0 if group["weight_ema"] is None else group["weight_ema"],
            owner=type(self).__name__,
        )


def shape_of(owner: str, group: Group) -> Shape:
    """Returns how matrices lie in the parameters of a group; checks the options that say so."""
    splits, batch_dims, ratio = group["row_splits"], group["batch_dims"], group["adjust_lr_fn"]
    ratio = "original" if ratio is None else ratio
    if ratio not in RATIOS:
        raise ValueError(
            f"{owner}: adjust_lr_fn must be one of {', '.join(RATIOS)} or None; got {ratio!r}"
        )
    sizes = tuple(splits) if isinstance(splits, Sequence) else (splits,)
    if not sizes or not all(_is_count(size) and size > 0 for size in sizes):
        raise ValueError(
            f"{owner}: row_splits must be a number of blocks or the rows of each, >= 1; got "
            f"{splits!r}"
        )
    if not _is_count(batch_dims):
        raise ValueError(f"{owner}: batch_dims must be an int >= 0; got {batch_dims!r}")
    return Shape(splits if isinstance(splits, int) else sizes, batch_dims, ratio, owner)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _label(param: Tensor, group: Group) -> str:
    """Returns what an error calls a parameter."""
    for name, other in zip(group.get("param_names", ()), group["params"], strict=False):
        if other is param:
            return f"parameter {name!r}"
    return "a parameter"
