"""The commands that use, check, show and share what others wrote: `generate`, `check`, `methods`, `show`, `diff` and `push`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_unlearn.cli.application import command
from lens_unlearn.cli.options import (
    Chat,
    Loading,
    Model,
    PrependBos,
    System,
    newlines,
)


@command()
def generate(
    *,
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="A text to continue; may be given several times.")],
    intervention: Annotated[
        list[Path], typer.Option(help="A saved intervention; several act in the order given.")
    ] = [],
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation in tokens.")] = 60,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    prepend_bos: PrependBos = None,
    chat: Chat = False,
    system: System = None,
    loading: Loading,
) -> None:
    """Continue a prompt, with saved interventions if any are given."""
    import lens_unlearn as lu
    from lens_unlearn.core.numbers import check_numbers

    check_numbers(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    loaded = lu.load_model(model, **loading.options)
    edit = lu.Chain(tuple(lu.load_intervention(path, loaded) for path in intervention))
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    sampling |= {"prepend_bos": prepend_bos, "chat": chat, "system": system}
    prompts = [newlines(text) for text in prompt]
    for text, answer in zip(prompts, lu.generate(loaded, prompts, intervention=edit, **sampling), strict=True):
        typer.echo(answer if chat else text + answer)


@command()
def check(
    *,
    model: Annotated[str, typer.Argument(help="'demo', a Hugging Face directory, or a hub name.")],
    loading: Loading,
) -> None:
    """Check on a model that sites, statistics and interventions mean what they say; exit code 1 if something does not."""
    import lens_unlearn as lu

    found = lu.check_model(lu.load_model(model, **loading.options))
    typer.echo(str(found))
    if found.failed:
        raise typer.Exit(1)


@command()
def methods(
    *,
    name: Annotated[str | None, typer.Argument(help="A method. [default: all, a line each]")] = None,
) -> None:
    """List the methods, or show a method's options: each with its type, default and meaning."""
    import textwrap

    from lens_unlearn.methods import METHODS, by_name
    from lens_unlearn.methods.options import options_of

    if name is None:
        width = max(len(method.name) for method in METHODS)
        for method in METHODS:
            typer.echo(f"{method.name:{width}}  {method.summary}")
        return
    method = by_name(name)
    typer.echo(f"{method.name}: {method.summary}\n\nOptions, as in --set {method.strength}=VALUE:\n")
    for option in options_of(method):
        typer.echo(f"  {option.name}  ({option.type}; default {option.shown})")
        typer.echo(textwrap.fill(option.meaning, 100, initial_indent="      ", subsequent_indent="      "))


@command()
def show(*, file: Annotated[Path, typer.Argument(help="A file that lens-unlearn wrote.")]) -> None:
    """Describe what a file holds."""
    from lens_unlearn import load_intervention, load_moments
    from lens_unlearn.core import artefacts
    from lens_unlearn.core.text import visible

    header, _ = artefacts.read(file)
    lines = [f"{header['kind']}, written by lens_unlearn {header['lens_unlearn']}"]
    if header["kind"] == "intervention":
        edit = load_intervention(file)
        lines += [repr(edit), *(f"  {place}: {text}" for place, text in edit.describe().items())]
    elif header["kind"] == "moments":
        moments = load_moments(file)
        lines += [repr(moments), f"  statistics: mean, std, rms, mean_abs, positive {' '.join(moments.extra)}".rstrip()]
    for key in ("model", "provenance", "note"):
        if value := header.get(key):
            lines.append(f"  {key}: {value if isinstance(value, str) else json.dumps(value)}")
    # A file may come from anywhere: nothing in it moves the cursor of a terminal, or writes a line that is not ours.
    typer.echo("\n".join(visible(line, keep="") for line in lines))


@command()
def diff(
    *,
    a: Annotated[Path, typer.Argument(help="The folder of a run.")],
    b: Annotated[Path, typer.Argument(help="The folder of another run.")],
    out: Annotated[
        Path | None, typer.Option(help="A page to write as well, ending in .html; or all metrics, ending in .csv.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Put two runs side by side: what changed in the plan, where they selected the same neurons, and what they measured."""
    import lens_unlearn as lu
    from lens_unlearn.core.text import visible

    if out is not None and out.suffix not in (".html", ".csv"):
        raise lu.ArtefactError(f"{out} ends neither in .html nor in .csv: give another --out")
    if out is not None and out.exists() and not overwrite:
        raise lu.ArtefactError(f"{out} exists: give another --out, or --overwrite to replace it")
    found = lu.diff(a, b)
    if out is not None:
        (found.to_html if out.suffix == ".html" else found.to_csv)(out)
    typer.echo(visible(str(found), keep="\n"))
    if out is not None:
        typer.echo(f"written: {out}")


@command()
def push(
    *,
    path: Annotated[Path, typer.Argument(help="A file that lens-unlearn wrote, or the folder of a run.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of a model repository on the Hugging Face hub.")],
    private: Annotated[
        bool,
        typer.Option(
            "--private/--public", help="Who can read it; a public repository is written to with --public only."
        ),
    ] = True,
    revision: Annotated[str | None, typer.Option(help="A branch. [default: the main one]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
) -> None:
    """Share a file or a run on the Hugging Face hub, with a model card; files can be loaded as hf:OWNER/NAME/FILE.

    Of a folder, the files that its run wrote are uploaded, and no others; they are listed first. Private unless --public.
    """
    from lens_unlearn.experiments.hub import push_to_hub, shared_files

    names = [*shared_files(path), "README.md"]
    typer.echo(f"to {repo} ({'private' if private else 'public'}): {', '.join(names)}")
    if not dry_run:
        typer.echo(push_to_hub(path, repo, private=private, revision=revision))
