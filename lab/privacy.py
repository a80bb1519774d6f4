"""Membership inference: what a model reveals of its training images, by a loss threshold (Yeom et al. 2018)."""

import numpy as np
import torch.nn.functional as F
from scipy.stats import bootstrap, ks_2samp
from torch import cat

from model import Clients, predict

RESAMPLES = 100  # ours: bootstrap samples; the standard error is then known to about 7 %


class MembershipInference:
    """Membership inference on the honest clients' training images, compared with validation and test images.

    Raises ValueError if there are fewer than two images of a kind.
    """

    def __init__(self, clients: Clients):
        self.clients = clients
        honest = [share for share in clients.shares if not share.malicious]
        train, validation = (np.concatenate([getattr(s, kind) for s in honest]) for kind in ("train", "validation"))
        for kind, count in (("validation", len(validation)), ("test", len(clients.test_labels))):
            if count < 2:
                raise ValueError(f"membership can't be measured with {count} {kind} image; it needs two or more")
        own, test = np.concatenate([train, validation]), clients.evaluated[: len(clients.test_labels)]
        self.images = cat([clients.images[own], test])
        self.labels = cat([clients.labels[own], clients.test_labels])
        self.ends = [len(train), len(own)]  # where the training images end, and the validation images

    def __call__(self, w: np.ndarray, t: int) -> dict[str, float]:
        """What the global weights w [P], which the clients receive in round t, reveal of the training images.

        Returns the `membership_advantage` between the honest clients' training images and the test images, and between
        the training images and the same clients' validation images, which come from the same collection. Each has its
        standard error (bootstrap over images, Efron 1979) and the advantage that chance alone gives.
        """
        logits = predict(self.clients.send(w), self.images, self.clients.threads).double()
        signs = 2 * self.labels - 1  # cross-entropy as a softplus, which stays above 0 for every logit
        losses = F.softplus(signs * (logits[:, 0] - logits[:, 1])).cpu().numpy()
        train, validation, test = np.split(losses, self.ends)
        found: dict[str, float] = {}
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
    """The advantage in [0, 1] of an attack that calls an image a training image if its loss is below a threshold.

    It is the share of the losses `members` [n] below the threshold, minus that of `others` [m], at the best threshold.
    """
    return float(ks_2samp(members, others, alternative="greater", method="asymp").statistic)


def chance_advantage(n: int, m: int) -> float:
    """The expected advantage for n members and m others that do not differ: the mean of Smirnov's limit (1939)."""
    return float(np.sqrt(np.pi / 8 * (1 / n + 1 / m)))
