"""The matrix function × feature of docs/framework.md: its rows and columns, what a cell may say, and who fills it.

A test of `test_framework.py` under `@feature(name, cases)` shows that the feature works with the function of each case:
the same numbers as a plain call. Where PyTorch cannot give them, `REFUSED` says which error there is instead, and the
same test shows that. Each run so checks the cells one by one, in whatever process and whatever part of the suite;
the table is written, and only then, of a run that has an outcome for every cell and no failure.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases.base import Case

import unigen_fast as uf

TABLE = Path(__file__).parents[1] / "docs" / "framework.md"
# the public functions that take tensors
FUNCTIONS = [name for name in uf.__all__ if inspect.isfunction(getattr(uf, name)) and name not in ("info", "checked")]

# name of the column -> what its tests show
FEATURES: dict[str, str] = {
    "compile": '`torch.compile(fullgraph=True)`: one graph, none more for other numbers (`backend="aot_eager"`; a few '
    "also with Inductor); noise is that of the eager call",
    "dynamic shapes": "compiled once for a batch marked dynamic, of 32 and then of 33",
    "autocast, CPU": "under `torch.autocast` to bf16 and fp16, of fp32 and of 16-bit tensors: the numbers that there "
    "are without it, to the bit",
    "autocast, CUDA": "the same on a GPU",
    "func.grad": "`torch.func.grad`",
    "func.vmap": '`torch.vmap` of the value and of `torch.func.grad`, `randomness="same"`',
    "func.jacrev": "`torch.func.jacrev`",
    "functional_call": "a module trained by `torch.func.functional_call` and `torch.func.grad`",
    "func.jvp": "`torch.func.jvp`; what is detached has no tangent",
    "forward_ad": "`torch.autograd.forward_ad`, outside `torch.func`",
    "export": "`torch.export`, saved and loaded: the program's numbers and gradients are the module's",
    "checkpoint": "`torch.utils.checkpoint`, non-reentrant: gradients to the bit, noise drawn again",
    "reentrant checkpoint": "the same with `use_reentrant=True`",
    "DTensor": "replicated and sharded `DTensor`s: a call gathers its inputs, and every process has the whole result",
    "pickle, deepcopy": "of the function's module in `uf.nn`",
    "CUDA graph": "captured and replayed on other numbers; the noise moves on",
    "CUDA stream": "on a stream that is not the default one",
    "second GPU": "tensors on a device that is not the current one",
}
# what a column says where its tests were skipped
NOT_RUN = {
    "autocast, CUDA": "not run: no GPU",
    "CUDA graph": "not run: no GPU",
    "CUDA stream": "not run: no GPU",
    "second GPU": "not run: no second GPU",
}


class Refusal(NamedTuple):
    """The error that a feature raises by design, and what to do instead."""

    error: type[Exception]
    match: str
    instead: str


_NO_EXPORT = Refusal(
    RuntimeError,
    "torch.export keeps no gradients within its graph",
    "`torch.export` takes a gradient within its graph for a constant; export the discriminator, and add the penalty in "
    "the training step.",
)
_R1_NEEDS_A_GRAPH = Refusal(
    ValueError,
    "got no graph",
    "`r1_penalty` differentiates logits that exist already, and here they have no graph; "
    "`gradient_penalty(discriminator=…, real=x, fake=x, weight=gamma / 2, target=0)` takes the discriminator itself.",
)
_R1_COMPILED = Refusal(
    torch._dynamo.exc.Unsupported,
    r"torch\.autograd\.grad",
    "the compiler takes `torch.autograd.grad` into its graph only with `torch._dynamo.config.trace_autograd_ops`, of "
    "torch 2.13; `gradient_penalty` compiles as it is.",
)
_DREG_FORWARD = Refusal(
    RuntimeError,
    "got forward-mode AD, expected a backward pass",
    "the doubly reparameterised gradient is what a backward pass makes of `z`'s; `iwae_loss` has the value's tangent.",
)
REFUSED: dict[tuple[str, str], Refusal] = {
    ("gradient_penalty", "export"): _NO_EXPORT,
    ("r1_penalty", "export"): _NO_EXPORT,
    ("r1_penalty", "compile"): _R1_COMPILED,
    ("r1_penalty", "dynamic shapes"): _R1_COMPILED,
    ("r1_penalty", "func.vmap"): _R1_NEEDS_A_GRAPH,
    ("r1_penalty", "func.jvp"): _R1_NEEDS_A_GRAPH,
    ("r1_penalty", "reentrant checkpoint"): _R1_NEEDS_A_GRAPH,
    ("dreg_loss", "func.jvp"): _DREG_FORWARD,
    ("dreg_loss", "forward_ad"): _DREG_FORWARD,
    ("dreg_loss", "export"): Refusal(
        RuntimeError,
        "torch.export keeps no hooks",
        "the gradient is weighed by a hook, which an exported program would leave out; export the networks, or the "
        "value under `torch.no_grad`.",
    ),
}


# ---- tests -----------------------------------------------------------------------------------------------------------

SHOWN: dict[str, set[str]] = {name: set() for name in FEATURES}  # the functions that a feature has tests for


def feature(name: str, cases: Sequence[Case]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of `name` for each of the cases: it passes where the feature works, or is refused as `REFUSED` says."""
    SHOWN[name] |= {case.function for case in cases}

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(case: Case, **fixtures: Any) -> None:
            refusal = REFUSED.get((case.function, name))
            if refusal is None:
                test(case=case, **fixtures)
                return
            with pytest.raises(refusal.error, match=refusal.match):
                test(case=case, **fixtures)

        marks = pytest.mark.feature(name), pytest.mark.parametrize("case", cases, ids=repr)
        return functools.reduce(lambda found, mark: mark(found), marks, run)

    return decorate


