"""Files: what goes in comes out, whatever was altered is refused, and reading never runs anything."""

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_interventions import POST, Z, random_selection, selection_of, under

import lens_unlearn.artefacts as artefacts
from lens_unlearn.errors import ArtefactError
from lens_unlearn.interventions import Ablate, Chain, Intervention, load_intervention
from lens_unlearn.maps import NeuronMap
from lens_unlearn.methods.attention import ov_basis
from lens_unlearn.sites import Site

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
    ("header", "tensors", "told"),
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
    tmp_path: Path, header: Any, tensors: Any, told: str
) -> None:
    with pytest.raises(ArtefactError, match=f"holds no intervention that can be used.*{told}"):
        load_intervention(rewritten(tmp_path / "x", header, tensors))


def test_a_deep_chain_is_read_or_refused(tmp_path: Path) -> None:
    header: Any = {"kind": "chain", "members": []}
    for _ in range(400):
        header = {"kind": "chain", "members": [header]}
    with contextlib.suppress(ArtefactError):
        load_intervention(rewritten(tmp_path / "x", header, {}))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    from lens_unlearn.collecting import collect, load_moments, save_moments

    save_moments(tmp_path / "m", collect(tiny.model("gpt2"), tiny.corpus((4,)), progress=False))
    with pytest.raises(ArtefactError, match="holds 'moments', not 'intervention'"):
        load_intervention(tmp_path / "m")
    Ablate(random_selection({POST[0]: (64,)})).save(tmp_path / "i")
    with pytest.raises(ArtefactError, match="holds 'intervention', not 'moments'"):
        load_moments(tmp_path / "i")


# --- which model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: tiny.build("gpt2", seed=9), r"weights: \w{16} in the file, \w{16} in this model$"),
        (lambda: tiny.model("gpt2-compat"), "processing: bridge in the file, bridge, compatibility mode in this model"),
        (lambda: tiny.model("neox"), "weights"),
        (
            lambda: tiny.to_bridge(tiny.hugging_face("gpt2").to(torch.bfloat16), "gpt2"),
            "dtype: float32 in the file, bfloat16 in this model",
        ),
    ],
    ids=["weights", "mode", "architecture", "dtype"],
)
def test_another_model_is_refused_naming_what_differs(tmp_path: Path, other: Any, told: str) -> None:
    Ablate(random_selection({POST[0]: (64,)})).save(tmp_path / "x", tiny.model("gpt2"))
    with pytest.raises(ArtefactError, match=told):
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
        patch.setattr(f"lens_unlearn.artefacts.{where}", fail)
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


def test_selection_of_the_model_is_what_is_saved(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    selection = selection_of(model, ["mlp.post", "attn.z"])
    Ablate(selection).save(tmp_path / "x", model)
    _, tensors = artefacts.read(tmp_path / "x")
    assert {name: int(t.sum()) for name, t in tensors.items()} == {
        f"selection/{site}": int(mask.sum()) for site, mask in selection.items()
    }
