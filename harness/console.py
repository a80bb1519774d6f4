"""What the terminal says: about the runs to come, about their results, and about all known names."""

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import astuple
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from harness.folder import VERSION, code, script, unfinished

INDENT = " " * 13  # of the texts beside the labels of a report
RENAMED = {"--alpha-reputation": "--alpha", "--alpha": "--concentration"}  # options of earlier versions, and now
OVER_SEEDS = "mean ± standard deviation over seeds; counts with 95 % intervals"
UNBROKEN = "\0"  # stands for a space that may not become the end of a line; no path and no argument can hold it


class Parser(argparse.ArgumentParser):
    """A parser with --version, whose errors are one line if no terminal folds them.

    For an unknown option it names the nearest one.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        if self.add_help:
            about = "show the git commit of the code and the version of its results, and exit"
            self.add_argument("--version", action=ShowVersion, nargs=0, default=argparse.SUPPRESS, help=about)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file or sys.stdout)  # argparse's own passes over errors of the output

    def error(self, message: str) -> NoReturn:
        mine = set(re.findall(r"--[\w-]+", self.format_help())) - {"--help"}
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        hints = [f"{option} is now {RENAMED[option]}" for option in unknown if RENAMED.get(option) in mine]
        if unknown and not hints:
            hints = [f"did you mean {near}?" for near in get_close_matches(unknown[0], mine, 1)]
        if re.match("alpha .* must be", message) and "--concentration" in mine:
            hints = ["the parameter of Dirichlet's distribution is now --concentration"]
        text = "; ".join([" ".join(message.split()), *hints])
        self.exit(2, fold(f"{self.prog}: {text}", sys.stderr) + "\n")


class ShowVersion(argparse.Action):
    """What --version does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        now = code()
        changed = ", with changes" * bool(now["dirty"])
        say(f"madsim, commit {now['commit'] or 'unknown'}{changed}; results of version {VERSION}")
        parser.exit()


def a_path(text: str) -> Path:
    """The path that an option names. `~` is the user's folder, also in `--out=~/runs`, where shells leave it."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        reason = f"{text} names a home folder that is unknown; write ./{text} for a name that begins with ~"
        raise argparse.ArgumentTypeError(reason) from None


def progress(shown: bool, **options: Any) -> Any:
    """A progress bar of tqdm, if it is `shown` and the output is a terminal or a notebook."""
    from tqdm.auto import tqdm

    there = None if "ipykernel" not in sys.modules else False  # None: tqdm finds out whether there is a terminal
    return tqdm(disable=there if shown else True, dynamic_ncols=True, **options)


def fold(text: str, stream: Any, indent: str = "") -> str:
    """The text with lines that fit the terminal, broken between words; one line if the stream is not a terminal.

    A path or a command from `whole` is never broken. It has a line of its own if it does not fit. `indent` starts all
    lines but the first.
    """
    if stream and stream.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return text.replace(UNBROKEN, " ")


def say(text: str, stream: Any = None, indent: str = "") -> None:
    """Print the text as `fold` gives it, on standard output if no stream is named."""
    print(fold(text, stream or sys.stdout, indent), file=stream or sys.stdout)


def whole(*words: str | Path) -> str:
    """The words of a command, or a path, to be copied from the terminal into a shell. `fold` does not break it."""
    return shlex.join(map(str, words)).replace(" ", UNBROKEN)


def as_command(main: Callable[[], int]) -> int:
    """Run a `main` as a command of the shell. SIGTERM stops it as Ctrl-C does. Closed output is no traceback.

    A warning is one line on standard error.
    """
    program = Path(sys.argv[0]).stem
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    replace_closed()
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # a notebook's streams have none
            stream.reconfigure(errors="backslashreplace")  # a folder's name may hold bytes that are not text
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_: say(f"{program}: {message}", sys.stderr)
    try:
        try:
            return main()
        finally:
            signal.signal(signal.SIGTERM, before)
            warnings.showwarning = shown
            for stream in streams:
                stream.flush()
    except OSError as error:
        if error.filename:  # errors of the output name no file
            say(f"{program}: {error}", sys.stderr)
            return 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # do not write the buffered rest again
        if not isinstance(error, BrokenPipeError):  # the reader closed the pipe; other errors: a full disk
            say(f"{program}: the output can't be written: {error}", sys.stderr)
        return 1


def replace_closed() -> None:
    """Let standard streams that the caller has closed lead nowhere, here and in the processes that this one starts.

    Else the next files would take their places, and get what a library writes to standard error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # 0, 1, 2: a file takes the lowest free one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
            os.set_inheritable(getattr(sys, name).fileno(), True)


