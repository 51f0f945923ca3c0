"""Files: what goes in comes out, whatever was altered is refused, and reading never runs anything."""

import ast
import contextlib
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_artefacts
import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from interventions_helpers import POST, Z, random_selection, selection_of, under

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, SelectionError
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.interventions.base import Chain, Intervention
from lens_unlearn.interventions.delta import Delta
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.interventions.update import Update
from lens_unlearn.methods.ov_basis import ov_basis
from lens_unlearn.model.matrices import Matrix
from lens_unlearn.model.sites import Site
from lens_unlearn.neurons.collect import collect, load_moments, save_moments
from lens_unlearn.neurons.maps import NeuronMap

pytestmark = pytest.mark.filterwarnings("ignore:.* know its model:UserWarning")  # most files here are of none

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def examples() -> dict[str, Intervention]:
    mlp, z = random_selection({site: (64,) for site in POST}), random_selection({site: (4, 8) for site in Z})
    partly = NeuronMap({POST[0]: torch.zeros(64, dtype=torch.bool), POST[1]: torch.ones(64, dtype=torch.bool)})
    value = mlp.map(
        lambda mask: torch.randn(mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    )
    basis = ov_basis(tiny.model("llama"))
    return {
        "zero": Ablate(mlp),
        "number": Ablate(mlp, -0.1),
        "means": Ablate(mlp, value),
        "half means": Ablate(mlp, value.map(lambda v: v.half())),
        "layer without any": Ablate(partly, value),
        "heads": Ablate(z),
        "basis": Ablate(z, basis=basis),
        "basis and means": Ablate(z, z.map(lambda m: m.double() * 0.3), basis),
        "both kinds": Ablate(NeuronMap({**dict(mlp.items()), **dict(z.items())})),
        "chain": Ablate(mlp) + Ablate(z, 0.5) + Ablate(mlp, value),
        "nothing": Chain(()),
        "nested": Chain((Chain((Ablate(z), Chain(()))), Ablate(mlp, value))),
    }


NAMES = list(examples())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Chain):
        return isinstance(b, Chain) and len(a.members) == len(b.members) and all(map(same, a.members, b.members))
    fields = [(getattr(a, name), getattr(b, name)) for name in ("selection", "value", "basis")]
    return type(a) is type(b) and all(
        x.equals(y) and [v.dtype for _, v in x.items()] == [v.dtype for _, v in y.items()]
        if isinstance(x, NeuronMap)
        else x == y
        for x, y in fields
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_intervention_comes_back_whole(tmp_path: Path, name: str) -> None:
    intervention, file = examples()[name], tmp_path / "a b ü.safetensors"
    model = tiny.model("llama")
    intervention.save(file, model, note="why")
    again = load_intervention(file, model)
    assert same(intervention, again)
    assert repr(intervention) == repr(again)
    assert torch.equal(under(model, intervention), under(model, again))
    header, _ = artefacts.read(file)
    assert header["note"] == "why"
    assert header["text"] == repr(intervention)


@pytest.mark.parametrize("name", NAMES)
def test_saving_twice_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    for file in ("a", "b"):
        examples()[name].save(tmp_path / file, tiny.model("llama"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_tensors_of_every_dtype_and_shape_come_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    artefacts.write(
        tmp_path / "x",
        "thing",
        {"t": tensor, "u": tensor.t() if tensor.ndim == 2 else tensor.clone()},
        {"a": [1, {"b": None}]},
    )
    header, tensors = artefacts.read(tmp_path / "x", "thing")
    assert header["a"] == [1, {"b": None}]
    assert tensors["t"].dtype == dtype
    assert torch.equal(tensors["t"], tensor)


def test_headers_of_every_length_are_read(tmp_path: Path) -> None:
    """The size stands first in the file, so that its bytes can look like the beginning of a pickle (0x80)."""
    firsts = set()
    for length in range(300):
        artefacts.write(tmp_path / "x", "thing", {}, {"note": "x" * length})
        header, _ = artefacts.read(tmp_path / "x")
        assert len(header["note"]) == length
        firsts.add((tmp_path / "x").read_bytes()[0])
    assert 0x80 in firsts


def test_a_header_whose_size_reads_as_pk_is_read(tmp_path: Path) -> None:
    for length in range(0x4B50 - 400, 0x4B50 + 8):
        artefacts.write(tmp_path / "x", "thing", {}, {"note": "x" * length})
        if (tmp_path / "x").read_bytes()[:2] == b"PK":
            break
    else:
        pytest.fail("no length gave such a header")
    artefacts.read(tmp_path / "x")


# --- damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("small") / "x"
    Ablate(NeuronMap({Site(0, "mlp.post"): torch.tensor([True, False, True])}), 0.5).save(file)
    data = file.read_bytes()
    assert len(data) < 800
    return data


def outcome(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return load_intervention(path)


def test_a_file_truncated_at_any_byte_is_refused(tmp_path: Path, small: bytes) -> None:
    for end in range(len(small)):
        with pytest.raises(ArtefactError):
            outcome(tmp_path / "x", small[:end])


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_a_file_with_any_byte_flipped_is_refused_or_means_the_same(tmp_path: Path, small: bytes, flip: int) -> None:
    original, harmless = outcome(tmp_path / "x", small), 0
    for at in range(len(small)):
        damaged = bytearray(small)
        damaged[at] ^= flip
        try:
            again = outcome(tmp_path / "x", bytes(damaged))
        except ArtefactError:
            continue
        harmless += 1
        assert same(original, again), at
    assert harmless < 20


def test_bytes_behind_the_end_are_refused(tmp_path: Path, small: bytes) -> None:
    for extra in (b"\0", b"PK\x05\x06" + b"\0" * 18, small):
        with pytest.raises(ArtefactError):
            outcome(tmp_path / "x", small + extra)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "random"
    with pytest.raises(ArtefactError):
        outcome(file, data)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_random_bytes_behind_a_sound_size_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "random"
    for body in (data, b"{" + data, b'{"__metadata__":{"lens_unlearn":"' + data):
        with pytest.raises(ArtefactError):
            outcome(file, struct.pack("<Q", size) + body)


class Bomb:
    def __reduce__(self) -> Any:
        return (os._exit, (3,))


def archive(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", data)
    return out.getvalue()


def torch_file() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.ones(2)}, out)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [*[pickle.dumps(Bomb(), protocol=p) for p in range(2, 6)], archive(pickle.dumps(Bomb())), torch_file()],
    ids=["pickle2", "pickle3", "pickle4", "pickle5", "zip", "torch.save"],
)
def test_pickles_and_archives_are_refused_by_their_content(tmp_path: Path, data: bytes) -> None:
    for name in ("x.safetensors", "x.pt"):
        with pytest.raises(ArtefactError, match="pickle or an archive: such files can run code, and are never opened"):
            outcome(tmp_path / name, data)


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_pickles_are_refused(tmp_path: Path, protocol: int) -> None:
    with pytest.raises(ArtefactError):
        outcome(tmp_path / "x", pickle.dumps(Bomb(), protocol=protocol))


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**12, 2**31, 8 * 2**20 + 1])
def test_a_huge_header_size_is_refused_without_room_for_it(tmp_path: Path, size: int) -> None:
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ArtefactError):
        outcome(tmp_path / "x", struct.pack("<Q", size) + b"{}")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def written(content: Any, tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    """A sound safetensors file with a header of ours that somebody else wrote."""
    return safetensors.torch.save(tensors or {}, metadata={"lens_unlearn": json.dumps(content)})


def test_headers_that_are_sound_but_not_ours_are_refused(tmp_path: Path) -> None:
    for data in [
        safetensors.torch.save({"a": torch.ones(2)}),
        safetensors.torch.save({"a": torch.ones(2)}, metadata={"format": "pt"}),
        *[written(content) for content in ([], "x", 3, None, {}, {"schema": "1"}, {"schema": None}, {"schema": 1})],
        written({"schema": 1, "kind": "intervention", "checksum": "0" * 64}),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 20000) + b'{"a":' + b"[" * 19995,
    ]:
        with pytest.raises(ArtefactError):
            outcome(tmp_path / "x", data)


