"""The commands that carry out a whole plan: `demo`, `run`, `compare`, `graph` and `bench`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_unlearn.cli.application import BenchCommand, MethodsCommand, command, end, interruptible
from lens_unlearn.cli.config import Config
from lens_unlearn.cli.options import (
    SRC,
    Answers,
    BatchSize,
    Confidence,
    Controls,
    Deal,
    Interventions,
    Loading,
    Memorization,
    Model,
    Out,
    Overwrite,
    PrependBos,
    Quiet,
    Reading,
    Resume,
    Settings,
    SkipSinks,
    Template,
    Tokens,
    newlines,
    numbers,
    pairs,
    settings_from,
)


@command()
def demo(
    *,
    out: Out = Path("demo-report"),
    tokens: Tokens = 2000,
    seed: Annotated[int, typer.Option(help="Seed of splits and controls.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Run every method and its control on the embedded model, and write one report."""
    from lens_unlearn.core.numbers import check_numbers
    from lens_unlearn.experiments.demo_report import demo_report

    check_numbers(tokens=tokens, seed=seed)
    settings = {"tokens": tokens, "seed": seed, "overwrite": overwrite, "progress": not quiet}
    report = demo_report(out, **settings, apart=(os.cpu_count() or 1) > 1)
    for part in (report, *report.parts):
        typer.echo(f"{part.title}\n{part.table(['top1']).to_string()}\n")
    typer.echo(f"report: {out / 'report.html'}")
    for part in (report, *report.parts):
        end(part, resume=False)


@command(cls=MethodsCommand)
def run(
    *,
    model: Model,
    forget: Annotated[str, typer.Option(metavar="SRC", help=f"Texts of the skill to unlearn: {SRC}.")],
    retain: Annotated[
        list[str], typer.Option(metavar="SRC", help="Texts of a skill to retain; may be given several times.")
    ],
    out: Out,
    config: Config = None,
    method: Annotated[list[str], typer.Option(help="A method; may be given several times.")] = ["selective-pruning"],
    also: Annotated[
        list[str], typer.Option(metavar="NAME=SRC", help="A further corpus to evaluate on; may be given several times.")
    ] = [],
    set_: Settings = [],
    test_forget: Annotated[
        str | None, typer.Option(metavar="SRC", help="Separate test texts of the skill to unlearn.")
    ] = None,
    test_retain: Annotated[
        list[str], typer.Option(metavar="SRC", help="Separate test texts of a skill to retain.")
    ] = [],
    facts: Annotated[
        bool,
        typer.Option(
            "--facts",
            help="Forget memorized facts: fit, tune and test on all of the --forget source, and split only what is retained.",
        ),
    ] = False,
    reading: Reading,
    tokens: Tokens = 20_000,
    test_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to test on, of each corpus; default: as many as put its accuracy within 3 points, at most --tokens."
        ),
    ] = None,
    skip_sinks: SkipSinks = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="default|low",
            help="'low': train in less memory and more time, to the same update; of methods that train, such as simu.",
        ),
    ] = None,
    retain_drop: Annotated[
        float | None,
        typer.Option(
            help="Tune the strength: forget as much as possible while every retain source loses at most this share of its accuracy."
        ),
    ] = None,
    confidence: Confidence = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of splits, controls and the bootstrap.")] = 0,
    batch_size: BatchSize = None,
    loading: Loading,
    controls: Controls = 5,
    deal: Deal = None,
    sweep: Annotated[bool, typer.Option(help="Evaluate a range of strengths for the trade-off figure.")] = True,
    fractions: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Comma-separated shares of neurons to sweep over.")
    ] = "",
    false_alarms: Annotated[
        str,
        typer.Option(
            metavar="NUMBERS", help="Comma-separated false positive rates, of methods that judge prompts to sweep over."
        ),
    ] = "",
    strengths: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Comma-separated strengths of a trained update to sweep over.")
    ] = "",
    answers: Answers = 0,
    memorization: Memorization = 0,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER",
            help="Log the table and the page of the finished run: tensorboard, wandb or mlflow; works offline.",
        ),
    ] = None,
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
    from lens_unlearn.experiments.loading import load_report
    from lens_unlearn.experiments.plan import Plan
    from lens_unlearn.experiments.tracking import check_tracker
    from lens_unlearn.experiments.tracking import track as log

    if track is not None:
        check_tracker(track)
    grids = {"fractions": fractions, "false_alarms": false_alarms, "strengths": strengths}
    plan = Plan(
        model=model,
        forget=forget,
        retain=tuple(retain),
        also=pairs(also, "--also"),
        methods=tuple(method),
        settings=settings_from(set_, skip_sinks, memory=memory),
        test_forget=test_forget,
        test_retain=tuple(test_retain),
        tokens=tokens,
        test_tokens=test_tokens,
        retain_drop=retain_drop,
        confidence=confidence,
        seed=seed,
        batch_size=batch_size,
        controls=controls,
        deal=deal,
        sweep=sweep,
        **{name: given for name, text in grids.items() if (given := numbers(text, name))},
        answers=answers,
        memorization=memorization,
        facts=facts,
        **reading.options,
        **loading.options,
    )
    with interruptible(out):
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
    if track is not None:
        log(done[1] if done else load_report(out), out, track)
        typer.echo(f"logged: {track}")
    end(done and done[1])


