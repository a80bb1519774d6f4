"""Tests of lab/figures.py: the jump at an exclusion, membership inference, heat maps of experiments."""

import json
from pathlib import Path

import pandas
import pytest
from matplotlib.colors import to_rgb
from test_plot import CLIENT_COLUMNS, CLIENT_ROWS, make_run, new_ax, nothing_is_cut, share_of_axes, write_csv

import plot
from harness import runs
from lab import figures

# ---------------------------------------------------------------- the jump at an exclusion


def with_jump(folder, composition, model, **config):
    make_run(folder, **config)
    parts = {"total": composition + model, "composition": composition, "model": model}
    jumps = [{"round": 3, "clients": [2], "loss": parts, "accuracy": {name: -value for name, value in parts.items()}}]
    (folder / "summary.json").write_text(json.dumps({"jumps": jumps}))
    return plot.load_run(folder)


def test_the_jump_is_drawn_in_its_two_parts(tmp_path):
    """The composition parts of two seeds are -0.4 and -0.6. They give a bar of -0.5 with a line of 0.1 * sqrt 2.

    A third run has other settings and a bar of its own.
    """
    runs = [with_jump(tmp_path / "a", -0.4, -0.1), with_jump(tmp_path / "b", -0.6, -0.3, seed=1)]
    runs.append(with_jump(tmp_path / "c", -0.2, 0.1, mad_start=2))
    figure = figures.jump_figure(runs)
    loss, accuracy = figure.axes
    assert [bar.get_width() for bar in loss.patches] == pytest.approx([-0.5, -0.2, -0.2, 0.1])
    assert [bar.get_width() for bar in accuracy.patches] == pytest.approx([0.5, 0.2, 0.2, -0.1])
    composition, model = loss.containers[1], loss.containers[3]
    assert (composition.get_label(), model.get_label()) == ("fewer clients averaged", "the model itself")
    assert {bar.get_hatch() for bar in composition} != {bar.get_hatch() for bar in model}
    labels = [text.get_text() for text in loss.get_yticklabels()]
    assert labels == ["MAD from round 3", "MAD from round 2, seed 0"]
    ends = loss.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert sorted(ends) == pytest.approx([-0.5 - 0.1 * 2**0.5, -0.5 + 0.1 * 2**0.5])
    assert "± one standard deviation" in " ".join(figure.get_suptitle().split())


@pytest.mark.slow
def test_runs_with_an_exclusion_have_a_jump_figure(tmp_path, capsys):
    with_jump(tmp_path / "a", -0.4, -0.1)
    make_run(tmp_path / "b", mad_start=None)
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "figures" / "jump.png").is_file()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"jumps": []}', '{"jumps": {"0": 1}}', '{"jumps": [{"round": 1, "loss": 3}]}', "[" * 10**5, "é"],
)
def test_a_damaged_summary_has_no_jump(tmp_path, content):
    folder = make_run(tmp_path / "a")
    (folder / "summary.json").write_text(content)
    assert plot.load_run(folder).jump is None


# ---------------------------------------------------------------- membership inference


def measured(folder, shift=0.0, **options):
    """A run in which client 2, the attacker, trains up to round 2. The other clients train up to round 4."""
    make_run(folder, **options)
    rows = [(*row, 0.5 if row[1] < 2 or row[0] <= 2 else "") for row in CLIENT_ROWS]
    write_csv(folder / "clients.csv", [*CLIENT_COLUMNS, "train_loss"], rows)
    columns = ["round"] + [
        f"{name}_{kind}" for name in ("test", "validation") for kind in ("advantage", "error", "chance")
    ]
    values = [(t, 0.1 * t + shift, 0.01, 0.03, 0.02 * t, 0.01, 0.04) for t in (1, 2, 3, 4)]
    write_csv(folder / "membership.csv", columns, values)
    return plot.load_run(folder)


