"""Tests of harness/pages.py: the page that plays a run, also in a browser, and the page that reports runs."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas
import pytest
from test_figures import measured, write_grid
from test_plot import CLIENT_ROWS, HONEST_ACCURACY, LOSS, ROUND_COLUMNS, make_run, write_csv

import plot
import trust
from harness import pages, runs
from madsim import Config, simulate
from trust import PRESETS

# ---------------------------------------------------------------- the page that plays a run


def playable(folder, rows=CLIENT_ROWS, **options):
    """A run whose models lie at (client, round / 10) from the centre. The attacker is absent in round 4."""
    make_run(folder, client_rows=rows, **options)
    places = [(row[0], row[1], *((row[1], row[0] / 10) if row[5] != "" else ("", ""))) for row in rows]
    write_csv(folder / "plane.csv", ["round", "client", "x", "y"], places)
    return folder


def content(page: str) -> dict:
    return json.loads(re.search(r'id="run">(.*?)</script>', page)[1])


def test_what_a_page_plays_by_hand(tmp_path):
    shown = content(pages.play(plot.load_run(playable(tmp_path / "a"))))
    assert shown["rounds"] == [1, 2, 3, 4] and shown["malicious"] == [0, 0, 1] and shown["excluded"] == [None, None, 3]
    assert (shown["start"], shown["threshold"]) == (3, 0.15)
    assert shown["trust"] == [[95, 85, 55], [95, 85, 35], [95, 85, 12], [95, 85, None]]
    assert shown["reputation"][3] == [90, 80, None]
    assert shown["active"] == ["111", "111", "110", "110"] and shown["d"] is None  # this clients.csv lacks it
    assert shown["loss"] == LOSS and shown["honest_accuracy"] == HONEST_ACCURACY
    assert shown["honest_loss"] == [None] * 4
    x, y = np.array(shown["points"][1][2]) * shown["reach"][1] / 1000
    assert (x, y) == (pytest.approx(2, rel=0.05), pytest.approx(0.2, rel=0.05))
    assert shown["points"][3][2] == [None, None]
    assert shown["title"] == "MAD from round 3: PneumoniaMNIST, 4 rounds, seed 0"


def test_how_far_the_drawing_reaches_by_hand():
    far = pandas.Series([1.6] * 20 + [0.03] * 20 + [0.0] * 20)
    assert pages.reaches(far).round(9).tolist() == [2] * 25 + [0.03] * 20 + [1] * 15  # five rounds on both sides
    assert pages.reaches(pandas.Series([1e-30])).tolist() == [pytest.approx(1e-30)]
    assert [pages.reaches(pandas.Series([far])).tolist() for far in (3.0, 3.1, 8.5)] == [[3], [4], [10]]


def test_a_long_run_is_thinned_but_for_its_exclusions():
    rounds = list(range(1, 100_001))
    shown = pages.frames(rounds, 10, pandas.Series([777, 777, 12_345]))
    assert {1, 777, 12_345, 100_000} <= set(shown) and shown == sorted(set(shown))
    assert 5000 < len(shown) < 10_000
    assert pages.frames(rounds[:1000], 10, pandas.Series([500])) == rounds[:1000]


def test_d_is_in_a_page_if_every_round_has_it_and_there_is_room(monkeypatch):
    rows = pandas.DataFrame({"round": [1, 1, 2, 2], "client": [0, 1, 0, 1], "d": [1, 0.25, 0.123456, np.nan]})
    assert np.array_equal(pages.distances(rows, [1, 2]), [[1, 0.25], [0.123456, np.nan]], equal_nan=True)
    assert pages.distances(rows[:2], [2]) is None and pages.distances(rows.assign(d=np.nan), [1, 2]) is None
    monkeypatch.setattr(pages, "PAGE_BYTES", 2 * 4 * 9 - 1)  # half of it must hold four numbers of nine bytes
    assert pages.distances(rows, [1, 2]) is None


@pytest.mark.slow
def test_a_page_of_1000_rounds_is_below_3_mb(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(t, c, int(c < 2), 1, *rng.random(2).round(6)) for t in range(1, 1001) for c in range(100)]
    folder = playable(tmp_path / "a", rows=rows, rounds=1000)
    write_csv(folder / "rounds.csv", ROUND_COLUMNS, [(t, *rng.random(3).round(6), 100) for t in range(1, 1001)])
    write_csv(folder / "plane.csv", ["round", "client", "x", "y"], [(*r[:2], *rng.normal(size=2)) for r in rows])
    page = pages.play(plot.load_run(folder))
    assert 1_500_000 < len(page.encode()) < 3_000_000
    assert len(content(page)["rounds"]) > 500


def test_names_can_not_break_the_page(tmp_path):
    page = pages.play(plot.load_run(playable(tmp_path / "a", data="</script><b>")))
    assert "<b>" not in page and "</script><b>" in content(page)["title"]


def test_pages_are_written_for_the_runs_that_have_places(tmp_path, capsys):
    playable(tmp_path / "x" / "a")
    make_run(tmp_path / "x" / "b")
    assert plot.main([str(tmp_path), "--play"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'figures' / 'x' / 'play-a.html'}\n"  # where its figures would be
    assert f"{tmp_path / 'x' / 'b'}: not played, there is nothing to play" in err
    page = (tmp_path / "figures" / "x" / "play-a.html").read_text()
    assert not re.search(r"(src|href)=|https?://(?!www.w3.org/2000/svg)", page)  # the page needs no network
    assert plot.main([str(tmp_path / "x" / "b"), "--play"]) == 2


def test_pages_of_several_folders_lie_where_those_of_their_common_folder_do(tmp_path, capsys):
    one, other = playable(tmp_path / "x" / "a"), playable(tmp_path / "y" / "a")
    assert plot.main([str(one), str(tmp_path / "absent"), str(other), "--play", "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    pages = ("x/play-a.html", "y/play-a.html", "side-by-side.html")
    assert out.splitlines() == [str(tmp_path / "out" / page) for page in pages]
    assert err == f"plot: {tmp_path / 'absent'} is not a folder; give a folder with results of madsim.py\n"
    assert plot.main([str(one), str(other), "--play"]) == 0
    together = capsys.readouterr().out
    assert plot.main([str(tmp_path), "--play"]) == 0
    assert capsys.readouterr().out == together
    assert (tmp_path / "figures" / "x" / "play-a.html").is_file() and not (one / "figures").exists()


def test_a_title_of_several_lines_is_one_line_on_the_page(tmp_path):
    page = pages.play(plot.load_run(playable(tmp_path / "a", data="a long name " * 12)))
    shown = content(page)["title"]
    assert shown.startswith("MAD from round 3: a long name") and shown.count(": ") == 1 and "\n" not in shown


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# This script uses the page as a person would. It writes what it saw into the title.
PERSON = """<script>
const seen = [], key = (name) => document.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const look = () => seen.push(byId("round").textContent);
look(); key("ArrowRight"); look(); key("ArrowLeft"); look(); key("End"); look(); seen.push(byId("story").textContent);
byId("slider").value = 2; byId("slider").dispatchEvent(new Event("input")); look();
seen.push(byId("plane").querySelectorAll("g").length, byId("bars").querySelectorAll(".bar").length);
key("Home"); byId("play").click(); seen.push(byId("play").textContent);
const [one, two, three, gone, far] = apart([[99, 50], [99, 50], [104, 50], null, [200, 50]], 20);
seen.push([[one, two], [two, three], [three, one]].every(([p, q]) => Math.hypot(p[0] - q[0], p[1] - q[1]) > 19), far);
setTimeout(() => {
  look(); seen.push(byId("play").textContent); document.title = JSON.stringify([seen, errors]);
}, 3000);
</script></body>"""
ERRORS = """<head><script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
console.error = console.warn = (...words) => errors.push(words.join(" "));
</script>"""


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def browse(page: Path, *flags: str):
    """Open the page, wait for some seconds, and return the JSON in its title."""
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([*words, *flags, page.as_uri()], capture_output=True, text=True, timeout=60)
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))


@pytest.mark.slow
@needs_browser
def test_the_page_plays_in_a_browser(tmp_path):
    page = pages.play(plot.load_run(playable(tmp_path / "a")))
    driven = page.replace("<head>", ERRORS, 1).replace("</body>", PERSON, 1)
    (tmp_path / "driven.html").write_text(driven)
    seen, errors = browse(tmp_path / "driven.html")
    assert errors == []
    assert seen[:4] == [f"Round {t} of 4" for t in (1, 2, 1, 4)]
    assert seen[4] == "Excluded: client 2 (attacker) in round 3"
    assert seen[5:8] == ["Round 3 of 4", 3, 3]  # the slider was moved; there are three models and three bars
    assert seen[8] == "Pause" and seen[9:11] == [True, [200, 50]]  # no mark hides another; a free mark stays
    assert seen[11:] == ["Round 4 of 4", "Play"]  # it plays to the end and stops


# ---------------------------------------------------------------- pages without an installation

DEMO = Path(__file__).resolve().parents[1] / "docs" / "demo"
PLAYED = ["honest", "main", "turned"]
# The browser refuses to load anything from outside of the page, and tells what it refused.
ALONE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
ALONE = f"""<meta http-equiv="Content-Security-Policy" content="{ALONE}"><script>
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
addEventListener("load", () => setTimeout(() => document.title = JSON.stringify(errors), 500));
</script>"""


def test_the_pages_without_an_installation_are_there_and_small():
    """They hold what their names say, and the page is that of the template: after a change, make.py makes them anew."""
    assert sorted(path.stem for path in DEMO.glob("*.html")) == sorted([*PLAYED, "late", "report"])
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 3_000_000
    template = (pages.TEMPLATES / "player.html").read_text()
    report = (DEMO / "report.html").read_text()
    around = re.split(r"\$\w+", (pages.TEMPLATES / "report.html").read_text())
    assert re.fullmatch(".*".join(map(re.escape, around)), report, flags=re.DOTALL)
    shown = {}
    both = re.findall('srcdoc="(.*?)"></iframe>', (DEMO / "late.html").read_text(), flags=re.DOTALL)
    played = {name: (DEMO / f"{name}.html").read_text() for name in PLAYED}
    for name, page in [*played.items(), *zip(("with MAD", "without"), map(html.unescape, both), strict=True)]:
        assert re.sub(r'(id="run">).*?(</script>)', r"\1{}\2", page, count=1) == template, name
        shown[name] = content(page)
        assert shown[name]["title"].count("PneumoniaMNIST") == 1
    out = {name: {c for c, t in enumerate(run["excluded"]) if t} for name, run in shown.items()}
    liars = {name: {c for c, lies in enumerate(run["malicious"]) if lies} for name, run in shown.items()}
    assert len(shown["main"]["rounds"]) == 1000 and out["main"] == liars["main"] and len(liars["main"]) == 2
    assert not liars["honest"] and not out["honest"]
    assert liars["without"] == liars["with MAD"] == out["with MAD"] and not out["without"]
    assert {shown["with MAD"]["excluded"][c] for c in out["with MAD"]} == {20}
    assert len(liars["turned"]) == 4 and out["turned"] == set(range(10)) - liars["turned"]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", [*PLAYED, "late", "report"])
def test_the_pages_without_an_installation_load_nothing_and_have_no_error(tmp_path, name):
    page = (DEMO / f"{name}.html").read_text().replace("<head>", ERRORS + ALONE, 1)
    (tmp_path / "page.html").write_text(page)
    assert browse(tmp_path / "page.html") == []
    (tmp_path / "page.html").write_text(page.replace("</body>", '<img src="absent.png"></body>', 1))
    assert browse(tmp_path / "page.html") == ["img-src"]  # the negative control


# ---------------------------------------------------------------- what if


def replayed(d, settings, mad_start):
    """The State after each round, from trust.mad_step with the distances d [rounds, clients] instead of models."""
    state, states = trust.initial_state(d.shape[1]), []
    with mock.patch("trust.normalised_distance", lambda W, spread, settings: (W[:, 0], W[:, 0], 0.0)):
        for t, row in enumerate(d, 1):
            state = trust.mad_step(row[:, None], state, t, mad_start, settings)
            states.append(state)
    return states


def scored(folder, d, settings, mad_start):
    """A run of which the clients had these d, and its clients.csv as a frame."""
    rounds = len(d)
    playable(folder, rounds=rounds, mad_start=mad_start, settings=vars(settings))
    rows = []
    for t, state in enumerate(replayed(d, settings, mad_start), 1):
        for c, values in enumerate(zip(state.active.astype(int), state.d, state.reputation, state.trust)):
            rows.append((t, c, int(c < 2), *("" if np.isnan(value) else float(f"{value:.6g}") for value in values)))
    write_csv(folder / "clients.csv", ["round", "client", "malicious", "active", "d", "reputation", "trust"], rows)
    write_csv(folder / "rounds.csv", ROUND_COLUMNS, [(t, 0.5, 0.5, 0.5, 0) for t in range(1, rounds + 1)])
    write_csv(folder / "plane.csv", ["round", "client", "x", "y"], [(*row[:2], row[1], 1) for row in rows])
    return pandas.read_csv(folder / "clients.csv")


def sized(page, size):
    """The page in a window of a size in pixels. Chromium's own window has a frame."""
    style = "width:{}px;height:{}px;border:0".format(*size)
    return f'<title></title><iframe style="{style}" srcdoc="{html.escape(page)}"></iframe>'


