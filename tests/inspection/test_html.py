"""Coloured texts: everything is said, in order, escaped, with ink that can be read, and nothing is fetched."""

import html
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from plotly.colors import get_colorscale
from torch import Tensor

import lens_unlearn as lu
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.figures.texts import COLUMNS
from lens_unlearn.inspection.generations import Generations
from lens_unlearn.inspection.html import STEPS, Html, Scale, document, ink
from lens_unlearn.inspection.token_values import Text, TokenValues
from lens_unlearn.inspection.top_examples import Example, TopExamples

EVIL = "</span><script>alert('x')</script>\"&amp;<img src=x onerror=alert(1)>"
CODE = ["<bos>", "def", " f", "(x):\n", "\t", "", "", "🙂", "\n\n", "  ", EVIL, "日", "本"]
NAN = math.nan


class Reading(HTMLParser):
    """Reads HTML strictly: known tags that close in order, and no attribute but style and title."""

    VOID = ("meta",)

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.cells: list[tuple[str, str, str]] = []
        """Text, tooltip and style of every token."""
        self.words = ""
        self._cell: list[Any] | None = None
        self._mark = 0
        self.feed(document)
        self.close()
        assert not self.open, f"{self.open} is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "span", "b"), f"<{tag}>"
        given = dict(attrs)
        assert set(given) <= {"style", "title"}, given
        style = given.get("style") or ""
        assert "url(" not in style
        self.open.append(tag)
        if self._mark or "user-select:none" in style:
            self._mark += 1
        elif tag == "span" and given.get("title") and "padding:.14em" in style:
            self._cell = [len(self.open), "", given["title"], style]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"
        if self._mark:
            self._mark -= 1
        elif self._cell is not None and len(self.open) < self._cell[0]:
            self.cells.append(tuple(self._cell[1:]))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._cell is not None and not self._mark:
            self._cell[1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(f"a declaration: {decl}")

    unknown_decl = handle_pi = handle_decl


def a_text(tokens: list[str], values: Tensor, name: str = "", document: int = 0) -> Text:
    counted = ~values.isnan().all(0)
    return Text(document, name, torch.arange(len(tokens)) + 100, tuple(tokens), counted, values)


def some_values(tokens: list[str] = CODE, **changed: Any) -> TokenValues:
    drawn = torch.Generator().manual_seed(0)
    values = torch.randn(2, len(tokens), generator=drawn, dtype=torch.float64)
    values[1].abs_()
    values[:, 0] = NAN
    fields: dict[str, Any] = {
        "title": "Something",
        "unit": "nats",
        "names": ("change", "loss"),
        "signed": (True, False),
        "texts": (a_text(tokens, values),),
        "shown": ("change",),
    }
    return TokenValues(**{**fields, **changed})


def an_example(value: float = 2.5) -> Example:
    tokens = ("a", " <b>", "", "é", "\n")
    return Example(value, 3, 17, tokens, torch.tensor([0.1, value, -1.0, 0.5, 0.0]), 1, True, False)


def everything() -> dict[str, str]:
    top = TopExamples({"L1.mlp.post[3]": (an_example(), an_example(2.0)), EVIL: ()}, "max", False, EVIL)
    written = {"base": (EVIL + "\nend", ""), EVIL: (EVIL + "\nother", "x")}
    return {
        "texts": some_values(about=EVIL, title=EVIL, unit=EVIL).html(),
        "both": some_values(names=("change", EVIL), shown=("change", EVIL))._repr_html_(),
        "shared": some_values(shared=True, shown=("change", "loss")).html(),
        "named": some_values(texts=(a_text(CODE, torch.zeros(2, len(CODE)), EVIL),)).html(),
        "own": lu.plot.colored_tokens(CODE, [float(i) for i in range(len(CODE))], title=EVIL, unit=EVIL),
        "top": top.html(),
        "generations": Generations((EVIL, "b"), written, EVIL).html(),
    }


@pytest.mark.parametrize("name", everything())
def test_whatever_the_texts_hold_it_is_html_that_fetches_and_runs_nothing(name: str) -> None:
    drawn = everything()[name]
    reading = Reading(drawn)
    assert "<script" not in drawn
    assert "http" not in drawn
    assert "onerror" in reading.words, "as words"
    assert "\n" not in drawn, "a blank line would end HTML inside Markdown"


def test_every_token_stands_there_in_order_with_its_number_in_the_tooltip() -> None:
    values = some_values()
    cells = Reading(values.html()).cells
    assert [text for text, _, _ in cells] == [token for token in CODE if token]
    assert "".join(text for text, _, _ in cells) == "".join(CODE)
    by_text = {text: title for text, title, _ in cells}
    number = float(values.texts[0].values[0, 2])
    assert by_text[" f"] == f"' f'  token 102, position 2\nchange: {number:+.3g} nats".replace("-", "−")
    assert "no value" in by_text["<bos>"]
    assert "nats" not in by_text["<bos>"]


def test_tokens_that_share_a_character_share_a_cell_in_the_colour_of_the_one_furthest_from_zero() -> None:
    cells = Reading(lu.plot.colored_tokens(["a", "", "", "🙂", "b"], [1.0, 0.5, -3.0, 2.0, 0.0])).cells
    assert [text for text, _, _ in cells] == ["a", "🙂", "b"]
    assert [line for line in cells[1][1].split("\n") if "''" not in line and "🙂" not in line] == [
        "+0.500",
        "−3.00",
        "+2.00",
    ]
    assert background(cells[1][2]) == background(Reading(lu.plot.colored_tokens(["a", "b"], [-3.0, 1.0])).cells[0][2])
    # A character that is cut through at the end is there as well.
    assert len(Reading(lu.plot.colored_tokens(["a", ""], [1.0, 2.0])).cells) == 2


def test_white_space_is_kept_and_line_ends_and_tabs_are_seen() -> None:
    drawn = lu.plot.colored_tokens(["a\n\n", "\tb", "   "], [1.0, 2.0, 3.0])
    assert "white-space:pre-wrap" in drawn
    assert drawn.count("↵") == 2
    assert drawn.count("→") == 1
    assert drawn.count("&#10;") - 3 == 2, "and one in each tooltip"


@pytest.mark.parametrize("character", ["\x00", "\x07", "\r", "\u202e", "\u2066", "\u200b", "\u2028", "\ud800", "\x85"])
def test_what_would_be_invisible_or_turn_the_line_around_is_shown_by_its_number(character: str) -> None:
    drawn = lu.plot.colored_tokens([f"a{character}b", "c"], [1.0, 2.0])
    assert character not in drawn
    assert f"[U+{ord(character):04X}]" in drawn
    joined = lu.plot.colored_tokens(["👩\u200d💻"], [1.0])
    assert "👩\u200d💻" in joined, "emoji need their joiner"


# --- colours -----------------------------------------------------------------------------------------------------------


def background(style: str) -> str | None:
    found = re.search(r"background-color:(#[0-9a-f]{6})", style)
    return found[1] if found else None


def rgb(text: str) -> tuple[int, ...]:
    return tuple(round(float(part)) for part in re.findall(r"[\d.]+", text))


def hexed(colour: str) -> str:
    return colour if colour.startswith("#") else "#" + "".join(f"{part:02x}" for part in rgb(colour))


def test_signed_values_are_red_and_blue_about_zero_and_magnitudes_run_from_zero() -> None:
    tokens, values = ["a", "b", "c", "d", "e"], [4.0, -4.0, 0.0, 2.0, NAN]
    found = {text: background(style) for text, _, style in Reading(lu.plot.colored_tokens(tokens, values)).cells}
    scale = get_colorscale("RdBu_r")
    assert found["a"] == hexed(scale[-1][1])
    assert found["b"] == hexed(scale[0][1])
    assert found["c"] is None, "the ground has the colour of zero"
    assert found["e"] is None
    drawn = lu.plot.colored_tokens(tokens, values)
    assert f"background-color:{hexed(scale[5][1])}" in drawn
    low = Reading(lu.plot.colored_tokens(["a", "b"], [0.0, 3.0]))
    viridis = get_colorscale("Viridis")
    assert [background(style) for _, _, style in low.cells] == [None, hexed(viridis[-1][1])]
    assert f"background-color:{hexed(viridis[0][1])}" in lu.plot.colored_tokens(["a", "b"], [0.0, 3.0])


def luminance(colour: tuple[int, ...]) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("signed", [True, False])
def test_ink_can_be_read_on_every_colour(signed: bool) -> None:
    scale = Scale(1.0, signed)
    for step in range(-STEPS, STEPS + 1):
        colour = scale.colour(step / STEPS)
        light, dark = sorted((luminance(colour), 1.0 if ink(colour) == "#fff" else 0.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_scale_reaches_to_the_largest_value_or_to_its_limit() -> None:
    whole = Reading(lu.plot.colored_tokens(["a", "b"], [2.0, -8.0], unit="nats"))
    assert "−8.00" in whole.words
    assert "+8.00 nats" in whole.words
    cut = lu.plot.colored_tokens(["a", "b"], [2.0, -8.0], limit=2.0)
    assert "+2.00" in Reading(cut).words
    assert background(Reading(cut).cells[0][2]) == hexed(get_colorscale("RdBu_r")[-1][1])
    assert "−8.00" in Reading(cut).cells[1][1], "the tooltip says the value all the same"
    infinite = Reading(lu.plot.colored_tokens(["a", "b"], [math.inf, 1.0]))
    assert "∞" in infinite.cells[0][1]
    assert background(infinite.cells[0][2]) == background(infinite.cells[1][2]), "scaled by what is finite"
    nothing = Reading(lu.plot.colored_tokens(["a", "b"], [0.0, NAN]))
    assert [background(style) for _, _, style in nothing.cells] == [None, None]
    for bad in (0.0, -1.0, NAN, math.inf):
        with pytest.raises(LensUnlearnError, match="ends no scale"):
            lu.plot.colored_tokens(["a"], [1.0], limit=bad)


def test_values_of_one_kind_may_share_a_scale() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0], [3.0, -6.0]])
    values_of_two_kinds = some_values(
        ["a", "b"],
        names=("base", "pruned", "pruned - base"),
        signed=(False, False, True),
        texts=(a_text(["a", "b"], values),),
        shown=("base", "pruned", "pruned - base"),
    )
    own = Reading(values_of_two_kinds.html())
    assert own.words.count("2 nats") == own.words.count("8 nats") == own.words.count("+6.00 nats") == 1
    together = Reading(TokenValues(**{**values_of_two_kinds.__dict__, "shared": True}).html())
    assert together.words.count("8 nats") == 2
    assert together.words.count("+6.00 nats") == 1
    assert "base: 1 nats\npruned: 4 nats\npruned - base: +3.00 nats" in together.cells[0][1]


