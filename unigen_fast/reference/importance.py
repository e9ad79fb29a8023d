"""Importance weights in plain PyTorch. `dim=None` reduces over every dimension."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unigen_fast.reference._common import finite_maximum, reduce_rows, silenced, softplus, upcast


def over_dim(x: Tensor, dim: int | None) -> tuple[Tensor, int]:
    return (x.reshape(-1), 0) if dim is None else (x, dim)


def row_statistics(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and sum of `exp(log_w - maximum)` over `dim`, both with `dim` kept.

    The maximum is `finite_maximum`: it cancels from every result. A row of `-inf` sums to 0, one with `+inf` or NaN to
    NaN.
    """
    maximum = finite_maximum(log_w, dim)
    return maximum, (log_w - maximum).exp_().sum(dim, keepdim=True)


def _at_least_one(total: Tensor) -> Tensor:
    """A sum of exponentials, of which the largest is 1: it is smaller only in a row of -inf, which has no gradient."""
    return total.clamp(min=0.5)


def normalized_weights(log_w: Tensor, dim: int) -> Tensor:
    """softmax, but 0 (with gradient 0) throughout a row of `-inf`."""
    exponentials = (log_w - finite_maximum(log_w, dim)).exp_()
    return exponentials / _at_least_one(exponentials.sum(dim, keepdim=True))


def log_sum_exp(maximum: Tensor, total: Tensor) -> Tensor:
    """`maximum + log(total)`, `-inf` with gradient 0 where `total` is 0."""
    empty = total == 0
    return torch.where(empty, -math.inf, maximum + torch.where(empty, 1.0, total).log())


def _weighted_sum(weights: Tensor, payload: Tensor, dim: int) -> Tensor:
    """sum w·p, in which a weight of 0 silences an infinite payload."""
    return (weights * silenced(payload, weights)).sum(dim)


def _stacked(dim: int, *rows: Tensor) -> Tensor:
    """Numbers of each row that have `dim` kept, one plane for each, without gradient."""
    return torch.stack([r.detach().squeeze(dim) for r in rows])


