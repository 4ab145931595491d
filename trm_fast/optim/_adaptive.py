"""What every optimizer on ``ops.adaptive_step`` shares: state, cached steps, saving and loading."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trm_fast._dispatch import check_name
from trm_fast.ops import Settings, adaptive_step_
from trm_fast.ops._adaptive_tensors import STATE_STORAGE
from trm_fast.ops._tensors import in_order_of, is_dense
from trm_fast.optim._plan import Plan, State, is_plain, local_grad, parts, state_lists

AVERAGES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")
COUNTERS = ("step", "grok_step")

Group = dict[str, Any]
Checked = tuple[Settings, tuple[str, ...]]


class AdaptiveOptimizer(Optimizer):
    """Base of the optimizers that differ only in the settings of one ``adaptive_step_`` per
    parameter group.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``.
        defaults: options of the groups; "filter", "lamb", "weight_ema", "capturable",
            "differentiable", "foreach" and "fused" among them.
        backend: implementation that must run, or None.
        state_dtype: torch.float32, torch.bfloat16, or a mapping from names of states to these; None
            means float32.
    """

    # GradScaler then leaves unscaling and skipping to step(), which needs no host sync for either.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: Group,
        backend: str | None,
        state_dtype: torch.dtype | Mapping[str, torch.dtype] | None,
    ) -> None:
        self._backend = None if backend is None else check_name(backend)
        self._state_dtypes = _state_dtypes(type(self).__name__, state_dtype)
        self._plans: dict[int, Plan] = {}
        self._checked: dict[int, tuple[tuple[Any, ...], Checked]] = {}
        self._known: list[State] = []
        self._loading: dict[str, Any] | None = None
        super().__init__(params, defaults)

    def _settings(self, group: Group) -> Settings:
        """Returns the settings of one step of ``group``; checks its options."""
        raise TypeError(f"{type(self).__name__} does not say how its options become settings")

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as ``torch.optim`` does, and creates the state of its trainable parameters.

        Raises:
            ValueError, TypeError, RuntimeError: an option or a parameter is not supported; no group
                is added.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._settings(group)
            for param in group["params"]:
                _check_param(param, group)
        except BaseException:
            self.param_groups.pop()
            raise
        # Not at the first step: checkpoint tools would invent gradients for one to learn the keys.
        for param in group["params"]:
            if param.requires_grad:
                self._complete_state(param, group)

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
            for call in [self._prepared(i, group) for i, group in enumerate(self.param_groups)]:
                call()
        return loss

    def _notice_replaced_states(self) -> None:
        states = self.state.values()
        if len(states) != len(self._known) or not all(map(is_, states, self._known)):
            self._plans.clear()
            self._known = list(states)

    def _prepared(self, index: int, group: Group) -> Callable[[], None]:
        """Returns the step of one group, checked and ready to be taken."""
        params, grads = group["params"], [param.grad for param in group["params"]]
        if type(None) in map(type, grads):
            params = [param for param in params if param.grad is not None]
            grads = [grad for grad in grads if grad is not None]
        compiling = torch.compiler.is_compiling()
        if compiling:
            settings, names = self._settings(group), _state_names(group)
        else:
            settings, names = self._checked_settings(index, group)
        settings.scale("grad_scale", getattr(self, "grad_scale", None))
        settings.scale("found_inf", getattr(self, "found_inf", None))
        if compiling:
            return partial(self._step_compiled, group, names, params, grads, settings)
        if _is_capturing():
            _check_capture(type(self).__name__, group)
        if not params:
            return _nothing
        plan = self._plans.get(index)
        if plan is None or not plan.plain:
            grads = list(map(local_grad, grads, params))
        backend = self._named_backend(group)
        if plan is None or not plan.holds(names, params, grads, backend):
            grads = list(map(local_grad, grads, params))
            for param, grad in zip(params, grads, strict=True):
                _check_grad(type(self).__name__, param, grad)
            states = [self._complete_state(param, group) for param in params]
            plan = self._plans[index] = Plan(names, params, grads, states, backend)
        return partial(plan.step, grads, settings)

    def _checked_settings(self, index: int, group: Group) -> Checked:
        """Returns the settings of ``group`` and the names of its states; looks at its options again
        only if one of them was set."""
        options, found = self._checked.get(index, ((), None))
        unchanged = len(options) == len(group) and all(map(is_, options, group.values()))
        if found is None or not unchanged:
            found = self._settings(group), _state_names(group)
            looked_at = [option for name, option in group.items() if name not in _LISTS]
            if not any(map(_may_change, looked_at)):
                self._checked[index] = tuple(group.values()), found
        return found

    def _step_compiled(
        self,
        group: Group,
        names: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        settings: Settings,
    ) -> None:
        """Takes the step through the dispatcher, where the compiler sees what it writes."""
        for param, grad in zip(params, grads, strict=True):
            _check_grad(type(self).__name__, param, grad)
            if not is_plain(param):
                raise TypeError(
                    f"{type(self).__name__}: parameters of a compiled step must be plain real "
                    f"tensors; got {type(param).__name__} {param.dtype}: leave step() uncompiled"
                )
        states = [self._complete_state(param, group) for param in params]
        for part in parts(params, states):
            lists = state_lists(names, [states[i] for i in part])
            adaptive_step_(
                [params[i] for i in part],
                [grads[i] for i in part],
                *lists,
                settings=settings,
                backend=self._named_backend(group),
            )

    def _named_backend(self, group: Group) -> str | None:
        one_by_one = group["differentiable"] or group["fused"] is False
        return self._backend or ("reference" if one_by_one else None)

    def _complete_state(self, param: Tensor, group: Group, late: tuple[str, ...] = ()) -> State:
        """Creates what the state of ``param`` lacks but for ``late``, and lets it follow the
        parameter to its device, dtype and memory order."""
        state: State = self.state[param]
        for name in _state_names(group):
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
            if value is None or (value.is_meta and not param.is_meta):
                state[name] = self._new_state(name, param)
                if name == "grok_exp_avg":
                    state.pop("grok_step", None)  # a new mean starts at the next gradient
            elif name in COUNTERS:
                state[name] = value.to(param.device)
            else:
                state[name] = _suited(value, param, self._state_dtype(name, param))
        return state

    def _new_state(self, name: str, param: Tensor) -> Tensor:
        if name in COUNTERS:
            return torch.zeros((), dtype=torch.float32, device=param.device)
        order = torch.preserve_format if is_dense(param) else torch.contiguous_format
        new = torch.zeros_like(param, dtype=self._state_dtype(name, param), memory_format=order)
        new.requires_grad_(False)
        return new.copy_(param.detach()) if name == "weight_ema" else new

    def _state_dtype(self, name: str, param: Tensor) -> torch.dtype:
        if param.is_complex() or param.dtype == torch.float64:
            return param.dtype
        return self._state_dtypes.get(name, torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, of torch's Adam or AdamW, or a converted one of
        another package.

        Unlike ``torch.optim``, every state keeps its own dtype (float32 states of bfloat16
        parameters stay float32), and the tensors are copied. A state that is missing, such as the
        filter's in a dict of torch's AdamW, starts anew.

        Args:
            state_dict: the dict; hooks run as in ``torch.optim``.

        Raises:
            ValueError: groups do not match, or the dict holds something that cannot be continued
                (amsgrad, another package's layout); the message says what to do. Nothing is loaded
                then.
        """
        # Registered last, so that it sees what the hooks of the user have made of the dict.
        handle = self.register_load_state_dict_pre_hook(_remember_loaded)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> State:
        return super().__getstate__() | {
            "_backend": self._backend,
            "_state_dtypes": self._state_dtypes,
        }

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        self._plans, self._checked, self._known = {}, {}, []
        for name, default in (("_loading", None), ("_backend", None), ("_state_dtypes", {})):
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
            saved = loaded["state"].get(key, {})
            state = self.state[param] if saved or param.requires_grad else {}
            for name in saved.keys() & {*AVERAGES, *COUNTERS}:
                state[name] = self._adopted(name, saved[name], param)
            if "grok_exp_avg" in saved and "grok_step" not in saved and "step" in saved:
                state["grok_step"] = state["step"].clone()
            # The weights may be loaded after this, so their average starts at the next step.
            if state or param.requires_grad:
                self._complete_state(param, group, late=("weight_ema",))

    def _adopted(self, name: str, value: Any, param: Tensor) -> Tensor:
        if name in COUNTERS:
            return torch.tensor(float(value), dtype=torch.float32, device=param.device)
        return _suited(value.detach().clone(), param, self._state_dtype(name, param))


