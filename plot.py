"""Figures from a results folder: `python plot.py results/`.

Draws the paper's Fig. 2 (images) and Fig. 3 (a: loss, b: accuracy, c: accuracy of the honest clients), and reputation
and trust for each run. It draws what the runs at or below the folder have written so far. Runs in one folder are
compared in one figure. An experiment with a table.csv also gets heat maps. Several folders are drawn as if they were
alone in the nearest folder that holds them all.

The plot functions take matplotlib Axes and leave the legend to the caller, so a notebook can use them:

    figure, ax = plt.subplots()
    plot_loss(ax, [load_run(folder) for folder in find_runs("results/fig3a")])
    ax.legend()
"""

from __future__ import annotations

import runpy
from pathlib import Path

# First: are our files those that Python finds, and is there all that they need?
runpy.run_path(str(Path(__file__).parent / "harness" / "needs.py"))["check"](
    __name__, modules=("lab", "harness"), packages=("numpy", "pandas", "matplotlib")
)

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import pages
from harness.console import Parser, a_path, as_command, say, whole
from harness.drawing import HONEST, LINES, band, band_title, bundles, line, new_figure, over_seeds, prepare, save
from harness.folder import fitting, together
from harness.runs import (
    CURVES,
    LABELS,
    MOST_LINES,
    MOST_NAMED,
    SCORES,
    Run,
    alike,
    by_start,
    changes,
    exclusions,
    find_runs,  # noqa: F401  for notebooks, as above
    kinds,
    load_run,  # noqa: F401
    load_runs,
    natural,
    numbered,
    strategy,
    title,
    titled,
    variants,
)
from lab.figures import FIGURES, beside_figure, grid_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MARKERS = "^sDvoP*X"
NAMED = 8  # ours: figures of earlier calls that are named
ATTACKER, THRESHOLD = "#D55E00", "#0072B2"
MOST_CLIENTS = 20  # ours: with more, the lines of honest clients cover each other


# ---------------------------------------------------------------- Fig. 2 and Fig. 3


def plot_samples(axes: Sequence[Axes], images: NDArray, labels: NDArray) -> None:
    """Fig. 2: one panel for each of four `images` uint8 [4, 28, 28], with the names of their `labels` [4] (0 or 1)."""
    for letter, ax, image, label in zip("abcd", axes, images, labels, strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"({letter}) {LABELS[label]}", fontsize="medium")
        ax.set_axis_off()


def plot_loss(ax: Axes, runs: Sequence[Run]) -> None:
    """Fig. 3(a): mean cross-entropy (nats) of the participating clients, one line per run (see harness/log.py).

    Runs that differ only in their seed share a line: their mean, with a band of one sample standard deviation to each
    side.
    """
    subject = numbered("a", "Mean loss of participating clients", runs)
    _plot_curve(ax, runs, "loss", subject, "cross-entropy (nats)")


def plot_accuracy(ax: Axes, runs: Sequence[Run]) -> None:
    """Fig. 3(b): mean accuracy (0 to 1) of the participating clients on their own validation data, as in Fig. 3(a)."""
    subject = numbered("b", "Mean accuracy of participating clients", runs)
    _plot_curve(ax, runs, "accuracy", subject, "accuracy (fraction correct)")


def _plot_curve(ax: Axes, runs: Sequence[Run], column: str, subject: str, unit: str) -> None:
    prepare(ax, band_title(subject, runs), unit)
    for style, members in bundles(runs):
        band(ax, over_seeds(members, column), **style)


def plot_honest_accuracy(ax: Axes, runs: Sequence[Run]) -> None:
    """Fig. 3(c): mean accuracy (0 to 1) of the honest clients. Each round is light, the running mean is strong.

    There is no running mean of fewer than 40 rounds. Bands are as in Fig. 3(a).
    """
    window = max(run.recorded for run in runs) // 20 | 1
    smoothed = f": each round (light), mean of {window} rounds (strong)" * (window > 1)
    subject = numbered("c", f"Mean accuracy of honest clients{smoothed}", runs)
    prepare(ax, band_title(subject, runs), "accuracy (fraction correct)")
    for style, members in bundles(runs):
        accuracy = over_seeds(members, "honest_accuracy")
        if window > 1:
            light = accuracy.mean(axis=1)
            line(ax, light.index, light, color=style["color"], alpha=0.35, linewidth=0.6, zorder=1)
        band(ax, in_pieces(accuracy, members, window), **style)
        if mark_start(ax, members[0], color=style["color"]):
            ax.set_xlabel("round (dashed vertical line: MAD start)")


