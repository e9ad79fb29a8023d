"""Trains the same two networks as GAN, IWGAN, VAE and AAVAE on real digits, with one loop, and compares them.

`python -m unigen_fast demo`. Start reading at `train.py`: the four models and the loop.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from unigen_fast import _command_line

REQUIRED = ("mlxtend", "matplotlib")  # the demo's only: imported when it runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    parser.require(REQUIRED, "demo")
    _make_directory(parser, arguments.output)
    from unigen_fast.demo.run import run

    run(arguments)
    return 0


def _parser() -> _command_line.Parser:
    parser = _command_line.Parser("demo", __doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="directory of pictures and figures")
    seed = _command_line.number(int, "an integer of 64 bits", lambda n: -(2**63) <= n < 2**64)
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    scale = _command_line.number(float, "a number > 0", lambda x: 0 < x < math.inf)
    parser.add_argument("--steps-scale", type=scale, default=1.0, help="multiplies the numbers of training steps")
    digits = _command_line.number(int, "a multiple of 10 from 10 to 1000", lambda n: n in range(10, 1001, 10))
    parser.add_argument(
        "--test-digits", type=digits, default=1000, help="held-out digits, a multiple of 10, at most 1000"
    )
    parser.add_argument("--device", type=_command_line.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _make_directory(parser: _command_line.Parser, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: got {str(path)!r}, which cannot be made a directory: {error.strerror}")
    if not os.access(path, os.W_OK):
        parser.error(f"argument --output: got {str(path)!r}, which may not be written to")
