"""The look for known vulnerabilities fails for one, and says what could not be looked up."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = ROOT / ".ci" / "audit.py"
UNKNOWN = {"name": "a", "skip_reason": "not found"}
GOOD = {"name": "b", "version": "1", "vulns": []}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}

pytestmark = pytest.mark.skipif(not PATH.exists(), reason="a source distribution has no .ci")


@pytest.fixture
def audit(tmp_path, monkeypatch, capsys):
    """Runs the look with a pip-audit that keeps its arguments and answers as it is told to."""
    monkeypatch.chdir(ROOT)
    program = tmp_path / "pip-audit"

    def run(stdout: str, stderr: str, *options: str) -> tuple[int, str]:
        program.write_text(
            f"#!{sys.executable}\nimport pathlib, sys\n"
            f"pathlib.Path({str(tmp_path / 'options')!r}).write_text(' '.join(sys.argv))\n"
            "asked = pathlib.Path(sys.argv[sys.argv.index('-r') + 1]).read_text()\n"
            f"pathlib.Path({str(tmp_path / 'asked')!r}).write_text(asked)\n"
            f"print({stdout!r}, end='')\nprint({stderr!r}, file=sys.stderr)\nsys.exit(1)\n"
        )
        program.chmod(0o755)
        code = runpy.run_path(str(PATH))["main"](str(program), *options)
        return code, capsys.readouterr().out

    return run


def answer(*packages: dict) -> str:
    return json.dumps({"dependencies": packages})


def test_a_known_vulnerability_fails(audit):
    code, said = audit(answer(GOOD, BAD), "")
    assert (code, said) == (
        1,
        "c 2: X-1, mended by 3\naudit: 2 of 2 packages looked up; known vulnerabilities: 1\n",
    )


def test_packages_that_were_not_looked_up_are_named(audit):
    code, said = audit(answer(GOOD, UNKNOWN), "")
    assert (code, said) == (
        0,
        "audit: NOT LOOKED UP: a (not found)\n"
        "audit: 1 of 2 packages looked up; known vulnerabilities: 0\n",
    )


@pytest.mark.parametrize(
    ("stdout", "stderr"),
    [
        (answer(UNKNOWN, UNKNOWN), ""),
        ("", "Traceback\nrequests.exceptions.ConnectionError: no route\n"),
        ("", "ERROR: Tip: your network may be blocking this service.\n"),
    ],
)
def test_a_service_that_does_not_answer_is_told_and_does_not_fail(audit, stdout, stderr):
    code, said = audit(stdout, stderr)
    assert code == 0 and said.startswith("audit: NOTHING WAS LOOKED UP, as ")


def test_a_broken_pip_audit_fails(audit):
    code, said = audit("", "unrecognized arguments: --no-such", "--no-such")
    assert code == 2 and said.endswith("has failed:\nunrecognized arguments: --no-such\n")


def test_every_locked_package_and_torch_are_asked_for(audit, tmp_path):
    audit(answer(GOOD), "", "--ignore-vuln", "X-1")
    asked = (tmp_path / "asked").read_text().splitlines()
    names = {line.partition("==")[0] for line in asked}
    assert {"numpy", "triton", "pip-audit", "torch"} <= names
    assert all("==" in line and "--hash" not in line and "\\" not in line for line in asked)
    assert (tmp_path / "options").read_text().endswith(" --ignore-vuln X-1")
