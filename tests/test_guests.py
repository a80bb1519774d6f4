"""Tests of `simulate` inside other programs: threads, interruptions, and what the program has set in PyTorch."""

import _thread
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import HERE, interrupted, some

import model
from madsim import Config, Result, simulate

SHORT = Config(rounds=2, mad_start=2, clients=4, threads=1, malicious=0.25, attack="hug")


@pytest.fixture
def unrecorded():
    """Nothing is recorded, as in a new process."""
    model.recorded_gradients.cache_clear()


def assert_equal(one: Result, other: Result) -> None:
    assert one.rounds.equals(other.rounds) and one.clients.equals(other.clients)
    assert np.array_equal(one.weights, other.weights)


# ---------------------------------------------------------------- threads


@pytest.mark.slow
def test_several_threads_give_what_one_gives(small, unrecorded):
    """The runs have different sizes and methods, so the threads also record at the same time."""
    configs = [replace(SHORT, seed=seed, clients=3 + seed % 2, malicious=0.3) for seed in range(4)]
    configs.append(replace(SHORT, method="loop"))
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda config: simulate(config, dataset=small), configs))
    for config, result in zip(configs, together):
        assert_equal(simulate(config, dataset=small), result)


def test_initial_weights_are_pytorchs_own_in_every_thread():
    """The reference draws from PyTorch's global generator, in one thread."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = torch.nn.utils.parameters_to_vector(model.Network().parameters()).detach()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(model.initial_weights, [7, 8] * 20))
    assert all(torch.equal(w, expected) for w in found[::2])
    assert not any(torch.equal(w, expected) for w in found[1::2])


# ---------------------------------------------------------------- processes


def in_a_fork(function, seconds: int) -> int:
    """Call the function in a fork of this process. The exit status is 0, or -SIGALRM if it takes longer."""
    process = os.fork()
    if not process:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture
def several_threads():
    """PyTorch has computed with two threads of its own. A fork of this process lacks the second thread."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    torch.set_num_threads(2)
    torch.ones(1_000_000).exp()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_in_a_fork_gives_what_it_gives_elsewhere(small, several_threads, tmp_path):
    config = replace(SHORT, threads=2, membership=1)
    right = simulate(config, tmp_path / "here", dataset=small)
    assert in_a_fork(lambda: simulate(config, tmp_path / "fork", dataset=small), 60) == 0
    assert len(right.membership) == 2
    for table in (tmp_path / "here").glob("*.csv"):
        assert (tmp_path / "fork" / table.name).read_bytes() == table.read_bytes()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("other", [{"clients": 5}, {"method": "loop"}, {"leakage": 1, "inverted": "gradient:1"}])
def test_a_run_that_pytorch_refuses_in_a_fork_says_how_to_start_processes(other, small, several_threads, unrecorded):
    """PyTorch 2.14 can't compute new gradients in a fork of a process in which it has done so. 2.7 can."""
    simulate(SHORT, dataset=small)

    def run():
        try:
            simulate(replace(SHORT, **other), dataset=small)
        except RuntimeError as error:
            way = "start the processes with spawn, forkserver or joblib"
            assert str(error) == f"this process is a fork of one in which PyTorch has computed before; {way}"

    assert in_a_fork(run, 60) == 0


def test_another_error_of_pytorch_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), model.own_modes():
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch for this system has another OpenMP")
def test_pytorchs_own_threads_hang_in_a_fork(several_threads):
    """The negative control."""
    assert in_a_fork(lambda: torch.ones(1_000_000).exp(), 3) == -signal.SIGALRM


# ---------------------------------------------------------------- interruptions


@pytest.mark.slow
def test_an_interruption_while_pytorch_records_leaves_nothing_half_done(small, monkeypatch, unrecorded):
    """Ctrl-C comes in the middle of the recording, once in each of its two parts. The next run is right."""
    right = simulate(SHORT, dataset=small)
    for part in ("make_fx", "functional_call"):
        model.recorded_gradients.cache_clear()
        plain = getattr(model, part)

        def interrupt(*arguments, plain=plain, part=part):
            monkeypatch.setattr(model, part, plain)
            os.kill(os.getpid(), signal.SIGINT)
            return plain(*arguments)

        monkeypatch.setattr(model, part, interrupt)
        stopped = interrupted(SHORT, dataset=small)
        assert not stopped.summary["complete"] and len(stopped.rounds) < 2
        assert_equal(simulate(SHORT, dataset=small), right)


