"""Make the pages of this folder from real runs: `python docs/demo/make.py`. It takes about three minutes."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = {  # name of the page -> options of its run; two runs are shown side by side
    "main": "--rounds 1000 --mad-start 500",
    "honest": "--rounds 60 --mad-start 10 --malicious 0",
    "turned": "--rounds 40 --mad-start 10 --attack hug --malicious 0.4 --preset testbed",
    "late": "--rounds 60 --mad-start 10 never --attack-start 20",
}


def run(folder: str, script: str, *words: str) -> None:
    """Run a script of madsim in a folder. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, HERE.parents[1] / script, *words], cwd=folder, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, options in RUNS.items():
            data = ("--dataset", "pneumoniamnist", "--out", name)
            run(folder, "madsim.py", *options.split(), *data)
            run(folder, "plot.py", name, "--play", "--out", f"{name}/pages")
            pages = Path(folder, name, "pages")
            [page] = list(pages.glob("side-by-side.html")) or pages.glob("play-*.html")
            shutil.copy(page, HERE / f"{name}.html")
        run(folder, "plot.py", "main", "--report", "--out", "report")
        shutil.copy(Path(folder, "report", "report.html"), HERE)


if __name__ == "__main__":
    main()
