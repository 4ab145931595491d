"""Triton kernels compiled for every GPU of the package, on a machine without one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .compile_only import (
    REGISTERS,
    SHARED_LIMIT,
    SMS,
    float64_arithmetic,
    narrow_products,
)

ROOT = Path(__file__).parents[1]
KERNELS = {path.stem: path for path in sorted((ROOT / "kernels").glob("[!_]*.py"))}

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)


def start(path: Path, sm: int) -> subprocess.Popen:
    """Compiles in a process of its own: Triton's interpreter cannot be switched off again."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = str(Path(__file__).with_name("compile_only.py"))
    command = [sys.executable, program, str(path), str(sm)]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> list[dict]:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines()]


@cache
def compiled(op: str, sm: int) -> tuple[dict, ...]:
    return tuple(finish(start(KERNELS[op], sm)))


# One target by default: each costs several seconds.
DEFAULT = ("swiglu", 90)
TARGETS = [
    pytest.param((op, sm), marks=[] if (op, sm) == DEFAULT else pytest.mark.long, id=f"{op}-sm{sm}")
    for op in KERNELS
    for sm in SMS
]


@pytest.fixture(params=TARGETS)
def built(request) -> tuple[dict, ...]:
    """The report of every specialisation of the kernels of an op on one target."""
    found = compiled(*request.param)
    assert found, "specialisations() is empty"
    return found


@pytest.fixture
def op(request) -> str:
    return request.node.callspec.params["built"][0]


@pytest.fixture
def sm(request) -> int:
    return request.node.callspec.params["built"][1]


def faulty(built: tuple[dict, ...], is_right: Callable[[dict], bool]) -> list[str]:
    return [f"{i}: {report['kernel']}" for i, report in enumerate(built) if not is_right(report)]


def test_every_kernel_is_built(built, op):
    named = set(re.findall(r"\b[a-z_]+_kernel\b", KERNELS[op].read_text()))
    assert {report["kernel"] for report in built} == named


def test_nothing_spills(built):
    assert faulty(built, lambda report: report["stack"] == 0) == []


def test_a_block_fits_the_registers(built):
    assert faulty(built, lambda r: r["registers"] * 32 * r["warps"] <= REGISTERS) == []


def test_a_block_fits_the_shared_memory(built, sm):
    assert faulty(built, lambda report: report["shared"] <= SHARED_LIMIT[sm]) == []


def test_no_address_comes_from_a_32_bit_product(built):
    assert [product for report in built for product in report["narrow"]] == []


def test_nothing_is_computed_in_float64(built):
    """But for what says so: sums over tensors, which a program handles once."""
    assert faulty(built, lambda report: report["float64"] or not report["wide"]) == []


# The checks must be able to fail: one kernel that does each thing wrong.
BAD = """
import triton
import triton.language as tl


@triton.jit
def bad_kernel(x_ptr, y_ptr, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float64)
    tl.store(y_ptr + i, x * scale)


@triton.jit
def good_kernel(x_ptr, y_ptr, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float32)
    tl.store(y_ptr + i, x * tl.cast(scale, tl.float32))


def specialisations():
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "scale": "fp64"}
    kind = {"signature": signature, "constants": {"BLOCK": 1024}, "options": {"num_warps": 4}}
    kind |= {"aligned": ["x_ptr", "y_ptr"]}
    return [kind | {"kernel": "bad_kernel"}, kind | {"kernel": "good_kernel"}]
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("toys") / "toys.py"
    path.write_text(BAD)
    return {report["kernel"]: report for report in finish(start(path, 90))}


def test_a_bad_kernel_is_caught(toys):
    report = toys["bad_kernel"]
    assert len(report["narrow"]) == 1 and "arith.muli" in report["narrow"][0]
    assert report["wide"] == ["mul.f64"]


def test_a_good_kernel_passes(toys):
    report = toys["good_kernel"]
    assert (report["narrow"], report["wide"], report["stack"]) == ([], [], 0)
    assert 0 < report["registers"] < 256


def test_conversions_are_not_arithmetic():
    ptx = "cvt.rn.f32.f64 %f, %fd;\n  @%p fma.rn.f64 %fd, %fd;\n  ld.param.f64 %fd;\n add.f32 %f;"
    assert float64_arithmetic(ptx) == ["fma.rn.f64"]


def test_a_product_of_constants_is_not_narrow():
    ttir = """
    %0 = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32>
    %c = arith.constant dense<2> : tensor<8xi32>
    %1 = arith.muli %0, %c : tensor<8xi32>
    %2 = tt.addptr %arg0, %1 : tensor<8x!tt.ptr<f32>>, tensor<8xi32>
    """
    assert narrow_products(ttir) == []


def test_a_product_of_an_argument_is_narrow():
    ttir = """
    %0 = arith.muli %arg1, %arg2 : i32
    %1 = tt.addptr %arg0, %0 : !tt.ptr<f32>, i32
    """
    assert narrow_products(ttir) == ["%0 = arith.muli  %arg1, %arg2 : i32"]
