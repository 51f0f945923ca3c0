"""Figures of maps, statistics and reports, as plotly figures; reached as ``lens_unlearn.plot``.

Every function returns a `plotly.graph_objects.Figure` (those of `figures.texts`: HTML) and shows nothing: make it the last line
of a cell. None of them needs a model. Colours have one meaning throughout: forget is orange, retain is blue, a random
control is grey.
"""

from lens_unlearn.figures.attributions import attribution_map
from lens_unlearn.figures.bars import condition_bars
from lens_unlearn.figures.distribution import activation_distribution
from lens_unlearn.figures.forgetting import forgetting_matrix
from lens_unlearn.figures.frontier import frontier
from lens_unlearn.figures.heatmap import neuron_heatmap
from lens_unlearn.figures.importance import layer_importance
from lens_unlearn.figures.key_layers import key_clusters, key_space, key_volume
from lens_unlearn.figures.key_queries import key_coverage, key_map, key_roc
from lens_unlearn.figures.overlap import selection_overlap
from lens_unlearn.figures.quality import forget_quality
from lens_unlearn.figures.relearn import relearning
from lens_unlearn.figures.specialization import specialization_map
from lens_unlearn.figures.sweeps import sweep_curves
from lens_unlearn.figures.texts import colored_tokens, examples, generations, texts
from lens_unlearn.figures.tradeoff import tradeoff
from lens_unlearn.figures.training import training_curves

__all__ = [
    "activation_distribution",
    "attribution_map",
    "colored_tokens",
    "condition_bars",
    "examples",
    "forget_quality",
    "forgetting_matrix",
    "frontier",
    "generations",
    "key_clusters",
    "key_coverage",
    "key_map",
    "key_roc",
    "key_space",
    "key_volume",
    "layer_importance",
    "neuron_heatmap",
    "relearning",
    "selection_overlap",
    "specialization_map",
    "sweep_curves",
    "texts",
    "tradeoff",
    "training_curves",
]
