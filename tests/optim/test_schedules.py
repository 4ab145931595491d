"""Schedules against their formulas, LambdaLR and runs that were never interrupted."""

import io
import json
import pickle
from collections.abc import Callable
from math import cos, inf, nan, pi
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from trm_fast import GrokFastAdamW
from trm_fast.optim.schedules import (
    OptionSchedule,
    Schedule,
    stages,
    warmup_constant,
    warmup_cosine,
)

needs_gpu = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")
COGMENT = {0: 0.0, 500: 1.0, 12_500: 0.6}


# Factors


def test_warmup_is_a_straight_line_to_1() -> None:
    assert [warmup_constant(4)(t) for t in range(7)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warmup_constant(2, start=0.5)(t) for t in range(4)] == [0.5, 0.75, 1.0, 1.0]
    assert [warmup_constant(2, start=2.0)(t) for t in range(3)] == [2.0, 1.5, 1.0]


def test_no_warmup_starts_at_1() -> None:
    assert warmup_constant(0)(0) == 1.0
    assert warmup_cosine(0, 10)(0) == 1.0


def test_warmup_of_the_official_trm_counts_from_1() -> None:
    schedule = warmup_constant(1999, start=1 / 2000)
    # start + (1 - start) * t / 1999 has five roundings, at most at the size of 1.
    for t in (0, 1, 777, 1998, 1999, 5000):
        assert abs(schedule(t) - min(1.0, (t + 1) / 2000)) <= 5 * 2**-53


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(("floor", "start"), [(0.0, 0.0), (1e-3, 0.1)])
def test_cosine_falls_from_1_to_the_floor(warmup: int, floor: float, start: float) -> None:
    schedule = warmup_cosine(warmup, 110, floor, start)
    for t in range(warmup):
        assert schedule(t) == start + (1 - start) * t / warmup
    for t in range(warmup, 110):
        falling = 0.5 + 0.5 * cos(pi * (t - warmup) / (110 - warmup))
        # Six roundings on either side, at most at the size of 1; cos is good to an ulp.
        assert abs(schedule(t) - (floor + (1 - floor) * falling)) <= 14 * 2**-53
    assert schedule(warmup) == 1.0
    assert schedule(110) == schedule(10**9) == floor


def test_stages_jump_at_their_first_step() -> None:
    schedule = stages(COGMENT)
    steps = (0, 499, 500, 12_499, 12_500, 10**9)
    assert [schedule(t) for t in steps] == [0.0, 0.0, 1.0, 1.0, 0.6, 0.6]


def test_stages_may_be_listed_in_any_order_and_changed_afterwards() -> None:
    given = {5: 0.5, 0: 1.0}
    schedule = stages(given)
    given[0] = 7.0
    assert [schedule(0), schedule(5)] == [1.0, 0.5]


def test_product_multiplies() -> None:
    schedule = warmup_constant(4) * stages({0: 1.0, 6: 0.5}) * stages({0: 2.0})
    assert [schedule(t) for t in (0, 2, 5, 6)] == [0.0, 1.0, 2.0, 1.0]
    with pytest.raises(TypeError):
        schedule * 2.0


SCHEDULES = [
    warmup_constant(3, start=0.1),
    warmup_cosine(3, 9, floor=0.2),
    stages(COGMENT),
    warmup_cosine(3, 9) * stages({0: 0.5, 5: 1.0}),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["constant", "cosine", "stages", "product"])
def test_schedules_can_be_pickled(schedule: Schedule) -> None:
    again = pickle.loads(pickle.dumps(schedule))
    assert [again(t) for t in range(12)] == [schedule(t) for t in range(12)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["constant", "cosine", "stages", "product"])
