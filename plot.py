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
import base64
import csv
import html
import io
import json
import math
import reprlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

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

CURVES = ("loss", "accuracy", "honest_accuracy")
SCORES = ("reputation", "trust")
JUMP_PARTS = {"composition": "who is averaged", "model": "the model itself"}  # and how the figure calls them
OTHERS = {"test": "test images", "validation": "validation images of the same clients"}  # than training images
MOST_LINES = 9  # in one figure; an experiment with more kinds of runs is drawn as heat maps alone
METRICS = {  # of an experiment, and how its heat maps call them
    "honest_accuracy": "Accuracy of the honest clients", "test_accuracy": "Accuracy on the test set",
    "test_sensitivity": "Sensitivity (share of pneumonia found) on the test set",
}  # fmt: skip
LABELS = ("normal", "pneumonia")  # the data set's labels 0 and 1
PAGE_BYTES = 2_500_000  # of the numbers in a page that plays a run
SAMPLE_BYTES = 100_000  # of a run's samples.npz, unpacked, at most; madsim's have 3678

# What config.json may hold under the names that are read here.
KINDS = {
    "rounds": int, "mad_start": (int, type(None)), "seed": int, "clients": int, "malicious": (int, float),
    "flip": (int, float), "attack": str, "rule": str, "dataset": str, "data": dict, "settings": dict,
}  # fmt: skip

# ---------------------------------------------------------------- reading runs


@dataclass(frozen=True, eq=False)
class Run:
    """A run's folder as read. What its files lack is missing: a key of `config`, rows, or NaN in a column."""

    folder: Path
    config: dict
    rounds: DataFrame  # "round" and CURVES; one row a round
    clients: DataFrame  # "round", "client", "malicious", "active" and SCORES; one row a round and client
    samples: tuple[NDArray, NDArray] | None  # images uint8 [4, 28, 28] and their labels [4]
    jump: dict | None  # of the first exclusion: its round, and loss and accuracy, each with its JUMP_PARTS
    membership: DataFrame  # "round" and, for each of OTHERS, its advantage, error and chance; empty if not measured

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def attacked(self) -> bool:
        """Whether any client is malicious, which is taken for granted where the configuration does not say."""
        return self.config.get("malicious") != 0

    @property
    def recorded(self) -> int:
        """The last round that was written; 0 before the first."""
        return int(max((table["round"].max() for table in (self.rounds, self.clients) if len(table)), default=0))

    @property
    def unfinished(self) -> bool:
        """Still going, or stopped early."""
        return self.recorded < self.config.get("rounds", 0)

    @property
    def length(self) -> str:
        """'100 rounds', or '37 of 100 rounds' of an unfinished run."""
        return f"{self.recorded} of {self.config['rounds']} rounds" if self.unfinished else f"{self.recorded} rounds"

    @property
    def data(self) -> str:
        """The data set used, and whether the phantom had to stand in for the real one."""
        data = self.config.get("data") or {}
        name = data.get("name") or self.config.get("dataset") or "unknown data set"
        if name != "phantom":
            return name
        return "phantom images, PneumoniaMNIST was not available" if data.get("note") else "phantom images"


def find_runs(folder: str | Path) -> list[Path]:
    """Every folder at or below `folder` with a config.json and a rounds.csv, sorted.

    Raises FileNotFoundError if `folder` is not there or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one that madsim.py has written results to")
    configs = [path for path in folder.rglob("config.json") if path.is_file()]
    runs = sorted(path.parent for path in configs if (path.parent / "rounds.csv").is_file())
    if not runs:
        raise FileNotFoundError(f"{folder} holds no run, that is no folder with config.json and rounds.csv")
    return runs


def load_run(folder: str | Path) -> Run:
    """Read a run's folder, complete or not. Raises ValueError if its config.json is damaged."""
    folder = Path(folder)
    config = read_config(folder / "config.json")
    rounds = read_table(folder / "rounds.csv", ["round"], CURVES)
    clients = read_table(folder / "clients.csv", ["round", "client", "malicious"], ["active", *SCORES, "train_loss"])
    measured = [f"{name}_{kind}" for name in OTHERS for kind in ("advantage", "error", "chance")]
    membership = read_table(folder / "membership.csv", ["round"], measured).dropna()
    samples, jump = read_samples(folder / "samples.npz"), read_jump(folder / "summary.json")
    return Run(folder, config, rounds, clients, samples, jump, membership)


