"""`When`: an intervention that acts only on queries that a detector finds.

Knows that a detector is asked before anything acts; knows nothing of how it was fitted, nor of what acts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool
from torch import Tensor

from lens_unlearn.core.errors import SelectionError
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.base import HookFunction, Intervention, Limited, Live, Parts, ReadParts
from lens_unlearn.keyspace.regions import Region
from lens_unlearn.model.sites import Point, Site

__all__ = ["When"]


@dataclass(frozen=True, eq=False, repr=False)
class When(Limited):
    """Let an intervention act only on the queries that a detector finds, from where they are found on.

    The detector judges each row for itself, as an `Abstain` does: by the key at the end of its prompt, or with
    ``when="every_token"`` at every position from there on. From that position on the intervention acts, in the rows that were
    found; everywhere else the model is bitwise as it was. So a strong intervention costs other texts no more than the detector's
    false positives.

    A forward pass goes through the layers once, so only what lies in layers behind the detector's last one can depend on it, and
    only that may be given. With a key-value cache, without one, and in teacher forcing the same positions are acted on.

    Args:
        detector: An `Abstain` as fitted by `lu.key_space_detection`; its refusal is not used.
        inner: What acts. All of its sites and matrices are in layers behind those of the detector.

    Raises:
        SelectionError: If the detector is no `Abstain`; if `inner` abstains, or acts in a layer up to the detector's last.
    """

    kind: ClassVar[str] = "when"

    judges = True
    detector: Abstain
    inner: Intervention

    def __post_init__(self) -> None:
        """Check that the detector is asked before anything acts."""
        if not isinstance(self.detector, Abstain):
            raise SelectionError(
                f"the detector is a {type(self.detector).__name__}: give what lu.key_space_detection returns, or an Abstain"
            )
        if not isinstance(self.inner, Intervention):
            raise SelectionError(
                f"a {type(self.inner).__name__} is no intervention that could act when a query is found"
            )
        if self.inner.abstains:
            raise SelectionError(f"{self.inner!r} abstains, which the detector does as it is: give what acts instead")
        last = max(site.layer for site in self.detector.regions)
        early = sorted({w.layer for w, _ in (*self.inner.hooks(), *self.inner.matrices()) if w.layer <= last})
        if early:
            raise SelectionError(
                f"the detector looks at layer {last}, and what is to act depends on it already in layer {early[0]}: give an "
                f"intervention of layers behind {last}, or a detector of an earlier layer"
            )

    @classmethod
    def region(cls, regions: Mapping[Site, Region], inner: Intervention, **options: Any) -> "When":
        """Detect by regions at their sites; `options` are those of `Abstain`, such as ``vote`` and ``when``."""
        return cls(Abstain(regions, **options), inner)

    @property
    def row_detector(self) -> Abstain:
        """Its detector."""
        return self.detector

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        """Return the detector's hooks, and those of what acts."""
        return [*self.detector.hooks(), *super().hooks()]

    def where(self, live: Live, x: Tensor, layer: int | None) -> Bool[Tensor, "batch pos"]:
        """Return where a query was found, and behind."""
        found = self.detector.fired(live)
        assert found is not None, "the detector's sites come before those of what acts"
        return found.to(x.device)

    def settle(self, live: Live) -> None:
        """Let both decide."""
        self.detector.fired(live)
        self.inner.settle(live)

    def check(self, points: Mapping[Site, Point]) -> None:
        """Let both check."""
        self.detector.check(points)
        self.inner.check(points)

    def describe(self) -> dict[str, str]:
        """Return what is done, and when."""
        acts = {place: f"{text}, when a query is found" for place, text in self.inner.describe().items()}
        return self.detector.describe() | acts

    def parts(self) -> Parts:
        """Return both."""
        (found, of_found), (acts, of_acts) = self.detector.parts(), self.inner.parts()
        tensors = {f"detector/{name}": tensor for name, tensor in of_found.items()}
        tensors |= {f"inner/{name}": tensor for name, tensor in of_acts.items()}
        return {"kind": self.kind, "detector": found, "inner": acts}, tensors

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], read: ReadParts) -> "When":
        """Rebuild from `parts`; `read` rebuilds both, of whatever kind they are."""
        made = {}
        for part in ("detector", "inner"):
            own = {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
            made[part] = read(header[part], own)
        return cls(made["detector"], made["inner"])  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"When({self.detector!r}, {self.inner!r})"
