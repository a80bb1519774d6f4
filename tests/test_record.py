"""bench/record.py, bench/membership.py: what a run leaves behind, and what is measured on the way."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

import data
import madsim
import model
from bench import record
from bench.folder import without_nan
from bench.membership import MembershipInference, chance_advantage, membership_advantage
from bench.record import MEMBERSHIP_COLUMNS, held, jump, plane, summarise
from madsim import Config, simulate
from trust import Settings

ROUNDS_CSV = (
    "round,loss,accuracy,honest_loss,honest_accuracy,"
    "test_loss,test_accuracy,test_sensitivity,test_specificity,test_auc,active"
)
CLIENTS_CSV = "round,client,malicious,active,distance,d,reputation,trust,train_loss,loss,accuracy"
PAPER = Settings()


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


@pytest.mark.parametrize(("usual", "threads", "told"), [(1e-9, 2, True), (1e-9, 1, False), (1e3, 2, False)])
def test_rounds_that_are_far_too_slow_are_told_of_once(usual, threads, told, small, monkeypatch, capsys):
    monkeypatch.setattr(record, "ROUND_SECONDS", usual)
    simulate(Config(rounds=7, threads=threads), dataset=small, bar=True)
    assert capsys.readouterr().err.count("go on with --threads 1") == told


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
    assert without_nan(summary) == {"a": [None, 1.5, {"b": None}], "c": "nan"}


def test_detection_of_nothing_is_not_a_number_but_null():
    clients = story().assign(active=1)
    summary = summarise(pd.DataFrame({"round": [1]}), clients, mad_start=1)
    assert summary["precision"] is None and summary["recall"] == 0 and summary["rounds_to_detection"] is None
    assert summarise(pd.DataFrame({"round": [1]}), clients.assign(malicious=0), mad_start=1)["recall"] is None


def test_one_seed_gives_the_same_bytes_and_another_does_not(small, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        simulate(Config(rounds=3, mad_start=2, seed=seed), tmp_path / name, dataset=small)
    for file in ("rounds.csv", "clients.csv"):
        one, again, other = ((tmp_path / name / file).read_bytes() for name in ("one", "again", "other"))
        assert one == again != other


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


def distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_points_of_a_plane_keep_their_distances_and_the_main_cluster_is_around_the_origin():
    """Three in a triangle and one far off, somewhere in 50 dimensions: the first three are the main cluster."""
    flat = np.array([[0.0, 0], [2, 0], [1, 1], [20, 5]])
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 2)))[0]
    points = plane(flat @ axes.T + 3, 0.0, PAPER)
    assert distances(points) == pytest.approx(distances(flat), abs=1e-6)
    assert points[:3].mean(0) == pytest.approx([0, 0], abs=1e-6)


def test_the_plane_is_that_of_the_two_principal_components():
    W = np.random.default_rng(1).normal(size=(9, 5)) * [5, 4, 0.1, 0.1, 0.1]
    whole = Settings(clusters=1)  # everybody is the main cluster
    components = PCA(2).fit_transform(W)
    assert distances(plane(W, 0.0, whole)) == pytest.approx(distances(components), rel=1e-6)


def test_points_are_turned_towards_those_before():
    rng = np.random.default_rng(2)
    W = rng.normal(size=(8, 30))
    before = plane(W, 0.0, PAPER)
    assert plane(W, 0.0, PAPER, before @ [[0, -1], [1, 0]]) == pytest.approx(before @ [[0, -1], [1, 0]], abs=1e-6)
    before[3] = np.nan  # a client that was not there
    assert plane(W, 0.0, PAPER, before)[:3] == pytest.approx(before[:3], abs=1e-6)


def test_one_client_lies_at_the_origin_and_two_on_a_line():
    assert plane(np.array([[7.0]]), 0.0, PAPER).tolist() == [[0, 0]]
    assert np.sort(plane(np.array([[7.0], [11.0]]), 0.0, PAPER)[:, 0]) == pytest.approx([-2, 2])


# ---------------------------------------------------------------- membership inference


@pytest.mark.parametrize(
    ("members", "others", "advantage"),
    [
        ([1, 2], [3, 4], 1.0),  # a threshold of 2 tells all
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.0),
        ([1, 2, 5, 6], [3, 4, 5, 6], 0.5),  # at 2: half of the members, none of the others
        ([3, 4], [1, 2], 0.0),  # the attack calls the lower losses members'; it can't do worse than not at all
        ([1, 1, 2], [1, 2, 2, 2], 2 / 3 - 1 / 4),  # ties fall together
    ],
)
def test_membership_advantage_by_hand(members, others, advantage):
    assert membership_advantage(np.array(members), np.array(others)) == pytest.approx(advantage)


def test_chance_alone_gives_the_advantage_that_is_said():
    """The mean of 2000 draws of 300 members and 200 others of one kind; Smirnov's limit is a little above it."""
    rng = np.random.default_rng(0)
    found = np.mean([membership_advantage(rng.random(300), rng.random(200)) for _ in range(2000)])
    assert chance_advantage(300, 200) == pytest.approx(math.sqrt(math.pi / 8 / 120), rel=1e-9)
    assert 0.9 < found / chance_advantage(300, 200) < 1.0


