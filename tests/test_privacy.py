"""Tests of lab/privacy.py: membership inference."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import data
import madsim
import model
from harness.log import MEMBERSHIP_COLUMNS, held
from lab.privacy import MembershipInference, chance_advantage, membership_advantage
from madsim import Config, simulate


@pytest.mark.parametrize(
    ("members", "others", "advantage"),
    [
        ([1, 2], [3, 4], 1.0),  # a threshold of 2 separates them
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.0),
        ([1, 2, 5, 6], [3, 4, 5, 6], 0.5),  # threshold 2: half of the members, none of the others
        ([3, 4], [1, 2], 0.0),  # members should have the lower losses; the advantage is never below 0
        ([1, 1, 2], [1, 2, 2, 2], 2 / 3 - 1 / 4),  # equal losses are on the same side
    ],
)
def test_membership_advantage_by_hand(members, others, advantage):
    assert membership_advantage(np.array(members), np.array(others)) == pytest.approx(advantage)


def test_chance_alone_gives_the_advantage_that_is_said():
    """300 members and 200 others are drawn 2000 times from the same distribution.

    Smirnov's limit is a little above the mean advantage.
    """
    rng = np.random.default_rng(0)
    found = np.mean([membership_advantage(rng.random(300), rng.random(200)) for _ in range(2000)])
    assert chance_advantage(300, 200) == pytest.approx(math.sqrt(math.pi / 8 / 120), rel=1e-9)
    assert 0.9 < found / chance_advantage(300, 200) < 1.0


def test_membership_is_told_of_a_model_that_remembers_and_of_no_other(phantom):
    """Two honest clients have 40 images each and a high learning rate.

    After 150 epochs the clients' own images are memorised.
    """
    rng = np.random.default_rng(0)
    numbers = rng.permutation(len(phantom.train_labels))
    shares = [data.Share(numbers[a : a + 40], numbers[a + 1000 : a + 1500], a == 80) for a in (0, 40, 80)]
    noise = rng.integers(0, 2, len(phantom.train_labels))  # labels that can only be memorised
    clients = model.Clients(
        (phantom.train_images, noise, noise), (phantom.test_images, phantom.test_labels), shares,
        seed=0, attacking=lambda t: True, submit=lambda W, w, honest, rng, t: W, device="cpu", threads=1,
        cores={}, epochs=150, batch_size=20, lr=2e-3, dropout=(0.0, 0.0),
    )  # fmt: skip
    w = model.initial_weights(0).numpy()
    inference = MembershipInference(clients)
    before = inference(w, 1)
    W, _ = clients.train(w, np.array([True, True, False]), 1)
    after = inference(W[0].numpy(), 1)  # it has seen 40 of the 80 training images
    assert before["validation_advantage"] < 3 * before["validation_chance"]
    assert after["validation_advantage"] > 0.3 > 3 * after["validation_chance"]
    assert after["validation_chance"] == chance_advantage(80, 1000)  # the attacker's images do not count
    assert after["test_chance"] == chance_advantage(80, len(phantom.test_labels))
    assert after == inference(W[0].numpy(), 1)  # random draws depend only on seed and round
    # The bootstrap error is close to the binomial error of two shares (here about 0.05 and 0.016).
    assert 0.02 < after["validation_error"] < 0.08


def test_membership_is_measured_of_the_model_that_clients_received(small, tmp_path):
    """In round 4, the clients receive the model of round 3."""
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
    """Client 1 trains last in round 2, so it holds what was measured in that round. Client 0 continues."""
    trained = [(1, 0, 0.5), (1, 1, 0.5), (2, 0, 0.4), (2, 1, 0.4), (3, 0, 0.3), (3, 1, np.nan)]
    clients = pd.DataFrame(trained, columns=["round", "client", "train_loss"])
    membership = pd.DataFrame({"round": [2, 3], "test_advantage": [0.1, 0.2]})
    assert held(membership, clients, 1) == {"round": 2, "test_advantage": 0.1}
    assert held(membership, clients, 0) == {"round": 3, "test_advantage": 0.2}
    assert held(membership.tail(1), clients, 1) is None  # the measurement came too late


def test_few_validation_images_are_copies_of_training_images(real):
    """docs/replication.md: of the honest clients' 376 validation images, 1 to 4, over the seeds 0 to 4."""
    copies = []
    for seed in range(5):
        honest = [share for share in madsim.gather(Config(seed=seed), real).shares if not share.malicious]
        train, validation = (np.concatenate([getattr(s, kind) for s in honest]) for kind in ("train", "validation"))
        known = {real.train_images[i].tobytes() for i in train}
        copies.append(sum(real.train_images[i].tobytes() in known for i in validation))
        assert len(validation) == 376
    assert copies == [4, 1, 1, 2, 1]