def read_config(path: Path) -> dict:
    """What config.json holds; ValueError if it is no JSON object, or one of the `KINDS` is of another type."""

    def check(holder: dict, kinds: dict) -> None:
        for name in holder.keys() & kinds:
            value = holder[name]
            if not isinstance(value, kinds[name]) or (isinstance(value, (int, float)) and not abs(value) < 2**63):
                raise ValueError(f"{name} is {reprlib.repr(value)}")

    try:
        config = json.loads(path.read_bytes())
        check({"it": config}, {"it": dict})
        check(config, KINDS)
        check(config.get("data", {}), {"name": str, "note": str})
        check(config.get("settings", {}), {"threshold": (int, float)})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its config.json is damaged ({error})") from None
    return config


def read_table(path: Path, keys: Sequence[str], values: Sequence[str]) -> DataFrame:
    """These columns of a CSV file, as numbers. A row without all its `keys` is left out, an absent value is NaN."""
    import pandas as pd

    columns = [*keys, *values]
    text = path.read_text(errors="replace") if path.is_file() else ""
    complete = text[: text.rfind("\n") + 1].strip()  # a run killed while writing leaves a torn last line
    options = {"index_col": False, "on_bad_lines": "skip", "quoting": csv.QUOTE_NONE, "low_memory": False}
    with warnings.catch_warnings(action="ignore"):  # that longer rows lose what is beyond the last column
        table = pd.read_csv(io.StringIO(complete or ",".join(columns)), **options)
    table = table.reindex(columns=columns).apply(pd.to_numeric, errors="coerce")
    numbers = table[list(keys)]  # rounds and clients are numbered; what no number can be is left out
    table = table[((numbers >= 0) & (numbers < 2**31) & (numbers % 1 == 0)).all(axis=1)]
    return table.astype(dict.fromkeys(keys, int))


def read_grid(path: Path) -> DataFrame:
    """An experiment's table.csv, one row a run, those left out that did not come to their end, with `right`: the share
    of its clients that are attackers and excluded, or honest and not. ValueError if it lacks something."""
    import pandas as pd

    table = pd.read_csv(path, dtype={"row": str, "column": str}).fillna({"row": "", "column": ""})
    numbers = ["seed", "rounds", "clients", "attackers", "true_exclusions", "false_exclusions", *METRICS]
    if lacking := [name for name in ["row", "column", "complete", "data", *numbers] if name not in table]:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    table = table[table["complete"].eq(True)].copy()
    table[numbers] = table[numbers].apply(pd.to_numeric)
    missed = table["attackers"] - table["true_exclusions"]
    table["right"] = 1 - (missed + table["false_exclusions"]) / table["clients"]
    return table


def read_samples(path: Path) -> tuple[NDArray, NDArray] | None:
    """Four images uint8 [4, 28, 28] and their labels [4] from an npz file; None if it is absent or damaged."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            if sum(member.file_size for member in arrays.zip.infolist()) > SAMPLE_BYTES:
                return None
            images, labels = arrays["images"], arrays["labels"]
    except Exception:  # of a dozen kinds: zipfile's, zlib's, numpy's
        return None
    whole = images.shape == (4, 28, 28) and labels.shape == (4,) and np.isin(labels, range(len(LABELS))).all()
    return (images, labels.astype(int)) if whole and images.dtype == np.uint8 else None


def read_jump(path: Path) -> dict | None:
    """The first exclusion's jump from a summary.json; None where there is none, or no such file, or it is damaged."""
    try:
        jump = json.loads(path.read_bytes())["jumps"][0]
        parts = {name: {part: float(jump[name][part]) for part in JUMP_PARTS} for name in ("loss", "accuracy")}
        return {"round": int(jump["round"])} | parts
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None


def shortcomings(run: Run) -> str:
    """In words, what of a run can't be drawn; empty if all of it can."""
    columns = {name: run.rounds[name] for name in CURVES} | {name: run.clients[name] for name in ("active", *SCORES)}
    absent = [name for name, values in columns.items() if values.isna().all()]
    parts = [f"has {run.length}"] * run.unfinished + [f"nothing to draw of {', '.join(absent)}"] * bool(absent)
    return "; ".join(parts)


