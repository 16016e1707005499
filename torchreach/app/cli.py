"""Command line: `torchreach demo`, and `compare`, `equivalent`, `audit`, `attribute`, `repair` of two networks A B.

Exit status 0: within tolerance (or the target is met, or none was asked for); 1: not; 2: bad input, with one
line on stderr; 130: Ctrl-C came before an answer. Nothing here imports torch before the work begins, so that help
and errors of typing come at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import torchreach
from torchreach.app.cli_check import check
from torchreach.app.cli_demo import demo
from torchreach.app.cli_group import Group
from torchreach.app.cli_options import (
    ANSWER,
    ENGINE,
    REPAIR,
    TEST_SET,
    Alpha,
    Arithmetic,
    Box,
    By,
    Center,
    Certificate,
    Checkpoint,
    Clip,
    Compressed,
    Confidence,
    Data,
    Device,
    Dtype,
    Eps,
    Folder,
    Iterations,
    Junit,
    KernelKind,
    Labels,
    LivePage,
    Mask,
    Memory,
    Method,
    Original,
    Output,
    Rate,
    Ray,
    Sarif,
    Seconds,
    Shape,
    Stars,
    Target,
    TargetMax,
    TestShape,
    Vnnlib,
)
from torchreach.app.places import Places
from torchreach.core.errors import OptionError

app = typer.Typer(
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"torchreach {torchreach.__version__}")
        raise typer.Exit


@app.callback(
    help="How far can a compressed neural network be from the original, for every input of a region?\n\n"
    "torchreach answers with a certificate, not a sample: an upper bound on |y1 - y2| that no input exceeds, and an "
    "input that comes close to it. Start with [bold]torchreach demo[/bold].",
    epilog="Exit status: 0 yes, 1 no, 2 bad input, 130 interrupted.",
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The program without a command."""


@app.command(
    epilog="Exit status: 0 within tolerance or none given, 1 exceeded, undecided or not covered by the certificate, "
    "2 bad input, 130 interrupted."
)
def compare(
    ctx: typer.Context,
    original: Original,
    compressed: Compressed,
    box: Box = None,
    vnnlib: Vnnlib = None,
    center: Center = None,
    eps: Eps = None,
    mask: Mask = None,
    clip: Clip = None,
    shape: Shape = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest |y1 - y2| allowed for any output, in units of the output; the work ends as soon as that is "
            "decided. Default: none, the interval is reported and the exit status is 0.",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    gap: Annotated[
        float | None,
        typer.Option(
            help="End as soon as the upper bound is within this of what is attained, in units of the output. "
            "Default: as close as numbers allow.",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    junit: Junit = None,
    sarif: Sarif = None,
    live: LivePage = None,
    certificate: Certificate = None,
    output: Output = None,
    seconds: Seconds = None,
    stars: Stars = None,
    memory: Memory = None,
    checkpoint: Checkpoint = None,
    ray: Ray = None,
    device: Device = "cpu",
    dtype: Dtype = "float64",
    method: Method = "auto",
    arithmetic: Arithmetic = None,
    kernels: KernelKind = "here",
) -> None:
    """Certify how far the outputs of networks A and B can differ over an input set.

    Example: torchreach compare net.onnx small.onnx --box "0,1; 0,1" --tolerance 0.05
    """
    from torchreach.app.arguments import CompareSetup, SetOptions, Setup, check_networks

    check_networks(original, compressed)
    sets = SetOptions(box, vnnlib, center, eps, mask, clip, shape)
    asked = CompareSetup(tolerance, gap, arithmetic, kernels)
    setup = Setup.make(device, dtype, method, seconds, stars, memory, output, ctx.obj, Places(checkpoint, ray))
    from torchreach.app import commands
    from torchreach.app.files import writing

    setup = writing(setup, certificate=certificate, junit=junit, sarif=sarif, live=live)
    raise typer.Exit(commands.compare(setup, (original, compressed), sets, asked))


@app.command(epilog="Exit status: 0 equivalent, 1 not equivalent or unknown, 2 bad input, 130 interrupted.")
def equivalent(
    ctx: typer.Context,
    original: Original,
    compressed: Compressed,
    box: Box = None,
    vnnlib: Vnnlib = None,
    center: Center = None,
    eps: Eps = None,
    mask: Mask = None,
    clip: Clip = None,
    shape: Shape = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Whether |y1 - y2| is at most this for every output, in units of the output.", rich_help_panel=ANSWER
        ),
    ] = None,
    top1: Annotated[
        bool,
        typer.Option("--top1", help="Whether the largest output is the same one, the label.", rich_help_panel=ANSWER),
    ] = False,
    confidence: Confidence = None,
    junit: Junit = None,
    sarif: Sarif = None,
    live: LivePage = None,
    certificate: Certificate = None,
    output: Folder = None,
    seconds: Seconds = None,
    stars: Stars = None,
    memory: Memory = None,
    checkpoint: Checkpoint = None,
    ray: Ray = None,
    device: Device = "cpu",
    dtype: Dtype = "float64",
    arithmetic: Arithmetic = None,
    kernels: KernelKind = "here",
) -> None:
    """Are networks A and B equivalent on an input set: yes, no with an input that shows it, or unknown?

    Example: torchreach equivalent net.onnx small.onnx --box "0,1; 0,1" --top1
    """
    from torchreach.app.arguments import EquivalentSetup, SetOptions, Setup, check_networks

    check_networks(original, compressed)
    sets = SetOptions(box, vnnlib, center, eps, mask, clip, shape)
    asked = EquivalentSetup(epsilon, top1, arithmetic, kernels, confidence)
    setup = Setup.make(device, dtype, "auto", seconds, stars, memory, output, ctx.obj, Places(checkpoint, ray))
    from torchreach.app import commands
    from torchreach.app.files import writing

    setup = writing(setup, certificate=certificate, junit=junit, sarif=sarif, live=live)
    raise typer.Exit(commands.equivalent(setup, (original, compressed), sets, asked))


