"""An HTML page of work that is going on: the line that terminals show, and how the interval closes; it reloads itself.

The page is one file without scripts that loads nothing else; it is replaced as a whole, once a second at most.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torchreach.core.files import whole
from torchreach.core.outward import at_least, at_most

EVERY, REFRESH = 1.0, 2  # seconds between two writes at least; of the page's own reloading
POINTS = 400  # of the picture; beyond, every second one is dropped
WIDTH, HEIGHT, EDGE = 640, 180, 8


@dataclass
class LivePage:
    """What is known of one run, and the file that says so.

    path: the page. what: the work. seconds: its budget; None for no limit. now: the clock, in seconds.
    """

    path: Path
    what: str
    seconds: float | None = None
    now: Callable[[], float] = time.monotonic
    began: float = field(init=False)
    text: str = field(default="", init=False)
    history: list[tuple[float, float, float]] = field(default_factory=list, init=False)  # seconds, attained, certified
    written: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        self.began = self.now()
        self.write(over=False)

    @property
    def elapsed(self) -> float:
        return self.now() - self.began

    def interval(self, attained: float, certified: float) -> None:
        """Another point of the picture: both ends of max |y1 - y2|; `say` writes it."""
        if math.isfinite(attained) and math.isfinite(certified):
            self.history.append((self.elapsed, attained, certified))
            if len(self.history) > POINTS:
                del self.history[1:-1:2]

    def say(self, text: str) -> None:
        """The newest line; the page is written where the last time is long enough ago."""
        self.text = text
        if self.elapsed - self.written >= EVERY:
            self.write(over=False)

    def write(self, *, over: bool) -> None:
        """The page as things are. over: the last time, without reloading."""
        self.written = self.elapsed
        with whole(self.path) as draft:
            draft.write_text(self.page(over=over), encoding="utf-8")

    def page(self, *, over: bool) -> str:
        """The HTML."""
        rows = {"time": f"{self.elapsed:.1f} s"}
        if self.seconds is not None and not over:
            rows["left of the budget"] = f"{max(0.0, self.seconds - self.elapsed):.1f} s"
        if self.history:
            _, low, high = self.history[-1]
            rows["attained"], rows["certified"] = at_least(low), at_most(high)
            rows["gap"] = at_most(max(0.0, high - low), 3)
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        refresh = "" if over else f'<meta http-equiv="refresh" content="{REFRESH}">'
        state = "finished" if over else "running"
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(self.what)}: {state}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 42rem; padding: 0 1rem }}
th {{ text-align: left; font-weight: normal; color: #666; padding-right: 1.5rem }}
svg {{ width: 100%; height: auto; margin-top: 1rem }} p {{ overflow-wrap: anywhere }}
</style></head><body>
<h1>torchreach {html.escape(self.what)}</h1>
<p><strong>{state}</strong>{": " if self.text else ""}{html.escape(self.text)}</p>
<table>{cells}</table>
{self.picture()}
</body></html>
"""

    def picture(self) -> str:
        """The interval over time, as an SVG; empty before two points."""
        if len(self.history) < 2:
            return ""
        last, top = self.history[-1][0] or 1.0, max(high for _, _, high in self.history) or 1.0

        def place(t: float, value: float) -> str:
            x = EDGE + (WIDTH - 2 * EDGE) * t / last
            return f"{x:.1f},{HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * value / top:.1f}"

        upper = [place(t, high) for t, _, high in self.history]
        lower = [place(t, low) for t, low, _ in self.history]
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="certified and attained over time">'
            f'<polygon points="{" ".join(upper + lower[::-1])}" fill="#d9822b" opacity=".25"/>'
            f'<polyline points="{" ".join(upper)}" fill="none" stroke="#c0392b" stroke-width="2"/>'
            f'<polyline points="{" ".join(lower)}" fill="none" stroke="#2a7f62" stroke-width="2"/></svg>'
            "<p>certified (red) and attained (green) over time</p>"
        )
