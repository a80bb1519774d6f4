"""How the training images are dealt to the clients. To add one, write a function and add an entry to `PARTITIONS`.

A partition is a function `partition(labels [n], clients, concentration, rng)`. It returns one array of image numbers
per client. The arrays are disjoint and hold all images. The first line of its docstring is what `--list` prints.
"""

from collections.abc import Callable

import numpy as np

from data import Labels, Numbers, partition_iid

EQUAL = 1e300  # ours: a larger concentration changes nothing, and the sum of its draws may overflow
Partition = Callable[[Labels, int, float, np.random.Generator], list[Numbers]]


def iid(labels: Labels, clients: int, concentration: float, rng: np.random.Generator) -> list[Numbers]:
    """Equal shares at random; concentration is not used (the paper)."""
    return partition_iid(len(labels), clients, rng)


def dirichlet(labels: Labels, clients: int, concentration: float, rng: np.random.Generator) -> list[Numbers]:
    """Clients differ in labels and sizes (Yurochkin et al. 2019).

    Each label's images are dealt in proportions drawn from a symmetric Dirichlet distribution. The smaller
    `concentration` > 0, the more the clients differ. Ours: every client gets two images first, one to train and one to
    validate on. Raises ValueError for a concentration that is not above 0.
    """
    if not concentration > 0:
        raise ValueError(f"concentration {concentration} must be above 0")
    first = partition_iid(len(labels), clients, rng)
    parts, left = [part[:2] for part in first], np.concatenate([part[2:] for part in first])
    for label in np.unique(labels):
        images = left[labels[left] == label]
        ends = np.cumsum(rng.dirichlet(np.full(clients, min(concentration, EQUAL)))) * len(images)
        dealt = np.split(images, np.round(ends[:-1]).astype(int))
        parts = [np.concatenate([part, more]) for part, more in zip(parts, dealt)]
    return [rng.permutation(part) for part in parts]


def quantity(labels: Labels, clients: int, concentration: float, rng: np.random.Generator) -> list[Numbers]:
    """Clients differ in sizes alone (Li et al. 2022).

    As `dirichlet`, but the labels are ignored.
    """
    return dirichlet(np.zeros_like(labels), clients, concentration, rng)


PARTITIONS: dict[str, Partition] = {"iid": iid, "dirichlet": dirichlet, "quantity": quantity}
