"""The command line: exit codes, one-line errors, help without torch."""

import json
import subprocess
import sys
from dataclasses import is_dataclass
from importlib import import_module

import pytest

from trm_fast import __version__
from trm_fast._dispatch import BackendError
from trm_fast.cli import COMMANDS, _settings, main, train
from trm_fast.cli._settings import field_docs
from trm_fast.data import read_official
from trm_fast.recipes import RECIPES, load
from trm_fast.recipes.settings import leaves
from trm_fast.train import Checkpoints, RunDirectory, read_checkpoint
from trm_fast.train.reports.reading import read_run


def error_of(capsys, *argv, code=2):
    """Runs a command that must fail with ``code`` and returns its one line on stderr."""
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("trm-fast: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


def grokking(tmp_path, *more):
    """A run of one millisecond."""
    out = tmp_path / "run"
    fields = f"--prime 7 --iterations 2 --plot false --device cpu --out {out}"
    return ["train", "grokking", *fields.split(), *more]


def raise_in_run(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(train, "run", run)


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["train", "--help"], ["nonsense"], ["train", "nonsense"]]
)
def test_help_and_usage_errors_import_no_torch(argv):
    code = (
        "import sys; from trm_fast.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'rich', 'jsonargparse', 'matplotlib') "
        "if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == (2 if "nonsense" in argv else 0)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_trm_fast_is_the_command():
    command = [sys.executable, "-m", "trm_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"trm-fast {__version__}\n")


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, help in COMMANDS.items():
        assert f"{name} {help}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_with_its_own_help(name):
    assert import_module(f"trm_fast.cli.{name}").HELP == COMMANDS[name]


def test_no_command_is_a_usage_error(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: trm-fast")


def test_an_unknown_command_gets_a_suggestion(capsys):
    text = "trm-fast: unknown command 'trian'; did you mean 'train'?\n"
    assert error_of(capsys, "trian") == text


def test_an_unknown_flag_is_one_line(capsys):
    assert error_of(capsys, "--bogus") == "trm-fast: unrecognized arguments: --bogus\n"


def test_train_help_lists_the_recipes(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert f"  {name:8}  {recipe.help}" in text


def test_train_without_a_recipe_names_them(capsys):
    text = f"trm-fast: train: name a recipe; choose from {', '.join(RECIPES)}\n"
    assert error_of(capsys, "train") == text


def test_an_unknown_recipe_gets_a_suggestion(capsys):
    text = "trm-fast: train: unknown recipe 'groking'; did you mean 'grokking'?\n"
    assert error_of(capsys, "train", "groking") == text


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_help_shows_every_field_with_its_text_and_default(name, capsys):
    config = load(name).default
    assert main(["train", name, "--help"]) == 0
    # argparse breaks lines at spaces and at the hyphens of words.
    text = "".join(capsys.readouterr().out.split())
    for field, value in leaves(config):
        assert f"--{field}" in text
        shown = "null" if value is None else "".join(str(value).split())
        assert f"default:{shown})" in text
    for part in (config, *(v for v in vars(config).values() if is_dataclass(v))):
        for field, doc in field_docs(type(part)).items():
            if not is_dataclass(getattr(part, field)):
                assert doc, f"{field} has no description in the docstring"
                assert "".join(doc.split()) in text


def test_flags_reach_the_run(tmp_path):
    assert main(grokking(tmp_path, "--lr", "1e-4", "--betas", "[0.5, 0.75]")) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["lr"], config["betas"], config["prime"]) == (1e-4, [0.5, 0.75], 7)


def test_a_yaml_file_is_read_and_later_flags_override_it(tmp_path):
    file = tmp_path / "fast.yaml"
    file.write_text("lr: 1e-4\nseed: 3\n")
    assert main(grokking(tmp_path, "--config", str(file), "--seed", "4")) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["lr"], config["seed"]) == (1e-4, 4)


def test_the_config_of_a_run_can_be_run_again(tmp_path):
    assert main(grokking(tmp_path, "--seed", "3")) == 0
    first = tmp_path / "run" / "config.json"
    again = tmp_path / "again"
    assert main(["train", "grokking", "--config", str(first), "--out", str(again)]) == 0
    second = json.loads((again / "config.json").read_text())
    assert second == {**json.loads(first.read_text()), "out": str(again)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lrr", "3"], "unknown setting 'lrr'; did you mean 'lr'?"),
        (["--lrr=3"], "unknown setting 'lrr'; did you mean 'lr'?"),
        (["--stop-at-target", "false"], "unknown setting 'stop-at-target'; did you mean"),
        (["--prim", "7"], "unknown setting 'prim'; did you mean 'prime'?"),
        (["--lr", "fast"], "--lr: Expected a float. Got value: fast"),
        (["--filter", "emma"], "--filter: Expected one of 'ema', 'ma', 'highpass', "),
        (["--betas", "[0.9]"], "--betas: Expected a tuple with 2 elements."),
        (["--config", "missing.yaml"], "--config: File does not exist"),
    ],
)
def test_wrong_fields_are_one_line_and_write_nothing(tmp_path, capsys, flags, message):
    assert f"train grokking: {message}" in error_of(capsys, *grokking(tmp_path, *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prim: 7\n", "unknown setting 'prim'; did you mean 'prime'?"),
        ("lr: [1e-4\n", "bad.yaml: must be YAML; got an error in line 2: did not find"),
        ("&a lr: 1\n&a seed: 1\n", "bad.yaml: must be YAML; got an error in line 2: found dupl"),
        ("- 1\n- 2\n", "--config: expected a file with one 'setting: value' per line"),
        ("lr: fast\n", "--lr: Expected a float. Got value: fast"),
    ],
)
def test_wrong_files_are_one_line_and_write_nothing(tmp_path, capsys, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert message in error_of(capsys, *grokking(tmp_path, "--config", str(file)))
    assert not (tmp_path / "run").exists()


SUDOKU = ("train", "sudoku", "--dry-run", "--config")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "overwrite: true",
            "must hold settings only; got 'overwrite' in line 1, which is asked for",
        ),
        ("overwrite: false", "which is asked for on the command line, as --overwrite"),
        ("resume: true", "as --resume"),
        ("dry_run: true", "as --dry-run"),
        ("config: other.yaml", "as --config"),
        ("set: batch=3", "as --set"),
        ("__path__: x", "unknown setting '__path__'"),
        ("1: 2", "unknown setting '1'"),
        ("<<: {batch: 3}", "unknown setting '<<'"),
        ("? [1, 2]\n: 3", "names must be words; got something else in line 1"),
        ("batch: 4\nbatch: 5", "must have each setting once; got 'batch' in line 2"),
        ('{"batch": 4, "batch": 5}', "must have each setting once; got 'batch' in line 1"),
        ("train: {steps: 3}\ntrain.steps: 4", "once; got 'train.steps' in line 2"),
        ("train:\n", "train must hold settings, as 'train: {...}'; got nothing in line 1"),
        ("train: {}", "train must hold settings, as 'train: {...}'; got nothing in line 1"),
        ("train: 3", "train must hold settings, as 'train: {...}'; got '3' in line 1"),
        ("train: [1]", "train must hold settings, as 'train: {...}'; got something else in line 1"),
        ("trian: {steps: 3}", "unknown setting 'trian'; did you mean 'train'?"),
        ("train: {step: 3}", "unknown setting 'train.step'; did you mean 'train.steps'?"),
        ("batch: null", "--batch must have a value; got None"),
        ("", "--config: expected a file with one 'setting: value' per line"),
        ("batch: 3\n---\nbatch: 4", "must be YAML of one document; got another in line 2"),
    ],
)
def test_a_file_holds_settings_only_and_each_once(tmp_path, capsys, text, message):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    assert message in error_of(capsys, *SUDOKU, str(file))


