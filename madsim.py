"""madsim: federated learning under label flipping, and the Model Anomaly Detection (MAD) that stops it.

`python madsim.py --rounds 1000 --mad-start 500` runs the system of "Towards More Robust Federated Learning with
Medical Imaging Model Anomaly Detection" (Korobeinikov, Chuprov, Reznik): see `simulate`, which is one federated
learning run, whole.

Shapes: C clients, P parameters, n images, t round.
"""

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from threading import Event, Thread

# Numpy's idle threads wait, rather than spin on the cores that PyTorch computes on: at 100 clients 1.5 times as quick.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import numpy as np

import data
from trust import PRESETS, RULES, Settings, State, aggregate, check_limits, initial_state, mad_step, setting

# ---------------------------------------------------------------- what a run is


@dataclass(frozen=True)
class Config:
    """One run. ValueError for a value outside its limits. The command line is made from these fields."""

    rounds: int = setting(1000, "aggregation rounds", "paper: 100 to 1000", low=1)
    mad_start: int | None = setting(
        None,
        "round from which MAD excludes, or never; several make several runs",
        "default: never; paper: 5 to 500",
        low=1,
    )
    clients: int = setting(10, "participating clients", "paper", low=1)
    malicious: float = setting(0.2, "fraction of the clients that are malicious, below half", "paper")
    attack: str = setting("label_flip", "what malicious clients do", "paper")
    flip: float = setting(1.0, "share of its labels that a malicious client flips", "paper", low=0, high=1)
    rule: str = setting("mean", "how active clients' models are aggregated", "paper", choices=RULES)
    epochs: int = setting(1, "local epochs a round", "testbed", low=1)
    batch_size: int = setting(20, "images a local step", "testbed", low=1)
    lr: float = setting(1e-3, "learning rate of Adam", "testbed", low=0)
    method: str = setting("stacked", "train all clients at once, or in a loop", "ours", choices=("stacked", "loop"))
    dataset: str = setting("auto", "auto: phantom if PneumoniaMNIST can't be had", "ours", choices=data.DATASETS)
    data_root: str | None = setting(None, f"folder of {data.FILE} (default: MADSIM_DATA, else medmnist's)", "ours")
    seed: int = setting(0, "determines everything random", "ours", low=0)
    device: str = setting("auto", "auto: cuda if there is one", "ours", choices=("auto", "cpu", "cuda"))
    threads: int | None = setting(
        None, "processor threads of a run (default: all, shared out where several run)", "ours", low=1
    )
    settings: Settings = field(default=PRESETS["paper"], metadata={"help": "MAD's settings"})

    def __post_init__(self):
        check_limits(self)
        data.malicious_count(self.clients, self.malicious)
        if self.mad_start is not None and self.mad_start > self.rounds:
            raise ValueError(f"mad_start {self.mad_start} lies beyond the {self.rounds} rounds; use 1 to {self.rounds}")
        if self.attack not in data.ATTACKS:
            from model import ATTACKS

            if self.attack not in ATTACKS:
                raise ValueError(f"attack {self.attack!r} is unknown; known: {', '.join([*data.ATTACKS, *ATTACKS])}")


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
    config: Config, out: str | Path | None = None, *, dataset: data.Dataset | None = None, bar: bool = False
) -> Result:
    """One federated learning run. Ctrl-C ends it early, with `summary["complete"]` false.

    `out` is a new folder that the results are written to as the run goes (None: nothing is written), `dataset`
    saves loading it, `bar` shows a progress bar. Raises ValueError for input that
    can't be run, OSError for data or a folder that can't be had, FloatingPointError where all clients diverge.
    """
    from model import initial_weights

    world = World(config, dataset or data.load(config.dataset, config.data_root))
    w, scores = initial_weights(config.seed).to(world.device), initial_state(config.clients)
    with Log(config, world, out, bar) as log:
        for t in range(scores.round + 1, config.rounds + 1):
            asked = scores.active | (config.settings.excluded == "observed")
            W, train_loss = world.train(w, asked, t)  # [C, P]   local training, all clients at once
            W = world.attack(W, w, asked, t)  # [C, P]   what malicious clients submit instead
            scores = mad_step(W, scores, t, config.mad_start, config.settings)  # eqs. (1)-(7) and exclusion
            w = world.send(aggregate(W, world.sizes, scores.active, config.rule, world.malicious.sum()))  # [P]
            log(t, train_loss, world.evaluate(w), scores)
    return log.result(w)


