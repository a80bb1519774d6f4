"""Figures from a results folder: `python plot.py results/`.

Draws the paper's Fig. 2 (images) and Fig. 3 (a: loss, b: accuracy, c: honest clients' accuracy), and every run's
reputation and trust, from whatever the runs at or below the folder have written so far. The runs that lie in one
folder are compared in one figure; of an experiment's many runs, whose table.csv lies beside them, it draws heat maps.

The plot functions take matplotlib Axes and leave the legend to the caller, so a notebook can use them:

    figure, ax = plt.subplots()
    plot_loss(ax, [load_run(folder) for folder in find_runs("results/fig3a")])
    ax.legend()
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from bench import pages
from bench.results import (
    CURVES,
    JUMP_PARTS,
    LABELS,
    METRICS,
    OTHERS,
    SCORES,
    Run,
    by_start,
    find_runs,  # noqa: F401  for notebooks, as above
    load_run,  # noqa: F401
    load_runs,
    read_grid,
    strategy,
    title,
    variants,
)
from bench.shell import as_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from pandas import DataFrame, Series

# Okabe and Ito (2008), told apart by the colour-blind. Their yellow is left out: it is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", (0, (6, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1.2)))
MARKERS = "^sDvoP*X"
HONEST, ATTACKER, THRESHOLD = "#8C8C8C", "#D55E00", "#0072B2"

MOST_LINES = 9  # in one figure; an experiment with more kinds of runs is drawn as heat maps alone


def bundles(runs: Sequence[Run]) -> list[tuple[dict, list[Run]]]:
    """The runs that differ in nothing but their seed, together, with label, colour and line style of their line."""
    together: dict[str, list[Run]] = {}
    for run, text in zip(runs, variants(runs)):
        together.setdefault(text, []).append(run)
    seeds = {run.config.get("seed") for run in runs}
    found = []
    for kind, (text, members) in enumerate(together.items()):
        if len(members) > 1:
            text += f", mean of {len(members)} seeds"
        elif len(seeds) > 1:
            text += f", seed {members[0].config.get('seed')}"
        style = {"label": text, "color": COLOURS[kind % len(COLOURS)], "linestyle": LINES[kind % len(LINES)]}
        found.append((style, members))
    return found


def band_title(subject: str, runs: Sequence[Run]) -> str:
    """The `title`, which says what the bands are where there are some."""
    banded = any(len(members) > 1 for _, members in bundles(runs))
    return title(subject, runs) + "; band: ± one standard deviation over the seeds" * banded


# ---------------------------------------------------------------- plotting into Axes


def plot_loss(ax: Axes, runs: Sequence[Run]) -> None:
    """Fig. 3(a): mean cross-entropy (nats) over the participating clients, one line a run; of runs that differ in
    the seed alone their mean, with a band of one sample standard deviation to each side."""
    _plot_curve(ax, runs, "loss", "Mean loss of participating clients", "cross-entropy (nats)")


def plot_accuracy(ax: Axes, runs: Sequence[Run]) -> None:
    """Fig. 3(b): mean accuracy (0 to 1) of the participating clients on their own validation data, as in Fig. 3(a)."""
    _plot_curve(ax, runs, "accuracy", "Mean accuracy of participating clients", "accuracy (fraction correct)")


def _plot_curve(ax: Axes, runs: Sequence[Run], column: str, subject: str, unit: str) -> None:
    prepare(ax, band_title(subject, runs), unit)
    for style, members in bundles(runs):
        band(ax, over_seeds(members, column), **style)


def over_seeds(members: Sequence[Run], column: str) -> DataFrame:
    """A column of rounds.csv of each run, side by side, for the rounds [t] that all of them have."""
    import pandas as pd

    each = [run.rounds.drop_duplicates("round", keep="last").set_index("round")[column] for run in members]
    return pd.concat(each, axis=1, join="inner")


def band(ax: Axes, values: DataFrame, **style) -> None:
    """The line of the mean of the columns and, where there are several, a band of one standard deviation around it."""
    mean, spread = values.mean(axis=1), values.std(axis=1)
    line(ax, values.index, mean, **style)
    if values.shape[1] > 1:
        ax.fill_between(values.index, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)


def plot_honest_accuracy(ax: Axes, runs: Sequence[Run]) -> None:
    """Fig. 3(c): mean accuracy (0 to 1) of the honest clients, each round light and the running mean over it strong.

    The running mean does not reach across the MAD start, so that nothing rises before its cause. Of runs that differ in
    the seed alone, the mean of their running means with a band, as in Fig. 3(a).
    """
    window = max(run.recorded for run in runs) // 20 | 1
    subject = f"Mean accuracy of honest clients: each round (light), running mean, window {window} (strong)"
    prepare(ax, band_title(subject, runs), "accuracy (fraction correct)")
    ax.set_xlabel("round (dashed vertical line: MAD start)")
    for style, members in bundles(runs):
        accuracy = over_seeds(members, "honest_accuracy")
        before_start = accuracy.index < (members[0].config.get("mad_start") or 0)
        smooth = accuracy.groupby(before_start).transform(running_mean, window)
        light = accuracy.mean(axis=1)
        line(ax, light.index, light, color=style["color"], alpha=0.35, linewidth=0.6, zorder=1)
        band(ax, smooth, **style)
        mark_start(ax, members[0], color=style["color"])


def plot_jump(ax: Axes, runs: Sequence[Run], name: str) -> None:
    """What the first exclusion changed in the participants' mean `name` (loss or accuracy) from one round to the next:
    a bar for who is averaged and one for the model itself; of runs that differ in the seed alone means, with lines of
    one sample standard deviation to each side."""
    import numpy as np

    ax.set(xlabel={"loss": "change of loss (nats)", "accuracy": "change of accuracy (fraction correct)"}[name])
    ax.xaxis.get_major_locator().set_params(nbins=6)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    rows = bundles(runs)
    for place, (part, label) in enumerate(JUMP_PARTS.items()):
        values = [[run.jump[name][part] for run in members] for _, members in rows]
        ax.barh(
            np.arange(len(rows)) + 0.4 * place - 0.2,
            [np.mean(each) for each in values],
            height=0.38,
            xerr=[np.std(each, ddof=1) if len(each) > 1 else 0 for each in values],
            color=COLOURS[4 * place],
            hatch="//" * place,
            edgecolor="white",
            label=label,
        )
    ax.set_yticks(range(len(rows)), [style["label"] for style, _ in rows])
    ax.axvline(0, color="black", linewidth=0.8)
    ax.invert_yaxis()


def plot_membership(ax: Axes, runs: Sequence[Run], others: str) -> None:
    """What the model that an attacker holds tells of the honest clients' training images: the membership advantage (0
    to 1, Yeom et al. 2018) against `others` ("test" or "validation" images), in the last model that it received.

    Of runs that differ in the seed alone the mean, with a band as in Fig. 3(a); else a band of one standard error.
    """
    heading = f"Membership advantage in the model that the attackers hold, against {OTHERS[others]}"
    banded = any(len(members) > 1 for _, members in bundles(runs))
    band_is = "one standard deviation over the seeds" if banded else "one standard error (bootstrap)"
    prepare(ax, f"{title(heading, runs)}; band: ± {band_is}", "advantage (0 to 1)")
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


def held_by_attackers(members: Sequence[Run], column: str) -> DataFrame:
    """A column of membership.csv in the last model that the attackers (where there are none, all clients) have received
    by each round, in their mean; for each run a column, 0, 1, ..."""
    import pandas as pd

    each = []
    for run in members:
        values = run.membership.drop_duplicates("round", keep="last").set_index("round")[column]
        holders = run.clients[run.clients["malicious"].eq(1) | (not run.clients["malicious"].any())]
        received = holders.dropna(subset="train_loss").groupby("client")["round"].max()
        held = [values.where(values.index <= last).ffill() for last in received]
        each.append(pd.concat(held, axis=1).mean(axis=1))
    return pd.concat(each, axis=1, join="inner", ignore_index=True)


def plot_grid(ax: Axes, table: DataFrame, values: str, texts: Series) -> None:
    """A heat map of an experiment's `table`, as `read_grid` gives it: the column `values` (0 to 1), in the mean over
    seeds, by row and column of the experiment; in each cell its text, of `texts` by (row, column)."""
    rows, columns = (list(dict.fromkeys(table[axis])) for axis in ("row", "column"))
    means = table.groupby(["row", "column"])[values].mean().unstack().reindex(index=rows, columns=columns)
    image = ax.imshow(means, cmap="cividis", aspect="auto", vmax=1)
    ax.figure.colorbar(image, ax=ax, pad=0.02)
    middle = sum(image.get_clim()) / 2
    for (row, column), text in texts.items():
        bright = means.loc[row, column] > middle
        place = {"x": columns.index(column), "y": rows.index(row), "ha": "center", "va": "center"}
        ax.text(s=text, fontsize="small", color="black" if bright else "white", **place)
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)


def running_mean(values: Series, window: int) -> Series:
    """Mean over the `window` (odd) values around each value; near the ends over those there are."""
    return values.rolling(window, center=True, min_periods=1).mean()


def plot_score(ax: Axes, run: Run, score: str) -> None:
    """Reputation or trust (`score`, both 0 to 1) of every client of a run over rounds; for trust also the threshold."""
    prepare(ax, title(f"{score.capitalize()} of each client, {strategy(run)}", [run]), f"{score} (0 to 1)")
    ax.set_ylim(-0.05, 1.05)
    attackers = list(run.clients.loc[run.clients["malicious"] == 1, "client"].unique())
    for client, history in run.clients.groupby("client"):
        scored = history.dropna(subset=score)
        if client in attackers:
            style = attacker_style(client, attackers.index(client), len(scored))
        else:
            style = honest_style(client, excluded=(history["active"] == 0).any())
        line(ax, scored["round"], scored[score], **style)
    mark_exclusions(ax, run, score)
    mark_start(ax, run, color="black", label=f"MAD start (round {run.config.get('mad_start')})")
    threshold = (run.config.get("settings") or {}).get("threshold")
    if score == "trust" and threshold is not None:
        ax.axhline(threshold, color=THRESHOLD, linestyle=":", label=f"threshold {threshold:g}")


def attacker_style(client: int, number: int, rounds: int) -> dict:
    """Strong, with about ten markers over the `rounds` scored, shifted so that those of equal lines alternate."""
    step = max(2, rounds // 10) if rounds > 1 else 1
    return {
        "label": f"client {client} (attacker)", "color": ATTACKER, "linestyle": LINES[1 + number % 3],
        "marker": MARKERS[number % len(MARKERS)], "markersize": 6.5, "markeredgecolor": "white",
        "markevery": (number * max(1, step // 3) % step, step),
    }  # fmt: skip


def honest_style(client: int, excluded: bool) -> dict:
    """Quiet and alike, so that an honest client stands out only where it was excluded, by mistake."""
    if excluded:
        return {"label": f"client {client} (honest, excluded)", "color": HONEST, "linestyle": LINES[2]}
    return {"label": "honest clients", "color": HONEST, "linewidth": 0.8}


def mark_exclusions(ax: Axes, run: Run, score: str) -> None:
    """An x where a client is averaged no more: in its first round without it, at the last score it had by then."""
    points = []
    for _, history in run.clients.groupby("client"):
        first = history.loc[history["active"] == 0, "round"].min()  # NaN, so later than nothing, if it never was
        scores = history.loc[history["round"] <= first, score].dropna()
        points += [(first, value) for value in scores.tail(1)]
    if points:
        ax.plot(*zip(*points), "x", color="black", markersize=8, markeredgewidth=1.8, label="excluded")


def mark_start(ax: Axes, run: Run, **style) -> None:
    """A dashed vertical line where MAD starts, once the run has come that far."""
    start = run.config.get("mad_start")
    if start is not None and start <= run.recorded:
        ax.axvline(start, linestyle="--", linewidth=1, zorder=1, **style)


def plot_samples(axes: Sequence[Axes], images: NDArray, labels: NDArray) -> None:
    """Fig. 2: a panel for each of four `images` uint8 [4, 28, 28], named by `labels` [4] (0 or 1, see LABELS)."""
    for letter, ax, image, label in zip("abcd", axes, images, labels, strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"({letter}) {LABELS[label]}", fontsize="medium")
        ax.set_axis_off()


def line(ax: Axes, x: Series, y: Series, **style) -> None:
    """A line; a dot where there is but one point, which no line would show."""
    ax.plot(x, y, **{"marker": "." if len(x) == 1 else None} | style)


def prepare(ax: Axes, heading: str, unit: str) -> None:
    """Title, axes' names and a light grid."""
    ax.set_title(heading, fontsize="medium", loc="left")  # a long one then runs on above the legend
    ax.set(xlabel="round", ylabel=unit)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.margins(x=0.01)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)


