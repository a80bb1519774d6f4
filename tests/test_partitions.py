"""Tests of lab/partitions.py: non-IID clients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from lab.partitions import PARTITIONS, dirichlet, quantity


@given(st.integers(1, 12), st.floats(1e-3, 100), st.integers(0, 10**6), st.sampled_from(["dirichlet", "quantity"]))
def test_the_other_partitions_deal_everything_once_and_leave_nobody_empty(clients, concentration, seed, partition):
    rng, labels = np.random.default_rng(seed), np.arange(60) % 3 // 2
    parts = PARTITIONS[partition](labels, clients, concentration, rng)
    assert len(parts) == clients and min(map(len, parts)) >= 2
    assert sorted(np.concatenate(parts)) == list(range(60))


@pytest.mark.parametrize("partition", [dirichlet, quantity])
def test_any_concentration_deals_all_images(partition):
    """A huge concentration gives equal shares, up to the rounding of each label's part. A tiny one gives all to one."""
    labels = np.arange(1000) % 3 // 2
    for concentration in (1e20, 1e308, np.inf):
        sizes = [len(part) for part in partition(labels, 10, concentration, np.random.default_rng(0))]
        assert sum(sizes) == 1000 and min(sizes) >= 98 and max(sizes) <= 102
    for concentration in (1e-20, 5e-324):
        sizes = [len(part) for part in partition(labels, 10, concentration, np.random.default_rng(0))]
        assert sum(sizes) == 1000 and sizes.count(2) >= 8
    for concentration in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match=f"concentration {concentration} must be above 0"):
            partition(labels, 10, concentration, np.random.default_rng(0))


def test_what_the_partitions_make_unequal():
    """`dirichlet` makes the shares of pneumonia differ, `quantity` only the sizes.

    With a large concentration, neither differs.
    """
    labels = (np.arange(4000) % 4 > 0).astype(int)  # three quarters have pneumonia

    def spreads(parts):
        shares = [labels[part].mean() for part in parts if len(part) > 50]
        return np.std(shares), np.std([len(part) for part in parts]) / 400

    rng = np.random.default_rng(0)
    by_label, by_size, nearly_iid = (
        spreads(parts)
        for parts in (
            dirichlet(labels, 10, 0.5, rng),
            quantity(labels, 10, 0.5, rng),
            dirichlet(labels, 10, 10_000, rng),
        )
    )
    assert by_label[0] > 0.1 and by_label[1] > 0.3
    assert by_size[0] < 0.06 and by_size[1] > 0.3
    assert nearly_iid[0] < 0.05 and nearly_iid[1] < 0.05


def test_the_partition_is_the_seeds_and_leaves_the_default_alone(small):
    labels = small.train_labels
    shares = {
        name: [share.train.tolist() for share in data.share_out(labels, 5, 0.2, 3, partition=partition)[0]]
        for name, partition in PARTITIONS.items()
    }
    assert shares["iid"] == [share.train.tolist() for share in data.share_out(labels, 5, 0.2, 3)[0]]
    again = [share.train.tolist() for share in data.share_out(labels, 5, 0.2, 3, partition=dirichlet)[0]]
    assert again == shares["dirichlet"] != shares["quantity"] != shares["iid"]
