"""How fast madsim is: `python bench/bench.py`. `--help` lists the other measurements.

Times are those of whole rounds of `madsim.simulate` that write their results to a folder. The data set is the phantom,
because the speed does not depend on the images. Compared programs run in turns, because the speed of a machine changes
from minute to minute.
"""

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from harness.needs import check

    check(__name__)

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import data
import madsim
import model
from harness.jobs import own_threads, simulate_all, usable_cores
from madsim import Config, gather

MATRIX = 2048  # rows and columns of the product whose rate is the machine's
PARTS = {  # the parts of a round, with the functions that do them and their files
    "local training": [("model.py", "train"), ("model.py", "attack")],
    "evaluation": [("model.py", "evaluate")],
    "scoring": [("trust.py", "mad_step")],
    "averaging": [("trust.py", "aggregate")],
    "writing": [("log.py", "__call__")],
}
CLIENTS, IMAGES = (10, 100, 1000), (1, 2, 4)  # of --scale: clients, and copies of each training image
CELL_ROUNDS, MANY_ROUNDS = 10, 300  # of --scale: rounds of a cell, and of the cell that shows memory over rounds
BUSY_PROGRAMS, BUSY_ROUNDS = 2, 20  # of --busy: other programs, and rounds of a turn
JOBS_RUNS, JOBS_ROUNDS = 4, 250  # of --jobs: runs, and rounds of each


# ---------------------------------------------------------------- tools


def run(rounds: int, dataset: data.Dataset, **options) -> dict:
    """The content of summary.json of a run that writes its results, and the seconds of `each_round`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        summary = madsim.simulate(Config(rounds=rounds, **options), out, dataset=dataset).summary
        with np.load(out / "checkpoint.npz") as checkpoint:
            return summary | {"each_round": checkpoint["seconds"].tolist()}


def timed(function: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def product_rate() -> float:
    """Floating-point operations per second of one product of two large matrices."""
    matrix = torch.rand(MATRIX, MATRIX)
    return 2 * MATRIX**3 / timed(lambda: matrix @ matrix)


def flops(clients: model.Clients) -> tuple[float, float]:
    """Floating-point operations of the plain network per round: of local training, and of evaluation."""

    def of_an_image(backward: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            logits = model.Network()(torch.zeros(1, 1, 28, 28))
            if backward:
                F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64)).backward()
        return counter.get_total_flops()

    evaluated = len(clients.test_labels) + len(clients.own)
    return of_an_image(True) * clients.sizes.sum(), of_an_image(False) * evaluated


def parts_of(calls: cProfile.Profile) -> dict[str, float]:
    """The seconds that a profiled run spent in each of the PARTS of its rounds."""
    seconds = dict.fromkeys(PARTS, 0.0)
    stats = pstats.Stats(calls).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, _, cumulative, _) in stats.items():
        for part, functions in PARTS.items():
            seconds[part] += cumulative * ((Path(file).name, name) in functions)
    return seconds


def usual_threads() -> int:
    """The number of threads of a run that asks for none."""
    return min(*usable_cores().values(), own_threads())


def heading(text: str) -> None:
    print(f"{platform.machine()}, {usual_threads()} threads, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__.split('+')[0]}; {text}")


def spread(values: list[float], unit: float = 1) -> str:
    """Median and range of the values, each multiplied by `unit`."""
    low, middle, high = (function(values) * unit for function in (min, statistics.median, max))
    return f"{middle:8.2f}  ({low:.2f} to {high:.2f})"


def ratios(ones: list[float], others: list[float]) -> list[float]:
    """The ratios turn by turn. They do not depend on the changes of the machine's speed."""
    return [one / other for one, other in zip(ones, others)]


# ---------------------------------------------------------------- the measurements


