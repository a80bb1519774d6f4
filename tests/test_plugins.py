"""Tests of attacks, rules and partitions of one's own: they reach every process, or the run is refused."""

import copy
import hashlib
import json
import os
import pickle
import py_compile
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE, command, refusal

from harness import plugins
from harness.cli import main
from lab.attacks import ATTACKS, Attack
from lab.partitions import PARTITIONS
from lab.rules import RULES
from madsim import Config, simulate

PLUGIN = '''
"""An attack, a rule and a partition."""
import numpy as np
from lab.attacks import ATTACKS, Attack
from lab.partitions import PARTITIONS
from lab.rules import RULES

def call_all_normal(labels, fraction, rng):
    return np.zeros_like(labels)

def first(W, weights, f):
    """The model of the first client."""
    return W[0]

def in_order(labels, clients, concentration, rng):
    """Images in the order of their numbers."""
    return np.array_split(np.arange(len(labels)), clients)

ATTACKS["own_attack"] = Attack("calls every image normal", poison=call_all_normal)
RULES["own_rule"], PARTITIONS["own_partition"] = first, in_order
'''
NAMES = {"attack": "own_attack", "rule": "own_rule", "partition": "own_partition"}
OPTIONS = [word for kind, name in NAMES.items() for word in (f"--{kind}", name)]
SHORT = ["--rounds", "2", "--clients", "4", "--malicious", "0.25", "--dataset", "phantom", *OPTIONS]


@pytest.fixture(autouse=True)
def as_before():
    """Registries, plugins and modules are the old ones after a test."""
    kept = [(holder, dict(holder)) for holder in (ATTACKS, RULES, PARTITIONS, plugins.loaded, plugins.arrived)]
    yield
    for holder, before in kept:
        holder.clear()
        holder.update(before)
    sys.modules.pop("own", None)


