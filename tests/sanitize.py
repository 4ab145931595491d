"""Runs the tests of native code on libraries into which gcc has built its sanitizers.

    python -m tests.sanitize [--only address | --only thread] [OPTIONS OF PYTEST]

"address" is AddressSanitizer with UndefinedBehaviorSanitizer, "thread" is ThreadSanitizer. The
libraries, with a copy of the package, lie in build/sanitize/<name>, and so do the reports. A report
or a failed test makes the program exit with 1. Only these libraries are instrumented: what torch,
NumPy and Python do to memory is seen as far as they call malloc, memcpy and the like.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
FLAGS = {"address": "address,undefined", "thread": "thread"}
# Memory that Python and torch keep to the end is no leak of ours; a size that no machine has is an
# error of the caller, as it is without sanitizers.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"suppressions={ROOT}/tests/support/tsan.txt:history_size=4",
}
TESTS = (
    "tests/ops", "tests/data/test_listops.py", "tests/data/test_maze.py",
    "tests/data/test_native.py", "tests/data/test_sudoku.py",
)  # fmt: skip
# Compilers, Triton and other processes take long and run the same native code.
SELECTION = [
    "-m", "not (compile or interpreter or processes or long)", "-k", "not (reference or cuda)",
]  # fmt: skip
PARALLEL = ["-n", "auto", "--dist", "worksteal"]
THREADS = "4"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=FLAGS)
    arguments, options = parser.parse_known_args()
    names = [arguments.only] if arguments.only else list(FLAGS)
    failed = [name for name in names if not passes(name, options)]
    print("sanitizers:", f"FAILED: {', '.join(failed)}" if failed else "nothing found", flush=True)
    return 1 if failed else 0


def passes(name: str, options: list[str]) -> bool:
    """Builds the libraries of ``name`` and returns whether the tests pass without a report."""
    home = BUILD / name
    build(name, home)
    for old in home.glob("report.*"):
        old.unlink()
    variables = environment(name, home)
    where = [sys.executable, "-c", "import trm_fast; print(trm_fast.__file__)"]
    package = subprocess.check_output(where, cwd=home, env=variables, text=True).strip()
    assert Path(package).is_relative_to(home), f"the tests would run on {package}"
    pytest = Path(sys.executable).with_name("pytest")
    named = any((ROOT / each.partition("::")[0]).exists() for each in options)
    command = [pytest, "-q", *SELECTION, *PARALLEL, *options, *([] if named else TESTS)]
    code = subprocess.run(command, cwd=ROOT, env=variables).returncode
    reports = sorted(home.glob("report.*"))
    for report in reports:
        print(f"\n{report}:\n{report.read_text()}", flush=True)
    return code == 0 and not reports


def build(name: str, home: Path) -> None:
    """Compiles what has changed, and copies the package beside it."""
    switches = {"TRM_FAST_SANITIZE": FLAGS[name], "TRM_FAST_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", home]
    subprocess.run(
        [*command, "--build-lib", home / "lib"], cwd=ROOT, env=os.environ | switches, check=True
    )


def environment(name: str, home: Path) -> dict[str, str]:
    """Returns the variables under which a Python that is not instrumented runs the libraries."""
    runtime = {"address": "libasan.so", "thread": "libtsan.so"}[name]
    # The runtime looks up how exceptions are thrown when it starts, before Python needs C++.
    loaded = " ".join(map(library, (runtime, "libstdc++.so.6")))
    options = {key: f"{value}:log_path={home}/report" for key, value in OPTIONS.items()}
    return {
        **os.environ, **options,
        "LD_PRELOAD": loaded,
        "OMP_NUM_THREADS": THREADS,
        "OMP_WAIT_POLICY": "PASSIVE",  # there may be fewer cores
        "PYTHONPATH": str(home / "lib"),
        "TRM_FAST_EXPECT": "cpp",
    }  # fmt: skip


def library(name: str) -> str:
    """Returns where the compiler has a library."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()


if __name__ == "__main__":
    sys.exit(main())
