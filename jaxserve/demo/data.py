"""Documents to one long token array, and the rows that training cuts from it.

A token is an unsigned 16-bit number: the id in the low bits, and bit 15 set where the token is
part of an answer, which training weighs more than the prompt. A row starts at a document's start,
as prompts do when the model is used, and holds as many further documents as fit.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from jaxserve.demo.chat_format import render_answer, render_prompt
from jaxserve.demo.corpus import samples
from jaxserve.demo.tokenizer import END_OF_TEXT_ID
from jaxserve.demo.words import Split

ANSWER_BIT = 0x8000
ID_MASK = 0x7FFF
CHUNK_DOCUMENTS = 4000
MAX_WORKERS = 16


def training_texts(seed: int, count: int) -> list[str]:
    """Whole documents, for the tokenizer's training."""
    return [render_prompt(s) + render_answer(s) for s in samples(seed, count)]


def encode_chunk(
    seed: int, tokenizer_json: str, split: Split = "train", count: int = CHUNK_DOCUMENTS
) -> np.ndarray:
    """`count` documents of a seed as uint16 [tokens]."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    documents = list(samples(seed, count, split))
    prompts = tokenizer.encode_batch_fast([render_prompt(s) for s in documents])
    answers = tokenizer.encode_batch_fast([render_answer(s) for s in documents])
    pieces = []
    for prompt, answer in zip(prompts, answers, strict=True):
        pieces.append(np.array(prompt.ids, np.uint16))
        pieces.append(np.array(answer.ids, np.uint16) | np.uint16(ANSWER_BIT))
    return np.concatenate(pieces)


def _use_one_thread() -> None:
    """Keep a worker's tokenizer from starting threads beside the other workers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def build_stream(tokenizer: Tokenizer, seed: int, tokens: int, workers: int) -> np.ndarray:
    """At least `tokens` tokens as uint16 [tokens]; the same for any number of workers."""
    tokenizer_json = tokenizer.to_str()
    # Seeds of chunks are spread out, so that neighbouring corpus seeds share no chunk.
    seeds = (seed * 1_000_003 + 1 + index for index in range(1_000_000))
    encode = partial(encode_chunk, tokenizer_json=tokenizer_json)
    chunks = [encode(next(seeds))]
    missing = -(-tokens // len(chunks[0])) - 1
    rest = [next(seeds) for _ in range(max(missing, 0))]
    if workers > 1 and rest:
        context = multiprocessing.get_context("spawn")
        count = min(workers, MAX_WORKERS, len(rest))
        with ProcessPoolExecutor(count, context, initializer=_use_one_thread) as pool:
            chunks += pool.map(encode, rest)
    else:
        chunks += map(encode, rest)
    return np.concatenate(chunks)


def row_starts(stream: np.ndarray, length: int) -> np.ndarray:
    """Where rows of `length` + 1 tokens start: int32 [rows].

    A row's last document is usually cut off; the next row starts with it again, unless it was the
    row's only one.
    """
    ends = np.flatnonzero((stream & ID_MASK) == END_OF_TEXT_ID) + 1
    begins = np.concatenate([[0], ends[:-1]])
    starts, document = [], 0
    while document < len(begins) and begins[document] + length + 1 <= len(stream):
        start = begins[document]
        starts.append(start)
        cut = int(np.searchsorted(ends, start + length + 1, side="right"))
        document = max(cut, document + 1)
    return np.array(starts, np.int32)
