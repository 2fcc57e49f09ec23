"""Text in, text out, with the packaged demo model: stop strings, streams, chats, defaults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jaxserve import LLM, InvalidRequestError, RequestOutput, SamplingParams
from jaxserve.beam_search import BeamSearchParams

PROMPTS = ["Once upon a time", "The little dog", "One day,"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(enforce_eager=True, use_tqdm=False, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def free(llm: LLM) -> list[RequestOutput]:
    """What the model writes if nothing stops it."""
    return llm.generate(PROMPTS, params(), use_tqdm=False)


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 40, "ignore_eos": True} | changes)


def text_of(llm: LLM, prompt: object, **changes: object) -> RequestOutput:
    (output,) = llm.generate(prompt, params(**changes), use_tqdm=False)
    return output


def test_text_and_token_ids_belong_together(llm: LLM, free: list[RequestOutput]) -> None:
    tokenizer = llm.get_tokenizer()
    for prompt, output in zip(PROMPTS, free, strict=True):
        (one,) = output.outputs
        assert (output.prompt, output.finished) == (prompt, True)
        assert output.prompt_token_ids == tokenizer.encode(prompt)
        assert len(one.token_ids) == 40
        assert one.text == tokenizer.decode(one.token_ids, skip_special_tokens=True)
        assert (one.finish_reason, one.stop_reason) == ("length", None)
        assert one.logprobs is None
        assert one.cumulative_logprob is None


def test_prompts_come_in_every_form(llm: LLM, free: list[RequestOutput]) -> None:
    ids = free[0].prompt_token_ids
    forms = [
        PROMPTS[0],
        [PROMPTS[0]],
        ids,
        [ids],
        tuple(ids),
        {"prompt": PROMPTS[0]},
        {"prompt_token_ids": ids},
        [{"prompt": "shown only", "prompt_token_ids": ids}],
    ]
    for form in forms:
        assert text_of(llm, form).outputs[0].text == free[0].outputs[0].text


@pytest.mark.parametrize("where", [3, 10, 31])
@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_where_it_stands_first(
    llm: LLM, free: list[RequestOutput], where: int, size: int, include: bool
) -> None:
    """It may begin and end inside of tokens."""
    whole = free[0].outputs[0].text
    stop = whole[where : where + size]
    at = whole.find(stop)
    output = text_of(llm, PROMPTS[0], stop=["\x00", stop], include_stop_str_in_output=include)
    (one,) = output.outputs
    assert one.text == whole[: at + len(stop) if include else at]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    # The token that completes it is the last.
    ids = one.token_ids
    assert ids == free[0].outputs[0].token_ids[: len(ids)]
    decode = llm.get_tokenizer().decode
    assert stop in decode(ids, skip_special_tokens=True)
    assert stop not in decode(ids[:-1], skip_special_tokens=True)


def test_a_stop_string_frees_what_the_request_held(llm: LLM, free: list[RequestOutput]) -> None:
    llm.generate(PROMPTS * 4, params(stop=free[0].outputs[0].text[5:7]), use_tqdm=False)
    allocator = llm._engine.scheduler.allocator
    assert allocator.num_free == allocator.num_usable
    assert not llm._engine.has_unfinished_requests


def test_a_stop_string_that_never_comes_holds_no_text_back(
    llm: LLM, free: list[RequestOutput]
) -> None:
    """The text ends with the beginning of the stop string."""
    whole = free[0].outputs[0].text
    (one,) = text_of(llm, PROMPTS[0], stop=whole[-3:] + "\x00").outputs
    assert (one.text, one.finish_reason) == (whole, "length")


def test_streamed_pieces_make_the_text(llm: LLM, free: list[RequestOutput]) -> None:
    pieces: dict[str, list[str]] = {}

    def on_text(output: RequestOutput, text: str) -> None:
        pieces.setdefault(output.prompt, []).append(text)
        assert output.outputs[0].text == "".join(pieces[output.prompt])

    outputs = llm.generate(PROMPTS, params(), use_tqdm=False, on_text=on_text)
    for prompt, output in zip(PROMPTS, outputs):
        assert "".join(pieces[prompt]) == output.outputs[0].text
        assert len(pieces[prompt]) > 10


def test_streams_never_show_a_stop_string(llm: LLM, free: list[RequestOutput]) -> None:
    stop = free[0].outputs[0].text[10:17]
    shown: list[str] = []
    llm.generate(
        PROMPTS[0], params(stop=stop), use_tqdm=False, on_text=lambda _, text: shown.append(text)
    )
    text = "".join(shown)
    assert text == free[0].outputs[0].text.partition(stop)[0]


def test_without_detokenizing_there_are_token_ids_only(llm: LLM, free: list[RequestOutput]) -> None:
    (one,) = text_of(llm, PROMPTS[0], detokenize=False).outputs
    assert (one.text, one.token_ids) == ("", free[0].outputs[0].token_ids)


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    (one,) = text_of(llm, PROMPTS[0], logprobs=3, max_tokens=5).outputs
    assert len(one.logprobs) == 5
    total = 0.0
    for token, entries in zip(one.token_ids, one.logprobs, strict=True):
        assert len(entries) == 3  # the chosen one is among them
        assert next(iter(entries)) == token
        assert [entry.rank for entry in entries.values()] == [1, 2, 3]
        for each, entry in entries.items():
            assert entry.decoded_token == llm.get_tokenizer().decode([each])
        total += entries[token].logprob
    assert one.cumulative_logprob == pytest.approx(total)


def test_a_chosen_token_below_the_likeliest_is_listed_after_them(llm: LLM) -> None:
    settings = {"temperature": 2.0, "seed": 3, "logprobs": 1, "max_tokens": 30}
    (one,) = text_of(llm, PROMPTS[0], **settings).outputs
    ranks = [entries[token].rank for token, entries in zip(one.token_ids, one.logprobs)]
    assert max(ranks) > 1
    for rank, token, entries in zip(ranks, one.token_ids, one.logprobs):
        assert list(entries)[-1] == token
        assert len(entries) == (1 if rank == 1 else 2)


def test_bad_words_are_not_written_with_or_without_a_space(
    llm: LLM, free: list[RequestOutput]
) -> None:
    words = free[0].outputs[0].text.split()
    bad = [words[0], f"{words[4]} {words[5]}"]
    (output,) = llm.generate(PROMPTS[0], params(bad_words=bad), use_tqdm=False)
    text = output.outputs[0].text
    assert text != free[0].outputs[0].text
    assert all(word in free[0].outputs[0].text and word not in text for word in bad)
    others = llm.generate(
        PROMPTS, [params(bad_words=bad), params(), params(bad_words=[])], use_tqdm=False
    )
    assert [other.outputs[0].text for other in others] == [
        text,
        *(output.outputs[0].text for output in free[1:]),
    ]


def test_beams_come_with_the_text_of_all_their_tokens(llm: LLM) -> None:
    (output,) = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=5))
    assert len(output.sequences) == 3
    for sequence in output.sequences:
        assert sequence.text == llm.get_tokenizer().decode(sequence.tokens)
        assert sequence.text.startswith(PROMPTS[0])


def test_chat_writes_the_template_and_answers(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    output, again = llm.chat([messages, messages], params(), use_tqdm=False)
    text = llm.get_tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert output.prompt == text
    assert output.prompt_token_ids == llm.get_tokenizer().encode(text, add_special_tokens=False)
    assert output.outputs[0].text == again.outputs[0].text != ""
    (one,) = llm.chat(messages, params(), use_tqdm=False)
    assert one.outputs[0].text == output.outputs[0].text


def test_chat_options_reach_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I"}]
    settings = params(max_tokens=1)
    (output,) = llm.chat(messages, settings, continue_final_message=True)
    assert output.prompt.endswith("Well, I")
    template = "{{ messages[0].content }} {{ name }}{% if add_generation_prompt %}:{% endif %}"
    (output,) = llm.chat(
        messages,
        settings,
        chat_template=template,
        add_generation_prompt=False,
        chat_template_kwargs={"name": "you"},
    )
    assert output.prompt == "Hi you"
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    (output,) = llm.chat(messages[:1], settings, tools=[tool])
    assert "get_weather" in output.prompt


@pytest.mark.parametrize("messages", [[], "Hello"])
def test_chat_wants_messages(llm: LLM, messages: object) -> None:
    with pytest.raises(InvalidRequestError) as error:
        llm.chat(messages)
    assert error.value.param == "messages"


def test_the_models_defaults_are_used(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    llm._checkpoint.generation.update(temperature=0.6, top_k=20)
    try:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=20)
    finally:
        llm._checkpoint.generation.clear()
    (output,) = llm.generate(PROMPTS[0], use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= SamplingParams().max_tokens
