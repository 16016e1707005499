"""What the commands share: reading, the exit status, replaying witnesses, writing a report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from torchreach.app import console as show
from torchreach.app.arguments import (
    SetOptions,
    Setup,
    is_state_dict,
)
from torchreach.app.inputs import InputSet, read_input_set
from torchreach.app.report.content import NetworkInfo, Report
from torchreach.app.report.provenance import file_hashes
from torchreach.app.report.report import render
from torchreach.core.errors import OptionError
from torchreach.core.extras import need
from torchreach.core.files import whole, write_files
from torchreach.core.results import Discrepancy, Equivalence
from torchreach.core.terms import Semantics
from torchreach.read.dialects.state_dict import load_int8
from torchreach.read.load import input_shape, load
from torchreach.read.save import save
from torchreach.verbs.int8_pair import rounds
from torchreach.verbs.labels import before_softmax

OK, NOT_OK, INTERRUPTED = 0, 1, 130  # exit statuses; 128 + SIGINT where Ctrl-C came before an answer


def compressed_of(paths: tuple[Path, Path]) -> nn.Module:
    """The second network; a state dict has the structure of the first."""
    return load_int8(paths[1], paths[0]) if is_state_dict(paths[1]) else load(paths[1])


def described(paths: tuple[Path, Path], networks: tuple[nn.Module, nn.Module]) -> dict[str, NetworkInfo]:
    """What a report says of the two networks, by role."""
    return {
        role: NetworkInfo.of(str(path), load(before_softmax(network)), sha256=file_hashes(path))
        for role, path, network in zip(("original", "compressed"), paths, networks, strict=True)
    }


def keep(network: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    """The network as a state dict, or as a flat chain of layers."""
    if is_state_dict(path):
        with whole(path) as draft:
            torch.save(network.state_dict(), draft)
    else:
        save(load(network, input_shape=shape).cpu(), path, shape)


def input_set(
    setup: Setup, sets: SetOptions, paths: tuple[Path, Path], original: nn.Module, device: torch.device
) -> InputSet:
    """The input set, in the shape that the files say an input has."""

    return read_input_set(sets, original, getattr(torch, setup.dtype), file_shape(paths)).to(device)


def file_shape(paths: tuple[Path, Path]) -> Callable[[], tuple[int, ...] | None]:
    """What asks the files for the shape of an input."""

    def shape() -> tuple[int, ...] | None:
        shapes = (input_shape(path) for path in paths if not is_state_dict(path))
        return next((shape for shape in shapes if shape is not None), None)

    return shape


def status_of(setup: Setup, ok: bool, interrupted: bool) -> int:
    """The exit status; an interrupted run says so."""
    if interrupted:
        show.print_line(setup.err, "torchreach: interrupted; what is certified so far holds")
        return INTERRUPTED
    return OK if ok else NOT_OK


def finish(setup: Setup, report: Report, files: Mapping[str, bytes] | None = None) -> None:
    """Write the report where one was asked for, then print the verdict, so that it stands last."""
    if setup.output is not None:
        write_files(setup.output, {**render(report), **(files or {})})
        show.print_line(setup.out, f"report: {setup.output / 'report.html'}")
    show.print_verdict(setup.out, report.verdict)


def evaluate(network: nn.Module, x: Tensor, found: Discrepancy | Equivalence | None = None) -> Tensor:
    """The network's outputs [B, N] at x [B, *shape], in float64.

    Of a float64 copy, close to what a certificate of real arithmetic speaks of; where `found` speaks of a network as
    it is executed, of that network itself.
    """
    network = before_softmax(network)
    parameter = next(network.parameters(), None)
    half = parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16)
    real = found is None or found.semantics in (Semantics.FLOAT, Semantics.WEIGHT_ONLY)
    single = found is not None and found.semantics is Semantics.FLOAT32
    executed = not real and (half or single or rounds(network, None if x.ndim == 2 else tuple(x.shape[1:])))
    with torch.no_grad():
        if executed:
            return network(x.to(torch.float32 if parameter is None else parameter.dtype, copy=True)).double()
        return copy.deepcopy(network).to(x.device, torch.float64).eval()(x.to(torch.float64, copy=True))


def at_witnesses(original: nn.Module, compressed: nn.Module, found: Discrepancy) -> tuple[Tensor, Tensor]:
    """y1 and y2, [S, N] each: output n at the witness of output n."""
    both = (
        torch.stack([evaluate(network, x, found).diagonal() for x in found.witness])
        for network in (original, compressed)
    )
    first, second = both
    return first, second


@contextmanager
def watched(setup: Setup, what: str) -> Iterator[show.Live]:
    """Progress of a command, where it is printed and on the page that was asked for."""
    with show.live(setup.err, what, setup.files.get("live"), setup.budget.seconds) as live:
        yield live


def with_pictures(setup: Setup) -> None:
    """Raises MissingPackageError before the work, where a report could not be drawn after it."""
    if setup.output is not None:
        need("matplotlib", "--output: drawing a report's pictures")


def device_of(setup: Setup) -> torch.device:
    device = torch.device(setup.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {setup.device}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use"
        )
    return device
