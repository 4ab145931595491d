"""The formula of stablemax_cross_entropy in float64, and the inputs of its tests."""

import torch
from torch import Tensor

KINDS = ("stablemax", "softmax")
IGNORED = -100
U = 2.0**-24  # a rounding in float32
# Below the normal numbers of float32 nothing has to be right.
FLOOR = 2.0**-110


def scores_of(logits: Tensor, kind: str) -> Tensor:
    """log s(v)"""
    v = logits.detach().double()
    if kind == "softmax":
        return v
    return torch.where(v < 0, -torch.log(1 - v), torch.log(v.clamp(min=0) + 1))


def truth(logits: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns the loss of each sequence and the gradient of their sum, in float64.

    1 - p is the sum of the other probabilities, and -log p its log1p, so that float64 is exact to
    its own rounding where p is 1 but for little.
    """
    valid = labels != IGNORED
    count = valid.sum(-1).clamp(min=1)
    target = labels.long().where(valid, 0)[..., None]
    scores = scores_of(logits, kind)
    p = scores.softmax(-1)
    own = torch.zeros_like(p).scatter(-1, target, 1.0)
    missing = (p * (1 - own)).sum(-1, keepdim=True)
    plain = -scores.log_softmax(-1).gather(-1, target)
    token = torch.where(missing < 0.5, -torch.log1p(-missing), plain)[..., 0]
    loss = token.where(valid, 0.0).sum(-1) / count
    slope = 1 if kind == "softmax" else 1 / (1 + logits.detach().double().abs())
    gradient = torch.where(own.bool(), -missing, p) * slope / count[:, None, None]
    return loss, gradient.where(valid[..., None], 0.0)


def bound(logits: Tensor, kind: str) -> float:
    """Largest relative error of a loss or of a gradient.

    Each ratio is off by three roundings, their sum by up to 32 more where it is of float32, the
    logarithm by two, and log(2) is the least that a product with other roundings has under it:
    64 U. Scores taken by logarithm or exponential are off by 8 U of their spread, of which what
    exceeds 100 makes a ratio vanish.
    """
    scores = scores_of(logits, kind)
    spread = (scores.amax(-1) - scores.amin(-1)).max().item() if logits.numel() else 0.0
    return (64 + 8 * min(spread, 100.0)) * U


def draw(shape: tuple[int, int, int], scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels; the second sequence is all right, and every seventh label is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator)
    labels = torch.randint(shape[2], shape[:2], generator=generator)
    if shape[0] > 1:
        labels[1] = logits[1].argmax(-1)
    labels[:, 3::7] = IGNORED
    return logits, labels


def check_gradient(found: Tensor, true: Tensor, relative: float) -> None:
    """Compares with the largest gradient of each token, and adds the rounding of the dtype.

    A unit in the last place, not half of it: the interpreter rounds bfloat16 towards zero.
    """
    own = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    least = torch.finfo(found.dtype).smallest_normal if found.dtype == torch.float16 else FLOOR
    allowed = (relative + own) * true.abs().amax(-1, keepdim=True) + least * 2.0**-8 + FLOOR
    assert ((found.double().cpu() - true).abs() <= allowed).all()
