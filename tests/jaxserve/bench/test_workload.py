"""What benchmarks ask: lengths, random prompts, and conversations from a file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from jaxserve.bench.workload import (
    FIRST_ID,
    Item,
    random_items,
    random_lengths,
    sharegpt_items,
)
from jaxserve.errors import ConfigError


def rng() -> random.Random:
    return random.Random(7)


def test_random_prompts_have_the_lengths_and_ids_of_the_vocabulary() -> None:
    items = random_items([(3, 5), (100, 1)], 50, rng())
    assert [(len(item.prompt), item.output_len) for item in items] == [(3, 5), (100, 1)]
    ids = [token for item in items for token in item.prompt]
    assert min(ids) >= FIRST_ID and max(ids) < 50
    assert items == random_items([(3, 5), (100, 1)], 50, rng())


def test_a_range_ratio_draws_lengths_from_both_sides() -> None:
    assert random_lengths(3, 100, 8, 0.0, rng()) == [(100, 8)] * 3
    lengths = random_lengths(2000, 100, 10, 0.5, rng())
    inputs, outputs = {i for i, _ in lengths}, {o for _, o in lengths}
    assert (min(inputs), max(inputs)) == (50, 150)
    assert (min(outputs), max(outputs)) == (5, 15)
    assert min(o for _, o in random_lengths(200, 1, 1, 0.9, rng())) == 1


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_range_ratio_is_below_one(ratio: float) -> None:
    with pytest.raises(ConfigError, match="random_range_ratio"):
        random_lengths(1, 10, 10, ratio, rng())


def conversation(*texts: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text} for text in texts]}


def encode(text: str) -> list[int]:
    """A token per word."""
    return [int(word) for word in text.split()]


def words(count: int, first: int) -> str:
    return " ".join(str(first + index) for index in range(count))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    entries = [
        conversation(words(5, 100), words(7, 0), "1 2 3"),
        conversation(words(9, 200), words(4, 0)),
        conversation("only one turn"),
        conversation(words(3, 300), words(9, 0)),  # too short a question
        conversation(words(9, 400), words(3, 0)),  # too short an answer
        conversation(words(1025, 500), words(9, 0)),  # too long a question
        conversation(words(1000, 600), words(1049, 0)),  # too long together
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries))
    return path


def test_conversations_give_question_and_length_of_the_answer(file: Path) -> None:
    items = sharegpt_items(file, 10, encode, rng())
    wanted = [Item(list(range(100, 105)), 7), Item(list(range(200, 209)), 4)]
    assert sorted(items, key=lambda item: len(item.prompt)) == wanted
    assert len(sharegpt_items(file, 1, encode, rng())) == 1


def test_an_output_length_replaces_the_answers(file: Path) -> None:
    items = sharegpt_items(file, 10, encode, rng(), output_len=2)
    assert sorted(len(item.prompt) for item in items) == [5, 9, 9, 1000]
    assert {item.output_len for item in items} == {2}


@pytest.mark.parametrize("content", ["no JSON", "[1]", '[{"text": ""}]', '[{"conversations": []}]'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"data\.json"):
        sharegpt_items(path, 10, encode, rng())
    with pytest.raises(ConfigError, match=r"missing\.json"):
        sharegpt_items(tmp_path / "missing.json", 10, encode, rng())
