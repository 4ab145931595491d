"""ARC-AGI tasks as puzzles: one group per task, one puzzle per augmentation of it.

A task becomes up to ``augmentations`` further ones by a symmetry of the square and a permutation of
the colours 1 to 9 (0, the background, stays). Each has an identifier of its own, whose embedding
is what the model learns about it. Demonstrations of the evaluation tasks are part of training; only
their test pairs are held back.

Source: SamsungSAILMontreal/TinyRecursiveModels at commit e7b6871, dataset/build_arc_dataset.py.
Declared differences: augmentations of a task depend on the seed and its name alone, not on the
other tasks; a task without known answers has labels without loss instead of a made-up answer.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trm_fast._paths import expanded
from trm_fast.data.puzzles.arc_corpus import ArcTask, Pair, arc_tasks
from trm_fast.data.puzzles.arc_grids import (
    COLOURS,
    PAD,
    SIDE,
    VOCAB_SIZE,
    augmented_name,
    dihedral,
    draw,
)
from trm_fast.data.puzzles.puzzle_set import Array, PuzzleMetadata, PuzzleSet

BLANK = "<blank>"
_TRIALS_PER_AUGMENTATION = 5


class ArcData(NamedTuple):
    """ARC for training and evaluation.

    Args:
        train: training tasks with all pairs, and demonstrations of the evaluation tasks.
        test: test pairs of the evaluation tasks.
        identifiers: name of each puzzle identifier; 0 is "<blank>".
        test_puzzles: the evaluation tasks, name -> {"train": [...], "test": [...]}.
    """

    train: PuzzleSet
    test: PuzzleSet
    identifiers: list[str]
    test_puzzles: dict[str, Any]


def build_arc(
    version: Literal[1, 2] = 1,
    augmentations: int = 1000,
    seed: int = 0,
    *,
    extra: Sequence[ArcTask] = (),
    out: str | PathLike[str] | None = None,
) -> ArcData:
    """Builds the data set of ARC-AGI-1 or ARC-AGI-2; see ``encode_arc``.

    Args:
        version: of the tasks, see ``arc_tasks``.
        augmentations, seed, out: as for ``encode_arc``.
        extra: further training tasks, such as ``read_arc_folder("ConceptARC/corpus")``.

    Raises:
        OSError, ValueError, ImportError: as ``arc_tasks`` and ``encode_arc``.
    """
    training, evaluation = arc_tasks(version)
    return encode_arc([*training, *extra], evaluation, augmentations, seed, out=out)


def encode_arc(
    training: Sequence[ArcTask],
    evaluation: Sequence[ArcTask],
    augmentations: int = 1000,
    seed: int = 0,
    *,
    out: str | PathLike[str] | None = None,
) -> ArcData:
    """Encodes tasks and their augmentations.

    Of at most 5 * ``augmentations`` draws of a symmetry and a permutation of colours 1 to 9, the
    first ``augmentations`` are kept that differ from the task and from each other in their grids.
    In training, each pair stands at a random place of its canvases, input and output at the same,
    but for one random pair of each puzzle; in the test set all stand at the top left.

    Args:
        training: tasks of which all pairs are for training.
        evaluation: tasks whose demonstrations are for training and whose test pairs are held back.
        augmentations: at most so many per task, besides the task itself, >= 0.
        seed: >= 0.
        out: folder in which inputs and labels are made as mapped files, in the places that the
            official layout gives them, instead of in memory; ``write_official`` adds the rest.
            Files that have these names are replaced, also links, and not what they lead to.
            ARC-AGI-1 with 1000 augmentations has 2.8 million pairs, 2.5 GB for each of the two.

    Raises:
        OSError: a file cannot be written.
        ValueError: two tasks share a name, there are no evaluation tasks, or a number is negative.
    """
    tasks = [*training, *evaluation]
    names = [task.name for task in tasks]
    if len({*names}) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"encode_arc: every task must have a name of its own; got {twice} twice")
    if not evaluation:
        raise ValueError("encode_arc: at least one evaluation task is required; got none")
    if augmentations < 0 or seed < 0:
        raise ValueError(f"encode_arc: numbers must be >= 0; got {augmentations}, seed {seed}")
    variants = [_variants(task, augmentations, seed) for task in tasks]
    starts = np.cumsum([1] + [len(found) for found in variants])
    identifiers = [BLANK]
    for task, found in zip(tasks, variants, strict=True):
        identifiers += _names(task.name, found)

    def encode(split: str, chosen: range, pairs: list[tuple[Pair, ...]], shift: bool) -> PuzzleSet:
        own = [variants[i] for i in chosen]
        ids = [np.arange(starts[i], starts[i + 1], dtype=np.int32) for i in chosen]
        allocate = _allocator(out, split)
        rngs = [_generator(seed, tasks[i].name, 1) for i in chosen]
        return _encode(pairs, own, ids, len(identifiers), rngs, allocate, shift)

    every, held_back = range(len(tasks)), range(len(training), len(tasks))
    all_pairs = [(*task.train, *task.test) for task in training]
    shown = [*all_pairs, *(task.train for task in evaluation)]
    return ArcData(
        encode("train", every, shown, True),
        encode("test", held_back, [task.test for task in evaluation], False),
        identifiers,
        {task.name: task.to_lists() for task in evaluation},
    )


class _Variants(NamedTuple):
    """The task itself and its augmentations: symmetry [count], colours [count, 10], uint8."""

    symmetry: Array
    colours: Array

    def __len__(self) -> int:
        return len(self.symmetry)


def _generator(seed: int, name: str, purpose: int) -> np.random.Generator:
    key = (purpose, zlib.crc32(name.encode()))
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def _variants(task: ArcTask, count: int, seed: int) -> _Variants:
    rng = _generator(seed, task.name, 0)
    sums = colour_sums([*task.train, *task.test])
    symmetry = np.zeros(1, np.uint8)
    colours = np.arange(COLOURS, dtype=np.uint8)[None]
    hashes = _hashes(sums, symmetry, colours)
    for _ in range(_TRIALS_PER_AUGMENTATION):
        if len(symmetry) == count + 1:
            break
        drawn = np.tile(np.arange(COLOURS, dtype=np.uint8), (count, 1))
        drawn[:, 1:] = rng.permuted(drawn[:, 1:], axis=1)
        turned = rng.integers(0, 8, count, dtype=np.uint8)
        symmetry, colours = np.append(symmetry, turned), np.concatenate([colours, drawn])
        hashes = np.append(hashes, _hashes(sums, turned, drawn))
        # np.unique names the first of equals, so sorting keeps the order of the draws.
        kept = np.sort(np.unique(hashes, return_index=True)[1])[: count + 1]
        symmetry, colours, hashes = symmetry[kept], colours[kept], hashes[kept]
    return _Variants(symmetry, colours)


def colour_sums(pairs: Sequence[Pair]) -> Array:
    """Sums of random weights over the cells of each colour, [8 symmetries, pairs, colours].

    The hash of a pair is linear in random values of its colours, so that recolouring it costs ten
    products instead of a pass over its cells. Arithmetic is modulo 2^64.
    """
    rng = np.random.Generator(np.random.Philox(0))
    weights = rng.integers(0, 1 << 64, (2, SIDE, SIDE), dtype=np.uint64)
    sums = np.zeros((8, len(pairs), COLOURS), np.uint64)
    for symmetry in range(8):
        for i, pair in enumerate(pairs):
            for part, grid in enumerate(pair):
                if grid is not None:
                    turned = dihedral(grid, symmetry)
                    own = weights[part, : turned.shape[0], : turned.shape[1]]
                    np.add.at(sums[symmetry, i], turned.ravel(), own.ravel())
    return sums


def _hashes(sums: Array, symmetry: Array, colours: Array) -> Array:
    """A hash of the set of pairs of each variant, whatever their order, [count] uint64."""
    rng = np.random.Generator(np.random.Philox(1))
    values = rng.integers(0, 1 << 64, COLOURS, dtype=np.uint64)
    pairs = (sums[symmetry] * values[colours][:, None]).sum(axis=2, dtype=np.uint64)
    # The finaliser of SplitMix64, as a plain sum of linear hashes would forget which cell is whose.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        pairs = (pairs ^ (pairs >> np.uint64(shift))) * np.uint64(factor)
    hashes: Array = (pairs ^ (pairs >> np.uint64(31))).sum(axis=1, dtype=np.uint64)
    return hashes


def _names(task: str, variants: _Variants) -> list[str]:
    rest = zip(variants.symmetry[1:].tolist(), variants.colours[1:].tolist(), strict=True)
    return [task, *(augmented_name(task, symmetry, colours) for symmetry, colours in rest)]


def _allocator(out: str | PathLike[str] | None, split: str) -> Callable[[str, int], Array]:
    shape = (SIDE * SIDE,)
    if out is None:
        return lambda name, count: np.zeros((count, *shape), np.uint8)
    home = expanded(out) / split
    home.mkdir(parents=True, exist_ok=True)
    return lambda name, count: _mapped(home / f"all__{name}.npy", (count, *shape))


def _mapped(path: Path, shape: tuple[int, ...]) -> Array:
    """Returns a new file as an array; what has its name, a link too, is replaced and not written
    to."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        beside.touch(exist_ok=False)
        array = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=shape)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return array


