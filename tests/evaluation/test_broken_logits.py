"""Logits that are no numbers: an error of the model that names the layer, and NaN where an edit makes them."""

import math
from typing import Any

import pytest
import tiny
import torch
from interventions_helpers import final
from positions_helpers import ids

from lens_unlearn.core.errors import ActivationError
from lens_unlearn.corpora.reading import read_corpus
from lens_unlearn.evaluation.evaluate import evaluate
from lens_unlearn.evaluation.generation import continue_rows, generate
from lens_unlearn.inspection.token_values import token_losses

PROMPTS = ["the quick brown", "the slow", "1 + 2"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.speaking("gpt2")


@pytest.fixture
def broken() -> Any:
    """A model whose second layer overflows at one position of a text."""
    model = tiny.build("gpt2", tokenizer=tiny.speaking("gpt2").tokenizer)
    with torch.no_grad():
        model.blocks[1].mlp.out.weight[3] = float("nan")
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused_naming_the_layer(model: Any, broken: Any, temperature: float) -> None:
    corpus = read_corpus([{"q": "the quick", "a": "brown fox"}] * 2, broken, field="q>a")
    tiny.logits(broken)  # TransformerLens adds its own hooks at the first pass
    hooks = tiny.hooks_of(broken)
    options: dict[str, Any] = {"progress": False, "resamples": 5}
    for run in (
        lambda: generate(broken, PROMPTS, temperature=temperature),
        lambda: evaluate(broken, {"c": corpus}, {}, **options),
        lambda: evaluate(broken, {"c": corpus}, {}, answers=1, **options),
        lambda: evaluate(broken, {"c": corpus}, {}, memorization=1, **options),
        lambda: token_losses(broken, "the quick brown", progress=False),
    ):
        with pytest.raises(ActivationError, match=r"NaN or infinite: .* layer 1, at .*mlp") as caught:
            run()
        assert tiny.hooks_of(broken) == hooks
        assert str(caught.value).count("\n") == 0


def test_an_edit_that_breaks_the_model_is_nan_in_every_metric_and_refused_in_generate(model: Any) -> None:
    edit = final(float("nan"))
    corpus = read_corpus([{"q": "the quick", "a": "brown fox"}] * 2, model, field="q>a")
    report = evaluate(model, {"c": corpus}, {"edit": edit}, answers=2, progress=False, resamples=5)
    assert math.isnan(report["edit", "c", "loss"].value)
    assert math.isnan(report["edit", "c", "exact_match"].value)
    assert not math.isnan(report["base", "c", "exact_match"].value)
    with pytest.raises(ActivationError, match="NaN or infinite"):
        generate(model, "the quick", intervention=edit)


def test_one_broken_row_leaves_the_others_of_its_batch_as_they_are(model: Any) -> None:
    rows = [ids(model, prompt) for prompt in ("the slow", "1 + 2")]
    assert len(rows[0]) == len(rows[1]), "they are run together"
    base = continue_rows(model, rows, max_new_tokens=4)
    point = model.hook_dict["blocks.0.hook_resid_pre"]
    point.add_hook(lambda x, hook: torch.cat([x[:1] * float("nan"), x[1:]]) if len(x) == 2 else x)
    try:
        found = continue_rows(model, rows, max_new_tokens=4)
    finally:
        point.remove_hooks()
    assert [one.broken for one in found] == [True, False]
    assert found[1] == base[1]
    assert found[0].text == ""
