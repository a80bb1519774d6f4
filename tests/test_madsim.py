"""Tests of madsim.py: whole runs that check the paper's claims."""

import hashlib
import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import data
import madsim
import model
from lab.attacks import ATTACKS
from madsim import Config, simulate
from trust import PRESETS, Settings

# ---------------------------------------------------------------- the paper's story


def test_without_mad_the_attack_hurts_and_with_it_the_attackers_are_gone(phantom):
    """The negative control is FedAvg under attack. The claim is about MAD from round 4. A third run has no attack."""
    attacked, defended, peace = (
        simulate(Config(rounds=9, threads=2, **options), dataset=phantom)
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
    """A run of 25 rounds without an attack."""
    return simulate(Config(rounds=25, malicious=0.0), dataset=phantom)


@pytest.mark.slow
def test_a_trained_federation_stays_in_the_phantoms_range(trained):
    assert 0.90 <= trained.rounds.test_accuracy.tail(5).mean() <= 0.98


@pytest.fixture(scope="module")
def from_trained(trained, phantom):
    """A function that trains four more rounds from the trained model and returns the last one."""

    def run(**options) -> pd.Series:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "initial_weights", lambda *_: torch.from_numpy(trained.weights.copy()))
            return simulate(Config(rounds=4, **options), dataset=phantom).rounds.iloc[-1]

    return run


@pytest.fixture(scope="module")
def peace(from_trained) -> pd.Series:
    return from_trained(malicious=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in ("nan", "hug", "near_copies", "stumble")])
def test_every_attack_hurts_where_there_is_no_defence(attack, from_trained, peace):
    """The negative control: four rounds under attack make a trained model worse than four rounds without an attack."""
    attacked = from_trained(malicious=0.4, attack=attack)
    print(attack, attacked.to_dict(), peace.to_dict())
    assert attacked.test_accuracy < peace.test_accuracy - 0.01 or attacked.honest_loss > 1.2 * peace.honest_loss


