"""A whole recipe: two stages ended by a metric, a controller, a memory, and extra updates."""

import torch
from torch.nn import Dropout, Linear, Module, Sequential, Tanh
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from trm_fast import GrokFastAdamW, train
from trm_fast.train.distributed import World


class Memory(Module):
    def forward(self, hidden):
        self.new = hidden.detach().mean(0)
        return hidden + self.kept


class Remember(train.Objective):
    def losses(self, model, batch):
        self.memory, ce = model[2], cross_entropy(model(batch[0]), batch[1], reduction="none")
        yield train.StepResult(ce.mean(), {"nats": (ce.sum(), len(ce))}, {"nats": ce.detach()})

    def commit(self, finite):
        self.memory.kept.lerp_(self.memory.new, 0.1 * finite)


class Controller(train.Callback):
    def on_gradients(self, run, step):
        (found,), (group,) = run.optimizers[0].statistics(), run.optimizers[0].param_groups
        seen = float(found.cosine.nan_to_num().mean())
        self.cosine = 0.9 * getattr(self, "cosine", 0.0) + 0.1 * seen
        group["lamb"] = 0.5 + self.cosine

    def on_step(self, run, step):
        if run.step % 10 == 0:
            worst = step.samples[0]["nats"].topk(3).indices
            run.extra_update(Remember(), [[part[worst] for part in step.batches[0]]], "replay")

    def state_dict(self):
        return {**vars(self)}

    def load_state_dict(self, state):
        vars(self).update(state)


def build(out, *callbacks, **config):
    world, features = World("cpu"), torch.randn(64, 6, generator=torch.manual_seed(0))
    model = Sequential(Linear(6, 16), Tanh(), Memory(), Dropout(0.1), Linear(16, 3))
    model[2].register_buffer("kept", torch.zeros(16))
    data = features, (features[:, :3] + features[:, 3:]).argmax(1)
    own = TensorDataset(*(part[world.rank :: world.size] for part in data))
    small, large = (DataLoader(own, size, shuffle=True) for size in (4, 8))
    one = train.Stage("small", small, done=train.until("nats", 0.8, "min"))
    two = train.Stage("large", large, done=train.until("nats", 0.5, "min"), settings={"lr": 0.002})
    optimizer = GrokFastAdamW(model.parameters(), lr=0.005, filter="ema", weight_ema=0.9)
    return train.Trainer(
        model, optimizer, train.Curriculum([one, two]), Remember(),
        train.TrainerConfig(**config), device=world, out=out, callbacks=[Controller(), *callbacks],
        evaluate=lambda model: {"nats": float(cross_entropy(model(data[0]), data[1]))},
    )  # fmt: skip
