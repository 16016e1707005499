"""Input sets as the command line names them: a box, a VNN-LIB file, or a ball around given inputs.

Box grammar: `lower,upper` pairs, one per input, separated by semicolons, "0,1; -0.5,0.5"; or a .json, .npy
or .csv file holding the same numbers as an [X, 2] array.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchreach.app.arguments import AuditSetup, SetOptions, check_pairs, parse_pairs
from torchreach.core.errors import FileFormatError, InvalidSetError, ShapeError
from torchreach.core.roundoff import round_down, round_up
from torchreach.sets.star import StarBatch
from torchreach.sets.vnnlib import read_box


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
    options: SetOptions,
    network: nn.Module,
    dtype: torch.dtype,
    file_shape: Callable[[], tuple[int, ...] | None] = lambda: None,
) -> InputSet:
    """The input set that the options name, in the shape of one input of the network.

    The shape is that of `options`; else [inputs] where the network starts with a linear layer; else what
    `file_shape` says, which is asked for only then.

    Raises: FileFormatError, InvalidSetError, OptionError, ShapeError; each names the option.
    """
    shape = _shape_of(options, network, file_shape)
    if options.center is not None:
        return _around(options, shape, dtype)
    if options.vnnlib is not None:
        lower, upper = (_shaped("--vnnlib", corner, shape) for corner in read_box(options.vnnlib))
        stars = _boxes(lower, upper, dtype)
        text = f"{len(stars)} box{'es' * (len(stars) != 1)} of {options.vnnlib}"
        return InputSet("vnnlib", text, stars, _numbered("box", len(stars)))
    assert options.box is not None
    lower, upper = (_shaped("--box", side[None], shape) for side in _read_pairs(options).unbind(1))
    text = f"box {options.box}" if len(options.box) <= 80 else f"box of {lower.numel()} inputs"
    return InputSet("box", text, _boxes(lower, upper, dtype), ("box",))


def read_data(
    options: AuditSetup,
    network: nn.Module,
    dtype: torch.dtype,
    file_shape: Callable[[], tuple[int, ...] | None] = lambda: None,
) -> tuple[Tensor, Tensor | None]:
    """Inputs [B, *shape] of --data, shaped as `read_input_set` says, and labels [B] of --labels.

    Raises: FileFormatError, InvalidSetError, ShapeError; each names the option.
    """
    path, own = options.data, options.labels
    points = _as_inputs("--data", _read_array("--data", path), _shape_of(options, network, file_shape))
    _check_finite(f"--data {path}", points)
    span = options.span
    if span is not None and ((points < span[0]) | (points > span[1])).any():
        raise InvalidSetError(
            f"--data {path} must lie within --clip {options.clip}, got values from {points.min():g} to {points.max():g}"
        )
    if own is None:
        return points.to(dtype), None
    labels = _read_array("--labels", own).flatten()
    if len(labels) != len(points):
        raise ShapeError(f"--labels must be one number for each of {len(points)} inputs, got {len(labels)}")
    if not bool((labels == labels.round()).all()):
        raise InvalidSetError(f"--labels {own} must hold whole numbers")
    return points.to(dtype), labels.long()


def _shape_of(
    options: SetOptions | AuditSetup, network: nn.Module, file_shape: Callable[[], tuple[int, ...] | None]
) -> tuple[int, ...] | None:
    """Shape of one input: that of --shape, [inputs] of a network that starts with a linear layer, or the file's."""
    inputs = input_size(network)
    if options.sizes is not None and inputs not in (None, prod(options.sizes)):
        raise ShapeError(
            f"--shape {options.shape} must hold {inputs} values, as the networks take, got {prod(options.sizes)}"
        )
    return options.sizes or ((inputs,) if inputs is not None else file_shape())


def input_size(network: nn.Module) -> int | None:
    """Number of inputs of a flat network that starts with a linear layer, else None."""
    for layer in network if isinstance(network, nn.Sequential) else ():
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if not isinstance(layer, nn.Flatten):
            return None
    return None


