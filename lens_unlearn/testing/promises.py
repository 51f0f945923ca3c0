"""How promises are checked, and how the state of a model is compared and restored.

Knows models, hooks and random states; knows no promise, which the two other files of this room hold.
"""

import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor

from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.model.host import Model, stored
from lens_unlearn.model.sites import extra_points

__all__ = [
    "BrokenPromise",
    "Checks",
    "Fault",
    "Picture",
    "Promises",
    "Seen",
    "apart",
    "attributes",
    "check_all",
    "checks_of",
    "contents",
    "demand",
    "first_change",
    "moved_by",
    "put_back",
    "weights_of",
]

Checks = list[tuple[str, Callable[[], None]]]


class BrokenPromise(AssertionError):
    """A promise that is not kept; the message says which object breaks which promise, where, and what was seen."""

    promise = ""
    """The name of the promise, as `skip` takes it."""


class Seen(Exception):
    """Something that a check saw and that breaks the promise."""


class Fault(Exception):
    """The error that checks raise on purpose."""


def demand(condition: object, seen: str) -> None:
    """Raise `Seen` with a description of what was seen, unless a condition holds."""
    if not condition:
        raise Seen(seen)


class Promises:
    """An object and its promises: the public methods of a subclass, in the order in which they are checked."""

    subject: str
    """The name of the object, for messages."""
    model: Model
    """The model to restore after each check; None if there is none."""

    def _begin(self) -> None:
        """Prepare for a check; called before each."""


def checks_of(promises: Promises) -> Checks:
    """Return one check for each promise."""
    names = [name for name, member in vars(type(promises)).items() if callable(member) and not name.startswith("_")]
    return [(name, partial(_check, promises, name)) for name in names]


def check_all(checks: Checks, skip: Collection[str]) -> dict[str, str]:
    """Check the promises in order, up to the first broken one; return for each "kept", or why it was not checked."""
    unknown = sorted({*skip} - {name for name, _ in checks})
    if unknown:
        raise LensUnlearnError(f"skip={unknown[0]!r} is not a promise: choose from {', '.join(dict(checks))}")
    results = dict.fromkeys(dict(checks), "kept")
    for name, check in checks:
        try:
            if name in skip:
                raise SkipTest("it was to be skipped")
            check()
        except SkipTest as reason:
            results[name] = f"not checked: {reason}"
    return results


def _check(promises: Promises, name: str) -> None:
    promises._begin()
    check = getattr(promises, name)
    with nullcontext() if promises.model is None else put_back(promises.model):
        try:
            check()
        except SkipTest:
            raise
        except Exception as error:
            promise = (check.__doc__ or name).partition("\n")[0].rstrip(".")
            lines = str(error).strip().splitlines() or ["without a word"]
            seen = str(error) if isinstance(error, Seen) else f"{type(error).__name__} was raised: {lines[0]}"
            broken = BrokenPromise(f"{promises.subject} breaks {name!r} ({promise[:1].lower()}{promise[1:]}): {seen}")
            broken.promise = name
            raise broken from (None if isinstance(error, Seen) else error)


class Picture:
    """The state that a block must not change, in a model and around it, except for the weights."""

    def __init__(self, model: Model) -> None:
        self.model, modules = model, [(path or "the model", module) for path, module in model.named_modules()]
        self._inside = extra_points(model)  # which are no part of the model
        modules += [(f"{point.name} ({index})", point) for index, point in enumerate(self._inside)]
        self._books = {  # the hook lists of PyTorch and of TransformerLens
            f"{name} of {path}": (vars(module), name, book)
            for path, module in modules
            for name, book in vars(module).items()
            if "hooks" in name and isinstance(book, dict | list)
        }
        self._entries = {
            key: [*(book.items() if isinstance(book, dict) else enumerate(book))]
            for key, (_, _, book) in self._books.items()
            if book  # most are empty: this saves thousands of lists
        }
        self.hooks = {key: [id(hook) for _, hook in entries] for key, entries in self._entries.items()}
        self.settings: dict[str, Any] = {f"training mode of {path}": module.training for path, module in modules}
        self.settings |= {f"requires_grad of {name}": p.requires_grad for name, p in model.named_parameters()}
        self.settings |= {"grad mode": torch.is_grad_enabled(), "default dtype": torch.get_default_dtype()}
        self.random: dict[str, Any] = {"PyTorch": torch.get_rng_state(), "Python": random.getstate()}
        self.random["NumPy"] = np.random.get_state()  # noqa: NPY002
        if torch.cuda.is_initialized():
            self.random["CUDA"] = torch.cuda.get_rng_state_all()

    def restore(self) -> None:
        """Restore everything."""
        for key, (held, name, book) in self._books.items():
            entries = self._entries.get(key, [])
            held[name] = book  # TransformerLens may have put a new list in its place
            if book or entries:
                book.clear()
                book.update(entries) if isinstance(book, dict) else book.extend(hook for _, hook in entries)
        for point in extra_points(self.model):
            if not any(point is known for known in self._inside):  # made since
                point.remove_hooks("both", including_permanent=True)
            point.settle()
        for path, module in self.model.named_modules():
            module.training = self.settings[f"training mode of {path or 'the model'}"]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad != self.settings[f"requires_grad of {name}"]:
                parameter.requires_grad_(not parameter.requires_grad)
        torch.set_grad_enabled(self.settings["grad mode"])
        torch.set_default_dtype(self.settings["default dtype"])
        torch.set_rng_state(self.random["PyTorch"])
        random.setstate(self.random["Python"])
        np.random.set_state(self.random["NumPy"])  # noqa: NPY002
        if "CUDA" in self.random:
            torch.cuda.set_rng_state_all(self.random["CUDA"])


@contextmanager
def put_back(model: Model) -> Iterator[None]:
    """Restore hooks, flags, modes and random states after a `with` block."""
    picture = Picture(model)
    try:
        yield
    finally:
        picture.restore()


def weights_of(model: Model) -> dict[str, Any]:
    """Return a digest of every parameter and buffer."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: contents(tensor) for name, tensor in held.items() if not tensor.is_meta}


def contents(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Return what an object holds, in a form that can be compared later; cached properties are left out."""
    if isinstance(value, Tensor):
        if (parts := stored(value))[0] is not value:
            return [contents(part, inside) for part in parts]
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes()!r}"
    if isinstance(value, torch.nn.Module) or callable(value) or id(value) in inside:
        return id(value)
    if isinstance(value, Mapping):
        return {str(key): contents(item, (*inside, id(value))) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [contents(item, (*inside, id(value))) for item in value]
    return {name: contents(item, (*inside, id(value))) for name, item in attributes(value).items()} or repr(value)


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, without its cached properties."""
    kind = type(value)
    slots = [name for base in kind.__mro__ for name in base.__dict__.get("__slots__", ()) if hasattr(value, name)]
    held = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
    return {name: item for name, item in held.items() if not isinstance(getattr(kind, name, None), cached_property)}


def moved_by(model: Model, run: Callable[[], Any]) -> set[str]:
    """Return the names of the global random states that a function advances."""
    before = contents(Picture(model).random)
    run()
    now = contents(Picture(model).random)
    return {name for name in now if now[name] != before.get(name)}


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the name of the first entry that differs; None if all are equal."""
    return next((key for key in {**before, **now} if key not in before or now.get(key, ...) != before[key]), None)


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors."""
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
