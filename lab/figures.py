"""Figures beyond the paper: the jump at an exclusion, membership inference, heat maps, another system's rounds.

The plot functions take matplotlib Axes, as those of plot.py do. To add a figure that compares the runs of a folder,
write a function and add an entry to `FIGURES`.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.console import say
from harness.drawing import COLOURS, HONEST, LINES, TICK_WIDTH, band, bundles, line, new_figure, prepare
from harness.runs import (
    JUMP_PARTS,
    LEAKED,
    METRICS,
    OF_ATTACKS,
    OF_MAD,
    OTHERS,
    Run,
    counted,
    differing,
    evenly,
    read_grid,
    read_pictures,
    seeds_in_words,
    seen_in_words,
    shared,
    span,
    strategy,
    telling,
    title,
    titled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 4  # ours: reconstructed images of a kind
ACROSS = 13  # ours: images in a line; the eleven kinds of `--inverted` then fill three lines
GAP = 8  # pixels between two kinds
MOST_INCHES = 0.05  # ours: of a pixel of few images
AROUND = 8  # ours: rounds before and after a fall of trust
MOVED = {"d": "d: 1 is near, 0 is far", "reputation": "reputation, eqs. (1)-(4)", "trust": "trust, eqs. (5)-(7)"}
MARKERS = "os^DvPX"
GUESSES = {"nearest": "guess: nearest other image", "mean": "guess: mean of other images"}


def plot_jump(ax: Axes, runs: Sequence[Run], name: str) -> None:
    """The change of the participants' mean `name` (loss or accuracy) at the first exclusion, as two bars per run.

    One bar is the part that comes from averaging over fewer clients, the other the part of the model itself. For runs
    that differ only in their seed the bars are means, with lines of one sample standard deviation to each side.
    """
    ax.set(xlabel={"loss": "change of loss (nats)", "accuracy": "change of accuracy (fraction correct)"}[name])
    ax.xaxis.get_major_locator().set_params(nbins=6)  # type: ignore[call-arg]  # it is a MaxNLocator
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    rows = bundles(runs)
    for place, (part, label) in enumerate(JUMP_PARTS.items()):
        values = [[run.jump[name][part] for run in members if run.jump] for _, members in rows]
        ax.barh(
            np.arange(len(rows)) + 0.4 * place - 0.2,
            [float(np.mean(each)) for each in values],
            height=0.38,
            xerr=[float(np.std(each, ddof=1)) if len(each) > 1 else 0 for each in values],
            color=COLOURS[4 * place],
            hatch="//" * place,
            edgecolor="white",
            label=label,
        )
    ax.set_yticks(range(len(rows)), folded(style["label"] for style, _ in rows))
    ax.axvline(0, color="black", linewidth=0.8)
    ax.invert_yaxis()


def jump_figure(runs: Sequence[Run]) -> Figure | None:
    """The two parts of the change at the first exclusion: of the loss above, of the accuracy below."""
    runs = [run for run in runs if run.jump]
    if not runs:
        return None
    rows = bundles(runs)
    lines = max(label.count("\n") + 1 for label in folded(style["label"] for style, _ in rows))
    figure, axes = new_figure(rows=2, height=2.4 + max(0.8, 0.4 * lines) * len(rows), sharex=False)
    for ax, name in zip(axes, ("loss", "accuracy")):
        plot_jump(ax, runs, name)
    note = "; bars: mean, lines: ± one standard deviation" * any(len(members) > 1 for _, members in rows)
    heading = title("Change of the participants' mean loss and accuracy at the first exclusion", runs, note)
    figure.suptitle(heading, fontsize="medium", x=0.02, ha="left")
    return figure


def plot_membership(ax: Axes, runs: Sequence[Run], others: str) -> None:
    """The membership advantage (0 to 1, Yeom et al. 2018) of the last model that the attackers received, per round.

    It compares the honest clients' training images with `others` ("test" or "validation" images). For runs that differ
    only in their seed it is the mean, with a band as in Fig. 3(a); otherwise the band is one standard error.
    """
    banded = any(len(members) > 1 for _, members in bundles(runs))
    band_is = "one standard deviation over the seeds" if banded else "one standard error (bootstrap)"
    prepare(ax, f"against {OTHERS[others]}\nband: ± {band_is}", "advantage (0 to 1)")
    for style, members in bundles(runs):
        values = held_by_attackers(members, f"{others}_advantage")
        band(ax, values, **style)
        if not banded:
            errors = held_by_attackers(members, f"{others}_error")[0]
            low, high = values[0] - errors, values[0] + errors
            ax.fill_between(values.index, low, high, color=style["color"], alpha=0.2, linewidth=0)
    chance = runs[0].membership[f"{others}_chance"].mean()
    ax.axhline(chance, color=HONEST, linestyle=":", label="chance alone")
    ax.set_ylim(bottom=0)


def held_by_attackers(members: Sequence[Run], column: str) -> Any:
    """A column of membership.csv for the last model that the attackers (or else all clients) have received, on average.

    The pandas frame has one row per round and one column 0, 1, ... per run.
    """
    import pandas as pd

    each = []
    for run in members:
        values = run.membership.drop_duplicates("round", keep="last").set_index("round")[column]
        holders = run.clients[run.clients["malicious"].eq(1) | (not run.clients["malicious"].any())]
        received = holders.dropna(subset="train_loss").groupby("client")["round"].max()
        held = [values.where(values.index <= last).ffill() for last in received]
        each.append(pd.concat(held, axis=1).mean(axis=1))
    return pd.concat(each, axis=1, join="inner", ignore_index=True)


def membership_figure(runs: Sequence[Run]) -> Figure | None:
    """The membership advantage against test images above, against validation images below."""
    runs = [run for run in runs if len(run.membership)]
    if not runs:
        return None
    figure, axes = new_figure(rows=2, height=8)
    for ax, others in zip(axes, OTHERS):
        plot_membership(ax, runs, others)
    axes[0].set_xlabel("")
    heading = title("Membership advantage of the last model that the attackers received", runs)
    figure.suptitle(heading, fontsize="medium", x=0.02, ha="left")
    return figure


def plot_leakage(ax: Axes, table: Any, column: str) -> None:
    """A `column` of leakage.csv of several runs, with one row for each kind of `seen`.

    One point per round, the mean over the runs. Of many rounds an even choice is shown. Grey lines are those of guesses
    that need no update: for the rank, 0.5 on average.
    """
    places = {seen: place for place, seen in enumerate(dict.fromkeys(table["seen"]))}
    rounds = evenly(sorted(table["round"].unique()), len(MARKERS))
    shift = np.linspace(-0.3, 0.3, len(rounds) + 2)[1:-1]  # so that no point hides another one
    for colour, marker, shifted, t in zip(COLOURS, MARKERS, shift, rounds):
        values = table[table["round"] == t].groupby("seen")[column].mean()
        ax.plot(values, values.index.map(places) + shifted, marker, label=f"round {t}", color=colour)
    for style, (name, label) in zip(LINES[1:], GUESSES.items()):
        if f"{name}_{column}" in table:
            values = table.groupby("seen", sort=False)[f"{name}_{column}"].mean()
            line(ax, values, range(len(values)), label=label, color=HONEST, linestyle=style, zorder=1)
    if column == "rank":
        ax.axvline(0.5, label="chance", color="black", linestyle=":", zorder=1)
    ax.set(xlabel=LEAKED[column])
    ax.set_yticks(range(len(places)), places)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)


def leakage_figure(runs: Sequence[Run]) -> Figure | None:
    """Gradient inversion: the rank of the reconstructed images to the left, their PSNR to the right."""
    import pandas as pd

    runs = [run for run in runs if len(run.leakage)]
    if not runs:
        return None
    table = pd.concat([run.leakage for run in runs])
    table["seen"] = [seen_in_words(*numbers) for numbers in zip(table["steps"], table["images"])]
    figure, axes = new_figure(columns=2, height=2 + 0.4 * table["seen"].nunique(), width=11, sharex=False, sharey=True)
    for ax, column in zip(axes, LEAKED):
        plot_leakage(ax, table, column)
    axes[0].invert_yaxis()
    figure.suptitle(title("Images reconstructed from what a client sends", runs), fontsize="medium", x=0.02, ha="left")
    return figure


def plot_inversion(ax: Axes, blocks: dict[str, Any]) -> None:
    """Blocks of images side by side, each an array uint8 [60, x], with the texts above them."""
    x = 0
    for seen, block in blocks.items():
        height, width = block.shape
        ax.imshow(block, cmap="gray", vmin=0, vmax=255, extent=(x, x + width, height, 0))
        ax.text(x + 1, 0, seen.replace(" of ", "\nof "), va="bottom")
        x += width + GAP
    ax.axis("off")
    ax.set_anchor("W")


def inversion_figure(runs: Sequence[Run]) -> Figure | None:
    """Images of a client, and below them the reconstructed ones, for all that the attacker of the first run sees."""
    for run in runs:
        if pictures := read_pictures(run.folder / "leakage.npz"):
            break
    else:
        return None
    lines: list[dict[str, Any]] = []
    room = 0
    for seen, pair in pictures.items():
        rows = [[np.pad(image, 1, constant_values=255) for image in images[:SHOWN]] for images in pair]
        if room < len(rows[0]):
            lines, room = [*lines, {}], ACROSS
        lines[-1][seen] = np.vstack([np.hstack(row) for row in rows])
        room -= len(rows[0])
    wide = max(sum(block.shape[1] + GAP for block in blocks.values()) for blocks in lines) - GAP
    inches = min(12 / wide, MOST_INCHES)  # of a pixel
    height = 0.5 + len(lines) * (0.5 + 60 * inches)
    figure, axes = new_figure(len(lines), height=height, width=max(8, wide * inches), sharex=False, squeeze=False)
    for ax, blocks in zip(axes.flat, lines):
        plot_inversion(ax, blocks)
        ax.set(xlim=(0, wide), ylim=(60, 0))  # so that all images have one size
    about = f"round {run.leakage['round'].max()}: images of a client, and below them what an attacker reconstructs"
    figure.suptitle(title(about.capitalize(), [run]), fontsize="medium", x=0.02, ha="left")
    return figure


def fall_of(run: Run) -> tuple[int, int] | None:
    """The first client whose trust falls below the threshold, and the round in which it does. None if none falls."""
    threshold, scored = run.threshold("trust"), run.clients.dropna(subset=["trust"])
    if threshold is None or "d" not in scored:
        return None
    fallen = scored[(scored["trust"] < threshold) & (scored.groupby("client")["trust"].shift() >= threshold)]
    if fallen.empty:
        return None
    first = fallen.loc[fallen["round"].idxmin()]
    return int(first["client"]), int(first["round"])


def fall_figure(runs: Sequence[Run]) -> Figure | None:
    """d, reputation and trust of the first client whose trust falls, in the rounds around its fall.

    The first of the runs in which a trusted client falls is drawn. A client that is never trusted does not fall.
    """
    for run in runs:
        if fall := fall_of(run):
            break
    else:
        return None
    client, t = fall
    near = run.clients["round"].between(t - AROUND, t + AROUND)
    history = run.clients[near & (run.clients["client"] == client)].dropna(subset=["trust"])
    figure, ax = new_figure()
    prepare(ax, "", "d, reputation and trust (0 to 1)")
    for colour, style, (name, label) in zip(COLOURS, LINES, MOVED.items()):
        line(ax, history["round"], history[name], label=label, color=colour, linestyle=style, marker=".")
    ax.axhline(run.threshold("trust"), color="black", linestyle=":", label="threshold of trust")
    kind = "malicious" if history["malicious"].any() else "honest"
    about = title(f"Client {client} ({kind}) loses its trust in round {t}, {strategy(run)}", [run])
    figure.suptitle(about, fontsize="medium", x=0.02, ha="left")
    return figure


# name -> figure(runs of one folder) -> Figure, or None if the runs have nothing to show
FIGURES: dict[str, Callable[[Sequence[Run]], Figure | None]] = {
    "jump": jump_figure,
    "fall": fall_figure,
    "membership": membership_figure,
    "leakage": leakage_figure,
    "inversion": inversion_figure,
}


def plot_grid(ax: Axes, table: Any, values: str, texts: Any, name: str = "") -> None:
    """A heat map of an experiment's `table` from `read_grid`: means of the column `values` (0 to 1), cell `texts`.

    `name` is written beside the colours. They are the same in all figures: for `right` from 0 to 1. For other columns
    they follow the logarithm of the error 1 - x, from 0.5 to 0.02, so that a bad cell takes no colours from the good.
    """
    from matplotlib.colors import FuncNorm, Normalize

    rows, columns = (list(dict.fromkeys(table[axis])) for axis in ("row", "column"))
    means = table.groupby(["row", "column"])[values].mean().unstack().reindex(index=rows, columns=columns)
    norm, ticks, extend = Normalize(0, 1), None, "neither"
    if values != "right":
        norm = FuncNorm((lambda x: -np.log(np.maximum(1 - x, 1e-9)), lambda y: 1 - np.exp(-y)), 0.5, 0.98)
        ticks, extend = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98], "both"
    image = ax.imshow(means, cmap="cividis", aspect="auto", norm=norm)
    bar = ax.figure.colorbar(
        image, ax=ax, pad=0.02, ticks=ticks, format="{x:g}", extend=extend, label=textwrap.fill(name, TICK_WIDTH)
    )
    bar.minorticks_off()
    for (x, column), (y, row) in product(enumerate(columns), enumerate(rows)):
        mean = means.loc[row, column]
        light = np.isnan(mean) or image.to_rgba(mean)[:3] ** np.full(3, 2.2) @ (0.2126, 0.7152, 0.0722) > 0.18
        text = texts.get((row, column), "no run")
        ax.text(x, y, text, color="black" if light else "white", ha="center", va="center")
    ax.set_xticks(range(len(columns)), folded(columns, 3), rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), folded(rows, 3))
    ax.set(xlabel=varied(table, "column"), ylabel=textwrap.fill(varied(table, "row"), TICK_WIDTH))


def folded(labels: Iterable[str], lines: int | None = None) -> list[str]:
    """Labels in lines that leave room for the Axes. The last word of a part, such as a number, does not stand alone."""
    tied = [re.sub(r" (?==|[^ ,]+(,|$))", "\u00a0", label) for label in labels]
    return [textwrap.fill(label, TICK_WIDTH, max_lines=lines).replace("\u00a0", " ") for label in tied]


def varied(table: Any, axis: str) -> str:
    """The settings in which the cells along an `axis` ("row" or "column") differ, in words."""
    words = {"attacked": "attack", "attack": "attack", "mad_start": "MAD start", "malicious": "malicious clients"}
    words = dict.fromkeys(OF_ATTACKS, "attack settings") | dict.fromkeys(OF_MAD, "MAD settings") | words
    names = [name for _, part in table.groupby("column" if axis == "row" else "row") for name in differing(known(part))]
    return ", ".join(dict.fromkeys(words.get(name, name.replace("_", " ")) for name in names)) or "settings"


def known(table: Any) -> list[dict[str, Any]]:
    """The `telling` settings of each run in an experiment's table."""
    rows = [{name: value for name, value in row.items() if value == value} for row in table.to_dict("records")]
    return [telling(row, row["data"]) for row in rows]


