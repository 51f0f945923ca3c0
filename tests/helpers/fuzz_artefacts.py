"""Fuzzing of every file that is read: hypothesis changes sound files, and seals most of them again with a true checksum.

    python tests/fuzz_artefacts.py --examples 20000 [--seed 0]      prints what came of them; ends with 1 at a failure
    python tests/fuzz_artefacts.py --write-golden                   writes tests/golden/ again (for a new schema only)

An example is a file of one of the kinds in `KINDS`, changed one to three times: in the values, keys and nesting of its JSON
header, in the names, shapes, types and values of its tensors, in the header of safetensors, or in its bytes. Reading it has to
end in a `LensUnlearnError`, or in something that can be shown and written again, and read again as the same. Whatever else
comes out, and an example that takes longer than five seconds, is a failure, which hypothesis then makes as small as it can.

The test suite runs 250 examples of it, always the same.
"""

import argparse
import contextlib
import copy
import json
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from torch import Tensor

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import LensUnlearnError
from lens_unlearn.evaluation.report import Measure, Report
from lens_unlearn.experiments import run_folder
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.abstain import Abstain
from lens_unlearn.interventions.adjust import Adjust
from lens_unlearn.interventions.affine import Affine
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.patch import Patch
from lens_unlearn.interventions.reroute import Reroute
from lens_unlearn.interventions.update import Update
from lens_unlearn.interventions.when import When
from lens_unlearn.keyspace.regions import Box, Clusters, Contrast, Ellipsoid
from lens_unlearn.methods.training import Training
from lens_unlearn.model.matrices import Matrix
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons import collect
from lens_unlearn.neurons.histogram import Histogram
from lens_unlearn.neurons.key_sample import KeySample
from lens_unlearn.neurons.maps import NeuronMap
from lens_unlearn.neurons.moments import Moments

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SLOW = 5.0
"""Seconds that no example takes."""

# --- sound files of every kind: exact numbers, so that every machine writes the same ---------------------------------------


def ramp(*shape: int, start: float = 1.0, step: float = 0.25) -> Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * step + start).reshape(shape).float()


POST, HEADS, RESID = Site(0, "mlp.post"), Site(1, "attn.z"), Site(1, "resid")
SELECTION = NeuronMap({POST: torch.tensor([True, False, True]), Site(1, "mlp.post"): torch.zeros(3, dtype=torch.bool)})
Z = NeuronMap({HEADS: torch.tensor([[True, False], [False, True]])})


def interventions() -> dict[str, Intervention]:
    """Return small interventions of every kind and form."""
    maps = {name: SELECTION.map(lambda m, s=s: ramp(3, start=s)) for name, s in (("a", -1.0), ("b", 0.5), ("c", 2.0))}
    basis = NeuronMap({HEADS: torch.eye(2).repeat(2, 1, 1) + ramp(2, 2, 2, start=0.125, step=0.125)})
    regions = {
        POST: Box(ramp(1, 3), ramp(3), 1.5, 1.25, 1),
        Site(1, "mlp.post"): Clusters(ramp(2, 3), ramp(3), 1.5),
        Site(2, "mlp.post"): Ellipsoid(ramp(1, 3), ramp(3), 1.5),
        Site(3, "mlp.post"): Contrast(
            ramp(1, 3), ramp(3), 0.5, 1.0, 0, other_centre=ramp(3, start=4), other_scale=ramp(3)
        ),
    }
    rates = {"detection": [0.75, 0.5, 1.0, 8], "false_alarms": [0.0, 0.0, 0.25, 8], "auc": {str(POST): 0.875}}
    updates = {
        Matrix(0, "W_out"): Update(ramp(2, 3), rows=torch.tensor([2, 0])),
        Matrix(0, "W_in"): Update(ramp(3, 2), columns=torch.tensor([0, 2])),
        Matrix(1, "W_Q"): Update(ramp(3, 1), right=ramp(1, 4)),
        Matrix(1, "W_O"): Update(ramp(2, 3)),
    }
    record = {"settings": {"lr": 0.5}, "losses": [{"step": 1, "forget": 0.5}], "stopped": None}
    number, means = Ablate(SELECTION, 0.5), Ablate(SELECTION, maps["a"].where(SELECTION, float("nan")))
    made: dict[str, Intervention] = {
        "ablate": number,
        "ablate-means": means,
        "ablate-basis": Ablate(Z, Z.map(lambda m: ramp(2, 2).double()), basis),
        "adjust": Adjust(SELECTION, maps["a"], maps["b"], maps["c"], maps["b"], "deterministic", 3, 1),
        "abstain": Abstain(regions, 2, "every_token", "No.", rates),
        "affine": Affine(
            {RESID: ramp(3, 2)}, {RESID: ramp(2, 3, start=-1.0)}, {RESID: ramp(3)}, {Site(2, "resid"): ramp(4)}, 0.75
        ),
        "delta": Delta(updates, -0.5, record),
        "patch": Patch({POST: ramp(2, 4, 3), HEADS: ramp(2, 4, 2, 2)}, "last", site=("mlp.post", "attn.z")),
        "reroute": Reroute({0: [2, 0], 3: [17]}),
        "when": When(Abstain(regions, 2, "every_token", "No.", rates), Chain((Reroute({6: [1]}),))),
        "placed": means.placed("generated", skip_special=True, sink_ratio=7.5),
    }
    return {**made, "chain": Chain((number, Chain(()), Chain((made["adjust"], Ablate(Z)))))}


