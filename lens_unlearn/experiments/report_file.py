"""A report as one file: numbers with the draws behind their intervals, samples, figures, settings, and its parts.

Knows what a report holds; knows nothing of runs and their folders. What methods found is in files of its own.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.evaluation.report import Measure, Report

__all__ = ["REPORT_FILE", "content_of", "read_report", "report_in", "save_report"]

REPORT_FILE = "report.safetensors"
"""Where a run's folder holds its report."""
LARGEST = 64 * 2**20
"""Most bytes of a figure, unpacked: a small hostile file could otherwise fill the memory."""
DEEPEST = 3
"""How far parts may have parts."""


def save_report(path: Path, report: Report) -> None:
    """Write all of a report exactly, but the interventions, and texts that are coloured token by token."""
    tensors: dict[str, Tensor] = {}
    content = content_of(report, "", tensors)
    artefacts.write(path, "report", tensors, {"report": json.dumps(content, default=str)})  # as text, the order stays


def content_of(report: Report, start: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what a header says of a report, and add its tensors, whose names begin with `start`."""
    for i, one in enumerate(report.measures.values()):
        tensors[f"{start}draws/{i}"] = torch.from_numpy(one.draws)
        if one.spread is not None:
            tensors[f"{start}spread/{i}"] = torch.from_numpy(one.spread)
    tensors |= {f"{start}values/{i}": torch.from_numpy(one) for i, one in enumerate(report.values.values())}
    # Texts that are coloured token by token are HTML, which nobody should take from a file: who reads one cannot know who wrote it.
    figures = {title: figure for title, figure in report.figures.items() if hasattr(figure, "to_json")}
    for i, figure in enumerate(figures.values()):
        packed = zlib.compress(figure.to_json().encode(errors="backslashreplace"))
        tensors[f"{start}figures/{i}"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    content: dict[str, Any] = {
        "measures": [[*key, one.value, one.n, one.units, one.replicates] for key, one in report.measures.items()],
        "values": [list(key) for key in report.values],
        "provenance": report.provenance,
        "samples": report.samples,
    }
    parts = [content_of(part, f"{start}parts/{i}/", tensors) for i, part in enumerate(report.parts)]
    more = {"title": report.title, "figures": list(figures), "parts": parts}
    return content | {name: value for name, value in more.items() if value}


def read_report(path: Path) -> Report:
    """Read what `save_report` wrote.

    Raises:
        ArtefactError: If the file is damaged or not ours.
    """
    header, tensors = artefacts.read(path, "report")
    with artefacts.usable(path, "report that can be read"):
        unread = dict(tensors)
        found = report_in(artefacts.parse(header["report"]), "", unread)
        if unread:
            raise ValueError("its numbers are not those of its measures")
        return found


def report_in(content: Mapping[str, Any], start: str, tensors: dict[str, Tensor]) -> Report:
    """Read a report, and take its tensors from those that there are."""
    if start.count("parts/") > DEEPEST:
        raise ValueError("its parts have parts that have parts")

    def numbers(name: str, dimensions: int = 1) -> np.ndarray:
        tensor = tensors.pop(start + name)
        if tensor.dtype != torch.float64 or not 0 < tensor.ndim <= dimensions:
            raise ValueError(f"{start}{name} holds no numbers of a report")
        return tensor.numpy()

    measures: dict[tuple[str, str, str], Measure] = {}
    for i, entry in enumerate(content["measures"]):
        spread = numbers(f"spread/{i}") if f"{start}spread/{i}" in tensors else None
        measures[_key(entry[:3])] = _measure(entry[3:], numbers(f"draws/{i}"), spread)
    values = {_key(key): numbers(f"values/{i}", 2) for i, key in enumerate(content["values"])}
    if len(content["measures"]) > len(measures) or len(content["values"]) > len(values):
        raise ValueError("it has two measures of one name")
    titles = [str(title) for title in content.get("figures", [])]
    figures = {title: _figure(tensors.pop(f"{start}figures/{i}")) for i, title in enumerate(titles)}
    parts = [report_in(part, f"{start}parts/{i}/", tensors) for i, part in enumerate(content.get("parts", []))]
    samples = [{str(key): _sample(text) for key, text in sample.items()} for sample in content["samples"]]
    found = Report(
        measures, dict(content["provenance"]), figures, samples, str(content.get("title", "")), tuple(parts), values
    )
    found.to_frame()
    return found


def _figure(packed: Tensor) -> Any:
    from plotly.io import from_json

    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(packed.numpy().tobytes(), LARGEST)
    except zlib.error as error:
        raise ValueError(f"a figure in it is damaged: {error}") from error
    if not unpacking.eof:
        raise ValueError("a figure in it is damaged, or too large")
    return from_json(text.decode())


def _sample(text: Any) -> Any:
    """Read an entry of a sample: a text, or the conditions under which there is none."""
    return [str(one) for one in text] if isinstance(text, list) else str(text)


def _measure(numbers: Sequence[Any], draws: np.ndarray, spread: np.ndarray | None) -> Measure:
    """Read a measure; files of earlier versions say nothing of units and replicates."""
    value, n, units, replicates = map(_number, [*numbers, *(0, 1)[len(numbers) - 2 :]])
    if spread is not None and spread.shape != draws.shape:
        raise ValueError("its spread is not that of its draws")
    return Measure(value, draws, int(n), int(units), int(replicates), spread)


def _key(parts: Sequence[Any]) -> tuple[str, str, str]:
    condition, corpus, metric = parts
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{parts!r} is no name of a measure")
    return condition, corpus, metric


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return float(value)
