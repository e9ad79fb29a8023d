"""Every model of `uf.models` on small networks, with a batch of real digits: what the models' tests share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.models import Model

PIXELS, LATENT, CLASSES, HIDDEN, BATCH = 784, 8, 10, 64, 60


class Pair(nn.Module):
    """Two halves of the last layer: (mean, logvar)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.network(*inputs).chunk(2, dim=-1)


class WithLabels(nn.Module):
    """A network of an input and its label, one-hot."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.network(torch.cat((x, F.one_hot(labels, CLASSES).to(x.dtype)), -1))


class Info(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(PIXELS, CLASSES + 2 * 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.network(x).split((CLASSES, 2, 2), -1)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


def generator(extra: int = 0) -> nn.Module:
    return nn.Sequential(mlp(LATENT + extra, PIXELS), nn.Sigmoid())


def discriminator(inputs: int = PIXELS) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1))


def encoder(inputs: int = PIXELS) -> nn.Module:
    return Pair(mlp(inputs, 2 * LATENT))


def decoder(extra: int = 0) -> nn.Module:
    return mlp(LATENT + extra, PIXELS)


def conditional_encoder() -> nn.Module:
    return Pair(WithLabels(mlp(PIXELS + CLASSES, 2 * LATENT)))


def conditional_decoder() -> nn.Module:
    return WithLabels(decoder(CLASSES))


def conditional_discriminator() -> nn.Module:
    return WithLabels(discriminator(PIXELS + CLASSES))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """600 digits in the order of no class, pixels in [0, 1], and their labels."""
    from unigen_fast.demo.data import load_digits

    found = load_digits(test_per_class=10)
    order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(0))[:600]
    return found.train[order], found.train_labels[order]


def _x(x: Tensor, labels: Tensor) -> Tensor:
    return x


def _binary(x: Tensor, labels: Tensor) -> Tensor:
    return (x > 0.5).to(x.dtype)


def _labelled(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return x, labels


def _labelled_binary(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return _binary(x, labels), labels


def _semi(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    third = len(x) // 3
    x = _binary(x, labels)
    return x[:third], labels[:third], x[third:]


def _domains(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Digits, and others inverted."""
    half = len(x) // 2
    return x[:half], labels[:half], 1 - x[half:]


def _two_domains(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    source, _, target = _domains(x, labels)
    return source, target


class Entry(NamedTuple):
    build: Callable[[], Model]
    batch: Callable[[Tensor, Tensor], Any]


ZOO: dict[str, Entry] = {
    "AdversarialDomainAdaptation": Entry(
        lambda: uf.models.AdversarialDomainAdaptation(
            nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU()), nn.Linear(HIDDEN, CLASSES), discriminator(HIDDEN)
        ),
        _domains,
    ),
    "GAN": Entry(lambda: uf.models.GAN(generator(), discriminator(), latent=LATENT), _x),
    "ConditionalGAN": Entry(
        lambda: uf.models.ConditionalGAN(
            WithLabels(generator(CLASSES)), conditional_discriminator(), latent=LATENT, num_classes=CLASSES
        ),
        _labelled,
    ),
    "InfoGAN": Entry(
        lambda: uf.models.InfoGAN(
            generator(CLASSES + 2), discriminator(), Info(), latent=LATENT, categories=CLASSES, continuous=2
        ),
        _x,
    ),
    "AdversarialAutoencoder": Entry(
        lambda: uf.models.AdversarialAutoencoder(mlp(PIXELS, LATENT), decoder(), discriminator(LATENT), latent=LATENT),
        _binary,
    ),
    "PredictabilityMinimization": Entry(
        lambda: uf.models.PredictabilityMinimization(
            mlp(PIXELS, LATENT), decoder(), nn.ModuleList(mlp(LATENT - 1, 1) for _ in range(LATENT))
        ),
        _binary,
    ),
    "CycleGAN": Entry(
        lambda: uf.models.CycleGAN(
            nn.Sequential(mlp(PIXELS, PIXELS), nn.Sigmoid()),
            nn.Sequential(mlp(PIXELS, PIXELS), nn.Sigmoid()),
            discriminator(),
            discriminator(),
        ),
        _two_domains,
    ),
    "IWGAN": Entry(lambda: uf.models.IWGAN(generator(), discriminator(), latent=LATENT), _x),
    "IWConditionalGAN": Entry(
        lambda: uf.models.IWConditionalGAN(
            WithLabels(generator(CLASSES)),
            conditional_discriminator(),
            latent=LATENT,
            num_classes=CLASSES,
            per_class=True,
        ),
        _labelled,
    ),
    "VAE": Entry(lambda: uf.models.VAE(encoder(), decoder(), latent=LATENT), _binary),
    "ConditionalVAE": Entry(
        lambda: uf.models.ConditionalVAE(
            conditional_encoder(), conditional_decoder(), latent=LATENT, num_classes=CLASSES
        ),
        _labelled_binary,
    ),
    "SemiSupervisedVAE": Entry(
        lambda: uf.models.SemiSupervisedVAE(
            conditional_encoder(), conditional_decoder(), mlp(PIXELS, CLASSES), latent=LATENT, num_classes=CLASSES
        ),
        _semi,
    ),
    "IWAE": Entry(lambda: uf.models.IWAE(encoder(), decoder(), latent=LATENT, num_samples=5), _binary),
    "AAVAE": Entry(lambda: uf.models.AAVAE(encoder(), decoder(), discriminator(), latent=LATENT), _binary),
    "AAConditionalVAE": Entry(
        lambda: uf.models.AAConditionalVAE(
            conditional_encoder(),
            conditional_decoder(),
            conditional_discriminator(),
            latent=LATENT,
            num_classes=CLASSES,
        ),
        _labelled_binary,
    ),
    "AASemiSupervisedVAE": Entry(
        lambda: uf.models.AASemiSupervisedVAE(
            conditional_encoder(),
            conditional_decoder(),
            mlp(PIXELS, CLASSES),
            discriminator(),
            latent=LATENT,
            num_classes=CLASSES,
        ),
        _semi,
    ),
    "VAEGAN": Entry(
        lambda: uf.models.VAEGAN(
            encoder(),
            generator(),
            nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh()),
            discriminator(HIDDEN),
            latent=LATENT,
        ),
        _x,
    ),
    "WakeSleep": Entry(lambda: uf.models.WakeSleep(encoder(), decoder(), latent=LATENT), _binary),
    "ReweightedWakeSleep": Entry(
        lambda: uf.models.ReweightedWakeSleep(
            mlp(PIXELS, LATENT), decoder(), latent=LATENT, latents="bernoulli", num_samples=5
        ),
        _binary,
    ),
}


def build(name: str, *, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return ZOO[name].build()


def batch_of(name: str, start: int = 0, size: int = BATCH) -> Any:
    x, labels = digits()
    window = slice(start, start + size)
    return ZOO[name].batch(x[window], labels[window])
