"""House rules that can be read off the source: who imports whom, and what must not stand there."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxserve", "pallas_kernels", "converters", "server")

# --- Who may import whom. The standard library is free for all; a name includes what lies below it,
# --- but "jaxserve" is only the package's own face. The longest matching name decides.

JAX = ("jax", "numpy", "ml_dtypes")
BASICS = ("jaxserve.errors", "jaxserve.log")
ARGUMENTS = (*BASICS, "jaxserve.sampling.params", "jaxserve.engine.request")
TOKENIZERS = ("numpy", "tokenizers", "transformers", "jinja2", "huggingface_hub")
BRAIN = (
    *ARGUMENTS,
    *(
        f"jaxserve.engine.{name}"
        for name in ("admission", "core", "decision", "page_allocator", "page_tables")
    ),
    *(f"jaxserve.engine.{name}" for name in ("running", "scheduler", "stats", "step_size")),
    *(f"jaxserve.engine.{name}" for name in ("stop", "waiting")),
    "numpy",
)
BODY = (*JAX, *BASICS, "flax", "pallas_kernels")
MODEL = ("jaxserve.model", "jaxserve.quant", "jaxserve.distributed")
DOOR = tuple(
    f"jaxserve.engine.{name}"
    for name in ("batch", "lowered", "memory", "programs", "prompt_reads", "runner", "step")
)
BEHIND_THE_DOOR = (
    *(*DOOR, *BRAIN, *BODY, *MODEL),
    *("jaxserve.sampling", "jaxserve.config", "jaxserve.files", "psutil"),
)
ANYTHING = ("*",)
FRONT_END = (
    *(*ARGUMENTS, "jaxserve", "jaxserve.config", "jaxserve.tokenizer", "jaxserve.outputs"),
    *("jaxserve.beam_search", "jaxserve.chat_templates", "jaxserve.engine.admission", "server"),
    *("aiohttp", "msgpack", "orjson", "prometheus_client"),
)
"""What speaks HTTP; the engine runs in another process, and only there may JAX be loaded."""

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "jaxserve": (
        *(*ARGUMENTS, "jaxserve.llm", "jaxserve.config", "jaxserve.outputs"),
        "jaxserve.beam_search",
    ),
    "jaxserve.errors": (),
    "jaxserve.log": (),
    "jaxserve.files": (),
    "jaxserve.sampling.checks": ("jaxserve.errors",),
    "jaxserve.sampling.params": ("jaxserve.errors", "jaxserve.sampling.checks"),
    "jaxserve.engine.request": ("jaxserve.errors", "jaxserve.sampling.params"),
    "jaxserve.config": (*ARGUMENTS, "numpy", "pallas_kernels.dispatch"),
    "jaxserve.compat": (*BASICS, "jaxserve.config"),
    "jaxserve.chat_templates": BASICS,
    "jaxserve.vocab": (*BASICS, *TOKENIZERS, "jaxserve.chat_templates", "jaxserve.vocab"),
    "jaxserve.tokenizer": (
        *(*ARGUMENTS, *TOKENIZERS, "jaxserve.sampling.checks"),
        *("jaxserve.chat_templates", "jaxserve.vocab"),
    ),
    "jaxserve.prompts": ("jaxserve.errors", "jaxserve.tokenizer"),
    "jaxserve.beam_search": (*ARGUMENTS, "jaxserve.sampling.checks", "jaxserve.outputs"),
    "jaxserve.outputs": (*ARGUMENTS, "jaxserve.engine.stop", "jaxserve.tokenizer"),
    "jaxserve.generations": (
        *("jaxserve.engine.core", "jaxserve.engine.request", "jaxserve.errors", "tqdm"),
        *("jaxserve.outputs", "jaxserve.prompts", "jaxserve.sampling.params", "jaxserve.tokenizer"),
    ),
    "jaxserve.distributed": (*BASICS, *JAX),
    "jaxserve.quant": (*BODY, "jaxserve.quant"),
    "jaxserve.model": (*BODY, *MODEL),
    "jaxserve.kernels": (*BODY, *MODEL),
    "jaxserve.sampling": (*BODY, "jaxserve.sampling"),
    "jaxserve.engine": BRAIN,
    **dict.fromkeys(DOOR, BEHIND_THE_DOOR),
    "jaxserve.demo": (*JAX, "optax", "tokenizers", "safetensors", "jaxserve.demo"),
    "jaxserve.build": ANYTHING,
    "jaxserve.plan": ANYTHING,
    "jaxserve.llm": ANYTHING,
    "jaxserve.__main__": ANYTHING,
    "jaxserve.cli": ANYTHING,
    "jaxserve.bench": ANYTHING,
    "pallas_kernels": ("jax", "numpy", "pallas_kernels"),
    "pallas_kernels.lab": ("jax", "numpy", "pallas_kernels", "matplotlib"),
    "converters": (
        *(*JAX, *BASICS, *MODEL, "jaxserve.config", "converters"),
        *("safetensors", "huggingface_hub", "modelscope", "orbax"),
    ),
    "server": FRONT_END,
    "server.engine_loop": (*FRONT_END, "jaxserve.engine"),
    "server.engine_main": (*FRONT_END, "jaxserve.engine"),
    "server.engine_process": ANYTHING,
    "server.front_end": (*FRONT_END, "jaxserve.demo"),
    "server.protocol.json_body": (*FRONT_END, "numpy"),
    "server.__main__": ("jaxserve.__main__",),
}
LOADS_WITHOUT_JAX = (
    *("jaxserve.engine.scheduler", "jaxserve.engine.page_allocator", "jaxserve.engine.request"),
    *("jaxserve.engine.core", "jaxserve.engine.stop", "jaxserve.sampling.params"),
)
"""Modules of the engine that a process without an accelerator can use."""


class Import(NamedTuple):
    """One module named by one import statement."""

    importer: str
    imported: str
    line: int


def below(module: str, name: str) -> bool:
    """Whether the module is ``name`` or lies below it; only itself is below "jaxserve"."""
    return module == name or (name != "jaxserve" and module.startswith(name + "."))


def rule_of(module: str) -> tuple[str, ...]:
    """What the module may import."""
    names = [name for name in MAY_IMPORT if below(module, name)]
    return MAY_IMPORT[max(names, key=len)] if names else ()


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of each module of the packages."""
    trees = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def is_package(module: str) -> bool:
    return (ROOT / Path(*module.split(".")) / "__init__.py").exists()