def list_names() -> None:
    """Print all names that options of the command line take, each with one sentence."""
    from lab.attacks import ATTACKS
    from lab.experiments import EXPERIMENTS, PAPER
    from lab.partitions import PARTITIONS
    from lab.rules import RULES, byzfl_names
    from trust import PRESETS

    def sentences(registry: dict[str, Any]) -> dict[str, str]:
        about = {name: getattr(entry, "about", entry.__doc__) or "" for name, entry in registry.items()}
        return {name: text.split("\n")[0].rstrip(".") for name, text in about.items()}

    differ = sum(one != other for one, other in zip(*map(astuple, (PRESETS["paper"], PRESETS["testbed"]))))
    for option, names in {
        "--attack": sentences(ATTACKS),
        "--partition": sentences(PARTITIONS),
        "--rule": sentences(RULES) | byzfl_names(),
        "--preset": {
            "paper": "the paper, with our reading",
            "testbed": f"the authors' public code: {differ} settings differ",
            "directions": "ours, for clients that differ in size: compares directions",
        },
        "--experiment": sentences(EXPERIMENTS) | {"paper": " and ".join(PAPER)},
    }.items():
        print(option)
        for name, about in names.items():
            for line in textwrap.wrap(about, 61) or [""]:
                say(f"  {name:<17}{line}", indent=" " * 19)
                name = ""


def introduce(runs: dict[Path, Any], dataset: Any) -> None:
    """Say what is about to run: Configs, by their folders."""
    from data import malicious_count
    from harness.log import usual_seconds

    if dataset.note:
        say(f"PHANTOM IMAGES, not PneumoniaMNIST: {dataset.note}", sys.stderr)
    configs = runs.values()
    clients = " or ".join(map(str, sorted({config.clients for config in configs})))
    counts = {malicious_count(config.clients, config.malicious) for config in configs}
    malicious = " or ".join(map(str, sorted(counts)))
    rounds = sum(config.rounds for config in configs)
    seconds = sum(config.rounds * usual_seconds(config) for config in configs)
    say(
        f"{dataset.name}, {len(dataset.train_labels)} training images; {clients} clients, {malicious} malicious; "
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {rounds} round{'s' * (rounds > 1)} in all, "
        f"about {minutes(seconds)} on two cores"
    )


def minutes(seconds: float) -> str:
    """A rough time in words: '20 seconds', '3 minutes'."""
    if seconds < 60:
        return f"{max(1, round(seconds / 10)) * 10} seconds"
    return f"{round(seconds / 60)} minute{'s' * (round(seconds / 60) > 1)}"


def report(result: Any, folder: Path) -> None:
    """Print the summary of a `madsim.Result`."""
    from harness.runs import data_in_words

    s, rounds = result.summary, result.rounds
    print()
    if rounds.empty:
        say(whole(folder))
        return say(f"Stopped      before the first round ended{way_on([folder])}", indent=INDENT)
    data = data_in_words(s["dataset"], s["note"])
    say(whole(folder) + f"  ({data})" * data.startswith("phantom"))
    if not s["complete"]:
        say(f"Stopped      after round {len(rounds)} of {result.config.rounds}{way_on([folder])}", indent=INDENT)
    for client, t in s["excluded"].items():
        kind = "attacker" if client in s["malicious"] else "HONEST"
        why = ", submitted NaN or infinity" if client in s["nonfinite"] else ""
        print(f"Excluded     client {client} ({kind}{why}) in round {t}")
    attackers = len(s["malicious"])
    if s["excluded"]:
        among = f"{s['true_exclusions']} of {attackers} attackers, " * bool(attackers)
        print(f"             {among}{s['false_exclusions']} honest")
    else:
        say(f"Excluded     nobody; {why_nobody(result.config, len(rounds), attackers)}", indent=INDENT)
    if s["kept_rounds"]:
        print(f"Kept         all clients in {len(s['kept_rounds'])} rounds, because all fell below the threshold")
    last = s["last_50_rounds"]
    times = {f"round {len(rounds)}": rounds.iloc[-1], f"last {last}": rounds.tail(last).mean()}
    if s["jumps"]:
        t = s["jumps"][0]["round"]
        times = {f"round {t - 1}": rounds.iloc[t - 2], f"round {t}": rounds.iloc[t - 1]} | times
    print("             " + "".join(f"{name:>12}" for name in times))
    for label, column in (
        ("Loss         participants", "loss"), ("Accuracy     participants", "accuracy"),
        ("             honest clients", "honest_accuracy"), ("             test set", "test_accuracy"),
    ):  # fmt: skip
        print(f"{label:<13}" + "".join(f"{values[column]:>12.3f}" for values in times.values()))
    print(f"Time         {s['seconds']:.1f} s, {s['seconds_per_round']:.3f} s per round (median)")
    if result.leakage is not None:
        report_leakage(result.leakage)


def report_leakage(table: Any) -> None:
    """Print what gradient inversion found: means over the runs of a frame with the columns of leakage.csv."""
    from harness.runs import seen_in_words
    from lab.experiments import LEAKED, means

    names = ("rank", "identified", "psnr", "ssim")
    texts = means(table.groupby(["round", "steps", "images"], sort=False), {name: LEAKED[name] for name in names})
    pairs = [(f"round {t}", seen_in_words(steps, images)) for t, steps, images in texts.index]
    print()
    say("Gradient inversion. A reconstructed image that tells nothing has a rank of 0.5 on average, a perfect one 0")
    show(list(texts.columns), under_headings(pairs, texts.values.tolist()))


