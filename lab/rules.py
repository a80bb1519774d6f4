"""The aggregation rules that MAD is compared with. To add one, write a function and add an entry to `RULES`.

A rule is a function `rule(W [n, P], weights [n], f) -> w [P]`. W holds the models of the n active clients and `weights`
their numbers of training images. `f` is the number of malicious clients that the rule should withstand. Not every rule
uses `weights` or `f`. The first line of its docstring is what `--list` prints.

Shapes: n clients, P parameters.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from trust import Array, Mask, Rule, mean, scaled, squared_distances, two_means, unscaled, without_overflow

WEISZFELD_STEPS = 10_000  # ours: the most steps. About 30 are enough, unless one row has almost half of the weight.
CONVERGED = 1e-9  # ours: the steps end when a step is shorter than this fraction of the median distance
SMOOTHING = 1e-6  # of the median distance: a row as near as this counts as so far (Pillutla et al. 2019)
LAST_LAYER = slice(-66, -2)  # the weights of the network's last layer, 2 x 32, in a row of W; its 2 biases follow


def mark(**marks: Any) -> Callable[[Rule], Rule]:
    """Give a rule the marks that `trust.aggregate` reads.

    `least(f)` is the number of clients that the rule needs to withstand f malicious ones. `on_changes` is True for a
    rule that takes and returns changes of the global weights instead of weights.
    """

    def set_marks(rule: Rule) -> Rule:
        vars(rule).update(marks)
        return rule

    return set_marks


def median(W: Array, weights: Array, f: int) -> Array:
    """Coordinate-wise median (Yin et al. 2018)."""
    return without_overflow(lambda W: np.median(W, axis=0), W)


@mark(least=lambda f: 2 * f + 1)
def trimmed_mean(W: Array, weights: Array, f: int) -> Array:
    """Mean without the f extremes at each end (Yin et al. 2018)."""
    return without_overflow(lambda W: W.mean(0), np.sort(W, axis=0)[f : len(W) - f])


@mark(least=lambda f: 2 * f + 3)
def krum(W: Array, weights: Array, f: int) -> Array:
    """Krum: the model with the lowest score (Blanchard et al. 2017)."""
    return W[krum_scores(W, f).argmin()]


@mark(least=lambda f: 2 * f + 3)
def multi_krum(W: Array, weights: Array, f: int) -> Array:
    """Multi-Krum: mean of the n - f best (Blanchard et al. 2017)."""
    return without_overflow(lambda W: W.mean(0), W[krum_scores(W, f).argsort(kind="stable")[: len(W) - f]])


def krum_scores(W: Array, f: int) -> Array:
    """Sum [n] of each row's squared distances to the n - f - 2 rows nearest to it (Blanchard et al. 2017).

    The distances are in the unit of `trust.scaled`.
    """
    squared, _ = squared_distances(W)
    np.fill_diagonal(squared, np.inf)
    return np.sort(squared, axis=1)[:, : len(W) - f - 2].sum(1)


def geometric_median(W: Array, weights: Array, f: int) -> Array:
    """Point with the least sum of distances (Pillutla et al. 2019).

    The sum is weighted. Smoothed Weiszfeld steps find the point. It is a weighted mean of the rows, so the steps are
    taken in the n coefficients of that mean.
    """
    W, unit = scaled(W.astype(np.float64))
    spread = np.sqrt(np.median(squared_distances(W)[0], axis=1))
    places = np.asarray(np.linalg.qr((W - W[spread.argmin()]).T, mode="r")).T  # [n, n], with the rows' distances
    least = SMOOTHING * (np.median(spread) or 1)
    distance = spread  # a start that keeps the first step away from outliers
    share = np.zeros(len(W))
    for _ in range(WEISZFELD_STEPS):
        nearer = weights / np.maximum(distance, least)
        nearer /= nearer.sum()
        moved = np.linalg.norm((nearer - share) @ places)
        share = nearer
        distance = np.linalg.norm(places - share @ places, axis=1)
        if moved <= CONVERGED * np.median(distance):
            break
    return unscaled(share @ W, unit)


@mark(on_changes=True)
def norm_clipping(U: Array, weights: Array, f: int) -> Array:
    """Mean of the changes, long ones clipped (Sun et al. 2019).

    Changes U [n, P] are clipped to their median length. That is ours: the paper uses a constant.
    """
    U, unit = scaled(U)
    lengths = np.linalg.norm(U, axis=1)
    factors = np.minimum(1, np.median(lengths) / np.where(lengths > 0, lengths, 1))
    return unscaled(mean(U * factors[:, None], weights, f), unit)


@mark(on_changes=True)
def lfighter(U: Array, weights: Array, f: int) -> Array:
    """LFighter: clusters the last layers (Jebreel et al. 2023).

    This is the method for two classes. It splits the changes U [n, P] of the last layer into two clusters. It averages
    the cluster for which size times dissimilarity is larger, because attackers are few and resemble one another.
    """
    last, _ = scaled(U[:, LAST_LAYER])
    squared, _ = squared_distances(last)
    if squared.max() == 0:
        return mean(U, weights, f)
    group = two_means(squared)
    lengths = np.linalg.norm(last, axis=1, keepdims=True)
    unit = last / np.where(lengths > 0, lengths, 1)

    def dissimilarity(members: Mask) -> float:
        cosine = unit[members] @ unit[members].T - np.eye(members.sum())
        return members.mean() * (1 - cosine.min(1).mean())

    good = group if dissimilarity(group) > dissimilarity(~group) else ~group
    return mean(U[good], weights[good], f)


RULES: dict[str, Rule] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "norm_clipping": norm_clipping,
    "lfighter": lfighter,
}
