"""What a run leaves behind: its tables, written row by row, its checkpoint, and its summary.

Shapes: C clients, P parameters, t round.
"""

import json
import os
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import numpy as np

from harness import plugins
from harness.console import progress
from harness.folder import (
    CHECKPOINT,
    VERSION,
    code,
    identity,
    lock,
    naming,
    plain,
    read_checkpoint,
    read_json,
    refuse_changes,
    refuse_version,
    replace_arrays,
    rounded,
    uninterrupted,
    write_json,
)
from harness.runs import seen_in_words, steady
from trust import PRESETS, Array, Settings, State, main_cluster, squared_distances

ROUND_COLUMNS = ["round", "loss", "accuracy", "honest_loss", "honest_accuracy"]
ROUND_COLUMNS += ["test_loss", "test_accuracy", "test_sensitivity", "test_specificity", "test_auc", "active"]
ROUND_COLUMNS += ["honest_image_accuracy"]
CLIENT_COLUMNS = ["round", "client", "malicious", "active", "distance", "d", "reputation", "trust"]
CLIENT_COLUMNS += ["train_loss", "loss", "accuracy"]
MEMBERSHIP_COLUMNS = ["round", "test_advantage", "test_error", "test_chance"]
MEMBERSHIP_COLUMNS += ["validation_advantage", "validation_error", "validation_chance"]
LEAKAGE_COLUMNS = ["round", "steps", "images", "label", "rank", "identified", "psnr", "ssim"]
LEAKAGE_COLUMNS += ["mean_psnr", "mean_ssim", "nearest_psnr", "nearest_ssim"]
PLANE_COLUMNS = ["round", "client", "x", "y"]
INTEGERS = {"round", "client", "malicious", "active", "steps", "images"}
SHOWN_CLIENTS = 50  # ours: plane.csv is written for this many clients at most; with 100 it would take 6 % of a round
CHECKPOINT_SECONDS = 1.0  # ours: a kill loses this much and one round; a checkpoint takes about 2 ms
ROUND_SECONDS = 0.012  # measured on two cores, per client and local epoch
INVERSION_SECONDS = 4.0  # measured on two cores, per kind of `inverted`
BAR = 26  # characters of a progress bar, besides the numbers of rounds and the news


