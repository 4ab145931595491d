"""``WeightEMA``: a running average of a model's weights, beside any optimizer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightEMA:
    """Keeps ``average <- decay * average + (1 - decay) * param`` for the parameters of a model.

    The average starts with the first update, at the weights as they are then; until that it is the
    weights, also those that are loaded later. To start it at the weights before a first step, as
    the averages of optimizers and of a ``Trainer`` do, call ``update`` before that step too.

    All tensors are averaged in one call (``torch._foreach_lerp_``: on a GPU one launch for many).
    Optimizers of this package can fold the same average into their step with ``weight_ema=decay``,
    which reads the weights while they are in registers; ``WeightEMA.of(optimizer, model)`` then
    gives the same handling of what they keep.

    Args:
        model: the model, or named parameters as ``model.named_parameters()`` gives them. Buffers
            are not averaged; a parameter that is frozen or shared is kept once.
        decay: weight of the average per update, in [0, 1]; official TRM: 0.999.
        dtype: of the averages; None means float32 for 16-bit parameters, else their own, because
            ``1 - 0.999`` of a difference is lost in 16 bits.

    Attributes:
        started: whether there was an update, or a state was loaded.

    Raises:
        ValueError: ``decay`` is out of range, or there are no parameters.
        TypeError: ``decay`` is not a number, or ``dtype`` not a floating point type.

    Example:
        >>> ema = trm_fast.WeightEMA(model, decay=0.999)
        >>> optimizer.step()
        >>> ema.update()
        >>> with ema.swapped():  # the model has the averaged weights in here
        ...     evaluate(model)
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        decay: float = 0.999,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.decay = _check_decay(decay)
        if dtype is not None and not getattr(dtype, "is_floating_point", False):
            raise TypeError(f"WeightEMA: dtype must be a floating point type; got {dtype!r}")
        self._named = self._kept = _named(model)
        self._optimizer: torch.optim.Optimizer | None = None
        self._own = {
            name: param.detach().to(_average_dtype(param, dtype), copy=True)
            for name, param in self._params.items()
        }
        self._swapped = False
        self.started = False

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> "WeightEMA":
        """Returns the averages that ``optimizer`` keeps with ``weight_ema``, by name: the same
        tensors, which its step moves on; until its first step they are the weights. Parameters that
        it does not average stand for themselves; those of groups that it is given later are
        averaged from then on.

        Raises:
            ValueError: the optimizer keeps no average of a parameter of the model.
        """
        new = cls.__new__(cls)
        new._named, new._kept, new._own = _named(model), {}, {}
        new._optimizer, new._swapped, new.started = optimizer, False, True
        if not new._params:
            raise ValueError(
                f"WeightEMA.of: {type(optimizer).__name__} must keep averages of the model's "
                "weights; got one without: give it weight_ema=0.999"
            )
        groups = [group for group in optimizer.param_groups if group.get("weight_ema") is not None]
        new.decay = groups[0]["weight_ema"]
        return new

    @property
    def _params(self) -> dict[str, Tensor]:
        """The parameters that are averaged. One stays among them if a loaded state lacks it."""
        if self._optimizer is not None:
            state = self._optimizer.state
            self._kept |= {
                name: param
                for name, param in self._named.items()
                if "weight_ema" in state.get(param, {})
            }
        return self._kept

    @property
    def is_of_optimizer(self) -> bool:
        """Whether the averages belong to an optimizer, whose step moves and whose state dict holds
        them."""
        return self._optimizer is not None

    @property
    def average(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters; those that have not started are set to the
        weights as they are."""
        if self._optimizer is None:
            if not (self.started or self._swapped):
                self._copy_weights()
            return self._own
        # Looked up each time, because loading a state dict replaces them. One of torch's optimizers
        # has none; the average then starts at the next step, at the weights.
        state = self._optimizer.state
        for param in self._waiting():
            with torch.no_grad():
                state[param]["weight_ema"].copy_(param)
        return {
            name: state[param]["weight_ema"] if "weight_ema" in state[param] else param.detach()
            for name, param in self._params.items()
        }

    def _waiting(self) -> list[Tensor]:
        """Returns the parameters that an optimizer has not stepped yet: its first step starts the
        average at the weights, which may have been loaded since it was made."""
        states = [(param, self._optimizer.state[param]) for param in self._params.values()]  # type: ignore[union-attr]
        return [
            param
            for param, state in states
            if "weight_ema" in state and "step" in state and float(state["step"]) == 0
        ]

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for name, param in self._params.items():
            self._own[name].copy_(param)

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Moves the averages towards the weights as they are.

        Args:
            found_inf: as ``GradScaler`` sets it; where it is not zero nothing changes, without a
                host sync. After a skipped step the weights are what they were, but they would be
                averaged once more.

        Raises:
            RuntimeError: the averages are swapped in, or belong to the step of an optimizer.
        """
        if self._swapped:
            raise RuntimeError("WeightEMA: update must run outside swapped(); got a swapped model")
        if self._optimizer is not None:
            raise RuntimeError(
                "WeightEMA: update must be left to the step of the optimizer, which keeps these "
                f"averages; got a call beside {type(self._optimizer).__name__}"
            )
        _check_decay(self.decay)
        averages = list(self.average.values())
        if not self.started:
            self.started = True  # at the weights, which are as they were after a skipped step too
            return
        params = [
            param.detach().to(average.device, average.dtype)
            for param, average in zip(self._params.values(), averages, strict=True)
        ]
        if found_inf is None:
            torch._foreach_lerp_(averages, params, 1.0 - self.decay)
            return
        for average, param in zip(averages, params, strict=True):
            kept = torch.lerp(average, param, 1.0 - self.decay)
            average.copy_(torch.where(found_inf.to(average.device) == 0, kept, average))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Gives the model the averaged weights, and its own back at the end, after an error too.

        Values are exchanged in place, so that optimizers, CUDA graphs and wrappers keep the
        parameters they know. 16-bit parameters get the average rounded; the weights that come back
        are the same to the last bit, and so is the average.

        Raises:
            RuntimeError: the averages are swapped in already.
        """
        if self._swapped:
            raise RuntimeError("WeightEMA: swapped() must not be nested; got a swapped model")
        own = [param.detach().clone() for param in self._params.values()]
        averages = self.average.values()  # before the first update it follows the weights
        self._swapped = True
        try:
            self._write(averages)
            yield
        finally:
            self._write(own)
            self._swapped = False

    def copy_to_model(self) -> None:
        """Overwrites the weights of the model with their averages, for export."""
        self._write(self.average.values())

    @torch.no_grad()
    def _write(self, values: Iterable[Tensor]) -> None:
        for param, value in zip(self._params.values(), values, strict=True):
            param.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Returns decay and averages, by the names of the parameters; the tensors are the live
        ones, as in ``torch.optim``."""
        return {"decay": self.decay, "average": dict(self.average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies decay and averages; their dtypes stay what they are here, and the decay of an
        optimizer's averages is left to its groups.

        Raises:
            ValueError: names or shapes differ from those of the model; nothing is loaded then.
            RuntimeError: the optimizer has not stepped, or has loaded a state dict without averages
                and not stepped since: its next step starts them at the weights.
        """
        loaded, decay = state_dict["average"], _check_decay(state_dict["decay"])
        missing, unknown = self.average.keys() - loaded.keys(), loaded.keys() - self.average.keys()
        if missing or unknown:
            raise ValueError(
                "WeightEMA: state_dict must name the parameters of the model; got missing "
                f"{sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}"
            )
        averages = self.average
        for name, value in loaded.items():
            if value.shape != averages[name].shape:
                raise ValueError(
                    f"WeightEMA: {name} must be {tuple(averages[name].shape)}; got "
                    f"{tuple(value.shape)}"
                )
        waiting = [] if self._optimizer is None else [*map(id, self._waiting())]
        if self._optimizer is None:
            self.decay = decay
        elif len(waiting) == len(self._params) or any(
            "weight_ema" not in self._optimizer.state[p] for p in self._params.values()
        ):
            raise RuntimeError(
                "WeightEMA: load_state_dict needs averages that have started, as the next step of "
                "the optimizer starts them at the weights; got one that has none or has not "
                "stepped: take one step first, or load its own state dict"
            )
        self.started = True
        with torch.no_grad():
            for name, value in loaded.items():
                # The first step of a parameter would start its average anew.
                if id(self._params[name]) not in waiting:
                    averages[name].copy_(value)


def _named(model: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    params = dict(named)
    if not params:
        raise ValueError("WeightEMA: model must have parameters; got none")
    return params


def _average_dtype(param: Tensor, asked: torch.dtype | None) -> torch.dtype:
    if asked is not None:
        return asked
    return torch.float32 if param.dtype in (torch.bfloat16, torch.float16) else param.dtype


def _check_decay(decay: Any) -> float:
    if not isinstance(decay, (int, float)):
        raise TypeError(f"WeightEMA: decay must be a number; got {decay!r}")
    if not 0 <= decay <= 1:
        raise ValueError(f"WeightEMA: decay must be in [0, 1]; got {decay!r}")
    return decay
