"""madsim: federated learning under label flipping, and the Model Anomaly Detection (MAD) that stops it.

`python madsim.py --rounds 1000 --mad-start 500` runs the system of "Towards More Robust Federated Learning with
Medical Imaging Model Anomaly Detection" (Korobeinikov, Chuprov, Reznik): see `simulate`, which is one federated
learning run, whole.

Shapes: C clients, P parameters, n images, t round.
"""

import argparse
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Collection, Iterable
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from threading import Event, Thread
from typing import get_args

# Numpy's idle threads wait, rather than spin on the cores that PyTorch computes on: at 100 clients 1.5 times as quick.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import numpy as np

import data
from trust import (
    PRESETS,
    RULES,
    Settings,
    State,
    aggregate,
    check_limits,
    initial_state,
    mad_step,
    need,
    plane,
    setting,
)

DIGITS = 6  # significant digits of every number written: more than float32 holds after an average
SHOWN_CLIENTS = 50  # ours: of so many at most where the models lie is recorded; at 100 it would take 6 % of a round
CONNECT_SECONDS = 10  # ours: to wait for a cluster's scheduler
QUICK = 60  # ours: rounds of --quick, with MAD from the middle; some 10 seconds on two cores
ROUND_SECONDS = 0.012  # measured, a client and epoch, on two cores: for the preview alone
MOST_RUNS = 10_000  # ours: of seeds, and of jobs
CHECKPOINT_SECONDS = 1.0  # ours: so much, and a round, is what a kill loses; a checkpoint takes some 2 ms

# ---------------------------------------------------------------- what a run is


@dataclass(frozen=True)
class Config:
    """One run. ValueError for a value outside its limits. The command line is made from these fields."""

    rounds: int = setting(1000, "aggregation rounds", "paper: 100 to 1000", low=1, high=1_000_000)
    mad_start: int | None = setting(
        None,
        "round from which MAD excludes, or never; several make several runs",
        "default: never; paper: 5 to 500",
        low=1,
    )
    clients: int = setting(10, "participating clients", "paper", low=1, high=100_000)
    malicious: float = setting(0.2, "fraction of the clients that are malicious, below half", "paper")
    attack: str = setting("label_flip", "what malicious clients do, see --list", "paper")
    flip: float = setting(1.0, "share of its labels that a malicious client flips", "paper", low=0, high=1)
    attack_start: int = setting(1, "round from which malicious clients attack", "paper", low=1)
    attack_period: int | None = setting(
        None, "they attack for so many rounds, then pause for as many (default: no pause)", "paper", low=1
    )
    partition: str = setting("iid", "how images are dealt to the clients", "paper", choices=data.PARTITIONS)
    concentration: float = setting(
        0.5,
        "concentration (alpha) of the Dirichlet distribution, for the partitions that are not iid",
        "Hsu et al. 2019",
        low=1e-3,
        option="alpha",
    )
    rule: str = setting("mean", "how active clients' models are aggregated", "paper", choices=RULES)
    epochs: int = setting(1, "local epochs a round", "testbed", low=1, high=100)
    batch_size: int = setting(20, "images a local step", "testbed", low=1)
    lr: float = setting(1e-3, "learning rate of Adam", "testbed", low=0)
    membership: int | None = setting(
        None, "measure what the model tells of its training images, every so many rounds", "ours", low=1
    )
    method: str = setting("stacked", "train all clients at once, or in a loop", "ours", choices=("stacked", "loop"))
    dataset: str = setting("auto", "auto: phantom if PneumoniaMNIST can't be had", "ours", choices=data.DATASETS)
    data_root: str | None = setting(None, f"folder of {data.FILE} (default: MADSIM_DATA, else medmnist's)", "ours")
    seed: int = setting(0, "determines everything random", "ours", low=0, high=2**63 - 1)
    device: str = setting("auto", "auto: cuda if there is one", "ours", choices=("auto", "cpu", "cuda"))
    threads: int | None = setting(
        None, "processor threads of a run (default: all, shared out where several run)", "ours", low=1, high=1024
    )
    settings: Settings = field(default=PRESETS["paper"], metadata={"help": "MAD's settings"})

    def __post_init__(self):
        check_limits(self)
        need(self.rule, self.clients, data.malicious_count(self.clients, self.malicious))
        for name in ("mad_start", "attack_start", "membership"):
            if (getattr(self, name) or 1) > self.rounds:
                beyond = f"{name} {getattr(self, name)} lies beyond the {self.rounds} rounds"
                raise ValueError(f"{beyond}; use 1 to {self.rounds}")
        if self.attack not in data.ATTACKS:
            from model import ATTACKS, OMNISCIENT

            known = data.ATTACKS | ATTACKS | OMNISCIENT
            if self.attack not in known:
                raise ValueError(f"attack {self.attack!r} is unknown; known: {', '.join(known)}")
            if self.flip != Config.flip:
                raise ValueError(f"flip {self.flip} changes nothing: attack {self.attack} flips no labels")
        if self.partition == "iid" and self.concentration != Config.concentration:
            raise ValueError(f"concentration (--alpha) {self.concentration} changes nothing with partition iid")


def run_name(config: Config) -> str:
    """A folder's name from what differs from the defaults: `mad500-s0`, `nomad-malicious0.1-s3`."""
    parts = ["nomad" if config.mad_start is None else f"mad{config.mad_start}"]
    preset = min(PRESETS, key=lambda name: len(_differences(config.settings, PRESETS[name])))
    parts += [] if preset == "paper" else [preset]
    told_elsewhere = {"mad_start", "seed", "settings", "data_root", "device", "threads"}
    changed = {k: v for k, v in _differences(config, Config()).items() if k not in told_elsewhere}
    changed |= _differences(config.settings, PRESETS[preset])
    for name, value in changed.items():
        number = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(value if isinstance(value, str) else name.replace("_", "") + number)
    return "-".join([*parts, f"s{config.seed}"])


def _differences(one, other) -> dict:
    """The fields of dataclass `one` that differ from those of `other`."""
    return {f.name: getattr(one, f.name) for f in fields(one) if getattr(one, f.name) != getattr(other, f.name)}


@dataclass(frozen=True)
class Result:
    """What a run gives. `rounds`, `clients` and `membership` (None if it was not asked for) are pandas frames with the
    columns of the CSV files, `summary` is summary.json's content, `weights` [P] the last global model."""

    config: Config
    rounds: "pandas.DataFrame"  # noqa: F821 (pandas is imported where it is used)
    clients: "pandas.DataFrame"  # noqa: F821
    summary: dict
    weights: np.ndarray
    membership: "pandas.DataFrame | None" = None  # noqa: F821


# ---------------------------------------------------------------- the round loop


