"""Data of the classifier: loaders of the synthetic task, and batches that are checked."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from trm_fast.data.synthetic.vectors import (
    SyntheticRecursiveDataset as SyntheticRecursiveDataset,  # a public name of the system
)

Loader = DataLoader[tuple[Tensor, Tensor]]

# Far from the seeds that people choose, so that no two runs share samples.
_VALIDATION = 1_000_000


class TRMDataModule:
    """Loaders of a training and a validation set of ``SyntheticRecursiveDataset``.

    Both are of one task, with other samples.

    Args:
        num_train: training samples, >= 1.
        num_val: validation samples, >= 1.
        batch_size: samples in a batch, >= 1; the last batch may have fewer.
        input_dim: size of the feature vectors, >= 1.
        num_classes: number of classes, >= 1.
        seed: seed of the samples.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> data = TRMDataModule(num_train=800, num_val=200, batch_size=32)
        >>> features, targets = next(iter(data.train_dataloader()))
    """

    def __init__(
        self,
        num_train: int = 800,
        num_val: int = 200,
        batch_size: int = 32,
        input_dim: int = 128,
        num_classes: int = 10,
        seed: int = 1,
    ) -> None:
        counts = {"num_train": num_train, "num_val": num_val, "batch_size": batch_size}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"TRMDataModule: {name} must be a whole number >= 1; got {value!r}"
                )
        sizes = {"input_dim": input_dim, "num_classes": num_classes}
        self.batch_size = batch_size
        self.train = SyntheticRecursiveDataset(num_train, seed=seed, **sizes)
        self.val = SyntheticRecursiveDataset(num_val, seed=seed + _VALIDATION, **sizes)

    def train_dataloader(self) -> Loader:
        """Returns the training batches, in an order drawn from torch's global generator."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Loader:
        """Returns the validation batches, always in the same order."""
        return DataLoader(self.val, self.batch_size)


class CheckedLoader:
    """The batches of a loader as ``checked_batches`` gives them.

    Args:
        loader: gives (features, targets, ...), and has a length.
        classes: targets are from 0 to this, exclusive.

    Raises:
        TypeError: ``loader`` has no length.
        ValueError: it gives no batch, or, while iterating, a sample cannot be used.
    """

    def __init__(self, loader: Any, classes: int) -> None:
        self.loader, self.classes = loader, classes
        if not hasattr(loader, "__len__"):
            raise TypeError(
                "TRMTrainer: train_loader must have a length, as a DataLoader of a data set; got "
                f"{type(loader).__name__}"
            )
        if not len(loader):
            raise ValueError("TRMTrainer: train_loader must give at least one batch; got none")

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return checked_batches(self.loader, self.classes)


def checked_batches(loader: Any, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields features and targets of each batch; what else is in it is left out.

    Batches that lie on a GPU are not looked at, as the host would have to wait for that.

    Args:
        loader: gives (features, targets, ...).
        classes: targets are from 0 to this, exclusive.

    Raises:
        TypeError: a batch is something else, or of other dtypes.
        ValueError: a feature is not finite, or a target not a class; the message names the sample.
    """
    for position, batch in enumerate(loader):
        features, targets = _pair(batch)
        if features.device.type == "cpu":
            finite = features.isfinite()
            if not finite.all():
                row = int((~finite.flatten(1).all(1)).nonzero()[0])
                came = features[row].flatten()[~finite[row].flatten()][0].item()
                where = _name(loader, position, row)
                raise ValueError(f"TRMTrainer: features must be finite; got {came} in {where}")
        if targets.device.type == "cpu":
            wrong = ((targets < 0) | (targets >= classes)).nonzero()
            if len(wrong):
                row = int(wrong[0])
                raise ValueError(
                    f"TRMTrainer: targets must be from 0 to {classes - 1}; got "
                    f"{targets[row].item()} in sample {row} of batch {position}"
                )
        yield features, targets


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    pair = batch[:2] if isinstance(batch, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        kinds = ", ".join(type(part).__name__ for part in pair) or type(batch).__name__
        raise TypeError(
            f"TRMTrainer: a batch must start with two tensors, features and targets; got {kinds}"
        )
    features, targets = pair
    if not features.is_floating_point() or targets.is_floating_point() or targets.dim() != 1:
        raise TypeError(
            "TRMTrainer: features must be floating point and targets [batch] whole numbers; got "
            f"{features.dtype} and {targets.dtype} {tuple(targets.shape)}"
        )
    return features, targets.long()


def _name(loader: Any, position: int, row: int) -> str:
    """Names a sample by its place in the data set, if there is one to look into."""
    data: Any = getattr(loader, "dataset", None)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        for index in range(len(data)):
            if not data[index][0].isfinite().all():
                return f"sample {index} of the data set"
    return f"sample {row} of batch {position}"
