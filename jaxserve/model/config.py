"""What a model is, as data: a ModelConfig holds one LayerSpec per layer. No JAX here.

A family (Llama, OPT, ...) is a function in ``converters/families/`` that makes a ModelConfig from
the checkpoint's config.json; nothing behind that function knows family names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.model.page_groups import PageGroups, group_layers


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than the trained ones.

    Attributes:
        kind: "linear", "dynamic" (NTK by length), "yarn", "llama3", "longrope" (one factor per
            pair, another set for long requests) or "qwen" (Qwen 1's NTK by the prompt's length).
        factor: how many times longer the context becomes.
        original_max_len: the length that the model was first trained for, in tokens.
        low_freq_factor, high_freq_factor: llama3's band edges.
        beta_fast, beta_slow: yarn's band edges, in rotations over the original length.
        truncate: yarn rounds its band edges to whole dimensions.
        attention_factor: yarn's and longrope's multiplier of cos and sin.
        short_factors, long_factors: longrope's divisors of the frequencies, one per rotated pair.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope", "qwen"]
    factor: float
    original_max_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding on the first ``rotary_size`` dimensions of each head.

    Rotated pairs are (i, i + rotary_size / 2), the "half-split" order of GPT-NeoX and Llama.
    Checkpoints with pairs (2i, 2i + 1) are brought to this order when they are loaded: scores don't
    change when queries and keys are permuted alike.
    """

    theta: float
    rotary_size: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm ("rms") or LayerNorm.

    Attributes:
        kind: which.
        eps: added to the mean square or the variance.
        bias: whether a LayerNorm adds one.
        wide_scale: the scale is kept in float32 whatever the weights' dtype, for families whose
            scale is one plus the checkpoint's weight, or who round what is scaled (gpt-oss) rather
            than before.
    """

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = True
    wide_scale: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention.

    Attributes:
        num_heads, num_kv_heads, head_size: num_heads is a multiple of num_kv_heads.
        scale: multiplies the scores (usually head_size ** -0.5).
        rope: None for models with learned positions or ALiBi.
        sliding_window: a token sees this many tokens, itself included; None sees all.
        qkv_bias, out_bias: whether the projections have biases.
        qk_norm: over head_size on each query and key head, before rope: an RMSNorm, of which all
            query heads share one scale and all key heads another, or a LayerNorm without bias, of
            which each head has its own.
        softcap: scores become softcap * tanh(score / softcap); None for none.
        sinks: each head has a learned logit that takes part in the softmax and adds no value.
        alibi: ALiBi (Press et al. 2022, arXiv:2108.12409) with the slopes of ``alibi_slopes``.
        alibi_scale: multiplies the slopes.
        log_length: queries at positions p >= log_length grow by log(p + 1) / log(log_length).
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
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    alibi_scale: float = 1.0
    log_length: int | None = None

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """(heads, size) of each vector that the cache keeps of a token: its keys and values."""
        return ((self.num_kv_heads, self.head_size),) * 2


@dataclass(frozen=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Each token's keys and values of all heads are linear maps of one latent vector, which is what
    the cache holds, together with one rotated key that all heads share.

    Attributes:
        num_heads: query heads.
        latent_size: width of the latent, kv_lora_rank.
        nope_size, rope_size: dimensions of a head's query and key without and with rope.
        value_size: dimensions of a head's value.
        scale: multiplies the scores.
        rope: over rope_size dimensions.
        norm: RMSNorm of the latents.
        query_latent_size: width of the queries' own latent, q_lora_rank; None maps directly.
        bias: whether the maps into the latents have biases.
    """

    num_heads: int
    latent_size: int
    nope_size: int
    rope_size: int
    value_size: int
    scale: float
    rope: RopeSpec
    norm: NormSpec
    query_latent_size: int | None = None
    bias: bool = False
    sliding_window: None = None
    num_kv_heads: Literal[1] = 1

    @property
    def head_size(self) -> int:
        """Width of what queries are multiplied with in the cache."""
        return self.latent_size + self.rope_size

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """(heads, size) of what the cache keeps of a token: its latent and its rotated key."""
        return ((1, self.head_size),)


Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward network: down(act(up(x))), or down(act(gate(x)) * up(x)) if gated."""

    intermediate_size: int
    activation: Activation
    gated: bool = True
    up_bias: bool = False
    down_bias: bool = False


@dataclass(frozen=True)
class RouterSpec:
    """How a token chooses its experts and weighs them.

    Attributes:
        top_k: experts per token.
        scores: "softmax" over all experts, or "sigmoid" of each.
        normalize: the chosen weights are divided by their sum (after a softmax, this is the
            softmax over the chosen logits alone).
        scale: multiplies the weights.
        bias: a bias is added to the logits.
        correction: a learned correction is added to the scores for the choice, but not to the
            weights (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
        groups, top_groups: experts are chosen among the best ``top_groups`` of ``groups`` groups.
        group_score: a group is as good as its best expert ("max") or its best two together
            ("top2").
    """

    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"


@dataclass(frozen=True)
class MoESpec:
    """A mixture of experts: each token goes through ``router.top_k`` of them.

    Attributes:
        num_experts: of the same shape.
        intermediate_size: of each expert, which is a gated network.
        router: the choice.
        activation: of an expert's gate; "clamped_silu" is gpt-oss's, see ``expert_ffn``.
        bias: whether experts have biases.
        shared: a network that every token goes through besides.
        shared_gate: its output is weighed by the sigmoid of a linear map of the token.
    """

    num_experts: int
    intermediate_size: int
    router: RouterSpec
    activation: Activation | Literal["clamped_silu"] = "silu"
    bias: bool = False
    shared: MLPSpec | None = None
    shared_gate: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: attention, then a feed-forward network, each with a residual connection.

    Attributes:
        attention, ffn: the halves.
        norm: the kind of its norms.
        norm_order: "pre" norms stand before each half, "post" norms after its residual, "sandwich"
            has one before each half and one on its output.
        parallel: both halves read the layer's input: "one_norm" shares a norm between them,
            "two_norms" has one for each. None runs one after the other.
    """

    attention: AttentionSpec | LatentAttentionSpec
    ffn: MLPSpec | MoESpec
    norm: NormSpec
    norm_order: Literal["pre", "post", "sandwich"] = "pre"
    parallel: Literal["one_norm", "two_norms"] | None = None


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
        learned_positions: None for models with rope or ALiBi.
        embedding_scale: multiplies the embeddings, rounded to their dtype.
        embedding_norm: stands after the embedding; None for none.
        logit_softcap: logits become softcap * tanh(logit / softcap); None for none.
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
    embedding_scale: float = 1.0
    embedding_norm: NormSpec | None = None
    logit_softcap: float | None = None
    dtype: str = "float32"

    @functools.cached_property
    def page_groups(self) -> PageGroups:
        """Which layers share page tables."""
        windows = [layer.attention.sliding_window for layer in self.layers]
        cached = [layer.attention.cached for layer in self.layers]
        return group_layers(windows, cached, self.max_model_len)

    @property
    def rope_specs(self) -> tuple[RopeSpec, ...]:
        """The distinct rope specs of all layers, in order of first use."""
        specs = (layer.attention.rope for layer in self.layers)
        return tuple(dict.fromkeys(spec for spec in specs if spec is not None))

    @property
    def dynamic_rope_len(self) -> int | None:
        """Prompts longer than this rotate keys by their own length; None if none do."""
        return self._original_len("dynamic", "qwen")

    @property
    def long_rope_len(self) -> int | None:
        """Requests longer than this rotate all keys by longrope's long factors; None if none do."""
        return self._original_len("longrope")

    def _original_len(self, *kinds: str) -> int | None:
        """The shortest original length of the rope scalings of these kinds."""
        scalings = [spec.scaling for spec in self.rope_specs if spec.scaling is not None]
        return min((s.original_max_len for s in scalings if s.kind in kinds), default=None)

    def to_json(self) -> str:
        """The config as JSON text; ``from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads what ``to_json`` wrote."""
        return _from_plain(cls, json.loads(text))


def _from_plain(kind: Any, value: Any) -> Any:
    """Rebuilds nested dataclasses and tuples from JSON's dicts and lists, by the annotations."""
    if value is None:
        return None
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(kind) if arm is not type(None)]
        specs = [arm for arm in arms if dataclasses.is_dataclass(arm)]
        if not isinstance(value, dict) or not specs:
            return _from_plain(arms[0], value)
        # Specs that stand in one place differ in the names of their fields.
        kind = next(a for a in specs if value.keys() <= {f.name for f in dataclasses.fields(a)})
    if typing.get_origin(kind) is tuple:
        return tuple(_from_plain(typing.get_args(kind)[0], item) for item in value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _from_plain(hints[name], item) for name, item in value.items()})
    return value
