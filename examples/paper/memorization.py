"""Which digits a VAE memorises: the leave-one-out score of van den Burg and Williams (2021), by K folds.

    python examples/paper/memorization.py                            # minutes on two cores
    python examples/paper/memorization.py --size paper --device cuda

M_i = log p(x_i) under models trained with x_i, minus the same under models trained without it: what having seen x_i
adds to its log-likelihood. p is averaged over as many models on both sides. Each seed deals 4000 digits into folds and
trains one VAE without each.
"""

import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from matplotlib.figure import Figure
from torch import Tensor

import unigen_fast as uf
from unigen_fast.demo import plots
from unigen_fast.demo.train import update

SHOWN = 20  # digits at either end of the scores


@dataclass(frozen=True)
class Settings(common.Autoencoder):
    steps: int = 4000
    folds: int = 10
    samples: int = 256  # K of the bound that stands for log p(x)
    digits: int = 4000


SIZES = {
    "tiny": Settings(latent=2, hidden=8, batch_size=20, steps=2, folds=2, samples=2, digits=200),
    "small": Settings(),
    "paper": Settings(latent=50, hidden=500, layers=2, steps=20_000),
}


class Task(NamedTuple):
    seed: int
    fold: int


def binary_digits(n: int, device: str) -> Tensor:
    """n training digits, binarised once: each run sees the same x_i."""
    digits = common.digits(device).train
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:n]
    x = torch.bernoulli(digits[order.to(device)].cpu(), generator=torch.Generator().manual_seed(0))
    return x.to(device)


def held_out(n: int, folds: int, task: Task) -> Tensor:
    """Which of n digits this run is not trained on; over the folds of a seed, each of them once."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(task.seed))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order.chunk(folds)[task.fold]] = True
    return mask


def log_p(settings: Settings, device: str, task: Task) -> dict[str, Any]:
    """Trains without one fold; log p of every digit, and of the test digits."""
    x = binary_digits(settings.digits, device)
    kept = x[~held_out(len(x), settings.folds, task).to(device)]
    torch.manual_seed(task.seed * settings.folds + task.fold)
    model = uf.models.VAE(*settings.networks(), latent=settings.latent).to(device)
    optimizer = torch.optim.Adam(model.parameters_of("autoencoder"), lr=settings.learning_rate)
    order = common.batches(len(kept), settings.batch_size, torch.Generator().manual_seed(task.seed))
    for index in itertools.islice(order, settings.steps):
        update(model, optimizer, "autoencoder", kept[index.to(device)])
    test = model.bound(common.digits(device).test_binary, settings.samples).mean().item()
    return {"log_p": model.bound(x, settings.samples).cpu(), "test": test}


def plot(found: Tensor, x: Tensor, path: Path) -> None:
    figure = Figure(figsize=(13, 4.0), layout="constrained")
    left, most, least = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    left.hist(found.numpy(), bins=80, color=common.BASE)
    left.axvline(found.median().item(), color="black", linewidth=1, linestyle="--", label="median")
    left.set_yscale("log")
    left.set_xlabel("memorisation score M [nats]")
    left.set_ylabel("digits")
    left.legend(frameon=False)
    plots.tidy(left)
    order = found.argsort(descending=True)
    for axes, index, title in ((most, order[:SHOWN], "most"), (least, order[-SHOWN:], "least")):
        low, high = found[index].min().item(), found[index].max().item()
        plots.show(axes, plots.tiles(x[index], 4, SHOWN // 4), f"{title} memorised: M from {high:.1f} to {low:.1f}")
    plots.save(figure, path)
    print(path)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parse(__doc__.splitlines()[0], argv, seeds=4)
    settings, device, began = SIZES[arguments.size], arguments.device, time.perf_counter()
    tasks = [Task(seed, fold) for seed in range(arguments.seeds) for fold in range(settings.folds)]
    runs = common.run_all(functools.partial(log_p, settings, device), tasks, arguments.workers, "VAEs")
    rows = torch.stack([run["log_p"] for run in runs])
    out = torch.stack([held_out(settings.digits, settings.folds, task) for task in tasks])
    found = uf.memorization_score(rows, dim=0, included=~out)
    levels = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    quantiles = found.quantile(torch.tensor(levels)).tolist()
    record = common.header(arguments, asdict(settings), began) | {
        "seeds": arguments.seeds,
        "trained_with": rows[~out].mean().item(),  # nats per digit
        "trained_without": rows[out].mean().item(),
        "test": common.summary([run["test"] for run in runs])._asdict(),
        "score": common.summary(found.tolist())._asdict(),
        "quantiles": dict(zip(map(str, levels), quantiles, strict=True)),
        "scores": found.tolist(),
    }
    common.write(arguments.output / "memorization.json", record)
    plot(found, binary_digits(settings.digits, "cpu"), arguments.output / "memorization.png")


if __name__ == "__main__":
    main()