def simulate(
    config: Config,
    out: str | Path | None = None,
    *,
    dataset: data.Dataset | None = None,
    resume: bool = False,
    bar: bool = False,
) -> Result:
    """One federated learning run. Ctrl-C ends it early, with `summary["complete"]` false.

    `out` is a new folder that the results are written to as the run goes (None: nothing is written), or with `resume`
    the folder of a run that was cut short, which goes on from its checkpoint; `read_config(out)` is its Config.
    `dataset` saves loading it, `bar` shows a progress bar. Raises ValueError for input that can't be run or a folder
    that can't be resumed, OSError for data or a folder that can't be had or written, FloatingPointError where all
    clients diverge.
    """
    dataset = dataset or data.load(config.dataset, config.data_root)
    clients = gather(config, dataset)
    with Log(config, dataset, clients, out, resume, bar) as log:
        w, scores = log.begin()
        for t in range(scores.round + 1, config.rounds + 1):
            asked = scores.active | (config.settings.excluded == "observed")
            W, train_loss = clients.train(w, asked, t)  # [C, P]   local training, all clients at once
            W = clients.attack(W, w, asked, t)  # [C, P]   what malicious clients submit instead
            scores = mad_step(W, scores, t, config.mad_start, config.settings)  # eqs. (1)-(7) and exclusion
            w = aggregate(W, clients.sizes, scores.active, config.rule, clients.malicious.sum(), w)  # [P]
            log(t, W, train_loss, clients.evaluate(w, t), w, scores)
    return log.result()


def gather(config: Config, dataset: data.Dataset):
    """The run's `model.Clients`, each with its share of the data set."""
    from model import Clients

    c = config
    shares, attacked = data.share_out(
        dataset.train_labels, c.clients, c.malicious, c.seed, c.attack, c.flip, c.partition, c.concentration
    )
    return Clients(
        (dataset.train_images, dataset.train_labels, attacked), (dataset.test_images, dataset.test_labels), shares,
        seed=c.seed, attack=(c.attack, c.attack_start, c.attack_period), device=c.device, threads=c.threads,
        epochs=c.epochs, batch_size=c.batch_size, lr=c.lr, method=c.method,
    )  # fmt: skip


# ---------------------------------------------------------------- what a run leaves behind

ROUND_COLUMNS = ["round", "loss", "accuracy", "honest_loss", "honest_accuracy"]
ROUND_COLUMNS += ["test_loss", "test_accuracy", "test_sensitivity", "test_specificity", "test_auc", "active"]
CLIENT_COLUMNS = ["round", "client", "malicious", "active", "distance", "d", "reputation", "trust"]
CLIENT_COLUMNS += ["train_loss", "loss", "accuracy"]
MEMBERSHIP_COLUMNS = ["round", "test_advantage", "test_error", "test_chance"]
MEMBERSHIP_COLUMNS += ["validation_advantage", "validation_error", "validation_chance"]
PLANE_COLUMNS = ["round", "client", "x", "y"]
INTEGERS = {"round", "client", "malicious", "active"}
CHECKPOINT = "checkpoint.npz"


