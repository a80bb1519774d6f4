"""Tests of bench/bench.py: it measures what it says. The numbers themselves depend on the machine."""

import cProfile
import json
import sys

import numpy as np
import pytest
import torch
from conftest import HERE

from bench import bench
from madsim import Config, gather
from model import DROPOUT, draw_batches, evaluate, initial_weights, parts_of, train_clients


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
def test_busy_programs_run_beside_the_second_half_and_end(monkeypatch, capsys):
    started = []

    class Program(bench.subprocess.Popen):
        def __init__(self, words, **options):
            super().__init__(words, **options)
            started.extend([self] * ("while True: pass" in words))

    monkeypatch.setattr(bench.subprocess, "Popen", Program)
    monkeypatch.setattr(bench, "BUSY_ROUNDS", 2)
    bench.bench_busy(1)
    assert len(started) == 2 and all(program.returncode == -9 for program in started)
    heading, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["alone", "beside", "beside"] and "1 turns of 2 rounds" in heading


@pytest.mark.slow
def test_the_profile_lists_the_matrix_products(capsys):
    threads = torch.get_num_threads()
    bench.bench_profile(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{bench.platform.machine()}, {threads} threads")
    assert any(line.startswith("aten::bmm") and "14 x" in line for line in lines)


@pytest.mark.slow
def test_the_round_in_jax_trains_and_evaluates_as_ours(phantom):
    """After 6 steps of 3 clients with short batches, weights agree to a thousandth of their change."""
    jax_round = pytest.importorskip("bench.jax_round", reason="JAX is not installed", exc_type=ImportError)
    c, w, members = gather(Config(), phantom), initial_weights(0), np.split(np.arange(136), [50, 91])
    rngs = [[np.random.default_rng(client) for client in range(3)] for _ in range(2)]
    expected, _ = train_clients(w, c.images, c.labels, members, rngs[0], epochs=2)
    batches = draw_batches(members, rngs[1], (3, 20), 2, 20, DROPOUT)
    parameters = {name: part.numpy() for name, part in parts_of(w).items()}
    trained = jax_round.train(parameters, c.images[:, 0].numpy(), c.labels.numpy(), *batches, 1e-3)
    for name, part in parts_of(w).items():
        ours = torch.stack([parts_of(row)[name] for row in expected])
        change = (ours - part).norm()
        assert change > 0 and (torch.from_numpy(np.array(trained[name])) - ours).norm() < 1e-3 * change

    images = c.evaluated[: 2 * jax_round.PART]
    loss, right = jax_round.evaluate(
        parameters, images.view(2, -1, 28, 28).numpy(), c.test_labels[: len(images)].numpy()
    )
    metrics = evaluate(w, images, c.test_labels[: len(images)])
    assert np.mean(loss) == pytest.approx(metrics["loss"], rel=1e-5)
    assert np.mean(right) == pytest.approx(metrics["accuracy"])


@pytest.mark.parametrize(
    ("measure", "package", "needs"),
    [(bench.bench_flower, "flwr", r"flwr\[simulation\]"), (bench.bench_jax, "jax", "jax")],
)
def test_without_the_other_system_it_says_what_to_install(measure, package, needs, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "bench")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"pip install '{needs}'"):
        measure(1)
