"""Experiments: grids of runs, and the tables of what came of them.

A cell of a grid is a set of options as on the command line; what a run came to is read from its folder.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench.folder import identity, read_json, replace_file, rounded
from bench.shell import script
from trust import RULES

LAST = 10  # ours: the rounds at a run's end that its table means
DETECTION = ("true_exclusions", "false_exclusions", "precision", "recall", "rounds_to_detection")
TABLED = {  # columns of an experiment's Markdown table: heading and decimals
    "true_exclusions": ("attackers out", 1), "false_exclusions": ("honest out", 1),
    "precision": ("precision", 2), "recall": ("recall", 2), "rounds_to_detection": ("rounds to detection", 1),
    "loss": ("loss", 3), "honest_accuracy": ("honest accuracy", 3), "test_accuracy": ("test accuracy", 3),
    "test_sensitivity": ("test sensitivity", 3), "test_auc": ("test AUC", 3),
    "held_test_advantage": ("advantage held, test", 3),
    "held_validation_advantage": ("advantage held, validation", 3),
}  # fmt: skip


# ---------------------------------------------------------------- the grids


@dataclass(frozen=True)
class Experiment:
    """A grid of runs: every row with every column, each a name and the options that make it, as on the command line."""

    about: str
    rounds: int
    rows: dict[str, dict]
    columns: dict[str, dict]

    def sets(self) -> set[str]:
        """The options that it sets itself."""
        return {name for part in (*self.rows.values(), *self.columns.values()) for name in part}

    def cells(self, given: dict) -> dict[tuple[str, str], dict]:
        """The options of each cell, by its row's and column's names: those `given` and its own.

        Other rounds than the experiment's scale what it lets start in a round or last for some.
        """
        rounds = given.get("rounds", self.rounds)
        found = {}
        for row, column in product(self.rows, self.columns):
            own = self.rows[row] | self.columns[column]
            for name in ("mad_start", "attack_start", "attack_period"):
                if own.get(name):
                    own[name] = max(1, round(own[name] * rounds / self.rounds))
            if own.get("membership"):
                own["membership"] = max(1, min(own["membership"], rounds))
            found[row, column] = given | {"rounds": rounds} | own
        return found


def mad_from(*starts: int | None) -> dict[str, dict]:
    """Rows or columns of an experiment by the round in which MAD starts (None: never)."""
    return {f"MAD from {start}" if start else "never": {"mad_start": start} for start in starts}


def dropped_or_observed(name: str, options: dict) -> dict[str, dict]:
    """Two rows for one reading: the excluded are dropped, or still clustered and scored."""
    return {name: options, f"{name}, observed": options | {"excluded": "observed"}}


FLIP = {"attack": "label_flip", "flip": 1.0, "malicious": 0.2}
HONEST = {"no attack": FLIP | {"malicious": 0.0}}
ATTACKED = {"label_flip": FLIP} | {
    name: FLIP | {"attack": name} for name in ("one_way_flip", "scaled", "sign_flip", "noise", "alie", "ipm", "hug")
}
MIN_MAX = {"scale_floor": 0.0}
ALWAYS_GROUPED = {"clusters": 2, "silhouette": -1.0, "outlying": 0.0}  # the smaller cluster is always outlying
PARTS = {"dirichlet": (10.0, 1.0, 0.5), "quantity": (1.0, 0.5)}
EXPERIMENTS = {
    "fig3a": Experiment(
        "Figs. 3(a, b): MAD from several rounds, never, and no attack",
        100,
        mad_from(5, 20, 40, 60, 80, None) | {"no attack": {"malicious": 0.0}},
        {"": {}},
    ),
    "fig3c": Experiment("Fig. 3(c): MAD from early and late in a long run", 1000, mad_from(10, 500), {"": {}}),
    "readings": Experiment(
        "readings of what the paper leaves open",
        60,
        {
            **dropped_or_observed("min-max, K = 1", MIN_MAX | {"clusters": 1}),
            **dropped_or_observed("min-max, K = 2", MIN_MAX | ALWAYS_GROUPED),
            **dropped_or_observed("floor of 2, K = 1", {"scale_floor": 2.0, "clusters": 1}),
            **dropped_or_observed("floor of 2, K = 2", {"scale_floor": 2.0, "floored": "always"} | ALWAYS_GROUPED),
            **dropped_or_observed("silhouette alone", {"outlying": 0.0}),
            **dropped_or_observed("preset paper", {}),
            "preset testbed": {"preset": "testbed"},
        },
        {
            f"{share:.0%}, {start}": {"malicious": share} | options
            for start, options in mad_from(5, 40).items()
            for share in (0.0, 0.2, 0.4)
        },
    ),
    "attacks": Experiment(
        "what every attack does, without MAD and with it",
        60,
        HONEST
        | ATTACKED
        | {
            "label_flip of 50 %": FLIP | {"flip": 0.5},
            "label_flip of 30 %": FLIP | {"flip": 0.3},
            "label_flip from round 30": FLIP | {"attack_start": 30},
            "label_flip, 5 rounds on, 5 off": FLIP | {"attack_period": 5},
            "alie, 40 % malicious": FLIP | {"attack": "alie", "malicious": 0.4},
            "hug, 40 % malicious": FLIP | {"attack": "hug", "malicious": 0.4},
        },
        mad_from(None, 10),
    ),
    "defences": Experiment(
        "MAD beside other rules, under every attack",
        40,
        {f"mean, {name}": {"rule": "mean"} | options for name, options in mad_from(None, 5).items()}
        | {name: {"rule": name, "mad_start": None} for name in RULES if name != "mean"},
        HONEST | ATTACKED,
    ),
    "noniid": Experiment(
        "clients that differ in size and labels",
        60,
        {"iid": {"partition": "iid"}}
        | {
            f"{name}, alpha {alpha:g}": {"partition": name, "concentration": alpha}
            for name, alphas in PARTS.items()
            for alpha in alphas
        },
        {
            f"{attack}, {start}": malicious | options
            for attack, malicious in (HONEST | {"label_flip": FLIP}).items()
            for start, options in mad_from(None, 10).items()
        },
    ),
    "membership": Experiment(
        "what each client's last model tells of who was trained on",
        600,
        mad_from(10, 500, None),
        {"": {"membership": 10}},
    ),
}
PAPER = ("fig3a", "fig3c")  # --experiment paper


# ---------------------------------------------------------------- their tables


def tidy(cells: list[tuple[Path, str, str]]):
    """A pandas frame of finished runs, given as folders with the row and column they belong to: one row a run, with its
    settings and what came of it. Of the metrics, means over the last LAST rounds, and the `fluctuation`: the
    standard deviation of the honest clients' accuracy's change from round to round over them. Of the first exclusion,
    the `jump` of participants' loss and accuracy, and what of it is the `model`'s."""
    from pandas import DataFrame

    rows = []
    for folder, row, column in cells:
        if not (folder / "summary.json").is_file():  # it failed in its first round
            continue
        try:
            rows.append({"row": row, "column": column} | came_of(folder))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: its files are not as a run leaves them ({error!r})") from None
    return DataFrame(rows)


def came_of(folder: Path) -> dict:
    """A row of `tidy`, of the run in a folder."""
    from pandas import DataFrame, read_csv

    about, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    rounds = read_csv(folder / "rounds.csv").drop(columns=["round", "active"])
    found = identity(about) | {"attackers": len(summary["malicious"])}
    found |= {name: summary[name] for name in ("complete", *DETECTION)}
    found |= {name: rounded(value) for name, value in rounds.tail(LAST).mean().items()}
    found["fluctuation"] = rounded(rounds["honest_accuracy"].tail(LAST + 1).diff().std())
    for change, name in product(summary["jumps"][:1], ("loss", "accuracy")):
        found |= {f"jump_{name}": change[name]["total"], f"jump_{name}_model": change[name]["model"]}
    for name, value in DataFrame(filter(None, (summary["membership"] or {}).values())).mean().items():
        found[f"held_{name}"] = rounded(value)  # by the attackers, in the mean
    found |= {"last": len(rounds), "data": about["data"]["name"]}
    code = [part["git"] for part in (about, *about.get("resumed", []))]  # another commit may have gone on with it
    found["commit"] = ", ".join(dict.fromkeys(str(part["commit"]) for part in code))
    found["dirty"] = any(part["dirty"] for part in code)
    return found


def over_seeds(table):
    """What the runs of each cell of a `tidy` frame came to, in words: mean and sample standard deviation over seeds."""
    shown = {name: about for name, about in TABLED.items() if name in table}
    table = table.astype(dict.fromkeys(shown, float))
    groups = table[table.complete].groupby(["row", "column"], sort=False)
    texts = groups.size().to_frame("seeds")
    for name, (heading, decimals) in shown.items():
        texts[heading] = groups[name].apply(in_words, decimals)
    return texts


def in_words(values, decimals: int) -> str:
    """Mean and sample standard deviation of a pandas column: '0.96 ± 0.01', or '20.0 (of 1)' where the others are NaN,
    or nothing."""
    known = values.dropna()
    deviation = f" ± {known.std():.{decimals}f}" if len(known) > 1 else ""
    of = f" (of {len(known)})" if len(known) < len(values) else ""
    return f"{known.mean():.{decimals}f}{deviation}{of}" if len(known) else ""


def span(table) -> int:
    """Of how many last rounds a `tidy` frame has the means."""
    return min(LAST, int(table["last"].max()))


def markdown(texts, heading: str) -> str:
    """A frame of texts as a Markdown table under a heading."""
    table = texts.reset_index().replace({"column": {"": None}}).dropna(axis=1, how="all")
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).values.tolist()]
    return "\n".join([heading, "", *(f"| {' | '.join(cells)} |" for cells in lines), ""])


def tabulate(folder: Path, cells: list[tuple[Path, str, str]], command: str) -> None:
    """Write an experiment's table.csv, a row a run, and table.md, a row a cell, and say the essence of it.

    `folder` bears the experiment's name, `cells` are as in `tidy`, `command` is what was asked for.
    """
    table = tidy(cells)
    if table.empty:
        return
    texts, about = over_seeds(table), EXPERIMENTS[folder.name].about
    replace_file(folder / "table.csv", table.to_csv(index=False).encode())
    replace_file(folder / "table.md", markdown(texts, heading(folder.name, table, command)).encode())
    print(f"\n{about}; last {span(table)} rounds, mean ± standard deviation over seeds.{scaled(folder.name, table)}")
    print(texts[["seeds", "attackers out", "honest out", "honest accuracy", "test accuracy"]].to_string())
    print(f"Tables       {folder / 'table.md'}, {folder / 'table.csv'}")
    print(f"Figures      python {script('plot.py')} {folder}")


def heading(name: str, table, command: str) -> str:
    """What stands above an experiment's Markdown table: what it is, and which code made it from which data."""
    commits = ", ".join(sorted({commit for commits in table.commit for commit in commits.split(", ")}))
    dirty = " (with changes)" if table.dirty.any() else ""
    short = table[~table.complete]
    failed = [f"{run.row} {run.column}, seed {run.seed}, after round {run.last}" for run in short.itertuples()]
    ended = f" Ended early: {'; '.join(failed)}." * bool(failed)
    seeds = ", ".join(map(str, sorted(table.seed.unique())))
    return (
        f"# {name}: {EXPERIMENTS[name].about}\n\n"
        f"`{command}`; {', '.join(table.data.unique())}; {table.rounds.max()} rounds; seeds {seeds}; "
        f"commit {commits}{dirty}. Mean ± sample standard deviation over the seeds (of those runs that have the value, "
        f"where that is said); of losses and accuracies, of their means over the last {span(table)} rounds."
        f"{scaled(name, table)}{ended}"
    )


def scaled(name: str, table) -> str:
    """A sentence on an experiment's names where they speak of other rounds than were run."""
    own, rounds = EXPERIMENTS[name].rounds, int(table.rounds.max())
    return f" Rounds in the names are those of {own}, scaled to {rounds}." * (own != rounds)
