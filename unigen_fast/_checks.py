"""Argument checks of the public functions: what was got, what was expected, before any kernel runs."""

import difflib
import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
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


_STRIDED = torch.strided
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# what the field calls the options that are named otherwise here
_ALIASES = {
    "average": ("mean",),
    "avg": ("mean",),
    "bce": ("logistic", "non_saturating", "bernoulli"),
    "bce_with_logits": ("logistic", "non_saturating", "bernoulli"),
    "batchmean": ("mean",),
    "beta": ("ciwae",),
    "binary": ("bernoulli",),
    "binary_cross_entropy": ("logistic", "non_saturating", "bernoulli"),
    "ce": ("categorical",),
    "chi": ("cubo",),
    "cross_entropy": ("categorical",),
    "discretized_mix_logistic": ("discretized_logistic_mixture",),
    "dmol": ("discretized_logistic_mixture",),
    "energy": ("imq",),
    "gan": ("logistic", "non_saturating"),
    "gauss": ("gaussian", "rbf"),
    "gaussian": ("rbf",),
    "inverse_multiquadratic": ("imq",),
    "inverse_multiquadric": ("imq",),
    "js": ("fgan_js", "logistic"),
    "kl": ("fgan_kl", "kl_wgan"),
    "l1": ("laplace",),
    "l2": ("gaussian", "least_squares"),
    "log_scale": ("logstd",),
    "log_sigma": ("logstd",),
    "log_std": ("logstd",),
    "log_var": ("logvar",),
    "log_variance": ("logvar",),
    "logistic": ("non_saturating", "discretized_logistic"),
    "logsigma": ("logstd",),
    "lsgan": ("least_squares",),
    "mae": ("laplace",),
    "minimax": ("saturating", "logistic"),
    "mse": ("gaussian", "least_squares"),
    "multinomial": ("categorical",),
    "nb": ("negative_binomial",),
    "non_saturating": ("logistic",),
    "normal": ("gaussian",),
    "ns": ("non_saturating", "logistic"),
    "nsgan": ("non_saturating", "logistic"),
    "ragan": ("relativistic_average",),
    "rahinge": ("relativistic_average_hinge",),
    "ralsgan": ("relativistic_average_least_squares",),
    "rgan": ("relativistic",),
    "rsgan": ("relativistic",),
    "saturating": ("logistic",),
    "scale": ("std",),
    "sigma": ("std",),
    "softmax": ("categorical",),
    "softplus": ("logistic", "non_saturating"),
    "stddev": ("std",),
    "sticking_the_landing": ("stl",),
    "vae": ("elbo",),
    "vanilla": ("logistic", "non_saturating", "iwae"),
    "vr": ("renyi",),
    "vr_max": ("renyi",),
    "wgan": ("wasserstein",),
    "wgan_gp": ("wasserstein",),
    "wgangp": ("wasserstein",),
    "zinb": ("zero_inflated_negative_binomial",),
}


def tensor(name: str, x: Tensor) -> Tensor:
    """A dense tensor of any dtype."""
    if not isinstance(x, Tensor):
        hint = ": torch.as_tensor makes one of it" if hasattr(x, "__array__") else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}{hint}")
    if x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one: pad it (torch.nested.to_padded_tensor)")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}: {name}.to_dense() makes one of it")
    return x


def floating(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.layout is not _STRIDED or x.is_nested:
        tensor(name, x)
    if x.dtype not in DTYPES:
        if x.is_floating_point():
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name}: expected one of {expected}, got {x.dtype}: convert it with {name}.to(…)")
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype} of shape {tuple(x.shape)}")
    return x


def choice(name: str, value: str, allowed: Collection[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}{did_you_mean(value, allowed)}"
        )
    return value


def did_you_mean(value: object, allowed: Collection[str]) -> str:
    """A hint at the names that the value is likely to stand for; empty where there is none."""
    if not isinstance(value, str):
        return ""
    key = value.lower().replace("-", "_").replace(" ", "_")
    names = [name for name in _ALIASES.get(key, ()) if name in allowed]
    names = names or difflib.get_close_matches(key, allowed, n=1)
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def number(
    name: str, value: Any, *, minimum: float = -math.inf, exclusive: bool = False, differentiable: bool = False
) -> Any:
    """An option that is a number: Python's, NumPy's, or a tensor without dimensions, whose number is read.

    It stays a tensor where the number is an input of a graph in the making; and, if the result is `differentiable` by
    it, where it requires grad or reading it would mean to wait for another device. A tensor's range is not checked.
    """
    given = value
    if not isinstance(value, float):
        value = _number_of(name, value, differentiable)
        if isinstance(value, Tensor):
            return value
    if not (value > minimum if exclusive else value >= minimum):  # NaN is neither
        raise ValueError(f"{name}: got {given}, expected a number {'>' if exclusive else '>='} {minimum:g}")
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
        raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, expected a number or a 0-dim tensor")
    if differentiable and (value.requires_grad or value.device.type != "cpu" or transforms_active(value)):
        return value
    if value.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{name}: got a tensor that requires grad, expected a number: it has no gradient; detach it")
    return value.detach().double() if torch.compiler.is_compiling() else float(value.item())