@pytest.fixture
def plugin(tmp_path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(PLUGIN)
    return path


# ---------------------------------------------------------------- --plugin


def test_a_plugin_is_listed_and_recorded_with_its_hash(plugin, tmp_path, quick, capsys):
    """The SHA-256 is that of the file, as hashlib and sha256sum give it."""
    assert main(["--list", "--plugin", str(plugin)]) == 0
    listed = capsys.readouterr().out
    assert "own_attack       calls every image normal" in listed and "The model of the first client" in listed
    assert main([*SHORT, "--plugin", str(plugin), "--out", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    recorded = json.loads((folder / "config.json").read_text())["plugins"]
    assert recorded.keys() == {"own.py"}
    digest = subprocess.run(["sha256sum", plugin], capture_output=True, text=True).stdout
    assert digest.startswith(recorded["own.py"]) or not digest


def test_a_run_with_a_plugin_is_resumed_with_the_same_file_alone(plugin, tmp_path, quick, capsys):
    words = ["--plugin", str(plugin)]
    assert main([*SHORT, *words, "--out", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    del ATTACKS["own_attack"]
    line = refusal(capsys, "--resume", folder, "--rounds", "3")
    assert "the attack 'own_attack', which is unknown here; load it with --plugin own.py" in line
    plugins.loaded.clear()
    del sys.modules["own"]
    plugin.write_text(PLUGIN + "# changed\n")
    line = refusal(capsys, "--resume", folder, "--rounds", "3", *words)
    assert "has plugins own.py (" in line and "not own.py (" in line
    plugins.loaded.clear()
    del sys.modules["own"]
    plugin.write_text(PLUGIN)
    assert main(["--resume", str(folder), "--rounds", "3", *words]) == 0


@pytest.mark.parametrize(
    ("kind", "registry", "entry"),
    [
        ("attack", ATTACKS, Attack("calls every image normal", poison=lambda labels, flip, rng: np.zeros_like(labels))),
        ("rule", RULES, lambda W, weights, f: W[0]),
        (
            "partition",
            PARTITIONS,
            lambda labels, clients, concentration, rng: np.array_split(rng.permutation(len(labels)), clients),
        ),
    ],
)
def test_a_run_with_an_entry_that_python_code_registered_says_how_to_resume_it(
    kind, registry, entry, small, tmp_path, capsys
):
    """config.json is whole: it names no plugin, because there was none."""
    registry["my_own"] = entry
    simulate(Config(rounds=1, clients=4, malicious=0.25, **{kind: "my_own"}), tmp_path / "run", dataset=small)
    del registry["my_own"]
    line = refusal(capsys, "--resume", tmp_path / "run", "--rounds", "2")
    reason = f"names the {kind} 'my_own', which is unknown here; load it with --plugin FILE"
    assert line == f"madsim: {tmp_path / 'run' / 'config.json'} {reason}\n"


def test_commands_that_name_a_plugin_can_be_copied_into_a_shell(tmp_path, grid, capsys):
    path = tmp_path / "my own.py"
    path.write_text("")
    assert main([*grid, "--plugin", str(path), "--out", str(tmp_path)]) == 0
    sys.modules.pop("my own")
    command = (tmp_path / "grid" / "table.md").read_text().split("`")[1]
    words = ["--experiment", "grid", "--clients", "4", "--dataset", "phantom", "--seeds", "2", "--plugin", str(path)]
    assert sorted(shlex.split(command)) == sorted(["python", "madsim.py", *words])
    folder = next((tmp_path / "grid").glob("*-s0"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"attack": "gone"}))
    capsys.readouterr()
    assert refusal(capsys, "--resume", folder).endswith("load it with --plugin 'my own.py'\n")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.py", None, "No such file or directory"),
        ("absent_module", None, "there is no such module; name its file, or add its folder to PYTHONPATH"),
        ("broken.py", "1 / 0", "broken.py can't be loaded: ZeroDivisionError: division by zero"),
        ("torn.py", "def", "can't be loaded: SyntaxError: "),
        ("data.py", "", "another module has the name data; rename the file"),
        ("setuptools.py", "", "another module has the name setuptools; rename the file"),
    ],
)
def test_a_plugin_that_can_not_be_loaded_is_refused_in_one_line(name, content, expected, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_text(content)
    path = tmp_path / name if name.endswith(".py") else name
    assert expected in refusal(capsys, "--plugin", path, "--rounds", "1", "--out", tmp_path / "out")
    assert Path(name).stem not in set(sys.modules) - {"data"} and not plugins.loaded


def test_a_module_is_a_plugin_too(plugin, monkeypatch):
    monkeypatch.syspath_prepend(plugin.parent)
    plugins.load("own")
    assert "own_attack" in ATTACKS and plugins.loaded.keys() == {"own"}


def test_a_changed_file_is_not_taken_for_the_loaded_one(plugin):
    plugins.load(str(plugin))
    plugins.load(str(plugin))  # twice is no error
    plugin.write_text(PLUGIN + "# changed\n")
    with pytest.raises(ValueError, match="the one in use has another"):
        plugins.load(str(plugin))


def test_a_loaded_plugin_is_not_taken_for_another_one_that_a_sender_has(plugin):
    """The process has loaded its file. A run that was sent with another file's hash is refused all the same."""
    plugins.load(str(plugin))
    plugins.load(str(plugin), hashlib.sha256(plugin.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="the one in use has another"):
        plugins.load(str(plugin), 64 * "0")


# ---------------------------------------------------------------- into another process


def test_a_config_brings_its_entries_along(small):
    """Another process does not know the names. Deleting them here has the same effect."""
    ATTACKS["own_attack"] = Attack("calls every image normal", poison=lambda labels, share, rng: np.zeros_like(labels))
    RULES["own_rule"] = lambda W, weights, f: W[0]
    PARTITIONS["own_partition"] = lambda labels, clients, c, rng: np.array_split(np.arange(len(labels)), clients)
    config = Config(rounds=1, clients=4, malicious=0.25, **NAMES)
    expected, sent = simulate(config, dataset=small), pickle.dumps(config)
    for registry, name in zip((ATTACKS, RULES, PARTITIONS), NAMES.values()):
        del registry[name]
    with pytest.raises(ValueError, match="attack 'own_attack' is unknown; known: label_flip"):
        Config(attack="own_attack")
    arrived = pickle.loads(sent)
    assert arrived == config
    assert simulate(arrived, dataset=small).rounds.equals(expected.rounds)


def test_a_config_that_comes_home_leaves_the_entry_that_this_process_has_now():
    """A copy of a Config does so as well: the entry keeps its state."""
    first, second = (Attack(about, poison=lambda labels, *_: 1 - labels) for about in ("first", "second"))
    ATTACKS["own_attack"] = first
    sent = pickle.dumps(copy.deepcopy(Config(attack="own_attack")))
    assert ATTACKS["own_attack"] is first
    ATTACKS["own_attack"] = second
    pickle.loads(sent)
    assert ATTACKS["own_attack"] is second
    del ATTACKS["own_attack"]  # as in another process, which takes what is sent, and then what is sent later
    pickle.loads(sent)
    assert ATTACKS["own_attack"].about == "first"
    ATTACKS["own_attack"], there = second, ATTACKS["own_attack"]
    later = pickle.dumps(Config(attack="own_attack"))
    ATTACKS["own_attack"] = there
    pickle.loads(later)
    assert ATTACKS["own_attack"].about == "second"


def test_functions_of_own_modules_travel_however_they_are_used(tmp_path, monkeypatch):
    """Another process can't import the module, and would not know what the script has changed in it."""
    (tmp_path / "own.py").write_text(
        "import numpy as np\nVALUE = 0\ndef f(labels, *_): return np.full_like(labels, VALUE)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = import_module("own")
    own.VALUE = 1
    used = {"itself": own.f, "partial": partial(own.f), "by another": lambda labels, *_: own.f(labels)}
    for name, poison in used.items():
        ATTACKS["own_attack"] = Attack(name, poison=poison)
        sent = pickle.dumps(Config(attack="own_attack"))
        del ATTACKS["own_attack"]
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "own")
            patch.setattr(sys, "path", [])
            pickle.loads(sent)
            assert ATTACKS["own_attack"].poison(np.zeros(2, int), 1.0, None).tolist() == [1, 1], name


def test_the_file_that_was_hashed_is_the_one_that_runs(tmp_path):
    """Python takes a compiled copy for fresh if size and time of the file are the same."""
    for value in (1, 2):
        path = tmp_path / "own.py"
        path.write_text(f'from lab.attacks import ATTACKS, Attack\nATTACKS["own_attack"] = Attack("{value}")\n')
        os.utime(path, (0, 0))
        if value == 1:
            py_compile.compile(str(path))
        plugins.load(str(path))
        assert ATTACKS["own_attack"].about == str(value)
        plugins.loaded.clear()
        del sys.modules["own"]


def test_plugins_add_up(plugin, tmp_path, capsys):
    (tmp_path / "second.py").write_text('from lab.rules import RULES\nRULES["second"] = lambda W, weights, f: W[0]\n')
    assert main(["--plugin", str(plugin), "--plugin", str(tmp_path / "second.py"), "--list"]) == 0
    assert {"own_attack", "second"} <= set(capsys.readouterr().out.split())
    assert {Path(path).name for path in plugins.loaded} == {"own.py", "second.py"}
    del sys.modules["second"]


@pytest.mark.parametrize("name", ["a b", "a-b", "../a", ""])
def test_a_name_that_does_not_fit_into_a_folders_name_is_refused(name):
    RULES[name] = RULES["mean"]
    with pytest.raises(ValueError, match="must have a name of letters, digits and underscores"):
        Config(rule=name)


def test_an_entry_named_like_a_setting_has_a_folder_of_its_own():
    ATTACKS["clients20"] = ATTACKS["nan"]
    assert Config(attack="clients20").name == "nomad-attackclients20-s0" != Config(clients=20).name


def test_an_entry_that_replaces_one_of_ours_is_brought_along(monkeypatch):
    own = Attack("does nothing")
    monkeypatch.setitem(ATTACKS, "nan", own)
    sent = pickle.dumps(Config(attack="nan"))
    monkeypatch.undo()
    assert ATTACKS["nan"].submit is not None  # the negative control
    monkeypatch.setitem(ATTACKS, "nan", ATTACKS["nan"])
    pickle.loads(sent)
    assert ATTACKS["nan"] == own


def test_functions_that_can_not_be_sent_are_refused_in_one_line(tmp_path, capsys, quick):
    lock = threading.Lock()
    ATTACKS["own_attack"] = Attack("holds a lock", poison=lambda labels, share, rng: labels[: lock.locked() or None])
    words = ["--rounds", "1", "--dataset", "phantom", "--attack", "own_attack", "--out", tmp_path]
    line = refusal(capsys, *words, "--seeds", "2")
    assert "attack own_attack can't be sent to another process" in line and "load this file with --plugin" in line
    assert main([*map(str, words)]) == 0  # a single run needs no other process


def test_several_threads_can_send_configs_at_once(plugin, monkeypatch):
    """A thread waits while another one sends: cloudpickle's list of modules belongs to all threads."""
    import cloudpickle

    plugins.load(str(plugin))
    config, dumps, errors = Config(attack="own_attack"), cloudpickle.dumps, []

    def send() -> None:
        try:
            pickle.dumps(config)
        except ValueError as error:
            errors.append(error)

    def slow(entry):
        monkeypatch.setattr(cloudpickle, "dumps", dumps)
        other.start()
        other.join(0.1)  # it is not done before this one is
        return dumps(entry)

    other = threading.Thread(target=send)
    monkeypatch.setattr(cloudpickle, "dumps", slow)
    send()
    other.join()
    assert not errors


def test_what_can_not_be_sent_is_refused_before_folders_are_emptied(tmp_path, capsys, quick):
    words = ["--rounds", "1", "--dataset", "phantom", "--attack", "own_attack", "--out", str(tmp_path)]
    lock = threading.Lock()
    ATTACKS["own_attack"] = Attack("holds a lock", poison=lambda labels, share, rng: labels[: lock.locked() or None])
    assert main(words) == 0
    before = sorted(tmp_path.rglob("*"))
    assert "can't be sent" in refusal(capsys, *words, "--seeds", "2", "--overwrite")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("entry", [lambda labels, share, rng: labels, "label_flip", None])
def test_an_attack_that_is_no_attack_is_listed_and_refused(entry, capsys):
    ATTACKS["own_attack"] = entry
    assert main(["--list"]) == 0 and "\n  own_attack" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"attack own_attack must be an Attack, such as Attack\(about, poison=function\)"
    ):
        Config(attack="own_attack")


@pytest.mark.parametrize("kind", ["rule", "partition"])
def test_a_rule_or_partition_that_is_no_function_is_refused(kind):
    plugins.REGISTRIES[kind]["own"] = 5
    with pytest.raises(ValueError, match=f"{kind} own must be a function"):
        Config(**{kind: "own"})


def no_promise_kept() -> dict:
    """Entries that break one promise each, by what the error says."""
    image = np.arange(400)
    return {
        ("rule", "round 1: own must return 21166 numbers; it returned"): [
            lambda W, weights, f: None,
            lambda W, weights, f: W.mean(1),
            lambda W, weights, f: W.mean(),
            lambda W, weights, f: W[0].astype(str),
            lambda W, weights, f: W[0] * np.nan,
        ],
        ("partition", "the partition must return 4 arrays of image numbers, .* 0 to 399 once each"): [
            lambda *_: None,
            lambda *_: np.array_split(image, 3),
            lambda *_: np.array_split(image[1:], 4),
            lambda *_: np.array_split(image.astype(float), 4),
            lambda *_: [image] * 4,
            lambda *_: np.split(image, [1, 200, 300]),
        ],
        ("attack", "the attack's poison must return 100 labels, each 0 or 1"): [
            Attack("", lambda labels, *_: None),
            Attack("", lambda labels, *_: 1),
            Attack("", lambda labels, *_: labels[:-1]),
            Attack("", lambda labels, *_: labels + 1),
            Attack("", lambda labels, *_: labels * 0.5),
        ],
        ("attack", r"round 1: the attack's submit must return a tensor of shape \[1, 21166\]"): [
            Attack("", submit=lambda W, w, rng: None),
            Attack("", submit=lambda W, w, rng: W[0]),
            Attack("", submit=lambda W, w, rng: W.numpy()),
        ],
    }


@pytest.mark.parametrize(
    ("kind", "said", "entry"),
    [(kind, said, entry) for (kind, said), entries in no_promise_kept().items() for entry in entries],
)
def test_an_entry_that_breaks_its_promise_ends_in_one_line(kind, said, entry, small):
    """Without the checks, numpy would take many of these for something else, without a word."""
    if kind == "rule":
        entry.__name__ = "own"
    plugins.REGISTRIES[kind]["own"] = entry
    with pytest.raises(ValueError, match=said):
        simulate(Config(rounds=1, clients=4, malicious=0.25, **{kind: "own"}), dataset=small)


def test_what_an_entry_does_to_its_arguments_changes_nothing_else(small):
    """These functions return what ours do, and then spoil all arrays that they were given."""

    def poison(labels, fraction, rng):
        flipped = 1 - labels
        labels[:] = 0
        return flipped

    def submit(W, w, rng):
        copy = W.double()
        for tensor in (W, w):
            tensor.zero_()
        return copy

    def rule(W, weights, f):
        w = RULES["mean"](W, weights, f)
        W[:], weights[:] = 0, 0
        return w

    def partition(labels, clients, concentration, rng):
        labels[:] = 0
        return PARTITIONS["iid"](labels, clients, concentration, rng)

    own = {"attack": Attack("", poison, submit), "rule": rule, "partition": partition}
    for kind, entry in own.items():
        plugins.REGISTRIES[kind]["own"] = entry
    ours, run = Config(rounds=2, clients=4, malicious=0.25), {"dataset": small}
    right, found = simulate(ours, **run), simulate(replace(ours, **dict.fromkeys(own, "own")), **run)
    assert found.rounds.equals(right.rounds) and np.array_equal(found.weights, right.weights)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
exec(open({plugin!r}).read())
if __name__ == "__main__":
    from madsim import Config, simulate
    from harness.cli import main
    words = {words!r} + sys.argv[1:]
    for seeds in ("1", "2"):
        assert main([*words, "--seeds", seeds, "--out", {out!r} + seeds]) == 0
    from joblib import Parallel, delayed
    config = Config(rounds=2, clients=4, malicious=0.25, dataset="phantom", **{names!r})
    together = Parallel(2)(delayed(simulate)(config) for _ in range(2))
    assert all(run.rounds.equals(simulate(config).rounds) for run in together)
"""


@pytest.mark.slow
def test_a_script_and_a_plugin_reach_processes_and_give_the_same_bytes(plugin, tmp_path):
    """The seed 0 of two seeds is the single run. The script defines its functions itself."""
    (tmp_path / "script.py").write_text(
        SCRIPT.format(here=str(HERE), plugin=str(plugin), words=SHORT, out=str(tmp_path / "out"), names=NAMES)
    )
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True, capture_output=True, timeout=200)
    out, err = command(*SHORT, "--seeds", "2", "--plugin", plugin, "--out", tmp_path / "by").communicate(timeout=100)
    assert "2 runs" in out, err
    (one,) = (tmp_path / "out1").glob("*s0/clients.csv")
    assert one.read_bytes() == next((tmp_path / "out2").glob("*s0/clients.csv")).read_bytes()
    assert one.read_bytes() == next((tmp_path / "by").glob("*s0/clients.csv")).read_bytes()


@pytest.mark.slow
def test_plugins_and_scripts_reach_a_cluster_as_the_reference_starts_it(plugin, tmp_path):
    """The scheduler and the workers start in another folder. First they can't find madsim, then they can."""
    pytest.importorskip("distributed")
    (tmp_path / "elsewhere").mkdir()

    def dask(*words: str, path: str = str(HERE)) -> subprocess.Popen:
        words = [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:], "--no-dashboard"]
        place = {"cwd": tmp_path / "elsewhere", "env": os.environ | {"PYTHONPATH": path}}
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **place)

    started = []
    try:
        for path, port, status in (("", "8797", 2), (str(HERE), "8798", 0)):
            address = f"tcp://127.0.0.1:{port}"
            started.append(dask("scheduler", "--host", "127.0.0.1", "--port", port, path=path))
            started.append(dask("worker", address, "--nworkers", "2", "--nthreads", "1", path=path))
            words = [*SHORT, "--seeds", "2", "--plugin", plugin, "--backend", "dask", "--scheduler", address]
            process = command(*words, "--out", tmp_path / "out")
            _, err = process.communicate(timeout=100)
            assert process.returncode == status, err
            if status:
                assert "can't find madsim's modules; start it with PYTHONPATH=" in err and err.count("\n") == 1
        plugin.write_text(PLUGIN + "# changed while the workers run\n")
        process = command(*words, "--overwrite", "--out", tmp_path / "out")
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and "the cluster can't take the runs: plugin" in err and "Traceback" not in err
        plugin.write_text(PLUGIN)
    finally:
        for process in started:
            process.terminate()
            process.communicate(timeout=30)
    assert command(*SHORT, "--plugin", plugin, "--out", tmp_path / "here").wait(timeout=100) == 0
    here, there = (next((tmp_path / place).glob("*s0/clients.csv")) for place in ("here", "out"))
    assert here.read_bytes() == there.read_bytes()
