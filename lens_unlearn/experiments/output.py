"""Outputs: held by one process from the first second, whole or absent, and replaced only where a run wrote every file.

Knows folders, locks and the list of files in `run.json`; knows nothing of what a run finds.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from lens_unlearn.core import artefacts, distributed
from lens_unlearn.core.errors import ArtefactError, LensUnlearnError

__all__ = [
    "check_folder",
    "files_of_run",
    "new_folder",
    "put_in_place",
    "reserved",
    "settings_of_run",
    "strangers",
    "taking_the_place_of",
    "write_settings",
    "writing",
]

SETTINGS = "run.json"


@contextmanager
def reserved(out: str | os.PathLike[str]) -> Iterator[None]:
    """Hold an output for the length of a `with` block: nobody else writes it, and the folder that it comes into is there.

    Of several processes on one job, the first holds it for all. Folders that were made for it go if they stay empty.

    Raises:
        LensUnlearnError: If another process holds it.
        ArtefactError: If nothing can be written there.
    """
    target = Path(out)
    if not distributed.is_first():
        yield
        return
    if target.name in ("", ".."):
        raise LensUnlearnError(f"{target} has no name of its own: give a new folder as --out")
    made: list[Path] = []
    suffix, prefix = artefacts.temporary_name(target)
    lock = FileLock(target.with_name(f"{prefix}{suffix.split('.')[1]}.lock"))
    try:
        try:
            target.exists()  # raises where no file can have such a name
            made = [path for path in target.absolute().parents if not path.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise LensUnlearnError(
                f"{target} is being written by another process: wait for its end, or give another --out"
            ) from error
        except OSError as error:
            raise ArtefactError(f"{target} cannot be written: {error.strerror or error}") from error
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def new_folder(out: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Hold an output, and yield an empty folder that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        LensUnlearnError: If `out` holds something and `overwrite` is not set, or holds what no run wrote, or another process
            writes it.
        ArtefactError: If nothing can be written there.
    """
    target = Path(out)
    with reserved(out):
        if not distributed.is_first():
            yield target
            return
        check_folder(target, overwrite=overwrite)
        with taking_the_place_of(target) as work:
            yield work


@contextmanager
def taking_the_place_of(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of an output that is held."""
    with writing(target):
        work = Path(tempfile.mkdtemp(*artefacts.temporary_name(target), target.parent))
    try:
        yield work
        os.chmod(work, 0o755)
        put_in_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a refusal of the file system into a sentence."""
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"{path} cannot be written: {error.strerror or error}") from error


def check_folder(target: Path, *, overwrite: bool) -> None:
    """Refuse an output folder whose content would be lost, before any work is done.

    Raises:
        LensUnlearnError: As in `new_folder`.
    """
    if target.name in ("", ".."):
        raise LensUnlearnError(f"{target} has no name of its own: give a new folder as --out")
    with writing(target):
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise LensUnlearnError(f"{target} is not a folder: give another --out")
        if not target.exists() or not any(target.iterdir()):
            return
    written = files_of_run(target)
    if written is None:
        raise LensUnlearnError(f"{target} holds files that no run wrote: give an empty or new folder as --out")
    if not overwrite:
        raise LensUnlearnError(f"{target} holds another run: give another --out, or --overwrite to replace it")
    others = strangers(target, written)
    if others:
        raise LensUnlearnError(
            f"{target} holds files besides those of its run ({_some(others)}): move them, or give another --out"
        )


def write_settings(folder: Path, content: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write `run.json`, the last file of an output: where it is, everything is. It lists the files that the run wrote.

    Args:
        folder: The output.
        content: The settings.
        files: What else the run wrote there, relative to the folder.
    """
    listed = sorted({SETTINGS, *files})
    data = json.dumps({**content, "files": listed}, indent=2, default=str)
    artefacts.replace_file(folder / SETTINGS, data.encode())


def settings_of_run(folder: Path) -> dict[str, Any] | None:
    """Return what `run.json` of an output says; None where there is none that a run wrote."""
    try:
        path = folder / SETTINGS
        content = None if path.is_symlink() else json.loads(path.read_text())
        return content if isinstance(content["versions"]["lens_unlearn"], str) else None  # type: ignore[index]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def files_of_run(folder: Path) -> list[str] | None:
    """Return the files that a run wrote into a folder, as it lists them; None if there is no run.

    Runs of earlier versions list nothing: of these, the names that such a run gives its files.
    """
    content = settings_of_run(folder)
    if content is None:
        return None
    listed = content.get("files")
    if "files" not in content:
        listed = _known_names(content)
    if not isinstance(listed, list) or not all(isinstance(name, str) and _is_inside(name) for name in listed):
        return None
    return listed


def _known_names(content: Mapping[str, Any]) -> list[str]:
    """Return the names of the files of a run of an earlier version."""
    plan = content.get("plan")
    methods = content.get("methods") if "skills" in content else plan.get("methods") if isinstance(plan, dict) else ()
    skills = content.get("skills")
    methods, skills = (list(map(str, part)) if isinstance(part, list) else [] for part in (methods, skills))
    if "skills" in content:
        edits = [f"{skill}/{method}.safetensors" for skill in skills for method in methods]
        return ["compare.html", "matrix.csv", SETTINGS, *edits]
    own = ["metrics.csv", SETTINGS, *(f"{method}.safetensors" for method in methods)]
    names = ["report.html", *own]
    if str(content.get("command", "")).startswith("lens-unlearn demo "):
        names += [f"the-other-way-round/{name}" for name in names]
        names += [f"persons/{name}" for name in ("metrics.csv", SETTINGS, "simu.safetensors")]
    return names


def _is_inside(name: str) -> bool:
    """Whether a name of a list leads to nothing but a file below its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\:\0")


def strangers(folder: Path, written: Iterable[str]) -> list[str]:
    """Return what is in a folder besides the files that a run wrote: others, and links, which are no files of a run."""
    known, found = set(written), []
    for root, folders, files in os.walk(folder):
        for name in (*files, *(one for one in folders if os.path.islink(os.path.join(root, one)))):
            path = Path(root) / name
            place = path.relative_to(folder).as_posix()
            if place not in known or not path.is_file() or path.is_symlink():
                found.append(place)
    return sorted(found)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def put_in_place(work: Path, target: Path) -> None:
    """Make a finished folder the target, in place of the run that may be there."""
    artefacts.sweep(target)
    with writing(target):
        if not target.exists():
            os.replace(work, target)
            return
        suffix, prefix = artefacts.temporary_name(target)
        old = target.with_name(f"{prefix}{os.urandom(4).hex()}{suffix}")
        os.replace(target, old)
        try:
            os.replace(work, target)
        except BaseException:
            os.replace(old, target)
            raise
    _remove(old, target)


def _remove(old: Path, target: Path) -> None:
    """Delete the files of an earlier run; whatever else came into its folder meanwhile goes into the new one."""
    for place in strangers(old, files_of_run(old) or ()):
        free = place if not os.path.lexists(target / place) else f"{place}.kept"
        (target / free).parent.mkdir(parents=True, exist_ok=True)
        os.replace(old / place, target / free)
    shutil.rmtree(old, ignore_errors=True)
