"""`report.html`: one file without external resources; styles inline, pictures as data."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from torchreach.results import Discrepancy
from torchreach.verdict import State, at_least, at_most, regions

if TYPE_CHECKING:
    from torchreach.report import Report

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
.scroll { overflow-x: auto; }
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
footer { margin-top: 2.5rem; color: #6b7785; font-size: .85rem; }
"""
_MOST_STARS = 200
_TITLES = {
    "compare": "Comparison of two networks",
    "repair": "Repair of a compressed network",
    "demo": "Compression and repair of a digit classifier",
}
_CAPTIONS = {
    "ranges.png": "Per output: the original network's score at the centre of the input set (number below), and the "
    "certified range of the other network's deviation y2 − y1 from it, over the whole set (bar).",
    "repair.png": "Certified discrepancy, and accuracy where a test set is known, at each repair iteration. "
    "Iteration 0 is the compressed network as given.",
}


def html_page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page. `pictures`: PNG contents by name, shown in order."""
    title = _TITLES[report.command]
    body = [
        f"<h1>{title} <small>torchreach</small></h1>",
        _verdict(report),
        f"<p>{_meaning(report)}</p>",
        "<h2>Networks</h2>",
        _networks(report),
        "<h2>Certified discrepancy per input star</h2>",
        _stars(report),
        *(_figure(name, data) for name, data in pictures.items()),
        "<h2>Every output</h2>",
        *_outputs(report),
        "<h2>How it was computed</h2>",
        _work(report),
        "<h2>Run it again</h2>",
        f"<pre>{escape(report.command_line)}</pre>",
        _footer(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>torchreach: {escape(report.verdict.state.value)}</title><style>{_STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    verdict = report.verdict
    kind = "good" if verdict.ok else "open" if verdict.state is State.UNDECIDED else "bad"
    head, _, rest = verdict.text.partition(": ")
    return f'<div class="verdict {kind}"><b>{escape(head)}</b>{escape(rest)}</div>'


def _meaning(report: Report) -> str:
    other = "repaired" if report.repaired else "compressed"
    return (
        f"y1 is the output of the original network, y2 that of the {other} one. The input set is "
        f"<b>{escape(report.inputs.text)}</b>. For <b>every</b> input of the set, not for a sample, |y1 − y2| is at "
        "most the upper end of each interval below; the lower end is attained at an input that was found and "
        "evaluated. Where the status is EXACT every linear region of the pair was enumerated and both ends meet up to "
        "rounding; where it is BOUNDED the analysis was stopped early and the interval is valid but wider. The numbers "
        "speak of the networks' weights as they are stored, in exact real arithmetic; rounding inside a floating-point "
        "or integer forward pass comes on top."
    )


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
    found, rows = report.found, []
    if report.repaired is None:
        head = ["input star", "max |y1 − y2|: attained", "certified ≤", "status"]
    else:
        head = ["input star", "before: certified ≤", "status", "after: certified ≤", "status", "after / before"]
    for s, label in enumerate(report.inputs.labels[:_MOST_STARS]):
        old, status = float(found.max_upper[s]), found.status[s].name
        row = [escape(label), at_most(old), status]
        if report.repaired is None:
            row.insert(1, at_least(float(found.max_lower[s])))
        else:
            after = report.repaired.after
            new = float(after.max_upper[s])
            row += [at_most(new), after.status[s].name, at_most(new / old, 3) if old > 0 else "–"]
        rows.append(row)
    left_out = len(report.inputs.labels) - len(rows)
    return _table(head, rows) + (f"<p>{left_out} more stars in report.json.</p>" if left_out else "")


def _outputs(report: Report) -> list[str]:
    results = [("", report.found)]
    if report.repaired is not None:
        results = [("<p>before repair</p>", report.found), ("<p>after repair</p>", report.repaired.after)]
    opened = " open" if len(report.inputs.labels) == 1 else ""
    return [
        f"<details{opened}><summary>{escape(label)}</summary>"
        + "".join(title + _output_table(found, s) for title, found in results)
        + "</details>"
        for s, label in enumerate(report.inputs.labels[:_MOST_STARS])
    ]


def _output_table(found: Discrepancy, s: int) -> str:
    rows = [
        [
            str(n),
            at_least(float(found.lower[s, n])),
            at_most(float(found.upper[s, n])),
            at_least(float(found.range_lower[s, n])),
            at_most(float(found.range_upper[s, n])),
        ]
        for n in range(found.lower.shape[1])
    ]
    return _table(["output", "|y1 − y2| attained", "|y1 − y2| certified ≤", "y1 − y2 ≥", "y1 − y2 ≤"], rows)


def _work(report: Report) -> str:
    results = [("compressed", report.found)]
    if report.repaired is not None:
        results.append(("repaired", report.repaired.after))
    rows = []
    for name, found in results:
        stats = found.stats
        count = regions(found)
        rows.append(
            [
                name,
                stats.method,
                escape(stats.root_bounds),
                "not all" if count is None else f"{count:,}",
                f"{stats.splits:,}",
                f"{stats.linear_programs:,}",
                f"{stats.seconds:.2f} s",
            ]
        )
    head = ["against the original", "engine", "root bounds", "regions", "splits", "linear programs", "time"]
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
    detail = _table(["layer", "neurons", "stars", "splits", "linear programs", "pairs settled by test"], layers)
    return _table(head, rows) + f"<details><summary>per layer, compressed network</summary>{detail}</details>"


def _footer(report: Report) -> str:
    import torch

    import torchreach

    stars = report.inputs.stars
    return (
        f"<footer>torchreach {torchreach.__version__}, torch {escape(torch.__version__)}, device {stars.device}, "
        f"{str(stars.dtype).removeprefix('torch.')}; {report.seconds:.1f} s in all. "
        "All numbers, with witnesses, are in report.json.</footer>"
    )


def _figure(name: str, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    caption = _CAPTIONS[name]
    return (
        f'<h2>{"Ranges" if name == "ranges.png" else "Repair"}</h2><figure><img alt="{escape(caption)}" '
        f'src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(head: list[str], rows: list[list[str]], wrap: tuple[int, ...] = ()) -> str:
    top = "".join(f'<th class="left">{cell}</th>' if i in wrap else f"<th>{cell}</th>" for i, cell in enumerate(head))
    lines = (
        "".join(f'<td class="wrap">{c}</td>' if i in wrap else f"<td>{c}</td>" for i, c in enumerate(row))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
