"""Every reader of files from outside, with valid files for it; ``tests.fuzz`` mutates them."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from trm_fast._files import read_file
from trm_fast._pt import load_pt
from trm_fast.cli import main
from trm_fast.cli._settings import read_options
from trm_fast.data import (
    ArcVoting,
    PuzzleSet,
    encode_arc,
    read_arc_folder,
    read_identifiers,
    read_official,
    read_pairs,
    read_sudoku_csv,
    read_test_puzzles,
    write_official,
)
from trm_fast.data.sources.npy import read_npy
from trm_fast.nn import TinyRecursiveModel, TRMConfig
from trm_fast.recipes import load
from trm_fast.train import Checkpoints, RunDirectory, Trainer, TrainerConfig
from trm_fast.train.checkpoints.loading import load_run
from trm_fast.train.checkpoints.snapshot import restore
from trm_fast.train.checkpoints.state import from_safetensors, loads, to_safetensors, unflatten
from trm_fast.train.generators import fork_rng
from trm_fast.train.reports import page, tables
from trm_fast.train.reports.reading import read_run

from ..train.checks import sealed

SUDOKUS = (("1030341021434301", "1234341221434321"), ("0030341021434301", "1234341221434321"))
GRID = [[0, 1], [2, 3]]
PAIR = {"input": GRID, "output": GRID}


class Reader(NamedTuple):
    """One reader.

    Args:
        make: writes valid files into an empty directory.
        read: reads them.
        seal: makes sums in the directory fit again, so that reading goes on behind them.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    seal: Callable[[Path], object] | None = None


