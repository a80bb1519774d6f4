"""madsim.py: whole runs, what they leave behind, the command line and its refusals."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refusal

import data
import madsim
import model
from madsim import Config, jump, main, over_seeds, run_name, simulate, summarise
from trust import PRESETS, RULES

HERE = Path(__file__).resolve().parents[1]

ROUNDS_CSV = (
    "round,loss,accuracy,honest_loss,honest_accuracy,"
    "test_loss,test_accuracy,test_sensitivity,test_specificity,test_auc,active"
)
CLIENTS_CSV = "round,client,malicious,active,distance,d,reputation,trust,train_loss,loss,accuracy"


@pytest.fixture
def quick(small, monkeypatch):
    """The phantom is the small one, so that a round takes a moment."""
    monkeypatch.setattr(data, "phantom", lambda seed=0, note="": replace(small, note=note))


def command(*arguments: str | Path, **options) -> subprocess.Popen:
    """`python madsim.py ARGUMENTS` in a process of its own."""
    words = [sys.executable, HERE / "madsim.py", *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# ---------------------------------------------------------------- the paper's story


def test_without_mad_the_attack_hurts_and_with_it_the_attackers_are_gone(phantom):
    """The negative control and the claim: FedAvg under attack, MAD from round 4, no attack."""
    attacked, defended, peace = (
        simulate(Config(rounds=9, **options), dataset=phantom)
        for options in ({}, {"mad_start": 4}, {"malicious": 0.0, "mad_start": 1})
    )
    attackers = attacked.summary["malicious"]
    assert len(attackers) == 2
    assert attacked.summary["excluded"] == peace.summary["excluded"] == {}
    assert defended.summary["excluded"] == dict.fromkeys(attackers, 4)
    assert (attacked.rounds.active == 10).all()
    assert defended.rounds.active.tolist() == [10] * 3 + [8] * 6
    end = {name: run.rounds.iloc[-1] for name, run in (("attack", attacked), ("mad", defended), ("peace", peace))}
    assert end["attack"].loss > 1.4 * end["mad"].loss
    assert end["attack"].accuracy < end["mad"].accuracy - 0.1
    assert end["attack"].honest_loss > end["mad"].honest_loss
    assert abs(end["mad"].test_auc - end["peace"].test_auc) < 0.05


@pytest.fixture(scope="module")
def trained(phantom) -> madsim.Result:
    """25 rounds without attack."""
    return simulate(Config(rounds=25, malicious=0.0), dataset=phantom)


def test_a_trained_federation_stays_in_the_phantoms_range(trained):
    assert 0.90 <= trained.rounds.test_accuracy.tail(5).mean() <= 0.98


@pytest.mark.parametrize("attack", [name for name in data.ATTACKS | model.ATTACKS if name != "nan"])
def test_every_attack_hurts_where_there_is_no_defence(attack, trained, phantom, monkeypatch):
    """The negative control, from a trained model on: after four rounds under attack it is worse than in peace."""
    monkeypatch.setattr(model, "initial_weights", lambda seed: torch.from_numpy(trained.weights.copy()))
    attacked, peace = (
        simulate(Config(rounds=4, malicious=malicious, attack=attack), dataset=phantom).rounds.iloc[-1]
        for malicious in (0.4, 0.0)
    )
    print(attack, attacked.to_dict(), peace.to_dict())
    assert attacked.test_accuracy < peace.test_accuracy - 0.01 or attacked.honest_loss > 1.2 * peace.honest_loss


def test_an_attack_begins_with_its_round_and_pauses_with_its_period(small):
    """Until then the malicious are as the others, and their validation labels are true."""
    late = simulate(Config(rounds=5, attack_start=4), dataset=small)
    peace = simulate(Config(rounds=5, malicious=0.0), dataset=small)
    columns = ["loss", "accuracy", "test_loss", "test_auc"]
    same = (late.rounds[columns] == peace.rounds[columns]).all(axis=1).tolist()
    assert same == [True, True, True, False, False]
    on_off = simulate(Config(rounds=5, attack_start=2, attack_period=1), dataset=small)
    attackers = on_off.clients[on_off.clients.malicious == 1].groupby("round").accuracy.mean()
    honest = on_off.clients[on_off.clients.malicious == 0].groupby("round").accuracy.mean()
    assert (attackers < honest - 0.1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("partition", ["dirichlet", "quantity"])
def test_unequal_clients_train_exactly(partition, small):
    """Stacked, with clients of very different sizes, gives what each gives alone; the average weighs them by size."""
    config = Config(rounds=2, partition=partition, concentration=0.3, seed=1)
    stacked, loop = (simulate(replace(config, method=method), dataset=small) for method in ("stacked", "loop"))
    sizes = [len(share.train) for share in madsim.gather(config, small).shares]
    assert max(sizes) > 5 * min(sizes)
    pd.testing.assert_frame_equal(stacked.rounds, loop.rounds, rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_on_the_real_images_both_attackers_are_excluded_at_once(real, seed):
    run = simulate(Config(rounds=8, mad_start=5, seed=seed), dataset=real)
    assert run.summary["excluded"] == dict.fromkeys(run.summary["malicious"], 5)
    before, after = run.rounds.iloc[3], run.rounds.iloc[4]
    assert after.loss < before.loss / 2 and after.accuracy > before.accuracy + 0.1


def test_the_testbed_preset_excludes_one_attacker_a_round_later(phantom):
    run = simulate(Config(rounds=7, mad_start=4, settings=PRESETS["testbed"]), dataset=phantom)
    assert run.rounds.active.tolist()[:5] == [10, 10, 10, 10, 9]
    (first,) = (client for client, t in run.summary["excluded"].items() if t == 5)
    assert first in run.summary["malicious"]
    assert run.clients.trust.notna().all()  # the excluded are still trained and scored


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
    assert rounds.notna().all(axis=None)  # it reached neither the scores nor the average


# ---------------------------------------------------------------- results


def test_a_runs_folder(small, tmp_path):
    folder = tmp_path / "a" / "run"
    run = simulate(Config(rounds=3, mad_start=2, clients=5), folder, dataset=small)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "rounds.csv", "clients.csv", "plane.csv", "summary.json", "samples.npz", "checkpoint.npz",
    }  # fmt: skip
    texts = {name: (folder / f"{name}.csv").read_text() for name in ("rounds", "clients")}
    assert texts["rounds"].splitlines()[0] == ROUNDS_CSV
    assert texts["clients"].splitlines()[0] == CLIENTS_CSV
    for name, text in texts.items():
        assert "nan" not in text  # an absent value is an empty field
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name}.csv"), getattr(run, name), check_dtype=False)
    assert len(run.rounds) == 3 and len(run.clients) == 15
    assert run.clients.active.isin([0, 1]).all() and run.clients.malicious.isin([0, 1]).all()
    assert json.loads((folder / "summary.json").read_text())["complete"] is True
    with np.load(folder / "samples.npz", allow_pickle=False) as samples:
        assert samples["labels"].tolist() == [0, 0, 1, 1] and samples["images"].shape == (4, 28, 28)


def test_config_json_holds_what_is_needed_to_run_it_again(small, tmp_path):
    config = Config(rounds=1, lr=0.002, clients=4, threads=1)
    simulate(config, tmp_path / "run", dataset=replace(small, note="no network"))
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    fields = {name: written[name] for name in Config.__dataclass_fields__}
    fields["settings"] = type(config.settings)(**fields["settings"])
    assert Config(**fields) == config
    assert written["data"] == {"name": "phantom", "md5": small.md5, "note": "no network"}
    assert written["machine"] == {"device": "cpu", "threads": 1}
    assert set(written["versions"]) >= {"python", "numpy", "torch", "scikit-learn"}
    assert set(written["git"]) == {"commit", "dirty"}
    assert written["command"]


def test_the_rounds_are_the_means_of_the_clients(small):
    run = simulate(Config(rounds=4, mad_start=2), dataset=small)
    for row in run.rounds.itertuples():
        clients = run.clients[run.clients["round"] == row.round]
        for column, who in (("", clients.active == 1), ("honest_", clients.malicious == 0)):
            assert getattr(row, f"{column}loss") == pytest.approx(clients.loss[who].mean(), rel=1e-5)
            assert getattr(row, f"{column}accuracy") == pytest.approx(clients.accuracy[who].mean(), rel=1e-5)
        assert row.active == clients.active.sum()
    gone = run.clients[run.clients.groupby("client").active.shift() == 0]
    assert gone[["distance", "train_loss"]].isna().all(axis=None)
    assert run.clients[["loss", "accuracy"]].notna().all(axis=None)  # every client is evaluated, the excluded too


def test_one_seed_gives_the_same_bytes_and_another_does_not(small, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        simulate(Config(rounds=3, mad_start=2, seed=seed), tmp_path / name, dataset=small)
    for file in ("rounds.csv", "clients.csv"):
        one, again, other = ((tmp_path / name / file).read_bytes() for name in ("one", "again", "other"))
        assert one == again != other


def test_a_loop_gives_what_stacked_training_gives(small):
    stacked, loop = (simulate(Config(rounds=2, method=method), dataset=small) for method in ("stacked", "loop"))
    pd.testing.assert_frame_equal(stacked.rounds, loop.rounds, rtol=1e-3)


def story() -> pd.DataFrame:
    """Three clients over three rounds: 1 (malicious) is excluded in round 2, 2 (honest) in round 3 for NaN."""
    rows = [
        # round, client, malicious, active, distance, loss, accuracy
        (1, 0, 0, 1, 0.1, 0.5, 0.8), (1, 1, 1, 1, 0.9, 2.0, 0.2), (1, 2, 0, 1, 0.1, 0.7, 0.7),
        (2, 0, 0, 1, 0.1, 0.4, 0.9), (2, 1, 1, 0, 0.9, 2.5, 0.1), (2, 2, 0, 1, 0.1, 0.4, 0.8),
        (3, 0, 0, 1, 0.1, 0.3, 0.9), (3, 1, 1, 0, np.nan, 3.0, 0.1), (3, 2, 0, 0, np.nan, 0.3, 0.9),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["round", "client", "malicious", "active", "distance", "loss", "accuracy"])


def test_a_summary_by_hand():
    rounds = pd.DataFrame({"round": [1, 2, 3], "loss": [1.0, 0.4, 0.3], "test_auc": [0.5, 0.6, 0.7]})
    summary = summarise(rounds, story(), mad_start=1)
    assert summary["excluded"] == {1: 2, 2: 3}
    assert (summary["malicious"], summary["nonfinite"]) == ([1], [2])
    assert (summary["true_exclusions"], summary["false_exclusions"]) == (1, 1)
    assert (summary["precision"], summary["recall"], summary["rounds_to_detection"]) == (0.5, 1.0, 1)
    assert summary["last_50"] == {"loss": 0.566667, "test_auc": 0.6}
    assert [j["round"] for j in summary["jumps"]] == [2, 3]


def test_a_jump_by_hand():
    # round 1: mean loss of all 3.2 / 3, of those who stay 0.6; round 2, of those who stay: 0.4
    change = jump(story(), 2)
    assert change["clients"] == [1]
    assert change["loss"] == pytest.approx(
        {"total": 0.4 - 3.2 / 3, "composition": 0.6 - 3.2 / 3, "model": -0.2}, abs=1e-6
    )
    assert change["accuracy"] == pytest.approx(
        {"total": 0.85 - 1.7 / 3, "composition": 0.75 - 1.7 / 3, "model": 0.1}, abs=1e-6
    )


def test_summaries_never_hold_what_json_does_not_know():
    summary = {"a": [float("nan"), 1.5, {"b": np.float64("inf")}], "c": "nan"}
    assert madsim.without_nan(summary) == {"a": [None, 1.5, {"b": None}], "c": "nan"}


def test_detection_of_nothing_is_not_a_number_but_null():
    clients = story().assign(active=1)
    summary = summarise(pd.DataFrame({"round": [1]}), clients, mad_start=1)
    assert summary["precision"] is None and summary["recall"] == 0 and summary["rounds_to_detection"] is None
    assert summarise(pd.DataFrame({"round": [1]}), clients.assign(malicious=0), mad_start=1)["recall"] is None


# ---------------------------------------------------------------- several runs


def test_names_tell_what_differs_from_the_defaults():
    assert run_name(Config()) == "nomad-s0"
    assert run_name(Config(mad_start=500)) == "mad500-s0"
    assert run_name(Config(mad_start=5, rounds=40, malicious=0.0, seed=3)) == "mad5-rounds40-malicious0-s3"
    assert run_name(Config(settings=PRESETS["testbed"])) == "nomad-testbed-s0"
    assert run_name(Config(settings=replace(PRESETS["paper"], threshold=0.3))) == "nomad-threshold0.3-s0"
    assert run_name(Config(threads=1, device="cpu", data_root="x")) == "nomad-s0"


def test_several_mad_starts_and_seeds_make_several_runs(quick, tmp_path, capsys):
    words = "--rounds 3 --mad-start 1 2 never --seeds 2 --dataset phantom --clients 4 --malicious 0.25 --jobs 2"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    names = {f"{mad}-rounds3-clients4-malicious0.25-phantom-s{s}" for mad in ("mad1", "mad2", "nomad") for s in (0, 1)}
    assert {path.name for path in tmp_path.iterdir()} == names
    threads = {json.loads((tmp_path / n / "config.json").read_text())["machine"]["threads"] for n in names}
    assert threads == {max(1, os.cpu_count() // 2)}  # the processes share the cores
    assert "6 runs, 18 rounds in all" in capsys.readouterr().out


# ---------------------------------------------------------------- where the models lie


def test_where_the_models_lie_is_written_of_up_to_fifty_clients(small, tmp_path):
    result = simulate(Config(rounds=4, mad_start=3), tmp_path / "run", dataset=small)
    points = pd.read_csv(tmp_path / "run" / "plane.csv")
    assert points.columns.tolist() == ["round", "client", "x", "y"] and len(points) == 40
    absent = points[points.x.isna()]
    assert absent.client.tolist() == result.summary["malicious"]  # in the round after they were excluded
    # No point lies farther from the centre than its model, of which it is the projection.
    assert (np.hypot(points.x, points.y) <= result.clients.distance * 1.001).dropna()[points.x.notna()].all()
    simulate(Config(rounds=1, clients=51), tmp_path / "many", dataset=small)
    assert not (tmp_path / "many" / "plane.csv").exists()


# ---------------------------------------------------------------- membership inference


def test_membership_is_measured_of_the_model_that_clients_received(small, tmp_path):
    """In round 4 that is the model of round 3."""
    config = Config(rounds=5, membership=2, mad_start=1)
    result = simulate(config, tmp_path / "run", dataset=small)
    table = pd.read_csv(tmp_path / "run" / "membership.csv")
    assert table.columns.tolist() == madsim.MEMBERSHIP_COLUMNS == result.membership.columns.tolist()
    assert table["round"].tolist() == [2, 4] and np.allclose(table, result.membership)
    earlier = simulate(replace(config, rounds=3, membership=None), dataset=small)
    assert earlier.membership is None and earlier.summary["membership"] is None
    measured = madsim.gather(config, small).membership(earlier.weights, 4)
    assert table.iloc[1, 1:].to_dict() == pytest.approx(measured, rel=1e-5)


def test_measuring_membership_changes_nothing_else(small):
    one, other = (simulate(Config(rounds=3, membership=m), dataset=small) for m in (1, None))
    assert one.rounds.equals(other.rounds) and one.clients.equals(other.clients)


def test_what_an_excluded_attacker_holds_by_hand():
    """Client 1 was trained last in round 2, so it holds what was measured then; client 0 goes on."""
    trained = [(1, 0, 0.5), (1, 1, 0.5), (2, 0, 0.4), (2, 1, 0.4), (3, 0, 0.3), (3, 1, np.nan)]
    clients = pd.DataFrame(trained, columns=["round", "client", "train_loss"])
    membership = pd.DataFrame({"round": [2, 3], "test_advantage": [0.1, 0.2]})
    assert madsim.held(membership, clients, 1) == {"round": 2, "test_advantage": 0.1}
    assert madsim.held(membership, clients, 0) == {"round": 3, "test_advantage": 0.2}
    assert madsim.held(membership.tail(1), clients, 1) is None  # measured too late


# ---------------------------------------------------------------- experiments


def cells(name: str, **given) -> dict[tuple[str, str], Config]:
    return madsim.EXPERIMENTS[name].cells(given)


def test_experiments_are_the_papers():
    fig3a = [*cells("fig3a").values()]
    assert [(c.rounds, c.mad_start, c.malicious) for c in fig3a] == [
        *((100, start, 0.2) for start in (5, 20, 40, 60, 80, None)), (100, None, 0.0),
    ]  # fmt: skip
    assert [(c.rounds, c.mad_start) for c in cells("fig3c").values()] == [(1000, 10), (1000, 500)]
    assert [c.mad_start for c in cells("fig3a", rounds=20).values()][:6] == [1, 4, 8, 12, 16, None]


@pytest.mark.parametrize("name", madsim.EXPERIMENTS)
def test_every_cell_is_a_run_of_its_own(name):
    grid = cells(name)
    rows, columns = madsim.EXPERIMENTS[name].rows, madsim.EXPERIMENTS[name].columns
    assert len({run_name(config) for config in grid.values()}) == len(grid) == len(rows) * len(columns)


def test_cells_are_what_their_names_say():
    readings, defences, attacks = cells("readings"), cells("defences"), cells("attacks", rounds=30)
    assert readings["preset testbed", "20%, MAD from 5"].settings == PRESETS["testbed"]
    assert readings["preset paper", "40%, MAD from 40"] == Config(rounds=60, mad_start=40, malicious=0.4)
    assert readings["silhouette alone", "0%, MAD from 5"].settings == replace(PRESETS["paper"], outlying=0.0)
    assert {name for name, _ in defences} == {"mean, never", "mean, MAD from 5"} | RULES.keys() - {"mean"}
    assert defences["krum", "alie"] == Config(rounds=40, rule="krum", attack="alie")
    assert defences["mean, MAD from 5", "no attack"] == Config(rounds=40, mad_start=5, malicious=0.0)
    known = data.ATTACKS.keys() | model.ATTACKS.keys() | model.OMNISCIENT.keys()
    assert {c.attack for c in attacks.values()} == known - {"nan"} == {c.attack for c in defences.values()}
    late, on_off = (
        attacks["label_flip from round 30", "never"],
        attacks["label_flip, 5 rounds on, 5 off", "MAD from 10"],
    )
    assert late.attack_start == 15  # half the rounds, so half the round
    assert (on_off.attack_period, on_off.mad_start) == (2, 5)
    noniid = cells("noniid")
    assert noniid["dirichlet, alpha 0.5", "label_flip, never"] == Config(rounds=60, partition="dirichlet")
    assert cells("membership")["never", ""] == Config(rounds=600, membership=10)


def test_the_options_given_hold_in_every_cell():
    for config in cells("readings", threshold=0.3, clients=20).values():
        assert (config.settings.threshold, config.clients) == (0.3, 20)


def table(*losses: float, **columns) -> pd.DataFrame:
    """What `tidy` makes of runs of one cell with these losses."""
    rows = [{"row": "a", "column": "b", "complete": True, "loss": loss, "precision": None} for loss in losses]
    return pd.DataFrame(rows).assign(**columns)


def test_seeds_are_summed_up_by_hand(capsys):
    """Losses 0.5 and 0.7: mean 0.6, sample deviation 0.1 * sqrt 2. What was cut short is left out."""
    runs = table(0.5, 0.7, 9.0, complete=[True, True, False], true_exclusions=[2, 1, 0], last=40)
    (texts,) = over_seeds(runs).to_dict("records")
    assert texts == {"seeds": 2, "loss": "0.600 ± 0.141", "precision": "", "attackers out": "1.5 ± 0.7"}
    assert over_seeds(table(0.5)).loss.tolist() == ["0.500"]  # of one seed no deviation
    missed = pd.Series([3.0, 4.0, np.nan])
    assert [madsim.in_words(missed[start:], 1) for start in (0, 1, 2)] == ["3.5 ± 0.7 (of 2)", "4.0 (of 1)", ""]
    madsim.report_seeds(runs)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Last 10 rounds: mean ± standard deviation over seeds",
        "a, 2 seeds",
        "             attackers out         1.5 ± 0.7",
        "             loss                  0.600 ± 0.141",
    ]


def test_a_table_in_markdown_by_hand():
    assert madsim.markdown(over_seeds(table(0.5)).drop(columns="precision"), "# T").splitlines() == [
        "# T", "", "| row | column | seeds | loss |", "| --- | --- | --- | --- |", "| a | b | 1 | 0.500 |",
    ]  # fmt: skip
    single = over_seeds(table(0.5, column="")).drop(columns="precision")
    assert madsim.markdown(single, "").splitlines()[2:] == [
        "| row | seeds | loss |", "| --- | --- | --- |", "| a | 1 | 0.500 |",
    ]  # fmt: skip


@pytest.fixture
def grid(monkeypatch):
    """The words for an experiment of three runs of 4 rounds, "grid"."""
    columns = {"none": {"malicious": 0.0}, "two": {"malicious": 0.25}}
    experiment = madsim.Experiment("two by one", 4, madsim.mad_from(2), columns)
    monkeypatch.setitem(madsim.EXPERIMENTS, "grid", experiment)
    return ["--experiment", "grid", "--clients", "4", "--dataset", "phantom", "--jobs", "1", "--seeds", "2"]


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
        folder = tmp_path / "grid" / run_name(config)
        rounds, summary = pd.read_csv(folder / "rounds.csv"), json.loads((folder / "summary.json").read_text())
        assert run.honest_accuracy == pytest.approx(rounds.honest_accuracy.mean(), rel=1e-5)
        assert run.fluctuation == pytest.approx(rounds.honest_accuracy.diff().std(), rel=1e-5)
        if summary["jumps"]:
            assert run.jump_loss_model == summary["jumps"][0]["loss"]["model"]
            assert run.jump_accuracy == summary["jumps"][0]["accuracy"]["total"]
        assert run.attackers == (run.column == "two") and run.complete and run["last"] == 4
        assert run.true_exclusions == summary["true_exclusions"] and run.data == "phantom"
    text = (tmp_path / "grid" / "table.md").read_text()
    assert text.startswith(
        "# grid: two by one\n\n`python madsim.py --experiment grid --clients 4 --dataset phantom --seeds 2`;"
    )
    assert "seeds 0, 1; commit " in text and "over the last 4 rounds" in text
    assert text.count("| MAD from 2 |") == 2
    resumed = next(path for path in (tmp_path / "grid").glob("*s1/config.json"))
    about = json.loads(resumed.read_text())
    resumed.write_text(json.dumps(about | {"resumed": [{"git": {"commit": "abc", "dirty": True}}]}))
    assert main([*grid[:-1], "1", "--out", str(tmp_path)]) == 0  # the other seed's runs stay in the table
    runs = pd.read_csv(tmp_path / "grid" / "table.csv")
    assert len(runs) == 4 and runs["dirty"].sum() >= 1 and sum(", abc" in commit for commit in runs["commit"]) == 1


CLUSTER = """
import sys
from distributed import LocalCluster
with LocalCluster(n_workers=2, threads_per_worker=int(sys.argv[1]), dashboard_address=None) as cluster:
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def cluster(request):
    """The address of a Dask scheduler with two worker processes, of so many threads each, that know our modules."""
    words = [sys.executable, "-c", CLUSTER, str(request.param)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(HERE)}, **pipes)
    yield process.stdout.readline().strip()
    process.communicate("")
    assert process.returncode == 0


