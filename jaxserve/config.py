"""EngineConfig: how to run a model. No JAX: the facts about the device come in as numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from jaxserve.errors import ConfigError
from pallas_kernels.dispatch import Kernels

DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
LOAD_FORMATS = ("auto", "safetensors", "pt", "dummy")


@dataclass(frozen=True)
class DeviceFacts:
    """What ``resolve`` needs to know of the machine.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        num_devices: devices that JAX sees.
    """

    platform: str
    num_devices: int


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; names and meanings are vLLM's. None means: choose for me.

    Attributes:
        model: a checkpoint directory or a hub id; None takes the embedded demo model.
        tokenizer: a directory or hub id; the model's own by default.
        skip_tokenizer_init: load no tokenizer; prompts are then token ids and no text comes out.
        revision: branch, tag or commit of the hub repository.
        tokenizer_revision: the same for the tokenizer's.
        download_dir: where hub downloads go.
        trust_remote_code: accepted for compatibility; no model here needs remote code and none is
            ever run.
        load_format: "auto", "safetensors", "pt", or "dummy" for random weights.
        dtype: "auto", "half", "float16", "bfloat16", "float" or "float32". Auto takes the
            checkpoint's, and bfloat16 for float32 ones; on a CPU float32, which is faster there.
        seed: of dummy weights, and of requests that bring no seed.
        max_model_len: longest sequence in tokens, prompt and output together; by default the
            model's, or what fits into the memory.
        tensor_parallel_size: devices that share the model.
        gpu_memory_utilization: share of the device memory for weights, cache and activations.
        kv_cache_memory_bytes: size of the KV cache per device, instead of measuring.
        num_gpu_blocks_override: number of KV pages, instead of measuring.
        block_size: tokens per KV page.
        enable_prefix_caching: requests with equal beginnings share KV pages.
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most tokens that a step computes.
        enforce_eager: compile programs when they are first needed, not at start.
        compilation_cache_dir: where compiled programs are kept between runs.
        kernel_overrides: op -> "module:function", a kernel of your own to try before ours, for
            example {"paged_attention": "my_module:my_kernel"}; the engine tests it as it starts.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    trust_remote_code: bool = False
    load_format: Literal["auto", "safetensors", "pt", "dummy"] = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False
    compilation_cache_dir: str | None = None
    kernel_overrides: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override"):
            _check_positive(name, getattr(self, name), optional=True)
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            _check_positive(name, getattr(self, name), optional=True)
        _check_positive("tensor_parallel_size", self.tensor_parallel_size)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}.")
        if self.load_format not in LOAD_FORMATS:
            known = ", ".join(LOAD_FORMATS)
            raise ConfigError(f"load_format={self.load_format!r} must be one of {known}.")
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ConfigError(f"block_size={self.block_size} must be 8, 16, 32, 64 or 128.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0, at most 1."
            )
        _check_overrides(self.kernel_overrides or {})

    def resolve(self, facts: DeviceFacts, model_max_len: int) -> ResolvedConfig:
        """The config with every size that doesn't depend on free memory filled in.

        Args:
            facts: of the machine.
            model_max_len: the longest sequence that the model was made for.

        Raises:
            ConfigError: settings contradict each other, the model or the machine.
        """
        if self.max_model_len is not None and self.max_model_len > model_max_len:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is more than the model's {model_max_len}."
            )
        if self.tensor_parallel_size > facts.num_devices:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size}, but JAX sees only "
                f"{facts.num_devices} {facts.platform} device(s). Lower it, or run "
                "`jaxserve doctor` to see why devices are missing."
            )
        accelerated = facts.platform != "cpu"
        rows = self.max_num_seqs or (256 if accelerated else 64)
        tokens = self.max_num_batched_tokens or max(2 * rows, 8192 if accelerated else 256)
        if tokens < rows:
            raise ConfigError(
                f"max_num_batched_tokens={tokens} must be at least max_num_seqs={rows}, so that "
                "every running request gets a token each step."
            )
        filled_in = {
            "max_model_len": self.max_model_len or model_max_len,
            "max_num_seqs": rows,
            "max_num_batched_tokens": tokens,
            "run_ahead": 2 if accelerated else 1,
        }
        return ResolvedConfig(**vars(self) | filled_in)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig in which every size is filled in; see ``EngineConfig.resolve``.

    Attributes:
        run_ahead: steps that may be under way when the next is decided.
    """

    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    run_ahead: int = 1

    @property
    def num_tokens_ahead(self) -> int:
        """Most tokens whose steps are under way or being decided at a time."""
        return (self.run_ahead + 1) * self.max_num_batched_tokens


def _check_positive(name: str, value: Any, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a positive integer.")


def _check_overrides(overrides: Any) -> None:
    if not isinstance(overrides, dict):
        raise ConfigError(f"kernel_overrides={overrides!r} must map ops to 'module:function'.")
    ops = [field.name for field in fields(Kernels)]
    for op, function in overrides.items():
        if op not in ops:
            raise ConfigError(f"kernel_overrides: there is no op {op!r}; use {', '.join(ops)}.")
        if not isinstance(function, str) or not re.fullmatch(r"\w+(\.\w+)*:\w+", function):
            raise ConfigError(
                f"kernel_overrides: {op!r} needs 'module:function', not {function!r}."
            )
