"""The official layout on disk: read, written, and refused when it is damaged."""

import json
from dataclasses import replace

import numpy as np
import pytest

from trm_fast.data import (
    PuzzleSet,
    read_identifiers,
    read_official,
    read_official_sets,
    read_test_puzzles,
    write_official,
)
from trm_fast.data.sources.npy import read_npy

ARRAYS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")


@pytest.fixture
def folder(tmp_path):
    """A data set written by hand: 2 groups; 3 puzzles; 1, 2 and 1 examples of 4 tokens."""
    split = tmp_path / "train"
    split.mkdir()
    (split / "dataset.json").write_text(
        '{"pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": 12, '
        '"seq_len": 4, "num_puzzle_identifiers": 4, "total_groups": 2, '
        '"mean_puzzle_examples": 1.3333333333333333, "total_puzzles": 3, "sets": ["all"]}'
    )
    np.save(split / "all__inputs.npy", np.arange(16, dtype=np.uint8).reshape(4, 4) % 12)
    np.save(split / "all__labels.npy", np.arange(16, dtype=np.uint8).reshape(4, 4) % 5)
    np.save(split / "all__puzzle_identifiers.npy", np.array([1, 2, 3], np.int32))
    np.save(split / "all__puzzle_indices.npy", np.array([0, 1, 3, 4], np.int32))
    np.save(split / "all__group_indices.npy", np.array([0, 2, 3], np.int32))
    (tmp_path / "identifiers.json").write_text('["<blank>", "a", "a|||t1|||0213456789", "b"]')
    (tmp_path / "test_puzzles.json").write_text(
        '{"b": {"train": [], "test": [{"input": [[1]], "output": [[2]]}]}}'
    )
    return tmp_path


def change(folder, **fields):
    path = folder / "train" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def same(first: PuzzleSet, second: PuzzleSet):
    for name in ARRAYS:
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert first.metadata == second.metadata


def test_a_folder_made_by_hand_is_read(folder):
    data = read_official(folder)
    assert data.inputs[2].tolist() == [8, 9, 10, 11]
    assert data.labels[1].tolist() == [4, 0, 1, 2]
    assert data.puzzle_identifiers.tolist() == [1, 2, 3]
    assert data.puzzle_of(np.arange(4)).tolist() == [0, 1, 1, 2]
    meta = data.metadata
    assert (meta.vocab_size, meta.seq_len, meta.num_puzzle_identifiers) == (12, 4, 4)
    assert (meta.total_groups, meta.total_puzzles, meta.sets) == (2, 3, ("all",))
    assert read_identifiers(folder)[2] == "a|||t1|||0213456789"
    assert read_test_puzzles(folder)["b"]["test"][0]["output"] == [[2]]


def test_tokens_stay_on_disk_and_indices_do_not(folder):
    data = read_official(folder)
    assert isinstance(data.inputs, np.memmap)
    assert not data.inputs.flags.writeable
    assert not isinstance(data.puzzle_indices, np.memmap)


def test_what_is_written_is_read_again(folder, tmp_path):
    data = read_official(folder)
    names, tasks = read_identifiers(folder), read_test_puzzles(folder)
    write_official(tmp_path / "copy", "train", data, identifiers=names, test_puzzles=tasks)
    same(read_official(tmp_path / "copy"), data)
    assert read_identifiers(tmp_path / "copy") == names
    assert read_test_puzzles(tmp_path / "copy") == tasks
    written = {p.name for p in (tmp_path / "copy" / "train").iterdir()}
    assert written == {"dataset.json", *(f"all__{name}.npy" for name in ARRAYS)}
    fields = json.loads((tmp_path / "copy" / "train" / "dataset.json").read_text())
    assert fields == json.loads((folder / "train" / "dataset.json").read_text())


