"""What the command line prints: tables and the verdict on stdout, progress on stderr where it is a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from torchreach.app.live_page import LivePage
from torchreach.app.verdict import Verdict, open_reasons, star_status, uncovered, work, worst_first
from torchreach.core.outward import at_least, at_most, counted, span
from torchreach.core.repaired import RepairStep
from torchreach.core.results import Answer, Attribution, Discrepancy, Equivalence, Progress
from torchreach.core.terms import Kernels, Status

if TYPE_CHECKING:
    from torchreach.app.report.content import Report

MOST_TABLES = 3  # with more input stars than this, one table with a row for each
MOST_ROWS = 20
FIRST, MOST = 2.0, 60.0  # seconds before the first line of progress in a log; at most between two


@dataclass(frozen=True)
class Live:
    """Progress: one line kept up to date, or where there is no terminal, a line now and then; and a page, if asked."""

    what: str
    write: Callable[[str], None]
    page: LivePage | None = None

    def say(self, text: str) -> None:
        """One line."""
        self.write(f"{self.what}: {text}")
        if self.page is not None:
            self.page.say(text)

    def stars(self, progress: Progress) -> None:
        """Progress of one enumeration."""
        if self.page is not None:
            self.page.interval(*ends_of(progress))
        self.say(progress_line(progress))

    def count(self, done: int, most: int) -> None:
        """Progress by numbers alone."""
        self.say(f"comparison {done} of at most {most}")

    def inputs(self, done: int, most: int) -> None:
        """Progress over a test set."""
        self.say(f"{done:,} of {counted(most, 'input')}")

    def step(self, step: RepairStep) -> None:
        """Progress of a repair: its last evaluation."""
        bound = at_most(float(step.discrepancy.upper.max()), 4)
        accuracy = "" if step.accuracy is None else f", accuracy {100 * step.accuracy:.1f} %"
        claim = step.discrepancy.claim
        if self.page is not None:
            self.page.interval(float(step.discrepancy.lower.max()), float(step.discrepancy.upper.max()))
        self.say(f"iteration {step.iteration} ({step.method}), {claim} max |y1 - y2| <= {bound}{accuracy}")


@dataclass
class Log:
    """Progress where there is no terminal: the newest line, or that work goes on, at growing intervals."""

    what: str
    write: Callable[[str], None]
    now: Callable[[], float] = time.monotonic
    newest: list[str] = field(default_factory=list)

    def keep(self, text: str) -> None:
        """To be written when a line is due, unless a newer one comes."""
        self.newest[:] = [text]

    def run(self, wait: Callable[[float], object]) -> None:
        """Writes until `wait`, which takes seconds, says that the work is over."""
        began, pause = self.now(), FIRST
        while not wait(pause):
            pause = min(2 * pause, MOST)
            self.write(self.newest.pop() if self.newest else f"{self.what}: working, {self.now() - began:.0f} s")


@contextmanager
def live(console: Console, what: str, path: Path | None = None, seconds: float | None = None) -> Iterator[Live]:
    """Progress on `console`: where that is not a terminal, lines as `Log` has them, and none of what is over sooner.

    The lines come from a thread, for long steps report nothing until they end. path: also in an HTML page there, which
    says how much of `seconds` is left.
    """
    page = None if path is None else LivePage(path, what, seconds)
    try:
        with _lines(console, what) as write:
            yield Live(what, write, page)
    finally:
        if page is not None:
            page.write(over=True)


@contextmanager
def _lines(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    if console.is_terminal:
        with console.status(f"{what} ...") as line:
            yield line.update
        return
    log, over = Log(what, lambda text: print_line(console, text)), threading.Event()
    thread = threading.Thread(target=log.run, args=(over.wait,), name="torchreach progress", daemon=True)
    thread.start()
    try:
        yield log.keep
    finally:
        over.set()
        thread.join()


def ends_of(progress: Progress) -> tuple[float, float]:
    """What is attained and certified so far of max |y1 - y2|."""
    attained = max(float(progress.attained_upper.max()), -float(progress.attained_lower.min()), 0.0)
    return attained, max(float(progress.upper.max()), -float(progress.lower.min()))


def progress_line(progress: Progress) -> str:
    """Work done and open, and the interval so far around max |y1 - y2|."""
    attained, bound = ends_of(progress)
    return (
        f"{counted(progress.done, progress.unit)} done, {progress.open:,} open, "
        f"max |y1 - y2| in {span(attained, bound, 4)}, {progress.seconds:.1f} s"
    )


def label_counts(found: Equivalence) -> str:
    """On how many sets two networks certainly give one label, and on how many an input shows that they do not."""
    same, size = found.count(Answer.EQUIVALENT), len(found.answer)
    differ = found.count(Answer.NOT_EQUIVALENT)
    parts = [
        f"certainly the same on {same} of {size} sets",
        f"an input tells them apart on {differ}" * (differ > 0),
        f"open on {size - same - differ}" * (same + differ < size),
    ]
    return ", ".join(part for part in parts if part)


def print_discrepancy(
    console: Console,
    found: Discrepancy,
    labels: tuple[str, ...],
    title: str = "",
    tolerance: float | None = None,
) -> None:
    """A table per input star, or one for all where there are many, the worst first."""
    if title:
        console.print(Text(title, style="bold"))
    if len(labels) > MOST_TABLES:
        console.print(_summary(found, labels, tolerance))
    else:
        for s, label in enumerate(labels):
            console.print(_star_table(found, s, label, tolerance))


def print_reading(console: Console, found: Discrepancy) -> None:
    """Semantics, kernels and layers that are not covered, why work ended early, and what work was done."""
    lines = {"semantics": f"{found.semantics}: {found.semantics.meaning}"}
    if found.kernels is not Kernels.NONE:
        lines["kernels"] = f"{found.kernels}: {found.kernels.meaning}"
    if found.uncovered:
        lines["not covered"] = uncovered(found)
    for reason, number in open_reasons(found).items():
        lines[f"{reason}"] = f"on {counted(number, 'star')}, {reason.meaning}; {reason.cure}"
    lines["work"] = work(found)
    if found.stats.fallback:
        lines["no search"] = found.stats.fallback
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(name, Text(text))
    console.print(table)


def print_comparison(console: Console, before: Discrepancy, after: Discrepancy, labels: tuple[str, ...]) -> None:
    """Per input star: the upper bound before and after repair."""
    claim = after.claim if before.claim == after.claim else "computed"
    console.print(Text(f"{claim} bound on max |y1 - y2|, before and after repair", style="bold"))
    table = _table("input star", "before", "after", "ratio", "status")
    for s in worst_first(after.max_lower, after.max_upper, None)[:MOST_ROWS]:
        old, new = float(before.max_upper[s]), float(after.max_upper[s])
        factor = at_most(new / old, 3) if old > 0 else "-"
        table.add_row(Text(labels[s]), at_most(old), at_most(new), factor, star_status(after, s))
    if len(labels) > MOST_ROWS:
        table.caption = f"the worst {MOST_ROWS} of {len(labels)} stars; --output writes all"
    console.print(table)
    print_reading(console, after)


def print_line(console: Console, text: str) -> None:
    """One line of text as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_verdict(console: Console, verdict: Verdict) -> None:
    """The answer in one line, unwrapped, so that it can be searched for."""
    print_sentence(console, verdict.text, verdict.ok, verdict.open)


