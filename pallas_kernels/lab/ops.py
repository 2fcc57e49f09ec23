"""The ops and implementations that the lab knows, and how an implementation is called."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pallas_kernels.workload import Cost, LayerShape

OPS = (
    "add_rms_norm",
    "decode_attention",
    "decode_layer",
    "expert_ffn",
    "fused_linear",
    "latent_attention",
    "paged_attention",
    "rope_kv_write",
    "route_experts",
    "truncation_threshold",
)
CHOICE = "implementation"
"""The argument of an op that its implementations don't have."""
DTYPE_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """One op, as its folder describes it: ``api.py``, ``reference.py`` and ``cases.py``.

    Attributes:
        name: of the folder, and of the functions in it.
        parameters: the op's arguments by name, the optional ones too.
        implementations: name -> function, in the order of preference.
        reference: the implementation that the others are compared with, in wider floats.
        cases: small ones that together reach every path of a kernel.
        benchmarks: shapes of real models.
        make: (case, seed) -> the op's arguments by name, random.
        cost: case -> what a call can't do without.
        tolerance: case -> largest relative error of an output, as a ratio of Euclidean norms.
        specified: (case, arguments) -> per output a mask over its leading axes, or None for all:
            the places whose content the op promises. Elsewhere an output may hold anything that is
            finite where the reference's is.
        poison: (case, arguments) -> the arguments with NaN where no implementation may read.
        gate_cases: layer -> the cases to pass before a model with such layers uses a kernel.
        carried: argument -> index of the output that may take over its buffer.
        widens: whether the reference takes float64 where the op takes less.
        promised: (case, output) -> what of an output's content is promised, where that isn't all.
        fresh: arguments that must differ between equal calls of one program, lest XLA merge them.
    """

    name: str
    parameters: tuple[str, ...]
    implementations: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    cases: Sequence[Any]
    benchmarks: Sequence[Any]
    make: Callable[[Any, int], Arguments]
    cost: Callable[[Any], Cost]
    tolerance: Callable[[Any], float]
    specified: Callable[[Any, Arguments], tuple[np.ndarray | None, ...] | None]
    poison: Callable[[Any, Arguments], Arguments]
    gate_cases: Callable[[LayerShape], Sequence[Any]]
    carried: Mapping[str, int]
    fresh: tuple[str, ...]
    widens: bool
    promised: Callable[[Any, jax.Array], jax.Array]

    def find_cases(self, benchmarks: bool, pattern: str = "*") -> list[Any]:
        """The case or benchmark of that name, or those that match the pattern or hold it as a
        part of their names."""
        cases = self.benchmarks if benchmarks else self.cases
        named = [case for case in cases if case.name == pattern]
        if named:
            return named
        pattern = pattern if "*" in pattern else f"*{pattern}*"
        return [case for case in cases if fnmatch.fnmatchcase(case.name, pattern)]


@functools.cache
def find_op(name: str) -> Op:
    """The op of that name.

    Raises:
        LookupError: there is none.
    """
    if name not in OPS:
        raise LookupError(f"there is no op {name!r}; there are {', '.join(OPS)}")
    api, reference, cases = (
        importlib.import_module(f"pallas_kernels.{name}.{part}")
        for part in ("api", "reference", "cases")
    )
    return Op(
        name,
        parameters=tuple(
            p for p in inspect.signature(getattr(api, name)).parameters if p != CHOICE
        ),
        implementations=api.IMPLEMENTATIONS,
        reference=getattr(reference, name),
        cases=cases.CASES,
        benchmarks=cases.BENCHMARKS,
        make=cases.make,
        cost=cases.cost,
        tolerance=getattr(cases, "tolerance", _dtype_tolerance),
        specified=getattr(cases, "specified", lambda case, arguments: None),
        poison=getattr(cases, "poison", lambda case, arguments: arguments),
        gate_cases=getattr(cases, "gate_cases", lambda layer: cases.CASES),
        carried=getattr(cases, "CARRIED", {}),
        fresh=getattr(cases, "FRESH", ()),
        widens=getattr(cases, "WIDENS", True),
        promised=getattr(cases, "promised", lambda case, output: output),
    )