def _state_dtypes(
    owner: str, given: torch.dtype | Mapping[str, torch.dtype] | None
) -> dict[str, torch.dtype]:
    if given is not None and not isinstance(given, (torch.dtype, Mapping)):
        required = "a torch.dtype, a mapping from names of states to these, or None"
        raise TypeError(f"{owner}: state_dtype must be {required}; got {given!r}")
    wanted = dict.fromkeys(AVERAGES, given) if isinstance(given, torch.dtype) else dict(given or {})
    for name, dtype in wanted.items():
        if name not in AVERAGES:
            raise ValueError(f"{owner}: state_dtype must name {', '.join(AVERAGES)}; got {name!r}")
        if dtype not in STATE_STORAGE:
            raise ValueError(
                f"{owner}: state_dtype must be torch.float32 or torch.bfloat16; got {dtype}"
            )
    return wanted


def _state_names(group: Group) -> tuple[str, ...]:
    """Returns the states that ``group`` needs; a lamb of 0 needs none for the filter."""
    lamb = group["lamb"]
    filtering = group["filter"] is not None and (isinstance(lamb, Tensor) or lamb != 0)
    averaging = group["weight_ema"] is not None
    return (
        "step", "exp_avg", "exp_avg_sq",
        *(("grok_exp_avg", "grok_step") if filtering else ()),
        *(("weight_ema",) if averaging else ()),
    )  # fmt: skip


