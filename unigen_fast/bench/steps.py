"""Whole training steps: what replacing the loss lines does to a step of the optimizer, networks and all.

A row says how much faster a loss has become; a step, how much of that is left where networks and Adam take their time
as well. Networks, data, noise and Adam are the same for every contestant, and eager: ours, theirs, and theirs under
`torch.compile` differ in the loss lines alone. In the steps named `step_compiled_…`, small ones, networks and loss are
one graph of `torch.compile(fullgraph=True)`, with our loss lines as with theirs: what is left of a kernel that the
compiler cannot fuse with its neighbours. Beside them the step is timed without a loss, its backward pass starting
from gradients that are there already: what no loss, however fast, can take away.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unigen_fast as uf
from unigen_fast.bench import cases, harness
from unigen_fast.bench.cases import Input
from unigen_fast.bench.harness import FUSED

_NETWORK = "network"
_TOLERANCE = 1e-4
# too small to move the parameters: a contestant that has made more steps than another still has the same numbers
_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class TrainingStep:
    """`networks` makes a module whose forward takes the inputs and returns what the losses take, in order.

    `fused` and `eager` return the scalar to minimise. `one_graph`: networks and loss are compiled as one, but for the
    contestant that is eager.
    """

    name: str
    stands_for: str
    sizes: str
    inputs: tuple[Input, ...]
    networks: Callable[[], nn.Module]
    fused: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    one_graph: bool = False


def _data(*shape: int, draw: cases.Draw = cases._normal) -> Input:
    return Input(shape, gradient=False, draw=draw)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# ---- autoencoders ----------------------------------------------------------------------------------------------------


class _Autoencoder(nn.Module):
    """Returns logits, x, z, mean, logvar; with `samples`, logits and z have that many along dimension 1."""

    def __init__(self, pixels: int, hidden: int, latent: int, samples: int | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder = _mlp(pixels, hidden, 2 * latent), _mlp(latent, hidden, pixels)
        self.samples = samples

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        mean, logvar = self.encoder(x).chunk(2, dim=-1)
        center, spread = mean, torch.exp(0.5 * logvar)
        if self.samples is not None:
            center, spread = (t.unsqueeze(1).expand(-1, self.samples, -1) for t in (center, spread))
        z = center + spread * (torch.randn_like(center) if noise is None else noise)
        return self.decoder(z), x, z, mean, logvar


def _fused_iwae(logits: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return uf.iwae_objective(logits, x, z, mean, logvar, dim=1).loss


def _iwae(logits: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    mean, logvar = mean.unsqueeze(1), logvar.unsqueeze(1)
    log_px = cases._bernoulli(logits, x.unsqueeze(1))
    log_pz = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    return -cases._log_mean_exp(log_px + log_pz - cases._gaussian(z, mean, logvar)).mean()


def iwae_mnist(
    batch: int = 100, samples: int = 50, pixels: int = 784, hidden: int = 512, latent: int = 16
) -> TrainingStep:
    return TrainingStep(
        "step_iwae_mnist",
        "pythae's IWAE on MNIST",
        f"MLPs {pixels}-{hidden}-2×{latent} and {latent}-{hidden}-{pixels}, batch {batch}, {samples} samples each",
        (_data(batch, pixels, draw=cases._pixels),),
        lambda: _Autoencoder(pixels, hidden, latent, samples),
        _fused_iwae,
        _iwae,
    )


_BETA = 6.0


def _fused_beta_tcvae(logits: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    information, correlation, kl = cases._fused_total_correlation(z, mean, logvar)
    return (information + _BETA * correlation + kl - uf.bernoulli_log_prob(logits, x)).mean()


def _beta_tcvae(logits: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    information, correlation, kl = cases._total_correlation(z, mean, logvar)
    return (information + _BETA * correlation + kl - cases._bernoulli(logits, x)).mean()


def beta_tcvae(batch: int = 1024, pixels: int = 784, hidden: int = 512, latent: int = 64) -> TrainingStep:
    return TrainingStep(
        "step_beta_tcvae",
        "beta-TCVAE with a large batch",
        f"MLPs {pixels}-{hidden}-2×{latent} and {latent}-{hidden}-{pixels}, batch {batch}",
        (_data(batch, pixels, draw=cases._pixels),),
        lambda: _Autoencoder(pixels, hidden, latent),
        _fused_beta_tcvae,
        _beta_tcvae,
    )


# ---- world models ----------------------------------------------------------------------------------------------------


class _WorldModel(nn.Module):
    """Dreamer's recurrent state-space model, on flat observations: returns the posterior's logits, the prior's, and the
    loss of the other heads, which is everybody's."""

    def __init__(self, observation: int, actions: int, units: int, latents: int, classes: int) -> None:
        super().__init__()
        latent = latents * classes
        self.units, self.latents, self.classes = units, latents, classes
        self.encoder = _mlp(observation, units, units)
        self.before = nn.Sequential(nn.Linear(latent + actions, units), nn.ReLU())
        self.core = nn.GRUCell(units, units)
        self.posterior, self.prior = _mlp(2 * units, units, latent), _mlp(units, units, latent)
        self.decoder, self.reward = _mlp(units + latent, units, observation), _mlp(units + latent, units, 1)
        for head in (self.posterior, self.prior):  # KLs of several nats, as in training, not below the free nat
            nn.init.normal_(head[-1].weight, std=6 / math.sqrt(units))  # type: ignore[arg-type]

    def forward(self, observations: Tensor, actions: Tensor, rewards: Tensor) -> tuple[Tensor, ...]:
        batch, time = observations.shape[:2]
        seen = self.encoder(observations)
        state = seen.new_zeros(batch, self.units)
        sample = seen.new_zeros(batch, self.latents * self.classes)
        states, posteriors, samples = [], [], []
        for t in range(time):
            state = self.core(self.before(torch.cat((sample, actions[:, t]), -1)), state)
            logits = self.posterior(torch.cat((state, seen[:, t]), -1)).view(batch, self.latents, self.classes)
            sample = self._sample(logits).flatten(1)
            states.append(state)
            posteriors.append(logits)
            samples.append(sample)
        after = torch.stack(states, 1)
        prior = self.prior(after).unflatten(-1, (self.latents, self.classes))
        features = torch.cat((after, torch.stack(samples, 1)), -1)
        heads = F.mse_loss(self.decoder(features), observations) + F.mse_loss(self.reward(features), rewards)
        return torch.stack(posteriors, 1), prior, heads

    def _sample(self, logits: Tensor) -> Tensor:
        """One-hot, with the gradient of the probabilities."""
        probabilities = cases._unimix(logits)
        chosen = torch.multinomial(probabilities.detach().flatten(0, 1), 1).view(logits.shape[:2])
        return F.one_hot(chosen, self.classes) + (probabilities - probabilities.detach())