def imports_of(importer: str, tree: ast.AST) -> list[Import]:
    """All imports, those inside functions included.

    ``from a import b`` names the module a.b where our packages have one or where a is not ours;
    else it names a.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(importer, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package(importer)
                parts = importer.split(".")
                base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = base.split(".")[0] in PACKAGES
                named = full if full in modules() or not ours else base
                found.append(Import(importer, named, node.lineno))
    return found


@functools.cache
def all_imports() -> list[Import]:
    """The imports of all modules of the packages."""
    return [item for name, tree in modules().items() for item in imports_of(name, tree)]


def allowed(item: Import) -> bool:
    """Whether the table allows the import."""
    rule = rule_of(item.importer)
    standard = item.imported.split(".")[0] in sys.stdlib_module_names
    return standard or rule == ANYTHING or any(below(item.imported, name) for name in rule)


def test_every_module_has_a_room() -> None:
    """A new module next to the rooms needs a line in MAY_IMPORT."""
    assert [name for name in modules() if not any(below(name, room) for room in MAY_IMPORT)] == []


def test_modules_import_only_what_their_room_may() -> None:
    wrong = [
        f"{item.importer}:{item.line} imports {item.imported}"
        for item in all_imports()
        if not allowed(item)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "verdict"),
    [
        ("jaxserve.errors", "enum", True),
        ("jaxserve.errors", "numpy", False),
        ("jaxserve.engine.scheduler", "jaxserve.engine.stats", True),
        ("jaxserve.engine.scheduler", "jax.numpy", False),
        ("jaxserve.engine.scheduler", "jaxserve.engine.runner", False),
        ("jaxserve.engine.core", "jaxserve.engine.runner", False),
        ("jaxserve.engine.runner", "jaxserve.model.decoder", True),
        ("jaxserve.model.decoder", "jaxserve.engine.request", False),
        ("jaxserve.model.decoder", "jaxserve", False),
        ("jaxserve.sampling.stages", "jax", True),
        ("jaxserve.sampling.params", "jax", False),
        ("pallas_kernels.dispatch", "jaxserve.errors", False),
        ("converters.rules", "jaxserve.model.config", True),
        ("converters.rules", "jaxserve.engine.core", False),
        ("server.app", "jaxserve", True),
        ("server.app", "jaxserve.engine.core", False),
        ("server.app", "jaxserve.build", False),
        ("server.front_end", "jax", False),
        ("server.engine_process", "jaxserve.build", True),
        ("jaxserve.demo.train", "jaxserve.engine.core", False),
        ("jaxserve.llm", "converters", True),
    ],
)
def test_the_table_says_what_it_should(importer: str, imported: str, verdict: bool) -> None:
    assert allowed(Import(importer, imported, 1)) is verdict


def test_imports_are_found_wherever_they_stand() -> None:
    code = (
        "import jax.numpy as jnp\n"
        "from . import scheduler\n"
        "from ..errors import ConfigError\n"
        "def function():\n"
        "    from jax.experimental import pallas\n"
    )
    found = {item.imported for item in imports_of("jaxserve.engine.core", ast.parse(code))}
    assert found == {
        *("jax.numpy", "jaxserve.engine.scheduler", "jaxserve.errors"),
        "jax.experimental.pallas",
    }


def test_there_are_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for item in all_imports():
        if item.imported in graph and item.imported != item.importer:
            graph[item.importer].add(item.imported)
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the cycle


def test_the_brain_loads_without_jax() -> None:
    code = (
        f"import sys, {', '.join(LOADS_WITHOUT_JAX)}\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'transformers', 'tokenizers', 'aiohttp'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_pallas_is_used_only_in_pallas_kernels() -> None:
    pallas = "jax.experimental.pallas"
    users = {item.importer for item in all_imports() if below(item.imported, pallas)}
    assert {name for name in users if not below(name, "pallas_kernels")} == set()


def test_no_function_rebinds_a_global() -> None:
    wrong = [
        f"{name}:{node.lineno} global {', '.join(node.names)}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert not wrong, "\n".join(wrong)


def source_files() -> list[Path]:
    """Text files of the repository, without hidden and generated folders."""
    files = []
    for path in ROOT.rglob("*"):
        folders = path.relative_to(ROOT).parts[:-1]
        generated = any(part.startswith(".") or part in ("build", "dist") for part in folders)
        if path.suffix in (".py", ".md", ".toml") and not generated:
            files.append(path)
    return files


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    private = re.compile(r"(?<![\w.])/(work|root)/")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in source_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private.search(line)
    ]
    assert not wrong, "\n".join(wrong)
