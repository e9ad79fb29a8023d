"""`python -m unigen_fast bench`: every row's forward + backward against eager PyTorch and `torch.compile`.

With `--all`, whole training steps as well.
"""

import argparse
import itertools
import json
import math
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import unigen_fast as uf
from unigen_fast import _checks, _command_line
from unigen_fast.bench import harness, report
from unigen_fast.bench import steps as training
from unigen_fast.bench.cases import ROWS, Row, describe_shapes

_DTYPES = ("float32", "bfloat16", "float16")


def _names(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                hint = _checks.did_you_mean(name, known) or f"; there are {', '.join(known)}"
                raise argparse.ArgumentTypeError(f"no {what} {name!r}{hint}")
        return names

    return parse


def _record(text: str) -> dict[str, Any]:
    """A run's figures, out of a file that `--json` wrote."""
    try:
        record = json.loads(Path(text).read_text())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from None
    except ValueError:
        record = None
    if not isinstance(record, dict) or "rows" not in record:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file that --json wrote")
    return record


def _parser() -> _command_line.Parser:
    parser = _command_line.Parser("bench", __doc__)
    parser.add_argument("--list", action="store_true", help="print the rows and the steps, and leave")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="the rows, and whole training steps")
    which.add_argument("--steps", action="store_true", help="whole training steps, and no rows")
    parser.add_argument("--rows", type=_names([*ROWS], "row"), default=[*ROWS], help="comma-separated (default: all)")
    parser.add_argument(
        "--dtype", type=_names(_DTYPES, "dtype"), help="comma-separated (default: float32; on a GPU bfloat16 as well)"
    )
    parser.add_argument(
        "--device", type=_command_line.device, choices=("cpu", "cuda"), help="default: cuda if there is one"
    )
    several = _command_line.number(int, "an integer >= 1", lambda n: n >= 1)
    parser.add_argument("--threads", type=several, help="CPU threads of PyTorch (default: its own choice)")
    seconds = _command_line.number(float, "a number >= 0", lambda x: 0 <= x < math.inf)
    parser.add_argument(
        "--seconds", type=seconds, default=2.0, help="time for each row or step, beside compilation (default: 2)"
    )
    parser.add_argument(
        "--passes",
        type=several,
        default=1,
        help="a row's time is spread over so many passes through the table, with new tensors: how far their ratios are "
        "apart is part of its spread (default: 1)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--json", type=_command_line.output_file, metavar="PATH", help="write the figures, after every row and step"
    )
    parser.add_argument(
        "--plot", type=_command_line.output_file, metavar="PATH", help="draw the ratios (needs matplotlib)"
    )
    parser.add_argument(
        "--compare",
        type=_record,
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


def _check_picture(parser: _command_line.Parser, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        known = ", ".join(f".{name}" for name in sorted(formats))
        parser.error(f"argument --plot: got {str(path)!r}, expected a file name with one of {known}")


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
        text, agree = report.comparison(*options.compare)
        print(text)
        return 0 if agree else 1
    if options.readme is not None:
        for place in report.update_readme(options.readme):
            print(place)
        return 0
    if options.steps and options.plot is not None:
        parser.error("--plot draws rows, and --steps measures none")
    if options.plot is not None:
        parser.require(["matplotlib"], "bench")
        _check_picture(parser, options.plot)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = options.dtype or list(_DTYPES[: 1 if device.type == "cpu" else 2])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    record = new_record(device, options.seconds, options.passes)

    def keep(kind: str, figures: dict[str, Any], line: str) -> None:
        record[kind].append(figures)
        _command_line.print_above(line)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    print(report.machine(record))
    if not options.steps:
        print(report.heading(record), flush=True)
        jobs = list(itertools.product(dtypes, options.rows))
        found: dict[tuple[str, str], list[dict[str, Any]]] = {job: [] for job in jobs}
        for number in range(1, options.passes + 1):
            if number < options.passes:
                print(f"pass {number} of {options.passes}: the figures follow with the last", flush=True)
            title = f"pass {number} of {options.passes}" if options.passes > 1 else "rows"
            for dtype, name in _command_line.progress(jobs, title, name=lambda job: f"{job[1]} ({job[0]})"):
                of_row = found[dtype, name]
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
        steps = [step for step in training.STEPS.values() if not (step.one_graph and options.no_compile)]
        for step in _command_line.progress(steps, "steps", name=lambda step: step.name):
            figures = training.measure(step, device, options.seconds, not options.no_compile)
            keep("steps", figures, report.step_line(figures))
        print(report.steps_closing(record))
    if options.plot is not None:
        report.plot(record, options.plot)
    return 1 if any(figures["error"] is not None for figures in record["rows"] + record["steps"]) else 0
