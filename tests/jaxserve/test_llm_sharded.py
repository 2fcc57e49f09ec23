"""The same tokens on one, two, four and eight devices, each of which holds its share."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxserve import LLM, ConfigError, demo
from tests.helpers.engines import greedy_params, small_llm, tokens_of
from tests.helpers.hf import greedy, make_llama, random_prompts

MODELS = {
    "8 KV heads": {"num_key_value_heads": 8, "vocab_size": 264},
    "2 KV heads": {"num_key_value_heads": 2, "vocab_size": 264},
    "tied, odd vocabulary": {"tie_word_embeddings": True, "num_key_value_heads": 4},
}
VOCAB_SIZE = 263
NUM_TOKENS = 16


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[list[int]], list[list[int]]]:
    """A model, prompts, and transformers' tokens for them."""
    directory = make_llama(tmp_path_factory.mktemp("llama"), **MODELS[request.param])
    prompts = random_prompts(6, VOCAB_SIZE, 5, (1, 40))
    return request.param, directory, prompts, greedy(directory, prompts, NUM_TOKENS)


def fractions(llm: LLM) -> dict[str, float]:
    """By path, the part of a weight that each device holds; all devices hold equally much."""
    parts = {}
    for path, array in llm._runner._params.items():
        (size,) = {shard.data.size for shard in array.addressable_shards}
        assert {shard.device for shard in array.addressable_shards} == set(
            jax.devices()[: llm.config.tensor_parallel_size]
        )
        parts[path] = size / array.size
    return parts


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tokens_are_equal_and_each_device_holds_its_share(
    model: tuple[str, Path, list[list[int]], list[list[int]]], size: int
) -> None:
    name, directory, prompts, want = model
    with small_llm(directory, decode_shape=size == 4, tensor_parallel_size=size) as llm:
        assert tokens_of(llm, prompts, greedy_params(NUM_TOKENS)) == want
        share = fractions(llm)
        vocab_share = 1.0 if "odd" in name else 1 / size
        assert share["embed/tokens"] == vocab_share
        assert share.get("head/tokens", vocab_share) == vocab_share
        for weight in ("attention/qkv", "attention/out", "ffn/up", "ffn/down"):
            assert share[f"layers/1/{weight}"] == 1 / size
        assert share["layers/1/attention_norm/scale"] == share["head/norm/scale"] == 1.0
        heads = MODELS[name]["num_key_value_heads"]
        for array in jax.tree.leaves(llm._runner._state.cache):
            assert array.shape[1] == max(heads, size)  # repeated where there are too few
            assert {shard.data.shape[1] for shard in array.addressable_shards} == {
                max(heads // size, 1)
            }
        assert llm.memory.page_bytes * size == sum(
            array.nbytes // array.shape[0] for array in jax.tree.leaves(llm._runner._state.cache)
        )


def test_sampling_and_penalties_do_not_depend_on_the_devices(tmp_path: Path) -> None:
    directory = make_llama(tmp_path, **MODELS["8 KV heads"])
    prompts = random_prompts(4, VOCAB_SIZE, 6, (5, 30))
    params = greedy_params(
        12, temperature=0.9, seed=5, top_p=0.9, repetition_penalty=1.2, logprobs=4
    )
    results = []
    for size in (1, 4):
        with small_llm(directory, decode_shape=False, tensor_parallel_size=size) as llm:
            results.append(llm.generate(prompts, params, use_tqdm=False))
    for one, four in zip(*results):
        assert one.outputs[0].token_ids == four.outputs[0].token_ids
        for a, b in zip(one.outputs[0].logprobs, four.outputs[0].logprobs):
            assert list(a) == list(b)
            assert [x.logprob for x in a.values()] == pytest.approx(
                [x.logprob for x in b.values()], abs=2e-5
            )


def test_edits_and_what_is_read_of_prompts_do_not_depend_on_the_devices(tmp_path: Path) -> None:
    directory = make_llama(tmp_path, **MODELS["8 KV heads"])
    prompts = random_prompts(4, VOCAB_SIZE, 6, (5, 30))
    edits = {"logit_bias": {5: 3.0, 200: -4.0}, "allowed_token_ids": list(range(3, 260, 2))}
    params = greedy_params(8, prompt_logprobs=2, bad_words_token_ids=[[5], [7, 9]], **edits)
    results = []
    for size in (1, 4):
        with small_llm(directory, decode_shape=False, tensor_parallel_size=size) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            vectors = [output.outputs.embedding for output in llm.embed(prompts, pooling="mean")]
            results.append((outputs, vectors))
    (one, vectors_of_one), (four, vectors_of_four) = results
    for a, b in zip(one, four):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        for entries, others in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True):
            assert list(entries) == list(others)
            assert [x.logprob for x in entries.values()] == pytest.approx(
                [x.logprob for x in others.values()], abs=2e-5
            )
    for a, b in zip(vectors_of_one, vectors_of_four, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_the_demo_model_on_several_devices(size: int) -> None:
    prompts = random_prompts(3, 2048, 8, (5, 30))
    with small_llm(demo.target_path(), decode_shape=False, tensor_parallel_size=size) as llm:
        got = tokens_of(llm, prompts, greedy_params(12))
    assert got == greedy(demo.target_path(), prompts, 12)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({}, 3, "tensor_parallel_size=3 doesn't divide 8 attention heads and 8 KV heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 3, "6 attention heads and 2 KV"),
        ({"intermediate_size": 60}, 8, "tensor_parallel_size=8 doesn't divide .* width 60"),
        ({}, 9, "tensor_parallel_size=9, but JAX sees only 8 cpu device"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_the_numbers(
    settings: dict[str, int], size: int, message: str, tmp_path: Path
) -> None:
    directory = make_llama(tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        small_llm(directory, tensor_parallel_size=size)
