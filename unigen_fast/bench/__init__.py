"""`python -m unigen_fast bench`: every row's forward + backward against eager PyTorch and `torch.compile`.

With `--all`, whole training steps as well.
"""

import argparse
import itertools
import json
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import unigen_fast as uf
from unigen_fast.bench import harness, report
from unigen_fast.bench import steps as training
from unigen_fast.bench.cases import ROWS, Row, describe_shapes

_DTYPES = ("float32", "bfloat16", "float16")


def _names(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {what} {name!r}; there are {', '.join(known)}")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unigen_fast bench", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the rows and the steps, and leave")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="the rows, and whole training steps")
    which.add_argument("--steps", action="store_true", help="whole training steps, and no rows")
    parser.add_argument("--rows", type=_names([*ROWS], "row"), default=[*ROWS], help="comma-separated (default: all)")
    parser.add_argument(
        "--dtype", type=_names(_DTYPES, "dtype"), help="comma-separated (default: float32; on a GPU bfloat16 as well)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time for each row or step, beside compilation (default: 2)"
    )
    parser.add_argument(
        "--passes",
        type=int,
        default=1,
        help="a row's time is spread over so many passes through the table, with new tensors: how far their ratios are "
        "apart is part of its spread (default: 1)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures, after every row and step")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the ratios (needs matplotlib)")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar="PATH",
        help="measure nothing: whether two runs' ratios agree within their spread",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="?",
        const=Path("README.md"),
        metavar="PATH",
        help="measure nothing: bring README.md's and docs/'s figures up to date with benches/results/*.json",
    )
    return parser


def new_record(device: torch.device, seconds: float, passes: int = 1) -> dict[str, Any]:
    """All of a run's figures but its rows and steps."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {"type": device.type, "name": harness.device_name(device)},
        "threads": torch.get_num_threads(),
        "versions": {
            "unigen_fast": uf.__version__,
            "torch": torch.__version__,
            "triton": triton and triton.__version__,
            "python": platform.python_version(),
        },
        "kernels": [str(backend) for backend in uf.info().backends],
        "seconds_per_row": seconds,
        "passes": passes,
        "copy_bandwidth": harness.copy_bandwidth(device),
        "rows": [],
        "steps": [],
    }


def _list(rows: Sequence[Row]) -> None:
    width = max(len(row.name) for row in rows)
    for row in rows:
        shapes = describe_shapes([item.shape for item in row.inputs])
        print(f"{row.name:<{width}}  {row.family:<12} {shapes:<32} {row.replaces}")
    for step in training.STEPS.values():
        print(f"{step.name:<{width}}  {step.stands_for}: {step.sizes}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row or a step has an error."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        _list(list(ROWS.values()))
        return 0
    if options.compare is not None:
        text, agree = report.comparison(*(json.loads(path.read_text()) for path in options.compare))
        print(text)
        return 0 if agree else 1
    if options.readme is not None:
        for place in report.update_readme(options.readme):
            print(place)
        return 0
    if options.passes < 1:
        parser.error(f"--passes: got {options.passes}, expected 1 or more")
    if options.steps and options.plot is not None:
        parser.error("--plot draws rows, and --steps measures none")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = options.dtype or list(_DTYPES[: 1 if device.type == "cpu" else 2])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    record = new_record(device, options.seconds, options.passes)

    def keep(kind: str, figures: dict[str, Any], line: str) -> None:
        record[kind].append(figures)
        print(line, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    print(report.machine(record))
    if not options.steps:
        print(report.heading(record), flush=True)
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(1, options.passes + 1):
            if number < options.passes:
                print(f"pass {number} of {options.passes}: the figures follow with the last", flush=True)
            for dtype, name in itertools.product(dtypes, options.rows):
                of_row = found.setdefault((dtype, name), [])
                if not (of_row and harness.once_is_enough(of_row[-1])):
                    seconds = options.seconds / options.passes
                    compiled = not options.no_compile
                    kind = getattr(torch, dtype)
                    of_row.append(
                        harness.measure(ROWS[name], device, kind, seconds, compiled, record["copy_bandwidth"])
                    )
                if number == options.passes:
                    row = harness.merged(of_row)
                    keep("rows", row, report.line(record, row))
        print(report.closing(record))
    if options.all or options.steps:
        print(report.steps_heading(), flush=True)
        for step in training.STEPS.values():
            if step.one_graph and options.no_compile:
                continue
            figures = training.measure(step, device, options.seconds, not options.no_compile)
            keep("steps", figures, report.step_line(figures))
        print(report.steps_closing(record))
    if options.plot is not None:
        report.plot(record, options.plot)
    return 1 if any(figures["error"] is not None for figures in record["rows"] + record["steps"]) else 0
