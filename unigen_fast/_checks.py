"""Argument checks of the public functions: what was got, what was expected, before any kernel runs."""

import functools
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from unigen_fast._private import transforms_active

try:  # torch works without it, and so do the losses
    import numpy as np
except ImportError:
    np = None  # type: ignore[assignment]

REDUCTIONS = ("mean", "sum", "none")
SPREADS = ("logvar", "logstd", "std")


def floating(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype} of shape {tuple(x.shape)}")
    return x


def choice(name: str, value: str, allowed: Collection[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


def number(
    name: str, value: Any, *, minimum: float = -math.inf, exclusive: bool = False, differentiable: bool = False
) -> Any:
    """An option that is a number: Python's, NumPy's, or a tensor without dimensions, whose number is read.

    It stays a tensor where the number is an input of a graph in the making; and, if the result is `differentiable` by
    it, where it requires grad or reading it would mean to wait for another device. A tensor's range is not checked.
    """
    if not isinstance(value, float):
        value = _number_of(name, value, differentiable)
        if isinstance(value, Tensor):
            return value
    if not (value > minimum if exclusive else value >= minimum):  # NaN is neither
        raise ValueError(f"{name}: got {value}, expected a number {'>' if exclusive else '>='} {minimum:g}")
    return value


def _number_of(name: str, value: Any, differentiable: bool) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if np is not None and isinstance(value, (np.number, np.ndarray)):
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a number, got {kind}")
    if value.dim():
        raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, expected a number, or one without dimensions")
    if differentiable and (value.requires_grad or value.device.type != "cpu" or transforms_active(value)):
        return value
    if value.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{name}: got a tensor that requires grad, expected a number: no gradient reaches it; detach it")
    return value.detach().double() if torch.compiler.is_compiling() else float(value.item())


def fraction(name: str, value: Any, *, differentiable: bool = False) -> Any:
    value = number(name, value, differentiable=differentiable)
    if not isinstance(value, Tensor) and not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")
    return value


def temperature(value: Any, detach: bool) -> Any:
    """Of self-normalised weights, which carry its gradient unless they are detached."""
    value = number("temperature", value, minimum=0.0, exclusive=True, differentiable=True)
    if detach and isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise TypeError("temperature: got a tensor that requires grad, but the weights are detached: pass detach=False")
    return value


def learned(value: Any) -> bool:
    """Whether a number that was checked as differentiable is to take part in PyTorch's arithmetic."""
    return isinstance(value, Tensor) and (value.requires_grad or value.device.type != "cpu" or transforms_active(value))


def dimension(name: str, x: Tensor, dim: int, *, extra: int = 0) -> int:
    """`dim` counted from the front, of a tensor with `extra` more dimensions than `x`."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{name}: expected an int, got {type(dim).__name__}")
    ndim = x.dim() + extra
    if not -ndim <= dim < ndim:
        raise ValueError(f"{name}: got {dim}, expected a dimension of a tensor of shape {tuple(x.shape)}")
    return dim % ndim


def sample_dimension(name: str, x: Tensor, dim: int) -> int:
    """A dimension that holds at least one sample."""
    dim = dimension("dim", x, dim)
    if x.size(dim) == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected at least one sample along dim {dim}")
    return dim


def several_samples(name: str, x: Tensor, dim: int, why: str) -> int:
    """A dimension that holds at least two samples."""
    dim = sample_dimension(name, x, dim)
    if x.size(dim) == 1:
        raise ValueError(f"{name}: got 1 sample along dim {dim} of shape {tuple(x.shape)}, expected at least 2: {why}")
    return dim


def numbers(name: str, values: Any, **limits: Any) -> list[Any]:
    """A sequence of numbers; arrays and tensors of one dimension are such."""
    if isinstance(values, Tensor) or (np is not None and isinstance(values, np.ndarray)):
        if values.ndim != 1:
            raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected a sequence of numbers")
        values = list(values)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(values).__name__}")
    return [number(f"{name}[{i}]", value, **limits) for i, value in enumerate(values)]


def increasing(name: str, values: Any, first: float, last: float) -> list[Any]:
    """Numbers that rise from `first` to `last`."""
    found = numbers(name, values)
    if any(isinstance(value, Tensor) for value in found):
        return found
    rising = all(a < b for a, b in itertools.pairwise(found))
    if len(found) < 2 or found[0] != first or found[-1] != last or not rising:
        raise ValueError(f"{name}: got {found}, expected increasing numbers, the first {first:g}, the last {last:g}")
    return found


def event(name: str, x: Tensor, event_ndims: int) -> int:
    if isinstance(event_ndims, bool) or not isinstance(event_ndims, int):
        raise TypeError(f"event_ndims: expected an int, got {type(event_ndims).__name__}")
    if not 0 <= event_ndims <= x.dim():
        raise ValueError(
            f"event_ndims: got {event_ndims}, expected 0 to {x.dim()} for {name} of shape {tuple(x.shape)}"
        )
    return event_ndims


def site_event(name: str, logits: Tensor, event_ndims: int) -> int:
    """`event_ndims` of what `logits` has beside its classes."""
    if logits.dim() == 0:
        raise ValueError(f"{name}: got shape (), expected a dimension of classes")
    if isinstance(event_ndims, bool) or not isinstance(event_ndims, int):
        raise TypeError(f"event_ndims: expected an int, got {type(event_ndims).__name__}")
    if not 0 <= event_ndims < logits.dim():
        raise ValueError(
            f"event_ndims: got {event_ndims}, expected 0 to {logits.dim() - 1} for {name} of shape "
            f"{tuple(logits.shape)}, of which one dimension is the classes'"
        )
    return event_ndims


def promoted(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in their promoted dtype."""
    first = tensors[0].dtype
    for x in tensors:
        if x.dtype != first:
            dtype = functools.reduce(torch.promote_types, {x.dtype for x in tensors})
            return [x.to(dtype) for x in tensors]
    return tensors


def same_kind(*, optional: Sequence[str] = (), **tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors on one device, broadcast to one shape (as views), in their promoted dtype; None if `optional`."""
    first: Tensor | None = None
    alike = True
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        x = floating(name, x)  # type: ignore[arg-type]
        if first is None:
            first = x
        elif x.device != first.device:
            raise ValueError(f"{name}: got device {x.device}, expected {first.device} as {next(iter(tensors))}")
        elif x.dtype is not first.dtype or x.shape != first.shape:
            alike = False
    if alike:  # most often
        return tuple(tensors.values())
    given = {name: x for name, x in tensors.items() if x is not None}
    try:
        shape = torch.broadcast_shapes(*(x.shape for x in given.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
        raise ValueError(f"expected shapes that broadcast together, got {shapes}") from None
    given = {name: x.expand(shape) for name, x in zip(given, promoted(list(given.values())), strict=True)}
    return tuple(given.get(name) for name in tensors)


def clamp_range(clamp_logvar: tuple[float, float] | None) -> tuple[float, float]:
    if clamp_logvar is None:
        return -math.inf, math.inf
    low, high = clamp_logvar
    if not low <= high:
        raise ValueError(f"clamp_logvar: got {clamp_logvar}, expected (low, high) with low <= high")
    return float(low), float(high)
