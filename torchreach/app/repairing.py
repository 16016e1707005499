"""`torchreach repair` and `torchreach demo`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchreach.app import console as show
from torchreach.app.arguments import (
    METHODS,
    DemoSetup,
    RepairSetup,
    SetOptions,
    Setup,
)
from torchreach.app.files import certify, gate
from torchreach.app.inputs import InputSet
from torchreach.app.report.content import NetworkInfo, Report
from torchreach.app.report.gates import comparison_cases
from torchreach.app.report.provenance import file_hashes
from torchreach.app.shared import (
    at_witnesses,
    compressed_of,
    device_of,
    evaluate,
    finish,
    input_set,
    keep,
    status_of,
    watched,
    with_pictures,
)
from torchreach.app.verdict import repair_verdict
from torchreach.core.clock import first_interrupt
from torchreach.core.options import Search
from torchreach.core.repaired import RepairResult
from torchreach.read.load import load
from torchreach.read.save import onnx_bytes
from torchreach.verbs.equivalence import equivalent as equivalence


def repair(setup: Setup, paths: tuple[Path, Path], sets: SetOptions, options: RepairSetup, saved: Path | None) -> int:
    """Runs `torchreach repair`; the exit status."""
    with_pictures(setup)
    device = device_of(setup)
    original, compressed = load(paths[0]).to(device), compressed_of(paths).to(device)
    inputs = input_set(setup, sets, paths, original, device)
    if saved is not None and saved.suffix.lower() == ".onnx":
        onnx_bytes(
            load(compressed, input_shape=inputs.stars.shape), inputs.stars.shape
        )  # refuses layers now rather than after the work
    networks = {"original": original, "compressed": compressed}
    names = {role: str(path) for role, path in zip(networks, paths, strict=True)}
    show.print_line(setup.out, f"input set: {inputs.text}")
    with first_interrupt() as pressed:
        result = _repair(options, setup, original, compressed, inputs)
    hashes = {role: file_hashes(path) for role, path in zip(networks, paths, strict=True)}
    if saved is not None:
        keep(result.network, saved, inputs.stars.shape)
        hashes["repaired"] = file_hashes(saved)
    report = repair_report("repair", setup, options, networks, names, inputs, result, hashes)
    show.print_comparison(setup.out, result.before, result.after, inputs.labels)
    if saved is not None:
        show.print_line(setup.out, f"repaired network: {saved}")
    finish(setup, report)
    certify(setup, result, (paths[0], saved))
    status = status_of(setup, report.verdict.ok, bool(pressed) and not result.satisfied)
    cases = partial(comparison_cases, result.after, inputs.labels, report.verdict.tolerance)
    return gate(setup, "repair", paths, status, cases)


def _repair(
    options: RepairSetup,
    setup: Setup,
    original: nn.Module,
    compressed: nn.Module,
    inputs: InputSet,
    evaluate: Callable[[nn.Module], float] | None = None,
    data: tuple[Tensor, Tensor] | None = None,
) -> RepairResult:
    """The repair, with progress. data: inputs, and what the network is to go on giving there."""
    from torchreach.training.repair import RepairOptions, Target, repair

    method = METHODS[setup.method]
    assert not isinstance(method, Search)
    target = (
        Target.factor(options.factor, over="all")
        if options.largest is None
        else Target.bounds(-options.largest, options.largest)
    )
    with watched(setup, "repair") as live:
        return repair(
            original,
            compressed,
            inputs.stars,
            target=target,
            method=options.by,
            alpha=options.alpha,
            iterations=options.iterations,
            training=RepairOptions(epochs=options.epochs, learning_rate=options.rate, data_weight=1.0),
            data=data,
            evaluate=evaluate,
            seed=options.seed,
            exact=method,
            budget=setup.budget,
            progress=live.step,
            **setup.places.options(),
        )


def demo(setup: Setup, options: RepairSetup, digits: DemoSetup) -> int:
    """Runs `torchreach demo`; the exit status."""
    from torchreach.app import demo as parts

    with_pictures(setup)
    device = device_of(setup)
    data = parts.load_data(digits.data, digits.root, options.seed)
    inputs = parts.input_set(data, digits.images, digits.pixels, digits.eps).to(device)
    with show.live(setup.err, f"training on {data.name}"):
        original = parts.train(data, digits.epochs, options.seed)
    compressed, how = parts.compress(original, digits.bits, digits.prune)
    networks = {"original": original.to(device), "compressed": compressed.to(device)}
    names = {"original": f"trained on {data.name}", "compressed": how}
    right = {role: parts.accuracy(network, data) for role, network in networks.items()}
    for role, name in names.items():
        show.print_line(setup.out, f"{role + ':':<12}{name}, test accuracy {100 * right[role]:.2f} %")
    show.print_line(setup.out, f"input set:  {inputs.text}")
    with first_interrupt() as pressed:
        kept = data.train_x.to(device)
        wanted = evaluate(original, kept).to(kept)
        judge = partial(parts.accuracy, data=data)
        result = _repair(options, setup, original, compressed, inputs, judge, (kept, wanted))
    chains = {**networks, "repaired": result.network}
    files = {f"{role}.onnx": onnx_bytes(load(network), inputs.stars.shape) for role, network in chains.items()}
    hashes = {role: {name: sha256(data).hexdigest()} for role, (name, data) in zip(chains, files.items(), strict=True)}
    report = repair_report("demo", setup, options, networks, names, inputs, result, hashes, right, **digits.settings())
    show.print_discrepancy(setup.out, result.before, inputs.labels, "before repair")
    show.print_comparison(setup.out, result.before, result.after, inputs.labels)
    accuracy = report.networks["repaired"].accuracy or 0.0
    show.print_line(setup.out, f"{'repaired:':<12}test accuracy {100 * accuracy:.2f} %")
    for role in ("compressed", "repaired"):
        found = equivalence(original, chains[role], inputs.stars, top1=True, budget=setup.budget)
        show.print_line(setup.out, f"{'labels:':<12}{show.label_counts(found)} ({role})")
    finish(setup, report, files)
    return status_of(setup, report.verdict.ok, bool(pressed) and not result.satisfied)


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
        role: NetworkInfo.of(names[role], load(network), known.get(role), hashes.get(role))
        for role, network in networks.items()
    }
    kept = result.history[result.index]
    which = f"iteration {kept.iteration} of {result.history[-1].iteration}"
    described["repaired"] = NetworkInfo.of(which, load(result.network), kept.accuracy, hashes.get("repaired"))
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
