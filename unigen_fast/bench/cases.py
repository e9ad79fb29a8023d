"""The rows of the benchmark: for each, the tensors users have, our call, and the PyTorch code it replaces.

Every eager function is the best form of what the named project writes, with the same result and the same gradients.
Sizes are read off the tensors, so that a row can be run on smaller ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import unigen_fast as uf
from unigen_fast.reference import importance as reference

Draw = Callable[[Tensor, torch.Generator], Any]


def _normal(x: Tensor, generator: torch.Generator) -> None:
    x.normal_(generator=generator)


def _log_weights(x: Tensor, generator: torch.Generator) -> None:
    x.normal_(-90.0, 5.0, generator=generator)


def _pixels(x: Tensor, generator: torch.Generator) -> None:
    x.uniform_(generator=generator)


@dataclass(frozen=True)
class Input:
    """One input tensor: its shape, whether training needs its gradient, and how its values are drawn (in place)."""

    shape: tuple[int, ...]
    gradient: bool = True
    draw: Draw = _normal


@dataclass(frozen=True)
class Row:
    """`fused` and `eager` take the inputs in order and return a tensor or a tuple of them.

    `expected` is eager with the very noise that the fused call draws from the same seed, for rows that draw some. A row
    none of whose inputs has a gradient is timed forward only. `check_first`: how many of each tensor's first indices
    the values are checked on, where eager in float64 would take more memory than a machine has. `trained`: the output
    is the loss of a training step, whose gradient is 1; elsewhere it is random. `copied`: on a CPU, the step is also
    held against one copy of its first input. `memory`: why it takes more than half of the peers', beside its results.
    """

    name: str
    family: str
    replaces: str
    inputs: tuple[Input, ...]
    fused: Callable[..., Any]
    eager: Callable[..., Any]
    expected: Callable[..., Any] | None = None
    check_first: int | None = None
    trained: bool = False
    copied: bool = False
    memory: str = ""


# ---- importance ------------------------------------------------------------------------------------------------------


def _log_mean_exp(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, dim=1) - math.log(log_w.size(1))


def _effective_sample_size(log_w: Tensor) -> Tensor:
    return 1 / torch.softmax(log_w, dim=1).square().sum(1)


_TVO_PARTITION = [i / 10 for i in range(11)]


def _vimco(log_w: Tensor, log_q: Tensor) -> Tensor:
    """O(K): total - e_k + the geometric mean, in PyTorch's operations. The form [B, K, K] of the field is slower."""
    k = log_w.size(1)
    bound = _log_mean_exp(log_w)
    with torch.no_grad():
        maximum = log_w.amax(1, keepdim=True)
        e = (log_w - maximum).exp()
        total = e.sum(1, keepdim=True)
        others = (log_w.sum(1, keepdim=True) - log_w) / (k - 1)
        signal = total.log() - (total - e + (others - maximum).exp()).log()
    return -(bound + (signal * log_q).sum(1)).mean()


def _renyi(log_w: Tensor) -> Tensor:
    return -2 * (torch.logsumexp(0.5 * log_w, dim=1) - math.log(log_w.size(1))).mean()


def _tvo(log_w: Tensor) -> Tensor:
    """[B, K, P], as vmasrani/tvo has it."""
    points = log_w.new_tensor(_TVO_PARTITION)
    weights = torch.softmax(log_w.unsqueeze(-1) * points[:-1], dim=1)
    return -((weights * log_w.unsqueeze(-1)).sum(1) * points.diff()).sum(-1).mean()


def _rws(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    log_w = log_p - log_q.detach()
    weights = torch.softmax(log_w.detach(), dim=1)
    return -_log_mean_exp(log_w).mean(), -(weights * log_q).sum(1).mean()


def _weighted_sum(log_w: Tensor, payload: Tensor) -> Tensor:
    return (torch.softmax(log_w, dim=1) * payload).sum(1)


def _diagnostics(log_w: Tensor) -> tuple[Tensor, ...]:
    log_weights = torch.log_softmax(log_w, dim=1)
    weights = log_weights.exp()
    entropy = -(weights * log_weights).sum(1)
    count = log_w.size(1)
    most = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    pareto_k = reference.pareto_shape(log_w.topk(most + 1, dim=1).values)
    return _log_mean_exp(log_w), 1 / weights.square().sum(1), weights.amax(1), entropy, pareto_k


def _importance(
    name: str,
    shape: tuple[int, int],
    replaces: str,
    fused: Callable[..., Any],
    eager: Callable[..., Any],
    gradient: bool = True,
) -> Row:
    return Row(name, "importance", replaces, (Input(shape, gradient, _log_weights),), fused, eager)


def _importance_rows() -> list[Row]:
    def log_mean_exp(name: str, shape: tuple[int, int]) -> Row:
        return _importance(
            name, shape, "torch.logsumexp - log K", lambda log_w: uf.log_mean_exp(log_w, dim=1), _log_mean_exp
        )

    def iwae_loss(name: str, shape: tuple[int, int]) -> Row:
        return _importance(
            name,
            shape,
            "IWAE bound of log-weights",
            lambda log_w: uf.iwae_loss(log_w, dim=1),
            lambda log_w: -_log_mean_exp(log_w).mean(),
        )

    return [
        log_mean_exp("log_mean_exp_64", (4096, 64)),
        log_mean_exp("log_mean_exp_5000", (1024, 5000)),
        iwae_loss("iwae_loss_50", (100, 50)),
        iwae_loss("iwae_loss_64", (4096, 64)),
        _importance(
            "importance_weights_64",
            (4096, 64),
            "torch.softmax of log-weights",
            lambda log_w: uf.importance_weights(log_w, dim=1, detach=False),
            lambda log_w: torch.softmax(log_w, dim=1),
        ),
        _importance(
            "effective_sample_size_64",
            (4096, 64),
            "softmax, squares, sum (forward only)",
            lambda log_w: uf.effective_sample_size(log_w, dim=1),
            _effective_sample_size,
            gradient=False,
        ),
        Row(
            "vimco_50",
            "importance",
            "VIMCO, with O(K) baselines",
            (Input((128, 50), draw=_log_weights), Input((128, 50), draw=_log_weights)),
            lambda log_w, log_q: uf.vimco_loss(log_w, log_q, dim=1),
            _vimco,
        ),
        _importance(
            "renyi_50",
            (128, 50),
            "Rényi bound, alpha 1/2",
            lambda log_w: uf.renyi_loss(log_w, dim=1, alpha=0.5),
            _renyi,
        ),
        _importance(
            "tvo_50",
            (128, 50),
            "TVO of 10 intervals, exact gradient",
            lambda log_w: uf.tvo_loss(log_w, dim=1, partition=_TVO_PARTITION),
            _tvo,
        ),
        Row(
            "rws_50",
            "importance",
            "reweighted wake-sleep, both wake phases",
            (Input((128, 50), draw=_log_weights), Input((128, 50), draw=_log_weights)),
            lambda log_p, log_q: uf.rws_losses(log_p, log_q, dim=1),
            _rws,
        ),
        Row(
            "importance_weighted_sum_64",
            "importance",
            "softmax times payload, live weights",
            (Input((4096, 64), draw=_log_weights), Input((4096, 64))),
            lambda log_w, payload: uf.importance_weighted_sum(log_w, payload, dim=1, detach=False),
            _weighted_sum,
        ),
        _importance(
            "weight_diagnostics_64",
            (4096, 64),
            "bound, ESS, largest weight, entropy, Pareto k (forward only)",
            lambda log_w: uf.weight_diagnostics(log_w, dim=1),
            _diagnostics,
            gradient=False,
        ),
    ]


# ---- adversarial -----------------------------------------------------------------------------------------------------


def _logistic(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def _multi_discriminator(*logits: Tensor) -> Tensor:
    half = len(logits) // 2
    loss = _logistic(logits[0], logits[half])
    for real, fake in zip(logits[1:half], logits[half + 1 :], strict=True):
        loss = loss + _logistic(real, fake)
    return loss


def _vits_discriminator(*logits: Tensor) -> Tensor:
    half = len(logits) // 2
    loss = torch.mean((1 - logits[0]) ** 2) + torch.mean(logits[half] ** 2)
    for real, fake in zip(logits[1:half], logits[half + 1 :], strict=True):
        loss = loss + torch.mean((1 - real) ** 2) + torch.mean(fake**2)
    return loss


def _vits_generator(*logits: Tensor) -> Tensor:
    loss = torch.mean((1 - logits[0]) ** 2)
    for fake in logits[1:]:
        loss = loss + torch.mean((1 - fake) ** 2)
    return loss


def _relativistic_average(real: Tensor, fake: Tensor) -> Tensor:
    of_real, of_fake = real - fake.mean(), fake - real.mean()
    return 0.5 * (F.softplus(-of_real).mean() + F.softplus(of_fake).mean())


def _kl_wgan(real: Tensor, fake: Tensor) -> Tensor:
    ratio = torch.softmax(fake.detach().flatten(), 0).view_as(fake) * fake.numel()
    return F.relu(1.0 - real).mean() + F.relu(1.0 + ratio * fake).mean()


_CLASSES = 10


def _labels(x: Tensor, generator: torch.Generator) -> None:
    x.random_(_CLASSES, generator=generator)


def _iwcgan(fake: Tensor, labels: Tensor) -> Tensor:
    """With the number of classes known, a masked softmax of [classes, N] is faster than sorting and scattering."""
    of_class = labels.long() == torch.arange(_CLASSES, device=labels.device).unsqueeze(1)
    weights = torch.softmax(fake.detach().masked_fill(~of_class, -torch.inf), dim=1).nan_to_num(0.0)
    present = of_class.any(1).sum()
    return (weights.sum(0) * F.softplus(-fake)).sum() / present


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def _iwgan(fake: Tensor) -> Tensor:
    weights = torch.softmax(fake.detach(), dim=-1)
    return (weights * F.softplus(-fake)).sum(-1).mean()


def _adversarial(
    name: str, inputs: tuple[Input, ...], replaces: str, fused: Callable[..., Any], eager: Callable[..., Any]
) -> Row:
    return Row(name, "adversarial", replaces, inputs, fused, eager)


def _adversarial_rows() -> list[Row]:
    def iwgan(name: str, shape: tuple[int, ...]) -> Row:
        return _adversarial(
            name,
            (Input(shape),),
            "IWGAN, Eq. 16",
            lambda fake: uf.importance_weighted_generator_loss(fake=fake, dim=-1),
            _iwgan,
        )

    return [
        _adversarial(
            "logits_64",
            (Input((64, 1)), Input((64, 1))),
            "GAN's discriminator step",
            lambda real, fake: uf.discriminator_loss(real=real, fake=fake),
            _logistic,
        ),
        _adversarial(
            "logits_64_generator",
            (Input((64, 1)),),
            "GAN's generator step",
            lambda fake: uf.generator_loss(fake=fake),
            lambda fake: F.softplus(-fake).mean(),
        ),
        _adversarial(
            "patchgan_hinge",
            (Input((12, 1, 30, 30)), Input((12, 1, 30, 30))),
            "LDM and taming's hinge_d_loss",
            lambda real, fake: uf.discriminator_loss(real=real, fake=fake, kind="hinge", scale=0.5),
            _hinge,
        ),
        _adversarial(
            "multi_discriminator",
            (Input((64, 800)),) * 12,
            "VITS-like lists of 6 real and 6 fake logits",
            lambda *logits: uf.discriminator_loss(real=logits[: len(logits) // 2], fake=logits[len(logits) // 2 :]),
            _multi_discriminator,
        ),
        _adversarial(
            "vits_discriminator",
            (Input((64, 800)),) * 12,
            "VITS and HiFi-GAN's discriminator_loss",
            lambda *logits: uf.discriminator_loss(
                real=logits[: len(logits) // 2], fake=logits[len(logits) // 2 :], kind="least_squares", scale=2.0
            ),
            _vits_discriminator,
        ),
        _adversarial(
            "vits_generator",
            (Input((64, 800)),) * 6,
            "VITS and HiFi-GAN's generator_loss",
            lambda *logits: uf.generator_loss(fake=logits, kind="least_squares", scale=2.0),
            _vits_generator,
        ),
        _adversarial(
            "relativistic_average",
            (Input((12, 1, 30, 30)), Input((12, 1, 30, 30))),
            "RaSGAN's discriminator step",
            lambda real, fake: uf.discriminator_loss(real=real, fake=fake, kind="relativistic_average"),
            _relativistic_average,
        ),
        _adversarial(
            "kl_wgan",
            (Input((12, 1, 30, 30)), Input((12, 1, 30, 30))),
            "KL-WGAN's discriminator step",
            lambda real, fake: uf.discriminator_loss(real=real, fake=fake, kind="kl_wgan"),
            _kl_wgan,
        ),
        _adversarial(
            "iwcgan_generator_256",
            (Input((256,)), Input((256,), gradient=False, draw=_labels)),
            "IWGAN with weights normalised per class, 10 classes",
            lambda fake, labels: uf.importance_weighted_generator_loss(fake=fake, groups=labels.long()),
            _iwcgan,
        ),
        iwgan("iwgan_generator_64", (64,)),
        iwgan("iwgan_generator_256", (256,)),
        iwgan("iwgan_generator_16x256", (16, 256)),
    ]


# ---- divergence ------------------------------------------------------------------------------------------------------

_CLAMP = (-30.0, 20.0)  # LDM's and diffusers' bounds on the log-variance


def _kl_rows(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * torch.sum(mean.pow(2) + logvar.exp() - 1.0 - logvar, dim=tuple(range(1, mean.dim())))


def _kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return _kl_rows(mean, logvar).mean()


def _kl_of_moments(moments: Tensor) -> Tensor:
    mean, logvar = moments.chunk(2, dim=1)
    return _kl(mean, logvar.clamp(*_CLAMP))


def _fused_kl_of_moments(moments: Tensor) -> Tensor:
    mean, logvar = moments.chunk(2, dim=1)
    return uf.gaussian_kl(mean, logvar, event_ndims=3, clamp_logvar=_CLAMP)


def _sample_with_kl(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return mean + torch.exp(0.5 * logvar) * noise, _kl_rows(mean, logvar)


def _sample_with_kl_of_moments(moments: Tensor, draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    mean, logvar = moments.chunk(2, dim=1)
    return _sample_with_kl(mean, logvar.clamp(*_CLAMP), draw(mean))


def _fused_sample_with_kl_of_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = moments.chunk(2, dim=1)
    return uf.sample_gaussian_with_kl(mean, logvar, event_ndims=3, clamp_logvar=_CLAMP)


def _fused_noise(like: Tensor) -> Tensor:
    """The noise that a sampling call would draw now, for a tensor like this one: it hangs on the generator alone."""
    zeros = torch.zeros_like(like)
    return uf.sample_gaussian(zeros, zeros)


def _divergence(
    name: str,
    inputs: tuple[Input, ...],
    replaces: str,
    fused: Callable[..., Any],
    eager: Callable[..., Any],
    expected: Callable[..., Any] | None = None,
) -> Row:
    return Row(name, "divergence", replaces, inputs, fused, eager, expected)


def _divergence_rows() -> list[Row]:
    def kl(name: str, shape: tuple[int, int], replaces: str) -> Row:
        return _divergence(name, (Input(shape), Input(shape)), replaces, uf.gaussian_kl, _kl)

    def kl_of_moments(name: str, shape: tuple[int, ...], replaces: str) -> Row:
        return _divergence(name, (Input(shape),), replaces, _fused_kl_of_moments, _kl_of_moments)

    return [
        kl("gaussian_kl_tiny", (128, 10), "KL term of scvi-tools"),
        kl_of_moments("gaussian_kl_latent", (12, 8, 32, 32), "LDM's KL term"),
        kl_of_moments("gaussian_kl_diffusion", (4, 8, 64, 64), "KL term of Stable-Diffusion-like autoencoders"),
        kl("gaussian_kl_large", (4096, 1024), "KL term at the limit of bandwidth"),
        _divergence(
            "sample_gaussian_with_kl_latent",
            (Input((12, 8, 32, 32)),),
            "diffusers' .sample() and .kl()",
            _fused_sample_with_kl_of_moments,
            lambda moments: _sample_with_kl_of_moments(moments, torch.randn_like),
            lambda moments: _sample_with_kl_of_moments(moments, _fused_noise),
        ),
        _divergence(
            "sample_gaussian_with_kl_large",
            (Input((4096, 1024)), Input((4096, 1024))),
            "reparameterised sample and KL",
            uf.sample_gaussian_with_kl,
            lambda mean, logvar: _sample_with_kl(mean, logvar, torch.randn_like(mean)),
            lambda mean, logvar: _sample_with_kl(mean, logvar, _fused_noise(mean)),
        ),
        _divergence(
            "vits_kl",
            (
                Input((64, 192, 400)),
                Input((64, 192, 400), draw=_log_std),
                Input((64, 192, 400)),
                Input((64, 192, 400), draw=_log_std),
                Input((64, 1, 400), gradient=False, draw=_mask),
            ),
            "VITS' kl_loss",
            _fused_vits_kl,
            _vits_kl,
        ),
        _divergence(
            "bernoulli_kl_large",
            (Input((4096, 256)), Input((4096, 256))),
            "KL of Bernoulli logits",
            uf.bernoulli_kl,
            _bernoulli_kl,
        ),
    ]


def _vits_kl(z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, mask: Tensor) -> Tensor:
    kl = logs_p - logs_q - 0.5
    kl = kl + 0.5 * (z_p - m_p) ** 2 * torch.exp(-2.0 * logs_p)
    return torch.sum(kl * mask) / torch.sum(mask)


def _fused_vits_kl(z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, mask: Tensor) -> Tensor:
    z_p, logs_q, m_p, logs_p = (t.transpose(1, 2) for t in (z_p, logs_q, m_p, logs_p))
    return uf.gaussian_kl_monte_carlo(
        z_p,
        None,
        logs_q,
        m_p,
        logs_p,
        event_ndims=1,
        spread="logstd",
        weights=mask.squeeze(1),
        normalize_weights=True,
    )


def _mask(x: Tensor, generator: torch.Generator) -> None:
    """Sequences of different lengths: ones, then zeros."""
    lengths = torch.rand(x.size(0), 1, 1, generator=generator, device=x.device).add(0.5).mul(x.size(-1))
    x.copy_(torch.arange(x.size(-1), device=x.device) < lengths)


def _log_std(x: Tensor, generator: torch.Generator) -> None:
    x.normal_(-0.5, 0.5, generator=generator)


def _bernoulli_kl(q: Tensor, p: Tensor) -> Tensor:
    return (torch.sigmoid(q) * (q - p) + F.softplus(p) - F.softplus(q)).sum(-1).mean()


# ---- likelihood ------------------------------------------------------------------------------------------------------


def _bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    # faster than -F.binary_cross_entropy_with_logits(..., reduction="none").sum(-1), and the same
    return (x * logits - F.softplus(logits)).sum(-1)


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() * torch.exp(-logvar)).sum(-1)


def _laplace(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return -(math.log(2) + log_scale + (x - mean).abs() * torch.exp(-log_scale)).sum(-1)


def _discretized_logistic(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    # PixelCNN++'s, with its floor under the probability, but without the density where that is reached
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    plus, minus = inverse_scale * (centered + 1 / 255), inverse_scale * (centered - 1 / 255)
    middle = torch.log((torch.sigmoid(plus) - torch.sigmoid(minus)).clamp(min=1e-12))
    lowest, highest = plus - F.softplus(plus), -F.softplus(minus)
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, middle)).sum(-1)


def _levels(x: Tensor, generator: torch.Generator) -> None:
    x.copy_(torch.randint(0, 256, x.shape, generator=generator, device=x.device) / 127.5 - 1)


def _centers(x: Tensor, generator: torch.Generator) -> None:
    x.uniform_(-1, 1, generator=generator)


def _log_scales(x: Tensor, generator: torch.Generator) -> None:
    x.uniform_(-2, -1, generator=generator)  # above eager's floor, where alone it is right


def _log_nb(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    # scvi-tools' log_nb_positive, eps and all
    eps = 1e-8
    log_theta_mu = torch.log(theta + mu + eps)
    terms = theta * (torch.log(theta + eps) - log_theta_mu) + x * (torch.log(mu + eps) - log_theta_mu)
    return (terms + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)).sum(-1)


def _log_zinb(x: Tensor, mu: Tensor, theta: Tensor, pi: Tensor) -> Tensor:
    # scvi-tools' log_zinb_positive
    eps = 1e-8
    softplus_pi, log_theta_mu = F.softplus(-pi), torch.log(theta + mu + eps)
    empty = -pi + theta * (torch.log(theta + eps) - log_theta_mu)
    zero = F.softplus(empty) - softplus_pi
    some = -softplus_pi + empty + x * (torch.log(mu + eps) - log_theta_mu)
    some = some + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return torch.where(x < eps, zero, some).sum(-1)


def _counts(x: Tensor, generator: torch.Generator) -> None:
    """Of genes: mostly zeros, and a long tail."""
    x.exponential_(generator=generator).pow_(2).floor_()


def _positive(x: Tensor, generator: torch.Generator) -> None:
    x.normal_(generator=generator).exp_()


_OF_BROADCAST = "theta's gradient has the size of x before autograd sums it"


# counts, their means, dispersions and gates
_ZINB = (
    Input((128, 2000), False, _counts),
    Input((128, 2000), draw=_positive),
    Input((2000,), draw=_positive),
    Input((128, 2000)),
)


def _likelihood_rows() -> list[Row]:
    def bernoulli(name: str, logits: tuple[int, ...], x: tuple[int, ...], replaces: str) -> Row:
        inputs = (Input(logits), Input(x, gradient=False, draw=_pixels))
        return Row(name, "likelihood", replaces, inputs, uf.bernoulli_log_prob, _bernoulli)

    return [
        bernoulli("bernoulli_784", (100, 50, 784), (100, 1, 784), "pythae IWAE's reconstruction term"),
        bernoulli("bernoulli_784_small", (20, 784), (20, 784), "a VAE's reconstruction term"),
        Row(
            "gaussian_784",
            "likelihood",
            "a Gaussian decoder under IWAE",
            (Input((100, 1, 784), gradient=False), Input((100, 50, 784)), Input((100, 50, 784))),
            uf.gaussian_log_prob,
            _gaussian,
        ),
        Row(
            "laplace_784",
            "likelihood",
            "a Laplace decoder",
            (Input((128, 784), gradient=False), Input((128, 784)), Input((128, 784))),
            uf.laplace_log_prob,
            _laplace,
        ),
        Row(
            "discretized_logistic_3072",
            "likelihood",
            "PixelCNN++'s likelihood with one component",
            (
                Input((64, 3072), gradient=False, draw=_levels),
                Input((64, 3072), draw=_centers),
                Input((64, 3072), draw=_log_scales),
            ),
            uf.discretized_logistic_log_prob,
            _discretized_logistic,
        ),
        Row(
            "nb_2000",
            "likelihood",
            "scvi-tools' log_nb_positive",
            (Input((128, 2000), False, _counts), Input((128, 2000), draw=_positive), Input((2000,), draw=_positive)),
            uf.negative_binomial_log_prob,
            _log_nb,
            memory=_OF_BROADCAST,
        ),
        Row(
            "zinb_2000",
            "likelihood",
            "scvi-tools' log_zinb_positive",
            _ZINB,
            uf.zero_inflated_negative_binomial_log_prob,
            _log_zinb,
            memory=_OF_BROADCAST,
        ),
    ]


# ---- pairwise --------------------------------------------------------------------------------------------------------

_DATASET = 50_000


def _total_correlation(z: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As in beta-tcvae and pythae, with their matrix of weights mended."""
    rows, m = z.size(0), z.size(0) - 1
    difference = z.unsqueeze(1) - mean
    pairs = -0.5 * (difference * difference * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
    i = torch.arange(rows, device=z.device)
    weights = torch.full((rows, rows), 1 / m, device=z.device)
    weights[i, i] = 1 / _DATASET
    weights[i, (i + 1) % rows] = (_DATASET - m) / (_DATASET * m)
    log_weights = weights.log()
    log_qz = torch.logsumexp(pairs.sum(2) + log_weights, 1)
    log_prod = torch.logsumexp(pairs + log_weights.unsqueeze(2), 1).sum(1)
    log_qzx = (-0.5 * ((z - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))).sum(1)
    log_pz = (-0.5 * (z.square() + math.log(2 * math.pi))).sum(1)
    return log_qzx - log_qz, log_qz - log_prod, log_prod - log_pz


def _fused_total_correlation(z: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return uf.total_correlation(z, mean, logvar, dataset_size=_DATASET)[3:]


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    """pythae's WAE, with distances by a matrix product instead of [N, N, D]."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        square = torch.addmm((a * a).sum(1, keepdim=True) + (b * b).sum(1), a, b.t(), alpha=-2)
        total = torch.zeros_like(square)
        for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
            c = 2.0 * x.size(1) * scale
            total = total + c / (c + square)
        return total

    def within(a: Tensor) -> Tensor:
        values, n = k(a, a), a.size(0)
        return (values.sum() - values.diagonal().sum()) / (n * (n - 1))

    return within(x) + within(y) - 2 * k(x, y).mean()


def _shifted(x: Tensor, generator: torch.Generator) -> None:
    x.normal_(0.5, 1.0, generator=generator)


def _pairwise_rows() -> list[Row]:
    def total_correlation(name: str, shape: tuple[int, int]) -> Row:
        row = _divergence(
            name, (Input(shape),) * 3, "beta-TCVAE's terms, stratified", _fused_total_correlation, _total_correlation
        )
        return replace(row, check_first=1024)

    return [
        total_correlation("total_correlation_256", (256, 10)),
        total_correlation("total_correlation_1024", (1024, 64)),
        total_correlation("total_correlation_4096", (4096, 32)),
        _divergence(
            "mmd_1024", (Input((1024, 64)), Input((1024, 64), draw=_shifted)), "MMD of InfoVAE and WAE", uf.mmd, _mmd
        ),
    ]


# ---- categorical -----------------------------------------------------------------------------------------------------


def _unimix(logits: Tensor, unimix: float = 0.01) -> Tensor:
    return (1 - unimix) * torch.softmax(logits, -1) + unimix / logits.size(-1)


def _dreamer(posterior: Tensor, prior: Tensor) -> Tensor:
    q, p = _unimix(posterior), _unimix(prior)
    log_q, log_p = q.log(), p.log()
    dynamics = (q.detach() * (log_q.detach() - log_p)).sum((-1, -2)).clamp_min(1.0).mean()
    representation = (q * (log_q - log_p.detach())).sum((-1, -2)).clamp_min(1.0).mean()
    return dynamics + 0.1 * representation


def _kl_to_uniform(logits: Tensor) -> Tensor:
    log_q = torch.log_softmax(logits, -1)
    return (log_q.exp() * (log_q + math.log(logits.size(-1)))).sum((-1, -2)).mean()


def _categorical_log_prob(logits: Tensor) -> Tensor:
    return -F.cross_entropy(logits, _classes_of(logits), reduction="none")


def _classes_of(logits: Tensor) -> Tensor:
    return torch.arange(logits.size(0), device=logits.device) % logits.size(1)


def _pixelcnn(params: Tensor, x: Tensor) -> Tensor:
    """PixelCNN++'s loss as its PyTorch ports have it, channels last, as rows of log-likelihoods."""
    params = _whole_mixture(params)
    mixtures = params.size(-1) // 10
    logits, rest = params[..., :mixtures], params[..., mixtures:].unflatten(-1, (3, -1))
    means, log_scales = rest[..., :mixtures], rest[..., mixtures : 2 * mixtures].clamp(min=-7.0)
    c = torch.tanh(rest[..., 2 * mixtures :])
    x = x.unsqueeze(-1)
    red, green = x[..., 0, :], x[..., 1, :]
    means = torch.stack(
        [
            means[..., 0, :],
            means[..., 1, :] + c[..., 0, :] * red,
            means[..., 2, :] + c[..., 1, :] * red + c[..., 2, :] * green,
        ],
        -2,
    )
    centered, inverse = x - means, torch.exp(-log_scales)
    upper, lower, middle = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255), inverse * centered
    mass = torch.sigmoid(upper) - torch.sigmoid(lower)
    density = middle - log_scales - 2 * F.softplus(middle)
    inside = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), density - math.log(127.5))
    terms = torch.where(x < -0.999, upper - F.softplus(upper), torch.where(x > 0.999, -F.softplus(lower), inside))
    return torch.logsumexp(torch.log_softmax(logits, -1) + terms.sum(-2), -1).sum((-1, -2))


def _whole_mixture(params: Tensor) -> Tensor:
    """Ten numbers for each component, in a row made smaller too."""
    rest = params.size(-1) % 10
    return params[..., :-rest] if rest else params


def _soft_mixture(params: Tensor, generator: torch.Generator) -> None:
    """Scales as wide as an image's: few masses below the 1e-5 at which PixelCNN++ turns to the density."""
    params.normal_(0.0, 0.2, generator=generator)


def _grey_values(x: Tensor, generator: torch.Generator) -> None:
    x.random_(0, 256, generator=generator).div_(127.5).sub_(1)


def _categorical_rows() -> list[Row]:
    latents = (16, 64, 32, 32)
    return [
        _divergence(
            "dreamer_kl",
            (Input(latents), Input(latents)),
            "DreamerV3's dynamics and representation loss (torchrl)",
            lambda posterior, prior: uf.balanced_categorical_kl(posterior, prior, unimix=0.01).loss,
            _dreamer,
        ),
        _divergence(
            "categorical_kl_uniform",
            (Input(latents),),
            "KL of categorical latents to the uniform prior",
            lambda logits: uf.categorical_kl(logits, event_ndims=1),
            _kl_to_uniform,
        ),
        Row(
            "categorical_log_prob_256",
            "likelihood",
            "F.cross_entropy of 256 values",
            (Input((4096, 256)),),
            lambda logits: uf.categorical_log_prob(logits, _classes_of(logits)),
            _categorical_log_prob,
        ),
        Row(
            "pixelcnn_mixture",
            "likelihood",
            "PixelCNN++'s mixture of 10 logistics",
            (Input((16, 32, 32, 100), draw=_soft_mixture), Input((16, 32, 32, 3), gradient=False, draw=_grey_values)),
            lambda params, x: uf.discretized_logistic_mixture_log_prob(_whole_mixture(params), x),
            _pixelcnn,
        ),
    ]


# ---- objectives ------------------------------------------------------------------------------------------------------


def _log_weights_of(
    log_px: Callable[[Tensor, Tensor], Tensor], decoder: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor
) -> Tensor:
    """[B, K]. What the densities of p(z) and q(z | x) have in common is left out, as it is by those who know it."""
    mean, logvar = mean.unsqueeze(1), logvar.unsqueeze(1)
    log_q = logvar + (z - mean).square() * torch.exp(-logvar)
    return log_px(decoder, x.unsqueeze(1)) + 0.5 * (log_q - z.square()).sum(-1)


def _unit_gaussian(mean: Tensor, x: Tensor) -> Tensor:
    return -0.5 * ((x - mean).square().sum(-1) + mean.size(-1) * math.log(2 * math.pi))


def _iwae(log_px: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: -_log_mean_exp(_log_weights_of(log_px, *tensors)).mean()


def _fused_iwae(**options: Any) -> Callable[..., Tensor]:
    return lambda *tensors: uf.iwae_objective(*tensors, dim=1, **options).loss


_EVALUATION_CHUNK = 250


def _iwae_eval(decoder: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    pairs = zip(decoder.split(_EVALUATION_CHUNK, 1), z.split(_EVALUATION_CHUNK, 1), strict=True)
    return _log_mean_exp(torch.cat([_log_weights_of(_bernoulli, d, x, part, mean, logvar) for d, part in pairs], 1))


def _fused_iwae_eval(decoder: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    pairs = zip(decoder.split(_EVALUATION_CHUNK, 1), z.split(_EVALUATION_CHUNK, 1), strict=True)
    chunks = (uf.iwae_objective(d, x, part, mean, logvar, dim=1).log_w for d, part in pairs)
    return uf.streaming_log_likelihood(chunks, dim=1)


def _elbo(logits: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return _kl(mean, logvar) - _bernoulli(logits, x).mean()


def _fused_elbo_zinb(x: Tensor, mu: Tensor, theta: Tensor, gate: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return uf.elbo_loss((mu, theta, gate), x, mean, logvar, likelihood="zero_inflated_negative_binomial").loss


def _elbo_zinb(x: Tensor, mu: Tensor, theta: Tensor, gate: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return _kl(mean, logvar) - _log_zinb(x, mu, theta, gate).mean()


def _objective_rows() -> list[Row]:
    def samples(examples: int, count: int, pixels: int, *, gradient: bool = True) -> tuple[Input, ...]:
        return (
            Input((examples, count, pixels), gradient),
            Input((examples, pixels), gradient=False, draw=_pixels),
            Input((examples, count, 16), gradient),
            Input((examples, 16), gradient),
            Input((examples, 16), gradient, draw=_log_std),
        )

    def bernoulli(name: str, examples: int, count: int, pixels: int, replaces: str) -> Row:
        inputs = samples(examples, count, pixels)
        return Row(name, "objectives", replaces, inputs, _fused_iwae(), _iwae(_bernoulli), trained=True)

    burda = "the IWAE of Burda et al."
    half = bernoulli("iwae_bernoulli_784_half", 100, 50, 784, "the same, half the loss: its gradient is not 1")
    return [
        replace(bernoulli("iwae_bernoulli_784", 100, 50, 784, "pythae's IWAE with BCE"), copied=True),
        replace(
            half,
            fused=lambda *tensors: 0.5 * _fused_iwae()(*tensors),
            eager=lambda *tensors: 0.5 * _iwae(_bernoulli)(*tensors),
        ),
        *(bernoulli(f"iwae_bernoulli_original_{count}", 20, count, 784, burda) for count in (1, 5, 50)),
        Row(
            "iwae_gaussian_784",
            "objectives",
            "pythae's CIWAE with MSE",
            samples(100, 50, 784),
            _fused_iwae(likelihood="gaussian", estimator="ciwae", beta=0.5),
            _ciwae,
            trained=True,
        ),
        bernoulli("iwae_bernoulli_pixels", 16, 16, 3 * 64 * 64, "IWAE on 64 × 64 colour images"),
        Row(
            "iwae_eval_5000",
            "objectives",
            "test log-likelihood with K = 5000, in chunks of 250",
            samples(20, 5000, 784, gradient=False),
            _fused_iwae_eval,
            _iwae_eval,
        ),
        Row(
            "elbo_784",
            "objectives",
            "a VAE's loss on MNIST",
            (
                Input((128, 784)),
                Input((128, 784), gradient=False, draw=_pixels),
                Input((128, 16)),
                Input((128, 16), draw=_log_std),
            ),
            lambda *tensors: uf.elbo_loss(*tensors).loss,
            _elbo,
            trained=True,
        ),
        Row(
            "elbo_zinb_2000",
            "objectives",
            "scVI's loss",
            (*_ZINB, Input((128, 10)), Input((128, 10), draw=_log_std)),
            _fused_elbo_zinb,
            _elbo_zinb,
            trained=True,
        ),
    ]


def _ciwae(*tensors: Tensor) -> Tensor:
    log_w = _log_weights_of(_unit_gaussian, *tensors)
    return -(0.5 * log_w.mean(1) + 0.5 * _log_mean_exp(log_w)).mean()


ROWS: dict[str, Row] = {
    row.name: row
    for row in [
        *_importance_rows(),
        *_adversarial_rows(),
        *_divergence_rows(),
        *_pairwise_rows(),
        *_likelihood_rows(),
        *_categorical_rows(),
        *_objective_rows(),
    ]
}


# where fusing must pay most
STARRED = frozenset(
    [
        "iwae_bernoulli_784",
        "iwae_bernoulli_original_1",
        "iwae_bernoulli_original_5",
        "iwae_bernoulli_original_50",
        "iwae_gaussian_784",
        "iwae_bernoulli_pixels",
        "iwae_eval_5000",
        "total_correlation_256",
        "total_correlation_1024",
        "total_correlation_4096",
        "dreamer_kl",
        "zinb_2000",
        "nb_2000",
        "vits_discriminator",
        "vimco_50",
        "mmd_1024",
    ]
)


def family(name: str) -> list[Row]:
    return [row for row in ROWS.values() if row.family == name]


def describe_shapes(shapes: list[tuple[int, ...]]) -> str:
    """`2 × [64, 1]`, `[100, 50, 784], [100, 1, 784]`."""
    counts = {shape: shapes.count(shape) for shape in shapes}
    return ", ".join(f"{n} × {list(shape)}" if n > 1 else str(list(shape)) for shape, n in counts.items())
