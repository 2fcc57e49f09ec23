"""ChatGLM's tokenizers against the sentencepiece library, tiktoken's algorithm and the published
rules of their conversations."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from jaxserve.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from jaxserve.tokenizer import FastTextStream, Tokenizer
from jaxserve.vocab.sentence_piece import read_model
from tests.helpers import chatglm_vocab
from tests.helpers.chatglm_vocab import (
    GLM_4,
    LIBRARY,
    MEDIA,
    MODEL,
    SENTENCES,
    plain,
    published_chatglm2,
    published_turns,
    special,
    start,
    train,
    write,
    write_kind,
)
from tests.helpers.conversations import conversation, message

TYPED = "<|user|> [gMASK] sop <|assistant|></s><unk><0x0A> <sop> <|endoftext|>"
"""What looks like special tokens."""
Made = dict[str, Tokenizer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tokenizer of each kind."""
    return {
        kind: Tokenizer(write_kind(tmp_path_factory.mktemp(kind), kind))
        for kind in chatglm_vocab.KINDS
    }


PARTS = [
    *"aAbh x-\n\t\r'12你好ж😀\u0301\u2581ÅR問[]<>|/",
    "ha",
    "  ",
    "ab",
    "</s>",
    "<0x0A>",
    "\x00",
]
texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from(PARTS)).map("".join),
    st.lists(st.sampled_from(" ".join(SENTENCES[:8]).split(" "))).map(" ".join),
    st.just(TYPED),
)
KINDS = pytest.mark.parametrize("kind", chatglm_vocab.KINDS)


# --- Texts ----------------------------------------------------------------------------------------