def test_schedules_drive_the_learning_rate_and_resume(schedule: Schedule) -> None:
    """The state dict is one that torch loads without pickled classes."""

    def make(lr: float = 0.5) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=lr)
        return optimizer, LambdaLR(optimizer, schedule)

    optimizer, scheduler = make()
    for t in range(12):
        assert optimizer.param_groups[0]["lr"] == 0.5 * schedule(t)
        if t == 4:
            buffer = io.BytesIO()
            torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
            optimizer, scheduler = make()
            saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: warmup_constant(-1), "warmup_constant: warmup_steps must be >= 0; got -1"),
        (lambda: warmup_constant(1, nan), "warmup_constant: start must be finite and >= 0"),
        (lambda: warmup_cosine(-1, 5), "warmup_cosine: warmup_steps must be >= 0; got -1"),
        (lambda: warmup_cosine(5, 5), "total_steps must be larger than warmup_steps; got 5 and 5"),
        (lambda: warmup_cosine(1, 5, floor=-0.1), "warmup_cosine: floor must be finite and >= 0"),
        (lambda: warmup_cosine(1, 5, start=inf), "warmup_cosine: start must be finite and >= 0"),
        (lambda: stages({500: 1.0}), r"stages: a stage must start at 0; got \[500\]"),
        (lambda: stages({}), "stages: a stage must start at 0"),
        (lambda: stages({0: 1.0, -5: 1.0}), "stages: steps must be >= 0; got -5"),
        (lambda: stages({0: -1.0}), "stages: the factor from step 0 must be finite and >= 0"),
    ],
)
def test_wrong_schedule_is_refused(make: Callable[[], Schedule], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


# OptionSchedule


def make_optimizer(**options: Any) -> GrokFastAdamW:
    groups = [
        {"params": [Parameter(torch.ones(2))], "component": "core", "lamb": 2.0},
        {"params": [Parameter(torch.ones(2))], "component": "memory", "lamb": 1.5},
        {"params": [Parameter(torch.ones(2))], "component": "halting", "filter": None},
    ]
    return GrokFastAdamW(groups, **({"lamb": 0.25} | options))


def values(optimizer: torch.optim.Optimizer, option: str = "lamb") -> list[float]:
    return [float(group[option]) for group in optimizer.param_groups]


def test_filter_is_off_on_and_reduced_by_stage() -> None:
    optimizer = make_optimizer()
    schedule = OptionSchedule(optimizer, "lamb", stages({0: 0.0, 2: 1.0, 4: 0.6}), [0, "memory"])
    seen = []
    for _ in range(6):
        seen.append(values(optimizer)[:2])
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    on, reduced = [2.0, 1.5], [2.0 * 0.6, 1.5 * 0.6]
    assert seen == [[0.0, 0.0], [0.0, 0.0], on, on, reduced, reduced]
    assert values(optimizer)[2] == 0.25


def test_scheduled_run_equals_one_with_the_option_set_by_hand() -> None:
    runs = []
    for scheduled in (True, False):
        optimizer = make_optimizer()
        schedule = OptionSchedule(optimizer, "lamb", warmup_constant(3)) if scheduled else None
        for t in range(5):
            for group, base in zip(optimizer.param_groups, (2.0, 1.5, 0.25), strict=True):
                if not scheduled:
                    group["lamb"] = base * min(1.0, t / 3)
                group["params"][0].grad = torch.tensor([1.0, -t])
            optimizer.step()
            if schedule:
                schedule.step()
        runs.append([group["params"][0] for group in optimizer.param_groups])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("option", ["lamb", "alpha", "weight_decay", "eps"])
def test_any_number_can_be_scheduled_in_all_groups(option: str) -> None:
    optimizer = make_optimizer()
    bases = values(optimizer, option)
    schedule = OptionSchedule(optimizer, option, stages({0: 1.0, 1: 0.5}))
    assert values(optimizer, option) == bases
    schedule.step()
    assert values(optimizer, option) == [base * 0.5 for base in bases]
    assert schedule.factor == 0.5


def test_option_of_0_stays_0_and_a_factor_of_0_is_left_again() -> None:
    optimizer = make_optimizer(lamb=0.0)
    schedule = OptionSchedule(optimizer, "lamb", stages({0: 1.0, 1: 0.0, 2: 1.0}))
    seen = [values(optimizer)]
    for _ in range(2):
        schedule.step()
        seen.append(values(optimizer))
    assert seen == [[2.0, 1.5, 0.0], [0.0, 0.0, 0.0], [2.0, 1.5, 0.0]]


def test_groups_without_the_option_are_left_alone() -> None:
    groups = [{"params": [Parameter(torch.ones(1))]}, {"params": [Parameter(torch.ones(1))]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer.param_groups[0]["kappa"] = 3.0
    optimizer.param_groups[1]["kappa"] = None
    schedule = OptionSchedule(optimizer, "kappa", stages({0: 1.0, 1: 0.5}))
    schedule.step()
    assert [group["kappa"] for group in optimizer.param_groups] == [1.5, None]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_tensor_is_written_in_place(device: str) -> None:
    lamb = torch.tensor(2.0, device=device)
    optimizer = make_optimizer()
    optimizer.param_groups[0]["lamb"] = lamb
    schedule = OptionSchedule(optimizer, "lamb", stages({0: 1.0, 1: 0.25, 2: 1.0}))
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        schedule.step()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.param_groups[0]["lamb"] is lamb and lamb.item() == 0.5
    schedule.step()
    assert lamb.item() == 2.0


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_new_base_holds_at_once_and_later(as_tensor: bool) -> None:
    optimizer = make_optimizer()
    if as_tensor:
        optimizer.param_groups[1]["lamb"] = torch.tensor(1.5)
    schedule = OptionSchedule(optimizer, "lamb", stages({0: 1.0, 1: 0.5}))
    schedule.set_base(8.0, groups=["memory"])
    assert values(optimizer) == [2.0, 8.0, 0.25]
    schedule.step()
    assert values(optimizer) == [1.0, 4.0, 0.125]
    schedule.set_base(0.0)
    assert values(optimizer) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("through_json", [False, True], ids=["weights_only", "json"])
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_resumed_run_equals_uninterrupted(through_json: bool, optimizer_first: bool) -> None:
    factors = warmup_constant(5) * stages({0: 1.0, 4: 0.6})

    def make() -> tuple[GrokFastAdamW, OptionSchedule]:
        optimizer = make_optimizer()
        return optimizer, OptionSchedule(optimizer, "lamb", factors, groups=["core"])

    optimizer, schedule = make()
    schedule.set_base(3.0)
    for _ in range(3):
        schedule.step()
    saved = schedule.state_dict()
    if through_json:
        saved = json.loads(json.dumps(saved))
    else:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    other, resumed = make()
    if optimizer_first:
        other.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(saved)
    else:
        resumed.load_state_dict(saved)
        other.load_state_dict(optimizer.state_dict())
    for _ in range(4):
        assert values(other) == values(optimizer)
        schedule.step()
        resumed.step()


def test_state_of_a_tensor_is_a_copy() -> None:
    optimizer = make_optimizer()
    optimizer.param_groups[0]["lamb"] = torch.tensor(2.0)
    schedule = OptionSchedule(optimizer, "lamb", stages({0: 1.0}), groups=[0])
    saved = schedule.state_dict()
    schedule.set_base(5.0)
    schedule.load_state_dict(saved)
    assert values(optimizer)[0] == 2.0


@pytest.mark.parametrize(
    ("option", "groups", "text"),
    [
        ("betas", None, "any group must have a number under 'betas'; got none"),
        ("maximize", None, "any group must have a number under 'maximize'; got none"),
        ("unknown", None, "any group must have a number under 'unknown'; got none"),
        ("lamb", [], "groups must have a number under 'lamb'; got none"),
        ("lamb", [3], "groups must exist; got 3"),
        ("lamb", ["cores"], "groups must exist; got 'cores'"),
        ("filter", ["halting"], "'filter' of group 2 must be a number or a tensor of one element"),
    ],
)
def test_wrong_option_or_group_is_refused(option: str, groups: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"OptionSchedule: {text}"):
        OptionSchedule(make_optimizer(), option, stages({0: 1.0}), groups)


def test_base_of_another_group_is_refused_and_changes_nothing() -> None:
    optimizer = make_optimizer()
    schedule = OptionSchedule(optimizer, "lamb", stages({0: 1.0}), groups=["core"])
    with pytest.raises(ValueError, match=r"among the scheduled \[0\]; got \[1\]"):
        schedule.set_base(5.0, groups=["core", "memory"])
    assert values(optimizer) == [2.0, 1.5, 0.25]


def test_state_of_another_option_is_refused() -> None:
    optimizer = make_optimizer()
    saved = OptionSchedule(optimizer, "alpha", stages({0: 1.0})).state_dict()
    with pytest.raises(ValueError, match=r"of the state, \('alpha', \[0, 1, 2\]\); got \('lamb'"):
        OptionSchedule(optimizer, "lamb", stages({0: 1.0})).load_state_dict(saved)
