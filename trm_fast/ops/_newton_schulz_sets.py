"""The coefficients of Newton-Schulz: published sets, and the restarts that a set asks for.

The meaning of the iteration is in trm_fast/ops/newton_schulz.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite, prod
from numbers import Real
from typing import Any

import torch

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class CoefficientSet:
    """A published set.

    Args:
        source: where it stands.
        triples: (a, b, c) of each step; the last one repeats.
        safety: each polynomial p(s) but a repeated last one is used as p(s / safety). Sets that are
            optimal on (0, 1] leave it at s = 1, where p is steep: rounding to bfloat16 can make a
            singular value 0.4 % larger than the norm, and the result then has the wrong sign.
        above: singular values up to 1 + above stay bounded.
    """

    source: str
    triples: tuple[Triple, ...]
    safety: float = 1.0
    above: float = 0.01

    def steps(self, count: int) -> tuple[Triple, ...]:
        """Returns the first ``count`` triples; the last one repeats."""
        kept = self.triples[:count] + self.triples[-1:] * (count - len(self.triples))
        return tuple(self._with_safety(triple) for triple in kept)

    def _with_safety(self, triple: Triple) -> Triple:
        a, b, c = triple
        # A polynomial that maps 1 to 1, and only there, needs no margin and would lose its limit.
        if abs(a + b + c - 1) < 1e-9:
            return triple
        return a / self.safety, b / self.safety**3, c / self.safety**5


KELLER = (3.4445, -4.7750, 2.0315)

SETS = {
    "polar_express": CoefficientSet(
        "Amsel et al. 2025, arXiv:2505.16932, with the safety factor of the paper",
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        safety=1.01,
    ),
    "keller": CoefficientSet("KellerJordan/Muon at 857d1ad, and torch.optim.Muon", (KELLER,)),
    "you": CoefficientSet(
        "J. You, in KellerJordan/modded-nanogpt at f411b3d3 and Dao-AILab/gram-newton-schulz",
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
    ),
    "cans": CoefficientSet(
        "Grishina et al. 2025, arXiv:2506.10935; the safety factor is ours",
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        safety=1.01,
    ),
    "cubic5": CoefficientSet(
        "arXiv:2606.00371; the safety factor is ours",
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        safety=1.01,
    ),
    "cubic": CoefficientSet("Schulz 1933, the Taylor polynomial", ((1.5, -0.5, 0.0),)),
    "deepseekv4": CoefficientSet(
        "eight of keller, then the quintic that polishes", (KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2
    ),
}


def triples_of(coefficients: str | Sequence[Any], steps: int, owner: str) -> tuple[Triple, ...]:
    """Returns (a, b, c) for each of ``steps``.

    Args:
        coefficients: name of a set, one triple for all steps, or one triple for each.
        steps: number of steps, >= 1.
        owner: who speaks in an error.

    Raises:
        ValueError: the name is unknown, a number not finite, or there are other than 1 or ``steps``
            triples.
        TypeError: ``coefficients`` holds something else.
    """
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"{owner}: steps must be an int; got {steps!r}")
    if steps < 1:
        raise ValueError(f"{owner}: steps must be >= 1; got {steps}")
    if isinstance(coefficients, str):
        if coefficients not in SETS:
            near = get_close_matches(coefficients, SETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{owner}: coefficients must be one of {', '.join(SETS)}, or triples; "
                f"got {coefficients!r}{hint}"
            )
        return SETS[coefficients].steps(steps)
    required = f"{owner}: coefficients must be a name, one (a, b, c), or {steps} of them"
    if not isinstance(coefficients, Sequence):
        raise TypeError(f"{required}; got {coefficients!r}")
    given = list(coefficients)
    if len(given) == 3 and not any(isinstance(part, Sequence) for part in given):
        given = [given] * steps
    if len(given) != steps:
        raise ValueError(f"{required}; got {len(given)}")
    return tuple(_triple(part, required) for part in given)


def _triple(part: Any, required: str) -> Triple:
    if not isinstance(part, Sequence) or not all(isinstance(number, Real) for number in part):
        raise TypeError(f"{required}; got {part!r}")
    if len(part) != 3 or not all(isfinite(number) for number in part):
        raise ValueError(f"{required}, finite; got {part!r}")
    a, b, c = part
    return float(a), float(b), float(c)


# How far below zero rounding can push an eigenvalue of R = X X^T, as seen on random matrices, and
# how far it may drift before the next restart: p(r) there is still positive and below 1.4 a.
_ROUNDING = {torch.bfloat16: 3.2e-3, torch.float16: 4e-4, torch.float32: 1e-6}
_DRIFT = 0.1


def restarts_of(triples: Sequence[Triple], dtype: torch.dtype) -> tuple[int, ...]:
    """Returns the steps, counted from 0, before which the Gram form computes R = X X^T anew.

    An eigenvalue r of R moves as r (a + b r + c r^2)^2. Rounding makes some of them negative; such
    a one grows by a^2 per step, where a true one turns back before it reaches 1. So it drifts by
    the product of a^2 over the steps since R was computed. There are as few restarts as keep it
    within ``_DRIFT``, placed where the largest drift is least: before steps 1 and 3 of five in
    bfloat16, before step 2 in float16.

    Args:
        triples: (a, b, c) of each step.
        dtype: of the arithmetic.
    """
    gains = [a * a for a, _, _ in triples[:-1]]
    allowed = _DRIFT / _ROUNDING.get(dtype, 1e-14)
    fewest = len(_cut(gains, allowed))
    if fewest == 0:
        return ()
    drifts = {prod(gains[i:j]) for j in range(len(gains) + 1) for i in range(j)}
    cuts = (_cut(gains, drift) for drift in sorted(drifts | {1.0, allowed}))
    return next(cut for cut in cuts if len(cut) <= fewest)


def _cut(gains: Sequence[float], limit: float) -> tuple[int, ...]:
    """Returns where to restart so that no product of gains in between exceeds ``limit``.

    It cuts from the end, because early steps, where singular values are small, suffer most.
    """
    found: list[int] = []
    drift = 1.0
    for step in range(len(gains), 0, -1):
        drift *= gains[step - 1]
        if drift > limit * (1 + 1e-9):
            found.insert(0, step)
            drift = 1.0
    return tuple(found)
