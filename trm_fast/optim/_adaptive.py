"""What every optimizer on ``ops.adaptive_step`` shares: state, cached steps, saving and loading."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trm_fast._dispatch import check_name
from trm_fast.ops import FILTERS, Settings
from trm_fast.optim._group_step import CompiledStep, FilterStatistics, GroupStep, statistics_of
from trm_fast.optim._plan import Keys, Plan, is_plain, local_grad, parts
from trm_fast.optim._states import (
    ALL,
    COUNTERS,
    RING,
    SUM,
    Group,
    State,
    check_state_dtypes,
    check_window,
    may_change,
    new_state,
    remember_loaded,
    suited,
)
from trm_fast.optim.options import FILTER_OPTIONS

_MEAN = {"grok_exp_avg": "grok_exp_avg", "grok_step": "grok_step"}
_WINDOW = {"grok_exp_avg": SUM, "grok_step": "grok_step", "grok_ring": RING}


class Checked(NamedTuple):
    """What the options of a group say: the settings of its step, the state behind each argument of
    the op, and the states that must exist."""

    settings: Settings
    keys: Keys
    needed: tuple[str, ...]


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
        # Not an attribute of its own: a compiled step keeps what it writes to a dict only.
        self._norm: dict[str, Tensor | None] = {"found": None}
        self._plans: dict[int, Plan] = {}
        self._checked: dict[int, tuple[tuple[Any, ...], Checked]] = {}
        self._known: list[State] = []
        self._loading: dict[str, Any] | None = None
        _check_clip_norm(name, clip_norm, defaults["differentiable"])
        super().__init__(params, defaults)

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
            "warmup": bool(group["warmup"]),
            "maximize": group["maximize"],
            "weight_ema": 0.0 if weight_ema is None else weight_ema,
            "owner": name,
        }

    def _moments_of(self, group: Group) -> Keys:
        return {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

    def _state_keys(self, group: Group) -> Keys:
        """Returns the state behind each argument of the op."""
        keys = {**self._moments_of(group), "step": "step"}
        if group["filter"] is not None:
            keys |= _WINDOW if group["filter"] == "ma" else _MEAN
        return keys | ({} if group["weight_ema"] is None else {"weight_ema": "weight_ema"})

    def _check(self, group: Group) -> Checked:
        settings, keys = self._settings(group), self._state_keys(group)
        if group["filter"] == "ma":
            # A step that is planned reads the window off the ring.
            for ring in (self.state.get(param, {}).get(RING) for param in group["params"]):
                if ring is not None:
                    check_window(type(self).__name__, ring, group["window"])
        # A lamb of 0 needs no filter state; one that exists goes on.
        filtering = isinstance(settings.lamb, Tensor) or settings.lamb != 0
        needed = (key for slot, key in keys.items() if filtering or not slot.startswith("grok"))
        return Checked(settings, keys, tuple(needed))

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as ``torch.optim`` does, and creates the state of its trainable parameters.

        Raises:
            ValueError, TypeError, RuntimeError: an option or a parameter is not supported; no group
                is added.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            needed = self._check(group).needed
            for param in group["params"]:
                self._check_param(param, group)
        except BaseException:
            self.param_groups.pop()
            raise
        # Not at the first step: checkpoint tools would invent gradients for one to learn the keys.
        for param in group["params"]:
            if param.requires_grad:
                self._complete_state(param, group, needed)

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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if not torch.compiler.is_compiling():
                self._notice_replaced_states()
            # Every group is checked before the first one moves.
            prepared = [self._prepared(i, group) for i, group in enumerate(self.param_groups)]
            calls = [call for call in prepared if call is not None]
            measured = self._measure(calls)
            if self.clip_norm is not None:
                self._clip(calls, measured)
            for call in calls:
                call()
        return loss

    def _notice_replaced_states(self) -> None:
        states = self.state.values()
        if len(states) != len(self._known) or not all(map(is_, states, self._known)):
            self._plans.clear()
            self._known = list(states)

    def _prepared(self, index: int, group: Group) -> GroupStep | CompiledStep | None:
        """Returns the step of one group, checked and ready to be taken."""
        params, grads = group["params"], [param.grad for param in group["params"]]
        if type(None) in map(type, grads):
            params = [param for param in params if param.grad is not None]
            grads = [grad for grad in grads if grad is not None]
        compiling = torch.compiler.is_compiling()
        settings, keys, needed = (
            self._check(group) if compiling else self._checked_options(index, group)
        )
        settings.scale("grad_scale", getattr(self, "grad_scale", None))
        settings.scale("found_inf", getattr(self, "found_inf", None))
        settings.scale("clip", None)  # that of the last step
        if compiling:
            return self._compiled(group, keys, needed, params, grads, settings)
        if _is_capturing():
            _check_capture(type(self).__name__, group)
        if not params:
            return None
        plan = self._plans.get(index)
        if plan is None or not plan.plain:
            grads = list(map(local_grad, grads, params))
        fixed = self._fixed(group)
        if plan is None or not plan.holds(keys, needed, params, grads, fixed):
            grads = list(map(local_grad, grads, params))
            for param, grad in zip(params, grads, strict=True):
                _check_grad(type(self).__name__, param, grad)
            states = [self._complete_state(param, group, needed) for param in params]
            plan = self._plans[index] = self._plan(keys, needed, params, grads, states, fixed)
        plan.admit(settings)
        return GroupStep(plan, grads, settings)

    def _fixed(self, group: Group) -> tuple[Any, ...]:
        """Returns what a plan is made for beside its tensors: the named backend and more."""
        return (self._named_backend(group),)

    def _plan(
        self,
        keys: Keys,
        needed: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        fixed: tuple[Any, ...],
    ) -> Plan:
        """Returns the step of these tensors, which is kept as long as it holds."""
        return Plan(keys, needed, params, grads, states, fixed)

    def _checked_options(self, index: int, group: Group) -> Checked:
        """Returns what the options of ``group`` say; looks at them again only if one was set."""
        options, found = self._checked.get(index, ((), None))
        unchanged = len(options) == len(group) and all(map(is_, options, group.values()))
        if found is None or not unchanged:
            found = self._check(group)
            looked_at = [option for name, option in group.items() if name not in _LISTS]
            if not any(map(may_change, looked_at)):
                self._checked[index] = tuple(group.values()), found
        return found

    def _compiled(
        self,
        group: Group,
        keys: Keys,
        needed: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        settings: Settings,
    ) -> CompiledStep:
        """Returns the step through the dispatcher, where the compiler sees what it writes."""
        for param, grad in zip(params, grads, strict=True):
            _check_grad(type(self).__name__, param, grad)
            if not is_plain(param):
                raise TypeError(
                    f"{type(self).__name__}: parameters of a compiled step must be plain real "
                    f"tensors; got {type(param).__name__} {param.dtype}: leave step() uncompiled"
                )
        states = [self._complete_state(param, group, needed) for param in params]
        return CompiledStep(keys, params, grads, states, settings, self._named_backend(group))

    def _measure(self, calls: list[GroupStep | CompiledStep]) -> list[Tensor]:
        """Takes the sums that a filter or the clipping needs, before the first group moves."""
        clipping = self.clip_norm is not None
        if not clipping and not any(call.settings.reduces for call in calls):
            return []
        wanted = [call.measure() for call in calls if clipping or call.settings.reduces]
        return list(chain.from_iterable(wanted))

    def _clip(self, calls: list[GroupStep | CompiledStep], measured: list[Tensor]) -> None:
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
        scale = calls[0].settings.grad_scale
        if scale is not None:
            norm = norm / scale.to(device)
        self._norm["found"] = norm.float()
        # The small number is that of torch.nn.utils.clip_grad_norm_.
        clip = (largest / (norm + 1e-6)).clamp(max=1.0).float()
        for call in calls:
            call.settings.scale("clip", clip)

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

    def _complete_state(
        self, param: Tensor, group: Group, needed: Iterable[str], late: tuple[str, ...] = ()
    ) -> State:
        """Creates what the state of ``param`` lacks but for ``late``, and lets it follow the
        parameter to its device, dtype and memory order."""
        state: State = self.state[param]
        if RING in needed and RING not in state:
            state.pop(SUM, None)  # a sum of gradients that are gone
        for name in needed:
            value = state.get(name)
            if isinstance(value, (int, float)):
                value = torch.tensor(float(value))
            if value is None and name in late:
                continue
            if value is None and param.is_cuda and _is_capturing():
                raise RuntimeError(
                    f"{type(self).__name__}: every state must exist before a CUDA graph is "
                    f"captured; {name} does not: take one step first"
                )
            dtype = self._state_dtype(name, param)
            if value is None or (value.is_meta and not param.is_meta):
                state[name] = new_state(name, param, dtype, group["window"])
                if name in _REPLACED:  # a new filter starts at the next gradient
                    for old in _REPLACED[name]:
                        state.pop(old, None)
            else:
                if name == RING:
                    check_window(type(self).__name__, value, group["window"])
                state[name] = suited(name, value, param, dtype, group["window"])
        return state

    def _state_dtype(self, name: str, param: Tensor) -> torch.dtype:
        if param.is_complex() or param.dtype == torch.float64:
            return param.dtype
        return self._state_dtypes.get(name, torch.float32)

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
        handle = self.register_load_state_dict_pre_hook(remember_loaded)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> State:
        return super().__getstate__() | {
            "_backend": self._backend,
            "_state_dtypes": self._state_dtypes,
            "clip_norm": self.clip_norm,
        }

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        self._plans, self._checked, self._known = {}, {}, []
        self._norm = {"found": None}
        missing: Group = {
            "_loading": None,
            "_backend": None,
            "_state_dtypes": {},
            "clip_norm": None,
        }
        for name, default in missing.items():
            self.__dict__.setdefault(name, default)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if self._loading is not None:
            self._adopt(self._loading)

    def _adopt(self, loaded: dict[str, Any]) -> None:
        """Replaces what torch has cast to the parameters' dtypes by copies of what was saved."""
        keys = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        groups = [(param, group) for group in self.param_groups for param in group["params"]]
        for key, (param, group) in zip(keys, groups, strict=True):
            saved = {
                name: value
                for name, value in loaded["state"].get(key, {}).items()
                if name in ALL and value is not None
            }
            state = self.state[param] if saved or param.requires_grad else {}
            for name, value in saved.items():
                state[name] = self._adopted(name, value, param)
            if "grok_exp_avg" in saved and "grok_step" not in saved and "step" in saved:
                state["grok_step"] = state["step"].clone()
            if "momentum_buffer" in saved and "step" not in saved:  # of torch's SGD
                state["step"] = torch.ones((), dtype=torch.float32, device=param.device)
            if state.get("momentum_buffer", 0) is None:
                del state["momentum_buffer"]
            # The weights may be loaded after this, so their average starts at the next step.
            if state or param.requires_grad:
                self._complete_state(param, group, self._check(group).needed, late=("weight_ema",))

    def _adopted(self, name: str, value: Any, param: Tensor) -> Tensor:
        if name in COUNTERS:
            return torch.tensor(float(value), dtype=torch.float32, device=param.device)
        copy = value.detach().clone()
        window = len(copy) if name == RING else 0
        return suited(name, copy, param, self._state_dtype(name, param), window)


_LISTS = ("params", "param_names")
# What goes when a filter starts: its counter, and the state of the other kind of filter.
_REPLACED = {"grok_exp_avg": ("grok_step", SUM, RING), SUM: ("grok_step", "grok_exp_avg")}


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _check_flags(owner: str, options: Group, backend: str | None) -> None:
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


def _check_grad(owner: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{owner} does not support sparse gradients; got {grad.layout} for a parameter of "
            f"shape {tuple(param.shape)}: use torch.optim.SparseAdam or nn.Embedding(sparse=False)"
        )


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
