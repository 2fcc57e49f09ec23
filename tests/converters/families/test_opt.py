"""OPT, 125M to 66B."""

from __future__ import annotations

from typing import Any

from tests.helpers.families import Case, FamilyTests, FullSize, HuggingFace

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "ffn_dim": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}


def size(hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "vocab_size": 50272,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        **others,
    }


class TestOPT(FamilyTests):
    oracle = HuggingFace("OPTConfig", SMALL)
    cases = {
        "125m: 3 heads": Case(),
        "350m: norms after, narrow embedding": Case(POST_NORM),
        "untied, gelu": Case({"tie_word_embeddings": False, "activation_function": "gelu"}),
        "no biases, no final norm": Case({"_remove_final_layer_norm": True, "enable_bias": False}),
        "350m: 4 heads": Case({"num_attention_heads": 4, "ffn_dim": 52, **POST_NORM}),
    }
    text_cases = ("125m: 3 heads", "350m: norms after, narrow embedding")
    parallel_cases = ("350m: 4 heads",)
    full_sizes = {
        "opt-125m": FullSize(size(768, 12, 12), 125_239_296, sizes=(1, 4), refused=(8,)),
        "opt-350m": FullSize(
            size(1024, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512), 331_196_416
        ),
        "opt-1.3b": FullSize(size(2048, 24, 32), 1_315_758_080),
        "opt-2.7b": FullSize(size(2560, 32, 32), 2_651_596_800),
        "opt-6.7b": FullSize(size(4096, 32, 32), 6_658_473_984),
        "opt-13b": FullSize(size(5120, 40, 40), 12_853_473_280),
        "opt-30b": FullSize(size(7168, 48, 56), 29_974_540_288),
        "opt-66b": FullSize(size(9216, 64, 72), 65_719_701_504),
    }
