"""Tests of bench/bench.py: it measures what it says. The numbers themselves depend on the machine."""

import cProfile
import json
from importlib.util import find_spec

import pytest
import torch

from bench import bench
from madsim import Config, gather


@pytest.mark.slow
def test_floating_point_operations_by_hand(phantom):
    """A multiplication and an addition count as two operations. The images of the first layer need no gradient."""
    clients = gather(Config(), phantom)
    conv1, conv2 = 2 * 24 * 24 * 6 * 25, 2 * 8 * 8 * 16 * 6 * 25
    linear = 2 * (256 * 64 + 64 * 32 + 32 * 2)
    training, evaluation = bench.flops(clients)
    assert training == (2 * conv1 + 3 * conv2 + 3 * linear) * clients.sizes.sum()
    assert evaluation == (conv1 + conv2 + linear) * (624 + 470)


@pytest.mark.slow
def test_the_parts_make_up_the_round(phantom):
    bench.run(1, phantom, clients=4, malicious=0.25)  # warm up
    with cProfile.Profile() as calls:
        summary = bench.run(3, phantom, clients=4, malicious=0.25)
    parts = bench.parts_of(calls)
    assert parts.keys() == bench.PARTS.keys() and min(parts.values()) > 0
    assert parts["local training"] == max(parts.values())
    assert 0.8 * summary["seconds"] < sum(parts.values()) < 1.05 * summary["seconds"]


@pytest.mark.slow
def test_a_cell_of_the_scale_tells_seconds_and_megabytes(capsys):
    bench.measure_cell(clients=3, images=1, rounds=1)
    seconds, megabytes = json.loads(capsys.readouterr().out)
    assert 0 < seconds < 60 and 100 < megabytes < 8000


@pytest.mark.slow
def test_the_profile_lists_the_matrix_products(capsys):
    threads = torch.get_num_threads()
    bench.bench_profile(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{bench.platform.machine()}, {threads} threads")
    assert any(line.startswith("aten::bmm") and "14 x" in line for line in lines)


@pytest.mark.skipif(find_spec("flwr") is not None, reason="Flower is installed")
def test_without_flower_it_says_what_to_install():
    with pytest.raises(SystemExit, match=r"pip install 'flwr\[simulation\]'"):
        bench.bench_flower(1)
