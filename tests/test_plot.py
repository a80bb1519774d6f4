"""Tests of plot.py on small results folders that are made here.

They check what is drawn, how it is labelled, and what happens if files are missing.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

import plot
from harness import runs
from harness.console import as_command
from harness.folder import together
from harness.runs import TITLE_WIDTH, variants
from madsim import Config
from trust import PRESETS

HERE = Path(plot.__file__).parent
LOSS = [0.9, 0.7, 0.2, 0.1]
ACCURACY = [0.5, 0.6, 0.9, 1.0]
FIG_3B = "Fig. 3(b): mean accuracy of participating clients"
HONEST_ACCURACY = [0.6, 0.7, 0.8, 0.95]
ROUND_COLUMNS = ["round", "loss", "accuracy", "honest_accuracy", "active"]
CLIENT_COLUMNS = ["round", "client", "malicious", "active", "reputation", "trust"]
# Clients 0 and 1 are honest. Client 2 attacks and is excluded in round 3. After round 3, it has no scores.
CLIENT_ROWS = [
    (1, 0, 0, 1, 0.9, 0.95), (1, 1, 0, 1, 0.8, 0.85), (1, 2, 1, 1, 0.5, 0.55),
    (2, 0, 0, 1, 0.9, 0.95), (2, 1, 0, 1, 0.8, 0.85), (2, 2, 1, 1, 0.3, 0.35),
    (3, 0, 0, 1, 0.9, 0.95), (3, 1, 0, 1, 0.8, 0.85), (3, 2, 1, 0, 0.1, 0.12),
    (4, 0, 0, 1, 0.9, 0.95), (4, 1, 0, 1, 0.8, 0.85), (4, 2, 1, 0, "", ""),
]  # fmt: skip


def write_csv(path, columns, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def make_run(folder, *, note="", data="PneumoniaMNIST", samples=False, client_rows=CLIENT_ROWS, **config):
    """Make a run of four rounds with MAD from round 3, unless `config` says otherwise. Return its folder."""
    folder.mkdir(parents=True)
    settings = {"threshold": 0.15}
    config = {"rounds": 4, "mad_start": 3, "malicious": 0.2, "rule": "mean", "seed": 0, "settings": settings} | config
    (folder / "config.json").write_text(json.dumps(config | {"data": {"name": data, "note": note}}))
    rows = zip(range(1, 5), LOSS, ACCURACY, HONEST_ACCURACY, [10, 10, 8, 8], strict=True)
    write_csv(folder / "rounds.csv", ROUND_COLUMNS, rows)
    write_csv(folder / "clients.csv", CLIENT_COLUMNS, client_rows)
    if samples:
        images = np.full((4, 28, 28), 200, np.uint8)
        np.savez(folder / "samples.npz", images=images, labels=np.array([0, 0, 1, 1]))
    return folder


def loaded(folder, **options):
    return plot.load_run(make_run(folder, **options))


def new_ax():
    return Figure().subplots()


def lines(ax):
    """Labelled lines by label; the last one if a label repeats."""
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def vertical(ax):
    """The vertical lines, each as its position and its colour."""
    return [(line.get_xdata()[0], to_hex(line.get_color())) for line in ax.lines if list(line.get_ydata()) == [0, 1]]


def heading(ax):
    return ax.get_title(loc="left")


# ---------------------------------------------------------------- Fig. 3


@pytest.mark.parametrize(
    "draw, values, subject, unit",
    [
        (plot.plot_loss, LOSS, "Fig. 3(a): mean loss of participating clients", "cross-entropy (nats)"),
        (
            plot.plot_accuracy,
            ACCURACY,
            "Fig. 3(b): mean accuracy of participating clients",
            "accuracy (fraction correct)",
        ),
    ],
)
def test_curves_show_a_line_a_run(tmp_path, draw, values, subject, unit):
    runs = [loaded(tmp_path / "a"), loaded(tmp_path / "b", mad_start=None)]
    ax = new_ax()
    draw(ax, runs)
    assert list(lines(ax)) == ["MAD from round 3", "never (FedAvg)"]
    for line in ax.lines:
        assert list(line.get_xdata()) == [1, 2, 3, 4]
        assert list(line.get_ydata()) == values
    one, other = ax.lines
    assert one.get_color() != other.get_color() and one.get_linestyle() != other.get_linestyle()
    assert heading(ax) == f"{subject}\nPneumoniaMNIST, 4 rounds, seed 0"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("round", unit)


def test_running_mean_by_hand():
    # Window 3: (1 + 2)/2, (1 + 2 + 6)/3, (2 + 6 + 4)/3, (6 + 4 + 11)/3, (4 + 11)/2
    smooth = plot.running_mean(pandas.Series([1.0, 2.0, 6.0, 4.0, 11.0]), window=3)
    assert list(smooth) == pytest.approx([1.5, 3, 4, 7, 7.5])
    assert list(plot.running_mean(pandas.Series([1.0, 2.0]), window=1)) == [1, 2]


def curve_of(folder, values, causes=(), **config):
    """The light and the strong line of Fig. 3(c). In each round of the `causes` a client is excluded."""
    rows = [(t, client, 0, int(t < cause), 0.5, 0.5) for client, cause in enumerate(causes) for t in (1, cause)]
    rows += [(t - 1, client, 0, 1, 0.5, 0.5) for client, t in enumerate(causes)]
    make_run(folder, rounds=len(values), client_rows=sorted(rows), **config)
    write_csv(folder / "rounds.csv", ["round", "honest_accuracy"], enumerate(values, start=1))
    ax = new_ax()
    plot.plot_honest_accuracy(ax, [plot.load_run(folder)])
    return ax


def test_honest_accuracy_light_and_running_mean_to_each_side_of_an_exclusion(tmp_path):
    values = [0.5] * 29 + [0.8] + [0.9] * 30
    ax = curve_of(tmp_path / "a", values, causes=[31], mad_start=31)
    light, strong = ax.lines[:2]
    assert list(light.get_ydata()) == values
    assert light.get_alpha() < 0.5 and light.get_color() == strong.get_color()
    assert list(lines(ax)) == ["MAD from round 31"]
    smooth = strong.get_ydata()  # window 60 / 20 = 3
    # Round 29: (0.5 + 0.5 + 0.8) / 3. Round 30 is the last before the exclusion: (0.5 + 0.8) / 2. Round 31: only 0.9.
    assert list(smooth[27:32]) == pytest.approx([0.5, 0.6, 0.65, 0.9, 0.9])
    assert "mean of 3 rounds (strong)" in heading(ax)
    assert vertical(ax) == [(31, to_hex(strong.get_color()))]
    assert ax.lines[-1].get_linestyle() == "--"
    assert ax.get_xlabel() == "round (dashed vertical line: MAD start)"


@pytest.mark.parametrize(
    ("causes", "config"),
    [([46], {"mad_start": 31}), ([31, 46], {"mad_start": 31}), ([], {"mad_start": None, "attack_start": 46})],
)
def test_the_running_mean_does_not_jump_before_its_cause(tmp_path, causes, config):
    """The accuracy changes in round 46, where a client is excluded long after MAD's start, or the attack begins."""
    smooth = curve_of(tmp_path / "a", [0.5] * 45 + [0.9] * 15, causes, **config).lines[1].get_ydata()
    assert list(smooth) == pytest.approx([0.5] * 45 + [0.9] * 15)


