"""ChatGLM's tokenizers against the sentencepiece library, tiktoken's algorithm and the published
rules of their conversations."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from jaxserve.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from jaxserve.tokenizer import FastTextStream, Tokenizer
from jaxserve.vocab.sentence_piece import read_model
from tests.jaxserve.vocab.test_qwen import CORPUS, RANKS, merged

GLM_4_PATTERN = regex.compile(
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
SENTENCES = [
    *CORPUS.split("\n"),
    "[Round 1]\n\n问：你好吗\n\n答：我很好，谢谢！",
    "philosophy sop shop ababab abababab ------- aaaaaaa",
] * 20
TYPED = "<|user|> [gMASK] sop <|assistant|></s><unk><0x0A> <sop> <|endoftext|>"
"""What looks like special tokens."""
CHATGLM2 = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM_4 = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES]
MEDIA = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]


def train(**changes: Any) -> bytes:
    """A SentencePiece model with the settings that ChatGLM's has."""
    model = io.BytesIO()
    options: dict[str, Any] = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, **(options | changes)
    )
    return model.getvalue()


MODEL = train()
LIBRARY = sentencepiece.SentencePieceProcessor(model_proto=MODEL)


def write(directory: Path, model: bytes = MODEL, **config: Any) -> str:
    """A checkpoint's tokenizer files."""
    (directory / "tokenizer.model").write_bytes(model)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ChatGLMTokenizer", "model_max_length": 99, **config})
    )
    return str(directory)


def write_glm_4(directory: Path) -> str:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items()]
    return write(directory, "".join(lines).encode(), tokenizer_class="ChatGLM4Tokenizer")


Made = dict[str, Tokenizer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tokenizer of each kind."""

    def make(how: Callable[..., str], name: str, **config: Any) -> Tokenizer:
        return Tokenizer(how(tmp_path_factory.mktemp(name), **config))

    return {
        "chatglm2": make(write, "chatglm2", name_or_path="THUDM/chatglm2-6b"),
        "chatglm3": make(write, "chatglm3", name_or_path="THUDM/chatglm3-6b"),
        "glm-4": make(write_glm_4, "glm-4"),
    }


def plain(kind: str, text: str) -> list[int]:
    """The tokens of a text in which nothing is special."""
    if kind != "glm-4":
        return LIBRARY.encode(text)
    return [token for match in GLM_4_PATTERN.findall(text) for token in merged(match.encode())]


def special(kind: str, *names: str) -> list[int]:
    """The ids of special tokens, which follow the vocabulary in the published order."""
    order = {"chatglm2": CHATGLM2, "chatglm3": CHATGLM2 + ROLES, "glm-4": GLM_4 + MEDIA}[kind]
    first = len(RANKS) if kind == "glm-4" else LIBRARY.vocab_size()
    return [first + order.index(name) for name in names]


def start(kind: str) -> list[int]:
    return special(kind, "[gMASK]", "<sop>" if kind == "glm-4" else "sop")


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
KINDS = pytest.mark.parametrize("kind", ["chatglm2", "chatglm3", "glm-4"])


# --- Texts ----------------------------------------------------------------------------------------


@given(text=texts)
@settings(max_examples=600, deadline=None)
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
        {"user_defined_symbols": ["ab", "[/"]},
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
    @settings(max_examples=200, deadline=None)
    def equal(text: str) -> None:
        assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text)

    equal()


@given(text=texts.filter(lambda text: not any(name in text for name in GLM_4 + MEDIA)))
@settings(max_examples=400, deadline=None)
def test_glm_4_gives_any_text_the_tokens_of_tiktoken(made: Made, text: str) -> None:
    ids = plain("glm-4", text)
    assert made["glm-4"].encode(text) == start("glm-4") + ids
    assert made["glm-4"].decode(ids) == text


@KINDS
@given(text=texts, data=st.data())
@settings(max_examples=150, deadline=None)
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


def message(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


def published_chatglm2(query: str, history: Sequence[tuple[str, str]]) -> list[int]:
    """build_prompt, then the tokenizer's call."""
    rounds = [
        f"[Round {i}]\n\n问：{old}\n\n答：{answer}\n\n"
        for i, (old, answer) in enumerate(history, start=1)
    ]
    prompt = "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{query}\n\n答："
    return start("chatglm2") + LIBRARY.encode(prompt)


def published_turns(kind: str, messages: Sequence[dict[str, str]]) -> list[int]:
    """build_single_message of each, and the tokens before and after."""
    ids = start(kind)
    for each in messages:
        ids += special(kind, f"<|{each['role']}|>")
        ids += plain(kind, f"{each.get('metadata', '')}\n") + plain(kind, each["content"])
    return ids + special(kind, "<|assistant|>")


contents = st.one_of(texts, st.sampled_from(["\n\nhi", " hi", "答：", TYPED]))
histories = st.lists(st.tuples(contents, contents), max_size=3)


@given(history=histories, query=contents, system=st.none() | contents)
@settings(max_examples=100, deadline=None)
def test_chatglm2_numbers_its_rounds(
    made: Made, history: list[tuple[str, str]], query: str, system: str | None
) -> None:
    """A system message goes before the last question, as in the family's own server."""
    messages = [] if system is None else [message("system", system)]
    for question, answer in history:
        messages += [message("user", question), message("assistant", answer)]
    messages.append(message("user", query))
    _, ids = made["chatglm2"].chat(messages, add_generation_prompt=True)
    assert ids == published_chatglm2((system or "") + query, history)
    template = made["chatglm2"].apply_chat_template(messages, add_generation_prompt=True)
    assert start("chatglm2") + LIBRARY.encode(template) == ids


@pytest.mark.parametrize("kind", ["chatglm3", "glm-4"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
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
    ],
)
def test_messages_that_a_model_does_not_know_are_refused(
    made: Made, kind: str, messages: list[dict[str, Any]], word: str
) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        made[kind].chat(messages, add_generation_prompt=True)


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
@settings(max_examples=200, deadline=None)
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