def fraction(name: str, value: Any, *, differentiable: bool = False) -> Any:
    value = number(name, value, differentiable=differentiable)
    if not isinstance(value, Tensor) and not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")
    return value


def temperature(value: Any, detach: bool) -> Any:
    """Of self-normalised weights, which carry its gradient unless they are detached."""
    if type(value) is float and value > 0:  # most often
        return value
    value = number("temperature", value, minimum=0.0, exclusive=True, differentiable=True)
    if detach and isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise TypeError("temperature: got a tensor that requires grad, but the weights are detached: pass detach=False")
    return value


def learned(value: Any) -> bool:
    """Whether a number that was checked as differentiable is to take part in PyTorch's arithmetic."""
    if type(value) is float:  # most often
        return False
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
    """How many trailing dimensions of `x` make one event, as given."""
    if isinstance(event_ndims, bool) or not isinstance(event_ndims, int):
        raise TypeError(f"event_ndims: expected an int, got {type(event_ndims).__name__}")
    if not 0 <= event_ndims <= x.dim():
        raise ValueError(
            f"event_ndims: got {event_ndims}, expected 0 to {x.dim()} for {name} of shape {tuple(x.shape)}"
        )
    return event_ndims


def read_event(name: str, shape: Sequence[int], fewest: int = 1, most: int | None = None) -> int:
    """How many trailing dimensions of `shape` make one event, where nobody said: from `fewest` to `most` are possible,
    at most all but one."""
    ndim = len(shape)
    if ndim == 0:
        raise ValueError(f"{name}: got shape (), expected at least one dimension, or event_ndims=0")
    if ndim <= 2:
        return 1
    most = ndim - 1 if most is None else most
    if fewest < most:
        readings = (f"event_ndims={n}: rows {list(shape[: ndim - n])}" for n in (most, fewest))
        raise ValueError(
            f"event_ndims: got none for {name} of shape {tuple(shape)}, expected how many of its trailing dimensions "
            f"are one example's event; {'; '.join(readings)}"
        )
    return fewest


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


def _compared(optional: Sequence[str], tensors: Mapping[str, Tensor | None]) -> tuple[Tensor, bool]:
    """The first of the checked tensors, and whether all have its shape and dtype; None only where `optional`."""
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
    return first, alike  # type: ignore[return-value]


def aligned(
    event_ndims: int | None, *, data: str = "", optional: Sequence[str] = (), **tensors: Tensor | None
) -> tuple[tuple[Any, ...], int]:
    """The tensors on one device, in one shape (as views), in their promoted dtype; None if `optional`. And how many
    trailing dimensions make one event.

    What is broadcast is written by the caller: a row over a dimension of size 1, and a parameter without rows, of the
    event's shape or a single number. The one named `data` is no parameter.
    """
    first, alike = _compared(optional, tensors)
    if not alike:
        return _broadcast(event_ndims, data, tensors)
    if event_ndims is None:
        event_ndims = 1 if 0 < first.dim() <= 2 else read_event(next(iter(tensors)), first.shape)
    else:
        event(next(iter(tensors)), first, event_ndims)
    return tuple(tensors.values()), event_ndims


def aligned_sites(
    event_ndims: int, class_dim: int, *, optional: Sequence[str] = (), **tensors: Tensor | None
) -> tuple[tuple[Any, ...], int, int]:
    """`aligned` of logits, of which `event_ndims` does not count the dimension of the classes; and `class_dim` >= 0."""
    first, alike = _compared(optional, tensors)
    like = next(iter(tensors))
    if alike:
        return tuple(tensors.values()), site_event(like, first, event_ndims), dimension("class_dim", first, class_dim)
    given = {name: x for name, x in tensors.items() if x is not None}
    ndim = max(x.dim() for x in given.values())
    full = next(name for name, x in given.items() if x.dim() == ndim)
    site_event(full, given[full], event_ndims)
    place = dimension("class_dim", given[full], class_dim)
    classes = given[full].size(place)
    moved: dict[str, Tensor | None] = {}
    for name, x in given.items():
        own = place - (ndim - x.dim())  # of a parameter without rows
        if own < 0 or x.size(own) != classes:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)} beside {full} {tuple(given[full].shape)}, expected as many "
                f"dimensions, and {classes} classes in dimension {place} (class_dim)"
            )
        moved[name] = x.movedim(own, -1)
    found, _ = _broadcast(event_ndims + 1, "", moved)
    back = {name: x.movedim(-1, place) for name, x in zip(given, found, strict=True)}
    return tuple(back.get(name) for name in tensors), event_ndims, place


