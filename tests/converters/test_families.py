"""What families share: config.json's values and their errors, positions, old spellings."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

from converters import families, open_checkpoint
from converters.families import bloom, falcon, gpt2, llama, mistral, opt, qwen2, qwen3, stablelm
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model.config import ModelConfig
from tests.helpers.checkpoints import SCALED, make_checkpoint, prompt, reference_logits
from tests.helpers.dense import dense_logits
from tests.helpers.loading import load

TOLERANCE = 1e-4  # of the largest logit, in float32

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
OPT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

FALCON = {
    "alibi": False,
    "bias": True,
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
    "num_ln_in_parallel_attn": 1,
    "parallel_attn": True,
    "ffn_hidden_size": 96,
    "layer_norm_epsilon": 1e-5,
}


def rope_config(rope: dict, **others) -> ModelConfig:
    return llama.config({**LLAMA, "rope_scaling": rope, **others})


@pytest.mark.parametrize("case", SCALED)
def test_logits_with_scaled_positions(tmp_path, case):
    path = make_checkpoint(tmp_path, case)
    expected = reference_logits(path, prompt(case))
    checkpoint = open_checkpoint(path)
    logits = dense_logits(checkpoint.config, load(checkpoint), prompt(case))
    assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("case", SCALED)
def test_config_json_round_trip(tmp_path, case):
    config = open_checkpoint(make_checkpoint(tmp_path, case)).config
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [-1, 0, 2**40, 1e30, float("nan"), "x", True, [], None])
def test_absurd_sizes_are_named(key, value):
    with pytest.raises(CheckpointError, match=key):
        llama.config({**LLAMA, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected an integer from 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size=64 is no multiple"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu' is not supported; supported are silu"),
        ({"hidden_act": 3}, "hidden_act is 3; expected a string"),
        ({"torch_dtype": "int8"}, "torch_dtype='int8' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is set, but"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"rope_scaling": {"type": "lengthy"}}, "rope_scaling: type='lengthy' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling: short_factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected a JSON object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; expected"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {}, "rope_theta": 1e4}}, "per layer type"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "rope_parameters: rope_theta is 0.5"),
        ({"head_dim": 5}, "even head size"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings"),
    ],
)
def test_config_errors_name_the_key(changes, message):
    with pytest.raises(CheckpointError, match=message):
        llama.config({**LLAMA, **changes})


NASTY = [-1, 0, 1, 2**31, 1e30, float("nan"), float("inf"), "x", True, None, [], {}, [[]], {"a": 1}]


@pytest.mark.parametrize(
    "family", [llama, mistral, qwen2, qwen3, opt, gpt2, bloom, falcon, stablelm]
)
def test_nasty_values_never_crash(family):
    rope = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "mscale": 1.0, "truncate": True}
    sound = {
        **LLAMA,
        **OPT,
        **FALCON,
        "rope_parameters": rope,
        "layer_types": None,
        "sliding_window": 4,
    }
    sound |= {"use_sliding_window": True, "head_dim": 16, "eos_token_id": 2, "enable_bias": True}
    family.config(sound)
    changed = [{**sound, key: value} for key in sound for value in NASTY]
    names = ("rope_theta", "original_max_position_embeddings", "attention_factor")
    for kind in ("linear", "dynamic", "yarn", "llama3", "longrope"):
        for key in (*rope, *names, "short_factor"):
            for value in NASTY:
                changed.append({**sound, "rope_parameters": {**rope, "type": kind, key: value}})
    for hf in changed:
        with contextlib.suppress(CheckpointError):
            assert isinstance(family.config(hf), ModelConfig)


def test_remote_code_keys_are_ignored():
    extra = {"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation_internal": "evil/x"}
    assert families.find({**LLAMA, **extra}) is llama
    assert llama.config({**LLAMA, **extra}) == llama.config(LLAMA)


@pytest.mark.parametrize(
    ("kind", "architecture", "nearest"),
    [
        ("llama4", "Llama4ForCausalLM", "LlamaForCausalLM"),
        ("custom", "MisstralForCausalLM", "MistralForCausalLM"),  # the architecture tells
        ("misstral", "MyModel", "MistralForCausalLM"),  # the model_type tells
        ("../llama", None, "LlamaForCausalLM"),
        ("llama", "LlamaForSequenceClassification", "LlamaForCausalLM"),
        ("gpt2", "GPT2Model", "GPT2LMHeadModel"),
    ],
)
def test_an_unknown_architecture_is_told_the_nearest_one_and_the_recipe(
    kind, architecture, nearest
):
    architectures = None if architecture is None else [architecture]
    with pytest.raises(UnsupportedModelError) as caught:
        families.find({"model_type": kind, "architectures": architectures})
    message = str(caught.value)
    assert message.startswith(f"The architecture {architecture or kind!r} is not supported;")
    assert f"the nearest supported one is {nearest!r} (model_type" in message
    assert "notebooks/03_add_a_model_family.ipynb shows how to add a family." in message


def test_missing_model_type():
    with pytest.raises(CheckpointError, match=r"model_type is missing; expected one of .*, llama,"):
        families.find({})


@pytest.mark.parametrize(
    ("rope", "expected_len"),
    [
        ({"type": "linear", "factor": 4.0}, 512),
        ({"type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "default"}, 128),
        ({"rope_type": "longrope", "short_factor": [1] * 8, "long_factor": [2] * 8}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}, 128),
    ],
)
def test_max_model_len(rope, expected_len):
    assert rope_config(rope).max_model_len == expected_len


def test_yarn_without_factor_uses_the_ratio_of_lengths():
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    (spec,) = rope_config(rope).rope_specs
    assert spec.scaling.factor == 4.0
    assert spec.scaling.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1)


def test_mistral_window_default_differs_from_null():
    assert mistral.config(LLAMA).layers[0].attention.sliding_window == 4096
    null = mistral.config({**LLAMA, "sliding_window": None})
    assert null.layers[0].attention.sliding_window is None
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        mistral.config({**LLAMA, "layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize("family", [qwen2, qwen3])
def test_qwen_windows(family):
    def windows(**changes) -> list[int | None]:
        config = family.config({**LLAMA, "num_hidden_layers": 3, **changes})
        return [layer.attention.sliding_window for layer in config.layers]

    on = {"use_sliding_window": True, "sliding_window": 7}
    assert windows() == [None] * 3
    assert windows(sliding_window=7, max_window_layers=0) == [None] * 3
    assert windows(**on, max_window_layers=2) == [None, None, 7]
    mixed = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(**on, layer_types=mixed) == [7, None, None]
    with pytest.raises(CheckpointError, match="use_sliding_window is off"):
        windows(layer_types=mixed)
    with pytest.raises(CheckpointError, match="one entry for each of 3 layers"):
        windows(layer_types=mixed[:2])
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        windows(layer_types=["linear_attention"] * 3)


def test_opt_norms():
    assert opt.config(OPT).final_norm is not None
    post = opt.config({**OPT, "do_layer_norm_before": False})
    assert post.final_norm is None
    assert post.layers[0].norm_order == "post"
    with pytest.raises(UnsupportedModelError, match="layer_norm_elementwise_affine"):
        opt.config({**OPT, "layer_norm_elementwise_affine": False})


def test_opt_with_the_short_prefix(tmp_path):
    """Early OPT files name tensors "decoder." where later ones have "model.decoder."."""
    from safetensors.numpy import load_file, save_file

    path = make_checkpoint(tmp_path, "opt-125m")
    before = load(path)
    tensors = load_file(path / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "model.safetensors")
    after = load(path)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_base_model_without_prefix(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = make_checkpoint(tmp_path, "llama-mha-tied")
    tensors = load_file(path / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, path / "model.safetensors")
    assert load(path)["layers/0/ffn/down"].shape == (48, 56)


def test_eos_ids_and_sampling_defaults(tmp_path):
    path = make_checkpoint(tmp_path, "llama-gqa")
    generation = {
        "eos_token_id": [7, 9, 10**6],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "5",
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    checkpoint = open_checkpoint(path)
    assert checkpoint.eos_token_ids == (7, 9, 2)
    assert checkpoint.generation == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature is 'hot'"):
        open_checkpoint(path)
