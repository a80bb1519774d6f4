"""Tests of harness/cli.py and harness/console.py: the command line, its error lines, and the terminal output."""

import json
import os
import re
import signal
import sys
import time
import types
import warnings
from dataclasses import replace

import joblib
import pandas as pd
import pytest
import torch
from conftest import command, refusal

import data
import plot
from harness import cli, jobs, plugins, png
from harness.cli import main
from harness.console import as_command, minutes
from harness.folder import VERSION, code
from lab.attacks import ATTACKS
from lab.experiments import EXPERIMENTS
from lab.partitions import PARTITIONS
from lab.rules import RULES
from madsim import Config, simulate
from trust import PRESETS


def test_a_client_that_submits_nan_is_out_at_once_and_named(small, tmp_path, quick, capsys):
    code = main(["--rounds", "3", "--attack", "nan", "--dataset", "phantom", "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "nomad-rounds3-nan-phantom-s0" / "summary.json").read_text())
    first, second = summary["malicious"]
    assert code == 0
    assert summary["excluded"] == {str(first): 1, str(second): 1}
    assert summary["nonfinite"] == [first, second]
    printed = capsys.readouterr().out
    for client in (first, second):
        assert f"client {client} (attacker, submitted NaN or infinity) in round 1" in printed
    rounds = pd.read_csv(tmp_path / "nomad-rounds3-nan-phantom-s0" / "rounds.csv")
    assert rounds.notna().all(axis=None)  # NaN reached neither the scores nor the average


@pytest.mark.slow
def test_a_run_with_two_dozen_options_has_a_folder_a_page_and_figures(quick, tmp_path, capsys):
    """Their names have at most 255 bytes. The seeds share a row of the table, and the same command finds them again."""
    options = """
        --rounds 2 --mad-start 1 --clients 4 --malicious 0.25 --attack stumble --strength 0.25 --burst 2
        --attack-start 2 --attack-period 1 --partition dirichlet --concentration 0.75 --rule median --lr 0.00125
        --batch-size 25 --initial-weights kaiming --dataset phantom --method loop --silhouette 0.125 --outlying 1.375
        --scale-floor 0.625 --spread centre --floored always --alpha 0.375 --beta-reputation 0.625 --beta-trust 0.875
        --threshold 0.125 --order smooth-clip --excluded observed --decision next --first lowest
        --nobody-left everybody --judged reputation
    """
    words = [*options.split(), "--seeds", "2", "--jobs", "1", "--play", "--out", str(tmp_path)]
    assert main(words) == 0
    names = [path.name for path in sorted(tmp_path.glob("*-s*"))]
    assert all(name.startswith("mad1-testbed-rounds2-clients4-malicious0.25-stumble-attackstart2-") for name in names)
    assert [name[-3:] for name in names] == ["-s0", "-s1"] and set(map(len, names)) == {240}
    assert pd.read_csv(tmp_path / "table.csv")["row"].tolist() == [names[0][:-3]] * 2
    assert plot.main([str(tmp_path)]) == 0
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures >= {f"trust-{names[0]}.png", f"trust-{names[0]}.svg", *(f"play-{name}.html" for name in names)}
    capsys.readouterr()
    assert main(words) == 0 and "is complete" in capsys.readouterr().out


@pytest.mark.slow
def test_several_mad_starts_and_seeds_make_several_runs(small, quick, tmp_path, capsys):
    """A run is the same to the byte alone and as one of several, with other threads."""
    words = "--rounds 3 --mad-start 1 2 never --seeds 2 --dataset phantom --clients 4 --malicious 0.25 --jobs 2"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    names = {f"{mad}-rounds3-clients4-malicious0.25-phantom-s{s}" for mad in ("mad1", "mad2", "nomad") for s in (0, 1)}
    assert {path.name for path in tmp_path.iterdir()} == names | {"table.csv"}
    threads = {json.loads((tmp_path / n / "config.json").read_text())["machine"]["threads"] for n in names}
    assert threads == {1}  # OMP_NUM_THREADS of the tests allows one
    one = tmp_path / max(names)
    simulate(replace(Config.read(one), threads=3), tmp_path / "alone", dataset=small)
    for table in ("rounds", "clients", "plane"):
        assert (one / f"{table}.csv").read_bytes() == (tmp_path / "alone" / f"{table}.csv").read_bytes()
    assert "6 runs, 18 rounds in all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--malicious 0.6", "fraction 0.6 makes 6 of 10 clients malicious; it must stay below half"),
        ("--malicious 0.5", "makes 5 of 10"),
        ("--malicious -0.1", "fraction -0.1 must be at least 0 and below 0.5"),
        ("--malicious nan", "malicious fraction nan must be at least 0"),
        ("--rounds 40 --mad-start 50", "mad_start 50 lies beyond the 40 rounds; use 1 to 40"),
        ("--mad-start 0", "mad_start 0 must be at least 1"),
        ("--lr -1", "lr -1.0 must be at least 0"),
        ("--lr nan", "lr nan must be at least 0 and at most 1e+30"),
        ("--lr inf", "lr inf must be at least 0 and at most 1e+30"),
        ("--method loop --lr 1e39", "lr 1e+39 must be at least 0 and at most 1e+30"),
        ("--outlying inf", "outlying inf must be at least 0 and finite"),
        (f"--clients {10**400}", "must be at least 1 and at most 100000"),
        (f"--batch-size {10**400}", "must be at least 1 and finite"),
        ("--rounds 0", "rounds 0 must be at least 1"),
        ("--clients 0", "clients 0 must be at least 1"),
        ("--flip 1.5", "flip 1.5 must be at least 0 and at most 1"),
        ("--batch-size 0", "batch_size 0 must be at least 1"),
        ("--epochs x", "--epochs: invalid int value: 'x'"),
        ("--seed -1", "seed -1 must be at least 0"),
        ("--seeds 0", "seeds 0 must be at least 1"),
        ("--jobs 0", "jobs 0 must be at least 1"),
        ("--threshold 2", "threshold 2.0 must be at least 0 and at most 1"),
        ("--attack flipp", "'flipp' is unknown; known: label_flip, one_way_flip, scaled, nan, sign_flip, noise"),
        ("--partition odd", "partition 'odd' is unknown; known: iid, dirichlet, quantity"),
        ("--partition dirichlet --concentration 0", "concentration 0.0 must be at least 0.001 and finite"),
        ("--rule medoid", "rule 'medoid' is unknown; known: mean, median, trimmed_mean, krum"),
        ("--dataset mnist", "dataset 'mnist' is unknown; known: auto, pneumoniamnist, phantom"),
        ("--preset x", "invalid choice: 'x' (choose from"),
        ("--experiment fig9", "invalid choice: 'fig9' (choose from"),
        ("--experiment fig3a --mad-start 3", "experiment fig3a sets --mad-start itself; leave it out"),
        ("--experiment noniid --concentration 1", "experiment noniid sets --concentration itself; leave it out"),
        (
            "--alpha 10",
            "alpha 10.0 must be at least 0 and at most 1; the parameter of Dirichlet's distribution is now ",
        ),
        ("--partition dirichlet --alpha 10", "distribution is now --concentration\n"),
        ("--alpha-reputation 0.3", "arguments: --alpha-reputation 0.3; --alpha-reputation is now --alpha\n"),
        ("--attacks x --alpha-reputation=0.3", "; --alpha-reputation is now --alpha\n"),
        ("--experiment fig3a --quick", "--quick and --experiment can't be combined"),
        ("--rounds 2 --attack-start 5", "attack_start 5 lies beyond the 2 rounds; use 1 to 2"),
        ("--rounds 2 --membership 10", "membership 10 lies beyond the 2 rounds"),
        ("--concentration 1", "concentration 1.0 changes nothing with partition iid"),
        ("--attack noise --flip 0.5", "flip 0.5 changes nothing, because attack noise flips no labels"),
        (
            "--rule multi_krum --malicious 0.4",
            "multi_krum needs 11 clients to withstand 4 malicious ones; there are 10",
        ),
        ("--backend dask --scheduler tcp://localhost:1 --jobs 2", "--jobs is for this machine"),
        ("--mad-start soon", "--mad-start: 'soon' is not a round or 'never'"),
        ("--mad-start 5,20", "'5,20' is not a round or 'never'; separate several by spaces"),
        ("--no-such-option", "unrecognized arguments: --no-such-option\n"),
        ("--mad_start 5", "unrecognized arguments: --mad_start 5; did you mean --mad-start?"),
        ("--attacks noise", "unrecognized arguments: --attacks noise; did you mean --attack?"),
        ("--dataset phantom --clients 3000", "3000 clients can't share 4708 images"),
        ("--rounds 10 --mad-start 3 3", None),
    ],
)
def test_bad_input_gets_one_line(arguments, expected, capsys, tmp_path):
    if expected is None:  # a run that is given twice is run once
        args = cli.make_parser().parse_args([*arguments.split(), "--out", str(tmp_path)])
        assert len(cli.plan(vars(args))) == 1
        return
    assert expected in refusal(capsys, *arguments.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--partition dirichlet --alpha 0.3",
            "--alpha 0.3 is MAD's alpha in eq. (2); partition dirichlet uses --concentration, here 0.5",
        ),
        (
            "--experiment noniid --alpha 1",
            "--alpha 1 is MAD's alpha in eq. (2); "
            "partition dirichlet or quantity uses --concentration, here 0.1 or 0.5 or 1 or 10",
        ),
        ("--partition dirichlet --alpha 0.3 --concentration 1", None),
        ("--partition dirichlet --concentration 1", None),
        ("--alpha 0.3", None),
    ],
)
def test_a_partition_with_the_alpha_of_mad_is_said(arguments, expected, capsys):
    """In earlier versions, --alpha was the parameter of the Dirichlet distribution."""
    given = vars(cli.make_parser().parse_args(arguments.split()))
    cli.tell_alpha(given, cli.plan(given))
    assert capsys.readouterr().err == (f"madsim: {expected}\n" if expected else "")


