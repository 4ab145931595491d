"""``trm-fast info``, ``explain`` and ``doctor``."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import trm_fast
from trm_fast import _dispatch
from trm_fast._dispatch import unusable
from trm_fast.cli import main
from trm_fast.ops import OPS

CPU = trm_fast.backends()["adaptive_step"]["cpu"]


def test_info_tells_each_backend_and_its_reason(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for backend, state in CPU.items():
        assert f"  cpu   {backend:10} {state}" in text.splitlines()


def test_info_tells_the_settings_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("TRM_FAST_STRICT", "1")
    main(["info"])
    assert "TRM_FAST_STRICT=1" in capsys.readouterr().out


def test_python_m_is_the_same_command():
    run = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-m", "trm_fast"]
    done = subprocess.run([*run, "--version"], capture_output=True, text=True)
    assert done.stdout == f"trm-fast {trm_fast.__version__}\n"


def test_explain_names_the_backend_that_runs_and_times_each_usable_one(capsys):
    assert main(["explain", "adaptive_step", "33x7", "float32"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    chosen = next(backend for backend, state in CPU.items() if state == "chosen")
    assert first == f"adaptive_step 33x7 float32 on cpu: {chosen} runs"
    timed = {line.split()[0] for line in rest if " us, largest relative error " in line}
    assert timed == {backend for backend, state in CPU.items() if state in ("chosen", "usable")}


def test_explain_tells_why_a_backend_cannot_run_the_dtype(capsys):
    main(["explain", "adaptive_step", "5", "float64"])
    text = capsys.readouterr().out
    assert "float64 on cpu: reference runs" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["adaptive_stp", "3", "float32"],
            "unknown op 'adaptive_stp'; did you mean 'adaptive_step'?",
        ),
        (["adaptive_step", "3,4", "float32"], "SHAPE must be sizes joined by x"),
        (["adaptive_step", "3", "float23"], "unknown DTYPE 'float23'; did you mean 'float32'?"),
        (["adaptive_step", "3", "float32", "--device", "tpu"], "--device must be cpu or cuda"),
    ],
)
def test_explain_refuses_in_one_line(capsys, arguments, message):
    assert main(["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "backends",
    # The interpreter takes a minute; tests/ops checks the same examples, each backend by itself.
    [("reference", "cpp", "cuda"), pytest.param(_dispatch.BACKENDS, marks=pytest.mark.long)],
    ids=["built", "all"],
)
def test_doctor_passes(capsys, monkeypatch, backends):
    monkeypatch.setattr(_dispatch, "BACKENDS", backends)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text
    for op in OPS:
        assert f"ok    {op} cpu reference" in text


@pytest.mark.slow
@pytest.mark.skipif(unusable("cpp", "cpu") is not None, reason="needs the C++ library")
def test_doctor_exits_1_and_names_what_is_wrong(capsys, monkeypatch):
    op = OPS["adaptive_step"]

    def wrong(step, grads, settings):
        op.implementations["reference"](step, grads, settings)
        with torch.no_grad():
            for param in step.params:
                param.mul_(1.01)

    for name in [name for name in OPS if name != "adaptive_step"]:
        monkeypatch.delitem(OPS, name)  # the others are checked above
    # Triton's interpreter takes its time, and is not what this is about.
    monkeypatch.setattr(_dispatch, "BACKENDS", ("reference", "cpp"))
    monkeypatch.setitem(OPS, "adaptive_step", op)  # to be put back: an op registers itself
    replace(op, implementations={**op.implementations, "cpp": wrong})
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  adaptive_step cpu cpp" in text and "error of param must be <=" in text
