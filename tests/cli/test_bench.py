"""``trm-fast bench``: options, exit codes, the report, and what an interruption leaves."""

import json
import subprocess
import sys

import pytest

from trm_fast.cli import main
from trm_fast.recipes.grokking import GrokkingConfig
from trm_fast.recipes.grokking.bench import runs as _grokking_bench
from trm_fast.recipes.grokking.bench.plan import FAMILIES, VARIANTS, select_rows


def bench(tmp_path, *more):
    """Two runs of a millisecond each."""
    fields = "--prime 7 --iterations 2 --seeds 0 --rows adam-wd0-plain,adam-wd0-ema"
    return main(["bench", "grokking", *fields.split(), "--out", str(tmp_path / "runs"), *more])


def error_of(capsys, code):
    """The one line on stderr of a command that ended with 2."""
    text = capsys.readouterr().err
    assert code == 2 and text.startswith("trm-fast: ") and text.count("\n") == 1
    return text.removeprefix("trm-fast: ").rstrip()


@pytest.mark.parametrize(
    "argv", [["--help"], ["grokking", "--help"], ["nonsense"], ["grokking", "--rows", "nonsense"]]
)
def test_help_and_usage_errors_import_no_torch(argv):
    code = (
        "import sys; from trm_fast.cli import main; code = main(['bench', *sys.argv[1:]]); "
        "print([name for name in ('torch', 'matplotlib') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == (2 if "nonsense" in argv else 0)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_families_and_variants(capsys):
    assert main(["bench", "grokking", "--help"]) == 0
    text = capsys.readouterr().out
    for name, entry in (FAMILIES | VARIANTS).items():
        assert f"  {name:14} {entry.label}\n" in text


def test_it_trains_and_writes_the_report(tmp_path, capsys):
    assert bench(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    report = tmp_path / "runs" / "report.md"
    assert [line[:5] for line in lines] == ["[1/2]", "[2/2]", "repor"]
    assert lines[-1] == f"report: {report}"
    assert "all 2 runs are finished" in report.read_text()
    assert report.with_suffix(".png").exists()


def test_the_report_goes_where_it_is_asked_for(tmp_path):
    assert bench(tmp_path, "--report", str(tmp_path / "docs" / "table.md")) == 0
    assert (tmp_path / "docs" / "table.md").exists() and (tmp_path / "docs" / "table.png").exists()
    assert not (tmp_path / "runs" / "report.md").exists()


def test_options_reach_the_runs(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(_grokking_bench, "train_missing", lambda *args: calls.append(args))
    flags = "--seeds 4,7 --iterations 3 --device meta --rows adam-wd0-* --jobs 5 --threads 2"
    assert bench(tmp_path, *flags.split()) == 0
    base = GrokkingConfig(prime=7, iterations=3, device="meta")
    plan = _grokking_bench.Plan(select_rows(["adam-wd0-*"]), (4, 7), base, tmp_path / "runs")
    assert calls == [(plan, 5, 2)]


def test_report_only_trains_nothing(tmp_path, capsys):
    assert bench(tmp_path, "--report-only") == 0
    assert "0 of 2 rows of seed 0" in (tmp_path / "runs" / "report.md").read_text()
    assert not [*(tmp_path / "runs").glob("*.json")]


def test_time_trains_no_runs_and_fills_its_columns(tmp_path):
    assert bench(tmp_path) == 0
    before = (tmp_path / "runs" / "report.md").read_text()
    assert "the time is not measured yet" in before
    assert bench(tmp_path, "--time") == 0
    after = (tmp_path / "runs" / "report.md").read_text()
    assert "the time is not measured yet" not in after
    assert {*json.loads((tmp_path / "runs" / "time.json").read_text())["seconds"]} == {
        "adam-wd0-plain",
        "adam-wd0-ema",
    }


def test_a_run_that_diverges_is_reported_and_ends_with_1(tmp_path, monkeypatch, capsys):
    def diverge(config):
        raise FloatingPointError
        yield

    monkeypatch.setattr(_grokking_bench, "grokking_epochs", diverge)
    assert bench(tmp_path) == 1
    assert "diverged after iteration 0" in capsys.readouterr().out
    assert "| diverged at 0 |" in (tmp_path / "runs" / "report.md").read_text()


def test_an_interruption_leaves_a_report_of_what_is_finished(tmp_path, monkeypatch, capsys):
    original = _grokking_bench._train

    def interrupted(plan, row, seed):
        if row.endswith("ema"):
            raise KeyboardInterrupt
        return original(plan, row, seed)

    monkeypatch.setattr(_grokking_bench, "_train", interrupted)
    assert bench(tmp_path) == 130
    assert "1 of 2 rows of seed 0" in (tmp_path / "runs" / "report.md").read_text()
    monkeypatch.undo()
    assert bench(tmp_path) == 0
    assert "all 2 runs are finished" in (tmp_path / "runs" / "report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "adam"], "--rows must name rows OPTIMIZER-wdDECAY-VARIANT"),
        (["--seeds", "0,x"], "argument --seeds: must be a whole number >= 0; got 'x'"),
        (["--seeds", "0,-1"], "argument --seeds: must be a whole number >= 0; got '-1'"),
        (["--seeds", "1,1"], "seeds must be different ones; got (1, 1)"),
        (["--iterations", "0"], "argument --iterations: must be a whole number >= 1; got '0'"),
        (["--jobs", "two"], "argument --jobs: must be a whole number >= 1; got 'two'"),
        (["--report", "table.txt"], "--report must end in .md; got table.txt"),
        (["--time", "--report-only"], "not allowed with argument --time"),
        (["--prime", "8"], "prime must be"),
        (["--device", "abacus"], "device must be auto or one that torch can use; got 'abacus'"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, flags, message):
    assert message in error_of(capsys, bench(tmp_path, *flags))


def test_a_benchmark_has_to_be_named(capsys):
    expected = "bench: name a recipe; choose from grokking"
    assert error_of(capsys, main(["bench"])) == expected


def test_a_missing_matplotlib_is_found_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in error_of(capsys, bench(tmp_path))
    assert not (tmp_path / "runs").exists()
