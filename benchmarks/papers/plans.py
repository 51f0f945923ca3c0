"""All plans, in the order of the papers."""

from benchmarks.papers import (
    es_alpha,
    es_every_token,
    es_generated,
    es_queries,
    simu_masks,
    simu_objectives,
    simu_steps,
    simu_threshold,
    sp_dropout,
    sp_tokens,
    sp_units,
)

PLANS = (
    sp_units.PLAN,
    sp_tokens.PLAN,
    sp_dropout.PLAN,
    es_alpha.PLAN,
    es_queries.PLAN,
    es_every_token.PLAN,
    es_generated.PLAN,
    simu_steps.PLAN,
    simu_threshold.PLAN,
    simu_masks.PLAN,
    simu_objectives.PLAN,
)
