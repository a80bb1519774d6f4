"""PneumoniaMNIST or the phantom, the IID split among the clients, label flipping, PNG files.

`python data.py --png DIR` writes the clients' images as PNG files, sorted by the labels that the clients see.

Shapes: n images, C clients.
"""

if __name__ == "__main__":
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).parent / "harness" / "needs.py"))["check"](__name__)

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # [n, 28, 28], 0 black to 255 white
Labels = NDArray[np.int64]  # [n], 0 normal, 1 pneumonia
Numbers = NDArray[np.int64]  # [n], image numbers

LABELS = ("normal", "pneumonia")
DATASETS: tuple[str, ...] = ("auto", "pneumoniamnist", "phantom")
FILE = "pneumoniamnist.npz"
MD5 = "28209eda62fecd6e6a2d98b1501bb15f"  # of FILE, as medmnist publishes it
USUAL = "~/.medmnist"  # where medmnist puts FILE
DOWNLOAD_SECONDS = 60  # ours, for 4 MB: medmnist sets no time limit and can hang
BY_HAND = (
    f"download {FILE} of MedMNIST v2 by hand, put it into a folder and give this folder with --data-root or MADSIM_DATA"
)
failures: dict[Path, str] = {}  # folders into which a download failed, and why; a process tries each once
DOWNLOADER = Lock()  # one thread tries, and others wait for its result
VALIDATION = 0.1  # testbed: a client keeps 10 % of its images for validation


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [n, 28, 28] and labels int64 [n] (0 normal, 1 pneumonia) of the training and the test split.

    Whole numbers in another form, such as lists, pandas Series or labels [n, 1], are converted to these arrays. `name`
    names the data set. `md5` is the MD5 of its file, or of the phantom's arrays. `note` says why the phantom replaces
    PneumoniaMNIST; it is empty otherwise. Raises ValueError for another shape or type, for images outside 0 to 255, and
    for labels other than 0 and 1. Warns if all training images have the same label.
    """

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    name: str
    md5: str
    note: str = ""

    def __post_init__(self):
        for split in ("train", "test"):
            images, labels = (as_array(getattr(self, name), name) for name in (f"{split}_images", f"{split}_labels"))
            if labels.shape == (len(images), 1):
                labels = labels[:, 0]
            for name, array, kind, kinds, shape, most in (
                (f"{split}_images", images, np.uint8, "iu", (len(labels), 28, 28), 255),
                (f"{split}_labels", labels, np.int64, "iub", (len(images),), 1),
            ):
                if array.dtype.kind not in kinds or array.shape != shape or not len(array):
                    found = f"{array.dtype} {list(array.shape)}"
                    raise ValueError(f"{name} are {found}; they must be {kind.__name__} {list(shape)}, not empty")
                if array.min() < 0 or array.max() > most:
                    allowed = f"0 {'or' if most == 1 else 'to'} {most}"
                    raise ValueError(f"{name} lie in {array.min()} to {array.max()}; they must be {allowed}")
                object.__setattr__(self, name, np.ascontiguousarray(array, kind))
        if len(np.unique(self.train_labels)) == 1:
            only = LABELS[self.train_labels[0]]
            warnings.warn(f"all training images are {only}; a model learns to answer nothing else", stacklevel=3)


def as_array(values: Any, name: str) -> np.ndarray:
    """The values as an array with at least one dimension. Raises ValueError if this is impossible."""
    if np.ma.is_masked(values):
        raise ValueError(f"{name} have masked values")
    try:
        return np.atleast_1d(np.asarray(values))
    except ValueError:
        raise ValueError(f"{name} are no array: their rows differ in length") from None
    except RuntimeError as error:  # a tensor with gradients, or on a GPU
        raise ValueError(f"{name} are no array: {error}") from None


# ---------------------------------------------------------------- the two data sets


def load(dataset: str = "auto", root: str | Path | None = None) -> Dataset:
    """Load PneumoniaMNIST from `root`, or the phantom. `auto` takes the phantom if PneumoniaMNIST is not available.

    `root` is the folder of pneumoniamnist.npz. If the file is absent, it is downloaded into the folder. A download that
    failed is not tried again in the same process. The default is the environment variable MADSIM_DATA, or else
    medmnist's own folder. Raises ValueError for an unknown name or a damaged file, and FileNotFoundError if `dataset`
    is pneumoniamnist and the file is absent and can't be downloaded.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset {dataset!r} is unknown; known: {', '.join(DATASETS)}")
    if dataset == "phantom":
        return phantom()
    try:
        return pneumoniamnist(home_expanded(root or os.environ.get("MADSIM_DATA") or USUAL))
    except FileNotFoundError as error:
        if dataset == "pneumoniamnist":
            raise
        return phantom(note=str(error))


