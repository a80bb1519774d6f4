"""Tests of harness/needs.py: a script that lacks something ends with one line that says what, and with status 2."""

import ast
import importlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import HERE, refusal
from torch.torch_version import TorchVersion

from harness import needs, png

SCRIPTS = ("madsim.py", "data.py", "plot.py", "bench/bench.py")
WAY = (
    "use .venv/bin/python. To set it up, run in madsim's folder: "
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt\n"
)


def bare(*words: str, packages: str = "") -> subprocess.CompletedProcess:
    """Run Python without installed packages, except those in the folder `packages`."""
    environment = {**os.environ, "PYTHONPATH": packages}
    return subprocess.run([sys.executable, "-S", *words], cwd=HERE, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_missing_packages_are_named_in_one_line(script):
    done = bare(script, "results")
    name = script.split("/")[-1].removesuffix(".py")
    needed = "numpy, pandas, matplotlib" if name == "plot" else "numpy, torch, medmnist, scikit-learn, matplotlib"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: missing packages: {needed}; {WAY}"


def test_missing_packages_are_named_on_standard_output_if_standard_error_is_closed():
    words = f"{sys.executable} -S madsim.py 2>&-"
    done = subprocess.run(["bash", "-c", words], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("madsim: missing packages: numpy, ")


def test_only_what_is_missing_is_named(tmp_path):
    for module in ("numpy", "torch", "medmnist", "matplotlib"):
        (tmp_path / f"{module}.py").touch()
    assert bare("madsim.py", packages=str(tmp_path)).stderr == f"madsim: missing packages: scikit-learn; {WAY}"


@pytest.mark.parametrize("module", ["madsim", "data", "plot"])
def test_an_import_raises_as_usual(module):
    done = bare("-c", f"import {module}")
    assert done.returncode == 1 and done.stderr.endswith("\nModuleNotFoundError: No module named 'numpy'\n")


def test_an_old_python_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench/bench.py"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
        needs.check()
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == f"bench: Python 3.11 or newer is needed; this is Python 3.10.13. With a newer one: {needs.SET_UP}\n"
    )


def test_where_nothing_is_missing_nothing_is_said(capsys):
    needs.check()
    assert capsys.readouterr() == ("", "")


def test_the_scripts_can_be_read_by_an_old_python():
    """So it comes as far as the check. The last lines are the negative control."""
    for script in (*SCRIPTS, "harness/needs.py", "harness/__init__.py"):
        ast.parse((HERE / script).read_text(), feature_version=(3, 8))
    with pytest.raises(SyntaxError):
        ast.parse("match 1:\n    case 1: pass", feature_version=(3, 8))


def pretend(version: str, monkeypatch) -> None:
    """Give torch another version, and forget the file that checks it."""
    importlib.import_module("model")
    monkeypatch.delitem(sys.modules, "model")
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))


@pytest.mark.parametrize("version", ["1.13.1", "2.6.0+cu124", "2.3.1"])
def test_an_old_torch_is_refused_in_one_line(version, quick, monkeypatch, capsys, tmp_path):
    pretend(version, monkeypatch)
    reason = f"torch 2.7 or newer is needed; this is torch {version}; pip install -r requirements.txt updates it"
    with pytest.raises(ImportError, match=f"^{reason.replace('+', '[+]')}$"):
        importlib.import_module("model")
    assert refusal(capsys, "--rounds", "2", "--dataset", "phantom", "--out", tmp_path) == f"madsim: {reason}\n"
    with pytest.raises(SystemExit) as stop:
        png.main(["--png", str(tmp_path / "png"), "--dataset", "phantom"])
    assert stop.value.code == 2 and capsys.readouterr().err == f"data.py: {reason}\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["2.7.1+cpu", "2.14.1", "3.0.0"])
def test_a_newer_torch_is_taken(version, monkeypatch):
    """2.14 comes after 2.7, although its text comes before."""
    pretend(version, monkeypatch)
    assert importlib.import_module("model").PARAMETERS == 21166
