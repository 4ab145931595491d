"""What the checks of torch's own optimizer suite are run over: inputs, gradients, comparisons.

The checks follow pytorch/pytorch `test/test_optim.py` (TestOptimRenewed) and `test/optim/`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from trm_fast import BackendError
from trm_fast._dispatch import unusable
from trm_fast.optim import GrokFastAdamW

Options = dict[str, Any]

STATES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")

# Ways of asking for an implementation; the first is the meaning that the others are compared with.
IMPLEMENTATIONS: dict[str, Options] = {
    "reference": {"backend": "reference"},
    "default": {},
    "cpp": {"backend": "cpp"},
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The reference computes with numbers in float64, but with tensors in their own dtype.
needs_cpp = pytest.mark.skipif(
    unusable("cpp", "cpu") is not None, reason="only a fused step takes numbers and tensors alike"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


each_implementation = pytest.mark.parametrize(
    "implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS
)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])


@cache
def _why_not(
    device: str, dtypes: frozenset[torch.dtype], choice: frozenset[tuple[str, Any]]
) -> str | None:
    """Why a step on `device` cannot run with this choice of implementation, if it cannot."""
    params = [Parameter(torch.ones(3, device=device, dtype=dtype)) for dtype in dtypes]
    set_grads(params, [torch.ones_like(param) for param in params])
    try:
        GrokFastAdamW(params, **dict(choice)).step()
    except BackendError as error:
        return str(error)
    return None


def _tensors(params: Any) -> Iterable[Tensor]:
    """The tensors in any form in which an optimizer takes its parameters."""
    if isinstance(params, Tensor):
        yield params
    elif isinstance(params, Mapping):
        yield from _tensors(params["params"])
    elif not isinstance(params, str):
        for item in params:
            yield from _tensors(item)


def build(params: Any, **kwargs: Any) -> GrokFastAdamW:
    """An optimizer, or a skip with the reason why the implementation asked for cannot run."""
    choice = frozenset((k, kwargs[k]) for k in ("backend", "fused", "foreach") if kwargs.get(k))
    params = params if isinstance(params, Tensor) else list(params)
    tensors = list(_tensors(params))
    device = "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"
    if choice and (reason := _why_not(device, frozenset([torch.float32]), choice)):
        named = {kwargs.get("backend"), "cpp" if kwargs.get("fused") else None}
        expected = named & set(os.environ.get("TRM_FAST_EXPECT", "").split(","))
        (pytest.fail if expected else pytest.skip)(reason)
    dtypes = frozenset(tensor.dtype for tensor in tensors if tensor.is_floating_point())
    if choice and dtypes and (reason := _why_not(device, dtypes, choice)):
        pytest.skip(reason)
    return GrokFastAdamW(params, **kwargs)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    """A matrix, a vector, a strided view, a permuted tensor, a scalar and an empty tensor."""
    return [
        Parameter(randn(10, 5, seed=seed).to(dtype)),
        Parameter(randn(67, seed=seed + 1).to(dtype)),
        Parameter(randn(7, 4, 2, seed=seed + 2).to(dtype)[..., 0]),
        Parameter(randn(3, 8, seed=seed + 3).to(dtype).t()),
        Parameter(randn(seed=seed + 4).to(dtype)),
        Parameter(randn(0, seed=seed + 5).to(dtype)),
    ]


def make_matrices(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    """Matrices alone: wide, tall, a strided view, a permuted one, a row and an empty one."""
    return [
        Parameter(randn(10, 5, seed=seed).to(dtype)),
        Parameter(randn(6, 9, seed=seed + 1).to(dtype)),
        Parameter(randn(7, 4, 2, seed=seed + 2).to(dtype)[..., 0]),
        Parameter(randn(3, 8, seed=seed + 3).to(dtype).t()),
        Parameter(randn(1, 7, seed=seed + 4).to(dtype)),
        Parameter(randn(0, 4, seed=seed + 5).to(dtype)),
    ]


def make_grads(params: Sequence[Tensor], steps: int, seed: int = 100) -> list[list[Tensor]]:
    """A gradient for each step and parameter, in the parameter's own layout."""
    generator = torch.Generator().manual_seed(seed)

    def one(param: Tensor) -> Tensor:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        return torch.empty_like(param, requires_grad=False).copy_(grad)

    return [[one(param) for param in params] for _ in range(steps)]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def train(optimizer: torch.optim.Optimizer, grads: Iterable[Sequence[Tensor | None]]) -> None:
    """One step for each row of `grads`."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for row in grads:
        set_grads(params, row)
        optimizer.step()


def clone_params(params: Iterable[Tensor]) -> list[Parameter]:
    return [Parameter(param.detach().clone(), param.requires_grad) for param in params]


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Copies of every parameter, its gradient and its state."""
    rows = []
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        tensors = {"param": param, "grad": param.grad, **optimizer.state.get(param, {})}
        rows.append({k: v.detach().clone() for k, v in tensors.items() if v is not None})
    return rows


def without_grads(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value for key, value in row.items() if key != "grad"} for row in rows]


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Equality of nested values; tensors in dtype, shape and every value."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{where}: {type(actual)}"
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        assert torch.equal(actual, expected), f"{where}: {actual} is not {expected}"
    elif isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert actual == expected, f"{where}: {actual!r} is not {expected!r}"


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """|actual - expected| <= bound, element by element."""
    error = (actual.detach().double() - expected.detach().double()).abs()
    assert (error <= bound).all(), f"{what}: worst error {error.max():.3g} over its bound"


def one(*values: float, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.tensor(values, dtype=dtype))


def step_with(optimizer: torch.optim.Optimizer, *grads: Tensor | None) -> None:
    train(optimizer, [grads])


def params_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def everything(optimizer: torch.optim.Optimizer) -> Any:
    """Copies of parameters, gradients, all state and the options."""
    return deepcopy((snapshot(optimizer), optimizer.state_dict()))


def unclipped(optimizer: Any) -> Any:
    """Without the one thing that parameters share in a step."""
    optimizer.clip_norm = None
    return optimizer
