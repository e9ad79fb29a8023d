"""Whole bounds in one pass: what the decoder gave, read once, and its gradient, written once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unigen_fast import _checks, _ops, _values, divergence, importance
from unigen_fast import likelihood as _likelihood
from unigen_fast._fused import FusedOp
from unigen_fast.reference._common import reduce_rows, reduce_weighted
from unigen_fast.reference.divergence import to_logvar
from unigen_fast.reference.objectives import power_weights

Decoder = Tensor | Sequence[Tensor]

LIKELIHOODS: dict[str, tuple[str, ...]] = {
    "bernoulli": ("logits",),
    "gaussian": ("mean", "logvar"),
    "laplace": ("mean", "log_scale"),
    "discretized_logistic": ("mean", "log_scale"),
    "negative_binomial": ("mu", "theta"),
    "zero_inflated_negative_binomial": ("mu", "theta", "gate_logits"),
    "categorical": ("logits",),
    "discretized_logistic_mixture": ("params",),
}
_GAUSSIANS = ("mean", "logvar", "prior_mean", "prior_logvar")
_LIKELIHOOD_OPTIONS = {
    "gaussian": ("spread", "clamp_logvar"),
    "discretized_logistic": ("bin_width", "low", "high"),
    "negative_binomial": ("eps",),
    "zero_inflated_negative_binomial": ("eps",),
    "categorical": ("class_dim",),
}
_NOT_ELEMENTWISE = ("categorical", "discretized_logistic_mixture")
_ESTIMATORS = ("iwae", "stl", "dreg", "elbo", "miwae", "ciwae", "renyi", "cubo", "tvo")


class Bound(NamedTuple):
    """All three differentiable; the last two have one number per example, in nats."""

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor


class MultiSampleBound(NamedTuple):
    """The last two have one number per example, and no gradient."""

    loss: Tensor
    log_w: Tensor  # log p(x, z) - log q(z | x), the samples at `dim`; differentiable
    bound: Tensor  # in nats: what the loss is the negative (CUBO: the value) of
    ess: Tensor  # effective sample size of the weights the estimator takes, from 1 to K


def elbo_loss(
    decoder: Decoder,
    x: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    likelihood: str = "bernoulli",
    likelihood_options: Mapping[str, Any] | None = None,
    event_ndims: int | None = None,
    kl_weight: float = 1.0,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
    weights: Tensor | None = None,
    normalize_weights: bool = False,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Bound:
    """-[ log p(x | decoder) - kl_weight KL(q(z | x) || p(z)) ], the negative evidence lower bound of a VAE.

    The KL of the Gaussians is in closed form. For the elementwise likelihoods (all but the last two below) one kernel
    reads what the decoder gave once; if the loss is reduced, it writes all gradients in the same pass, and backward
    only hands them over (those of fp16 and bf16 are made in backward, behind a loss scale).

    Args:
        decoder: what the decoder gave for one sample of z per example, `[rows…, event…]`: the likelihood's parameters
            in the order of `<likelihood>_log_prob`, one tensor or several. The first has the shape of x; one of the
            others that is the same for all rows (a learned variance or dispersion, `[event…]` or `()`) has its
            gradient summed in the kernel. A Gaussian's mean alone has variance 1.
        x: the data.
        mean, logvar: of q(z | x), `[rows…, latent…]`.
        likelihood: bernoulli, gaussian, laplace, discretized_logistic, negative_binomial,
            zero_inflated_negative_binomial, categorical or discretized_logistic_mixture.
        likelihood_options: further options of `<likelihood>_log_prob`, such as `{"bin_width": 1 / 255}`.
        event_ndims: how many trailing dimensions of x make one example and are summed. None: all but the rows of the
            latent, which is a vector for each row if `mean` has two dimensions.
        kl_weight: beta of a beta-VAE, or a warm-up.
        prior_mean, prior_logvar: of p(z); standard normal where absent.
        spread, clamp_logvar: of q and p, as in `gaussian_kl`.
        weights: of the examples, as in `gaussian_kl`. Nothing of an example of weight 0 is in the loss or its
            gradients, even if it is NaN or infinite.
        normalize_weights: divide by the sum of the weights: masked means.
        scale: multiplies the loss.
        reduction: over the rows: "mean", "sum" or "none".

    Returns:
        The loss, and the rows of log-likelihood and KL, without weights and scale.

    Raises:
        TypeError: inputs that are not floating-point tensors (x may hold integers).
        ValueError: shapes that do not fit together, unknown `likelihood`, `spread` or `reduction`, a wrong number of
            decoder outputs.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), Eq. 10; beta: Higgins et al. (2017).
    """
    _checks.choice("likelihood", likelihood, LIKELIHOODS)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    kl_weight = _checks.number("kl_weight", kl_weight, differentiable=True)
    scale = _checks.number("scale", scale, differentiable=True)
    parameters = decoder_parameters(likelihood, decoder)
    gaussians = _gaussians(mean, logvar, prior_mean, prior_logvar, spread, clamp_logvar)
    _data(x)
    if _values.on:
        _check_spreads(spread, logvar, prior_logvar)
    bins = _bins(likelihood, likelihood_options)
    event_ndims = _event_of(event_ndims, x, gaussians[0])
    constants = x.requires_grad or (isinstance(weights, Tensor) and weights.requires_grad)
    if likelihood in _NOT_ELEMENTWISE or bins is None or constants:
        _same_event(likelihood, parameters, x, None, likelihood_options)
        found = _of_rows(gaussians, x.shape[: x.dim() - event_ndims])
        of_x = log_prob(likelihood, parameters, x, event_ndims, likelihood_options)
        kl = divergence.gaussian_kl(*found, event_ndims=found[0].dim() - of_x.dim(), reduction="none")
        loss = kl * kl_weight - of_x
        weights, reduction = divergence.weighting(weights, normalize_weights, reduction, loss, 0)
        return Bound(reduce_weighted(loss, weights, scale, reduction), of_x, kl)
    event, rows = _decoder_and_data(likelihood, parameters, x, event_ndims, None, bins)
    tensors = _one_width(event, _of_rows(gaussians, rows), "mean")
    of_data: Any = tensors[0]
    if _values.on:
        _check_values(likelihood, tensors, weights, event_ndims, len(rows), bins)
    weights, reduction = divergence.weighting(weights, normalize_weights, reduction, of_data, of_data.dim() - len(rows))
    tensors = *tensors, weights
    if _checks.learned(kl_weight):  # of a loss without KL, and the op's rows of it
        options = of_data.dim() - len(rows), likelihood, bins, 0.0, 1.0, reduction, 0
        loss, of_x, kl = _ops.elbo_loss(tensors, *options)
        return Bound((loss + kl_weight * reduce_weighted(kl, weights, 1.0, reduction)) * scale, of_x, kl)
    gradients = 0 if reduction == "none" else _to_be_made(_ops.elbo_loss, tensors)
    options = of_data.dim() - len(rows), likelihood, bins, kl_weight, scale, reduction, gradients
    return Bound(*_ops.elbo_loss(tensors, *options))


def iwae_objective(
    decoder: Decoder,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    dim: int,
    likelihood: str = "bernoulli",
    likelihood_options: Mapping[str, Any] | None = None,
    estimator: str = "iwae",
    num_groups: int | None = None,
    beta: float | None = None,
    alpha: float | None = None,
    order: float | None = None,
    partition: Sequence[float] | None = None,
    event_ndims: int | None = None,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
) -> MultiSampleBound:
    """A bound from K samples per example, with log_w_k = log p(x | z_k) + log p(z_k) - log q(z_k | x).

    With "iwae": -log (1/K) sum_k exp(log_w_k), whose gradient is -sum_k w~_k d log_w_k, w~ = softmax(log_w). For the
    elementwise likelihoods (all but the last two below) one kernel reads what the decoder gave once; if the loss is
    reduced, it writes all gradients in the same pass, and backward only hands them over (those of fp16 and bf16 are
    made in backward, behind a loss scale). Log-weights of any size are weighed by fp32's digits of their differences.

    Args:
        decoder: `[rows…, event…]`, one of the rows' dimensions being that of the K samples: the likelihood's
            parameters in the order of `<likelihood>_log_prob`, one tensor or several. The first has the shape of x
            beside the samples; one of the others that is the same for all rows (a learned variance, `[event…]` or
            `()`) has its gradient summed in the kernel. A Gaussian's mean alone has variance 1.
        x: the data, without the samples' dimension.
        z: the samples, `[rows…, latent…]`.
        mean, logvar: of q(z | x), as z without the samples' dimension.
        dim: the dimension of the samples of `decoder`, z and log_w, counted from the front; from the end if z and
            `decoder` have as many dimensions.
        likelihood: bernoulli, gaussian, laplace, discretized_logistic, negative_binomial,
            zero_inflated_negative_binomial, categorical or discretized_logistic_mixture.
        likelihood_options: further options of `<likelihood>_log_prob`, such as `{"bin_width": 1 / 255}`.
        estimator: which loss of log_w:
            "iwae": as above. "elbo": -mean_k log_w_k.
            "stl" (sticking the landing): q's parameters detached in log q, so that they are reached through z alone.
            "dreg": the same, and the gradient that reaches z, from the decoder too, times w~: see `dreg_loss`.
            "miwae": the mean over `num_groups` stretches of the samples of the loss "iwae" of each.
            "ciwae": `beta` times "elbo" plus 1 - beta times "iwae".
            "renyi": `renyi_loss` of the order `alpha`. "cubo": `cubo_loss` of `order` (2 unless told).
            "tvo": `tvo_loss` of `partition`; where z does not require grad and q's parameters do, its samples are not
            reparameterised, and log q(z) is given to it as `log_q`.
            Other losses take `log_w`: `piwae_losses`, `rws_losses`, `vimco_loss`, …
        num_groups, beta, alpha, order, partition: of the estimators that have them.
        event_ndims: how many trailing dimensions of x make one example and are summed. None: all but the rows of the
            latent, which is a vector for each row if `mean` has two dimensions.
        prior_mean, prior_logvar: of p(z), as `mean`; standard normal where absent.
        spread, clamp_logvar: of q and p, as in `gaussian_kl`.
        scale: multiplies the loss.
        reduction: over the examples: "mean", "sum" or "none".

    Returns:
        loss; log_w; and for each example the bound and the effective sample size of its weights (with "miwae" its mean
        over the groups; with "tvo" that of "iwae"). fp32 for fp16 and bf16.

    Raises:
        TypeError: inputs that are not floating-point tensors (x may hold integers).
        ValueError: shapes that do not fit together, no samples, unknown names, an option that the estimator lacks or
            does not have, a wrong number of decoder outputs, samples that `num_groups` does not divide.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders" (2016), Eq. 8, 14; Roeder, Wu, Duvenaud
    (2017) for "stl"; Tucker et al. (2018) for "dreg"; Rainforth et al. (2018) for "miwae" and "ciwae"; Li and Turner
    (2016) for "renyi"; Dieng et al. (2017) for "cubo"; Masrani, Le, Wood (2019) for "tvo".
    """
    _checks.choice("likelihood", likelihood, LIKELIHOODS)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    scale = _checks.number("scale", scale, differentiable=True)
    given = {"num_groups": num_groups, "beta": beta, "alpha": alpha, "order": order, "partition": partition}
    option = _estimator_option(estimator, given)
    parameters = decoder_parameters(likelihood, decoder)
    gaussians = _gaussians(mean, logvar, prior_mean, prior_logvar, spread, clamp_logvar)
    if estimator in ("stl", "dreg"):
        gaussians = [*(g.detach() for g in gaussians[:2] if g is not None), *gaussians[2:]]
    _data(x)
    if _values.on:
        _check_spreads(spread, logvar, prior_logvar)
    dim = _sample_dim(dim, z, parameters)
    event_ndims = _event_of(event_ndims, x, z, dim)
    # what the kernel takes, the rest being composed of several: an elementwise likelihood as it stands
    bins = _bins(likelihood, likelihood_options)
    fused = likelihood not in _NOT_ELEMENTWISE and bins is not None and not x.requires_grad
    if fused:
        event, rows = _decoder_and_data(likelihood, parameters, x, event_ndims, dim, bins)
        tensors = _one_width(event, _latents(z, gaussians, rows, dim), "z")
        if _values.on:
            _check_values(likelihood, (*tensors[:4], *tensors[5:]), None, event_ndims, len(rows), bins)
            _values.numbers(z=z)
    else:
        of_x, (z, *gaussians) = _log_likelihood(
            likelihood, parameters, x, z, gaussians, dim, event_ndims, likelihood_options
        )
    samples = z.size(dim)
    if samples == 0:
        raise ValueError(f"z: got shape {tuple(z.shape)}, expected at least one sample along dim {dim}")
    mixed = estimator == "ciwae" and _checks.learned(option)  # then by a loss of log_w, as is "tvo"
    groups, power, elbo_weight, sign = _power(estimator, 0.0 if mixed else option, samples)
    if fused:
        by_log_w = estimator == "tvo" or mixed
        gradients = 0 if by_log_w or reduction == "none" else _to_be_made(_ops.multi_sample_bound, tensors)
        found = _ops.multi_sample_bound(
            tensors, dim, event_ndims, likelihood, bins, groups, power, elbo_weight, sign * scale, reduction, gradients,
            visible=4,
        )  # fmt: skip
        bound = MultiSampleBound(*found)
    else:
        bound = _composed(of_x, z, gaussians, dim, groups, power, elbo_weight, sign * scale, reduction)
    if mixed:
        each = importance.ciwae_loss(bound.log_w, dim=dim, beta=option, reduction="none")
        return bound._replace(loss=reduce_rows(each, reduction, scale), bound=-each.detach())
    if estimator == "tvo":
        posterior: Any = tensors[5:7] if fused else gaussians[:2]
        log_q = None
        if torch.is_grad_enabled() and not z.requires_grad and any(g.requires_grad for g in posterior):
            of_samples = (g.unsqueeze(dim) for g in posterior)
            log_q = _likelihood.gaussian_log_prob(z, *of_samples, event_ndims=z.dim() - bound.log_w.dim())
        each = importance.tvo_loss(bound.log_w, dim=dim, partition=option, log_q=log_q, reduction="none")
        return bound._replace(loss=reduce_rows(each, reduction, scale), bound=-each.detach())
    if estimator == "dreg":
        importance.weigh_gradient(z, bound.log_w, dim)
    return bound


def adversary_activated_loss(
    per_example_loss_real: Tensor,
    per_example_loss_fake: Tensor,
    *,
    real_logits: Tensor,
    fake_logits: Tensor,
    reduction: str = "mean",
) -> Tensor:
    """1/2 E_real[ D(x) L(x) ] + 1/2 E_fake[ D(x~) L(x~) ]: the loss of an adversary-activated VAE.

    L is a negative bound of each example (`elbo_loss(…, reduction="none").loss`), of real data and of as many samples
    x~ of the model; D = sigma(logit) the discriminator's probability that an example is real: q^r(y = 0 | x). No
    gradient reaches the weights. The fakes are constants: pass `x~.detach()` to the model, as the paper's p_theta0(x)
    says. With D = 1 on data and 0 on fakes it is half the VAE's loss.

    Args:
        per_example_loss_real: `[B…]`.
        per_example_loss_fake: `[B'…]`.
        real_logits, fake_logits: the discriminator's, one for each example: their shapes, or `[B…, 1]`.
        reduction: "mean", of each side, or "sum".

    Returns:
        A scalar; fp32 for fp16 and bf16.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: logits and losses of different shapes; unknown `reduction`.

    Source: Hu, Yang, Salakhutdinov, Xing, "On Unifying Deep Generative Models" (2018), Eq. 17. The weights are not
    normalised there, nor here; that both sides count one half is its p(y), uniform.
    """
    _checks.choice("reduction", reduction, ("mean", "sum"))
    sides = []
    for side, loss, logits in (
        ("real", per_example_loss_real, real_logits),
        ("fake", per_example_loss_fake, fake_logits),
    ):
        _checks.floating(f"per_example_loss_{side}", loss)
        _checks.floating(f"{side}_logits", logits)
        if logits.device != loss.device:
            raise ValueError(
                f"{side}_logits: got device {logits.device}, expected {loss.device} as per_example_loss_{side}"
            )
        if logits.shape != loss.shape:
            if logits.shape != (*loss.shape, 1):
                raise ValueError(
                    f"{side}_logits: got shape {tuple(logits.shape)}, expected one for each example, "
                    f"{tuple(loss.shape)} as per_example_loss_{side}"
                )
            logits = logits.squeeze(-1)
        if _values.on:
            _values.numbers(**{f"per_example_loss_{side}": loss})
            _values.logits(**{f"{side}_logits": logits})
        wide = torch.float64 if torch.float64 in (loss.dtype, logits.dtype) else torch.float32
        weights = logits.detach().to(wide).sigmoid()
        sides.append(reduce_weighted(loss.to(wide), weights, 0.5, reduction))
    if sides[1].device != sides[0].device:
        raise ValueError(
            f"per_example_loss_fake: got device {sides[1].device}, expected {sides[0].device} as per_example_loss_real"
        )
    return sides[0] + sides[1]


def streaming_log_likelihood(log_w_chunks: Iterable[Tensor], *, dim: int) -> Tensor:
    """log (1/K) sum_k exp(log_w_k) of log-weights that come in chunks: the test log-likelihood, in constant memory.

    For each row a maximum and a sum are kept; a chunk is read once and let go. Chunks are asked for without
    gradients: a generator may compute them as they are needed,

        streaming_log_likelihood((iwae_objective(…, dim=1).log_w for _ in range(20)), dim=1)

    Args:
        log_w_chunks: log-weights in nats, of one shape but for `dim`; each has at least one sample.
        dim: the dimension of the samples.

    Returns:
        Nats, one per row, detached; fp32, or fp64 for fp64. A row of `-inf` gives `-inf`; a NaN or `+inf` makes its row
        NaN.

    Raises:
        TypeError: a chunk is not a floating-point tensor.
        ValueError: no chunks; a chunk without samples, or of other rows than the first.

    Source: Burda, Grosse, Salakhutdinov (2016), Sec. 5: log p(x) by the bound with K = 5000.
    """
    running: _RunningSum | None = None
    with torch.no_grad():
        for chunk in log_w_chunks:
            found = _checks.sample_dimension("log_w_chunks", _checks.floating("log_w_chunks", chunk), dim)
            if _values.on:
                _values.log_weights(found, log_w_chunks=chunk)
            shift, total = _ops.log_mean_exp((chunk,), found, visible=2)[1]
            if running is None:
                running = _RunningSum(shift, total, chunk.size(found), chunk.dtype)
            elif shift.shape != running.shift.shape:
                raise ValueError(
                    f"log_w_chunks: got a chunk of rows {tuple(shift.shape)}, expected {tuple(running.shift.shape)} as "
                    "in the first"
                )
            else:
                running.add(shift, total, chunk.size(found))
            del chunk  # before the next is made
        if running is None:
            raise ValueError("log_w_chunks: got no chunks, expected at least one")
        return running.log_mean()


class _RunningSum:
    """Of exponentials, relative to `shift`; rows of -inf so far have sum 0 at whatever shift."""

    def __init__(self, shift: Tensor, total: Tensor, count: int, dtype: torch.dtype) -> None:
        self.shift, self.total, self.count = shift, total, count
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def add(self, shift: Tensor, total: Tensor, count: int) -> None:
        empty, before = total == 0, self.total == 0
        larger = torch.where(empty, self.shift, torch.where(before, shift, torch.maximum(shift, self.shift)))
        kept = torch.where(before, self.total, self.total * (self.shift - larger).exp())
        self.total = kept + torch.where(empty, total, total * (shift - larger).exp())
        self.shift = larger
        self.count += count

    def log_mean(self) -> Tensor:
        return (self.shift + (self.total / self.count).log()).to(self.dtype)


# ---- arguments -------------------------------------------------------------------------------------------------------


def decoder_parameters(likelihood: str, decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's outputs by their names in `<likelihood>_log_prob`."""
    names = LIKELIHOODS[likelihood]
    if isinstance(decoder, Tensor):
        found = [decoder]  # most often
    elif isinstance(decoder, Sequence) and not isinstance(decoder, str):
        found = list(decoder)
    else:
        raise TypeError(f"decoder: expected a torch.Tensor or a sequence of them, got {type(decoder).__name__}")
    if len(found) != len(names) and not (likelihood == "gaussian" and len(found) == 1):
        raise ValueError(f"decoder: got {len(found)} tensors, expected {', '.join(names)} for {likelihood!r}")
    return {name: _checks.floating(f"decoder's {name}", t) for name, t in zip(names, found, strict=False)}


