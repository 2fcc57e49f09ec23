"""The lab's command line."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.lab import gates, measure, report
from pallas_kernels.lab.measure import Setting
from pallas_kernels.lab.ops import OPS, Candidate, Op, find_candidate, find_op
from pallas_kernels.lab.report import Row
from pallas_kernels.lab.timing import Ceilings

SPEC = 'a name, module:function, or either with @{"field": value}, a configuration'


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        "python -m pallas_kernels.lab",
        description="Kernel research: gates, timing against measured ceilings, tuning.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="ops, their implementations and cases").set_defaults(run=_list)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    check = add("check", _check, "run the gates")
    take = add("time", _time, "run the gates, then take times")
    tune = add("tune", _tune, "find the best configurations and enter them into the table")
    compare = add("compare", _compare, "time B against A, alternating")
    for command in (check, take):
        command.add_argument("ops", metavar="OP", nargs="*", help="by default all")
    for command in (tune, compare):
        command.add_argument("op", metavar="OP")
    compare.add_argument("a", metavar="A", help=SPEC)
    compare.add_argument("b", metavar="B", help=SPEC)
    for command in (check, take, tune):
        command.add_argument(
            "--implementation", metavar="SPEC", action="append", help=f"{SPEC}; may be repeated"
        )
    for command in (check, take, tune, compare):
        text = "a name, a part of names, or a pattern; may be repeated"
        command.add_argument("--cases", metavar="NAME", action="append", help=f"small: {text}")
        command.add_argument("--benchmarks", metavar="NAME", action="append", help="real, likewise")
        command.add_argument("--seed", type=int, help="of the inputs; a new one by default")
        command.add_argument("--out", type=Path, metavar="DIR", help="for the JSON, table, picture")
        command.add_argument(
            "--budget", type=float, default=float("inf"), metavar="S", help="seconds to spend"
        )
    for command, default in ((take, 15), (tune, 5), (compare, 25)):
        command.add_argument("--repeats", type=int, default=default, metavar="N", help="samples")
    tune.add_argument("--tuned", type=Path, default=tuning.FOLDER, metavar="DIR", help="the tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code, 1 where something failed its gates."""
    args = make_parser().parse_args(argv)
    sys.path.insert(0, os.getcwd())  # so that module:function finds a file that lies here
    try:
        return args.run(args)
    except LookupError as error:
        print(f"pallas_kernels.lab: {error}", file=sys.stderr)
        return 2


def _list(_: argparse.Namespace) -> int:
    for name in OPS:
        op = find_op(name)
        tunable = [n for n in op.implementations if find_candidate(op, n).tunable()]
        print(f"{name}: {', '.join(op.implementations)}  (tunable: {', '.join(tunable) or 'none'})")
        for kind, cases in (("cases", op.cases), ("benchmarks", op.benchmarks)):
            print(f"  {kind}: {'; '.join(case.name for case in cases)}")
    return 0