def _suited(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a state on the device and in the memory order of ``param``, and in ``dtype``."""
    value = value.to(param.device, dtype)
    return value if hasattr(value, "to_local") else in_order_of(value, param)


_LISTS = ("params", "param_names")


def _may_change(option: Any) -> bool:
    """Returns whether an option may change where it lies, and has to be looked at each time."""
    inner = option if isinstance(option, tuple) else ()
    return isinstance(option, (Tensor, list)) or any(map(_may_change, inner))


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _nothing() -> None:
    pass


def _check_param(param: Tensor, group: Group) -> None:
    if group["fused"] and not (param.is_floating_point() and param.device.type in ("cpu", "cuda")):
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors "
            f"on cpu or cuda; got {param.dtype} on {param.device.type}"
        )


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
    if not group["capturable"]:
        raise RuntimeError(
            f"{owner}: a step in a CUDA graph needs capturable=True; got capturable=False"
        )
    idle = sum(param.requires_grad and param.grad is None for param in group["params"])
    if idle:
        raise RuntimeError(
            f"{owner}: every trainable parameter needs a gradient while a CUDA graph is captured; "
            f"{idle} have none"
        )


def _remember_loaded(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Checks a state dict before anything of it is used, and keeps it for ``_adopt``."""
    for group in state_dict["param_groups"]:
        if group.get("amsgrad"):
            raise ValueError(
                "load_state_dict: amsgrad must be False, its maximum has no place here; got True"
            )
        if "grokfast_alpha" in group:
            raise ValueError(
                "load_state_dict: the dict must have the layout of torch.optim; got that of "
                "grokfast-pytorch: use trm_fast.optim.from_lucidrains(state_dict, init_lr=...)"
            )
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, param in zip(keys, params, strict=False):  # torch refuses other counts in its words
        for name, value in state_dict["state"].get(key, {}).items():
            _check_loaded(f"load_state_dict: {name} of parameter {key!r}", name, value, param)
    optimizer._loading = state_dict  # type: ignore[attr-defined]


def _check_loaded(label: str, name: str, value: Any, param: Tensor) -> None:
    if name in COUNTERS:
        single = (
            value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))
        )
        if not single:
            raise ValueError(f"{label} must be a number or a tensor of one element; got {value!r}")
    elif name in AVERAGES and (not isinstance(value, Tensor) or value.shape != param.shape):
        came = tuple(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(f"{label} must be a tensor {tuple(param.shape)}; got {came!r}")