# ---------------------------------------------------------------- the figures of a folder


def figures(runs: Sequence[Run], folder: Path) -> Iterator[tuple[Path, Figure]]:
    """Each figure of the runs at or below `folder`, with its path below the folder of figures, without suffix."""

    def experiment(run: Run) -> Path:
        return run.folder.relative_to(folder).parent

    for run in sorted((run for run in runs if run.samples), key=lambda run: run.data.startswith("phantom"))[:1]:
        yield Path("fig2"), samples_figure(run)
    for group, members in groupby(sorted(runs, key=experiment), key=experiment):
        members = sorted(members, key=by_start)
        for name, figure in grid_figures(folder / group / "table.csv"):
            yield group / name, figure
        if len(kinds := bundles(members)) > MOST_LINES:
            many = f"{len(kinds)} kinds of runs are too many for one figure of lines"
            print(f"{folder / group}: {many}; put those to compare into a folder of their own", file=sys.stderr)
            if (folder / group / "table.csv").is_file():  # an experiment: its heat maps say it
                continue
        else:
            for name, figure in comparisons(members):
                yield group / name, figure
        for run in members:
            if run.clients[list(SCORES)].notna().any(axis=None):
                yield group / f"trust-{run.name}", scores_figure(run)


def comparisons(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """The figures in which the runs of a folder are compared, with their names."""
    measured = [run for run in runs if len(run.membership)]
    if measured:
        yield "membership", membership_figure(measured)
    for name, plot in zip(CURVES, (plot_loss, plot_accuracy, plot_honest_accuracy)):
        drawable = [run for run in runs if run.rounds[name].notna().any()]
        if drawable:
            figure, ax = new_figure()
            plot(ax, drawable)
            yield name, figure
    excluding = [run for run in runs if run.jump]
    if excluding:
        yield "jump", jump_figure(excluding)


def new_figure(rows: int = 1, columns: int = 1, height: float = 4.2, width: float = 8, sharex: bool = True):
    """A figure (inches) and its Axes, made without pyplot: needs no display, and is freed when done with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=sharex)


def scores_figure(run: Run) -> Figure:
    """Reputation above trust, on one axis of rounds."""
    figure, axes = new_figure(rows=2, height=6)
    for ax, score in zip(axes, SCORES):
        plot_score(ax, run, score)
    heading = title(f"Reputation and trust of each client, {strategy(run)}", [run])
    axes[0].set_title(heading, loc="left", fontsize="medium")
    axes[0].set_xlabel("")
    axes[1].set_title("", loc="left")
    return figure


def jump_figure(runs: Sequence[Run]) -> Figure:
    """The change at the first exclusion, of loss above that of accuracy, in its two parts."""
    rows = len(bundles(runs))
    figure, axes = new_figure(rows=2, height=2.4 + 0.8 * rows, sharex=False)
    for ax, name in zip(axes, ("loss", "accuracy")):
        plot_jump(ax, runs, name)
    lines = any(len(members) > 1 for _, members in bundles(runs))
    heading = title("Change of the participants' mean loss and accuracy at the first exclusion", runs)
    heading += "; lines: ± one standard deviation over the seeds" * lines
    figure.suptitle(heading, fontsize="medium", x=0.02, ha="left")
    return figure


def membership_figure(runs: Sequence[Run]) -> Figure:
    """Against test images above, against validation images below."""
    figure, axes = new_figure(rows=2, height=8)
    for ax, others in zip(axes, OTHERS):
        plot_membership(ax, runs, others)
        heading = ax.get_title("left").replace(f", against {OTHERS[others]}", "")
        ax.set_title(f"against {OTHERS[others]}", loc="left", fontsize="medium")
    axes[0].set_xlabel("")
    figure.suptitle(heading, fontsize="medium", x=0.02, ha="left")
    return figure


def grid_figures(path: Path) -> Iterator[tuple[str, Figure]]:
    """The heat maps of an experiment with several rows and columns, from its table.csv if there is one."""
    if not path.is_file():
        return
    try:
        table = read_grid(path)
    except (ValueError, OSError) as error:
        print(f"{path}: not drawn, {' '.join(str(error).split())}", file=sys.stderr)
        return
    rows, columns = table["row"].nunique(), table["column"].nunique()
    if rows < 2 or columns < 2:
        return
    seeds = ", ".join(map(str, sorted(table["seed"].unique())))
    data, rounds = (" and ".join(map(str, table[name].unique())) for name in ("data", "rounds"))
    span = int(min(10, table["last"].max()))  # as the table has it
    metric, share = f"last {span} of {rounds} rounds, mean ± standard deviation", f"after {rounds} rounds, mean"
    for name, heading in (METRICS | {"right": "Share of the clients judged rightly, and who was excluded"}).items():
        about = f"{data}, {share if name == 'right' else metric} over seeds {seeds}"
        figure, ax = new_figure(height=2 + 0.42 * rows, width=max(8, 3.5 + 0.85 * columns))
        plot_grid(ax, table, name, cell_texts(table, name))
        figure.suptitle(f"{heading}\n{about}", fontsize="medium", x=0.02, ha="left")
        yield f"grid-{'exclusions' if name == 'right' else name}", figure


def cell_texts(table: DataFrame, name: str) -> Series:
    """By (row, column): mean and deviation of a metric; or, of `right`, who was excluded of whom, in the mean."""
    groups = table.groupby(["row", "column"])
    if name == "right":
        counts = ("true_exclusions", "attackers", "false_exclusions")
        out, of, honest = (groups[count].mean().map("{:.3g}".format) for count in counts)
        attackers = (out + " of " + of + " out,\n").where(of != "0", "no attacker,\n")
        return attackers + honest + " honest out"
    mean, deviation = groups[name].mean(), groups[name].std()
    return mean.map("{:.3f}".format) + deviation.map("\n± {:.3f}".format).where(deviation.notna(), "")


def samples_figure(run: Run) -> Figure:
    """Fig. 2: training images, which neither rounds nor seed change."""
    figure, axes = new_figure(columns=4, height=2.7)
    plot_samples(axes, *run.samples)
    figure.suptitle(f"Training images\n{run.data}", fontsize="medium")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write `path`.png, which is returned, and `path`.svg, with one legend for all Axes to their right."""
    import matplotlib

    entries = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= zip(labels, handles)
    if entries:
        columns = -(-len(entries) // 20)  # so that it is never taller than the figure
        figure.legend(entries.values(), entries, loc="outside right center", fontsize="small", ncols=columns)
    figure.draw_without_rendering()  # lays it out, once for both files
    figure.set_layout_engine("none")
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(path.name + suffix) for suffix in (".png", ".svg"))
    with matplotlib.rc_context({"svg.hashsalt": "madsim"}):  # and no date: equal results give equal files
        figure.savefig(png, dpi=150)
        figure.savefig(svg, metadata={"Date": None})
    return png


# ---------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> int:
    import matplotlib

    parser = argparse.ArgumentParser(prog="plot.py", description="Draw the figures of all runs at or below a folder.")
    parser.add_argument("folder", type=Path, help="a results folder of madsim.py, or one run's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures are written (default: FOLDER/figures)")
    parser.add_argument("--report", action="store_true", help="write a page with all of it besides: report.html")
    parser.add_argument("--play", action="store_true", help="write pages that play the runs, play-RUN.html, no figures")
    args = parser.parse_args(argv)
    if args.play and args.report:
        parser.exit(2, "plot: --play writes pages alone, --report needs the figures: ask for one after the other\n")
    out, pictures = args.out or args.folder / "figures", []
    try:
        with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a folder's name is just that
            runs = load_runs(args.folder)
            if args.play:
                return pages.write_players(runs, args.folder, out)
            for name, figure in figures(runs, args.folder):
                pictures.append(save(figure, out / name))
                print(pictures[-1])
            if args.report and runs:
                out.mkdir(parents=True, exist_ok=True)
                (out / "report.html").write_text(pages.report(runs, pictures, args.folder), encoding="utf-8")
                print(out / "report.html")
    except BrokenPipeError:  # `| head` has read enough
        raise
    except OSError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{len(pictures)} figure{',' if len(pictures) == 1 else 's, each'} as PNG and SVG")
    return 0 if pictures else 2


if __name__ == "__main__":
    sys.exit(as_command(main))