def command(*argv: object) -> None:
    """Runs ``trm-fast``, which may exit with 0, and with 1 or 2, a ValueError here."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([*map(str, argv)])
    assert code in (0, 1, 2), code
    if code == 1:
        raise ValueError("something is wrong")
    if code == 2:
        raise ValueError(said.getvalue().rstrip("\n"))


def write_npy(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(12, dtype=np.int16).reshape(3, 4))


def read_arrays(folder: Path) -> None:
    read_npy(folder / "a.npy").sum()
    read_npy(folder / "a.npy", mapped=True).sum()


def write_csv(folder: Path) -> None:
    for split, pair in zip(("train", "test"), SUDOKUS, strict=True):
        rows = "".join(f'"{question}",{answer},7\n' for question, answer in [pair])
        (folder / f"{split}.csv").write_text(f"question,answer,rating\n{rows}")


def read_csv(folder: Path) -> None:
    # Both look at every file, whatever the other one says of it.
    with contextlib.suppress(ValueError):
        read_sudoku_csv(folder / "train.csv", on_bad="quarantine", bad_rows=folder / "bad.jsonl")
    command("data", "check", folder)


def write_jsonl(folder: Path) -> None:
    rows = {
        "train": ("[MAX 2 9 [MIN 4 7 ] 0 ]", "9"),
        "test": ("[SM 7 [MED 1 2 4 ] 3 ]", "2"),
    }
    for split, (question, answer) in rows.items():
        row = json.dumps({"question": question, "answer": answer})
        (folder / f"{split}.jsonl").write_text(f"{row}\n{row}\n")


def read_jsonl(folder: Path) -> None:
    with contextlib.suppress(ValueError):
        read_pairs(folder / "train.jsonl", "[MAXIN2947 ]0")
    command("data", "check", folder)


def write_folder(folder: Path) -> None:
    for split, pair in zip(("train", "test"), SUDOKUS, strict=True):
        inputs, labels = (np.array([[int(digit) + 1 for digit in text]]) for text in pair)
        data = PuzzleSet.of_pairs(inputs, labels, 6)
        write_official(folder, split, data, test_puzzles={"a": {"test": [PAIR]}})


def read_folder(folder: Path) -> None:
    with contextlib.suppress(ValueError, TypeError, OSError):
        read_official(folder, "train"), read_official(folder, "test")
    with contextlib.suppress(ValueError, OSError):
        ArcVoting(read_identifiers(folder), read_test_puzzles(folder)).scores()
    command("data", "check", folder)


def write_tasks(folder: Path) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "a.json").write_text(json.dumps({"train": [PAIR], "test": [PAIR]}))
    challenges = {name: {"train": [PAIR], "test": [{"input": GRID}]} for name in ("b", "c")}
    (folder / "x_challenges.json").write_text(json.dumps(challenges))
    (folder / "x_solutions.json").write_text(json.dumps({"b": [GRID], "c": [GRID]}))


def read_tasks(folder: Path) -> None:
    encode_arc([], read_arc_folder(folder), 2)


def write_settings(folder: Path) -> None:
    text = "data:\n  size: 4\n  clues: [5, 9]\n  path: ''\nout: runs/x\ntrain: {steps: 10}\n"
    (folder / "a.yaml").write_text(text)


def read_settings(folder: Path) -> None:
    read_options(load("sudoku"), ["--config", str(folder / "a.yaml")])


def trainer(out: Path | None) -> Trainer:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    return Trainer(
        model, optimizer, [torch.ones(8, 4)], lambda m, batch: m(batch).square().mean(),
        TrainerConfig(steps=4, save_every=4, log_every=2, evaluate_every=2, ema=0.9),
        evaluate=lambda m: {"accuracy": 0.5}, out=out,
    )  # fmt: skip


def write_run(folder: Path) -> None:
    with fork_rng(torch.device("cpu")):
        trainer(folder).fit()
    (folder / "config.json").write_text('{"lr":0.5,"data":{"path":"x"}}')


def write_checkpoint(folder: Path) -> None:
    write_run(folder)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def seal_checkpoint(folder: Path) -> None:
    sealed(folder / "ckpt" / "step-00000004")


def read_checkpoints(folder: Path) -> None:
    with fork_rng(torch.device("cpu")):
        Checkpoints(folder).verify()
        with contextlib.suppress(ValueError, OSError):
            load_run(trainer(None), folder)
        restore(trainer(None), Checkpoints(folder).load().state)


def write_state(folder: Path) -> None:
    tree = {"a": [1, {"$tuple": [1, {"$float": "7ff0000000000000"}]}], "b": {"$tensor": "x"}}
    tree |= {
        "c": {"$dict": [[0, "a"], [1, {"$int": "0x10000000000000000"}]]},
        "d": {"$dtype": "F32"},
    }
    (folder / "state.json").write_text(json.dumps(tree))


def read_state(folder: Path) -> None:
    unflatten(loads(read_file(folder / "state.json"), "state.json"), {"x": torch.zeros(1)})


def write_safetensors(folder: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    (folder / "a.safetensors").write_bytes(b"".join(bytes(p) for p in to_safetensors(tensors)))


def read_safetensors(folder: Path) -> None:
    from_safetensors(read_file(folder / "a.safetensors"))


def small() -> TRMConfig:
    return TRMConfig(
        6, 16, hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1, L_layers=1, puzzle_emb_ndim=0,
        puzzle_emb_len=0,
    )  # fmt: skip


def write_pt(folder: Path) -> None:
    torch.save(TinyRecursiveModel(small()).official_state_dict(), folder / "a.pt")


def read_pt(folder: Path) -> None:
    load_pt(folder / "a.pt")
    TinyRecursiveModel(small()).load_official(folder / "a.pt")
    TinyRecursiveModel.from_official(folder / "a.pt", small())


def read_report(folder: Path) -> None:
    report = read_run(folder)
    for table in (tables.throughput, tables.environment, tables.checkpoints, tables.backends):
        table(report)
    tables.evaluations(report, 10), tables.events(report, 10), tables.overview([report])
    tables.sentence(report)
    page.page([report], "")


def read_records_of_run(folder: Path) -> None:
    with RunDirectory(folder) as run:
        run.truncate("metrics.jsonl", 2, 3)
        run.read("metrics.jsonl"), run.read("events.jsonl")


READERS: dict[str, Reader] = {
    "npy": Reader(write_npy, read_arrays),
    "csv": Reader(write_csv, read_csv),
    "jsonl": Reader(write_jsonl, read_jsonl),
    "official": Reader(write_folder, read_folder),
    "arc": Reader(write_tasks, read_tasks),
    "yaml": Reader(write_settings, read_settings),
    "checkpoint": Reader(write_checkpoint, read_checkpoints, seal_checkpoint),
    "state": Reader(write_state, read_state),
    "safetensors": Reader(write_safetensors, read_safetensors),
    "pt": Reader(write_pt, read_pt),
    "report": Reader(write_run, read_report),
    "records": Reader(write_run, read_records_of_run),
}
