"""The command line of madsim: its options, the runs that they ask for, and the exit status.

`given` holds the options of a command line by their names, without those that were not given.
"""

import argparse
import os
import re
import shlex
import sys
import webbrowser
from collections.abc import Collection, Iterable
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, get_args

import data
from harness import plugins
from harness.console import (
    Parser,
    a_path,
    introduce,
    list_names,
    point_to,
    report,
    report_cells,
    report_leakage,
    report_runs,
    say,
    way_on,
    whole,
)
from harness.folder import (
    CHECKPOINT,
    claimed,
    complete,
    data_md5,
    empty,
    hollow,
    identity,
    read_json,
    refuse_changes,
    refuse_folder,
    refuse_version,
    together,
)
from harness.jobs import refuse_unsendable, simulate_all, workers
from harness.pages import write_players
from harness.runs import load_run
from lab.experiments import EXPERIMENTS, PAPER, over_leakage, tabulate, tidy
from madsim import Config, Interrupted, Result, gather, load_again, simulate
from trust import PRESETS, Settings

QUICK = 60  # ours: rounds of --quick, with MAD from the middle; they take about 10 seconds on two cores
MOST_REPORTS = 4  # ours: more runs that end at once have a table alone, and their pages are not opened
MOST_RUNS = 10_000  # ours: the largest number of seeds, and of jobs
# Options that do not change results.
NOT_RESULTS = {"out", "overwrite", "jobs", "backend", "scheduler", "data_root", "play", "hide"}


