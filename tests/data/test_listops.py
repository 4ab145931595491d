"""ListOps: expressions, their values, the limits on both, and equality of both forms."""

import hashlib

import numpy as np
import pytest

from trm_fast.data.synthetic.listops import (
    WORDS,
    evaluate_listops,
    generate_listops,
    listops_text,
    listops_tokens,
)

EXAMPLES = {
    "[MAX 2 9 [MIN 4 7 ] 0 ]": 9,
    "[MIN 5 3 8 ]": 3,
    "[MED 1 9 2 ]": 2,
    "[MED 9 1 4 8 ]": 6,
    "[MED 3 4 ]": 3,
    "[SM 7 8 9 ]": 4,
    "[SM [SM 1 2 ] [MED 0 9 9 ] [MAX 0 0 ] ]": 2,
    "[MAX 4 ]": 4,
    "7": 7,
}


def parse(words: list[str]) -> list:
    """Nested lists: an operation with its arguments, or a digit."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word)
    tree = [word]
    while words[0] != "]":
        tree.append(parse(words))
    words.pop(0)
    return tree


def value_of(tree) -> int:
    if isinstance(tree, int):
        return tree
    operation, *rest = tree
    values = [value_of(branch) for branch in rest]
    return {
        "[MAX": lambda: max(values),
        "[MIN": lambda: min(values),
        "[MED": lambda: int(np.median(values)),
        "[SM": lambda: sum(values) % 10,
    }[operation]()


def depth_of(tree) -> int:
    return 0 if isinstance(tree, int) else 1 + max(depth_of(branch) for branch in tree[1:])


def operations_of(tree) -> list[list]:
    if isinstance(tree, int):
        return []
    return [tree, *(found for branch in tree[1:] for found in operations_of(branch))]


def trees(tokens: np.ndarray) -> list:
    found = []
    for text in listops_text(tokens):
        words = text.split()
        found.append(parse(words))
        assert not words
    return found


@pytest.fixture(scope="module")
def made(native):
    return generate_listops(1000, 60, seed=1, native=native)


def test_values_are_those_of_the_expressions(made):
    tokens, values = made
    assert tokens.shape == (1000, 60) and tokens.dtype == np.uint8
    assert values.tolist() == [value_of(tree) for tree in trees(tokens)]
    assert {*values.tolist()} == {*range(10)}


def test_every_operation_and_number_of_arguments_is_drawn(made):
    found = [tree for root in trees(made[0]) for tree in operations_of(root)]
    assert {tree[0] for tree in found} == {"[MAX", "[MIN", "[MED", "[SM"}
    assert {len(tree) - 1 for tree in found} == {2, 3, 4, 5}


@pytest.mark.parametrize(
    "limits",
    [
        {"max_length": 4},
        {"max_length": 12, "min_length": 12},
        {"max_length": 90, "max_depth": 1},
        {"max_length": 90, "max_depth": 3, "nesting": 1.0, "max_args": 3},
        {"max_length": 500, "min_length": 100, "max_args": 10},
        {"max_length": 90, "nesting": 0.0},
    ],
    ids=str,
)
def test_limits_are_kept(native, limits):
    tokens, _ = generate_listops(100, **limits, native=native)
    lengths = (tokens != 0).sum(axis=1)
    assert lengths.min() >= limits.get("min_length", 4)
    assert lengths.max() <= limits["max_length"]
    # Padding stands behind.
    assert (tokens != 0).argmin(axis=1)[lengths < tokens.shape[1]].tolist() == [
        length for length in lengths.tolist() if length < tokens.shape[1]
    ]
    roots = trees(tokens)
    depths = {depth_of(root) for root in roots}
    most = 1 if limits.get("nesting") == 0 else limits.get("max_depth", 10)
    assert max(depths) <= most
    assert limits.get("nesting") != 1 or depths == {3}
    arguments = {len(tree) - 1 for root in roots for tree in operations_of(root)}
    assert min(arguments) >= 2 and max(arguments) <= limits.get("max_args", 5)


def test_depth_reaches_its_limit(native):
    roots = trees(generate_listops(300, 200, max_depth=4, nesting=0.5, native=native)[0])
    assert max(map(depth_of, roots)) == 4


def test_a_quarter_of_the_arguments_is_nested(native):
    # Nothing is thrown away for its length here: 2 levels of 5 arguments need at most 37 tokens.
    tokens, _ = generate_listops(300, 40, max_depth=2, max_args=5, native=native)
    arguments = [branch for root in trees(tokens) for branch in root[1:]]
    nested = sum(isinstance(branch, list) for branch in arguments) / len(arguments)
    # Binomial with about 1050 arguments: standard deviation 0.0134; 6 of them.
    assert abs(nested - 0.25) < 0.08


def test_expressions_differ_and_do_not_depend_on_their_number(native):
    tokens, values = generate_listops(350, 4, native=native)
    assert len(np.unique(tokens, axis=0)) == 350
    few = generate_listops(99, 4, native=native)
    assert (few[0] == tokens[:99]).all() and (few[1] == values[:99]).all()


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (50, {}),
        (4, {}),
        (300, {"min_length": 100, "max_args": 10, "seed": 2**64 - 1}),
        (70, {"nesting": 0.6, "max_depth": 20}),
    ],
)
def test_both_forms_are_equal(built, length, options):
    fast, plain = (
        generate_listops(200, length, native=native, **options) for native in (True, False)
    )
    assert (fast[0] == plain[0]).all()
    assert (fast[1] == plain[1]).all()


def test_results_stay_what_they_are(native):
    # Whoever changes what is drawn raises REVISION in trm_fast/data/_native.py.
    arrays = generate_listops(50, 40, seed=7, native=native)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert digest[:16] == "a13d03d0ae09f2b9"


def test_threads_change_nothing(built):
    results = [generate_listops(9000, 50, threads=threads, native=True) for threads in (1, 2, 7)]
    for tokens, values in results[1:]:
        assert (tokens == results[0][0]).all() and (values == results[0][1]).all()


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples(native, text):
    tokens = listops_tokens(text, 24)
    assert listops_text(tokens[None]) == [text]
    assert evaluate_listops(tokens[None], native=native).tolist() == [EXAMPLES[text]]


@pytest.mark.parametrize(
    "text",
    ["", "]", "[MAX 1 2", "[MAX ]", "[MAX 1 2 ] 3", "1 2", "[MAX 1 ] ]", "1 ]", "[SM [MIN ] 2 ]"],
)
def test_what_is_no_expression_is_refused(native, text):
    tokens = np.stack([listops_tokens("7", 8), listops_tokens(text, 8)])
    with pytest.raises(ValueError, match=r"tokens\[1\] must be one expression; got '"):
        evaluate_listops(tokens, native=native)


def test_padding_inside_is_refused(native):
    tokens = listops_tokens("[MAX 1 2 ]", 8)
    tokens[2] = 0
    with pytest.raises(ValueError, match=r"tokens\[0\] must be one expression"):
        evaluate_listops(tokens[None], native=native)


def test_both_forms_refuse_alike(built):
    # Among random tokens a few are expressions.
    tokens = np.random.default_rng(0).integers(0, 16, (20_000, 4)).astype(np.uint8)
    from trm_fast import _data
    from trm_fast.data import _reference

    values = _data.evaluate_listops(tokens, 1)
    assert (values == _reference.evaluate_listops(tokens, 1)).all()
    assert (values >= 0).any() and (values < 0).any()


def test_vocabulary_is_as_documented():
    assert WORDS[1:11] == tuple("0123456789")
    assert WORDS[11:] == ("[MAX", "[MIN", "[MED", "[SM", "]")


def test_no_expressions(native):
    tokens, values = generate_listops(0, 9, native=native)
    assert tokens.shape == (0, 9) and values.shape == (0,)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: generate_listops(1, 3), "max_length must be from 4 to 100000; got 3"),
        (lambda: generate_listops(1, 9, min_length=10), "min_length must be from 4 to 9; got 10"),
        (lambda: generate_listops(1, 9, max_depth=0), "max_depth must be from 1 to 1000; got 0"),
        (lambda: generate_listops(1, 9, max_args=1), "max_args must be from 2 to 100; got 1"),
        (lambda: generate_listops(1, 9, nesting=1.5), "nesting must be from 0 to 1; got 1.5"),
        (lambda: generate_listops(1, 9, nesting=float("nan")), "nesting must be from 0 to 1"),
        (lambda: generate_listops(401, 4), "in 1000 attempts; got none for item"),
        (lambda: evaluate_listops(np.ones(4, int)), r"must be \[count, length\]; got \[4\]"),
        (lambda: evaluate_listops(np.full((1, 4), 16)), "values from 0 to 15; got 16 to 16"),
        (lambda: listops_tokens("[AVG 1 2 ]", 9), r"words must be .*; got '\[AVG'"),
        (lambda: listops_tokens("[MAX 1 2 ]", 3), "length must be >= 4; got 3"),
    ],
)
def test_errors_say_what_is_required(call, error):
    with pytest.raises(ValueError, match=error):
        call()
