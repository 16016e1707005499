"""Where a command's work is done and kept: options of the verbs, as the command line names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Places:
    """checkpoint: a folder to go on from. ray: a cluster to work on."""

    checkpoint: Path | None = None
    ray: str | None = None

    def options(self, part: str = "") -> dict[str, Any]:
        """What a verb is given. part: a folder inside the checkpoint, of a command that asks several questions."""
        return {"checkpoint": self.checkpoint and self.checkpoint / part, "ray": self.ray}
