"""A run's folder: what lies there is written so that nothing is lost, and read so that nothing gets in.

Files are replaced whole, a run that is going locks its folder, and a checkpoint is checked before it is believed.
Errors are ValueError for what is damaged or is not what was asked for, OSError for what can't be read or written.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

CHECKPOINT = "checkpoint.npz"
DIGITS = 6  # significant digits of every number written: more than float32 holds after an average

# ---------------------------------------------------------------- what a folder holds


def hollow(folder: Path) -> bool:
    """Whether a run was killed as its folder was made, before anything was recorded: the checkpoint comes last."""
    made = {"config.json", "samples.npz", "rounds.csv", "clients.csv", "membership.csv", "plane.csv"}
    made |= {f"{name}.part" for name in (*made, CHECKPOINT)}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= made


def complete(folder: Path) -> bool:
    """Whether the run of a folder has come to its end."""
    with suppress(OSError, ValueError):
        return read_json(folder / "summary.json").get("complete") is True
    return False


def unfinished(folders: Iterable[Path]) -> list[Path]:
    """Those of the folders that hold a run which was cut short and can be resumed."""
    return [folder for folder in folders if (folder / CHECKPOINT).is_file() and not complete(folder)]


def data_md5(folder: Path) -> str | None:
    """The MD5 of the data that a run was begun with."""
    about = read_json(folder / "config.json").get("data")
    return about.get("md5") if isinstance(about, dict) else None


def seeds_in(folder: Path) -> list[int]:
    """The seeds of the runs that lie in a folder, by their names."""
    names = [re.search(r"-s(\d+)$", path.name) for path in folder.iterdir()]
    return [int(found[1]) for found in names if found]


def refuse_folder(folder: Path, replaceable: bool) -> None:
    """ValueError if a folder that exists may not be replaced, is no run's, or is being written."""
    if not replaceable:
        way_out = "; --resume goes on with it" if unfinished([folder]) else ""
        raise ValueError(f"{folder} exists; add --overwrite to replace it, or --out DIR for another place{way_out}")
    if not hollow(folder) and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} exists and is not a run's folder; it is not replaced")
    if (folder / "rounds.csv").is_file():
        with open(folder / "rounds.csv", "rb") as file:
            lock(file)


def lock(file) -> None:
    """ValueError if another process is writing this file. The lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{Path(file.name).parent} is being written by another run of madsim") from None


# ---------------------------------------------------------------- going on from a checkpoint


def identity(about: dict) -> dict:
    """What may not change while a run is interrupted, of a Config as a dict or of what config.json holds: all settings
    but where the data lie and the threads."""
    apart = {"settings", "data_root", "threads", "command", "git", "versions", "machine", "data", "resumed"}
    return {name: value for name, value in (about | about["settings"]).items() if name not in apart}


def refuse_changes(folder: Path, begun: dict, now: dict) -> None:
    """ValueError, naming them, if what a run was begun with and what it shall go on with differ."""
    changed = [f"{name} {begun.get(name)}, not {value}" for name, value in now.items() if begun.get(name) != value]
    if changed:
        raise ValueError(f"{folder} was begun with {', '.join(changed)}; a run can't change on the way")


def read_checkpoint(path: Path, kinds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint; ValueError unless they are of the `kinds` and can be those of a run."""
    if not path.is_file():
        raise ValueError(f"{path.parent} can't be resumed: it holds no {path.name}; run it again with --overwrite")
    try:
        with np.load(path, allow_pickle=False) as found:
            if any(member.file_size != member.compress_size for member in found.zip.infolist()):
                raise ValueError("it is compressed")  # madsim's never are; a small file could then fill the memory
            arrays = dict(found)
        check_kinds(arrays, kinds)
        check_numbers(arrays)
        if not isinstance(json.loads(str(arrays["run"])), dict):
            raise ValueError("its settings are no object")
    except OSError:
        raise
    except Exception as error:  # zipfile's, numpy's and zlib's are of a dozen kinds
        raise ValueError(f"{path} is damaged: {error}") from None
    return arrays


def check_kinds(arrays: dict[str, np.ndarray], kinds: dict[str, np.ndarray]) -> None:
    """ValueError unless all arrays are there, with the types and, but for lists over rounds, the shapes of `kinds`."""
    if lacking := (kinds.keys() | {"run"}) - arrays.keys():
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    for name, kind in kinds.items():
        if arrays[name].dtype != kind.dtype or arrays[name].ndim != kind.ndim:
            raise ValueError(f"{name} is {arrays[name].dtype} with {arrays[name].ndim} axes")
        if name not in ("seconds", "kept_rounds") and arrays[name].shape != kind.shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, not {kind.shape}")
    if len(arrays["seconds"]) != arrays["round"]:
        raise ValueError(f"{len(arrays['seconds'])} rounds were timed, not {arrays['round']}")


def check_numbers(arrays: dict[str, np.ndarray]) -> None:
    """ValueError for numbers that no run comes to."""
    scored = np.isfinite(arrays["distance"])  # the others have NaN
    known = np.concatenate([arrays[name][scored] for name in ("d", "reputation", "trust")])
    unknown = np.concatenate([arrays[name][~scored] for name in ("distance", "d", "reputation", "trust")])
    sizes = [arrays[name].ravel() for name in ("spread", "seconds", "marks")]
    sizes = np.concatenate([arrays["distance"][scored], *sizes])
    rounds = arrays["kept_rounds"]
    if not (
        np.isfinite(arrays["w"]).all()
        and arrays["active"].any()
        and ((known >= 0) & (known <= 1)).all()
        and np.isnan(unknown).all()
        and (np.isfinite(sizes) & (sizes >= 0)).all()
        and ((rounds >= 1) & (rounds <= arrays["round"])).all()
    ):
        raise ValueError("its numbers are out of range")


# ---------------------------------------------------------------- files


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that who reads it, also after a kill or on a full disk, finds the old or the new one whole."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with naming(unfinished), open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise


@contextmanager
def naming(path: Path):
    """An OSError within it names the file, as those of writing to an open one do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, content: dict) -> None:
    replace_file(path, (as_json(content, indent=2) + "\n").encode())


def as_json(content: dict, indent: int | None = None) -> str:
    return json.dumps(content, indent=indent, allow_nan=False, default=lambda number: number.item())  # numpy's


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    return content


def without_nan(value):
    """The value with None for every NaN and infinity in it, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
