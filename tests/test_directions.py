"""Tests of the preset `directions`: what it measures, by hand, and clients that differ in size."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import madsim
from madsim import Config, simulate
from trust import PRESETS, agreement, direction_distance, initial_state, mad_step

PAPER, DIRECTIONS = PRESETS["paper"], PRESETS["directions"]
UNKNOWN = np.full(4, np.nan)  # no client has a distance before the first round


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((5, 5, 5), (-1 / 2, 0, -1 / 2)), ((1, 4, 9), (-1 / 2, 0, -1 / 3)), ((1, 4, 9000), (-1 / 2, 0, -1 / 3))],
)
def test_agreement_by_hand(steps, expected):
    """East, north and west. With the steps 1, 4 and 9 the weights are 1, 2 and 2: nobody has more than the median."""
    units = np.array([[1.0, 0], [0, 1], [-1, 0]])
    assert agreement(units, np.array(steps)) == pytest.approx(np.array(expected))
    assert agreement(units[:1], np.array([3])).tolist() == [1]


def test_who_is_as_much_against_the_others_as_they_agree_has_d_0():
    """Three go east, one goes west: the agreements are (1 + 1 - 1) / 3 and -1.

    Then the west one had 0.5 in the round before, which leaves it 0.9 * 0.5 - 0.1 = 0.35; or -0.05, which leaves it
    -0.145 while the others have 0.9 * 0.5 + 0.1 / 3 = 0.4833.
    """
    U, ones = np.array([[1.0, 0], [2, 0], [2, 0], [-2, 0]]), np.ones(4, int)
    distance, d, _ = direction_distance(U, ones, UNKNOWN, 0.0, 1, DIRECTIONS)
    assert distance == pytest.approx(np.array([2 / 3, 2 / 3, 2 / 3, 2])) and d.tolist() == [1, 1, 1, 0]
    distance, d, _ = direction_distance(U, ones, np.full(4, 0.5), 0.0, 1, DIRECTIONS)
    assert distance[3] == pytest.approx(0.65) and d.tolist() == [1, 1, 1, 1]
    d = direction_distance(U, ones, np.array([0.5, 0.5, 0.5, 1.05]), 0.0, 1, DIRECTIONS)[1]
    assert d == pytest.approx(np.array([1, 1, 1, 1 - 0.145 / (0.45 + 0.1 / 3)]))


def test_a_little_disagreement_is_chance():
    """The cosines are 0, -0.1 and -0.1, so the agreements are -0.05, -0.05 and -0.1, and the median counts as 0.2."""
    U = np.array([[1.0, 0, 0], [0, 1, 0], [-0.1, -0.1, (1 - 2 * 0.1**2) ** 0.5]])
    d = direction_distance(U, np.ones(3), UNKNOWN[:3], 0.0, 1, DIRECTIONS)[1]
    assert d == pytest.approx(np.array([0.75, 0.75, 0.5]))


@pytest.mark.parametrize(("length", "expected"), [(0.1, 1), (1, 1), (2.25, 0.5), (3.5, 0), (1e300, 0)])
def test_a_change_that_is_too_long_lowers_d(length, expected):
    """The usual length is 1, and d is 0 for a change that is 2.5 usual lengths too long."""
    U = np.array([[1.0, 0], [1, 0], [1, 0], [length, 0]])
    d = direction_distance(U, np.ones(4), UNKNOWN, 0.0, 1, DIRECTIONS)[1]
    assert d == pytest.approx(np.array([1, 1, 1, expected]))


def test_the_usual_length_grows_with_the_square_root_of_the_steps():
    """All go 1 per root of a step but the last two: one does not move, one goes 2.25. The median is 1."""
    steps, lengths = np.array([1, 4, 9, 0.25, 4]), np.array([1.0, 2, 3, 0, 4.5])
    d = direction_distance(lengths[:, None] * np.array([1.0, 0]), steps, np.full(5, np.nan), 0.0, 1, DIRECTIONS)[1]
    assert d == pytest.approx(np.array([1, 1, 1, 1, 0.5]))


def test_the_usual_length_remembers_all_rounds():
    """Late in training three clients move 0.01 and one moves 1, as all did in the rounds before: it is not too long.

    With a mean of 0.4 it is: 1 is 1.5 usual lengths too long, and d is 1 - 1.5 / 2.5.
    """
    U, ones = np.array([[0.01, 0], [0.01, 0], [0.01, 0], [1, 0]]), np.ones(4)
    for spread, t, mean, expected in ((0.0, 1, 0.01, 0), (1.01, 100, 1, 1), (0.41, 40, 0.4, 0.4)):
        _, d, new = direction_distance(U, ones, UNKNOWN, spread, t, DIRECTIONS)
        assert new == pytest.approx(mean) and d == pytest.approx(np.array([1, 1, 1, expected]))
    state = initial_state(4)
    for t, length in enumerate((1.0, 3.0, 2.0), 1):
        state = mad_step(np.tile([length, 0], (4, 1)), state, t, 1, DIRECTIONS, np.zeros(2), ones)
        assert state.d.tolist() == [1] * 4  # the median of the round counts, if it is larger than the mean
    assert state.spread == pytest.approx(2)


def test_a_claim_of_more_steps_lets_a_change_be_as_long_as_its_root():
    """Nine times the steps, so 3 is usual, 3 * 2.25 has d = 1/2, and 3 * 3.5 has d = 0."""
    for length, expected in ((3, 1), (6.75, 0.5), (10.5, 0), (90, 0)):
        U = np.array([[1.0, 0], [1, 0], [1, 0], [length, 0]])
        d = direction_distance(U, np.array([22, 22, 22, 198]), UNKNOWN, 0.0, 1, DIRECTIONS)[1]
        assert d == pytest.approx(np.array([1, 1, 1, expected]))


def federation(seed: int, steps: np.ndarray, flipped: int = 0, drift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Models [n, 400] after so many steps, the first `flipped` of which drift the other way, and the global model.

    A change is as long as the square root of its steps, as that of a random walk.
    """
    rng = np.random.default_rng(seed)
    w, away = rng.normal(size=400), rng.normal(size=(len(steps), 400))
    U = away / np.linalg.norm(away, axis=1, keepdims=True)
    U[:, 0] += np.where(np.arange(len(steps)) < flipped, -drift, drift)  # with 1, half of the square is drift
    return w + U * np.sqrt(steps)[:, None], w


