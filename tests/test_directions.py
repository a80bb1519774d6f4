"""Tests of the preset `directions`: what it measures, by hand, and clients that differ in size."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from madsim import Config, simulate
from trust import PRESETS, directions, initial_state, mad_step, measured, opposed, squared_distances, usual_lengths

PAPER, DIRECTIONS = PRESETS["paper"], PRESETS["directions"]
ONES = np.ones(3, int)


def test_directions_by_hand():
    """The lengths 5, 2 and 0: the two that moved have the geometric middle sqrt 10, so 5 is sqrt 2.5 times too long."""
    found = directions(np.array([[3.0, 4], [0, 2], [0, 0]]), ONES)
    assert found == pytest.approx(np.array([[0.6 * 2.5**0.5, 0.8 * 2.5**0.5], [0, 1], [0, 0]]))
    assert directions(np.zeros((3, 2)), ONES).tolist() == [[0, 0]] * 3  # nobody has moved


@pytest.mark.parametrize(("exponent", "fitted"), [(0.5, 0.5), (1.0, 1.0), (2.0, 1.0), (-1.0, 0.0)])
def test_the_usual_length_is_a_power_of_the_steps(exponent, fitted):
    """Two of seven clients lie about theirs; the exponent is at least 0 and at most 1."""
    steps = np.array([1, 4, 16, 64, 100, 2, 9])
    lengths = 3.0 * steps**exponent
    if fitted == exponent:
        lengths[[0, 3]] = 1e6, 1e-6
        assert usual_lengths(lengths, steps) == pytest.approx(3.0 * steps**fitted)
    usual = usual_lengths(lengths, steps)
    assert np.diff(np.log(usual)) / np.diff(np.log(steps)) == pytest.approx(fitted, abs=1e-9)
    assert usual_lengths(np.array([1.0, 3, 3, 9]), np.full(4, 7)) == pytest.approx(3)  # the median length


def test_a_group_is_opposed_if_it_pulls_the_model_back():
    def answer(*members):
        U = np.array([[1.0, 0], [1, 0], [1, 0], *members])
        return opposed(squared_distances(U)[0], (U**2).sum(1), np.arange(len(U)) > 2)

    assert answer((-0.01, 1)) and answer((-0.01, 1), (-1, 0))
    assert not answer((0.01, 1)) and not answer((0, 1))  # a right angle is no opposition: noise has one
    assert not answer((-1, 0), (0.01, 1))  # each member must be opposed


def test_positions_are_the_models_and_other_rows_stay():
    W, w = np.array([[4.0, 5], [1, 3], [np.nan, 0], [7, 7]]), np.ones(2)
    asked = np.array([True, True, True, False])
    assert measured(W, w, np.ones(4), asked, PAPER) is W
    M = measured(W, w, np.ones(4), asked, DIRECTIONS)
    assert M[:2] == pytest.approx(directions(W[:2] - 1, ONES[:2])) and np.isnan(M[2, 0]) and M[3].tolist() == [7, 7]
    assert W[0].tolist() == [4, 5]


def federation(seed: int, steps: np.ndarray, flipped: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Models [n, 400] after so many steps, the first `flipped` of which drift the other way, and the global model.

    A change is as long as the square root of its steps, as that of a random walk.
    """
    rng = np.random.default_rng(seed)
    w, away = rng.normal(size=400), rng.normal(size=(len(steps), 400))
    U = away / np.linalg.norm(away, axis=1, keepdims=True)
    U[:, 0] += np.where(np.arange(len(steps)) < flipped, -1, 1)  # half of its square is drift
    return w + U * np.sqrt(steps)[:, None], w


def excluded(W, w, steps, preset, rounds=3):
    """Who is excluded if the same models are submitted in each round, and MAD starts in the last one."""
    state = initial_state(len(W))
    for t in range(1, rounds + 1):
        state = mad_step(measured(W, w, steps, state.active, preset), state, t, rounds, preset)
    return np.flatnonzero(~state.active).tolist()


STEPS = np.array([4, 9, 2, 1, 30, 6, 100, 3, 2, 120])


@pytest.mark.parametrize("seed", range(20))
def test_clients_of_all_sizes_stay_and_flippers_of_all_sizes_go(seed):
    """The negative control: positions exclude the largest clients, which did nothing wrong."""
    W, w = federation(seed, STEPS)
    assert excluded(W, w, STEPS, DIRECTIONS) == []
    assert set(excluded(W, w, STEPS, PAPER)) & {6, 9}
    W, w = federation(seed, STEPS, flipped=2)
    assert excluded(W, w, STEPS, DIRECTIONS) == [0, 1]


@pytest.mark.parametrize("preset", [PAPER, DIRECTIONS])
def test_a_change_that_is_too_long_is_far_in_any_direction(preset):
    W, w = federation(0, np.ones(10))
    W[4] = w + 6 * (W[4] - w)
    assert excluded(W, w, np.ones(10), preset) == [4]


def test_equal_changes_and_none_cost_nobody_its_place():
    w = np.arange(4.0)
    for W in (np.tile(w, (6, 1)), np.tile(w + 1, (6, 1)), np.vstack([np.tile(w, (2, 1)), w + np.eye(4)])):
        assert excluded(W, w, np.ones(6), DIRECTIONS) == []


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.permutations(range(10)), st.floats(-1e3, 1e3), st.sampled_from([1e-3, 0.25, 64.0]))
def test_the_order_the_place_and_the_size_of_changes_do_not_matter(seed, order, shift, scale):
    W, w = federation(seed, STEPS, flipped=seed % 4)
    order = list(order)
    first = measured(W, w, STEPS, np.ones(10, bool), DIRECTIONS)
    other = measured(w + shift + scale * (W - w), w + shift, STEPS, np.ones(10, bool), DIRECTIONS)
    assert other == pytest.approx(first, abs=1e-6)
    assert measured(W[order], w, STEPS[order], np.ones(10, bool), DIRECTIONS) == pytest.approx(first[order], abs=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_numbers_of_any_size_are_measured_without_a_warning(kind, share):
    """Two of ten clients submit the largest numbers, or infinity. The others stay, and all numbers are finite.

    One of the two can hide the other, because it has fewer steps and counts as farther.
    """
    most = float(np.finfo(kind).max) * share
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (most, -most, most**0.6, np.inf):
            W, w = federation(1, STEPS)
            W, w = W.astype(kind), w.astype(kind)
            W[[2, 6]] = value
            M = measured(W, w, STEPS, np.ones(10, bool), DIRECTIONS)
            assert np.isfinite(np.delete(M, [2, 6], 0)).all() and np.isfinite(M).all() == np.isfinite(value)
            assert excluded(W, w, STEPS, DIRECTIONS) in ([2], [2, 6]), value


def test_with_equal_shares_it_finds_the_attackers_too(small):
    """A run of its own: the same attackers as with positions, and the plane is drawn around the main cluster."""
    config = Config(rounds=6, mad_start=5, clients=6, malicious=0.34, settings=DIRECTIONS, threads=1)
    assert config.name == "mad5-directions-rounds6-clients6-malicious0.34-s0"
    found = simulate(config, dataset=small).summary
    assert (found["true_exclusions"], found["false_exclusions"]) == (2, 0)
    none = simulate(replace(config, malicious=0.0, lr=0.0), dataset=small).summary
    assert none["false_exclusions"] == 0