def test_a_change_without_a_cause_is_smoothed(tmp_path):
    smooth = curve_of(tmp_path / "a", [0.6] * 45 + [0.9] * 15, mad_start=None).lines[1].get_ydata()
    assert list(smooth[43:47]) == pytest.approx([0.6, 0.7, 0.8, 0.9])


def test_the_running_mean_before_an_early_start_is_not_flat(tmp_path):
    """Nine rounds lie before the exclusion in round 10, and the window is 51. Here it is a third of nine."""
    values = [0.1 * t for t in range(1, 10)] + [0.95] * 991
    smooth = curve_of(tmp_path / "a", values, causes=[10], mad_start=10).lines[1].get_ydata()
    assert list(smooth[:11]) == pytest.approx([0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.95, 0.95])


def test_runs_that_agree_up_to_an_exclusion_have_one_running_mean_up_to_there(tmp_path):
    """The window is 3, and 4 rounds lie before the exclusion in round 5: the mean of round 4 has only two of them."""
    values = [0.5, 0.8, 0.5] + [0.2] * 57
    never = curve_of(tmp_path / "a", values, mad_start=None).lines[1].get_ydata()
    early = curve_of(tmp_path / "b", values, causes=[5], mad_start=5).lines[1].get_ydata()
    assert list(never[:5]) == pytest.approx([0.65, 0.6, 0.5, 0.3, 0.2])
    assert list(early[:5]) == pytest.approx([0.65, 0.6, 0.5, 0.35, 0.2])


@pytest.mark.parametrize("rounds, window", [(4, 1), (39, 1), (40, 3), (100, 5), (1000, 51)])
def test_window_is_odd_and_about_a_twentieth(tmp_path, rounds, window):
    ax = curve_of(tmp_path / "a", [0.5] * rounds, mad_start=None)
    assert (f"mean of {window} rounds" in heading(ax)) == (window > 1)
    assert len(ax.lines) == (2 if window > 1 else 1)  # without a running mean, each round is the strong line
    assert ax.get_xlabel() == "round"


def test_no_line_for_a_start_that_never_comes_or_has_not_come(tmp_path):
    ax = new_ax()
    plot.plot_honest_accuracy(ax, [loaded(tmp_path / "a", mad_start=None), loaded(tmp_path / "b", mad_start=5)])
    assert vertical(ax) == [] and ax.get_xlabel() == "round"


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "config, label",
    [
        ({"mad_start": 5}, "MAD from round 5"),
        ({"mad_start": None}, "never (FedAvg)"),
        ({"mad_start": None, "rule": "median"}, "never (median)"),
        ({"mad_start": 5, "rule": "median"}, "MAD from round 5 (median)"),
        ({"mad_start": None, "malicious": 0.0}, "no attack"),
        ({"mad_start": 5, "malicious": 0.0}, "no attack, MAD from round 5"),
    ],
)
def test_label_of_one_run(tmp_path, config, label):
    assert [style["label"] for style, _ in plot.bundles([loaded(tmp_path / "a", **config)])] == [label]


def test_seeds_are_drawn_as_their_mean_with_a_band(tmp_path):
    """Seed 0 has the losses 0.9, 0.7, 0.2, 0.1. The losses of seed 1 are higher by 0.2.

    The mean is higher than seed 0 by 0.1, and the sample standard deviation is 0.1 * sqrt 2.
    """
    runs = [loaded(tmp_path / f"3-{seed}", seed=seed) for seed in (0, 1)]
    runs.append(loaded(tmp_path / "never", mad_start=None))
    runs[1].rounds["loss"] += 0.2
    ax = new_ax()
    plot.plot_loss(ax, runs)
    assert list(lines(ax)) == ["MAD from round 3", "never (FedAvg), seed 0"]
    mean, other = ax.lines
    assert list(mean.get_ydata()) == pytest.approx([1.0, 0.8, 0.3, 0.2])
    assert mean.get_color() != other.get_color() and mean.get_linestyle() != other.get_linestyle()
    (area,) = ax.collections
    heights = area.get_paths()[0].vertices[:, 1]
    assert (heights.max(), heights.min()) == pytest.approx((1 + 0.1 * 2**0.5, 0.2 - 0.1 * 2**0.5))
    about = "PneumoniaMNIST, 4 rounds, seeds 0, 1 unless named; line: mean, band: ± one standard deviation"
    assert heading(ax).replace("\n", " ").endswith(about)


def test_a_band_has_the_rounds_that_all_seeds_have(tmp_path):
    whole, short = loaded(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    write_csv(short / "rounds.csv", ["round", "loss", "honest_accuracy"], [(1, 0.9, 0.5), (2, 0.7, 0.6), (2, 0.5, 0.7)])
    ax = new_ax()
    plot.plot_loss(ax, [whole, plot.load_run(short)])
    assert list(ax.lines[0].get_xdata()) == [1, 2]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0.9, 0.6])  # round 2 is written twice; the last row counts
    ax = new_ax()
    plot.plot_honest_accuracy(ax, [whole, plot.load_run(short)])
    assert list(lines(ax)["MAD from round 3"].get_ydata()) == pytest.approx([0.55, 0.7])
    assert len(ax.collections) == 1


def test_label_tells_what_differs_among_attacked_runs(tmp_path):
    runs = [loaded(tmp_path / str(share), malicious=share) for share in (0.1, 0.4, 0.0)]
    assert variants(runs) == [
        "malicious 0.1", "malicious 0.4", "no attack",
    ]  # fmt: skip


def test_label_tells_runs_of_other_data_or_settings_apart(tmp_path):
    runs = [loaded(tmp_path / "a"), loaded(tmp_path / "b", settings={"threshold": 0.3})]
    runs += [loaded(tmp_path / "c", data="phantom")]
    assert variants(runs) == ["data PneumoniaMNIST", "data PneumoniaMNIST, threshold 0.3", "data phantom images"]


def test_label_leaves_out_what_cannot_matter(tmp_path):
    """Without MAD its settings change nothing, and without malicious clients those of the attack change nothing."""
    of_mad = {"threshold": 0.3, "clusters": 1}
    several = [loaded(tmp_path / "a", mad_start=None, settings=of_mad), loaded(tmp_path / "b")]
    several.append(loaded(tmp_path / "c", malicious=0.0, mad_start=None, attack="noise", flip=0.5))
    several.append(loaded(tmp_path / "d", attack="hug", malicious=0.4))
    hug = "attack hug, malicious 0.4"
    assert variants(several) == ["never (FedAvg)", "MAD from round 3", "no attack", f"MAD from round 3, {hug}"]
    assert variants(several[1:2] + several[3:]) == ["attack label_flip, malicious 0.2", hug]


def test_a_preset_is_named_instead_of_its_settings(tmp_path):
    """Negative control: settings of one's own are named one by one. Early runs did not record their preset."""
    of_testbed = {"settings": vars(PRESETS["testbed"])}
    testbed = loaded(tmp_path / "testbed", preset="testbed", **of_testbed)
    own = loaded(tmp_path / "own", preset=None, settings=vars(PRESETS["testbed"]) | {"beta_trust": 0.85})
    paper, early = loaded(tmp_path / "paper", preset="paper"), loaded(tmp_path / "early")
    assert plot.title("Loss", [testbed]).endswith("seed 0, preset testbed")
    assert variants([testbed, paper]) == variants([testbed, early]) == ["preset testbed", "preset paper"]
    assert variants([paper, early])[0].startswith("MAD from round 3")
    of_own = "clusters 1, scale floor 0, equation2 testbed, order smooth-clip, excluded observed, decision next"
    assert variants([own, paper])[0].startswith(of_own)
    assert (
        variants([testbed, own]) == ["preset testbed", "beta trust 0.85"]
        and plot.title("Loss", [own]).count("clusters 1") == 1
    )
    unrecorded = loaded(tmp_path / "unrecorded", seed=1, **of_testbed)
    assert len(runs.kinds([testbed, unrecorded])) == 1
    never = loaded(tmp_path / "never", preset="testbed", mad_start=None, **of_testbed)
    assert plot.title("Loss", [never]).endswith("seed 0")  # without MAD it changes nothing


