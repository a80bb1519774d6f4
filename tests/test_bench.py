"""bench/bench.py: that it measures what it says; the numbers themselves are the machine's."""

import json
from collections import defaultdict
from importlib.util import find_spec

import pytest
import torch

from bench import bench
from madsim import Config, gather


def test_floating_point_operations_by_hand(phantom):
    """Two for every multiplication and addition; the first layer's images need no gradient."""
    clients = gather(Config(), phantom)
    conv1, conv2 = 2 * 24 * 24 * 6 * 25, 2 * 8 * 8 * 16 * 6 * 25
    linear = 2 * (256 * 64 + 64 * 32 + 32 * 2)
    training, evaluation = bench.flops(clients)
    assert training == (2 * conv1 + 3 * conv2 + 3 * linear) * clients.sizes.sum()
    assert evaluation == (conv1 + conv2 + linear) * (624 + 470)


def test_the_parts_make_up_the_round(phantom):
    seconds = defaultdict(list)
    bench.run(1, phantom, clients=4, malicious=0.25)  # warm up
    with bench.clocks(seconds):
        summary = bench.run(3, phantom, clients=4, malicious=0.25)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(
        ("train", "attack", "evaluate", "mad_step", "aggregate", "__call__"), 3
    )
    parts = sum(sum(values) for values in seconds.values())
    assert 0.8 * summary["seconds"] < parts < 1.05 * summary["seconds"]
    bench.run(1, phantom, clients=4, malicious=0.25)
    assert len(seconds["train"]) == 3  # the clocks are gone


def test_a_cell_of_the_scale_tells_seconds_and_megabytes(capsys):
    bench.measure_cell(clients=3, images=1, rounds=1)
    seconds, megabytes = json.loads(capsys.readouterr().out)
    assert 0 < seconds < 60 and 100 < megabytes < 8000


def test_the_profile_lists_the_matrix_products(capsys):
    threads = torch.get_num_threads()
    bench.bench_profile(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{bench.platform.machine()}, {threads} threads")
    assert any(line.startswith("bmm.default") and "14 x" in line for line in lines)


@pytest.mark.skipif(find_spec("flwr") is not None, reason="Flower is installed")
def test_without_flower_it_says_what_to_install():
    with pytest.raises(SystemExit, match=r"pip install 'flwr\[simulation\]'"):
        bench.bench_flower(1)