def _encode(
    pairs: list[tuple[Pair, ...]],
    variants: list[_Variants],
    ids: list[Array],
    num_identifiers: int,
    rngs: list[np.random.Generator],
    allocate: Callable[[str, int], Array],
    shift: bool,
) -> PuzzleSet:
    """One split: the variants of each task, each with its pairs."""
    sizes = np.repeat([len(own) for own in pairs], [len(found) for found in variants])
    puzzle_indices = np.append(0, np.cumsum(sizes))
    group_indices = np.append(0, np.cumsum([len(found) for found in variants]))
    examples = int(puzzle_indices[-1])
    inputs, labels = allocate("inputs", examples), allocate("labels", examples)
    start = 0
    for own, found, rng in zip(pairs, variants, rngs, strict=True):
        end = start + len(own) * len(found)
        inputs[start:end], labels[start:end] = _draw_task(own, found, rng, shift)
        start = end
    metadata = PuzzleMetadata(
        vocab_size=VOCAB_SIZE,
        seq_len=SIDE * SIDE,
        num_puzzle_identifiers=num_identifiers,
        total_groups=len(pairs),
        total_puzzles=len(sizes),
        mean_puzzle_examples=examples / len(sizes),
        pad_id=PAD,
        ignore_label_id=PAD,
    )
    return PuzzleSet(inputs, labels, np.concatenate(ids), puzzle_indices, group_indices, metadata)


