"""auto_LiRPA 0.3 on current torch and numpy: four names that have moved or gone, and one signature.

A newer auto_LiRPA that imports by itself is used as it is. Each shim lives only while it is needed:
three during the import, one while a network is converted (`converting`); the signature stays mended.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch


def load_auto_lirpa() -> ModuleType:
    """The imported `auto_LiRPA`. Raises ImportError where it is not installed or does not work here."""
    if "auto_LiRPA" in sys.modules:
        return sys.modules["auto_LiRPA"]
    if importlib.util.find_spec("auto_LiRPA") is None:
        raise ImportError(
            "auto_LiRPA is not installed: pip install 'torchreach[lirpa]', then pip install --no-deps auto-LiRPA"
        )
    with _import_side_effects_undone():
        try:
            return importlib.import_module("auto_LiRPA")
        except ImportError:
            _forget_partial_import()
        with _moved_names():
            try:
                library = importlib.import_module("auto_LiRPA")
            except Exception as error:
                _forget_partial_import()
                raise ImportError(f"auto_LiRPA does not work here: {error}") from error
        _accept_remove_duplicate(library.BoundedModule)
        return library


@contextmanager
def converting() -> Iterator[None]:
    """State in which auto_LiRPA can read a network; restored afterwards, random state included."""
    options = _onnx_globals()
    version = None if options is None else options.export_onnx_opset_version
    node = torch._C.Node
    # Attributes of a traced node by subscript: torch dropped it; auto_LiRPA reads every attribute that way.
    missing = not hasattr(node, "__getitem__")
    with torch.random.fork_rng(), _quiet():
        if missing:
            node.__getitem__ = lambda self, key: getattr(self, self.kindOf(key))(key)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if missing:
                del node.__getitem__  # type: ignore[attr-defined]
            if options is not None:
                options.export_onnx_opset_version = version


@contextmanager
def _moved_names() -> Iterator[None]:
    """The three names auto_LiRPA 0.3 imports from where they no longer are."""
    with ExitStack() as stack:
        # numpy 2 removed this private module; auto_LiRPA imports `isin` from it and never calls it.
        import numpy as np

        helpers: Any = types.ModuleType("numpy.lib.arraysetops")
        helpers.isin = np.isin
        if "numpy.lib.arraysetops" not in sys.modules:
            sys.modules["numpy.lib.arraysetops"] = helpers
            stack.callback(sys.modules.pop, "numpy.lib.arraysetops", None)
        # The exporter that works on traced graphs has moved inside torch.onnx.
        utils = importlib.import_module("torch.onnx.utils")
        if not hasattr(utils, "_optimize_graph"):
            exporter = importlib.import_module("torch.onnx._internal.torchscript_exporter.utils")
            stack.enter_context(_attribute(utils, "_optimize_graph", exporter._optimize_graph))
        # Setting the opset became an assignment.
        helper = importlib.import_module("torch.onnx.symbolic_helper")
        if not hasattr(helper, "_set_opset_version"):
            stack.enter_context(_attribute(helper, "_set_opset_version", _set_opset_version))
        yield


def _set_opset_version(version: int) -> None:
    options = _onnx_globals()
    assert options is not None
    options.export_onnx_opset_version = version


def _onnx_globals() -> Any:
    for place in ("torch.onnx._internal.torchscript_exporter._globals", "torch.onnx._globals"):
        try:
            return importlib.import_module(place).GLOBALS
        except ImportError:
            continue
    return None


def _accept_remove_duplicate(bounded_module: Any) -> None:
    """torch 2 passes `remove_duplicate` to this overridden method, which convolutions need."""
    listed = bounded_module._named_members
    if "remove_duplicate" in inspect.signature(listed).parameters:
        return

    def named_members(self: Any, get: Any, prefix: str = "", recurse: bool = True, **_: bool) -> Any:
        return listed(self, get, prefix, recurse)

    bounded_module._named_members = named_members


@contextmanager
def _attribute(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)


@contextmanager
def _import_side_effects_undone() -> Iterator[None]:
    """auto_LiRPA sends the root logger to stdout, changes warning filters and switches off TorchScript's
    profiling executor when it is imported; none of that is for a library to decide."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    executor = torch._C._jit_set_profiling_executor(True)
    mode = torch._C._jit_set_profiling_mode(True)
    torch._C._jit_set_profiling_executor(executor)
    torch._C._jit_set_profiling_mode(mode)
    try:
        with _quiet():
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        torch._C._jit_set_profiling_executor(executor)
        torch._C._jit_set_profiling_mode(mode)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor log records: what auto_LiRPA reports that way also comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # Recording, because auto_LiRPA sets filters of its own.
        with warnings.catch_warnings(record=True):
            yield
    finally:
        logging.disable(before)


def _forget_partial_import() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "auto_LiRPA"]:
        del sys.modules[name]
