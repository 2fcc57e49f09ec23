"""On a GPU: the same tokens as transformers, and as on a CPU, through the Triton kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from jaxserve import LLM, SamplingParams
from jaxserve.bench.shapes import SHAPES, write_shape
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.hf import greedy, random_prompts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", ["llama-gqa", "mistral-window", "qwen3", "opt-125m"])
def test_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, case)
    prompts = random_prompts(20, VOCAB_SIZE, seed=1)
    with LLM(
        directory,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        use_tqdm=False,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        gpu_memory_utilization=0.2,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == greedy(directory, prompts, 64)


def write_llama(shape: str, directory: Path) -> None:
    """A checkpoint of random weights in a shape of ``SHAPES``, the same wherever it is loaded."""
    write_shape(shape, directory)
    config = SHAPES[shape]
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    size = config["head_dim"]
    heads, kv = (config[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    rng = np.random.default_rng(7)

    def normal(outputs: int, inputs: int) -> jax.Array:
        values = rng.standard_normal((outputs, inputs), np.float32) * inputs**-0.5
        return jnp.asarray(values, jnp.bfloat16)

    ones = jnp.ones(hidden, jnp.bfloat16)
    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": ones,
    }
    for layer in range(config["num_hidden_layers"]):
        tensors |= {
            f"model.layers.{layer}.{name}.weight": weight
            for name, weight in {
                "self_attn.q_proj": normal(heads, hidden),
                "self_attn.k_proj": normal(kv, hidden),
                "self_attn.v_proj": normal(kv, hidden),
                "self_attn.o_proj": normal(hidden, heads),
                "mlp.gate_proj": normal(ffn, hidden),
                "mlp.up_proj": normal(ffn, hidden),
                "mlp.down_proj": normal(hidden, ffn),
                "input_layernorm": ones,
                "post_attention_layernorm": ones,
            }.items()
        }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden)
    save_file(tensors, directory / "model.safetensors")


GREEDY = """
import json, sys
from jaxserve import LLM, SamplingParams
settings = dict(dtype="float32", skip_tokenizer_init=True, use_tqdm=False, max_model_len=1024)
settings |= dict(max_num_seqs=8, max_num_batched_tokens=256, enforce_eager=True)
with LLM(sys.argv[1], **settings) as llm:
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs = llm.generate(json.loads(sys.argv[2]), params, use_tqdm=False)
print(json.dumps([output.outputs[0].token_ids for output in outputs]))
"""


def greedy_tokens(directory: Path, prompts: list[list[int]], platform: str) -> list[list[int]]:
    """What an engine of its own generates on a platform."""
    command = [sys.executable, "-c", GREEDY, str(directory), json.dumps(prompts)]
    variables = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_1b_shapes_greedy_tokens_equal_a_cpus(tmp_path: Path) -> None:
    write_llama("llama1b", tmp_path)
    rng = np.random.default_rng(8)
    vocab_size = SHAPES["llama1b"]["vocab_size"]
    prompts = [rng.integers(10, vocab_size, length).tolist() for length in (1, 5, 70, 300)]
    on_cpu = greedy_tokens(tmp_path, prompts, "cpu")
    assert greedy_tokens(tmp_path, prompts, "cuda") == on_cpu
    assert len({tuple(tokens) for tokens in on_cpu}) == len(prompts)
