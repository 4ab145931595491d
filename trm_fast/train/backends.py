"""Which implementation of each op a run has used, as plain values for its report."""

from typing import Any

import torch

from trm_fast._dispatch import OPS, Op, fallbacks


def used(device: str | torch.device = "cpu") -> dict[str, dict[str, Any]]:
    """Returns what ran in this process so far, and what would run.

    Args:
        device: of the run; of its type is ``chosen``.

    Returns:
        For each op

        - ``chosen``: the backend that runs a float32 call on this type of device, or None;
        - ``calls``: device type and dtypes, such as "cpu float32", to the backends that ran calls
          with them, joined by ", "; empty if the op was not called;
        - ``fallbacks``: such a call and what ran instead, to the reasons why a faster backend did
          not.
    """
    import trm_fast.ops  # noqa: F401 (registers every op)

    kind = torch.device(device).type
    return {name: _used(op, kind) for name, op in sorted(OPS.items())}


def _used(op: Op, device_type: str) -> dict[str, Any]:
    calls: dict[str, set[str]] = {}
    for (kind, dtypes, *_), choice in (op.earlier | op.choices).items():
        calls.setdefault(f"{kind} {_names(dtypes)}", set()).add(choice.backend)
    return {
        "chosen": _chosen(op, device_type),
        "calls": {call: ", ".join(sorted(found)) for call, found in sorted(calls.items())},
        "fallbacks": fallbacks(op),
    }


def _chosen(op: Op, device_type: str) -> str | None:
    dtypes = frozenset({torch.float32})
    order = op.order.get(device_type, ("reference",))
    return next((b for b in order if op.reason(b, device_type, dtypes) is None), None)


def _names(dtypes: Any) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