def driven(folder, script, *flags, size=None, **options):
    """What a script saw: it is called as a function in the page that plays the run of a folder.

    `size` is that of the window, in pixels. `flags` are Chromium's.
    """
    page = pages.play(plot.load_run(folder), **options).replace("<head>", ERRORS, 1)
    script = f"<script>top.document.title = JSON.stringify([(() => {{ {script} }})(), errors]);</script></body>"
    page = page.replace("</body>", script, 1)
    (folder / "driven.html").write_text(sized(page, size) if size else page)
    seen, errors = browse(folder / "driven.html", *flags)
    assert errors == []
    return seen


MOVE = """const move = (name, value) => {
  const input = byId("whatif").querySelector(`[name=${name}]`);
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
};
const text = (id) => byId(id).textContent;
"""
CHANGED = [
    {"alpha": 0.3}, {"beta_reputation": 0.4, "threshold": 0.3}, {"beta_trust": 0.35, "alpha": 0.9},
    {"threshold": 0.6, "mad_start": 3}, {"mad_start": 41, "alpha": 0.0, "beta_trust": 1.0},
]  # fmt: skip
ASKED = """
const shown = run.rounds.map((_, i) => { show(i); return [...byId("bars").querySelectorAll("g")].map((column) =>
  [column.querySelector(".number")?.textContent ?? null, column.lastChild.dataset.tip]); });
const asked = %s.map((changes) => {
  byId("own").click();
  for (const [name, value] of Object.entries(changes)) move(name === "mad_start" ? "start" : name, value);
  return history.map((now) => [now.reputation, now.trust, now.active, now.d]);
});
return [shown, asked];
"""


