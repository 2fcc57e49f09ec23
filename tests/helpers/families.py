"""What every model family must show, written once.

A family's test file makes subclasses of ``FamilyTests`` and fills in its cases. The oracle is
transformers where it knows the family, else numpy arithmetic written from published descriptions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from converters import families, open_checkpoint, rules
from converters.lazy import FromArray, Lazy
from jaxserve.distributed import LOGICAL_TO_MESH, make_mesh
from jaxserve.engine.page_tables import most_pages
from jaxserve.errors import ConfigError
from jaxserve.model import decoder, kv_cache
from jaxserve.model import params as model_params
from jaxserve.model.config import ModelConfig
from tests.helpers.checkpoints import save_bin
from tests.helpers.dense import PAGE_SIZE, dense_logits, prompt_inputs
from tests.helpers.engines import PAGE_SIZE as PAGES_OF
from tests.helpers.engines import STEP_TOKENS, greedy_params, small_llm, tokens_of
from tests.helpers.loading import load
from tests.helpers.models_doc import EQUALS, LOADS, PARALLEL, SIZE

TOLERANCE = 1e-4
"""Of logits in float32, of the largest of them."""
TEXT_TOKENS = 64
SEED = 11
VOCAB_SIZE = 259
"""No multiple of 8; token ids below FIRST_TOKEN are left to the families' special ones."""
FIRST_TOKEN = 3

Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


