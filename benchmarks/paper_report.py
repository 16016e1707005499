"""What `benchmarks/paper.py` makes of its results: tables, pictures, and what they show to be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchreach.app.verdict import at_most

INK, BEFORE, AFTER = "#222222", "#d9822b", "#2a7f62"
COLOURS = ("#1f77b4", "#d9822b", "#2a7f62", "#8e44ad")
MARKS = "<!-- tables: written by benchmarks/paper.py -->", "<!-- end of tables -->"
NAMES = {
    "published": "the paper's networks, int8",
    "int8": "trained here, int8",
    "pruned": "trained here, 20 % of the weights, int8",
    "int4": "trained here, int4 weights",
}
# What the data's notes and the paper say of the published networks, in percent.
ACCURACY = {"published original": 97.1, "published compressed": 90.6}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table_2(published: dict[str, Any], recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of Table II: the paper's figures, and ours of the network as deployed."""
    before, after = published["before"], published["after"]
    rows = []
    for i, label in enumerate(published["labels"]):
        theirs = recorded[i]["published_setup_range"]
        ends = zip(theirs["lower"], theirs["upper"], before["range lower"][i], before["range upper"][i], strict=True)
        rows.append(
            {
                "image": i,
                "label": label,
                "published before": recorded[i]["published_mean_before"],
                "weights alone": recorded[i]["exact_dequantised"]["mean_of_midranges"],
                "before": before["mean of midranges"][i],
                "after": after["mean of midranges"][i],
                "maximum before": before["maximum"][i],
                "maximum after": after["maximum"][i],
                # labels whose true range the range reported by the paper's code does not contain
                "labels missed": sum(low < a or high > b for a, b, low, high in ends),
            }
        )
    return rows


def problems(results: dict[str, Any], quick: bool = False) -> list[str]:
    """What the results show to be wrong; a smoke run is too short for the rest."""
    found = []
    for kind, part in results["pairs"].items():
        for when in ("before", "after"):
            outside = part[f"kernels {when}"]["outside"]
            if outside:
                found.append(f"{kind}: {outside} sampled outputs outside of the certified range {when} repair")
        if part["reloaded"]["after"] != part["after"]:
            found.append(f"{kind}: the repaired network read from its file has another certificate")
        if not part["zeros kept"]:
            found.append(f"{kind}: a pruned weight came back") if kind == "pruned" else None
        if part["after"]["maximum"] and max(part["after"]["maximum"]) > max(part["before"]["maximum"]):
            found.append(f"{kind}: repair made the largest discrepancy worse")
    for row in results["triangle"]:
        if not row["holds"] or max(row["itself"]) > 1e-9:
            found.append(f"{row['network']}: the triangle inequality fails, or original and original differ")
    accuracy = {row["network"]: row["accuracy"] for row in results["pairs"]["published"]["table 1"]}
    for name, known in ACCURACY.items():
        if abs(accuracy[name] - known) > 0.05:
            found.append(f"{name}: accuracy {accuracy[name]:.2f} %, known {known} %")
    if quick:
        return found
    published = results["pairs"]["published"]
    before, after = published["before"]["maximum"], published["after"]["maximum"]
    if accuracy["published repaired"] < accuracy["published original"] - 0.1:
        found.append("published: accuracy after repair more than 0.1 points below the original's")
    if any(b > 2 / 3 * a for a, b in zip(before, after, strict=True)):
        found.append("published: an image keeps more than two thirds of its discrepancy")
    if 10 * mean(after) > mean(before):
        found.append("published: the mean discrepancy fell less than ten times")
    held = published["held out"]
    if 10 * mean(held["after"]) > mean(held["before"]):
        found.append("published: the mean discrepancy of held-out images fell less than ten times")
    return found


