"""Closed forms of categorical divergences and likelihoods, and of the discretized logistic mixture.

Derivatives are made with the values, which share exponentials with them, for the tensors that require grad.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unigen_fast._private import graph_is_kept, saved_tensors_are_packed
from unigen_fast.closed_forms._rows import (
    Forward,
    Gradients,
    Tensors,
    blocks,
    filled,
    finite,
    gradient_of_rows,
    reduced,
)
from unigen_fast.reference._common import accumulate_dtype, lowered, sum_event, upcast
from unigen_fast.reference.categorical import EDGE, HALF_BIN, MIN_LOG_SCALE

# ---- over the classes of each site; their dimension `dim` counts from the end ----------------------------------------


def _cuts(shape: Sequence[int], dim: int) -> Iterator[tuple[Any, ...]]:
    """Indices that cut a tensor into blocks along the dimensions before `dim`."""
    last = None
    for at in blocks(shape):
        if at[: len(shape) + dim] != last:
            last = at[: len(shape) + dim]
            yield last
    if last is None:
        yield ()


def _block(logits: Tensor, at: tuple[Any, ...], dim: int) -> Tensor:
    """One of the blocks, and of what was expanded one copy, which broadcasts."""
    block = logits[at]
    for i in range(block.dim()):
        if block.stride(i) == 0 and block.size(i) > 1 and i != block.dim() + dim:
            block = block.narrow(i, 0, 1)
    return upcast(block)


def _of_sites(grad: Tensor, sites: Sequence[int]) -> Tensor:
    """The gradient of each site from those of the rows, or from the one of them all; it broadcasts."""
    return grad.reshape(*grad.shape, *(1,) * (len(sites) - grad.dim())) if grad.dim() else grad


def _derivatives(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Room for those of each of the tensors that requires grad."""
    recorded = torch.is_grad_enabled()
    return [
        t.new_empty(t.shape, dtype=accumulate_dtype(t.dtype))
        if t is not None and recorded and t.requires_grad
        else None
        for t in tensors
    ]


def _kept(derivatives: Sequence[Tensor | None], *others: Tensor) -> list[Tensor]:
    """What backward gets: first something that has an element where nobody else can hold the derivatives."""
    own = torch.empty(0 if saved_tensors_are_packed() else 1)
    return [own, *(d for d in derivatives if d is not None), *others]


def _times(derivative: Tensor, grad: Tensor, kept: Tensors) -> Tensor:
    """derivative · grad, in the memory of the former where it is not needed again."""
    return derivative.mul_(grad) if kept[0].numel() and not graph_is_kept() else derivative * grad


def _gradients(tensors: Tensors, kept: Tensors, grads: Tensors, needed: Sequence[bool]) -> list[Tensor | None]:
    """Of the tensors, from the derivatives that are kept of those that require grad."""
    derivatives = iter(kept[1:])
    of_tensors = [next(derivatives) if t is not None and t.requires_grad else None for t in tensors]
    return [
        lowered(_times(d, g, kept), t) if d is not None and n else None
        for t, d, g, n in zip(tensors, of_tensors, grads, needed, strict=False)
    ]


# ---- divergences -----------------------------------------------------------------------------------------------------


def _kl(logits_q: Tensor, logits_p: Tensor | None, dim: int, unimix: float) -> tuple[Tensor, list[Tensor | None]]:
    """The KL of each variable, and its derivatives by both logits; with unimix those are 1 / (1 - unimix) of them."""
    shape = [n for i, n in enumerate(logits_q.shape) if i != logits_q.dim() + dim]
    sites = logits_q.new_empty(shape, dtype=accumulate_dtype(logits_q.dtype))
    derivatives = _derivatives((logits_q, logits_p))
    for at in _cuts(logits_q.shape, dim):
        q, p = _block(logits_q, at, dim), None if logits_p is None else _block(logits_p, at, dim)
        of_q, of_p = (None if d is None else d[at] for d in derivatives)
        if unimix > 0:
            sites[at] = _of_mixed(q, p, dim, unimix, of_q, of_p)
        elif p is None:
            sites[at] = _of_uniform(q, dim, of_q)
        else:
            sites[at] = _of_pair(q, p, dim, of_q, of_p)
    return sites, derivatives


# All are the sum of q log(q / p) + p - q, of which no class is negative, so that nothing cancels where p is close to q.
# They take p / q, or its logarithm, as it is rounded: between the terms of a class that hardly counts.


