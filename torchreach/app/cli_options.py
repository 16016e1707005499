"""Options that several commands have, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SET, ANSWER, ENGINE, REPAIR = "Input set (exactly one)", "Answer", "How to compute", "Repair"
TEST_SET = "Test set"

Original = Annotated[Path, typer.Argument(metavar="A", help="The original network: an .onnx, .tflite or .pt2 file.")]
Compressed = Annotated[
    Path,
    typer.Argument(
        metavar="B",
        help="The compressed network: an .onnx, .tflite or .pt2 file, or a .pth state dict of an eager-mode int8 "
        "network; A must then be a .pt2 file with layers of the same names.",
    ),
]
Box = Annotated[
    str | None,
    typer.Option(
        help="One box: 'lower,upper' per input, separated by ';', for example '0,1; -0.5,0.5'. Or a .json, .npy or "
        ".csv file with the same numbers as an array of shape (inputs, 2).",
        metavar="PAIRS|FILE",
        rich_help_panel=SET,
    ),
]
Vnnlib = Annotated[
    Path | None,
    typer.Option(
        help="The input boxes of a VNN-LIB file; its output constraints are not read.",
        metavar="FILE",
        rich_help_panel=SET,
    ),
]
Center = Annotated[
    Path | None,
    typer.Option(
        help="Inputs to look around: a .npy, .json or .csv array of one input, or of several along its first axis. "
        "Needs --eps.",
        metavar="FILE",
        rich_help_panel=SET,
    ),
]
Eps = Annotated[
    float | None,
    typer.Option(help="With --center: how far each value may move, in units of the input.", rich_help_panel=SET),
]
Mask = Annotated[
    Path | None,
    typer.Option(
        help="With --center: array of 0 and 1, the values that may move. Default: all of them.",
        metavar="FILE",
        rich_help_panel=SET,
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        help="With --center: valid range of an input value, for example 0,1. Default: none.",
        metavar="LO,HI",
        rich_help_panel=SET,
    ),
]
_SHAPE = (
    "Shape of one input without its batch axis, for example 1,28,28, where the networks take pictures and their files "
    "do not say it. The numbers of a set are in the order of the flattened input."
)
Shape = Annotated[str | None, typer.Option(help=_SHAPE, metavar="SIZES", rich_help_panel=SET)]
TestShape = Annotated[str | None, typer.Option(help=_SHAPE, metavar="SIZES", rich_help_panel=TEST_SET)]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="Time limit of one analysis, in seconds. When it ends the answer is still certified, only wider "
        "(BOUNDED). Default: no limit.",
        rich_help_panel=ENGINE,
    ),
]
Stars = Annotated[
    int | None,
    typer.Option(help="The same as a limit on enumerated linear regions. Default: no limit.", rich_help_panel=ENGINE),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="The same as a limit on memory for the enumeration, such as 2GB or 500MB; with little, it first works "
        "in smaller pieces. Default: half of what is free.",
        metavar="SIZE",
        rich_help_panel=ENGINE,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Folder from which the same command goes on if it is killed, made if missing. Default: none.",
        metavar="DIR",
        rich_help_panel=ENGINE,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="Work on a Ray cluster: auto (the one of this machine), local, or its address. Default: here.",
        metavar="auto|ADDRESS",
        rich_help_panel=ENGINE,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=ENGINE)]
Dtype = Annotated[
    str,
    typer.Option(
        help="float64 or float32, of the input set and the results; the geometry is computed in float64 either way.",
        rich_help_panel=ENGINE,
    ),
]
Method = Annotated[
    str,
    typer.Option(
        help="auto; exact (enumerates all linear regions, by vertices where few inputs vary, by linear programs where "
        "many do; vertices and programs name one of the two); or search (branch and bound, for sets of very many "
        "regions; not in repair).",
        rich_help_panel=ENGINE,
    ),
]
Arithmetic = Annotated[
    str | None,
    typer.Option(
        help="real: networks as exact functions of their weights; executed: as their own format (float16, bfloat16, "
        "float32) executes them, rounding included. Default: executed for half precision, real for the others.",
        metavar="real|executed",
        rich_help_panel=ENGINE,
    ),
]
KernelKind = Annotated[
    str,
    typer.Option(
        help="Of int8 networks, whose integer arithmetic is covered: here (this machine's), exact sums, saturating "
        "pairs of products (x86 without VNNI), or any of these.",
        metavar="here|exact|...",
        rich_help_panel=ENGINE,
    ),
]
Data = Annotated[
    Path,
    typer.Option(
        help="Inputs: a .npy, .json or .csv array of several along its first axis.",
        metavar="FILE",
        rich_help_panel=TEST_SET,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="The right label of each input, for accuracies: a .npy, .json or .csv array of whole numbers. Default: "
        "none.",
        metavar="FILE",
        rich_help_panel=TEST_SET,
    ),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        help="Of labels: ask only where A's softmax gives its label at least this probability, between 0 and 1. "
        "Default: everywhere.",
        metavar="P",
        rich_help_panel=ANSWER,
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        help="Folder for report.json, made if missing. Default: write no files.",
        metavar="DIR",
        rich_help_panel=ANSWER,
    ),
]
Junit = Annotated[
    Path | None,
    typer.Option(
        help="File for the verdict on each input set as JUnit XML, which CI systems show among tests. Default: none.",
        metavar="FILE",
        rich_help_panel=ANSWER,
    ),
]
Sarif = Annotated[
    Path | None,
    typer.Option(
        help="File for what did not pass as SARIF 2.1.0, which code scanning shows. Default: none.",
        metavar="FILE",
        rich_help_panel=ANSWER,
    ),
]
LivePage = Annotated[
    Path | None,
    typer.Option(
        help="HTML file that shows the progress and reloads itself while the work goes on. Default: none.",
        metavar="FILE",
        rich_help_panel=ANSWER,
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        help="File for a certificate that `torchreach check` verifies on its own, of networks of Linear layers and "
        "ReLUs. Its proof may take as long again as --seconds, or a minute. Default: none.",
        metavar="FILE",
        rich_help_panel=ANSWER,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder for report.json, report.html and the pictures, made if missing. Default: write no files.",
        metavar="DIR",
        rich_help_panel=ANSWER,
    ),
]
_TARGET = "Certified bound on |y1 - y2| to reach, as a factor of the one before repair. Default: {}."
Target = Annotated[float | None, typer.Option(help=_TARGET.format("0.5"), metavar="FACTOR", rich_help_panel=REPAIR)]
DemoTarget = Annotated[float | None, typer.Option(help=_TARGET.format("0.1"), metavar="FACTOR", rich_help_panel=REPAIR)]
TargetMax = Annotated[
    float | None,
    typer.Option(
        help="Instead of --target: the bound itself, in units of the output.",
        rich_help_panel=REPAIR,
    ),
]
By = Annotated[
    str,
    typer.Option(
        help="retrain; solve (the last layer as a program; of a deployed B its biases and codes); auto: both in turn.",
        rich_help_panel=REPAIR,
    ),
]
Alpha = Annotated[
    float,
    typer.Option(
        help="Each iteration trains the network to move 1/alpha of the way to the original.",
        rich_help_panel=REPAIR,
    ),
]
Iterations = Annotated[int, typer.Option(help="Most retrainings.", rich_help_panel=REPAIR)]
Rate = Annotated[float, typer.Option(help="Learning rate of Adam at first; it adapts.", rich_help_panel=REPAIR)]