@pytest.mark.skipif(
    "torch" in sys.modules and sys.modules["torch"].cuda.is_available(), reason="there is a cuda device"
)
def test_cuda_without_a_device_is_refused(capsys, tmp_path, quick):
    line = refusal(capsys, "--device", "cuda", "--dataset", "phantom", "--out", tmp_path / "out")
    assert "0 usable CUDA devices; use --device cpu or auto" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_overwritten_unless_asked(capsys, tmp_path, quick):
    words = ["--rounds", "1", "--dataset", "phantom", "--out", str(tmp_path)]
    assert main(words) == 0
    (folder,) = tmp_path.iterdir()
    before = (folder / "summary.json").read_bytes()
    assert f"{folder} exists; add --overwrite to replace it" in refusal(capsys, *words)
    if not torch.cuda.is_available():  # it is refused before the earlier results are touched
        refusal(capsys, *words, "--overwrite", "--device", "cuda")
    assert (folder / "summary.json").read_bytes() == before
    assert main([*words, "--overwrite"]) == 0
    assert (folder / "summary.json").read_bytes() != before


def test_a_quick_run_replaces_an_earlier_quick_run_and_no_other(quick, tmp_path, monkeypatch, capsys):
    words = ["--rounds", "2", "--clients", "4", "--dataset", "phantom", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["madsim.py", "--quick", *words])
    for _ in range(2):
        assert main() == 0
    (folder,) = tmp_path.iterdir()
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"command": ["madsim.py", "--rounds", "2"]}))
    assert f"{folder} exists; add --overwrite to replace it" in refusal(capsys, "--quick", *words)


