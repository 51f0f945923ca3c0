"""The command line: `lens-unlearn demo | run | compare | collect | evaluate | audit | bench | generate | check | show | push`.

Knows options and how they map to the functions of the package; knows nothing of what these do. Heavy imports happen inside the
commands, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = ["app", "main"]

app = typer.Typer(
    name="lens-unlearn",
    help="Find the neurons of a skill in a language model, and remove it reversibly, with hooks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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
Tokens = Annotated[int, typer.Option(help="Number of tokens to read from each corpus.")]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Rows of full length per forward pass. [default: as many as this machine runs fastest with]"),
]
Shuffle = Annotated[
    int | None,
    typer.Option(
        help="Draw the documents that are read from a buffer of so many, for sources that are sorted. [default: as they come]"
    ),
]
Window = Annotated[int | None, typer.Option(help="Longest row in tokens. [default: the context length, at most 512]")]
Dtype = Annotated[
    str,
    typer.Option(
        help="The dtype of the weights: float32, bfloat16, float16, float64; auto is bfloat16 where the weights are stored in at "
        "most 16 bits and this machine is fast with it, else float32."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Spread the model over devices with accelerate: auto, balanced, ... [default: one device]"),
]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the model. [default: the main one]")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model; only if you trust it.")
]
Template = Annotated[
    str | None,
    typer.Option(
        help="How prompt and answer are joined; \\n is a newline. [default: {prompt} {answer}; for the demo, as it was trained]"
    ),
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
AnswerEos = Annotated[
    bool,
    typer.Option("--answer-eos", help="Put the end-of-text token behind every answer, and count it, as TOFU does."),
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


class MethodsCommand(TyperCommand):
    """A command whose help lists the methods; they are imported only when that help is asked for, since that is slow."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the table of methods at the end."""
        from lens_unlearn.methods import METHODS

        super().format_help(ctx, formatter)
        with formatter.section("Methods"):
            formatter.write_dl([(method.name, method.summary) for method in METHODS])