def excluded(W, w, steps, preset, rounds=3):
    """Who is excluded if the same models are submitted in each round, and MAD starts in the last one."""
    state = initial_state(len(W))
    for t in range(1, rounds + 1):
        state = mad_step(W, state, t, rounds, preset, w, steps)
    return np.flatnonzero(~state.active).tolist()


STEPS = np.array([4, 9, 2, 1, 30, 6, 100, 3, 2, 120])


@pytest.mark.parametrize("seed", range(20))
def test_clients_of_all_sizes_stay_and_flippers_of_all_sizes_go(seed):
    """The negative control: positions exclude the largest clients, which did nothing wrong."""
    W, w = federation(seed, STEPS)
    assert excluded(W, w, STEPS, DIRECTIONS) == []
    assert set(excluded(W, w, STEPS, PAPER)) & {6, 9}
    for flipped in (1, 2, 4):
        W, w = federation(seed, STEPS, flipped)
        assert excluded(W, w, STEPS, DIRECTIONS) == list(range(flipped))


def test_converged_clients_with_chance_directions_stay():
    state = initial_state(10)
    for t in range(1, 201):
        W, w = federation(t, STEPS, drift=0)
        state = mad_step(W, state, t, 1, DIRECTIONS, w, STEPS)
    assert state.active.all() and state.d.min() > 0.8


def test_an_attack_that_starts_late_is_found():
    state = initial_state(10)
    for t in range(1, 41):
        W, w = federation(t, STEPS, flipped=2 * (t > 20))
        state = mad_step(W, state, t, 1, DIRECTIONS, w, STEPS)
        assert t > 20 or state.active.all()
    assert np.flatnonzero(~state.active).tolist() == [0, 1]


@pytest.mark.parametrize("preset", [PAPER, DIRECTIONS])
def test_a_change_that_is_too_long_is_far_in_any_direction(preset):
    W, w = federation(0, np.ones(10))
    W[4] = w + 6 * (W[4] - w)
    assert excluded(W, w, np.ones(10), preset) == [4]