def test_what_a_file_asks_for_deletes_no_run(tmp_path, capsys):
    assert main(grokking(tmp_path)) == 0
    before = sorted(tmp_path.rglob("*"))
    for given in ("overwrite: true\n", f"out: {tmp_path / 'run'}\noverwrite: true\n"):
        file = tmp_path.parent / f"{tmp_path.name}.yaml"
        file.write_text(given)
        assert "got 'overwrite'" in error_of(capsys, *grokking(tmp_path, "--config", str(file)))
    assert sorted(tmp_path.rglob("*")) == before


def test_names_in_a_file_may_be_nested_or_dotted(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("train.steps: 3\ndata: {clues: [6, 8]}\npreset: tiny\n")
    config = _settings.read_options(load("sudoku"), ["--config", str(file)]).config
    assert (config.train.steps, config.data.clues) == (3, (6, 8))


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())  # nothing that is called "~"


def test_a_home_directory_in_a_flag_a_file_and_python(home, capsys):
    few = "train grokking --prime 7 --iterations 1 --plot false --batch 16".split()
    assert main([*few, "--out=~/runs/a"]) == 0
    (home / "my.yaml").write_text("out: ~/runs/b\n")
    assert main([*few, "--config=~/my.yaml"]) == 0
    assert main(["train", "grokking", "--out=~/runs/b", "--resume", "--iterations", "2"]) == 0
    assert main(["report", "~/runs/a", "--out=~/shown"]) == 0
    assert {path.name for path in home.iterdir()} >= {"my.yaml", "runs", "shown"}
    with RunDirectory("~/runs/c") as run:
        Checkpoints("~/runs/c").save(1, {"model": {}})
        assert run.path == home / "runs" / "c"
    assert read_checkpoint("~/runs/c/ckpt/step-00000001").step == 1
    assert Checkpoints("~/runs/a").load("~/runs/c/ckpt/step-00000001").step == 1
    assert read_run("~/runs/b").name == "grokking"