def moments() -> Moments:
    found = Moments(extra=("sqrt", "extrema"))
    for site in (POST, HEADS):
        shape = (4, 3) if site == POST else (4, 2, 2)
        found.update(site, ramp(*shape, start=-1.0).square(), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    found.provenance = {"model": "tiny", "corpus": "some.jsonl", "tokens": 3}
    return found


def keys() -> KeySample:
    found = KeySample(3, seed=1)
    found.locate(torch.tensor([1, 1, 2, 3]), torch.tensor([0, 1, 0, 0]))
    found.update(POST, ramp(4, 3), torch.ones(4))
    return found


def histogram() -> Histogram:
    found = Histogram(bins=4)
    found.update(POST, ramp(4, 3, start=-1.0), torch.ones(4))
    return found


class Halted(Training):
    """A training that stands somewhere in the middle, without a model."""

    @classmethod
    def of(cls, optimizer: str, *, begun: bool) -> "Halted":
        delta = Delta({Matrix(0, "W_out"): Update(ramp(2, 3), rows=torch.tensor([0, 2]))})
        nothing: Any = None
        settings: Any = SimpleNamespace(
            optimizer=optimizer, lr=0.5, rho=0.25, weight_decay=0.0, steps=9, loss="graddiff"
        )
        made = cls(nothing, nothing, None, {}, delta, [torch.zeros(2, 3)], settings, 1.5, 0.5)
        if begun:
            made.trained[0].copy_(ramp(2, 3))
            made.best, made.previous, made.step = [ramp(2, 3, start=2.0)], [ramp(2, 3, start=3.0)], 2
            made.trajectory = [{"step": at, "forget": 0.5, "retain": 0.25} for at in (1, 2)]
            made.checks = [{"step": 2, "forget": 0.5}]
            made.best_check = made.checks[0]
            if made.sophia is not None:
                made.sophia.m, made.sophia.h = [ramp(2, 3)], [ramp(2, 3)]
            elif made.adamw is not None:
                state = {"step": torch.tensor(2.0), "exp_avg": ramp(2, 3), "exp_avg_sq": ramp(2, 3)}
                made.adamw.state[made.trained[0]] = state
        return made

    def _settings(self) -> dict[str, Any]:
        return {"model": {"width": 3}, "updates": ["L0.W_out"]}


class Kind(NamedTuple):
    """How files of a kind are written, and how one is read and written again."""

    write: Callable[[Path], Any]
    again: Callable[[Path, Path], Any]


SETTINGS = {"model": {"width": 3}, "sites": [str(POST)], "batch_size": 8}


def _intervention(name: str) -> Kind:
    return Kind(
        lambda path: interventions()[name].save(path, note="why"),
        lambda path, new: load_intervention(path).save(new, note="why"),
    )


def _checkpoint(make: Callable[[], Any]) -> Kind:
    def again(path: Path, new: Path) -> None:
        total, done = collect._load(path, make().fresh(), SETTINGS, None)
        repr(total)
        collect._save(new, total, SETTINGS, done)

    return Kind(lambda path: collect._save(path, make(), SETTINGS, 2), again)


def _training(optimizer: str) -> Kind:
    def again(path: Path, new: Path) -> None:
        training = Halted.of(optimizer, begun=False)
        training._resume(path)
        training._save(new)

    return Kind(lambda path: Halted.of(optimizer, begun=True)._save(path), again)


def _report() -> Report:
    draws = ramp(4).double().numpy()
    keys = [("base", "forget", "top1"), ("pruned", "forget", "top1"), ("pruned", "forget", "loss")]
    measures = {key: Measure(0.5 + place, draws, 7) for place, key in enumerate(keys)}
    samples = [{"corpus": "forget", "prompt": "1+1=", "true answer": "2", "base": "2", "pruned": "é"}]
    return Report(measures, {"model": "tiny", "seed": 0}, samples=samples, values={keys[0]: draws})


def _kept(form: run_folder.Form, make: Callable[[], Any]) -> Kind:
    def again(path: Path, new: Path) -> None:
        found = form.load(path)
        repr(found)
        form.save(new, found)

    return Kind(lambda path: form.save(path, make()), again)


KINDS: dict[str, Kind] = {
    **{name: _intervention(name) for name in interventions()},
    "moments": Kind(
        lambda path: collect.save_moments(path, moments()),
        lambda path, new: collect.save_moments(new, collect.load_moments(path)),
    ),
    "collect-moments": _checkpoint(moments),
    "collect-keys": _checkpoint(keys),
    "collect-histogram": _checkpoint(histogram),
    "simu-sophia": _training("sophia"),
    "simu-adamw": _training("adamw"),
    "fitted-moments": _kept(run_folder.fitted_form(), lambda: (moments(), moments())),
    "fitted-keys": _kept(run_folder.fitted_form(), lambda: (keys(), keys())),
    "report": _kept(run_folder.REPORT, _report),
}


def write_all(folder: Path) -> dict[str, Path]:
    """Write one file of every kind."""
    folder.mkdir(exist_ok=True)
    for name, kind in KINDS.items():
        kind.write(folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in KINDS}


# --- files taken apart and put together again --------------------------------------------------------------------------


def taken_apart(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return our header, without its checksum, and the tensors of a sound file."""
    size = int.from_bytes(data[:8], "little")
    content = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["lens_unlearn"])
    del content["checksum"]
    return content, safetensors.torch.load(data)


def sealed(content: Any, tensors: dict[str, Tensor]) -> bytes:
    """Put a file together, with a true checksum."""
    header = json.loads(json.dumps(content))
    if isinstance(header, dict):
        header["checksum"] = artefacts._checksum(tensors, header)
    return safetensors.torch.save(tensors, metadata={"lens_unlearn": json.dumps(header, sort_keys=True)})


def put(path: Path, data: bytes) -> Path:
    """Write a file; over an older one, which some file systems empty slowly."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()
    return path


def raw(header: Any, body: bytes = b"") -> bytes:
    """Put a file together that no library would write."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# --- changes -------------------------------------------------------------------------------------------------------------

NASTY: list[Any] = [None, True, False, 0, 1, -1, 2, 0.5, -0.0, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan")]
NASTY += [
    float("inf"),
    -float("inf"),
    "",
    "0",
    "1.5",
    "NaN",
    "map",
    "chain",
    "ablate",
    "delta",
    "placed",
    "prompt",
    "L0.mlp.post",
    "L00.mlp.post",
]
NASTY += [
    "../../x",
    "/etc/passwd",
    "nul\0byte",
    "\ud800",
    "é" * 50,
    "x" * 2000,
    "__class__",
    "os.system",
    "<script>",
    "=1+1",
]
NASTY += [[], {}, [[]], [None], {"": None}, {"kind": "chain", "members": []}, [1, 2, 3, 4], {"a": {"a": {"a": []}}}]
DTYPES = [*artefacts.DTYPES, torch.complex64, torch.uint16, torch.uint32, torch.float8_e4m3fn]
VALUES = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1.0, 2.0, 255.0, 1e30, -1e30]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the way to every value of a JSON object, but itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, one in inner for way in ((*path, key), *places(one, (*path, key)))]


def change_header(draw: Any, content: dict[str, Any]) -> None:
    found = places(content)
    if not found:
        return
    *way, key = draw(st.sampled_from(found))
    parent: Any = content
    for step in way:
        parent = parent[step]
    what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename", "copy", "wrap"]))
    if what == "replace":
        parent[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    elif what == "delete":
        del parent[key]
    elif what == "wrap":
        for _ in range(draw(st.sampled_from([1, 2, 90, 300]))):
            parent[key] = draw(st.sampled_from([[parent[key]], {"kind": "chain", "members": [parent[key]]}]))
    elif isinstance(parent, dict):
        name = draw(st.sampled_from(["new", "", "kind", "L1.mlp.post", f"{key} ", "0"]))
        parent[name] = parent[key] if what == "copy" else parent.pop(key)
    else:
        parent.append(copy.deepcopy(parent[key]))


def change_tensors(draw: Any, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        return
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    what = draw(st.sampled_from(["value", "value", "dtype", "shape", "rename", "copy", "delete", "fill"]))
    if what == "value" and tensor.numel():
        flat = tensor.clone().reshape(-1)
        value = draw(st.sampled_from(VALUES))
        with contextlib.suppress(RuntimeError, OverflowError, ValueError):  # an integer cannot be NaN
            flat[draw(st.integers(0, len(flat) - 1))] = value
        tensors[name] = flat.reshape(tensor.shape)
    elif what == "dtype":
        tensors[name] = (tensor.real if tensor.is_complex() else tensor).to(draw(st.sampled_from(DTYPES)))
    elif what == "shape":
        shapes = [
            (),
            (0,),
            (0, 2**40),
            (2**31, 0),
            (tensor.numel(),),
            (1, *tensor.shape),
            (*tensor.shape, 1),
            (1,),
            (2, 2, 2, 2),
        ]
        shape = draw(st.sampled_from(shapes))
        size = 0 if 0 in shape else torch.Size(shape).numel()
        tensors[name] = torch.zeros(size, dtype=tensor.dtype).reshape(shape)
        if size == tensor.numel():
            tensors[name] = tensor.reshape(shape)
    elif what in ("rename", "copy"):
        other = draw(st.sampled_from(sorted(tensors)))
        new = [
            other,
            f"{name}x",
            f"0/{name}",
            name.replace("L0", "L00"),
            name.partition("/")[2],
            "../../x",
            "nul\0byte",
            "",
        ]
        tensors[draw(st.sampled_from(new))] = tensor.clone()
        if what == "rename":
            tensors.pop(name)
    elif what == "delete":
        del tensors[name]
    else:
        with contextlib.suppress(RuntimeError):
            tensors[name] = torch.full_like(tensor, draw(st.sampled_from([0, 1, 2, 127])))


def change_outside(draw: Any, data: bytes) -> bytes:
    """Change the header of safetensors."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return data
    if isinstance(header, dict) and draw(st.booleans()):
        entries = [name for name in header if name != "__metadata__"]
        for name in entries[: draw(st.integers(0, 2))]:
            where = draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
            values = [
                [],
                [0],
                [2**62, 4],
                [2**63],
                [-1],
                [1.5],
                [0, 2**40],
                [4, 0],
                "F32",
                "U8",
                "BOOL",
                "F8_E5M2",
                "I64",
                None,
            ]
            with contextlib.suppress(TypeError):
                header[name][where] = draw(st.sampled_from(values))
    else:
        change_header(draw, header)
    text = json.dumps(header).encode()
    if draw(st.booleans()):
        text = text.replace(b'"', b'\n "', 1)
    length = len(text) + draw(st.sampled_from([0, 0, 0, 1, -1, 8, 2**20, 2**63 - 2**20]))
    return struct.pack("<Q", max(0, length)) + text + data[8 + size :]


def change_bytes(draw: Any, data: bytes) -> bytes:
    if not data:
        return data
    at = draw(st.integers(0, len(data) - 1))
    to = draw(st.integers(at, min(len(data), at + 64)))
    what = draw(st.sampled_from(["flip", "cut", "drop", "double", "insert", "swap"]))
    if what == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if what == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=16)) + data[at:]
    if what == "swap":
        return data[:at] + draw(st.binary(min_size=to - at, max_size=to - at)) + data[to:]
    return {"cut": data[:at], "drop": data[:at] + data[to:], "double": data[:to] + data[at:]}[what]


