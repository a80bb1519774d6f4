"""The server: equations (1)-(7) of the paper, exclusion, and FedAvg.

The order is the paper's. A client's distance from the main cluster gives d. d gives the reputation R by equations
(1)-(4). d and R give the trust by equations (5)-(7). A client whose trust is below a threshold is excluded.

Shapes: C clients, n scored clients, P parameters, t round (the first is 1).
"""

import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import frexp
from numbers import Integral, Real
from os import PathLike, fspath
from sys import float_info
from threading import Lock
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

LLOYD_STEPS = 300  # the most steps, as in scikit-learn
FEW = 11  # ours: of so many clients, K-means tries all splits, 1023
PAIRS = 3.1e6  # ours, measured: pairs of clients times the square of their number; with 50 clients these are all pairs
LARGEST = 1e145  # ours: of a scaled weight. The squares of a million such weights have a finite sum.
ALIKE = 16  # ours: rows whose first weights differ are not compared any further
MANY = 256  # ours: with so many rows, products take half of the time in single precision
COLUMNS = 2048  # ours, measured: of the rows whose products are summed at once
DROWNED = 1e-2  # ours: in single precision a squared distance is right to about 1e-6 of those from the middle row
MEMORY = 0.9  # ours: the share of its agreement that a client keeps from round to round
LITTLE = 0.2  # ours, measured: a median agreement below this counts as this
SMALLER = 2.0**-64  # ours: a sum of weights that overflows is taken of weights so much smaller

OPEN: list[Any] = []  # what limits the threads of products, once for each open block of `one_thread`
COUNTING = Lock()  # the limit belongs to the whole process, so the first block sets it and the last one removes it

Array = NDArray[np.floating]
TAKEN: dict[Any, Any] = {int: Integral, float: Real, str: (str, PathLike)}  # what a setting's type includes
Mask = NDArray[np.bool_]
Rule = Callable[[Array, Array, int], Array]  # rule(W [n, P], weights [n], f) -> w [P]; see lab/rules.py


def setting(default: Any, text: str, source: str, **limits: Any) -> Any:
    """A dataclass field with its help text, the source of its default, and its `limits`: `low`, `high` or `choices`."""
    return field(default=default, metadata={"help": text, "source": source, **limits})


