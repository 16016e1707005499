"""What a star is made of, checked: numbers of a box, boxes around images, the parts of a star."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreach.core.errors import InvalidSetError, OptionError, ShapeError
from torchreach.core.roundoff import round_down, round_up
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.graph.weights import FLOATS


def numbers(name: str, value: Any) -> Tensor:
    """`value` (tensor, numpy array, list) as a dense floating-point tensor of real numbers, without its gradient.

    Raises: ShapeError naming what was given.
    """
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(value).__name__
            raise ShapeError(f"{name} must be a tensor or a numpy array of numbers, got {kind} ({error})") from None
    if value.dtype not in FLOATS:
        cure = "convert it first, .to(torch.float32)"
        if value.dtype == torch.uint8:
            cure = "convert pixels as the network expects them first, image.float() / 255 for values from 0 to 1"
        raise ShapeError(f"{name} must have a real floating-point dtype, got {value.dtype}: {cure}")
    if value.layout != torch.strided or value.is_meta:
        kind = "one without values (meta)" if value.is_meta else f"a {value.layout} one"
        raise ShapeError(f"{name} must be a dense tensor with values, got {kind}")
    return value.detach()


def image_box(
    image: Tensor | np.ndarray,
    eps: float | Tensor | np.ndarray,
    mask: Tensor | np.ndarray | None,
    clip: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Corners of the boxes of `StarBatch.from_image`.

    Raises: ShapeError, InvalidSetError; OptionError for a `clip` that is no range.
    """
    image = numbers("image", image)
    shape = tuple(image.shape)
    radius = _spread("eps", torch.as_tensor(eps, dtype=COMPUTE_DTYPE, device=image.device), shape)
    if not bool(((radius >= 0) & radius.isfinite()).all()):
        raise InvalidSetError(f"eps must be a number >= 0, got {eps}")
    if mask is not None:
        moved = torch.as_tensor(mask, device=image.device)
        if moved.dtype != torch.bool and not bool(((moved == 0) | (moved == 1)).all()):
            raise InvalidSetError("mask must hold False and True (or 0 and 1) only: which pixels move, not how far")
        radius = torch.where(_spread("mask", moved.bool(), shape), radius, 0.0)
    lower, upper = (_moved(image, sign * radius) for sign in (-1.0, 1.0))
    if clip is None:
        return lower, upper
    low, high = _range(clip)
    # Of the image's dtype, as its own values are: outward.
    ends = torch.tensor([low, high], dtype=COMPUTE_DTYPE, device=image.device)
    low, high = round_down(ends[:1], image.dtype), round_up(ends[1:], image.dtype)
    if not bool(((image >= low) & (image <= high)).all()):
        raise InvalidSetError(
            f"image must lie within clip {tuple(clip)}, got values from {image.amin().item():g} to "
            f"{image.amax().item():g}"
        )
    return torch.maximum(lower, low), torch.minimum(upper, high)


def _spread(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ShapeError(f"{name} must broadcast to the image's shape {shape}, got {tuple(value.shape)}") from None


def _moved(image: Tensor, by: Tensor) -> Tensor:
    """image + by, rounded away from the image: to its dtype, from a sum in float64 whose own rounding is known."""
    wide = image.to(COMPUTE_DTYPE)
    total = wide + by
    part = total - wide
    error = (wide - (total - part)) + (by - part)  # of the sum, exactly (Knuth's two-sum)
    beyond = torch.where(by < 0, error < 0, error > 0) & (by != 0)
    way = torch.where(by < 0, -torch.inf, torch.inf).to(COMPUTE_DTYPE)
    total = torch.where(beyond, torch.nextafter(total, way), total)
    return torch.where(by < 0, round_down(total, image.dtype), round_up(total, image.dtype))


def _range(clip: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in clip)
    except (TypeError, ValueError):
        raise OptionError(f"clip must be (lowest, highest), got {clip!r}") from None
    if not low <= high:
        raise OptionError(f"clip must be (lowest, highest) with lowest <= highest, got {clip!r}")
    return low, high


def check_star(star: Any) -> None:
    """Raises ShapeError or InvalidSetError: parts of a `StarBatch` do not fit together; one is empty or unbounded."""
    if star.basis.ndim < 3:
        raise ShapeError(f"basis must be [S, 1 + M, *shape], got {tuple(star.basis.shape)}")
    size, dim = star.basis.shape[0], star.basis.shape[1] - 1
    if size == 0 or dim < 0:
        raise InvalidSetError(f"at least one star is required, got a basis of shape {tuple(star.basis.shape)}")
    rows = star.A.shape[1] if star.A.ndim == 3 else -1
    wanted = {
        "A": (size, rows, dim),
        "b": (size, rows),
        "lower": (size, dim),
        "upper": (size, dim),
        "origin": (size,),
    }
    for name, shape in wanted.items():
        part = getattr(star, name)
        if tuple(part.shape) != shape:
            raise ShapeError(
                f"{name} must have shape {shape} for {size} stars of {dim} variables, got {tuple(part.shape)}"
            )
        if part.device != star.device:
            raise ShapeError(f"{name} must be on {star.device} like the basis, got {part.device}")
        if name != "origin" and part.dtype != star.dtype:
            raise ShapeError(f"{name} must be {star.dtype} like the basis, got {part.dtype}")
    if star.dtype not in FLOATS:
        raise ShapeError(f"basis must be floating point (float16, bfloat16, 32 or 64), got {star.dtype}")
    for name in ("basis", "A", "b"):
        if not torch.isfinite(getattr(star, name)).all():
            raise InvalidSetError(f"{name} must be finite, got NaN or infinite entries")
    for name in ("lower", "upper"):
        if not torch.isfinite(getattr(star, name)).all():
            raise InvalidSetError(f"predicate bound {name} must be finite: the star is unbounded or NaN")
    if (star.lower > star.upper).any():
        raise InvalidSetError("predicate bounds must satisfy lower <= upper, got lower > upper: the star is empty")
    if rows:
        empty = star.is_empty().nonzero().flatten().tolist()
        if empty:
            raise InvalidSetError(f"constraints must leave every star a point, got empty stars at index {empty}")
