"""What the README promises is what is there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from jaxserve.__main__ import COMMANDS, make_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def marked(name: str) -> str:
    """The command in the code block after a mark, as `.ci/run` finds it."""
    found = re.search(rf"^<!-- {name} -->\n```bash\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)
    assert found, f"no code block is marked {name}"
    return found[1]


def flags_of(command: str) -> set[str]:
    """The long flags that a subcommand knows."""
    parser = make_parser()._subcommands_action._name_parser_map[command]
    return {flag for action in parser._actions for flag in action.option_strings}


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_set_up_commands_are_single_lines_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:25])
    for name, last in (("run", "jaxserve generate"), ("test", "pytest")):
        command = marked(name)
        assert "\n" not in command and command in first_screen
        assert command.split(" && ")[-1].startswith(last)


def test_the_test_command_installs_torch_first_in_the_version_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = [each for each in project["optional-dependencies"]["test"] if "torch" in each]
    steps = marked("test").split(" && ")
    assert steps == [f"pip install {torch}", 'pip install -e ".[dev]"', "pytest"]


def test_ci_takes_its_commands_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "^<!-- test -->$" in script and "pip install torch" not in script
    checks = ["ruff check", "ruff format --check", "mypy", "pytest"]
    assert " && ".join(checks) in README
    for check in checks:
        assert f"\n{check}" in script


def test_the_run_command_is_one_that_the_parser_takes() -> None:
    words = shlex.split(marked("run").split(" && ")[-1])
    assert make_parser().parse_args(words[1:]).generate.prompt == "Once upon a time"


def test_commands_and_flags_in_the_tables_exist() -> None:
    rows = re.findall(r"^\| (`.*?) \| ", README, re.MULTILINE)
    commands = set(re.findall(r"`jaxserve ([\w-]+)", "\n".join(rows)))
    assert commands == set(COMMANDS)
    named = set(re.findall(r"`(--[\w-]+)`", "\n".join(rows)))
    assert named and named <= flags_of("generate")


def test_extras_and_linked_files_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(re.findall(r'"\.\[(\w+)\]"', README))
    assert extras and extras <= project["optional-dependencies"].keys()
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    import jaxserve
    from jaxserve.llm import LLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Its model would be downloaded; the demo model stands in for it.
    stand_in = lambda model: LLM(enforce_eager=True, max_num_seqs=2, use_tqdm=False)  # noqa: E731
    monkeypatch.setattr(jaxserve, "LLM", stand_in, raising=False)
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("['")
