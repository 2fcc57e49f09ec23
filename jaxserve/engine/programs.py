"""Compiles a known set of programs in threads, the most urgent first."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.engine.stats import Stats
from jaxserve.errors import EngineClosedError

Lower = Callable[[], "jax.stages.Lowered"]
Progress = Callable[[int, int], None]

FAIR_INTERVAL = 2e-4
"""Seconds that a thread keeps the interpreter from others, see ``_FairThreads``."""


def compilation_cache_dir() -> str | None:
    """Where JAX keeps compiled programs in this process; None if it keeps none."""
    return getattr(jax.config, "jax_compilation_cache_dir", None)


def compilation_cache_path(directory: str | None) -> Path:
    """Where compiled programs are kept: in a directory that is named, where JAX was told to, or in
    the user's cache folder."""
    directory = directory or compilation_cache_dir()
    if directory:
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxserve" / "xla"


def use_compilation_cache(directory: str | None) -> None:
    """Keeps compiled programs of this process in a directory, for the next one to find.

    A directory that JAX was already told of, by its own setting or variable, is left as it is. The
    default lies in the user's cache folder. Whoever can write to it can make us run code: it must
    belong to the user alone.
    """
    if directory is None and compilation_cache_dir():
        return
    path = compilation_cache_path(directory)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if compilation_cache_dir() not in (None, str(path)):
        compilation_cache.reset_cache()  # else JAX goes on with the directory it used first
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs count too: dozens of them make a cold start slow.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compiler_options() -> dict[str, Any]:
    """What XLA's compiler is asked for on this platform.

    On GPUs, not to try out kernels: that takes most of a start, memory beside the KV cache, and
    chooses differently from start to start. cuBLAS's own choice is as fast for many rows, and the
    products of few rows are ours (``fused_linear``).
    """
    if jax.default_backend() != "gpu":
        return {}
    return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@functools.cache
