"""Tests of lab/rules.py: every aggregation rule, with numbers worked out by hand."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lab import rules
from lab.rules import RULES
from trust import aggregate


def column(*values: float) -> np.ndarray:
    """One weight per client: W [C, 1]."""
    return np.array(values, float)[:, None]


ROWS = np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0], [9.0, 9.0]])  # three are close together, one is far away
ONES = np.ones(4)


def test_the_median_by_hand():
    assert rules.median(ROWS, ONES, 1).tolist() == [1.5, 1.5]
    assert rules.median(ROWS[:3], ONES[:3], 1).tolist() == [1, 1]
    assert rules.median(column(1, 1, 1, 9), ONES, 0).tolist() == [1]  # ties and f = 0


def test_the_trimmed_mean_by_hand():
    # f = 1: each column loses its smallest and its largest value. The rest gives (1 + 2) / 2.
    assert rules.trimmed_mean(ROWS, ONES, 1).tolist() == [1.5, 1.5]
    assert rules.trimmed_mean(ROWS, ONES, 0).tolist() == [3, 3]  # f = 0: the plain mean
    assert aggregate(ROWS, ONES, ONES > 0, RULES["trimmed_mean"]).tolist() == [3, 3]  # f = 0 is the default
    assert rules.trimmed_mean(column(1, 9, 1, 9), ONES, 1).tolist() == [5]  # ties: one 1 and one 9 are removed
    assert aggregate(ROWS[:3], ONES[:3], ONES[:3] > 0, rules.trimmed_mean, 1).tolist() == [1, 1]  # three are enough
    with pytest.raises(ValueError, match="trimmed_mean needs 5 clients to withstand 2 malicious ones; there are 4"):
        aggregate(ROWS, ONES, ONES > 0, rules.trimmed_mean, 2)


def test_krum_by_hand():
    # n = 4, f = 0: the 2 nearest count. Squared distances: 01 5, 02 5, 12 2, 03 162, 13 113, 23 113.
    assert rules.krum_scores(ROWS, 0).tolist() == pytest.approx([10, 7, 7, 226])
    assert rules.krum(ROWS, ONES, 0).tolist() == [1, 2]  # it ties with the third row; the first one wins
    # n = 5, f = 1: again the 2 nearest count. The doubled outlier has its copy at distance 0, then 113.
    five = np.vstack([ROWS, ROWS[3]])
    assert rules.krum_scores(five, 1).tolist() == pytest.approx([10, 7, 7, 113, 113])
    assert rules.multi_krum(five, np.ones(5), 1).tolist() == [3, 3]  # the mean of the first four
    assert rules.multi_krum(ROWS, ONES, 0).tolist() == [3, 3]  # f = 0: all clients
    for rule in (rules.krum, rules.multi_krum):
        with pytest.raises(ValueError, match="krum needs 5 clients to withstand 1 malicious ones; there are 4"):
            aggregate(ROWS, ONES, ONES > 0, rule, 1)
        assert aggregate(five, np.ones(5), np.ones(5) > 0, rule, 1).shape == (2,)  # five are enough


def test_the_geometric_median_by_hand():
    # On a line, it is the weighted median. For the corners of a square, it is the middle. A majority of equal rows
    # decides alone.
    line = column(0, 1, 10)
    assert rules.geometric_median(line, np.ones(3), 0) == pytest.approx([1], abs=1e-4)
    assert rules.geometric_median(line, np.array([1.0, 1, 5]), 0) == pytest.approx([10], abs=1e-4)
    for nearly_half in (1.95, 1.99):  # the steps are slow if one row has nearly half of the weight
        assert rules.geometric_median(line, np.array([1, 1, nearly_half]), 0) == pytest.approx([1], abs=1e-3)
        assert rules.geometric_median(line, np.array([1, 1, 4 - nearly_half]), 0) == pytest.approx([10], abs=1e-3)
    square = np.array([[0.0, 0], [0, 2], [2, 0], [2, 2]])
    assert rules.geometric_median(square, ONES, 0) == pytest.approx([1, 1])
    assert rules.geometric_median(np.vstack([ROWS[:1]] * 3 + [ROWS[3:]]), ONES, 0) == pytest.approx([0, 0], abs=1e-4)


@given(st.integers(0, 10**6), st.integers(3, 9))
@settings(max_examples=30, deadline=None)
def test_nothing_near_the_geometric_median_is_nearer_to_all(seed, clients):
    rng = np.random.default_rng(seed)
    W, weights = rng.normal(size=(clients, 5)), rng.uniform(0.5, 2, clients)
    best = rules.geometric_median(W, weights, 0)

    def total(point):
        return weights @ np.linalg.norm(W - point, axis=1)

    for step in rng.normal(size=(20, 5)):
        assert total(best + 0.05 * step) > total(best) - 1e-6


@pytest.mark.parametrize("far", [1e6, 1e12, 1e20, 1e30])
def test_how_far_the_outliers_lie_is_nothing_to_the_geometric_median(far):
    """Only the direction of outliers counts. Two of ten lie at the two ends of an axis, and their pulls cancel."""
    W = np.random.default_rng(0).normal(size=(10, 3))
    W[:2] = [[far, far, far], [-far, -far, -far]]
    best = rules.geometric_median(W, np.ones(10), 0)
    assert best == pytest.approx(rules.geometric_median(W[2:], np.ones(8), 0), abs=1e-5)


def test_norm_clipping_by_hand():
    # The lengths are 1, 2, 3, 100. Their median is 2.5, so the last two are clipped to the length 2.5.
    U = np.diag([1.0, 2.0, 3.0, 100.0])
    assert rules.norm_clipping(U, ONES, 1) == pytest.approx([0.25, 0.5, 0.625, 0.625])
    assert rules.norm_clipping(U, np.array([1.0, 1, 1, 0]), 1) == pytest.approx([1 / 3, 2 / 3, 2.5 / 3, 0])
    assert rules.norm_clipping(U / 100, ONES, 1) == pytest.approx([0.0025, 0.005, 0.00625, 0.00625])  # in any unit
    assert rules.norm_clipping(np.zeros((3, 2)), np.ones(3), 0).tolist() == [0, 0]  # no client has moved
    U = np.diag([1, 2, 3, 1e30]).astype(np.float32)  # the square of 1e30 is no float32
    assert rules.norm_clipping(U, ONES, 1) == pytest.approx([0.25, 0.5, 0.625, 0.625])


def last_layers(*rows: tuple[float, float]) -> np.ndarray:
    """Changes [n, 70]. They differ in two weights of the last layer. The first weight is the client's number."""
    U = np.zeros((len(rows), 70))
    U[:, 0] = np.arange(len(rows))
    U[:, 4:6] = rows  # LAST_LAYER begins at 70 - 66
    return U


