"""`relearning`: how soon fine-tuning restores the accuracy on a corpus, a line per unlearned model.

Knows the curves that `lu.relearn` measured; trains nothing.
"""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.conditions import Condition
from lens_unlearn.evaluation.relearning import Relearning
from lens_unlearn.figures import theme

__all__ = ["relearning"]

NEVER = "never saw it"


def relearning(
    runs: Mapping[str, Relearning],
    *,
    corpus: str = "forget",
    never_saw: Relearning | None = None,
    original: float | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw the accuracy on a corpus after each number of fine-tuning steps, a line per method.

    Steps are drawn as log(1 + step), so that 0 has a place. A line that rises faster than that of the model that never saw the
    texts shows that knowledge of them remained. Bands are 95 % intervals over documents, or the groups they were read with.

    Args:
        runs: What `relearn` returned, by the name of the method; the control of ``x`` is called ``x:control``, and grey.
        corpus: Which of the measured corpora.
        never_saw: The same fine-tuning of a model that never saw the texts; grey and dashed.
        original: The accuracy before unlearning; a dotted line.
        title: Instead of the default title.

    Raises:
        LensUnlearnError: If there is no run, or one did not measure the corpus.
    """
    if not runs:
        raise LensUnlearnError("relearning has nothing to draw: give what relearn returned, by name")
    fig = go.Figure()
    steps = {step for run in (*runs.values(), *([never_saw] if never_saw else [])) for step, _ in run[corpus]}
    if never_saw is not None:
        _line(fig, NEVER, never_saw, corpus, theme.CONTROL, "circle-open", "dash")
    parsed = {name: Condition.parse(name) for name in runs}
    own = {name: name.replace(":control", "", 1) if parsed[name].control else name for name in runs}
    methods = list(dict.fromkeys(own.values()))
    for name, run in sorted(runs.items(), key=lambda item: not parsed[item[0]].control):  # methods lie above controls
        index, control = methods.index(own[name]), parsed[name].control
        colour = theme.CONTROL if control else theme.METHODS[index % len(theme.METHODS)]
        symbol = theme.SYMBOLS[index % len(theme.SYMBOLS)] + ("-open" if control else "")
        _line(fig, theme.plain(name), run, corpus, colour, symbol, "dot" if control else "solid")
    if original is not None:
        ends = [float(np.log1p(min(steps))), float(np.log1p(max(steps)))]
        line = {"color": theme.TEXT, "width": 1.5, "dash": "dot"}
        hover = f"<b>before unlearning</b><br>accuracy {original:.1%}<extra></extra>"
        fig.add_scatter(
            x=ends, y=[original] * 2, mode="lines", line=line, name="before unlearning", hovertemplate=hover
        )
    ticks = sorted(steps)
    fig.update_xaxes(
        title_text="steps of fine-tuning",
        tickvals=[float(np.log1p(t)) for t in ticks],
        ticktext=[f"{t:,}" for t in ticks],
    )
    fig.update_yaxes(title_text="accuracy (share of tokens recalled)", tickformat="~%", range=[0, 1.04])
    dotted = "; grey and dotted: random control" if any(one.control for one in parsed.values()) else ""
    first = next(iter(runs.values())).provenance
    settings = first.get("relearning", {})
    about = [f"model {theme.short(first['model'])}"] if first.get("model") else []
    if settings:
        measured, texts = settings["measured"].get(corpus, {}), settings["texts"]
        about.append(theme.source({"corpus": measured.get("source"), "tokens": measured.get("tokens")}, corpus))
        about.append(f"fine-tuned on {theme.short(texts['source'])} at lr {settings['lr']:g}")
    return theme.finish(
        fig,
        title or f"Relearning by fine-tuning: {corpus}",
        f"accuracy: share of tokens that are the single most probable one; bands: 95% intervals over documents{dotted}",
        about=" · ".join(about),
        provenance={key: first[key] for key in ("model", "relearning") if key in first},
        name="relearning",
    )


def _line(fig: go.Figure, name: str, run: Relearning, corpus: str, colour: str, symbol: str, dash: str) -> None:
    curve = run[corpus]
    x = [float(np.log1p(step)) for step, _ in curve]
    bounds = [run.measures[corpus, step].interval() for step, _ in curve if (corpus, step) in run.measures]
    known = len(bounds) == len(curve) and bool(np.isfinite(bounds).all())
    if known and len(curve) > 1:
        low, high = ([float(bound) for bound in side] for side in zip(*bounds, strict=True))
        edges = {"x": x + x[::-1], "y": high + low[::-1], "fill": "toself", "fillcolor": theme.with_alpha(colour, 0.12)}
        fig.add_scatter(**edges, mode="none", hoverinfo="skip", showlegend=False, name=name, legendgroup=name)
    words = [f" [{low:.1%}, {high:.1%}]" for low, high in bounds] if known else [""] * len(curve)
    fig.add_scatter(
        x=x,
        y=[share for _, share in curve],
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"size": 7, "symbol": symbol},
        name=name,
        legendgroup=name,
        hovertext=[
            f"<b>{name}</b><br>step {step:,}<br>accuracy {share:.1%}{interval}"
            for (step, share), interval in zip(curve, words, strict=True)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
    )