def _check(args: argparse.Namespace) -> int:
    seed = _seed(args)
    interpret = jax.default_backend() == "cpu"

    def check(op: Op, candidate: Candidate, case: Any) -> Row:
        verdict = gates.check(op, candidate, case, seed, interpret)
        return report.row("check", op, candidate, case, seed, verdict)

    jobs = list(_jobs(args, benchmarks=False))
    threads = max(1, min(8, (os.cpu_count() or 2) // 2))  # most of the time goes into compiling
    return _finish(args, _work(args, jobs, check, threads), None)


def _time(args: argparse.Namespace) -> int:
    setting = _setting(args)

    def take(op: Op, candidate: Candidate, case: Any) -> Row:
        return measure.time_case(op, candidate, case, setting)

    jobs = list(_jobs(args, benchmarks=True))
    return _finish(args, _work(args, jobs, take), setting.ceilings)


def _compare(args: argparse.Namespace) -> int:
    setting, op = _setting(args), find_op(args.op)
    a, b = find_candidate(op, args.a), find_candidate(op, args.b)

    def compare(op: Op, a: Candidate, case: Any) -> Row:
        return measure.compare_case(op, a, b, case, setting)

    jobs = [(op, a, case) for case in _cases(args, op, benchmarks=True)]
    return _finish(args, _work(args, jobs, compare), setting.ceilings)


def _tune(args: argparse.Namespace) -> int:
    setting, op = _setting(args), find_op(args.op)
    jobs = list(_jobs(args, benchmarks=True))
    for _, candidate, _ in jobs:
        if not candidate.tunable():
            raise LookupError(f"{candidate.name} has no candidates() and tuning_key() to tune by")
    end, rows = time.monotonic() + args.budget, []
    for index, (op, candidate, case) in enumerate(jobs):
        share = max(0.0, end - time.monotonic()) / (len(jobs) - index)
        key, tried = measure.tune_case(op, candidate, case, setting, share)
        path = measure.save_winner(args.tuned, key, tried)
        best = tried[0]
        print(f"{op.name} {candidate.name} {case.name} [{key}]: {best['status']} {best['config']}")
        print(f"  {len(tried)} tried; {f'entered into {path}' if path else 'nothing entered'}")
        _keep(args, tried)
        rows += tried
    return _finish(args, rows, setting.ceilings)


Job = tuple[Op, Candidate, Any]


def _jobs(args: argparse.Namespace, benchmarks: bool) -> Iterable[Job]:
    """What the arguments ask for: each case of each implementation of each op."""
    names = [args.op] if "op" in args else args.ops or OPS
    for op in map(find_op, names):
        for spec in args.implementation or op.implementations:
            candidate = find_candidate(op, spec)
            for case in _cases(args, op, benchmarks):
                yield op, candidate, case


def _cases(args: argparse.Namespace, op: Op, benchmarks: bool) -> list[Any]:
    if args.cases is None and args.benchmarks is None:
        return op.find_cases(benchmarks)
    small = [case for name in args.cases or () for case in op.find_cases(False, name)]
    real = [case for name in args.benchmarks or () for case in op.find_cases(True, name)]
    return list(dict.fromkeys(small + real))


def _work(
    args: argparse.Namespace,
    jobs: Sequence[Job],
    work: Callable[[Op, Candidate, Any], Row],
    threads: int = 1,
) -> list[Row]:
    """A row for each job that the budget allows, printed as it comes."""
    end, rows = time.monotonic() + args.budget, []

    def timed(job: Job) -> Row | None:
        start = time.monotonic()
        return work(*job) | {"took": time.monotonic() - start} if start < end else None

    with ThreadPoolExecutor(threads) as pool:
        for row in pool.map(timed, jobs):
            if row is not None:
                rows.append(row)
                _keep(args, [row])
                print(report.line(row), flush=True)
    if len(rows) < len(jobs):
        print(f"out of time: {len(jobs) - len(rows)} of {len(jobs)} left undone")
    return rows


def _keep(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    if args.out is not None:
        report.append(args.out, rows)


def _finish(args: argparse.Namespace, rows: Sequence[Row], ceilings: Ceilings | None) -> int:
    if args.out is not None:
        report.write(args.out, rows, ceilings)
    print(f"\n{report.table(rows, ceilings)}")
    if not rows:
        raise LookupError("no such case; see the command list")
    failed = [one for one in rows if one["status"] == "failed"]
    for one in failed:
        print(f"failed: {one['repro']}")
    return 1 if failed and args.command != "tune" else 0


def _seed(args: argparse.Namespace) -> int:
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    print(f"seed {seed} on {tuning.device_kind()}, JAX {jax.__version__}")
    return seed


def _setting(args: argparse.Namespace) -> Setting:
    seed = _seed(args)
    ceilings = Ceilings.measure()
    print(report.describe(ceilings), flush=True)
    return Setting(ceilings, seed, args.repeats, interpret=jax.default_backend() == "cpu")


if __name__ == "__main__":
    sys.exit(main())