# ---------------------------------------------------------------- naming runs


def strategy(run: Run) -> str:
    """'MAD from round 5', 'never (FedAvg)' or 'no attack', and the aggregation rule if it is not FedAvg."""
    start, rule = run.config.get("mad_start"), run.config.get("rule", "mean")
    words = ["no attack"] * (not run.attacked) + [f"MAD from round {start}"] * (start is not None)
    if not words:
        return f"never ({'FedAvg' if rule == 'mean' else rule})"
    return ", ".join(words) + (f" ({rule})" if rule != "mean" else "")


def variants(runs: Sequence[Run]) -> list[str]:
    """What tells each run from the others, its seed aside: its strategy and which attack, on how many."""
    fields = ("attack", "malicious", "flip", "attack_start", "attack_period")
    fields += ("clients", "partition", "concentration", "rounds")
    differing = [name for name in fields if len({run.config.get(name) for run in runs if run.attacked}) > 1]
    texts = []
    for run in runs:
        details = [f"{name} {run.config.get(name)}" for name in differing if run.attacked]
        texts.append(", ".join([strategy(run), *details]))
    # What still looks alike, say two presets of MAD, is told apart by the folder's name.
    keys = [(text, run.config.get("seed")) for text, run in zip(texts, runs)]
    count = Counter(keys)
    return [f"{key[0]} ({run.name})" if count[key] > 1 else key[0] for key, run in zip(keys, runs)]


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


def title(subject: str, runs: Sequence[Run]) -> str:
    """`subject`, and below it the data set, rounds and seeds of the runs."""
    data = " and ".join(dict.fromkeys(run.data for run in runs))
    length = " and ".join(dict.fromkeys(run.length for run in runs))
    seeds = sorted({run.config["seed"] for run in runs if "seed" in run.config})
    word = {0: "seed unknown", 1: "seed "}.get(len(seeds), "seeds ")
    return f"{subject}\n{data}, {length}, {word}{', '.join(map(str, seeds))}"


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

    for run in [run for run in runs if run.samples][:1]:
        yield Path("fig2"), samples_figure(run)
    for group, members in groupby(sorted(runs, key=experiment), key=experiment):
        members = sorted(members, key=by_start)
        for name, figure in grid_figures(folder / group / "table.csv"):
            yield group / name, figure
        if len(kinds := bundles(members)) > MOST_LINES:
            print(f"{folder / group}: {len(kinds)} kinds of runs are too many for one figure of lines", file=sys.stderr)
            continue
        measured = [run for run in members if len(run.membership)]
        if measured:
            yield group / "membership", membership_figure(measured)
        for name, plot in zip(CURVES, (plot_loss, plot_accuracy, plot_honest_accuracy)):
            drawable = [run for run in members if run.rounds[name].notna().any()]
            if drawable:
                figure, ax = new_figure()
                plot(ax, drawable)
                yield group / name, figure
        excluding = [run for run in members if run.jump]
        if excluding:
            yield group / "jump", jump_figure(excluding)
        for run in members:
            if run.clients[list(SCORES)].notna().any(axis=None):
                yield group / f"trust-{run.name}", scores_figure(run)


def by_start(run: Run) -> tuple:
    """Sorting key, the paper's order: from the earliest MAD start to never, then without attack."""
    start = run.config.get("mad_start")
    return run.config.get("malicious") == 0, start is None, start or 0, run.config.get("seed") or 0, run.name


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
    metric, share = f"last 10 of {rounds} rounds, mean ± standard deviation", f"after {rounds} rounds, mean"
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
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(path.name + suffix) for suffix in (".png", ".svg"))
    with matplotlib.rc_context({"svg.hashsalt": "madsim"}):  # and no date: equal results give equal files
        figure.savefig(png, dpi=150)
        figure.savefig(svg, metadata={"Date": None})
    return png


# ---------------------------------------------------------------- a page that plays a run


