"""What a recipe declares: refused where it is wrong, and obeyed by the command line."""

import json
import os
import signal
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from trm_fast.cli import eval as eval_command
from trm_fast.cli import main
from trm_fast.cli import train as command
from trm_fast.cli._runs import runs_in
from trm_fast.recipes import Listing
from trm_fast.recipes.recipe import Recipe, trainer_settings
from trm_fast.recipes.running import train
from trm_fast.recipes.settings import to_json
from trm_fast.train import Callback, Summary, Trainer, TrainerConfig, files


@dataclass(frozen=True)
class Config:
    """A line through points.

    Args:
        max_steps: updates of the weights.
        lr: learning rate.
        models: how many are trained.
        seed: of the weights.
        out: directory of the run.
        train: settings of the trainer.
    """

    max_steps: int = 4
    lr: float = 0.1
    models: int = 1
    seed: int = 0
    out: str = ""
    train: TrainerConfig = field(default_factory=TrainerConfig)


class Signal(Callback):
    """Interrupts the run after a step."""

    at: int | None = None

    def on_step(self, run, step):
        if run.step == Signal.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def no_signal():
    yield
    Signal.at = None


def build(config):
    torch.manual_seed(config.seed)
    model = torch.nn.Linear(1, 1)
    config_of_run = replace(config.train, steps=config.max_steps, save_every=1, log_every=1)
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=config.lr),
        [torch.tensor([[1.0], [2.0]])],
        lambda model, batch: (model(batch) - 3.0).square().mean(),
        config_of_run,
        evaluate=lambda model: {"weight": float(model.weight)},
        callbacks=[Signal()],
        out=config.out or "runs/line",
        device="cpu",
        name="line",
        settings=to_json(config),
    )


def runs(config):
    if config.models == 1:
        return {"model": config}
    return {f"model-{i}": replace(config, models=1, seed=i) for i in range(config.models)}


DECLARED = {
    "name": "line",
    "presets": {"default": Config()},
    "build": build,
    "finish": lambda trainer, summary: [f"{trainer.out.name}: step {summary.step}"],
    "length": "max_steps",
    "may_change": (*trainer_settings("train"), "out"),
}
LINE = Recipe(**DECLARED)
SEVERAL = Recipe(
    **DECLARED, runs=runs, compare=lambda found: [f"{name}!" for name in found]
)  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("length", "steps"),
        ("may_change", ("lrs",)),
        ("evaluation", {"tracker": "none"}),
        ("data", "data.path"),
        ("all_data", {"data.train": 0}),
    ],
)
def test_a_declared_setting_that_is_not_there_is_named_with_those_that_are(argument, value):
    wrong = value if isinstance(value, str) else next(iter(value))
    message = (
        rf"Recipe 'line': {argument} must name settings of Config; got '{wrong}', not among "
        "max_steps, lr, models, seed, out, train.steps"
    )
    with pytest.raises(ValueError, match=message):
        Recipe(**{**DECLARED, argument: value})


def test_the_directory_of_several_runs_must_be_a_setting():
    with pytest.raises(ValueError, match="directory must name settings of Config; got 'folder'"):
        Recipe(**DECLARED, runs=runs, directory="folder")


def test_presets_are_of_one_class():
    with pytest.raises(TypeError, match="of one dataclass, Config; got TrainerConfig for 'other'"):
        Recipe(**{**DECLARED, "presets": {"default": Config(), "other": TrainerConfig()}})
    with pytest.raises(ValueError, match="presets must have at least one; got none"):
        Recipe(**{**DECLARED, "presets": {}})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 80, "out": "elsewhere"}, {}),
        ({"train": TrainerConfig(log_every=3)}, {}),
        ({"lr": 1.0}, {"lr": (0.1, 1.0)}),
        ({"train": TrainerConfig(accumulate=2)}, {"train.accumulate": (1, 2)}),
    ],
)
def test_what_a_resume_may_not_change(changes, expected):
    assert LINE.changes(Config(), replace(Config(), **changes)) == expected


@pytest.fixture
def listed(monkeypatch):
    """Lets the command line know a recipe."""

    def add(recipe):
        listing = Listing("Fits a line.", "line")
        for module in (command, eval_command):
            monkeypatch.setattr(module, "RECIPES", {"line": listing})
            monkeypatch.setattr(module, "load", lambda name: recipe)

    return add


