"""What the tests share: the data sets, and a small federation that trains in a moment."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # federations this small train faster on one thread

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

FULL = False  # whether the slow tests run too
HERE = Path(__file__).resolve().parents[1]
# A shell's background job ignores Ctrl-C, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    global FULL
    FULL = config.option.markexpr != "not slow"


def examples(count: int) -> int:
    """The number of random examples of a property: `count` in the full suite, a tenth in the quick one."""
    return count if FULL else count // 10


def some(names, *quick: str) -> list:
    """All names for parametrize, those marked slow that are not `quick`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """One thread, also after a test that took more, and figures with few dots."""
    monkeypatch.setattr(drawing, "DPI", 30)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom() -> data.Dataset:
    return data.load("phantom")


@pytest.fixture(scope="session")
def small(phantom) -> data.Dataset:
    """The phantom made small: a round of ten clients takes some 30 ms."""
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
    """The folder of the real PneumoniaMNIST; a test that needs it is skipped where it is absent."""
    root = Path(os.environ.get("MADSIM_DATA", Path.home() / ".medmnist"))
    if not (root / data.FILE).is_file():
        pytest.skip(f"{data.FILE} is not in {root}; name its folder by MADSIM_DATA to run this test")
    return root


@pytest.fixture(scope="session")
def real(real_root) -> data.Dataset:
    return data.load("pneumoniamnist", real_root)


@pytest.fixture
def quick(small, monkeypatch):
    """The phantom is the small one, so that a round takes a moment."""
    monkeypatch.setattr(data, "phantom", lambda seed=0, note="": replace(small, note=note))


@pytest.fixture
def grid(quick, monkeypatch):
    """The words for an experiment of four runs of 4 rounds, in this process: two cells, two seeds."""
    columns = {"none": {"malicious": 0.0}, "two": {"malicious": 0.25}}
    experiment = experiments.Experiment("two by one", 4, experiments.mad_from(2), columns)
    monkeypatch.setitem(experiments.EXPERIMENTS, "grid", experiment)
    return ["--experiment", "grid", "--clients", "4", "--dataset", "phantom", "--jobs", "1", "--seeds", "2"]


def command(*arguments: str | Path, **options) -> subprocess.Popen:
    """`python madsim.py ARGUMENTS` in a process of its own."""
    words = [sys.executable, HERE / "madsim.py", *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def refusal(capsys, *arguments: str | Path) -> str:
    """The one line with which the command line refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("madsim: ") and captured.err.count("\n") == 1
    return captured.err
