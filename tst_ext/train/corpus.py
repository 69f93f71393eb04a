"""Find the files of a corpus and read their documents piece by piece, so that memory does not grow with them.

Text and JSON Lines are read by Python's standard library, line by line: datasets infers one schema for all columns of a
JSON Lines file from its first 10 MB, so it refuses metadata that vary, and it turns texts that look like dates into
dates. Everything else is read by datasets.
"""

import bz2
import codecs
import glob
import gzip
import hashlib
import json
import lzma
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .config import DataConfig
from .files import UserError

KINDS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
NAMED = {".json": "jsonl", ".py": "txt"}  # read if a path names the file, or a pattern does
OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
COMPRESSED = (*OPEN, ".zst")
CHECKSUMS = ("MD5SUMS", "SHA1SUMS", "SHA256SUMS", "SHA512SUMS")  # also with .txt; in folders of downloads
PIECE = 1 << 17  # characters; long documents are tokenised in pieces, for memory and so that all cores have a part
LONGEST_LINE = 1 << 28  # bytes of a line of JSON, which is read whole
ROWS = 256  # of a table in memory at a time


@dataclass(frozen=True)
class Source:
    """Hold a file of documents, or a part of a dataset of about a file's size."""

    name: str  # for messages
    size: int  # bytes on the disk; 1 where that is not known
    read: Callable[[], Iterator[str]]  # its documents
    path: Path | None = None  # of a file
    whole: bool = False  # whether it is one document, which `read` yields in pieces
    revision: str = ""  # of a dataset: what tells this text from another

    def version(self, by_content: bool) -> str:
        """Return what tells this text from another: of a file its kind, size, and checksum or time of change."""
        if self.path is None:
            return self.revision
        kind = [suffix.lower() for suffix in self.path.suffixes[-2:]]
        if not by_content:
            return f"{kind} {self.size} {self.path.stat().st_mtime_ns}"
        with open(self.path, "rb") as file:
            return f"{kind} {hashlib.file_digest(file, 'sha256').hexdigest()}"

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Yield the text in pieces of at most PIECE characters, and whether a document ends with each.

        Documents without text are left out. Raises UserError, which names the file, if it cannot be read.
        """
        try:
            if self.whole:
                yield from _cut(self.read())
            else:
                for document in self.read():
                    yield from _cut(iter([document]))
        except UserError:
            raise
        except Exception as error:  # each format and compression has errors of its own
            raise UserError(f"data {self.name}: {_reason(error)}") from error


def _cut(parts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Yield a document, which comes in parts, in pieces, and with each whether it is the last."""
    rest = ""
    for part in parts:
        text, start = rest + part, 0
        while len(text) - start > PIECE:
            end = _boundary(text, start)
            yield text[start:end], False
            start = end
        rest = text[start:]
    if rest:
        yield rest, True


def _boundary(text: str, start: int) -> int:
    """Return where to end a piece of `text` from `start`: before a single space, where tokenizers divide anyway.

    Both sides then have the tokens of the whole. Text without such a space is cut after a line, else anywhere.
    """
    half, end = start + PIECE // 2, start + PIECE
    space = text.rfind(" ", half, end)
    while space > 0 and not (text[space - 1].isalnum() and text[space + 1].isalnum()):
        space = text.rfind(" ", half, space)
    return space if space > 0 else (text.rfind("\n", half, end) + 1 or end)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def documents(config: DataConfig) -> Iterator[str]:
    """Yield the documents of a corpus whole. Raises UserError as `sources` and `Source.pieces`."""
    parts: list[str] = []
    for source in sources(config):
        for piece, ends in source.pieces():
            parts.append(piece)
            if ends:
                yield "".join(parts)
                parts.clear()


