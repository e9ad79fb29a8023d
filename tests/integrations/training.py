"""The libraries' own models on real digits, as their users train them: what tests and measurements share."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unigen_fast.demo.data import load_digits

BATCH = 64


class Training(NamedTuple):
    """A model, its networks' parameters, and what one step on a batch of digits does."""

    parameters: list[Tensor]
    step: Callable[[Tensor], object]


TRAININGS: dict[str, tuple[str, Callable[[], Training]]] = {}


def training(library: str, **options: Any) -> Callable[[Callable[..., Training]], Callable[..., Training]]:
    """A model of the library, made with the options; more than one where they differ."""

    def mark(make: Callable[..., Training]) -> Callable[..., Training]:
        label = "-".join([library, *map(str, options.values())])
        TRAININGS[label] = (library, lambda: make(**options))
        return make

    return mark


def batches(count: int) -> list[Tensor]:
    """`[BATCH, 784]` in [0, 1], the same each time."""
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    pixels = load_digits().train[order].to(torch.get_default_dtype())
    return [pixels[i * BATCH % 3900 :][:BATCH] for i in range(count)]


def descend(parameters: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Training:
    """One optimizer for all parameters."""
    optimizer = torch.optim.Adam(parameters, 1e-3)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()

    return Training(parameters, step)


def parameters_of(*modules: nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def images(x: Tensor) -> Tensor:
    """Three channels of 32 × 32 in [-1, 1]."""
    return nn.functional.pad(x.view(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1) * 2 - 1


# ---- torchrl ---------------------------------------------------------------------------------------------------------


@training("torchrl")
def dreamer() -> Training:
    """A world model of sequences of digits: RSSM with categorical latents, the published separate KL terms."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.modules.models.model_based import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3
    from torchrl.objectives import DreamerV3ModelLoss

    belief, categoricals, classes, bins, time = 64, 8, 8, 15, 8
    state = categoricals * classes
    sizes = {"hidden_dim": 64, "rnn_hidden_dim": belief, "num_categoricals": categoricals, "num_classes": classes}
    prior = TensorDictModule(
        RSSMPriorV3(action_shape=torch.Size([2]), action_dim=2, **sizes),
        in_keys=["state", "belief", "action"],
        out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
    )
    posterior = TensorDictModule(
        RSSMPosteriorV3(obs_embed_dim=64, **sizes),
        in_keys=[("next", "belief"), ("next", "encoded_latents")],
        out_keys=[("next", "posterior_logits"), ("next", "state")],
    )
    latents = [("next", "state"), ("next", "belief")]
    world = TensorDictSequential(
        TensorDictModule(nn.Linear(784, 64), [("next", "pixels")], [("next", "encoded_latents")]),
        RSSMRolloutV3(prior, posterior),
        TensorDictModule(Joined(state + belief, 784), latents, [("next", "reco_pixels")]),
        TensorDictModule(Joined(state + belief, bins), latents, [("next", "reward_logits")]),
    )
    objective = DreamerV3ModelLoss(
        world, kl_mode="separate", unimix=0.01, free_bits=0.1, num_reward_bins=bins, reco_symlog=False
    )

    def loss(x: Tensor) -> Tensor:
        rows = BATCH // time
        data = TensorDict(
            {
                "state": torch.zeros(rows, time, state),
                "belief": torch.zeros(rows, time, belief),
                "action": torch.zeros(rows, time, 2),
                "next": {"pixels": x.view(rows, time, 784), "reward": x.mean(-1).view(rows, time, 1)},
            },
            [rows, time],
        )
        return sum(value.sum() for value in objective(data)[0].values())

    return descend(parameters_of(world), loss)


class Joined(nn.Linear):
    """A linear layer of several inputs side by side."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(torch.cat(inputs, -1))


# ---- pythae ----------------------------------------------------------------------------------------------------------


@training("pythae", name="VAE", reconstruction="bce")
@training("pythae", name="IWAE", reconstruction="bce", number_samples=8)
@training("pythae", name="IWAE", reconstruction="mse", number_samples=8)
@training("pythae", name="CIWAE", reconstruction="mse", number_samples=8, beta=0.3)
@training("pythae", name="MIWAE", reconstruction="mse", number_samples=6, number_gradient_estimates=2)
@training("pythae", name="PIWAE", reconstruction="mse", number_samples=6, number_gradient_estimates=2)
@training("pythae", name="BetaTCVAE", reconstruction="mse")
@training("pythae", name="BetaTCVAE", reconstruction="mse", use_mss=False)
def pythae(name: str, reconstruction: str, **options: Any) -> Training:
    models = importlib.import_module("pythae.models")
    config = getattr(models, f"{name}Config")(
        input_dim=(1, 28, 28), latent_dim=8, reconstruction_loss=reconstruction, **options
    )
    model = getattr(models, name)(config)

    def loss(x: Tensor) -> Tensor:
        return model({"data": x.view(-1, 1, 28, 28)}, dataset_size=4000).loss

    return descend(parameters_of(model), loss)


# ---- diffusers -------------------------------------------------------------------------------------------------------


@training("diffusers")
def autoencoder_kl() -> Training:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=32)

    def loss(x: Tensor) -> Tensor:
        pictures = images(x[:2])
        posterior = model.encode(pictures).latent_dist
        found = model.decode(posterior.sample()).sample
        return ((found - pictures) ** 2).flatten(1).sum(1).mean() + 0.1 * posterior.kl().mean()

    return descend(parameters_of(model), loss)


# ---- scvi-tools ------------------------------------------------------------------------------------------------------


@training("scvi", gene_likelihood="nb")
@training("scvi", gene_likelihood="zinb")
@training("torch_distributions", gene_likelihood="nb")  # its KL
def scvi_vae(gene_likelihood: str) -> Training:
    """scVI's module; a digit's pixels, of 16 levels, are the counts."""
    from scvi.module import VAE

    model = VAE(n_input=784, n_hidden=64, n_latent=8, gene_likelihood=gene_likelihood, use_observed_lib_size=True)

    def loss(x: Tensor) -> Tensor:
        batch = {"X": (x * 15).round(), "batch": torch.zeros(len(x), 1), "labels": torch.zeros(len(x), 1)}
        return model(batch)[2].loss

    return descend(parameters_of(model), loss)


# ---- multivae --------------------------------------------------------------------------------------------------------


@training("multivae", bound="dreg_looser")
@training("multivae", bound="iwae_looser")
def mmvae(bound: str) -> Training:
    """The two halves of a digit."""
    models = importlib.import_module("multivae.models")
    from multivae.data.datasets.base import MultimodalBaseDataset

    sizes = {"top": (1, 14, 28), "bottom": (1, 14, 28)}
    model = models.MMVAE(models.MMVAEConfig(n_modalities=2, latent_dim=8, input_dims=sizes, K=5, loss=bound))

    def loss(x: Tensor) -> Tensor:
        top, bottom = x.view(-1, 1, 28, 28).split(14, 2)
        return model(MultimodalBaseDataset({"top": top, "bottom": bottom})).loss / len(x)

    return descend(parameters_of(model), loss)


@training("multivae", model="CVAE")
def multivae_cvae(model: str) -> Training:
    """A half given the other, with a learned prior: `kl_divergence`."""
    models = importlib.import_module("multivae.models")
    from multivae.data.datasets.base import MultimodalBaseDataset

    sizes = {"top": (1, 14, 28), "bottom": (1, 14, 28)}
    config = models.CVAEConfig(
        n_modalities=2, latent_dim=8, input_dims=sizes, main_modality="bottom", conditioning_modalities=["top"]
    )
    network = getattr(models, model)(config)

    def loss(x: Tensor) -> Tensor:
        top, bottom = x.view(-1, 1, 28, 28).split(14, 2)
        return network(MultimodalBaseDataset({"top": top, "bottom": bottom})).loss

    return descend(parameters_of(network), loss)


# ---- pyro ------------------------------------------------------------------------------------------------------------


@training("pyro", alpha=0.0)
@training("pyro", alpha=0.5)
def renyi(alpha: float) -> Training:
    """pyro's VAE tutorial with the Rényi bound."""
    import pyro
    import pyro.distributions as dist

    pyro.clear_param_store()
    encoder, decoder = (
        nn.Sequential(nn.Linear(a, 64), nn.Softplus(), nn.Linear(64, b)) for a, b in ((784, 16), (8, 784))
    )

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 8), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x.round())

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            mean, log_std = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_std.exp()).to_event(1))

    elbo = pyro.infer.RenyiELBO(alpha=alpha, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    return Training(parameters_of(encoder, decoder), svi.step)


# ---- GANs ------------------------------------------------------------------------------------------------------------


def players(generator: nn.Module, discriminator: nn.Module) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    return tuple(torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (generator, discriminator))


@training("taming", disc_loss="hinge")
@training("taming", disc_loss="vanilla")
def vqgan(disc_loss: str) -> Training:
    """An autoencoder with taming's loss and PatchGAN; without the perceptual network, which would be downloaded."""
    losses = importlib.import_module("taming.modules.losses.vqperceptual")
    perceptual, losses.LPIPS = losses.LPIPS, nn.Identity
    try:
        loss = losses.VQLPIPSWithDiscriminator(
            disc_start=0, disc_num_layers=1, disc_ndf=8, perceptual_weight=0.0, disc_loss=disc_loss
        )
    finally:
        losses.LPIPS = perceptual
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1))
    optimizers = players(network, loss.discriminator)

    def step(x: Tensor) -> None:
        pictures = images(x[:16])
        for index, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            found, _ = loss(torch.zeros(1), pictures, network(pictures), index, 0, last_layer=network[-1].weight)
            found.backward()
            optimizer.step()

    return Training(parameters_of(network, loss.discriminator), step)


