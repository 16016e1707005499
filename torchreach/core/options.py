"""Options, as small frozen values. There are no global settings and no environment switches."""

from __future__ import annotations

from dataclasses import dataclass

from torchreach.core.errors import OptionError

METHODS = ("auto", "vertices", "programs")
ROOT_BOUNDS = ("auto", "lirpa", "zonotope", "interval", "none")
SPLITS = ("auto", "inputs", "signs")


@dataclass(frozen=True)
class Exact:
    """Exact enumeration of linear regions.

    Attributes:
        method: "vertices" (facet-vertex batches, no linear programs; for low input dimension), "programs"
            (batched linear programs), or "auto" (chosen from the number of predicate variables).
        root_bounds: pre-activation bounds taken once per input star, before any split: "lirpa"
            (auto_LiRPA's CROWN), "zonotope" or "interval" (torchreach's own), "none", or "auto": zonotopes,
            and auto_LiRPA besides where the linear programs it saves cost more than it does, or where a
            budget may end the run early. "lirpa" falls back to zonotopes where auto_LiRPA is not installed.
    """

    method: str = "auto"
    root_bounds: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"Exact.method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.root_bounds not in ROOT_BOUNDS:
            raise OptionError(f"Exact.root_bounds must be one of {', '.join(ROOT_BOUNDS)}, got {self.root_bounds!r}")


@dataclass(frozen=True)
class Search:
    """Branch and bound on the difference of two networks.

    Attributes:
        split: "inputs" (halves boxes and enumerates the small ones; effort grows exponentially in the number of
            inputs that vary), "signs" (splits on the signs of single neurons; for many inputs, and networks of one
            architecture), or "auto": inputs up to five that vary, and where signs cannot be split.
        seed: of the random starts of the witness search.
    """

    split: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise OptionError(f"Search.split must be one of {', '.join(SPLITS)}, got {self.split!r}")


@dataclass(frozen=True)
class Budget:
    """When to stop; a spent budget gives a valid, wider interval with status BOUNDED.

    Attributes:
        seconds: wall-clock limit, None for no limit.
        stars: limit on enumerated output stars, and on the branches of each star's search; None for no limit.
        memory: bytes for open stars, kept stars and the work on them, or for the open branches of a search, on the
            device of the stars; None for half of what is free there when the run starts. Little memory means
            smaller batches first.
    """

    seconds: float | None = None
    stars: int | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "stars", "memory"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise OptionError(f"Budget.{name} must be positive or None, got {value!r}")