class Log:
    """Writes a run's folder as it goes, shows the progress bar, and keeps the rows for the `Result`."""

    def __init__(self, config: Config, dataset: data.Dataset, members, out: str | Path | None, resume: bool, bar: bool):
        self.config, self.dataset, self.members, self.resume, self.bar_wanted = config, dataset, members, resume, bar
        self.out = None if out is None else Path(out)
        self.rounds = Table("rounds.csv", ROUND_COLUMNS, self.out, config.rounds)
        self.clients = Table("clients.csv", CLIENT_COLUMNS, self.out, config.rounds, rows=config.clients)
        self.membership = self.plane = None
        if config.membership:
            self.membership = Table(
                "membership.csv", MEMBERSHIP_COLUMNS, self.out, config.rounds, every=config.membership
            )
        if config.clients <= SHOWN_CLIENTS:
            self.plane = Table("plane.csv", PLANE_COLUMNS, self.out, config.rounds, rows=config.clients)
        self.tables = [table for table in (self.rounds, self.clients, self.membership, self.plane) if table]
        self.seconds, self.kept = [], []
        self.last, self.bar, self.summary = None, None, {"complete": False}

    def __enter__(self):
        return self

    def begin(self):
        """The global weights w [P] and the State that the run starts, or goes on, from."""
        from tqdm import tqdm

        from model import initial_weights

        w, scores = initial_weights(self.config.seed).numpy(), initial_state(self.config.clients)
        if self.resume:
            w, scores = self._reopen(w, scores)
        else:
            self._create()
        self.lap = time.perf_counter()
        self.last = w, scores, self.last_marks()
        self.save()
        self.bar = tqdm(
            total=self.config.rounds,
            initial=scores.round,
            unit="round",
            desc=run_name(self.config),
            disable=None if self.bar_wanted else True,  # None: no bar where the output is not a terminal
            dynamic_ncols=True,
        )
        return self.last[:2]

    def _create(self) -> None:
        """A new run's folder, before its first round."""
        if self.out:
            about = asdict(self.config) | origin(self.members) | {"data": about_data(self.dataset)}
            self.out.mkdir(parents=True)
            write_json(self.out / "config.json", about)
            np.savez(self.out / "samples.npz", **samples(self.dataset))
        for table in self.tables:
            table.create()

    def _reopen(self, w: np.ndarray, scores: State) -> tuple[np.ndarray, State]:
        """Weights and scores of the checkpoint in a run's folder, which is put back to where it stood then.

        `w` and `scores` are those of a new run: a checkpoint has arrays of the same kind. ValueError if the folder
        is not that of this run, or its files are not as madsim left them.
        """
        found = read_checkpoint(self.out / CHECKPOINT, w, scores, self.last_marks())
        refuse_changes(self.out, json.loads(str(found["run"])), self._identity())
        for table, (size, crc) in zip(self.tables, found["marks"].tolist()):
            table.reopen(size, crc)
            if table.filled != table.due(found["round"]):
                raise ValueError(f"{table.path} holds {table.filled} rows at round {found['round']} of the checkpoint")
        about = read_json(self.out / "config.json")
        resumed = about.get("resumed", [])
        if not isinstance(resumed, list):
            raise ValueError(f"{self.out / 'config.json'} is damaged: resumed is no list")
        for table in self.tables:
            table.cut()
        self.seconds, self.kept = found["seconds"].tolist(), found["kept_rounds"].tolist()
        scores = State(**{name: found[name] if found[name].ndim else found[name].item() for name in vars(scores)})
        if scores.round < self.config.rounds:
            resumed = [*resumed, {"after_round": scores.round} | origin(self.members)]
            write_json(self.out / "config.json", about | {"resumed": resumed})
        return found["w"], scores

    def _identity(self) -> dict:
        return identity(self.config) | {"data's MD5": self.dataset.md5}

    def __call__(self, t: int, W: np.ndarray, train_loss: np.ndarray, metrics: tuple, w, scores: State) -> None:
        """Record round t: one row of rounds.csv, one row a client of clients.csv, now and then a checkpoint."""
        loss, accuracy, test = metrics
        who, honest = scores.active, ~self.members.malicious
        means = [rounded(v[m].mean()) for m in (who, honest) for v in (loss, accuracy)]
        columns = (scores.distance, scores.d, scores.reputation, scores.trust, train_loss, loss, accuracy)
        rows = [
            [t, client, int(self.members.malicious[client]), int(who[client]), *map(rounded, values)]
            for client, values in enumerate(zip(*columns))
        ]
        self.rounds.append([[t, *means, *map(rounded, test.values()), int(who.sum())]])
        self.clients.append(rows)
        if self.membership and t % self.membership.every == 0:
            received = self.last[0]  # the model that the clients got in this round
            self.membership.append([[t, *map(rounded, self.members.membership(received, t).values())]])
        if self.plane:
            self.plane.append(self._points(t, W, scores))
        self.kept += [t] * scores.kept
        now = time.perf_counter()
        self.seconds.append(now - self.lap)
        self.lap = now
        # In one assignment, so that an interruption finds all of this round or nothing of it.
        self.last = w, scores, self.last_marks()
        if now - self.saved >= CHECKPOINT_SECONDS:
            self.save()
        self.bar.set_postfix_str(f"accuracy {means[1]:.3f}, active {who.sum()}", refresh=False)
        self.bar.update()

    def _points(self, t: int, W: np.ndarray, scores: State) -> list[list]:
        """The rows of plane.csv: where the submissions W [C, P] lie, for plot.py to play."""
        scored, points = np.isfinite(scores.distance), np.full((len(W), 2), np.nan)
        before = self.plane.last_rows()[:, 2:] if t > 1 else points
        points[scored] = plane(W[scored], self.last[1].spread, self.config.settings, before[scored])
        return [[t, client, rounded(x), rounded(y)] for client, (x, y) in enumerate(points)]

    def last_marks(self) -> np.ndarray:
        """How far the tables are written, int [tables, 2]; see `Table`."""
        return np.array([table.mark for table in self.tables])

    def save(self) -> None:
        """Write the checkpoint of the last round recorded, once the rows up to it are safely on the disk."""
        w, scores, marks = self.last
        t = scores.round
        if self.out:
            for table in self.tables:
                os.fsync(table.file.fileno())
            content = io.BytesIO()
            run = as_json(self._identity())
            kept = np.array([r for r in self.kept if r <= t], int)
            arrays = {"w": w, "marks": marks, "seconds": np.array(self.seconds[:t], float)}
            np.savez(content, run=run, kept_rounds=kept, **arrays, **vars(scores))
            replace_file(self.out / CHECKPOINT, content.getvalue())
        self.saved = time.perf_counter()

    def __exit__(self, kind, error, traceback) -> bool:
        if self.bar:
            self.bar.close()
        if self.last and not isinstance(error, OSError):  # what can't be written is not tried again
            self.save()
            self._summarise(complete=kind is None)
        for table in self.tables:
            table.close()
        return kind is KeyboardInterrupt and self.last is not None

    def frames(self):
        """The rows so far as pandas frames: rounds, clients and, if it is measured, membership (else None)."""
        tables = (self.rounds, self.clients, self.membership)
        return [table and table.frame(self.last[1].round) for table in tables]

    def _summarise(self, complete: bool) -> None:
        """Make summary.json, once there is a round."""
        t = self.last[1].round
        if not t:
            return
        summary = summarise(*self.frames(), mad_start=self.config.mad_start) | {
            "kept_rounds": [r for r in self.kept if r <= t],
            "seconds": round(sum(self.seconds[:t]), 3),
            "seconds_per_round": round(float(np.median(self.seconds[:t])), 4),
            "dataset": self.dataset.name,
            "note": self.dataset.note,
            "complete": complete,
        }
        self.summary = without_nan(summary)
        if self.out:
            write_json(self.out / "summary.json", self.summary)

    def result(self) -> Result:
        rounds, clients, membership = self.frames()
        return Result(self.config, rounds, clients, self.summary, self.last[0], membership)


class Table:
    """Rows of numbers in memory and, with a `folder`, in a CSV file written as they come; NaN is an empty field.

    So many `rows` come every so many rounds. `mark` is the file's size in bytes and the CRC-32 of them: what a
    checkpoint keeps and `reopen` goes back to.
    """

    def __init__(self, name: str, columns: list[str], folder: Path | None, rounds: int, rows: int = 1, every: int = 1):
        self.columns, self.rows, self.every = columns, rows, every
        self.path, self.file, self.mark = folder and folder / name, None, (0, 0)
        # Room for every row at once: kept one by one they would break up the heap, and memory would grow.
        self.values, self.filled = np.empty((self.due(rounds), len(columns))), 0

    def due(self, t: int) -> int:
        """The number of rows after round t."""
        return t // self.every * self.rows

    def create(self) -> None:
        """Begin the file, with the columns' names."""
        if self.path:
            self.file = open(self.path, "xb")
            lock(self.file)
            self._write([self.columns])

    def reopen(self, size: int, crc: int) -> None:
        """Read the file up to the mark (size, crc); ValueError if it does not hold what was written up to there."""
        self.file = open(self.path, "r+b")
        lock(self.file)
        content = self.file.read(size)
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError(f"{self.path} was changed or cut short since the checkpoint; the run can't go on from it")
        lines = io.TextIOWrapper(io.BytesIO(content))
        if next(lines, "").strip() != ",".join(self.columns) or content.count(b"\n") > len(self.values) + 1:
            raise ValueError(f"{self.path} has other columns or more rows than its run")
        for row, line in enumerate(lines):
            self.values[row] = [float(value or "nan") for value in line.split(",")]
        self.mark, self.filled = (size, crc), content.count(b"\n") - 1

    def cut(self) -> None:
        """Drop what follows the mark: rows after the checkpoint, the last perhaps torn."""
        self.file.truncate(self.mark[0])
        self.file.seek(self.mark[0])

    def append(self, rows: list[list]) -> None:
        self.values[self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)
        self._write(rows)

    def _write(self, rows: list[list]) -> None:
        if self.file:
            lines = (",".join("" if value != value else str(value) for value in row) + "\n" for row in rows)
            text = "".join(lines).encode()
            with naming(self.path):
                self.file.write(text)
                self.file.flush()
            size, crc = self.mark
            self.mark = size + len(text), zlib.crc32(text, crc)

    def close(self) -> None:
        if self.file:
            with suppress(OSError):  # of a full disk; it was raised when the row was written
                self.file.close()

    def last_rows(self) -> np.ndarray:
        """The rows that came last, together."""
        return self.values[self.filled - self.rows : self.filled]

    def frame(self, t: int):
        """The rows up to round t as a pandas frame."""
        from pandas import DataFrame

        table = DataFrame(self.values[: self.due(t)], columns=self.columns)
        return table.astype({name: int for name in self.columns if name in INTEGERS})


