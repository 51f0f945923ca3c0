"""Hidden characters are shown, wherever text that is not to be trusted is shown."""

from pathlib import Path

import pytest
import tiny
from interventions_helpers import selection_of
from typer.testing import CliRunner

from lens_unlearn.cli import app
from lens_unlearn.core.text import visible
from lens_unlearn.interventions.ablate import Ablate


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nof two lines, Ünï·cödé 日本 עברית", None),
        ("\x1b[31mred", "[U+001B][31mred"),
        ("a\u202eb", "a[U+202E]b"),
        ("\u200fa\u2067", "[U+200F]a[U+2067]"),
        ("\x00\x7f\x9b\r", "[U+0000][U+007F][U+009B][U+000D]"),
        ("\ufeffa\u200b\u2028", "[U+FEFF]a[U+200B][U+2028]"),
        ("\ud800", "[U+D800]"),
        ("👩\u200d💻", None),  # joined
    ],
)
def test_hidden_characters_are_shown_by_their_code_points(text: str, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown)


def test_a_note_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    note = "\x1b[2Jgone\u202e\n  model: another\x07"
    model = tiny.model("gpt2")
    Ablate(selection_of(model)).save(tmp_path / "x", model, note=note)
    output = CliRunner().invoke(app, ["show", str(tmp_path / "x")]).output
    assert "  note: [U+001B][2Jgone[U+202E][U+000A]  model: another[U+0007]" in output.splitlines()
    assert not {"\x1b", "\x07", "\u202e"} & set(output)
