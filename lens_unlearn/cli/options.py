"""What several commands take: options, groups of options, and how their texts become values.

A command takes a group as one argument, such as ``loading: Loading``; `grouped` gives it the options of the group. Knows nothing of
what a command does with them.
"""

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Answers",
    "BatchSize",
    "Chat",
    "Confidence",
    "Controls",
    "Interventions",
    "Loading",
    "Memorization",
    "Model",
    "Out",
    "Overwrite",
    "PrependBos",
    "Quiet",
    "Reading",
    "Resume",
    "SRC",
    "Settings",
    "SkipSinks",
    "System",
    "Template",
    "Tokens",
    "edits_of",
    "grouped",
    "newlines",
    "numbers",
    "pairs",
    "settings_from",
]

SRC = (
    "a file (jsonl, json, csv, tsv, parquet, txt, also .gz or .zst; FILE:FIELD), a folder, a pattern such as 'texts/*.jsonl', "
    "hf:NAME/CONFIG:SPLIT:FIELD, or demo:NAME; with @FIELD or @ROWS after it, the groups that stay together, such as authors"
)
Model = Annotated[str, typer.Option(help="'demo', a Hugging Face directory, or a hub name.")]
Out = Annotated[Path, typer.Option(help="A new folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run of the same command, if there is one.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]
Controls = Annotated[
    int,
    typer.Option(
        "--control-seeds",
        "--controls",
        "--seeds",
        help="Random controls of each method or condition, each with its own seed.",
    ),
]
Deal = Annotated[
    bool | None,
    typer.Option(
        "--deal-controls/--no-deal-controls",
        help="Read each test document under one of a method's controls, not all. "
        "[default: where there are several methods, and 4 controls at least]",
    ),
]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="An option of the methods.")]
Interventions = Annotated[list[Path], typer.Option(help="A saved intervention; may be given several times.")]
Tokens = Annotated[int, typer.Option(help="Number of tokens to read from each corpus.")]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Rows of full length per forward pass. [default: as many as this machine runs fastest with]"),
]
SkipSinks = Annotated[
    float | None,
    typer.Option(
        metavar="K",
        help="Leave attention sinks out of the statistics: positions whose residual norm is more than K times their row's median.",
    ),
]
Confidence = Annotated[
    float,
    typer.Option(
        help="How sure it is to be that fresh documents of every retain source lose no more than --retain-drop."
    ),
]
Answers = Annotated[
    int, typer.Option(help="Also generate answers to at most this many questions of each question>answer corpus.")
]
Memorization = Annotated[
    int,
    typer.Option(
        help="Also measure the memorization of at most this many true answers of each question>answer corpus."
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="How prompt and answer are joined; \\n is a newline. [default: {prompt} {answer}; for the demo, as it was trained]"
    ),
]
PrependBos = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Begin texts with BOS, or not. [default: where the tokenizer adds it, or it is the end-of-text token as well]",
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="The sources hold conversations (messages, or prompt>response): read them in the chat template."
    ),
]
System = Annotated[
    str | None, typer.Option(help="The system's turn of conversations that have none; only with --chat.")
]


