"""Checks of values, for debugging: each waits for the device. Off unless `UNIGEN_FAST_CHECK=1`, or within `checked()`.

A function asks `if _values.on:` and nothing else while they are off. What PyTorch must look inside is not checked:
compiled graphs, `torch.func` transforms, forward-mode AD, tensor subclasses, meta tensors.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unigen_fast._private import transformed

_WANTED = os.environ.get("UNIGEN_FAST_CHECK", "")
if _WANTED not in ("", "0", "1"):
    raise ValueError(f"UNIGEN_FAST_CHECK: got {_WANTED!r}, expected 0 or 1")
_ALWAYS = _WANTED == "1"
_lock = threading.Lock()
_depth = 0

on = _ALWAYS


@contextmanager
def checked() -> Iterator[None]:
    """Values are checked within: NaN, supports, labels, probabilities given as logits, spreads that are not positive.

    For debugging: every call waits for the device, once for each of its tensors. `UNIGEN_FAST_CHECK=1` in the
    environment does the same for a whole program. Rows of weight 0 are not looked at, since they are
    not read (`elbo_loss` of a categorical likelihood looks at all). It holds for all threads; compiled graphs,
    `torch.func` transforms and forward-mode AD are not checked.

        with uf.checked():
            loss = uf.elbo_loss(decoder(z), x, mean, logvar).loss

    Raises:
        ValueError: within, by any function, of a tensor with values that have no meaning there.
    """
    global _depth, on
    with _lock:
        _depth += 1
        on = True
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            on = _ALWAYS or _depth > 0


class _Rows:
    """The rows that are read: those whose weight is not 0."""

    def __init__(self, weights: Tensor | None = None, event_ndims: int = 0) -> None:
        self.weights, self.event_ndims = weights, event_ndims

    def refuse(self, name: str, x: Tensor, wrong: Tensor, expected: str) -> None:
        if self.weights is not None and wrong.dim() >= self.event_ndims:
            rows = wrong.shape[: wrong.dim() - self.event_ndims]
            try:
                read = (self.weights != 0).expand(rows)
            except RuntimeError:  # a parameter without rows
                read = torch.ones(rows, dtype=torch.bool, device=wrong.device)
            wrong = wrong & read.reshape(*rows, *[1] * self.event_ndims)
        count = int(wrong.sum())
        if count:
            value = x[wrong][0].item()
            raise ValueError(f"{name}: got {value:g} ({count} of {x.numel()} such values), expected {expected}")


_ALL = _Rows()


def _visible(x: Any) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type != "meta"
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not transformed(x)
    )


def _require(
    wrong: Callable[[Tensor], Tensor], expected: str, rows: _Rows, tensors: Mapping[str, Tensor | None]
) -> None:
    for name, x in tensors.items():
        if x is not None and _visible(x):
            x = x.detach()
            rows.refuse(name, x, wrong(x), expected)


def numbers(rows: _Rows = _ALL, /, **tensors: Tensor | None) -> None:
    _require(Tensor.isnan, "numbers", rows, tensors)


def log_weights(dim: int | None = None, **tensors: Tensor) -> None:
    """Below +inf, and no weights in place of their logarithms."""
    _require(lambda x: ~(x < math.inf), "log-weights in nats, below infinity", _ALL, tensors)
    for name, x in tensors.items():
        if dim is not None and _visible(x) and x.size(dim) > 1 and _sums_to_one(x, dim):
            raise ValueError(
                f"{name}: got numbers in [0, 1] that sum to 1 over dim {dim}, as weights do, expected their logarithms"
            )


def _sums_to_one(x: Tensor, dim: int) -> bool:
    x = x.detach().double()
    return bool(((x >= 0) & (x <= 1)).all() and ((x.sum(dim) - 1).abs() < 1e-2).all())


FEWEST = 16  # logits that happen to lie in [0, 1]: (1/3)^16


def logits(rows: _Rows = _ALL, /, **tensors: Tensor | None) -> None:
    """Numbers, and no probabilities: 16 or more that all lie in [0, 1], and are not all the same."""
    numbers(rows, **tensors)
    for name, x in tensors.items():
        if x is not None and _visible(x) and x.numel() >= FEWEST:
            low, high = (float(bound) for bound in x.detach().aminmax())
            if 0 <= low < high <= 1:
                raise ValueError(
                    f"{name}: got {x.numel()} values that all lie in [0, 1], as probabilities do, expected logits: "
                    "leave the sigmoid out"
                )


def class_logits(class_dim: int, rows: _Rows = _ALL, /, **tensors: Tensor | None) -> None:
    """Numbers, and no probabilities: classes in [0, 1] that sum to 1."""
    numbers(rows, **tensors)
    for name, x in tensors.items():
        if x is not None and _visible(x) and x.size(class_dim) > 1 and _sums_to_one(x, class_dim):
            raise ValueError(
                f"{name}: got classes in [0, 1] that sum to 1, as probabilities do, expected logits: leave the softmax "
                "out, or take .log()"
            )


def labels(name: str, x: Any, high: float = 1.0) -> None:
    expected = f"classes from 0 to {high - 1:g}" if high > 1 else "labels in [0, 1]"
    last = high - 1 if high > 1 else 1
    _require(lambda t: ~((t >= 0) & (t <= last)), expected, _ALL, {name: x})


def spreads(spread: str, rows: _Rows = _ALL, /, **tensors: Tensor | None) -> None:
    if spread == "std":
        expected = 'positive standard deviations (spread="logvar" or "logstd" takes what a network gives)'
        _require(lambda x: ~((x > 0) & (x < math.inf)), expected, rows, tensors)
    else:
        numbers(rows, **tensors)


def gaussians(
    spread: str,
    rows: _Rows,
    mean: Tensor | None,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
) -> None:
    numbers(rows, mean=mean, prior_mean=prior_mean)
    spreads(spread, rows, logvar=logvar, prior_logvar=prior_logvar)


def rows(weights: Tensor | None, event_ndims: int) -> _Rows:
    """The rows that weights leave to be read."""
    if weights is not None and _visible(weights):
        numbers(weights=weights)
        return _Rows(weights.detach(), event_ndims)
    return _ALL


def likelihood(
    name: str,
    x: Tensor,
    parameters: Mapping[str, Tensor | None],
    options: Sequence[Any] = (),
    rows: _Rows = _ALL,
    owner: str = "",
) -> None:
    """Data and parameters of `<name>_log_prob`: `options` are the spread of a Gaussian, (half a bin, low, high), or the
    dimension of the classes; `owner` says whose the parameters are."""
    if name == "bernoulli":
        logits(rows, **{f"{owner}logits": parameters["logits"]})
        hint = "numbers in [0, 1] (x / 255 of pixels, (x + 1) / 2 of data in [-1, 1])"
        _require(lambda t: ~((t >= 0) & (t <= 1)), hint, rows, {"x": x})
    elif name == "categorical":
        class_dim, *ignored = options
        class_logits(class_dim, **parameters)
        for label in ignored:
            x = x.masked_fill(x == label, 0)
        labels("x", x, parameters["logits"].size(class_dim))  # type: ignore[union-attr]
    elif name.endswith("negative_binomial"):
        finite = {f"{owner}mu": parameters["mu"], "x": x}
        _require(lambda t: ~((t >= 0) & (t < math.inf)), "counts and means >= 0", rows, finite)
        positive = "positive inverse dispersions (exp or softplus of what a network gives)"
        _require(lambda t: ~((t > 0) & (t < math.inf)), positive, rows, {f"{owner}theta": parameters["theta"]})
        logits(rows, **{f"{owner}gate_logits": parameters.get("gate_logits")})
    else:
        for parameter, value in parameters.items():
            if parameter == "logvar" and options:
                spreads(options[0], rows, **{f"{owner}logvar": value})
            else:
                numbers(rows, **{f"{owner}{parameter}": value})
        low, high, half = -math.inf, math.inf, 0.0
        if name == "discretized_logistic":
            half, low, high = options
        elif name == "discretized_logistic_mixture":
            half, low, high = 1 / 255, -1.0, 1.0
        expected = f"levels in [{low:g}, {high:g}] (low, high)" if half else "finite numbers"
        _require(lambda t: ~((t >= low - half) & (t <= high + half) & t.isfinite()), expected, rows, {"x": x})