def home_expanded(root: str | Path) -> Path:
    """The path with the user's folder for `~`. Raises FileNotFoundError if the system does not know this folder."""
    try:
        return Path(root).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{Path(root) / FILE} can't be found: the home folder is unknown; {BY_HAND}") from None


def pneumoniamnist(root: Path) -> Dataset:
    """The real data set (Yang et al. 2023, CC BY 4.0) from root/pneumoniamnist.npz, downloaded if absent."""
    if root.is_file():
        raise ValueError(f"{root} is a file; give the folder that holds {FILE}")
    path = root / FILE
    with DOWNLOADER:
        if not path.is_file():
            download(root)
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    if md5 != MD5:
        raise ValueError(f"{path} has MD5 {md5}, PneumoniaMNIST has {MD5}; delete the file to download it again")
    with np.load(path, allow_pickle=False) as arrays:
        train, test = (
            (arrays[f"{split}_images"], arrays[f"{split}_labels"][:, 0].astype(np.int64)) for split in ("train", "test")
        )
    return Dataset(*train, *test, name="PneumoniaMNIST", md5=md5)


def download(root: Path) -> None:
    """Download pneumoniamnist.npz into `root` with medmnist, in a separate process that can be stopped.

    Raises FileNotFoundError if that fails, or has failed before. The message says what was tried and how to put the
    file in place.
    """
    if root.absolute() in failures:
        raise FileNotFoundError(failures[root.absolute()])
    fetch = "import medmnist, sys; medmnist.PneumoniaMNIST('train', download=True, root=sys.argv[1])"
    print(f"{FILE} is absent: downloading it (4 MB, at most {DOWNLOAD_SECONDS} s) ...", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as unfinished:
            command = [sys.executable, "-c", fetch, unfinished]
            subprocess.run(command, timeout=DOWNLOAD_SECONDS, check=True, capture_output=True, text=True)
            root.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(unfinished) / FILE, root / FILE)
        return
    except subprocess.TimeoutExpired:
        reason = f"no answer within {DOWNLOAD_SECONDS} s"
    except subprocess.CalledProcessError as error:
        causes = [line for line in error.stderr.splitlines() if line.split(":")[0].endswith("Error")]
        reason = causes[0] if causes else "medmnist failed"
    except OSError as error:
        reason = str(error)
    message = f"{root / FILE} is absent and medmnist could not download it ({reason}); {BY_HAND}"
    failures[root.absolute()] = message
    raise FileNotFoundError(message)


# ---------------------------------------------------------------- the phantom

# PneumoniaMNIST's own numbers of normal and pneumonia images.
PHANTOM_COUNTS = {"train": (1214, 3494), "test": (234, 390)}


def phantom(seed: int = 0, note: str = "") -> Dataset:
    """Drawn chest X-rays, as many as PneumoniaMNIST has, for a machine without it. A seed gives the same images."""
    rng = np.random.default_rng([seed, 3])
    arrays: list[Any] = []
    for counts in PHANTOM_COUNTS.values():
        labels = rng.permutation(np.repeat([0, 1], counts))
        arrays += [draw_chests(labels, rng), labels]
    md5 = hashlib.md5(b"".join(array.tobytes() for array in arrays), usedforsecurity=False).hexdigest()
    train_images, train_labels, test_images, test_labels = arrays
    return Dataset(train_images, train_labels, test_images, test_labels, name="phantom", md5=md5, note=note)


