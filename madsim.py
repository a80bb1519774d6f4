"""madsim: federated learning under label flipping, and the Model Anomaly Detection (MAD) that stops it.

`python madsim.py --rounds 1000 --mad-start 500` runs the system of "Towards More Robust Federated Learning with
Medical Imaging Model Anomaly Detection" (Korobeinikov, Chuprov, Reznik): see `simulate`, which is one federated
learning run, whole.

Shapes: C clients, P parameters, n images, t round.
"""

import argparse
import os
import re
import shutil
import sys
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

# The idle threads of OpenBLAS, which numpy brings, would spin on the cores that PyTorch computes on.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import numpy as np

import data
from bench.experiments import EXPERIMENTS, PAPER, tabulate, tidy
from bench.folder import (
    CHECKPOINT,
    complete,
    data_md5,
    hollow,
    identity,
    read_json,
    refuse_changes,
    refuse_folder,
    seeds_in,
)
from bench.record import Log
from bench.several import simulate_all, workers
from bench.shell import as_command, script
from bench.terminal import common_folder, introduce, list_names, report, report_seeds, way_on
from trust import PRESETS, RULES, Settings, aggregate, check_limits, initial_state, mad_step, need, setting

QUICK = 60  # ours: rounds of --quick, with MAD from the middle; some 10 seconds on two cores
MOST_RUNS = 10_000  # ours: of seeds, and of jobs
ELSEWHERE = {"out", "overwrite", "jobs", "backend", "scheduler", "data_root"}  # options that change no number

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
        "Li et al. 2022",
        low=1e-3,
        option="alpha",
    )
    rule: str = setting("mean", "how active clients' models are aggregated", "paper", choices=RULES)
    epochs: int = setting(1, "local epochs a round", "testbed", low=1, high=100)
    batch_size: int = setting(20, "images a local step", "testbed", low=1)
    lr: float = setting(1e-3, "learning rate of Adam", "testbed", low=0, high=1e30)  # float32 ends at 3e38
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


