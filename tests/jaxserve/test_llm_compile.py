"""After warm-up nothing is compiled, and a second engine finds the programs of the first."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, CheckpointError, ConfigError, SamplingParams, build
from jaxserve.config import EngineConfig
from jaxserve.engine.programs import compile_events
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.engines import Job, drive, greedy_params
from tests.helpers.hf import make_llama, random_prompts

SIZES = {
    "skip_tokenizer_init": True,
    "use_tqdm": False,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
}
NUM_PROGRAMS = 12  # forward for 3 buckets; 3 samplers for 1 and 4 lanes; three that write state


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


def varied_workload(count: int) -> list[Job]:
    """Every sampler, prompts shorter and much longer than a step, arrivals alone and together."""
    rng = np.random.default_rng(0)
    kinds = [
        SamplingParams(max_tokens=40, seed=1, top_p=0.9),
        SamplingParams(max_tokens=9, seed=2, repetition_penalty=1.2, logprobs=3),
        greedy_params(60),
        greedy_params(3, min_tokens=2),
        greedy_params(8, logit_bias={5: 3.0}, bad_words_token_ids=[[7, 8]]),
    ]
    lengths = [1, 2, 15, 16, 17, 100, 200]
    jobs = []
    for index in range(count):
        prompt = rng.integers(3, VOCAB_SIZE, lengths[index % len(lengths)]).tolist()
        params = kinds[index % len(kinds)]
        jobs.append(Job(prompt, params, int(rng.integers(60)), 70 if index % 9 == 8 else None))
    return jobs


def test_nothing_is_compiled_after_warm_up(directory: Path) -> None:
    """Neither by the engine nor behind its back, by an array operation on the host's side."""
    with LLM(str(directory), max_model_len=256, num_gpu_blocks_override=34, **SIZES) as llm:
        assert llm.stats.compilations == {"warmup": NUM_PROGRAMS}
        before = compile_events()["compilations"]
        drive(llm._engine, varied_workload(40))
        llm.generate(random_prompts(9, VOCAB_SIZE, 1), greedy_params(5), use_tqdm=False)
        assert compile_events()["compilations"] == before
        assert llm.stats.compilations == {"warmup": NUM_PROGRAMS}
        assert llm.stats.preemptions > 0


def test_without_warm_up_programs_are_compiled_when_needed_and_once(directory: Path) -> None:
    with LLM(str(directory), enforce_eager=True, **SIZES) as llm:
        assert llm.stats.compilations == {}
        llm.generate([[5, 6, 7]], greedy_params(5), use_tqdm=False)
        compiled = dict(llm.stats.compilations)
        assert compiled == {"late": 2}
        llm.generate([[5, 6, 7]], greedy_params(5), use_tqdm=False)
        assert llm.stats.compilations == compiled


