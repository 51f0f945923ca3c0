"""`Plan`: the settings of one experiment, checked before a model is loaded, as `run.json` keeps them.

Knows what can be asked for and the command that asks for it; knows nothing of models or folders.
"""

import json
import shlex
from dataclasses import dataclass, field, fields
from typing import Any

from lens_unlearn import methods
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.core.names import check_name
from lens_unlearn.core.numbers import NUMBERS, STRENGTH
from lens_unlearn.methods.budget import CONFIDENCE
from lens_unlearn.methods.method import Method
from lens_unlearn.methods.options import DECIDED_BY_THE_RUN
from lens_unlearn.model.dtypes import AUTO, dtype_of

__all__ = ["Plan", "command_of", "option_names", "settings_of"]

AROUND = (0.25, 0.5, 2.0, 4.0)
"""A sweep over shares of neurons goes over these multiples of the one that was chosen, which is measured anyway: what a share does
differs too much between models for a grid that fits all."""
DEALT = 4
"""Controls from which on they share the documents of a run: of fewer samples, Student's interval of a mean is too wide for use."""
STRENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
FALSE_ALARMS = (0.005, 0.02, 0.05, 0.1, 0.3)
SKILL = "No document is used for two of fitting, tuning and testing."
FACTS = (
    "Forgetting is tested on the very facts that every method was fitted and tuned to: that is the protocol of memorized facts, "
    "and says nothing about other facts. What is retained is tested on documents that no method was fitted or tuned on."
)
_FIRST = (
    "model", "forget", "retain", "also", "methods", "settings", "test_forget", "test_retain", "template", "tokens", "window",
    "retain_drop", "seed", "batch_size", "controls", "sweep", "fractions", "false_alarms", "strengths", "answers", "memorization",
    "dtype", "device_map",
)  # fmt: skip
"""The fields of the first plans, which every `run.json` has."""

_CALLED = {"methods": "method", "settings": "set", "controls": "control_seeds", "deal": "deal_controls"}
"""Fields that are called otherwise on the command line."""
_SEVERAL = ("retain", "also", "methods", "settings", "test_retain")
"""Fields whose option is given once for each value."""


