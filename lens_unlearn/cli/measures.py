"""The commands that measure a model on texts: `collect`, `evaluate` and `audit`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_unlearn.cli.application import command, interruptible
from lens_unlearn.cli.options import (
    SRC,
    Answers,
    BatchSize,
    Controls,
    Interventions,
    Loading,
    Memorization,
    Model,
    Out,
    Overwrite,
    Quiet,
    Reading,
    Resume,
    SkipSinks,
    Tokens,
    edits_of,
    pairs,
)


@command()
def collect(
    *,
    model: Model,
    corpus: Annotated[str, typer.Option(metavar="SRC", help=f"Texts: {SRC}.")],
    out: Annotated[Path, typer.Option(help="The file to write, ending in .safetensors.")],
    sites: Annotated[str, typer.Option(help="Comma-separated sites, such as mlp.post,attn.z.")] = "mlp.post",
    extra: Annotated[str, typer.Option(help="Comma-separated further statistics: sqrt, extrema.")] = "",
    tokens: Annotated[int | None, typer.Option(help="Number of tokens to read. [default: all]")] = None,
    reading: Reading,
    skip_sinks: SkipSinks = None,
    batch_size: BatchSize = None,
    loading: Loading,
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

    check_numbers(
        tokens=tokens, shuffle=reading.shuffle, window=reading.window, batch_size=batch_size, skip_sinks=skip_sinks
    )
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
        loaded = lu.load_model(model, **loading.options)
        texts = lu.read_corpus(corpus, loaded, tokens=tokens, **reading.options)
        wanted = [site.strip() for site in sites.split(",") if site.strip()]
        with interruptible(out):
            # The checkpoint is deleted below, once the result is in its file: killed in between, nothing is lost.
            options: dict[str, Any] = {"progress": not quiet, "skip_sinks": skip_sinks}
            moments = gather(loaded, texts, wanted, statistic, batch_size, None, partial, **options)
            if distributed.is_first():
                lu.save_moments(out, moments, loaded)
                typer.echo(f"{out}: {moments!r}")
        artefacts.remove(own_checkpoint(partial))


@command()
def evaluate(
    *,
    model: Model,
    out: Out,
    corpus: Annotated[
        list[str], typer.Option(metavar="NAME=SRC", help="Texts to evaluate on; may be given several times.")
    ] = [],
    task: Annotated[
        list[str],
        typer.Option(
            help="A task of lm-evaluation-harness, or its YAML file; may be given several times. Needs the extra 'harness'."
        ),
    ] = [],
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
    intervention: Interventions = [],
    tokens: Tokens = 20_000,
    reading: Reading,
    batch_size: BatchSize = None,
    loading: Loading,
    answers: Answers = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 100,
    memorization: Memorization = 0,
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
    from lens_unlearn.experiments.report_file import REPORT_FILE, save_report

    check_numbers(tokens=tokens, shuffle=reading.shuffle, window=reading.window, batch_size=batch_size, seed=seed)
    check_numbers(answers=answers, max_new_tokens=max_new_tokens, memorization=memorization, task_limit=task_limit)
    sources = pairs(corpus, "--corpus")
    with new_folder(out, overwrite=overwrite) as folder:
        loaded = lu.load_model(model, **loading.options)
        edits = edits_of(intervention, loaded)
        options = {"tokens": tokens, "seed": seed, **reading.options}
        texts = {name: lu.read_corpus(source, loaded, **options) for name, source in sources.items()}
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
            save_report(folder / REPORT_FILE, report)
            write_settings(folder, report.provenance, ("report.html", "metrics.csv", REPORT_FILE))
    if not distributed.is_first():
        return
    typer.echo(report.table([name for name in report.metrics if metric(name).brief]).to_string())
    if "not run" in str(report.provenance.get("answers", {}).get("unit_tests", "")):
        typer.echo("unit tests were not run: give --allow-code-execution to run them")
    typer.echo(f"report: {out / 'report.html'}")


@command()
def audit(
    *,
    model: Model,
    facts: Annotated[
        str, typer.Option(metavar="SRC", help=f"What was to be forgotten, question>answer or texts: {SRC}.")
    ],
    out: Out,
    intervention: Interventions = [],
    reference: Annotated[
        str | None,
        typer.Option(help="A model of the same shape that never saw the facts: scores are calibrated by it."),
    ] = None,
    attack: Annotated[list[str], typer.Option(help="An attack; may be given several times. [default: all]")] = [],
    retain: Annotated[
        str | None, typer.Option(metavar="SRC", help="Facts that were to be retained, to relearn harmless ones only.")
    ] = None,
    unseen: Annotated[
        str | None, typer.Option(metavar="SRC", help="Facts that no model has seen, for membership inference.")
    ] = None,
    controls: Controls = 1,
    reading: Reading,
    tokens: Annotated[
        int | None, typer.Option(help="Number of tokens to read from each source. [default: all]")
    ] = None,
    batch_size: BatchSize = None,
    loading: Loading,
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

    check_numbers(tokens=tokens, shuffle=reading.shuffle, window=reading.window, batch_size=batch_size, seed=seed)
    attacks_of(attack or None)
    with new_folder(out, overwrite=overwrite) as folder:
        loaded = lu.load_model(model, **loading.options)
        edits = edits_of(intervention, loaded)
        sources = {"facts": facts, "retain": retain, "unseen": unseen}
        reading_options = {"tokens": tokens, "seed": seed, **reading.options}
        texts = {role: lu.read_corpus(text, loaded, **reading_options) for role, text in sources.items() if text}
        alone = {**loading.options, "revision": None, "dictionary": None}  # those of the model that is asked about
        never_saw = None if reference is None else lu.load_model(reference, **alone)
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