def test_a_quick_run_that_was_made_longer_is_not_replaced(quick, tmp_path, monkeypatch, capsys):
    """Its folder keeps the name of the shorter run."""
    words = ["--quick", "--rounds", "2", "--clients", "4", "--dataset", "phantom", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["madsim.py", *words])
    assert main() == 0
    (folder,) = tmp_path.iterdir()
    assert main(["--resume", str(folder), "--rounds", "3"]) == 0
    assert f"{folder} exists; add --overwrite to replace it" in refusal(capsys, *words)
    assert (folder / "rounds.csv").read_bytes().count(b"\n") == 1 + 3


def test_a_link_to_a_runs_folder_is_not_replaced(quick, tmp_path, capsys):
    words = ["--rounds", "1", "--clients", "4", "--dataset", "phantom"]
    assert main([*words, "--out", str(tmp_path / "there")]) == 0
    (folder,) = (tmp_path / "there").iterdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / folder.name).symlink_to(folder)
    line = refusal(capsys, *words, "--out", tmp_path / "here", "--overwrite")
    assert f"{tmp_path / 'here' / folder.name} is a link; it is not replaced" in line
    assert (folder / "summary.json").is_file()
    (tmp_path / "here" / folder.name).unlink()
    (tmp_path / "here" / folder.name).symlink_to(tmp_path / "nowhere")
    assert " is a link; it is not replaced" in refusal(capsys, *words, "--out", tmp_path / "here", "--overwrite")


