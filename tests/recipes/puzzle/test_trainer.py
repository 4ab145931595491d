"""The puzzle recipes: presets, data from everywhere, what a run says at its end, voting."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trm_fast.cli import main
from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.puzzles.sudoku import check_sudoku, generate_sudoku, sudoku_tokens
from trm_fast.data.sources.official import write_official
from trm_fast.nn import CONFIGS
from trm_fast.optim import AdamATan2, GrokFastAdamW, MuGrokfast, SparseSignSGD
from trm_fast.recipes.puzzle import PRESETS, SudokuData, build, finish
from trm_fast.recipes.puzzle import show as _puzzle_show
from trm_fast.recipes.puzzle.baselines import elimination, most_common
from trm_fast.recipes.puzzle.show import draw_maze, draw_sudoku, solve_aloud
from trm_fast.recipes.settings import from_json, replaced, to_json

CELLS = 16
MICRO = {
    "batch": 4,
    "evaluation_batch": 4,
    "device": "cpu",
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.H_cycles": 1,
    "model.L_cycles": 1,
    "model.L_layers": 1,
    "model.halt_max_steps": 2,
    "model.forward_dtype": "float32",
    "train.steps": 4,
    "train.evaluate_every": 2,
}
SUDOKU = {"data.size": 4, "data.clues": (6, 8), "data.train": 16, "data.test": 6, **MICRO}
MAZE = {"data.height": 4, "data.width": 4, "data.train": 6, "data.test": 4, **MICRO}
ARC = {
    "data.tasks": 1, "data.augmentations": 1, "model.puzzle_emb_ndim": 16, **MICRO, "train.steps": 1
}  # fmt: skip


def micro(name, out, **settings):
    """A run of some milliseconds."""
    base = {"sudoku": SUDOKU, "maze": MAZE, "arc": ARC}[name]
    return replaced(PRESETS[name]["tiny"], {**base, "out": str(out), **settings})


def fit(config, **options):
    trainer = build(config)
    return trainer, trainer.fit(**options)


def pairs(count=8, seed=0):
    return sudoku_tokens(*generate_sudoku(count, 4, seed=seed))


@pytest.mark.parametrize("name", ["sudoku", "maze", "arc"])
def test_a_recipe_trains_evaluates_and_says_how_it_went(tmp_path, name):
    trainer, summary = fit(micro(name, tmp_path / "run"))
    assert summary.step == trainer.config.steps
    text = "\n".join(finish(trainer, summary))
    assert summary.reason in text
    assert f"trm-fast report {tmp_path / 'run'}" in text
    said = {"sudoku": "exactly solved", "maze": "exactly solved", "arc": "solved by vote"}[name]
    assert said in text


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (True, " puzzles, but 6 of 6 are in the training data, or a form of one that"),
        (False, " puzzles that it has never seen"),
    ],
)
def test_a_form_of_a_training_puzzle_is_seen_where_augmentation_draws_it(tmp_path, augment, said):
    inputs, labels = pairs()
    turned = [
        tokens.reshape(-1, 4, 4)[:, [1, 0, 3, 2]].reshape(-1, CELLS) for tokens in (inputs, labels)
    ]
    for split, (asked, answers) in (("train", (inputs, labels)), ("test", turned)):
        write_official(tmp_path / "data", split, PuzzleSet.of_pairs(asked, answers, 6))
    settings = {"data.path": str(tmp_path / "data"), "data.augment": augment}
    trainer, summary = fit(micro("sudoku", tmp_path / "run", **settings))
    assert any(said in line for line in finish(trainer, summary))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("preset", ["tiny", "official"])
def test_settings_go_through_json_unchanged(name, preset):
    config = PRESETS[name][preset]
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


def test_official_presets_are_the_published_settings():
    sudoku, maze, arc = (PRESETS[name]["official"] for name in ("sudoku", "maze", "arc"))
    assert (sudoku.model, maze.model, arc.model) == tuple(
        CONFIGS[name] for name in ("sudoku_mlp", "maze", "arc")
    )
    for config, decay, puzzle_lr in ((sudoku, 1.0, 1e-4), (maze, 1.0, 1e-4), (arc, 0.1, 1e-2)):
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.betas) == ("adam_atan2", 1e-4, (0.9, 0.95))
        assert (optimizer.weight_decay, optimizer.puzzle_weight_decay) == (decay, decay)
        assert (optimizer.puzzle_lr, optimizer.warmup, optimizer.min_ratio) == (puzzle_lr, 2000, 1)
        assert (config.batch, config.train.ema, config.halt_weight) == (768, 0.999, 0.5)
        assert config.supervision == "per_step"
    assert sudoku.train.steps == maze.train.steps == 65_104


def test_the_model_has_the_sizes_of_the_data(tmp_path):
    trainer = build(micro("sudoku", tmp_path))
    assert trainer.model.config.vocab_size == 6
    assert trainer.model.config.seq_len == CELLS


def test_the_seed_decides_the_weights_and_leaves_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    first, same = (build(micro("sudoku", tmp_path)).model.lm_head for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    other = build(micro("sudoku", tmp_path, **{"train.seed": 1})).model.lm_head
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("grokfast_adamw", GrokFastAdamW), ("adam_atan2", AdamATan2), ("mugrokfast", MuGrokfast),
     ("adamw", torch.optim.AdamW)],
)  # fmt: skip
def test_every_optimizer_trains_and_averages_the_weights(tmp_path, name, kind):
    config = micro(
        "sudoku",
        tmp_path / "run",
        **{"optimizer.name": name, "model.puzzle_emb_ndim": 16, "model.puzzle_emb_len": 1},
    )
    trainer, _ = fit(config)
    assert [type(optimizer) for optimizer in trainer.optimizers] == [kind, SparseSignSGD]
    weight = trainer.model.lm_head.detach().clone()
    with trainer.ema.swapped():
        assert not torch.equal(trainer.model.lm_head, weight)


def test_the_learning_rate_rises_and_falls(tmp_path):
    rates = {"optimizer.warmup": 2, "optimizer.min_ratio": 0.5, "optimizer.lr": 1.0}
    config = micro("sudoku", tmp_path / "run", **rates, **{"train.steps": 4, "train.log_every": 1})
    trainer, _ = fit(config)
    found = [record["lr"] for record in trainer.history if record["kind"] == "train"]
    # After each step, as the next one will have it: 1 at step 1, half a cosine to 0.5 at step 4.
    assert found == pytest.approx([1.0, 0.875, 0.625, 0.5])


def test_joint_supervision_takes_all_steps_of_a_batch_for_one_update(tmp_path):
    config = micro("sudoku", tmp_path / "run", supervision="joint", weights="halving")
    trainer, _ = fit(config)
    assert trainer.objective.backwards == 2
    assert trainer.objective.weights == pytest.approx([2 / 3, 1 / 3])


def test_two_runs_are_alike_to_the_bit(tmp_path):
    first, second = (fit(micro("sudoku", tmp_path / name))[0] for name in "ab")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_puzzles_that_are_made_have_the_wanted_clues_and_do_not_overlap():
    splits = SudokuData(size=4, clues=(6, 7), train=30, test=10).load()
    for split, count in ((splits.train, 30), (splits.test, 10)):
        assert len(split) == count
        clues = (split.inputs > 1).sum(axis=1)
        assert clues.min() >= 6 and clues.max() <= 7
        assert check_sudoku(split.labels.astype(int) - 1, split.inputs.astype(int) - 1).all()
    train = {row.tobytes() for row in splits.train.inputs}
    assert not train & {row.tobytes() for row in splits.test.inputs}


def test_a_directory_in_the_official_layout_is_read(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        write_official(tmp_path / "data", split, PuzzleSet.of_pairs(*pairs(seed=seed), 6))
    splits = SudokuData(path=str(tmp_path / "data"), size=4, train=5, test=0).load()
    assert (len(splits.train), len(splits.test)) == (5, 8)
    np.testing.assert_array_equal(splits.train.inputs, pairs()[0][:5])


def test_a_directory_of_csv_files_is_read(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        rows = [
            "".join(map(str, question - 1)) + "," + "".join(map(str, answer - 1))
            for question, answer in zip(*pairs(seed=seed), strict=True)
        ]
        (tmp_path / f"{split}.csv").write_text("\n".join(["question,answer", *rows, ""]))
    splits = SudokuData(path=str(tmp_path), size=4, train=0, test=3).load()
    np.testing.assert_array_equal(splits.train.labels, pairs()[1])
    assert len(splits.test) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.path": "nowhere"}, "data: path must be a directory with data, or 'hub'"),
        ({"data.size": 5}, "size must be 4, 6 or 9; got 5"),
        ({"optimizer.warmup": -1}, "optimizer: warmup must be >= 0; got -1"),
        ({"optimizer.min_ratio": 2.0}, r"optimizer: min_ratio must be in \[0, 1\]; got 2.0"),
        ({"data.train": -3}, "data: train must be >= 1 where puzzles are made; got -3"),
        ({"data.test": 0}, "data: test must be >= 1 where puzzles are made; got 0"),
        ({"model.mlp_t": False, "model.num_heads": 3}, "num_heads must be a divisor of hidden_siz"),
        ({"batch": 0}, "batch_size must be >= 1; got 0"),
        ({"optimzer.lr": 1.0}, "unknown setting 'optimzer.lr'; did you mean 'optimizer.lr'"),
        ({"train.steps": -1}, "steps must be >= 0; got -1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(micro("sudoku", tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_the_size_of_files_must_be_the_size_that_is_asked_for(tmp_path):
    for split in ("train", "test"):
        write_official(tmp_path, split, PuzzleSet.of_pairs(*pairs(), 6))
    with pytest.raises(ValueError, match="size must be 4 as in"):
        SudokuData(path=str(tmp_path), size=9).load()


def test_arc_is_scored_by_vote(tmp_path):
    trainer = build(micro("arc", tmp_path / "run"))
    found = trainer.evaluate()
    assert found["tasks"] == 1
    assert 0 <= found["pass@1"] <= found["pass@2"] <= 1
    assert found["count"] == len(trainer.evaluator.splits.test)


def test_the_puzzle_that_takes_most_steps_is_shown_until_it_is_right(monkeypatch):
    inputs, labels = pairs(3)
    right = torch.from_numpy(labels.astype(np.int64))
    answers = torch.ones(3, 3, CELLS, dtype=torch.int64)
    answers[0:, 0], answers[1:, 1] = right[0], right[1]  # the third is never solved
    monkeypatch.setattr(_puzzle_show, "predictions", lambda model, batch: answers)
    model = SimpleNamespace(lm_head=torch.zeros(1))
    test = PuzzleSet.of_pairs(inputs, labels, 6)
    title, first_row, *_ = solve_aloud(model, test, draw_sudoku)
    assert title.split() == "puzzle after step 1 after step 2".split()
    given, step_1, step_2 = first_row.split("    ")
    assert step_2.replace("|", "").split() == [str(token - 1) for token in labels[1][:4]]
    assert "*" in step_1 and "*" not in given


def test_wrong_digits_have_a_star():
    solution = torch.tensor([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]) + 1
    answer = solution.clone()
    answer[5] = 3
    lines = draw_sudoku(answer, solution, solution)
    assert lines == [" 1 2 | 3 4", " 3*2 | 1 2", "-----+----", " 2 1 | 4 3", " 4 3 | 2 1"]


def test_on_a_terminal_clues_are_bold_and_wrong_digits_red(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    solution = torch.tensor([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]) + 1
    inputs, answer = torch.ones(CELLS).long(), solution.clone()
    inputs[0], answer[1] = 2, 5
    assert draw_sudoku(answer, inputs, solution)[0] == " \x1b[1m1\x1b[0m \x1b[31m4\x1b[0m | 3 4"


def test_a_maze_shows_wrong_cells_as_question_marks():
    draw = draw_maze(2)
    tokens, labels = torch.tensor([1, 2, 3, 5]), torch.tensor([1, 2, 3, 4])
    assert draw(tokens, labels, labels) == ["# ", "S?"]


def test_baselines_count_what_they_solve():
    solution = np.array([[1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]]) + 1
    one_blank, all_blank = solution.copy(), np.ones_like(solution)
    one_blank[0, 5] = 1
    train = PuzzleSet.of_pairs(np.ones_like(solution), solution, 6)
    easy = PuzzleSet.of_pairs(one_blank, solution, 6)
    hard = PuzzleSet.of_pairs(all_blank, (solution - 1) % 4 + 2, 6)
    assert elimination(easy, 1) == elimination(easy) == 1.0
    # 16 random digits in a row are right once in 4**16.
    assert elimination(hard) == 0.0
    assert most_common(train, easy) == 1.0
    assert most_common(train, hard) == 0.0


def test_elimination_needs_as_many_rounds_as_the_chain_is_long():
    inputs, labels = sudoku_tokens(*generate_sudoku(60, 4, clues=(4, 6), seed=3))
    test = PuzzleSet.of_pairs(inputs, labels, 6)
    once, to_the_end = elimination(test, 1), elimination(test)
    assert once < to_the_end <= 1.0


def test_the_command_trains_resumes_and_refuses_other_settings(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [f"--set={name}={value}" for name, value in SUDOKU.items() if name != "data.clues"]
    argv = ["train", "sudoku", *flags, "--set=data.clues=[6, 8]", "--out", str(out)]
    assert main(argv) == 0
    assert main(argv) == 2
    assert "a directory without a run" in capsys.readouterr().err
    assert main(["train", "sudoku", "--out", str(out), "--resume", "--train.steps", "6"]) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 6
    assert main(["train", "sudoku", "--out", str(out), "--resume", "--batch", "5"]) == 2
    assert "batch must be 4 as in the run that is resumed; got 5" in capsys.readouterr().err
    assert main(["train", "maze", "--out", str(out), "--resume"]) == 2
    assert "--out must be a run of maze to resume; got one of sudoku" in capsys.readouterr().err
    (out / "run.json").write_text("{}")
    assert main(["train", "sudoku", "--out", str(out), "--resume"]) == 2
    assert (
        "--out must be a run of sudoku to resume; got one that no recipe has made"
        in capsys.readouterr().err
    )
    for name in ("run.json", "config.json"):
        kept = (out / name).read_bytes()
        (out / name).unlink()
        assert main(["train", "sudoku", "--out", str(out), "--resume"]) == 2
        assert f"{name}: must be there, as in every run; got no such" in capsys.readouterr().err
        (out / name).write_text('{"name": "sudoku"}' if name == "run.json" else kept.decode())


def test_a_dry_run_shows_settings_and_sizes_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [f"--{name}={value}" for name, value in SUDOKU.items() if name != "data.clues"]
    assert main(["train", "sudoku", *flags, "--out", str(out), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for word in ("model.hidden_size", "parameters", "memory", "checkpoint", "one step"):
        assert word in text
    assert not out.exists()


def test_trackers_are_asked_for_by_name(tmp_path):
    config = micro("sudoku", tmp_path / "run", tracker="tensorboard")
    kinds = [type(callback).__name__ for callback in build(config).callbacks]
    assert kinds == ["Progress", "Tracker"]