def test_seeds_are_named_where_they_are_not_those_of_most(tmp_path):
    starts = [(2, 0), (2, 1), (3, 0), (3, 1), (None, 1)]
    several = [loaded(tmp_path / f"{start}-{seed}", mad_start=start, seed=seed) for start, seed in starts]
    assert list(runs.kinds(several)) == ["MAD from round 2", "MAD from round 3", "never (FedAvg), seed 1"]
    assert plot.title("Loss", several).endswith("4 rounds, seeds 0, 1 unless named")
    assert list(runs.kinds(several[:4])) == ["MAD from round 2", "MAD from round 3"]
    assert plot.title("Loss", several[:4]).endswith("4 rounds, seeds 0, 1")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"attack": "hug", "malicious": 0.4}, "attack hug, malicious 0.4"),
        ({"rule": "krum", "partition": "dirichlet", "concentration": 0.1}, "rule krum, partition dirichlet 0.1"),
        ({"attack_start": 2, "settings": {"threshold": 0.3}}, "attack start 2, threshold 0.3"),
    ],
)
def test_titles_name_what_all_runs_share_and_is_not_the_default(tmp_path, config, said):
    several = [loaded(tmp_path / str(start), mad_start=start, **config) for start in (2, 3)]
    several.append(loaded(tmp_path / "honest", mad_start=None, malicious=0.0, rule=config.get("rule", "mean")))
    several[2].config.update({name: config[name] for name in ("partition", "concentration") if name in config})
    assert plot.title("Loss", several) == f"Loss\nPneumoniaMNIST, 4 rounds, seed 0, {said}"
    assert variants(several) == ["MAD from round 2", "MAD from round 3", "no attack"]
    ax = new_ax()
    plot.plot_loss(ax, several)
    assert heading(ax).startswith("Mean loss")  # not Fig. 3(a)


def test_titles_name_a_start_that_all_runs_share(tmp_path):
    several = [loaded(tmp_path / attack, attack=attack) for attack in ("hug", "noise")]
    assert variants(several) == ["attack hug", "attack noise"]
    assert plot.title("Loss", several).endswith("seed 0, MAD from round 3")
    rules = [loaded(tmp_path / rule, rule=rule, mad_start=None, malicious=0) for rule in ("krum", "median")]
    assert plot.title("Loss", rules).endswith("seed 0, no attack, without MAD")


def test_only_the_paper_s_figures_have_its_numbers(tmp_path):
    paper = [loaded(tmp_path / "a"), loaded(tmp_path / "b", mad_start=None), loaded(tmp_path / "c", malicious=0.0)]
    assert runs.numbered("a", "Mean loss", paper) == "Fig. 3(a): mean loss"
    for number, changed in enumerate(({"data": "phantom"}, {"attack": "hug"}, {"settings": {"clusters": 1}})):
        other = loaded(tmp_path / f"d{number}", **changed)
        assert (
            runs.numbered("a", "Mean loss", [other]) == runs.numbered("a", "Mean loss", [*paper, other]) == "Mean loss"
        )


def test_the_defaults_that_titles_leave_out_are_those_of_a_run():
    defaults = asdict(Config())
    defaults["preset"] = "paper"
    assert {name: (defaults | defaults["settings"])[name] for name in runs.DEFAULTS} == runs.DEFAULTS
    assert defaults["settings"] == runs.OF_MAD


# ---------------------------------------------------------------- the place for the Axes


def share_of_axes(figure):
    """The share of the figure's width that the Axes of a row have, without the gaps between them."""
    rows = {}
    for ax in figure.axes:
        if ax.get_subplotspec():  # not the colours of a heat map
            rows.setdefault(ax.get_subplotspec().rowspan.start, []).append(ax.get_window_extent().width)
    return min(map(sum, rows.values())) / figure.bbox.width


def nothing_is_cut(figure):
    box = figure.get_tightbbox()  # in inches
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5, 10, 20, 30, 60, 90, 200])
@pytest.mark.parametrize("kinds", [2, 9])
def test_axes_keep_their_width_whatever_the_labels(tmp_path, length, kinds):
    """Labels of runs grow with the names of their rules. Titles grow with the name of the data."""
    several = [
        loaded(
            tmp_path / str(number), rule=f"{'rule ' * length}"[:length] + str(number), data=("data " * length)[:length]
        )
        for number in range(kinds)
    ]
    for run in several:
        parts = {"composition": -0.4, "model": 0.1}
        object.__setattr__(run, "jump", {"round": 3, "loss": parts, "accuracy": parts})
    drawn = dict(plot.comparisons(several))
    assert drawn.keys() == {"loss", "accuracy", "honest_accuracy", "jump"}
    drawn["trust"] = plot.scores_figure(several[:1])
    for name, figure in drawn.items():
        plot.save(figure, tmp_path / name)
        assert share_of_axes(figure) >= 0.6, name
        assert nothing_is_cut(figure), name
        assert min(ax.get_window_extent().height for ax in figure.axes) > 0.1 * figure.get_figwidth() * figure.dpi, name


def test_long_legends_lie_below_the_axes_and_short_ones_beside(tmp_path):
    for rule, below in (("a", False), ("a" * 90, True)):
        several = [loaded(tmp_path / f"{rule}{number}", rule=f"{rule}{number}") for number in range(2)]
        figure = dict(plot.comparisons(several))["loss"]
        height = figure.get_figheight()
        plot.save(figure, tmp_path / "loss")
        (legend,), (ax,) = figure.legends, figure.axes
        assert (legend.get_window_extent().y1 < ax.get_window_extent().y0) == below
        assert (figure.get_figheight() > height) == below


@pytest.mark.parametrize("attackers", [8, 40])
def test_a_figure_of_trust_with_many_attackers_has_room(tmp_path, attackers):
    rows = [(t, client, int(client < attackers), 1, 0.5, 0.5) for t in (1, 2) for client in range(100)]
    figure = plot.scores_figure([loaded(tmp_path / "a", client_rows=rows)])
    plot.save(figure, tmp_path / "trust")
    assert share_of_axes(figure) >= 0.6 and nothing_is_cut(figure)
    assert min(ax.get_window_extent().height for ax in figure.axes) > 100


def test_a_long_title_is_wrapped(tmp_path):
    runs = [loaded(tmp_path / str(seed), seed=seed * 10**9) for seed in range(1, 20)]
    first, *rest = plot.title("Loss", runs).splitlines()
    assert first == "Loss" and len(rest) > 1 and max(map(len, rest)) <= TITLE_WIDTH
    assert " ".join(rest).endswith(f"seeds {', '.join(str(run.config['seed']) for run in runs)}")


def test_runs_that_would_look_alike_are_told_by_their_folders(tmp_path):
    runs = [loaded(tmp_path / "mad3-s0"), loaded(tmp_path / "mad3-testbed-s0"), loaded(tmp_path / "n", mad_start=None)]
    assert variants(runs) == [
        "MAD from round 3 (mad3-s0)", "MAD from round 3 (mad3-testbed-s0)", "never (FedAvg)",
    ]  # fmt: skip
    assert len({(style["color"], style["linestyle"]) for style, _ in plot.bundles(runs)}) == 3