@given(text=texts)
@settings(max_examples=600)
def test_chatglm2_gives_any_text_the_tokens_of_the_sentencepiece_library(
    made: Made, text: str
) -> None:
    """Nothing in a text is special."""
    ids = LIBRARY.encode(text)
    assert made["chatglm2"].encode(text) == start("chatglm2") + ids
    assert made["chatglm2"].encode(text, add_special_tokens=False) == ids
    assert made["chatglm2"].decode(start("chatglm2") + ids) == LIBRARY.decode(ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 300},
        {"control_symbols": ["ab", "[/", "ha ha"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_of_sentencepiece_are_followed(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = train(**changes)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(write(tmp_path, model))

    @given(text=texts)
    @settings(max_examples=200)
    def equal(text: str) -> None:
        assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text)

    equal()


OWN = ["ab", "bc", "[/", "s>", "<0", "0A>", "\u2581x"]
"""Pieces that users define: some overlap, some are parts of other pieces' spelling."""
SPECIAL = ["</s>", "<s>", "<unk>", "<0x41>", "<0x0A>", "[ctl]"]
SPELLING = [*OWN, *SPECIAL, "</", "<", "un", " ", "c", "k"]


@pytest.mark.parametrize(
    "changes",
    [
        {"user_defined_symbols": ["ab", "[/"]},
        {"user_defined_symbols": OWN},
        {"user_defined_symbols": ["ab", "[/"], "add_dummy_prefix": False},
        {"user_defined_symbols": OWN, "byte_fallback": False, "vocab_size": 300},
    ],
    ids=("two", "many", "no prefix", "no bytes"),
)
def test_text_between_pieces_of_users_is_never_a_special_piece(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Though it has the spelling of a control piece, a byte or the unknown piece. The model's own
    pieces cross parts of such spellings, or lie off the merges' path."""
    spelled = ["".join(SPELLING[i::3] + SPELLING[i % 5 :: 2]) for i in range(15)]
    model = train(SENTENCES + spelled * 9, control_symbols=["[ctl]"], **changes)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(write(tmp_path, model))

    @given(text=st.lists(st.sampled_from(SPELLING), max_size=6).map("".join))
    @settings(max_examples=400)
    @example("ab</s>ab")
    @example("</s>")
    @example("[/<0x41>ab")
    @example("ab<unk>[/")
    @example("ab</s></s>ab<unk>")
    def equal(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == library.encode(text)
        assert not any(library.is_control(token) for token in ids)

    equal()


def test_a_special_piece_that_text_can_not_be_kept_from_is_refused(tmp_path: Path) -> None:
    """All its characters are unknown: the library gives one unknown token for the whole."""
    model = train(
        user_defined_symbols=["ab"], control_symbols=["♠♣"], byte_fallback=False, vocab_size=300
    )
    with pytest.raises(CheckpointError, match="'♠♣', whose characters are no pieces"):
        Tokenizer(write(tmp_path, model))


@given(text=texts.filter(lambda text: not any(name in text for name in GLM_4 + MEDIA)))
@settings(max_examples=400)
def test_glm_4_gives_any_text_the_tokens_of_tiktoken(made: Made, text: str) -> None:
    ids = plain("glm-4", text)
    assert made["glm-4"].encode(text) == start("glm-4") + ids
    assert made["glm-4"].decode(ids) == text


@KINDS
@given(text=texts, data=st.data())
@settings(max_examples=150)
def test_a_stream_gives_the_text_of_its_tokens(
    made: Made, kind: str, text: str, data: st.DataObject
) -> None:
    """After the start of a conversation."""
    tokenizer, ids = made[kind], plain(kind, text)
    prompt = tokenizer.chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)[1]
    stream = tokenizer.stream(prompt)
    assert isinstance(stream, FastTextStream)
    streamed = "".join(map(stream.feed, ids)) + stream.flush()
    assert tokenizer.decode(prompt + ids) == tokenizer.decode(prompt) + streamed


@pytest.mark.parametrize("kind", ["chatglm3", "glm-4"])
def test_other_prompts_may_name_special_tokens(made: Made, kind: str) -> None:
    sop = "sop" if kind == "chatglm3" else "<sop>"
    ids = made[kind].encode(f"[gMASK]{sop}<|user|>hi<|assistant|>", add_special_tokens=False)
    end = special(kind, "<|assistant|>")
    assert ids == start(kind) + special(kind, "<|user|>") + plain(kind, "hi") + end


def test_a_special_token_that_is_a_word_is_not_found_inside_of_words(made: Made) -> None:
    text = "sophistry, philosophy"
    assert made["chatglm3"].encode(text, add_special_tokens=False) == LIBRARY.encode(text)


def test_a_special_token_whose_name_is_a_piece_keeps_its_own_id(tmp_path: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(MODEL)
    shortest = next(piece for piece in proto.pieces if piece.piece == "ab")
    shortest.piece = "sop"
    tokenizer = Tokenizer(write(tmp_path, proto.SerializeToString()))
    assert tokenizer.encode("")[:2] == start("chatglm2")
    assert tokenizer.hf.convert_ids_to_tokens(start("chatglm2")) == ["[gMASK]", "<sop>"]


# --- Conversations --------------------------------------------------------------------------------


contents = st.one_of(texts, st.sampled_from(["\n\nhi", " hi", "答：", TYPED]))
histories = st.lists(st.tuples(contents, contents), max_size=3)


@given(history=histories, query=contents, system=st.none() | contents)
@settings(max_examples=100)
def test_chatglm2_numbers_its_rounds(
    made: Made, history: list[tuple[str, str]], query: str, system: str | None
) -> None:
    """A system message goes before the last question, as in the family's own server."""
    messages = conversation(history, query, system)
    _, ids = made["chatglm2"].chat(messages, add_generation_prompt=True)
    assert ids == published_chatglm2((system or "") + query, history)
    template = made["chatglm2"].apply_chat_template(messages, add_generation_prompt=True)
    assert start("chatglm2") + LIBRARY.encode(template) == ids


@pytest.mark.parametrize("kind", ["chatglm3", "glm-4"])
@given(data=st.data())
@settings(max_examples=150)
def test_later_models_encode_each_message_by_itself(
    made: Made, kind: str, data: st.DataObject
) -> None:
    nonempty = contents.filter(bool)
    roles = st.sampled_from(["system", "user", "assistant", "observation"])
    made_up = st.builds(message, roles, nonempty) | st.builds(
        message, st.just("assistant"), nonempty, metadata=st.sampled_from(["", "get_weather"])
    )
    messages = data.draw(st.lists(made_up, min_size=1, max_size=4))
    _, ids = made[kind].chat(messages, add_generation_prompt=True)
    assert ids == published_turns(kind, messages)


def test_known_prompts_look_as_published(made: Made) -> None:
    messages = [
        message("system", "Be brief."),
        message("user", "你好"),
        message("assistant", "Hi"),
        message("user", "1 + 1?"),
    ]
    shown = {kind: made[kind].chat(messages, add_generation_prompt=True)[0] for kind in made}
    assert shown == {
        "chatglm2": "[gMASK]sop [Round 1]\n\n问：你好\n\n答：Hi\n\n"
        "[Round 2]\n\n问：Be brief.1 + 1?\n\n答：",
        "chatglm3": "[gMASK]sop<|system|> \n Be brief.<|user|> \n 你好<|assistant|> \n Hi"
        "<|user|> \n 1 + 1?<|assistant|>",
        "glm-4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\n你好<|assistant|>\nHi"
        "<|user|>\n1 + 1?<|assistant|>",
    }


@pytest.mark.parametrize("kind", ["chatglm3", "glm-4"])
def test_the_templates_give_the_same_tokens(made: Made, kind: str) -> None:
    """Where no text looks like a special token or begins with a line's end."""
    messages = [message("system", "Be brief."), message("user", "你好"), message("tool", "x")]
    messages[-1]["role"] = "observation"
    text = made[kind].apply_chat_template(messages, add_generation_prompt=True)
    ids = made[kind].encode(text, add_special_tokens=False)
    assert ids == made[kind].chat(messages, add_generation_prompt=True)[1]


def test_openais_tool_messages_are_observations(made: Made) -> None:
    for kind in ("chatglm3", "glm-4"):
        first = made[kind].chat([message("tool", "12")])
        assert first == made[kind].chat([message("observation", "12")])


def test_glm_4_leaves_messages_without_text_out(made: Made) -> None:
    both = [message("assistant", ""), message("user", "hi")]
    assert made["glm-4"].chat(both) == made["glm-4"].chat(both[1:])


@KINDS
def test_a_last_message_can_be_continued(made: Made, kind: str) -> None:
    messages = [message("user", "1 + 1?"), message("assistant", "It is")]
    _, ids = made[kind].chat(messages, continue_final_message=True)
    assert made[kind].decode(ids).endswith("It is")
    asked = made[kind].chat(messages[:1], add_generation_prompt=True)[1]
    assert ids[: len(asked)] == asked or kind == "chatglm2"


@pytest.mark.parametrize(
    ("kind", "messages", "word"),
    [
        ("chatglm2", [message("tool", "x")], "user and assistant in turn"),
        ("chatglm2", [message("user", "x"), message("user", "y")], "user and assistant in turn"),
        ("chatglm2", [message("user", "x"), message("assistant", "y")], "must be a user's"),
        ("chatglm2", [message("system", "x")], "must be a user's"),
        ("chatglm3", [message("critic", "x")], "not 'critic'"),
        ("glm-4", [{"role": "user", "content": None}], r"messages\[0\]: content must be a string"),
        ("glm-4", [{"role": "user"}], "content must be a string"),
        ("glm-4", [message("assistant", "", tool_calls="x")], "tool_calls is not supported"),
        ("chatglm3", [message("system", "x", tools="y")], r"\[0\]: tools is not supported"),
    ],
)
def test_messages_that_a_model_does_not_know_are_refused(
    made: Made, kind: str, messages: list[dict[str, Any]], word: str
) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        made[kind].chat(messages, add_generation_prompt=True)


@KINDS
def test_tools_are_refused(made: Made, kind: str) -> None:
    with pytest.raises(InvalidRequestError, match="tools: this model's conversations have no such"):
        made[kind].chat([message("user", "x")], tools=[{"type": "function"}])


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"_name_or_path": "THUDM/chatglm3-6b"}'),
        ("tokenization_chatglm.py", 'raise SystemExit("<|user|>")'),
    ],
)
def test_any_file_may_tell_chatglm3_from_chatglm2(tmp_path: Path, name: str, text: str) -> None:
    """They share vocabulary and class name. Code is looked at as text and not run."""
    assert len(Tokenizer(write(tmp_path))) == LIBRARY.vocab_size() + 5
    (tmp_path / name).write_text(text)
    assert len(Tokenizer(write(tmp_path))) == LIBRARY.vocab_size() + 9


def test_a_published_template_is_kept(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, chat_template="{{ '<|user|>' }}"))
    assert tokenizer.hf.chat_template == "{{ '<|user|>' }}"
    assert len(tokenizer) == LIBRARY.vocab_size() + 9


