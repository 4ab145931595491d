"""halting_loss against the official formula in float64."""

import math
import re

import pytest
import torch

from trm_fast.losses import HaltingLoss, halting_loss

IGNORED = -100
METRICS = ("count", "accuracy", "exact_accuracy", "q_halt_accuracy", "steps")
# About forty roundings in float32 of a sum of positive numbers, and those of the batch.
RELATIVE = 128 * 2.0**-24


def bce(q: float, target: float) -> float:
    p = 1 / (1 + math.exp(-q))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def stablemax(v: float) -> float:
    return v + 1 if v >= 0 else 1 / (1 - v)


def official(case: dict) -> dict[str, float]:
    """The formula, one sequence after the other in Python's floats."""
    sums = dict.fromkeys(("lm_loss", "q_halt_loss", "q_continue_loss", *METRICS), 0.0)
    for b, (rows, labels) in enumerate(
        zip(case["logits"].tolist(), case["labels"].tolist(), strict=True)
    ):
        pairs = [(row, y) for row, y in zip(rows, labels, strict=True) if y != IGNORED]
        if not pairs:
            continue
        own = [stablemax(row[y]) / sum(map(stablemax, row)) for row, y in pairs]
        right = sum(row.index(max(row)) == y for row, y in pairs)
        exact, q = right == len(pairs), case["q_halt"][b].item()
        sums["lm_loss"] -= sum(map(math.log, own)) / len(pairs)
        sums["q_halt_loss"] += bce(q, float(exact))
        if "q_continue" in case:
            target = case["target_continue"][b].item()
            sums["q_continue_loss"] += bce(case["q_continue"][b].item(), target)
        if case.get("halted") is None or case["halted"][b]:
            sums["count"] += 1
            sums["accuracy"] += right / len(pairs)
            sums["exact_accuracy"] += exact
            sums["q_halt_accuracy"] += (q >= 0) == exact
            sums["steps"] += case["steps"][b].item() if "steps" in case else 0
    return sums


