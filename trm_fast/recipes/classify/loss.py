"""The loss of the classifier, cross entropy and a price for depth, and what a step computes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trm_fast.losses import expected_complexity
from trm_fast.recipes.classify.model import TinyRecursiveModel
from trm_fast.train import Objective, StepResult


class TRMLoss(nn.Module):
    """Cross entropy, weighted by class if asked for, plus a penalty for complexity.

        loss = sum_i w_i CE_i / sum_i w_i + complexity_weight * C
        C = complexity(T, n) / complexity(max_depth, n)

    C does not depend on the weights. With ``halt_probs`` it is the mean over the batch of the
    expected complexity, which has a gradient; as nothing else trains the halting head, and the
    penalty falls with every level that is left out, the head learns to halt at once.

    Args:
        complexity_weight: weight of the penalty, >= 0.
        class_weights: weight of each class, >= 0, [classes]; None weighs all alike.

    Raises:
        ValueError: a weight is negative or not finite.

    Example:
        >>> loss = TRMLoss()(model(features, T=3, n=6), targets, model, T=3, n=6)
    """

    class_weights: Tensor | None

    def __init__(
        self,
        complexity_weight: float = 0.01,
        class_weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= complexity_weight < float("inf"):
            raise ValueError(
                f"TRMLoss: complexity_weight must be finite and >= 0; got {complexity_weight!r}"
            )
        self.complexity_weight = complexity_weight
        weights = None
        if class_weights is not None:
            weights = torch.as_tensor(class_weights, dtype=torch.float32)
            if weights.dim() != 1 or not (weights.isfinite() & (weights >= 0)).all():
                raise ValueError(
                    "TRMLoss: class_weights must be numbers >= 0, one for each class; got "
                    f"{weights.tolist()}"
                )
        self.register_buffer("class_weights", weights)

    def check_classes(self, owner: str, classes: int) -> None:
        """Checks that there is a weight for each class, if there are any.

        Raises:
            ValueError: there are more or fewer.
        """
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ValueError(
                f"{owner}: class_weights must be {classes} numbers, one for each class; got "
                f"{len(self.class_weights)}"
            )

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        model: TinyRecursiveModel | None = None,
        T: int | None = None,
        n: int = 6,
        halt_probs: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss.

        Args:
            logits: [batch, classes], floating point.
            targets: [batch], int64, each a class.
            model: the model of the logits; without it or ``T`` there is no penalty.
            T, n: levels and micro-steps with which it was called.
            halt_probs: [batch, T], required for a model with ``halt``: the last of what it returns
                with ``return_state``.

        Returns:
            The loss, 0-d.

        Raises:
            ValueError: ``T`` or ``n`` does not suit the model, or ``halt_probs`` are missing or of
                another shape.
        """
        loss = cross_entropy(logits, targets, self.class_weights)
        if model is None or T is None:
            return loss
        return loss + self.complexity_weight * _share(model, T, n, halt_probs)


def _share(model: TinyRecursiveModel, T: int, n: int, halt_probs: Tensor | None) -> float | Tensor:
    """Returns the (expected) complexity as a share of the largest."""
    largest = model.get_complexity(model.max_depth, n)
    if model.halt_head is None:
        return model.get_complexity(T, n) / largest
    if halt_probs is None or halt_probs.dim() != 2 or halt_probs.shape[1] != T:
        came = None if halt_probs is None else tuple(halt_probs.shape)
        raise ValueError(
            f"TRMLoss: halt_probs must be [batch, {T}] for a model with halt=True; got {came}"
        )
    return expected_complexity(halt_probs, n).mean() / largest


class ClassifyObjective(Objective):
    """The loss of a batch, and sums for the means over samples.

    Args:
        model: the model itself, without wrappers.
        criterion: the loss.
        T, n: levels and micro-steps.
    """

    def __init__(self, model: TinyRecursiveModel, criterion: TRMLoss, T: int, n: int) -> None:
        self.model, self.criterion, self.T, self.n = model, criterion, T, n
        self.backwards = 1
        self.top = min(3, model.output_dim)
        self.dtype = next(model.parameters()).dtype

    def losses(self, model: nn.Module, batch: Any) -> Iterator[StepResult]:
        yield self.result(model, batch)

    def result(self, model: nn.Module, batch: Any) -> StepResult:
        """Returns loss and metrics of a batch."""
        features, targets = batch
        logits, (_, _, halt_probs) = model(features.to(self.dtype), self.T, self.n, True)
        loss = self.criterion(logits, targets, self.model, self.T, self.n, halt_probs)
        found = logits.detach().topk(self.top, 1).indices == targets[:, None]
        count = loss.new_full((), len(targets))
        # The loss of a batch is a mean by class weight, so the batch counts with the sum of these.
        weights = self.criterion.class_weights
        weight = count if weights is None else weights[targets].sum()
        metrics = {
            "sample_loss": (loss.detach() * weight, weight),
            "accuracy": (100.0 * found[:, 0].sum(), count),
            "top3_accuracy": (100.0 * found.sum(), count),
        }
        return StepResult(loss, metrics)
