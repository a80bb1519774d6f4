"""Membership inference: what a model tells of who was trained on, by a loss threshold (Yeom et al. 2018)."""

import numpy as np
import torch.nn.functional as F
from scipy.stats import bootstrap, ks_2samp
from torch import cat

from model import Clients, lay_out, predict

RESAMPLES = 100  # ours: of the bootstrap; its standard error is then known to some 7 %


class MembershipInference:
    """It is tried on the honest clients' training images, their validation images and the test images."""

    def __init__(self, clients: Clients):
        self.clients = clients
        honest = [share for share in clients.shares if not share.malicious]
        train, validation = (np.concatenate([getattr(s, kind) for s in honest]) for kind in ("train", "validation"))
        own, test = np.concatenate([train, validation]), clients.evaluated.flatten(0, 2)[: len(clients.test_labels)]
        self.images = lay_out(cat([clients.images[own], test]))
        self.labels = cat([clients.labels[own], clients.test_labels])
        self.ends = [len(train), len(own)]  # of the training and of the validation images

    def __call__(self, w: np.ndarray, t: int) -> dict[str, float]:
        """What the global weights w [P], which the clients get in round t, tell of who was trained on.

        The `membership_advantage` between the honest clients' training images and the test images, and between
        these and the same clients' validation images, which are of the very same kind: each with its standard error
        (bootstrap over images, Efron 1979) and what chance alone would give.
        """
        logits = predict(self.clients.send(w), self.images)[: len(self.labels)].double()
        signs = 2 * self.labels - 1  # cross-entropy as a softplus, which stays above 0 however sure the network is
        losses = F.softplus(signs * (logits[:, 0] - logits[:, 1])).cpu().numpy()
        train, validation, test = np.split(losses, self.ends)
        found = {}
        for name, others in (("test", test), ("validation", validation)):
            again = bootstrap(
                (train, others),
                membership_advantage,
                n_resamples=RESAMPLES,
                vectorized=False,
                method="percentile",
                rng=np.random.default_rng([self.clients.seed, t, 3]),
            )
            found[f"{name}_advantage"] = membership_advantage(train, others)
            found[f"{name}_error"] = float(again.standard_error)
            found[f"{name}_chance"] = chance_advantage(len(train), len(others))
        return found


def membership_advantage(members: np.ndarray, others: np.ndarray) -> float:
    """Advantage in [0, 1] of who tells training images from others by their losses, given in [n] and [m]: the greatest
    difference, over all thresholds, between the share of members and of others below it."""
    return float(ks_2samp(members, others, alternative="greater", method="asymp").statistic)


def chance_advantage(members: int, others: int) -> float:
    """The advantage expected of so many images where there is nothing to tell: the mean of Smirnov's limit (1939)."""
    return float(np.sqrt(np.pi / 8 * (1 / members + 1 / others)))