def numbers(values):
    return np.array(values, float)  # null is NaN


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(
    "settings",
    [
        PRESETS["paper"],
        replace(PRESETS["testbed"], threshold=0.3),
        replace(PRESETS["paper"], judged="reputation", excluded="observed", order="smooth-clip"),
    ],
    ids=["paper", "testbed", "others"],
)
def test_a_page_computes_what_the_run_and_trust_py_compute(tmp_path, settings):
    rng = np.random.default_rng(1)
    d = (rng.random((40, 5)) ** [3, 2, 1, 0.7, 0.4]).round(6)
    d[11, 2] = np.nan if settings.excluded == "observed" else d[11, 2]  # it submitted NaN, and later numbers again
    table = scored(tmp_path / "a", d, settings, mad_start=None)
    shown, asked = driven(tmp_path / "a", MOVE + ASKED % json.dumps(CHANGED))
    for (t, client), row in table.set_index(["round", "client"]).iterrows():
        number, tip = shown[t - 1][client]
        if np.isnan(row.trust):
            assert number is None and "trust" not in tip
            continue
        assert float(number) == pytest.approx(row.trust, abs=0.00501) and len(number) == 4
        digits = re.search(r"d (\d\.\d{3}), reputation (\d\.\d{3}), trust (\d\.\d{3})", tip)
        assert numbers(digits.groups()) == pytest.approx(row[["d", "reputation", "trust"]].to_numpy(), abs=0.000501)
    outcomes = set()
    for changes, found in zip(CHANGED, asked, strict=True):
        others = {name: value for name, value in changes.items() if name != "mad_start"}
        start = changes.get("mad_start", 41)
        states = replayed(d, replace(settings, **others), start if start <= 40 else None)
        for state, (reputation, trusts, active, _) in zip(states, found, strict=True):
            assert numbers(reputation) == pytest.approx(state.reputation, abs=1e-6, nan_ok=True)
            assert numbers(trusts) == pytest.approx(state.trust, abs=1e-6, nan_ok=True)
            assert active == state.active.tolist()
        outcomes.add(tuple(active))
    assert len(outcomes) > 1  # the settings do change who is out


@pytest.mark.slow
@needs_browser
def test_what_a_page_predicts_for_a_run_without_mad_is_what_the_run_with_that_start_does(tmp_path, small):
    config = Config(rounds=8, clients=5, malicious=0.2, dataset="phantom")
    simulate(config, tmp_path / "never", dataset=small)
    real = simulate(replace(config, mad_start=5), dataset=small).summary
    first = [client for client, t in real["excluded"].items() if t == 5]
    assert len(first) == 1 and min(real["excluded"].values()) == 5
    script = """
move("start", 5); show(3); const before = text("story"); show(4);
const marked = () => [...document.querySelectorAll("em")].map((doubt) => !doubt.hidden);
const at = [differs, text("story"), text("exact"), document.body.className, ...marked()];
show(5);
const after = marked();
byId("own").click();
return [before, ...at, ...after, differs, text("story"), document.body.className];
"""
    seen = driven(tmp_path / "never", MOVE + script)
    kind = {True: "attacker", False: "honest"}[first[0] in real["malicious"]]
    assert seen[:3] == ["MAD starts in round 5", 5, f"Excluded: client {first[0]} ({kind}) in round 5"]
    assert seen[3].startswith("Exact up to round 5. ") and seen[3].endswith("later rounds are a what-if.")
    assert seen[4:13] == ["whatif", False, *[True] * 7]  # the curves are shaded from round 5 on
    assert seen[13:] == [None, "MAD never starts: nobody is excluded", ""]


@pytest.mark.slow
@needs_browser
def test_bars_and_threshold_follow_at_once_and_a_client_without_a_record_is_marked(tmp_path):
    d = np.array([[0.1, 0.9, 0.9]] * 8)
    scored(tmp_path / "a", d, PRESETS["paper"], mad_start=3)
    script = """
const labels = () => [...byId("bars").querySelectorAll(".soft")].map((label) => label.textContent);
const look = () => [text("story"), labels(), differs];
show(7); const own = look(); move("threshold", 0.0); return [own, look(), text("exact")];
"""
    own, changed, exact = driven(tmp_path / "a", MOVE + script)
    assert own == ["Excluded: client 0 (attacker) in round 3", ["0", "0.5", "1", "out", "0", "1", "2", "0.15"], None]
    assert changed == ["Nobody is excluded", ["0.5", "1", "?", "0", "1", "2", "0"], 3]
    assert exact.startswith("Exact up to round 3")


@pytest.mark.slow
@needs_browser
def test_the_excluded_are_told_together(tmp_path):
    d = np.array([[0.1, 0.1, 0.9, 0.9, 0.2, 0.9, 0.2, 0.9]] * 3 + [[0.9, 0.9, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9]] * 5)
    table = scored(tmp_path / "a", d, PRESETS["paper"], mad_start=3)
    out = {int(client): int(rows["round"].min()) for client, rows in table[table["active"] == 0].groupby("client")}
    assert out == {0: 3, 1: 3, 4: 3, 6: 3, 2: out[2]} and out[2] > 3
    story = driven(tmp_path / "a", "show(7); return byId('story').textContent")
    groups = (
        f"clients 0, 1 (attackers) in round 3; clients 4, 6 (honest) in round 3; client 2 (honest) in round {out[2]}"
    )
    assert story == f"Excluded: {groups}"


