"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from typing import Any

import pytest

from converters.families import phi3
from jaxserve.errors import CheckpointError, UnsupportedModelError
from tests.helpers.engines import greedy_params, small_llm, tokens_of
from tests.helpers.families import TEXT_TOKENS, Case, FamilyTests, FullSize, HuggingFace

ORIGINAL = 64
SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": ORIGINAL,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def longrope(pairs: int, **others: Any) -> dict[str, Any]:
    """Settings of longrope with made-up factors, as many as there are rotated pairs."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 2 * pair for pair in range(pairs)],
        **others,
    }


MINI = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "torch_dtype": "bfloat16",
}
MEDIUM = {
    **MINI,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}
LONG = {"max_position_embeddings": 131072, "sliding_window": 262144}
PHI_4_MINI = {
    **MINI,
    **LONG,
    "vocab_size": 200064,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
OLD_LONGROPE = {
    "rope_theta": 10000.0,
    "rope_scaling": {key: longrope(48)[key] for key in ("short_factor", "long_factor")},
}
"""As the published files have it, with the kind in "type"."""


class TestPhi3(FamilyTests):
    oracle = HuggingFace("Phi3Config", SMALL)
    cases = {
        "group of 3, window": Case({"sliding_window": 20}, 40),
        "group of 1, tied": Case({"num_key_value_heads": 6, "tie_word_embeddings": True}),
        "group of 7, short longrope": Case(
            {"hidden_size": 84, "num_attention_heads": 14, "rope_parameters": longrope(3)},
            ORIGINAL,
        ),
        "long longrope, three quarters of a head": Case(
            {
                "hidden_size": 96,
                "rope_parameters": longrope(6, partial_rotary_factor=0.75),
                "tie_word_embeddings": True,
            },
            ORIGINAL + 1,
        ),
        "attention factor given": Case(
            {"rope_parameters": longrope(3, attention_factor=1.3)}, ORIGINAL + 30
        ),
        "4 KV heads": Case(
            {
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "rope_parameters": longrope(6, partial_rotary_factor=0.75),
            }
        ),
    }
    text_cases = ("long longrope, three quarters of a head",)
    parallel_cases = ("4 KV heads",)
    full_sizes = {
        "Phi-3-mini-4k": FullSize(MINI, 3_821_079_552),
        "Phi-3-mini-128k, Phi-3.5-mini": FullSize(
            {**MINI, **LONG, "rope_parameters": longrope(48)}, 3_821_079_552
        ),
        "Phi-3-medium-4k": FullSize(MEDIUM, 13_960_238_080, sizes=(1, 2), refused=(4, 8)),
        "Phi-3-medium-128k": FullSize(
            {**MEDIUM, **LONG, "sliding_window": 131072, "rope_parameters": longrope(64)},
            13_960_238_080,
            sizes=(1, 2),
            refused=(4, 8),
        ),
        "phi-4": FullSize(
            {
                **MEDIUM,
                "vocab_size": 100352,
                "max_position_embeddings": 16384,
                "original_max_position_embeddings": 16384,
                "sliding_window": None,
                "rope_theta": 250000,
            },
            14_659_507_200,
            sizes=(1, 2),
            refused=(4, 8),
        ),
        "Phi-4-mini": FullSize(
            {**PHI_4_MINI, "rope_parameters": longrope(48, partial_rotary_factor=0.75)},
            3_836_021_760,
        ),
    }

    @pytest.mark.parametrize("length", [ORIGINAL - 40, ORIGINAL - 1, ORIGINAL])
    def test_text_that_outgrows_the_original_length_equals_the_oracles(
        self, length: int, tmp_path: Any
    ) -> None:
        """With its first token beyond, all keys are computed anew, by the long factors. Again from
        the prefix cache, which must not mix keys of both kinds."""
        directory = self.make(tmp_path, self.text_cases[0])
        prompts = [self.prompt(length)]
        want = self.oracle.greedy(directory, prompts, TEXT_TOKENS)
        longer = [prompts[0] + want[0]]
        further = self.oracle.greedy(directory, longer, 8)
        with small_llm(directory, max_model_len=256, dtype="float32") as llm:
            stats = llm._engine.stats
            assert tokens_of(llm, prompts, greedy_params(TEXT_TOKENS)) == want
            assert stats.preemptions == 1
            assert stats.cached_tokens == 0
            assert tokens_of(llm, prompts, greedy_params(TEXT_TOKENS)) == want
            assert stats.preemptions == 2
            first_hits = stats.cached_tokens
            assert 0 < first_hits < ORIGINAL
            assert tokens_of(llm, longer, greedy_params(8)) == further
            assert stats.preemptions == 2
            assert stats.cached_tokens - first_hits >= ORIGINAL
            allocator = llm._engine.scheduler.allocator
            assert allocator.num_free == allocator.num_usable


PUBLISHED = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    **PHI_4_MINI,
    "partial_rotary_factor": 0.75,
    **OLD_LONGROPE,
}


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_old_files_mean_the_same_as_new_ones(kind: str) -> None:
    hf = TestPhi3.oracle.config(TestPhi3.full_sizes["Phi-4-mini"].settings)
    assert "rope_scaling" not in hf
    old = PUBLISHED | {"rope_scaling": OLD_LONGROPE["rope_scaling"] | {"type": kind}}
    config = phi3.config(old)
    assert config == phi3.config(hf | {"dtype": "bfloat16"})
    (rope,) = config.rope_specs
    assert rope.rotary_size == 96
    assert rope.scaling.attention_factor == pytest.approx(1.1902380714)
    assert (config.max_model_len, config.long_rope_len) == (131072, 4096)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"type": "yarn"}, UnsupportedModelError, "rope_scaling: type='yarn' is not supported"),
        ({"short_factor": [1.0] * 47}, CheckpointError, "short_factor is .*; expected 48 numbers"),
        ({"long_factor": None}, CheckpointError, "long_factor is missing"),
        ({"long_factor": [0.0] * 48}, CheckpointError, "long_factor is .*; expected a list of pos"),
        ({"long_factor": ["1"] * 48}, CheckpointError, "long_factor is .*; expected a list of pos"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    changes: dict, error: type[Exception], message: str
) -> None:
    rope = OLD_LONGROPE["rope_scaling"] | {"type": "longrope"}
    phi3.config(PUBLISHED | {"rope_scaling": rope})
    with pytest.raises(error, match=message):
        phi3.config(PUBLISHED | {"rope_scaling": rope | changes})


def test_a_part_of_a_head_must_have_pairs() -> None:
    with pytest.raises(CheckpointError, match=r"128 times a partial_rotary_factor of 0\.01"):
        phi3.config(PUBLISHED | {"partial_rotary_factor": 0.01})
