"""What every optimizer on ``ops.adaptive_step`` shares: its step, its states, saving, loading."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trm_fast._dispatch import check_name
from trm_fast.ops import FILTERS, Settings
from trm_fast.optim._closure import evaluate
from trm_fast.optim._local import is_plain
from trm_fast.optim._plan import CompiledStep, GroupStep, Options, Plan, StepSpec
from trm_fast.optim._saved_options import loaded_group, saved_group
from trm_fast.optim._states import (
    MEAN_KEYS,
    WINDOW_KEYS,
    Group,
    Keys,
    State,
    StateKeeper,
    check_loaded,
    check_state_dtypes,
    is_capturing,
    parts,
)
from trm_fast.optim._statistics import FilterStatistics, statistics_of
from trm_fast.optim._step_cache import StepCache, check_grad
from trm_fast.optim.options import FILTER_OPTIONS, WHOLE


class AdaptiveOptimizer(Optimizer):
    """Base of the optimizers that differ only in the settings of one ``adaptive_step_`` per
    parameter group.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``.
        defaults: options of the groups; "filter", "differentiable" and those of
            ``options.StepOptions`` among them.
        backend: implementation that must run, or None.
        state_dtype: torch.float32, torch.bfloat16, or a mapping from names of states to these; None
            means float32.
        clip_norm: largest Euclidean norm of all gradients together, or None.
    """

    # GradScaler then leaves unscaling and skipping to step(), which needs no host sync for either.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: Group,
        backend: str | None,
        state_dtype: torch.dtype | Mapping[str, torch.dtype] | None,
        clip_norm: float | None = None,
    ) -> None:
        name = type(self).__name__
        _check_flags(name, defaults, backend)
        self._backend = None if backend is None else check_name(backend)
        self._state_dtypes = check_state_dtypes(name, state_dtype)
        self.clip_norm = clip_norm
        self._loaded: dict[str, Any] | None = None  # while a state dict is being loaded
        self._start_anew()
        _check_clip_norm(name, clip_norm, defaults["differentiable"])
        super().__init__(params, defaults)

    def _start_anew(self) -> None:
        """Creates what no copy and no state dict takes along."""
        name = type(self).__name__
        self._keeper = StateKeeper(name, self._state_dtypes)
        self._cache = StepCache(self._keeper, name)
        # In a dict, because torch.compile drops attribute writes made inside the graph.
        self._norm: dict[str, Tensor | None] = {"found": None}

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients that the last step with ``clip_norm`` has found."""
        return self._norm["found"]

    def _settings(self, group: Group) -> Settings:
        """Returns the settings of one step of ``group``; checks its options."""
        raise TypeError(f"{type(self).__name__} does not say how its options become settings")

    def _filter_settings(self, group: Group) -> dict[str, Any]:
        """Returns the settings that all optimizers take from their options alike."""
        name, filter, weight_ema = type(self).__name__, group["filter"], group["weight_ema"]
        if filter not in (*FILTERS, None) or filter == "none":
            known = ", ".join(repr(known) for known in FILTERS if known != "none")
            raise ValueError(f"{name}: filter must be {known} or None; got {filter!r}")
        window = group["window"]
        if not isinstance(window, int) or isinstance(window, bool):
            raise TypeError(f"{name}: window must be an int; got {window!r}")
        if window < 1:
            raise ValueError(f"{name}: window must be >= 1; got {window!r}")
        numbers = {option: group[option] for option in FILTER_OPTIONS if option != "window"}
        return numbers | {
            "filter": "none" if filter is None else filter,
            "lamb": group["lamb"] if filter is not None else 0.0,
            "warmup": _checked_flag(f"{name}: warmup", group["warmup"]),
            "maximize": _checked_flag(f"{name}: maximize", group["maximize"]),
            "weight_ema": 0.0 if weight_ema is None else weight_ema,
            "owner": name,
        }

    def _moments_of(self, group: Group) -> Keys:
        return {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

    def _state_keys(self, group: Group) -> Keys:
        """Returns the state behind each argument of the op."""
        keys = {**self._moments_of(group), "step": "step"}
        if group["filter"] is not None:
            keys |= WINDOW_KEYS if group["filter"] == "ma" else MEAN_KEYS
        return keys | ({} if group["weight_ema"] is None else {"weight_ema": "weight_ema"})

    def _options(self, group: Group) -> Options:
        """Returns what the options of ``group`` say; checks them."""
        settings, keys = self._settings(group), self._state_keys(group)
        if group["filter"] == "ma":
            # A step with a plan reads the window off the ring.
            self._keeper.check_windows(self.state, group)
        # A lamb of 0 needs no filter state; one that exists goes on.
        filtering = isinstance(settings.lamb, Tensor) or settings.lamb != 0
        needed = (key for slot, key in keys.items() if filtering or not slot.startswith("grok"))
        return Options(settings, StepSpec(keys, tuple(needed), self._named_backend(group), Plan))

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as ``torch.optim`` does, and creates the state of its trainable parameters.

        Raises:
            ValueError, TypeError, RuntimeError: an option or a parameter is not supported; no group
                is added.
        """
        whole = [name for name in WHOLE if name in param_group]
        if whole:
            # Optimizers of a part of the parameters hand their options over in groups.
            remedy = (
                ". Under ZeroRedundancyOptimizer, where each process has a part of the norm, call "
                "torch.nn.utils.clip_grad_norm_ before the step"
            )
            remedy = remedy if whole[0] == "clip_norm" else ""
            raise ValueError(
                f"{type(self).__name__}: {whole[0]} must be an argument of the optimizer, as it "
                f"holds for all groups; got it in a group{remedy}"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            needed = self._options(group).spec.needed
            for param in group["params"]:
                self._check_param(param, group)
        except BaseException:
            self.param_groups.pop()
            raise
        # Not at the first step: checkpoint tools would invent gradients for one to learn the keys.
        for param in group["params"]:
            if param.requires_grad:
                self._keeper.complete(self.state, param, needed, group["window"])

    def _check_param(self, param: Tensor, group: Group) -> None:
        """Raises for a parameter that the optimizer cannot step."""
        on_device = param.is_floating_point() and param.device.type in ("cpu", "cuda")
        if group["fused"] and not on_device:
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors "
                f"on cpu or cuda; got {param.dtype} on {param.device.type}"
            )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step in place; gradients are only read.

        Args:
            closure: evaluates the model, with gradients enabled, and returns the loss.

        Returns:
            The loss of ``closure``, or None.

        Raises:
            RuntimeError: a gradient is sparse, or a CUDA graph is captured without ``capturable``
                or without gradients.
            ValueError, TypeError: an option or a tensor was changed to something that cannot be
                stepped.
            BackendError: the named backend cannot run the call.
        """
        loss = evaluate(closure)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for step in self._ready_steps():
                step()
        return loss

    def _ready_steps(self) -> list[GroupStep | CompiledStep]:
        """Returns the steps of all groups, of which none is taken before every one is checked."""
        if not torch.compiler.is_compiling():
            self._cache.forget_replaced_states(self.state.values())
        found = [self._group_step(i, group) for i, group in enumerate(self.param_groups)]
        steps = [step for step in found if step is not None]
        sums = self._measure(steps)
        if self.clip_norm is not None:
            self._require_all_gradients()
            self._clip(steps, sums)
        return steps

    def _require_all_gradients(self) -> None:
        """Refuses to clip where each parameter has an optimizer that steps inside of backward."""
        params = self.param_groups[0]["params"]
        if params and hasattr(params[0], "_in_backward_optimizers"):
            raise ValueError(
                f"{type(self).__name__}: clip_norm must be None for an optimizer that steps inside "
                f"of backward, which sees the gradient of one parameter; got {self.clip_norm!r}"
            )

    def _group_step(self, index: int, group: Group) -> GroupStep | CompiledStep | None:
        """Returns the step of one group, checked; None if it has no gradients."""
        params, grads = group["params"], [param.grad for param in group["params"]]
        if type(None) in map(type, grads):
            params = [param for param in params if param.grad is not None]
            grads = [grad for grad in grads if grad is not None]
        compiling = torch.compiler.is_compiling()
        options = (
            self._options(group) if compiling else self._cache.options(index, group, self._options)
        )
        options.settings.scale("grad_scale", getattr(self, "grad_scale", None))
        options.settings.scale("found_inf", getattr(self, "found_inf", None))
        options.settings.scale("clip", None)  # that of the last step
        if compiling:
            return self._compiled_step(group, options, params, grads)
        if is_capturing():
            _check_capture(type(self).__name__, group)
        if not params:
            return None
        return self._cache.step(index, group["window"], options, params, grads, self.state)

    def _compiled_step(
        self, group: Group, options: Options, params: list[Tensor], grads: list[Tensor]
    ) -> CompiledStep:
        """Returns the step through the dispatcher, where the compiler sees what it writes."""
        name = type(self).__name__
        for param, grad in zip(params, grads, strict=True):
            check_grad(name, param, grad)
            if not is_plain(param):
                raise TypeError(
                    f"{name}: parameters of a compiled step must be plain real tensors; got "
                    f"{type(param).__name__} {param.dtype}: leave step() uncompiled"
                )
        needed, window = options.spec.needed, group["window"]
        states = [self._keeper.complete(self.state, p, needed, window) for p in params]
        return options.spec.plan.compiled(options, params, grads, states)

    def _measure(self, steps: list[GroupStep | CompiledStep]) -> list[Tensor]:
        """Returns the sums that a filter or the clipping needs."""
        clipping = self.clip_norm is not None
        if not clipping and not any(step.settings.reduces for step in steps):
            return []
        wanted = [step.measure() for step in steps if clipping or step.settings.reduces]
        return list(chain.from_iterable(wanted))

    def _clip(self, steps: list[GroupStep | CompiledStep], measured: list[Tensor]) -> None:
        """Lets every group scale its gradients down to the norm that is allowed."""
        largest = _check_clip_norm(
            type(self).__name__, self.clip_norm, self.defaults["differentiable"]
        )
        self._norm["found"] = None
        if largest is None or not measured:
            return
        device = measured[0].device
        squares = [sums[:, 1].sum().to(device) for sums in measured]
        norm = torch.stack(squares).sum().sqrt() if len(squares) > 1 else squares[0].sqrt()
        scale = steps[0].settings.grad_scale
        if scale is not None:
            norm = norm / scale.to(device)
        self._norm["found"] = norm.float()
        # The small number is that of torch.nn.utils.clip_grad_norm_.
        clip = (largest / (norm + 1e-6)).clamp(max=1.0).float()
        for step in steps:
            step.settings.scale("clip", clip)

    def _named_backend(self, group: Group) -> str | None:
        one_by_one = group["differentiable"] or group["fused"] is False
        return self._backend or ("reference" if one_by_one else None)

    @torch.no_grad()
    def statistics(self) -> list[FilterStatistics]:
        """Returns what the filters see, for controllers and logs; call it between ``step`` and
        ``zero_grad``. Costs one pass over gradients and means; nothing waits for a GPU until a
        number is read.

        Returns:
            One entry for each group and device, over the parameters with a gradient and a mean.
        """
        found = []
        for group in self.param_groups:
            mean = self._state_keys(group).get("grok_exp_avg", "")
            params = [
                param
                for param in group["params"]
                if param.grad is not None and mean in self.state.get(param, ())
            ]
            states = [self.state[param] for param in params]
            sign = -1.0 if self._settings(group).maximize else 1.0
            for part in parts({"grok_exp_avg": mean}, params, states):
                found.append(statistics_of([params[i] for i in part], self.state, mean, sign))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns states and options, as ``torch.optim``.

        Options hold what checkpoint tools take, such as those of ``torch.distributed.checkpoint``:
        a dtype is there by its name.
        """
        found = super().state_dict()
        found["param_groups"] = list(map(saved_group, found["param_groups"]))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, of the one of ``torch.optim`` that it replaces, or
        a converted one of another package.

        Unlike ``torch.optim``, every state keeps its own dtype (float32 states of bfloat16
        parameters stay float32), and the tensors are copied. A state that is missing, such as the
        filter's in a dict of torch's AdamW, starts anew.

        Args:
            state_dict: the dict; hooks run as in ``torch.optim``.

        Raises:
            ValueError: groups do not match, or the dict holds something that cannot be continued
                (amsgrad, another window, another package's layout); the message says what to do.
                Nothing is loaded then.
        """
        # Registered last, so that it sees what the hooks of the user have made of the dict.
        handle = self.register_load_state_dict_pre_hook(self._hold_loaded)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loaded = None

    def _hold_loaded(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Checks a state dict before anything of it is used, and holds it for ``__setstate__``."""
        check_loaded(state_dict, self.param_groups)
        for group in state_dict["param_groups"]:
            self._options({**self.defaults, **loaded_group(group)})
        self._loaded = state_dict

    def __getstate__(self) -> State:
        return super().__getstate__() | {
            "_backend": self._backend,
            "_state_dtypes": self._state_dtypes,
            "clip_norm": self.clip_norm,
        }

    def __setstate__(self, state: State) -> None:
        """Takes over a copy, or, within ``load_state_dict``, what torch has made of the dict."""
        super().__setstate__(state)
        missing: Group = {
            "_loaded": None,
            "_backend": None,
            "_state_dtypes": {},
            "clip_norm": None,
        }
        for name, default in missing.items():
            self.__dict__.setdefault(name, default)
        self._start_anew()
        for group in self.param_groups:
            group.update(loaded_group(group))
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if self._loaded is not None:
            self._keeper.load(
                self.state,
                self.param_groups,
                self._loaded,
                lambda group: self._options(group).spec.needed,
            )


def _checked_flag(option: str, value: Any) -> bool:
    if isinstance(value, str) or value not in (True, False):
        raise TypeError(f"{option} must be True or False; got {value!r}")
    return bool(value)


def _check_flags(owner: str, options: Group, backend: str | None) -> None:
    for name in ("differentiable", "capturable"):
        _checked_flag(f"{owner}: {name}", options.get(name, False))
    for name in ("foreach", "fused"):
        value = options.get(name)
        if value not in (True, False, None):
            raise TypeError(f"{owner}: {name} must be True, False or None; got {value!r}")
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if options["differentiable"] and backend not in (None, "reference"):
        raise ValueError(
            f"{owner}: backend must be 'reference' with differentiable; got {backend!r}"
        )


def _check_clip_norm(owner: str, clip_norm: Any, differentiable: bool) -> float | None:
    if clip_norm is None:
        return None
    if differentiable:
        raise ValueError(
            f"{owner}: clip_norm must be None with differentiable, as autograd does not see the "
            f"norm; got {clip_norm!r}"
        )
    if not isinstance(clip_norm, (int, float)):
        raise TypeError(f"{owner}: clip_norm must be a number or None; got {clip_norm!r}")
    if not 0 < clip_norm < float("inf"):
        raise ValueError(f"{owner}: clip_norm must be > 0 and finite; got {clip_norm!r}")
    return clip_norm


def _check_capture(owner: str, group: Group) -> None:
    """Refuses what a CUDA graph would get wrong for good. A replay does not come back here."""
    if not any(param.is_cuda for param in group["params"]):
        return
    if not group.get("capturable", True):
        raise RuntimeError(
            f"{owner}: a step in a CUDA graph needs capturable=True; got capturable=False"
        )
    idle = sum(param.requires_grad and param.grad is None for param in group["params"])
    if idle:
        raise RuntimeError(
            f"{owner}: every trainable parameter needs a gradient while a CUDA graph is captured; "
            f"{idle} have none"
        )
