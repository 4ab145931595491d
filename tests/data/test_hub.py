"""Data sets of the hub: from a local cache, without a connection unless one is asked for."""

import json
import subprocess
import sys
import warnings

import pytest

from trm_fast.data import RowCounts, hub_file, hub_rows, load_hub

pytest.importorskip("datasets", reason="the package datasets is not installed")

SUDOKU, MAZE = "sapientinc/sudoku-extreme", "sapientinc/maze-30x30-hard-1k"
CSV = f"source,question,answer,rating\ns,{'1...' * 4},{'1234' * 4},3\n"


@pytest.fixture
def cache(tmp_path):
    """A cache of the hub made by hand: one revision of Sudoku-Extreme with one file."""
    home = tmp_path / "datasets--sapientinc--sudoku-extreme"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    (home / "snapshots" / revision).mkdir(parents=True)
    (home / "snapshots" / revision / "test.csv").write_text(CSV)
    return tmp_path


def test_sudokus_come_from_the_cache_with_their_lines(cache):
    counts = RowCounts()
    data = load_hub(SUDOKU, "test", cache_dir=cache, counts=counts)
    assert data.inputs.tolist() == [[2, 1, 1, 1] * 4]
    assert data.labels.tolist() == [[2, 3, 4, 5] * 4]
    assert data.sources == (f"{SUDOKU}/test.csv:2",)
    assert counts.good == 1


def test_the_home_directory_may_hold_the_cache(cache, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HOME", str(cache))
    assert len(load_hub(SUDOKU, "test", cache_dir="~")) == 1
    given = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **options: given.append(options["cache_dir"])
    )
    hub_file(MAZE, "x.csv", download=True, cache_dir="~/hub")
    assert given == [str(cache / "hub")]


def test_bad_rows_are_named_by_repository_and_line(cache):
    [path] = cache.rglob("test.csv")
    path.write_text(CSV + "s,secret,b,1\n")
    with pytest.raises(ValueError, match=rf"^{SUDOKU}/test\.csv:3: question must have 16 ch"):
        load_hub(SUDOKU, "test", cache_dir=cache)


@pytest.mark.parametrize(("repository", "split"), [(SUDOKU, "train"), (MAZE, "test")])
def test_what_is_not_in_the_cache_is_none_and_one_message(cache, repository, split):
    said = []
    assert load_hub(repository, split, cache_dir=cache, skipped=said.append) is None
    [message] = said
    expected = f"{repository}: {split}.csv is not in the local cache; `hf download"
    assert message.startswith(expected)


@pytest.mark.parametrize("there", [True, False])
def test_a_download_is_made_only_if_asked_for(monkeypatch, there):
    import huggingface_hub

    calls, said = [], []

    def fetch(*arguments, **options):
        calls.append((arguments, options))
        if not there:
            raise ConnectionError("a long story")
        return "path"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found = hub_file(MAZE, "x.csv", download=True, cache_dir="c", skipped=said.append)
    assert calls == [((MAZE, "x.csv"), {"repo_type": "dataset", "cache_dir": "c"})]
    assert found == ("path" if there else None)
    assert said == ([] if there else [f"{MAZE}: x.csv could not be fetched (ConnectionError)"])


def test_without_a_callback_it_warns_once(cache):
    with pytest.warns(UserWarning, match=r"once\.csv is not in the local cache"):
        assert hub_file(MAZE, "once.csv", cache_dir=cache) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hub_file(MAZE, "once.csv", cache_dir=cache) is None


def test_other_repositories_are_refused():
    with pytest.raises(ValueError, match="repository must be one of sapientinc/sudoku-extreme"):
        load_hub("someone/else")


def test_a_missing_package_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = []
    assert hub_rows("someone/else", skipped=said.append) is None
    assert said == ["someone/else: the package datasets is required; pip install datasets"]


def test_rows_are_asked_for_without_remote_code_and_offline(monkeypatch):
    import datasets
    import huggingface_hub

    calls = []

    def load(*arguments, **options):
        offline = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
        calls.append((arguments, options, offline))
        return [{"a": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert hub_rows("x/y", "small", "test") == [{"a": 1}]
    assert hub_rows("x/y", download=True) == [{"a": 1}]
    options = {"split": "test", "cache_dir": None}
    assert calls[0] == (("x/y", "small"), options, (True, True))
    assert calls[1] == (("x/y", None), {**options, "split": "train"}, (False, False))
    assert not datasets.config.HF_HUB_OFFLINE
    # Whoever set HF_HUB_OFFLINE gets no connection by download=True.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub_rows("x/y", download=True)
    assert calls[2][2] == (True, False)


@pytest.mark.parametrize("download", [False, True])
def test_rows_that_cannot_be_had_are_none_and_one_message(monkeypatch, download):
    import datasets

    def load(*arguments, **options):
        raise ConnectionError("a long story")

    monkeypatch.setattr(datasets, "load_dataset", load)
    said = []
    assert hub_rows("x/y", download=download, skipped=said.append) is None
    reason = {
        False: "is not in the local cache; download=True fetches it",
        True: "could not be fetched (ConnectionError)",
    }
    assert said == [f"x/y: {reason[download]}"]


def test_a_configuration_is_absent_offline_and_wrong_online(monkeypatch):
    import datasets

    def load(*arguments, **options):
        raise ValueError("no such thing\nbut others")

    monkeypatch.setattr(datasets, "load_dataset", load)
    said = []
    assert hub_rows("x/y", "small", "test", skipped=said.append) is None
    assert said == ["x/y/small/test is not in the local cache; download=True fetches it"]
    with pytest.raises(ValueError, match=r"^hub_rows: no such thing$"):
        hub_rows("x/y", "small", "test", download=True)


def test_rows_come_from_the_cache_of_datasets(tmp_path):
    """The files of a finished preparation, under the names that the cache gives them."""
    import datasets

    home = tmp_path / "someone___else" / "default" / "0.0.0" / "0123456789abcdef"
    table = datasets.Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]})
    table.save_to_disk(tmp_path / "made")
    home.mkdir(parents=True)
    [arrow] = (tmp_path / "made").glob("*.arrow")
    arrow.rename(home / "else-train.arrow")
    split = {"name": "train", "num_bytes": 1, "num_examples": 2, "dataset_name": "else"}
    info = json.loads((tmp_path / "made" / "dataset_info.json").read_text())
    names = {"builder_name": "csv", "dataset_name": "else", "config_name": "default"}
    info |= {**names, "version": {"version_str": "0.0.0"}, "splits": {"train": split}}
    (home / "dataset_info.json").write_text(json.dumps(info))
    rows = hub_rows("someone/else", cache_dir=tmp_path)
    assert len(rows) == 2
    assert [*rows] == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


OFFLINE = """
import json, sys
cache, out = sys.argv[1:]
connections = []
sys.addaudithook(lambda event, _: connections.append(event))
from trm_fast.data import hub_rows, load_hub
said = []
data = load_hub("sapientinc/sudoku-extreme", "test", cache_dir=cache, skipped=said.append)
none = load_hub("sapientinc/maze-30x30-hard-1k", "test", cache_dir=cache, skipped=said.append)
rows = hub_rows("someone/else", cache_dir=out, skipped=said.append)
found = [len(data), none, rows, len(said)]
wanted = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
print(json.dumps([found, sorted(wanted & {*connections})]))
"""


def test_no_connection_is_opened(cache, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(cache), str(tmp_path / "rows")],
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[1, None, None, 2], []]