def sources(config: DataConfig) -> list[Source]:
    """List what `config` names, files in the order of their names and each once; print what folders have besides.

    Raises:
        UserError: a path is missing, of an unknown kind or without text; a dataset cannot be reached.
    """
    if config.dataset:
        return _dataset(config)
    if not config.data:
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts))
        return [_source(p, "txt", config.text_key, errors="replace") for p in files if p.is_file()]
    found: dict[Path, tuple[Path, str]] = {}  # by the path without links, so that nothing is read twice
    for path in config.data:
        for file, kind in _files(path):
            found.setdefault(file.resolve(), (file, kind))
    tables = {kind: [p for p, k in found.values() if k == kind] for kind in ("csv", "parquet", "arrow")}
    opened = {kind: _Tables(kind, files, config.text_key) for kind, files in tables.items() if files}
    return [
        opened[kind].source(path) if kind in opened else _source(path, kind, config.text_key)
        for path, kind in found.values()
    ]


def _kind(path: Path, kinds: dict[str, str]) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return kinds.get(suffixes[-1]) if suffixes else None


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that a path or pattern names, and the kind of each."""
    if path.is_file():
        kind = _kind(path, KINDS | NAMED)
        if kind is None:
            wanted = ", ".join([*KINDS, ".json"])
            raise UserError(f"data {path}: expected {wanted}, also with {', '.join(COMPRESSED)} after it, or a folder")
        yield path, kind
        return
    matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not matches:
        raise UserError(f"data {path}: no such file or folder")
    files: list[tuple[Path, str]] = []
    ignored: Counter[str] = Counter()
    seen: set[Path] = set()
    for match in matches:
        if match.is_dir():
            _walk(match, files, ignored, seen)
        else:
            _take(match, KINDS | NAMED, files, ignored)
    if ignored:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
        print(f"data {path}: reads {len(files)} files; ignores {counts}", file=sys.stderr)
    if not files:
        raise UserError(f"data {path}: expected files of {', '.join(KINDS)}, got none")
    yield from sorted(files)


def _walk(root: Path, files: list[tuple[Path, str]], ignored: Counter[str], seen: set[Path]) -> None:
    """Add the files below a folder to `files`, and what is left out to `ignored`."""

    def fail(error: OSError) -> None:
        raise UserError(f"data {root}: {error}") from error

    for folder, names, children in os.walk(root, followlinks=True, onerror=fail):
        here = Path(folder)
        if here.resolve() in seen:  # through a link
            names.clear()
            continue
        seen.add(here.resolve())
        names.sort()
        for name in [name for name in names if name.startswith(".")]:
            names.remove(name)
            ignored["hidden folders"] += 1
        for name in children:
            _take(here / name, KINDS, files, ignored)


def _take(path: Path, kinds: dict[str, str], files: list[tuple[Path, str]], ignored: Counter[str]) -> None:
    kind = _kind(path, kinds)
    if path.name.startswith("."):
        ignored["hidden files"] += 1
    elif path.name.upper().removesuffix(".TXT") in CHECKSUMS:
        ignored["lists of checksums"] += 1
    elif kind is None:
        ignored["".join(path.suffixes[-2:]) or "files without a suffix"] += 1
    elif not path.is_file():
        ignored["broken links and devices"] += 1
    else:
        files.append((path, kind))


def _source(path: Path, kind: str, text_key: str, errors: str = "strict") -> Source:
    def text() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
        with _open(path) as file:
            while data := file.read(PIECE):
                yield decoder.decode(data)
        yield decoder.decode(b"", final=True)

    def lines() -> Iterator[str]:
        with _open(path) as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                where = f"data {path}, line {number}"
                if len(line) == LONGEST_LINE:
                    raise UserError(f"{where}: expected a JSON object per line, got a line of {LONGEST_LINE:,} bytes")
                yield _json_text(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, text_key, where)

    return Source(str(path), path.stat().st_size, text if kind == "txt" else lines, path, whole=kind == "txt")


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    opened: Any = _zstd(path).open(path) if suffix == ".zst" else OPEN.get(suffix, open)(path, "rb")
    return opened


def _zstd(path: Path) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise UserError(f"data {path}: reading it needs backports.zstd: pip install 'tst-ext[data]'") from error
    return zstd


def _json_text(line: bytes, text_key: str, where: str) -> str:
    """Return the text in a line of JSON, "" if there is none."""
    if line.isspace():
        return ""
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:  # whose own text counts lines of this line
        raise UserError(f"{where}: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(record, dict) or text_key not in record:
        got = f"keys {', '.join(record)}" if isinstance(record, dict) else f"{line[:40]!r}"
        raise UserError(f"{where}: expected an object with a string {text_key!r} (--text-key), got {got}")
    text = record[text_key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: expected a string {text_key!r}, got {text!r}")
    try:
        (text or "").encode()  # JSON can hold half a surrogate pair, which is no text
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error}") from error
    return text or ""


def _datasets(path: object) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data {path}: reading it needs datasets: pip install 'tst-ext[data]'") from error
    datasets.disable_progress_bars()
    return datasets


class _Tables:
    """Open all files of a kind at once when the first is read: one by one takes a tenth of a second each."""

    def __init__(self, kind: str, files: list[Path], text_key: str) -> None:
        self.kind, self.files, self.text_key = kind, files, text_key
        self.dataset: Any = None
        self.datasets = _datasets(files[0])
        for file in files:
            if file.suffix.lower() == ".zst":
                from fsspec.compression import register_compression

                # Before 2026.1 fsspec knows a reader only that ends without an error where a file was cut.
                register_compression("zstd", _zstd(file).ZstdFile, "zst", force=True)

    def source(self, path: Path) -> Source:
        index = self.files.index(path)

        def rows() -> Iterator[str]:
            if self.dataset is None:
                self.dataset = self._load()
            yield from _texts(self.dataset.shard(num_shards=len(self.files), index=index), self.text_key)

        return Source(str(path), path.stat().st_size, rows, path)

    def _load(self) -> Any:
        key, options = self.text_key, {}
        if self.kind == "csv":
            # Else pandas makes numbers and missing values of texts that look like them.
            features = self.datasets.Features({key: self.datasets.Value("string")})
            options = {"features": features, "usecols": [key], "keep_default_na": False, "encoding": "utf-8-sig"}
            options["chunksize"] = ROWS
        elif self.kind == "parquet":
            options = {"columns": [key], "batch_size": ROWS}
        files = [glob.escape(str(file)) for file in self.files]
        return self.datasets.load_dataset(self.kind, data_files=files, split="train", streaming=True, **options)


def _dataset(config: DataConfig) -> list[Source]:
    """List the parts of a dataset, which are its files."""
    datasets = _datasets(config.dataset)
    name, folder = config.dataset, Path(config.dataset)
    try:
        if any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):  # of save_to_disk
            loaded = datasets.load_from_disk(name)
            loaded = loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            stream, revision = loaded.to_iterable_dataset(num_shards=min(64, len(loaded)) or 1), loaded._fingerprint
        else:
            builder = datasets.load_dataset_builder(name, config.subset or None)
            stream = builder.as_streaming_dataset(config.split)
            # Addresses with the commit of the dataset; of local files sizes and times.
            files = sorted(map(str, (builder.config.data_files or {}).get(config.split, [])))
            stats = [os.stat(file) if os.path.exists(file) else None for file in files]
            revision = repr([(s.st_size, s.st_mtime_ns) if s else f for f, s in zip(files, stats, strict=True)])
    except Exception as error:
        raise UserError(f"dataset {name}: {_reason(error)}") from error
    parts = stream.num_shards

    def read(index: int) -> Callable[[], Iterator[str]]:
        return lambda: _texts(stream.shard(num_shards=parts, index=index), config.text_key)

    revision = f"{name} {config.subset} {config.split} {revision}"
    return [
        Source(f"{name} ({config.split}, part {i + 1} of {parts})", 1, read(i), revision=revision) for i in range(parts)
    ]


def _texts(dataset: Any, text_key: str) -> Iterator[str]:
    import pyarrow

    for table in dataset.with_format("arrow").iter(batch_size=ROWS):
        if text_key not in table.column_names:
            raise ValueError(f"expected a column {text_key!r} (--text-key), got {', '.join(table.column_names)}")
        column = table.column(text_key)
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            raise ValueError(f"expected strings in column {text_key!r} (--text-key), got {column.type}")
        yield from (text or "" for text in column.to_pylist())
