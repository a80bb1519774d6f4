"""Tests of lab/privacy.py: membership inference and gradient inversion."""

import math
import sys
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_plot import make_run, nothing_is_cut, write_csv

import data
import madsim
import model
import plot
from harness.cli import main
from harness.log import INVERSION_SECONDS, LEAKAGE_COLUMNS, MEMBERSHIP_COLUMNS, held, usual_seconds
from harness.runs import seen_in_words
from lab import figures, privacy
from lab.experiments import EXPERIMENTS, Experiment
from lab.privacy import GradientInversion, MembershipInference, chance_advantage, membership_advantage
from madsim import Config, simulate


@pytest.mark.parametrize(
    ("members", "others", "advantage"),
    [
        ([1, 2], [3, 4], 1.0),  # a threshold of 2 separates them
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.0),
        ([1, 2, 5, 6], [3, 4, 5, 6], 0.5),  # threshold 2: half of the members, none of the others
        ([3, 4], [1, 2], 0.0),  # members should have the lower losses; the advantage is never below 0
        ([1, 1, 2], [1, 2, 2, 2], 2 / 3 - 1 / 4),  # equal losses are on the same side
    ],
)
def test_membership_advantage_by_hand(members, others, advantage):
    assert membership_advantage(np.array(members), np.array(others)) == pytest.approx(advantage)


def test_chance_alone_gives_the_advantage_that_is_said():
    """300 members and 200 others are drawn 2000 times from the same distribution.

    Smirnov's limit is a little above the mean advantage.
    """
    rng = np.random.default_rng(0)
    found = np.mean([membership_advantage(rng.random(300), rng.random(200)) for _ in range(2000)])
    assert chance_advantage(300, 200) == pytest.approx(math.sqrt(math.pi / 8 / 120), rel=1e-9)
    assert 0.9 < found / chance_advantage(300, 200) < 1.0


def test_membership_is_told_of_a_model_that_remembers_and_of_no_other(phantom):
    """Two honest clients have 40 images each and a high learning rate.

    After 150 epochs the clients' own images are memorised.
    """
    rng = np.random.default_rng(0)
    numbers = rng.permutation(len(phantom.train_labels))
    shares = [data.Share(numbers[a : a + 40], numbers[a + 1000 : a + 1500], a == 80) for a in (0, 40, 80)]
    noise = rng.integers(0, 2, len(phantom.train_labels))  # labels that can only be memorised
    clients = model.Clients(
        (phantom.train_images, noise, noise), (phantom.test_images, phantom.test_labels), shares,
        seed=0, attacking=lambda t: True, submit=lambda W, w, honest, rng, t: W, device="cpu", threads=1,
        cores={}, epochs=150, batch_size=20, lr=2e-3, dropout=(0.0, 0.0),
    )  # fmt: skip
    w = model.initial_weights(0).numpy()
    inference = MembershipInference(clients)
    before = inference(w, 1)
    W, _ = clients.train(w, np.array([True, True, False]), 1)
    after = inference(W[0].numpy(), 1)  # it has seen 40 of the 80 training images
    assert before["validation_advantage"] < 3 * before["validation_chance"]
    assert after["validation_advantage"] > 0.3 > 3 * after["validation_chance"]
    assert after["validation_chance"] == chance_advantage(80, 1000)  # the attacker's images do not count
    assert after["test_chance"] == chance_advantage(80, len(phantom.test_labels))
    assert after == inference(W[0].numpy(), 1)  # random draws depend only on seed and round
    # The bootstrap error is close to the binomial error of two shares (here about 0.05 and 0.016).
    assert 0.02 < after["validation_error"] < 0.08


