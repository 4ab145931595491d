"""What adaptive_step_ reads and writes: layouts, neighbours in memory, versions, threads."""

import pytest
import torch

from trm_fast.ops import Settings

from .adaptive_checks import (
    Arena,
    assert_same_bits,
    assert_step,
    bits,
    copies,
    kept_step,
    make,
    run,
    strides_of,
    without,
)
from .adaptive_truth import STATES, Item

SHAPE = (3, 4, 5, 2)
# Name to the order of the dimensions, slowest first, and the gap between neighbours.
LAYOUTS = {
    "contiguous": ((0, 1, 2, 3), 1),
    "channels_last": ((0, 2, 3, 1), 1),
    "transposed": ((3, 2, 1, 0), 1),
    "gaps": ((0, 1, 2, 3), 2),
    "transposed with gaps": ((2, 0, 3, 1), 3),
}
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def settings_with(**changes) -> Settings:
    default = {"lr": 1e-2, "weight_decay": 0.1, "filter": "ema", "lamb": 2.0, "weight_ema": 0.9}
    return Settings(**(default | changes))


def placed(item: Item, arena: Arena, param: str, grad: str = "contiguous", start: int = 1) -> Item:
    """Moves an item between sentinels; its states follow a parameter that has no gaps."""
    order, gap = LAYOUTS[param]
    dense = strides_of(SHAPE, order if gap == 1 else (0, 1, 2, 3))
    strides = dict.fromkeys(STATES, dense) | {"step": (), "grok_step": ()}
    strides |= {"param": strides_of(SHAPE, order, gap), "grad": strides_of(SHAPE, *LAYOUTS[grad])}
    return {name: arena.place(item[name], strides[name], start) for name in item}


@pytest.mark.parametrize("grad", LAYOUTS)
@each_layout
def test_every_layout_is_right_and_leaves_its_neighbours(backend, device, layout, grad):
    arena = Arena()
    assert_step([placed(make(SHAPE, device=device), arena, layout, grad)], settings_with(), backend)
    arena.assert_untouched()


@pytest.mark.parametrize("start", [1, 3, 7])
@pytest.mark.parametrize("dtype", STORAGE)
def test_misaligned_tensors_are_right_and_leave_their_neighbours(backend, device, dtype, start):
    arena, states = Arena(), torch.float32 if dtype == torch.float16 else dtype
    item = make(SHAPE, dtype, states=states, device=device)
    assert_step([placed(item, arena, "contiguous", start=start)], settings_with(), backend)
    arena.assert_untouched()


@pytest.mark.parametrize("size", [1023, 1024, 1025, 8193])
def test_flat_tensors_leave_their_neighbours(backend, device, size):
    arena, item = Arena(), make((size,), device=device)
    moved = {k: arena.place(v, (1,) if v.dim() else ()) for k, v in item.items()}
    assert_step([moved], settings_with(), backend)
    arena.assert_untouched()


@pytest.mark.parametrize("dtype", STORAGE)
@each_layout
def test_an_expanded_gradient_is_right(backend, device, layout, dtype):
    item = placed(make(SHAPE, device=device), Arena(), layout)
    item["grad"] = torch.tensor(0.5, dtype=dtype, device=device).expand(SHAPE)
    assert_step([item], settings_with(), backend)


def test_a_gradient_with_the_negative_bit_counts_negated(backend, device):
    item = make(device=device)
    plain = copies(item) | {"grad": -item["grad"]}
    item["grad"] = torch._neg_view(item["grad"])
    run([item], settings_with(), backend)
    run([plain], settings_with(), backend)
    assert bits(item["param"]) == bits(plain["param"])


def test_layout_does_not_change_the_numbers(backend, device):
    """Fusion into fma may differ between code paths, but here all run the same one."""
    results = []
    for layout in LAYOUTS:
        item = placed(make(SHAPE, device=device), Arena(), layout, layout)
        run([item], settings_with(), backend)
        results.append(bits(item["param"]))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", STORAGE)