@pytest.mark.slow
@needs_browser
def test_a_page_says_where_it_can_not_ask_what_if(tmp_path):
    """The negative controls: one number of the record is changed; the run lacks d, or a setting."""
    table = scored(tmp_path / "a", np.full((6, 3), 0.4), PRESETS["paper"], mad_start=None)
    table.loc[table.index[7], "trust"] += 0.02
    table.to_csv(tmp_path / "a" / "clients.csv", index=False)
    script = "return [byId('exact').textContent, byId('own').hidden, byId('story').textContent]"
    why, hidden, story = driven(tmp_path / "a", script)
    assert why.endswith("computes other scores than the run in round 3.")
    assert hidden and story == "MAD never starts: nobody is excluded"
    assert "lack d" in driven(playable(tmp_path / "b"), script)[0]
    scored(tmp_path / "c", np.full((6, 3), 0.4), PRESETS["paper"], mad_start=None)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    del config["settings"]["threshold"]
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    assert "or a setting" in driven(tmp_path / "c", script)[0]


# ---------------------------------------------------------------- one client through the equations

PATH = """
const rows = () => [...byId("sums").rows].map((row) => [...row.cells].map((cell) =>
  cell.textContent.replaceAll("\\u2212", "-"))); // the minus sign
const click = (target) => target.dispatchEvent(new MouseEvent("click", { bubbles: true }));
const path = (round) => {
  show(round - 1);
  return [byId("chosen").textContent, rows(), byId("judgement").textContent];
};
"""


@pytest.mark.slow
@needs_browser
def test_the_path_of_a_client_through_the_equations_by_hand(tmp_path):
    """Round 2: 0.9 + 0.2 - exp(-0.8 * 0.9 / 2) = 1.1 - 0.698 = 0.402, and 0.75 * 0.402 + 0.25 * 0.9 = 0.527."""
    scored(tmp_path / "a", np.array([[0.9, 0.95, 0.95], [0.2, 0.95, 0.95], [0.2, 0.95, 0.95]]), PRESETS["paper"], 2)
    script = "click(byId('plane').querySelector('[data-client=\"0\"]')); return [1, 2, 3].map(path)"
    first, second, third = driven(tmp_path / "a", PATH + script)
    assert first == [
        "Client 0 (attacker)",
        [
            ["(1) R", "d = 0.900", "= 0.900"],
            ["(5) T", "√(0.900² + 0.900²) - √(0.100² + 0.100²)", "= 1.131"],
            ["(6) T", "0.85 · 1.131 + 0.15 · 0.000", "= 0.962"],
            ["(7) T", "0.962, clipped to 0…1", "= 0.962"],
        ],
        "The trust 0.962 is not below the threshold 0.15",
    ]
    assert second[1] == [
        ["(2) R", "d < 0.5: 0.900 + 0.200 - exp(-(1 - 0.200) · 0.900 / 2)", "= 0.402"],
        ["(3) R", "0.402, clipped to 0…1", "= 0.402"],
        ["(4) R", "0.75 · 0.402 + 0.25 · 0.900", "= 0.527"],
        ["(5) T", "√(0.527² + 0.200²) - √(0.473² + 0.800²)", "= -0.366"],
        ["(6) T", "0.85 · -0.366 + 0.15 · 0.962", "= -0.167"],
        ["(7) T", "-0.167, clipped to 0…1", "= 0.000"],
    ]
    assert second[2] == "The trust 0.000 is below the threshold 0.15, so it is excluded"
    assert third[1:] == [[], "It was excluded in round 2."]


@pytest.mark.slow
@needs_browser
def test_the_page_says_why_mad_excludes_a_client_or_keeps_it(tmp_path):
    script = "return [0, 1].map((client) => { chosen = client; return run.rounds.map((t) => path(t)[2]); });"
    d = np.array([[0.1, 0.9, 0.8], [0.1, 0.9, 0.8], [0.1, 0.9, 0.8], [0.9, 0.1, 0.8], [0.1, 0.9, 0.8]])
    scored(tmp_path / "testbed", d, PRESETS["testbed"], mad_start=2)  # the lowest first, and a round later
    first, _ = driven(tmp_path / "testbed", PATH + script)
    assert first[0] == "MAD judges it from the next round on."
    assert first[1].endswith("of round 1 is below the threshold 0.15, but MAD is off")
    assert (
        first[2].endswith("of round 2 is the lowest, so it is excluded")
        and first[3:] == ["It was excluded in round 3."] * 2
    )
    scored(tmp_path / "kept", np.full((3, 3), 0.2), PRESETS["paper"], mad_start=2)
    off, kept, _ = driven(tmp_path / "kept", PATH + script)[0]
    assert off.endswith("below the threshold 0.15, but MAD is off") and kept.endswith("but nobody would be left")
    d = np.array([[0.9, 0.9, 0.8], [np.nan, 0.9, 0.8], [np.nan, 0.9, 0.8]])
    settings = replace(PRESETS["paper"], excluded="observed")
    scored(tmp_path / "nan", d, settings, mad_start=None)
    _, lost, after = driven(tmp_path / "nan", PATH + script)[0]
    assert lost == "It submitted NaN or infinity: it has no d, and is excluded."
    assert after == "It was excluded in round 2."


@pytest.mark.slow
@needs_browser
def test_the_curves_of_a_path_are_drawn_for_honest_clients_too(tmp_path):
    script = """
return [1, 2].map((client) => { chosen = client; show(5);
  return [...byId("path").querySelectorAll("polyline")].map((line) => getComputedStyle(line).stroke); });
"""
    for strokes in driven(of_ten(tmp_path / "a"), PATH + script):
        assert len(strokes) == 6 and "none" not in strokes


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", ["paper", "testbed"])
@pytest.mark.parametrize("order", ["clip-smooth", "smooth-clip"])
def test_the_sums_of_a_path_give_what_the_page_shows(tmp_path, name, order):
    """Every sum is worked out again from its text. Its numbers have three digits."""
    rng = np.random.default_rng(2)
    settings = replace(PRESETS[name], order=order)
    scored(tmp_path / "a", rng.random((6, 3)).round(6), settings, mad_start=None)
    script = "take(1); return [1, 2, 3, 4, 5, 6].map((t) => [path(t)[1], scores().reputation[1], scores().trust[1]]);"
    falls = set()
    for rows, reputation, trusted in driven(tmp_path / "a", PATH + script):
        results = {}
        for equation, text, value in rows:
            formula = re.sub(r"√(\([^)]*\))", r"\1**0.5", text.split(": ")[-1].removeprefix("d = "))
            for old, new in {"·": "*", "²": "**2", "exp": "np.exp"}.items():
                formula = formula.replace(old, new)
            clipped = formula.removesuffix(", clipped to 0…1")
            worked = float(np.clip(float(clipped), 0, 1)) if clipped != formula else eval(formula, {"np": np})
            results[equation[:3]] = float(value.removeprefix("= "))
            assert worked == pytest.approx(results[equation[:3]], abs=0.003)
            falls.add(text[:3]) if equation == "(2) R" else None
        numbered = list(results)
        assert numbered in (
            ["(1)", "(5)", "(6)", "(7)"],
            [f"({n})" for n in ("243567" if order == "smooth-clip" else "234567")],
        )
        last = "(1)" if "(1)" in results else "(3)" if order == "smooth-clip" else "(4)"
        assert (results[last], results["(7)"]) == pytest.approx((reputation, trusted), abs=0.000501)
    assert falls == {"d <", "d ≥"}


