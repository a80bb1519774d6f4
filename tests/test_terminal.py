"""Tests of what madsim writes to a terminal: whole words in 80 columns, and why nobody was excluded."""

import fcntl
import io
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import replace

import pytest
from conftest import HERE
from test_plot import make_run

from harness.console import fold, report, whole
from madsim import Config, simulate

COLUMNS = 80


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Standard output as a terminal with 30 columns."""
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys, "stdout", Terminal())
    return sys.stdout


def test_lines_are_broken_between_words_on_a_terminal_alone(terminal):
    text = "madsim: rounds 0 must be at least 1; see --list-of-all-names"
    assert fold(text, terminal).splitlines() == [
        "madsim: rounds 0 must be at", "least 1; see", "--list-of-all-names",
    ]  # fmt: skip
    assert fold(text, terminal, "   ").splitlines()[1:] == ["   least 1; see", "   --list-of-all-names"]
    assert fold(text, io.StringIO()) == text
    assert fold(text, None) == text  # a stream that the caller has closed


def test_a_command_that_does_not_fit_has_a_line_of_its_own(terminal):
    command = whole("python", "madsim.py", "--resume", "a folder")
    assert fold(f"stopped; continue with: {command}", terminal).splitlines() == [
        "stopped; continue with:", "python madsim.py --resume 'a folder'",
    ]  # fmt: skip
    assert fold(f"see {whole('a', 'b')} there", terminal) == "see a b there"
    assert fold(command, io.StringIO()) == "python madsim.py --resume 'a folder'"


def on_terminal(words: list[str]) -> str:
    """What a Python command writes to a terminal of 80 columns, where each bar shows its last state."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    streams = {"stdin": its, "stdout": its, "stderr": its, "env": environment}
    with subprocess.Popen([sys.executable, *words], cwd=HERE, **streams):
        os.close(its)
        parts = []
        with suppress(OSError):  # Linux raises it when the child has closed the terminal
            while part := os.read(ours, 65536):
                parts.append(part)
    os.close(ours)
    return "\n".join(line.split("\r")[-1] for line in b"".join(parts).decode().split("\r\n"))


def assert_fits(text: str) -> None:
    """Assert that no line is too long for the terminal, but for a command or a path alone in its line."""
    for line in text.splitlines():
        words = shlex.split(line) if len(line) > COLUMNS else []
        assert len(words) <= 1 or words[0] == "python", line


LONG = "a folder with a name that is longer than a line of the terminal can be, so that it needs one for itself"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["madsim.py", "--list"], "\n--experiment\n", marks=pytest.mark.slow),
        (["madsim.py", "--attack", "flipp"], "madsim: attack 'flipp' is unknown; known: label_flip, one_way_flip, "),
        (["madsim.py", "--resume", LONG], "madsim: "),
        (["plot.py", "--play", "{folder}"], "not played, there is nothing to play; madsim writes plane.csv for at"),
        (["plot.py", LONG], "plot: "),
    ],
)
def test_no_word_is_broken_in_80_columns(tmp_path, words, said):
    make_run(tmp_path / "a run", rounds=100)
    text = on_terminal([word.format(folder=tmp_path) for word in words])
    assert_fits(text)
    assert said in text or said in " ".join(text.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--rounds", "3", "--mad-start", "1", "2", "never", "--seeds", "2", "--malicious", "0.25"],
        ["--experiment", "noniid", "--rounds", "1"],
    ],
)
def test_no_word_of_a_run_is_broken_in_80_columns(tmp_path, words):
    where = ["--dataset", "phantom", "--clients", "4", "--jobs", "1", "--out", str(tmp_path / "some results")]
    text = on_terminal(["madsim.py", *words, *where])
    assert_fits(text)
    assert f"python plot.py '{tmp_path}/some results" in text and "phantom images" in text


@pytest.mark.parametrize(
    ("options", "rounds", "said"),
    [
        ({"mad_start": 3}, 2, "nobody; MAD had not started (it starts in round 3); 1 attacker stayed"),
        ({"mad_start": None}, 2, "nobody; MAD never starts; 1 attacker stayed"),
        ({"mad_start": 1}, 2, "nobody; 1 attacker stayed"),
        ({"mad_start": 1, "malicious": 0.0}, 2, "nobody; nobody attacked"),
        ({"mad_start": 3, "malicious": 0.0}, 2, "nobody; MAD had not started (it starts in round 3); nobody attacked"),
        (
            {"mad_start": 1, "attack_start": 3},
            2,
            "nobody; 1 attacker had not attacked yet (the attack starts in round 3)",
        ),
    ],
)
def test_why_nobody_is_excluded(options, rounds, said, small, tmp_path, capsys):
    """The report of a run that was stopped after `rounds` of 4 rounds, before anybody was excluded."""
    config = Config(rounds=rounds, clients=4, malicious=0.25, dataset="phantom")
    result = simulate(replace(config, **{k: v for k, v in options.items() if k == "malicious"}), dataset=small)
    result.summary["complete"] = False
    report(replace(result, config=replace(config, rounds=4, **options)), tmp_path)
    assert f"Excluded     {said}\n" in capsys.readouterr().out