class Log:
    """Writes a run's folder while the run goes on, shows the progress bar, and keeps the rows for the `Result`.

    `members` are the run's Clients. The other arguments are those of `madsim.simulate`.
    """

    last: tuple[np.ndarray, State, np.ndarray]  # the last recorded global weights [P], State, and marks of the tables

    def __init__(self, config: Any, dataset: Any, members: Any, out: str | Path | None, resume: bool, show: bool):
        self.config, self.dataset, self.members, self.resume, self.show = config, dataset, members, resume, show
        self.out = None if out is None else Path(out)
        self.rounds = Table("rounds.csv", ROUND_COLUMNS, self.out, config.rounds)
        self.clients = Table("clients.csv", CLIENT_COLUMNS, self.out, config.rounds, rows=config.clients)
        self.membership = self.leakage = self.plane = None
        if every := config.membership:
            from lab.privacy import MembershipInference

            self.inference = MembershipInference(members)
            self.membership = Table("membership.csv", MEMBERSHIP_COLUMNS, self.out, config.rounds, every=every)
        if every := config.leakage:
            from lab.privacy import GradientInversion

            self.inversion = GradientInversion(members, config.inverted)
            kinds = len(self.inversion.kinds)
            self.leakage = Table("leakage.csv", LEAKAGE_COLUMNS, self.out, config.rounds, kinds, every)
        if config.clients <= SHOWN_CLIENTS:
            self.plane = Table("plane.csv", PLANE_COLUMNS, self.out, config.rounds, rows=config.clients)
        tables = self.rounds, self.clients, self.membership, self.leakage, self.plane
        self.tables = [table for table in tables if table]
        self.seconds: list[float] = []
        self.kept: list[int] = []
        self.begun = False
        self.data = {"name": dataset.name, "md5": dataset.md5, "note": dataset.note}
        self.identity = identity(asdict(config)) | {
            "data's MD5": dataset.md5,
            "plugins": plugins.described(),
            "version": VERSION,
        }

    def __enter__(self):
        return self

    def begin(self, w: np.ndarray, scores: State) -> tuple[np.ndarray, State]:
        """The global weights w [P] and the State from which the run starts: the given ones, or the checkpoint's."""
        if self.resume:
            w, scores = self._reopen(w, scores)
        else:
            self._create()
        shape = "{n}/{total} |{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = progress(self.show, total=self.config.rounds, initial=scores.round, bar_format=shape)
        self.lap = time.perf_counter()
        self.last = w, scores, self.last_marks()
        self.begun = True
        self.save()
        return w, scores

    def _create(self) -> None:
        """Create the folder of a new run."""
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            if any(self.out.iterdir()):
                raise FileExistsError(f"{self.out} exists and is not empty")
        for table in self.tables:  # first, as they lock the folder
            table.create()
        if self.out:
            write_json(
                self.out / "config.json",
                asdict(self.config)
                | {"preset": next((name for name, of in PRESETS.items() if of == self.config.settings), None)}
                | origin(self.members)
                | {"data": self.data, "version": VERSION},
            )
            four, of = samples(self.dataset.train_labels), self.dataset
            arrays = {"images": of.train_images[four], "labels": of.train_labels[four]}
            replace_arrays(self.out / "samples.npz", arrays)

    def _reopen(self, w: np.ndarray, scores: State) -> tuple[np.ndarray, State]:
        """Put the folder back to its checkpoint; returns the checkpoint's weights and scores.

        Its arrays must have the types and shapes of the `w` and `scores` of a new run. Raises ValueError for another
        run's folder and for changed files.
        """
        if not self.out:
            raise ValueError("resume needs the folder of a run")
        kinds = {"w": w, "marks": self.last_marks(), "seconds": np.zeros(0), "kept_rounds": np.zeros(0, int)}
        kinds |= {name: np.asarray(value) for name, value in vars(scores).items()}
        found = read_checkpoint(self.out / CHECKPOINT, kinds)
        if found["marks"].shape != kinds["marks"].shape:
            raise ValueError(f"{self.out} was written by another version, with other tables; it can't continue here")
        run = json.loads(str(found["run"]))
        refuse_version(self.out, run)
        usual = identity(asdict(type(self.config)()))  # of settings that the run's version did not have
        refuse_changes(self.out, usual | run, self.identity, longer=True)
        for table, (size, crc) in zip(self.tables, found["marks"].tolist()):
            table.reopen(size, crc)
            if table.filled != table.due(int(found["round"])):
                raise ValueError(f"{table.path} holds {table.filled} rows at round {found['round']} of the checkpoint")
        about = read_json(self.out / "config.json")
        resumed = about.get("resumed", [])
        if not isinstance(resumed, list):
            raise ValueError(f"{self.out / 'config.json'} is damaged: resumed is not a list")
        for table in self.tables:
            table.cut()
        self.seconds, self.kept = found["seconds"].tolist(), found["kept_rounds"].tolist()
        state: dict[str, Any] = {n: found[n] if found[n].ndim else found[n].item() for n in vars(scores)}
        if state["round"] < self.config.rounds:
            (self.out / "summary.json").unlink(missing_ok=True)  # if the run becomes longer, it is no longer complete
            resumed = [*resumed, {"after_round": state["round"]} | origin(self.members)]
            write_json(self.out / "config.json", about | {"rounds": self.config.rounds, "resumed": resumed})
        return found["w"], State(**state)

    def __call__(self, t: int, *results: Any) -> None:
        """Measure what the run measures in round t, which can take a minute, and `record` the round."""
        if self.leakage and t % self.leakage.every == 0:
            # From the model that the clients received
            self.reconstructed = self.inversion(self.last[0], t, self._tell_inversion)
        self.record(t, *results)

    def _tell_inversion(self, steps: int, images: int) -> None:
        self._tell([f"gradient inversion: {seen_in_words(steps, images)}"], refresh=True)

    def _tell(self, news: list[str], refresh: bool = False) -> None:
        """Put the news behind the progress bar, as many of them as there is room for: tqdm would cut off digits."""
        room = get_terminal_size().columns - 2 * len(str(self.config.rounds)) - BAR
        while news and len(", ".join(news)) > room:
            news.pop()
        self.bar.set_postfix_str(", ".join(news), refresh=refresh)

    @uninterrupted()
    def record(self, t: int, W: np.ndarray, train_loss: np.ndarray, metrics: tuple, w: np.ndarray, scores: State):
        """Record round t: its row of rounds.csv, its rows of clients.csv, and from time to time a checkpoint.

        An interruption comes before or after that. So a folder has all rows of a round, or none.
        """
        loss, accuracy, test = metrics
        who, honest = scores.active, ~self.members.malicious
        means = [rounded(v[m].mean()) for m in (who, honest) for v in (loss, accuracy)]  # the curves of Fig. 3
        by_image = rounded(np.average(accuracy[honest], weights=self.members.validation_sizes[honest]))
        columns = (scores.distance, scores.d, scores.reputation, scores.trust, train_loss, loss, accuracy)
        rows = [
            [t, client, int(self.members.malicious[client]), int(who[client]), *map(rounded, values)]
            for client, values in enumerate(zip(*columns))
        ]
        self.rounds.append([[t, *means, *map(rounded, test.values()), int(who.sum()), by_image]])
        self.clients.append(rows)
        if self.membership and t % self.membership.every == 0:
            received = self.last[0]  # the model that the clients received in this round
            self.membership.append([[t, *map(rounded, self.inference(received, t).values())]])
        if self.leakage and t % self.leakage.every == 0:
            rows = [list(row.values()) for row, *_ in self.reconstructed]
            self.leakage.append([[t, *row[:2], *map(rounded, row[2:])] for row in rows])
            self._keep_images()
        if self.plane:
            self.plane.append(self._points(t, W, scores, self.plane.values[: self.plane.filled][-len(W) :, 2:]))
        self.kept += [t] * scores.kept
        now = time.perf_counter()
        self.seconds.append(now - self.lap)
        self.lap = now
        self.last = w, scores, self.last_marks()
        if now - self.saved >= CHECKPOINT_SECONDS:
            self.save()
        news = [f"test {test['accuracy']:.3f}", f"honest {means[3]:.3f}"]
        news += [f"active {who.sum()}", f"attackers {(who & ~honest).sum()}"]
        self._tell(news)
        self.bar.update()

    def _keep_images(self) -> None:
        """Write the true and the reconstructed images of the last measurement to leakage.npz."""
        if self.out:
            arrays = {}
            for row, *pictures in self.reconstructed:
                for name, images in zip(("true", "found"), pictures):
                    arrays[f"{name}_{row['steps']}_{row['images']}"] = ((images + 1) * 127.5).round().astype(np.uint8)
            replace_arrays(self.out / "leakage.npz", arrays)

    def _points(self, t: int, W: np.ndarray, scores: State, before: np.ndarray) -> list[list]:
        """The rows of plane.csv: the submissions W [C, P] as points of the `plane`. `before` are the last points."""
        scored, points = np.isfinite(scores.distance), np.full((len(W), 2), np.nan)
        before = before if t > 1 else points
        of_positions = self.config.settings.measured == "positions"  # with directions, the spread is that of one step
        spread = self.last[1].spread if of_positions else 0.0
        points[scored] = plane(W[scored], spread, self.config.settings, before[scored])
        return [[t, client, rounded(x), rounded(y)] for client, (x, y) in enumerate(points)]

    def last_marks(self) -> np.ndarray:
        """The marks of all tables, int [tables, 2]; see `Table`."""
        return np.array([table.mark for table in self.tables])

    def save(self) -> None:
        """Write the checkpoint of the last recorded round, after its rows are safe on the disk."""
        w, scores, marks = self.last
        t = scores.round
        if self.out:
            for table in self.tables:
                os.fsync(table.file.fileno())
            arrays: dict[str, Any] = {"w": w, "marks": marks, "seconds": np.array(self.seconds[:t], float)}
            arrays |= {
                "run": json.dumps(plain(self.identity)),
                "kept_rounds": np.array([r for r in self.kept if r <= t], int),
            }
            replace_arrays(self.out / CHECKPOINT, arrays | vars(scores))
        self.saved = time.perf_counter()

    @uninterrupted()
    def __exit__(self, kind, error, traceback) -> bool:
        try:
            if self.begun:
                self.bar.close()
            if self.begun and not isinstance(error, OSError):  # do not try again to write what could not be written
                self.save()
                self._summarise(complete=self.last[1].round == self.config.rounds)
        finally:
            for table in self.tables:  # an open one would lock the folder
                table.close()
        if self.begun and isinstance(error, ValueError):  # a rule has too few clients left
            raise ValueError(f"round {self.last[1].round + 1}: {error}") from None
        self.interrupted = self.begun and kind is KeyboardInterrupt
        return self.interrupted

    def frames(self) -> list:
        """The rows so far as pandas frames: rounds, clients, membership and leakage (None if not measured)."""
        tables = (self.rounds, self.clients, self.membership, self.leakage)
        return [table and table.frame(self.last[1].round) for table in tables]

    def _summarise(self, complete: bool) -> None:
        """Make the summary, and write it if there is a round."""
        t = self.last[1].round
        self.summary = plain(
            summarise(*self.frames()[:3], mad_start=self.config.mad_start)
            | {
                "malicious": np.flatnonzero(self.members.malicious),  # also before the first round
                "kept_rounds": [r for r in self.kept if r <= t],
                "seconds": round(sum(self.seconds[:t]), 3),
                "seconds_per_round": round(float(np.median(self.seconds[:t] or np.nan)), 4),
                "training_images": [int(size) for size in self.members.sizes],
                "dataset": self.data["name"],
                "note": self.data["note"],
                "complete": complete,
            }
        )
        if self.out and t:
            write_json(self.out / "summary.json", self.summary)

    def result(self) -> dict[str, Any]:
        """The fields of `madsim.Result` besides the Config."""
        frames = dict(zip(("rounds", "clients", "membership", "leakage"), self.frames()))
        for frame in frames.values():
            if frame is not None:
                frame.attrs["data"] = self.data
        return {"summary": self.summary, "weights": self.last[0], "data": self.data} | frames