# -- the page -------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> str:
    """All tables in Markdown."""
    parts = report["pairs"]
    rows = [row for part in parts.values() for row in part["table 1"]]
    text = ["**Table I**", ""]
    text += markdown(
        ["network", "parameters", "of them zero weights", "file, KB", "accuracy, %"],
        [
            [
                f"{NAMES[(kind := row['network'].split()[0])]}: {row['network'].removeprefix(kind + ' ')}",
                f"{row['parameters']:,}",
                f"{row['zero weights']:,}",
                f"{row['size KB']:,.0f}",
                f"{row['accuracy']:.2f}",
            ]
            for row in rows
        ],
    )
    text += ["", "**Table II** (the paper's networks, four centre pixels ± 0.05)", ""]
    head = [
        "image",
        "published, before",
        "same formula, same input, weights alone",
        "same formula, deployed: before",
        "after",
        "certified max \\|y1 − y2\\|: before",
        "after",
        "labels that the published range misses",
    ]
    keys = ("published before", "weights alone", "before", "after", "maximum before", "maximum after")
    body = [
        [str(row["image"]), *(shown(key, row[key]) for key in keys), str(row["labels missed"])]
        for row in report["table 2"]
    ]
    means = [shown(key, mean([row[key] for row in report["table 2"]])) for key in keys]
    text += markdown(head, [*body, ["mean", *means, ""]])
    text += ["", "**All pairs**: largest certified |y1 − y2|, mean over the images (largest)", ""]
    text += markdown(
        ["compression", "semantics", "before", "after", "held-out images before", "after", "iteration kept"],
        [
            [
                NAMES[kind],
                part["after"]["semantics"],
                *(span(part[when]["maximum"]) for when in ("before", "after")),
                *(span(part["held out"][when]) for when in ("before", "after")),
                str(part["iteration"]),
            ]
            for kind, part in parts.items()
        ],
    )
    text += ["", "**Where the difference comes from** (the paper's networks; mean over the images of the largest)", ""]
    text += markdown(
        [
            "int8 network",
            "original and itself",
            "original and weights alone",
            "weights alone and deployed",
            "original and deployed",
        ],
        [
            [row["network"], *(bound(mean(row[side])) for side in ("itself", "weights", "rounding", "both"))]
            for row in report["triangle"]
        ],
    )
    text += [
        "",
        "**Steps and alpha** (certified max |y1 − y2|, mean over the images, of the network kept after iteration n)",
        "",
    ]
    text += steps_table(report["curves"])
    return "\n".join(text)


def steps_table(curves: list[dict[str, Any]]) -> list[str]:
    last = min(len(curve["history"]) for curve in curves) - 1
    shown = [i for i in (0, 1, 2, 4, 8, 12) if i < last] + [last]
    rows = []
    for curve in curves:
        best = kept(curve["history"], "mean")
        accuracy = kept(curve["history"], "accuracy")[-1]
        values = [bound(best[i]) for i in shown] + [bound(best[-1]), str(len(best) - 1), f"{accuracy:.2f}"]
        rows.append([NAMES[curve["kind"]], curve["step"], f"{curve['alpha']:g}", *values])
    return markdown(["networks", "step", "alpha", *map(str, shown), "at the end", "iterations", "accuracy, %"], rows)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def span(values: list[float]) -> str:
    return f"{bound(mean(values))} ({bound(max(values))})"


def digits(value: float) -> str:
    return f"{value:.3g}"


def shown(key: str, value: float) -> str:
    return bound(value) if key.startswith("maximum") else digits(value)


def bound(value: float) -> str:
    """Rounded up, so that what is printed is certified too."""
    return at_most(value, 3)


def fill(page: Path, text: str) -> None:
    """Puts the tables between the marks of the page, if it has them."""
    if not page.exists():
        return
    old = page.read_text(encoding="utf-8")
    start, end = (old.find(mark) for mark in MARKS)
    if 0 <= start < end:
        page.write_text(old[: start + len(MARKS[0])] + "\n\n" + text + "\n\n" + old[end:], encoding="utf-8")


