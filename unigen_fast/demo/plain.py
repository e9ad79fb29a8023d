"""The four models with losses as one writes them in plain PyTorch: what the demo compares values and times with.

Drawing, networks and what a phase reports are the same: only how losses and weights are computed differs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unigen_fast as uf
from unigen_fast.models._model import Losses
from unigen_fast.models.adversarial import Discriminated
from unigen_fast.objectives import Bound


class _Discriminator(Discriminated):
    def discriminator_phase(self, batch: Any) -> Losses:
        with torch.no_grad():
            of_real, of_fake = self.real(batch), self.fake(batch)
        real, fake = self.discriminator(*of_real), self.discriminator(*of_fake)
        loss = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        loss = loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        with torch.no_grad():
            return {
                "loss": loss,
                "real_accuracy": (real > 0).float().mean(),
                "fake_accuracy": (fake < 0).float().mean(),
                "real_probability": real.sigmoid().mean(),
                "fake_probability": fake.sigmoid().mean(),
            }


class GAN(_Discriminator, uf.models.GAN):
    def generator_loss(self, logits: Tensor, fake: tuple[Tensor, ...]) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


class IWGAN(GAN):
    def generator_loss(self, logits: Tensor, fake: tuple[Tensor, ...]) -> Tensor:
        weights = torch.softmax(logits.detach(), dim=0)
        return (weights * F.softplus(-logits)).sum()


class VAE(uf.models.VAE):
    def noise(self, mean: Tensor) -> Tensor:
        return torch.randn_like(mean)

    def negative_bound(
        self, x: Tensor, *condition: Tensor, weights: Tensor | None = None, reduction: str = "mean"
    ) -> Bound:
        mean, logvar = self.posterior(x)
        z = mean + torch.exp(0.5 * logvar) * self.noise(mean)
        log_likelihood = -F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)
        kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=-1)
        loss = kl - log_likelihood
        if weights is not None:
            loss = weights * loss
        return Bound(loss.mean(), log_likelihood, kl)


class AAVAE(_Discriminator, VAE, uf.models.AAVAE):
    @torch.no_grad()
    def q_reversed(self, *examples: Tensor) -> Tensor:
        return torch.sigmoid(self.discriminator(*examples))
