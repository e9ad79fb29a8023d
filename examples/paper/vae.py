"""Tables 2, right, and 3: VAEs against adversary-activated VAEs, on 1 %, 10 % and 100 % of 3600 digits.

    python examples/paper/vae.py                            # an hour on two cores
    python examples/paper/vae.py --size paper --device cuda # larger networks, longer training

Little data is soon overfitted: every run keeps the parameters of its best bound on 400 further digits, the validation
set, and those are what is tested. Both models of a pair begin with the same encoder and decoder, see the same digits,
binarised alike, and take as many steps.
"""

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import common
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.demo import plots
from unigen_fast.demo.train import update

PAIRS = (("VAE", "AAVAE"), ("ConditionalVAE", "AAConditionalVAE"), ("SemiSupervisedVAE", "AASemiSupervisedVAE"))
PER_CLASS = 400  # training digits of each class, the last of them for validation
PER_CLASS_VALIDATION = 40
FRACTIONS = {"1%": 4, "10%": 40, "100%": PER_CLASS - PER_CLASS_VALIDATION}  # digits of each class


@dataclass(frozen=True)
class Settings(common.Autoencoder):
    """The same for both models of a pair, but for the discriminator, which only one has."""

    batch_labelled: int = 10  # of the semi-supervised: labelled digits of a batch, and unlabelled
    batch_unlabelled: int = 40
    steps: Mapping[str, int] = field(default_factory=lambda: {"1%": 1500, "10%": 3000, "100%": 7000})
    steps_semi_supervised: int = 12_000
    classification_weight: float = 100.0
    entries: int = 25  # of the curves: each a validation
    samples: int = 50  # K of the bound of several samples
    test_draws: int = 10  # of z for each digit, in the ELBO of the test
    # of the discriminator: DCGAN's optimizer
    discriminator_hidden: int = 200
    discriminator_learning_rate: float = 2e-4
    fakes: str = "sample"
    grey: bool = False  # train on grey levels instead of pixels drawn from them


SIZES = {
    "tiny": Settings(hidden=8, latent=2, steps=dict.fromkeys(FRACTIONS, 2), steps_semi_supervised=2, entries=2,
                     batch_size=20, batch_unlabelled=10, samples=2, test_draws=1, discriminator_hidden=8),
    "small": Settings(),
    "paper": Settings(hidden=500, latent=50, layers=2, discriminator_hidden=500,
                      steps={"1%": 4000, "10%": 10_000, "100%": 50_000}, steps_semi_supervised=50_000),
}  # fmt: skip

# ---- data ------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Digits in [0, 1]; those of validation and test binarised, once and for all."""

    train: Tensor
    labels: Tensor
    unlabelled: Tensor  # the training digits that are not among `train`
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor


def data_of(fraction: str, seed: int, device: str) -> Data:
    """The same for both of a pair: which digits are the 1 % depends on the seed."""
    digits = common.digits(device)
    generator = torch.Generator().manual_seed(seed)
    by_class = digits.train_labels.argsort(stable=True).cpu().unflatten(0, (common.CLASSES, PER_CLASS))
    within = by_class[:, :-PER_CLASS_VALIDATION]
    within = within[:, torch.randperm(within.size(1), generator=generator)]
    n = FRACTIONS[fraction]
    index, rest = within[:, :n].flatten(), within[:, n:].flatten()
    held_out = by_class[:, -PER_CLASS_VALIDATION:].flatten()
    validation = torch.bernoulli(digits.train[held_out].cpu(), generator=torch.Generator().manual_seed(0))
    return Data(
        digits.train[index],
        digits.train_labels[index],
        digits.train[rest],
        validation.to(device),
        digits.train_labels[held_out],
        digits.test_binary,
        digits.test_labels,
    )


