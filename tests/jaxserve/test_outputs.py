"""A generation grows token by token: text, stop strings, log-probabilities, reasons."""

from __future__ import annotations

import pytest

from jaxserve.engine.request import FinishReason, TokenLogprobs
from jaxserve.outputs import CompletionOutput, Generation, Logprob
from jaxserve.sampling.params import SamplingParams
from jaxserve.tokenizer import Tokenizer
from tests.helpers.checkpoints import make_checkpoint

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(make_checkpoint(tmp_path_factory.mktemp("bytes"), tokenizer=True)))


def generation_of(
    tokenizer: Tokenizer | None, prompt: str = "A", **params: object
) -> tuple[Generation, CompletionOutput]:
    ids = [5] if tokenizer is None else tokenizer.encode(prompt)
    generation = Generation(SamplingParams(**params), ids, 0, tokenizer, (EOS,))
    return generation, generation.output


def feed(generation: Generation, tokenizer: Tokenizer, text: str) -> list[str]:
    return [generation.append(token, None) for token in tokenizer.encode(text)]


def test_text_grows_in_whole_characters(tokenizer: Tokenizer) -> None:
    generation, output = generation_of(tokenizer)
    pieces = feed(generation, tokenizer, "a😀")
    assert pieces == ["a", "", "", "", "😀"]
    assert (output.text, output.finished()) == ("a😀", False)
    assert generation.finish(FinishReason.LENGTH) == ""
    assert (output.finish_reason, output.stop_reason) == ("length", None)


def test_the_end_shows_what_is_left_of_a_character(tokenizer: Tokenizer) -> None:
    generation, output = generation_of(tokenizer)
    for token in tokenizer.encode("a😀")[:-1]:
        generation.append(token, None)
    assert output.text == "a"
    assert generation.finish(FinishReason.LENGTH) == "\ufffd"
    assert output.text == "a\ufffd"


def test_a_stop_string_ends_it_and_later_tokens_are_the_callers_to_drop(
    tokenizer: Tokenizer,
) -> None:
    generation, output = generation_of(tokenizer, stop=["xyz"])
    assert feed(generation, tokenizer, "abxyz") == ["a", "b", "", "", ""]
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", "xyz")
    assert generation.finish(FinishReason.ABORT) == ""
    assert output.finish_reason == "stop"


def test_text_held_back_for_a_stop_string_comes_with_the_end(tokenizer: Tokenizer) -> None:
    generation, output = generation_of(tokenizer, stop=["xyz"])
    assert feed(generation, tokenizer, "abxy") == ["a", "b", "", ""]
    assert output.text == "ab"
    assert generation.finish(FinishReason.LENGTH) == "xy"
    assert output.text == "abxy"


def test_the_end_tokens_of_the_model_are_no_stop_reason(tokenizer: Tokenizer) -> None:
    for token, reason in ((EOS, None), (9, 9)):
        generation, output = generation_of(tokenizer)
        generation.append(token, None)
        generation.finish(FinishReason.STOP, stop_reason=token)
        assert (output.finish_reason, output.stop_reason) == ("stop", reason)
        assert output.token_ids == [token]


def test_special_tokens_are_shown_on_request(tokenizer: Tokenizer) -> None:
    for skip, text in ((True, "ab"), (False, "a</s>b")):
        generation, output = generation_of(tokenizer, skip_special_tokens=skip)
        for token in (*tokenizer.encode("a"), EOS, *tokenizer.encode("b")):
            generation.append(token, None)
        assert output.text == text


def test_logprobs_add_up(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(text)[0] for text in "abc")
    generation, output = generation_of(tokenizer, logprobs=2)
    generation.append(a, TokenLogprobs(a, -0.5, 1, ((a, -0.5), (b, -1.5))))
    generation.append(c, TokenLogprobs(c, -3.0, 7, ((a, -0.5), (b, -1.5))))
    assert output.cumulative_logprob == -3.5
    assert output.logprobs == [
        {a: Logprob(-0.5, 1, "a"), b: Logprob(-1.5, 2, "b")},
        {a: Logprob(-0.5, 1, "a"), b: Logprob(-1.5, 2, "b"), c: Logprob(-3.0, 7, "c")},
    ]


def test_without_a_tokenizer_there_are_token_ids_and_nameless_logprobs() -> None:
    generation, output = generation_of(None, logprobs=0)
    assert generation.append(7, TokenLogprobs(7, -1.0, 4, ())) == ""
    generation.finish(FinishReason.ERROR)
    assert (output.text, output.token_ids, output.finish_reason) == ("", [7], "error")
    assert output.logprobs == [{7: Logprob(-1.0, 4, None)}]


def test_logprobs_unasked_for_are_none(tokenizer: Tokenizer) -> None:
    generation, output = generation_of(tokenizer)
    feed(generation, tokenizer, "ab")
    assert output.logprobs is None
    assert output.cumulative_logprob is None
