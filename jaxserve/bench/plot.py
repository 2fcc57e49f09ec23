"""Draws what was measured. Needs matplotlib: ``pip install "jaxserve[bench]"``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.bench.results import Result, Results, number
from jaxserve.bench.sweep import Curve, Point
from jaxserve.errors import ConfigError

OURS = "jaxserve"
COLORS = {OURS: "#2563eb", "floor": "#a3a3a3"}
OTHERS = ("#f59e0b", "#10b981", "#8b5cf6", "#ef4444")
DPI = 150


def _pyplot() -> Any:
    """matplotlib without a window."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            'drawing needs matplotlib: pip install "jaxserve[bench]" (or pip install matplotlib)'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check() -> None:
    """Checks that drawing is possible, before hours of measuring.

    Raises:
        ConfigError: matplotlib is missing.
    """
    _pyplot()


def bars(results: Results, path: Path) -> None:
    """Bars of ours, the peers and the floor: a row of panels per model, a panel per work.

    Raises:
        ConfigError: there are no results, or matplotlib is missing.
    """
    pyplot = _pyplot()
    if not results.results:
        raise ConfigError("there are no results to draw.")
    models = list(dict.fromkeys(result.model for result in results.results))
    works = list(dict.fromkeys(result.work for result in results.results))
    names = list(dict.fromkeys(name for result in results.results for name in result.peers))
    size = (2.1 * len(works) + 0.6, 2.3 * len(models) + 0.7)
    figure, grid = pyplot.subplots(len(models), len(works), figsize=size, squeeze=False)
    by_place = {(result.model, result.work): result for result in results.results}
    for row, model in enumerate(models):
        for column, work in enumerate(works):
            result = by_place.get((model, work))
            if result is None:
                grid[row][column].axis("off")
            else:
                _panel(grid[row][column], result, names)
        grid[row][0].set_ylabel(model, fontweight="bold")
    colors = {OURS: COLORS[OURS], **_colors(names), "floor": COLORS["floor"]}
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="upper center", ncols=len(colors), frameon=False)
    figure.supxlabel(", ".join(filter(None, (results.machine, results.date))), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _colors(names: Sequence[str]) -> dict[str, str]:
    return {name: OTHERS[index % len(OTHERS)] for index, name in enumerate(names)}


def _panel(axes: Any, result: Result, names: Sequence[str]) -> None:
    values = {OURS: result.ours, **{n: result.peers[n] for n in names if n in result.peers}}
    if result.floor is not None:
        values["floor"] = result.floor
    colors = COLORS | _colors(names)
    drawn = axes.bar(range(len(values)), values.values(), color=[colors[n] for n in values])
    axes.bar_label(drawn, [number(value) for value in values.values()], fontsize=7)
    axes.set_title(f"{result.work}\n{result.unit}, {result.better} is better", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(y=0.15)
    axes.spines[["top", "right", "left"]].set_visible(False)


def curve(
    points: Sequence[Point], varied: str, title: str, peers: dict[str, Curve], path: Path
) -> None:
    """Tokens per second against milliseconds per token, a mark for each point.

    Args:
        points: ours, with the floor as a dashed line where they have one.
        varied: the attribute of a point that its mark shows.
        title: above the picture.
        peers: other engines' curves.
        path: where the picture goes; its ending says in which format.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    x, y = [p.ms_per_token for p in points], [p.tokens_per_second for p in points]
    axes.plot(x, y, "o-", color=COLORS[OURS], label=OURS)
    for point in points:
        place = (point.ms_per_token, point.tokens_per_second)
        text = str(getattr(point, varied))
        axes.annotate(text, place, textcoords="offset points", xytext=(5, -9), fontsize=7)
    for name, color in _colors(list(peers)).items():
        axes.plot(*zip(*peers[name]), "s-", color=color, label=name)
    floors = [(p.floor_ms_per_token, p) for p in points if p.floor_ms_per_token is not None]
    if floors:
        rates = [p.batch_size / ms * 1e3 for ms, p in floors]
        axes.plot([ms for ms, _ in floors], rates, "--", color=COLORS["floor"], label="floor")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("ms per token (of one request)")
    axes.set_ylabel("generated tokens per second")
    axes.set_title(f"{title}; the marks are {varied.replace('_', ' ')}s", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
