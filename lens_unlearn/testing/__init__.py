"""The promises of interventions and of statistics, as checks for your own: the battery that the shipped ones pass.

    check_intervention(MyIntervention(...), model)  # raises BrokenPromise, or tells what was checked
    check_statistic(MyStatistic, model=model)

Under pytest, one test per promise:

    @pytest.mark.parametrize(("promise", "check"), intervention_checks(MyIntervention(...), model))
    def test_it_keeps(promise, check):
        check()

Knows the promises of every intervention and statistic; knows nothing of the methods that make them.
What cannot be checked on a model is told with its reason, and skipped under pytest. The model is used as it is, so take a
small one; its hooks and flags, the random states and the modes of PyTorch are put back after every check.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.statistic import Statistic
from lens_unlearn.testing.interventions import InterventionPromises
from lens_unlearn.testing.promises import BrokenPromise, Checks, check_all, checks_of
from lens_unlearn.testing.statistics import StatisticPromises

__all__ = ["BrokenPromise", "check_intervention", "check_statistic", "intervention_checks", "statistic_checks"]


def check_intervention(
    intervention: Intervention, model: Model, *, tokens: Tensor | None = None, skip: Collection[str] = ()
) -> dict[str, str]:
    """Check an intervention against every promise that those of this package keep.

    Args:
        intervention: One of your own, or any.
        model: A `TransformerBridge` or `HookedTransformer` that it is made for, in evaluation mode; better a small one.
        tokens: Texts at which it acts, ``[batch, pos]``, without padding; default a few random tokens.
        skip: Names of promises that it does not make.

    Returns:
        For each promise "kept", or why it was not checked.

    Raises:
        BrokenPromise: At the first promise that is not kept.
        LensUnlearnError: If it is made for another model, or the model is in training mode.
    """
    return check_all(intervention_checks(intervention, model, tokens=tokens), skip)


def intervention_checks(intervention: Intervention, model: Model, *, tokens: Tensor | None = None) -> Checks:
    """Return the checks of `check_intervention`, each behind the name of its promise; none has run yet.

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
        make: The class, or a function that makes an empty one.
        sites: Where it is filled, with the shape of the neurons there; default an MLP and an attention site.
        read: What two of them are compared by; default their properties that are a `NeuronMap`, or without any the state.
        model: If given, the statistic is also collected over it.
        skip: Names of promises that it does not make.

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
    """Return the checks of `check_statistic`, each behind the name of its promise; none has run yet."""
    return checks_of(StatisticPromises(make, sites, read, model))
