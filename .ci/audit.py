"""Looks known vulnerabilities of the locked packages and of torch up, and says what it could not:

    python .ci/audit.py PATH_OF_PIP_AUDIT [OPTION_OF_PIP_AUDIT ...]

Exits 0 where none is known, also if the service that knows them cannot be reached; 1 where one is
known; 2 where pip-audit fails otherwise.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

LOCKS = ("requirements/dev.txt", "requirements/audit.txt")
# No package is resolved or installed: the locks name every one.
OPTIONS = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")
# Of what pip-audit prints when its service does not answer, and of nothing else that it fails with.
UNREACHED = ("requests.exceptions.", "your network may be blocking this service")


def main(program: str, *options: str) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(requirements())
        file.flush()
        command = [program, *OPTIONS, "-r", file.name, *options]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.stdout:
        return report(json.loads(done.stdout)["dependencies"])
    reasons = [line for line in done.stderr.splitlines() if any(each in line for each in UNREACHED)]
    if reasons:
        print(f"audit: NOTHING WAS LOOKED UP, as the service does not answer: {reasons[-1]}")
        return 0
    print(f"audit: {program} has failed:\n{done.stderr}", end="")
    return 2


def requirements() -> Iterator[str]:
    """Yields lines such as "numpy==2.4.6 ; python_full_version == '3.11.*'"."""
    for lock in LOCKS:
        for line in Path(lock).read_text().splitlines():
            if line[:1].isalnum():
                yield line.removesuffix("\\") + "\n"
    # torch is in no lock. Services know its versions without the name of a build, such as +cpu.
    yield f"torch=={version('torch').partition('+')[0]}\n"


def report(packages: list[dict[str, Any]]) -> int:
    """Prints what is known of packages, and returns the exit code."""
    known = [package for package in packages if "skip_reason" not in package]
    unknown = [package for package in packages if "skip_reason" in package]
    if not known:
        reason = unknown[0]["skip_reason"]
        print(f"audit: NOTHING WAS LOOKED UP, as the service knows none of the packages: {reason}")
        return 0
    count = 0
    for package in known:
        for each in package["vulns"]:
            count += 1
            remedy = ", ".join(each["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {each['id']}, mended by {remedy}")
    if unknown:
        names = ", ".join(package["name"] for package in unknown)
        print(f"audit: NOT LOOKED UP: {names} ({unknown[0]['skip_reason']})")
    print(
        f"audit: {len(known)} of {len(packages)} packages looked up; known vulnerabilities: {count}"
    )
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
