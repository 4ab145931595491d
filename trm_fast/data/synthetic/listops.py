"""ListOps: nested operations on lists of digits, whose value is a digit.

    [MAX 2 9 [MIN 4 7 ] 0 ]  =  9

Operations: MAX; MIN; MED, the median, which for an even number of arguments is the mean of the two
in the middle, rounded down; SM, the sum modulo 10.

An expression is an operation drawn from the four with 2 to ``max_args`` arguments; an argument is
another operation with the probability ``nesting``, where ``max_depth`` allows it, and else a digit.
Expressions that are too long or too short are thrown away, so a small ``max_length`` has fewer
nested ones. No two expressions are alike.

Tokens: 0 padding; 1 to 10 the digits 0 to 9; 11 to 14 "[MAX", "[MIN", "[MED", "[SM"; 15 "]"; the
vocabulary has 16. An opening bracket and its operation are one token, as in the paper.

Source: Nangia and Bowman 2018, arXiv:1804.06028 (operations, up to 5 arguments, a quarter of the
arguments nested). Tay et al. 2020, arXiv:2011.04006, use up to 10 arguments, depth 10 and lengths
from 500 to 2000.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_fast.data import _items, _native

WORDS = ("", *"0123456789", "[MAX", "[MIN", "[MED", "[SM", "]")

# Expressions in one native call: each takes about a microsecond.
_PIECE = 4096
_SHORTEST = 4  # an operation, two digits and a bracket


def generate_listops(
    count: int,
    max_length: int,
    *,
    min_length: int = _SHORTEST,
    max_depth: int = 10,
    max_args: int = 5,
    nesting: float = 0.25,
    seed: int = 0,
    threads: int | None = None,
    attempts: int = 1000,
    native: bool | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Makes random expressions, no two alike, and their values.

    An item depends on the seed and its place alone: not on ``threads``, ``native``, or how many are
    made. Parts of one call have nothing in common; two calls with different seeds may.

    Args:
        count: number of expressions, >= 0.
        max_length: most tokens of an expression, 4 to 100,000.
        min_length: least tokens, 4 to ``max_length``.
        max_depth: most operations inside of each other, 1 to 1000.
        max_args: most arguments of an operation, 2 to 100.
        nesting: probability that an argument is an operation, in [0, 1].
        seed: in [0, 2^64).
        threads: of the C++ form; None for as many as there are cores.
        attempts: expressions to try for one item before an error.
        native: True for C++, False for Python, None for C++ if it is built.

    Returns:
        Tokens, uint8 [count, max_length], padded behind; and values, int64 [count], 0 to 9.

    Raises:
        TypeError: a number is of another type.
        ValueError: an argument is out of range, or an expression has used up its attempts.
        BackendError: ``native`` is True and the C++ form cannot be used.
    """
    who = "generate_listops"
    max_length = _items.number(who, "max_length", max_length, _SHORTEST, 100_000)
    min_length = _items.number(who, "min_length", min_length, _SHORTEST, max_length)
    max_depth = _items.number(who, "max_depth", max_depth, 1, 1000)
    max_args = _items.number(who, "max_args", max_args, 2, 100)
    if not 0 <= nesting <= 1:
        raise ValueError(f"{who}: nesting must be from 0 to 1; got {nesting}")
    module = _native.choose(who, native)

    def generate(items: Any) -> Any:
        return module.generate_listops(
            items, min_length, max_length, max_depth, max_args, float(nesting)
        )

    (tokens,) = _items.distinct_items(who, module, generate, count, seed, threads, attempts, _PIECE)
    return tokens, evaluate_listops(tokens, threads=threads, native=native)


def evaluate_listops(
    tokens: NDArray[Any], *, threads: int | None = None, native: bool | None = None
) -> NDArray[np.int64]:
    """Returns the values of expressions, int64 [count].

    Args:
        tokens: integers [count, length], padded behind.
        threads: of the C++ form; None for as many as there are cores.
        native: True for C++, False for Python, None for C++ if it is built.

    Raises:
        TypeError: the tokens are no integers.
        ValueError: they have another shape or values other than 0 to 15, or a row is not one
            expression.
        BackendError: ``native`` is True and the C++ form cannot be used.
    """
    who = "evaluate_listops"
    tokens = _items.grids(who, "tokens", tokens, len(WORDS) - 1)
    module, threads = _native.choose(who, native), _items.thread_count(who, threads)
    pieces = _items.pieces(tokens, _PIECE)
    values = np.concatenate([module.evaluate_listops(piece, threads) for piece in pieces])
    wrong = np.flatnonzero(values < 0)
    if len(wrong):
        text = listops_text(tokens[wrong[:1]])[0]
        raise ValueError(f"{who}: tokens[{wrong[0]}] must be one expression; got {text[:60]!r}")
    return values


def listops_text(tokens: NDArray[Any]) -> list[str]:
    """Returns each expression as words with spaces between them.

    Args:
        tokens: integers [count, length] from 0 to 15; padding is left out.

    Raises:
        TypeError: the tokens are no integers.
        ValueError: they have another shape or other values.
    """
    tokens = _items.grids("listops_text", "tokens", tokens, len(WORDS) - 1)
    return [" ".join(WORDS[token] for token in row if token) for row in tokens.tolist()]


def listops_tokens(text: str, length: int) -> NDArray[np.uint8]:
    """Returns the tokens of one expression in words, uint8 [length], padded behind.

    Args:
        text: words with spaces between them.
        length: number of tokens, at least that of the words.

    Raises:
        ValueError: a word is unknown, or there are too many.
    """
    words = text.split()
    unknown = [word for word in words if word not in WORDS[1:]]
    if unknown:
        raise ValueError(f"listops_tokens: words must be {' '.join(WORDS[1:])}; got {unknown[0]!r}")
    if len(words) > length:
        raise ValueError(f"listops_tokens: length must be >= {len(words)}; got {length}")
    tokens = np.zeros(length, np.uint8)
    tokens[: len(words)] = [WORDS.index(word) for word in words]
    return tokens