@dataclass(frozen=True)
class Plan:
    """The settings of one experiment, as `run.json` keeps them."""

    model: str
    forget: str
    retain: tuple[str, ...]
    also: dict[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("selective-pruning",)
    settings: dict[str, Any] = field(default_factory=dict)
    test_forget: str | None = None
    test_retain: tuple[str, ...] = ()
    template: str | None = None
    answer_eos: bool = False
    """Whether the end-of-text token stands behind every answer, and counts."""
    chat: bool = False
    """Whether the sources hold conversations, which are read in the tokenizer's chat template."""
    system: str | None = None
    """The system's turn of conversations that have none of their own."""
    tokens: int = 20_000
    shuffle: int | None = None
    """Documents of a buffer from which those that are read are drawn; None takes them as they come."""
    window: int | None = None
    prepend_bos: bool | None = None
    """Whether rows and prompts begin with BOS; None leaves it to the tokenizer."""
    retain_drop: float | None = None
    confidence: float = CONFIDENCE
    """With which fresh documents are to lose no more than `retain_drop`."""
    seed: int = 0
    batch_size: int | None = None
    """Rows of full length per forward pass; None leaves it to what this machine is fastest with."""
    controls: int = 5
    """Random controls per method, each with a seed of its own."""
    deal: bool | None = None
    """Whether the controls of a method share the test documents (`evaluate`); None: where there are several methods, and controls
    enough."""
    sweep: bool = True
    fractions: tuple[float, ...] = ()
    """Shares of neurons to sweep over; none takes `AROUND` the one that was chosen."""
    false_alarms: tuple[float, ...] = FALSE_ALARMS
    """False positive rates to sweep over, for methods that judge prompts."""
    strengths: tuple[float, ...] = STRENGTHS
    """Strengths of a trained update to sweep over."""
    answers: int = 0
    """Questions of each question-answer corpus to answer."""
    memorization: int = 0
    """Questions of each question-answer corpus whose true answers' probabilities are measured."""
    dtype: str = "float32"
    """Of the model's weights, or "auto"."""
    device_map: str | None = None
    """How a model that does not fit one device is spread: "auto", "balanced", ..."""
    device: str | None = None
    """Where the model runs; None takes a GPU if there is one."""
    revision: str | None = None
    """A branch, tag or commit of a model on the hub."""
    trust_remote_code: bool = False
    """Whether to run the code that comes with a model."""
    dictionary: str | None = None
    """A sparse autoencoder, whose features are the neurons of the site `sae`."""
    test_tokens: int | None = None
    """Tokens to test on, of each corpus; None takes as many as put its accuracy within 3 points, and `tokens` at most."""
    facts: bool = False
    """Whether forget is a list of memorized facts: fitted, tuned and tested on whole, while retain is split."""

    @property
    def loading(self) -> dict[str, Any]:
        """How the model is loaded: options of `load_model`."""
        names = ("dtype", "device", "device_map", "revision", "trust_remote_code", "dictionary")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        """Refuse what can be refused before a model is loaded."""
        if not self.methods:
            raise LensUnlearnError(f"no method was named: choose from {', '.join(methods.names())}")
        for method in self.methods:
            check_name(methods.by_name(method).name, "a method", taken=("kept", "report"))
        if not self.retain:
            raise LensUnlearnError("there is nothing to retain: give a source of texts that are to be retained")
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in NUMBERS and not (value is None and one.default is None):
                NUMBERS[one.name].check(value, one.name)
        if self.deal and self.memorization:
            raise LensUnlearnError(
                "--deal-controls shares the test documents among the controls, and --memorization looks for every answer under "
                "each of them: leave out one of both"
            )
        if self.dtype != AUTO:
            dtype_of(self.dtype)
        for name in ("fractions", "false_alarms", "strengths"):
            for value in getattr(self, name):
                STRENGTH.check(value, name)
        for key in self.settings:
            self._check_setting(key)
        for name in self.also:
            if name in ("forget", "retain", "") or any(c in name for c in "/@:=,"):
                raise LensUnlearnError(f"{name!r} cannot name a corpus: use letters, and not 'forget' or 'retain'")
        if self.forget in self.retain:
            raise LensUnlearnError(
                f"forget and retain are the same text ({self.forget}): nothing could tell them apart"
            )
        given = {"template": self.template, "answer_eos": self.answer_eos or None, "prepend_bos": self.prepend_bos}
        if self.chat and (others := [f"--{n.replace('_', '-')}" for n, value in given.items() if value is not None]):
            raise LensUnlearnError(f"{others[0]} cannot be given with --chat: the chat template says it; leave it out")
        if self.system is not None and not self.chat:
            raise LensUnlearnError(
                "--system is the system's turn of conversations: give --chat as well, or leave it out"
            )
        if self.facts and self.test_forget:
            raise LensUnlearnError(
                "--facts tests on the facts of --forget themselves: leave out --test-forget, or measure it as --also NAME=SRC"
            )
        if not self.facts and bool(self.test_forget) != bool(self.test_retain):
            raise LensUnlearnError("test sources come in pairs: give both --test-forget and --test-retain, or neither")

    def _check_setting(self, key: str) -> None:
        method, _, option = key.rpartition(".")
        if method and method not in self.methods:
            raise LensUnlearnError(
                f"the setting {key!r}: {method!r} is not a method of this run ({', '.join(self.methods)})"
            )
        known = {name: option_names(name) for name in ([method] if method else self.methods)}
        if not any(option in names for names in known.values()):
            choices = ", ".join(sorted({name for names in known.values() for name in names}))
            raise LensUnlearnError(
                f"the setting {key!r}: no method of this run has such an option: choose from {choices}"
            )

    @property
    def deals(self) -> bool:
        """Whether the controls of a method share the test documents."""
        several = len(self.methods) > 1 and self.controls >= DEALT
        return several and not self.memorization if self.deal is None else self.deal

    @property
    def protocol(self) -> str:
        """What is fitted, tuned and tested on which texts, in a sentence or two, as `run.json` and the page say it."""
        return FACTS if self.facts else SKILL

    @property
    def records(self) -> dict[str, Method]:
        """The methods by name."""
        return {name: methods.by_name(name) for name in self.methods}

    def strengths_of(self, method: str, chosen: Any = None) -> tuple[float, ...]:
        """Return the strengths to sweep a method over: as set here for its kind of strength, else the method's own grid.

        Args:
            method: Its name.
            chosen: The strength that it was used with. Shares of neurons are swept around it, unless `fractions` says which.
        """
        record = methods.by_name(method)
        grids = {"false_alarms": self.false_alarms, "strength": self.strengths}
        if record.strength == "fraction":
            near = isinstance(chosen, int | float) and not isinstance(chosen, bool)
            return self.fractions or (tuple(m * chosen for m in AROUND if m * chosen <= 1) if near else record.grid)
        return grids.get(record.strength, record.grid)

    def require_options(self) -> None:
        """Refuse options that a method would refuse, before a model is loaded.

        Raises:
            LensUnlearnError: If one cannot be; the message names it.
        """
        for name, record in self.records.items():
            record.require(self.as_given(name))

    def as_given(self, method: str) -> dict[str, Any]:
        """Return the options of a method, without the strength where that is tuned."""
        options = self.options(method)
        if self.retain_drop is not None:
            options.pop(methods.by_name(method).strength, None)
        return options

    def options(self, method: str) -> dict[str, Any]:
        """Return a method's options: what its name fixes, then what was set."""
        chosen = dict(methods.by_name(method).settings)
        for key, value in self.settings.items():
            owner, _, option = key.rpartition(".")
            if option in option_names(method) and owner in ("", method):
                chosen[option] = value
        return chosen


def command_of(plan: Plan) -> str:
    """Return the command that carries out a plan.

    Examples:
        >>> command_of(Plan("demo", "demo:python", ("demo:english",), settings={"fraction": 0.1}, tokens=500))
        'lens-unlearn run --model demo --forget demo:python --retain demo:english --set fraction=0.1 --tokens 500 --out again'
    """
    words = ["lens-unlearn", "run"]
    for one in fields(plan):
        value, option = getattr(plan, one.name), f"--{_CALLED.get(one.name, one.name).replace('_', '-')}"
        if value == one.default:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif one.name in _SEVERAL:
            each = [f"{key}={_as_text(given)}" for key, given in value.items()] if isinstance(value, dict) else value
            words += [word for given in each for word in (option, given)]
        else:
            text = _as_text(value) if isinstance(value, tuple) else str(value)
            words += [option, text.replace("\n", "\\n")]
    return shlex.join([*words, "--out", "again"])


def _as_text(value: Any) -> str:
    """Write an option's value as `--set` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(_as_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def option_names(method: str) -> list[str]:
    """Return the options of a method that `--set` can give."""
    return [name for name in methods.by_name(method).options if name not in DECIDED_BY_THE_RUN]


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return a plan as `run.json` keeps it.

    Fields that came later are left out where they have their default: without them a plan is that of an earlier run.
    """
    kept = {one.name: getattr(plan, one.name) for one in fields(plan)}
    later = {one.name: one.default for one in fields(plan) if one.name not in _FIRST}
    return json.loads(json.dumps({n: v for n, v in kept.items() if n not in later or v != later[n]}, default=str))
