"""A run's folder: files that survive a kill and are checked when they are read.

The functions raise ValueError for damaged or unexpected files, and OSError for files that can't be read or written.
"""

import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

CHECKPOINT = "checkpoint.npz"
VERSION = 2  # of what a run computes. 1: a network with two ReLUs less, K-means from one start, `--spread centre`
LONGEST = 240  # bytes of a run's name: its longest file is trust-NAME.png.part, and file systems allow 255
DIGITS = 6  # significant digits of all written numbers: more than an average of float32 numbers holds


def hollow(folder: Path) -> bool:
    """Whether a run was killed while its folder was created, before its first checkpoint."""
    made = {"config.json", "samples.npz", "rounds.csv", "clients.csv", "membership.csv", "plane.csv", "leakage.csv"}
    made |= {f"{name}.part" for name in (*made, CHECKPOINT)}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= made


def complete(folder: Path) -> bool:
    """Whether the run of a folder is complete."""
    with suppress(OSError, ValueError):
        return read_json(folder / "summary.json").get("complete") is True
    return False


def unfinished(folders: Iterable[Path]) -> list[Path]:
    """The folders with an interrupted run that can be resumed."""
    return [folder for folder in folders if (folder / CHECKPOINT).is_file() and not complete(folder)]


def data_md5(folder: Path) -> str | None:
    """The MD5 of the data set of a run."""
    about = read_json(folder / "config.json").get("data")
    return about.get("md5") if isinstance(about, dict) else None


def refuse_folder(folder: Path, replaceable: bool) -> None:
    """Raise ValueError if an existing folder may not be replaced, is not a run's folder, or is being written."""
    if not replaceable:
        way_out = "; --resume continues it" if unfinished([folder]) else ""
        raise ValueError(f"{folder} exists; add --overwrite to replace it, or --out DIR for another place{way_out}")
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link; it is not replaced, remove it yourself or give --out DIR")
    if not hollow(folder) and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} exists and is not a run's folder; it is not replaced")
    if (folder / "rounds.csv").is_file():
        with open(folder / "rounds.csv", "rb") as file:
            lock(file, folder)


@contextmanager
def claimed(folders: Iterable[Path]) -> Iterator[None]:
    """Hold the folders of the runs of a command. They are made if they are absent, and removed if they stay empty.

    Raises ValueError if another command holds one of them. Nothing is held on Windows, which can't lock folders.
    """
    with ExitStack() as held:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if os.name != "nt":
                opened = os.open(folder, os.O_RDONLY)
                held.callback(os.close, opened)
                lock(opened, folder)
            held.callback(remove_if_empty, folder)
        yield


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def empty(folder: Path) -> None:
    """Remove what a folder holds. The folder itself stays, and with it the lock of who has claimed it."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def lock(file: Any, folder: Path) -> None:
    """Lock an open file of a run's folder, or the folder. The lock ends when the file is closed.

    Raises ValueError if another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being written by another run of madsim") from None


def code() -> dict[str, Any]:
    """The git commit of the code, and whether files that it holds have changed since (`dirty`). None if unknown."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    if not git("ls-files", "--error-unmatch", "madsim.py"):  # our folder may lie in a repository of something else
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no", ".")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(status)}


def identity(about: dict) -> dict:
    """The settings that a resumed run must keep, from a Config as a dict or from config.json."""
    apart = {"settings", "data_root", "threads", "command", "git", "versions", "machine", "data", "resumed"}
    apart |= {"plugins", "version", "preset"}  # they are compared by themselves, or say what the settings say
    return {name: value for name, value in (about | about["settings"]).items() if name not in apart}


def refuse_version(folder: Path, about: dict) -> None:
    """Raise ValueError if another version, which would compute other results, began the run."""
    if about.get("version", 1) != VERSION:
        raise ValueError(
            f"{folder} was computed by an earlier version of madsim, whose results differ; it can't continue here. "
            "Run it again with --overwrite, or elsewhere with --out DIR"
        )


def refuse_changes(folder: Path, begun: dict, now: dict, longer: bool = False) -> None:
    """Raise ValueError, with the names, if settings differ between the run as it was begun and now.

    With `longer`, the number of rounds may have grown.
    """
    if longer and isinstance(begun.get("rounds"), int) and begun["rounds"] < now["rounds"]:
        begun = begun | {"rounds": now["rounds"]}
    changed = {name: value for name, value in now.items() if begun.get(name) != value}
    if changed:
        told = ", ".join(f"{name} {begun.get(name)}, not {value}" for name, value in changed.items())
        but = " (--resume can only add rounds)" if longer and begun.get("rounds") != now["rounds"] else ""
        way = "" if longer else "; add --overwrite to replace it, or --out DIR for another place"
        if "data's MD5" in changed:
            way += "; --data-root or MADSIM_DATA names the folder of other data"
        raise ValueError(f"{folder} has {told}; a run can't change its settings{but}{way}")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Postpone Ctrl-C and SIGTERM until the end of the block. Python gives them to the main thread alone."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not Python's
    try:
        for number in before:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def read_checkpoint(path: Path, kinds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint. Raises ValueError for other types or shapes than in `kinds`, or invalid numbers."""
    if not path.is_file():
        raise ValueError(f"{path.parent} can't be resumed: it holds no {path.name}; run it again with --overwrite")
    try:
        with np.load(path, allow_pickle=False) as found:
            if any(member.file_size != member.compress_size for member in found.zip.infolist()):
                raise ValueError("it is compressed")  # madsim's are not; a small compressed file could fill the memory
            arrays = dict(found)
        check_kinds(arrays, kinds)
        check_numbers(arrays)
        if not isinstance(json.loads(str(arrays["run"])), dict):
            raise ValueError("its settings are not an object")
    except OSError:
        raise
    except Exception as error:  # zipfile, numpy and zlib raise a dozen types
        raise ValueError(f"{path} is damaged: {error}") from None
    return arrays


