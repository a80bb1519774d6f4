"""madsim: federated learning under label flipping, and the Model Anomaly Detection (MAD) that stops it.

`python madsim.py --rounds 1000 --mad-start 500` runs the system of "Towards More Robust Federated Learning with
Medical Imaging Model Anomaly Detection" (Korobeinikov, Chuprov, Reznik). `simulate` is a whole run.

Shapes: C clients, P parameters, t round.
"""

import runpy
from pathlib import Path

# First: are our files those that Python finds, and is there all that they need?
runpy.run_path(str(Path(__file__).parent / "harness" / "needs.py"))["check"](__name__)

import os
import re
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

import data
from harness import plugins
from harness.folder import fitting, identity, read_json
from harness.jobs import usable_cores
from harness.log import Log
from lab.attacks import ATTACKS, Attack
from lab.partitions import PARTITIONS
from lab.rules import RULES
from trust import PRESETS, Settings, aggregate, check_clients, check_limits, initial_state, mad_step, setting


def simulate(
    config: "Config",
    out: str | Path | None = None,
    *,
    dataset: data.Dataset | None = None,
    resume: bool = False,
    bar: bool = False,
) -> "Result":
    """One federated learning run. Ctrl-C ends it early: `Interrupted` is raised with its Result, and `out` is saved.

    `out` is a new folder for the results (None: nothing is written). With `resume` it is the folder of an interrupted
    run, which continues from its checkpoint; `Config.read(out)` gives its Config. The run may become longer. If
    `dataset` is given, no data set is loaded. `bar` shows a progress bar. Several threads may call this function. Warns
    if the phantom replaces PneumoniaMNIST. Raises ValueError for invalid input or a folder that can't be resumed,
    OSError for data or folders that can't be read or written, FloatingPointError if all clients diverge, RuntimeError
    if PyTorch refuses to compute in a fork of a process in which it has computed.
    """
    initial_weights = import_model().initial_weights
    if dataset is None:
        if resume and out and (Path(out) / "config.json").is_file():
            dataset = load_again(config, out)
        else:
            dataset = data.load(config.dataset, config.data_root)
        if dataset.note:
            warn_once(f"phantom images, not PneumoniaMNIST: {dataset.note}", 3)
    clients = gather(config, dataset)
    rule, f = RULES[config.rule], clients.malicious.sum()
    sizes = ATTACKS[config.attack].claimed(clients.sizes, clients.malicious, config.strength)  # [C]   as they say
    steps = -(-sizes // config.batch_size)  # [C]   per epoch
    with Log(config, dataset, clients, out, resume, bar) as log:
        w = initial_weights(config.seed, config.initial_weights).numpy()  # [P]
        w, scores = log.begin(w, initial_state(config.clients))
        for t in range(scores.round + 1, config.rounds + 1):
            asked = scores.active | (config.settings.excluded == "observed")
            W, train_loss = clients.train(w, asked, t)  # [C, P]   local training, all clients at once
            W = clients.attack(W, w, asked, t)  # [C, P]   what malicious clients submit instead
            scores = mad_step(W, scores, t, config.mad_start, config.settings, w, steps)  # eqs. (1)-(7), exclusion
            w = aggregate(W, sizes, scores.active, rule, f, w)  # [P]   FedAvg over the active clients
            log(t, W, train_loss, clients.evaluate(w, t), w, scores)
    result = Result(config, **log.result())
    if log.interrupted:
        raise Interrupted(result)
    return result


def load_again(config: "Config", folder: str | Path) -> data.Dataset:
    """The data set with which the run of a folder was begun. PneumoniaMNIST may lie elsewhere now.

    A `data_root` that is not the folder's own is taken. Else PneumoniaMNIST is looked for where MADSIM_DATA says, where
    it was, and in medmnist's folder. Raises ValueError for a data set that is not one of these, otherwise as
    `data.load`.
    """
    about = read_json(Path(folder) / "config.json")
    found, root = about.get("data"), config.data_root
    found = found if isinstance(found, dict) else {}
    if root == about.get("data_root"):
        places = (os.environ.get("MADSIM_DATA"), root, data.USUAL)
        root = next((place for place in places if place and (data.home_expanded(place) / data.FILE).is_file()), None)
    names = {"PneumoniaMNIST": "pneumoniamnist", "phantom": "phantom"}  # `auto` may give the other one now
    dataset = data.load(names.get(str(found.get("name")), config.dataset), root)
    if dataset.md5 != found.get("md5"):
        way = "from Python, by simulate(Config.read(folder), folder, dataset=dataset, resume=True)"
        other = f"has data's MD5 {found.get('md5')}, not {dataset.md5}"
        raise ValueError(f"{folder} {other}: its data set {found.get('name')!r} can't be loaded here; resume it {way}")
    return replace(dataset, note=found.get("note") or "")


@cache  # Python's own memory of what it has shown is lost whenever a package changes the filters of warnings
def warn_once(text: str, level: int) -> None:
    """Warn once per process. `level` is Python's stacklevel: 3 is the caller's caller."""
    warnings.warn(text, stacklevel=level)


def import_model() -> Any:
    """The module `model`, imported by a thread of its own: Ctrl-C would leave PyTorch half imported for good."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(import_module, "model").result()


def gather(config: "Config", dataset: data.Dataset):
    """The `model.Clients` of a run, each with its share of the data set. Raises ValueError as these do.

    Warns if the malicious clients attack nothing but their labels and none of their labels changes.
    """
    if not isinstance(dataset, data.Dataset):
        raise ValueError(f"dataset {dataset!r} is not a data.Dataset; data.load(name) gives one")
    c, attack = config, ATTACKS[config.attack]
    shares, attacked = data.share_out(
        dataset.train_labels, c.clients, c.malicious, c.seed,
        poison=attack.poison, flip=c.flip, partition=PARTITIONS[c.partition], concentration=c.concentration,
    )  # fmt: skip

    def submit(W: Any, w: Any, honest: Any, rng: np.random.Generator, t: int) -> Any:
        return attack.submissions(W, w, honest, rng, c.strength, c.bursting(t))

    labels_alone = attack.poison and not attack.submit and not attack.claims and any(s.malicious for s in shares)
    if labels_alone and np.array_equal(attacked, dataset.train_labels):
        warn_once(f"attack {c.attack} with flip {c.flip:g} changes no label: nobody attacks", 4)
    return import_model().Clients(
        (dataset.train_images, dataset.train_labels, attacked), (dataset.test_images, dataset.test_labels), shares,
        seed=c.seed, attacking=c.attacking, submit=submit, device=c.device, threads=c.threads, cores=usable_cores(),
        epochs=c.epochs, batch_size=c.batch_size, lr=c.lr, method=c.method,
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One run. The command line is made from these fields. Raises ValueError for a value outside its limits."""

    rounds: int = setting(1000, "aggregation rounds", "paper: 100 to 1000", low=1, high=1_000_000)
    mad_start: int | None = setting(
        None,
        "round from which MAD excludes, or never; several values make several runs",
        "default: never; paper: 5 to 500",
        low=1,
    )
    clients: int = setting(10, "participating clients", "paper", low=1, high=100_000)
    malicious: float = setting(0.2, "fraction of malicious clients, below half", "paper")
    attack: str = setting("label_flip", "what malicious clients do, see --list", "paper", choices=ATTACKS)
    flip: float = setting(1.0, "share of its labels that a malicious client flips", "paper", low=0, high=1)
    attack_start: int = setting(1, "first round in which malicious clients attack", "paper", low=1)
    attack_period: int | None = setting(
        None, "they attack for N rounds, then pause for N (default: no pause)", "paper", low=1
    )
    strength: float | None = setting(
        None, "how strong the attack is, see the reference (default: the attack's own)", "ours", low=0, high=1e30
    )
    burst: int = setting(1, "rounds of noise with which the attacks blind and stumble begin", "ours", low=1)
    partition: str = setting("iid", "how images are dealt to the clients, see --list", "paper", choices=PARTITIONS)
    concentration: float = setting(
        0.5, "concentration of the Dirichlet distribution, for partitions that are not iid", "Li et al. 2022", low=1e-3
    )
    rule: str = setting("mean", "how the models of active clients are aggregated, see --list", "paper", choices=RULES)
    epochs: int = setting(1, "local epochs per round", "testbed", low=1, high=100)
    batch_size: int = setting(20, "images per local step", "testbed", low=1)
    lr: float = setting(1e-3, "learning rate of Adam", "testbed", low=0, high=1e30)  # float32 ends at 3e38
    initial_weights: str = setting(
        "pytorch", "PyTorch's own, or those of a later copy of the testbed", "testbed", choices=("pytorch", "kaiming")
    )
    membership: int | None = setting(
        None, "measure membership inference every N rounds (default: never)", "ours", low=1
    )
    leakage: int | None = setting(None, "measure gradient inversion every N rounds (default: never)", "ours", low=1)
    inverted: str = setting(
        "gradient:1,gradient:2,gradient:4,gradient:8,gradient:20,1x1,1x4,1x20,2x20,5x20,update",
        "what it starts from: gradients of N images (gradient:N), K local steps of N images (KxN), the whole update",
        "ours",
    )
    method: str = setting("stacked", "train all clients at once, or in a loop", "ours", choices=("stacked", "loop"))
    dataset: str = setting("auto", "auto: PneumoniaMNIST if available, else the phantom", "ours", choices=data.DATASETS)
    data_root: str | None = setting(None, f"folder of {data.FILE} (default: MADSIM_DATA or medmnist's)", "ours")
    seed: int = setting(0, "determines everything random", "ours", low=0, high=2**63 - 1)
    device: str = setting("auto", "auto: cuda if the machine has it, else cpu", "ours", choices=("auto", "cpu", "cuda"))
    threads: int | None = setting(
        None, "threads per run (default: one per core, shared by parallel runs)", "ours", low=1, high=1024
    )
    settings: Settings = field(default=PRESETS["paper"], metadata={"help": "MAD's settings"})

    def __post_init__(self):
        check_limits(self)
        kinds: dict[str, Any] = {"attack": Attack, "rule": Callable, "partition": Callable}
        for name, kind in kinds.items():
            if not isinstance(plugins.REGISTRIES[name][getattr(self, name)], kind):
                needed = "an Attack, such as Attack(about, poison=function)" if kind is Attack else "a function"
                raise ValueError(f"{name} {getattr(self, name)} must be {needed}")
            if not re.fullmatch(r"(byzfl:(\w+>)?)?\w+", getattr(self, name)):  # it becomes part of a folder's name
                raise ValueError(f"{name} {getattr(self, name)!r} must have a name of letters, digits and underscores")
        count = data.malicious_count(self.clients, self.malicious)
        if self.malicious and not count:
            few = f"malicious {self.malicious:g} of {self.clients} clients rounds to 0 clients"
            warnings.warn(f"{few}: nobody attacks", stacklevel=3)
        check_clients(RULES[self.rule], self.clients, count)
        for name in ("mad_start", "attack_start", "membership", "leakage"):
            value = getattr(self, name)
            if value and value > self.rounds:
                raise ValueError(f"{name} {value} lies beyond the {self.rounds} rounds; use 1 to {self.rounds}")
        if self.flip != Config.flip and ATTACKS[self.attack].poison is None:
            raise ValueError(
                f"flip {self.flip} changes nothing, because attack {self.attack} flips no labels; leave it out"
            )
        attack = ATTACKS[self.attack]
        for name, useless in (("strength", attack.strength is None), ("burst", not attack.bursts)):
            value = getattr(self, name)
            if useless and value != getattr(Config, name):
                raise ValueError(f"{name} {value:g} changes nothing with attack {self.attack}; leave it out")
        if self.partition == "iid" and self.concentration != Config.concentration:
            raise ValueError(f"concentration {self.concentration} changes nothing with partition iid; leave it out")
        if self.inverted != Config.inverted and not self.leakage:
            raise ValueError(f"inverted {self.inverted} changes nothing without leakage; leave it out")

    def __reduce__(self):
        return plugins.depart(self)  # in another process, an attack of one's own would be unknown

    def attacking(self, t: int) -> bool:
        """Whether the malicious clients attack in round t."""
        since = t - self.attack_start
        return since >= 0 and (self.attack_period is None or since // self.attack_period % 2 == 0)

    def bursting(self, t: int) -> bool:
        """Whether round t, in which they attack, is one of the first of the attack, or of its period."""
        return (t - self.attack_start) % (2 * (self.attack_period or self.rounds)) < self.burst

    @property
    def name(self) -> str:
        """The name of the run's folder, made from what differs from the defaults: `mad500-s0`, `nomad-clients20-s3`.

        Runs with different settings have different names. A word follows its setting's name if several settings know
        it, or if it ends like one with a number. The last part of a long name becomes a hash.
        """
        parts = ["nomad" if self.mad_start is None else f"mad{self.mad_start}"]
        preset = min(PRESETS, key=lambda name: len(_differences(self.settings, PRESETS[name])))
        parts += [] if preset == "paper" else [preset]
        told_elsewhere = {"mad_start", "seed", "settings", "data_root", "device", "threads"}
        changed = {k: v for k, v in _differences(self, Config()).items() if k not in told_elsewhere}
        changed |= _differences(self.settings, PRESETS[preset])
        known = [PRESETS, *(f.metadata.get("choices", ()) for f in (*fields(self), *fields(self.settings)))]
        for name, value in changed.items():
            number = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
            number = re.sub("[:>,]", "-", number)  # of byzfl's rules, and of `inverted`
            alone = number == value and not value[-1:].isdigit() and sum(value in words for words in known) == 1
            parts.append(number if alone else name.replace("_", "") + number)
        return fitting("-".join(parts), f"-s{self.seed}")

    @classmethod
    def read(cls, folder: str | Path) -> "Config":
        """The Config of a run's folder. A setting that an earlier version did not have gets its default.

        Raises FileNotFoundError if there is no Config, ValueError if it is damaged or has settings unknown here.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            known = "it holds no config.json" if path.parent.is_dir() else "there is no such folder"
            raise FileNotFoundError(f"{folder} is not a run's folder: {known}")
        written = read_json(path)
        plugins.refuse_unknown(written, path)
        own, of_mad = ({f.name for f in fields(of)} for of in (cls, Settings))
        try:
            unknown = sorted(identity(written).keys() - own - of_mad)
            if lacking := {"rounds", "clients", "seed"} - written.keys():  # every version has these
                raise KeyError(*lacking)
            settings = Settings(**{name: value for name, value in written["settings"].items() if name in of_mad})
            config = cls(**{name: written[name] for name in written.keys() & own} | {"settings": settings})
            commit = (written.get("git") or {}).get("commit") or "unknown"
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is damaged: {reason}") from None
        if unknown:
            raise ValueError(f"{path} was written by another version (commit {commit}): {', '.join(unknown)} unknown")
        return config


def _differences(one: Any, other: Any) -> dict[str, Any]:
    """The fields of dataclass `one` that differ from those of `other`."""
    return {f.name: getattr(one, f.name) for f in fields(one) if getattr(one, f.name) != getattr(other, f.name)}


@dataclass(frozen=True)
class Result:
    """The results of a run.

    `rounds`, `clients`, `membership` and `leakage` (None if it was not measured) are pandas frames with the columns of
    the CSV files. `summary` is the content of summary.json. `weights` [P] is the last global model. `data` has the
    `name` and `md5` of the data set, and a `note` that says why the phantom replaced it; the frames carry it in
    `attrs["data"]`.
    """

    config: Config
    rounds: Any
    clients: Any
    summary: dict[str, Any]
    weights: np.ndarray
    data: dict[str, str]
    membership: Any = None
    leakage: Any = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C has ended a run. Its `result` has the rounds that were complete."""

    def __init__(self, result: Result):
        super().__init__("the run was interrupted; `result` of this exception has its complete rounds")
        self.result = result


if __name__ == "__main__":
    from harness.cli import main  # it imports this file as `madsim`, so pickled runs never refer to `__main__`
    from harness.console import as_command

    sys.exit(as_command(main))
