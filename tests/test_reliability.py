"""Tests of the promises in docs/reliability.md.

Runs are killed, stopped, or run out of disk space. Clients, files and command lines are hostile.
"""

import io
import json
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import HERE, command, examples, interrupted, part, refusal, some
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import data
import madsim
import model
import plot
import trust
from harness import cli, log
from harness.cli import main
from harness.folder import claimed, complete
from lab.attacks import ATTACKS, Attack
from madsim import Config, simulate
from trust import PRESETS, Settings, aggregate, initial_state, mad_step, squared_distances

CSV = ("rounds.csv", "clients.csv", "plane.csv")


@pytest.fixture(scope="module")
def tiny() -> data.Dataset:
    """200 training images of random noise. A round takes about 15 ms."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (240, 28, 28), np.uint8), rng.integers(0, 2, 240)
    return data.Dataset(images[:200], labels[:200], images[200:], labels[200:], name="tiny", md5="none")


@pytest.fixture
def quick(tiny, monkeypatch):
    """The command line uses the tiny data set instead of the phantom."""
    monkeypatch.setattr(data, "phantom", lambda seed=0, note="": replace(tiny, note=note))


def csv_bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in CSV]


def stop_in(monkeypatch, round_: int, stop) -> None:
    """Make every later run call `stop()` in the middle of round `round_`."""
    mad_step_itself = madsim.mad_step

    def step(W, state, t, *rest):
        if t == round_:
            stop()
        return mad_step_itself(W, state, t, *rest)

    monkeypatch.setattr(madsim, "mad_step", step)


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped_and_whole(tiny, tmp_path_factory) -> Path:
    """A folder with two folders of the same run: `whole` is complete, `stopped` was stopped in round 4 of 6.

    Two clients are excluded in round 2, so some fields are empty.
    """
    config = Config(rounds=6, mad_start=3, dataset="phantom", attack="nan", attack_start=2)
    place = tmp_path_factory.mktemp("runs")
    simulate(config, place / "whole", dataset=tiny)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 4, interrupt)
        result = interrupted(config, place / "stopped", dataset=tiny)
    assert not result.summary["complete"] and len(result.rounds) == 3
    assert [*result.summary["excluded"].values()] == [2, 2]
    return place


@pytest.fixture
def stopped(stopped_and_whole, tmp_path) -> tuple[Path, Path]:
    """Copies of the two folders, for one test."""
    shutil.copytree(stopped_and_whole, tmp_path, dirs_exist_ok=True)
    return tmp_path / "stopped", tmp_path / "whole"


def resume(folder: Path, dataset: data.Dataset) -> madsim.Result:
    return simulate(Config.read(folder), folder, dataset=dataset, resume=True)


# ---------------------------------------------------------------- killed

# These runs kill themselves with SIGKILL. Each waits for the `count`-th time that its moment comes, or for a number of
# seconds. They are forks of a process that has already trained some rounds. This saves some seconds per run.
KILLED = """
import json, os, signal, sys, threading
import numpy as np
import data, madsim
from harness import cli, log
from harness.cli import main
from harness.folder import claimed, complete
from lab.attacks import ATTACKS, Attack

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def on_call(owner, name, count, act):
    # In its `count`-th call the function is replaced by `act`.
    function, calls = getattr(owner, name), []
    def call(*args):
        calls.append(args)
        return act(function, *args) if len(calls) == count else function(*args)
    setattr(owner, name, call)

def half_a_row(write, table, rows):
    line = ",".join(map(str, rows[0]))
    table.file.write(line[: len(line) // 2].encode())
    table.file.flush()
    die()

def prepare(moment, count):
    if moment == "half a row":
        on_call(log.Table, "_write", count, half_a_row)
    elif moment == "between two rows":
        on_call(log.Table, "append", count, lambda append, *args: (append(*args), die()))
    elif moment == "checkpoint unfinished":
        on_call(os, "fsync", count, lambda fsync, number: die())
    elif moment == "before the checkpoint's name":
        on_call(os, "replace", count, lambda rename, *paths: die())
    elif moment == "after the checkpoint's name":
        on_call(os, "replace", count, lambda rename, *paths: (rename(*paths), die()))
    else:
        threading.Timer(float(moment), die).start()

arrays, folder, moments, run = *sys.argv[1:3], *map(json.loads, sys.argv[3:])
log.CHECKPOINT_SECONDS = 0.03
with np.load(arrays) as found:
    dataset = data.Dataset(*(found[name] for name in ("a", "b", "c", "d")), name="tiny", md5="none")
madsim.simulate(madsim.Config(rounds=3, attack="nan", attack_start=2), dataset=dataset)  # with all, and without two
for i, (moment, count) in enumerate(moments):
    process = os.fork()
    if not process:
        prepare(moment, count)
        madsim.simulate(madsim.Config(**run), os.path.join(folder, str(i)), dataset=dataset)
        os._exit(0)
    print(os.waitpid(process, 0)[1], flush=True)
"""
MOMENTS = [  # (moment, count). A checkpoint syncs four files. config.json is the first file that is renamed.
    ("half a row", 3 * 20 + 4), ("half a row", 3 * 3 + 5), ("half a row", 3 * 9 + 6),  # one for each file in CSV
    ("between two rows", 3 * 18 + 1), ("checkpoint unfinished", 1 + 4 * 3), ("checkpoint unfinished", 1 + 4 * 3 + 1),
    ("before the checkpoint's name", 5), ("after the checkpoint's name", 5),
]  # fmt: skip


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing_for_good(tiny, tmp_path):
    """SIGKILL ends a run while it writes a row or a checkpoint, or at a random moment.

    The resumed run gives the same bytes as the run that was never killed. Two clients submit NaN from round 5 on, so
    most resumed runs continue without them.
    """
    arrays = (tiny.train_images, tiny.train_labels, tiny.test_images, tiny.test_labels)
    np.savez(tmp_path / "arrays.npz", **dict(zip("abcd", arrays)))
    run, seed = {"rounds": 25, "mad_start": 15, "attack": "nan", "attack_start": 5}, time.time_ns()
    print(f"random moments of seed {seed}")  # shown if the test fails
    moments = MOMENTS + [(f"{seconds:.3f}", 0) for seconds in np.random.default_rng(seed).uniform(0, 0.4, 5)]
    runs = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "arrays.npz", tmp_path, json.dumps(moments), json.dumps(run)],
        cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    simulate(Config(**run), tmp_path / "whole", dataset=tiny)
    whole, rounds = csv_bytes(tmp_path / "whole"), []
    assert [int(line) for line in runs.communicate()[0].split()] == [signal.SIGKILL] * len(moments)
    for i, (moment, _) in enumerate(moments):
        folder = tmp_path / str(i)
        if not (folder / "checkpoint.npz").exists():  # killed before its first round
            assert not (folder / CSV[1]).exists() or b"\n1," not in (folder / CSV[1]).read_bytes()
            continue
        with np.load(folder / "checkpoint.npz", allow_pickle=False) as checkpoint:
            rounds.append(int(checkpoint["round"]))
        result = resume(folder, tiny)
        assert csv_bytes(folder) == whole, moment
        assert result.summary["complete"] and not list(folder.glob("*.part"))
    assert sum(0 < t < 25 for t in rounds) > len(rounds) / 2  # most were resumed in the middle


def test_rows_beyond_the_checkpoint_and_a_torn_last_one_are_dropped(stopped, tiny):
    folder, whole = stopped
    expected = csv_bytes(whole)
    for name, content in zip(CSV, expected):
        # Round 6 has begun. Its last row is torn.
        (folder / name).write_bytes(content[: int(len(content) * 0.9)].rstrip())
        assert not (folder / name).read_bytes().endswith(b"\n")
    resume(folder, tiny)
    assert csv_bytes(folder) == expected


def test_a_resumed_run_gives_the_result_of_the_whole_one(stopped, tiny, tmp_path):
    folder, _ = stopped
    resumed, whole = resume(folder, tiny), simulate(Config.read(folder), dataset=tiny)
    for name in ("rounds", "clients"):
        assert getattr(resumed, name).equals(getattr(whole, name))
        assert (getattr(resumed, name).dtypes == getattr(whole, name).dtypes).all()
    assert (resumed.weights == whole.weights).all()
    timeless = [
        {name: value for name, value in result.summary.items() if not name.startswith("seconds")}
        for result in (resumed, whole)
    ]
    assert timeless[0] == timeless[1]
    (part,) = json.loads((folder / "config.json").read_text())["resumed"]
    assert part["after_round"] == 3 and set(part) == {"after_round", "command", "git", "versions", "machine", "plugins"}


def test_a_complete_run_is_left_as_it_is(stopped, tiny):
    _, whole = stopped
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.suffix in (".csv", ".json")}
    result = resume(whole, tiny)
    assert result.summary["complete"] and len(result.rounds) == 6
    assert {name: (whole / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(("seconds", "expected"), [(0, 7), (1e9, 2)])
def test_checkpoints_come_by_the_clock(seconds, expected, tiny, tmp_path, monkeypatch):
    """A checkpoint is saved before the first round and at the end.

    In between, it is saved after every round that ends at least CHECKPOINT_SECONDS after the last checkpoint.
    """
    saved, save = [], log.Log.save
    monkeypatch.setattr(log, "CHECKPOINT_SECONDS", seconds)
    monkeypatch.setattr(log.Log, "save", lambda log: saved.append(save(log)))
    simulate(Config(rounds=5), tmp_path / "run", dataset=tiny)
    assert len(saved) == expected


# ---------------------------------------------------------------- stopped by a signal, or by the disk


@pytest.fixture(scope="module")
def phantom_run(phantom, tmp_path_factory) -> Path:
    """The folder of a run of 9 rounds on the phantom. MAD starts in round 4."""
    config = Config(rounds=9, mad_start=4, dataset="phantom")
    folder = tmp_path_factory.mktemp("whole") / config.name
    simulate(config, folder, dataset=phantom)
    return folder


# A run that sends itself a signal some time after round 4. The last round waits for it.
SIGNALLED = """
import os, sys, threading, time
import madsim
from harness.cli import main
from harness.folder import claimed, complete
from harness.console import as_command
number, delay = int(sys.argv[1]), float(sys.argv[2])
step = madsim.mad_step
def mad_step(W, state, t, *rest):
    if t == 4:
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    if t == 9:
        time.sleep(60)
    return step(W, state, t, *rest)
madsim.mad_step = mad_step
sys.argv = ["madsim.py", *sys.argv[3:]]
sys.exit(as_command(main))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_folder_that_can_be_resumed_and_says_how(number, phantom_run, tmp_path, capsys):
    """The signal comes at a random moment."""
    words = ["--rounds", "9", "--mad-start", "4", "--dataset", "phantom", "--threads", "1", "--out", tmp_path]
    code = [sys.executable, "-c", SIGNALLED, str(int(number)), str(random.uniform(0, 1.2)), *map(str, words)]
    done = subprocess.run(code, cwd=HERE, capture_output=True, text=True, timeout=100)
    folder = tmp_path / phantom_run.name
    written = (folder / CSV[0]).read_bytes().count(b"\n") - 1
    with np.load(folder / "checkpoint.npz", allow_pickle=False) as checkpoint:
        assert int(checkpoint["round"]) == written
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert json.loads((folder / "summary.json").read_text())["complete"] is False
    assert f"Stopped      after round {written} of 9; continue with: python" in done.stdout
    assert main(["--resume", str(folder)]) == 0
    assert "(attacker) in round 4" in capsys.readouterr().out
    assert csv_bytes(folder) == csv_bytes(phantom_run)


def signal_after(monkeypatch, owner, name: str, when) -> None:
    """Send SIGINT to this process after the first call of a function for which `when(*arguments)` is true."""
    function = getattr(owner, name)

    def call(*arguments):
        result = function(*arguments)
        if when(*arguments):
            monkeypatch.setattr(owner, name, function)
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [
        (log.Table, "append", lambda table, rows: table.path.name == "rounds.csv" and rows[0][0] == 3),
        (log.Table, "append", lambda table, rows: table.path.name == "clients.csv" and rows[0][0] == 3),
        (log.Log, "last_marks", lambda run: run.rounds.filled == 3),
    ],
    ids=["after the round's row", "after the clients' rows", "before the last assignment"],
)
def test_a_signal_while_a_round_is_recorded_waits_until_it_is(owner, name, when, tiny, stopped_and_whole, tmp_path):
    """Rows, checkpoint and summary then agree on the round. In earlier versions the rows were one round ahead."""
    config, folder = Config.read(stopped_and_whole / "whole"), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, owner, name, when)
        result = interrupted(config, folder, dataset=tiny)
    assert len(result.rounds) == 3 and not result.summary["complete"]
    assert (folder / "rounds.csv").read_bytes().count(b"\n") == 4
    assert (folder / "clients.csv").read_bytes().count(b"\n") == 31
    with np.load(folder / "checkpoint.npz") as checkpoint:
        assert checkpoint["round"] == 3
    simulate(config, folder, dataset=tiny, resume=True)
    assert csv_bytes(folder) == csv_bytes(stopped_and_whole / "whole")


