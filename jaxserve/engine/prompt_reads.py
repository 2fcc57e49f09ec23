"""What single requests want of the hidden states of their prompts: log-probabilities, embeddings.

A step in which somebody does runs in the largest bucket, with a forward pass that also gives the
hidden states of all its tokens. ``score`` then takes the head to some of them at a time, so that
their logits need no more memory than those of a step, and ``pool`` adds them up per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.decision import Decision
from jaxserve.engine.request import PromptRead, Request, TokenLogprobs
from jaxserve.model import decoder
from jaxserve.model.config import ModelConfig
from jaxserve.model.params import Params
from jaxserve.sampling.sample import Sampled, with_logprobs

MIN_PIECE = 64


def piece_size(lanes: int) -> int:
    """Tokens that one call of ``score`` takes, where steps have so many lanes at most."""
    return max(lanes, MIN_PIECE)


@dataclass(frozen=True)
class ReadPlan:
    """What the requests of one step want.

    Attributes:
        scored: (request, first position, number of positions) of those that want logprobs; their
            tokens stand in ``pieces`` one behind the other.
        pieces: each int32 [2, n], places in the step and the tokens that follow them.
        pooled: (request, first position, lane) of those that want an embedding.
        spans: int32 [2, lanes], first place and number of the tokens that each lane adds up; none
            if nobody does.
    """

    scored: Sequence[tuple[Request, int, int]]
    pieces: Sequence[np.ndarray]
    pooled: Sequence[tuple[Request, int, int]]
    spans: np.ndarray | None


@dataclass(frozen=True)
class Reads:
    """A plan, and what will come of it: of ``score`` for each piece, and of ``pool``."""

    plan: ReadPlan
    scores: Sequence[Sampled]
    sums: jax.Array | None


def make_plan(decision: Decision, asking: np.ndarray, num_lanes: int) -> ReadPlan | None:
    """What a step's requests want; None if nothing.

    Args:
        decision: the step.
        asking: lanes whose requests may want something.
        num_lanes: of the largest bucket.
    """
    if not asking.size:
        return None
    first_place = decision.num_scheduled_tokens.cumsum() - decision.num_scheduled_tokens
    scored, pooled, columns = [], [], [np.empty((2, 0), np.int32)]
    spans = np.zeros((2, num_lanes), np.int32)
    for lane in asking.tolist():
        request, start = decision.requests[lane], int(decision.start[lane])
        if not request.reads_prompt:
            continue
        place, end = int(first_place[lane]), start + int(decision.num_scheduled_tokens[lane])
        if request.pooling is not None:
            begin = end - 1 if request.pooling == "last" else start
            if request.pooling == "mean" or end == request.num_prompt_tokens:
                pooled.append((request, start, lane))
                spans[:, lane] = place + begin - start, end - begin
            continue
        count = min(end, request.num_prompt_tokens - 1) - start
        if count > 0:
            scored.append((request, start, count))
            following = request.token_ids[start + 1 : start + 1 + count]
            columns.append(np.array([np.arange(place, place + count), following], np.int32))
    if not scored and not pooled:
        return None
    pieces = _pieces(np.concatenate(columns, axis=1), piece_size(num_lanes))
    return ReadPlan(scored, pieces, pooled, spans if pooled else None)


def _pieces(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    """Columns of an array [2, n] in pieces of one size, the last filled up with zeros."""
    padded = np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % size)))
    return np.split(padded, padded.shape[1] // size, axis=1) if padded.size else []


def gather(reads: Reads) -> list[tuple[Request, PromptRead]]:
    """Waits for what was read, and gives it to whom it belongs."""
    found = []
    if reads.plan.scored:
        tokens = np.concatenate([piece[1] for piece in reads.plan.pieces]).tolist()
        logprobs, top_tokens, rank = (
            np.concatenate([np.asarray(getattr(score, name)) for score in reads.scores])
            for name in ("logprobs", "top_tokens", "rank")
        )
        at = 0
        for request, start, count in reads.plan.scored:
            wanted, entries = request.params.prompt_logprobs, []
            for index in range(at, at + count):
                values = logprobs[index].tolist()
                top = zip(top_tokens[index, :wanted].tolist(), values[1:])
                entries.append(
                    TokenLogprobs(tokens[index], values[0], int(rank[index]), tuple(top))
                )
            found.append((request, PromptRead(start, entries)))
            at += count
    if reads.sums is not None:
        sums = np.asarray(reads.sums)
        found += [
            (request, PromptRead(start, pooled=sums[lane].copy()))
            for request, start, lane in reads.plan.pooled
        ]
    return found


# --- on the device ------------------------------------------------------------------------------


def score(config: ModelConfig, params: Params, hidden: jax.Array, piece: jax.Array) -> Sampled:
    """Log-probabilities of the tokens of a piece int32 [2, n], from hidden states [T, width]."""
    return with_logprobs(decoder.logits(config, params, hidden[piece[0]]), piece[1])


def pool(hidden: jax.Array, spans: jax.Array) -> jax.Array:
    """Sums float32 [L, width] of the hidden states [T, width] of spans int32 [2, L]."""
    place = jnp.arange(hidden.shape[0])
    first, count = spans[0][:, None], spans[1][:, None]
    inside = (place >= first) & (place < first + count)
    # Places without a token may hold anything, and 0 times NaN is NaN.
    used = jnp.where(inside.any(0)[:, None], hidden, 0).astype(jnp.float32)
    return jnp.dot(inside.astype(jnp.float32), used, precision=jax.lax.Precision.HIGHEST)