def play(run: Run) -> str:
    """An HTML page that plays the run, whole in itself: docs/player.html with the run's numbers put in.

    Of long runs with many clients a thinned set of rounds, see `frames`. Raises ValueError if the run has recorded
    nothing to play.
    """
    import numpy as np

    points = read_table(run.folder / "plane.csv", ["round", "client"], ["x", "y"])
    clients = run.clients.merge(points, on=["round", "client"]).drop_duplicates(["round", "client"])
    curves = run.rounds.drop_duplicates("round").set_index("round")
    clients = clients[clients["round"].isin(curves.index)]
    if clients.empty:
        raise ValueError("there is nothing to play: no plane.csv with where the models lie (of 50 clients at most)")
    members = sorted(clients["client"].unique())
    malicious = clients.groupby("client")["malicious"].max().reindex(members)
    excluded = clients[clients["active"] == 0].groupby("client")["round"].min().reindex(members)
    shown = frames(sorted(clients["round"].unique()), len(members), excluded.dropna())

    def table(column: str, scale: float | NDArray) -> NDArray:  # [rounds, clients]
        wide = clients.pivot(index="round", columns="client", values=column).reindex(index=shown, columns=members)
        return np.round(wide.to_numpy(float) * scale)

    reach = reaches(np.hypot(clients["x"], clients["y"]).groupby(clients["round"]).max()).reindex(shown)
    thousandths = 1000 / reach.to_numpy()[:, None]
    content = {
        "title": title(strategy(run), [run]).replace("\n", ": "),
        "rounds": shown, "malicious": malicious, "excluded": excluded, "start": run.config.get("mad_start"),
        "threshold": (run.config.get("settings") or {}).get("threshold"),
        "reach": [float(f"{value:g}") for value in reach],
        "points": np.stack([table("x", thousandths), table("y", thousandths)], axis=2),
        "trust": table("trust", 100), "reputation": table("reputation", 100),
    }  # fmt: skip
    content |= {name: curves[name].reindex(shown).round(4) for name in CURVES}
    content = {name: plain(value) for name, value in content.items()}
    page = (Path(__file__).parent / "docs" / "player.html").read_text()
    run_json = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace(">{}</script>", f">{run_json}</script>", 1)


def reaches(far: Series) -> Series:
    """How far the drawing of each round reaches, 1, 2 or 5 times a power of ten: to the `far`thest model of the five
    rounds before and after, so that it seldom changes."""
    import numpy as np

    far = far.replace(0, np.nan).rolling(11, center=True, min_periods=1).max().fillna(1)
    power, steps = 10 ** np.floor(np.log10(far)), np.array([1, 2, 5, 10])
    return power * steps[np.searchsorted(steps, far / power)]


def frames(rounds: list[int], clients: int, excluded: Series) -> list[int]:
    """The rounds that a page shows: all of them or, where they would take more than PAGE_BYTES, an even selection with
    the first, the last, and those in which clients were `excluded`."""
    import numpy as np

    room = max(2, PAGE_BYTES // (22 * clients + 40) - len(excluded))  # so many bytes take a client and a round
    even = {rounds[i] for i in np.linspace(0, len(rounds) - 1, min(room, len(rounds))).round().astype(int)}
    return sorted(map(int, even | set(excluded)))


def plain(value):
    """Numbers as JSON knows them: whole ones as integers, None for NaN and infinity."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() else value
    return value


# ---------------------------------------------------------------- a page that reports runs

REPORT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>madsim: {name}</title>
<style>
  body {{ margin: 0 auto; padding: 1rem; max-width: 70rem; font: 1rem/1.4 system-ui, sans-serif; color: #111; }}
  table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
  th, td {{ border-bottom: 1px solid #ccc; padding: 0.2rem 0.7rem; text-align: left; vertical-align: top; }}
  img {{ max-width: 100%; }} pre {{ overflow-x: auto; }} h2 {{ margin: 1.5rem 0 0.3rem; }}
</style></head><body>
<h1>madsim: {name}</h1>
<h2>Runs</h2>
{table}
<h2>Figures</h2>
{figures}
<h2>Settings</h2>
{settings}
</body></html>
"""


def report(runs: Sequence[Run], pictures: Sequence[Path], folder: Path) -> str:
    """One HTML page, whole in itself, of the runs at or below `folder`: their table, the pictures (PNG files), and all
    settings."""

    def image(path: Path) -> str:
        content = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{content}">'

    def settings(run: Run) -> str:
        name, every = str(run.folder.relative_to(folder)), json.dumps(run.config, indent=2)
        return f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(every)}</pre></details>"

    return REPORT.format(
        name=html.escape(folder.resolve().name),
        table=runs_table(runs, folder),
        figures="\n".join(map(image, pictures)),
        settings="\n".join(map(settings, runs)),
    )