def training_batches(name: str, data: Data, settings: Settings, seed: int) -> Iterator[Any]:
    """Batches as the model takes them, drawn from a seed of their own, so that a pair sees the same."""
    generator = torch.Generator().manual_seed(seed)
    device = data.train.device

    def pixels(x: Tensor, index: Tensor) -> Tensor:
        grey = x[index.to(device)]
        return grey if settings.grey else torch.bernoulli(grey.cpu(), generator=generator).to(device)

    if "SemiSupervised" not in name:
        for index in common.batches(len(data.train), settings.batch_size, generator):
            x = pixels(data.train, index)
            yield (x, data.labels[index.to(device)]) if "Conditional" in name else x
    labelled = common.batches(len(data.train), settings.batch_labelled, generator)
    unlabelled = common.batches(len(data.unlabelled), settings.batch_unlabelled, generator)
    for index, other in zip(labelled, unlabelled, strict=True):
        yield pixels(data.train, index), data.labels[index.to(device)], pixels(data.unlabelled, other)


# ---- one run ---------------------------------------------------------------------------------------------------------


def build(name: str, settings: Settings, model: type[uf.models.VAE] | None = None) -> uf.models.VAE:
    """The discriminator last: the other networks begin alike in both of a pair."""
    classes = 0 if name in PAIRS[0] else common.CLASSES
    networks = settings.networks(classes)
    options: dict[str, Any] = {"num_classes": classes} if classes else {}
    if "SemiSupervised" in name:
        networks.append(common.mlp(common.PIXELS, settings.hidden, settings.layers, common.CLASSES))
        options["classification_weight"] = settings.classification_weight
    if name.startswith("AA"):
        inputs = common.PIXELS + (common.CLASSES if name == "AAConditionalVAE" else 0)
        leaky = functools.partial(nn.LeakyReLU, 0.2)
        discriminator = common.mlp(inputs, settings.discriminator_hidden, settings.layers, 1, leaky)
        networks.append(common.Labelled(discriminator))
        options["fakes"] = settings.fakes
    return (model or getattr(uf.models, name))(*networks, latent=settings.latent, **options)


class Task(NamedTuple):
    name: str
    fraction: str
    seed: int


def examples(name: str, x: Tensor, labels: Tensor) -> Any:
    """What the bounds are of: log p(x), or of a conditional model log p(x|label)."""
    return (x, labels) if name in PAIRS[1] else x


def train(settings: Settings, device: str, task: Task, model_type: type[uf.models.VAE] | None = None) -> dict[str, Any]:
    name, fraction, seed = task
    data = data_of(fraction, seed, device)
    validation = examples(name, data.validation, data.validation_labels)
    torch.manual_seed(seed)
    model = build(name, settings, model_type).to(device)
    optimizers = {
        "autoencoder": torch.optim.Adam(model.parameters_of("autoencoder"), lr=settings.learning_rate),
    }
    if "discriminator" in model.phases:
        optimizers["discriminator"] = torch.optim.Adam(
            model.parameters_of("discriminator"), lr=settings.discriminator_learning_rate, betas=(0.5, 0.999)
        )
    steps = settings.steps_semi_supervised if "SemiSupervised" in name else settings.steps[fraction]
    due = common.due(steps, settings.entries)
    curve: dict[str, list[float]] = {"step": [], "validation": []}
    probabilities: dict[str, list[float]] = {"real_probability": [], "fake_probability": []}
    best = (-float("inf"), 0, model.state_dict())
    start = time.perf_counter()
    for step, batch in enumerate(itertools.islice(training_batches(name, data, settings, seed), steps), 1):
        for phase in model.phases:
            losses = update(model, optimizers[phase], phase, batch)
            for key in probabilities.keys() & losses.keys():
                probabilities[key].append(losses[key].item())
        if step in due:
            with common.drawn_from(0):
                value = statistics.fmean(model.bound(validation).mean().item() for _ in range(settings.test_draws))
            if value > best[0]:
                best = (value, step, copy.deepcopy(model.state_dict()))
            curve["step"].append(step)
            curve["validation"].append(value)
            if isinstance(model, uf.models.SemiSupervisedVAE):
                of_labels = accuracy(model, data.validation, data.validation_labels)
                curve.setdefault("validation_accuracy", []).append(of_labels)
            for key, values in probabilities.items():
                if values:
                    curve.setdefault(key, []).append(statistics.fmean(values))
                    values.clear()
    seconds = time.perf_counter() - start
    model.load_state_dict(best[2])
    found = {"model": name, "fraction": fraction, "seed": seed, "best_step": best[1], "validation": best[0]}
    return found | tested(model, data, settings, name) | {"seconds": seconds, "curve": curve}


