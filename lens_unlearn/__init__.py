"""lens_unlearn: find where a language model keeps a skill, and remove it reversibly, with hooks.

Names are imported when they are first used, so that `import lens_unlearn` stays quick.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lens_unlearn.core import (
    progress as _progress,  # before anything else imports tqdm, which would warn in some notebooks
)

__version__ = "0.1.0"

_PUBLIC: dict[str, tuple[str, ...]] = {
    "audit.attack": ("Attack",),
    "audit.audit": (
        "Audit",
        "audit",
    ),
    "core.allocator": ("tune_allocator",),
    "core.errors": (
        "ActivationError",
        "ArtefactError",
        "BudgetError",
        "CorpusError",
        "EmptyStatisticError",
        "LensUnlearnError",
        "ModelError",
        "SelectionError",
        "SiteError",
    ),
    "corpora.corpus": ("Corpus",),
    "corpora.reading": ("read_corpus",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.generation": ("generate",),
    "evaluation.in_context": ("with_examples",),
    "evaluation.membership": ("membership",),
    "evaluation.relearning": (
        "Relearning",
        "anamnesis_index",
        "anamnesis_interval",
        "relearn",
    ),
    "evaluation.report": (
        "Report",
        "separability",
    ),
    "evaluation.skill_graph": ("SkillGraph",),
    "evaluation.tofu": (
        "forget_quality",
        "model_utility",
        "read_tofu",
        "tofu_utility",
    ),
    "experiments.compare": ("compare",),
    "experiments.diff": (
        "Diff",
        "diff",
    ),
    "experiments.hub": ("push_to_hub",),
    "experiments.loading": ("load_report",),
    "experiments.running": ("run",),
    "experiments.skill_graph": (
        "load_skill_graph",
        "save_skill_graph",
        "skill_graph",
    ),
    "figures.saving": ("save_figure",),
    "inspection.generations": (
        "Generations",
        "generations",
    ),
    "inspection.neuron_page": (
        "NeuronPage",
        "neuron_page",
    ),
    "inspection.token_values": (
        "TokenValues",
        "token_activations",
        "token_firing",
        "token_losses",
    ),
    "inspection.top_examples": (
        "TopExamples",
        "top_examples",
    ),
    "interventions.ablate": ("Ablate",),
    "interventions.abstain": ("Abstain",),
    "interventions.adjust": ("Adjust",),
    "interventions.affine": ("Affine",),
    "interventions.base": (
        "Chain",
        "Intervention",
        "Placed",
    ),
    "interventions.delta": ("Delta",),
    "interventions.files": ("load_intervention",),
    "interventions.patch": ("Patch",),
    "interventions.reroute": (
        "Reroute",
        "whole_experts",
    ),
    "interventions.update": ("Update",),
    "interventions.when": ("When",),
    "keyspace.key_space": (
        "KeySpace",
        "key_space",
    ),
    "keyspace.regions": (
        "Box",
        "Clusters",
        "Contrast",
        "Ellipsoid",
        "Linear",
        "fit_region",
    ),
    "methods.concept_erasure": ("concept_erasure",),
    "methods.controls": (
        "random_affine",
        "random_delta",
        "random_pruning",
    ),
    "methods.direction_removal": ("direction_removal",),
    "methods.gated_pruning": ("gated_pruning",),
    "methods.key_space_detection": (
        "key_space_detection",
        "query_keys",
    ),
    "methods.lape": ("lape",),
    "methods.linear_probe": ("probe_ranking",),
    "methods.neuron_adjust": ("neuron_adjust",),
    "methods.ov_basis": ("ov_basis",),
    "methods.rmu": ("rmu",),
    "methods.selective_pruning": ("selective_pruning",),
    "methods.simu": ("simu",),
    "methods.steering": ("steering",),
    "methods.tuning": (
        "sweep",
        "tune",
    ),
    "model.dictionary": ("Dictionary",),
    "model.dictionary_files": ("load_dictionary",),
    "model.loading": (
        "fingerprint",
        "load_model",
    ),
    "model.matrices": ("Matrix",),
    "model.sites": ("Site",),
    "neurons.attribution": (
        "Attribution",
        "attribute",
        "critical",
        "critical_mask",
    ),
    "neurons.collect": (
        "collect",
        "load_moments",
        "save_moments",
    ),
    "neurons.histogram": ("Histogram",),
    "neurons.key_sample": ("KeySample",),
    "neurons.maps": ("NeuronMap",),
    "neurons.moments": ("Moments",),
    "neurons.top_tokens": ("TopTokens",),
    "testing.models": ("check_model",),
}
"""The public names, by the module that defines them: the one table from which `__all__` and `__getattr__` are made."""
_MODULES = {"plot": "figures", "demo": "demo", "benchmarks": "benchmarks"}
"""Whole modules under a public name."""
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*sorted([*_HOME, *_MODULES]), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from lens_unlearn import benchmarks as benchmarks
    from lens_unlearn import demo as demo
    from lens_unlearn import figures as plot
    from lens_unlearn.audit.attack import Attack
    from lens_unlearn.audit.audit import Audit, audit
    from lens_unlearn.core.allocator import tune_allocator
    from lens_unlearn.core.errors import (
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
    from lens_unlearn.corpora.corpus import Corpus
    from lens_unlearn.corpora.reading import read_corpus
    from lens_unlearn.evaluation.evaluate import evaluate
    from lens_unlearn.evaluation.generation import generate
    from lens_unlearn.evaluation.in_context import with_examples
    from lens_unlearn.evaluation.membership import membership
    from lens_unlearn.evaluation.relearning import Relearning, anamnesis_index, anamnesis_interval, relearn
    from lens_unlearn.evaluation.report import Report, separability
    from lens_unlearn.evaluation.skill_graph import SkillGraph
    from lens_unlearn.evaluation.tofu import forget_quality, model_utility, read_tofu, tofu_utility
    from lens_unlearn.experiments.compare import compare
    from lens_unlearn.experiments.diff import Diff, diff
    from lens_unlearn.experiments.hub import push_to_hub
    from lens_unlearn.experiments.loading import load_report
    from lens_unlearn.experiments.running import run
    from lens_unlearn.experiments.skill_graph import load_skill_graph, save_skill_graph, skill_graph
    from lens_unlearn.figures.saving import save_figure
    from lens_unlearn.inspection.generations import Generations, generations
    from lens_unlearn.inspection.neuron_page import NeuronPage, neuron_page
    from lens_unlearn.inspection.token_values import TokenValues, token_activations, token_firing, token_losses
    from lens_unlearn.inspection.top_examples import TopExamples, top_examples
    from lens_unlearn.interventions.ablate import Ablate
    from lens_unlearn.interventions.abstain import Abstain
    from lens_unlearn.interventions.adjust import Adjust
    from lens_unlearn.interventions.affine import Affine
    from lens_unlearn.interventions.base import Chain, Intervention, Placed
    from lens_unlearn.interventions.delta import Delta
    from lens_unlearn.interventions.files import load_intervention
    from lens_unlearn.interventions.patch import Patch
    from lens_unlearn.interventions.reroute import Reroute, whole_experts
    from lens_unlearn.interventions.update import Update
    from lens_unlearn.interventions.when import When
    from lens_unlearn.keyspace.key_space import KeySpace, key_space
    from lens_unlearn.keyspace.regions import Box, Clusters, Contrast, Ellipsoid, Linear, fit_region
    from lens_unlearn.methods.concept_erasure import concept_erasure
    from lens_unlearn.methods.controls import random_affine, random_delta, random_pruning
    from lens_unlearn.methods.direction_removal import direction_removal
    from lens_unlearn.methods.gated_pruning import gated_pruning
    from lens_unlearn.methods.key_space_detection import key_space_detection
    from lens_unlearn.methods.lape import lape
    from lens_unlearn.methods.linear_probe import probe_ranking
    from lens_unlearn.methods.neuron_adjust import neuron_adjust
    from lens_unlearn.methods.ov_basis import ov_basis
    from lens_unlearn.methods.rmu import rmu
    from lens_unlearn.methods.selective_pruning import selective_pruning
    from lens_unlearn.methods.simu import simu
    from lens_unlearn.methods.steering import steering
    from lens_unlearn.methods.tuning import sweep, tune
    from lens_unlearn.model.dictionary import Dictionary
    from lens_unlearn.model.dictionary_files import load_dictionary
    from lens_unlearn.model.loading import fingerprint, load_model
    from lens_unlearn.model.matrices import Matrix
    from lens_unlearn.model.sites import Site
    from lens_unlearn.neurons.attribution import Attribution, attribute, critical, critical_mask
    from lens_unlearn.neurons.collect import collect, load_moments, query_keys, save_moments
    from lens_unlearn.neurons.histogram import Histogram
    from lens_unlearn.neurons.key_sample import KeySample
    from lens_unlearn.neurons.maps import NeuronMap
    from lens_unlearn.neurons.moments import Moments
    from lens_unlearn.neurons.top_tokens import TopTokens
    from lens_unlearn.testing.models import check_model


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


class _Package(ModuleType):
    """The package, on which a public name is what the table says, also where a room is called so: `lu.audit` is the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):  # an import puts every room here
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