def why_nobody(config: Any, rounds: int, attackers: int) -> str:
    """What to say of a run that has excluded nobody after so many rounds."""
    said = []
    if config.mad_start is None:
        said = ["MAD never starts"]
    elif config.mad_start > rounds:
        said = [f"MAD had not started (it starts in round {config.mad_start})"]
    them = f"{attackers} attacker{'s' * (attackers > 1)}"
    if not attackers:
        said.append("nobody attacked")
    elif config.attack_start > rounds:
        said.append(f"{them} had not attacked yet (the attack starts in round {config.attack_start})")
    else:
        said.append(f"{them} stayed")
    return "; ".join(said)


def data_of(table: Any) -> str:
    """The data sets of the runs of a frame from `lab.experiments.tidy`, in words."""
    return " and ".join(table["data"].unique())


def report_runs(table: Any) -> None:
    """Print one line per run of a frame from `lab.experiments.tidy`, and means if some runs differ only in the seed."""
    from harness.runs import span

    print()
    say(f"{data_of(table)}; accuracies are means over the last {span(table)} rounds")
    rows = []
    for run in table.itertuples():
        out = f"{run.last_exclusion:.0f}" if run.last_exclusion > 0 else ""  # not NaN
        counts = [f"{run.true_exclusions} of {run.attackers}", str(run.false_exclusions), out]
        ended = f", ended after round {run.last}" * (not run.complete)
        cells = [*counts, f"{run.honest_accuracy:.3f}", f"{run.test_accuracy:.3f}"]
        rows.append((f"{run.row}-s{run.seed}{ended}", cells))
    show(["attackers out", "honest out", "out by round", "honest accuracy", "test accuracy"], rows)
    if (table.groupby("row")["seed"].nunique() > 1).any():
        report_seeds(table)


def report_cells(about: str, table: Any) -> None:
    """Print one line per cell of an experiment from its frame of `lab.experiments.tidy`."""
    from harness.runs import span
    from lab.experiments import over_seeds

    texts = over_seeds(table).astype(str)
    print()
    say(f"{about}; {data_of(table)}; last {span(table)} rounds, {OVER_SEEDS}")
    heads = ["seeds", "attackers out", "honest out", "honest accuracy", "test accuracy"]
    show(heads, under_headings(texts.index, texts[heads].values.tolist()))


def under_headings(names: Iterable[tuple[str, str]], each: Iterable[list[str]]) -> list[tuple[str, list[str]]]:
    """Rows for `show`, from pairs of a heading and a label: each heading once. Without a label, it has the cells."""
    rows: list[tuple[str, list[str]]] = []
    for (heading, label), cells in zip(names, each):
        if label and (heading, []) not in rows:
            rows.append((heading, []))
        rows.append((f"  {label}" if label else heading, cells))
    return rows


def show(heads: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """Print a table: a label and cells per row. The last word of a heading has a line of its own.

    A label has a line of its own if it has no cells, or if the terminal has no room for both.
    """
    words = [head.rpartition(" ") for head in heads]
    lines = [("", [top for top, _, _ in words]), ("", [bottom for _, _, bottom in words]), *rows]
    filled = [(label, cells) for label, cells in lines if cells]
    widths = [2 + max(map(len, column)) for column in zip(*(cells for _, cells in filled))]
    room = max(len(label) for label, _ in filled)
    if sys.stdout.isatty():
        room = min(room, shutil.get_terminal_size().columns - sum(widths))
    for label, cells in lines:
        if not cells or len(label) > room:
            print(label)
            label = ""
        if cells:
            print(label.ljust(room) + "".join(cell.rjust(width) for cell, width in zip(cells, widths)))


def report_seeds(table: Any) -> None:
    """Print means and standard deviations over seeds of runs in a frame from `lab.experiments.tidy`."""
    from harness.runs import span
    from lab.experiments import over_seeds

    print()
    say(f"{data_of(table)}; last {span(table)} rounds: {OVER_SEEDS}")
    for (name, _), texts in over_seeds(table).iterrows():
        print(f"{name}, {texts.pop('seeds')} seeds")
        print("".join(f"             {label:<22}{text}\n" for label, text in texts.items() if text), end="")


def way_on(folders: Collection[Path], overwrite: bool = False) -> str:
    """A hint how to continue unfinished runs, or "". `overwrite`: whether the command had --overwrite."""
    if len(folders) > 1:
        without = "without --overwrite " * overwrite
        return f"; the same command {without}continues" if any(folder.exists() for folder in folders) else ""
    command = whole("python", script("madsim.py"), "--resume", *unfinished(folders))
    return f"; continue with: {command}" if unfinished(folders) else ""


def point_to(folder: Path, *tables: str) -> None:
    """Print where tables lie in a folder of runs, and the command that draws the runs."""
    if tables:
        say(f"Tables       {' and '.join(whole(folder / table) for table in tables)}", indent=INDENT)
    say(f"Figures      {whole('python', script('plot.py'), folder)}", indent=INDENT)
