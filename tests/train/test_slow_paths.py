"""A run that takes a slow path says so at its start, with the reason and what was measured."""

import json

import pytest
import torch

from trm_fast import _native, use_backend
from trm_fast._dispatch import OPS, slow_paths
from trm_fast.cli import main
from trm_fast.train.dry_run import dry_run

from .runs import function_run, puzzle_run

REASON = "cpp: _cpu.so is not built: build it"
SMALL = "--data.size 4 --data.clues [6,8] --data.train 9 --data.test 3 --batch 3 --device cpu"


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(_native, "unusable", lambda backend: REASON.removeprefix("cpp: "))


def told(out) -> list[dict]:
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    events = map(json.loads, lines)
    return [event for event in events if event["event"] == "slow"]


def test_an_event_of_the_first_step_has_reason_factor_and_page(not_built, tmp_path):
    function_run(tmp_path / "run", optimizer="grokfast", steps=9).fit()
    (event,) = told(tmp_path / "run")
    assert event["step"] == 1
    beginning = f"slow path: adaptive_step runs on the reference: {REASON} (adaptive_step: "
    assert event["message"].startswith(beginning)
    assert "2.2 to 10.7 times" in event["message"] and "docs/performance.md" in event["message"]


def test_every_run_of_a_process_tells_it(not_built, tmp_path):
    for name in ("one", "two"):
        function_run(tmp_path / name, optimizer="grokfast", steps=2).fit()
        assert len(told(tmp_path / name)) == 1


def test_a_fast_run_tells_nothing(tmp_path):
    if OPS["adaptive_step"].reason("cpp", "cpu", frozenset({torch.float32})):
        pytest.skip("the library is not built")
    function_run(tmp_path / "run", optimizer="grokfast", steps=2).fit()
    assert told(tmp_path / "run") == []


def test_the_dtype_is_a_reason(tmp_path):
    function_run(tmp_path / "run", optimizer="grokfast", steps=2, dtype=torch.float64).fit()
    (event,) = told(tmp_path / "run")
    assert "got float64" in event["message"] or "is not built" in event["message"]


def test_the_named_reference_is_a_reason_and_no_warning(tmp_path, recwarn):
    with use_backend("reference"):
        function_run(tmp_path / "run", optimizer="grokfast", steps=2).fit()
    (event,) = told(tmp_path / "run")
    assert "adaptive_step runs on the reference: use_backend('reference') (" in event["message"]
    assert not [w for w in recwarn if str(w.message).startswith("trm_fast")]


def test_a_variable_is_named_as_the_reason(monkeypatch):
    monkeypatch.setenv("TRM_FAST_BACKEND", "reference")
    with use_backend("reference"):
        found = dry_run(function_run(None, optimizer="grokfast"))
    assert (
        "adaptive_step runs on the reference: TRM_FAST_BACKEND=reference (" in found.slow_paths[0]
    )


def test_a_path_that_the_evaluation_takes_first_is_told_after_it(tmp_path):
    trainer = function_run(tmp_path / "run", optimizer="adamw", steps=6, evaluate_every=5)
    plain = trainer.evaluator

    def slow(model):
        with use_backend("reference"):
            from trm_fast.ops import rms_norm_residual

            rms_norm_residual(torch.ones(2, 8))
        return plain(model)

    trainer.evaluator = slow
    trainer.fit()
    (event,) = told(tmp_path / "run")
    assert event["step"] == 5 and "slow path: rms_norm_residual runs" in event["message"]


def test_a_dry_run_has_a_line_for_each_reason(not_built):
    with pytest.warns(UserWarning, match="adaptive_step runs on the reference"):
        found = dry_run(function_run(None, optimizer="grokfast"))
    (line,) = found.slow_paths
    assert REASON in line and "adaptive_step" in line


def test_the_command_shows_it_once_with_all_ops(not_built, tmp_path, capsys, recwarn):
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "sudoku", *SMALL.split(), *out, "--dry-run"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "slow path" in line]
    assert len(shown) == 1 and "latent_update: eager torch took 1.2 to 1.6" in shown[0]
    assert main(["train", "sudoku", *SMALL.split(), *out, "--train.steps", "2"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "slow path" in line]
    assert len(shown) == 1 and shown[0].startswith("step 1: slow path: latent_update, ")
    assert REASON in shown[0]
    assert not [w for w in recwarn if str(w.message).startswith("trm_fast")]


def test_layers_one_by_one_are_told(tmp_path):
    trainer = puzzle_run(tmp_path / "run", steps=2)
    hook = trainer.model.recursion.net.register_forward_hook(lambda *_: None)
    trainer.fit()
    hook.remove()
    messages = [event["message"] for event in told(tmp_path / "run")]
    assert any("latent_update runs layer by layer: " in text for text in messages)


def test_nothing_is_watched_after_a_run():
    with slow_paths() as found:
        pass
    with use_backend("reference"):
        function_run(None, optimizer="grokfast", steps=1).fit()
    assert found.new() == []