def rounded(value: Any) -> Any:
    """Seven significant digits, to the nearest: files that do not change with the last bit."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


# -- pictures -------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], folder: Path) -> None:
    """fig2.png, fig3.png and fig4.png."""
    save(figure_2(results["pairs"]["published"]), folder / "fig2.png")
    curves = [curve for curve in results["curves"] if curve["step"] == "pointwise"]
    save(over_epochs(curves, "mean", "mean over images of the certified max |y1 − y2|", log=True), folder / "fig3.png")
    save(over_epochs(curves, "accuracy", "accuracy on the 10,000 test images, %", log=False), folder / "fig4.png")


def figure_2(part: dict[str, Any]) -> Any:
    """Per image and label: the original's score, and where the deployed network's may lie, before and after."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    images = len(part["labels"])
    rows = -(-images // 5)
    figure = blank(14, 0.5 + 2.6 * rows)
    for i in range(images):
        axes = figure.add_subplot(rows, min(images, 5), i + 1)
        scores = part["scores"][i]
        for key, colour, shift in (("before", BEFORE, -0.17), ("after", AFTER, 0.17)):
            found = part[key]
            for label, score in enumerate(scores):
                # y1 - y2 in [low, high] puts y2 in [y1 - high, y1 - low]
                low, high = found["range lower"][i][label], found["range upper"][i][label]
                axes.bar(label + shift, high - low, 0.34, bottom=score - high, color=colour, lw=0)
                middle = score - (low + high) / 2
                axes.hlines(middle, label + shift - 0.17, label + shift + 0.17, colour, lw=1.6)
        axes.hlines(scores, [n - 0.42 for n in range(10)], [n + 0.42 for n in range(10)], INK, lw=0.9)
        worst = [
            max(part[key]["range upper"][i] + [-x for x in part[key]["range lower"][i]]) for key in ("before", "after")
        ]
        axes.set_title(
            f"image {i}, digit {part['labels'][i]}:  {bound(worst[0])} → {bound(worst[1])}", fontsize=9.5, loc="left"
        )
        axes.set_xticks(range(10))
        axes.use_sticky_edges = False  # bars that end away from zero need air beyond them
        axes.margins(y=0.06)
        if i % 5 == 0:
            axes.set_ylabel("score", fontsize=9)
        if i >= images - 5:
            axes.set_xlabel("label", fontsize=9)
        plain(axes)
    handles = [
        Line2D([], [], color=INK, lw=1, label="original network's score"),
        Patch(color=BEFORE, label="int8 network as shipped: certified range"),
        Patch(color=AFTER, label="repaired int8 network: certified range"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def over_epochs(curves: list[dict[str, Any]], key: str, label: str, log: bool) -> Any:
    """One panel per pair, one line per alpha: what every iteration led to, and the network kept so far."""
    kinds = list(dict.fromkeys(curve["kind"] for curve in curves))
    figure = blank(5.6 * len(kinds), 4.2)
    for place, kind in enumerate(kinds, 1):
        axes = figure.add_subplot(1, len(kinds), place)
        mine = [curve for curve in curves if curve["kind"] == kind]
        for curve, colour in zip(mine, COLOURS, strict=False):
            history = curve["history"]
            steps = [step["iteration"] for step in history]
            axes.plot(steps, [step[key] for step in history], "o", color=colour, ms=3.5, alpha=0.55)
            axes.plot(steps, kept(history, key), color=colour, lw=1.6, label=f"alpha = {curve['alpha']:g}")
        if log:
            axes.set_yscale("log")
            axes.set_yticks([0.2, 0.5, 1, 2, 5, 10])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set_title(f"{NAMES[kind]} ({mine[0]['images']} images)", fontsize=10, loc="left")
        axes.set_xlabel("epoch (iteration of repair; 1: calibration)", fontsize=9)
        axes.set_xticks(steps)
        if place == 1:
            axes.set_ylabel(label, fontsize=9)
            axes.legend(frameon=False, fontsize=9)
        plain(axes)
    return figure


def kept(history: list[dict[str, Any]], key: str) -> list[float]:
    """The value of the network that repair would return after each iteration: that of the smallest maximum so far."""
    best, line = history[0], []
    for step in history:
        best = step if step["maximum"] < best["maximum"] else best
        line.append(best[key])
    return line


def blank(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