def _dtype_tolerance(case: Any) -> float:
    return DTYPE_TOLERANCES[getattr(case, "dtype", "float32")]


@dataclass(frozen=True)
class Candidate:
    """An implementation with or without a configuration of its own: what is checked and timed.

    Attributes:
        name: a name of the op's ``IMPLEMENTATIONS``, or "module:function".
        function: it.
        config: what to pass as ``config``; None passes nothing.
    """

    name: str
    function: Callable[..., Any]
    config: Any = None

    @property
    def spec(self) -> str:
        """The text that ``find_candidate`` reads back."""
        return self.name if self.config is None else f"{self.name}@{json.dumps(self.settings)}"

    @property
    def settings(self) -> dict[str, Any] | None:
        """The configuration as plain data."""
        return None if self.config is None else self.config._asdict()

    def lacks(self, op: Op) -> list[str]:
        """The op's arguments that the function doesn't take."""
        parameters = inspect.signature(self.function).parameters
        if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            return []
        return [name for name in op.parameters if name not in parameters]

    def tunable(self) -> bool:
        """Whether its module says what there is to choose."""
        module = inspect.getmodule(self.function)
        return hasattr(module, "candidates") and hasattr(module, "tuning_key")

    def tuning_key(self, arguments: Arguments) -> str:
        """The name of these arguments' shapes in the tables; for tunable ones only."""
        return inspect.getmodule(self.function).tuning_key(**arguments)  # type: ignore[union-attr]

    def configured(self, arguments: Arguments) -> Iterable[Candidate]:
        """Itself with each configuration worth trying; for tunable ones only."""
        module = inspect.getmodule(self.function)
        for config in module.candidates(**arguments):  # type: ignore[union-attr]
            yield Candidate(self.name, self.function, config)

    def bind(self, interpret: bool) -> Callable[..., Any]:
        """The function to call with the op's arguments.

        Args:
            interpret: runs a Pallas kernel, which has an argument of this name, on a CPU.
        """
        options = {} if self.config is None else {"config": self.config}
        if interpret and "interpret" in inspect.signature(self.function).parameters:
            options["interpret"] = True
        return functools.partial(self.function, **options)


def find_candidate(op: Op, spec: str) -> Candidate:
    """The implementation that a text names: ``name``, ``module:function``, or either with
    ``@{"field": value, ...}``, a configuration.

    Raises:
        LookupError: there is no such implementation, module or function, or it has no such
            configuration.
    """
    name, _, settings = spec.partition("@")
    if name in op.implementations:
        function = op.implementations[name]
    elif ":" in name:
        function = _imported(name)
    else:
        known = ", ".join(op.implementations)
        raise LookupError(f"{op.name} has no implementation {name!r}: use {known} or module:name")
    if not settings:
        return Candidate(name, function)
    try:
        config = inspect.getmodule(function).Config(**json.loads(settings))  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError) as error:
        message = f"{name} of {op.name} takes no configuration {settings}: {error}"
        raise LookupError(message) from error
    return Candidate(name, function, config)


def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that ours imports
        raise LookupError(f"no module {module!r}; is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise LookupError(f"module {module!r} has no function {attribute!r}") from error
    if not callable(function):
        raise LookupError(f"{name} is no function")
    return function


def split_static(arguments: Arguments) -> tuple[Arguments, Arguments]:
    """(arrays and what holds them, everything else) of an op's arguments."""

    def dynamic(value: Any) -> bool:
        leaves = jax.tree.leaves(value)
        return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)

    arrays = {name: value for name, value in arguments.items() if dynamic(value)}
    return arrays, {name: v for name, v in arguments.items() if name not in arrays}
