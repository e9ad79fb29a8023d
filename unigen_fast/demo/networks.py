"""Small networks, sized for a laptop's CPU. Digits are rows of 784 pixels."""

import torch
from torch import Tensor, nn

PIXELS = 28 * 28


class Autoencoder(nn.Module):
    """Encoder to a diagonal Gaussian over z, decoder to Bernoulli logits: the networks of the VAE and of the IWAE."""

    def __init__(self, hidden: int = 200, latent: int = 16) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, PIXELS))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of q(z|x)."""
        mean, logvar = self.encoder(x).chunk(2, dim=-1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Logits of p(x|z)."""
        return self.decoder(z)


class Adversaries(nn.Module):
    """Generator and discriminator of the GAN and of the IWGAN: a small DCGAN. Pixels are in [-1, 1] here."""

    def __init__(self, latent: int = 32) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(
            nn.Linear(latent, 64 * 7 * 7, bias=False),
            nn.BatchNorm1d(64 * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
        )
        self.discriminator = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 1),
            nn.Flatten(0),
        )

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, self.latent, device=next(self.parameters()).device)


def classifier() -> nn.Module:
    """Digit classifier that the sample-quality score is computed with; takes pixels in [0, 1]."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 7 * 7, 10),
    )