def test_membership_is_measured_of_the_model_that_clients_received(small, tmp_path):
    """In round 4, the clients receive the model of round 3."""
    config = Config(rounds=5, membership=2, mad_start=1)
    result = simulate(config, tmp_path / "run", dataset=small)
    table = pd.read_csv(tmp_path / "run" / "membership.csv")
    assert table.columns.tolist() == MEMBERSHIP_COLUMNS == result.membership.columns.tolist()
    assert table["round"].tolist() == [2, 4] and np.allclose(table, result.membership)
    earlier = simulate(replace(config, rounds=3, membership=None), dataset=small)
    assert earlier.membership is None and earlier.summary["membership"] is None
    measured = MembershipInference(madsim.gather(config, small))(earlier.weights, 4)
    assert table.iloc[1, 1:].to_dict() == pytest.approx(measured, rel=1e-5)


def test_measuring_membership_changes_nothing_else(small):
    one, other = (simulate(Config(rounds=3, membership=m), dataset=small) for m in (1, None))
    assert one.rounds.equals(other.rounds) and one.clients.equals(other.clients)


def test_what_an_excluded_attacker_holds_by_hand():
    """Client 1 trains last in round 2, so it holds what was measured in that round. Client 0 continues."""
    trained = [(1, 0, 0.5), (1, 1, 0.5), (2, 0, 0.4), (2, 1, 0.4), (3, 0, 0.3), (3, 1, np.nan)]
    clients = pd.DataFrame(trained, columns=["round", "client", "train_loss"])
    membership = pd.DataFrame({"round": [2, 3], "test_advantage": [0.1, 0.2]})
    assert held(membership, clients, 1) == {"round": 2, "test_advantage": 0.1}
    assert held(membership, clients, 0) == {"round": 3, "test_advantage": 0.2}
    assert held(membership.tail(1), clients, 1) is None  # the measurement came too late


def test_few_validation_images_are_copies_of_training_images(real):
    """docs/replication.md: of the honest clients' 376 validation images, 1 to 4, over the seeds 0 to 4."""
    copies = []
    for seed in range(5):
        honest = [share for share in madsim.gather(Config(seed=seed), real).shares if not share.malicious]
        train, validation = (np.concatenate([getattr(s, kind) for s in honest]) for kind in ("train", "validation"))
        known = {real.train_images[i].tobytes() for i in train}
        copies.append(sum(real.train_images[i].tobytes() in known for i in validation))
        assert len(validation) == 376
    assert copies == [4, 1, 1, 2, 1]


# ---------------------------------------------------------------- gradient inversion


BRIEF = "gradient:1,2x4,update"


@pytest.fixture
def brief(monkeypatch):
    """Gradient inversion with few steps."""
    monkeypatch.setattr(privacy, "STEPS", 3)