@pytest.mark.slow
@needs_browser
def test_a_client_is_chosen_by_mouse_or_keys_and_left_again(tmp_path):
    script = """
const seen = [], press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const look = () => seen.push([chosen, ...["accuracy", "loss", "path", "sums"].map((id) => byId(id).checkVisibility())]);
const column = (client) => byId("bars").querySelector(`[data-client="${client}"]`);
const takesFocus = (target) => {
  const down = new MouseEvent("mousedown", { bubbles: true, cancelable: true });
  target.dispatchEvent(down);
  return !down.defaultPrevented;
};
look(); click(column(1)); look(); click(column(2)); look(); click(column(2)); look();
column(0).focus(); press(column(0), "Enter"); look(); press(document, "Escape"); look();
click(column(1)); byId("back").click(); look();
seen.push([column(1), byId("undo"), byId("slider")].map(takesFocus)); // without focus, the space bar plays
column(3).dispatchEvent(new PointerEvent("pointermove", { bubbles: true })); const tip = byId("tip").hidden;
click(column(3)); seen.push([tip, byId("tip").hidden]); click(column(3)); // its numbers would be those of before
click(column(1)); press(document, "h"); look(); press(document, "r"); look();
return seen;
"""
    seen = driven(of_ten(tmp_path / "a"), PATH + script)
    curves, path = [True, True, False, False], [False, False, True, True]
    assert seen[:7] == [[None, *curves], [1, *path], [2, *path], [None, *curves], [0, *path], *[[None, *curves]] * 2]
    assert seen[7:9] == [[False, False, True], [False, True]]
    assert seen[9:] == [[None, *curves], [None, *curves]]  # the guess tells nothing of the chosen client


@pytest.mark.slow
@needs_browser
def test_curves_are_drawn_without_smoothing_what_happens_and_with_round_axes(tmp_path):
    """The running mean covers 3 of 40 rounds. It crosses neither the attack's start nor an exclusion."""
    rows = [(t, c, int(c == 2), int(c < 2 or t < 21), 0.9, 0.9) for t in range(1, 41) for c in range(3)]
    folder = playable(tmp_path / "a", rows=rows, rounds=40, attack_start=11)
    losses = [0.2] * 10 + [0.85] * 10 + [0.2] * 20
    write_csv(folder / "rounds.csv", ROUND_COLUMNS, [(t, loss, 0.5, 0.5, 0) for t, loss in enumerate(losses, 1)])
    script = """
show(39);
const ticks = (id) => [...byId(id).querySelectorAll("text")].slice(0, 3).map((text) => text.textContent);
return [runningMean(run.loss), runningMean([1, ...run.loss.slice(1)]).slice(0, 3), ticks("loss"), rounded(0.1)];
"""
    mean, first, ticks, tenth = driven(folder, script)
    assert mean == pytest.approx(losses) and first == pytest.approx([0.6, 1.4 / 3, 0.2])
    assert ticks == ["0.00", "0.50", "1.00"] and tenth == pytest.approx(0.1)


@pytest.mark.slow
@needs_browser
def test_no_mark_hides_the_number_of_a_ring(tmp_path):
    script = """
return run.rounds.map((_, i) => { show(i); const em = parseFloat(getComputedStyle(byId("plane")).fontSize);
  const box = (element) => element.getBoundingClientRect();
  const marks = [...byId("plane").querySelectorAll("g")].map(box);
  return [...byId("plane").querySelectorAll("text.soft")].map(box).filter((text) => marks.some((mark) =>
    mark.left < text.right && mark.right > text.left && mark.top < text.bottom && mark.bottom > text.top)).length; });
"""
    assert driven(of_ten(tmp_path / "a"), script, size=(1280, 720)) == [0] * 8


# ---------------------------------------------------------------- two runs side by side


def beside(folder, script, size):
    """What a script saw in the page that plays the two runs of a folder side by side, in a window of this size.

    It is called as an async function. In it, `runs` are the windows of both runs, and `await wait()` waits until one
    has followed the other.
    """
    assert plot.main([str(folder), "--play"]) == 0
    page = (folder / "figures" / "side-by-side.html").read_text().replace("<head>", ERRORS, 1)
    script = f"""<script>
const wait = () => new Promise((done) => setTimeout(done, 300));
const look = async () => {{ {script} }};
addEventListener("load", () => wait().then(look).catch((error) => errors.push(error.stack)).then((seen) => {{
  top.document.title = JSON.stringify([seen, errors]);
}}));
</script></body>"""
    (folder / "driven.html").write_text(sized(page.replace("</body>", script, 1), size))
    seen, errors = browse(folder / "driven.html")
    assert errors == []
    return seen


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("size", [(1920, 1080), (1280, 720)], ids=str)
def test_two_runs_play_side_by_side_and_can_be_read_from_afar(tmp_path, size):
    of_ten(tmp_path / "mad")
    scored(tmp_path / "never", np.array([[0.1, 0.15] + [0.9] * 8] * 8), PRESETS["paper"], mad_start=None)
    losses = [(t, 3.0 if t == 8 else 0.5, 0.5, 0.5, 0) for t in range(1, 9)]
    write_csv(tmp_path / "never" / "rounds.csv", ROUND_COLUMNS, losses)
    script = f"""
const measured = (page) => new page.Function({json.dumps(MEASURED)})();
const look = (page) => ["round", "story"].map((id) => page.document.getElementById(id).textContent);
const seen = [document.activeElement === document.querySelector("iframe")]; // so that its keys work at once
const key = (page, key) => page.document.dispatchEvent(new page.KeyboardEvent("keydown", {{ key }}));
key(runs[0], "End"); await wait(); seen.push(runs.map(look));
const texts = (page) => [...page.document.getElementById("loss").querySelectorAll("text")];
seen.push(runs.map((page) => texts(page).map((text) => text.textContent)));
key(runs[1], "ArrowLeft"); key(runs[1], "ArrowLeft"); await wait(); seen.push(runs.map(look));
seen.push(runs.map(measured));
runs[1].take(1); await wait(); seen.push(runs.map(measured));
seen.push(runs.map((page) => page.document.getElementById("chosen").textContent));
key(runs[0], "h"); key(runs[0], "Home"); await wait(); seen.push(runs.map(look));
runs[1].play(true); await new Promise((done) => setTimeout(done, 4000)); seen.push(runs.map(look));
return seen;
"""
    focused, end, axes, back, curves, path, chosen, home, played = beside(tmp_path, script, size)
    never = "MAD never starts: nobody is excluded"
    assert focused
    assert end == [["Round 8 of 8", "Excluded: clients 0, 1 (attackers) in round 4"], ["Round 8 of 8", never]]
    assert [texts[:3] for texts in axes] == [["0.00", "1.50", "3.00"]] * 2  # both have the larger axis
    for told, t in (back, 6), (home, 1), (played, 8):
        assert [texts[0] for texts in told] == [f"Round {t} of 8"] * 2
    assert chosen == ["", "Client 1 (attacker)"]
    for seen in [*curves, *path]:
        assert seen["smallest"] >= 0.016 and seen["cut"] == [] and seen["scrolls"][:2] == [False, False]
        assert 0.97 < seen["filled"] <= 1 and seen["drawn"] > 0.4