def test_a_mean_over_what_counts_is_said() -> None:
    values = torch.tensor([[NAN, 1.0, 3.0, 100.0]])
    text = Text(0, "", torch.arange(4), ("a", "b", "c", "d"), torch.tensor([False, True, True, False]), values)
    drawn = some_values(names=("loss",), signed=(False,), texts=(text,), shown=("loss",)).html()
    assert "mean 2 over 2 tokens" in Reading(drawn).words


# --- how much is drawn -------------------------------------------------------------------------------------------------


def test_long_texts_are_cut_and_it_is_said() -> None:
    texts = tuple(a_text(["word "] * 50, torch.ones(2, 50), f"document {i}") for i in range(4))
    values = some_values(texts=texts)
    whole = Reading(values.html())
    assert len(whole.cells) == 200
    assert "are drawn" not in whole.words
    cut = Reading(lu.plot.texts(values, most=70))
    assert len(cut.cells) == 70
    assert "The first 70 of 200 tokens are drawn." in cut.words
    assert "document 1" in cut.words
    assert "document 2" not in cut.words
    two = Reading(lu.plot.texts(values["change", "loss"], most=70))
    assert len(two.cells) == 140
    own = Reading(lu.plot.colored_tokens(["a"] * 30, [1.0] * 30, most=10))
    assert len(own.cells) == 10
    assert "The first 10 of 30 tokens are drawn." in own.words
    with pytest.raises(LensUnlearnError, match="leaves no token"):
        lu.plot.texts(values, most=0)