def test_lfighter_by_hand():
    # Two clients are alike (cosine 1). Their dissimilarity is 2/5 (1 - 0) = 0.4. The other three point in different
    # directions. Their least cosines are -1, -1 and -0.6, so their dissimilarity is 3/5 (1 - (-1 - 1 - 0.6) / 3).
    U = last_layers((9, 9), (9, 9.01), (1, 0), (-1, 0), (-0.6, -0.8))
    assert rules.lfighter(U, np.ones(5), 2)[0] == pytest.approx((2 + 3 + 4) / 3)
    assert rules.lfighter(U, np.array([1.0, 1, 1, 1, 2]), 2)[0] == pytest.approx((2 + 3 + 2 * 4) / 4)
    assert rules.lfighter(last_layers((1, 1), (1, 1), (1, 1)), np.ones(3), 1)[0] == 1  # no difference: all clients
    assert rules.lfighter(last_layers((1, 0)), np.ones(1), 0)[0] == 0  # one client
    four = last_layers((9, 9), (9, 9.01), (1, 0), (-1, 0))  # 2/4 (1 - 0) against 2/4 (1 - (-1))
    assert rules.lfighter(four, ONES, 2)[0] == pytest.approx(2.5) == rules.lfighter(four, ONES, 0)[0]
    # Three clients are alike: 3/5 (1 - 0). Two have a cosine of 0.6, 2/5 (1 - 0), or of -0.4, 2/5 (1 + 0.4) = 0.56.
    for cosine, sine in ((0.6, 0.8), (-0.4, 0.84**0.5)):
        U = last_layers((9, 9), (9, 9.01), (9.01, 9), (1, 0), (cosine, sine))
        assert rules.lfighter(U, np.ones(5), 2)[0] == pytest.approx((0 + 1 + 2) / 3)
    U = last_layers((9, 9), (9, 9.01), (9.01, 9), (0.1, 0), (0.06, 0.08))  # a cosine of 0.6, in short changes
    assert rules.lfighter(U, np.ones(5), 2)[0] == pytest.approx((0 + 1 + 2) / 3)
    U = last_layers((0, 0), (1, 0), (9, 9), (9, 9.01), (9.01, 9), (9, 9))  # the first client has no change
    assert rules.lfighter(U, np.ones(6), 2)[0] == pytest.approx((2 + 3 + 4 + 5) / 4)
    U = last_layers((9, 9), (9, 9.01), (9.01, 9), (9, 9), (0, 0), (1, 0))  # a client without a change
    assert rules.lfighter(U, np.ones(6), 2)[0] == pytest.approx((0 + 1 + 2 + 3) / 4)
    U = last_layers((9, 9), (9, 9.01), (9.01, 9), (0.1, 0), (-0.09, 0.0436))  # a cosine of -0.9: 2/5 (1 + 0.9) = 0.76
    assert rules.lfighter(U, np.ones(5), 2)[0] == pytest.approx((3 + 4) / 2)
    tie = last_layers((9, 0), (9, 0), (1, 0), (1, 0))  # both clusters have equal rows: the first client's wins
    assert rules.lfighter(tie, ONES, 2)[0] == pytest.approx(0.5)


def test_the_last_layer_is_the_networks():
    from model import PARAMETERS, SHAPES

    *_, weight, bias = SHAPES
    assert (weight, bias) == ("output.weight", "output.bias")
    row = np.arange(PARAMETERS)[rules.LAST_LAYER]
    assert len(row) == SHAPES[weight].numel() and row[-1] == PARAMETERS - 1 - SHAPES[bias].numel()