INTERRUPTED = """
import os, signal, sys
from madsim import Config, simulate

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

config = Config(rounds=1, clients=4, malicious=0.25, dataset="phantom")
sys.meta_path.insert(0, Finder())
try:
    simulate(config)
    sys.exit("not interrupted")
except KeyboardInterrupt:
    pass
assert simulate(config).summary["complete"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch.nn", "torch.fx.experimental.proxy_tensor"])
def test_an_interruption_while_pytorch_is_imported_leaves_nothing_half_done(module):
    """PyTorch can't be imported a second time after an import that was interrupted."""
    subprocess.run([sys.executable, "-c", INTERRUPTED.format(module=module)], check=True, cwd=HERE, timeout=100)


def test_a_recording_that_fails_is_not_kept(small, monkeypatch, unrecorded):
    with monkeypatch.context() as patch:
        patch.setattr(model, "make_fx", lambda function: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            simulate(SHORT, dataset=small)
    assert simulate(SHORT, dataset=small).summary["complete"]


# ---------------------------------------------------------------- what the program has set


@contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    yield
    assert torch.get_default_dtype() == dtype
    torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    yield
    assert torch.get_default_device().type == device
    torch.set_default_device(None)


@contextmanager
def global_setting(function, value, usual):
    function(value)
    yield
    function(usual)


SET = {
    "anomaly detection": lambda: global_setting(torch.autograd.set_detect_anomaly, True, False),
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "device": lambda: default_device("meta"),
    "device in a block": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("method", some(model.METHODS, "stacked"))
@pytest.mark.parametrize("setting", some(SET, "float64", "autocast", "anomaly detection", "inference"))
def test_what_the_caller_has_set_in_pytorch_changes_no_number(setting, method, small):
    config = replace(SHORT, rounds=1, mad_start=1, method=method, membership=1)
    right = simulate(config, dataset=small)
    with SET[setting]():
        result = simulate(config, dataset=small)
        assert_equal(result, right)
        assert result.membership.equals(right.membership)
        model.recorded_gradients.cache_clear()  # a recording that is made in this mode is right, too
        assert_equal(simulate(config, dataset=small), right)


def test_autocast_would_change_the_numbers():
    """The negative control: the same product in bfloat16."""
    x = torch.full((4, 4), 1 / 3)
    right = x @ x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal((x @ x).float(), right)


def test_blocks_that_overlap_in_two_threads_leave_the_number_of_threads_to_new_ones():
    """A thread that starts inside the other's block sees its single thread, but the caller's number returns."""
    torch.set_num_threads(2)
    second = model.own_modes()
    with ThreadPoolExecutor(1) as thread:
        with model.own_modes():
            assert thread.submit(torch.get_num_threads).result() == 1  # the negative control
            thread.submit(second.__enter__).result()
        thread.submit(second.__exit__, None, None, None).result()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2


def test_ctrl_c_while_threads_train_ends_the_run_early(small, monkeypatch):
    train = model.train_stacked

    def interrupt(*arguments, **options):
        _thread.interrupt_main()
        return train(*arguments, **options)

    def second_round(clients, w, asked, t, plain=model.Clients.train):
        if t == 2:
            monkeypatch.setattr(model, "train_stacked", interrupt)
        return plain(clients, w, asked, t)

    monkeypatch.setattr(model.Clients, "train", second_round)
    result = interrupted(replace(SHORT, rounds=9, threads=2), dataset=small)
    assert not result.summary["complete"] and result.rounds["round"].tolist() == [1]


def test_a_run_leaves_the_number_of_threads_and_the_signals_as_they_were(small):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    torch.set_num_threads(2)
    simulate(replace(SHORT, rounds=1, mad_start=1, threads=1), dataset=small)
    assert torch.get_num_threads() == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_lower_precision_of_products_is_refused(small, monkeypatch):
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="set_float32_matmul_precision"):
            simulate(SHORT, dataset=small)
    finally:
        torch.set_float32_matmul_precision("highest")
    # PyTorch raises this error if the precision was set for one kind of device.
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(ValueError, match="precision is 'mixed', which changes the results"):
        simulate(SHORT, dataset=small)


def test_recordings_of_many_sizes_are_not_all_kept():
    assert model.recorded_gradients.cache_info().maxsize == 8


@pytest.mark.slow
def test_runs_of_many_sizes_take_no_more_and_more_memory(small):
    """After 12 sizes the memory has its level: 12 further sizes add less than 60 MB. If all
    recordings were kept, they would add 120 MB."""

    def megabytes() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("the system does not tell the memory of a process in /proc")
    used = []
    for clients in [*range(3, 15), *range(3, 15)]:
        simulate(Config(rounds=1, clients=clients, batch_size=20 + len(used)), dataset=small)
        used.append(megabytes())
    assert used[-1] - used[11] < 60
