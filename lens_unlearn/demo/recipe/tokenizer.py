"""The demo's tokenizer: byte-level BPE over its own corpora, digits one by one.

Knows texts; knows nothing of what they are trained into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 2048


def train_tokenizer(texts: Iterable[str], context: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Args:
        texts: What to learn the merges from.
        context: The longest input of the model, in tokens.

    Returns:
        A tokenizer whose one special token, with index 0, begins and ends every document.
    """
    tokenizer = Tokenizer(models.BPE())
    # Single digits make carrying something that a small model can learn.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=context)


def balanced(corpora: Iterable[list[str]], characters: int) -> Iterator[str]:
    """Yield evenly spaced documents of each corpus, about so many characters of each.

    There is several times more code than prose to read; without this the merges would be code's.
    """
    for texts in corpora:
        every = max(1, sum(map(len, texts)) // characters)
        yield from texts[::every]