def test_the_library_reads_the_same_pieces(tmp_path: Path) -> None:
    write(tmp_path)
    pieces = read_model(tmp_path / "tokenizer.model").pieces
    assert [(text, score) for text, score, _ in pieces] == [
        (LIBRARY.id_to_piece(i), LIBRARY.get_score(i)) for i in range(LIBRARY.vocab_size())
    ]


@pytest.mark.parametrize("content", [b"", b"\x0a", b"\x0b\x01", b"<html>", MODEL[:-1], b"\xff" * 9])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="no SentencePiece model"):
        read_model(Path(write(tmp_path, content), "tokenizer.model"))


@given(at=st.integers(0, 300), change=st.binary(max_size=3), cut=st.integers(0, 9))
@settings(max_examples=200)
def test_other_damage_gives_an_error_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: bytes, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(MODEL[:at] + change + MODEL[at + cut :])
    with contextlib.suppress(CheckpointError, UnsupportedModelError):
        read_model(path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "unigram", "vocab_size": 340}, "model_type other than BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "a normalization_rule"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        read_model(Path(write(tmp_path, train(**changes)), "tokenizer.model"))


def test_equal_scores_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(MODEL)
    normal = [piece for piece in proto.pieces if piece.type == 1]
    normal[1].score = normal[0].score
    with caplog.at_level("WARNING", "jaxserve"):
        Tokenizer(write(tmp_path, proto.SerializeToString()))
    assert "1 pieces of the vocabulary" in caplog.text
