"""Where the time from a new process to its first token goes.

    python -m jaxserve.bench.startup '{"model": null}'

is the measured process: its argument holds LLM's keyword arguments, its last line of output the
result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil

from jaxserve.errors import JaxserveError

PROMPT = [1, 2, 3, 4]


class StartupError(JaxserveError):
    """The measured process failed."""


def measure(arguments: dict[str, Any], warm_too: bool) -> dict[str, dict[str, Any]]:
    """Starts processes and collects what they say; see ``run``.

    Args:
        arguments: of LLM, ``warmup`` included. With a ``compilation_cache_dir``, one process uses
            that as it is.
        warm_too: start a second process, which finds the programs of the first.

    Returns:
        Results by the state of the cache: "empty" and "warm", or "given".

    Raises:
        StartupError: a process failed.
    """
    if arguments.get("compilation_cache_dir") is not None:
        return {"given": _child(arguments)}
    with tempfile.TemporaryDirectory(prefix="jaxserve-cache-") as cache:
        arguments = arguments | {"compilation_cache_dir": cache}
        return {name: _child(arguments) for name in ("empty", "warm")[: 1 + warm_too]}


def _child(arguments: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "jaxserve.bench.startup", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise StartupError(f"the measured process failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine in this process and generates one token.

    Returns:
        total: seconds from the process's start to the token. complete: and to the last program,
        which may come later (``warmup="background"``). stages: name, start and seconds of
        each; they overlap. programs, cache_hits: how many programs there are, and how many JAX
        found in its cache, small ones of its own included. lower_seconds, compile_seconds: of
        those programs, summed over the threads that made them.
    """
    # The system counts from 1970, we from an arbitrary moment.
    born = time.perf_counter() - (time.time() - psutil.Process().create_time())
    begun = time.perf_counter()
    from jaxserve.engine.programs import compile_events
    from jaxserve.llm import LLM
    from jaxserve.sampling.params import SamplingParams

    imported = time.perf_counter()
    compile_events()
    spans = [("python", born, begun), ("import", begun, imported)]
    with LLM(**arguments, use_tqdm=False) as llm:
        ready = time.perf_counter()
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
        end = time.perf_counter()
        programs = llm.programs
        if not llm.config.enforce_eager:
            programs.wait()
        complete = time.perf_counter()
        spans += [(span.name, span.start, span.end) for span in llm.timeline.spans]
        spans.append(("first step", ready, end))
        return {
            "total": end - born,
            "complete": complete - born,
            "stages": [
                {"name": name, "start": start - born, "seconds": stop - start}
                for name, start, stop in sorted(spans, key=lambda span: span[1])
            ],
            "programs": programs.num_ready,
            "cache_hits": compile_events()["cache_hits"],
            "lower_seconds": programs.lower_seconds,
            "compile_seconds": programs.compile_seconds,
        }


if __name__ == "__main__":
    # Errors belong into one line, which the parent shows.
    try:
        print(json.dumps(run(json.loads(sys.argv[1]))), flush=True)
    except JaxserveError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
