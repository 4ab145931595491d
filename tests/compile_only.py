"""Compiles Triton kernels for GPUs that are not there and reports what the machine code needs.

Run as a program, in a process without TRITON_INTERPRET: ``compile_only.py FILE SM`` compiles each
of the ``specialisations()`` of FILE and prints one JSON object per line. A specialisation names its
"kernel", or means the one that is called after the file.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SMS = (80, 90, 100)
# Bytes of shared memory per block, from the CUDA programming guide.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536  # per block, and per multiprocessor

# An operation of Triton's intermediate language: result, name, operands and types.
OPERATION = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = (\"?[\w.]+\"?)(.*?)(?: loc\(.*)?$")


def build(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    sm: int,
    aligned: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compiles a kernel for one target.

    Args:
        kernel: the function that ``triton.jit`` made.
        signature: argument to type, such as "*bf16", "i64" or "fp32".
        constants: argument to value, where it is a constexpr or None.
        sm: 80, 90 or 100.
        aligned: arguments that are multiples of 16. A launch finds that out for itself, and without
            it another program is compiled.
        options: of the launch, such as num_warps.

    Returns:
        "registers" per thread, "stack" and "shared" in bytes, "narrow": 32-bit products that reach
        an address, "wide": float64 arithmetic in the machine's assembly.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attrs)
    done = compile(source, target=GPUTarget("cuda", sm, 32), options=dict(options or {}))
    usage = resource_usage(done.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": done.metadata.shared,
        "narrow": narrow_products(done.asm["ttir"]),
        "wide": float64_arithmetic(done.asm["ptx"]),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def float64_arithmetic(ptx: str) -> list[str]:
    """Instructions that compute in float64; conversions of one scalar argument do not count."""
    found = re.findall(r"^\s*(?:@\S+ )?(\S+\.f64)\b", ptx, flags=re.M)
    return sorted({name for name in found if not name.startswith(("cvt", "mov", "ld", "st"))})


def narrow_products(ttir: str) -> list[str]:
    """32-bit products that reach an address and depend on a program, a loop, memory or an argument.

    They overflow where a tensor has 2^31 elements. Products of constants and ranges alone are
    bounded by the block.
    """
    made = {}
    for line in ttir.splitlines():
        match = OPERATION.match(line)
        if match:
            made[match[1]] = (match[2], match[3])
    found = set()
    for name, rest in list(made.values()):
        if name != "tt.addptr":
            continue
        offset = re.findall(r"%[\w#]+", rest)[1]
        for source in _sources(offset, made):
            if _is_narrow_product(made.get(source)) and _varies(source, made):
                found.add(f"{source} = {' '.join(made[source])}")
    return sorted(found)


def _is_narrow_product(operation: tuple[str, str] | None) -> bool:
    if operation is None or operation[0] not in ("arith.muli", "arith.shli"):
        return False
    return re.search(r"(^|x)i32>?$", operation[1].rpartition(" : ")[2].strip()) is not None


def _varies(name: str, made: dict[str, tuple[str, str]]) -> bool:
    """Arguments and loop counters are not results of an operation."""
    varying = ("tt.get_program_id", "tt.load")
    return any(s not in made or made[s][0] in varying for s in _sources(name, made))


def _sources(name: str, made: dict[str, tuple[str, str]]) -> set[str]:
    """``name`` and everything that it is computed from."""
    found, open_ = set(), [name]
    while open_:
        current = open_.pop()
        if current not in found:
            found.add(current)
            operands = made[current][1].rpartition(" : ")[0] if current in made else ""
            open_ += re.findall(r"%[\w#]+", operands)
    return found


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reports(path: Path, sm: int) -> Iterator[dict[str, Any]]:
    module = load(path)
    for kind in module.specialisations():
        kernel = kind.get("kernel", f"{path.stem}_kernel")
        made = build(
            getattr(module, kernel),
            kind["signature"],
            kind["constants"],
            sm,
            kind["aligned"],
            kind["options"],
        )
        facts = {"kernel": kernel, "float64": kind.get("float64", False)}
        yield made | facts | {"warps": kind["options"].get("num_warps", 4)}


def main() -> None:
    path, sm = sys.argv[1:]
    for report in reports(Path(path), int(sm)):
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