def in_pieces(values: Any, members: Sequence[Run], window: int) -> Any:
    """The running mean of a frame [t, run]. It doesn't cross rounds in which something happens: it changes after that.

    That is the first round of the attack, and each round in which the active clients change. In a piece that is shorter
    than the window, the window is a third of it, because the mean of all its rounds would be a flat line.
    """
    import pandas as pd

    def smooth(piece: Any) -> Any:
        return running_mean(piece, window if len(piece) >= window else len(piece) // 3 | 1)

    each = []
    for column, run in enumerate(members):
        causes = [run.config.get("attack_start") or 1, *changes(run.clients)]
        pieces = values.iloc[:, column].groupby(np.searchsorted(sorted(causes), values.index, side="right"))
        each.append(pieces.transform(smooth))
    return pd.concat(each, axis=1)


def running_mean(values: Any, window: int) -> Any:
    """Mean over the `window` (odd) values around each value. Near the ends it covers the values that exist."""
    return values.rolling(window, center=True, min_periods=1).mean()


# ---------------------------------------------------------------- reputation and trust


def plot_score(ax: Axes, run: Run, score: str) -> None:
    """Reputation or trust (`score`, both 0 to 1) of each client over the rounds. What MAD judges has the threshold.

    Attackers, and honest clients that were excluded, have a named line each. If they are many, a kind of clients shares
    a line, its mean, and a band from the least to the greatest of them.
    """
    prepare(ax, title(f"{score.capitalize()} of each client, {strategy(run)}", [run]), f"{score} (0 to 1)")
    ax.set_ylim(-0.05, 1.05)
    clients, scored = run.clients, run.clients.dropna(subset=score)
    attackers = np.unique(clients.loc[clients["malicious"] == 1, "client"])
    mistaken = np.setdiff1d(clients.loc[clients["active"] == 0, "client"], attackers)
    honest = scored[~scored["client"].isin([*attackers, *mistaken])]
    if clients["client"].nunique() > MOST_CLIENTS:
        plot_range(ax, honest, score, kind="honest clients", color=HONEST)
    else:
        for _, history in honest.groupby("client"):
            line(ax, history["round"], history[score], label="honest clients", color=HONEST, linewidth=0.8)
    for members, kind, several, colour, dashes in (
        (mistaken, "honest", "honest clients, excluded", HONEST, LINES[2]),
        (attackers, "attacker", "attackers", ATTACKER, LINES[1]),
    ):
        theirs = scored[scored["client"].isin(members)]
        if len(members) > MOST_NAMED:
            plot_range(ax, theirs, score, kind=several, color=colour, linestyle=dashes)
            continue
        for number, client in enumerate(members):
            history = theirs[theirs["client"] == client]
            style = named_style(number, len(history))
            line(ax, history["round"], history[score], label=f"client {client} ({kind})", color=colour, **style)
    mark_exclusions(ax, run, score)
    mark_start(ax, run, color="black", label="MAD start")
    if (threshold := run.threshold(score)) is not None:
        ax.axhline(threshold, color=THRESHOLD, linestyle=":", label=f"threshold {threshold:g}")


def named_style(number: int, rounds: int) -> dict[str, Any]:
    """The style of a named client: a strong line with about ten markers over the `rounds` scored, which alternate."""
    step = max(2, rounds // 10) if rounds > 1 else 1
    return {
        "linestyle": LINES[1 + number % 3], "marker": MARKERS[number % len(MARKERS)], "markersize": 6.5,
        "markeredgecolor": "white", "markevery": (number * max(1, step // 3) % step, step),
    }  # fmt: skip


def plot_range(ax: Axes, scored: Any, score: str, kind: str, **style: Any) -> None:
    """The mean score of the clients of a kind as a line, and a band from the least to the greatest of them."""
    by_round = scored.groupby("round")[score]
    low, mean, high = by_round.min(), by_round.mean(), by_round.max()
    line(ax, mean.index, mean, label=f"{kind}: mean and range", **style)
    ax.fill_between(mean.index, low, high, color=style["color"], alpha=0.25, linewidth=0)


def mark_exclusions(ax: Axes, run: Run, score: str) -> None:
    """An x in the first round in which a client is not averaged, at the last score that the client had."""
    clients = run.clients
    first = clients[clients["active"] == 0].groupby("client")["round"].min()
    until = clients[clients["round"] <= clients["client"].map(first)]
    last = until.groupby("client")[score].last().dropna()
    if len(last):
        ax.plot(first[last.index], last, "x", label="excluded", color="black", markersize=8, markeredgewidth=1.8)


def mark_start(ax: Axes, run: Run, **style: Any) -> bool:
    """A dashed vertical line at the MAD start, if the run has reached it. Returns whether it has."""
    start = run.config.get("mad_start")
    if reached := start is not None and start <= run.recorded:
        ax.axvline(start, linestyle="--", linewidth=1, zorder=1, **style)
    return reached


# ---------------------------------------------------------------- the figures of a folder


def figures(runs: Sequence[Run], folder: Path, parts: Sequence[Path] = ()) -> Iterator[tuple[Path, Figure]]:
    """All figures of the runs at or below `folder`, each with its path below the folder of figures, without suffix.

    Tables are those at or below the `parts` of the folder (default: the whole folder).
    """
    tables = [table for part in parts or [folder] for table in ([part] * part.is_file() or part.rglob("table.csv"))]
    tabled = {table.parent.relative_to(folder) for table in tables if table.name == "table.csv"}
    groups: dict[Path, list[Run]] = {group: [] for group in tabled}
    for run in sorted(runs, key=by_start):
        groups.setdefault(run.folder.relative_to(folder).parent, []).append(run)
    if sampled := [run for run in runs if run.samples]:
        yield Path("fig2"), samples_figure(min(sampled, key=lambda run: run.data.startswith("phantom")))
    elif runs:
        say(f"{folder}: no run has a readable samples.npz, so fig2 is not drawn", sys.stderr)
    for group in sorted(groups, key=natural):
        members, maps = groups[group], [*grid_figures(folder / group / "table.csv")] if group in tabled else []
        for name, figure in maps:
            yield group / name, figure
        beside = beside_figure(folder / group) if group in tabled else None
        if beside:
            yield group / "beside", beside
        if not members and not maps and not beside:
            why = "there are no runs, and a heat map needs several rows and columns"
            say(f"{folder / group}: not drawn, {why}", sys.stderr)
        if len(kinds := bundles(members)) > MOST_LINES:
            many = f"{len(kinds)} kinds of runs are too many for one figure of lines"
            say(f"{folder / group}: {many}; copy the runs that you want to compare into one folder", sys.stderr)
            if maps:  # they show the runs of an experiment
                continue
        else:
            for name, figure in comparisons(members):
                yield group / name, figure
        for sharing in alike(members):
            yield group / f"trust-{fitting(sharing[0].name)}", scores_figure(sharing)


def comparisons(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """The figures that compare the runs of a folder, with their names."""
    for name, plot in zip(CURVES, (plot_loss, plot_accuracy, plot_honest_accuracy)):
        if drawable := [run for run in runs if run.rounds[name].notna().any()]:
            figure, ax = new_figure()
            plot(ax, drawable)
            yield name, figure
    for name, draw in FIGURES.items():
        if figure := draw(runs):
            yield name, figure


def samples_figure(run: Run) -> Figure:
    """Fig. 2: training images. They are the same in all runs on one data set."""
    assert run.samples
    figure, axes = new_figure(columns=4, height=2.7)
    plot_samples(axes, *run.samples)
    figure.suptitle(f"Fig. 2: training images\n{run.data}", fontsize="medium")
    return figure


def scores_figure(runs: Sequence[Run]) -> Figure:
    """Reputation and trust of one run, one above the other, or of several kinds of runs, each with a row of its own.

    Of runs that differ only in their seed, the first is shown.
    """
    runs = [members[0] for members in kinds(runs).values()]
    subject, note = "Reputation and trust of each client", ""
    if len(runs) == 1:
        figure, axes = new_figure(rows=2, height=6)
        pairs, subject = [axes], f"{subject}, {strategy(runs[0])}"
        note = f"; excluded: {exclusions(runs[0])}"
    else:
        figure, pairs = new_figure(rows=len(runs), columns=2, height=1.5 + 1.8 * len(runs), width=10)
    for run, pair, text in zip(runs, pairs, variants(runs)):
        for ax, score in zip(pair, SCORES):
            plot_score(ax, run, score)
            ax.set_title("", loc="left")
            ax.set_xlabel("round" if ax.get_subplotspec().is_last_row() else "")
        if len(runs) > 1:
            pair[0].set_title(titled("", f"{text}; excluded: {exclusions(run)}"), loc="left", fontsize="medium")
    figure.suptitle(title(subject, runs, note), fontsize="medium", x=0.02, ha="left")
    return figure


# ---------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> int:
    """Draw what the command line asks for; returns the exit status."""
    parser = Parser(prog="plot.py", description="Draw the figures of all runs at or below a folder.")
    about = "a results folder of madsim.py, or the folder of one run; several are drawn as one, files are left out"
    parser.add_argument("folder", type=a_path, nargs="+", help=about)
    about = "where figures are written (default: FOLDER/figures; of several, figures in the folder that holds them)"
    parser.add_argument("--out", type=a_path, metavar="DIR", help=about)
    parser.add_argument(
        "--report", action="store_true", help="also write report.html: one page with all figures, tables and settings"
    )
    parser.add_argument("--play", action="store_true", help="write one page per run that plays it, and no figures")
    parser.add_argument("--hide", action="store_true", help="with --play: pages that first hide who is malicious")
    args = parser.parse_args(argv)
    if args.hide and not args.play:
        parser.exit(2, "plot: --hide needs --play\n")
    if args.play and args.report:
        parser.exit(2, "plot: --play writes no figures, --report needs them; use one after the other\n")
    there = [path for path in args.folder if path.exists()] or args.folder
    try:
        folder, parts = together(there)
    except ValueError as error:
        parser.exit(2, f"plot: {error}\n")
    parts += [path for path in args.folder if path not in there]
    try:
        count = draw(folder, parts, args.out or folder / "figures", args.report, args.play, args.hide)
    except BrokenPipeError:  # `| head` has read enough
        raise
    except OSError as error:
        say(f"plot: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not args.play:
        print(f"{count} figure{',' if count == 1 else 's, each'} as PNG and SVG")
    return 0 if count else 2


def draw(folder: Path, parts: Sequence[Path], out: Path, report: bool, play: bool, hide: bool) -> int:
    """Write the figures of the `parts` of a folder, and their report, or the pages that play their runs.

    Returns their number.
    """
    from matplotlib import style

    pictures = {}
    # The user's own matplotlibrc may ask for LaTeX, which may be missing. A $ in the name of a folder is only a $.
    with style.context({"text.parse_math": False}, after_reset=True):
        runs = load_runs(parts, tables=not play)
        if play:
            return len(pages.write_players(runs, folder, out, hide))
        for name, figure in figures(runs, folder, parts):
            pictures[name.as_posix()] = save(figure, out / name)
            say(whole(pictures[name.as_posix()]))
        say_what_stays(pictures.values())
        if report and (runs or pictures):
            pages.write(pages.report(runs, pictures, folder), out / "report.html")
    return len(pictures)


def say_what_stays(drawn: Collection[Path]) -> None:
    """Name the figures of earlier calls that lie beside the PNG files `drawn` by this call. They look current."""
    for place in sorted({path.parent for path in drawn}):
        others = sorted({path for path in place.glob("*.png") if path.with_suffix(".svg").exists()} - {*drawn})
        names = [path.name for path in others[:NAMED]] + [f"{len(others) - NAMED} more"] * (len(others) > NAMED)
        if names:
            about = "are figures of earlier calls" if len(others) > 1 else "is a figure of an earlier call"
            say(f"{place}: {', '.join(names)} {about}; delete what you don't need", sys.stderr)


if __name__ == "__main__":
    sys.exit(as_command(main))
