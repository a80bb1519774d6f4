"""Tests of the pages: their commands and Python code run, with fewer rounds. Their links, numbers and tests exist."""

import base64
import itertools
import json
import os
import re
import runpy
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import part

import data
from harness import cli, needs
from harness.log import MEMBERSHIP_COLUMNS, ROUND_COLUMNS
from harness.runs import counted
from lab.attacks import ATTACKS, Attack
from lab.experiments import EXPERIMENTS, OUTCOME
from lab.partitions import PARTITIONS
from lab.rules import RULES
from madsim import Config, simulate
from trust import PRESETS, Settings

HERE = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(HERE)): path.read_text()
    for path in (HERE / "README.md", HERE / "CONTRIBUTING.md", *sorted((HERE / "docs").glob("*.md")))
}
README, LESSON, SOLUTIONS = (PAGES[name] for name in ("README.md", "docs/lesson.md", "docs/solutions.md"))
ROUNDS = 4


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The lines of all shell blocks of a page, without comments."""
    lines = (line.split("  #")[0].strip() for block in blocks("sh", page) for line in block.splitlines())
    return [line for line in lines if line]


def shortened(command: str) -> list[str]:
    """The command's words with ROUNDS rounds. MAD and the attack start at the same fraction of the run."""
    words = shlex.split(command)
    if "bench" in words[1]:
        return [*words, "-n", "1"]
    if "--report" in words:  # a report of fig3c only; the command before has drawn its figures
        return [word + "fig3c" if word == "results/" else word for word in words]
    if words[1] != "madsim.py" or words[2:] in (["--help"], ["--list"]):
        return words
    if words[2:] == ["--quick"]:  # its settings in full, so that they can be shortened too
        words[2:] = ["--rounds", str(cli.QUICK), "--mad-start", str(cli.QUICK // 2)]
    if "--resume" in words:  # the main job's folder; its name is different here
        return [*words[:-1], str(next(Path("results").glob("mad*")))]
    rounds = int(words[words.index("--rounds") + 1]) if "--rounds" in words else 1000
    if "--rounds" in words:
        del words[words.index("--rounds") : words.index("--rounds") + 2]
    for start in {"--mad-start", "--attack-start"} & set(words):
        for i in range(words.index(start) + 1, len(words)):
            if not words[i].isdigit():
                break
            words[i] = str(max(1, int(words[i]) * ROUNDS // rounds))
    several = ["--jobs", "1"] * bool({"--experiment", "--seeds"} & set(words))  # each process would load torch
    # --overwrite is needed because two commands that differ only in their rounds share a name here.
    return [*words, *several, "--rounds", str(ROUNDS), "--overwrite"]


@pytest.mark.slow
def test_the_commands_of_the_readme_and_the_reference_run(small, tmp_path, monkeypatch, capsys):
    """The commands run in order and in one folder, as a reader would run them.

    .ci/run runs the two commands that set up a new machine in full. Each script runs as `__main__`, but in this
    process, which has already loaded torch. The data set is a part of the real one, or of the phantom if the real one
    is absent.
    """
    load = data.load
    monkeypatch.setattr(data, "load", lambda *arguments: part(load(*arguments)))
    monkeypatch.setattr(data, "phantom", lambda seed=0, note="": replace(small, note=note))
    monkeypatch.chdir(tmp_path)
    real = (Path(os.environ.get("MADSIM_DATA", Path.home() / ".medmnist")) / data.FILE).is_file()
    seen = []
    for command in commands(README) + commands(PAGES["docs/reference.md"]):
        command = command.split(" && ")[-1].replace(".venv/bin/", "").replace("python3 ", "python ")
        if "-m pytest" in command:
            continue
        assert command.startswith("python "), command
        words = shortened(command)
        script = HERE / words[1]
        seen.append(script.name)
        if script.name in ("madsim.py", "data.py") and not real and "--dataset" not in words and "--help" not in words:
            words += ["--dataset", "phantom"]
        monkeypatch.setattr(sys, "argv", [str(script), *words[2:]])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{command}\n{capsys.readouterr()}"
        assert capsys.readouterr().out
    assert {"madsim.py", "plot.py", "data.py", "bench.py"} <= set(seen)
    figures = {path.name for path in (tmp_path / "results" / "figures").rglob("*.png")}
    assert {"fig2.png", "loss.png", "accuracy.png", "honest_accuracy.png"} <= figures


def test_ci_runs_the_readmes_set_up_and_test():
    lines = [line for line in README.splitlines() if "-m pytest" in line]
    assert len(lines) == 1 and lines[0].startswith("python3 -m venv .venv && ")
    assert "grep -m 1 -- '-m pytest' README.md" in (HERE / ".ci" / "run").read_text()


def test_the_readme_is_short_and_says_what_a_script_checks():
    assert len(README.splitlines()) <= 180
    assert f"You need Python {needs.OLDEST[0]}.{needs.OLDEST[1]} or newer" in README
    assert [line.startswith(needs.SET_UP) for line in commands(README)[:1]] == [True]


def test_the_help_and_the_reference_say_what_the_sources_and_the_spread_are():
    parser = cli.make_parser()
    spread = next(group.description for group in parser._action_groups if group.title == "MAD")
    options, mad = (PAGES["docs/reference.md"].split(f"\n## {name}")[1] for name in ("Options", "MAD"))
    for source in ("paper", "testbed", "ours"):
        assert f"[{source}]: " in parser.epilog and f"`[{source}]`" in options
    assert "spread is the largest usual distance" in spread and "*spread* says how far" in mad
    for about in (f.metadata for f in (*fields(cli.Config), *fields(Settings)) if f.name != "settings"):
        known = r"(default: never; )?(paper|testbed|ours)\b.*|.* (19|20)\d\d"  # a name with a year is a publication
        assert re.fullmatch(known, about["source"]), about["source"]


def test_the_presets_on_the_reference_page_are_those_of_the_code():
    rows = re.findall(r"^\| `--([\w-]+)` \| .* \| (\S+) \| (\S*) ?\|$", PAGES["docs/reference.md"], re.MULTILINE)
    presets = {}
    for name, paper, testbed in rows:
        presets[name.replace("-", "_")] = paper.strip("`"), (testbed or paper).strip("`")
    assert presets == {
        f.name: tuple(str(getattr(PRESETS[name], f.name)).removesuffix(".0") for name in ("paper", "testbed"))
        for f in fields(Settings)
    }


@pytest.mark.parametrize("block", [block for page in PAGES.values() for block in blocks("python", page)])
def test_the_python_on_the_pages_runs(block, small, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: small)
    registries = (ATTACKS, RULES, PARTITIONS, EXPERIMENTS)
    before = [dict(registry) for registry in registries]
    try:
        exec(compile(block, "a page", "exec"), {})
    finally:  # the entries that a block adds are removed
        for registry, entries in zip(registries, before):
            registry.clear()
            registry.update(entries)


def headings(page: str) -> set[str]:
    """What links can name after a #: the headings of a page in small letters, with hyphens."""
    found = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_the_tests_that_are_named_are_there(page):
    text = PAGES[page]
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        path = (HERE / page).parent.joinpath(target) if target else HERE / page
        assert path.exists(), target
        assert not heading or heading in headings(path.read_text()), f"{target}#{heading}"
    tests = "".join(path.read_text() for path in (HERE / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)) - {*ROUND_COLUMNS, *MEMBERSHIP_COLUMNS}:
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize(
    ("page", "least"),
    [("README.md", 16), ("docs/replication.md", 100), ("docs/threats.md", 16), ("docs/solutions.md", 6)],
)
def test_the_numbers_of_the_pages_are_those_of_the_tables(page, least):
    """Every "mean ± deviation" is that of a cell and a column of a table; every interval is right."""
    known = set()
    results = HERE / "docs" / "results"
    for path in (path for name in ("table", "spans", "leakage") for path in results.glob(f"*/{name}.csv")):
        table = pd.read_csv(path, dtype={"column": str, "rounds": str}).fillna({"column": ""})
        table = table[table["complete"]] if "complete" in table else table  # spans.csv has complete runs alone
        groups = table.groupby([name for name in ("experiment", "row", "column", "rounds", "seen") if name in table])
        means, deviations = groups.mean(numeric_only=True), groups.std(numeric_only=True)
        for name in means:
            for mean, deviation in zip(means[name], deviations[name]):
                known |= {f"{abs(mean):.{digits}f} ± {deviation:.{digits}f}" for digits in (1, 2, 3, 4)}
    quoted = re.findall(r"[\d.]+ ± [\d.]*\d", PAGES[page])
    assert len(quoted) >= least and [text for text in quoted if text not in known] == []
    counts = re.findall(r"((\d+) of (\d+)(?: runs)? \([^)]*%\))", PAGES[page])
    right = [text.replace(" runs", "") == counted(int(count), int(of)) for text, count, of in counts]
    assert right and all(right)
    tables = "".join(path.read_text() for path in results.glob("*/table.md"))
    assert all(text in tables for text in re.findall(r"-?[\d.]+ \(-?[\d.]+ to -?[\d.]+\)", PAGES[page]))


# The main numbers of docs/replication.md: experiment, row, column, metric, and the text on the page.
MAIN = [
    ("fig3a", "MAD from 80", "", "jump_loss", "0.712 ± 0.081"),
    ("fig3a", "MAD from 5", "", "jump_loss_model", "0.197 ± 0.044"),
    ("fig3a", "MAD from 80", "", "jump_accuracy_model", "0.044 ± 0.024"),
    ("fig3a", "never", "", "honest_accuracy", "0.920 ± 0.018"),
    ("membership", "MAD from 10", "", "honest_loss", "0.686 ± 0.211"),
    ("membership", "MAD from 10", "", "held_validation_advantage", "0.038 ± 0.023"),
    ("membership", "MAD from 500", "", "held_validation_advantage", "0.043 ± 0.017"),
    ("membership", "never", "", "held_test_advantage", "0.157 ± 0.017"),
    ("attacks", "scaled", "MAD from 10", "honest_accuracy", "0.905 ± 0.106"),
    ("attacks", "alie, 40 % malicious", "MAD from 10", "honest_accuracy", "0.951 ± 0.017"),
    ("attacks", "hug, 40 % malicious", "MAD from 10", "honest_accuracy", "0.929 ± 0.027"),
    ("attacks", "one_way_flip", "never", "test_accuracy", "0.865 ± 0.012"),
    ("defences", "lfighter", "one_way_flip", "honest_accuracy", "0.953 ± 0.017"),
    ("defences", "krum", "hug", "honest_accuracy", "0.826 ± 0.026"),
    ("defences", "geometric_median", "liar", "honest_accuracy", "0.064 ± 0.010"),
    ("defences", "mean, MAD from 5", "min_max", "honest_accuracy", "0.951 ± 0.019"),
    ("readings", "preset testbed", "0%, MAD from 5", "false_exclusions", "10.0 ± 0.0"),
    ("readings", "preset paper", "0%, MAD from 5", "false_exclusions", "0.0 ± 0.0"),
    ("noniid", "quantity, concentration 1", "no attack, MAD from 10", "false_exclusions", "2.6 ± 0.5"),
    ("noniid", "dirichlet, concentration 0.5", "label_flip, MAD from 10", "true_exclusions", "0.6 ± 0.5"),
]


@pytest.mark.parametrize(("experiment", "row", "column", "metric", "said"), MAIN)
def test_the_main_numbers_are_those_of_their_cells(experiment, row, column, metric, said):
    path = HERE / "docs" / "results" / experiment / "table.csv"
    table = pd.read_csv(path, dtype={"column": str}).fillna({"column": ""})
    cell = table[(table["row"] == row) & (table["column"] == column)][metric]
    digits = len(said.split()[0].partition(".")[2])
    assert len(cell) == {"fig3a": 20}.get(experiment, 5)
    assert f"{abs(cell.mean()):.{digits}f} ± {cell.std():.{digits}f}" == said
    assert said in PAGES["docs/replication.md"]


def test_whom_positions_exclude_and_miss_where_clients_differ_in_size():
    """The section on non-IID data: the largest clients are out without an attack, and small attackers are missed."""
    table = pd.read_csv(HERE / "docs" / "results" / "noniid" / "table.csv", keep_default_na=False)
    missed, shares = [], []
    for run in table[table["column"].str.endswith("MAD from 10") & (table["row"] != "iid")].itertuples():
        texts = run.malicious_clients, run.excluded_clients, run.images_of_clients
        bad, out, images = ([*map(int, str(text).split())] for text in texts)
        largest = sorted(range(10), key=lambda client: -images[client])
        missed += [(largest.index(client), images[client]) for client in set(bad) - set(out)]
        if run.row.startswith("quantity") and out and not bad:
            assert set(out) == set(largest[: len(out)])
            shares.append(sum(images[client] for client in out) / sum(images))
    page = " ".join(PAGES["docs/replication.md"].split())
    assert f"In each of the {len(shares)} runs of `quantity` without attack that exclude anybody, these are" in page
    assert f"They hold {100 * min(shares):.0f} to {100 * max(shares):.0f} % of" in page
    assert all(place >= 4 for place, _ in missed) and f"All {len(missed)} attackers that it misses" in page
    numbers = [images for _, images in missed]
    assert f"with {min(numbers)} to {max(numbers)} images" in page


def test_the_preset_directions_is_better_on_new_seeds_where_clients_differ():
    """The counts of docs/replication.md for seeds 15 to 19: honest clients without attack, with one, and attackers."""
    table = pd.read_csv(HERE / "docs" / "results" / "fresh" / "table.csv")
    assert set(table["seed"]) == set(range(15, 20)) and table["complete"].all()
    sums = table.groupby(["partition", "measured", "malicious"])[["false_exclusions", "true_exclusions"]].sum()
    page = " ".join(PAGES["docs/replication.md"].split()).split("**New seeds agree.**")[1]
    expected = {"quantity": ([0, 0, 10], [8, 5, 8]), "dirichlet": ([2, 2, 10], [9, 3, 7])}  # directions, positions
    for partition, numbers in expected.items():
        for measured, (alone, attacked, out) in zip(("directions", "positions"), numbers):
            assert sums.loc[partition, measured].to_numpy().tolist() == [[alone, 0], [attacked, out]]
            assert all(text in page for text in (counted(alone, 50), counted(attacked, 40), counted(out, 10)))


def test_parts_of_the_equations_that_change_no_run():
    """docs/replication.md: without these parts each run is the same; with the reputation below 0.15 some are not."""
    table = pd.read_csv(HERE / "docs" / "results" / "ablation" / "table.csv", keep_default_na=False)
    results = table.set_index(["column", "seed"])[["row", "excluded_clients", "last_exclusion", *OUTCOME[1:]]]
    found = {row: part.drop(columns="row") for row, part in results.groupby("row")}
    printed, forgiving = found.pop("as printed"), found.pop("reputation alone, below 0.15")
    assert len(found) == 3 and len(printed) == 40 and all(part.equals(printed) for part in found.values())
    assert not forgiving.equals(printed)


def test_the_worked_example_of_the_lesson():
    """The tables of docs/lesson.md hold the numbers of trust.py for the models 0, 1, 2 and 10, submitted twice."""
    import trust

    W, state = np.array([[0.0], [1.0], [2.0], [10.0]]), trust.initial_state(4)
    for t in (1, 2):
        state = trust.mad_step(W, state, t, None, trust.Settings())
        for name in ("reputation", "trust"):
            cells = " | ".join(f"{value:.3f}" for value in getattr(state, name))
            assert f"| {name}, round {t} | {cells} |" in LESSON
    assert state.distance.tolist() == pytest.approx([1, 0, 1, 9])
    assert state.d.tolist() == pytest.approx([8 / 9, 1, 8 / 9, 0])
    assert trust.mad_step(W, state, 3, 3, trust.Settings()).active.tolist() == [True, True, True, False]
    W[3] = 3
    fresh = trust.initial_state(4)
    first = trust.mad_step(W, fresh, 1, 1, trust.Settings())
    assert [f"{d:.2f}" for d in first.d] == ["0.21", "1.00", "1.00", "0.21"] and "(1.77 - 0.5) = 0.21" in LESSON
    second = trust.mad_step(W, trust.mad_step(W, fresh, 1, 2, trust.Settings()), 2, 2, trust.Settings())
    for state in (first, second):
        assert state.active.tolist() == [False, True, True, False] and state.trust.tolist() == [0, 1, 1, 0]


def test_the_lessons_commands_are_understood():
    lines = [line for page in (LESSON, SOLUTIONS) for block in blocks("sh", page) for line in block.splitlines()]
    assert len(lines) > 12
    for line in lines:
        program, *words = shlex.split(line)[1:]
        if program == "madsim.py":
            given = vars(cli.make_parser().parse_args(words))
            assert cli.plan(given), line
        else:
            assert program == "plot.py" and words[0].split("/")[0] in ("results", "waiting", "sent"), line


@pytest.mark.slow
@pytest.mark.parametrize(("changed", "excluded"), [({}, 20), ({"beta_trust": 0.1}, 24), ({"threshold": 0.0}, None)])
def test_the_late_liars_of_the_lesson(real, changed, excluded):
    """Part 5 of the lesson, and the solution of exercise 6."""
    settings = replace(PRESETS["paper"], **changed)
    result = simulate(Config(rounds=26, attack_start=20, mad_start=10, seed=6, settings=settings), dataset=real)
    liars = result.summary["malicious"]
    assert result.summary["excluded"] == (dict.fromkeys(liars, excluded) if excluded else {})


def accuracy(result, rounds=None):
    """The honest accuracy in the last round, or the mean over so many last rounds, as a page says it."""
    values = result.rounds["honest_accuracy"]
    return f"{values.iloc[-1] if rounds is None else values.tail(rounds).mean():.3f}"


@pytest.mark.slow
def test_the_numbers_of_the_lessons_first_runs(real):
    honest, attacked = (simulate(Config(rounds=60, malicious=share), dataset=real) for share in (0.0, 0.2))
    page, losses = " ".join(LESSON.split()), attacked.rounds["loss"]
    assert f"accuracy is {accuracy(attacked)} instead of {accuracy(honest)}" in page
    assert f"rounds is {losses.tail(50).mean():.3f}, and in round 60 it is {losses.iloc[-1]:.3f}" in page


@pytest.mark.slow
def test_a_tenth_of_the_step_is_missed_as_the_solutions_say(real, monkeypatch):
    poison = ATTACKS["label_flip"].poison
    monkeypatch.setitem(ATTACKS, "shy", Attack("", poison=poison, submit=lambda W, w, rng: w + 0.1 * (W - w)))
    short, long = (simulate(Config(rounds=n, mad_start=10, attack="shy"), dataset=real) for n in (15, 60))
    assert short.summary["excluded"] == long.summary["excluded"] == {}
    page = " ".join(SOLUTIONS.split())
    assert f"and {accuracy(short)}. Over 60" in page and f"is then {accuracy(long)}, as good" in page


@pytest.mark.slow
def test_the_rules_of_the_solutions_against_four_that_hug(real):
    hug = Config(rounds=60, attack="hug", malicious=0.4, seed=4)
    rows = dict(
        re.findall(
            r"^\| `(\w+)`(?!, w)[^|]*\| (0\.\d{3} \| 0\.\d{3}) \|$", SOLUTIONS.replace("`, `", "_"), re.MULTILINE
        )
    )
    assert len(rows) == 5 and (honest := re.search(r"`mean`, without an attack \| (.*) \|", SOLUTIONS))
    for rule, row in rows.items():
        for name in ("median", "trimmed_mean") if rule == "median_trimmed_mean" else (rule,):
            result = simulate(replace(hug, rule=name), dataset=real)
            assert (name, f"{accuracy(result)} | {accuracy(result, 50)}") == (name, row)
    result = simulate(Config(rounds=60, malicious=0.0, seed=4), dataset=real)
    assert f"{accuracy(result)} | {accuracy(result, 50)}" == honest[1]
    assert simulate(replace(hug, rounds=12, mad_start=10), dataset=real).summary["excluded"] == {}


@pytest.mark.slow
def test_honest_clients_are_excluded_as_the_solutions_say(real):
    plain = replace(PRESETS["paper"], clusters=1, scale_floor=0.0)
    result = simulate(Config(rounds=10, malicious=0.0, mad_start=5, settings=plain), dataset=real)
    assert sorted(result.summary["excluded"].values()).count(5) == 4  # at once
    active = result.rounds.set_index("round")["active"]
    assert active[8] == 1 < active[7]
    config = Config(rounds=30, malicious=0.0, mad_start=10, partition="dirichlet", concentration=0.5)
    result, page = simulate(config, dataset=real), " ".join(SOLUTIONS.split())
    images = result.summary["training_images"]
    assert result.summary["excluded"] == {6: 25} and max(images) == images[6]
    assert f"trains on {images[6]} images. All clients together train on {sum(images)} images" in page


@pytest.mark.slow
def test_the_notebook_runs(small, monkeypatch, capsys):
    """The cells run one after another, with fewer rounds, on a part of the phantom."""
    import matplotlib.pyplot

    monkeypatch.setattr(data, "load", lambda *_: small)
    monkeypatch.setattr(matplotlib.pyplot, "show", matplotlib.pyplot.close)
    monkeypatch.setattr(sys, "path", [*sys.path])
    notebook = json.loads((HERE / "docs" / "lesson.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "ROUNDS, START = 60, 30" in cells[0] and sum(map(len, cells)) < 3500  # short enough to read
    framed = []  # the addresses of the pages that are shown, without IPython
    names = {"IFrame": lambda src, *_: framed.append(src)}
    for cell in cells:
        short = cell.replace("= 60, 30", "= 6, 3").replace("from IPython.display import IFrame\n", "")
        exec(compile(short, "a cell", "exec"), names)
    assert "still there: [0 1 2]" in capsys.readouterr().out
    page = base64.b64decode(framed[0].removeprefix("data:text/html;base64,")).decode()
    assert len(framed) == 1 and '"hide":true' in page and "attack start 2" in page


def test_the_table_of_gradient_inversion_is_that_of_its_file():
    table = pd.read_csv(HERE / "docs" / "results" / "leakage" / "leakage.csv")
    page = PAGES["docs/replication.md"].split("## Gradient inversion")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (gradient of [^|]*|\d+ steps? of [^|]*) \| (.*) \|$", page, re.MULTILINE)
    assert [seen for seen, _ in rows] == list(table["seen"].unique()) and len(table) == 11 * 3 * 5
    for seen, cells in rows:
        of = [table[(table["row"] == f"round {t}") & (table["seen"] == seen)] for t in (1, 10, 100)]
        values = [(part[name], digits) for name, digits in (("rank", 3), ("psnr", 1)) for part in of]
        assert cells.split(" | ") == [f"{v.mean():.{digits}f} ± {v.std():.{digits}f}" for v, digits in values]


def test_the_comparison_with_the_authors_system_is_that_of_its_files():
    """In how many of ten rounds each run of the testbed lies between the lowest and the highest seed of madsim."""
    folder, page = HERE / "docs" / "results" / "authors", " ".join(PAGES["docs/replication.md"].split())
    spans, others = pd.read_csv(folder / "spans.csv"), pd.read_csv(folder / "others.csv")
    rounds, seeds = spans.set_index(["row", "rounds"]), spans.groupby(["row", "rounds"], sort=False)
    inside = {}
    for row, metric in itertools.product(spans["row"].unique(), ("loss", "honest_accuracy")):
        low, high = (ends.loc[row][metric] for ends in (seeds.min(numeric_only=True), seeds.max(numeric_only=True)))
        for _, run in others.groupby("run"):
            values = run.set_index("round")[metric]
            inside.setdefault((row, metric), []).append(int(values.between(low, high).sum()))
    assert list(inside.values()) == [[1, 2], [3, 2], [7, 5], [9, 7]]
    for said in ("in 1 and 2 of 10 rounds", "in 3 and 2.", "in 7 and 5 rounds", "in 9 and 7."):
        assert said in page
    assert (spans["active"] == spans["rounds"].map(others[:10].set_index("round")["active"])).all()
    trust = rounds["honest_trust"][spans["rounds"].ne(1).to_numpy()].min()
    assert spans["attacker_trust"].max() == others["attacker_trust"].max() == 0 and f"{trust:.2f} in madsim" in page
    least = rounds["loss"].sort_index().loc["the later copy's initial weights", 10].min()
    assert f"{least:.3f} in the lowest seed" in page


def test_mad_excludes_the_attackers_alone_in_every_run_of_the_papers_figures():
    """The first claim: 5 starts of 20 seeds in fig3a, and 2 starts of 5 seeds in fig3c."""
    tables = [pd.read_csv(HERE / "docs" / "results" / name / "table.csv") for name in ("fig3a", "fig3c")]
    runs = pd.concat(tables).dropna(subset="mad_start")
    right = (runs["true_exclusions"] == 2) & (runs["false_exclusions"] == 0) & (runs["rounds_to_detection"] == 0)
    assert len(runs) == right.sum() == 110 and f"in {counted(110, 110)}; no honest client" in README.replace(
        " runs", ""
    )


def test_the_runs_of_the_tables_are_counted():
    """The table of docs/results/README.md. Runs of one seed with equal losses are one run, also in two experiments."""
    page = (HERE / "docs" / "results" / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\(.*?\) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    tables = {name: pd.read_csv(HERE / "docs" / "results" / name / "table.csv") for name, *_ in rows}
    for name, *said, commits in rows:
        table = tables[name]
        distinct = len(table.drop_duplicates(OUTCOME))
        assert [*map(int, said)] == [table["rounds"].max(), table["seed"].nunique(), len(table), distinct], name
        assert all(commit[:7] in commits for commit in set(table["commit"]))
    every = pd.concat(tables.values())
    distinct = len(every.drop_duplicates(["rounds", *OUTCOME]))
    assert f"of the {len(every)} runs in all tables, {distinct} are distinct" in " ".join(page.split())