def bench_round(turns: int) -> None:
    """The default round, stacked and in a loop, beside the arithmetic floor, and the parts of the round.

    The floor is the time of the same floating-point operations at this machine's rate for a large matrix product.
    """
    dataset = data.load("phantom")
    training, evaluation = flops(gather(Config(), dataset))
    for method in model.METHODS:
        run(2, dataset, method=method)  # warm up
    seconds: dict[str, list[float]] = defaultdict(list)
    floors: list[float] = []
    for _ in range(turns):
        seconds["stacked"].append(run(10, dataset)["seconds_per_round"])
        seconds["loop"].append(run(3, dataset, method="loop")["seconds_per_round"])
        floors.append((training + evaluation) / product_rate())

    heading(f"median (range) of {turns} turns: 10 rounds stacked, 3 in a loop, one {MATRIX}^3 product")
    print(
        f"arithmetic        {training / 1e9:.2f} GFLOP of training and {evaluation / 1e9:.2f} of evaluation per round"
    )
    for name, values in (*seconds.items(), ("floor", floors)):
        print(f"{name:<16} {spread(values, 1e3)} ms")
    print(f"stacked / floor  {spread(ratios(seconds['stacked'], floors))}")
    print(f"loop / stacked   {spread(ratios(seconds['loop'], seconds['stacked']))}")
    print(f"the parts of a stacked round (mean of {10 * turns} profiled rounds)")
    with cProfile.Profile() as calls:
        run(10 * turns, dataset)
    parts = parts_of(calls)
    for part, duration in parts.items():
        print(f"  {part:<14} {duration / turns * 1e2:8.2f} ms   {duration / sum(parts.values()):6.1%}")


def bench_run(turns: int) -> None:
    """The whole default run with its start-up, 1000 rounds of ten clients, beside its arithmetic floor."""
    dataset = data.load("phantom")
    training, evaluation = flops(gather(Config(), dataset))
    rates = [product_rate() for _ in range(turns)]
    start = time.perf_counter()
    summary = run(1000, dataset)
    seconds = time.perf_counter() - start
    rates += [product_rate() for _ in range(turns)]
    floor = 1000 * (training + evaluation) / statistics.median(rates)
    heading(f"n = 1 run of 1000 rounds; {2 * turns} products around it")
    print(f"{seconds:.1f} s, {summary['seconds_per_round'] * 1e3:.1f} ms per round (median)")
    print(f"floor {floor:.1f} s at {statistics.median(rates) / 1e9:.0f} GFLOP/s; run / floor {seconds / floor:.2f}")


def bench_scale(turns: int) -> None:
    """Seconds per round and peak memory by clients and images, in one process per cell (Linux only)."""

    def cell(clients: int, images: int, rounds: int) -> tuple[float, float]:
        command = [sys.executable, __file__, "--cell", *map(str, (clients, images, rounds))]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    heading(f"median seconds per round of {CELL_ROUNDS}, and peak memory of the process")
    print("clients" + "".join(f"{f'images x {times}':>22}" for times in IMAGES))
    peaks = {}
    for clients in CLIENTS:
        print(f"{clients:>7}", end="", flush=True)
        for times in IMAGES:
            seconds, peaks[clients, times] = cell(clients, times, CELL_ROUNDS)
            print(f"{seconds:>11.3f} s {peaks[clients, times]:>6.0f} MB", end="", flush=True)
        print()
    few, many = CLIENTS[0], CLIENTS[-1]
    slope = (peaks[many, 1] - peaks[few, 1]) / (many - few)
    print(f"memory per client {slope:.2f} MB, from {few} to {many} clients")
    _, peak = cell(few, 1, MANY_ROUNDS)
    slope = (peak - peaks[few, 1]) / (MANY_ROUNDS - CELL_ROUNDS) * 1e3
    print(f"memory per round {slope:.1f} kB, from {CELL_ROUNDS} to {MANY_ROUNDS} rounds ({peak:.0f} MB)")


def measure_cell(clients: int, images: int, rounds: int) -> None:
    """One cell of `bench_scale`, in its own process: prints seconds per round and peak memory in MB as JSON."""
    dataset = data.load("phantom")
    repeated = np.tile(np.arange(len(dataset.train_images)), images)
    dataset = replace(dataset, train_images=dataset.train_images[repeated], train_labels=dataset.train_labels[repeated])
    seconds = run(rounds, dataset, clients=clients)["seconds_per_round"]
    status = Path("/proc/self/status").read_text()
    print(json.dumps([seconds, int(status.split("VmHWM:")[1].split()[0]) / 1e3]))


