"""Pictures: that they are drawn, with what they should show; their looks are for people."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from jaxserve.bench import plot
from jaxserve.bench.results import Result, Results
from jaxserve.bench.sweep import Point
from jaxserve.errors import ConfigError

RESULTS = Results(
    (
        Result("big", "latency", "ms/token", "lower", 4.5, 3.9, {"Peer A": 4.96, "Peer B": 4.82}),
        Result("big", "rate", "tok/s", "higher", 10_075, 12_844, {"Peer A": 9_382}),
        Result("small", "latency", "ms/token", "lower", 1.17),
    ),
    machine="a machine",
    date="2026-11-21",
)
POINTS = [Point(1, 16, 8, 0.1, 80, 12.5, 3.0), Point(4, 16, 8, 0.12, 266, 15.0, 3.5)]


def text_of(path: Path) -> str:
    """The words of an SVG picture; matplotlib keeps them in comments."""
    content = path.read_text()
    assert content.rstrip().endswith("</svg>")
    return content


def test_bars_show_ours_the_peers_and_the_floor(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.bars(RESULTS, tmp_path / "bars.svg")
    text = text_of(tmp_path / "bars.svg")
    for words in ("jaxserve", "Peer A", "Peer B", "floor", "4.82", "10,075", "12,844", "1.17"):
        assert f"<!-- {words} -->" in text
    for words in ("big", "small", "latency", "ms/token, lower is better", "a machine, 2026-11-21"):
        assert f"<!-- {words} -->" in text


def test_pictures_can_be_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.bars(RESULTS, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_shows_points_peers_and_floor(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peers = {"Peer A": [(20.0, 50.0), (30.0, 100.0)]}
    plot.curve(POINTS, "batch_size", "a model", peers, tmp_path / "curve.svg")
    text = text_of(tmp_path / "curve.svg")
    for words in ("jaxserve", "Peer A", "floor", "1", "4", "a model; the marks are batch sizes"):
        assert f"<!-- {words} -->" in text


def test_no_results_are_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no results to draw"):
        plot.bars(Results(()), tmp_path / "bars.png")


def test_without_matplotlib_there_is_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return importing(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r'pip install "jaxserve\[bench\]"'):
        plot.check()
