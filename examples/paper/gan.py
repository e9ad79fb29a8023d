"""Table 2, left and middle: GAN against IWGAN, conditional GAN against its importance-weighted one, on 4000 digits.

    python examples/paper/gan.py                            # minutes on two cores
    python examples/paper/gan.py --size paper --device cuda # DCGAN's sizes

The models of a pair differ in the generator's loss alone. Samples are judged by a classifier trained on the same real
digits: inception score, and how often a digit is the one that was asked for.
"""

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import common
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.demo import evaluate, networks, plots
from unigen_fast.demo.train import update

PAIRS = (("GAN", "IWGAN", "score"), ("ConditionalGAN", "IWConditionalGAN", "accuracy"))
METRICS = {"score": "inception score", "accuracy": "conditional accuracy"}
COLUMNS = 8  # digits of each class in a sheet of samples


@dataclass(frozen=True)
class Settings:
    """The same for both models of a pair."""

    latent: int = 100
    generator_width: int = 32  # channels of its last hidden layer; twice as many before
    discriminator_width: int = 16  # channels of its first layer; twice as many after
    batch_size: int = 64
    learning_rate: float = 2e-3
    steps: int = 2500
    discriminator_steps: int = 1  # for each of the generator's, on a minibatch of their own
    generated: int = 10_000  # digits that the figures are computed on
    entries: int = 25  # of the curves
    classifier_epochs: int = 20


SIZES = {
    "tiny": Settings(latent=8, generator_width=4, discriminator_width=4, batch_size=20, steps=2, generated=100,
                     entries=2, classifier_epochs=1),
    "small": Settings(),
    # Radford et al. (2015)
    "paper": Settings(generator_width=64, discriminator_width=64, batch_size=128, learning_rate=2e-4, steps=20_000),
}  # fmt: skip

# ---- networks --------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """DCGAN's, for 28 x 28 pixels in [-1, 1]; a label is appended to z, one-hot."""

    def __init__(self, latent: int, width: int, classes: int) -> None:
        super().__init__()
        self.network = common.Labelled(
            nn.Sequential(
                nn.Linear(latent + classes, 2 * width * 7 * 7, bias=False),
                nn.Unflatten(1, (2 * width, 7, 7)),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
                nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
                nn.Tanh(),
                nn.Flatten(),
            )
        )

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(z, labels)


class Discriminator(nn.Module):
    """DCGAN's; a label adds one plane of ones and nine of zeros to the picture."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1 + classes, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * 7 * 7, 1),
            nn.Flatten(0),
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = x.unflatten(1, (1, 28, 28))
        if labels is not None:
            planes = nn.functional.one_hot(labels, common.CLASSES).to(x.dtype)[:, :, None, None]
            x = torch.cat((x, planes.expand(-1, -1, 28, 28)), 1)
        return self.network(x)


def initialise(module: nn.Module) -> None:
    """Normal with a standard deviation of 0.02, as DCGAN's."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)


def uniform(*shape: int, **options: Any) -> Tensor:
    """z of DCGAN: uniform in [-1, 1]."""
    return 2 * torch.rand(*shape, **options) - 1


def build(name: str, settings: Settings) -> uf.models.GAN:
    conditional = "Conditional" in name
    classes = common.CLASSES if conditional else 0
    generator = Generator(settings.latent, settings.generator_width, classes)
    discriminator = Discriminator(settings.discriminator_width, classes)
    options = {"num_classes": classes} if conditional else {}
    model = getattr(uf.models, name)(generator, discriminator, latent=settings.latent, noise=uniform, **options)
    return model.apply(initialise)


# ---- one run ---------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    name: str
    seed: int


class Judge(NamedTuple):
    """The classifier that judges samples, as the worker processes get it."""

    state: dict[str, Tensor]
    accuracy: float  # on the test digits

    @classmethod
    def train(cls, settings: Settings, device: str) -> "Judge":
        torch.manual_seed(0)
        classifier, accuracy = evaluate.train_classifier(common.digits(device), epochs=settings.classifier_epochs)
        return cls({name: t.cpu() for name, t in classifier.state_dict().items()}, accuracy)

    def load(self, device: str) -> nn.Module:
        classifier = networks.classifier().to(device).eval()
        classifier.load_state_dict(self.state)
        return classifier


@torch.no_grad()
def generate(model: uf.models.GAN, n: int) -> tuple[Tensor, Tensor]:
    """n digits in the order of the labels 0, 1, …, 9, 0, …, pixels in [0, 1], and these labels; in eval mode."""
    model.eval()
    labels = torch.arange(n, device=next(model.parameters()).device) % common.CLASSES
    condition = [(part,) if isinstance(model, uf.models.ConditionalGAN) else () for part in labels.split(500)]
    pixels = torch.cat([model.sample(len(part), *c) for part, c in zip(labels.split(500), condition, strict=True)])
    model.train()
    return (pixels + 1) / 2, labels


@torch.no_grad()
def judged(model: uf.models.GAN, classifier: nn.Module, n: int) -> dict[str, float]:
    with common.drawn_from(0):
        x, labels = generate(model, n)
    found = {"score": evaluate.classifier_score(classifier, x)}
    if isinstance(model, uf.models.ConditionalGAN):
        predicted = torch.cat([classifier(part).argmax(1) for part in x.split(500)])
        found["accuracy"] = (predicted == labels).float().mean().item()
    return found