def _draw_task(
    pairs: tuple[Pair, ...], variants: _Variants, rng: np.random.Generator, shift: bool
) -> tuple[Array, Array]:
    """Canvases of all variants of a task, variant by variant, [variants * pairs, 900] twice."""
    count = len(variants)
    canvases = np.zeros((2, len(pairs), count, SIDE, SIDE), np.uint8)
    fixed = rng.integers(0, len(pairs), count)
    places = rng.random((len(pairs), 2, count))
    for symmetry in range(8):
        chosen = np.flatnonzero(variants.symmetry == symmetry)
        if not len(chosen):
            continue
        colours = variants.colours[chosen]
        for i, pair in enumerate(pairs):
            turned = [None if grid is None else dihedral(grid, symmetry) for grid in pair]
            known = [grid.shape for grid in turned if grid is not None]
            moved = shift & (fixed[chosen] != i)
            rows, cols = (
                (
                    places[i, axis, chosen]
                    * (SIDE + 1 - max(shape[axis] for shape in known))
                    * moved
                ).astype(np.int64)
                for axis in (0, 1)
            )
            for part, grid in enumerate(turned):
                if grid is not None:
                    target = np.zeros((len(chosen), SIDE, SIDE), np.uint8)
                    draw(target, colours[:, grid], rows, cols)
                    canvases[part, i, chosen] = target
    shown = canvases.swapaxes(1, 2).reshape(2, count * len(pairs), SIDE * SIDE)
    return shown[0], shown[1]
