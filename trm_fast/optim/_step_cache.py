"""The steps that an optimizer keeps from one call to the next."""

from collections.abc import Callable, Collection, MutableMapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from trm_fast._dispatch import named_backend
from trm_fast.optim._local import local_grad
from trm_fast.optim._plan import END, GroupStep, Options, Plan, StepSpec
from trm_fast.optim._states import Group, State, StateKeeper


class StepCache:
    """Checked options and checked tensors of each parameter group.

    A plan is used again only while all of this holds, and is made anew otherwise:

    1. **Options**: they decide the same about the tensors (``StepSpec``): filter, average,
       momentum, backend, shapes of matrices. They are read again if one was set in the group, or
       may have changed in place, as a tensor or a list can. Other numbers need no other plan.
    2. **Backend**: ``use_backend`` names the same one, or none as before.
    3. **Parameters**: those with a gradient are the same objects in the same order.
    4. **Gradients**: they are dense and have the same dtypes. Their addresses may change.
    5. **States**: ``optimizer.state`` holds the same dictionaries, and these the same tensors in
       the same order.
    6. **Memory**: what is written, which is the parameters but for a filter alone, has the same
       addresses, sizes and strides, and states have the same addresses. State memory is only
       ever swapped as a whole, so watching one list is enough.

    Nothing is kept while torch.compile traces a step, nor by a copy of an optimizer.

    Args:
        keeper: makes the states that a new plan needs.
        owner: name of the optimizer in errors.
    """

    def __init__(self, keeper: StateKeeper, owner: str) -> None:
        self._keeper = keeper
        self._owner = owner
        self._options: dict[int, tuple[tuple[Any, ...], Options]] = {}
        self._plans: dict[int, Plan] = {}
        self._dictionaries: list[State] = []

    def forget_replaced_states(self, states: Collection[State]) -> None:
        """Drops all plans if a dictionary of states is another object than at the last step."""
        known = self._dictionaries
        if len(states) != len(known) or not all(map(is_, states, known)):
            self._plans.clear()
            self._dictionaries = list(states)

    def options(self, index: int, group: Group, check: Callable[[Group], Options]) -> Options:
        """Returns what the options of a group say; ``check`` reads them only if they may differ
        from those of the last step."""
        values, found = self._options.get(index, ((), None))
        unchanged = len(values) == len(group) and all(map(is_, values, group.values()))
        if found is None or not unchanged:
            found = check(group)
            if not any(_may_change(value) for name, value in group.items() if name not in _LISTS):
                self._options[index] = tuple(group.values()), found
        return found

    def step(
        self,
        index: int,
        window: int,
        options: Options,
        params: list[Tensor],
        grads: list[Tensor],
        states: MutableMapping[Tensor, State],
    ) -> GroupStep:
        """Returns the step of a group, by the plan that was kept or by a new one.

        Raises:
            RuntimeError: a gradient is sparse, or a CUDA graph is captured without all states.
            ValueError, TypeError, BackendError: the tensors cannot be stepped.
        """
        plan = self._plans.get(index)
        if plan is None or not plan.plain:
            grads = list(map(local_grad, grads, params))
        if plan is None or not _holds(plan, options.spec, params, grads):
            grads = list(map(local_grad, grads, params))
            for param, grad in zip(params, grads, strict=True):
                check_grad(self._owner, param, grad)
            spec = options.spec
            found = [self._keeper.complete(states, p, spec.needed, window) for p in params]
            plan = self._plans[index] = spec.plan(spec, params, grads, found)
        plan.admit(options.settings)
        return GroupStep(options, plan, grads)


_LISTS = ("params", "param_names")
_layout, _STRIDED = attrgetter("layout"), {torch.strided}


def _may_change(option: Any) -> bool:
    """Returns whether the value of an option may change without a new object in the group."""
    inner = option if isinstance(option, tuple) else ()
    return isinstance(option, (Tensor, list)) or any(map(_may_change, inner))


def _holds(plan: Plan, spec: StepSpec, params: list[Tensor], grads: list[Tensor]) -> bool:
    """Returns whether a plan may be used again: criteria 1 to 6 of ``StepCache`` but for the
    dictionaries, which are compared once for all groups."""
    tensors = chain(chain.from_iterable(map(dict.values, plan.states)), (END,))
    return (
        spec == plan.spec
        and named_backend() == plan.named_backend
        and len(params) == len(plan.params)
        and all(map(is_, params, plan.params))
        and {*map(_layout, grads)} == _STRIDED
        and all(map(is_, tensors, plan.state_tensors))
        and plan.fits(params, grads)
    )


def check_grad(owner: str, param: Tensor, grad: Tensor) -> None:
    """Raises for a sparse gradient."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{owner} does not support sparse gradients; got {grad.layout} for a parameter of "
            f"shape {tuple(param.shape)}: use torch.optim.SparseAdam or nn.Embedding(sparse=False)"
        )