def grid_figures(path: Path) -> Iterator[tuple[str, Figure]]:
    """The heat maps of an experiment with several rows and columns, by name. There are none without a table.csv."""
    if not path.is_file():
        return
    try:
        table = read_grid(path)
    except (ValueError, OSError) as error:
        say(f"{path}: not drawn, {' '.join(str(error).split())}", sys.stderr)
        return
    rows, columns = table["row"].nunique(), table["column"].nunique()
    if rows < 2 or columns < 2:
        return
    data, rounds = (" and ".join(map(str, table[name].unique())) for name in ("data", "rounds"))
    metric = f"last {span(table)} of {rounds} rounds, mean ± standard deviation"
    share = f"after {rounds} rounds, counts with 95 % intervals"
    for name, heading in (METRICS | {"right": "Share of clients judged correctly, and who was excluded"}).items():
        seeds = f"{share if name == 'right' else metric} over {seeds_in_words(table['seed'])}"
        texts, height, width = cell_texts(table, name), 0.45, 0.85  # inches of a cell
        if name == "right" and columns < 4:  # a count and its interval fit on one line
            width = 2.9
        elif name == "right":
            texts, height, width = texts.str.replace(" (", "\n(", regex=False), 0.85, 1.75
        lines = max(label.count("\n") + 1 for label in folded(table["row"], 3))
        figure, ax = new_figure(height=3 + max(height, 0.2 * lines) * rows, width=max(10, 4.2 + width * columns))
        plot_grid(ax, table, name, texts, heading.split(",")[0].split(" (")[0].lower() + " (0 to 1)")
        about = ", ".join([data, seeds, *shared(known(table))])
        figure.suptitle(titled(heading, about), fontsize="medium", x=0.02, ha="left")
        yield f"grid-{'exclusions' if name == 'right' else name}", figure


