"""Tests of data.py: the data sets, the split, the label attack, the PNG files."""

import time
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from madsim import Config, simulate


@given(st.integers(2, 400), st.data())
def test_the_split_is_disjoint_and_uses_every_image(n, draws):
    clients = draws.draw(st.integers(1, n // 2))
    parts = data.partition_iid(n, clients, np.random.default_rng(0))
    assert len(parts) == clients
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert {len(part) for part in parts} <= {n // clients, -(-n // clients)}


def test_the_papers_split():
    shares, _ = data.share_out(np.zeros(4708, int), clients=10, malicious=0.2, seed=0)
    sizes = [(len(share.train), len(share.validation)) for share in shares]
    assert sorted(sizes) == [(423, 47)] * 2 + [(424, 47)] * 8  # 470 or 471 images per client; 10 % are held out
    assert sum(share.malicious for share in shares) == 2
    everything = np.concatenate([part for share in shares for part in (share.train, share.validation)])
    assert sorted(everything) == list(range(4708))


def test_every_client_can_train_and_validate_even_with_two_images():
    shares, _ = data.share_out(np.zeros(20, int), clients=10, malicious=0.0, seed=0)
    assert {(len(share.train), len(share.validation)) for share in shares} == {(1, 1)}


@pytest.mark.parametrize("clients", [0, -1, 11, 4708])
def test_more_clients_than_images_are_refused(clients):
    with pytest.raises(ValueError, match=rf"{clients} clients can't share 20 images.*use 1 to 10"):
        data.partition_iid(20, clients, np.random.default_rng(0))


@pytest.mark.parametrize(("clients", "fraction", "count"), [(10, 0.6, 6), (10, 0.5, 5), (4, 0.45, 2), (1, 0.9, 1)])
def test_malicious_clients_must_stay_a_minority(clients, fraction, count):
    with pytest.raises(ValueError, match=f"fraction {fraction} makes {count} of {clients} clients malicious"):
        data.malicious_count(clients, fraction)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_fractions_outside_their_range_are_refused(fraction):
    with pytest.raises(ValueError, match=f"malicious fraction {fraction} must be"):
        data.malicious_count(10, fraction)
    with pytest.raises(ValueError, match=f"flipped labels {fraction} must be"):
        data.flip_labels(np.array([0, 1]), fraction, np.random.default_rng(0))


@pytest.mark.parametrize(("clients", "fraction", "count"), [(10, 0.2, 2), (10, 0.0, 0), (1, 0.2, 0), (5, 0.4, 2)])
def test_how_many_are_malicious(clients, fraction, count):
    assert data.malicious_count(clients, fraction) == count


def test_flipped_labels_by_hand():
    labels = np.array([0, 1, 1, 0, 1])
    rng = np.random.default_rng(0)
    assert data.flip_labels(labels, 1.0, rng).tolist() == [1, 0, 0, 1, 0]
    assert data.flip_labels(labels, 0.0, rng).tolist() == labels.tolist()
    assert (data.flip_labels(labels, 0.4, rng) != labels).sum() == 2
    assert labels.tolist() == [0, 1, 1, 0, 1]  # the original labels are unchanged


def test_an_attacker_flips_its_whole_share_and_nobody_else_any():
    labels = np.random.default_rng(3).integers(0, 2, 200)
    shares, seen = data.share_out(labels, clients=5, malicious=0.4, seed=1)
    for share in shares:
        own = np.concatenate([share.train, share.validation])
        assert ((seen[own] != labels[own]) == share.malicious).all()


def test_the_attack_does_not_move_the_split():
    labels = np.random.default_rng(3).integers(0, 2, 200)
    honest, _ = data.share_out(labels, 5, 0.0, seed=1)
    attacked, _ = data.share_out(labels, 5, 0.4, seed=1, flip=0.3)
    other_seed, _ = data.share_out(labels, 5, 0.0, seed=2)
    assert all((a.train == b.train).all() for a, b in zip(honest, attacked))
    assert any((a.train != b.train).any() for a, b in zip(honest, other_seed))


# ---------------------------------------------------------------- the phantom


def test_the_phantom_has_the_real_sets_shape_and_class_shares(phantom):
    assert phantom.name == "phantom" and phantom.note == ""
    assert phantom.train_images.shape == (4708, 28, 28) and phantom.test_images.shape == (624, 28, 28)
    assert phantom.train_images.dtype == np.uint8
    assert np.bincount(phantom.train_labels).tolist() == [1214, 3494]
    assert np.bincount(phantom.test_labels).tolist() == [234, 390]


@pytest.mark.slow
def test_the_phantom_is_made_from_its_seed_in_under_two_seconds():
    start = time.perf_counter()
    first, again, other = data.phantom(0), data.phantom(0), data.phantom(1)
    assert time.perf_counter() - start < 6
    assert first.md5 == again.md5 and (first.train_images == again.train_images).all()
    assert first.md5 != other.md5


def test_logistic_regression_is_no_match_for_the_phantom(phantom):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    flat = [images.reshape(len(images), -1) for images in (phantom.train_images, phantom.test_images)]
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500))
    assert linear.fit(flat[0], phantom.train_labels).score(flat[1], phantom.test_labels) < 0.90


# ---------------------------------------------------------------- a data set of one's own

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8)
TRUTH = np.arange(60) % 3 // 2


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(("label", "missing"), [(1, "test_specificity"), (0, "test_sensitivity")])
def test_training_images_of_one_label_are_warned_of(label, missing):
    """The run goes on. Rates of a label that no test image has are empty, and so is the AUC."""
    one = np.full(60, label)
    with pytest.warns(UserWarning, match=f"all training images are {data.LABELS[label]}; a model learns to"):
        own = data.Dataset(IMAGES, one, IMAGES, one, name="own", md5="")
    rounds = simulate(Config(rounds=2, clients=3, malicious=0.0, partition="dirichlet"), dataset=own).rounds
    assert rounds[[missing, "test_auc"]].isna().all(axis=None)
    assert rounds.drop(columns=[missing, "test_auc"]).notna().all(axis=None) and rounds.accuracy.iloc[-1] == 1


