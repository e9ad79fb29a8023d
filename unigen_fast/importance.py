"""Importance weights: bounds and self-normalised weights of `log_w`, K samples along `dim`.

Conventions: `log_w = log p(x, z) - log q(z | x)`; fp16 and bf16 are computed and returned in fp32. A row of all `-inf`
has bound `-inf`, weights 0 and gradient 0; a NaN or `+inf` makes its row NaN, and that row alone.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unigen_fast import _checks, _ops, _values
from unigen_fast._private import forward_mode
from unigen_fast.reference import importance as reference
from unigen_fast.reference._common import reduce_rows, upcast


def log_mean_exp(log_w: Tensor, *, dim: int) -> Tensor:
    """log (1/K) sum_k exp(log_w_k): the importance-weighted bound on log p(x).

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.

    Returns:
        Shape of `log_w` without `dim`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range, or holds no samples.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders" (2016), Eq. 8.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    return _ops.log_mean_exp((log_w,), dim)


def importance_weights(log_w: Tensor, *, dim: int, temperature: float = 1.0, detach: bool = True) -> Tensor:
    """Self-normalised weights softmax(log_w / temperature) over `dim`: they sum to 1.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.
        temperature: > 0; above 1 it flattens the weights.
        detach: whether the weights are constants to autograd, as estimators need them.

    Returns:
        Shape of `log_w`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; `temperature` is not positive.

    Source: Hu et al., "On Unifying Deep Generative Models" (2018), Eq. 16, w~_i.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    log_w, temperature = _tempered(log_w, dim, temperature, detach)
    return _ops.importance_weights((log_w,), dim, temperature)


def _tempered(log_w: Tensor, dim: int, temperature: Any, detach: bool) -> tuple[Tensor, Any]:
    """Checked log-weights, detached if wanted, and the temperature that an op is to divide them by."""
    temperature = _checks.temperature(temperature, detach)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    log_w = log_w.detach() if detach else log_w
    if _checks.learned(temperature):
        log_w, temperature = upcast(log_w) / temperature, 1.0
    return log_w, temperature


def effective_sample_size(log_w: Tensor, *, dim: int) -> Tensor:
    """1 / sum_k w~_k^2, in [1, K]: how many samples carry the weight. Detached. 0 for a row of all `-inf`.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.

    Returns:
        Shape of `log_w` without `dim`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range, or holds no samples.

    Source: Kong, "A note on importance sampling using standardized weights" (1992).
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    return _ops.effective_sample_size((log_w.detach(),), dim)


class WeightDiagnostics(NamedTuple):
    """What `weight_diagnostics` returns: each of the shape of `log_w` without `dim`."""

    log_mean_exp: Tensor
    ess: Tensor
    max_weight: Tensor
    entropy: Tensor
    pareto_k: Tensor