def print_sentence(console: Console, text: str, ok: bool, undecided: bool) -> None:
    """An answer in one line, in the colour of yes, no or neither."""
    color = "green" if ok else "yellow" if undecided else "red"
    console.print(Text(text, style=f"bold {color}"), soft_wrap=True)


def print_equivalence(console: Console, found: Equivalence, labels: tuple[str, ...]) -> None:
    """A row per input star: the answer, and the interval it rests on."""
    what = "lead over the label in" if found.epsilon is None else "max |y1 - y2| in"
    table = _table("input star", "answer", what, "label" if found.label is not None else "")
    for s, label in enumerate(labels[:MOST_ROWS]):
        interval = span(float(found.lower[s]), float(found.upper[s]))
        own = "" if found.label is None else str(int(found.label[s]))
        table.add_row(Text(label), found.answer[s].value, interval, own)
    if len(labels) > MOST_ROWS:
        table.caption = f"the first {MOST_ROWS} of {len(labels)} stars; --output writes all"
    console.print(table)


def print_rows(console: Console, rows: Mapping[str, str], title: str) -> None:
    """A row for each name and what is said of it."""
    table = _table("what", "found", title=title)
    for name, text in rows.items():
        table.add_row(Text(name), Text(text))
    console.print(table)


def print_attribution(console: Console, found: Attribution) -> None:
    """A row per layer: the difference it makes alone, certified beside sampled, and that of all layers up to it."""
    columns = ("layer", found.alone[0].claim, "attained", "sampled", "mean", "SQNR dB", "with those before")
    table = _table(*columns, title="max |y1 - y2|, one layer compressed")
    for k, name in enumerate(found.layers):
        alone, upper = found.alone[k], float(found.cumulative[k].upper.max())
        ends = at_most(float(alone.upper.max())), at_least(float(alone.lower.max()))
        most, mean = at_least(float(found.sampled_max[k])), f"{float(found.sampled_mean[k]):.3g}"
        table.add_row(Text(name), *ends, most, mean, f"{float(found.sqnr[k]):.1f}", at_most(upper))
    console.print(table)


