"""Closed forms of importance weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unigen_fast.closed_forms._rows import Forward, Gradients, Tensors, finite
from unigen_fast.reference._common import lowered, upcast
from unigen_fast.reference.importance import over_dim


def _of_rows(grad: Tensor, like: Tensor, dim: int, reduction: str, factor: float) -> Tensor:
    """The gradient of each row's value, times a factor: `dim` kept, or one for all rows of `like`."""
    if reduction == "none":
        return grad.unsqueeze(dim) * factor
    return grad * (factor * like.size(dim) / max(like.numel(), 1) if reduction == "mean" else factor)


def _reduced(rows: Tensor, reduction: str, factor: float, offset: float = 0.0) -> Tensor:
    """The rows times a factor, reduced, and the offset of each row."""
    if reduction == "mean":  # that of nothing is NaN
        count = rows.numel()
        rows = rows.sum().div_(count / factor) if factor else rows.sum().mul_(0.0 if count else math.nan)
    elif reduction == "sum":
        offset *= rows.numel()
        rows = rows.sum().mul_(factor)
    else:
        rows = rows * factor
    return rows.add_(offset) if offset else rows


_FEW = 2**15  # elements, for fewer of which a call takes longer than its work


def _log_sum_exp(x: Tensor, dim: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """log sum exp, and what its gradient takes: nothing, or exponentials and their sum."""
    if x.numel() < _FEW:
        return torch.logsumexp(x, dim), ()
    maximum = x.amax(dim, keepdim=True)
    exponentials = torch.sub(x, maximum).exp_()
    total = exponentials.sum(dim, keepdim=True)
    return total.log().add_(maximum).squeeze(dim), (exponentials, total)


def _gradient(kept: Tensors, grad: Tensor, x: Tensor, dim: int) -> Tensor:
    """The weights times the gradient of each row, `dim` kept, or of all."""
    if not kept:
        return torch.softmax(x, dim).mul_(grad)
    exponentials, total = kept
    return exponentials * (grad / total)


# ---- bounds ----------------------------------------------------------------------------------------------------------


def log_mean_exp(log_w: Tensor, dim: int) -> Forward:
    log_sum, kept = _log_sum_exp(upcast(log_w), dim)
    return (log_sum - math.log(log_w.size(dim)), kept) if finite(log_sum) else None


def log_mean_exp_backward(grads: Tensors, kept: Tensors, needed: Sequence[bool], log_w: Tensor, dim: int) -> Gradients:
    return [lowered(_gradient(kept, grads[0].unsqueeze(dim), upcast(log_w), dim), log_w)]


def power_bound_loss(
    log_w: Tensor, dim: int, power: float, elbo_weight: float, scale: float, reduction: str
) -> Forward:
    if not 0.2 < abs(power) < math.inf:  # below, the logarithm of a mean near 1 is divided by next to nothing
        return None
    x, count = upcast(log_w), log_w.size(dim) or 1
    log_sum, kept = _log_sum_exp(x if power == 1 else x * power, dim)
    offset = -math.log(count) / power
    if elbo_weight == 0:
        loss = _reduced(log_sum, reduction, scale / power, scale * offset)
    else:
        factor = (1 - elbo_weight) / power
        rows = torch.add(x.sum(dim).mul_(elbo_weight / count), log_sum, alpha=factor)
        loss = _reduced(rows, reduction, scale, scale * (1 - elbo_weight) * offset)
    return (loss, kept) if finite(loss) else None


def power_bound_loss_recorded(
    log_w: Tensor, dim: int, power: float, elbo_weight: float, scale: float, reduction: str
) -> Tensor | None:
    if log_w.numel() >= _FEW or not 0.2 < abs(power) < math.inf or elbo_weight:
        return None
    x = upcast(log_w)
    log_sum = torch.logsumexp(x if power == 1 else x * power, dim)
    # PyTorch's weights are exponentials of differences from it
    if not (log_sum.numel() and log_sum.detach().abs().amax().item() < 100):
        return None
    return _reduced(log_sum, reduction, scale / power, -scale * math.log(log_w.size(dim)) / power)


def power_bound_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], log_w: Tensor, dim: int, power: float, elbo_weight: float,
    scale: float, reduction: str,
) -> Gradients:  # fmt: skip
    x = upcast(log_w)
    grad = _of_rows(grads[0], log_w, dim, reduction, scale)
    found = _gradient(kept, grad * (1 - elbo_weight) if elbo_weight else grad, x if power == 1 else x * power, dim)
    if elbo_weight != 0:
        found += grad * (elbo_weight / x.size(dim))
    return [lowered(found, log_w)]