def cell_texts(table: Any, name: str) -> Any:
    """By (row, column): the mean and deviation of a metric, or for `right` the excluded clients of all seeds."""
    groups = table.groupby(["row", "column"])
    if name == "right":
        sums = groups[["true_exclusions", "attackers", "false_exclusions", "clients"]].sum()

        def text(run: Any) -> str:
            attackers = counted(run.true_exclusions, run.attackers) or "no attacker"
            honest = counted(run.false_exclusions, run.clients - run.attackers)
            return f"{attackers}\nhonest {honest}".replace(" (", " out (")

        return sums.apply(text, axis=1)
    mean, deviation = groups[name].mean(), groups[name].std()
    return mean.map("{:.3f}".format) + deviation.map("\n± {:.3f}".format).where(deviation.notna(), "")


def plot_beside(ax: Axes, spans: Any, others: Any, column: str, unit: str) -> None:
    """A `column` of the rows of an experiment by round, and the lines of `others`, the runs of another system.

    `spans` is from `lab.experiments.over_spans`, with spans of one round each. A row is the mean over its seeds, and a
    band from the least to the greatest of them.
    """
    prepare(ax, "", unit)
    for kind, (row, values) in enumerate(spans.groupby("row", sort=False)):
        seeds, style = values.groupby("rounds")[column], {"color": COLOURS[kind], "linestyle": LINES[kind % len(LINES)]}
        line(ax, seeds.mean().index, seeds.mean(), label=f"{row}, {values['seed'].nunique()} seeds", **style)
        ax.fill_between(seeds.min().index, seeds.min(), seeds.max(), color=COLOURS[kind], alpha=0.2, linewidth=0)
    for marker, (run, values) in zip("ox+s", others.groupby("run", sort=False)):
        line(ax, values["round"], values[column], label=run, color="black", linewidth=0.8, marker=marker)