def tensors(dataset: data.Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.tensor(dataset.train_images[:count]).float().div(127.5).sub(1)[:, None]
    return images, torch.tensor(dataset.train_labels[:count])


def test_the_gradient_is_that_of_plain_pytorch(phantom):
    images, labels = tensors(phantom, 5)
    w = model.initial_weights(0)
    network = model.network_of(w.clone(), model.convolve_pool)
    F.cross_entropy(network(images), labels).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert torch.allclose(privacy.gradient(privacy.plain_network(), w, images, labels), expected, atol=1e-7)


def test_the_label_of_a_single_image_is_exact(phantom):
    """Of the gradient and of the first step of Adam, with initial and with trained weights."""
    images, labels = tensors(phantom, 40)
    w = model.initial_weights(1)
    members = [np.arange(200, 300)]
    all_images, all_labels = tensors(phantom, 300)
    trained, _ = model.train_clients(w, all_images, all_labels, members, [np.random.default_rng(0)])
    assert len(labels.unique()) == 2
    for weights in (w, trained[0]):
        for number in range(40):
            pick = [np.array([number])]
            found = privacy.gradient(
                privacy.plain_network(), weights, images[number : number + 1], labels[number : number + 1]
            )
            assert privacy.label_of(found) == labels[number]
            moved, _ = model.train_clients(weights, images, labels, pick, [np.random.default_rng(0)])
            assert privacy.label_of(weights - moved[0]) == labels[number]


@pytest.mark.slow
@pytest.mark.parametrize(("adam", "most"), [(False, privacy.RARE), (True, 0.1)])
def test_an_image_is_found_from_its_gradient_and_not_from_that_of_another(real, adam, most):
    """What is found is nearer to its own image than to nearly all of 1000 others; see the negative control."""
    images, labels = tensors(real, 1002)
    w, own = model.initial_weights(0), slice(0, 1)
    seen = privacy.gradient(privacy.plain_network(), w, images[own], labels[own])
    seen = seen.sign() if adam else seen
    found = privacy.invert_gradient(seen, w, labels[own], np.random.default_rng(0), adam=adam)[:, 0].numpy()
    pixels = images[:, 0].numpy()
    assert found.shape == (1, 28, 28) and abs(found).max() <= 1
    y = labels.numpy()
    assert privacy.ranks(found, y[own], pixels[own], y[own], pixels[2:], y[2:]) < most
    alike, other = (privacy.likeness(found, pixels[numbers]) for numbers in (own, slice(1, 2)))
    assert alike["ssim"] > other["ssim"] + 0.1 and alike["psnr"] > other["psnr"] + 1


def test_ranks_pairs_and_likeness_by_hand():
    """Grey images: 0.1 apart is an error of 0.01, so 10 log10(4 / 0.01) = 26.02 dB."""
    grey = lambda *values: np.stack([np.full((28, 28), value) for value in values])  # noqa: E731
    found, true = grey(0.0, 0.5), grey(0.6, -0.9, 0.1)
    assert privacy.matched(found, true).tolist() == [2, 0]
    assert privacy.likeness(found, true[[2, 0]])["psnr"] == pytest.approx(10 * math.log10(400))
    assert privacy.likeness(true, true) == pytest.approx({"psnr": 20 * math.log10(2 * 255), "ssim": 1})
    # Of the five images with label 0, one is nearer to 0.0 than 0.1 is, and 0.1 is the second: (1/5 + 2/5) / 2. Those
    # with label 1 do not count. Of the six with label 1, two are nearer to 0.5 than 0.6 is, and 0.6 is the third. Of
    # the 15 pairs, 9 hold one of the two, and 12 hold one of the three: (9/15 + 12/15) / 2.
    others = grey(0.05, 0.2, 0.3, -0.5, 0.45, 0.55, 0.9, -0.9)
    labels = np.repeat([0, 1], 4)
    share = privacy.ranks(found, np.array([0, 1]), true, np.array([1, 1, 0]), others, labels)
    assert share == pytest.approx([3 / 10, 7 / 10])


def test_ranks_of_images_that_tell_nothing_are_half_on_average():
    """Negative control: with random images the mean of 400 ranks is 0.5, whatever the number of true images."""
    rng = np.random.default_rng(0)
    pool, labels = rng.normal(size=(200, 28, 28)), np.zeros(200, int)
    for number in (1, 5, 40):
        true, others, values = labels[:number], labels[number:], []
        for _ in range(400):
            found, pool = rng.normal(size=(1, 28, 28)), rng.permutation(pool)
            values += [*privacy.ranks(found, labels[:1], pool[:number], true, pool[number:], others)]
        assert abs(np.mean(values) - 0.5) < 3 * np.sqrt(1 / 12 / 400)  # 3 standard errors of a uniform number
        assert np.mean(np.array(values) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_inversion_needs_labels_and_a_gradient():
    w = model.initial_weights(0)
    for seen, labels in ((w, []), (w * 0, [1]), (w * float("nan"), [1])):
        with pytest.raises(ValueError, match="needs a finite gradient other than 0, and labels"):
            privacy.invert_gradient(seen, w, torch.tensor(labels), np.random.default_rng(0))


def test_the_update_that_is_inverted_is_the_one_that_the_client_submits(small, brief, monkeypatch):
    seen = []
    clients = madsim.gather(Config(epochs=2), small)
    inversion, w = GradientInversion(clients, BRIEF), model.initial_weights(0).numpy()

    def blank(update, w, labels, *_, **__):
        seen.append(update)
        return w.new_zeros(len(labels), 1, 28, 28)

    monkeypatch.setattr(privacy, "invert_gradient", blank)
    rows = [row for row, *_ in inversion(w, 3)]
    W, _ = clients.train(w, np.ones(10, bool), 3)
    assert not clients.shares[inversion.number].malicious
    assert torch.equal(seen[2], torch.tensor(w) - W[inversion.number])
    assert [(row["steps"], row["images"]) for row in rows] == [(0, 1), (2, 4), (4, 20)]  # 36 images: 2 steps per epoch
    assert rows[0]["label"] == 1 and all(math.isnan(row["label"]) for row in rows[1:])


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_gradient_of_0_or_nan_reveals_nothing_and_ends_no_run(small, monkeypatch, value):
    """A network that is quite sure of an image has a gradient of 0: the attacker is left with grey."""
    monkeypatch.setattr(privacy, "gradient", lambda network, w, *_: w * value)
    inversion = GradientInversion(madsim.gather(Config(), small), "gradient:1")
    [(row, true, found)] = inversion(model.initial_weights(0).numpy(), 1)
    assert not found.any() and row["psnr"] == pytest.approx(10 * math.log10(4 / (true**2).mean()), rel=1e-5)


def test_the_bar_says_which_inversion_goes_on_and_the_estimate_counts_the_kinds(small, brief, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setenv("COLUMNS", "80")
    config = Config(rounds=1, leakage=1, inverted="gradient:1,1x4")
    simulate(config, dataset=small, bar=True)
    *before, last = capsys.readouterr().err.rstrip().split("\r")
    news = {shown.split(", ", 1)[1].strip() for shown in before if "inversion" in shown}
    assert news == {"gradient inversion: gradient of 1 image", "gradient inversion: 1 step of 4 images"}
    assert last.startswith("1/1") and "inversion" not in last
    without = usual_seconds(Config(rounds=1))
    assert usual_seconds(config) == pytest.approx(without + 2 * INVERSION_SECONDS)
    of_the_lesson = replace(config, inverted="gradient:1,1x1,gradient:4,update")
    assert 1.9 < usual_seconds(of_the_lesson) / (60 * without) < 2.5  # measured: twice as long as --quick


def test_a_run_measures_leakage_of_the_model_that_clients_received(small, brief, tmp_path):
    config = Config(rounds=3, leakage=2, inverted=BRIEF)
    result = simulate(config, tmp_path / "run", dataset=small)
    table = pd.read_csv(tmp_path / "run" / "leakage.csv")
    assert table.columns.tolist() == LEAKAGE_COLUMNS == result.leakage.columns.tolist()
    assert table["round"].tolist() == [2, 2, 2] and np.allclose(table, result.leakage, equal_nan=True)
    unmeasured = Config(rounds=3)
    earlier = simulate(replace(unmeasured, rounds=1), dataset=small)
    again = GradientInversion(madsim.gather(config, small), BRIEF)(earlier.weights, 2)
    assert [row["psnr"] for row, *_ in again] == pytest.approx(table["psnr"].tolist(), rel=1e-5)
    with np.load(tmp_path / "run" / "leakage.npz") as arrays:
        assert {name: arrays[name].shape for name in arrays if name.startswith("found")} == {
            "found_0_1": (1, 28, 28), "found_2_4": (8, 28, 28), "found_2_20": (20, 28, 28)
        }  # fmt: skip
        assert all(arrays[name].dtype == np.uint8 for name in arrays)
    alone = simulate(unmeasured, dataset=small)
    assert alone.leakage is None and alone.rounds.equals(result.rounds)


def test_what_an_attacker_sees_is_chosen_by_a_text():
    assert privacy.kinds_seen("gradient:4,2x20,update") == [(0, 4), (2, 20), None]
    assert len(privacy.kinds_seen(Config.inverted)) == 11
    for text in ("", "gradient:0", "gradient", "0x20", "2x0", "2x", "update,", "gradient:1, update", "Update", "1x1e3"):
        with pytest.raises(ValueError, match="is unknown; known: gradient:N for the gradient of N images, KxN for K"):
            privacy.kinds_seen(text)
    with pytest.raises(ValueError, match="inverted 1x1,update,1x1 names something twice"):
        privacy.kinds_seen("1x1,update,1x1")


@pytest.mark.parametrize(("inverted", "needed"), [("gradient:37,update", 37), ("5x20", 100)])
def test_more_images_than_the_client_has_are_refused(small, inverted, needed):
    found = f"inverted {inverted} needs {needed} images; client 1 has 36"
    with pytest.raises(ValueError, match=found):
        simulate(Config(rounds=1, leakage=1, inverted=inverted), dataset=small)
    with pytest.raises(ValueError, match="changes nothing without leakage"):
        Config(inverted=inverted)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--leakage 1 --inverted gradients:1", "inverted 'gradients:1' is unknown; known: gradient:N"),
        ("--leakage 1 --inverted gradient:37", "inverted gradient:37 needs 37 images; client 1 has 36"),
        ("--leakage 3", "leakage 3 lies beyond the 2 rounds"),
        ("--inverted update", "inverted update changes nothing without leakage; leave it out"),
    ],
)
def test_bad_input_is_one_line(quick, capsys, tmp_path, words, said):
    given = ["--rounds", "2", "--dataset", "phantom", "--out", tmp_path / "run", *words.split()]
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, given)))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0] and not (tmp_path / "run").exists()


