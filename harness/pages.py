"""HTML pages that need no other file: one plays a run, the other reports all runs of a folder.

Their templates lie in pages/.
"""

import base64
import html
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np

from harness.console import say, whole
from harness.folder import fitting, plain, printable, replace_file
from harness.runs import (
    CURVES,
    SCORES,
    Run,
    alike,
    by_start,
    evenly,
    exclusions,
    kinds,
    natural,
    read_table,
    steady,
    strategy,
    title,
)

TEMPLATES = Path(__file__).parent / "pages"
PAGE_BYTES = 2_500_000  # of the numbers in a page that plays a run
D_BYTES = 9  # of them, d of a client in a round takes so many, with six significant digits
NUMBERS = ("rounds", "seed", *(f"mean {name.replace('_', ' ')}" for name in CURVES))  # columns of the table of runs
STEPS = (1, 1.5, 2, 3, 4, 6, 8, 10)  # the extents of a drawing: round, and at most half as large again as needed


def write_players(runs: Sequence[Run], folder: Path, out: Path, hide: bool = False) -> list[Path]:
    """Write a page below `out` for each run at or below `folder` that can be played. Returns the paths of the pages.

    Of two runs there is also a page with both, and only its path is returned, unless the page is to `hide` something.
    """
    written = []
    for run in runs:
        try:
            page = play(run, hide)
        except ValueError as error:
            say(f"{run.folder}: not played, {error}", sys.stderr)
            continue
        written.append(write(page, out / run.folder.relative_to(folder).parent / f"play-{fitting(run.name)}.html"))
    both = out / "side-by-side.html"
    if len(written) == 2 and not hide:
        return [write(side_by_side(*written), both)]
    both.unlink(missing_ok=True)  # that of earlier runs
    return written