def _gaussians(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    spread: str,
    clamp_logvar: tuple[float, float] | None,
) -> list[Tensor | None]:
    """Means and log-variances of q and p: small tensors, beside what the decoder gave."""
    _checks.choice("spread", spread, _checks.SPREADS)
    low, high = _checks.clamp_range(clamp_logvar)
    found: list[Tensor | None] = []
    for name, g in zip(_GAUSSIANS, (mean, logvar, prior_mean, prior_logvar), strict=True):
        if g is not None or not name.startswith("prior"):
            g = _checks.floating(name, g)  # type: ignore[arg-type]
            if name.endswith("logvar") and (spread != "logvar" or clamp_logvar is not None):
                g = to_logvar(g, spread, low, high)
        found.append(g)
    return found


def _estimator_option(estimator: str, given: Mapping[str, Any]) -> Any:
    """The estimator's own option, checked; None if it has none."""
    _checks.choice("estimator", estimator, _ESTIMATORS)
    own = {"miwae": "num_groups", "ciwae": "beta", "renyi": "alpha", "cubo": "order", "tvo": "partition"}.get(estimator)
    for name, value in given.items():
        if value is not None and name != own:
            raise ValueError(f"{name}: got {value} with estimator {estimator!r}, which has no such option")
    if own is None:
        return None
    value = given[own]
    if own == "order":
        return _checks.number("order", 2.0 if value is None else value, minimum=1.0)
    if value is None:
        raise ValueError(f"{own}: got none, expected one for estimator {estimator!r}")
    if own == "num_groups":
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"num_groups: expected an int, got {type(value).__name__}")
        return value
    if own == "partition":
        return _checks.increasing("partition", value, 0.0, 1.0)
    return _checks.fraction("beta", value, differentiable=True) if own == "beta" else _checks.number(own, value)


