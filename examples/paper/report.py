"""Puts the tables of results/*.json into README.md, between `<!-- paper:NAME -->` and `<!-- /paper -->`.

python examples/paper/report.py
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent
_MARKERS = re.compile(r"(?P<open><!-- paper:(?P<name>\w+) -->\n)(?P<body>.*?)(?P<close><!-- /paper -->)", re.DOTALL)

Record = Mapping[str, Any]

# Hu et al. (2018), MNIST: Table 2, with its standard deviations of 5 runs, and Table 3, which gives none
TABLE_2 = {
    ("GAN", "score"): ("8.34 ± .03", "8.45 ± .04"),
    ("ConditionalGAN", "accuracy"): ("0.985 ± .002", "0.987 ± .002"),
    ("1%", "accuracy"): ("0.9412", "0.9425"),
    ("10%", "accuracy"): ("0.9768", "0.9797"),
}
TABLE_3 = {
    ("1%", "VAE"): (-122.89, -122.15),
    ("1%", "ConditionalVAE"): (-125.44, -122.88),
    ("1%", "SemiSupervisedVAE"): (-108.22, -107.61),
    ("10%", "VAE"): (-104.49, -103.05),
    ("10%", "ConditionalVAE"): (-102.63, -101.63),
    ("10%", "SemiSupervisedVAE"): (-99.44, -98.81),
    ("100%", "VAE"): (-92.53, -92.42),
    ("100%", "ConditionalVAE"): (-93.16, -92.75),
}
PAPER_DIGITS = 60_000
DIGITS = {"score": 2, "accuracy": 3, "elbo": 2, "bound": 2}


def _value(summary: Record, metric: str) -> str:
    n = DIGITS[metric]
    return f"{summary['mean']:.{n}f} ± {summary['sd']:.{n}f}"


def _difference(difference: Record, metric: str) -> str:
    """Bold where the interval leaves 0 out."""
    n = DIGITS[metric] + 1
    mean = f"{difference['mean']:+.{n}f}"
    if difference["low"] > 0 or difference["high"] < 0:
        mean = f"**{mean}**"
    return (
        f"{mean} ± {difference['sd']:.{n}f} | {difference['low']:+.{n}f} … {difference['high']:+.{n}f} "
        f"| {difference['t']:.1f} | {difference['higher']} of {difference['n']}"
    )


_HEAD = " base | extended | difference | 95 % | t | seeds higher |"


def _table(columns: str, rows: list[str], closing: str = "") -> str:
    count = (columns + _HEAD).count("|")
    return "\n".join(["| " + columns + _HEAD + closing, "|---" * (count + closing.count("|")) + "|", *rows])


def _models(entry: Record) -> str:
    return " → ".join(common.SHORT.get(name, name) for name in entry["models"])


def _cells(entry: Record) -> str:
    metric = entry["metric"]
    sides = " | ".join(_value(entry[side], metric) for side in ("base", "extended"))
    return f"{sides} | {_difference(entry['difference'], metric)}"


def _origin(record: Record) -> str:
    where = record["environment"]
    return (
        f"Size `{record['size']}`; {where['device']}, torch {where['torch']}, {where['date']}: "
        f"{record['seconds'] / 60:.1f} minutes."
    )


def _signed(base: float, extended: float) -> str:
    return f"{base:.2f} → {extended:.2f} ({extended - base:+.2f})"


def gan(record: Record) -> str:
    names = {"score": "inception score", "accuracy": "conditional accuracy"}
    rows = []
    for entry in record["pairs"]:
        paper = " → ".join(TABLE_2[entry["models"][0], entry["metric"]])
        rows.append(f"| {_models(entry)} | {names[entry['metric']]} | {_cells(entry)} | {paper} |")
    judge = record["classifier"]
    note = (
        f"The classifier is right on {judge['accuracy']:.1%} of the 1000 test digits, whose own inception score is "
        f"{judge['score_of_test_digits']:.2f}; of the training digits {judge['score_of_training_digits']:.2f}. "
        + _origin(record)
    )
    return "\n".join([_table("models | metric |", rows, " paper: MNIST |"), "", note])


def vae(record: Record) -> str:
    """Table 3."""
    rows = []
    for entry in record["pairs"]:
        fraction, metric = entry["fraction"], entry["metric"]
        if metric == "accuracy":
            continue
        paper = _signed(*TABLE_3[fraction, entry["models"][0]]) if metric == "elbo" else ""
        name = "ELBO" if metric == "elbo" else f"K = {record['settings']['samples']}"
        rows.append(f"| {_fraction(record, fraction)} | {_models(entry)} | {name} | {_cells(entry)} | {paper} |")
    return "\n".join([_table("training digits | models | bound |", rows, " paper: ELBO |"), "", _origin(record)])


def _fraction(record: Record, fraction: str) -> str:
    share = float(fraction.rstrip("%")) / 100
    return f"{fraction}: {record['digits'][fraction]} (paper: {PAPER_DIGITS * share:.0f})"


def svae(record: Record) -> str:
    """Table 2, right."""
    rows = []
    for entry in record["pairs"]:
        if entry["metric"] == "accuracy":
            fraction = entry["fraction"]
            paper = " → ".join(TABLE_2[fraction, "accuracy"])
            rows.append(f"| {_fraction(record, fraction)} | {_models(entry)} | {_cells(entry)} | {paper} |")
    return _table("labelled digits | models |", rows, " paper |")


def discriminator(record: Record) -> str:
    """What D believes at the step whose parameters were tested, and when that was."""
    lines = [
        "| training digits | model | best step of base, of extended | mean D(x) of data | of samples |",
        "|---" * 5 + "|",
    ]
    for entry in record["pairs"]:
        if entry["metric"] != "elbo":
            continue
        base, extended = (
            [run for run in record["runs"] if (run["model"], run["fraction"]) == (name, entry["fraction"])]
            for name in entry["models"]
        )
        at_best: dict[str, list[float]] = {"real_probability": [], "fake_probability": []}
        for run in extended:
            i = run["curve"]["step"].index(run["best_step"])
            for key, values in at_best.items():
                values.append(run["curve"][key][i])
        steps = ", ".join(
            f"{_mean([run['best_step'] for run in runs]):.0f} of {runs[0]['curve']['step'][-1]}"
            for runs in (base, extended)
        )
        beliefs = " | ".join(f"{_mean(values):.2f}" for values in at_best.values())
        name = common.SHORT[entry["models"][1]]
        lines.append(f"| {_fraction(record, entry['fraction'])} | {name} | {steps} | {beliefs} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def tried(record: Record) -> str:
    rows = []
    for entry in record["pairs"]:
        late = entry["late"]
        belief = "–"
        if "fake_probability" in late:
            belief = f"{late['real_probability']['mean']:.2f}, {late['fake_probability']['mean']:.2f}"
        samples = f"{late['effective_samples']['mean']:.0f}" if "effective_samples" in late else "–"
        metric = {"elbo": "ELBO", "accuracy": "accuracy", "score": "inception score"}[entry["metric"]]
        rows.append(f"| {entry['change']} | {_models(entry)} | {metric} | {_cells(entry)} | {belief} | {samples} |")
    closing = " D of data, of samples | effective samples |"
    return "\n".join([_table("change | models | metric |", rows, closing), "", _origin(record)])


def memorization(record: Record) -> str:
    settings, levels = record["settings"], record["quantiles"]
    lines = ["| M, nats | " + " | ".join(["mean", *(f"{float(q):.0%}" for q in levels), "largest"]) + " |"]
    lines.append("|---" * (len(levels) + 3) + "|")
    figures = [record["score"]["mean"], *levels.values(), max(record["scores"])]
    lines.append("| of all digits | " + " | ".join(f"{x:.1f}" for x in figures) + " |")
    lines += [
        "",
        f"log p(x), nats per digit, K = {settings['samples']}: {record['trained_with']:.1f} of digits trained with, "
        f"{record['trained_without']:.1f} of those left out, {record['test']['mean']:.1f} of the test digits; "
        f"{record['seeds']} × {settings['folds']} models on {settings['digits']} digits. " + _origin(record),
    ]
    return "\n".join(lines)


# by the name in the marker: the table, and the record it is made of
TABLES: dict[str, tuple[Callable[[Record], str], str]] = {
    "gan": (gan, "gan"),
    "vae": (vae, "vae"),
    "svae": (svae, "vae"),
    "discriminator": (discriminator, "vae"),
    "tried": (tried, "tried"),
    "memorization": (memorization, "memorization"),
}


def filled(text: str, results: Path) -> str:
    """The text with every table made anew."""
    found = [match["name"] for match in _MARKERS.finditer(text)]
    if sorted(found) != sorted(TABLES):
        raise ValueError(f"README: got markers of {', '.join(found)}, expected one pair each of {', '.join(TABLES)}")

    def table(match: re.Match[str]) -> str:
        make, record = TABLES[match["name"]]
        return f"{match['open']}{make(json.loads((results / f'{record}.json').read_text()))}\n{match['close']}"

    return _MARKERS.sub(table, text)


def main() -> None:
    readme = HERE / "README.md"
    readme.write_text(filled(readme.read_text(), HERE / "results"))
    print(readme)


if __name__ == "__main__":
    main()