@pytest.mark.parametrize("rule", [rules.norm_clipping, rules.lfighter])
def test_a_rule_of_changes_asks_for_the_last_weights(rule):
    with pytest.raises(ValueError, match=f"{rule.__name__} works on changes: it needs the last global weights"):
        aggregate(np.ones((3, 70)), np.ones(3), np.ones(3, bool), rule)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_fedavg_of_equal_models_and_moves_with_them(rule):
    """The average of equal models is the same model. Shifted models and global weights give the shifted average.

    The average has the precision of W. The order of the clients does not matter.
    """
    rng = np.random.default_rng(0)
    everybody, before = np.ones(7, bool), rng.normal(size=80).astype(np.float32)
    same = np.tile(before + 1, (7, 1))
    assert aggregate(same, np.ones(7), everybody, RULES[rule], 2, before) == pytest.approx(before + 1, abs=1e-6)
    W = rng.normal(size=(7, 80)).astype(np.float32)
    w = aggregate(W, np.ones(7), everybody, RULES[rule], 2, before)
    moved = aggregate(W + 3, np.ones(7), everybody, RULES[rule], 2, before + 3)
    assert w.dtype == np.float32 and moved == pytest.approx(w + 3, abs=1e-5)
    order = rng.permutation(7)
    assert aggregate(W[order], np.ones(7), everybody, RULES[rule], 2, before) == pytest.approx(w, abs=1e-5)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_clipping"])
def test_a_robust_rule_withstands_what_ruins_the_mean(rule):
    rng = np.random.default_rng(0)
    W = rng.normal(size=(10, 80))
    W[:2] = 1e6
    everybody = np.ones(10, bool)
    assert np.abs(aggregate(W, np.ones(10), everybody, RULES[rule], 2, np.zeros(80))).max() < 10
    assert np.abs(aggregate(W, np.ones(10), everybody, RULES["mean"], 2)).max() > 1e5


def test_who_is_excluded_is_no_longer_withstood():
    """Krum needs 5 clients for f = 1, and there are five. If one of them is excluded, f = 0 and 4 are enough."""
    W = np.vstack([ROWS, [[50.0, 50.0]]])
    active = np.array([True] * 4 + [False])
    assert aggregate(W, np.ones(5), active, RULES["krum"], 1).tolist() == [1, 2]
    with pytest.raises(ValueError, match="needs 5 clients to withstand 1"):
        aggregate(W[:4], np.ones(4), active[:4], RULES["krum"], 1)


# ---------------------------------------------------------------- numbers of any size


def quietly(W: np.ndarray, rule: str, before: np.ndarray) -> np.ndarray:
    """The aggregate of the rows with f = 2. A warning, such as that of an overflow, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return aggregate(W, np.arange(1, len(W) + 1), np.ones(len(W), bool), RULES[rule], 2, before)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_clipping"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_robust_rule_withstands_numbers_of_any_size(rule, kind):
    rng = np.random.default_rng(0)
    W, most = rng.normal(size=(10, 80)).astype(kind), float(np.finfo(kind).max)
    for value in (most**0.5, most**0.6, most / 2, most):
        for signs in ((1, 1), (-1, -1), (1, -1)):
            W[[2, 5]] = value * np.array(signs)[:, None]
            assert np.abs(quietly(W, rule, np.zeros(80, kind))).max() < 10, (value, signs)
            assert np.abs(quietly(W, "mean", np.zeros(80, kind))).max() > min(most**0.4, 10) or signs == (1, -1)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-10, 1e-20])
def test_the_geometric_median_withstands_outliers_among_small_weights(size):
    """Two of ten rows lie 300 units away: the mean is 60 units off."""
    W = np.random.default_rng(0).normal(size=(10, 50)) * size
    W[:2] += 300 * size
    assert np.abs(RULES["geometric_median"](W, np.ones(10), 2)).max() < 2 * size
    assert np.abs(RULES["mean"](W, np.ones(10), 2)).max() > 50 * size


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e100, 1e160, 1e300, 2.0**1015])
def test_the_aggregate_of_a_whole_federation_moves_with_its_size(rule, size):
    rng = np.random.default_rng(0)
    W, before = rng.normal(size=(10, 80)), rng.normal(size=80)
    W[[2, 5]] *= 30
    expected = quietly(W, rule, before)
    scaled = quietly(W * size, rule, before * size) / size
    assert scaled == pytest.approx(expected, rel=1e-6, abs=1e-5 if rule == "geometric_median" else 1e-9)


@given(st.sampled_from(list(RULES)), st.sampled_from([16, 32, 64]), st.data())
@settings(deadline=None)
def test_the_aggregate_of_any_finite_numbers_is_finite(rule, width, draw):
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=width)
    rows = draw.draw(hnp.arrays(f"f{width // 8}", (8, 3), elements=numbers))
    W = np.tile(rows, 23)  # 69 weights: LFighter looks at the last 66
    w = quietly(W[1:], rule, W[0])
    assert np.isfinite(w).all() and w.dtype == W.dtype