def train(settings: Settings, device: str, judge: Judge, task: Task) -> dict[str, Any]:
    digits, classifier = common.digits(device), judge.load(device)
    torch.manual_seed(task.seed)
    model = build(task.name, settings).to(device)
    optimizers = {
        phase: torch.optim.Adam(model.parameters_of(phase), lr=settings.learning_rate, betas=(0.5, 0.999))
        for phase in model.phases
    }
    logits: list[Tensor] = []  # of the last pass of the discriminator: in a step, of the generator's samples
    model.discriminator.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    order = common.batches(len(digits.train), settings.batch_size, torch.Generator().manual_seed(task.seed))
    due = common.due(settings.steps, settings.entries)
    curve: dict[str, list[float]] = {}
    recent: list[dict[str, float]] = []
    start = time.perf_counter()
    for step in range(1, settings.steps + 1):
        for _ in range(settings.discriminator_steps):
            index = next(order).to(device)
            x = 2 * digits.train[index] - 1
            batch = (x, digits.train_labels[index]) if isinstance(model, uf.models.ConditionalGAN) else x
            of_discriminator = update(model, optimizers["discriminator"], "discriminator", batch)
        of_generator = update(model, optimizers["generator"], "generator", batch)
        recent.append(
            {
                "discriminator": of_discriminator["loss"].item(),
                "generator": of_generator["loss"].item(),
                "real_accuracy": of_discriminator["real_accuracy"].item(),
                "fake_accuracy": of_discriminator["fake_accuracy"].item(),
                "effective_samples": uf.effective_sample_size(logits[-1], dim=0).item(),
            }
        )
        logits.clear()
        if step in due:
            entry = {key: statistics.fmean(r[key] for r in recent) for key in recent[0]}
            recent.clear()
            entry |= judged(model, classifier, min(2000, settings.generated))
            for key, value in ({"step": step} | entry).items():
                curve.setdefault(key, []).append(value)
    found = judged(model, classifier, settings.generated)
    with common.drawn_from(task.seed):
        shown = generate(model, common.CLASSES * COLUMNS)[0].unflatten(0, (COLUMNS, -1)).transpose(0, 1).flatten(0, 1)
    seconds = time.perf_counter() - start
    return {"model": task.name, "seed": task.seed} | found | {"seconds": seconds, "curve": curve, "shown": shown.cpu()}


# ---- all of them -----------------------------------------------------------------------------------------------------


def pairs_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for base, extended, metric in PAIRS:
        of_model = {name: [run[metric] for run in runs if run["model"] == name] for name in (base, extended)}
        found.append(
            {"models": [base, extended], "metric": metric} | common.compare(of_model[base], of_model[extended])
        )
    return found


def plot(record: Mapping[str, Any], path: Any) -> None:
    batch_size = record["settings"]["batch_size"]
    panels = {
        "discriminator": "D's loss [nats]",
        "real_accuracy": "D right about real",
        "fake_accuracy": "D right about fakes",
        "effective_samples": f"effective samples of {batch_size}",
    }
    figure = Figure(figsize=(16, 6.4), layout="constrained")
    rows = figure.subplots(len(PAIRS), len(panels) + 1)
    for row, (base, extended, metric) in zip(rows, PAIRS, strict=True):
        for axes, (key, title) in zip(row, (panels | {metric: METRICS[metric]}).items(), strict=True):
            for name, color in ((base, common.BASE), (extended, common.EXTENDED)):
                curves = [run["curve"] for run in record["runs"] if run["model"] == name]
                common.curve(
                    axes, curves[0]["step"], [c[key] for c in curves], common.SHORT.get(name, name), color=color
                )
            axes.set_title(title, fontsize=11)
            axes.set_xlabel("training step")
        row[0].legend(frameon=False)
    figure.suptitle("Thick: mean of the seeds. The base models' effective samples: of weights that they do not use")
    plots.save(figure, path)
    print(path)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parse(__doc__.splitlines()[0], argv)
    settings, device, began = SIZES[arguments.size], arguments.device, time.perf_counter()
    judge = Judge.train(settings, device)
    digits, classifier = common.digits(device), judge.load(device)
    tasks = [Task(name, seed) for seed in range(arguments.seeds) for pair in PAIRS for name in pair[:2]]
    runs = common.run_all(functools.partial(train, settings, device, judge), tasks, arguments.workers, "GANs")
    shown = {run["model"]: run["shown"] for run in reversed(runs)}  # of the first seed
    for run in runs:
        del run["shown"]
    record = common.header(arguments, asdict(settings), began) | {
        "classifier": {
            "accuracy": judge.accuracy,
            "score_of_test_digits": evaluate.classifier_score(classifier, digits.test),
            "score_of_training_digits": evaluate.classifier_score(classifier, digits.train),
        },
        "pairs": pairs_of(runs),
        "runs": runs,
    }
    common.write(arguments.output / "gan.json", record)
    sheets = {name: shown[name] for pair in PAIRS for name in pair[:2]}
    title = "Generated digits of the first seed, not selected; of conditional models each row a class"
    common.sheet(sheets, COLUMNS, title, arguments.output / "gan_samples.png")
    plot(record, arguments.output / "gan_curves.png")


if __name__ == "__main__":
    main()