def test_a_run_and_its_copy_are_one_line(tmp_path):
    runs = [loaded(tmp_path / folder / "mad3-s0") for folder in ("a", "b")]
    assert [len(members) for _, members in plot.bundles(runs)] == [1]


def test_many_runs_keep_distinct_styles(tmp_path):
    runs = [loaded(tmp_path / str(start), mad_start=start) for start in range(1, 29)]
    assert len({(style["color"], style["linestyle"]) for style, _ in plot.bundles(runs)}) == 28


@pytest.mark.parametrize(
    "data, note, text",
    [
        ("phantom", "no network", "phantom images, PneumoniaMNIST was not available, 4 rounds, seed 0"),
        ("phantom", "", "phantom images, 4 rounds, seed 0"),
        ("PneumoniaMNIST", "", "PneumoniaMNIST, 4 rounds, seed 0"),
    ],
)
def test_every_title_names_the_data(tmp_path, data, note, text):
    run = loaded(tmp_path / "a", data=data, note=note)
    for draw in (plot.plot_loss, plot.plot_accuracy, plot.plot_honest_accuracy):
        ax = new_ax()
        draw(ax, [run])
        assert heading(ax).endswith("\n" + text)
    about = f"Reputation and trust of each client, MAD from round 3 {text}; excluded: attacker 2 in round 3"
    assert plot.scores_figure([run]).get_suptitle().replace("\n", " ") == about


def test_config_without_any_key_is_drawn(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "config.json").write_text("{}")
    ax = new_ax()
    plot.plot_loss(ax, [plot.load_run(folder)])
    assert list(ax.lines[0].get_ydata()) == LOSS
    assert heading(ax).endswith("\nunknown data set, 4 rounds, seed unknown")


# ---------------------------------------------------------------- reputation and trust


def test_scores_of_clients(tmp_path):
    reputation, trust = plot.scores_figure([loaded(tmp_path / "a")]).axes
    for ax, honest, attacker in ((reputation, 0.8, [0.5, 0.3, 0.1]), (trust, 0.85, [0.55, 0.35, 0.12])):
        drawn = lines(ax)
        strong = drawn["client 2 (attacker)"]
        assert list(strong.get_xdata()) == [1, 2, 3]
        assert list(strong.get_ydata()) == attacker
        assert strong.get_marker() not in ("None", None)
        quiet = [line for line in ax.lines if line.get_label() == "honest clients"]
        assert len(quiet) == 2
        assert list(quiet[1].get_ydata()) == [honest] * 4
        assert quiet[0].get_color() == quiet[1].get_color() != strong.get_color()
        assert quiet[0].get_linestyle() != strong.get_linestyle()
        excluded = drawn["excluded"]
        assert (list(excluded.get_xdata()), list(excluded.get_ydata())) == ([3], attacker[-1:])
        assert excluded.get_marker() == "x"
        assert list(drawn["MAD start"].get_xdata()) == [3, 3]
    assert (reputation.get_ylabel(), trust.get_ylabel()) == ("reputation (0 to 1)", "trust (0 to 1)")
    assert trust.get_xlabel() == "round"
    assert reputation.get_shared_x_axes().joined(reputation, trust)


def test_threshold_is_a_line_at_its_value_in_the_trust_panel_alone(tmp_path):
    reputation, trust = plot.scores_figure([loaded(tmp_path / "a")]).axes
    assert list(lines(trust)["threshold 0.15"].get_ydata()) == [0.15, 0.15]
    assert not [label for label in lines(reputation) if label.startswith("threshold")]


@pytest.mark.parametrize(("judged", "panels"), [("reputation", [True, False]), ("d", [False, False])])
def test_threshold_is_a_line_in_the_panel_of_what_is_judged(tmp_path, judged, panels):
    axes = plot.scores_figure([loaded(tmp_path / "c", settings={"threshold": 0.5, "judged": judged})]).axes
    assert ["threshold 0.5" in lines(panel) for panel in axes] == panels


def test_excluded_without_a_score_in_that_round_is_marked_at_the_last_one(tmp_path):
    rows = [row if row[:2] != (3, 2) else (3, 2, 1, 0, "", "") for row in CLIENT_ROWS]
    ax = new_ax()
    plot.plot_score(ax, loaded(tmp_path / "a", client_rows=rows), "trust")
    excluded = lines(ax)["excluded"]
    assert (list(excluded.get_xdata()), list(excluded.get_ydata())) == ([3], [0.35])


def test_honest_client_excluded_by_mistake_is_named(tmp_path):
    rows = [row if row[:2] != (4, 1) else (4, 1, 0, 0, 0.2, 0.1) for row in CLIENT_ROWS]
    ax = new_ax()
    plot.plot_score(ax, loaded(tmp_path / "a", client_rows=rows), "trust")
    assert list(lines(ax)["client 1 (honest)"].get_ydata()) == [0.85, 0.85, 0.85, 0.1]
    excluded = lines(ax)["excluded"]
    assert (list(excluded.get_xdata()), list(excluded.get_ydata())) == ([4, 3], [0.1, 0.12])


@pytest.mark.parametrize(
    "rounds, first, second",
    [(1000, range(0, 1000, 100), range(33, 1000, 100)), (4, [0, 2], [1, 3]), (1, [0], [0])],
)
def test_attackers_with_equal_scores_show_both(tmp_path, rounds, first, second):
    rows = [(t, client, 1, 1, 0.1, 0.1) for t in range(1, rounds + 1) for client in (4, 7)]
    ax = new_ax()
    plot.plot_score(ax, loaded(tmp_path / "a", client_rows=rows, mad_start=None), "trust")
    one, other = (lines(ax)[f"client {client} (attacker)"] for client in (4, 7))
    assert one.get_marker() != other.get_marker()
    for line, marked in ((one, first), (other, second)):
        offset, step = line.get_markevery()
        assert list(range(offset, rounds, step)) == list(marked)


def test_attacker_that_never_got_a_score_is_no_obstacle(tmp_path):
    rows = [(1, 0, 0, 1, 0.9, 0.9), (1, 1, 1, 0, "", "")]
    ax = new_ax()
    plot.plot_score(ax, loaded(tmp_path / "a", client_rows=rows), "trust")
    assert list(lines(ax)["honest clients"].get_ydata()) == [0.9]
    assert "excluded" not in lines(ax)


def many_clients(honest, attackers, mistaken=0):
    """Rows of clients.csv: in round 3 the attackers, and the last of the honest clients by mistake, are excluded.

    Trust of honest clients goes up from 0.5 to 0.9, that of the others from 0.0 to 0.4.
    """
    rows = []
    for t in (1, 2, 3):
        for client in range(honest + attackers):
            bad, out = client >= honest, client >= honest - mistaken
            low, place, count = (0, client - honest + mistaken, attackers + mistaken) if out else (0.5, client, honest)
            trust = low + 0.4 * place / max(1, count - 1)
            rows.append((t, client, int(bad), int(not (out and t == 3)), trust, trust))
    return rows