def make_parser() -> Parser:
    parser = Parser(
        prog="madsim",
        usage="python madsim.py [--quick] [--rounds N] [--mad-start ROUND ...] [options]",
        description="Simulate federated learning under label flipping, with Model Anomaly Detection (MAD).",
        epilog="Sources of the defaults: [paper]: the paper says it; [testbed]: the authors' public code, for what the "
        "paper does not say; [ours]: our own choice. A name with a year is a publication. docs/reference.md says more. "
        "Then `python plot.py results/` draws the results.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add_options(parser.add_argument_group("a run"), Config)
    parser.add_argument(
        "--plugin",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="Python files or modules with attacks, rules and so on of your own",
    )
    parser.add_argument("--list", action="store_true", help="list all attacks, rules, presets and so on, and exit")
    parser.add_argument("--quick", action="store_true", help=f"a short run: {QUICK} rounds, MAD from the middle")
    about = "write a page that plays the run when it ends, and open it where there is a display"
    parser.add_argument("--play", action="store_true", help=about)
    about = "with --play: the page first hides who is malicious, so that students can guess"
    parser.add_argument("--hide", action="store_true", help=about)
    several = parser.add_argument_group("several runs and their folders")
    several.add_argument("--seeds", type=int, metavar="N", help="run N seeds, starting at --seed")
    several.add_argument(
        "--experiment",
        choices=[*EXPERIMENTS, "paper"],
        help="a grid of runs and their table; paper: fig3a and fig3c. The same command continues an interrupted one",
    )
    several.add_argument("--jobs", type=int, metavar="N", help="at most N parallel processes [default: one per core]")
    several.add_argument(
        "--backend", choices=("loky", "dask"), help="run on this machine, or on a Dask cluster [default: loky]"
    )
    several.add_argument(
        "--scheduler", metavar="ADDRESS", help="address of the Dask scheduler, such as tcp://host:8786"
    )
    several.add_argument("--out", type=a_path, metavar="DIR", help="folder for the run folders [default: results]")
    several.add_argument("--overwrite", action="store_true", help="replace run folders that exist")
    about = "continue interrupted runs, or make runs longer with --rounds"
    several.add_argument("--resume", type=a_path, nargs="+", action="extend", metavar="DIR", help=about)
    mad = parser.add_argument_group(
        "MAD",
        "The equations are the paper's. How a distance becomes d is our reading, because the paper does not say it. "
        "The spread is the largest usual distance of a round so far, see --spread.",
    )
    mad.add_argument("--preset", choices=PRESETS, help="the defaults of MAD's settings [default: paper]")
    add_options(mad, Settings)
    return parser


def add_options(group: Any, of: type, only: Collection[str] = ()) -> None:
    """Add one option per field of the dataclass (or of `only` these), with its help, default and source.

    The dataclass checks the values.
    """
    for f in fields(of):
        if f.name == "settings" or (only and f.name not in only):
            continue
        about, kind = f.metadata, (get_args(f.type) or (f.type,))[0]
        values = about.get("choices")
        listed = "{" + ",".join(map(str, values)) + "}" if isinstance(values, tuple) else None  # else see --list
        value = {"mad_start": "ROUND", "data_root": "DIR"}.get(f.name, {int: "N", float: "X"}.get(kind, "NAME"))
        default = "" if f.default is None else f"default: {f.default}, "
        group.add_argument(
            option(f.name),
            dest=f.name,
            type=start_round if f.name == "mad_start" else kind,
            **({"nargs": "+", "action": "extend"} if f.name == "mad_start" else {}),
            metavar=listed or value,
            help=f"{about['help']} [{default}{about['source']}]",
        )


def start_round(text: str) -> int | None:
    """A value of --mad-start: a round, or `never`."""
    try:
        return None if text == "never" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a round or 'never'; separate several by spaces") from None


def option(name: str) -> str:
    """The option for a field of Config or Settings, or for another name in `given`."""
    return "--" + name.replace("_", "-")


def plan(given: dict[str, Any]) -> dict[Path, Config]:
    """The new runs that the options ask for, by their folders. A run that is asked for twice appears once."""
    check_execution(given)
    if "quick" in given and "experiment" in given:
        raise ValueError("--quick and --experiment can't be combined; leave out one of them")
    if "quick" in given:
        rounds = given.get("rounds", QUICK)
        given = {"rounds": rounds, "mad_start": [max(1, rounds // 2)]} | given
    if "experiment" in given:
        groups = {folder: list(cells.values()) for folder, cells in plan_experiments(given).items()}
    else:
        base = configure(given, Config())
        starts = given.get("mad_start", [None])
        groups = {given.get("out", Path("results")): [replace(base, mad_start=start) for start in starts]}
    runs = [
        (folder, replace(config, seed=seed))
        for folder, configs in groups.items()
        for seed in seeds_of(given)
        for config in configs
    ]
    return {folder / run.name: run for folder, run in runs}


def tell_alpha(given: dict[str, Any], planned: dict[Path, Config]) -> None:
    """Say what --alpha is if it may be meant for a partition. In earlier versions, it was Dirichlet's parameter."""
    parts = sorted({config.partition for config in planned.values()} - {"iid"})
    if parts and "alpha" in given and "concentration" not in given:
        values = " or ".join(f"{c:g}" for c in sorted({config.concentration for config in planned.values()}))
        uses = f"partition {' or '.join(parts)} uses --concentration, here {values}"
        say(f"madsim: --alpha {given['alpha']:g} is MAD's alpha in eq. (2); {uses}", sys.stderr)


def plan_experiments(given: dict[str, Any]) -> dict[Path, dict[tuple[str, str], Config]]:
    """The cells of the experiments that are asked for, by the folders of the experiments."""
    groups = {}
    for name in PAPER if given["experiment"] == "paper" else [given["experiment"]]:
        experiment = EXPERIMENTS[name]
        if clash := sorted(experiment.sets() & given.keys()):
            raise ValueError(f"experiment {name} sets {', '.join(map(option, clash))} itself; leave it out")
        groups[given.get("out", Path("results")) / name] = {
            cell: replace(configure(options, Config()), mad_start=options.get("mad_start"))
            for cell, options in experiment.cells(given).items()
        }
    return groups


def seeds_of(given: dict[str, Any]) -> range:
    """The seeds that are asked for."""
    first = given.get("seed", 0)
    return range(first, first + given.get("seeds", 1))


def check_execution(given: dict[str, Any]) -> None:
    """Raise ValueError for an impossible number of seeds or processes, or for options that lack their companion."""
    for name in ("seeds", "jobs"):
        if not 1 <= given.get(name, 1) <= MOST_RUNS:
            raise ValueError(f"{name} {given[name]} must be at least 1 and at most {MOST_RUNS}")
    if ("scheduler" in given) != (given.get("backend") == "dask"):
        raise ValueError("--backend dask and --scheduler ADDRESS need each other")
    if "scheduler" in given and "jobs" in given:
        raise ValueError("--jobs is for this machine; a Dask cluster has a fixed number of workers")
    if "hide" in given and "play" not in given:
        raise ValueError("--hide is for the page of --play; add --play")


def configure(given: dict[str, Any], base: Config) -> Config:
    """`base` with the options of `given`, except the MAD starts."""
    settings = PRESETS[given["preset"]] if "preset" in given else base.settings
    settings = replace(settings, **{f.name: given[f.name] for f in fields(Settings) if f.name in given})
    own = {f.name: given[f.name] for f in fields(Config) if f.name in given and f.name != "mad_start"}
    return replace(base, **own, settings=settings)


def plan_resumed(given: dict[str, Any]) -> dict[Path, Config]:
    """The runs in the folders of --resume, with their own settings. Raises ValueError for options that differ."""
    check_execution(given)
    for name in ("seeds", "experiment", "overwrite", "out", "quick"):
        if name in given:
            raise ValueError(f"--resume continues runs that exist; leave out --{name}")
    folders = {folder.resolve(): folder for folder in given["resume"]}.values()  # each once
    runs = {folder: Config.read(folder) for folder in folders}
    for folder, begun in runs.items():
        longer = given.get("rounds", 0) > begun.rounds
        if (longer or not complete(folder)) and not (folder / CHECKPOINT).is_file():
            raise ValueError(f"{folder} can't be resumed: it holds no {CHECKPOINT}; run it again with --overwrite")
    if len({data_md5(folder) for folder in runs}) > 1:
        raise ValueError("these runs have different data sets; resume them one by one")
    for folder, begun in runs.items():
        runs[folder] = configure(given, begun)
        was = as_begun(folder) | {"mad_start": in_words([begun.mad_start])}
        now = identity(asdict(runs[folder])) | {"mad_start": in_words(given.get("mad_start", [begun.mad_start]))}
        refuse_changes(folder, was, now | {"plugins": plugins.described()}, longer=True)
        if runs[folder].rounds > begun.rounds:
            say(f"{whole(folder)} continues to round {runs[folder].rounds} instead of {begun.rounds}")
    return runs


def in_words(starts: list[int | None]) -> str:
    """The values of --mad-start as they are given."""
    return " ".join("never" if start is None else str(start) for start in starts)


def as_begun(folder: Path) -> dict[str, Any]:
    """The settings that the run of a folder must keep, with the MD5 of its data and its plugins."""
    about = read_json(folder / "config.json")
    refuse_version(folder, about)
    loaded = plugins.described(about.get("plugins") or {})
    return identity(asdict(Config.read(folder))) | {"data's MD5": data_md5(folder), "plugins": loaded}


def replaceable(folder: Path, config: Config, given: dict[str, Any], continues: bool) -> bool:
    """Whether a folder in the way of a new run may be replaced. A run of --quick alone replaces that of an earlier one.

    It does not replace one that was made longer. `continues`: the command continues runs of an earlier call.
    """
    if "overwrite" in given or (continues and hollow(folder)):
        return True
    about = read_json(folder / "config.json") if "quick" in given and (folder / "config.json").is_file() else {}
    return "--quick" in (about.get("command") or []) and about.get("rounds") == config.rounds


def make_ready(
    planned: dict[Path, Config], given: dict[str, Any], held: ExitStack
) -> tuple[dict[Path, Config], data.Dataset | None]:
    """The planned runs that are not complete, and the data set; None if --resume finds all runs complete.

    Several runs, or an experiment, continue those of an earlier call. Folders that may be replaced are emptied last, so
    that an invalid command removes nothing. The runs' folders stay claimed while `held` is open. Raises ValueError for
    a folder that may not be replaced.
    """
    resume = "resume" in given
    continues = ("experiment" in given or len(planned) > 1) and "overwrite" not in given
    stay = [folder for folder in planned if resume or (continues and (folder / CHECKPOINT).is_file())]
    finished = [folder for folder in stay if complete(folder) and not (resume and grows(folder, planned[folder]))]
    in_the_way = [folder for folder in planned if folder not in stay and (folder.exists() or folder.is_symlink())]
    for folder in in_the_way:
        refuse_folder(folder, replaceable(folder, planned[folder], given, continues))
    runs = {folder: config for folder, config in planned.items() if folder not in finished}
    dataset = None
    if runs or not resume:
        folder, first = next(iter((runs or planned).items()))
        dataset = load_again(first, folder) if resume else data.load(first.dataset, first.data_root)
        clients = gather(first, dataset)
        if first.leakage:
            from lab.privacy import GradientInversion

            GradientInversion(clients, first.inverted)  # raises ValueError for a wrong `inverted`
    for folder in finished:
        if dataset and not resume:
            now = {"data's MD5": dataset.md5, "plugins": plugins.described()}
            refuse_changes(folder, as_begun(folder), identity(asdict(planned[folder])) | now)
        if "experiment" not in given:
            say(f"{whole(folder)} is complete")
    refuse_unsendable(list(runs.values()), "scheduler" in given)
    held.enter_context(claimed(runs))
    for folder in in_the_way:
        empty(folder)
    return runs, dataset


def grows(folder: Path, config: Config) -> bool:
    """Whether the run of a folder is to become longer than it was begun."""
    return config.rounds > Config.read(folder).rounds


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for. Returns 0, or 130 after an interruption; invalid input exits with 2."""
    load_plugins(argv)
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    if "list" in given:
        list_names()
        return 0
    runs: dict[Path, Config] = {}
    begun, again = False, "overwrite" in given
    try:
        planned = plan_resumed(given) if "resume" in given else plan(given)
        tell_alpha(given, planned)
        with workers(given.get("scheduler")), ExitStack() as held:
            runs, dataset = make_ready(planned, given, held)
            if runs:
                introduce(runs, dataset)
            begun = True
            results = simulate_all(simulate, runs, dataset, given.get("jobs"), "scheduler" in given)
    except Interrupted as stop:
        results = [stop.result]
    except BrokenExecutor:
        parser.error(f"the process of a run was killed{way_on(runs, again)}")
    except (ValueError, FloatingPointError, ImportError) as error:
        parser.error(str(error))
    except (OSError, MemoryError) as error:
        parser.error(f"{error}{way_on(runs, again) if begun else ''}")
    except KeyboardInterrupt:  # no run had begun, or several were interrupted
        print(file=sys.stderr)
        say(f"madsim: stopped{way_on(runs, again)}", sys.stderr)
        return 130
    done = {folder: result for folder, result in zip(runs, results) if isinstance(result, Result)}
    try:
        if "experiment" in given and dataset:
            tabulate_all(given, dataset.md5)
        else:
            report_all(planned, done)
        if "play" in given:
            play_all(planned, "hide" in given)
    except (ValueError, OSError) as error:  # the error concerns a file of a run or a table
        if isinstance(error, OSError) and not error.filename:  # it concerns the output itself
            raise
        parser.error(str(error))
    for failure in (result for result in results if not isinstance(result, Result)):
        say(f"madsim: {failure}", sys.stderr)
    if len(done) < len(runs):
        return 2
    return 0 if all(result.summary["complete"] for result in done.values()) else 130


def load_plugins(argv: list[str] | None) -> None:
    """Load the plugins that a command line names. Their names are then known to its other options."""
    parser = Parser(prog="madsim", add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", nargs="+", action="extend", default=[])
    try:
        for plugin in parser.parse_known_args(argv)[0].plugin:
            plugins.load(plugin)
    except ValueError as error:
        parser.error(str(error))


def report_all(planned: dict[Path, Config], results: dict[Path, Result]) -> None:
    """Report each run that has just ended, if there are few, the table of several planned runs, and how to draw them.

    The table is written into the folder of the runs, but it does not replace the table of an experiment.
    """
    for folder, result in results.items() if len(results) <= MOST_REPORTS else ():
        report(result, folder)
    there = {folder: config for folder, config in planned.items() if (folder / "summary.json").is_file()}
    if len(planned) == 1 or not there:
        for folder in there.keys() & results.keys():
            point_to(folder)
        return
    places = {folder.absolute().parent for folder in there}
    try:
        shown = [next(iter(there)).parent if len(places) == 1 else together([*there])[0]]
    except ValueError:  # on Windows, drives have no common folder
        shown = sorted(places)
    cells = [(folder, folder.name.removesuffix(f"-s{config.seed}"), "") for folder, config in there.items()]
    of_experiment = (shown[0] / "table.md").exists()
    written = len(places) == 1 and not of_experiment
    report_runs(tabulate(shown[0], cells) if written else tidy(cells))
    if of_experiment and results:
        say(f"{whole(shown[0] / 'table.md')} stays as it was; the command of the experiment makes it anew")
    for place in shown:
        point_to(place, *["table.csv"] * written)


def play_all(folders: Iterable[Path], hide: bool) -> None:
    """Write the page that plays each of the runs, where plot.py writes it. Open the pages if they are few."""
    pages = []
    there = [folder for folder in folders if (folder / "rounds.csv").is_file()]
    for place, members in groupby(there, key=lambda folder: folder.parent):
        pages += write_players(list(map(load_run, members)), place, place / "figures", hide)
    if len(pages) <= MOST_REPORTS and has_display():
        for page in pages:
            webbrowser.open(page.absolute().as_uri())


def has_display() -> bool:
    """Whether a browser has a screen. Without one, Python may open a browser in the terminal."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def tabulate_all(given: dict[str, Any], md5: str) -> None:
    """Write and print the tables of the experiments. They include the runs of earlier calls on the same data."""
    for folder, cells in plan_experiments(given).items():
        there = [int(found[1]) for path in folder.iterdir() if (found := re.search(r"-s(\d+)$", path.name))]
        seeds = sorted({*seeds_of(given), *there})
        runs = [(folder / replace(run, seed=seed).name, *cell) for cell, run in cells.items() for seed in seeds]
        runs = [run for run in runs if (run[0] / CHECKPOINT).is_file() and data_md5(run[0]) == md5]
        asked = {name: value for name, value in given.items() if name not in NOT_RESULTS} | {"experiment": folder.name}
        words = [[option(n), *(value if isinstance(value, list) else [value])] for n, value in asked.items()]
        table = tabulate(folder, runs, shlex.join(["python", "madsim.py", *map(str, chain(*words))]))
        if not table.empty:
            report_cells(EXPERIMENTS[folder.name].about, table)
            if not (leakage := over_leakage(runs)).empty:
                report_leakage(leakage)
            point_to(folder, "table.md", "table.csv")