def lock(file) -> None:
    """ValueError if another process is writing this file. The lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{Path(file.name).parent} is being written by another run of madsim") from None


# ---------------------------------------------------------------- going on from a checkpoint


def identity(config: Config) -> dict:
    """What may not change while a run is interrupted: all its settings but for where the data lie and the threads."""
    every = asdict(config)
    every |= every.pop("settings")
    return {name: value for name, value in every.items() if name not in ("data_root", "threads")}


def refuse_changes(folder: Path, begun: dict, now: dict) -> None:
    """ValueError, naming them, if what a run was begun with and what it shall go on with differ."""
    changed = [f"{name} {begun.get(name)}, not {value}" for name, value in now.items() if begun.get(name) != value]
    if changed:
        raise ValueError(f"{folder} was begun with {', '.join(changed)}; a run can't change on the way")


def read_config(folder: str | Path) -> Config:
    """The Config of a run's folder. Raises FileNotFoundError if it has none, ValueError if that is damaged."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run's folder: it holds no config.json")
    written = read_json(path)
    try:
        settings = Settings(**{f.name: written["settings"][f.name] for f in fields(Settings)})
        return Config(**{f.name: written[f.name] for f in fields(Config)} | {"settings": settings})
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged: {reason}") from None


def read_checkpoint(path: Path, w: np.ndarray, scores: State, marks: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint; ValueError unless they are of the kinds of `w` [P], `scores` and `marks`."""
    if not path.is_file():
        raise ValueError(f"{path.parent} can't be resumed: it holds no {path.name}; run it again with --overwrite")
    kinds = {"w": w, "marks": marks, "seconds": np.zeros(0), "kept_rounds": np.zeros(0, int)}
    kinds = {name: np.asarray(value) for name, value in (kinds | vars(scores)).items()}
    try:
        with np.load(path, allow_pickle=False) as found:
            if any(member.file_size != member.compress_size for member in found.zip.infolist()):
                raise ValueError("it is compressed")  # madsim's never are; a small file could then fill the memory
            arrays = dict(found)
        if lacking := (kinds.keys() | {"run"}) - arrays.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        for name, kind in kinds.items():
            if arrays[name].dtype != kind.dtype or arrays[name].ndim != kind.ndim:
                raise ValueError(f"{name} is {arrays[name].dtype} with {arrays[name].ndim} axes")
            if name not in ("seconds", "kept_rounds") and arrays[name].shape != kind.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, not {kind.shape}")
        if len(arrays["seconds"]) != arrays["round"]:
            raise ValueError(f"{len(arrays['seconds'])} rounds were timed, not {arrays['round']}")
        scored = np.isfinite(arrays["distance"])  # the others have NaN
        known = np.concatenate([arrays[name][scored] for name in ("d", "reputation", "trust")])
        unknown = np.concatenate([arrays[name][~scored] for name in ("distance", "d", "reputation", "trust")])
        sizes = np.concatenate([arrays[name].ravel() for name in ("distance", "spread", "seconds", "marks")])
        rounds = arrays["kept_rounds"]
        if not (
            np.isfinite(arrays["w"]).all()
            and arrays["active"].any()
            and ((known >= 0) & (known <= 1)).all()
            and np.isnan(unknown).all()
            and np.isfinite(sizes[len(scored) :]).all()
            and not (sizes < 0).any()
            and ((rounds >= 1) & (rounds <= arrays["round"])).all()
        ):
            raise ValueError("its numbers are out of range")
        if not isinstance(json.loads(str(arrays["run"])), dict):
            raise ValueError("its settings are no object")
    except OSError:
        raise
    except Exception as error:  # zipfile's, numpy's and zlib's are of a dozen kinds
        raise ValueError(f"{path} is damaged: {error}") from None
    return arrays


def summarise(rounds, clients, membership=None, *, mad_start: int | None) -> dict:
    """Who was excluded when, and what it did, from the frames of rounds.csv, clients.csv and membership.csv."""
    malicious = [int(c) for c in clients.client[clients.malicious == 1].unique()]
    out = clients[clients.active == 0].drop_duplicates("client")  # every excluded client's first row without it
    excluded = {int(client): int(t) for client, t in zip(out.client, out["round"])}
    true = len(excluded.keys() & set(malicious))
    caught = true == len(malicious) > 0 and mad_start is not None
    last_50 = rounds.drop(columns="round").tail(50).mean()
    return {
        "excluded": excluded,
        "nonfinite": [int(c) for c in out.client[out.distance.isna()]],  # excluded for NaN or infinity
        "malicious": malicious,
        "true_exclusions": true,
        "false_exclusions": len(excluded) - true,
        "precision": true / len(excluded) if excluded else None,
        "recall": true / len(malicious) if malicious else None,
        "rounds_to_detection": max(0, max(excluded[c] for c in malicious) - mad_start) if caught else None,
        "last_50": {name: rounded(value) for name, value in last_50.items()},
        "jumps": [jump(clients, t) for t in sorted(set(excluded.values())) if t > 1],
        "membership": None if membership is None else {c: held(membership, clients, c) for c in malicious},
    }


def held(membership, clients, client: int) -> dict | None:
    """What was measured last of a model that the client has received, which it did when it was trained."""
    received = clients[(clients.client == client) & clients.train_loss.notna()]["round"].max()
    rows = membership[membership["round"] <= received].to_dict("records")
    return rows[-1] if rows else None


def jump(clients, t: int) -> dict:
    """The change of the participants' mean loss and accuracy at the exclusion in round t, in its two parts.

    `composition` is last round's model on those who stay, less on all who were averaged then: only who is averaged
    has changed. `model` is this round's model less last round's, on those who stay.
    """
    before, after = (clients[clients["round"] == r].set_index("client") for r in (t - 1, t))
    were, stay = before.active == 1, after.active == 1
    parts = {"round": t, "clients": [int(c) for c in before.index[were & ~stay]]}
    for name in ("loss", "accuracy"):
        composition = before[name][stay].mean() - before[name][were].mean()
        model = after[name][stay].mean() - before[name][stay].mean()
        changes = {"total": composition + model, "composition": composition, "model": model}
        parts[name] = {part: rounded(change) for part, change in changes.items()}
    return parts


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def samples(dataset: data.Dataset) -> dict[str, np.ndarray]:
    """Two normal and two pneumonia training images (Fig. 2)."""
    chosen = np.concatenate([np.flatnonzero(dataset.train_labels == label)[:2] for label in (0, 1)])
    return {"images": dataset.train_images[chosen], "labels": dataset.train_labels[chosen]}


def origin(members) -> dict:
    """Where a run, or a part of it, comes from: the command line, the code, versions, the machine."""
    from importlib.metadata import version

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    status = git("status", "--porcelain")
    packages = ("numpy", "scipy", "torch", "scikit-learn", "pandas")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)},
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in packages},
        "machine": {"device": str(members.device), "threads": members.threads},
    }


def about_data(dataset: data.Dataset) -> dict:
    return {key: getattr(dataset, key) for key in ("name", "md5", "note")}


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that who reads it, also after a kill or on a full disk, finds the old or the new one whole."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with naming(unfinished), open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise


@contextmanager
def naming(path: Path):
    """An OSError within it names the file, as those of writing to an open one do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, content: dict) -> None:
    replace_file(path, (as_json(content, indent=2) + "\n").encode())