_BOUND = 1.0, 0.0, -1.0  # the IWAE bound among the power bounds: power, weight of the ELBO, scale


def iwae_loss(log_w: Tensor, dim: int, reduction: str, value: str) -> Forward:
    return power_bound_loss(log_w, dim, *_BOUND, reduction) if value == "bound" else None


def iwae_loss_recorded(log_w: Tensor, dim: int, reduction: str, value: str) -> Tensor | None:
    return power_bound_loss_recorded(log_w, dim, *_BOUND, reduction) if value == "bound" else None


def iwae_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], log_w: Tensor, dim: int, reduction: str, value: str
) -> Gradients:
    return power_bound_loss_backward(grads, kept, needed, log_w, dim, *_BOUND, reduction)


def _points(partition: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """The intervals' lower ends and widths."""
    points = torch.tensor(partition, dtype=like.dtype, device=like.device)
    return points[:-1], points.diff()


def tvo_loss(log_w: Tensor, dim: int, partition: Sequence[float], reduction: str) -> Forward:
    """Kept: weights `[rows, P, K]` and their means of l - maximum `[rows, P, 1]`."""
    x = upcast(log_w)
    if x.numel() * len(partition) > 2**22:
        return None
    x = x.movedim(dim, -1).reshape(-1, x.size(dim))
    points, widths = _points(partition, x)
    base = x.amax(1, keepdim=True)
    distance = x - base
    weights = torch.softmax(distance.unsqueeze(1) * points.unsqueeze(1), 2)
    means = torch.bmm(weights, distance.unsqueeze(2))
    rows = torch.addmv(base.squeeze(1), means.squeeze(2), widths)
    if not finite(rows):
        return None
    shape = log_w.shape[:dim] + log_w.shape[dim % log_w.dim() + 1 :]
    return _reduced(rows.view(shape), reduction, -1.0), (distance, weights, means)


def tvo_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], log_w: Tensor, dim: int, partition: Sequence[float],
    reduction: str,
) -> Gradients:  # fmt: skip
    """The mean E of d under weights w of e^{beta d} has the slopes w (1 + beta (d - E))."""
    distance, weights, means = kept
    points, widths = _points(partition, distance)
    rate = points * widths
    factors = torch.stack([torch.addcmul(widths, rate, means.squeeze(2), value=-1), rate.expand(len(means), -1)], 1)
    constant, linear = torch.bmm(factors, weights).unbind(1)
    found = torch.addcmul(constant, linear, distance)
    found = found.view(log_w.movedim(dim, -1).shape).movedim(-1, dim)
    return [lowered(found * _of_rows(grads[0], log_w, dim, reduction, -1.0), log_w)]


