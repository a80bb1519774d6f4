"""How fast local training is: `python bench/bench.py`.

Times the default round's local training (10 clients, one epoch) stacked and in a loop, turn by turn, beside the
arithmetic floor: the same floating-point operations at this machine's own rate for a large matrix product.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
from madsim import Config, World
from model import METHODS, Network, initial_weights, train_clients

MATRIX = 2048  # rows and columns of the product whose rate is the machine's


def flops_per_image() -> float:
    """Floating-point operations of training the plain network on one image: forward and backward."""
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(Network()(torch.zeros(1, 1, 28, 28)), torch.zeros(1, dtype=torch.int64)).backward()
    return counter.get_total_flops()


def timed(function) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=15, help="timed rounds of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="processor threads (default: all)")
    args = parser.parse_args()

    world = World(Config(threads=args.threads), data.load("phantom"))  # the speed does not depend on the images
    w = initial_weights(0).to(world.device)
    members = [share.train for share in world.shares]

    def train(method: str) -> None:
        rngs = [np.random.default_rng(client) for client in range(len(members))]
        train_clients(w, world.images, world.labels, members, rngs, method=method)

    matrix = torch.rand(MATRIX, MATRIX)
    work = {method: lambda method=method: train(method) for method in METHODS}
    work["product"] = lambda: matrix @ matrix
    for function in work.values():
        function()  # warm up
    seconds = {name: [] for name in work}
    for _ in range(args.n):
        for name, function in work.items():
            seconds[name].append(timed(function))
    median = {name: statistics.median(values) for name, values in seconds.items()}

    rate = 2 * MATRIX**3 / median["product"]
    flops = flops_per_image() * world.sizes.sum()
    floor = flops / rate
    print(f"{platform.machine()}, {world.threads} threads, torch {torch.__version__}, n = {args.n} each, in turns")
    print(f"a round: {len(members)} clients, {world.sizes.sum()} images, {flops / 1e9:.2f} GFLOP")
    for method in METHODS:
        low, high = min(seconds[method]), max(seconds[method])
        print(f"{method:<8} {median[method] * 1e3:8.1f} ms a round (median; {low * 1e3:.1f} to {high * 1e3:.1f})")
    print(f"floor    {floor * 1e3:8.1f} ms a round, at {rate / 1e9:.0f} GFLOP/s of a {MATRIX}^3 product")
    print(f"loop / stacked  {median['loop'] / median['stacked']:.2f}")
    print(f"stacked / floor {median['stacked'] / floor:.2f}")


if __name__ == "__main__":
    main()
