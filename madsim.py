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
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from threading import Event, Thread
from typing import get_args

# Numpy's idle threads wait, rather than spin on the cores that PyTorch computes on: at 100 clients 1.5 times as quick.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import numpy as np

import data
from trust import PRESETS, RULES, Settings, State, aggregate, check_limits, initial_state, mad_step, setting

DIGITS = 6  # significant digits of every number written: more than float32 holds after an average
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
    attack: str = setting("label_flip", "what malicious clients do", "paper")
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
    )
    rule: str = setting("mean", "how active clients' models are aggregated", "paper", choices=RULES)
    epochs: int = setting(1, "local epochs a round", "testbed", low=1, high=100)
    batch_size: int = setting(20, "images a local step", "testbed", low=1)
    lr: float = setting(1e-3, "learning rate of Adam", "testbed", low=0)
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
        data.malicious_count(self.clients, self.malicious)
        if self.mad_start is not None and self.mad_start > self.rounds:
            raise ValueError(f"mad_start {self.mad_start} lies beyond the {self.rounds} rounds; use 1 to {self.rounds}")
        if self.attack not in data.ATTACKS:
            from model import ATTACKS, OMNISCIENT

            known = data.ATTACKS | ATTACKS | OMNISCIENT
            if self.attack not in known:
                raise ValueError(f"attack {self.attack!r} is unknown; known: {', '.join(known)}")


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
    """What a run gives. `rounds` and `clients` are pandas frames with the columns of rounds.csv and clients.csv,
    `summary` is summary.json's content, `weights` [P] the last global model."""

    config: Config
    rounds: "pandas.DataFrame"  # noqa: F821 (pandas is imported where it is used)
    clients: "pandas.DataFrame"  # noqa: F821
    summary: dict
    weights: np.ndarray


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
            log(t, train_loss, clients.evaluate(w, t), w, scores)
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
INTEGERS = {"round", "client", "malicious", "active"}
CHECKPOINT = "checkpoint.npz"