def test_what_attackers_hold_stays_from_their_exclusion_on(tmp_path):
    run = measured(tmp_path / "a")
    held = figures.held_by_attackers([run], "test_advantage")
    assert held.index.tolist() == [1, 2, 3, 4] and held[0].tolist() == pytest.approx([0.1, 0.2, 0.2, 0.2])
    honest = plot.load_run(tmp_path / "a")
    honest.clients["malicious"] = 0  # without attackers, all clients count; one third still holds round 2
    means = figures.held_by_attackers([honest], "test_advantage")[0].tolist()
    assert means == pytest.approx([0.1, 0.2, (0.3 + 0.3 + 0.2) / 3, (0.4 + 0.4 + 0.2) / 3])


def test_membership_of_one_seed_has_the_bootstraps_band_and_of_several_the_seeds(tmp_path):
    one, two = measured(tmp_path / "a"), measured(tmp_path / "b", shift=0.2, seed=1)
    ax = new_ax()
    figures.plot_membership(ax, [one], "test")
    assert "one standard error (bootstrap)" in ax.get_title("left") and "against test images" in ax.get_title("left")
    (band,) = ax.collections
    assert band.get_paths()[0].get_extents().ymax == pytest.approx(0.21)
    line, chance = ax.lines
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert set(chance.get_ydata()) == {0.03}
    ax = new_ax()
    figures.plot_membership(ax, [one, two], "validation")
    assert "one standard deviation over the seeds" in ax.get_title("left")
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.02, 0.04, 0.04, 0.04])
    assert ax.lines[0].get_label() == "MAD from round 3"


@pytest.mark.slow
def test_runs_that_measured_membership_have_its_figure(tmp_path, capsys):
    measured(tmp_path / "x" / "a")
    make_run(tmp_path / "x" / "b")
    assert plot.main([str(tmp_path)]) == 0
    assert str(tmp_path / "figures" / "x" / "membership.png") in capsys.readouterr().out


# ---------------------------------------------------------------- a client loses its trust


def falling(folder, *clients, **config):
    """A run whose clients have these d, reputations and trusts, round by round."""
    make_run(folder, **config)
    columns = ["round", "client", "malicious", "active", "d", "reputation", "trust"]
    rows = [(t, c, int(c == 1), 1, *values) for c, each in enumerate(clients) for t, values in enumerate(each, 1)]
    write_csv(folder / "clients.csv", columns, sorted(rows))
    return plot.load_run(folder)


def test_the_first_client_that_loses_its_trust_is_drawn(tmp_path):
    """Client 2 falls in round 4, client 1 in round 3. Client 0 is never trusted, so it does not fall."""
    never, early, late = [(0.0, 0.0, 0.0)] * 4, [(1.0, 0.9, 0.8)] * 4, [(0.5, 0.6, 0.7)] * 4
    early[2:] = [(0.1, 0.3, 0.14), (0.0, 0.2, 0.0)]
    late[3] = (0.0, 0.0, 0.0)
    run = falling(tmp_path / "a", never, early, late)
    assert figures.fall_of(run) == (1, 3)
    figure = figures.fall_figure([falling(tmp_path / "b", never, late[:3] * 2), run])
    drawn = {each.get_label(): list(each.get_ydata()) for each in figure.axes[0].lines}
    assert list(drawn.values()) == [[1, 1, 0.1, 0], [0.9, 0.9, 0.3, 0.2], [0.8, 0.8, 0.14, 0], [0.15, 0.15]]
    assert "Client 1 (malicious) loses its trust in round 3" in figure.get_suptitle()


def test_runs_in_which_no_trusted_client_falls_have_no_such_figure(tmp_path):
    at = [(0.5, 0.5, 0.5), (0.2, 0.2, 0.15), (0.2, 0.2, 0.15), (0.2, 0.2, 0.15)]  # at the threshold, not below it
    without_d = plot.load_run(make_run(tmp_path / "b"))
    unjudged = falling(tmp_path / "c", [(0.5, 0.5, 0.5), (0.0, 0.0, 0.0)], settings={"judged": "d", "threshold": 0.5})
    assert figures.fall_figure([falling(tmp_path / "a", at), without_d, unjudged]) is None


# ---------------------------------------------------------------- heat maps of experiments


