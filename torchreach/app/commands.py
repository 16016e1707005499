"""What each command does: read, analyse, print, write. `torchreach.app.cli` has checked the options."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.app import console as show
from torchreach.app.arguments import (
    METHODS,
    AttributeSetup,
    AuditSetup,
    CompareSetup,
    DemoSetup,
    EquivalentSetup,
    RepairSetup,
    SetOptions,
    Setup,
    is_state_dict,
)
from torchreach.app.inputs import InputSet, read_data, read_input_set
from torchreach.app.report.attribution import attribution_files, kept_sentence
from torchreach.app.report.audit import audit_json, audit_rows, audit_sentence
from torchreach.app.report.content import NetworkInfo, Report
from torchreach.app.report.equivalence import answer, equivalence_json, sentence, worst
from torchreach.app.report.provenance import file_hashes
from torchreach.app.report.report import render
from torchreach.app.verdict import State, compare_verdict, repair_verdict
from torchreach.core.clock import first_interrupt
from torchreach.core.errors import OptionError
from torchreach.core.files import whole, write_files
from torchreach.core.options import Budget, Search
from torchreach.core.repaired import RepairResult
from torchreach.core.results import Answer, Discrepancy, Equivalence
from torchreach.core.terms import Semantics
from torchreach.read.dialects.state_dict import load_int8
from torchreach.read.load import input_shape, load
from torchreach.read.save import onnx_bytes, save
from torchreach.verbs.attribution import attribute as attribution
from torchreach.verbs.attribution import keep_float
from torchreach.verbs.audit import audit as audited
from torchreach.verbs.discrepancy import discrepancy
from torchreach.verbs.equivalence import equivalent as equivalence
from torchreach.verbs.int8_pair import rounds
from torchreach.verbs.labels import before_softmax

OK, NOT_OK, INTERRUPTED = 0, 1, 130  # exit statuses; 128 + SIGINT where Ctrl-C came before an answer


def compare(setup: Setup, paths: tuple[Path, Path], sets: SetOptions, asked: CompareSetup) -> int:
    """Runs `torchreach compare`; the exit status."""
    device = _device(setup)
    original = load(paths[0]).to(device)
    runs = _compressed(paths)  # on the int8 kernels, where it has some: witnesses replay there
    compressed = load(runs).to(device)
    inputs = _inputs(setup, sets, paths, original, device)
    with first_interrupt() as pressed, show.live(setup.err, "compare") as live:
        found = discrepancy(
            original,
            runs,
            inputs.stars,
            METHODS[setup.method],
            tolerance=asked.tolerance,
            gap=asked.gap,
            arithmetic=asked.arithmetic,
            budget=setup.budget,
            progress=live.stars,
            kernels=asked.kernels,
            **setup.places.options(),
        )
    report = Report(
        "compare",
        setup.command_line,
        _described(paths, (original, compressed)),
        inputs,
        compare_verdict(found, asked.tolerance),
        found,
        evaluate(original, inputs.stars.center),
        values={"compressed": at_witnesses(original, runs, found)},
        settings=setup.settings(**asdict(asked)),
        seconds=time.monotonic() - setup.began,
    )
    show.print_line(setup.out, f"input set: {inputs.text}")
    show.print_discrepancy(setup.out, found, inputs.labels, tolerance=asked.tolerance)
    show.print_reading(setup.out, found)
    if report.verdict.state is State.EXCEEDED:
        star, output = report.verdict.witness
        x = found.witness[star, output][None]
        show.print_witness(setup.out, report, found, (evaluate(original, x, found)[0], evaluate(runs, x, found)[0]))
    finish(setup, report)
    decided = report.verdict.state in (State.WITHIN, State.EXCEEDED)
    return _status(setup, report.verdict.ok, bool(pressed) and not decided)


def equivalent(setup: Setup, paths: tuple[Path, Path], sets: SetOptions, asked: EquivalentSetup) -> int:
    """Runs `torchreach equivalent`; the exit status."""
    device = _device(setup)
    original, runs = load(paths[0]).to(device), _compressed(paths)
    inputs = _inputs(setup, sets, paths, original, device)
    with first_interrupt() as pressed, show.live(setup.err, "equivalent") as live:
        found = equivalence(
            original,
            runs,
            inputs.stars,
            asked.epsilon,
            top1=asked.top1,
            confidence=asked.confidence,
            budget=setup.budget,
            progress=live.stars,
            arithmetic=asked.arithmetic,
            kernels=asked.kernels,
            **setup.places.options(),
        )
    show.print_line(setup.out, f"input set: {inputs.text}")
    show.print_equivalence(setup.out, found, inputs.labels)
    whole = answer(found)
    if whole is Answer.NOT_EQUIVALENT:
        x = found.witness[worst(found)][None]
        values = evaluate(original, x, found)[0], evaluate(runs, x, found)[0]
        show.print_values(setup.out, f"witness, an input of {inputs.labels[worst(found)]}", x[0], values)
    if setup.output is not None:
        networks = _described(paths, (original, runs))
        settings, seconds = setup.settings(**asdict(asked)), time.monotonic() - setup.began
        text = equivalence_json(found, inputs, networks, setup.command_line, settings, seconds)
        write_files(setup.output, {"report.json": text})
        show.print_line(setup.out, f"report: {setup.output / 'report.json'}")
    show.print_sentence(setup.out, sentence(found), whole is Answer.EQUIVALENT, whole is Answer.UNKNOWN)
    return _status(setup, whole is Answer.EQUIVALENT, bool(pressed) and whole is Answer.UNKNOWN)


def audit(setup: Setup, paths: tuple[Path, Path], asked: AuditSetup) -> int:
    """Runs `torchreach audit`; the exit status."""
    device = _device(setup)
    original, runs = load(paths[0]).to(device), _compressed(paths)
    points, labels = read_data(asked, original, getattr(torch, setup.dtype), _file_shape(paths))
    with first_interrupt() as pressed, show.live(setup.err, "audit") as live:
        found = audited(
            original,
            runs,
            points.to(device),
            asked.eps,
            None if labels is None else labels.to(device),
            confidence=asked.confidence,
            clip=asked.span,
            budget=setup.budget,
            progress=live.inputs,
            kernels=asked.kernels,
            arithmetic=asked.arithmetic,
            **setup.places.options(),
        )
    show.print_rows(setup.out, audit_rows(found), f"{len(found):,} inputs of {asked.data}")
    if setup.output is not None:
        files = {"data": file_hashes(asked.data)} | ({"labels": file_hashes(asked.labels)} if asked.labels else {})
        networks, settings = _described(paths, (original, runs)), setup.settings(**asked.settings())
        text = audit_json(found, networks, setup.command_line, settings, files, time.monotonic() - setup.began)
        write_files(setup.output, {"report.json": text})
        show.print_line(setup.out, f"report: {setup.output / 'report.json'}")
    ok, apart = found.count(Answer.EQUIVALENT) == len(found), found.count(Answer.NOT_EQUIVALENT)
    show.print_sentence(setup.out, audit_sentence(found), ok, not ok and not apart)
    return _status(setup, ok, bool(pressed) and not apart)


def attribute(
    setup: Setup, paths: tuple[Path, Path], sets: SetOptions, asked: AttributeSetup, saved: Path | None
) -> int:
    """Runs `torchreach attribute`; the exit status."""
    device = _device(setup)
    original, compressed = load(paths[0]).to(device), _compressed(paths).to(device)
    inputs, kept = _inputs(setup, sets, paths, original, device), None
    show.print_line(setup.out, f"input set: {inputs.text}")
    limits = None if setup.budget == Budget() else setup.budget
    if limits is not None and limits.seconds is not None and asked.keep_float is not None:
        limits = replace(limits, seconds=limits.seconds / 2)
    with first_interrupt() as pressed, show.live(setup.err, "attribute") as live:
        found = attribution(
            original,
            compressed,
            inputs.stars,
            budget=limits,
            samples=asked.samples,
            seed=asked.seed,
            progress=live.count,
            **setup.places.options("attribution"),
        )
        if asked.keep_float is not None:
            kept = keep_float(
                original,
                compressed,
                inputs.stars,
                asked.keep_float,
                order=found.order,
                budget=limits,
                progress=live.count,
                **setup.places.options("kept"),
            )
    show.print_attribution(setup.out, found)
    if kept is not None and saved is not None:
        _save(kept.network, saved, inputs.stars.shape)
        show.print_line(setup.out, f"mixed network: {saved}")
    if setup.output is not None:
        networks = _described(paths, (original, compressed))
        settings, seconds = setup.settings(**asdict(asked)), time.monotonic() - setup.began
        files = attribution_files(found, kept, inputs, networks, setup.command_line, settings, seconds)
        write_files(setup.output, files)
        show.print_line(setup.out, f"report: {setup.output / 'report.json'}")
    if kept is not None:
        show.print_sentence(setup.out, kept_sentence(kept), kept.satisfied, not kept.satisfied)
    return _status(setup, kept is None or kept.satisfied, bool(pressed))


def repair(setup: Setup, paths: tuple[Path, Path], sets: SetOptions, options: RepairSetup, saved: Path | None) -> int:
    """Runs `torchreach repair`; the exit status."""
    device = _device(setup)
    original, compressed = load(paths[0]).to(device), _compressed(paths).to(device)
    inputs = _inputs(setup, sets, paths, original, device)
    if saved is not None and saved.suffix.lower() == ".onnx":
        # refuses layers now rather than after the work
        onnx_bytes(load(compressed, input_shape=inputs.stars.shape), inputs.stars.shape)
    networks = {"original": original, "compressed": compressed}
    names = {role: str(path) for role, path in zip(networks, paths, strict=True)}
    show.print_line(setup.out, f"input set: {inputs.text}")
    with first_interrupt() as pressed:
        result = _repair(options, setup, original, compressed, inputs)
    hashes = {role: file_hashes(path) for role, path in zip(networks, paths, strict=True)}
    if saved is not None:
        _save(result.network, saved, inputs.stars.shape)
        hashes["repaired"] = file_hashes(saved)
    report = repair_report("repair", setup, options, networks, names, inputs, result, hashes)
    show.print_comparison(setup.out, result.before, result.after, inputs.labels)
    if saved is not None:
        show.print_line(setup.out, f"repaired network: {saved}")
    finish(setup, report)
    return _status(setup, report.verdict.ok, bool(pressed) and not result.satisfied)


def _compressed(paths: tuple[Path, Path]) -> nn.Module:
    """The second network; a state dict has the structure of the first."""
    return load_int8(paths[1], paths[0]) if is_state_dict(paths[1]) else load(paths[1])


def _described(paths: tuple[Path, Path], networks: tuple[nn.Module, nn.Module]) -> dict[str, NetworkInfo]:
    """What a report says of the two networks, by role."""
    return {
        role: NetworkInfo.of(str(path), load(before_softmax(network)), sha256=file_hashes(path))
        for role, path, network in zip(("original", "compressed"), paths, networks, strict=True)
    }


def _save(network: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    """The network as a state dict, or as a flat chain of layers."""
    if is_state_dict(path):
        with whole(path) as draft:
            torch.save(network.state_dict(), draft)
    else:
        save(load(network, input_shape=shape).cpu(), path, shape)


def _inputs(
    setup: Setup, sets: SetOptions, paths: tuple[Path, Path], original: nn.Module, device: torch.device
) -> InputSet:
    """The input set, in the shape that the files say an input has."""
    return read_input_set(sets, original, getattr(torch, setup.dtype), _file_shape(paths)).to(device)


def _file_shape(paths: tuple[Path, Path]) -> Callable[[], tuple[int, ...] | None]:
    """What asks the files for the shape of an input."""

    def shape() -> tuple[int, ...] | None:
        shapes = (input_shape(path) for path in paths if not is_state_dict(path))
        return next((shape for shape in shapes if shape is not None), None)

    return shape


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
    with show.live(setup.err, "repair") as live:
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


def _status(setup: Setup, ok: bool, interrupted: bool) -> int:
    """The exit status; an interrupted run says so."""
    if interrupted:
        show.print_line(setup.err, "torchreach: interrupted; what is certified so far holds")
        return INTERRUPTED
    return OK if ok else NOT_OK


def demo(setup: Setup, options: RepairSetup, digits: DemoSetup) -> int:
    """Runs `torchreach demo`; the exit status."""
    from torchreach.app import demo as parts

    device = _device(setup)
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
    return _status(setup, report.verdict.ok, bool(pressed) and not result.satisfied)


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
    first, second = (
        torch.stack([evaluate(network, x, found).diagonal() for x in found.witness])
        for network in (original, compressed)
    )
    return first, second


def _device(setup: Setup) -> torch.device:
    device = torch.device(setup.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {setup.device}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use"
        )
    return device
