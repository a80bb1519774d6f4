"""What the terminal says: of the runs to come, of what came of them, and of what can be named."""

import os
import re
import shlex
import sys
from collections.abc import Collection
from dataclasses import astuple
from pathlib import Path

import data
from bench.experiments import EXPERIMENTS, PAPER, over_seeds, span
from bench.folder import unfinished
from bench.record import usual_seconds
from bench.shell import script
from trust import PRESETS, RULES, Settings


def list_names() -> None:
    """What can be named on the command line, each in a line."""
    for option, names in known_names().items():
        print(option)
        print("".join(f"  {name:<17}{about}\n" for name, about in names.items()), end="")


def known_names() -> dict[str, dict[str, str]]:
    """What can be named on the command line: of each kind the names, each with what it is in a sentence."""
    from model import ATTACKS, OMNISCIENT

    def sentences(registry: dict) -> dict[str, str]:
        texts = {name: " ".join(function.__doc__.split()) for name, function in registry.items()}
        return {name: re.split(r"(?<!\bal)\. ", text)[0].rstrip(".") for name, text in texts.items()}

    def distance(preset: Settings) -> str:
        count = sum(one != other for one, other in zip(astuple(preset), astuple(Settings())))
        return f"{count} settings differ, see trust.py" if count else "MAD as the paper prints it"

    experiments = {name: experiment.about for name, experiment in EXPERIMENTS.items()}
    return {
        "--attack": sentences(data.ATTACKS | ATTACKS | OMNISCIENT),
        "--rule": sentences(RULES),
        "--preset": {name: distance(preset) for name, preset in PRESETS.items()},
        "--experiment": experiments | {"paper": " and ".join(PAPER)},
    }


def introduce(runs: dict, dataset: data.Dataset) -> None:
    """Say what is about to run: Configs, by their folders."""
    if dataset.note:
        print(f"PHANTOM IMAGES, not PneumoniaMNIST: {dataset.note}", file=sys.stderr)
    clients = " or ".join(str(n) for n in sorted({config.clients for config in runs.values()}))
    counts = {data.malicious_count(config.clients, config.malicious) for config in runs.values()}
    malicious = " or ".join(str(n) for n in sorted(counts))
    rounds = sum(config.rounds for config in runs.values())
    seconds = sum(config.rounds * usual_seconds(config) for config in runs.values())
    print(
        f"{dataset.name}, {len(dataset.train_labels)} training images; {clients} clients, {malicious} malicious; "
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {rounds} rounds in all, about {minutes(seconds)} on two cores"
    )


def minutes(seconds: float) -> str:
    """A rough time in words: '20 seconds', '3 minutes'."""
    if seconds < 60:
        return f"{max(1, round(seconds / 10)) * 10} seconds"
    return f"{round(seconds / 60)} minute{'s' * (round(seconds / 60) > 1)}"


def common_folder(folders: Collection[Path]) -> str:
    """The run's folder, or the nearest that holds them all."""
    whole = os.path.commonpath([folder.absolute() for folder in folders])
    return str(*folders) if len(folders) == 1 else os.path.relpath(whole)


def report(result, folder: Path) -> None:
    """The plain summary at the end of a run, of its `madsim.Result`."""
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
    print(f"Time         {s['seconds']:.1f} s, {s['seconds_per_round']:.3f} s a round (median)")


def report_seeds(table) -> None:
    """For runs that differ in the seed alone, given as `tidy` does, their means and deviations over the seeds."""
    print(f"\nLast {span(table)} rounds: mean ± standard deviation over seeds")
    for (name, _), texts in over_seeds(table).iterrows():
        print(f"{name}, {texts.pop('seeds')} seeds")
        print("".join(f"             {label:<22}{text}\n" for label, text in texts.items() if text), end="")


def way_on(folders: Collection[Path], overwrite: bool = False) -> str:
    """How to go on with runs of which some were begun and not finished, by a command that was to `overwrite` others."""
    if len(folders) > 1:
        without = "without --overwrite " * overwrite
        return f"; the same command {without}goes on" if any(folder.exists() for folder in folders) else ""
    command = shlex.join(["python", script("madsim.py"), "--resume", *map(str, unfinished(folders))])
    return f"; go on with: {command}" if unfinished(folders) else ""