def weight_diagnostics(log_w: Tensor, *, dim: int) -> WeightDiagnostics:
    """How far the self-normalised weights w~ can be trusted. Detached. `pareto_k` takes a pass of its own.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.

    Returns:
        log_mean_exp: the bound, log (1/K) sum_k w_k, in nats; `-inf` for a row of all `-inf`.
        ess: 1 / sum_k w~_k^2, in [1, K]; 0 for a row of all `-inf`.
        max_weight: the largest w~_k, in [1/K, 1]; 0 for a row of all `-inf`.
        entropy: -sum_k w~_k log w~_k, in [0, log K] nats; 0 for a row of all `-inf`.
        pareto_k: shape of the generalised Pareto distribution fitted to the largest ceil(min(K/5, 3 sqrt(K))) weights,
            in float64. Above 0.7 the estimate is unreliable, above 1 the weights have no mean.
            `+inf`, as in ArviZ and loo, where fewer than 5 weights stand above the tail's cutoff: K <= 20, many
            ties, or a row of all `-inf`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range, or holds no samples.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance Sampling" (2024); Zhang &
    Stephens, "A New and Efficient Estimation Method for the Generalized Pareto Distribution" (2009).
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    log_w = log_w.detach()
    bound, ess, largest, entropy = _ops.weight_diagnostics((log_w,), dim).unbind(0)
    return WeightDiagnostics(bound, ess, largest, entropy, _pareto_k(log_w, dim))


def _pareto_k(log_w: Tensor, dim: int) -> Tensor:
    log_w = upcast(log_w)
    count = log_w.size(dim)
    most = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    if most < 5:
        missing = torch.full_like(log_w.select(dim, 0), math.inf)
        return torch.where(log_w.isnan().any(dim), torch.full_like(missing, math.nan), missing)
    tail = log_w.movedim(dim, -1).topk(most + 1, dim=-1).values  # NaN first
    return _ops.pareto_shape((tail.contiguous(),))


def importance_weighted_sum(
    log_w: Tensor, payload: Tensor, *, dim: int, temperature: float = 1.0, detach: bool = True
) -> Tensor:
    """sum_k w~_k payload_k, w~ = softmax(log_w / temperature) over `dim`: a self-normalised estimate of E[payload].

    A weight of 0 silences its payload, even an infinite one.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        payload: shape of `log_w`, then any further dimensions.
        dim: the dimension of the samples, of `log_w`.
        temperature: > 0; above 1 it flattens the weights.
        detach: whether the weights are constants to autograd.

    Returns:
        Shape of `payload` without `dim`.

    Raises:
        TypeError: `log_w` or `payload` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; `payload` does not have the shape of `log_w`, then any;
            it is on another device; `temperature` is not positive.

    Source: Owen, "Monte Carlo theory, methods and examples" (2013), Sec. 9.2.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    _checks.floating("payload", payload)
    if payload.shape[: log_w.dim()] != log_w.shape:
        raise ValueError(
            f"payload: got shape {tuple(payload.shape)}, expected that of log_w, {tuple(log_w.shape)}, then any"
        )
    if payload.device != log_w.device:
        raise ValueError(f"payload: got device {payload.device}, expected {log_w.device} as log_w")
    log_w, temperature = _tempered(log_w, dim, temperature, detach)
    log_w, payload = _checks.promoted([log_w, payload])
    if payload.dim() > log_w.dim():
        log_w = log_w.reshape(log_w.shape + (1,) * (payload.dim() - log_w.dim())).expand(payload.shape)
    return _ops.importance_weighted_sum((log_w, payload), dim, temperature)


