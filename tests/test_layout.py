"""Tests of which file may import which other file. ast finds the imports, also those inside functions."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE

PAPER = {"data", "model", "trust"}
LAB, HARNESS = ({f"{folder}.{path.stem}" for path in (HERE / folder).glob("*.py")} for folder in ("lab", "harness"))
REGISTRIES = {"lab.attacks", "lab.rules", "lab.partitions"}
READERS = {"harness.runs", "harness.drawing", "harness.folder", "harness.console", "harness.pages"}
OURS = PAPER | LAB | HARNESS | {"madsim", "plot"}
MAY = {  # file -> our files that it may import
    **{leaf: set() for leaf in PAPER},
    **{registry: PAPER for registry in REGISTRIES},
    "lab.privacy": PAPER,
    "lab.experiments": REGISTRIES | {"harness.folder", "harness.runs"},
    "lab.figures": READERS,
    "madsim": PAPER | REGISTRIES | {"harness.log", "harness.folder", "harness.jobs", "harness.plugins"},
    "plot": READERS | {"lab.figures"},
    "harness.needs": set(),
    "harness.folder": set(),
    "harness.plugins": REGISTRIES,
    "harness.log": {"trust", "lab.privacy", "harness.plugins", "harness.console", "harness.folder", "harness.runs"},
    "harness.jobs": {"harness.folder", "harness.console"},
    "harness.runs": {"harness.folder", "harness.console"},
    "harness.drawing": {"harness.folder", "harness.runs"},
    "harness.pages": {"harness.runs", "harness.folder", "harness.console"},
    "harness.console": PAPER | LAB | {"harness.folder", "harness.log", "harness.runs"},
    "harness.png": {"data", "madsim", "lab.attacks", "harness.cli", "harness.console"},
    "harness.cli": PAPER | LAB | HARNESS | {"madsim"},
}

COMMANDS = {"madsim": "harness.cli", "data": "harness.png"}  # files that are commands -> their command lines
SCRIPTS = {*COMMANDS, "plot", "bench.bench"}  # files that first check what they need


def path_of(module: str) -> Path:
    return HERE / (module.replace(".", "/") + ".py")


def imports(tree: ast.AST) -> set[str]:
    """The modules that are imported anywhere below a node. `from lab import rules` gives both lab and lab.rules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def check_of(tree: ast.Module) -> int:
    """Remove the statement with which a script checks what it needs, and return its place."""
    place = next(i for i, each in enumerate(tree.body) if re.search(r"check('])?\(__name__", ast.unparse(each)))
    check = tree.body.pop(place)
    assert not isinstance(check, ast.If) or ast.unparse(check.test) == "__name__ == '__main__'"
    assert imports(check) & OURS <= {"harness.needs"}
    return place


def test_every_file_has_a_rule():
    files = {path.stem for path in HERE.glob("*.py")}
    files |= {f"{f}.{path.stem}" for f in ("lab", "harness") for path in (HERE / f).glob("*.py")}
    assert {file for file in files if not file.endswith("__init__")} == MAY.keys()


@pytest.mark.parametrize("module", MAY)
def test_each_file_imports_only_what_it_may(module):
    tree = ast.parse(path_of(module).read_text())
    if module in COMMANDS:  # its last lines call the command line
        last = tree.body.pop()
        assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
        assert imports(last) & OURS == {COMMANDS[module], "harness.console"}
    if module in SCRIPTS:
        check_of(tree)
    found = imports(tree)
    assert found & OURS <= MAY[module]
    assert not any(name.split(".")[0] in ("bench", "tests") for name in found)
    if module in ("plot", "lab.figures", *READERS):
        assert not any(name.split(".")[0] in ("torch", "model") for name in found)


@pytest.mark.parametrize("module", SCRIPTS)
def test_a_script_checks_what_it_needs_before_it_imports_it(module):
    tree = ast.parse(path_of(module).read_text())
    before = imports(ast.Module(tree.body[: check_of(tree)], []))
    assert {name.split(".")[0] for name in before} <= sys.stdlib_module_names


def test_one_function_writes_the_files_that_are_written_at_once():
    """`replace_file` leaves the old or the new file, so nobody reads half of one."""
    others = {"write_text", "write_bytes", "savez", "to_csv", "savefig"}
    called = {
        (module, ast.unparse(call))
        for module in MAY
        for call in ast.walk(ast.parse(path_of(module).read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in others
    }
    into_memory = {f"{table}.to_csv(index=False)" for table in ("table", "spans", "leakage")}
    into_memory |= {"np.savez(content, **arrays)", "figure.savefig(content, format=file.suffix[1:], **options)"}
    assert {text for _, text in called} == into_memory


def test_the_leaves_never_see_a_config():
    for module in PAPER:
        names = {node.id for node in ast.walk(ast.parse(path_of(module).read_text())) if isinstance(node, ast.Name)}
        assert "Config" not in names


def test_imports_are_read_from_anywhere_in_a_file():
    """The negative control: an import inside a function and an import of a submodule are found."""
    tree = ast.parse("def f():\n    from lab import rules\n    import harness.cli")
    assert imports(tree) == {"lab", "lab.rules", "harness.cli"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("madsim", ("torch", "pandas", "sklearn")),
        ("harness.cli", ("torch", "pandas", "sklearn", "matplotlib")),
        ("trust", ("torch", "sklearn")),
        ("data", ("torch",)),
        ("plot", ("torch", "pandas", "matplotlib")),
    ],
)
def test_heavy_packages_are_imported_where_they_are_used(module, absent):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert not set(absent) & set(loaded.split())


@pytest.mark.slow
def test_what_the_script_runs_is_pickled_as_the_module_madsim():
    code = """
import pickle, runpy, sys
sys.argv = ["madsim.py", "--list"]
try:
    runpy.run_path("madsim.py", run_name="__main__")
except SystemExit:
    pass
from harness import cli
print("pickled", b"__main__" in pickle.dumps([cli.Config(), cli.simulate]), cli.Config.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "pickled False madsim"