class Log:
    """Writes a run's folder as it goes, shows the progress bar, and keeps the rows for the `Result`."""

    def __init__(self, config: Config, dataset: data.Dataset, members, out: str | Path | None, resume: bool, bar: bool):
        self.config, self.dataset, self.members, self.resume, self.bar_wanted = config, dataset, members, resume, bar
        self.out = None if out is None else Path(out)
        self.rounds, self.clients = self.tables = (
            Table(ROUND_COLUMNS, config.rounds, self.out and self.out / "rounds.csv"),
            Table(CLIENT_COLUMNS, config.rounds * config.clients, self.out and self.out / "clients.csv"),
        )
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
        self.last = w, scores, [table.mark for table in self.tables]
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
        found = read_checkpoint(self.out / CHECKPOINT, w, scores)
        refuse_changes(self.out, json.loads(str(found["run"])), self._identity())
        for table, (size, crc), rows in zip(self.tables, found["marks"].tolist(), (1, self.config.clients)):
            table.reopen(size, crc)
            if table.filled != found["round"] * rows:
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

    def __call__(self, t: int, train_loss: np.ndarray, metrics: tuple, w, scores: State) -> None:
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
        self.kept += [t] * scores.kept
        now = time.perf_counter()
        self.seconds.append(now - self.lap)
        self.lap = now
        # In one assignment, so that an interruption finds all of this round or nothing of it.
        self.last = w, scores, [table.mark for table in self.tables]
        if now - self.saved >= CHECKPOINT_SECONDS:
            self.save()
        self.bar.set_postfix_str(f"accuracy {means[1]:.3f}, active {who.sum()}", refresh=False)
        self.bar.update()

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
            arrays = {"w": w, "marks": np.array(marks), "seconds": np.array(self.seconds[:t], float)}
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
        """The rows so far as two pandas frames."""
        t = self.last[1].round
        return self.rounds.frame(t), self.clients.frame(t * self.config.clients)

    def _summarise(self, complete: bool) -> None:
        """Make summary.json, once there is a round."""
        t = self.last[1].round
        if not t:
            return
        summary = summarise(*self.frames(), self.config.mad_start) | {
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
        return Result(self.config, *self.frames(), self.summary, self.last[0])


class Table:
    """Rows of numbers in memory and, with a `path`, in a CSV file written as they come; NaN is an empty field.

    `mark` is the file's size in bytes and the CRC-32 of them: what a checkpoint keeps and `reopen` goes back to.
    """

    def __init__(self, columns: list[str], rows: int, path: Path | None):
        self.columns, self.path, self.file, self.mark = columns, path, None, (0, 0)
        # Room for every row at once: kept one by one they would break up the heap, and memory would grow.
        self.values, self.filled = np.empty((rows, len(columns))), 0

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

    def frame(self, rows: int):
        """The first so many rows as a pandas frame."""
        from pandas import DataFrame

        table = DataFrame(self.values[:rows], columns=self.columns)
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


def read_checkpoint(path: Path, w: np.ndarray, scores: State) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint; ValueError unless they are of the kinds that `w` [P], `scores` and a run need."""
    if not path.is_file():
        raise ValueError(f"{path.parent} can't be resumed: it holds no {path.name}; run it again with --overwrite")
    kinds = {"w": w, "marks": np.zeros((2, 2), int), "seconds": np.zeros(0), "kept_rounds": np.zeros(0, int)}
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


def summarise(rounds, clients, mad_start: int | None) -> dict:
    """Who was excluded when, and what it did, from the frames of rounds.csv and clients.csv."""
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
    }


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


# ---------------------------------------------------------------- several runs

# The paper's figures: rounds, MAD starts (None: never), and whether a run without attack belongs to it.
EXPERIMENTS = {
    "fig3a": (100, (5, 20, 40, 60, 80, None), True),
    "fig3c": (1000, (10, 500), False),
}


def experiment(name: str, base: Config, rounds: int | None) -> list[Config]:
    """The runs of one of the paper's figures. Other `rounds` than the paper's scale the MAD starts with them."""
    paper_rounds, starts, no_attack = EXPERIMENTS[name]
    rounds = rounds or paper_rounds
    scaled = dict.fromkeys(start and max(1, round(start * rounds / paper_rounds)) for start in starts)
    configs = [replace(base, rounds=rounds, mad_start=start) for start in scaled]
    return configs + [replace(base, rounds=rounds, mad_start=None, malicious=0.0)] * no_attack


def simulate_all(runs: list[tuple[Config, Path]], dataset: data.Dataset, jobs: int, resume: bool) -> list[Result]:
    """The runs, given with their folders: one with all threads, several as processes that share the cores."""
    if len(runs) == 1:
        return [simulate(*runs[0], dataset=dataset, resume=resume, bar=True)]
    from joblib import Parallel, delayed

    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # if the processes are killed
    jobs = min(jobs, len(runs))
    threads = max(1, os.cpu_count() // jobs)
    each = [(replace(config, threads=config.threads or threads), folder.absolute()) for config, folder in runs]
    with rounds_bar(runs):
        return Parallel(n_jobs=jobs)(delayed(simulate)(*run, dataset=dataset, resume=resume) for run in each)


@contextmanager
def rounds_bar(runs: list[tuple[Config, Path]]):
    """One progress bar for runs in other processes, which tell how far they are by the rows that they have written."""
    from tqdm import tqdm

    def rows(folder: Path) -> int:
        table = folder / "rounds.csv"
        return max(0, table.read_bytes().count(b"\n") - 1) if table.is_file() else 0

    def watch() -> None:
        while not finished.wait(0.5):
            bar.update(sum(rows(folder) for _, folder in runs) - bar.n)

    finished = Event()
    total = sum(config.rounds for config, _ in runs)
    done = sum(rows(folder) for _, folder in runs)
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
    return None if text == "never" else int(text)


def make_parser() -> argparse.ArgumentParser:
    about = "Simulate federated learning under label flipping, with Model Anomaly Detection (MAD)."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"madsim: {' '.join(message.split())}\n")
    add_options(parser.add_argument_group("a run"), Config)
    several = parser.add_argument_group("several runs, and where they go")
    several.add_argument("--seeds", type=int, metavar="N", help="run N seeds, from --seed on")
    several.add_argument("--experiment", choices=[*EXPERIMENTS, "paper"], help="a figure of the paper, or all of them")
    several.add_argument("--jobs", type=int, metavar="N", help="processes [default: one a core]")
    several.add_argument("--out", type=Path, metavar="DIR", help="[default: results]")
    several.add_argument("--overwrite", action="store_true", help="replace run folders that exist")
    several.add_argument("--resume", type=Path, nargs="+", metavar="DIR", help="go on with runs that were cut short")
    mad = parser.add_argument_group("MAD")
    mad.add_argument("--preset", choices=PRESETS, help="where MAD's defaults come from [default: paper]")
    add_options(mad, Settings)
    return parser


def add_options(group, of: type) -> None:
    """One option for each field of the dataclass, with its choices, help, default and source."""
    for f in fields(of):
        if f.name == "settings":
            continue
        about = f.metadata
        name = {"alpha": "alpha_reputation", "concentration": "alpha"}.get(f.name, f.name)  # alpha is Dirichlet's
        kind = {"mad_start": start_round}.get(f.name) or next(k for k in (get_args(f.type) or [f.type]) if k)
        default = "" if f.default is None else f"default: {f.default}, "
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=f.name,
            type=kind,
            nargs="+" if f.name == "mad_start" else None,
            choices=about.get("choices"),
            metavar=None if "choices" in about else name.split("_")[-1].upper(),
            help=f"{about['help']} [{default}{about['source']}]",
        )


def plan(given: dict) -> list[tuple[Config, Path]]:
    """The new runs that the command line asks for by the options `given`, each with its folder."""
    check_counts(given)
    base, out = configure(given, Config()), given.get("out", Path("results"))
    seeds = range(base.seed, base.seed + given.get("seeds", 1))
    if "experiment" in given:
        if "mad_start" in given:
            raise ValueError(f"experiment {given['experiment']} sets its own MAD starts; leave out --mad-start")
        names = EXPERIMENTS if given["experiment"] == "paper" else [given["experiment"]]
        groups = {out / name: experiment(name, base, given.get("rounds")) for name in names}
    else:
        groups = {out: [replace(base, mad_start=start) for start in dict.fromkeys(given.get("mad_start", [None]))]}
    configs = [(replace(c, seed=seed), folder) for folder, cs in groups.items() for seed in seeds for c in cs]
    runs = {folder / run_name(config): config for config, folder in configs}  # what is asked for twice is run once
    return [(config, folder) for folder, config in runs.items()]


def check_counts(given: dict) -> None:
    """ValueError for a number of seeds or of processes that can't be meant."""
    for name in ("seeds", "jobs"):
        if not 1 <= given.get(name, 1) <= MOST_RUNS:
            raise ValueError(f"{name} {given[name]} must be at least 1 and at most {MOST_RUNS}")


def configure(given: dict, base: Config) -> Config:
    """`base` with the options `given`, the MAD starts aside."""
    settings = PRESETS[given["preset"]] if "preset" in given else base.settings
    settings = replace(settings, **{f.name: given[f.name] for f in fields(Settings) if f.name in given})
    own = {f.name: given[f.name] for f in fields(Config) if f.name in given and f.name != "mad_start"}
    return replace(base, **own, settings=settings)


def plan_resumed(given: dict) -> list[tuple[Config, Path]]:
    """The runs of the folders given by --resume, with the settings that they were begun with.

    Another option may stand beside it if it says the same; ValueError if not, and for options that belong to new runs.
    """
    check_counts(given)
    for name in ("seeds", "experiment", "overwrite", "out"):
        if name in given:
            raise ValueError(f"--resume goes on with runs that are there; leave out --{name}")
    folders = {folder.resolve(): folder for folder in given["resume"]}.values()  # each once
    runs = {folder: read_config(folder) for folder in folders}
    if len({config.dataset for config in runs.values()}) > 1:
        raise ValueError("these runs have different data sets; resume them one by one")
    for folder, begun in runs.items():
        runs[folder] = configure(given, begun)
        starts = {"mad_start": given.get("mad_start", [begun.mad_start])}
        refuse_changes(folder, identity(begun) | {"mad_start": [begun.mad_start]}, identity(runs[folder]) | starts)
    return [(config, folder) for folder, config in runs.items()]


def refuse_folders(folders: list[Path], overwrite: bool) -> None:
    """ValueError if a run's folder exists, unless it may be replaced and is indeed a run's."""
    for folder in folders:
        if folder.exists() and not overwrite:
            way_out = "; --resume goes on with it" if unfinished([folder]) else ""
            raise ValueError(f"{folder} exists; use --overwrite to replace it, or another --out{way_out}")
        # One that was killed as it was made may hold nothing yet, or half a config.json.
        begun = folder.is_dir() and all(path.name.startswith("config.json") for path in folder.iterdir())
        if folder.exists() and not begun and not (folder / "config.json").is_file():
            raise ValueError(f"{folder} exists and is not a run's folder; it is not replaced")
        if (folder / "rounds.csv").is_file():
            with open(folder / "rounds.csv", "rb") as file:
                lock(file)


def complete(folder: Path) -> bool:
    """Whether the run of a folder has come to its end."""
    with suppress(OSError, ValueError):
        return read_json(folder / "summary.json").get("complete") is True
    return False


def unfinished(folders: list[Path]) -> list[Path]:
    """Those of the folders that hold a run which was cut short and can be resumed."""
    return [folder for folder in folders if (folder / CHECKPOINT).is_file() and not complete(folder)]


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    resume, folders, begun = "resume" in given, [], False
    try:
        runs = plan_resumed(given) if resume else plan(given)
        if resume:
            for folder in [folder for _, folder in runs if complete(folder)]:
                print(f"{folder} is complete")
            runs = [run for run in runs if not complete(run[1])]
            if not runs:
                return 0
        folders = [folder for _, folder in runs]
        if not resume:
            refuse_folders(folders, "overwrite" in given)
        dataset = data.load(runs[0][0].dataset, runs[0][0].data_root)
        gather(runs[0][0], dataset)  # what can't be run is refused before an earlier run's folder is touched
        for folder in [folder for folder in folders if folder.exists() and not resume]:
            shutil.rmtree(folder)
        introduce(runs, dataset)
        begun = True
        results = simulate_all(runs, dataset, given.get("jobs", os.cpu_count()), resume)
    except BrokenExecutor:
        parser.error(f"a run's process was killed{way_on(folders)}")
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    except (OSError, MemoryError) as error:
        parser.error(f"{error}{way_on(folders) if begun else ''}")
    except KeyboardInterrupt:  # a single run ends in order by itself; here it had not begun, or others were cut short
        print(f"\nmadsim: stopped{way_on(folders)}", file=sys.stderr)
        return 130
    for result, (_, folder) in zip(results, runs):
        report(result, folder)
    report_seeds(results)
    where = folders[0] if len(runs) == 1 else os.path.relpath(os.path.commonpath([f.absolute() for f in folders]))
    if any(len(result.rounds) for result in results):
        print(f"Figures      python plot.py {where}")
    return 0 if all(result.summary["complete"] for result in results) else 130


def way_on(folders: list[Path]) -> str:
    """How to go on with those of the runs that were begun and not finished, and which were not even begun."""
    cut_short, absent = unfinished(folders), [str(folder) for folder in folders if not folder.exists()]
    not_begun = f"; not begun: {', '.join(absent)}" if absent and len(folders) > 1 else ""
    command = shlex.join(["python", "madsim.py", "--resume", *map(str, cut_short)])
    return not_begun + (f"; go on with: {command}" if cut_short else "")


def introduce(runs: list[tuple[Config, Path]], dataset: data.Dataset) -> None:
    """Say what is about to run."""
    if dataset.note:
        print(f"PHANTOM IMAGES, not PneumoniaMNIST: {dataset.note}", file=sys.stderr)
    config = runs[0][0]
    rounds = sum(config.rounds for config, _ in runs)
    print(
        f"{dataset.name}, {len(dataset.train_labels)} training images; {config.clients} clients; "
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {rounds} rounds in all"
    )


def report(result: Result, folder: Path) -> None:
    """The plain summary at the end of a run."""
    s, rounds = result.summary, result.rounds
    print(f"\n{folder}" + (f"  (phantom images: {s['note']})" if s.get("note") else ""))
    if rounds.empty:
        return print(f"Stopped      before the first round ended{way_on([folder])}")
    if not s["complete"]:
        print(f"Stopped      after round {len(rounds)} of {result.config.rounds}{way_on([folder])}")
    for client, t in s["excluded"].items():
        kind = "attacker" if client in s["malicious"] else "HONEST"
        why = ", submitted NaN or infinity" if client in s["nonfinite"] else ""
        print(f"Excluded     client {client} ({kind}{why}) in round {t}")
    print(f"             {s['true_exclusions']} of {len(s['malicious'])} attackers, {s['false_exclusions']} honest")
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


def report_seeds(results: list[Result]) -> None:
    """A table of the runs that differ in the seed alone: means and sample standard deviations over the seeds."""
    from pandas import DataFrame

    rows = []
    for result in results:
        s = result.summary
        if s["complete"]:
            last = {name: s["last_50"][name] for name in ("loss", "honest_accuracy", "test_accuracy", "test_auc")}
            counts = {"attackers out": s["true_exclusions"], "honest out": s["false_exclusions"]}
            name = run_name(replace(result.config, seed=0)).removesuffix("-s0")
            rows.append({"runs": name} | last | counts | {"rounds to detection": s["rounds_to_detection"]})
    if not rows:
        return
    groups = DataFrame(rows).astype({"rounds to detection": float}).groupby("runs", sort=False)
    if groups.size().max() > 1:
        mean, deviation = groups.mean(), groups.std()
        texts = mean.map("{:.3f}".format) + " ± " + deviation.map("{:.3f}".format)
        texts = texts.where(mean.notna(), "").T  # what lacks in every run
        print("\nLast 50 rounds, or as many as there are: mean ± standard deviation over seeds")
        for name, cells in texts.items():
            print(f"{name}, {groups.size()[name]} seeds")
            print("".join(f"             {label:<22}{cell}\n" for label, cell in cells.items() if cell), end="")


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