def check_kinds(arrays: dict[str, np.ndarray], kinds: dict[str, np.ndarray]) -> None:
    """Raise ValueError if an array is missing or has another type or shape than in `kinds`."""
    if lacking := (kinds.keys() | {"run"}) - arrays.keys():
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    for name, kind in kinds.items():
        array, any_length = arrays[name], name in ("seconds", "kept_rounds", "marks")
        if array.dtype != kind.dtype or array.ndim != kind.ndim or (array.shape != kind.shape and not any_length):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not {kind.dtype} {list(kind.shape)}")
    if len(arrays["seconds"]) != arrays["round"]:
        raise ValueError(f"{len(arrays['seconds'])} rounds were timed, not {arrays['round']}")


def check_numbers(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError for numbers that no run produces."""
    scored = np.isfinite(arrays["distance"])  # the others have NaN
    known = np.concatenate([arrays[name][scored] for name in ("d", "reputation", "trust")])
    unknown = np.concatenate([arrays[name][~scored] for name in ("distance", "d", "reputation", "trust")])
    sizes = [arrays[name].ravel() for name in ("spread", "seconds", "marks")] + [arrays["distance"][scored]]
    rounds = arrays["kept_rounds"]
    if not (
        np.isfinite(arrays["w"]).all()
        and arrays["active"].any()
        and ((known >= 0) & (known <= 1)).all()
        and np.isnan(unknown).all()
        and all((np.isfinite(size) & (size >= 0)).all() for size in sizes)
        and ((rounds >= 1) & (rounds <= arrays["round"])).all()
    ):
        raise ValueError("its numbers are out of range")


def replace_file(path: Path, content: bytes | str) -> None:
    """Replace a file; a text is encoded as UTF-8. After a kill or on a full disk, the old or the new content is there.

    All files that are written at once are written here.
    """
    if isinstance(content, str):
        content = printable(content).encode()
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
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError raised inside the block. Errors of writing to an open file lack it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Replace an npz file, as `replace_file` does."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    replace_file(path, content.getvalue())


def fitting(name: str, end: str = "") -> str:
    """`name` and `end`, which stays. If they are longer than LONGEST, a hash of `name` stands for its last part."""
    if len(os.fsencode(name + end)) <= LONGEST:
        return name + end
    end = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}{end}"
    return os.fsencode(name)[: LONGEST - len(os.fsencode(end))].decode(errors="ignore") + end


def printable(text: str) -> str:
    """The text with escapes such as \\udcff for what is no character: a byte of a name that is not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def script(name: str) -> str:
    """The path of one of our scripts, as a command in the current folder names it."""
    return str(from_here(Path(__file__).parents[1] / name))


def from_here(path: Path) -> Path:
    """An absolute path, or the same place as seen from the current folder if that is shorter."""
    try:
        return min(Path(os.path.relpath(path)), path, key=lambda way: len(str(way)))
    except ValueError:  # on Windows, from one drive to another
        return path


def together(paths: Sequence[Path]) -> tuple[Path, list[Path]]:
    """The nearest folder that holds all of several paths, and the paths, which then begin with it. Of one, itself.

    Raises ValueError if no folder does: on Windows, drives have none.
    """
    if len(paths) == 1:
        return paths[0], [*paths]
    every = [Path(os.path.abspath(path)) for path in paths]
    folder = Path(os.path.commonpath(every))
    return from_here(folder), [from_here(folder) / path.relative_to(folder) for path in every]


def write_json(path: Path, content: dict) -> None:
    """Write an object to a JSON file. NaN and infinity become null."""
    replace_file(path, json.dumps(plain(content), indent=2) + "\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError if the file is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    return content


def plain(value: Any) -> Any:
    """The value as JSON knows it: lists for arrays, and None for NaN and infinity."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(value: float) -> float:
    """The value with `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")