def iwae_loss(log_w: Tensor, *, dim: int, reduction: str = "mean", value: str = "bound") -> Tensor:
    """-log (1/K) sum_k exp(log_w_k), reduced over the rows. Its gradient is -w~_k, w~ the self-normalised weights.

    With K = 1 it is exactly `-log_w`, the negative single-sample ELBO.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.
        reduction: over the rows: "mean", "sum" or "none".
        value: what the loss reports: "bound", as above, or "surrogate", -sum_k w~_k log_w_k with detached weights,
            which some implementations log. The gradient is the same.

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; unknown `reduction` or `value`.

    Source: Burda et al. (2016), Eqs. 8 and 13.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.choice("value", value, ("bound", "surrogate"))
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    return _ops.iwae_loss((log_w,), dim, reduction, value)


def miwae_loss(log_w: Tensor, *, sample_dim: int, group_dim: int, reduction: str = "mean") -> Tensor:
    """-(1/M) sum_m log (1/K) sum_k exp(log_w_mk): the mean over M groups of the IWAE loss over K samples.

    One group is `iwae_loss`, one sample the negative ELBO. A composition of `iwae_loss`, which takes one kernel.

    Args:
        log_w: log-weights in nats, any strides.
        sample_dim: the dimension of the K >= 1 samples.
        group_dim: the dimension of the M >= 1 groups.
        reduction: over the rows, which have neither dimension: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of `log_w` without the two dimensions.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: a dimension is out of range or holds nothing; both are the same; unknown `reduction`.

    Source: Rainforth et al., "Tighter Variational Bounds are Not Necessarily Better" (2018), MIWAE.
    """
    sample_dim, group_dim = _sample_and_group(log_w, sample_dim, group_dim)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    rows = _ops.iwae_loss((log_w,), sample_dim, reduction, "bound")
    if reduction == "mean":
        return rows
    return rows / log_w.size(group_dim) if reduction == "sum" else rows.mean(group_dim - (sample_dim < group_dim))


def _sample_and_group(log_w: Tensor, sample_dim: int, group_dim: int) -> tuple[int, int]:
    _checks.floating("log_w", log_w)
    found = []
    for name, dim in (("sample_dim", sample_dim), ("group_dim", group_dim)):
        dim = _checks.dimension(name, log_w, dim)
        if log_w.size(dim) == 0:
            what = "sample" if name == "sample_dim" else "group"
            raise ValueError(f"log_w: got shape {tuple(log_w.shape)}, expected at least one {what} along dim {dim}")
        found.append(dim)
    if found[0] == found[1]:
        raise ValueError(f"group_dim: got {group_dim}, the dimension of the samples, expected another")
    if _values.on:
        _values.log_weights(found[0], log_w=log_w)
    return found[0], found[1]


def piwae_losses(log_w: Tensor, *, sample_dim: int, group_dim: int, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """(IWAE loss over all M·K samples, for the model's parameters; MIWAE loss, for the inference network's).

    A composition that reads `log_w` once: the joint bound is the log-mean-exp over groups of those over samples. Both
    losses hang on one graph: differentiate the first with `retain_graph=True`, each for its own parameters.

    Args:
        log_w: log-weights in nats, any strides.
        sample_dim: the dimension of the K >= 1 samples.
        group_dim: the dimension of the M >= 1 groups.
        reduction: over the rows, which have neither dimension: "mean", "sum" or "none".

    Returns:
        Two scalars, or with "none" two tensors of the shape of `log_w` without the two dimensions.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: a dimension is out of range or holds nothing; both are the same; unknown `reduction`.

    Source: Rainforth et al. (2018), PIWAE.
    """
    sample_dim, group_dim = _sample_and_group(log_w, sample_dim, group_dim)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    bound = _ops.log_mean_exp((log_w,), sample_dim)
    group_dim -= sample_dim < group_dim
    model = _ops.iwae_loss((bound,), group_dim, reduction, "bound")
    if reduction == "mean":
        return model, -bound.mean()
    inference = -bound.mean(group_dim)
    return model, inference.sum() if reduction == "sum" else inference


def ciwae_loss(log_w: Tensor, *, dim: int, beta: float, reduction: str = "mean") -> Tensor:
    """-[beta ELBO + (1 - beta) IWAE], ELBO = mean_k log_w_k. Its gradient is -[beta / K + (1 - beta) w~_k].

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.
        beta: in [0, 1]: 0 is `iwae_loss`, 1 the negative ELBO.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`. For beta > 0 a single `-inf` makes it `+inf`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; `beta` is not in [0, 1]; unknown `reduction`.

    Source: Rainforth et al. (2018), CIWAE.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    beta = _checks.fraction("beta", beta, differentiable=True)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    if _checks.learned(beta):
        elbo, iwae = (_ops.power_bound_loss((log_w,), dim, power, 0.0, -1.0, reduction) for power in (0.0, 1.0))
        return beta * elbo + (1 - beta) * iwae
    return _ops.power_bound_loss((log_w,), dim, 1.0, beta, -1.0, reduction)


def renyi_loss(log_w: Tensor, *, dim: int, alpha: float, reduction: str = "mean") -> Tensor:
    """-(1 / (1 - alpha)) log (1/K) sum_k exp((1 - alpha) log_w_k): the negative variational Rényi bound.

    alpha 0 is `iwae_loss`; 1 the negative ELBO, and near 1 the loss is continuous and accurate; `-inf` takes the
    largest log-weight (VR-max), `+inf` the smallest: ties share the gradient equally. The gradient is minus the
    normalised weights of (1 - alpha) log_w. With K = 1 it is exactly `-log_w` for every alpha.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.
        alpha: the order of the divergence: any number, infinite ones too.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`. For alpha > 1 a single `-inf` makes its row's loss
        `+inf`, with gradient 0; at alpha 1 it makes it `+inf`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; `alpha` is NaN; unknown `reduction`.

    Source: Li & Turner, "Rényi Divergence Variational Inference" (2016), the Monte Carlo VR bound.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    alpha = _checks.number("alpha", alpha)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    return _ops.power_bound_loss((log_w,), dim, 1.0 - alpha, 0.0, -1.0, reduction)