def make(batch: int = 9, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((batch, 7, 6), generator=generator)
    labels = torch.randint(6, (batch, 7), generator=generator)
    labels[::3] = logits[::3].argmax(-1)  # exact
    labels[:, 2] = IGNORED
    labels[1::4] = IGNORED  # nothing to predict
    return {"logits": logits, "labels": labels, "q_halt": torch.randn(batch, generator=generator)}


def with_everything() -> dict[str, torch.Tensor]:
    case = make()
    generator = torch.Generator().manual_seed(1)
    case["q_continue"] = torch.randn(9, generator=generator)
    case["target_continue"] = torch.rand(9, generator=generator)
    case["halted"] = torch.tensor([True, True, True, False, False, True, True, False, True])
    case["steps"] = torch.arange(1, 10, dtype=torch.int32)
    return case


@pytest.mark.parametrize("weight", [0.5, 1.0, 0.0])
@pytest.mark.parametrize("divisor", [None, 768])
@pytest.mark.parametrize("everything", [False, True])
def test_the_loss_is_the_official_one(everything, divisor, weight):
    case = with_everything() if everything else make()
    true = official(case)
    found = halting_loss(**case, divisor=divisor, halt_weight=weight)
    scale = 1 / (divisor or 9)
    for name in ("lm_loss", "q_halt_loss", "q_continue_loss"):
        assert found.metrics[name].item() == pytest.approx(scale * true[name], rel=RELATIVE)
    halting = true["q_halt_loss"] + true["q_continue_loss"]
    loss = scale * (true["lm_loss"] + weight * halting)
    assert found.loss.item() == pytest.approx(loss, rel=RELATIVE)


@pytest.mark.parametrize("everything", [False, True])
def test_the_metrics_are_the_official_ones(everything):
    case = with_everything() if everything else make()
    true = official(case)
    found = halting_loss(**case)
    for name in METRICS:
        assert found.metrics[name].item() == pytest.approx(true[name], rel=RELATIVE)
    assert 0 < true["exact_accuracy"] < true["count"] < 9
    assert torch.equal(found.predictions, case["logits"].argmax(-1))


def test_a_logit_of_zero_says_halt():
    case = make(1)
    case["q_halt"] = torch.zeros(1)
    assert halting_loss(**case).metrics["q_halt_accuracy"] == 1


def test_gradients_are_those_of_the_parts():
    case = {k: v.double() if v.is_floating_point() else v for k, v in with_everything().items()}
    names = ("logits", "q_halt", "q_continue")

    def loss(*tensors):
        return halting_loss(**(case | dict(zip(names, tensors, strict=True)))).loss

    assert torch.autograd.gradcheck(loss, [case[name].requires_grad_() for name in names])


def test_only_the_loss_carries_a_gradient():
    case = with_everything()
    for tensor in case.values():
        tensor.requires_grad_(tensor.is_floating_point())
    found = halting_loss(**case)
    tensors = {"loss": found.loss, "exact": found.exact, **found.metrics}
    assert [name for name, value in tensors.items() if value.requires_grad] == ["loss"]
    found.loss.backward()
    assert case["target_continue"].grad is None


def test_a_sequence_without_labels_has_no_part_in_it():
    case = with_everything()
    case["q_halt"].requires_grad_()
    found = halting_loss(**case)
    (gradient,) = torch.autograd.grad(found.loss, case["q_halt"])
    empty = (case["labels"] == IGNORED).all(-1)
    assert torch.equal(gradient == 0, empty) and not found.exact[empty].any()
    rest = {name: value[~empty] for name, value in case.items()}
    fewer = halting_loss(**rest, divisor=9)
    assert fewer.loss.item() == pytest.approx(found.loss.item(), rel=RELATIVE)
    for name, value in found.metrics.items():
        assert fewer.metrics[name].item() == pytest.approx(value.item(), rel=RELATIVE)


def test_what_fills_up_a_batch_may_hold_anything():
    case = make()
    empty = (case["labels"] == IGNORED).all(-1)
    expected = halting_loss(**case)
    case["logits"][empty], case["q_halt"][empty] = math.nan, math.nan
    for name in ("logits", "q_halt"):
        case[name].requires_grad_()
    found = halting_loss(**case)
    assert found.loss == expected.loss
    gradients = torch.autograd.grad(found.loss, [case["logits"], case["q_halt"]])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_batch_without_sequences():
    found = halting_loss(torch.zeros(0, 7, 6), torch.zeros(0, 7, dtype=torch.int64), torch.zeros(0))
    assert found.loss == 0 and not any(found.metrics.values())


def test_sums_add_up_over_parts_of_a_batch():
    case = with_everything()
    whole = halting_loss(**case)
    first, second = (
        halting_loss(**{name: value[part] for name, value in case.items()}, divisor=9)
        for part in (slice(0, 4), slice(4, 9))
    )
    assert (first.loss + second.loss).item() == pytest.approx(whole.loss.item(), rel=RELATIVE)
    for name, value in whole.metrics.items():
        total = (first.metrics[name] + second.metrics[name]).item()
        assert total == pytest.approx(value.item(), rel=RELATIVE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_logits_in_16_bits_are_float32(dtype):
    case = make()
    narrow = case | {name: case[name].to(dtype) for name in ("logits", "q_halt")}
    wide = case | {name: narrow[name].float() for name in ("logits", "q_halt")}
    found, expected = halting_loss(**narrow), halting_loss(**wide)
    assert found.loss.dtype == torch.float32 and found.loss == expected.loss


def test_softmax_and_another_ignored_label():
    case = make(4)
    case["labels"][:] = 1
    case["labels"][0, 3] = 5
    plain = torch.nn.functional.cross_entropy(
        case["logits"].flatten(0, 1), case["labels"].flatten(), ignore_index=5, reduction="none"
    ).view(4, 7)
    expected = (plain.sum(-1) / torch.tensor([6, 7, 7, 7])).mean()
    found = halting_loss(**case, ignore_index=5, kind="softmax")
    assert found.metrics["lm_loss"].item() == pytest.approx(expected.item(), rel=RELATIVE)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_equals_the_reference(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(halting_loss, fullgraph=True, backend=compiler)
    case = with_everything()
    case["logits"].requires_grad_()
    found, expected = compiled(**case), halting_loss(**case, backend="reference")
    assert isinstance(found, HaltingLoss)
    assert found.loss == expected.loss and torch.equal(found.predictions, expected.predictions)
    assert found.metrics == expected.metrics
    gradients = [
        torch.autograd.grad(result.loss, case["logits"])[0] for result in (found, expected)
    ]
    assert torch.equal(*gradients)
    torch._dynamo.reset()


B = torch.zeros(3)
WRONG = {
    "q_halt": ({"q_halt": B[:2]}, "q_halt must be [3] as the batch; got (2,)"),
    "q_halt wide": ({"q_halt": B[:, None]}, "q_halt must be [3] as the batch; got (3, 1)"),
    "steps": ({"steps": B[:1]}, "steps must be [3] as the batch; got (1,)"),
    "halted": ({"halted": B}, "halted must be bool; got torch.float32"),
    "one of two": (
        {"q_continue": B},
        "q_continue and target_continue must be given together; got one of them",
    ),
    "the other": (
        {"target_continue": B},
        "q_continue and target_continue must be given together; got one of them",
    ),
    "divisor": ({"divisor": 0}, "divisor must be > 0; got 0"),
    "divisor nan": ({"divisor": math.nan}, "divisor must be > 0; got nan"),
    "weight": ({"halt_weight": -0.5}, "halt_weight must be >= 0; got -0.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name):
    arguments, words = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(f'halting_loss: {words}')}$"):
        halting_loss(**(make(3) | arguments))
