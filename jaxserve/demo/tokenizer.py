"""The demo tokenizer: byte-level BPE of exactly 2,048 entries, single digits, ChatML specials."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer

from jaxserve.demo.chat_format import CHAT_TEMPLATE, MARKUP_TOKENS, SPECIAL_TOKENS

VOCAB_SIZE = 2048
CONTEXT = 2048
END_OF_TEXT_ID, TURN_START_ID, TURN_END_ID = range(3)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges. Ids 0 to 2 are the specials, 3 to 8 the markup, then the 256 bytes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    names = (*SPECIAL_TOKENS, *MARKUP_TOKENS)
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"too little text for {VOCAB_SIZE} entries: {tokenizer.get_vocab_size()}")
    # The trainer knows only "special" tokens; markup has to survive `skip_special_tokens`.
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS
    return Tokenizer.from_str(json.dumps(data))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `transformers.AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text, _, turn_end = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": turn_end,
        "pad_token": end_of_text,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "padding_side": "left",
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The saved tokenizer, without transformers."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
