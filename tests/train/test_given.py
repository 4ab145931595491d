"""A resume tells what its script gives otherwise than before, or refuses what makes no sense."""

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, StepLR
from torch.utils.data import DataLoader

from trm_fast import GrokFastAdamW
from trm_fast.train import Trainer, TrainerConfig
from trm_fast.train.run_directory import read_records


def run(
    out: Any,
    steps: int = 4,
    optimizer: Any = lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    schedules: Any = (),
    batches: Any = None,
    settings: Any = None,
    **config: Any,
) -> Trainer:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    trainer = Trainer(
        model, optimizer, [torch.eye(4)] * 8 if batches is None else batches,
        lambda model, batch: model(batch).square().mean(), TrainerConfig(steps=steps, **config),
        schedules=schedules, settings=settings, out=out, device="cpu",
    )  # fmt: skip
    trainer.fit(resume=True)
    return trainer


def told(out: Any) -> list[str]:
    events = read_records(out / "events.jsonl")
    found = [event["message"] for event in events if event["event"] in ("changed", "data")]
    return [line for line in found if not line.startswith("settings have changed: steps")]


def in_order(*names):
    return lambda model: torch.optim.AdamW([model.get_parameter(name) for name in names], lr=0.1)


def test_parameters_in_another_order_are_refused(tmp_path):
    run(tmp_path, optimizer=in_order("0.weight", "1.weight"))
    message = "optimizer 0 must have .* order .* where '0.weight' is in this place; got '1.weight'"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, 6, in_order("1.weight", "0.weight"))
    run(tmp_path, 6, in_order("0.weight", "1.weight"))


def test_optimizers_that_have_changed_places_are_refused(tmp_path):
    def both(*names):
        return lambda model: [in_order(name)(model) for name in names]

    run(tmp_path, optimizer=both("0.weight", "1.weight"))
    with pytest.raises(ValueError, match=r"'0.weight' is in this place; got '1.weight'"):
        run(tmp_path, 6, both("1.weight", "0.weight"))


def cosine(end):
    return lambda made: [CosineAnnealingLR(o, end) for o in made]


@pytest.mark.parametrize("schedules", [(), cosine(9)])
def test_nothing_is_told_where_nothing_has_changed(schedules, tmp_path):
    for steps in (4, 6, 6):
        run(tmp_path, steps, schedules=schedules, batches=DataLoader(torch.eye(4), 2))
    assert told(tmp_path) == []


@pytest.mark.parametrize("schedules", [(), cosine(9)])
def test_other_options_of_an_optimizer_are_told(schedules, tmp_path):
    run(tmp_path, schedules=schedules)
    again = run(
        tmp_path, 6, lambda m: torch.optim.AdamW(m.parameters(), lr=0.2, weight_decay=0.5),
        schedules,
    )  # fmt: skip
    assert again.optimizers[0].param_groups[0]["weight_decay"] == 0.01
    found = told(tmp_path)[0]
    assert "go on with those of the checkpoint: " in found
    assert "AdamW.0.0.lr 0.1 is now 0.2; AdamW.0.0.weight_decay 0.01 is now 0.5" in found


def test_options_that_are_in_no_state_are_told(tmp_path):
    run(tmp_path, optimizer=lambda m: GrokFastAdamW(m.parameters(), clip_norm=1.0))
    run(
        tmp_path, 6,
        lambda m: GrokFastAdamW(m.parameters(), clip_norm=2.0, backend="reference"),
    )  # fmt: skip
    assert told(tmp_path) == [
        "what is given has changed: optimizer.0.clip_norm 1.0 is now 2.0; "
        "optimizer.0.backend None is now reference"
    ]


def test_another_class_of_schedule_is_refused(tmp_path):
    run(tmp_path, schedules=lambda made: [ExponentialLR(made[0], 0.9)])
    with pytest.raises(ValueError, match=r"same classes of schedules, \['StepLR'\]; got .*Exponen"):
        run(tmp_path, 6, schedules=lambda made: [StepLR(made[0], 2)])


def test_other_settings_of_a_schedule_are_told(tmp_path):
    run(tmp_path, schedules=cosine(9))
    again = run(tmp_path, 6, schedules=cosine(20))
    assert again.schedules[0].T_max == 9
    assert told(tmp_path)[0].endswith("checkpoint: CosineAnnealingLR.0.T_max 9 is now 20")


def test_a_config_beside_settings_is_compared(tmp_path):
    run(tmp_path, settings={"mine": 1})
    run(tmp_path, 4, settings={"mine": 1}, clip_norm=0.5, accumulate=2)
    found = "what is given has changed: accumulate 1 is now 2; clip_norm None is now 0.5"
    assert told(tmp_path) == [found]


def test_a_config_within_settings_is_told_once(tmp_path):
    run(tmp_path, settings={"train": {"clip_norm": None}})
    run(tmp_path, settings={"train": {"clip_norm": 0.5}}, clip_norm=0.5)
    assert told(tmp_path) == ["settings have changed: train.clip_norm None is now 0.5"]


def test_another_loader_is_told(tmp_path):
    data = torch.eye(4)
    run(tmp_path, steps=1, batches=DataLoader(data, 2))
    run(tmp_path, 6, batches=DataLoader(data, 3, shuffle=True, drop_last=True))
    assert told(tmp_path) == [
        "what is given has changed: batches.train.batch_size 2 is now 3; batches.train.drop_last "
        "False is now True; batches.train.sampler SequentialSampler is now RandomSampler; "
        "batches.train.length 2 is now 1"
    ]


def test_fewer_batches_than_were_given_are_told(tmp_path):
    run(tmp_path, batches=[torch.eye(4)] * 8)
    run(tmp_path, 6, batches=[torch.eye(4)] * 3)
    changed = "what is given has changed: batches.train.length 8 is now 3"
    beyond = "batches of 'train' end at 3 now, before the place 4 of the run: its next epoch begins"
    assert told(tmp_path)[-2:] == [changed, beyond]