def read_config(folder: str | Path) -> Config:
    """The Config of a run's folder. Raises FileNotFoundError if it has none, ValueError if that is damaged."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        known = "it holds no config.json" if path.parent.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{folder} is not a run's folder: {known}")
    written = read_json(path)
    try:
        settings = Settings(**{f.name: written["settings"][f.name] for f in fields(Settings)})
        return Config(**{f.name: written[f.name] for f in fields(Config)} | {"settings": settings})
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged: {reason}") from None


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
    from model import initial_weights

    dataset = dataset or data.load(config.dataset, config.data_root)
    clients = gather(config, dataset)
    with Log(config, dataset, clients, out, resume, run_name(config) if bar else None) as log:
        w, scores = log.begin(initial_weights(config.seed).numpy(), initial_state(config.clients))
        for t in range(scores.round + 1, config.rounds + 1):
            asked = scores.active | (config.settings.excluded == "observed")
            W, train_loss = clients.train(w, asked, t)  # [C, P]   local training, all clients at once
            W = clients.attack(W, w, asked, t)  # [C, P]   what malicious clients submit instead
            scores = mad_step(W, scores, t, config.mad_start, config.settings)  # eqs. (1)-(7) and exclusion
            w = aggregate(W, clients.sizes, scores.active, config.rule, clients.malicious.sum(), w)  # [P]
            log(t, W, train_loss, clients.evaluate(w, t), w, scores)
    return Result(config, **log.result())


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


# ---------------------------------------------------------------- the command line


def start_round(text: str) -> int | None:
    """A value of --mad-start: a round, or `never`."""
    try:
        return None if text == "never" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a round nor 'never', apart by spaces") from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python madsim.py [--quick] [--rounds N] [--mad-start ROUND ...] [options]",
        description="Simulate federated learning under label flipping, with Model Anomaly Detection (MAD).",
        epilog="Then: python plot.py results/ draws what came of it, --play makes a page that plays it.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = lambda message: parser.exit(2, f"madsim: {' '.join(message.split())}{meant(parser, message)}\n")
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


def meant(parser: argparse.ArgumentParser, message: str) -> str:
    """What to say of an option that was not understood: the nearest there is."""
    unknown = re.match(r"unrecognized arguments: (--\S+)", message)
    near = unknown and get_close_matches(unknown[1], re.findall(r"--[\w-]+", parser.format_help()), 1)
    return f"; did you mean {near[0]}?" if near else ""


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
        given = {"rounds": rounds, "mad_start": [max(1, rounds // 2)]} | given
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

    def run(options: dict) -> Config:
        return replace(configure(options, Config()), mad_start=options.get("mad_start"))

    groups = {}
    for name in PAPER if given["experiment"] == "paper" else [given["experiment"]]:
        experiment = EXPERIMENTS[name]
        if clash := sorted(experiment.sets() & given.keys()):
            raise ValueError(f"experiment {name} sets {', '.join(map(option, clash))} itself; leave that out")
        cells = {cell: run(options) for cell, options in experiment.cells(given).items()}
        groups[given.get("out", Path("results")) / name] = cells
    return groups


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
        refuse_changes(
            folder, identity(asdict(begun)) | {"mad_start": [begun.mad_start]}, identity(asdict(runs[folder])) | starts
        )
    return runs


def make_ready(planned: dict[Path, Config], given: dict) -> tuple[dict[Path, Config], data.Dataset]:
    """Those of the planned runs that have not come to their end, and the data.

    Folders that are in the way are refused or, if they may be replaced, removed: last of all, so that what can't be
    run costs no earlier run. Several runs, or an experiment, go on with those that an earlier call has made; ValueError
    if these are not what is asked for.
    """
    overwrite, resume = "overwrite" in given, "resume" in given
    goes_on = ("experiment" in given or len(planned) > 1) and not overwrite
    stay = [folder for folder in planned if resume or (goes_on and (folder / CHECKPOINT).is_file())]
    finished = [folder for folder in stay if complete(folder)]
    in_the_way = [folder for folder in planned if folder not in stay and folder.exists()]
    for folder in in_the_way:
        refuse_folder(folder, replaceable=overwrite or (goes_on and hollow(folder)))
    first = next(iter(planned.values()))
    dataset = data.load(first.dataset, first.data_root)
    gather(first, dataset)
    for folder in finished:
        if not resume:
            md5 = {"data's MD5": data_md5(folder)}
            now = identity(asdict(planned[folder])) | {"data's MD5": dataset.md5}
            refuse_changes(folder, identity(asdict(read_config(folder))) | md5, now)
        if "experiment" not in given:
            print(f"{folder} is complete")
    for folder in in_the_way:
        shutil.rmtree(folder)
    return {folder: config for folder, config in planned.items() if folder not in finished}, dataset


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    if "list" in given:
        list_names()
        return 0
    runs, begun, again = {}, False, "overwrite" in given
    try:
        planned = plan_resumed(given) if "resume" in given else plan(given)
        with workers(given.get("scheduler")):
            runs, dataset = make_ready(planned, given)
            if runs:
                introduce(runs, dataset)
            begun = True
            results = simulate_all(simulate, runs, dataset, given.get("jobs", os.cpu_count()), "scheduler" in given)
    except BrokenExecutor:
        parser.error(f"a run's process was killed{way_on(runs, again)}")
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    except (OSError, MemoryError) as error:
        parser.error(f"{error}{way_on(runs, again) if begun else ''}")
    except KeyboardInterrupt:  # a single run ends in order by itself; here it had not begun, or others were cut short
        print(f"\nmadsim: stopped{way_on(runs, again)}", file=sys.stderr)
        return 130
    done = {folder: result for folder, result in zip(runs, results) if isinstance(result, Result)}
    try:
        if "experiment" in given:
            tabulate_all(given, dataset.md5)
        else:
            report_all(planned, done)
    except (ValueError, OSError) as error:  # of a run's files, or of a table's
        if isinstance(error, OSError) and not error.filename:  # of the output
            raise
        parser.error(str(error))
    for error in (result for result in results if not isinstance(result, Result)):
        print(f"madsim: {error}", file=sys.stderr)
    if len(done) < len(runs):
        return 2
    return 0 if all(result.summary["complete"] for result in done.values()) else 130


def report_all(planned: dict[Path, Config], results: dict[Path, Result]) -> None:
    """What came of the runs just ended, each, of all that were asked for over seeds, and how to draw them."""
    for folder, result in results.items():
        report(result, folder)
    there = {folder: config for folder, config in planned.items() if (folder / "summary.json").is_file()}
    cells = [(folder, run_name(replace(config, seed=0)).removesuffix("-s0"), "") for folder, config in there.items()]
    if len({kind for _, kind, _ in cells}) < len(cells):
        report_seeds(tidy(cells))
    if there and (results or len(planned) > 1):
        print(f"Figures      python {script('plot.py')} {common_folder(there)}")


def tabulate_all(given: dict, md5: str) -> None:
    """The tables of the experiments that were asked for, with what earlier calls have run of them with other seeds, on
    the data of the same MD5."""
    for folder, cells in plan_experiments(given).items():
        seeds = sorted({*seeds_of(given), *seeds_in(folder)})
        runs = [(folder / run_name(replace(run, seed=seed)), *cell) for cell, run in cells.items() for seed in seeds]
        runs = [run for run in runs if (run[0] / CHECKPOINT).is_file() and data_md5(run[0]) == md5]
        asked = {name: value for name, value in given.items() if name not in ELSEWHERE} | {"experiment": folder.name}
        words = [f"{option(name)} {value}" for name, value in asked.items()]
        tabulate(folder, runs, f"python madsim.py {' '.join(words)}")


if __name__ == "__main__":
    sys.exit(as_command(main))
