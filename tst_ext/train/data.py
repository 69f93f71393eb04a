"""Turn text into token shards on disk, and shards into batches. docs/data.md has the format of a prepared folder."""

import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .config import DataConfig
from .files import UserError, check, whole_folder

FORMAT = 1
SPLITS = ("train", "val")
SHUFFLE_SEED = 0  # of the documents, before the split: the same for every run, so that all share one held-out text
CHECKSUM_LIMIT = 1 << 30  # bytes; opening a larger shard checks its size only, hashing it would take many seconds


def cache_folder() -> Path:
    """Return where prepared text is kept between runs: `$XDG_CACHE_HOME/tst-ext`, by default `~/.cache/tst-ext`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tst-ext"


def read_documents(config: DataConfig) -> list[str]:
    """Return the documents of `config.data` in the order of the files, or those of the default corpus.

    Raises:
        UserError: a path is missing, of an unknown kind, or unreadable; names file and line.
    """
    if not config.data:
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts))
        texts = (p.read_text(encoding="utf-8", errors="replace") for p in files)
    else:
        texts = (text for path in config.data for text in _read(path, config.text_key))
    return [text for text in texts if text]


def _read(path: Path, text_key: str) -> Iterator[str]:
    if not path.exists():
        raise UserError(f"data {path}: no such file or folder")
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
            if not files:
                raise UserError(f"data {path}: the folder holds no .txt or .jsonl file and is no prepared one")
            for file in files:
                yield from _read(file, text_key)
        elif path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                    raise UserError(f"data {path}, line {number}: expected an object with a string {text_key!r}")
                record[text_key].encode()  # JSON can hold half a surrogate pair, which is no text
                yield record[text_key]
        else:
            raise UserError(f"data {path}: expected .txt, .jsonl, a folder of those, or a prepared folder")
    except (OSError, ValueError) as error:
        raise UserError(f"data {path}: {error}") from error


def prepared_folder(config: DataConfig) -> Path:
    """Return the prepared folder that `config` names, else one in the cache, which is made unless it is there.

    The cache's key covers text, settings and the tokenizer library. Raises UserError as `read_documents` and `prepare`.
    """
    if len(config.data) == 1 and (config.data[0] / "train.json").exists():
        return config.data[0]
    documents = read_documents(config)
    key = hashlib.sha256(f"{FORMAT} {config.vocabulary} {config.holdout} {tokenizers.__version__}".encode())
    if config.tokenizer:
        key.update(load_tokenizer(config.tokenizer).to_str().encode() + config.end_of_text.encode())
    for document in documents:
        key.update(hashlib.sha256(document.encode()).digest())
    folder = cache_folder() / key.hexdigest()[:16]
    if not (folder / "train.json").exists():
        prepare(documents, config, folder)
    return folder


def prepare(documents: list[str], config: DataConfig, folder: Path) -> None:
    """Write `folder`, whole or not at all, in the tokens of `config.tokenizer` or of a byte-level BPE trained for it.

    Documents are shuffled by a fixed seed; `config.holdout` of them, at least one, become the held-out split. A process
    that prepares the same text at the same time does no harm.

    Raises:
        UserError: fewer than two documents, an unusable tokenizer, or a folder that is not empty or cannot be written.
    """
    check("data", len(documents), len(documents) >= 2, "at least 2 documents, one of them to hold out")
    documents = sorted(documents)
    random.Random(SHUFFLE_SEED).shuffle(documents)
    held_out = min(max(1, round(config.holdout * len(documents))), len(documents) - 1)
    split = {"val": documents[:held_out], "train": documents[held_out:]}

    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else _train_tokenizer(split["train"], config)
    if tokenizer.token_to_id(config.end_of_text) is None:
        raise UserError(f"tokenizer {config.tokenizer}: has no token {config.end_of_text!r}; name one by --end-of-text")
    try:
        with whole_folder(folder) as unfinished:
            tokenizer.save(str(unfinished / "tokenizer.json"))
            for name in SPLITS:
                _write_shard(unfinished / name, split[name], tokenizer, config.end_of_text)
    except UserError:
        if not (folder / "train.json").exists():
            raise


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, which holds no code. Raises UserError if the file is missing or malformed."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise UserError(f"tokenizer {path}: {error}") from error
    tokenizer.no_truncation()  # some files ask for one length of all texts, which would cut documents
    tokenizer.no_padding()
    return tokenizer


def _train_tokenizer(documents: list[str], config: DataConfig) -> Tokenizer:
    """Train a byte-level BPE, which can write any text."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[config.end_of_text],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _write_shard(path: Path, documents: list[str], tokenizer: Tokenizer, end_of_text: str) -> None:
    vocabulary = max(tokenizer.get_vocab().values()) + 1  # ids of a given tokenizer may have gaps
    dtype = "uint16" if vocabulary <= 2**16 else "uint32"
    separator = tokenizer.token_to_id(end_of_text)
    count, checksum = 0, hashlib.sha256()
    with open(path.with_suffix(".bin"), "wb") as file:
        for start in range(0, len(documents), 256):
            # _fast leaves out character offsets. Some tokenizers would begin every text with a special token.
            for encoding in tokenizer.encode_batch_fast(documents[start : start + 256], add_special_tokens=False):
                ids = np.array([*encoding.ids, separator], dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
                file.write(ids)
                checksum.update(ids)
                count += len(encoding.ids) + 1
    header = {
        "format": FORMAT,
        "dtype": dtype,
        "tokens": count,
        "documents": len(documents),
        "vocabulary": vocabulary,
        "end_of_text": separator,
        "tokenizer": "tokenizer.json",
        "sha256": checksum.hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


class Shard:
    """Read one split, "train" or "val", of a prepared folder piece by piece.

    Attributes:
        vocabulary: V; ids are below it.
        end_of_text: id of the token that ends a document, None if the header names none.
        sha256: checksum of the tokens by the header.

    Raises:
        UserError: a file is missing, truncated or altered, or its header is not one of ours.
    """

    def __init__(self, folder: Path, split: str) -> None:
        header_path, path = folder / f"{split}.json", folder / f"{split}.bin"
        try:
            header: dict[str, Any] = json.loads(header_path.read_text(encoding="utf-8"))
            self.file = open(path, "rb")
            size = path.stat().st_size
            checksum = hashlib.file_digest(self.file, "sha256").hexdigest() if size <= CHECKSUM_LIMIT else None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"shard {folder}: {error}") from error
        kinds = {"format": int, "dtype": str, "tokens": int, "vocabulary": int, "sha256": str}
        if (
            not isinstance(header, dict)
            or any(type(header.get(name)) is not kind for name, kind in kinds.items())
            or header["format"] != FORMAT
            or header["dtype"] not in ("uint16", "uint32")
            or header["vocabulary"] < 1
            or not isinstance(header.get("end_of_text"), int | None)
        ):
            raise UserError(f"shard {header_path}: not a header of format {FORMAT}: got {header!r}")
        self.path = path
        self.dtype = np.dtype(header["dtype"]).newbyteorder("<")
        self.length: int = header["tokens"]
        self.vocabulary: int = header["vocabulary"]
        self.end_of_text: int | None = header.get("end_of_text")
        self.sha256: str = header["sha256"]
        wanted = self.length * self.dtype.itemsize
        if size != wanted:
            raise UserError(f"shard {path}: expected {wanted} bytes by its header, got {size}; prepare it again")
        if checksum not in (None, self.sha256):
            raise UserError(f"shard {path}: its checksum is not that of its header; prepare it again")

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens `[start, start + count)` as int64. Raises UserError if the file is unreadable or shorter."""
        tokens = np.empty(count, self.dtype)
        self._fill(tokens, start)
        return tokens.astype(np.int64)

    def _fill(self, tokens: np.ndarray, start: int) -> None:
        # Not by a memory map: if a mapped file shrinks, SIGBUS ends the process without a message or checkpoint.
        offset = start * self.dtype.itemsize
        try:
            count = os.preadv(self.file.fileno(), [tokens.data], offset)
        except OSError as error:
            raise UserError(f"shard {self.path}: {error}") from error
        if count != tokens.nbytes:
            raise UserError(
                f"shard {self.path}: expected {tokens.nbytes} bytes at {offset}, got {count}: "
                "it has become shorter; prepare it again"
            )

    def _windows(self, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        tokens = np.empty((len(starts), length + 1), self.dtype)
        for row, start in zip(tokens, starts.tolist(), strict=True):
            self._fill(row, start)
        largest = int(tokens.max())  # an id beyond the vocabulary would end in a device assertion on a GPU
        check(f"shard {self.path}", largest, largest < self.vocabulary, f"ids below vocabulary = {self.vocabulary}")
        windows = torch.from_numpy(tokens.astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    def batch(self, seed: int, step: int, batch: int, length: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return `rows` of the batch of a step: input ids and labels, `[batch, length]` int64.

        Labels are shifted by one token. The positions are a function of (seed, step) alone.
        Raises UserError if the shard is shorter than one window, or cannot be read.
        """
        self.check_length(length)
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        return self._windows(generator.integers(0, len(self) - length, size=batch)[rows], length)

    def windows(self, tokens: int, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first `tokens` tokens, or all if fewer, as consecutive windows, in batches as above."""
        self.check_length(length)
        starts = np.arange(0, min(tokens, len(self) - 1) - length + 1, length)
        for first in range(0, len(starts), batch):
            yield self._windows(starts[first : first + batch], length)

    def check_length(self, length: int) -> None:
        """Raise UserError unless the shard holds a window of `length` tokens and the label of its last one."""
        check(f"shard {self.path}", len(self), len(self) > length, f"at least {length + 1} tokens per sequence")
