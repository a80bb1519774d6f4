"""Tests of harness/log.py: the files and the summary of a run."""

import csv
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

import model
import plot
from harness import folder, log
from harness.folder import plain
from harness.jobs import rounds_bar, usable_cores
from harness.log import jump, plane, samples, summarise
from madsim import Config, gather, simulate
from trust import Settings

ROUNDS_CSV = (
    "round,loss,accuracy,honest_loss,honest_accuracy,"
    "test_loss,test_accuracy,test_sensitivity,test_specificity,test_auc,active,honest_image_accuracy"
)
CLIENTS_CSV = "round,client,malicious,active,distance,d,reputation,trust,train_loss,loss,accuracy"
PAPER = Settings()


def test_accuracies_are_means_over_clients_and_over_images(small):
    """With `quantity`, clients have 1 to some 20 validation images, so the two differ."""
    config = Config(rounds=2, clients=6, malicious=0.34, partition="quantity")
    run, members = simulate(config, dataset=small), gather(config, small)
    images = np.array([len(share.validation) for share in members.shares])
    for t in (1, 2):
        of = run.clients[run.clients["round"] == t]
        honest = (of.malicious == 0).to_numpy()
        by_image = (of.accuracy * images)[honest].sum() / images[honest].sum()
        row = run.rounds[run.rounds["round"] == t].iloc[0]
        assert row.honest_accuracy == pytest.approx(of.accuracy[honest].mean(), abs=1e-5)
        assert row.honest_image_accuracy == pytest.approx(by_image, abs=1e-5)
    assert len(set(images)) > 1 and abs(row.honest_image_accuracy - row.honest_accuracy) > 1e-4


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
        assert "nan" not in text  # a missing value is an empty field
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name}.csv"), getattr(run, name), check_dtype=False)
    assert len(run.rounds) == 3 and len(run.clients) == 15
    assert run.clients.active.isin([0, 1]).all() and run.clients.malicious.isin([0, 1]).all()
    assert json.loads((folder / "summary.json").read_text())["complete"] is True
    with np.load(folder / "samples.npz", allow_pickle=False) as four:
        assert four["labels"].tolist() == [0, 0, 1, 1] and four["images"].shape == (4, 28, 28)


def test_config_json_holds_what_is_needed_to_run_it_again(small, tmp_path):
    config = Config(rounds=1, lr=0.002, clients=4, threads=1)
    simulate(config, tmp_path / "run", dataset=replace(small, note="no network"))
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    fields = {name: written[name] for name in Config.__dataclass_fields__}
    fields["settings"] = type(config.settings)(**fields["settings"])
    assert Config(**fields) == config
    assert written["data"] == {"name": "phantom", "md5": small.md5, "note": "no network"}
    assert written["machine"] == {"device": "cpu", "threads": 1, "cores": usable_cores() | {"pytorch": 1}}
    assert set(written["versions"]) >= {"python", "numpy", "torch", "scikit-learn"}
    assert set(written["git"]) == {"commit", "dirty"}
    assert written["command"]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_commit_is_recorded_only_of_a_repository_that_tracks_the_code(tmp_path, monkeypatch):
    """The code is a folder in another repository: unknown to it, ignored, added, committed and changed."""

    def git(*words: str) -> str:
        words = ("-c", "user.name=a", "-c", "user.email=a", *words)
        return subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def recorded() -> list:
        return list(folder.code().values())

    code = tmp_path / "madsim"
    code.mkdir()
    monkeypatch.setattr(folder, "__file__", str(code / "harness" / "folder.py"))
    assert recorded() == [None, None]  # there is no repository
    git("init", "-q")
    for path in (code / "madsim.py", tmp_path / "theirs.txt", tmp_path / ".gitignore"):
        path.write_text("")
    git("add", "theirs.txt")
    git("commit", "-q", "-m", "theirs")
    assert recorded() == [None, None]
    (tmp_path / ".gitignore").write_text("madsim")
    assert recorded() == [None, None]
    git("add", "--force", "madsim")
    assert recorded() == [git("rev-parse", "HEAD"), True]
    git("commit", "-q", "-m", "ours")
    (tmp_path / "theirs.txt").write_text("changed")
    assert recorded() == [git("rev-parse", "HEAD"), False]
    (code / "madsim.py").write_text("changed")
    assert recorded() == [git("rev-parse", "HEAD"), True]


