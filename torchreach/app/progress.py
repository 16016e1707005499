"""Progress of long work in scripts and notebooks.

>>> with tr.show_progress() as progress:
...     found = tr.discrepancy(original, compressed, stars, progress=progress)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from torchreach.app.console import Live, live
from torchreach.core.repaired import RepairStep
from torchreach.core.results import Progress

Show = Callable[[Progress | RepairStep], None]


@contextmanager
def show_progress(what: str = "comparing", console: Console | None = None) -> Iterator[Show]:
    """A `progress` callback for every verb that takes one, shown while the block runs.

    One line that is kept up to date in terminals, and in notebooks where tqdm is installed; elsewhere a line after two
    seconds, and then at growing intervals of up to a minute. console: where to write; standard error by default.
    """
    console = console or Console(stderr=True)
    if console.is_jupyter:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            with tqdm(bar_format="{desc}", desc=f"{what} ...") as bar:
                yield _shown(Live(what, bar.set_description_str))
            return
    with live(console, what) as line:
        yield _shown(line)


def _shown(line: Live) -> Show:
    return lambda state: line.step(state) if isinstance(state, RepairStep) else line.stars(state)
