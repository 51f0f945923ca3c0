"""Figures of maps, statistics and reports, as plotly figures; reached as ``lens_unlearn.plot``.

Every function returns a `plotly.graph_objects.Figure` (those that draw texts: HTML) and shows nothing: make it the last line
of a cell. Knows maps, statistics and reports; knows nothing of models, so that no figure runs one. Colours have one meaning
throughout: forget is orange, retain is blue, a random control is grey, and any other colour is that of a method or of a corpus,
never of both.
"""

from lens_unlearn.figures.activation_distribution import activation_distribution
from lens_unlearn.figures.attribution_map import attribution_map
from lens_unlearn.figures.audit import audit
from lens_unlearn.figures.colored_tokens import colored_tokens
from lens_unlearn.figures.condition_bars import condition_bars
from lens_unlearn.figures.examples import examples
from lens_unlearn.figures.expert_load import expert_load
from lens_unlearn.figures.forget_quality import forget_quality
from lens_unlearn.figures.forgetting_matrix import forgetting_matrix
from lens_unlearn.figures.frontier import frontier
from lens_unlearn.figures.generations import generations
from lens_unlearn.figures.key_clusters import key_clusters
from lens_unlearn.figures.key_coverage import key_coverage
from lens_unlearn.figures.key_map import key_map
from lens_unlearn.figures.key_roc import key_roc
from lens_unlearn.figures.key_space import key_space
from lens_unlearn.figures.key_volume import key_volume
from lens_unlearn.figures.layer_importance import layer_importance
from lens_unlearn.figures.neuron_heatmap import neuron_heatmap
from lens_unlearn.figures.recoverability import recoverability
from lens_unlearn.figures.relearning import relearning
from lens_unlearn.figures.selection_overlap import selection_overlap
from lens_unlearn.figures.skill_graph import skill_graph
from lens_unlearn.figures.specialization_map import specialization_map
from lens_unlearn.figures.sweep_curves import sweep_curves
from lens_unlearn.figures.texts import texts
from lens_unlearn.figures.tradeoff import tradeoff
from lens_unlearn.figures.training_curves import training_curves

__all__ = [
    "activation_distribution",
    "attribution_map",
    "audit",
    "colored_tokens",
    "condition_bars",
    "examples",
    "expert_load",
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
    "recoverability",
    "relearning",
    "selection_overlap",
    "skill_graph",
    "specialization_map",
    "sweep_curves",
    "texts",
    "tradeoff",
    "training_curves",
]