def test_two_runs_have_a_page_with_both_unless_it_would_tell_who_lies(tmp_path, capsys):
    """Negative controls: one run, three runs, and --hide."""
    for name in "abc":
        playable(tmp_path / name)
        assert plot.main([str(tmp_path), "--play", "--out", str(tmp_path / "out" / name)]) == 0
    assert plot.main([str(tmp_path), "--play", "--hide", "--out", str(tmp_path / "out" / "hide")]) == 0
    assert [path.parent.name for path in (tmp_path / "out").rglob("side-by-side.html")] == ["b"]
    page = (tmp_path / "out" / "b" / "side-by-side.html").read_text()
    old = tmp_path / "out" / "c" / "side-by-side.html"
    old.write_text("two earlier runs")
    assert plot.main([str(tmp_path), "--play", "--out", str(old.parent)]) == 0 and not old.exists()
    assert page.count("<iframe") == 2 and [title in page for title in ("play-a", "play-b")] == [True, True]
    assert html.escape((tmp_path / "out" / "b" / "play-a.html").read_text()) in page


# ---------------------------------------------------------------- guess who lies

GUESS = """
const seen = [], press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const look = () => seen.push({
  marks: [...new Set([...byId("plane").querySelectorAll("g")].map((mark) =>
    [mark.firstChild.tagName, getComputedStyle(mark).fill, getComputedStyle(mark.firstChild).opacity].join()))].length,
  told: document.body.innerText.match(/attacker|honest(?! clients)|trust|reputation|excluded/gi) ?? [],
  votes: [...byId("bars").querySelectorAll(".number")].map((label) => label.textContent),
  story: byId("story").textContent, verdict: byId("verdict").innerText, round: run.rounds[frame], last: end(),
  title: byId("title").textContent,
});
look();
byId("hide").hidden || byId("hide").click();
look();
show(1);
byId("plane").querySelector("g[data-client='2']").dispatchEvent(new MouseEvent("click", { bubbles: true }));
byId("bars").querySelector("[data-client='2']").dispatchEvent(new MouseEvent("click", { bubbles: true }));
const column = byId("bars").querySelector("[data-client='0']");
column.focus(); press(column, "Enter");
const focused = document.activeElement; // drawn anew, the column still has the focus
seen.push([focused !== column, focused.getAttribute("aria-label"), focused.getAttribute("role")]);
press(focused, " "); byId("undo").click();
press(document, "End"); look();
byId("reveal").click(); look();
return seen;
"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("hide", [False, True])
def test_who_is_malicious_is_hidden_until_all_have_voted(tmp_path, hide):
    table = scored(tmp_path / "a", np.array([[0.1, 0.9, 0.9, 0.9]] * 6), PRESETS["paper"], mad_start=4)
    assert set(table[table["active"] == 0]["client"]) == {0} and table["malicious"].sum() == 2 * 6  # 1 is missed
    first, hidden, focus, voted, revealed = driven(tmp_path / "a", GUESS, hide=hide)
    assert (first["marks"] == 2 and "attacker" in first["told"]) != hide  # the negative control: without --hide
    assert hidden["marks"] == voted["marks"] == 1 and hidden["told"] == voted["told"] == []
    assert hidden["votes"] == ["0"] * 4 and hidden["last"] == 3  # MAD excludes in round 4: no round after it is shown
    assert focus == [True, "vote for client 0, 1 vote", "button"]
    assert voted["votes"] == ["1", "0", "2", "0"] and voted["round"] == 4
    assert voted["story"] == "MAD decides in this round. Vote, then reveal"
    assert voted["title"] == "PneumoniaMNIST, 6 rounds"  # nothing of an attack, or of MAD
    assert revealed["title"] == "MAD from round 4: PneumoniaMNIST, 6 rounds, seed 0"
    assert revealed["marks"] == 3 and revealed["last"] == 5  # one of the attackers is pale
    assert revealed["story"] == "Excluded: client 0 (attacker) in round 4"
    assert revealed["verdict"].split("\n") == [
        "Malicious: 0, 1.",
        "1 of 3 votes right: client 0 (attacker): 1 vote from round 2 on; client 2 (honest): 2 votes from round 2 on.",
        "MAD excluded 1 of 2 attackers.",
    ]


VERDICTS = """return %s.map(([malicious, excluded, start, attack]) => {
  run.malicious = malicious; run.excluded = excluded; run.start = start; run.attack_start = attack;
  return verdict();
})"""


@pytest.mark.slow
@needs_browser
def test_how_many_rounds_mad_needed_by_hand(tmp_path):
    cases = [
        [[1, 0, 1], [12, None, 10], 10, 1],
        [[1, 0, 1], [21, None, 23], 10, 20],  # MAD had started before the attack
        [[0, 0, 1], [None, 12, 10], 10, 1],
        [[0, 0, 0], [None, None, None], 10, 1],
        [[1, 0, 0], [None, None, None], None, 1],
    ]
    several, later, wrong, nobody, never = driven(playable(tmp_path / "a"), VERDICTS % json.dumps(cases))
    both_on = "it and the attack were on from round"
    assert f"MAD needed 2 rounds: {both_on} 10, and all attackers were out in round 12" in several
    assert f"MAD needed 3 rounds: {both_on} 20" in later
    assert "MAD excluded all attackers at once, in round 10." in wrong and "Excluded by mistake: 1." in wrong
    assert nobody == "Nobody is malicious.\nNobody voted." and never.endswith("MAD never started.")


# ---------------------------------------------------------------- legible

STATES = [
    "",
    "ask({ start: 3, threshold: 0.5 });",
    "guess(true); take(2);",
    "guess(true); take(2); take(9); guess(false);",
    "show(2); take(0);",
]
MEASURED = """
const texts = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility() &&
  [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
const inside = (box) => box.left >= 0 && box.top >= 0 && box.right <= innerWidth + 1 && box.bottom <= innerHeight + 1;
const root = document.documentElement, aside = document.querySelector("aside");
return {
  smallest: Math.min(...texts.map((element) => parseFloat(getComputedStyle(element).fontSize))) / innerHeight,
  cut: texts.filter((element) => !inside(element.getBoundingClientRect())).map((element) => element.textContent),
  scrolls: [root.scrollWidth > innerWidth, root.scrollHeight > innerHeight, aside.scrollHeight > aside.clientHeight],
  filled: document.querySelector("footer").getBoundingClientRect().bottom / innerHeight,
  drawn: [...document.querySelectorAll("main svg, main table")].reduce((sum, drawing) =>
    sum + drawing.clientWidth * drawing.clientHeight, 0) / (innerWidth * innerHeight),
  texts: texts.length,
};
"""


def of_ten(folder):
    """A run of ten clients, of which two are excluded in round 4."""
    scored(folder, np.array([[0.1, 0.15] + [0.9] * 8] * 8), PRESETS["paper"], mad_start=4)
    return folder


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("state", STATES, ids=["run", "what-if", "hidden", "revealed", "path"])
@pytest.mark.parametrize("size", [(1920, 1080), (1280, 720)], ids=str)
def test_a_page_fills_a_screen_and_can_be_read_from_afar(tmp_path, size, state):
    seen = driven(of_ten(tmp_path / "a"), f"show(6); {state} show(2); {MEASURED}", size=size)
    assert seen["smallest"] >= 0.016 and seen["texts"] > 50
    assert seen["cut"] == [] and seen["scrolls"] == [False] * 3
    assert 0.97 < seen["filled"] <= 1 and seen["drawn"] > 0.45


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("size", [(360, 640), (390, 844), (800, 1280), (1280, 400)], ids=str)
def test_a_page_is_never_wider_than_its_window(tmp_path, size):
    seen = driven(of_ten(tmp_path / "a"), f"ask({{ start: 3 }}); show(6); {MEASURED}", size=size)
    assert seen["scrolls"][0] is False and seen["drawn"] > 0.3


@pytest.mark.slow
@needs_browser
def test_honest_clients_are_no_heap_beside_far_attackers(tmp_path):
    angles = np.arange(10) * np.pi / 4
    places = [(1.5, 0.1), (1.5, -0.1), *np.transpose([0.1 * np.cos(angles), 0.1 * np.sin(angles)])[2:]]
    folder = of_ten(tmp_path / "a")
    write_csv(folder / "plane.csv", ["round", "client", "x", "y"], [(1, c, *xy) for c, xy in enumerate(places)])
    script = """
const svg = byId("plane"), box = svg.getBoundingClientRect();
return [...svg.querySelectorAll("g")].map((mark) => mark.getAttribute("transform").match(/[\\d.]+/g).map(Number))
  .map(([x, y]) => [x / box.width, y / box.height]);
"""
    marks = np.array(driven(folder, script, size=(1280, 720)))
    assert marks.shape == (10, 2) and ((marks > 0) & (marks < 1)).all()
    assert (np.ptp(marks[2:], axis=0) > 0.35).all()  # of the width and the height; in proportion it would be 0.07
    assert marks[:2, 0].min() > marks[2:, 0].max()


@pytest.mark.slow
@needs_browser
def test_a_page_can_be_used_without_a_mouse_and_shows_numbers_with_one(tmp_path):
    script = """
const press = (key, target = document.body) => {
  const event = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true });
  target.dispatchEvent(event);
  return [frame, event.defaultPrevented];
};
const knob = byId("whatif").querySelector("input"), slider = byId("slider");
const seen = [press("End"), press("ArrowLeft"), press("ArrowRight", slider)];
seen.push(press("ArrowLeft", knob), press("ArrowLeft"), press(" ", byId("hide"))); // a control keeps its own keys
seen.push(press(" ", knob)[1], timer !== null); play(false);
ask({ threshold: 0.9 }); press("o"); seen.push(settings === own);
press("h"); seen.push(hidden); press("r"); seen.push(hidden);
const point = (target, x) => {
  target.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: 1, bubbles: true }));
  return byId("tip").hidden ? null : byId("tip").textContent;
};
show(7);
const box = byId("loss").getBoundingClientRect();
seen.push(point(byId("plane").querySelector("[data-client='1'] circle, [data-client='2'] circle"), 1));
seen.push(point(byId("loss"), box.right), point(byId("title"), 1));
const name = (control) => control.ariaLabel ?? (control.labels[0] ?? control).textContent;
const named = [...document.querySelectorAll("button, input")].every((control) => name(control).trim());
return [seen, named, document.querySelector("footer").innerText];
"""
    folder = of_ten(tmp_path / "a")
    seen, named, footer = driven(folder, script)
    assert seen[:6] == [[7, True], [6, True], [7, True], [7, False], [6, True], [6, False]]
    assert seen[6:11] == [True, True, True, True, False]
    assert re.fullmatch(r"client 2 \(honest\), d 0\.900, reputation \d\.\d{3}, trust \d\.\d{3}", seen[11])
    assert seen[12:] == ["round 8: honest clients not recorded, participants 0.500", None]
    assert named and all(hint in footer for hint in ("space plays or pauses", "Home, End", "h: hide"))


def contrast(one, other):
    """The contrast of two colours "rgb(0, 0, 0)", 1 to 21, as WCAG 2.2 defines it."""

    def luminance(colour):
        parts = np.array(re.findall(r"[\d.]+", colour)[:3], float) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.478, abs=1e-3)  # known from tables


@pytest.mark.slow
@needs_browser
def test_a_page_respects_dark_mode_and_calm(tmp_path):
    script = """