@each_layout
def test_gradients_and_scalars_are_only_read(backend, device, layout, dtype):
    item = placed(make(SHAPE, grad=dtype, device=device), Arena(), layout, layout)
    given = dict.fromkeys(("lr", "weight_decay", "lamb", "grad_scale", "clip"), 0.5)
    scalars = {
        name: torch.tensor(v, device=device) for name, v in (given | {"found_inf": 0.0}).items()
    }
    before = bits(item["grad"]), {k: bits(v) for k, v in scalars.items()}
    run([item], settings_with(maximize=True, **scalars), backend)
    assert (bits(item["grad"]), {k: bits(v) for k, v in scalars.items()}) == before


@pytest.mark.parametrize("name", ["param", *STATES, "step", "grok_step"])
@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_the_version_of_each_written_tensor_rises(backend, device, layout, name):
    item = placed(make(SHAPE, device=device), Arena(), layout)
    before = item[name]._version
    run([item], settings_with(), backend)
    assert item[name]._version > before


def test_the_version_of_gradients_stays(backend, device):
    item = make(device=device)
    before = item["grad"]._version
    run([item], settings_with(), backend)
    assert item["grad"]._version == before


def test_autograd_refuses_a_graph_that_saved_what_was_written(backend, device):
    item = make(device=device)
    item["param"].requires_grad_()
    loss = (item["param"] ** 2).sum()
    run([item], settings_with(), backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_that_require_grad_are_written_outside_the_graph(backend, device):
    item = make(device=device)
    item["param"].requires_grad_()
    run([item], settings_with(), backend)
    assert item["param"].is_leaf and item["param"].grad_fn is None


def test_tensors_of_inference_mode_are_right(backend, device):
    with torch.inference_mode():
        assert_step([make(device=device)], settings_with(), backend)


def test_one_call_equals_a_call_for_each_tensor(backend, device):
    items = [make((n,), seed=n, device=device) for n in (700, 5000, 1025)]
    single = [copies(item) for item in items]
    run(items, settings_with(), backend)
    for item in single:
        run([item], settings_with(), backend)
    for one, other in zip(items, single, strict=True):
        assert_same_bits(one, other)


def test_the_order_of_tensors_does_not_matter(backend, device):
    items = [make((n,), seed=n, step=float(n), device=device) for n in (3, 2000, 40)]
    reverse = [copies(item) for item in items]
    run(items, settings_with(), backend)
    run(reverse[::-1], settings_with(), backend)
    for one, other in zip(items, reverse, strict=True):
        assert_same_bits(one, other)


def test_threads_do_not_change_a_bit(backend, device):
    """Shares of 8 blocks of 1024: this is more than four of them, with a rest."""
    items = [make((n,), states=torch.bfloat16, seed=n, device=device) for n in (30001, 700, 9000)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([copies(item) for item in items])
            run(results[-1], settings_with(), backend)
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_bits(one, other)


def test_steps_repeat_bit_for_bit(backend, device):
    results = []
    for _ in range(2):
        item = make((1500,), states=torch.bfloat16, device=device)
        for _ in range(3):
            run([item], settings_with(), backend)
        results.append(item)
    assert_same_bits(*results)


def test_a_kept_step_takes_the_gradients_of_each_call(backend, device):
    kept, plain = make(device=device), make(device=device)
    step = kept_step(kept, backend)
    for seed in range(3):
        grad = make(seed=seed, device=device)["grad"]
        with torch.no_grad():
            step([grad], settings_with())
        run([plain | {"grad": grad}], settings_with(), backend)
    assert_same_bits(without(kept, "grad"), without(plain, "grad"))


def test_a_kept_step_fits_new_gradients_but_not_moved_parameters(backend, device):
    item = make(device=device)
    step = kept_step(item, backend)
    assert step.fits([item["param"]], [item["grad"].clone()])
    assert not step.fits([item["param"].clone()], [item["grad"]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_kept_step_does_not_fit_gradients_of_another_dtype(backend, device, dtype):
    item = make(device=device)
    assert not kept_step(item, backend).fits([item["param"]], [item["grad"].to(dtype)])


def test_a_kept_step_does_not_fit_a_parameter_that_was_cut_where_it_lies(backend, device):
    item = make(device=device)
    step = kept_step(item, backend)
    item["param"].data = item["param"].data[:5]
    assert not step.fits([item["param"]], [item["grad"][:5].clone()])