def draw_chests(labels: Labels, rng: np.random.Generator) -> Images:
    """One image per label: a body, a spine, and two darker lungs with ribs, vessels and the shadow of the heart.

    An image of pneumonia also has one to four diffuse opacities in the lungs, from faint to dense. All lengths are in
    half widths of the image, from -1 to 1, and vary from image to image. The ranges are chosen so that the network
    reaches a test accuracy of 0.90 to 0.98 and logistic regression one of about 0.82.
    """

    def vary(low: float, high: float):
        return rng.uniform(low, high, (len(labels), 1, 1)).astype(np.float32)

    def either_side():
        return np.where(vary(0, 1) < 0.5, -1, 1)

    def blob(x0, y0, width, height):
        return np.exp(-(((x - x0) / width) ** 2) - ((y - y0) / height) ** 2)

    def inside(distance, sharpness):
        return 0.5 + 0.5 * np.tanh(sharpness * distance)

    axis = np.linspace(-1, 1, 28, dtype=np.float32)
    u, v = axis - vary(-0.12, 0.12), axis[:, None] - vary(-0.12, 0.12)  # the patient's position,
    tilt, size = vary(-0.1, 0.1), vary(0.9, 1.15)  # posture and size
    x, y = (u + tilt * v) / size, (v - tilt * u) / size  # [n, 28, 28]

    body = inside(1.05 + 0.9 * np.minimum(y + vary(0.5, 0.9), 0) - np.abs(x), 5)  # narrower above the shoulders
    spine = blob(0, 0, 0.18, 3)
    apart, width, height = vary(0.44, 0.54), vary(0.27, 0.38), vary(0.65, 0.9)
    sides = [np.abs(x - side * (apart + 0.15 * y)) / width for side in (-1, 1)]  # lungs are wider at the bottom
    lungs = sum(inside(1 - side**2.5 - (np.abs(y + 0.1) / height) ** 3, 2) for side in sides)
    ribs = lungs * np.cos(vary(12, 16) * (y + vary(0.2, 0.5) * np.abs(x)) + vary(0, 6.3))
    heart = blob(vary(0.1, 0.2), vary(0.2, 0.35), vary(0.28, 0.42), vary(0.3, 0.42))
    vessels = sum(  # beside the heart; they look like an opacity
        vary(0, 0.35) * blob(side * vary(0.25, 0.5), vary(-0.25, 0.35), vary(0.08, 0.2), vary(0.12, 0.3))
        for side in (-1, 1)
    )
    opacity = vary(0.26, 0.75) * blob(either_side() * vary(0.3, 0.6), vary(-0.5, 0.45), vary(0.18, 0.5), vary(0.2, 0.6))
    for _ in range(3):
        density = (vary(0, 1) < 0.6) * vary(0.1, 0.5)
        opacity += density * blob(either_side() * vary(0.3, 0.65), vary(-0.6, 0.5), vary(0.15, 0.45), vary(0.15, 0.5))
    opacity *= labels[:, None, None]

    air = lungs * (1 - np.clip(0.9 * heart + vessels + opacity, 0, 1))
    image = 0.15 + body * (0.5 + 0.12 * spine - vary(0.3, 0.48) * air + vary(0.02, 0.06) * ribs)
    image = image * vary(0.75, 1.15) + vary(-0.05, 0.12) + rng.normal(0, 0.02, image.shape)  # exposure and noise
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


# ---------------------------------------------------------------- the split and the attack


@dataclass(frozen=True)
class Share:
    """One client's part of the training split, and whether the client is malicious."""

    train: Numbers  # the images that it trains on
    validation: Numbers  # the images that it validates on
    malicious: bool


def partition_iid(n: int, clients: int, rng: np.random.Generator) -> list[Numbers]:
    """Deal the image numbers 0 .. n-1 at random, in disjoint parts. Their sizes differ by at most 1.

    Raises ValueError if there are fewer than two images per client.
    """
    if not 1 <= clients <= n // 2:
        raise ValueError(
            f"{clients} clients can't share {n} images: each needs one to train and one to validate on; "
            f"use 1 to {n // 2} clients"
        )
    return np.array_split(rng.permutation(n), clients)


