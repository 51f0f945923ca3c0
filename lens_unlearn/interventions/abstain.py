"""`Abstain`: refuse to answer a query whose key lies in a region of key space, by constant logits and a fixed text.

Knows regions, and where in a text a forward pass stands; knows nothing of how a region is fitted or its limit chosen
(`methods.key_space_detection` does).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError, SelectionError
from lens_unlearn.interventions.base import HookFunction, Intervention, Live, Parts
from lens_unlearn.keyspace.regions import Region, region_from_parts
from lens_unlearn.model.chat import chat_of, marks_of, question_ends
from lens_unlearn.model.pooling import Pool, check_pool, running_mean
from lens_unlearn.model.sites import Point, Site
from lens_unlearn.model.special_tokens import end_token

__all__ = ["REFUSAL", "Abstain"]

REFUSAL = "Sorry, your query is not valid."
"""The default of what `lu.generate` writes in place of an answer."""


@dataclass(frozen=True, eq=False, repr=False)
class Abstain(Intervention):
    """Abstain from answering a query whose key lies in a region: its logits are constant, its text is a refusal.

    Each row is judged for itself, by the key at its own last prompt token, whatever the padding and its neighbours; in a chat,
    at the last token of the user's last turn, since what stands behind it is the same in every prompt. With ``pool="mean"`` that
    key is the mean over the prompt's tokens up to there, without special ones and the first of a text. From that token on, an
    abstained row's logits carry nothing of the input: they are equal for all tokens, but for the end-of-text token (in a chat,
    that which ends a turn), which is ahead by 0.001, so that greedy generation stops at once. `lu.generate` writes the refusal
    instead. Logits before the prompt's end stay as they are: no later token ever changes them.

    A forward pass decides for itself, whatever ran before it: its prompts end at the last token of each row that is not
    padding, unless `Live.expect` says where. Only a generation goes on with what was decided at its prompt: the passes of one
    call of `generate`, and passes with a key-value cache that holds the pass before.

    Args:
        regions: One region per voting site, usually `mlp.post` of some layers.
        vote: At how many of them the key has to be inside.
        when: "prompt" decides once, at the prompt's end; "every_token" decides at each position from there on, and abstains
            from the first that is inside.
        refusal: What `lu.generate` writes.
        pool: "last" judges the key of the token itself, "mean" the mean over those of the text up to it: as the regions were
            fitted.
        rates: What was measured on held-out queries when it was fitted: "detection" and "false_alarms", each as
            [share, low, high, queries]; and the same of the control under "control".

    Raises:
        LensUnlearnError: If there is no region, or `vote`, `when` or `pool` is out of range.
    """

    kind: ClassVar[str] = "abstain"

    regions: Mapping[Site, Region]
    vote: int = 1
    when: Literal["prompt", "every_token"] = "prompt"
    refusal: str = REFUSAL
    rates: Mapping[str, Any] = field(default_factory=dict)
    pool: Pool = "last"

    looks_at_rows = True
    abstains = True
    judges = True

    def __post_init__(self) -> None:
        """Check the arguments, and put the sites in order."""
        if not self.regions:
            raise LensUnlearnError("Abstain needs a region at one site at least: fit one with fit_region")
        if not 1 <= self.vote <= len(self.regions):
            raise LensUnlearnError(f"vote={self.vote} of {len(self.regions)} sites: give 1 to the number of sites")
        if self.when not in ("prompt", "every_token"):
            raise LensUnlearnError(f"when={self.when!r} is not known: choose from prompt, every_token")
        check_pool(self.pool)
        control = self.rates.get("control", {})
        if not isinstance(control, Mapping):
            raise LensUnlearnError(
                f"the rates of the control are {control!r}: write them by name, as those of the method"
            )
        for name, rate in (
            (name, rates[name])
            for rates in (self.rates, control)
            for name in ("detection", "false_alarms")
            if name in rates
        ):
            if len(rate) != 4 or not all(isinstance(part, int | float) for part in rate):
                raise LensUnlearnError(f"the rate {name!r} is {rate!r}: write it as [share, low, high, queries]")
        ordered = sorted(self.regions.items(), key=lambda item: (item[0].kind, item[0].layer))  # a file has no order
        object.__setattr__(self, "regions", dict(ordered))

    @property
    def row_detector(self) -> "Abstain":
        """Itself: in all other rows the logits are the model's own."""
        return self

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return one hook per site, which notes whether each key is inside and leaves the activation as it is."""
        return [(site, self._hook(site, region)) for site, region in self.regions.items()]

    def _hook(self, site: Site, region: Region) -> HookFunction:
        def note(x: Tensor, live: Live) -> Tensor:
            rows = live.rows
            if rows is None:
                raise LensUnlearnError("Abstain needs token ids: run the model on tokens")
            rows.check(x)
            rows = rows.beside(x)
            state = live.notes.setdefault(id(self), {})
            keys = x.detach().flatten(2)
            if self.pool == "mean":
                sums = state.setdefault("sums", {})
                keys, sums[site] = running_mean(
                    keys, rows.text & ~live.special.to(x.device), sums.get(site) if rows.cached else None
                )
            given, width = rows.ends - rows.cached, x.shape[1]  # in this pass, or before or behind it
            end = question_ends(marks_of(getattr(live.model, "tokenizer", None)), rows.tokens, given)
            if not rows.continues:
                state["chat"] = end < given
            ends = end[:, None]
            place = torch.arange(width, device=x.device)
            if self.when == "every_token":
                inside = region.contains(keys) & (place >= ends) & rows.text
            else:
                last = keys[torch.arange(len(keys), device=x.device), end.clamp(0, width - 1)]
                inside = region.contains(last)[:, None] & (place == ends)
            if rows.repeats:  # what was decided at the positions of the pass before stands, and is not decided twice
                inside = inside & (place == width - 1)
            state.setdefault("votes", {})[site] = inside
            return x

        return note

    def settle(self, live: Live) -> None:
        """Decide which rows abstain from the end of this pass on."""
        silent = self.fired(live)
        if silent is not None:
            live.withhold(silent[:, -1], self.refusal)

    def fired(self, live: Live) -> Bool[Tensor, "batch pos"] | None:
        """Count the votes of a pass that is behind the last of the sites: at which of its positions a query was found.

        From the first on, all are. None if no pass has come so far.
        """
        # The votes of one pass come from hooks in several layers, so they can be counted only behind the last of them: where
        # something acts that depends on them, at the logits, or, since a pass may end before (a statistic stops it at its last
        # site), at the beginning of the next one. Votes are popped, so a pass is counted once, whichever comes first.
        state = live.notes.get(id(self), {})
        votes = state.pop("votes", None)
        if not votes:
            return state.get("silent")
        fired = torch.stack([vote.to(live.abstained.device) for vote in votes.values()]).sum(0) >= self.vote
        # Once found, always: of this pass' positions all those behind the first, and of later passes all.
        silent, before = fired.long().cummax(1).values.bool(), state.get("silent")
        if before is not None:
            # With a cache, a pass holds new positions alone, and the last decision of each row goes on. Without one, it holds
            # those of the pass before again, each of which keeps its own decision, and one more.
            repeats = live.rows is not None and live.rows.repeats
            silent = silent | (torch.cat([before, before[:, -1:]], dim=1) if repeats else before[:, -1:])
        state["silent"] = silent
        return silent

    def constant_at(self, live: Live) -> Int[Tensor, "batch pos"] | None:
        """Return where rows abstained, from where they were decided on, with the token that ends a text there, or a turn."""
        state = live.notes.get(id(self), {})
        silent = state.get("silent")
        if silent is None:
            return None
        chat, end = chat_of(getattr(live.model, "tokenizer", None)), end_token(live.model)
        ahead = torch.full_like(silent, int(live.model.cfg.d_vocab) if end is None else end, dtype=torch.long)
        if chat is not None and chat.turn_end is not None:
            ahead[state["chat"].to(ahead.device)] = chat.turn_end
        return torch.where(silent, ahead, -1)

    def check(self, points: Mapping[Site, Point]) -> None:
        """Refuse a model with other numbers of neurons."""
        for site, region in self.regions.items():
            width = math.prod(points[site].shape)
            if width != len(region.scale):
                raise SelectionError(
                    f"{site} has {width} neurons in this model, and the region {len(region.scale)} coordinates"
                )

    def describe(self) -> dict[str, str]:
        """Return the region at each site, in words."""
        return {str(site): repr(region) for site, region in self.regions.items()}

    def parts(self) -> Parts:
        """Return the regions."""
        header: dict[str, Any] = {"kind": self.kind, "vote": self.vote, "when": self.when}
        header |= {"refusal": self.refusal, "pool": self.pool, "rates": dict(self.rates)}
        headers, tensors = {}, {}
        for site, region in self.regions.items():
            headers[str(site)], region_tensors = region.parts()
            tensors |= {f"{name}/{site}": tensor for name, tensor in region_tensors.items()}
        return {**header, "regions": headers}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Abstain":
        """Rebuild from `parts`."""
        by_site: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, site = key.partition("/")
            by_site.setdefault(site, {})[name] = tensor
        regions = {Site.parse(site): region_from_parts(part, by_site[site]) for site, part in header["regions"].items()}
        pool = header.get("pool", "last")  # there was no other at first
        return cls(regions, int(header["vote"]), header["when"], str(header["refusal"]), header["rates"], pool)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site} {region!r}" for site, region in self.regions.items())
        vote = f", {self.vote} of {len(self.regions)} votes" if len(self.regions) > 1 else ""
        rates, control = "", self.rates.get("control", {})
        for key, words in (("detection", "detection"), ("false_alarms", "false positives")):
            if key in self.rates:
                share, low, high, n = self.rates[key]
                rates += f", {words} {share:.0%} [{low:.0%}, {high:.0%}] of {n:,} held-out queries"
                rates += f" (shuffled labels: {control[key][0]:.0%})" if key in control else ""
        pool = ", mean of the text" if self.pool == "mean" else ""
        return f"Abstain({self.when.replace('_', ' ')}{pool}, {shapes}{vote}{rates})"
