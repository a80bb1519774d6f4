"""Whether this Python can run madsim. The scripts ask this before they import anything else.

So this file runs on any Python from 3.8 on, and without any package. They run it by its path, because `import harness`
may find another folder of this name.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill

HERE = Path(__file__).resolve().parents[1]  # madsim's folder
OLDEST = (3, 11)  # the oldest Python that the tests have passed with
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"  # as in the README
OURS = ("data", "model", "trust", "lab", "harness")  # what `import madsim` imports of ours
MODULES = {"scikit-learn": "sklearn"}  # packages whose modules have another name


def check(caller, modules=OURS, packages=()):
    """Check what a script needs. `caller` is its `__name__`.

    A command finds our files first, also with Python's options -P and -I. It ends with one line and exit status 2 if
    Python is too old or if one of the `packages` (by default, all of requirements.txt) is missing. An import raises
    ImportError if Python finds another file for one of our `modules`.
    """
    if caller != "__main__":
        return refuse_others(modules)
    if sys.path[0] != str(HERE):
        sys.path.insert(0, str(HERE))
    if sys.version_info < OLDEST:
        oldest, this = (".".join(map(str, version[:3])) for version in (OLDEST, sys.version_info))
        refuse(f"Python {oldest} or newer is needed; this is Python {this}. With a newer one: {SET_UP}")
    missing = [name for name in packages or required() if not find_spec(MODULES.get(name, name))]
    if missing:
        way = f"use .venv/bin/python. To set it up, run in madsim's folder: {SET_UP}"
        refuse(f"missing packages: {', '.join(missing)}; {way}")


def refuse_others(modules):
    """Raise ImportError if Python finds another file for one of our modules."""
    for name in modules:
        try:
            spec = find_spec(name)
        except ValueError:  # a module without a spec, which another program has made
            spec = None
        found = spec and spec.origin and Path(spec.origin).resolve()  # None if there is none
        if found and found.parent not in (HERE, HERE / name):
            way = f"rename it, or put {HERE} first in sys.path; then start Python anew"
            raise ImportError(f"`import {name}` finds {found}, not madsim's {name}; {way}")


def required():
    """The names of the packages in requirements.txt."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    return [line.split(">=")[0] for line in lines if not line.startswith("#")]


def refuse(reason):
    """End the program with this reason, in one line if no terminal folds it, and exit status 2."""
    text = f"{Path(sys.argv[0]).stem}: {reason}"
    if sys.stderr and sys.stderr.isatty():  # None: closed by the caller
        text = fill(text, get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    print(text, file=sys.stderr)
    sys.exit(2)
