"""Interventions: frozen values that become hooks for the length of a `with` block.

    prune = Ablate(score.top(0.02))
    with prune.on(model):
        model.generate("def fib(n):")

Nothing is written into the model. An intervention keeps no state of a run: what belongs to one lives on the `Live`
object that `on` yields. Each hook takes a tensor and returns a new one of the same shape, dtype and device.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.interventions.base import HookFunction, Intervention, Live, Parts
from lens_unlearn.keyspace.regions import Region, region_from_parts
from lens_unlearn.model.sites import Point, Site

__all__ = ["Abstain"]

REFUSAL = "Sorry, your query is not valid."


@dataclass(frozen=True, eq=False, repr=False)
class Abstain(Intervention):
    """Withhold the answer to a query whose key lies in a region: its logits are constant, its text is a refusal.

    Each row is judged for itself, by the key at its own last prompt token, whatever the padding and its neighbours. An
    abstained row's logits carry nothing of the input: they are equal for all tokens, but for the end-of-text token, which
    is ahead by a hair, so that greedy generation stops at once. `lu.generate` writes the refusal instead.

    Args:
        regions: One region per voting site, usually `mlp.post` of some layers.
        vote: At how many of them the key has to be inside.
        when: "prompt" decides at the prompt's end and keeps to that; "every_token" looks at each position from there on,
            and is silent from the first that is inside.
        refusal: What `lu.generate` writes.
        rates: What was measured on held-out queries when it was fitted: "detection" and "false_alarms", each as
            [share, low, high, queries].

    Raises:
        LensUnlearnError: If there is no region, or `vote` or `when` is out of range.
    """

    regions: Mapping[Site, Region]
    vote: int = 1
    when: Literal["prompt", "every_token"] = "prompt"
    refusal: str = REFUSAL
    rates: Mapping[str, Any] = field(default_factory=dict)

    looks_at_rows = True
    abstains = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not self.regions:
            raise LensUnlearnError("Abstain needs a region at one site at least")
        if not 1 <= self.vote <= len(self.regions):
            raise LensUnlearnError(f"vote={self.vote} of {len(self.regions)} sites: from 1 to the number of sites")
        if self.when not in ("prompt", "every_token"):
            raise LensUnlearnError(f"when={self.when!r} is not known: choose from prompt, every_token")
        for name in {"detection", "false_alarms"} & set(self.rates):
            rate = self.rates[name]
            if len(rate) != 4 or not all(isinstance(part, int | float) for part in rate):
                raise LensUnlearnError(f"the rate {name!r} is {rate!r}: write it as [share, low, high, queries]")

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site: it only looks."""
        return [(site, self._hook(site, region)) for site, region in self.regions.items()]

    def _hook(self, site: Site, region: Region) -> HookFunction:
        def look(x: Tensor, live: Live) -> Tensor:
            rows = live.rows
            if rows is None:
                raise LensUnlearnError("Abstain needs token ids: run the model on tokens")
            rows.check(x)
            rows = rows.beside(x)
            keys = x.detach().flatten(2)
            ends, width = rows.ends - rows.cached, x.shape[1]  # in this pass, or before or behind it
            if self.when == "every_token":
                inside = region.contains(keys) & (torch.arange(width, device=x.device) >= ends[:, None]) & rows.text
            else:
                fresh = (ends >= (width - 1 if rows.continues and not rows.cached else 0)) & (ends < width)
                at = keys[torch.arange(len(keys), device=x.device), ends.clamp(0, width - 1)]
                inside = (region.contains(at) & fresh)[:, None]
            live.notes.setdefault(id(self), {}).setdefault("votes", {})[site] = inside
            return x

        return look

    def settle(self, live: Live) -> None:
        """Count the votes of the pass that is over: where in it is silence, and which rows keep silent from then on."""
        note = live.notes.get(id(self), {})
        votes = note.pop("votes", None)
        if not votes:
            return
        fired = torch.stack([vote.to(live.abstained.device) for vote in votes.values()]).sum(0) >= self.vote
        silent, before = fired.long().cummax(1).values.bool(), note.get("silent")
        if before is not None:
            # Without a cache, a generation's next pass holds the positions of the one before again.
            again = self.when == "every_token" and live.rows is not None and not live.rows.cached
            silent = silent | (torch.cat([before, before[:, -1:]], dim=1) if again else before[:, -1:])
        note["silent"] = silent
        live.withhold(silent[:, -1], self.refusal)

    def finish(self, logits: Tensor, live: Live) -> Tensor:
        """Make the logits of abstained rows constant."""
        self.settle(live)
        silent = live.notes.get(id(self), {}).get("silent")
        if silent is None or not bool(silent.any()):  # logits are large: they are not copied for nothing
            return logits
        # The model may have kept the logits of the last positions only.
        where = silent[:, -1:] if silent.shape[1] < logits.shape[1] else silent[:, -logits.shape[1] :]
        constant = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        end = getattr(getattr(live.model, "tokenizer", None), "eos_token_id", None)
        if end is not None:
            constant[end] = 1e-3
        return torch.where(where.to(logits.device)[..., None], constant, logits)

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model with other numbers of neurons."""
        for site, region in self.regions.items():
            width = math.prod(points[site].shape)
            if width != len(region.scale):
                raise SelectionError(
                    f"{site} has {width} neurons in this model, and the region {len(region.scale)} coordinates"
                )

    def parts(self) -> Parts:
        """Return the regions."""
        header: dict[str, Any] = {"kind": "abstain", "vote": self.vote, "when": self.when}
        header |= {"refusal": self.refusal, "rates": dict(self.rates)}
        headers, tensors = {}, {}
        for site, region in self.regions.items():
            headers[str(site)], own = region.parts()
            tensors |= {f"{name}/{site}": tensor for name, tensor in own.items()}
        return {**header, "regions": headers}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Abstain":
        """Rebuild from `parts`."""
        own: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, site = key.partition("/")
            own.setdefault(site, {})[name] = tensor
        regions = {Site.parse(site): region_from_parts(told, own[site]) for site, told in header["regions"].items()}
        return cls(regions, int(header["vote"]), header["when"], str(header["refusal"]), header["rates"])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site} {region!r}" for site, region in self.regions.items())
        vote = f", {self.vote} of {len(self.regions)} votes" if len(self.regions) > 1 else ""
        told = "".join(
            f", {name} {share:.0%} [{low:.0%}, {high:.0%}] of {n:,} held-out queries"
            for name, (share, low, high, n) in (
                (name.replace("_", " "), self.rates[name])
                for name in ("detection", "false_alarms")
                if name in self.rates
            )
        )
        return f"Abstain({self.when.replace('_', ' ')}, {shapes}{vote}{told})"
