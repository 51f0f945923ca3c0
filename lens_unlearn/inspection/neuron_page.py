"""`neuron_page`: one neuron at a glance: what it fires on, what it writes, and what its ablation alone does.

    lu.neuron_page(model, "L3.mlp.post", 17, {"python": code, "english": prose})

Knows what is asked of a neuron, and puts together what other rooms answer; `neuron_html` draws it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus, require_corpora
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.report import Report
from lens_unlearn.inspection.html import drawing
from lens_unlearn.inspection.neuron_html import chips, curves, effect_table, section
from lens_unlearn.inspection.shown import Shown, neurons_of, pieces
from lens_unlearn.inspection.top_examples import TopExamples, top_examples
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model.direct import direct_logits, written_row
from lens_unlearn.model.host import Model, require_model
from lens_unlearn.model.loading import model_name
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.maps import NeuronMap

__all__ = ["ABLATED", "NeuronPage", "neuron_page"]

ABLATED = "ablated"
"""The condition of `NeuronPage.effect`."""


@dataclass(frozen=True, eq=False)
class NeuronPage(Shown):
    """What is known of one neuron."""

    neuron: str
    """Such as ``L3.mlp.post[17]``."""
    site: Site
    index: int
    """Its flat index."""
    histograms: Mapping[str, Histogram]
    """Of its site, by corpus."""
    examples: Mapping[str, TopExamples]
    """Where its activation is highest, by corpus."""
    promoted: tuple[tuple[str, float], ...]
    """The tokens whose logits it raises most, and by how much for each unit of its activation."""
    suppressed: tuple[tuple[str, float], ...]
    """Those whose logits it lowers most."""
    effect: Report
    """What its ablation alone, to zero, does to every corpus; the condition is called "ablated"."""
    about: str = ""
    """Model, and tokens of each corpus."""

    def to_frame(self) -> pd.DataFrame:
        """Give one row per token that it raises or lowers: token, logits."""
        import pandas as pd

        return pd.DataFrame([*self.promoted, *reversed(self.suppressed)], columns=["token", "logits"])

    def html(self) -> str:
        """Return the page as HTML, without scripts."""
        written = "logits added directly for each unit of its activation: its output row through the final norm and the unembedding"
        activations = curves(self.neuron, self.site, self.index, self.histograms)
        texts = {
            name: top.html() if any(top.examples.values()) else "Nothing fires there."
            for name, top in self.examples.items()
        }
        parts = [
            section("Activations by corpus", "logarithmic shares of tokens; the dotted line is 0", activations),
            section("What it writes", written, chips("raises", self.promoted) + chips("lowers", self.suppressed)),
            section(
                "What its ablation alone does", "set to zero; 95% intervals over documents", effect_table(self.effect)
            ),
            *(section(f"Top texts of {name}", "", text) for name, text in texts.items()),
        ]
        return drawing(self.neuron, self.about, "".join(parts), [])

    def __repr__(self) -> str:
        raised = ", ".join(repr(token) for token, _ in self.promoted[:3])
        return f"NeuronPage({self.neuron}, {len(self.histograms)} corpora; raises {raised})"


def neuron_page(
    model: Model,
    site: str | Site,
    index: int | tuple[int, int],
    corpora: Mapping[str, Corpus],
    *,
    examples: int = 5,
    tokens: int = 10,
    batch_size: int | None = None,
    progress: bool = True,
) -> NeuronPage:
    """Look at one neuron: its activations on each corpus, its top texts, what it writes, and what its ablation alone does.

    What it writes are the largest entries of its row of the output matrix times the unembedding, with the final norm folded in:
    the logits that it adds directly, for each unit of its activation, where the residual stream has the scale 1. What later
    blocks, or a norm behind the MLP, make of it is not in them.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        site: Such as "L3.mlp.post"; at an MLP or attention, or "L3.sae" of a dictionary that is attached, whose features' rows are
            those of the decoder.
        index: The neuron: a number, or at attention also (head, place).
        corpora: By name.
        examples: Top texts of each corpus.
        tokens: Tokens that it raises, and that it lowers, most.
        batch_size: Full-length rows per forward pass; default as many as this machine runs fastest with.
        progress: Whether to show bars.

    Returns:
        A value that shows itself in a notebook, and that `to_html` writes as a page.

    Raises:
        SiteError: If the site does not exist, or a neuron there has no row of an output matrix.
        SelectionError: If there is no such neuron.
        LensUnlearnError: If there is no corpus, or a number is out of range.
    """
    require_model(model)
    require_corpora(corpora, "corpora")
    for name, value in {"examples": examples, "tokens": tokens}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LensUnlearnError(f"{name}={value!r} is no number of {name}: at least 1")
    places, points = neurons_of(model, (site, index))
    [(neuron, (place, flat))] = places.items()
    logits = direct_logits(model, written_row(model, place, flat))  # first, since it refuses sites that write nothing
    mask = torch.zeros(points[place].shape, dtype=torch.bool)
    mask.view(-1)[flat] = True
    shared = {"batch_size": batch_size, "progress": progress}
    return NeuronPage(
        neuron,
        place,
        flat,
        {name: collect(model, corpus, place, statistic=Histogram(), **shared) for name, corpus in corpora.items()},
        {name: top_examples(model, corpus, neuron, k=examples, **shared) for name, corpus in corpora.items()},
        _largest(model, logits, tokens),
        _largest(model, -logits, tokens, sign=-1),
        evaluate(model, corpora, {ABLATED: Ablate(NeuronMap({place: mask}))}, **shared),
        " · ".join([model_name(model), *(f"{name}: {one.n_tokens:,} tokens" for name, one in corpora.items())]),
    )


def _largest(model: Model, logits: torch.Tensor, count: int, sign: int = 1) -> tuple[tuple[str, float], ...]:
    values, ids = logits.topk(min(count, len(logits)))
    names = [pieces(model, [id], bos=False)[0] for id in ids.tolist()]
    return tuple((name, sign * value) for name, value in zip(names, values.tolist(), strict=True))