@st.composite
def changed(draw: Any, files: dict[str, bytes]) -> tuple[str, str, bytes]:
    """Draw a kind, how its file was changed, and the file."""
    name = draw(st.sampled_from(sorted(files)))
    content, tensors = taken_apart(files[name])
    how = draw(st.sampled_from(["header", "header", "tensors", "tensors", "both", "outside", "bytes"]))
    for _ in range(draw(st.integers(1, 3))):
        if how in ("header", "both"):
            change_header(draw, content)
        if how in ("tensors", "both"):
            change_tensors(draw, tensors)
    try:
        data = sealed(content, tensors)
    except (ValueError, RuntimeError, KeyError, safetensors.SafetensorError):
        data = files[name]  # what cannot even be written, such as a lone surrogate as a name
    for _ in range(draw(st.integers(1, 2)) if how in ("outside", "bytes") else 0):
        data = (change_outside if how == "outside" else change_bytes)(draw, data)
    return name, how, data


# --- what came of it ---------------------------------------------------------------------------------------------------


def attempt(name: str, data: bytes, folder: Path) -> str:
    """Read a changed file; return how it ended, or let out what should not have come out."""
    file, new, newer = (folder / part for part in ("changed", "new", "newer"))
    put(file, data)
    begin = time.monotonic()
    try:
        KINDS[name].again(file, new)
    except LensUnlearnError as error:
        ended = type(error).__name__ if len(str(error)) < 2000 else "a message that fills the screen"
    else:
        KINDS[name].again(new, newer)
        assert new.read_bytes() == newer.read_bytes(), "what was read is not what is written"
        ended = "read"
    assert ended != "a message that fills the screen"
    assert time.monotonic() - begin < SLOW, "slow"
    return ended


