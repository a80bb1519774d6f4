"""Experiments: grids of runs, and their tables. To add one, add an entry to `EXPERIMENTS`.

A cell of a grid is a set of options as on the command line. Its results are read from the folders of its runs.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from harness.folder import identity, read_json, replace_file, rounded
from harness.runs import counted, data_in_words, seeds_in_words, seen_in_words, span, steady
from lab.attacks import ATTACKS
from lab.rules import RULES

LAST = 10  # ours: the largest number of last rounds over which a table takes the means of a run
DETECTION = ("true_exclusions", "false_exclusions", "precision", "recall", "rounds_to_detection")
# These columns come last, in this order, also if a later run has more columns than the first
NEWEST = [
    "averaged",
    "last_exclusion",
    "strength",
    "burst",
    "spread",
    "honest_image_accuracy",
    "initial_weights",
    "judged",
    "measured",
    "malicious_clients",
    "excluded_clients",
    "images_of_clients",
]
COUNTED = {  # columns of an experiment's Markdown table that count clients or runs: heading, count, and of how many
    "attackers out": ("true_exclusions", "attackers"), "honest out": ("false_exclusions", "honest"),
    "runs with honest out": ("lost", "run"),
}  # fmt: skip
TABLED = {  # its other columns: heading and decimals
    "precision": ("precision", 2), "recall": ("recall", 2), "rounds_to_detection": ("rounds to detection", 1),
    "loss": ("loss", 3), "honest_accuracy": ("honest accuracy", 3),
    "honest_image_accuracy": ("honest accuracy by image", 3),  # where clients differ in size
    "test_accuracy": ("test accuracy", 3),
    "test_sensitivity": ("test sensitivity", 3), "test_auc": ("test AUC", 3),
    "held_test_advantage": ("advantage held, test", 3),
    "held_validation_advantage": ("advantage held, validation", 3),
}  # fmt: skip
SPANNED = {  # columns of `over_spans`: heading and decimals
    "active": ("active clients", 1), "loss": ("loss", 3), "honest_accuracy": ("honest accuracy", 3),
    "fluctuation": ("fluctuation", 4),
    "honest_trust": ("lowest honest trust", 3), "attacker_trust": ("highest attacker trust", 3),
}  # fmt: skip
LEAKED = {  # columns of `over_leakage`: heading and decimals
    "rank": ("rank", 3), "identified": ("identified", 2), "psnr": ("PSNR (dB)", 1), "ssim": ("SSIM", 2),
    "mean_psnr": ("PSNR, mean image", 1), "mean_ssim": ("SSIM, mean image", 2),
    "nearest_psnr": ("PSNR, nearest image", 1), "nearest_ssim": ("SSIM, nearest image", 2),
}  # fmt: skip
OUTCOME = ["seed", "loss", "honest_loss", "test_loss"]  # two runs of one seed that agree in these are the same run
COMPARED = ("honest_accuracy", "test_accuracy", "held_test_advantage", "held_validation_advantage")  # by `differences`


@dataclass(frozen=True)
class Experiment:
    """A grid of runs: each row with each column. Both map a name to options, as on the command line.

    A number of rounds in a name has braces, as in "MAD from {80}", so that it can be scaled with the option.
    """

    about: str  # one sentence
    rounds: int  # the length that the options of rows and columns refer to
    rows: dict[str, dict]
    columns: dict[str, dict]
    reference: str | None = None  # the row that the others are compared with; see `differences`
    spans: tuple[tuple[int, int], ...] = ()  # of rounds, first and last; see `over_spans`

    def sets(self) -> set[str]:
        """The names of the options that the experiment sets."""
        return {name for part in (*self.rows.values(), *self.columns.values()) for name in part}

    def cells(self, given: dict) -> dict[tuple[str, str], dict]:
        """The options of each cell by row and column: the `given` ones and its own, scaled to the `given` rounds.

        Rows or columns whose rounds become the same have one name then, and are one.
        """
        rounds, found = given.get("rounds", self.rounds), {}
        for row, column in product(self.rows, self.columns):
            own = self.rows[row] | self.columns[column]
            starts = [name for name in ("mad_start", "attack_start", "attack_period") if own.get(name)]
            own |= {name: self.scaled(own[name], rounds) for name in starts}
            if own.get("membership"):
                own["membership"] = max(1, min(own["membership"], rounds))
            found[self.named(row, rounds), self.named(column, rounds)] = given | {"rounds": rounds} | own
        return found

    def scaled(self, number: int | str, rounds: int) -> int:
        """A number of rounds in an experiment of another length."""
        return max(1, round(int(number) * rounds / self.rounds))

    def scaled_spans(self, rounds: int) -> list[tuple[int, int]]:
        """The spans in an experiment of another length."""
        spans = [(self.scaled(first, rounds), self.scaled(last, rounds)) for first, last in self.spans]
        return list(dict.fromkeys(spans))

    def named(self, text: str, rounds: int) -> str:
        """The name of a row or column in an experiment of another length."""
        return re.sub(r"\{(\d+)\}", lambda number: str(self.scaled(number[1], rounds)), text)


def mad_from(*starts: int | None) -> dict[str, dict]:
    """Rows or columns that differ in the round in which MAD starts (None: never)."""
    return {f"MAD from {{{start}}}" if start else "never": {"mad_start": start} for start in starts}


def dropped_or_observed(name: str, options: dict) -> dict[str, dict]:
    """Two rows for one reading: excluded clients are dropped, or they are still clustered and scored."""
    return {name: options, f"{name}, observed": options | {"excluded": "observed"}}


FLIP = {"attack": "label_flip", "flip": 1.0, "malicious": 0.2}
HONEST = {"no attack": FLIP | {"malicious": 0.0}}
AT_MAD = ("near_copies", "chain")  # attacks that make sense against MAD alone, in `threats`
APART = ("nan", "stumble", "sidestep", *AT_MAD)  # NaN is excluded without any defence; `stumble` is an accident
ATTACKED = {name: FLIP | {"attack": name} for name in ATTACKS if name not in APART}
MIN_MAX = {"scale_floor": 0.0}
AROUND_500 = ((100, 499), (490, 499), (501, 1000))  # spans of rounds, where MAD starts early or in round 500
ALWAYS_GROUPED = {"clusters": 2, "silhouette": -1.0, "outlying": 0.0}  # the smaller cluster is always outlying
BYZFL = {  # further rules of `defences`, if the package byzfl is installed
    "centered clipping": "CenteredClipping",
    "nearest-neighbour mixing, trimmed mean": "NNM>TrMean",
}
PARTS = {"dirichlet": (10.0, 1.0, 0.5, 0.1), "quantity": (10.0, 1.0, 0.5, 0.1)}
DIRECTIONS = {"directions from {10}": {"preset": "directions", "mad_start": 10}}
EXPERIMENTS = {
    "fig3a": Experiment(
        "Figs. 3(a, b): MAD from several rounds, never, and no attack",
        100,
        mad_from(5, 20, 40, 60, 80, None) | {"no attack": {"malicious": 0.0}},
        {"": {}},
        spans=((3, 10), (11, 20), (31, 40), (91, 100)),
    ),
    "fig3c": Experiment(
        "Fig. 3(c): MAD from early and late in a long run",
        1000,
        mad_from(10, 500),
        {"": {}},
        spans=AROUND_500,
    ),
    "authors": Experiment(
        "the preset that follows the authors' testbed, round by round",
        10,
        {
            f"{whose} initial weights": {"preset": "testbed", "mad_start": 5, "initial_weights": kind}
            for whose, kind in {"PyTorch's": "pytorch", "the later copy's": "kaiming"}.items()
        },
        {"": {}},
        spans=tuple((t, t) for t in range(1, 11)),
    ),
    "readings": Experiment(
        "different readings of what the paper leaves open",
        60,
        {
            **dropped_or_observed("min-max, K = 1", MIN_MAX | {"clusters": 1}),
            **dropped_or_observed("min-max, K = 2", MIN_MAX | ALWAYS_GROUPED),
            **dropped_or_observed("floor of 2, K = 1", {"scale_floor": 2.0, "clusters": 1}),
            **dropped_or_observed("floor of 2, K = 2", {"scale_floor": 2.0, "floored": "always"} | ALWAYS_GROUPED),
            **dropped_or_observed("silhouette alone", {"outlying": 0.0}),
            **dropped_or_observed("preset paper", {}),
            "preset paper, threshold 0.85": {"threshold": 0.85},
            "preset paper, spread of the centre": {"spread": "centre"},
            "preset testbed": {"preset": "testbed"},
            "preset directions": {"preset": "directions"},
        },
        {
            f"{share:.0%}, {start}": {"malicious": share} | options
            for start, options in mad_from(5, 40).items()
            for share in (0.0, 0.2, 0.4)
        },
    ),
    "attacks": Experiment(
        "every attack, without MAD and with it",
        60,
        HONEST
        | ATTACKED
        | {
            "label_flip of 50 %": FLIP | {"flip": 0.5},
            "label_flip of 30 %": FLIP | {"flip": 0.3},
            "label_flip from round {30}": FLIP | {"attack_start": 30},
            "label_flip, {5} rounds on, {5} off": FLIP | {"attack_period": 5},
            **{f"blind, noise of {size:g}": FLIP | {"attack": "blind", "strength": size} for size in (0.02, 1.0)},
            "blind in round {9}": FLIP | {"attack": "blind", "attack_start": 9},
            **{f"ipm, epsilon {size:g}": FLIP | {"attack": "ipm", "strength": size} for size in (0.1, 0.5, 1.0, 2.0)},
            "sign_flip, 4 times": FLIP | {"attack": "sign_flip", "strength": 4.0},
            "liar, 100 times": FLIP | {"attack": "liar", "strength": 100.0},
            "sidestep": FLIP | {"attack": "sidestep"},
            "sidestep, 2 times": FLIP | {"attack": "sidestep", "strength": 2.0},
            **{
                f"{name}, 40 % malicious": FLIP | {"attack": name, "malicious": 0.4}
                for name in ("alie", "hug", "min_max", "min_sum", "sidestep")
            },
        },
        mad_from(None, 10) | DIRECTIONS,
    ),
    "threats": Experiment(
        "attacks that know MAD, by more and more clients",
        60,
        {
            f"{name}, {share:.0%} malicious": FLIP | {"attack": name, "malicious": share}
            for name in ("hug", *AT_MAD)
            for share in (0.2, 0.3, 0.4)
        }
        | {
            "sign_flip": FLIP | {"attack": "sign_flip"},
            "sign_flip, spread of the centre": FLIP | {"attack": "sign_flip", "spread": "centre"},
        },
        mad_from(None, 10),
    ),
    "defences": Experiment(
        "MAD and other rules, under every attack",
        40,
        {f"mean, {name}": {"rule": "mean"} | options for name, options in mad_from(None, 5).items()}
        | {name: {"rule": name, "mad_start": None} for name in RULES if name != "mean"}
        | {name: {"rule": f"byzfl:{rule}", "mad_start": None} for name, rule in BYZFL.items() if find_spec("byzfl")},
        HONEST | ATTACKED,
        reference="mean, MAD from {5}",
    ),
    "ablation": Experiment(
        "what the memory of the equations adds to the distance",
        60,
        {
            "as printed": {"mad_start": 10},
            "trust without smoothing": {"mad_start": 10, "beta_trust": 1.0},
            "reputation alone, below 0.15": {"mad_start": 10, "judged": "reputation"},
            "reputation alone, below 0.5": {"mad_start": 10, "judged": "reputation", "threshold": 0.5},
            "d alone, below 0.5": {"mad_start": 10, "judged": "d", "threshold": 0.5},
        },
        {
            "no attack": {"malicious": 0.0},
            "label_flip": FLIP,
            "label_flip from round {30}": FLIP | {"attack_start": 30},
            "label_flip, {5} rounds on, {5} off": FLIP | {"attack_period": 5},
            "label_flip, {1} round on, {1} off": FLIP | {"attack_period": 1},
            "blind": FLIP | {"attack": "blind"},
            "hug": FLIP | {"attack": "hug"},
            "two honest clients with one bad round": {"malicious": 0.2, "attack": "stumble", "attack_start": 30},
        },
    ),
    "scale": Experiment(
        "few and many clients, small and large batches, more epochs",
        30,
        {f"{count} clients": {"clients": count} for count in (3, 5, 10, 20, 50, 100)}
        | {f"batches of {size}": {"batch_size": size} for size in (5, 100)}
        | {"5 epochs": {"epochs": 5}},
        {
            f"{attack}, {preset}": malicious | {"preset": preset, "mad_start": 1}
            for attack, malicious in (HONEST | {"label_flip": FLIP}).items()
            for preset in ("paper", "directions")
        },
    ),
    "long": Experiment(
        "the preset directions in long runs",
        1000,
        {"no attack, MAD from {10}": {"malicious": 0.0, "mad_start": 10}} | mad_from(10, 500),
        {"": {"preset": "directions"}},
        spans=AROUND_500,
    ),
    "noniid": Experiment(
        "non-IID clients, which differ in size and labels",
        60,
        {"iid": {"partition": "iid"}}
        | {
            f"{name}, concentration {value:g}": {"partition": name, "concentration": value}
            for name, values in PARTS.items()
            for value in values
        },
        {
            f"{attack}, {start}": malicious | options
            for attack, malicious in (HONEST | {"label_flip": FLIP}).items()
            for start, options in (mad_from(None, 10) | DIRECTIONS).items()
        },
    ),
    "leakage": Experiment(
        "which images an update reveals, by gradient inversion",
        100,
        {f"round {t}": {"rounds": t, "leakage": t} for t in (1, 10, 100)},
        {"": {}},
    ),
    "membership": Experiment(
        "what the attackers' last model reveals of training images",
        600,
        mad_from(10, 500, None),
        {"": {"membership": 10}},
        reference="MAD from {10}",
    ),
}
PAPER = ("fig3a", "fig3c")  # --experiment paper


def tidy(cells: list[tuple[Path, str, str]]) -> Any:
    """A pandas frame with one row per run: its row and column, its settings, and its results.

    `cells` are the folders of the runs with their rows and columns. Metrics are means over the last `averaged` rounds:
    at most `LAST`, and none before the last exclusion. `fluctuation` is the standard deviation, over these rounds, of
    the change of the honest clients' accuracy per round.
    `jump_*` is the change of the participants' loss and accuracy at the first exclusion, `jump_*_model` the model part.
    """
    from pandas import DataFrame

    rows = []
    for folder, row, column in cells:
        if not (folder / "summary.json").is_file():  # the run failed in its first round
            continue
        try:
            rows.append({"row": row, "column": column} | results_of(folder))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: its files are damaged ({error!r})") from None
    table = DataFrame(rows)
    return table[sorted(table, key=lambda name: NEWEST.index(name) if name in NEWEST else -1)]


def results_of(folder: Path) -> dict[str, Any]:
    """The settings and results of the run in a folder; see `tidy`."""
    from pandas import DataFrame, read_csv

    about, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    rounds = read_csv(folder / "rounds.csv")
    since = steady(rounds, read_csv(folder / "clients.csv", usecols=["round", "client", "active"]))
    last = since.tail(LAST).drop(columns=["round", "active"])
    found = identity(about) | {"attackers": len(summary["malicious"])}
    found |= {name: summary[name] for name in ("complete", *DETECTION)}
    lists = {"malicious_clients": "malicious", "excluded_clients": "excluded", "images_of_clients": "training_images"}
    found |= {name: " ".join(map(str, summary[key])) for name, key in lists.items()}
    found |= {name: rounded(value) for name, value in last.mean().items()}
    found["fluctuation"] = rounded(since["honest_accuracy"].tail(LAST + 1).diff().std())
    for change, name in product(summary["jumps"][:1], ("loss", "accuracy")):
        found |= {f"jump_{name}": change[name]["total"], f"jump_{name}_model": change[name]["model"]}
    for name, value in DataFrame(filter(None, (summary["membership"] or {}).values())).mean().items():
        found[f"held_{name}"] = rounded(value)  # mean over the attackers
    found |= {"last": len(rounds), "data": data_in_words(about["data"]["name"], about["data"].get("note"))}
    code = [part["git"] for part in (about, *about.get("resumed", []))]  # another commit may have continued the run
    found["commit"] = ", ".join(dict.fromkeys(part["commit"] or "unknown" for part in code))
    dirty = {part["dirty"] for part in code}
    found |= {"dirty": True in dirty or (None if None in dirty else False), "averaged": len(last)}
    return found | {"last_exclusion": since["round"].iloc[0] if summary["excluded"] else float("nan")}


def over_spans(cells: list[tuple[Path, str, str]], spans: Iterable[tuple[int, int]]) -> Any:
    """A pandas frame with one row per complete run and span of rounds. A span is its first and its last round.

    It has the means of the participants' loss, of the honest clients' accuracy and of the number of active clients, the
    fluctuation (see `tidy`), the lowest trust of an honest client, and the highest trust of an attacker.
    """
    from pandas import DataFrame, read_csv

    rows = []
    for folder, row, column in cells:
        if not (folder / "summary.json").is_file() or not read_json(folder / "summary.json")["complete"]:
            continue
        cell = {"row": row, "column": column, "seed": read_json(folder / "config.json")["seed"]}
        tables = [read_csv(folder / name) for name in ("rounds.csv", "clients.csv")]
        for first, last in spans:
            rounds, clients = (table[table["round"].between(first, last)] for table in tables)
            trust = clients.groupby("malicious")["trust"]
            found = {name: rounds[name].mean() for name in ("loss", "honest_accuracy", "active")}
            found |= {"fluctuation": rounds["honest_accuracy"].diff().std()}
            found |= {"honest_trust": trust.min().get(0), "attacker_trust": trust.max().get(1)}
            named = {"rounds": f"{first} to {last}" if first < last else f"{first}"}
            rows.append(cell | named | {name: value and rounded(value) for name, value in found.items()})
    return DataFrame(rows)


def over_leakage(cells: list[tuple[Path, str, str]]) -> Any:
    """A pandas frame with the rows of leakage.csv of every run that has one. `seen` says what the attacker saw."""
    from pandas import DataFrame, concat, read_csv

    found = [DataFrame()]
    for folder, row, column in cells:
        if (folder / "leakage.csv").is_file():
            table = read_csv(folder / "leakage.csv")
            seen = [seen_in_words(*numbers) for numbers in zip(table["steps"], table["images"])]
            cell = {"row": row, "column": column, "seed": read_json(folder / "config.json")["seed"], "seen": seen}
            found.append(DataFrame(cell).join(table))
    return concat(found)


def over_seeds(table: Any) -> Any:
    """The results of each cell of a `tidy` frame as texts: mean and sample standard deviation over the seeds.

    Clients that are out are counted over all seeds, and so are the runs in which honest ones are; see `counted`. A run
    and its copy count once.
    """
    shown = {name: about for name, about in TABLED.items() if name in table}
    if "partition" not in table or table["partition"].eq("iid").all():
        shown.pop("honest_image_accuracy", None)
    runs = table[table.complete].drop_duplicates(["row", "column", "seed"]).astype(dict.fromkeys(shown, float))
    runs = runs.assign(honest=runs.clients - runs.attackers, lost=runs.false_exclusions > 0, run=1)
    groups = runs.groupby(["row", "column"], sort=False)
    texts = groups.size().to_frame("seeds")
    for heading, (count, of) in COUNTED.items():
        texts[heading] = [counted(*numbers) for numbers in zip(groups[count].sum(), groups[of].sum())]
    return texts.join(means(groups, shown))


def means(groups: Any, shown: dict[str, tuple[str, int]]) -> Any:
    """Mean and deviation of some columns of a pandas group, as texts; `shown` is as TABLED."""
    from pandas import DataFrame

    return DataFrame({heading: groups[name].apply(in_words, digits) for name, (heading, digits) in shown.items()})


def differences(table: Any, reference: str) -> Any:
    """How the rows of a `tidy` frame differ from the `reference` row, as texts, one row per cell.

    For each of the COMPARED, the differences of runs with the same column and seed are taken: their mean and its 95 %
    interval (Student's t). A shared seed means the same split, weights and batches, so the differences vary less than
    the values.
    """
    runs = table[table.complete].drop_duplicates(["row", "column", "seed"])
    runs = runs.set_index(["row", "column", "seed"])[[name for name in COMPARED if name in table]].astype(float)
    others = runs[runs.index.get_level_values("row") != reference]
    changes = others - runs.loc[reference].reindex(others.index.droplevel("row")).to_numpy()
    groups = changes.groupby(["row", "column"], sort=False)
    return groups.agg(mean_and_interval).rename(columns={name: TABLED[name][0] for name in changes})


def mean_and_interval(values: Any) -> str:
    """The mean of a pandas column and its 95 % interval (Student's t): "0.003 (-0.001 to 0.007)"."""
    from scipy.stats import t

    known = values.dropna()
    if len(known) < 2:
        return "" if known.empty else f"{known.mean():.3f}"
    error = known.sem() or 1e-300  # with 0, scipy gives NaN
    interval = t.interval(0.95, len(known) - 1, known.mean(), error)
    mean, low, high = (f"{round(value, 3) + 0.0:.3f}" for value in (known.mean(), *interval))  # no -0.000
    return f"{mean} ({low} to {high})"


def in_words(values: Any, decimals: int) -> str:
    """Mean and sample standard deviation of a pandas column: '0.96 ± 0.01', or '20.0 (of 1)' if only one run has it.

    A loss that is too large for a number is 'inf'.
    """
    known = values.dropna()
    deviation = f" ± {known.std():.{decimals}f}" if len(known) > 1 and abs(known.mean()) < float("inf") else ""
    of = f" (of {len(known)})" if len(known) < len(values) else ""
    return f"{known.mean():.{decimals}f}{deviation}{of}" if len(known) else ""


def markdown(texts: Any, heading: str) -> str:
    """A frame of texts as a Markdown table under a heading."""
    table = texts.reset_index().replace({"column": {"": None}}).dropna(axis=1, how="all")
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).values.tolist()]
    return "\n".join([heading, "", *(f"| {' | '.join(cells)} |" for cells in lines), ""])