def test_a_signal_after_the_last_round_leaves_a_complete_run(tiny, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, log.Log, "last_marks", lambda run: run.rounds.filled == 2)
        result = interrupted(Config(rounds=2), tmp_path / "run", dataset=tiny)
    assert result.summary["complete"] and complete(tmp_path / "run")


def test_a_signal_after_the_last_round_is_no_failure_of_a_command(quick, tmp_path, capsys):
    words = ["--rounds", "2", "--dataset", "phantom", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, log.Log, "last_marks", lambda run: run.rounds.filled == 2)
        assert main(words) == 0
    assert "Stopped" not in capsys.readouterr().out


def test_an_interruption_ends_a_loop_of_runs(tiny, tmp_path, monkeypatch):
    """The run is saved, and the exception brings the rounds that were complete."""
    done = []
    stop_in(monkeypatch, 2, interrupt)
    with pytest.raises(KeyboardInterrupt) as stop:
        for seed in range(3):
            done.append(simulate(Config(rounds=3, seed=seed), tmp_path / str(seed), dataset=tiny))
    assert done == [] and [path.name for path in tmp_path.iterdir()] == ["0"]
    assert stop.value.result.rounds["round"].tolist() == [1] and not stop.value.result.summary["complete"]
    monkeypatch.undo()
    assert resume(tmp_path / "0", tiny).summary["complete"]


def test_a_summary_has_all_its_keys_before_the_first_round(tiny, tmp_path, monkeypatch):
    config = Config(rounds=2, membership=1)
    whole = simulate(config, dataset=tiny).summary
    stop_in(monkeypatch, 1, interrupt)
    summary = interrupted(config, tmp_path / "run", dataset=tiny).summary
    assert list(summary) == list(whole) and summary["last_50"].keys() == whole["last_50"].keys()
    unchanged = {name: whole[name] for name in ("malicious", "training_images", "dataset", "note")}
    assert len(unchanged["malicious"]) == 2 and summary == summary | unchanged
    assert (summary["excluded"], summary["jumps"], summary["last_50_rounds"], summary["seconds"]) == ({}, [], 0, 0)
    assert summary["seconds_per_round"] is None and summary["complete"] is False
    assert not (tmp_path / "run" / "summary.json").exists()  # it lists runs in tables


def test_a_second_signal_while_the_run_ends_does_not_lose_its_summary(tiny, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 3, interrupt)
        signal_after(patch, log.Log, "save", lambda run: run.last[1].round == 2)
        with pytest.raises(KeyboardInterrupt):
            simulate(Config(rounds=5), tmp_path / "run", dataset=tiny)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not summary["complete"] and summary["last_50_rounds"] == 2


def test_a_run_stopped_before_its_first_round_ends_can_be_resumed(tiny, quick, tmp_path, capsys, monkeypatch):
    words = ["--rounds", "3", "--dataset", "phantom", "--out", str(tmp_path)]
    folder = tmp_path / "nomad-rounds3-phantom-s0"
    with monkeypatch.context() as patch:
        stop_in(patch, 1, interrupt)
        assert main(words) == 130
    assert f"before the first round ended; continue with: python madsim.py --resume {folder}" in capsys.readouterr().out
    assert main(["--resume", str(folder)]) == 0
    assert (folder / CSV[0]).read_bytes().count(b"\n") == 4


