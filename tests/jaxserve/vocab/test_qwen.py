"""Qwen 1's tokenizer against its published algorithm, written out plainly."""

from __future__ import annotations

import copy
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import CheckpointError, InvalidRequestError
from jaxserve.tokenizer import Tokenizer
from jaxserve.vocab.byte_bpe import read_ranks
from tests.helpers.byte_ranks import CORPUS, RANKS
from tests.helpers.conversations import conversation
from tests.helpers.qwen_vocab import END, TURN, TURN_END, plain, published_context, write


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(write(tmp_path_factory.mktemp("qwen"), chat_format="chatml")))


LETTERS = [*"aA \n\t\r's\u017fhК1①-—’", "ha", "你", "  ", "\r\n", "'LL"]
texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from(LETTERS)).map("".join),
    st.lists(st.sampled_from(CORPUS.split(" "))).map(" ".join),
)


@given(text=texts)
@settings(max_examples=400)
def test_the_tokens_of_any_text_are_those_of_the_published_algorithm(
    chat_tokenizer: Tokenizer, text: str
) -> None:
    ids = chat_tokenizer.encode(text)
    assert ids == plain(text)
    assert chat_tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(data=st.lists(st.integers(0, 255), max_size=40).map(bytes))
@settings(max_examples=200)
def test_tokens_of_any_bytes_decode_to_their_text(chat_tokenizer: Tokenizer, data: bytes) -> None:
    ids = [RANKS[bytes([byte])] for byte in data]
    assert chat_tokenizer.decode(ids) == data.decode("utf-8", errors="replace")
    stream = chat_tokenizer.stream([])
    assert "".join(map(stream.feed, ids)) + stream.flush() == data.decode("utf-8", errors="replace")


def test_a_prompt_may_name_special_tokens(chat_tokenizer: Tokenizer) -> None:
    """As in the published tokenizer, whose encode allows all of them."""
    ids = chat_tokenizer.encode("<|im_start|>user\nhi<|im_end|><|endoftext|><|extra_204|>")
    assert ids == [TURN, *plain("user\nhi"), TURN_END, END, END + 207]
    assert chat_tokenizer.decode(ids) == "user\nhi"
    assert len(chat_tokenizer) == len(RANKS) + 208


# --- Conversations --------------------------------------------------------------------------------


contents = st.one_of(texts, st.sampled_from(["\n\nhi", "<|im_end|>\n<|im_start|>system", "", " "]))


@given(
    history=st.lists(st.tuples(contents, contents), max_size=4),
    query=contents,
    system=st.none() | contents,
    window=st.integers(1, 120),
)
@settings(max_examples=200)
def test_a_conversation_has_the_tokens_of_the_published_code(
    tmp_path_factory: pytest.TempPathFactory,
    chat_tokenizer: Tokenizer,
    history: list[tuple[str, str]],
    query: str,
    system: str | None,
    window: int,
) -> None:
    messages = conversation(history, query, system)
    before = copy.deepcopy(messages)
    chat_tokenizer.hf._window = window
    text, ids = chat_tokenizer.chat(messages, add_generation_prompt=True)
    assert messages == before
    want = "You are a helpful assistant." if system is None else system
    assert ids == published_context(query, history, want, window)
    assert text == chat_tokenizer.decode(ids, skip_special_tokens=False)


def test_the_window_is_that_of_generation_config(tmp_path: Path) -> None:
    chat = {"chat_format": "chatml"}
    assert Tokenizer(str(write(tmp_path / "a", **chat))).hf._window == 6144
    assert Tokenizer(str(write(tmp_path / "b", **chat, max_window_size=24000))).hf._window == 24000


def test_a_last_message_can_be_continued(chat_tokenizer: Tokenizer) -> None:
    chat_tokenizer.hf._window = 6144
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "It is"}]
    whole = chat_tokenizer.chat(messages)[1]
    begun = chat_tokenizer.chat(messages, continue_final_message=True)[1]
    assert whole == [*begun, TURN_END]
    assert begun[-len(plain("It is")) :] == plain("It is")


def test_the_template_gives_the_same_text(chat_tokenizer: Tokenizer) -> None:
    chat_tokenizer.hf._window = 6144
    for first in ([], [{"role": "system", "content": "Be brief."}]):
        messages = [*first, {"role": "user", "content": "你好"}]
        messages += [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "2"}]
        text, _ = chat_tokenizer.chat(messages, add_generation_prompt=True)
        assert text == chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_another_template_replaces_the_format(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    template, messages = "{{ messages[0].content }}!", [{"role": "user", "content": "hi"}]
    assert chat_tokenizer.chat(messages, chat_template=template) == ("hi!", plain("hi!"))
    replaced = Tokenizer(str(write(tmp_path, chat_format="chatml")), chat_template=template)
    assert replaced.chat(messages) == ("hi!", plain("hi!"))


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([{"role": "tool", "content": "x"}], "roles user and assistant"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "first message"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "must be a string"),
        ([{"role": "user"}], "must be a string"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "tool_calls is not supported"),
        ([{"role": "system", "content": "x"}], "none of a user"),
    ],
)
def test_messages_that_the_format_lacks_are_refused(
    chat_tokenizer: Tokenizer, messages: list[dict[str, Any]], word: str
) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        chat_tokenizer.chat(messages)


def test_options_that_the_format_lacks_are_refused(chat_tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequestError, match="tools: this model's conversations have no such"):
        chat_tokenizer.chat(messages, tools=[{"type": "function"}])
    assert chat_tokenizer.chat(messages, tools=None) == chat_tokenizer.chat(messages)


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(write(tmp_path, chat_format="raw")))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


# --- Files ----------------------------------------------------------------------------------------


def test_code_of_the_checkpoint_is_named_and_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenization_qwen.py").write_text("raise SystemExit('code was run')")
    with caplog.at_level("INFO", "jaxserve"):
        Tokenizer(str(write(tmp_path)))
        Tokenizer(str(tmp_path))
    assert caplog.text.count("names Python code of its own for its tokenizer") == 1


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("YQ== 0\n?? 1", "line 2 is no token"),
        ("YQ== x", "line 1 is no token"),
        ("YQ==", "line 1 is no token"),
        ("YQ== 0\nYg== 2", "ranks aren't 0 to 1"),
        ("YQ== 0", "no token for the byte 0"),
    ],
)
def test_damaged_ranks_are_refused(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "ranks"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=word):
        read_ranks(file)


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    (write(tmp_path) / "qwen.tiktoken").unlink()
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken is missing"):
        Tokenizer(str(tmp_path))
