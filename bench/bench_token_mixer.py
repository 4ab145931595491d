"""token_mixer beside the operators of official TRM, eager and compiled, with their gradients.

97 tokens of width 512, inner 512, float32 weights. Before anything is timed, every variant must
give the numbers of the formula in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from trm_fast.ops import OPS, token_mixer

from ._report import Row, Run, Table
from ._timing import Job, interleave

LENGTH, WIDTH, INNER = 97, 512, 512
BATCHES = {"cpu": (4, 16), "cuda": (768,)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCH, COMPILED = "torch operators", "torch operators, torch.compile"


def official(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Transpose, SwiGLU with weights cast at each use, transpose."""
    gate, up = linear(x.mT, gate_up.to(x.dtype)).chunk(2, -1)
    return linear(silu(gate) * up, down.to(x.dtype)).mT


def ours(backend: str):
    def mix(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return token_mixer(x, gate_up, down, backend=backend)

    return mix


def variants(device: str, dtype: torch.dtype) -> dict:
    found = {TORCH: official, COMPILED: torch.compile(official)}
    for backend in ("triton", "reference"):
        if OPS["token_mixer"].reason(backend, device, frozenset({dtype})) is None:
            found[f"trm_fast {backend}"] = ours(backend)
    found["trm_fast reference, torch.compile"] = torch.compile(ours("reference"), fullgraph=True)
    return found


def check(name: str, mix, given: list[Tensor], d_out: Tensor) -> None:
    """Raises AssertionError where a result is off by more than rounding explains: weights, gate,
    up, silu, act and d_act each once, the result once more."""
    pairs = []
    for function, cast in ((mix, lambda t: t), (official, Tensor.double)):
        leaves = [cast(t.detach()).requires_grad_() for t in given]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, cast(d_out))
        pairs.append([t.double() for t in (out, *grads)])
    for found, true in zip(*pairs, strict=True):
        error = float((found - true).abs().max() / true.abs().max())
        if not error <= 16 * torch.finfo(given[0].dtype).eps:
            raise AssertionError(f"{name}: error must be that of rounding; got {error:.2g}")


def jobs(functions: dict, given: list[Tensor], d_out: Tensor, backward: bool) -> list[Job]:
    def job(name: str, mix) -> Job:
        def step() -> None:
            if backward:
                torch.autograd.grad(mix(*given), given, d_out)
            else:
                with torch.no_grad():
                    mix(*given)

        return Job(name, step)

    return [job(name, mix) for name, mix in functions.items()]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "batch"), [(d, b) for d in BATCHES for b in BATCHES[d]])
def test_token_mixer(device: str, batch: int, dtype: str, backward: bool, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, LENGTH, WIDTH), (2 * INNER, LENGTH), (LENGTH, INNER), (batch, LENGTH, WIDTH))
    x, gate_up, down, d_out = (torch.randn(s, generator=generator).to(device) for s in shapes)
    x, d_out = x.to(DTYPES[dtype]), d_out.to(DTYPES[dtype])
    given = [x, gate_up / LENGTH**0.5, down / INNER**0.5]
    given = [t.requires_grad_() for t in given]
    functions = variants(device, DTYPES[dtype])
    for name, mix in functions.items():
        check(name, mix, given, d_out)
    timed = jobs(functions, given, d_out, backward)
    interleave(timed, run.rounds, device)
    rows = [Row(job.name, job.seconds, None) for job in timed]
    pass_ = "forward and backward" if backward else "forward"
    table = Table(f"token mixer, batch {batch}, {dtype}, {pass_} on {device}", rows, TORCH, "")
    flop = (18 if backward else 6) * LENGTH * INNER * WIDTH * batch
    table.notes = [f"{row.name}: {flop / row.median / 1e9:.0f} GFLOP/s" for row in rows]
    run.tables.append(table)