def _of_mixed(
    logits_q: Tensor, logits_p: Tensor | None, dim: int, unimix: float, of_q: Tensor | None, of_p: Tensor | None
) -> Tensor:
    floor = logits_q.new_full((), unimix / logits_q.size(dim))
    soft_q = torch.softmax(logits_q, dim)
    q = torch.add(floor, soft_q, alpha=1 - unimix)
    if logits_p is None:
        ratio = 1 / q.size(dim) / q
    else:
        soft_p = torch.softmax(logits_p, dim)
        ratio = torch.add(floor, soft_p, alpha=1 - unimix) / q
    log_ratio, excess = ratio.log(), ratio - 1
    if of_q is not None:
        _through_softmax(-log_ratio, soft_q, dim, of_q)
    if of_p is not None:
        # 1 - q / p: softmax does not feel the 1
        _through_softmax(torch.div(excess, ratio, out=ratio), soft_p, dim, of_p)
    return excess.sub_(log_ratio).mul_(q).sum(dim)


def _of_uniform(logits: Tensor, dim: int, of_q: Tensor | None) -> Tensor:
    classes = logits.size(dim)
    soft = torch.softmax(logits, dim)
    ratio = soft * classes
    log_ratio = ratio.clamp(min=torch.finfo(ratio.dtype).tiny).log_()
    if of_q is not None:
        _through_softmax(log_ratio, soft, dim, of_q)
    return (1 - ratio).addcmul_(ratio, log_ratio).sum(dim).mul_(1 / classes)


def _of_pair(logits_q: Tensor, logits_p: Tensor, dim: int, of_q: Tensor | None, of_p: Tensor | None) -> Tensor:
    log_q = torch.log_softmax(logits_q, dim)
    log_ratio = torch.log_softmax(logits_p, dim) - log_q
    q, excess = log_q.exp_(), torch.expm1(log_ratio)
    if of_q is not None:
        _through_softmax(-log_ratio, q, dim, of_q)
    if of_p is not None:
        torch.mul(excess, q, out=of_p) if of_p.shape == excess.shape else of_p.copy_(excess * q)
    return excess.sub_(log_ratio).mul_(q).sum(dim)


def _through_softmax(grad: Tensor, soft: Tensor, dim: int, into: Tensor) -> None:
    soft = soft.expand_as(grad)
    if into.shape == grad.shape:
        torch.ops.aten._softmax_backward_data.out(grad, soft, dim, grad.dtype, grad_input=into)
    else:
        into.copy_(torch.ops.aten._softmax_backward_data(grad, soft, dim, grad.dtype))


def categorical_kl(
    logits_q: Tensor, logits_p: Tensor | None, weights: Tensor | None, class_dim: int, event_ndims: int, unimix: float,
    scale: float, reduction: str,
) -> Forward:  # fmt: skip
    if not logits_q.numel():
        return None
    sites, derivatives = _kl(logits_q, logits_p, class_dim - logits_q.dim(), unimix)
    rows = sum_event(sites, event_ndims)
    if not finite(rows):
        return None
    return reduced(rows, weights, scale, reduction), _kept(derivatives)


def categorical_kl_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], logits_q: Tensor, logits_p: Tensor | None,
    weights: Tensor | None, class_dim: int, event_ndims: int, unimix: float, scale: float, reduction: str,
) -> Gradients:  # fmt: skip
    sites = [n for i, n in enumerate(logits_q.shape) if i != class_dim]
    count = math.prod(sites[: len(sites) - event_ndims])
    grad = _of_sites(gradient_of_rows(grads[0], count, weights, scale * (1 - unimix), reduction), sites)
    if grad.dim():
        grad = grad.unsqueeze(class_dim)
    return [*_gradients((logits_q, logits_p), kept, (grad, grad), needed), None]


def balanced_categorical_kl(
    posterior_logits: Tensor, prior_logits: Tensor, event_ndims: int, free_nats: float, free_nats_mode: str,
    unimix: float, dynamics_scale: float, representation_scale: float,
) -> Forward:  # fmt: skip
    if not posterior_logits.numel():
        return None
    sites, derivatives = _kl(posterior_logits, prior_logits, -1, unimix)
    rows = sum_event(sites, event_ndims)
    if not finite(rows):
        return None
    costs: tuple[Tensor, ...] = ()
    if free_nats > 0:
        if free_nats_mode == "per_variable":
            costs, rows = (sites,), sum_event(sites.clamp(min=free_nats), event_ndims)
        else:
            costs, rows = (rows,), rows.clamp(min=free_nats)
    dynamics = rows.sum() / rows.numel()
    return (dynamics * (dynamics_scale + representation_scale), dynamics, dynamics.clone()), _kept(derivatives, *costs)


