"""Rules, filters and options that an implementation lacks: it says so, and runs no other ones."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import trm_fast
from trm_fast import BackendError, GrokFastAdamW, GrokFastSGD, _dispatch, use_backend
from trm_fast._dispatch import OPS, unusable
from trm_fast.cli import main
from trm_fast.ops import Settings, _adaptive_filters, _adaptive_settings, adaptive_step
from trm_fast.ops._adaptive_filters import FILTERS
from trm_fast.ops._adaptive_settings import NUMBERS, RULES, Vocabulary

from .adaptive_checks import assert_same_bits, copies, fitted, kept_step, make, run

HEADER = Path(__file__).parents[2] / "csrc/adaptive_step/settings.h"
FAST = [
    pytest.param(
        backend, marks=pytest.mark.skipif(unusable(backend, "cpu") is not None, reason="not usable")
    )
    for backend in ("cpp", "triton")
]
each_fast = pytest.mark.parametrize("fast", FAST)


@pytest.fixture(autouse=True)
def choices() -> Iterator[None]:
    """Forgets what was chosen, before and after: these tests change what backends know."""
    made = OPS["adaptive_step"].choices
    made.clear()
    yield
    made.clear()


def lacking(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Takes rules, filters or options away from every fast form."""
    real = adaptive_step._vocabulary

    def known(backend: str) -> Vocabulary:
        full = real(backend)
        return Vocabulary(
            {name: number for name, number in full.rules.items() if name not in names},
            {name: number for name, number in full.filters.items() if name not in names},
            tuple(name for name in full.numbers if name not in names),
        )

    monkeypatch.setattr(adaptive_step, "_vocabulary", known)


def new_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_adaptive_filters, "FILTERS", (*FILTERS, "x"))
    monkeypatch.setattr(_adaptive_settings, "RULES", (*RULES, "y"))


# What each implementation knows is what the page has.


def test_a_backend_knows_what_the_page_has(backend):
    if backend == "reference":
        pytest.skip("it is the page")
    known = adaptive_step._vocabulary(backend)
    assert {*known.rules} == {*RULES}
    assert {*known.filters} == {*FILTERS}
    # An option may be one of the reference alone; a form that lacks it refuses it by name.
    assert {*NUMBERS} - {*_adaptive_settings.OPTIONS} <= {*known.numbers} <= {*NUMBERS}
    assert len({*known.numbers}) == len(known.numbers)
    for numbers in (known.rules.values(), known.filters.values()):
        assert sorted(numbers) == [*range(len(numbers))]


def names_in(table: str) -> list[str]:
    rows = re.search(rf"{table}\[\] = (.*?);\n", HEADER.read_text(), re.S)[1]
    return re.findall(r'{"(\w+)", &?(?:Numbers::)?\w+}', rows)


@pytest.mark.parametrize(("table", "page"), [("kRules", RULES), ("kFilters", FILTERS)])
def test_the_table_of_cpp_and_cuda_has_what_the_page_has(table, page):
    """Also where no CUDA library can be opened; both are compiled from one header."""
    assert sorted(names_in(table)) == sorted(page)


def test_the_numbers_of_cpp_and_cuda_are_those_of_the_page():
    names = names_in("kNumbers")
    assert {*NUMBERS} - {*_adaptive_settings.OPTIONS} <= {*names} <= {*NUMBERS}
    members = re.search(r"struct Numbers {\s+double (.*?);", HEADER.read_text(), re.S)[1]
    assert names == re.split(r",\s+", members)


@pytest.mark.parametrize("table", ["kRules", "kFilters"])
def test_the_table_has_every_enumerator_under_its_own_name(table):
    text = HEADER.read_text()
    rows = re.search(rf"{table}\[\] = (.*?);\n", text, re.S)[1]
    kind = {"kRules": "Rule", "kFilters": "Filter"}[table]
    enumerators = re.findall(r"\w+", re.search(rf"enum {kind} : int64_t {{(.*?)}}", text)[1])
    pairs = dict(re.findall(r'{"(\w+)", (\w+)}', rows))
    assert sorted(pairs.values()) == sorted(enumerators)
    assert all(f"k{name.replace('_', '')}".lower() == k.lower() for name, k in pairs.items())


# A number that stands for no mode: the last line of defence, should a caller pass one.


def rows_of(table: torch.Tensor, rule: int, filter: int) -> tuple:
    return (table, None, rule, filter, [0.0] * len(NUMBERS), *[None] * 6)


NO_MODE = [(99, 0), (-1, 0), (0, 99), (0, -1)]


@pytest.mark.skipif(unusable("cpp", "cpu") is not None, reason="needs the C++ library")
@pytest.mark.parametrize(("rule", "filter"), NO_MODE)
def test_native_code_refuses_a_number_that_is_no_mode(rule, filter):
    # An address that cannot be read: whoever touches memory before the check does not return.
    table = torch.ones((1, 19), dtype=torch.int64)
    kind = "filter" if rule == 0 else "rule"
    with pytest.raises(RuntimeError, match=f"there is no {kind} of number {rule or filter}"):
        torch.ops.trm_fast.adaptive_step_rows_(*rows_of(table, rule, filter))


