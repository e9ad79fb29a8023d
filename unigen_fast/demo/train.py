"""The four training steps with the losses of unigen_fast, and the plain loops around them. Made to be copied."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import unigen_fast as uf
from unigen_fast.demo.networks import Adversaries, Autoencoder

NUM_SAMPLES = 16  # K of the IWAE

# ---- the steps -------------------------------------------------------------------------------------------------------


def vae_step(model: Autoencoder, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """-ELBO = KL(q(z|x) || p(z)) - E_q[log p(x|z)], in nats per digit."""
    mean, logvar = model.encode(x)
    z, kl = uf.sample_gaussian_with_kl(mean, logvar)
    loss = (kl - uf.bernoulli_log_prob(model.decode(z), x)).mean()
    update(optimizer, loss)
    return loss.detach()


def iwae_step(model: Autoencoder, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """-log (1/K) sum_k w_k: the importance-weighted bound. `log_w` is `[B, K]`."""
    loss = bound(model, x, NUM_SAMPLES).loss
    update(optimizer, loss)
    return loss.detach()


def gan_step(model: Adversaries, optimizers: "AdversarialOptimizers", x: Tensor) -> "AdversarialLosses":
    """Discriminator: real against generated; then the generator, non-saturating: -log D(G(z))."""
    fake = model.generator(model.noise(len(x)))
    discriminator_loss = uf.discriminator_loss(real=model.discriminator(x), fake=model.discriminator(fake.detach()))
    update(optimizers.discriminator, discriminator_loss)

    logits = model.discriminator(fake)
    generator_loss = uf.generator_loss(fake=logits)
    update(optimizers.generator, generator_loss)
    return AdversarialLosses(discriminator_loss.detach(), generator_loss.detach(), logits.detach())


def iwgan_step(model: Adversaries, optimizers: "AdversarialOptimizers", x: Tensor) -> "AdversarialLosses":
    """The GAN's step but for one line: samples weighted by D / (1 - D), normalised over the minibatch."""
    fake = model.generator(model.noise(len(x)))
    discriminator_loss = uf.discriminator_loss(real=model.discriminator(x), fake=model.discriminator(fake.detach()))
    update(optimizers.discriminator, discriminator_loss)

    logits = model.discriminator(fake)
    generator_loss = uf.importance_weighted_generator_loss(fake=logits)
    update(optimizers.generator, generator_loss)
    return AdversarialLosses(discriminator_loss.detach(), generator_loss.detach(), logits.detach())


def bound(model: Autoencoder, x: Tensor, num_samples: int) -> uf.MultiSampleBound:
    """Of log_w_k = log p(x|z_k) + log p(z_k) - log q(z_k|x), z_k drawn from q(z|x): log (1/K) sum_k exp(log_w_k)."""
    mean, logvar = model.encode(x)
    z = uf.sample_gaussian(mean, logvar, num_samples=num_samples, sample_dim=1)
    return uf.iwae_objective(model.decode(z), x, z, mean, logvar, dim=1)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class AdversarialLosses(NamedTuple):
    """What a step of the GAN or the IWGAN reports; `logits`: the discriminator's, of the generated samples."""

    discriminator: Tensor
    generator: Tensor
    logits: Tensor


class AdversarialOptimizers(NamedTuple):
    discriminator: torch.optim.Optimizer
    generator: torch.optim.Optimizer

    @classmethod
    def of(cls, model: Adversaries) -> "AdversarialOptimizers":
        """DCGAN's Adam, with larger steps: these networks are small and the training is short."""
        return cls(
            discriminator=torch.optim.Adam(model.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
            generator=torch.optim.Adam(model.generator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
        )


# ---- the loops -------------------------------------------------------------------------------------------------------

Progress = Callable[[int, str], Iterable[int]]  # (steps, title) -> range(steps), with a progress bar or without


@dataclass
class BoundCurve:
    """Held-out bounds in nats per digit, with the step and the seconds of training at which they were taken."""

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    elbo: list[float] = field(default_factory=list)
    iwae: list[float] = field(default_factory=list)


@dataclass
class AdversarialCurve:
    """Means over the steps since the entry before."""

    step: list[int] = field(default_factory=list)
    discriminator: list[float] = field(default_factory=list)
    generator: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train_autoencoder(
    step: Callable[[Autoencoder, torch.optim.Optimizer, Tensor], Tensor],
    model: Autoencoder,
    digits: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    progress: Progress,
    title: str,
    batch_size: int = 64,
    evaluations: int = 12,
) -> BoundCurve:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curve, seconds = BoundCurve(), 0.0
    due = {round(steps * (i + 1) / evaluations) for i in range(evaluations)} | {steps}
    start = time.perf_counter()
    for n in progress(steps, title):
        batch = digits[torch.randint(len(digits), (batch_size,)).to(digits.device)]
        step(model, optimizer, torch.bernoulli(batch))  # binarised anew each time
        if n + 1 in due:
            synchronize(digits)
            seconds += time.perf_counter() - start
            with torch.no_grad():
                found = bound(model, held_out, NUM_SAMPLES)
            curve.step.append(n + 1)
            curve.seconds.append(seconds)
            curve.elbo.append(found.log_w.mean().item())
            curve.iwae.append(found.bound.mean().item())
            start = time.perf_counter()
    return curve


def train_adversaries(
    step: Callable[[Adversaries, AdversarialOptimizers, Tensor], AdversarialLosses],
    model: Adversaries,
    digits: Tensor,
    *,
    steps: int,
    progress: Progress,
    title: str,
    batch_size: int = 64,
    entries: int = 60,
) -> AdversarialCurve:
    optimizers = AdversarialOptimizers.of(model)
    curve, recent = AdversarialCurve(), []
    due = {round(steps * (i + 1) / entries) for i in range(entries)} | {steps}
    start = time.perf_counter()
    for n in progress(steps, title):
        batch = digits[torch.randint(len(digits), (batch_size,)).to(digits.device)]
        losses = step(model, optimizers, 2 * batch - 1)
        ess = uf.effective_sample_size(losses.logits, dim=0)
        recent.append(torch.stack((losses.discriminator, losses.generator, ess)))
        if n + 1 in due:
            discriminator, generator, ess = torch.stack(recent).mean(0).tolist()
            recent.clear()
            curve.step.append(n + 1)
            curve.discriminator.append(discriminator)
            curve.generator.append(generator)
            curve.ess.append(ess)
    curve.seconds = time.perf_counter() - start
    return curve


def synchronize(tensor: Tensor) -> None:
    """Waits for the GPU, where there is one, before a clock is read."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
