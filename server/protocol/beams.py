"""The fields that ask for a beam search instead of sampling, shared by all generating routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.beam_search import MAX_BEAM_WIDTH, MAX_LENGTH_PENALTY, BeamSearchParams
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling.params import SamplingParams
from server.protocol.fields import Field, boolean, passed_on, unsupported, wrong

BEAM_FIELDS: dict[str, Field] = {
    "use_beam_search": boolean(
        "Search for the n likeliest completions, best first, with best_of or else n beams, at most "
        f"{MAX_BEAM_WIDTH}. It can't be streamed; fields that change how tokens are chosen are "
        "refused, except temperature and seed, which change nothing."
    ),
    "length_penalty": passed_on(
        "Needs use_beam_search: completions are compared by their log-probability divided by their "
        "length, the prompt's included, to this power.",
        {
            "type": "number",
            "minimum": -MAX_LENGTH_PENALTY,
            "maximum": MAX_LENGTH_PENALTY,
            "default": 1.0,
        },
    ),
    "early_stopping": unsupported("a search goes on until max_tokens", (False,)),
}
MEANINGFUL = frozenset(
    (
        *("ignore_eos", "include_stop_str_in_output", "truncate_prompt_tokens"),
        *("skip_special_tokens", "spaces_between_special_tokens", "temperature", "seed"),
    )
)
"""Sampling fields that a beam search may come with. The log-probabilities are those before
temperature, as vLLM's are; and what is found is reproducible with any seed."""
_NEUTRAL = SamplingParams()
_UNBOUNDED = 2**31 - 1
"""As many tokens as BeamSearchParams takes; the context's end comes before."""


def beam_params(
    values: Mapping[str, Any], given: Mapping[str, Any], width: int, max_tokens: int | None
) -> BeamSearchParams | None:
    """The beam search that a request asks for; None if it asks for none.

    Args:
        values: of all its fields.
        given: those for SamplingParams that it has.
        width: number of beams.
        max_tokens: None means up to the context's end.

    Raises:
        InvalidRequestError: a field has no meaning in a beam search, or a value is out of range.
    """
    penalty = values["length_penalty"]
    if not values["use_beam_search"]:
        if penalty is not None and (isinstance(penalty, bool) or penalty != 1):
            raise wrong("length_penalty", penalty, "must be 1 unless use_beam_search is true")
        return None
    if values["stream"]:
        raise InvalidRequestError("A request with use_beam_search can't be streamed.", "stream")
    if width > MAX_BEAM_WIDTH:
        name = "best_of" if values.get("best_of") else "n"
        raise wrong(name, width, f"must be at most {MAX_BEAM_WIDTH} with use_beam_search")
    _refuse_sampling(given)
    switches = ("ignore_eos", "include_stop_str_in_output")
    return BeamSearchParams(
        beam_width=width,
        max_tokens=_UNBOUNDED if max_tokens is None else max_tokens,
        temperature=given.get("temperature", 0.0),
        length_penalty=1.0 if penalty is None else penalty,
        **{name: given[name] for name in switches if name in given},
    )


def _refuse_sampling(given: Mapping[str, Any]) -> None:
    """Raises for the first field that would choose other tokens than the likeliest."""
    others = {name: value for name, value in given.items() if name not in MEANINGFUL}
    checked = SamplingParams(**{**others, "max_tokens": None})  # as SamplingParams understands them
    for name in others:
        if getattr(checked, name) != getattr(_NEUTRAL, name):
            message = f"{name} has no meaning with use_beam_search; leave one of them out."
            raise InvalidRequestError(message, name)
