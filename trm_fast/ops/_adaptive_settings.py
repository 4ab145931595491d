"""The scalars of an adaptive step, and the names by which a fast form asks for them.

Their meaning is in trm_fast/ops/adaptive_step.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from math import inf
from operator import attrgetter
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trm_fast.ops._adaptive_filters import FILTERS, FilterSettings, Scalar

# The one list of rules.
Rule = Literal["adamw", "adam", "atan2", "sgd", "momentum", "filter"]
RULES: tuple[str, ...] = get_args(Rule)

Mode = tuple[str, str, tuple[str, ...]]


@dataclass(slots=True)
class Settings(FilterSettings):
    """The scalars of one call.

    Args:
        lr: learning rate, >= 0.
        beta1: decay of the first moment, in [0, 1); the momentum of "sgd" and "momentum".
        beta2: decay of the second moment, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        rule: one of ``RULES``.
        maximize: whether gradients are negated.
        weight_ema: decay of the weight average, in [0, 1].
        grad_scale: what the gradients were multiplied by, a tensor of one element, or None.
        found_inf: not zero if the step must be skipped, a tensor of one element, or None.
        clip: factor of the gradients, a tensor of one element, or None.
        dampening: share of the gradient that "sgd" keeps out of its momentum, in [0, 1].
        nesterov: whether "sgd" and "momentum" look ahead.
        and, by keyword, the fields of ``FilterSettings``.

    Raises:
        ValueError: a number is out of range or not finite, or a name is unknown. Tensors are not
            looked into, because the host would have to wait for them.
    """

    lr: Scalar
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: Scalar = 0.0
    rule: str = "adamw"
    maximize: bool = False
    weight_ema: float = 0.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip: Tensor | None = None
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        self._require(self.rule in RULES, "rule", f"one of {', '.join(RULES)}")
        self._check_filter()
        self._check_scalar("lr")
        self._check_scalar("weight_decay")
        for name in ("grad_scale", "found_inf", "clip"):
            self.scale(name, getattr(self, name))
        self._require(0 <= self._number("eps") < inf, "eps", "finite and >= 0")
        for name in ("beta1", "beta2"):
            self._require(0 <= self._number(name) < 1, name, "in [0, 1)")
        for name in ("weight_ema", "dampening"):
            self._require(0 <= self._number(name) <= 1, name, "in [0, 1]")

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if self._kept is not None and name != "_kept":
            object.__setattr__(self, "_kept", None)

    def scale(self, name: str, value: Tensor | None) -> None:
        """Sets "grad_scale", "found_inf" or "clip", checked."""
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{self.owner}: {name} must be a tensor or None; got {value!r}")
        if value is not None or getattr(self, name) is not None:
            setattr(self, name, value)
        if value is not None:
            self._require(value.numel() == 1, name, "a tensor of one element")
            setattr(self, name, value.reshape(()))

    @property
    def mode(self) -> Mode:
        """What a form must know to take the step: the rule, the filter, and the names of the
        options that are not at their defaults."""
        options = _options(self)
        if options == _DEFAULTS:
            return self.rule, self.filter, ()
        changed = zip(OPTIONS, options, _DEFAULTS, strict=True)
        return self.rule, self.filter, tuple(name for name, now, usual in changed if now != usual)

    def arguments(self, device: torch.device, known: "Vocabulary | None" = None) -> tuple[Any, ...]:
        """Returns the scalars for tensors on ``device``, without rule and filter.

        Args:
            device: where the tensors are.
            known: names the numbers that are wanted; None wants all ``NUMBERS``.

        Returns:
            A list of the numbers, in the order of their names, and six tensors or None: lr,
            weight_decay and lamb, where the host must not know them, grad_scale, found_inf, clip.
        """
        kept = self._kept
        if kept is not None and kept[0] is known:
            return kept[1]  # type: ignore[no-any-return]
        scales = (self.grad_scale, self.found_inf, self.clip)
        at = [None if scale is None else scale.to(device, torch.float32) for scale in scales]
        scaled = at[0] is not None or at[1] is not None or at[2] is not None
        lr, weight_decay, lamb = self.lr, self.weight_decay, self.lamb
        has_tensor = (
            isinstance(lr, Tensor) or isinstance(weight_decay, Tensor) or isinstance(lamb, Tensor)
        )
        if known is None or has_tensor:
            numbers, scalars_at = self._divided(device, NUMBERS if known is None else known.numbers)
            return (numbers, *scalars_at, *at)
        arguments = (list(known.read(self)), None, None, None, *at)
        if not scaled:
            self._kept = (known, arguments)
        return arguments

    def _divided(
        self, device: torch.device, names: Sequence[str]
    ) -> tuple[list[float], list[Tensor | None]]:
        """Returns the numbers of these names, and tensors for lr, weight_decay and lamb where the
        host must not know them."""
        pairs = {name: _split(getattr(self, name), device) for name in _TENSORS[:3]}
        numbers = [float(pairs[n][0] if n in pairs else getattr(self, n)) for n in names]
        return numbers, [tensor for _, tensor in pairs.values()]

    @classmethod
    def from_arguments(
        cls, rule: str, filter: str, numbers: Sequence[float], *tensors: Tensor | None
    ) -> "Settings":
        """Reverses ``arguments``."""
        if len(numbers) != len(NUMBERS):
            raise ValueError(
                f"adaptive_step_: numbers must be {', '.join(NUMBERS)}; got {len(numbers)} numbers"
            )
        pairs = zip(NUMBERS, numbers, strict=True)
        values: dict[str, Any] = {name: _KINDS[name](number) for name, number in pairs}
        values |= {name: t for name, t in zip(_TENSORS, tensors, strict=True) if t is not None}
        return cls(rule=rule, filter=filter, **values)


# Scalars that may be tensors, in the order of the schema.
_TENSORS = ("lr", "weight_decay", "lamb", "grad_scale", "found_inf", "clip")
_NO_NUMBERS = ("rule", "filter", "owner", "grad_scale", "found_inf", "clip", "_kept")
_FIELDS = [f for f in fields(Settings) if f.name not in _NO_NUMBERS]
NUMBERS = tuple(f.name for f in _FIELDS)
_KINDS = {f.name: float if f.default is MISSING else type(f.default) for f in _FIELDS}
# Numbers that belong to some rules or filters only, so that a form may lack them.
_EVERYWHERE = (
    "lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "weight_ema",
    "alpha", "lamb", "after_step",
)  # fmt: skip
OPTIONS = tuple(name for name in NUMBERS if name not in _EVERYWHERE)
_DEFAULTS = tuple(f.default for f in _FIELDS if f.name in OPTIONS)
_options = attrgetter(*OPTIONS)

# The scalars of the op that the dispatcher sees, in the order of ``Settings.arguments``.
_AT = "Tensor? lr_at, Tensor? weight_decay_at, Tensor? lamb_at, "
_SCALES = "Tensor? grad_scale, Tensor? found_inf, Tensor? clip"
SCHEMA = f"str rule, str filter, float[] numbers, {_AT}{_SCALES}"
# Those of the native op: its numbers are those that the library names.
NATIVE_SCHEMA = f"int rule, int filter, float[] numbers, {_AT}{_SCALES}"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a fast form knows, as it says itself.

    Args:
        rules, filters: name to the number by which the form calls it.
        numbers: names of the numbers that it reads, in its order.
    """

    rules: Mapping[str, int]
    filters: Mapping[str, int]
    numbers: tuple[str, ...]
    read: Callable[[Settings], tuple[float, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "read", attrgetter(*self.numbers))

    @classmethod
    def parse(cls, text: str) -> "Vocabulary":
        """Reads what a native library says: rules, filters and numbers, such as
        "adamw=0 sgd=1;none=0;lr beta1"."""
        rules, filters, numbers = (part.split() for part in text.split(";"))
        return cls(_numbered(rules), _numbered(filters), tuple(numbers))

    def lacks(self) -> tuple[str, ...]:
        """Returns what the page has and the form has not, as "filter 'x'"."""
        kinds = (
            ("rule", RULES, self.rules),
            ("filter", FILTERS, self.filters),
            ("option", NUMBERS, self.numbers),
        )
        return tuple(
            f"{kind} {name!r}" for kind, page, known in kinds for name in page if name not in known
        )

    def refuses(self, mode: Mode) -> str | None:
        """Returns what of a mode the form does not know, or None."""
        rule, filter, options = mode
        if rule not in self.rules:
            return f"rule {rule!r}"
        if filter not in self.filters:
            return f"filter {filter!r}"
        return next((f"option {name!r}" for name in options if name not in self.numbers), None)


def _numbered(entries: Sequence[str]) -> dict[str, int]:
    pairs = (entry.split("=") for entry in entries)
    return {name: int(number) for name, number in pairs}


def _split(value: Scalar, device: torch.device) -> tuple[float, Tensor | None]:
    """Returns a number, or a tensor for the device to read, because the host must not wait."""
    if torch.compiler.is_compiling():
        # A number would be burnt into the graph, and each new learning rate would compile again.
        if not isinstance(value, Tensor):
            return 0.0, torch.full((), value, dtype=torch.float32, device=device)
    elif not isinstance(value, Tensor):
        return value, None
    elif value.device.type == "cpu":
        return float(value), None
    return 0.0, value.to(device, torch.float32)
