"""Means and samples of p(x | z), from what the decoder gives: the parameters of `<likelihood>_log_prob`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unigen_fast import _checks, objectives
from unigen_fast import likelihood as _likelihood
from unigen_fast.divergence import sample_gaussian
from unigen_fast.likelihood import logistic_bins


class _Sampler(NamedTuple):
    """Both take the parameters in fp32 or fp64, of one shape, and the options of `<likelihood>_log_prob`."""

    mean: Callable[..., Tensor]
    draw: Callable[..., Tensor]
    integers: bool = False  # whether what is drawn is


def _uniform(like: Tensor) -> Tensor:
    """Numbers in (0, 1): `rand` gives 0 too, at which quantiles are infinite."""
    u = torch.rand_like(like)  # multiples of eps / 2
    eps = torch.finfo(u.dtype).eps
    return u.clamp(eps / 4, 1 - eps / 2)


def _gaussian(
    mean: Tensor,
    logvar: Tensor | None = None,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
) -> Tensor:
    if logvar is None:
        logvar = torch.zeros_like(mean)
        spread, clamp_logvar = "logvar", None
    return sample_gaussian(mean, logvar, spread=spread, clamp_logvar=clamp_logvar)


def _laplace(mean: Tensor, log_scale: Tensor) -> Tensor:
    v = _uniform(mean) - 0.5
    return mean - log_scale.exp() * v.sign() * torch.log1p(-2 * v.abs())


def _discretized_logistic(mean: Tensor, log_scale: Tensor, **options: float) -> Tensor:
    """Rounded to the nearest bin, as the likelihood's bins are; the outermost hold the tails."""
    return _binned(mean + log_scale.exp() * _uniform(mean).logit(), **options)


def _binned(x: Tensor, **options: float) -> Tensor:
    half_width, low, high = logistic_bins(**options)
    return (((x - low) / (2 * half_width)).round() * (2 * half_width) + low).clamp(low, high)


def _discretized_logistic_mean(mean: Tensor, log_scale: Tensor, **options: float) -> Tensor:
    """That of the logistic whose tails are put at the extreme levels, to within the rounding to bins."""
    _, low, high = logistic_bins(**options)
    scale = log_scale.exp().clamp(min=1e-30)
    of_low, of_high, width = (mean - low) / scale, (mean - high) / scale, (high - low) / scale
    # scale times the integral of sigma from of_high to of_low, without cancellation where the scale is wide
    wide = torch.log1p(torch.expm1(width) * of_high.sigmoid())
    return low + scale * torch.where(width < 1, wide, F.softplus(of_low) - F.softplus(of_high))


def _negative_binomial(mu: Tensor, theta: Tensor, eps: float = 0.0) -> Tensor:
    """A Poisson of a rate drawn from the Gamma of shape theta and mean mu + eps, as the likelihood has it."""
    gamma = torch.distributions.Gamma(theta, torch.ones_like(theta), validate_args=False).sample()
    rate = gamma * ((mu + eps) / theta)
    most = 2.0**30  # PyTorch's draws of larger rates overflow; beside the rate their spread is nothing
    return torch.where(rate > most, rate, torch.poisson(rate.clamp(max=most)))


def _zero_inflated(mu: Tensor, theta: Tensor, gate_logits: Tensor, eps: float = 0.0) -> Tensor:
    counts = _negative_binomial(mu, theta, eps)
    return torch.where(torch.bernoulli(gate_logits.sigmoid()) == 1, 0.0, counts)


def _categorical(logits: Tensor, class_dim: int = -1) -> Tensor:
    """By the largest of logits with Gumbel noise."""
    return (logits - (-_uniform(logits).log()).log()).argmax(class_dim)


