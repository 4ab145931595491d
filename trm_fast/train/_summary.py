"""What summary.json says of a run that has ended."""

import dataclasses
from typing import Any

import torch

from trm_fast.train.backends import used
from trm_fast.train.config import Summary


def summary_values(summary: Summary, device: torch.device) -> dict[str, Any]:
    """Returns the summary of a run as plain values, with the backends that its ops have used.

    While a run goes on, its summary.json is an empty object: a run that is killed has said nothing.

    Args:
        summary: how it ended.
        device: of the run.
    """
    values = dataclasses.asdict(summary)
    values["checkpoint"] = None if summary.checkpoint is None else summary.checkpoint.name
    return {**values, "backends": used(device)}