class World:
    """The clients and their data on the device: what a round loop asks of the outside, in the run's settings."""

    def __init__(self, config: Config, dataset: data.Dataset):
        import torch

        self.config, self.dataset = config, dataset
        self.device = pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.threads = torch.get_num_threads()
        self.shares, labels = data.share_out(
            dataset.train_labels, config.clients, config.malicious, config.seed, config.attack, config.flip
        )
        self.malicious = np.array([share.malicious for share in self.shares])  # [C]
        self.sizes = np.array([len(share.train) for share in self.shares])  # [C]
        self.images, self.labels = self.tensors(dataset.train_images, labels)
        self._lay_out_evaluation()

    def tensors(self, images: data.Images, labels: data.Labels):
        """Images [n, 1, 28, 28] scaled to [-1, 1] (testbed) and labels [n], on the device."""
        import torch

        scaled = torch.tensor(images, device=self.device).float().div(127.5).sub(1)[:, None]
        return scaled, torch.tensor(labels, device=self.device)

    def _lay_out_evaluation(self) -> None:
        """What every round evaluates in one pass: the test images, then the clients' own validation images."""
        import torch

        from model import lay_out

        test_images, self.test_labels = self.tensors(self.dataset.test_images, self.dataset.test_labels)
        own = np.concatenate([share.validation for share in self.shares])
        self.own_labels = self.labels[own]
        self.owner = np.repeat(np.arange(self.config.clients), [len(share.validation) for share in self.shares])
        self.evaluated = lay_out(torch.cat([test_images, self.images[own]]))

    def send(self, w: np.ndarray):
        """Global weights w [P] from the server to the clients' device."""
        import torch

        return torch.from_numpy(w).to(self.device)

    def train(self, w, asked: np.ndarray, t: int):
        """Round t's local training of the clients `asked` [C]: (their models [n, P], mean training loss [C])."""
        from model import train_clients

        who = np.flatnonzero(asked)
        rngs = [np.random.default_rng([self.config.seed, t, client, 1]) for client in who]
        c = self.config
        W, loss = train_clients(
            w, self.images, self.labels, [self.shares[client].train for client in who], rngs,
            epochs=c.epochs, batch_size=c.batch_size, lr=c.lr, method=c.method,
        )  # fmt: skip
        losses = np.full(len(asked), np.nan)
        losses[who] = loss.cpu().numpy()
        return W, losses

    def attack(self, W, w, asked: np.ndarray, t: int) -> np.ndarray:
        """The submissions [C, P] as the server gets them; NaN rows of clients that were not asked."""
        from model import ATTACKS

        bad = self.malicious[asked]
        if self.config.attack in ATTACKS and bad.any():
            rng = np.random.default_rng([self.config.seed, t, 2])
            W[bad] = ATTACKS[self.config.attack](W[bad], w, rng)
        submitted = np.full((len(asked), W.shape[1]), np.nan, np.float32)
        submitted[asked] = W.cpu().numpy()
        return submitted

    def evaluate(self, w) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Loss and accuracy [C] on the clients' own validation data, and the metrics on the test set."""
        from model import metrics, metrics_by_client, predict

        logits, n = predict(w, self.evaluated), len(self.test_labels)
        test, own = logits[:n], logits[n : n + len(self.own_labels)]
        return *metrics_by_client(own, self.own_labels, self.owner), metrics(test, self.test_labels)


