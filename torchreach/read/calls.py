"""Whether calling a module runs the forward pass of its class, and of the class whose rule it would get.

`module(x)` is `type(module).__call__`, which runs global hooks, the module's hooks and `module.forward`: an attribute
of the instance where there is one. A reader that looks at classes and parameters alone would miss all of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module

from torchreach.graph.weights import is_weight_hook

# What a subclass may define anew without computing anything else.
_HARMLESS = {
    *(
        "__init__",
        "__new__",
        "__init_subclass__",
        "__class_getitem__",
        "__module__",
        "__doc__",
        "__dict__",
        "__slots__",
    ),
    *("__weakref__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__hash__"),
    *("__repr__", "__str__", "extra_repr", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__copy__"),
    *("__deepcopy__", "__dir__", "__constants__", "__static_attributes__", "__firstlineno__", "reset_parameters"),
    *("get_extra_state", "set_extra_state", "_load_from_state_dict", "_save_to_state_dict", "state_dict", "_version"),
    *("load_state_dict", "call_super_init", "dump_patches", "T_destination", "_get_name"),
}
_CALL = ("__call__", "_call_impl", "_wrapped_call_impl")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SCRIPT = "TorchScript hides its layers: give the module it was made from, or torch.export.export(module, (example,))"


def unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    """What `torch.compile`, DataParallel and DistributedDataParallel wrap, and its path in `module`."""
    path = ""
    while True:
        kind = type(module)
        if kind.__name__ == "OptimizedModule" and kind.__module__ == "torch._dynamo.eval_frame":
            child = "_orig_mod"
        elif kind in _PARALLEL:
            child = "module"
        else:
            return module, path
        if _hooks(module):
            return module, path
        module, path = getattr(module, child), f"{path}.{child}" if path else child


def is_wrapper(module: nn.Module) -> bool:
    """Whether `module` wraps or hides its layers, so that only its owner's reading of it helps."""
    return unwrapped(module)[0] is not module or isinstance(module, torch.jit.ScriptModule)


def altered(module: nn.Module) -> str:
    """Why a call of `module` need not compute its class's `forward`; empty if it does."""
    if isinstance(module, torch.jit.ScriptModule):
        return _SCRIPT
    kind = type(module)
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a global forward hook (register_module_forward_hook) may change what every module computes; remove it"
    changed = [name for name in _CALL if _static(kind, name) is not _static(nn.Module, name)]
    graph = isinstance(module, fx.GraphModule)  # fx gives each a class, whose __call__ explains errors of its code
    if changed and not (graph and getattr(kind.__call__, "__module__", "") == "torch.fx.graph_module"):
        return "its class defines __call__, which may compute something else than forward"
    if hooks := _hooks(module):
        return f"a forward {hooks} may change what the layer computes; remove it"
    passed = _HARMLESS | {"train", "eval"} if graph else _HARMLESS  # of exported ones, which raise
    for name, value in vars(module).items():
        if name not in passed and callable(_static(kind, name)) and not _is_own(module, name, value):
            return (
                f"the instance has a {name!r} of its own, which replaces that of its class; define it in a class, or "
                f"delete the attribute"
            )
    if graph and not _is_compiled(module):
        return "its graph was changed after its code was made: call module.recompile()"
    return ""


def keeps(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the class of `module` takes over all that `kind` does, changing neither it nor how it is called."""
    own = type(module)
    if own is kind:
        return True
    return all(_static(own, name) is _static(kind, name) for name in set(dir(kind)) - _HARMLESS)


def _hooks(module: nn.Module) -> str:
    """Kind of a hook that may change values; empty if there is none."""
    after, before = module._forward_hooks.values(), module._forward_pre_hooks.values()
    if isinstance(module, fx.GraphModule):  # those of exported programs check inputs
        after, before = ([hook for hook in hooks if not _checks_inputs(hook)] for hooks in (after, before))
    return "hook" if after else "" if all(is_weight_hook(hook) for hook in before) else "pre-hook"


def _checks_inputs(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "torch.export._unlift"


def _static(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _is_own(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is the method that it shadows."""
    return getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is _static(
        type(module), name
    )


def _is_compiled(module: fx.GraphModule) -> bool:
    return module.code == module.graph.python_code(root_module="self").src