def cubo_loss(log_w: Tensor, *, dim: int, order: float = 2.0, reduction: str = "mean") -> Tensor:
    """+(1 / order) log (1/K) sum_k exp(order · log_w_k): an estimate of the chi upper bound, minimised as it is.

    Mind the sign: the other losses of this family are minus a lower bound. The gradient is plus the normalised weights
    of order · log_w. (The estimate of the bound is biased downwards for finite K.)

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.
        order: n >= 1 of CUBO_n.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; `order` is below 1; unknown `reduction`.

    Source: Dieng, Tran, Ranganath, Paisley, Blei, "Variational Inference via chi Upper Bound Minimization" (2017), the
    bound CUBO_n.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    order = _checks.number("order", order, minimum=1.0)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    return _ops.power_bound_loss((log_w,), dim, order, 0.0, 1.0, reduction)


def tvo_loss(
    log_w: Tensor, *, dim: int, partition: Sequence[float], log_q: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """-sum_p (b_{p+1} - b_p) sum_k softmax_k(b_p log_w)_k log_w_k: minus the left Riemann sum of the TVO.

    The gradient is the exact derivative, weights included: -sum_p (b_{p+1} - b_p) w_k (1 + b_p (log_w_k - E_p)), E_p
    the weighted mean. For the model's parameters that is the covariance estimator of the paper. Detached weights, which
    some implementations use, give another one: we chose the derivative of the value.

    That is all for samples that are reparameterised, or held fixed. Those of a q that is trained without being
    reparameterised (a discrete one) depend on its parameters through their probabilities: there `log_q` is needed. It
    gets minus sum_p (b_{p+1} - b_p) w_k (log_w_k - E_p) / (1 - w_k) as its gradient: the paper's covariance with log q,
    with a factor 1 / (1 - w_k), K / (K - 1) for b = 0, that makes the gradient an unbiased one of the loss's
    expectation, since w_k (log_w_k - E_p) / (1 - w_k) is the difference that sample k makes to E_p.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides. With `log_q`, K >= 2, and log_w is a
            function of q's parameters as well: log p - log q.
        dim: the dimension of the samples.
        partition: increasing numbers, the first 0 and the last 1; `[0, 1]` is the negative ELBO.
        log_q: log q(z_k | x) of samples that are not reparameterised, same shape (or one that broadcasts). The value is
            the same with and without it.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`. The term of b = 0 is the ELBO: a single `-inf`
        makes the loss `+inf`; where b > 0 it has weight 0 and takes no part.

    Raises:
        TypeError: `log_w` or `log_q` is not a floating-point tensor; `partition` is not a sequence of numbers.
        ValueError: `dim` is out of range or holds no samples, with `log_q` fewer than two; shapes do not broadcast;
            devices differ; `partition` does not rise from 0 to 1; unknown `reduction`.

    Source: Masrani, Le, Wood, "The Thermodynamic Variational Objective" (2019), the lower bound and its
    covariance gradient estimator.
    """
    if log_q is not None:
        log_w, log_q = _checks.elementwise(log_w=log_w, log_q=log_q)
        dim = _checks.several_samples("log_w", log_w, dim, "with log_q a sample is compared with the others")
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    partition = _checks.increasing("partition", partition, 0.0, 1.0)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    if log_w.is_cuda and len(partition) > 256:  # more than its kernels take along
        loss = reference.tvo_loss(log_w, dim, partition, reduction)[0]
    else:
        loss = _ops.tvo_loss((log_w,), dim, partition, reduction)
    if log_q is None:
        return loss
    signal = reference.tvo_signal(log_w.detach(), dim, partition)
    through_q = torch.where(signal == 0, 0.0, signal * (upcast(log_q) - upcast(log_q).detach())).sum(dim)
    return loss - reduce_rows(through_q, reduction)


def vimco_loss(log_w: Tensor, log_q: Tensor, *, dim: int, reduction: str = "mean") -> Tensor:
    """-LME(log_w) - sum_k sg(LME(log_w) - LME_{-k}) log_q_k, for samples that are not reparameterised.

    LME is the log-mean-exp over `dim`, and LME_{-k} that with log_w_k replaced by the mean of the others: what sample k
    adds to the bound, found in O(K) and without cancellation, even where one sample holds nearly all the weight.
    `log_w` gets minus the normalised weights as its gradient, `log_q` minus the learning signal.

    Args:
        log_w: log-weights in nats, K >= 2 samples along `dim`, any strides.
        log_q: log q(z_k | x) of the samples, same shape, or 1 where it is the same for all.
        dim: the dimension of the samples.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`. Of a row of all `-inf` the signal is 0; where all
        samples but one are at `-inf` (two of them at least), the signal of that one is infinite, as the formula has it.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes that differ other than by a written 1; devices differ; `dim` is out of range or holds fewer
            than two samples; unknown `reduction`.

    Source: Mnih & Rezende, "Variational Inference for Monte Carlo Objectives" (2016), the leave-one-out signal with
    the geometric mean.
    """
    log_w, log_q = _checks.elementwise(log_w=log_w, log_q=log_q)
    dim = _checks.several_samples("log_w", log_w, dim, "a sample is compared with the others")
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(dim, log_w=log_w, log_q=log_q)
    return _ops.vimco_loss((log_w, log_q), dim, reduction)


def rws_losses(log_p: Tensor, log_q: Tensor, *, dim: int, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Reweighted wake-sleep: (wake-theta, wake-phi) = (-LME(log_p - sg(log_q)), -sum_k sg(w~_k) log_q_k).

    w~ are the self-normalised weights of log_p - log_q. `log_p` gets its gradient from wake-theta alone, `log_q` from
    wake-phi alone: both can be added up and differentiated at once.

    Args:
        log_p: log p(x, z_k) in nats, K >= 1 samples along `dim`, any strides.
        log_q: log q(z_k | x), same shape, or 1 where it is the same for all.
        dim: the dimension of the samples.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        Two scalars, or with "none" two tensors of the shape of the inputs without `dim`.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes that differ other than by a written 1; devices differ; `dim` is out of range or holds no
            samples; unknown `reduction`.

    Source: Bornschein & Bengio, "Reweighted Wake-Sleep" (2015); Le et al., "Revisiting Reweighted Wake-Sleep" (2019),
    wake-phase phi and theta updates.
    """
    log_p, log_q = _checks.elementwise(log_p=log_p, log_q=log_q)
    dim = _checks.sample_dimension("log_p", log_p, dim)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(dim, log_p=log_p, log_q=log_q)
    return _ops.rws_losses((log_p, log_q), dim, reduction)


