"""``trm-fast eval``: a small run, its checkpoints, other data, and one-line errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trm_fast.cli import main

SMALL = (
    "data.size=4", "data.clues=[5,8]", "data.train=100", "data.test=30", "model.hidden_size=16",
    "model.num_heads=2", "model.H_cycles=1", "model.L_cycles=1", "model.halt_max_steps=2",
    "train.steps=6", "train.log_every=3", "train.evaluate_every=3", "train.save_every=3",
    "train.monitor=accuracy", "train.ema=0.5", "batch=16", "device=cpu", "optimizer.lr=0.01",
)  # fmt: skip


@pytest.mark.parametrize("argv", [["--help"], ["nothing"], ["a", "--which", "first"]])
def test_help_and_usage_errors_import_no_torch(argv):
    code = (
        "import sys; from trm_fast.cli import main; code = main(['eval', *sys.argv[1:]]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in argv else 2)
    assert done.stdout.splitlines()[-1] == "False"


def sets(*words):
    return [part for word in words for part in ("--set", word)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("eval") / "run"
    assert main(["train", "sudoku", *sets(*SMALL), "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluated(capsys, *argv):
    capsys.readouterr()
    assert main(["eval", *map(str, argv), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def error_of(capsys, *argv):
    capsys.readouterr()
    assert main(["eval", *map(str, argv)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("trm-fast: ") and text.count("\n") == 1
    return text.removeprefix("trm-fast: ").rstrip()


def recorded(run, step):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (found,) = [line for line in lines if line["kind"] == "evaluation" and line["step"] == step]
    return {name: found[name] for name in found if name not in ("kind", "step", "seconds")}


def contents(path):
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("step", [3, 6])
def test_a_step_has_the_metrics_that_the_run_has_recorded(trained, capsys, step):
    found = evaluated(capsys, trained, "--which", step)
    assert (found["step"], found["checkpoint"]) == (step, f"step-{step:08}")
    # The same weights, data and code: the same bits.
    assert found["metrics"] == recorded(trained, step)
    assert found["skipped"] == []


def test_averages_beside_the_optimizer_are_taken_too(tmp_path, capsys):
    run = tmp_path / "run"
    words = sets(*SMALL, "optimizer.name=adamw")
    assert main(["train", "sudoku", *words, "--out", str(run)]) == 0
    assert (run / "ckpt" / "step-00000006" / "ema.safetensors").exists()
    assert evaluated(capsys, run)["metrics"] == recorded(run, 6)


def test_latest_is_the_default_and_best_goes_by_the_monitor(trained, capsys):
    assert evaluated(capsys, trained)["step"] == 6
    scores = {step: recorded(trained, step)["accuracy"] for step in (3, 6)}
    best = max(scores, key=scores.__getitem__)
    assert evaluated(capsys, trained, "--which", "best")["step"] == best


def test_nothing_in_the_run_changes(trained, capsys):
    before = contents(trained)
    evaluated(capsys, trained)
    assert contents(trained) == before


def test_the_table_has_the_metrics(trained, capsys):
    capsys.readouterr()
    assert main(["eval", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = "the averaged weights after 6 steps on the data of the run"
    assert lines[0] == f"step-00000006: {told}"
    value = recorded(trained, 6)["accuracy"]
    assert ["accuracy", f"{100 * value:.2f}", "%"] in [line.split() for line in lines]


def test_a_setting_changes_the_data(trained, capsys):
    found = evaluated(capsys, trained, *sets("data.test=12", "data.seed=5"))
    assert found["metrics"]["count"] == 12


def test_other_data_is_taken_whole(trained, tmp_path, capsys):
    data = tmp_path / "data"
    sizes = ["--size", "4", "--count", "40", "--test", "50"]
    assert main(["data", "make", "sudoku", *sizes, "--out", str(data)]) == 0
    found = evaluated(capsys, trained, "--data", data)
    assert (found["metrics"]["count"], found["data"]) == (50, str(data))


def test_a_tampered_checkpoint_is_passed_over_and_named(run, capsys):
    spoil(run / "ckpt" / "step-00000006" / "model.safetensors")
    found = evaluated(capsys, run)
    assert found["step"] == 3 and found["metrics"] == recorded(run, 3)
    (reason,) = found["skipped"]
    assert "step-00000006: model.safetensors must have the sha256 of MANIFEST.json" in reason
    assert main(["eval", str(run)]) == 0
    assert capsys.readouterr().out.startswith("passed over: checkpoint: ")


def test_a_tampered_step_that_was_asked_for_is_an_error(run, capsys):
    spoil(run / "ckpt" / "step-00000006" / "model.safetensors")
    assert "must have the sha256" in error_of(capsys, run, "--which", "6")


def spoil(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_no_whole_checkpoint_is_an_error(run, capsys):
    shutil.rmtree(run / "ckpt")
    assert error_of(capsys, run) == f"checkpoint: latest of {run / 'ckpt'} must be whole; got none"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (sets("data.sed=1"), "eval: unknown setting 'data.sed'; did you mean 'data.seed'?"),
        (sets("config=other.yaml"), "eval: unknown setting 'config'"),
        (sets("batch=many"), "eval: --batch: Expected an int. Got value: many"),
        (sets("batch"), "eval: --set must be followed by NAME=VALUE; got 'batch'"),
        (["--which", "first"], "eval: --which must be latest, best or a step; got 'first'"),
        (["--which", "5"], "or a step; got '5', and the steps of "),
        (["--data", "/nowhere"], "data: path must be a directory"),
        (sets("model.hidden_size=32"), "of the checkpoint must be "),
        (["--wich", "best"], "unrecognized arguments: --wich best"),
    ],
)
def test_wrong_words_are_one_line(trained, capsys, argv, message):
    assert message in error_of(capsys, trained, *argv)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json: must be JSON; got "),
        ("config.json", "{}", "config.json: SudokuConfig: the setting "),
        ("run.json", "[]", "run.json: must be a JSON object; got list"),
        ("run.json", '{"name": "sudku"}', "unknown recipe 'sudku'; did you mean 'sudoku'?"),
        ("run.json", "{}", "unknown recipe None; choose from "),
    ],
)
def test_damaged_files_are_one_line(run, capsys, name, text, message):
    (run / name).write_text(text)
    assert message in error_of(capsys, run)


def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys):
    text = error_of(capsys, tmp_path / "nothing")
    got = f"{tmp_path / 'nothing'}, where there is none"
    assert text == f"eval: RUN must be the directory of a run; got {got}"
    assert "run.json" in error_of(capsys, tmp_path)


def test_a_directory_without_a_run_is_one_line(capsys, tmp_path):
    told = f"{tmp_path / 'run.json'}: must be there, as in every run; got no such file"
    assert error_of(capsys, tmp_path) == told