def test_background_warm_up_serves_before_all_is_compiled(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What isn't urgent is held back here until some tokens have come."""
    from jaxserve.engine.step import StepPrograms

    held_back = True
    count_tokens = StepPrograms._lower_count_tokens

    def slow(self: StepPrograms):
        while held_back:
            time.sleep(0.01)
        return count_tokens(self)

    monkeypatch.setattr(StepPrograms, "_lower_count_tokens", slow)
    with LLM(str(directory), warmup="background", **SIZES) as llm:
        (output,) = llm.generate([[5, 6, 7]], greedy_params(5), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 5
        assert not llm._runner.programs.ready(("count_tokens",))
        held_back = False
        llm._runner.programs.wait()
        assert llm.stats.compilations == {"warmup": NUM_PROGRAMS}
        before = compile_events()["compilations"]
        drive(llm._engine, varied_workload(12))
        assert compile_events()["compilations"] == before


def test_programs_are_compiled_while_the_weights_are_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the weights come only when every program is compiled."""
    load_weights = build.load_weights
    ready = []

    def slow(built: build.Built, use_tqdm: bool) -> None:
        built.runner.programs.wait()
        ready.append(built.runner.programs.num_ready)
        load_weights(built, use_tqdm)

    monkeypatch.setattr(build, "load_weights", slow)
    with LLM(str(directory), **SIZES) as llm:
        assert ready == [NUM_PROGRAMS]
        before = compile_events()["compilations"]
        llm.generate([[5, 6, 7]], greedy_params(5), use_tqdm=False)
        assert compile_events()["compilations"] == before
        names = [span.name for span in llm.timeline.spans]
        assert names == ["device", "weights", "waiting for programs", "allocating"]
        assert llm.programs.lower_seconds > 0 and llm.programs.compile_seconds > 0


def test_the_declared_weights_are_those_that_are_loaded(directory: Path) -> None:
    """The cache is sized, and programs are compiled, by the declared shapes."""
    with LLM(str(directory), enforce_eager=True, **SIZES) as llm:
        arrays = llm._runner._params.values()
        rounded = sum(-(-array.nbytes // 256) * 256 for array in arrays)
        assert llm.memory.weights == rounded > 0


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_what_cannot_be_loaded_stops_what_was_started(
    what: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    start_compiling = build.start_compiling

    def noted(one: build.Built, everything: bool) -> None:
        built.append(one)
        start_compiling(one, everything)

    def damaged(*_: object) -> None:
        raise CheckpointError("the weights are damaged")

    monkeypatch.setattr(build, "start_compiling", noted)
    monkeypatch.setattr(build, "load_weights", damaged)
    options = SIZES | {"skip_tokenizer_init": what == "weights", "tokenizer": "no/such/place"}
    message = "the weights are damaged" if what == "weights" else "No tokenizer could be loaded"
    with pytest.raises(CheckpointError, match=message):
        LLM(str(directory), **options)
    assert not any(thread.is_alive() for thread in built[0].runner.programs._threads)
    assert built[0].runner.programs.num_ready == 0


@pytest.mark.parametrize("everything", [True, False])
def test_before_the_weights_are_there_all_or_the_urgent_programs_are_compiled(
    everything: bool,
) -> None:
    asked: list[bool] = []
    runner = SimpleNamespace(start_compiling=asked.append)
    for config in (EngineConfig(), EngineConfig(enforce_eager=True)):
        built: Any = SimpleNamespace(config=config, runner=runner)
        build.start_compiling(built, everything)
    assert asked == [everything]


def test_garbage_collection_is_as_before_after_starting(directory: Path) -> None:
    before = gc.get_threshold()
    with LLM(str(directory), enforce_eager=True, **SIZES):
        assert gc.get_threshold() == before


def test_closing_during_background_warm_up_does_not_hang(directory: Path) -> None:
    llm = LLM(str(directory), warmup="background", **SIZES)
    llm.close()
    assert not llm.config.enforce_eager


def test_warmup_has_two_modes(directory: Path) -> None:
    with pytest.raises(ConfigError, match='warmup=\'some\' must be "full" or "background"'):
        LLM(str(directory), warmup="some", **SIZES)


PROGRAM = """
import json, sys
import jax.numpy as jnp
(jnp.ones(3) * 2).block_until_ready()  # JAX was used before, without a cache
from jaxserve import LLM
from jaxserve.engine.programs import compile_events
from jaxserve.model import decoder
directory, *caches = sys.argv[1:]
hits = []
for number, cache in enumerate(caches):
    if cache in caches[:number]:
        decoder.forward = None  # nothing is to be traced again
    before = compile_events()["cache_hits"]
    sizes = dict(max_num_seqs=1, max_num_batched_tokens=8, skip_tokenizer_init=True)
    with LLM(directory, use_tqdm=False, compilation_cache_dir=cache, **sizes) as llm:
        hits.append(compile_events()["cache_hits"] - before)
print(json.dumps(hits))
"""


def test_programs_are_kept_for_the_next_engine_and_the_next_process(
    tmp_path: Path,
) -> None:
    """Two engines in a process, the second with a cache folder of its own, then a new process."""

    def hits(*caches: Path) -> list[int]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("JAX_COMPILATION_CACHE")
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(directory), *map(str, caches)],
            env=environment | {"XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    directory = make_llama(tmp_path / "llama", num_hidden_layers=1)
    num_programs = 2 + 3 + 3  # forward for two buckets of one lane; what chooses; the rest
    one, two = tmp_path / "one", tmp_path / "two"
    first = hits(one, two, two)
    assert first[:2] == [0, 0]
    assert first[2] >= num_programs - 2  # JAX itself remembers those that have no model in them
    assert any(one.iterdir())
    assert any(two.iterdir())
    assert hits(one)[0] >= num_programs
    assert one.stat().st_mode & 0o077 == 0