def balanced_categorical_kl_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], posterior_logits: Tensor, prior_logits: Tensor,
    event_ndims: int, free_nats: float, free_nats_mode: str, unimix: float, dynamics_scale: float,
    representation_scale: float,
) -> Gradients:  # fmt: skip
    sites = posterior_logits.shape[:-1]
    share = (1 - unimix) / math.prod(sites[: len(sites) - event_ndims])
    loss, dynamics, representation = (g * share for g in filled(grads, (), (), ()))
    factors = [representation.add_(loss, alpha=representation_scale), dynamics.add_(loss, alpha=dynamics_scale)]
    if free_nats > 0:  # at the bound itself there is a gradient
        costs = _of_sites((kept[-1] >= free_nats).to(loss.dtype), sites).unsqueeze(-1)
        factors = [costs * factor for factor in factors]
    return _gradients((posterior_logits, prior_logits), kept, factors, needed)


# ---- likelihood of a class -------------------------------------------------------------------------------------------


def _counted(x: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None] | None:
    """The classes, and where not all of them count 1 for those that do, with a class that exists for the others. None
    where one does not exist."""
    low, high = (bound.item() for bound in x.aminmax())
    if low >= 0 and high < classes and not low <= ignore_index <= high:
        return x, None
    counts = x != ignore_index
    x = x * counts
    low, high = (bound.item() for bound in x.aminmax())
    return (x, counts) if low >= 0 and high < classes else None


def categorical_log_prob(logits: Tensor, x: Tensor, class_dim: int, event_ndims: int, ignore_index: int) -> Forward:
    if not logits.numel():
        return None
    counted = _counted(x, logits.size(class_dim), ignore_index)
    if counted is None:
        return None
    classes, counts = counted
    index, dtype = classes.unsqueeze(class_dim), accumulate_dtype(logits.dtype)
    soft = torch.softmax(logits, class_dim, dtype=dtype)
    # log_softmax takes another exponential in backward: the largest probability has the sum of them all below it
    largest = logits.amax(class_dim, keepdim=True).to(dtype)
    log_p = logits.gather(class_dim, index).to(dtype) - largest
    log_p += soft.amax(class_dim, keepdim=True).log_()
    sites = log_p.squeeze(class_dim)
    if counts is not None:
        sites.masked_fill_(~counts, 0.0)
    rows = sum_event(sites, event_ndims)
    return (rows, _kept((soft,))) if finite(rows) else None


def categorical_log_prob_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], logits: Tensor, x: Tensor, class_dim: int, event_ndims: int,
    ignore_index: int,
) -> Gradients:  # fmt: skip
    counted = _counted(x, logits.size(class_dim), ignore_index)
    assert counted is not None  # in the forward pass it was not
    classes, counts = counted
    grad = _of_sites(grads[0], x.shape).expand(x.shape).unsqueeze(class_dim)
    slope = _times(kept[1], -grad, kept).scatter_add_(class_dim, classes.unsqueeze(class_dim), grad)
    if counts is not None:
        slope.masked_fill_(~counts.unsqueeze(class_dim), 0.0)
    return [lowered(slope, logits), None]


# ---- the discretized logistic mixture --------------------------------------------------------------------------------

_FAR = 1e30  # where a bin has no bound, in scales


