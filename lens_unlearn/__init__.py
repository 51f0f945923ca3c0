"""lens_unlearn: find where a language model keeps a skill, and take it out reversibly, with hooks.

Names are imported when they are first used, so that `import lens_unlearn` stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Ablate": "interventions",
    "Abstain": "interventions",
    "ActivationError": "errors",
    "Adjust": "interventions",
    "ArtefactError": "errors",
    "Attribution": "attribution",
    "Box": "regions",
    "BudgetError": "errors",
    "Chain": "interventions",
    "Clusters": "regions",
    "Contrast": "regions",
    "Corpus": "corpora",
    "CorpusError": "errors",
    "Delta": "interventions",
    "Ellipsoid": "regions",
    "EmptyStatisticError": "errors",
    "Generations": "looking",
    "Histogram": "statistics",
    "Intervention": "interventions",
    "KeySample": "statistics",
    "KeySpace": "keyspace",
    "LensUnlearnError": "errors",
    "Matrix": "sites",
    "ModelError": "errors",
    "Moments": "statistics",
    "NeuronMap": "maps",
    "Relearning": "evaluation.relearning",
    "Report": "evaluation.report",
    "SelectionError": "errors",
    "Site": "sites",
    "SiteError": "errors",
    "TokenValues": "looking",
    "TopExamples": "examples",
    "TopTokens": "examples",
    "Update": "deltas",
    "anamnesis_index": "evaluation.relearning",
    "attribute": "attribution",
    "collect": "collecting",
    "compare": "comparing",
    "critical": "attribution",
    "critical_mask": "attribution",
    "evaluate": "evaluation.next_token",
    "fingerprint": "models",
    "fit_region": "regions",
    "forget_quality": "evaluation.tofu",
    "generate": "evaluation.generation",
    "generations": "looking",
    "key_space": "keyspace",
    "key_space_detection": "methods.key_space",
    "load_intervention": "interventions",
    "load_model": "models",
    "load_moments": "collecting",
    "membership": "evaluation.membership",
    "model_utility": "evaluation.tofu",
    "neuron_adjust": "methods.neuron_adjust",
    "ov_basis": "methods.attention",
    "push_to_hub": "hub",
    "query_keys": "methods.key_space",
    "random_delta": "methods.controls",
    "random_pruning": "methods.controls",
    "read_corpus": "corpora",
    "relearn": "evaluation.relearning",
    "save_moments": "collecting",
    "selective_pruning": "methods.selective_pruning",
    "separability": "evaluation.report",
    "simu": "methods.simu",
    "sweep": "tuning",
    "tofu_utility": "evaluation.tofu",
    "token_activations": "looking",
    "token_firing": "looking",
    "token_losses": "looking",
    "top_examples": "examples",
    "tune": "tuning",
}
_MODULES = {"plot": "figures", "demo": "demo"}

__all__ = [
    "Ablate",
    "Abstain",
    "ActivationError",
    "Adjust",
    "ArtefactError",
    "Attribution",
    "Box",
    "BudgetError",
    "Chain",
    "Clusters",
    "Contrast",
    "Corpus",
    "CorpusError",
    "Delta",
    "Ellipsoid",
    "EmptyStatisticError",
    "Generations",
    "Histogram",
    "Intervention",
    "KeySample",
    "KeySpace",
    "LensUnlearnError",
    "Matrix",
    "ModelError",
    "Moments",
    "NeuronMap",
    "Relearning",
    "Report",
    "SelectionError",
    "Site",
    "SiteError",
    "TokenValues",
    "TopExamples",
    "TopTokens",
    "Update",
    "anamnesis_index",
    "attribute",
    "collect",
    "compare",
    "critical",
    "critical_mask",
    "demo",
    "evaluate",
    "fingerprint",
    "fit_region",
    "forget_quality",
    "generate",
    "generations",
    "key_space",
    "key_space_detection",
    "load_intervention",
    "load_model",
    "load_moments",
    "membership",
    "model_utility",
    "neuron_adjust",
    "ov_basis",
    "plot",
    "push_to_hub",
    "query_keys",
    "random_delta",
    "random_pruning",
    "read_corpus",
    "relearn",
    "save_moments",
    "selective_pruning",
    "separability",
    "simu",
    "sweep",
    "tofu_utility",
    "token_activations",
    "token_firing",
    "token_losses",
    "top_examples",
    "tune",
    "__version__",
]

if TYPE_CHECKING:
    from lens_unlearn import demo as demo
    from lens_unlearn import figures as plot
    from lens_unlearn.attribution import Attribution, attribute, critical, critical_mask
    from lens_unlearn.collecting import collect, load_moments, save_moments
    from lens_unlearn.comparing import compare
    from lens_unlearn.corpora import Corpus, read_corpus
    from lens_unlearn.deltas import Update
    from lens_unlearn.errors import (
        ActivationError,
        ArtefactError,
        BudgetError,
        CorpusError,
        EmptyStatisticError,
        LensUnlearnError,
        ModelError,
        SelectionError,
        SiteError,
    )
    from lens_unlearn.evaluation.generation import generate
    from lens_unlearn.evaluation.membership import membership
    from lens_unlearn.evaluation.next_token import evaluate
    from lens_unlearn.evaluation.relearning import Relearning, anamnesis_index, relearn
    from lens_unlearn.evaluation.report import Report, separability
    from lens_unlearn.evaluation.tofu import forget_quality, model_utility, tofu_utility
    from lens_unlearn.examples import TopExamples, TopTokens, top_examples
    from lens_unlearn.hub import push_to_hub
    from lens_unlearn.interventions import Ablate, Abstain, Adjust, Chain, Delta, Intervention, load_intervention
    from lens_unlearn.keyspace import KeySpace, key_space
    from lens_unlearn.looking import (
        Generations,
        TokenValues,
        generations,
        token_activations,
        token_firing,
        token_losses,
    )
    from lens_unlearn.maps import NeuronMap
    from lens_unlearn.methods.attention import ov_basis
    from lens_unlearn.methods.controls import random_delta, random_pruning
    from lens_unlearn.methods.key_space import key_space_detection, query_keys
    from lens_unlearn.methods.neuron_adjust import neuron_adjust
    from lens_unlearn.methods.selective_pruning import selective_pruning
    from lens_unlearn.methods.simu import simu
    from lens_unlearn.models import fingerprint, load_model
    from lens_unlearn.regions import Box, Clusters, Contrast, Ellipsoid, fit_region
    from lens_unlearn.sites import Matrix, Site
    from lens_unlearn.statistics import Histogram, KeySample, Moments
    from lens_unlearn.tuning import sweep, tune


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lens_unlearn.{_MODULES[name]}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"lens_unlearn.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lens_unlearn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