def compile_events() -> Counter[str]:
    """Running counts of this process's "compilations" and "cache_hits", as JAX reports them."""
    counts: Counter[str] = Counter()

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts["compilations"] += 1

    def on_event(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            counts["cache_hits"] += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    return counts


class _FairThreads:
    """While anyone is in it, a thread that wants the interpreter gets it soon. Whoever calls JAX
    gives it away and takes it back all the time, and would each time wait for the usual interval
    while another thread traces: weights took 11 s to load instead of 2.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._usual = threading.Lock(), 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(FAIR_INTERVAL)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                sys.setswitchinterval(self._usual)


FAIR_THREADS = _FairThreads()


class Programs:
    """A fixed set of programs by key.

    Compiling goes on in background threads from ``start`` on, in the given order. A caller that
    needs a program that isn't ready compiles it itself, or waits for the thread that does.
    Only one is traced and lowered at a time: that is Python, and threads that fight for the
    interpreter's lock would hold up the most urgent program, and the steps of who serves already.

    Args:
        lowerings: key -> a function that traces and lowers the program.
        stats: counts compilations, as "warmup" once started, else as "late", and who waits for one.
        on_demand: the same for programs that are compiled only when somebody needs them, "late".
        options: of XLA's compiler, by name.

    Attributes:
        lower_seconds, compile_seconds: what tracing and lowering, and compiling or reading from the
            cache, took so far, summed over the threads.
    """

    def __init__(
        self,
        lowerings: Mapping[Hashable, Lower],
        stats: Stats,
        on_demand: Mapping[Hashable, Lower] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._lowerings = lowerings
        self._on_demand = dict(on_demand or {})
        self._waiting_for_demand = set(self._on_demand)
        self._stats = stats
        self._options = dict(options or {})
        self._tracing = threading.Lock()
        self.lower_seconds = self.compile_seconds = 0.0
        self._left = dict.fromkeys(lowerings)
        self._queue: list[Hashable] = []
        self._ready: dict[Hashable, jax.stages.Compiled] = {}
        self._errors: dict[Hashable, BaseException] = {}
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._num_working = 0
        self._started = False

    def start(self, keys: Iterable[Hashable] | None = None, threads: int | None = None) -> None:
        """Starts compiling programs in the background, those of ``keys`` or all, unless that was
        asked for before; by default with half the cores, since XLA's compiler runs threads of its
        own."""
        with self._changed:
            asked = self._left if keys is None else keys
            wanted = [key for key in dict.fromkeys(asked) if key in self._left]
            for key in wanted:
                del self._left[key]
            self._queue += wanted
            self._started = True
            most = threads or max(1, min(8, (os.cpu_count() or 1) // 2))
            new = max(0, min(most - self._num_working, len(wanted)))
            self._num_working += new
        for _ in range(new):
            thread = threading.Thread(target=self._work, name="jaxserve-compile", daemon=True)
            thread.start()
            self._threads.append(thread)

    def ready(self, key: Hashable) -> bool:
        """Whether ``get`` would return at once."""
        return key in self._ready

    def get(self, key: Hashable) -> Any:
        """The compiled program, compiled now if need be. Raises what compiling it raised."""
        program = self._ready.get(key)
        if program is not None:
            return program
        with self._changed:
            mine = key in self._queue or key in self._left or key in self._waiting_for_demand
            if key in self._queue:
                self._queue.remove(key)
            self._left.pop(key, None)
            self._waiting_for_demand.discard(key)
            self._stats.waiting_for_programs += 1
        if mine:
            self._compile(key)
        with self._changed:
            self._changed.wait_for(lambda: key in self._ready or key in self._errors)
            self._stats.waiting_for_programs -= 1
        if key in self._errors:
            raise self._errors[key]
        return self._ready[key]

    def wait(self, progress: Progress | None = None) -> None:
        """Waits until every program is ready; calls progress(done, total) as they become so."""
        total, shown = len(self._lowerings), -1
        while True:
            with self._changed:
                done = len((self._ready.keys() | self._errors) & self._lowerings.keys())
                if done == shown and done < total:
                    self._changed.wait(1.0)
                    continue
            shown = done
            if progress is not None:
                progress(done, total)
            if self._errors:
                raise next(iter(self._errors.values()))
            if done == total:
                return

    def close(self) -> None:
        """Drops what isn't compiled yet, and the programs."""
        with self._changed:
            self._queue.clear()
            self._left.clear()
        for thread in self._threads:
            thread.join()
        with self._changed:
            self._ready.clear()
            closed = EngineClosedError("this engine was closed; make a new one")
            self._waiting_for_demand.clear()
            # Else get would wait for ever.
            self._errors = dict.fromkeys(self._lowerings.keys() | self._on_demand, closed)
            self._changed.notify_all()

    @property
    def num_ready(self) -> int:
        """How many programs are compiled."""
        return len(self._ready)

    @property
    def temp_bytes(self) -> int:
        """Most scratch memory that a compiled program takes on a device, in bytes."""
        sizes = [
            getattr(p.memory_analysis(), "temp_size_in_bytes", 0) for p in self._ready.values()
        ]
        return max(sizes, default=0)

    def _work(self) -> None:
        with FAIR_THREADS:
            while True:
                with self._changed:
                    if not self._queue:
                        self._num_working -= 1
                        return
                    key = self._queue.pop(0)
                self._compile(key)

    def _compile(self, key: Hashable) -> None:
        try:
            with self._tracing:
                start = time.perf_counter()
                lowered = (self._on_demand.get(key) or self._lowerings[key])()
                between = time.perf_counter()
            program = lowered.compile(self._options)
        except BaseException as error:
            with self._changed:
                self._errors[key] = error
                self._changed.notify_all()
            return
        with self._changed:
            self._ready[key] = program
            self.lower_seconds += between - start
            self.compile_seconds += time.perf_counter() - between
            kind = "warmup" if self._started and key not in self._on_demand else "late"
            self._stats.compilations[kind] = self._stats.compilations.get(kind, 0) + 1
            self._changed.notify_all()
