"""Tests of trust.py: the paper's equations, worked out by hand, and hostile submissions."""

import json
import math
import pickle
import warnings
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.spatial
import torch
from conftest import some
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import trust
from madsim import Config
from trust import (
    PRESETS,
    Settings,
    aggregate,
    centre_distances,
    distrusted,
    first_splits,
    initial_reputation,
    initial_state,
    mad_step,
    main_cluster,
    normalised_distance,
    outlying_group,
    squared_distances,
    trust_indicator,
    two_means,
    update_reputation,
    update_trust,
    usual_distance,
)

PAPER, TESTBED = PRESETS["paper"], PRESETS["testbed"]
unit = st.floats(0, 1)


def column(*values: float) -> np.ndarray:
    """One weight per client, so that distances are easy to see: W [C, 1]."""
    return np.array(values, float)[:, None]


def squares(W: np.ndarray) -> np.ndarray:
    """Squared distances of usual weights, whose unit is 1."""
    squared, unit = squared_distances(W)
    assert unit == 1
    return squared


# ---------------------------------------------------------------- the equations, by hand


def test_equation_1():
    assert initial_reputation(np.array([0.3, 1.0])).tolist() == [0.3, 1.0]


@pytest.mark.parametrize(
    ("previous", "d", "t", "expected"),
    [
        (0.4, 0.6, 2, 0.85),  # 0.4 + 0.6 + 0.2 = 1.2, clipped to 1; 0.75 * 1 + 0.25 * 0.4
        (0.1, 0.5, 10, 0.4825),  # at d = alpha the reputation rises: 0.1 + 0.5 + 0.01 = 0.61; 0.75 * 0.61 + 0.025
        (0.9, 0.45, 3, 0.601579),  # 1.35 - exp(-0.55 * 0.3) = 0.502106; 0.75 * 0.502106 + 0.225
        (0.4, 0.2, 2, 0.1),  # 0.6 - exp(-0.8 * 0.2) = -0.252, clipped to 0; 0.25 * 0.4
    ],
)
def test_equations_2_to_4_as_printed(previous, d, t, expected):
    R = update_reputation(np.array([previous]), np.array([d]), t, PAPER)
    assert R[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("previous", "d", "t", "expected"),
    [
        (0.4, 0.6, 2, 0.7),  # 0.4 + 0.6 - 0.2 = 0.8; 0.75 * 0.8 + 0.1
        (0.9, 0.45, 3, 0.921711),  # 1.35 - exp(-(1 - 0.45 * 0.3)) = 0.928948; 0.75 * 0.928948 + 0.225
        (1.0, 1.0, 4, 1.0),  # 1.75, smoothed to 1.5625 and only then clipped
        (1.0, 0.0, 1, 0.724090),  # 1 - exp(-1) = 0.632121, smoothed to 0.724090
    ],
)
def test_equations_2_to_4_of_the_testbed(previous, d, t, expected):
    R = update_reputation(np.array([previous]), np.array([d]), t, TESTBED)
    assert R[0] == pytest.approx(expected, abs=1e-6)


def test_the_order_of_clipping_and_smoothing_matters():
    R, d = np.array([0.4]), np.array([0.6])  # 1.2 before clipping
    assert update_reputation(R, d, 2, replace(PAPER, order="smooth-clip"))[0] == pytest.approx(1.0)  # 0.9 + 0.1
    assert update_reputation(R, d, 2, PAPER)[0] == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("R", "d", "expected"),
    [(1, 1, 2**0.5), (0, 0, -(2**0.5)), (0.6, 0.8, 1 - 0.2**0.5), (0.5, 0.5, 0)],  # third: 1 - |(0.4, 0.2)|
)
def test_equation_5(R, d, expected):
    assert trust_indicator(np.array([R]), np.array([d]))[0] == pytest.approx(expected)


def test_equations_6_and_7():
    before = np.array([0.5, 0.5, 0.5])
    trust = update_trust(before, np.array([0.4, 2**0.5, -1.0]), PAPER)
    assert trust.tolist() == pytest.approx([0.415, 1.0, 0.0])  # 0.34 + 0.075; 1.277 and -0.775 are clipped


@given(hnp.arrays(float, 5, elements=unit), hnp.arrays(float, 5, elements=unit), st.integers(2, 10**6))
def test_scores_stay_in_the_unit_interval(R, d, t):
    for preset in PRESETS.values():
        reputation = update_reputation(R, d, t, preset)
        trust = update_trust(R, trust_indicator(reputation, d), preset)
        assert ((reputation >= 0) & (reputation <= 1) & (trust >= 0) & (trust <= 1)).all()


