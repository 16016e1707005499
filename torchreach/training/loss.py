"""Certified bound of max |y1 - y2| over boxes as a loss: differentiable in the compressed network's parameters.

One backward pass in difference coordinates with closed-form planes (`domains.difference`, `domains.hexagon`), taken
over the student's live parameters instead of copies. For one box x0 +- r, layers 0 .. L - 1:

    layer 0       z = W x0 + b +- |W| r,  d = z - z2 = D x0 + db +- |D| r
    layer k       rows (W, 0) for z and (D, V) for d on (a, e) of layer k - 1; planes above them down to layer 0:
                  p . z + q . d  <=  p . z(x0) + q . d(x0) + |p W + q D| r
    output        max(upper bound of d, upper bound of -d)

with every rounding allowance of `domains.difference`: sound for each value of the parameters. Gradients go through the
bounds of hidden neurons too, unless `full_gradient=False` holds these, and with them the planes: docs/training.md says
what either costs and gains.

CROWN (Zhang et al.: Efficient neural network robustness certification with general activation functions, NeurIPS
2018) for the pass, CROWN-IBP (Zhang et al., ICLR 2020) for training on bounds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchreach.core.checks import check_choice
from torchreach.core.errors import InvalidNetworkError, ShapeError, UnsupportedLayerError
from torchreach.core.roundoff import round_up
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.difference import Backward, checked_boxes
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.pair import Pair
from torchreach.graph.affine_graph import AffineGraph
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.steps import Step
from torchreach.graph.twins import Matrices
from torchreach.read.module import chain
from torchreach.read.steps import steps

REDUCTIONS = ("mean", "sum", "none")


class DiscrepancyLoss(nn.Module):
    """loss(lower, upper): certified upper bound of max |original(x) - student(x)| over lower <= x <= upper.

    Args:
        original: the reference. Read at the first call, and again only for boxes of another shape or device.
        student: the network in training, of the same architecture (equal layer sizes). Its parameters are read at
            every call, the layers it consists of only at the first. Evaluation semantics, whatever its mode is.
        reduction: "mean" or "sum" over boxes and outputs, or "none".
        full_gradient: whether gradients go through the bounds of hidden neurons, as the value does. False holds these
            bounds: half the time, the same value, and gradients that are as good while boxes are small.

    Neither network is a submodule: the loss has no parameters or state of its own.

    Raises, at the first call: ShapeError if the architectures differ; UnsupportedLayerError; InvalidNetworkError
    for weights that are not finite, or if a parameter that wants a gradient could not get one.

    Examples:
        >>> original, student = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> loss, x, y = tr.DiscrepancyLoss(original, student), torch.rand(5, 2), torch.rand(5, 1)
        >>> (nn.functional.mse_loss(student(x), y) + loss(x - 0.01, x + 0.01)).backward()
        >>> student.weight.grad.shape
        torch.Size([1, 2])
    """

    def __init__(
        self, original: nn.Module, student: nn.Module, *, reduction: str = "mean", full_gradient: bool = True
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction, self.full_gradient = reduction, full_gradient
        self._networks = (original, student)  # in a tuple, so that they do not become submodules
        self._original: tuple[Step, ...] = ()
        self._student: tuple[nn.Module, ...] = ()
        self._key: tuple | None = None

    def forward(self, lower: Tensor, upper: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss over boxes lower, upper [B, *input shape]; [B, N_out] without reduction.

        parameters: tensors to use in place of the student's parameters of these names, as in
            `torch.func.functional_call`: weights rounded straight-through, or averaged, for instance.

        Returns: in the student's dtype, on the device of its parameters.
        Guarantee: without reduction, no smaller than |original(x) - student(x)| of the real-valued networks
            anywhere in the box, rounding included: computed in float64 with its rounding errors added, and
            rounded up. (A mean or sum is rounded to nearest.)
        Raises: ShapeError, InvalidSetError: boxes that do not fit, are empty or not finite; InvalidNetworkError: a
            name of `parameters` that the student does not have; ShapeError: a value of another shape.
        """
        if lower.shape != upper.shape or lower.ndim < 2:
            raise ShapeError(
                "boxes must be lower and upper of one shape [B, *input shape], "
                f"got {tuple(lower.shape)} and {tuple(upper.shape)}"
            )
        values = self._values(parameters)
        like = next((value for value in values.values()), lower)
        shape, device = tuple(lower.shape[1:]), like.device
        self._prepare(shape, device)
        lower, upper = (end.to(device).flatten(1) for end in (lower, upper))
        box = lower.detach().amin(0), upper.detach().amax(0)
        pair = Pair.of(self._original, _live_steps(self._student, values, shape, device), box, live=True)
        lower, upper = checked_boxes(pair, lower, upper)
        bound = _rounded_up(upper_bounds(pair, lower, upper, full_gradient=self.full_gradient).amax(1), like.dtype)
        if self.reduction == "none":
            return bound
        return bound.mean() if self.reduction == "mean" else bound.sum()

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, full_gradient={self.full_gradient}"

    def _values(self, parameters: Mapping[str, Tensor] | None) -> dict[int, Tensor]:
        """The tensor to use for each parameter of the student, by its identity."""
        named: dict[str, Tensor] = dict(self._networks[1].named_parameters())
        values = {id(value): value for value in named.values()}
        for name, value in (parameters or {}).items():
            if name not in named:
                raise InvalidNetworkError(f"parameters must name parameters of the student, got {name!r}")
            if value.shape != named[name].shape:
                raise ShapeError(
                    f"parameter {name!r} must have shape {tuple(named[name].shape)}, got {tuple(value.shape)}"
                )
            values[id(named[name])] = value
        return values

    def _prepare(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Reads both networks for inputs of this shape, on this device."""
        if self._key == (shape, device):
            return
        original, student = (tuple(chain(network, shape)) for network in self._networks)
        for layer in (*original, *student):
            if isinstance(layer, Quantizer):
                raise UnsupportedLayerError(
                    "DiscrepancyLoss requires networks that do not round activations, but "
                    f"{layer.name or 'a layer'!r} does; use torchreach.weight_only(network), or torchreach.repair"
                )
            if next(layer.children(), None) is not None and not isinstance(layer, AffineGraph):
                raise UnsupportedLayerError(
                    "DiscrepancyLoss requires two networks of plain layers, but "
                    f"{type(layer).__name__} is made of other modules (a merged network, a parametrisation)"
                )
        used = {id(value) for layer in student for value in layer.parameters()}
        for name, value in self._networks[1].named_parameters():
            if value.requires_grad and id(value) not in used:
                raise InvalidNetworkError(
                    f"the loss requires that layers use the student's parameters as they are, but {name!r} is unused "
                    "or changed by the student's own code: freeze it, or give what layers use in parameters={...}"
                )
        with torch.no_grad():
            self._original = _live_steps(original, {}, shape, device)
        self._student, self._key = student, (shape, device)


def upper_bounds(pair: Pair, lower: Tensor, upper: Tensor, *, full_gradient: bool) -> Tensor:
    """Certified bounds [B, 2, N_out] above y1 - y2 (row 0) and y2 - y1 (row 1), differentiable in the pair's matrices.

    The planes and allowances of `Backward.closed`, in fewer operations: layers are not multiplied with unit
    vectors, and input coordinates without width cost nothing.

    Args: lower, upper: [B, N_in] as `checked_boxes` returns them.
    """
    with torch.no_grad():  # rounding allowances need no gradient
        work = Backward(pair, lower, upper)
    root = _Root(pair, lower, upper)
    last = pair.depth - 1
    for k in range(last):
        with torch.set_grad_enabled(torch.is_grad_enabled() and full_gradient):
            W, V, D = matrices(pair, k)
            rows = _rows(work, root, k, torch.cat((W, D)), torch.cat((torch.zeros_like(V), V)))
            constant, error = torch.cat((pair.b[k], pair.db[k])), torch.cat(work.errors[k], 1)
            value = rows + torch.cat((constant, -constant)) + error.repeat(1, 2)
            u1, du, l1, dl = value.reshape(len(lower), 4, -1).unbind(1)
            inf = torch.full_like(u1, torch.inf)  # bounds of z2 = z - d follow from those of z and d
            hexagon = Hexagon(-l1, u1, -inf, inf, -dl, du).tightened()
        work.add(hexagon)
    _, V, D = matrices(pair, last)
    rows = _rows(work, root, last, D, V)
    value = rows + torch.cat((pair.db[last], -pair.db[last])) + work.errors[last][1].repeat(1, 2)
    return value.reshape(len(lower), 2, -1)


def matrices(pair: Pair, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, V, D of a layer of a live pair, which carry gradients."""
    maps = pair.maps[k]
    assert isinstance(maps, Matrices)
    return maps.W, maps.V, maps.D


class _Root:
    """What all rows share at the input: boxes middle +- radius (on coordinates with width), z and d at the middle."""

    def __init__(self, pair: Pair, lower: Tensor, upper: Tensor) -> None:
        self.middle = lower + (upper - lower) / 2
        radius = torch.maximum(upper - self.middle, self.middle - lower)
        self.wide = (radius > 0).any(0).nonzero().flatten()
        W, _, D = matrices(pair, 0)
        self.radius, self.W, self.D = radius[:, self.wide], W[:, self.wide], D[:, self.wide]
        self.z, self.d = self.middle @ W.T + pair.b[0], self.middle @ D.T + pair.db[0]

    def bound(self, p: Tensor, q: Tensor, on: Tensor) -> Tensor:
        """Largest p . z + q . d of the neurons `on` of layer 0, [B, R], rounding left out."""
        middle = p @ self.z[:, on, None] + q @ self.d[:, on, None]
        return (middle + (p @ self.W[on] + q @ self.D[on]).abs() @ self.radius[..., None])[..., 0]


def _rows(work: Backward, root: _Root, k: int, alpha: Tensor, beta: Tensor) -> Tensor:
    """Upper bounds [B, 2R] of alpha a + beta e, then of its negative, for rows [R, N] on what layer k is given."""
    if k == 0:
        middle, spread = root.middle @ alpha.T, root.radius @ alpha[:, root.wide].abs().T
        return torch.cat((spread + middle, spread - middle), 1)
    alpha, beta = alpha[:, work.on[k - 1]], beta[:, work.on[k - 1]]
    alpha, beta = torch.cat((alpha, -alpha))[None], torch.cat((beta, -beta))[None]
    total = torch.zeros((), dtype=alpha.dtype, device=alpha.device)
    for j in range(k - 1, -1, -1):
        p, q, raised = work.closed(j, alpha, beta)
        P, Q = work.errors[j]
        with torch.no_grad():
            error = (p.abs() @ P[..., None] + q.abs() @ Q[..., None])[..., 0]
        total = total + raised + error
        if j > 0:
            alpha, beta, constant = work.back(j, p, q)
            total = total + constant
        else:
            total = total + root.bound(p, q, work.on[0])
    # An overflow says nothing.
    return torch.nan_to_num(total, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _live_steps(
    layers: tuple[nn.Module, ...], values: Mapping[int, Tensor], shape: tuple[int, ...], device: torch.device
) -> tuple[Step, ...]:
    """Steps in float64 whose weights and biases are differentiable functions of `values`, given by id of parameter."""

    def moved(value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        return values.get(id(value), value).to(device=device, dtype=COMPUTE_DTYPE)

    def live(layer: nn.Module) -> nn.Module:
        twin = copy.copy(layer)
        # All buffers, because a Parameter cannot be the result of a computation.
        twin._parameters = {}
        twin._buffers = {name: moved(value) for name, value in (*layer._parameters.items(), *layer._buffers.items())}
        twin._modules = {name: part and live(part) for name, part in layer._modules.items()}
        return twin

    twins = [live(layer) for layer in layers]
    read = steps(nn.Sequential(*twins), shape, dtype=COMPUTE_DTYPE, device=device, smooth=True)
    zeros = (torch.zeros(1, *step.in_shape, dtype=COMPUTE_DTYPE, device=device) for step in read)
    return tuple(replace(step, bias=step.block(zero).flatten()) for step, zero in zip(read, zeros, strict=True))


def _rounded_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`, no smaller than it was; differentiable."""
    rounded = value.to(dtype)
    with torch.no_grad():
        above = round_up(value, dtype)
    return torch.where(above.isfinite(), rounded + (above - rounded.detach()), above)
