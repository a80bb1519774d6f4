"""What all figures share: colours and line styles, lines over several seeds, and the files. Nothing uses pyplot."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.folder import printable, replace_file
from harness.runs import Run, kinds, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): colour-blind readers can tell these apart. Their yellow is missing: it is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1.2)))
HONEST = "#8C8C8C"
DPI = 150  # dots per inch of PNG files
LEAST_SHARE = 0.62  # of the figure's width is for the Axes and gaps; a legend that leaves less lies below them
LABEL_WIDTH = 90  # characters per line of a label in the legend
TICK_WIDTH = 26  # characters per line of a label beside the Axes


def new_figure(
    rows: int = 1, columns: int = 1, height: float = 4.2, width: float = 8, sharex: bool = True, **layout: Any
) -> Any:
    """A figure of `width` x `height` inches, and its Axes; `layout` as in matplotlib's `subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=sharex, **layout)


def prepare(ax: Axes, heading: str, unit: str) -> None:
    """Set the title, the names of the axes and a light grid."""
    ax.set_title(heading, fontsize="medium", loc="left")  # a long title then continues above the legend
    ax.set(xlabel="round", ylabel=unit)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # type: ignore[call-arg]  # it is a MaxNLocator
    ax.margins(x=0.01)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)


def bundles(runs: Sequence[Run]) -> list[tuple[dict[str, Any], list[Run]]]:
    """The `kinds` of the runs, each with the label, colour and style of its line."""
    styles = ({"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]} for i in range(len(runs)))
    return [({"label": text} | style, members) for (text, members), style in zip(kinds(runs).items(), styles)]


def band_title(subject: str, runs: Sequence[Run]) -> str:
    """The `title`, with the meaning of the bands if there are any."""
    banded = any(len(members) > 1 for _, members in bundles(runs))
    return title(subject, runs, "; line: mean, band: ± one standard deviation" * banded)


def over_seeds(members: Sequence[Run], column: str) -> Any:
    """A column of rounds.csv of each run as a pandas frame [t, run], for the rounds t that all runs have."""
    import pandas as pd

    each = [run.rounds.drop_duplicates("round", keep="last").set_index("round")[column] for run in members]
    return pd.concat(each, axis=1, join="inner")


def band(ax: Axes, values: Any, **style: Any) -> None:
    """The mean of the columns as a line. Several columns also give a band of one deviation to each side."""
    mean, spread = values.mean(axis=1), values.std(axis=1)
    line(ax, values.index, mean, **style)
    if values.shape[1] > 1:
        ax.fill_between(values.index, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)


def line(ax: Axes, x: Any, y: Any, **style: Any) -> None:
    """A line. A single point is drawn as a dot, because a line would not show it."""
    ax.plot(x, y, **{"marker": "." if len(x) == 1 else None} | style)


def add_legend(figure: Figure) -> None:
    """One legend for all Axes: to their right if it is narrow, else below them in a figure that grows by its height."""
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip((textwrap.fill(printable(label), LABEL_WIDTH) for label in labels), handles))
    if not entries:
        return
    content: Any = {"handles": list(entries.values()), "labels": list(entries), "fontsize": "small"}
    figure.draw_without_rendering()  # lays it out without a legend
    legend = figure.legend(**content, loc="outside right center")
    size = legend.get_window_extent()
    share = size.width / figure.bbox.width
    if axes_share(figure) - share > LEAST_SHARE and size.height < figure.bbox.height:
        return
    legend.remove()
    legend = figure.legend(**content, loc="outside lower center", ncols=max(1, int(0.95 / share)))
    figure.set_figheight((figure.bbox.height + legend.get_window_extent().height) / figure.dpi)


def axes_share(figure: Figure) -> float:
    """The share of the figure's width from the left end of its Axes to their right end, as drawn."""
    places = [ax.get_window_extent() for ax in figure.axes]
    return (max(place.x1 for place in places) - min(place.x0 for place in places)) / figure.bbox.width


def save(figure: Figure, path: Path) -> Path:
    """Write `path`.png, which is returned, and `path`.svg, with a legend, see `add_legend`."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))  # matplotlib can't draw the name of a folder that is not UTF-8
    add_legend(figure)
    figure.draw_without_rendering()  # lays out the figure, once for both files
    figure.set_layout_engine("none")
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(path.name + suffix) for suffix in (".png", ".svg"))
    with matplotlib.rc_context({"svg.hashsalt": "madsim"}):  # and no date: equal results give equal files
        for file, options in ((png, {"dpi": DPI}), (svg, {"metadata": {"Date": None}})):
            content = io.BytesIO()
            figure.savefig(content, format=file.suffix[1:], **options)
            replace_file(file, content.getvalue())
    return png
