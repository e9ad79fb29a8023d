"""The two networks that all four models are made of, sized for a laptop's CPU. Digits are rows of 784 pixels.

One architecture generates, p_θ(x|z), one infers: with a head of one number it is q_φ(y|x), the discriminator, with a
head of a mean and a log-variance q_η(z|x), the encoder. The norms are over one example's channels, not over the batch:
batches of data, of samples and of both are then treated alike.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

PIXELS = 28 * 28
LATENT = 32


class Networks(NamedTuple):
    generator: nn.Module  # z to logits of the pixels
    discriminator: nn.Module  # x to the logit of q_φ(y=1|x)
    encoder: nn.Module  # x to (mean, logvar) of q_η(z|x)


def networks(device: str | torch.device = "cpu") -> Networks:
    """The discriminator and the encoder start from the same parameters but for their heads."""
    generator = nn.Sequential(
        nn.Linear(LATENT, 64 * 7 * 7),
        nn.Unflatten(1, (64, 7, 7)),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )
    discriminator = _inference(1, nn.Flatten(0))
    encoder = _inference(2 * LATENT, _Halves())
    encoder[0].load_state_dict(discriminator[0].state_dict())
    return Networks(*(network.to(device) for network in (generator, discriminator, encoder)))


def _inference(outputs: int, form: nn.Module) -> nn.Sequential:
    body = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.GroupNorm(8, 32),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
    )
    return nn.Sequential(body, nn.Linear(32 * 7 * 7, outputs), form)


class _Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, dim=-1)


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