@contextmanager
def busy_programs() -> Iterator[None]:
    """Inside the block, other programs run that never rest, each on one thread."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY_PROGRAMS)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def bench_busy(turns: int) -> None:
    """The default round alone and beside two other programs that never rest, in turns."""
    dataset = data.load("phantom")
    run(2, dataset)  # warm up
    alone, beside = [], []
    for _ in range(turns):
        alone.append(run(BUSY_ROUNDS, dataset)["each_round"])
        with busy_programs():
            beside.append(run(BUSY_ROUNDS, dataset)["each_round"])
    heading(f"{turns} turns of {BUSY_ROUNDS} rounds each: median (range) of all rounds")
    for name, seconds in (("alone", alone), ("beside", beside)):
        print(f"{name:<16} {spread(np.concatenate(seconds).tolist(), 1e3)} ms")
    medians = [[statistics.median(seconds) for seconds in each] for each in (beside, alone)]
    print(f"beside / alone   {spread(ratios(*medians))}, of the medians of the turns")


def bench_jobs(turns: int) -> None:
    """Several runs as processes, beside one after another on all cores and on one core."""
    dataset, cores = data.load("phantom"), usual_threads()
    several = [Config(rounds=JOBS_ROUNDS, seed=seed) for seed in range(JOBS_RUNS)]

    def all_of(jobs: int, threads: int | None) -> float:
        with tempfile.TemporaryDirectory() as folder:
            runs = {Path(folder) / str(config.seed): replace(config, threads=threads) for config in several}
            return timed(lambda: simulate_all(madsim.simulate, runs, dataset, jobs))

    madsim.simulate(Config(rounds=2), dataset=dataset)  # warm up
    heading(f"{JOBS_RUNS} runs of {JOBS_ROUNDS} rounds, with the start-up of the processes")
    processes = all_of(cores, None)
    print(f"{cores} processes                    {processes:7.1f} s")
    for text, threads in (("all cores", cores), ("one core", 1)):
        alone = all_of(1, threads)
        print(f"one after another, {text:<10} {alone:7.1f} s: {alone / processes:.2f} times as long")


def bench_profile(turns: int) -> None:
    """The operations of one training step of a block of the default round, on one thread."""
    B = Config.batch_size
    C = model.block_size(Config.clients, B, usual_threads(), torch.device("cpu"))
    W, pick = model.row_of(model.initial_weights(0)).repeat(C, 1), torch.arange(C * B).view(C, B)
    images, labels = torch.rand(C * B, 1, 28, 28), torch.zeros(C * B, dtype=torch.int64)
    step = model.recorded_gradients(C, B, W.device, W.dtype)
    with model.own_modes(), torch.no_grad(), profile() as operations:
        for _ in range(turns):
            step(W, images, labels, pick, torch.full((C, B), 1 / B), torch.ones(C, B, sum(model.HIDDEN)))
    events = sorted(operations.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    heading(f"mean of {turns} steps of {C} clients, without the optimiser")
    for event in events[:12]:
        share = event.self_cpu_time_total / total
        print(f"{event.key:<28} {event.count // turns:4d} x   {share * total / turns / 1e3:6.2f} ms   {share:6.1%}")


def beside(turns: int, name: str, module: str, package: str, needs: str) -> None:
    """A round of another system, with madsim's before and after it. The first round of each is told by itself."""
    try:
        seconds = import_module(module).seconds_per_round
    except ImportError as error:
        sys.exit(f"bench: {name} is not installed ({error}); pip install '{needs}'")
    dataset = data.load("phantom")
    first, *ours = run(turns + 1, dataset)["each_round"]
    theirs_first, *theirs = seconds(turns + 1)
    ours += run(turns + 1, dataset)["each_round"][1:]
    heading(
        f"{package} {version(package)}; median (range) of {turns} rounds of {name}, {turns} of madsim before and after"
    )
    for who, each, start in ((name, theirs, theirs_first), ("madsim", ours, first)):
        print(f"{who:<16} {spread(each, 1e3)} ms; the first round {start:.1f} s")
    print(f"{name + ' / madsim':<16} {statistics.median(theirs) / statistics.median(ours):8.2f}")


def bench_flower(turns: int) -> None:
    """The work of a round on Flower's simulation engine, beside madsim's round."""
    beside(turns, "Flower", "flower_round", "flwr", "flwr[simulation]")


def bench_jax(turns: int) -> None:
    """The work of a round in JAX, written by hand, beside madsim's round."""
    beside(turns, "JAX", "jax_round", "jax", "jax")


def main() -> None:
    measurements = (bench_run, bench_busy, bench_scale, bench_jobs, bench_profile, bench_flower, bench_jax)
    about = {function: (function.__doc__ or "-").splitlines()[0] for function in (bench_round, *measurements)}
    parser = argparse.ArgumentParser(description=about[bench_round])
    several = parser.add_mutually_exclusive_group()
    for function in measurements:
        name = function.__name__.removeprefix("bench_")
        several.add_argument(f"--{name}", dest="what", action="store_const", const=function, help=about[function])
    several.add_argument("--cell", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("-n", type=int, default=15, help="turns, or repetitions (default: %(default)s)")
    args = parser.parse_args()
    if args.cell:
        measure_cell(*args.cell)
    else:
        (args.what or bench_round)(args.n)


if __name__ == "__main__":
    main()
