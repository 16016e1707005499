"""`report.html`: one file without external resources; styles inline, pictures as data."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

from torchreach.app.report.content import Report, Values, versions
from torchreach.app.report.pictures import MOST_PANELS
from torchreach.app.report.provenance import bounds, stars_hash
from torchreach.app.verdict import open_reasons, regions, star_status, uncovered, worst_first
from torchreach.core.outward import at_least, at_most, counted, span
from torchreach.core.results import Discrepancy
from torchreach.core.terms import Kernels, Status

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #1f2933; font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 2rem auto; padding: 2rem 2.5rem 2.5rem; background: #fff;
  border: 1px solid #e1e5ea; border-radius: 10px; }
h1 { font-size: 1.45rem; margin: 0 0 1rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h1 small { color: #6b7785; font-weight: 400; font-size: 1rem; }
.verdict { padding: .9rem 1.2rem; border-radius: 8px; border-left: 6px solid; font-size: 1.05rem; }
.good { background: #e8f5ee; border-color: #2a7f62; } .bad { background: #fdecea; border-color: #c0392b; }
.open { background: #fff6e5; border-color: #d9822b; }
.verdict b { display: block; text-transform: uppercase; letter-spacing: .06em; font-size: .8rem; }
.good b { color: #2a7f62; } .bad b { color: #c0392b; } .open b { color: #a35a10; }
.scroll { overflow-x: auto; } tr.beyond td { color: #c0392b; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #e8ebef; white-space: nowrap; }
th { color: #52606d; font-weight: 600; border-bottom: 2px solid #cfd6dd; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.wrap { white-space: normal; text-align: left; overflow-wrap: anywhere; } th.left { text-align: left; }
img { width: 100%; height: auto; } figure { margin: 0; } figcaption { color: #52606d; font-size: .9rem; }
pre { background: #f4f5f7; border: 1px solid #e1e5ea; border-radius: 6px; padding: .8rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere;
  font: .88rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
details { margin: .5rem 0; } summary { cursor: pointer; color: #33567a; }
details details, details > p, details > .scroll { margin-left: .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .6rem 0; font-size: .92rem; }
dt { color: #52606d; font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .85em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; color: #6b7785; font-size: .85rem; }
@media (max-width: 34rem) {
  main { margin: 0; padding: 1rem .8rem 1.5rem; border: 0; border-radius: 0; } h1 { font-size: 1.2rem; }
  h1 small { display: block; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  table { font-size: .8rem; } th, td { padding: .3rem .25rem; white-space: normal; }
  td.wrap { min-width: 6rem; } figure img { width: 34rem; max-width: none; }
  figure img.wide { width: 46rem; }
  details details, details > p, details > .scroll { margin-left: 0; }
}
"""
_OPEN, _MOST = 20, 200  # rows that are shown at once, and at all
_FEW_INPUTS = 16
_TITLES = {
    "compare": "Comparison of two networks",
    "repair": "Repair of a compressed network",
    "demo": "Compression and repair of a digit classifier",
}
_CAPTIONS = {
    "ranges.png": "Per output: the range of the difference y1 − y2, original minus {other}, over the whole set (bar); "
    "the number below is the original's score at the centre of the set.",
    "repair.png": "Upper bound of the discrepancy, and accuracy where a test set is known, at each repair iteration. "
    "Iteration 0 is the compressed network as given.",
}