def _power(estimator: str, option: Any, samples: int) -> tuple[int, float, float, float]:
    """(groups, power, weight of the ELBO, sign of the loss) of the estimator's `power_bound_loss`."""
    groups, power, elbo_weight, sign = 1, 1.0, 0.0, -1.0
    if estimator == "miwae":
        groups = option
        if groups < 1 or samples % groups:
            raise ValueError(f"num_groups: got {groups}, expected a divisor of the {samples} samples")
    elif estimator == "elbo":
        power = 0.0
    elif estimator == "ciwae":
        elbo_weight = option
    elif estimator == "renyi":
        power = 1.0 - option
    elif estimator == "cubo":
        power, sign = option, 1.0
    return groups, power, elbo_weight, sign


def _bins(likelihood: str, options: Mapping[str, Any] | None) -> list[float] | None:
    """The kernel's options of the likelihood; None where it has not those that are asked for."""
    if options:
        check_options(likelihood, options)
    if likelihood != "discretized_logistic":
        return None if options else []
    return [*_likelihood.logistic_bins(**(options or {}))]


def check_options(likelihood: str, options: Mapping[str, Any]) -> None:
    """Refuses what `<likelihood>_log_prob` has no option for."""
    if not isinstance(options, Mapping):
        raise TypeError(f"likelihood_options: expected a mapping of names, got {type(options).__name__}")
    allowed = _LIKELIHOOD_OPTIONS.get(likelihood, ())
    for name in options:
        if name not in allowed:
            expected = f"one of {', '.join(map(repr, allowed))}" if allowed else "none"
            hint = _checks.did_you_mean(name, allowed)
            raise ValueError(
                f"likelihood_options: got {name!r} for likelihood {likelihood!r}, expected {expected}{hint}"
            )