class Oracle(Protocol):
    """Makes checkpoints of a family and computes their logits without us."""

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A small model's config.json, or with full settings a large one's."""

    def shapes(self, config: Mapping[str, Any]) -> Shapes:
        """The tensors of a checkpoint of any size, by their own names."""

    def logits(self, directory: Path, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T, vocab] of a checkpoint."""

    def greedy(self, directory: Path, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        """The next n greedy tokens of each prompt; end tokens don't end them."""


@dataclass(frozen=True)
class HuggingFace:
    """transformers, in float32, with its plain ("eager") experts.

    Attributes:
        config_class: name of the configuration class in transformers.
        small: its arguments for a small model.
        rewrite: turns what transformers writes into the form of the published files; it gets
            config.json and the tensors, and returns both.
        published: from the shapes that transformers' modules have to those of the published files,
            where the names or the fusing differ.
        attention: the implementation of attention, "eager" or "sdpa".
    """

    config_class: str
    small: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Callable[[dict[str, Any], Any], tuple[dict[str, Any], Any]] | None = None
    published: Callable[[Shapes], Shapes] | None = None
    attention: str = "eager"
    name: ClassVar[str] = "transformers"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Oracle``."""
        import transformers

        made = getattr(transformers, self.config_class)(**{**self.small, **settings})
        config = made.to_dict()
        config["architectures"] = [type(self._empty(config)).__name__]
        return json.loads(json.dumps(config))

    def _empty(self, config: Mapping[str, Any]) -> Any:
        """The model without memory for its weights."""
        import torch
        import transformers

        kind = getattr(transformers, self.config_class)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                kind.from_dict(dict(config)), attn_implementation=self.attention
            )

    def shapes(self, config: Mapping[str, Any]) -> Shapes:
        """See ``Oracle``."""
        model = self._empty(config)
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        keep = not config.get("tie_word_embeddings", False)
        weights = model.state_dict()
        shapes = {n: tuple(w.shape) for n, w in weights.items() if keep or n not in tied}
        return shapes if self.published is None else self.published(shapes)

    def write(
        self, directory: Path, config: Mapping[str, Any], seed: int, dtype: str, save: Save
    ) -> None:
        """Makes random weights of a dtype and gives them to ``save`` as published files have
        them."""
        import torch
        import transformers

        _quiet()
        kind = getattr(transformers, self.config_class)
        model = transformers.AutoModelForCausalLM.from_config(
            kind.from_dict(dict(config)), attn_implementation=self.attention
        ).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            kept = {id(weight) for weight in model.state_dict(keep_vars=True).values()}
            buffers = [buffer for buffer in model.buffers() if id(buffer) in kept]
            for weight in [*model.parameters(), *buffers]:
                noise = torch.randn(weight.shape, generator=generator)
                value = 1 + 0.2 * noise if weight.ndim == 1 else 0.15 * noise
                weight.copy_(value.to(getattr(torch, dtype)))
        model.save_pretrained(directory)
        tensors = _read_safetensors(directory)
        written = json.loads((directory / "config.json").read_text())
        if self.rewrite is not None:
            model.save_pretrained(directory / ORIGINAL)
            written, tensors = self.rewrite(written, tensors)
        save(written, tensors)

    def logits(self, directory: Path, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Oracle``."""
        import torch

        with torch.no_grad():
            return self._model(directory)(torch.tensor([list(token_ids)])).logits[0].numpy()

    def greedy(self, directory: Path, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        """See ``Oracle``."""
        import torch

        torch.set_num_threads(1)  # these models are too small to share among cores
        outputs = []
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.tensor([list(prompt)])
                out = self._model(directory).generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=n,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                outputs.append(out[0, len(prompt) :].tolist())
        return outputs

    def _model(self, directory: Path) -> Any:
        """A fresh model: some keep the frequencies of the last prompt."""
        import torch
        import transformers

        _quiet()
        where = directory / ORIGINAL if (directory / ORIGINAL).exists() else directory
        return transformers.AutoModelForCausalLM.from_pretrained(
            where,
            dtype=torch.float32,
            attn_implementation=self.attention,
            experts_implementation="eager",
        ).eval()


@dataclass(frozen=True)
class Arithmetic:
    """An oracle in numpy.

    Attributes:
        small: config.json of a small model.
        tensors: config.json -> the checkpoint's tensors, by name.
        forward: (config.json, tensors in float32, token ids, prompt length) -> logits [T, vocab].
    """

    small: Mapping[str, Any]
    tensors: Callable[[Mapping[str, Any]], Shapes]
    forward: Callable[[Mapping[str, Any], Tensors, Sequence[int], int], np.ndarray]

    name: ClassVar[str] = "arithmetic"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Oracle``."""
        return {**self.small, **settings}

    def shapes(self, config: Mapping[str, Any]) -> Shapes:
        """See ``Oracle``."""
        return self.tensors(config)

    def write(
        self, directory: Path, config: Mapping[str, Any], seed: int, dtype: str, save: Save
    ) -> None:
        """Makes random weights and gives them to ``save``, which rounds them."""
        rng = np.random.default_rng(seed)
        tensors = {
            name: (
                rng.normal(1, 0.2, shape) if len(shape) == 1 else rng.normal(0, 0.15, shape)
            ).astype(np.float32)
            for name, shape in self.tensors(config).items()
        }
        save(dict(config), tensors)

    def logits(self, directory: Path, token_ids: Sequence[int]) -> np.ndarray:
        """See ``Oracle``."""
        config, tensors = self._read(directory)
        return self.forward(config, tensors, token_ids, len(token_ids))

    def greedy(self, directory: Path, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        """See ``Oracle``."""
        config, tensors = self._read(directory)
        outputs = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(n):
                ids.append(int(self.forward(config, tensors, ids, len(prompt))[-1].argmax()))
            outputs.append(ids[len(prompt) :])
        return outputs

    def _read(self, directory: Path) -> tuple[dict[str, Any], Tensors]:
        config = json.loads((directory / "config.json").read_text())
        return config, {k: v.astype(np.float32) for k, v in _read_safetensors(directory).items()}


Save = Callable[[dict[str, Any], Tensors], None]
ORIGINAL = "as-transformers-wrote-it"
"""Folder in a rewritten checkpoint's, which transformers reads instead."""
CODES = ("_blocks", "_scales")
"""How the names of tensors end that hold no numbers but codes of them, in uint8."""


@dataclass(frozen=True)
class Case:
    """A small model.

    Attributes:
        settings: what distinguishes it, by the names of ``oracle.config``.
        prompt_len: how many tokens show what is special about it.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt_len: int = 24


@dataclass(frozen=True)
class FullSize:
    """A published model.

    Attributes:
        settings: its config.json, as far as it differs from the oracle's defaults.
        parameters: how many it has, by its published tensors.
        sizes: values of tensor_parallel_size that work.
        refused: those that are refused with a ConfigError.
    """

    settings: Mapping[str, Any]
    parameters: int
    sizes: tuple[int, ...] = (1, 4, 8)
    refused: tuple[int, ...] = ()


class FamilyTests:
    """Subclass it as ``class TestMixtral(FamilyTests)``; ``conftest.py`` beside the subclasses
    parametrizes the tests.

    Attributes:
        oracle: see ``Oracle``.
        cases: small models by name; odd shapes: groups of 1, 3 and 7, heads that aren't hidden /
            heads wide, tied and untied.
        text_cases: those whose text is compared through the engine, which is slower.
        parallel_cases: those that are split over 2 and 4 devices.
        max_model_len: of the engine; longer than every prompt with its text.
        prompt_lens: lengths of the text's prompts: shorter and longer than every window.
        full_sizes: published models by name.
    """

    oracle: ClassVar[Any]
    cases: ClassVar[dict[str, Case]]
    text_cases: ClassVar[tuple[str, ...]]
    parallel_cases: ClassVar[tuple[str, ...]]
    max_model_len: ClassVar[int] = 256
    prompt_lens: ClassVar[tuple[int, ...]] = (1, 2, 3, 5, 9, 30, 75, 130)
    full_sizes: ClassVar[dict[str, FullSize]] = {}

    def test_logits_equal_the_oracles(self, case: str, tmp_path: Path, family: Any) -> None:
        directory = self.make(tmp_path, case)
        self._check_logits(directory, self.cases[case].prompt_len)
        family(self._architecture(directory), LOADS)
        family(self._architecture(directory), EQUALS, self.oracle.name)

    def test_16_bit_files_in_any_format_are_read(self, tmp_path: Path, format_: str) -> None:
        """The oracle computes in float32 with the same rounded weights, as we do here."""
        dtype, _, kind = format_.partition(" ")
        case = self.text_cases[0]
        directory = self.make(tmp_path, case, dtype)
        want = self.oracle.logits(directory, self.prompt(24))
        if kind == "bin":
            other = tmp_path / "bin"
            other.mkdir()
            (other / "config.json").write_text((directory / "config.json").read_text())
            save_bin(other, _as_torch(_read_safetensors(directory)), shards=2)
            directory = other
        assert open_checkpoint(directory).config.dtype == dtype
        _check_close(self._our_logits(directory, 24), want)

    def test_greedy_text_equals_the_oracles(
        self, text_case: str, tmp_path: Path, family: Any
    ) -> None:
        """With chunked prefill, prefix hits and preemption, all in one run."""
        directory = self.make(tmp_path, text_case)
        prompts = [self.prompt(length, seed) for seed, length in enumerate(self.prompt_lens)]
        want = self.oracle.greedy(directory, prompts, TEXT_TOKENS)
        config = open_checkpoint(directory).config
        windows = dataclasses.replace(config, max_model_len=self.max_model_len).page_groups.windows
        # Just what the longest sequence needs, so that several short ones are too many.
        pages = most_pages(windows, self.max_model_len, PAGES_OF, 2 * STEP_TOKENS)
        with small_llm(
            directory,
            max_model_len=self.max_model_len,
            num_gpu_blocks_override=pages,
            dtype="float32",
        ) as llm:
            got = tokens_of(llm, prompts, greedy_params(TEXT_TOKENS))
            tokens_of(llm, prompts[-1:], greedy_params(1))  # leaves its pages in the cache
            again = tokens_of(llm, prompts[-1:], greedy_params(TEXT_TOKENS))
            stats, allocator = llm._engine.stats, llm._engine.scheduler.allocator
            assert allocator.num_free == allocator.num_usable
            assert stats.preemptions > 0, "this case must preempt"
            assert stats.cached_tokens > 0, "this case must hit the prefix cache"
        assert got == want
        assert again == want[-1:]
        family(self._architecture(directory), EQUALS, self.oracle.name)

    def test_tokens_do_not_depend_on_the_devices(
        self, parallel_case: str, tmp_path: Path, family: Any
    ) -> None:
        directory = self.make(tmp_path, parallel_case)
        prompts = [self.prompt(length, seed) for seed, length in enumerate((3, 20, 41))]
        want = self.oracle.greedy(directory, prompts, 16)
        for size in (2, 4):
            with small_llm(
                directory, False, tensor_parallel_size=size, max_model_len=128, dtype="float32"
            ) as llm:
                assert tokens_of(llm, prompts, greedy_params(16)) == want
        family(self._architecture(directory), PARALLEL)

    def test_the_published_size_loads_and_runs_as_shapes(self, full_size: str, family: Any) -> None:
        """Shapes of load, prefill and decode, with the sharding of several device counts."""
        model = self.full_sizes[full_size]
        hf = self.oracle.config(model.settings)
        config = families.find(hf).config(hf)
        assert ModelConfig.from_json(config.to_json()) == config
        tree = decoder.declare(config)
        assert sum(param.size for param in tree.values()) == model.parameters
        tensors = {name: _zeros(name, shape) for name, shape in self.oracle.shapes(hf).items()}
        plan = rules.plan(families.layout_of(families.find(hf), config), tensors, config, tree)
        assert {path: array.shape for path, array in plan.items()} == {
            path: param.shape for path, param in tree.items()
        }
        for size in model.sizes:
            check_shapes(config, size)
        for size in model.refused:
            with pytest.raises(ConfigError, match=f"tensor_parallel_size={size}"):
                decoder.for_tensor_parallel(config, size)
        family(config.architecture, SIZE, full_size)

    # --- Tools for the tests of subclasses --------------------------------------------------------

    def make(self, directory: Path, case: str, dtype: str = "float32") -> Path:
        """Writes the checkpoint of a case, in several safetensors files."""
        config = self.oracle.config(self.cases[case].settings)
        return write_checkpoint(self.oracle, directory / "model", config, dtype)

    @staticmethod
    def prompt(length: int, seed: int = SEED) -> list[int]:
        """Random token ids."""
        return np.random.default_rng(seed).integers(FIRST_TOKEN, VOCAB_SIZE, length).tolist()

    def _our_logits(self, directory: Path, length: int) -> np.ndarray:
        checkpoint = open_checkpoint(directory)
        return dense_logits(checkpoint.config, load(checkpoint), self.prompt(length))

    def _check_logits(self, directory: Path, length: int) -> None:
        want = self.oracle.logits(directory, self.prompt(length))
        _check_close(self._our_logits(directory, length), want)

    @staticmethod
    def _architecture(directory: Path) -> str:
        return open_checkpoint(directory).config.architecture


def write_checkpoint(
    oracle: Any, directory: Path, config: dict[str, Any], dtype: str = "float32", seed: int = SEED
) -> Path:
    """A random checkpoint in several safetensors files; returns its directory."""
    directory.mkdir(parents=True)

    def save(written: dict[str, Any], tensors: Tensors) -> None:
        for old in directory.glob("*.safetensors*"):
            old.unlink()
        tensors = {
            name: tensor if name.endswith(CODES) else tensor.astype(jnp.dtype(dtype))
            for name, tensor in tensors.items()
        }
        (directory / "config.json").write_text(json.dumps(written | {"dtype": dtype}, indent=2))
        _save_sharded(directory, tensors)

    oracle.write(directory, config, seed, dtype, save)
    return directory


def check_shapes(config: ModelConfig, size: int) -> None:
    """A prefill and a decode step of the model on ``size`` devices, as shapes only."""
    model = decoder.for_tensor_parallel(config, size)
    mesh = make_mesh(size)
    tree = decoder.declare(model)
    specs = model_params.partition_specs(tree, LOGICAL_TO_MESH, dict(mesh.shape))
    weights = model_params.abstract(tree, jnp.dtype("bfloat16"))
    cache = jax.tree.map(
        lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype),
        kv_cache.shapes(model, 64, PAGE_SIZE, jnp.dtype("bfloat16"), mesh),
    )
    vocab = PartitionSpec(None, specs["embed/tokens"][0])
    parts = kv_cache.partitions(model)
    step = functools.partial(decoder.forward, model)
    if size > 1:
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, parts, PartitionSpec()),
            out_specs=(vocab, parts),
            check_vma=False,
        )
    for tokens in (40, 1):  # a prompt, and a decoding lane
        inputs = jax.eval_shape(lambda n=tokens: prompt_inputs(model, [1] * n))
        logits, after = jax.eval_shape(step, weights, cache, inputs)
        assert (logits.shape, logits.dtype) == ((tokens, model.vocab_size), jnp.float32)
        assert after == cache


def _check_close(got: np.ndarray, want: np.ndarray) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= TOLERANCE, f"logits differ by {error:.2e} of the largest"


def _zeros(name: str, shape: tuple[int, ...]) -> Lazy:
    """A tensor of any size without memory."""
    dtype = np.uint8 if name.endswith(CODES) else jnp.bfloat16
    return FromArray(np.broadcast_to(np.zeros((), dtype), shape))


def _as_torch(tensors: Tensors) -> dict[str, Any]:
    import torch

    def convert(tensor: np.ndarray) -> Any:
        return torch.from_numpy(tensor.astype(np.float32)).to(getattr(torch, tensor.dtype.name))

    return {name: convert(tensor) for name, tensor in tensors.items()}


def _read_safetensors(directory: Path) -> Tensors:
    from safetensors.numpy import load_file

    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _save_sharded(directory: Path, tensors: Tensors, shards: int = 3) -> None:
    from safetensors.numpy import save_file

    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