def test_an_experiment_with_leakage_has_tables_and_figures(quick, brief, monkeypatch, capsys, tmp_path):
    """Two seeds: each number of the tables is the mean of the two runs' leakage.csv."""
    options = {"rounds": 1, "leakage": 1, "inverted": "gradient:1,gradient:2,1x1,1x20"}
    monkeypatch.setitem(EXPERIMENTS, "grid", Experiment("a grid", 1, {"first": options}, {"": {}}))
    given = ["--experiment", "grid", "--dataset", "phantom", "--jobs", "1", "--seeds", "2", "--out", str(tmp_path)]
    assert main(given) == 0
    printed, folder = capsys.readouterr().out, tmp_path / "grid"
    runs = [pd.read_csv(path) for path in sorted(folder.glob("*/leakage.csv"))]
    table = pd.read_csv(folder / "leakage.csv")
    assert len(runs) == 2 and table["seen"].tolist()[:4] == [
        "gradient of 1 image", "gradient of 2 images", "1 step of 1 image", "1 step of 20 images"
    ]  # fmt: skip
    assert table[table["seed"] == 1][LEAKAGE_COLUMNS].reset_index(drop=True).equals(runs[1])
    both = [run["psnr"][3] for run in runs]
    cell = f"{np.mean(both):.1f} ± {np.std(both, ddof=1):.1f}"
    for text in (printed, (folder / "table.md").read_text()):
        assert any("1 step of 20 images" in line and cell in line for line in text.splitlines())
    assert plot.main([str(folder)]) == 0
    for name in ("leakage", "inversion"):
        assert (folder / "figures" / f"{name}.png").is_file()


