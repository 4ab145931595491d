"""adaptive_step_ under torch.library.opcheck, torch.compile and fake tensors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from trm_fast.ops import Settings, adaptive_step_

from .adaptive_checks import assert_same_bits, copies, fitted, lists_of, make, run, without
from .adaptive_truth import Item

OP = torch.ops.trm_fast.adaptive_step_.default
COMPILERS = ("eager", "aot_eager")
FLAGS = {
    "plain": {},
    "numbers": {"weight_decay": 0.1, "rule": "adam", "filter": "highpass", "lamb": 0.5},
    "tensors": {"lr": torch.tensor(1e-2), "filter": "ema", "lamb": torch.tensor(2.0),
                "found_inf": torch.zeros(()), "grad_scale": torch.tensor(4.0)},
    "average": {"weight_ema": 0.9, "maximize": True, "after_step": 2, "rule": "atan2"},
    "sums": {"filter": "projection", "lamb": 2.0, "rule": "sgd", "dampening": 0.5},
    "ring": {"filter": "ma", "lamb": 2.0, "rule": "momentum", "nesterov": True, "warmup": False},
    "output": {"filter": "cosine_gate", "lamb": torch.tensor(2.0), "rule": "filter"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def settings_with(**changes) -> Settings:
    return Settings(**({"lr": 1e-2} | changes))


def make_for(settings: Settings, *arguments, **options) -> Item:
    """What the rule and the filter of the settings know."""
    return fitted(
        make(*arguments, window=3 if settings.filter == "ma" else None, **options), settings
    )


def arguments(items: list[Item], settings: Settings, backend: str | None = None) -> tuple:
    lists = lists_of(items)
    scalars = settings.arguments(items[0]["param"].device)
    return (*lists, settings.rule, settings.filter, *scalars, backend)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_passes(needs_grad, flags):
    settings = settings_with(**FLAGS[flags])
    items = [make_for(settings, (3, 5)), make_for(settings, (4,), torch.bfloat16, seed=1)]
    for item in items:
        item["param"].requires_grad_(needs_grad)
    torch.library.opcheck(OP, arguments(items, settings))


@pytest.mark.parametrize("shape", [(0,), (), (1025,)])
def test_opcheck_passes_for_other_shapes(shape):
    torch.library.opcheck(OP, arguments([make(shape)], settings_with(filter="ema", lamb=2.0)))


def test_opcheck_passes_without_optional_states():
    item = without(make(), "grok_exp_avg", "grok_step", "weight_ema")
    torch.library.opcheck(OP, arguments([item], settings_with()))


@pytest.mark.parametrize("flags", FLAGS)
def test_the_op_of_the_dispatcher_equals_the_function(backend, device, flags):
    settings = settings_with(**FLAGS[flags])
    one, other = (make_for(settings, device=device) for _ in range(2))
    OP(*arguments([one], settings, backend))
    run([other], settings, backend)
    assert_same_bits(one, other)


def test_settings_survive_the_way_through_the_schema():
    settings = settings_with(rule="atan2", filter="highpass", alpha=0.5, lamb=0.25, after_step=3,
                             maximize=True, weight_ema=0.125, beta1=0.75, beta2=0.5, eps=0.0625,
                             weight_decay=0.375, dampening=0.625, nesterov=True, warmup=False,
                             proj_eps=0.03125)  # fmt: skip
    scalars = settings.arguments(torch.device("cpu"))
    assert Settings.from_arguments(settings.rule, settings.filter, *scalars) == settings


def test_fake_tensors_are_accepted():
    with FakeTensorMode():
        OP(*arguments([make()], settings_with()))


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("flags", FLAGS)
def test_compiled_equals_eager(backend, device, compiler, flags):
    settings = settings_with(**FLAGS[flags])
    compiled, eager = (
        [make_for(settings, (n,), seed=n, device=device) for n in (5, 9)] for _ in range(2)
    )

    @torch.compile(fullgraph=True, backend=compiler)
    def step(*lists):
        adaptive_step_(*lists, settings=settings, backend=backend)

    for _ in range(2):
        step(*lists_of(compiled))
        run(eager, settings, backend)
    for one, other in zip(compiled, eager, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_settings_may_be_made_inside_compiled_code(compiler):
    item, eager = make(), make()

    @torch.compile(fullgraph=True, backend=compiler)
    def step(lists, lr):
        settings = Settings(lr, weight_decay=0.1, filter="ema", lamb=2.0, weight_ema=0.9)
        adaptive_step_(*lists, settings=settings)

    step(lists_of([item]), 1e-2)
    run([eager], Settings(1e-2, weight_decay=0.1, filter="ema", lamb=2.0, weight_ema=0.9))
    assert_same_bits(item, eager)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_code_may_step_parameters_that_require_grad(compiler):
    item, eager = make(), make()
    item["param"].requires_grad_()
    step = torch.compile(lambda lists: adaptive_step_(*lists, settings=settings_with()),
                         fullgraph=True, backend=compiler)  # fmt: skip
    step(lists_of([item]))
    run([eager], settings_with())
    assert_same_bits({k: v.detach() for k, v in item.items()}, eager)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_step_keeps_its_place_between_its_neighbours(compiler):
    """What is computed before the step sees the old parameter, what comes after it the new one."""

    def neighbours(lists, settings):
        before = lists[0][0] * 2
        adaptive_step_(*lists, settings=settings)
        return before, lists[0][0] * 2

    item, eager = make(), make()
    settings = settings_with()
    compiled = torch.compile(neighbours, fullgraph=True, backend=compiler)
    found = compiled(lists_of([item]), settings)
    expected = neighbours(lists_of([eager]), settings)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(*found)


def test_compiled_code_refuses_the_same_input_in_the_same_words():
    item = make() | {"grad": torch.zeros(38)}
    step = torch.compile(lambda lists: adaptive_step_(*lists, settings=settings_with()),
                         fullgraph=True, backend="eager")  # fmt: skip
    with pytest.raises(ValueError, match=r"grads\[0\] must be \(37,\)"):
        step(lists_of([item]))


def test_a_third_shape_compiles_nothing_new():
    """The first shape is compiled as it is, the second as any shape."""
    counter = CompileCounter()
    settings = settings_with(filter="ema", lamb=2.0)
    step = torch.compile(lambda lists: adaptive_step_(*lists, settings=settings),
                         fullgraph=True, backend=counter)  # fmt: skip
    for size, expected in ((5, 1), (7, 2), (9, 2), (1025, 2)):
        item, eager = make((size,)), make((size,))
        step(lists_of([item]))
        run([eager], settings)
        assert_same_bits(item, eager)
        assert counter.frame_count == expected


def test_a_learning_rate_in_a_tensor_compiles_once():
    counter = CompileCounter()
    step = torch.compile(lambda lists, lr: adaptive_step_(*lists, settings=Settings(lr)),
                         fullgraph=True, backend=counter)  # fmt: skip
    for lr in (1e-2, 1e-3, 0.0):
        item, eager = make(), make()
        step(lists_of([item]), torch.tensor(lr))
        run([eager], Settings(torch.tensor(lr)))
        assert_same_bits(item, eager)
    assert counter.frame_count == 1


def test_compiled_steps_repeat():
    item, eager = make(states=torch.bfloat16), make(states=torch.bfloat16)
    settings = settings_with(filter="ema", lamb=2.0)
    step = torch.compile(lambda lists: adaptive_step_(*lists, settings=settings),
                         fullgraph=True, backend="aot_eager")  # fmt: skip
    for _ in range(3):
        step(lists_of([item]))
        run([eager], settings)
    assert_same_bits(item, copies(eager))
