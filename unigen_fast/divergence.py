"""KL divergences in closed form and by one sample, and reparameterised samples drawn in one pass with them.

Conventions: `event_ndims` trailing dimensions are summed, `reduction` acts on the rows that remain. fp16 and bf16 are
computed, and rows returned, in fp32. The second argument is the log-variance unless `spread` says otherwise.
"""

from typing import Any

import torch
from torch import Tensor

from unigen_fast import _checks, _ops
from unigen_fast._fused import FusedOp


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    event_ndims: int = 1,
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
        mean, logvar: `[rows…, event…]`, broadcastable with each other, any strides.
        prior_mean, prior_logvar: broadcastable with them; None stands for 0 (the standard normal).
        event_ndims: how many trailing dimensions make one example's event.
        spread: what `logvar` and `prior_logvar` hold: "logvar", "logstd" or "std" (positive).
        free_bits: nats below which the KL costs nothing and has no gradient.
        free_bits_mode: "sum": max(KL of the row, free_bits); "per_dim": each dimension's KL is so bounded before the
            sum. Both per example; Kingma et al. (2016), Eq. 16, average over the batch first.
        clamp_logvar: (low, high) for the log-variances; the gradient is 0 outside.
        weights: broadcastable to the rows, multiplied in before the reduction.
        normalize_weights: divide by the sum of the weights (over all rows) instead of the number of rows: a masked
            mean. A mask of zeros gives 0.
        scale: multiplies the result.
        reduction: "mean", "sum" or "none" over the rows.

    Returns:
        Nats; a scalar, or rows with "none".

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not broadcast, tensors on two devices, `event_ndims` out of range, unknown names,
            `normalize_weights` without `weights`, negative `free_bits`.

    Source: Kingma and Welling (2014), App. B.
    """
    _checks.choice("spread", spread, _checks.SPREADS)
    _checks.choice("free_bits_mode", free_bits_mode, ("sum", "per_dim"))
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    free_bits = _checks.number("free_bits", free_bits, minimum=0.0)
    scale = _checks.number("scale", scale)
    low, high = _checks.clamp_range(clamp_logvar)
    mean, logvar, prior_mean, prior_logvar = _checks.same_kind(  # type: ignore[assignment]
        optional=("prior_mean", "prior_logvar"),
        mean=mean,
        logvar=logvar,
        prior_mean=prior_mean,
        prior_logvar=prior_logvar,
    )
    event_ndims = _checks.event("mean", mean, event_ndims)
    weights, reduction = _weighting(weights, normalize_weights, reduction, mean, event_ndims)
    options = (event_ndims, spread, free_bits, free_bits_mode, low, high)
    return _weighted(_ops.gaussian_kl, (mean, logvar, prior_mean, prior_logvar), weights, options, scale, reduction)


def _weighting(
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
        rows = op((*tensors, None), *options, scale, "none") * weights
        return rows.mean() if reduction == "mean" else rows.sum() if reduction == "sum" else rows
    return op((*tensors, weights), *options, scale, reduction)


def _row_weights(weights: Tensor, mean: Tensor, event_ndims: int) -> Tensor:
    """`weights` in the arithmetic dtype, expanded to the rows of `mean`."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a torch.Tensor, got {type(weights).__name__}")
    if weights.device != mean.device:
        raise ValueError(f"weights: got device {weights.device}, expected {mean.device}")
    rows = mean.shape[: mean.dim() - event_ndims]
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    try:
        return weights.to(dtype).expand(rows)
    except RuntimeError:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, expected one that broadcasts to the rows {tuple(rows)}"
        ) from None