def test_an_attack_begins_with_its_round_and_pauses_with_its_period(small):
    """Before the attack starts, malicious clients behave honestly. Their validation labels are true."""
    late = simulate(Config(rounds=5, attack_start=4), dataset=small)
    peace = simulate(Config(rounds=5, malicious=0.0), dataset=small)
    columns = ["loss", "accuracy", "test_loss", "test_auc"]
    same = (late.rounds[columns] == peace.rounds[columns]).all(axis=1).tolist()
    assert same == [True, True, True, False, False]
    on_off = simulate(Config(rounds=5, attack_start=2, attack_period=1), dataset=small)
    attackers = on_off.clients[on_off.clients.malicious == 1].groupby("round").accuracy.mean()
    honest = on_off.clients[on_off.clients.malicious == 0].groupby("round").accuracy.mean()
    assert (attackers < honest - 0.1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("partition", ["dirichlet", pytest.param("quantity", marks=pytest.mark.slow)])
def test_unequal_clients_train_exactly(partition, small):
    """Stacked training of clients with very different sizes gives the same as training one client at a time.

    The average weights the clients by their sizes.
    """
    config = Config(rounds=2, partition=partition, concentration=0.3, seed=1)
    stacked, loop = (simulate(replace(config, method=method), dataset=small) for method in ("stacked", "loop"))
    sizes = [len(share.train) for share in madsim.gather(config, small).shares]
    assert max(sizes) > 5 * min(sizes)
    pd.testing.assert_frame_equal(stacked.rounds, loop.rounds, rtol=1e-3)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_on_the_real_images_both_attackers_are_excluded_at_once(real, seed):
    run = simulate(Config(rounds=8, mad_start=5, seed=seed), dataset=real)
    assert run.summary["excluded"] == dict.fromkeys(run.summary["malicious"], 5)
    before, after = run.rounds.iloc[3], run.rounds.iloc[4]
    assert after.loss < 0.7 * before.loss and after.accuracy > before.accuracy + 0.1


@pytest.mark.slow
def test_the_testbed_preset_excludes_one_attacker_a_round_later(phantom):
    run = simulate(Config(rounds=7, mad_start=4, settings=PRESETS["testbed"]), dataset=phantom)
    assert run.rounds.active.tolist()[:5] == [10, 10, 10, 10, 9]
    (first,) = (client for client, t in run.summary["excluded"].items() if t == 5)
    assert first in run.summary["malicious"]
    assert run.clients.trust.notna().all()  # the excluded still train and get scores


def test_a_loop_gives_what_stacked_training_gives(small):
    stacked, loop = (simulate(Config(rounds=2, method=method), dataset=small) for method in ("stacked", "loop"))
    pd.testing.assert_frame_equal(stacked.rounds, loop.rounds, rtol=1e-3)


def test_names_tell_what_differs_from_the_defaults():
    assert Config().name == "nomad-s0"
    assert Config(mad_start=500).name == "mad500-s0"
    assert Config(mad_start=5, rounds=40, malicious=0.0, seed=3).name == "mad5-rounds40-malicious0-s3"
    assert Config(settings=PRESETS["testbed"]).name == "nomad-testbed-s0"
    assert Config(settings=replace(PRESETS["paper"], threshold=0.3)).name == "nomad-threshold0.3-s0"
    assert Config(threads=1, device="cpu", data_root="x").name == "nomad-s0"


def test_different_runs_have_different_names():
    """`testbed` is a preset and a reading of eq. (2). A number is written in full if six digits do not tell it."""
    assert Config(settings=Settings(equation2="testbed")).name == "nomad-equation2testbed-s0"
    assert Config(lr=0.0012).name == "nomad-lr0.0012-s0"
    assert Config(lr=0.00120000001).name == "nomad-lr0.00120000001-s0"
    each = [{"attack": "scaled"}, {"rule": "median"}, {"partition": "dirichlet"}, {"clients": 20}, {"epochs": 20}]
    settings = [{f.name: value} for f in fields(Settings) for value in f.metadata.get("choices", ())]
    configs = [Config(**options) for options in each] + [Config(settings=Settings(**options)) for options in settings]
    configs += [Config(settings=preset) for preset in PRESETS.values()]
    assert len({config.name for config in configs}) == len(set(configs)) == 19


def test_a_long_name_keeps_its_beginning_and_seed_and_has_a_hash_for_the_rest():
    """The hash is the SHA-256 of the whole name without its seed, as `printf NAME | sha256sum` gives it."""
    begin = "nomad-rounds1-leakage1-inverted"

    def named(letters, seed):
        return Config(rounds=1, leakage=1, inverted="x" * letters, seed=seed).name

    assert named(206, 0) == f"{begin}{'x' * 206}-s0" and len(named(206, 0)) == 240  # the longest that stays as it is
    longer = begin + "x" * 207
    hashed = hashlib.sha256(longer.encode()).hexdigest()[:12]
    assert named(207, 0) == f"{longer[:224]}-{hashed}-s0" and len(named(207, 0)) == 240
    assert named(207, 1) == f"{longer[:224]}-{hashed}-s1"  # seeds of a run share what precedes the seed
    assert named(206, 10) == f"{longer[:223]}-{hashlib.sha256(longer[:-1].encode()).hexdigest()[:12]}-s10"
    assert named(208, 0) != named(207, 0) and named(5000, 2**63 - 1).endswith(f"-s{2**63 - 1}")


def test_a_fraction_that_makes_nobody_malicious_is_said():
    with pytest.warns(UserWarning, match=r"malicious 0.05 of 10 clients rounds to 0 clients: nobody attacks"):
        Config(malicious=0.05)
    with warnings.catch_warnings(action="error"):
        Config(malicious=0.06)  # one client
        Config(malicious=0.0)


@pytest.mark.parametrize(
    ("attack", "flip", "warned"),
    [("label_flip", 0.004, True), ("label_flip", 0.006, False), ("label_flip", 0.0, True), ("scaled", 0.004, False),
     ("liar", 0.0, False)],
)  # fmt: skip
def test_a_share_that_flips_no_label_is_said(attack, flip, warned, small):
    """Each of the four clients has 100 images: 0.4 of a label is none, 0.6 is one."""
    madsim.warn_once.cache_clear()
    with warnings.catch_warnings(record=True, action="always") as said:
        simulate(Config(rounds=1, clients=4, malicious=0.25, attack=attack, flip=flip), dataset=small)
    text = f"attack label_flip with flip {flip:g} changes no label: nobody attacks"
    assert [str(warning.message) for warning in said] == [text] * warned


def test_the_phantom_in_place_of_the_real_data_is_said_and_kept_with_the_result(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "download", lambda root: (_ for _ in ()).throw(FileNotFoundError("no network")))
    config = Config(rounds=1, clients=4, malicious=0.0, data_root=tmp_path)
    madsim.warn_once.cache_clear()
    with warnings.catch_warnings(record=True, action="always") as said:
        result, _ = simulate(config), simulate(config)
    assert [str(warning.message) for warning in said] == ["phantom images, not PneumoniaMNIST: no network"]
    assert Path(said[0].filename) == Path(__file__)
    assert result.summary["note"] == result.data["note"] == "no network" and result.data["name"] == "phantom"
    assert result.rounds.attrs["data"] == result.clients.attrs["data"] == result.data
    with warnings.catch_warnings(action="error"):
        assert simulate(replace(config, dataset="phantom")).data["note"] == ""


# ---------------------------------------------------------------- config.json


@pytest.fixture
def written(small, tmp_path) -> Path:
    """The config.json of a run with a setting of MAD and one of the run that differ from the defaults."""
    config = Config(rounds=1, clients=4, malicious=0.25, settings=Settings(threshold=0.3))
    simulate(config, tmp_path / "run", dataset=small)
    assert Config.read(tmp_path / "run") == config
    return tmp_path / "run" / "config.json"


def test_the_config_of_an_earlier_version_has_defaults_for_settings_added_since(written):
    about = json.loads(written.read_text())
    del about["membership"], about["plugins"], about["settings"]["nobody_left"]
    written.write_text(json.dumps(about))
    read = Config.read(written.parent)
    assert read.clients == 4 and read.settings.threshold == 0.3
    assert read.membership is None and read.settings.nobody_left == "keep"


@pytest.mark.parametrize("place", ["run", "settings"])
def test_the_config_of_a_later_version_is_refused_with_its_version(place, written):
    about = json.loads(written.read_text())
    (about if place == "run" else about["settings"])["indicator"] = "squared"
    written.write_text(json.dumps(about | {"git": {"commit": "abc123", "dirty": False}}))
    with pytest.raises(ValueError, match=r"was written by another version \(commit abc123\): indicator unknown"):
        Config.read(written.parent)


@pytest.mark.parametrize("name", ["rounds", "clients", "seed", "settings"])
def test_a_config_without_what_every_version_writes_is_damaged(name, written):
    about = json.loads(written.read_text())
    del about[name]
    written.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"is damaged: no '{name}'"):
        Config.read(written.parent)


def test_a_run_is_resumed_in_its_folder(small):
    with pytest.raises(ValueError, match="resume needs the folder of a run"):
        simulate(Config(rounds=1), dataset=small, resume=True)


def test_malicious_clients_attack_from_their_start_for_a_period_at_a_time():
    on_off = Config(attack_start=3, attack_period=2)
    assert [t for t in range(1, 11) if on_off.attacking(t)] == [3, 4, 7, 8]
    always = Config(attack_start=3)
    assert [t for t in range(1, 7) if always.attacking(t)] == [3, 4, 5, 6]