@pytest.mark.slow
def test_several_runs_are_resumed_at_once_in_any_number_of_processes(quick, tmp_path, monkeypatch):
    """Whole runs in two processes, whole runs in this process, and resumed runs give the same bytes."""
    words = ["--rounds", "5", "--clients", "4", "--malicious", "0.25", "--dataset", "phantom"]
    for jobs, place in (("2", "whole"), ("1", "in one")):
        assert main([*words, "--mad-start", "2", "never", "--jobs", jobs, "--out", str(tmp_path / place)]) == 0
    folders = [tmp_path / "cut" / path.name for path in sorted((tmp_path / "whole").glob("*mad*"))]
    with monkeypatch.context() as patch:
        stop_in(patch, 3, interrupt)
        for start in ("2", "never"):
            assert main([*words, "--mad-start", start, "--out", str(tmp_path / "cut")]) == 130
    assert main(["--resume", *map(str, folders), "--jobs", "1"]) == 0
    for folder in folders:
        assert csv_bytes(folder) == csv_bytes(tmp_path / "whole" / folder.name)
        assert csv_bytes(folder) == csv_bytes(tmp_path / "in one" / folder.name)


def test_an_interruption_ends_all_of_several_runs_in_one_process_and_they_go_on(quick, tmp_path, capsys, monkeypatch):
    words = "--rounds 3 --clients 4 --malicious 0.25 --dataset phantom --jobs 1 --mad-start 2 never"
    words = [*words.split(), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_in(patch, 2, interrupt)
        assert main(words) == 130
    (cut,) = tmp_path.iterdir()  # the second run was not started
    assert capsys.readouterr().err == "\nmadsim: stopped; the same command continues\n"
    assert main(words) == 0
    assert {path.name for path in tmp_path.glob("*mad*")} > {cut.name}
    for path in tmp_path.glob("*mad*"):
        assert (path / CSV[0]).read_bytes().count(b"\n") == 4
    capsys.readouterr()
    assert main(words) == 0  # there is nothing left to do
    assert capsys.readouterr().out.count(" is complete\n") == 2
    with monkeypatch.context() as patch:
        stop_in(patch, 2, interrupt)
        assert main([*words, "--overwrite"]) == 130
    assert "stopped; the same command without --overwrite continues\n" in capsys.readouterr().err


def test_an_experiment_goes_on_where_it_stopped(grid, tmp_path, capsys, monkeypatch):
    """The experiment is stopped in round 3 of a run. Then it is killed while it makes a folder.

    The runs that are complete are not run again.
    """
    assert main([*grid, "--out", str(tmp_path / "whole")]) == 0
    assert main([*grid[:-1], "1", "--out", str(tmp_path / "cut")]) == 0  # with one seed, then with two
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("rounds.csv")}
    assert len(first) == 2
    with monkeypatch.context() as patch:
        stop_in(patch, 3, interrupt)
        assert main([*grid, "--out", str(tmp_path / "cut")]) == 130
    assert "madsim: stopped; the same command continues\n" in capsys.readouterr().err
    (last,) = {path.name for path in (tmp_path / "whole" / "grid").iterdir()} - {
        path.name for path in (tmp_path / "cut" / "grid").iterdir()
    }
    (tmp_path / "cut" / "grid" / last).mkdir()
    for name in ("config.json.part", "rounds.csv", "checkpoint.npz.part"):
        (tmp_path / "cut" / "grid" / last / name).write_text("{")
    assert main([*grid, "--out", str(tmp_path / "cut")]) == 0
    assert "2 runs, 8 rounds in all" in capsys.readouterr().out
    assert main([*grid, "--out", str(tmp_path / "cut")]) == 0  # there is nothing left to do
    assert "rounds in all" not in capsys.readouterr().out
    for path in (tmp_path / "whole").rglob("*.csv"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in first} == first


def test_an_experiment_does_not_take_other_runs_for_its_own(grid, tmp_path, capsys):
    assert main([*grid, "--out", str(tmp_path)]) == 0
    folder = next(path for path in (tmp_path / "grid").iterdir() if path.is_dir())
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"lr": 0.5}))
    assert "has lr 0.5, not 0.001" in refusal(capsys, *grid, "--out", tmp_path)
    (folder / "config.json").write_text(json.dumps(about | {"data": about["data"] | {"md5": "other"}}))
    assert "has data's MD5 other, not" in refusal(capsys, *grid, "--out", tmp_path)
    (folder / "config.json").write_text(json.dumps(about | {"data": None}))
    assert "has data's MD5 None, not" in refusal(capsys, *grid, "--out", tmp_path)
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "summary.json").write_text('{"complete": true}')
    assert f"{folder}: its files are damaged" in refusal(capsys, *grid, "--out", tmp_path)
    for path in folder.iterdir():
        path.unlink()
    (folder / "mine.txt").touch()
    assert "exists; add --overwrite" in refusal(capsys, *grid, "--out", tmp_path)
    assert (folder / "mine.txt").exists()


