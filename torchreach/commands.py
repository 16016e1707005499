"""What each command does: read, analyse, print, write. The options come from `torchreach.cli`."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from torchreach import console as show
from torchreach.deployed import rounds
from torchreach.discrepancy import discrepancy
from torchreach.errors import OptionError
from torchreach.input_sets import InputSet
from torchreach.networks.eager_int8 import load_int8
from torchreach.networks.load import load
from torchreach.networks.save import check_target, onnx_bytes, save
from torchreach.options import Budget, Exact, Search
from torchreach.provenance import file_hashes
from torchreach.report import NetworkInfo, Report, check_folder, render, write_files
from torchreach.results import Discrepancy, RepairResult
from torchreach.terms import Semantics
from torchreach.verdict import State, compare_verdict, repair_verdict

TARGET = 0.5  # factor of the first certified bound
DTYPES = {"float32": torch.float32, "float64": torch.float64}
METHODS = {
    "auto": None,
    "exact": Exact(),
    "search": Search(),
    "vertices": Exact("vertices"),
    "programs": Exact("programs"),
}


@dataclass(frozen=True)
class Setup:
    """What every command needs: where to compute, how long, where to write and print."""

    device: torch.device
    dtype: torch.dtype
    method: str  # one of `METHODS`
    budget: Budget
    output: Path | None
    command_line: str
    out: Console
    err: Console
    began: float

    @staticmethod
    def make(
        device: str,
        dtype: str,
        method: str,
        seconds: float | None,
        stars: int | None,
        memory: str | None,
        output: Path | None,
        command_line: str,
    ) -> Setup:
        """Checked options. Raises OptionError."""
        if dtype not in DTYPES:
            raise OptionError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if output is not None:
            check_folder(output)
        for option, value in (("--seconds", seconds), ("--stars", stars)):
            if value is not None and not value > 0:
                raise OptionError(f"{option} must be positive, got {value:g}")
        if method not in METHODS:
            raise OptionError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
        return Setup(
            _device(device),
            DTYPES[dtype],
            method,
            Budget(seconds, stars, None if memory is None else _bytes(memory)),
            output,
            command_line,
            Console(),
            Console(stderr=True),
            time.monotonic(),
        )

    def settings(self, **more: Any) -> dict[str, Any]:
        """The options as JSON values, for the report."""
        return {
            "method": self.method,
            "seconds": self.budget.seconds,
            "stars": self.budget.stars,
            "memory": self.budget.memory,
            **more,
        }


@dataclass(frozen=True)
class RepairSetup:
    """Options of the repair loop, as `torchreach.repair.repair` takes them.

    Both targets speak of the certified bound on |y1 - y2| over all input stars and outputs: `target` is a factor
    of the first one, `largest` an absolute value.
    """

    target: float | None
    largest: float | None
    alpha: float
    iterations: int
    epochs: int
    rate: float
    seed: int

    def __post_init__(self) -> None:
        if self.target is not None and self.largest is not None:
            raise OptionError("at most one of --target and --target-max may be given, got both")
        if self.target is not None and not 0 < self.target < 1:
            raise OptionError(f"--target must lie in (0, 1), got {self.target:g}")
        if self.largest is not None and not self.largest >= 0:
            raise OptionError(f"--target-max must be a number >= 0, got {self.largest:g}")
        if not self.alpha > 0:
            raise OptionError(f"--alpha must be positive, got {self.alpha:g}")
        if not 0 < self.rate < float("inf"):
            raise OptionError(f"--rate must be positive, got {self.rate:g}")
        for option, value in (("--iterations", self.iterations), ("--epochs", self.epochs)):
            if value < 1:
                raise OptionError(f"{option} must be at least 1, got {value}")

    @property
    def factor(self) -> float:
        """Factor in use where no absolute bound is given."""
        return TARGET if self.target is None else self.target

    def wanted(self, first: Discrepancy) -> float:
        """The bound to reach, once the first discrepancy is known."""
        return self.factor * float(first.upper.max()) if self.largest is None else self.largest

    def settings(self) -> dict[str, Any]:
        """The options as JSON values."""
        kind, value = ("factor", self.factor) if self.largest is None else ("max", self.largest)
        return {
            "target": {"kind": kind, "value": value},
            "alpha": self.alpha,
            "iterations": self.iterations,
            "epochs": self.epochs,
            "rate": self.rate,
            "seed": self.seed,
        }

    def run(
        self,
        setup: Setup,
        original: nn.Module,
        compressed: nn.Module,
        inputs: InputSet,
        evaluate: Callable[[nn.Module], float] | None = None,
    ) -> RepairResult:
        """The repair, with progress."""
        from torchreach.repair import RepairOptions, Target, repair

        method = METHODS[setup.method]
        if isinstance(method, Search):
            names = ", ".join(name for name in METHODS if name != setup.method)
            raise OptionError(f"--method of a repair must be one of {names}, got {setup.method!r}")
        target = (
            Target.factor(self.factor, over="all")
            if self.largest is None
            else Target.bounds(-self.largest, self.largest)
        )
        with show.live(setup.err, "repair") as live:
            return repair(
                original,
                compressed,
                inputs.stars,
                target=target,
                alpha=self.alpha,
                iterations=self.iterations,
                training=RepairOptions(epochs=self.epochs, learning_rate=self.rate),
                evaluate=evaluate,
                seed=self.seed,
                method=method,
                budget=setup.budget,
                progress=live and live.step,
            )


@dataclass(frozen=True)
class DemoSetup:
    """Options of the demonstration; see `torchreach.demo`."""

    data: str
    root: Path | None
    images: int
    pixels: int
    eps: float
    epochs: int
    bits: int
    prune: float

    def check(self) -> None:
        """Raises OptionError; what depends on the data is checked with the data."""
        if not (self.bits == 0 or 2 <= self.bits <= 16):
            raise OptionError(f"--bits must lie between 2 and 16, or be 0 for float weights, got {self.bits}")
        if not 0 <= self.prune < 1:
            raise OptionError(f"--prune must lie in [0, 1), got {self.prune:g}")
        if self.bits == 0 and self.prune == 0:
            raise OptionError("--bits 0 needs --prune: without either there is nothing to compress")
        if self.epochs < 1:
            raise OptionError(f"--epochs must be at least 1, got {self.epochs}")

    def settings(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {
            "data": self.data, "images": self.images, "pixels": self.pixels, "eps": self.eps,
            "training_epochs": self.epochs, "bits": self.bits, "prune": self.prune,
        }  # fmt: skip


def compare(
    setup: Setup,
    paths: tuple[Path, Path],
    read_inputs: Callable[[nn.Sequential, torch.dtype], InputSet],
    tolerance: float | None,
) -> bool:
    """Runs `torchreach compare`; whether the exit status is 0."""
    if tolerance is not None and not tolerance >= 0:
        raise OptionError(f"--tolerance must be a number >= 0, got {tolerance:g}")
    original = load(paths[0]).to(setup.device)
    runs = _compressed(paths)  # on the int8 kernels, where it has some: witnesses replay there
    compressed = load(runs).to(setup.device)
    networks = {"original": original, "compressed": compressed}
    inputs = read_inputs(networks["original"], setup.dtype).to(setup.device)
    with show.live(setup.err, "compare") as live:
        found = discrepancy(
            original,
            runs,
            inputs.stars,
            METHODS[setup.method],
            budget=setup.budget,
            progress=live and live.stars,
        )
    report = Report(
        "compare",
        setup.command_line,
        {
            role: NetworkInfo.of(str(path), networks[role], sha256=file_hashes(path))
            for role, path in zip(networks, paths, strict=True)
        },
        inputs,
        compare_verdict(found, tolerance),
        found,
        evaluate(original, inputs.stars.center),
        values={"compressed": at_witnesses(original, runs, found)},
        settings=setup.settings(tolerance=tolerance),
        seconds=time.monotonic() - setup.began,
    )
    show.print_line(setup.out, f"input set: {inputs.text}")
    show.print_discrepancy(setup.out, found, inputs.labels, tolerance=tolerance)
    show.print_reading(setup.out, found)
    if report.verdict.state is State.EXCEEDED:
        star, output = report.verdict.witness
        x = found.witness[star, output][None]
        show.print_witness(setup.out, report, found, (evaluate(original, x, found)[0], evaluate(runs, x, found)[0]))
    finish(setup, report)
    return report.verdict.ok


def _compressed(paths: tuple[Path, Path]) -> nn.Module:
    """The second network; a state dict has the structure of the first."""
    if paths[1].suffix.lower() in (".pth", ".pt"):
        return load_int8(paths[1], paths[0])
    return load(paths[1])


def repair(
    setup: Setup,
    paths: tuple[Path, Path],
    read_inputs: Callable[[nn.Sequential, torch.dtype], InputSet],
    options: RepairSetup,
    saved: Path | None,
) -> bool:
    """Runs `torchreach repair`; whether the exit status is 0."""
    if saved is not None:
        check_target(saved)
    networks = {role: load(path).to(setup.device) for role, path in zip(("original", "compressed"), paths, strict=True)}
    inputs = read_inputs(networks["original"], setup.dtype).to(setup.device)
    if saved is not None and saved.suffix.lower() == ".onnx":
        onnx_bytes(networks["compressed"], inputs.stars.shape)  # refuses layers now rather than after the work
    names = {role: str(path) for role, path in zip(networks, paths, strict=True)}
    show.print_line(setup.out, f"input set: {inputs.text}")
    result = options.run(setup, networks["original"], networks["compressed"], inputs)
    hashes = {role: file_hashes(path) for role, path in zip(networks, paths, strict=True)}
    if saved is not None:
        save(load(result.network).cpu(), saved, inputs.stars.shape)
        hashes["repaired"] = file_hashes(saved)
    report = repair_report("repair", setup, options, networks, names, inputs, result, hashes)
    show.print_comparison(setup.out, result.before, result.after, inputs.labels)
    if saved is not None:
        show.print_line(setup.out, f"repaired network: {saved}")
    finish(setup, report)
    return report.verdict.ok


def demo(setup: Setup, options: RepairSetup, digits: DemoSetup) -> bool:
    """Runs `torchreach demo`; whether the exit status is 0."""
    from torchreach import demo as parts

    digits.check()
    data = parts.load_data(digits.data, digits.root, options.seed)
    inputs = parts.input_set(data, digits.images, digits.pixels, digits.eps).to(setup.device)
    with show.live(setup.err, f"training on {data.name}"):
        original = parts.train(data, digits.epochs, options.seed)
    compressed, how = parts.compress(original, digits.bits, digits.prune)
    networks = {"original": original.to(setup.device), "compressed": compressed.to(setup.device)}
    names = {"original": f"trained on {data.name}", "compressed": how}
    right = {role: parts.accuracy(network, data) for role, network in networks.items()}
    for role, name in names.items():
        show.print_line(setup.out, f"{role + ':':<12}{name}, test accuracy {100 * right[role]:.2f} %")
    show.print_line(setup.out, f"input set:  {inputs.text}")
    result = options.run(setup, original, compressed, inputs, lambda network: parts.accuracy(network, data))
    chains = {**networks, "repaired": result.network}
    files = {f"{role}.onnx": onnx_bytes(load(network), inputs.stars.shape) for role, network in chains.items()}
    hashes = {role: {name: sha256(data).hexdigest()} for role, (name, data) in zip(chains, files.items(), strict=True)}
    report = repair_report("demo", setup, options, networks, names, inputs, result, hashes, right, **digits.settings())
    show.print_discrepancy(setup.out, result.before, inputs.labels, "before repair")
    show.print_comparison(setup.out, result.before, result.after, inputs.labels)
    accuracy = report.networks["repaired"].accuracy or 0.0
    show.print_line(setup.out, f"{'repaired:':<12}test accuracy {100 * accuracy:.2f} %")
    finish(setup, report, files)
    return report.verdict.ok


def repair_report(
    command: str,
    setup: Setup,
    options: RepairSetup,
    networks: Mapping[str, nn.Module],
    names: Mapping[str, str],
    inputs: InputSet,
    result: RepairResult,
    hashes: Mapping[str, Mapping[str, str]],
    accuracy: Mapping[str, float] | None = None,
    **settings: Any,
) -> Report:
    """Report of a repair of networks["compressed"] against networks["original"]."""
    known = accuracy or {}
    described = {
        role: NetworkInfo.of(names[role], network, known.get(role), hashes.get(role))
        for role, network in networks.items()
    }
    kept = result.history[result.index]
    which = f"iteration {kept.iteration} of {result.history[-1].iteration}"
    described["repaired"] = NetworkInfo.of(which, result.network, kept.accuracy, hashes.get("repaired"))
    return Report(
        command,
        setup.command_line,
        described,
        inputs,
        repair_verdict(result, options.wanted(result.before)),
        result.before,
        evaluate(networks["original"], inputs.stars.center),
        values={
            role: at_witnesses(networks["original"], network, found)
            for role, network, found in (
                ("compressed", networks["compressed"], result.before),
                ("repaired", result.network, result.after),
            )
        },
        repaired=result,
        settings=setup.settings(**options.settings(), target_bound=options.wanted(result.before), **settings),
        seconds=time.monotonic() - setup.began,
    )


def finish(setup: Setup, report: Report, files: Mapping[str, bytes] | None = None) -> None:
    """Write the report where one was asked for, then print the verdict, so that it stands last."""
    if setup.output is not None:
        write_files(setup.output, {**render(report), **(files or {})})
        show.print_line(setup.out, f"report: {setup.output / 'report.html'}")
    show.print_verdict(setup.out, report.verdict)


def evaluate(network: nn.Module, x: Tensor, found: Discrepancy | None = None) -> Tensor:
    """The network's outputs [B, N] at x [B, *shape], in float64.

    Of a float64 copy, close to what a certificate of real arithmetic speaks of; where `found` speaks of a network as
    it is executed, of that network itself.
    """
    parameter = next(network.parameters(), None)
    half = parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16)
    single = found is not None and found.semantics is Semantics.FLOAT32
    executed = found is not None and (half or single or rounds(network, None if x.ndim == 2 else tuple(x.shape[1:])))
    with torch.no_grad():
        if executed:
            return network(x.to(torch.float32 if parameter is None else parameter.dtype)).double()
        return copy.deepcopy(network).to(x.device, torch.float64).eval()(x.double())


def at_witnesses(original: nn.Module, compressed: nn.Module, found: Discrepancy) -> tuple[Tensor, Tensor]:
    """y1 and y2, [S, N] each: output n at the witness of output n."""
    both = (
        torch.stack([evaluate(network, x, found).diagonal() for x in found.witness])
        for network in (original, compressed)
    )
    first, second = both
    return first, second


def _bytes(text: str) -> int:
    """The number of bytes that "2GB", "500 MB", "1.5GiB" or "1000000" says. Raises OptionError."""
    found = re.fullmatch(r"(\d+|\d*\.\d+)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    number = 0
    if found is not None:
        size, unit, binary = found.groups()
        number = int(float(size) * (1024 if binary else 1000) ** ("kmgt".index(unit) + 1 if unit else 0))
    if number <= 0:
        raise OptionError(f"--memory must be a positive size such as 2GB, 500MB or 1.5GiB, got {text!r}")
    return number


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use"
        )
    return device