def test_membership_is_told_of_a_model_that_remembers_and_of_no_other(phantom):
    """Two honest clients of 40 images: after 150 epochs at a high rate their own are known by heart."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(len(phantom.train_labels))
    shares = [data.Share(numbers[a : a + 40], numbers[a + 1000 : a + 1500], a == 80) for a in (0, 40, 80)]
    noise = rng.integers(0, 2, len(phantom.train_labels))  # labels that can only be known by heart
    clients = model.Clients(
        (phantom.train_images, noise, noise), (phantom.test_images, phantom.test_labels), shares,
        seed=0, attack=("label_flip", 1, None), device="cpu", threads=None,
        epochs=150, batch_size=20, lr=2e-3, dropout=(0.0, 0.0),
    )  # fmt: skip
    w = model.initial_weights(0).numpy()
    inference = MembershipInference(clients)
    before = inference(w, 1)
    W, _ = clients.train(w, np.array([True, True, False]), 1)
    after = inference(W[0].numpy(), 1)  # of 80 training images it has seen 40
    assert before["validation_advantage"] < 3 * before["validation_chance"]
    assert after["validation_advantage"] > 0.3 > 3 * after["validation_chance"]
    assert after["validation_chance"] == chance_advantage(80, 1000)  # the attacker's images do not count
    assert after["test_chance"] == chance_advantage(80, len(phantom.test_labels))
    assert after == inference(W[0].numpy(), 1)  # whatever is drawn comes from seed and round
    # the bootstrap's error is near the binomial one of two shares (here about 0.05 and 0.016)
    assert 0.02 < after["validation_error"] < 0.08


def test_membership_is_measured_of_the_model_that_clients_received(small, tmp_path):
    """In round 4 that is the model of round 3."""
    config = Config(rounds=5, membership=2, mad_start=1)
    result = simulate(config, tmp_path / "run", dataset=small)
    table = pd.read_csv(tmp_path / "run" / "membership.csv")
    assert table.columns.tolist() == MEMBERSHIP_COLUMNS == result.membership.columns.tolist()
    assert table["round"].tolist() == [2, 4] and np.allclose(table, result.membership)
    earlier = simulate(replace(config, rounds=3, membership=None), dataset=small)
    assert earlier.membership is None and earlier.summary["membership"] is None
    measured = MembershipInference(madsim.gather(config, small))(earlier.weights, 4)
    assert table.iloc[1, 1:].to_dict() == pytest.approx(measured, rel=1e-5)


def test_measuring_membership_changes_nothing_else(small):
    one, other = (simulate(Config(rounds=3, membership=m), dataset=small) for m in (1, None))
    assert one.rounds.equals(other.rounds) and one.clients.equals(other.clients)


def test_what_an_excluded_attacker_holds_by_hand():
    """Client 1 was trained last in round 2, so it holds what was measured then; client 0 goes on."""
    trained = [(1, 0, 0.5), (1, 1, 0.5), (2, 0, 0.4), (2, 1, 0.4), (3, 0, 0.3), (3, 1, np.nan)]
    clients = pd.DataFrame(trained, columns=["round", "client", "train_loss"])
    membership = pd.DataFrame({"round": [2, 3], "test_advantage": [0.1, 0.2]})
    assert held(membership, clients, 1) == {"round": 2, "test_advantage": 0.1}
    assert held(membership, clients, 0) == {"round": 3, "test_advantage": 0.2}
    assert held(membership.tail(1), clients, 1) is None  # measured too late