@command(cls=MethodsCommand)
def compare(
    *,
    model: Model,
    skill: Annotated[
        list[str],
        typer.Option(metavar="NAME=SRC", help=f"Texts of a skill; give two or more, each is unlearned in turn: {SRC}."),
    ],
    out: Out,
    config: Config = None,
    method: Annotated[
        list[str], typer.Option(help="A method; may be given several times. [default: all without training]")
    ] = [],
    test: Annotated[
        list[str], typer.Option(metavar="NAME=SRC", help="Separate test texts of a skill; for all skills, or for none.")
    ] = [],
    set_: Settings = [],
    facts: Annotated[
        bool,
        typer.Option(
            "--facts", help="The skills are memorized facts: fit, tune and test on all of the one that is unlearned."
        ),
    ] = False,
    reading: Reading,
    tokens: Tokens = 20_000,
    skip_sinks: SkipSinks = None,
    retain_drop: Annotated[
        float,
        typer.Option(
            help="The budget: forget as much as possible while the other skills lose at most this share of their accuracy."
        ),
    ] = 0.05,
    confidence: Confidence = 0.9,
    controls: Controls = 3,
    deal: Deal = None,
    seed: Annotated[int, typer.Option(help="Seed of splits, controls and the bootstrap.")] = 0,
    batch_size: BatchSize = None,
    loading: Loading,
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

    check_numbers(controls=controls)
    skills = pairs(skill, "--skill")
    plans = plans_for(
        list(skills),
        model,
        methods=tuple(method) or compared(),
        settings=settings_from(set_, skip_sinks),
        tokens=tokens,
        retain_drop=retain_drop,
        confidence=confidence,
        controls=controls,
        deal=deal,
        seed=seed,
        batch_size=batch_size,
        facts=facts,
        **reading.options,
        **loading.options,
    )
    settings: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "progress": not quiet}
    with interruptible(out):
        report = carry_out_comparison(plans, skills, out, test=pairs(test, "--test") or None, **settings)
    if not distributed.is_first():
        return
    typer.echo(f"{out} already holds this comparison, finished before" if report is None else repr(report))
    typer.echo(f"report: {out / 'compare.html'}")
    end(report)


@command(cls=MethodsCommand)
def graph(
    *,
    model: Model,
    skill: Annotated[
        list[str],
        typer.Option(metavar="NAME=SRC", help=f"Texts of a skill; give two or more, each is removed in turn: {SRC}."),
    ],
    out: Out,
    config: Config = None,
    method: Annotated[str, typer.Option(help="A method.")] = "selective-pruning",
    fraction: Annotated[
        float | None,
        typer.Option(help="Its strength, for most methods the share of neurons removed. [default: the method's own]"),
    ] = None,
    test: Annotated[
        list[str], typer.Option(metavar="NAME=SRC", help="Separate test texts of a skill; for all skills, or for none.")
    ] = [],
    metric: Annotated[str, typer.Option(help="What is lost: top1, top10 or top1_rare.")] = "top1",
    set_: Settings = [],
    reading: Reading,
    tokens: Tokens = 20_000,
    skip_sinks: SkipSinks = None,
    controls: Controls = 10,
    seed: Annotated[int, typer.Option(help="Seed of splits, controls and the bootstrap.")] = 0,
    batch_size: BatchSize = None,
    loading: Loading,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find which skill's removal costs which other beyond chance, and where their neurons are.

    Each skill is removed in turn while all others are retained. OUT holds graph.html, costs.csv, overlaps.csv, correlations.csv,
    ratios.csv, graph.safetensors, run.json, and an intervention per skill.
    """
    from lens_unlearn.experiments.skill_graph import carry_out_graph, graph_plans

    skills = pairs(skill, "--skill")
    plans = graph_plans(
        list(skills),
        model,
        method=method,
        fraction=fraction,
        seeds=controls,
        metric=metric,
        settings=settings_from(set_, skip_sinks),
        tokens=tokens,
        seed=seed,
        batch_size=batch_size,
        **reading.options,
        **loading.options,
    )
    settings: dict[str, Any] = {"metric": metric, "overwrite": overwrite, "progress": not quiet}
    found = carry_out_graph(plans, skills, out, test=pairs(test, "--test") or None, **settings)
    if found is not None:
        typer.echo(repr(found))
        typer.echo(f"report: {out / 'graph.html'}")


@command(cls=BenchCommand)
def bench(
    *,
    name: Annotated[str, typer.Argument(help="A benchmark, such as lume or tofu.")],
    model: Model,
    data: Annotated[
        str, typer.Option(help="The folder of the benchmark's files in their public layout, or hf:OWNER/NAME.")
    ],
    out: Out,
    config: Config = None,
    reference: Annotated[
        str | None, typer.Option(help="A model that never saw what is to be forgotten: some scores are beside it.")
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(help="A method, fitted to the benchmark's forget and retain rows; may be given several times."),
    ] = [],
    set_: Settings = [],
    intervention: Interventions = [],
    option: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="An option of the benchmark.")] = [],
    rows: Annotated[int | None, typer.Option(help="Only the first so many rows of each group. [default: all]")] = None,
    controls: Controls = 1,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each side that methods are fitted to. [default: all]")
    ] = None,
    template: Template = None,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = None,
    loading: Loading,
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
        settings=settings_from(set_),
        interventions=tuple(map(str, intervention)),
        options=settings_from(option, option="--option"),
        rows=rows,
        controls=controls,
        tokens=tokens,
        template=template and newlines(template),
        prepend_bos=prepend_bos,
        seed=seed,
        batch_size=batch_size,
        **loading.options,
    )
    with interruptible(out):
        found = carry_out_bench(plan, out, resume=resume, overwrite=overwrite, progress=not quiet)
    if found is None:
        typer.echo(f"{out} already holds this run, finished before")
    else:
        typer.echo(found.table().to_string())
        for note in found.notes:
            typer.echo(note)
    typer.echo(f"report: {out / 'bench.html'}")
