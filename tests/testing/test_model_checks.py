"""The battery for models: it passes where all is well, and finds each fault that is put into a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import lens_unlearn as lu
from lens_unlearn.cli import app
from lens_unlearn.core.errors import ModelError
from lens_unlearn.model.host import host_version
from lens_unlearn.testing import ModelChecks, check_model
from lens_unlearn.testing.outcomes import Row


def found(checks: ModelChecks, check: str, what: str = "") -> Row:
    return next(row for row in checks.rows if (row.check, row.what) == (check, what))


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gpt2-compat", "llama-compat", "mixtral", *tiny.NATIVE, *tiny.HOOKED]
)
def test_what_is_as_it_should_be_passes(name: str) -> None:
    model = tiny.speaking(name) if name in tiny.SPEAKING else tiny.model(name)
    before, logits = tiny.hooks_of(model), tiny.logits(model)
    checks = check_model(model)
    assert not checks.failed, str(checks)
    assert tiny.hooks_of(model) == before
    assert torch.equal(tiny.logits(model), logits)
    outcomes = checks.outcomes()
    assert outcomes["ablation of attn.z"] == outcomes["sums of attention"] == outcomes["restoration"] == "works"
    assert outcomes["effect of attention"] == "works" or name in tiny.NATIVE
    assert outcomes["ablation of experts.post" if name == "mixtral" else "ablation of mlp.post"] == "works"


def test_a_reference_of_ones_own_is_compared_with() -> None:
    right, wrong = tiny.hugging_face("gpt2"), tiny.hugging_face("gpt2", seed=5)
    for name in ("gpt2", "gpt2-compat"):
        assert found(check_model(tiny.model(name), reference=right), "logits").outcome == "works"
        failed = found(check_model(tiny.model(name), reference=wrong), "logits")
        assert failed.outcome == "fails"
        assert failed.words.startswith("they differ by ")
    assert found(check_model(tiny.model("gpt2-compat")), "logits").outcome == "absent"


def test_what_a_model_does_not_have_says_why() -> None:
    checks = check_model(families.bridge("lfm2-moe"))
    assert found(checks, "site", "mlp.post").words == "24 in layer 0"
    assert found(checks, "site", "attn.z").words == "4 x 4 in layer 1"
    mamba = check_model(families.bridge("mamba"))
    assert found(mamba, "site", "attn.z").words == "no layer has it; layer 0 is a MambaBlock"
    assert not mamba.failed
    assert found(mamba, "restoration").outcome == "works"
    youtu = check_model(families.bridge("youtu"))
    assert found(youtu, "site", "attn.q").outcome == "absent"
    assert "no axis of positions" in found(youtu, "site", "attn.q").words


@pytest.mark.skipif(not host_version().startswith("3."), reason="TransformerLens 4 gets them right")
@pytest.mark.parametrize(("name", "check"), [(n, c) for n, c in families.WRONG_IN_3.items() if c != "any"])
def test_what_transformer_lens_gets_wrong_is_found(name: str, check: str) -> None:
    assert check in [row.check for row in check_model(families.bridge(name)).failed]


@contextmanager
def hooked(module: nn.Module, hook: Any, *, before: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def model() -> Any:
    return families.bridge("llama")


def test_a_map_that_does_not_get_what_is_at_its_site_is_found(model: Any) -> None:
    linear = model.blocks[1].mlp.out.original_component
    with hooked(linear, lambda module, args: (args[0] + 1,), before=True):
        assert [row.check for row in check_model(model).failed] == ["statistics", "ablation"]


def test_patterns_that_do_not_sum_to_one_or_look_ahead_are_found(model: Any) -> None:
    model.blocks[0].attn.hook_pattern.add_hook(lambda x, hook: x / 2)
    assert found(check_model(model), "sums", "attention").words == "patterns sum to 0.5 to 1, not to one"
    model.reset_hooks()
    model.blocks[1].attn.hook_pattern.add_hook(lambda x, hook: torch.ones_like(x) / x.shape[-1])
    assert found(check_model(model), "sums", "attention").words.startswith("layer 1 attends to later positions")


def test_a_site_that_the_model_goes_past_is_found(model: Any) -> None:
    clean: list[Tensor] = []
    linear = model.blocks[1].attn.o.original_component
    with (
        hooked(model.blocks[1].attn.o.hook_in, lambda module, args: clean.append(args[0]), before=True),
        hooked(linear, lambda module, args: (clean.pop().reshape(args[0].shape),), before=True),
    ):
        failed = found(check_model(model), "ablation", "attn.z")
        assert failed.outcome == "fails"
        assert "those of the edited weights" in failed.words or "no effect" in failed.words


def test_a_model_that_changes_itself_is_found(model: Any) -> None:
    weight, calls = model.blocks[0].mlp.out.original_component.weight, []

    def drift(module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) > 6:
            weight.data += 1e-4

    with hooked(model.blocks[0], drift):
        assert "restoration" in [row.check for row in check_model(model).failed]


def test_a_cache_that_is_at_fault_is_said_to_be(model: Any) -> None:
    checks = check_model(families.bridge("bamba"))  # that of transformers 5.23
    assert found(checks, "generation").words.endswith("without any intervention: the cache is at fault")
    assert checks.summary() == "1 of 18 checks of BambaForCausalLM failed: generation"
    model.tokenizer = None
    assert found(check_model(model), "generation").outcome == "absent"


def test_it_shows_itself() -> None:
    checks = ModelChecks("m<b>", (Row("site", "attn.z", "works", "4 x 8"), Row("logits", "", "fails", "a\x1b[2J <i>")))
    assert str(checks).splitlines()[0] == "✓ site of attn.z  4 x 8"
    assert "\x1b" not in str(checks)
    assert "<i>" not in checks._repr_html_()
    assert "&lt;i&gt;" in checks._repr_html_()
    assert "<td" in checks._repr_html_()
    assert list(checks.to_frame()["outcome"]) == ["works", "fails"]
    assert checks.failed == (checks.rows[1],)


def test_what_is_no_model_is_refused(model: Any) -> None:
    for other in (tiny.hugging_face("gpt2"), None, "gpt2"):
        with pytest.raises(ModelError, match="has no hook points"):
            check_model(other)
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        check_model(model)


def test_the_command_prints_the_table_and_says_by_its_exit_code_whether_something_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for outcome, code in (("works", 0), ("absent", 0), ("fails", 1)):
        checks = ModelChecks("tiny", (Row("logits", "", outcome, "so"),))  # type: ignore[arg-type]
        monkeypatch.setattr(lu, "load_model", lambda *args, **options: None)
        monkeypatch.setattr(lu, "check_model", lambda model, checks=checks: checks, raising=False)
        result = CliRunner().invoke(app, ["check", "demo"])
        assert result.exit_code == code
        assert "logits" in result.output