def test_a_run_that_fails_leaves_the_others_of_an_experiment(grid, tmp_path, capsys, monkeypatch):
    """All clients of one run diverge in round 3. This run is named and left out of the means."""
    step = madsim.mad_step

    def diverge(W, state, t, *rest):
        if t == 3 and not failed:
            failed.append(t)
            raise FloatingPointError("round 3: every client's weights are NaN")
        return step(W, state, t, *rest)

    failed = []
    monkeypatch.setattr(madsim, "mad_step", diverge)
    assert main([*grid, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "s0: round 3: every client's weights are NaN" in err
    text = (tmp_path / "grid" / "table.md").read_text()
    assert "Ended early: MAD from 2 none, seed 0, after round 2." in text
    assert "| MAD from 2 | none | 1 |" in text and "| MAD from 2 | two | 2 |" in text


def test_a_run_that_was_measured_for_membership_is_resumed(tiny, tmp_path, monkeypatch):
    config = Config(rounds=6, membership=2, dataset="phantom")
    simulate(config, tmp_path / "whole", dataset=tiny)
    with monkeypatch.context() as patch:
        stop_in(patch, 5, interrupt)
        interrupted(config, tmp_path / "cut", dataset=tiny)
    assert resume(tmp_path / "cut", tiny).membership["round"].tolist() == [2, 4, 6]
    for name in (*CSV, "membership.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_killed_process_of_several_is_one_line(stopped, quick, capsys, monkeypatch):
    """joblib raises this error if a process is killed, for example because the memory ran out."""
    folder, _ = stopped

    def broken(*_):
        raise BrokenProcessPool("a long\nexplanation")

    monkeypatch.setattr(cli, "simulate_all", broken)
    assert refusal(capsys, "--resume", folder) == (
        f"madsim: the process of a run was killed; continue with: python madsim.py --resume {folder}\n"
    )


def check_it_ended_in_one_line_and_goes_on(folder, whole, run, repair, reason, capsys):
    """`run` can't write its files and says how to continue. After `repair`, the resumed run gives the same bytes."""
    with pytest.raises(SystemExit) as stop:
        run()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert reason in err and f"; continue with: python madsim.py --resume {folder}\n" in err
    with np.load(folder / "checkpoint.npz", allow_pickle=False) as checkpoint:  # the checkpoint is intact
        assert checkpoint["round"] > 0
    assert csv_bytes(folder)[0].startswith(csv_bytes(whole)[0][:200])
    repair()
    assert main(["--resume", str(folder)]) == 0
    assert csv_bytes(folder) == csv_bytes(whole)


LONG = ["--rounds", "50", "--clients", "48", "--dataset", "phantom"]


@pytest.fixture(scope="module")
def long_run(tiny, tmp_path_factory) -> Path:
    """The folder of a run whose clients.csv becomes larger than its checkpoint."""
    config = Config(rounds=50, clients=48, dataset="phantom")
    folder = tmp_path_factory.mktemp("long") / config.name
    simulate(config, folder, dataset=tiny)
    assert (folder / "clients.csv").stat().st_size > 130_000 > (folder / "checkpoint.npz").stat().st_size
    return folder


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_in_one_line(long_run, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "CHECKPOINT_SECONDS", 0.1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))
        try:
            main([*LONG, "--out", str(tmp_path)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    folder = tmp_path / long_run.name
    check_it_ended_in_one_line_and_goes_on(folder, long_run, run, lambda: None, "File too large", capsys)


def mount(*words: str | Path) -> None:
    """Run `mount WORDS`. Skip the test if this process may not mount."""
    if subprocess.run(["mount", *words], capture_output=True).returncode:
        pytest.skip("it takes the privilege to mount a disk")


@pytest.fixture
def disk(tmp_path):
    """A disk of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=300k", "tmpfs", place)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line(long_run, quick, disk, capsys, monkeypatch):
    monkeypatch.setattr(log, "CHECKPOINT_SECONDS", 0.1)
    check_it_ended_in_one_line_and_goes_on(
        disk / long_run.name, long_run, lambda: main([*LONG, "--out", str(disk)]),
        lambda: mount("-o", "remount,size=10m", disk), "No space left on device", capsys,
    )  # fmt: skip


def test_a_folder_that_turns_read_only_ends_in_one_line(quick, tmp_path, capsys, monkeypatch):
    """The folder turns read-only in round 4. Files that are open can still be written, but a checkpoint can't."""
    words, name = ["--rounds", "6", "--dataset", "phantom"], "nomad-rounds6-phantom-s0"
    monkeypatch.setattr(log, "CHECKPOINT_SECONDS", 0)
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    folder = tmp_path / "cut" / name

    def lock_up():
        mount("--bind", folder, folder)
        mount("-o", "remount,bind,ro", folder)

    with monkeypatch.context() as patch:
        stop_in(patch, 4, lock_up)
        check_it_ended_in_one_line_and_goes_on(
            folder, tmp_path / "whole" / name, lambda: main([*words, "--out", str(tmp_path / "cut")]),
            lambda: (subprocess.run(["umount", folder], check=True), patch.undo()), "Read-only file system", capsys,
        )  # fmt: skip


# ---------------------------------------------------------------- the same seed, the same bytes


FEDERATIONS = {
    "ten": {},
    "twenty-three": {"clients": 23},
    "unequal": {"clients": 7, "partition": "dirichlet", "malicious": 0.3},
    "unequal in size": {"clients": 23, "partition": "quantity", "rule": "geometric_median"},
    "many": {"clients": 45, "malicious": 0.1},
    "odd batches": {"clients": 5, "batch_size": 7, "epochs": 2},
    "one by one": {"method": "loop"},
}


@pytest.mark.parametrize("name", some(FEDERATIONS, "unequal", "one by one"))
@pytest.mark.parametrize("kind", some(["phantom", "PneumoniaMNIST"], "phantom"))
def test_runs_of_one_seed_differ_in_nothing_but_their_threads(name, kind, request, monkeypatch, tmp_path):
    """Any number of threads, and blocks of any size, give the same bytes and weights. Another seed gives others.

    So does a run that goes on with another number of threads. config.json states the number of threads.
    """
    dataset = part(request.getfixturevalue("real" if kind == "PneumoniaMNIST" else "phantom"))
    threads = (1, 2, 3, 4, 7, 10) if conftest.FULL else (1, 3)
    config = Config(rounds=3, mad_start=2, **FEDERATIONS[name])
    runs = {f"{n} threads": replace(config, threads=n) for n in threads} | {"other": replace(config, seed=1)}
    found = {folder: simulate(run, tmp_path / folder, dataset=dataset).weights for folder, run in runs.items()}
    for block in (1, 60, 1280) if conftest.FULL else (60,):
        monkeypatch.setattr(model, "BLOCK", block)
        folder = f"blocks of {block} images"
        found[folder] = simulate(config, tmp_path / folder, dataset=dataset).weights
    simulate(replace(config, rounds=2, threads=2), tmp_path / "resumed", dataset=dataset)
    found["resumed"] = simulate(replace(config, threads=3), tmp_path / "resumed", dataset=dataset, resume=True).weights
    first, other = csv_bytes(tmp_path / "1 threads"), csv_bytes(tmp_path / "other")
    assert first[0] != other[0] and first[1] != other[1]
    for folder in found.keys() - {"other"}:
        assert csv_bytes(tmp_path / folder) == first, folder
        assert np.array_equal(found[folder], found["1 threads"]), folder
    stated = [json.loads((tmp_path / f"{n} threads" / "config.json").read_text())["machine"] for n in threads]
    assert [machine["threads"] for machine in stated] == list(threads)


def threads_of_products() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


class Watched(np.ndarray):
    """Remembers in SEEN how many threads the products of such arrays may use."""

    def __matmul__(self, other):
        SEEN.append(threads_of_products())
        return np.asarray(self) @ np.asarray(other)


SEEN: list[set[int]] = []


def test_scoring_and_rules_take_products_on_one_thread():
    """With two, the last digits may be others. Outside, the caller's number holds."""

    def rule(W, weights, f):
        squared_distances(W.view(Watched))
        SEEN.append(threads_of_products())
        return W[0]

    SEEN.clear()
    with threadpool_limits(2, "blas"):
        squared_distances(np.ones((3, 5000), np.float32).view(Watched))
        aggregate(np.ones((3, 20), np.float32), np.ones(3), np.ones(3, bool), rule)
        assert len(SEEN) > 3 and all(seen == {1} for seen in SEEN)
        assert threads_of_products() == {2}


def test_a_rule_may_use_threads_of_its_own():
    """Each of them takes products. They must not wait for the rule to end."""

    def rule(W, weights, f):
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(squared_distances, [W, W], timeout=20))
        return W[0]

    assert aggregate(np.ones((3, 20)), np.ones(3), np.ones(3, bool), rule).tolist() == [1] * 20


# ---------------------------------------------------------------- hostile submissions


def filled(value: float):
    return lambda W, w, rng: torch.full_like(W, value)


def one_by_one(W, w, rng):
    """Each client lies four times as far away as the one before. The farther one hides the nearer one for a round."""
    return w + (W - w) * 4.0 ** torch.arange(len(W))[:, None]


@pytest.fixture(scope="module")
def quarter(phantom) -> data.Dataset:
    """A quarter of the phantom. A round of ten clients takes about 50 ms."""
    images, labels = phantom.train_images[::4], phantom.train_labels[::4]
    tests, test_labels = phantom.test_images[::4], phantom.test_labels[::4]
    return replace(phantom, train_images=images, train_labels=labels, test_images=tests, test_labels=test_labels)


SUBMISSIONS = {
    "nan": filled(float("nan")), "infinity": filled(float("inf")), "minus infinity": filled(float("-inf")),
    "1e30": filled(1e30), "float32's greatest": filled(torch.finfo(torch.float32).max), "zeros": filled(0.0),
    "one NaN": lambda W, w, rng: torch.cat([W[:, :-1], W.new_full((len(W), 1), float("nan"))], 1),
    "opposite": lambda W, w, rng: torch.stack([torch.full_like(w, 1e30 * (-1) ** i) for i in range(len(W))]),
    "noise": lambda W, w, rng: torch.from_numpy(rng.normal(size=W.shape)).to(W),
    "one by one": one_by_one,
    "all, one by one": lambda W, w, rng: torch.cat([torch.full_like(W[:1], float("nan")), W[1:]]),
}  # fmt: skip


@pytest.mark.parametrize("name", some(SUBMISSIONS, "nan", "1e30", "zeros", "noise"))
def test_no_submission_gets_in_or_costs_an_honest_client_its_place(name, quarter, monkeypatch):
    """Four of ten clients submit it from round 1 on.

    Every round ends, the scores stay in their range, and the four clients are excluded.
    """
    monkeypatch.setitem(ATTACKS, "own", Attack("", submit=SUBMISSIONS[name]))
    run = simulate(Config(rounds=6, mad_start=1, malicious=0.4, attack="own"), dataset=quarter)
    assert run.rounds["round"].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(run.weights).all() and np.isfinite(run.rounds.to_numpy(float)).all()
    for score in ("d", "reputation", "trust"):
        assert run.clients[score].dropna().between(0, 1).all()
    assert run.summary["false_exclusions"] == 0
    excluded = [run.summary["excluded"].get(client) for client in run.summary["malicious"]]
    if name == "one by one":  # the first one submits the model that it trained, which is no attack
        assert excluded == [None, 3, 2, 1]
    elif name == "all, one by one":
        assert excluded == [1, 2, 3, 4] and run.rounds.active.iloc[-1] == 6
    else:
        assert run.summary["true_exclusions"] == 4


@pytest.mark.parametrize("name", ["1e30", "noise"])
def test_without_mad_such_a_submission_ruins_the_model(name, quarter, monkeypatch):
    """The negative control: FedAvg averages the same submissions."""
    monkeypatch.setitem(ATTACKS, "own", Attack("", submit=SUBMISSIONS[name]))
    config = Config(rounds=4, malicious=0.4, attack="own")
    try:
        attacked = simulate(config, dataset=quarter).rounds.test_loss.iloc[-1]
    except FloatingPointError:  # no client can continue training from this model
        return
    peace = simulate(replace(config, attack="label_flip", malicious=0.0), dataset=quarter)
    assert not attacked < 2 * peace.rounds.test_loss.iloc[-1]


def test_models_without_any_difference_cost_nobody_its_place(tiny):
    """With a learning rate of 0, all clients submit the global model, so the spread is 0."""
    run = simulate(Config(rounds=3, mad_start=1, lr=0.0), dataset=tiny)
    assert run.summary["excluded"] == {}
    assert (run.clients.d == 1).all() and (run.clients.trust == 1).all() and (run.clients.distance == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("malicious", "seed"), [(0.2, 1), (0.2, 2), (0.3, 0)])
def test_copies_of_an_honest_model_cost_nobody_its_place(malicious, seed, phantom, monkeypatch):
    """All malicious clients submit a copy of one honest client's model.

    If the copies counted as separate models, honest clients would be excluded in each of these cases, because the
    copies form a cluster without spread.
    """
    half = replace(phantom, train_images=phantom.train_images[::2], train_labels=phantom.train_labels[::2])
    attack = model.Clients.attack

    def copy(clients, W, w, asked, t):
        bad = torch.from_numpy(clients.malicious[asked])
        W[bad] = W[~bad][0]
        return attack(clients, W, w, asked, t)

    monkeypatch.setattr(model.Clients, "attack", copy)
    monkeypatch.setitem(ATTACKS, "copy", Attack(""))
    config = Config(rounds=5, mad_start=1, malicious=malicious, seed=seed, attack="copy")
    run = simulate(config, dataset=half)
    assert run.summary["excluded"] == {} and (run.rounds.active == 10).all()
    monkeypatch.setattr(trust, "originals", lambda W: np.ones(len(W), bool))
    assert simulate(config, dataset=half).summary["false_exclusions"] > 0  # the negative control


def test_a_federation_of_one_client_goes_on(tiny):
    run = simulate(Config(rounds=3, mad_start=1, clients=1, malicious=0.0), dataset=tiny)
    assert run.rounds.active.tolist() == [1, 1, 1] and (run.clients.trust == 1).all()


@pytest.mark.slow
def test_one_client_left_of_three_keeps_its_place(tiny, monkeypatch):
    """The malicious client is excluded for its distance, one honest client for NaN. The last one continues alone."""
    train = model.Clients.train

    def break_one(clients, w, asked, t):
        W, losses = train(clients, w, asked, t)
        honest = np.flatnonzero(~clients.malicious & asked)
        if t == 3 and len(honest) == 2:
            W[np.flatnonzero(np.flatnonzero(asked) == honest[0])] = float("nan")
        return W, losses

    monkeypatch.setattr(model.Clients, "train", break_one)
    monkeypatch.setitem(ATTACKS, "far", Attack("", submit=filled(1e30)))
    run = simulate(Config(rounds=5, mad_start=1, clients=3, malicious=0.34, attack="far"), dataset=tiny)
    assert run.rounds.active.tolist() == [2, 2, 1, 1, 1]
    assert run.rounds[["loss", "test_loss"]].notna().all(axis=None)


def rounds_of(seed: int, clients: int, rounds: int) -> list[np.ndarray]:
    """Submissions [C, 12] per round. Most clients form a cloud that moves. Some clients may lie away from it."""
    rng = np.random.default_rng(seed)
    apart = np.arange(clients) < rng.integers(0, (clients + 1) // 2)
    far = rng.uniform(0, 8, (rounds, 1, 1)) * apart[:, None]
    return list(rng.normal(size=(rounds, clients, 12)) + far + rng.normal(size=(rounds, 1, 12)))


def played(submissions: list[np.ndarray], preset: str, mad_start: int):
    state = initial_state(len(submissions[0]))
    for t, W in enumerate(submissions, 1):
        state = mad_step(np.where(state.active[:, None], W, np.nan), state, t, mad_start, PRESETS[preset])
    return state


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, 10**9), st.integers(3, 9), st.integers(1, 4), st.data())
def test_the_order_of_the_clients_does_not_matter(seed, clients, mad_start, draw):
    """Permuted clients get the permuted scores over several rounds of MAD, including its exclusions."""
    submissions, order = rounds_of(seed, clients, 5), list(draw.draw(st.permutations(range(clients))))
    state, permuted = (played(W, "paper", mad_start) for W in (submissions, [W[order] for W in submissions]))
    assert (state.active[order] == permuted.active).all()
    for name in ("distance", "d", "reputation", "trust"):
        np.testing.assert_allclose(getattr(state, name)[order], getattr(permuted, name), rtol=1e-6, atol=1e-6)


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 4), st.floats(-100, 100), st.floats(1e-3, 1e3))
def test_shifting_or_scaling_every_submission_changes_no_score(seed, mad_start, shift, scale):
    submissions = rounds_of(seed, 7, 5)
    state, moved = (played(W, "paper", mad_start) for W in (submissions, [W * scale + shift for W in submissions]))
    assert (state.active == moved.active).all()
    for name in ("d", "reputation", "trust"):
        np.testing.assert_allclose(getattr(state, name), getattr(moved, name), rtol=1e-6, atol=1e-6)


