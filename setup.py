"""Builds the native libraries; pyproject.toml says everything else about the package.

    trm_fast/_cpu.so      from csrc/*/cpu.cpp          switch TRM_FAST_CPU
    trm_fast/_cuda.so     from csrc/*/cuda.cu          switch TRM_FAST_CUDA
    trm_fast/_data.*.so   from csrc/data/module.cpp    switch TRM_FAST_DATA

A switch is 0 (leave out), 1 (build or stop) or auto (the default: build where possible). The first
two use the stable ABI of libtorch 2.11 and nothing of Python, so one build serves every
Python and every later torch, which for _cuda.so must have the same CUDA major version. CUDA code
compiles without a GPU, and under a torch without CUDA. _data is a module of Python, made with
pybind11, and uses nothing of torch: a wheel with it serves one version of Python, as its name says.

TRM_FAST_SANITIZE, such as "address,undefined", builds these sanitizers of the compiler into the
libraries of the CPU: make sanitize.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

# Whatever is newer than torch 2.11, or outside the stable ABI, becomes a compile error.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"

CXX_FLAGS = [
    "-O3",
    "-g0",  # Python's own flags carry -g, which makes the library ten times larger
    "-std=c++17",
    "-fno-math-errno",  # a loop with a sqrt is not vectorised without it
    "-ffp-contract=off",  # CPUs with and without FMA round alike
    "-Werror=switch",  # a mode that a switch forgets must not fall through to another one
    "-fvisibility=hidden",
    STABLE_ABI,
    # No -fopenmp: threads come from torch, and a second OpenMP runtime can hang the process.
]
DATA_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-pthread"]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-Xcompiler=-fvisibility=hidden",
    "-DUSE_CUDA",  # torch declares its current-stream call only under this
    "--threads=3",  # one per architecture
    STABLE_ABI,
]
SANITIZE = []
if sanitizers := os.environ.get("TRM_FAST_SANITIZE"):
    # Tensors that are mapped from files lie anywhere, and CPUs load words from there.
    SANITIZE = [f"-fsanitize={sanitizers}", "-fno-sanitize=alignment", "-fno-sanitize-recover=all"]
    CXX_FLAGS += [*SANITIZE, "-g1", "-fno-omit-frame-pointer"]
    DATA_FLAGS += [*SANITIZE, "-g1", "-fno-omit-frame-pointer"]
# Ampere, Hopper, Blackwell, and PTX that later GPUs compile for themselves.
CUDA_ARCHS = "8.0;9.0;10.0+PTX"


def is_wanted(switch: str, obstacle: Callable[[], str | None]) -> bool:
    """Reads a switch; ``obstacle`` says why the library cannot be built, or None."""
    value = os.environ.get(switch, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{switch}: must be 0, 1 or auto; got {value!r}")
    if value == "0":
        return False
    reason = obstacle()
    if reason and value == "1":
        raise SystemExit(f"{switch}=1: {reason}")
    if reason:
        print(f"{switch}=auto: left out: {reason}", file=sys.stderr)
    return reason is None


def compiler_obstacle() -> str | None:
    if sys.platform == "win32":
        return "the C++ libraries do not build on Windows"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    return None if shutil.which(compiler) else f"no C++ compiler {compiler}; install g++ or set CXX"


def cpu_obstacle() -> str | None:
    missing = None if glob("csrc/*/cpu.cpp") else "there is no csrc/*/cpu.cpp"
    return compiler_obstacle() or missing


def data_obstacle() -> str | None:
    missing = None if find_spec("pybind11") else "no pybind11; run: pip install pybind11"
    return compiler_obstacle() or missing


def cuda_obstacle() -> str | None:
    home = cuda_home()
    if not (home / "bin/nvcc").exists():
        return f"no nvcc in {home}/bin; install the CUDA toolkit or set CUDA_HOME"
    if not glob("csrc/*/cuda.cu"):
        return "there is no csrc/*/cuda.cu"
    theirs = import_torch().version.cuda
    if theirs is None:
        asked = os.environ.get("TRM_FAST_CUDA") == "1"
        return None if asked else "this torch has no CUDA (TRM_FAST_CUDA=1 builds it all the same)"
    # The library uses the CUDA runtime that torch has loaded, whose name has the major version.
    ours = nvcc_version(home)
    if ours.split(".")[0] != theirs.split(".")[0]:
        return f"{home} is CUDA {ours}, torch has CUDA {theirs}; set CUDA_HOME to a toolkit like it"
    return None


def cuda_home() -> Path:
    """Finds the toolkit; torch looks for one only if it has CUDA itself."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    usual, nvcc = Path("/usr/local/cuda"), shutil.which("nvcc")
    if nvcc and not (usual / "bin/nvcc").exists():
        return Path(nvcc).resolve().parents[1]
    return usual