@pytest.mark.parametrize(("honest", "band"), [(18, False), (19, True), (198, True)])
def test_many_honest_clients_are_a_line_and_a_band_and_few_attackers_have_names(honest, band, tmp_path):
    """20 clients, 21 and 200."""
    ax = new_ax()
    plot.plot_score(ax, loaded(tmp_path / "a", client_rows=many_clients(honest, 2)), "trust")
    labels = [line.get_label() for line in ax.lines]
    quiet = ["honest clients: mean and range"] if band else ["honest clients"] * honest
    attackers = [f"client {honest + i} (attacker)" for i in range(2)]
    assert labels == [*quiet, *attackers, "excluded", "MAD start", "threshold 0.15"]
    assert len(ax.collections) == band
    if band:
        assert list(ax.lines[0].get_ydata()) == pytest.approx([0.7] * 3)
        (edges,) = (path.vertices[:, 1] for path in ax.collections[0].get_paths())
        assert (edges.min(), edges.max()) == pytest.approx((0.5, 0.9))
        assert to_hex(ax.collections[0].get_facecolor()) == to_hex(ax.lines[0].get_color())


@pytest.mark.parametrize(("mistaken", "attackers"), [(10, 10), (11, 10), (10, 11), (11, 11)])
def test_more_than_ten_of_a_kind_are_a_band_and_a_number(mistaken, attackers, tmp_path):
    run = loaded(tmp_path / "a", client_rows=many_clients(40, attackers, mistaken))
    ax = new_ax()
    plot.plot_score(ax, run, "trust")
    names = [f"client {40 - mistaken + i} (honest)" for i in range(mistaken)]
    others = [f"client {40 + i} (attacker)" for i in range(attackers)]
    drawn = ["honest clients, excluded: mean and range"] if mistaken > 10 else names
    drawn += ["attackers: mean and range"] if attackers > 10 else others
    assert list(lines(ax))[1:-3] == drawn
    assert len(lines(ax)["excluded"].get_xdata()) == mistaken + attackers
    few = [f"honest {', '.join(map(str, range(30, 40)))} in round 3"] * (mistaken == 10)
    few += [f"attacker {', '.join(map(str, range(40, 50)))} in round 3"] * (attackers == 10)
    many = ["11 honest in round 3"] * (mistaken == 11) + ["11 attackers in round 3"] * (attackers == 11)
    assert runs.exclusions(run) == "; ".join([*few, *many])


def test_many_exclusions_in_several_rounds_are_counted(tmp_path):
    rows = [(t, client, 1, int(client > t), 0.1, 0.1) for t in (1, 2, 3, 14) for client in range(15)]
    assert runs.exclusions(loaded(tmp_path / "a", client_rows=rows)) == "15 attackers in rounds 1 to 14"


def test_the_axes_stay_wide_with_the_most_clients_of_the_data(tmp_path):
    """2354 clients, of which 471 attack and 100 are excluded by mistake. The legend covers no Axes."""
    figure = plot.scores_figure([loaded(tmp_path / "a", client_rows=many_clients(1883, 471, 100))])
    plot.save(figure, tmp_path / "trust")
    (legend,) = figure.legends
    assert figure.get_size_inches()[1] < 8
    for ax in figure.axes:
        place = ax.get_window_extent()
        assert place.width > 0.6 * figure.bbox.width and place.height > 0.25 * figure.bbox.height
        assert not place.overlaps(legend.get_window_extent())


def test_runs_that_differ_in_their_start_or_seed_share_a_figure_of_trust(tmp_path):
    starts = [(2, 0), (2, 1), (3, 0), (None, 0), (None, 1)]
    same = [loaded(tmp_path / f"mad{start}-s{seed}", mad_start=start, seed=seed) for start, seed in starts]
    other = loaded(tmp_path / "t0.3", settings={"threshold": 0.3})
    drawn = {str(name): figure for name, figure in plot.figures([*same, other], tmp_path) if "trust" in str(name)}
    assert list(drawn) == ["trust-mad2-s0", "trust-t0.3"]
    axes = drawn["trust-mad2-s0"].axes
    shown = [heading(ax).strip() for ax in axes[::2]]
    starts = ("MAD from round 2", "MAD from round 3", "never (FedAvg)")
    assert shown == [f"{start}; excluded: attacker 2 in round 3" for start in starts]
    assert [ax.get_ylabel() for ax in axes] == ["reputation (0 to 1)", "trust (0 to 1)"] * 3
    assert [ax.get_xlabel() for ax in axes] == [""] * 4 + ["round"] * 2
    assert "PneumoniaMNIST, 4 rounds, seed 0" in drawn["trust-mad2-s0"].get_suptitle()
    plot.save(drawn["trust-mad2-s0"], tmp_path / "trust")
    (legend,) = drawn["trust-mad2-s0"].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["honest clients", "client 2 (attacker)", "excluded", "MAD start", "threshold 0.15"]


def test_many_starts_share_figures_of_nine(tmp_path):
    every = [loaded(tmp_path / f"mad{start}", mad_start=start) for start in range(1, 12)]
    assert [[run.config["mad_start"] for run in group] for group in runs.alike(every)] == [
        [1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11],
    ]  # fmt: skip


# ---------------------------------------------------------------- files


@pytest.mark.slow
def test_figures_of_an_earlier_call_are_named(tmp_path, capsys, monkeypatch):
    """Two kinds of runs are here too many for one figure of curves."""
    monkeypatch.setattr(plot, "MOST_LINES", 1)
    make_run(tmp_path / "a")
    assert plot.main([str(tmp_path)]) == 0
    make_run(tmp_path / "b", mad_start=2)
    assert plot.main([str(tmp_path)]) == 0
    *_, refused, said = capsys.readouterr().err.splitlines()
    names = "accuracy.png, honest_accuracy.png, loss.png, trust-a.png"
    assert said == f"{tmp_path / 'figures'}: {names} are figures of earlier calls; delete what you don't need"
    assert "too many for one figure of lines" in refused and (tmp_path / "figures" / "loss.png").exists()


def test_only_figures_that_were_not_drawn_again_are_named(tmp_path, capsys):
    """Figures have an SVG file beside them; mine.png is not a figure of plot.py."""
    for number in range(11):
        (tmp_path / f"trust-{number:02}.png").touch()
        (tmp_path / f"trust-{number:02}.svg").touch()
    (tmp_path / "mine.png").touch()
    drawn = [tmp_path / f"trust-{number:02}.png" for number in range(11)]
    plot.say_what_stays(drawn)
    assert capsys.readouterr().err == ""
    plot.say_what_stays(drawn[1:])
    about = f"{tmp_path}: trust-00.png is a figure of an earlier call; delete what you don't need\n"
    assert capsys.readouterr().err == about
    plot.say_what_stays(drawn[:1])
    assert "trust-07.png, trust-08.png, 2 more are figures of earlier calls;" in capsys.readouterr().err


def test_find_runs_at_any_depth(tmp_path):
    deep, flat = make_run(tmp_path / "fig3a" / "mad5-s0"), make_run(tmp_path / "mad3-s0")
    (tmp_path / "unstarted").mkdir()
    (tmp_path / "unstarted" / "config.json").write_text("{}")
    assert plot.find_runs(tmp_path) == [deep, flat]
    assert plot.find_runs(str(flat)) == [flat]


@pytest.mark.parametrize(
    ("gone", "kept"),
    [
        ({}, [1, 2, 3, 4]),
        ({2: [3, 4]}, [3, 4]),  # the round of the exclusion already runs without the client
        ({2: [4]}, [4]),
        ({2: [1, 2, 3, 4]}, [1, 2, 3, 4]),
        ({1: [2, 3], 2: [3]}, [4]),  # both come back in round 4, as excluded clients that are observed may
        ({1: [2], 2: [3]}, [4]),
        ({1: [2, 4], 2: [3]}, [4]),  # as many clients as in round 3, but others
    ],
)
def test_the_rounds_since_the_last_change_of_the_active_clients(gone, kept):
    rows = [(t, client, int(t not in gone.get(client, []))) for t in (1, 2, 3, 4) for client in (0, 1, 2)]
    clients = pandas.DataFrame(rows, columns=["round", "client", "active"])
    assert runs.steady(pandas.DataFrame({"round": [1, 2, 3, 4]}), clients)["round"].tolist() == kept


