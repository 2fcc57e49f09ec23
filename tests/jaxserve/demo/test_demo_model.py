"""The packaged directories: Hugging Face loads them unchanged and computes what we compute."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from jaxserve.demo import draft_path, target_path
from jaxserve.demo.chat_format import MARKUP_TOKENS, SPECIAL_TOKENS, render_prompt
from jaxserve.demo.checkpoint import load_checkpoint
from jaxserve.demo.corpus import samples
from jaxserve.demo.evaluate import generate
from jaxserve.demo.llama import DRAFT, TARGET, Shape, forward
from jaxserve.demo.tokenizer import VOCAB_SIZE

MODELS = [
    pytest.param(target_path(), TARGET, 4_877_568, id="target"),
    pytest.param(draft_path(), DRAFT, 625_280, id="draft"),
]
TOKENIZER = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def hf_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(target_path())


@pytest.mark.parametrize(("folder", "shape", "count"), MODELS)
def test_hf_loads_it_unchanged_and_computes_the_same(
    folder: Path, shape: Shape, count: int
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.config.vocab_size == VOCAB_SIZE
    assert model.generation_config.eos_token_id == [2, 0]
    params, loaded_shape = load_checkpoint(folder)
    assert loaded_shape == shape

    # Text, the beginning repeated to reach positions past one training row.
    text = "".join(render_prompt(sample) for sample in samples(1, 12))
    ids = np.array([TOKENIZER.encode(text).ids[:700]], np.int32)
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(ids).long()).logits.numpy()
    found = np.asarray(forward(params, jnp.asarray(ids), shape))
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("folder", "shape", "count"), MODELS)
def test_cached_greedy_text_equals_hf(folder: Path, shape: Shape, count: int) -> None:
    prompts = ["Once upon a time", "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"]
    params, _ = load_checkpoint(folder)
    found = generate(params, shape, TOKENIZER, prompts, new_tokens=24)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([TOKENIZER.encode(prompt).ids])
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
        kept = [token for token in out if token not in (0, 2)]
        assert text.removesuffix("…") == TOKENIZER.decode(kept, skip_special_tokens=False)


def test_both_models_share_the_tokenizer_and_the_weights_are_bfloat16() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target_path() / name).read_bytes() == (draft_path() / name).read_bytes()
    for folder in (target_path(), draft_path()):
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["torch_dtype"] == "bfloat16"
        count = sum(np.prod(p.shape) for p in load_checkpoint(folder)[0].values())
        size = (folder / "model.safetensors").stat().st_size
        assert 2 * count < size < 2 * count + 20_000


def test_the_vocabulary_is_2048_entries_with_specials_first(
    hf_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert TOKENIZER.get_vocab_size() == len(hf_tokenizer) == VOCAB_SIZE
    names = (*SPECIAL_TOKENS, *MARKUP_TOKENS)
    assert [TOKENIZER.token_to_id(name) for name in names] == list(range(9))
    single = [token for token in TOKENIZER.get_vocab() if len(token) == 1]
    assert len(single) == 256
    assert hf_tokenizer.eos_token == "<|im_end|>"
    assert hf_tokenizer.bos_token == hf_tokenizer.pad_token == "<|endoftext|>"


@given(st.text(max_size=200))
@example("")
@example("a  b\n\n\t c , d . 'll")
@example("\U0001f600\u200d\u4e2d\u6587\x00\x7f")
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert all(0 <= token < VOCAB_SIZE for token in ids)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.binary(max_size=200))
def test_any_bytes_that_are_text_come_back(data: bytes) -> None:
    text = data.decode("utf-8", errors="replace")
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@given(st.integers(min_value=0, max_value=10**30))
def test_every_digit_is_a_token(number: int) -> None:
    assert len(TOKENIZER.encode(str(number)).ids) == len(str(number))


def test_hf_and_plain_tokenizer_agree(hf_tokenizer: PreTrainedTokenizerFast) -> None:
    for sample in samples(2, 200):
        prompt = render_prompt(sample)
        ids = hf_tokenizer(prompt)["input_ids"]
        assert ids == TOKENIZER.encode(prompt).ids
        assert hf_tokenizer.decode(ids) == prompt


def test_markup_survives_the_removal_of_specials(hf_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = hf_tokenizer("<think>\n1 , 2\n</think><|im_end|>")["input_ids"]
    text = hf_tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "<think>\n1 , 2\n</think>"


def test_the_template_renders_tools_calls_results_and_parts(
    hf_tokenizer: PreTrainedTokenizerFast,
) -> None:
    call = {
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": '{"sky": "sunny"}'},
    ]
    text = hf_tokenizer.apply_chat_template(
        messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )
    one = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert text == (
        "<|im_start|>system\nBe brief.\n\nYou may call these tools:\n<tools>\n"
        f"{json.dumps(WEATHER['function'])}\n</tools><|im_end|>\n"
        "<|im_start|>user\nWeather in Oslo?<|im_end|>\n"
        f"<|im_start|>assistant\n{one}\n{one}<|im_end|>\n"
        '<|im_start|>tool\n<tool_response>\n{"sky": "sunny"}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_the_template_takes_arguments_as_text_and_switches_thinking(
    hf_tokenizer: PreTrainedTokenizerFast,
) -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    text = hf_tokenizer.apply_chat_template(messages, tokenize=False)
    assert '{"name": "f", "arguments": {"a": 1}}' in text

    def end(**options: bool) -> str:
        return hf_tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True, **options
        ).split("assistant\n")[-1]

    assert end() == ""
    assert end(enable_thinking=True) == "<think>\n"
    assert end(enable_thinking=False) == "<think>\n\n</think>\n\n"
