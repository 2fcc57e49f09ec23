"""What a model is, as data: a ModelConfig holds one LayerSpec per layer. No JAX here.

A family (Llama, OPT, ...) is a function in ``converters/families/`` that makes a ModelConfig from
the checkpoint's config.json; nothing behind that function knows family names.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than the trained ones.

    Attributes:
        kind: "linear", "dynamic" (NTK by length), "yarn" or "llama3".
        factor: how many times longer the context becomes.
        original_max_len: the length that the model was first trained for, in tokens.
        low_freq_factor, high_freq_factor: llama3's band edges.
        beta_fast, beta_slow: yarn's band edges, in rotations over the original length.
        truncate: yarn rounds its band edges to whole dimensions.
        attention_factor: yarn's multiplier of cos and sin.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    original_max_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding on the first ``rotary_size`` dimensions of each head.

    Rotated pairs are (i, i + rotary_size / 2), the "half-split" order of GPT-NeoX and Llama.
    """

    theta: float
    rotary_size: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm ("rms") or LayerNorm with bias ("layer")."""

    kind: Literal["rms", "layer"]
    eps: float


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention.

    Attributes:
        num_heads, num_kv_heads, head_size: num_heads is a multiple of num_kv_heads.
        scale: multiplies the scores (usually head_size ** -0.5).
        rope: None for models with learned positions.
        sliding_window: a token sees this many tokens, itself included; None sees all.
        qkv_bias, out_bias: whether the projections have biases.
        qk_norm: RMSNorm over head_size on each query and key head, before rope.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rope: RopeSpec | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward network: down(act(up(x))), or down(act(gate(x)) * up(x)) if gated."""

    intermediate_size: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. "pre" norms come before each half and "post" norms after its residual."""

    attention: AttentionSpec
    ffn: MLPSpec
    norm: NormSpec
    norm_order: Literal["pre", "post"] = "pre"


@dataclass(frozen=True)
class LearnedPositions:
    """A table of position embeddings; position p uses entry ``p + offset``."""

    count: int
    offset: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    Attributes:
        architecture: the checkpoint's name for it, for messages only.
        vocab_size: rows of the embedding and width of the logits.
        hidden_size: width of the residual stream.
        max_model_len: longest sequence in tokens.
        layers: one spec per layer.
        final_norm: None where the last layer's own norm ends the stack.
        tie_word_embeddings: the logits reuse the embedding table.
        embedding_size: width of the embedding table; where it differs from hidden_size, linear
            maps without bias stand after the embedding and before the logits.
        learned_positions: None for models with rope.
        dtype: the checkpoint's own dtype, "float32", "bfloat16" or "float16".
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    tie_word_embeddings: bool
    embedding_size: int
    learned_positions: LearnedPositions | None = None
    dtype: str = "float32"

    @property
    def rope_specs(self) -> tuple[RopeSpec, ...]:
        """The distinct rope specs of all layers, in order of first use."""
        specs = (layer.attention.rope for layer in self.layers)
        return tuple(dict.fromkeys(spec for spec in specs if spec is not None))

    @property
    def dynamic_rope_len(self) -> int | None:
        """Prompts longer than this rotate keys by their own length (dynamic NTK); None if none."""
        lens = [
            spec.scaling.original_max_len
            for spec in self.rope_specs
            if spec.scaling is not None and spec.scaling.kind == "dynamic"
        ]
        return min(lens, default=None)

    def to_json(self) -> str:
        """The config as JSON text; ``from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads what ``to_json`` wrote."""
        return _from_plain(cls, json.loads(text))


def _from_plain(kind: Any, value: Any) -> Any:
    """Rebuilds nested dataclasses and tuples from JSON's dicts and lists, by the annotations."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (arm for arm in typing.get_args(kind) if arm is not type(None))
        return None if value is None else _from_plain(kind, value)
    if typing.get_origin(kind) is tuple:
        return tuple(_from_plain(typing.get_args(kind)[0], item) for item in value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _from_plain(hints[name], item) for name, item in value.items()})
    return value
