"""Beam search: against transformers where the rules are the same, and the rules by themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, InvalidRequestError
from jaxserve.beam_search import BeamSearchParams, BeamSearchSequence, beam_search, score
from jaxserve.outputs import CompletionOutput, Logprob, RequestOutput
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.engines import greedy_params, small_llm, tokens_of
from tests.helpers.hf import random_prompts


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with small_llm(directory) as llm:
        yield llm


def reference(directory: Path, prompt: list[int], width: int, num_tokens: int) -> Any:
    """transformers' beams of so many tokens: (tokens, summed log-probability), best first."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=0.0,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    return list(zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True))


@pytest.mark.parametrize("width", [2, 4, 10])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_without_end_tokens_it_finds_the_beams_of_transformers(
    llm: LLM, directory: Path, width: int, length_penalty: float
) -> None:
    """All have the same length then, so that the length penalty changes no order."""
    prompts = random_prompts(3, VOCAB_SIZE, 1, (1, 40))
    params = BeamSearchParams(
        beam_width=width, max_tokens=9, ignore_eos=True, length_penalty=length_penalty
    )
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        want = reference(directory, prompt, width, 9)
        assert [sequence.tokens for sequence in output.sequences] == [ids for ids, _ in want]
        got = [sequence.cum_logprob for sequence in output.sequences]
        np.testing.assert_allclose(got, [score for _, score in want], atol=1e-3)
        assert all(sequence.finish_reason == "length" for sequence in output.sequences)


def test_one_beam_is_greedy(llm: LLM) -> None:
    prompts = random_prompts(3, VOCAB_SIZE, 3, (1, 40))
    params = BeamSearchParams(beam_width=1, max_tokens=9, ignore_eos=True)
    want = tokens_of(llm, prompts, greedy_params(9))
    for prompt, tokens, output in zip(prompts, want, llm.beam_search(prompts, params)):
        (sequence,) = output.sequences
        assert sequence.tokens == prompt + tokens


def test_the_prefix_cache_spares_most_of_the_work(llm: LLM) -> None:
    (prompt,) = random_prompts(1, VOCAB_SIZE, 2, (100, 101))
    before = llm.stats.prompt_tokens - llm.stats.cached_tokens
    llm.beam_search([prompt], BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True))
    computed = llm.stats.prompt_tokens - llm.stats.cached_tokens - before
    assert computed < 100 + 4 * 9 * (8 + 8)  # less than two pages a beam and round


# --- the rules, with a table for a model ----------------------------------------------------------

END = 2


class Table:
    """A model of three tokens whose next token depends on the last one only."""

    def __init__(self, probabilities: dict[int, list[float]]) -> None:
        self.logprobs = {last: np.log(row) for last, row in probabilities.items()}
        self.num_rounds = 0

    def generate(self, prompts: list[dict], params: Any) -> list[RequestOutput]:
        assert (params.max_tokens, params.ignore_eos) == (1, True)
        self.num_rounds += 1
        outputs = []
        for prompt in prompts:
            row = self.logprobs[prompt["prompt_token_ids"][-1]]
            order = np.argsort(-row)[: params.logprobs].tolist()
            entries = {t: Logprob(float(row[t]), rank, None) for rank, t in enumerate(order, 1)}
            completion = CompletionOutput(0, token_ids=[order[0]], logprobs=[entries])
            outputs.append(RequestOutput("0", None, prompt["prompt_token_ids"], [completion]))
        return outputs


MODEL = {0: [0.5, 0.3, 0.2], 1: [0.1, 0.5, 0.4]}


def found(model: Table, max_model_len: int = 99, **settings: Any) -> list[tuple[list[int], Any]]:
    params = BeamSearchParams(**settings)
    (output,) = beam_search([([0], "")], params, model.generate, max_model_len, [END])
    return [(sequence.tokens, sequence.finish_reason) for sequence in output.sequences]


def best_of_all(num_tokens: int, length_penalty: float) -> list[int]:
    """The best sequence of all there are: ended ones, or of full length."""
    logprobs = {last: np.log(row) for last, row in MODEL.items()}
    scores = {}
    for length in range(1, num_tokens + 1):
        for tokens in itertools.product(range(3), repeat=length):
            ended = tokens[-1] == END
            if END in tokens[:-1] or not (ended or length == num_tokens):
                continue
            total = sum(logprobs[a][b] for a, b in itertools.pairwise((0, *tokens)))
            scores[0, *tokens] = total / (1 + length - ended) ** length_penalty
    return list(max(scores, key=scores.__getitem__))


@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0, 2.0])
def test_a_wide_search_finds_the_best_sequence_of_all(length_penalty: float) -> None:
    settings = {"max_tokens": 3, "length_penalty": length_penalty}
    best = found(Table(MODEL), beam_width=10, include_stop_str_in_output=True, **settings)[0]
    assert best[0] == best_of_all(3, length_penalty)
    assert best[1] == ("stop" if best[0][-1] == END else "length")


def test_the_end_token_is_left_out_unless_wanted_and_may_be_ignored() -> None:
    model = Table({0: [0.1, 0.1, 0.8], 2: [0.1, 0.1, 0.8]})
    assert found(model, beam_width=1, max_tokens=1) == [([0], "stop")]
    with_end = found(model, beam_width=1, max_tokens=1, include_stop_str_in_output=True)
    assert with_end == [([0, END], "stop")]
    ignored = found(model, beam_width=1, max_tokens=3, ignore_eos=True)
    assert ignored == [([0, END, END, END], "length")]


def test_a_beam_ends_where_the_model_has_no_room() -> None:
    model = Table({0: [0.9, 0.06, 0.04], 1: [0.9, 0.06, 0.04]})
    sequences = found(model, max_model_len=4, beam_width=2, max_tokens=50)
    assert max(len(tokens) for tokens, _ in sequences) == 4
    assert model.num_rounds == 3


def test_the_score_counts_the_prompt_but_no_end_token() -> None:
    assert score(BeamSearchSequence([5, 6, 7, 8], cum_logprob=-6.0), 1.0, {END}) == -1.5
    assert score(BeamSearchSequence([5, 6, 7, END], cum_logprob=-6.0), 1.0, {END}) == -2.0
    assert score(BeamSearchSequence([5, 6, 7, END], cum_logprob=-6.0), 0.0, {END}) == -6.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("beam_width", value) for value in (0, 11, 1.0, True, None)],
        *[("max_tokens", value) for value in (0, -1, None, "1")],
        *[("length_penalty", value) for value in (float("nan"), 11, -1e30, "1", None)],
        *[("temperature", value) for value in (-1, 2.5, None)],
        *[("ignore_eos", 1), ("include_stop_str_in_output", None)],
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as error:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, name: value})
    assert error.value.param == name


def test_a_prompt_that_cannot_be_served_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.beam_search([[5], []], BeamSearchParams(beam_width=2, max_tokens=2))
    assert not llm._engine.has_unfinished_requests