# ---- the table -------------------------------------------------------------------------------------------------------


class Outcomes:
    """What the tests of this run found, by cell."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], set[str]] = {}

    def note(self, report: pytest.TestReport) -> None:
        if hasattr(report, "framework") and (report.when == "call" or not report.passed):
            function, feature = report.framework
            self.found.setdefault((function, feature), set()).add(report.outcome)

    def write(self, path: Path) -> None:
        cells = {(function, name): self._cell(function, name) for function in FUNCTIONS for name in FEATURES}
        blank = [f"{function} × {name}" for (function, name), cell in cells.items() if not cell]
        if blank:
            raise pytest.UsageError(
                f"{path} not written: no test passed for {len(blank)} cells: {', '.join(blank[:5])}"
            )
        path.write_text(render(cells))

    def _cell(self, function: str, name: str) -> str:
        found = self.found.get((function, name), set())
        if found == {"passed"}:
            return shown(function, name)
        return NOT_RUN.get(name, "") if found == {"skipped"} else ""


OUTCOMES = Outcomes()


def shown(function: str, name: str) -> str:
    """A cell whose tests have passed."""
    refusal = REFUSED.get((function, name))
    return "yes" if refusal is None else f"`{refusal.error.__name__}`[^{_refusals().index(refusal) + 1}]"


def _refusals() -> list[Refusal]:
    return list(dict.fromkeys(REFUSED.values()))


def render(cells: dict[tuple[str, str], str]) -> str:
    lines = [
        "# What works with PyTorch's features",
        "",
        "Written by its own tests, `make framework`, from their outcome: a cell says *yes* if its tests passed in the "
        "run that made the table, names the error if the feature is refused by design, and says so if it was not run. "
        "Each test compares values and every gradient with those of a plain call.",
        "",
        *(f"- **{name}**: {what}." for name, what in FEATURES.items()),
        "",
        "| function | " + " | ".join(FEATURES) + " |",
        "|---" * (len(FEATURES) + 1) + "|",
        *(f"| `{f}` | " + " | ".join(cells[f, name] for name in FEATURES) + " |" for f in FUNCTIONS),
        "",
        *(f"[^{n}]: {refusal.instead[0].upper()}{refusal.instead[1:]}" for n, refusal in enumerate(_refusals(), 1)),
    ]
    return "\n".join(lines) + "\n"


def read(text: str) -> dict[tuple[str, str], str]:
    """The cells of a table that `render` wrote."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = rows
    return {(row[0].strip("`"), name): cell for row in rows for name, cell in zip(head[1:], row[1:], strict=True)}
