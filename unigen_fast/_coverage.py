"""Which public function runs on which kernels, in which dtypes: read off the code and the loaded modules."""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import unigen_fast
from unigen_fast import _loader, adversarial, divergence, importance, likelihood, objectives
from unigen_fast._fused import KERNEL_DTYPES, FusedOp
from unigen_fast._loader import Backend

FAMILIES = (importance, adversarial, divergence, likelihood, objectives)
LAYERS = ("reference", "cpu", "cuda", "triton")
_SHORT = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
DTYPES = " ".join(short for dtype, short in _SHORT.items() if dtype in KERNEL_DTYPES)


@dataclass(frozen=True)
class Entry:
    """A public function: the named options it takes, the ops it is made of, and the ops each layer lacks."""

    name: str
    family: str
    options: dict[str, tuple[str, ...]]
    ops: tuple[str, ...]
    missing: dict[str, tuple[str, ...]]


class _Sources:
    """The functions of the family modules, as syntax trees."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], ast.FunctionDef] = {}
        for module in FAMILIES:
            for node in ast.parse(inspect.getsource(module)).body:
                if isinstance(node, ast.FunctionDef):
                    self.found[module.__name__, node.name] = node  # of overloads the last, which has the body

    def reached(self, module: ModuleType, name: str) -> dict[tuple[str, str], ast.FunctionDef]:
        """The function and all that it calls, in any family."""
        seen: dict[tuple[str, str], ast.FunctionDef] = {}
        waiting = [(module.__name__, name)]
        while waiting:
            key = waiting.pop()
            if key in seen or key not in self.found:
                continue
            seen[key] = self.found[key]
            waiting += [(owner, called) for owner, called in _references(key[0], seen[key])]
        return seen


def _references(module: str, function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    namespace = vars(importlib.import_module(module))
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            target = namespace.get(node.id)
            yield getattr(target, "__module__", module), node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = namespace.get(node.value.id)
            if owner in FAMILIES:
                yield owner.__name__, node.attr


def _ops_of(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_ops":
            yield node.attr


def _options_of(module: str, function: ast.FunctionDef) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the function's own checks let through: `_checks.choice("kind", kind, allowed)`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_checks.choice":
            name, _, allowed = node.args
            namespace: dict[str, Any] = vars(importlib.import_module(module))
            yield ast.literal_eval(name), tuple(eval(ast.unparse(allowed), namespace))


def _kernels(layer: str) -> frozenset[str]:
    """The forward and backward ops that a layer has kernels for; without a GPU, CUDA's are those built for it."""
    if layer == "triton":
        if importlib.util.find_spec("triton") is None:
            return frozenset()
        return frozenset(importlib.import_module("unigen_fast.triton").OPS)
    # one list in csrc/bindings/ops.h serves both
    return frozenset((_loader.ops("cuda") if layer == "cuda" else set()) or _loader.ops("cpu"))


def entries() -> list[Entry]:
    """Every public function, by family."""
    sources = _Sources()
    every = {op.name: op for op in FusedOp.every}
    kernels = {layer: _kernels(layer) for layer in LAYERS if layer != "reference"}
    found = []
    for module in FAMILIES:
        for name in unigen_fast.__all__:
            function = getattr(unigen_fast, name)
            if not inspect.isfunction(function) or function.__module__ != module.__name__:
                continue
            reached = sources.reached(module, name)
            options = {k: v for (owner, _), f in reached.items() for k, v in _options_of(owner, f)}
            ops = sorted({op for f in reached.values() for op in _ops_of(f)})
            wanted = [*ops, *(f"{op}_backward" for op in ops if hasattr(every[op], "backward"))]
            missing = {layer: tuple(op for op in wanted if op not in have) for layer, have in kernels.items()}
            family = module.__name__.rpartition(".")[2]
            found.append(Entry(name, family, options, tuple(ops), {"reference": (), **missing}))
    return found


def table(backends: tuple[Backend, ...]) -> str:
    """function × layer × dtype: where its ops, forward and backward, have kernels."""
    lines = [str(backend) for backend in backends]
    head = ["function", *LAYERS]
    rows: list[list[str]] = [head, ["-" * len(h) for h in head]]
    details: dict[int, str] = {}
    for entry in entries():
        if entry.ops:
            cells = [_cell(entry.missing[layer]) for layer in LAYERS]
        else:
            cells = ["PyTorch", "-", "-", "-"]
        rows.append([f"{entry.family}.{entry.name}", *cells])
        what = [f"ops: {', '.join(entry.ops)}"] if entry.ops else []
        what += [f"{name}: {', '.join(values)}" for name, values in entry.options.items() if name != "reduction"]
        details[len(rows) - 1] = "; ".join(what)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines.append("")
    for i, row in enumerate(rows):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if details.get(i):
            lines.append(f"    {details[i]}")
    return "\n".join(lines)


def _cell(missing: tuple[str, ...]) -> str:
    return f"without {', '.join(missing)}" if missing else DTYPES
