"""Several runs at once: processes on this machine, or a Dask cluster."""

import os
import pickle
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

from harness.console import progress
from harness.folder import CHECKPOINT, script

CONNECT_SECONDS = 10  # ours: the time that a cluster's scheduler has to answer, and to have a worker


def simulate_all(
    simulate: Callable, runs: dict[Path, Any], dataset: Any, jobs: int | None, cluster: bool = False
) -> list:
    """The Result of `simulate` for each of the `runs`, which are Configs by their folders.

    A single run uses all cores that this process may use. Several runs share them: they are at most `jobs` processes
    (None: as many as there are cores), or jobs on the `cluster` of `workers`. A run continues if its folder has a
    checkpoint. If one of several fails, the list holds its error.
    """
    if not runs:
        return []
    if len(runs) == 1 and not cluster:
        [(folder, config)] = runs.items()
        return [simulate(config, folder, dataset=dataset, resume=(folder / CHECKPOINT).is_file(), bar=True)]
    from joblib import Parallel, delayed

    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # if the processes are killed
    if cluster:
        jobs, threads = jobs or len(runs), 1
    else:
        cores, asked = min(usable_cores().values()), max(config.threads or 1 for config in runs.values())
        jobs = min(jobs or cores, max(1, cores // asked), len(runs))
        threads = max(1, min(cores // jobs, own_threads()))
    each = [(replace(config, threads=config.threads or threads), folder.absolute()) for folder, config in runs.items()]
    with rounds_bar(runs):
        return Parallel(n_jobs=jobs)(delayed(attempt)(simulate, *run, dataset, sys.argv) for run in each)


def usable_cores() -> dict[str, int]:
    """The numbers of cores that this process may use; the smaller one counts.

    `usable` follows from the CPU affinity of the process and the quota of its container (cgroup). `physical` are the
    physical cores that the affinity allows: two threads on one core share its arithmetic. Raises ValueError if
    LOKY_MAX_CPU_COUNT, which can lower `usable`, is no whole number.
    """
    from joblib import cpu_count

    most = os.environ.get("LOKY_MAX_CPU_COUNT", "1")
    if not most.isdecimal():
        raise ValueError(f"LOKY_MAX_CPU_COUNT is {most!r}, not a whole number")
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        physical = len({Path(siblings.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})
    except (AttributeError, OSError):  # not on Linux
        physical = cpu_count(only_physical_cores=True)
    return {"usable": cpu_count(), "physical": physical}


def own_threads() -> int:
    """The most threads that the environment variable OMP_NUM_THREADS allows a process."""
    most = os.environ.get("OMP_NUM_THREADS", "")
    return int(most) if most.isdigit() else sys.maxsize


def refuse_unsendable(configs: list, cluster: bool) -> None:
    """Raise ValueError for Configs that other processes can't take. On a cluster, joblib would wait for ever."""
    if len(configs) > 1 or cluster:
        content = pickle.dumps(configs)
    if cluster:
        from distributed import get_client

        try:
            get_client().run(unpickle, content)
            get_client().run_on_scheduler(unpickle, content)
        except Exception as error:  # unpickling raises many types
            way = "start it again if a plugin has changed, with the folders of your own modules in PYTHONPATH"
            raise ValueError(f"the cluster can't take the runs: {error}; {way}") from None


def unpickle(content: bytes) -> None:
    """Unpickle Configs in another process, to see that it can."""
    pickle.loads(content)


def attempt(simulate: Callable, config: Any, folder: Path, dataset: Any, command: list[str]) -> Any:
    """One of several runs: its Result, or the error that ended it. Raises KeyboardInterrupt if it was interrupted."""
    sys.argv = command  # for config.json: another program started the worker of a cluster
    try:
        return simulate(config, folder, dataset=dataset, resume=(folder / CHECKPOINT).is_file())
    except (ValueError, FloatingPointError) as error:
        return type(error)(str(error) if str(folder) in str(error) else f"{folder}: {error}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # without the Result, which would travel to this process's parent


@contextmanager
def workers(scheduler: str | None) -> Iterator[None]:
    """Inside this block, joblib's Parallel runs on the Dask cluster at an address (None: on this machine).

    The workers must see the same folders. They and the scheduler must find madsim's modules. Raises ValueError if they
    do not, if there is no worker, or if a worker has several threads, because runs that share a process get no more
    cores. Raises OSError for a cluster that does not answer.
    """
    if scheduler is None:
        yield
        return
    from joblib import parallel_config

    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--backend dask needs the package distributed: pip install distributed") from None
    with Client(scheduler, timeout=CONNECT_SECONDS) as client, parallel_config(backend="dask"):
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        if not client.nthreads():
            raise ValueError(f"the cluster has no workers; start some: dask worker {scheduler} --nthreads 1")
        found = client.run(find_spec, "madsim") | {"the scheduler": client.run_on_scheduler(find_spec, "madsim")}
        if lost := [place for place, spec in found.items() if spec is None]:
            way = f"start it with PYTHONPATH={shlex.quote(str(Path(script('madsim.py')).resolve().parent))}"
            raise ValueError(f"{', '.join(lost)} can't find madsim's modules; {way}")
        if crowded := [worker for worker, threads in client.nthreads().items() if threads != 1]:
            raise ValueError(f"workers {', '.join(crowded)} have several threads; start them with --nthreads 1")
        yield


@contextmanager
def rounds_bar(runs: dict[Path, Any]) -> Iterator[None]:
    """One progress bar for runs in other processes. It counts the rows that they have written."""

    def rows() -> list[int]:
        tables = [folder / "rounds.csv" for folder in runs]
        return [max(0, table.read_bytes().count(b"\n") - 1) if table.is_file() else 0 for table in tables]

    def count() -> None:
        counts = rows()
        done = sum(each >= config.rounds for each, config in zip(counts, runs.values()))
        bar.set_description_str(f"{done} of {len(runs)} runs", refresh=False)
        bar.update(sum(counts) - bar.n)

    def watch() -> None:
        while not finished.wait(0.5):
            count()

    finished, watcher = Event(), Thread(target=watch)
    total = sum(config.rounds for config in runs.values())
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    about = {"unit": " rounds", "desc": f"0 of {len(runs)} runs", "bar_format": shape}
    with progress(True, total=total, initial=sum(rows()), **about) as bar:
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            count()
