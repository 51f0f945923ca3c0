"""Esperanto from a small grammar: a second language whose texts are generated, not quoted.

The grammar has agreement of adjective and noun in number and case, three tenses, prepositions,
derived adverbs, subordinate clauses and correlatives. The roots are real, the sentences are correct,
and the meanings are as they fall.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from lens_unlearn.demo._split import split_of, words

BEINGS = words(
    "patr frat fil knab infan amik instruist kuracist laborist student najbar reg poet kantist vojaĝant "
    "kuirist maljunul gast verkist fiŝist hund kat ĉeval bird urs vulp kapr"
)
THINGS = words(
    "dom libr leter pom pan flor arb tabl seĝ pord fenestr ŝip roz lamp kant bild ĉapel mont ŝton ŝlosil sak "
    "nuks frukt kuk vest klav faden boat rakont"
)
PLACES = words(
    "urb vilaĝ ĝarden arbar kamp strat lernej merkat river lag mar pont ĉambr kuirej insul val stacidom "
    "bibliotek kastel plaĝ"
)
QUALITIES = words(
    "bel bon grand malgrand nov malnov jun alt long mallong ruĝ blu verd blank nigr fort varm malvarm feliĉ "
    "saĝ riĉ trankvil afabl modest rapid"
)
ACTIONS = words(
    "vid am trov port aĉet vend serĉ montr don lav pentr memor perd tuŝ bezon uz forges gard rigard ŝat admir ricev"
)
MOTIONS = words("ir ven kur naĝ marŝ vetur rajd flug loĝ dorm sid star rid kant dans labor parol ripoz")
THOUGHTS = words("sci kred dir pens esper aŭd rakont kompren")
MANNERS = words("rapid bel trankvil laŭt mallaŭt bon fort ĝoj facil zorg sekret oft")
PREPOSITIONS = words("en apud antaŭ malantaŭ sub super ĉirkaŭ trans ekster preter")
TIMES = (
    ("hieraŭ", "is"),
    ("antaŭ longe", "is"),
    ("iam", "is"),
    ("hodiaŭ", "as"),
    ("nun", "as"),
    ("ĉiutage", "as"),
    ("ofte", "as"),
    ("morgaŭ", "os"),
    ("baldaŭ", "os"),
    ("venontjare", "os"),
)
PRONOUNS = words("mi vi li ŝi ĝi ni ili")
TENSES = ("as", "is", "os")
DOCUMENTS = {"train": 3000, "dev": 150, "test": 150}


def documents(split: str) -> list[dict[str, object]]:
    """Return the documents of one split: four to ten sentences that occur in no other split."""
    rng = random.Random(f"esperanto documents {split}")
    sentences = _sentences(split)
    return [
        {
            "text": " ".join(next(sentences) for _ in range(rng.randint(4, 10))),
            "source": f"grammar {split} {index}",
        }
        for index in range(DOCUMENTS[split])
    ]


def _sentences(split: str) -> Iterator[str]:
    """Yield the grammar's sentences that belong to a split, in a fixed order."""
    rng = random.Random("esperanto sentences")
    while True:
        tense = rng.choice(TENSES)
        shape = rng.choices((_plain, _timed, _reported, _described, _joined), (5, 4, 3, 3, 2))[0]
        sentence = shape(rng, tense)
        sentence = f"{sentence[0].upper()}{sentence[1:]}."
        if split_of(f"sentence:{sentence}", dev=0.1, test=0.1) == split:
            yield sentence


def _plain(rng: random.Random, tense: str) -> str:
    return f"{_subject(rng)} {_predicate(rng, tense)}"


def _timed(rng: random.Random, tense: str) -> str:
    word, tense = rng.choice(TIMES)
    return f"{word} {_plain(rng, tense)}"


def _reported(rng: random.Random, tense: str) -> str:
    return f"{_subject(rng)} {rng.choice(THOUGHTS)}{tense}, ke {_plain(rng, rng.choice(TENSES))}"


def _described(rng: random.Random, tense: str) -> str:
    plural = rng.random() < 0.3
    noun = rng.choice(BEINGS + THINGS + PLACES)
    quality = rng.choice(("", "tre ", "ne ", "pli kaj pli ")) + _inflected(rng.choice(QUALITIES), "a", plural, False)
    return f"la {_inflected(noun, 'o', plural, False)} est{tense} {quality}"


def _joined(rng: random.Random, tense: str) -> str:
    link = rng.choice((" kaj ", ", sed ", ", ĉar ", ", dum "))
    return f"{_plain(rng, tense)}{link}{_plain(rng, tense)}"


def _predicate(rng: random.Random, tense: str) -> str:
    manner = f" {rng.choice(MANNERS)}e" if rng.random() < 0.3 else ""
    place = f" {_place(rng)}" if rng.random() < 0.45 else ""
    if rng.random() < 0.65:
        return f"{rng.choice(ACTIONS)}{tense}{manner} {_phrase(rng, THINGS + BEINGS, accusative=True)}{place}"
    return f"{rng.choice(MOTIONS)}{tense}{manner}{place or ' ' + _place(rng)}"


def _place(rng: random.Random) -> str:
    return f"{rng.choice(PREPOSITIONS)} {_phrase(rng, PLACES, accusative=False)}"


def _subject(rng: random.Random) -> str:
    return rng.choice(PRONOUNS) if rng.random() < 0.25 else _phrase(rng, BEINGS, accusative=False)


def _phrase(rng: random.Random, nouns: list[str], *, accusative: bool) -> str:
    """Return a noun phrase; the adjective agrees with the noun in number and case."""
    plural = rng.random() < 0.3
    determiner = rng.choice(("la", "la", "la", "mia", "nia", *(("multa", "kelka") if plural else ("ĉiu", ""))))
    # Every determiner but the article is inflected like an adjective.
    article = {"la": "la ", "": ""}.get(determiner, _inflected(determiner, "", plural, accusative) + " ")
    quality = f"{_inflected(rng.choice(QUALITIES), 'a', plural, accusative)} " if rng.random() < 0.45 else ""
    return f"{article}{quality}{_inflected(rng.choice(nouns), 'o', plural, accusative)}"


def _inflected(root: str, ending: str, plural: bool, accusative: bool) -> str:
    return f"{root}{ending}{'j' if plural else ''}{'n' if accusative else ''}"