def test_a_newer_schema_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "SCHEMA", artefacts.SCHEMA + 1)
        Ablate(random_selection({POST[0]: (64,)})).save(tmp_path / "x")
    with pytest.raises(ArtefactError, match=r"made by a newer lens_unlearn \(\d.*\): upgrade to read it"):
        load_intervention(tmp_path / "x")


def rewritten(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    artefacts.write(path, "intervention", tensors, {"intervention": header})
    return path


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"kind": "os.system"}, {}, "is not a kind of intervention this version knows"),
        ({"kind": "Ablate"}, {}, "is not a kind of intervention"),
        ({"kind": ["ablate"]}, {}, ""),
        ({}, {}, ""),
        ({"kind": "ablate", "value": 0.0}, {}, "at least one site"),
        (
            {"kind": "ablate", "value": 0.0},
            {"selection/L0.mlp.post": torch.tensor([2, 0], dtype=torch.uint8)},
            "other than 0 and 1",
        ),
        (
            {"kind": "ablate", "value": 0.0},
            {"selection/L0.mlp.post": torch.tensor([1.0, float("nan")])},
            "other than 0 and 1",
        ),
        ({"kind": "ablate", "value": 0.0}, {"selection/L0.mlp.post": torch.tensor([1, 0])}, "other than 0 and 1"),
        ({"kind": "ablate", "value": 0.0}, {"selection/L0.mlp.post": torch.zeros(2, dtype=torch.uint8)}, "empty"),
        ({"kind": "ablate", "value": 0.0}, {"selection/../../etc": torch.ones(2, dtype=torch.uint8)}, "is not a site"),
        (
            {"kind": "ablate", "value": float("nan")},
            {"selection/L0.mlp.post": torch.ones(2, dtype=torch.uint8)},
            "is not a number",
        ),
        (
            {"kind": "ablate", "value": "map"},
            {"selection/L0.mlp.post": torch.ones(2, dtype=torch.uint8)},
            "at least one site",
        ),
        (
            {"kind": "ablate", "value": "map"},
            {
                "selection/L0.mlp.post": torch.ones(2, dtype=torch.uint8),
                "value/L0.mlp.post": torch.tensor([0.0, float("nan")]),
            },
            "NaN or infinity",
        ),
        ({"kind": "ablate", "value": "zero"}, {"selection/L0.mlp.post": torch.ones(2, dtype=torch.uint8)}, ""),
        ({"kind": "ablate", "value": [0]}, {"selection/L0.mlp.post": torch.ones(2, dtype=torch.uint8)}, ""),
        (
            {"kind": "ablate", "value": 0.0},
            {"selection/L0.attn.z": torch.ones(2, 2, dtype=torch.uint8), "basis/L0.attn.z": torch.zeros(2, 2, 2)},
            "inverted",
        ),
        ({"kind": "chain", "members": [{"kind": "ablate", "value": 0.0}]}, {}, "at least one site"),
        ({"kind": "chain", "members": 3}, {}, ""),
        ({"kind": "chain"}, {}, ""),
    ],
)
def test_a_file_with_a_true_checksum_and_false_content_is_refused(
    tmp_path: Path, header: Any, tensors: Any, message: str
) -> None:
    with pytest.raises(ArtefactError, match=f"holds no intervention that can be used.*{message}"):
        load_intervention(rewritten(tmp_path / "x", header, tensors))


def test_a_deep_chain_is_read_or_refused(tmp_path: Path) -> None:
    header: Any = {"kind": "chain", "members": []}
    for _ in range(400):
        header = {"kind": "chain", "members": [header]}
    with contextlib.suppress(ArtefactError):
        load_intervention(rewritten(tmp_path / "x", header, {}))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    save_moments(tmp_path / "m", collect(tiny.model("gpt2"), tiny.corpus((4,)), progress=False))
    with pytest.raises(ArtefactError, match="holds 'moments', not 'intervention'"):
        load_intervention(tmp_path / "m")
    Ablate(random_selection({POST[0]: (64,)})).save(tmp_path / "i")
    with pytest.raises(ArtefactError, match="holds 'intervention', not 'moments'"):
        load_moments(tmp_path / "i")


# --- which model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny.build("gpt2", seed=9), r"weights: \w{32} in the file, \w{32} in this model$"),
        (lambda: tiny.model("gpt2-compat"), "processing: bridge in the file, bridge, compatibility mode in this model"),
        (lambda: tiny.model("neox"), "weights"),
        (
            lambda: tiny.to_bridge(tiny.hugging_face("gpt2").to(torch.bfloat16), "gpt2"),
            "dtype: float32 in the file, bfloat16 in this model",
        ),
    ],
    ids=["weights", "mode", "architecture", "dtype"],
)
def test_another_model_is_refused_naming_what_differs(tmp_path: Path, other: Any, message: str) -> None:
    Ablate(random_selection({POST[0]: (64,)})).save(tmp_path / "x", tiny.model("gpt2"))
    with pytest.raises(ArtefactError, match=message):
        load_intervention(tmp_path / "x", other())
    load_intervention(tmp_path / "x", tiny.model("gpt2"))
    load_intervention(tmp_path / "x")


