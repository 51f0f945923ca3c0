"""Helpers shared by tests: values at sites."""

from typing import Any

import torch

from lens_unlearn.model.hooks import attach, backbone, detach_all
from lens_unlearn.model.sites import Site, resolve


def values_seen(model: Any, kinds: list[str], tokens: torch.Tensor, *, whole: bool) -> dict[Site, torch.Tensor]:
    seen: dict[Site, torch.Tensor] = {}
    points = resolve(model, kinds)
    removers = [attach(point.hook, lambda t, s=site: seen.update({s: t.clone()})) for site, point in points.items()]
    try:
        with torch.no_grad():
            model(tokens) if whole else backbone(model, tokens)
    finally:
        detach_all(removers)
    return seen
