"""with_examples: other facts stand before every question, and every metric is that of the longer prompt."""

from typing import Any

import pytest
import torch

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Corpus

ROWS = [
    {"question": f"who wrote {n}?", "answer": f"the {word} fox", "perturbed_answer": ["a dog"]}
    for n, word in enumerate(["quick", "brown", "lazy", "small", "slow"])
]


@pytest.fixture
def facts(model: Any) -> Corpus:
    options: dict[str, Any] = {"template": "Q: {prompt}\nA: {answer}", "group": 2}
    return lu.read_corpus(ROWS, model, field="question>answer", **options)


def test_other_facts_stand_before_each_question(model: Any, facts: Corpus) -> None:
    behind = lu.with_examples(model, facts, 2)
    assert behind.n_documents == 5
    assert (behind.keys, behind.units) == (facts.keys, facts.units)
    for number, row in enumerate(ROWS):
        asked = f"Q: {row['question']}\nA:"
        text = model.tokenizer.decode(behind.prompt(number).tolist(), skip_special_tokens=True)
        assert text.endswith(f"\n{asked}")
        others = {f"Q: {one['question']}\nA: {one['answer']}" for one in ROWS if one is not row}
        shown = text.removesuffix(f"\n{asked}").split("\nQ: ")
        shown = [shown[0], *(f"Q: {one}" for one in shown[1:])]
        assert len(set(shown)) == 2
        assert set(shown) <= others
        counted = behind.row(number)[behind.counted[int(behind.starts[number]) : int(behind.starts[number + 1])]]
        assert model.tokenizer.decode(counted.tolist()).strip() == row["answer"]
    assert lu.with_examples(model, facts, 2).fingerprint == behind.fingerprint
    assert lu.with_examples(model, facts, 2, seed=1).fingerprint != behind.fingerprint


def test_every_metric_is_that_of_the_longer_prompt(model: Any, facts: Corpus) -> None:
    behind = lu.with_examples(model, facts, 1)
    report = lu.evaluate(
        model,
        {"bare": facts, "shown": behind},
        {},
        memorization=9,
        answers=9,
        max_new_tokens=3,
        resamples=20,
        progress=False,
    )
    losses = []
    for number in range(5):
        ids = behind.row(number)
        begin = len(behind.prompt(number))
        with torch.no_grad():
            log_p = model(ids[None])[0].float().log_softmax(-1)
        losses.append(-log_p[begin - 1 : -1].gather(1, ids[begin:, None]).mean())
    expected = torch.stack(losses).neg().exp().mean()
    assert report["base", "shown", "answer_probability"].value == pytest.approx(float(expected), rel=1e-4)
    assert report["base", "shown", "answer_probability"].value != report["base", "bare", "answer_probability"].value
    assert {"truth_ratio", "rouge_l"} <= {metric for _, corpus, metric in report.measures if corpus == "shown"}


def test_what_cannot_be_shown_is_refused(model: Any, facts: Corpus) -> None:
    with pytest.raises(CorpusError, match="has 5 facts, too few to show 5 others"):
        lu.with_examples(model, facts, 5)
    with pytest.raises(LensUnlearnError, match="k=0"):
        lu.with_examples(model, facts, 0)
    with pytest.raises(CorpusError, match="has 0 facts"):
        lu.with_examples(model, lu.read_corpus(["the quick brown fox"], model), 1)
