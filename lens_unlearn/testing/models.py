"""The battery that `check_model` runs on any model, ours in the tests or a user's own.

Knows what has to hold of a model for statistics and interventions to mean what they say; knows no architecture by name.
"""

# Nothing is written to a weight: where an ablation is compared with the edit that it stands for, the module is given another
# parameter for the length of one forward pass, and then its own one back.

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_unlearn.core.errors import LensUnlearnError, SiteError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Chain
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.update import Update
from lens_unlearn.model.chat import ends_of_text
from lens_unlearn.model.experts import MOE_KINDS, experts_in
from lens_unlearn.model.feature_points import FEATURES
from lens_unlearn.model.hooks import attach, detach_all, one_thread
from lens_unlearn.model.host import Model, device_of, is_quantized, part_of, require_eval, require_model
from lens_unlearn.model.matrices import Matrix, matrix_shape
from lens_unlearn.model.positions import pad_of
from lens_unlearn.model.shortcuts import unbridged
from lens_unlearn.model.sites import KINDS, Point, Site, layers_with, resolve
from lens_unlearn.model.wrapped import plain_map
from lens_unlearn.neurons.collect import collect
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.testing.outcomes import ModelChecks, Outcome, Row, first_line
from lens_unlearn.testing.promises import Picture, apart, first_change, put_back, weights_of

__all__ = ["check_model"]

ABLATED = ("mlp.post", "attn.z", "experts.post")
"""The kinds behind which there is a matrix whose rows an ablation stands for."""
MOST_LAYERS = 3
"""Layers in which things are changed: the first, the middle and the last that have a kind."""
_ROWS, _WIDTH, _NEW = 2, 9, 4
_BEHIND = {"mlp.post": ("mlp", "out", "W_out"), "attn.z": ("attn", "o", "W_O")}


class _Absent(Exception):
    """Says why something cannot be looked at in this model."""


def check_model(model: Model, *, reference: Any = None, tokens: Int[Tensor, "batch pos"] | None = None) -> ModelChecks:
    """Check that what this package does with a model means what it says, on your own model.

    Logits are compared with those of the plain Hugging Face model, sites and their widths are resolved, statistics compared with
    plain PyTorch hooks, attention patterns summed and edited, ablations and an update compared with the edit of weights that they
    stand for (where an ablation in float32 has to be equal bit for bit), generation with a cache compared with that without,
    and at last the model with what it was. Nothing is written to its weights.

    Args:
        model: A `TransformerBridge` or `HookedTransformer` in evaluation mode.
        reference: The plain Hugging Face model with the same weights, of your own. Default: the one inside a bridge.
        tokens: Texts to run, ``[batch, pos]``, without padding; default a few random tokens.

    Returns:
        One table, which shows itself; `ModelChecks.failed` is what is not as it should be.

    Raises:
        ModelError: If this is no TransformerLens model, it is in training mode, or another thread uses it.

    Examples:
        >>> import lens_unlearn as lu
        >>> lu.check_model(lu.load_model("demo")).failed
        ()
    """
    require_model(model)
    require_eval(model)
    with one_thread(model), put_back(model), torch.no_grad():
        return ModelChecks(_name(model), tuple(_Battery(model, reference, tokens).run()))


def _name(model: Model) -> str:
    kind = type(getattr(model, "original_model", model)).__name__
    name = str(getattr(model.cfg, "model_name", None) or "external")
    return kind if name == "external" else f"{name} ({kind})"