@app.command(epilog="Exit status: 0 the same label on all inputs, 1 not, 2 bad input, 130 interrupted.")
def audit(
    ctx: typer.Context,
    original: Original,
    compressed: Compressed,
    data: Data,
    labels: Labels = None,
    eps: Annotated[
        float,
        typer.Option(
            help="How far each value of an input may move, in units of the input. 0 decides the inputs themselves.",
            rich_help_panel=TEST_SET,
        ),
    ] = 0.0,
    clip: Annotated[
        str | None,
        typer.Option(
            help="With --eps: valid range of an input value, for example 0,1. Default: none.",
            metavar="LO,HI",
            rich_help_panel=TEST_SET,
        ),
    ] = None,
    shape: TestShape = None,
    confidence: Confidence = None,
    junit: Junit = None,
    sarif: Sarif = None,
    live: LivePage = None,
    output: Folder = None,
    seconds: Seconds = None,
    stars: Stars = None,
    memory: Memory = None,
    checkpoint: Checkpoint = None,
    ray: Ray = None,
    device: Device = "cpu",
    dtype: Dtype = "float64",
    arithmetic: Arithmetic = None,
    kernels: KernelKind = "any",
) -> None:
    """Do networks A and B give the same label on each input of a test set, whatever processor runs them?

    Int8 codes that depend on the processor are all followed, so that it says on which inputs the label may.

    Example: torchreach audit net.onnx small.onnx --data x.npy --labels y.npy
    """
    from torchreach.app.arguments import AuditSetup, Setup, check_networks

    check_networks(original, compressed)
    asked = AuditSetup(data, labels, eps, clip, shape, confidence, arithmetic, kernels)
    setup = Setup.make(device, dtype, "auto", seconds, stars, memory, output, ctx.obj, Places(checkpoint, ray))
    from torchreach.app import commands
    from torchreach.app.files import writing

    setup = writing(setup, junit=junit, sarif=sarif, live=live)
    raise typer.Exit(commands.audit(setup, (original, compressed), asked))