def _fused_dreamer(posterior: Tensor, prior: Tensor, heads: Tensor) -> Tensor:
    return heads + uf.balanced_categorical_kl(posterior, prior, unimix=0.01).loss


def _dreamer(posterior: Tensor, prior: Tensor, heads: Tensor) -> Tensor:
    return heads + cases._dreamer(posterior, prior)


def dreamer_kl(
    batch: int = 16,
    time: int = 64,
    observation: int = 1024,
    actions: int = 6,
    units: int = 256,
    latents: int = 32,
    classes: int = 32,
) -> TrainingStep:
    return TrainingStep(
        "step_dreamer_kl",
        "a small DreamerV3's world model, on flat observations",
        f"GRU and MLPs of {units} units, {latents}×{classes} latents, observations of {observation}, "
        f"batch {batch}, {time} time steps",
        (_data(batch, time, observation), _data(batch, time, actions), _data(batch, time, 1)),
        lambda: _WorldModel(observation, actions, units, latents, classes),
        _fused_dreamer,
        _dreamer,
    )


# ---- discriminators --------------------------------------------------------------------------------------------------


class _Discriminators(nn.Module):
    """Several, each on real and on fake: returns the logits of all real, then of all fake."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(1, channels, 15, stride=5, padding=7),
                nn.LeakyReLU(0.1),
                nn.Conv1d(channels, 2 * channels, 5, stride=2, padding=2),
                nn.LeakyReLU(0.1),
                nn.Conv1d(2 * channels, 1, 3, padding=1),
                nn.Flatten(),
            )
            for _ in range(count)
        )

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        return tuple(discriminator(x) for x in (real, fake) for discriminator in self.discriminators)


def vocoder_discriminator(
    batch: int = 64, segment: int = 8192, discriminators: int = 6, channels: int = 8
) -> TrainingStep:
    row = cases.ROWS["vits_discriminator"]
    return TrainingStep(
        "step_vocoder_discriminator",
        "VITS and HiFi-GAN's discriminator step, with far smaller networks",
        f"{discriminators} × 3 Conv1d of {channels}, {2 * channels} and 1 channels, batch {batch} of {segment} samples",
        (_data(batch, 1, segment),) * 2,
        lambda: _Discriminators(discriminators, channels),
        row.fused,
        row.eager,
    )


# ---- networks and loss in one graph ----------------------------------------------------------------------------------


class _Critic(nn.Module):
    """Returns the logits of real and of fake."""

    def __init__(self, pixels: int, hidden: int) -> None:
        super().__init__()
        self.network = _mlp(pixels, hidden, hidden, 1)

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        return self.network(torch.cat((real, fake))).chunk(2)


class _Generator(nn.Module):
    """Returns a discriminator's logits of what is generated."""

    def __init__(self, latent: int, hidden: int, pixels: int) -> None:
        super().__init__()
        self.generator, self.discriminator = _mlp(latent, hidden, pixels), _mlp(pixels, hidden, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.discriminator(self.generator(z)),)


