"""Means and samples of p(x | z), from what the decoder gives: the parameters of `<likelihood>_log_prob`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unigen_fast import _checks, objectives
from unigen_fast.divergence import sample_gaussian
from unigen_fast.likelihood import logistic_bins


class _Sampler(NamedTuple):
    mean: Callable[..., Tensor]
    draw: Callable[..., Tensor]


def _gaussian(
    mean: Tensor,
    logvar: Tensor | None = None,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
) -> Tensor:
    if logvar is None:
        logvar = mean.new_zeros(())
    return sample_gaussian(mean, logvar, spread=spread, clamp_logvar=clamp_logvar)


def _laplace(mean: Tensor, log_scale: Tensor) -> Tensor:
    u = torch.rand_like(mean) - 0.5
    return mean - log_scale.exp() * u.sign() * torch.log1p(-2 * u.abs())


def _discretized_logistic(mean: Tensor, log_scale: Tensor, **options: float) -> Tensor:
    """Rounded to the nearest bin, as the likelihood's bins are; the outermost hold the tails."""
    half_width, low, high = logistic_bins(**options)
    u = torch.rand_like(mean)
    x = mean + log_scale.exp() * (u.log() - torch.log1p(-u))
    return (((x - low) / (2 * half_width)).round() * (2 * half_width) + low).clamp(low, high)


def _negative_binomial(mu: Tensor, theta: Tensor) -> Tensor:
    """A Poisson of a rate drawn from the Gamma of shape theta and mean mu."""
    theta = theta.expand_as(mu)
    return torch.poisson(torch._standard_gamma(theta) * (mu / theta))


def _zero_inflated(mu: Tensor, theta: Tensor, gate_logits: Tensor) -> Tensor:
    return _negative_binomial(mu, theta) * (1 - torch.bernoulli(gate_logits.sigmoid()))


def _categorical(logits: Tensor, class_dim: int = -1) -> Tensor:
    """By the largest of logits with Gumbel noise."""
    noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).argmax(class_dim)


def _most_probable(logits: Tensor, class_dim: int = -1) -> Tensor:
    return logits.argmax(class_dim)


_SAMPLERS = {
    "bernoulli": _Sampler(torch.sigmoid, lambda logits: torch.bernoulli(logits.sigmoid())),
    "gaussian": _Sampler(lambda mean, *_, **options: mean, _gaussian),
    "laplace": _Sampler(lambda mean, log_scale: mean, _laplace),
    "discretized_logistic": _Sampler(lambda mean, log_scale, **options: mean, _discretized_logistic),
    "negative_binomial": _Sampler(lambda mu, theta: mu, _negative_binomial),
    "zero_inflated_negative_binomial": _Sampler(
        lambda mu, theta, gate_logits: mu * (-gate_logits).sigmoid(), _zero_inflated
    ),
    "categorical": _Sampler(_most_probable, _categorical),
}


class Likelihood:
    """p(x | z) of one name: its rows of log p(x | z), mean and samples, from what the decoder gives."""

    def __init__(self, name: str, options: Mapping[str, Any] | None) -> None:
        self.name = _checks.choice("likelihood", name, objectives.LIKELIHOODS)
        self.options = dict(options or {})

    def log_prob(self, decoder: objectives.Decoder, x: Tensor, *, event_ndims: int | None = None) -> Tensor:
        """Nats; all dimensions of x but the first are one event, unless told otherwise."""
        parameters = objectives.decoder_parameters(self.name, decoder)
        event_ndims = x.dim() - 1 if event_ndims is None else event_ndims
        return objectives.log_prob(self.name, parameters, x, event_ndims, self.options)

    def sample(self, decoder: objectives.Decoder, *, mean: bool = False) -> Tensor:
        """x ~ p(x | z); or E[x | z], of classes the most probable."""
        if self.name not in _SAMPLERS:
            raise NotImplementedError(
                f"drawing from p(x | z): got likelihood {self.name!r}, expected one of {', '.join(_SAMPLERS)}"
            )
        found = _SAMPLERS[self.name]
        parameters = objectives.decoder_parameters(self.name, decoder).values()
        return (found.mean if mean else found.draw)(*parameters, **self.options)
