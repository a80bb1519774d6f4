"""What malicious clients do. To add an attack, write a function and add an entry to `ATTACKS`.

Shapes: n images, m malicious clients, h honest clients, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data import Labels, flip_labels

if TYPE_CHECKING:  # PyTorch is imported where it is used: the command line reads this file for its names
    from torch import Tensor

SMALL = 1e-12  # the smallest distance to divide by


@dataclass(frozen=True)
class Attack:
    """What a malicious client does to its labels and to the model that it submits.

    `about` is one sentence for `--list`. `poison(labels [n], fraction, rng) -> labels [n]` changes that fraction of the
    client's labels (None: they stay true). `submit(W [m, P], w [P], rng) -> [m, P]` returns what the m malicious
    clients submit instead of their trained weights W, when they received the global weights w (None: they submit W).
    With `sees_honest`, `submit` has a fourth argument: the honest clients' models [h, P]. If none of these is left and
    finite, the malicious clients submit W. If the attack has a `strength`, `submit` gets it as an argument of this
    name, or another one from --strength. With `bursts`, it gets `burst`: whether this is one of the first --burst
    rounds of the attack. With `claims`, malicious clients say that they have `strength` times as many training images
    as they have, in every round.
    """

    about: str
    poison: Callable[[Labels, float, np.random.Generator], Labels] | None = None
    submit: Callable[..., Tensor] | None = None
    sees_honest: bool = False
    strength: float | None = None
    bursts: bool = False
    claims: bool = False

    def claimed(self, sizes: Any, malicious: NDArray[np.bool_], strength: float | None = None) -> Any:
        """The numbers of training images [C] that the server is told, from the true ones: at least 1, at most 1e9."""
        if not self.claims:
            return sizes
        told = np.clip(np.round(self.strength_or_own(strength) * sizes), 1, 1e9)
        return np.where(malicious, told, sizes).astype(sizes.dtype)

    def strength_or_own(self, strength: float | None) -> float | None:
        """The given strength, or the attack's own if it is None."""
        return self.strength if strength is None else strength

    def submissions(
        self, W: Tensor, w: Tensor, honest: Tensor, rng: np.random.Generator, strength: float | None = None,
        burst: bool = False,
    ) -> Tensor:  # fmt: skip
        """What the malicious clients submit [m, P]; see the class. Raises ValueError for anything but that.

        `strength` None is the attack's own.
        """
        import torch

        if self.submit is None:
            return W
        seen = [honest[honest.isfinite().all(1)]] if self.sees_honest else []
        if seen and not len(seen[0]):  # nobody is left to hide among
            return W
        w = w.clone()  # the function may work in place
        options: dict = {} if self.strength is None else {"strength": self.strength_or_own(strength)}
        options |= {"burst": burst} if self.bursts else {}
        submitted = self.submit(W, w, rng, *seen, **options)
        if not isinstance(submitted, torch.Tensor) or submitted.shape != W.shape:
            raise ValueError(f"the attack's submit must return a tensor of shape {list(W.shape)}")
        return submitted.detach().to(W)


def flip_one_way(labels: Labels, fraction: float, rng: np.random.Generator) -> Labels:
    """A copy of the labels in which a random `fraction` (0 to 1) of the pneumonia images is called normal."""
    flipped, ill = labels.copy(), np.flatnonzero(labels == 1)
    flipped[rng.choice(ill, round(fraction * len(ill)), replace=False)] = 0
    return flipped


def submit_nan(W: Tensor, w: Tensor, rng: np.random.Generator) -> Tensor:
    """NaN in every weight."""
    return W.new_full(W.shape, float("nan"))


