"""The tensors of a mixture of experts as published files have them: one for each expert."""

from __future__ import annotations

from collections.abc import Callable

from tests.helpers.families import Shapes


def tensor_per_expert(
    gate: str, up: str, down: str, rename: Callable[[str], str] = lambda name: name
) -> Callable[[Shapes], Shapes]:
    """From the shapes of transformers' modules, which fuse all experts of a layer.

    Args:
        gate, up, down: names of an expert's matrices.
        rename: applied to every name besides.
    """

    def published(shapes: Shapes) -> Shapes:
        split: Shapes = {}
        for name, shape in shapes.items():
            stem, _, last = rename(name).rpartition(".")
            if last == "gate_up_proj":
                count, rows, columns = shape
                parts = {gate: (rows // 2, columns), up: (rows // 2, columns)}
            elif last == "down_proj":
                count, *rest = shape
                parts = {down: tuple(rest)}
            else:
                split[rename(name)] = shape
                continue
            for expert in range(count):
                for part, part_shape in parts.items():
                    split[f"{stem}.{expert}.{part}.weight"] = part_shape
        return split

    return published


qwen_names = tensor_per_expert("gate_proj", "up_proj", "down_proj")
