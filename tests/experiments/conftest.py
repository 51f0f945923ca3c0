"""What the tests of whole runs share."""

from pathlib import Path

import pytest
from command_line_helpers import WORDS, write_texts


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "texts"
    folder.mkdir()
    forget = write_texts(folder / "forget.jsonl", 1, words=[word[::-1] for word in WORDS])
    return {"forget": forget, "retain": write_texts(folder / "retain.jsonl", 2)}