@app.command(epilog="Exit status: 0 done, or within --keep-float, 1 not within it, 2 bad input, 130 interrupted.")
def attribute(
    ctx: typer.Context,
    original: Original,
    compressed: Compressed,
    box: Box = None,
    vnnlib: Vnnlib = None,
    center: Center = None,
    eps: Eps = None,
    mask: Mask = None,
    clip: Clip = None,
    shape: Shape = None,
    keep_float: Annotated[
        float | None,
        typer.Option(
            help="Also find layers to leave as in A so that |y1 - y2| is certified to be at most this, in units of the "
            "output.",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="With --keep-float: file for the mixed network, .onnx or .pt2. Default: it is not kept.",
            metavar="FILE",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    live: LivePage = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.json and a picture, made if missing. Default: write no files.",
            metavar="DIR",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Random inputs of each star, to compare with.", rich_help_panel=ENGINE)
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.", rich_help_panel=ENGINE)] = 0,
    seconds: Seconds = None,
    stars: Stars = None,
    memory: Memory = None,
    checkpoint: Checkpoint = None,
    ray: Ray = None,
    device: Device = "cpu",
    dtype: Dtype = "float64",
) -> None:
    """Which layers make the difference of A and B? Per layer: certified, attained, and on random inputs.

    A and B have the same layers, of which only the numbers differ. Without --seconds, each layer is bounded once.

    Example: torchreach attribute net.onnx small.onnx --box "0,1; 0,1" --keep-float 0.1 --save mixed.onnx
    """
    from torchreach.app.arguments import NETWORKS, AttributeSetup, SetOptions, Setup, check_networks, check_target

    check_networks(original, compressed)
    sets = SetOptions(box, vnnlib, center, eps, mask, clip, shape)
    asked = AttributeSetup(samples, seed, keep_float)
    setup = Setup.make(device, dtype, "auto", seconds, stars, memory, output, ctx.obj, Places(checkpoint, ray))
    if save is not None:
        if keep_float is None:
            raise OptionError("--save belongs to --keep-float: without it there is no mixed network")
        check_target(save, NETWORKS)
    from torchreach.app import commands
    from torchreach.app.files import writing

    raise typer.Exit(commands.attribute(writing(setup, live=live), (original, compressed), sets, asked, save))


@app.command(epilog="Exit status: 0 target met, 1 not met, 2 bad input, 130 interrupted.")
def repair(
    ctx: typer.Context,
    original: Original,
    compressed: Compressed,
    box: Box = None,
    vnnlib: Vnnlib = None,
    center: Center = None,
    eps: Eps = None,
    mask: Mask = None,
    clip: Clip = None,
    shape: Shape = None,
    target: Target = None,
    target_max: TargetMax = None,
    by: By = "retrain",
    alpha: Alpha = 2.0,
    iterations: Iterations = 20,
    rate: Rate = 1e-3,
    epochs: Annotated[int, typer.Option(help="Epochs of each retraining.", rich_help_panel=REPAIR)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the training points.", rich_help_panel=REPAIR)] = 0,
    save: Annotated[
        Path | None,
        typer.Option(
            help="File for the repaired network, .onnx or .pt2; .pth where B is one. Default: it is not kept.",
            metavar="FILE",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    junit: Junit = None,
    sarif: Sarif = None,
    live: LivePage = None,
    certificate: Certificate = None,
    output: Output = None,
    seconds: Seconds = None,
    stars: Stars = None,
    memory: Memory = None,
    checkpoint: Checkpoint = None,
    ray: Ray = None,
    device: Device = "cpu",
    dtype: Dtype = "float64",
    method: Method = "auto",
) -> None:
    """Retrain network B until its outputs are certified to be close to those of A over an input set.

    Zero weights stay zero and weights on a grid (int8 and below, float16) stay on it.

    Example: torchreach repair net.onnx small.onnx --box "0,1; 0,1" --target 0.5 --save better.onnx
    """
    from torchreach.app.arguments import RepairSetup, SetOptions, Setup, check_networks, check_repair

    check_networks(original, compressed)
    sets = SetOptions(box, vnnlib, center, eps, mask, clip, shape)
    options = RepairSetup(target, target_max, alpha, iterations, epochs, rate, seed, by)
    setup = Setup.make(device, dtype, method, seconds, stars, memory, output, ctx.obj, Places(checkpoint, ray))
    check_repair(method, compressed, save)
    from torchreach.app import repairing
    from torchreach.app.files import writing

    setup = writing(setup, certificate=certificate, junit=junit, sarif=sarif, live=live)
    raise typer.Exit(repairing.repair(setup, (original, compressed), sets, options, save))


app.command(epilog="Exit status: 0 verified, 1 not, 2 a file that cannot be read.")(check)

app.command(epilog="Exit status: 0 target met, 1 not met, 2 bad input, 130 interrupted.")(demo)

main = app
