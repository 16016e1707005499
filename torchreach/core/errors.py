"""What a user can do wrong, one class each.

Every message names what was required and what was received. All are `ValueError`s, so that a caller who
does not know torchreach can still catch them; the command line turns each into one line and exit status 2.
"""

from __future__ import annotations


class TorchreachError(ValueError):
    """Base class of every error that wrong input can cause."""


class ShapeError(TorchreachError):
    """Tensors, stars or networks whose shapes do not fit together."""


class InvalidSetError(TorchreachError):
    """A set that is empty, unbounded, not finite, or has lower > upper."""


class UnsupportedLayerError(TorchreachError):
    """A network contains a layer torchreach has no sound rule for; the message names it and its position."""


class InvalidNetworkError(TorchreachError):
    """A network whose weights are not finite, or two networks that cannot be compared."""


class FileFormatError(TorchreachError):
    """A file that is missing, corrupt, or of an unknown kind."""


class OptionError(TorchreachError):
    """An option that does not exist or whose value is out of range."""


class UncalibratedWarning(UserWarning):
    """Activations of a deployed network have scale 1 and zero point 0: its scales were probably never calibrated."""


class KernelMismatchError(TorchreachError):
    """A network as given computes something at an input of the set that its kernels were predicted not to compute."""


class UncoveredKernelsWarning(UserWarning):
    """Int8 layers add up products on this machine in a way that no bound here is known to cover; it names them."""