def test_without_a_model_any_will_do(tmp_path: Path) -> None:
    Ablate(random_selection({POST[0]: (64,)})).save(tmp_path / "x")
    assert load_intervention(tmp_path / "x", tiny.model("neox"))


# --- writing and paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "os.fdopen", "os.chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    file, prune = tmp_path / "x", Ablate(random_selection({POST[0]: (64,)}))
    prune.save(file)
    before = file.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"lens_unlearn.core.artefacts.{where}", fail)
        with pytest.raises(ArtefactError if isinstance(error, OSError) else KeyboardInterrupt):
            (prune + prune).save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_has_ordinary_rights(tmp_path: Path) -> None:
    Ablate(random_selection({POST[0]: (64,)})).save(tmp_path / "x")
    (tmp_path / "y").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_paths_that_cannot_be_are_named(tmp_path: Path) -> None:
    prune = Ablate(random_selection({POST[0]: (64,)}))
    for path in (tmp_path / "no" / "x", tmp_path):
        with pytest.raises(ArtefactError, match="cannot be written"):
            prune.save(path)
    for path in (tmp_path / "x", tmp_path, "nul\0byte", tmp_path / "no" / "x"):
        with pytest.raises(ArtefactError, match="cannot be read"):
            load_intervention(path)
    with pytest.raises(ArtefactError, match="cannot be written"):
        prune.save("nul\0byte")


