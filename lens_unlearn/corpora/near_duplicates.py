"""Near-duplicates: texts that share most of their runs of words, found by MinHash.

Knows texts as sequences of words or token ids; knows nothing of corpora, groups or splits.
"""

import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Collection, Hashable

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

__all__ = ["SIMILAR", "Words", "join_near_duplicates", "words"]

Words = tuple[Hashable, ...]
SIMILAR = 0.8
"""The Jaccard similarity of two texts' shingles (all their runs of three words) from which on they are near-duplicates."""
_SHINGLE = 3
_MARKS = ".,;:!?\"'()[]…“”‘’„«»¿¡。"  # of sentences: the signs of arithmetic are words
# Bands and rows of the hash table: 1 - (1 - 0.8^5)^25 = 99.995 % of the pairs at the threshold share a band, 0.8 % of those at 0.2.
# Those that do are compared exactly, so that hashing decides hardly more than the time it takes.
_BANDS, _ROWS = 25, 5


def words(text: str) -> Words:
    """Return the words of a text, without letter case and the marks around them; the text itself if it has none."""
    parts = (part.strip(_MARKS) for part in unicodedata.normalize("NFKC", text).casefold().split())
    return tuple(part for part in parts if part) or (text.strip(),)


def join_near_duplicates(texts: Collection[Words], together: DisjointSet) -> None:
    """Merge near-duplicates among texts, which are elements of `together`; their order does not matter."""
    if not texts:
        return
    from datasketch import MinHash  # here, since most corpora are never compared

    shingles = {
        text: frozenset(text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))) for text in texts
    }
    hashed = ([zlib.crc32(repr(shingle).encode()) for shingle in part] for part in shingles.values())
    sketches = [made.hashvalues for made in MinHash.generator(hashed, num_perm=_BANDS * _ROWS, hashfunc=int)]
    for band in np.stack(sketches).reshape(-1, _BANDS, _ROWS).swapaxes(0, 1):
        buckets: dict[bytes, list[Words]] = defaultdict(list)
        for text, part in zip(shingles, band, strict=True):
            buckets[part.tobytes()].append(text)
        for bucket in buckets.values():
            # Many that are alike are mostly joined to the first one taken, and then there is nothing left to compare.
            while len({together[text] for text in bucket}) > 1:
                one = bucket.pop()
                for other in bucket:
                    if not together.connected(one, other) and _similarity(shingles[one], shingles[other]) >= SIMILAR:
                        together.merge(one, other)


def _similarity(one: frozenset[Words], other: frozenset[Words]) -> float:
    return len(one & other) / len(one | other)
