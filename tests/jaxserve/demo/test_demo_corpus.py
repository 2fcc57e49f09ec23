"""The corpus: deterministic, its held-out part never in training, its markup the template's."""

import json
import re
from random import Random

import jinja2
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxserve.demo import target_path
from jaxserve.demo.chat_format import CHAT_TEMPLATE, render_answer, render_prompt, to_json
from jaxserve.demo.corpus import EVALUATED, samples, task_samples
from jaxserve.demo.data import ANSWER_BIT, ID_MASK, encode_chunk, row_starts
from jaxserve.demo.evaluate import parse_calls
from jaxserve.demo.faq_topics import TOPICS
from jaxserve.demo.tasks import scratchpad, sum_is_held_out
from jaxserve.demo.tokenizer import END_OF_TEXT_ID
from jaxserve.demo.tool_specs import HELD_OUT_TOOLS
from jaxserve.demo.tools import NOUNS
from jaxserve.demo.words import HELD_OUT_WORDS

COUNT = 5000


@pytest.fixture(scope="module")
def training_text() -> str:
    return "\n".join(render_prompt(s) + render_answer(s) for s in samples(7, COUNT))


def test_the_same_seed_gives_the_same_documents() -> None:
    assert list(samples(3, 50)) == list(samples(3, 50))
    assert list(samples(3, 50)) != list(samples(4, 50))


def test_held_out_words_and_tools_are_not_in_the_training_text(training_text: str) -> None:
    kept_back = HELD_OUT_WORDS | {tool.name for tool in HELD_OUT_TOOLS} | set(NOUNS.heldout)
    pattern = re.compile(rf"(?i)\b({'|'.join(kept_back)})\b")
    assert not set(pattern.findall(training_text.replace("_", " ")))
    assert not any(tool.name in training_text for tool in HELD_OUT_TOOLS)


def test_held_out_ways_to_ask_are_not_in_the_training_text(training_text: str) -> None:
    lower = training_text.lower()
    assert not [t.ways[-1] for t in TOPICS if t.ways[-1].rstrip("?.!").lower() in lower]


def test_no_held_out_sum_is_trained() -> None:
    for sample in task_samples("sum", 1, 300, "train"):
        first, second = map(int, re.findall(r"\d+", sample.messages[-1]["content"]))
        assert not sum_is_held_out(first, second)


@pytest.mark.parametrize("task", ["tool", "new_tool", "json", "copy", "reverse", "story"])
def test_a_held_out_case_needs_something_unseen(task: str, training_text: str) -> None:
    seen = set(re.findall(r"[A-Za-z]+", training_text))
    unseen = 0
    for sample in task_samples(task, 1, 100, "heldout"):
        content = sample.messages[-1]["content"] + to_json(sample.tools)
        unseen += bool(set(re.findall(r"[A-Za-z]+", content)) - seen)
    # A tool call without any free word (a light, a currency) has nothing to hold out.
    assert unseen > 50


def test_the_question_about_two_gpus_is_trained_with_the_right_answer() -> None:
    topic = next(t for t in TOPICS if "Which flags use two GPUs?" in t.ways[:-1])
    assert "--tensor-parallel-size 2" in topic.answer
    assert "-tp 2" in topic.answer


def test_ways_to_ask_belong_to_one_topic_each() -> None:
    ways = [way for topic in TOPICS for way in topic.ways]
    assert len(ways) == len(set(ways))


def test_every_trained_call_fits_its_schema() -> None:
    for sample in task_samples("tool", 2, 200, "train") + task_samples("new_tool", 2, 200, "train"):
        calls = parse_calls(sample.answer)
        assert calls is not None
        for call in calls:
            arguments = call["arguments"]
            assert isinstance(arguments, dict)
            spec = next(
                tool["function"]
                for tool in sample.tools
                if tool["function"]["name"] == call["name"]
            )
            assert set(spec["parameters"]["required"]) <= set(arguments)
            assert set(arguments) <= set(spec["parameters"]["properties"])
            for name, value in arguments.items():
                allowed = spec["parameters"]["properties"][name].get("enum")
                assert allowed is None or value in allowed


def test_the_scratchpad_adds_up() -> None:
    assert scratchpad(17, 25) == "7 + 5 + 0 = 12, write 2, carry 1\n1 + 2 + 1 = 4, write 4, carry 0"


def test_python_renders_what_the_template_renders() -> None:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(CHAT_TEMPLATE)
    chats = [s for s in samples(11, 1000) if s.messages]
    chats += [s for task in EVALUATED for s in task_samples(task, 5, 20, "heldout") if s.messages]
    for sample in chats:
        by_template = template.render(
            messages=sample.messages, tools=sample.tools, add_generation_prompt=True
        )
        assert by_template + sample.opening == render_prompt(sample)


def test_rows_start_at_documents_and_hold_every_short_one() -> None:
    tokenizer = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    stream = encode_chunk(5, tokenizer.to_str(), count=400)
    ids = stream & ID_MASK
    ends = np.flatnonzero(ids == END_OF_TEXT_ID) + 1
    begins = np.concatenate([[0], ends[:-1]])
    assert len(ends) == 400
    assert (stream[ends - 1] & ANSWER_BIT).all()
    starts = row_starts(stream, 512)
    assert np.isin(starts, begins).all()
    assert starts[-1] + 513 <= len(stream)
    inside = np.zeros(len(stream), bool)
    for start in starts:
        inside[start : start + 513] = True
    for begin, end in zip(begins, ends, strict=True):
        if end - begin <= 513 and end <= starts[-1] + 513:
            assert inside[begin:end].all()


def test_random_streams_do_not_depend_on_global_state() -> None:
    first = task_samples("story", 9, 5, "train")
    Random(0).random()
    assert first == task_samples("story", 9, 5, "train")