@pytest.fixture
def real_is_small(small, tmp_path, monkeypatch):
    """A small PneumoniaMNIST in place of the real one: a file with its name. It can't be downloaded. Returns a folder.

    Each call puts the file, which is nowhere else, into a new folder of this name.
    """
    path, loaded = tmp_path / data.FILE, []
    path.write_text("")
    monkeypatch.setattr(data, "USUAL", str(tmp_path / "usual"))
    monkeypatch.delenv("MADSIM_DATA", raising=False)

    def pneumoniamnist(root):
        if not (root / data.FILE).is_file():
            raise FileNotFoundError(f"{root / data.FILE} is absent; give its folder with --data-root or MADSIM_DATA")
        loaded.append(root)
        return replace(small, name="PneumoniaMNIST", md5=data.MD5)

    def put(name):
        nonlocal path
        (tmp_path / name).mkdir(exist_ok=True)
        path = path.replace(tmp_path / name / data.FILE)
        return str(tmp_path / name)

    monkeypatch.setattr(data, "pneumoniamnist", pneumoniamnist)
    put.loaded = loaded
    return put


@pytest.mark.slow
def test_a_run_is_resumed_where_its_data_lie_now(real_is_small, quick, tmp_path, monkeypatch, capsys):
    """The option wins, then MADSIM_DATA, then the folder that the run was begun with, then medmnist's. A complete run
    needs no data."""
    put, rounds = real_is_small, iter(range(2, 99))
    assert main(["--rounds", "1", "--clients", "4", "--data-root", put("old"), "--out", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out").iterdir()

    def resumed(*words):
        assert main(["--resume", str(folder), "--rounds", str(next(rounds)), *words]) == 0
        return put.loaded[-1].name

    assert main(["--resume", str(folder)]) == 0 and len(put.loaded) == 1
    assert resumed() == "old"
    monkeypatch.setenv("MADSIM_DATA", str(tmp_path / "wrong"))
    assert resumed() == "old"
    put("usual")
    assert resumed() == "usual"
    monkeypatch.setenv("MADSIM_DATA", put("new"))
    assert resumed() == "new"
    (tmp_path / "old" / data.FILE).write_text("")
    assert resumed() == "new"
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / data.FILE).write_text("")
    assert resumed("--data-root", str(tmp_path / "given")) == "given"
    assert Config.read(folder).data_root == str(tmp_path / "old")  # as it was begun
    result = simulate(replace(Config.read(folder), rounds=99), folder, resume=True)
    assert result.data["name"] == "PneumoniaMNIST" and put.loaded[-1].name == "new"
    for place in ("old", "new"):
        (tmp_path / place / data.FILE).unlink()
    line = refusal(capsys, "--resume", folder, "--rounds", "100")
    assert line.endswith("new/pneumoniamnist.npz is absent; give its folder with --data-root or MADSIM_DATA\n")
    assert "PHANTOM" not in line  # it would be refused, with a hint that does not help


def test_a_run_on_the_phantom_is_resumed_on_a_machine_that_has_the_data(real_is_small, quick, tmp_path, capsys):
    words = ["--rounds", "1", "--clients", "4", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    (folder,) = (tmp_path / "out").iterdir()
    note = json.loads((folder / "summary.json").read_text())["note"]
    assert "is absent" in note
    real_is_small("usual")
    capsys.readouterr()
    line = refusal(capsys, *words, "--seeds", "2")  # not --resume: this command asks for other data now
    assert "has data's MD5 " in line and line.endswith("; --data-root or MADSIM_DATA names the folder of other data\n")
    assert main(["--resume", str(folder), "--rounds", "2"]) == 0
    assert json.loads((folder / "summary.json").read_text())["note"] == note


def test_a_run_on_data_of_ones_own_is_resumed_from_python(small, quick, tmp_path, capsys):
    own = replace(small, name="mine", md5="abc")
    simulate(Config(rounds=1, clients=4, dataset="phantom"), tmp_path / "run", dataset=own)
    line = refusal(capsys, "--resume", tmp_path / "run", "--rounds", "2")
    assert (
        "has data's MD5 abc, not" in line and "its data set 'mine' can't be loaded here; resume it from Python" in line
    )
    config = replace(Config.read(tmp_path / "run"), rounds=2)
    assert simulate(config, tmp_path / "run", dataset=own, resume=True).summary["complete"]


@pytest.mark.parametrize(
    ("cores", "words", "processes", "threads"),
    [
        (1, "", 1, 1), (4, "", 3, 1), (8, "", 3, 2), (8, "--jobs 2", 2, 4), (4, "--jobs 9 --threads 2", 2, 2),
        (2, "--jobs 3 --threads 4", 1, 4),
    ],
)  # fmt: skip
def test_processes_times_threads_are_not_more_than_the_cores(
    cores, words, processes, threads, quick, tmp_path, monkeypatch
):
    """The runs are not run: what they are given is looked at."""
    monkeypatch.setattr(jobs, "usable_cores", lambda: {"usable": 64, "physical": cores})
    monkeypatch.setattr(jobs, "own_threads", lambda: 64)
    monkeypatch.setattr(jobs, "attempt", lambda simulate, config, *rest: config.threads)
    monkeypatch.setattr(joblib, "Parallel", lambda n_jobs: lambda calls: [n_jobs, *(f(*a) for f, a, _ in calls)])
    runs = {tmp_path / str(seed): Config(rounds=1, seed=seed) for seed in range(3)}
    options = dict(zip(words.split()[::2], map(int, words.split()[1::2])))
    runs = {folder: replace(config, threads=options.get("--threads")) for folder, config in runs.items()}
    assert jobs.simulate_all(simulate, runs, None, options.get("--jobs")) == [processes, *[threads] * 3]


def test_usable_cores_follow_from_the_affinity_and_the_environment(monkeypatch):
    """The first two logical processors may share a core. OMP_NUM_THREADS limits the threads of each process."""
    cores = jobs.usable_cores()
    assert 1 <= cores["physical"] <= cores["usable"] <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert jobs.usable_cores()["physical"] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert jobs.own_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert jobs.own_threads() > 1000


@pytest.mark.parametrize(
    ("affinity", "quota", "variable", "usable"),
    [(64, "max", "64", 64), (1, "max", "64", 1), (64, "150000", "64", 2), (64, "max", "3", 3)],
)
def test_a_process_counts_the_cores_that_it_may_use_of_64(affinity, quota, variable, usable, tmp_path, monkeypatch):
    """`taskset`, a container's quota and LOKY_MAX_CPU_COUNT limit the cores. In the first case nothing does."""
    plain = open
    cgroup = {"/sys/fs/cgroup/cpu.max": tmp_path / "cpu.max"}
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    monkeypatch.setattr(os.path, "exists", lambda path, exists=os.path.exists: path in cgroup or exists(path))
    monkeypatch.setattr("builtins.open", lambda path, *rest, **named: plain(cgroup.get(path, path), *rest, **named))
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", variable)
    cores = jobs.usable_cores()
    assert cores["usable"] == usable and 1 <= cores["physical"] <= 64
    monkeypatch.setattr(joblib, "Parallel", lambda n_jobs: lambda calls: n_jobs)
    runs = {tmp_path / str(seed): Config(rounds=1, seed=seed) for seed in range(24)}
    assert jobs.simulate_all(simulate, runs, None, None) == min(24, *cores.values())


def test_a_number_of_cores_that_is_none_is_refused_by_its_name(monkeypatch, capsys):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "two")
    assert "LOKY_MAX_CPU_COUNT is 'two', not a whole number" in refusal(capsys, *SHORT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_in_a_notebook_leaves_streams_signals_and_warnings_as_they_were(number, monkeypatch):
    """A notebook's streams have no `reconfigure`. The kernel has a handler of its own."""
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=lambda text: None, flush=lambda: None))
    before = signal.getsignal(number), warnings.showwarning
    assert as_command(lambda: 7) == 7
    assert (signal.getsignal(number), warnings.showwarning) == before


