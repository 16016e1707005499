"""What `compare`, `equivalent`, `audit` and `attribute` do: read, analyse, print, write.

`torchreach.app.cli` has checked the options.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from torchreach.app import console as show
from torchreach.app.arguments import (
    METHODS,
    AttributeSetup,
    AuditSetup,
    CompareSetup,
    EquivalentSetup,
    SetOptions,
    Setup,
)
from torchreach.app.files import certify, gate
from torchreach.app.inputs import read_data
from torchreach.app.report.attribution import attribution_files, kept_sentence
from torchreach.app.report.audit import audit_json, audit_rows, audit_sentence
from torchreach.app.report.content import Report
from torchreach.app.report.equivalence import answer, equivalence_json, sentence, worst
from torchreach.app.report.gates import audit_cases, comparison_cases, equivalence_cases
from torchreach.app.report.provenance import file_hashes
from torchreach.app.shared import (
    at_witnesses,
    compressed_of,
    described,
    device_of,
    evaluate,
    file_shape,
    finish,
    input_set,
    keep,
    status_of,
    watched,
    with_pictures,
)
from torchreach.app.verdict import State, compare_verdict
from torchreach.core.clock import first_interrupt
from torchreach.core.files import write_files
from torchreach.core.options import Budget
from torchreach.core.results import Answer
from torchreach.read.load import load
from torchreach.verbs.attribution import attribute as attribution
from torchreach.verbs.attribution import keep_float
from torchreach.verbs.audit import audit as audited
from torchreach.verbs.discrepancy import discrepancy
from torchreach.verbs.equivalence import equivalent as equivalence


def compare(setup: Setup, paths: tuple[Path, Path], sets: SetOptions, asked: CompareSetup) -> int:
    """Runs `torchreach compare`; the exit status."""
    with_pictures(setup)
    device = device_of(setup)
    original = load(paths[0]).to(device)
    runs = compressed_of(paths)  # on the int8 kernels, where it has some: witnesses replay there
    compressed = load(runs).to(device)
    inputs = input_set(setup, sets, paths, original, device)
    with first_interrupt() as pressed, watched(setup, "compare") as live:
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
        described(paths, (original, compressed)),
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
    certify(setup, found, paths)
    decided = report.verdict.state in (State.WITHIN, State.EXCEEDED)
    status = status_of(setup, report.verdict.ok, bool(pressed) and not decided)
    return gate(setup, "compare", paths, status, lambda: comparison_cases(found, inputs.labels, asked.tolerance))


def equivalent(setup: Setup, paths: tuple[Path, Path], sets: SetOptions, asked: EquivalentSetup) -> int:
    """Runs `torchreach equivalent`; the exit status."""
    device = device_of(setup)
    original, runs = load(paths[0]).to(device), compressed_of(paths)
    inputs = input_set(setup, sets, paths, original, device)
    with first_interrupt() as pressed, watched(setup, "equivalent") as live:
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
        networks = described(paths, (original, runs))
        settings = setup.settings(**asdict(asked))
        seconds = time.monotonic() - setup.began
        text = equivalence_json(found, inputs, networks, setup.command_line, settings, seconds)
        write_files(setup.output, {"report.json": text})
        show.print_line(setup.out, f"report: {setup.output / 'report.json'}")
    certify(setup, found, paths)
    show.print_sentence(setup.out, sentence(found), whole is Answer.EQUIVALENT, whole is Answer.UNKNOWN)
    status = status_of(setup, whole is Answer.EQUIVALENT, bool(pressed) and whole is Answer.UNKNOWN)
    return gate(setup, "equivalent", paths, status, lambda: equivalence_cases(found, inputs.labels))


def audit(setup: Setup, paths: tuple[Path, Path], asked: AuditSetup) -> int:
    """Runs `torchreach audit`; the exit status."""
    device = device_of(setup)
    original, runs = load(paths[0]).to(device), compressed_of(paths)
    points, labels = read_data(asked, original, getattr(torch, setup.dtype), file_shape(paths))
    with first_interrupt() as pressed, watched(setup, "audit") as live:
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
        networks, settings = described(paths, (original, runs)), setup.settings(**asked.settings())
        text = audit_json(found, networks, setup.command_line, settings, files, time.monotonic() - setup.began)
        write_files(setup.output, {"report.json": text})
        show.print_line(setup.out, f"report: {setup.output / 'report.json'}")
    ok, apart = found.count(Answer.EQUIVALENT) == len(found), found.count(Answer.NOT_EQUIVALENT)
    show.print_sentence(setup.out, audit_sentence(found), ok, not ok and not apart)
    status = status_of(setup, ok, bool(pressed) and not apart)
    return gate(setup, "audit", paths, status, lambda: audit_cases(found))


def attribute(
    setup: Setup, paths: tuple[Path, Path], sets: SetOptions, asked: AttributeSetup, saved: Path | None
) -> int:
    """Runs `torchreach attribute`; the exit status."""
    with_pictures(setup)
    device = device_of(setup)
    original, compressed = load(paths[0]).to(device), compressed_of(paths).to(device)
    inputs, kept = input_set(setup, sets, paths, original, device), None
    show.print_line(setup.out, f"input set: {inputs.text}")
    limits = None if setup.budget == Budget() else setup.budget
    if limits is not None and limits.seconds is not None and asked.keep_float is not None:
        limits = replace(limits, seconds=limits.seconds / 2)
    with first_interrupt() as pressed, watched(setup, "attribute") as live:
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
        keep(kept.network, saved, inputs.stars.shape)
        show.print_line(setup.out, f"mixed network: {saved}")
    if setup.output is not None:
        networks = described(paths, (original, compressed))
        settings, seconds = setup.settings(**asdict(asked)), time.monotonic() - setup.began
        files = attribution_files(found, kept, inputs, networks, setup.command_line, settings, seconds)
        write_files(setup.output, files)
        show.print_line(setup.out, f"report: {setup.output / 'report.json'}")
    if kept is not None:
        show.print_sentence(setup.out, kept_sentence(kept), kept.satisfied, not kept.satisfied)
    ok = kept is None or kept.satisfied
    return status_of(setup, ok, bool(pressed))