def test_the_bar_shows_accuracies_clients_and_attackers_also_in_a_notebook(small, monkeypatch, capsys):
    """A kernel's error stream is no terminal. With 80 columns nothing of the bar is cut off."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setenv("COLUMNS", "80")
    result = simulate(Config(rounds=3, mad_start=2), dataset=small, bar=True)
    last, left = result.rounds.iloc[-1], len(result.summary["malicious"]) - result.summary["true_exclusions"]
    shown = capsys.readouterr().err.rstrip().split("\r")[-1]
    expected = f"test {last.test_accuracy:.3f}, honest {last.honest_accuracy:.3f}"
    assert shown.startswith("3/3 |") and shown.endswith(f", {expected}, active {last.active:.0f}, attackers {left}")
    assert len(shown) <= 80


@pytest.mark.parametrize(("columns", "end"), [(79, "attackers 2"), (60, "honest "), (40, "test "), (20, "")])
def test_a_bar_shows_whole_numbers_also_in_a_narrow_terminal(columns, end, small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(log, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    result = simulate(Config(rounds=2), dataset=small, bar=True)
    shown = capsys.readouterr().err.rstrip().split("\r")[-1]
    if not end:
        assert shown.startswith("2/2 ") and "test" not in shown
        return
    number = {"honest ": result.rounds.honest_accuracy, "test ": result.rounds.test_accuracy}.get(end)
    assert shown.endswith(end if number is None else f", {end}{number.iloc[-1]:.3f}")


def test_several_runs_have_a_bar_in_a_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    with rounds_bar({tmp_path: Config(rounds=2)}):
        pass
    assert "0 of 1 runs" in capsys.readouterr().err


def test_an_error_while_a_run_ends_leaves_its_folder_free(small, monkeypatch, tmp_path):
    """The error is kept, as a notebook does, and with it the Log."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full") as kept:
        patch.setattr(log.Log, "_summarise", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        simulate(Config(rounds=2), tmp_path / "run", dataset=small)
    assert kept.value and simulate(Config(rounds=2), tmp_path / "run", dataset=small, resume=True).summary["complete"]


def test_there_is_no_bar_without_a_terminal(small, capsys):
    simulate(Config(rounds=1), dataset=small, bar=True)
    assert capsys.readouterr().err == ""


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
    assert run.clients[["loss", "accuracy"]].notna().all(axis=None)  # excluded clients are evaluated too


def story() -> pd.DataFrame:
    """Three clients and three rounds. Client 1 (malicious) is excluded in round 2.

    Client 2 (honest) is excluded in round 3 for NaN.
    """
    rows = [
        # round, client, malicious, active, distance, loss, accuracy
        (1, 0, 0, 1, 0.1, 0.5, 0.8), (1, 1, 1, 1, 0.9, 2.0, 0.2), (1, 2, 0, 1, 0.1, 0.7, 0.7),
        (2, 0, 0, 1, 0.1, 0.4, 0.9), (2, 1, 1, 0, 0.9, 2.5, 0.1), (2, 2, 0, 1, 0.1, 0.4, 0.8),
        (3, 0, 0, 1, 0.1, 0.3, 0.9), (3, 1, 1, 0, np.nan, 3.0, 0.1), (3, 2, 0, 0, np.nan, 0.3, 0.9),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["round", "client", "malicious", "active", "distance", "loss", "accuracy"])


@pytest.mark.parametrize(
    ("labels", "four"),
    [
        ([1, 0, 1, 1, 0, 0], [1, 4, 0, 2]),
        ([1, 1, 1, 1, 1, 1], [0, 1, 2, 3]),
        ([1, 0, 1, 1, 1, 1], [1, 0, 2, 3]),
        ([0, 0, 0, 0, 0, 1], [0, 1, 2, 5]),
        ([0, 1, 0], [0, 2, 1]),
    ],
)
def test_the_images_of_fig_2_are_two_of_each_label_if_there_are(labels, four):
    assert samples(np.array(labels)).tolist() == four


@pytest.mark.filterwarnings("ignore:all training images are pneumonia")
def test_a_run_on_one_label_alone_has_fig_2(small, tmp_path):
    ill = small.train_labels == 1
    one_class = replace(small, train_images=small.train_images[ill], train_labels=small.train_labels[ill])
    simulate(Config(rounds=1, clients=4, malicious=0.25), tmp_path / "run", dataset=one_class)
    images, labels = plot.load_run(tmp_path / "run").samples
    assert labels.tolist() == [1, 1, 1, 1] and (images == one_class.train_images[:4]).all()


def test_a_summary_by_hand():
    rounds = pd.DataFrame({"round": [1, 2, 3], "loss": [1.0, 0.4, 0.3], "test_auc": [0.5, 0.6, 0.7]})
    summary = summarise(rounds, story(), mad_start=1)
    assert summary["excluded"] == {1: 2, 2: 3}
    assert (summary["malicious"], summary["nonfinite"]) == ([1], [2])
    assert (summary["true_exclusions"], summary["false_exclusions"]) == (1, 1)
    assert (summary["precision"], summary["recall"], summary["rounds_to_detection"]) == (0.5, 1.0, 1)
    assert summary["last_50"] == {"loss": 0.3, "test_auc": 0.7} and summary["last_50_rounds"] == 1  # from round 3 on
    nobody_out = summarise(rounds, story().assign(active=1), mad_start=1)
    assert nobody_out["last_50"] == {"loss": 0.566667, "test_auc": 0.6} and nobody_out["last_50_rounds"] == 3
    assert [j["round"] for j in summary["jumps"]] == [2, 3]


def test_a_jump_by_hand():
    # In round 1, the mean loss is 3.2 / 3 for all clients and 0.6 for those that stay. In round 2, it is 0.4 for those.
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
    assert plain(summary) == {"a": [None, 1.5, {"b": None}], "c": "nan"}


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


def test_where_the_models_lie_is_written_of_up_to_fifty_clients(small, tmp_path, monkeypatch):
    result = simulate(Config(rounds=4, mad_start=3), tmp_path / "run", dataset=small)
    points = pd.read_csv(tmp_path / "run" / "plane.csv")
    assert points.columns.tolist() == ["round", "client", "x", "y"] and len(points) == 40
    absent = points[points.x.isna()]
    assert absent.client.tolist() == result.summary["malicious"]  # in the round after their exclusion
    # A point is the projection of its model. It can't lie farther from the centre than the model.
    assert (np.hypot(points.x, points.y) <= result.clients.distance * 1.001).dropna()[points.x.notna()].all()
    assert log.SHOWN_CLIENTS == 50
    monkeypatch.setattr(log, "SHOWN_CLIENTS", 9)  # a federation of 10 trains faster than one of 51
    simulate(Config(rounds=1), tmp_path / "many", dataset=small)
    assert not (tmp_path / "many" / "plane.csv").exists()


def nowhere(clients):
    """The places of clients in the round before, all of them unknown."""
    return np.full((clients, 2), np.nan)


def distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_points_of_a_plane_keep_their_distances_and_the_main_cluster_is_around_the_origin():
    """Three clients form a triangle and one lies far away, in 50 dimensions. The first three are the main cluster."""
    flat = np.array([[0.0, 0], [2, 0], [1, 1], [20, 5]])
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 2)))[0]
    points = plane(flat @ axes.T + 3, 0.0, PAPER, nowhere(4))
    assert distances(points) == pytest.approx(distances(flat), abs=1e-6)
    assert points[:3].mean(0) == pytest.approx([0, 0], abs=1e-6)


