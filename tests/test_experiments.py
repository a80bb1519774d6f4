"""Tests of lab/experiments.py and harness/jobs.py: grids of runs, their tables, clusters."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from conftest import HERE, command, refusal

from harness import cli, jobs
from harness.cli import main
from harness.console import report_cells, report_runs, report_seeds
from harness.folder import script
from lab import experiments
from lab.attacks import ATTACKS
from lab.experiments import BYZFL, EXPERIMENTS, over_seeds
from lab.rules import RULES
from madsim import Config, simulate
from trust import PRESETS


def cells(name: str, **given) -> dict[tuple[str, str], Config]:
    [found] = cli.plan_experiments({"experiment": name} | given).values()
    return found


def test_experiments_are_the_papers():
    fig3a = [*cells("fig3a").values()]
    assert [(c.rounds, c.mad_start, c.malicious) for c in fig3a] == [
        *((100, start, 0.2) for start in (5, 20, 40, 60, 80, None)), (100, None, 0.0),
    ]  # fmt: skip
    assert [(c.rounds, c.mad_start) for c in cells("fig3c").values()] == [(1000, 10), (1000, 500)]
    assert {name: c.mad_start for (name, _), c in cells("fig3a").items() if c.mad_start} == {
        f"MAD from {start}": start for start in (5, 20, 40, 60, 80)
    }


def test_names_say_the_rounds_that_are_run():
    """fig3a has 100 rounds. Of 20 rounds, a fifth of each start is left. Of 4 rounds, 5 and 20 both become round 1."""
    starts = {name: c.mad_start for (name, _), c in cells("fig3a", rounds=20).items()}
    never = {"never": None, "no attack": None}
    assert starts == {f"MAD from {start}": start for start in (1, 4, 8, 12, 16)} | never
    starts = {name: c.mad_start for (name, _), c in cells("fig3a", rounds=4).items()}
    assert starts == {f"MAD from {start}": start for start in (1, 2, 3)} | never
    assert len(cells("readings", rounds=1)) == 16 * 3  # MAD from 5 and from 40 are one column
    assert "{" not in "".join(row + column for name in EXPERIMENTS for row, column in cells(name))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_cell_is_a_run_of_its_own(name):
    grid = cells(name)
    rows, columns = EXPERIMENTS[name].rows, EXPERIMENTS[name].columns
    assert len({config.name for config in grid.values()}) == len(grid) == len(rows) * len(columns)


def test_cells_are_what_their_names_say():
    readings, defences, attacks = cells("readings"), cells("defences"), cells("attacks", rounds=30)
    assert readings["preset testbed", "20%, MAD from 5"].settings == PRESETS["testbed"]
    assert readings["preset paper", "40%, MAD from 40"] == Config(rounds=60, mad_start=40, malicious=0.4)
    assert readings["silhouette alone", "0%, MAD from 5"].settings == replace(PRESETS["paper"], outlying=0.0)
    of_byzfl = BYZFL.keys() if find_spec("byzfl") else set()
    assert {name for name, _ in defences} == {"mean, never", "mean, MAD from 5"} | RULES.keys() - {"mean"} | of_byzfl
    assert defences["krum", "alie"] == Config(rounds=40, rule="krum", attack="alie")
    assert defences["mean, MAD from 5", "no attack"] == Config(rounds=40, mad_start=5, malicious=0.0)
    against_mad = {"near_copies", "chain"}
    assert {c.attack for c in attacks.values()} == ATTACKS.keys() - {"nan", "stumble"} - against_mad
    assert {c.attack for c in attacks.values()} == {c.attack for c in defences.values()} | {"sidestep"}
    assert {c.attack for c in cells("threats").values()} == {"hug", "near_copies", "chain", "sign_flip"}
    late, on_off = (
        attacks["label_flip from round 15", "never"],
        attacks["label_flip, 2 rounds on, 2 off", "MAD from 5"],
    )
    assert late.attack_start == 15  # half as many rounds, so half of round 30
    assert (on_off.attack_period, on_off.mad_start) == (2, 5)
    noniid = cells("noniid")
    assert noniid["dirichlet, concentration 0.5", "label_flip, never"] == Config(rounds=60, partition="dirichlet")
    assert cells("membership")["never", ""] == Config(rounds=600, membership=10)
    assert readings["preset paper, observed", "20%, MAD from 5"].settings.excluded == "observed"
    assert {config.attack_start for config in cells("fig3a", rounds=50, attack_start=20).values()} == {20}  # as given


def test_the_options_given_hold_in_every_cell():
    for config in cells("readings", alpha=0.3, clients=20).values():
        assert (config.settings.alpha, config.clients) == (0.3, 20)


def table(*losses: float, **columns) -> pd.DataFrame:
    """The table that `tidy` makes from the runs of one cell with these losses."""
    cell = {"row": "a", "column": "b", "complete": True, "precision": None, "clients": 10, "attackers": 2}
    cell |= {"true_exclusions": 2, "false_exclusions": 0}
    return pd.DataFrame([cell | {"seed": seed, "loss": loss} for seed, loss in enumerate(losses)]).assign(**columns)


def test_seeds_are_summed_up_by_hand(capsys):
    """Losses 0.5 and 0.7 have the mean 0.6 and the sample standard deviation 0.1 * sqrt 2.

    Runs that were cut short are left out.
    """
    runs = table(0.5, 0.7, 9.0, complete=[True, True, False], true_exclusions=[2, 1, 0], averaged=[4, 10, 1])
    runs["data"] = "phantom images"
    (texts,) = over_seeds(runs).to_dict("records")
    # Wilson's interval of 3 of 4 is (3 + z^2/2 ± z sqrt(3/4 + z^2/4)) / (4 + z^2) with z = 1.96: 0.30 to 0.95.
    counts = {"attackers out": "3 of 4 (30-95 %)", "honest out": "0 of 16 (0-19 %)"}
    counts |= {"runs with honest out": "0 of 2 (0-66 %)"}  # z^2 / (2 + z^2)
    assert texts == {"seeds": 2, "loss": "0.600 ± 0.141", "precision": ""} | counts
    assert over_seeds(table(0.5)).loss.tolist() == ["0.500"]  # one seed has no standard deviation
    missed = pd.Series([3.0, 4.0, np.nan])
    assert [experiments.in_words(missed[start:], 1) for start in (0, 1, 2)] == ["3.5 ± 0.7 (of 2)", "4.0 (of 1)", ""]
    assert experiments.in_words(pd.Series([1.0, np.inf]), 3) == "inf"
    copied = pd.concat([runs, runs[:1]])  # a copy of a run is no further seed
    assert over_seeds(copied).to_dict("records") == [texts | {"seeds": 2}]
    report_seeds(runs)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "phantom images; last 4 to 10 rounds: mean ± standard deviation over seeds; counts with 95 % intervals",
        "a, 2 seeds",
        "             attackers out         3 of 4 (30-95 %)",
        "             honest out            0 of 16 (0-19 %)",
        "             runs with honest out  0 of 2 (0-66 %)",
        "             loss                  0.600 ± 0.141",
    ]


@pytest.mark.parametrize("returned", [False, True])
def test_a_run_s_means_start_at_its_last_exclusion(returned, tmp_path):
    """Client 1 leaves in round 4 of 6, so rounds 4 to 6 count: accuracies 0.7, 0.8 and 1.0.

    Their mean is 2.5 / 3. Their changes 0.1 and 0.2 have the sample standard deviation 0.05 * sqrt 2. The client may
    have been out before, in round 2, and have come back in round 3.
    """
    accuracies = [0.1, 0.2, 0.3, 0.7, 0.8, 1.0]
    rounds = [{"round": t, "active": 2 - (t > 3), "honest_accuracy": a} for t, a in enumerate(accuracies, 1)]
    clients = [
        (t, client, int(client == 0 or t in (1, 3) or (t == 2 and not returned)))
        for t in range(1, 7)
        for client in (0, 1)
    ]
    pd.DataFrame(rounds).to_csv(tmp_path / "rounds.csv", index=False)
    pd.DataFrame(clients, columns=["round", "client", "active"]).to_csv(tmp_path / "clients.csv", index=False)
    known = {
        "malicious": [1],
        "training_images": [30, 20],
        "excluded": {"1": 2 if returned else 4},
        "complete": True,
        "jumps": [],
        "membership": None,
    }
    known |= dict.fromkeys(experiments.DETECTION)
    (tmp_path / "summary.json").write_text(json.dumps(known))
    about = {"settings": {}, "data": {"name": "phantom"}, "git": {"commit": "abc", "dirty": False}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    run = experiments.results_of(tmp_path)
    assert (run["averaged"], run["last"], run["last_exclusion"], run["honest_accuracy"]) == (3, 6, 4, 0.833333)
    assert run["fluctuation"] == pytest.approx(0.05 * 2**0.5, rel=1e-5)
    assert (run["commit"], run["dirty"]) == ("abc", False)
    assert (run["malicious_clients"], run["excluded_clients"], run["images_of_clients"]) == ("1", "1", "30 20")


@pytest.mark.parametrize(
    ("first", "then", "commit", "dirty", "words"),
    [
        ((None, None), (None, None), "unknown", None, "commit unknown. "),
        (("abc", False), (None, None), "abc, unknown", None, "commit abc, unknown. "),
        ((None, None), ("abc", True), "unknown, abc", True, "commit abc, unknown (with changes). "),
    ],
)
def test_a_table_says_that_a_commit_is_unknown(first, then, commit, dirty, words, small, tmp_path):
    config = Config(rounds=1)
    simulate(config, tmp_path / config.name, dataset=small)
    path = tmp_path / config.name / "config.json"
    code = [{"git": dict(zip(("commit", "dirty"), part))} for part in (first, then)]
    path.write_text(json.dumps(json.loads(path.read_text()) | code[0] | {"resumed": [code[1]]}))
    table = experiments.tabulate(tmp_path, [(path.parent, "row", "")])
    assert list(table[["commit", "dirty"]].iloc[0]) == [commit, dirty]
    written = pd.read_csv(tmp_path / "table.csv")
    assert written["commit"].item() == commit and written["dirty"].eq(True).item() == (dirty is True)
    assert words in experiments.heading("fig3a", table, "python")


def test_spans_of_rounds_by_hand(tmp_path):
    """Rounds 1 to 4. In rounds 2 to 4 the accuracy changes by 0.2 and 0.1, with the deviation 0.05 * sqrt 2.

    Client 0 is malicious and is out in round 4, without a score.
    """
    rounds = "round,active,loss,honest_accuracy\n1,2,9,0\n2,2,1,0.5\n3,2,2,0.7\n4,1,6,0.8\n"
    (tmp_path / "rounds.csv").write_text(rounds)
    trust = ["1,0,1,0.3", "1,1,0,0.9", "2,0,1,0.2", "2,1,0,0.8", "3,0,1,0.1", "3,1,0,1", "4,0,1,", "4,1,0,0.7"]
    (tmp_path / "clients.csv").write_text("\n".join(["round,client,malicious,trust", *trust, ""]))
    (tmp_path / "config.json").write_text('{"seed": 7}')
    (tmp_path / "summary.json").write_text('{"complete": true}')
    cell = (tmp_path, "a", "b")
    long, short = experiments.over_spans([cell], [(2, 4), (4, 4)]).to_dict("records")
    assert long == {
        "row": "a", "column": "b", "seed": 7, "rounds": "2 to 4", "loss": 3.0, "honest_accuracy": 0.666667,
        "active": 1.66667, "fluctuation": pytest.approx(0.05 * 2**0.5, rel=1e-5),
        "honest_trust": 0.7, "attacker_trust": 0.2,
    }  # fmt: skip
    assert (short["rounds"], short["loss"], short["honest_trust"]) == ("4", 6.0, 0.7)
    assert np.isnan([short["fluctuation"], short["attacker_trust"]]).all()
    (tmp_path / "summary.json").write_text('{"complete": false}')
    assert experiments.over_spans([cell, (tmp_path / "none", "a", "b")], [(1, 1)]).empty


def test_spans_become_shorter_with_the_experiment():
    assert EXPERIMENTS["fig3a"].scaled_spans(100) == [(3, 10), (11, 20), (31, 40), (91, 100)]
    assert EXPERIMENTS["fig3a"].scaled_spans(20) == [(1, 2), (2, 4), (6, 8), (18, 20)]
    assert EXPERIMENTS["authors"].scaled_spans(2) == [(1, 1), (2, 2)]


def test_differences_are_paired_over_seeds_by_hand():
    """Of the seeds 0, 1, 2 the row b is 0.01, 0.02 and 0.03 better. The seed 9 has no partner, one run is not complete.

    The standard error is 0.01 / sqrt 3, and Student's t with 2 degrees of freedom 4.303: 0.020 ± 0.0248.
    """
    values = {"a": {0: 0.5, 1: 0.7, 2: 0.6}, "b": {0: 0.51, 1: 0.72, 2: 0.63, 9: 0.99}, "c": {0: 0.5}}
    rows = [{"row": row, "column": "x", "seed": seed, "complete": True, "honest_accuracy": value}
            for row, seeds in values.items() for seed, value in seeds.items()]  # fmt: skip
    rows.append(rows[0] | {"row": "b", "seed": 1, "complete": False, "honest_accuracy": 0.0})
    texts = experiments.differences(pd.DataFrame(rows), "a")
    assert texts.to_dict("index") == {
        ("b", "x"): {"honest accuracy": "0.020 (-0.005 to 0.045)"}, ("c", "x"): {"honest accuracy": "0.000"},
    }  # fmt: skip


def test_a_table_in_markdown_by_hand():
    assert experiments.markdown(over_seeds(table(0.5))[["seeds", "loss"]], "# T").splitlines() == [
        "# T", "", "| row | column | seeds | loss |", "| --- | --- | --- | --- |", "| a | b | 1 | 0.500 |",
    ]  # fmt: skip
    single = over_seeds(table(0.5, column=""))[["seeds", "loss"]]
    assert experiments.markdown(single, "").splitlines()[2:] == [
        "| row | seeds | loss |", "| --- | --- | --- |", "| a | 1 | 0.500 |",
    ]  # fmt: skip


def test_a_table_says_how_many_runs_are_distinct():
    """Runs of one seed with equal losses are one run: their cells differ in a setting that changed nothing."""
    runs = table(0.5, 0.5, 0.6, 0.6, seed=[0, 1, 0, 0], honest_loss=0.2, test_loss=0.3, commit="abc", dirty=False)
    runs = runs.assign(data="phantom images", rounds=60, averaged=10)
    assert "; seeds 0, 1; 4 runs, 3 of them distinct (cells can" in experiments.heading("fig3a", runs, "python")
    assert "; seeds 0, 1; 3 runs; commit abc." in experiments.heading("fig3a", runs[:3], "python")


def test_an_experiment_writes_its_tables(quick, grid, tmp_path, capsys):
    assert main([*grid, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 16 rounds in all" in out and f"python plot.py {tmp_path / 'grid'}" in out
    runs = pd.read_csv(tmp_path / "grid" / "table.csv")
    assert runs[["row", "column", "seed"]].values.tolist() == [
        ["MAD from 2", column, seed] for column in ("none", "two") for seed in (0, 1)
    ]
    for _, run in runs.iterrows():
        config = Config(rounds=4, mad_start=2, clients=4, malicious=run.malicious, dataset="phantom", seed=run.seed)
        folder = tmp_path / "grid" / config.name
        rounds, summary = pd.read_csv(folder / "rounds.csv"), json.loads((folder / "summary.json").read_text())
        since = rounds[1:] if summary["excluded"] else rounds  # the attacker is out in round 2
        assert run.averaged == len(since) == summary["last_50_rounds"]
        assert run.honest_accuracy == pytest.approx(since.honest_accuracy.mean(), rel=1e-5)
        assert run.fluctuation == pytest.approx(since.honest_accuracy.diff().std(), rel=1e-5)
        if summary["jumps"]:
            assert run.jump_loss_model == summary["jumps"][0]["loss"]["model"]
            assert run.jump_accuracy == summary["jumps"][0]["accuracy"]["total"]
        assert run.attackers == (run.column == "two") and run.complete and run["last"] == 4
        assert run.true_exclusions == summary["true_exclusions"] and run.data == "phantom images"
    text = (tmp_path / "grid" / "table.md").read_text()
    assert text.startswith(
        "# grid: two by one\n\n`python madsim.py --experiment grid --clients 4 --dataset phantom --seeds 2`;"
    )
    assert re.search("; seeds 0, 1; 4 runs(, [1-3] of them distinct [^;]*)?; commit ", text)
    assert "over the last 3 to 4 rounds, without rounds before" in text
    assert "\ntwo by one; phantom images; last 3 to 4 rounds, mean" in out
    assert list(runs.columns[-len(experiments.NEWEST) :]) == experiments.NEWEST
    assert text.count("| MAD from 2 |") == 2
    resumed = next(path for path in (tmp_path / "grid").glob("*s1/config.json"))
    about = json.loads(resumed.read_text())
    resumed.write_text(json.dumps(about | {"resumed": [{"git": {"commit": "abc", "dirty": True}}]}))
    assert main([*grid[:-1], "1", "--out", str(tmp_path)]) == 0  # the other seed's runs stay in the table
    runs = pd.read_csv(tmp_path / "grid" / "table.csv")
    assert len(runs) == 4 and runs["dirty"].eq(True).sum() >= 1
    assert runs["commit"].str.contains(", abc").sum() == 1
    resumed.write_text(json.dumps(about | {"data": about["data"] | {"md5": "other"}}))
    assert main([*grid[:-1], "1", "--out", str(tmp_path)]) == 0  # but runs on other data do not
    runs = pd.read_csv(tmp_path / "grid" / "table.csv")
    assert sorted(runs["seed"]) == [0, 0, 1]


CLUSTER = """
import sys
from distributed import LocalCluster
with LocalCluster(n_workers=2, threads_per_worker=int(sys.argv[1]), dashboard_address=None) as cluster:
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def cluster(request):
    """The address of a Dask scheduler. It has two worker processes with `request.param` threads each."""
    pytest.importorskip("distributed")
    words = [sys.executable, "-c", CLUSTER, str(request.param)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(HERE)}, **pipes)
    yield process.stdout.readline().strip()
    process.communicate("")
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_a_cluster_gives_the_same_bytes_as_this_machine(cluster, tmp_path):
    words = "--experiment fig3c --rounds 3 --seeds 2 --clients 4 --malicious 0.25 --dataset phantom"
    words = words.split()
    for place, how in (("loky", ["--jobs", "2"]), ("dask", ["--backend", "dask", "--scheduler", cluster])):
        process = command(*words, *how, "--out", tmp_path / place)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "4 runs, 12 rounds in all" in out
    tables = [path.relative_to(tmp_path / "loky") for path in (tmp_path / "loky").rglob("*.csv")]
    assert len(tables) == 4 * 3 + 2  # table.csv and spans.csv too
    for table in tables:
        assert (tmp_path / "loky" / table).read_bytes() == (tmp_path / "dask" / table).read_bytes()
    about = json.loads(next((tmp_path / "dask").rglob("config.json")).read_text())
    assert about["command"][:-1] == ["madsim.py", *words, *how, "--out"]  # not the worker's own command


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_workers_with_several_threads_are_refused(cluster, tmp_path, capsys):
    """PyTorch keeps threads and random state per process."""
    words = ["--rounds", "2", "--dataset", "phantom", "--backend", "dask", "--scheduler", cluster, "--out", tmp_path]
    assert "have several threads; start them with --nthreads 1" in refusal(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_can_not_be_had_is_one_line(tmp_path, capsys, monkeypatch):
    words = ["--rounds", "2", "--dataset", "phantom", "--out", tmp_path]
    assert "--backend dask and --scheduler ADDRESS need each other" in refusal(
        capsys, *words, "--scheduler", "tcp://localhost:1"
    )
    assert "--backend dask and --scheduler ADDRESS need each other" in refusal(capsys, *words, "--backend", "dask")
    monkeypatch.setitem(sys.modules, "distributed", None)
    words += ["--backend", "dask", "--scheduler", "tcp://localhost:1"]
    assert "pip install distributed" in refusal(capsys, *words)


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(jobs, "CONNECT_SECONDS", 0.5)
    words = ["--rounds", "2", "--dataset", "phantom", "--out", tmp_path, "--backend", "dask"]
    assert "tcp://127.0.0.1:1" in refusal(capsys, *words, "--scheduler", "tcp://127.0.0.1:1")


def test_an_experiment_sets_its_own_options(capsys, tmp_path):
    text = refusal(capsys, "--experiment", "attacks", "--flip", "0.5", "--mad-start", "3", "--out", tmp_path / "out")
    assert text == "madsim: experiment attacks sets --flip, --mad-start itself; leave it out\n"


def test_what_an_experiment_asks_for_twice_is_run_once():
    """MAD starts in rounds 10 and 500 of 1000. These become rounds 1 and 10 of 20. Both become round 1 of 1."""
    assert len(cli.plan({"experiment": "fig3c", "rounds": 20})) == 2
    assert len(cli.plan({"experiment": "fig3c", "rounds": 1})) == 1


def test_each_experiment_has_a_folder_of_its_own(tmp_path):
    args = cli.make_parser().parse_args(["--experiment", "paper", "--out", str(tmp_path)])
    folders = [*cli.plan(vars(args))]
    assert [f.parent.name for f in folders] == ["fig3a"] * 7 + ["fig3c"] * 2
    assert len(set(folders)) == 9


# ---------------------------------------------------------------- several runs that are no experiment


def outcome(name: str, seed: int, true: int, out: float, honest: float, **columns) -> dict:
    """A row of a `tidy` frame."""
    found = {
        "row": name,
        "column": "",
        "seed": seed,
        "attackers": 2,
        "clients": 10,
        "complete": True,
        "last": 100,
        "averaged": 10,
    }
    found |= {"true_exclusions": true, "false_exclusions": 0, "last_exclusion": out, "data": "PneumoniaMNIST"}
    return found | {"honest_accuracy": honest, "test_accuracy": 0.85} | columns


def test_several_runs_end_with_a_line_for_each(capsys):
    never = outcome("nomad", 0, 0, np.nan, 0.9, averaged=7, last=7, complete=False)
    report_runs(pd.DataFrame([outcome("mad5", 0, 2, 6.0, 0.95, averaged=4), outcome("mad20", 0, 2, 20.0, 0.94), never]))
    assert capsys.readouterr().out.splitlines() == [
        "",
        "PneumoniaMNIST; accuracies are means over the last 4 to 10 rounds",
        "                               attackers  honest  out by    honest      test",
        "                                     out     out   round  accuracy  accuracy",
        "mad5-s0                           2 of 2       0       6     0.950     0.850",
        "mad20-s0                          2 of 2       0      20     0.940     0.850",
        "nomad-s0, ended after round 7     0 of 2       0             0.900     0.850",
    ]


def test_runs_that_differ_in_the_seed_also_have_means(capsys):
    report_runs(pd.DataFrame([outcome("mad5", seed, 2, 6.0, 0.9 + seed / 10) for seed in (0, 1)]))
    out = capsys.readouterr().out
    assert "mad5-s1" in out and "mad5, 2 seeds\n" in out and "honest accuracy       0.950 ± 0.071\n" in out


def test_several_runs_write_their_table(quick, tmp_path, capsys):
    words = "--rounds 3 --mad-start 2 never --dataset phantom --clients 4 --malicious 0.25 --jobs 1 --out"
    words = words.split()
    assert main([*words, str(tmp_path / "a b")]) == 0
    out = capsys.readouterr().out
    assert out.endswith(
        f"Tables       '{tmp_path}/a b/table.csv'\nFigures      python {script('plot.py')} '{tmp_path}/a b'\n"
    )
    runs = pd.read_csv(tmp_path / "a b" / "table.csv")
    assert runs["row"].tolist() == [f"{mad}-rounds3-clients4-malicious0.25-phantom" for mad in ("mad2", "nomad")]
    assert runs["mad_start"].tolist()[0] == 2 and runs["data"].eq("phantom images").all()
    assert out.count("Accuracy     participants") == 2  # few runs also have a report each
    assert main([*words, str(tmp_path / "a b"), "--seeds", "3"]) == 0  # four more runs
    assert main([*words, str(tmp_path / "b"), "--seeds", "3"]) == 0  # six runs at once are too many
    four, six = capsys.readouterr().out.split("6 runs, ")
    assert (four.count("participants"), six.count("participants")) == (8, 0)
    assert len(pd.read_csv(tmp_path / "b" / "table.csv")) == 6


def test_the_table_of_an_experiment_is_not_replaced_by_that_of_resumed_runs(quick, grid, tmp_path, capsys):
    assert main([*grid, "--out", str(tmp_path)]) == 0
    before = (tmp_path / "grid" / "table.csv").read_bytes()
    capsys.readouterr()
    assert main(["--jobs", "1", "--resume", *map(str, (tmp_path / "grid").glob("mad*"))]) == 0
    out = capsys.readouterr().out
    assert out.count("mad2-rounds4-clients4-malicious0-phantom-s1") == 2 and "Tables" not in out
    assert (tmp_path / "grid" / "table.csv").read_bytes() == before


def test_the_table_of_a_grid_has_a_line_per_cell(capsys):
    rows = [outcome(row, 0, 2, 6.0, 0.9, column=column) for row in ("iid", "dirichlet") for column in ("never", "MAD")]
    report_cells("two by two", pd.DataFrame(rows))
    assert capsys.readouterr().out.splitlines() == [
        "",
        "two by two; PneumoniaMNIST; last 10 rounds, mean ± standard deviation over seeds; counts with 95 % intervals",
        "                        attackers           honest    honest      test",
        "         seeds                out              out  accuracy  accuracy",
        "iid",
        "  never      1  2 of 2 (34-100 %)  0 of 8 (0-32 %)     0.900     0.850",
        "  MAD        1  2 of 2 (34-100 %)  0 of 8 (0-32 %)     0.900     0.850",
        "dirichlet",
        "  never      1  2 of 2 (34-100 %)  0 of 8 (0-32 %)     0.900     0.850",
        "  MAD        1  2 of 2 (34-100 %)  0 of 8 (0-32 %)     0.900     0.850",
    ]


@pytest.mark.parametrize(("rows", "done"), [((3, 5), "1 of 2 runs"), ((5, 5), "2 of 2 runs")])
def test_the_bar_of_several_runs_counts_them_and_their_rounds(tmp_path, monkeypatch, rows, done):
    """Two runs of 5 rounds. The folders get their rows while the bar is shown."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    folders = [tmp_path / str(number) for number in range(2)]
    with jobs.rounds_bar({folder: Config(rounds=5) for folder in folders}):
        for folder, count in zip(folders, rows):
            folder.mkdir()
            (folder / "rounds.csv").write_text("round\n" * (count + 1))
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith(f"{done}: ") and f" {sum(rows)}/10 [" in last and " rounds/s]" in last
