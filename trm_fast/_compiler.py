"""What the package tells torch.compile."""

from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result", bound=Callable[..., Any])


def constant_result(function: Result) -> Result:
    """Marks a function whose result the compiler takes as a constant.

    ``torch.compiler.assume_constant_result`` sets this mark too, but first imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