@training("torchgan", kind="Minimax")
@training("torchgan", kind="LeastSquares")
@training("torchgan", kind="Wasserstein")
def torchgan(kind: str) -> Training:
    models, losses = (importlib.import_module(f"torchgan.{name}") for name in ("models", "losses"))
    generator = models.DCGANGenerator(encoding_dims=16, out_size=32, out_channels=3, step_channels=8)
    discriminator = models.DCGANDiscriminator(in_size=32, in_channels=3, step_channels=8)
    of_generator, of_discriminator = (getattr(losses, f"{kind}{side}Loss")() for side in ("Generator", "Discriminator"))
    optimizer, other = players(generator, discriminator)

    def step(x: Tensor) -> None:
        pictures = images(x[:32])
        of_discriminator.train_ops(generator, discriminator, other, pictures, torch.device("cpu"))
        of_generator.train_ops(generator, discriminator, optimizer, torch.device("cpu"), len(pictures))

    return Training(parameters_of(generator, discriminator), step)


@training("mimicry", kind="gan")
@training("mimicry", kind="hinge")
@training("mimicry", kind="wasserstein")
def mimicry(kind: str) -> Training:
    nets = importlib.import_module("torch_mimicry.nets.dcgan.dcgan_32")
    generator = nets.DCGANGenerator32(nz=16, ngf=16, loss_type=kind)
    discriminator = nets.DCGANDiscriminator32(ndf=8, loss_type=kind)
    optimizer, other = players(generator, discriminator)
    log = SimpleNamespace(add_metric=lambda *args, **kwargs: None)

    def step(x: Tensor) -> None:
        pictures = images(x[:16]).contiguous()
        common = {"log_data": log, "device": torch.device("cpu")}
        discriminator.train_step((pictures, None), netG=generator, optD=other, **common)
        generator.train_step((pictures, None), netD=discriminator, optG=optimizer, **common)

    return Training(parameters_of(generator, discriminator), step)