def log_mean_exp(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns (value `[rows]`, statistics `[2, rows]`: maximum and sum of exponentials)."""
    log_w = upcast(log_w)
    maximum, total = row_statistics(log_w, dim)
    value = log_sum_exp(maximum, total).squeeze(dim) - math.log(max(log_w.size(dim), 1))
    return value, _stacked(dim, maximum, total)


def importance_weights(log_w: Tensor, dim: int, temperature: float) -> Tensor:
    return normalized_weights(upcast(log_w) / temperature, dim)


def effective_sample_size(log_w: Tensor, dim: int) -> Tensor:
    """(sum w)² / sum w²; 0 for a row of `-inf`."""
    log_w = upcast(log_w.detach())
    exponentials = (log_w - finite_maximum(log_w, dim)).exp_()
    root = _at_least_one(torch.linalg.vector_norm(exponentials, dim=dim))
    return (exponentials.sum(dim) / root).square()


def iwae_loss(log_w: Tensor, dim: int, reduction: str, value: str) -> tuple[Tensor, Tensor]:
    """Returns (loss, statistics as in `log_mean_exp`)."""
    bound, statistics = log_mean_exp(log_w, dim)
    if value == "surrogate":
        log_w = upcast(log_w)
        surrogate = _weighted_sum(normalized_weights(log_w.detach(), dim), log_w, dim)
        bound = torch.where(statistics[1] == 0, -math.inf, surrogate)
    return reduce_rows(-bound, reduction), statistics


def power_rows(
    log_w: Tensor, dim: int, power: float, elbo_weight: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Of `power_bound_loss`, `dim` kept: the bound; the l whose power is the largest, made finite; the powers of the
    weights relative to it, None where all are 1; their sum; and 1, or 0 in a row whose bound is -inf."""
    count = max(log_w.size(dim), 1)
    extreme = log_w.detach().amax(dim, keepdim=True)
    if power < 0:  # a +inf is none of the smallest: it is in the sum of what is 0 of all others
        extreme = log_w.detach().amin(dim, keepdim=True) + torch.nan_to_num(extreme, math.nan, math.nan, 0.0) * 0
    base = torch.nan_to_num(extreme, nan=math.nan, posinf=math.nan, neginf=0.0)
    alive = torch.where(extreme == -math.inf, 0.0, base * 0 + 1)
    if power <= 0 or elbo_weight != 0:  # it takes no gradient, and turns no other into NaN
        log_w = torch.where(extreme == -math.inf, 0.0, log_w)
    distance = log_w - base
    powers: Tensor | None = None
    if power == 0:
        total = torch.full_like(base, count) + (base - base)
        bound = distance.mean(dim, keepdim=True)
    elif math.isinf(power):
        powers = (log_w.detach() == base).to(log_w.dtype)
        total = powers.sum(dim, keepdim=True) + (base - base)
        possible = torch.where(distance == -math.inf, 0.0, distance)  # a NaN row has NaN gradients
        bound = (powers / _at_least_one(total) * possible).sum(dim, keepdim=True)
    else:
        t = power * distance
        powers = t.exp()
        total = powers.sum(dim, keepdim=True)
        log_mean = _at_least_one(total).log() - math.log(count)
        if -0.5 < power < 0.5:  # the logarithm of a mean near 1, divided by power, would have no digits
            excess = t.expm1().mean(dim, keepdim=True)
            log_mean = torch.where(excess > -0.5, excess.clamp(min=-0.5).log1p(), log_mean)
        bound = log_mean / power
    if elbo_weight != 0:
        bound = bound + elbo_weight * (distance.mean(dim, keepdim=True) - bound)
    return extreme + bound, base, powers, total * alive, alive


def power_bound_loss(
    log_w: Tensor, dim: int, power: float, elbo_weight: float, scale: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """scale · [elbo_weight · mean l + (1 - elbo_weight) · (1/power) log mean exp(power · l)] of log-weights l.

    The second term is mean l at power 0, and the largest or the smallest l at an infinite one (ties share its
    gradient). Where it is -inf, as in a row of -inf, it has no gradient. Returns (loss, statistics `[2, rows]`: the l
    whose power is the largest, made finite, and the sum of exp(power (l - it)); K at power 0, the number of ties at an
    infinite one).
    """
    bound, base, _, total, _ = power_rows(upcast(log_w), dim, power, elbo_weight)
    return reduce_rows(bound.squeeze(dim), reduction, scale), _stacked(dim, base, total)


def tvo_loss(log_w: Tensor, dim: int, partition: Sequence[float], reduction: str) -> tuple[Tensor, Tensor]:
    """-sum_p (b_p+1 - b_p) sum_k softmax_k(b_p l)_k l_k. Returns (loss, statistics `[2 P - 1, rows]`: the maximum, made
    finite, and for each b_p the sum of exponentials (K at 0) and the mean of l - maximum)."""
    x = upcast(log_w)
    bound = x.detach().amax(dim, keepdim=True)
    empty = bound == -math.inf
    base = torch.nan_to_num(bound, nan=math.nan, posinf=math.nan, neginf=0.0)
    distance = torch.where(empty, 0.0, x) - base
    finite = torch.nan_to_num(distance, nan=math.nan, posinf=math.inf, neginf=0.0)
    statistics = [base]
    for beta, following in itertools.pairwise(partition):
        if beta == 0:
            total = torch.full_like(base, x.size(dim))
            mean = distance.mean(dim, keepdim=True)
        else:
            exponentials = (beta * distance).exp_()
            total = exponentials.sum(dim, keepdim=True)
            mean = (exponentials * finite).sum(dim, keepdim=True) / total
        bound = bound + (following - beta) * mean
        statistics += [torch.where(empty, 0.0, total), mean]
    return reduce_rows(-bound.squeeze(dim), reduction), _stacked(dim, *statistics)


def tvo_signal(log_w: Tensor, dim: int, partition: Sequence[float]) -> Tensor:
    """What each sample adds to the bound: sum_p (b_p+1 - b_p) (E_p - E_p without sample k), which is
    w_k (l_k - E_p) / (1 - w_k). 0 for what is -inf, and throughout a row whose loss is no number."""
    x = upcast(log_w)
    possible = x != -math.inf
    largest = x.amax(dim, keepdim=True)
    base = torch.where(largest == -math.inf, 0.0, largest)
    distance = torch.where(possible, x - base, 0.0)
    best = torch.zeros_like(possible).scatter_(dim, x.argmax(dim, keepdim=True), True)
    second = torch.where(best, -math.inf, x).amax(dim, keepdim=True)
    second = torch.where(second == -math.inf, base, second) - base
    signal = torch.zeros_like(x)
    for beta, following in itertools.pairwise(partition):
        e = torch.where(possible, (beta * distance).exp(), 0.0)
        total = e.sum(dim, keepdim=True)
        mean = (e * distance).sum(dim, keepdim=True) / total
        # of the others relative to their own largest: they do not vanish beside the best
        others = torch.where(best | ~possible, 0.0, (beta * (distance - second)).exp())
        rest = others.sum(dim, keepdim=True)
        of_others = (others * distance).sum(dim, keepdim=True) / rest
        own = torch.where(best, e / total * (distance - of_others), e * (distance - mean) / (total - e))
        signal = signal + (following - beta) * own
    return torch.where(possible & signal.isfinite(), signal, 0.0)


def vimco_signal(log_w: Tensor, dim: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """LME - LME_{-k} for each k, LME_{-k} with log_w_k replaced by the mean of the others: O(K), and no difference of
    two sums that are nearly the same.

    Returns (signal, five numbers of each row, `dim` kept: the largest log-weight, made finite; the sum of exponentials;
    the sum of the finite l - largest; the number of -inf; the signal of the largest, NaN if it is not the only one).
    """
    count = log_w.size(dim)
    largest, second = log_w.topk(2, dim).values.split(1, dim)  # NaN first
    only = second < largest
    largest, second = (torch.nan_to_num(m, nan=math.nan, posinf=math.nan, neginf=0.0) for m in (largest, second))
    distance = log_w - largest
    best = (distance == 0) & only
    total = distance.exp().sum(dim, keepdim=True)
    # of all but the largest, relative to the second: it does not vanish beside the largest
    others = (log_w - second).exp_().masked_fill_(best, 0.0).sum(dim, keepdim=True)
    impossible = log_w == -math.inf
    finite = torch.nan_to_num(distance, nan=math.nan, posinf=math.inf, neginf=0.0)
    drop = finite.sum(dim, keepdim=True)
    missing = impossible.sum(dim, keepdim=True)

    # the mean of the others, as a distance from the largest
    baseline = finite.neg_().add_(drop).div_(count - 1).masked_fill_(missing > impossible, -math.inf)
    gap = (distance - baseline).masked_fill_(distance == baseline, 0.0)
    change = torch.maximum(distance, baseline).exp_().div_(_at_least_one(total))
    del distance, baseline, finite
    signal = change.mul_(gap.sign()).mul_(gap.abs_().neg_().expm1_()).log1p_().neg_()

    mean = (drop / (count - 1)).masked_fill_(missing > 0, -math.inf)
    change = mean.expm1() / total
    step = largest - second
    direct = step + total.log() - (others + (mean + step).exp_()).log_()
    of_best = torch.where(change < -0.75, direct, -change.log1p())
    signal = torch.where(best, of_best, signal)
    of_best = torch.where(only, of_best, math.nan)
    return signal, (largest, total, drop, missing.to(total.dtype), of_best)


def vimco_loss(log_w: Tensor, log_q: Tensor, dim: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Returns (loss, statistics `[5, rows]`, those of `vimco_signal`)."""
    log_w, log_q = upcast(log_w), upcast(log_q)
    signal, numbers = vimco_signal(log_w.detach(), dim)
    bound, _ = log_mean_exp(log_w, dim)
    # a signal has either sign
    weighted = signal * torch.where(signal == 0, 0.0, log_q)
    return reduce_rows(-bound - weighted.sum(dim), reduction), _stacked(dim, *numbers)


def rws_losses(log_p: Tensor, log_q: Tensor, dim: int, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (wake-theta loss, wake-phi loss, statistics as in `log_mean_exp`, of log_p - log_q)."""
    log_p, log_q = upcast(log_p), upcast(log_q)
    log_w = log_p - log_q.detach()
    bound, statistics = log_mean_exp(log_w, dim)
    cross_entropy = -_weighted_sum(normalized_weights(log_w.detach(), dim), log_q, dim)
    return reduce_rows(-bound, reduction), reduce_rows(cross_entropy, reduction), statistics


def log_variance_loss(log_w: Tensor, dim: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Half the unbiased variance. Returns (loss, statistics `[2, rows]`: the maximum, made finite, and the mean of
    log_w - maximum)."""
    log_w = upcast(log_w)
    maximum = finite_maximum(log_w, dim)
    distance = log_w - maximum
    mean = distance.mean(dim, keepdim=True)
    variance = (distance - mean).square().sum(dim) / (log_w.size(dim) - 1)
    return reduce_rows(0.5 * variance, reduction), _stacked(dim, maximum, mean)


def importance_weighted_sum(log_w: Tensor, payload: Tensor, dim: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns (sum of w·payload, statistics as in `log_mean_exp`, of log_w / temperature)."""
    log_w, payload = upcast(log_w) / temperature, upcast(payload)
    maximum, total = row_statistics(log_w, dim)
    value = _weighted_sum(normalized_weights(log_w, dim), payload, dim)
    return value, _stacked(dim, maximum, total)


def weight_diagnostics(log_w: Tensor, dim: int) -> Tensor:
    """`[4, rows]`: log-mean-exp, effective sample size, largest weight, entropy. -inf, 0, 0, 0 of a row of -inf."""
    log_w = upcast(log_w.detach())
    maximum, total = row_statistics(log_w, dim)
    distance = log_w - maximum
    exponentials = distance.exp()
    inverse = torch.where(total == 0, torch.zeros_like(total), 1 / total).squeeze(dim)
    bound = log_sum_exp(maximum, total).squeeze(dim) - math.log(max(log_w.size(dim), 1))
    total = total.squeeze(dim)
    squares = exponentials.square().sum(dim)
    ess = torch.where(total == 0, torch.zeros_like(total), total * total / squares)
    entropy = torch.where(total == 0, torch.zeros_like(total), total.log()) - inverse * _weighted_sum(
        exponentials, distance, dim
    )
    return torch.stack([bound, ess, inverse, entropy])


def pareto_shape(tail: Tensor) -> Tensor:
    """Shape of the generalised Pareto distribution fitted to each row of a tail; +inf without 5 weights in it.

    `tail`: the M largest log-weights in descending order, and the one that follows, `[…, M + 1]`. The fit is that of
    Zhang & Stephens (2009), with the weak prior of Vehtari et al. (2024). The candidates b of their grid lie near 1 /
    the largest excess x_1, and 1 - b x near 0: they are kept as c = b - 1 / x_1.
    """
    tail = tail.detach()
    info = torch.finfo(tail.dtype)
    most = tail.size(-1) - 1
    maximum = torch.where(tail[..., :1] == -math.inf, 0.0, tail[..., :1])
    cutoff = (tail[..., -1:] - maximum).clamp(min=math.log(info.tiny))
    distance = tail[..., :-1] - maximum
    inside = distance > cutoff
    n = inside.sum(-1, keepdim=True).to(tail.dtype)  # ties with the cutoff are outside
    excess = torch.where(inside, cutoff.exp() * (distance - cutoff).expm1(), 0.0)
    enough = n >= 5
    n = torch.where(enough, n, 5.0)
    quartile = n - (n / 4 + 0.5).floor()  # the first of n ascending numbers, counted from the largest
    quarter = excess.gather(-1, quartile.long().clamp(max=most - 1))
    grid_size = 30 + n.sqrt().floor()
    point = torch.arange(1, 31 + math.isqrt(most), dtype=tail.dtype, device=tail.device)
    largest = excess[..., :1]
    c = (1 - (grid_size / (point - 0.5)).sqrt()) / (3 * quarter)

    below = ((largest - excess) / largest).unsqueeze(-2)  # 1 outside the tail

    def mean_log(c: Tensor) -> Tensor:
        return (below - c.unsqueeze(-1) * excess.unsqueeze(-2)).log_().sum(-1) / n

    k = mean_log(c)
    likelihood = n * ((-(c + 1 / largest) / k).log() - k - 1)
    likelihood = torch.where(point <= grid_size, likelihood, -math.inf)
    weights = likelihood.softmax(-1)
    weights = torch.where(weights >= 10 * info.eps, weights, 0.0)
    weights = weights / weights.sum(-1, keepdim=True)
    best = (torch.where(weights == 0, 0.0, c) * weights).sum(-1, keepdim=True)
    shape = torch.where(enough, (n * mean_log(best) + 5) / (n + 10), math.inf)
    return torch.where(maximum.isnan(), math.nan, shape).squeeze(-1)


def importance_weighted_generator_loss(
    fake: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """Returns (loss, statistics `[3, rows]`: maximum and sum of exponentials of `fake / temperature`, row loss)."""
    logits, dim = over_dim(upcast(fake), dim)
    log_w = logits / temperature
    maximum, total = row_statistics(log_w, dim)
    weights = normalized_weights(log_w, dim)
    rows = _weighted_sum(weights.detach() if detach else weights, softplus(-logits), dim)
    return reduce_rows(rows, reduction), torch.cat([_stacked(dim, maximum, total), rows.detach().unsqueeze(0)])


def grouped_weights(log_w: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of each sample among those of its label; the segment of each sample; and the number of labels present.
    No synchronisation with the host.

    Sorted by label, each label's run has one of N segments, of which those beyond the number of labels stay empty.
    """
    labels, order = torch.sort(groups, stable=True)
    begins = torch.ones_like(labels)
    begins[1:] = labels[1:] != labels[:-1]
    runs = begins.cumsum(0)
    segment = torch.empty_like(runs).scatter_(0, order, runs - 1)
    largest = torch.full_like(log_w, -math.inf, requires_grad=False)
    largest = largest.scatter_reduce(0, segment, log_w.detach(), "amax")
    largest = torch.nan_to_num(largest, nan=math.nan, posinf=math.nan, neginf=0.0)
    exponentials = (log_w - largest[segment]).exp_()
    total = torch.zeros_like(largest).scatter_add(0, segment, exponentials)
    return exponentials / _at_least_one(total)[segment], segment, begins.sum()


def grouped_importance_weighted_generator_loss(
    fake: Tensor, groups: Tensor, temperature: float, detach: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """IWGAN with the weights normalised among the samples of one label.

    Returns (loss, statistics `[2N + 1]`: each sample's weight, the loss of its group, what the sum over the groups is
    multiplied by).
    """
    logits = upcast(fake)
    weights, segment, count = grouped_weights(logits / temperature, groups)
    if detach:
        weights = weights.detach()
    terms = weights * silenced(softplus(-logits), weights)
    factor = count.to(terms.dtype).reciprocal() if reduction == "mean" else terms.new_ones(())
    loss = terms.sum() * (math.nan if reduction == "mean" and logits.numel() == 0 else factor)
    of_group = torch.zeros_like(terms.detach()).scatter_add(0, segment, terms.detach())[segment]
    return loss, torch.cat([weights.detach(), of_group, factor.reshape(1)])
