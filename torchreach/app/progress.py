"""Progress of long work in scripts and notebooks.

>>> with tr.show_progress() as progress:
...     found = tr.discrepancy(original, compressed, stars, progress=progress)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from torchreach.app.console import Live, live
from torchreach.app.live_page import LivePage
from torchreach.core.repaired import RepairStep
from torchreach.core.results import Progress

Show = Callable[[Progress | RepairStep], None]


@contextmanager
def show_progress(
    what: str = "comparing",
    console: Console | None = None,
    *,
    html: str | Path | None = None,
    seconds: float | None = None,
) -> Iterator[Show]:
    """A `progress` callback for every verb that takes one, shown while the block runs.

    One line that is kept up to date in terminals, and in notebooks where tqdm is installed; elsewhere a line after two
    seconds, and then at growing intervals of up to a minute.

    Args:
        console: where to write; standard error by default.
        html: also a page at this path, which reloads itself, says how much of `seconds` is left, and draws how the
            interval closes.
    """
    console = console or Console(stderr=True)
    if console.is_jupyter:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            with tqdm(bar_format="{desc}", desc=f"{what} ...") as bar:
                page = None if html is None else LivePage(Path(html), what, seconds)
                yield _shown(Live(what, bar.set_description_str, page))
                if page is not None:
                    page.write(over=True)
            return
    with live(console, what, None if html is None else Path(html), seconds) as line:
        yield _shown(line)


def _shown(line: Live) -> Show:
    return lambda state: line.step(state) if isinstance(state, RepairStep) else line.stars(state)
