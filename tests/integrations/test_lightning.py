"""The callback `LossStatistics` in Lightning's own trainer: what it logs, and that training does not notice."""

import importlib
import itertools
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unigen_fast as uf

PACKAGES = [name for name in ("lightning.pytorch", "pytorch_lightning") if importlib.util.find_spec(name.split(".")[0])]
if not PACKAGES:
    pytest.skip("no lightning", allow_module_level=True)

from unigen_fast.integrations.lightning import LossStatistics  # noqa: E402

LATENT, SAMPLES, EVERY = 5, 4, 3


class Counted(nn.Module):
    """A network that counts its passes."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        pairs = itertools.pairwise(sizes)
        self.layers = nn.Sequential(*(layer for pair in pairs for layer in (nn.Linear(*pair), nn.Tanh())))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.layers(x)


def modules(pl):
    """Lightning modules of the two sides of the paper; each keeps what its last loss was given."""

    class Base(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Counted(12, 2 * LATENT), Counted(LATENT, 12)
            self.given: dict[str, Tensor] = {}

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    class VAE(Base):
        def training_step(self, batch, batch_idx):
            mean, logvar = self.encoder(batch[0]).chunk(2, -1)
            self.given = {"mean": mean, "logvar": logvar}
            z = uf.sample_gaussian(mean, logvar)
            return uf.elbo_loss(self.decoder(z), batch[0], mean, logvar).loss

    class IWAE(Base):
        def training_step(self, batch, batch_idx):
            mean, logvar = self.encoder(batch[0]).chunk(2, -1)
            z = uf.sample_gaussian(mean, logvar, num_samples=SAMPLES)
            found = uf.iwae_objective(self.decoder(z), batch[0], z, mean, logvar, dim=0)
            self.given = {"mean": mean, "logvar": logvar, "log_w": found.log_w}
            return found.loss

    class GAN(Base):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.discriminator, self.far = Counted(12, 1), Counted(12, 3)

        def configure_optimizers(self):
            generator = torch.optim.Adam(self.decoder.parameters(), lr=1e-2)
            both = [*self.discriminator.parameters(), *self.far.parameters()]
            return generator, torch.optim.Adam(both, lr=1e-2)

        def training_step(self, batch, batch_idx):
            generator, discriminator = self.optimizers()
            x = batch[0]
            made = self.decoder(torch.randn(len(x), LATENT))
            real = [self.discriminator(x), self.far(x)]
            fake = [self.discriminator(made.detach()), self.far(made.detach())]
            discriminator.zero_grad()
            self.manual_backward(uf.discriminator_loss(real=real, fake=fake, kind="hinge"))
            discriminator.step()
            logits = self.discriminator(made)
            generator.zero_grad()
            self.manual_backward(uf.importance_weighted_generator_loss(fake=logits))
            generator.step()
            self.given = {"real": real, "fake": fake, "logits": logits}

    return {"vae": VAE, "iwae": IWAE, "gan": GAN}


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest):
    return importlib.import_module(request.param)


def trained(pl, module, *callbacks, steps: int = 7, epochs: int = 1, precision: str = "32-true"):
    pixels = (torch.rand(steps * 6, 12, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels), batch_size=6)
    logger = Kept.of(pl)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", log_every_n_steps=EVERY, logger=logger, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, precision=precision
    )  # fmt: skip
    trainer.fit(module, data)
    return logger.rows


class Kept:
    """Of a package's loggers: one that keeps what it is given."""

    @staticmethod
    def of(pl):
        class Logger(pl.loggers.logger.Logger):
            name, version = "kept", 0

            def __init__(self) -> None:
                super().__init__()
                self.rows: dict[int, dict[str, float]] = {}

            def log_metrics(self, metrics, step=None):
                self.rows.setdefault(step, {}).update(metrics)

            def log_hyperparams(self, *args, **kwargs):
                pass

        return Logger()