def vimco_loss(log_w: Tensor, log_q: Tensor, dim: int, reduction: str) -> Forward:
    """Kept: exponentials of l - maximum, their sums and the signal.

    The signal of a sample is the logarithm of the sum over that without the sample's own exponential and with that of
    the mean of the others. Without the largest, whose own is 1, the sum is one over the others.
    """
    x, count = upcast(log_w), log_w.size(dim)
    maximum, best = x.max(dim, keepdim=True)
    distance = x - maximum
    exponentials = distance.exp()
    others = exponentials.scatter(dim, best, 0.0).sum(dim, keepdim=True)
    total = others + 1
    rest = torch.sub(total, exponentials).scatter_(dim, best, others)
    rest.add_(distance.neg_().add_(-distance.sum(dim, keepdim=True)).mul_(1 / (count - 1)).exp_())
    signal = rest.div_(total).log_().neg_()
    rows = (signal * upcast(log_q)).sum(dim, keepdim=True).add_(total.log()).add_(maximum)
    loss = _reduced(rows.squeeze(dim), reduction, -1.0, math.log(count))
    return (loss, (exponentials, total, signal)) if finite(loss) else None


def vimco_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], log_w: Tensor, log_q: Tensor, dim: int, reduction: str
) -> Gradients:
    exponentials, total, signal = kept
    grad = _of_rows(grads[0], log_w, dim, reduction, -1.0)
    return [
        lowered(exponentials * (grad / total), log_w) if needed[0] else None,
        lowered(signal * grad, log_q) if needed[1] else None,
    ]


def rws_losses(log_p: Tensor, log_q: Tensor, dim: int, reduction: str) -> Forward:
    """Kept: the weights."""
    q = upcast(log_q)
    log_w = upcast(log_p) - q
    log_sum, weights = torch.logsumexp(log_w, dim), torch.softmax(log_w, dim)
    theta = _reduced(log_sum, reduction, -1.0, math.log(q.size(dim) or 1))
    product = weights * q
    phi = _reduced(product.sum(dim) if reduction == "none" else product, "sum" if reduction == "mean" else reduction,
                   -q.size(dim) / max(q.numel(), 1) if reduction == "mean" else -1.0)  # fmt: skip
    return ((theta, phi), (weights,)) if finite(theta, phi) else None


def rws_losses_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], log_p: Tensor, log_q: Tensor, dim: int, reduction: str
) -> Gradients:
    return [
        lowered(kept[0] * _of_rows(grad, x, dim, reduction, -1.0), x) if wanted and grad is not None else None
        for grad, x, wanted in zip(grads, (log_p, log_q), needed, strict=True)
    ]


def log_variance_loss(log_w: Tensor, dim: int, reduction: str) -> Forward:
    """Kept: the deviations from the mean."""
    x, count = upcast(log_w), log_w.size(dim)
    deviation = x - x.amax(dim, keepdim=True)
    deviation -= deviation.sum(dim, keepdim=True).mul_(1 / count)
    loss = _reduced(deviation.square().sum(dim), reduction, 0.5 / (count - 1))
    return (loss, (deviation,)) if finite(loss) else None


def log_variance_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], log_w: Tensor, dim: int, reduction: str
) -> Gradients:
    return [lowered(kept[0] * _of_rows(grads[0], log_w, dim, reduction, 1 / (log_w.size(dim) - 1)), log_w)]


# ---- weights ---------------------------------------------------------------------------------------------------------


def _softmax(log_w: Tensor, dim: int, temperature: float) -> Tensor:
    x = upcast(log_w)
    return torch.softmax(x if temperature == 1 else x / temperature, dim)


def importance_weights_recorded(log_w: Tensor, dim: int, temperature: float) -> Tensor | None:
    weights = _softmax(log_w, dim, temperature)
    return weights if finite(weights.detach()) else None


def effective_sample_size(log_w: Tensor, dim: int) -> Forward:
    squares = torch.softmax(upcast(log_w), dim).square_().sum(dim)
    return (squares.reciprocal_(), ()) if finite(squares) else None


def importance_weighted_sum(log_w: Tensor, payload: Tensor, dim: int, temperature: float) -> Forward:
    """Kept: weights and value."""
    weights = _softmax(log_w, dim, temperature)
    value = (weights * upcast(payload)).sum(dim)
    return (value, (weights, value)) if finite(value) else None