def fuzz(examples: int, seed: int | None = None) -> Counter[str]:
    """Run so many examples; without a seed they are always the same.

    Raises:
        BaseException: What came out of the smallest file found at which something else comes out than a `LensUnlearnError`.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: path.read_bytes() for name, path in write_all(Path(folder) / "sound").items()}

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=seed is None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(changed(files))
        def run(example: tuple[str, str, bytes]) -> None:
            name, how, data = example
            ended = "unchanged" if data == files[name] else attempt(name, data, Path(folder))
            counts.update([f"{how}: {ended}"])

        (run if seed is None else with_seed(seed)(run))()
    return counts


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--examples", type=int, default=20_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--write-golden", action="store_true")
    options = arguments.parse_args()
    if options.write_golden:
        print(*write_all(GOLDEN).values(), sep="\n")
        return
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    counts = fuzz(options.examples, options.seed)
    for ended, count in sorted(counts.items()):
        print(f"{count:8,}  {ended}")
    read = sum(count for ended, count in counts.items() if ended.endswith(": read"))
    refused = sum(count for ended, count in counts.items() if ended.endswith("Error"))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{sum(counts.values()):,} examples: {refused:,} refused, {read:,} read, in {time.monotonic() - begin:.0f} s")
    print(f"{more:.0f} MB of memory more at the peak than before, hypothesis' own included")


if __name__ == "__main__":
    sys.exit(main())
