"""The promises of interventions, each as a check on a model.

Knows what any intervention has to do (reversible, repeatable, independent per row); knows nothing of what a particular one does.
"""

import gc
import json
import random
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, ModelError
from lens_unlearn.interventions.base import Chain, HookFunction, Intervention, Live, Parts
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.model.chat import ends_of_text
from lens_unlearn.model.hooks import attach, on_logits
from lens_unlearn.model.host import Model, device_of, require_eval, require_model
from lens_unlearn.model.matrices import matrix_shapes, on_matrix
from lens_unlearn.model.positions import pad_of
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.testing.promises import (
    Fault,
    Picture,
    Promises,
    Seen,
    apart,
    attributes,
    contents,
    demand,
    first_change,
    moved_by,
    put_back,
    weights_of,
)

__all__ = ["InterventionPromises"]


@dataclass(frozen=True)
class _Nudge(Intervention):
    """A simple intervention with which others are combined."""

    def hooks(self) -> Sequence[tuple[Site, HookFunction]]:
        return [(Site(0, "resid"), lambda x, live: x + torch.linspace(-1, 1, x.shape[-1]).to(x))]

    def parts(self) -> Parts:
        return {"kind": "nudge"}, {}


class InterventionPromises(Promises):
    """An intervention on a model."""

    def __init__(self, intervention: Intervention, model: Model, tokens: Int[Tensor, "batch pos"] | None) -> None:
        self.subject, self.intervention, self.model, self._given = (
            type(intervention).__name__,
            intervention,
            model,
            tokens,
        )
        self._held = {name: contents(value) for name, value in attributes(intervention).items()}  # before it ran

    def _begin(self) -> None:
        """Record the state of the model once, after a first pass in which it may set up caches of its own."""
        if "_base" in vars(self):
            return
        require_model(self.model)
        require_eval(self.model)
        self._points = resolve(self.model, [site for site, _ in self.intervention.hooks()] or [Site(0, "resid")])
        shapes = matrix_shapes(self.model, [matrix for matrix, _ in self.intervention.matrices()])
        self._matrices = list(shapes)
        self.intervention.check(self._points)
        self.intervention.check_matrices(shapes)
        with torch.no_grad():
            self.model.run_with_cache(self._tokens)
        self._weights, self._base = weights_of(self.model), self._run()

    @cached_property
    def _tokens(self) -> Int[Tensor, "batch pos"]:
        return self._draw(4, 6, seed=0) if self._given is None else self._given.to(device_of(self.model))

    @cached_property
    def _others(self) -> Int[Tensor, "batch pos"]:
        return self._draw(*self._tokens.shape, seed=1)

    def _draw(self, rows: int, width: int, seed: int) -> Int[Tensor, "rows width"]:
        """Return random texts, without end-of-text and padding tokens."""
        ends = torch.tensor([*ends_of_text(self.model), pad_of(self.model) or 0])
        usual = torch.arange(int(self.model.cfg.d_vocab))
        usual = usual[~torch.isin(usual, ends)]
        index = torch.randint(len(usual), (rows, width), generator=torch.Generator().manual_seed(seed))
        return usual[index].to(device_of(self.model))

    def _run(self, tokens: Tensor | None = None, **options: Any) -> Float[Tensor, "batch pos vocabulary"]:
        with torch.no_grad():
            return self.model(self._tokens if tokens is None else tokens, return_type="logits", **options).clone()

    def _inside(self, tokens: Tensor | None = None, *, by: Intervention | None = None, **options: Any) -> Tensor:
        with (by or self.intervention).on(self.model):
            return self._run(tokens, **options)

    @cached_property
    def _alone(self) -> Float[Tensor, "batch pos vocabulary"]:
        """The logits in a block of the intervention alone; read it before another block begins."""
        with put_back(self.model):
            return self._inside()

    @property
    def _idle(self) -> bool:
        return not (self.intervention.hooks() or self.intervention.matrices() or self.intervention.looks_at_rows)

    def _tolerance(self, drift: float) -> float:
        """Return the tolerance for rounding errors, given the difference that the unedited model shows (`drift`)."""
        return 10 * drift + 32 * torch.finfo(self._base.dtype).eps * float(self._alone.abs().max())

    def _differences(self, before: Picture) -> dict[str, str]:
        """Return what of hooks, settings, weights and logits differs from before a block, in words."""
        now, differences = Picture(self.model), {}
        if place := first_change(before.hooks, now.hooks):
            counts = len(now.hooks.get(place, [])), len(before.hooks.get(place, []))
            differences["hooks"] = f"{place} are {counts[0]}, not the {counts[1]} that were there before"
        if name := first_change(before.settings, now.settings):
            differences["settings"] = f"{name} is {now.settings.get(name)} and was {before.settings.get(name)}"
        if name := first_change(self._weights, weights_of(self.model)):
            differences["weights"] = f"{name} has other values"
        if gap := apart(self._run(), self._base):
            differences["logits"] = f"the logits differ by {gap:.2g}"
        return differences

    def _unchanged(self, before: Picture, when: str) -> None:
        seen = self._differences(before)
        demand(not seen, f"{when} {'; '.join(seen.values())}")

    def _same(self, context: str, one: Tensor, other: Tensor) -> None:
        demand(torch.equal(one, other), f"{context} the logits differ by {apart(one, other):.2g}")

    def shows_itself(self) -> None:
        """Its repr is one line that describes it."""
        text = repr(self.intervention)
        demand(text.strip() and "\n" not in text, f"it is {text!r}")
        demand(" object at 0x" not in text, f"it is {text!r}, which differs in every run")

    def is_frozen(self) -> None:
        """It is an immutable value: no attribute can be set."""
        for name in [*attributes(self.intervention), "something_new"]:
            held = hasattr(self.intervention, name)
            with suppress(AttributeError, TypeError):
                setattr(self.intervention, name, getattr(self.intervention, name, None))
                if not held:
                    delattr(self.intervention, name)
                raise Seen(f"{name} can be set; decorate the class with @dataclass(frozen=True)")

    def _watch(self, see: Callable[..., None]) -> None:
        """Call a function with every place where the intervention acts, and the tensors there."""
        for site, point in self._points.items():
            attach(point.hook, lambda x, where=site: see(where, x))
        for matrix in self._matrices:
            on_matrix(self.model, *matrix, lambda x, y, where=matrix: (see(where, x, y), y)[1])

    def _calls(self, dtype: torch.dtype) -> list[tuple[str, tuple[Tensor, ...], tuple[Tensor, ...], Any]]:
        """Call every hook function on its input in the unedited model, cast to a dtype.

        Returns:
            For each the place, the input as the function left it, a copy of the input, and the result.
        """
        seen: dict[Any, tuple[Tensor, ...]] = {"the logits": (self._base,)}
        with put_back(self.model):
            self._watch(lambda where, *given: seen.update({where: given}))
            self._run()
        calls: list[tuple[Any, Any]] = [*self.intervention.hooks(), *self.intervention.matrices()]
        results = []
        with self.intervention.on(self.model) as live, torch.no_grad():
            if self.intervention.looks_at_rows:
                if self.intervention.norm_layers:  # measured in a pass
                    self._run()
                norms = dict(live.norms)
                live.begin(self._tokens, 0)
                live.norms.update(norms)
                calls.append(("the logits", self.intervention.finish))
            for where, function in calls:
                given = tuple(x.to(dtype, copy=True) for x in seen[where])
                results.append((str(where), given, tuple(x.clone() for x in given), function(*given, live)))
        return results

    def writes_to_no_input(self) -> None:
        """A hook never writes to the tensors that it is given."""
        for where, given, copies, _ in self._calls(self._base.dtype):
            demand(all(map(torch.equal, given, copies)), f"at {where} it wrote to its input")

    def keeps_shape_and_dtype(self) -> None:
        """A hook returns a tensor of the shape, dtype and device of the one it is given, also in half precision."""
        for dtype in (self._base.dtype, torch.bfloat16, torch.float16, torch.float64):
            for where, (*_, given), _, result in self._calls(dtype):
                demand(isinstance(result, Tensor), f"at {where} it returned a {type(result).__name__}")
                one, other = (f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (given, result))
                demand(one == other, f"at {where} it was given {one} and returned {other}")

    def _after_a_block(self, aspect: str) -> None:
        before = Picture(self.model)
        self._inside()
        seen = self._differences(before)
        demand(aspect not in seen, f"after a block {seen.get(aspect)}")

    def leaves_the_hooks(self) -> None:
        """After the block the model has exactly the hooks that it had before."""
        self._after_a_block("hooks")

    def leaves_the_weights(self) -> None:
        """Every parameter and buffer is bitwise unchanged, inside the block and after it."""
        self._after_a_block("weights")
        with self.intervention.on(self.model):
            changed = first_change(self._weights, weights_of(self.model))
        demand(changed is None, f"inside the block {changed} has other values")

    def leaves_the_settings(self) -> None:
        """After the block training flags, requires_grad, grad mode and default dtype are as before."""
        self._after_a_block("settings")

    def leaves_the_random_state(self) -> None:
        """It draws no numbers from the global random states."""
        without, moved = (moved_by(self.model, lambda i=i: self._inside(by=i)) for i in (_Nudge(), self.intervention))
        demand(moved <= without, f"that of {', '.join(sorted(moved - without))} moved")

    def leaves_the_logits(self) -> None:
        """After the block the logits are bitwise those before it."""
        self._after_a_block("logits")

    def acts(self) -> None:
        """Inside its block the logits differ."""
        if self._idle:
            raise SkipTest("it has no hooks, so it is not expected to act")
        if torch.equal(self._alone, self._base):  # but it may act on what is generated only
            try:
                steps = zip(self._steps(self.intervention, True), self._steps(Chain(()), True), strict=True)
                acts = not all(torch.equal(one, other) for one, other in steps)
            except Exception:  # this model does not generate
                acts = False
            seen = f"on tokens {tuple(self._tokens.shape)} they are bitwise the same; pass tokens= at which it acts"
            demand(acts, seen)

    def stays_finite(self) -> None:
        """It turns no finite logit into NaN or infinity, also for a single row and a single token."""
        for tokens in (self._tokens, self._tokens[:1], self._tokens[:, :1], self._tokens[:1, :1]):
            bad = ~torch.isfinite(self._inside(tokens)) & torch.isfinite(self._run(tokens))
            demand(not bad.any(), f"on tokens {tuple(tokens.shape)} {int(bad.sum())} logits are not finite")

    def repeats(self) -> None:
        """The same text gives the same logits, whatever the global random states."""
        first = self._inside()
        _ = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 - advances them; they are restored
        self._same("the second time", self._inside(), first)

    def ends(self) -> None:
        """`on` yields a `Live` that is active inside the block, reports on each row, and is inactive after it."""
        with self.intervention.on(self.model) as live:
            demand(isinstance(live, Live), f"it is a {type(live).__name__}")
            demand(live.active, "live.active is False inside")
            self._run()
            complete = len(live.abstained) == len(self._tokens) or not self.intervention.looks_at_rows
            demand(complete, f"live.abstained has {len(live.abstained)} rows, not {len(self._tokens)}")
        demand(not live.active, "live.active is True after the block")

    def keeps_nothing(self) -> None:
        """It stores nothing of a run in its own attributes."""
        for tokens in (self._tokens, self._others):
            self._inside(tokens)
        now = {name: contents(value) for name, value in attributes(self.intervention).items()}
        changed = first_change(self._held, now)
        demand(changed is None, f"after two blocks its {changed} has changed")

    def works_again(self) -> None:
        """A second block gives the results of the first, whatever ran between them."""
        alone = self._alone
        self._inside(self._others)
        self._same("in a later block", self._inside(), alone)

    def begins_anew(self) -> None:
        """In one block, a text gives the results that it gives alone, whatever text came before it."""
        alone = self._alone
        with self.intervention.on(self.model):
            self._run(self._others)
            self._same("after another text", self._run(), alone)
            self._same("after itself", self._run(), alone)
            if self._tokens.shape[1] > 1:
                self._run(self._tokens[:, :-1])
                self._same("after the same text without its last token", self._run(), alone)

    def nests(self) -> None:
        """Its blocks can be nested, and the end of an inner one leaves the outer one acting."""
        alone = self._alone
        with self.intervention.on(self.model):
            for inner in (_Nudge(), self.intervention):
                inside = self._inside(by=inner)
                self._same(f"after an inner block of {type(inner).__name__}", self._run(), alone)
        self._same("after both blocks", self._run(), self._base)
        self._same(
            "in two blocks and in the sum of two", inside, self._inside(by=self.intervention + self.intervention)
        )

    def ends_in_any_order(self) -> None:
        """Blocks can end in any order, and the remaining ones go on acting."""
        i, nudge = self.intervention, _Nudge()
        for outer, inner, remaining in ((i, nudge, self._inside(by=nudge)), (nudge, i, self._alone)):
            stacks = [ExitStack(), ExitStack()]
            for stack, intervention in zip(stacks, (outer, inner), strict=True):
                stack.enter_context(intervention.on(self.model))
            stacks[0].close()
            self._same(f"where the block of {type(outer).__name__} began and ended first", self._run(), remaining)
            stacks[1].close()
            self._same("after both blocks", self._run(), self._base)

    def adds_up(self) -> None:
        """`+` is the same as nesting, it is associative, and `Chain(())` is its neutral element."""
        i, nudge, nothing = self.intervention, _Nudge(), Chain(())
        with i.on(self.model), nudge.on(self.model):
            nested = self._run()
        self._same("in i + Chain(()) and i", self._inside(by=i + nothing), self._alone)
        self._same("in Chain(()) + i and i", self._inside(by=nothing + i), self._alone)
        self._same("in i + other and other inside i", self._inside(by=i + nudge), nested)
        one, other = self._inside(by=(i + nudge) + i), self._inside(by=i + (nudge + i))
        self._same("in (i + other) + i and i + (other + i)", one, other)

    def survives_an_error_in_the_block(self) -> None:
        """An error in the block passes through, and leaves the model as it was."""
        for error in (Fault, KeyboardInterrupt, SystemExit):
            before, raised = Picture(self.model), False
            try:
                with self.intervention.on(self.model):
                    self._run()
                    raise error
            except error:
                raised = True
            demand(raised, f"it swallowed a {error.__name__}")
            self._unchanged(before, f"after a {error.__name__}")

    def survives_an_error_in_a_pass(self) -> None:
        """An error in a forward pass passes through, and does not affect the next pass in the block."""

        def fail(x: Tensor) -> None:
            raise Fault

        alone, before, site = self._alone, Picture(self.model), Site(int(self.model.cfg.n_layers) - 1, "resid")
        last = resolve(self.model, site)[site].hook
        with self.intervention.on(self.model):
            remove = attach(last, fail)
            with suppress(Fault):
                self._run(self._others)
                raise Seen("it swallowed the error")
            remove()
            self._same("in the next pass", self._run(), alone)
        self._unchanged(before, "after the block")

    def survives_an_error_while_it_begins(self) -> None:
        """If one of its hooks cannot be added, the error passes through and no hook stays."""
        self._inside()  # so that what is looked up once per model is known
        with _register(None) as added, self.intervention.on(self.model):
            count = len(added)
        if not count:
            raise SkipTest("it adds no hook")
        for n in sorted({0, count // 2, count - 1}):
            for late in (False, True):
                before = Picture(self.model)
                with suppress(Fault), _register(n, late=late), self.intervention.on(self.model):
                    raise Seen(f"it swallowed the error at hook {n + 1} of {count}")
                self._unchanged(before, f"after an error at hook {n + 1} of {count}")

    def leaves_your_hooks(self) -> None:
        """The user's own hooks keep their order, and act inside the block and after it."""
        with self.intervention.on(self.model):  # so that what is looked up once per model is known
            pass
        calls: list[str] = []

        def note(name: str) -> Callable[..., None]:
            return lambda x, hook: calls.append(name)

        for site, point in self._points.items():
            point.hook.add_hook(note(f"a temporary hook at {site}"))
            point.hook.add_hook(note(f"a permanent hook at {site}"), is_permanent=True)
            point.hook.add_hook(note(f"a prepended hook at {site}"), prepend=True)
            point.hook.add_hook(note(f"a backward hook at {site}"), dir="bwd")
        self._run()
        expected, before = [*calls], Picture(self.model)
        for when, block in (("inside the block", self.intervention), ("after the block", Chain(()))):
            calls.clear()
            self._inside(by=block)
            lost = next((name for name in expected if name not in calls), None)
            demand(lost is None, f"{when} {lost} is not called")
            demand(calls == expected, f"{when} they are called in another order, or more than once")
        changed = first_change(before.hooks, Picture(self.model).hooks)
        demand(changed is None, f"after the block {changed} are others")

    def survives_your_tools(self) -> None:
        """Inside the block `reset_hooks`, `run_with_cache` and `run_with_hooks` work, and do not stop it from acting."""
        alone, name = self._alone, next(iter(self._points.values())).hook.name
        tools: dict[str, Callable[[], Any]] = {
            "reset_hooks": self.model.reset_hooks,
            "run_with_cache": lambda: self.model.run_with_cache(self._tokens),
            "run_with_hooks": lambda: self.model.run_with_hooks(self._tokens, fwd_hooks=[(name, lambda x, hook: x)]),
        }
        if name not in self.model.hook_dict:  # inside experts, which these tools do not know
            del tools["run_with_hooks"]
        with self.intervention.on(self.model), torch.no_grad():
            for tool, use in tools.items():
                result = use()
                if result is not None:
                    logits = result[0] if isinstance(result, tuple) else result
                    self._same(f"in {tool} and a plain pass", logits, alone)
                self._same(f"after {tool}", self._run(), alone)

    def refuses_training_mode(self) -> None:
        """A model in training mode is refused, before any hook is added."""
        if self._idle:
            raise SkipTest("it has no hooks")
        for module in self.model.modules():
            module.training = True
        before = Picture(self.model)
        with suppress(ModelError), self.intervention.on(self.model):
            raise Seen("the block was entered")
        changed = first_change(before.hooks, Picture(self.model).hooks)
        demand(changed is None, f"after the refusal {changed} are others")

    def looks_only_back(self) -> None:
        """A token changes no logits before it."""
        width = self._tokens.shape[1]
        if width == 1:
            raise SkipTest("the texts have one token only")

        def gap(run: Callable[[Tensor], Tensor]) -> float:
            whole = run(self._tokens)
            mixed = (run(torch.cat([self._tokens[:, :p], self._others[:, p:]], 1)) for p in range(1, width))
            return max(apart(logits[:, :p], whole[:, :p]) for p, logits in enumerate(mixed, 1))

        self._against("this model itself is not causal", lambda: gap(self._run), lambda: gap(self._inside))

    def judges_rows_alone(self) -> None:
        """A row of a batch gives the same results as alone."""
        drift, seen = (
            apart(run(), torch.cat([run(x[None]) for x in self._tokens])) for run in (self._run, self._inside)
        )
        demand(seen <= self._tolerance(drift), f"the logits differ by {seen:.2g}, and without it by {drift:.2g}")

    def ignores_neighbours(self) -> None:
        """A row does not depend on the other rows of its batch, bitwise."""
        batches = [torch.cat([self._draw(2, self._tokens.shape[1], seed), self._tokens]) for seed in (2, 3)]
        if apart(*(self._run(tokens)[2:] for tokens in batches)):
            raise SkipTest("in this model rows depend on their neighbours without it")
        self._same("beside other rows", *(self._inside(tokens)[2:] for tokens in batches))

    def _padded(self, side: str) -> None:
        """Compare texts of several lengths, padded to one, with each alone."""
        pad, width = pad_of(self.model), self._tokens.shape[1]
        if pad is None and self.intervention.looks_at_rows:
            raise SkipTest("the model has no pad token, and this intervention looks at rows")
        texts = [row[i % min(3, width) :] for i, row in enumerate(self._tokens)]
        places = [slice(0, len(x)) if side == "right" else slice(width + 1 - len(x), None) for x in texts]
        tokens = torch.full((len(texts), width + 1), pad or 0).to(self._tokens)
        mask = torch.zeros_like(tokens)
        for i, text in enumerate(texts):
            tokens[i, places[i]], mask[i, places[i]] = text, 1
        options = {} if side == "right" else {"attention_mask": mask}

        def gap(run: Callable[..., Tensor]) -> float:
            together = run(tokens, **options)
            return max(apart(together[i, places[i]], run(text[None])[0]) for i, text in enumerate(texts))

        self._against(
            f"this model itself cannot be padded on the {side}", lambda: gap(self._run), lambda: gap(self._inside)
        )

    def _against(self, lacking: str, base: Callable[[], float], inside: Callable[[], float]) -> None:
        """Demand that a difference is no larger than without the intervention; skip if it is large there already."""
        try:
            drift = base()
        except Exception as error:
            raise SkipTest(f"{lacking}: {type(error).__name__}") from error
        if not drift <= 1e-2 * float(self._base.abs().max()):
            raise SkipTest(f"{lacking}: the logits differ by {drift:.2g}")
        seen = inside()
        demand(seen <= self._tolerance(drift), f"the logits differ by {seen:.2g}, and without it by {drift:.2g}")

    def ignores_padding_on_the_right(self) -> None:
        """A text padded on the right gives the same results as alone."""
        self._padded("right")

    def ignores_padding_on_the_left(self) -> None:
        """A text padded on the left, with its attention mask, gives the same results as alone."""
        self._padded("left")

    def _steps(self, by: Intervention, cache: bool) -> list[Float[Tensor, "batch vocabulary"]]:
        """Return the last logits of each step of a short greedy generation."""
        prompt = self._tokens[:, : max(1, int(self.model.cfg.n_ctx) - 4)]
        last: list[Tensor] = []
        with put_back(self.model), by.on(self.model), torch.no_grad():
            remove = on_logits(self.model, lambda y: (last.append(y[:, -1].clone()), y)[1])
            options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
            self.model.generate(prompt, max_new_tokens=4, use_past_kv_cache=cache, **options)
            remove()
        return last

    def generates_alike(self) -> None:
        """Greedy generation with a key-value cache gives the logits of generation without one."""

        def gap(by: Intervention) -> float:
            largest = 0.0
            for one, other in zip(self._steps(by, True), self._steps(by, False), strict=True):
                largest = max(largest, apart(one, other))
                if not torch.equal(one.argmax(-1), other.argmax(-1)):  # from here on the texts differ
                    break
            return largest

        lacking = "this model itself does not generate with and without a cache alike"
        self._against(lacking, lambda: gap(Chain(())), lambda: gap(self.intervention))

    def lets_gradients_pass(self) -> None:
        """With gradients enabled it gives the same logits, and finite gradients."""
        alone, weight = self._alone, next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if weight is None:
            raise SkipTest("the model has no weights that take a gradient")
        weight.requires_grad_(True)
        with torch.enable_grad():
            drift = apart(self.model(self._tokens, return_type="logits").detach(), self._base)
            with self.intervention.on(self.model):
                logits = self.model(self._tokens, return_type="logits")
                seen = apart(logits.detach(), alone)
                demand(seen <= self._tolerance(drift), f"the logits differ by {seen:.2g}")
                if logits.requires_grad:
                    gradient = torch.autograd.grad(logits.float().square().mean(), [weight], allow_unused=True)[0]
                    demand(gradient is None or torch.isfinite(gradient).all(), "a gradient is NaN or infinite")

    def lets_memory_go(self) -> None:
        """After the block neither activations nor the `Live` object are kept in memory."""
        passed: list[tuple[str, Callable[[], bool]]] = []

        def note(where: Any, *tensors: Tensor) -> None:
            passed.extend(
                (f"a tensor that passed {where}", StorageWeakRef(x.untyped_storage()).expired) for x in tensors
            )

        def still_alive(by: Intervention) -> str | None:
            passed.clear()
            with put_back(self.model):
                self._watch(note)  # the activations before the intervention
                with by.on(self.model) as live:
                    self._watch(note)  # and after it
                    self._run()
            alive = weakref.ref(live)
            passed.append(("the Live object", lambda: alive() is None))
            del live
            if not all(gone() for _, gone in passed):
                gc.collect()
            return next((name for name, gone in passed if not gone()), None)

        if still_alive(Chain(())):
            raise SkipTest("this model itself keeps activations")
        leaked = still_alive(self.intervention)
        demand(leaked is None, f"{leaked} is still in memory")

    def tells_its_parts(self) -> None:
        """`parts` returns a header with a "kind", which JSON preserves, and tensors by name."""
        header, tensors = self.intervention.parts()
        demand(isinstance(header.get("kind"), str), f'"kind" is {header.get("kind")!r} in the header')
        demand(json.loads(json.dumps(header)) == header, f"JSON does not preserve {header}")
        odd = [name for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
        demand(not odd, f"{odd} are not tensors with a name")

    def comes_back_from_a_file(self) -> None:
        """A saved file is read as an intervention that gives the same logits."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "intervention.safetensors"
            self.intervention.save(path, self.model)
            content, tensors = artefacts.read(path, "intervention")
            try:
                again = load_intervention(path, self.model)
            except ArtefactError as error:
                if "is not a kind of intervention" not in str(error):
                    raise
                rebuild = getattr(type(self.intervention), "from_parts", None)
                if rebuild is None:
                    raise SkipTest(
                        f"its kind is not one of the package, and {self.subject} has no from_parts"
                    ) from error
                again = rebuild(content["intervention"], tensors)
        self._same("read again", self._inside(by=again), self._alone)


@contextmanager
def _register(fails: int | None, *, late: bool = False) -> Iterator[list[Any]]:
    """Count the hooks that are registered, and raise before or after the n-th."""
    real = {name: getattr(torch.nn.Module, name) for name in ("register_forward_hook", "register_forward_pre_hook")}
    added: list[Any] = []

    def failing(register: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            added.append(args[0])
            if len(added) - 1 == fails and not late:
                raise Fault
            handle = register(*args, **kwargs)
            if len(added) - 1 == fails:
                raise Fault
            return handle

        return run

    try:
        for name, register in real.items():
            setattr(torch.nn.Module, name, failing(register))
        yield added
    finally:
        for name, register in real.items():
            setattr(torch.nn.Module, name, register)
