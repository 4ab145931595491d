"""The locked packages: known by hashes, whole, for every Python, and from nowhere in particular."""

import re
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = re.search(r"^EXTRAS := (.+)$", MAKEFILE, re.MULTILINE)[1].split()
# Of torch: those come with some builds of it, and are other ones for each.
OF_A_BUILD = re.compile("nvidia|cuda|triton")
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]


def locked(name: str) -> list[tuple[Requirement, str]]:
    """Each entry of a lock with the options behind it."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    entries = [line.partition(" --hash=") for line in text.splitlines() if line[0] != "#"]
    return [(Requirement(head), separator + tail) for head, separator, tail in entries]


def environment(python: str) -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def wanted() -> list[Requirement]:
    """What `make` must find: of the extras, of the build, and of torch itself."""
    extras = [each for name in EXTRAS for each in PROJECT["project"]["optional-dependencies"][name]]
    of_torch = [each for each in requires("torch") if not OF_A_BUILD.match(each)]
    texts = [*PROJECT["project"]["dependencies"], *extras, *PROJECT["build-system"]["requires"]]
    return [each for each in map(Requirement, texts + of_torch) if each.name != "torch"]


@pytest.mark.parametrize("name", ["dev", "audit"])
def test_every_package_has_one_version_and_hashes_of_its_files(name):
    for requirement, options in locked(name):
        assert re.fullmatch("==[^*,]+", str(requirement.specifier)), requirement
        assert re.fullmatch(r"( +--hash=sha256:[0-9a-f]{64})+ *", options), requirement


@pytest.mark.parametrize("name", ["dev.in", "dev.txt", "audit.in", "audit.txt"])
def test_no_file_names_a_place_where_packages_come_from(name):
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text and not re.search(r"^-(?!-hash)", text, re.MULTILINE)


def test_torch_is_not_locked():
    assert "torch" not in {requirement.name for requirement, _ in locked("dev")}


@pytest.mark.skipif(
    f"TORCH ?= torch=={version('torch').partition('+')[0]}\n" not in MAKEFILE,
    reason="the lock is for the torch of the Makefile, and others ask for other packages",
)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_what_make_installs_on(python):
    here = environment(python)
    found: dict[str, Requirement] = {}
    for entry, _ in locked("dev"):
        if entry.marker is None or entry.marker.evaluate(here):
            assert canonicalize_name(entry.name) not in found
            found[canonicalize_name(entry.name)] = entry
    for requirement in wanted():
        if requirement.marker is None or requirement.marker.evaluate(here):
            (version,) = found[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(version.version, prereleases=True)


def test_the_lock_begins_with_the_oldest_python():
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert f"--python-version {PYTHONS[0]} " in MAKEFILE


def test_the_lock_has_the_triton_of_the_makefile():
    triton = re.search(r"^TRITON \?= (.+)$", MAKEFILE, re.MULTILINE)[1]
    assert triton in {f"{entry.name}{entry.specifier}" for entry, _ in locked("dev")}