def html_page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page. `pictures`: PNG contents by name, shown in order."""
    body = [
        f"<h1>{_TITLES[report.command]} <small>torchreach</small></h1>",
        _verdict(report),
        f"<p>{_meaning(report)}</p>",
        _reading(report.answer),
        "<h2>Networks</h2>",
        _networks(report),
        "<h2>Per input star</h2>",
        _stars(report),
        *(_figure(report, name, data) for name, data in pictures.items()),
        "<h2>Every output</h2>",
        _outputs(report),
        "<h2>How it was computed</h2>",
        _work(report),
        "<h2>What this page is about</h2>",
        _identity(report),
        "<h2>Run it again</h2>",
        f"<pre>{escape(report.command_line)}</pre>",
        "<footer>All numbers and witnesses are in report.json; report.csv has a row per star and output.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>torchreach: {escape(report.verdict.state.value)}</title><style>{_STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    verdict = report.verdict
    kind = "good" if verdict.ok else "open" if verdict.open else "bad"
    head, _, rest = verdict.text.partition(": ")
    return f'<div class="verdict {kind}"><b>{escape(head)}</b>{escape(rest)}</div>'


def _meaning(report: Report) -> str:
    found = report.answer
    start = (
        f"y1 is the output of the original network, y2 that of the {_other(report)} one. The input set is "
        f"<b>{escape(report.inputs.text)}</b>. "
    )
    attained = "; the lower end is attained at an input that was found and evaluated."
    if found.uncovered:
        why = f"The upper end of each interval below holds for {found.kernels} alone: {uncovered(found)}"
        return start + escape(why) + attained
    return (
        start + "For <b>every</b> input of the set, not for a sample, |y1 − y2| is at most the upper end of each "
        "interval below" + attained
    )


def _other(report: Report) -> str:
    return "compressed" if report.repaired is None else "repaired"


def _reading(found: Discrepancy) -> str:
    """What the numbers speak of, and why work ended where they are not exact: from typed fields alone."""
    rows = {"semantics": f"{found.semantics}: {found.semantics.meaning}"}
    if found.kernels is not Kernels.NONE:
        rows["kernels"] = f"{found.kernels}: {found.kernels.meaning}"
    if found.uncovered:
        rows["not covered"] = uncovered(found)
    for status in Status:
        number = found.status.count(status)
        if number:
            rows[status.name] = f"{counted(number, 'star')}: {status.meaning}"
    for reason, number in open_reasons(found).items():
        rows[f"ended: {reason}"] = f"{counted(number, 'star')}: {reason.meaning}; {reason.cure}"
    return _list({name: escape(text) for name, text in rows.items()})


def _networks(report: Report) -> str:
    accuracy = any(n.accuracy is not None for n in report.networks.values())
    head = ["network", "file or origin", "layers", "parameters", "nonzero"] + ["accuracy"] * accuracy
    rows = []
    for role, network in report.networks.items():
        row = [
            role,
            escape(network.name),
            escape(_architecture(network.layers)),
            f"{network.parameters:,}",
            f"{network.nonzero:,}",
        ]
        if accuracy:
            row.append("" if network.accuracy is None else f"{100 * network.accuracy:.2f} %")
        rows.append(row)
    return _table(head, rows, wrap=(1, 2))


def _architecture(layers: tuple[str, ...]) -> str:
    """The layers in short: widths where all are fully connected."""
    linear = [layer.split()[1].split("-") for layer in layers if layer.startswith("Linear ")]
    if not linear or not all(layer.startswith(("Linear ", "ReLU", "Flatten")) for layer in layers):
        return ", ".join(layers)
    return "fully connected, " + "-".join([linear[0][0], *(out for _, out in linear)])


def _stars(report: Report) -> str:
    found, answer = report.found, report.answer
    if report.repaired is None:
        head = ["input star", "max |y1 − y2|: attained", f"{found.claim} ≤", "status"]
    else:
        head = [
            "input star",
            f"before: {found.claim} ≤",
            "status",
            f"after: {answer.claim} ≤",
            "status",
            "after / before",
        ]
    rows = []
    for s in _order(report):
        old, status = float(found.max_upper[s]), escape(star_status(found, s))
        row = [escape(report.inputs.labels[s]), at_most(old), status]
        if report.repaired is None:
            row.insert(1, at_least(float(found.max_lower[s])))
        else:
            new = float(answer.max_upper[s])
            row += [at_most(new), escape(star_status(answer, s)), at_most(new / old, 3) if old > 0 else "–"]
        rows.append(row)
    return _folded(head, rows, "star", _beyond(report, answer.max_lower))


def _beyond(report: Report, lower: Tensor) -> int:
    """How many of these exceed the tolerance or target by what they attain: the first rows."""
    asked = report.verdict.tolerance
    return 0 if asked is None else int((lower > asked).sum())


def _order(report: Report) -> list[int]:
    return worst_first(report.answer.max_lower, report.answer.max_upper, report.verdict.tolerance)


def _outputs(report: Report) -> str:
    boxes = bounds(report.inputs.stars)
    opened = " open" if len(report.inputs.labels) == 1 else ""
    stars = [
        f"<details{opened}><summary>{escape(report.inputs.labels[s])}</summary><p>{_box(boxes[s])}</p>"
        + "".join(_output_table(report, role, s) for role in report.results)
        + "</details>"
        for s in _order(report)[:_MOST]
    ]
    rest = "".join(stars[_OPEN:])
    more = f"<details><summary>{counted(len(stars) - _OPEN, 'more star')}</summary>{rest}</details>" if rest else ""
    return "".join(stars[:_OPEN]) + more + _left_out(len(report.inputs.labels), "star")


def _output_table(report: Report, role: str, s: int) -> str:
    found, values = report.results[role], report.values.get(role)
    head = ["output", "max |y1 − y2| in", "y1 − y2 in"] + ["y1 at its witness", "y2 there"] * (values is not None)
    order = worst_first(found.lower[s], found.upper[s], report.verdict.tolerance)
    rows = []
    for n in order:
        row = [
            str(n),
            span(float(found.lower[s, n]), float(found.upper[s, n])),
            span(float(found.range_lower[s, n]), float(found.range_upper[s, n])),
        ]
        rows.append(row + _pair(values, s, n))
    title = f"<p>{role} network</p>" if len(report.results) > 1 else ""
    return title + _folded(head, rows, "output", _beyond(report, found.lower[s])) + _witness(found, s, order[0])


def _pair(values: Values | None, s: int, n: int) -> list[str]:
    """y1 and y2, with so many decimals that their difference is seen to four digits."""
    if values is None:
        return []
    y1, y2 = float(values[0][s, n]), float(values[1][s, n])
    decimals = 9 if y1 == y2 else min(15, max(0, 3 - math.floor(math.log10(abs(y1 - y2)))))
    return [f"{y:.{decimals}f}" for y in (y1, y2)]


def _witness(found: Discrepancy, s: int, n: int) -> str:
    x = found.witness[s, n].flatten().tolist()
    if len(x) > _FEW_INPUTS:
        return ""
    return f"<p>witness of output {n}: x = <code>[{', '.join(f'{value:.9g}' for value in x)}]</code></p>"


def _box(box: Mapping[str, Any]) -> str:
    """Bounds of the inputs, short where they are uniform or many."""
    low, high = box["lower"], box["upper"]
    kind = "box" if box["is_the_set"] else "smallest box around the set"
    if not isinstance(low, list) and not isinstance(high, list):
        return f"{kind}: every input in [{low:.6g}, {high:.6g}]"
    size = len(low) if isinstance(low, list) else len(high)
    low, high = (end if isinstance(end, list) else [end] * size for end in (low, high))
    varying = [i for i in range(size) if low[i] < high[i]]
    if len(varying) > _FEW_INPUTS:
        width = max(high[i] - low[i] for i in varying)
        return f"{kind}: {len(varying)} of {size} inputs vary, in ranges up to {width:.6g} wide; bounds in report.json"
    fixed = f"; the other {size - len(varying)} are fixed" if len(varying) < size else ""
    return f"{kind}: " + ", ".join(f"x[{i}] in [{low[i]:.6g}, {high[i]:.6g}]" for i in varying) + fixed


def _work(report: Report) -> str:
    columns = [_effort(found) for found in report.results.values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    head = ["against the original", *report.results]
    layers = [
        [
            layer.name,
            f"{layer.neurons:,}",
            f"{layer.stars:,}",
            f"{layer.splits:,}",
            f"{layer.linear_programs:,}",
            ", ".join(f"{test} {n:,}" for test, n in sorted(layer.settled.items())) or "0",
        ]
        for layer in report.found.stats.layers
    ]
    detail = ""
    if layers:
        top = ["layer", "neurons", "stars", "splits", "linear programs", "pairs settled by test"]
        detail = f"<details><summary>per layer, compressed network</summary>{_table(top, layers)}</details>"
    notes = [
        f"<p>{role}: no branch and bound, {escape(found.stats.fallback)}</p>"
        for role, found in report.results.items()
        if found.stats.fallback
    ]
    return _table(head, rows) + "".join(notes) + detail


def _effort(found: Discrepancy) -> dict[str, str]:
    stats, pieces = found.stats, regions(found)
    return {
        "engine": escape(stats.method),
        "root bounds": escape(stats.root_bounds),
        "enumerated": "not all" if pieces is None else counted(pieces, found.semantics.piece),
        "splits": f"{stats.splits:,}",
        "branches": f"{stats.branches:,}",
        "linear programs": f"{stats.linear_programs:,}",
        "of them for outputs": f"{stats.output_programs:,}",
        "time": f"{stats.seconds:.2f} s",
    }


def _identity(report: Report) -> str:
    """Everything that says which networks, which set, which machine."""
    stars = report.inputs.stars
    rows = {
        f"SHA-256, {role}": "<br>".join(f"{escape(name)}: <code>{sha}</code>" for name, sha in network.sha256.items())
        for role, network in report.networks.items()
        if network.sha256
    }
    rows["SHA-256, input set"] = f"<code>{stars_hash(stars)}</code>"
    rows["input set"] = (
        f"{counted(len(stars), 'star')} of shape {list(stars.shape)}, {counted(stars.dim, 'variable')} each, "
        f"{str(stars.dtype).removeprefix('torch.')} on {stars.device}"
    )
    rows["date"] = escape(report.date.isoformat(sep=" ", timespec="seconds"))
    rows["machine"] = escape(report.machine.text)
    if report.answer.kernels is not Kernels.NONE:
        rows["int8 engine"] = escape(report.machine.engine)
    rows["versions"] = escape(", ".join(f"{name} {version}" for name, version in versions().items()))
    rows["seed"] = str(report.settings.get("seed", "0, fixed"))
    rows["time"] = f"{report.seconds:.1f} s in all"
    return _list(rows)


def _figure(report: Report, name: str, data: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    number = len(report.inputs.labels)
    kind = "" if number == 1 and name == "ranges.png" else "class=wide "
    caption = _CAPTIONS[name].format(other=_other(report) if report.repaired is None else "the other network")
    if name == "ranges.png" and number > MOST_PANELS:
        caption += f" The {MOST_PANELS} worst of {number} stars."
    return (
        f'<h2>{"Ranges" if name == "ranges.png" else "Repair"}</h2><figure><div class="scroll"><img {kind}'
        f'alt="{escape(caption)}" src="{source}"></div><figcaption>{caption}</figcaption></figure>'
    )


def _list(rows: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in rows.items()) + "</dl>"


def _folded(head: list[str], rows: Sequence[list[str]], word: str, beyond: int) -> str:
    """A table whose first `beyond` rows are marked, and whose rows after `_OPEN` wait to be opened."""
    rest = rows[_OPEN:_MOST]
    more = ""
    if rest:
        folded = _table(head, rest, beyond=beyond - _OPEN)
        more = f"<details><summary>{counted(len(rest), f'more {word}')}</summary>{folded}</details>"
    return _table(head, rows[:_OPEN], beyond=beyond) + more + _left_out(len(rows), word)


def _left_out(number: int, word: str) -> str:
    return f"<p>{counted(number - _MOST, f'more {word}')} in report.csv.</p>" if number > _MOST else ""


def _table(head: list[str], rows: Sequence[list[str]], wrap: tuple[int, ...] = (), beyond: int = 0) -> str:
    top = "".join(f'<th class="left">{cell}</th>' if i in wrap else f"<th>{cell}</th>" for i, cell in enumerate(head))
    lines = (
        "".join(f'<td class="wrap">{c}</td>' if i in wrap else f"<td>{c}</td>" for i, c in enumerate(row))
        for row in rows
    )
    body = "".join(f"<tr{' class=beyond' * (i < beyond)}>{line}</tr>" for i, line in enumerate(lines))
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
