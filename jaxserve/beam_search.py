"""Beam search on top of one-token generations: the engine knows nothing of beams.

Each round asks for one more token of every beam, with twice as many log-probabilities as there are
beams, and keeps the best of what they could go on to. The prefix cache holds all but the last page
of each beam, so a round computes few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from jaxserve.outputs import Logprob, RequestOutput
from jaxserve.sampling.checks import check_float, check_int, check_range, error
from jaxserve.sampling.params import MAX_LOGPROBS, SamplingParams

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """The settings of a beam search; names and defaults are vLLM's.

    Attributes:
        beam_width: sequences that are kept, 1 to 10.
        max_tokens: most tokens to generate.
        ignore_eos: go on after the model's end tokens.
        temperature: accepted for compatibility; log-probabilities are taken before temperature.
        length_penalty: sequences are compared by their log-probability divided by their length to
            this power. The length counts the prompt, and no end token.
        include_stop_str_in_output: keep the end token.

    Raises:
        InvalidRequestError: a value is out of its range; names the field and the limit.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, most in (("beam_width", MAX_BEAM_WIDTH), ("max_tokens", 2**31 - 1)):
            check_int(name, getattr(self, name))
            check_range(name, getattr(self, name), 1, most)
        check_range("temperature", check_float("temperature", self.temperature), 0, 2)
        check_float("length_penalty", self.length_penalty)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise error(name, getattr(self, name), "must be True or False")


@dataclass
class BeamSearchSequence:
    """One of the sequences that were found.

    Attributes:
        tokens: prompt and output.
        logprobs: {token id: Logprob} at each output position, as far as they were looked at.
        cum_logprob: sum over the output's tokens.
        text: of all tokens, the prompt's too; None without a tokenizer.
        finish_reason: "stop" at an end token, else "length".
        stop_reason: always None, as for any output that a model's own end token ends.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class BeamSearchOutput:
    """The sequences found for one prompt, best first; at most ``beam_width``."""

    sequences: list[BeamSearchSequence]


@dataclass
class _Search:
    """The search for one prompt: beams that go on, and those that ended."""

    salt: str
    beams: list[BeamSearchSequence]
    completed: list[BeamSearchSequence] = field(default_factory=list)


Generate = Callable[[list[dict], SamplingParams], list[RequestOutput]]
"""From prompts and sampling params to outputs."""


def beam_search(
    prompts: Sequence[tuple[Sequence[int], str]],
    params: BeamSearchParams,
    generate: Generate,
    max_model_len: int,
    eos_token_ids: Collection[int],
) -> list[BeamSearchOutput]:
    """Searches for the likeliest continuations of prompts, given as (token ids, cache salt).

    Args:
        generate: makes one more token of each sequence.
        max_model_len: longest sequence; a beam ends there.
        eos_token_ids: tokens that end a beam.
    """
    ends = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
    searches = [_Search(salt, [BeamSearchSequence(list(ids))]) for ids, salt in prompts]
    # The end tokens are ours to judge: the engine shall take them as any other.
    settings = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=2 * params.beam_width,
        ignore_eos=True,
        detokenize=False,
    )
    for _ in range(params.max_tokens):
        _end_the_longest(searches, max_model_len)
        asked = [
            {"prompt_token_ids": beam.tokens, "cache_salt": search.salt}
            for search in searches
            for beam in search.beams
        ]
        if not asked:
            break
        answers = iter(generate(asked, settings))
        for search in searches:
            _go_on(search, [next(answers) for _ in search.beams], params, ends)
    return [_best(search, params, ends) for search in searches]


def score(
    sequence: BeamSearchSequence, length_penalty: float, eos_token_ids: Collection[int]
) -> float:
    """The log-probability per token, as vLLM has it: the prompt counts, the end token doesn't."""
    length = len(sequence.tokens) - (sequence.tokens[-1] in eos_token_ids)
    return sequence.cum_logprob / max(length, 1) ** length_penalty


def _end_the_longest(searches: Sequence[_Search], max_model_len: int) -> None:
    """Completes beams that the model has no room to go on with, but leaves the prompts, which the
    engine refuses with a message."""
    for search in searches:
        beams, search.beams = search.beams, []
        for beam in beams:
            full = beam.logprobs and len(beam.tokens) >= max_model_len
            (search.completed if full else search.beams).append(beam)


def _go_on(
    search: _Search,
    answers: Sequence[RequestOutput],
    params: BeamSearchParams,
    ends: Collection[int],
) -> None:
    """Replaces the beams of a search by the best of those that are one token longer."""
    longer = []
    for beam, answer in zip(search.beams, answers):
        (logprobs,) = answer.outputs[0].logprobs or [{}]
        for token_id, logprob in logprobs.items():
            next_beam = BeamSearchSequence(
                [*beam.tokens, token_id],
                [*beam.logprobs, logprobs],
                beam.cum_logprob + logprob.logprob,
            )
            if token_id in ends:
                next_beam.finish_reason = "stop"
                search.completed.append(next_beam)
            else:
                longer.append(next_beam)
    longer.sort(key=lambda beam: score(beam, params.length_penalty, ends), reverse=True)
    search.beams = longer[: params.beam_width]


def _best(search: _Search, params: BeamSearchParams, ends: Collection[int]) -> BeamSearchOutput:
    """The best of all sequences of a search."""
    found = search.completed + search.beams
    found.sort(key=lambda beam: score(beam, params.length_penalty, ends), reverse=True)
    sequences = found[: params.beam_width]
    for sequence in sequences:
        if sequence.finish_reason is None:
            sequence.finish_reason = "length"
        elif not params.include_stop_str_in_output:
            del sequence.tokens[-1]
    return BeamSearchOutput(sequences)