def _components(params: Tensor, channels: int) -> tuple[Tensor, ...]:
    """Of a mixture `[…, P]`: logits `[…, M]`, and means, log-scales `[…, C, M]`, with three channels coefficients."""
    components = params.size(-1) // (10 if channels == 3 else 3)
    logits, rest = params[..., :components], params[..., components:].unflatten(-1, (channels, -1, components))
    means, log_scales, *coefficients = rest.unbind(-2)
    log_scales = log_scales.clamp(min=-7.0)  # as the likelihood does
    return logits, means, log_scales, *(c.tanh() for c in coefficients)


def _mixture(params: Tensor, channels: int) -> Tensor:
    """One component for each pixel; its channels one after the other, as each depends on those before."""
    logits, *of_components = _components(params, channels)
    chosen = _categorical(logits)[..., None, None].expand(*logits.shape[:-1], channels, 1)
    mean, log_scale, *c = (t.gather(-1, chosen).squeeze(-1) for t in of_components)
    undone = mean + log_scale.exp() * _uniform(mean).logit()
    return _in_turn(undone, c, lambda x, _: _binned(x))


def _mixture_mean(params: Tensor, channels: int) -> Tensor:
    """That of each component, given the means of the channels before."""
    logits, means, log_scales, *c = _components(params, channels)
    of_components = _in_turn(
        means.movedim(-2, -1),
        [t.movedim(-2, -1) for t in c],
        lambda mean, channel: _discretized_logistic_mean(mean, log_scales[..., channel, :]),
    )
    return (of_components * logits.softmax(-1).unsqueeze(-1)).sum(-2)


