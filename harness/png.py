"""The command line of data.py: it writes the images of a run's clients as PNG files."""

import argparse
import sys

import data
from harness.cli import add_options
from harness.console import Parser, a_path, say, whole
from madsim import Config, gather

OPTIONS = ("dataset", "data_root", "clients", "malicious", "attack", "flip", "partition", "concentration", "seed")


def main(argv: list[str] | None = None) -> int:
    """Write what the command line asks for. Returns 0, or 130 after an interruption; invalid input exits with 2."""
    parser = Parser(
        prog="data.py",
        description="Write the training images of a run's clients as PNG files, sorted by the labels that they see.",
        epilog="The options are those of a run. `python madsim.py --list` lists the names that they take.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--png", metavar="DIR", type=a_path, required=True, help="a new folder for the images")
    add_options(parser, Config, OPTIONS)
    given = vars(parser.parse_args(argv))
    folder, begun = given.pop("png"), False
    try:
        config = Config(**given, device="cpu")
        dataset = data.load(config.dataset, config.data_root)
        clients = gather(config, dataset)
        folder.mkdir(parents=True)
        begun = True
        count = data.write_png(dataset, clients.shares, clients.attacked_labels.numpy(), folder)
    except FileExistsError:
        parser.error(f"{folder} exists; give the name of a new folder")
    except (ValueError, OSError, ImportError) as error:
        parser.error(f"{error}" + f"; {folder} is incomplete" * begun)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # ends the line of the terminal's ^C
        say("data.py: stopped" + f"; {folder} is incomplete" * begun, sys.stderr)
        return 130
    if dataset.note:
        say(f"phantom images: {dataset.note}", sys.stderr)
    changed = (clients.attacked_labels != clients.labels).any()
    true = "" if changed else f"; the labels are true, because attack {config.attack} changes none"
    say(f"{count} {dataset.name} images of {config.clients} clients in {whole(folder)}{true}")
    return 0
