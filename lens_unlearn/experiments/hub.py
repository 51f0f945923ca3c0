"""Sharing results on the Hugging Face hub: files go up with a card that says what they are, and come down by name.

What comes down is read like any other file: a checksum, a model fingerprint, and nothing that is executed.
"""

import csv
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError
from lens_unlearn.core.names import check_name
from lens_unlearn.evaluation.metrics import metric
from lens_unlearn.experiments.output import files_of_run, settings_of_run, strangers
from lens_unlearn.interventions.base import Intervention
from lens_unlearn.model.host import Model

__all__ = ["push_to_hub", "shared_files"]

_ROWS = 60


def push_to_hub(
    what: Intervention | str | os.PathLike[str],
    repo: str,
    *,
    model: Model | None = None,
    name: str = "intervention",
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Put an intervention, a file of ours, or the folder of a run on the Hugging Face hub, with a card that says what it is.

    Of a folder, the files that its run wrote, as `run.json` lists them, and no others; links are refused.
    Whoever has the name can use it: ``load_intervention("hf:OWNER/NAME/FILE", model)``.

    Args:
        what: An intervention, a file that lens_unlearn wrote, or a folder that `run` or `compare` wrote.
        repo: "OWNER/NAME" of a model repository; it is made if there is none.
        model: Of an intervention: whose fingerprint the file keeps, so that it refuses every other model.
        name: Of an intervention: what its file is called.
        private: Whether only its owner can read the repository, if it is new; to one that is public, nothing is uploaded unless
            this is False.
        revision: A branch; default the main one.
        token: Default the one that `huggingface_hub` knows (``hf auth login``).
        message: Of the commit.

    Returns:
        Where the commit can be seen.

    Raises:
        ArtefactError: If there is nothing of ours to share, or the hub cannot be reached or refuses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(what, Intervention):
            file = f"{check_name(name, 'a file')}.safetensors"
            what.save(Path(scratch) / file, model)
            files = {file: Path(scratch) / file}
        elif model is not None:
            raise LensUnlearnError("model is for an intervention: a file knows its own")
        else:
            files = shared_files(what)
        headers = {name: artefacts.read(file)[0] for name, file in files.items() if file.suffix == ".safetensors"}
        if not headers:
            raise ArtefactError(f"{os.fspath(what)} has nothing to share: no .safetensors file of ours")  # type: ignore[arg-type]
        card = _card(repo, headers, files)
        commit_message = message or f"lens_unlearn: {', '.join(sorted(headers))}"
        return _commit(repo, {**files, "README.md": card}, private, revision, token, commit_message)


def _commit(
    repo: str,
    files: Mapping[str, Path | bytes],
    private: bool,
    revision: str | None,
    token: str | None,
    commit_message: str,
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="lens_unlearn")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and api.model_info(repo, revision="main").private is False:
            raise ArtefactError(
                "it is public: give --public (private=False) to share there, or name another repository"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(name, data if isinstance(data, bytes) else os.fspath(data))
            for name, data in files.items()
        ]
        done = api.create_commit(repo, operations, commit_message=commit_message, revision=revision)
    except Exception as error:
        raise ArtefactError(f"{repo} cannot be written on the hub: {artefacts.first_line(error)}") from error
    return str(done.commit_url)


def shared_files(what: str | os.PathLike[str]) -> dict[str, Path]:
    """Return what `push_to_hub` would upload of a file or a folder, by name: of a folder, the files that its run wrote.

    Raises:
        ArtefactError: If there is nothing of ours, or one of the files is missing or a link.
    """
    path = Path(what)
    if path.is_symlink():
        raise ArtefactError(f"{path} is a link: give what it leads to")
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise ArtefactError(f"{path} cannot be shared: there is no such file or folder")
    listed = files_of_run(path)
    if listed is None:
        raise ArtefactError(f"{path} has nothing to share: it is not the folder of a run; give a single file")
    complete = "files" in (settings_of_run(path) or {})
    others = set(strangers(path, listed))
    found = {}
    for name in listed:
        if name in others or any((path / part).is_symlink() for part in Path(name).parents):
            raise ArtefactError(f"{path / name} is a link, and no file of the run: put the file back, or run it again")
        if (path / name).is_file():
            found[name] = path / name
        elif complete:
            raise ArtefactError(f"{path} lacks {name}, which its run wrote: put the file back, or run it again")
    return found


def _card(repo: str, headers: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path]) -> bytes:
    """Write the repository's page: what the files hold, how to use them, and what was measured."""
    lines = ["---", "library_name: lens_unlearn", "tags:", "- interpretability", "- unlearning", "---", ""]
    lines += [f"# {repo.split('/')[-1]}", ""]
    lines += [
        "Made with lens_unlearn: interventions that act through hooks for the length of a `with` block, and leave the model as",
        "it was. They are experiments, not deletions: whoever leaves the block has everything back.",
        "",
        "| file | holds | for |",
        "| --- | --- | --- |",
    ]
    for name, header in headers.items():
        lines.append(f"| `{name}` | {_cell(header.get('text') or header['kind'])} | {_cell(_whose(header))} |")
    kind = "moments" if all(h["kind"] == "moments" for h in headers.values()) else "intervention"
    first = next((name for name, header in headers.items() if header["kind"] == kind), next(iter(headers)))
    lines += ["", "```python", "import lens_unlearn as lu", ""]
    if kind == "intervention":
        lines += [
            "model = lu.load_model(...)  # the model named above: others are refused",
            f'edit = lu.load_intervention("hf:{repo}/{first}", model)',
            "with edit.on(model):",
            '    print(lu.generate(model, "..."))',
        ]
    else:
        lines += [f'moments = lu.load_moments("hf:{repo}/{first}")']
    lines += ["```", ""]
    for name, file in files.items():
        if name == "metrics.csv":
            lines += _measured(file)
        if name == "run.json":
            lines += [f"Settings, seeds and versions: `{name}`.", ""]
    return "\n".join(lines).encode()


def _whose(header: Mapping[str, Any]) -> str:
    """Say which model a file is for, as far as its header tells."""
    known = header.get("model")
    if not isinstance(known, Mapping):
        return "any model of its shape"
    return f"{known.get('layers')} layers of {known.get('width')}, weights {known.get('weights')}"


def _measured(file: Path) -> list[str]:
    with open(file, newline="") as text:
        rows = [row for row in csv.DictReader(text) if metric(row.get("metric") or "").brief]
    lines = [
        "## Measured",
        "",
        "| condition | corpus | metric | value | 95 % interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows[:_ROWS]:
        low, high, value = (_number(row.get(key)) for key in ("low", "high", "value"))
        cells = [_cell(row[key]) for key in ("condition", "corpus", "metric")]
        lines.append(f"| {' | '.join(cells)} | {value} | {low} to {high} |")
    more = [f"and {len(rows) - _ROWS} more rows in `{file.name}`", ""] if len(rows) > _ROWS else []
    return [*lines, "", *more]


def _number(text: str | None) -> str:
    try:
        return f"{float(text or 'nan'):.3f}"
    except ValueError:
        return ""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
