"""What the terminal says: about the runs to come, about their results, and about all known names."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import astuple
from pathlib import Path
from typing import Any

from harness.folder import script, unfinished


def as_command(main: Callable[[], int]) -> int:
    """Run a `main` as a command of the shell. SIGTERM stops it as Ctrl-C does. Closed output is no traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    streams: list[Any] = [stream for stream in (sys.stdout, sys.stderr) if stream]  # None: closed by the caller
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # a folder's name may hold bytes that are not text
    try:
        try:
            return main()
        finally:
            for stream in streams:
                stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # do not write the buffered rest again
        if not isinstance(error, BrokenPipeError):  # the reader closed the pipe; other errors: a full disk
            print(f"{Path(sys.argv[0]).stem}: the output can't be written: {error}", file=sys.stderr)
        return 1


def list_names() -> None:
    """Print all names that options of the command line take, each with one sentence."""
    from lab.attacks import ATTACKS
    from lab.experiments import EXPERIMENTS, PAPER
    from lab.partitions import PARTITIONS
    from lab.rules import RULES
    from trust import PRESETS

    def first_lines(registry: dict[str, Callable]) -> dict[str, str]:
        return {name: (entry.__doc__ or "").split("\n")[0].rstrip(".") for name, entry in registry.items()}

    def difference(preset: Any) -> str:
        count = sum(one != other for one, other in zip(astuple(preset), astuple(PRESETS["paper"])))
        return f"the authors' public code: {count} settings differ" if count else "the paper, with our reading"

    experiments = {name: experiment.about for name, experiment in EXPERIMENTS.items()}
    for option, names in {
        "--attack": {name: attack.about for name, attack in ATTACKS.items()},
        "--partition": first_lines(PARTITIONS),
        "--rule": first_lines(RULES),
        "--preset": {name: difference(preset) for name, preset in PRESETS.items()},
        "--experiment": experiments | {"paper": " and ".join(PAPER)},
    }.items():
        print(option)
        print("".join(f"  {name:<17}{about}\n" for name, about in names.items()), end="")


def introduce(runs: dict[Path, Any], dataset: Any) -> None:
    """Say what is about to run: Configs, by their folders."""
    from data import malicious_count
    from harness.log import usual_seconds

    if dataset.note:
        print(f"PHANTOM IMAGES, not PneumoniaMNIST: {dataset.note}", file=sys.stderr)
    configs = runs.values()
    clients = " or ".join(map(str, sorted({config.clients for config in configs})))
    counts = {malicious_count(config.clients, config.malicious) for config in configs}
    malicious = " or ".join(map(str, sorted(counts)))
    rounds = sum(config.rounds for config in configs)
    seconds = sum(config.rounds * usual_seconds(config) for config in configs)
    print(
        f"{dataset.name}, {len(dataset.train_labels)} training images; {clients} clients, {malicious} malicious; "
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {rounds} rounds in all, about {minutes(seconds)} on two cores"
    )


def minutes(seconds: float) -> str:
    """A rough time in words: '20 seconds', '3 minutes'."""
    if seconds < 60:
        return f"{max(1, round(seconds / 10)) * 10} seconds"
    return f"{round(seconds / 60)} minute{'s' * (round(seconds / 60) > 1)}"


def report(result: Any, folder: Path) -> None:
    """Print the summary of a `madsim.Result`."""
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
        print(f"Kept         all clients in {len(s['kept_rounds'])} rounds, because all fell below the threshold")
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
    print(f"Time         {s['seconds']:.1f} s, {s['seconds_per_round']:.3f} s per round (median)")


def report_seeds(table: Any) -> None:
    """Print means and standard deviations over seeds of runs in a frame from `lab.experiments.tidy`."""
    from lab.experiments import over_seeds, span

    print(f"\nLast {span(table)} rounds: mean ± standard deviation over seeds")
    for (name, _), texts in over_seeds(table).iterrows():
        print(f"{name}, {texts.pop('seeds')} seeds")
        print("".join(f"             {label:<22}{text}\n" for label, text in texts.items() if text), end="")


def way_on(folders: Collection[Path], overwrite: bool = False) -> str:
    """A hint how to continue unfinished runs, or "". `overwrite`: whether the command had --overwrite."""
    if len(folders) > 1:
        without = "without --overwrite " * overwrite
        return f"; the same command {without}continues" if any(folder.exists() for folder in folders) else ""
    command = shlex.join(["python", script("madsim.py"), "--resume", *map(str, unfinished(folders))])
    return f"; continue with: {command}" if unfinished(folders) else ""
