"""The aggregation rules that MAD is compared with. To add one, write a function and add an entry to `RULES`.

A rule is a function `rule(W [n, P], weights [n], f) -> w [P]`. W holds the models of the n active clients and `weights`
their numbers of training images. `f` is the number of malicious clients that the rule should withstand. Not every rule
uses `weights` or `f`. The first line of its docstring is what `--list` prints. If the package byzfl is installed, its
aggregators are rules too; see `ByzFL`.

Shapes: n clients, P parameters.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from math import comb
from threading import Lock
from typing import Any
from zlib import crc32

import numpy as np

from trust import (
    Array,
    Mask,
    Rule,
    mean,
    scaled,
    squared_distances,
    two_means,
    unit_rows,
    unscaled,
    without_overflow,
)

WEISZFELD_STEPS = 10_000  # ours: the most steps. About 30 are enough, unless one row has almost half of the weight.
CONVERGED = 1e-9  # ours: the steps end when a step is shorter than this fraction of the median distance
SMOOTHING = 1e-6  # of the median distance: a row as near as this counts as so far (Pillutla et al. 2019)
FARTHEST = 1e50  # median lengths, to which byzfl's classes are given changes: some of them take fifth powers
BYZFL = {  # parameters of byzfl's classes, ours: its own constants are made for gradients
    "c": 1.0, "tau": 1.0,  # clip to the median length, as `norm_clipping` does
    "L": 3,  # steps of centered clipping; one would be norm_clipping
    "nu": SMOOTHING, "T": 100,  # the geometric median ends where ours does
}  # fmt: skip
SUBSETS, MOST_SETS = {"MDA", "SMEA"}, 100_000  # these try all sets of n - f clients
ENDLESS = {"CAF"}  # of byzfl 0.0.11: the farther a model lies, the more steps it takes, without a bound
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
    unit, _ = unit_rows(last)

    def dissimilarity(members: Mask) -> float:
        cosine = unit[members] @ unit[members].T - np.eye(members.sum())
        return members.mean() * (1 - cosine.min(1).mean())

    good = group if dissimilarity(group) > dissimilarity(~group) else ~group
    return mean(U[good], weights[good], f)


# ---------------------------------------------------------------- the aggregators of byzfl, a package of its own


class ByzFL:
    """An aggregator of byzfl (Gonzalez et al. 2025), `byzfl:NAME`, or `byzfl:PRE>NAME` after a pre-aggregator.

    It works on the changes of the global weights, in units of their median length, and does not use the clients'
    numbers of images. Raises ValueError if the package is not installed or has no such aggregator.
    """

    on_changes = True

    def __init__(self, rule: str) -> None:
        self.__name__ = rule
        *before, last = rule.removeprefix("byzfl:").split(">")
        known = byzfl_classes()
        if last not in known["aggregators"] or len(before) > 1 or not set(before) <= set(known["preaggregators"]):
            names = "; ".join(f"{name}, {about}" for name, about in byzfl_names().items())
            raise ValueError(f"rule {rule} is unknown; known: {names}")
        self.kinds = [*(known["preaggregators"][name] for name in before), known["aggregators"][last]]

    def __call__(self, U: Array, weights: Array, f: int) -> Array:
        U, unit = scaled(U.astype(np.float64))
        length = float(np.median(np.linalg.norm(U, axis=1))) or 1.0
        U = np.clip(U / length, -FARTHEST, FARTHEST)
        with drawing_from(U), np.errstate(all="ignore"):
            for kind in self.kinds:
                if (U[0] == U).all():  # some classes divide by the differences
                    return unscaled(U[0] * length, unit)
                if kind.__name__ in SUBSETS and (sets := comb(len(U), int(f))) > MOST_SETS:
                    raise ValueError(f"{self.__name__} tries all sets of honest clients; here these are {sets}")
                given = BYZFL | {"f": int(f), "s": len(U) // (2 * int(f) + 1)}  # so most buckets hold honest ones alone
                taken = inspect.signature(kind).parameters
                U = kind(**{name: value for name, value in given.items() if name in taken})(U)
        return unscaled(U * length, unit)


def byzfl_names() -> dict[str, str]:
    """What can follow "byzfl:", in words, for `--list`."""
    try:
        aggregators, preaggregators = map(", ".join, byzfl_classes().values())
    except ValueError as error:
        return {"byzfl:NAME": str(error)}
    return {"byzfl:NAME": aggregators, "byzfl:PRE>NAME": f"the same after PRE: {preaggregators}"}


def byzfl_classes() -> dict[str, dict[str, type]]:
    """The classes of byzfl by their names, in `aggregators` and `preaggregators`, without those in `ENDLESS`."""
    if not find_spec("byzfl"):
        raise ValueError("rules of byzfl need this package; install it with: pip install byzfl")

    def classes(kind: str) -> dict[str, type]:
        try:
            module = import_module(f"byzfl.aggregators.{kind}")
        except ImportError as error:  # of one of its own packages
            raise ValueError(f"byzfl can't be imported: {error}") from None
        return {
            name: entry
            for name, entry in vars(module).items()
            if inspect.isclass(entry) and entry.__module__ == module.__name__ and name not in ENDLESS
        }

    return {kind: classes(kind) for kind in ("aggregators", "preaggregators")}


DRAWING = Lock()


@contextmanager
def drawing_from(U: Array) -> Iterator[None]:
    """Inside the block numpy's own generator, which byzfl uses, is seeded from U: the same runs give the same bytes."""
    with DRAWING:
        before = np.random.get_state()
        np.random.seed(crc32(U.tobytes()))
        try:
            yield
        finally:
            np.random.set_state(before)


class Rules(dict[str, Rule]):
    """The rules by name. Names that begin with "byzfl:" are found too, but not listed."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith("byzfl:")

    def __missing__(self, name: str) -> Rule:
        if name in self:
            return ByzFL(name)
        raise KeyError(name)


RULES: dict[str, Rule] = Rules(
    mean=mean,
    median=median,
    trimmed_mean=trimmed_mean,
    krum=krum,
    multi_krum=multi_krum,
    geometric_median=geometric_median,
    norm_clipping=norm_clipping,
    lfighter=lfighter,
)
