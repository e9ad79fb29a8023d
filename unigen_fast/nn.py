"""One stateless `nn.Module` for each function: the options at construction, the tensors at the call.

Options are checked where they meet the tensors, at the call.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Generator, Tensor, nn

from unigen_fast import adversarial, divergence, importance, likelihood, objectives


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


class WeightDiagnostics(_Loss):
    """`weight_diagnostics(log_w, dim=dim)`."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)

    def forward(self, log_w: Tensor) -> importance.WeightDiagnostics:
        return importance.weight_diagnostics(log_w, **self.options)


class ImportanceWeightedSum(_Loss):
    """`importance_weighted_sum(log_w, payload, dim=dim, …)`."""

    def __init__(self, *, dim: int, temperature: float = 1.0, detach: bool = True) -> None:
        super().__init__(dim=dim, temperature=temperature, detach=detach)

    def forward(self, log_w: Tensor, payload: Tensor) -> Tensor:
        return importance.importance_weighted_sum(log_w, payload, **self.options)


class MIWAELoss(_Loss):
    """`miwae_loss(log_w, sample_dim=sample_dim, group_dim=group_dim, …)`."""

    def __init__(self, *, sample_dim: int, group_dim: int, reduction: str = "mean") -> None:
        super().__init__(sample_dim=sample_dim, group_dim=group_dim, reduction=reduction)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.miwae_loss(log_w, **self.options)


