"""The private names of torch in `unigen_fast/_private.py`: what each is for goes on without it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import unigen_fast

WITHOUT = Path(__file__).with_name("without_private_names.py")


@pytest.mark.parametrize("disabled", ["", "autograd", "cpu,autograd"], ids=["all", "Python's node", "no kernels"])
def test_each_private_name_can_go(disabled: str) -> None:
    done = subprocess.run([sys.executable, str(WITHOUT), disabled], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert len(done.stdout.splitlines()) == 11, done.stdout


def test_private_names_are_in_one_place() -> None:
    """`torch._C` and the like, in code: strings and the benchmark's compiler counters apart."""
    private = re.compile(r"\b(torch|forward_ad)\._[A-Za-z]\w*")
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(unigen_fast.__file__).parent.rglob("*.py")
        if path.name != "_private.py"
        for line in path.read_text().splitlines()
        if private.search(line)
    ]
    assert found == []
