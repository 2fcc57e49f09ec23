"""Runs the `jaxserve` command in a process of its own, as on a machine without torch."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.patience import within

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"
CODE = WITHOUT_TORCH + "from jaxserve.__main__ import main; sys.exit(main())"


def environment() -> dict[str, str]:
    """One CPU device, and the test run's own folder of compiled programs."""
    changes = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    return os.environ | changes


def start(*words: str) -> subprocess.Popen[str]:
    """The command with pipes on all sides."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", CODE, *words]
    return subprocess.Popen(command, env=environment(), text=True, **pipes)


def run(*words: str, stdin: str = "") -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    with start(*words) as process:
        out, err = process.communicate(stdin, timeout=within(120))
    return process.returncode, out, err