def dreg_loss(log_w: Tensor, z: Tensor, *, dim: int, reduction: str = "mean") -> Tensor:
    """The IWAE loss with the doubly reparameterised gradient: value -log (1/K) sum_k exp(log_w_k).

    Build `log_w` as log p(x, z) - log q(z | x) from `z` with q's parameters detached in log q. The model's parameters
    get -sum_k w~_k d log_w_k, as in `iwae_loss`; what flows back through `z`, to the inference network, is
    -sum_k w~_k^2 (d log_w_k / d z_k) d z_k. A composition of `iwae_loss`, `importance_weights` and a hook on `z`.

    The hook multiplies by w~ whatever gradient reaches `z`, from `log_w` and from any other use of this very tensor. If
    `z` is differentiated elsewhere too, build `log_w` from an alias (`z.view_as(z)`) and pass that; and call this once
    for each `z`. A `z` that needs no gradient gets no hook. Forward-mode AD and `torch.export` have no hooks.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        z: the reparameterised samples that `log_w` was built from: its shape, then any event dimensions.
        dim: the dimension of the samples, of `log_w`.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; `z` does not have the shape of `log_w`, then any; unknown
            `reduction`.
        RuntimeError: under forward-mode AD, or exported with gradients.

    Source: Tucker, Lawson, Gu, Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives"
    (2018), the estimator IWAE-DReG.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    _checks.floating("z", z)
    if z.device != log_w.device:
        raise ValueError(f"z: got device {z.device}, expected {log_w.device} as log_w")
    if z.shape[: log_w.dim()] != log_w.shape:
        raise ValueError(f"z: got shape {tuple(z.shape)}, expected that of log_w, {tuple(log_w.shape)}, then any")
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
        _values.numbers(z=z)
    weigh_gradient(z, log_w, dim)
    return _ops.iwae_loss((log_w,), dim, reduction, "bound")


def weigh_gradient(z: Tensor, log_w: Tensor, dim: int) -> None:
    """What reaches z in the backward pass is multiplied by its sample's normalised weight."""
    if forward_mode(z, log_w):
        raise RuntimeError(
            "the doubly reparameterised gradient: got forward-mode AD, expected a backward pass to weigh"
        )
    if z.requires_grad and torch.is_grad_enabled():
        if torch.compiler.is_exporting():  # which would leave the hook out, and train on another gradient
            raise RuntimeError("the doubly reparameterised gradient: torch.export keeps no hooks; export under no_grad")
        weights = _ops.importance_weights((log_w.detach(),), dim, 1.0)
        weights = weights.reshape(weights.shape + (1,) * (z.dim() - log_w.dim())).to(z.dtype)
        z.register_hook(lambda grad: grad * weights)


