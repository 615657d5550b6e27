"""The table and the picture of bench/compare.py, from its compare.json.

A cell of the table: the rounds' median, half their range in percent, how many times as good it is as Sapwood's engine
of the same precision, and as the best peer's there. Times are good when they are short.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

PRECISION_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"bf16": "16 bit (or 32)", "int8": "8 bit", "int4": "4 bit"}
)
NOISY_PERCENT: Final = 10.0


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure: its name in the results, what it is, and that in few letters for the head of a table."""

    name: str
    title: str
    head: str
    unit: str
    more_is_better: bool = True


COLUMNS: Final = (
    Column("decode-1", "decode, 1 stream", "decode 1", "tok/s"),
    Column("decode-16", "decode, 16 streams", "decode 16", "tok/s"),
    Column("prefill", "prefill 1,024", "prefill", "tok/s"),
    Column("closed-loop", "closed loop 16 x 128/128", "closed loop", "tok/s"),
    Column("shared-cold", "shared prefix, cold", "prefix cold", "tok/s"),
    Column("shared-warm", "shared prefix, warm", "prefix warm", "tok/s"),
    Column("ready", "start to ready", "ready", "s", more_is_better=False),
    Column("first-token", "start to first token", "first token", "s", more_is_better=False),
    Column("client-cpu", "client CPU", "client", "us/token", more_is_better=False),
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """Median, least and most over the rounds."""

    median: float
    low: float
    high: float
    num_rounds: int

    @property
    def spread_percent(self) -> float:
        return 100 * (self.high - self.low) / 2 / self.median if self.median else 0.0


Figures = Mapping[str, Mapping[str, Figure]]


def figures(data: Mapping[str, Any]) -> dict[str, dict[str, Figure]]:
    """engine -> column -> Figure, engines in the order in which they were made known."""
    values: dict[str, dict[str, list[float]]] = {engine: {} for engine in data["about"]}
    for entry in data["rounds"]:
        for name, value in entry["values"].items():
            values.setdefault(entry["engine"], {}).setdefault(name, []).append(value)
    return {
        engine: {name: Figure(statistics.median(v), min(v), max(v), len(v)) for name, v in columns.items()}
        for engine, columns in values.items()
        if columns
    }


def is_sapwood(engine: str) -> bool:
    return engine.partition(":")[0] == "sapwood"


def goodness(column: Column, value: float, other: float) -> float:
    """How many times as good `value` is as `other`."""
    return value / other if column.more_is_better else other / value


def best_peer(column: Column, engines: Sequence[str], found: Figures) -> str | None:
    """The engine other than Sapwood with the best median; None where none has one."""
    having = [engine for engine in engines if not is_sapwood(engine) and column.name in found[engine]]
    pick = max if column.more_is_better else min
    return pick(having, key=lambda engine: found[engine][column.name].median) if having else None


def cell(column: Column, engine: str, engines: Sequence[str], found: Figures) -> str:
    figure = found[engine].get(column.name)
    if figure is None:
        return "-"
    text = f"{short(figure.median)} ±{figure.spread_percent:.0f}%"
    if column.name == "client-cpu":
        return text
    sapwood = next((e for e in engines if is_sapwood(e) and column.name in found[e]), None)
    best = best_peer(column, engines, found)
    ratios = [
        f"{goodness(column, figure.median, found[other][column.name].median):.2f}" if other is not None else "-"
        for other in (sapwood, best)
    ]
    return f"{text} {'/'.join(ratios)}"


def short(value: float) -> str:
    """Three digits, without exponents."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def rows(data: Mapping[str, Any], limits: Mapping[str, Mapping[str, float]]) -> list[tuple[str, list[list[str]]]]:
    """Of each precision that has figures: its name, and rows of cells, a header first."""
    found = figures(data)
    present = [column for column in COLUMNS if any(column.name in columns for columns in found.values())]
    blocks = []
    for precision, title in PRECISION_NAMES.items():
        engines = [engine for engine in found if data["about"][engine]["precision"] == precision]
        if not engines:
            continue
        engines.sort(key=lambda engine: not is_sapwood(engine))
        head = ["engine", "rounds", *(f"{column.head}, {column.unit}" for column in present)]
        limit = ["limit", "", *(short(v) if (v := limits[precision].get(c.name)) else "" for c in present)]
        block = [head, limit]
        for engine in engines:
            name = f"{engine} *" if data["about"][engine]["in_process"] else engine
            num_rounds = str(max(figure.num_rounds for figure in found[engine].values()))
            block.append([name, num_rounds, *(cell(column, engine, engines, found) for column in present)])
        blocks.append((title, block))
    return blocks


def notes(data: Mapping[str, Any], ceilings: Mapping[str, float | None]) -> list[str]:
    """What the table's reader must know."""
    identity = data["identity"]
    known = [f"{kind} {value:.4g}" for kind, value in ceilings.items() if value]
    lines = [
        f"{identity['checkpoint']}; {identity['cpu']}, {identity['threads']} threads",
        f"ceilings (GB/s, then G operations/s; medians of the run's rounds): {', '.join(known) or 'not measured'}",
        "cell: median of the rounds, half their range, times as good as Sapwood / as the best peer, same precision",
        "* in process: no HTTP and no client",
    ]
    versions = {engine.partition(":")[0]: about["version"] for engine, about in data["about"].items()}
    lines.append("versions: " + ", ".join(f"{peer} {version}" for peer, version in versions.items()))
    noisy = sum(entry["others_percent"] > NOISY_PERCENT for entry in data["rounds"])
    if noisy:
        lines.append(
            f"NOISY: in {noisy} of {len(data['rounds'])} turns others used more than {NOISY_PERCENT:g} % of the CPUs; "
            "repeat them on a quiet machine"
        )
    lines += [f"FAILED {engine}: {error.splitlines()[0]}" for engine, error in data["failures"].items()]
    return lines


def table(
    data: Mapping[str, Any],
    ceilings: Mapping[str, float | None],
    limits: Mapping[str, Mapping[str, float]],
    *,
    markdown: bool,
) -> str:
    """The whole report as text, or as Markdown."""
    lines: list[str] = []
    for title, block in rows(data, limits):
        if markdown:
            lines += [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in block), ""]
            lines.insert(len(lines) - len(block), "|---" * len(block[0]) + "|")
        else:
            widths = [max(map(len, column)) for column in zip(*block, strict=True)]
            lines += [f"--- {title}"]
            lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in block]
            lines.append("")
    lines += [f"- {note}" if markdown else note for note in notes(data, ceilings)]
    return "\n".join(lines)