@dataclass
class _Battery:
    model: Model
    reference: Any
    given: Tensor | None
    rows: list[Row] = field(default_factory=list)

    def run(self) -> list[Row]:
        self.tokens = self._drawn() if self.given is None else self.given.to(device_of(self.model))
        self._logits()  # what a model sets up for itself at its first pass is none of our doing
        hooks, weights, self.base = Picture(self.model).hooks, weights_of(self.model), self._logits()
        self._row("logits", "", self._equal_the_plain_ones)
        found = {kind: points for kind in KINDS if (points := self._sites(kind)) is not None}
        for kind in _BEHIND:
            if kind in found:
                self._row("statistics", kind, lambda kind=kind: self._statistics(kind, found[kind]))
        if "attn.z" in found:
            self._row("sums", "attention", self._attention_sums)
            self._row("effect", "attention", self._attention_acts)
        for kind in ABLATED:
            if kind in found:
                self._row("ablation", kind, lambda kind=kind: self._ablation(kind, found[kind]))
        if "mlp.post" in found:
            self._row("update", "W_out", self._update)
        self._row("generation", "", lambda: self._generation(found))
        self._row("restoration", "", lambda: self._restored(hooks, weights, found))
        return self.rows

    def _row(self, check: str, what: str, look: Callable[[], str]) -> None:
        outcome: Outcome = "works"
        try:
            words = look()
        except _Absent as reason:
            outcome, words = "absent", str(reason)
        except AssertionError as error:
            outcome, words = "fails", first_line(error)
        except LensUnlearnError as error:
            outcome, words = "absent", first_line(error)
        except Exception as error:  # of the model's own code, or TransformerLens'
            outcome, words = "fails", f"{type(error).__name__}: {first_line(error)}"
        self.rows.append(Row(check, what, outcome, words))

    def _drawn(self) -> Int[Tensor, "batch pos"]:
        usual = torch.arange(int(self.model.cfg.d_vocab))
        usual = usual[~torch.isin(usual, torch.tensor([*ends_of_text(self.model), pad_of(self.model) or 0]))]
        width = max(3, min(_WIDTH, int(self.model.cfg.n_ctx) - _NEW))
        index = torch.randint(len(usual), (_ROWS, width), generator=torch.Generator().manual_seed(0))
        return usual[index].to(device_of(self.model))

    def _logits(self, tokens: Tensor | None = None) -> Float[Tensor, "batch pos vocabulary"]:
        return self.model(self.tokens if tokens is None else tokens, return_type="logits").clone()

    @property
    def _quantized(self) -> bool:
        return any(map(is_quantized, self.model.parameters()))

    @property
    def _tolerance(self) -> float:
        """Return how far two ways to compute the same logits may lie apart."""
        share = {torch.float32: 1e-4, torch.float64: 1e-8}.get(self.base.dtype, 5e-2)
        return (5e-2 if self._quantized else share) * float(self.base.abs().max())

    def _equal_the_plain_ones(self) -> str:
        if self.reference is not None:
            plain = self.reference(self.tokens).logits
        elif not hasattr(self.model, "original_model") or not hasattr(self.model.original_model, "config"):
            raise _Absent("there is no plain model to compare with: pass the same one of Hugging Face as reference=")
        elif getattr(self.model, "compatibility_mode", False):
            raise _Absent("compatibility mode has other weights than the plain model: pass that as reference=")
        else:
            with unbridged(self.model) as inner:
                plain = inner(self.tokens).logits
        ours, plain = self.base, plain.to(self.base)
        if getattr(self.model, "compatibility_mode", False):  # which moves all logits of a position by a constant
            ours, plain = ours.log_softmax(-1), plain.log_softmax(-1)
        gap = apart(ours, plain)
        assert gap <= self._tolerance, f"they differ by {gap:.2g} from those of the plain model"
        return "those of the plain model, bit for bit" if gap == 0 else f"those of the plain model to {gap:.1g}"

    def _sites(self, kind: str) -> dict[Site, Point] | None:
        points: dict[Site, Point] = {}
        try:
            layers_with(self.model, kind)
        except SiteError:
            if kind not in (*MOE_KINDS, FEATURES):  # that most models have none of these goes without saying
                first = self.model.blocks[0]
                what = type(getattr(first, "original_component", None) or first).__name__
                self.rows.append(Row("site", kind, "absent", f"no layer has it; layer 0 is a {what}"))
            return None

        def look() -> str:
            with warnings.catch_warnings():  # what is said of the neurons there stands in the table
                warnings.simplefilter("ignore", RuntimeWarning)
                points.update(resolve(self.model, kind))
            shapes = sorted({" x ".join(map(str, point.shape)) for point in points.values()})
            layers = [site.layer for site in points]
            whole = len(layers) == int(self.model.cfg.n_layers)
            where = "every layer" if whole else f"layer{'s' * (len(layers) > 1)} {_ranges(layers)}"
            note = next((f" ({point.note})" for point in points.values() if point.note), "")
            return f"{' or '.join(shapes)} in {where}{note}"

        self._row("site", kind, look)
        return points or None

    def _statistics(self, kind: str, points: dict[Site, Point]) -> str:
        if not hasattr(self.model, "original_model"):
            raise _Absent("there is no plain module that has these values as its input")
        corpus = _as_corpus(self.tokens.cpu(), self.model)
        sites = _few(points)
        moments = collect(self.model, corpus, sites, batch_size=1, progress=False)
        seen: dict[Site, list[Tensor]] = {site: [] for site in sites}

        def watch(site: Site) -> Callable[..., None]:
            return lambda module, args: seen[site].append(args[0].detach().double().flatten(0, -2))

        handles = [_linear(self.model, site).register_forward_pre_hook(watch(site)) for site in sites]
        try:
            for row in self.tokens:
                self._logits(row[None])
        finally:
            for handle in handles:
                handle.remove()
        if not all(seen.values()):
            raise _Absent("compatibility mode computes without the modules that would have these values as their input")
        for site in sites:
            plain = torch.cat(seen[site]).mean(0).cpu()
            gap = apart(moments.mean[site].reshape(-1), plain)
            limit = (1e-4 if self.base.dtype == torch.float32 else 5e-2) * max(1.0, float(plain.abs().max()))
            limit = 0.1 * max(1.0, float(plain.abs().max())) if self._quantized else limit
            assert gap <= limit, f"means at {site} differ by {gap:.2g} from those that plain hooks see"
        return "means are those that plain hooks see"

    # --- attention -------------------------------------------------------------------------------------------------------

    def _patterns(self) -> dict[int, Any]:
        layers = layers_with(self.model, "attn.z")
        points = self.model.hook_dict
        found = {n: points[name] for n in layers if (name := f"blocks.{n}.attn.hook_pattern") in points}
        if not found:
            raise _Absent("TransformerLens shows no attention patterns in this model")
        return {n: found[n] for n in _spread(list(found))}

    def _with_patterns(self, change: Callable[[int, Tensor], Tensor | None]) -> Tensor:
        removers: list[Any] = []
        try:
            try:
                for layer, point in self._patterns().items():
                    attach(point, lambda x, layer=layer: change(layer, x), removers)
                return self._logits()
            finally:
                detach_all(removers)
        finally:  # once more, for an interrupt just before the line above
            detach_all(removers)

    def _attention_sums(self) -> str:
        seen: dict[int, Tensor] = {}
        self._with_patterns(lambda layer, x: seen.update({layer: x.detach().float()}))
        if not seen:
            raise _Absent("attention patterns do not fire in this model")
        least, most = 1.0, 1.0
        for layer, pattern in seen.items():
            assert pattern.ndim == 4, f"the pattern of layer {layer} has shape {tuple(pattern.shape)}"
            later = float(pattern.triu(1).abs().max())
            assert later < 1e-6, f"layer {layer} attends to later positions, with up to {later:.2g}"
            sums = pattern.sum(-1)
            least, most = min(least, float(sums.min())), max(most, float(sums.max()))
        close = 1e-4 if self.base.dtype in (torch.float32, torch.float64) else 2e-2
        if most <= 1 + close and least < 1 - close and self._has_sinks():
            return f"patterns sum to {least:.2f} to {most:.2f}: the rest goes to sinks that are no positions"
        assert abs(least - 1) < close > abs(most - 1), f"patterns sum to {least:.3g} to {most:.3g}, not to one"
        return "patterns sum to one, over earlier positions"

    def _has_sinks(self) -> bool:
        return any("sink" in name for name, _ in self.model.named_parameters())

    def _attention_acts(self) -> str:
        fired: list[int] = []

        def even(layer: int, pattern: Tensor) -> Tensor:
            fired.append(layer)
            flat = torch.ones_like(pattern).tril()
            return flat / flat.sum(-1, keepdim=True)

        with warnings.catch_warnings():  # TransformerLens warns where an edit is discarded, which the table says
            warnings.simplefilter("ignore", UserWarning)
            gap = apart(self._with_patterns(even), self.base)
        if not fired:
            raise _Absent("attention patterns do not fire in this model")
        if gap <= self._tolerance:
            raise _Absent(
                "an edited pattern has no effect: TransformerLens shows it, and the model goes on with its own"
            )
        return "an edited pattern changes the logits"

    # --- interventions ---------------------------------------------------------------------------------------------------

    def _third(self, points: dict[Site, Point]) -> Ablate:
        draw = torch.Generator().manual_seed(1)
        chosen = {site: torch.rand(points[site].shape, generator=draw) < 1 / 3 for site in _few(points)}
        for value in chosen.values():
            value.reshape(-1)[0] = True
        return Ablate(NeuronMap(chosen))

    def _ablation(self, kind: str, points: dict[Site, Point]) -> str:
        ablation = self._third(points)
        with ablation.on(self.model):
            ablated = self._logits()
        assert not torch.equal(ablated, self.base), "it has no effect"
        assert torch.equal(self._logits(), self.base), "the logits differ behind the block"
        if self._quantized:
            return "it acts; quantized weights have no edit to compare with"
        edited = self._edited(kind, ablation)
        if torch.equal(edited, self.base):  # compatibility mode computes with weights of its own
            return "it acts; the weights that the model computes with are not those of a module, to edit"
        gap = apart(ablated, edited)
        if gap == 0:
            return "that of the edited weights, bit for bit"
        assert self.base.dtype != torch.float32 or not _bitwise(self.model), (
            f"the logits differ by {gap:.2g} from those of the edited weights"
        )
        assert gap <= self._tolerance, f"the logits differ by {gap:.2g} from those of the edited weights"
        return f"that of the edited weights to {gap:.1g}"

    def _edited(self, kind: str, ablation: Ablate) -> Tensor:
        """Return the logits with zeros in the weights that the ablated neurons write with."""
        with _replaced() as replace:
            for site, chosen in ablation.selection.items():
                if kind == "experts.post":
                    module = cast(nn.Module, experts_in(self.model, site.layer))
                    weight = module._parameters["down_proj"]
                    assert weight is not None
                    columns = chosen.to(weight.device).reshape(len(weight), -1)
                    first = getattr(module, "is_transposed", weight.shape[1] == columns.shape[1])
                    keep = ~(columns[:, :, None] if first else columns[:, None, :])
                    replace(module, "down_proj", weight * keep)
                    continue
                module, name = _matrix_behind(self.model, site)
                weight = cast(Tensor, module._parameters[name])
                keep = ~chosen.reshape(-1).to(weight.device)
                if name != "weight":  # of HookedTransformer: [neurons, d_model], or [heads, d_head, d_model]
                    replace(module, name, weight * keep.reshape(weight.shape[:-1])[..., None])
                else:
                    replace(module, name, weight * (keep[:, None] if type(module).__name__ == "Conv1D" else keep[None]))
            return self._logits()

    def _update(self) -> str:
        layer = layers_with(self.model, "mlp.post")[-1]
        shape = matrix_shape(self.model, layer, "W_out")
        change = torch.randn(shape, generator=torch.Generator().manual_seed(2)) / shape[0] ** 0.5
        with Delta({Matrix(layer, "W_out"): Update(change)}).on(self.model):
            changed = self._logits()
        assert not torch.equal(changed, self.base), "it has no effect"
        with _replaced() as replace:
            module, name = _matrix_behind(self.model, Site(layer, "mlp.post"))
            weight = cast(Tensor, module._parameters[name])
            turned = name == "weight" and type(module).__name__ != "Conv1D"
            replace(module, name, weight + (change.T if turned else change).to(weight))
            edited = self._logits()
        if torch.equal(edited, self.base):
            return "it acts; the weights that the model computes with are not those of a module, to edit"
        gap = apart(changed, edited)
        assert gap <= 10 * self._tolerance, f"the logits differ by {gap:.2g} from those of the edited weights"
        return f"that of the edited weights to {gap:.1g}"

    # --- generation, and what is left ------------------------------------------------------------------------------------

    def _generation(self, found: dict[str, dict[Site, Point]]) -> str:
        if not hasattr(self.model, "generate"):
            raise _Absent("TransformerLens cannot generate with this model")
        if getattr(self.model, "tokenizer", None) is None:
            raise _Absent("without a tokenizer TransformerLens cannot generate: give the bridge one")
        self._same_tokens("")
        ablations = [self._third(found[kind]) for kind in ABLATED if kind in found]
        if ablations:
            with Chain(tuple(ablations)).on(self.model):
                self._same_tokens(" where neurons are ablated")
        return "with a cache and without, the same tokens, ablated and not"

    def _same_tokens(self, how: str) -> None:
        options = {
            "max_new_tokens": _NEW,
            "do_sample": False,
            "stop_at_eos": False,
            "return_type": "tokens",
            "verbose": False,
        }
        try:
            cached, whole = (
                cast(Tensor, self.model.generate(self.tokens, use_past_kv_cache=cache, **options))
                for cache in (True, False)
            )
        except NotImplementedError as error:
            raise _Absent(f"TransformerLens cannot generate with this model: {first_line(error)}") from error
        start = self.tokens.shape[1]
        for one, other in zip(cached, whole, strict=True):
            differing = (one[start:] != other[start:]).nonzero()
            if len(differing):
                at = start + int(differing[0])
                logits = self._logits(other[None, :at])[0, -1]
                gap = abs(float(logits[int(one[at])] - logits[int(other[at])]))
                assert gap <= self._tolerance, (
                    f"with a cache other tokens than without{how or ', without any intervention: the cache is at fault'}"
                )

    def _restored(self, hooks: dict[str, Any], weights: dict[str, Any], found: dict[str, dict[Site, Point]]) -> str:
        kind = next((kind for kind in (*ABLATED, "resid") if kind in found), None)
        if kind is not None:
            try:
                with self._third(found[kind]).on(self.model):
                    self._logits()
                    raise _Absent("inside the block")
            except _Absent:
                pass
        place = first_change(hooks, Picture(self.model).hooks)
        assert place is None, f"{place} are not those that were there before"
        changed = first_change(weights, weights_of(self.model))
        assert changed is None, f"{changed} has other values"
        gap = apart(self._logits(), self.base)
        assert gap == 0 or self._random(), f"the logits differ by {gap:.2g} from those before"
        return "hooks, weights and logits are as before, bit for bit" if gap == 0 else "hooks and weights are as before"

    def _random(self) -> bool:
        """Whether the unedited model does not give the same twice, as on some GPUs."""
        return not all(torch.equal(self._logits(), self.base) for _ in range(2))