class Table:
    """Rows of numbers in memory and, with a `folder`, in a CSV file. NaN is an empty field.

    `rows` rows are due every `every` rounds. A checkpoint keeps the `mark`: the size and the CRC-32 of the file.
    """

    def __init__(self, name: str, columns: list[str], folder: Path | None, rounds: int, rows: int = 1, every: int = 1):
        self.columns, self.rows, self.every = columns, rows, every
        self.path: Any = folder and folder / name
        self.file: Any = None
        self.mark = (0, 0)
        # Room for all rows at once: rows that are kept one by one fragment the heap, and memory would grow.
        self.values, self.filled = np.empty((self.due(rounds), len(columns))), 0

    def due(self, t: int) -> int:
        """The number of rows after round t."""
        return t // self.every * self.rows

    def create(self) -> None:
        """Begin the file, with the names of the columns."""
        if self.path:
            self.file = open(self.path, "xb")
            lock(self.file, self.path.parent)
            self._write([self.columns])

    def reopen(self, size: int, crc: int) -> None:
        """Read the file up to the mark (size, crc). Raises ValueError if that part of the file was changed."""
        self.file = open(self.path, "r+b")
        lock(self.file, self.path.parent)
        content = self.file.read(size)
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError(f"{self.path} was changed or cut short since the checkpoint; the run can't continue")
        head, *lines = content.decode().split("\n")[:-1] or [""]
        if not content.endswith(b"\n") or head != ",".join(self.columns) or len(lines) > len(self.values):
            raise ValueError(f"{self.path} has other columns or more rows than its run")
        for row, line in enumerate(lines):
            self.values[row] = [float(value or "nan") for value in line.split(",")]
        self.mark, self.filled = (size, crc), len(lines)

    def cut(self) -> None:
        """Drop what follows the mark: rows after the checkpoint, of which the last may be incomplete."""
        self.file.truncate(self.mark[0])
        self.file.seek(self.mark[0])

    def append(self, rows: list[list]) -> None:
        """Add rows in memory and in the file."""
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
            with suppress(OSError):  # a full disk; the error was raised when the row was written
                self.file.close()

    def frame(self, t: int):
        """The rows up to round t as a pandas frame."""
        from pandas import DataFrame

        table = DataFrame(self.values[: self.due(t)], columns=self.columns)
        return table.astype({name: int for name in self.columns if name in INTEGERS})