def flip_sign(W: Tensor, w: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """The trained change, reversed and `strength` times as large (as in Li et al. 2019)."""
    return w - strength * (W - w)


def add_noise(W: Tensor, w: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """The trained weights plus normal noise on every weight, with the standard deviation `strength`."""
    return W + W.new_tensor(rng.normal(0, strength, W.shape))


def blind(W: Tensor, w: Tensor, rng: np.random.Generator, strength: float, burst: bool) -> Tensor:
    """Ours: noise in the first rounds of the attack, so that later models do not look far; then the trained weights."""
    return add_noise(W, w, rng, strength) if burst else W


def scale_up(W: Tensor, w: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """The trained change, `strength` times as large (Bagdasaryan et al. 2020)."""
    return w + strength * (W - w)


def a_little_is_enough(W: Tensor, w: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """ALIE (Baruch et al. 2019): all submit the mean of their honestly trained models minus z standard deviations.

    `strength` is z. The paper's formula for z gives 0 for two of ten attackers. A single malicious client has no
    deviation and does no harm.
    """
    return (W.mean(0) - strength * W.std(0, correction=0)).expand_as(W)


def manipulate_inner_product(W: Tensor, w: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """IPM (Xie et al. 2020): all submit the mean change, reversed and enlarged `strength` times, the paper's epsilon.

    With a large epsilon, the average of all clients moves against the honest clients. Here the mean is that of the
    malicious clients' own honestly trained models; in the paper it is that of the honest clients.
    """
    return (w - strength * (W.mean(0) - w)).expand_as(W)


def distances(models: Tensor) -> Tensor:
    """Euclidean distances [h, h] between models [h, P]."""
    import torch

    return torch.cdist(models, models, compute_mode="donot_use_mm_for_euclid_dist")


def min_max(W: Tensor, w: Tensor, rng: np.random.Generator, honest: Tensor) -> Tensor:
    """Min-Max (Shejwalkar and Houmansadr 2021): all submit the honest clients' mean minus gamma standard deviations.

    gamma is the largest for which no honest model lies farther from the submission than any two of them lie apart.
    """
    honest = honest.double()  # squares of large weights are too large for a float32
    mean, step = honest.mean(0), honest.std(0, correction=0)
    away, farthest = honest - mean, distances(honest).max() ** 2
    slack = (farthest - away.square().sum(1)).clamp(min=0)  # [h]
    along, length = away @ step, (step @ step).clamp(min=SMALL**2)
    gamma = (((along.square() + length * slack).sqrt() - along) / length).min()
    return (mean - gamma * step).expand_as(W)


def min_sum(W: Tensor, w: Tensor, rng: np.random.Generator, honest: Tensor) -> Tensor:
    """Min-Sum (Shejwalkar and Houmansadr 2021): as `min_max`, with another bound for gamma.

    The sum of the squared distances of the submission from the honest models is at most the largest such sum of an
    honest model.
    """
    honest = honest.double()
    mean, step = honest.mean(0), honest.std(0, correction=0)
    most = distances(honest).square().sum(1).max()
    slack = (most - (honest - mean).square().sum()).clamp(min=0)
    gamma = (slack / (len(honest) * step @ step).clamp(min=SMALL**2)).sqrt()
    return (mean - gamma * step).expand_as(W)


def hug(W: Tensor, w: Tensor, rng: np.random.Generator, honest: Tensor, strength: float) -> Tensor:
    """Ours: each goes from the honest clients' centre towards its trained model, as far out as MAD tolerates.

    It stops at `strength` times the honest clients' median distance from their centre. MAD calls a group outlying only
    beyond 1.25 spreads.
    """
    centre = honest.mean(0)
    reach = strength * (honest - centre).norm(dim=1).median()
    away = W - centre
    return centre + away * (reach / away.norm(dim=1, keepdim=True).clamp(min=SMALL)).clamp(max=1)


def sidestep(W: Tensor, w: Tensor, rng: np.random.Generator, honest: Tensor, strength: float) -> Tensor:
    """Ours, against the preset directions: the trained change without its part against the honest directions.

    Its mean cosine with the honest changes is 0, or above. A change longer than `strength` times the honest median
    length is cut to this length.
    """
    U, changes = W - w, honest - w
    lengths = changes.norm(dim=1, keepdim=True)
    mean = (changes / lengths.clamp(min=SMALL)).mean(0)
    against = (U @ mean).clamp(max=0) / (mean @ mean).clamp(min=SMALL**2)
    U = U - against[:, None] * mean
    most = strength * lengths.median()
    return w + U * (most / U.norm(dim=1, keepdim=True).clamp(min=SMALL)).clamp(max=1)


def copy_nearly(W: Tensor, w: Tensor, rng: np.random.Generator, honest: Tensor, strength: float) -> Tensor:
    """Ours: all submit the first honest model plus a little noise, so that they and this client are a tight group."""
    return add_noise(honest[:1].expand_as(W), w, rng, strength)


def chain(W: Tensor, w: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Ours: client k enlarges its trained change strength^k times, so that the farthest one hides the others."""
    return w + strength ** W.new_tensor(range(len(W)))[:, None] * (W - w)


ATTACKS: dict[str, Attack] = {
    "label_flip": Attack("trains on flipped labels, both ways: data.flip_labels", flip_labels),
    "one_way_flip": Attack("trains on labels that call pneumonia normal", flip_one_way),
    # 10 is the paper's number of clients: one change, enlarged ten times, outweighs the nine others
    "scaled": Attack("flips labels, submits ten times its change", flip_labels, scale_up, strength=10.0),
    "nan": Attack("submits NaN in every weight", submit=submit_nan),
    "sign_flip": Attack("submits the opposite of its trained change", submit=flip_sign, strength=1.0),
    # Ours: ten times the standard deviation of an initial weight, 0.04
    "noise": Attack("adds normal noise to every weight", submit=add_noise, strength=0.5),
    "blind": Attack("flips labels, first submits a burst of noise", flip_labels, blind, strength=0.1, bursts=True),
    # Baruch et al.'s own z in their experiments
    "alie": Attack("ALIE: mean minus 1.5 deviations (Baruch et al. 2019)", submit=a_little_is_enough, strength=1.5),
    # Ours: with 20 % attackers, factors above 4 reverse the mean change
    "ipm": Attack(
        "submits the mean change, reversed, times 5 (Xie et al. 2020)", submit=manipulate_inner_product, strength=5.0
    ),
    "min_max": Attack("as far as honest models lie apart (Shejwalkar et al. 2021)", None, min_max, True),
    "min_sum": Attack("the same, by sums of distances (Shejwalkar et al. 2021)", None, min_sum, True),
    # Ours: less than the 1.25 spreads of trust.Settings.outlying
    "hug": Attack("flips labels, stays just within what MAD tolerates", flip_labels, hug, True, strength=1.2),
    "sidestep": Attack("flips labels, does not step backwards", flip_labels, sidestep, True, strength=1.0),
    # Ours: ten times the paper's shares
    "liar": Attack("flips labels, claims ten times its images", flip_labels, claims=True, strength=10.0),
    # Ours: as `blind`, by clients that are honest apart from that
    "stumble": Attack("is honest, but submits noise in its first rounds", None, blind, strength=0.1, bursts=True),
    # Ours: too small to matter in a model of weights near 0.04
    "near_copies": Attack("copies an honest model, nearly", submit=copy_nearly, sees_honest=True, strength=1e-4),
    # Ours: so that each client is out of sight of the next
    "chain": Attack("flips labels, each enlarges its change more", flip_labels, chain, strength=1000.0),
}
