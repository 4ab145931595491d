"""The recursion: ours beside the official model in plain torch, eager and under torch.compile.

Each table is one model, batch, dtype and device: one supervision step without gradients, and one
with loss and backward pass. Before a table is measured, the logits of both models are compared with
the plain model in float64. The rate of a row stands beside that of a large product. The work of
computing something once more is not counted: it is no part of the task.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import trm_fast
from trm_fast.nn import TinyRecursiveModel, TRMConfig

from ._plain_trm import PlainTRM, plain_loss
from ._tables import DEVICES, Case, Row, rows_of
from ._timing import extra_bytes

GEMM = "torch product, 2048 x 2048 x 2048"
EAGER, COMPILED = "plain torch", "plain torch, torch.compile"
OURS, KEPT = "trm_fast", "trm_fast, recompute=False"
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
# Those that are measured by default on a CPU.
FEW = (("sudoku_mlp", 4),)


@dataclass(eq=False)
class Variant:
    """A way to take a supervision step.

    Args:
        name: its row.
        model: "plain" or "ours".
        module: whose parameters get gradients.
        step: states to logits and q_halt.
        loss: logits, labels and q_halt to the loss.
    """

    name: str
    model: str
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
    return Variant(
        name, "plain", model, run, torch.compile(loss, dynamic=False) if compiled else loss
    )


def _ours(name: str, model: TinyRecursiveModel, recompute: bool) -> Variant:
    def step(y: Tensor, z: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        model.recursion.recompute = recompute
        outputs = model.step(y, z, data)[2]
        return outputs.logits, outputs.q_halt

    def loss(logits: Tensor, labels: Tensor, q_halt: Tensor) -> Tensor:
        return trm_fast.losses.halting_loss(logits, labels, q_halt).loss

    return Variant(name, "ours", model, step, loss)


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

    def variant(self, name: str) -> Variant:
        if name in (EAGER, COMPILED):
            return _plain(name, self.plain, name == COMPILED)
        return _ours(name, self.ours, recompute=name == OURS)

    def forward(self, variant: Variant) -> Tensor:
        with torch.no_grad():
            return variant.step(*self.states, self.data)[0]

    def train(self, variant: Variant) -> None:
        self.backward(variant, self.loss(variant))

    def loss(self, variant: Variant) -> Tensor:
        logits, q = variant.step(*self.states, self.data)
        return variant.loss(logits, self.data["labels"], q)

    def backward(self, variant: Variant, loss: Tensor) -> None:
        _clear(variant)
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
    """Returns the error of the logits of both models against float64, on two sequences.

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
        for variant in (workload.variant(EAGER), workload.variant(OURS)):
            found = variant.step(*states, two)[0].double()
            errors[variant.model] = float((found - true).norm() / true.norm())
    if not errors["ours"] <= 2 * errors["plain"]:
        raise AssertionError(
            f"logits: error must be <= 2 x {errors['plain']}; got {errors['ours']}"
        )
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


class LatentUpdate:
    """Ours and the plain model with the same weights, in one pass."""

    baselines = (EAGER, COMPILED)
    floor = GEMM
    unit = "FLOP"

    def __init__(self, name: str, batch: int, device: str, dtype: str, mode: str) -> None:
        base, overrides = MODELS[name]
        self.config = replace(trm_fast.nn.CONFIGS[base], forward_dtype=dtype, **overrides)
        self.device, self.training = device, mode == "training step"
        self.workload = Workload(self.config, batch, device)
        self.errors = _judge(self.workload)
        torch._dynamo.reset()  # or the compiler gives up on what it has compiled for other sizes

    def row(self, name: str) -> Row:
        if name == GEMM:
            a = torch.randn(2048, 2048).to(self.device, self.config.dtype)
            return Row(lambda: a @ a, work=2 * 2048**3)
        variant = self.workload.variant(name)
        run = self.workload.train if self.training else self.workload.forward
        run(variant)  # compiles
        cycles, calls = self.config.H_cycles, self.config.L_cycles + 1
        calls *= cycles + 2 * self.training
        work = 2 * calls * self.workload.batch * multiply_adds(self.config, self.workload.plain)
        return Row(lambda: run(variant), work=work, facts=lambda: self._facts(variant))

    def _facts(self, variant: Variant) -> dict[str, float]:
        facts: dict[str, float] = {"error": self.errors[variant.model]}
        if self.training:
            facts["kept_bytes"] = self.workload.kept(variant)
            facts["extra_bytes"] = extra_bytes(
                lambda: _clear(variant), lambda: self.workload.train(variant), self.device
            )
        return facts


def _clear(variant: Variant) -> None:
    for parameter in variant.module.parameters():
        parameter.grad = None


def _case(name: str, batch: int, device: str, dtype: str, mode: str) -> Case:
    training = mode == "training step"
    rows = (EAGER, OURS, *([KEPT] if training else []), GEMM)
    default = dtype == "bfloat16" and (batch == 768 or (name, batch) in FEW)
    return Case(
        f"{name}-{batch}-{device}-{dtype}-{mode}",
        f"{name}, batch {batch}, {dtype}, {mode}, {device}",
        # Compiling it takes minutes.
        partial(LatentUpdate, name, batch, device, dtype, mode), rows, (COMPILED,), default,
    )  # fmt: skip


test_latent_update = rows_of(
    _case(name, batch, device, dtype, mode)
    for name, batch, device in SIZES
    if device in DEVICES
    for dtype in DTYPES
    for mode in ("forward", "training step")
)
