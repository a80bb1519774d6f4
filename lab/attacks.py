"""What malicious clients do. To add an attack, write a function and add an entry to `ATTACKS`.

Shapes: n images, m malicious clients, h honest clients, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data import Labels, flip_labels

if TYPE_CHECKING:  # PyTorch is imported where it is used: the command line reads this file for its names
    from torch import Tensor

NOISE = 0.5  # ours: ten times the standard deviation of an initial weight, 0.04
SCALE = 10.0  # the paper's number of clients: one change, enlarged ten times, outweighs the nine others
DEVIATIONS = 1.5  # Baruch et al.'s own z in their experiments
EPSILON = 5.0  # ours: with 20 % attackers, factors above 4 reverse the mean change
HUG = 1.2  # ours: less than the 1.25 spreads of trust.Settings.outlying
SMALL = 1e-12  # the smallest distance to divide by


@dataclass(frozen=True)
class Attack:
    """What a malicious client does to its labels and to the model that it submits.

    `about` is one sentence for `--list`. `poison(labels [n], fraction, rng) -> labels [n]` changes that fraction of the
    client's labels (None: they stay true). `submit(W [m, P], w [P], rng) -> [m, P]` returns what the m malicious
    clients submit instead of their trained weights W, when they received the global weights w (None: they submit W).
    With `sees_honest`, `submit` has a fourth argument: the honest clients' models [h, P].
    """

    about: str
    poison: Callable[[Labels, float, np.random.Generator], Labels] | None = None
    submit: Callable[..., Tensor] | None = None
    sees_honest: bool = False

    def submissions(self, W: Tensor, w: Tensor, honest: Tensor, rng: np.random.Generator) -> Tensor:
        """What the malicious clients submit [m, P]; see the class. Raises ValueError for anything but that."""
        import torch

        if self.submit is None:
            return W
        w = w.clone()  # the function may work in place
        submitted = self.submit(W, w, rng, honest) if self.sees_honest else self.submit(W, w, rng)
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


def flip_sign(W: Tensor, w: Tensor, rng: np.random.Generator) -> Tensor:
    """The opposite of the trained change (as in Li et al. 2019)."""
    return w - (W - w)


def add_noise(W: Tensor, w: Tensor, rng: np.random.Generator) -> Tensor:
    """The trained weights plus normal noise on every weight."""
    return W + W.new_tensor(rng.normal(0, NOISE, W.shape))


def scale_up(W: Tensor, w: Tensor, rng: np.random.Generator) -> Tensor:
    """The trained change, `SCALE` times as large (Bagdasaryan et al. 2020)."""
    return w + SCALE * (W - w)


def a_little_is_enough(W: Tensor, w: Tensor, rng: np.random.Generator) -> Tensor:
    """ALIE (Baruch et al. 2019): all submit the mean of their honestly trained models minus z standard deviations.

    z is 1.5, as in the paper's experiments. The paper's formula gives 0 for two of ten attackers. A single malicious
    client has no deviation and does no harm.
    """
    return (W.mean(0) - DEVIATIONS * W.std(0, correction=0)).expand_as(W)


def manipulate_inner_product(W: Tensor, w: Tensor, rng: np.random.Generator) -> Tensor:
    """IPM (Xie et al. 2020): all submit the mean change, reversed and enlarged `EPSILON` times.

    The average of all clients then moves against the honest clients. Here the mean is that of the malicious clients'
    own honestly trained models; in the paper it is that of the honest clients.
    """
    return (w - EPSILON * (W.mean(0) - w)).expand_as(W)


def hug(W: Tensor, w: Tensor, rng: np.random.Generator, honest: Tensor) -> Tensor:
    """Ours: each goes from the honest clients' centre towards its trained model, as far out as MAD tolerates.

    It stops at `HUG` times the honest clients' median distance from their centre. MAD calls a group outlying only
    beyond 1.25 spreads.
    """
    if not len(honest):  # all honest clients are excluded: nobody is left to hide among
        return W
    centre = honest.mean(0)
    reach = HUG * (honest - centre).norm(dim=1).median()
    away = W - centre
    return centre + away * (reach / away.norm(dim=1, keepdim=True).clamp(min=SMALL)).clamp(max=1)


ATTACKS: dict[str, Attack] = {
    "label_flip": Attack("trains on flipped labels, both ways: data.flip_labels", flip_labels),
    "one_way_flip": Attack("trains on labels that call pneumonia normal", flip_one_way),
    "scaled": Attack("flips labels, submits ten times its change", flip_labels, scale_up),
    "nan": Attack("submits NaN in every weight", submit=submit_nan),
    "sign_flip": Attack("submits the opposite of its trained change", submit=flip_sign),
    "noise": Attack("adds normal noise to every weight", submit=add_noise),
    "alie": Attack("ALIE: mean minus 1.5 deviations (Baruch et al. 2019)", submit=a_little_is_enough),
    "ipm": Attack("submits the mean change, reversed, times 5 (Xie et al. 2020)", submit=manipulate_inner_product),
    "hug": Attack("flips labels, stays just within what MAD tolerates", flip_labels, hug, sees_honest=True),
}
