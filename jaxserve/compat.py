"""Arguments that vLLM users pass and that need nothing here, or something else. No JAX.

One table for ``LLM(...)`` and for the server's flags; the flags' names have dashes.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
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

_NO_IMAGES = "only text models are supported"
_NO_TOOLS = "requests with tools are refused until tool calls are supported"
_NO_GRAMMARS = "requests for structured output are refused until it is supported"
_NO_DRAFTS = "speculative decoding isn't supported yet; the text is the same without it"
_NO_LORA = "it matters only with --enable-lora, which isn't supported yet"
_THREADS = "tokenizing runs in threads of its own"
_ONE_HOST = "one process drives all devices of one host"
_ONE_COPY = "start several servers behind a load balancer instead"
_COMPILED = "XLA compiles every step shape; see --enforce-eager and --compilation-cache-dir"

SERVER_NO_OPS = NO_OPS | {
    "disable_log_stats": "statistics are at /metrics, and none are logged",
    # Processes and devices.
    "engine_use_ray": "the engine always runs in a process of its own",
    "ray_workers_use_nsight": "there is no Ray; jax.profiler records what the devices do",
    "disable_frontend_multiprocessing": "the engine always runs in a process of its own",
    "device": "JAX chooses the device; the environment's JAX_PLATFORMS=cpu or =cuda overrides it",
    "worker_cls": _ONE_HOST,
    "worker_extension_cls": _ONE_HOST,
    "headless": _ONE_HOST,
    "nnodes": _ONE_HOST,
    "node_rank": _ONE_HOST,
    "master_addr": _ONE_HOST,
    "master_port": _ONE_HOST,
    "enable_expert_parallel": "mixture-of-experts models aren't supported yet",
    "data_parallel_address": _ONE_COPY,
    "data_parallel_rpc_port": _ONE_COPY,
    "data_parallel_rank": _ONE_COPY,
    "data_parallel_start_rank": _ONE_COPY,
    "data_parallel_size_local": _ONE_COPY,
    "data_parallel_backend": _ONE_COPY,
    # Model and tokenizer.
    "code_revision": "no code of a model repository is ever run",
    "tokenizer_pool_size": _THREADS,
    "tokenizer_pool_type": _THREADS,
    "tokenizer_pool_extra_config": _THREADS,
    "model_loader_extra_config": "the loader needs no settings",
    "safetensors_load_strategy": "each device reads its own slice of the weights",
    "ignore_patterns": "only the files that are needed are downloaded",
    "quantization_param_path": "the KV cache has the model's dtype and needs no scales",
    "disable_sliding_window": "lower --max-model-len to the window instead",
    "runner": "any decoder generates, and embeds at /v1/embeddings",
    "convert": "any decoder generates, and embeds at /v1/embeddings",
    "task": "any decoder generates, and embeds at /v1/embeddings",
    "model_impl": "the models are jaxserve's own",
    "config_format": "the format is recognized",
    "logprobs_mode": "log-probabilities are taken before temperature and penalties",
    "enable_sleep_mode": "stop the server instead; its compiled programs are kept",
    # Compiling.
    "compilation_config": _COMPILED,
    "optimization_level": _COMPILED,
    "cudagraph_capture_sizes": _COMPILED,
    "performance_mode": "--max-num-seqs and --max-num-batched-tokens decide",
    # Scheduler and cache.
    "preemption_mode": "preempted requests are recomputed, never swapped",
    "scheduler_delay_factor": "requests are admitted as soon as there is room",
    "num_lookahead_slots": "pages are given out as they are needed",
    "num_scheduler_steps": "the scheduler always runs ahead of the device",
    "multi_step_stream_outputs": "tokens are streamed as they come; see --stream-interval",
    "disable_async_output_proc": "text is always made in another process than the engine's",
    "max_num_partial_prefills": "the step's token budget decides",
    "max_long_partial_prefills": "the step's token budget decides",
    "long_prefill_token_threshold": "the step's token budget decides",
    "scheduling_policy": "requests run in the order of their arrival",
    "scheduler_reserve_full_isl": "prompts always get all their pages at admission",
    "disable_hybrid_kv_cache_manager": "there is one page allocator",
    "prefix_caching_hash_algo": "page hashes are chained BLAKE2b",
    "calculate_kv_scales": "the KV cache has the model's dtype and needs no scales",
    # Speculative decoding.
    "speculative_config": _NO_DRAFTS,
    "speculative_model": _NO_DRAFTS,
    "speculative_model_quantization": _NO_DRAFTS,
    "num_speculative_tokens": _NO_DRAFTS,
    "speculative_max_model_len": _NO_DRAFTS,
    "speculative_disable_by_batch_size": _NO_DRAFTS,
    "speculative_draft_tensor_parallel_size": _NO_DRAFTS,
    "speculative_disable_mqa_scorer": _NO_DRAFTS,
    "ngram_prompt_lookup_max": _NO_DRAFTS,
    "ngram_prompt_lookup_min": _NO_DRAFTS,
    "spec_decoding_acceptance_method": _NO_DRAFTS,
    "typical_acceptance_sampler_posterior_threshold": _NO_DRAFTS,
    "typical_acceptance_sampler_posterior_alpha": _NO_DRAFTS,
    # Adapters.
    "max_loras": _NO_LORA,
    "max_lora_rank": _NO_LORA,
    "lora_extra_vocab_size": _NO_LORA,
    "lora_dtype": _NO_LORA,
    "long_lora_scaling_factors": _NO_LORA,
    "max_cpu_loras": _NO_LORA,
    "fully_sharded_loras": _NO_LORA,
    "lora_target_modules": _NO_LORA,
    "default_mm_loras": _NO_LORA,
    "max_prompt_adapters": "prompt adapters aren't supported",
    "max_prompt_adapter_token": "prompt adapters aren't supported",
    # Structured output, tools, reasoning.
    "guided_decoding_backend": _NO_GRAMMARS,
    "structured_outputs_config": _NO_GRAMMARS,
    "enable_auto_tool_choice": _NO_TOOLS,
    "tool_call_parser": _NO_TOOLS,
    "tool_parser_plugin": _NO_TOOLS,
    "tool_server": _NO_TOOLS,
    "exclude_tools_when_tool_choice_none": _NO_TOOLS,
    "reasoning_parser": "reasoning stays part of the text",
    # Images and sound.
    "image_input_type": _NO_IMAGES,
    "image_token_id": _NO_IMAGES,
    "image_input_shape": _NO_IMAGES,
    "image_feature_size": _NO_IMAGES,
    "image_processor": _NO_IMAGES,
    "image_processor_revision": _NO_IMAGES,
    "disable_image_processor": _NO_IMAGES,
    "limit_mm_per_prompt": _NO_IMAGES,
    "mm_processor_kwargs": _NO_IMAGES,
    "media_io_kwargs": _NO_IMAGES,
    "mm_processor_cache_gb": _NO_IMAGES,
    "mm_encoder_tp_mode": _NO_IMAGES,
    "interleave_mm_strings": _NO_IMAGES,
    "skip_mm_profiling": _NO_IMAGES,
    "allowed_local_media_path": _NO_IMAGES,
    "allowed_media_domains": _NO_IMAGES,
    # HTTP, logs and metrics.
    "chat_template_content_format": "contents of text parts are joined by line breaks",
    "disable_log_requests": "requests are logged only with --enable-log-requests",
    "disable_uvicorn_access_log": "the access log is off; --access-log turns it on",
    "enable_request_id_headers": "every reply carries X-Request-Id",
    "enable_server_load_tracking": "/load always answers",
    "enable_prompt_tokens_details": "cached tokens are always reported in the usage",
    "enable_log_outputs": "outputs are never logged",
    "enable_log_deltas": "outputs are never logged",
    "log_config_file": "--log-level and JAXSERVE_LOG_LEVEL set up the log",
    "h11_max_incomplete_event_size": "heads of requests are limited to 8 KiB a line",
    "h11_max_header_count": "heads of requests are limited to 8 KiB a line",
    "enable_ssl_refresh": "restart the server to load new certificates",
    "ssl_ciphers": "Python's default ciphers are used",
    "disable_access_log_for_endpoints": "the access log is off; --access-log turns it on",
    "fingerprint_mode": "replies carry jaxserve's version as their fingerprint",
    "otlp_traces_endpoint": "there are no traces; durations are at /metrics",
    "collect_detailed_traces": "there are no traces; durations are at /metrics",
    "show_hidden_metrics_for_version": "no metric is hidden",
    "kv_cache_metrics": "/metrics always shows the cache's use",
    "enable_layerwise_nvtx_tracing": "jax.profiler records what the devices do",
    "additional_config": "there are no other platforms to configure",
}
"""The same for the server's flags, those of older and newer releases of vLLM included."""

