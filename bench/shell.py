"""Between madsim.py or plot.py and the shell that runs them."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def as_command(main: Callable[[], int]) -> int:
    """A `main` as the shell's command: SIGTERM stops it as Ctrl-C does, whatever becomes of its output."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream]  # None: closed by whoever started us
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # a folder's name need not be text
    try:
        try:
            return main()
        finally:
            for stream in streams:
                stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it still holds is not tried again
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough, the disk under a log file is full
            print(f"{Path(sys.argv[0]).stem}: the output can't be written: {error}", file=sys.stderr)
        return 1


def script(name: str) -> str:
    """Where a script of ours lies, as one says it in the current folder."""
    path = str(Path(__file__).parents[1] / name)
    return min(os.path.relpath(path), path, key=len)
