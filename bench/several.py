"""Several runs at once: as processes of this machine, or on a Dask cluster."""

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

from bench.folder import CHECKPOINT

CONNECT_SECONDS = 10  # ours: to wait for a cluster's scheduler


def simulate_all(simulate: Callable, runs: dict, dataset, jobs: int, cluster: bool = False) -> list:
    """What `madsim.simulate` gives of each of the `runs`, Configs by their folders: of one with all threads, of several
    as processes that share the cores, or of all on the `cluster` that joblib was given (see `workers`). A run whose
    folder has a checkpoint goes on from it. Of several, one that fails gives its ValueError or FloatingPointError, and
    the others go on."""
    if not runs:
        return []
    if len(runs) == 1 and not cluster:
        [(folder, config)] = runs.items()
        return [simulate(config, folder, dataset=dataset, resume=(folder / CHECKPOINT).is_file(), bar=True)]
    from joblib import Parallel, delayed

    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # if the processes are killed
    jobs = min(jobs, len(runs))
    threads = 1 if cluster else max(1, os.cpu_count() // jobs)
    each = [(replace(config, threads=config.threads or threads), folder.absolute()) for folder, config in runs.items()]
    with rounds_bar(runs):
        return Parallel(n_jobs=jobs)(delayed(attempt)(simulate, *run, dataset, sys.argv) for run in each)


def attempt(simulate: Callable, config, folder: Path, dataset, command: list[str]):
    """A run among several: it, or why it failed. KeyboardInterrupt if it was stopped, which is for all of them."""
    sys.argv = command  # for config.json: a cluster's worker was started by another
    try:
        result = simulate(config, folder, dataset=dataset, resume=(folder / CHECKPOINT).is_file())
    except (ValueError, FloatingPointError) as error:
        return type(error)(f"{folder}: {error}")
    if not result.summary["complete"]:
        raise KeyboardInterrupt
    return result


@contextmanager
def workers(scheduler: str | None):
    """Within it joblib's Parallel runs on the Dask cluster at an address; None: on processes of this machine.

    The cluster's workers see the same folders, find these modules, and have one thread each, as PyTorch's threads and
    random state are a process's. ValueError for workers that have more, OSError for a cluster that does not answer.
    """
    if scheduler is None:
        yield
        return
    from joblib import parallel_config

    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--backend dask needs a package that is not here: pip install distributed") from None
    with Client(scheduler, timeout=CONNECT_SECONDS) as client, parallel_config(backend="dask"):
        if crowded := [worker for worker, threads in client.nthreads().items() if threads != 1]:
            raise ValueError(f"workers {', '.join(crowded)} have several threads; start them with --nthreads 1")
        yield


@contextmanager
def rounds_bar(runs: dict):
    """One progress bar for runs in other processes, which tell how far they are by the rows that they have written."""
    from tqdm import tqdm

    def rows(folder: Path) -> int:
        table = folder / "rounds.csv"
        return max(0, table.read_bytes().count(b"\n") - 1) if table.is_file() else 0

    def watch() -> None:
        while not finished.wait(0.5):
            bar.update(sum(rows(folder) for folder in runs) - bar.n)

    finished = Event()
    total = sum(config.rounds for config in runs.values())
    done = sum(rows(folder) for folder in runs)
    about = {"unit": "round", "desc": f"{len(runs)} runs", "disable": None, "dynamic_ncols": True}
    with tqdm(total=total, initial=done, **about) as bar:
        watcher = Thread(target=watch)
        watcher.start()
        try:
            yield
            bar.update(total - bar.n)
        finally:
            finished.set()
            watcher.join()
