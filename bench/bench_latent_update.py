"""The recursion: ours beside the official model in plain torch, eager and under torch.compile.

Each table is one model, batch, dtype and device: one supervision step without gradients, and one
with loss and backward pass. Before anything is timed, the logits of every variant are compared with
the plain model in float64. Below a table stand the rate of each variant over that of a large
product measured in the same run, and what it keeps for the backward pass. The work of computing
something once more is not counted: it is no part of the task.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import trm_fast
from trm_fast.nn import TinyRecursiveModel, TRMConfig

from ._plain_trm import PlainTRM, plain_loss
from ._report import Row, Run, Table, in_bytes
from ._timing import Job, extra_bytes, interleave

GEMM = "torch product, 2048 x 2048 x 2048"
EAGER, COMPILED = "plain torch", "plain torch, torch.compile"
# Hidden 128 and 81 tokens, without slots for a puzzle vector.
SMALL = {"hidden_size": 128, "num_heads": 4, "puzzle_emb_len": 0, "puzzle_emb_ndim": 0}
MODELS = {
    "sudoku_mlp": ("sudoku_mlp", {}),
    "sudoku_attention": ("sudoku_attention", {}),
    "small_mlp": ("sudoku_mlp", SMALL),
    "small_attention": ("sudoku_attention", SMALL),
}
SIZES = [
    *((model, batch, "cpu") for model in ("sudoku_mlp", "sudoku_attention") for batch in (4, 16)),
    *((model, 64, "cpu") for model in ("small_mlp", "small_attention")),
    *((model, 768, "cuda") for model in ("sudoku_mlp", "sudoku_attention")),
]
DTYPES = ("bfloat16", "float32")


@dataclass(eq=False)
class Variant:
    """A way to take a supervision step.

    Args:
        name: its row.
        module: whose parameters get gradients.
        step: states to logits and q_halt.
        loss: logits, labels and q_halt to the loss.
    """

    name: str
    module: nn.Module
    step: Callable[[Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]


def _plain(name: str, model: PlainTRM, compiled: bool) -> Variant:
    def step(y: Tensor, z: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        _, _, logits, q = model.step(y, z, data)
        return logits, q

    def loss(logits: Tensor, labels: Tensor, q: Tensor) -> Tensor:
        return plain_loss(logits, labels, q)

    run = torch.compile(step, dynamic=False) if compiled else step
    return Variant(name, model, run, torch.compile(loss, dynamic=False) if compiled else loss)


def _ours(name: str, model: TinyRecursiveModel, recompute: bool) -> Variant:
    def step(y: Tensor, z: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        model.recursion.recompute = recompute
        outputs = model.step(y, z, data)[2]
        return outputs.logits, outputs.q_halt

    def loss(logits: Tensor, labels: Tensor, q_halt: Tensor) -> Tensor:
        return trm_fast.losses.halting_loss(logits, labels, q_halt).loss

    return Variant(name, model, step, loss)


class Workload:
    """A model in both forms with the same weights, states and sequences."""

    def __init__(self, config: TRMConfig, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.config, self.batch, self.device = config, batch, device
        self.plain = PlainTRM(config).to(device)
        self.ours = TinyRecursiveModel(config).to(device)
        self.ours.load_official(self.plain.state_dict())
        size = (batch, config.length, config.hidden_size)
        self.states = [torch.randn(size).to(device, config.dtype) for _ in range(2)]
        shape = (batch, config.seq_len)
        self.data = {
            "inputs": torch.randint(1, config.vocab_size, shape),
            "labels": torch.randint(1, config.vocab_size, shape),
            "puzzle_identifiers": torch.zeros(batch, dtype=torch.int64),
        }
        self.data = {name: value.to(device) for name, value in self.data.items()}

    def variants(self) -> list[Variant]:
        torch._dynamo.reset()  # or the compiler gives up on what it has compiled for other sizes
        return [
            _plain(EAGER, self.plain, False),
            _plain(COMPILED, self.plain, True),
            _ours("trm_fast", self.ours, True),
            _ours("trm_fast, recompute=False", self.ours, False),
        ]

    def forward(self, variant: Variant) -> Tensor:
        with torch.no_grad():
            return variant.step(*self.states, self.data)[0]

    def train(self, variant: Variant) -> None:
        self.backward(variant, self.loss(variant))

    def loss(self, variant: Variant) -> Tensor:
        logits, q = variant.step(*self.states, self.data)
        return variant.loss(logits, self.data["labels"], q)

    def backward(self, variant: Variant, loss: Tensor) -> None:
        for parameter in variant.module.parameters():
            parameter.grad = None
        loss.backward()

    def kept(self, variant: Variant) -> int:
        """Returns the bytes kept for the backward pass, beyond the parameters."""
        given = {tensor.untyped_storage().data_ptr() for tensor in variant.module.parameters()}
        found: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                found[storage.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss(variant)
        del loss
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def _judge(workload: Workload) -> dict[str, float]:
    """Returns the error of the logits of each variant against float64, on two sequences.

    Raises:
        AssertionError: ours is more than twice that of the plain model.
    """
    config = replace(workload.config, forward_dtype="float64")
    exact = PlainTRM(config).to(workload.device)
    exact.load_state_dict(workload.plain.state_dict())
    exact.double()
    two = {name: value[:2] for name, value in workload.data.items()}
    states = [state[:2] for state in workload.states]
    errors = {}
    with torch.no_grad():
        true = exact.step(*(state.double() for state in states), two)[2]
        for variant in (_plain(EAGER, workload.plain, False), _ours("ours", workload.ours, True)):
            found = variant.step(*states, two)[0].double()
            errors[variant.name] = float((found - true).norm() / true.norm())
    if not errors["ours"] <= 2 * errors[EAGER]:
        raise AssertionError(f"logits: error must be <= 2 x {errors[EAGER]}; got {errors['ours']}")
    return errors


def multiply_adds(config: TRMConfig, model: PlainTRM) -> float:
    """Of the products in one call of the network, for one sequence."""
    length, width = config.length, config.hidden_size
    total = 0.0
    for name, weight in model.L_level.named_parameters():
        total += weight.numel() * (width if "mlp_t" in name else length)
    if not config.mlp_t:
        total += config.L_layers * 2 * length**2 * width
    return total


def _gemm(config: TRMConfig, device: str) -> Job:
    a = torch.randn(2048, 2048).to(device, config.dtype)
    return Job(GEMM, lambda: a @ a)


@pytest.mark.parametrize("mode", ["forward", "training step"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "batch", "device"), SIZES)
def test_latent_update(name: str, batch: int, device: str, dtype: str, mode: str, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    base, overrides = MODELS[name]
    config = replace(trm_fast.nn.CONFIGS[base], forward_dtype=dtype, **overrides)
    workload = Workload(config, batch, device)
    errors = _judge(workload)
    variants = workload.variants()
    training = mode == "training step"
    take = workload.train if training else workload.forward
    jobs = [Job(variant.name, _bound(take, variant)) for variant in variants]
    gemm = _gemm(config, device)
    for job in jobs:
        job.step()  # compiles
    interleave([*jobs, gemm], run.rounds, device)
    rows = [
        _row(workload, job, variant, training) for job, variant in zip(jobs, variants, strict=True)
    ]
    title = f"{name}, batch {batch}, {dtype}, {mode} on {device}"
    table = Table(title, [*rows, Row(GEMM, gemm.seconds, None)], COMPILED, "")
    calls = config.H_cycles * (config.L_cycles + 1) + 2 * training * (config.L_cycles + 1)
    work = 2 * calls * batch * multiply_adds(config, workload.plain)
    table.notes = [
        f"error of the logits: {errors['ours']:.1e}, of the plain model {errors[EAGER]:.1e}",
        *_notes(workload, table, variants, work, training),
    ]
    run.tables.append(table)


def _bound(take: Callable[[Variant], object], variant: Variant) -> Callable[[], object]:
    return lambda: take(variant)


def _row(workload: Workload, job: Job, variant: Variant, training: bool) -> Row:
    if not training:
        return Row(job.name, job.seconds, None)

    def clear() -> None:
        for parameter in variant.module.parameters():
            parameter.grad = None

    extra = extra_bytes(clear, lambda: workload.train(variant), workload.device)
    return Row(job.name, job.seconds, None, extra=extra)


def _notes(
    workload: Workload, table: Table, variants: list[Variant], work: float, training: bool
) -> list[str]:
    peak = 2 * 2048**3 / table.row(GEMM).median
    notes = [f"{GEMM}: {peak / 1e9:.0f} GFLOP/s"]
    eager, compiled = table.row(EAGER).median, table.row(COMPILED).median
    for variant in variants:
        row = table.row(variant.name)
        rate = work / row.median
        note = (
            f"{variant.name}: {rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of the product; "
            f"{eager / row.median:.2f}x eager, {compiled / row.median:.2f}x compiled"
        )
        if training:
            note += f"; keeps {in_bytes(workload.kept(variant))} for backward"
        notes.append(note)
    return notes