def tabulate(folder: Path, cells: list[tuple[Path, str, str]], command: str = "") -> Any:
    """Write table.csv, one row per run, into the folder of the runs, and return its frame, see `tidy`.

    With the `command` of an experiment, write table.md too, one row per cell, and spans.csv if the experiment has
    spans. Nothing is written if no run has results.
    """
    table = tidy(cells)
    if table.empty:
        return table
    replace_file(folder / "table.csv", table.to_csv(index=False))
    if command:
        experiment, rounds = EXPERIMENTS[folder.name], int(table.rounds.max())
        parts = [markdown(over_seeds(table), heading(folder.name, table, command))]
        if experiment.spans and not (spans := over_spans(cells, experiment.scaled_spans(rounds))).empty:
            replace_file(folder / "spans.csv", spans.to_csv(index=False))
            groups = spans.groupby(["row", "column", "rounds"], sort=False)
            parts.append(markdown(means(groups, SPANNED), "Single rounds, or means over spans of rounds."))
        if not (leakage := over_leakage(cells)).empty:
            replace_file(folder / "leakage.csv", leakage.to_csv(index=False))
            groups = leakage.groupby(["row", "column", "seen"], sort=False)
            parts.append(markdown(means(groups, LEAKED), "Gradient inversion, over the seeds."))
        if experiment.reference:
            reference = experiment.named(experiment.reference, rounds)
            about = f"Differences from {reference}, paired over seeds: mean and 95 % interval (Student's t)."
            parts.append(markdown(differences(table, reference), about))
        replace_file(folder / "table.md", "\n".join(parts))
    return table


