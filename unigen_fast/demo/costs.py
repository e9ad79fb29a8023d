"""What the losses cost in a training step, ours against plain PyTorch, and that both give the same values.

The steps themselves are timed, those of `train.py` and of `plain.py`: whole, and once more with networks that only hand
out what they were seen to compute, and an optimizer that does nothing. What is left of the step then is the losses,
drawing z and building log-weights included.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.demo import plain, train
from unigen_fast.demo.networks import Adversaries, Autoencoder
from unigen_fast.demo.train import AdversarialOptimizers

Step = Callable[..., Any]
Call = Callable[[], Any]

STEPS: dict[str, tuple[Step, Step]] = {  # ours, plain PyTorch's
    "VAE": (train.vae_step, plain.vae_step),
    "IWAE": (train.iwae_step, plain.iwae_step),
    "GAN": (train.gan_step, plain.gan_step),
    "IWGAN": (train.iwgan_step, plain.iwgan_step),
}


@dataclass
class Agreement:
    """Largest differences between ours and plain PyTorch, relative to the largest value."""

    loss: float
    gradient: float


@dataclass
class Cost:
    """Median milliseconds of one training step, and of its losses alone, forward and backward."""

    loss_ms: float
    step_ms: float
    plain_loss_ms: float
    plain_step_ms: float

    @property
    def share(self) -> float:
        return self.loss_ms / self.step_ms

    @property
    def plain_share(self) -> float:
        return self.plain_loss_ms / self.plain_step_ms

    @property
    def speedup(self) -> float:
        """Of the whole step."""
        return self.plain_step_ms / self.step_ms

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"share": self.share, "plain_share": self.plain_share, "speedup": self.speedup}


# ---- values ----------------------------------------------------------------------------------------------------------


def agreement(name: str, model: Autoencoder | Adversaries, x: Tensor, seed: int) -> Agreement:
    """Both steps on the same batch, parameters and noise, without an update."""
    our_step, plain_step = STEPS[name]
    ours, plains = copy.deepcopy(model), copy.deepcopy(model)
    arguments = {}
    if isinstance(model, Autoencoder):
        # a standard normal, drawn from the same seed, is the noise that our step adds
        zeros = x.new_zeros(len(x), model.latent)
        torch.manual_seed(seed)
        arguments["noise"] = _sample(name, zeros, zeros)
    torch.manual_seed(seed)
    our_losses, our_gradients = _losses_and_gradients(our_step, ours, x)
    torch.manual_seed(seed)
    plain_losses, plain_gradients = _losses_and_gradients(plain_step, plains, x, **arguments)
    return Agreement(_difference(our_losses, plain_losses), _difference(our_gradients, plain_gradients))


def _losses_and_gradients(
    step: Step, model: Autoencoder | Adversaries, x: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    if isinstance(model, Adversaries):
        optimizers = AdversarialOptimizers(_Recording(model.discriminator), _Recording(model.generator))  # type: ignore
        losses = step(model, optimizers, x)
        gradients = torch.cat((optimizers.discriminator.gradients, optimizers.generator.gradients))  # type: ignore
        return torch.stack((losses.discriminator, losses.generator)), gradients
    optimizer = _Recording(model)
    loss = step(model, optimizer, x, **arguments)
    return loss, optimizer.gradients


class _Recording:
    """In an optimizer's place: keeps the gradients and leaves the parameters alone."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def zero_grad(self) -> None:
        self.network.zero_grad()

    def step(self) -> None:
        self.gradients = torch.cat([p.grad.flatten() for p in self.network.parameters() if p.grad is not None])


def _sample(name: str, mean: Tensor, logvar: Tensor) -> Tensor:
    """z as the step of this name draws it."""
    if name == "IWAE":
        return uf.sample_gaussian(mean, logvar, num_samples=train.NUM_SAMPLES, sample_dim=1)
    return uf.sample_gaussian(mean, logvar)


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- times -----------------------------------------------------------------------------------------------------------


def cost(name: str, model: Autoencoder | Adversaries, x: Tensor, repeats: int) -> Cost:
    """Each side trains a copy of the model; the two take turns, and take turns at being first."""

    def whole(step: Step) -> Call:
        trained = copy.deepcopy(model)
        if isinstance(trained, Adversaries):
            optimizer: Any = AdversarialOptimizers.of(trained)
        else:
            optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
        return lambda: step(trained, optimizer, x)

    def losses(step: Step) -> Call:
        if isinstance(model, Adversaries):
            replay: Any = _ReplayAdversaries(model, x)
            optimizer: Any = AdversarialOptimizers(replay, replay)
        else:
            replay = optimizer = _ReplayAutoencoder(name, model, x)
        return lambda: step(replay, optimizer, x)

    our_step, plain_step = STEPS[name]
    loss_ms, plain_loss_ms = _alternate(losses(our_step), losses(plain_step), x, 2 * repeats)
    step_ms, plain_step_ms = _alternate(whole(our_step), whole(plain_step), x, repeats)
    return Cost(loss_ms, step_ms, plain_loss_ms, plain_step_ms)


def _alternate(a: Call, b: Call, x: Tensor, repeats: int, warmup: int = 3) -> tuple[float, float]:
    """Median milliseconds of each."""
    times: dict[Call, list[float]] = {a: [], b: []}
    for i in range(warmup + repeats):
        for call in (a, b) if i % 2 else (b, a):
            train.synchronize(x)
            start = time.perf_counter()
            call()
            train.synchronize(x)
            if i >= warmup:
                times[call].append(1000 * (time.perf_counter() - start))
    return statistics.median(times[a]), statistics.median(times[b])


class _Replay(torch.autograd.Function):
    """A recorded output; in backward a recorded gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, output: Tensor, grad_z: Tensor) -> Tensor:
        ctx.grad_z = grad_z
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.grad_z, None, None


class _NoUpdate:
    """An optimizer that only clears the gradients of the recorded outputs."""

    leaves: tuple[Tensor, ...]

    def zero_grad(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def step(self) -> None:
        pass


class _ReplayAutoencoder(_NoUpdate):
    def __init__(self, name: str, model: Autoencoder, x: Tensor) -> None:
        with torch.no_grad():
            mean, logvar = model.encode(x)
            z = _sample(name, mean, logvar)
            self.logits = model.decode(z)
        self.grad_z = torch.randn_like(z)
        self.leaves = (mean.requires_grad_(), logvar.requires_grad_())

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.leaves

    def decode(self, z: Tensor) -> Tensor:
        return _Replay.apply(z, self.logits, self.grad_z)


class _ReplayAdversaries(_NoUpdate):
    def __init__(self, model: Adversaries, x: Tensor) -> None:
        with torch.no_grad():
            self.fake = model.generator(model.noise(len(x)))
            real, fake = model.discriminator(x), model.discriminator(self.fake)
        self.leaves = (real.requires_grad_(), fake.requires_grad_(), fake.clone().requires_grad_())
        self.logits = itertools.cycle(self.leaves)  # the step asks for real, generated, and generated again

    def noise(self, n: int) -> None:
        pass

    def generator(self, noise: None) -> Tensor:
        return self.fake

    def discriminator(self, x: Tensor) -> Tensor:
        return next(self.logits)