def as_json(content: dict, indent: int | None = None) -> str:
    return json.dumps(content, indent=indent, allow_nan=False, default=lambda number: number.item())  # numpy's


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    return content


def without_nan(value):
    """The value with None for every NaN and infinity in it, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- experiments

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

    def cells(self, given: dict) -> dict[tuple[str, str], Config]:
        """Each cell's run, by its row's and column's names, with the options `given` besides its own.

        Other rounds than the experiment's scale whatever starts in a round or lasts for some.
        """
        rounds = given.get("rounds", self.rounds)
        found = {}
        for row, column in product(self.rows, self.columns):
            options = given | {"rounds": rounds} | self.rows[row] | self.columns[column]
            for name in ("mad_start", "attack_start", "attack_period"):
                if options.get(name):
                    options[name] = max(1, round(options[name] * rounds / self.rounds))
            if options.get("membership"):
                options["membership"] = max(1, min(options["membership"], rounds))
            found[row, column] = replace(configure(options, Config()), mad_start=options.get("mad_start"))
        return found


def mad_from(*starts: int | None) -> dict[str, dict]:
    """Rows or columns of an experiment by the round in which MAD starts (None: never)."""
    return {f"MAD from {start}" if start else "never": {"mad_start": start} for start in starts}


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
            "min-max, K = 1, dropped": MIN_MAX | {"clusters": 1},
            "min-max, K = 2, dropped": MIN_MAX | ALWAYS_GROUPED,
            "min-max, K = 1, observed": MIN_MAX | {"clusters": 1, "excluded": "observed"},
            "min-max, K = 2, observed": MIN_MAX | ALWAYS_GROUPED | {"excluded": "observed"},
            "floor of 2, K = 1": {"scale_floor": 2.0, "clusters": 1},
            "floor of 2, K = 2": {"scale_floor": 2.0, "floored": "always"} | ALWAYS_GROUPED,
            "silhouette alone": {"outlying": 0.0},
            "preset paper": {},
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
ELSEWHERE = {"out", "overwrite", "jobs", "backend", "scheduler", "data_root"}  # options that change no number


def tidy(cells: dict[Path, tuple[str, str]]):
    """A pandas frame of finished runs, given with the row and column that their folders belong to: one row a run, with
    its settings and what came of it. Of the metrics, means over the last LAST rounds, and the `fluctuation`: the
    standard deviation of the honest clients' accuracy's change from round to round over them. Of the first exclusion,
    the `jump` of participants' loss and accuracy, and what of it is the `model`'s."""
    from pandas import DataFrame, read_csv

    rows = []
    for folder, (row, column) in cells.items():
        if not (folder / "summary.json").is_file():  # it failed in its first round
            continue
        about, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
        rounds = read_csv(folder / "rounds.csv").drop(columns=["round", "active"])
        found = {"row": row, "column": column} | identity(read_config(folder))
        found |= {"attackers": len(summary["malicious"])}
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
        rows.append(found)
    return DataFrame(rows)


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


def markdown(texts, heading: str) -> str:
    """A frame of texts as a Markdown table under a heading."""
    table = texts.reset_index().replace({"column": {"": None}}).dropna(axis=1, how="all")
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).values.tolist()]
    return "\n".join([heading, "", *(f"| {' | '.join(cells)} |" for cells in lines), ""])


# ---------------------------------------------------------------- several runs


def simulate_all(
    runs: dict[Path, Config], dataset: data.Dataset, jobs: int, cluster: bool = False
) -> list[Result | ValueError | FloatingPointError]:
    """The runs, given with their folders: one with all threads, several as processes that share the cores, or all of
    them on the `cluster` that joblib was given (see `workers`). A run whose folder has a checkpoint goes on from it.
    Of several, one that fails gives its error, and the others go on."""
    if not runs:
        return []
    if len(runs) == 1 and not cluster:
        [(folder, config)] = runs.items()
        return [simulate(config, folder, dataset=dataset, resume=(folder / CHECKPOINT).is_file(), bar=True)]
    from joblib import Parallel, delayed

    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # if the processes are killed
    jobs = min(jobs, len(runs))
    threads = 1 if cluster else max(1, os.cpu_count() // jobs)
    each = [(replace(config, threads=config.threads or threads), folder.absolute()) for folder, config in runs.items()]
    with rounds_bar(runs):
        return Parallel(n_jobs=jobs)(delayed(attempt)(*run, dataset, sys.argv) for run in each)


def attempt(
    config: Config, folder: Path, dataset: data.Dataset, command: list[str]
) -> Result | ValueError | FloatingPointError:
    """A run among several: it, or why it failed. KeyboardInterrupt if it was stopped, which is for all of them."""
    sys.argv = command  # for config.json: a cluster's worker was started by another
    try:
        result = simulate(config, folder, dataset=dataset, resume=(folder / CHECKPOINT).is_file())
    except (ValueError, FloatingPointError) as error:
        return type(error)(f"{folder}: {error}")
    if not result.summary["complete"]:
        raise KeyboardInterrupt
    return result


@contextmanager
def workers(scheduler: str | None):
    """Within it joblib's Parallel runs on the Dask cluster at an address; None: on processes of this machine.

    The cluster's workers see the same folders, find these modules, and have one thread each, as PyTorch's threads and
    random state are a process's. ValueError for workers that have more, OSError for a cluster that does not answer.
    """
    if scheduler is None:
        yield
        return
    from joblib import parallel_config

    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--backend dask needs a package that is not here: pip install distributed") from None
    with Client(scheduler, timeout=CONNECT_SECONDS) as client, parallel_config(backend="dask"):
        if crowded := [worker for worker, threads in client.nthreads().items() if threads != 1]:
            raise ValueError(f"workers {', '.join(crowded)} have several threads; start them with --nthreads 1")
        yield


@contextmanager
def rounds_bar(runs: dict[Path, Config]):
    """One progress bar for runs in other processes, which tell how far they are by the rows that they have written."""
    from tqdm import tqdm

    def rows(folder: Path) -> int:
        table = folder / "rounds.csv"
        return max(0, table.read_bytes().count(b"\n") - 1) if table.is_file() else 0

    def watch() -> None:
        while not finished.wait(0.5):
            bar.update(sum(rows(folder) for folder in runs) - bar.n)

    finished = Event()
    total = sum(config.rounds for config in runs.values())
    done = sum(rows(folder) for folder in runs)
    about = {"unit": "round", "desc": f"{len(runs)} runs", "disable": None, "dynamic_ncols": True}
    with tqdm(total=total, initial=done, **about) as bar:
        watcher = Thread(target=watch)
        watcher.start()
        try:
            yield
            bar.update(total - bar.n)
        finally:
            finished.set()
            watcher.join()


# ---------------------------------------------------------------- the command line


def start_round(text: str) -> int | None:
    """A value of --mad-start: a round, or `never`."""
    try:
        return None if text == "never" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a round nor 'never'") from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python madsim.py [--quick] [--rounds N] [--mad-start ROUND ...] [options]",
        description="Simulate federated learning under label flipping, with Model Anomaly Detection (MAD).",
        epilog="Then: python plot.py results/ draws what came of it, --play makes a page that plays it.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = lambda message: parser.exit(2, f"madsim: {' '.join(message.split())}\n")
    add_options(parser.add_argument_group("a run"), Config)
    parser.add_argument("--list", action="store_true", help="the attacks, rules, presets and experiments, and exit")
    parser.add_argument("--quick", action="store_true", help=f"a lecture's run: {QUICK} rounds, MAD from the middle")
    several = parser.add_argument_group("several runs, and where they go")
    several.add_argument("--seeds", type=int, metavar="N", help="run N seeds, from --seed on")
    several.add_argument(
        "--experiment",
        choices=[*EXPERIMENTS, "paper"],
        help="a grid of runs and their table; paper: all of its figures. Called again, it goes on where it stopped",
    )
    several.add_argument("--jobs", type=int, metavar="N", help="processes [default: one a core]")
    several.add_argument(
        "--backend", choices=("loky", "dask"), help="processes here, or a Dask cluster [default: loky]"
    )
    several.add_argument(
        "--scheduler", type=str, metavar="ADDRESS", help="of the Dask cluster, such as tcp://host:8786"
    )
    several.add_argument("--out", type=Path, metavar="DIR", help="[default: results]")
    several.add_argument("--overwrite", action="store_true", help="replace run folders that exist")
    several.add_argument("--resume", type=Path, nargs="+", metavar="DIR", help="go on with runs that were cut short")
    mad = parser.add_argument_group("MAD")
    mad.add_argument("--preset", choices=PRESETS, help="where MAD's defaults come from [default: paper]")
    add_options(mad, Settings)
    return parser


def known_names() -> dict[str, dict[str, str]]:
    """What can be named on the command line: of each kind the names, each with what it is in a sentence."""
    from model import ATTACKS, OMNISCIENT

    def sentences(registry: dict) -> dict[str, str]:
        texts = {name: " ".join(function.__doc__.split()) for name, function in registry.items()}
        return {name: re.split(r"(?<!\bal)\. ", text)[0].rstrip(".") for name, text in texts.items()}

    settings = {name: len(_differences(preset, Settings())) for name, preset in PRESETS.items()}
    presets = {
        name: f"{count} settings differ, see trust.py" if count else "MAD as the paper prints it"
        for name, count in settings.items()
    }
    return {
        "--attack": sentences(data.ATTACKS | ATTACKS | OMNISCIENT),
        "--rule": sentences(RULES),
        "--preset": presets,
        "--experiment": {name: experiment.about for name, experiment in EXPERIMENTS.items()}
        | {"paper": " and ".join(PAPER)},
    }


def add_options(group, of: type) -> None:
    """One option for each field of the dataclass, with its choices, help, default and source."""
    for f in fields(of):
        if f.name == "settings":
            continue
        about = f.metadata
        kind = next(k for k in (get_args(f.type) or [f.type]) if k)
        value = {"mad_start": "ROUND", "data_root": "DIR"}.get(f.name) or {int: "N", float: "X", str: "NAME"}[kind]
        default = "" if f.default is None else f"default: {f.default}, "
        group.add_argument(
            option(f.name),
            dest=f.name,
            type=start_round if f.name == "mad_start" else kind,
            nargs="+" if f.name == "mad_start" else None,
            choices=about.get("choices"),
            metavar=None if "choices" in about else value,
            help=f"{about['help']} [{default}{about['source']}]",
        )


def option(name: str) -> str:
    """The option of the command line for a field of Config or Settings, or another one by its name in `given`."""
    renamed = {f.name: f.metadata["option"] for f in (*fields(Config), *fields(Settings)) if "option" in f.metadata}
    return "--" + renamed.get(name, name.replace("_", "-"))


def plan(given: dict) -> dict[Path, Config]:
    """The new runs that the command line asks for by the options `given`, each in its folder."""
    check_execution(given)
    out = given.get("out", Path("results"))
    if "quick" in given and "experiment" in given:
        raise ValueError("--quick is a run of its own, --experiment another thing; leave out one of them")
    if "quick" in given:
        rounds = given.get("rounds", QUICK)
        given = {"rounds": rounds, "mad_start": [rounds // 2]} | given
    if "experiment" in given:
        groups = {folder: [*cells.values()] for folder, cells in plan_experiments(given).items()}
    else:
        base = configure(given, Config())
        groups = {out: [replace(base, mad_start=start) for start in given.get("mad_start", [None])]}
    return {  # what is asked for twice is run once
        folder / run_name(replace(config, seed=seed)): replace(config, seed=seed)
        for folder, configs in groups.items()
        for seed in seeds_of(given)
        for config in configs
    }


def plan_experiments(given: dict) -> dict[Path, dict[tuple[str, str], Config]]:
    """The cells of the experiments that are asked for, by the folders of their runs."""
    names = PAPER if given["experiment"] == "paper" else [given["experiment"]]
    for name in names:
        if clash := sorted(EXPERIMENTS[name].sets() & given.keys()):
            raise ValueError(f"experiment {name} sets {', '.join(map(option, clash))} itself; leave that out")
    return {given.get("out", Path("results")) / name: EXPERIMENTS[name].cells(given) for name in names}


def seeds_of(given: dict) -> range:
    first = given.get("seed", 0)
    return range(first, first + given.get("seeds", 1))


def check_execution(given: dict) -> None:
    """ValueError for a number of seeds or of processes that can't be meant, or half of a cluster."""
    for name in ("seeds", "jobs"):
        if not 1 <= given.get(name, 1) <= MOST_RUNS:
            raise ValueError(f"{name} {given[name]} must be at least 1 and at most {MOST_RUNS}")
    if "scheduler" in given and given.get("backend") != "dask":
        raise ValueError("--scheduler goes with --backend dask")
    if given.get("backend") == "dask" and "scheduler" not in given:
        raise ValueError("--backend dask needs --scheduler ADDRESS")
    if "scheduler" in given and "jobs" in given:
        raise ValueError("--jobs is of this machine; a Dask cluster has the workers that it was started with")


