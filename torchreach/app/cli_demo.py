"""`torchreach demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchreach.app.cli_options import (
    ANSWER,
    Alpha,
    By,
    DemoTarget,
    Device,
    Iterations,
    Memory,
    Method,
    Rate,
    Seconds,
    Stars,
    TargetMax,
)

_DATA, _COMPRESSION = "Data and training", "Compression"


def demo(
    ctx: typer.Context,
    data: Annotated[
        str, typer.Option(help="digits (inside scikit-learn, no download) or mnist.", rich_help_panel=_DATA)
    ] = "digits",
    root: Annotated[
        Path | None,
        typer.Option(
            help="With --data mnist: folder that holds MNIST or to download it to.",
            metavar="DIR",
            rich_help_panel=_DATA,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of training the original.", rich_help_panel=_DATA)] = 30,
    seed: Annotated[int, typer.Option(help="Seed of everything; one seed, one result.", rich_help_panel=_DATA)] = 0,
    bits: Annotated[
        int,
        typer.Option(help="Bits of a weight after compression; 0 keeps floats.", rich_help_panel=_COMPRESSION),
    ] = 8,
    prune: Annotated[
        float,
        typer.Option(help="Share of the weights of each layer set to zero, 0 to 1.", rich_help_panel=_COMPRESSION),
    ] = 0.7,
    images: Annotated[
        int, typer.Option(help="Test pictures, one of each digit in turn.", rich_help_panel="Input set")
    ] = 10,
    pixels: Annotated[
        int, typer.Option(help="Central pixels that vary in each picture.", rich_help_panel="Input set")
    ] = 4,
    eps: Annotated[
        float,
        typer.Option(help="How far each of them may move; pixels lie in [0, 1].", rich_help_panel="Input set"),
    ] = 0.1,
    target: DemoTarget = None,
    target_max: TargetMax = None,
    by: By = "auto",
    alpha: Alpha = 1.0,
    iterations: Iterations = 20,
    rate: Rate = 1e-3,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for report.json, report.html, the pictures and the three networks (.onnx), made if missing.",
            metavar="DIR",
            rich_help_panel=ANSWER,
        ),
    ] = Path("torchreach-demo"),
    seconds: Seconds = None,
    stars: Stars = None,
    memory: Memory = None,
    device: Device = "cpu",
    method: Method = "auto",
) -> None:
    """See it work: train a digit classifier, compress it until it errs, certify what changed, repair it.

    Prints accuracy, certified distance, and on how many sets both certainly give one label, before and after.
    Takes well under two minutes on two cores, needs no files and no network.
    """
    from torchreach.app.arguments import DemoSetup, RepairSetup, Setup, check_repair

    target = 0.1 if target is None and target_max is None else target
    options = RepairSetup(target, target_max, alpha, iterations, 50, rate, seed, by)
    digits = DemoSetup(data, root, images, pixels, eps, epochs, bits, prune)
    setup = Setup.make(device, "float64", method, seconds, stars, memory, output, ctx.obj)
    check_repair(method)
    from torchreach.app import repairing
    from torchreach.app.demo import one_thread

    with one_thread():
        status = repairing.demo(setup, options, digits)
    raise typer.Exit(status)
