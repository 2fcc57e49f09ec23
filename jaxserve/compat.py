"""Arguments that vLLM users pass and that need nothing here, or something else. No JAX."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.log import logger

NO_OPS = {
    "swap_space": "preempted requests are recomputed, never swapped",
    "disable_custom_all_reduce": "XLA's own collectives are used",
    "distributed_executor_backend": "one process drives all local devices",
    "worker_use_ray": "one process drives all local devices",
    "max_parallel_loading_workers": "each device reads its own slice of the weights",
    "max_seq_len_to_capture": "every step shape is compiled ahead",
    "max_context_len_to_capture": "every step shape is compiled ahead",
    "use_v2_block_manager": "there is one page allocator",
    "enable_chunked_prefill": "prompts are always cut to the step's token budget",
    "disable_log_stats": "LLM logs no statistics",
    "tokenizer_mode": "the fast tokenizer is used where there is one",
    "async_scheduling": "the scheduler always runs one step ahead",
}
"""vLLM's arguments that are accepted and ignored, with the reason."""

FIXED = {
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "quantization": None,
    "kv_cache_dtype": "auto",
    "cpu_offload_gb": 0,
    "enable_lora": False,
    "hf_overrides": None,
}
"""Arguments of which only the neutral value is supported (yet)."""


def engine_config(model: str | None, arguments: dict[str, Any]) -> EngineConfig:
    """The config for ``LLM(model, **arguments)``, vLLM's spellings included.

    Raises:
        ConfigError: an argument is unknown (names the nearest), unsupported or wrong.
    """
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    known = {}
    for name, value in arguments.items():
        if name in names:
            known[name] = value
        elif name in NO_OPS:
            logger.info("%s has no effect here: %s.", name, NO_OPS[name])
        elif name in FIXED:
            if value != FIXED[name]:
                raise ConfigError(
                    f"{name}={value!r} is not supported; only {FIXED[name]!r} is, the default."
                )
        else:
            near = difflib.get_close_matches(name, [*names, *NO_OPS, *FIXED], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"LLM has no argument {name!r}.{hint}")
    return EngineConfig(model=model, **known)
