"""`--config FILE`: the options of a command from a file, named as in `run.json`; what is on the command line wins.

Knows options and a YAML or JSON file; knows nothing of what the options mean.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["Config"]

PLURALS = {
    "methods": "method",
    "settings": "set_",
    "set": "set_",
    "skills": "skill",
    "interventions": "intervention",
    "options": "option",
    "benchmark": "name",
}
"""What a plan calls an option that may be given several times, or otherwise than the command does."""
OWN = ("config", "out", "resume", "overwrite", "quiet", "help", "track")
"""Options that say where and how a command runs, and so are none of a plan's."""


def _read(ctx: typer.Context, file: Path | None) -> Path | None:
    """Make what the file says the defaults of all other options."""
    if file is not None and not ctx.resilient_parsing:
        ctx.default_map = {**(ctx.default_map or {}), **_defaults(ctx, file)}
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=_read,
        is_eager=True,
        help="A YAML or JSON file with options, named as in the plan of run.json, which is one itself; those given beside it win.",
    ),
]


def _defaults(ctx: typer.Context, file: Path) -> dict[str, Any]:
    from lens_unlearn.core.errors import LensUnlearnError

    known = {str(one.name): one for one in ctx.command.params if one.name not in OWN}
    names = {key: name for key, name in PLURALS.items() if name in known}
    for name, one in known.items():
        names |= {text.strip("-").replace("-", "_"): name for text in (name.strip("_"), *one.opts)}
    chosen: dict[str, Any] = {}
    for key, value in _content(file).items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            near = get_close_matches(str(key), sorted(names), n=1) or get_close_matches(
                str(key), sorted(names), n=1, cutoff=0
            )
            raise LensUnlearnError(f"{file}: {ctx.info_name} has no option {str(key)!r}: did you mean {near[0]!r}?")
        if value is None:
            continue
        option = known[name]
        wrong = LensUnlearnError(f"{file}: {key}: {value!r} cannot be meant here: give what --{key} takes")
        if getattr(option, "is_flag", False) != isinstance(value, bool):
            raise wrong
        if getattr(option, "multiple", False):
            chosen[name] = _texts(value)
        else:  # several numbers stand with commas on the command line
            chosen[name] = ",".join(map(_text, value)) if isinstance(value, list) else value
        try:
            option.process_value(ctx, chosen[name])
        except typer.BadParameter as error:
            raise wrong from error
    return chosen


def _content(file: Path) -> Mapping[Any, Any]:
    """Return the options that a file holds: all of it, or the plan of a run."""
    import yaml

    from lens_unlearn.core.errors import LensUnlearnError

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise LensUnlearnError(f"--config {file} cannot be read: {why}") from error
    if isinstance(content, Mapping) and isinstance(content.get("plan"), Mapping):
        content = content["plan"]
    if not isinstance(content, Mapping):
        raise LensUnlearnError(f"--config {file} holds no options: write one a line, as in 'tokens: 20000'")
    return content


def _texts(value: Any) -> list[str]:
    """Write the values of an option that may be given several times as the command line has them."""
    if isinstance(value, Mapping):
        return [f"{key}={_text(one)}" for key, one in value.items()]
    return [_text(one) for one in value] if isinstance(value, list | tuple) else [_text(value)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
