"""Runs' folders as read for figures and pages, from whatever their files hold, and how the runs are called."""

from __future__ import annotations

import csv
import io
import json
import reprlib
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pandas import DataFrame

CURVES = ("loss", "accuracy", "honest_accuracy")
SCORES = ("reputation", "trust")
JUMP_PARTS = {"composition": "who is averaged", "model": "the model itself"}  # and how the figure calls them
OTHERS = {"test": "test images", "validation": "validation images of the same clients"}  # than training images
METRICS = {  # of an experiment, and how its heat maps call them
    "honest_accuracy": "Accuracy of the honest clients", "test_accuracy": "Accuracy on the test set",
    "test_sensitivity": "Sensitivity (share of pneumonia found) on the test set",
}  # fmt: skip
LABELS = ("normal", "pneumonia")  # the data set's labels 0 and 1
OF_ATTACKS = ("attack", "malicious", "flip", "attack_start", "attack_period")
# By what runs are told apart, where they differ in it: of their data, of config.json, and of MAD's settings.
TELLING = ("data", *OF_ATTACKS, "clients", "partition", "concentration", "rounds", "epochs", "batch_size", "lr")
TELLING += ("clusters", "scale_floor", "threshold", "excluded")
TITLE_WIDTH = 110  # characters in a line below a title
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
    numbers = ["seed", "rounds", "last", "clients", "attackers", "true_exclusions", "false_exclusions", *METRICS]
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
    """What tells each run from the others, its seed aside: its strategy, and what else differs of TELLING."""

    def settings(run: Run) -> dict:
        every = run.config | (run.config.get("settings") or {}) | {"data": run.data}
        return {name: every.get(name) for name in TELLING if run.attacked or name not in OF_ATTACKS}

    each = [settings(run) for run in runs]
    values = {name: {str(found[name]) for found in each if name in found} for name in TELLING}
    texts = []
    for run, found in zip(runs, each):
        details = [f"{name} {value}" for name, value in found.items() if len(values[name]) > 1]
        texts.append(", ".join([strategy(run), *details]))
    # What still looks alike, say two presets of MAD, is told apart by the folder's name.
    keys = [(text, run.config.get("seed")) for text, run in zip(texts, runs)]
    count = Counter(keys)
    return [f"{key[0]} ({run.name})" if count[key] > 1 else key[0] for key, run in zip(keys, runs)]


def title(subject: str, runs: Sequence[Run]) -> str:
    """`subject`, and below it the data set, rounds and seeds of the runs."""
    data = " and ".join(dict.fromkeys(run.data for run in runs))
    length = " and ".join(dict.fromkeys(run.length for run in runs))
    seeds = sorted({run.config["seed"] for run in runs if "seed" in run.config})
    word = {0: "seed unknown", 1: "seed "}.get(len(seeds), "seeds ")
    about = f"{data}, {length}, {word}{', '.join(map(str, seeds))}"
    return "\n".join([subject, *textwrap.wrap(about, TITLE_WIDTH)])


def by_start(run: Run) -> tuple:
    """Sorting key, the paper's order: from the earliest MAD start to never, then without attack."""
    start = run.config.get("mad_start")
    return run.config.get("malicious") == 0, start is None, start or 0, run.config.get("seed") or 0, run.name