def tested(model: uf.models.VAE, data: Data, settings: Settings, name: str) -> dict[str, float]:
    test = examples(name, data.test, data.test_labels)
    with common.drawn_from(0):
        elbo = statistics.fmean(model.bound(test).mean().item() for _ in range(settings.test_draws))
        found = {"elbo": elbo, "bound": model.bound(test, settings.samples).mean().item()}
    if isinstance(model, uf.models.SemiSupervisedVAE):
        found["accuracy"] = accuracy(model, data.test, data.test_labels)
    return found


@torch.no_grad()
def accuracy(model: uf.models.SemiSupervisedVAE, x: Tensor, labels: Tensor) -> float:
    return (model.predict(x).argmax(1) == labels).float().mean().item()


# ---- all of them -----------------------------------------------------------------------------------------------------


def pairs_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for fraction, (base, extended) in itertools.product(FRACTIONS, PAIRS):
        of = {
            name: [run for run in runs if (run["model"], run["fraction"]) == (name, fraction)]
            for name in (base, extended)
        }
        if not of[base]:
            continue
        for metric in ("elbo", "bound", "accuracy"):
            if metric in of[base][0]:
                sides = ([run[metric] for run in of[name]] for name in (base, extended))
                entry = {"fraction": fraction, "models": [base, extended], "metric": metric}
                found.append(entry | common.compare(*sides))
    return found


def plot(record: Mapping[str, Any], path: Any) -> None:
    """For each fraction and pair: the validation bound, and what the discriminator says."""
    figure = Figure(figsize=(16, 3.1 * len(FRACTIONS)), layout="constrained")
    rows = figure.subplots(len(FRACTIONS), 2 * len(PAIRS), squeeze=False)
    for row, fraction in zip(rows, FRACTIONS, strict=True):
        for i, (base, extended) in enumerate(PAIRS):
            bounds, beliefs = row[2 * i : 2 * i + 2]
            of = {
                name: [r["curve"] for r in record["runs"] if (r["model"], r["fraction"]) == (name, fraction)]
                for name in (base, extended)
            }
            if not of[base]:
                bounds.set_axis_off()
                beliefs.set_axis_off()
                continue
            for name, color in ((base, common.BASE), (extended, common.EXTENDED)):
                steps = of[name][0]["step"]
                common.curve(
                    bounds, steps, [c["validation"] for c in of[name]], common.SHORT.get(name, name), color=color
                )
            highest = max(max(c["validation"]) for curves in of.values() for c in curves)
            bounds.set_ylim(highest - 40, highest + 2)
            for key, label, style in (("real_probability", "data", "-"), ("fake_probability", "samples", "--")):
                values = [c[key] for c in of[extended]]
                common.curve(beliefs, steps, values, label, color=common.EXTENDED, linestyle=style)
            beliefs.set_ylim(-0.02, 1.02)
            bounds.set_title(f"{fraction}: validation ELBO [nats]", fontsize=10)
            beliefs.set_title(f"{common.SHORT[extended]}: mean D(x)", fontsize=10)
            bounds.legend(frameon=False, fontsize=8, loc="lower right")
            beliefs.legend(frameon=False, fontsize=8, loc="center right")
    figure.suptitle("Over the training steps; thick: mean of the seeds")
    plots.save(figure, path)
    print(path)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parse(__doc__.splitlines()[0], argv)
    settings, device, began = SIZES[arguments.size], arguments.device, time.perf_counter()
    tasks = [
        Task(name, fraction, seed)
        for seed in range(arguments.seeds)
        for fraction in FRACTIONS
        for pair in PAIRS
        for name in pair
        if not ("SemiSupervised" in name and fraction == "100%")  # nothing is left without a label
    ]
    runs = common.run_all(functools.partial(train, settings, device), tasks, arguments.workers, "VAEs")
    record = common.header(arguments, asdict(settings), began) | {
        "digits": {fraction: common.CLASSES * n for fraction, n in FRACTIONS.items()},
        "pairs": pairs_of(runs),
        "runs": runs,
    }
    common.write(arguments.output / "vae.json", record)
    plot(record, arguments.output / "vae_curves.png")


if __name__ == "__main__":
    main()
