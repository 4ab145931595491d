"""Readers of runs, checkpoints and results, with valid files for them."""

import contextlib
import io
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trm_fast._files import read_file
from trm_fast._pt import load_pt
from trm_fast.cli._runs import runs_in
from trm_fast.cli._settings import read_options
from trm_fast.nn import TinyRecursiveModel, TRMConfig
from trm_fast.recipes import load
from trm_fast.recipes.classify import TinyRecursiveModel as Classifier
from trm_fast.recipes.classify import TRMTrainer
from trm_fast.recipes.grokking.bench import runs as bench
from trm_fast.recipes.grokking.bench import table
from trm_fast.recipes.grokking.config import GrokkingConfig
from trm_fast.train import Checkpoints, RunDirectory, Trainer, TrainerConfig
from trm_fast.train.checkpoints.loading import load_run
from trm_fast.train.checkpoints.snapshot import restore
from trm_fast.train.checkpoints.state import from_safetensors, loads, to_safetensors, unflatten
from trm_fast.train.generators import fork_rng
from trm_fast.train.reports import page, tables
from trm_fast.train.reports.reading import read_run

from ..train.checks import sealed
from .reader import Reader, command


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


def seal_run(folder: Path) -> None:
    for path in (folder / "ckpt").glob("step-*"):
        sealed(path)


def read_checkpoints(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.verify(), checkpoints.list()
    checkpoints.load()


def read_snapshot(folder: Path) -> None:
    with fork_rng(torch.device("cpu")):
        with contextlib.suppress(ValueError, OSError):
            load_run(trainer(None), folder)
        restore(trainer(None), Checkpoints(folder).load().state)


def resume(folder: Path) -> None:
    with fork_rng(torch.device("cpu")):
        trainer(folder).fit(resume=True)


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


def read_official(folder: Path) -> None:
    TinyRecursiveModel(small()).load_official(folder / "a.pt")
    TinyRecursiveModel.from_official(folder / "a.pt", small())


def epochs() -> TRMTrainer:
    data = DataLoader(TensorDataset(torch.ones(4, 8), torch.zeros(4, dtype=torch.int64)), 2)
    return TRMTrainer(Classifier(8, 32, 4), data, data, T=1, n=1, device="cpu")


def write_epochs(folder: Path) -> None:
    with fork_rng(torch.device("cpu")):
        epochs().save_checkpoint(folder / "a.pt", 0, {"accuracy": 0.5})


def read_epochs(folder: Path) -> None:
    with fork_rng(torch.device("cpu")):
        epochs().load_checkpoint(folder / "a.pt")


def read_report(folder: Path) -> None:
    report = read_run(folder)
    for made in (tables.throughput, tables.environment, tables.checkpoints, tables.backends):
        made(report)
    tables.evaluations(report, 10), tables.events(report, 10), tables.overview([report])
    tables.sentence(report)
    page.page([report], "")


def write_records(folder: Path) -> None:
    with RunDirectory(folder) as run:
        run.write_json("run.json", {"name": "x", "trm_fast": "1", "runs": ["a"]})
        for step in range(1, 5):
            run.append("metrics.jsonl", {"kind": "train", "step": step, "loss": 0.5})
            run.append("events.jsonl", {"event": "started", "step": step, "message": "x"})


def read_records_of_run(folder: Path) -> None:
    with RunDirectory(folder) as run:
        run.require_ours()
        run.truncate("metrics.jsonl", 2, 3)
        run.read("metrics.jsonl"), run.read("events.jsonl")


def write_grokking(folder: Path) -> None:
    command(
        "train", "grokking", "--prime=5", "--iterations=2", "--batch=8", "--device=cpu",
        "--plot=false", f"--out={folder}",
    )  # fmt: skip


def read_resumed(folder: Path) -> None:
    read_options(load("grokking"), ["--out", str(folder), "--resume"])


def write_runs(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text('{"name": "x"}')
    (folder / "run.json").write_text('{"name": "x", "runs": ["a", "b"]}')


def read_runs(folder: Path) -> None:
    for run in runs_in("report", folder):
        read_run(run)


def plan(folder: Path) -> bench.Plan:
    base = GrokkingConfig(prime=5, iterations=2, device="cpu")
    return bench.Plan(("adam-wd0.005-plain",), (0, 1), base, folder)


def write_bench(folder: Path) -> None:
    with fork_rng(torch.device("cpu")), contextlib.redirect_stdout(io.StringIO()):
        bench.train_missing(plan(folder), 1, 1)
    environment = {"processor": "x", "threads": 1, "torch": "2", "trm_fast": "1"}
    timing = {"seconds": {"adam-wd0.005-plain": 0.5}, "rounds": 9, "environment": environment}
    (folder / "time.json").write_text(json.dumps(timing))


def read_bench(folder: Path) -> None:
    outcomes = plan(folder).outcomes()
    table.report(plan(folder), outcomes, plan(folder).timing(), "")


def draw_bench(folder: Path) -> None:
    command(
        "bench", "grokking", "--rows=adam-wd0.005-plain", "--seeds=0,1", "--prime=5",
        "--iterations=2", "--device=cpu", "--report-only", f"--out={folder}",
    )  # fmt: skip


def write_made(folder: Path) -> None:
    command("data", "make", "sudoku", "--size=4", "--count=2", "--test=1", "--out", folder / "a")


def read_made(folder: Path) -> None:
    command(
        "data", "make", "sudoku", "--size=4", "--count=2", "--test=1", "--out", folder / "a",
        "--overwrite",
    )  # fmt: skip


RUN_READERS: dict[str, Reader] = {
    "checkpoint": Reader(write_checkpoint, read_checkpoints, seal_run),
    "snapshot": Reader(write_checkpoint, read_snapshot, seal_run),
    "resume": Reader(write_run, resume, seal_run),
    "resume_settings": Reader(write_grokking, read_resumed, seal_run),
    "eval": Reader(write_grokking, lambda folder: command("eval", folder), seal_run),
    "state": Reader(write_state, read_state),
    "safetensors": Reader(write_safetensors, read_safetensors),
    "pt": Reader(write_pt, read_pt),
    "official_pt": Reader(write_pt, read_official),
    "epochs_pt": Reader(write_epochs, read_epochs),
    "report": Reader(write_run, read_report),
    "draw_report": Reader(write_run, lambda folder: command("report", folder, "--html")),
    "runs": Reader(write_runs, read_runs),
    "records": Reader(write_records, read_records_of_run),
    "bench": Reader(write_bench, read_bench),
    "draw_bench": Reader(write_bench, draw_bench),
    "made": Reader(write_made, read_made),
}