def test_a_warning_is_one_line_of_a_command(capsys):
    as_command(lambda: warnings.warn("nobody attacks", stacklevel=1) or 0)
    assert capsys.readouterr().err.endswith(": nobody attacks\n")


def test_an_error_of_a_file_is_not_called_one_of_the_output(capsys):
    assert as_command(lambda: open("x" * 300)) == 2
    err = capsys.readouterr().err
    assert "File name too long" in err and "output" not in err and err.count("\n") == 1


def test_a_folder_that_is_no_run_is_never_overwritten(capsys, tmp_path):
    folder = tmp_path / "nomad-phantom-s0"
    folder.mkdir()
    (folder / "thesis.txt").write_text("dear")
    assert "is not a run's folder" in refusal(capsys, "--dataset", "phantom", "--out", tmp_path, "--overwrite")
    assert (folder / "thesis.txt").read_text() == "dear"


def test_a_place_that_can_not_be_written_gets_one_line(capsys, tmp_path, quick):
    (tmp_path / "file").write_text("")
    line = refusal(capsys, "--rounds", "1", "--dataset", "phantom", "--out", tmp_path / "file" / "results")
    assert str(tmp_path / "file") in line


def test_every_path_may_begin_with_the_users_folder(small, quick, tmp_path, monkeypatch, capsys):
    """A shell leaves the ~ of `--out=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MADSIM_DATA", "~/data")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "own.py").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    roots = []
    monkeypatch.setattr(data, "pneumoniamnist", lambda root: roots.append(root) or small)
    words = ["--rounds", "1", "--clients", "4", "--out=~/out", "--plugin=~/own.py"]
    assert main([*words, "--data-root=~/given"]) == main([*words, "--seed=1"]) == 0
    sys.modules.pop("own")
    plugins.loaded.clear()
    assert roots == [tmp_path / "home" / "given", tmp_path / "home" / "data"]
    first, second = sorted(path.name for path in (tmp_path / "home" / "out").iterdir())
    assert f"{tmp_path}/home/out/{first} has plugins own.py" in refusal(capsys, f"--resume=~/out/{first}")
    assert plot.main([f"~/out/{first}", f"~/out/{second}", "--out=~/figures"]) == 0
    assert (tmp_path / "home" / "figures" / "loss.png").is_file()
    assert png.main(["--png=~/png", "--dataset", "phantom"]) == 0 and (tmp_path / "home" / "png").is_dir()
    assert [*(tmp_path / "here").iterdir()] == []  # no folder named ~
    line = refusal(capsys, "--out=~no-such-user/x")
    assert "~no-such-user/x names a home folder that is unknown; write ./~no-such-user/x" in line


def test_a_data_root_that_is_a_file_gets_one_line(capsys, tmp_path):
    (tmp_path / data.FILE).write_bytes(b"")
    for dataset in ("auto", "pneumoniamnist"):
        root = ("--data-root", tmp_path / data.FILE, "--dataset", dataset)
        assert f"{tmp_path / data.FILE} is a file" in refusal(capsys, *root, "--out", tmp_path / "out")


@pytest.mark.slow
def test_a_rule_that_mad_leaves_too_few_clients_ends_in_one_line_that_names_the_round(capsys, tmp_path, quick):
    """Plain min-max excludes clients in each round until Krum has fewer than 3. The earlier rounds are kept."""
    words = "--rounds 9 --mad-start 2 --clients 5 --malicious 0 --clusters 1 --scale-floor 0 --rule krum"
    line = refusal(capsys, *words.split(), "--dataset", "phantom", "--out", tmp_path)
    t = int(re.search(r"madsim: round (\d+): krum needs 3 clients to withstand 0 malicious ones", line)[1])
    (folder,) = tmp_path.iterdir()
    assert t > 1 and len((folder / "rounds.csv").read_text().splitlines()) == t  # the header and t - 1 rounds
    assert not json.loads((folder / "summary.json").read_text())["complete"]


def test_a_damaged_data_file_gets_one_line(capsys, tmp_path):
    (tmp_path / data.FILE).write_bytes(b"PK no npz")
    line = refusal(capsys, "--data-root", tmp_path, "--out", tmp_path / "out")
    assert "has MD5" in line and data.MD5 in line and "delete the file" in line


def test_weights_that_overflow_everywhere_end_in_one_line(capsys, tmp_path, quick):
    line = refusal(capsys, "--lr", "1e30", "--rounds", "3", "--dataset", "phantom", "--out", tmp_path)
    assert "every client's weights are NaN or infinite" in line


def test_the_fall_back_is_said_before_at_the_end_and_in_the_files(tmp_path, monkeypatch, capsys, quick):
    def unreachable(root):
        raise FileNotFoundError(f"{root}/x is absent and medmnist could not download it (no network)")

    monkeypatch.setattr(data, "download", unreachable)
    main(["--rounds", "1", "--data-root", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert captured.err.startswith("PHANTOM IMAGES, not PneumoniaMNIST:") and "no network" in captured.err
    assert "phantom images" in captured.out
    (folder,) = (tmp_path / "out").iterdir()
    for file in ("config.json", "summary.json"):
        assert "no network" in (folder / file).read_text()
    named = ("--dataset", "pneumoniamnist", "--data-root", tmp_path / "none", "--out", tmp_path / "other")
    assert "could not download it (no network)" in refusal(capsys, *named)


@pytest.mark.slow
def test_ctrl_c_ends_several_runs_in_one_line(tmp_path):
    words = ["--rounds", "100000", "--mad-start", "5", "never", "--dataset", "phantom", "--jobs", "2"]
    process = command(*words, "--out", tmp_path, start_new_session=True)
    deadline = time.time() + 90
    while time.time() < deadline and sum(t.read_text().count("\n") > 3 for t in tmp_path.rglob("rounds.csv")) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "madsim: stopped; the same command continues\n" in err
    assert [len(pd.read_csv(table)) > 2 for table in tmp_path.rglob("rounds.csv")] == [True, True]


def test_the_list_names_everything_with_a_line(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    known = {*ATTACKS, *PARTITIONS, *RULES, *PRESETS, *EXPERIMENTS}
    for name in known:
        assert re.search(rf"^  {name} +\S.{{8}}", out, re.MULTILINE), name
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    of_byzfl = lines[lines.index("--preset") - 1 :: -1]  # the last ones of the rules
    of_byzfl = of_byzfl[: next(i for i, line in enumerate(of_byzfl) if line.startswith("  byzfl:NAME ")) + 1]
    assert len(lines) == len(known) + len(of_byzfl) + 6  # 5 headings, `paper`
    for words in (
        "Krum: the model with the lowest score",
        "9 settings differ",
        "flips labels, stays just within",
        "fig3a and fig3c",
    ):
        assert words in out


@pytest.mark.slow
def test_a_quick_story_has_an_attack_and_an_exclusion(quick, tmp_path, capsys):
    assert main(["--quick", "--dataset", "phantom", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 run, 60 rounds in all, about 10 seconds" in out
    assert json.loads((tmp_path / "mad30-rounds60-phantom-s0" / "summary.json").read_text())["complete"]
    shorter = ["--quick", "--rounds", "31", "--clients", "4", "--malicious", "0", "--dataset", "phantom", "--out"]
    assert main([*shorter, str(tmp_path)]) == 0  # other options override --quick
    out = capsys.readouterr().out
    assert "31 rounds in all" in out and "Excluded     nobody; nobody attacked\n" in out
    assert (tmp_path / "mad15-rounds31-clients4-malicious0-phantom-s0").is_dir()
    assert [config.mad_start for config in cli.plan({"quick": True, "rounds": 1}).values()] == [1]


SHORT = ["--rounds", "2", "--clients", "4", "--dataset", "phantom", "--jobs", "1"]


@pytest.fixture
def opened(monkeypatch):
    """The addresses of the pages that would have been opened in a browser, on a machine with a display."""
    addresses: list[str] = []
    monkeypatch.setattr(cli.webbrowser, "open", addresses.append)
    monkeypatch.setenv("DISPLAY", ":0")
    return addresses


def test_play_writes_a_page_and_opens_it(quick, tmp_path, monkeypatch, capsys, opened):
    monkeypatch.chdir(tmp_path)
    assert main(["--quick", *SHORT, "--play", "--hide"]) == 0
    page = tmp_path / "results" / "figures" / "play-mad1-rounds2-clients4-phantom-s0.html"  # where plot.py writes it
    assert capsys.readouterr().out.endswith(f"\n{page.relative_to(tmp_path)}\n") and '"hide":true' in page.read_text()
    assert opened == [page.as_uri()]
    assert "--hide is for the page of --play; add --play" in refusal(capsys, *SHORT, "--hide")


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="there is always a display")
def test_without_a_display_the_path_of_the_page_is_only_printed(quick, tmp_path, monkeypatch, capsys, opened):
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert main([*SHORT, "--out", str(tmp_path), "--play"]) == 0
    assert "play-nomad-rounds2-clients4-phantom-s0.html" in capsys.readouterr().out and opened == []
    assert main([*SHORT, "--out", str(tmp_path / "b")]) == 0 and not (tmp_path / "b" / "figures").exists()


def test_of_two_runs_the_page_with_both_is_opened(tmp_path, opened):
    assert main([*SHORT, "--mad-start", "1", "never", "--play", "--out", str(tmp_path)]) == 0
    assert opened == [(tmp_path / "figures" / "side-by-side.html").as_uri()]
    assert len(list((tmp_path / "figures").glob("play-*.html"))) == 2


def test_pages_of_several_runs_are_written_and_few_of_them_opened(grid, tmp_path, monkeypatch, opened):
    main([*grid, "--out", str(tmp_path), "--play"])
    pages = sorted((tmp_path / "grid" / "figures").iterdir())
    assert sorted(opened) == [page.as_uri() for page in pages] and len(pages) == 4
    opened.clear()
    monkeypatch.setattr(cli, "MOST_REPORTS", 3)
    assert main([*grid, "--out", str(tmp_path), "--play"]) == 0 and opened == []  # also of runs of an earlier call


@pytest.mark.slow
def test_output_that_is_no_terminal_is_plain(tmp_path):
    words = ["--rounds", "2", "--dataset", "phantom", "--threads", "1", "--out", tmp_path]
    out, err = command(*words, env=os.environ | {"NO_COLOR": "1"}).communicate(timeout=60)
    assert err == "" and "\x1b" not in out and "\r" not in out


@pytest.mark.parametrize(
    ("seconds", "words"), [(2, "10 seconds"), (44, "40 seconds"), (60, "1 minute"), (200, "3 minutes")]
)
def test_times_are_said_roughly(seconds, words):
    assert minutes(seconds) == words


@pytest.mark.parametrize("program", [main, plot.main, png.main])
def test_every_program_says_the_commit_of_its_code(program, capsys, monkeypatch):
    """It is the one that config.json records."""

    def version():
        with pytest.raises(SystemExit) as stop:
            program(["--version"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    recorded = code()
    changed = ", with changes" if recorded["dirty"] else ""
    assert version() == f"madsim, commit {recorded['commit'] or 'unknown'}{changed}; results of version {VERSION}\n"
    monkeypatch.setenv("PATH", "")  # without git
    assert version() == f"madsim, commit unknown; results of version {VERSION}\n"


def test_help_is_quick_and_says_where_defaults_come_from():
    start = time.perf_counter()
    out, _ = command("--help").communicate(timeout=60)
    assert time.perf_counter() - start < 2  # measured: 0.15 s; the bound allows for a busy machine
    for words in ("default: 1000, paper: 100 to", "--beta-trust", "--scale-floor", "Kaufman and", "default: results"):
        assert words in out
