"""The grokking benchmark: its rows, its files, what is trained again and what never is."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from trm_fast.recipes.grokking import GrokkingConfig, build, evaluations
from trm_fast.recipes.grokking.bench import runs as bench
from trm_fast.recipes.grokking.bench.plan import DEFAULT, FAMILIES, ROWS, VARIANTS, select_rows
from trm_fast.recipes.grokking.bench.runs import Plan, measure_time, train_missing

TWO = ("adam-wd0.005-plain", "adam-wd0.005-ema")


def small(out, rows=TWO, seeds=(0, 1), **fields):
    """Runs on 42 equations modulo 7, with one iteration per epoch, a millisecond each."""
    fields = {"prime": 7, "iterations": 4, "device": "cpu", **fields}
    return Plan(rows, seeds, GrokkingConfig(**fields), out)


def train(plan, jobs=1):
    train_missing(plan, jobs, threads=1)
    return plan.outcomes()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refuse_to_train(monkeypatch):
    def fail(plan, row, seed):
        raise AssertionError(f"{row} seed {seed} is trained again")

    monkeypatch.setattr(bench, "_train", fail)


def test_the_settings_of_every_filter_are_the_documented_ones():
    named = ("filter", "alpha", "lamb", "window")
    used = {
        name: {key: value for key, value in variant.fields.items() if key in named}
        for name, variant in VARIANTS.items()
    }
    assert used == {
        "plain": {"filter": "none"},
        "lr3": {"filter": "none"},
        "lr6": {"filter": "none"},
        "ema": {"filter": "ema", "alpha": 0.98, "lamb": 2.0},
        "ma": {"filter": "ma", "window": 100, "lamb": 5.0},
        "highpass": {"filter": "highpass", "alpha": 0.98, "lamb": 0.1},
        "highpass2": {"filter": "highpass", "alpha": 0.98, "lamb": 2.0},
        "projection": {"filter": "projection", "alpha": 0.98, "lamb": 2.0},
        "cosine_gate": {"filter": "cosine_gate", "alpha": 0.98, "lamb": 2.0},
    }


@pytest.mark.parametrize(("control", "filter"), [("lr3", "ema"), ("lr6", "ma")])
def test_the_controls_raise_the_rate_by_one_plus_lamb(tmp_path, control, filter):
    plan = small(tmp_path)
    for family in FAMILIES:
        plain, raised = (plan.config(f"{family}-{name}", 0) for name in ("plain", control))
        factor = 1 + VARIANTS[filter].fields["lamb"]
        assert (raised.lr, raised.muon_lr) == (factor * plain.lr, factor * plain.muon_lr)
        same = dataclasses.replace(raised, lr=plain.lr, muon_lr=plain.muon_lr)
        assert same == plain


def test_a_family_shares_optimizer_and_weight_decay(tmp_path):
    plan = small(tmp_path)
    for name, row in ROWS.items():
        config, fields = plan.config(name, 0), FAMILIES[row.family].fields
        assert (config.optimizer, config.weight_decay) == (
            fields["optimizer"],
            fields["weight_decay"],
        )


def test_the_default_rows_hold_every_filter_at_both_decays_and_both_muons():
    rows = select_rows(DEFAULT)
    for family in ("adam-wd0.005", "adamw-wd1"):
        assert {f"{family}-{variant}" for variant in VARIANTS} <= {*rows}
    assert {"muon-wd1-plain", "muon-wd1-ema", "adam-wd0-plain"} <= {*rows}


def test_rows_are_chosen_by_patterns_in_their_order_and_once():
    chosen = select_rows(["muon-wd1-ema", "muon-wd1-[em]*", "adam-wd0-lr?"])
    assert chosen == ("muon-wd1-ema", "muon-wd1-ma", "adam-wd0-lr3", "adam-wd0-lr6")


def test_a_pattern_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"must name rows .*; got 'adam-ema', which matches none"):
        select_rows(["adam-wd0-ema", "adam-ema"])


@pytest.mark.parametrize("fields", [{"rows": ()}, {"seeds": ()}, {"seeds": (0, 0)}])
def test_a_plan_of_nothing_or_of_twice_the_same_is_refused(tmp_path, fields):
    with pytest.raises(ValueError, match="must be different ones"):
        small(tmp_path, **fields)


def test_all_rows_of_a_seed_come_before_the_next_seed(tmp_path):
    plan = small(tmp_path, seeds=(5, 2))
    assert [*plan.runs()] == [(TWO[0], 5), (TWO[1], 5), (TWO[0], 2), (TWO[1], 2)]


def test_a_finished_run_is_one_file(tmp_path):
    assert len(train(small(tmp_path))) == 4
    assert names(tmp_path) == sorted(f"{row}-seed{seed}.json" for row in TWO for seed in (0, 1))


def test_a_run_is_the_recipe_with_the_settings_of_the_row(tmp_path):
    outcome = train(small(tmp_path, seeds=(3,)))[TWO[1], 3]
    config = GrokkingConfig(
        prime=7, iterations=4, device="cpu", seed=3, plot=False, out=str(tmp_path / "run")
    )
    trainer = build(config)
    trainer.fit()
    for name in ("iteration", "train_accuracy", "validation_accuracy"):
        found = [round(getattr(each, name), 5) for each in evaluations(trainer.history)]
        assert outcome.curve[name] == found
    assert (outcome.iterations, outcome.reached, outcome.diverged) == (4, None, False)
    assert outcome.config["seed"] == 3 and outcome.config["filter"] == "ema"
    assert outcome.wall_seconds > 0 and outcome.cpu_seconds > 0
    assert outcome.environment["threads"] == 1


@pytest.mark.parametrize("row", [name for name in ROWS if name.startswith(("adam-wd1", "muon"))])
def test_every_optimizer_and_variant_trains(tmp_path, row):
    outcome = train(small(tmp_path, rows=(row,), seeds=(0,)))[row, 0]
    assert outcome.iterations == 4


@pytest.mark.slow
def test_the_same_seed_gives_the_same_curve_and_another_one_does_not(tmp_path):
    first, second = (train(small(tmp_path / name, iterations=12)) for name in "ab")
    assert {run: x.curve for run, x in first.items()} == {run: x.curve for run, x in second.items()}
    assert first[TWO[1], 0].curve != first[TWO[1], 1].curve


def test_a_run_ends_at_the_target(tmp_path):
    outcome = train(small(tmp_path, target=0.0))[TWO[0], 0]
    assert (outcome.reached, outcome.iterations) == (1, 1)


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    before = train(small(tmp_path))
    refuse_to_train(monkeypatch)
    assert train(small(tmp_path)) == before
    assert train(small(tmp_path, iterations=2)) == before  # fewer tell nothing new


def test_more_iterations_train_only_what_did_not_reach_the_target(tmp_path, monkeypatch):
    train(small(tmp_path, target=0.0))
    refuse_to_train(monkeypatch)
    train(small(tmp_path, target=0.0, iterations=9))
    monkeypatch.undo()
    train(small(tmp_path / "open"))
    outcomes = train(small(tmp_path / "open", iterations=9))
    assert {outcome.iterations for outcome in outcomes.values()} == {9}


def test_an_interrupted_bench_goes_on(tmp_path, monkeypatch):
    trained = []
    original = bench._train

    def interrupted(plan, row, seed):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((row, seed))
        return original(plan, row, seed)

    monkeypatch.setattr(bench, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path))
    assert [*small(tmp_path).outcomes()] == trained == [(TWO[0], 0), (TWO[1], 0)]
    monkeypatch.setattr(bench, "_train", original)
    assert len(train(small(tmp_path))) == 4


def test_files_of_other_settings_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    train(small(tmp_path, seeds=(1,)))
    refuse_to_train(monkeypatch)
    with pytest.raises(ValueError, match=r"must hold a run with batch 8; got 512\. Choose another"):
        train(small(tmp_path, batch=8))


def test_a_loss_that_is_not_finite_is_an_outcome(tmp_path, monkeypatch):
    plan = small(tmp_path, rows=TWO[:1], seeds=(0,), iterations=30, lr=1e20, warmup=0)
    outcome = train(plan)[TWO[0], 0]
    assert outcome.diverged and outcome.reached is None
    assert outcome.iterations == len(outcome.curve["iteration"]) < 30
    refuse_to_train(monkeypatch)
    train(dataclasses.replace(plan, base=dataclasses.replace(plan.base, iterations=90)))


def test_one_line_of_progress_per_run(tmp_path, capfd):
    train(small(tmp_path, target=0.0))
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(" at iteration 1, ")[0] for line in lines] == [
        "[1/4] adam-wd0.005-plain seed 0: 0 %",
        "[2/4] adam-wd0.005-ema seed 0: 0 %",
        "[3/4] adam-wd0.005-plain seed 1: 0 %",
        "[4/4] adam-wd0.005-ema seed 1: 0 %",
    ]
    train(small(tmp_path / "open", rows=TWO[:1], seeds=(0,)))
    assert "seed 0: not 95 % within 4 iterations (" in capfd.readouterr().out


def test_a_claim_is_held_by_one_alone(tmp_path):
    with bench._claim(tmp_path / "run.json") as first:
        with bench._claim(tmp_path / "run.json") as second:
            assert (first, second) == (True, False)
        with bench._claim(tmp_path / "other.json") as other:
            assert other
    with bench._claim(tmp_path / "run.json") as again:
        assert again
    assert names(tmp_path) == []


def test_a_claimed_run_is_left_to_its_process(tmp_path):
    plan = small(tmp_path, seeds=(0,))
    with bench._claim(plan.path(TWO[0], 0)):
        assert [*train(plan)] == [(TWO[1], 0)]
    assert len(train(plan)) == 2


def test_the_claim_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from trm_fast.recipes.grokking.bench import runs\n"
        "with runs._claim(Path(sys.argv[1])) as mine:\n"
        "    print(mine, flush=True); time.sleep(600)"
    )
    path = tmp_path / "run.json"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        with bench._claim(path) as mine:
            assert not mine
        os.kill(process.pid, signal.SIGKILL)
    with bench._claim(path) as mine:
        assert mine


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_train_every_run_once(tmp_path, capfd):
    alone = train(small(tmp_path / "alone"))
    capfd.readouterr()
    together = train(small(tmp_path / "together"), jobs=2)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == len({line.partition("] ")[2].partition(":")[0] for line in lines}) == 4
    assert {run: x.curve for run, x in alone.items()} == {
        run: x.curve for run, x in together.items()
    }


def test_threads_are_those_asked_for_and_then_as_before(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "_train", lambda *run: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(bench, "_write", lambda path, outcome: None)
    monkeypatch.setattr(bench, "_line", lambda plan, outcome: "")
    before = torch.get_num_threads()
    train_missing(small(tmp_path), jobs=1, threads=before + 1)
    assert seen == [before + 1] * 4 and torch.get_num_threads() == before


def test_the_time_is_the_median_per_iteration_of_rounds_in_turns(tmp_path, monkeypatch):
    """A clock that only training moves: by 2 s per iteration of one row, 5 s of the other, and by
    a minute in the first round, which does not count."""
    clock, order = [0.0], []

    def epochs(config):
        cost = 5.0 if config.filter == "ema" else 2.0
        for turn in range(1000):
            clock[0] += 3 * cost + (60.0 if turn == 0 else 0.0)
            order.append(config.filter)
            yield bench.Evaluation(3 * (turn + 1), 0.0, 0.0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(bench, "grokking_epochs", epochs)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    timing = measure_time(small(tmp_path), threads=1)
    assert timing.seconds == {TWO[0]: 2.0, TWO[1]: 5.0}
    assert timing == small(tmp_path).timing()
    rounds = [{*order[i : i + 2]} for i in range(0, len(order), 2)]
    assert rounds == [{"none", "ema"}] * (timing.rounds + 1)
    assert len({tuple(order[i : i + 2]) for i in range(0, len(order), 2)}) == 2  # both orders


def test_timing_needs_no_run_and_makes_none(tmp_path):
    assert small(tmp_path).timing() is None
    timing = measure_time(small(tmp_path), threads=1)
    assert all(0 < seconds < math.inf for seconds in timing.seconds.values())
    assert names(tmp_path) == ["time.json"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("reached", "4", "reached must be of type int | None; got '4'"),
        ("reached", 0, "iterations must be >= 0 and reached >= 1"),
        ("config", [], "config must be of type dict[str, typing.Any]; got []"),
        ("curve", {"iteration": [1]}, "curve must have iteration, train_accuracy, "),
        ("environment", {"threads": 1}, "environment must have processor, threads, torch, "),
        ("new", 1, "the setting 'new' is unknown"),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_name(tmp_path, field, value, reason):
    plan = small(tmp_path, seeds=(0,))
    train(plan)
    path = plan.path(TWO[0], 0)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        plan.outcomes()
    assert str(caught.value).startswith(f"bench grokking: {path}: ")


def test_a_pipe_in_the_place_of_times_is_refused(tmp_path):
    os.mkfifo(tmp_path / "time.json")
    with pytest.raises(ValueError, match="an ordinary file is required; got a pipe"):
        small(tmp_path).timing()
