"""Attacks, rules and partitions of one's own: how they are loaded, and how they reach other processes."""

import hashlib
import pickle
import sys
import warnings
from contextlib import ExitStack
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from threading import RLock
from typing import Any

from lab.attacks import ATTACKS
from lab.partitions import PARTITIONS
from lab.rules import RULES

REGISTRIES: dict[str, dict[str, Any]] = {"attack": ATTACKS, "rule": RULES, "partition": PARTITIONS}
SHOWN = 12  # digits of a SHA-256 in messages
SENDER = RLock()  # cloudpickle keeps one list of modules for all threads

loaded: dict[str, str] = {}  # the plugins of this process: absolute path or module name -> SHA-256 of the file


def load(plugin: str, sha256: str | None = None) -> None:
    """Import a plugin: a Python file, or a module by its name. It adds its entries to the registries.

    Raises ValueError if that fails, or if the file's SHA-256 is not the given one.
    """
    is_file = plugin.endswith(".py")
    name, plugin = (Path(plugin).stem, str(Path(plugin).resolve())) if is_file else (plugin, plugin)
    try:
        spec = spec_from_file_location(name, plugin) if is_file else find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError("there is no such module; name its file, or add its folder to PYTHONPATH")
        found = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
        if {found} != {found, loaded.get(plugin, found), sha256 or found}:
            raise ValueError(f"its SHA-256 is {found[:SHOWN]}; the one in use has another")
        if plugin not in loaded:
            execute(name, spec) if is_file else import_module(name)
    except Exception as error:  # a plugin can raise anything
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"plugin {plugin} can't be loaded: {kind}{error}") from None
    loaded[plugin] = found


def execute(name: str, spec: ModuleSpec) -> None:
    """Import the file of a spec under a new name. Raises ValueError if a module with this name exists."""
    if name in sys.modules:
        raise ValueError(f"another module has the name {name}; rename the file")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]  # a file has a loader
    except BaseException:
        del sys.modules[name]
        raise


def described(found: dict[str, str] | None = None) -> str | None:
    """Plugins in words, each with the start of its SHA-256; those of this process if no others are given. Else None."""
    each = (loaded if found is None else found).items()
    return ", ".join(sorted(f"{Path(plugin).name} ({sha256[:SHOWN]})" for plugin, sha256 in each)) or None


def refuse_unknown(written: dict, path: Path) -> None:
    """Raise ValueError if the content of a config.json, at `path`, names an entry that no registry has."""
    for kind, registry in REGISTRIES.items():
        name = written.get(kind)
        if isinstance(name, str) and name not in registry:
            file = " ".join(Path(plugin).name for plugin in written.get("plugins") or ["FILE"])
            raise ValueError(f"{path} names the {kind} {name!r}, which is unknown here; load it with --plugin {file}")


def depart(config: Any) -> tuple:
    """What pickle needs to rebuild a Config in another process, with its attack, rule and partition.

    Functions of the user's own files travel by value. Raises ValueError if one of them can't be pickled.
    """
    try:
        import cloudpickle
    except ImportError:  # joblib before 1.6 brings its own
        from joblib.externals import cloudpickle

    entries = {kind: registry[getattr(config, kind)] for kind, registry in REGISTRIES.items()}
    by_value: dict[str, bytes] = {}
    with SENDER, ExitStack() as after:
        for module in {name for entry in entries.values() for name in modules_of(entry) if is_own(name)}:
            cloudpickle.register_pickle_by_value(sys.modules[module])
            after.callback(cloudpickle.unregister_pickle_by_value, sys.modules[module])
        for kind, entry in entries.items():
            try:
                by_value[kind] = cloudpickle.dumps(entry)
            except Exception as error:  # pickle raises many types
                name = f"{kind} {getattr(config, kind)}"
                raise ValueError(
                    f"{name} can't be sent to another process ({error}); write its functions in a file of their own, "
                    f"and load this file with --plugin"
                ) from None
    return arrive, (type(config), vars(config), dict(loaded), by_value)


def modules_of(entry: Any) -> set[str]:
    """The names of the modules that define a registry's entry and its functions."""
    return {str(getattr(part, "__module__", None)) for part in (entry, *getattr(entry, "__dict__", {}).values())}


def is_own(module: str) -> bool:
    """Whether a module is the user's own file, which other processes may not find. cloudpickle knows `__main__`."""
    file = getattr(sys.modules.get(module), "__file__", None) or "site-packages"
    others = {"__main__", "data", "trust", "lab", *sys.stdlib_module_names}
    return "site-packages" not in file and module.split(".")[0] not in others


def arrive(of: type, values: dict[str, Any], plugins: dict[str, str], by_value: dict[str, bytes]) -> Any:
    """Rebuild what `depart` has taken apart: load the plugins, register the entries, check the Config again."""
    for plugin, sha256 in plugins.items():
        load(plugin, sha256)
    for kind, entry in by_value.items():
        REGISTRIES[kind][values[kind]] = pickle.loads(entry)
    with warnings.catch_warnings(action="ignore"):  # the sender has shown them
        return of(**values)