def nvcc_version(home: Path) -> str:
    text = subprocess.check_output([home / "bin/nvcc", "--version"], text=True)
    return re.search(r"release ([\d.]+)", text)[1]


def import_torch() -> ModuleType:
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit(
            "torch must be installed before building. "
            "Run: pip install torch && pip install --no-build-isolation ."
        ) from None
    return torch


def cpu_library() -> Extension:
    import_torch()
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "trm_fast._cpu",
        sorted(glob("csrc/*/cpu.cpp")),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=SANITIZE,
        py_limited_api=True,  # leaves libtorch_python out
    )


def cuda_library() -> Extension:
    import_torch()
    from torch.utils import cpp_extension

    home = cuda_home()
    cpp_extension.CUDA_HOME = str(home)
    # torch would ask a GPU for its architecture.
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    # Not CUDAExtension, which links libraries that a torch without CUDA does not have.
    return cpp_extension.CppExtension(
        "trm_fast._cuda",
        sorted(glob("csrc/*/cuda.cu")),
        include_dirs=[os.path.abspath("csrc"), str(home / "include")],
        library_dirs=[str(home / "lib64")],
        libraries=["cudart"],
        # Without characters that a shell would read.
        define_macros=[
            ("TRM_FAST_CUDA_ARCHITECTURES", "_".join(re.split(r"[;\s]+", architectures)))
        ],
        extra_compile_args={"nvcc": NVCC_FLAGS},
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda"],
        py_limited_api=True,
    )


def data_library() -> Extension:
    import pybind11

    return Extension(
        "trm_fast._data",
        ["csrc/data/module.cpp"],
        include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
        depends=glob("csrc/data/*.h"),
        extra_compile_args=DATA_FLAGS,
        extra_link_args=["-pthread", *SANITIZE],
        language="c++",
    )


def build_command() -> type[Command]:
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        def get_ext_filename(self, fullname: str) -> str:
            if fullname.endswith("_data"):
                return super().get_ext_filename(fullname)
            return fullname.replace(".", os.sep) + ".so"

        def build_extensions(self) -> None:
            for extension in self.extensions:
                if extension.name == "trm_fast._cuda":
                    extension.library_dirs.insert(0, self.libtorch_cuda_stub())
            super().build_extensions()

        def libtorch_cuda_stub(self) -> str:
            """Makes an empty libtorch_cuda.so to link against and returns its folder.

            ``_cuda.so`` must name that library, which torch loads privately, or opening it fails
            with undefined symbols; and a torch without CUDA has none to link against.
            """
            folder = Path(self.build_temp).absolute() / "stub"
            folder.mkdir(parents=True, exist_ok=True)
            name = "libtorch_cuda.so"
            empty = ["-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", str(folder / name)]
            self.spawn([*self.compiler.linker_so, *empty])
            return str(folder)

    return BuildLibraries


class Wheel(bdist_wheel):
    def run(self) -> None:
        # What an earlier build left there, such as a library now switched off, would be packed too.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        # Only the module is tied to a version of Python.
        tag = super().get_tag()
        names = [library.name for library in self.distribution.ext_modules or ()]
        return tag if "trm_fast._data" in names else ("py3", "none", tag[2])


def main() -> None:
    libraries = []
    if is_wanted("TRM_FAST_CPU", cpu_obstacle):
        libraries.append(cpu_library())
    if is_wanted("TRM_FAST_CUDA", cuda_obstacle):
        libraries.append(cuda_library())
    # Without these libraries nothing imports torch, so an isolated build on a bare Python works.
    commands = {"build_ext": build_command()} if libraries else {}
    if is_wanted("TRM_FAST_DATA", data_obstacle):
        libraries.append(data_library())
    setup(ext_modules=libraries, cmdclass={"bdist_wheel": Wheel, **commands})


if __name__ == "__main__":
    main()
