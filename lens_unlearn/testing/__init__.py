"""Checks for your own interventions and statistics: the test suite that those of this package pass.

    check_intervention(MyIntervention(...), model)  # raises BrokenPromise, or returns what was checked
    check_statistic(MyStatistic, model=model)

Under pytest, one test per promise:

    @pytest.mark.parametrize(("promise", "check"), intervention_checks(MyIntervention(...), model))
    def test_it_keeps(promise, check):
        check()

What cannot be checked on a model is returned with the reason, and skipped under pytest. The checks run many forward passes, so
use a small model; its hooks and flags, the random states and the modes of PyTorch are restored after every check.

`check_model(model)` checks a model instead: that on it sites, statistics and interventions mean what they say.

Knows the promises of every intervention and statistic; knows nothing of the methods that make them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.statistic import Statistic
from lens_unlearn.testing.interventions import InterventionPromises
from lens_unlearn.testing.models import check_model
from lens_unlearn.testing.outcomes import ModelChecks
from lens_unlearn.testing.promises import BrokenPromise, Checks, check_all, checks_of
from lens_unlearn.testing.statistics import StatisticPromises

__all__ = [
    "BrokenPromise",
    "ModelChecks",
    "check_intervention",
    "check_model",
    "check_statistic",
    "intervention_checks",
    "statistic_checks",
]


def check_intervention(
    intervention: Intervention, model: Model, *, tokens: Tensor | None = None, skip: Collection[str] = ()
) -> dict[str, str]:
    """Check an intervention against every promise that those of this package keep.

    Args:
        intervention: The intervention, your own or any other.
        model: A `TransformerBridge` or `HookedTransformer` that it is made for, in evaluation mode; preferably small.
        tokens: Texts on which it acts, ``[batch, pos]``, without padding; default a few random tokens.
        skip: Names of promises not to check.

    Returns:
        For each promise "kept", or why it was not checked.

    Raises:
        BrokenPromise: At the first promise that is not kept.
        LensUnlearnError: If the intervention is for another model, or the model is in training mode.
    """
    return check_all(intervention_checks(intervention, model, tokens=tokens), skip)


def intervention_checks(intervention: Intervention, model: Model, *, tokens: Tensor | None = None) -> Checks:
    """Return the checks of `check_intervention` as pairs of a promise's name and a function, without running any.

    A check raises `BrokenPromise`, or `unittest.SkipTest` where its promise cannot be checked.
    """
    return checks_of(InterventionPromises(intervention, model, tokens))


def check_statistic(
    make: Callable[[], Statistic],
    *,
    sites: Mapping[Site, tuple[int, ...]] | None = None,
    read: Callable[[Any], Mapping[str, Tensor]] | None = None,
    model: Model | None = None,
    skip: Collection[str] = (),
) -> dict[str, str]:
    """Check a statistic against every promise that those of this package keep.

    Args:
        make: The class, or a function that makes an empty statistic.
        sites: The sites at which it is updated, each with the shape of its neurons; default an MLP and an attention site.
        read: Returns the values by which two statistics are compared; default the properties that are a `NeuronMap`, or the
            state if there are none.
        model: If given, the statistic is also collected over this model.
        skip: Names of promises not to check.

    Returns:
        For each promise "kept", or why it was not checked.

    Raises:
        BrokenPromise: At the first promise that is not kept.
    """
    return check_all(statistic_checks(make, sites=sites, read=read, model=model), skip)


def statistic_checks(
    make: Callable[[], Statistic],
    *,
    sites: Mapping[Site, tuple[int, ...]] | None = None,
    read: Callable[[Any], Mapping[str, Tensor]] | None = None,
    model: Model | None = None,
) -> Checks:
    """Return the checks of `check_statistic` as pairs of a promise's name and a function, without running any."""
    return checks_of(StatisticPromises(make, sites, read, model))
