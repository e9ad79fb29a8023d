"""What the scripts of this directory share: options, seeds, worker processes, networks, statistics, results, plots.

Two models are compared pair by pair: the runs of one seed begin with the same parameters and see the same batches, so
that their difference is the models', not the seed's.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from unigen_fast.demo import plots
from unigen_fast.demo.data import Digits, load_digits

RESULTS = Path(__file__).parent / "results"
PIXELS, CLASSES = 784, 10
SHORT = {  # the paper's names
    "ConditionalGAN": "CGAN",
    "IWConditionalGAN": "IW-CGAN",
    "AAVAE": "AA-VAE",
    "ConditionalVAE": "CVAE",
    "AAConditionalVAE": "AA-CVAE",
    "SemiSupervisedVAE": "SVAE",
    "AASemiSupervisedVAE": "AA-SVAE",
}
BASE, EXTENDED = "#4477aa", "#ee6677"  # the colours of a pair

T = TypeVar("T")
R = TypeVar("R")

# ---- options and runs ------------------------------------------------------------------------------------------------


def parse(description: str, argv: Sequence[str] | None, seeds: int = 5) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=("tiny", "small", "paper"), default="small", help="tiny is for tests")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"runs of each model (default {seeds})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core (default 2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of figures and pictures")
    arguments = parser.parse_args(argv)
    for name in ("seeds", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: got {getattr(arguments, name)}, expected at least 1")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


@functools.cache
def digits(device: str) -> Digits:
    return load_digits(device=device)


def run_all(function: Callable[[T], R], tasks: Sequence[T], workers: int, title: str) -> list[R]:
    """function(task) of all tasks, in their order: one thread each, so that a run's figures are its seed's alone."""
    if workers == 1:
        torch.set_num_threads(1)
        return [function(task) for task in tqdm(tasks, title, disable=None)]
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in tqdm(as_completed(futures), title, len(tasks), disable=None):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Evaluations draw from their own seed: the same for both of a pair, and training goes on as if there were none."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices below n, epoch after epoch shuffled anew, the incomplete last batch of an epoch left out."""
    while True:
        yield from torch.randperm(n, generator=generator).split(size)[: max(1, n // size)]


def due(steps: int, entries: int) -> set[int]:
    """The steps, counted from 1, at which a curve has an entry."""
    return {max(1, round(steps * (i + 1) / entries)) for i in range(entries)}


# ---- networks --------------------------------------------------------------------------------------------------------


def mlp(
    inputs: int, hidden: int, layers: int, outputs: int, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(inputs, hidden), activation()]
        inputs = hidden
    return nn.Sequential(*parts, nn.Linear(inputs, outputs))


class Labelled(nn.Module):
    """A network of one input, or of an input and its label, one-hot."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(x if labels is None else torch.cat((x, F.one_hot(labels, CLASSES).to(x.dtype)), -1))


class Encoder(Labelled):
    """(mean, logvar): the halves of the network's output."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x, labels).chunk(2, dim=-1)


@dataclass(frozen=True)
class Autoencoder:
    """Sizes and optimizer of a VAE."""

    latent: int = 16
    hidden: int = 200
    layers: int = 1
    batch_size: int = 100
    learning_rate: float = 1e-3

    def networks(self, classes: int = 0) -> list[nn.Module]:
        """[encoder, decoder], which take labels of so many classes too."""
        encoder = Encoder(mlp(PIXELS + classes, self.hidden, self.layers, 2 * self.latent))
        return [encoder, Labelled(mlp(self.latent + classes, self.hidden, self.layers, PIXELS))]


# ---- statistics ------------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    mean: float
    sd: float


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation (n - 1) of the seeds; of one seed the deviation is 0, for want of a better."""
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass
class Paired:
    """Extended model minus base, seed by seed; `low` and `high`: the 95 % interval of the mean by Student's t."""

    n: int
    mean: float
    sd: float
    t: float
    low: float
    high: float
    higher: int  # seeds in which the extended model is above the base


def paired(base: Sequence[float], extended: Sequence[float]) -> Paired:
    differences = [e - b for b, e in zip(base, extended, strict=True)]
    n, (mean, sd) = len(differences), summary(differences)
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error if error else 0.0
    higher = sum(d > 0 for d in differences)
    return Paired(n, mean, sd, mean / error if error else 0.0, mean - half, mean + half, higher)


def compare(base: Sequence[float], extended: Sequence[float]) -> dict[str, Any]:
    """What a row of a table is made of."""
    return {
        "base": summary(base)._asdict(),
        "extended": summary(extended)._asdict(),
        "difference": asdict(paired(base, extended)),
    }


# ---- results ---------------------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else f"{os.cpu_count()}-core CPU"
    return {"torch": torch.__version__, "device": name, "date": datetime.date.today().isoformat()}


def header(arguments: argparse.Namespace, settings: Mapping[str, Any], began: float) -> dict[str, Any]:
    """What every record begins with: under which settings it came about, where, and how long that took."""
    return {
        "size": arguments.size,
        "settings": settings,
        "environment": environment(arguments.device),
        "seconds": time.perf_counter() - began,
    }


def rounded(tree: Any) -> Any:
    """Five digits: what a run is worth, and small files."""
    if isinstance(tree, Mapping):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f"{tree:.5g}") if isinstance(tree, float) else tree


def write(path: Path, record: Mapping[str, Any]) -> None:
    """One line for each key, and within them one for each run."""
    lines = []
    for key, value in rounded(record).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n ]"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(path)


# ---- plots -----------------------------------------------------------------------------------------------------------


def curve(axes: Axes, steps: Sequence[int], runs: Iterable[Sequence[float]], label: str, **style: Any) -> None:
    """The mean of the seeds, each seed thin behind it."""
    runs = list(runs)
    for values in runs:
        axes.plot(steps, values, linewidth=0.5, alpha=0.45, **style)
    axes.plot(steps, [statistics.fmean(at) for at in zip(*runs, strict=True)], linewidth=1.8, label=label, **style)
    plots.tidy(axes)


def sheet(grids: Mapping[str, Tensor], columns: int, title: str, path: Path) -> None:
    """A sheet of digits for each model."""
    rows = len(next(iter(grids.values()))) // columns
    width = 0.36 * columns * len(grids) + 0.3 * len(grids)
    figure = Figure(figsize=(width, 0.36 * rows + 0.8), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, len(grids), squeeze=False).flat, grids.items(), strict=True):
        plots.show(axes, plots.tiles(x[: rows * columns], rows, columns), name)
    figure.suptitle(title, fontsize=12)
    plots.save(figure, path)
    print(path)
