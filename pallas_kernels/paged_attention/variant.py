"""What few model families add to attention's scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Variant:
    """Changes to the scores of plain attention, in this order.

    Attributes:
        softcap: a score s becomes softcap * tanh(s / softcap).
        alibi_slopes: float32 [heads]; slope * (key's position - query's) is added (Press et al.
            2022, arXiv:2108.12409).
        sinks: [heads], a logit that takes part in the softmax and adds no value.
    """

    alibi_slopes: jax.Array | None = None
    sinks: jax.Array | None = None
    softcap: float | None = field(default=None, metadata={"static": True})


def refuse(variant: Variant | None) -> None:
    """For implementations of plain attention.

    Raises:
        NotImplementedError: there is a variant.
    """
    if variant is not None:
        raise NotImplementedError("this implementation knows no softcap, sinks or ALiBi")
