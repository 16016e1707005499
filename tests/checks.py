"""What must hold of every comparison, of every path and budget."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchreach as tr
from torchreach.core.results import Reason

# Inputs [B, *shape] -> y1 - y2 [B, N] of the networks as given, in float64.
Differences = Callable[[Tensor], Tensor]


def assert_attained(found: tr.Discrepancy, differences: Differences, stars: tr.StarBatch) -> None:
    """`lower` is at least |y1 - y2| at the centre and at each witness, and is attained there; `upper` is above both."""
    assert found.witness.dtype == stars.dtype
    slack = 1e-6 + 2 * torch.finfo(found.lower.dtype).eps * found.upper.abs().double()
    lower, upper = found.lower.double(), found.upper.double()
    centre = differences(stars.center).abs()
    assert bool((lower >= centre - slack).all())
    witnessed = differences(found.witness.flatten(0, 1)).abs().unflatten(0, found.witness.shape[:2])
    value = witnessed.diagonal(dim1=1, dim2=2)
    assert bool((value >= lower - slack).all() and (lower >= value - slack).all())
    assert bool((witnessed <= upper[:, None] + slack[:, None]).all())
    assert bool((lower <= upper).all())


def assert_valid(found: tr.Discrepancy, differences: Differences, stars: tr.StarBatch, samples: int = 200) -> None:
    """`assert_attained`, no sample outside of the interval, status and reasons that fit it."""
    assert_attained(found, differences, stars)
    x = stars.sample(samples)
    y = differences(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    slack = 1e-6 * (1 + y.abs())
    assert bool((y >= found.range_lower.double()[:, None] - slack).all())
    assert bool((y <= found.range_upper.double()[:, None] + slack).all())
    assert len(found.reasons) == len(found.status) == len(stars)
    for status, reason in zip(found.status, found.reasons, strict=True):
        assert status is tr.Status.EXACT or reason is not Reason.CLOSED


DOCS = Path(__file__).resolve().parents[1] / "docs"


def examples_of(page: str) -> list[tuple[str, str | None]]:
    """The Python blocks of a page of docs/, each with the block of text behind it that says what it prints."""
    text = (DOCS / page).read_text()
    found = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, flags=re.DOTALL)
    return [(code, says or None) for code, says in found]


def run(page: str, codes: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Names that these blocks of a page leave behind, run in turn, and what each prints; torch's state is kept."""
    names: dict[str, Any] = {}
    printed: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for code in codes:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, f"docs/{page}", "exec"), names)
            printed.append(out.getvalue())
    return names, printed


def run_example(page: str, number: int) -> dict[str, Any]:
    """Names that the Python block of this number of a page of docs/ leaves behind."""
    return run(page, [examples_of(page)[number][0]])[0]
