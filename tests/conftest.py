"""Fixtures and helpers that all tests share."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # small federations train faster on one thread

# isort: split
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
from harness import drawing
from harness.cli import main
from lab import experiments
from madsim import Interrupted, Result, simulate

FULL = False  # True if the slow tests run too
HERE = Path(__file__).resolve().parents[1]
# A background job of a shell ignores Ctrl-C. The processes that the tests start and interrupt would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    global FULL
    FULL = config.option.markexpr != "not slow"


def examples(count: int) -> int:
    """The number of random examples of a property: `count` in the full suite, a tenth of it in the quick suite."""
    return count if FULL else count // 10


def some(names, *quick: str) -> list:
    """All names for parametrize. Names that are not in `quick` are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Draw figures with few dots. Go back to one thread after a test that used more."""
    monkeypatch.setattr(drawing, "DPI", 30)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom() -> data.Dataset:
    return data.load("phantom")


@pytest.fixture(scope="session")
def small(phantom) -> data.Dataset:
    """A small part of the phantom. A round of ten clients takes about 30 ms."""
    return part(phantom)


def part(dataset: data.Dataset) -> data.Dataset:
    """400 training and 100 test images of a data set."""
    return replace(
        dataset,
        train_images=dataset.train_images[:400],
        train_labels=dataset.train_labels[:400],
        test_images=dataset.test_images[:100],
        test_labels=dataset.test_labels[:100],
    )


@pytest.fixture(scope="session")
def real_root() -> Path:
    """The folder of the real PneumoniaMNIST. A test that needs it is skipped if the data set is absent."""
    root = Path(os.environ.get("MADSIM_DATA", Path.home() / ".medmnist"))
    if not (root / data.FILE).is_file():
        pytest.skip(f"{data.FILE} is not in {root}; name its folder by MADSIM_DATA to run this test")
    return root


@pytest.fixture(scope="session")
def real(real_root) -> data.Dataset:
    return data.load("pneumoniamnist", real_root)


@pytest.fixture
def quick(small, monkeypatch):
    """Replace the phantom with the small part of it, so that rounds are fast."""
    monkeypatch.setattr(data, "phantom", lambda seed=0, note="": replace(small, note=note))


@pytest.fixture
def grid(quick, monkeypatch):
    """The arguments of an experiment with two cells and two seeds: four runs of 4 rounds, in this process."""
    columns = {"none": {"malicious": 0.0}, "two": {"malicious": 0.25}}
    experiment = experiments.Experiment("two by one", 4, experiments.mad_from(2), columns)
    monkeypatch.setitem(experiments.EXPERIMENTS, "grid", experiment)
    return ["--experiment", "grid", "--clients", "4", "--dataset", "phantom", "--jobs", "1", "--seeds", "2"]


def interrupted(*arguments, **options) -> Result:
    """The Result of a call of `simulate` that is interrupted."""
    with pytest.raises(Interrupted) as stop:
        simulate(*arguments, **options)
    return stop.value.result


def command(*arguments: str | Path, **options) -> subprocess.Popen:
    """Start `python madsim.py ARGUMENTS` in a separate process."""
    words = [sys.executable, HERE / "madsim.py", *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def refusal(capsys, *arguments: str | Path) -> str:
    """The line with which the command line refuses these arguments. It must be the only line of error output."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("madsim: ") and captured.err.count("\n") == 1
    return captured.err