def importance_weighted_sum_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], log_w: Tensor, payload: Tensor, dim: int, temperature: float
) -> Gradients:
    weights, value = kept
    of_payload = weights * grads[0].unsqueeze(dim)
    of_weights = None
    if needed[0]:
        of_weights = torch.sub(upcast(payload), value.unsqueeze(dim)).mul_(of_payload)
        of_weights = lowered(of_weights if temperature == 1 else of_weights.div_(temperature), log_w)
    return [of_weights, lowered(of_payload, payload) if needed[1] else None]


def density_ratios(logits: Tensor) -> Tensor:
    """exp(l) / mean of exp(l)."""
    return torch.softmax(logits.reshape(-1), 0).mul_(logits.numel()).view(logits.shape)


# ---- generators ------------------------------------------------------------------------------------------------------


def importance_weighted_generator_loss(
    fake: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str
) -> Forward:
    """Kept: the weights and, where they are differentiated, log D and the rows."""
    logits, dim = over_dim(upcast(fake), dim)
    weights = _softmax(logits, dim, temperature)
    log_d = logsigmoid(logits)
    if detach and reduction != "none":
        count = logits.size(dim) / max(logits.numel(), 1) if reduction == "mean" else 1.0
        loss = log_d.mul_(weights).sum().mul_(-count)
        return (loss, (weights,)) if finite(loss) else None
    rows = (log_d * weights).sum(dim)
    loss = _reduced(rows, reduction, -1.0)
    return (loss, (weights,) if detach else (weights, log_d, rows)) if finite(loss) else None


def importance_weighted_generator_loss_recorded(
    fake: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str
) -> Tensor | None:
    if not detach or reduction == "none" or fake.numel() > 2**12:
        return None
    logits, dim = over_dim(upcast(fake), dim)
    terms = logsigmoid(logits) * _softmax(logits.detach(), dim, temperature)
    loss = terms.sum() * (-logits.size(dim) / max(logits.numel(), 1) if reduction == "mean" else -1.0)
    return loss if finite(loss) else None


def importance_weighted_generator_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], fake: Tensor, dim: int | None, temperature: float,
    detach: bool, reduction: str,
) -> Gradients:  # fmt: skip
    logits, dim = over_dim(upcast(fake), dim)
    slope = torch.neg(logits).sigmoid_()
    if not detach:
        _, log_d, rows = kept
        slope += torch.sub(log_d, rows.unsqueeze(dim)).mul_(1 / temperature)
    slope.mul_(kept[0]).mul_(_of_rows(grads[0], logits, dim, reduction, -1.0))
    return [lowered(slope.view(fake.shape), fake)]


def grouped_importance_weighted_generator_loss(
    fake: Tensor, groups: Tensor, temperature: float, detach: bool, reduction: str
) -> Forward:
    """Kept: the weights, each times what its loss counts.

    Of labels from a short range, and logits whose exponentials are numbers as they are.
    """
    logits = upcast(fake)
    if not detach or not fake.numel():
        return None
    first, last = map(int, torch.aminmax(groups))
    count = last - first + 1
    log_w = logits if temperature == 1 else logits / temperature
    if count > 4 * fake.numel() or not log_w.amin().item() > -60:
        return None
    place = groups - first if first else groups
    exponentials = log_w.exp()
    totals = exponentials.new_zeros(count).index_add_(0, place, exponentials)
    totals.mul_(-torch.count_nonzero(totals) if reduction == "mean" else -1)
    weights = exponentials.div_(totals.index_select(0, place))
    loss = (logsigmoid(logits) * weights).sum()
    return (loss, (weights,)) if finite(loss) else None


def grouped_importance_weighted_generator_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], fake: Tensor, groups: Tensor, temperature: float,
    detach: bool, reduction: str,
) -> Gradients:  # fmt: skip
    slope = torch.neg(upcast(fake)).sigmoid_()
    return [lowered(slope.mul_(kept[0]).mul_(grads[0]), fake), None]