def heading(name: str, table: Any, command: str) -> str:
    """The heading of an experiment's Markdown table: its name, its command, its data, and the commits of the code."""
    commits = ", ".join(sorted({commit for commits in table.commit for commit in commits.split(", ")}))
    dirty = " (with changes)" if table.dirty.eq(True).any() else ""
    short = table[~table.complete]
    failed = [f"{run.row} {run.column}, seed {run.seed}, after round {run.last}" for run in short.itertuples()]
    ended = f" Ended early: {'; '.join(failed)}." * bool(failed)
    distinct = len(table.drop_duplicates(OUTCOME))
    same = f", {distinct} of them distinct (cells can differ in a setting that changes nothing)"
    return (
        f"# {name}: {EXPERIMENTS[name].about}\n\n"
        f"`{command}`; {', '.join(table.data.unique())}; {table.rounds.max()} rounds; {seeds_in_words(table.seed)}; "
        f"{len(table)} runs{same * (distinct < len(table))}; "
        f'commit {commits}{dirty}. Mean ± sample standard deviation over the seeds. "(of N)": averaged over the N runs '
        f"that have this value. Counts are those of all seeds, with the 95 % interval of their rate (Wilson). "
        f"Losses and accuracies are means over the last {span(table)} rounds, "
        f"without rounds before the last exclusion.{ended}"
    )
