"""The four training steps as one writes them in plain PyTorch: what the demo compares values and times with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unigen_fast.demo.networks import Adversaries, Autoencoder
from unigen_fast.demo.train import NUM_SAMPLES, AdversarialLosses, AdversarialOptimizers, update


def vae_step(model: Autoencoder, optimizer: torch.optim.Optimizer, x: Tensor, noise: Tensor | None = None) -> Tensor:
    mean, logvar = model.encode(x)
    std = torch.exp(0.5 * logvar)
    z = mean + std * (torch.randn_like(std) if noise is None else noise)
    reconstruction = F.binary_cross_entropy_with_logits(model.decode(z), x, reduction="none").sum(-1)
    kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=-1)
    loss = (reconstruction + kl).mean()
    update(optimizer, loss)
    return loss.detach()


def iwae_step(model: Autoencoder, optimizer: torch.optim.Optimizer, x: Tensor, noise: Tensor | None = None) -> Tensor:
    mean, logvar = (t.unsqueeze(1) for t in model.encode(x))
    if noise is None:
        noise = torch.randn(mean.shape[0], NUM_SAMPLES, mean.shape[2], device=x.device)
    z = mean + torch.exp(0.5 * logvar) * noise
    logits = model.decode(z)
    targets = x.unsqueeze(1).expand_as(logits)
    log_likelihood = -F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
    zero = z.new_zeros(())
    log_w = log_likelihood + gaussian_log_prob(z, zero, zero) - gaussian_log_prob(z, mean, logvar)
    loss = -(torch.logsumexp(log_w, dim=1) - math.log(NUM_SAMPLES)).mean()
    update(optimizer, loss)
    return loss.detach()


def gaussian_log_prob(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * ((z - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1)


def gan_step(model: Adversaries, optimizers: AdversarialOptimizers, x: Tensor) -> AdversarialLosses:
    fake = model.generator(model.noise(len(x)))
    discriminator_loss = _discriminator_loss(model.discriminator(x), model.discriminator(fake.detach()))
    update(optimizers.discriminator, discriminator_loss)

    logits = model.discriminator(fake)
    generator_loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    update(optimizers.generator, generator_loss)
    return AdversarialLosses(discriminator_loss.detach(), generator_loss.detach(), logits.detach())


def iwgan_step(model: Adversaries, optimizers: AdversarialOptimizers, x: Tensor) -> AdversarialLosses:
    fake = model.generator(model.noise(len(x)))
    discriminator_loss = _discriminator_loss(model.discriminator(x), model.discriminator(fake.detach()))
    update(optimizers.discriminator, discriminator_loss)

    logits = model.discriminator(fake)
    weights = torch.softmax(logits.detach(), dim=0)
    generator_loss = (weights * F.softplus(-logits)).sum()
    update(optimizers.generator, generator_loss)
    return AdversarialLosses(discriminator_loss.detach(), generator_loss.detach(), logits.detach())


def _discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(real, torch.ones_like(real)) + F.binary_cross_entropy_with_logits(
        fake, torch.zeros_like(fake)
    )
