"""Names of the operations in a traced graph: one name for each, whichever tracer and spelling it came from.

Only functions listed here get a name that `read.fx` knows: an unknown function that happens to be called
"relu" must not pass for one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from torchreach.graph.smooth import BY_NAME, FUNCTIONS

# For torch.fx. The operators of torch.export and tensor methods carry their names (aten::relu, .relu()).
_FUNCTIONS: dict[Any, str] = {
    **FUNCTIONS,
    **{getattr(torch, n): n for n in ("relu", "relu_", "clamp", "clamp_min", "flatten", "reshape", "unflatten")},
    **{getattr(torch, n): n for n in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide")},
    **{getattr(torch, n): n for n in ("neg", "rsub", "matmul", "mm", "addmm", "t", "transpose", "dropout")},
    **{getattr(torch, n): n for n in ("conv1d", "conv2d", "squeeze", "unsqueeze", "clone", "tensor", "ones", "zeros")},
    **{
        getattr(torch, n): n
        for n in ("cat", "maximum", "minimum", "max", "abs", "prelu", "chunk", "split", "mean", "sum")
    },
    **{getattr(torch, n): n for n in ("permute", "index_select", "select", "flip", "clamp_max", "prelu")},
    **{getattr(torch, n): n for n in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")},
    **{getattr(functional, n): n for n in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")},
    **{getattr(torch, n): n for n in ("max_pool1d", "max_pool2d", "adaptive_avg_pool1d")},
    **{getattr(torch, n): n for n in ("conv_transpose1d", "conv_transpose2d")},
    torch.concat: "cat",
    torch.swapaxes: "transpose",
    **{getattr(functional, n): n for n in ("leaky_relu", "hardtanh", "relu6", "prelu", "hardsigmoid", "pad")},
    **{getattr(functional, n): n for n in ("leaky_relu_", "hardtanh_", "max_pool1d", "max_pool2d")},
    **{getattr(functional, n): n for n in ("adaptive_avg_pool1d", "adaptive_avg_pool2d")},
    torch.quantize_per_tensor: "quantize_per_tensor",
    torch.quantize_per_channel: "quantize_per_channel",
    torch.fake_quantize_per_tensor_affine: "fake_quantize_per_tensor_affine",
    torch.fake_quantize_per_channel_affine: "fake_quantize_per_channel_affine",
    torch.dequantize: "dequantize",
    **{getattr(where, n): n for n in ("softmax", "log_softmax") for where in (torch, functional)},
    functional.relu: "relu",
    functional.relu_: "relu_",
    functional.linear: "linear",
    functional.dropout: "F.dropout",
    functional.batch_norm: "F.batch_norm",
    functional.avg_pool1d: "avg_pool1d",
    functional.avg_pool2d: "avg_pool2d",
    functional.conv1d: "conv1d",
    functional.conv2d: "conv2d",
    operator.add: "add",
    operator.iadd: "add_",
    operator.sub: "sub",
    operator.isub: "sub_",
    operator.mul: "mul",
    operator.imul: "mul_",
    operator.truediv: "div",
    operator.itruediv: "div_",
    operator.neg: "neg",
    operator.matmul: "matmul",
    operator.getitem: "getitem",
    getattr: "getattr",
}
# Conversions named after what they convert to.
DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
CHECKS = ("_guards_fn", "_assert_tensor_metadata")  # of exported programs: assertions about the example
_METHODS = {
    *("relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_min_", "neg", "matmul", "mm"),
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"),
    *("flatten", "view", "reshape", "unflatten", "t", "transpose", "permute", "squeeze", "unsqueeze"),
    *("softmax", "log_softmax"),
    *("abs", "abs_", "clamp_max", "clamp_max_", "maximum", "minimum", "max", "chunk", "split", "mean", "sum"),
    *("index_select", "select", "flip", "prelu"),
    *("contiguous", "clone", "detach", "to", *DTYPES, "size", "dim"),
    "dequantize",
    *(name + end for name in BY_NAME if hasattr(torch.Tensor, name) for end in ("", "_")),
}
IDENTITIES = {
    *("contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy"),
    *("to", *DTYPES, "_to_copy", "type_as"),
}
# Computed at once where all arguments are constants. None of them draws random numbers.
CONSTANT = {
    *("add", "sub", "rsub", "mul", "div", "neg", "matmul", "mm", "linear", "relu", "clamp", "clamp_min"),
    *("t", "transpose", "permute", "reshape", "view", "flatten", "squeeze", "unsqueeze", "expand"),
    *("sqrt", "zeros_like"),
    "export.access_subclass_inner_tensor",  # of weights of torchao
    *("tensor", "ones", "zeros", "full", "getitem", "getattr", "size", "sym_size", "dim"),
    *IDENTITIES,
}
_SAME = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "_unsafe_view": "view",
    "concat": "cat",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
}
# Where functions that may work in place are told so, when not by name.
_INPLACE_AT = {"relu": 1, "relu6": 1, "hardsigmoid": 1, "leaky_relu": 2, "hardtanh": 3, "F.dropout": 3}


def operation(node: fx.Node) -> str:
    """Name of what a call_function or call_method node does; in-place forms end with an underscore."""
    target = node.target
    if node.op == "call_method":
        name = str(target) if str(target) in _METHODS else f"Tensor.{target}"
    elif isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        qualified = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        namespace, name = qualified.split("::")
        name = name if namespace == "aten" else f"{namespace}.{name}"
    else:
        name = _FUNCTIONS.get(target) or _full_name(target)
    return _SAME.get(name, name)


def changes_in_place(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call of the operation `name` changes its first argument."""
    at = _INPLACE_AT.get(name, len(args))
    return name.endswith("_") or bool(kwargs.get("inplace")) or bool(args[at:] and args[at])


def is_entry(node: fx.Node) -> bool:
    """Whether `node` reads the network's input, and no other node that computes something does."""
    read = node.args[0] if node.args else None
    if not isinstance(read, fx.Node) or read.op != "placeholder":
        return False
    return all(user is node or any(check in str(user.target) for check in CHECKS) for user in read.users)


def _full_name(target: Any) -> str:
    """Of a function without a rule, for messages: "torch.cat", "torch.nn.functional.softmax"."""
    name = getattr(target, "__name__", str(target))
    module = getattr(target, "__module__", None) or ("torch" if getattr(torch, name, None) is target else "")
    return f"function {module}.{name}" if module else f"function {name}"
