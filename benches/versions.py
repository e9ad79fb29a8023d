"""Times the benchmark's small rows in two checkouts: what a change costs where most of a step is the call itself.

    python benches/versions.py OTHER [--rows logits_64,…] [--bytes 65536] [--seconds 4]

Both have been built in place. Each runs in a process of its own, for an op is registered once in a process, and in
three of them, one after the other: how memory happens to lie in one is worth some hundredths. The two take turns,
samples of 3 ms, in the other order each round, and the one whose turn it is not waits. A ratio is the median over the
rounds of OTHER's time divided by this checkout's: above 1, this one is faster. It is no quotient of the medians printed
beside it.
"""

import argparse
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from unigen_fast.bench import harness
from unigen_fast.bench.cases import ROWS, Row

HERE = Path(__file__).resolve().parent.parent
SAMPLE = 3e-3  # seconds
PROCESSES = 3


def seconds(step: harness.Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def serve() -> None:
    """One checkout's process: a line with the name of a row prepares it, an empty line asks for a sample of it."""
    torch.set_num_threads(1)
    gc.disable()
    for line in sys.stdin:
        if name := line.strip():
            step = (case := harness.Case(ROWS[name], torch.device("cpu"), torch.float32)).step(case.row.fused)
            seconds(step, 20)
            calls = math.ceil(SAMPLE / seconds(step, 20))
            gc.collect()
        step()
        print(seconds(step, calls), flush=True)


class Checkout:
    """The process of one checkout."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str = "") -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def input_bytes(row: Row) -> int:
    return sum(4 * math.prod(item.shape) for item in row.inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the root of the other checkout")
    parser.add_argument("--rows", help="comma-separated (default: those whose inputs are small)")
    parser.add_argument("--bytes", type=int, default=65536, help="how large the inputs of a row may be, in float32")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row")
    arguments = parser.parse_args()
    small = [name for name, row in ROWS.items() if input_bytes(row) <= arguments.bytes]
    names = arguments.rows.split(",") if arguments.rows else small
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(PROCESSES):
        other, this = Checkout(arguments.other.resolve()), Checkout(HERE)
        for name in names:
            for checkout in (other, this):
                checkout.ask(name)
            deadline = time.perf_counter() + arguments.seconds / PROCESSES
            while time.perf_counter() < deadline:
                rounds[name].append((other.ask(), this.ask()))
                rounds[name].append((this.ask(), other.ask())[::-1])
        for checkout in (other, this):
            checkout.process.kill()
    print(f"{'row':28} {'other, µs':>10} {'this, µs':>10} {'ratio':>7}  quartiles")
    ratios = []
    for name, pairs in rounds.items():
        first, ratio, third = statistics.quantiles([before / now for before, now in pairs], n=4)
        ratios.append(ratio)
        before, now = (1e6 * statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"{name:28} {before:10.2f} {now:10.2f} {ratio:7.3f}  {first:.3f} to {third:.3f}")
    print(f"geometric mean {statistics.geometric_mean(ratios):.3f}, lowest {min(ratios):.3f}, of {len(ratios)} rows")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