def configure(given: dict, base: Config) -> Config:
    """`base` with the options `given`, the MAD starts aside."""
    settings = PRESETS[given["preset"]] if "preset" in given else base.settings
    settings = replace(settings, **{f.name: given[f.name] for f in fields(Settings) if f.name in given})
    own = {f.name: given[f.name] for f in fields(Config) if f.name in given and f.name != "mad_start"}
    return replace(base, **own, settings=settings)


def plan_resumed(given: dict) -> dict[Path, Config]:
    """The runs of the folders given by --resume, with the settings that they were begun with.

    Another option may stand beside it if it says the same; ValueError if not, and for options that belong to new runs.
    """
    check_execution(given)
    for name in ("seeds", "experiment", "overwrite", "out", "quick"):
        if name in given:
            raise ValueError(f"--resume goes on with runs that are there; leave out --{name}")
    folders = {folder.resolve(): folder for folder in given["resume"]}.values()  # each once
    runs = {folder: read_config(folder) for folder in folders}
    for folder in runs:
        if not complete(folder) and not (folder / CHECKPOINT).is_file():
            raise ValueError(f"{folder} can't be resumed: it holds no {CHECKPOINT}; run it again with --overwrite")
    if len({config.dataset for config in runs.values()}) > 1:
        raise ValueError("these runs have different data sets; resume them one by one")
    for folder, begun in runs.items():
        runs[folder] = configure(given, begun)
        starts = {"mad_start": given.get("mad_start", [begun.mad_start])}
        refuse_changes(folder, identity(begun) | {"mad_start": [begun.mad_start]}, identity(runs[folder]) | starts)
    return runs