def test_membership_needs_two_images_of_each_kind():
    for sizes, kind in (((60, 1), "1 test image"), ((10, 20), "1 validation image")):
        own = data.Dataset(IMAGES[: sizes[0]], TRUTH[: sizes[0]], IMAGES[: sizes[1]], TRUTH[: sizes[1]], "own", "")
        with pytest.raises(ValueError, match=f"membership can't be measured with {kind}; it needs two or more"):
            simulate(Config(rounds=1, clients=1, malicious=0.0, membership=1), dataset=own)


@pytest.mark.parametrize(
    "form",
    [
        lambda array: array.tolist(),
        lambda array: [*array],
        frozen,
        np.asfortranarray,
        lambda array: array[::-1].copy()[::-1],  # negative strides
        lambda array: np.repeat(array, 2, axis=0)[::2],  # not contiguous
        lambda array: array.astype(np.int16),
        lambda array: array.astype(">u4"),
        torch.from_numpy,
        lambda array: array if array.ndim == 3 else array[:, None],  # labels [n, 1], as medmnist has them
        lambda array: array if array.ndim == 3 else array == 1,
        lambda array: array if array.ndim == 3 else pd.Series(array, index=-np.arange(len(array))),
        lambda array: array if array.ndim == 3 else pd.DataFrame({"label": array}),
    ],
)
def test_other_forms_of_a_data_set_give_the_same_run(form):
    """The arrays are those that the class promises, and a run with them gives the same numbers without a warning."""
    plain = (IMAGES, TRUTH, IMAGES[:20], TRUTH[:20])
    own = data.Dataset(*map(form, plain), name="own", md5="")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = simulate(Config(rounds=1, clients=3, malicious=0.4), dataset=own)
    for array, expected in zip((own.train_images, own.train_labels, own.test_images, own.test_labels), plain):
        assert array.dtype == expected.dtype and array.flags.c_contiguous and (array == expected).all()
    expected = simulate(Config(rounds=1, clients=3, malicious=0.4), dataset=data.Dataset(*plain, name="own", md5=""))
    pd.testing.assert_frame_equal(found.clients, expected.clients)


# ---------------------------------------------------------------- PneumoniaMNIST


def test_the_real_data_set(real):
    assert (real.name, real.md5) == ("PneumoniaMNIST", data.MD5)
    assert real.train_images.shape == (4708, 28, 28) and real.train_images.dtype == np.uint8
    assert np.bincount(real.train_labels).tolist() == [1214, 3494]
    assert np.bincount(real.test_labels).tolist() == [234, 390]


def test_medmnist_names_the_file_and_its_md5_as_we_do():
    from medmnist import INFO

    assert INFO["pneumoniamnist"]["MD5"] == data.MD5
    assert INFO["pneumoniamnist"]["label"] == dict(zip("01", data.LABELS))


def test_the_environment_variable_names_the_folder(real_root, monkeypatch):
    monkeypatch.setenv("MADSIM_DATA", str(real_root))
    assert data.load("auto").name == "PneumoniaMNIST"