def test_the_length_of_a_new_recipe_can_be_raised_on_resume(tmp_path, listed, capsys):
    listed(LINE)
    out = str(tmp_path / "run")
    assert main(["train", "line", "--out", out]) == 0
    assert main(["train", "line", "--out", out, "--resume", "--max_steps", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run: step 8"
    assert main(["train", "line", "--out", out, "--resume", "--lr", "1"]) == 2
    assert "lr must be 0.1 as in the run that is resumed; got 1.0" in capsys.readouterr().err


def weights(directory):
    newest = sorted((directory / "ckpt").glob("step-*"))[-1]
    return (newest / "model.safetensors").read_bytes()


def test_several_runs_are_trained_below_one_directory(tmp_path, capsys):
    assert train(SEVERAL, Config(models=3, out=str(tmp_path))) == 0
    lines = [f"model-{i}: step 4" for i in range(3)] + [f"model-{i}!" for i in range(3)]
    assert capsys.readouterr().out.splitlines() == lines
    assert json.loads((tmp_path / "run.json").read_text())["runs"] == [
        "model-0", "model-1", "model-2",
    ]  # fmt: skip
    alone = replace(Config(), seed=2, out=str(tmp_path / "alone"))
    assert train(LINE, alone) == 0
    assert weights(tmp_path / "alone") == weights(tmp_path / "model-2")


def test_an_interrupted_series_goes_on_to_the_same_bits(tmp_path, listed, capsys):
    assert train(SEVERAL, Config(models=3, out=str(tmp_path / "whole"))) == 0
    listed(SEVERAL)
    out = str(tmp_path / "again")
    Signal.at = 2
    assert main(["train", "line", "--models", "3", "--out", out]) == 128 + signal.SIGINT
    assert f"go on: trm-fast train line --out {out} --resume" in capsys.readouterr().out
    assert not (tmp_path / "again" / "model-1").exists()
    Signal.at = None
    assert main(["train", "line", "--out", out, "--resume"]) == 0
    for name in ("model-0", "model-1", "model-2"):
        assert weights(tmp_path / "again" / name) == weights(tmp_path / "whole" / name)


def test_a_directory_with_runs_is_not_written_over_unasked(tmp_path):
    config = Config(models=2, out=str(tmp_path))
    assert train(SEVERAL, config) == 0
    with pytest.raises(FileExistsError, match="train line: out must be a directory without runs"):
        train(SEVERAL, config)
    assert train(SEVERAL, config, overwrite=True) == 0


@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1)])
def test_overwriting_leaves_no_run_that_a_report_would_mix_in(before, now, tmp_path):
    assert train(SEVERAL, Config(models=before, out=str(tmp_path))) == 0
    assert train(SEVERAL, Config(models=now, out=str(tmp_path)), overwrite=True) == 0
    found = sorted(path.parent.name for path in tmp_path.rglob("metrics.jsonl"))
    assert found == ([tmp_path.name] if now == 1 else [f"model-{i}" for i in range(now)])
    assert len(runs_in("report", tmp_path)) == now