def test_runs_come_in_the_order_of_their_numbers(tmp_path):
    names = ["mad5-s0", "mad5-s2", "mad5-s10", "mad20-s0", "mad100-s0", "nomad-s0"]
    places = [(f"set{number}", epochs, name) for number in (9, 10) for epochs, name in enumerate(names, start=1)]
    folders = [make_run(tmp_path / place / name, epochs=epochs) for place, epochs, name in places]
    assert plot.find_runs(tmp_path) == folders
    runs = [plot.load_run(folder) for folder in reversed(folders)]
    drawn = [name for name, _ in plot.figures(runs, tmp_path) if name.name.startswith("trust")]
    assert drawn == [Path(f"set{number}") / f"trust-{name}" for number in (9, 10) for name in names]


def test_a_run_is_loaded_with_all_columns_of_its_files(tmp_path):
    folder = make_run(tmp_path / "a")
    write_csv(folder / "rounds.csv", ["round", "test_auc", "loss", "note"], [(1, 0.75, 0.5, "fine"), (2, "", 0.25, "")])
    write_csv(folder / "clients.csv", [*CLIENT_COLUMNS, "distance"], [(*CLIENT_ROWS[0], 1.5)])
    run = plot.load_run(folder)
    assert list(run.rounds.columns) == ["round", "loss", "accuracy", "honest_accuracy", "test_auc", "note"]
    assert run.rounds["test_auc"].tolist() == [0.75, pytest.approx(float("nan"), nan_ok=True)]
    assert run.rounds[["accuracy", "note"]].isna().all(axis=None)  # a missing column, and words
    assert run.clients["distance"].tolist() == [1.5] and run.clients["train_loss"].isna().all()


def test_all_figures_are_written_and_named(tmp_path, capsys):
    make_run(tmp_path / "mad3-malicious0.1-s0", samples=True)
    make_run(tmp_path / "fig3a" / "mad3-s0")
    assert plot.main([str(tmp_path)]) == 0
    figures = tmp_path / "figures"
    names = ["fig2", "loss", "accuracy", "honest_accuracy", "trust-mad3-malicious0.1-s0"]
    names += [f"fig3a/{name}" for name in ("loss", "accuracy", "honest_accuracy", "trust-mad3-s0")]
    for name in names:
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        assert "<svg" in (figures / f"{name}.svg").read_text()
    assert len([path for path in figures.rglob("*") if path.is_file()]) == 18
    output = capsys.readouterr()
    printed = output.out.splitlines()
    assert printed == [str(figures / f"{name}.png") for name in names] + ["9 figures, each as PNG and SVG"]
    assert output.err == ""