def log_variance_loss(log_w: Tensor, *, dim: int, reduction: str = "mean") -> Tensor:
    """Half the unbiased variance of the log-weights: 1/(2 (K - 1)) sum_k (log_w_k - mean)^2.

    For samples of the proposal itself, held fixed, its gradient with respect to the proposal estimates that of
    KL(q || p); it is `trajectory_balance_loss` with the best log_z of each row. No cancellation of squares.

    Args:
        log_w: log-weights in nats, K >= 2 samples along `dim`, any strides. A `-inf` makes its row NaN.
        dim: the dimension of the samples.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds fewer than two samples; unknown `reduction`.

    Source: Richter, Boustati, Nüsken, Ruiz, Akyildiz, "VarGrad" (2020), the log-variance loss.
    """
    dim = _checks.several_samples("log_w", _checks.floating("log_w", log_w), dim, "a variance of one is undefined")
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(dim, log_w=log_w)
    return _ops.log_variance_loss((log_w,), dim, reduction)


def trajectory_balance_loss(log_w: Tensor, log_z: Tensor, *, reduction: str = "mean") -> Tensor:
    """(log_z - log_w)^2, log_w = log R(x) P_B(tau | x) - log P_F(tau): the trajectory balance of GFlowNets.

    A composition of PyTorch operations: elementwise, a kernel would gain nothing.

    Args:
        log_w: log-weights of trajectories, in nats, any shape.
        log_z: the learned log-partition function: one number, or the shape of `log_w`, 1 where it is the same for all.
        reduction: over all trajectories: "mean", "sum" or "none".

    Returns:
        A scalar, or with "none" the shape of the trajectories.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes that differ other than by a written 1; devices differ; unknown `reduction`.

    Source: Malkin, Jain, Bengio, Sun, Bengio, "Trajectory Balance" (2022), the loss L_TB; Malkin et al., "GFlowNets
    and Variational Inference" (2023).
    """
    log_w, log_z = _checks.elementwise(log_w=log_w, log_z=log_z)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if _values.on:
        _values.log_weights(log_w=log_w, log_z=log_z)
    return reduce_rows((upcast(log_z) - upcast(log_w)).square(), reduction)


def memorization_score(
    log_px_in: Tensor, log_px_out: Tensor | None = None, *, dim: int, included: Tensor | None = None
) -> Tensor:
    """log E p(x | models trained with x) - log E p(x | models trained without it), in nats: how much x is memorised.

    The expectations are over training runs. A log-mean-exp (LME) of n runs lies below the logarithm of its expectation,
    the further the smaller n, so that 36 runs against 4 would show a difference where there is none. Both sides are
    therefore of as many runs, m, the smaller number: the side that has more gives the mean of the LMEs of its n
    stretches of m consecutive runs (the first following the last), each run in m of them. Without memorisation
    the score has mean 0 for any numbers; for equal ones it is the difference of the LMEs. What an LME of m runs lies
    below its limit by remains where the two sides differ.

    A composition of PyTorch operations and `log_mean_exp`.

    Args:
        log_px_in: log p(x) under the runs trained with x, along `dim`, any strides. With `included`: under all runs.
        log_px_out: log p(x) under the runs trained without x; another number of them, if you like.
        dim: the dimension of the runs.
        included: instead of `log_px_out`, a bool of the shape of `log_px_in` (or one that broadcasts to it): whether
            the run was trained with the example, for runs on any subsets.

    Returns:
        The shape of both without `dim`. NaN where both are `-inf`, and where an example has no runs on one of
        the sides of `included`.

    Raises:
        TypeError: an input is not a floating-point tensor; `included` is not a bool tensor; `log_px_out` and
            `included` are given, or neither.
        ValueError: `dim` is out of range or holds no runs; devices differ; the shapes without `dim` differ
            other than by a written 1.

    Example:
        >>> log_px, included = torch.randn(20, 5), torch.rand(20, 5) < 0.5
        >>> uf.memorization_score(log_px, dim=0, included=included).shape
        torch.Size([5])

    Source: van den Burg & Williams, "On Memorization in Probabilistic Deep Generative Models" (2021), the leave-one-out
    score and its estimate by K-fold cross-validation, there by LMEs of all runs.
    """
    inside_dim = _checks.sample_dimension("log_px_in", _checks.floating("log_px_in", log_px_in), dim)
    if (log_px_out is None) == (included is None):
        raise TypeError("memorization_score: expected either log_px_out or included")
    if included is not None:
        return _score_of_subsets(log_px_in, _included(included, log_px_in), inside_dim)
    assert log_px_out is not None
    outside_dim = _checks.sample_dimension("log_px_out", _checks.floating("log_px_out", log_px_out), dim)
    if log_px_out.device != log_px_in.device:
        raise ValueError(f"log_px_out: got device {log_px_out.device}, expected {log_px_in.device} as log_px_in")
    shapes = [x.shape[:d] + x.shape[d + 1 :] for x, d in ((log_px_in, inside_dim), (log_px_out, outside_dim))]
    if len(shapes[0]) != len(shapes[1]) or any(a != b and 1 not in (a, b) for a, b in zip(*shapes, strict=True)):
        raise ValueError(
            f"log_px_out: got shape {tuple(log_px_out.shape)}, expected that of log_px_in, {tuple(log_px_in.shape)}, "
            f"but for dim {dim}, or 1 where it is the same for all"
        )
    if _values.on:
        _values.log_weights(log_px_in=log_px_in, log_px_out=log_px_out)
    runs = min(log_px_in.size(inside_dim), log_px_out.size(outside_dim))
    return _of_stretches(log_px_in, inside_dim, runs) - _of_stretches(log_px_out, outside_dim, runs)