def write(page: str, path: Path) -> Path:
    """Write an HTML page and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    say(whole(path))
    return path


def side_by_side(*players: Path) -> str:
    """The HTML page that plays two runs side by side, round by round: both pages in one."""
    template = Template((TEMPLATES / "beside.html").read_text(encoding="utf-8"))
    frame = '<iframe name="beside" title="{}" srcdoc="{}"></iframe>'.format
    frames = [frame(*map(html.escape, (printable(path.stem), path.read_text(encoding="utf-8")))) for path in players]
    return template.substitute(runs="\n".join(frames))


def play(run: Run, hide: bool = False) -> str:
    """The HTML page that plays the run: player.html with the numbers of the run.

    A long run with many clients is shown in selected rounds, see `frames`. The page can ask "what if" where it has d of
    all rounds, see `distances`. With `hide` the page first hides who is malicious. Raises ValueError if the run has
    recorded nothing to play.
    """
    points = read_table(run.folder / "plane.csv", ["round", "client"], ["x", "y"])
    clients = run.clients.reindex(columns=["round", "client", "malicious", "active", "d", *SCORES])
    clients = clients.merge(points, on=["round", "client"]).drop_duplicates(["round", "client"])
    curves = run.rounds.reindex(columns=["round", *CURVES, "honest_loss"]).drop_duplicates("round").set_index("round")
    clients = clients[clients["round"].isin(curves.index)]
    if clients.empty:
        raise ValueError("there is nothing to play; madsim writes plane.csv for at most 50 clients")
    rounds, members = (sorted(map(int, clients[name].unique())) for name in ("round", "client"))
    malicious = clients.groupby("client")["malicious"].max().reindex(members)
    excluded = clients[clients["active"] == 0].groupby("client")["round"].min().reindex(members)
    d = distances(clients, rounds)
    shown = frames(
        rounds, len(members), excluded.dropna(), PAGE_BYTES - (D_BYTES * len(clients) if d is not None else 0)
    )

    def table(column: str, scale: Any) -> list[list[int | None]]:  # [rounds, clients], whole numbers
        wide = clients.pivot(index="round", columns="client", values=column).reindex(index=shown, columns=members)
        numbers = np.round(wide.to_numpy(float) * scale)
        return [[int(value) if np.isfinite(value) else None for value in row] for row in numbers]

    reach = reaches(np.hypot(clients["x"], clients["y"]).groupby(clients["round"]).max()).reindex(shown)
    thousandths = 1000 / reach.to_numpy()[:, None]
    content = {
        "title": title(strategy(run), [run]).replace("\n", ": ", 1).replace("\n", " "),
        "data": f"{run.data}, {run.length}",
        "rounds": shown, "malicious": malicious, "excluded": excluded, "start": run.config.get("mad_start"),
        "threshold": run.threshold("trust"), "settings": run.config.get("settings") or {}, "d": d,
        "attack_start": run.config.get("attack_start") or 1, "hide": hide,
        "reach": [float(f"{value:g}") for value in reach],
        "points": [list(zip(*xy)) for xy in zip(table("x", thousandths), table("y", thousandths))],
        "trust": table("trust", 100), "reputation": table("reputation", 100),
        "active": ["".join("1" if value else "0" for value in row) for row in table("active", 1)],
    }  # fmt: skip
    content |= {name: values.reindex(shown).round(4) for name, values in curves.items()}
    run_json = json.dumps(plain(content), separators=(",", ":")).replace("<", "\\u003c")
    page = (TEMPLATES / "player.html").read_text(encoding="utf-8")
    return page.replace(">{}</script>", f">{run_json}</script>", 1)


def distances(clients: Any, rounds: list[int]) -> Any:
    """d as recorded [rounds, clients], NaN where a client has none. None if a round lacks it, or if it is too much."""
    wide = clients.pivot(index="round", columns="client", values="d")
    whole = rounds == list(range(1, len(rounds) + 1)) and wide.notna().any(axis=1).all()
    return wide.to_numpy(float) if whole and D_BYTES * wide.size <= PAGE_BYTES / 2 else None


def reaches(far: Any) -> Any:
    """The extent of a drawing in each round: one of the STEPS times a power of ten. It rarely changes: it holds
    the farthest models (`far`, by round) of the five rounds before and after."""
    far = far.replace(0, np.nan).rolling(11, center=True, min_periods=1).max().fillna(1)
    power = 10 ** np.floor(np.log10(far))
    return power * np.array(STEPS)[np.searchsorted(STEPS, far / power)]


def frames(rounds: list[int], clients: int, excluded: Any, room: int = PAGE_BYTES) -> list[int]:
    """The rounds that a page shows: all, or an even choice that fits into `room` bytes, and those of the `excluded`."""
    most = max(2, room // (23 * clients + 55) - len(excluded))  # bytes per client and per round
    return sorted({*evenly(rounds, most), *map(int, excluded)})


def report(runs: Sequence[Run], pictures: Mapping[str, Path], folder: Path) -> str:
    """The HTML page that reports the runs at or below `folder`: their table, all pictures, and all settings.

    `pictures` are PNG files by the names of their figures, as in "fig3a/loss".
    """

    def image(name: str, path: Path) -> str:
        content, caption = base64.b64encode(path.read_bytes()).decode(), html.escape(name)
        picture = f'<img alt="{caption}" src="data:image/png;base64,{content}">'
        return f'<figure id="{quote(printable(name))}"><figcaption>{caption}</figcaption>{picture}</figure>'

    def settings(run: Run) -> str:
        name, every = str(run.folder.relative_to(folder)), json.dumps(run.config, indent=2)
        return f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(every)}</pre></details>"

    return Template((TEMPLATES / "report.html").read_text(encoding="utf-8")).substitute(
        name=html.escape(folder.resolve().name),
        table=runs_table(runs, pictures, folder) if runs else "",
        figures="\n".join(image(*picture) for picture in pictures.items()),
        settings="\n".join(map(settings, runs)),
    )


def runs_table(runs: Sequence[Run], pictures: Iterable[str], folder: Path) -> str:
    """The runs as an HTML table: strategy, attack, exclusions, and the means of at most ten last rounds.

    What is the same in all runs is said once, above it. Each run links to the figure of its trust, or else to the first
    figure of its folder.
    """
    rows = []
    for run in sorted(runs, key=lambda run: (natural(run.folder.parent), by_start(run))):
        last = steady(run.rounds, run.clients)[list(CURVES)].tail(10)
        attack = f"{run.config.get('attack')}, {run.config.get('malicious')} of the clients"
        rows.append(
            {
                "run": str(run.folder.relative_to(folder)), "data": run.data, "strategy": strategy(run),
                "rounds": run.length.split(" round")[0], "seed": str(run.config.get("seed", "")),
                "attack": attack if run.attacked else "none", "excluded": exclusions(run),
                "averaged rounds": f"last {len(last)}",
            } | {f"mean {name.replace('_', ' ')}": decimals(value) for name, value in last.mean().items()}
        )  # fmt: skip
    facts = ("data", "strategy", "rounds", "seed", "attack", "averaged rounds")
    same = [name for name in facts if len(runs) > 1 and len({row[name] for row in rows}) == 1]
    shown = [name for name in rows[0] if name not in same]
    figures = figures_of(runs, pictures, folder)

    def cell(tag: str, name: str, text: str) -> str:
        content, kind = html.escape(text), ' class="number"' * (name in NUMBERS)
        if name == "run" and text in figures:
            content = f'<a href="#{quote(printable(figures[text]))}">{content}</a>'
        return f"<{tag}{kind}>{content}</{tag}>"

    common = "; ".join(f"{name} {rows[0][name]}" for name in same)
    lines = [
        [cell("th", name, name) for name in shown],
        *([cell("td", name, row[name]) for name in shown] for row in rows),
    ]
    table = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return (
        f"<p>In all runs: {html.escape(common)}.</p>" * bool(same) + f'<div class="wide"><table>{table}</table></div>'
    )


def decimals(value: float) -> str:
    """Three decimals; nothing for a missing value."""
    return "" if np.isnan(value) else f"{value:.3f}"


def figures_of(runs: Sequence[Run], pictures: Iterable[str], folder: Path) -> dict[str, str]:
    """By the paths of the runs below `folder`, the figures that show most of them; see `runs_table`."""
    places: dict[Path, list[Run]] = {}
    for run in sorted(runs, key=by_start):
        places.setdefault(run.folder.relative_to(folder).parent, []).append(run)
    found: dict[str, str] = {}
    for place, members in places.items():
        own = [name for name in pictures if Path(name).parent == place and Path(name).name != "fig2"]
        figures = [(name, members) for name in own[:1]]
        for group in alike(members):
            shown = [of_kind[0] for of_kind in kinds(group).values()]
            figures.append(((place / f"trust-{fitting(group[0].name)}").as_posix(), shown))
        for name, group in figures:
            found |= {str(run.folder.relative_to(folder)): name for run in group if name in own}
    return found