def flip_labels(labels: Labels, fraction: float, rng: np.random.Generator) -> Labels:
    """A copy of the labels in which a random `fraction` is flipped, both ways (the paper, section III C).

    Raises ValueError for a fraction outside 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"share of flipped labels {fraction} must be at least 0 and at most 1")
    flipped = labels.copy()
    chosen = rng.choice(len(labels), round(fraction * len(labels)), replace=False)
    flipped[chosen] = 1 - flipped[chosen]
    return flipped


def malicious_count(clients: int, fraction: float) -> int:
    """The number of malicious clients. Raises ValueError if they are not a minority."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"malicious fraction {fraction} must be at least 0 and below 0.5")
    count = round(fraction * clients)
    if fraction >= 0.5 or count * 2 >= clients:
        raise ValueError(
            f"malicious fraction {fraction} makes {count} of {clients} clients malicious; it must stay below half"
        )
    return count


def share_out(
    labels: Labels,
    clients: int,
    malicious: float,
    seed: int,
    *,
    poison: Callable[[Labels, float, np.random.Generator], Labels] | None = flip_labels,
    flip: float = 1.0,
    partition: Callable[[Labels, int, float, np.random.Generator], list[Numbers]] | None = None,
    concentration: float = 0.5,
) -> tuple[list[Share], Labels]:
    """Deal the training images to the clients and let the malicious clients attack their labels.

    `malicious` is the fraction of malicious clients. `poison(labels, flip, rng)` gives the labels that each of
    them sees on its whole share, also for validation (None: the true ones). `partition(labels, clients, concentration,
    rng)` deals the images (None: `partition_iid`). Returns one Share per client, and the labels [n] as the clients see
    them. The split depends on the seed, not on the attack. Raises ValueError if the malicious clients are not a
    minority, or if `partition` or `poison` breaks its promise.
    """
    rng = np.random.default_rng([seed, 0])
    if partition is None:
        parts = partition_iid(len(labels), clients, rng)
    else:
        parts = checked(partition(labels.copy(), clients, concentration, rng), len(labels), clients)
    bad = set(rng.permutation(clients)[: malicious_count(clients, malicious)].tolist())
    seen = labels.copy()
    shares = []
    for client, part in enumerate(parts):
        held_out = max(1, int(VALIDATION * len(part)))
        shares.append(Share(part[held_out:], part[:held_out], client in bad))
        if client in bad and poison:
            attacked = np.asarray(poison(labels[part], flip, rng))
            if attacked.shape != part.shape or not np.isin(attacked, (0, 1)).all():
                raise ValueError(f"the attack's poison must return {len(part)} labels, each 0 or 1")
            seen[part] = attacked
    return shares, seen


def checked(parts: Any, n: int, clients: int) -> list[Numbers]:
    """The parts of a partition. Raises ValueError unless they deal n images to the clients, each image once."""
    try:
        dealt = [np.asarray(part) for part in parts]
        numbers = np.sort(np.concatenate(dealt))
        right = len(dealt) == clients and numbers.dtype.kind in "iu" and np.array_equal(numbers, np.arange(n))
    except (TypeError, ValueError):
        right = False
    if not right or min(map(len, dealt)) < 2:
        raise ValueError(
            f"the partition must return {clients} arrays of image numbers, at least two each; "
            f"together they must hold 0 to {n - 1} once each"
        )
    return dealt


# ---------------------------------------------------------------- the paper's conversion to PNG files


def write_png(dataset: Dataset, shares: list[Share], labels: Labels, folder: Path) -> int:
    """Write each training image to a lossless file like folder/client-03/pneumonia/00042.png. Returns their number.

    The folder `pneumonia` or `normal` is the label that the client sees. The file's name is the image's number.
    """
    from PIL import Image

    for client, share in enumerate(shares):
        for name in LABELS:
            (folder / f"client-{client:02d}" / name).mkdir(parents=True, exist_ok=True)
        for number in np.concatenate([share.train, share.validation]):
            path = folder / f"client-{client:02d}" / LABELS[labels[number]] / f"{number:05d}.png"
            Image.fromarray(dataset.train_images[number]).save(path)
    return sum(len(share.train) + len(share.validation) for share in shares)


if __name__ == "__main__":
    from harness.console import as_command
    from harness.png import main  # it imports this file as `data`

    sys.exit(as_command(main))