def print_witness(console: Console, report: Report, found: Discrepancy, values: tuple[Tensor, Tensor]) -> None:
    """The input that attains the verdict's lower bound, and both networks' outputs there."""
    star, output = report.verdict.witness
    title = f"witness, an input of {report.inputs.labels[star]} for output {output}"
    print_values(console, title, found.witness[star, output], values)


def print_values(console: Console, title: str, x: Tensor, values: tuple[Tensor, Tensor]) -> None:
    """An input, and both networks' outputs there."""
    print_line(console, f"{title}:")
    print_line(console, f"  x  = {_vector(x)}")
    for name, value in zip(("y1", "y2"), values, strict=True):
        print_line(console, f"  {name} = {_vector(value)}")


def _star_table(found: Discrepancy, s: int, label: str, tolerance: float | None) -> Table:
    table = _table("output", "max |y1 - y2| in", "y1 - y2 in", title=f"{label} ({star_status(found, s)})")
    for n in worst_first(found.lower[s], found.upper[s], tolerance)[:MOST_ROWS]:
        signed = span(float(found.range_lower[s, n]), float(found.range_upper[s, n]))
        table.add_row(str(n), span(float(found.lower[s, n]), float(found.upper[s, n])), signed)
    if found.lower.shape[1] > MOST_ROWS:
        table.caption = f"the worst {MOST_ROWS} of {found.lower.shape[1]} outputs; --output writes all"
    return table


def _summary(found: Discrepancy, labels: tuple[str, ...], tolerance: float | None) -> Table:
    table = _table("input star", "max |y1 - y2| in", "at output", "status")
    worst = found.upper.argmax(1).tolist()
    for s in worst_first(found.max_lower, found.max_upper, tolerance)[:MOST_ROWS]:
        interval = span(float(found.max_lower[s]), float(found.max_upper[s]))
        table.add_row(Text(labels[s]), interval, str(worst[s]), star_status(found, s))
    if len(labels) > MOST_ROWS:
        open_ = sum(status is not Status.EXACT for status in found.status)
        table.caption = f"the worst {MOST_ROWS} of {len(labels)} stars, {open_} BOUNDED; --output writes all"
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    from rich import box

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _vector(values: Tensor) -> str:
    flat = values.flatten().tolist()
    if len(flat) > 16:
        return f"{len(flat)} values (--output writes them to report.json)"
    return "[" + ", ".join(f"{value:.9g}" for value in flat) + "]"