def test_one_run_of_its_own_and_another_folder_for_figures(tmp_path, capsys):
    folder = make_run(tmp_path / "mad3-s0")
    assert plot.main([str(folder), "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "loss.png").is_file() and (tmp_path / "drawn" / "trust-mad3-s0.svg").is_file()
    assert not (folder / "figures").exists()
    assert "samples.npz" in capsys.readouterr().err


@pytest.mark.slow
def test_several_folders_are_drawn_as_if_alone_in_the_folder_that_holds_them(tmp_path, capsys, monkeypatch):
    """A shell gives `results/*` with files and the folder of figures among the runs."""
    monkeypatch.chdir(tmp_path)
    for start in (2, 3, 4):
        make_run(Path("results") / f"mad{start}-s0", samples=True, mad_start=start)
    assert plot.main(["results"]) == 0
    whole = capsys.readouterr().out
    names = sorted(map(str, Path("results").iterdir()))
    (tmp_path / "results" / "notes.txt").write_text("a file")
    assert plot.main([*names, "results/notes.txt", "--report"]) == 0
    out, err = capsys.readouterr()
    assert names[0] == "results/figures" and "results/figures holds no run" in err and err.count("\n") == 1
    figures = [f"results/figures/{name}.png" for name in ("fig2", "loss", "accuracy", "honest_accuracy")]
    assert out.splitlines()[:4] == figures == whole.splitlines()[:4]
    assert out.replace("results/figures/report.html\n", "") == whole
    page = (tmp_path / "results" / "figures" / "report.html").read_text()
    assert all(f"{name}</a></td>" in page for name in ("mad2-s0", "mad3-s0", "mad4-s0"))
    (ax,) = drawn_of("results/mad2-s0", tmp_path / "results" / "mad4-s0")["loss"]
    assert list(lines(ax)) == ["MAD from round 2", "MAD from round 4"]  # a path from here and one from the root


def drawn_of(*paths):
    """The Axes of the figures of several folders, by name."""
    folder, parts = together([Path(path) for path in paths])
    return {str(name): figure.axes for name, figure in plot.figures(runs.load_runs(parts), folder, parts)}


def test_the_table_of_an_experiment_is_drawn_if_it_is_among_several_paths(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plot, "grid_figures", lambda path: drawn.append(path) or [])
    one, other = make_run(tmp_path / "a" / "x"), make_run(tmp_path / "a" / "y", mad_start=None)
    (tmp_path / "a" / "table.csv").write_text("row\n")
    drawn_of(one, other)
    assert drawn == []  # the table shows all runs of the experiment, and only two were asked for
    drawn_of(one, other, tmp_path / "a" / "table.csv")
    drawn_of(tmp_path / "a")
    assert drawn == [tmp_path / "a" / "table.csv"] * 2


def test_a_run_that_is_given_twice_is_drawn_once(tmp_path):
    folder = make_run(tmp_path / "x" / "a")
    assert [run.folder for run in runs.load_runs([tmp_path, tmp_path / "x", folder])] == [folder]
    assert plot.main([str(folder), f"{folder}/", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "trust-a.png").is_file()


def test_several_folders_without_a_run_are_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("row\n")
    assert plot.main([str(tmp_path / name) for name in ("empty", "absent", "table.csv")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{tmp_path / 'empty'} holds no run" in err and f"{tmp_path / 'absent'} is not a folder" in err
    assert not (tmp_path / "figures").exists()


def test_folders_on_different_drives_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    def on_windows(paths):
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", on_windows)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(make_run(tmp_path / name)) for name in "ab"])
    assert stop.value.code == 2 and capsys.readouterr().err == "plot: Paths don't have the same drive\n"


def test_printed_paths_can_be_copied_into_a_shell(tmp_path, capsys):
    make_run(tmp_path / "my results" / "a", samples=True)
    assert plot.main([str(tmp_path / "my results"), "--report"]) == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert len(printed) == 6 and all(len(words) == 1 and Path(words[0]).is_file() for words in printed)


def test_a_long_title_is_folded_and_stays_within_the_figure(tmp_path):
    of_phantom = {"data": "phantom", "note": "no network"}
    loaded_runs = [loaded(tmp_path / f"s{seed}", seed=seed, **of_phantom) for seed in (0, 10)]
    (figure,) = (figure for name, figure in plot.comparisons(loaded_runs) if name == "honest_accuracy")
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if "PneumoniaMNIST was not available" in text.get_text()]
    assert len(texts) == 1 and texts[0].get_text().count("\n") == 2
    assert texts[0].get_window_extent().x1 < figure.bbox.x1


def test_figures_do_not_depend_on_the_users_matplotlibrc(tmp_path):
    """With `text.usetex`, matplotlib needs LaTeX, which may be missing."""
    make_run(tmp_path / "a", samples=True)
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "usual")]) == 0
    strange = {
        "text.usetex": True,
        "font.size": 30,
        "lines.linewidth": 9,
        "savefig.bbox": "tight",
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(strange):
        assert plot.main([str(tmp_path), "--out", str(tmp_path / "strange")]) == 0
        assert matplotlib.rcParams["text.usetex"]  # a notebook keeps its settings
    for path in (tmp_path / "usual").iterdir():
        assert path.read_bytes() == (tmp_path / "strange" / path.name).read_bytes()


def test_names_that_are_not_utf_8_are_drawn_and_reported(tmp_path, capsys):
    """Byte 0xE9 is an e with an acute accent in Latin-1. Two runs that look alike are told by their folders."""
    name = os.fsdecode(b"caf\xe9")
    try:
        make_run(tmp_path / name / name / "z", samples=True)
    except OSError:
        pytest.skip("this file system has no such names")
    make_run(tmp_path / name / name / name)
    assert as_command(lambda: plot.main([str(tmp_path / name), "--report"])) == 0
    assert (tmp_path / name / "figures" / name / f"trust-{name}.svg").is_file()
    page = (tmp_path / name / "figures" / "report.html").read_text(encoding="utf-8")
    assert "caf\\udce9/caf\\udce9</a></td>" in page and 'href="#caf%5Cudce9/trust-caf%5Cudce9"' in page
    assert "caf\\udce9" in next(text for text in texts_of(tmp_path / name / name) if "caf" in text)


def texts_of(folder):
    """The labels in the legend of the first figure of a folder, as saved."""
    (_, figure), *_ = plot.comparisons([plot.load_run(path) for path in plot.find_runs(folder)])
    plot.save(figure, folder / "saved")
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("option", ["--report", "--play"])
def test_a_full_disk_leaves_the_files_of_the_last_call(tmp_path, capsys, monkeypatch, option):
    folder = make_run(tmp_path / "a", samples=True)
    write_csv(folder / "plane.csv", ["round", "client", "x", "y"], [(*row[:2], 0, 1) for row in CLIENT_ROWS])
    assert plot.main([str(tmp_path), option]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    (folder / "rounds.csv").write_text("".join((folder / "rounds.csv").read_text().splitlines(True)[:-1]))

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert plot.main([str(tmp_path), option]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("plot: [Errno 28] No space left on device: ")
    assert {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == before


def test_figures_and_pages_of_a_folder_with_a_long_name_have_names_that_fit(tmp_path):
    """255 bytes, the most that a file system allows: a prefix and a suffix do not fit."""
    folder = make_run(tmp_path / ("é" * 127), samples=True)
    write_csv(folder / "plane.csv", ["round", "client", "x", "y"], [(*row[:2], 0, 1) for row in CLIENT_ROWS])
    assert plot.main([str(tmp_path), "--report"]) == plot.main([str(tmp_path), "--play"]) == 0
    (trust,) = (tmp_path / "figures").glob("trust-*.png")
    (page,) = (tmp_path / "figures").glob("play-*.html")
    assert len(os.fsencode(trust.name)) <= 250 and trust.stem[6:] == page.stem[5:]
    assert f'href="#{quote(trust.stem)}"' in (tmp_path / "figures" / "report.html").read_text(encoding="utf-8")


def test_svg_is_the_same_each_time(tmp_path):
    run = loaded(tmp_path / "a")
    first, second = (plot.save(plot.scores_figure([run]), tmp_path / name).with_suffix(".svg") for name in "xy")
    assert first.read_bytes() == second.read_bytes()


def test_figures_follow_the_paper_s_order(tmp_path):
    starts = {"c": 3, "a": None, "b": 20, "d": 5}
    runs = [loaded(tmp_path / name, mad_start=start) for name, start in starts.items()]
    runs.append(loaded(tmp_path / "0", mad_start=None, malicious=0.0))
    (ax,) = dict(plot.figures(runs, tmp_path))[Path("loss")].axes
    assert list(lines(ax)) == [
        "MAD from round 3", "MAD from round 5", "MAD from round 20", "never (FedAvg)", "no attack",
    ]  # fmt: skip


def test_legend_lies_beside_the_axes(tmp_path):
    figure = plot.scores_figure([loaded(tmp_path / "a")])
    plot.save(figure, tmp_path / "trust")
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 > max(ax.get_window_extent().x1 for ax in figure.axes)
    assert [text.get_text() for text in legend.get_texts()] == [
        "honest clients", "client 2 (attacker)", "excluded", "MAD start", "threshold 0.15",
    ]  # fmt: skip


def test_fig2_names_its_panels(tmp_path):
    run = loaded(tmp_path / "a", samples=True, data="phantom", note="no network")
    figure = plot.samples_figure(run)
    assert [ax.get_title() for ax in figure.axes] == ["(a) normal", "(b) normal", "(c) pneumonia", "(d) pneumonia"]
    assert figure.get_suptitle() == "Fig. 2: training images\nphantom images, PneumoniaMNIST was not available"
    assert (figure.axes[0].images[0].get_array() == 200).all()
    assert figure.axes[0].images[0].get_clim() == (0, 255)


# ---------------------------------------------------------------- missing and damaged files


@pytest.mark.parametrize("name", ["", "absent"])
def test_no_run_is_one_line_and_status_2(tmp_path, capsys, name):
    assert plot.main([str(tmp_path / name)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"plot: {tmp_path / name}") and output.err.count("\n") == 1
    assert not (tmp_path / "figures").exists()


def test_figures_that_cannot_be_written_are_one_line_and_status_2(tmp_path, capsys):
    make_run(tmp_path / "a", samples=True)
    (tmp_path / "figures").write_text("a file is in the way")
    assert plot.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_run_still_going_is_drawn_as_far_as_it_is(tmp_path, capsys):
    folder = make_run(tmp_path / "a", samples=True, rounds=100)
    with open(folder / "rounds.csv", "a") as file:
        file.write("5,0.0")  # half of a number, without a line end
    run = plot.load_run(folder)
    ax = new_ax()
    plot.plot_loss(ax, [run])
    assert list(ax.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert heading(ax).endswith("PneumoniaMNIST, 4 of 100 rounds, seed 0")
    assert plot.main([str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert output.err == f"{folder}: has 4 of 100 rounds\n"
    assert output.out.endswith("5 figures, each as PNG and SVG\n")


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["", "1,0.3"])
def test_run_killed_in_its_first_round_is_one_line(tmp_path, capsys, torn):
    folder = make_run(tmp_path / "a", samples=True)
    (folder / "rounds.csv").write_text(",".join(ROUND_COLUMNS) + "\n" + torn)
    (folder / "clients.csv").write_text("")
    make_run(tmp_path / "b")
    assert plot.main([str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert output.err.startswith(f"{folder}: has 0 of 4 rounds; no values for loss, accuracy,")
    assert output.err.count("\n") == 1
    assert "trust-b.png" in output.out and "trust-a.png" not in output.out


def test_missing_columns_and_files_leave_the_rest(tmp_path, capsys):
    folder = make_run(tmp_path / "a", samples=True)
    write_csv(folder / "rounds.csv", ["round", "loss"], [(1, 0.5), (2, "bad"), (3, 0.25)])
    (folder / "clients.csv").unlink()
    assert list(plot.load_run(folder).rounds["loss"].dropna()) == [0.5, 0.25]
    assert plot.main([str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert [Path(line).name for line in output.out.splitlines()[:-1]] == ["fig2.png", "loss.png"]
    assert "no values for accuracy, honest_accuracy, active, reputation, trust" in output.err


DAMAGED = ["{", "[]", "[" * 10**5, '{"rounds": "many"}', '{"settings": {"threshold": []}}', '{"malicious": NaN}']
DAMAGED.append(f'{{"mad_start": -{10**400}}}')


@pytest.mark.slow
def test_damaged_configs_are_a_line_each_and_the_rest_is_drawn(tmp_path, capsys):
    folders = [make_run(tmp_path / f"a{i}") for i in range(len(DAMAGED))]
    for folder, content in zip(folders, DAMAGED):
        (folder / "config.json").write_text(content)
    make_run(tmp_path / "b", samples=True)
    assert plot.main([str(tmp_path)]) == 0
    output = capsys.readouterr()
    for folder, line in zip(folders, output.err.splitlines(), strict=True):
        assert line.startswith(f"{folder}: not drawn, config.json is damaged")
    assert "trust-b.png" in output.out and "trust-a" not in output.out


def test_damaged_samples_are_passed_over(tmp_path):
    folder = make_run(tmp_path / "a", samples=True)
    path = folder / "samples.npz"
    whole = path.read_bytes()
    assert plot.load_run(folder).samples is not None
    for damaged in (b"", b"no zip at all", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert plot.load_run(folder).samples is None
    images, labels = np.zeros((4, 28, 28), np.uint8), np.array([0, 0, 1, 1])
    for arrays in (
        {"images": images},
        {"images": images[:2], "labels": labels[:2]},
        {"images": images.astype(float), "labels": labels},
        {"images": images, "labels": labels + 1},
        {"images": images.astype(object), "labels": labels},  # pickled
        {"images": images, "labels": labels, "bomb": np.zeros(10**7)},
    ):
        np.savez_compressed(path, **arrays)
        assert plot.load_run(folder).samples is None
    with open(path, "wb") as file:
        np.save(file, images)  # a single array, not an archive
    assert plot.load_run(folder).samples is None


@pytest.mark.slow
def test_a_folder_that_is_no_run_yet_is_one_line(tmp_path, capsys):
    make_run(tmp_path / "a", samples=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    assert plot.main([str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'b'}: not drawn, it holds no rounds.csv\n"


@pytest.mark.slow
def test_a_run_that_cannot_be_read_leaves_the_others(tmp_path, capsys):
    make_run(tmp_path / "a", samples=True)
    folder = make_run(tmp_path / "b")
    (folder / "config.json").chmod(0)
    (folder / "clients.csv").unlink()
    (folder / "clients.csv").mkdir()
    (tmp_path / "c" / "config.json").mkdir(parents=True)
    assert plot.main([str(tmp_path)]) == 0
    assert f"{folder}: " in capsys.readouterr().err


def test_nothing_to_draw_at_all_is_status_2(tmp_path, capsys):
    folder = make_run(tmp_path / "a")
    (folder / "config.json").write_text("{")
    assert plot.main([str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == "0 figures, each as PNG and SVG\n" and "is damaged" in output.err


@pytest.mark.slow
def test_runs_of_other_lengths_and_data_share_a_figure_that_says_so(tmp_path, capsys):
    make_run(tmp_path / "a", samples=True)
    longer = make_run(tmp_path / "b", rounds=9, data="phantom", mad_start=None)
    more = ["round", "note", "loss", "accuracy", "extra"]
    write_csv(longer / "rounds.csv", more, [(t, "fine", 0.5, 0.5, 7) for t in range(1, 10)])
    runs = [plot.load_run(folder) for folder in plot.find_runs(tmp_path)]
    ax = new_ax()
    plot.plot_loss(ax, runs)
    assert [len(line.get_xdata()) for line in ax.lines] == [4, 9]
    assert heading(ax).endswith("PneumoniaMNIST and phantom images, 4 rounds and 9 rounds, seed 0")
    assert plot.main([str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"{longer}: no values for honest_accuracy\n"


@pytest.mark.slow
def test_a_dollar_in_a_folders_name_is_just_that(tmp_path):
    for name in ("a$\\frac$", "b$_$"):  # these would be invalid math text in Matplotlib
        make_run(tmp_path / name, samples=True)
    assert plot.main([str(tmp_path)]) == 0


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "note", "threshold"]), inner),
    max_leaves=4,
)
cells = st.one_of(st.integers(-1, 5), st.floats(), st.sampled_from(["", "x", '"', "1e999", "9" * 30, "é", "\0"])).map(
    str
)
rows = st.lists(st.lists(cells, max_size=8).map(",".join), max_size=6).map("\n".join)


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*runs.KINDS, "data", "other"]), anything), rows, rows)
def test_any_folder_is_read_or_refused(tmp_path, config, rounds, clients):
    """Any files give a run that can be named and described, or a ValueError that says what is wrong."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "rounds.csv").write_text(",".join(ROUND_COLUMNS) + "\n" + rounds + "\n")
    (tmp_path / "clients.csv").write_text(",".join(CLIENT_COLUMNS) + "\n" + clients + "\n")
    try:
        run = plot.load_run(tmp_path)
    except ValueError as error:
        assert "config.json is damaged" in str(error)
        return
    runs.shortcomings(run)
    plot.bundles([run])
    plot.by_start(run)
    assert plot.title("Loss", [run]).startswith("Loss\n")


@pytest.mark.slow
@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, rows)
def test_any_rows_are_drawn_as_far_as_they_can_be(tmp_path, rounds, clients):
    folder = tmp_path / "a"
    if not folder.exists():
        make_run(folder, samples=True)
    (folder / "rounds.csv").write_text(",".join(ROUND_COLUMNS) + "\n" + rounds + "\n")
    (folder / "clients.csv").write_text(",".join(CLIENT_COLUMNS) + "\n" + clients + "\n")
    assert plot.main([str(tmp_path)]) == 0


def test_one_recorded_round_is_a_visible_dot(tmp_path):
    folder = make_run(tmp_path / "a")
    write_csv(folder / "rounds.csv", ["round", "loss"], [(1, 0.5)])
    ax = new_ax()
    plot.plot_loss(ax, [plot.load_run(folder)])
    assert ax.lines[0].get_marker() == "."


# ---------------------------------------------------------------- imports


def run_python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_drawing_imports_neither_torch_nor_our_modules_nor_pyplot(tmp_path):
    make_run(tmp_path / "a", samples=True)
    code = "import sys, plot; assert plot.main(sys.argv[1:]) == 0; print(' '.join(sys.modules))"
    modules = set(run_python(code, str(tmp_path)).split())
    assert "matplotlib.figure" in modules
    assert not modules & {"torch", "sklearn", "medmnist", "madsim", "data", "model", "trust", "matplotlib.pyplot"}


def test_import_is_light():
    modules = set(run_python("import sys, plot; print(' '.join(sys.modules))").split())
    assert not modules & {"pandas", "matplotlib"}


def test_seeds_in_words():
    assert [runs.seeds_in_words(seeds) for seeds in ([], [3, 3], [1, 0], [2, 0, 1], [0, 2, 3])] == [
        "seed unknown", "seed 3", "seeds 0, 1", "seeds 0 to 2", "seeds 0, 2, 3",
    ]  # fmt: skip
