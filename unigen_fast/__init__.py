"""Fused losses of deep generative models: the same numbers as PyTorch, faster, in less memory, without overflow."""

from unigen_fast import _info, _loader, nn
from unigen_fast._version import __version__
from unigen_fast.adversarial import (
    DiscriminatorStats,
    discriminator_loss,
    generator_loss,
    importance_weighted_generator_loss,
    log_discriminator,
    log_ratio,
)
from unigen_fast.divergence import (
    bernoulli_kl,
    gaussian_kl,
    gaussian_kl_monte_carlo,
    sample_gaussian,
    sample_gaussian_with_kl,
)
from unigen_fast.importance import effective_sample_size, importance_weights, iwae_loss, log_mean_exp
from unigen_fast.likelihood import (
    bernoulli_log_prob,
    discretized_logistic_log_prob,
    gaussian_log_prob,
    laplace_log_prob,
    negative_binomial_log_prob,
    zero_inflated_negative_binomial_log_prob,
)

__all__ = [
    "DiscriminatorStats",
    "bernoulli_kl",
    "bernoulli_log_prob",
    "discretized_logistic_log_prob",
    "discriminator_loss",
    "effective_sample_size",
    "gaussian_kl",
    "gaussian_kl_monte_carlo",
    "gaussian_log_prob",
    "generator_loss",
    "importance_weighted_generator_loss",
    "importance_weights",
    "info",
    "iwae_loss",
    "laplace_log_prob",
    "log_discriminator",
    "log_mean_exp",
    "log_ratio",
    "negative_binomial_log_prob",
    "nn",
    "sample_gaussian",
    "sample_gaussian_with_kl",
    "zero_inflated_negative_binomial_log_prob",
]

_BACKENDS = _loader.load()


def info() -> _info.Info:
    """Versions, device, and which kernels are loaded, with a one-line reason for each set that is not."""
    return _info.collect(__version__, _BACKENDS)