def make_ready(planned: dict[Path, Config], given: dict) -> tuple[dict[Path, Config], data.Dataset]:
    """Those of the planned runs that have not come to their end, and the data.

    Folders that are in the way are refused or, if they may be replaced, removed: last of all, so that what can't be
    run costs no earlier run. An experiment's own runs are not in the way. ValueError if they are not what is asked for.
    """
    overwrite, resume = "overwrite" in given, "resume" in given
    grid = "experiment" in given and not overwrite
    stay = [folder for folder in planned if resume or (grid and (folder / CHECKPOINT).is_file())]
    finished = [folder for folder in stay if complete(folder)]
    in_the_way = [folder for folder in planned if folder not in stay and folder.exists()]
    for folder in in_the_way:
        refuse_folder(folder, replaceable=overwrite or (grid and hollow(folder)))
    first = next(iter(planned.values()))
    dataset = data.load(first.dataset, first.data_root)
    gather(first, dataset)
    for folder in finished:
        if resume:
            print(f"{folder} is complete")
        else:
            md5 = {"data's MD5": read_json(folder / "config.json").get("data", {}).get("md5")}
            now = identity(planned[folder]) | {"data's MD5": dataset.md5}
            refuse_changes(folder, identity(read_config(folder)) | md5, now)
    for folder in in_the_way:
        shutil.rmtree(folder)
    return {folder: config for folder, config in planned.items() if folder not in finished}, dataset


def refuse_folder(folder: Path, replaceable: bool) -> None:
    """ValueError if a folder that exists may not be replaced, is no run's, or is being written."""
    if not replaceable:
        way_out = "; --resume goes on with it" if unfinished([folder]) else ""
        raise ValueError(f"{folder} exists; add --overwrite to replace it, or --out DIR for another place{way_out}")
    if not hollow(folder) and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} exists and is not a run's folder; it is not replaced")
    if (folder / "rounds.csv").is_file():
        with open(folder / "rounds.csv", "rb") as file:
            lock(file)


def hollow(folder: Path) -> bool:
    """Whether a run was killed as its folder was made, before anything was recorded: the checkpoint comes last."""
    made = {"config.json", "samples.npz", "rounds.csv", "clients.csv", "membership.csv", "plane.csv", CHECKPOINT}
    return folder.is_dir() and {path.name.removesuffix(".part") for path in folder.iterdir()} <= made - {CHECKPOINT}


def complete(folder: Path) -> bool:
    """Whether the run of a folder has come to its end."""
    with suppress(OSError, ValueError):
        return read_json(folder / "summary.json").get("complete") is True
    return False


def unfinished(folders: Iterable[Path]) -> list[Path]:
    """Those of the folders that hold a run which was cut short and can be resumed."""
    return [folder for folder in folders if (folder / CHECKPOINT).is_file() and not complete(folder)]


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    if given.pop("list", False):
        for option, names in known_names().items():
            print(option)
            print("".join(f"  {name:<17}{about}\n" for name, about in names.items()), end="")
        return 0
    grid, runs, begun = "experiment" in given, {}, False
    try:
        planned = plan_resumed(given) if "resume" in given else plan(given)
        with workers(given.get("scheduler")):
            runs, dataset = make_ready(planned, given)
            if runs:
                introduce(runs, dataset)
            begun = True
            results = simulate_all(runs, dataset, given.get("jobs", os.cpu_count()), "scheduler" in given)
    except BrokenExecutor:
        parser.error(f"a run's process was killed{way_on(runs, grid)}")
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    except (OSError, MemoryError) as error:
        parser.error(f"{error}{way_on(runs, grid) if begun else ''}")
    except KeyboardInterrupt:  # a single run ends in order by itself; here it had not begun, or others were cut short
        print(f"\nmadsim: stopped{way_on(runs, grid)}", file=sys.stderr)
        return 130
    done = {folder: result for folder, result in zip(runs, results) if isinstance(result, Result)}
    if grid:
        tabulate_experiments(given)
    else:
        report_all(done)
    for error in (result for result in results if not isinstance(result, Result)):
        print(f"madsim: {error}", file=sys.stderr)
    if len(done) < len(runs):
        return 2
    return 0 if all(result.summary["complete"] for result in done.values()) else 130


def way_on(folders: Collection[Path], grid: bool = False) -> str:
    """How to go on with those of the runs that were begun and not finished, and which were not even begun."""
    cut_short, absent = unfinished(folders), [str(folder) for folder in folders if not folder.exists()]
    if grid:
        return "; the same command goes on" if len(absent) < len(folders) else ""
    not_begun = f"; not begun: {', '.join(absent)}" if absent and len(folders) > 1 else ""
    command = shlex.join(["python", "madsim.py", "--resume", *map(str, cut_short)])
    return not_begun + (f"; go on with: {command}" if cut_short else "")


def introduce(runs: dict[Path, Config], dataset: data.Dataset) -> None:
    """Say what is about to run."""
    if dataset.note:
        print(f"PHANTOM IMAGES, not PneumoniaMNIST: {dataset.note}", file=sys.stderr)
    clients = " or ".join(str(n) for n in sorted({config.clients for config in runs.values()}))
    rounds = sum(config.rounds for config in runs.values())
    seconds = sum(config.rounds * config.clients * config.epochs * ROUND_SECONDS for config in runs.values())
    print(
        f"{dataset.name}, {len(dataset.train_labels)} training images; {clients} clients; "
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {rounds} rounds in all, about {minutes(seconds)} on two cores"
    )


