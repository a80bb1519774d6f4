"""Tests of harness/needs.py: a script that lacks something ends with one line that says what, and with status 2."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

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


def bare(*words: str, packages: str = "", cwd: Path = HERE) -> subprocess.CompletedProcess:
    """Run Python without installed packages, except those in the folders `packages`."""
    environment = {**os.environ, "PYTHONPATH": packages}
    return subprocess.run([sys.executable, "-S", *words], cwd=cwd, env=environment, capture_output=True, text=True)


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


# ---------------------------------------------------------------- other files with our names


@pytest.mark.parametrize("name", ["data.py", "model/__init__.py", "trust.py", "lab/__init__.py", "harness/__init__.py"])
@pytest.mark.parametrize("script", ["madsim", "plot"])
def test_a_file_that_hides_one_of_ours_is_named(script, name, tmp_path):
    """A folder of a user has such a file, and is searched first. `plot` imports only lab and harness."""
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("1 / 0")  # it is not run
    last = bare("-c", f"import {script}", packages=str(HERE), cwd=tmp_path).stderr.splitlines()[-1]
    module = name.split("/")[0].removesuffix(".py")
    if script == "plot" and module not in ("lab", "harness"):
        assert last == "ModuleNotFoundError: No module named 'numpy'"
    else:
        way = f"rename it, or put {HERE} first in sys.path; then start Python anew"
        assert last == f"ImportError: `import {module}` finds {other}, not madsim's {module}; {way}"


def test_a_module_that_is_imported_already_is_named(tmp_path):
    (tmp_path / "data.py").touch()
    code = f"import data, sys; sys.path.insert(0, {str(HERE)!r}); import madsim"
    assert f"ImportError: `import data` finds {tmp_path / 'data.py'}, not" in bare("-c", code, cwd=tmp_path).stderr


def test_folders_without_code_and_links_to_our_files_hide_nothing(tmp_path):
    """A folder `data` with images, for example. The third folder has links to all of our files."""
    here, linked = tmp_path / "here", tmp_path / "linked"
    for folder in (here / "data", here / "lab", linked):
        folder.mkdir(parents=True)
    for path in (*HERE.glob("*.py"), HERE / "lab", HERE / "harness"):
        (linked / path.name).symlink_to(path)
    for folder in (str(HERE), str(linked)):
        done = bare("-c", "import madsim", packages=folder, cwd=here)
        assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'numpy'"


@pytest.mark.parametrize("option", ["-P", "-I"])
@pytest.mark.parametrize(
    ("script", "words"),
    [pytest.param("madsim", "--list", marks=pytest.mark.slow), ("data", "--help"), ("plot", "--help")],
)
def test_a_command_finds_our_files_first_also_with_an_option_that_hides_them(script, words, option, tmp_path):
    for name in ("data", "harness"):
        (tmp_path / f"{name}.py").write_text("1 / 0")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, option, HERE / f"{script}.py", words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout) > 500


# ---------------------------------------------------------------- versions


def test_an_old_python_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench/bench.py"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
        needs.check("__main__")
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == f"bench: Python 3.11 or newer is needed; this is Python 3.10.13. With a newer one: {needs.SET_UP}\n"
    )


def test_where_nothing_is_missing_nothing_is_said(capsys):
    needs.check("__main__")
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
