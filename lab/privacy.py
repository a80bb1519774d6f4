"""What models and updates reveal of training images.

Membership inference tells training images from others by a loss threshold (Yeom et al. 2018). Gradient inversion
reconstructs images from an update (Zhu et al. 2019).

Shapes: P parameters, n images, m other images.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import bootstrap, hypergeom, ks_2samp
from torch import Tensor, cat
from torch.func import functional_call, grad, grad_and_value, vmap

from model import Clients, Network, convolve_pool, in_threads, own_modes, parts_of, predict, train_clients

RESAMPLES = 100  # ours: bootstrap samples; the standard error is then known to about 7 %
MOST = 20  # ours: images that are reconstructed at once
STEPS = 300  # ours: with more steps, the experiment takes longer, and the images are no better
RESTARTS = 16  # ours: for a single image; several restarts take hardly longer than one, and find its best image
LEARNING_RATE = 0.1  # Geiping et al. 2020
SMOOTH = {False: 1e-3, True: 0.1}  # ours, measured: the weight of the total variation, without and with Adam
SIGN = 0.1  # ours, measured: gradients of this many mean sizes count half as much as large ones
GREY = 5e-3  # ours, measured: standard deviation of the first images; better images come of nearly grey ones
SMALL = 1e-30  # a length to divide by
LEAST = 1 / 255  # half a grey level: an image that is as near as this to another is a copy
RARE = 0.01  # an image is identified if its rank is lower


class MembershipInference:
    """Membership inference on the honest clients' training images, compared with validation and test images.

    Raises ValueError if there are fewer than two images of a kind.
    """

    @own_modes()
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

    @own_modes()
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


# ---------------------------------------------------------------- gradient inversion


def kinds_seen(text: str) -> list[tuple[int, int] | None]:
    """What an attacker sees, from a text such as "gradient:4,2x20,update", as local steps and images per step.

    "gradient:4" (0 steps) is the gradient of four images. "2x20" is a client's change after two local steps with 20
    images each. "update" (None) is what the client submits, after all of its local training. Raises ValueError if the
    text has another part, none, or one twice.
    """
    kinds: list[tuple[int, int] | None] = []
    for part in text.split(","):
        found = re.fullmatch(r"(update)|gradient:([1-9]\d{0,4})|([1-9]\d{0,4})x([1-9]\d{0,4})", part)
        if not found:
            known = "gradient:N for the gradient of N images, KxN for K local steps of N images, and update"
            raise ValueError(f"inverted {part!r} is unknown; known: {known}, for N and K from 1 to 99999")
        update, of_gradient, steps, images = found.groups()
        kinds.append(None if update else (0, int(of_gradient)) if of_gradient else (int(steps), int(images)))
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"inverted {text} names something twice")
    return kinds


class GradientInversion:
    """Gradient inversion from what the first honest client sends.

    The attacker knows the global weights, the labels of the images, and one of the kinds of `seen`; see `kinds_seen`.
    Raises ValueError if the client has too few training images.
    """

    def __init__(self, clients: Clients, seen: str):
        self.clients, self.kinds = clients, kinds_seen(seen)
        self.number = next(number for number, share in enumerate(clients.shares) if not share.malicious)
        self.own = clients.shares[self.number].train
        self.others = np.setdiff1d(np.concatenate([[*s.train, *s.validation] for s in clients.shares]), self.own)
        needed = max(max(1, kind[0]) * kind[1] if kind else len(self.own) for kind in self.kinds)
        if needed > len(self.own):
            raise ValueError(f"inverted {seen} needs {needed} images; client {self.number} has {len(self.own)}")

    @own_modes()
    def __call__(
        self, w: np.ndarray, t: int, tell: Callable[[int, int], object] = lambda steps, images: None
    ) -> list[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
        """What the client reveals in round t, in which it received the global weights w [P]; see `measure`."""
        measure = partial(self.measure, self.clients.send(w), t, tell)
        return in_threads(measure, range(len(self.kinds)), self.clients.threads)

    def measure(
        self, w: Tensor, t: int, tell: Callable[[int, int], object], number: int
    ) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """One row of leakage.csv, for the kind of this number, and the true images [n, 28, 28] and those found.

        The row has the `label`, which is 1 if that of a single image was found, the mean of the `ranks` of the images
        found, and the share of them whose rank is below 1 %. It has the `likeness` of the images found, and of two
        guesses in their place: the mean of all other images, and the nearest of them. Before the search, which takes
        seconds, `tell` gets the local steps and the images per step.
        """
        seen, own, steps, images = self.sent(w, t, self.kinds[number])
        tell(steps, images)
        rng = np.random.default_rng([self.clients.seed, t, number, 4])
        labels = self.clients.labels[own[:MOST]]
        found = np.zeros((len(labels), 28, 28), np.float32)  # grey: all that is left if there is nothing to invert
        if seen.isfinite().all() and seen.any():
            restarts = max(2, RESTARTS // len(labels))
            found = invert_gradient(seen, w, labels, rng, adam=steps > 0, restarts=restarts)[:, 0].cpu().numpy()
        (true, true_labels), (others, other_labels) = map(self.pictures, (own, self.others))
        share = ranks(found, true_labels[:MOST], true, true_labels, others, other_labels)
        label = float(label_of(seen) == labels[0]) if len(own) == 1 else float("nan")
        row = {"steps": steps, "images": images, "label": label, "rank": share.mean()}
        row["identified"] = (share < RARE).mean()
        pair = true[matched(found, true)]
        nearest = others[distances(true, others).argmin(1)]
        mean = np.broadcast_to(others.mean(0), true.shape)
        for name, guess, target in (("", found, pair), ("mean_", mean, true), ("nearest_", nearest, true)):
            row |= {name + measure: value for measure, value in likeness(guess, target).items()}
        return row, pair, found

    def pictures(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images [n, 28, 28] of these numbers, and their labels [n]."""
        return self.clients.images[numbers, 0].cpu().numpy(), self.clients.labels[numbers].cpu().numpy()

    def sent(self, w: Tensor, t: int, kind: tuple[int, int] | None) -> tuple[Tensor, np.ndarray, int, int]:
        """What the attacker sees [P], of which images, after how many local steps, and the images per step."""
        c, own, training = self.clients, self.own, self.clients.training
        if kind:
            steps, images = kind
            own, training = own[: max(1, steps) * images], training | {"epochs": 1, "batch_size": images}
            if steps == 0:
                return gradient(plain_network(), w, c.images[own], c.labels[own]), own, steps, images
        rng = np.random.default_rng([c.seed, t, self.number, 1])  # that of its local training
        W, _ = train_clients(w, c.images, c.labels, [own], [rng], **training)
        images = training["batch_size"]
        return w - W[0], own, training["epochs"] * -(-len(own) // images), images


def plain_network() -> Network:
    """A network without weights of its own. Each thread needs one, as a call puts the weights into it for a while."""
    with torch.device("meta"):
        return Network(convolve_pool)


def gradient(network: Network, w: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient [P] of the mean cross-entropy at weights w [P], for images [n, 1, 28, 28], without dropout.

    `network` is a `plain_network`.
    """

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, parts_of(w), (images,)), labels)

    return grad(loss)(w)


def label_of(gradient: Tensor) -> int:
    """The label of the single image that this gradient [P] comes from (iDLG, Zhao et al. 2020).

    The gradient of the output layer's biases is the predicted probabilities, minus 1 for the label. So only the label's
    entry is below 0. It has the same sign in w - W after a first step of Adam.
    """
    return int(parts_of(gradient)["output.bias"].argmin())


def invert_gradient(
    seen: Tensor,
    w: Tensor,
    labels: Tensor,
    rng: np.random.Generator,
    *,
    adam: bool = False,
    restarts: int = RESTARTS,
) -> Tensor:
    """Images [n, 1, 28, 28] in [-1, 1] whose gradient at weights w [P] has the direction of `seen` [P].

    This is the attack of Geiping et al. (2020): Adam minimises 1 minus the cosine of both, plus `SMOOTH` times the
    total variation of the images. `labels` [n] are those of the images. With `adam`, `seen` is w - W after the client's
    own steps of Adam. The first of these is the learning rate times the sign of the gradient, so the gradient's entries
    are compared by their signs, softly: the cosine needs a slope. All `restarts` go on at once, from images that are
    nearly grey. The one that ends lowest is taken. Raises ValueError without labels, or if `seen` is 0 or not finite.
    """
    if not len(labels) or not (seen.isfinite().all() and seen.any()):
        raise ValueError(f"gradient inversion needs a finite gradient other than 0, and labels; here {len(labels)}")
    direction, network = seen / seen.norm(), plain_network()

    def objective(images: Tensor) -> Tensor:
        found = gradient(network, w, images, labels)
        found = found / (found.abs() + SIGN * found.abs().mean()) if adam else found
        variation = images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
        return 1 - found @ direction / found.norm().clamp(min=SMALL) + SMOOTH[adam] * variation

    slopes = vmap(grad_and_value(objective))
    images = w.new_tensor(rng.normal(0, GREY, (restarts, len(labels), 1, 28, 28)))
    optimiser = torch.optim.Adam([images], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        images.grad, _ = slopes(images)
        optimiser.step()
        images.clamp_(-1, 1)
        schedule.step()
    return images[slopes(images)[1].argmin()]


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Euclidean distances [n, m] between images [n, 28, 28] and [m, 28, 28]."""
    return cdist(one.reshape(len(one), -1), other.reshape(len(other), -1))


def matched(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """For each image found [n, 28, 28] the number of another true image, out of [m, 28, 28], so that they are nearest.

    "Nearest" means the least sum of squared distances (Kuhn 1955). There are at least as many true images.
    """
    return linear_sum_assignment(distances(found, true) ** 2)[1]


def ranks(
    found: np.ndarray,
    labels: np.ndarray,
    true: np.ndarray,
    true_labels: np.ndarray,
    others: np.ndarray,
    other_labels: np.ndarray,
) -> np.ndarray:
    """For each image found [n, 28, 28], how often chance comes as near to it as the true images do.

    As many images as there are true ones are drawn at random, from the true and the other images. The rank is the
    probability that one of them is nearer than the nearest true image, plus half of the probability that it is that one
    or as near (a mid-p value, Lancaster 1961). An image that tells nothing gets 0.5 on average. For a single true image
    it is about the share of the others that are nearer. Only images of the same label count, because the attacker knows
    the label.
    """
    share = np.empty(len(found))
    for label in np.unique(labels):
        of = labels == label
        to_true = distances(found[of], true[true_labels == label])
        to_others = distances(found[of], others[other_labels == label])
        nearer, drawn = (to_others < to_true.min(1, keepdims=True)).sum(1), to_true.shape[1]
        share[of] = sum(hypergeom.sf(0, drawn + to_others.shape[1], nearer + own, drawn) for own in (0, 1)) / 2
    return share


def likeness(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """The mean PSNR (dB) and SSIM (-1 to 1, Wang et al. 2004) of images found [n, 28, 28], for pixels in [-1, 1].

    A copy gets the PSNR of an error of half a grey level, 54 dB: some images are in PneumoniaMNIST twice.
    """
    from skimage.metrics import structural_similarity

    errors = ((found - true) ** 2).mean((1, 2)).clip(LEAST**2)
    similar = [structural_similarity(*pair, data_range=2) for pair in zip(found, true)]
    return {"psnr": float((10 * np.log10(4 / errors)).mean()), "ssim": float(np.mean(similar))}