@given(unit, unit, st.integers(2, 1000))
def test_a_nearer_client_is_never_trusted_less(R, t0, t):
    d = np.linspace(0, 1, 101)
    trust = update_trust(np.full(101, t0), trust_indicator(update_reputation(np.full(101, R), d, t, PAPER), d), PAPER)
    assert (np.diff(trust) >= -1e-12).all()


# ---------------------------------------------------------------- distances


def test_an_outlying_group_sets_the_scale():
    # The clusters are {0, 1, 2} and {10}. The centre is 1 and the distances are 1, 0, 1, 9.
    # The silhouettes are 17/20, 8/9, 13/16, 0. Their mean is 0.638.
    distance, d, spread = normalised_distance(column(0, 1, 2, 10), 0.0, PAPER)
    assert distance.tolist() == pytest.approx([1, 0, 1, 9])
    assert d.tolist() == pytest.approx([8 / 9, 1, 8 / 9, 0])
    # The lower median distances to the others are 2, 1, 2, 9. The lower median of these is 2.
    assert spread == pytest.approx(2 / math.sqrt(2))
    assert normalised_distance(column(0, 1, 2, 10), 0.0, replace(PAPER, spread="centre"))[2] == pytest.approx(1)


def test_the_floor_may_hold_also_where_there_is_an_outlying_group():
    # As above, the centre is 1, the distances are 1, 0, 1, 9 and the spread is sqrt 2. 9 is within 20 / sqrt 2 spreads.
    always = replace(PAPER, scale_floor=20 / math.sqrt(2), floored="always")
    assert normalised_distance(column(0, 1, 2, 10), 0.0, always)[1].tolist() == pytest.approx(
        [19 / 20, 1, 19 / 20, 11 / 20]
    )
    ungrouped = replace(PAPER, scale_floor=20 / math.sqrt(2))
    assert normalised_distance(column(0, 1, 2, 10), 0.0, ungrouped)[1].tolist() == pytest.approx([8 / 9, 1, 8 / 9, 0])


def test_a_group_within_the_usual_spread_is_no_group():
    # 9 is not above 1.25 * 8, so the centre is that of all clients, 3.25. The distances are 3.25, 2.25, 1.25, 6.75.
    distance, d, spread = normalised_distance(column(0, 1, 2, 10), 8.0, PAPER)
    assert distance.tolist() == pytest.approx([3.25, 2.25, 1.25, 6.75])
    assert d.tolist() == pytest.approx([1 - (x - 1.25) / 18.75 for x in (3.25, 2.25, 1.25, 6.75)])  # hi = 2.5 * 8
    assert spread == 8


def test_without_a_group_the_farthest_is_not_far():
    # Two clusters of equal size give no group. The centre is 1.5, the usual distance 1 / sqrt 2, hi = 2.5, lo = 0.5.
    floor = replace(PAPER, scale_floor=2.5 * math.sqrt(2))
    assert normalised_distance(column(0, 1, 2, 3), 0.0, floor)[1].tolist() == pytest.approx([0.5, 1, 1, 0.5])
    assert normalised_distance(column(0, 1, 2, 3), 0.0, TESTBED)[1].tolist() == pytest.approx([0, 1, 1, 0])


def test_with_one_cluster_there_is_no_group_and_the_testbed_has_no_floor():
    assert not outlying_group(squares(column(0, 1, 2, 10)), 0.0, replace(PAPER, clusters=1)).any()
    # The centre is 1.625. The distances are 1.625, 0.625, 0.375, 1.875. The earlier spread does not matter.
    for spread in (0.0, 8.0):
        _, d, _ = normalised_distance(column(0, 1, 2, 3.5), spread, TESTBED)
        assert d.tolist() == pytest.approx([1 / 6, 5 / 6, 1, 0])


def test_a_silhouette_at_its_bound_is_no_structure():
    from sklearn.metrics import silhouette_score

    squared = squares(column(0, 0.125, 0.25, 1))
    assert squared.max() == 1
    bound = float(silhouette_score(np.sqrt(squared), [0, 0, 0, 1], metric="precomputed"))
    assert outlying_group(squared, 0.0, PAPER).tolist() == [False, False, False, True]
    assert not outlying_group(squared, 0.0, replace(PAPER, silhouette=bound)).any()


def test_a_split_without_structure_is_no_group():
    W = np.random.default_rng(0).normal(size=(10, 500))  # in 500 dimensions, all distances are about equal
    assert not outlying_group(squares(W), 0.0, PAPER).any()
    assert outlying_group(squares(W), 0.0, replace(PAPER, silhouette=-1.0)).any()


@pytest.mark.parametrize("W", [column(1), column(1, 5), column(3, 3, 3, 3)], ids=["one", "two", "identical"])
def test_degenerate_rounds_have_no_group(W):
    _, d, _ = normalised_distance(W, 0.0, PAPER)
    assert d.tolist() == [1] * len(W)


def test_distances_are_those_of_the_full_weights():
    rng = np.random.default_rng(1)
    W = rng.normal(size=(9, 300)) + 2 * (np.arange(9) < 3)[:, None]
    squared = squares(W)
    assert squared == pytest.approx(((W[:, None] - W) ** 2).sum(2))
    members = np.arange(9) >= 3
    assert centre_distances(squared, members) == pytest.approx(np.linalg.norm(W - W[members].mean(0), axis=1))
    assert (two_means(squared) == members).all()


def within(W, group) -> float:
    """The sum of squared distances from the centres of a split, on the coordinates themselves."""
    return sum(((W[part] - W[part].mean(0)) ** 2).sum() for part in (group, ~group) if part.any())


def cases(kind: str, seed: int):
    """Models [n, P] of 3 to 50 clients: one cloud, whole numbers that tie, copies, or a planted group of 1 to n/2."""
    rng = np.random.default_rng(seed)
    clients = int(rng.integers(3, 51))
    W = rng.normal(size=(clients, rng.choice([1, 2, 5, 40, 200])))
    if kind == "ties":
        return np.round(W)
    if kind == "copies":
        W[rng.integers(0, clients, clients // 2)] = W[0]
    if kind == "group":
        W[: rng.integers(1, clients // 2 + 1)] += rng.choice([0.5, 1, 3, 10]) * rng.normal(size=W.shape[1])
    return W


@pytest.mark.parametrize("count", some([20, 250], 20))
@pytest.mark.parametrize("kind", ["cloud", "ties", "copies", "group"])
def test_no_split_of_scikit_learn_is_better(kind, count):
    from sklearn.cluster import KMeans

    for seed in range(count):
        W = cases(kind, seed)
        with warnings.catch_warnings(action="ignore"):  # scikit-learn warns of copies
            best = KMeans(2, n_init=10, random_state=seed).fit(W).inertia_
        assert within(W, two_means(squares(W))) <= best * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("clients", [2, 3, 7, 10])
def test_the_split_of_few_clients_is_the_best_of_all(clients):
    for seed in range(5):
        W = np.random.default_rng(seed).normal(size=(clients, 4))
        splits = [np.array(split) for split in product([False, True], repeat=clients)][1:-1]
        assert within(W, two_means(squares(W))) == pytest.approx(min(within(W, split) for split in splits))


def test_the_split_is_better_than_one_in_which_each_is_nearest_to_its_own_centre():
    """{0, 0, 93} and {110, 200} have the centres 31 and 155. 93 lies 62 from both: Lloyd's steps can end here.

    The sum of squares is 2 * 31^2 + 62^2 + 2 * 45^2 = 9816. With {0, 0} alone it is 0 + 41^2 + 24^2 + 66^2, about 6600.
    """
    assert two_means(squares(column(0, 0, 93, 110, 200))).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(("clients", "starts"), [(2, 1), (11, 1023), (12, 66), (50, 1225), (1000, 3)])
def test_many_clients_are_split_from_fewer_starts(clients, starts):
    """All splits, all pairs, or some pairs. With 1000 clients, a planted group is found all the same."""
    W = np.random.default_rng(0).normal(size=(clients, 3))
    assert len(first_splits(squares(W))) == starts
    if clients == 1000:
        W[:300] += 20
        assert (two_means(squares(W)) == (np.arange(1000) >= 300)).all()


@pytest.mark.parametrize("models", [(0, 1, 2, 9, 10), (10, 9, 0, 1, 2), (9, 0, 10, 1, 2)])
def test_the_smaller_cluster_is_the_outlying_one_wherever_it_stands(models):
    group = outlying_group(squares(column(*models)), 0.0, PAPER)
    assert group.tolist() == [model > 5 for model in models]


def test_copies_count_once_with_two_clusters_and_each_with_one():
    W = column(0, 0, 0, 5, 6)
    squared = squares(W)
    assert main_cluster(W, squared, 0.0, PAPER)[0].tolist() == [True, False, False, True, True]
    assert main_cluster(W, squared, 0.0, TESTBED)[0].all()


def test_the_usual_distance_by_hand():
    """0, 1, 3, 7 have the lower median distances 3, 2, 3, 6 to the others. The lower median of these is 3."""
    usual = 3 / math.sqrt(2)
    assert usual_distance(squares(column(0, 1, 3, 7))) == pytest.approx(usual)
    assert usual_distance(squares(column(0, 1, 3, 7, 1e9))) == pytest.approx(usual)  # 3, 2, 3, 6 and about 1e9
    assert usual_distance(squares(column(5))) == 0
    assert usual_distance(squares(column(5, 7))) == pytest.approx(2 / math.sqrt(2))


def test_the_usual_distance_is_that_from_the_centre_if_all_directions_differ():
    W = np.random.default_rng(0).normal(size=(10, 20_000))
    from_centre = np.linalg.norm(W - W.mean(0), axis=1)
    assert usual_distance(squares(W)) == pytest.approx(np.median(from_centre), rel=0.06)  # sqrt(10 / 9) is 1.054


@given(st.integers(0, 10_000), st.integers(3, 20), st.floats(0, 1e6))
def test_a_minority_can_not_raise_the_usual_distance(seed, clients, apart):
    """It stays within the honest clients' own distances. The median distance from the centre does not."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(clients, 6))
    bad = np.arange(clients) < (clients - 1) // 2
    honest = squares(W[~bad]).max()
    W[bad] += apart * rng.normal(size=(bad.sum(), 6))
    assert usual_distance(squares(W)) <= math.sqrt(honest / 2) * (1 + 1e-9)


def test_one_burst_of_noise_blinds_the_server_only_with_the_distance_from_the_centre():
    """Two of ten clients submit noise in round 1 and lie 4 away afterwards. Honest ones lie 1 from their centre."""
    rng = np.random.default_rng(0)
    bad, places = np.arange(10) < 2, rng.normal(size=(12, 10, 400)) / 20
    places[:, bad] += 4 / math.sqrt(400)
    places[0, bad] = rng.normal(size=(2, 400)) * 5
    for spread, out in (("pairs", bad), ("centre", np.zeros(10, bool))):
        settings, state = replace(PAPER, spread=spread), initial_state(10)
        for t, W in enumerate(places, 1):
            state = mad_step(np.where(state.active[:, None], W, np.nan), state, t, 10, settings)
        assert (~state.active == out).all()


@pytest.mark.parametrize(("spread", "found"), [(6.3, True), (6.4, False), (6.8, False)])
def test_the_nearest_member_of_a_group_decides_whether_it_is_far(spread, found):
    """The clients 9 and 10 lie 8 and 9 from the centre of {0, 1, 1, 2}. 1.25 spreads are 7.875, 8 and 8.5."""
    group = outlying_group(squares(column(0, 1, 1, 2, 9, 10)), spread, PAPER)
    assert group.tolist() == [False] * 4 + [found] * 2


def test_the_silhouette_decides_by_hand():
    # The clusters {0, 1} and {4, 6, 7} give (a, b) = (1, 17/3), (1, 14/3), (5/2, 7/2), (3/2, 11/2), (2, 13/2)
    squared = squares(column(0, 1, 4, 6, 7))
    mean = (14 / 17 + 11 / 14 + 2 / 7 + 8 / 11 + 9 / 13) / 5  # 0.663
    for bound, group in ((mean - 0.001, [True, True, False, False, False]), (mean + 0.001, [False] * 5)):
        assert outlying_group(squared, 0.0, replace(PAPER, silhouette=bound)).tolist() == group


clouds = hnp.arrays(float, (6, 4), elements=st.integers(-1000, 1000))


@settings(max_examples=60)
@given(clouds, st.permutations(range(6)), st.integers(-50, 50), st.sampled_from([0.25, 3.0, 64.0]))
def test_shifting_or_scaling_all_weights_changes_nothing(W, order, shift, scale):
    _, d, spread = normalised_distance(W, 0.0, PAPER)
    _, moved, moved_spread = normalised_distance(W * scale + shift, 0.0, PAPER)
    assert moved == pytest.approx(d, abs=1e-6)
    assert moved_spread == pytest.approx(spread * scale, abs=1e-6)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.permutations(range(8)))
def test_permuting_clients_permutes_scores(seed, order):
    W = np.random.default_rng(seed).normal(size=(8, 30)) + 3 * (np.arange(8) < 2)[:, None]
    _, d, spread = normalised_distance(W, 0.0, PAPER)
    _, permuted, permuted_spread = normalised_distance(W[list(order)], 0.0, PAPER)
    assert permuted == pytest.approx(d[list(order)], abs=1e-9)
    assert permuted_spread == pytest.approx(spread)


# ---------------------------------------------------------------- rounds


def submissions(seed: int, far: tuple[int, ...] = (1, 4), clients: int = 10, by: float = 3.0) -> np.ndarray:
    """Models around one point. The models of the clients in `far` lie around another point."""
    W = np.random.default_rng(seed).normal(size=(clients, 200)) / 14  # about 1 from the centre
    W[list(far)] += by / 200**0.5
    return W


def from_zero(W) -> tuple[np.ndarray, np.ndarray]:
    """What the preset `directions` needs besides the models: global weights of 0, and one step of each client."""
    return np.zeros(W.shape[1]), np.ones(len(W))


def play(rounds: int, mad_start: int | None, settings: Settings = PAPER, far=(1, 4), edit=lambda W, t: W):
    """The initial state, and the state after each of `rounds` rounds of such submissions."""
    states = [initial_state(10)]
    for t in range(1, rounds + 1):
        W = edit(submissions(t, far), t)
        states.append(mad_step(W, states[-1], t, mad_start, settings, *from_zero(W)))
    return states


def test_the_distrusted_are_excluded_from_the_mad_start_on():
    states = play(8, mad_start=5)
    assert [s.active.sum() for s in states[1:]] == [10, 10, 10, 10, 8, 8, 8, 8]
    assert np.flatnonzero(~states[-1].active).tolist() == [1, 4]
    assert (states[5].trust[[1, 4]] < 0.15).all()
    assert np.isnan(states[6].trust[[1, 4]]).all()  # dropped: the excluded get no more scores
    assert states[-1].trust[states[-1].active].min() > 0.5


@pytest.mark.parametrize(("judged", "out"), [("trust", [3]), ("reputation", []), ("d", [3])])
def test_one_far_round_after_good_ones_is_forgiven_by_the_reputation_alone(judged, out):
    """After two rounds in the middle, the last client is the farthest in the third: R was 1, and d is 0.

    By eq. (2) R is 1 + 0 - exp(-1/3) = 0.283, and smoothed 0.75 * 0.283 + 0.25 = 0.463. The indicator is
    hypot(0.463, 0) - hypot(0.537, 1) = -0.672. The trust was 1 at most: 0.85 * -0.672 + 0.15 is below 0.
    """
    settings = Settings(judged=judged, threshold=0.15)
    state = initial_state(4)
    for t, W in ((1, column(0, 1, 2, 1)), (2, column(0, 1, 2, 1)), (3, column(0, 1, 2, 10))):
        state = mad_step(W, state, t, 3, settings)
    assert np.flatnonzero(~state.active).tolist() == out
    assert (state.d[3], state.reputation[3], state.trust[3]) == (0, pytest.approx(0.463, abs=5e-4), 0)


def test_trust_at_the_threshold_is_enough():
    trust, everybody = np.array([0.15, 0.1499, 0.9]), np.ones(3, bool)
    assert distrusted(trust, everybody, 5, 5, PAPER).tolist() == [False, True, False]
    assert not distrusted(trust, everybody, 4, 5, PAPER).any()


def test_before_the_first_round():
    state = initial_state(3)
    assert (state.round, state.spread, state.kept) == (0, 0.0, False) and state.active.all()
    assert np.isnan([state.distance, state.d, state.reputation, state.trust]).all()


def test_without_a_start_nobody_is_excluded_but_all_are_scored():
    states = play(8, mad_start=None)
    assert all(s.active.all() for s in states)
    assert (states[-1].trust[[1, 4]] < 0.15).all()


def test_without_attackers_nobody_is_excluded():
    assert all(s.active.all() for s in play(30, mad_start=1, far=()))


def test_min_max_excludes_honest_clients_where_nobody_attacks():
    """The negative control: min-max normalisation always puts a client at the far end."""
    plain = replace(PAPER, clusters=1, scale_floor=0.0)
    assert play(30, 1, plain, far=())[-1].active.sum() < 10


def test_first_round_by_hand():
    # d is 8/9, 1, 8/9, 0 and R = d. The trust is 0.85 * sqrt 2 (2 d - 1), clipped.
    state = mad_step(column(0, 1, 2, 10), initial_state(4), 1, 1, PAPER)
    assert state.reputation.tolist() == pytest.approx([8 / 9, 1, 8 / 9, 0])
    assert state.trust.tolist() == pytest.approx([0.85 * 2**0.5 * 7 / 9, 1, 0.85 * 2**0.5 * 7 / 9, 0])
    assert state.active.tolist() == [True, True, True, False]
    assert (state.round, state.kept) == (1, False)


def test_the_testbed_excludes_one_round_later_and_first_the_lowest():
    states = play(8, mad_start=3, settings=TESTBED)
    assert [s.active.sum() for s in states[1:5]] == [10, 10, 10, 9]
    lowest = np.flatnonzero(~states[4].active)
    assert lowest.tolist() == [states[3].trust.argmin()]
    assert not np.isnan(states[-1].trust).any()  # observed: the excluded still get scores


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mad_start", [None, 6])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_client_that_submits_no_numbers_is_excluded_at_once(poison, mad_start, preset):
    def edit(W, t):
        if t == 2:
            W[7, 13] = poison
        return W

    states = play(4, mad_start, preset, edit=edit)
    assert [bool(s.active[7]) for s in states[1:]] == [True, False, False, False]
    assert np.isnan(states[2].trust[7])
    others = np.arange(10) != 7
    W = submissions(2)[others]
    clean = mad_step(W, _without(states[1], 7), 2, mad_start, preset, *from_zero(W))
    assert states[2].trust[others] == pytest.approx(clean.trust)  # client 7 reached neither K-means nor the scale


def _without(state, client: int):
    """The state without one client."""
    names = ("distance", "d", "reputation", "trust", "active")
    return replace(state, **{name: np.delete(getattr(state, name), client) for name in names})


def test_if_nobody_submits_numbers_the_run_can_not_go_on():
    with pytest.raises(FloatingPointError, match="round 3"):
        mad_step(np.full((4, 5), np.nan), initial_state(4), 3, None, PAPER)


def test_if_everyone_would_be_excluded_the_round_keeps_its_clients():
    strict = replace(PAPER, threshold=1.0, beta_trust=0.5)  # the first trust is at most 0.707
    state = mad_step(submissions(1), initial_state(10), 1, 1, strict)
    assert state.kept and state.active.all()


def test_if_everyone_would_be_excluded_the_testbed_averages_everybody():
    state = replace(initial_state(10), trust=np.zeros(10), active=np.arange(10) > 0)
    state = mad_step(submissions(1), state, 5, 2, TESTBED)
    assert state.kept and state.active.all()


@pytest.mark.parametrize("value", [1e30, -1e30, 0.0, 1e-30])
def test_a_crude_submission_costs_no_honest_client_its_place(value):
    def edit(W, t):
        W = W + 5  # so that zero lies far from the others
        W[[1, 4]] = value
        return W

    states = play(12, mad_start=4, far=(), edit=edit)
    assert np.flatnonzero(~states[-1].active).tolist() == [1, 4]


def test_an_outlier_does_not_blur_the_distances_between_the_others():
    W = submissions(0, far=())
    W[3] = 1e30
    honest = np.arange(10) != 3
    assert squares(W)[np.ix_(honest, honest)] == pytest.approx(squares(W[honest]), rel=1e-9)


def test_copies_of_a_model_and_one_client_left():
    W = np.repeat(submissions(0)[:1], 10, 0)
    state = mad_step(W, initial_state(10), 1, 1, PAPER)
    assert state.active.all() and (state.d == 1).all()
    alone = replace(state, active=np.arange(10) == 2)
    state = mad_step(submissions(2), alone, 2, 1, PAPER)
    assert state.active.tolist() == alone.active.tolist() and state.d[2] == 1


# ---------------------------------------------------------------- numbers of any size


@pytest.fixture
def no_warning():
    """A warning, such as that of an overflow, fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


LARGEST = float(np.finfo(float).max)


@pytest.mark.parametrize("value", [1e145, 1e160, 1e300, LARGEST])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("preset", [PAPER, TESTBED])
def test_a_row_of_any_size_is_far(value, sign, preset, no_warning):
    """As in the first round by hand, but with 1e160 instead of 10. d of the others is 1 up to rounding.

    A distance that is cut off is said to be at least 1e145.
    """
    state = mad_step(column(0, 1, 2, sign * value), initial_state(4), 1, 1, preset)
    assert state.d.tolist() == pytest.approx([1, 1, 1, 0])
    assert (state.trust[3], state.trust[0] > 0.5) == (0, True)
    assert 5e144 < state.distance[3] <= value  # the testbed measures it from the mean of all
    if preset == PAPER:
        assert state.active.tolist() == [True, True, True, False]
        assert state.distance[:3].tolist() == pytest.approx([1, 0, 1])
        assert state.spread == pytest.approx(math.sqrt(2))


def test_the_distances_of_many_clients_are_those_of_double_precision():
    """A third of the clients lies three times as far out, and one a thousand times."""
    W = np.random.default_rng(0).normal(size=(300, 9000)).astype(np.float32)
    W[::3] += 3
    W[7] *= 1000
    many, few = squared_distances(W)[0], squared_distances(W[:200])[0]
    exact = scipy.spatial.distance.cdist(W.astype(float), W.astype(float), "sqeuclidean")
    np.testing.assert_allclose(few, exact[:200, :200], rtol=1e-12)
    np.testing.assert_allclose(many, exact, rtol=1e-5)
    assert not np.allclose(many, exact, rtol=1e-12)  # so this is the other way


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e-100, 1e100, 1e160, 1e300, 2.0**1019])
@pytest.mark.parametrize("preset", [PAPER, TESTBED])
def test_the_scores_of_a_whole_federation_do_not_depend_on_its_size(size, preset, no_warning):
    usual, scaled = initial_state(10), initial_state(10)
    for t in (1, 2, 3, 4):
        W = submissions(t)
        usual, scaled = mad_step(W, usual, t, 2, preset), mad_step(W * size, scaled, t, 2, preset)
        assert (scaled.active == usual.active).all()
        assert scaled.trust == pytest.approx(usual.trust, abs=1e-9, nan_ok=True)
        assert scaled.distance / size == pytest.approx(usual.distance, nan_ok=True)
        assert scaled.spread / size == pytest.approx(usual.spread)
    assert np.flatnonzero(~usual.active).tolist() == [1, 4]


def test_a_scale_that_is_a_power_of_two_changes_no_bit(no_warning):
    W = submissions(0)
    distance, d, spread = normalised_distance(W, 0.5, PAPER)
    far, same, far_spread = normalised_distance(W * 2.0**600, 0.5 * 2.0**600, PAPER)
    assert (same == d).all() and (far == distance * 2.0**600).all() and far_spread == spread * 2.0**600


def test_a_round_of_another_size_is_scored_by_the_largest_spread(no_warning):
    """After a round with the spread 7e299, distances of 1e-300 are nothing. The spread stays."""
    state = mad_step(column(0, 1, 2, 3) * 1e300, initial_state(4), 1, None, PAPER)
    assert state.spread == pytest.approx(1e300 / math.sqrt(2))
    state = mad_step(column(0, 1, 2, 50) * 1e-300, state, 2, None, PAPER)
    assert state.d.tolist() == [1, 1, 1, 1] and state.spread == pytest.approx(1e300 / math.sqrt(2))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int64])
def test_other_types_are_scored_as_float64(kind, no_warning):
    W = np.round(50 * submissions(0)).astype(kind)
    W[7] = np.iinfo(kind).min if kind == np.int64 else np.finfo(kind).min
    state = mad_step(W, initial_state(10), 1, 1, PAPER)
    expected = mad_step(W.astype(float), initial_state(10), 1, 1, PAPER)
    assert state.trust.tolist() == expected.trust.tolist() and not state.active[7]


@given(hnp.arrays(float, (5, 3), elements=st.floats(allow_nan=False, allow_infinity=False)), st.floats(0, LARGEST))
def test_any_finite_numbers_are_scored_in_their_range_without_a_warning(W, spread):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for preset in PRESETS.values():
            state = replace(initial_state(5), spread=spread)
            for t in (1, 2):
                state = mad_step(W, state, t, 2, preset, *from_zero(W))
                scores = np.array([state.d, state.reputation, state.trust])[:, ~np.isnan(state.d)]
                assert scores.shape[1] >= 1 and ((scores >= 0) & (scores <= 1)).all()
                assert np.isfinite([state.spread, *state.distance[~np.isnan(state.d)]]).all()
                assert state.spread >= (spread if preset.measured == "positions" else 0)


@given(st.integers(0, 10**6), st.integers(-300, 290), st.floats(4, 18), st.sampled_from([1, -1]), st.integers(0, 6))
def test_the_row_that_is_far_is_excluded_at_any_scale(seed, exponent, far, sign, client):
    W = np.random.default_rng(seed).normal(size=(7, 20))
    W[client] += sign * 10.0**far
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = mad_step(W * 10.0**exponent, initial_state(7), 1, 1, PAPER)
    assert np.flatnonzero(~state.active).tolist() == [client]


# ---------------------------------------------------------------- aggregation, settings


def test_the_same_model_twice_counts_once():
    W = np.array([[0.0, 1.0], [0.0, 2.0], [-0.0, 1.0], [0.0, 1.0]])  # the sign of a zero does not count
    assert trust.originals(W).tolist() == [True, True, False, False]
    assert trust.originals(column(1e-20, 2e-20)).tolist() == [True, True]  # a small difference does count


def test_fedavg_by_hand():
    W = np.array([[1.0, 10], [4, 40], [100, 100]], np.float32)
    w = aggregate(W, np.array([2, 1, 7]), np.array([True, True, False]))
    assert w.tolist() == [2, 20] and w.dtype == np.float32  # (2 * 1 + 4) / 3


def test_what_is_not_active_never_reaches_the_average():
    W = np.array([[1.0], [np.nan], [3.0]])
    assert aggregate(W, np.ones(3), np.array([True, False, True])).tolist() == [2]


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_an_average_of_the_largest_numbers_is_finite(kind, no_warning):
    """The weights of the clients are 1, 2 and 7. The columns are huge, of both signs, tiny, and usual."""
    most = float(np.finfo(kind).max)
    tiny = 1e-170 if kind == np.float64 else 1e-37
    W = np.array([[most, most, tiny, 1], [most, -most, tiny, 4], [most, most / 7, 3 * tiny, 5]], kind)
    w = aggregate(W, np.array([1, 2, 7]), np.ones(3, bool))
    assert w[[0, 2, 3]].tolist() == pytest.approx([most, 2.4 * tiny, 4.4], rel=1e-6, abs=0)
    assert abs(w[1]) < most * 1e-7 and w.dtype == kind  # 1 - 2 + 7 / 7 = 0


def test_whole_numbers_have_an_average_that_is_not_whole():
    w = aggregate(np.array([[1, 2], [2, 4]]), np.ones(2), np.ones(2, bool))
    assert w.tolist() == [1.5, 3] and w.dtype == float


def test_the_presets_are_the_papers_and_the_testbeds():
    paper = (2, 0.25, 1.25, 2.5, "pairs", "ungrouped", 0.5, 0.75, 0.85, 0.15)
    testbed = (1, 0.25, 1.25, 0.0, "pairs", "ungrouped", 0.5, 0.75, 0.75, 0.15)
    assert Settings(*paper, "printed", "clip-smooth", "dropped", "same", "threshold", "keep") == PAPER
    assert Settings(*testbed, "testbed", "smooth-clip", "observed", "next", "lowest", "everybody") == TESTBED


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [("silhouette", -1, 1), *((name, 0, 1) for name in ("alpha", "beta_reputation", "beta_trust", "threshold"))],
)
def test_the_ends_of_a_range_belong_to_it(field, low, high):
    for value in (low, high):
        assert getattr(replace(PAPER, **{field: float(value)}), field) == value
    for value in (low - 0.01, high + 0.01):
        with pytest.raises(ValueError, match=rf"{field}.* {value} must be at least {low} and at most {high}"):
            replace(PAPER, **{field: value})


@pytest.mark.parametrize("number", [np.int64(5), np.uint8(5), np.array(5), torch.tensor(5)])
def test_numbers_of_numpy_become_pythons_own(number):
    config = Config(rounds=number, mad_start=number, seed=number, lr=number / 4, malicious=np.float32(0.25))
    assert config == Config(rounds=5, mad_start=5, seed=5, lr=1.25, malicious=0.25)
    assert [type(value) for value in (config.rounds, config.mad_start, config.lr)] == [int, int, float]
    assert json.loads(json.dumps(asdict(config)))["rounds"] == 5
    assert config.name == "mad5-rounds5-malicious0.25-lr1.25-s5"


def test_settings_have_their_own_types_whatever_is_given():
    settings = Settings(clusters=np.int64(1), threshold=np.float64(0.25), alpha=1, order=np.str_("smooth-clip"))
    own = (settings.clusters, settings.threshold, settings.alpha, settings.order)
    assert own == (1, 0.25, 1.0, "smooth-clip") and [*map(type, own)] == [int, float, float, str]
    assert pickle.dumps(settings) == pickle.dumps(Settings(clusters=1, threshold=0.25, alpha=1.0, order="smooth-clip"))
    assert type(Config(data_root=Path("images")).data_root) is str
    assert Config(concentration=10**8, partition="dirichlet").name == "nomad-dirichlet-concentration1e+08-s0"
    assert type(Config(malicious=0).malicious) is float


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("rounds", True, "int"),
        ("rounds", np.True_, "int"),
        ("rounds", np.float64(5), "int"),
        ("rounds", np.arange(1000), "int"),
        ("mad_start", pd.Series([5]), "int or NoneType"),
        ("mad_start", np.float64("nan"), "int or NoneType"),
        ("malicious", False, "float"),
        ("data_root", b"images", "str or NoneType"),
        ("settings", None, "Settings"),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_line(field, value, kind):
    with pytest.raises(ValueError, match=f"^{field} .{{1,60}} must be of type {kind}$"):
        Config(**{field: value})


def test_a_number_that_is_no_float_is_refused():
    with pytest.raises(ValueError, match=r"malicious 10+ must be finite"):
        Config(malicious=10**400)


@pytest.mark.parametrize("field", ["outlying", "scale_floor"])
def test_spreads_are_not_negative(field):
    assert getattr(replace(PAPER, **{field: 0.0}), field) == 0
    with pytest.raises(ValueError, match=f"{field} -0.01 must be at least 0 and finite"):
        replace(PAPER, **{field: -0.01})


@pytest.mark.parametrize(
    ("field", "value"),
    [("threshold", 1.5), ("threshold", float("nan")), ("clusters", 3), ("outlying", -1.0), ("order", "neither")],
)
def test_settings_outside_their_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        replace(PAPER, **{field: value})