@dataclass(frozen=True)
class Reading:
    """How texts are read."""

    shuffle: Annotated[
        int | None,
        typer.Option(
            help="Draw the documents that are read from a buffer of so many, for sources that are sorted. [default: as they come]"
        ),
    ] = None
    window: Annotated[
        int | None, typer.Option(help="Longest row in tokens. [default: the context length, at most 512]")
    ] = None
    template: Template = None
    answer_eos: Annotated[
        bool,
        typer.Option("--answer-eos", help="Put the end-of-text token behind every answer, and count it, as TOFU does."),
    ] = False
    prepend_bos: PrependBos = None
    chat: Chat = False
    system: System = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of `read_corpus`, which are also fields of a plan."""
        return {**_values(self), "template": self.template and newlines(self.template)}


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    dtype: Annotated[
        str,
        typer.Option(
            help="The dtype of the weights: float32, bfloat16, float16, float64; auto is bfloat16 where the weights are stored in "
            "at most 16 bits and this machine is fast with it, else float32."
        ),
    ] = "float32"
    device: Annotated[
        str | None, typer.Option(help="Where the model runs, such as cpu or cuda:1. [default: a GPU if there is one]")
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread the model over devices with accelerate: auto, balanced, ... [default: one device]"),
    ] = None
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the model. [default: the main one]")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model; only if you trust it.")
    ] = False
    dictionary: Annotated[
        str | None,
        typer.Option(
            metavar="SAE",
            help="A sparse autoencoder, whose features are the neurons of the site sae: demo, a folder, or hf:...",
        ),
    ] = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of `load_model`, which are also fields of a plan."""
        return _values(self)


def _values(group: Any) -> dict[str, Any]:
    return {one.name: getattr(group, one.name) for one in fields(group)}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of each group that it takes, in place of the group, as the command line is to see them."""
    parameters = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {one.name: one.annotation for one in parameters if is_dataclass(one.annotation)}

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        made = {
            name: group(**{one.name: given.pop(one.name) for one in fields(group)}) for name, group in groups.items()
        }
        command(**given, **made)

    options: list[inspect.Parameter] = []
    for one in parameters:
        options += (
            [
                inspect.Parameter(part.name, one.KEYWORD_ONLY, default=part.default, annotation=part.type)
                for part in fields(groups[one.name])
            ]
            if one.name in groups
            else [one.replace(kind=one.KEYWORD_ONLY)]
        )
    flat.__dict__.pop("__wrapped__")  # whose signature would be seen instead
    flat.__annotations__ = {one.name: one.annotation for one in options}
    flat.__dict__["__signature__"] = inspect.Signature(options)
    return flat


def edits_of(files: list[Path], model: Any) -> dict[str, Any]:
    """Read saved interventions, by the names of their files.

    Raises:
        LensUnlearnError: If two files have the same name, or one cannot be read.
    """
    import lens_unlearn as lu

    edits = {path.stem: lu.load_intervention(path, model) for path in files}
    if len(edits) < len(files):
        raise lu.LensUnlearnError(
            "two intervention files have the same name, by which conditions are distinguished: rename one"
        )
    return edits


def pairs(entries: list[str], option: str) -> dict[str, str]:
    """Read the entries of an option that are NAME=VALUE."""
    from lens_unlearn.core.errors import LensUnlearnError

    read: dict[str, str] = {}
    for text in entries:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise LensUnlearnError(f"{option} {text}: write it as NAME=VALUE")
        if key in read:
            raise LensUnlearnError(f"{option} {key} was given twice")
        read[key] = value
    return read


def settings_from(
    given: list[str], skip_sinks: float | None = None, option: str = "--set", *, memory: str | None = None
) -> dict[str, Any]:
    """Return the options of methods: those of --set, and those that have a name of their own."""
    read = {key: _value(text) for key, text in pairs(given, option).items()}
    own = {"skip_sinks": skip_sinks, "memory": memory}
    return read | {key: value for key, value in own.items() if value is not None}


def _value(text: str) -> Any:
    """Parse a value of --set: a JSON value if it is one, a tuple if there are commas, else the text."""
    if "," in text and not text.startswith(("[", "{")):
        return tuple(_value(part) for part in text.split(","))
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def numbers(text: str, name: str) -> tuple[float, ...]:
    """Read comma-separated numbers.

    Raises:
        LensUnlearnError: If a part is none.
    """
    from lens_unlearn.core.errors import LensUnlearnError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        option = f"--{name.replace('_', '-')}"
        raise LensUnlearnError(f"{option} {text}: give numbers with commas, such as 0.1,0.2") from error


def newlines(text: str) -> str:
    r"""Read \n as a newline."""
    return text.replace("\\n", "\n")
