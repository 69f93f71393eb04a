"""Find the files of a corpus and read their documents piece by piece, so that memory does not grow with them.

The datasets library reads datasets of the Hub (`--dataset`) and not the rest. For a Parquet file of 300 MB in one row
group it takes 1.5 GB of memory, where pyarrow's own reader takes 0.3. It infers one schema for a JSON Lines file from
its first 10 MB, refuses metadata that vary later, and makes dates of texts that look like dates.
"""

import bz2
import codecs
import csv
import functools
import glob
import gzip
import hashlib
import io
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
from .files import UserError, short

KINDS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
NAMED = {".json": "jsonl", ".py": "txt"}  # read if a path names the file, or a pattern does
OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
COMPRESSED = (*OPEN, ".zst")
CHECKSUMS = ("MD5SUMS", "SHA1SUMS", "SHA256SUMS", "SHA512SUMS")  # also with .txt; in folders of downloads
PIECE = 1 << 17  # characters; long documents are tokenised in pieces, for memory and so that all cores have a part
LONGEST_LINE = 1 << 26  # bytes of a line of JSON, which is read whole: as text it can take four times as much
ROWS = 16  # of a table in memory at a time


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
    if isinstance(error, UnicodeDecodeError):
        return f"expected UTF-8: {error}"
    if type(error) is ValueError and lines:
        return lines[0]
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
    """List what `config` names, files in the order of their names and each once; print what is ignored.

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
    return [_source(path, kind, config.text_key) for path, kind in found.values()]


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
            wanted = f"{', '.join([*KINDS, '.json'])}, also with {', '.join(COMPRESSED)} after it"
            raise UserError(f"data {path}: expected {wanted}, or a folder (of .bin files too)")
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
    readers: dict[str, Callable[[], Iterator[str]]] = {
        "txt": lambda: _text(path, errors),
        "jsonl": lambda: _json_lines(path, text_key),
        "csv": lambda: _csv(path, text_key),
        "parquet": lambda: _parquet(path, text_key),
        "arrow": lambda: _arrow(path, text_key),
    }
    return Source(str(path), path.stat().st_size, readers[kind], path, whole=kind == "txt")


def _text(path: Path, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    with _open(path) as file:
        while data := file.read(PIECE):
            yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _json_lines(path: Path, text_key: str) -> Iterator[str]:
    with _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            where = f"data {path}, line {number}"
            if len(line) == LONGEST_LINE:
                raise UserError(f"{where}: expected a JSON object per line, got a line of {LONGEST_LINE:,} bytes")
            yield _json_text(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, text_key, where)


def _csv(path: Path, text_key: str) -> Iterator[str]:
    csv.field_size_limit(LONGEST_LINE)
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            names = next(rows, [])
            column = _column(text_key, names)
            for row in rows:
                if row and len(row) != len(names):
                    raise ValueError(f"expected {len(names)} fields, got {len(row)}")
                yield row[column] if row else ""
        except (csv.Error, ValueError) as error:
            raise UserError(f"data {path}, line {rows.line_num}: {error}") from error


def _parquet(path: Path | str, text_key: str) -> Iterator[str]:
    """Yield the texts of a file, which may be an address of the Hub."""
    _pyarrow(path)
    import pyarrow.parquet
    from fsspec import open as open_address

    opened = _open(path) if isinstance(path, Path) else open_address(path, "rb")
    # With a buffer a row group is read as it is needed, not whole.
    with opened as stream, pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20) as file:
        _column(text_key, file.schema_arrow.names)
        for batch in file.iter_batches(ROWS, columns=[text_key], use_threads=False):
            yield from _texts(batch, text_key)


def _arrow(path: Path, text_key: str) -> Iterator[str]:
    ipc = _pyarrow(path).ipc
    with _open(path) as file:
        in_blocks = file.read(6) == b"ARROW1"  # with an index at its end; else a stream
        file.seek(0)
        if in_blocks:
            blocks = ipc.open_file(file)
            for i in range(blocks.num_record_batches):
                yield from _texts(blocks.get_batch(i), text_key)
        else:
            for batch in ipc.open_stream(file):
                yield from _texts(batch, text_key)


def _pyarrow(path: object) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"data {path}: reading it needs pyarrow: pip install 'tst-ext[data]'") from error
    return pyarrow


def _column(text_key: str, names: list[str]) -> int:
    if text_key not in names:
        raise ValueError(f"expected a column {text_key!r} (--text-key), got {', '.join(names) or 'none'}")
    return names.index(text_key)


def _texts(rows: Any, text_key: str) -> Iterator[str]:
    """Yield the texts in a table or batch of pyarrow, "" where there is none."""
    types = _pyarrow("").types
    column = rows.column(_column(text_key, rows.schema.names))
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
        raise ValueError(f"expected strings in column {text_key!r} (--text-key), got {column.type}")
    yield from (text.as_py() or "" for text in column)


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
    if not line.strip():
        return ""
    try:
        record = json.loads(line.decode("utf-8"), parse_int=float)  # int() refuses more than 4300 digits
    except json.JSONDecodeError as error:  # whose own text counts lines of this line
        raise UserError(f"{where}: expected one JSON object per line: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(record, dict) or text_key not in record:
        got = f"one with {short([*record])}" if isinstance(record, dict) else short(record)
        raise UserError(f"{where}: expected an object with a string {text_key!r} (--text-key), got {got}")
    text = record[text_key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: expected a string {text_key!r} (--text-key), got {short(text)}")
    try:
        (text or "").encode()  # JSON can hold half a surrogate pair, which is no text
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected text under {text_key!r}: {error}") from error
    return text or ""


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"dataset {name}: reading it needs datasets: pip install 'tst-ext[data]'") from error
    datasets.disable_progress_bars()
    return datasets


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
            if builder.name == "csv":  # else pandas makes numbers and missing values of texts that look like them
                features = datasets.Features({config.text_key: datasets.Value("string")})
                options = {"features": features, "usecols": [config.text_key], "keep_default_na": False}
                builder = datasets.load_dataset_builder(name, config.subset or None, **options)
            stream = builder.as_streaming_dataset(config.split)
            # Addresses with the commit of the dataset; of local files sizes and times.
            files = sorted(map(str, (builder.config.data_files or {}).get(config.split, [])))
            stats = [os.stat(file) if os.path.exists(file) else None for file in files]
            revision = repr([(s.st_size, s.st_mtime_ns) if s else f for f, s in zip(files, stats, strict=True)])
            if builder.name == "parquet":  # its own reader takes the memory of a whole row group, all columns
                revision = f"{name} {config.subset} {config.split} {revision}"
                return [
                    Source(file, 1, functools.partial(_parquet, file, config.text_key), revision=revision)
                    for file in files
                ]
    except Exception as error:
        raise UserError(f"dataset {name}: {_reason(error)}") from error
    parts = stream.num_shards

    def read(index: int) -> Iterator[str]:
        for rows in stream.shard(num_shards=parts, index=index).with_format("arrow").iter(batch_size=ROWS):
            yield from _texts(rows, config.text_key)

    revision = f"{name} {config.subset} {config.split} {revision}"
    return [
        Source(f"{name} ({config.split}, part {i + 1} of {parts})", 1, functools.partial(read, i), revision=revision)
        for i in range(parts)
    ]
