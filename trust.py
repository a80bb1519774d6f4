"""The server side: equations (1)-(7) of the paper, exclusion, and the rules MAD is compared with.

The order is the paper's: a client's distance from the main cluster gives d, d gives the reputation R
(equations (1)-(4)), d and R give the trust (equations (5)-(7)), and trust below a threshold excludes.

Shapes: C clients, n clients that are scored, P parameters, t round (the first is 1).
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from sys import float_info
from typing import get_args

import numpy as np
from numpy.typing import NDArray

LLOYD_STEPS = 300  # at most, as in scikit-learn
WEISZFELD_STEPS = 10_000  # at most: ours; some 30 suffice, but where one row has nearly half of the weight
CONVERGED = 1e-9  # ours: a step so short, of the median distance
SMOOTHING = 1e-6  # of the distances in Weiszfeld's steps (Pillutla et al. 2019)
LAST_LAYER = slice(-66, -2)  # of a row of weights: the 2 x 32 of the network's last layer, before its 2 biases

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]


def setting(default, text: str, source: str, **limits):
    """A dataclass field with its help, where its default comes from, its limits `low`, `high` or `choices`, and its
    `option` on the command line if that has another name."""
    return field(default=default, metadata={"help": text, "source": source, **limits})


def named(f: Field) -> str:
    """A dataclass field as messages call it."""
    return f"{f.name} (--{f.metadata['option']})" if "option" in f.metadata else f.name


def check_limits(settings) -> None:
    """ValueError for the first field of the dataclass that is of another kind or lies outside its limits."""
    for f in fields(settings):
        value, limits = getattr(settings, f.name), f.metadata
        kinds = get_args(f.type) or (f.type,)
        if not isinstance(value, tuple({int: Integral, float: Real}.get(kind, kind) for kind in kinds)):
            raise ValueError(f"{named(f)} {value!r} must be of type {' or '.join(kind.__name__ for kind in kinds)}")
        if "choices" in limits and value not in limits["choices"]:
            raise ValueError(f"{named(f)} {value!r} is unknown; known: {', '.join(map(str, limits['choices']))}")
        high = limits.get("high", float_info.max)
        if "low" in limits and value is not None and not limits["low"] <= value <= high:
            most = f"at most {high}" if "high" in limits else "finite"
            raise ValueError(f"{named(f)} {value} must be at least {limits['low']} and {most}")


@dataclass(frozen=True)
class Settings:
    """Every point of MAD that the paper fixes or leaves open. The defaults are the preset `paper`.

    Raises ValueError for a value outside its range or choices.
    """

    clusters: int = setting(2, "K of K-means; 1: everybody is the main cluster", "ours", choices=(1, 2))
    silhouette: float = setting(
        0.25, "mean silhouette above which a split is real", "Kaufman and Rousseeuw 1990", low=-1, high=1
    )
    outlying: float = setting(1.25, "spreads beyond which a group is outlying", "ours, measured", low=0)
    scale_floor: float = setting(
        2.5, "without an outlying group d = 0 lies at least so many spreads away; 0: min-max", "ours, measured", low=0
    )
    floored: str = setting(
        "ungrouped", "when the scale floor holds: without an outlying group", "ours", choices=("ungrouped", "always")
    )
    alpha: float = setting(
        0.5, "d from which reputation rises, eq. (2)", "paper", low=0, high=1, option="alpha-reputation"
    )
    beta_reputation: float = setting(0.75, "smoothing of reputation, eq. (4)", "paper", low=0, high=1)
    beta_trust: float = setting(0.85, "smoothing of trust, eq. (6)", "paper", low=0, high=1)
    threshold: float = setting(0.15, "trust below which a client is excluded", "testbed", low=0, high=1)
    equation2: str = setting(
        "printed", "eq. (2) as printed or as in the testbed", "paper", choices=("printed", "testbed")
    )
    order: str = setting("clip-smooth", "order of eqs. (3) and (4)", "paper", choices=("clip-smooth", "smooth-clip"))
    excluded: str = setting(
        "dropped", "the excluded leave, or are still trained and scored", "paper", choices=("dropped", "observed")
    )
    decision: str = setting("same", "exclude by this or by the last round's trust", "ours", choices=("same", "next"))
    first: str = setting(
        "threshold", "first exclusion: all below the threshold, or the lowest", "paper", choices=("threshold", "lowest")
    )
    nobody_left: str = setting(
        "keep", "if nobody would be left: keep the round's clients, or all", "ours", choices=("keep", "everybody")
    )

    def __post_init__(self):
        check_limits(self)


PRESETS = {
    "paper": Settings(),
    "testbed": Settings(  # the authors' public code
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
}


@dataclass(frozen=True)
class State:
    """What the server knows after a round. Arrays are [C], NaN where a client was not scored in that round."""

    round: int
    spread: float  # largest median distance of any round so far; 0 before the first
    distance: Array  # from the main cluster's centre, in units of the weights
    d: Array  # 1 central, 0 far
    reputation: Array  # R, in [0, 1]
    trust: Array  # in [0, 1]
    active: Mask  # who is averaged in this round
    kept: bool = False  # everyone would have been excluded, so nobody was


def initial_state(clients: int) -> State:
    """Before round 1: nobody scored, everybody active."""
    unscored = np.full(clients, np.nan)
    return State(0, 0.0, unscored, unscored, unscored, unscored, np.ones(clients, bool))


# ---------------------------------------------------------------- d: the normalised distance


def squared_distances(W: Array) -> Array:
    """Squared Euclidean distances between the rows of W [n, P], as [n, n], from their Gram matrix.

    The rows are first measured from the one of median norm, so that one submission of 1e30 cannot round
    the differences between the others away.
    """
    W = W.astype(np.float64)
    norms = np.einsum("np,np->n", W, W)
    W -= W[np.argsort(norms, kind="stable")[len(W) // 2]].copy()
    gram = W @ W.T  # [n, n]
    squares = np.diag(gram)
    distances = np.maximum(squares[:, None] + squares - 2 * gram, 0)
    np.fill_diagonal(distances, 0)
    return distances


def centre_distances(squared: Array, members: Mask) -> Array:
    """Distance [n] of every client from the mean of `members` [n], from squared distances [n, n]."""
    to_members = squared[:, members].mean(1) - squared[np.ix_(members, members)].mean() / 2
    return np.sqrt(np.maximum(to_members, 0))


def two_means(squared: Array) -> Mask:
    """K-means with K = 2 on clients given by squared distances [n, n]: which belong to the second cluster.

    Lloyd's steps (1982): every client joins the nearer of the two clusters' centres, until none changes. A centre's
    distances follow from the clients' own, so the P weights are not looked at again; scikit-learn's KMeans finds the
    same clusters in ten times the time. It starts from the farthest pair, so no random number is drawn.
    """
    first, second = np.unravel_index(squared.argmax(), squared.shape)
    group = squared[:, second] < squared[:, first]
    for _ in range(LLOYD_STEPS):
        nearer = centre_distances(squared, group) < centre_distances(squared, ~group)
        if (nearer == group).all():
            break
        group = nearer
    return group


def mean_silhouette(distances: Array, group: Mask) -> float:
    """Mean silhouette width in [-1, 1] of `group` [n] against the rest, from distances [n, n] (Rousseeuw 1987).

    A client's is (b - a) / max(a, b), with a its mean distance from the others of its cluster and b from the other
    cluster; 0 for a client alone in its cluster.
    """
    same = group[:, None] == group  # [n, n]
    size = same.sum(1)
    a = (distances * same).sum(1) / np.maximum(size - 1, 1)
    b = (distances * ~same).sum(1) / (len(group) - size)
    return float(np.where(size > 1, (b - a) / np.maximum(a, b), 0).mean())


def outlying_group(squared: Array, spread: float, settings: Settings) -> Mask:
    """The clients [n] that form a real and far group of their own; none of them where there is no such group.

    It is the smaller cluster of the 2-means split, if the split's mean silhouette is above
    `settings.silhouette` and its nearest member lies beyond `settings.outlying` spreads from the larger
    cluster's centre. Clusters of one size, fewer than three clients or identical models: no group. Ours: the
    paper speaks of "the main cluster" and does not say which it is.
    """
    nobody = np.zeros(len(squared), bool)
    if settings.clusters == 1 or len(squared) < 3 or squared.max() == 0:
        return nobody
    group = two_means(squared)
    if group.sum() * 2 > len(group):
        group = ~group
    if not 0 < group.sum() * 2 < len(group):
        return nobody
    real = mean_silhouette(np.sqrt(squared), group) > settings.silhouette
    far = centre_distances(squared, ~group)[group].min() > settings.outlying * spread
    return group if real and far else nobody


def originals(W: Array) -> Mask:
    """Which rows of W [n, P] are not the very same as an earlier one."""
    first = {(row + 0.0).tobytes(): client for client, row in reversed([*enumerate(W)])}  # -0 + 0 = 0
    return np.isin(np.arange(len(W)), list(first.values()))


def main_cluster(W: Array, squared: Array, spread: float, settings: Settings) -> tuple[Mask, Mask]:
    """Which rows of W [n, P] are counted, and which of these are the main cluster: all but an outlying group.

    For K = 2 a model submitted by several clients counts once: copies are the tightest of clusters, so clients that
    copied an honest one would cost others their places. Ours.
    """
    counted = originals(W) if settings.clusters == 2 else np.ones(len(W), bool)
    main = counted.copy()
    main[counted] = ~outlying_group(squared[np.ix_(counted, counted)], spread, settings)
    return counted, main


def normalised_distance(W: Array, spread: float, settings: Settings) -> tuple[Array, Array, float]:
    """From the scored clients' weights W [n, P]: distance [n], d [n] in [0, 1], and the new spread.

    d = 1 - (distance - lo) / (hi - lo), with lo the least distance and hi the greatest; where no outlying
    group is found (or always: `settings.floored`), hi is at least `settings.scale_floor` spreads, so that nobody is
    called far for being merely the farthest. hi = lo gives d = 1. Ours: the paper says "normalized Euclidean distance".
    """
    squared = squared_distances(W)
    counted, main = main_cluster(W, squared, spread, settings)
    distance = centre_distances(squared, main)
    spread = max(spread, float(np.median(distance[counted])))
    lo, hi = distance.min(), distance.max()
    if (main == counted).all() or settings.floored == "always":
        hi = max(hi, settings.scale_floor * spread)
    d = 1 - (distance - lo) / (hi - lo) if hi > lo else np.ones(len(W))
    return distance, d, spread


# ---------------------------------------------------------------- equations (1)-(7)


def initial_reputation(d: Array) -> Array:
    """Equation (1): R = d."""
    return d


def update_reputation(previous: Array, d: Array, t: int, settings: Settings) -> Array:
    """Equations (2)-(4): reputation R in [0, 1] at round t >= 2 from the round before."""
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
    """Equation (5): distance of (R, d) from (0, 0) less its distance from (1, 1), in [-sqrt 2, sqrt 2]."""
    return np.hypot(reputation, d) - np.hypot(1 - reputation, 1 - d)


def update_trust(previous: Array, indicator: Array, settings: Settings) -> Array:
    """Equations (6) and (7): smoothed, then clipped to [0, 1]. Before the first round trust is 0."""
    beta = settings.beta_trust
    return np.clip(beta * indicator + (1 - beta) * previous, 0, 1)


# ---------------------------------------------------------------- one round of MAD


def mad_step(W: Array, state: State, t: int, mad_start: int | None, settings: Settings) -> State:
    """Score round t's submissions W [C, P] and decide who is averaged: `State.active` of the result.

    Rows of clients that were not asked for a model are not looked at. A client that was asked and submits
    NaN or infinity is excluded at once, MAD started or not, and not scored. From `mad_start` on (None:
    never) the distrusted are excluded. Raises FloatingPointError if nobody submitted finite weights.
    """
    asked = state.active | (settings.excluded == "observed")
    finite = asked & np.isfinite(W).all(1)
    active = state.active & finite
    if not active.any():
        raise FloatingPointError(f"round {t}: every client's weights are NaN or infinite, nobody is left to average")

    distance, d, reputation, trust = (np.full(len(W), np.nan) for _ in range(4))
    distance[finite], d[finite], spread = normalised_distance(W[finite], state.spread, settings)
    known = ~np.isnan(state.reputation)
    reputation[finite] = initial_reputation(d[finite])
    again = finite & known
    reputation[again] = update_reputation(state.reputation[again], d[again], t, settings)
    indicator = trust_indicator(reputation[finite], d[finite])
    trust[finite] = update_trust(np.nan_to_num(state.trust[finite]), indicator, settings)

    judged = state.trust if settings.decision == "next" else trust
    decided = t - 1 if settings.decision == "next" else t
    remaining = active & ~distrusted(judged, active, decided, mad_start, settings)
    kept = not remaining.any()
    if kept:
        remaining = finite if settings.nobody_left == "everybody" else active
    return State(t, spread, distance, d, reputation, trust, remaining, kept)


def distrusted(trust: Array, active: Mask, t: int, mad_start: int | None, settings: Settings) -> Mask:
    """Who [C] is excluded on the trust [C] of round t: below the threshold, once MAD has started."""
    if mad_start is None or t < mad_start:
        return np.zeros(len(trust), bool)
    if t == mad_start and settings.first == "lowest":
        return np.arange(len(trust)) == np.argmin(np.where(active, trust, np.inf))
    return trust < settings.threshold


# ---------------------------------------------------------------- aggregation rules


def mean(W: Array, weights: Array, f: int) -> Array:
    """FedAvg (McMahan et al. 2016): mean by training samples. f is not used."""
    return np.average(W, axis=0, weights=weights)


def median(W: Array, weights: Array, f: int) -> Array:
    """Coordinate-wise median (Yin et al. 2018). Neither weights nor f are used."""
    return np.median(W, axis=0)


def trimmed_mean(W: Array, weights: Array, f: int) -> Array:
    """Mean without the f least and f greatest (Yin et al. 2018). Coordinate-wise; the weights are not used."""
    need("trimmed_mean", len(W), f)
    return np.sort(W, axis=0)[f : len(W) - f].mean(0)


def krum(W: Array, weights: Array, f: int) -> Array:
    """Krum (Blanchard et al. 2017): the row of the least score. Of equal ones the first."""
    need("krum", len(W), f)
    return W[krum_scores(W, f).argmin()]


def multi_krum(W: Array, weights: Array, f: int) -> Array:
    """Multi-Krum (Blanchard et al. 2017): the n - f of least score. Their mean; the weights are not used."""
    need("multi_krum", len(W), f)
    return W[krum_scores(W, f).argsort(kind="stable")[: len(W) - f]].mean(0)


def krum_scores(W: Array, f: int) -> Array:
    """Sum [n] of each row's squared distances from the n - f - 2 rows nearest to it (Blanchard et al. 2017)."""
    squared = squared_distances(W)
    np.fill_diagonal(squared, np.inf)
    return np.sort(squared, axis=1)[:, : len(W) - f - 2].sum(1)


