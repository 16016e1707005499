"""Input sets as the command line names them: a box, a VNN-LIB file, or a ball around given inputs.

Box grammar: `lower,upper` pairs, one per input, separated by semicolons, "0,1; -0.5,0.5"; or a .json, .npy
or .csv file holding the same numbers as an [X, 2] array.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchreach.errors import FileFormatError, InvalidSetError, OptionError, ShapeError
from torchreach.sets.star import StarBatch
from torchreach.sets.vnnlib import read_box
from torchreach.tolerances import round_down, round_up

BOX_FILES = (".json", ".npy", ".csv")


@dataclass(frozen=True)
class InputSet:
    """Input stars and how to speak of them.

    Attributes:
        kind: "box", "vnnlib", "center" or "digits".
        text: one line saying what the set is.
        labels: [S] name of each star.
        picture_shape: (height, width) where inputs are grey pictures, else None.
    """

    kind: str
    text: str
    stars: StarBatch
    labels: tuple[str, ...]
    picture_shape: tuple[int, int] | None = None

    def to(self, device: torch.device) -> InputSet:
        """The same set on another device."""
        return replace(self, stars=self.stars.to(device))


def read_input_set(
    network: nn.Sequential,
    dtype: torch.dtype,
    *,
    box: str | None = None,
    vnnlib: Path | None = None,
    center: Path | None = None,
    eps: float | None = None,
    mask: Path | None = None,
    clip: str | None = None,
) -> InputSet:
    """The one input set that the options name, checked against the network's number of inputs.

    Raises: OptionError, FileFormatError, InvalidSetError, ShapeError; each names the option.
    """
    given = [f"--{n}" for n, v in (("box", box), ("vnnlib", vnnlib), ("center", center)) if v is not None]
    if len(given) != 1:
        got = " and ".join(given) if given else "none"
        raise OptionError(f"exactly one input set is required (--box, --vnnlib or --center with --eps), got {got}")
    if center is None and (eps is not None or mask is not None or clip is not None):
        raise OptionError(f"--eps, --mask and --clip belong to --center, got {given[0]}")
    inputs = input_size(network)
    if center is not None:
        if eps is None:
            raise OptionError("--center needs --eps, the radius around it")
        return _around(center, eps, mask, clip, inputs, dtype)
    if vnnlib is not None:
        corners = read_box(vnnlib)
        _check_size("--vnnlib", corners[0].shape[1], inputs)
        stars = _boxes(*corners, dtype)
        text = f"{len(stars)} box{'es' * (len(stars) != 1)} of {vnnlib}"
        return InputSet("vnnlib", text, stars, _numbered("box", len(stars)))
    assert box is not None
    lower, upper = parse_box(box).unbind(1)
    _check_size("--box", len(lower), inputs)
    stars = _boxes(lower[None], upper[None], dtype)
    text = f"box {box}" if len(box) <= 80 else f"box of {len(lower)} inputs"
    return InputSet("box", text, stars, ("box",))


def input_size(network: nn.Sequential) -> int | None:
    """Number of inputs of a flat network that starts with a linear layer, else None."""
    for layer in network:
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if not isinstance(layer, nn.Flatten):
            return None
    return None


def parse_box(text: str) -> Tensor:
    """[X, 2] float64 lower and upper bounds, from the grammar above."""
    path = Path(text)
    if path.suffix.lower() in BOX_FILES:
        values = _read_array("--box", path)
    else:
        rows = [row.strip() for row in text.strip().strip(";").split(";")]
        values = torch.empty(len(rows), 2, dtype=torch.float64)
        for i, row in enumerate(rows):
            try:
                low, high = (float(part) for part in row.split(","))
            except ValueError:
                raise OptionError(
                    f"--box must be 'lower,upper' pairs separated by ';', one per input, or a file ending in "
                    f"{', '.join(BOX_FILES)}; pair {i} is {row!r}"
                ) from None
            values[i] = torch.tensor([low, high], dtype=torch.float64)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ShapeError(f"--box must have shape [inputs, 2], got {list(values.shape)} in {text}")
    _check_finite("--box", values)
    low, high = values.unbind(1)
    if (low > high).any():
        i = int((low > high).nonzero()[0])
        raise InvalidSetError(f"--box: lower must not exceed upper, got {low[i]:g} > {high[i]:g} for input {i}")
    return values


def _around(
    path: Path, eps: float, mask: Path | None, clip: str | None, inputs: int | None, dtype: torch.dtype
) -> InputSet:
    if not 0 <= eps < float("inf"):
        raise OptionError(f"--eps must be a finite number >= 0, got {eps}")
    centers = _as_inputs("--center", _read_array("--center", path), inputs)
    _check_finite(f"--center {path}", centers)
    span = None if clip is None else _parse_clip(clip)
    if span is not None and ((centers < span[0]) | (centers > span[1])).any():
        raise InvalidSetError(
            f"--center {path} must lie within --clip {clip}, got values from {centers.min():g} to {centers.max():g}"
        )
    moved = None
    if mask is not None:
        moved = _as_inputs("--mask", _read_array("--mask", mask), inputs)
        if moved.shape[1:] != centers.shape[1:] or len(moved) not in (1, len(centers)):
            raise ShapeError(
                f"--mask must have the shape of one input, {list(centers.shape[1:])}, got {list(moved.shape[1:])}"
            )
        if not ((moved == 0) | (moved == 1)).all():
            raise InvalidSetError("--mask must hold 0 (fixed) and 1 (perturbed) only")
        moved = moved.bool()
    centers = centers.to(dtype).double()  # the input as a network of this dtype reads it
    radius = torch.full_like(centers, eps) if moved is None else eps * moved.expand_as(centers)
    lower, upper = centers - radius, centers + radius
    if span is not None:
        lower, upper = lower.clamp(*span), upper.clamp(*span)
    stars = _boxes(lower, upper, dtype)
    count = prod(stars.shape) if moved is None else int(moved.flatten(1).sum(1).max())
    text = f"{len(stars)} input{'s' * (len(stars) != 1)} of {path}, {count} of {prod(stars.shape)} values ± {eps:g}"
    return InputSet("center", text + (f", clipped to [{clip}]" if clip else ""), stars, _numbered("input", len(stars)))


def _boxes(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> StarBatch:
    """Stars of boxes [S, *shape], rounded outward to `dtype`; inputs without width are rounded to nearest,
    because a fixed input that rounding made wide would cost a predicate variable."""
    fixed = lower == upper
    return StarBatch.from_box(
        torch.where(fixed, lower.to(dtype), round_down(lower, dtype)),
        torch.where(fixed, upper.to(dtype), round_up(upper, dtype)),
    )


def _as_inputs(option: str, array: Tensor, inputs: int | None) -> Tensor:
    """[S, X] inputs of a flat network; [S, C, H, W] where the network takes pictures."""
    shape = list(array.shape)
    if inputs is None:
        if array.ndim not in (3, 4):
            raise ShapeError(f"{option} must have shape [C, H, W] or [inputs, C, H, W], got {shape}")
        return array if array.ndim == 4 else array[None]
    if array.numel() == inputs:
        return array.reshape(1, inputs)
    if array.ndim > 1 and prod(shape[1:]) == inputs:
        return array.reshape(-1, inputs)
    raise ShapeError(f"{option} must hold {inputs} values per input, as the networks do, got shape {shape}")


def _parse_clip(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--clip must be 'lo,hi', got {text!r}") from None
    if not low <= high:
        raise OptionError(f"--clip must be 'lo,hi' with lo <= hi, got {text!r}")
    return low, high


def _read_array(option: str, path: Path) -> Tensor:
    if not path.is_file():
        raise FileFormatError(f"{option}: no such file: {path}")
    try:
        match path.suffix.lower():
            case ".npy":
                array = np.load(path, allow_pickle=False)
            case ".json":
                array = np.asarray(json.loads(path.read_text(encoding="utf-8")), dtype=float)
            case ".csv":
                array = np.loadtxt(path, delimiter=",", ndmin=2)
            case other:
                raise FileFormatError(f"{option}: {path} must end in {', '.join(BOX_FILES)}, got {other!r}")
        return torch.from_numpy(np.array(array, dtype=np.float64))
    except FileFormatError:
        raise
    except (OSError, ValueError, TypeError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"{option}: {path} is not a readable array of numbers: {reason}") from None


def _check_finite(what: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise InvalidSetError(f"{what} must be finite, got {values[tuple(at)]} at index {at}")


def _check_size(option: str, got: int, wanted: int | None) -> None:
    if wanted is None:
        raise OptionError(f"{option} describes flat inputs, but the networks take pictures: use --center with --eps")
    if got != wanted:
        raise ShapeError(f"{option} must give bounds for {wanted} inputs, as the networks do, got {got}")


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word} {i}" for i in range(count))