def _data(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        _checks.tensor("x", x)
    if x.is_floating_point():
        _checks.floating("x", x)


def _sample_dim(dim: int, z: Tensor, parameters: Mapping[str, Tensor]) -> int:
    """The dimension of the samples, from the front."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {type(dim).__name__}")
    ndims = _checks.floating("z", z).dim(), next(iter(parameters.values())).dim()
    if dim < 0 and ndims[0] != ndims[1]:
        raise ValueError(
            f"dim: got {dim}, expected a dimension counted from the front: z has {ndims[0]} dimensions and decoder "
            f"{ndims[1]}, of which it is not the same"
        )
    found = dim + ndims[0] if dim < 0 else dim
    if not 0 <= found < min(ndims):
        raise ValueError(f"dim: got {dim}, expected one of the leading dimensions of decoder and z, from the front")
    return found


def _event_of(event_ndims: int | None, x: Tensor, latent: Any, dim: int | None = None) -> int:
    """How many trailing dimensions of x make one event: where nobody said, those that are not rows of the latent.

    A latent of one or two dimensions (samples apart) is a vector for each row; of more, rows are the leading
    dimensions that it has in common with x.
    """
    if event_ndims is not None:
        return _checks.event("x", x, event_ndims)
    shape = latent.shape if dim is None else latent.shape[:dim] + latent.shape[dim + 1 :]
    if len(shape) == 2 and x.dim() > 0:
        return x.dim() - 1
    if len(shape) < 2:
        return _checks.read_event("x", x.shape)
    most = min(len(shape) - 1, x.dim())
    common = next((i for i in range(most) if shape[i] != x.shape[i]), most)
    return _checks.read_event("x", x.shape, x.dim() - max(common, 1), x.dim() - 1)


def _same_event(
    likelihood: str,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    dim: int | None,
    options: Mapping[str, Any] | None,
) -> None:
    """Refuses a decoder whose first output has not the shape of x, samples and classes apart."""
    name, first = next(iter(parameters.items()))
    shape, expected = list(first.shape), list(x.shape)
    apart = [] if dim is None else [dim]
    if likelihood == "categorical":
        apart.append(_checks.dimension("class_dim", first, (options or {}).get("class_dim", -1)))
    if likelihood == "discretized_logistic_mixture":
        shape, expected = shape[:-1], expected[:-1]
    for i in sorted(apart, reverse=True):
        del shape[i]
    if shape != expected:
        without = f" without dimension {' and '.join(map(str, apart))}" if apart else ""
        last = ", the last dimension apart" if len(expected) < x.dim() else ""
        samples = " (for several samples per example there is iwae_objective)" if len(shape) > len(expected) else ""
        raise ValueError(
            f"x: got shape {tuple(x.shape)} beside decoder's {name} {tuple(first.shape)}, expected the same"
            f"{without}{last}{samples}"
        )


def _promoted(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Those that are there in their promoted dtype."""
    found = iter(_checks.promoted([t for t in tensors if t is not None]))
    return [None if t is None else next(found) for t in tensors]


def _latents(z: Tensor, gaussians: Sequence[Tensor | None], rows: Sequence[int], dim: int) -> list[Tensor | None]:
    """z and the Gaussians' parameters, these expanded to z without the samples, in one dtype on one device."""
    shape = _checks.floating("z", z).shape
    if shape[: len(rows)] != rows:
        raise ValueError(f"z: got shape {tuple(shape)}, expected the decoder's rows {tuple(rows)}, then any")
    of_example = shape[:dim] + shape[dim + 1 :]
    found: list[Tensor | None] = [z]
    for name, g in zip(_GAUSSIANS, gaussians, strict=True):
        if g is not None:
            if g.device != z.device:
                raise ValueError(f"{name}: got device {g.device}, expected {z.device} as z")
            if g.shape != of_example:
                beside = f"z {tuple(shape)} without dimension {dim}, {tuple(of_example)}"
                if name == "mean":
                    raise ValueError(f"mean: got shape {tuple(g.shape)} beside {beside}, expected the same")
                g = _checks.fitted(name, g, of_example, len(shape) - len(rows), beside)
        found.append(g)
    return _promoted(found)


def _of_rows(gaussians: Sequence[Tensor | None], rows: Sequence[int]) -> tuple[Any, ...]:
    """The Gaussians' parameters in one shape `[rows…, latent…]`, in one dtype on one device."""
    mean: Any = gaussians[0]
    if mean.shape[: len(rows)] != rows:
        raise ValueError(
            f"mean: got shape {tuple(mean.shape)}, expected the decoder's rows {tuple(rows)}, then any (event_ndims "
            "says which they are; for several samples per example there is iwae_objective)"
        )
    given = dict(zip(_GAUSSIANS, gaussians, strict=True))
    return _checks.aligned(mean.dim() - len(rows), data="mean", optional=_GAUSSIANS[2:], **given)[0]


def _decoder_and_data(
    likelihood: str,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    event_ndims: int,
    dim: int | None,
    bins: Sequence[float] | None,
) -> tuple[tuple[Tensor | None, ...], torch.Size]:
    """What the decoder gave, three tensors or None, those of the event's shape for all rows as they are, and x; and
    the rows, that of the samples' dimension `dim` among them, if there is one."""
    outputs = list(parameters.values())
    first = outputs[0]
    shape = first.shape
    if x.shape != (shape if dim is None else shape[:dim] + shape[dim + 1 :]):
        _same_event(likelihood, parameters, x, dim, None)
    rows = first.dim() - event_ndims
    if x.device != first.device:
        raise ValueError(f"x: got device {x.device}, expected {first.device} as the decoder's outputs")
    x = _floating_data(likelihood, x, outputs, bins)
    if len(outputs) > 1:
        names = list(parameters)
        for i in range(1, len(outputs)):
            p = outputs[i]
            if p.device != first.device:
                raise ValueError(f"decoder's {names[i]}: got device {p.device}, expected {first.device} as {names[0]}")
            if p.shape != shape:
                whole = _checks.fitted(f"decoder's {names[i]}", p, shape, event_ndims, f"{names[0]} {tuple(shape)}")
                one = p.dim() <= event_ndims or math.prod(p.shape[:rows]) == 1  # for all rows
                of_event = p.reshape(p.shape[max(p.dim() - event_ndims, 0) :]) if one else p
                outputs[i] = of_event.expand(shape[rows:]) if one else whole
    return (*outputs, *(None,) * (3 - len(outputs)), x), shape[:rows]


def _check_spreads(spread: str, logvar: Tensor, prior_logvar: Tensor | None) -> None:
    """As they were given: what they are turned into is NaN at most."""
    if spread == "std":
        _values.spreads(spread, logvar=logvar, prior_logvar=prior_logvar)


def _check_values(
    likelihood: str, tensors: Sequence[Tensor | None], weights: Any, event_ndims: int, rows: int, bins: Any
) -> None:
    """Of a bound's decoder, data and Gaussians, in the kernel's order."""
    first, x, mean = tensors[0], tensors[3], tensors[4]
    assert first is not None and x is not None and mean is not None
    parameters = dict(zip(LIKELIHOODS[likelihood], tensors, strict=False))
    weights = weights if isinstance(weights, Tensor) else None
    of_data, of_latent = _values.rows(weights, event_ndims), _values.rows(weights, mean.dim() - rows)
    _values.likelihood(likelihood, x, parameters, bins, of_data, "decoder's ")
    _values.numbers(of_latent, **dict(zip(_GAUSSIANS, tensors[4:], strict=False)))


def _floating_data(likelihood: str, x: Tensor, outputs: Sequence[Tensor], bins: Sequence[float] | None) -> Tensor:
    if x.is_floating_point():
        return x
    if likelihood == "bernoulli":
        return _likelihood.binary(x, outputs[0])
    if likelihood == "discretized_logistic" and bins is not None:
        return _likelihood.levels(x, bins, *outputs)
    of_counts = likelihood.endswith("negative_binomial")
    return (_likelihood.counts if of_counts else _likelihood.real)(x, *outputs)


def _one_width(
    event: Sequence[Tensor | None], latents: Sequence[Tensor | None], name: str
) -> tuple[Tensor | None, ...]:
    """The tensors of the event in one dtype, then those of the latent, of which `name` is the first; if either are
    fp64, both are."""
    event = _promoted(event)
    first, of_latent = event[0], latents[0]
    assert first is not None and of_latent is not None
    if of_latent.device != first.device:
        raise ValueError(f"{name}: got device {of_latent.device}, expected {first.device} as the decoder's outputs")
    if (first.dtype == torch.float64) != (of_latent.dtype == torch.float64):
        return tuple(None if t is None else t.double() for t in (*event, *latents))
    return *event, *latents


def _to_be_made(op: FusedOp, tensors: Sequence[Tensor | None]) -> int:
    """The mask of the gradients to be made with the loss: all that are wanted. None of 16-bit tensors: they would be
    rounded before a loss scale, which keeps them above fp16's smallest number, is multiplied in."""
    mask = 0
    if torch.is_grad_enabled():
        for bit, i in enumerate(op.differentiable):
            t = tensors[i]
            if t is not None and t.requires_grad:
                if t.element_size() == 2:
                    return 0
                mask |= 1 << bit
    return mask


# ---- compositions ----------------------------------------------------------------------------------------------------


def log_prob(
    likelihood: str, parameters: Mapping[str, Tensor], x: Tensor, event_ndims: int, options: Mapping[str, Any] | None
) -> Tensor:
    """Rows of `<likelihood>_log_prob`."""
    given = dict(parameters)
    if likelihood == "gaussian" and len(given) == 1:
        given["logvar"] = given["mean"].new_zeros(())
    log_prob: Callable[..., Tensor] = getattr(_likelihood, f"{likelihood}_log_prob")
    return log_prob(x=x, **given, event_ndims=event_ndims, **(options or {}))


def _log_likelihood(
    likelihood: str,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    z: Tensor,
    gaussians: Sequence[Tensor | None],
    dim: int,
    event_ndims: int,
    options: Mapping[str, Any] | None,
) -> tuple[Tensor, list[Any]]:
    """log p(x | z) of every sample, with z and the Gaussians' parameters as `_latents` gives them."""
    _same_event(likelihood, parameters, x, dim, options)
    rows = list(x.shape[: x.dim() - event_ndims])
    rows.insert(dim, z.size(dim))
    latents = _latents(z, gaussians, torch.Size(rows), dim)
    return log_prob(likelihood, parameters, x.unsqueeze(dim), event_ndims, options), latents


def _composed(
    of_x: Tensor,
    z: Tensor,
    gaussians: Sequence[Tensor | None],
    dim: int,
    groups: int,
    power: float,
    elbo_weight: float,
    scale: float,
    reduction: str,
) -> MultiSampleBound:
    """What the kernel does in one pass, by those of its parts."""
    zero = z.new_zeros(())
    wide = [zero if g is None else g.unsqueeze(dim) for g in gaussians]
    kl = divergence.gaussian_kl_monte_carlo(
        z, *wide, event_ndims=z.dim() - of_x.dim(), reduction="none"
    )  # fmt: skip
    log_w = of_x - kl
    grouped = log_w.unflatten(dim, (groups, log_w.size(dim) // groups))
    rows = _ops.power_bound_loss((grouped,), dim + 1, power, elbo_weight, 1.0, "none").mean(dim)
    weighted = power_weights(grouped.detach(), dim + 1, power)
    ess = _ops.effective_sample_size((weighted,), dim + 1).mean(dim)
    return MultiSampleBound(reduce_rows(rows, reduction, scale), log_w, rows.detach(), ess)