def samples(labels: np.ndarray) -> np.ndarray:
    """The numbers of the four images of Fig. 2: the first two of each label, or others if a label has fewer."""
    of_each = np.concatenate([np.flatnonzero(labels == label)[:2] for label in (0, 1)])
    others = np.setdiff1d(np.arange(len(labels)), of_each)
    four = np.concatenate([of_each, others])[:4]
    return four[np.argsort(labels[four], kind="stable")]


def plane(W: Array, spread: float, settings: Settings, before: Array) -> Array:
    """The rows of W [n, P] as points [n, 2] in the plane of their two principal components, in units of the weights.

    The centre of the main cluster lies at (0, 0). The points are turned towards those of the round `before` [n, 2]
    (NaN: unknown), so that models that do not move stay in place (Schoenemann 1966).
    """
    from scipy.linalg import orthogonal_procrustes

    squared, _ = squared_distances(W)  # in units of the weights, because a run has float32 weights
    main = main_cluster(W, squared, spread, settings)[1]
    centring = np.eye(len(W)) - 1 / len(W)
    lengths, axes = np.linalg.eigh(-centring @ squared @ centring / 2)  # classical scaling (Torgerson 1952)
    points = np.zeros((len(W), 2))
    points[:, : len(W)] = (axes * np.sqrt(np.maximum(lengths, 0)))[:, :-3:-1]
    points -= points[main].mean(0)
    known = np.isfinite(before).all(1)
    if known.any():
        points = points @ orthogonal_procrustes(points[known], before[known])[0]
    return points