def pick_device(name: str):
    """The torch device of `--device`; ValueError for cuda where there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this machine has 0 usable CUDA devices; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- what a run leaves behind

ROUND_COLUMNS = ["round", "loss", "accuracy", "honest_loss", "honest_accuracy"]
ROUND_COLUMNS += ["test_loss", "test_accuracy", "test_sensitivity", "test_specificity", "test_auc", "active"]
CLIENT_COLUMNS = ["round", "client", "malicious", "active", "distance", "d", "reputation", "trust"]
CLIENT_COLUMNS += ["train_loss", "loss", "accuracy"]
DIGITS = 6  # significant digits of every number written: more than float32 holds after an average


class Log:
    """Writes a run's folder as it goes, shows the progress bar, and keeps the rows for the `Result`."""

    def __init__(self, config: Config, world: World, out: str | Path | None, bar: bool):
        self.config, self.world, self.out = config, world, out and Path(out)
        self.rounds, self.seconds, self.kept = [], [], []
        # Room for every row at once: kept one by one they would break up the heap, and memory would grow.
        self.clients = np.empty((config.rounds, config.clients, len(CLIENT_COLUMNS)))
        self.bar_wanted, self.summary = bar, {"complete": False}

    def __enter__(self):
        from tqdm import tqdm

        self.files = []
        if self.out:
            self.out.mkdir(parents=True)
            write_json(self.out / "config.json", describe(self.config, self.world))
            np.savez(self.out / "samples.npz", **samples(self.world.dataset))
            self.files = [open(self.out / name, "w", newline="") for name in ("rounds.csv", "clients.csv")]
        self.writers = [csv.writer(file, lineterminator="\n") for file in self.files]
        self._write([ROUND_COLUMNS], [CLIENT_COLUMNS])
        self.bar = tqdm(
            total=self.config.rounds,
            unit="round",
            desc=run_name(self.config),
            disable=None if self.bar_wanted else True,  # None: no bar where the output is not a terminal
            dynamic_ncols=True,
        )
        self.started = self.lap = time.perf_counter()
        return self

    def __call__(self, t: int, train_loss: np.ndarray, metrics: tuple, scores: State) -> None:
        """Record round t: one row of rounds.csv, one row a client of clients.csv."""
        loss, accuracy, test = metrics
        who, honest = scores.active, ~self.world.malicious
        means = (v[m].mean() for m in (who, honest) for v in (loss, accuracy))
        self.rounds.append([t, *map(rounded, means), *map(rounded, test.values()), int(who.sum())])
        columns = (scores.distance, scores.d, scores.reputation, scores.trust, train_loss, loss, accuracy)
        rows = [
            [t, client, int(self.world.malicious[client]), int(who[client]), *map(rounded, values)]
            for client, values in enumerate(zip(*columns))
        ]
        self.clients[len(self.rounds) - 1] = rows
        if scores.kept:
            self.kept.append(t)
        self._write(self.rounds[-1:], rows)
        now = time.perf_counter()
        self.seconds.append(now - self.lap)
        self.lap = now
        self.bar.set_postfix_str(f"accuracy {self.rounds[-1][2]:.3f}, active {who.sum()}", refresh=False)
        self.bar.update()

    def _write(self, *tables: list[list]) -> None:
        """Append rows to rounds.csv and clients.csv; NaN becomes an empty field."""
        for writer, file, rows in zip(self.writers, self.files, tables):
            writer.writerows([["" if value != value else value for value in row] for row in rows])
            file.flush()

    def __exit__(self, kind, error, traceback) -> bool:
        self.bar.close()
        for file in self.files:
            file.close()
        if self.rounds:
            self.summary = without_nan(self._summary(complete=kind is None))
        if self.out and self.rounds:
            write_json(self.out / "summary.json", self.summary)
        return kind is KeyboardInterrupt

    def frames(self):
        """The rows so far as two pandas frames."""
        from pandas import DataFrame

        rows = self.clients[: len(self.rounds)].reshape(-1, len(CLIENT_COLUMNS))
        clients = DataFrame(rows, columns=CLIENT_COLUMNS).astype(dict.fromkeys(CLIENT_COLUMNS[:4], int))
        return DataFrame(self.rounds, columns=ROUND_COLUMNS), clients

    def _summary(self, complete: bool) -> dict:
        return summarise(*self.frames(), self.config.mad_start) | {
            "kept_rounds": self.kept,
            "seconds": round(time.perf_counter() - self.started, 3),
            "seconds_per_round": round(float(np.median(self.seconds)), 4),
            "dataset": self.world.dataset.name,
            "note": self.world.dataset.note,
            "complete": complete,
        }

    def result(self, w) -> Result:
        return Result(self.config, *self.frames(), self.summary, w.cpu().numpy())


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


def describe(config: Config, world: World) -> dict:
    """config.json: every field, the command line, the code, versions, the machine, the data set."""
    from importlib.metadata import version

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    status = git("status", "--porcelain")
    packages = ("numpy", "scipy", "torch", "scikit-learn", "pandas")
    return asdict(config) | {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)},
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in packages},
        "machine": {"device": str(world.device), "threads": world.threads},
        "data": {key: getattr(world.dataset, key) for key in ("name", "md5", "note")},
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


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


