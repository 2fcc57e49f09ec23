"""The command line as a user meets it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from jaxserve.__main__ import COMMANDS, main
from tests.helpers.patience import within
from tests.jaxserve.cli.command import run, start

HEAVY = {"jax", "jaxlib", "flax", "torch", "transformers", "tokenizers", "numpy"}


def test_help_loads_nothing_heavy_and_names_every_command() -> None:
    code = (
        "import sys\nfrom jaxserve.__main__ import main\n"
        f"for words in (['--help'], *([name, '--help'] for name in {list(COMMANDS)})):\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        f"print('LOADED', sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")
    for text in (*COMMANDS, "--max-model-len N", "-tp N", "--temperature X", "--overwrite"):
        assert text in done.stdout
    for text in ("null", "<class", "type:", "print_config", "``"):
        assert text not in done.stdout


def test_generate_writes_text_to_stdout_and_figures_to_stderr() -> None:
    words = ("generate", "Once upon a time", "--temperature", "0", "--max_tokens", "8")
    code, out, err = run(*words)
    assert code == 0, err
    assert len(out.strip()) > 8
    assert "output 8 tokens" in err and "tok/s" in err
    assert "after the command started" in err and "peak memory: host" in err
    assert (code, out) == run("generate", *words[2:], stdin="Once upon a time\n")[:2]


def test_ctrl_c_stops_generating_without_a_traceback() -> None:
    with start("generate", "One", "--ignore-eos", "--max-tokens", "2000") as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=within(60))
    assert process.returncode == 130
    assert "stopped" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a command: generate, chat"),
        (["generat"], "invalid choice: 'generat'"),
        (["generate", "a", "--max-model-len", "x"], "--max-model-len must be an integer, got 'x'"),
        (["generate", "a", "--temprature", "1"], "did you mean --temperature?"),
        (["generate", "a", "--temperature", "9"], "temperature must be from 0 to 2, got 9"),
        (["generate", "a", "--block_size=5"], "block_size=5 must be 8, 16"),
        (["generate", "a", "--load-format", "x"], "invalid choice: 'x'"),
        (["chat", "--top-p", "0"], "top_p must be greater than 0"),
        (["convert", "a"], "required: dst"),
    ],
)
def test_a_wrong_command_line_gets_one_clear_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err and "<class" not in captured.err


def test_our_own_errors_are_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--model", "no/such/model"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxserve generate: 'no/such/model' is neither") and err.count("\n") == 1