def test_the_plane_is_that_of_the_two_principal_components():
    W = np.random.default_rng(1).normal(size=(9, 5)) * [5, 4, 0.1, 0.1, 0.1]
    whole = Settings(clusters=1)  # all clients form the main cluster
    components = PCA(2).fit_transform(W)
    assert distances(plane(W, 0.0, whole, nowhere(9))) == pytest.approx(distances(components), rel=1e-6)


def test_points_are_turned_towards_those_before():
    rng = np.random.default_rng(2)
    W = rng.normal(size=(8, 30))
    before = plane(W, 0.0, PAPER, nowhere(8))
    assert plane(W, 0.0, PAPER, before @ [[0, -1], [1, 0]]) == pytest.approx(before @ [[0, -1], [1, 0]], abs=1e-6)
    before[3] = np.nan  # client 3 was absent
    assert plane(W, 0.0, PAPER, before)[:3] == pytest.approx(before[:3], abs=1e-6)


def test_one_client_lies_at_the_origin_and_two_on_a_line():
    assert plane(np.array([[7.0]]), 0.0, PAPER, nowhere(1)).tolist() == [[0, 0]]
    assert np.sort(plane(np.array([[7.0], [11.0]]), 0.0, PAPER, nowhere(2))[:, 0]) == pytest.approx([-2, 2])