def _of_stretches(log_px: Tensor, dim: int, runs: int) -> Tensor:
    """The mean of the LMEs of all stretches of `runs` consecutive runs, the first following the last."""
    if log_px.size(dim) == runs:
        return _ops.log_mean_exp((log_px,), dim)
    total = log_px.size(dim)
    log_px = upcast(log_px)  # the gradients of the stretches add up before they are rounded
    circle = torch.cat((log_px, log_px.narrow(dim, 0, runs - 1)), dim)
    stretches = torch.stack([circle.narrow(dim, start, runs) for start in range(total)])
    return _ops.log_mean_exp((stretches,), dim + 1).mean(0)


def _included(included: Tensor, log_px: Tensor) -> Tensor:
    if not isinstance(included, Tensor) or included.dtype != torch.bool:
        got = included.dtype if isinstance(included, Tensor) else type(included).__name__
        raise TypeError(f"included: expected a bool tensor, got {got}")
    if included.device != log_px.device:
        raise ValueError(f"included: got device {included.device}, expected {log_px.device} as log_px_in")
    try:
        return included.expand(log_px.shape)
    except RuntimeError:
        raise ValueError(
            f"included: got shape {tuple(included.shape)}, expected one that broadcasts to {tuple(log_px.shape)}, that "
            "of log_px_in"
        ) from None


def _score_of_subsets(log_px: Tensor, included: Tensor, dim: int) -> Tensor:
    """The same where each example has its own number of runs on either side: they are brought to the front, and the
    stretches grow by a run in each turn."""
    log_px, included = upcast(log_px).movedim(dim, 0), included.movedim(dim, 0)
    total = len(log_px)
    places = torch.arange(total, device=log_px.device).reshape(-1, *(1,) * (log_px.dim() - 1))
    inside = included.sum(0, keepdim=True)
    runs = torch.minimum(inside, total - inside)
    sides: list[Tensor] = []
    for side, count in ((included, inside), (~included, total - inside)):
        order = torch.argsort(~side, dim=0, stable=True)
        own = log_px.gather(0, order)
        stretches = torch.full_like(own, -math.inf)
        for step in range(total // 2):  # no side's stretches are longer
            following = own.gather(0, ((places + step) % count.clamp(min=1)).expand_as(own))
            stretches = torch.where(step < runs, _add_exponentials(stretches, following), stretches)
        found = torch.where(places < count, stretches - runs.log(), 0.0).sum(0) / count[0].clamp(min=1)
        sides.append(torch.where(runs[0] > 0, found, math.nan))
    return sides[0] - sides[1]


def _add_exponentials(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), without gradient where both are -inf."""
    nothing = (a == -math.inf) & (b == -math.inf)
    return torch.where(nothing, -math.inf, torch.logaddexp(torch.where(nothing, 0.0, a), b))
