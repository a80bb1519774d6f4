"""What a run leaves behind: its tables, row by row as it goes, its checkpoint, and the summary at its end.

Shapes: C clients, P parameters, t round.
"""

import io
import json
import os
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.folder import (
    CHECKPOINT,
    as_json,
    identity,
    lock,
    naming,
    read_checkpoint,
    read_json,
    refuse_changes,
    replace_file,
    rounded,
    without_nan,
    write_json,
)
from trust import Array, Settings, State, main_cluster, squared_distances

ROUND_COLUMNS = ["round", "loss", "accuracy", "honest_loss", "honest_accuracy"]
ROUND_COLUMNS += ["test_loss", "test_accuracy", "test_sensitivity", "test_specificity", "test_auc", "active"]
CLIENT_COLUMNS = ["round", "client", "malicious", "active", "distance", "d", "reputation", "trust"]
CLIENT_COLUMNS += ["train_loss", "loss", "accuracy"]
MEMBERSHIP_COLUMNS = ["round", "test_advantage", "test_error", "test_chance"]
MEMBERSHIP_COLUMNS += ["validation_advantage", "validation_error", "validation_chance"]
PLANE_COLUMNS = ["round", "client", "x", "y"]
INTEGERS = {"round", "client", "malicious", "active"}
SHOWN_CLIENTS = 50  # ours: of so many at most where the models lie is recorded; at 100 it would take 6 % of a round
CHECKPOINT_SECONDS = 1.0  # ours: so much, and a round, is what a kill loses; a checkpoint takes some 2 ms
ROUND_SECONDS = 0.012  # measured, a client and epoch, on two cores
SLOW = 10  # ours: times the usual length of a round; beside two busy programs a run of two threads took 100 times it
SLOW_AFTER = 5  # ours: rounds of which the terminal tells that they are slow


class Log:
    """Writes a run's folder as it goes, shows the progress bar, and keeps the rows for the `Result`.

    Of the run it is given its Config, its Dataset and its Clients (`members`). `out` is the folder (None: nothing is
    written), `resume` says that a run lies there which goes on, `bar` is the progress bar's name (None: no bar).
    """

    def __init__(self, config, dataset, members, out: str | Path | None, resume: bool, bar: str | None):
        self.config, self.dataset, self.members, self.resume, self.bar_name = config, dataset, members, resume, bar
        self.out = None if out is None else Path(out)
        self.rounds = Table("rounds.csv", ROUND_COLUMNS, self.out, config.rounds)
        self.clients = Table("clients.csv", CLIENT_COLUMNS, self.out, config.rounds, rows=config.clients)
        self.membership = self.plane = None
        if config.membership:
            from bench.membership import MembershipInference

            self.inference = MembershipInference(members)
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

    def begin(self, w: np.ndarray, scores: State) -> tuple[np.ndarray, State]:
        """The global weights w [P] and the State that the run starts from, these, or goes on from."""
        from tqdm import tqdm

        if self.resume:
            w, scores = self._reopen(w, scores)
        else:
            self._create()
        self.begun, self.lap = scores.round, time.perf_counter()
        self.last = w, scores, self.last_marks()
        self.save()
        self.bar = tqdm(
            total=self.config.rounds,
            initial=scores.round,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
            desc=self.bar_name,
            disable=None if self.bar_name else True,  # None: no bar where the output is not a terminal
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
        kinds = {"w": w, "marks": self.last_marks(), "seconds": np.zeros(0), "kept_rounds": np.zeros(0, int)}
        kinds |= {name: np.asarray(value) for name, value in vars(scores).items()}
        found = read_checkpoint(self.out / CHECKPOINT, kinds)
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
        return identity(asdict(self.config)) | {"data's MD5": self.dataset.md5}

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
            self.membership.append([[t, *map(rounded, self.inference(received, t).values())]])
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
        if self.bar_name and t == self.begun + SLOW_AFTER:
            self._tell_if_slow()

    def _tell_if_slow(self) -> None:
        """Say what helps where threads seem to wait for each other: each has another busy program's turn to sit out."""
        a_round = float(np.median(self.seconds[-SLOW_AFTER:]))
        if a_round > SLOW * usual_seconds(self.config) and self.members.threads > 1:
            hint = "if other programs are busy, stop (Ctrl-C) and go on with --threads 1"
            self.bar.write(f"A round takes {a_round:.1f} s, which is slow: {hint}", file=sys.stderr)

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
        if self.bar and isinstance(error, ValueError):  # a rule has too few clients left
            raise ValueError(f"round {self.last[1].round + 1}: {error}") from None
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
            "training_images": [int(size) for size in self.members.sizes],
            "dataset": self.dataset.name,
            "note": self.dataset.note,
            "complete": complete,
        }
        self.summary = without_nan(summary)
        if self.out:
            write_json(self.out / "summary.json", self.summary)

    def result(self) -> dict:
        """What `madsim.Result` holds besides the Config."""
        rounds, clients, membership = self.frames()
        about = {"summary": self.summary, "weights": self.last[0]}
        return about | {"rounds": rounds, "clients": clients, "membership": membership}


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
            self.values[row] = [float(value or "nan") for value in line.rstrip("\n").split(",")]
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


def plane(W: Array, spread: float, settings: Settings, before: Array | None = None) -> Array:
    """The rows of W [n, P] as points [n, 2] to look at: in the plane of their two principal components, where they lie
    farthest apart, with the main cluster's centre at (0, 0). Lengths are in units of the weights.

    `before` [n, 2] (NaN: unknown) are the points of the round before, towards which these are turned, so that what
    stays in its place is seen to (Schoenemann 1966).
    """
    from scipy.linalg import orthogonal_procrustes

    squared = squared_distances(W)
    main = main_cluster(W, squared, spread, settings)[1]
    centring = np.eye(len(W)) - 1 / len(W)
    lengths, axes = np.linalg.eigh(-centring @ squared @ centring / 2)  # classical scaling (Torgerson 1952)
    points = np.zeros((len(W), 2))
    points[:, : len(W)] = (axes * np.sqrt(np.maximum(lengths, 0)))[:, :-3:-1]
    points -= points[main].mean(0)
    known = np.zeros(len(W), bool) if before is None else np.isfinite(before).all(1)
    if known.any():
        points = points @ orthogonal_procrustes(points[known], before[known])[0]
    return points


def usual_seconds(config) -> float:
    """About how long a round takes on two cores with nothing else to do."""
    return config.clients * config.epochs * ROUND_SECONDS


# ---------------------------------------------------------------- config.json and summary.json


def origin(members) -> dict:
    """Where a run, or a part of it, comes from: the command line, the code, versions, the machine."""
    from importlib.metadata import version

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    status = git("status", "--porcelain", "--untracked-files=no")
    packages = ("numpy", "scipy", "torch", "scikit-learn", "pandas")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)},
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in packages},
        "machine": {"device": str(members.device), "threads": members.threads},
    }


def about_data(dataset) -> dict:
    return {key: getattr(dataset, key) for key in ("name", "md5", "note")}


def samples(dataset) -> dict[str, np.ndarray]:
    """Two normal and two pneumonia training images (Fig. 2)."""
    chosen = np.concatenate([np.flatnonzero(dataset.train_labels == label)[:2] for label in (0, 1)])
    return {"images": dataset.train_images[chosen], "labels": dataset.train_labels[chosen]}


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
