"""Text that is not to be trusted, made visible: controls, marks that reverse what follows, and half surrogate pairs."""

import unicodedata

__all__ = ["code_point", "is_hidden", "visible"]


def visible(text: str, keep: str = "\n\t") -> str:
    """Write every hidden character as its code point, such as ``[U+001B]``, but for those to be kept."""
    return "".join(code_point(one) if one not in keep and is_hidden(one) else one for one in text)


def code_point(character: str) -> str:
    """Write a character as its code point."""
    return f"[U+{ord(character):04X}]"


def is_hidden(character: str) -> bool:
    """Say whether a character is a control, reverses text, or is no character at all; joiners, which emoji need, are kept."""
    kind = unicodedata.category(character)
    # Of the format characters, those with a direction of their own reverse text; zero-width joiners are neutral ("BN").
    reverses = kind == "Cf" and unicodedata.bidirectional(character) not in ("BN", "ON")
    return reverses or kind in ("Cc", "Cs", "Zl", "Zp") or character in "\u200b\ufeff"