def write_grid(path, **changes):
    """An experiment with two rows, two columns and two seeds. There are 10 clients, and 2 of them are attackers.

    MAD excludes both attackers. With seed 1, it also excludes one honest client.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"row": row, "column": column, "seed": seed, "complete": True, "data": "PneumoniaMNIST", "clients": 10,
         "rounds": 40, "last": 40, "attackers": 2,
         "true_exclusions": 2 * (row == "MAD"), "false_exclusions": seed * (row == "MAD"),
         "honest_accuracy": 0.5 + 0.1 * seed, "test_accuracy": 0.8, "test_sensitivity": 0.9}
        for row in ("never", "MAD") for column in ("flip", "noise") for seed in (0, 1)
    ]  # fmt: skip
    pandas.DataFrame(rows).assign(**changes).to_csv(path, index=False)
    return path


def test_a_grid_by_hand(tmp_path):
    table = runs.read_grid(write_grid(tmp_path / "table.csv"))
    assert table.groupby("row")["right"].mean().to_dict() == {"never": 0.8, "MAD": pytest.approx(0.95)}
    assert figures.cell_texts(table, "honest_accuracy")["MAD", "flip"] == "0.550\n± 0.071"
    assert figures.cell_texts(table, "right")["MAD", "noise"] == "4 of 4 out (51-100 %)\nhonest 1 of 16 out (1-28 %)"
    ax, table["right"] = new_ax(), table["right"].replace(0.8, 0.4)
    figures.plot_grid(ax, table, "right", figures.cell_texts(table, "right"))
    assert ax.images[0].get_array().tolist() == [[0.4, 0.4], [pytest.approx(0.95)] * 2]
    assert ax.images[0].get_clim() == (0, 1)  # two honest clients of a hundred are not drawn as the worst of all
    assert [label.get_text() for label in ax.get_yticklabels()] == ["never", "MAD"]  # in the experiment's order
    assert [label.get_text() for label in ax.get_xticklabels()] == ["flip", "noise"]
    colours = {text.get_position(): text.get_color() for text in ax.texts}
    assert colours == {(0, 0): "white", (1, 0): "white", (0, 1): "black", (1, 1): "black"}


def luminance(colour):
    """The relative luminance of an sRGB colour, from 0 to 1 (W3C 2018, Web Content Accessibility Guidelines 2.1)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_text_of_every_cell_stands_out_from_its_colour(tmp_path):
    """The guidelines ask for a contrast of at least 4.5."""
    assert (luminance("white"), luminance("black")) == (pytest.approx(1), 0)
    levels = [0.0, 0.2, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0]
    for values in ("honest_accuracy", "right"):
        table = pandas.DataFrame(
            {"row": "a", "column": [f"{x}" for x in levels], "seed": 0, values: levels, "data": ""}
        )
        ax = new_ax()
        figures.plot_grid(ax, table, values, {})
        for level, text in zip(levels, ax.texts, strict=True):
            one, other = sorted((luminance(ax.images[0].to_rgba(level)[:3]), luminance(text.get_color())))
            assert (other + 0.05) / (one + 0.05) > 4.5, level


def test_colours_are_the_same_in_all_heat_maps_and_a_bad_cell_leaves_them(tmp_path):
    """On the scale of the error's logarithm, 0.95 lies at ln(0.5 / 0.05) / ln(0.5 / 0.02) = 0.715."""
    table = runs.read_grid(write_grid(tmp_path / "table.csv", honest_accuracy=[0.95, 0.95, 0.9, 0.9] * 2))
    places = []
    for worst in (0.9, 0.05):
        table.loc[table["honest_accuracy"] < 0.95, "honest_accuracy"] = worst
        ax = new_ax()
        figures.plot_grid(ax, table, "honest_accuracy", {})
        places.append([float(ax.images[0].norm(value)) for value in (0.5, 0.9, 0.95, 0.98)])
    assert places[0] == places[1] == pytest.approx([0, 0.5, 0.7153, 1], abs=1e-4)


