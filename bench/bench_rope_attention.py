"""rope_attention beside the operators of official TRM, eager and compiled, with their gradients.

8 heads of 64 over 97 tokens, views of one fused projection as in the model. Before anything is
timed, every variant must give the numbers of the formula in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trm_fast.ops import OPS, rope_attention

from ._report import Row, Run, Table
from ._timing import Job, interleave

LENGTH, HEADS, DIM = 97, 8, 64
BATCHES = {"cpu": (4, 16), "cuda": (768,)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCH, COMPILED = "torch operators", "torch operators, torch.compile"


def official(cos: Tensor, sin: Tensor):
    """The rotation by cat and neg in float32, and torch's attention."""

    def rotate(x: Tensor) -> Tensor:
        wide = x.float()
        turned = torch.cat((-wide[..., DIM // 2 :], wide[..., : DIM // 2]), -1)
        return (wide * cos + turned * sin).to(x.dtype)

    def attend(fused: Tensor) -> Tensor:
        q, k, v = fused.unflatten(2, (3, HEADS, DIM)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q), rotate(k), v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return attend


def ours(backend: str):
    def attend(fused: Tensor) -> Tensor:
        return rope_attention(*fused.unflatten(2, (3, HEADS, DIM)).unbind(2), backend=backend)

    return attend


def variants(device: str, dtype: torch.dtype) -> dict:
    frequency = 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
    angle = torch.outer(torch.arange(LENGTH).double(), frequency)
    cos, sin = (
        torch.cat((t, t), 1)[:, None].to(device, torch.float32) for t in (angle.cos(), angle.sin())
    )
    found = {TORCH: official(cos, sin), COMPILED: torch.compile(official(cos, sin))}
    for backend in ("triton", "reference"):
        if OPS["rope_attention"].reason(backend, device, frozenset({dtype})) is None:
            found[f"trm_fast {backend}"] = ours(backend)
    found["trm_fast reference, torch.compile"] = torch.compile(ours("reference"), fullgraph=True)
    return found


def truth(fused: Tensor) -> Tensor:
    return ours("reference")(fused.double())


def check(name: str, attend, fused: Tensor, d_out: Tensor) -> None:
    """Raises AssertionError where output or gradient is off by more than rounding explains: q', k',
    P, d_S and the result each once, which logits of up to 6 enlarge."""
    pairs = []
    for function, x, d in ((attend, fused, d_out), (truth, fused.double(), d_out.double())):
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        pairs.append((out.double(), torch.autograd.grad(out, leaf, d)[0].double()))
    for found, true in zip(*pairs, strict=True):
        error = float((found - true).abs().max() / true.abs().max())
        if not error <= 16 * torch.finfo(fused.dtype).eps:
            raise AssertionError(f"{name}: error must be that of rounding; got {error:.2g}")


def jobs(functions: dict, fused: Tensor, d_out: Tensor, backward: bool) -> list[Job]:
    def job(name: str, attend) -> Job:
        def step() -> None:
            if backward:
                torch.autograd.grad(attend(fused), fused, d_out)
            else:
                with torch.no_grad():
                    attend(fused)

        return Job(name, step)

    return [job(name, attend) for name, attend in functions.items()]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "batch"), [(d, b) for d in BATCHES for b in BATCHES[d]])
def test_rope_attention(device: str, batch: int, dtype: str, backward: bool, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    shape = (batch, LENGTH, 3 * HEADS * DIM)
    fused = torch.randn(shape, generator=generator).to(device, DTYPES[dtype]).requires_grad_()
    d_out = torch.randn(batch, LENGTH, HEADS * DIM, generator=generator).to(fused)
    functions = variants(device, DTYPES[dtype])
    for name, attend in functions.items():
        check(name, attend, fused, d_out)
    timed = jobs(functions, fused, d_out, backward)
    interleave(timed, run.rounds, device)
    moved = fused.element_size() * fused.numel() // 3 * (11 if backward else 4)
    rows = [Row(job.name, job.seconds, moved) for job in timed]
    pass_ = "forward and backward" if backward else "forward"
    run.tables.append(
        Table(f"attention, batch {batch}, {dtype}, {pass_} on {device}", rows, TORCH, "")
    )
