"""The command line, `lens-unlearn COMMAND`.

Knows options and how they map to the functions of the package; knows nothing of what these do. Heavy imports happen inside the
commands, so that `--help` answers at once. A command is a function under `@app.command()` in a file of its family.
"""

import os
import sys

import typer

from lens_unlearn.cli import experiments, figure, measures, tools
from lens_unlearn.cli.application import app

__all__ = ["app", "experiments", "figure", "main", "measures", "tools"]


def _process() -> str:
    rank, several = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE") or 1) > 1
    return f" (process {rank} of {os.environ['WORLD_SIZE']})" if rank and several else ""


def main() -> None:
    """Run the command line; bad input ends with one sentence and exit code 2, what fails later with 1."""
    from lens_unlearn.core.allocator import tune_allocator
    from lens_unlearn.core.errors import LensUnlearnError
    from lens_unlearn.core.text import visible

    tune_allocator()
    try:
        app(prog_name="lens-unlearn")
    except LensUnlearnError as error:
        hint = f"; the same command with --resume goes on from {error.kept}" if error.kept else ""
        typer.echo(visible(f"lens-unlearn{_process()}: {error}{hint}"), err=True)
        sys.exit(1 if error.kept else 2)
    except KeyboardInterrupt:
        typer.echo("lens-unlearn: interrupted", err=True)
        sys.exit(130)