numbers = st.floats(width=32) | st.sampled_from([0.0, 1e30, -1e30, float("inf"), float("nan")])


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=2, max_size=7), st.sampled_from(sorted(PRESETS)))
def test_whatever_is_submitted_the_scores_stay_in_range(rows, preset):
    """Clients submit any float32 values for six rounds. The run continues, or an error says that nobody is left."""
    W, state = np.array(rows, np.float32), initial_state(len(rows))
    for t in range(1, 7):
        try:
            state = mad_step(W, state, t, 2, PRESETS[preset], np.zeros(3), np.ones(len(W)))
        except FloatingPointError:
            assert not np.isfinite(W[state.active]).all(1).any()
            return
        scored = ~np.isnan(state.d)
        assert state.active.any() and scored[state.active].all() and np.isfinite(W[state.active]).all()
        for scores in (state.d, state.reputation, state.trust):
            assert (np.isnan(scores) == ~scored).all()
            assert (scores[scored] >= 0).all() and (scores[scored] <= 1).all()
        assert np.isfinite(aggregate(W, np.ones(len(W)), state.active)).all()


# ---------------------------------------------------------------- hostile files


class Pickled:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def save_arrays(path: Path, arrays: dict) -> None:
    np.savez(path, **arrays)


def bomb(path: Path, name: str, compressed: bool) -> None:
    """A small npz file whose only array claims to have 8 GB. If `compressed` is set, it holds 100 MB of them."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**31,)})
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file, file.open(f"{name}.npy", "w") as member:
        member.write(header.getvalue())
        for _ in range(100 if compressed else 0):
            member.write(bytes(10**6))


def npz_of(images, labels):
    """The arrays of pneumoniamnist.npz, with the same images and labels in every split."""
    return {
        f"{split}_{kind}": a
        for split in ("train", "val", "test")
        for kind, a in (("images", images), ("labels", labels))
    }


IMAGES, NAMES = np.zeros((8, 28, 28), np.uint8), np.zeros((8, 1), np.uint8)
DATA_FILES = {
    "pickled objects": lambda path: save_arrays(path, npz_of(np.array([Pickled()] * 8, object), NAMES)),
    "wrong shapes": lambda path: save_arrays(path, npz_of(IMAGES[:, :14], NAMES[:3])),
    "wrong types": lambda path: save_arrays(path, npz_of(IMAGES.astype(float), NAMES.astype(complex))),
    "labels outside 0 and 1": lambda path: save_arrays(path, npz_of(IMAGES, NAMES + 7)),
    "truncated": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "empty": lambda path: path.write_bytes(b""),
    "a bomb": lambda path: bomb(path, "train_images", compressed=True),
    "a bomb's size": lambda path: bomb(path, "train_images", compressed=False),
}


@pytest.mark.parametrize("kind", DATA_FILES)
def test_a_hostile_data_file_gets_one_line(kind, tmp_path, capsys, monkeypatch):
    """Only the published bytes are ever opened as a data set. Every other file has another MD5."""
    monkeypatch.chdir(tmp_path)
    DATA_FILES[kind](tmp_path / data.FILE)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the file was opened"))
    line = refusal(capsys, "--data-root", tmp_path, "--out", tmp_path / "out")
    assert f"{tmp_path / data.FILE} has MD5" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [data.FILE]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"train_images": IMAGES[:, :14]}, r"train_images are uint8 \[8, 14, 28\]; they must be uint8 \[8, 28, 28\]"),
        ({"train_images": IMAGES.astype(float)}, "train_images are float64"),
        ({"train_images": IMAGES[:3]}, r"train_images are uint8 \[3, 28, 28\]; they must be uint8 \[8, 28, 28\]"),
        ({"test_labels": np.zeros(8)}, r"test_labels are float64 \[8\]; they must be int64 \[8\]"),
        ({"test_labels": np.zeros((8, 2), int)}, r"test_labels are int64 \[8, 2\]; they must be int64 \[8\]"),
        ({"test_labels": [0, 1, None] * 2 + [0, 1]}, r"test_labels are object \[8\]"),
        ({"test_labels": 0}, r"test_images are uint8 \[8, 28, 28\]; they must be uint8 \[1, 28, 28\]"),
        ({"train_images": IMAGES > 0}, "train_images are bool"),
        ({"train_images": IMAGES + np.int64(256)}, "train_images lie in 256 to [0-9]+; they must be 0 to 255"),
        ({"train_images": [[1, 2], [3]] * 4}, "train_images are no array: their rows differ in length"),
        ({"test_labels": np.array([0, 1, 2, 0, 0, 0, 0, -1])}, "test_labels lie in -1 to 2; they must be 0 or 1"),
        ({"train_images": IMAGES[:0], "train_labels": np.zeros(0, int)}, "not empty"),
    ],
)
def test_a_data_set_of_ones_own_is_checked(changed, expected):
    labels = np.arange(8) % 2
    good = {"train_images": IMAGES, "train_labels": labels, "test_images": IMAGES, "test_labels": labels}
    data.Dataset(**good, name="own", md5="")
    with pytest.raises(ValueError, match=expected):
        data.Dataset(**good | changed, name="own", md5="")


def edited(path: Path, **arrays) -> None:
    """Replace some arrays of the checkpoint. None removes an array."""
    with np.load(path) as found:
        content = dict(found)
    np.savez(path, **{name: array for name, array in (content | arrays).items() if array is not None})


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forge_marks(path: Path) -> None:
    """Valid marks, but those of files that hold only their column names."""
    heads = [(path.parent / name).read_bytes().split(b"\n")[0] + b"\n" for name in CSV]
    edited(path, marks=np.array([(len(head), zlib.crc32(head)) for head in heads]))


def mark_inside_a_row(path: Path) -> None:
    """Valid marks, but those of rounds.csv end one byte before the end of a row."""
    with np.load(path) as found:
        marks = found["marks"]
    content = (path.parent / CSV[0]).read_bytes()[: marks[0, 0] - 1]
    marks[0] = len(content), zlib.crc32(content)
    edited(path, marks=marks)


CHECKPOINTS = {  # name: (how the checkpoint is damaged, what the error line says)
    "absent": (Path.unlink, "can't be resumed: it holds no checkpoint.npz; run it again with --overwrite"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged: "),
    "no zip": (lambda path: path.write_bytes(b"thesis" * 1000), "is damaged: "),
    "a bare array": (lambda path: np.save(open(path, "wb"), np.zeros(3)), "is damaged: "),
    "truncated": (cut_in_half, "is damaged: "),
    "pickled": (lambda path: edited(path, w=np.array([Pickled()], object)), "allow_pickle=False"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Pickled())), "is damaged: "),
    "a bomb": (lambda path: bomb(path, "w", compressed=True), "is damaged: it is compressed"),
    "a bomb's size": (lambda path: bomb(path, "w", compressed=False), "is damaged: "),
    "an array missing": (lambda path: edited(path, trust=None), "is damaged: it lacks trust"),
    "another shape": (lambda path: edited(path, w=np.zeros(5, np.float32)), "w is float32 [5], not float32 [21166]"),
    "another type": (lambda path: edited(path, trust=np.zeros(10, int)), "trust is int64 [10], not float64 [10]"),
    "NaN": (lambda path: edited(path, w=np.full(21166, np.nan, np.float32)), "its numbers are out of range"),
    "trust above 1": (lambda path: edited(path, trust=np.full(10, 2.0)), "its numbers are out of range"),
    "a wild spread": (lambda path: edited(path, spread=np.array(np.nan)), "its numbers are out of range"),
    "a negative distance": (lambda path: edited(path, distance=np.full(10, -1.0)), "its numbers are out of range"),
    "endless seconds": (lambda path: edited(path, seconds=np.full(3, np.inf)), "its numbers are out of range"),
    "a round not yet run": (lambda path: edited(path, kept_rounds=np.array([4])), "its numbers are out of range"),
    "fewer tables": (
        lambda path: edited(path, marks=np.ones((2, 2), int)),
        "was written by another version, with other",
    ),
    "no marks": (lambda path: edited(path, marks=np.zeros((3, 2), int)), "rounds.csv has other columns or more rows"),
    "nobody active": (lambda path: edited(path, active=np.zeros(10, bool)), "its numbers are out of range"),
    "another round": (lambda path: edited(path, round=np.array(5)), "3 rounds were timed, not 5"),
    "a negative round": (lambda path: edited(path, round=np.array(-1)), "3 rounds were timed, not -1"),
    "other marks": (lambda path: edited(path, marks=np.ones((3, 2), int)), "rounds.csv was changed or cut short"),
    "marks inside a row": (mark_inside_a_row, "rounds.csv has other columns or more rows than its run"),
    "marks of no rows": (forge_marks, "rounds.csv holds 0 rows at round 3 of the checkpoint"),
    "no JSON": (lambda path: edited(path, run=np.array("{")), "is damaged: "),
    "a list": (lambda path: edited(path, run=np.array("[]")), "is damaged: "),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_hostile_checkpoint_gets_one_line(kind, stopped, quick, capsys, monkeypatch):
    folder, _ = stopped
    monkeypatch.chdir(folder.parent)
    damage, expected = CHECKPOINTS[kind]
    damage(folder / "checkpoint.npz")
    before = csv_bytes(folder)
    assert expected in refusal(capsys, "--resume", folder)
    assert csv_bytes(folder) == before and not Path("unpickled").exists()


def rewritten(content: str | bytes):
    return lambda folder: (folder / "config.json").write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def with_fields(**changed):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


FOLDERS = {
    "no folder": (shutil.rmtree, "is not a run's folder: there is no such folder"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "it holds no config.json"),
    "half a config.json": (lambda folder: cut_in_half(folder / "config.json"), "config.json is damaged: "),
    "a deep config.json": (rewritten("[" * 10**5), "config.json is damaged: "),
    "binary config.json": (rewritten(b"\xff\xfe"), "config.json is damaged: "),
    "a list": (rewritten("[]"), "it holds a list, not an object"),
    "a field missing": (rewritten("{}"), "config.json is damaged: no 'settings'"),
    "a text for a number": (with_fields(rounds="many"), "rounds 'many' must be of type int"),
    "no settings": (with_fields(settings=None), "config.json is damaged: "),
    "a wild number": (with_fields(malicious=7), "malicious fraction 7.0 must be"),
    "resumed by nobody": (with_fields(resumed=5), "config.json is damaged: resumed is not a list"),
    "another number": (with_fields(lr=0.5), "has lr 0.001, not 0.5; a run can't change its settings"),
    "a row edited": (lambda folder: swap_a_digit(folder / "rounds.csv"), "rounds.csv was changed or cut short since"),
    "a client's row edited": (lambda folder: swap_a_digit(folder / "clients.csv"), "clients.csv was changed or cut"),
    "rows lost": (lambda folder: cut_in_half(folder / "clients.csv"), "clients.csv was changed or cut short since"),
    "no rows": (lambda folder: (folder / "rounds.csv").unlink(), "No such file or directory"),
    "a folder for rows": (lambda folder: ((folder / CSV[0]).unlink(), (folder / CSV[0]).mkdir()), "Is a directory"),
}


def swap_a_digit(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[:-3] + ("1" if text[-3] == "0" else "0") + text[-2:])


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_edited_by_hand_gets_one_line(kind, stopped, quick, capsys):
    folder, _ = stopped
    damage, expected = FOLDERS[kind]
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    assert expected in refusal(capsys, "--resume", folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--lr 0.01", "has lr 0.001, not 0.01; a run can't change its settings"),
        ("--rounds 9 --seed 1", "has seed 0, not 1;"),
        (
            "--rounds 5",
            "has rounds 6, not 5; a run can't change its settings (--resume can only add rounds)",
        ),
        ("--mad-start 4", "has mad_start 3, not 4;"),
        ("--mad-start 3 4", "has mad_start 3, not 3 4;"),
        ("--preset testbed", "has clusters 2, not 1, scale_floor 2.5, not 0.0"),
        ("--threshold 0.3", "has threshold 0.15, not 0.3;"),
        ("--seeds 2", "--resume continues runs that exist; leave out --seeds"),
        ("--overwrite", "leave out --overwrite"),
        ("--out elsewhere", "leave out --out"),
        ("--experiment fig3a", "leave out --experiment"),
    ],
)
def test_a_run_is_not_resumed_with_another_setting(options, expected, stopped, quick, capsys):
    folder, _ = stopped
    before = csv_bytes(folder)
    line = refusal(capsys, *options.split(), "--resume", folder)
    assert expected in line and "MADSIM_DATA" not in line
    assert csv_bytes(folder) == before


def test_a_run_can_be_made_longer_and_its_first_rounds_stay(tiny, quick, tmp_path, capsys):
    """A run of 3 rounds that continues to 6 writes the bytes of a run of 6, and says what it does."""
    long = Config(rounds=6, mad_start=2, clients=4, malicious=0.25, dataset="phantom", membership=2)
    simulate(long, tmp_path / "long", dataset=data.phantom())
    simulate(replace(long, rounds=3), tmp_path / "run", dataset=data.phantom())
    assert main(["--resume", str(tmp_path / "run"), "--rounds", "6"]) == 0
    assert f"{tmp_path / 'run'} continues to round 6 instead of 3\n" in capsys.readouterr().out
    assert csv_bytes(tmp_path / "run") == csv_bytes(tmp_path / "long")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["rounds"] == 6 and about["resumed"][0]["after_round"] == 3
    assert "has rounds 6, not 5" in refusal(capsys, "--resume", tmp_path / "run", "--rounds", "5")


def test_a_complete_run_without_a_checkpoint_stays_complete_and_does_not_grow(quick, tmp_path, capsys):
    folder = tmp_path / "run"
    simulate(Config(rounds=2, dataset="phantom"), folder, dataset=data.phantom())
    (folder / "checkpoint.npz").unlink()
    line = refusal(capsys, "--resume", folder, "--rounds", "3")
    assert line.endswith("can't be resumed: it holds no checkpoint.npz; run it again with --overwrite\n")
    assert main(["--resume", str(folder)]) == 0 and complete(folder)


def test_a_complete_run_that_is_stopped_on_its_way_to_more_rounds_is_not_complete(tiny, tmp_path):
    folder = tmp_path / "run"
    simulate(Config(rounds=2), folder, dataset=tiny)
    assert complete(folder)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 4, lambda: patch.undo() or os.kill(os.getpid(), signal.SIGINT))
        interrupted(Config(rounds=5), folder, dataset=tiny, resume=True)
    assert not complete(folder) and Config.read(folder).rounds == 5
    assert simulate(Config.read(folder), folder, dataset=tiny, resume=True).summary["complete"]


def test_the_second_of_two_commands_in_one_folder_is_refused_and_harms_nothing(quick, tmp_path, capsys):
    """The first one holds the folders of its runs, which are still empty."""
    words = ["--rounds", "1", "--clients", "4", "--dataset", "phantom", "--seeds", "2", "--out", tmp_path]
    folders = [tmp_path / Config(rounds=1, clients=4, dataset="phantom", seed=seed).name for seed in (0, 1)]
    with claimed(folders[1:]):
        line = refusal(capsys, *words)
        assert line == f"madsim: {folders[1]} is being written by another run of madsim\n"
        assert folders[1].is_dir() and not folders[0].exists()
    assert not folders[1].exists()
    assert main([*map(str, words), "--jobs", "1"]) == 0


@pytest.mark.slow
def test_of_two_commands_at_once_one_goes_on(tmp_path):
    words = ["--rounds", "3", "--dataset", "phantom", "--seeds", "2", "--out", tmp_path]
    both = [command(*words) for _ in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    (refused,) = (error for process, error in zip(both, errors) if process.returncode == 2)
    assert refused.count(str(tmp_path)) == 1 and refused.count("\n") == 1
    assert all(complete(folder) for folder in tmp_path.iterdir() if folder.is_dir())


def test_a_run_is_resumed_with_the_same_settings_and_other_threads(stopped, quick):
    folder, whole = stopped
    threads = torch.get_num_threads()
    try:
        assert main(["--rounds", "6", "--mad-start", "3", "--threads", "1", "--resume", str(folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert csv_bytes(folder) == csv_bytes(whole)


def test_a_run_of_an_earlier_version_is_not_continued_but_drawn(stopped, quick, tiny, capsys):
    """Earlier versions had another network. Their folders have no version."""
    folder, _ = stopped
    about = json.loads((folder / "config.json").read_text())
    assert about.pop("version") == 2
    (folder / "config.json").write_text(json.dumps(about))
    edited(folder / "checkpoint.npz", run=json.dumps(json.loads(run_of(folder)) | {"version": 1}))
    assert "computed by an earlier version of madsim" in refusal(capsys, "--resume", str(folder))
    with pytest.raises(ValueError, match="computed by an earlier version"):
        resume(folder, tiny)
    assert plot.main([str(folder)]) == 0


def run_of(folder: Path) -> str:
    with np.load(folder / "checkpoint.npz") as checkpoint:
        return str(checkpoint["run"])


def test_a_run_is_not_resumed_with_other_data(stopped, tiny, capsys, monkeypatch):
    folder, _ = stopped
    monkeypatch.setattr(data, "phantom", lambda seed=0, note="": replace(tiny, md5="another"))
    assert "has data's MD5 none, not another" in refusal(capsys, "--resume", folder)


def test_a_run_still_going_is_not_resumed(stopped, tiny, quick, capsys, monkeypatch):
    folder, whole = stopped

    def second():
        assert "is being written by another run of madsim" in refusal(capsys, "--resume", folder)

    with monkeypatch.context() as patch:
        stop_in(patch, 5, second)
        resume(folder, tiny)
    assert csv_bytes(folder) == csv_bytes(whole)


def test_a_run_still_going_is_not_replaced(quick, tmp_path, capsys, monkeypatch):
    words = ["--rounds", "3", "--dataset", "phantom", "--out", str(tmp_path)]

    def second():
        assert "is being written by another run of madsim" in refusal(capsys, *words, "--overwrite")

    stop_in(monkeypatch, 2, second)
    assert main(words) == 0


def test_a_complete_run_is_said_to_be_that(stopped, capsys):
    _, whole = stopped
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.iterdir()}
    assert main(["--resume", str(whole.parent / "stopped" / ".." / "whole"), str(whole)]) == 0
    assert capsys.readouterr().out == f"{whole} is complete\n"
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.iterdir()} == before


def test_a_folder_killed_as_it_was_made_can_be_replaced(quick, tmp_path):
    folder = tmp_path / "nomad-rounds1-phantom-s0"
    folder.mkdir()
    (folder / "config.json.part").write_text("{")
    words = ["--rounds", "1", "--dataset", "phantom", "--out", str(tmp_path)]
    assert main([*words, "--overwrite"]) == 0
    assert (folder / "summary.json").is_file()


# ---------------------------------------------------------------- hostile command lines

WILD = st.one_of(
    st.integers(-3, 12).map(str),
    st.floats(-2, 2).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", " ", "nan", "-inf", "1e400", "1e-400", "0x1", "1_0", "\u0663", "never", "None", "-", "--"]),
    st.sampled_from(["a\nb", "9" * 20, "9" * 5000, "-0", "0.5", "1"]),
    st.text(max_size=8).filter(lambda text: "\0" not in text),
)
TAME = {int: st.integers(1, 5).map(str), float: st.floats(0, 1).map(str), str: st.sampled_from(["label_flip", "nan"])}
TAME[cli.start_round] = st.integers(1, 3).map(str) | st.just("never")
PARSER = cli.make_parser()
CHOICES = {f.name: f.metadata.get("choices") for f in (*fields(Config), *fields(Settings))}
OPTIONS = {
    action.option_strings[-1]: action
    for action in PARSER._actions
    if action.option_strings and action.dest not in ("help", "version", "out", "data_root", "resume", "device")
}


@st.composite
def command_lines(draw, names=tuple(OPTIONS)) -> list[str]:
    """Some options with values. A value has the type that its option expects. One value in eight is wild instead."""
    words = []
    for name in draw(st.lists(st.sampled_from(names), max_size=6)):
        action = OPTIONS[name]
        known = action.choices or CHOICES.get(action.dest)
        values = st.sampled_from(sorted(map(str, known))) if known else TAME.get(action.type or str)
        count = 0 if action.nargs == 0 else draw(st.integers(1, 3)) if action.nargs == "+" else 1
        words += [name, *(draw(values if draw(st.integers(0, 7)) else WILD) for _ in range(count))]
    return words


def runs_or_is_refused(call, capsys) -> None:
    """The call runs, or it is refused in one line. Anything else fails the test."""
    try:
        call()
    except SystemExit as stop:
        line = capsys.readouterr().err
        assert stop.code == 2 and line.startswith("madsim: ") and line.count("\n") == 1 and line.endswith("\n")


@pytest.mark.filterwarnings("ignore:malicious")
@settings(max_examples=examples(3000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command_lines())
def test_every_command_line_is_understood_or_refused_in_one_line(capsys, words):
    """`main` makes the plan of the runs in the same way. It turns a ValueError into its error line."""
    with suppress(ValueError):
        runs_or_is_refused(lambda: cli.plan(vars(PARSER.parse_args(words))), capsys)


SMALL = ("--malicious", "--attack", "--flip", "--lr", "--method", "--batch-size", "--seed", "--alpha",
         "--clusters", "--silhouette", "--outlying", "--scale-floor", "--threshold", "--preset", "--excluded",
         "--beta-trust", "--beta-reputation", "--equation2", "--order", "--decision", "--first", "--nobody-left",
         "--mad-start")  # fmt: skip


@pytest.mark.filterwarnings("ignore:malicious")
@pytest.mark.slow
@settings(max_examples=examples(48), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command_lines(SMALL), st.integers(1, 3), st.sampled_from([1, 2, 5, 10]))
def test_every_small_run_ends_or_is_refused_in_one_line(quick, capsys, tmp_path, words, rounds, clients):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    size = ["--rounds", str(rounds), "--clients", str(clients), "--dataset", "phantom", "--jobs", "1"]
    runs_or_is_refused(lambda: main([*words, *size, "--out", str(tmp_path / "out")]), capsys)
    for folder in (tmp_path / "out").glob("*mad*"):
        assert (folder / CSV[0]).read_bytes().startswith(b"round,loss")


@pytest.mark.parametrize("path", ["", "x" * 300, "a\nb", "-", "\u0663", "/proc/madsim", "/dev/null/madsim"])
def test_strange_places_are_used_or_refused_in_one_line(path, quick, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def unreachable(root):
        raise FileNotFoundError(f"{root} is absent")

    monkeypatch.setattr(data, "download", unreachable)
    for option, dataset in (("--out", "phantom"), ("--resume", "phantom"), ("--data-root", "pneumoniamnist")):
        words = ["--rounds", "1", "--dataset", dataset, f"{option}={path}"]
        runs_or_is_refused(lambda words=words: main(words), capsys)


@pytest.mark.slow
def test_several_runs_in_different_places_are_resumed(quick, tmp_path, capsys, monkeypatch):
    """The folders have relative and absolute paths. The test also checks --jobs."""
    monkeypatch.chdir(tmp_path)
    words = ["--rounds", "2", "--clients", "2", "--malicious", "0", "--dataset", "phantom"]
    with monkeypatch.context() as patch:
        stop_in(patch, 2, interrupt)
        for place in ("a", "b"):
            assert main([*words, "--out", place]) == 130
    folders = [
        tmp_path / "a" / "nomad-rounds2-clients2-malicious0-phantom-s0",
        Path("b", "nomad-rounds2-clients2-malicious0-phantom-s0"),
    ]
    for jobs in ("0", "-3"):
        assert f"jobs {jobs} must be at least 1" in refusal(capsys, "--resume", *folders, "--jobs", jobs)
    assert main(["--resume", *map(str, folders), "--jobs", "1"]) == 0
    assert capsys.readouterr().out.endswith(f"Figures      python {HERE / 'plot.py'} .\n")


def test_a_run_on_another_windows_drive_than_the_code_ends_as_usual(quick, tmp_path, capsys, monkeypatch):
    """There, no relative path leads from the current folder to the code, and `relpath` raises ValueError."""

    def on_windows(*_):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    folder = tmp_path / "nomad-rounds1-clients2-malicious0-phantom-s0"
    words = ["--rounds", "1", "--clients", "2", "--malicious", "0", "--dataset", "phantom", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "relpath", on_windows)
        assert main(words) == 0
        assert capsys.readouterr().out.endswith(f"Figures      python {HERE / 'plot.py'} {folder}\n")
        assert plot.main([str(folder), str(folder / "rounds.csv")]) == 0  # of several paths, the common folder is named
    assert (folder / "figures" / "loss.png").is_file()


def test_runs_on_several_windows_drives_are_pointed_to_one_by_one(quick, tmp_path, capsys, monkeypatch):
    def on_windows(paths):
        raise ValueError("Paths don't have the same drive")

    words = ["--rounds", "1", "--clients", "2", "--malicious", "0", "--dataset", "phantom", "--out"]
    for place in "ab":
        assert main([*words, str(tmp_path / place)]) == 0
    folders = [str(tmp_path / place / "nomad-rounds1-clients2-malicious0-phantom-s0") for place in "ab"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "commonpath", on_windows)
        assert main(["--resume", *folders, "--rounds", "2", "--jobs", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert [shlex.split(line)[-1] for line in last] == [str(tmp_path / place) for place in "ab"]


def test_output_that_is_closed_or_is_no_text_is_no_traceback(tmp_path):
    madsim_py = f"{sys.executable} {HERE / 'madsim.py'}"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "PYTHONUNBUFFERED": ""}
    for words, status, line in (
        (f"{madsim_py} --resume absent >&-", 2, "madsim: absent is not a run's folder: there is no such folder\n"),
        (f"{madsim_py} --resume $'\\xff'", 2, "madsim: \\udcff is not a run's folder: there is no such folder\n"),
        (
            f"{madsim_py} --help > /dev/full",
            1,
            "madsim: the output can't be written: [Errno 28] No space left on device\n",
        ),
    ):
        done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (status, line)


CLOSED = ["2>&-", ">&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_no_file_takes_the_place_of_a_closed_stream(closed, tmp_path):
    """Neither what a library writes to a stream nor what a new process writes ends up in a file of the run."""
    program = """
