"""Makes the site's gallery: reports of the command line and docs/gallery/README.md, which shows them.

Each entry is one command, run in a folder of its own; the page, its picture and what the terminal says are kept. Fails
where a command ends with another exit status than the page says.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from sklearn.datasets import load_digits

DOCS = Path(__file__).resolve().parents[1] / "docs"
HELLO = "hello_world/hello_world_float.tflite hello_world/hello_world_int8.tflite"
DEMO = "demo/original.onnx demo/compressed.onnx"


@dataclass(frozen=True)
class Entry:
    """One report: file name, title, what it shows, command, exit status, how many of the last lines said are kept."""

    name: str
    title: str
    text: str
    command: str
    status: int = 0
    last: int = 1


ENTRIES = (
    Entry(
        "hello_world",
        "A float file and its int8 copy",
        "The whole domain of one input. Both ends meet: every input code was looked at.",
        f'compare {HELLO} --box "0,6.283185307" --output hello_world_report',
    ),
    Entry(
        "tolerance",
        "A tolerance that is exceeded",
        "The same two files with a tolerance of 0.1. The page names the input that exceeds it, and what both networks "
        "give there.",
        f'compare {HELLO} --box "0,6.283185307" --tolerance 0.1 --output tolerance_report',
        status=1,
    ),
    Entry(
        "demo",
        "Compressed, then repaired",
        "scikit-learn's digits, 70 % of the weights pruned and the rest on 8 bits, around two test pictures: before "
        "and after.",
        "demo --images 2 --output demo",
        last=4,
    ),
    Entry(
        "bounded",
        "An interval that stays open",
        "The demo's networks with all 64 pixels moving by 0.15, for five seconds: certified and attained differ, the "
        "status is BOUNDED, and the page says that a larger budget narrows it.",
        f"compare {DEMO} --center pictures.npy --eps 0.15 --clip 0,1 --seconds 5 --output bounded_report",
    ),
    Entry(
        "audit",
        "A test set's labels",
        "The demo's networks on 360 pictures, some of which it was trained on: on how many both certainly give one "
        "label. An audit writes `report.json` and no page; this is what the terminal says.",
        f"audit {DEMO} --data test.npy --labels labels.npy",
        status=1,
        last=40,
    ),
    Entry(
        "attribute",
        "Which layer is to blame",
        "The same pair, layer by layer, over boxes around two pictures.",
        f"attribute {DEMO} --center pictures.npy --eps 0.02 --clip 0,1 --seconds 10",
        last=40,
    ),
)

HEAD = """# Gallery of reports

Made by the command line, as it writes them: `uv run python benchmarks/gallery.py`, which also wrote this page. Each
report is one file without external resources, to be mailed or kept beside a build.
"""


def prepare(folder: Path) -> None:
    """The files that the commands name: two networks of docs/, and pictures of scikit-learn's digits."""
    shutil.copytree(DOCS / "hello_world", folder / "hello_world")
    pictures, labels = load_digits(return_X_y=True)
    np.save(folder / "test.npy", (pictures[-360:] / 16).astype(np.float32))
    np.save(folder / "labels.npy", labels[-360:])
    np.save(folder / "pictures.npy", (pictures[-2:] / 16).astype(np.float32))


def made(entry: Entry, folder: Path, output: Path) -> str:
    """Runs one command and keeps its files in `output`; the part of the page that shows them."""
    ran = subprocess.run(
        [sys.executable, "-m", "torchreach", *shlex.split(entry.command)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "96", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    if ran.returncode != entry.status:
        raise SystemExit(f"{entry.command}: exit status {ran.returncode}, not {entry.status}\n{ran.stdout}{ran.stderr}")
    said = "\n".join(line.rstrip() for line in ran.stdout.rstrip().splitlines()[-entry.last :]).strip("\n")
    parts = [f"## {entry.title}\n\n{entry.text}\n\n```text\n$ torchreach {entry.command}\n{said}\n```\n"]
    _, _, report = entry.command.partition("--output ")
    if report:
        shutil.copy(folder / report / "report.html", output / f"{entry.name}.html")
        shutil.copy(folder / report / "ranges.png", output / f"{entry.name}.png")
        link = f"**[The report]({entry.name}.html)**"
        parts.append(f"![Picture of the report: {entry.title}]({entry.name}.png)\n\n{link}\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS / "gallery", help="folder (default: docs/gallery)")
    parser.add_argument("--only", action="append", help="only the entry of this name; may be repeated")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        chosen = [entry for entry in ENTRIES if not args.only or entry.name in args.only]
        parts = [made(entry, folder, args.output) for entry in chosen]
    (args.output / "README.md").write_text("\n".join([HEAD, *parts]))
    print(f"{len(parts)} entries: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
