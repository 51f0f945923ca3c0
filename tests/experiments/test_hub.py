"""Sharing on the hub: `huggingface_hub` itself talks to a small server here that keeps what it is sent."""

import base64
import hashlib
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import tiny
import torch
from command_line_helpers import call
from interventions_helpers import one, unchanged

import lens_unlearn as lu
from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.experiments.output import write_settings
from lens_unlearn.model.host import versions

DATA = Path(__file__).parents[1] / "data"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories as folders of bytes, behind the few addresses of the hub's interface that are used."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.refuse: int = 0
        self.public: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"POST {self.path}")
        if self.server.refuse:
            return self.answer({"error": "you may not"}, self.server.refuse)
        if self.path == "/api/repos/create":
            options = json.loads(body)
            name = "/".join(filter(None, (options.get("organization"), options["name"])))
            if name not in self.server.repos and options.get("visibility") != "private":
                self.server.public.add(name)
            self.server.repos.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}", "name": name})
        if self.path.startswith("/api/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", self.path):
            return self.answer({})
        found = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/(.+)", self.path)
        if found is None or found[1] not in self.server.repos:
            return self.answer({"error": "there is none"}, 404)
        if found[2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.address}/{found[1]}/commit/{COMMIT}"
        return self.answer({"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/(.+?)/(tree|revision)/[^/]+", path):
            files = self.server.repos.get(found[1])
            if files is None:
                return self.answer({"error": "no repository"}, 404, {"X-Error-Code": "RepoNotFound"})
            about = {"id": found[1], "sha": COMMIT, "siblings": [], "private": found[1] not in self.server.public}
            listed = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            return self.answer(listed if found[2] == "tree" else about)
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            data = self.server.repos.get(found[1], {}).get(found[3])
            if data is None:
                return self.answer(
                    {"error": "no file"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                )
            tag = hashlib.sha256(data).hexdigest()
            return self.answer(data, headers={"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        return self.answer({"error": "nothing is here"}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(hub_constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_was_pushed_comes_back_the_same(hub: Hub) -> None:
    model = tiny.model("gpt2")
    edit = one("gpt2", "mean") + one("gpt2", "deterministic")
    url = lu.push_to_hub(edit, "somebody/no-skill", model=model, name="both", token="hf_x")
    assert url.endswith(COMMIT)
    assert set(hub.repos["somebody/no-skill"]) == {"both.safetensors", "README.md"}
    back = lu.load_intervention("hf:somebody/no-skill/both.safetensors", model)
    with edit.on(model):
        expected = tiny.logits(model)
    with back.on(model):
        assert torch.equal(tiny.logits(model), expected)
    assert repr(lu.load_intervention("hf:somebody/no-skill", model)) == repr(edit)  # its only file
    lu.load_intervention("hf:somebody/no-skill@v1/both.safetensors", model)
    assert any("/resolve/v1/" in asked for asked in hub.asked)
    with pytest.raises(ArtefactError, match="does not belong to this model"):
        lu.load_intervention("hf:somebody/no-skill", tiny.model("llama"))


def test_the_card_says_what_it_is_and_how_to_use_it(hub: Hub) -> None:
    lu.push_to_hub(one("gpt2", "zero"), "somebody/a", model=tiny.model("gpt2"), token="hf_x")
    card = hub.repos["somebody/a"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: lens_unlearn\n")
    assert 'lu.load_intervention("hf:somebody/a/intervention.safetensors", model)' in card
    assert "Ablate(" in card
    assert f"weights {lu.fingerprint(tiny.model('gpt2'))['weights']} |" in card


def test_the_folder_of_a_run_is_pushed_with_what_was_measured(hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    one("gpt2", "zero").save(run / "selective-pruning.safetensors", tiny.model("gpt2"))
    one("gpt2", "mean").save(run / "other.safetensors", tiny.model("gpt2"))
    (run / "metrics.csv").write_text(
        "condition,corpus,metric,value,low,high,n\nbase,forget,top1,0.5,0.4,0.6,100\nbase,forget,kl,0,0,0,100\n"
    )
    own = ("selective-pruning.safetensors", "other.safetensors", "metrics.csv")
    write_settings(run, {"versions": versions()}, own)
    for other in ("private.txt", "mine.csv", "notes.json", "page.html"):
        (run / other).write_text("mine")
    one("gpt2", "zero").save(run / "not-of-the-run.safetensors", tiny.model("gpt2"))
    (tmp_path / "secret.json").write_text("secret")
    (run / "settings.json").symlink_to(tmp_path / "secret.json")
    lu.push_to_hub(run, "somebody/run", token="hf_x")
    assert not hub.public, "private unless asked otherwise"
    files = hub.repos["somebody/run"]
    assert set(files) == {"selective-pruning.safetensors", "other.safetensors", "metrics.csv", "run.json", "README.md"}
    assert "| base | forget | top1 | 0.500 | 0.400 to 0.600 |" in files["README.md"].decode()
    with pytest.raises(ArtefactError, match=r"name one of its 2 .safetensors files: other.safetensors, selective"):
        artefacts.read("hf:somebody/run")
    lu.push_to_hub(run / "other.safetensors", "somebody/one", revision="trial", token="hf_x")
    assert set(hub.repos["somebody/one"]) == {"other.safetensors", "README.md"}
    assert "POST /api/models/somebody/one/commit/trial" in hub.asked


def test_a_link_in_place_of_a_runs_file_is_never_followed(hub: Hub, tmp_path: Path) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret"
    (run / "python").mkdir(parents=True)
    secret.mkdir()
    for name in ("a.csv", "edit.safetensors"):
        (secret / name).write_text("secret")
    one("gpt2", "zero").save(run / "edit.safetensors", tiny.model("gpt2"))
    for listed, link, target in (
        ("a.csv", run / "a.csv", secret / "a.csv"),
        ("below/a.csv", run / "below", secret),
        ("gone.csv", run / "gone.csv", secret / "gone.csv"),
    ):
        write_settings(run, {"versions": versions()}, ("edit.safetensors", listed))
        link.symlink_to(target)
        with pytest.raises(ArtefactError, match="is a link"):
            lu.push_to_hub(run, "somebody/a", token="hf_x")
        link.unlink()
    for listed in ("../secret/a.csv", str(secret / "a.csv"), "a/../../secret/a.csv", "", 3):
        content = {"versions": versions(), "files": ["edit.safetensors", listed]}
        (run / "run.json").write_text(json.dumps(content))
        with pytest.raises(ArtefactError, match="is not the folder of a run"):
            lu.push_to_hub(run, "somebody/a", token="hf_x")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ArtefactError, match="is a link"):
        lu.push_to_hub(tmp_path / "link", "somebody/a", token="hf_x")
    write_settings(run, {"versions": versions()}, ("edit.safetensors", "metrics.csv"))
    with pytest.raises(ArtefactError, match=r"lacks metrics\.csv, which its run wrote"):
        lu.push_to_hub(run, "somebody/a", token="hf_x")
    assert hub.repos == {}


def test_a_run_of_an_earlier_version_is_pushed_by_the_names_that_it_gave(hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(DATA / "finished-run", run)
    (run / "mine.csv").write_text("mine")
    (run / "notes.safetensors").write_bytes(b"mine")
    lu.push_to_hub(run, "somebody/old", token="hf_x")
    expected = {
        "key-space-detection.safetensors",
        "selective-pruning.safetensors",
        "metrics.csv",
        "run.json",
        "README.md",
    }
    assert set(hub.repos["somebody/old"]) == expected


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/b", "..", "a" * 300, "a\x00b", "", "con", None])
def test_a_name_never_leaves_its_folder(name: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(LensUnlearnError, match="cannot name a file"):
        lu.push_to_hub(one("gpt2", "zero"), "somebody/a", model=tiny.model("gpt2"), name=name, token="hf_x")
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]
    assert hub.repos == {}


def test_what_is_public_is_written_to_only_if_asked(hub: Hub, tmp_path: Path) -> None:
    edit, model = one("gpt2", "zero"), tiny.model("gpt2")
    lu.push_to_hub(edit, "somebody/open", model=model, private=False, token="hf_x")
    assert hub.public == {"somebody/open"}
    before = dict(hub.repos["somebody/open"])
    with pytest.raises(
        ArtefactError, match=r"^somebody/open cannot be written on the hub: it is public: give --public"
    ):
        lu.push_to_hub(edit, "somebody/open", model=model, name="more", token="hf_x")
    assert hub.repos["somebody/open"] == before
    lu.push_to_hub(edit, "somebody/open", model=model, name="more", private=False, token="hf_x")
    assert "more.safetensors" in hub.repos["somebody/open"]


def test_a_file_of_the_hub_is_trusted_no_more_than_another(hub: Hub) -> None:
    lu.push_to_hub(one("gpt2", "zero"), "somebody/a", model=tiny.model("gpt2"), token="hf_x")
    data = bytearray(hub.repos["somebody/a"]["intervention.safetensors"])
    data[-1] ^= 1
    hub.repos["somebody/a"]["intervention.safetensors"] = bytes(data)
    with pytest.raises(ArtefactError, match=r"^hf:somebody/a/intervention.safetensors .*altered"):
        lu.load_intervention("hf:somebody/a/intervention.safetensors")


def test_refusals_are_one_sentence_and_no_success(hub: Hub, tmp_path: Path) -> None:
    edit, model = one("gpt2", "zero"), tiny.model("gpt2")
    with unchanged(model), pytest.raises(ArtefactError, match=r"^hf:somebody/none/a.safetensors cannot be fetched"):
        lu.load_intervention("hf:somebody/none/a.safetensors", model)
    with pytest.raises(ArtefactError, match="hf:OWNER/NAME/FILE"):
        artefacts.read("hf:alone")
    with pytest.raises(ArtefactError, match="nothing to share"):
        lu.push_to_hub(tmp_path, "somebody/a", token="hf_x")
    with pytest.raises(ArtefactError, match="no such file or folder"):
        lu.push_to_hub(tmp_path / "none", "somebody/a", token="hf_x")
    (tmp_path / "foreign.safetensors").write_bytes(b"no")
    with pytest.raises(ArtefactError, match="is not a lens_unlearn file"):
        lu.push_to_hub(tmp_path / "foreign.safetensors", "somebody/a", token="hf_x")
    with pytest.raises(LensUnlearnError, match="knows its own"):
        lu.push_to_hub(tmp_path, "somebody/a", model=model)
    assert hub.repos == {}
    hub.refuse = 403
    with pytest.raises(ArtefactError, match=r"^somebody/a cannot be written on the hub: [^\n]+$"):
        lu.push_to_hub(edit, "somebody/a", model=model, token="hf_x")
    assert hub.repos == {}


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtefactError, match=r"^hf:somebody/a/b.safetensors cannot be fetched from the hub: [^\n]+$"):
        lu.load_intervention("hf:somebody/a/b.safetensors")


def test_from_the_command_line(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one("gpt2", "zero").save(tmp_path / "zero.safetensors", tiny.model("gpt2"))
    assert call("push", tmp_path / "zero.safetensors", "somebody/cli", "--dry-run") == 0
    assert capsys.readouterr().out == "to somebody/cli (private): zero.safetensors, README.md\n"
    assert hub.repos == {}
    assert call("push", tmp_path / "zero.safetensors", "somebody/cli") == 0
    assert hub.public == set()
    shown = capsys.readouterr().out
    assert shown.index("zero.safetensors, README.md") < shown.index(COMMIT)
    assert call("push", tmp_path / "zero.safetensors", "somebody/seen", "--public") == 0
    assert hub.public == {"somebody/seen"}
    assert call("show", "hf:somebody/cli/zero.safetensors") == 0
    assert "Ablate(" in capsys.readouterr().out
    assert call("push", tmp_path / "none", "somebody/cli") == 2
    assert "no such file or folder" in capsys.readouterr().err
