"""Where the effects come from, or why there is none: pairs once more, each with one thing changed.

python examples/paper/tried.py                            # minutes on two cores
python examples/paper/tried.py --size paper --device cuda
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import common
import gan
import torch
import vae

import unigen_fast as uf

FRACTION = "10%"  # of the VAEs' digits


class ConstantWeights(uf.models.AAVAE):
    """Nothing learned: data and samples count alike, 1/2."""

    def q_reversed(self, *examples: torch.Tensor) -> torch.Tensor:
        return examples[0].new_full((len(examples[0]),), 0.5)


class DataAlone(uf.models.AAVAE):
    """D's weights on the data, and no samples: harder examples emphasised, and nothing else."""

    def autoencoder_phase(self, batch: Any) -> dict[str, torch.Tensor]:
        (x,) = self.examples(batch)
        return {"loss": self.negative_bound(x, weights=self.q_reversed(x)).loss}


@dataclass(frozen=True)
class Change:
    """Of the settings of both models, or of the class of the extended one."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    extended: type[uf.models.AAVAE] | None = None


VAE_CHANGES = (
    Change("none: row 10% of the table"),
    Change("every weight 1/2: samples, but no discriminator", extended=ConstantWeights),
    Change("no samples: D's weights on the data alone", extended=DataAlone),
    Change("D of a twentieth of the hidden units", {"discriminator_hidden": 10}),
    Change("D's learning rate times 5", {"discriminator_learning_rate": 1e-3}),
    Change("grey digits, fakes are means of p(x∣z)", {"grey": True, "fakes": "mean"}),
)
GAN_CHANGES = (Change("D twice as wide", {"discriminator_width": 32}),)
CURVES = ("effective_samples", "real_probability", "fake_probability")


class Task(NamedTuple):
    family: str
    change: int
    extended: bool
    seed: int


def run(size: str, device: str, judge: gan.Judge, task: Task) -> dict[str, Any]:
    """The metric of one run, and the mean of the second half of its curves."""
    if task.family == "VAE":
        change = VAE_CHANGES[task.change]
        settings = replace(vae.SIZES[size], **change.settings)
        of_vae = vae.Task(vae.PAIRS[0][task.extended], FRACTION, task.seed)
        found = vae.train(settings, device, of_vae, change.extended if task.extended else None)
        value = found["elbo"]
    else:
        change = GAN_CHANGES[task.change]
        settings = replace(gan.SIZES[size], **change.settings)
        found = gan.train(settings, device, judge, gan.Task(gan.PAIRS[0][task.extended], task.seed))
        value = found["score"]
    late = {key: values[len(values) // 2 :] for key, values in found["curve"].items() if key in CURVES}
    return {"value": value} | {key: sum(values) / len(values) for key, values in late.items()}


def tasks_of(seeds: int) -> list[Task]:
    """A base that no change concerns is trained once."""
    families = (("VAE", VAE_CHANGES), ("GAN", GAN_CHANGES))
    return [
        Task(family, i, extended, seed)
        for family, changes in families
        for i, change in enumerate(changes)
        for extended in (False, True)
        for seed in range(seeds)
        if extended or base_of(family, i) == i
    ]


def base_of(family: str, i: int) -> int:
    """The change whose base is that of change i: what concerns D alone leaves a VAE as it is."""
    return i if family == "GAN" or "grey" in VAE_CHANGES[i].settings else 0


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parse(__doc__.splitlines()[0], argv, seeds=3)
    size, device, seeds, began = arguments.size, arguments.device, arguments.seeds, time.perf_counter()
    judge = gan.Judge.train(gan.SIZES[size], device)
    tasks = tasks_of(seeds)
    runs = common.run_all(functools.partial(run, size, device, judge), tasks, arguments.workers, "changes")
    found = dict(zip(tasks, runs, strict=True))
    entries = []
    for family, changes, models, metric in (
        ("VAE", VAE_CHANGES, vae.PAIRS[0], "elbo"),
        ("GAN", GAN_CHANGES, gan.PAIRS[0][:2], "score"),
    ):
        for i, change in enumerate(changes):
            base, extended = (
                [found[Task(family, j, side, seed)] for seed in range(seeds)]
                for j, side in ((base_of(family, i), False), (i, True))
            )
            late = {key: common.summary([r[key] for r in extended])._asdict() for key in CURVES if key in extended[0]}
            entry = {"change": change.text, "models": list(models), "metric": metric, "late": late}
            entries.append(entry | common.compare([r["value"] for r in base], [r["value"] for r in extended]))
    settings = {"VAE": asdict(vae.SIZES[size]), "GAN": asdict(gan.SIZES[size])}
    record = common.header(arguments, settings, began) | {"fraction": FRACTION, "pairs": entries}
    common.write(arguments.output / "tried.json", record)


if __name__ == "__main__":
    main()
