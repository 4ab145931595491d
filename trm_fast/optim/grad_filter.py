"""``GradFilter``: the gradient filters in front of any optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from trm_fast.ops import Settings
from trm_fast.optim._adaptive import AdaptiveOptimizer
from trm_fast.optim._closure import check_closure, evaluate, step_without
from trm_fast.optim._plan import FilterPlan, Options, StepSpec
from trm_fast.optim._states import Group, Keys, State
from trm_fast.optim.options import FILTER_OPTIONS, FilterOptions, Unpack, with_options

_OPTIONS = ("filter", *FILTER_OPTIONS)

_INSIDE = "GradFilter: the optimizer inside"
_REMEDY = "Filter in its closure: GradFilter(params).apply_() after backward()"


class GradFilter(AdaptiveOptimizer):
    """Passes gradients through a filter (GrokFast and its relatives) on their way to an optimizer.

    Around an optimizer it is an optimizer itself, for schedulers, ``GradScaler`` and hooks, with
    the parameter groups of the one inside; ``p.grad`` is what it was before the step. Around
    parameters it has no optimizer: ``apply_`` filters the gradients where they are, before whatever
    uses them. Where ``GrokFastAdamW``, ``GrokFastSGD``, ``AdamATan2`` or ``Muon`` will do, they are
    faster, because they filter while they step.

    Args:
        target: an optimizer of ``torch.optim`` or like it, or parameters, named parameters or
            groups.
        filter: as in ``GrokFastAdamW``; may differ between groups and be changed between steps.
        backend: "reference", "cpp", "cuda" or "triton" must run; None takes the first usable one.
        state_dtype: torch.bfloat16, or a mapping from "grok_exp_avg" and "grok_ring" to a dtype.
        clip_norm: scales all gradients down to this norm before the filter, as in
            ``trm_fast.optim.StepOptions``.
        options: those of ``trm_fast.optim.FilterOptions``. In the groups of an optimizer that has
            an ``alpha`` of its own, as RMSprop, that of the filter is called "filter_alpha".

    Raises:
        ValueError: an option is out of range or not finite, a filter unknown, or the optimizer
            inside has a filter of its own, is differentiable or cannot step without a closure.
        TypeError: an option is unknown, or no number.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> optimizer = trm_fast.GradFilter(torch.optim.RMSprop(model.parameters()), lamb=2.0)
        >>> filter = trm_fast.GradFilter(model.parameters(), filter="ma", window=100, lamb=5.0)
        >>> loss.backward()
        >>> filter.apply_()
    """

    @with_options(FilterOptions)
    def __init__(
        self,
        target: Any,
        filter: str | None = "ema",
        *,
        backend: str | None = None,
        state_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        clip_norm: float | None = None,
        **options: Unpack[FilterOptions],
    ) -> None:
        self.optimizer = target if isinstance(target, Optimizer) else None
        if self.optimizer is not None:
            check_closure(_INSIDE, self.optimizer, _REMEDY)
        inside = {} if self.optimizer is None else self.optimizer.defaults
        shared = [name for name in _OPTIONS if name in inside and name != "alpha"]
        if shared:
            raise ValueError(
                f"GradFilter: the optimizer inside must not have a filter of its own; got "
                f"{type(target).__name__} with the options {', '.join(shared)}: set those instead"
            )
        if inside.get("differentiable"):
            raise ValueError(
                "GradFilter: the optimizer inside must not be differentiable, as autograd does not "
                f"see the filter; got {type(target).__name__} with differentiable=True"
            )
        defaults: Group = {"filter": filter, **options}
        if "alpha" in inside:
            defaults["filter_alpha"] = defaults.pop("alpha")
        flags = {"differentiable": False, "foreach": None, "fused": None}
        if self.optimizer is None:
            super().__init__(target, defaults | flags, backend, state_dtype, clip_norm)
        else:
            groups = [dict(group) for group in self.optimizer.param_groups]
            # Schedulers look for momentum among the defaults.
            super().__init__(groups, flags | inside | defaults, backend, state_dtype, clip_norm)
            self._share_groups()

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        # Without it the scaler unscales and skips by itself, before the filter sees anything.
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def _share_groups(self) -> None:
        """Lets both optimizers have the same groups, so that a scheduler of one moves both."""
        if self.optimizer is None:
            return
        for inner, ours in zip(self.optimizer.param_groups, self.param_groups, strict=True):
            for name in (*_OPTIONS, "filter_alpha"):
                if name in self.defaults:
                    inner.setdefault(name, ours.get(name, self.defaults[name]))
        self.param_groups = self.optimizer.param_groups

    def _settings(self, group: Group) -> Settings:
        # Direction and average are those of the optimizer inside.
        alpha = group.get("filter_alpha", group["alpha"])
        options = {**group, "alpha": alpha, "maximize": False, "weight_ema": None}
        return Settings(0.0, rule="filter", **self._filter_settings(options))

    def _options(self, group: Group) -> Options:
        settings, spec, _ = super()._options(group)
        return Options(settings, StepSpec(spec.keys, spec.needed, spec.backend, FilterPlan))

    def _state_keys(self, group: Group) -> Keys:
        return super()._state_keys({**group, "weight_ema": None})

    def _moments_of(self, group: Group) -> Keys:
        return {}

    def _check_param(self, param: Tensor, group: Group) -> None:
        pass

    def _named_backend(self, group: Group) -> str | None:
        return self._backend

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to the filter and to the optimizer inside, as ``torch.optim`` does."""
        inner = self.optimizer
        if inner is None or self.param_groups is not inner.param_groups:  # still under construction
            super().add_param_group(param_group)
            return
        inner.add_param_group(param_group)  # completes the group; taken back until it is checked
        super().add_param_group(inner.param_groups.pop())

    # torch.compile leaves it to Python; torch.compiler.disable would import the compiler for all.
    @_disable_dynamo
    def _filtered(self) -> list[tuple[Tensor, Tensor]]:
        """Returns parameters with the gradient that the filter makes of theirs."""
        pairs: list[tuple[Tensor, Tensor]] = []
        # Groups may have been added or loaded in the optimizer inside alone.
        self._share_groups()
        with torch.no_grad():
            for step in self._ready_steps():
                step()
                pairs.extend(step.plan.results())  # type: ignore[union-attr]
        return pairs

    @torch.no_grad()
    def apply_(self, found_inf: Tensor | None = None) -> None:
        """Replaces the value of each gradient by the filtered one, in place.

        Args:
            found_inf: a tensor of one element; where it is not zero neither gradients nor filter
                change, without a host sync. One infinite gradient would stay in the filter.

        Raises:
            RuntimeError, ValueError, TypeError, BackendError: as ``step``.
        """
        self.found_inf = found_inf
        try:
            pairs = self._filtered()
        finally:
            del self.found_inf
        for param, filtered in pairs:
            grad: Tensor = param.grad  # type: ignore[assignment]
            if found_inf is not None:
                fine = found_inf.reshape(()).to(grad.device) == 0
                filtered = torch.where(fine, filtered, grad)
            grad.copy_(filtered)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the optimizer inside along the filtered gradients.

        Args:
            closure: evaluates the model, with gradients enabled, and returns the loss; called once.

        Returns:
            The loss of ``closure``, or None.

        Raises:
            RuntimeError: there is no optimizer inside, or a gradient is sparse.
            ValueError, TypeError, BackendError: as ``GrokFastAdamW.step``.
        """
        if self.optimizer is None:
            raise RuntimeError(
                "GradFilter: step needs an optimizer inside; got parameters alone: call apply_(), "
                "or give it an optimizer in place of parameters"
            )
        loss = evaluate(closure)
        self._filtered_step(self.optimizer)
        return loss

    # Compiled, the optimizer inside would read the gradients that were there before: torch 2.11
    # looks at those of the tensors, not at what the frame that it compiles has put in their place.
    @_disable_dynamo
    def _filtered_step(self, optimizer: Optimizer) -> None:
        pairs = self._filtered()
        grads = [param.grad for param, _ in pairs]
        try:
            for param, filtered in pairs:
                param.grad = filtered
            self._step_inside(optimizer)
        finally:
            for (param, _), grad in zip(pairs, grads, strict=True):
                param.grad = grad

    def _step_inside(self, optimizer: Optimizer) -> None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            step_without(_INSIDE, optimizer, _REMEDY)
            return
        # The gradients it gets are unscaled.
        optimizer.found_inf, optimizer.grad_scale = found_inf, None  # type: ignore[attr-defined]
        try:
            step_without(_INSIDE, optimizer, _REMEDY)
        finally:
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the filter in the layout of ``torch.optim``, and that of the
        optimizer inside under the key "optimizer"."""
        state = super().state_dict()
        return (
            state if self.optimizer is None else state | {"optimizer": self.optimizer.state_dict()}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` returned; states keep their own dtypes.

        Args:
            state_dict: the dict.

        Raises:
            ValueError: groups do not match, or the dict has an optimizer where there is none here,
                or none where there is one; nothing is loaded then.
        """
        inner = state_dict.get("optimizer")
        if (inner is None) != (self.optimizer is None):
            wanted = "no optimizer" if self.optimizer is None else "the state of an optimizer"
            raise ValueError(
                f"GradFilter: state_dict must hold {wanted}; got the keys {sorted(state_dict)}"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "optimizer"})
        if self.optimizer is not None and inner is not None:
            try:
                self.optimizer.load_state_dict(inner)
            finally:
                self._share_groups()

    def __getstate__(self) -> State:
        return super().__getstate__() | {"optimizer": self.optimizer}

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("optimizer", None)