def own_type(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """The value as one of the `kinds`: numbers of numpy become Python's own, and paths become strings.

    So equal settings are written alike. Raises ValueError for a value of another type.
    """
    if getattr(value, "ndim", None) == 0:  # a number of numpy or torch, or an array of one
        value = value.item()
    kind = next((kind for kind in kinds if isinstance(value, TAKEN.get(kind, kind))), None)
    if kind is None or isinstance(value, bool):
        shown = " ".join(reprlib.repr(value).split())
        raise ValueError(f"{name} {shown} must be of type {' or '.join(kind.__name__ for kind in kinds)}")
    try:
        return fspath(value) if kind is str else kind(value) if kind in TAKEN else value
    except OverflowError:
        raise ValueError(f"{name} {value} must be finite") from None


def check_limits(settings: Any) -> None:
    """Give the fields of the dataclass their own types. Raise ValueError for a value outside its type or limits."""
    for f in fields(settings):
        name, limits = f.name, f.metadata
        value = own_type(name, getattr(settings, name), get_args(f.type) or (f.type,))
        object.__setattr__(settings, name, value)
        if "choices" in limits and value not in limits["choices"]:
            raise ValueError(f"{name} {value!r} is unknown; known: {', '.join(map(str, limits['choices']))}")
        high = limits.get("high", float_info.max)
        if "low" in limits and value is not None and not limits["low"] <= value <= high:
            most = f"at most {high}" if "high" in limits else "finite"
            raise ValueError(f"{name} {value} must be at least {limits['low']} and {most}")


@dataclass(frozen=True)
class Settings:
    """All settings of MAD: what the paper fixes and what it leaves open. The defaults are the preset `paper`.

    Raises ValueError for a value outside its range or choices.
    """

    clusters: int = setting(2, "K of K-means; with 1, all clients are the main cluster", "ours", choices=(1, 2))
    silhouette: float = setting(
        0.25, "a split is real above this mean silhouette", "Kaufman and Rousseeuw 1990", low=-1, high=1
    )
    outlying: float = setting(1.25, "a group is outlying beyond this many spreads", "ours, measured", low=0)
    scale_floor: float = setting(
        2.5, "without a group, d = 0 lies at least this many spreads away; 0: min-max", "ours, measured", low=0
    )
    spread: str = setting(
        "pairs",
        "the usual distance is that of pairs of clients, or that from the main cluster's centre",
        "ours, measured",
        choices=("pairs", "centre"),
    )
    floored: str = setting(
        "ungrouped",
        "the scale floor holds without an outlying group, or always",
        "ours",
        choices=("ungrouped", "always"),
    )
    alpha: float = setting(0.5, "reputation rises from this d on, eq. (2)", "paper", low=0, high=1)
    beta_reputation: float = setting(0.75, "smoothing of reputation, eq. (4)", "paper", low=0, high=1)
    beta_trust: float = setting(0.85, "smoothing of trust, eq. (6)", "paper", low=0, high=1)
    threshold: float = setting(0.15, "trust below which a client is excluded", "testbed", low=0, high=1)
    equation2: str = setting("printed", "eq. (2) as printed, or the testbed's", "paper", choices=("printed", "testbed"))
    order: str = setting("clip-smooth", "order of eqs. (3) and (4)", "paper", choices=("clip-smooth", "smooth-clip"))
    excluded: str = setting(
        "dropped", "excluded clients leave, or still train and are scored", "paper", choices=("dropped", "observed")
    )
    decision: str = setting(
        "same", "exclude in the round in which trust falls too low, or in the next", "ours", choices=("same", "next")
    )
    first: str = setting(
        "threshold",
        "first exclusion: all below the threshold, or the lowest one",
        "paper",
        choices=("threshold", "lowest"),
    )
    nobody_left: str = setting(
        "keep",
        "if no client would be left: keep the active ones, or average all",
        "ours",
        choices=("keep", "everybody"),
    )
    judged: str = setting("trust", "what is compared with the threshold", "paper", choices=("trust", "reputation", "d"))
    measured: str = setting(
        "positions",
        "what is compared: the models, or the directions of their changes",
        "paper",
        choices=("positions", "directions"),
    )

    def __post_init__(self):
        check_limits(self)


PRESETS = {
    "paper": Settings(),
    "testbed": Settings(  # the authors' public code; docs/reference.md says which one
        clusters=1,
        scale_floor=0.0,
        beta_trust=0.75,
        equation2="testbed",
        order="smooth-clip",
        excluded="observed",
        decision="next",
        first="lowest",
        nobody_left="everybody",
    ),
    "directions": Settings(measured="directions"),  # ours, for clients that differ in size
}


@dataclass(frozen=True)
class State:
    """What the server knows after a round. Arrays are [C], with NaN for clients that were not scored in that round."""

    round: int  # the last scored round; 0 before the first
    spread: float  # largest usual distance (or mean usual length of a step) of the rounds so far; 0 before the first
    distance: Array  # from the main cluster's centre, in units of the weights (see `scaled`); or 1 - agreement
    d: Array  # 1 central, 0 far
    reputation: Array  # R, in [0, 1]
    trust: Array  # in [0, 1]
    active: Mask  # the clients that are averaged in this round
    kept: bool = False  # True if every client fell below the threshold, in which case all were kept


def initial_state(clients: int) -> State:
    """The state before round 1: no client has been scored and all are active."""
    unscored = np.full(clients, np.nan)
    return State(0, 0.0, unscored, unscored, unscored, unscored, np.ones(clients, bool))


# ---------------------------------------------------------------- d: the normalised distance


def scaled(W: Array, kind: type[np.floating] | None = None) -> tuple[Array, float]:
    """W [n, P] in a unit in which no square of a weight overflows or vanishes, and this unit.

    Squares are computed in the precision `kind` (None: that of W).

    The unit is 1 for usual weights. They are returned as they are, in single or double precision. Otherwise the unit is
    a power of two, so nothing is rounded. It is near the largest weight of the median row, and weights above `LARGEST`
    units are cut off: a hostile row can't take the precision of the others.
    """
    W = W if W.dtype == np.float32 else np.asarray(W, np.float64)
    sizes, limits = np.maximum(W.max(1), -W.min(1)).astype(np.float64), np.finfo(kind or W.dtype)  # [n]
    if ((sizes == 0) | ((sizes > limits.tiny**0.4) & (sizes < limits.max**0.4))).all():
        return W, 1.0
    sizes = np.sort(sizes)
    _, exponent = frexp(sizes[len(sizes) // 2] or sizes[-1])
    unit = max(2.0 ** (exponent - 1), float_info.min)
    return np.clip(W.astype(np.float64), -LARGEST * unit, LARGEST * unit) / unit, unit


def unit_rows(U: Array) -> tuple[Array, Array]:
    """The rows of U [n, P] divided by their lengths, and these lengths [n]. A row of 0 stays 0."""
    lengths = np.linalg.norm(U, axis=1)
    return U / np.where(lengths > 0, lengths, 1)[:, None], lengths


def unscaled(values: Any, unit: float) -> Any:
    """Values in units of the weights again, at most the largest float64."""
    most = float_info.max / unit
    return np.clip(values, -most, most) * unit


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block numpy's products use one thread: with several, the last digits depend on their number."""
    with COUNTING:
        OPEN.append(OPEN[0] if OPEN else products().limit(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with COUNTING:
            limit = OPEN.pop()
            if not OPEN:
                limit.restore_original_limits()


@cache
def products() -> ThreadpoolController:
    """What controls the threads of numpy's and scipy's products. Finding it takes some milliseconds."""
    import scipy.linalg  # noqa: F401  (only what is loaded is found)

    return ThreadpoolController()


def squared_distances(W: Array) -> tuple[Array, float]:
    """Squared Euclidean distances [n, n] between the rows of W [n, P], and the unit of the distances; see `scaled`.

    They are computed from the rows' Gram matrix. The row of median norm is subtracted from all rows first. Otherwise
    one submission of 1e30 would round away the differences between the others. With more than `MANY` rows, products of
    `COLUMNS` columns are taken in the precision of W, unless most rows are so far from that row that rounding could
    reach their distances. The sum of the products is always in double precision.
    """
    W, unit = scaled(W, None if len(W) > MANY else np.float64)
    kind: Any = W.dtype if len(W) > MANY else np.float64
    norms = np.einsum("np,np->n", W, W, dtype=kind)
    middle = np.argsort(norms, kind="stable")[len(W) // 2]
    distances = distances_around(W, middle, kind)
    if kind == np.float32 and np.median(distances) < DROWNED * np.median(distances[middle]):
        distances = distances_around(W, middle, np.float64)
    return distances, unit


def distances_around(W: Array, middle: np.intp, kind: Any) -> Array:
    """Squared distances [n, n] of the rows of W [n, P] from products in the precision `kind`, around row `middle`."""
    gram = np.zeros((len(W), len(W)))
    with one_thread():
        for first in range(0, W.shape[1], COLUMNS):
            part = W[:, first : first + COLUMNS].astype(kind)
            part -= part[middle].copy()
            gram += part @ part.T
    squares = np.diag(gram)
    distances = np.maximum(squares[:, None] + squares - 2 * gram, 0)
    np.fill_diagonal(distances, 0)
    return distances


def centre_distances(squared: Array, members: Mask) -> Array:
    """Distance [n] of every client from the mean of the clients in `members` [n], from squared distances [n, n]."""
    to_members = squared[:, members].mean(1) - squared[np.ix_(members, members)].mean() / 2
    return np.sqrt(np.maximum(to_members, 0))


def two_means(squared: Array) -> Mask:
    """K-means with K = 2 on squared distances [n, n]: the clients [n] in the cluster without the first client.

    Lloyd's steps (1982) are taken from each of the `first_splits`: each client joins the cluster whose centre is
    nearer, until no client changes. Of the splits at which they end, the one with the least sum of squared distances
    from the centres is taken. For up to `FEW` clients it is the best of all splits. For up to 50 it is as good as that
    of scikit-learn's KMeans or better, whose starts are pairs of clients, too. No random number is drawn, and the order
    of the clients does not matter. The distances from a centre follow from those between clients.
    """
    groups = first_splits(squared)
    with one_thread():
        for _ in range(LLOYD_STEPS):
            own, others = (cluster_distances(squared, members) for members in (groups, ~groups))
            within = np.where(groups, own, others).sum(1)  # [S]
            nearer = own < others
            if (nearer == groups).all():
                break
            groups = nearer
    best = groups[within.argmin()]
    return best != best[0]


def first_splits(squared: Array) -> Mask:
    """The splits [S, n] from which K-means starts: all, or one for each pair of clients, by the nearer of the two.

    With more than `FEW` clients these are pairs. With many, only pairs of clients that lie far apart are taken, so that
    the steps take a small part of a round.
    """
    n = len(squared)
    if n <= FEW:
        return (np.arange(1, 2 ** (n - 1))[:, None] >> np.arange(n) & 1).astype(bool)
    far = list(np.unravel_index(squared.argmax(), squared.shape))
    while len(far) < n and len(far) * (len(far) + 1) / 2 * n**2 <= PAIRS:  # the next one is the farthest from all these
        far.append(squared[far].min(0).argmax())
    first, second = np.triu_indices(len(far), 1)
    return squared[far][second] < squared[far][first]


def cluster_distances(squared: Array, members: Mask) -> Array:
    """Squared distances [S, n] of all clients from the centre of each cluster `members` [S, n]; see `two_means`."""
    sizes = members.sum(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # an empty cluster is far from everybody
        to_members = members @ squared / sizes
        return np.nan_to_num(to_members - (to_members * members).sum(1, keepdims=True) / sizes / 2, nan=np.inf)


def outlying_group(squared: Array, spread: float, settings: Settings) -> Mask:
    """The clients [n] that form an outlying group: one that is real and far. All False if there is no such group.

    The group is the smaller cluster of the 2-means split. It is real if the mean silhouette of the split (Rousseeuw
    1987) is above `settings.silhouette`. It is far if its nearest member lies beyond `settings.outlying` spreads from
    the centre of the larger cluster. There is no group with fewer than three clients, with clusters of equal size, or
    if all models are identical. Ours: the paper speaks of "the main cluster" and does not say which one it is.
    """
    from sklearn.metrics import silhouette_score

    nobody = np.zeros(len(squared), bool)
    if settings.clusters == 1 or squared.max() == 0:
        return nobody
    group = two_means(squared)
    if group.sum() * 2 > len(group):
        group = ~group
    if not 0 < group.sum() * 2 < len(group):
        return nobody
    real = silhouette_score(np.sqrt(squared), group, metric="precomputed") > settings.silhouette
    far = centre_distances(squared, ~group)[group].min() > settings.outlying * spread
    return group if real and far else nobody


def originals(W: Array) -> Mask:
    """The rows of W [n, P] that are not equal to an earlier row, as a mask [n]."""
    _, group, sizes = np.unique(W[:, :ALIKE], axis=0, return_inverse=True, return_counts=True)
    alike = np.flatnonzero(sizes[group.ravel()] > 1)  # these may be equal; the sign of a zero does not matter
    first = {(W[client] + 0.0).tobytes(): client for client in reversed(alike)}
    return ~np.isin(np.arange(len(W)), np.setdiff1d(alike, list(first.values())))


def main_cluster(W: Array, squared: Array, spread: float, settings: Settings) -> tuple[Mask, Mask]:
    """The rows of W [n, P] that count, and those of them that form the main cluster, as two masks [n].

    The main cluster is every counted row outside the outlying group. With K = 2, a model that several clients submit
    counts once. Copies form the tightest of all clusters, so without this rule the copies of one honest model would
    make other honest clients look outlying. Ours.
    """
    counted = originals(W) if settings.clusters == 2 else np.ones(len(W), bool)
    main = counted.copy()
    main[counted] = ~outlying_group(squared[np.ix_(counted, counted)], spread, settings)
    return counted, main


def usual_distance(squared: Array) -> float:
    """How far clients usually are from their centre, from squared distances [n, n] of all pairs.

    It is the median client's median distance to the others (S_n of Rousseeuw and Croux 1993), over sqrt 2: models that
    lie r from a centre, each in a direction of its own, are sqrt 2 r apart. A minority can't raise it above what the
    honest clients' own distances give, wherever its models lie, because most clients have most of their distances to
    honest ones (both medians are the lower ones). The median distance from the main cluster's centre has no such bound:
    two far models that are also far from each other are no cluster, so one of them stays in the main one and moves its
    centre.
    """
    n = len(squared)
    to_others = np.partition(squared, n // 2, axis=1)[:, n // 2]  # a client's own 0 comes first
    return float(np.sqrt(np.partition(to_others, (n - 1) // 2)[(n - 1) // 2] / 2))


def normalised_distance(W: Array, spread: float, settings: Settings) -> tuple[Array, Array, float]:
    """Distance [n], d [n] in [0, 1] and the new spread, from the weights W [n, P] of the scored clients.

    d = 1 - (distance - lo) / (hi - lo), where lo is the smallest distance and hi the largest. Without an outlying group
    (or always, see `settings.floored`), hi is at least `settings.scale_floor` spreads: if all clients lie close
    together, none of them counts as far. hi = lo gives d = 1. Ours: the paper says "normalized Euclidean distance".
    """
    squared, unit = squared_distances(W)
    usual = float(unscaled(spread, 1 / unit))
    counted, main = main_cluster(W, squared, usual, settings)
    distance = centre_distances(squared, main)
    by_pairs = settings.spread == "pairs"
    middle = usual_distance(squared[np.ix_(counted, counted)]) if by_pairs else float(np.median(distance[counted]))
    lo, hi = distance.min(), distance.max()
    if (main == counted).all() or settings.floored == "always":
        hi = max(hi, settings.scale_floor * max(usual, middle))
    d = 1 - (distance - lo) / (hi - lo) if hi > lo else np.ones(len(W))
    return unscaled(distance, unit), d, max(spread, float(unscaled(middle, unit)))


# ---------------------------------------------------------------- d: directions instead of positions, ours


def direction_distance(
    U: Array, steps: Array, before: Array, spread: float, t: int, settings: Settings
) -> tuple[Array, Array, float]:
    """Distance [n] in [0, 2], d [n] in [0, 1] and the new spread, from the changes U [n, P] in so many `steps` [n].

    A client with much data moves far, so its model looks like an outlier. The direction of its change does not.

    The distance is 1 minus the client's `agreement` with the others. A single direction is noisy, so nine tenths of it
    come from the distance `before` [n], in the last round (NaN: the client has none). d is 1 if the agreement is 0 or
    more. It is 0 if the client is as much against the others as the median client is with them, as with flipped labels.
    A change that is too long lowers d, too: to 0 if it is `settings.scale_floor` usual lengths too long. The usual
    length grows with the square root of the steps, as that of a random walk: who claims a hundred times as many images
    may move ten times as far. For one step it is the median, or the spread if this is larger: the mean of the medians
    up to round t. Late in training, most clients of a round can have nothing left to learn, and those that have are not
    too long. Ours.
    """
    U, unit = scaled(U)
    units, lengths = unit_rows(U)
    found = agreement(units, steps)
    found = np.where(np.isnan(before), found, MEMORY * (1 - before) + (1 - MEMORY) * found)
    against = np.clip(-found / max(float(np.median(found)), LITTLE), 0, 1)
    paces = lengths / np.sqrt(steps)
    median = float(unscaled(np.median(paces), unit))
    spread += (median - spread) / t
    excess = np.clip(unscaled(paces, unit) / (max(median, spread) or np.inf) - 1, 0, settings.scale_floor)
    return 1 - found, (1 - against) * (1 - excess / (settings.scale_floor or 1)), spread


def agreement(units: Array, steps: Array) -> Array:
    """How much each client [n] agrees with the others: the weighted mean of its cosines with them, in [-1, 1].

    `units` [n, P] are the changes over their lengths, or 0. The direction of a change is the surer, the more `steps`
    [n] it takes, so the weights are their square roots. None counts for more than the median: nothing is won by a claim
    to have more images. A client that is alone agrees with itself.
    """
    weights = np.sqrt(np.minimum(steps, np.median(steps)))
    with one_thread():
        sums = units @ (weights @ units) - weights * np.einsum("np,np->n", units, units)
    others = weights.sum() - weights
    return sums / others if len(units) > 1 else np.ones(1)


# ---------------------------------------------------------------- equations (1)-(7)


def initial_reputation(d: Array) -> Array:
    """Equation (1): reputation R [n] is d [n] in [0, 1]."""
    return d


def update_reputation(previous: Array, d: Array, t: int, settings: Settings) -> Array:
    """Equations (2)-(4): reputation R [n] in [0, 1] at round t >= 2, from the reputation of the round before."""
    fading = previous / t
    rise, fall = previous + d + fading, previous + d - np.exp(-(1 - d) * fading)
    if settings.equation2 == "testbed":
        rise, fall = previous + d - fading, previous + d - np.exp(-(1 - d * fading))
    R = np.where(d >= settings.alpha, rise, fall)  # (2)
    beta = settings.beta_reputation
    if settings.order == "smooth-clip":
        return np.clip(beta * R + (1 - beta) * previous, 0, 1)
    R = np.clip(R, 0, 1)  # (3)
    return beta * R + (1 - beta) * previous  # (4)


def trust_indicator(reputation: Array, d: Array) -> Array:
    """Equation (5) [n]: the distance of (R, d) from (0, 0) minus its distance from (1, 1), in [-sqrt 2, sqrt 2]."""
    return np.hypot(reputation, d) - np.hypot(1 - reputation, 1 - d)


def update_trust(previous: Array, indicator: Array, settings: Settings) -> Array:
    """Equations (6) and (7): trust [n], smoothed and then clipped to [0, 1]. It is 0 before the first round."""
    beta = settings.beta_trust
    return np.clip(beta * indicator + (1 - beta) * previous, 0, 1)


# ---------------------------------------------------------------- one round of MAD


def mad_step(
    W: Array,
    state: State,
    t: int,
    mad_start: int | None,
    settings: Settings,
    w: Array | None = None,
    steps: Array | None = None,
) -> State:
    """Score the submissions W [C, P] of round t and decide which clients are averaged: `State.active` of the result.

    Rows of clients that were not asked for a model are ignored. A client that submits NaN or infinity is excluded at
    once, even before MAD starts, and is not scored. From round `mad_start` on (None: never), clients with too little
    trust are excluded. Directions are those of the changes from the global weights w [P], which took the clients so
    many `steps` [C]. Raises FloatingPointError if no client submitted finite weights, and ValueError for directions
    without w or `steps`.
    """
    asked = state.active | (settings.excluded == "observed")
    finite = asked & np.isfinite(W).all(1)
    active = state.active & finite
    if not active.any():
        raise FloatingPointError(f"round {t}: every client's weights are NaN or infinite, nobody is left to average")

    distance, d, reputation, trust = (np.full(len(W), np.nan) for _ in range(4))
    scored = W if finite.all() else W[finite]  # a copy of many rows takes its time
    if settings.measured == "positions":
        distance[finite], d[finite], spread = normalised_distance(scored, state.spread, settings)
    elif w is None or steps is None:
        raise ValueError("directions need the last global weights w and the clients' steps")
    else:
        U, before = scored - w.astype(np.float64), state.distance[finite]
        distance[finite], d[finite], spread = direction_distance(U, steps[finite], before, state.spread, t, settings)
    known = ~np.isnan(state.reputation)
    reputation[finite] = initial_reputation(d[finite])
    again = finite & known
    reputation[again] = update_reputation(state.reputation[again], d[again], t, settings)
    indicator = trust_indicator(reputation[finite], d[finite])
    trust[finite] = update_trust(np.nan_to_num(state.trust[finite]), indicator, settings)

    new = State(t, spread, distance, d, reputation, trust, active)
    decisive, decided = (state, t - 1) if settings.decision == "next" else (new, t)
    remaining = active & ~distrusted(getattr(decisive, settings.judged), active, decided, mad_start, settings)
    kept = not remaining.any()
    if kept:
        remaining = finite if settings.nobody_left == "everybody" else active
    return replace(new, active=remaining, kept=kept)


def distrusted(score: Array, active: Mask, t: int, mad_start: int | None, settings: Settings) -> Mask:
    """The clients [C] to exclude by their score [C] in round t: those below the threshold, once MAD has started.

    The score is the trust, or what `settings.judged` says.
    """
    if mad_start is None or t < mad_start:
        return np.zeros(len(score), bool)
    if t == mad_start and settings.first == "lowest":
        return np.arange(len(score)) == np.argmin(np.where(active, score, np.inf))
    return score < settings.threshold


# ---------------------------------------------------------------- FedAvg


def mean(W: Array, weights: Array, f: int) -> Array:
    """FedAvg, weighted by training images (McMahan et al. 2016).

    W [n, P] are the models and `weights` [n] the numbers of training images. f is not used.
    """
    return without_overflow(lambda W: np.einsum("n,np->p", weights, W) / weights.sum(), W)


def without_overflow(average: Callable[[Array], Array], W: Array) -> Array:
    """An average [P] of the rows of W [n, P], also where the rows' sum is too large for a number."""
    with np.errstate(over="ignore", invalid="ignore"):
        w = average(W)
        lost = ~np.isfinite(w)
        if lost.any():
            most = np.finfo(w.dtype).max  # rounding can lift an average of such numbers above it
            w[lost] = np.clip(average(W[:, lost].astype(np.float64) * SMALLER) / SMALLER, -most, most)
    return w


def check_clients(rule: Rule, clients: int, f: int) -> None:
    """Raise ValueError if a rule has fewer clients than its mark `least(f)` asks for, to withstand f malicious ones."""
    least = getattr(rule, "least", lambda f: 1)(f)
    if clients < least:
        raise ValueError(f"{title(rule)} needs {least} clients to withstand {f} malicious ones; there are {clients}")


def title(rule: Rule) -> str:
    """The name of a rule in messages."""
    return getattr(rule, "__name__", "the rule")


def combined(rule: Rule, W: Array, weights: Array, f: int) -> Array:
    """What a rule makes of W [n, P]. Raises ValueError unless these are P numbers."""
    with one_thread():
        shape, w = W.shape[1:], np.asarray(rule(W, weights, f))
    if w.shape != shape or w.dtype.kind not in "fiu" or np.isnan(w).any():
        found = "NaN" if w.shape == shape else f"shape {list(w.shape)}"
        raise ValueError(f"{title(rule)} must return {shape[0]} numbers; it returned {found}")
    return w


def aggregate(
    W: Array, weights: Array, active: Mask, rule: Rule = mean, f: int = 0, before: Array | None = None
) -> Array:
    """The next global weights w [P]: the `rule` applied to the active rows of W [C, P], in W's precision if it has one.

    `weights` [C] are the numbers of training images. `f` is the number of malicious clients among the C. Every excluded
    client counts as one of them, so the rule must withstand that many fewer. A rule with the mark `on_changes` works on
    the changes of the last global weights `before` [P]. Raises ValueError if the rule needs more clients or `before`,
    or returns anything but P numbers.
    """
    f = max(0, f - int((~active).sum()))
    check_clients(rule, int(active.sum()), f)
    kind = W.dtype if W.dtype.kind == "f" else np.dtype(np.float64)
    most = np.finfo(kind).max
    if not getattr(rule, "on_changes", False):
        return np.clip(combined(rule, W[active], weights[active], f), -most, most).astype(kind)
    if before is None:
        raise ValueError(f"{title(rule)} works on changes: it needs the last global weights `before`")
    with np.errstate(over="ignore"):
        near = np.isfinite(W[active] - before).all()
        part = 1.0 if near else 0.25  # a change from -3e38 to 3e38 is too large for a float32
        w = (before * part + combined(rule, W[active] * part - before * part, weights[active], f)) / part
    return np.clip(w, -most, most).astype(kind)