def usual_seconds(config: Any) -> float:
    """The usual length of a round in seconds, on two cores that do nothing else."""
    inversion = INVERSION_SECONDS * len(config.inverted.split(",")) / config.leakage if config.leakage else 0
    return config.clients * config.epochs * ROUND_SECONDS + inversion


def origin(members: Any) -> dict[str, Any]:
    """What a run, or a part of it, was made with: command line, code, versions, machine."""
    from importlib.metadata import version

    packages = ("numpy", "scipy", "torch", "scikit-learn", "pandas")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": code(),
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in packages},
        "machine": {"device": str(members.device), "threads": members.threads, "cores": members.cores},
        "plugins": {Path(plugin).name: sha256 for plugin, sha256 in plugins.loaded.items()},
    }


def summarise(rounds: Any, clients: Any, membership: Any = None, *, mad_start: int | None) -> dict[str, Any]:
    """Which clients were excluded in which round, and the effect, from the frames of the CSV files."""
    malicious = [int(c) for c in clients.client[clients.malicious == 1].unique()]
    out = clients[clients.active == 0].drop_duplicates("client")  # the first row of each excluded client without it
    excluded = {int(client): int(t) for client, t in zip(out.client, out["round"])}
    true = len(excluded.keys() & set(malicious))
    detected = max(excluded[c] for c in malicious) if true == len(malicious) > 0 else None
    last_50 = steady(rounds, clients).tail(50)
    return {
        "excluded": excluded,
        "nonfinite": [int(c) for c in out.client[out.distance.isna()]],  # excluded for NaN or infinity
        "malicious": malicious,
        "true_exclusions": true,
        "false_exclusions": len(excluded) - true,
        "precision": true / len(excluded) if excluded else None,
        "recall": true / len(malicious) if malicious else None,
        "rounds_to_detection": max(0, detected - mad_start) if detected and mad_start else None,
        "last_50": {name: rounded(value) for name, value in last_50.drop(columns="round").mean().items()},
        "last_50_rounds": len(last_50),
        "jumps": [jump(clients, t) for t in sorted(set(excluded.values())) if t > 1],
        "membership": None if membership is None else {c: held(membership, clients, c) for c in malicious},
    }


def held(membership: Any, clients: Any, client: int) -> dict | None:
    """The last measurement of a model that the client has received. It received one whenever it was trained."""
    received = clients[(clients.client == client) & clients.train_loss.notna()]["round"].max()
    rows = membership[membership["round"] <= received].to_dict("records")
    return rows[-1] if rows else None


def jump(clients: Any, t: int) -> dict[str, Any]:
    """The change of the participants' mean loss and accuracy at the exclusion in round t, split into two parts.

    `composition`: the last round's model on the clients that stay, minus the same model on all clients of that round.
    `model`: this round's model minus the last round's model, both on the clients that stay.
    """
    before, after = (clients[clients["round"] == r].set_index("client") for r in (t - 1, t))
    were, stay = before.active == 1, after.active == 1
    parts: dict[str, Any] = {"round": t, "clients": [int(c) for c in before.index[were & ~stay]]}
    for name in ("loss", "accuracy"):
        composition = before[name][stay].mean() - before[name][were].mean()
        model = after[name][stay].mean() - before[name][stay].mean()
        changes = {"total": composition + model, "composition": composition, "model": model}
        parts[name] = {part: rounded(change) for part, change in changes.items()}
    return parts