def _mixture(
    params: Tensor, x: Tensor, size: int, of_params: Tensor | None, of_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of `params` `[P, sites]` and `x` `[channels, sites]` each site's log-likelihood, and the sum of all components'.

    The tensors are `[channels, M, sites]`, M being `size`. A bin's mass is sigma(b) - sigma(a) =
    (1 - e^{a - b}) sigma(b) sigma(-a), of which nothing cancels, and log sigma(b) = min(b, 0) - log(1 + e^{-|b|}).
    """
    channels = x.size(0)
    logits, parts = params[:size], params[size:].view(channels, -1, params.size(1))
    x = x.unsqueeze(1)
    centered = x - parts[:, :size]
    if channels == 3:
        c = torch.tanh(parts[:, 2 * size :])
        centered[1].addcmul_(c[0], x[0], value=-1)
        centered[2].addcmul_(c[1], x[0], value=-1).addcmul_(c[2], x[1], value=-1)
    log_scales = parts[:, size : 2 * size]
    inverse = log_scales.clamp(min=MIN_LOG_SCALE).neg_().exp_()
    # the bounds of the bin and its width, in scales
    below, above = (x < -EDGE).to(x.dtype).mul_(_FAR), (x > EDGE).to(x.dtype).mul_(_FAR)
    upper = torch.addcmul(above, inverse, centered + HALF_BIN)
    lower = torch.addcmul(-below, inverse, centered.sub_(HALF_BIN))
    width = torch.add(below.add_(above), inverse, alpha=2 * HALF_BIN)
    share = torch.expm1(-width).neg_()
    tails = upper.abs().neg_().exp_().add_(1).mul_(lower.abs().neg_().exp_().add_(1))
    terms = torch.div(share, tails, out=tails).log_().add_(upper.clamp(max=0)).sub_(lower.clamp(min=0))
    joint = terms.sum(0).add_(logits)
    found = torch.logsumexp(joint, 0) - torch.logsumexp(logits, 0)
    if of_params is None and of_x is None:
        return found, joint.sum()
    weights = torch.softmax(joint, 0)
    of_upper, of_lower = torch.sigmoid(-upper).mul_(weights), torch.sigmoid(lower).mul_(weights)
    of_mean = (of_lower - of_upper).mul_(inverse)
    if of_params is not None:
        torch.sub(weights, torch.softmax(logits, 0), out=of_params[:size])
        into = of_params[size:].view(parts.shape)
        into[:, :size] = of_mean
        of_scale = of_lower.mul_(lower).sub_(of_upper.mul_(upper))
        of_scale.sub_(torch.div(width, share, out=share).sub_(width).mul_(weights))
        # at the bound itself there is a gradient
        bound = MIN_LOG_SCALE * (1 + torch.finfo(x.dtype).eps)
        into[:, size : 2 * size] = torch.ops.aten.threshold_backward(of_scale, log_scales, bound)
        if channels == 3:
            slopes = torch.addcmul(c.new_ones(()), c, c, value=-1)
            for i, (channel, data) in enumerate(((1, 0), (2, 0), (2, 1))):
                torch.mul(slopes[i].mul_(x[data]), of_mean[channel], out=into[i, 2 * size :])
    if of_x is not None:
        torch.sum(of_mean, 1, out=of_x).neg_()
        if channels == 3:
            of_x[0] += (c[0] * of_mean[1]).addcmul_(c[1], of_mean[2]).sum(0)
            of_x[1] += (c[2] * of_mean[2]).sum(0)
    return found, joint.sum()


def discretized_logistic_mixture_log_prob(params: Tensor, x: Tensor, event_ndims: int) -> Forward:
    if not params.numel():
        return None
    sites = x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype))
    derivatives = _derivatives((params, x))
    total = sites.new_zeros(())
    size = params.size(-1) // (10 if x.size(-1) == 3 else 3)
    # blocks as large as the formula's tensors, of fewer elements than there are parameters
    for at in _cuts((*x.shape, size), -2):
        # PyTorch's loops are along the last dimension: it is that of the sites
        across = [upcast(t[at]).reshape(-1, t.size(-1)).t().contiguous() for t in (params, x)]
        made = [None if d is None else torch.empty_like(t) for t, d in zip(across, derivatives, strict=True)]
        found, joint = _mixture(across[0], across[1], size, made[0], made[1])
        sites[at] = found.view(sites[at].shape)
        total += joint
        for derivative, part in zip(derivatives, made, strict=True):
            if derivative is not None and part is not None:
                derivative[at].view(part.t().shape).copy_(part.t())
    if not finite(total, sites):  # a component without any mass does not show in the sites
        return None
    return sum_event(sites, event_ndims), _kept(derivatives)


def discretized_logistic_mixture_log_prob_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], params: Tensor, x: Tensor, event_ndims: int
) -> Gradients:
    grad = _of_sites(grads[0], x.shape[:-1]).unsqueeze(-1)
    return _gradients((params, x), kept, (grad, grad), needed)
