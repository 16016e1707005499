"""The group of commands: every bad input ends in one line and exit status 2, Ctrl-C in one line and 130."""

from __future__ import annotations

import shlex
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from torchreach.core.errors import TorchreachError

# typer carries its own copy of click since 0.2x; before that it used the package.
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line on stderr; nothing of the source of some package that Python compiles for the first time."""
    if not issubclass(category, SyntaxWarning):
        print(f"torchreach: warning: {message}", file=sys.stderr)


class Group(TyperGroup):
    """Commands whose every bad input ends in one line and status 2."""

    def invoke(self, ctx: Any) -> Any:
        """As typer's; Ctrl-C that no command has dealt with ends in one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort from None

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As typer's; errors and warnings are printed here."""
        args = list(sys.argv[1:] if args is None else args)
        args = args or ["--help"]
        shown = warnings.showwarning
        warnings.showwarning = _show
        try:
            obj = shlex.join(["torchreach", *args])
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, obj=obj, **extra)
        except (_ClickException, TorchreachError, OSError) as error:
            message = getattr(error, "format_message", error.__str__)()
            print(f"torchreach: error: {' '.join(message.split())}", file=sys.stderr)
            status = 2
        except typer.Abort:
            print("torchreach: interrupted", file=sys.stderr)
            status = 130
        finally:
            warnings.showwarning = shown
        status = status if isinstance(status, int) else 0
        if standalone_mode:
            sys.exit(status)
        return status