def expected(given) -> dict[str, float]:
    """By hand, of what the last logged loss was given."""
    found = {}
    if "mean" in given:
        mean, logvar = given["mean"].detach().double(), given["logvar"].detach().double()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean(0)
        found |= {f"kl/dimension/{i}": value.item() for i, value in enumerate(kl)}
        found |= {"kl/total": kl.sum().item(), "kl/active_units": (mean.var(0, correction=0) > 0.01).sum().item()}
    log_w = given["logits"].flatten()[:, None] if "logits" in given else given.get("log_w")
    if log_w is not None:
        weights = F.softmax(log_w.detach().double(), 0)
        found["importance/effective_sample_size"] = (1 / weights.square().sum(0)).mean().item()
    if "real" in given:
        for side, right in (("real", torch.gt), ("fake", torch.le)):
            each = [x.detach().double() for x in given[side]]
            found[f"discriminator/{side}_accuracy"] = sum(right(x, 0).double().mean().item() for x in each) / 2
            found[f"discriminator/{side}_mean_logit"] = sum(x.mean().item() for x in each) / 2
            found[f"discriminator/{side}_mean_probability"] = sum(x.sigmoid().mean().item() for x in each) / 2
    return found


@pytest.mark.parametrize("name", ["vae", "iwae", "gan"])
def test_logs_what_the_losses_know(pl, name):
    torch.manual_seed(0)
    module = modules(pl)[name]()
    rows = trained(pl, module, LossStatistics(), steps=2 * EVERY)
    want = expected(module.given)
    assert list(rows) == [EVERY - 1, 2 * EVERY - 1]
    for row in rows.values():
        assert set(row) - {"epoch"} == set(want)
    for key, value in want.items():
        assert rows[2 * EVERY - 1][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", ["vae", "iwae", "gan"])
def test_training_does_not_notice(pl, name):
    ends = []
    for callbacks in ([], [LossStatistics()]):
        torch.manual_seed(0)
        module = modules(pl)[name]()
        trained(pl, module, *callbacks)
        passes = [net.passes for net in module.modules() if isinstance(net, Counted)]
        ends.append((module.state_dict(), torch.get_rng_state(), passes))
    (plain, plain_random, plain_passes), (ours, random, passes) = ends
    assert all(torch.equal(plain[key], ours[key]) for key in plain)
    assert torch.equal(plain_random, random)
    assert plain_passes == passes


def test_nothing_is_read_back_between_logged_steps(pl, monkeypatch):
    """A number that goes to the host waits for the device."""
    reads = []
    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        theirs = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda x, *a, theirs=theirs, **k: (reads.append(1), theirs(x, *a, **k))[1])
    counts, callback = [], LossStatistics()
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        module = modules(pl)["vae"]()
        reads.clear()
        trained(pl, module, *callbacks, steps=EVERY - 1)
        counts.append(len(reads))
    assert counts[0] == counts[1]
    assert callback.statistics == {}


def test_functions_are_ours_again_at_the_end(pl):
    before = uf.elbo_loss, uf.objectives.elbo_loss, uf.discriminator_loss
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(uf.elbo_loss is before[0])

    callback = LossStatistics()
    for _ in range(2):
        trained(pl, modules(pl)["vae"](), Look(), callback)
        assert (uf.elbo_loss, uf.objectives.elbo_loss, uf.discriminator_loss) == before
    assert seen == [False] * len(seen) != []
    assert callback.statistics["kl/dimension"].shape == (LATENT,)


def test_functions_are_ours_again_after_an_error(pl):
    before = uf.elbo_loss

    class Broken(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            uf.elbo_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 1), torch.zeros(2, 1))

    with pytest.raises(ValueError, match="x: got shape"):
        trained(pl, Broken(), LossStatistics())
    assert uf.elbo_loss is before