def test_a_pickled_object_is_never_loaded(tmp_path, monkeypatch):
    """The file would run code if it were unpickled. It is refused even if its MD5 is right."""

    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    np.savez(tmp_path / data.FILE, train_images=np.array([Bomb()], object))
    with pytest.raises(ValueError, match=rf"MD5 .* PneumoniaMNIST has {data.MD5}.*delete the file"):
        data.load("auto", tmp_path)
    monkeypatch.setattr(data, "MD5", data.hashlib.md5((tmp_path / data.FILE).read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.load("auto", tmp_path)


@pytest.mark.parametrize("dataset", ["auto", "pneumoniamnist"])
def test_a_damaged_file_is_refused_by_auto_too(dataset, tmp_path):
    (tmp_path / data.FILE).write_text("this is no npz")
    with pytest.raises(ValueError, match=r"has MD5 .* delete the file to download it again"):
        data.load(dataset, tmp_path)


def fetcher(monkeypatch, program: str, seconds: float = 30) -> None:
    """Make download() run this program instead of medmnist. The program gets the folder as its argument."""
    run = data.subprocess.run
    monkeypatch.setattr(data, "DOWNLOAD_SECONDS", seconds)
    monkeypatch.setattr(
        data.subprocess, "run", lambda command, **options: run([*command[:2], program, *command[3:]], **options)
    )


@pytest.mark.slow
def test_a_download_that_hangs_is_given_up(tmp_path, monkeypatch):
    fetcher(monkeypatch, "import time; time.sleep(60)", seconds=0.5)
    start = time.perf_counter()
    fallen_back = data.load("auto", tmp_path)
    assert time.perf_counter() - start < 20
    assert fallen_back.name == "phantom"
    assert "no answer within 0.5 s" in fallen_back.note
    assert list(tmp_path.iterdir()) == []


def test_the_named_data_set_never_falls_back(tmp_path, monkeypatch):
    fetcher(monkeypatch, "raise OSError('the network is down')")
    with pytest.raises(FileNotFoundError, match=r"absent .*the network is down.*--data-root or MADSIM_DATA"):
        data.load("pneumoniamnist", tmp_path)


def test_a_download_is_put_in_place_and_read(real_root, tmp_path, monkeypatch):
    source = str(real_root / data.FILE)
    fetcher(monkeypatch, f"import shutil, sys; shutil.copy({source!r}, sys.argv[1])")
    assert data.load("auto", tmp_path / "new" / "folder").md5 == data.MD5
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [data.FILE]


@pytest.mark.parametrize(
    ("program", "reason"),
    [("raise OSError('the network is down')", "the network is down"), ("import os; os._exit(1)", "medmnist failed")],
)
def test_a_failed_download_is_not_tried_again(program, reason, tmp_path, monkeypatch, small):
    fetcher(monkeypatch, program)
    fetch, calls = data.subprocess.run, []
    monkeypatch.setattr(data.subprocess, "run", lambda *words, **options: calls.append(1) or fetch(*words, **options))
    monkeypatch.setattr(data, "phantom", lambda seed=0, note="": replace(small, note=note))
    monkeypatch.chdir(tmp_path)
    notes = [data.load("auto", root).note for root in (tmp_path, tmp_path, ".", str(tmp_path))]
    assert len(calls) == 1 and reason in notes[0] and notes == [notes[0]] * 4
    with pytest.raises(FileNotFoundError, match=reason):
        data.load("pneumoniamnist", tmp_path)
    assert len(calls) == 1
    data.load("auto", tmp_path / "other")  # another folder is tried
    assert len(calls) == 2
    (tmp_path / data.FILE).write_text("put here by hand")  # the file itself is looked for each time
    with pytest.raises(ValueError, match="has MD5"):
        data.load("auto", tmp_path)


@pytest.mark.parametrize("root", [None, "", "~/data", "~nobody-has-this-name/data"])
def test_a_home_that_is_unknown_gives_the_phantom_and_says_why(root, monkeypatch, small):
    """A container can run as a user that the system does not know. HOME is then often not set."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("MADSIM_DATA", "")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(data, "phantom", lambda seed=0, note="": replace(small, note=note))
    note = data.load("auto", root).note
    assert "can't be found: the home folder is unknown; download pneumoniamnist.npz" in note
    with pytest.raises(FileNotFoundError, match="give this folder with --data-root or MADSIM_DATA"):
        data.load("pneumoniamnist", root)


def test_a_tilde_is_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / data.FILE).write_text("no data")
    (tmp_path / ".medmnist").mkdir()
    (tmp_path / ".medmnist" / data.FILE).write_text("none either")
    for variable, root, expected in (("", "~/mine", "mine"), ("~/mine", None, "mine"), ("", None, ".medmnist")):
        monkeypatch.setenv("MADSIM_DATA", variable)
        with pytest.raises(ValueError, match=f"^{tmp_path / expected / data.FILE} has MD5"):
            data.load("auto", root)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'mnist' is unknown; known: auto, pneumoniamnist, phantom"):
        data.load("mnist")


# ---------------------------------------------------------------- PNG files


def test_png_files_are_lossless_and_sorted_as_the_clients_see_them(small, tmp_path):
    shares, labels = data.share_out(small.train_labels, clients=10, malicious=0.2, seed=0)
    assert data.write_png(small, shares, labels, tmp_path) == 400
    seen = 0
    for client, share in enumerate(shares):
        for label, name in enumerate(data.LABELS):
            for path in (tmp_path / f"client-{client:02d}" / name).iterdir():
                number = int(path.stem)
                assert (np.asarray(Image.open(path)) == small.train_images[number]).all()
                assert number in np.concatenate([share.train, share.validation])
                assert label == (small.train_labels[number] ^ share.malicious)
                seen += 1
    assert seen == 400
