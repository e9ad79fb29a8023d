"""The figures of a run, from its JSON: in the terminal, as tables in README.md and docs/, and as pictures."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unigen_fast import models
from unigen_fast.bench.cases import ROWS, STARRED, describe_shapes
from unigen_fast.bench.harness import EAGER, FUSED

Record = Mapping[str, Any]
Figures = Mapping[str, Any]

_NO_VALUE = "–"
_KINDS = "headline|bench|plain|steps|models"
_MARKERS = re.compile(
    rf"(?P<open><!-- (?P<kind>{_KINDS})(:(?P<name>[\w.-]+))? -->\n).*?(?P<close><!-- /(?P=kind) -->)", re.DOTALL
)
_MARKER = re.compile(rf"<!-- /?({_KINDS})\b")


# ---- words -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"
    raise AssertionError("unreachable")


def size(count: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count:.0f} B"


def label(row: Figures) -> str:
    name = row["row"] + (" ★" if row["row"] in STARRED else "")
    return name if row["dtype"] == "float32" else f"{name} ({row['dtype']})"


def _compiled(row: Figures) -> Figures | None:
    """The fastest of torch.compile's modes."""
    found = [f for name, f in row["contestants"].items() if name not in (FUSED, EAGER)]
    return min(found, key=lambda f: f["seconds"], default=None)


def _time(figures: Figures | None, spread: bool = False) -> str:
    if figures is None:
        return _NO_VALUE
    text = duration(figures["seconds"])
    if spread:
        first, third = figures["quartiles"]
        text += f" ±{50 * (third - first) / figures['seconds']:2.0f}%"
    return text


def _ratio(row: Figures) -> str:
    return f"{row['ratio']:.2f}×"


def _ratio_of(row: Figures, key: str) -> str:
    """The fastest peer's figure over the fused one."""
    fused, peer = (row["contestants"][name][key] for name in (FUSED, row["fastest_peer"]))
    return f"{peer / fused:.2f}×" if fused else _NO_VALUE


def _peaks(row: Figures) -> tuple[int, int]:
    """Peak memory, fused and of the fastest peer."""
    fused, peer = (row["contestants"][name]["peak_bytes"] for name in (FUSED, row["fastest_peer"]))
    return fused, peer


def _only_results(row: Figures) -> bool:
    """Whether the fused peak is hardly more than what every contestant must hold: results and gradients."""
    return _peaks(row)[0] <= 1.1 * row["result_bytes"] + 4096


def _memory(figures: Figures) -> str:
    """Of a row, or of a training step, which has no results."""
    fused, peer = _peaks(figures)
    return f"{size(fused)} / {size(peer)}" + ("†" if "result_bytes" in figures and _only_results(figures) else "")


def _share(row: Figures, star: str = "*") -> str:
    return f"{100 * row['copy_share']:.0f}%" + (star if row["copy_level"] == "cache" else "")


def _copies(row: Figures) -> str:
    copies = row["copies"]
    text = f"{copies['memory']:.2f} copies of its first input when both read from memory, {copies['exists']:.2f} when "
    text += "both read from the caches"
    return text + (f", {copies['new']:.2f} when its results need new memory of the system" if "new" in copies else "")


def _loss_shares(step: Figures) -> str:
    fused, peer = (step["loss_shares"][name] for name in (FUSED, step["fastest_peer"]))
    return f"{100 * fused:.0f}% / {100 * peer:.0f}%"


# ---- the terminal ----------------------------------------------------------------------------------------------------

Column = tuple[str, int, Callable[[Figures], str]]

_COLUMNS: list[Column] = [
    ("fused", 15, lambda row: _time(row["contestants"][FUSED], spread=True)),
    ("eager", 15, lambda row: _time(row["contestants"][EAGER], spread=True)),
    ("compile", 15, lambda row: _time(_compiled(row), spread=True)),
    ("faster by", 14, lambda row: f"{_ratio(row)} ±{100 * _spread(row):2.0f}%"),
    ("peak memory: fused / peer", 27, _memory),
    ("of copy", 8, _share),
]
_GPU_COLUMNS: list[Column] = [
    ("device", 8, lambda row: _ratio_of(row, "device_seconds")),
    ("host", 8, lambda row: _ratio_of(row, "host_seconds")),
]
_LABEL_WIDTH = 42