class PIWAELosses(_Loss):
    """`piwae_losses(log_w, sample_dim=sample_dim, group_dim=group_dim, …)`."""

    def __init__(self, *, sample_dim: int, group_dim: int, reduction: str = "mean") -> None:
        super().__init__(sample_dim=sample_dim, group_dim=group_dim, reduction=reduction)

    def forward(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        return importance.piwae_losses(log_w, **self.options)


class CIWAELoss(_Loss):
    """`ciwae_loss(log_w, dim=dim, beta=beta, …)`."""

    def __init__(self, *, dim: int, beta: float, reduction: str = "mean") -> None:
        super().__init__(dim=dim, beta=beta, reduction=reduction)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.ciwae_loss(log_w, **self.options)


class RenyiLoss(_Loss):
    """`renyi_loss(log_w, dim=dim, alpha=alpha, …)`."""

    def __init__(self, *, dim: int, alpha: float, reduction: str = "mean") -> None:
        super().__init__(dim=dim, alpha=alpha, reduction=reduction)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.renyi_loss(log_w, **self.options)


class CUBOLoss(_Loss):
    """`cubo_loss(log_w, dim=dim, …)`."""

    def __init__(self, *, dim: int, order: float = 2.0, reduction: str = "mean") -> None:
        super().__init__(dim=dim, order=order, reduction=reduction)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.cubo_loss(log_w, **self.options)


class TVOLoss(_Loss):
    """`tvo_loss(log_w, dim=dim, partition=partition, log_q=log_q, …)`."""

    def __init__(self, *, dim: int, partition: Sequence[float], reduction: str = "mean") -> None:
        super().__init__(dim=dim, partition=partition, reduction=reduction)

    def forward(self, log_w: Tensor, *, log_q: Tensor | None = None) -> Tensor:
        return importance.tvo_loss(log_w, log_q=log_q, **self.options)


class VIMCOLoss(_Loss):
    """`vimco_loss(log_w, log_q, dim=dim, …)`."""

    def __init__(self, *, dim: int, reduction: str = "mean") -> None:
        super().__init__(dim=dim, reduction=reduction)

    def forward(self, log_w: Tensor, log_q: Tensor) -> Tensor:
        return importance.vimco_loss(log_w, log_q, **self.options)


class RWSLosses(_Loss):
    """`rws_losses(log_p, log_q, dim=dim, …)`."""

    def __init__(self, *, dim: int, reduction: str = "mean") -> None:
        super().__init__(dim=dim, reduction=reduction)

    def forward(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return importance.rws_losses(log_p, log_q, **self.options)


class DReGLoss(_Loss):
    """`dreg_loss(log_w, z, dim=dim, …)`."""

    def __init__(self, *, dim: int, reduction: str = "mean") -> None:
        super().__init__(dim=dim, reduction=reduction)

    def forward(self, log_w: Tensor, z: Tensor) -> Tensor:
        return importance.dreg_loss(log_w, z, **self.options)


class LogVarianceLoss(_Loss):
    """`log_variance_loss(log_w, dim=dim, …)`."""

    def __init__(self, *, dim: int, reduction: str = "mean") -> None:
        super().__init__(dim=dim, reduction=reduction)

    def forward(self, log_w: Tensor) -> Tensor:
        return importance.log_variance_loss(log_w, **self.options)


class TrajectoryBalanceLoss(_Loss):
    """`trajectory_balance_loss(log_w, log_z, …)`."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)

    def forward(self, log_w: Tensor, log_z: Tensor) -> Tensor:
        return importance.trajectory_balance_loss(log_w, log_z, **self.options)


class MemorizationScore(_Loss):
    """`memorization_score(log_px_in, log_px_out, dim=dim)`, or with `included` instead of `log_px_out`."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)

    def forward(self, log_px_in: Tensor, log_px_out: Tensor | None = None, *, included: Tensor | None = None) -> Tensor:
        return importance.memorization_score(log_px_in, log_px_out, included=included, **self.options)


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


class DensityRatioKL(_Loss):
    """`density_ratio_kl(logits, …)`."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)

    def forward(self, logits: Tensor) -> Tensor:
        return adversarial.density_ratio_kl(logits, **self.options)


class DensityRatioJS(_Loss):
    """`density_ratio_js(real=real, fake=fake)`."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, *, real: adversarial.Logits, fake: adversarial.Logits) -> Tensor:
        return adversarial.density_ratio_js(real=real, fake=fake)


class R1Penalty(_Loss):
    """`r1_penalty(logits=logits, inputs=inputs, …)`."""

    def __init__(self, *, gamma: float = 10.0, reduction: str = "mean") -> None:
        super().__init__(gamma=gamma, reduction=reduction)

    def forward(self, *, logits: Tensor, inputs: Tensor) -> Tensor:
        return adversarial.r1_penalty(logits=logits, inputs=inputs, **self.options)


class GradientPenalty(_Loss):
    """`gradient_penalty(discriminator=discriminator, real=real, fake=fake, …)`."""

    def __init__(self, *, weight: float = 10.0, target: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(weight=weight, target=target, reduction=reduction)

    def forward(
        self,
        *,
        discriminator: Callable[[Tensor], Tensor],
        real: Tensor,
        fake: Tensor,
        generator: Generator | None = None,
    ) -> Tensor:
        options = {"discriminator": discriminator, "real": real, "fake": fake, "generator": generator, **self.options}
        return adversarial.gradient_penalty(**options)


class GaussianKL(_Loss):
    """`gaussian_kl(mean, logvar, prior_mean, prior_logvar, weights=weights, …)`."""

    def __init__(
        self,
        *,
        event_ndims: int | None = None,
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
        event_ndims: int | None = None,
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
        event_ndims: int | None = None,
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
        event_ndims: int | None = None,
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


class TotalCorrelation(_Loss):
    """`total_correlation(z, mean, logvar, dataset_size=dataset_size, …)`."""

    def __init__(self, *, dataset_size: int, estimator: str = "mss") -> None:
        super().__init__(dataset_size=dataset_size, estimator=estimator)

    def forward(self, z: Tensor, mean: Tensor, logvar: Tensor) -> divergence.TotalCorrelation:
        return divergence.total_correlation(z, mean, logvar, **self.options)


class MMD(_Loss):
    """`mmd(x, y, …)`."""

    def __init__(
        self,
        *,
        kernel: str = "imq",
        scales: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
        unbiased: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scales=scales, unbiased=unbiased)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return divergence.mmd(x, y, **self.options)


class BernoulliLogProb(_Loss):
    """`bernoulli_log_prob(logits, x, event_ndims=event_ndims)`."""

    def __init__(self, *, event_ndims: int | None = None) -> None:
        super().__init__(event_ndims=event_ndims)

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        return likelihood.bernoulli_log_prob(logits, x, **self.options)


class GaussianLogProb(_Loss):
    """`gaussian_log_prob(x, mean, logvar, …)`."""

    def __init__(
        self,
        *,
        event_ndims: int | None = None,
        spread: str = "logvar",
        clamp_logvar: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(event_ndims=event_ndims, spread=spread, clamp_logvar=clamp_logvar)

    def forward(self, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        return likelihood.gaussian_log_prob(x, mean, logvar, **self.options)


class LaplaceLogProb(_Loss):
    """`laplace_log_prob(x, mean, log_scale, event_ndims=event_ndims)`."""

    def __init__(self, *, event_ndims: int | None = None) -> None:
        super().__init__(event_ndims=event_ndims)

    def forward(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        return likelihood.laplace_log_prob(x, mean, log_scale, **self.options)


class DiscretizedLogisticLogProb(_Loss):
    """`discretized_logistic_log_prob(x, mean, log_scale, …)`."""

    def __init__(
        self, *, event_ndims: int | None = None, bin_width: float = 2 / 255, low: float = -1.0, high: float = 1.0
    ) -> None:
        super().__init__(event_ndims=event_ndims, bin_width=bin_width, low=low, high=high)

    def forward(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        return likelihood.discretized_logistic_log_prob(x, mean, log_scale, **self.options)


class NegativeBinomialLogProb(_Loss):
    """`negative_binomial_log_prob(x, mu, theta, …)`."""

    def __init__(self, *, event_ndims: int | None = None, eps: float = 0.0) -> None:
        super().__init__(event_ndims=event_ndims, eps=eps)

    def forward(self, x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        return likelihood.negative_binomial_log_prob(x, mu, theta, **self.options)


class ZeroInflatedNegativeBinomialLogProb(_Loss):
    """`zero_inflated_negative_binomial_log_prob(x, mu, theta, gate_logits, …)`."""

    def __init__(self, *, event_ndims: int | None = None, eps: float = 0.0) -> None:
        super().__init__(event_ndims=event_ndims, eps=eps)

    def forward(self, x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor) -> Tensor:
        return likelihood.zero_inflated_negative_binomial_log_prob(x, mu, theta, gate_logits, **self.options)


class CategoricalKL(_Loss):
    """`categorical_kl(logits_q, logits_p, weights=weights, …)`."""

    def __init__(
        self,
        *,
        class_dim: int = -1,
        event_ndims: int = 0,
        unimix: float = 0.0,
        normalize_weights: bool = False,
        scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            class_dim=class_dim,
            event_ndims=event_ndims,
            unimix=unimix,
            normalize_weights=normalize_weights,
            scale=scale,
            reduction=reduction,
        )

    def forward(self, logits_q: Tensor, logits_p: Tensor | None = None, *, weights: Tensor | None = None) -> Tensor:
        return divergence.categorical_kl(logits_q, logits_p, weights=weights, **self.options)


class BalancedCategoricalKL(_Loss):
    """`balanced_categorical_kl(posterior_logits, prior_logits, …)`."""

    def __init__(
        self,
        *,
        event_ndims: int = 1,
        free_nats: float = 1.0,
        free_nats_mode: str = "sum",
        unimix: float = 0.0,
        dynamics_scale: float = 1.0,
        representation_scale: float = 0.1,
    ) -> None:
        super().__init__(
            event_ndims=event_ndims,
            free_nats=free_nats,
            free_nats_mode=free_nats_mode,
            unimix=unimix,
            dynamics_scale=dynamics_scale,
            representation_scale=representation_scale,
        )

    def forward(self, posterior_logits: Tensor, prior_logits: Tensor) -> divergence.BalancedKL:
        return divergence.balanced_categorical_kl(posterior_logits, prior_logits, **self.options)


class CategoricalLogProb(_Loss):
    """`categorical_log_prob(logits, x, …)`."""

    def __init__(self, *, class_dim: int = -1, event_ndims: int = 0, ignore_index: int = -100) -> None:
        super().__init__(class_dim=class_dim, event_ndims=event_ndims, ignore_index=ignore_index)

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        return likelihood.categorical_log_prob(logits, x, **self.options)


class DiscretizedLogisticMixtureLogProb(_Loss):
    """`discretized_logistic_mixture_log_prob(params, x, event_ndims=event_ndims)`."""

    def __init__(self, *, event_ndims: int = 3) -> None:
        super().__init__(event_ndims=event_ndims)

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        return likelihood.discretized_logistic_mixture_log_prob(params, x, **self.options)


class ELBOLoss(_Loss):
    """`elbo_loss(decoder, x, mean, logvar, prior_mean=prior_mean, prior_logvar=prior_logvar, weights=weights, …)`."""

    def __init__(
        self,
        *,
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        event_ndims: int | None = None,
        kl_weight: float = 1.0,
        spread: str = "logvar",
        clamp_logvar: tuple[float, float] | None = None,
        normalize_weights: bool = False,
        scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            likelihood=likelihood,
            likelihood_options=likelihood_options,
            event_ndims=event_ndims,
            kl_weight=kl_weight,
            spread=spread,
            clamp_logvar=clamp_logvar,
            normalize_weights=normalize_weights,
            scale=scale,
            reduction=reduction,
        )

    def forward(
        self,
        decoder: objectives.Decoder,
        x: Tensor,
        mean: Tensor,
        logvar: Tensor,
        *,
        prior_mean: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> objectives.Bound:
        return objectives.elbo_loss(
            decoder,
            x,
            mean,
            logvar,
            prior_mean=prior_mean,
            prior_logvar=prior_logvar,
            weights=weights,
            **self.options,
        )


class IWAEObjective(_Loss):
    """`iwae_objective(decoder, x, z, mean, logvar, dim=dim, prior_mean=prior_mean, prior_logvar=prior_logvar, …)`."""

    def __init__(
        self,
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
        spread: str = "logvar",
        clamp_logvar: tuple[float, float] | None = None,
        scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            dim=dim,
            likelihood=likelihood,
            likelihood_options=likelihood_options,
            estimator=estimator,
            num_groups=num_groups,
            beta=beta,
            alpha=alpha,
            order=order,
            partition=partition,
            event_ndims=event_ndims,
            spread=spread,
            clamp_logvar=clamp_logvar,
            scale=scale,
            reduction=reduction,
        )

    def forward(
        self,
        decoder: objectives.Decoder,
        x: Tensor,
        z: Tensor,
        mean: Tensor,
        logvar: Tensor,
        *,
        prior_mean: Tensor | None = None,
        prior_logvar: Tensor | None = None,
    ) -> objectives.MultiSampleBound:
        return objectives.iwae_objective(
            decoder, x, z, mean, logvar, prior_mean=prior_mean, prior_logvar=prior_logvar, **self.options
        )


class AdversaryActivatedLoss(_Loss):
    """`adversary_activated_loss(real loss, fake loss, real_logits=real_logits, fake_logits=fake_logits, …)`."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)

    def forward(
        self, per_example_loss_real: Tensor, per_example_loss_fake: Tensor, *, real_logits: Tensor, fake_logits: Tensor
    ) -> Tensor:
        return objectives.adversary_activated_loss(
            per_example_loss_real,
            per_example_loss_fake,
            real_logits=real_logits,
            fake_logits=fake_logits,
            **self.options,
        )


class StreamingLogLikelihood(_Loss):
    """`streaming_log_likelihood(log_w_chunks, dim=dim)`."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)

    def forward(self, log_w_chunks: Iterable[Tensor]) -> Tensor:
        return objectives.streaming_log_likelihood(log_w_chunks, **self.options)
