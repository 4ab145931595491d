"""ListOps in Python; the meaning is in listops.py."""

from collections.abc import Sequence

from trm_fast.data._reference.random import Random

PAD, ZERO = 0, 1
MAX, MIN, MED, SUM, CLOSE = range(11, 16)


def generate(
    max_length: int, max_depth: int, max_args: int, nesting: float, random: Random
) -> list[int] | None:
    """Makes one attempt at an expression; None if it is too long."""
    tokens: list[int] = []
    missing: list[int] = []  # arguments that each open operation still needs

    def start() -> None:
        tokens.append(MAX + random.below(4))
        missing.append(2 + random.below(max_args - 1))

    start()
    while missing:
        if len(tokens) + sum(missing) + len(missing) > max_length:
            return None
        if missing[-1] == 0:
            tokens.append(CLOSE)
            missing.pop()
            continue
        missing[-1] -= 1
        if len(missing) < max_depth and random.uniform() < nesting:
            start()
        else:
            tokens.append(ZERO + random.below(10))
    return tokens


def evaluate(tokens: Sequence[int]) -> int:
    """Returns the value, or -1 if this is not one expression with nothing but padding behind it."""
    end = len(tokens)
    while end and tokens[end - 1] == PAD:
        end -= 1
    opened: list[tuple[int, list[int]]] = []  # operations and their arguments so far
    values: list[int] = []
    for position, token in enumerate(tokens[:end]):
        if position and not opened:
            return -1
        if MAX <= token < CLOSE:
            opened.append((token, values))
            values = []
        elif token == CLOSE and values:
            operation, outer = opened.pop()
            values = [*outer, _apply(operation, values)]
        elif ZERO <= token < MAX:
            values.append(token - ZERO)
        else:
            return -1
    return values[0] if len(values) == 1 and not opened else -1


def _apply(operation: int, values: list[int]) -> int:
    if operation == SUM:
        return sum(values) % 10
    ordered = sorted(values)
    middle = ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]
    return {MIN: ordered[0], MAX: ordered[-1], MED: middle // 2}[operation]