@app.command()
def demo(
    out: Out = Path("demo-report"),
    tokens: Tokens = 1000,
    seed: Annotated[int, typer.Option(help="Seed of splits and controls.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Run every method and its control on the embedded model, and write one report."""
    from lens_unlearn.core.numbers import check_numbers
    from lens_unlearn.experiments.demo_report import demo_report

    check_numbers(tokens=tokens, seed=seed)
    report = demo_report(out, tokens=tokens, seed=seed, overwrite=overwrite, progress=not quiet)
    for part in (report, *report.parts):
        typer.echo(f"{part.title}\n{part.table(['top1']).to_string()}\n")
    typer.echo(f"report: {out / 'report.html'}")
    for part in (report, *report.parts):
        _end(part, resume=False)


@app.command(cls=MethodsCommand)
def run(
    model: Model,
    forget: Annotated[str, typer.Option(metavar="SRC", help=f"Texts of the skill to unlearn: {SRC}.")],
    retain: Annotated[
        list[str], typer.Option(metavar="SRC", help="Texts of a skill to retain; may be given several times.")
    ],
    out: Out,
    method: Annotated[list[str], typer.Option(help="A method; may be given several times.")] = ["selective-pruning"],  # noqa: B006
    also: Annotated[
        list[str], typer.Option(metavar="NAME=SRC", help="A further corpus to evaluate on; may be given several times.")
    ] = [],  # noqa: B006
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="An option of the methods.")] = [],  # noqa: B006
    test_forget: Annotated[
        str | None, typer.Option(metavar="SRC", help="Separate test texts of the skill to unlearn.")
    ] = None,
    test_retain: Annotated[
        list[str], typer.Option(metavar="SRC", help="Separate test texts of a skill to retain.")
    ] = [],  # noqa: B006
    facts: Annotated[
        bool,
        typer.Option(
            "--facts",
            help="Forget memorized facts: fit, tune and test on all of the --forget source, and split only what is retained.",
        ),
    ] = False,
    template: Template = None,
    answer_eos: AnswerEos = False,
    prepend_bos: PrependBos = None,
    chat: Chat = False,
    system: System = None,
    tokens: Tokens = 20_000,
    test_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to test on, of each corpus; default: as many as put its accuracy within 3 points, at most --tokens."
        ),
    ] = None,
    shuffle: Shuffle = None,
    window: Window = None,
    skip_sinks: SkipSinks = None,
    retain_drop: Annotated[
        float | None,
        typer.Option(
            help="Tune the strength: forget as much as possible while every retain source loses at most this share of its accuracy."
        ),
    ] = None,
    confidence: Confidence = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of splits, controls and the bootstrap.")] = 0,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    sweep: Annotated[bool, typer.Option(help="Evaluate a range of strengths for the trade-off figure.")] = True,
    answers: Annotated[
        int, typer.Option(help="Also generate answers to at most this many questions of each question>answer corpus.")
    ] = 0,
    memorization: Annotated[
        int,
        typer.Option(
            help="Also measure the memorization of at most this many true answers of each question>answer corpus."
        ),
    ] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find the neurons of a skill, ablate them with hooks, and report the effect beside a random control.

    Finished parts are stored in OUT.partial until the end: a run that was interrupted or killed continues from there with
    --resume, to the same numbers.
    """
    from lens_unlearn.core import distributed
    from lens_unlearn.experiments.experiment import carry_out
    from lens_unlearn.experiments.plan import Plan

    plan = Plan(
        model=model,
        forget=forget,
        retain=tuple(retain),
        also=_pairs(also, "--also"),
        methods=tuple(method),
        settings=_settings(set_, skip_sinks),
        test_forget=test_forget,
        test_retain=tuple(test_retain),
        template=template and _newlines(template),
        answer_eos=answer_eos,
        prepend_bos=prepend_bos,
        chat=chat,
        system=system,
        tokens=tokens,
        test_tokens=test_tokens,
        shuffle=shuffle,
        window=window,
        retain_drop=retain_drop,
        confidence=confidence,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        sweep=sweep,
        answers=answers,
        memorization=memorization,
        facts=facts,
    )
    with _interruptible(out):
        done = carry_out(plan, out, resume=resume, overwrite=overwrite, progress=not quiet)
    if not distributed.is_first():
        return
    if done is None:
        typer.echo(f"{out} already holds this run, finished before")
    else:
        experiment, report = done
        for name, edit in experiment.edits.items():
            typer.echo(f"{name}: {edit!r}")
        typer.echo(report.table(["top1"]).to_string())
    typer.echo(f"report: {out / 'report.html'}")
    _end(done and done[1])


@app.command(cls=MethodsCommand)
def compare(
    model: Model,
    skill: Annotated[
        list[str],
        typer.Option(metavar="NAME=SRC", help=f"Texts of a skill; give two or more, each is unlearned in turn: {SRC}."),
    ],
    out: Out,
    method: Annotated[
        list[str], typer.Option(help="A method; may be given several times. [default: all without training]")
    ] = [],  # noqa: B006
    test: Annotated[
        list[str], typer.Option(metavar="NAME=SRC", help="Separate test texts of a skill; for all skills, or for none.")
    ] = [],  # noqa: B006
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="An option of the methods.")] = [],  # noqa: B006
    facts: Annotated[
        bool,
        typer.Option(
            "--facts", help="The skills are memorized facts: fit, tune and test on all of the one that is unlearned."
        ),
    ] = False,
    template: Template = None,
    answer_eos: AnswerEos = False,
    prepend_bos: PrependBos = None,
    chat: Chat = False,
    system: System = None,
    tokens: Tokens = 20_000,
    shuffle: Shuffle = None,
    window: Window = None,
    skip_sinks: SkipSinks = None,
    retain_drop: Annotated[
        float,
        typer.Option(
            help="The budget: forget as much as possible while the other skills lose at most this share of their accuracy."
        ),
    ] = 0.05,
    confidence: Confidence = 0.9,
    seeds: Annotated[int, typer.Option(help="Random controls per method, each with its own seed.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of splits, controls and the bootstrap.")] = 0,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Unlearn each skill of a set in turn, by every method and its control, within one budget.

    While one skill is unlearned, all others are to be retained, in equal parts. OUT holds compare.html, matrix.csv, run.json, and
    a folder of interventions per skill. Finished parts are stored in OUT.partial until the end, as by run.
    """
    from lens_unlearn.core import distributed
    from lens_unlearn.core.numbers import check_numbers
    from lens_unlearn.experiments.compare import carry_out_comparison, compared, plans_for

    check_numbers(seeds=seeds)
    skills = _pairs(skill, "--skill")
    plans = plans_for(
        list(skills),
        model,
        methods=tuple(method) or compared(),
        settings=_settings(set_, skip_sinks),
        template=template and _newlines(template),
        answer_eos=answer_eos,
        prepend_bos=prepend_bos,
        chat=chat,
        system=system,
        tokens=tokens,
        shuffle=shuffle,
        window=window,
        retain_drop=retain_drop,
        confidence=confidence,
        controls=seeds,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        facts=facts,
    )
    settings: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "progress": not quiet}
    with _interruptible(out):
        report = carry_out_comparison(plans, skills, out, test=_pairs(test, "--test") or None, **settings)
    if not distributed.is_first():
        return
    typer.echo(f"{out} already holds this comparison, finished before" if report is None else repr(report))
    typer.echo(f"report: {out / 'compare.html'}")
    _end(report)