def test_equal_changes_and_none_cost_nobody_its_place():
    w = np.arange(4.0)
    for W in (np.tile(w, (6, 1)), np.tile(w + 1, (6, 1)), np.vstack([np.tile(w, (2, 1)), w + np.eye(4)])):
        assert excluded(W, w, np.ones(6), DIRECTIONS) == []


def test_directions_need_the_global_weights_and_the_steps():
    W, w = federation(0, STEPS)
    for given_ in ((), (w,), (None, STEPS)):
        with pytest.raises(ValueError, match="directions need the last global weights w and the clients' steps"):
            mad_step(W, initial_state(10), 1, None, DIRECTIONS, *given_)


def test_rows_of_clients_that_were_not_asked_change_nothing():
    """Nor do those that are not finite, whose clients are excluded at once."""
    W, w = federation(0, STEPS)
    state = replace(initial_state(10), active=np.arange(10) != 3)
    W[3], W[5] = 1e9, np.nan
    first = mad_step(W, state, 1, None, DIRECTIONS, w, STEPS)
    rest = [0, 1, 2, 4, 6, 7, 8, 9]
    other = mad_step(W[rest], initial_state(8), 1, None, DIRECTIONS, w, STEPS[rest])
    assert first.active.tolist() == [client in rest for client in range(10)]
    assert first.d[rest].tolist() == other.d.tolist() and np.isnan(first.d[[3, 5]]).all()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.permutations(range(10)), st.floats(-1e3, 1e3), st.sampled_from([1e-3, 0.25, 64.0]))
def test_the_order_the_place_and_the_size_of_changes_do_not_matter(seed, order, shift, scale):
    W, w = federation(seed, STEPS, flipped=seed % 4)
    order, start = list(order), initial_state(10)
    first = mad_step(W, start, 1, None, DIRECTIONS, w, STEPS)
    other = mad_step(w + shift + scale * (W - w), start, 1, None, DIRECTIONS, w + shift, STEPS)
    mixed = mad_step(W[order], start, 1, None, DIRECTIONS, w, STEPS[order])
    for name in ("distance", "d"):
        assert getattr(other, name) == pytest.approx(getattr(first, name), abs=1e-6)
        assert getattr(mixed, name) == pytest.approx(getattr(first, name)[order], abs=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_numbers_of_any_size_are_measured_without_a_warning(kind, share):
    """Two of ten clients submit the largest numbers, or infinity, and go. The others stay."""
    most = float(np.finfo(kind).max) * share
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (most, -most, most**0.6, np.inf):
            W, w = federation(1, STEPS)
            W, w = W.astype(kind), w.astype(kind)
            W[[2, 6]] = value
            assert excluded(W, w, STEPS, DIRECTIONS) == [2, 6], value


def test_with_equal_shares_it_finds_the_attackers_too(small):
    """A run of its own: the same attackers as with positions, and nobody if nobody attacks."""
    config = Config(rounds=6, mad_start=5, clients=6, malicious=0.34, settings=DIRECTIONS, threads=1)
    assert config.name == "mad5-directions-rounds6-clients6-malicious0.34-s0"
    found = simulate(config, dataset=small).summary
    assert (found["true_exclusions"], found["false_exclusions"]) == (2, 0)
    assert simulate(replace(config, malicious=0.0), dataset=small).summary["false_exclusions"] == 0


def test_the_server_counts_the_steps_of_the_images_that_it_is_told_of(small, monkeypatch):
    """The negative control is `label_flip`, whose clients tell the truth."""
    told = {}

    def step(W, state, t, mad_start, settings, w, steps):
        told.setdefault(attack, steps)
        return mad_step(W, state, t, mad_start, settings, w, steps)

    monkeypatch.setattr(madsim, "mad_step", step)
    config = Config(rounds=1, clients=4, malicious=0.25, partition="quantity", batch_size=7, threads=1)
    for attack in ("label_flip", "liar"):
        result = simulate(replace(config, attack=attack, settings=DIRECTIONS), dataset=small)
    sizes, bad = np.array(result.summary["training_images"]), result.summary["malicious"]
    assert len(set(sizes)) == 4 and told["label_flip"].tolist() == np.ceil(sizes / 7).tolist()
    sizes[bad] *= 10
    assert told["liar"].tolist() == np.ceil(sizes / 7).tolist()