def geometric_median(W: Array, weights: Array, f: int) -> Array:
    """Least sum of distances from the rows (Pillutla et al. 2019). The sum is weighted; by Weiszfeld's steps, smoothed.
    The point is a mean of the rows, so the steps are taken in its n coefficients. f is not used."""
    W = W.astype(np.float64)
    spread = np.sqrt(np.median(squared_distances(W), axis=1))
    places = np.linalg.qr((W - W[spread.argmin()]).T, mode="r").T  # [n, n], as far apart as the rows
    distance = spread  # to begin with, so that the steps need not come back from an outlier
    share = np.zeros(len(W))
    for _ in range(WEISZFELD_STEPS):
        nearer = weights / np.maximum(distance, SMOOTHING)
        nearer /= nearer.sum()
        moved = np.linalg.norm((nearer - share) @ places)
        share = nearer
        distance = np.linalg.norm(places - share @ places, axis=1)
        if moved <= CONVERGED * np.median(distance):
            break
    return share @ W


def norm_clipping(U: Array, weights: Array, f: int) -> Array:
    """Mean of the changes, long ones shortened (Sun et al. 2019). Those of U [n, P], to the median length: ours, as the
    paper takes a constant. f is not used."""
    lengths = np.linalg.norm(U, axis=1)
    factors = np.minimum(1, np.median(lengths) / np.where(lengths > 0, lengths, 1))
    return mean(U * factors[:, None], weights, f)


