"""SentencePiece models of the BPE kind as tokenizers of the tokenizers library.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece); the few fields
that matter are read here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from tokenizers.normalizers import Prepend, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.log import logger

SPACE = "\u2581"
"""What stands for a space within pieces."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2
ALIKE = (
    "%d pieces of the vocabulary have the scores of others: texts in which such pieces overlap may "
    "get other tokens than from the sentencepiece library."
)
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePiece:
    """A model.

    Attributes:
        pieces: (text, score, type) of each token; pairs merge in the order of the score of what
            they become, the highest first.
        prefix: a space is put before every text.
        one_space: spaces at either end are removed, and several in a row become one.
        bytes_too: characters without a piece become their bytes.
    """

    pieces: tuple[tuple[str, float, int], ...]
    prefix: bool
    one_space: bool
    bytes_too: bool

    def of_type(self, *types: int) -> list[str]:
        """The texts of the pieces of some types."""
        return [text for text, _, kind in self.pieces if kind in types]


def read_model(path: Path) -> SentencePiece:
    """Reads a file.

    Raises:
        CheckpointError: it is damaged.
        UnsupportedModelError: it is of another kind than BPE, or changes texts in other ways.
    """
    try:
        parts = list(_fields(path.read_bytes()))
        pieces = tuple(_piece(value) for number, value in parts if number == 1)
        trainer = dict(_fields(b"".join(value for number, value in parts if number == 2)))
        normalizer = dict(_fields(b"".join(value for number, value in parts if number == 3)))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{path} is no SentencePiece model ({error}); download it again."
        ) from error
    if not pieces:
        raise CheckpointError(f"{path} is no SentencePiece model; download it again.")
    other = {
        "model_type other than BPE": trainer.get(3, 1) != BPE,
        "treat_whitespace_as_suffix": trainer.get(24, 0),
        "a normalization_rule": normalizer.get(2),
        "escape_whitespaces=false": not normalizer.get(5, 1),
        "pieces that are not to be used": any(kind == UNUSED for *_, kind in pieces),
    }
    for what, found in other.items():
        if found:
            raise UnsupportedModelError(f"{path} has {what}, which is not supported.")
    return SentencePiece(
        pieces,
        prefix=bool(normalizer.get(3, 1)),
        one_space=bool(normalizer.get(4, 1)),
        bytes_too=bool(trainer.get(35, 0)),
    )


def sentence_piece_bpe(model: SentencePiece, specials: Sequence[str]) -> Tokenizer:
    """A tokenizer that gives the ids that the sentencepiece library gives.

    Of overlapping pairs whose pieces have the same score, the library merges the left one, and
    this tokenizer the one with the lower id. Training gives every piece another score.

    Args:
        specials: special tokens, whose ids follow the pieces'. One whose text is a piece already
            is put into angle brackets, and one that is a word is found as a whole word only.
    """
    vocab = {text: index for index, (text, _, _) in enumerate(model.pieces)}
    unknown, whole = model.of_type(UNKNOWN), model.of_type(USER_DEFINED)
    backend = models.BPE(
        vocab=vocab,
        merges=merges(model),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=model.bytes_too,
    )
    tokenizer = Tokenizer(backend)
    if whole:
        cuts = _cuts(tokenizer, sorted(vocab.keys() - set(whole)))
        backend.ignore_merges = True  # pieces that users defined, which stand alone
        tokenizer.pre_tokenizer = PreTokenizers([_alone(whole), *cuts])
    changes: list[Any] = [Replace(" ", SPACE)]
    if model.one_space:
        changes[:0] = [Replace(Regex(" {2,}"), " "), Replace(Regex(r"\A "), "")]
    if model.prefix:
        changes.append(Prepend(SPACE))
    if model.one_space:
        changes.append(Replace(Regex(rf"{SPACE}+\z"), ""))
    tokenizer.normalizer = Normalizers(changes)
    shown = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.prefix:
        shown.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(shown)
    names = [*model.of_type(UNKNOWN, CONTROL), *(_free(name, vocab) for name in specials)]
    tokenizer.add_special_tokens(
        [AddedToken(n, special=True, normalized=False, single_word=n.isalpha()) for n in names]
    )
    return tokenizer


def _free(name: str, vocab: dict[str, int]) -> str:
    return f"<{name}>" if name in vocab else name


def _alone(whole: Sequence[str]) -> Split:
    """Sets the pieces that users defined apart, the longest first: they merge with nothing."""
    own = "|".join(map(re.escape, sorted(whole, key=len, reverse=True)))
    return Split(Regex(own), "isolated")


def _cuts(tokenizer: Tokenizer, others: Iterable[str]) -> list[Split]:
    """What cuts texts that ``ignore_merges`` would take for another piece than a user's.

    Such a text has the spelling of a piece that merges don't lead to: of a control piece or a
    byte, which texts never are, or of a normal piece off the merges' path. Its first token is cut
    off, and again as long as the rest is such a text: no merge crosses the end of a token.

    Args:
        tokenizer: without ``ignore_merges``; gives the tokens that are right.
        others: the pieces that users didn't define.

    Raises:
        UnsupportedModelError: such a text is one unknown token, and there is no place to cut.
    """
    first = {}
    for text in others:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if encoding.tokens != [text] and len(text) > 1:
            first[text] = encoding.offsets[0][1]
            if first[text] == len(text):
                raise UnsupportedModelError(
                    f"the SentencePiece model has the piece {text!r}, whose characters are no "
                    "pieces, besides pieces that users defined; this is not supported."
                )
    depth = {"": 0}
    for text in sorted(first, key=len):
        depth[text] = 1 + depth.get(text[first[text] :], 0)
    starts = "|".join(
        rf"{re.escape(text[:end])}(?={re.escape(text[end:])}\z)" for text, end in first.items()
    )
    return [Split(Regex(rf"\A(?:{starts})"), "isolated")] * max(depth.values())


def merges(model: SentencePiece) -> list[tuple[str, str]]:
    """Every pair of pieces that together are a piece, by the score of that piece."""
    known = set(model.of_type(NORMAL))
    normal = [(-score, text) for text, score, kind in model.pieces if kind == NORMAL]
    alike = len(normal) - len({score for score, _ in normal})
    if alike:
        logger.warning(ALIKE, alike)
    merges = []
    for _, text in sorted(normal, key=lambda each: each[0]):
        pairs = [(text[:cut], text[cut:]) for cut in range(len(text) - 1, 0, -1)]
        merges += [pair for pair in pairs if pair[0] in known and pair[1] in known]
    return merges


def _piece(data: bytes) -> tuple[str, float, int]:
    values = dict(_fields(data))
    return values[1].decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, 1)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: numbers, or the bytes of everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED_32, FIXED_64):
            size = 4 if kind == FIXED_32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits per byte, the lowest first; and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
