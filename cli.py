"""The `anyvlm` command: its subcommands, and what becomes of their errors.

torch, transformers and the package's own modules are imported inside the commands, so that help comes at once.
"""

import sys
from typing import NoReturn

import typer

from .commands.check import check
from .commands.compose import compose
from .commands.convert import convert
from .commands.demo import demo
from .commands.generate import generate
from .commands.merge import merge
from .commands.swap import swap
from .commands.train import train
from .commands.verify import verify
from .publishing.command import push


#: Exit code of a process that Ctrl-C ended.
_INTERRUPTED = 130

app = typer.Typer(
    name="anyvlm",
    help="Join any vision tower and any causal language model of transformers into one Hugging Face model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

for _command in (compose, swap, train, merge, generate, demo, check, verify, convert, push):
    app.command()(_command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line, and exit: 0 if all went well, 2 if it was called wrongly, 1 on any other bad input.

    Args:
        arguments: What stands after `anyvlm`. Default: the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        exit_code = app(arguments, prog_name="anyvlm", standalone_mode=False) or 0
    except typer.Abort:
        _fail("interrupted", _INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - what is not the user's doing is raised again
        if "--debug" in arguments or not _is_expected(error):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "anyvlm")
        if hasattr(error, "format_message"):
            _fail(f"{error.format_message()} See {where} --help", error.exit_code)
        _fail(str(error) or type(error).__name__, 1)
    if exit_code == _INTERRUPTED:  # typer says nothing
        _fail("interrupted", _INTERRUPTED)
    sys.exit(exit_code)


def _is_expected(error: Exception) -> bool:
    """Whether an error tells its reader what to do: wrong arguments, parts that do not fit, files that are not there.

    A wrong call of the command line is known by its `format_message`, in every version of typer.
    """
    if hasattr(error, "format_message"):
        return True
    from safetensors import SafetensorError

    from anyvlm.demo import DemoError

    return isinstance(error, (ValueError, OSError, ImportError, SafetensorError, DemoError))


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.echo(f"anyvlm: error: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
