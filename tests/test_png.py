"""Tests of harness/png.py: the command line of data.py."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import HERE
from PIL import Image

import data
from harness.png import main
from lab.attacks import ATTACKS, flip_one_way
from lab.partitions import dirichlet
from madsim import Config, gather


def files(folder) -> dict[int, tuple[int, int, np.ndarray]]:
    """Client, label and pixels of each image, by its number."""
    return {
        int(path.stem): (int(path.parts[-3][-2:]), data.LABELS.index(path.parts[-2]), np.asarray(Image.open(path)))
        for path in folder.glob("*/*/*.png")
    }


def expected(dataset, shares, labels) -> dict[int, tuple[int, int]]:
    """Client and label of each image, by its number."""
    owned = [(client, [*share.train, *share.validation]) for client, share in enumerate(shares)]
    return {int(number): (client, int(labels[number])) for client, numbers in owned for number in numbers}


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("data.py: ") and line.count("\n") == 1
    return line


def test_the_files_are_what_the_clients_of_a_run_train_on(quick, small, tmp_path, capsys):
    words = "--dataset phantom --clients 5 --malicious 0.4 --seed 3 --attack one_way_flip --flip 0.5"
    words += " --partition dirichlet --concentration 0.4"
    assert main([*words.split(), "--png", str(tmp_path / "a" / "images")]) == 0
    assert capsys.readouterr().out == f"400 phantom images of 5 clients in {tmp_path / 'a' / 'images'}\n"
    shares, labels = data.share_out(
        small.train_labels, 5, 0.4, 3, poison=flip_one_way, flip=0.5, partition=dirichlet, concentration=0.4
    )
    found = files(tmp_path / "a" / "images")
    assert {number: image[:2] for number, image in found.items()} == expected(small, shares, labels)
    assert all((image[2] == small.train_images[number]).all() for number, image in found.items())
    assert 0 < (labels != small.train_labels).sum() < (small.train_labels == 1).sum()


def poisons(name: str) -> bool:
    return ATTACKS[name].poison is not None


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_writes_the_labels_of_its_run(attack, quick, small, tmp_path, capsys):
    assert main(["--dataset", "phantom", "--attack", attack, "--png", str(tmp_path / "images")]) == 0
    clients = gather(Config(attack=attack), small)
    found = {number: image[:2] for number, image in files(tmp_path / "images").items()}
    assert found == expected(small, clients.shares, clients.attacked_labels.numpy())
    changed = sum(label != small.train_labels[number] for number, (_, label) in found.items())
    assert (changed > 0) == poisons(attack)
    end = f"; the labels are true, because attack {attack} changes none\n"
    assert capsys.readouterr().out.endswith(end) == (not poisons(attack))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--attack flip", "attack 'flip' is unknown; known: label_flip, one_way_flip, scaled, nan"),
        ("--partition odd", "partition 'odd' is unknown; known: iid, dirichlet, quantity"),
        ("--concentration 1", "concentration 1.0 changes nothing with partition iid"),
        ("--attack noise --flip 0.5", "flip 0.5 changes nothing, because attack noise flips no labels"),
        ("--malicious 0.6", "malicious fraction 0.6 makes 6 of 10 clients malicious"),
        ("--clients 300", "300 clients can't share 400 images"),
        ("--rounds 5", "unrecognized arguments: --rounds 5\n"),
        ("--partitions iid", "did you mean --partition?"),
        ("--alpha 0.5", "--alpha is now --concentration\n"),
        ("--alpha=0.5 --seed 1", "--alpha is now --concentration\n"),
        ("--alpha-reputation 0.5", "unrecognized arguments: --alpha-reputation 0.5"),
        ("--seed -1", "seed -1 must be at least 0"),
    ],
)
def test_bad_input_gets_one_line_and_no_folder(words, line, quick, tmp_path, capsys):
    assert line in refused(capsys, "--dataset", "phantom", "--png", tmp_path / "images", *words.split())
    assert not (tmp_path / "images").exists()


def test_a_folder_that_exists_is_refused(quick, tmp_path, capsys):
    line = refused(capsys, "--png", tmp_path, "--dataset", "phantom")
    assert line == f"data.py: {tmp_path} exists; give the name of a new folder\n"
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "--png", tmp_path / "file" / "images", "--dataset", "phantom")


def test_a_folder_that_is_not_finished_is_said_to_be_that(quick, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "write_png", stop)
    assert main(["--png", str(tmp_path / "a"), "--dataset", "phantom"]) == 130
    assert capsys.readouterr().err == f"\ndata.py: stopped; {tmp_path / 'a'} is incomplete\n"
    monkeypatch.setattr(data, "write_png", full)
    line = refused(capsys, "--png", tmp_path / "b", "--dataset", "phantom")
    assert line == f"data.py: [Errno 28] No space left on device; {tmp_path / 'b'} is incomplete\n"
    monkeypatch.setattr(data, "load", stop)
    assert main(["--png", str(tmp_path / "c")]) == 130
    assert capsys.readouterr().err == "\ndata.py: stopped\n"


def test_the_phantom_is_said_to_be_that(quick, tmp_path, capsys, monkeypatch):
    def unreachable(root):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(data, "download", unreachable)
    assert main(["--png", str(tmp_path / "images"), "--data-root", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "phantom images: no network\n" and "400 phantom images" in captured.out


def test_the_script_hands_over_to_the_command_line():
    done = subprocess.run([sys.executable, HERE / "data.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    said = " ".join(done.stdout.split())
    for words in ("usage: data.py", "--png DIR", "--attack NAME", "--concentration X", "default: label_flip, paper"):
        assert words in said
    assert "--rounds" not in said
