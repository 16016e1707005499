"""A deployed int8 network in training: rounding stays in the forward pass, gradients pass through it.

    forward    y = scale (clamp(round(x / scale) + zero_point, lowest, highest) - zero_point)
    backward   dy/dx = 1 inside the range, 0 outside          (straight-through, Bengio et al. 2013; weights and
                                                               activations, Jacob et al. 2018)

The last rounding is left out while training: through it, a target between two codes would be answered by the sum
that lies at the threshold between them, where the output jumps, instead of by the sum that equals the target.

Training starts from the given network's own weights. After it the weights go back on their given grid, and
everything into a copy of the given module: that is the network which is evaluated.
"""

from __future__ import annotations

import copy
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from torchreach.compress.constraints import PRUNED_SHARE, Constraints, Grid
from torchreach.compress.convert import converted, int8_layers
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import InvalidNetworkError
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.graph.layers import RESHAPING
from torchreach.graph.quantizer import Quantizer
from torchreach.training.fit import Data, RepairOptions, batches, fit_once
from torchreach.training.program import LayerProgram, Points

# Inputs from `data` that calibration looks at, besides the points, in batches of the usual size.
CALIBRATION = 4096


class Rounding(nn.Module):
    """What a Quantizer does, with gradients: 1 inside its range and 0 outside. In training mode: nothing."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x
        q = self.quantizer
        scale, zero_point = q.scale.to(x.device, torch.float32), q.zero_point.to(x.device, torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, q.lowest, q.highest)


class DeployedStudent:
    """Free float32 weights and biases, the quantisers around them, and `network`, the int8 module made of both.

    compressed: an eager-mode int8 module. layers: its `chain`.
    constraints: masks "<layer>.weight" of weights that stay zero; by default a layer of which more than half is
        zero keeps its zeros.

    Raises: UnsupportedLayerError: a module that is no eager-mode int8 module; InvalidNetworkError: constraints
        that do not fit it.
    """

    network: nn.Module

    def __init__(
        self,
        compressed: nn.Module,
        layers: nn.Sequential,
        device: torch.device,
        constraints: Constraints | None,
        training: RepairOptions,
        seed: int,
    ) -> None:
        self.given, self.training = compressed, training
        self.files: Checkpoint | None = None
        self.generator = torch.Generator().manual_seed(seed)
        int8 = int8_layers(compressed, [layer.name for layer in _without_pooling(layers)])
        places = {place.name: place for place in int8}
        parts = [Rounding(part) if isinstance(part, Quantizer) else copy.deepcopy(part) for part in layers]
        self.model = nn.Sequential(*parts).to(device, torch.float32).eval()
        self.names: dict[str, str] = {}  # the model's weighted layer -> the given module's
        grids: dict[str, Grid] = {}
        weighted = ""
        for index, part in enumerate(self.model):
            if isinstance(getattr(part, "weight", None), Tensor):
                weighted = str(index)
            place = places.pop(part.quantizer.name, None) if isinstance(part, Rounding) else None
            if place is not None and place.weight is not None:
                self.names[weighted] = place.name
                grid = place.grid()
                grids[f"{weighted}.weight"] = Grid(grid.scale.to(device), grid.lowest, grid.highest)
        self.free = {name: value.detach().clone().requires_grad_() for name, value in self.model.named_parameters()}
        self.constraints = Constraints(self._masks(constraints, grids), grids)
        self.network = copy.deepcopy(compressed).eval()
        self.calibrated = False
        self.keep()

    def calibrate(self, x: Tensor, data: Data | None) -> bool:
        if self.calibrated:
            return False
        self.calibrated = True
        self._calibrate(x, data)
        self._convert()
        return True

    def retrain(self, x: Tensor, y: Tensor, data: Data | None, rate: float, clock: Clock = NO_LIMIT) -> float:
        free = list(self.free.values())
        last = self._roundings()[-1].train()
        rest = data, self.training, rate, self.generator, None, clock
        loss = fit_once(self.files, free, self._output, (x.to(free[0]), y), *rest)
        last.eval()
        if self.is_finite():
            self._calibrate(x, data)
            self._convert()
        return loss

    def shift(self, by: Tensor) -> bool:
        """Adds `by` [N] to the outputs before they are rounded, in the bias of the last layer; whether it has one.

        Kernels keep biases in int32, in steps of the product of input and weight scales: next to nothing is lost.
        """
        bias = self.free.get(f"{max(map(int, self.names), default=0)}.bias")
        if bias is None or bias.numel() != by.numel():
            return False
        with torch.no_grad():
            bias += by.to(bias)
        self._convert()
        return True

    def solve_codes(self, x: Tensor, y: Tensor, clock: Clock) -> bool:
        """Codes of the last layer, each at most one from what it is, and its biases, for a small |y - y2| at points.

        What rounds the outputs is not part of the program. x: [B, *shape], y: [B, N]. Returns whether the network ends
        in a fully connected layer, else nothing is done.

        Raises: OutOfTime.
        """
        index = max(map(int, self.names), default=0)
        bias = self.free.get(f"{index}.bias")
        if not isinstance(self.model[index], nn.Linear) or bias is None or bias.numel() != y.shape[1]:
            return False
        with torch.no_grad():
            values = self.constraints.straight_through(self.free)
            before = {key: value for key, value in values.items() if int(key.split(".")[0]) < index}
            h = functional_call(self.model[:index], before, (x.to(bias),)).flatten(1).to(COMPUTE_DTYPE)
            weight, grid = values[f"{index}.weight"], cast("Grid", self.constraints.grids[f"{index}.weight"])
            mask = self.constraints.masks.get(f"{index}.weight")
            step, low, high = (pad(part.to(COMPUTE_DTYPE), (0, 1)) for part in grid.around(weight, 1))
            start = torch.cat((weight, values[f"{index}.bias"][:, None]), 1).to(COMPUTE_DTYPE)
            free = torch.ones_like(start, dtype=torch.bool)
            if mask is not None:
                free[:, :-1] = mask
            h, y = torch.cat((h, torch.ones_like(h[:, :1])), 1), y.to(h)
            program = LayerProgram(Points(x, h, y, y, torch.ones_like(h[:, 0])), start, free)
            program.least(clock)
            found = program.rounded(step, (low, high), clock).to(weight)
            self.free[f"{index}.weight"].copy_(found[:, :-1])
            bias.copy_(found[:, -1])
        self._convert()
        return True

    def is_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.free.values())

    def keep(self) -> None:
        weights = [value.detach().clone() for value in self.free.values()]
        self.kept = weights, [part.quantizer for part in self._roundings()], self.network

    def go_back(self) -> None:
        weights, quantizers, self.network = self.kept
        with torch.no_grad():
            for value, old in zip(self.free.values(), weights, strict=True):
                value.copy_(old)
        for part, quantizer in zip(self._roundings(), quantizers, strict=True):
            part.quantizer = quantizer

    def finished(self, given: nn.Module) -> nn.Module:
        self.go_back()
        for own, theirs in zip(self.network.modules(), given.modules(), strict=True):
            own.training = theirs.training
        return self.network

    def _calibrate(self, x: Tensor, data: Data | None) -> None:
        """Smallest and largest value of every activation over x [B, *shape] and `data` become the ends of its codes.

        Zero stays a code of its own. What a ReLU sets to zero anyway needs no codes. With `reduce_range` the outputs
        of the network alone span all codes.
        """
        with torch.no_grad():
            values = self.constraints.straight_through(self.free)
        device = next(iter(values.values())).device
        x = x.to(device, torch.float32)
        if data is not None:
            size = self.training.batch_size
            more = islice(batches(data, size, self.generator), -(-CALIBRATION // size))
            x = torch.cat((x, *(inputs.to(x) for inputs, _ in more)))
        fitted: dict[str, Quantizer] = {}
        last = max(i for i, part in enumerate(self.model) if isinstance(part, Rounding))
        with torch.no_grad():
            for index, part in enumerate(self.model):
                if isinstance(part, Rounding):
                    # pooling rounds to the grid of the layer before it
                    name, halved = part.quantizer.name, self.training.reduce_range and index < last
                    fitted.setdefault(name, self._spanning(index, part.quantizer, x, halved))
                    part.quantizer = fitted[name]
                held = {key: values[f"{index}.{key}"] for key, _ in part.named_parameters()}
                x = functional_call(part, held, (x,))

    def _spanning(self, index: int, quantizer: Quantizer, x: Tensor, halved: bool) -> Quantizer:
        """`quantizer`, at place `index`, on the grid that spans what of x matters."""
        low, high = (float(end) for end in torch.aminmax(x))
        low = 0.0 if isinstance(self._next(index), nn.ReLU) else low
        return spanning(quantizer, min(low, 0.0), max(high, 0.0), halved)

    def _roundings(self) -> list[Rounding]:
        return [part for part in self.model if isinstance(part, Rounding)]

    def _next(self, index: int) -> nn.Module | None:
        """The next layer that is more than reshaping."""
        rest = islice(self.model, index + 1, None)
        return next((part for part in rest if not isinstance(part, RESHAPING)), None)

    def _output(self, x: Tensor) -> Tensor:
        values = self.constraints.straight_through(self.free)
        like = next(iter(values.values()))
        return functional_call(self.model, values, (x.to(like.device, like.dtype),)).flatten(1)

    def _convert(self) -> None:
        """The present weights and quantisers as an int8 module."""
        with torch.no_grad():
            values = self.constraints.straight_through(self.free)
        weights = {name: (values[f"{index}.weight"], values.get(f"{index}.bias")) for index, name in self.names.items()}
        quantizers = {part.quantizer.name: part.quantizer for part in self._roundings()}
        self.network = converted(self.given, weights, quantizers).eval()

    def _masks(self, constraints: Constraints | None, grids: dict[str, Grid]) -> dict[str, Tensor]:
        masks = {}
        for index, layer in self.names.items():
            name = f"{index}.weight"
            zero = grids[name].codes(self.free[name].detach()) == 0
            if constraints is not None and f"{layer}.weight" in constraints.masks:
                masks[name] = constraints.masks[f"{layer}.weight"].to(zero.device) != 0
                if masks[name].shape != zero.shape or not bool(zero[~masks[name]].all()):
                    raise InvalidNetworkError(
                        f"the mask of '{layer}.weight' must have its shape and name zeros, and does not"
                    )
            elif constraints is None and bool(zero.double().mean() > PRUNED_SHARE):
                masks[name] = ~zero
        return masks


def _without_pooling(layers: nn.Sequential) -> list[Quantizer]:
    """The quantisers, but for those of pooling, which rounds to the grid before it again under the same name."""
    pooled = [isinstance(layer, nn.AvgPool1d | nn.AvgPool2d) for layer in layers]
    return [
        layer
        for layer, again in zip(layers, [False, *pooled], strict=False)
        if isinstance(layer, Quantizer) and not again
    ]


def spanning(quantizer: Quantizer, low: float, high: float, halved: bool) -> Quantizer:
    """`quantizer` with the smallest scale whose codes, or half of them, reach from `low` <= 0 to `high` >= 0."""
    if low == high:
        return quantizer
    codes = quantizer.highest - quantizer.lowest
    codes = codes // 2 if halved else codes
    below = round(-low / (high - low) * codes)
    # One end is reached exactly: many inputs lie there, such as the black of a picture.
    scale = max(-low / below if below else 0.0, high / (codes - below) if codes > below else 0.0)
    return Quantizer(
        torch.tensor(scale, dtype=torch.float32, device=quantizer.scale.device),  # as state dicts hold it
        quantizer.lowest + below,
        quantizer.lowest,
        quantizer.highest,
        arithmetic=quantizer.arithmetic,
        name=quantizer.name,
    )
