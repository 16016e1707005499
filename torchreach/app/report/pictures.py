"""Pictures of a report, after the paper's Figures 2 and 3 (Mo, Yang, Lu, Xiang 2024).

Ranges: per output, the original's score y1 at the star's centre, written below, and the certified range of the
deviation y2 - y1 over the star, on its own scale: a good compression would be too thin to see beside the scores.
History: certified discrepancy and accuracy over the repair.
Attribution: the difference that each layer makes alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchreach.app.report.content import Report
from torchreach.app.verdict import worst_first
from torchreach.core.outward import at_most
from torchreach.core.results import Attribution, Discrepancy

ORIGINAL, BEFORE, AFTER, LIMIT, INK = "#222222", "#d9822b", "#2a7f62", "#c0392b", "#444444"
MOST_PANELS = 10
MOST_LETTERS = 32
TOO_FAR = 8.0  # a tolerance so many times the largest range would make all bars too thin to see


def ranges_picture(report: Report) -> bytes:
    """PNG: one panel per input star, at most ten: the worst ones, in their own order."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    answer, asked = report.answer, report.verdict.tolerance
    shown = sorted(worst_first(answer.max_lower, answer.max_upper, asked)[:MOST_PANELS])
    columns = 1 if len(shown) == 1 else 2
    rows = -(-len(shown) // columns)
    figure = _figure(7.5 if columns == 1 else 11, 0.9 + 2.5 * rows)
    colors = (BEFORE,) if report.repaired is None else (BEFORE, AFTER)
    results = list(zip(report.results.values(), colors, strict=True))
    drawn = asked is not None and asked <= TOO_FAR * _largest(answer, shown)
    for i, s in enumerate(shown):
        _star_panel(figure.add_subplot(rows, columns, i + 1), report, s, results, asked if drawn else None)
    handles: list[Any] = [
        Patch(color=color, label=f"{found.claim} range, {role} ({_short(report, role)})")
        for (role, found), color in zip(report.results.items(), colors, strict=True)
    ]
    if asked is not None:
        word = "tolerance" if report.repaired is None else "target"
        text = f"{word} ± {asked:.5g}" + ("" if drawn else ", beyond the scale")
        handles.append(Line2D([], [], color=LIMIT, lw=1, ls="--", label=text))
    figure.legend(handles=handles, loc="outside upper center", ncols=1 + columns, frameon=False)
    return _png(figure)


def _short(report: Report, role: str) -> str:
    name = Path(report.networks[role].name).name
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"


def _largest(found: Discrepancy, shown: list[int]) -> float:
    upper = found.upper[shown]
    return float(torch.where(upper.isfinite(), upper, 0.0).max())


def _star_panel(
    axes: Any, report: Report, s: int, results: Sequence[tuple[Discrepancy, str]], tolerance: float | None
) -> None:
    score = report.scores[s].cpu().double()
    place = torch.arange(len(score), dtype=torch.float64)
    width = 0.6 / len(results)
    notes = []
    axes.axhline(0, color=ORIGINAL, lw=1.1)
    for i, (found, color) in enumerate(results):
        at = place + (i - (len(results) - 1) / 2) * 1.1 * width
        low, high = found.range_lower[s].cpu().double(), found.range_upper[s].cpu().double()
        known = low.isfinite() & high.isfinite()  # a spent budget may leave an end open
        low, high = torch.where(known, low, 0.0), torch.where(known, high, 0.0)
        # the edge shows a range that is thinner than the pen
        axes.bar(at, high - low, width, bottom=low, color=color, edgecolor=color, lw=1.2)
        notes.append(at_most(float(found.upper[s].max()), 3))
    axes.use_sticky_edges = False  # bars that end away from zero need air beyond them
    if tolerance is not None:
        for limit in (-tolerance, tolerance):
            axes.axhline(limit, color=LIMIT, lw=1, ls="--")
    axes.set_title(f"{report.inputs.labels[s]}:  |y1 − y2| ≤ {' → '.join(notes)}", fontsize=9.5, loc="left")
    if len(score) <= 20:
        axes.set_xticks(range(len(score)), [f"{n}\n{value:.3g}" for n, value in enumerate(score.tolist())])
        axes.set_xlabel("output, and below it the original's score y1", fontsize=8, labelpad=1)
    else:
        axes.set_xlabel("output", fontsize=8, labelpad=1)
    axes.set_ylabel("y1 − y2", fontsize=8, labelpad=1)
    _plain(axes)
    if report.inputs.picture_shape is not None:
        inset = axes.inset_axes((1.01, 0.35, 0.16, 0.6))
        picture = report.inputs.stars.center[s].cpu().reshape(report.inputs.picture_shape)
        inset.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
        inset.set_xticks([])
        inset.set_yticks([])
        moved = report.inputs.stars.basis[s, 1:].abs().sum(0).cpu().reshape(picture.shape) > 0
        at = moved.nonzero()
        if len(at) < moved.numel():
            inset.scatter(at[:, 1], at[:, 0], marker="s", s=9, facecolors="none", edgecolors=LIMIT, lw=0.8)


def history_picture(report: Report) -> bytes:
    """PNG: upper bound of the discrepancy per star and over all (left), accuracy (right), over the iterations."""
    assert report.repaired is not None
    history = report.repaired.history
    steps = [step.iteration for step in history]
    per_star = torch.stack([step.discrepancy.max_upper for step in history]).cpu().double()
    known = [(step.iteration, step.accuracy) for step in history if step.accuracy is not None]
    figure = _figure(11 if known else 7.5, 3.8)
    axes = figure.add_subplot(1, 2 if known else 1, 1)
    if per_star.shape[1] > 1:
        axes.plot(steps, per_star, color=BEFORE, lw=0.8, alpha=0.5)
        axes.plot([], [], color=BEFORE, lw=0.8, label="each input star")
        axes.plot(steps, per_star.mean(1), color=ORIGINAL, lw=1.2, ls=":", label="mean over stars")
    axes.plot(steps, per_star.amax(1), color=AFTER, lw=2, marker="o", ms=4, label="largest")
    axes.axhline(report.settings["target_bound"], color=LIMIT, lw=1, ls="--", label="target")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("repair iteration")
    claims = {step.discrepancy.claim for step in history}
    axes.set_ylabel(f"{'certified' if claims == {'certified'} else 'computed'} bound on max |y1 − y2|")
    axes.set_title("Discrepancy", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    _whole_ticks(axes)
    if known:
        axes = figure.add_subplot(1, 2, 2)
        axes.plot(*zip(*known, strict=True), color=AFTER, lw=2, marker="o", ms=4, label="compressed, being repaired")
        original = report.networks["original"].accuracy
        if original is not None:
            axes.axhline(original, color=ORIGINAL, lw=1, ls="--", label="original network")
        values = [value for _, value in known] + ([original] if original is not None else [])
        axes.set_ylim(max(0.0, min(values) - 0.05), min(1.0, max(values) + 0.02))
        axes.set_xlabel("repair iteration")
        axes.set_ylabel("accuracy on the test set")
        axes.set_title("Accuracy", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        _plain(axes)
        _whole_ticks(axes)
    return _png(figure)


def attribution_picture(found: Attribution) -> bytes:
    """PNG: per layer, what is certified, attained and sampled of the difference it makes alone, over all stars."""
    figure = _figure(max(5.0, 1.6 + 0.45 * len(found.layers)), 3.8)
    axes = figure.add_subplot(1, 1, 1)
    place = range(len(found.layers))
    upper = [float(one.upper.max()) for one in found.alone]
    axes.bar(place, upper, 0.6, color=BEFORE, label=f"{found.alone[0].claim} bound")
    attained = [float(one.lower.max()) for one in found.alone]
    axes.plot(place, attained, color=AFTER, ls="", marker="_", ms=16, mew=2, label="attained by a witness")
    sampled = found.sampled_max.tolist()
    axes.plot(place, sampled, color=ORIGINAL, ls="", marker="o", ms=4, label="largest on random inputs")
    axes.set_xticks(place, found.layers, rotation=0 if len(found.layers) <= 8 else 90)
    axes.set_xlabel("layer that is compressed, all others as in the original")
    axes.set_ylabel("max |y1 − y2|")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    # Figure and its own canvas rather than pyplot: no global state, no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis="y", color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)


def _whole_ticks(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
