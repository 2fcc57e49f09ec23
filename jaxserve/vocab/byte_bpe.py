"""Byte-pair encodings in tiktoken's files: one line per token, its bytes in base64 and its rank.

The rank is the token's id, and pairs merge in the order of the rank of what they become.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.normalizers import Normalizer

from jaxserve.errors import CheckpointError


def read_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each token of a file: 0, 1, 2 and so on, in any order.

    Raises:
        CheckpointError: it isn't such a file, or a byte has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path}: line {number} is no token in base64 and its rank; download it again."
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks aren't 0 to {len(ranks) - 1}; download it again.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{path} has no token for the byte {missing[0]}; download it again.")
    return ranks


def byte_bpe(
    ranks: dict[bytes, int],
    pattern: str,
    specials: Sequence[str],
    normalizer: Normalizer | None = None,
) -> Tokenizer:
    """A tokenizer that gives the ids that tiktoken's algorithm gives.

    Args:
        ranks: see ``read_ranks``.
        pattern: the regular expression whose matches are encoded one by one.
        specials: special tokens, whose ids follow the ranks.
        normalizer: applied to the text first.
    """
    letters = _letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {names[token]: rank for token, rank in ranks.items()}
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    # A match that is a token as a whole becomes that token, even if no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return tokenizer


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that together are a token, by the rank of that token.

    tiktoken merges whatever pair gives the lowest rank, however the token was once learned.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _letters() -> list[str]:
    """The visible character that stands for each byte (GPT-2's table): itself where it is one,
    else the next from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]
