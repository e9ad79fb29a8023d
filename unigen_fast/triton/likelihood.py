"""Triton kernels of the log-likelihoods."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _formulas, _rows
from unigen_fast.triton._rows import (
    close_rows,
    columns_at,
    load,
    load_rows,
    log1p_unit,
    program,
    sigmoid,
    store,
    tile_of,
    weighted,
)

__all__ = [
    "bernoulli_log_prob",
    "bernoulli_log_prob_backward",
    "discretized_logistic_log_prob",
    "discretized_logistic_log_prob_backward",
    "gaussian_log_prob",
    "gaussian_log_prob_backward",
    "laplace_log_prob",
    "laplace_log_prob_backward",
    "negative_binomial_log_prob",
    "negative_binomial_log_prob_backward",
    "zero_inflated_negative_binomial_log_prob",
    "zero_inflated_negative_binomial_log_prob_backward",
]


@triton.jit
def bernoulli_value(logit, x):
    size = tl.abs(logit)
    wrong = tl.where(logit >= 0, 1 - x, x)  # the mass on the side that the logit speaks against
    return -(tl.where(wrong == 0, 0.0, wrong * size) + log1p_unit(tl.exp(-size)))


@triton.jit
def bernoulli_slope(logit, x):
    return x * sigmoid(-logit) - (1 - x) * sigmoid(logit)


@triton.jit
def _bernoulli_kernel(
    inputs, parameters, close, shape, counts,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    logits, data = inputs
    row, split, first, last = program(counts, BLOCK_R, INDEX)
    total = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    for start in range(first, last, BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        logit = load(logits, row, col, shape, mask, DTYPE)
        x = load(data, row, col, shape, mask, DTYPE)
        total += tl.where(mask, bernoulli_value(logit, x), 0.0)
    close_rows(tl.sum(total, 1), row, split, close, shape, counts, STAGE, DTYPE)


@triton.jit
def _bernoulli_backward_kernel(
    grad, logits, data, grad_logits, grad_data, shape, counts,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    g = load_rows(grad, row, shape, counts, DTYPE)[:, None]
    logit = load(logits, row, col, shape, mask, DTYPE)
    x = load(data, row, col, shape, mask, DTYPE)
    if grad_logits is not None:
        store(grad_logits, row, col, shape, mask, weighted(bernoulli_slope(logit, x), g))
    if grad_data is not None:
        certain = (tl.abs(logit) == float("inf")) & (tl.where(logit >= 0, 1 - x, x) == 0)
        store(grad_data, row, col, shape, mask, weighted(tl.where(certain, 0.0, logit), g))


def bernoulli_log_prob(logits: Tensor, x: Tensor, event_ndims: int) -> Tensor:
    row_shape = logits.shape[: logits.dim() - event_ndims]
    return _rows.sum_rows(_bernoulli_kernel, _rows.event_dims(logits, event_ndims), (logits, x), row_shape=row_shape)[0]


def bernoulli_log_prob_backward(
    grad: Tensor, logits: Tensor, x: Tensor, event_ndims: int, needed: int
) -> tuple[Tensor, Tensor]:
    grads = [torch.empty_like(t) if needed >> i & 1 else None for i, t in enumerate((logits, x))]
    g, full, rows = _rows.operands(_rows.event_dims(logits, event_ndims), (logits, x, *grads), (grad,))
    dtype = _rows.arithmetic(logits)
    plan = g.map(1024, dtype)
    _rows.launch(
        _bernoulli_backward_kernel, (plan.programs,), logits.device, *rows, *full, g.shape, plan.counts,
        DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return _rows.present(grads, logits)


# ---- formulas --------------------------------------------------------------------------------------------------------


def gaussian_log_prob(
    x: Tensor, mean: Tensor, logvar: Tensor, event_ndims: int, spread: str, clamp_min: float, clamp_max: float
) -> Tensor:
    clamp = _formulas.clamp_of(clamp_min, clamp_max)
    return _formulas.forward("gaussian_log_prob", (x, mean, logvar), event_ndims, clamp, spread)


def gaussian_log_prob_backward(
    grad: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, event_ndims: int, spread: str, clamp_min: float,
    clamp_max: float, needed: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    clamp = _formulas.clamp_of(clamp_min, clamp_max)
    tensors = (x, mean, logvar)
    return tuple(_formulas.backward("gaussian_log_prob", grad, tensors, event_ndims, needed, clamp, spread))


def laplace_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int) -> Tensor:
    return _formulas.forward("laplace_log_prob", (x, mean, log_scale), event_ndims)


def laplace_log_prob_backward(
    grad: Tensor, x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int, needed: int
) -> tuple[Tensor, ...]:
    return tuple(_formulas.backward("laplace_log_prob", grad, (x, mean, log_scale), event_ndims, needed))


def discretized_logistic_log_prob(
    x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int, half_bin: float, low: float, high: float
) -> Tensor:
    bins = tuple(map(_rows.scalar, (half_bin, low, high)))
    return _formulas.forward("discretized_logistic_log_prob", (x, mean, log_scale), event_ndims, bins)


def discretized_logistic_log_prob_backward(
    grad: Tensor, x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int, half_bin: float, low: float,
    high: float, needed: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    bins = tuple(map(_rows.scalar, (half_bin, low, high)))
    tensors = (x, mean, log_scale)
    return tuple(_formulas.backward("discretized_logistic_log_prob", grad, tensors, event_ndims, needed, bins))


def negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor, event_ndims: int, eps: float) -> Tensor:
    return _formulas.forward("negative_binomial_log_prob", (x, mu, theta), event_ndims, _formulas.eps_of(eps))


def negative_binomial_log_prob_backward(
    grad: Tensor, x: Tensor, mu: Tensor, theta: Tensor, event_ndims: int, eps: float, needed: int
) -> tuple[Tensor, ...]:
    name, tensors = "negative_binomial_log_prob", (x, mu, theta)
    return tuple(_formulas.backward(name, grad, tensors, event_ndims, needed, _formulas.eps_of(eps)))


def zero_inflated_negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor, event_ndims: int, eps: float
) -> Tensor:
    name, tensors = "zero_inflated_negative_binomial_log_prob", (x, mu, theta, gate_logits)
    return _formulas.forward(name, tensors, event_ndims, _formulas.eps_of(eps))


def zero_inflated_negative_binomial_log_prob_backward(
    grad: Tensor, x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor, event_ndims: int, eps: float, needed: int
) -> tuple[Tensor, ...]:
    name, tensors = "zero_inflated_negative_binomial_log_prob", (x, mu, theta, gate_logits)
    return tuple(_formulas.backward(name, grad, tensors, event_ndims, needed, _formulas.eps_of(eps)))
