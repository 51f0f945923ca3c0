"""`with_examples`: the questions of a corpus behind other facts of it as examples, in the context.

Knows questions and answers; knows nothing of what is measured on them.
"""

import random
from dataclasses import replace

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.core.numbers import COUNT
from lens_unlearn.corpora.corpus import Corpus, require_corpus
from lens_unlearn.evaluation.teacher_forcing import with_answers
from lens_unlearn.model.host import Model, require_model

__all__ = ["with_examples"]


def with_examples(model: Model, corpus: Corpus, k: int, *, seed: int = 0) -> Corpus:
    r"""Put k other facts with their answers before every question of a corpus, each in its own template and on its own lines.

    What an edit hides from a bare question may come back behind examples. The result is a corpus like any other: give both to
    `evaluate` or `membership`, under two names. Wrong and paraphrased answers stand behind the same examples.

    Args:
        model: Whose tokenizer to use.
        corpus: Read as "question>answer".
        k: Examples before each question, drawn at random from the other facts.
        seed: Of the draw.

    Returns:
        The questions that fit the window with their examples, in their order; `skipped` says how many do not.

    Raises:
        CorpusError: If there are no more than k facts, none fits with its examples, or these are conversations.
        LensUnlearnError: If k is no such number.
    """
    require_model(model)
    require_corpus(corpus, "corpus").check(model)
    k = int(COUNT.check(k, "k"))
    if corpus.asked is not None:
        raise CorpusError(f"{corpus.name} holds conversations: write the examples as earlier turns of each")
    facts = [(place, answer) for place, answer in enumerate(corpus.answers) if answer is not None]
    if len(facts) <= k:
        raise CorpusError(
            f"{corpus.name} has {len(facts)} facts, too few to show {k} others before each: read it as 'question>answer', or ask "
            "for fewer"
        )
    asked = []
    for number, (_, answer) in enumerate(facts):
        drawn = random.Random(f"examples {seed} {number}").sample(range(len(facts) - 1), k)
        others = [facts[one + (one >= number)][1] for one in drawn]
        shown = "".join(f"{other.head}{other.text}{other.tail}\n" for other in others)
        asked.append(replace(answer, head=shown + answer.head))
    joined, fitting = with_answers(model, corpus, [(answer, answer.text) for answer in asked])
    places = [facts[number][0] for number in fitting]
    missing = len(facts) - len(fitting)
    return replace(
        joined,
        name=f"{corpus.name} behind {k} examples",
        keys=tuple(corpus.keys[place] for place in places),
        groups=tuple(corpus.groups[place] for place in places) if corpus.groups else (),
        answers=tuple(asked[number] for number in fitting),
        skipped={**corpus.skipped, "too long behind their examples": missing} if missing else corpus.skipped,
    )