def _columns(record: Record) -> list[Column]:
    if record["device"]["type"] == "cpu":
        return _COLUMNS
    return _COLUMNS[:4] + _GPU_COLUMNS + _COLUMNS[4:]


def machine(record: Record) -> str:
    """The machine, and the kernels in use."""
    versions = record["versions"]
    copies = ", ".join(f"{rate / 1e9:.1f} GB/s in {where}" for where, rate in record["copy_bandwidth"].items())
    lines = [
        f"{record['device']['name']}, {record['threads']} CPU threads, unigen_fast {versions['unigen_fast']}, "
        f"torch {versions['torch']}, Triton {versions['triton']}, Python {versions['python']}",
        *record["kernels"],
        f"copy, read + written: {copies}",
    ]
    return "\n".join(lines)


def _head(first: str, columns: list[Column]) -> str:
    return "\n" + first.ljust(_LABEL_WIDTH) + "".join(name.rjust(width) for name, width, _ in columns)


def _cells(figures: Figures, name: str, columns: list[Column]) -> str:
    if figures["error"] is not None:
        return f"{name:<{_LABEL_WIDTH}}ERROR  {figures['error']}"
    cells = "".join(cell(figures).rjust(width) for _, width, cell in columns)
    missing = "".join(f"\n    no {peer}: {reason}" for peer, reason in figures["missing"].items())
    return f"{name:<{_LABEL_WIDTH}}{cells}{'  SLOWER' if figures['ratio'] < 1 else ''}{missing}"


def heading(record: Record) -> str:
    return _head("row", _columns(record))


def line(record: Record, row: Figures) -> str:
    text = _cells(row, label(row), _columns(record))
    return text + (f"\n    as long as {_copies(row)}" if row.get("copies") else "")


def _mean_ratio(rows: Sequence[Figures]) -> str:
    return f"{math.exp(sum(math.log(row['ratio']) for row in rows) / len(rows)):.2f}×"


def _memory_of_stars(starred: Sequence[Figures]) -> str:
    large = [row for row in starred if 2 * _peaks(row)[0] > _peaks(row)[1] and not _only_results(row)]
    return "★ rows hold at most half of the faster peer's memory, or hardly more than results and gradients" + "".join(
        f"; an exception is {label(row)} ({ROWS[row['row']].memory or 'no reason'})" for row in large
    )


def closing(record: Record) -> str:
    rows = [row for row in record["rows"] if row["error"] is None]
    errors = len(record["rows"]) - len(rows)
    lines = [""]
    if rows:
        won = sum(row["ratio"] >= 1 for row in rows)
        slowest = min(rows, key=lambda row: row["ratio"])
        starred = [row for row in rows if row["row"] in STARRED]
        lines.append(
            f"faster in {won} of {len(rows)} rows; geometric mean {_mean_ratio(rows)}"
            + (f", of those with a star {_mean_ratio(starred)}" if starred else "")
            + f"; slowest {label(slowest)} {_ratio(slowest)}"
        )
        lines.append(_memory_of_stars(starred))
    if errors:
        lines.append(f"{errors} rows with an ERROR")
    lines += [
        "Forward + backward, medians ± half the distance of the quartiles; ratios ± both of these, and half of what "
        "lies between the passes.",
        "Faster by: the faster of eager and compile over fused. ★: rows for which fusing must pay most.",
        "Peak memory: beyond the inputs (†: nearly all of the fused peak is results and gradients).",
        "Of copy: bytes of every input, output and gradient, counted once, over the time, as a share of a copy's "
        "bandwidth" + (" (*: of a copy within the cache)." if record["device"]["type"] == "cpu" else "."),
    ]
    if record["device"]["type"] != "cpu":
        lines.append(
            "Device, host: the same ratio, of the time on the GPU alone and of the time until the calls return."
        )
    return "\n".join(lines)