def test_what_cannot_be_built_deletes_nothing(tmp_path):
    config = Config(models=2, out=str(tmp_path))
    assert train(SEVERAL, config) == 0
    before = sorted(tmp_path.rglob("*"))

    def fail(config):
        raise ValueError("no such data")

    with pytest.raises(ValueError, match="no such data"):
        train(replace(SEVERAL, build=fail), config, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("asked", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_of_several_is_no_link_to_another_one(asked, tmp_path):
    assert train(LINE, Config(out=str(tmp_path / "other"))) == 0
    before = weights(tmp_path / "other")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model-1").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="whole/model-1 must not be a link"):
        train(SEVERAL, Config(models=2, out=str(tmp_path / "whole")), **asked)
    assert weights(tmp_path / "other") == before
    assert not (tmp_path / "whole" / "model-0").exists()


def test_settings_that_were_changed_in_a_file_of_the_run_are_named(tmp_path, listed, capsys):
    listed(LINE)
    out = tmp_path / "run"
    assert main(["train", "line", "--out", str(out)]) == 0
    kept = (out / "config.json").read_text()
    (out / "config.json").write_text(kept.replace('"lr": 0.1', '"lr": 0.2'))
    capsys.readouterr()
    assert main(["train", "line", "--out", str(out), "--resume", "--max_steps", "8"]) == 2
    text = capsys.readouterr().err
    assert "train line: lr must be 0.1 as in the last checkpoint, " in text
    assert f"got 0.2. Set it back in {out}/config.json" in text
    (out / "config.json").write_text(kept)
    assert main(["train", "line", "--out", str(out), "--resume", "--max_steps", "8"]) == 0


def test_a_run_that_was_killed_behind_its_settings_can_be_resumed(tmp_path, listed, capsys):
    listed(LINE)
    out = tmp_path / "run"
    assert main(["train", "line", "--lr", "0.2", "--out", str(out)]) == 0
    wanted = weights(out)
    for path in out.iterdir():
        if path.name not in (".lock", "config.json"):
            files.remove(path)
    assert main(["train", "line", "--out", str(out), "--resume"]) == 0
    assert weights(out) == wanted


def test_a_run_that_stands_for_several_is_refused(tmp_path):
    nested = replace(SEVERAL, runs=lambda config: {"a": config, "b": config})
    message = "the settings of a run must stand for that run alone; got 2 others for those of 'a'"
    with pytest.raises(ValueError, match=f"recipe line: {message}"):
        train(nested, Config(out=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_stands_for_another_one_is_refused(tmp_path):
    changing = replace(
        SEVERAL,
        runs=lambda c: {f"model-{i}": replace(c, models=1, seed=i) for i in range(c.models)},
    )
    with pytest.raises(ValueError, match="got 1 other for those of 'model-1'"):
        train(changing, Config(models=2, out=str(tmp_path / "runs")))


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_run_must_be_named_like_a_directory(name, tmp_path):
    wrong = replace(SEVERAL, runs=lambda config: {name: config, "b": config})
    with pytest.raises(ValueError, match="runs must have names that directories can have; got"):
        train(wrong, Config(out=str(tmp_path)))


def test_a_run_of_a_series_resumes_alone(tmp_path, listed, capsys):
    assert train(SEVERAL, Config(models=2, out=str(tmp_path))) == 0
    listed(SEVERAL)
    alone = str(tmp_path / "model-1")
    assert main(["train", "line", "--out", alone, "--resume", "--max_steps", "6"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "model-1: step 6"
    assert not (tmp_path / "model-1" / "model-1").exists()


def test_the_first_of_several_runs_is_rehearsed(tmp_path, listed, capsys):
    listed(SEVERAL)
    out = tmp_path / "runs"
    assert (
        main(["train", "line", "--models", "2", "--seed", "9", "--out", str(out), "--dry-run"]) == 0
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seed", "0"] in lines and ["out", str(out / "model-0")] in lines
    assert lines[-1] == "runs 2: model-0, model-1; this was model-0".split()
    assert not out.exists()


@pytest.mark.slow
def test_several_runs_are_reported_and_evaluated_together(tmp_path, listed, capsys):
    assert train(SEVERAL, Config(models=2, out=str(tmp_path))) == 0
    listed(SEVERAL)
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "line model-0: finished at step 4 of 4" in text and "line model-1: finished" in text
    assert (tmp_path / "curves.png").is_file()
    assert main(["eval", str(tmp_path), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["run"] for one in found] == [str(tmp_path / f"model-{i}") for i in range(2)]
    assert all(one["step"] == 4 for one in found)
    assert main(["eval", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("model-")] == ["model-0", "model-1"]


def test_of_several_runs_those_that_have_begun_are_reported(tmp_path, capsys):
    Signal.at = 2
    assert train(SEVERAL, Config(models=2, out=str(tmp_path))) == 128 + signal.SIGINT
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "line model-0: interrupted" in text and "model-1" not in text


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["a", "b"], "RUN must have runs that have begun; got"),
        (["../a"], "runs must be names of directories; got '../a'"),
        ("a", "runs must be a list of names; got 'a'"),
    ],
)
@pytest.mark.parametrize("command", ["report", "eval"])
def test_several_runs_that_cannot_be_read_are_one_line(command, said, message, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"name": "line", "runs": said}))
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_several_runs_leave_the_group_of_processes_to_their_trainers(tmp_path, monkeypatch):
    # As under torchrun with GPUs: a group that is made before the trainer would be of the CPU.
    from trm_fast.recipes import running

    groups = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", groups.append)
    monkeypatch.setattr(
        running, "_train_one", lambda *args: Summary(4, "", None, 0, 0, {}, {}, None)
    )
    several = replace(SEVERAL, build=lambda config: None)
    assert train(several, Config(models=2, out=str(tmp_path / "main"))) == 0
    assert groups == [] and (tmp_path / "main" / "run.json").is_file()
    monkeypatch.setenv("RANK", "1")
    assert train(several, Config(models=2, out=str(tmp_path / "second"))) == 0
    assert groups == [] and not (tmp_path / "second").exists()


def test_settings_that_stand_for_one_run_are_one_run(tmp_path, capsys):
    assert train(SEVERAL, Config(models=1, out=str(tmp_path / "run"))) == 0
    assert capsys.readouterr().out.splitlines() == ["run: step 4"]


@pytest.fixture
def own(monkeypatch):
    """Lets a recipe "line" have commands of its own, each of which returns its option."""
    import sys

    from trm_fast.cli import _own_commands

    module = SimpleNamespace(
        HELP="Counts.",
        add_arguments=lambda parser: parser.add_argument("--to", type=int),
        run=lambda args: args.to,
    )
    monkeypatch.setitem(sys.modules, "line_command", module)

    def declare(*commands, name="line"):
        listing = Listing("Fits a line.", "line", commands=dict.fromkeys(commands, "line_command"))
        monkeypatch.setattr(_own_commands, "RECIPES", {name: listing})

    return declare


@pytest.mark.parametrize("command", ["bench", "merge", "data make", "data convert"])
def test_own_commands_are_run_by_the_command_line(command, own, capsys):
    own(command)
    words = command.split()
    assert main([*words, "line", "--to", "7"]) == 7
    assert main([*words, "line", "--to", "x"]) == 2
    assert "argument --to: invalid int value" in capsys.readouterr().err
    assert main([*words, "--help"]) == 0
    assert "Counts." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench", "bench: name a recipe; choose from line"),
        ("merge", "merge: name a recipe; choose from line"),
        ("data convert", "data convert: name a recipe; choose from line"),
        ("data make", "data make: name a kind; choose from sudoku, maze, listops, arc, line"),
    ],
)
def test_an_own_command_without_a_recipe_names_those_that_have_it(command, message, own, capsys):
    own(command)
    assert main(command.split()) == 2
    assert capsys.readouterr().err == f"trm-fast: {message}\n"


def test_own_commands_are_listed(own, capsys):
    own("merge", "data convert")
    assert main(["--help"]) == 0
    assert "merge" in capsys.readouterr().out
    assert main(["mergee"]) == 2
    assert "did you mean 'merge'?" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert "choose from check, make, convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["train", "data", "data check", "eval probe", "a b c", "", "-x"]
)
def test_what_cannot_be_a_command_is_refused(command, own, capsys):
    own(command)
    assert main(["info"]) == 2
    error = capsys.readouterr().err
    assert "recipe line: commands must be words that are no command yet" in error
    assert repr(command) in error


def test_a_kind_of_data_that_is_there_is_refused(own, capsys):
    own("data make", name="maze")
    assert main(["data", "make", "maze", "--to", "1"]) == 2
    assert "recipe maze: its data make must be a new kind; got 'maze'" in capsys.readouterr().err


def test_overwriting_several_runs_removes_those_that_are_no_longer_asked_for(tmp_path):
    assert train(SEVERAL, Config(models=3, out=str(tmp_path))) == 0
    assert train(SEVERAL, Config(models=2, out=str(tmp_path)), overwrite=True) == 0
    assert not (tmp_path / "model-2" / "ckpt").exists()
    assert (tmp_path / "model-1" / "ckpt").exists()


@pytest.mark.parametrize("name", ["run.json", "config.json", "ckpt", ".lock", "a\0b", "a b"])
def test_a_run_has_no_name_of_a_file(name, tmp_path):
    def two(config):
        one = replace(config, models=1)
        return {"a": one, name: one} if config.models == 2 else {}

    made = Recipe(**DECLARED, runs=two)
    with pytest.raises(ValueError, match="runs must have names that directories can have"):
        train(made, Config(models=2, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
