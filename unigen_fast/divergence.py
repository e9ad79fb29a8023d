"""Closed-form KL divergences, reparameterised samples drawn in one pass with them, and divergences over pairs.

Conventions: `event_ndims` trailing dimensions are summed, `reduction` acts on the rows that remain. fp16 and bf16 are
computed, and rows returned, in fp32. The second argument is the log-variance unless `spread` says otherwise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unigen_fast import _checks, _ops, _values
from unigen_fast._fused import FusedOp, beside, mesh_of
from unigen_fast.reference._common import reduce_weighted


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    event_ndims: int | None = None,
    spread: str = "logvar",
    free_bits: float = 0.0,
    free_bits_mode: str = "sum",
    clamp_logvar: tuple[float, float] | None = None,
    weights: Tensor | None = None,
    normalize_weights: bool = False,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """KL(N(m, s²) || N(m_p, s_p²)) of diagonal Gaussians, summed over the event, reduced over the rows.

    With v = log s² and d = v - v_p: ½ sum [ (e^d - 1 - d) + (m - m_p)² e^{-v_p} ]; e^d - 1 - d is evaluated without
    cancellation near the prior. For the standard normal prior: ½ sum [ (e^v - 1 - v) + m² ].

    Args:
        mean, logvar: `[rows…, event…]`, any strides.
        prior_mean, prior_logvar: of as many dimensions, rows of size 1 being the same for all, or a parameter without
            rows, `[event…]` or `()`; None stands for 0 (the standard normal).
        event_ndims: how many trailing dimensions make one example's event: 3 of LDM's latents `[B, C, H, W]`. None: 1
            of tensors of one or two dimensions; of more an error, unless `[B, K, D]` beside `[B, 1, D]` tells.
        spread: what `logvar` and `prior_logvar` hold: "logvar", "logstd" or "std" (positive).
        free_bits: nats below which the KL costs nothing and has no gradient.
        free_bits_mode: "sum": max(KL of the row, free_bits); "per_dim": each dimension's KL is so bounded before the
            sum. Both per example; Kingma et al. (2016), Eq. 16, average over the batch first.
        clamp_logvar: (low, high) for the log-variances; the gradient is 0 outside.
        weights: of the rows' dimensions, 1 where they are the same for all; multiplied in before the reduction. A row
            of weight 0 is not read: NaN or infinity there reaches neither the value nor a gradient.
        normalize_weights: divide by the sum of the weights (over all rows) instead of the number of rows: a masked
            mean. A mask of zeros gives 0.
        scale: multiplies the result.
        reduction: "mean", "sum" or "none" over the rows.

    Returns:
        Nats; a scalar, or rows with "none".

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range, unknown names,
            `normalize_weights` without `weights`, negative `free_bits`.

    Source: Kingma and Welling (2014), App. B.
    """
    _checks.choice("spread", spread, _checks.SPREADS)
    _checks.choice("free_bits_mode", free_bits_mode, ("sum", "per_dim"))
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    free_bits = _checks.number("free_bits", free_bits, minimum=0.0)
    scale = _checks.number("scale", scale, differentiable=True)
    low, high = _checks.clamp_range(clamp_logvar)
    tensors, event_ndims = _checks.aligned(
        event_ndims,
        optional=("prior_mean", "prior_logvar"),
        mean=mean,
        logvar=logvar,
        prior_mean=prior_mean,
        prior_logvar=prior_logvar,
    )
    if _values.on:
        _values.gaussians(spread, _values.rows(weights, event_ndims), *tensors)
    weights, reduction = weighting(weights, normalize_weights, reduction, tensors[0], event_ndims)
    options = (event_ndims, spread, free_bits, free_bits_mode, low, high)
    return _weighted(_ops.gaussian_kl, tensors, weights, options, scale, reduction)


def weighting(
    weights: Tensor | None, normalize: bool, reduction: str, like: Tensor, event_ndims: int
) -> tuple[Tensor | None, str]:
    """Checked weights over the rows of `like`, normalised if wanted, and the reduction that goes with them."""
    if weights is None:
        if normalize:
            raise ValueError("normalize_weights: got True without weights")
        return None, reduction
    weights = _row_weights(weights, like, event_ndims)
    if normalize:
        total = weights.sum()
        weights = weights / torch.where(total == 0, torch.ones_like(total), total)
        reduction = "none" if reduction == "none" else "sum"
    return weights, reduction


def _weighted(
    op: FusedOp,
    tensors: tuple[Tensor | None, ...],
    weights: Tensor | None,
    options: tuple[Any, ...],
    scale: float,
    reduction: str,
) -> Tensor:
    """The op's result, with a gradient of the weights where they want one."""
    if weights is not None and weights.requires_grad:  # rows are cheap; the kernel takes weights as constants
        return reduce_weighted(op((*tensors, None), *options, scale, "none"), weights, 1.0, reduction)
    return op((*tensors, weights), *options, scale, reduction)


