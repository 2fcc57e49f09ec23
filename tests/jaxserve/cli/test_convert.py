"""Conversion to Orbax: the same model comes back, and nobody's files are lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.__main__ import main
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.engines import greedy_params, small_llm

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("convert") / "source", dtype="bfloat16")


def tokens(directory: Path) -> list[int]:
    """What the model goes on with."""
    with small_llm(directory) as llm:
        return llm.generate(PROMPT, greedy_params(8))[0].outputs[0].token_ids


def test_the_converted_model_generates_the_same(source, tmp_path, capsys) -> None:
    target = tmp_path / "new" / "converted"
    assert main(["convert", str(source), str(target), "-tp", "2"]) == 0
    assert f"{target}: " in capsys.readouterr().out
    assert tokens(target) == tokens(source)
    assert [path.name for path in target.parent.iterdir()] == ["converted"]

    assert main(["convert", str(source), str(target)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(["convert", str(source), str(target), "--overwrite", "--dtype", "float32"]) == 0
    assert "float32 weights" in capsys.readouterr().out


def test_overwrite_deletes_nothing_but_checkpoints_of_ours(source, tmp_path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    assert main(["convert", str(source), str(tmp_path), "--overwrite"]) == 2
    assert "no Orbax checkpoint of ours" in capsys.readouterr().err
    for target in (source, source.parent):
        assert main(["convert", str(source), str(target), "--overwrite"]) == 2
    assert (tmp_path / "thesis.txt").exists() and (source / "config.json").exists()


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, capsys) -> None:
    assert main(["convert", str(tmp_path / "missing"), str(tmp_path / "target")]) == 1
    assert not list(tmp_path.iterdir())
