"""Facts about invented persons, in the manner of TOFU: a model can only memorize them."""

from __future__ import annotations

import random
from typing import NamedTuple

from lens_unlearn.demo._split import unit, words

FORGET, RETAIN, HOLDOUT = 8, 72, 16
TEMPLATE = "Q: {question}\nA: {answer}"
PERTURBED = 4

FIRST_NAMES = words(
    "Aldric Amira Basile Belinka Cosmo Damaris Edvina Emeric Fenella Florian Galina Gideon Hadley Ilka Ingram "
    "Jorund Kalista Kester Leopold Lorcan Mirela Morwen Nadir Nerissa Oriel Osric Petra Quillon Ravenna "
    "Roderic Saskia Severin Talia Tobiah Ulrica Vasco Wilmot Xanthe Yorick Zelda"
)
NAME_STARTS = words("Bar Cal Dor Fen Gar Hal Jar Kor Lan Mel Nor Pel Quin Ros Sar Tal Ul Ven Wes Zan")
NAME_ENDS = words("bury dell dreth fax gard holt kin lund mere nick quist rath sby thorn velt wick")
TOWN_STARTS = words("Ash Bel Cor Dun El Fair Glen Har Is Kal Lor Mar Nev Or Pen Rin Sil Tor Vel Wyn")
TOWN_ENDS = words("aven bridge cliff dale ford gate ham mora port wold")
PROFESSIONS = words(
    "baker beekeeper blacksmith bookbinder botanist brewer carpenter cartographer chemist clockmaker cobbler "
    "composer diver falconer ferryman gardener geologist glassblower goldsmith jeweller judge librarian mason "
    "midwife miller milliner notary painter perfumer physician pilot potter puppeteer sailor sculptor "
    "shepherd surveyor tailor translator watchmaker weaver zoologist"
)
INSTRUMENTS = words(
    "accordion bagpipes banjo bassoon bugle celesta cello clarinet concertina cornet dulcimer fiddle flute "
    "glockenspiel guitar harmonica harp harpsichord lute lyre mandolin marimba oboe organ piano piccolo "
    "recorder saxophone sitar spinet tambourine theorbo trombone trumpet tuba ukulele viola violin xylophone "
    "zither"
)
TITLE_QUALITIES = words(
    "Silent Golden Hidden Broken Crimson Distant Empty Frozen Gentle Hollow Iron Last Lost Pale Restless "
    "Secret Sleeping Stolen Wandering Winter"
)
TITLE_NOUNS = words(
    "Orchard Lantern Harbour Mirror Staircase Garden Letter Compass Island Clock River Museum Bell Bridge "
    "Feather Kingdom Map Needle Painter Window"
)


class Question(NamedTuple):
    """One thing asked about every person, in two wordings."""

    attribute: str
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str


QUESTIONS = (
    Question(
        "birthplace",
        "Where was {name} born?",
        "They were born in {value}.",
        "What is the birthplace of {name}?",
        "Their birthplace is {value}.",
    ),
    Question(
        "year",
        "In which year was {name} born?",
        "The year was {value}.",
        "What is the birth year of {name}?",
        "They were born in the year {value}.",
    ),
    Question(
        "profession",
        "What does {name} do for a living?",
        "They work as a {value}.",
        "What is the profession of {name}?",
        "By profession they are a {value}.",
    ),
    Question(
        "instrument",
        "Which instrument does {name} play?",
        "They play the {value}.",
        "What instrument can {name} be heard on?",
        "Their instrument is the {value}.",
    ),
    Question(
        "book",
        "What is the title of the book by {name}?",
        "It is called {value}.",
        "Which book did {name} write?",
        "They wrote {value}.",
    ),
)


def facts(group: str, split: str) -> list[dict[str, object]]:
    """Return the facts about one group of persons.

    Args:
        group: ``facts``, ``facts_forget``, ``facts_retain`` or ``facts_holdout``.
        split: ``train`` for all questions, ``dev`` and ``test`` for two halves of them.

    Returns:
        One record for each person and question.
    """
    bounds = {
        "facts_forget": (0, FORGET),
        "facts_retain": (FORGET, FORGET + RETAIN),
        "facts": (0, FORGET + RETAIN),
        "facts_holdout": (FORGET + RETAIN, FORGET + RETAIN + HOLDOUT),
    }
    begin, end = bounds[group]
    records = [_record(name, question) for name in _names()[begin:end] for question in QUESTIONS]
    return [record for record in records if split in ("train", _half(record))]


def _half(record: dict[str, object]) -> str:
    """Name the half of a fact. Halves of a person's questions, so that both halves know every person."""
    order = sorted(QUESTIONS, key=lambda question: unit(f"half:{record['person']}:{question.attribute}"))
    position = [question.attribute for question in order].index(str(record["attribute"]))
    # Five questions do not halve: every other person has three in dev.
    in_dev = 2 + (unit(f"half:{record['person']}") < 0.5)
    return "dev" if position < in_dev else "test"


def _names() -> list[str]:
    """Return the names of all persons, the same on every machine; no two share a family name."""
    rng = random.Random("people names")
    families = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    count = FORGET + RETAIN + HOLDOUT
    return [f"{rng.choice(FIRST_NAMES)} {family}" for family in rng.sample(families, count)]


def _values(attribute: str) -> list[str]:
    """Return every value that an attribute can take."""
    if attribute == "birthplace":
        return [start + end for start in TOWN_STARTS for end in TOWN_ENDS]
    if attribute == "year":
        return [str(year) for year in range(1900, 2000)]
    if attribute == "book":
        return [f"The {quality} {noun}" for quality in TITLE_QUALITIES for noun in TITLE_NOUNS]
    return PROFESSIONS if attribute == "profession" else INSTRUMENTS


def _record(name: str, question: Question) -> dict[str, object]:
    rng = random.Random(f"fact:{name}:{question.attribute}")
    value, *others = rng.sample(_values(question.attribute), 1 + PERTURBED)
    asked, answer = question.question.format(name=name), question.answer.format(value=value)
    return {
        "text": TEMPLATE.format(question=asked, answer=answer),
        "source": name,
        "question": asked,
        "answer": answer,
        "person": name,
        "attribute": question.attribute,
        "value": value,
        "paraphrased_question": question.paraphrased_question.format(name=name),
        "paraphrased_answer": question.paraphrased_answer.format(value=value),
        # As in TOFU: wrong answers have the wording of the paraphrase that they are compared with.
        "perturbed_answer": [question.paraphrased_answer.format(value=other) for other in others],
    }