def test_a_mapped_set_can_be_written_onto_itself(folder):
    data = read_official(folder)
    write_official(folder, "train", data, identifiers=read_identifiers(folder))
    same(read_official(folder), data)
    assert not [*folder.rglob("*.tmp")]


def test_several_sets_share_their_identifiers(folder, tmp_path):
    data = read_official(folder)
    write_official(tmp_path / "two", "train", {"all": data, "more": data})
    sets = read_official_sets(tmp_path / "two")
    assert [*sets] == ["all", "more"]
    for name, found in sets.items():
        same(found, replace(data, metadata=replace(data.metadata, sets=(name,))))
    joined = read_official(tmp_path / "two")
    assert joined.metadata.sets == ("all", "more")
    assert joined.puzzle_identifiers.tolist() == [1, 2, 3, 1, 2, 3]
    assert joined.metadata.num_puzzle_identifiers == 4
    assert joined.group_indices.tolist() == [0, 2, 3, 5, 6]
    assert joined.puzzle_indices.tolist() == [0, 1, 3, 4, 5, 7, 8]


def test_the_puzzle_total_of_the_official_sudoku_builder_is_corrected(folder):
    # It writes the number of groups, and a mean of 1.
    change(folder, total_puzzles=2, mean_puzzle_examples=1)
    assert read_official(folder).metadata.total_puzzles == 3
    assert read_official(folder).metadata.mean_puzzle_examples == 4 / 3


def test_a_blank_identifier_is_named_by_itself(tmp_path):
    data = PuzzleSet.of_pairs(np.ones((2, 3), np.uint8), np.ones((2, 3), np.uint8), 2)
    write_official(tmp_path, "test", data)
    assert read_identifiers(tmp_path) == ["<blank>"]
    same(read_official(tmp_path, "test"), data)


