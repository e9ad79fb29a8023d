"""Trains the same two networks as GAN, IWGAN, VAE and AAVAE on real digits, with one loop, and compares them.

`python -m unigen_fast demo`. Start reading at `train.py`: the four models and the loop.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

REQUIRED = ("mlxtend", "matplotlib", "tqdm")  # the demo's only: imported when it runs


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"the demo needs {', '.join(missing)}: pip install unigen_fast[demo]")
    from unigen_fast.demo.run import run

    run(arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m unigen_fast demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="directory of pictures and figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the numbers of training steps")
    parser.add_argument("--test-digits", type=int, default=1000, help="held-out digits, a multiple of 10, at most 1000")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    if arguments.steps_scale <= 0:
        parser.error(f"--steps-scale: got {arguments.steps_scale}, expected a number > 0")
    if arguments.test_digits % 10 or not 10 <= arguments.test_digits <= 1000:
        parser.error(f"--test-digits: got {arguments.test_digits}, expected a multiple of 10 from 10 to 1000")
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but PyTorch sees no GPU")
    return arguments
