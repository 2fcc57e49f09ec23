"""Chooses an implementation of an op: the first that doesn't raise NotImplementedError."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Implementation = str | Callable[..., Any]
"""The name of an implementation, or a function with the op's arguments."""


@dataclass(frozen=True)
class Kernels:
    """The implementation that a caller wants of each op; None lets ``call`` choose.

    It has a field for every op. Hashable, so that it can be a static argument of a jitted function.
    """

    add_rms_norm: Implementation | None = None
    decode_attention: Implementation | None = None
    decode_layer: Implementation | None = None
    expert_ffn: Implementation | None = None
    fused_linear: Implementation | None = None
    latent_attention: Implementation | None = None
    paged_attention: Implementation | None = None
    rope_kv_write: Implementation | None = None
    route_experts: Implementation | None = None


CHOOSE = Kernels()
"""Leaves every op to ``call``."""


def call(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: Implementation | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls ``implementation``, or the first in the mapping's order that can run the case.

    Args:
        op: the op's name, for messages.
        implementations: name -> function; a function raises NotImplementedError for a case or a
            platform that it can't run.
        implementation: a name to insist on, a function to try before the mapping's, or None.

    Raises:
        ValueError: ``implementation`` is not a name of the mapping.
        ExceptionGroup: nothing could run it; holds every implementation's reason.
    """
    if isinstance(implementation, str):
        if implementation not in implementations:
            known = ", ".join(implementations)
            raise ValueError(f"{op} has no implementation {implementation!r}; it has {known}")
        return implementations[implementation](*args, **kwargs)
    first = () if implementation is None else (implementation,)
    reasons: list[Exception] = []
    for function in (*first, *implementations.values()):
        try:
            return function(*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(reason)
    raise ExceptionGroup(f"no implementation of {op} can run this case", reasons)