@pytest.mark.skipif(unusable("cpp", "cpu") is not None, reason="needs the C++ library")
def test_native_code_refuses_another_count_of_numbers():
    table = torch.ones((1, 19), dtype=torch.int64)
    count = len(adaptive_step._vocabulary("cpp").numbers)
    with pytest.raises(RuntimeError, match=f"there must be {count} numbers; got 1"):
        torch.ops.trm_fast.adaptive_step_rows_(table, None, 0, 0, [0.0], *[None] * 6)


@pytest.mark.skipif(unusable("triton", "cpu") is not None, reason="needs Triton's interpreter")
@pytest.mark.parametrize(("rule", "filter"), NO_MODE)
def test_the_launcher_of_triton_refuses_a_number_that_is_no_mode(rule, filter):
    from trm_fast.kernels.adaptive_step import adaptive_step_rows_

    table = torch.ones((1, 19), dtype=torch.int64)
    kind = "filter" if rule == 0 else "rule"
    with pytest.raises(ValueError, match=f"there is no {kind} of number {rule or filter}"):
        adaptive_step_rows_(*rows_of(table, rule, filter))


@pytest.mark.skipif(unusable("triton", "cpu") is not None, reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("rule", "moment"), [("adamw", True), ("momentum", True), ("filter", False)]
)
def test_a_triton_kernel_has_a_first_moment_by_its_rule(monkeypatch, rule, moment):
    """Tensors without elements have no address, by which the launcher once went."""
    from trm_fast.kernels import adaptive_step as kernels

    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_, **constants: launched.append(constants["MOMENT"])

    monkeypatch.setattr(kernels, "adaptive_step_kernel", Recorder())
    states = {"adamw": ("exp_avg", "exp_avg_sq"), "momentum": ("exp_avg",), "filter": ()}[rule]
    item = {name: torch.empty(0, 3) for name in ("param", "grad", *states)}
    run([item | {"step": torch.tensor(4.0)}], Settings(1e-2, rule=rule), "triton")
    assert launched == [moment]


# A mode that stands on the page alone.


@each_fast
@pytest.mark.parametrize(
    ("mode", "words"), [({"filter": "x"}, "filter 'x'"), ({"rule": "y"}, "rule 'y'")]
)
def test_a_mode_of_the_page_alone_is_refused_by_name(monkeypatch, fast, mode, words):
    new_on_the_page(monkeypatch)
    item = make()
    if "rule" in mode:  # it declares no states yet
        del item["exp_avg"], item["exp_avg_sq"]
    before = copies(item)
    message = f"the named backend '{fast}' cannot run: {fast} does not know {words}"
    with pytest.raises(BackendError, match=message):
        run([item], Settings(1e-2, **mode), fast)
    assert_same_bits(before, item)


@pytest.mark.parametrize(
    ("mode", "words"), [({"filter": "x"}, "filter 'x'"), ({"rule": "y"}, "rule 'y'")]
)
def test_the_reference_refuses_what_it_does_not_write_out(monkeypatch, mode, words):
    new_on_the_page(monkeypatch)
    item = make()
    if "rule" in mode:
        del item["exp_avg"], item["exp_avg_sq"], item["grok_exp_avg"], item["grok_step"]
    before = copies(item)
    with pytest.raises(ValueError, match=f"the reference has no {words}"):
        run([item], Settings(1e-2, **mode), "reference")
    assert_same_bits(before, item)


# A mode, or an option that is not at its default, that a fast form lacks.

LACKED = {
    "filter": ({"filter": "highpass", "lamb": 0.5}, "highpass"),
    "rule": ({"rule": "sgd", "filter": "ema", "lamb": 0.5}, "sgd"),
    "option": ({"filter": "projection", "lamb": 2.0, "proj_eps": 1e-3}, "proj_eps"),
}
each_lacked = pytest.mark.parametrize("kind", LACKED)


@each_fast
@each_lacked
def test_what_a_named_backend_lacks_is_refused_by_name(monkeypatch, fast, kind):
    changes, name = LACKED[kind]
    settings = Settings(1e-2, **changes)
    lacking(monkeypatch, name)
    item = fitted(make(), settings)
    with pytest.raises(BackendError, match=f"{fast} does not know {kind} '{name}'"):
        run([item], settings, fast)
    with use_backend(fast), pytest.raises(BackendError, match=f"does not know {kind} '{name}'"):
        run([item], settings)


@each_lacked
def test_what_a_backend_lacks_runs_on_the_reference_with_the_reason(monkeypatch, kind):
    changes, name = LACKED[kind]
    settings = Settings(1e-2, **changes)
    item, same = (fitted(make(), settings) for _ in range(2))
    lacking(monkeypatch, name)
    with use_backend(None):
        run([item], settings)
        fallbacks = trm_fast.backends()["adaptive_step"]["fallbacks"]
    run([same], settings, "reference")
    assert_same_bits(same, item)
    if unusable("cpp", "cpu") is None:
        reasons = fallbacks["cpu float32 ran on reference"]
        assert f"cpp: cpp does not know {kind} '{name}', which runs on the reference" in reasons