def runs_table(runs: Sequence[Run], folder: Path) -> str:
    """The runs as an HTML table: what was done, who was excluded when, and what came of it in the last ten rounds."""
    import pandas as pd

    rows = []
    for run in sorted(runs, key=lambda run: (run.folder.parent, by_start(run))):
        last = run.rounds[list(CURVES)].tail(10).mean()
        rows.append(
            {
                "run": str(run.folder.relative_to(folder)), "data": run.data, "strategy": strategy(run),
                "rounds": run.length.removesuffix(" rounds"), "seed": run.config.get("seed"), "attack": attack_of(run),
                "excluded": exclusions(run),
            } | {f"{name.replace('_', ' ')}, last 10 rounds": value for name, value in last.items()}
        )  # fmt: skip
    return pd.DataFrame(rows).to_html(index=False, border=0, float_format="{:.3f}".format, na_rep="")


def attack_of(run: Run) -> str:
    """'label_flip, 0.2 of the clients', or 'none'."""
    return f"{run.config.get('attack')}, {run.config.get('malicious')} of the clients" if run.attacked else "none"


def exclusions(run: Run) -> str:
    """'attacker 2, 8 in round 5; honest 3 in round 7', or 'nobody'."""
    out = run.clients[run.clients["active"] == 0].sort_values("round").drop_duplicates("client")
    groups = out.sort_values("client").groupby(["round", "malicious"])["client"]
    kinds = {0: "honest", 1: "attacker"}
    texts = [f"{kinds.get(bad)} {', '.join(map(str, who))} in round {t}" for (t, bad), who in groups]
    return "; ".join(texts) or "nobody"


# ---------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> int:
    import matplotlib

    parser = argparse.ArgumentParser(prog="plot.py", description="Draw the figures of all runs at or below a folder.")
    parser.add_argument("folder", type=Path, help="a results folder of madsim.py, or one run's")
    parser.add_argument("--out", type=Path, help="where figures are written (default: FOLDER/figures)")
    parser.add_argument("--report", action="store_true", help="write a page with all of it besides: report.html")
    parser.add_argument("--play", action="store_true", help="write a page that plays each run instead: play-RUN.html")
    args = parser.parse_args(argv)
    out, pictures = args.out or args.folder / "figures", []
    try:
        with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a folder's name is just that
            runs = load_runs(args.folder)
            if args.play:
                return write_players(runs, out)
            for name, figure in figures(runs, args.folder):
                pictures.append(save(figure, out / name))
                print(pictures[-1])
            if args.report and runs:
                out.mkdir(parents=True, exist_ok=True)
                (out / "report.html").write_text(report(runs, pictures, args.folder), encoding="utf-8")
                print(out / "report.html")
    except OSError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{len(pictures)} figure{'s' * (len(pictures) != 1)}, each as PNG and SVG")
    return 0 if pictures else 2


def write_players(runs: list[Run], out: Path) -> int:
    """A page for each run that can be played; the exit status."""
    count = 0
    for run in runs:
        try:
            page = play(run)
        except ValueError as error:
            print(f"{run.folder}: not played, {error}", file=sys.stderr)
            continue
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"play-{run.name}.html"
        path.write_text(page, encoding="utf-8")
        print(path)
        count += 1
    return 0 if count else 2


def load_runs(folder: Path) -> list[Run]:
    """The runs at or below `folder`, with a line on standard error for what can't be drawn of each."""
    runs, found = [], find_runs(folder)
    for path in sorted({path.parent for path in folder.rglob("config.json")} - set(found)):
        print(f"{path}: not drawn, it holds no rounds.csv", file=sys.stderr)
    for path in found:
        try:
            run = load_run(path)
        except (ValueError, OSError) as error:
            print(f"{path}: not drawn, {error}", file=sys.stderr)
            continue
        runs.append(run)
        if lacking := shortcomings(run):
            print(f"{path}: {lacking}", file=sys.stderr)
    if not any(run.samples for run in runs):
        print(f"{folder}: no run has a readable samples.npz, so fig2 is not drawn", file=sys.stderr)
    return runs


if __name__ == "__main__":
    sys.exit(main())
