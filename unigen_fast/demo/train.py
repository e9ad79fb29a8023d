"""Four models of the same two networks, and the one loop that trains them. Made to be copied."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.demo.networks import LATENT, Networks
from unigen_fast.models import Model
from unigen_fast.models._model import Losses

Curve = dict[str, list[float]]
Progress = Callable[[int, str], Iterable[int]]  # (steps, title) -> range(steps), with a progress bar or without

# ---- the models ------------------------------------------------------------------------------------------------------

# `of` is `uf.models`, or `plain`, the same models with the losses of plain PyTorch
MODELS: dict[str, Callable[[Networks, Any], Any]] = {
    "GAN": lambda n, of: of.GAN(nn.Sequential(n.generator, nn.Sigmoid()), n.discriminator, latent=LATENT),
    "IWGAN": lambda n, of: of.IWGAN(nn.Sequential(n.generator, nn.Sigmoid()), n.discriminator, latent=LATENT),
    "VAE": lambda n, of: of.VAE(n.encoder, n.generator, latent=LATENT),
    # samples of 0 and 1, as the data are: means, which are grey, a discriminator would know by that
    "AAVAE": lambda n, of: of.AAVAE(n.encoder, n.generator, n.discriminator, latent=LATENT, fakes="sample"),
}

# DCGAN's Adam, with larger steps: these networks are small and the training is short
ADAM: dict[str, dict[str, Any]] = {
    "discriminator": {"lr": 1e-3, "betas": (0.5, 0.999)},
    "generator": {"lr": 2e-3, "betas": (0.5, 0.999)},
    "autoencoder": {"lr": 2e-3},
}


def optimizers_of(model: Model) -> dict[str, torch.optim.Optimizer]:
    return {phase: torch.optim.Adam(model.parameters_of(phase), **ADAM[phase]) for phase in model.phases}


def observed(model: Model, x: Tensor) -> Tensor:
    """Digits as the model's p(x|z) gives them: of a Bernoulli 0 or 1, drawn anew each time; of a GAN grey."""
    return torch.bernoulli(x) if isinstance(model, uf.models.VAE) else x


# ---- the loop --------------------------------------------------------------------------------------------------------


def step(model: Model, optimizers: Mapping[str, torch.optim.Optimizer], batch: Tensor) -> dict[str, Losses]:
    """One update of each phase; what is minimised, and of which parameters, the model says."""
    return {phase: update(model, optimizers[phase], phase, batch) for phase in model.phases}


def update(model: Model, optimizer: torch.optim.Optimizer, phase: str, batch: Any) -> Losses:
    losses = model.losses(phase, batch)
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def train(
    model: Model,
    digits: Tensor,
    evaluate: Callable[[Any], Mapping[str, float]],
    *,
    steps: int,
    batch_size: int,
    progress: Progress,
    title: str,
    entries: int = 25,
) -> Curve:
    """The curve: means over the steps since the entry before, as "phase.loss", and what `evaluate` finds."""
    optimizers = optimizers_of(model)
    curve: Curve = defaultdict(list)
    recent: dict[str, list[Tensor]] = defaultdict(list)
    due = {round(steps * (i + 1) / entries) for i in range(entries)} | {steps}
    seconds, start = 0.0, time.perf_counter()
    for n in progress(steps, title):
        batch = digits[torch.randint(len(digits), (batch_size,)).to(digits.device)]
        for phase, losses in step(model, optimizers, observed(model, batch)).items():
            for name, value in losses.items():
                recent[f"{phase}.{name}"].append(value)
        if n + 1 in due:
            synchronize(digits)
            seconds += time.perf_counter() - start
            entry = {name: torch.stack(values).mean().item() for name, values in recent.items()}
            for name, number in {"step": n + 1, "seconds": seconds, **entry, **evaluate(model)}.items():
                curve[name].append(number)
            recent.clear()
            start = time.perf_counter()
    return curve


def synchronize(tensor: Tensor) -> None:
    """Waits for the GPU, where there is one, before a clock is read."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
