"""Text to tokens and back: what a stream gives out is the text, in whole characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve import demo
from jaxserve.errors import CheckpointError, InvalidRequestError
from jaxserve.tokenizer import FastTextStream, TextStream, Tokenizer
from tests.helpers.checkpoints import make_checkpoint

MESSAGES = [{"role": "user", "content": "Hello"}]
NASTY = [
    "😀😀",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "東京は夜の七時",
    "e\u0301 vs é",
    "naïve café",
    " leading, trailing ",
    "\ufffd is a character too: \ufffd\ufffd\ufffd",
    "\ufffd" * 9,
    "\x00\n\r\t",
    "مرحبا بالعالم",
    "<|im_start|>user",
]
# The byte-level tokenizer of the tests has no merges to speak of: each byte is a token.
FIRST_BYTE = 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(demo.target_path()))


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("bytes")
    return Tokenizer(str(make_checkpoint(directory, tokenizer=True)))


def slow_stream(tokenizer: Tokenizer, prompt: list[int], skip: bool = True) -> TextStream:
    return TextStream(tokenizer, prompt, skip)


def fast_stream(tokenizer: Tokenizer, prompt: list[int], skip: bool = True) -> TextStream:
    stream = tokenizer.stream(prompt, skip)
    assert isinstance(stream, FastTextStream)
    return stream


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.feed(token) for token in ids), stream.flush()]


def test_bad_words_are_watched_for_with_and_without_a_space(tokenizer: Tokenizer) -> None:
    """In every way that a text comes to hold them, unless its tokens end with others' tokens."""
    sequences = tokenizer.bad_words(["there", " there", "cat dog"])
    forms = [
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for text in ("there", " there", "cat dog", " cat dog")
    ]
    assert len({*forms}) == 4
    assert {*sequences} == {*forms}


def test_a_space_that_is_a_token_of_its_own_needs_no_sequence(bytes_tokenizer: Tokenizer) -> None:
    """The merge of the space and "a" is one that does."""
    (word,) = bytes_tokenizer.bad_words(["xy"])
    assert word == tuple(bytes_tokenizer.encode("xy", add_special_tokens=False))
    assert len(bytes_tokenizer.bad_words(["a"])) == 2


def test_a_bad_word_with_too_many_tokens_is_refused(bytes_tokenizer: Tokenizer) -> None:
    assert len(bytes_tokenizer.bad_words(["x" * 16])[0]) == 16
    with pytest.raises(InvalidRequestError, match="has 17 tokens") as error:
        bytes_tokenizer.bad_words(["x" * 17])
    assert error.value.param == "bad_words"


TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(NASTY))


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fast_stream, slow_stream])
@pytest.mark.parametrize("which", ["tokenizer", "bytes_tokenizer"])
@given(text=TEXTS, data=st.data())
@settings(max_examples=60)
def test_the_pieces_make_the_text_wherever_the_prompt_ends(
    make: Any, which: str, text: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    """The prompt's end may lie inside of a character: then the stream gives the whole character
    once it is complete, and nothing of what comes before."""
    tokenizer: Tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode("A: " + text)
    cut = data.draw(st.integers(1, len(ids)))
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    streamed = "".join(pieces(make(tokenizer, ids[:cut]), ids[cut:]))
    # A cut character is one U+FFFD in the prompt's text.
    assert whole in (before + streamed, before.removesuffix("\ufffd") + streamed)


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("make", [fast_stream, slow_stream])
def test_only_whole_characters_come_out(make: Any, text: str, bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode(text)
    out = pieces(make(bytes_tokenizer, bytes_tokenizer.encode("A")), ids)
    assert "".join(out) == text
    if "\ufffd" not in text:
        assert out[-1] == ""
        assert not any("\ufffd" in piece for piece in out)


@pytest.mark.parametrize("make", [fast_stream, slow_stream])
@pytest.mark.parametrize("text", ["😀", "東", "é"])
def test_a_prompt_that_ends_inside_a_character_leaks_nothing(
    make: Any, text: str, bytes_tokenizer: Tokenizer
) -> None:
    ids = bytes_tokenizer.encode("secret " + text + "!")
    size = len(text.encode())
    for cut in range(len(ids) - size, len(ids)):
        streamed = "".join(pieces(make(bytes_tokenizer, ids[:cut]), ids[cut:]))
        assert streamed == ("!" if cut == len(ids) - 1 else text + "!")


@pytest.mark.parametrize("make", [fast_stream, slow_stream])
@pytest.mark.parametrize("which", ["tokenizer", "bytes_tokenizer"])
@pytest.mark.parametrize("end", ["\ufffd", "\ufffd\ufffd", "x\ufffd"])
def test_a_prompt_that_ends_with_a_replacement_character_leaks_nothing(
    make: Any, which: str, end: str, request: pytest.FixtureRequest
) -> None:
    """Texts from the web have real ones."""
    tokenizer: Tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode("my secret" + end)
    assert "".join(pieces(make(tokenizer, ids), tokenizer.encode(" and so on"))) == " and so on"


@given(text=TEXTS, data=st.data())
@settings(max_examples=100)
def test_the_slow_stream_gives_the_pieces_of_the_fast_one(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = tokenizer.encode("A: " + text)
    cut = data.draw(st.integers(1, len(ids)))
    fast, slow = (
        pieces(make(tokenizer, ids[:cut]), ids[cut:]) for make in (fast_stream, slow_stream)
    )
    assert "".join(fast) == "".join(slow)
    if "\ufffd" not in text:
        assert fast == slow


@pytest.mark.parametrize("make", [fast_stream, slow_stream])
@given(raw=st.binary(min_size=1, max_size=30), prompt=st.binary(max_size=6))
@example(raw=b"\xff" * 30, prompt=b"\xff")
@example(raw=b"\xe6" * 3 + "東".encode(), prompt=b"")
@example(raw=b"\xf0\x9f\x98", prompt=b"\x98")
@settings(max_examples=150)
def test_bytes_that_are_no_text_do_not_raise(
    make: Any, raw: bytes, prompt: bytes, bytes_tokenizer: Tokenizer
) -> None:
    """And text that follows them comes out right."""
    of_byte = {
        bytes([byte]): bytes_tokenizer.encode(bytes([byte]).decode("latin-1"))
        for byte in range(128)
    }
    # Bytes above 127 stand in the vocabulary in the order of the byte-level alphabet.
    alphabet = sorted(_byte_level_alphabet().items(), key=lambda item: item[1])
    token = {byte: FIRST_BYTE + index for index, (byte, _) in enumerate(alphabet)}
    assert all([token[byte[0]]] == ids for byte, ids in of_byte.items())
    ids = [token[byte] for byte in raw]
    start = [token[byte] for byte in b"A" + prompt]
    after = bytes_tokenizer.encode("...... and so on.")
    out = pieces(make(bytes_tokenizer, start), ids + after)
    assert "".join(out).endswith("...... and so on.")


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + index) for index, byte in enumerate(others)}


def test_special_tokens_are_left_out_or_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    for make in (fast_stream, slow_stream):
        assert "".join(pieces(make(tokenizer, [ids[0]], True), ids[1:])) == "b"
        assert "".join(pieces(make(tokenizer, [ids[0]], False), ids[1:])) == "<|im_end|>b"


def test_a_stream_does_not_touch_the_prompt(tokenizer: Tokenizer) -> None:
    for make in (fast_stream, slow_stream):
        ids = tokenizer.encode("Hello")
        copy = ids.copy()
        pieces(make(tokenizer, ids), tokenizer.encode(" there"))
        assert ids == copy


# --- the tokenizer itself -------------------------------------------------------------------------


def test_encode_decode_and_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon a time")
    assert tokenizer.decode(ids) == "Once upon a time"
    assert "".join(tokenizer.token(token) for token in ids) == "Once upon a time"
    assert tokenizer.token(tokenizer.encode("<|im_end|>")[0]) == "<|im_end|>"
    assert len(tokenizer) == 2048


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("special", [False, True])
def test_texts_are_encoded_as_transformers_does(
    text: str, special: bool, tokenizer: Tokenizer, bytes_tokenizer: Tokenizer
) -> None:
    for one in (tokenizer, bytes_tokenizer):
        assert one.encode(text, special) == one.hf.encode(text, add_special_tokens=special)


@pytest.mark.parametrize(
    "settings",
    [
        {"truncation": True, "max_length": 2},
        {"padding": "max_length", "max_length": 50},
        {"split_special_tokens": True},
    ],
)
def test_what_others_do_with_its_insides_changes_no_encoding(settings: dict[str, Any]) -> None:
    one, text = Tokenizer(str(demo.target_path())), "<|im_start|>user and more than that"
    ids = one.encode(text)
    assert one.hf(text, **settings)["input_ids"] != ids
    assert one.encode(text) == ids


def test_the_chat_template(tokenizer: Tokenizer, bytes_tokenizer: Tokenizer) -> None:
    text = bytes_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert text == "<s>user: Hello</s><s>assistant: "
    text = bytes_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert text == "<s>user: Hello</s>"
    assert "Hello" in tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(MESSAGES, chat_template="{{ messages[0].content }}!")
    assert text == "Hello!"


def test_a_chat_template_in_a_file_beside_the_tokenizer(tmp_path: Path) -> None:
    """As newer models publish it; it comes before one in tokenizer_config.json."""
    directory = make_checkpoint(tmp_path, tokenizer=True)
    (directory / "chat_template.jinja").write_text("{{ messages[0].role }} in the file")
    assert Tokenizer(str(directory)).apply_chat_template(MESSAGES) == "user in the file"


def test_a_chat_template_of_ones_own(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, tokenizer=True)
    tokenizer = Tokenizer(str(directory), chat_template="{{ messages | length }} messages")
    assert tokenizer.apply_chat_template(MESSAGES * 3) == "3 messages"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "The chat template refused the messages"),
        ("{{ messages[7].content.x }}", "The chat template refused the messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_is_the_requests_fault(
    template: str, message: str, bytes_tokenizer: Tokenizer
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        bytes_tokenizer.apply_chat_template(MESSAGES, chat_template=template)
    assert error.value.param == "messages"


def test_without_a_template_chat_is_refused_with_the_remedy(tmp_path: Path) -> None:
    import json

    directory = make_checkpoint(tmp_path, tokenizer=True)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        Tokenizer(str(directory)).apply_chat_template(MESSAGES)


def test_a_missing_tokenizer_is_named_with_the_remedy(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as error:
        Tokenizer(str(directory))
    assert str(directory) in str(error.value)
    assert "skip_tokenizer_init=True" in str(error.value)


@pytest.mark.parametrize("before", ["", "import torch"])
def test_torch_is_left_alone_where_that_is_asked_for(before: str) -> None:
    code = f"""
import sys, importlib.util
{before}
was_there = "torch" in sys.modules
from jaxserve import demo
from jaxserve.tokenizer import Tokenizer
assert Tokenizer(str(demo.target_path())).encode("Hello")
assert ("torch" in sys.modules) == was_there
assert importlib.util.find_spec("torch"), "others can't import it any more"
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"USE_TORCH": "0"}, check=True)