def _binary_cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits
    return loss(real, torch.ones_like(real)) + loss(fake, torch.zeros_like(fake))


def _vae(logits: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
    return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl) / len(x)


def _fused_vae(logits: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return uf.elbo_loss(logits, x, mean, logvar).loss


def _fused_vae_of_parts(logits: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return uf.gaussian_kl(mean, logvar) - uf.bernoulli_log_prob(logits, x).mean()


def _log_weights(logits: Tensor, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """In PyTorch, for both sides."""
    log_pz = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    of_q = cases._gaussian(z, mean.unsqueeze(1), logvar.unsqueeze(1))
    return cases._bernoulli(logits, x.unsqueeze(1)) + log_pz - of_q


def compiled_steps(
    batch: int = 128, samples: int = 8, pixels: int = 784, hidden: int = 128, latent: int = 16
) -> list[TrainingStep]:
    """One for the functions of each family that people train with most."""
    x, z = _data(batch, pixels, draw=cases._pixels), _data(batch, latent)
    of_samples = _data(batch, samples, latent)
    autoencoder = f"MLPs {pixels}-{hidden}-2×{latent} and {latent}-{hidden}-{pixels}, batch {batch}"

    def step(
        name: str,
        stands_for: str,
        sizes: str,
        inputs: tuple[Input, ...],
        networks: Callable[[], nn.Module],
        fused: Callable[..., Tensor],
        eager: Callable[..., Tensor],
    ) -> TrainingStep:
        return TrainingStep(f"step_compiled_{name}", stands_for, sizes, inputs, networks, fused, eager, one_graph=True)

    return [
        step("elbo", "`elbo_loss` in a small VAE", autoencoder, (x, z),
             lambda: _Autoencoder(pixels, hidden, latent), _fused_vae, _vae),
        step("kl_likelihood", "`gaussian_kl` and `bernoulli_log_prob` in a small VAE", autoencoder, (x, z),
             lambda: _Autoencoder(pixels, hidden, latent), _fused_vae_of_parts, _vae),
        step("iwae", "`iwae_loss` in a small IWAE", f"{autoencoder}, {samples} samples each", (x, of_samples),
             lambda: _Autoencoder(pixels, hidden, latent, samples),
             lambda *outputs: uf.iwae_loss(_log_weights(*outputs), dim=1),
             lambda *outputs: -cases._log_mean_exp(_log_weights(*outputs)).mean()),
        step("iwae_objective", "`iwae_objective` in a small IWAE", f"{autoencoder}, {samples} samples each",
             (x, of_samples), lambda: _Autoencoder(pixels, hidden, latent, samples), _fused_iwae, _iwae),
        step("discriminator", "`discriminator_loss` in a small GAN", f"MLP {pixels}-{hidden}-{hidden}-1, batch {batch}",
             (x, x), lambda: _Critic(pixels, hidden),
             lambda real, fake: uf.discriminator_loss(real=real, fake=fake), _binary_cross_entropy),
        step("iwgan_generator", "`importance_weighted_generator_loss` in a small IWGAN",
             f"MLPs {latent}-{hidden}-{pixels} and {pixels}-{hidden}-1, batch {batch}", (z,),
             lambda: _Generator(latent, hidden, pixels),
             lambda fake: uf.importance_weighted_generator_loss(fake=fake.flatten()),
             lambda fake: cases._iwgan(fake.flatten())),
    ]  # fmt: skip


STEPS: dict[str, TrainingStep] = {
    step.name: step for step in (iwae_mnist(), dreamer_kl(), beta_tcvae(), vocoder_discriminator(), *compiled_steps())
}


# ---- figures ---------------------------------------------------------------------------------------------------------


class Training:
    """A step on one device, with its data drawn and its parameters at their first values."""

    def __init__(self, step: TrainingStep, device: torch.device) -> None:
        self.step, self.device = step, device
        generator = torch.Generator(device).manual_seed(0)
        self.data = [torch.empty(item.shape, device=device) for item in step.inputs]
        for item, x in zip(step.inputs, self.data, strict=True):
            item.draw(x, generator)
        torch.manual_seed(0)
        self.networks = step.networks().to(device)

    def run(self, contestant: str) -> harness.Step:
        """One training step of the contestant's own copy of the networks; or, for "network", one without a loss."""
        networks = copy.deepcopy(self.networks)
        optimizer = torch.optim.Adam(networks.parameters(), lr=_LEARNING_RATE)
        forward_and_backward = (self._without_loss if contestant == _NETWORK else self._with_loss)(networks, contestant)

        def train() -> None:
            forward_and_backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return train

    def _compiled(self, function: Callable[..., Any], contestant: str) -> Callable[..., Any]:
        """As this contestant runs it; ours, and the networks alone, in the compiler's default mode."""
        mode = "compile" if contestant in (FUSED, _NETWORK) else contestant
        return harness.peer_function(function, mode, self.device)

    def _with_loss(self, networks: nn.Module, contestant: str) -> Callable[[], None]:
        loss = self.step.fused if contestant == FUSED else self.step.eager
        if self.step.one_graph:
            whole = self._compiled(lambda *data: loss(*networks(*data)), contestant)
            return lambda: whole(*self.data).backward()
        if contestant != FUSED:
            loss = self._compiled(loss, contestant)
        return lambda: loss(*networks(*self.data)).backward()

    def _without_loss(self, networks: nn.Module, contestant: str) -> Callable[[], None]:
        """From the gradients that the loss has at the first parameters: no part of a loss is in the step."""
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in self.networks(*self.data)]
        self.step.eager(*leaves).backward()
        reached = [i for i, leaf in enumerate(leaves) if leaf.grad is not None]
        forward = self._compiled(networks, contestant) if self.step.one_graph else networks

        def run() -> None:
            outputs = forward(*self.data)
            torch.autograd.backward([outputs[i] for i in reached], [leaves[i].grad for i in reached])

        return run

    def check(self) -> None:
        """Raises AssertionError unless loss and parameters' gradients equal those of eager's loss lines in float64."""
        got = self._loss_and_gradients(self.step.fused)
        want = self._loss_and_gradients(lambda *outputs: self.step.eager(*(t.double() for t in outputs)))
        for name, w in want.items():
            scale, error = w.abs().max().item(), (got[name] - w).abs().max().item()
            if not 0 < scale < math.inf:
                raise AssertionError(f"{name}: {scale} throughout, which proves nothing")
            if not error <= _TOLERANCE * scale:  # a NaN is an error too
                raise AssertionError(
                    f"{name}: fused differs from eager by {error:.3g}, of {scale:.3g} (tolerance {_TOLERANCE:.0e})"
                )

    def _loss_and_gradients(self, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)  # the same noise for everybody
        value = loss(*self.networks(*self.data))
        names, parameters = zip(*self.networks.named_parameters(), strict=True)
        gradients = torch.autograd.grad(value, parameters)
        return {"loss": value.detach()} | {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}


def measure(step: TrainingStep, device: torch.device, seconds: float, compiled: bool) -> dict[str, Any]:
    """The step's figures (see README.md in benches/), or with "error" set why there are none."""
    result: dict[str, Any] = {
        "step": step.name,
        "stands_for": step.stands_for,
        "sizes": step.sizes,
        "contestants": {},
        "missing": {},
        "network": None,
        "fastest_peer": None,
        "ratio": None,
        "loss_shares": None,
        "error": None,
    }
    try:
        _measure(result, step, device, seconds, compiled)
    except Exception as error:  # whatever is wrong with this step, the others can still be measured
        result["error"] = harness._one_line(error)
    return result


def _measure(result: dict[str, Any], step: TrainingStep, device: torch.device, seconds: float, compiled: bool) -> None:
    harness.keep_freed_memory()
    training = Training(step, device)
    training.check()
    names = [*harness.contestants(device, compiled), _NETWORK]
    figures = harness.time_and_memory({name: training.run(name) for name in names}, device, seconds, result["missing"])
    network = figures.pop(_NETWORK)
    peer = min((name for name in figures if name != FUSED), key=lambda name: figures[name]["seconds"])
    result.update(
        contestants=figures,
        network=network,
        fastest_peer=peer,
        ratio=figures[peer]["seconds"] / figures[FUSED]["seconds"],
        loss_shares={name: max(0.0, 1 - network["seconds"] / figures[name]["seconds"]) for name in (FUSED, peer)},
    )
