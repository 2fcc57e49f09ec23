"""Chooses an implementation of an op: the first that doesn't raise NotImplementedError."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def call(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls ``implementation``, or the first in the mapping's order that can run the case.

    Args:
        op: the op's name, for messages.
        implementations: name -> function; a function raises NotImplementedError for a case or a
            platform that it can't run.
        implementation: a name to insist on, or None to choose.

    Raises:
        ValueError: ``implementation`` is not a name of the mapping.
        ExceptionGroup: nothing could run it; holds every implementation's reason.
    """
    if implementation is not None:
        if implementation not in implementations:
            known = ", ".join(implementations)
            raise ValueError(f"{op} has no implementation {implementation!r}; it has {known}")
        return implementations[implementation](*args, **kwargs)
    reasons: list[Exception] = []
    for function in implementations.values():
        try:
            return function(*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(reason)
    raise ExceptionGroup(f"no implementation of {op} can run this case", reasons)
