"""Parametrizes the tests of ``FamilyTests``, and notes what they have shown of a family."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.families import FamilyTests
from tests.jaxserve.conftest import _own_compilation_cache  # noqa: F401

FORMATS = ("bfloat16 safetensors", "float16 bin")
TABLES = {
    "case": "cases",
    "text_case": "text_cases",
    "parallel_case": "parallel_cases",
    "full_size": "full_sizes",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is None or not issubclass(metafunc.cls, FamilyTests):
        return
    for name, table in TABLES.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(getattr(metafunc.cls, table)))
    if "format_" in metafunc.fixturenames:
        metafunc.parametrize("format_", FORMATS)


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes that the running test shows something of an architecture: (architecture, what, how)."""

    def note(architecture: str, what: str, how: str = "") -> None:
        request.node.user_properties.append(("family", (architecture, what, how)))

    return note