def beside_figure(folder: Path) -> Figure | None:
    """The participants' loss and the honest clients' accuracy of an experiment, beside those of another system.

    The folder holds spans.csv of the experiment, and others.csv of the other system with the columns run, round, loss
    and honest_accuracy. None if one of them is missing.
    """
    import pandas as pd

    if not all((folder / name).is_file() for name in ("spans.csv", "others.csv")):
        return None
    units = {"loss": "participants' loss (nats)", "honest_accuracy": "honest clients' accuracy"}
    kinds = {"row": str, "rounds": int, "run": str, "round": int} | dict.fromkeys(units, float)
    try:
        spans = pd.read_csv(folder / "spans.csv", usecols=["row", "rounds", "seed", *units], dtype=kinds)
        others = pd.read_csv(folder / "others.csv", usecols=["run", "round", *units], dtype=kinds)
    except (ValueError, OSError) as error:
        say(f"{folder / 'others.csv'}: not drawn, {' '.join(str(error).split())}", sys.stderr)
        return None
    figure, axes = new_figure(rows=2, height=7)
    for ax, (column, unit) in zip(axes, units.items()):
        plot_beside(ax, spans, others, column, unit)
    axes[0].set_xlabel("")
    figure.suptitle("Round by round; band: from the least to the greatest seed", fontsize="medium", x=0.02, ha="left")
    return figure