def test_a_figure_stays_small() -> None:
    many = 8
    values = torch.randn(many, 3000, generator=torch.Generator().manual_seed(1))
    names = tuple(f"L3.mlp.post[{i}]" for i in range(many))
    text = a_text(["    return"] * 3000, values)
    values_of_neurons = TokenValues("Activation", "nats", names, (True,) * many, (text,), names, shared=True)
    drawn = values_of_neurons.html()
    assert len(drawn) < 2_500_000
    assert "The first 500 of 3,000 tokens are drawn." in drawn


def test_more_values_than_there_are_columns_for_are_left_out_and_it_is_said() -> None:
    names = tuple(f"L0.mlp.post[{i}]" for i in range(COLUMNS + 3))
    text = a_text(["a", "b"], torch.ones(len(names), 2))
    many = TokenValues("Activation", "", names, (True,) * len(names), (text,), names)
    words = Reading(many.html()).words
    assert "3 more values are not drawn." in words
    assert names[COLUMNS] not in words
    assert names[COLUMNS] in Reading(many[names[COLUMNS]].html()).words
    top = TopExamples({name: (an_example(),) for name in names}, "max", True)
    assert f"5 of {len(names)} neurons are drawn" in Reading(lu.plot.examples(top, neurons=5)).words


def test_one_value_can_be_drawn_alone() -> None:
    values = some_values()
    assert "loss" not in Reading(values.html()).words
    alone = values["loss"]
    assert alone.shown == ("loss",)
    assert values.shown == ("change",)
    words = Reading(alone.html()).words
    assert "loss" in words
    assert "change" not in words
    for wrong in ("nothing", []):
        with pytest.raises(LensUnlearnError, match="choose from change, loss"):
            values[wrong]


