"""Tests of lab/attacks.py: every attack, with numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import some
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import attacks
from lab.attacks import ATTACKS, Attack
from madsim import Config, simulate
from trust import Settings

TRAINED, GLOBAL = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sign_flip", [[1, 0], [-1, -2]]),  # 1 - (W - 1)
        ("scaled", [[1, 11], [21, 31]]),  # 1 + 10 (W - 1)
        ("alie", [[0.5, 1.5], [0.5, 1.5]]),  # the means 2 and 3 minus 1.5 times the deviations 1 and 1
        ("ipm", [[-4, -9], [-4, -9]]),  # 1 minus 5 times the mean changes 1 and 2
    ],
)
def test_attacks_by_hand(name, expected):
    assert ATTACKS[name].submissions(TRAINED.clone(), GLOBAL, TRAINED, np.random.default_rng(0)).tolist() == expected


def test_ipm_turns_the_average_of_the_papers_clients_and_alie_needs_two():
    honest = torch.tensor([[2.0, 3.0]] * 8)
    submitted = ATTACKS["ipm"].submissions(honest[:2], GLOBAL, honest, np.random.default_rng(0))
    change = torch.cat([honest, submitted]).mean(0) - GLOBAL
    assert (change * (honest[0] - GLOBAL)).sum() < 0
    assert ATTACKS["alie"].submissions(TRAINED[:1], GLOBAL, TRAINED, np.random.default_rng(0)).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [("near_copies", 0.0, [[1, 2], [1, 2]]), ("chain", 10.0, [[1, 2], [21, 31]]),
     ("sign_flip", 4.0, [[1, -3], [-7, -11]]), ("scaled", 2.0, [[1, 3], [5, 7]]), ("alie", 0.0, [[2, 3], [2, 3]]),
     ("ipm", 0.5, [[0.5, 0], [0.5, 0]]), ("noise", 0.0, [[1, 2], [3, 4]])],
)  # fmt: skip
def test_the_strength_of_attacks_by_hand(name, strength, expected):
    """In this order: the first honest model, here W; changes 1 and 10 times as large; 1 - 4 (W - 1); 1 + 2 (W - 1);
    the means 2 and 3; 1 minus half of the mean changes 1 and 2; no noise.
    """
    found = ATTACKS[name].submissions(TRAINED.clone(), GLOBAL, TRAINED, np.random.default_rng(0), strength)
    assert found.tolist() == expected


def test_blind_submits_noise_in_its_burst_alone():
    attack, W = ATTACKS["blind"], torch.zeros(2, 10_000)
    noise = attack.submissions(W, W[0], W, np.random.default_rng(1), 0.3, burst=True)
    assert noise.std().item() == pytest.approx(0.3, rel=0.03) and attack.poison is ATTACKS["label_flip"].poison
    assert attack.submissions(W, W[0], W, np.random.default_rng(1), 0.3, burst=False).equal(W)


@pytest.mark.parametrize(
    ("options", "rounds"),
    [({}, [1]), ({"burst": 2, "attack_start": 5}, [5, 6]), ({"attack_start": 3, "attack_period": 4}, [3, 11])],
)
def test_a_burst_comes_first_and_in_each_period(options, rounds):
    config = Config(rounds=14, attack="blind", **options)
    assert [t for t in range(1, 15) if config.attacking(t) and config.bursting(t)] == rounds


@pytest.mark.parametrize("options", [{"strength": 2.0}, {"burst": 3}, {"attack": "noise", "burst": 2}])
def test_a_strength_or_burst_that_changes_nothing_is_refused(options):
    with pytest.raises(ValueError, match=r"(strength 2|burst [23]) changes nothing with attack (label_flip|noise)"):
        Config(**options)


@pytest.mark.slow
@pytest.mark.parametrize("size", some([0.02, 0.1, 1.0], 0.1))
@pytest.mark.parametrize("start", some([1, 4], 1))
def test_a_burst_of_noise_does_not_save_the_attackers(size, start, real):
    """The negative control: measured from the main cluster's centre, the spread is too large to find them."""
    config = Config(rounds=8, mad_start=6, attack="blind", strength=size, attack_start=start)
    found = simulate(config, dataset=real).summary
    assert (found["true_exclusions"], found["false_exclusions"]) == (2, 0)
    if size == 0.1 and start == 1:
        former = replace(config, settings=Settings(spread="centre"))
        assert simulate(former, dataset=real).summary["true_exclusions"] == 0


def test_noise_is_drawn_from_the_generator():
    W = torch.zeros(2, 10_000)
    noise, again = (ATTACKS["noise"].submissions(W, W[0], W, np.random.default_rng(1)) for _ in range(2))
    assert (noise == again).all() and noise.std().item() == pytest.approx(0.5, rel=0.03)