def _in_turn(x: Tensor, coefficients: list[Tensor], of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The channels, in the last dimension: of green as the coefficients of red move it, of blue as both do."""
    found = [of(x[..., 0], 0)]
    if coefficients:
        (c,) = coefficients
        found.append(of(x[..., 1] + c[..., 0] * found[0], 1))
        found.append(of(x[..., 2] + c[..., 1] * found[0] + c[..., 2] * found[1], 2))
    return torch.stack(found, -1)


_SAMPLERS = {
    "bernoulli": _Sampler(torch.sigmoid, lambda logits: torch.bernoulli(logits.sigmoid()), integers=True),
    "gaussian": _Sampler(lambda mean, *_, **options: mean, _gaussian),
    "laplace": _Sampler(lambda mean, log_scale: mean, _laplace),
    "discretized_logistic": _Sampler(_discretized_logistic_mean, _discretized_logistic),
    "negative_binomial": _Sampler(lambda mu, theta, eps=0.0: mu + eps, _negative_binomial, integers=True),
    "zero_inflated_negative_binomial": _Sampler(
        lambda mu, theta, gate_logits, eps=0.0: (mu + eps) * (-gate_logits).sigmoid(), _zero_inflated, integers=True
    ),
    "categorical": _Sampler(lambda logits, class_dim=-1: logits.argmax(class_dim), _categorical, integers=True),
    "discretized_logistic_mixture": _Sampler(_mixture_mean, _mixture),
}


class Likelihood:
    """p(x | z) of one name: its rows of log p(x | z), mean and samples, from what the decoder gives.

    Args:
        name: of `objectives.LIKELIHOODS`.
        options: of `<name>_log_prob`. A logistic mixture has one of its own, `channels` of x, 1 or 3: needed by samples
            alone, and by them where as many parameters may be either's (multiples of 30).

    Raises:
        ValueError: an unknown likelihood or option, a value that the option does not take.
        TypeError: a value of another type.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None) -> None:
        self.name = _checks.choice("likelihood", name, objectives.LIKELIHOODS)
        self.options = dict(options or {})
        takes = inspect.signature(getattr(_likelihood, f"{name}_log_prob")).parameters
        known = [key for key in takes if key not in ("x", "event_ndims", *objectives.LIKELIHOODS[name])]
        if name == "discretized_logistic_mixture":
            known.append("channels")
        for key in self.options:
            if not known:
                raise ValueError(f"likelihood_options: got {key!r}, expected none for likelihood {name!r}")
            _checks.choice("likelihood_options", key, known)
        self.channels = self.options.pop("channels", None)
        if self.channels not in (None, 1, 3):
            raise ValueError(f"likelihood_options: got channels {self.channels!r}, expected 1 or 3")
        if self.options:  # what their values should be says the function that takes them
            number = torch.zeros((1,) * 8, device="cpu")
            x = number.to(torch.int64)[0] if name == "categorical" else number
            parameters = dict.fromkeys(objectives.LIKELIHOODS[name], number)
            objectives.log_prob(name, parameters, x, 0, self.options)

    def of_samples(self) -> "Likelihood":
        """The same of decoders whose outputs have a second dimension, that of samples."""
        class_dim = self.options.get("class_dim", -1)
        return Likelihood(self.name, self.options | {"class_dim": class_dim + 1}) if class_dim > 0 else self

    def log_prob(self, decoder: objectives.Decoder, x: Tensor, *, event_ndims: int | None = None) -> Tensor:
        """Nats; all dimensions of x but the first are one event, unless told otherwise."""
        parameters = objectives.decoder_parameters(self.name, decoder)
        event_ndims = x.dim() - 1 if event_ndims is None else event_ndims
        return objectives.log_prob(self.name, parameters, x, event_ndims, self.options)

    def sample(self, decoder: objectives.Decoder, *, mean: bool = False, like: Tensor | None = None) -> Tensor:
        """x ~ p(x | z); or E[x | z], of classes the most probable. Drawn in fp32, of fp64 in fp64.

        Args:
            decoder: what it gave.
            mean: E[x | z] instead.
            like: data that the samples are to resemble: checked to be of their shape, and given their dtype.

        Raises:
            ValueError: parameters that do not fit together; samples of another shape than the data's, or not of whole
                numbers where the data are; a mixture of which the number of channels is unknown.
        """
        found, options = _SAMPLERS[self.name], dict(self.options)
        given = objectives.decoder_parameters(self.name, decoder)
        first, *others = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in given.values())
        names = list(given)
        for name, t in zip(names[1:], others, strict=True):
            if t.dim() > first.dim() or any(
                n not in (1, m) for n, m in zip(t.shape[::-1], first.shape[::-1], strict=False)
            ):
                raise ValueError(
                    f"decoder's {name}: got shape {tuple(t.shape)}, expected {tuple(first.shape)} as {names[0]}"
                )
        if self.name == "discretized_logistic_mixture":
            options["channels"] = self._channels(first, like)
        drawn = (found.mean if mean else found.draw)(first, *(t.expand_as(first) for t in others), **options)
        whole = found.integers and not (mean and drawn.is_floating_point())
        return drawn if like is None else self._as(like, drawn, whole)

    def _as(self, like: Tensor, drawn: Tensor, whole: bool) -> Tensor:
        if drawn.shape != like.shape:
            raise ValueError(
                f"decoder: got samples of shape {tuple(drawn.shape)}, expected {tuple(like.shape)}, that of the batch"
            )
        if not (whole or like.is_floating_point()):
            raise ValueError(
                f"batch: got {like.dtype}, expected floating-point data: what {self.name!r} gives are no whole numbers"
            )
        if like.dtype not in (drawn.dtype, torch.bool):  # counts may be larger than any of the data's kind
            limits = torch.finfo(like.dtype) if like.is_floating_point() else torch.iinfo(like.dtype)
            drawn = drawn.clamp(max(limits.min, -(2**62)), min(limits.max, 2**62))
        return drawn.to(like.dtype)

    def _channels(self, params: Tensor, like: Tensor | None) -> int:
        if like is not None and self.channels in (None, like.size(-1)):
            return like.size(-1)
        of_one, of_three = (params.size(-1) % n == 0 for n in (3, 10))
        if self.channels is None and of_one == of_three:
            raise ValueError(
                f"decoder's params: got {params.size(-1)} for each pixel, expected a multiple of 3 for one channel or "
                "of 10 for three; of both only with likelihood_options={'channels': 1} or 3"
            )
        return self.channels or (1 if of_one else 3)
