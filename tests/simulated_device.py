"""An accelerator in plain Python: `device="sim"` keeps its tensors in host memory, and counts what runs on it.

It refuses what CUDA refuses: operands on different devices (numbers of no dimension aside, where CUDA takes them),
`.numpy()`, generators of another device. It counts, inside `counting()`:

    launches   operations that are neither views, allocations nor copies between devices; each counts once, although
               CUDA runs some of them (sort, nonzero, padding) as several kernels
    reads      where the host waits for a value: item, tolist, nonzero, boolean masks as indices, .cpu(), equal,
               repeat_interleave without output_size
    uploads    copies of host tensors to the device, indices on the host included
    bytes      of the operands and results of launches

How it works: torch's PrivateUse1 backend, whose tensors wrap a host tensor (`raw`) each. The backend stays registered
once there was a simulation, which changes nothing on other devices; what a simulation changes elsewhere in torch
(see `_patched`) it undoes when it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration

from tests.device_counts import Counts, active, note
from torchreach.graph import weights

NAME = "sim"
SETUP = "_setup_privateuseone_for_python_backend"
WHY_NOT: str | None = None
if not hasattr(backend_registration, SETUP):
    WHY_NOT = f"torch {torch.__version__} has no backends in Python"
elif torch.cuda.is_available():  # of two accelerators in one process, torch would take this one for the current one
    WHY_NOT = "there is a CUDA device to test on"
SEEDS = 1 << 62  # generators of the device have seeds from here on

COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# A number of no dimension may come from the host here, and to pointwise operations other than STRICT.
NUMBERS = {"index_put", "index_put_", "_index_put_impl_", "masked_fill", "masked_fill_", "fill", "fill_"}
STRICT = {"clamp", "clamp_", "clamp_min", "clamp_max", "lerp", "lerp_"}
ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"_unsafe_view", "lift_fresh"}
READS = {
    *("_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero"),
    *("unique_consecutive", "unique_dim"),
}
# torch makes these by an empty tensor that it then resizes, which a wrapper cannot follow.
FACTORIES = (
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "logspace", "randperm"),
    "randperm.generator",
)

_depth = 0  # of nested simulations
_library: list[torch.library.Library] = []  # what was registered holds as long as these live


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Inside, `torch.device("sim")` can be used like a CUDA device. May be nested."""
    global _depth
    if WHY_NOT is not None:
        raise RuntimeError(f"no simulated device: {WHY_NOT}")
    if not _library:
        _register()
    _depth += 1
    try:
        with _patched() if _depth == 1 else contextlib.nullcontext():
            yield
    finally:
        _depth -= 1


@contextlib.contextmanager
def counting(*, where: bool = False) -> Iterator[Counts]:
    """Counts what runs on the device inside, a simulation too; `where` also finds the lines, which takes time."""
    counts = Counts(where)
    with simulated():
        active.append(counts)
        try:
            yield counts
        finally:
            active.remove(counts)


class SimTensor(Tensor):
    """A tensor of the device: metadata, and the host tensor that holds its numbers."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimTensor:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
        )
        out.raw = raw
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}:{self.raw!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = SimTensor(self.raw.clone())
        copy = torch.nn.Parameter(copy) if isinstance(self, torch.nn.Parameter) else copy
        memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return copy

    # What torch answers without its dispatcher.

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        note("read", "tolist")
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")

    # torch makes tensors of lists where backends in Python are hidden.

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, **{"device": self.device, **options})


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation of torch on arguments of which some, or the device asked for, are the simulated device's."""
    name = func._schema.name.removeprefix("aten::")
    target = kwargs.get("device")
    to_host = target is not None and torch.device(target).type == "cpu"
    tensors = [value for value in _flat((args, kwargs)) if isinstance(value, Tensor)]
    _refuse(func, name, args, kwargs, tensors)
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    result = func(*_mapped(_unwrap, args), **_mapped(_unwrap, kwargs))
    if active:
        _count(func, name, args, kwargs, to_host, [*tensors, *_flat(result)])
    if to_host:
        return result
    own = {id(t.raw): t for t in tensors if isinstance(t, SimTensor)}  # operations in place return their argument
    hosts = {id(t) for t in tensors}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in hosts:
            return value
        known = own.get(id(value))
        if known is None:
            return SimTensor(value)
        if known.shape != value.shape or known.stride() != value.stride():
            raise NotImplementedError(f"{func} changed the shape of a tensor of the simulated device in place")
        return known

    return _mapped(wrapped, result)