def test_hug_by_hand():
    # The honest centre is (1, 0), and the honest distances are 1 and 1. An attacker moves to the distance 1.2, or stays
    # where it is if it is closer.
    honest = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    W = torch.tensor([[1.0, 10.0], [1.0, 0.5], [1.0, 0.0]])
    hugged = ATTACKS["hug"].submissions(W, GLOBAL, honest, np.random.default_rng(0))
    assert hugged.numpy() == pytest.approx(np.array([[1, 1.2], [1, 0.5], [1, 0]]))
    assert ATTACKS["hug"].submissions(honest[:1], GLOBAL, honest[:1], np.random.default_rng(0)).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("honest", "largest", "sums"),
    [([[0.0], [2.0]], [0.0], [0.0]), ([[0.0], [0.0], [3.0]], [0.0], [-1.0]), ([[5.0]], [5.0], [5.0]),
     ([[0.0, 0.0], [2.0, 0.0]], [0.0, 0.0], [0.0, 0.0])],
)  # fmt: skip
def test_min_max_and_min_sum_by_hand(honest, largest, sums):
    """All submit m = mean - gamma std, on a line.

    0 and 2: the mean is 1, and they lie 2 apart. The farther one is 2 away from m = 0. Its sum of squares is 4 = 0 + 4.
    0, 0 and 3: the mean is 1, and the largest distance 3, that of 3 from m = 0. The largest sum of squares is
    9 + 9 = 18, and that of m = -1 is 1 + 1 + 16. One honest model has no deviation.
    """
    honest, W = torch.tensor(honest), torch.ones(3, len(honest[0]))
    for name, expected in (("min_max", largest), ("min_sum", sums)):
        found = ATTACKS[name].submissions(W, W[0], honest, np.random.default_rng(0))
        assert found.numpy() == pytest.approx(np.array([expected] * 3), abs=1e-6), name


@given(st.integers(0, 10**6), st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_min_max_and_min_sum_go_as_far_as_they_may(seed, count):
    """Exactly to their bound, where a little farther would be too far."""
    honest = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    apart = (honest[:, None] - honest).norm(dim=2)
    for name, bound in (("min_max", apart.max()), ("min_sum", apart.square().sum(1).max())):
        m = ATTACKS[name].submissions(honest[:1], honest[0], honest, np.random.default_rng(0))[0]

        def reached(m, name=name):
            away = (honest - m).norm(dim=1)
            return away.max() if name == "min_max" else away.square().sum()

        assert reached(m).item() == pytest.approx(bound.item())
        assert reached(m - 0.01 * honest.std(0)) > bound


@pytest.mark.parametrize(("offset", "spread"), [(0.04, 0.01), (1.0, 1e-6), (0.0, 1e18)])
def test_min_max_stays_right_in_the_runs_own_precision(offset, spread):
    """As many weights as the network has, in float32, with one honest model that is not finite."""
    honest = torch.randn(8, 21_166, generator=torch.Generator().manual_seed(1)) * spread + offset
    with_nan = torch.cat([honest, torch.full((1, 21_166), float("nan"))])
    for name in ("min_max", "min_sum"):
        m = ATTACKS[name].submissions(honest[:1], honest[0], with_nan, np.random.default_rng(0))[0].double()
        apart, away = attacks.distances(honest.double()), (honest.double() - m).norm(dim=1)
        bounds = apart.max(), apart.square().sum(1).max()
        reached = away.max(), away.square().sum()
        which = name == "min_sum"
        assert reached[which].item() == pytest.approx(bounds[which].item(), rel=0.1 if spread < 1e-5 else 1e-4)


def test_a_sidestep_has_no_part_against_the_honest_directions():
    """The honest changes are 4 east and 1 north; the mean direction is (1/2, 1/2), and the shorter one the median.

    One step west is (-1/2, 1/2) apart from its part against that direction. The mean of the changes would be (2, 1/2).
    """
    w = torch.zeros(2)
    honest, W = torch.tensor([[4.0, 0], [0, 1]]), torch.tensor([[-1.0, 0]])
    found = ATTACKS["sidestep"].submissions(W, w, honest, np.random.default_rng(0))
    assert found.numpy() == pytest.approx(np.array([[-0.5, 0.5]]))


def test_a_sidestep_is_at_right_angles_and_as_long_as_honest_steps():
    """The honest mean change is (2, 0), and the honest lengths are 1, 2 and 3, so their median is 2."""
    w, honest = torch.tensor([5.0, 5.0]), torch.tensor([[6.0, 5.0], [7.0, 5.0], [8.0, 5.0]])
    W = torch.tensor([[4.0, 6.0], [4.0, 25.0], [5.5, 6.0], [4.0, 5.0]])
    found = ATTACKS["sidestep"].submissions(W, w, honest, np.random.default_rng(0)) - w
    assert found.numpy() == pytest.approx(np.array([[0, 1], [0, 2], [0.5, 1], [0, 0]]), abs=1e-6)


def test_a_liar_has_the_weight_of_the_images_that_it_claims(small):
    """Ten times 30 images. Only the server is told so: the client trains on its own."""
    sizes, bad = np.array([30, 20]), np.array([True, False])
    told = ATTACKS["liar"].claimed(sizes, bad)
    assert told.tolist() == [300, 20] and told.dtype.kind == "i"
    for strength, expected in ((2.5, 75), (0, 1), (1e30, 1e9)):
        assert ATTACKS["liar"].claimed(sizes, bad, strength).tolist() == [expected, 20]
    assert ATTACKS["label_flip"].claimed(sizes, bad).tolist() == [30, 20]
    config = Config(rounds=2, clients=4, malicious=0.25, threads=1)
    honest, liar = (simulate(replace(config, attack=name), dataset=small) for name in ("label_flip", "liar"))
    columns = ["client", "train_loss"]
    first = [result.clients[result.clients["round"] == 1][columns] for result in (honest, liar)]
    assert first[0].equals(first[1]) and honest.weights.tolist() != liar.weights.tolist()
    assert honest.summary["training_images"] == liar.summary["training_images"]


def test_to_stumble_is_to_be_honest_later():
    attack, W = ATTACKS["stumble"], torch.zeros(2, 10_000)
    noise = attack.submissions(W, W[0], W, np.random.default_rng(1), burst=True)
    assert noise.std().item() == pytest.approx(0.1, rel=0.03) and attack.poison is None
    assert attack.submissions(W, W[0], W, np.random.default_rng(1), burst=False).equal(W)


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.sees_honest])
def test_with_nobody_left_to_hide_among_clients_submit_what_they_trained(name):
    for honest in (TRAINED[:0], TRAINED * float("nan")):
        assert ATTACKS[name].submissions(TRAINED, GLOBAL, honest, np.random.default_rng(0)).equal(TRAINED)


def test_near_copies_differ_a_little_from_each_other():
    honest = torch.zeros(2, 10_000)
    copies = ATTACKS["near_copies"].submissions(honest + 1, honest[0], honest, np.random.default_rng(0))
    assert copies.std(1).tolist() == pytest.approx([1e-4, 1e-4], rel=0.05) and not copies[0].equal(copies[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_near_copies_need_the_spread_of_the_centre(seed, real):
    """Four near-copies cost honest clients their place with the spread of the centre alone, and MAD from round 1."""
    config = Config(rounds=2, mad_start=1, attack="near_copies", malicious=0.4, seed=seed)
    assert simulate(config, dataset=real).summary["excluded"] == {}
    former = simulate(replace(config, settings=Settings(spread="centre")), dataset=real).summary
    assert former["false_exclusions"] >= 4 and former["true_exclusions"] == 0


def test_an_attack_without_a_submission_submits_what_was_trained():
    attack = Attack("trains on other labels", poison=attacks.flip_one_way)
    assert attack.submissions(TRAINED, GLOBAL, TRAINED[:0], np.random.default_rng(0)).equal(TRAINED)


def test_only_an_attack_that_sees_the_honest_models_gets_them():
    blind = Attack("", submit=lambda W, w, rng: W + 1)
    seeing = Attack("", submit=lambda W, w, rng, honest: W + honest.mean(0), sees_honest=True)
    honest = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    assert blind.submissions(TRAINED, GLOBAL, honest, np.random.default_rng(0)).equal(TRAINED + 1)
    assert seeing.submissions(TRAINED, GLOBAL, honest, np.random.default_rng(0)).tolist() == [[21, 32], [23, 34]]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_does_something_and_says_what(name):
    attack = ATTACKS[name]
    assert attack.poison or attack.submit
    assert 10 < len(attack.about) <= 61 and "\n" not in attack.about  # it fits one line of 80 columns in --list


def test_one_way_flips_call_pneumonia_normal_and_never_the_other_way():
    labels = np.array([0, 1, 1, 0, 1, 1])
    rng = np.random.default_rng(0)
    assert attacks.flip_one_way(labels, 1.0, rng).tolist() == [0] * 6
    half = attacks.flip_one_way(labels, 0.5, rng)
    assert half.sum() == 2 and (half <= labels).all() and labels.tolist() == [0, 1, 1, 0, 1, 1]
    assert (attacks.flip_one_way(labels, 0.0, rng) == labels).all()
