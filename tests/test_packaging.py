"""What a build puts into the sdist and the wheel, and what the build switches do."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from setuptools import Distribution, Extension

from .conftest import skip_unless_usable

ROOT = Path(__file__).parents[1]
NOT_SOURCES = (".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
HAS_NVCC = bool(shutil.which("nvcc")) or Path("/usr/local/cuda/bin/nvcc").exists()
DATA = f"_data{sysconfig.get_config_var('EXT_SUFFIX')}"
LIBRARIES = [
    "_cpu.so",
    pytest.param("_cuda.so", marks=pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")),
]
# What the dynamic linker may have to find: the C and C++ runtimes, and the libraries of torch
# that its stable ABI is made of. Above all not libpython, libtorch_python and libgomp.
SYSTEM = {"libc", "libm", "libstdc++", "libgcc_s", "ld-linux-x86-64", "ld-linux-aarch64"}
ALLOWED = {
    "_cpu.so": SYSTEM | {"libc10", "libtorch", "libtorch_cpu"},
    "_cuda.so": SYSTEM | {"libc10", "libtorch", "libtorch_cpu", "libtorch_cuda", "libcudart"},
}


def run_python(
    folder: Path, *arguments: str | Path, **variables: str
) -> subprocess.CompletedProcess:
    # ninja lies beside the interpreter, which need not be on PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    off = {"TRM_FAST_CPU": "0", "TRM_FAST_CUDA": "0", "TRM_FAST_DATA": "0"}
    env = {**os.environ, "PATH": path, **off, **variables}
    if "TORCH_CUDA_ARCH_LIST" not in variables:
        env.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def package_files(checkout: Path) -> set[str]:
    """All that ``import trm_fast`` and its submodules may read, by its path in a wheel."""
    kernels = {f"trm_fast/kernels/{name}" for name in files_below(checkout / "kernels")}
    return kernels | {f"trm_fast/{name}" for name in files_below(checkout / "trm_fast")}


def leave_old_build(checkout: Path) -> None:
    """Puts files where earlier builds leave theirs; none of them may be packed."""
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for folder in ("trm_fast", "build/lib/trm_fast", f"build/lib.{platform}/trm_fast"):
        (checkout / folder).mkdir(parents=True, exist_ok=True)
        (checkout / folder / "_old.so").write_text("old")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as builds write beside them."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    shutil.copy(ROOT / ".clang-format", copy)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    """The unpacked sdist."""
    source = checkout.with_name("sdist-source")
    shutil.copytree(checkout, source)
    leave_old_build(source)
    done = run_python(source, "setup.py", "-q", "sdist", "-d", source.with_name("dist"))
    assert done.returncode == 0, done.stderr
    (archive,) = source.with_name("dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(checkout.parent)
    return checkout.parent / archive.name.removesuffix(".tar.gz")


@cache
def made(sdist: Path, kind: str) -> Path:
    """Makes a wheel from the sdist."""
    source = sdist.with_name(f"source-of-{kind}")
    shutil.copytree(sdist, source)
    leave_old_build(source)
    target = sdist.with_name(f"wheels-{kind}")
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", target, "."]
    cuda = "1" if HAS_NVCC else "0"
    all_of_them = {"TRM_FAST_CPU": "1", "TRM_FAST_CUDA": cuda, "TRM_FAST_DATA": "1"}
    done = run_python(source, *command, **(all_of_them if kind == "full" else {}))
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = target.glob("*.whl")
    return archive


@pytest.fixture(scope="module", params=["plain", pytest.param("full", marks=pytest.mark.long)])
def kind(request: pytest.FixtureRequest) -> str:
    """Without libraries, and with every library that this machine can build."""
    return request.param


@pytest.fixture(scope="module")
def wheel(sdist: Path, kind: str) -> Path:
    return made(sdist, kind)


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(params=["checkout", pytest.param("wheel", marks=pytest.mark.long)])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The package with its libraries: those that lie in the checkout, and those of a wheel."""
    if request.param == "checkout":
        skip_unless_usable("cpp")
        shutil.copytree(ROOT / "trm_fast", tmp_path / "trm_fast")
        return tmp_path
    with zipfile.ZipFile(made(request.getfixturevalue("sdist"), "full")) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def library_in(built: Path, name: str) -> Path:
    path = built / "trm_fast" / name
    if not path.exists():
        pytest.skip(f"{name} is not built here")
    return path


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, whose functions can be called one by one."""
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(folder: Path, body: str) -> str:
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text(body)
    return str(folder)


def fake_toolkit(folder: Path, version: str) -> str:
    (folder / "bin").mkdir()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.99'\n")
    nvcc.chmod(0o755)
    return str(folder)


def test_sdist_has_every_source(checkout: Path, sdist: Path) -> None:
    trees = ("bench/", "csrc/", "kernels/", "requirements/", "tests/", "trm_fast/")
    top = {"LICENSE", "MANIFEST.in", "Makefile", "pyproject.toml", "setup.py", ".clang-format"}
    top.add("SECURITY.md")
    sources = {name for name in files_below(checkout) if name.startswith(trees)}
    assert (sources | top) - files_below(sdist) == set()


def test_sdist_has_nothing_built(sdist: Path) -> None:
    built = {name for name in files_below(sdist) if re.search(r"\.(so|o|py[cod])$", name)}
    assert built == set()


def test_wheel_has_the_package_and_nothing_else(checkout: Path, unpacked: Path, kind: str) -> None:
    libraries = {"_cpu.so", DATA} | ({"_cuda.so"} if HAS_NVCC else set())
    libraries = libraries if kind == "full" else set()
    found = {name for name in files_below(unpacked) if ".dist-info/" not in name}
    assert found == package_files(checkout) | {f"trm_fast/{library}" for library in libraries}


def test_wheel_has_licence_and_command(unpacked: Path) -> None:
    (info,) = unpacked.glob("trm_fast-*.dist-info")
    assert (info / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "trm-fast = trm_fast.__main__:start" in (info / "entry_points.txt").read_text()


def test_wheel_requires_only_torch_and_numpy(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("trm_fast-*.dist-info/METADATA")
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata.read_text(), re.MULTILINE)
    assert sorted(required) == ["numpy", "torch>=2.11"]


def test_wheel_with_the_module_serves_one_python(wheel: Path, kind: str) -> None:
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    python = "cp{}{}".format(*sys.version_info)
    wanted = f"{python}-{python}-{platform}" if kind == "full" else "py3-none-any"
    assert wheel.name.endswith(f"-{wanted}.whl")


@pytest.mark.parametrize(
    ("names", "serves_every_python"),
    [(["_cpu"], True), (["_cpu", "_cuda"], True), (["_data"], False), (["_cpu", "_data"], False)],
)
def test_wheel_without_the_module_serves_every_python(
    setup_script: ModuleType, names: list[str], serves_every_python: bool
) -> None:
    libraries = [Extension(f"trm_fast.{name}", []) for name in names]
    command = setup_script.Wheel(Distribution({"name": "trm-fast", "ext_modules": libraries}))
    command.ensure_finalized()
    assert (command.get_tag()[:2] == ("py3", "none")) is serves_every_python


def test_wheel_imports_without_the_checkout(unpacked: Path) -> None:
    code = "import trm_fast, trm_fast.kernels; print(trm_fast.kernels.__file__)"
    done = run_python(unpacked.parent, "-c", code, PYTHONPATH=str(unpacked))
    assert done.stdout.strip() == str(unpacked / "trm_fast/kernels/__init__.py"), done.stderr


def needed_by(library: Path) -> set[str]:
    text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", text.stdout))


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_needs_only_stable_libraries(built: Path, library: str) -> None:
    needed = needed_by(library_in(built, library))
    assert needed - ALLOWED[library] == set()
    assert "libtorch_cpu" in needed


def test_module_needs_no_torch(built: Path) -> None:
    # libpthread is a part of libc from glibc 2.34 on.
    assert needed_by(library_in(built, DATA)) - SYSTEM - {"libpthread"} == set()
    code = "import sys, trm_fast._data as data; print(data.__file__, 'torch' in sys.modules)"
    done = run_python(built.parent, "-c", code, PYTHONPATH=str(built))
    assert done.stdout.split() == [str(built / "trm_fast" / DATA), "False"], done.stderr


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_needs_no_cxx_symbol_of_torch(built: Path, library: str) -> None:
    command = ["nm", "-D", "--undefined-only", library_in(built, library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in text
    assert re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\w+", text) == []


@pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")
def test_cuda_library_names_libtorch_cuda(built: Path) -> None:
    command = ["readelf", "-d", library_in(built, "_cuda.so")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cuda.so]" in text


@pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")
@pytest.mark.parametrize(
    ("code", "expected"), [("elf", {"sm_80", "sm_90", "sm_100"}), ("ptx", {"sm_100"})]
)
def test_cuda_library_has_code_for(built: Path, code: str, expected: set[str]) -> None:
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("needs the cuobjdump that Triton brings")
    cuobjdump = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [cuobjdump, f"--list-{code}", library_in(built, "_cuda.so")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"sm_\d+", text)) == expected


def test_wheel_without_libraries_needs_no_torch(checkout: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkout, source)
    leave_old_build(source)
    torch = fake_torch(tmp_path, "raise RuntimeError('torch was imported')")
    command = ["setup.py", "-q", "bdist_wheel", "-d", tmp_path / "wheels"]
    done = run_python(source, *command, PYTHONPATH=torch)
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "wheels").glob("*.whl")
    assert archive.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(archive) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == package_files(checkout)


@pytest.mark.parametrize("switch", ["TRM_FAST_CPU", "TRM_FAST_CUDA", "TRM_FAST_DATA"])
@pytest.mark.parametrize("value", ["", "yes", "AUTO"])
def test_switch_refuses_other_values(checkout: Path, switch: str, value: str) -> None:
    done = run_python(checkout, "setup.py", "--version", **{switch: value})
    assert done.returncode != 0
    assert done.stderr.strip() == f"{switch}: must be 0, 1 or auto; got {value!r}"


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        (
            {"TRM_FAST_CPU": "1", "CXX": "/nowhere/c++"},
            "TRM_FAST_CPU=1: no C++ compiler /nowhere/c++; install g++ or set CXX",
        ),
        (
            {"TRM_FAST_DATA": "1", "CXX": "/nowhere/c++"},
            "TRM_FAST_DATA=1: no C++ compiler /nowhere/c++; install g++ or set CXX",
        ),
        (
            {"TRM_FAST_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "TRM_FAST_CUDA=1: no nvcc in /nowhere/bin; install the CUDA toolkit or set CUDA_HOME",
        ),
    ],
)
def test_switch_1_says_what_is_missing(
    checkout: Path, variables: dict[str, str], error: str
) -> None:
    done = run_python(checkout, "setup.py", "--version", **variables)
    assert done.returncode != 0
    assert done.stderr.strip() == error


def test_switch_auto_leaves_out_what_cannot_be_built(checkout: Path) -> None:
    variables = {"CXX": "/nowhere/c++", "CUDA_HOME": "/nowhere"}
    auto = {"TRM_FAST_CPU": "auto", "TRM_FAST_CUDA": "auto", "TRM_FAST_DATA": "auto"}
    done = run_python(checkout, "setup.py", "--version", **variables, **auto)
    assert done.returncode == 0, done.stderr
    assert "TRM_FAST_CPU=auto: left out: no C++ compiler" in done.stderr
    assert "TRM_FAST_CUDA=auto: left out: no nvcc" in done.stderr
    assert "TRM_FAST_DATA=auto: left out: no C++ compiler" in done.stderr


def test_missing_pybind11_is_named_with_the_remedy(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_script, "find_spec", lambda name: None)
    assert setup_script.data_obstacle() == "no pybind11; run: pip install pybind11"


def test_missing_torch_is_named_with_the_remedy(checkout: Path, tmp_path: Path) -> None:
    torch = fake_torch(tmp_path, "raise ModuleNotFoundError('torch')")
    done = run_python(checkout, "setup.py", "--version", TRM_FAST_CPU="1", PYTHONPATH=torch)
    assert done.returncode != 0
    assert done.stderr.strip() == (
        "torch must be installed before building. "
        "Run: pip install torch && pip install --no-build-isolation ."
    )


@pytest.mark.parametrize(
    ("switch", "torch_cuda", "reason"),
    [
        ("auto", None, "this torch has no CUDA"),
        ("1", None, None),
        ("auto", "13.0", None),
        ("auto", "13.2", None),
        ("auto", "12.8", "is CUDA 13.0, torch has CUDA 12.8"),
        ("1", "12.8", "is CUDA 13.0, torch has CUDA 12.8"),
    ],
)
def test_cuda_is_built_for_the_major_version_of_torch(
    setup_script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    switch: str,
    torch_cuda: str | None,
    reason: str | None,
) -> None:
    monkeypatch.setenv("TRM_FAST_CUDA", switch)
    monkeypatch.setenv("CUDA_HOME", fake_toolkit(tmp_path, "13.0"))
    torch = SimpleNamespace(version=SimpleNamespace(cuda=torch_cuda))
    monkeypatch.setattr(setup_script, "import_torch", lambda: torch)
    found = setup_script.cuda_obstacle()
    assert (found is None) if reason is None else (reason in found)
