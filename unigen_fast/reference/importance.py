"""Importance weights in plain PyTorch. `dim=None` reduces over every dimension."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unigen_fast.reference._common import precise, reduce_rows, softplus, upcast


def _over_dim(x: Tensor, dim: int | None) -> tuple[Tensor, int]:
    return (x.reshape(-1), 0) if dim is None else (x, dim)


def row_statistics(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and sum of `exp(log_w - maximum)` over `dim`, both with `dim` kept.

    The maximum is a constant (it cancels from every result), and 0 for a row of `-inf`, so that such a row sums to 0
    instead of turning into NaN. A `+inf` or NaN makes its row's sum NaN.
    """
    maximum = log_w.detach().amax(dim, keepdim=True)
    maximum = torch.where(maximum == -math.inf, torch.zeros_like(maximum), maximum)
    return maximum, (log_w - maximum).exp().sum(dim, keepdim=True)


def normalized_weights(log_w: Tensor, dim: int) -> Tensor:
    """softmax, but 0 (with gradient 0) throughout a row of `-inf`."""
    maximum, total = row_statistics(log_w, dim)
    empty = total == 0
    weights = (log_w - maximum).exp() / torch.where(empty, torch.ones_like(total), total)
    return torch.where(empty, torch.zeros_like(weights), weights)


def log_sum_exp(maximum: Tensor, total: Tensor) -> Tensor:
    """`maximum + log(total)`, `-inf` with gradient 0 where `total` is 0."""
    empty = total == 0
    value = maximum + torch.where(empty, torch.ones_like(total), total).log()
    return torch.where(empty, torch.full_like(value, -math.inf), value)


def _weighted_sum(weights: Tensor, payload: Tensor, dim: int) -> Tensor:
    """sum w·p, in which a weight of 0 silences an infinite payload."""
    return (weights * torch.where(weights == 0, torch.zeros_like(payload), payload)).sum(dim)


