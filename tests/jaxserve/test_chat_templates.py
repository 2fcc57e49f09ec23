"""The built-in chat templates, and how one is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jaxserve import chat_templates, demo
from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.tokenizer import Tokenizer
from jaxserve.vocab.render import render
from tests.helpers.checkpoints import make_checkpoint

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": " Bye\n"},
]
WANT = {
    # FastChat's "vicuna_v1.1"
    "vicuna": (
        f"<s>{VICUNA} USER: Hello! ASSISTANT: Hi.</s>USER:  Bye\n ASSISTANT:",
        "<s>Be brief. USER: Hello! ASSISTANT: Hi.</s>USER:  Bye\n ASSISTANT:",
    ),
    # The template of meta-llama/Llama-2-7b-chat-hf
    "llama-2": (
        "<s>[INST] Hello! [/INST] Hi. </s><s>[INST] Bye [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello! [/INST] Hi. </s><s>[INST] Bye [/INST]",
    ),
    # The template of meta-llama/Meta-Llama-3-8B-Instruct
    "llama-3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": (
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\n Bye\n<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\n Bye\n<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    # make_context of Qwen/Qwen-7B-Chat
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\n Bye\n<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\n Bye\n<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer brings no template; it begins texts with <s> and ends them with
    </s>."""
    path = make_checkpoint(tmp_path_factory.mktemp("plain"), tokenizer=True)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", WANT)
def test_conversations_have_the_published_format(directory: Path, name: str) -> None:
    tokenizer = Tokenizer(str(directory), chat_template=chat_templates.text_of(name))
    for first, want in zip(([], [SYSTEM]), WANT[name]):
        got, ids = tokenizer.chat([*first, *TURNS], add_generation_prompt=True)
        assert got == want
        assert ids == tokenizer.encode(want, add_special_tokens=False)


@pytest.mark.parametrize("name", ["vicuna", "llama-2"])
@pytest.mark.parametrize("messages", [TURNS[1:], [TURNS[0], TURNS[0]], [*TURNS, SYSTEM]])
def test_formats_of_two_roles_refuse_other_orders(
    directory: Path, name: str, messages: list[dict[str, Any]]
) -> None:
    tokenizer = Tokenizer(str(directory), chat_template=chat_templates.text_of(name))
    with pytest.raises(InvalidRequestError, match="must take turns"):
        tokenizer.chat(messages)


def rendered(render: Callable[[], str]) -> str:
    """A text, or the error in its place."""
    try:
        return render()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "template",
    [
        *map(chat_templates.text_of, chat_templates.names()),
        (demo.target_path() / "chat_template.jinja").read_text(),
        "{{ messages }} {{ tools }} {{ documents }} {{ bos_token }} {{ namespace(a=1).a }}",
        "{% set messages = messages[1:] %}{{ dict(a=messages) | tojson }} {{ x }}",
        "{% for m in messages %}{{ m.name is defined }}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].__class__ }}",
        "{{ messages[9].content.x }}",
        "{{ raise_exception('in turns') }}",
        "{% if %}",
    ],
)
def test_plain_messages_are_rendered_as_transformers_does(directory: Path, template: str) -> None:
    hf = Tokenizer(str(directory), chat_template=template).hf
    many = [SYSTEM, *TURNS, {"role": "user", "content": "{{ 1 }} <b>é"}]
    called = [*TURNS, {"role": "assistant", "content": None, "tool_calls": []}]
    named = [{**TURNS[0], "name": "Ann"}]
    for messages in ([], TURNS[:1], TURNS, many, called, named):
        for option in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
            want = partial(hf.apply_chat_template, messages, tokenize=False, **option)
            assert rendered(partial(render, hf, messages, option)) == rendered(want)


def test_a_template_is_given_as_text_or_by_name_or_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert chat_templates.text_of(str(file)) == "{{ messages }}"
    assert chat_templates.text_of("{{ messages[0] }}") == "{{ messages[0] }}"
    assert "USER: " in chat_templates.text_of("vicuna")
    with pytest.raises(ConfigError, match=r"vicunia.*neither a file .* one of .*vicuna"):
        chat_templates.text_of("vicunia")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("lmsys/vicuna-13b-v1.5-16k", "vicuna"),
        ("/models/Vicuna-33B-v1.3/", "vicuna"),
        ("/cache/models--lmsys--vicuna-7b-v1.5/snapshots/3321f76", "vicuna"),
        ("/cache/lmsys/vicuna-7b-v1___5", "vicuna"),
        ("lmsys/vicuna-7b-delta-v0", None),
        ("/home/vicuna-7b-v1.5/llama", None),
        ("my/vicunator", None),
    ],
)
def test_a_name_tells_for_certain_or_not_at_all(model: str, name: str | None) -> None:
    assert chat_templates.certain_for(model) == name


def test_vicuna_gets_its_template_by_its_name(
    tmp_path: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = tmp_path / "vicuna-7b-v1.5"
    named.symlink_to(directory)
    with caplog.at_level("INFO", "jaxserve"):
        tokenizer = Tokenizer(str(named))
    assert tokenizer.chat(TURNS, add_generation_prompt=True)[0] == WANT["vicuna"][0]
    assert "no chat template: the built-in 'vicuna' is used" in caplog.text
    assert Tokenizer(str(named), chat_template="{{ 1 }}").chat(TURNS)[0] == "1"
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer(str(directory)).chat(TURNS)