def test_the_figure_of_leakage_has_the_means_of_the_seeds(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1)
    first = [(1, 0, 1, 0.1, 20), (1, 0, 4, 0.3, 16), (1, 1, 1, 0.2, 18), (1, 1, 20, 0.5, 12), (1, 5, 20, 0.5, 12)]
    second = [(t, steps, images, rank + 0.2, psnr - 2) for t, steps, images, rank, psnr in first]
    for name, rows in (("a", first), ("b", second)):
        columns = ["round", "steps", "images", "rank", "psnr", "mean_psnr", "nearest_psnr"]
        write_csv(tmp_path / name / "leakage.csv", columns, [[*row, 15, 17] for row in rows])
    figure = figures.leakage_figure([plot.load_run(tmp_path / name) for name in ("a", "b")])
    rank, psnr = figure.axes
    seen = ["gradient of 1 image", "gradient of 4 images", "1 step of 1 image", "1 step of 20 images"]
    assert [text.get_text() for text in rank.get_yticklabels()] == [*seen, "5 steps of 20 images"]
    points = dict(zip(rank.lines[0].get_ydata(), rank.lines[0].get_xdata()))  # by row
    assert points == {row: pytest.approx(mean) for row, mean in enumerate((0.2, 0.4, 0.3, 0.6, 0.6))}
    lines = {line.get_label(): list(line.get_xdata()) for line in psnr.lines}
    assert sorted(lines["round 1"]) == [11, 11, 15, 17, 19] and lines["guess: mean of other images"] == [15] * 5
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in (*rank.lines, psnr.lines[1])]
    assert [line.get_label() for line in rank.lines] == ["round 1", "chance"] and len(set(styles)) == 3
    assert rank.lines[0].get_marker() != "None" and rank.lines[0].get_linestyle() == "None"
    assert figures.leakage_figure([]) is None and figures.inversion_figure([plot.load_run(tmp_path / "a")]) is None


