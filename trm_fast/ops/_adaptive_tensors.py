"""The tensors of an adaptive step: their checks, and the table of addresses that kernels read.

The meaning of the step is in trm_fast/ops/adaptive_step.py.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trm_fast._autograd import check_not_wrapped
from trm_fast._dispatch import OPS, Choice
from trm_fast.ops._adaptive_filters import WINDOWED
from trm_fast.ops._tensors import in_order_of, is_dense, overlap, same_order
from trm_fast.ops.filter_sums import FilterSums

if TYPE_CHECKING:
    from trm_fast.ops._adaptive_settings import Mode, Settings, Vocabulary

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
STATE_STORAGE = (torch.float32, torch.bfloat16)

# One row of the table per tensor; csrc/adaptive_step/table.h reads the same columns. Addresses are
# 0 where absent.
COLUMNS = (
    "param", "grad", "exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema", "grok_ring", "sums",
    "step", "grok_step", "size", "window",
    "param_dtype", "grad_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "grok_exp_avg_dtype",
    "weight_ema_dtype", "grok_ring_dtype",
)  # fmt: skip


class States(NamedTuple):
    """The state tensors of a step: each list has one for each parameter, or none at all. Their
    meaning is that of the arguments of ``adaptive_step_``, which have this order."""

    exp_avgs: Sequence[Tensor] = ()
    exp_avg_sqs: Sequence[Tensor] = ()
    steps: Sequence[Tensor] = ()
    grok_exp_avgs: Sequence[Tensor] = ()
    grok_steps: Sequence[Tensor] = ()
    weight_emas: Sequence[Tensor] = ()
    grok_rings: Sequence[Tensor] = ()


class AdaptiveStep:
    """The tensors of a step, checked once and kept; called with the gradients of each step.

    Args and errors: as ``adaptive_step_``. ``grads`` stands for the gradients of all later calls,
    whose dtypes must be the same; ``fits`` tells whether they are, and whether the parameters still
    lie where they lay.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: States,
        *,
        backend: str | None = None,
    ) -> None:
        check_not_wrapped("adaptive_step_", (*params, *grads, *chain(*states)))
        self.params = params
        self.rings = states.grok_rings
        self.states = {
            "exp_avg": states.exp_avgs,
            "exp_avg_sq": states.exp_avg_sqs,
            "grok_exp_avg": states.grok_exp_avgs,
            "weight_ema": states.weight_emas,
        }
        self.counters = {"step": states.steps, "grok_step": states.grok_steps}
        _check_tensors(params, grads, self.states, self.counters, self.rings)
        self.device = params[0].device if params else torch.device("cpu")
        floating = (*params, *grads, *chain(*self.states.values()), *self.rings)
        self._kinds = frozenset(tensor.dtype for tensor in floating)
        self._backend = backend
        self.choice = self._choose(None)  # that of the last mode, once there was one
        self._choices: dict[Mode, Choice] = {}  # of the modes that were checked
        self._filter_sums: dict[bool, FilterSums] = {}  # with means, and without
        # State memory is only ever swapped as a whole (by `.data`), so watching one list is enough;
        # the storages are kept, so that their addresses stay valid.
        self._watched = (
            states.exp_avgs or states.grok_exp_avgs or states.weight_emas or states.steps
        )
        self._kept = [tensor.untyped_storage() for tensor in chain(*states)]
        self._dtypes = list(map(_dtype, grads))
        self._sizes = list(map(Tensor.numel, grads))
        self._negated = any(map(Tensor.is_neg, grads))
        self._contiguous = all(map(Tensor.is_contiguous, params))
        self._places = self._where(params)
        self._scattered = [i for i, param in enumerate(params) if not is_dense(param)]
        self._table: _Table | None = None

    def fits(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Returns whether the dtypes of ``grads`` and the places of parameters and states are those
        that were checked."""
        return list(map(_dtype, grads)) == self._dtypes and self._where(params) == self._places

    def _where(self, params: Sequence[Tensor]) -> tuple[object, ...]:
        watched = list(map(Tensor.data_ptr, self._watched))
        if self._contiguous and all(map(Tensor.is_contiguous, params)):
            return watched, list(map(Tensor.data_ptr, params)), list(map(Tensor.numel, params))
        return watched, [(param.data_ptr(), param.shape, param.stride()) for param in params]

    @property
    def sums(self) -> Tensor | None:
        """What ``measure`` found last, with means."""
        return self._filter_sums[True].sums if True in self._filter_sums else None

    def measure(self, grads: Sequence[Tensor], means: bool = True) -> Tensor:
        """Returns the sums over gradients and means (trm_fast/ops/filter_sums.py), or over
        gradients alone. With means they are what the next step with a filter that needs them reads,
        whoever has written to them."""
        if means not in self._filter_sums:
            states = self.states["grok_exp_avg"] if means else ()
            self._filter_sums[means] = FilterSums(grads, states, backend=self._backend)
            self._table = None if means else self._table
        with torch.no_grad():
            return self._filter_sums[means](grads)

    def __call__(self, grads: Sequence[Tensor], settings: "Settings") -> None:
        """Takes one step; ``grads`` must fit, and have been measured for a filter with sums."""
        mode = settings.mode
        choice = self._choices.get(mode) or self._admit(mode, settings)
        if settings.reduces and self.states["grok_exp_avg"] and self.sums is None:
            _require(False, "sums", "measured before the step", None)
        if list(map(Tensor.numel, grads)) != self._sizes:  # as after `param.grad.data = other`
            _check_tensors(self.params, grads, self.states, self.counters, self.rings)
        self._grads_contiguous = all(map(Tensor.is_contiguous, grads))
        if not self._grads_contiguous:
            for index, grad in enumerate(grads):
                _check_dense(f"grads[{index}]", grad)
        if self.params:
            choice.run(self, grads, settings)

    def admit(self, settings: "Settings") -> None:
        """Raises if no implementation can take a step with this rule, filter and options, or the
        named one cannot, or the states are not theirs; a step raises the same."""
        mode = settings.mode
        if mode not in self._choices:
            self._admit(mode, settings)

    def _admit(self, mode: "Mode", settings: "Settings") -> Choice:
        self._check_states(settings)
        self.choice = self._choices[mode] = self._choose(mode)
        return self.choice

    def _choose(self, mode: "Mode | None") -> Choice:
        return OPS["adaptive_step"].choose(self.device.type, self._kinds, self._backend, mode)

    def _check_states(self, settings: "Settings") -> None:
        """Raises where the rule or the filter lacks a state, or has one that it does not know."""
        adaptive = settings.rule in ("adamw", "adam", "atan2")
        held = {name for name, tensors in self.states.items() if tensors}
        needed = {"exp_avg", "exp_avg_sq"} if adaptive else set()
        needed |= {"exp_avg"} if settings.rule == "momentum" else set()
        known = needed | {"grok_exp_avg"} | ({"exp_avg"} if settings.rule == "sgd" else set())
        if settings.rule not in ("momentum", "filter"):
            known |= {"weight_ema"}
        for name in needed - held if self.params else ():
            _require(False, name, f"given for rule {settings.rule!r}", "none")
        for name in held - known:
            _require(False, name, f"empty for rule {settings.rule!r}", "tensors")
        # A filter state may rest, so only the kind is looked at.
        if settings.filter != "none" and self.states["grok_exp_avg"]:
            kind = " or ".join(map(repr, WINDOWED))
            _require(
                bool(self.rings) == settings.windowed,
                "grok_ring", f"given for filter {kind} and for no other", settings.filter,
            )  # fmt: skip

    def run_on_rows(
        self,
        kernel: Callable[..., None],
        known: "Vocabulary",
        grads: Sequence[Tensor],
        settings: "Settings",
    ) -> None:
        """Calls a kernel that walks memory by address; other orders of memory go through copies."""
        table = self._table = self._table or self._make_table()
        if not (self._grads_contiguous and self._contiguous) or self._negated:
            grads = [in_order_of(g, param) for g, param in zip(grads, self.params, strict=True)]
        table.columns[_GRAD] = np.fromiter(map(Tensor.data_ptr, grads), np.int64, len(grads))
        copies = {i: self.params[i].contiguous() for i in self._scattered}
        for i, copy in copies.items():
            table.columns[_PARAM, i] = copy.data_ptr()
        kernel(
            table.rows, _ticket(self.device),
            known.rules[settings.rule], known.filters[settings.filter],
            *settings.arguments(self.device, known),
        )  # fmt: skip
        for i, copy in copies.items():
            self.params[i].copy_(copy)
        # Only what a graph is likely to hold: each bump costs as much as reading a pointer.
        torch.autograd.graph.increment_version(self.params)

    def _make_table(self) -> "_Table":
        filled: dict[str, list[int]] = {"size": [param.numel() for param in self.params]}
        filled["grad_dtype"] = [STORAGE.index(dtype) for dtype in self._dtypes]
        floating = {"param": self.params, **self.states, "grok_ring": self.rings}
        for name, tensors in (floating | self.counters).items():
            filled[name] = [tensor.data_ptr() for tensor in tensors]
            if name not in self.counters:
                filled[f"{name}_dtype"] = [STORAGE.index(tensor.dtype) for tensor in tensors]
        filled["window"] = [ring.shape[0] for ring in self.rings]
        if self.sums is not None:
            row_bytes = 3 * self.sums.element_size()
            filled["sums"] = [self.sums.data_ptr() + i * row_bytes for i in range(len(self.params))]
        absent = [0] * len(self.params)
        columns = [filled.get(name) or absent for name in COLUMNS]
        rows = torch.from_numpy(np.array(columns, dtype=np.int64).T.copy())
        return _Table(rows, rows.numpy().T)


class _Table(NamedTuple):
    """What kernels read instead of lists of tensors: the rows, and the same memory as columns."""

    rows: Tensor
    columns: np.ndarray


_tickets: dict[tuple[torch.device, int], Tensor] = {}
_captured_tickets: list[Tensor] = []  # a CUDA graph uses its own at each replay


def _ticket(device: torch.device) -> Tensor | None:
    """Returns the counter of blocks that are done, by which the last one knows to advance steps.

    Steps on one stream take turns with one counter; each capture gets its own, zeroed by the graph.
    """
    if device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        _captured_tickets.append(torch.zeros(1, dtype=torch.int32, device=device))
        return _captured_tickets[-1]
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]


_dtype = attrgetter("dtype")
_PARAM, _GRAD = COLUMNS.index("param"), COLUMNS.index("grad")


def _check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    counters: dict[str, Sequence[Tensor]],
    rings: Sequence[Tensor],
) -> None:
    for name, tensors in {"grads": grads, **states, **counters, "grok_ring": rings}.items():
        optional = name not in ("grads", "step")
        fits = len(tensors) == len(params) or (optional and not tensors)
        _require(fits, name, f"of {len(params)} tensors, one for each parameter", len(tensors))
    _require(
        len(states["grok_exp_avg"]) == len(counters["grok_step"]),
        "grok_step", "given together with grok_exp_avg", len(counters["grok_step"]),
    )  # fmt: skip
    _require(
        not rings or len(states["grok_exp_avg"]) > 0,
        "grok_exp_avg", "given together with grok_ring, as its sum", 0,
    )  # fmt: skip
    for index, param in enumerate(params):
        _check_param(index, param, params[0].device)
        _check_like(f"grads[{index}]", grads[index], param, STORAGE)
        for name, tensors in states.items():
            if tensors:
                _check_like(f"{name}[{index}]", tensors[index], param, STATE_STORAGE)
                _check_layout(f"{name}[{index}]", tensors[index], param)
        for name, tensors in counters.items():
            if tensors:
                _check_counter(f"{name}[{index}]", tensors[index], param.device)
        if rings:
            _check_ring(index, rings[index], states["grok_exp_avg"][index], param)
    if params and params[0].device.type == "meta":
        return
    written = [*params, *chain(*states.values()), *chain(*counters.values()), *rings]
    _require(
        not overlap(written, grads), "written tensors", "disjoint in memory", "two that overlap"
    )


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"adaptive_step_: {name} must be a dense tensor; got {tensor.layout}")


def _check_param(index: int, param: Tensor, device: torch.device) -> None:
    name = f"params[{index}]"
    if param.dtype not in (*STORAGE, torch.float64):
        raise TypeError(
            f"adaptive_step_: {name} must be a floating point tensor; got {param.dtype}"
        )
    _check_dense(name, param)
    if param.is_inference() and not torch.is_inference_mode_enabled():
        _require(False, name, "a normal tensor outside inference mode", "an inference tensor")
    _require(param.device == device, name, f"on {device} as params[0]", str(param.device))


def _check_like(name: str, tensor: Tensor, param: Tensor, storage: tuple[torch.dtype, ...]) -> None:
    _check_dense(name, tensor)
    allowed = (torch.float64,) if param.dtype == torch.float64 else storage
    if tensor.dtype not in allowed:
        raise TypeError(
            f"adaptive_step_: {name} must be one of {allowed} for a {param.dtype} parameter; "
            f"got {tensor.dtype}"
        )
    matches = tensor.shape == param.shape and tensor.device == param.device
    required = f"{tuple(param.shape)} on {param.device} as its parameter"
    _require(matches, name, required, f"{tuple(tensor.shape)} on {tensor.device}")


def _check_layout(name: str, tensor: Tensor, param: Tensor) -> None:
    wanted = param if is_dense(param) else torch.empty(param.shape, device="meta")
    required = f"of strides {wanted.stride()}, in the memory order of its parameter"
    _require(same_order(tensor, wanted), name, required, tensor.stride())


def _check_counter(name: str, tensor: Tensor, device: torch.device) -> None:
    fits = tensor.dtype == torch.float32 and tensor.dim() == 0 and tensor.device == device
    came = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    _require(fits, name, f"a float32 tensor of shape () on {device}", came)


def _check_ring(index: int, ring: Tensor, total: Tensor, param: Tensor) -> None:
    name = f"grok_ring[{index}]"
    fits = ring.dim() == param.dim() + 1 and ring.shape[0] > 0 and ring.device == param.device
    came = f"{tuple(ring.shape)} on {ring.device}"
    _require(fits, name, f"[w, *{tuple(param.shape)}] with w > 0 on {param.device}", came)
    _check_like(f"{name}[0]", ring[0], param, STATE_STORAGE)
    _check_layout(f"{name}[0]", ring[0], param)
    apart = ring.stride(0) == param.numel() or ring.shape[0] == 1 or not param.numel()
    _require(apart, name, f"without gaps between {param.numel()} elements", ring.stride())
    exact = total.dtype != torch.bfloat16
    _require(exact, f"grok_exp_avg[{index}]", "float32, as it is a sum", total.dtype)


def _require(holds: bool, argument: str, required: str, came: object) -> None:
    if not holds:
        raise ValueError(f"adaptive_step_: {argument} must be {required}; got {came!r}")
