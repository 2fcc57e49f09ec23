"""The documents say what the code does."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from jaxserve.__main__ import make_parser
from jaxserve.cli import serve
from jaxserve.cli.flags import flag_of
from jaxserve.cli.serve_flags import NAMES
from server.auth import OPEN_ROUTES
from server.config import ServerConfig
from tests.helpers import flag_docs

ROOT = Path(__file__).resolve().parents[2]
DOCS = {name: (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("server", "security")}


def test_the_tables_of_flags_are_those_of_the_parser() -> None:
    """`python -m tests.helpers.flag_docs` writes them anew."""
    assert flag_docs.with_tables(DOCS["server"]) == DOCS["server"]


@pytest.mark.parametrize("name", DOCS)
def test_flags_that_are_named_exist(name: str) -> None:
    text = re.sub(r"<!-- vllm -->.*?<!-- end -->", "", DOCS[name], flags=re.DOTALL)
    known = set(serve.make_parser()._option_string_actions)
    actions = make_parser()._subcommands_action._name_parser_map
    known |= set(actions["complete"]._option_string_actions)
    known |= set(actions["bench"]._commands()["serve"]._option_string_actions)
    known.add("--print-completion")
    assert set(re.findall(r"`[^`\n]*?(--[a-z][\w-]+)", text)) - known == set()


def test_every_limit_is_described() -> None:
    limits = [
        NAMES.get(field.name, (flag_of(field.name),))[0]
        for field in dataclasses.fields(ServerConfig)
        if field.name.startswith("max_") or field.name.endswith("_timeout_s")
    ]
    described = DOCS["security"] + DOCS["server"].partition("## Flags")[0]
    assert [flag for flag in limits if f"`{flag}`" not in described] == []


def test_the_open_routes_are_named() -> None:
    (paragraph,) = re.findall(r"^Open without a key: .*$", DOCS["security"], re.MULTILINE)
    assert set(re.findall(r"`(/[\w.]*)`", paragraph)) == set(OPEN_ROUTES)


def test_the_example_file_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS["server"], re.DOTALL)
    (tmp_path / "server.yaml").write_text(text)
    words = serve.arrange(["--config", str(tmp_path / "server.yaml")], {})
    args = serve.make_parser().parse_args(words)
    assert (args.served_model_name, args.max_model_len) == (["qwen", "default"], 8192)


def test_the_commands_at_the_top_are_understood() -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", DOCS["server"], re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    served = [words[1:] for words in commands if words[0] == "jaxserve"]
    assert len(served) == 2
    for words in served:
        make_parser().parse_args(words)