_STEP_COLUMNS: list[Column] = [
    *_COLUMNS[:3],
    ("networks alone", 17, lambda step: _time(step["network"], spread=True)),
    ("faster by", 11, _ratio),
    ("loss's share: fused / peer", 29, _loss_shares),
    ("peak memory: fused / peer", 28, _memory),
]


def steps_heading() -> str:
    return _head("training step", _STEP_COLUMNS)


def step_line(step: Figures) -> str:
    return _cells(step, step["step"], _STEP_COLUMNS)


def steps_closing(record: Record) -> str:
    errors = sum(step["error"] is not None for step in record["steps"])
    return "\n".join(
        [
            "",
            *([f"{errors} steps with an ERROR"] if errors else []),
            "Networks, loss, backward and Adam; only the loss lines differ. Networks alone: the same without a loss.",
            "step_compiled_…: networks and loss are one graph of torch.compile, with the fused loss too.",
            "Loss's share: what the step takes beyond networks alone, as a share of the whole; fused and faster peer.",
        ]
    )


def table(record: Record) -> str:
    lines = [machine(record), heading(record), *(line(record, row) for row in record["rows"]), closing(record)]
    if record["steps"]:
        lines += [steps_heading(), *map(step_line, record["steps"]), steps_closing(record)]
    return "\n".join(lines)


def _spread(row: Figures) -> float:
    """Of a row's ratio: half the distance of the quartiles of both times that it is made of, relative to their medians,
    and half that of the highest and the lowest ratio of a pass."""
    times = (row["contestants"][name] for name in (FUSED, row["fastest_peer"]))
    within = sum((t["quartiles"][1] - t["quartiles"][0]) / (2 * t["seconds"]) for t in times)
    return within + math.log(max(row["ratios"]) / min(row["ratios"])) / 2


def comparison(first: Record, second: Record) -> tuple[str, bool]:
    """Two runs' ratios row by row, and whether all agree: logarithms no further apart than both runs' spreads."""
    rows = {label(row): row for row in second["rows"] if row["error"] is None}
    lines = ["row".ljust(_LABEL_WIDTH) + "".join(name.rjust(10) for name in ("first", "second", "apart", "spread"))]
    apart = 0
    pairs = [(row, rows[label(row)]) for row in first["rows"] if row["error"] is None and label(row) in rows]
    for a, b in pairs:
        distance, spread = abs(math.log(a["ratio"] / b["ratio"])), _spread(a) + _spread(b)
        apart += distance > spread
        cells = f"{_ratio(a):>10}{_ratio(b):>10}{100 * distance:>9.0f}%{100 * spread:>9.0f}%"
        lines.append(f"{label(a):<{_LABEL_WIDTH}}{cells}{'  APART' if distance > spread else ''}")
    means = (_mean_ratio([pair[i] for pair in pairs]) for i in range(2))
    lines.append(f"{len(pairs) - apart} of {len(pairs)} rows agree; geometric means {', '.join(means)}")
    return "\n".join(lines), not apart


# ---- README.md and docs/ ---------------------------------------------------------------------------------------------


def _checked(figures: Figures, name: str) -> Figures:
    if figures["error"] is not None:
        raise ValueError(f"{name}: {figures['error']}: a run with errors is not for publication")
    return figures


