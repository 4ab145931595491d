"""JSON and YAML of bounded depth: each reader refuses a deep file, whatever the recursion limit."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trm_fast._json import MAX_DEPTH, depth_of, load_object, loads, read_object

ROOT = Path(__file__).parents[1]
TEXTS = st.text(alphabet='[]{}"\\,: aé\u2028', max_size=12)
TREES = st.recursive(
    TEXTS | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)
)


def levels(tree) -> int:
    if not isinstance(tree, (list, dict)):
        return 0
    inner = tree.values() if isinstance(tree, dict) else tree
    return 1 + max(map(levels, inner), default=0)


@given(TREES, st.booleans(), st.sampled_from([None, 1]))
@example('\\"', False, None)
@example({'\\"[': ["\\\\"]}, True, None)
def test_the_depth_is_that_of_what_is_parsed(tree, escaped, indent):
    assert depth_of(json.dumps(tree, ensure_ascii=escaped, indent=indent)) == levels(tree)


@pytest.mark.parametrize("opened", ["[", '{"a":', '[{"a":', '["]]]]",', '["\\"",'])
def test_what_is_cut_off_counts_too(opened):
    assert depth_of(opened * 10_000) == 10_000 * (opened.count("[") + opened.count("{"))


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"[[":', "}")])
def test_the_deepest_is_read_and_one_more_is_not(begin, end):
    # The brackets beside it are more than may be open.
    text = f"[{begin * (MAX_DEPTH - 1)}1{end * (MAX_DEPTH - 1)}, []]"
    assert levels(loads(text, "file")) == MAX_DEPTH
    with pytest.raises(ValueError, match=r"^file must be nested at most 64 deep; got 65$"):
        loads(f"[{text}]", "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON; got Expecting value at column 1"),
        ('{"a": 1,\n}', "must be JSON; got Expecting property name .* at line 2, column 1"),
        (b"[1\xff]", "must be UTF-8; got invalid byte 2"),
        ("[1]", "must be a JSON object; got list"),
    ],
)
def test_what_is_no_object_is_told_in_one_line(text, message):
    with pytest.raises(ValueError, match=f"^file: {message}$"):
        load_object(text, "file:")


@pytest.mark.parametrize(
    ("text", "came"),
    [
        ("9" * 400, "an integer of 400 characters"),
        ("-" + "9" * 21, "an integer of 22 characters"),
        ("1e999", "a number that is too large"),
        ("9" * 310 + ".0", "a number that is too large"),
        ("-1E0400", "a number that is too large"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
    ],
)
def test_numbers_that_are_none_are_refused(text, came):
    with pytest.raises(ValueError, match=f"^file: must be JSON; got {came}$"):
        loads(f'{{"a": {text}}}', "file:")


def test_numbers_that_only_look_large_are_read():
    text = '["' + "9" * 400 + '", 1e-999, 1.5e300, -18446744073709551616, "1e999", 0.' + "1" * 400
    found = loads(text + "]", "file:")
    assert found[1:] == [0.0, 1.5e300, -(1 << 64), "1e999", 1 / 9]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.json").write_text("{}", "utf-8-sig")
    assert read_object(tmp_path / "a.json") == {}


# Python would end with a full stack rather than with an exception, so that a process of its own
# reads the files. {deep} is where a file is too deep; the folder is new for each reader.
READERS = {
    "state of a checkpoint": (
        "state.json",
        "from trm_fast.train.checkpoints.state import loads\nloads(path.read_bytes(), str(path))",
    ),
    "checkpoint": (
        "ckpt/step-00000001/MANIFEST.json",
        "from trm_fast.train import read_checkpoint\nread_checkpoint(path.parent)",
    ),
    "report of settings": (
        "config.json",
        "from trm_fast.train.reports.reading import read_run\nread_run(folder)",
    ),
    "report of records": (
        "metrics.jsonl",
        "from trm_fast.train.reports.reading import read_run\n"
        "(folder / 'config.json').write_text('{}')\nread_run(folder)",
    ),
    "records of a run": (
        "metrics.jsonl",
        "from trm_fast.train.run_directory import RunDirectory\n"
        "with RunDirectory(folder) as run: run.truncate('metrics.jsonl', 1)",
    ),
    "task": (
        "tasks/a.json",
        "from trm_fast.data import read_arc_folder\nread_arc_folder(folder)",
    ),
    "official metadata": (
        "train/dataset.json",
        "from trm_fast.data.sources.official import read_official\nread_official(folder)",
    ),
    "official names": (
        "identifiers.json",
        "from trm_fast.data.sources.official import read_identifiers\nread_identifiers(folder)",
    ),
    "official tasks": (
        "test_puzzles.json",
        "from trm_fast.data.sources.official import read_test_puzzles\nread_test_puzzles(folder)",
    ),
    "rows": (
        "rows.jsonl",
        "from trm_fast.data import read_jsonl\nread_jsonl(path, {'a': str})",
    ),
    "settings of a run": (
        "config.json",
        "from trm_fast.cli._settings import read_json\nread_json(path)",
    ),
    "run of the bench": (
        "adam-wd1-plain-seed0.json",
        "from trm_fast.recipes.grokking.bench.runs import Plan\n"
        "from trm_fast.recipes.grokking import GrokkingConfig\n"
        "Plan(('adam-wd1-plain',), (0,), GrokkingConfig(), folder).outcomes()",
    ),
    "times of the bench": (
        "time.json",
        "from trm_fast.recipes.grokking.bench.runs import Plan\n"
        "from trm_fast.recipes.grokking import GrokkingConfig\n"
        "Plan(('adam-wd1-plain',), (0,), GrokkingConfig(), folder).timing()",
    ),
    "settings in YAML": (
        "settings.yaml",
        "from trm_fast.cli._settings import read_options\n"
        "from trm_fast.recipes import load\n"
        "read_options(load('grokking'), ['--config', str(path)])",
    ),
}
PROGRAM = """
import json, sys
from pathlib import Path
folder, program = Path(sys.argv[1]), json.loads(sys.argv[2])
sys.setrecursionlimit(100_000)
found = {}
for number, (reader, (name, statements)) in enumerate(program.items()):
    for deep in ("[", '{"a":', '["\\\\"]", '):
        home = folder / f"{number}-{len(deep)}"
        path = home / name
        path.parent.mkdir(parents=True)
        path.write_text(deep * (8_000 if path.suffix == ".yaml" else 100_000) + "\\n")
        print(reader, flush=True)
        try:
            exec(statements, {"path": path, "folder": home})
            print("-", flush=True)
        except ValueError as error:
            print(error, flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, list[str]]:
    """What each reader says of deep files."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("deep"))]
    done = subprocess.run(
        [*command, json.dumps(READERS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"the process ended at {lines[-1:]} {done.stderr}"
    found: dict[str, list[str]] = {reader: [] for reader in READERS}
    for reader, message in zip(lines[::2], lines[1::2], strict=True):
        found[reader].append(message)
    return found


@pytest.mark.parametrize("reader", READERS)
def test_each_reader_refuses_a_deep_file(refusals, reader):
    name = READERS[reader][0].rpartition("/")[2]
    # A level of state is up to three of JSON.
    limit = 195 if "checkpoint" in reader else MAX_DEPTH
    wanted = f"must be nested at most {limit} deep; got 100000"
    if "YAML" in reader:
        # The events end at the first level too many; libyaml, which reads ahead, has its own bound.
        wanted = rf"must be nested at most {limit} deep; got 65|exceeded maximum nesting depth"
    assert len(refusals[reader]) == 3
    for message in refusals[reader]:
        assert re.search(f"{name}:?.* ({wanted})", message)


def test_an_alias_in_yaml_is_refused(tmp_path):
    from trm_fast.cli._settings import read_options
    from trm_fast.recipes import load

    path = tmp_path / "settings.yaml"
    path.write_text(
        textwrap.dedent("""
        lr: &self [*self]
    """)
    )
    with pytest.raises(ValueError, match=r"settings\.yaml: must have no aliases; got \*self$"):
        read_options(load("grokking"), ["--config", str(path)])


def test_block_style_in_yaml_is_counted_too(tmp_path):
    from trm_fast.cli._settings import read_options
    from trm_fast.recipes import load

    path = tmp_path / "settings.yaml"
    path.write_text("lr:\n  " + "- " * 900 + "1\n")
    message = r"settings\.yaml: must be nested at most 64 deep; got 65$"
    with pytest.raises(ValueError, match=message):
        read_options(load("grokking"), ["--config", str(path)])


@pytest.mark.parametrize("opened", [b'{"a":', b"["])
def test_the_header_of_a_tensor_file_has_a_bound_of_its_own(opened):
    """The library counts by itself, in Rust."""
    from trm_fast.train.checkpoints.state import from_safetensors

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        header = opened * 100_000
        with pytest.raises(ValueError, match="must be a safetensors file; SafetensorError"):
            from_safetensors(len(header).to_bytes(8, "little") + header)
    finally:
        sys.setrecursionlimit(limit)
