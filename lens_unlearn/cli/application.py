"""The application that commands are added to, and what they do alike: tables in the help, interruptions, parts that failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lens_unlearn.cli.options import grouped

__all__ = ["BenchCommand", "MethodsCommand", "app", "command", "end", "interruptible"]

app = typer.Typer(
    name="lens-unlearn",
    help="Find the neurons of a skill in a language model, and remove it reversibly, with hooks.",
    epilog="`lens-unlearn methods` lists the methods, and `lens-unlearn methods NAME` the options of one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    from lens_unlearn import __version__

    if wanted:
        typer.echo(f"lens-unlearn {__version__}")
        raise typer.Exit


@app.callback()
def _application(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def command(cls: type[TyperCommand] | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the commands, with the options of the groups that it takes."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        app.command(cls=cls)(grouped(function))
        return function

    return add


class MethodsCommand(TyperCommand):
    """A command whose help lists the methods; they are imported only when that help is asked for, since that is slow."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the table of methods at the end."""
        from lens_unlearn.methods import METHODS

        super().format_help(ctx, formatter)
        with formatter.section("Methods"):
            formatter.write_dl([(method.name, method.summary) for method in METHODS])


class BenchCommand(MethodsCommand):
    """A command whose help lists the benchmarks as well."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the tables at the end."""
        from lens_unlearn.benchmarks import BENCHMARKS

        super().format_help(ctx, formatter)
        with formatter.section("Benchmarks"):
            options = {one.name: f" Options: {', '.join(one.options)}." if one.options else "" for one in BENCHMARKS}
            formatter.write_dl([(one.name, one.summary + options[one.name]) for one in BENCHMARKS])


def end(report: Any, *, resume: bool = True) -> None:
    """Say what failed of a run, and exit with code 1 if anything did."""
    from lens_unlearn.core.text import visible

    failed = {} if report is None else report.provenance.get("failed", {})
    for what, why in failed.items():
        typer.echo(visible(f"lens-unlearn: {what} failed: {why}"), err=True)
    if failed:
        hint = ", and the same command with --resume tries it again" if resume else ""
        typer.echo(f"lens-unlearn: the rest is in the report{hint}", err=True)
        raise typer.Exit(1)


@contextmanager
def interruptible(out: Path) -> Iterator[None]:
    """On Ctrl-C, say how to continue if finished parts are stored, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        partial = out.parent / f"{out.name}.partial"
        hint = f": the same command with --resume goes on from {partial}" if partial.exists() else ""
        typer.echo(f"lens-unlearn: interrupted{hint}", err=True)
        raise typer.Exit(130) from None
