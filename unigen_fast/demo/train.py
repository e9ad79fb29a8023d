"""The four training steps with the losses of unigen_fast, and the plain loops around them. Made to be copied."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    loss = uf.iwae_loss(log_weights(model, x, NUM_SAMPLES), dim=1)
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


def log_weights(model: Autoencoder, x: Tensor, num_samples: int) -> Tensor:
    """log p(x|z_k) + log p(z_k) - log q(z_k|x) of K samples z_k of q(z|x): `[B, K]`."""
    mean, logvar = model.encode(x)
    z = uf.sample_gaussian(mean, logvar, num_samples=num_samples, sample_dim=1)
    log_likelihood = uf.bernoulli_log_prob(model.decode(z), x.unsqueeze(1))  # x is not repeated in memory
    zero = z.new_zeros(())
    return log_likelihood + gaussian_log_prob(z, zero, zero) - gaussian_log_prob(z, mean.unsqueeze(1), logvar.unsqueeze(1))


def gaussian_log_prob(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * ((z - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1)


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
        """DCGAN's Adam."""
        return cls(*(
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for network in (model.discriminator, model.generator)
        ))