def lfighter(U: Array, weights: Array, f: int) -> Array:
    """LFighter (Jebreel et al. 2023): clusters the last layers. For two classes: mean of the changes U [n, P] of
    the good one of two clusters, the larger and less alike in itself: attackers resemble one another. f is not used."""
    last = U[:, LAST_LAYER]
    squared = squared_distances(last)
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


def need(rule: str, clients: int, f: int) -> None:
    """ValueError if a rule has too few clients to withstand f malicious ones."""
    least = {"trimmed_mean": 2 * f + 1, "krum": 2 * f + 3, "multi_krum": 2 * f + 3}.get(rule, 1)
    if clients < least:
        raise ValueError(f"{rule} needs {least} clients to withstand {f} malicious ones; there are {clients}")


# name -> rule(W [n, P], weights [n], f) -> w [P]; f is how many of the n clients the rule should withstand.
RULES: dict[str, Callable[[Array, Array, int], Array]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "norm_clipping": norm_clipping,
    "lfighter": lfighter,
}
ON_CHANGES = {"norm_clipping", "lfighter"}  # these are given, and give, changes of the global weights


def aggregate(
    W: Array, weights: Array, active: Mask, rule: str = "mean", f: int = 0, before: Array | None = None
) -> Array:
    """The next global weights w [P]: the active rows of W [C, P] averaged by the named rule, in W's precision.

    `f` of the C clients are thought malicious, `before` [P] are the last global weights. Who is no longer active is
    taken for one of the f. Raises ValueError where the rule needs more clients.
    """
    f = max(0, f - int((~active).sum()))
    if rule in ON_CHANGES:
        return (before + RULES[rule](W[active] - before, weights[active], f)).astype(W.dtype)
    return RULES[rule](W[active], weights[active], f).astype(W.dtype)