def draw(data: Mapping[str, Any], limits: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A picture of bars for each measure, a PNG file. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = figures(data)
    shown = [column for column in COLUMNS if any(column.name in columns for columns in found.values())]
    if not shown:
        return
    engines = [
        engine
        for precision in PRECISION_NAMES
        for engine in sorted(found, key=lambda engine: not is_sapwood(engine))
        if data["about"][engine]["precision"] == precision
    ]
    precisions = [data["about"][engine]["precision"] for engine in engines]
    # A gap between precisions.
    places = [i + list(PRECISION_NAMES).index(precision) * 0.6 for i, precision in enumerate(precisions)]
    peers = sorted({engine.partition(":")[0] for engine in engines if not is_sapwood(engine)})
    colours = {peer: plt.get_cmap("Set2")(i) for i, peer in enumerate(peers)} | {"sapwood": "#1b5e20"}
    num_columns = min(3, len(shown))
    num_rows = -(-len(shown) // num_columns)
    size = (5 * num_columns, num_rows * (1.1 + 0.27 * len(engines)))
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, sharey=True, squeeze=False)
    for axis, column in zip(axes.flat, shown, strict=False):
        for place, engine, precision in zip(places, engines, precisions, strict=True):
            value = found[engine].get(column.name)
            if value is not None:
                whisker = [[value.median - value.low], [value.high - value.median]]
                colour = colours[engine.partition(":")[0]]
                axis.barh(place, value.median, color=colour, xerr=whisker, error_kw={"linewidth": 1, "capsize": 2})
                axis.annotate(short(value.median), (value.high, place), (4, 0), textcoords="offset points",
                              va="center", fontsize=8)  # fmt: skip
            if limit := limits[precision].get(column.name):
                axis.plot([limit, limit], [place - 0.5, place + 0.5], color="black", linestyle=":", linewidth=1.5)
        better = "more" if column.more_is_better else "less"
        axis.set_title(f"{column.title} ({column.unit}; {better} is better)", fontsize=9)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        labels = [f"{engine} *" if data["about"][engine]["in_process"] else engine for engine in engines]
        axis.set_yticks(places, labels, fontsize=8)
    axes[0, 0].invert_yaxis()
    identity = data["identity"]
    figure.suptitle(
        f"{identity['checkpoint']} on {identity['cpu']}, {identity['threads']} threads; bars are medians, whiskers all "
        "rounds, dots the machine's limit; * in process", fontsize=10,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=110)
    plt.close(figure)