def test_a_home_directory_with_data(home, capsys):
    made = ["--size", "4", "--count", "8", "--test", "4"]
    assert main(["data", "make", "sudoku", "--out=~/data", *made]) == 0
    assert main(["data", "check", "~/data"]) == 0
    assert len(read_official("~/data")) == 8 == len(read_official(home / "data"))
    assert main(["train", "sudoku", "--data.path=~/data", "--data.size=4", "--dry-run"]) == 0


def test_nobodys_home_directory_is_refused(home, capsys):
    message = "path: ~ must stand for a home directory; got '~nobody-of-this-name/run'"
    assert message in error_of(capsys, *grokking(home), "--out=~nobody-of-this-name/run")


def test_a_yaml_file_executes_nothing(tmp_path, capsys):
    canary = tmp_path / "canary"
    file = tmp_path / "bad.yaml"
    file.write_text(f"out: !!python/object/apply:os.mkdir ['{canary}']\n")
    message = "must have no tags; got tag:yaml.org,2002:python/object/apply:os.mkdir"
    assert message in error_of(capsys, *grokking(tmp_path, "--config", str(file)))
    assert not canary.exists()


def test_a_value_out_of_range_is_one_line(tmp_path, capsys):
    text = error_of(capsys, *grokking(tmp_path, "--target", "95"))
    assert text == "trm-fast: --target must be in [0, 1]; got 95.0\n"


def test_an_existing_run_is_not_overwritten_silently(tmp_path, capsys):
    assert main(grokking(tmp_path)) == 0
    capsys.readouterr()
    text = error_of(capsys, *grokking(tmp_path))
    assert "out must be a directory without a run" in text and "overwrite" in text
    assert main(grokking(tmp_path, "--overwrite")) == 0


def test_the_default_directory_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = "train grokking --prime 7 --iterations 1 --plot false --filter none --seed 2".split()
    assert main(argv) == 0
    assert (tmp_path / "runs" / "grokking-adam-none-seed2" / "metrics.jsonl").exists()


def test_a_run_whose_loss_is_not_finite_exits_1(tmp_path, capsys):
    argv = grokking(tmp_path, "--lr", "1e20", "--warmup", "0", "--iterations", "20")
    assert main(argv) == 1
    assert "the loss and gradients must be finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\n  b"), 2, "a b"),
        (TypeError("a"), 2, "a"),
        (PermissionError(13, "Permission denied", "x"), 2, "x: Permission denied"),
        (BackendError("cpp: not built"), 2, "cpp: not built"),
        (FloatingPointError("nan"), 1, "nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "there must be enough memory, and is not: MemoryError"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\n#0 frame"),
            2,
            "there must be enough memory, and is not: DefaultCPUAllocator: can't allocate memory: "
            "9 bytes",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_one_line_and_a_code(monkeypatch, capsys, error, code, line):
    raise_in_run(monkeypatch, error)
    assert error_of(capsys, "train", "grokking", code=code) == f"trm-fast: {line}\n"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("bug"), AttributeError("bug")])
def test_faults_of_the_package_keep_their_traceback(monkeypatch, error):
    raise_in_run(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["train", "grokking"])


@pytest.mark.parametrize(
    ("module", "extra"), [("jsonargparse", "train"), ("matplotlib.figure", "report")]
)
def test_a_missing_extra_names_the_install_command(tmp_path, capsys, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    text = error_of(capsys, *grokking(tmp_path, "--plot", "true"))
    name = module.partition(".")[0]
    assert text == f'trm-fast: {name} is not installed: pip install "trm_fast[{extra}]"\n'


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m trm_fast train sudoku --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")  # it may have written all by then


def test_the_second_interrupt_ends_the_process_without_a_traceback():
    program = (
        "import os, signal\n"
        "from trm_fast import __main__, cli\n"
        "def run(argv):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        os.kill(os.getpid(), int(argv[0]))\n"
        "        raise\n"
        "cli._run = run\n"
        "__main__.start()\n"
    )
    for second, code, said in ((0, 130, "trm-fast: interrupted\n"), (2, -2, "")):
        line = [sys.executable, "-c", program, str(second)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, said)


def test_another_missing_module_keeps_its_traceback(monkeypatch):
    raise_in_run(monkeypatch, ModuleNotFoundError("No module named 'x'", name="x"))
    with pytest.raises(ModuleNotFoundError):
        main(["train", "grokking"])


@pytest.mark.parametrize("flags", [["--optional", "None"], ["--optional=None"]])
def test_none_may_be_written_as_help_shows_it(flags):
    assert list(_settings._without_set("train", flags))[-1].rpartition("=")[2] == "null"
