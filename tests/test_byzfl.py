"""Tests of the rules that come from the package byzfl: beside our own, by hand, and where the package is missing."""

import pickle
import warnings
from itertools import product

import numpy as np
import pytest

from harness.cli import main
from lab import experiments, rules
from lab.rules import RULES
from madsim import Config, simulate
from trust import aggregate


@pytest.fixture
def byzfl():
    return pytest.importorskip("byzfl")


def test_without_the_package_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--rounds", "1", "--rule", "byzfl:Median", "--out", str(tmp_path)])
    needed = "rules of byzfl need this package; install it with: pip install byzfl"
    assert capsys.readouterr().err == f"madsim: {needed}\n" and not list(tmp_path.iterdir())
    assert rules.byzfl_names() == {"byzfl:NAME": needed}


@pytest.mark.parametrize(
    "name", [f"byzfl:{of}" for of in ("", "Nope", "NNM", "CAF", "Median>TrMean", "NNM>ARC>Median")]
)
def test_an_unknown_name_is_refused_with_the_known_ones(byzfl, name):
    with pytest.raises(ValueError, match=f"rule {name} is unknown; known: byzfl:NAME, Average, .*the same after PRE: "):
        Config(rule=name)


@pytest.mark.parametrize("seed", range(10))
def test_byzfls_rules_are_ours_on_random_models(byzfl, seed):
    """byzfl's Krum adds up n - f - 1 distances, Blanchard et al. and ours n - f - 2: it is ours with f - 1."""
    rng = np.random.default_rng(seed)
    W, f = rng.normal(size=(rng.integers(7, 12), 30)), int(rng.integers(1, 3))
    ones = np.ones(len(W))
    for name, rule in {"Average": "mean", "Median": "median", "TrMean": "trimmed_mean"}.items():
        assert RULES[f"byzfl:{name}"](W, ones, f) == pytest.approx(RULES[rule](W, ones, f), abs=1e-12)
    assert RULES["byzfl:GeometricMedian"](W, ones, f) == pytest.approx(rules.geometric_median(W, ones, f), abs=1e-6)
    assert RULES["byzfl:Clipping>Average"](W, ones, f) == pytest.approx(rules.norm_clipping(W, ones, f), abs=1e-12)
    assert RULES["byzfl:Krum"](W, ones, f) == pytest.approx(rules.krum(W, ones, f - 1), abs=1e-12)
    best = rules.krum_scores(W, f - 1).argsort()[: len(W) - f]
    assert RULES["byzfl:MultiKrum"](W, ones, f) == pytest.approx(W[best].mean(0), abs=1e-12)


def test_pre_aggregators_by_hand(byzfl):
    """The models are 0, 1, 2, 3 and 100, with f = 1.

    Each is replaced by the mean of its four nearest: 1.5 for all but the far one, which becomes (100 + 3 + 2 + 1) / 4
    = 26.5. In ARC int(2/5 * 4) = 1 model is clipped, to the length of the next one, 3. Buckets have 5 // 3 = 1 model.
    The median length is 2, to which static clipping clips.
    """
    U, ones = np.array([[0.0], [1], [2], [3], [100]]), np.ones(5)
    assert RULES["byzfl:NNM>Average"](U, ones, 1) == pytest.approx([(4 * 1.5 + 26.5) / 5])
    assert RULES["byzfl:NNM>TrMean"](U, ones, 1) == pytest.approx([1.5])
    assert RULES["byzfl:ARC>Average"](U, ones, 1) == pytest.approx([(0 + 1 + 2 + 3 + 3) / 5])
    assert RULES["byzfl:Clipping>Average"](U, ones, 1) == pytest.approx([(0 + 1 + 2 + 2 + 2) / 5])
    assert RULES["byzfl:Bucketing>Median"](U, ones, 1) == pytest.approx([2])
    assert U[:, 0].tolist() == [0, 1, 2, 3, 100]


def test_centred_clipping_by_hand(byzfl):
    """Three steps from 0, in which each difference is clipped to the median length 2.

    The models 2, 2 and 8: the first step gives (2 + 2 + 2) / 3 = 2, and each of the others 2/3 more for the far one,
    less what the first two pull back: 2 + (0 + 0 + 2) / 3 = 8/3, then 8/3 + (-2/3 - 2/3 + 2) / 3 = 26/9.
    """
    assert RULES["byzfl:CenteredClipping"](np.array([[2.0], [2], [8]]), np.ones(3), 1) == pytest.approx([26 / 9])