const colours = {};
for (const name of ["paper", "ink", "soft", "honest", "attacker"]) {
  document.body.style.outlineColor = `var(--${name})`;
  colours[name] = getComputedStyle(document.body).outlineColor;
}
let pause; window.setInterval = (_, milliseconds) => { pause = milliseconds; }; play(true);
return [colours, pause];
"""
    folder = of_ten(tmp_path / "a")
    light, pause = driven(folder, script)
    dark, calm = driven(folder, script, "--force-dark-mode", "--force-prefers-reduced-motion")
    assert light["paper"] == "rgb(255, 255, 255)" and dark["paper"] == "rgb(22, 24, 28)"
    for colours in (light, dark):  # numbers in marks have the colour of the paper
        assert all(contrast(colours["paper"], colours[name]) > 4.5 for name in colours if name != "paper")
    assert (pause, calm) == (250, 1000)


# ---------------------------------------------------------------- the page that reports runs


def test_pages_that_play_and_a_report_are_asked_for_one_after_the_other(tmp_path, capsys):
    make_run(tmp_path / "a")
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path), "--play", "--report"])
    assert stop.value.code == 2 and "use one after the other\n" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path), "--hide"])
    assert stop.value.code == 2 and capsys.readouterr().err == "plot: --hide needs --play\n"
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_a_report_holds_table_figures_and_settings(tmp_path, capsys):
    make_run(tmp_path / "r" / "a", attack="label_flip")
    make_run(tmp_path / "r" / "b", data="<i>", malicious=0, mad_start=None, seed=7, client_rows=CLIENT_ROWS[:2])
    assert plot.main([str(tmp_path / "r"), "--report"]) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "r" / "figures" / "report.html").read_text()
    assert str(tmp_path / "r" / "figures" / "report.html") in printed
    for words in ("attacker 2 in round 3", "MAD from round 3", "label_flip, 0.2 of the clients", "nobody"):
        assert f"<td>{words}</td>" in page, words
    assert "<td>last 2</td>" in page and '<td class="number">0.150</td>' in page  # mean LOSS from the exclusion on
    assert "<td>last 4</td>" in page and '<td class="number">0.475</td>' in page  # nobody is excluded
    assert "<i>" not in page and "&lt;i&gt;" in page
    assert page.count("<img ") == printed.count(".png") > 3
    assert "&quot;mad_start&quot;: 3" in page and "&quot;seed&quot;: 7" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "http" not in page
    assert re.search(r"<body><main>.*</main></body></html>\s*$", page, flags=re.DOTALL)  # a landmark holds all
    assert "prefers-color-scheme: dark" in page


def reported(folder):
    loaded = [plot.load_run(path) for path in plot.find_runs(folder)]
    pictures = {name.as_posix(): folder / "empty" for name, _ in plot.figures(loaded, folder)}
    (folder / "empty").write_text("")
    return pages.report(loaded, pictures, folder)


def test_a_run_in_a_report_links_to_its_figure(tmp_path):
    """Of two seeds that share a figure of trust it shows the first; the second is in the curves. One has no scores."""
    for name, options in {"x/a": {}, "x/b": {"seed": 1}, "x/c": {"mad_start": 2}, "y z/d": {"client_rows": []}}.items():
        make_run(tmp_path / name, **options)
    page = reported(tmp_path)
    links = dict(reversed(link) for link in re.findall(r'<td><a href="#(.*?)">(.*?)</a>', page))
    assert links == {"x/a": "x/trust-c", "x/b": "x/loss", "x/c": "x/trust-c", "y z/d": "y%20z/loss"}
    assert all(f'<figure id="{link}">' in page for link in links.values())


def test_the_table_of_a_report_says_once_what_all_runs_share(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"s{seed}", seed=seed, attack="hug")
    page = reported(tmp_path)
    shared = "data PneumoniaMNIST; strategy MAD from round 3; rounds 4; attack hug, 0.2 of the clients; "
    assert f"<p>In all runs: {shared}averaged rounds last 2.</p>" in page
    heads = ["run", "seed", "excluded", "mean loss", "mean accuracy", "mean honest accuracy"]
    assert re.findall(r"<th.*?>(.*?)</th>", page) == heads
    assert page.count("<p>") == 1
    assert "In all runs" not in pages.runs_table([plot.load_run(tmp_path / "s0")], {}, tmp_path)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1280, 1024), (1920, 1080)])
def test_the_table_of_a_report_fits_the_page_and_aligns_its_numbers(tmp_path, width, height):
    """Long names, many exclusions and 1000 rounds."""
    rows = [(t, client, 0, int(t < client), 0.5, 0.5) for t in (1, 2, 3, 4, 5, 6) for client in range(1, 7)]
    for number in range(2):
        name = f"mad500-malicious0.4-dirichlet-concentration0.1-geometric_median-near_copies-testbed-s{number}"
        options = {
            "rounds": 1000 - number,
            "attack": f"near_copies{number}",
            "rule": "geometric_median" * number or "mean",
        }
        make_run(tmp_path / name, client_rows=rows, data=f"PneumoniaMNIST{number}", seed=number, **options)
    measure = """const page = document.querySelector("iframe").contentDocument, table = page.querySelector("table");
    const numbers = [...page.querySelectorAll("tr")].map((row) => [...row.cells].slice(-3).map((cell) =>
      [getComputedStyle(cell).textAlign, cell.getBoundingClientRect().right]));
    const pieces = [...page.querySelectorAll("td a")].flatMap(({ firstChild: name }) =>
      [...name.data.matchAll(/[^-]+/g)].map((piece) => {
        const range = page.createRange();
        range.setStart(name, piece.index); range.setEnd(name, piece.index + piece[0].length);
        return range.getClientRects().length;
      }));
    const size = parseFloat(getComputedStyle(table.rows[1].cells[0]).fontSize);
    document.title = JSON.stringify([table.rows[0].cells.length, numbers, pieces, size])"""
    style = f"width:{width}px;height:{height}px;border:0"
    frame = f'<title></title><iframe style="{style}" srcdoc="{html.escape(reported(tmp_path))}"></iframe>'
    (tmp_path / "frame.html").write_text(f"{frame}<script>onload = () => {{ {measure} }}</script>")
    columns, numbers, pieces, size = browse(tmp_path / "frame.html")
    assert columns == 10  # all but the averaged rounds, which are the same
    assert len(numbers) == 3 and numbers[0] == numbers[1] == numbers[2]
    assert all(side == "right" and end <= width for row in numbers for side, end in row)
    assert len(pieces) == 16 and set(pieces) == {1}  # no word of a name is broken
    assert size >= max(16, 0.016 * height)


# ---------------------------------------------------------------- the phantom


def written(figure) -> str:
    """All titles of a figure."""
    return "\n".join([figure.get_suptitle(), *(ax.get_title(loc) for ax in figure.axes for loc in ("left", "center"))])


@pytest.mark.parametrize(
    ("note", "said"), [("", "phantom images, "), ("no network", "phantom images, PneumoniaMNIST was not available")]
)
def test_every_figure_and_page_of_the_phantom_says_so(tmp_path, note, said):
    for seed in (0, 1):
        folder = measured(tmp_path / f"a-s{seed}", data="phantom", note=note, samples=True, seed=seed).folder
        parts = dict.fromkeys(("total", "composition", "model"), 0.1)
        (folder / "summary.json").write_text(json.dumps({"jumps": [{"round": 3, "loss": parts, "accuracy": parts}]}))
    write_grid(tmp_path / "table.csv", data=runs.data_in_words("phantom", note))
    loaded = [plot.load_run(folder) for folder in plot.find_runs(tmp_path)]
    drawn = {name.name: figure for name, figure in plot.figures(loaded, tmp_path)}
    assert drawn.keys() >= {"fig2", "loss", "jump", "membership", "grid-exclusions", "trust-a-s0"} and len(drawn) == 11
    for name, figure in drawn.items():
        assert said.rstrip(", ") in " ".join(written(figure).split()), name
        assert max(map(len, written(figure).splitlines())) <= runs.TITLE_WIDTH, name
    assert said in pages.play(plot.load_run(playable(tmp_path / "b", data="phantom", note=note)))
    assert said.rstrip(", ") in pages.report([plot.load_run(folder)], {}, tmp_path)