def simulate_all(runs: list[tuple[Config, Path]], dataset: data.Dataset, jobs: int) -> list[Result]:
    """The runs, given with their folders: one with all threads, several as processes that share the cores."""
    if len(runs) == 1:
        return [simulate(*runs[0], dataset=dataset, bar=True)]
    from joblib import Parallel, delayed

    jobs = min(jobs, len(runs))
    threads = max(1, os.cpu_count() // jobs)
    with rounds_bar(runs):
        return Parallel(n_jobs=jobs)(
            delayed(simulate)(replace(config, threads=config.threads or threads), folder, dataset=dataset)
            for config, folder in runs
        )


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
    with tqdm(total=total, unit="round", desc=f"{len(runs)} runs", disable=None, dynamic_ncols=True) as bar:
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
    parser.error = lambda message: parser.exit(2, f"madsim: {message}\n")
    add_options(parser.add_argument_group("a run"), Config)
    several = parser.add_argument_group("several runs, and where they go")
    several.add_argument("--seeds", type=int, metavar="N", help="run N seeds, from --seed on")
    several.add_argument("--experiment", choices=[*EXPERIMENTS, "paper"], help="a figure of the paper, or all of them")
    several.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes [default: one a core]"
    )
    several.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="[default: results]")
    several.add_argument("--overwrite", action="store_true", default=False, help="replace run folders that exist")
    mad = parser.add_argument_group("MAD")
    mad.add_argument(
        "--preset", choices=PRESETS, default="paper", help="where MAD's defaults come from [default: paper]"
    )
    add_options(mad, Settings)
    return parser


def add_options(group, of: type) -> None:
    """One option for each field of the dataclass, with its choices, help, default and source."""
    for f in fields(of):
        if f.name == "settings":
            continue
        about = f.metadata
        name = {"alpha": "alpha_reputation"}.get(f.name, f.name)  # there is an alpha in more than one place
        kind = {"mad_start": start_round, "threads": int, "data_root": str}.get(f.name, type(f.default))
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


def plan(args: argparse.Namespace) -> list[tuple[Config, Path]]:
    """The runs that the command line asks for, each with its folder."""
    given = vars(args)
    for name in ("seeds", "jobs"):
        if given.get(name, 1) < 1:
            raise ValueError(f"{name} {given[name]} must be at least 1")
    settings = replace(PRESETS[args.preset], **{f.name: given[f.name] for f in fields(Settings) if f.name in given})
    own = {f.name: given[f.name] for f in fields(Config) if f.name in given and f.name != "mad_start"}
    base = Config(**own, settings=settings)
    seeds = range(base.seed, base.seed + given.get("seeds", 1))
    if "experiment" in given:
        if "mad_start" in given:
            raise ValueError(f"experiment {args.experiment} sets its own MAD starts; leave out --mad-start")
        names = EXPERIMENTS if args.experiment == "paper" else [args.experiment]
        groups = {args.out / name: experiment(name, base, given.get("rounds")) for name in names}
    else:
        groups = {args.out: [replace(base, mad_start=start) for start in dict.fromkeys(given.get("mad_start", [None]))]}
    configs = [(replace(c, seed=seed), folder) for folder, cs in groups.items() for seed in seeds for c in cs]
    return [(config, folder / run_name(config)) for config, folder in configs]


def refuse_folders(folders: list[Path], overwrite: bool) -> None:
    """ValueError if a run's folder exists, unless it may be replaced and is indeed a run's."""
    for folder in folders:
        if folder.exists() and not overwrite:
            raise ValueError(f"{folder} exists; use --overwrite to replace it, or another --out")
        if folder.exists() and not (folder / "config.json").is_file():
            raise ValueError(f"{folder} exists and is not a run's folder; it is not replaced")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        runs = plan(args)
        folders = [folder for _, folder in runs]
        refuse_folders(folders, args.overwrite)
        dataset = data.load(runs[0][0].dataset, runs[0][0].data_root)
        World(runs[0][0], dataset)  # what can't be run is refused before an earlier run's folder is touched
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        introduce(runs, dataset)
        results = simulate_all(runs, dataset, args.jobs)
    except (ValueError, OSError, FloatingPointError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:  # a single run ends in order by itself; here others were cut short
        print(f"\nmadsim: stopped; what was written is kept in {args.out}", file=sys.stderr)
        return 130
    for result, (_, folder) in zip(results, runs):
        report(result, folder)
    where = runs[0][1] if len(runs) == 1 else args.out
    print(f"Figures      python plot.py {where}")
    return 0 if all(result.summary["complete"] for result in results) else 130


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
        return print("Stopped before the first round ended.")
    if not s["complete"]:
        print(f"Stopped      after round {len(rounds)} of {result.config.rounds}; what was written is kept")
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


if __name__ == "__main__":
    sys.exit(main())