def test_of_a_link_the_target_is_written_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    prune = Ablate(random_selection({POST[0]: (64,)}))
    (tmp_path / "far").mkdir()
    for target in (tmp_path / "far" / "a", tmp_path / "far" / "new"):
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        (tmp_path / "far" / "a").write_text("old")
        prune.save(link)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert same(load_intervention(target), prune)
    assert sorted(os.listdir(tmp_path / "far")) == ["a", "new"]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to pipe").symlink_to(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in (
        tmp_path / "pipe",
        tmp_path / "link to pipe",
        Path("/dev/null"),
        tmp_path / "far",
        tmp_path / "circle",
    ):
        with pytest.raises(ArtefactError, match="cannot be written: "):
            prune.save(path)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_selection_of_the_model_is_what_is_saved(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    selection = selection_of(model, ["mlp.post", "attn.z"])
    Ablate(selection).save(tmp_path / "x", model)
    _, tensors = artefacts.read(tmp_path / "x")
    assert {name: int(t.sum()) for name, t in tensors.items()} == {
        f"selection/{site}": int(mask.sum()) for site, mask in selection.items()
    }


# --- every kind of file ------------------------------------------------------------------------------------------------

KINDS = list(fuzz_artefacts.KINDS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small file of every kind."""
    folder = tmp_path_factory.mktemp("sound") / "files"
    found = {name: path.read_bytes() for name, path in fuzz_artefacts.write_all(folder).items()}
    assert max(map(len, found.values())) < 4000
    return found


def read_and_written(name: str, data: bytes, folder: Path) -> bytes:
    fuzz_artefacts.KINDS[name].again(fuzz_artefacts.put(folder / "file", data), folder / "again")
    return (folder / "again").read_bytes()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_truncated_at_any_byte_is_refused(tmp_path: Path, sound: dict[str, bytes], name: str) -> None:
    assert read_and_written(name, sound[name], tmp_path) == sound[name]
    for end in range(len(sound[name])):
        with pytest.raises(ArtefactError):
            read_and_written(name, sound[name][:end], tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_with_any_byte_flipped_is_refused_or_means_the_same(
    tmp_path: Path, sound: dict[str, bytes], name: str
) -> None:
    harmless = 0
    for at in range(len(sound[name])):
        damaged = bytearray(sound[name])
        damaged[at] ^= (0x01, 0x20, 0x80, 0xFF)[at % 4]
        try:
            assert read_and_written(name, bytes(damaged), tmp_path) == sound[name], at
        except ArtefactError:
            continue
        harmless += 1
    assert harmless < 10


Parts = tuple[dict[str, Any], dict[str, torch.Tensor]]


def put(*way: Any) -> Callable[[Parts], None]:
    """Put the last of the arguments at the way in the header that the others are."""

    def change(parts: Parts) -> None:
        *steps, key, value = way
        at: Any = parts[0]
        for step in steps:
            at = at[step]
        at[key] = value

    return change


def inner(*way: Any) -> Callable[[Parts], None]:
    return put("intervention", *way)


def member(*way: Any) -> Callable[[Parts], None]:
    return put("intervention", "members", 0, *way)


def state(**values: Any) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[0]["state"] = json.dumps({**json.loads(parts[0]["state"]), **values})

    return change


def value(name: str, number: float, at: tuple[int, ...] = ()) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[1][name] = parts[1][name].clone()
        parts[1][name][at] = number

    return change


def tensor(name: str, other: Any) -> Callable[[Parts], None]:
    """Put another tensor in place of one, or what a function makes of it; None takes it away."""

    def change(parts: Parts) -> None:
        new = other(parts[1][name]) if callable(other) else other
        parts[1].pop(name, None)
        if new is not None:
            parts[1][name] = new.contiguous()

    return change


def moved(name: str, other: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[1][other] = parts[1].pop(name)

    return change


POST_, KEYS_, BOX = "selection/L0.mlp.post", "L0.mlp.post.keys", "L0.mlp.post"
NAN, INF = float("nan"), float("inf")
FALSE: dict[str, list[Callable[[Parts], None]]] = {
    "ablate": [
        *[inner("value", odd) for odd in (None, [], {}, "", "0.5", "map", NAN, INF, 1e300, 10**400, {"a": 1})],
        *[inner("kind", odd) for odd in (None, 3, [], {}, "Ablate", "os.system", "../ablate", "x" * 10_000, "\0")],
        inner("strength", 2.0),
        put("intervention", None),
        put("intervention", []),
        put("intervention", "ablate"),
        lambda parts: parts[0].pop("intervention"),
        *[moved(POST_, f"selection/{odd}") for odd in ("L00.mlp.post", "L٣.mlp.post", "L-1.mlp.post", "../../etc/passwd")],
        *[moved(POST_, odd) for odd in ("/etc/passwd", "selection", "selection/", "selection/L0.mlp.post/x", "value/L0.mlp.post")],
        moved(POST_, f"selection/L{'9' * 5000}.mlp.post"),
        tensor("else", torch.zeros(2)),
        tensor("value/L0.mlp.post", torch.zeros(3)),
        *[tensor(POST_, odd) for odd in (torch.tensor(1, dtype=torch.uint8), torch.ones(1, 3, 1, dtype=torch.uint8))],
        *[tensor(POST_, lambda t, d=d: t.to(d)) for d in (torch.bool, torch.int8, torch.int64, torch.float32, torch.float64)],
        value(POST_, 255, (0,)),
    ],
    "ablate-means": [
        *[value("value/L0.mlp.post", odd, (0,)) for odd in (NAN, INF, -INF)],
        *[tensor("value/L0.mlp.post", odd) for odd in (None, torch.zeros(2), torch.zeros(3, 1), torch.zeros(()))],
        inner("value", 0.0),
    ],
    "ablate-basis": [
        *[value("basis/L1.attn.z", odd, (0, 0, 0)) for odd in (NAN, INF)],
        tensor("basis/L1.attn.z", torch.zeros_like),
        tensor("basis/L1.attn.z", lambda t: t[:1]),
        tensor("basis/L1.attn.z", lambda t: t[0]),
    ],
    "adjust": [
        *[inner("rule", odd) for odd in (None, "", "Random", 3, [])],
        *[inner(name, odd) for name in ("seed", "floored") for odd in (None, 1.5, "3", "x", [], NAN, INF)],
        *[value(f"{name}/L0.mlp.post", odd, (0,)) for name in ("forget_std", "retain_std") for odd in (NAN, INF, 0.0, -1.0)],
        *[value(f"{name}/L0.mlp.post", odd, (2,)) for name in ("forget_mean", "retain_mean") for odd in (NAN, -INF)],
        tensor("forget_std/L0.mlp.post", None),
        tensor("forget_std/L0.mlp.post", torch.ones(4)),
        inner("more", 1),
    ],
    "abstain": [
        *[inner("vote", odd) for odd in (0, -1, 5, 10**30, 1.5, "2", None, NAN, INF, [])],
        *[inner("when", odd) for odd in ("", "never", None, 1, [])],
        *[inner("refusal", odd) for odd in (None, 3, [])],
        *[inner("rates", odd) for odd in (None, 3, "ab", [], {"detection": 3}, {"detection": [1]}, {"detection": ["a", 0, 0, 0]})],
        *[inner("rates", {"false_alarms": odd}) for odd in ([0, 0, 0, None], {}, "abcd", None)],
        *[inner("regions", odd) for odd in (None, {}, [], "ab", {BOX: {}}, {BOX: None}, {"../..": {}})],
        *[inner("regions", BOX, "shape", odd) for odd in (None, "", "Box", "sphere", 3, [], {}, "contrast")],
        *[inner("regions", BOX, "limit", odd) for odd in (None, "1.5", -1.0, NAN, -INF, [], {})],
        *[inner("regions", BOX, "k", odd) for odd in (None, "1.5", -1.0, NAN, [], {})],
        *[inner("regions", BOX, "floored", odd) for odd in (None, "1", 0.5, NAN, [], {})],
        inner("regions", BOX, "more", 1),
        *[value(f"centres/{BOX}", odd, (0, 0)) for odd in (NAN, INF)],
        *[value(f"scale/{BOX}", odd, (0,)) for odd in (NAN, INF, 0.0, -1.0)],
        *[value("other_scale/L3.mlp.post", odd, (0,)) for odd in (NAN, 0.0)],
        value("other_centre/L3.mlp.post", NAN, (0,)),
        *[tensor(f"centres/{BOX}", odd) for odd in (None, torch.zeros(0, 3), torch.zeros(3), torch.zeros(1, 4), torch.zeros(()))],
        tensor("other_scale/L3.mlp.post", torch.ones(2)),
        moved(f"scale/{BOX}", "scale/L00.mlp.post"),
        moved(f"scale/{BOX}", f"scale/x/{BOX}"),
        tensor(f"more/{BOX}", torch.ones(3)),
        tensor("scale/L7.mlp.post", torch.ones(3)),
    ],
    "delta": [
        *[inner("strength", odd) for odd in (None, "2", NAN, INF, 10**400, [], {})],
        *[inner("record", odd) for odd in (None, 3, "ab", [1], [["a", 1]])],
        inner("more", 1),
        *[value(f"L0.{name}/value", odd, (0, 0)) for name in ("W_out", "W_in") for odd in (NAN, INF, -INF)],
        *[value(f"L1.W_Q/{name}", NAN, (0, 0)) for name in ("value", "right")],
        *[value(f"L0.{name}", odd, (0,)) for name in ("W_out/rows", "W_in/columns") for odd in (-1, -(2**62))],
        value("L0.W_out/rows", 0, (0,)),
        *[tensor("L0.W_out/rows", lambda t, d=d: t.to(d)) for d in (torch.float32, torch.bool, torch.uint8, torch.int8)],
        *[tensor("L0.W_out/rows", odd) for odd in (torch.tensor([1]), torch.tensor([[0, 1]]), torch.tensor(1))],
        *[tensor("L1.W_O/value", odd) for odd in (torch.zeros(3), torch.zeros(2, 3, 1), torch.zeros(2, 3).long())],
        tensor("L1.W_Q/right", torch.zeros(2, 4)),
        tensor("L1.W_Q/rows", torch.tensor([0, 1, 2])),
        *[moved("L1.W_O/value", odd) for odd in ("L01.W_O/value", "L1.W_E/value", "L-1.W_O/value", "L1.W_O", "W_O/value")],
        *[moved("L1.W_O/value", odd) for odd in ("L1.W_O/values", "L1.W_O/value/x", "../x/value", "nul\0byte/value")],
    ],
    "chain": [
        *[inner("members", odd) for odd in (None, 3, "ab", {}, [None], [[]], ["chain"], [{}], {"0": {"kind": "chain"}})],
        inner("members", []),
        lambda parts: parts[0]["intervention"].pop("members"),
        member("kind", "chain"),
        member("value", NAN),
        *[moved(f"0/{POST_}", odd) for odd in (POST_, f"00/{POST_}", f"٠/{POST_}", f"-1/{POST_}", f"7/{POST_}", f"/0/{POST_}")],
    ],
    "moments": [
        *[put("extra", odd) for odd in (None, "sqrt", [], ["sqrt"], ["os"], [["sqrt"]], 3, {})],
        *[put("provenance", odd) for odd in (None, 3, "ab", [1])],
        put("more", 1),
        *[value(f"{BOX}.moments", odd, (row, 0)) for row in range(8) for odd in (NAN, INF)],
        *[value(f"{BOX}.moments", odd, (4, 0)) for odd in (-1.0, 4.0)],
        value(f"{BOX}.moments", -1.0, (3, 0)),
        *[value(f"{BOX}.count", odd) for odd in (0, -1, -(2**63))],
        *[tensor(f"{BOX}.count", odd) for odd in (None, torch.tensor(3.0), torch.tensor(NAN), torch.tensor(INF), torch.ones(2))],
        *[tensor(f"{BOX}.moments", odd) for odd in (None, torch.zeros(7, 3).double(), torch.zeros(8).double(), torch.zeros(()))],
        *[tensor(f"{BOX}.moments", odd) for odd in (torch.zeros(8, 0).double(), torch.zeros(8, 0, 2**40).double())],
        *[tensor(f"{BOX}.moments", lambda t, d=d: t.to(d)) for d in (torch.float32, torch.int64, torch.bool)],
        *[moved(f"{BOX}.moments", odd) for odd in ("L00.mlp.post.moments", "moments", "L0.mlp.post.other", "../x.moments")],
        tensor("L0.mlp.pre.count", torch.tensor(3)),
    ],
    "collect-moments": [
        *[put("batches", odd) for odd in (None, -1, 1.5, "2", True, NAN, INF, [])],
        *[put("settings", odd) for odd in (None, [], "ab", {})],
        value(f"{BOX}.count", 0),
        tensor(f"{BOX}.count", torch.tensor(INF)),
        tensor(f"{BOX}.histogram", torch.zeros(3, 4)),
    ],
    "collect-keys": [
        *[value(KEYS_, odd, (0, 0)) for odd in (NAN, INF)],
        *[tensor(KEYS_, odd) for odd in (None, torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), torch.zeros(3, 3).double())],
        *[tensor(f"{BOX}.ids", odd) for odd in (None, lambda t: t.flip(1), lambda t: t[:2], lambda t: t.double(), torch.tensor(3))],
        tensor(f"{BOX}.ids", lambda t: t[:, [0, 0, 1]]),
        tensor(f"{BOX}.more", torch.zeros(3)),
        moved(KEYS_, "L00.mlp.post.keys"),
    ],
    "collect-histogram": [
        value(f"{BOX}.histogram", -1, (0, 0)),
        *[tensor(f"{BOX}.histogram", odd) for odd in (lambda t: t.double(), lambda t: t[:, :3], lambda t: t[0], torch.tensor(3))],
        moved(f"{BOX}.histogram", "L0.nothing.histogram"),
        moved(f"{BOX}.histogram", "histogram"),
    ],
    "simu-sophia": [
        *[put("state", odd) for odd in (None, 3, "", "[]", "{}", "{", "[" * 5000, {})],
        *[state(step=odd) for odd in (-1, 10, 1.5, "2", None, NAN)],
        *[state(trajectory=odd) for odd in (None, {}, "ab", [1], [{}], [{"step": "1"}], [{"step": 1, "forget": "x"}])],
        *[state(checks=odd) for odd in (None, 3, [None], [{"step": 1, "forget": None}])],
        *[state(best_check=odd) for odd in (None, [], {"forget": 0.5}, {"step": 1, "forget": []})],
        state(stopped=3),
        *[state(**{name: odd}) for name in ("options", "model", "_step", "__class__", "sophia", "aim") for odd in (None, {})],
        *[put("settings", odd) for odd in (None, {}, {"model": 3})],
        *[value(f"{part}/0", NAN, (0, 0)) for part in ("trained", "best", "previous")],
        *[tensor("trained/0", odd) for odd in (None, torch.zeros(3, 2), torch.zeros(1, 1), torch.zeros(()))],
        tensor("trained/0", torch.zeros(2, 3).double()),
        *[tensor("optimizer/m/0", odd) for odd in (None, torch.zeros(1, 3), torch.zeros(2, 3).long())],
        *[moved("trained/0", odd) for odd in ("trained/1", "trained/00", "trained", "../0", "trained/-1", "model/0")],
        tensor("optimizer/x/0", torch.zeros(2, 3)),
    ],
    "simu-adamw": [
        *[tensor(f"optimizer/0/{name}", None) for name in ("step", "exp_avg", "exp_avg_sq")],
        tensor("optimizer/0/step", torch.zeros(2, 3)),
        tensor("optimizer/0/exp_avg", torch.zeros(2)),
        tensor("optimizer/0/lr", torch.zeros(2, 3)),
        tensor("optimizer/1/exp_avg", torch.zeros(2, 3)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE)
def test_a_true_checksum_over_false_content_is_no_way_in(tmp_path: Path, sound: dict[str, bytes], name: str) -> None:
    for number, change in enumerate(FALSE[name]):
        parts = fuzz_artefacts.taken_apart(sound[name])
        change(parts)
        data = fuzz_artefacts.sealed(*parts)
        assert data != sound[name]
        try:
            again = read_and_written(name, data, tmp_path)
        except ArtefactError as error:
            again = sound[name] if len(str(error)) < 1500 else b"a message that fills the screen"
        if again != sound[name]:
            pytest.fail(f"case {number} of {name} was read: {fuzz_artefacts.taken_apart(again)}")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64])
def test_types_that_are_never_written_are_refused(
    tmp_path: Path, sound: dict[str, bytes], name: str, dtype: torch.dtype
) -> None:
    content, tensors = fuzz_artefacts.taken_apart(sound[name])
    for key in tensors:
        changed = {**tensors, key: tensors[key].to(dtype)}
        with pytest.raises(ArtefactError, match="is not a lens_unlearn file"):
            read_and_written(name, fuzz_artefacts.sealed(content, changed), tmp_path)


def test_rows_beyond_a_matrix_are_refused_by_the_model(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    for rows in ([64], [2**62], [0, 63, 64]):
        Delta({Matrix(0, "W_out"): Update(torch.ones(len(rows), 32), torch.tensor(rows))}).save(tmp_path / "x", model)
        with (
            pytest.raises(SelectionError, match="the last in this model is 63"),
            load_intervention(tmp_path / "x").on(model),
        ):
            pass


# --- crafted headers -----------------------------------------------------------------------------------------------------


def crafted(entries: dict[str, Any] | bytes, body: bytes = b"", **metadata: Any) -> bytes:
    """A safetensors file with our header, and with entries that no library would write."""
    content = {
        "kind": "intervention",
        "lens_unlearn": "0",
        "intervention": {"kind": "chain", "members": []},
        "schema": 1,
    }
    text = json.dumps({**content, "checksum": artefacts._checksum({}, content), **metadata})
    if isinstance(entries, bytes):
        return fuzz_artefacts.raw(entries.replace(b"HEADER", json.dumps(text).encode()), body)
    return fuzz_artefacts.raw({"__metadata__": {"lens_unlearn": text}, **entries}, body)


def entry(dtype: Any = "U8", shape: Any = (4,), at: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at, **more}


FOUR = b"\1\0\1\0"
HEADERS: dict[str, bytes] = {
    "overlap": crafted({"a": entry(), "b": entry()}, FOUR),
    "overlap in part": crafted({"a": entry(), "b": entry(at=(2, 6))}, FOUR * 2),
    "hole": crafted({"a": entry(), "b": entry(at=(8, 12))}, FOUR * 3),
    "hole at the start": crafted({"a": entry(at=(4, 8))}, FOUR * 2),
    "bytes behind": crafted({"a": entry()}, FOUR * 2),
    "bytes lacking": crafted({"a": entry()}, FOUR[:2]),
    "backwards": crafted({"a": entry(at=(4, 0))}, FOUR),
    "negative": crafted({"a": entry(at=(-4, 0))}, FOUR),
    "fractions": crafted({"a": entry(shape=(4.0,), at=(0.0, 4.0))}, FOUR),
    "text for numbers": crafted({"a": entry(shape=("4",), at=("0", "4"))}, FOUR),
    "huge shape": crafted({"a": entry(shape=(2**40,))}, FOUR),
    "overflowing shape": crafted({"a": entry("F64", (2**32, 2**32))}, FOUR),
    "shape that wraps to 4": crafted({"a": entry(shape=(2**62, 4, 1))}, FOUR),
    "shape of 2**64": crafted({"a": entry(shape=(2**64,), at=(0, 2**64))}, FOUR),
    "offsets of 1e400": crafted(
        b'{"__metadata__":{"lens_unlearn":HEADER},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,1e400]}}', FOUR
    ),
    "no dimension": crafted({"a": entry(shape=())}, FOUR),
    "zero and huge": crafted({"a": entry(shape=(0, 2**62), at=(0, 0))}),
    "two zeros and huge": crafted({"a": entry(shape=(2**40, 0, 2**40), at=(0, 0))}),
    "a thousand dimensions": crafted({"a": entry(shape=(1,) * 999 + (4,))}, FOUR),
    "unknown type": crafted({"a": entry("PICKLE")}, FOUR),
    "type of another size": crafted({"a": entry("F64")}, FOUR),
    "truth that is neither": crafted({"a": entry("BOOL")}, b"\7\0\1\0"),
    "entry is null": crafted({"a": None}, FOUR),
    "entry without offsets": crafted({"a": {"dtype": "U8", "shape": [4]}}, FOUR),
    "entry with more": crafted({"a": entry(code="os.system")}, FOUR),
    "one offset": crafted({"a": entry(at=(4,))}, FOUR),
    "tensor unknown to the checksum": crafted({"a": entry()}, FOUR),
    "metadata twice": crafted(b'{"__metadata__":{"lens_unlearn":HEADER},"__metadata__":{"lens_unlearn":HEADER}}'),
    "header twice": crafted(b'{"__metadata__":{"lens_unlearn":HEADER,"lens_unlearn":HEADER}}'),
    "tensor twice": crafted(
        b'{"__metadata__":{"lens_unlearn":HEADER},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        FOUR,
    ),
    "metadata of numbers": crafted(b'{"__metadata__":{"lens_unlearn":3}}'),
    "metadata is a list": crafted(b'{"__metadata__":["lens_unlearn"]}'),
    "no metadata": crafted(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR),
    "kind twice": crafted(b"{}").replace(b"{}", b'{"__metadata__":{"lens_unlearn":"{\\"schema\\":1,\\"schema\\":1}"}}'),
    "not UTF-8": crafted(b'{"__metadata__":{"lens_unlearn":HEADER},"\xff":{}}'),
    "UTF-16": fuzz_artefacts.raw(b"{\0" + '"a":1}'.encode("utf-16-le")),
    "ends early": fuzz_artefacts.raw(b'{"__metadata__":{'),
    "schema 0": crafted({}, schema=0),
    "schema -1": crafted({}, schema=-1),
    "schema true": crafted({}, schema=True),
    "schema 1.0": crafted({}, schema=1.0),
    "schema 1e400": crafted({}, schema=10**400),
    "kind is a list": crafted({}, kind=["intervention"]),
    "version is a number": crafted({}, lens_unlearn=3),
    "checksum is null": crafted({}, checksum=None),
    "checksum of others": crafted({}, checksum="0" * 64),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_crafted_headers_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtefactError):
        outcome(tmp_path / "x", HEADERS[name])
    assert (
        load_intervention(fuzz_artefacts.put(tmp_path / "sound", crafted({}))).members == ()
    )  # it is not the rest that is refused


def test_the_end_of_a_file_is_looked_at_before_the_file_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte costs whoever sends it nothing."""
    with open(tmp_path / "x", "wb") as file:
        file.write(crafted({"a": entry()}, FOUR))
        file.truncate(2**40)
    with pytest.raises(ArtefactError, match="is not a lens_unlearn file"):
        load_intervention(tmp_path / "x")
    data = crafted({"a": entry(shape=(2**40,), at=(0, 2**40))})
    with open(tmp_path / "y", "wb") as file:  # says itself that it is so large
        file.write(data)
        file.truncate(len(data) + 2**40)
    with pytest.raises(ArtefactError, match="does not fit into memory|is not a lens_unlearn file"):
        load_intervention(tmp_path / "y")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(ArtefactError, match="cannot be read: it is not a regular file"):
        load_intervention(tmp_path / "x")


# --- memory, time, and what runs -----------------------------------------------------------------------------------------

ROOM = artefacts.MAX_HEADER - 2000


def swelling() -> dict[str, Callable[[], bytes]]:
    """Files of a few megabytes whose headers would take a hundred times as much, or hours."""
    within = artefacts.MAX_VALUES - 100
    about = {"schema": 1, "kind": "intervention", "lens_unlearn": "0"}

    def sealed(header: Any, tensors: dict[str, torch.Tensor] | None = None) -> bytes:
        return fuzz_artefacts.sealed({**about, "intervention": header}, tensors or {})

    empty = {"kind": "chain", "members": []}
    names = [f"{n}/selection/L0.mlp.post" for n in range(within // 20)]
    regions = {f"L{n}.mlp.post": {"shape": "box", "limit": 1.0, "k": 1.0, "floored": 0} for n in range(within // 52)}
    parts = {
        f"{part}/{site}": torch.ones(1, 1)[:, 0] if part == "scale" else torch.ones(1, 1)
        for site in regions
        for part in ("scale", "centres")
    }
    deep: Any = empty
    for _ in range(95):
        deep = {"kind": "chain", "members": [deep]}
    return {
        "lists": lambda: fuzz_artefacts.raw(b'{"a":[' + b"[]," * (ROOM // 3) + b"0]}"),
        "lists inside": lambda: crafted(b'{"__metadata__":{"lens_unlearn":"[' + b"[]," * (ROOM // 3) + b'0]"}}'),
        "hidden lists": lambda: crafted(b'{"__metadata__":{"lens_unlearn":"[' + b"\\u005b]\\u002c" * (ROOM // 13) + b'0]"}}'),
        "small numbers": lambda: fuzz_artefacts.raw(b'{"a":[' + b"7," * (ROOM // 2) + b"0]}"),
        "most lists": lambda: fuzz_artefacts.raw(b'{"a":[' + b"[]," * (within // 2) + b"0]}"),
        "most objects": lambda: fuzz_artefacts.raw(
            b'{"a":[' + b",".join(b'{"%x":%d}' % (n, 1000 + n) for n in range(within // 2)) + b"]}"
        ),
        "most objects inside": lambda: sealed({"kind": "chain", "members": [{f"{n:x}": 1000 + n} for n in range(within // 3)]}),
        "most names": lambda: crafted(b'{"__metadata__":{' + b",".join(b'"%x":"%x"' % (n, n) for n in range(within)) + b"}}"),
        "one long text": lambda: sealed({"kind": "\U0001f600" + "x" * (ROOM - 100)}),
        "long name": lambda: sealed({"kind": "ablate", "value": 0.0}, {"selection/" + "x" * (ROOM // 2): torch.ones(1)}),
        "many tensors": lambda: sealed(empty, {f"{n:x}": torch.zeros(0) for n in range(within // 14)}),
        "many members": lambda: sealed({"kind": "chain", "members": [empty] * (within // 4)}),
        "many members with tensors": lambda: sealed(
            {"kind": "chain", "members": [{"kind": "ablate", "value": 0.0}] * len(names)},
            {name: torch.ones(1, dtype=torch.uint8) for name in names},
        ),
        "many regions": lambda: sealed(
            {"kind": "abstain", "vote": 1, "when": "prompt", "refusal": "", "rates": {}, "regions": regions}, parts
        ),
        "deep chain": lambda: sealed(deep),
        "deeper chain": lambda: sealed({"kind": "chain", "members": [deep, deep]}),
        "too deep": lambda: crafted(b'{"__metadata__":{"lens_unlearn":"' + b"[" * (within - 10) + b'"}}'),
        "too deep for words": lambda: fuzz_artefacts.raw(b'{"a":' + b"[" * (within - 10)),
        "many tiny dimensions": lambda: crafted({"a": entry(shape=(1,) * (within - 20))}, b"\1"),
        "long number": lambda: crafted(b'{"__metadata__":{"lens_unlearn":"{\\"schema\\":' + b"9" * (ROOM - 100) + b'}"}}'),
        "says 100 MB": lambda: struct.pack("<Q", 100 * 2**20) + b'{"a":1}',
        "says 100 MB of tensors": lambda: crafted({"a": entry(shape=(100 * 2**20,), at=(0, 100 * 2**20))}, FOUR),
    }  # fmt: skip


WATCHED = """
import json, re, sys, time
from pathlib import Path
from lens_unlearn.interventions.files import load_intervention
from lens_unlearn.core.errors import ArtefactError

def once(path):
    try:
        load_intervention(path)
        return "read"
    except ArtefactError:
        return "refused"

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

good, *files = sys.argv[1:]
assert once(good) == "read"  # everything that is imported late is there
seen, results, listening = set(), {}, False
def note(event, given):
    if listening:
        seen.add(event if event != "open" or given[1] in ("r", "rb") else f"open {given[1]}")
sys.addaudithook(note)
for path in files:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, begin, listening = status("VmRSS"), time.process_time(), True
    ended = once(path)
    listening = False
    results[Path(path).name] = [ended, time.process_time() - begin, status("VmHWM") - before]
print(json.dumps([results, sorted(seen)]))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, sound: dict[str, bytes]) -> Any:
    """Read sound and hostile files in a process of their own: how each ended, seconds, megabytes; and what ran."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process' memory is read from /proc, which this machine has not")
    folder = tmp_path_factory.mktemp("watched")
    files = {**{name: make() for name, make in swelling().items()}, **HEADERS}
    files |= {name: data for name, data in sound.items() if name != "ablate"}
    files |= {"pickle": pickle.dumps(Bomb()), "zip": archive(pickle.dumps(Bomb())), "torch.save": torch_file()}
    paths = [fuzz_artefacts.put(folder / name.replace("/", "_"), data) for name, data in files.items()]
    good = fuzz_artefacts.put(folder / "good", sound["ablate"])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(good), *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_memory_and_time_are_bounded(watched: Any) -> None:
    results, _ = watched
    assert max(megabytes for _, _, megabytes in results.values()) < 64 + artefacts.MAX_HEADER / 2**20, results
    assert max(seconds for _, seconds, _ in results.values()) < 8, results
    read = {"deep chain", "deeper chain", "many members", "many members with tensors", "many regions"}
    assert {name for name in swelling() if results[name][0] == "read"} <= read
    assert results["deep chain"][0] == "read"


def test_reading_opens_a_file_and_does_nothing_else(watched: Any) -> None:
    _, events = watched
    allowed = {"open", "os.stat", "object.__getattr__", "object.__setattr__", "sys._getframe", "code.__new__"}
    assert set(events) <= allowed, events


def test_a_deep_chain_that_is_read_can_be_used(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    chain: Intervention = Ablate(random_selection({POST[0]: (64,)}))
    for _ in range(90):
        chain = Chain((chain,))
    chain.save(tmp_path / "x", model)
    again = load_intervention(tmp_path / "x", model)
    assert torch.equal(under(model, again), under(model, chain))
    for _ in range(20):
        chain = Chain((chain,))
    with pytest.raises(ArtefactError, match="cannot be written, since it could not be read again: .*200 deep"):
        chain.save(tmp_path / "y", model)


def test_nothing_imports_by_a_name_from_a_file() -> None:
    """Beside what `test_layout` refuses, the other ways to the same; by hand: these import what stands in their own source."""
    import lens_unlearn

    root = Path(lens_unlearn.__file__).parent
    forbidden = {
        "__import__",
        "import_module",
        "spec_from_file_location",
        "Unpickler",
        "read_pickle",
        "run_path",
        "run_module",
    }
    known = {"__init__.py", "demo/_english.py", "evaluation/code_process.py"}
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in forbidden or path.relative_to(root).as_posix() in known, path
                assert ast.unparse(node.func) not in (
                    "builtins.eval",
                    "builtins.exec",
                    "torch.jit.load",
                    "torch.hub.load",
                ), path
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization", "builtins"):
                assert not {alias.name for alias in node.names} & {"load", "eval", "exec", "serialization"}, path


# --- golden files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_files_of_the_first_schema_are_still_read(tmp_path: Path, sound: dict[str, bytes], name: str) -> None:
    """Kept as they were written; `python tests/fuzz_artefacts.py --write-golden` writes those of a new schema."""
    golden = (fuzz_artefacts.GOLDEN / f"{name}.safetensors").read_bytes()
    assert fuzz_artefacts.taken_apart(golden)[0]["schema"] == 1
    assert read_and_written(name, golden, tmp_path) == read_and_written(name, sound[name], tmp_path)


def test_there_is_a_golden_file_of_every_kind() -> None:
    assert {path.stem for path in fuzz_artefacts.GOLDEN.iterdir()} == set(KINDS)
    assert max(path.stat().st_size for path in fuzz_artefacts.GOLDEN.iterdir()) < 4000


# --- other processes -----------------------------------------------------------------------------------------------------


def test_another_process_writes_the_same_bytes(tmp_path: Path, sound: dict[str, bytes]) -> None:
    script = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import fuzz_artefacts; "
    script += "fuzz_artefacts.write_all(Path(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[1] / "helpers"), str(tmp_path / "files")],
        env={**os.environ, "PYTHONHASHSEED": "31337"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem: path.read_bytes() for path in (tmp_path / "files").iterdir()} == sound


WRITER = """
import sys, time
import torch
from lens_unlearn.core import artefacts
print("ready", flush=True)
end = time.monotonic() + 1
while time.monotonic() < end:
    artefacts.write(sys.argv[1], "thing", {"t": torch.full((40_000,), 2)}, {"mark": 2})
"""


def test_two_processes_that_write_one_path_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    seen = set()
    while writer.poll() is None:
        artefacts.write(path, "thing", {"t": torch.full((40_000,), 1)}, {"mark": 1})
        for _ in range(5):
            header, tensors = artefacts.read(path, "thing")
            assert bool((tensors["t"] == header["mark"]).all())
            seen.add(header["mark"])
    writer.stdout.close()
    assert writer.returncode == 0
    assert seen == {1, 2}
    assert os.listdir(tmp_path) == ["x"]


# --- what is written can be read -----------------------------------------------------------------------------------------


def test_a_header_too_large_to_be_read_is_not_written(tmp_path: Path) -> None:
    prune = Ablate(random_selection({POST[0]: (64,)}))
    artefacts.write(tmp_path / "x", "thing", {}, {"a": list(range(artefacts.MAX_VALUES - 10))})
    artefacts.read(tmp_path / "x")
    for content in (list(range(artefacts.MAX_VALUES)), "x" * artefacts.MAX_HEADER):
        with pytest.raises(ArtefactError, match="cannot be written, since it could not be read again"):
            artefacts.write(tmp_path / "y", "thing", {}, {"a": content})
    with pytest.raises(ArtefactError, match="bytes of header"):
        prune.save(tmp_path / "y", note="n" * artefacts.MAX_HEADER)
    assert os.listdir(tmp_path) == ["x"]


def test_numbers_as_keys_of_a_record_come_back_as_text(tmp_path: Path) -> None:
    delta = Delta({Matrix(0, "W_out"): Update(torch.ones(2, 2))}, record={"by step": {2: 0.5, 10: 0.25}})
    delta.save(tmp_path / "x")
    again = load_intervention(tmp_path / "x")
    assert isinstance(again, Delta)
    assert again.record == {"by step": {"2": 0.5, "10": 0.25}}


def test_tensors_that_share_their_values_are_written_as_two(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    artefacts.write(tmp_path / "x", "thing", {"a": whole, "b": whole, "c": whole[:3], "d": whole[3:]}, {})
    _, tensors = artefacts.read(tmp_path / "x")
    assert {name: len(t) for name, t in tensors.items()} == {"a": 6, "b": 6, "c": 3, "d": 3}
    assert torch.equal(torch.cat([tensors["c"], tensors["d"]]), whole)


def test_a_short_fuzz_run_finds_nothing() -> None:
    counts = fuzz_artefacts.fuzz(250)
    refused = sum(count for ended, count in counts.items() if ended.endswith("Error"))
    assert sum(counts.values()) >= 250
    assert refused > 150
    assert any(ended.endswith("read") for ended in counts)


# --- a file that knows no model ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_a_file_without_a_model_says_what_follows_when_it_is_written_and_when_it_is_read(tmp_path: Path) -> None:
    model, edit = tiny.model("gpt2"), Ablate(random_selection({POST[0]: (64,)}))
    moments = collect(model, tiny.corpus((4,)), progress=False)
    follows = r": any model of the right shape is accepted; save it together with the model, as in save\(path, model\)$"
    kinds = [(edit.save, load_intervention), (lambda path, *models: save_moments(path, moments, *models), load_moments)]
    for save, load in kinds:
        path = tmp_path / "it"
        with pytest.warns(UserWarning, match=f"^{path} will not know its model{follows}"):
            save(path)
        for models in ((), (model,), (tiny.model("gpt2-compat"),)):
            with pytest.warns(UserWarning, match=f"^{path} does not know its model{follows}"):
                load(path, *models)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save(path, model)
            load(path, model)
            load(path)
