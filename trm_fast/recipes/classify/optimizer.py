"""The gradient filter as a wrapper of an optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trm_fast.ops import filter_sums
from trm_fast.optim import GradFilter, GrokFastAdamW

State = dict[str, Any]


class GrokFastOptimizer(Optimizer):
    """Passes gradients through a filter on their way to an optimizer; ``p.grad`` is only read.

        highpass:   mean <- alpha mean + (1 - alpha) grad,    grad' = grad + lambda (grad - mean)

    with the mean starting at the first gradient, so that the first step is not filtered. This
    ``highpass`` is not GrokFast but its opposite: a constant gradient passes with gain 1, an
    alternating one with up to 1 + lambda (1 - (1 - alpha) / (1 + alpha)), 1.099 with the defaults,
    so that it damps nothing and amplifies noise. ``ema``, ``grad + lambda mean``, is the published
    filter, with gains 3.0 and 1.02 at lambda = 2.

    Around ``torch.optim.AdamW`` (without amsgrad and hooks), and without ``base_optimizer``, filter
    and update of all tensors are one call of ``trm_fast.GrokFastAdamW``; around anything else they
    are those of ``trm_fast.GradFilter``. Groups and states are shared with the base, for schedulers
    of either. A step with a gradient that is not finite, or of which a square overflows, changes
    nothing.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``; with
            ``base_optimizer`` those that it has.
        base_optimizer: the optimizer inside; None is AdamW with ``lr`` and ``weight_decay``.
        lr: learning rate of that AdamW, >= 0.
        alpha: decay per step of the mean, in [0, 1].
        lambda_: strength of the filter, >= 0.
        weight_decay: of that AdamW, >= 0.
        filter: as in ``trm_fast.GrokFastAdamW``, or None.

    Raises:
        ValueError: an option is out of range or unknown, or ``params`` are not those of the base.
        TypeError: ``base_optimizer`` is not an optimizer.

    Example:
        >>> optimizer = GrokFastOptimizer(model.parameters(), filter="ema", lambda_=2.0)
        >>> optimizer = GrokFastOptimizer(model.parameters(), torch.optim.SGD(model.parameters()))
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer | None = None,
        lr: float = 1e-3,
        alpha: float = 0.98,
        lambda_: float = 0.1,
        weight_decay: float = 0.01,
        filter: str | None = "highpass",
    ) -> None:
        options: State = {"filter": filter, "alpha": alpha, "lamb": lambda_}
        inner: GrokFastAdamW | GradFilter
        if base_optimizer is None:
            inner = GrokFastAdamW(params, lr, weight_decay=weight_decay, **options)
        else:
            _check_base(base_optimizer, params)
            inner = _around(base_optimizer, options)
        # For schedulers, scalers and hooks; groups and state are those of the optimizer inside.
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.base = inner, base_optimizer
        self._share()

    def _share(self) -> None:
        """Lets a base that does not step itself have groups and state of the one that does."""
        if self.base is not None and self._is_fused:
            self.base.param_groups, self.base.state = self.inner.param_groups, self.inner.state

    @property
    def param_groups(self) -> list[State]:
        """Groups of the optimizer inside."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[State]) -> None:
        if "inner" in self.__dict__:  # else still under construction, as below
            self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """States of the filter, and of the optimizer where both are one."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        if "inner" in self.__dict__:
            self.inner.state = state

    @property
    def _is_fused(self) -> bool:
        return isinstance(self.inner, GrokFastAdamW)

    @property
    def _alpha_key(self) -> str:
        # RMSprop and others have an alpha of their own.
        return "filter_alpha" if "filter_alpha" in self.inner.defaults else "alpha"

    @property
    def alpha(self) -> float:
        """Decay of the mean, of the first group."""
        return self.param_groups[0][self._alpha_key]  # type: ignore[no-any-return]

    @property
    def lambda_(self) -> float:
        """Strength of the filter, of the first group."""
        return self.param_groups[0]["lamb"]  # type: ignore[no-any-return]

    @property
    def filter(self) -> str | None:
        """Name of the filter, of the first group."""
        return self.param_groups[0]["filter"]  # type: ignore[no-any-return]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.inner._step_supports_amp_scaling

    def add_param_group(self, param_group: State) -> None:
        """Adds a group, as ``torch.optim`` does."""
        if "inner" in self.__dict__:
            self.inner.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Filters the gradients and takes a step along them.

        Args:
            closure: evaluates the model, with gradients enabled, and returns the loss; called once.

        Returns:
            The loss of ``closure``, or None.

        Raises:
            RuntimeError, ValueError, TypeError, BackendError: as ``GrokFastAdamW.step``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        found_inf, grad_scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        if found_inf is None:
            found_inf = self._not_finite()
            if not self._step_supports_amp_scaling:
                # The optimizer inside knows no flag, so that the host has to look.
                if found_inf is not None and found_inf.item():
                    return loss
                found_inf = None
        self._step_inside(found_inf, grad_scale)
        return loss

    def _step_inside(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        inner: Any = self.inner
        if found_inf is None:
            inner.step()
            return
        inner.found_inf, inner.grad_scale = found_inf, grad_scale
        try:
            inner.step()
        finally:
            del inner.found_inf, inner.grad_scale

    @torch.no_grad()
    def _not_finite(self) -> Tensor | None:
        """Returns 1.0 if the square of a gradient is not finite, else 0.0, on the device."""
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params if param.grad is not None]
        devices = list(dict.fromkeys(grad.device for grad in grads))
        sums = [filter_sums([g for g in grads if g.device == device]) for device in devices]
        if not sums:
            return None
        total = torch.stack([part[:, 1].sum().to(devices[0]) for part in sums]).sum()
        return (~total.isfinite()).float()

    def state_dict(self) -> State:
        """Returns what ``load_state_dict`` takes: "optimizer", the state dict of the optimizer
        inside; "grad_ema", by index of the parameter the tensors of the filter; "alpha", "lambda"
        and "filter"."""
        state = self.inner.state_dict()
        filters = {
            index: {name: value for name, value in own.items() if name.startswith("grok_")}
            for index, own in state["state"].items()
        }
        if self._is_fused:
            rest = {
                index: {name: value for name, value in own.items() if not name.startswith("grok_")}
                for index, own in state["state"].items()
            }
            inside = {"state": rest, "param_groups": state["param_groups"]}
        else:
            inside = state["optimizer"]
        return {
            "optimizer": inside,
            "grad_ema": filters,
            "alpha": self.alpha,
            "lambda": self.lambda_,
            "filter": self.filter,
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Loads what ``state_dict`` returned; states keep their own dtypes.

        Args:
            state_dict: the dict.

        Raises:
            ValueError: a key is missing or unknown, or groups or states do not fit.
        """
        wanted = {"optimizer", "grad_ema", "alpha", "lambda", "filter"}
        if state_dict.keys() != wanted:
            raise ValueError(
                f"GrokFastOptimizer: state_dict must have the keys {', '.join(sorted(wanted))}; "
                f"got {', '.join(sorted(map(str, state_dict)))}"
            )
        inside, filters = state_dict["optimizer"], state_dict["grad_ema"]
        options = {
            "filter": state_dict["filter"],
            self._alpha_key: state_dict["alpha"],
            "lamb": state_dict["lambda"],
        }
        groups = [{**group, **options} for group in inside["param_groups"]]
        if self._is_fused:
            state = {
                index: {**inside["state"].get(index, {}), **filters.get(index, {})}
                for index in {**inside["state"], **filters}
            }
            self.inner.load_state_dict({"state": state, "param_groups": groups})
        else:
            # The filter refuses amsgrad, which only the optimizer inside knows.
            own = [{k: v for k, v in group.items() if k != "amsgrad"} for group in groups]
            loaded = {"state": filters, "param_groups": own}
            self.inner.load_state_dict({**loaded, "optimizer": {**inside, "param_groups": groups}})
        self._share()

    def __getstate__(self) -> State:
        return {"defaults": self.defaults, "inner": self.inner, "base": self.base}


def _check_base(base: Optimizer, params: Any) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(
            "GrokFastOptimizer: base_optimizer must be a torch.optim.Optimizer or None; got "
            f"{type(base).__name__}"
        )
    held = {id(param) for group in base.param_groups for param in group["params"]}
    given = {id(param) for param in _flat(params)}
    if given != held:
        raise ValueError(
            f"GrokFastOptimizer: params must be the {len(held)} of base_optimizer; got "
            f"{len(given)}, {len(given & held)} of them the same"
        )


def _flat(params: Any) -> Iterable[Tensor]:
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            yield from _flat(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def _around(base: Optimizer, options: State) -> GrokFastAdamW | GradFilter:
    """Returns the optimizer that filters for ``base``."""
    hooked = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
    amsgrad = any(group.get("amsgrad") for group in base.param_groups)
    if type(base) is not torch.optim.AdamW or hooked or amsgrad:
        return GradFilter(base, **options)
    inner = GrokFastAdamW([dict(group) for group in base.param_groups], **options)
    if base.state:
        groups = [{**group, **options} for group in base.state_dict()["param_groups"]]
        inner.load_state_dict({**base.state_dict(), "param_groups": groups})
    return inner