def minutes(seconds: float) -> str:
    """A rough time in words: '20 seconds', '3 minutes'."""
    if seconds < 60:
        return f"{max(1, round(seconds / 10)) * 10} seconds"
    return f"{round(seconds / 60)} minute{'s' * (round(seconds / 60) > 1)}"


def report_all(results: dict[Path, Result]) -> None:
    """What came of the runs, each and over seeds, and how to draw them."""
    for folder, result in results.items():
        report(result, folder)
    cells = {folder: (run_name(replace(r.config, seed=0)).removesuffix("-s0"), "") for folder, r in results.items()}
    if len(set(cells.values())) < len(cells):
        report_seeds(tidy(cells))
    if any(len(result.rounds) for result in results.values()):
        print(f"Figures      python plot.py {common_folder(results)}")


def common_folder(folders: Collection[Path]) -> str:
    """The run's folder, or the nearest that holds them all."""
    whole = os.path.commonpath([folder.absolute() for folder in folders])
    return str(*folders) if len(folders) == 1 else os.path.relpath(whole)


def report(result: Result, folder: Path) -> None:
    """The plain summary at the end of a run."""
    s, rounds = result.summary, result.rounds
    print(f"\n{folder}" + "  (phantom images)" * bool(s.get("note")))
    if rounds.empty:
        return print(f"Stopped      before the first round ended{way_on([folder])}")
    if not s["complete"]:
        print(f"Stopped      after round {len(rounds)} of {result.config.rounds}{way_on([folder])}")
    for client, t in s["excluded"].items():
        kind = "attacker" if client in s["malicious"] else "HONEST"
        why = ", submitted NaN or infinity" if client in s["nonfinite"] else ""
        print(f"Excluded     client {client} ({kind}{why}) in round {t}")
    attackers = len(s["malicious"])
    if s["excluded"]:
        among = f"{s['true_exclusions']} of {attackers} attackers, " * bool(attackers)
        print(f"             {among}{s['false_exclusions']} honest")
    else:
        stayed = f"{attackers} attacker{'s' * (attackers > 1)} stayed"
        print(f"Excluded     nobody; {stayed if attackers else 'nobody attacked'}")
    if s["kept_rounds"]:
        print(f"Kept         everyone, in {len(s['kept_rounds'])} rounds that would have excluded everyone")
    times = {f"round {len(rounds)}": rounds.iloc[-1], f"last {len(rounds.tail(50))}": rounds.tail(50).mean()}
    if s["jumps"]:
        t = s["jumps"][0]["round"]
        times = {f"round {t - 1}": rounds.iloc[t - 2], f"round {t}": rounds.iloc[t - 1]} | times
    print("             " + "".join(f"{name:>12}" for name in times))
    for label, column in (
        ("Loss         participants", "loss"), ("Accuracy     participants", "accuracy"),
        ("             honest clients", "honest_accuracy"), ("             test set", "test_accuracy"),
    ):  # fmt: skip
        print(f"{label:<13}" + "".join(f"{values[column]:>12.3f}" for values in times.values()))
    print(f"Time         {s['seconds']:.1f} s, {s['seconds_per_round']:.3f} s a round")


def report_seeds(table) -> None:
    """For runs that differ in the seed alone, given as `tidy` does, their means and deviations over the seeds."""
    print(f"\nLast {span(table)} rounds: mean ± standard deviation over seeds")
    for (name, _), texts in over_seeds(table).iterrows():
        print(f"{name}, {texts.pop('seeds')} seeds")
        print("".join(f"             {label:<22}{text}\n" for label, text in texts.items() if text), end="")


def span(table) -> int:
    """Of how many last rounds a `tidy` frame has the means."""
    return min(LAST, int(table["last"].max()))


def tabulate_experiments(given: dict) -> None:
    """Write each experiment's table.csv, a row a run, and table.md, a row a cell; say the essence of it."""
    for folder, cells in plan_experiments(given).items():
        there = [re.search(r"-s(\d+)$", path.name) for path in folder.iterdir()]  # other seeds' runs of an earlier call
        seeds = sorted({*seeds_of(given), *(int(match[1]) for match in there if match)})
        runs = {folder / run_name(replace(c, seed=seed)): cell for cell, c in cells.items() for seed in seeds}
        table = tidy(runs)
        if table.empty:
            continue
        replace_file(folder / "table.csv", table.to_csv(index=False).encode())
        texts = over_seeds(table)
        replace_file(folder / "table.md", markdown(texts, heading(folder.name, table, given)).encode())
        few = texts[["seeds", "attackers out", "honest out", "honest accuracy", "test accuracy"]]
        print(f"\n{EXPERIMENTS[folder.name].about}; last {span(table)} rounds, mean ± standard deviation over seeds")
        print(few.to_string())
        print(f"Tables       {folder / 'table.md'}, {folder / 'table.csv'}\nFigures      python plot.py {folder}")


def heading(name: str, table, given: dict) -> str:
    """What stands above an experiment's Markdown table: what it is, and which code made it from which data."""
    words = [f"{option(key)} {value}" for key, value in (given | {"experiment": name}).items() if key not in ELSEWHERE]
    commits = ", ".join(sorted({commit for commits in table.commit for commit in commits.split(", ")}))
    dirty = " (with changes)" if table.dirty.any() else ""
    short = table[~table.complete]
    failed = [f"{run.row} {run.column}, seed {run.seed}, after round {run.last}" for run in short.itertuples()]
    ended = f" Ended early: {'; '.join(failed)}." * bool(failed)
    own, rounds = EXPERIMENTS[name].rounds, int(table.rounds.max())
    scaled = f" Rounds in the names are those of {own}, scaled to {rounds}." * (own != rounds)
    seeds = ", ".join(map(str, sorted(table.seed.unique())))
    return (
        f"# {name}: {EXPERIMENTS[name].about}\n\n"
        f"`python madsim.py {' '.join(words)}`; {', '.join(table.data.unique())}; {rounds} rounds; seeds {seeds}; "
        f"commit {commits}{dirty}. Mean ± sample standard deviation over the seeds; of losses and accuracies, of their "
        f"means over the last {span(table)} rounds.{scaled}{ended}"
    )


def command() -> int:
    """`main` as the shell's command, whatever becomes of its output."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends a run as Ctrl-C does
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream]  # None: closed by whoever started us
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # a folder's name need not be text
    try:
        try:
            return main()
        finally:
            for stream in streams:
                stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it still holds is not tried again
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough, the disk under a log file is full
            print(f"madsim: the output can't be written: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(command())
