"""docs/models.md, made from what the families' tests have shown."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "docs" / "models.md"
LOADS, EQUALS, PARALLEL, SIZE, CHAT = (
    "loads",
    "equals its oracle",
    "tensor parallel",
    "tested size",
    "chat prompt",
)
HEAD = """# Models

Generated from the results of the tests: `pytest --write-models-doc` writes this file, and a run of
all tests fails if it is out of date.

Every architecture is tested with small random checkpoints in its own tensor names and odd shapes,
in float32, float16 and bfloat16, safetensors and `.bin`: logits within 1e-4 of their scale, and 64
greedy tokens with chunked prefill, prefix hits and preemption equal to the oracle's. The oracle is
`transformers` where it knows the architecture, else numpy arithmetic written from the published
description. "Tested sizes" are published configurations whose shapes load, prefill and decode,
with the sharding of several device counts. `jaxserve plan MODEL` says what a model takes.

| Architecture | Loads | Equals | Tensor parallel | Chat prompt | Tested sizes |
|---|---|---|---|---|---|
"""


class ModelsDoc:
    """A pytest plugin that gathers the notes of the fixture ``family``."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._notes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            if name == "family":
                architecture, what, how = value
                self._notes[architecture][what].append(how)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._notes or session.exitstatus != 0:
            return
        if self._config.getoption("write_models_doc"):
            PATH.write_text(self._render(), encoding="utf-8")
        elif self._complete() and PATH.read_text(encoding="utf-8") != self._render():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            reporter = self._config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line(
                "docs/models.md is out of date: run pytest --write-models-doc", red=True
            )

    def _complete(self) -> bool:
        """Whether all tests were asked for."""
        option = self._config.option
        last_failed = getattr(option, "lf", False)  # of a plugin that may be off
        chosen = option.keyword or option.markexpr or last_failed or option.deselect
        return self._config.args == self._config.getini("testpaths") and not chosen

    def _render(self) -> str:
        rows = []
        for architecture, notes in sorted(self._notes.items()):
            sizes = ", ".join(sorted(set(notes[SIZE]), key=_natural))
            rows.append(
                f"| {architecture} | {'yes' if notes[LOADS] else 'no'} "
                f"| {', '.join(sorted(set(notes[EQUALS]) - {''})) or 'no'} "
                f"| {'yes' if notes[PARALLEL] else 'no'} "
                f"| {', '.join(sorted(set(notes[CHAT]) - {''})) or 'its template'} "
                f"| {sizes} |"
            )
        return HEAD + "\n".join(rows) + "\n"


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sorts 7b before 13b."""
    parts, number = [], ""
    for character in name + " ":
        if character.isdigit() or (character == "." and number):
            number += character
        else:
            if number:
                parts.append((0, float(number.rstrip(".")), ""))
                number = ""
            parts.append((1, 0.0, character.lower()))
    return parts
