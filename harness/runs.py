"""Run folders as read for figures and pages, and the labels of the runs. Missing or damaged files are tolerated."""

from __future__ import annotations

import csv
import io
import re
import reprlib
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.console import say
from harness.folder import read_json

CURVES = ("loss", "accuracy", "honest_accuracy")
SCORES = ("reputation", "trust")
JUMP_PARTS = {"composition": "fewer clients averaged", "model": "the model itself"}  # with their names in the figure
LEAKED = {"rank": "rank of the images (chance: 0.5)", "psnr": "PSNR (dB)"}  # of reconstructed images
OTHERS = {"test": "test images", "validation": "validation images of the same clients"}  # not training images
METRICS = {  # of an experiment, with the titles of their heat maps
    "honest_accuracy": "Accuracy of the honest clients", "test_accuracy": "Accuracy on the test set",
    "test_sensitivity": "Sensitivity (share of pneumonia found) on the test set",
}  # fmt: skip
LABELS = ("normal", "pneumonia")  # labels 0 and 1 of the data set
# Settings that labels and titles of runs name, with their defaults: of an attack, of any run, and of MAD.
OF_ATTACKS: dict[str, Any] = {
    "attack": "label_flip", "malicious": 0.2, "flip": 1.0, "attack_start": 1, "attack_period": None,
    "strength": None, "burst": 1,
}  # fmt: skip
OF_RUNS: dict[str, Any] = {
    "rule": "mean", "partition": "iid", "clients": 10, "epochs": 1, "batch_size": 20,
    "lr": 1e-3, "initial_weights": "pytorch",
}  # fmt: skip
OF_MAD: dict[str, Any] = {
    "measured": "positions", "judged": "trust", "clusters": 2, "silhouette": 0.25, "outlying": 1.25, "spread": "pairs",
    "scale_floor": 2.5, "floored": "ungrouped", "alpha": 0.5, "beta_reputation": 0.75, "beta_trust": 0.85,
    "threshold": 0.15, "equation2": "printed", "order": "clip-smooth", "excluded": "dropped", "decision": "same",
    "first": "threshold", "nobody_left": "keep",
}  # fmt: skip
DEFAULTS = OF_ATTACKS | OF_RUNS | {"preset": "paper"} | OF_MAD
TITLE_WIDTH = 90  # characters per line of a title: as many as fit beside the axis of the narrowest figure
MOST_LINES = 9  # in one figure; an experiment with more kinds of runs is drawn as heat maps alone
MOST_NAMED = 10  # clients of a kind in a figure or a title; more are drawn as a band and counted
SAMPLE_BYTES = 100_000  # the largest accepted samples.npz, unpacked; madsim writes 3678 bytes
# The types of the fields of config.json that are read here.
KINDS = {
    "rounds": int, "mad_start": (int, type(None)), "seed": int, "clients": int, "malicious": (int, float),
    "flip": (int, float), "attack": str, "rule": str, "dataset": str, "data": dict, "settings": dict,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """A run's folder as read. What is missing in its files is missing here: a key, rows, or a value (NaN)."""

    folder: Path
    config: dict
    rounds: Any  # all columns of rounds.csv; one row per round
    clients: Any  # all columns of clients.csv; one row per round and client
    samples: tuple[NDArray, NDArray] | None  # images uint8 [4, 28, 28] and their labels [4]
    jump: dict | None  # at the first exclusion: its round, and loss and accuracy, each with its JUMP_PARTS
    membership: Any  # "round", and advantage, error and chance for each of OTHERS; empty if not measured
    leakage: Any  # all columns of leakage.csv; empty if not measured

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def attacked(self) -> bool:
        """Whether any client is malicious. True if the configuration does not say."""
        return self.config.get("malicious") != 0

    @property
    def recorded(self) -> int:
        """The last round in the files; 0 before the first."""
        return int(max((table["round"].max() for table in (self.rounds, self.clients) if len(table)), default=0))

    @property
    def unfinished(self) -> bool:
        """Whether the run still goes on or was stopped early."""
        return self.recorded < self.config.get("rounds", 0)

    @property
    def length(self) -> str:
        """'100 rounds', or '37 of 100 rounds' of an unfinished run."""
        rounds = f"{self.recorded} of {self.config['rounds']}" if self.unfinished else str(self.recorded)
        return f"{rounds} round{'s' * (rounds != '1')}"

    @property
    def data(self) -> str:
        """The name of the data set. It says so if the phantom replaced the real one."""
        data = self.config.get("data") or {}
        return data_in_words(data.get("name") or self.config.get("dataset") or "unknown data set", data.get("note"))

    def threshold(self, score: str) -> float | None:
        """The threshold of a score, "trust" for example. None for those that MAD does not judge."""
        settings = self.config.get("settings") or {}
        return settings.get("threshold") if settings.get("judged", "trust") == score else None


def data_in_words(name: str, note: str | None) -> str:
    """The name of a data set as results show it. `note`: why the phantom replaced the real data, if it did."""
    if name != "phantom":
        return name
    return "phantom images, PneumoniaMNIST was not available" if note else "phantom images"


def find_runs(folder: str | Path) -> list[Path]:
    """All run folders at or below `folder`, in the order of `natural`. Raises FileNotFoundError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a folder with results of madsim.py")
    configs = [path for path in folder.rglob("config.json") if path.is_file()]
    runs = sorted((path.parent for path in configs if (path.parent / "rounds.csv").is_file()), key=natural)
    if not runs:
        raise FileNotFoundError(f"{folder} holds no run: no folder in it has a config.json and a rounds.csv")
    return runs


def natural(path: Path) -> list:
    """The sorting key for paths with numbers in their names: mad5, mad20, mad100."""
    return [[int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", part)] for part in path.parts]


def load_runs(folders: Sequence[Path], tables: bool = False) -> list[Run]:
    """The runs at or below the folders, each once. One line per run on standard error names what can't be drawn.

    So does one for a folder that holds no run. If none does, it raises FileNotFoundError. With `tables`, a table.csv
    is enough. Files among several folders are passed over.
    """
    folders = [folder for folder in folders if not folder.is_file()] or folders
    found: set[Path] = set()
    without: list[str] = []
    for folder in folders:
        try:
            found |= {*find_runs(folder)}
        except FileNotFoundError as error:
            if not (tables and any(folder.rglob("table.csv"))):
                without.append(str(error))
    if len(without) == len(folders):
        raise FileNotFoundError("; ".join(without))
    for text in without:
        say(f"plot: {text}", sys.stderr)
    there = {path.parent for folder in folders for path in folder.rglob("config.json")}
    for path in sorted(there - found, key=natural):
        say(f"{path}: not drawn, it holds no rounds.csv", sys.stderr)
    runs = []
    for path in sorted(found, key=natural):
        try:
            run = load_run(path)
        except (ValueError, OSError) as error:
            say(f"{path}: not drawn, {str(error).removeprefix(f'{path}/')}", sys.stderr)
            continue
        runs.append(run)
        if lacking := shortcomings(run):
            say(f"{path}: {lacking}", sys.stderr)
    return runs


def load_run(folder: str | Path) -> Run:
    """Read a run's folder, complete or not. Raises ValueError if its config.json is damaged."""
    folder = Path(folder)
    config = read_config(folder / "config.json")
    rounds = read_table(folder / "rounds.csv", ["round"], CURVES, rest=True)
    keys, values = ["round", "client", "malicious"], ["active", *SCORES, "train_loss"]
    clients = read_table(folder / "clients.csv", keys, values, rest=True)
    measured = [f"{name}_{kind}" for name in OTHERS for kind in ("advantage", "error", "chance")]
    membership = read_table(folder / "membership.csv", ["round"], measured).dropna()
    leaked = [*LEAKED, "mean_psnr", "nearest_psnr"]
    leakage = read_table(folder / "leakage.csv", ["round", "steps", "images"], leaked)
    samples, jump = read_samples(folder / "samples.npz"), read_jump(folder / "summary.json")
    return Run(folder, config, rounds, clients, samples, jump, membership, leakage)


def read_config(path: Path) -> dict:
    """The content of config.json. Raises ValueError if it is damaged or a field has another type than in KINDS."""

    def check(holder: dict, kinds: dict) -> None:
        for name in holder.keys() & kinds:
            value = holder[name]
            if not isinstance(value, kinds[name]) or (isinstance(value, (int, float)) and not abs(value) < 2**63):
                raise ValueError(f"{path} is damaged: {name} is {reprlib.repr(value)}")

    config = read_json(path)
    check(config, KINDS)
    check(config.get("data", {}), {"name": str, "note": str})
    check(config.get("settings", {}), {"threshold": (int, float)})
    return config


def read_table(path: Path, keys: Sequence[str], values: Sequence[str], rest: bool = False) -> Any:
    """These columns of a CSV file, and all others with `rest`, as numbers.

    Rows without all `keys` are left out. A missing value is NaN.
    """
    import pandas as pd

    columns = [*keys, *values]
    text = path.read_text(errors="replace") if path.is_file() else ""
    complete = text[: text.rfind("\n") + 1].strip()  # a run killed while writing leaves a torn last line
    options: dict[str, Any] = {"index_col": False, "on_bad_lines": "skip", "quoting": csv.QUOTE_NONE}
    with warnings.catch_warnings(action="ignore"):  # pandas warns of rows that are longer than the heading
        table = pd.read_csv(io.StringIO(complete or ",".join(columns)), low_memory=False, **options)
    columns += [name for name in table if name not in columns] * rest
    table = table.reindex(columns=columns).apply(pd.to_numeric, errors="coerce")
    numbers = table[list(keys)]  # rounds and clients have whole numbers
    table = table[((numbers >= 0) & (numbers < 2**31) & (numbers % 1 == 0)).all(axis=1)]
    return table.astype(dict.fromkeys(keys, int))


def read_grid(path: Path) -> Any:
    """The complete runs of an experiment's table.csv, one row per run. Raises ValueError if a column is missing.

    The added column `right` is the share of clients that were judged correctly.
    """
    import pandas as pd

    table = pd.read_csv(path, dtype={"row": str, "column": str}).fillna({"row": "", "column": ""})
    numbers = ["seed", "rounds", "last", "clients", "attackers", "true_exclusions", "false_exclusions", *METRICS]
    if lacking := [name for name in ["row", "column", "complete", "data", *numbers] if name not in table]:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    table = table[table["complete"].eq(True)].copy()
    table[numbers] = table[numbers].apply(pd.to_numeric)
    if "averaged" not in table:  # a table of an earlier version
        table["averaged"] = table["last"].clip(upper=10)
    missed = table["attackers"] - table["true_exclusions"]
    table["right"] = 1 - (missed + table["false_exclusions"]) / table["clients"]
    return table


def changes(clients: Any) -> Any:
    """The rounds in which the set of active clients changes. `clients` is a frame of clients.csv."""
    return clients["round"][clients.groupby("client")["active"].diff().abs() > 0]


def steady(rounds: Any, clients: Any) -> Any:
    """The rows of `rounds` since the last change of the set of active clients; all rows if it never changed.

    Both are frames of a run's CSV files. The round of an exclusion already runs without the client, so it is the first
    of these rows. Means over the last rounds are taken from these rows, so that they mix no rounds with and without a
    client.
    """
    changed = changes(clients)
    return rounds[rounds["round"] >= changed.max()] if len(changed) else rounds


def counted(count: int, of: int) -> str:
    """A count and the 95 % interval of its rate in percent (Wilson 1927): "10 of 10 (72-100 %)"."""
    from scipy.stats import binomtest

    if not of:
        return ""
    low, high = binomtest(int(count), int(of)).proportion_ci(method="wilson")
    return f"{count:.0f} of {of:.0f} ({low * 100:.0f}-{high * 100:.0f} %)"


def span(table: Any) -> str:
    """The numbers of last rounds over which a table of runs has means: '10' or '4 to 10'."""
    numbers = table["averaged"][table["complete"] | ~table["complete"].any()]  # the others are in no mean
    return " to ".join(dict.fromkeys(f"{number:.0f}" for number in (numbers.min(), numbers.max())))


def read_samples(path: Path) -> tuple[NDArray, NDArray] | None:
    """Four images uint8 [4, 28, 28] and their labels [4] from an npz file. None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if sum(member.file_size for member in arrays.zip.infolist()) > SAMPLE_BYTES:
                return None
            images, labels = arrays["images"], arrays["labels"]
    except Exception:  # zipfile, zlib and numpy raise a dozen types
        return None
    whole = images.shape == (4, 28, 28) and labels.shape == (4,) and np.isin(labels, range(len(LABELS))).all()
    return (images, labels.astype(int)) if whole and images.dtype == np.uint8 else None


def read_pictures(path: Path) -> dict[str, tuple[NDArray, NDArray]]:
    """The true and the reconstructed images uint8 [n, 28, 28] of leakage.npz, by what the attacker saw.

    Empty if the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            kinds = [name.removeprefix("true_") for name in arrays if name.startswith("true_")]
            pairs = {kind: (arrays[f"true_{kind}"], arrays[f"found_{kind}"]) for kind in kinds}
        return {seen_in_words(*map(int, kind.split("_"))): pair for kind, pair in pairs.items()}
    except Exception:  # as above
        return {}


def evenly(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, at even distances: the first and the last are among them."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return [values[place] for place in places]


def seen_in_words(steps: int, images: int) -> str:
    """What the attacker of a gradient inversion sees; see lab.privacy.kinds_seen."""
    each = f"{images} image" + "s" * (images > 1)
    return f"{steps} step" + "s" * (steps > 1) + f" of {each}" if steps else f"gradient of {each}"


def read_jump(path: Path) -> dict | None:
    """The jump at the first exclusion, from a summary.json. None if there is none or the file is missing or damaged."""
    try:
        jump = read_json(path)["jumps"][0]
        parts = {name: {part: float(jump[name][part]) for part in JUMP_PARTS} for name in ("loss", "accuracy")}
        return {"round": int(jump["round"])} | parts
    except (OSError, ValueError, TypeError, LookupError, OverflowError):
        return None


def shortcomings(run: Run) -> str:
    """A text that says what of a run can't be drawn. Empty if everything can."""
    columns = {name: run.rounds[name] for name in CURVES} | {name: run.clients[name] for name in ("active", *SCORES)}
    absent = [name for name, values in columns.items() if values.isna().all()]
    parts = [f"has {run.length}"] * run.unfinished + [f"no values for {', '.join(absent)}"] * bool(absent)
    return "; ".join(parts)


def strategy(run: Run) -> str:
    """'MAD from round 5', 'never (FedAvg)' or 'no attack', with the aggregation rule if it is not FedAvg."""
    start, rule = run.config.get("mad_start"), run.config.get("rule", "mean")
    words = ["no attack"] * (not run.attacked) + [f"MAD from round {start}"] * (start is not None)
    if not words:
        return f"never ({'FedAvg' if rule == 'mean' else rule})"
    return ", ".join(words) + (f" ({rule})" if rule != "mean" else "")


def telling(config: dict, data: str) -> dict[str, Any]:
    """What labels and titles may name: the settings of a run that can matter in it. `config` has MAD's settings too."""
    start, attacked = config.get("mad_start"), config.get("malicious") != 0
    found = {"attacked": attacked, "mad_start": start, "data": data, "rounds": config.get("rounds")}
    found |= {name: config.get(name, default) for name, default in DEFAULTS.items()}
    # A preset of None: settings of one's own, which are named one by one. Early runs did not record theirs.
    if "preset" not in config and any(found[name] != default for name, default in OF_MAD.items()):
        del found["preset"]
    if found["partition"] != "iid":
        found["partition"] = f"{found['partition']} {config.get('concentration')}"
    idle = [*OF_ATTACKS] * (not attacked) + ["preset", *OF_MAD] * (start is None)
    return {name: value for name, value in found.items() if name not in idle}


def telling_of(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The `telling` settings of each run."""
    return [telling(run.config | (run.config.get("settings") or {}), run.data) for run in runs]


def differing(each: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the `telling` settings that differ between the runs that have them."""
    names = ("attacked", "mad_start", "data", "rounds", *DEFAULTS)
    return [name for name in names if len({setting_in_words(name, found[name]) for found in each if name in found}) > 1]


def setting_in_words(name: str, value: Any) -> str:
    """'attack hug', 'scale floor 0', 'partition dirichlet 0.5'."""
    return f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"


def variants(runs: Sequence[Run]) -> list[str]:
    """A text for each run that tells it from the others, except by its seed: the `telling` settings that differ.

    Defaults are left out where another setting is named. The text is the run's strategy if nothing differs.
    """
    each = telling_of(runs)
    told, texts = differing(each), []
    for run, found in zip(runs, each):
        unattacked, start = "attacked" in told and not found["attacked"], found["mad_start"]
        parts = ["no attack"] * unattacked
        if "mad_start" in told and start is not None:
            parts.append(f"MAD from round {start}")
        elif "mad_start" in told and not unattacked:
            parts.append("never (FedAvg)" if found["rule"] == "mean" else "never")
        implied = ("attacked", "mad_start", *(OF_MAD if found.get("preset") else ["preset"]))
        details = [name for name in told if name in found and name not in implied]
        unusual = [name for name in details if name not in DEFAULTS or is_unusual(name, found)]
        parts += [setting_in_words(name, found[name]) for name in (unusual if parts else unusual or details)]
        texts.append(", ".join(parts) or strategy(run))
    # Runs that still have the same text, say one with --membership, get the names of their folders.
    keys = [(text, run.config.get("seed")) for text, run in zip(texts, runs)]
    count = Counter(keys)
    return [f"{key[0]} ({run.name})" if count[key] > 1 else key[0] for key, run in zip(keys, runs)]


def shared(each: Sequence[dict[str, Any]]) -> list[str]:
    """The `telling` settings that all runs share and that are not the default, in words."""
    told, found = differing(each), {name: value for one in each for name, value in one.items()}
    names = [name for name in DEFAULTS if name in found and name not in told]
    unusual = [name for name in names if any(name in one and is_unusual(name, one) for one in each)]
    return [setting_in_words(name, found[name]) for name in unusual]


def is_unusual(name: str, found: dict[str, Any]) -> bool:
    """Whether a `telling` setting is not the default, and not one of a preset, which is named instead."""
    return found[name] not in (DEFAULTS[name], None) and not (name in OF_MAD and found.get("preset"))


def kinds(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by their label. Runs that differ in nothing but their seed share one. A run and its copy count once.

    The labels name the seeds where they are not those of most others.
    """
    together: dict[str, dict[Any, Run]] = {}
    for run, text in zip(runs, variants(runs)):
        together.setdefault(text, {}).setdefault(run.config.get("seed"), run)
    usual = usual_seeds(together.values())
    own = {text: "" if set(seeds) == usual else f", {seeds_in_words(seeds)}" for text, seeds in together.items()}
    return {text + own[text]: list(by_seed.values()) for text, by_seed in together.items()}


def usual_seeds(kinds_seeds: Iterable[Iterable[Any]]) -> frozenset:
    """The seeds that most kinds of runs have."""
    return max(Counter(map(frozenset, kinds_seeds)).items(), key=lambda item: item[1], default=[frozenset()])[0]


def title(subject: str, runs: Sequence[Run], note: str = "") -> str:
    """`subject`, and below it the data set, rounds and seeds of the runs, what else they share, and a note.

    They share, for example, an attack. Their defaults are not named, and neither is the strategy of a single kind.
    """
    data = " and ".join(dict.fromkeys(run.data for run in runs))
    length = " and ".join(dict.fromkeys(run.length for run in runs))
    labelled, each = kinds(runs), telling_of(runs)
    several, told = len(labelled) > 1, differing(each)
    common = ["no attack"] * (several and not any(found["attacked"] for found in each))
    if several and "mad_start" not in told:
        start = each[0]["mad_start"]
        common.append("without MAD" if start is None else f"MAD from round {start}")
    by_kind = [frozenset(run.config.get("seed") for run in members) for members in labelled.values()]
    seeds = seeds_in_words(usual_seeds(by_kind)) + " unless named" * (len(set(by_kind)) > 1)
    return titled(subject, ", ".join([data, length, seeds, *common, *shared(each)]) + note)


def numbered(letter: str, subject: str, runs: Sequence[Run]) -> str:
    """`subject`, as Fig. 3(letter) if the runs differ from the paper's in nothing but rounds, seeds and MAD's start."""
    each = telling_of(runs)
    free = {"attacked", "mad_start", "rounds"}
    if shared(each) or set(differing(each)) - free or any(found["data"] != "PneumoniaMNIST" for found in each):
        return subject
    return f"Fig. 3({letter}): {subject[:1].lower()}{subject[1:]}"


def seeds_in_words(seeds: Iterable[int | None]) -> str:
    """'seed 3', 'seeds 0, 2', 'seeds 0 to 19', or 'seed unknown' if there is none."""
    each = sorted({seed for seed in seeds if seed is not None})
    if not each:
        return "seed unknown"
    if len(each) > 2 and each[-1] - each[0] == len(each) - 1:
        return f"seeds {each[0]} to {each[-1]}"
    return f"seed{'s' * (len(each) > 1)} {', '.join(map(str, each))}"


def titled(subject: str, about: str) -> str:
    """`subject`, and below it `about`, in lines that fit the figure."""
    return "\n".join([*textwrap.wrap(subject, TITLE_WIDTH), *textwrap.wrap(about, TITLE_WIDTH)])


def exclusions(run: Run) -> str:
    """'attacker 2, 8 in round 5; honest 3 in round 7', or 'nobody'.

    More than MOST_NAMED clients of a kind are counted instead: '40 attackers in rounds 5 to 9'.
    """
    out = run.clients[run.clients["active"] == 0].sort_values("round").drop_duplicates("client")
    counted = out.groupby("malicious")["client"].transform("size") > MOST_NAMED
    groups = out[~counted].sort_values("client").groupby(["round", "malicious"])["client"]
    who_is = {0: "honest", 1: "attacker"}
    texts = [f"{who_is.get(bad)} {', '.join(map(str, who))} in round {t}" for (t, bad), who in groups]
    for bad, rounds in out[counted].groupby("malicious")["round"]:
        first, last = rounds.min(), rounds.max()
        when = f"round {first}" if first == last else f"rounds {first} to {last}"
        texts.append(f"{len(rounds)} {who_is.get(bad)}{'s' * (bad == 1)} in {when}")
    return "; ".join(texts) or "nobody"


def alike(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs that have scores, in groups that share a figure of trust: they differ only in MAD's start and the seed.

    A group has at most MOST_LINES kinds.
    """
    groups: dict[str, list[list[Run]]] = {}
    for members in kinds([run for run in runs if run.clients[list(SCORES)].notna().any(axis=None)]).values():
        every = members[0].config | (members[0].config.get("settings") or {}) | {"mad_start": 1}
        groups.setdefault(str(telling(every, members[0].data)), []).append(members)
    parts = [group[at : at + MOST_LINES] for group in groups.values() for at in range(0, len(group), MOST_LINES)]
    return [[run for members in part for run in members] for part in parts]


def by_start(run: Run) -> tuple:
    """The sorting key for the paper's order: from the earliest MAD start to never, then without attack."""
    start = run.config.get("mad_start")
    return (
        run.config.get("malicious") == 0,
        start is None,
        start or 0,
        run.config.get("seed") or 0,
        natural(Path(run.name)),
    )