def log_mean_exp(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns (value `[rows]`, statistics `[2, rows]`: maximum and sum of exponentials)."""
    log_w = upcast(log_w)
    maximum, total = row_statistics(log_w, dim)
    value = log_sum_exp(maximum, total).squeeze(dim) - math.log(max(log_w.size(dim), 1))
    return value, torch.stack([maximum.squeeze(dim), total.squeeze(dim)])


def importance_weights(log_w: Tensor, dim: int, temperature: float) -> Tensor:
    return normalized_weights(upcast(log_w) / temperature, dim)


def effective_sample_size(log_w: Tensor, dim: int) -> Tensor:
    """(sum w)² / sum w²; 0 for a row of `-inf`."""
    weights = normalized_weights(upcast(log_w.detach()), dim)
    squares = weights.square().sum(dim)
    empty = squares == 0
    return torch.where(empty, torch.zeros_like(squares), 1 / torch.where(empty, torch.ones_like(squares), squares))


def iwae_loss(log_w: Tensor, dim: int, reduction: str, value: str) -> tuple[Tensor, Tensor]:
    """Returns (loss, statistics as in `log_mean_exp`)."""
    bound, statistics = log_mean_exp(log_w, dim)
    if value == "surrogate":
        log_w = upcast(log_w)
        surrogate = _weighted_sum(normalized_weights(log_w.detach(), dim), log_w, dim)
        bound = torch.where(statistics[1] == 0, -math.inf, surrogate)
    return reduce_rows(-bound, reduction), statistics


def power_bound_loss(
    log_w: Tensor, dim: int, power: float, elbo_weight: float, scale: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """scale · [elbo_weight · mean l + (1 - elbo_weight) · (1/power) log mean exp(power · l)] of log-weights l.

    The second term is mean l at power 0, and the largest or the smallest l at an infinite one (ties share its
    gradient). Where it is -inf, as in a row of -inf, it has no gradient. Returns (loss, statistics `[2, rows]`: the l
    whose power is the largest, made finite, and the sum of exp(power (l - it)); K at power 0, the number of ties at an
    infinite one).
    """
    x = upcast(log_w)
    # added, so that the gradients of the row are NaN as well
    x = x + torch.where(x == math.inf, torch.full_like(x, math.nan), torch.zeros_like(x))
    count = max(x.size(dim), 1)
    extreme = x.detach().amin(dim, keepdim=True) if power < 0 else x.detach().amax(dim, keepdim=True)
    empty = extreme == -math.inf
    base = torch.where(empty, torch.zeros_like(extreme), extreme)
    x = torch.where(empty, torch.zeros_like(x), x)  # takes no gradient, and turns no other into NaN
    distance = x - base
    if power == 0:
        total = torch.full_like(base, count) + (base - base)
        bound = distance.mean(dim)
    elif math.isinf(power):
        best = (x.detach() == base).to(x.dtype)
        total = best.sum(dim, keepdim=True) + (base - base)
        bound = (best / total * torch.where(distance == -math.inf, torch.zeros_like(x), distance)).sum(dim)
    else:
        t = power * distance
        total = t.exp().sum(dim, keepdim=True)
        excess = t.expm1().mean(dim)  # where it is small its logarithm is more accurate than that of the sum
        near = excess > -0.5
        log_mean = torch.where(
            near,
            torch.where(near, excess, torch.zeros_like(excess)).log1p(),
            total.squeeze(dim).log() - math.log(count),
        )
        bound = log_mean / power
    if elbo_weight != 0:
        bound = bound + elbo_weight * (distance.mean(dim) - bound)
    bound = torch.where(empty, torch.full_like(base, -math.inf), base).squeeze(dim) + bound
    total = torch.where(empty, torch.zeros_like(total), total)
    statistics = torch.stack([base.squeeze(dim), total.squeeze(dim)])
    return reduce_rows(bound, reduction, scale), statistics.detach()


def tvo_loss(log_w: Tensor, dim: int, partition: Sequence[float], reduction: str) -> tuple[Tensor, Tensor]:
    """-sum_p (b_p+1 - b_p) sum_k softmax_k(b_p l)_k l_k. Returns (loss, statistics `[2 P - 1, rows]`: the maximum, made
    finite, and for each b_p the sum of exponentials (K at 0) and the mean of l - maximum)."""
    x = upcast(log_w)
    maximum = x.detach().amax(dim, keepdim=True)
    empty = maximum == -math.inf
    base = torch.where(empty, torch.zeros_like(maximum), maximum)
    distance = torch.where(empty, torch.zeros_like(x), x) - base
    bound = torch.where(empty, torch.full_like(base, -math.inf), base).squeeze(dim)
    statistics = [base.squeeze(dim)]
    for beta, following in itertools.pairwise(partition):
        if beta == 0:
            total = torch.full_like(base, x.size(dim))
            mean = distance.mean(dim)
        else:
            exponentials = (beta * distance).exp()
            total = exponentials.sum(dim, keepdim=True)
            mean = _weighted_sum(exponentials, distance, dim) / total.squeeze(dim)
        bound = bound + (following - beta) * mean
        statistics += [torch.where(empty, torch.zeros_like(total), total).squeeze(dim), mean]
    return reduce_rows(-bound, reduction), torch.stack(statistics).detach()


def tvo_signal(log_w: Tensor, dim: int, partition: Sequence[float]) -> Tensor:
    """What each sample adds to the bound: sum_p (b_p+1 - b_p) (E_p - E_p without sample k), which is
    w_k (l_k - E_p) / (1 - w_k). 0 for what is -inf, and throughout a row whose loss is no number."""
    x = precise(log_w)
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
    finite = torch.where(possible & signal.isfinite(), signal, 0.0)
    return finite.to(log_w.dtype if log_w.dtype == torch.float64 else torch.float32)


def vimco_signal(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """LME - LME_{-k} for each k, LME_{-k} with log_w_k replaced by the mean of the others: O(K), and no difference of
    two sums that are nearly the same.

    Returns (signal, statistics `[5, rows]`: the largest log-weight, made finite; the sum of exponentials; the sum of
    the finite l - largest; the number of -inf; the signal of the largest, NaN if it is not the only one).
    """
    count = log_w.size(dim)
    largest, second = log_w.topk(2, dim).values.split(1, dim)  # NaN first
    only = second < largest
    best = (log_w == largest) & only
    largest, second = (torch.where(m == -math.inf, torch.zeros_like(m), m) for m in (largest, second))
    distance = log_w - largest
    total = distance.exp().sum(dim, keepdim=True)
    # of all but the largest, relative to the second: it does not vanish beside the largest
    others = torch.where(best, torch.zeros_like(log_w), (log_w - second).exp()).sum(dim, keepdim=True)
    impossible = log_w == -math.inf
    finite = torch.where(impossible, torch.zeros_like(distance), distance)
    drop = finite.sum(dim, keepdim=True)
    missing = impossible.sum(dim, keepdim=True).to(log_w.dtype)

    # the mean of the others, as a distance from the largest
    baseline = (drop - finite) / (count - 1)
    baseline = torch.where(missing - impossible.to(log_w.dtype) > 0, torch.full_like(baseline, -math.inf), baseline)
    gap = torch.where(distance == baseline, torch.zeros_like(baseline), distance - baseline)
    change = torch.maximum(distance, baseline).exp() * (-gap.abs()).expm1() / total
    signal = -torch.where(gap < 0, -change, change).log1p()

    mean = torch.where(missing > 0, torch.full_like(drop, -math.inf), drop / (count - 1))
    change = mean.expm1() / total
    direct = (largest - second) + total.log() - (others + (mean + (largest - second)).exp()).log()
    of_best = torch.where(change < -0.75, direct, -change.log1p())
    signal = torch.where(best, of_best, signal)
    signal = torch.where(total == 0, torch.zeros_like(signal), signal)
    of_best = torch.where(only, of_best, torch.full_like(of_best, math.nan))
    return signal, torch.stack([s.squeeze(dim) for s in (largest, total, drop, missing, of_best)])


def vimco_loss(log_w: Tensor, log_q: Tensor, dim: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Returns (loss, statistics as in `vimco_signal`)."""
    log_w, log_q = upcast(log_w), upcast(log_q)
    signal, statistics = vimco_signal(log_w.detach(), dim)
    bound, _ = log_mean_exp(log_w, dim)
    return reduce_rows(-bound - _weighted_sum(signal, log_q, dim), reduction), statistics


def rws_losses(log_p: Tensor, log_q: Tensor, dim: int, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (wake-theta loss, wake-phi loss, statistics as in `log_mean_exp`, of log_p - log_q)."""
    log_p, log_q = upcast(log_p), upcast(log_q)
    log_w = log_p - log_q.detach()
    bound, statistics = log_mean_exp(log_w, dim)
    cross_entropy = -_weighted_sum(normalized_weights(log_w.detach(), dim), log_q, dim)
    return reduce_rows(-bound, reduction), reduce_rows(cross_entropy, reduction), statistics.detach()


def log_variance_loss(log_w: Tensor, dim: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Half the unbiased variance. Returns (loss, statistics `[2, rows]`: the maximum, made finite, and the mean of
    log_w - maximum)."""
    log_w = upcast(log_w)
    maximum = log_w.detach().amax(dim, keepdim=True)
    maximum = torch.where(maximum == -math.inf, torch.zeros_like(maximum), maximum)
    distance = log_w - maximum
    mean = distance.mean(dim, keepdim=True)
    variance = (distance - mean).square().sum(dim) / (log_w.size(dim) - 1)
    statistics = torch.stack([maximum.squeeze(dim), mean.squeeze(dim)])
    return reduce_rows(0.5 * variance, reduction), statistics.detach()


def importance_weighted_sum(log_w: Tensor, payload: Tensor, dim: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns (sum of w·payload, statistics as in `log_mean_exp`, of log_w / temperature)."""
    log_w, payload = upcast(log_w) / temperature, upcast(payload)
    maximum, total = row_statistics(log_w, dim)
    value = _weighted_sum(normalized_weights(log_w, dim), payload, dim)
    return value, torch.stack([maximum.squeeze(dim), total.squeeze(dim)]).detach()


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
    Zhang & Stephens (2009), with the weak prior of Vehtari et al. (2024), in float64.
    """
    largest = tail.detach().double()
    most = largest.size(-1) - 1
    maximum = largest[..., :1]
    maximum = torch.where(maximum == -math.inf, torch.zeros_like(maximum), maximum)
    cutoff = (largest[..., -1:] - maximum).clamp(min=math.log(torch.finfo(torch.float64).tiny))
    distance = largest[..., :-1] - maximum
    inside = distance > cutoff
    n = inside.sum(-1, keepdim=True).to(largest.dtype)  # ties with the cutoff are outside
    excess = torch.where(inside, distance.exp() - cutoff.exp(), torch.zeros_like(distance))
    enough = n >= 5
    n = torch.where(enough, n, torch.full_like(n, 5))
    quartile = n - (n / 4 + 0.5).floor()  # the first of n ascending numbers, counted from the largest
    quarter = excess.gather(-1, quartile.long().clamp(max=most - 1))
    grid_size = 30 + n.sqrt().floor()
    point = torch.arange(1, 31 + math.isqrt(most), dtype=excess.dtype, device=excess.device)
    b = (1 - (grid_size / (point - 0.5)).sqrt()) / (3 * quarter) + 1 / excess[..., :1]

    opposite = -excess.unsqueeze(-2)

    def mean_log(b: Tensor) -> Tensor:
        return (b.unsqueeze(-1) * opposite).log1p_().sum(-1) / n  # 0 outside the tail

    k = mean_log(b)
    likelihood = n * ((-b / k).log() - k - 1)
    likelihood = torch.where(point <= grid_size, likelihood, torch.full_like(likelihood, -math.inf))
    weights = likelihood.softmax(-1)
    weights = torch.where(weights >= 10 * torch.finfo(torch.float64).eps, weights, torch.zeros_like(weights))
    weights = weights / weights.sum(-1, keepdim=True)
    best = (torch.where(weights == 0, torch.zeros_like(b), b) * weights).sum(-1, keepdim=True)
    shape = (n * mean_log(best) + 5) / (n + 10)
    shape = torch.where(enough, shape, torch.full_like(shape, math.inf))
    return torch.where(maximum.isnan(), torch.full_like(shape, math.nan), shape).squeeze(-1).to(tail.dtype)


def importance_weighted_generator_loss(
    fake: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """Returns (loss, statistics `[3, rows]`: maximum and sum of exponentials of `fake / temperature`, row loss)."""
    logits, dim = _over_dim(upcast(fake), dim)
    log_w = logits / temperature
    maximum, total = row_statistics(log_w, dim)
    weights = normalized_weights(log_w, dim)
    rows = _weighted_sum(weights.detach() if detach else weights, softplus(-logits), dim)
    statistics = torch.stack([maximum.squeeze(dim), total.squeeze(dim), rows])
    return reduce_rows(rows, reduction), statistics.detach()


def grouped_importance_weighted_generator_loss(
    fake: Tensor, groups: Tensor, temperature: float, detach: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """IWGAN with the weights normalised among the samples of one label; no synchronisation with the host.

    The samples are sorted by label, and each label's run scattered into one of N segments, of which those beyond the
    number of labels present stay empty.

    Returns (loss, statistics `[2N + 1]`: each sample's weight, the loss of its group, what the sum over the groups is
    multiplied by).
    """
    labels, order = torch.sort(groups, stable=True)
    logits = upcast(fake)[order]
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[1:] = labels[1:] != labels[:-1]
    segment = starts.cumsum(0) - 1
    log_w = logits / temperature
    nothing = torch.zeros_like(log_w.detach())
    maximum = (nothing - math.inf).scatter_reduce(0, segment, log_w.detach(), "amax")
    maximum = torch.where(maximum == -math.inf, nothing, maximum)
    exponentials = (log_w - maximum[segment]).exp()
    total = nothing.scatter_add(0, segment, exponentials)[segment]
    empty = total == 0
    weights = torch.where(empty, nothing, exponentials / torch.where(empty, torch.ones_like(total), total))
    if detach:
        weights = weights.detach()
    terms = weights * torch.where(weights == 0, nothing, softplus(-logits))
    factor = 1 / starts.sum().to(log_w.dtype) if reduction == "mean" else log_w.new_ones(())
    loss = terms.sum() * (math.nan if reduction == "mean" and logits.numel() == 0 else factor)
    of_group = nothing.scatter_add(0, segment, terms.detach())[segment]
    back = torch.argsort(order)
    return loss, torch.cat([weights.detach()[back], of_group[back], factor.reshape(1)])
