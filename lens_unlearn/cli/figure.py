"""The command that saves a figure of a run: `figure`."""

from pathlib import Path
from typing import Annotated

import typer

from lens_unlearn.cli.application import command


@command()
def figure(
    *,
    run: Annotated[Path, typer.Argument(help="The folder of a run or a comparison, or its page.")],
    name: Annotated[
        str | None,
        typer.Argument(help="A figure's title, the function that draws it, or its number. [default: list all]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file: .svg, .pdf, .png or .html.")] = None,
    width: Annotated[str, typer.Option(help="'column' (3.25 inches), 'page' (6.75), or inches.")] = "column",
) -> None:
    """Save a figure of a run for a paper, and print its caption: model, texts with their tokens, and seeds."""
    from lens_unlearn.core.errors import LensUnlearnError
    from lens_unlearn.figures.saving import WIDTHS, save_figure
    from lens_unlearn.figures.theme import meta_of
    from lens_unlearn.reports.figures_of_page import figure_of, figures_of

    if name is None:
        for number, one in enumerate(figures_of(run), start=1):
            typer.echo(f"{number:2}  {meta_of(one)['title']}")
        return
    if out is None:
        raise LensUnlearnError("--out is missing: give a file for the figure, such as --out figure.pdf")
    try:
        size = width if width in WIDTHS else float(width)
    except ValueError as error:
        raise LensUnlearnError(f"--width {width} is no width: give column, page, or inches") from error
    said = save_figure(figure_of(run, name), out, width=size)
    typer.echo(f"{out}: {said}")
