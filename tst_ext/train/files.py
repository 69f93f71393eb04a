"""Write files and folders whole or not at all, lock folders, and name the error that a user can put right."""

import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["UserError"]

UNFINISHED = ".unfinished-"  # begins the name of what is being written; a process that is killed leaves it behind


class UserError(Exception):
    """Something the user can put right; the command line prints it in one line, without a traceback."""


class Resumable(UserError):
    """A UserError after which the work done so far is kept."""


def check(name: str, value: object, valid: bool, wanted: str) -> None:
    """Raise UserError that says what was expected and what came, unless `value` is valid."""
    if not valid:
        raise UserError(f"{name}: expected {wanted}, got {short(value)}")


def short(value: object) -> str:
    """Return `repr(value)`, cut where it is too long for a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_writable(folder: Path) -> None:
    """Check, before any work is done, that `folder` can be made or written to; raise UserError otherwise."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"out {folder}: {existing} is not a folder that can be written to")


def check_out(folder: Path) -> None:
    """Check, before any work is done, that `folder` is empty or can be made; raise UserError otherwise."""
    check_writable(folder)
    if folder.exists() and any(not p.name.startswith(UNFINISHED) for p in folder.iterdir()):
        raise UserError(f"out {folder}: the folder is not empty; choose another or remove it")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: under another name, then rename it."""
    unfinished = path.with_name(UNFINISHED + path.name)
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a loss of power can leave an empty file by the new name
    unfinished.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to `folder` at the end, or removed after an error.

    Raises UserError if the folder cannot be written, or one of that name is not empty.
    """
    folder = folder.resolve()  # it has a neighbour also if it is "." or a link
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=UNFINISHED))
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's 0700 would keep it from other users
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"out {folder}: {error}") from error
    finally:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)


def _wait_for_lock(folder: Path) -> int | None:
    """Lock a folder and return its handle, None if another one has taken its place meanwhile."""
    handle = lock(folder)
    if handle is None:
        print(f"another process writes {folder}: waits for it", file=sys.stderr)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
        return handle
    os.close(handle)
    return None


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to `folder` at the end, with what a killed process has left in it.

    It is locked: another process that wants the same waits. It is removed after an error, but Resumable.
    Raises OSError if it cannot be written, or `folder` is not empty.
    """
    folder = folder.resolve()  # it has a neighbour also if it is "." or a link
    unfinished = folder.with_name(UNFINISHED + folder.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    handle = None
    while handle is None:
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
        unfinished.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # the process that had it has renamed or removed it
            handle = _wait_for_lock(unfinished)
    try:
        if folder.exists() and any(folder.iterdir()):  # made after the look above
            raise FileExistsError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
        yield unfinished
        sync(unfinished)
        unfinished.rename(folder)
        sync(folder.parent)
    except Resumable:
        raise
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename cannot get there before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> int | None:
    """Lock a folder until this process closes the handle returned, or ends, however. None: another process has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def in_use(path: Path) -> bool:
    """Tell whether a process has that file or folder locked."""
    if not path.exists():
        return False
    handle = lock(path)
    if handle is not None:
        os.close(handle)
    return handle is None