def test_heat_maps_name_their_axes_and_their_colours(tmp_path):
    attacks = ["label_flip", "label_flip", "noise", "noise"] * 2
    path = write_grid(tmp_path / "table.csv", mad_start=[None] * 4 + [5] * 4, attack=attacks)
    drawn = dict(figures.grid_figures(path))
    for name, said in {
        "honest_accuracy": "accuracy of the honest clients", "test_accuracy": "accuracy on the test set",
        "test_sensitivity": "sensitivity", "exclusions": "share of clients judged correctly",
    }.items():  # fmt: skip
        cells, colours = drawn[f"grid-{name}"].axes
        assert (cells.get_xlabel(), cells.get_ylabel()) == ("attack", "MAD start")
        assert colours.get_ylabel().replace("\n", " ") == f"{said} (0 to 1)"
    drawn = dict(figures.grid_figures(write_grid(tmp_path / "table.csv", rule="krum")))
    assert drawn["grid-exclusions"].axes[0].get_ylabel() == "settings"  # the table does not say
    assert drawn["grid-exclusions"].get_suptitle().endswith(", rule krum")


def test_a_cell_without_a_complete_run_says_so(tmp_path):
    path = write_grid(tmp_path / "table.csv", complete=[False, False, *[True] * 6])
    for figure in dict(figures.grid_figures(path)).values():
        assert [text.get_text() == "no run" for text in figure.axes[0].texts] == [False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 10, 30, 60, 90, 200])
@pytest.mark.parametrize("columns", [2, 12])
def test_heat_maps_keep_their_width_whatever_the_labels(tmp_path, length, columns):
    table, words = pandas.read_csv(write_grid(tmp_path / "table.csv")), ("word " * length)[:length]
    one = table[table["column"] == "flip"].assign(row=words + table["row"])
    pandas.concat([one.assign(column=f"{words}{number}") for number in range(columns)]).to_csv(tmp_path / "table.csv")
    for name, figure in figures.grid_figures(tmp_path / "table.csv"):
        plot.save(figure, tmp_path / name)
        assert share_of_axes(figure) >= 0.6 and nothing_is_cut(figure), name


@pytest.mark.parametrize(("columns", "lines"), [(2, 2), (3, 2), (4, 4), (9, 4)])
def test_the_counts_fit_into_their_cells(tmp_path, columns, lines):
    table = pandas.read_csv(write_grid(tmp_path / "table.csv")).drop(columns="column").drop_duplicates(["row", "seed"])
    table = pandas.concat([table.assign(column=f"attack {number}", clients=1000) for number in range(columns)])
    table.to_csv(tmp_path / "table.csv", index=False)
    figure = dict(figures.grid_figures(tmp_path / "table.csv"))["grid-exclusions"]
    figure.draw_without_rendering()
    ax = figure.axes[0]
    cells = [ax.transData.transform((at, at)) for at in (0, 1)]
    width, height = abs(cells[1] - cells[0])
    assert len(ax.texts) == 2 * columns
    for text in ax.texts:
        box = text.get_window_extent()
        assert text.get_text().count("\n") == lines - 1 and box.width < width and box.height < height


def test_of_one_seed_no_deviation_and_what_ended_early_is_left_out(tmp_path):
    complete = [True, False] * 4
    table = runs.read_grid(write_grid(tmp_path / "table.csv", complete=complete))
    assert set(table["seed"]) == {0}
    assert figures.cell_texts(table, "test_accuracy")["never", "flip"] == "0.800"


@pytest.mark.parametrize(
    ("columns", "said"), [({}, "last 10 of"), ({"averaged": [4, 9] * 4}, "last 4 to 9 of"), ({"last": 7}, "last 7 of")]
)
def test_heat_maps_say_how_many_rounds_their_means_cover(tmp_path, columns, said):
    """A table of an earlier version has no column `averaged`. Its means are over ten rounds, or over all if fewer."""
    drawn = dict(figures.grid_figures(write_grid(tmp_path / "table.csv", **columns)))
    assert f"PneumoniaMNIST, {said} 40 rounds, mean ±" in drawn["grid-test_accuracy"].get_suptitle()