def _refuse(func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Raises RuntimeError where CUDA does not take the operands' devices."""
    generator = kwargs.get("generator")
    if generator is not None and generator.initial_seed() < SEEDS:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    hosts = [t for t in tensors if not isinstance(t, SimTensor)]
    if not hosts or name in COPIES:
        return
    if name in INDEXING:
        indices = [id(index) for index in args[1]]
        hosts = [t for t in hosts if id(t) not in indices]
    pointwise = torch.Tag.pointwise in func.tags and name not in STRICT
    if any(t.dim() for t in hosts) or (hosts and not pointwise and name not in NUMBERS):
        shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given {shapes}")


def _count(func: Any, name: str, args: Any, kwargs: dict[str, Any], to_host: bool, values: list[Any]) -> None:
    ours = isinstance(args[0], SimTensor) if args else False
    if name == "copy_" and (not ours or not isinstance(args[1], SimTensor)):
        note("upload" if ours else "read", "copy to the device" if ours else "copy to the host")
        return
    if to_host:
        note("read", "copy to the host")
        return
    aliases = [part.alias_info for part in func._schema.returns if part.alias_info]
    if name in ALLOCATIONS | VIEWS or any(not alias.is_write for alias in aliases):
        return
    note("launch", name)
    bytes_ = sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
    for counts in active:
        counts.bytes += bytes_
    if name in READS or (func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        note("read", name)
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        for _ in [index for index in indices if not isinstance(index, SimTensor)]:
            note("upload", "host index")
        masks = [index for index in indices if isinstance(index, SimTensor) and index.dtype == torch.bool]
        if masks and all(isinstance(value, SimTensor) for value in args[2:3]):  # a number of the host fills a mask
            note("read", "boolean index")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {key: _mapped(change, part) for key, part in value.items()}
    return change(value)


def _indices(index: Any) -> Any:
    """Lists in an index as tensors on the host."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _unwrap(value: Any) -> Any:
    return value.raw if isinstance(value, SimTensor) else value


class _Backend:
    """What torch asks of a device's module, `torch.sim`: outside of a simulation there is no device."""

    def device_count(self) -> int:
        return int(_depth > 0)

    def is_available(self) -> bool:
        return _depth > 0

    def is_initialized(self) -> bool:
        return _depth > 0

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Numbers that no generator is given for come from the CPU's."""

    def get_rng_state(self, _: Any = None) -> Tensor:
        return torch.empty(0)

    def set_rng_state(self, *_: Any) -> None:
        """There is none."""


def _register() -> None:
    getattr(backend_registration, SETUP)(NAME, _Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, *args, **kwargs), dispatch_key="PrivateUse1")
    factories = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        base, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, base), overload or "default")
        factories.impl(name, lambda *args, _func=func, **kwargs: _run(_func, *args, **kwargs), "PrivateUse1")
    _library.extend((library, factories))


class _Generator(torch.Generator):
    """Random numbers of the simulated device, of which torch sees a generator of the CPU with another seed."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        if torch.device(device).type != NAME:
            return torch._C.Generator(device)
        return super().__new__(cls).manual_seed(0)

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(SEEDS + seed)


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """What is different in torch, on every device, while there is a simulation.

    - `torch.tensor` and its like build on the host, then move: their own way hides backends in Python.
    - `torch.Generator` makes those of this device, and torchreach takes its tensors for plain ones.
    - Modules that move swap their parameters: the wrapper of a parameter cannot change its dtype.
    - Backward passes run in the calling thread: torch may have started its threads before there was this device.
    """

    def built(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def build(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
            if isinstance(data, SimTensor) or device is None or torch.device(device).type != NAME:
                return original(data, *args, device=device, **options)
            return original(data, *args, **options).to(device)

        return build

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name in ("tensor", "as_tensor", "asarray"):
            stack.enter_context(mock.patch.object(torch, name, built(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(weights, "_PLAIN", (*weights._PLAIN, SimTensor)))
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield
