"""One stateless `nn.Module` for each function: the options at construction, the tensors at the call.

Options are checked where they meet the tensors, at the call.
"""

from typing import Any

from torch import Generator, Tensor, nn

from unigen_fast import adversarial, divergence, importance, likelihood


class _Loss(nn.Module):
    """Holds the options, and shows them in its repr."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LogMeanExp(_Loss):
    """`log_mean_exp(log_w, dim=dim)`."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.log_mean_exp(log_w, **self.options)


class ImportanceWeights(_Loss):
    """`importance_weights(log_w, dim=dim, …)`."""

    def __init__(self, *, dim: int, temperature: float = 1.0, detach: bool = True) -> None:
        super().__init__(dim=dim, temperature=temperature, detach=detach)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.importance_weights(log_w, **self.options)


class EffectiveSampleSize(_Loss):
    """`effective_sample_size(log_w, dim=dim)`."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.effective_sample_size(log_w, **self.options)


class IWAELoss(_Loss):
    """`iwae_loss(log_w, dim=dim, …)`."""

    def __init__(self, *, dim: int, reduction: str = "mean", value: str = "bound") -> None:
        super().__init__(dim=dim, reduction=reduction, value=value)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.iwae_loss(log_w, **self.options)


class DiscriminatorLoss(_Loss):
    """`discriminator_loss(real=real, fake=fake, …)`."""

    def __init__(
        self, *, kind: str = "logistic", reduction: str = "mean", scale: float = 1.0, return_stats: bool = False
    ) -> None:
        super().__init__(kind=kind, reduction=reduction, scale=scale, return_stats=return_stats)

    def forward(
        self, *, real: adversarial.Logits, fake: adversarial.Logits
    ) -> Tensor | tuple[Tensor, adversarial.DiscriminatorStats]:
        return adversarial.discriminator_loss(real=real, fake=fake, **self.options)


class GeneratorLoss(_Loss):
    """`generator_loss(fake=fake, real=real, …)`."""

    def __init__(self, *, kind: str = "non_saturating", reduction: str = "mean", scale: float = 1.0) -> None:
        super().__init__(kind=kind, reduction=reduction, scale=scale)

    def forward(self, *, fake: adversarial.Logits, real: adversarial.Logits | None = None) -> Tensor:
        return adversarial.generator_loss(fake=fake, real=real, **self.options)


class ImportanceWeightedGeneratorLoss(_Loss):
    """`importance_weighted_generator_loss(fake=fake, groups=groups, …)`: the generator loss of IWGAN."""

    def __init__(
        self, *, dim: int | None = None, temperature: float = 1.0, detach: bool = True, reduction: str = "mean"
    ) -> None:
        super().__init__(dim=dim, temperature=temperature, detach=detach, reduction=reduction)

    def forward(self, *, fake: Tensor, groups: Tensor | None = None) -> Tensor:
        return adversarial.importance_weighted_generator_loss(fake=fake, groups=groups, **self.options)


class LogDiscriminator(_Loss):
    """`log_discriminator(logits, y, …)`."""

    def __init__(self, *, reversed: bool = False) -> None:
        super().__init__(reversed=reversed)

    def forward(self, logits: Tensor, y: int | Tensor) -> Tensor:
        return adversarial.log_discriminator(logits, y, **self.options)


class LogRatio(_Loss):
    """`log_ratio(logits, y=y, …)`."""

    def __init__(self, *, reversed: bool = False) -> None:
        super().__init__(reversed=reversed)

    def forward(self, logits: Tensor, *, y: int | Tensor | tuple[int, int] = 1) -> Tensor:
        return adversarial.log_ratio(logits, y=y, **self.options)


class GaussianKL(_Loss):
    """`gaussian_kl(mean, logvar, prior_mean, prior_logvar, weights=weights, …)`."""

    def __init__(
        self,
        *,
        event_ndims: int = 1,
        spread: str = "logvar",
        free_bits: float = 0.0,
        free_bits_mode: str = "sum",
        clamp_logvar: tuple[float, float] | None = None,
        normalize_weights: bool = False,
        scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            event_ndims=event_ndims,
            spread=spread,
            free_bits=free_bits,
            free_bits_mode=free_bits_mode,
            clamp_logvar=clamp_logvar,
            normalize_weights=normalize_weights,
            scale=scale,
            reduction=reduction,
        )

    def forward(
        self,
        mean: Tensor,
        logvar: Tensor,
        prior_mean: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        return divergence.gaussian_kl(mean, logvar, prior_mean, prior_logvar, weights=weights, **self.options)


class GaussianKLMonteCarlo(_Loss):
    """`gaussian_kl_monte_carlo(z, mean, logvar, prior_mean, prior_logvar, weights=weights, …)`."""

    def __init__(
        self,
        *,
        event_ndims: int = 1,
        spread: str = "logvar",
        clamp_logvar: tuple[float, float] | None = None,
        normalize_weights: bool = False,
        scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            event_ndims=event_ndims,
            spread=spread,
            clamp_logvar=clamp_logvar,
            normalize_weights=normalize_weights,
            scale=scale,
            reduction=reduction,
        )

    def forward(
        self,
        z: Tensor,
        mean: Tensor | None,
        logvar: Tensor,
        prior_mean: Tensor,
        prior_logvar: Tensor,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        return divergence.gaussian_kl_monte_carlo(
            z, mean, logvar, prior_mean, prior_logvar, weights=weights, **self.options
        )


class BernoulliKL(_Loss):
    """`bernoulli_kl(logits_q, logits_p, weights=weights, …)`."""

    def __init__(
        self,
        *,
        event_ndims: int = 1,
        normalize_weights: bool = False,
        scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(event_ndims=event_ndims, normalize_weights=normalize_weights, scale=scale, reduction=reduction)

    def forward(self, logits_q: Tensor, logits_p: Tensor | None = None, *, weights: Tensor | None = None) -> Tensor:
        return divergence.bernoulli_kl(logits_q, logits_p, weights=weights, **self.options)


class SampleGaussian(_Loss):
    """`sample_gaussian(mean, logvar, generator=generator, …)`."""

    def __init__(
        self,
        *,
        num_samples: int | None = None,
        sample_dim: int = 0,
        spread: str = "logvar",
        clamp_logvar: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(num_samples=num_samples, sample_dim=sample_dim, spread=spread, clamp_logvar=clamp_logvar)

    def forward(self, mean: Tensor, logvar: Tensor, *, generator: Generator | None = None) -> Tensor:
        return divergence.sample_gaussian(mean, logvar, generator=generator, **self.options)


class SampleGaussianWithKL(_Loss):
    """`sample_gaussian_with_kl(mean, logvar, generator=generator, …)`."""

    def __init__(
        self,
        *,
        num_samples: int | None = None,
        sample_dim: int = 0,
        event_ndims: int = 1,
        spread: str = "logvar",
        clamp_logvar: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(
            num_samples=num_samples,
            sample_dim=sample_dim,
            event_ndims=event_ndims,
            spread=spread,
            clamp_logvar=clamp_logvar,
        )

    def forward(self, mean: Tensor, logvar: Tensor, *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        return divergence.sample_gaussian_with_kl(mean, logvar, generator=generator, **self.options)


class BernoulliLogProb(_Loss):
    """`bernoulli_log_prob(logits, x, event_ndims=event_ndims)`."""

    def __init__(self, *, event_ndims: int = 1) -> None:
        super().__init__(event_ndims=event_ndims)

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        return likelihood.bernoulli_log_prob(logits, x, **self.options)


class GaussianLogProb(_Loss):
    """`gaussian_log_prob(x, mean, logvar, …)`."""

    def __init__(
        self,
        *,
        event_ndims: int = 1,
        spread: str = "logvar",
        clamp_logvar: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(event_ndims=event_ndims, spread=spread, clamp_logvar=clamp_logvar)

    def forward(self, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        return likelihood.gaussian_log_prob(x, mean, logvar, **self.options)


class LaplaceLogProb(_Loss):
    """`laplace_log_prob(x, mean, log_scale, event_ndims=event_ndims)`."""

    def __init__(self, *, event_ndims: int = 1) -> None:
        super().__init__(event_ndims=event_ndims)

    def forward(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        return likelihood.laplace_log_prob(x, mean, log_scale, **self.options)


class DiscretizedLogisticLogProb(_Loss):
    """`discretized_logistic_log_prob(x, mean, log_scale, …)`."""

    def __init__(
        self, *, event_ndims: int = 1, bin_width: float = 2 / 255, low: float = -1.0, high: float = 1.0
    ) -> None:
        super().__init__(event_ndims=event_ndims, bin_width=bin_width, low=low, high=high)

    def forward(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        return likelihood.discretized_logistic_log_prob(x, mean, log_scale, **self.options)


class NegativeBinomialLogProb(_Loss):
    """`negative_binomial_log_prob(x, mu, theta, event_ndims=event_ndims)`."""

    def __init__(self, *, event_ndims: int = 1) -> None:
        super().__init__(event_ndims=event_ndims)

    def forward(self, x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        return likelihood.negative_binomial_log_prob(x, mu, theta, **self.options)


class ZeroInflatedNegativeBinomialLogProb(_Loss):
    """`zero_inflated_negative_binomial_log_prob(x, mu, theta, gate_logits, event_ndims=event_ndims)`."""

    def __init__(self, *, event_ndims: int = 1) -> None:
        super().__init__(event_ndims=event_ndims)

    def forward(self, x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor) -> Tensor:
        return likelihood.zero_inflated_negative_binomial_log_prob(x, mu, theta, gate_logits, **self.options)