def test_buckets_are_drawn_from_the_models_alone(byzfl):
    """With f = 2, eleven models are dealt into buckets of 11 // 5 = 2. numpy's own generator stays as it was."""
    rng = np.random.default_rng(0)
    W, ones = rng.normal(size=(11, 4)), np.ones(11)
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first = RULES["byzfl:Bucketing>Median"](W, ones, 2)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert RULES["byzfl:Bucketing>Median"](W, ones, 2).tolist() == first.tolist()
    assert first.tolist() != RULES["byzfl:Median"](W, ones, 2).tolist()


def test_every_one_of_them_takes_numbers_of_any_size(byzfl):
    """Equal models give the same model. The aggregate of finite models is finite, and moves with the federation."""
    rng = np.random.default_rng(0)
    W, before = rng.normal(size=(7, 80)), rng.normal(size=80)
    everybody, ones = np.ones(7, bool), np.ones(7)
    known = rules.byzfl_classes()
    before_names = ["", *(f"{name}>" for name in known["preaggregators"])]
    assert len(known["aggregators"]) >= 11 and len(before_names) >= 5
    for pre, name in product(before_names, known["aggregators"]):
        rule = RULES[f"byzfl:{pre}{name}"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same = aggregate(np.tile(before + 1, (7, 1)), ones, everybody, rule, 2, before)
            assert same == pytest.approx(before + 1, abs=1e-6), rule.__name__
            w = aggregate(W, ones, everybody, rule, 2, before)
            if "Bucketing" not in pre and name != "SMEA":  # these draw from the models
                big = aggregate(W * 1e200, ones, everybody, rule, 2, before * 1e200)
                assert big / 1e200 == pytest.approx(w, abs=1e-5), rule.__name__
            assert np.isfinite(aggregate(W, ones, everybody, rule, 0, before)).all(), rule.__name__
            assert np.isfinite(aggregate(W[:2], ones[:2], everybody[:2], rule, 0, before)).all(), rule.__name__
            far = np.vstack([W[:5], np.full((2, 80), 1e30), np.full((1, 80), -1e300)])
            assert np.isfinite(aggregate(far, np.ones(8), np.ones(8, bool), rule, 3, before)).all()


@pytest.mark.parametrize("name", ["MDA", "SMEA", "NNM>MDA"])
def test_a_rule_that_would_try_too_many_sets_says_so(byzfl, name):
    """20 of 40 clients can be chosen in 137846528820 ways."""
    rule, U = RULES[f"byzfl:{name}"], np.random.default_rng(0).normal(size=(40, 3))
    with pytest.raises(ValueError, match=f"{name} tries all sets of honest clients; here these are 137846528820"):
        rule(U, np.ones(40), 20)


def test_a_run_is_not_damaged_where_the_package_is_missing(byzfl, small, tmp_path, monkeypatch):
    simulate(Config(rounds=1, clients=4, rule="byzfl:Median", threads=1), tmp_path, dataset=small)
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^rules of byzfl need this package; install it with: pip install byzfl$"):
        Config.read(tmp_path)


def test_a_run_with_such_a_rule(byzfl, small, tmp_path):
    """It is the same in another process and when it is resumed; its folder's name is one that any system can have."""
    config = Config(rounds=2, clients=4, malicious=0.25, rule="byzfl:Bucketing>Median", threads=1)
    assert config.name == "nomad-rounds2-clients4-malicious0.25-rulebyzfl-Bucketing-Median-s0"
    first = simulate(config, tmp_path / "a", dataset=small)
    again = simulate(pickle.loads(pickle.dumps(config)), tmp_path / "b", dataset=small)
    assert first.weights.tolist() == again.weights.tolist()
    assert Config.read(tmp_path / "a") == config and config.rule not in [*RULES]
    whole = simulate(Config(**vars(config) | {"rounds": 3}), dataset=small)
    longer = simulate(Config(**vars(config) | {"rounds": 3}), tmp_path / "a", dataset=small, resume=True)
    assert longer.weights.tolist() == whole.weights.tolist()


def test_the_defences_have_two_more_rows_with_the_package(byzfl):
    rows = experiments.EXPERIMENTS["defences"].rows
    assert rows["centered clipping"] == {"rule": "byzfl:CenteredClipping", "mad_start": None}
    assert rows["nearest-neighbour mixing, trimmed mean"] == {"rule": "byzfl:NNM>TrMean", "mad_start": None}
