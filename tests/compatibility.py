"""One wheel under several Pythons and torches, each in an environment of its own; writes docs/compatibility.md.

    python tests/compatibility.py dist/unigen_fast-….whl python3.10=2.10.0 python3.12=2.13.0 …

Of each pair: which layers are loaded, the sixteen numeric checks, a part of the suite, and three small losses against
eager PyTorch with the autograd node as the wheel has it and with that of `python -m unigen_fast build`.
"""

import argparse
import json
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
LOSSES = ("logits_64", "gaussian_kl_tiny", "iwae_loss_50")
SUITE = ("test_likelihood.py", "test_random.py", "test_info.py")


def run(folder: Path, *command: str, timeout: int = 3600) -> str:
    """Standard output and error, from a folder in which no checkout lies."""
    finished = subprocess.run(
        [str(folder / "bin" / "python"), *command], cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    return finished.stdout + finished.stderr


def ratios(folder: Path) -> str:
    """Eager PyTorch's time over the fused one, of each loss."""
    figures = folder / "bench.json"
    run(
        folder,
        *"-m unigen_fast bench --no-compile --seconds 3 --rows".split(),
        ",".join(LOSSES),
        "--json",
        str(figures),
    )
    rows = json.loads(figures.read_text())["rows"]
    return ", ".join(f"{row['ratio']:.2f}" for row in rows)


def measured(wheel: Path, python: str, torch: str) -> list[str]:
    folder = ROOT / "build" / "compat" / f"{Path(python).name}-torch{torch}"
    if not folder.exists():  # one that is there has the gigabytes of its torch
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    needs = ["numpy", "pytest", "scipy", "mpmath", "mlxtend", "pytest-benchmark", "setuptools>=77", "ninja"]
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, f"torch=={torch}", *needs], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", str(wheel)], check=True)
    info = run(folder, "-m", "unigen_fast", "info")
    loaded = re.findall(r"^(\w+) +yes", info, re.MULTILINE)
    checks = re.findall(r"(\d+ of \d+) right", run(folder, str(ROOT / "tests" / "numeric_checks.py")))
    tests = [str(ROOT / "tests" / name) for name in SUITE]
    suite = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests).strip().splitlines()[-1]
    without = ratios(folder)
    run(folder, "-m", "unigen_fast", "build")
    return [
        re.findall(r"Python (\S+),", info)[0],
        re.findall(r"torch (\S+),", info)[0],
        ", ".join(loaded),
        *checks,
        re.sub(r" in [\d.]+s.*", "", suite),
        without,
        ratios(folder),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="PYTHON=TORCH")
    options = parser.parse_args()
    heading = ["Python", "torch", "loaded", "numeric checks", "tests", "without node", "with node"]
    rows = [heading, ["---"] * len(heading)]
    for pair in options.pairs:
        python, _, torch = pair.partition("=")
        rows.append(measured(options.wheel.resolve(), python, torch))
        print(" | ".join(rows[-1]), flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    today = datetime.now(timezone.utc).date()
    PAGE.write_text(
        f"""# One wheel for every Python and torch

`make compat` installed the same wheel, `{options.wheel.name}`, beside each of these, on {today}.
"Tests" is a part of the suite ({", ".join(SUITE)}). The last two columns are eager PyTorch's time over
that of the fused loss, for {", ".join(LOSSES)} (medians of paired ratios): as the wheel comes,
with autograd's node in Python, and after `python -m unigen_fast build`, which builds it in C++ for the torch that is
installed.

{table}
"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