@contextmanager
def _replaced() -> Iterator[Callable[[nn.Module, str, Tensor], None]]:
    """Give modules other parameters, for the length of a `with` block."""
    before: list[tuple[nn.Module, str, Any]] = []

    def replace(module: nn.Module, name: str, weight: Tensor) -> None:
        before.append((module, name, module._parameters[name]))
        module._parameters[name] = nn.Parameter(weight.detach(), requires_grad=False)

    def restore() -> None:
        for module, name, parameter in reversed(before):
            module._parameters[name] = parameter

    try:
        try:
            yield replace
        finally:
            restore()
    finally:  # once more, for an interrupt just before the line above
        restore()


def _matrix_behind(model: Model, site: Site) -> tuple[nn.Module, str]:
    """Return the module that holds the matrix behind a site, and the name of its parameter there."""
    part, _, matrix = _BEHIND[site.kind]
    if hasattr(model, "original_model"):
        return _linear(model, site), "weight"
    return part_of(model, site.layer, part), matrix


def _linear(model: Model, site: Site) -> nn.Module:
    """Return the plain module of a bridge whose input a site is."""
    if (inside := plain_map(model, site.layer, site.kind)) is not None:
        return inside
    part, name, _ = _BEHIND[site.kind]
    owner = part_of(model, site.layer, part)
    component = getattr(owner, f"dense_{name}", None) or getattr(owner, name)
    return component.original_component


def _bitwise(model: Model) -> bool:
    """Whether a product with zeros on the left and one with zeros on the right are added up in the same order: on a CPU."""
    return device_of(model).type == "cpu"


def _spread(items: list[Any]) -> list[Any]:
    """Return the first, the middle and the last."""
    return list(dict.fromkeys([items[0], items[len(items) // 2], items[-1]]))[:MOST_LAYERS]


def _few(points: dict[Site, Point]) -> list[Site]:
    return _spread(list(points))


def _ranges(layers: list[int]) -> str:
    """Write numbers as in "0 to 3, 7"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)


def _as_corpus(tokens: Int[Tensor, "batch pos"], model: Model) -> Corpus:
    rows, width = tokens.shape
    return Corpus(
        name="check", tokens=tokens.reshape(-1).int(), counted=torch.ones(rows * width, dtype=torch.bool),
        starts=torch.arange(rows + 1) * width, document=torch.arange(rows), keys=tuple(map(str, range(rows))),
        window=width, prepend_bos=False, vocabulary="",
    )  # fmt: skip
