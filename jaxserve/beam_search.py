"""Beam search on top of one-token generations: the engine knows nothing of beams.

Each round asks for one more token of every beam, with twice as many log-probabilities as there are
beams, and keeps the best of what they could go on to. The prefix cache holds all but the last page
of each beam, so a round computes few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from jaxserve.outputs import Logprob, RequestOutput
from jaxserve.sampling.checks import check_float, check_int, check_range, error
from jaxserve.sampling.params import MAX_LOGPROBS, SamplingParams

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2
MAX_LENGTH_PENALTY = 10.0


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """The settings of a beam search; names and defaults are vLLM's.

    Attributes:
        beam_width: sequences that are kept, 1 to 10.
        max_tokens: most tokens to generate.
        ignore_eos: go on after the model's end tokens.
        temperature: accepted for compatibility; log-probabilities are taken before temperature.
        length_penalty: sequences are compared by their log-probability divided by their length to
            this power, -10 to 10. The length counts the prompt, and no end token.
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
        penalty = check_float("length_penalty", self.length_penalty)
        check_range("length_penalty", penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
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


class BeamSearch:
    """The search, free of whoever asks the model.

        while asked := search.asked():
            search.take(...)  # the log-probabilities of what may come next in each of them
        search.outputs()

    Args:
        prompts: token ids of each.
        params: of the search.
        max_model_len: longest sequence; a beam ends there.
        eos_token_ids: tokens that end a beam.
        num_logprobs: keep at least so many log-probabilities at each position.

    Attributes:
        settings: with which the model is to be asked for one more token.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: BeamSearchParams,
        max_model_len: int,
        eos_token_ids: Collection[int],
        num_logprobs: int = 0,
    ) -> None:
        # The end tokens are ours to judge: the engine shall take them as any other.
        self.settings = SamplingParams(
            temperature=0,
            max_tokens=1,
            logprobs=max(2 * params.beam_width, num_logprobs),
            ignore_eos=True,
            detokenize=False,
        )
        self._params = params
        self._max_model_len = max_model_len
        self._ends = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._searches = [_Search([BeamSearchSequence(list(ids))]) for ids in prompts]
        self._rounds = 0

    def asked(self) -> list[tuple[int, list[int]]]:
        """What needs one more token: (index of its prompt, token ids); nothing once all is over."""
        if self._rounds == self._params.max_tokens:
            return []
        searches = enumerate(self._searches)
        return [(index, beam.tokens) for index, search in searches for beam in search.beams]

    def take(self, answers: Sequence[dict[int, Logprob]]) -> None:
        """Goes on by one token.

        Args:
            answers: for each sequence of ``asked()``, in that order, the likeliest next tokens,
                best first; none where the model failed.
        """
        self._rounds += 1
        rest = iter(answers)
        for search in self._searches:
            candidates = [
                self._candidate(beam, logprobs, token_id)
                for beam, logprobs in zip(search.beams, rest)
                for token_id in islice(logprobs, 2 * self._params.beam_width)
            ]
            ended = [one for one in candidates if one.token_id in self._ends]
            longer = [one for one in candidates if one.token_id not in self._ends]
            search.completed += [one.sequence("stop") for one in self._best(ended)]
            search.beams = []
            for candidate in self._best(longer):
                beam = candidate.sequence(None)
                full = len(beam.tokens) >= self._max_model_len
                (search.completed if full else search.beams).append(beam)
            search.completed = self._best_sequences(search.completed)

    def outputs(self) -> list[BeamSearchOutput]:
        """What was found, per prompt."""
        outputs = []
        for search in self._searches:
            found = self._best_sequences(search.completed + search.beams)
            outputs.append(BeamSearchOutput([self._finished(sequence) for sequence in found]))
        return outputs

    def _candidate(
        self, beam: BeamSearchSequence, logprobs: dict[int, Logprob], token_id: int
    ) -> _Candidate:
        total = beam.cum_logprob + logprobs[token_id].logprob
        length = len(beam.tokens) + (token_id not in self._ends)
        return _Candidate(
            _per_length(total, length, self._params.length_penalty), total, beam, token_id, logprobs
        )

    def _best(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """As many as there are beams; equals stay in their order."""
        ordered = sorted(candidates, key=lambda one: one.score, reverse=True)
        return ordered[: self._params.beam_width]

    def _best_sequences(self, sequences: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        penalty = self._params.length_penalty
        ordered = sorted(sequences, key=lambda one: score(one, penalty, self._ends), reverse=True)
        return ordered[: self._params.beam_width]

    def _finished(self, sequence: BeamSearchSequence) -> BeamSearchSequence:
        """A sequence as users see it."""
        if sequence.finish_reason is None:
            return replace(sequence, finish_reason="length")
        if self._params.include_stop_str_in_output:
            return sequence
        return replace(sequence, tokens=sequence.tokens[:-1])


def score(
    sequence: BeamSearchSequence, length_penalty: float, eos_token_ids: Collection[int]
) -> float:
    """The log-probability per token, as vLLM has it: the prompt counts, the end token doesn't."""
    length = len(sequence.tokens) - (sequence.tokens[-1] in eos_token_ids)
    return _per_length(sequence.cum_logprob, length, length_penalty)


def _per_length(total: float, length: int, length_penalty: float) -> float:
    return total / max(length, 1) ** length_penalty


@dataclass
class _Search:
    """The search for one prompt: beams that go on, and the best of those that ended."""

    beams: list[BeamSearchSequence]
    completed: list[BeamSearchSequence] = field(default_factory=list)


class _Candidate(NamedTuple):
    """A beam and a token that may follow. Most are dropped, so no list is copied yet."""

    score: float
    total: float
    beam: BeamSearchSequence
    token_id: int
    logprobs: dict[int, Logprob]

    def sequence(self, finish_reason: str | None) -> BeamSearchSequence:
        """The beam with the token."""
        return BeamSearchSequence(
            [*self.beam.tokens, self.token_id],
            [*self.beam.logprobs, self.logprobs],
            self.total,
            finish_reason=finish_reason,
        )


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
        max_model_len, eos_token_ids: see ``BeamSearch``.
    """
    search = BeamSearch([ids for ids, _ in prompts], params, max_model_len, eos_token_ids)
    while asked := search.asked():
        beams = [{"prompt_token_ids": ids, "cache_salt": prompts[at][1]} for at, ids in asked]
        answers = [output.outputs[0].logprobs for output in generate(beams, search.settings)]
        search.take([logprobs[0] if logprobs else {} for logprobs in answers])
    return search.outputs()