def test_the_figure_of_leakage_shows_the_first_and_the_last_of_many_rounds(tmp_path):
    make_run(tmp_path / "a")
    rows = [(t, 0, 1, 0.01 * t, 20) for t in range(1, 61)]
    write_csv(tmp_path / "a" / "leakage.csv", ["round", "steps", "images", "rank", "psnr"], rows)
    rank, psnr = figures.leakage_figure([plot.load_run(tmp_path / "a")]).axes
    drawn = {line.get_label(): line.get_xdata().tolist() for line in rank.lines[:-1]}
    assert len(drawn) == 7 and drawn["round 1"] == [0.01] and drawn["round 60"] == [0.6]
    assert len({tuple(line.get_ydata()) for line in psnr.lines}) == 7  # all PSNRs are equal, but no point hides another


ELEVEN = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 20), (1, 1), (1, 4), (1, 20), (2, 20), (5, 20), (22, 20)]  # by default


@pytest.mark.parametrize(
    ("kinds", "lines"), [([(0, 1)], 1), ([(0, 1), (1, 1)], 1), ([(0, 1), (1, 1), (0, 4), (22, 20)], 1), (ELEVEN, 3)]
)
def test_reconstructed_images_are_large_and_stand_below_the_true_ones(tmp_path, kinds, lines):
    """It shows at most four of each kind, all in one size, and most of the figure is images."""
    make_run(tmp_path / "a")
    greys = {"true": 50, "found": 200}
    arrays = {f"{name}_{k}_{n}": np.full((n, 28, 28), grey, np.uint8) for k, n in kinds for name, grey in greys.items()}
    np.savez(tmp_path / "a" / "leakage.npz", **arrays)
    write_csv(tmp_path / "a" / "leakage.csv", ["round", "steps", "images", "rank", "psnr"], [(1, 0, 1, 0.1, 20)])
    figure = figures.inversion_figure([plot.load_run(tmp_path / "a")])
    assert len(figure.axes) == lines
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    sides = {28 * abs(ax.transData.transform((1, 0)) - ax.transData.transform((0, 0)))[0] for ax in figure.axes}
    assert max(sides) - min(sides) < 0.01 and min(sides) > 0.06 * width
    each = sum(min(images, 4) for _, images in kinds)
    if each > 2:  # fewer are as large as they get
        assert 2 * each * min(sides) ** 2 > 0.5 * width * height
    blocks = [image.get_array() for ax in figure.axes for image in ax.images]
    assert [block.shape for block in blocks] == [(60, 30 * min(images, 4)) for _, images in kinds]
    assert all(set(np.unique(block[:30])) == {50, 255} and 50 not in block[30:] for block in blocks)
    texts = [text.get_text().replace("\n", " ") for ax in figure.axes for text in ax.texts]
    assert texts == [seen_in_words(*kind) for kind in kinds]
    assert nothing_is_cut(figure)


@pytest.mark.slow
def test_threads_change_nothing(small, monkeypatch):
    """Each thread has a network of its own: a network that threads share takes weights of another one at times."""
    monkeypatch.setattr(privacy, "STEPS", 30)
    kinds = "gradient:1,gradient:2,gradient:4,1x1,1x4,2x4"
    alone, both = (simulate(Config(rounds=1, leakage=1, inverted=kinds, threads=n), dataset=small) for n in (1, 2))
    assert alone.leakage.equals(both.leakage)