@pytest.mark.parametrize("name", ["dataset.json", *(f"all__{name}.npy" for name in ARRAYS)])
def test_a_missing_file_is_named(folder, name):
    (folder / "train" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_official(folder)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_file_cut_off_anywhere_is_refused_by_name(folder, name):
    path = folder / "train" / f"all__{name}.npy"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"all__{name}.npy"):
            read_official(folder)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("inputs", np.full((4, 4), np.nan), "array of integers is required; got the type '<f8'"),
        ("labels", np.ones((4, 4), bool), "array of integers is required; got the type '\\|b1'"),
        ("inputs", np.full((4, 4), 12), r"inputs must hold ids in \[0, 12\); got 12 in example 0"),
        ("labels", np.ones((3, 4), int), r"labels must be .* = \[4, 4\]; got \[3, 4\]"),
        ("puzzle_identifiers", np.array([1, 2, 4]), r"in \[0, 4\); got 4 in puzzle 2"),
        ("puzzle_indices", np.array([0, 2, 1, 4]), "puzzle_indices must increase; got 2, 1 at 1"),
        ("puzzle_indices", np.array([0, 1, 3, 5]), "must go from 0 to 4 examples; got 0 to 5"),
        ("group_indices", np.array([0, 2, 4]), "must go from 0 to 3 puzzles; got 0 to 4"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(folder, name, array, message):
    np.save(folder / "train" / f"all__{name}.npy", array)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        read_official(folder)
    assert str(folder / "train") in str(caught.value)


def test_pickled_arrays_are_not_opened(folder):
    path = folder / "train" / "all__inputs.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"all__inputs\.npy"):
        read_official(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": "12"}, "vocab_size must be an integer; got str"),
        ({"seq_len": True}, "seq_len must be an integer; got bool"),
        ({"sets": []}, "sets must be a list of plain names"),
        ({"sets": ["../all"]}, "sets must be a list of plain names"),
        ({"sets": ["all", "all"]}, "sets must be a list of plain names"),
        ({"mean_puzzle_examples": "1"}, "mean_puzzle_examples must be a number; got str"),
        ({"colour": 1}, r"\['colour'\] unknown"),
        ({"total_groups": 3}, "total_groups of dataset.json must be 2 as the arrays say; got 3"),
        ({"seq_len": 5}, r"inputs must be \[examples, seq_len\] = \[4, 5\]; got \[4, 4\]"),
        ({"pad_id": 12}, r"pad_id must be in \[0, 12\); got 12"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(ValueError, match=message):
        read_official(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", '{"sets": ["all"]}', "[" * 100_000])
def test_a_damaged_dataset_json_is_refused(folder, text):
    (folder / "train" / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"dataset\.json: .*(required|must be)"):
        read_official(folder)


def test_damaged_names_and_tasks_are_refused(folder):
    (folder / "identifiers.json").write_text('["a", 1]')
    (folder / "test_puzzles.json").write_text('{"a": []}')
    with pytest.raises(ValueError, match=r"identifiers\.json: a list of strings is required"):
        read_identifiers(folder)
    with pytest.raises(ValueError, match=r"test_puzzles\.json: an object of tasks"):
        read_test_puzzles(folder)


def test_names_that_do_not_fit_are_not_written(folder, tmp_path):
    data = read_official(folder)
    with pytest.raises(ValueError, match="4 identifiers are required; got 1"):
        write_official(tmp_path / "x", "train", data, identifiers=["<blank>"])
    with pytest.raises(ValueError, match="sets need plain names"):
        write_official(tmp_path / "x", "train", {"a/b": data})
    assert not (tmp_path / "x").exists()


def test_a_folder_of_the_builder_of_hrm_is_read(folder):
    path = folder / "train" / "dataset.json"
    said = json.loads(path.read_text())
    before = read_official(folder).metadata
    for name in ("total_puzzles", "total_groups", "mean_puzzle_examples"):
        del said[name]
        path.write_text(json.dumps(said), "utf-8-sig")
        assert read_official(folder).metadata == before


@pytest.mark.parametrize("name", ["num_puzzle_identifiers", "vocab_size", "ignore_label_id"])
def test_ids_beyond_32_bits_are_refused(folder, name):
    change(folder, **{name: 1 << 31})
    with pytest.raises(ValueError, match=rf"dataset\.json: {name} must be in .*; got 2147483648"):
        read_official(folder)


def test_names_of_identifiers_are_as_many_as_the_metadata_says(folder):
    (folder / "identifiers.json").write_text('["<blank>"]')
    with pytest.raises(ValueError, match=r"a name for each of the 4 identifiers .* got 1"):
        read_official(folder)


HEADERS = {
    "a lie about the size": "{'descr': '<i4', 'fortran_order': False, 'shape': (99, 4), }",
    "a size beyond all": "{'descr': '<i4', 'fortran_order': False, 'shape': (%s, 4), }"
    % ("9" * 18),
    "a negative size": "{'descr': '<i4', 'fortran_order': False, 'shape': (-4, 4), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (4, 4), }",
    "code": "{'descr': '<i4', 'fortran_order': False, 'shape': (4, __import__('os').getpid()), }",
    "deep": "(" * 3000,
    "an open string": "{'descr': '<i4",
    "a key twice": "{'descr': '<i4', 'descr': '<i4', 'shape': (4, 4), }",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(folder, case):
    text = HEADERS[case].encode()
    path = folder / "train" / "all__inputs.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(64))
    message = r"all__inputs\.npy: a complete \.npy array of integers is required; got "
    with pytest.raises(ValueError, match=message) as caught:
        read_official(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    "array", [np.ones((3, 2), ">i2"), np.ones((2, 3), "u1").T, np.ones(0, int)]
)
@pytest.mark.parametrize("mapped", [False, True])
def test_arrays_are_read_as_numpy_writes_them(tmp_path, version, array, mapped):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, array, version)
    found = read_npy(tmp_path / "a.npy", mapped=mapped)
    assert found.dtype == array.dtype and np.array_equal(found, array)
