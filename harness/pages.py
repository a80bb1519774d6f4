"""HTML pages that need no other file: one plays a run, the other reports all runs of a folder.

Their templates lie in pages/.
"""

import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from harness.console import say
from harness.folder import plain
from harness.runs import CURVES, SCORES, Run, by_start, exclusions, natural, read_table, steady, strategy, title

TEMPLATES = Path(__file__).parent / "pages"
PAGE_BYTES = 2_500_000  # of the numbers in a page that plays a run
STEPS = (1, 1.5, 2, 3, 4, 6, 8, 10)  # the extents of a drawing: round, and at most half as large again as needed


def write_players(runs: list[Run], folder: Path, out: Path) -> int:
    """Write a page below `out` for each run at or below `folder` that can be played. Returns their number."""
    count = 0
    for run in runs:
        try:
            page = play(run)
        except ValueError as error:
            say(f"{run.folder}: not played, {error}", sys.stderr)
            continue
        path = out / run.folder.relative_to(folder).parent / f"play-{run.name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        print(path)
        count += 1
    return count


def play(run: Run) -> str:
    """The HTML page that plays the run: player.html with the numbers of the run.

    A long run with many clients is shown in selected rounds, see `frames`. Raises ValueError if the run has recorded
    nothing to play.
    """
    points = read_table(run.folder / "plane.csv", ["round", "client"], ["x", "y"])
    clients = run.clients[["round", "client", "malicious", "active", *SCORES]]
    clients = clients.merge(points, on=["round", "client"]).drop_duplicates(["round", "client"])
    curves = run.rounds.drop_duplicates("round").set_index("round")
    clients = clients[clients["round"].isin(curves.index)]
    if clients.empty:
        raise ValueError("there is nothing to play; madsim writes plane.csv for at most 50 clients")
    members = sorted(clients["client"].unique())
    malicious = clients.groupby("client")["malicious"].max().reindex(members)
    excluded = clients[clients["active"] == 0].groupby("client")["round"].min().reindex(members)
    shown = frames(sorted(clients["round"].unique()), len(members), excluded.dropna())

    def table(column: str, scale: Any) -> list[list[int | None]]:  # [rounds, clients], whole numbers
        wide = clients.pivot(index="round", columns="client", values=column).reindex(index=shown, columns=members)
        numbers = np.round(wide.to_numpy(float) * scale)
        return [[int(value) if np.isfinite(value) else None for value in row] for row in numbers]

    reach = reaches(np.hypot(clients["x"], clients["y"]).groupby(clients["round"]).max()).reindex(shown)
    thousandths = 1000 / reach.to_numpy()[:, None]
    content = {
        "title": title(strategy(run), [run]).replace("\n", ": ", 1).replace("\n", " "),
        "rounds": shown, "malicious": malicious, "excluded": excluded, "start": run.config.get("mad_start"),
        "threshold": run.threshold("trust"),
        "reach": [float(f"{value:g}") for value in reach],
        "points": [list(zip(*xy)) for xy in zip(table("x", thousandths), table("y", thousandths))],
        "trust": table("trust", 100), "reputation": table("reputation", 100),
    }  # fmt: skip
    content |= {name: curves[name].reindex(shown).round(4) for name in CURVES}
    run_json = json.dumps(plain(content), separators=(",", ":")).replace("<", "\\u003c")
    page = (TEMPLATES / "player.html").read_text(encoding="utf-8")
    return page.replace(">{}</script>", f">{run_json}</script>", 1)


def reaches(far: Any) -> Any:
    """The extent of a drawing in each round: one of the STEPS times a power of ten. It rarely changes: it holds
    the farthest models (`far`, by round) of the five rounds before and after."""
    far = far.replace(0, np.nan).rolling(11, center=True, min_periods=1).max().fillna(1)
    power = 10 ** np.floor(np.log10(far))
    return power * np.array(STEPS)[np.searchsorted(STEPS, far / power)]


def frames(rounds: list[int], clients: int, excluded: Any) -> list[int]:
    """The rounds that a page shows: all, or an even choice that fits into PAGE_BYTES, with those of the `excluded`."""
    room = max(2, PAGE_BYTES // (22 * clients + 40) - len(excluded))  # bytes per client and per round
    even = {rounds[i] for i in np.linspace(0, len(rounds) - 1, min(room, len(rounds))).round().astype(int)}
    return sorted(map(int, even | set(excluded)))


def report(runs: Sequence[Run], pictures: Sequence[Path], folder: Path) -> str:
    """The HTML page that reports the runs at or below `folder`: their table, the pictures (PNG files), all settings."""

    def image(path: Path) -> str:
        content = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{content}">'

    def settings(run: Run) -> str:
        name, every = str(run.folder.relative_to(folder)), json.dumps(run.config, indent=2)
        return f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(every)}</pre></details>"

    return Template((TEMPLATES / "report.html").read_text(encoding="utf-8")).substitute(
        name=html.escape(folder.resolve().name),
        table=runs_table(runs, folder),
        figures="\n".join(map(image, pictures)),
        settings="\n".join(map(settings, runs)),
    )


def runs_table(runs: Sequence[Run], folder: Path) -> str:
    """The runs as an HTML table: strategy, attack, exclusions, and the means of at most ten last rounds."""
    import pandas as pd

    rows = []
    for run in sorted(runs, key=lambda run: (natural(run.folder.parent), by_start(run))):
        last = steady(run.rounds, run.clients)[list(CURVES)].tail(10)
        attack = f"{run.config.get('attack')}, {run.config.get('malicious')} of the clients"
        rows.append(
            {
                "run": str(run.folder.relative_to(folder)), "data": run.data, "strategy": strategy(run),
                "rounds": run.length.split(" round")[0], "seed": run.config.get("seed"),
                "attack": attack if run.attacked else "none", "excluded": exclusions(run),
                "averaged rounds": f"last {len(last)}",
            } | {f"mean {name.replace('_', ' ')}": value for name, value in last.mean().items()}
        )  # fmt: skip
    return pd.DataFrame(rows).to_html(index=False, border=0, float_format="{:.3f}".format, na_rep="")
