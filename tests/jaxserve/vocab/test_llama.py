"""Tokenizers that are a SentencePiece model alone: Vicuna's and TeleChat's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxserve.tokenizer import Tokenizer
from tests.helpers.sentence_pieces import train_bpe

CORPUS = [
    "The quick brown fox jumps over 12 lazy dogs, again and again and again.",
    "USER: Hello there! ASSISTANT: Hello, how may I help you today?",
    "深度求索 你好，世界！ こんにちは世界 naïve café",
    "def f(x):\n\treturn x__name ** 2  # ____",
] * 5
OWN = ["0", "1", "2", "_", "\n", "\t", "__", "____", "<_user>", "<_bot>"]
"""Pieces that TeleChat's models define, digits and spaces among them."""

NAMES = ("<s>", "</s>", "<unk>", "<_start>", "<_end>", "<_pad>", "<_unk>")
"""Special tokens, which prompts may name."""

texts = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from([*OWN, "a", "an", " ", "  ", "你", "é", "🙂", "<", "x1", "<0x41>"])
    ).map("".join),
    st.lists(st.sampled_from(" ".join(CORPUS).split(" "))).map(" ".join),
).filter(lambda text: not any(name in text for name in ("\x00", *NAMES)))


def train(**options: Any) -> bytes:
    """A SentencePiece model with the settings of Llama's."""
    return train_bpe(CORPUS, vocab_size=450, **options)


LLAMA = train()
TELECHAT = train(
    user_defined_symbols=OWN,
    unk_piece="<_unk>",
    bos_piece="<_start>",
    eos_piece="<_end>",
    pad_piece="<_pad>",
    pad_id=3,
)


def write(directory: Path, model: bytes, tokenizer_class: str, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    config |= {"tokenizer_class": tokenizer_class}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def vicuna(directory: Path, **changes: Any) -> Path:
    """As lmsys/vicuna-7b-v1.5 has it."""
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": False,
        "model_max_length": 4096,
    }
    return write(directory, LLAMA, "LlamaTokenizer", **config | changes)


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    directory = vicuna(tmp_path_factory.mktemp("vicuna"), legacy=request.param)
    return Tokenizer(str(directory)), AutoTokenizer.from_pretrained(directory)


@given(text=texts)
@settings(max_examples=100)
def test_llama_gives_any_text_the_tokens_of_transformers(
    pair: tuple[Tokenizer, Any], text: str
) -> None:
    ours, theirs = pair
    for prompt in (text, f"<s>{text}</s>USER: {text}"):
        ids = ours.encode(prompt)
        assert ids == theirs.encode(prompt)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_it_needs_neither_sentencepiece_nor_protobuf(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['sentencepiece'] = sys.modules['google.protobuf'] = None\n"
        "from jaxserve.tokenizer import Tokenizer\n"
        "print(Tokenizer(sys.argv[1]).encode('Hello'))"
    )
    directory = vicuna(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == AutoTokenizer.from_pretrained(directory).encode("Hello")


def test_more_tokens_than_the_model_has_are_left_to_transformers(tmp_path: Path) -> None:
    (vicuna(tmp_path) / "added_tokens.json").write_text('{"<mine>": 450}')
    assert Tokenizer(str(tmp_path)).encode("<mine>", False) == [450]


@given(text=texts)
@settings(max_examples=200)
def test_telechat_gives_any_text_the_tokens_of_sentencepiece(
    telechat: Tokenizer, text: str
) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=TELECHAT)
    ids = telechat.encode(text, add_special_tokens=False)
    assert ids == library.encode(text)
    assert telechat.decode(ids) == library.decode(ids)


@pytest.fixture(scope="module")
def telechat(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("telechat")
    return Tokenizer(str(write(directory, TELECHAT, "Telechat3Tokenizer", add_bos_token=False)))


def test_telechats_special_tokens(tmp_path: Path, telechat: Tokenizer) -> None:
    assert telechat.hf.eos_token_id == 2 and telechat.hf.pad_token_id == 3
    word = telechat.encode("fox")
    assert telechat.encode("<_start>fox<_end>fox") == [1, *word, 2, *word]
    begun = Tokenizer(str(write(tmp_path, TELECHAT, "TelechatTokenizer")))
    assert begun.encode("fox") == [1, *word]