def _read_pairs(options: SetOptions) -> Tensor:
    """[X, 2] float64 lower and upper bounds, of --box."""
    assert options.box is not None
    if options.box_file is None:
        return torch.tensor(parse_pairs(options.box), dtype=torch.float64)
    values = _read_array("--box", options.box_file)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ShapeError(f"--box must have shape [inputs, 2], got {list(values.shape)} in {options.box}")
    check_pairs(values.tolist())
    return values


def _around(options: SetOptions, shape: tuple[int, ...] | None, dtype: torch.dtype) -> InputSet:
    path, eps, mask, span = options.center, options.eps, options.mask, options.span
    assert path is not None
    assert eps is not None
    centers = _as_inputs("--center", _read_array("--center", path), shape)
    _check_finite(f"--center {path}", centers)
    if span is not None and ((centers < span[0]) | (centers > span[1])).any():
        raise InvalidSetError(
            f"--center {path} must lie within --clip {options.clip}, got values from {centers.min():g} to "
            f"{centers.max():g}"
        )
    moved = None
    if mask is not None:
        moved = _as_inputs("--mask", _read_array("--mask", mask), shape)
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
    text += f", clipped to [{options.clip}]" if options.clip else ""
    return InputSet("center", text, stars, _numbered("input", len(stars)))


def _boxes(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> StarBatch:
    """Stars of boxes [S, *shape], rounded outward to `dtype`; inputs without width are rounded to nearest,
    because a fixed input that rounding made wide would cost a predicate variable."""
    fixed = lower == upper
    return StarBatch.from_box(
        torch.where(fixed, lower.to(dtype), round_down(lower, dtype)),
        torch.where(fixed, upper.to(dtype), round_up(upper, dtype)),
    )


def _as_inputs(option: str, array: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """[S, *shape] inputs; where the shape is not known, pictures [S, C, H, W] or one picture [C, H, W]."""
    got = list(array.shape)
    if shape is None:
        if array.ndim not in (3, 4):
            raise ShapeError(
                f"{option} must have shape [C, H, W] or [inputs, C, H, W], got {got}; or say what one input of the "
                "networks is with --shape, for example --shape 1,28,28"
            )
        return array if array.ndim == 4 else array[None]
    if array.numel() == prod(shape):
        return array.reshape(1, *shape)
    if array.ndim > 1 and prod(got[1:]) == prod(shape):
        return array.reshape(-1, *shape)
    raise ShapeError(
        f"{option} must hold {prod(shape)} values per input, as the networks{_of(shape)} do, got shape {got}"
    )


def _shaped(option: str, flat: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Numbers [S, X], in the order of the flattened input, in the network's shape [S, *shape]."""
    if shape is None:
        raise ShapeError(
            f"{option} gives {flat.shape[1]} numbers in a row, but the networks start with another layer than a linear "
            "one and their files do not say the shape of an input: give it with --shape, for example --shape 1,28,28"
        )
    if flat.shape[1] != prod(shape):
        raise ShapeError(
            f"{option} must give bounds for {prod(shape)} inputs, as the networks{_of(shape)} do, got {flat.shape[1]}"
        )
    return flat.reshape(-1, *shape)


def _of(shape: tuple[int, ...]) -> str:
    return f" of input shape {list(shape)}" if len(shape) > 1 else ""


def _read_array(option: str, path: Path) -> Tensor:
    try:
        match path.suffix.lower():
            case ".npy":
                array = np.load(path, allow_pickle=False)
            case ".json":
                array = np.asarray(json.loads(path.read_text(encoding="utf-8")), dtype=float)
            case _:
                array = np.loadtxt(path, delimiter=",", ndmin=2)
        return torch.from_numpy(np.array(array, dtype=np.float64))
    except (OSError, ValueError, TypeError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"{option}: {path} is not a readable array of numbers: {reason}") from None


def _check_finite(what: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise InvalidSetError(f"{what} must be finite, got {values[tuple(at)]} at index {at}")


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word} {i}" for i in range(count))
