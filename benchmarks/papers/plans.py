"""All plans, in the order of the papers."""

from benchmarks.papers import (
    es_alpha,
    es_queries,
    simu_masks,
    simu_objectives,
    simu_steps,
    simu_threshold,
    sp_tokens,
    sp_units,
)

PLANS = (
    sp_units.PLAN,
    sp_tokens.PLAN,
    es_alpha.PLAN,
    es_queries.PLAN,
    simu_steps.PLAN,
    simu_threshold.PLAN,
    simu_masks.PLAN,
    simu_objectives.PLAN,
)
