"""Hugging Face directories of the demo models: written and read without torch."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jaxserve.demo.llama import Params, Shape
from jaxserve.demo.tokenizer import END_OF_TEXT_ID, TURN_END_ID, save_tokenizer


def hf_config(shape: Shape) -> dict[str, object]:
    """The `config.json` of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": TURN_END_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
    }


def save_checkpoint(folder: Path, params: Params, shape: Shape, tokenizer: Tokenizer) -> None:
    """Write weights in bfloat16, the configs and the tokenizer."""
    save_tokenizer(tokenizer, folder)
    generation = {
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": [TURN_END_ID, END_OF_TEXT_ID],
        "pad_token_id": END_OF_TEXT_ID,
    }
    (folder / "config.json").write_text(json.dumps(hf_config(shape), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {
        name: np.ascontiguousarray(np.asarray(value).astype(ml_dtypes.bfloat16))
        for name, value in params.items()
    }
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the library keeps it from other users


def load_checkpoint(folder: Path) -> tuple[Params, Shape]:
    """The weights as float32 (their values stay those of bfloat16), and the shape."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        ffn=config["intermediate_size"],
        head_size=config["head_dim"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        params = {
            name: jnp.asarray(np.asarray(file.get_tensor(name)).astype(np.float32))
            for name in sorted(file.keys())
        }
    return params, shape