def _row_weights(weights: Tensor, mean: Tensor, event_ndims: int) -> Tensor:
    """`weights` in the arithmetic dtype, expanded to the rows of `mean`."""
    _checks.tensor("weights", weights)
    if weights.device != mean.device:
        raise ValueError(f"weights: got device {weights.device}, expected {mean.device}")
    rows = mean.shape[: mean.dim() - event_ndims]
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    if weights.shape != rows:
        sizes = zip(weights.shape, rows, strict=False)
        if weights.dim() not in (0, len(rows)) or any(size != 1 and size != row for size, row in sizes):
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)}, expected that of the rows, {tuple(rows)}, with a size of "
                f"1 where they are the same for all (event_ndims={event_ndims} dimensions of {tuple(mean.shape)} are "
                "summed)"
            )
    return weights.to(dtype).expand(rows)


def gaussian_kl_monte_carlo(
    z: Tensor,
    mean: Tensor | None,
    logvar: Tensor,
    prior_mean: Tensor,
    prior_logvar: Tensor,
    *,
    event_ndims: int | None = None,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
    weights: Tensor | None = None,
    normalize_weights: bool = False,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """KL(N(m, s²) || p), estimated by one sample z ~ N(m, s²) for each row; p = N(m_p, s_p²) at z.

    With v = log s², two unbiased estimators:
      - with `mean`: log q(z) - log p(z) = ½ sum [ v_p - v + (z - m_p)² e^{-v_p} - (z - m)² e^{-v} ];
      - `mean=None`: the entropy of q in closed form, -½ sum [ v + 1 ], and only log p(z) by the sample:
        ½ sum [ v_p - v - 1 + (z - m_p)² e^{-v_p} ]. This is VITS' `kl_loss`, which knows no mean of q, for tensors
        `[B, C, T]` and a mask `[B, 1, T]`:

            z_p, logs_q, m_p, logs_p = (t.transpose(1, 2) for t in (z_p, logs_q, m_p, logs_p))
            gaussian_kl_monte_carlo(z_p, None, logs_q, m_p, logs_p, spread="logstd", weights=mask.squeeze(1),
                                    normalize_weights=True)

        (z_p is the image of z under a volume-preserving flow: log q at z has the same entropy.)

    Args:
        z: `[rows…, event…]`, any strides; views as above cost nothing. It gets a gradient as the others do.
        mean: of q, or None: see above.
        logvar: of q.
        prior_mean, prior_logvar: of p. As in `gaussian_kl`; z has all the dimensions.
        event_ndims, spread, weights, normalize_weights, scale, reduction: as in `gaussian_kl`.
        clamp_logvar: (low, high) for both log-variances; the gradient is 0 outside.

    Returns:
        Nats; a scalar, or rows with "none". fp32 for fp16 and bf16, computed in fp32 (VITS' own overflows in fp16,
        espnet/espnet#4236).

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range, unknown names,
            `normalize_weights` without `weights`.

    Source: Kim, Kong and Son, "VITS" (2021), Eq. 4 (the second form; the first is log q - log p as it stands).
    """
    _checks.choice("spread", spread, _checks.SPREADS)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    scale = _checks.number("scale", scale, differentiable=True)
    low, high = _checks.clamp_range(clamp_logvar)
    tensors, event_ndims = _checks.aligned(
        event_ndims,
        data="z",
        optional=("mean",),
        z=z,
        mean=mean,
        logvar=logvar,
        prior_mean=prior_mean,
        prior_logvar=prior_logvar,
    )
    if _values.on:
        rows = _values.rows(weights, event_ndims)
        _values.numbers(rows, z=tensors[0])
        _values.gaussians(spread, rows, *tensors[1:])
    weights, reduction = weighting(weights, normalize_weights, reduction, tensors[0], event_ndims)
    options = (event_ndims, spread, low, high)
    return _weighted(_ops.gaussian_kl_monte_carlo, tensors, weights, options, scale, reduction)


def bernoulli_kl(
    logits_q: Tensor,
    logits_p: Tensor | None = None,
    *,
    event_ndims: int | None = None,
    weights: Tensor | None = None,
    normalize_weights: bool = False,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """KL(Bernoulli(sigma(a)) || Bernoulli(sigma(b))), summed over the event, reduced over the rows.

    sum [ sigma(a) (a - b) + softplus(b) - softplus(a) ], evaluated without cancellation where a is near b.

    Args:
        logits_q: a, `[rows…, event…]`, any strides.
        logits_p: b, of as many dimensions, or `[event…]`; None stands for 0: Bernoulli(1/2), and the KL is log 2 minus
            the entropy.
        event_ndims, weights, normalize_weights, scale, reduction: as in `gaussian_kl`.

    Returns:
        Nats; a scalar, or rows with "none".

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range, unknown names,
            `normalize_weights` without `weights`.

    Source: Kullback and Leibler (1951); sigma(a) (a - b) + … is the Bregman divergence of softplus, Banerjee et al.,
    "Clustering with Bregman Divergences" (2005), Table 1.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    scale = _checks.number("scale", scale, differentiable=True)
    tensors, event_ndims = _checks.aligned(event_ndims, optional=("logits_p",), logits_q=logits_q, logits_p=logits_p)
    if _values.on:
        rows = _values.rows(weights, event_ndims)
        _values.logits(rows, logits_q=tensors[0], logits_p=tensors[1])
    weights, reduction = weighting(weights, normalize_weights, reduction, tensors[0], event_ndims)
    return _weighted(_ops.bernoulli_kl, tensors, weights, (event_ndims,), scale, reduction)


def _sampling(
    mean: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    sample_dim: int,
    generator: torch.Generator | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    """Checked arguments of a sampling op: (mean, logvar, rng_state), num_samples (-1: none), sample_dim.

    Where no kernel is to draw the noise, and once more in backward, the noise itself takes the place of `rng_state`."""
    if num_samples is None:
        num_samples, sample_dim = -1, 0
    else:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or not 0 <= num_samples < 2**63:
            raise ValueError(f"num_samples: got {num_samples!r}, expected None or an int >= 0")
        sample_dim = _checks.dimension("sample_dim", mean, sample_dim, extra=1)
    if mesh_of(mean) is None and not FusedOp._served((mean,)):
        shape = list(mean.shape)
        if num_samples >= 0:
            shape.insert(sample_dim, num_samples)
        # one dtype for all, so that they have the same noise
        return (mean, logvar, torch.randn(shape, device=mean.device, generator=generator)), num_samples, sample_dim
    # one 64-bit seed and offset from PyTorch's generator: manual_seed governs, and a CUDA graph captures it
    # (`random_` breaks torch.compile's graph; with generator=None spelled out, Inductor keeps PyTorch's own numbers)
    rng_state = torch.randint(2**63 - 1, (2,), device=mean.device, generator=generator)
    return (mean, logvar, beside(rng_state, mean)), num_samples, sample_dim


def sample_gaussian(
    mean: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    sample_dim: int = 0,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """z = mean + s · eps, eps ~ N(0, 1): the reparameterised sample. eps is drawn in the kernel, and again in backward.

    Where there are kernels, the noise depends on the generator's state alone, not on device, dtype or layout (up to
    rounding); elsewhere it is PyTorch's own in fp32, the same for every dtype and layout.

    Args:
        mean, logvar: of as many dimensions, of size 1 where they are the same, or one of them a parameter of fewer;
            any strides.
        num_samples: S samples along a new dimension; None: one sample, without that dimension.
        sample_dim: where the new dimension goes, counted in the result.
        spread: what `logvar` holds: "logvar", "logstd" or "std".
        clamp_logvar: (low, high) for the log-variance; the gradient is 0 outside.
        generator: PyTorch's, of the tensors' device; None: the default one (`torch.manual_seed`).

    Returns:
        z, in the dtype of `mean`, contiguous.

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not fit, tensors on two devices, a bad `num_samples`, `sample_dim` or `spread`.

    Source: Kingma and Welling (2014), Sec. 2.4; Salmon et al. (2011) for Philox.
    """
    _checks.choice("spread", spread, _checks.SPREADS)
    low, high = _checks.clamp_range(clamp_logvar)
    mean, logvar = _checks.parameters(mean=mean, logvar=logvar)
    if _values.on:
        _values.gaussians(spread, _values.rows(None, 0), mean, logvar)
    tensors, num_samples, sample_dim = _sampling(mean, logvar, num_samples, sample_dim, generator)
    return _ops.sample_gaussian(tensors, num_samples, sample_dim, spread, low, high)


def sample_gaussian_with_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    sample_dim: int = 0,
    event_ndims: int | None = None,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(z, KL): `sample_gaussian` and `gaussian_kl(…, reduction="none")` to N(0, 1) in one pass, forward and backward.

    Args:
        event_ndims: how many trailing dimensions of `mean` the KL is summed over, as in `gaussian_kl`.
        (the others): as in `sample_gaussian`.

    Returns:
        z as `sample_gaussian` gives it for the same generator state, and the KL in nats as rows of `mean`.

    Raises:
        As `sample_gaussian`; ValueError for `event_ndims` out of range.

    Source: Kingma and Welling (2014), Sec. 2.4 and App. B.
    """
    _checks.choice("spread", spread, _checks.SPREADS)
    low, high = _checks.clamp_range(clamp_logvar)
    (mean, logvar), event_ndims = _checks.aligned(event_ndims, mean=mean, logvar=logvar)
    if _values.on:
        _values.gaussians(spread, _values.rows(None, 0), mean, logvar)
    tensors, num_samples, sample_dim = _sampling(mean, logvar, num_samples, sample_dim, generator)
    return _ops.sample_gaussian_with_kl(tensors, num_samples, sample_dim, event_ndims, spread, low, high)


# ---- categorical -----------------------------------------------------------------------------------------------------


class BalancedKL(NamedTuple):
    """Scalars, each differentiable on its own."""

    loss: Tensor
    dynamics: Tensor
    representation: Tensor


def _unimix(unimix: float) -> float:
    unimix = _checks.number("unimix", unimix, minimum=0.0)
    if not isinstance(unimix, Tensor) and unimix > 1:
        raise ValueError(f"unimix: got {unimix}, expected a share of probability, 0 to 1")
    return unimix


def categorical_kl(
    logits_q: Tensor,
    logits_p: Tensor | None = None,
    *,
    class_dim: int = -1,
    event_ndims: int = 0,
    unimix: float = 0.0,
    weights: Tensor | None = None,
    normalize_weights: bool = False,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """KL(q || p) = sum_c q_c log(q_c / p_c) of categorical distributions, summed over the event, reduced over the rows.

    q = (1 - unimix) softmax(logits_q) + unimix / C, and p likewise. Nothing cancels where q is close to p. A class that
    is ruled out by a logit of -inf counts 0 if it is q's; if it is p's alone, the KL is inf, as in torch.distributions.

    Args:
        logits_q: `[rows…, event…]` with a dimension of C classes anywhere, any strides.
        logits_p: of as many dimensions, rows of size 1 being the same for all, or `[event…, C]`; None stands for the
            uniform distribution: log C less the entropy of q.
        class_dim: the dimension of the classes.
        event_ndims: how many of the trailing dimensions, that of the classes left out, make one example's event.
        unimix: the share of uniform probability mixed into both (0.01 in DreamerV3).
        weights: of the rows' dimensions, 1 where they are the same for all; as in `gaussian_kl`.
        normalize_weights: divide by the sum of the weights (over all rows) instead of the number of rows: a masked
            mean. A mask of zeros gives 0.
        scale: multiplies the result.
        reduction: "mean", "sum" or "none" over the rows.

    Returns:
        Nats; a scalar, or rows with "none".

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not fit, tensors on two devices, `class_dim` or `event_ndims` out of range,
            unknown names, `normalize_weights` without `weights`, `unimix` outside [0, 1].

    Source: Kullback and Leibler (1951); unimix: Hafner et al., "Mastering Diverse Domains through World Models"
        (2023), Sec. "Robust predictions".
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    unimix = _unimix(unimix)
    scale = _checks.number("scale", scale, differentiable=True)
    (logits_q, logits_p), event_ndims, class_dim = _checks.aligned_sites(
        event_ndims, class_dim, optional=("logits_p",), logits_q=logits_q, logits_p=logits_p
    )
    if _values.on:
        moved = [None if t is None else t.movedim(class_dim, -1) for t in (logits_q, logits_p)]
        _values.class_logits(-1, _values.rows(weights, event_ndims + 1), logits_q=moved[0], logits_p=moved[1])
    # the rows are what is left of the dimensions but that of the classes
    rows_of = logits_q.movedim(class_dim, -1)
    weights, reduction = weighting(weights, normalize_weights, reduction, rows_of, event_ndims + 1)
    options = (class_dim, event_ndims, unimix)
    return _weighted(_ops.categorical_kl, (logits_q, logits_p), weights, options, scale, reduction)


def balanced_categorical_kl(
    posterior_logits: Tensor,
    prior_logits: Tensor,
    *,
    event_ndims: int = 1,
    free_nats: float = 1.0,
    free_nats_mode: str = "sum",
    unimix: float = 0.0,
    dynamics_scale: float = 1.0,
    representation_scale: float = 0.1,
) -> BalancedKL:
    """The KL of a world model with discrete latents, at two rates: DreamerV3's dynamics and representation loss.

    dynamics = mean max(KL(sg(q) || p), free_nats), representation = mean max(KL(q || sg(p)), free_nats), and
    loss = dynamics_scale · dynamics + representation_scale · representation; sg stops gradients, so that `dynamics` has
    one for the prior alone, and `representation` for the posterior alone (the other's is None, not zeros).

    Args:
        posterior_logits: q's, `[rows…, event…, C]`, any strides: `[B, T, 32 variables, 32 classes]` in DreamerV3.
        prior_logits: p's, as `logits_p` of `categorical_kl`.
        event_ndims: how many dimensions before the classes are the variables of one row.
        free_nats: nats below which the KL costs nothing and has no gradient; 0: none.
        free_nats_mode: "sum": of a row, after the sum over its variables (DreamerV3, and torchrl's
            `categorical_kl_terms`); "per_variable": of each variable, before the sum (torchrl's
            `categorical_kl_balanced`, which then takes the mean over the variables: scale by 1 over their number).
        unimix: the share of uniform probability mixed into both (0.01 in DreamerV3).
        dynamics_scale, representation_scale: 1 and 0.1 in DreamerV3; DreamerV2's balance of 0.8 is 0.8 and 0.2.

    Returns:
        BalancedKL(loss, dynamics, representation): scalars, nats.

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range, unknown names,
            negative `free_nats`, `unimix` outside [0, 1].

    Source: Hafner et al., "Mastering Diverse Domains through World Models" (2023), Eq. 5.
    """
    _checks.choice("free_nats_mode", free_nats_mode, ("sum", "per_variable"))
    free_nats = _checks.number("free_nats", free_nats, minimum=0.0)
    unimix = _unimix(unimix)
    scales = (
        _checks.number("dynamics_scale", dynamics_scale, differentiable=True),
        _checks.number("representation_scale", representation_scale, differentiable=True),
    )
    logits, event_ndims, _ = _checks.aligned_sites(
        event_ndims, -1, posterior_logits=posterior_logits, prior_logits=prior_logits
    )
    if _values.on:
        _values.class_logits(-1, posterior_logits=logits[0], prior_logits=logits[1])
    options = (event_ndims, free_nats, free_nats_mode, unimix)
    if any(map(_checks.learned, scales)):
        _, dynamics, representation = _ops.balanced_categorical_kl(logits, *options, 1.0, 1.0)
        return BalancedKL(scales[0] * dynamics + scales[1] * representation, dynamics, representation)
    return BalancedKL(*_ops.balanced_categorical_kl(logits, *options, *scales))


# ---- over all pairs of a minibatch -----------------------------------------------------------------------------------


class TotalCorrelation(NamedTuple):
    """One number per example, in nats; their means over the minibatch estimate the terms of beta-TCVAE."""

    log_qz: Tensor  # log q(z)
    log_prod_qzi: Tensor  # log prod_d q(z_d)
    log_qzx: Tensor  # log q(z|x)
    mutual_information: Tensor  # log q(z|x) - log q(z)
    total_correlation: Tensor  # log q(z) - log prod_d q(z_d)
    dimension_wise_kl: Tensor  # log prod_d q(z_d) - log p(z), p standard normal


def total_correlation(
    z: Tensor, mean: Tensor, logvar: Tensor, *, dataset_size: int, estimator: str = "mss"
) -> TotalCorrelation:
    """The decomposition of the KL of a VAE's aggregate posterior, from one minibatch of B out of N examples.

    With l_ijd = log N(z_id; mean_jd, e^{logvar_jd}) and weights W of the pairs:

        log q(z_i) = log sum_j W_ij exp(sum_d l_ijd),    log prod_d q(z_id) = sum_d log sum_j W_ij exp(l_ijd)

    "mss", minibatch stratified sampling, M = B - 1: W is 1/N for (i, i), (N - M)/(N M) for (i, (i + 1) mod B), else
    1/M; each row of W sums to 1. "mws", minibatch weighted sampling: W = 1/(B N), biased. "mss_columns": what the
    paper's published code and those after it (pythae) take for "mss", two columns in place of two diagonals: 1/N for
    (i, 0), (N - M)/(N M) for (i, 1) and (B - 2, 0); only to repeat their results. Neither `[B, B, D]` nor `[B, B]` is
    ever in memory.

    Args:
        z: `[B, D]`, z_i drawn from q(z | x_i).
        mean, logvar: of q(z | x_i), `[B, D]`, or `[D]` or `()` where they are the same for all.
        dataset_size: N; at least B is used, as no minibatch holds more examples than there are.
        estimator: "mss", "mws" or "mss_columns".

    Returns:
        Six rows `[B]`, fp32 for fp16 and bf16, each with its gradient. To minimise: reconstruction + alpha ·
        `mutual_information.mean()` + beta · `total_correlation.mean()` + gamma · `dimension_wise_kl.mean()`.

    Raises:
        TypeError: tensors that are not floating-point, a `dataset_size` that is no int.
        ValueError: shapes that do not fit `[B, D]`, tensors on two devices, `dataset_size` < 1, an unknown
            `estimator`.

    Source: Chen et al., "Isolating Sources of Disentanglement in VAEs" (2018), Eq. 2 and App. C.1 (mws), C.2 (mss).
    """
    posteriors = _check_posteriors(z, mean, logvar, dataset_size, estimator)
    if _values.on:
        _values.numbers(z=z, mean=mean, logvar=logvar)
    return TotalCorrelation(*_ops.total_correlation(posteriors, dataset_size, estimator))


def _check_posteriors(
    z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: str
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.choice("estimator", estimator, ("mss", "mws", "mss_columns"))
    if isinstance(dataset_size, bool) or not isinstance(dataset_size, int):
        raise TypeError(f"dataset_size: expected an int, got {type(dataset_size).__name__}")
    if not 1 <= dataset_size < 2**63:
        raise ValueError(f"dataset_size: got {dataset_size}, expected an int >= 1")
    if _checks.floating("z", z).dim() != 2:
        raise ValueError(f"z, mean, logvar: got shape {tuple(z.shape)}, expected [B, D]")
    return _checks.aligned(1, data="z", z=z, mean=mean, logvar=logvar)[0]  # type: ignore[return-value]


MMD_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def mmd(
    x: Tensor, y: Tensor, *, kernel: str = "imq", scales: Sequence[float] = MMD_SCALES, unbiased: bool = True
) -> Tensor:
    """The squared maximum mean discrepancy of two sets of points: mean k(x, x') + mean k(y, y') - 2 mean k(x, y).

    With d² the squared distance and C = 2 D s for each scale s: "imq" is sum_s C / (C + d²), "rbf" sum_s e^{-d²/C}.
    Distances are those of differences: nothing cancels where points are close, or far from 0. The gradients are made in
    the forward pass, where one is wanted, and kept: as much memory as the points.

    Args:
        x: `[N, D]`, say latent codes.
        y: `[M, D]`, say samples of the prior.
        kernel: "imq" or "rbf".
        scales: of the kernel, 1 to 16 positive numbers. With variance 1 in each dimension, 2 D is the expected squared
            distance of two points; the defaults are WAE's.
        unbiased: leave k(x_i, x_i) and k(y_i, y_i) out, and divide by N (N - 1) and M (M - 1): the estimate can then be
            negative. Otherwise they count, over N² and M².

    Returns:
        One number, fp32 for fp16 and bf16.

    Raises:
        TypeError: tensors that are not floating-point, scales that are no numbers.
        ValueError: shapes other than `[N, D]` and `[M, D]`, tensors on two devices, an unknown `kernel`, no scales
            or too many or one that is not positive, a single point with `unbiased`.

    Source: Gretton et al., "A Kernel Two-Sample Test" (2012), Lemma 6 (unbiased) and Eq. 5 (biased); Tolstikhin et al.,
    "Wasserstein Auto-Encoders" (2018), Sec. 4 and App. for the kernel, C and its scales.
    """
    x, y, numbers = _check_points(x, y, kernel, scales)
    if unbiased and (x.size(0) == 1 or y.size(0) == 1):
        raise ValueError(
            f"unbiased: got True with {x.size(0)} points x and {y.size(0)} points y, expected at least 2 of each"
        )
    if _values.on:
        _values.numbers(x=x, y=y)
    # made along with the value: alone they would take all of its work once more
    gradients = (x.requires_grad | y.requires_grad << 1) if torch.is_grad_enabled() else 0
    return _ops.mmd((x, y), kernel, numbers, unbiased, gradients)


def _check_points(x: Tensor, y: Tensor, kernel: str, scales: Sequence[float]) -> tuple[Tensor, Tensor, list[float]]:
    _checks.choice("kernel", kernel, ("imq", "rbf"))
    if isinstance(scales, (int, float, str)):
        raise TypeError(f"scales: got {scales!r}, expected a sequence of numbers, [{scales}]")
    numbers = _checks.numbers("scales", scales, minimum=0.0, exclusive=True)
    if not 1 <= len(numbers) <= 16:
        raise ValueError(f"scales: got {len(numbers)} of them, expected 1 to 16")
    _checks.floating("x", x)
    _checks.floating("y", y)
    if x.dim() != 2 or y.dim() != 2 or x.size(1) != y.size(1):
        raise ValueError(f"x, y: got shapes {tuple(x.shape)} and {tuple(y.shape)}, expected [N, D] and [M, D]")
    if y.device != x.device:
        raise ValueError(f"y: got device {y.device}, expected {x.device} as x")
    x, y = _checks.promoted([x, y])
    return x, y, numbers