def markdown(record: Record) -> str:
    lines = [
        "| row | tensors | fused | eager | torch.compile | faster by | peak memory: fused / peer | of copy |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        _checked(row, label(row))
        cells = [
            f"`{row['row']}`"
            + (" ★" if row["row"] in STARRED else "")
            + ("" if row["dtype"] == "float32" else f" {row['dtype']}"),
            describe_shapes([tuple(shape) for shape in row["shapes"]]),
            _time(row["contestants"][FUSED]),
            _time(row["contestants"][EAGER]),
            _time(_compiled(row)),
            _ratio(row) if row["ratio"] >= 1 else f"**{_ratio(row)} (slower)**",
            _memory(row),
            _share(row, star="\\*"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    passes = record["passes"]
    lines += [
        "",
        origin(record),
        "",
        "- Times are medians of forward + backward.",
        "- *Faster by* is the faster of eager and `torch.compile` over fused"
        + (
            f": the median of the ratios of {passes} passes, which need not be the quotient of the medians beside it."
            if passes > 1
            else "."
        ),
        "- ★ marks the rows for which fusing must pay most. "
        + _memory_of_stars([row for row in record["rows"] if row["row"] in STARRED])
        + ".",
        "- *Peak memory* is what a step holds beyond its inputs, fused and for the faster peer (†: nearly all of the "
        "fused peak is results and gradients).",
        "- *Of copy* divides the bytes of every input, output and gradient, counted once, by the time, and by the "
        "bandwidth of a copy" + (" (\\*: of a copy within the cache)." if record["device"]["type"] == "cpu" else "."),
        *(f"- `{row['row']}` takes as long as {_copies(row)}." for row in record["rows"] if row.get("copies")),
    ]
    return "\n".join(lines)


def markdown_plain(record: Record) -> str:
    """Of a run without kernels, against eager PyTorch alone: rows and training steps."""
    rows = [_checked(row, label(row)) for row in record["rows"]]
    steps = [_checked(step, step["step"]) for step in record.get("steps", [])]
    slowest, largest = (
        min(rows, key=lambda row: row["ratio"]),
        max(rows, key=lambda row: _peaks(row)[0] / _peaks(row)[1]),
    )
    lines = ["| row or step | plain | eager | faster by | peak memory: plain / eager |", "|---|--:|--:|--:|--:|"]
    for name, figures in [*((row["row"], row) for row in rows), *((step["step"], step) for step in steps)]:
        ratio = _ratio(figures) if round(figures["ratio"], 2) >= 1 else f"**{_ratio(figures)} (slower)**"
        times = (_time(figures["contestants"][side]) for side in (FUSED, EAGER))
        lines.append(f"| {' | '.join([f'`{name}`', *times, ratio, _memory(figures)])} |")
    fused, peer = _peaks(largest)
    closing = (
        f"{origin(record)} Geometric mean of the rows {_mean_ratio(rows)}; slowest row `{slowest['row']}`, "
        f"{_ratio(slowest)}; most memory beside eager code `{largest['row']}`, {fused / peer:.2f} times."
    )
    return "\n".join([*lines, "", closing])


def markdown_steps(record: Record) -> str:
    lines = [
        "| training step | sizes | fused loss | eager loss | compiled loss | networks alone | faster by "
        "| loss's share: fused / peer | peak memory: fused / peer |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    if not record.get("steps"):
        raise ValueError("a run without training steps: `python -m unigen_fast bench --all` has them")
    for step in record["steps"]:
        _checked(step, step["step"])
        ratio = round(step["ratio"], 2)  # within half a percent of 1 there is nothing to tell apart
        cells = [
            f"`{step['step']}`: {step['stands_for']}",
            step["sizes"],
            _time(step["contestants"][FUSED]),
            _time(step["contestants"][EAGER]),
            _time(_compiled(step)),
            _time(step["network"]),
            _ratio(step) if ratio >= 1 else f"**{_ratio(step)} (slower)**",
            _loss_shares(step),
            _memory(step),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        origin(record),
        "",
        "- Times are medians of a step: networks, loss, backward and Adam, in float32.",
        "- *Faster by* is the faster of eager and compiled loss over fused.",
        "- *Networks alone* is the same step without a loss. *Loss's share* is what the step takes beyond that, as a "
        "share of the whole.",
        "- In the `step_compiled_…` rows networks and loss are one graph of `torch.compile`, with the fused loss too; "
        "the eager step is eager as a whole.",
    ]
    return "\n".join(lines)


def headline(record: Record, integrations: Record) -> str:
    """Three figures of whole training steps: a large gain, a gain of a library's users, and where there is none."""
    steps = {step["step"]: _checked(step, step["step"]) for step in record["steps"]}
    libraries = {step["name"]: step for step in integrations["steps"]}
    tcvae, scvi = steps["step_beta_tcvae"], libraries["scvi-zinb"]
    times = {name: duration(figures["seconds"]) for name, figures in tcvae["contestants"].items()}
    fused, peer = map(size, _peaks(tcvae))
    scvi_times = [duration(scvi[side]) for side in ("original", "fused")]
    return "\n".join(
        [
            f"- **A beta-TCVAE step runs {_ratio(tcvae)} as fast**, at batch 1024: {times[FUSED]}, where the same step "
            f"takes {times['compile']} with the loss compiled and {times[EAGER]} with it eager. Its peak memory is "
            f"{fused} instead of {peer}.",
            f"- **An scvi-tools step runs {scvi['faster_by']:.2f}× as fast** with one line of code, for a small model "
            f"of zero-inflated counts: {scvi_times[1]} instead of {scvi_times[0]}.",
            "- **A typical VAE or GAN step gains little or nothing**, since its networks take the time, and may lose: "
            f"{libraries['pythae-VAE-bce']['faster_by']:.2f}× for pythae's VAE, {_ratio(steps['step_compiled_elbo'])} "
            f"for a small compiled VAE, {_ratio(steps['step_compiled_discriminator'])} for a small compiled GAN.",
            "",
            f"{origin(record)[:-1]} (libraries: {integrations['date'][:10]}).",
        ]
    )


def origin(record: Record) -> str:
    """The machine, torch and the day of the measurement."""
    device = record["device"]
    where = device["name"] if device["type"] != "cpu" else f"{device['name']}, {record['threads']} threads"
    return f"{where}; torch {record['versions']['torch']}; {record['date'][:10]}."


def _contents(kind: str, name: str | None, results: Path) -> str:
    def record(name: str | None) -> Record:
        loaded: Record = json.loads((results / f"{name}.json").read_text())
        return loaded

    if kind == "models":
        return models.table()
    if kind == "headline":
        return headline(record(name), record("integrations"))
    return {"bench": markdown, "plain": markdown_plain, "steps": markdown_steps}[kind](record(name))


def filled(text: str, results: Path) -> str:
    """The text with everything between markers made anew from the records in `results`.

    A pair of markers is `<!-- KIND:NAME -->` … `<!-- /KIND -->`. KIND is `bench` (the table of rows), `plain` (a short
    one of a run without kernels), `steps` (that of training steps) or `headline`, made from NAME.json, or `models`,
    which has no NAME. A marker without its partner and
    a record with errors are ValueErrors.
    """
    markers, pairs = len(_MARKER.findall(text)), len(_MARKERS.findall(text))
    if markers != 2 * pairs:
        raise ValueError(f"expected pairs of lines `<!-- KIND:NAME -->` and `<!-- /KIND -->`, got {markers} markers")
    return _MARKERS.sub(lambda m: f"{m['open']}{_contents(m['kind'], m['name'], results)}\n{m['close']}", text)


def update_readme(readme: Path) -> list[str]:
    """Makes README.md and the pages of docs/ beside it anew from benches/results/, and for each table of rows the
    pictures NAME.png and NAME_floors.png there. Returns a line per pair of markers. If one cannot be filled, nothing is
    written."""
    results = readme.parent / "benches" / "results"
    pages = [readme, *sorted((readme.parent / "docs").glob("*.md"))]
    texts = {page: filled(page.read_text(), results) for page in pages}
    found = [(page, m["kind"], m["name"]) for page, text in texts.items() for m in _MARKERS.finditer(text)]
    if not found:
        raise ValueError(f"{readme}: expected pairs of lines `<!-- KIND:NAME -->` and `<!-- /KIND -->`, got none")
    for name in {name for _, kind, name in found if kind == "bench"}:
        record = json.loads((results / f"{name}.json").read_text())
        plot(record, results / f"{name}.png")
        plot_floors(record, results / f"{name}_floors.png")
    for page, text in texts.items():
        page.write_text(text)
    return [f"{page}: {kind}{f':{name}' if name else ''}" for page, kind, name in found]


# ---- the pictures ----------------------------------------------------------------------------------------------------

_COLOURS = {
    "importance": "#4477aa",
    "adversarial": "#ee8866",
    "divergence": "#44aa99",
    "likelihood": "#aa6699",
    "objectives": "#bbaa33",
}
_SLOWER = "#bb3333"


def plot(record: Record, path: Path) -> None:
    """A bar a row: how many times faster than the faster of eager and torch.compile; and where each of the two lies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = [row for row in record["rows"] if row["error"] is None]
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edge = [1.0]
    for place, row in enumerate(rows):
        fused = row["contestants"][FUSED]["seconds"]
        ratio = row["ratio"]
        colour = _COLOURS[row["family"]] if ratio >= 1 else _SLOWER
        axes.barh(place, ratio - 1, left=1, height=0.62, color=colour, zorder=2)
        peers = [(row["contestants"][EAGER], "o"), (_compiled(row), "D")]
        ratios = [(peer["seconds"] / fused, marker) for peer, marker in peers if peer is not None]
        for x, marker in ratios:
            axes.plot(x, place, marker, color="white", markeredgecolor="#333333", markersize=5, zorder=3)
        colour = "#222222" if ratio >= 1 else _SLOWER
        column = axes.get_yaxis_transform()  # the figures in a column at the right, clear of the markers
        axes.text(1.07, place, _ratio(row), transform=column, ha="right", va="center", fontsize=9, color=colour)
        edge += [ratio, *(x for x, _ in ratios)]
    axes.axvline(1, color="#222222", linewidth=1, zorder=4)
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, 0.9 * min(edge)), max(2.5, 1.35 * max(edge)))
    ticks = [0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.grid(axis="x", color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("times faster, forward + backward (bar: than the faster of the two)")
    axes.set_title(
        f"{record['device']['name']}, torch {record['versions']['torch']}", fontsize=10, loc="left", color="#444444"
    )
    families = [name for name in _COLOURS if any(row["family"] == name and row["ratio"] >= 1 for row in rows)]
    handles: list[Any] = [Patch(color=_COLOURS[name], label=name) for name in families]
    if any(row["ratio"] < 1 for row in rows):
        handles.append(Patch(color=_SLOWER, label="slower"))
    style: dict[str, Any] = {"linestyle": "none", "color": "white", "markeredgecolor": "#333333", "markersize": 5}
    handles.append(Line2D([], [], marker="o", label="against eager", **style))
    if any(_compiled(row) is not None for row in rows):
        handles.append(Line2D([], [], marker="D", label="against torch.compile", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def plot_floors(record: Record, path: Path) -> None:
    """Share of a copy's bandwidth against bytes moved, and peak memory against the fastest peer's: a dot a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    rows = [row for row in record["rows"] if row["error"] is None]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    share, memory = figure.subplots(1, 2)
    for row in rows:
        colour = _COLOURS[row["family"]]
        marker = "*" if row["row"] in STARRED else "o"
        style: dict[str, Any] = {"marker": marker, "s": 70 if marker == "*" else 22, "color": colour, "zorder": 3}
        share.scatter(row["floor_bytes"], row["copy_share"], **style)
        fused, peer = _peaks(row)
        memory.scatter(peer, fused, **style)
    share.set(xscale="log", xlabel="inputs, outputs and gradients", ylabel="of a copy's bandwidth")
    share.set_ylim(0, max(1.1, 1.05 * max((row["copy_share"] for row in rows), default=1)))
    share.axhline(1, color="#222222", linewidth=1)
    share.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    memory.set(xscale="log", yscale="log", xlabel="peak memory, fastest peer", ylabel="peak memory, fused")
    least, most = memory.get_xlim()
    memory.plot([least, most], [least, most], color="#222222", linewidth=1)
    memory.plot([least, most], [least / 2, most / 2], color="#222222", linewidth=1, linestyle=":")
    memory.text(most, most / 4, "half", ha="right", va="top", fontsize=8, color="#444444")
    for axis in (share.xaxis, memory.xaxis, memory.yaxis):
        axis.set_major_locator(FixedLocator([2**power for power in range(10, 40, 5)]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: size(x).replace(".0", "")))
    for axes in (share, memory):
        axes.tick_params(labelsize=8)
        axes.grid(color="#dddddd", linewidth=0.8, zorder=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    families = [name for name in _COLOURS if any(row["family"] == name for row in rows)]
    handles = [Line2D([], [], marker="o", linestyle="none", color=_COLOURS[name], label=name) for name in families]
    handles.append(Line2D([], [], marker="*", linestyle="none", color="#888888", label="★ rows"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