def elementwise(**tensors: Tensor) -> tuple[Tensor, ...]:
    """`aligned`, all dimensions being rows."""
    _, alike = _compared((), tensors)
    return tuple(tensors.values()) if alike else _broadcast(0, "", tensors)[0]


def parameters(**tensors: Tensor) -> tuple[Tensor, ...]:
    """`aligned`, the tensors of fewer dimensions being parameters of an event, whatever its dimensions are."""
    _, alike = _compared((), tensors)
    if alike:
        return tuple(tensors.values())
    ndims = {x.dim() for x in tensors.values()}
    return _broadcast(min(ndims) if len(ndims) > 1 else 0, "", tensors)[0]


def _broadcast(event_ndims: int | None, data: str, tensors: Mapping[str, Tensor | None]) -> tuple[tuple[Any, ...], int]:
    given = {name: x for name, x in tensors.items() if x is not None}
    ndim = max(x.dim() for x in given.values())
    full = {name: x for name, x in given.items() if x.dim() == ndim}
    like = next(iter(full))
    beside = f"{like} {tuple(full[like].shape)}"
    shape, row = common_shape(full, beside)
    if event_ndims is None:
        of_parameters = max([0, *(x.dim() for x in given.values() if x.dim() < ndim)])
        fewest, most = (of_parameters,) * 2 if of_parameters else (1, max(ndim - 1 - max(row, 0), 1))
        event_ndims = read_event(like, shape, fewest, most)
    else:
        event(like, full[like], event_ndims)
    given = {name: fitted(name, x, shape, event_ndims, beside, whole=name == data) for name, x in given.items()}
    given = dict(zip(given, promoted(list(given.values())), strict=True))
    return tuple(given.get(name) for name in tensors), event_ndims


def common_shape(tensors: Mapping[str, Tensor], beside: str) -> tuple[list[int], int]:
    """The shape of tensors of as many dimensions, each of one size or 1; and the last one broadcast over, or -1."""
    first, *others = tensors
    shape, last = list(tensors[first].shape), -1
    for name in others:
        for i, size in enumerate(tensors[name].shape):
            if size != shape[i]:
                last = max(last, i)
                if size != 1 and shape[i] != 1:
                    got = tuple(tensors[name].shape)
                    raise ValueError(
                        f"{name}: got shape {got} beside {beside}, expected size {shape[i]} or 1 in dimension {i}"
                    )
                shape[i] = size if shape[i] == 1 else shape[i]
    return shape, last


def fitted(name: str, x: Tensor, shape: Sequence[int], event_ndims: int, beside: str, *, whole: bool = False) -> Tensor:
    """`x` in `shape`: expanded over rows of size 1 or, unless it is to be `whole`, as a parameter without rows."""
    if list(x.shape) == list(shape):
        return x
    rows = len(shape) - event_ndims
    got = f"{name}: got shape {tuple(x.shape)} beside {beside}"
    if x.dim() == len(shape):
        for i in range(rows):
            if x.shape[i] != shape[i] and x.shape[i] != 1:
                raise ValueError(f"{got}, expected size {shape[i]} or 1 in dimension {i}")
        if list(x.shape[rows:]) != list(shape[rows:]):
            raise ValueError(
                f"{got}, expected {tuple(shape[rows:])} in the last {event_ndims} (event_ndims={event_ndims}): an "
                f"event is not broadcast, unless {name}.expand(…) says so"
            )
        return x.expand(shape)
    if whole or not (x.dim() == 0 or x.dim() == event_ndims):
        one = f"{tuple(shape[rows:])} or ()" if event_ndims else "()"
        without = "" if whole else f", or {one}, a parameter without rows"
        raise ValueError(f"{got}, expected as many dimensions, of size 1 where it is the same for all rows{without}")
    for i, size in enumerate(x.shape):
        if size != 1 and size != shape[rows + i]:
            raise ValueError(
                f"{got}, expected as many dimensions, or {tuple(shape[rows:])}, a parameter without rows "
                f"(event_ndims={event_ndims})"
            )
    return x.expand(shape)


def clamp_range(clamp_logvar: tuple[float, float] | None) -> tuple[float, float]:
    if clamp_logvar is None:
        return -math.inf, math.inf
    try:
        low, high = map(float, clamp_logvar)
    except (TypeError, ValueError):
        raise TypeError(f"clamp_logvar: got {clamp_logvar!r}, expected None or a pair of numbers (low, high)") from None
    if not low <= high:
        raise ValueError(f"clamp_logvar: got {clamp_logvar}, expected (low, high) with low <= high")
    return low, high
