"""The step of a parameter group: what its options decide, its checked tensors, and the call."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_fast._dispatch import named_backend
from trm_fast.ops import AdaptiveStep, Settings, States, adaptive_step_
from trm_fast.optim._local import add_shards, empty_output, is_plain, like, local
from trm_fast.optim._states import Keys, State, lists_of, parts

END = object()  # makes sequences of different lengths differ


class StepSpec(NamedTuple):
    """What the options of a group decide about its tensors; equal ones can share a plan.

    Args:
        keys: the state behind each argument of the op.
        needed: the states that must exist.
        backend: the implementation that must run, or None.
        plan: the class of its plans.
        matrices: how the parameters are matrices, of groups that orthogonalise.
    """

    keys: Keys
    needed: tuple[str, ...]
    backend: str | None
    plan: "type[Plan]"
    matrices: Any = None


class Options(NamedTuple):
    """What the options of a group say, checked.

    Args:
        settings: the numbers of its step.
        spec: what they decide about its tensors.
        descent: the numbers of a second pass, of groups that orthogonalise.
    """

    settings: Settings
    spec: StepSpec
    descent: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class ReadyStep:
    """The step of a group, checked and ready to be taken."""

    options: Options

    @property
    def settings(self) -> Settings:
        """Those of the pass that reads the gradients."""
        return self.options.settings


@dataclass(frozen=True, slots=True, eq=False)
class GroupStep(ReadyStep):
    """A step by a plan."""

    plan: "Plan"
    grads: list[Tensor]

    def measure(self) -> list[Tensor]:
        """Returns sums as ``FilterSums`` does, over means too if the filter needs them."""
        return self.plan.measure(self.grads, self.settings.reduces)

    def __call__(self) -> None:
        self.plan.step(self.grads, self.options)


@dataclass(frozen=True, slots=True, eq=False)
class CompiledStep(ReadyStep):
    """A step through the dispatcher, where torch.compile sees what it writes."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]

    def measure(self) -> list[Tensor]:
        """Returns sums in which only those of squares are filled in; the op takes its own."""
        if not self.grads:
            return []
        squares = torch.stack(torch._foreach_norm(self.grads, dtype=torch.float32)).double() ** 2
        return [squares[:, None].expand(-1, 3)]

    def __call__(self) -> None:
        self.write(self.options.spec.keys, self.params)

    def write(self, keys: Keys, written: list[Tensor]) -> None:
        """Takes the step with the states of ``keys``, on the parameters or on outputs."""
        for part in parts(keys, self.params, self.states):
            adaptive_step_(
                [written[i] for i in part],
                [self.grads[i] for i in part],
                *lists_of(keys, [self.states[i] for i in part]),
                settings=self.settings,
                backend=self.options.spec.backend,
            )


class Plan:
    """The step of a group with its tensors checked, as long as ``StepCache`` keeps it.

    Args:
        spec: what the options of the group decide.
        params: its parameters that have a gradient.
        grads: the parts of their gradients on this rank, as ``local_grad`` returns them.
        states: the state of each parameter.
        keys: the state behind each argument; None means those of ``spec``.
        outputs: tensors that are written in place of the parameters, by rules with an output.
    """

    compiled: type[CompiledStep] = CompiledStep

    def __init__(
        self,
        spec: StepSpec,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        keys: Keys | None = None,
        outputs: list[Tensor] | None = None,
    ) -> None:
        keys = spec.keys if keys is None else keys
        self.spec = spec
        self.named_backend = named_backend()
        self.params = list(params)
        self.states = states
        self.state_tensors = [*chain.from_iterable(map(dict.values, states)), END]
        self.plain = all(map(is_plain, params))
        self._outputs = outputs
        self._indices = parts(keys, params, states)
        self._steps = [self._make_step(keys, part, grads) for part in self._indices]

    def _make_step(self, keys: Keys, part: list[int], grads: list[Tensor]) -> AdaptiveStep:
        lists = lists_of(keys, [self.states[i] for i in part])
        written = self.params if self._outputs is None else self._outputs
        return AdaptiveStep(
            [local(written[i]) for i in part],
            [grads[i] for i in part],
            States(*[list(map(local, tensors)) for tensors in lists]),
            backend=self.spec.backend,
        )

    def fits(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        """Returns whether parameters and states lie where they lay, and gradients have the dtypes
        that were checked."""
        return all(
            step.fits(self._locals(part, self._outputs or params), self._select(part, grads))
            for part, step in zip(self._indices, self._steps, strict=True)
        )

    def measure(self, grads: list[Tensor], means: bool) -> list[Tensor]:
        """Returns sums over gradients and means, or gradients alone, of whole tensors; the next
        step reads those with means."""
        measured = []
        for part, step in zip(self._indices, self._steps, strict=True):
            has_means = means and bool(step.states["grok_exp_avg"])
            sums = step.measure(self._select(part, grads), has_means)
            if not self.plain:
                add_shards(sums, [self.params[i] for i in part])
            measured.append(sums)
        return measured

    def admit(self, settings: Settings) -> None:
        """Raises if a step with these settings cannot be taken."""
        for step in self._steps:
            step.admit(settings)

    def step(self, grads: list[Tensor], options: Options) -> None:
        """Takes the step."""
        for part, step in zip(self._indices, self._steps, strict=True):
            step(self._select(part, grads), options.settings)

    def _select(self, part: list[int], tensors: list[Tensor]) -> list[Tensor]:
        return tensors if len(self._indices) == 1 else [tensors[i] for i in part]

    def _locals(self, part: list[int], tensors: list[Tensor]) -> list[Tensor]:
        selected = self._select(part, tensors)
        return selected if self.plain else list(map(local, selected))


class FilterPlan(Plan):
    """The filter alone: writes the filtered gradients into tensors of its own."""

    def __init__(
        self, spec: StepSpec, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> None:
        self._filtered = [empty_output(local(param)) for param in params]
        super().__init__(spec, params, grads, states, outputs=self._filtered)

    def results(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the parameters with what the last step wrote, as tensors like them."""
        pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(self.params, self._filtered, strict=True))
        return [(param, like(output, param)) for param, output in pairs]