@pytest.mark.cluster
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
    assert len(tables) == 4 * 3 + 1
    for table in tables:
        assert (tmp_path / "loky" / table).read_bytes() == (tmp_path / "dask" / table).read_bytes()
    about = json.loads(next((tmp_path / "dask").rglob("config.json")).read_text())
    assert about["command"][:-1] == ["madsim.py", *words, *how, "--out"]  # not the worker's own


@pytest.mark.cluster
@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_workers_with_several_threads_are_refused(cluster, tmp_path, capsys):
    """PyTorch's threads and random state are a process's, not a thread's."""
    words = ["--rounds", "2", "--dataset", "phantom", "--backend", "dask", "--scheduler", cluster, "--out", tmp_path]
    assert "have several threads; start them with --nthreads 1" in refusal(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_can_not_be_had_is_one_line(tmp_path, capsys, monkeypatch):
    words = ["--rounds", "2", "--dataset", "phantom", "--out", tmp_path]
    assert "--scheduler goes with --backend dask" in refusal(capsys, *words, "--scheduler", "tcp://localhost:1")
    assert "--backend dask needs --scheduler ADDRESS" in refusal(capsys, *words, "--backend", "dask")
    monkeypatch.setitem(sys.modules, "distributed", None)
    words += ["--backend", "dask", "--scheduler", "tcp://localhost:1"]
    assert "pip install distributed" in refusal(capsys, *words)


@pytest.mark.cluster
def test_a_scheduler_that_does_not_answer_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(madsim, "CONNECT_SECONDS", 0.5)
    words = ["--rounds", "2", "--dataset", "phantom", "--out", tmp_path, "--backend", "dask"]
    assert "tcp://127.0.0.1:1" in refusal(capsys, *words, "--scheduler", "tcp://127.0.0.1:1")


def test_an_experiment_sets_its_own_options(capsys, tmp_path):
    text = refusal(capsys, "--experiment", "attacks", "--flip", "0.5", "--mad-start", "3", "--out", tmp_path / "out")
    assert text == "madsim: experiment attacks sets --flip, --mad-start itself; leave that out\n"


def test_what_an_experiment_asks_for_twice_is_run_once():
    """In 20 rounds MAD from 2 and from 10 of 1000 are both MAD from 1."""
    assert len(madsim.plan({"experiment": "fig3c", "rounds": 20})) == 2
    assert len(madsim.plan({"experiment": "fig3c", "rounds": 1})) == 1


def test_each_experiment_has_a_folder_of_its_own(tmp_path):
    args = madsim.make_parser().parse_args(["--experiment", "paper", "--out", str(tmp_path)])
    folders = [*madsim.plan(vars(args))]
    assert [f.parent.name for f in folders] == ["fig3a"] * 7 + ["fig3c"] * 2
    assert len(set(folders)) == 9


# ---------------------------------------------------------------- the command line


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
        ("--lr nan", "lr nan must be at least 0 and finite"),
        ("--lr inf", "lr inf must be at least 0 and finite"),
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
        ("--attack flipp", "'flipp' is unknown; known: label_flip, one_way_flip, scaled, hug, nan, sign_flip, noise"),
        ("--partition odd", "invalid choice: 'odd' (choose from"),
        ("--partition dirichlet --alpha 0", "concentration (--alpha) 0.0 must be at least 0.001 and finite"),
        ("--rule medoid", "invalid choice: 'medoid' (choose from"),
        ("--dataset mnist", "invalid choice: 'mnist' (choose from"),
        ("--preset x", "invalid choice: 'x' (choose from"),
        ("--experiment fig9", "invalid choice: 'fig9' (choose from"),
        ("--experiment fig3a --mad-start 3", "experiment fig3a sets --mad-start itself; leave that out"),
        ("--experiment noniid --alpha 1", "experiment noniid sets --alpha itself; leave that out"),
        ("--alpha-reputation 2", "alpha (--alpha-reputation) 2.0 must be at least 0 and at most 1"),
        ("--experiment fig3a --quick", "--quick is a run of its own"),
        ("--rounds 2 --attack-start 5", "attack_start 5 lies beyond the 2 rounds; use 1 to 2"),
        ("--rounds 2 --membership 10", "membership 10 lies beyond the 2 rounds"),
        ("--alpha 1", "concentration (--alpha) 1.0 changes nothing with partition iid"),
        ("--attack noise --flip 0.5", "flip 0.5 changes nothing: attack noise flips no labels"),
        (
            "--rule multi_krum --malicious 0.4",
            "multi_krum needs 11 clients to withstand 4 malicious ones; there are 10",
        ),
        ("--backend dask --scheduler tcp://localhost:1 --jobs 2", "--jobs is of this machine"),
        ("--mad-start soon", "--mad-start: 'soon' is neither a round nor 'never'"),
        ("--no-such-option", "unrecognized arguments: --no-such-option"),
        ("--dataset phantom --clients 3000", "3000 clients can't share 4708 images"),
        ("--rounds 10 --mad-start 3 3", None),
    ],
)
def test_bad_input_gets_one_line(arguments, expected, capsys, tmp_path):
    if expected is None:  # the same run twice is run once
        args = madsim.make_parser().parse_args([*arguments.split(), "--out", str(tmp_path)])
        assert len(madsim.plan(vars(args))) == 1
        return
    assert expected in refusal(capsys, *arguments.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    if not torch.cuda.is_available():  # refused before the earlier results are touched
        refusal(capsys, *words, "--overwrite", "--device", "cuda")
    assert (folder / "summary.json").read_bytes() == before
    assert main([*words, "--overwrite"]) == 0
    assert (folder / "summary.json").read_bytes() != before


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
    folders = [tmp_path / f"{mad}-rounds100000-phantom-s0" for mad in ("mad5", "nomad")]
    assert f"madsim: stopped; go on with: python madsim.py --resume {folders[0]} {folders[1]}\n" in err
    assert [len(pd.read_csv(table)) > 2 for table in tmp_path.rglob("rounds.csv")] == [True, True]


def test_the_list_names_everything_with_a_line(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    known = {*data.ATTACKS, *model.ATTACKS, *model.OMNISCIENT, *RULES, *PRESETS, *madsim.EXPERIMENTS}
    for name in known:
        assert re.search(rf"^  {name} +\S.{{8}}", out, re.MULTILINE), name
    assert len(out.splitlines()) == len(known) + 5 and max(map(len, out.splitlines())) <= 80  # 4 kinds, and `paper`
    for words in ("Krum (Blanchard et al. 2017): the row", "9 settings differ", "Ours: knows MAD", "fig3a and fig3c"):
        assert words in out


def test_a_quick_story_has_an_attack_and_an_exclusion(quick, tmp_path, capsys):
    assert main(["--quick", "--dataset", "phantom", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 run, 60 rounds in all, about 10 seconds" in out
    assert json.loads((tmp_path / "mad30-rounds60-phantom-s0" / "summary.json").read_text())["complete"]
    shorter = ["--quick", "--rounds", "31", "--clients", "4", "--malicious", "0", "--dataset", "phantom", "--out"]
    assert main([*shorter, str(tmp_path)]) == 0  # what is given besides holds
    out = capsys.readouterr().out
    assert "31 rounds in all" in out and "Excluded     nobody; nobody attacked\n" in out
    assert (tmp_path / "mad15-rounds31-clients4-malicious0-phantom-s0").is_dir()


def test_output_that_is_no_terminal_is_plain(tmp_path):
    words = ["--rounds", "2", "--dataset", "phantom", "--threads", "1", "--out", tmp_path]
    out, err = command(*words, env=os.environ | {"NO_COLOR": "1"}).communicate(timeout=60)
    assert err == "" and "\x1b" not in out and "\r" not in out


@pytest.mark.parametrize(
    ("seconds", "words"), [(2, "10 seconds"), (44, "40 seconds"), (60, "1 minute"), (200, "3 minutes")]
)
def test_times_are_said_roughly(seconds, words):
    assert madsim.minutes(seconds) == words


def test_help_is_quick_and_says_where_defaults_come_from():
    start = time.perf_counter()
    out, _ = command("--help").communicate(timeout=60)
    assert time.perf_counter() - start < 2  # 0.15 s where it was measured; the bound allows for a busy machine
    for words in ("default: 1000, paper: 100 to", "--beta-trust", "--scale-floor", "Kaufman and", "default: results"):
        assert words in out


def test_what_is_imported_before_it_is_needed():
    """The command line and the leaves' rule: madsim does not bring torch, trust neither torch nor scikit-learn."""
    for module, absent in (("madsim", "torch"), ("trust", "torch"), ("trust", "sklearn"), ("data", "torch")):
        code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0, (module, absent)


def test_the_leaves_import_nothing_of_ours():
    ours = {"madsim", "data", "model", "trust", "plot"}
    for leaf in ("data", "model", "trust", "plot"):
        code = f"import sys, {leaf}; print(*sys.modules)"
        loaded = subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout
        assert ours & set(loaded.split()) == {leaf}


def test_rows_are_written_as_the_run_goes(small, tmp_path, monkeypatch):
    seen = []
    evaluate = model.Clients.evaluate

    def count(self, w, t):
        with open(tmp_path / "run" / "rounds.csv") as file:
            seen.append(len(list(csv.reader(file))) - 1)
        return evaluate(self, w, t)

    monkeypatch.setattr(model.Clients, "evaluate", count)
    simulate(Config(rounds=4), tmp_path / "run", dataset=small)
    assert seen == [0, 1, 2, 3]
