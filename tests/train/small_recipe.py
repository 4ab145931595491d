"""A whole recipe: two stages ended by a metric, a controller, a memory, and extra updates."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from trm_fast import train as t
from trm_fast.optim import GrokFastAdamW
from trm_fast.train.distributed import World


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.drop = nn.Linear(6, 16), nn.Linear(16, 3), nn.Dropout(0.1)
        self.register_buffer("memory", torch.zeros(16))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.inner(features))
        return self.head(self.drop(hidden + self.memory)), hidden


class Remember(t.Objective):
    def losses(self, model: nn.Module, batch: Any) -> Any:
        logits, hidden = model(batch[0])
        self.model, self.new = model, hidden.detach().mean(0)
        each = cross_entropy(logits, batch[1], reduction="none")
        yield t.StepResult(each.mean(), {"nats": (each.sum(), len(each))}, {"nats": each.detach()})

    def commit(self, finite: Tensor) -> None:
        self.model.memory.lerp_(self.new, 0.1 * finite)


class Controller(t.Callback):
    lamb = 0.5

    def on_gradients(self, run: t.Run, step: t.Step) -> None:
        for found in run.optimizers[0].statistics():
            self.lamb = 0.9 * self.lamb + 0.1 * float(1 + found.cosine.nan_to_num().mean())
        run.optimizers[0].param_groups[0]["lamb"] = self.lamb

    def on_step(self, run: t.Run, step: t.Step) -> None:
        if run.step % 10 == 0:
            worst = step.samples[0]["nats"].topk(3).indices
            run.extra_update(Remember(), [[part[worst] for part in step.batches[0]]], "replay")

    def metrics(self) -> t.Metrics:
        return {"control/lamb": (self.lamb, 1.0)}

    def state_dict(self) -> dict[str, Any]:
        return {"lamb": self.lamb}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lamb = state["lamb"]


def build(out: Path | None, *callbacks: t.Callback, **config: Any) -> t.Trainer:
    world, generator = World("cpu"), torch.Generator().manual_seed(1)
    features = torch.randn(64, 6, generator=generator)
    targets = (features[:, :3] + features[:, 3:]).argmax(1)
    own = TensorDataset(*(part[world.rank :: world.size] for part in (features, targets)))
    small, large = (DataLoader(own, size, shuffle=True) for size in (4, 8))
    first = t.Stage("small", small, done=t.until("nats", 0.8, "min"))
    second = t.Stage("large", large, done=t.until("nats", 0.5, "min"), settings={"lr": 0.002})
    settings = {"steps": 400, "evaluate_every": 12, "save_every": 7, "log_every": 5, **config}
    torch.manual_seed(0)
    model = Model()
    evaluate = lambda model: {"nats": float(cross_entropy(model(features)[0], targets))}  # noqa: E731
    optimizer = GrokFastAdamW(model.parameters(), lr=0.005, filter="ema", weight_ema=0.9)
    return t.Trainer(
        model, optimizer, t.Curriculum([first, second]), Remember(), t.TrainerConfig(**settings),
        evaluate=evaluate, callbacks=[Controller(), *callbacks], out=out, device=world,
    )  # fmt: skip
