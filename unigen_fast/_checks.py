"""Argument checks of the public functions: what was got, what was expected, before any kernel runs."""

import functools
import itertools
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

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


def number(name: str, value: float, *, minimum: float = -math.inf, exclusive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (value > minimum or (value == minimum and not exclusive)):  # NaN is neither
        raise ValueError(f"{name}: got {value}, expected a number {'>' if exclusive else '>='} {minimum:g}")
    return float(value)


def fraction(name: str, value: float) -> float:
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")
    return value


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


def increasing(name: str, values: Sequence[float], first: float, last: float) -> list[float]:
    """Numbers that rise from `first` to `last`."""
    if isinstance(values, (str, Tensor)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(values).__name__}")
    numbers = [number(f"{name}[{i}]", value) for i, value in enumerate(values)]
    rising = all(a < b for a, b in itertools.pairwise(numbers))
    if len(numbers) < 2 or numbers[0] != first or numbers[-1] != last or not rising:
        raise ValueError(f"{name}: got {numbers}, expected increasing numbers, the first {first:g}, the last {last:g}")
    return numbers


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