FIXED: dict[str, Any] = {
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "quantization": None,
    "kv_cache_dtype": "auto",
    "cpu_offload_gb": 0,
    "enable_lora": False,
    "hf_overrides": None,
}
"""Arguments of which only the neutral value is supported (yet)."""

SERVER_FIXED: dict[str, Any] = FIXED | {
    "rope_scaling": None,
    "rope_theta": None,
    "lora_modules": None,
    "prompt_adapters": None,
    "enable_prompt_adapter": False,
    "qlora_adapter_name_or_path": None,
    "kv_transfer_config": None,
    "kv_offloading_size": None,
    "logits_processors": None,
    "enable_prompt_embeds": False,
    "return_tokens_as_token_ids": False,
    "enable_force_include_usage": False,
}
"""The same for the server's flags."""

SWITCHES = frozenset(
    {
        *("disable_custom_all_reduce", "worker_use_ray", "use_v2_block_manager"),
        *("enable_chunked_prefill", "disable_log_stats", "async_scheduling", "engine_use_ray"),
        *("ray_workers_use_nsight", "disable_frontend_multiprocessing", "headless"),
        *("enable_expert_parallel", "disable_sliding_window", "enable_sleep_mode"),
        *("multi_step_stream_outputs", "disable_async_output_proc", "scheduler_reserve_full_isl"),
        *("disable_hybrid_kv_cache_manager", "calculate_kv_scales", "fully_sharded_loras"),
        *("speculative_disable_mqa_scorer", "enable_auto_tool_choice"),
        *("exclude_tools_when_tool_choice_none", "disable_image_processor"),
        *("interleave_mm_strings", "skip_mm_profiling", "disable_log_requests"),
        *("disable_uvicorn_access_log", "enable_request_id_headers"),
        *("enable_server_load_tracking", "enable_prompt_tokens_details", "enable_log_outputs"),
        *("enable_log_deltas", "enable_ssl_refresh", "kv_cache_metrics"),
        *("enable_layerwise_nvtx_tracing", "enable_lora", "enable_prompt_adapter"),
        *("enable_prompt_embeds", "return_tokens_as_token_ids", "enable_force_include_usage"),
    }
)
"""Those that are flags without a value."""

SHORT = {
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "quantization": "-q",
    "optimization_level": "-O",
    "compilation_config": "-cc",
}
"""Their short names."""


def foreign_flags(given: Mapping[str, Any]) -> list[str]:
    """One line for each of vLLM's flags that were given and have no effect here.

    Args:
        given: values by name with underscores; None where a flag wasn't given.

    Raises:
        ConfigError: only another value of a flag is supported.
    """
    lines = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if name in SERVER_NO_OPS:
            lines.append(f"{flag} has no effect here: {SERVER_NO_OPS[name]}.")
        elif value not in (neutral := SERVER_FIXED[name], str(neutral), str(neutral).lower()):
            shown = "" if name in SWITCHES else f" {value}"
            only = " only its default" if neutral in (None, False) else f" only {neutral}"
            raise ConfigError(f"{flag}{shown} is not supported;{only} is.")
    return lines


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