# --- examples and generations --------------------------------------------------------------------------------------------


def test_an_example_says_its_activation_and_frames_the_token() -> None:
    top = TopExamples({"L1.mlp.post[3]": (an_example(), an_example(-2.0))}, "abs", True, "model · corpus")
    reading = Reading(top.html())
    assert reading.words.count("+2.50") >= 2, "at the example, and at the scale"
    assert "one token per document" in reading.words
    framed = [text for text, _, style in reading.cells if "box-shadow" in style]
    assert framed == [" <b>", " <b>"]
    assert [text for text, _, _ in reading.cells[:4]] == ["a", " <b>", "é", "\n"]
    assert reading.words.count("…") == 2, "the text goes on behind, and not before"
    assert "no counted token" in Reading(TopExamples({"a": ()}, "max", True).html()).words


def test_generations_stand_side_by_side_and_what_differs_is_marked() -> None:
    written = {"base": ("the same end",), "pruned": ("the same other",), "control": ("the same end",), "mute": ("",)}
    drawn = Generations(("Once\n",), written, "demo").html()
    reading = Reading(drawn)
    after = reading.words.split("Once")[1]
    order = ["base", "the same end", "pruned", "the same other", "control", "the same end", "mute", "(nothing)"]
    place = 0
    for word in order:
        place = after.index(word, place) + len(word)
    assert re.findall(r"rgba\(224[^>]*>([^<]*)<", drawn) == ["other"]
    assert "control · as base" in reading.words
    assert "pruned · as base" not in reading.words


def test_a_file_opens_offline(tmp_path: Any) -> None:
    some_values().to_html(tmp_path / "a.html")
    written = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert written == document(some_values().html())
    assert written.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in html.unescape(written)
    assert "http:" not in written
    assert "https:" not in written


def test_html_shows_itself_and_is_a_string() -> None:
    drawn = lu.plot.colored_tokens(["a"], [1.0])
    assert isinstance(drawn, Html)
    assert drawn._repr_html_() == str(drawn)
    assert type(drawn._repr_html_()) is str
    assert lu.plot.texts(some_values()) == some_values()._repr_html_()


def test_tokens_and_values_must_match() -> None:
    for tokens, values in ((["a"], [1.0, 2.0]), ([], [])):
        with pytest.raises(LensUnlearnError, match="give as many of both"):
            lu.plot.colored_tokens(tokens, values)