@app.command()
def collect(
    model: Model,
    corpus: Annotated[str, typer.Option(metavar="SRC", help=f"Texts: {SRC}.")],
    out: Annotated[Path, typer.Option(help="The file to write, ending in .safetensors.")],
    sites: Annotated[str, typer.Option(help="Comma-separated sites, such as mlp.post,attn.z.")] = "mlp.post",
    extra: Annotated[str, typer.Option(help="Comma-separated further statistics: sqrt, extrema.")] = "",
    tokens: Annotated[int | None, typer.Option(help="Number of tokens to read. [default: all]")] = None,
    shuffle: Shuffle = None,
    window: Window = None,
    template: Template = None,
    answer_eos: AnswerEos = False,
    prepend_bos: PrependBos = None,
    skip_sinks: SkipSinks = None,
    chat: Chat = False,
    system: System = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """Stream a corpus through a model once, and save the moments of every neuron."""
    import lens_unlearn as lu
    from lens_unlearn.core import artefacts, distributed
    from lens_unlearn.core.numbers import check_numbers
    from lens_unlearn.experiments.output import reserved
    from lens_unlearn.neurons.collect import gather, own_checkpoint

    check_numbers(tokens=tokens, shuffle=shuffle, window=window, batch_size=batch_size, skip_sinks=skip_sinks)
    if out.suffix != ".safetensors":
        raise lu.ArtefactError(f"{out} does not end in .safetensors, the format it is written in: give another --out")
    with reserved(out):
        if out.is_dir():
            raise lu.ArtefactError(f"{out} is a folder: give the file to write as --out")
        if out.exists() and not overwrite:
            raise lu.ArtefactError(f"{out} exists: give another --out, or --overwrite to replace it")
        partial = out.with_name(out.name + ".partial")
        if os.path.exists(own_checkpoint(partial)) and not resume:
            raise lu.ArtefactError(f"{partial} is left of an interrupted run: give --resume to go on, or delete it")
        statistic = lu.Moments(extra=[name for name in extra.split(",") if name])
        loaded = lu.load_model(
            model, dtype=dtype, device_map=device_map, revision=revision, trust_remote_code=trust_remote_code
        )
        reading = {
            "tokens": tokens,
            "shuffle": shuffle,
            "window": window,
            "template": template and _newlines(template),
            "answer_eos": answer_eos,
            "prepend_bos": prepend_bos,
            "chat": chat,
            "system": system,
        }
        texts = lu.read_corpus(corpus, loaded, **reading)
        wanted = [site.strip() for site in sites.split(",") if site.strip()]
        with _interruptible(out):
            # The checkpoint is deleted below, once the result is in its file: killed in between, nothing is lost.
            options: dict[str, Any] = {"progress": not quiet, "skip_sinks": skip_sinks}
            moments = gather(loaded, texts, wanted, statistic, batch_size, None, partial, **options)
            if distributed.is_first():
                lu.save_moments(out, moments, loaded)
                typer.echo(f"{out}: {moments!r}")
        artefacts.remove(own_checkpoint(partial))


@app.command()
def evaluate(
    model: Model,
    out: Out,
    corpus: Annotated[
        list[str], typer.Option(metavar="NAME=SRC", help="Texts to evaluate on; may be given several times.")
    ] = [],  # noqa: B006
    task: Annotated[
        list[str],
        typer.Option(
            help="A task of lm-evaluation-harness, or its YAML file; may be given several times. Needs the extra 'harness'."
        ),
    ] = [],  # noqa: B006
    task_limit: Annotated[int | None, typer.Option(help="Documents per task. [default: all]")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in each prompt of a task. [default: as the task says]")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put the prompts of tasks into the tokenizer's chat template.")
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="What stands before every prompt of a task, or is the system's turn.")
    ] = None,
    intervention: Annotated[list[Path], typer.Option(help="A saved intervention; may be given several times.")] = [],  # noqa: B006
    tokens: Tokens = 20_000,
    shuffle: Shuffle = None,
    window: Window = None,
    template: Template = None,
    answer_eos: AnswerEos = False,
    prepend_bos: PrependBos = None,
    chat: Chat = False,
    system: System = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    answers: Annotated[
        int, typer.Option(help="Also generate answers to at most this many questions of each question>answer corpus.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 100,
    memorization: Annotated[
        int,
        typer.Option(
            help="Also measure the memorization of at most this many true answers of each question>answer corpus."
        ),
    ] = 0,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Run generated programs against their unit tests: this executes code that a model wrote, in a subprocess with "
            "limits, which is not a sandbox. Off by default.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of the choice of questions.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model with and without saved interventions."""
    import lens_unlearn as lu
    from lens_unlearn.core import distributed
    from lens_unlearn.core.numbers import check_numbers
    from lens_unlearn.evaluation.metrics import metric
    from lens_unlearn.experiments.output import new_folder, write_settings

    check_numbers(
        tokens=tokens, shuffle=shuffle, window=window, batch_size=batch_size, seed=seed, task_limit=task_limit
    )
    check_numbers(answers=answers, max_new_tokens=max_new_tokens, memorization=memorization)
    sources = _pairs(corpus, "--corpus")
    with new_folder(out, overwrite=overwrite) as folder:
        loaded = lu.load_model(
            model, dtype=dtype, device_map=device_map, revision=revision, trust_remote_code=trust_remote_code
        )
        edits: dict[str, Any] = {path.stem: lu.load_intervention(path, loaded) for path in intervention}
        if len(edits) < len(intervention):
            raise lu.LensUnlearnError(
                "two intervention files have the same name, by which the report distinguishes them: rename one"
            )
        reading = {
            "tokens": tokens,
            "shuffle": shuffle,
            "seed": seed,
            "window": window,
            "template": template and _newlines(template),
            "answer_eos": answer_eos,
            "prepend_bos": prepend_bos,
            "chat": chat,
            "system": system,
        }
        texts = {name: lu.read_corpus(source, loaded, **reading) for name, source in sources.items()}
        quantities: dict[str, Any] = {
            "answers": answers,
            "max_new_tokens": max_new_tokens,
            "memorization": memorization,
        }
        quantities["allow_code_execution"] = allow_code_execution
        quantities |= {"tasks": task, "task_limit": task_limit, "num_fewshot": num_fewshot}
        quantities |= {"apply_chat_template": apply_chat_template, "system_instruction": system_instruction}
        report = lu.evaluate(loaded, texts, edits, **quantities, batch_size=batch_size, seed=seed, progress=not quiet)
        if distributed.is_first():
            report.to_html(folder / "report.html")
            report.to_csv(folder / "metrics.csv")
            write_settings(folder, report.provenance, ("report.html", "metrics.csv"))
    if not distributed.is_first():
        return
    typer.echo(report.table([name for name in report.metrics if metric(name).brief]).to_string())
    if "not run" in str(report.provenance.get("answers", {}).get("unit_tests", "")):
        typer.echo("unit tests were not run: give --allow-code-execution to run them")
    typer.echo(f"report: {out / 'report.html'}")


@app.command()
def audit(
    model: Model,
    facts: Annotated[
        str, typer.Option(metavar="SRC", help=f"What was to be forgotten, question>answer or texts: {SRC}.")
    ],
    out: Out,
    intervention: Annotated[list[Path], typer.Option(help="A saved intervention; may be given several times.")] = [],  # noqa: B006
    reference: Annotated[
        str | None,
        typer.Option(help="A model of the same shape that never saw the facts: scores are calibrated by it."),
    ] = None,
    attack: Annotated[list[str], typer.Option(help="An attack; may be given several times. [default: all]")] = [],  # noqa: B006
    retain: Annotated[
        str | None, typer.Option(metavar="SRC", help="Facts that were to be retained, to relearn harmless ones only.")
    ] = None,
    unseen: Annotated[
        str | None, typer.Option(metavar="SRC", help="Facts that no model has seen, for membership inference.")
    ] = None,
    controls: Annotated[int, typer.Option(help="Random controls of each intervention; 0 for none.")] = 1,
    template: Template = None,
    answer_eos: AnswerEos = False,
    prepend_bos: PrependBos = None,
    chat: Chat = False,
    system: System = None,
    tokens: Annotated[
        int | None, typer.Option(help="Number of tokens to read from each source. [default: all]")
    ] = None,
    window: Window = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap, the controls and what is drawn.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Look from several sides whether what interventions removed is gone, or only not said.

    OUT holds audit.html, audit.csv, audit.json, and run.json.
    """
    import lens_unlearn as lu
    from lens_unlearn.audit import attacks_of
    from lens_unlearn.core.artefacts import replace_file
    from lens_unlearn.core.numbers import check_numbers
    from lens_unlearn.experiments.output import new_folder, write_settings

    check_numbers(tokens=tokens, window=window, batch_size=batch_size, seed=seed)
    attacks_of(attack or None)
    with new_folder(out, overwrite=overwrite) as folder:
        loading: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        loaded = lu.load_model(model, revision=revision, **loading)
        edits: dict[str, Any] = {path.stem: lu.load_intervention(path, loaded) for path in intervention}
        if len(edits) < len(intervention):
            raise lu.LensUnlearnError(
                "two intervention files have the same name, by which the audit distinguishes them: rename one"
            )
        reading: dict[str, Any] = {
            "tokens": tokens,
            "window": window,
            "template": template and _newlines(template),
            "answer_eos": answer_eos,
            "prepend_bos": prepend_bos,
            "chat": chat,
            "system": system,
        }
        sources = {"facts": facts, "retain": retain, "unseen": unseen}
        texts = {role: lu.read_corpus(source, loaded, **reading) for role, source in sources.items() if source}
        never_saw = None if reference is None else lu.load_model(reference, **loading)
        options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": not quiet}
        options |= {"attacks": attack or None, "controls": controls, "reference": never_saw}
        found = lu.audit(loaded, texts.pop("facts"), edits, **texts, **options)
        found.to_html(folder / "audit.html")
        replace_file(folder / "audit.csv", found.csv().encode(errors="backslashreplace"))
        written = json.dumps(found.record(), indent=2, default=str, ensure_ascii=False)
        replace_file(folder / "audit.json", written.encode(errors="backslashreplace"))
        write_settings(folder, found.provenance, ("audit.html", "audit.csv", "audit.json"))
    typer.echo(found.table().to_string())
    for name, why in found.left_out.items():
        typer.echo(f"left out: {name}: {why}")
    typer.echo(f"report: {out / 'audit.html'}")


class BenchCommand(TyperCommand):
    """A command whose help lists the benchmarks and methods; they are imported only when that help is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the tables at the end."""
        from lens_unlearn.benchmarks import BENCHMARKS
        from lens_unlearn.methods import METHODS

        super().format_help(ctx, formatter)
        with formatter.section("Benchmarks"):
            options = {one.name: f" Options: {', '.join(one.options)}." if one.options else "" for one in BENCHMARKS}
            formatter.write_dl([(one.name, one.summary + options[one.name]) for one in BENCHMARKS])
        with formatter.section("Methods"):
            formatter.write_dl([(method.name, method.summary) for method in METHODS])


@app.command(cls=BenchCommand)
def bench(
    name: Annotated[str, typer.Argument(help="A benchmark, such as lume or tofu.")],
    model: Model,
    data: Annotated[
        str, typer.Option(help="The folder of the benchmark's files in their public layout, or hf:OWNER/NAME.")
    ],
    out: Out,
    reference: Annotated[
        str | None, typer.Option(help="A model that never saw what is to be forgotten: some scores are beside it.")
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(help="A method, fitted to the benchmark's forget and retain rows; may be given several times."),
    ] = [],  # noqa: B006
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="An option of the methods.")] = [],  # noqa: B006
    intervention: Annotated[list[Path], typer.Option(help="A saved intervention; may be given several times.")] = [],  # noqa: B006
    option: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="An option of the benchmark.")] = [],  # noqa: B006
    rows: Annotated[int | None, typer.Option(help="Only the first so many rows of each group. [default: all]")] = None,
    controls: Annotated[int, typer.Option(help="Random controls of each condition; 0 for none.")] = 1,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each side that methods are fitted to. [default: all]")
    ] = None,
    template: Template = None,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and the controls.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Score a model on a public benchmark: the base, every method with its random control, and a reference.

    OUT holds bench.html, scores.csv, generations.jsonl, losses.csv, run.json, and what each method found. What is finished is
    stored in OUT.partial until the end, as by run.
    """
    from lens_unlearn.experiments.bench import BenchPlan, carry_out_bench

    plan = BenchPlan(
        benchmark=name,
        model=model,
        data=data,
        reference=reference,
        methods=tuple(method),
        settings=_settings(set_, None),
        interventions=tuple(map(str, intervention)),
        options=_settings(option, None, "--option"),
        rows=rows,
        controls=controls,
        tokens=tokens,
        template=template and _newlines(template),
        prepend_bos=prepend_bos,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    with _interruptible(out):
        found = carry_out_bench(plan, out, resume=resume, overwrite=overwrite, progress=not quiet)
    if found is None:
        typer.echo(f"{out} already holds this run, finished before")
    else:
        typer.echo(found.table().to_string())
        for note in found.notes:
            typer.echo(note)
    typer.echo(f"report: {out / 'bench.html'}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="A text to continue; may be given several times.")],
    intervention: Annotated[
        list[Path], typer.Option(help="A saved intervention; several act in the order given.")
    ] = [],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation in tokens.")] = 60,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    prepend_bos: PrependBos = None,
    chat: Chat = False,
    system: System = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Continue a prompt, with saved interventions if any are given."""
    import lens_unlearn as lu
    from lens_unlearn.core.numbers import check_numbers

    check_numbers(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    loaded = lu.load_model(
        model, dtype=dtype, device_map=device_map, revision=revision, trust_remote_code=trust_remote_code
    )
    edit = lu.Chain(tuple(lu.load_intervention(path, loaded) for path in intervention))
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    sampling |= {"prepend_bos": prepend_bos, "chat": chat, "system": system}
    prompts = [_newlines(text) for text in prompt]
    for text, answer in zip(prompts, lu.generate(loaded, prompts, intervention=edit, **sampling), strict=True):
        typer.echo(answer if chat else text + answer)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="'demo', a Hugging Face directory, or a hub name.")],
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Check on a model that sites, statistics and interventions mean what they say; exit code 1 if something does not."""
    import lens_unlearn as lu

    found = lu.check_model(
        lu.load_model(model, dtype=dtype, device_map=device_map, revision=revision, trust_remote_code=trust_remote_code)
    )
    typer.echo(str(found))
    if found.failed:
        raise typer.Exit(1)


@app.command()
def show(file: Annotated[Path, typer.Argument(help="A file that lens-unlearn wrote.")]) -> None:
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


@app.command()
def push(
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


def _end(report: Any, *, resume: bool = True) -> None:
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
def _interruptible(out: Path) -> Iterator[None]:
    """On Ctrl-C, say how to continue if finished parts are stored, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        partial = out.parent / f"{out.name}.partial"
        hint = f": the same command with --resume goes on from {partial}" if partial.exists() else ""
        typer.echo(f"lens-unlearn: interrupted{hint}", err=True)
        raise typer.Exit(130) from None


def _pairs(entries: list[str], option: str) -> dict[str, str]:
    from lens_unlearn.core.errors import LensUnlearnError

    pairs: dict[str, str] = {}
    for text in entries:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise LensUnlearnError(f"{option} {text}: write it as NAME=VALUE")
        if key in pairs:
            raise LensUnlearnError(f"{option} {key} was given twice")
        pairs[key] = value
    return pairs


def _settings(given: list[str], skip_sinks: float | None, option: str = "--set") -> dict[str, Any]:
    """Return the options of methods: those of --set, and one that has a name of its own."""
    read = {key: _value(text) for key, text in _pairs(given, option).items()}
    return read if skip_sinks is None else {**read, "skip_sinks": skip_sinks}


def _value(text: str) -> Any:
    """Parse a value of --set: a JSON value if it is one, a tuple if there are commas, else the text."""
    if "," in text and not text.startswith(("[", "{")):
        return tuple(_value(part) for part in text.split(","))
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _newlines(text: str) -> str:
    return text.replace("\\n", "\n")


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
        app()
    except LensUnlearnError as error:
        hint = f"; the same command with --resume goes on from {error.kept}" if error.kept else ""
        typer.echo(visible(f"lens-unlearn{_process()}: {error}{hint}"), err=True)
        sys.exit(1 if error.kept else 2)
    except KeyboardInterrupt:
        typer.echo("lens-unlearn: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