def gaussian_kl_monte_carlo(
    z: Tensor,
    mean: Tensor | None,
    logvar: Tensor,
    prior_mean: Tensor,
    prior_logvar: Tensor,
    *,
    event_ndims: int = 1,
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
        prior_mean, prior_logvar: of p. All of them broadcastable with each other.
        event_ndims, spread, weights, normalize_weights, scale, reduction: as in `gaussian_kl`.
        clamp_logvar: (low, high) for both log-variances; the gradient is 0 outside.

    Returns:
        Nats; a scalar, or rows with "none". fp32 for fp16 and bf16, computed in fp32 (VITS' own overflows in fp16,
        espnet/espnet#4236).

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not broadcast, tensors on two devices, `event_ndims` out of range, unknown names,
            `normalize_weights` without `weights`.

    Source: Kim, Kong and Son, "VITS" (2021), Eq. 4 (the second form; the first is log q - log p as it stands).
    """
    _checks.choice("spread", spread, _checks.SPREADS)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    scale = _checks.number("scale", scale)
    low, high = _checks.clamp_range(clamp_logvar)
    tensors: tuple[Tensor, ...] = _checks.same_kind(  # type: ignore[assignment]
        optional=("mean",), z=z, mean=mean, logvar=logvar, prior_mean=prior_mean, prior_logvar=prior_logvar
    )
    event_ndims = _checks.event("z", tensors[0], event_ndims)
    weights, reduction = _weighting(weights, normalize_weights, reduction, tensors[0], event_ndims)
    options = (event_ndims, spread, low, high)
    return _weighted(_ops.gaussian_kl_monte_carlo, tensors, weights, options, scale, reduction)


def bernoulli_kl(
    logits_q: Tensor,
    logits_p: Tensor | None = None,
    *,
    event_ndims: int = 1,
    weights: Tensor | None = None,
    normalize_weights: bool = False,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """KL(Bernoulli(sigma(a)) || Bernoulli(sigma(b))), summed over the event, reduced over the rows.

    sum [ sigma(a) (a - b) + softplus(b) - softplus(a) ], evaluated without cancellation where a is near b.

    Args:
        logits_q: a, `[rows…, event…]`, any strides.
        logits_p: b, broadcastable with it; None stands for 0: Bernoulli(1/2), and the KL is log 2 minus the entropy.
        event_ndims, weights, normalize_weights, scale, reduction: as in `gaussian_kl`.

    Returns:
        Nats; a scalar, or rows with "none".

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not broadcast, tensors on two devices, `event_ndims` out of range, unknown names,
            `normalize_weights` without `weights`.

    Source: Kullback and Leibler (1951); sigma(a) (a - b) + … is the Bregman divergence of softplus, Banerjee et al.,
    "Clustering with Bregman Divergences" (2005), Table 1.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    scale = _checks.number("scale", scale)
    tensors: tuple[Tensor, ...] = _checks.same_kind(  # type: ignore[assignment]
        optional=("logits_p",), logits_q=logits_q, logits_p=logits_p
    )
    event_ndims = _checks.event("logits_q", tensors[0], event_ndims)
    weights, reduction = _weighting(weights, normalize_weights, reduction, tensors[0], event_ndims)
    return _weighted(_ops.bernoulli_kl, tensors, weights, (event_ndims,), scale, reduction)


def _sampling(
    mean: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    sample_dim: int,
    spread: str,
    generator: torch.Generator | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    """Checked arguments of a sampling op: (mean, logvar, rng_state), num_samples (-1: none), sample_dim."""
    _checks.choice("spread", spread, _checks.SPREADS)
    mean, logvar = _checks.same_kind(mean=mean, logvar=logvar)  # type: ignore[assignment]
    if num_samples is None:
        num_samples, sample_dim = -1, 0
    else:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 0:
            raise ValueError(f"num_samples: got {num_samples!r}, expected None or an int >= 0")
        sample_dim = _checks.dimension("sample_dim", mean, sample_dim, extra=1)
    # one 64-bit seed and offset from PyTorch's generator: manual_seed governs, and a CUDA graph captures it
    # (`random_` breaks torch.compile's graph; with generator=None spelled out, Inductor keeps PyTorch's own numbers)
    rng_state = torch.randint(2**63 - 1, (2,), device=mean.device, generator=generator)
    return (mean, logvar, rng_state), num_samples, sample_dim


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

    The noise depends on the generator's state alone, not on device, dtype or layout (up to rounding).

    Args:
        mean, logvar: broadcastable with each other, any strides.
        num_samples: S samples along a new dimension; None: one sample, without that dimension.
        sample_dim: where the new dimension goes, counted in the result.
        spread: what `logvar` holds: "logvar", "logstd" or "std".
        clamp_logvar: (low, high) for the log-variance; the gradient is 0 outside.
        generator: PyTorch's, of the tensors' device; None: the default one (`torch.manual_seed`).

    Returns:
        z, in the dtype of `mean`, contiguous.

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: shapes that do not broadcast, tensors on two devices, a bad `num_samples`, `sample_dim` or `spread`.

    Source: Kingma and Welling (2014), Sec. 2.4; Salmon et al. (2011) for Philox.
    """
    low, high = _checks.clamp_range(clamp_logvar)
    tensors, num_samples, sample_dim = _sampling(mean, logvar, num_samples, sample_dim, spread, generator)
    return _ops.sample_gaussian(tensors, num_samples, sample_dim, spread, low, high)


def sample_gaussian_with_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    sample_dim: int = 0,
    event_ndims: int = 1,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(z, KL): `sample_gaussian` and `gaussian_kl(…, reduction="none")` to N(0, 1) in one pass, forward and backward.

    Args:
        event_ndims: how many trailing dimensions of `mean` the KL is summed over.
        (the others): as in `sample_gaussian`.

    Returns:
        z as `sample_gaussian` gives it for the same generator state, and the KL in nats as rows of `mean`.

    Raises:
        As `sample_gaussian`; ValueError for `event_ndims` out of range.

    Source: Kingma and Welling (2014), Sec. 2.4 and App. B.
    """
    low, high = _checks.clamp_range(clamp_logvar)
    tensors, num_samples, sample_dim = _sampling(mean, logvar, num_samples, sample_dim, spread, generator)
    event_ndims = _checks.event("mean", tensors[0], event_ndims)
    return _ops.sample_gaussian_with_kl(tensors, num_samples, sample_dim, event_ndims, spread, low, high)
