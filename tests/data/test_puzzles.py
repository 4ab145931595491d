"""The in-memory form of puzzles: its checks, the official order of batches, and merging."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from trm_fast.data import (
    PuzzleBatches,
    PuzzleMetadata,
    PuzzleSet,
    evaluation_batches,
    merge,
    merge_identifiers,
)

SIZES = [[3, 1], [2], [1, 5, 2], [4], [1], [7, 7]]  # examples of each puzzle of each group


def puzzle_set(sizes=SIZES, seq_len=2) -> PuzzleSet:
    """Every token of example i is i + 1, so that a row names its example."""
    counts = [count for group in sizes for count in group]
    examples = sum(counts)
    tokens = np.repeat(np.arange(1, examples + 1, dtype=np.int32)[:, None], seq_len, axis=1)
    metadata = PuzzleMetadata(
        vocab_size=examples + 1,
        seq_len=seq_len,
        num_puzzle_identifiers=len(counts) + 1,
        total_groups=len(sizes),
        total_puzzles=len(counts),
        mean_puzzle_examples=examples / len(counts),
    )
    return PuzzleSet(
        tokens,
        tokens.copy(),
        np.arange(1, len(counts) + 1, dtype=np.int32),
        np.append(0, np.cumsum(counts)),
        np.append(0, np.cumsum([len(group) for group in sizes])),
        metadata,
        tuple(f"file:{i}" for i in range(examples)),
    )


def rows(batch) -> list[int]:
    return (batch["inputs"][:, 0] - 1).tolist()


def taken(batches, count=None) -> list[list[int]]:
    return [rows(batch) for batch in islice(batches, count)]


def official_order(data, batch_size, seed, batches):
    """The rule, visit by visit: shuffled groups, one puzzle each, examples until it is full."""

    def visits():
        for epoch in range(10**6):
            key = np.random.SeedSequence(seed, spawn_key=(0, epoch))
            rng = np.random.Generator(np.random.Philox(key))
            order = rng.permutation(len(data.group_indices) - 1)
            chosen = [
                (int(data.group_indices[g]), int(data.group_indices[g + 1])) for g in order.tolist()
            ]
            puzzles = rng.integers(*np.array(chosen).T).tolist()
            bounds = [data.puzzle_indices[p : p + 2].tolist() for p in puzzles]
            keys = rng.random(sum(end - start for start, end in bounds)).tolist()
            for start, end in bounds:
                own, keys = keys[: end - start], keys[end - start :]
                yield [e for _, e in sorted(zip(own, range(start, end), strict=True))]

    source, out = visits(), []
    for _ in range(batches):
        batch = []
        while len(batch) < batch_size:
            batch += next(source)[: batch_size - len(batch)]
        out.append(batch)
    return out


@pytest.mark.parametrize("batch_size", [1, 4, 9, 64])
def test_batches_follow_the_official_rule(batch_size):
    data = puzzle_set()
    expected = official_order(data, batch_size, seed=3, batches=40)
    assert taken(PuzzleBatches(data, batch_size, seed=3), 40) == expected


def test_an_epoch_visits_each_group_once():
    data = puzzle_set()
    stream = taken(PuzzleBatches(data, 1, seed=5, epochs=300))
    # With batches of one, every visit gives its first example only.
    groups = [
        int(np.searchsorted(data.group_indices, data.puzzle_of(np.array(b))[0], side="right") - 1)
        for b in stream
    ]
    assert len(groups) == 300 * len(SIZES)
    for epoch in range(300):
        own = groups[epoch * len(SIZES) : (epoch + 1) * len(SIZES)]
        assert sorted(own) == list(range(len(SIZES)))


@pytest.mark.slow
def test_choices_are_uniform():
    data = puzzle_set()
    epochs = 3000
    counts = np.bincount(
        [b[0] for b in taken(PuzzleBatches(data, 1, seed=1, epochs=epochs))], minlength=len(data)
    )
    at = 0
    for group in SIZES:
        for size in group:
            # A visit shows one of `size` examples of one of `len(group)` puzzles: binomial; six
            # standard deviations fail once in 10^8.
            p = 1 / len(group) / size
            bound = 6 * np.sqrt(epochs * p * (1 - p)) + 1e-9
            assert np.all(np.abs(counts[at : at + size] - epochs * p) <= bound)
            at += size


def test_the_remainder_of_an_epoch_goes_into_the_next_one_and_the_last_is_dropped():
    data = PuzzleSet.of_pairs(np.ones((10, 3), np.int64), np.ones((10, 3), np.int64), 2)
    assert len(list(PuzzleBatches(data, 4, epochs=1))) == 2
    assert len(list(PuzzleBatches(data, 4, epochs=5))) == 12
    assert len(list(PuzzleBatches(data, 64, epochs=6))) == 0
    assert len(list(PuzzleBatches(data, 64, epochs=13))) == 2


def test_numpys_global_state_neither_matters_nor_changes():
    np.random.seed(0)
    first = taken(PuzzleBatches(puzzle_set(), 4), 20)
    drawn = np.random.random()
    np.random.seed(0)
    assert drawn == np.random.random()
    np.random.seed(7)
    assert taken(PuzzleBatches(puzzle_set(), 4), 20) == first
    assert taken(PuzzleBatches(puzzle_set(), 4, seed=1), 20) != first


def add_noise(inputs, labels, generator):
    noise = generator.integers(0, 1000, inputs.shape)
    return inputs + noise, labels + noise


@pytest.mark.parametrize("augment", [None, add_noise])
@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_a_state_continues_exactly(augment, stop):
    whole = [
        batch["inputs"] for batch in islice(PuzzleBatches(puzzle_set(), 7, augment=augment), 20)
    ]
    first = PuzzleBatches(puzzle_set(), 7, augment=augment)
    for _ in islice(first, stop):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    assert all(type(value) is int for value in state.values())
    second = PuzzleBatches(puzzle_set(), 7, augment=augment)
    second.load_state_dict(state)
    rest = [batch["inputs"] for batch in islice(second, 20 - stop)]
    assert all(map(torch.equal, rest, whole[stop:]))


def test_iterating_again_goes_on():
    batches = PuzzleBatches(puzzle_set(), 4)
    assert taken(batches, 3) + taken(batches, 3) == taken(PuzzleBatches(puzzle_set(), 4), 6)


@pytest.mark.parametrize("augment", [None, add_noise])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_global_batch(world_size, augment):
    data = puzzle_set()
    whole = list(islice(PuzzleBatches(data, 8, augment=augment), 10))
    ranks = [
        islice(PuzzleBatches(data, 8, rank=r, world_size=world_size, augment=augment), 10)
        for r in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for key, tensor in batch.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), tensor)
            assert len(parts[0][key]) == 8 // world_size


def test_a_batch_has_int64_tokens_masked_labels_and_identifiers():
    data = puzzle_set()
    labels = data.labels.copy()
    labels[:, 1] = 0
    batch = next(iter(PuzzleBatches(replace(data, labels=labels.astype(np.uint8)), 5)))
    assert {key: tensor.dtype for key, tensor in batch.items()} == dict.fromkeys(
        ("inputs", "labels", "puzzle_identifiers"), torch.int64
    )
    assert torch.equal(batch["labels"][:, 0], batch["inputs"][:, 0])
    assert batch["labels"][:, 1].tolist() == [-100] * 5
    puzzles = data.puzzle_of(np.array(rows(batch)))
    assert batch["puzzle_identifiers"].tolist() == data.puzzle_identifiers[puzzles].tolist()


def test_without_an_ignored_label_every_position_counts():
    data = PuzzleSet.of_pairs(
        np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8), 2, ignore_label_id=None
    )
    assert next(iter(PuzzleBatches(data, 2)))["labels"].tolist() == [[0] * 3] * 2


def test_augment_sees_raw_labels_and_must_keep_shapes():
    seen = []

    def look(inputs, labels, generator):
        seen.append((inputs.dtype, labels.copy()))
        return inputs, labels

    labels = np.array([[0, 1], [1, 0]], np.uint8)
    data = PuzzleSet.of_pairs(labels, labels, 2)
    next(iter(PuzzleBatches(data, 2, augment=look)))
    assert seen[0][0] == np.int64
    assert seen[0][1].min() == 0
    cut = PuzzleBatches(data, 2, augment=lambda inputs, labels, _: (inputs[:, :1], labels))
    with pytest.raises(ValueError, match=r"augment must keep inputs at \[2, 2\]; got \[2, 1\]"):
        next(iter(cut))


def test_every_batch_has_a_generator_of_its_own():
    data = PuzzleSet.of_pairs(np.ones((64, 4), np.uint8), np.ones((64, 4), np.uint8), 2)
    noise = [batch["inputs"] for batch in islice(PuzzleBatches(data, 8, augment=add_noise), 16)]
    # Eight batches of an epoch, and the same places of the next one.
    assert len({tuple(tensor.flatten().tolist()) for tensor in noise}) == 16


def test_describe_names_rows_and_sources():
    data = puzzle_set()
    batches = PuzzleBatches(data, 4, rank=1, world_size=2)
    assert batches.describe() == "no batch yet"
    first, second = rows(next(iter(batches)))
    expected = f"epoch 0, examples {first}, {second} (file:{first}, file:{second})"
    assert batches.describe() == expected
    assert batches.describe(1) == f"epoch 0, examples {first}, ... (file:{first}, ...)"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_evaluation_takes_every_example_once_in_order(batch_size, world_size):
    data = puzzle_set()
    ranks = [evaluation_batches(data, batch_size, r, world_size) for r in range(world_size)]
    once = [[taken(rank) for rank in ranks] for _ in range(2)]
    assert once[0] == once[1]
    assert [len(rank) for rank in ranks] == [len(batches) for batches in once[0]]
    assert sorted(i for rank in once[0] for batch in rank for i in batch) == [*range(len(data))]
    if world_size == 1:
        whole = [*range(len(data))]
        expected = [whole[i : i + batch_size] for i in range(0, len(data), batch_size)]
        assert once[0][0] == expected
    for batch in evaluation_batches(data, batch_size):
        puzzles = data.puzzle_of(np.array(rows(batch)))
        assert batch["puzzle_identifiers"].tolist() == (puzzles + 1).tolist()


BAD = {
    "inputs must be a NumPy array; got list": {"inputs": [[1]]},
    "inputs must hold integers; got float64": {"inputs": np.ones((36, 2))},
    "labels must hold integers; got bool": {"labels": np.ones((36, 2), bool)},
    "inputs must be [examples, seq_len]; got shape [36]": {"inputs": np.ones(36, np.int64)},
    "labels must be [examples, seq_len] = [33, 2]; got [4, 2]": {"labels": np.ones((4, 2), int)},
    "puzzle_indices must go from 0 to 33 examples; got 0 to 34": {
        "puzzle_indices": np.array([0, 3, 4, 6, 7, 12, 14, 18, 19, 26, 34])
    },
    "puzzle_indices must increase; got 4, 4 at 2": {
        "puzzle_indices": np.array([0, 3, 4, 4, 7, 12, 14, 18, 19, 26, 33], np.uint8)
    },
    "group_indices must go from 0 to 10 puzzles; got nothing": {"group_indices": np.zeros(0, int)},
    "group_indices must have one axis; got shape [1, 2]": {"group_indices": np.zeros((1, 2), int)},
    "metadata.total_groups must be 2 as the indices say; got 6": {
        "group_indices": np.array([0, 4, 10])
    },
    "puzzle_identifiers must have one for each of 10 puzzles; got 9": {
        "puzzle_identifiers": np.ones(9, int)
    },
    "puzzle_identifiers must hold ids in [0, 11); got 11 in puzzle 3": {
        "puzzle_identifiers": np.array([1, 2, 3, 11, 5, 6, 7, 8, 9, 10])
    },
    "sources must be empty or one for each of 33 examples; got 1": {"sources": ("a",)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_set_checks_itself(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        replace(puzzle_set(), **BAD[message])
    assert str(caught.value) == f"PuzzleSet: {message}"


@pytest.mark.parametrize("name", ["inputs", "labels"])
@pytest.mark.parametrize("bad", [-1, 34, 1 << 20])
def test_ids_outside_the_vocabulary_are_named_with_their_example(name, bad):
    data = puzzle_set()
    array = getattr(data, name).copy()
    array[17, 1] = array[20, 0] = bad
    message = rf"{name} must hold ids in \[0, 34\); got {bad} in example 17"
    with pytest.raises(ValueError, match=message):
        replace(data, **{name: array})


def test_the_ignored_label_may_be_outside_the_vocabulary():
    data = puzzle_set()
    labels = data.labels.copy()
    labels[3] = -100
    found = replace(data, labels=labels, metadata=replace(data.metadata, ignore_label_id=-100))
    assert next(iter(evaluation_batches(found, 4)))["labels"][3].tolist() == [-100, -100]


def test_an_empty_set_is_refused():
    empty = np.zeros((0, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one example is required"):
        PuzzleSet.of_pairs(empty, empty, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1; got 0"),
        (
            {"batch_size": 5, "world_size": 2},
            "batch_size must be a multiple of world_size 2; got 5",
        ),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank must be in"),
        ({"batch_size": 4, "seed": -1}, "seed must be >= 0; got -1"),
        ({"batch_size": 4, "epochs": -1}, "epochs must be >= 0 or None; got -1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PuzzleBatches(puzzle_set(), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed of the state must be 0; got 1"),
        ({"batch_size": 8}, "batch_size of the state must be 4; got 8"),
        ({"examples": 3}, "examples of the state must be 33; got 3"),
        ({"visit": 99}, "a state must be a place in the order"),
        ({"epoch": -1}, "a state must be a place in the order"),
    ],
)
def test_a_foreign_state_is_refused(change, message):
    batches = PuzzleBatches(puzzle_set(), 4)
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict({**batches.state_dict(), **change})
    with pytest.raises(ValueError, match="a state needs batch, batch_size, epoch"):
        batches.load_state_dict({})


def test_merging_gives_each_set_identifiers_of_its_own():
    first, second = puzzle_set(), puzzle_set([[2, 1]])
    second = replace(
        second,
        puzzle_identifiers=np.array([0, 2], np.int32),
        metadata=replace(second.metadata, vocab_size=34),
    )
    found = merge([first, second])
    # 10 identifiers beside blank in the first, 2 in the second; blank stays blank.
    assert found.metadata.num_puzzle_identifiers == 13
    assert found.puzzle_identifiers.tolist() == [*range(1, 11), 0, 12]
    assert found.puzzle_indices.tolist() == [*first.puzzle_indices.tolist(), 35, 36]
    assert found.group_indices.tolist() == [*first.group_indices.tolist(), 12]
    assert found.inputs[:, 0].tolist() == [*range(1, 34), 1, 2, 3]
    assert found.sources == first.sources + second.sources
    assert found.metadata.mean_puzzle_examples == 36 / 12
    names = merge_identifiers([["<blank>", "a", "b"], ["<blank>", "c"]])
    assert names == ["<blank>", "a", "b", "c"]


def test_sets_that_differ_are_not_merged():
    with pytest.raises(ValueError, match=r"merge: seq_len must be equal in all sets; got \[2, 3\]"):
        merge([puzzle_set(), puzzle_set(seq_len=3)])
    with pytest.raises(ValueError, match="at least one set"):
        merge([])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batches_know_the_epochs_that_are_over(batch_size):
    data = puzzle_set()
    batches, groups = PuzzleBatches(data, batch_size, epochs=13), data.metadata.total_groups
    seen = 0
    for _ in batches:
        state = batches.state_dict()
        visits = state["epoch"] * groups + state["visit"]
        assert batches.completed == visits // groups >= seen
        seen = batches.completed
        again = PuzzleBatches(data, batch_size, epochs=13)
        again.load_state_dict(state)
        assert again.completed == seen
    assert batches.completed == 13