def test_a_second_call_has_its_own_name(pl):
    class Twice(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + uf.gaussian_kl(*self.given.values(), event_ndims=1)

    row = trained(pl, Twice(), LossStatistics())[EVERY - 1]
    assert row["kl_2/total"] == pytest.approx(row["kl/total"], rel=1e-6)


def test_masked_rows_do_not_count(pl):
    class Masked(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            mean, logvar = self.encoder(batch[0]).chunk(2, -1)
            mask = (torch.arange(len(mean)) < 2).to(mean)
            self.given = {"mean": mean[:2], "logvar": logvar[:2]}
            return uf.gaussian_kl(mean, logvar, weights=mask, normalize_weights=True)

    module = Masked()
    row = trained(pl, module, LossStatistics(), steps=EVERY)[EVERY - 1]
    for key, value in expected(module.given).items():
        assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_a_mask_of_zeros_is_zero(pl):
    class Masked(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            mean, logvar = self.encoder(batch[0]).chunk(2, -1)
            return uf.gaussian_kl(mean, logvar, weights=torch.zeros(len(mean)), normalize_weights=True)

    row = trained(pl, Masked(), LossStatistics(), steps=EVERY)[EVERY - 1]
    assert row["kl/total"] == row["kl/active_units"] == 0


def test_mixed_precision(pl):
    module = modules(pl)["vae"]()
    row = trained(pl, module, LossStatistics(), steps=EVERY, precision="bf16-mixed")[EVERY - 1]
    assert module.given["mean"].dtype == torch.bfloat16
    for key, value in expected(module.given).items():
        assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_a_batch_that_is_skipped(pl):
    """And with it the rest of the epoch: Lightning starts it and never ends it."""

    class Skipping(modules(pl)["vae"]):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == EVERY - 1 and self.current_epoch == 0 else None

    rows = trained(pl, Skipping(), LossStatistics(), steps=EVERY, epochs=2)
    assert rows
    assert not any(key.startswith("kl_2") for row in rows.values() for key in row)


@pytest.mark.parametrize("how", ["distribution", "bernoulli", "categorical", "wide"])
def test_other_posteriors(pl, how):
    """torch.distributions' shape, of which the last dimension is the latent's; discrete ones; too many to log each."""
    torch.manual_seed(0)

    class Other(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            mean, logvar = self.encoder(batch[0]).chunk(2, -1)
            self.given = {"mean": mean, "logvar": logvar}
            if how == "distribution":
                return uf.gaussian_kl(mean, logvar, event_ndims=0)
            if how == "bernoulli":
                return uf.bernoulli_kl(mean)
            if how == "categorical":
                return uf.categorical_kl(torch.stack([mean, logvar], -1))
            return uf.gaussian_kl(mean.repeat(1, 20), logvar.repeat(1, 20))

    module = Other()
    row = trained(pl, module, LossStatistics(), steps=EVERY)[EVERY - 1]
    mean, logvar = (t.detach() for t in module.given.values())
    if how == "wide":
        assert not any(key.startswith("kl/dimension") for key in row)
        assert row["kl/total"] == pytest.approx(20 * expected(module.given)["kl/total"], rel=1e-5)
        return
    if how == "distribution":
        want = {key: value for key, value in expected(module.given).items() if key.startswith("kl/dim")}
    else:
        p = mean.sigmoid() if how == "bernoulli" else (mean - logvar).sigmoid()
        kl = (p * p.log() + (1 - p) * (1 - p).log() + math.log(2)).mean(0)
        want = {f"kl/dimension/{i}": value.item() for i, value in enumerate(kl)}
        assert "kl/active_units" not in row
    for key, value in want.items():
        assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


WEIGHTED = {
    "iwae_loss": lambda log_w: uf.iwae_loss(log_w, dim=0),
    "ciwae_loss": lambda log_w: uf.ciwae_loss(log_w, dim=0, beta=0.5),
    "importance_weights": lambda log_w: (uf.importance_weights(log_w, dim=0) * log_w).sum(),
    "importance_weighted_sum": lambda log_w: uf.importance_weighted_sum(log_w, log_w, dim=0).sum(),
    "vimco_loss": lambda log_w: uf.vimco_loss(log_w, log_w, dim=0),
    "dreg_loss": lambda log_w: uf.dreg_loss(log_w, log_w, dim=0),
    "rws_losses": lambda log_w: sum(uf.rws_losses(log_w, torch.zeros_like(log_w), dim=0)),
    "generator": lambda log_w: uf.importance_weighted_generator_loss(fake=log_w, dim=0),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_loss_of_weights_tells_the_sample_size(pl, name):
    class Weighted(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            log_w = self.encoder(batch[0])
            self.given = {"log_w": log_w}
            return WEIGHTED[name](log_w)

    module = Weighted()
    row = trained(pl, module, LossStatistics(), steps=EVERY)[EVERY - 1]
    assert set(row) - {"epoch"} == {"importance/effective_sample_size"}
    (value,) = expected(module.given).values()
    assert row["importance/effective_sample_size"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", ["miwae_loss", "piwae_losses"])
def test_grouped_weights(pl, name):
    class Grouped(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            log_w = self.encoder(batch[0]).unflatten(1, (2, LATENT))
            self.given = {"log_w": log_w.movedim(2, 0)}
            found = getattr(uf, name)(log_w, sample_dim=2, group_dim=1)
            return found if isinstance(found, Tensor) else found[0]

    module = Grouped()
    row = trained(pl, module, LossStatistics(), steps=EVERY)[EVERY - 1]
    (value,) = expected(module.given).values()
    assert row["importance/effective_sample_size"] == pytest.approx(value, rel=1e-5)


def test_reduction_none_and_statistics_that_were_asked_for(pl):
    kinds = []

    class Asked(modules(pl)["gan"]):
        def training_step(self, batch, batch_idx):
            real, fake = self.discriminator(batch[0]), self.discriminator(-batch[0])
            rows = uf.discriminator_loss(real=real, fake=fake, reduction="none")
            found = uf.discriminator_loss(real=real, fake=fake, return_stats=True)
            kinds.append((rows.shape, len(found)))

    row = trained(pl, Asked(), LossStatistics(), steps=EVERY)[EVERY - 1]
    assert set(kinds) == {((6, 1), 2)}
    assert row["discriminator/real_mean_logit"] == pytest.approx(row["discriminator_2/real_mean_logit"], rel=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_and_compilers_see_the_function_alone(pl, compiled):
    class Transformed(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            mean, logvar = self.encoder(batch[0]).chunk(2, -1)
            if compiled:
                loss = torch.compile(lambda m, v: uf.gaussian_kl(m, v), fullgraph=True, backend="eager")
                return loss(mean, logvar)
            return torch.func.vmap(lambda m, v: uf.gaussian_kl(m, v))(mean, logvar).mean()

    rows = trained(pl, Transformed(), LossStatistics(), steps=EVERY)
    assert not any(key.startswith("kl") for row in rows.values() for key in row)


def test_sees_what_an_integration_calls(pl):
    class Normals(modules(pl)["vae"]):
        def training_step(self, batch, batch_idx):
            mean, logvar = self.encoder(batch[0]).chunk(2, -1)
            self.given = {"mean": mean, "logvar": logvar}
            q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
            return (
                torch.distributions.kl_divergence(
                    q, torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
                )
                .sum(-1)
                .mean()
            )

    module = Normals()
    with uf.integrations.patched("torch_distributions"):
        row = trained(pl, module, LossStatistics(), steps=EVERY)[EVERY - 1]
    for key, value in expected(module.given).items():
        assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_two_callbacks(pl):
    first, second = LossStatistics(), LossStatistics()
    before = uf.elbo_loss
    trained(pl, modules(pl)["vae"](), first, second, steps=EVERY)
    assert uf.elbo_loss is before
    assert torch.equal(first.statistics["kl/dimension"], second.statistics["kl/dimension"])


def test_without_lightning(monkeypatch):
    """A clear error where neither package is there."""
    ours = "unigen_fast.integrations.lightning"
    for name in [*PACKAGES, "lightning"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, ours)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module(ours)
