"""The tokens that are no text: what stands before one, what ends one, and how ids become text and text ids.

Knows tokenizers as Hugging Face has them, and what TransformerLens does to them; knows nothing of corpora or of what is written.
"""

# Whether a text begins with BOS decides the position, and often the activations, of everything in it. It has to be so as in
# training, and the tokenizer is what says how that was: by adding one itself (Llama, Gemma, OPT). Of tokenizers that do not, those
# whose BOS also ends texts have one document after another in training, so that it stood before each (GPT-2, Pythia); any other
# is a token of something else, such as of chats (SmolLM2's `<|im_start|>`), and the model never saw a plain text behind it.
#
# TransformerLens loads every tokenizer with `add_bos_token=True`, and gives BOS and EOS to those that have none: EOS as BOS, and a
# new token as EOS, whose id is beyond the embedding. So what the tokenizer itself does has to be read from where it came.

import os
from collections.abc import Sequence
from typing import Any

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.model.host import Model, require_model

__all__ = [
    "adds_bos_itself",
    "bos_token",
    "encode",
    "end_token",
    "ends_of_a_text",
    "note_bos",
    "special_tokens",
    "tokenizer_of",
    "written_after",
]


def tokenizer_of(model: Model, use: str = "texts cannot be read") -> Any:
    """Return the tokenizer of a model.

    Raises:
        CorpusError: If it has none.
        ModelError: If this is no model.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        require_model(model)
        raise CorpusError(
            f"this model has no tokenizer: {use}; set one, as in load_model or boot_transformers(tokenizer=...)"
        )
    return tokenizer


def bos_token(model: Model, prepend_bos: bool | None = None) -> int | None:
    """Return the token that every text begins with, or None: the one place where that is decided.

    Args:
        model: With a tokenizer.
        prepend_bos: As the user wants it. Default: where the tokenizer itself adds BOS, or has one that is its end-of-text
            token as well.

    Raises:
        CorpusError: If BOS is wanted, and the tokenizer has none.
    """
    tokenizer = tokenizer_of(model)
    own = _own(model, tokenizer, "bos")
    if prepend_bos is None:
        prepend_bos = own is not None and (own == _own(model, tokenizer, "eos") or _adds_bos(tokenizer, own))
    if prepend_bos and own is None:
        raise CorpusError("prepend_bos=True, but this tokenizer has no BOS token")
    return own if prepend_bos else None


def end_token(model: Model) -> int | None:
    """Return the tokenizer's end-of-text token; None if there is none that the model knows."""
    return _own(model, getattr(model, "tokenizer", None), "eos")


def ends_of_a_text(model: Model) -> set[int]:
    """Return every token that ends a text: of the tokenizer, of the model's configuration, and of its generation configuration.

    The last may name several, such as the end of a turn beside that of a text.
    """
    inner = getattr(model, "original_model", None)
    owners = [model.cfg, getattr(inner, "generation_config", None)]
    named = [end_token(model), *(getattr(owner, "eos_token_id", None) for owner in owners)]
    ends = {int(end) for ids in named if ids is not None for end in ([ids] if isinstance(ids, int) else ids)}
    return {end for end in ends if end < int(model.cfg.d_vocab)}


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the ids of tokens that are no text: beginnings, ends, padding, the marks of a chat.

    The token for unknown text is not among them, since it stands for text; but it is where it is one of these as well, or where the
    tokenizer reads every text (by bytes) and has that name for another one, as SmolLM2 for its `<|endoftext|>`.
    """
    known = getattr(tokenizer, "_lens_unlearn_special", None)
    if known is None:
        roles = ("bos", "eos", "pad", "cls", "sep", "mask")
        named = {getattr(tokenizer, f"{role}_token_id", None) for role in roles}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marked = {id for id, token in added.items() if getattr(token, "special", False)} | set(
            tokenizer.all_special_ids
        )
        backend = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        reads_all = backend is not None and getattr(backend, "unk_token", None) is None
        text = set() if reads_all else {tokenizer.unk_token_id}
        known = frozenset(int(id) for id in named | (marked - text) if id is not None)
        tokenizer._lens_unlearn_special = known
    return known


def encode(tokenizer: Any, text: str, bos: int | None) -> list[int]:
    """Return the ids of a text, behind BOS if one is given: once, also where the text writes it itself."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def written_after(tokenizer: Any, before: Sequence[int], after: Sequence[int]) -> str:
    """Return the text of tokens that stand behind others, without special tokens.

    Not what they decode to alone: tokenizers such as Llama's drop the space in front of a text's first word, and a character may
    begin in the tokens before.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    known, whole = decode(before), decode([*before, *after])
    return whole[len(os.path.commonprefix([known, whole])) :]


def _own(model: Model, tokenizer: Any, role: str) -> int | None:
    """Return the token of a role, if the tokenizer itself has one, and the model an embedding of it."""
    id = getattr(tokenizer, f"{role}_token_id", None)
    if id is None or id >= int(model.cfg.d_vocab):
        return None
    given = getattr(tokenizer, "init_kwargs", {})
    lent = id == tokenizer.eos_token_id if role == "bos" else id >= tokenizer.vocab_size
    return None if lent and given and given.get(f"{role}_token") is None else int(id)


def _adds_bos(tokenizer: Any, bos: int) -> bool:
    """Whether a tokenizer adds BOS itself, and not because TransformerLens asked it to."""
    known = getattr(tokenizer, "_lens_unlearn_adds_bos", None)
    if known is None:
        given = getattr(tokenizer, "init_kwargs", {})
        known = _begins_with(tokenizer, bos)
        if known and "add_bos_token" in given:
            try:
                plain = type(tokenizer).from_pretrained(tokenizer.name_or_path, local_files_only=True)
            except Exception:
                plain = tokenizer
            # It may not be where it came from any more, or have come from a GGUF file, beside which transformers makes up an empty
            # tokenizer: what it does now is all that is known then.
            plain = plain if len(plain) == len(tokenizer) else tokenizer
            known = _begins_with(plain, bos)
        tokenizer._lens_unlearn_adds_bos = known
    return known


def adds_bos_itself(tokenizer: Any) -> bool | None:
    """Whether a tokenizer begins texts with BOS; None if TransformerLens may have asked it to before, and a folder says more."""
    known = getattr(tokenizer, "_lens_unlearn_adds_bos", None)
    if known is not None:
        return known
    if "add_bos_token" in getattr(tokenizer, "init_kwargs", {}):
        return None
    return tokenizer.bos_token_id is not None and _begins_with(tokenizer, tokenizer.bos_token_id)


def note_bos(tokenizer: Any) -> None:
    """Note whether a tokenizer that was just read begins texts with BOS, before TransformerLens asks it to."""
    bos = tokenizer.bos_token_id
    tokenizer._lens_unlearn_adds_bos = bos is not None and _begins_with(tokenizer, bos)


def _begins_with(tokenizer: Any, bos: int) -> bool:
    return list(tokenizer("a")["input_ids"])[:1] == [bos]
