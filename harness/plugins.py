"""Attacks, rules and partitions of one's own: how they are loaded, and how they reach other processes."""

import hashlib
import os
import pickle
import shlex
import sys
import warnings
from contextlib import ExitStack
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

from lab.attacks import ATTACKS
from lab.partitions import PARTITIONS
from lab.rules import RULES

REGISTRIES: dict[str, dict[str, Any]] = {"attack": ATTACKS, "rule": RULES, "partition": PARTITIONS}
OURS = {"madsim", "data", "model", "trust", "plot", "lab", "harness", "bench"}  # madsim's modules and packages
SHOWN = 12  # digits of a SHA-256 in messages
SENDER = RLock()  # cloudpickle keeps one list of modules for all threads

loaded: dict[str, str] = {}  # the plugins of this process: absolute path or module name -> SHA-256 of the file
arrived: dict[tuple[str, str], Any] = {}  # entries that other processes have sent, by kind and name


def load(plugin: str, sha256: str | None = None) -> None:
    """Import a plugin: a Python file, or a module by its name. It adds its entries to the registries.

    Raises ValueError if that fails, or if the file's SHA-256 is not the given one.
    """
    is_file = plugin.endswith(".py")
    name = Path(plugin).stem if is_file else plugin
    plugin = str(Path(os.path.expanduser(plugin)).resolve()) if is_file else plugin  # also in `--plugin=~/own.py`
    try:
        spec = spec_from_file_location(name, plugin) if is_file else find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError("there is no such module; name its file, or add its folder to PYTHONPATH")
        content = Path(spec.origin).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if {found} != {found, loaded.get(plugin, found), sha256 or found}:
            raise ValueError(f"its SHA-256 is {found[:SHOWN]}; the one in use has another")
        if plugin not in loaded:
            execute(name, spec, content) if is_file else import_module(name)
    except Exception as error:  # a plugin can raise anything
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        reason = getattr(error, "strerror", None) or error  # without the path, which would come twice
        raise ValueError(f"plugin {plugin} can't be loaded: {kind}{reason}") from None
    loaded[plugin] = found


def execute(name: str, spec: ModuleSpec, content: bytes) -> None:
    """Import a file with this spec and content under a new name. Raises ValueError if another module has the name.

    It runs the content that was read, because Python might run a compiled copy of an older one.
    """
    known = find_spec(name)
    if name in sys.modules or (known and Path(known.origin or "").resolve() != Path(str(spec.origin))):
        raise ValueError(f"another module has the name {name}; rename the file")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        exec(compile(content, str(spec.origin), "exec"), vars(module))
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
        if not isinstance(name, str):
            continue
        if name not in registry:
            file = shlex.join(Path(plugin).name for plugin in written.get("plugins") or ["FILE"])
            raise ValueError(f"{path} names the {kind} {name!r}, which is unknown here; load it with --plugin {file}")
        registry[name]  # a rule of byzfl says here that this package is missing


def depart(config: Any) -> tuple:
    """What pickle needs to rebuild a Config in another process, with its attack, rule and partition.

    Entries of the user's own, and the functions that they use from the user's files, travel by value. Raises ValueError
    if one of them can't be pickled.
    """
    try:
        import cloudpickle
    except ImportError:  # joblib before 1.6 brings its own
        from joblib.externals import cloudpickle

    names = {kind: getattr(config, kind) for kind in REGISTRIES}
    entries = {  # byzfl's rules are in no registry: they are made when they are asked for
        kind: registry[names[kind]]
        for kind, registry in REGISTRIES.items()
        if names[kind] in registry.keys()  # noqa: SIM118
    }
    by_value: dict[str, bytes] = {}
    with SENDER, ExitStack() as after:
        for module in [module for name, module in [*sys.modules.items()] if is_own(name, module)]:
            cloudpickle.register_pickle_by_value(module)
            after.callback(cloudpickle.unregister_pickle_by_value, module)
        for kind, entry in entries.items():
            try:
                by_value[kind] = cloudpickle.dumps(entry)
            except Exception as error:  # pickle raises many types
                raise ValueError(
                    f"{kind} {getattr(config, kind)} can't be sent to another process ({error}); "
                    f"write its functions in a file of their own, and load this file with --plugin"
                ) from None
    return arrive, (type(config), vars(config), dict(loaded), by_value)


def is_own(name: str, module: Any) -> bool:
    """Whether a module is the user's own file, which other processes may not find. cloudpickle knows `__main__`."""
    if not isinstance(module, ModuleType) or module.__name__ != name:  # packages put other things there, too
        return False
    file = vars(module).get("__file__") or "site-packages"
    others = {"__main__", "__mp_main__", *OURS, *sys.stdlib_module_names}
    return "site-packages" not in file and name.split(".")[0] not in others


def is_ours(entry: Any) -> bool:
    """Whether all functions of a registry's entry are madsim's."""
    functions = [part for part in (entry, *getattr(entry, "__dict__", {}).values()) if callable(part)]
    return all(str(getattr(function, "__module__", None)).split(".")[0] in OURS for function in functions)


def arrive(of: type, values: dict[str, Any], plugins: dict[str, str], by_value: dict[str, bytes]) -> Any:
    """Rebuild what `depart` has taken apart: load the plugins, register the entries, check the Config again.

    An entry that this process has registered itself stays: the Config of a result that comes home changes nothing.
    """
    for plugin, sha256 in plugins.items():
        load(plugin, sha256)
    for kind, entry in by_value.items():
        registry, name = REGISTRIES[kind], values[kind]
        there, key = registry.get(name), (kind, name)
        if there is None or there is arrived.get(key) or is_ours(there):
            registry[name] = arrived[key] = pickle.loads(entry)
    with warnings.catch_warnings(action="ignore"):  # the sender has shown them
        return of(**values)