import os, subprocess, sys
from harness.console import as_command

def main():
    with open("rounds.csv", "w") as file:
        os.write(1, b"noise"), os.write(2, b"noise")
        noise = "import sys; sys.stdout.write('noise'), sys.stderr.write('noise')"
        subprocess.run([sys.executable, "-c", noise], check=True)
        file.write("1,0.5")
    return 0

sys.exit(as_command(main))
"""
    (tmp_path / "program.py").write_text(program)
    words = f"{sys.executable} {tmp_path / 'program.py'} {closed}"
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0 and (tmp_path / "rounds.csv").read_text() == "1,0.5"


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "seeds"), [("2>&-", 1), ("<&- >&- 2>&-", 2)])
def test_a_run_whose_output_is_closed_is_complete(closed, seeds, tmp_path):
    options = f"--rounds 3 --clients 2 --malicious 0 --dataset phantom --jobs 2 --seeds {seeds} --out {tmp_path}"
    words = f"{sys.executable} {HERE / 'madsim.py'} {options} {closed}"
    done = subprocess.run(["bash", "-c", words], capture_output=True)
    assert done.returncode == 0
    tables = [table.read_text().count("\n") for table in tmp_path.glob("*-s*/rounds.csv")]
    assert tables == [4] * seeds


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_nobody_reads_is_no_traceback(unbuffered):
    words = f"{sys.executable} {HERE / 'madsim.py'} --help | true"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