@each_fast
def test_an_option_at_its_default_need_not_be_known(monkeypatch, fast):
    """So that a library that was built before the option came still runs everything else."""
    monkeypatch.setattr(_adaptive_settings, "OPTIONS", (*_adaptive_settings.OPTIONS, "new"))
    monkeypatch.setattr(_adaptive_settings, "_DEFAULTS", (*_adaptive_settings._DEFAULTS, 0.5))
    read = _adaptive_settings._options
    given = {"new": 0.5}
    monkeypatch.setattr(_adaptive_settings, "_options", lambda s: (*read(s), given["new"]))
    settings = Settings(1e-2, filter="ema", lamb=2.0)
    run([make()], settings, fast)
    given["new"] = 0.25
    with pytest.raises(BackendError, match=f"{fast} does not know option 'new'"):
        run([make()], settings, fast)


@each_fast
def test_other_modes_of_the_same_backend_still_run(monkeypatch, fast):
    lacking(monkeypatch, "highpass")
    run([make()], Settings(1e-2, filter="ema", lamb=2.0), fast)


def test_a_kept_step_chooses_for_each_mode(monkeypatch, fast="cpp"):
    if unusable(fast, "cpu"):
        pytest.skip("needs the C++ library")
    lacking(monkeypatch, "highpass")
    item = make()
    with use_backend(None):
        step = kept_step(item)
        for filter_, chosen in (("ema", fast), ("highpass", "reference"), ("ema", fast)):
            step([item["grad"]], Settings(1e-2, filter=filter_, lamb=2.0))
            admitted = step._choices[("adamw", filter_, ())]
            assert admitted.backend == chosen


@each_fast
def test_an_optimizer_refuses_before_the_first_group_moves(monkeypatch, fast):
    lacking(monkeypatch, "highpass")
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "filter": "highpass"}]
    optimizer = GrokFastAdamW(groups, backend=fast)
    for param in params:
        param.grad = torch.ones(3)
    with pytest.raises(BackendError, match=f"{fast} does not know filter 'highpass'"):
        optimizer.step()
    assert all((param == 1).all() for param in params)


def test_a_compiled_step_refuses_too(monkeypatch):
    if unusable("cpp", "cpu"):
        pytest.skip("needs the C++ library")
    lacking(monkeypatch, "highpass")
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = GrokFastSGD([param], lr=0.1, filter="highpass", backend="cpp")
    param.grad = torch.ones(3)
    torch._dynamo.reset()
    # Compiled code that raises leaves gradients disabled; this block enables them again.
    with torch.enable_grad(), pytest.raises(BackendError, match="does not know filter 'highpass'"):
        torch.compile(optimizer.step, backend="eager")()
    torch._dynamo.reset()


# What the commands say of it.


@pytest.mark.skipif(unusable("cpp", "cpu") is not None, reason="needs the C++ library")
def test_backends_and_the_commands_say_what_is_lacking(monkeypatch, capsys):
    lacking(monkeypatch, "highpass", "proj_eps")
    words = "filter 'highpass', option 'proj_eps'"
    with use_backend(None):
        table = trm_fast.backends()["adaptive_step"]
        main(["info"])
        info = capsys.readouterr().out
        main(["explain", "adaptive_step", "7", "float32", "--call", "adamw, highpass"])
        explained = capsys.readouterr().out
    assert (table["cpu"]["cpp"], table["lacking"]["cpp"]) == ("chosen", words)
    assert re.search(rf"lacking cpp +{words}", info)
    assert "adaptive_step 7 float32 on cpu: reference runs" in explained
    assert re.search(r"cpp +cannot run: cpp does not know filter 'highpass'", explained)


def test_backends_says_nothing_of_what_nobody_lacks():
    assert "lacking" not in trm_fast.backends()["adaptive_step"]


@pytest.mark.skipif(unusable("cpp", "cpu") is not None, reason="needs the C++ library")
def test_doctor_says_what_it_could_not_try(monkeypatch, capsys):
    lacking(monkeypatch, "highpass")
    monkeypatch.setattr(_dispatch, "OPS", {"adaptive_step": OPS["adaptive_step"]})
    monkeypatch.setattr(trm_fast.ops, "OPS", _dispatch.OPS)
    monkeypatch.setattr(_dispatch, "BACKENDS", ("reference", "cpp"))  # the interpreter is slow
    assert main(["doctor"]) == 0
    assert "ok    adaptive_step cpu cpp, without filter 'highpass'" in capsys.readouterr().out


def test_explain_refuses_an_unknown_call(capsys):
    assert main(["explain", "adaptive_step", "7", "float32", "--call", "adamw, emma"]) == 2
    assert "--call must be one of 'adamw, ema'" in capsys.readouterr().err


def test_doctor_tries_every_rule_and_every_filter():
    examples = OPS["adaptive_step"].examples((3,), torch.float32, torch.device("cpu"))
    tried = [example.details for example in examples.values()]
    assert {rule for rule, *_ in tried} == {*RULES}
    assert {filter_ for _, filter_, _ in tried} == {*FILTERS}
