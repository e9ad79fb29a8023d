"""Where the effects come from, or why there is none: pairs once more, each with one thing changed.

python examples/paper/tried.py                            # fifty minutes on two cores
python examples/paper/tried.py --size paper --device cuda
"""

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import common
import gan
import torch
import vae
from torch import Tensor

import unigen_fast as uf


class ConstantWeights(uf.models.AAVAE):
    """Nothing learned: data and samples count alike, 1/2."""

    def q_reversed(self, *examples: Tensor) -> Tensor:
        return examples[0].new_full((len(examples[0]),), 0.5)


class SemiSupervisedConstantWeights(ConstantWeights, uf.models.AASemiSupervisedVAE):
    """The same with labels."""


class DataAlone(uf.models.AAVAE):
    """D's weights on the data, and no samples: harder examples emphasised, and nothing else."""

    def autoencoder_phase(self, batch: Any) -> dict[str, Tensor]:
        (x,) = self.examples(batch)
        return {"loss": self.negative_bound(x, weights=self.q_reversed(x)).loss}


class LabelsKept(uf.models.AASemiSupervisedVAE):
    """As many samples as there are labelled digits are drawn with the labels of those, and count as labelled."""

    def autoencoder_phase(self, batch: Any) -> dict[str, Tensor]:
        x, labels, unlabelled = self.examples(batch)
        n, (real,) = len(x), self.real(batch)
        fake = torch.cat((self.sample(n, labels), self.sample(len(unlabelled))))
        sides = ((x, unlabelled, self.q_reversed(real)), (fake[:n], fake[n:], self.q_reversed(fake)))
        losses = [self.semi_supervised(first, labels, rest, w[:n], w[n:])["loss"] for first, rest, w in sides]
        return {"loss": sum(losses) / 2}


OF_EXTENDED = {"discriminator_hidden", "discriminator_learning_rate", "fakes"}  # settings that no VAE without D reads


@dataclass(frozen=True)
class Change:
    """Of the settings of both models, or of the class of the extended one."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)  # of settings
    extended: type[uf.models.AAVAE] | None = None

    @property
    def concerns_base(self) -> bool:
        return not self.settings.keys() | self.factors.keys() <= OF_EXTENDED

    def of(self, settings: Any) -> Any:
        scaled = {key: getattr(settings, key) * factor for key, factor in self.factors.items()}
        whole = {key: max(1, round(x)) if isinstance(getattr(settings, key), int) else x for key, x in scaled.items()}
        return replace(settings, **self.settings, **whole)


class Family(NamedTuple):
    """A pair, and what is changed; the first change is none, or of both models."""

    models: tuple[str, str]
    metrics: tuple[str, ...]
    fraction: str | None  # of the VAEs' digits
    changes: tuple[Change, ...]

    def base_of(self, i: int) -> int:
        """The change whose base is that of change i."""
        return i if self.changes[i].concerns_base else 0


FAMILIES = {
    "VAE": Family(
        vae.PAIRS[0],
        ("elbo",),
        "10%",
        (
            Change("none: row 10% of the table"),
            Change("every weight 1/2: samples, but no discriminator", extended=ConstantWeights),
            Change("no samples: D's weights on the data alone", extended=DataAlone),
            Change("D of a twentieth of the hidden units", factors={"discriminator_hidden": 1 / 20}),
            Change("D's learning rate times 5", factors={"discriminator_learning_rate": 5}),
            Change("grey digits, fakes are means of p(x∣z)", {"grey": True, "fakes": "mean"}),
        ),
    ),
    "SVAE": Family(
        vae.PAIRS[2],
        ("elbo", "accuracy"),
        "10%",
        (
            Change("none: row 10% of the table"),
            Change("a sixth of the steps", factors={"steps_semi_supervised": 1 / 6}),
            Change("every weight 1/2: samples, but no discriminator", extended=SemiSupervisedConstantWeights),
            Change("samples keep the labels they were drawn with", extended=LabelsKept),
        ),
    ),
    "GAN": Family(
        gan.PAIRS[0][:2],
        ("score",),
        None,
        (
            Change("D twice as wide", factors={"discriminator_width": 2}),
            Change("two steps of D for each of G", factors={"discriminator_steps": 2}),
            Change("a tenth of the learning rate", factors={"learning_rate": 1 / 10}),
        ),
    ),
}
CURVES = ("effective_samples", "real_probability", "fake_probability")


class Task(NamedTuple):
    family: str
    change: int
    extended: bool
    seed: int


def run(size: str, device: str, judge: gan.Judge, task: Task) -> dict[str, float]:
    """The metrics of one run, and the mean of the second half of its curves."""
    family = FAMILIES[task.family]
    name, change = family.models[task.extended], family.changes[task.change]
    if family.fraction is None:
        found = gan.train(change.of(gan.SIZES[size]), device, judge, gan.Task(name, task.seed))
    else:
        of_vae = vae.Task(name, family.fraction, task.seed)
        found = vae.train(change.of(vae.SIZES[size]), device, of_vae, change.extended if task.extended else None)
    late = {key: values[len(values) // 2 :] for key, values in found["curve"].items() if key in CURVES}
    of_curves = {key: statistics.fmean(values) for key, values in late.items()}
    return {key: found[key] for key in family.metrics} | of_curves


def tasks_of(seeds: int) -> list[Task]:
    """A base that no change concerns is trained once."""
    return [
        Task(name, i, extended, seed)
        for name, family in FAMILIES.items()
        for i in range(len(family.changes))
        for extended in (False, True)
        for seed in range(seeds)
        if extended or family.base_of(i) == i
    ]


def entries_of(found: Mapping[Task, Mapping[str, float]], seeds: int) -> list[dict[str, Any]]:
    entries = []
    for name, family in FAMILIES.items():
        for i, change in enumerate(family.changes):
            base, extended = (
                [found[Task(name, j, side, seed)] for seed in range(seeds)]
                for j, side in ((family.base_of(i), False), (i, True))
            )
            late = {key: common.summary([r[key] for r in extended])._asdict() for key in CURVES if key in extended[0]}
            for metric in family.metrics:
                entry = {"change": change.text, "models": list(family.models), "metric": metric, "late": late}
                entries.append(entry | common.compare([r[metric] for r in base], [r[metric] for r in extended]))
    return entries


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parse(__doc__.splitlines()[0], argv, seeds=3)
    size, device, began = arguments.size, arguments.device, time.perf_counter()
    judge = gan.Judge.train(gan.SIZES[size], device)
    tasks = tasks_of(arguments.seeds)
    runs = common.run_all(functools.partial(run, size, device, judge), tasks, arguments.workers, "changes")
    settings = {"VAE": asdict(vae.SIZES[size]), "GAN": asdict(gan.SIZES[size])}
    record = common.header(arguments, settings, began) | {
        "fractions": {name: family.fraction for name, family in FAMILIES.items() if family.fraction},
        "pairs": entries_of(dict(zip(tasks, runs, strict=True)), arguments.seeds),
    }
    common.write(arguments.output / "tried.json", record)


if __name__ == "__main__":
    main()
