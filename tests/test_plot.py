"""Tests of plot.py on small results folders that are made here.

They check what is drawn, how it is labelled, and what happens if files are missing.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

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
from harness.runs import TITLE_WIDTH, variants

HERE = Path(plot.__file__).parent
LOSS = [0.9, 0.7, 0.2, 0.1]
ACCURACY = [0.5, 0.6, 0.9, 1.0]
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
        (plot.plot_loss, LOSS, "Mean loss of participating clients", "cross-entropy (nats)"),
        (plot.plot_accuracy, ACCURACY, "Mean accuracy of participating clients", "accuracy (fraction correct)"),
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


def test_honest_accuracy_light_and_running_mean_to_each_side_of_the_start(tmp_path):
    folder = make_run(tmp_path / "a", rounds=60, mad_start=31)
    values = [0.5] * 29 + [0.8] + [0.9] * 30
    write_csv(folder / "rounds.csv", ["round", "honest_accuracy"], zip(range(1, 61), values, strict=True))
    ax = new_ax()
    plot.plot_honest_accuracy(ax, [plot.load_run(folder)])
    light, strong = ax.lines[:2]
    assert list(light.get_ydata()) == values
    assert light.get_alpha() < 0.5 and light.get_color() == strong.get_color()
    assert list(lines(ax)) == ["MAD from round 31"]
    smooth = strong.get_ydata()  # window 60 / 20 = 3
    # Round 29: (0.5 + 0.5 + 0.8) / 3. Round 30 is the last before the start: (0.5 + 0.8) / 2. Round 31: only 0.9.
    assert list(smooth[27:32]) == pytest.approx([0.5, 0.6, 0.65, 0.9, 0.9])
    assert "window 3 " in heading(ax)
    assert vertical(ax) == [(31, to_hex(strong.get_color()))]
    assert ax.lines[-1].get_linestyle() == "--"


@pytest.mark.parametrize("rounds, window", [(4, 1), (39, 1), (40, 3), (100, 5), (1000, 51)])
def test_window_is_odd_and_about_a_twentieth(tmp_path, rounds, window):
    folder = make_run(tmp_path / "a")
    write_csv(folder / "rounds.csv", ["round", "honest_accuracy"], [(t, 0.5) for t in range(1, rounds + 1)])
    ax = new_ax()
    plot.plot_honest_accuracy(ax, [plot.load_run(folder)])
    assert f"window {window} " in heading(ax)


def test_no_line_for_a_start_that_never_comes_or_has_not_come(tmp_path):
    ax = new_ax()
    plot.plot_honest_accuracy(ax, [loaded(tmp_path / "a", mad_start=None), loaded(tmp_path / "b", mad_start=5)])
    assert vertical(ax) == []


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
    assert list(lines(ax)) == ["MAD from round 3, mean of 2 seeds", "never (FedAvg), seed 0"]
    mean, other = ax.lines
    assert list(mean.get_ydata()) == pytest.approx([1.0, 0.8, 0.3, 0.2])
    assert mean.get_color() != other.get_color() and mean.get_linestyle() != other.get_linestyle()
    (area,) = ax.collections
    heights = area.get_paths()[0].vertices[:, 1]
    assert (heights.max(), heights.min()) == pytest.approx((1 + 0.1 * 2**0.5, 0.2 - 0.1 * 2**0.5))
    about = "PneumoniaMNIST, 4 rounds, seeds 0, 1; line: mean, band: ± one standard deviation"
    assert heading(ax).endswith(about)


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
        "MAD from round 3, malicious 0.1", "MAD from round 3, malicious 0.4", "no attack, MAD from round 3",
    ]  # fmt: skip


def test_label_tells_runs_of_other_data_or_settings_apart(tmp_path):
    runs = [loaded(tmp_path / "a"), loaded(tmp_path / "b", settings={"threshold": 0.3})]
    runs += [loaded(tmp_path / "c", data="phantom")]
    assert [label.removeprefix("MAD from round 3, ") for label in variants(runs)] == [
        "data PneumoniaMNIST, threshold 0.15", "data PneumoniaMNIST, threshold 0.3",
        "data phantom images, threshold 0.15",
    ]  # fmt: skip


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
    upper, _ = plot.scores_figure(run).axes
    assert heading(upper) == "Reputation and trust of each client, MAD from round 3\n" + text


def test_config_without_any_key_is_drawn(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "config.json").write_text("{}")
    ax = new_ax()
    plot.plot_loss(ax, [plot.load_run(folder)])
    assert list(ax.lines[0].get_ydata()) == LOSS
    assert heading(ax).endswith("\nunknown data set, 4 rounds, seed unknown")


# ---------------------------------------------------------------- reputation and trust


def test_scores_of_clients(tmp_path):
    reputation, trust = plot.scores_figure(loaded(tmp_path / "a")).axes
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
        assert list(drawn["MAD start (round 3)"].get_xdata()) == [3, 3]
    assert (reputation.get_ylabel(), trust.get_ylabel()) == ("reputation (0 to 1)", "trust (0 to 1)")
    assert trust.get_xlabel() == "round"
    assert reputation.get_shared_x_axes().joined(reputation, trust)


def test_threshold_is_a_line_at_its_value_in_the_trust_panel_alone(tmp_path):
    reputation, trust = plot.scores_figure(loaded(tmp_path / "a")).axes
    assert list(lines(trust)["threshold 0.15"].get_ydata()) == [0.15, 0.15]
    assert not [label for label in lines(reputation) if label.startswith("threshold")]


@pytest.mark.parametrize(("judged", "panels"), [("reputation", [True, False]), ("d", [False, False])])
def test_threshold_is_a_line_in_the_panel_of_what_is_judged(tmp_path, judged, panels):
    axes = plot.scores_figure(loaded(tmp_path / "c", settings={"threshold": 0.5, "judged": judged})).axes
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
    assert list(lines(ax)["client 1 (honest, excluded)"].get_ydata()) == [0.85, 0.85, 0.85, 0.1]
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


# ---------------------------------------------------------------- files


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
    folders = [make_run(tmp_path / f"set{number}" / name) for number in (9, 10) for name in names]
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


def test_a_long_title_is_folded_and_stays_within_the_figure(tmp_path):
    of_phantom = {"data": "phantom", "note": "no network"}
    loaded_runs = [loaded(tmp_path / f"s{seed}", seed=seed, **of_phantom) for seed in (0, 10)]
    (figure,) = (figure for name, figure in plot.comparisons(loaded_runs) if name == "honest_accuracy")
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if "PneumoniaMNIST was not available" in text.get_text()]
    assert len(texts) == 1 and texts[0].get_text().count("\n") == 2
    assert texts[0].get_window_extent().x1 < figure.bbox.x1


def test_svg_is_the_same_each_time(tmp_path):
    run = loaded(tmp_path / "a")
    first, second = (plot.save(plot.scores_figure(run), tmp_path / name).with_suffix(".svg") for name in "xy")
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
    figure = plot.scores_figure(loaded(tmp_path / "a"))
    plot.save(figure, tmp_path / "trust")
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 > max(ax.get_window_extent().x1 for ax in figure.axes)
    assert [text.get_text() for text in legend.get_texts()] == [
        "honest clients", "client 2 (attacker)", "excluded", "MAD start (round 3)", "threshold 0.15",
    ]  # fmt: skip


def test_fig2_names_its_panels(tmp_path):
    run = loaded(tmp_path / "a", samples=True, data="phantom", note="no network")
    figure = plot.samples_figure(run)
    assert [ax.get_title() for ax in figure.axes] == ["(a) normal", "(b) normal", "(c) pneumonia", "(d) pneumonia"]
    assert figure.get_suptitle() == "Training images\nphantom images, PneumoniaMNIST was not available"
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