@pytest.mark.slow
def test_an_experiment_of_many_runs_is_drawn_as_heat_maps_alone(tmp_path, capsys):
    for kind in range(plot.MOST_LINES + 1):
        make_run(tmp_path / "big" / f"r{kind}", mad_start=kind + 1, samples=kind == 0)
    write_grid(tmp_path / "big" / "table.csv")
    assert plot.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    names = [Path(line).name for line in out.splitlines()[:-1]]
    assert names == ["fig2.png", *(f"grid-{name}.png" for name in (*runs.METRICS, "exclusions"))]
    assert f"{tmp_path / 'big'}: 10 kinds of runs are too many for one figure of lines;" in err


def test_a_table_alone_is_drawn_as_heat_maps(tmp_path, capsys):
    """The tables in docs/results lie in folders without runs."""
    write_grid(tmp_path / "b10" / "table.csv")
    write_grid(tmp_path / "b9" / "table.csv")
    write_grid(tmp_path / "c" / "table.csv", column="")
    assert plot.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    grids = [f"grid-{name}" for name in (*runs.METRICS, "exclusions")]
    shown = [str(tmp_path / "figures" / group / f"{grid}.png") for group in ("b9", "b10") for grid in grids]
    assert out.splitlines()[:-1] == shown
    assert err == f"{tmp_path / 'c'}: not drawn, there are no runs, and a heat map needs several rows and columns\n"
    assert plot.main([str(tmp_path), "--play"]) == 2 and "holds no run" in capsys.readouterr().err


def test_the_table_of_several_runs_takes_no_figure_away(tmp_path, capsys):
    """Several runs write a table with one column. It gives no heat maps, so each run keeps its own figure."""
    kinds = range(plot.MOST_LINES + 1)
    loaded = [plot.load_run(make_run(tmp_path / f"r{kind}", epochs=kind + 1)) for kind in kinds]
    write_grid(tmp_path / "table.csv", column="")
    assert [str(name) for name, _ in plot.figures(loaded, tmp_path)] == [f"trust-r{kind}" for kind in kinds]
    assert "10 kinds of runs are too many" in capsys.readouterr().err


def write_beside(folder, spans="rounds", others="loss"):
    (folder / "spans.csv").write_text(
        f"row,column,seed,{spans},loss,honest_accuracy\na,,0,1,0.5,0.8\na,,1,1,0.9,0.6\na,,0,2,0.3,0.9\na,,1,2,0.3,0.9\n"
    )
    (folder / "others.csv").write_text(f"run,round,{others},honest_accuracy\nthey,1,0.6,0.7\nthey,2,0.4,0.8\n")


def test_another_system_is_drawn_beside_an_experiment(tmp_path, capsys):
    write_beside(tmp_path)
    (tmp_path / "table.csv").write_text("")
    drawn = {str(name): figure for name, figure in plot.figures([], tmp_path)}
    assert [*drawn] == ["beside"]
    upper, lower = drawn["beside"].axes
    assert [line.get_label() for line in upper.lines] == ["a, 2 seeds", "they"]
    assert [line.get_ydata().tolist() for line in upper.lines] == [[pytest.approx(0.7), 0.3], [0.6, 0.4]]
    band = upper.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 1][:, 1].min() == 0.5 and band[band[:, 0] == 1][:, 1].max() == 0.9
    assert [line.get_ydata().tolist() for line in lower.lines] == [[pytest.approx(0.7), 0.9], [0.7, 0.8]]


@pytest.mark.parametrize("names", [{"spans": "span"}, {"others": "cost"}])
def test_another_system_with_missing_columns_is_one_line(tmp_path, capsys, names):
    write_beside(tmp_path, **names)
    assert figures.beside_figure(tmp_path) is None
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path / 'others.csv'}: not drawn, ") and err.count("\n") == 1


def test_an_experiment_of_one_column_has_no_heat_map(tmp_path):
    write_grid(tmp_path / "table.csv", column="")
    assert list(figures.grid_figures(tmp_path / "table.csv")) == []


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\0", "row,column\n1\n1,2,3\n"])
def test_a_damaged_table_is_one_line(tmp_path, capsys, content):
    (tmp_path / "table.csv").write_text(content)
    assert list(figures.grid_figures(tmp_path / "table.csv")) == []
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path / 'table.csv'}: not drawn, ") and err.count("\n") == 1
