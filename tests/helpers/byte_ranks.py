"""A small byte-pair vocabulary in tiktoken's format, and its algorithm written out plainly."""

from __future__ import annotations

import base64
import collections
import itertools

import regex

PATTERN = regex.compile(
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
CORPUS = (
    "The quick brown fox's jumped over 12 lazy dogs, hadn't it?\n\n"
    "  aaaa aaaaaaaa hahahaha ------ \t\t    \n深度求索 你好，世界！こんにちは "
    "naïve café ÅÅ Привет мир def f(x):\n        return x ** 2\n"
) * 3


def train(text: str) -> dict[bytes, int]:
    """Ranks as byte-pair training gives them: the bytes, then the most frequent pairs, until every
    piece of the text is one token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pieces = [[bytes([b]) for b in match.encode()] for match in PATTERN.findall(text)]
    while any(len(piece) > 1 for piece in pieces):
        counts = collections.Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for piece in pieces:
            at = 0
            while at < len(piece) - 1:
                if (piece[at], piece[at + 1]) == best:
                    piece[at : at + 2] = [best[0] + best[1]]
                at += 1
    return ranks


RANKS = train(CORPUS)


def merged(piece: bytes) -> list[int]:
    """tiktoken's algorithm: the adjacent pair of the lowest rank, the leftmost first."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        joined = enumerate(a + b for a, b in itertools.pairwise(parts))
        pairs = [(RANKS[token], at) for at, token in joined if token in RANKS]
        if not pairs:
            return [RANKS[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def ranks_file() -> str:
    """The lines of the vocabulary's file."""
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in RANKS.items())
