"""Read tokens from files: folders that `tst prepare` wrote, and the .bin files of nanoGPT, llm.c and modded-nanogpt.

docs/data.md has the formats.
"""

import hashlib
import json
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .config import DataConfig
from .files import UserError, check, short

FORMAT = 2
INDEX = "index.json"
SPLITS = ("train", "val")
DTYPES = ("uint16", "uint32")
CHECKSUM_LIMIT = 1 << 30  # bytes of a split; hashing a larger one at each start would take many seconds
BLOCK, BLOCKS = 1 << 20, 256  # bytes and number; of a larger split of others, without checksums, so much is hashed
OPEN_FILES = 128
LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # by its first number: version, dtype
LLM_C_HEADER = 1024  # bytes


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, which holds no code. Raises UserError if the file is missing or malformed."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise UserError(f"tokenizer {path}: {error}") from error
    tokenizer.no_truncation()  # some files ask for one length of all texts, which would cut documents
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text, and ends no document
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, config: DataConfig) -> int:
    """Return the id of the token that ends a document; raise UserError if the tokenizer has none."""
    token = tokenizer.token_to_id(config.end_of_text)
    if token is None:
        raise UserError(f"tokenizer {config.tokenizer}: has no token {config.end_of_text!r}; name one by --end-of-text")
    return token


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return V, of which all ids are below; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def has_tokens(folder: Path) -> bool:
    """Tell whether a folder holds tokens, not text."""
    return _has_index(folder) or any(_has_header(folder, split) for split in SPLITS) or bool(_others(folder, "train"))


def _has_index(folder: Path) -> bool:
    return (folder / INDEX).exists() and any(folder.glob("*.bin"))


def _has_header(folder: Path, split: str) -> bool:
    return (folder / f"{split}.json").exists() and (folder / f"{split}.bin").exists()


@dataclass(frozen=True)
class TokenFile:
    path: Path
    tokens: int
    sha256: str | None
    offset: int = 0  # bytes before the first token


class Shard:
    """Read one split, "train" or "val", of a folder of tokens piece by piece.

    Attributes:
        name: of the file or files, for messages.
        vocabulary: V; ids are below it.
        end_of_text: id of the token that ends a document, None if that is not known.
        tokenizer: the tokenizer.json that made the tokens, None if there is none.
        sha256: checksum of the tokens. Of files of others larger than CHECKSUM_LIMIT, of parts of them.

    Args:
        folder: of any of the formats.
        split: "train" or "val".
        config: gives vocabulary, end of text and tokenizer of files that do not name them.

    Raises:
        UserError: a file is missing, truncated or altered, a header is wrong, or an id is not below the vocabulary.
    """

    def __init__(self, folder: Path, split: str, config: DataConfig | None = None) -> None:
        self.vocabulary: int
        self.end_of_text: int | None
        self.tokenizer: Path | None = folder / "tokenizer.json"
        try:
            if _has_index(folder):
                files = self._open_index(folder / INDEX, split)
            elif others := _others(folder, split):
                files = self._open_others(others, config or DataConfig())
            elif _others(folder, "train"):
                raise UserError(f"shard {folder}: expected .bin files with {split} in their names, got none")
            else:
                files = self._open_format_1(folder, split)
            if self.tokenizer is not None and not self.tokenizer.exists():
                self.tokenizer = None
            self.name = str(files[0].path if len(files) == 1 else folder / f"{split}-*.bin")
            self.length = sum(file.tokens for file in files)
            self.paths = [file.path for file in files]
            self.opened: dict[int, BufferedReader] = {}
            sums = self._verify(files)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"shard {folder}: {error}") from error
        self.offsets = [file.offset for file in files]
        self.ends = list(accumulate(file.tokens for file in files))
        self.sha256 = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    def _open_index(self, path: Path, split: str) -> list[TokenFile]:
        index = json.loads(path.read_text(encoding="utf-8"))
        try:
            files = [TokenFile(path.parent / f["file"], f["tokens"], f["sha256"]) for f in index["splits"][split]]
            names = [f["file"] for f in index["splits"][split]]
            valid = (
                index["format"] == FORMAT
                and all(type(f.tokens) is int and f.tokens >= 0 and type(f.sha256) is str for f in files)
                and all(Path(name).name == name for name in names)
            )
        except (TypeError, KeyError):
            valid = False
        if not valid or not files:
            wanted = f"an index of format {FORMAT} with files of {split}"
            raise UserError(f"shard {path}: expected {wanted}, got {short(index)}")
        self._take_header(path, index)
        return files

    def _open_format_1(self, folder: Path, split: str) -> list[TokenFile]:
        """Read the format before INDEX: train.json and val.json, each with its .bin file."""
        path = folder / f"{split}.json"
        header = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"format": int, "tokens": int, "sha256": str}
        valid = isinstance(header, dict) and all(type(header.get(name)) is kind for name, kind in kinds.items())
        if not valid or header["format"] != 1:
            raise UserError(f"shard {path}: expected a header of format 1, got {short(header)}")
        self._take_header(path, header)
        return [TokenFile(folder / f"{split}.bin", header["tokens"], header["sha256"])]

    def _take_header(self, path: Path, header: dict[str, Any]) -> None:
        for name, kind in {"dtype": str, "vocabulary": int}.items():
            check(f"shard {path}: {name}", header.get(name), type(header.get(name)) is kind, f"a {kind.__name__}")
        check(f"shard {path}: dtype", header["dtype"], header["dtype"] in DTYPES, f"one of {', '.join(DTYPES)}")
        check(f"shard {path}: vocabulary", header["vocabulary"], header["vocabulary"] >= 1, "an integer >= 1")
        end = header.get("end_of_text")
        check(f"shard {path}: end_of_text", end, end is None or type(end) is int, "an id or null")
        self.dtype = np.dtype(header["dtype"]).newbyteorder("<")
        self.vocabulary, self.end_of_text = header["vocabulary"], end

    def _open_others(self, paths: list[Path], config: DataConfig) -> list[TokenFile]:
        """Read headers of llm.c and modded-nanogpt; a file without one is nanoGPT's, which has nothing but uint16."""
        dtypes, files = set(), []
        for path in paths:
            size = path.stat().st_size
            with open(path, "rb") as file:
                head = file.read(12)
            magic, version, tokens = struct.unpack("<3i", head) if len(head) == 12 else (0, 0, 0)
            if magic in LLM_C:
                wanted, dtype = LLM_C[magic]
                check(f"shard {path}: version", version, version == wanted, str(wanted))
                check(f"shard {path}: tokens of its header", tokens, tokens >= 0, "an integer >= 0")
                files.append(TokenFile(path, tokens, None, LLM_C_HEADER))
            else:
                dtype = "uint16"
                check(f"shard {path}", size, size % 2 == 0, "a whole number of uint16 tokens in bytes")
                files.append(TokenFile(path, size // 2, None))
            dtypes.add(dtype)
        check(f"shard {paths[0].parent}", sorted(dtypes), len(dtypes) == 1, "files of one dtype")
        self.dtype = np.dtype(dtypes.pop()).newbyteorder("<")
        if config.tokenizer:
            self.tokenizer = config.tokenizer
            tokenizer = load_tokenizer(config.tokenizer)
            self.vocabulary, self.end_of_text = vocabulary_size(tokenizer), end_of_text_id(tokenizer, config)
        else:
            self.vocabulary = config.vocabulary
            self.end_of_text = int(config.end_of_text) if config.end_of_text.isdecimal() else None
            end = self.end_of_text
            check("end_of_text", end, end is None or end < self.vocabulary, f"an id below {self.vocabulary}")
        return files

    def _verify(self, files: list[TokenFile]) -> list[str]:
        """Check sizes, checksums and ids of small splits; return the checksum of each file."""
        sums, whole = [], self.length * self.dtype.itemsize <= CHECKSUM_LIMIT
        for number, spec in enumerate(files):
            file = self._file(number)
            size = os.fstat(file.fileno()).st_size
            wanted = spec.offset + spec.tokens * self.dtype.itemsize
            if size != wanted:
                raise UserError(
                    f"shard {spec.path}: expected {wanted} bytes by its header, got {size}: it is not whole"
                )
            if spec.sha256 is None:
                sums.append(self._hash(spec, file.fileno(), 0 if whole else max(1, BLOCKS // len(files))))
                continue
            if whole and hashlib.file_digest(file, "sha256").hexdigest() != spec.sha256:
                raise UserError(f"shard {spec.path}: its checksum differs from its header's; prepare it again")
            sums.append(spec.sha256)
        return sums

    def _hash(self, spec: TokenFile, descriptor: int, blocks: int) -> str:
        """Return a checksum of a file of others, or of so many blocks of it, whose ids it checks."""
        size = spec.tokens * self.dtype.itemsize
        step = max(BLOCK, size // blocks // BLOCK * BLOCK) if blocks else BLOCK
        digest = hashlib.sha256(str(size).encode())
        for start in range(0, size, step):
            data = os.pread(descriptor, min(BLOCK, size - start), spec.offset + start)
            digest.update(data)
            self._check_ids(np.frombuffer(data, self.dtype), str(spec.path))
        return digest.hexdigest()

    def _file(self, number: int) -> BufferedReader:
        """Return a file, open. Few are open at a time: processes may have 1024, and a large corpus more files."""
        if number not in self.opened:
            if len(self.opened) >= OPEN_FILES:
                self.opened.pop(next(iter(self.opened))).close()
            self.opened[number] = open(self.paths[number], "rb")
        return self.opened[number]

    def _check_ids(self, tokens: np.ndarray, name: str) -> None:
        largest = int(tokens.max())  # an id beyond the vocabulary would end in a device assertion on a GPU
        wanted = f"ids below vocabulary = {self.vocabulary} (--vocabulary, --tokenizer)"
        check(f"shard {name}", largest, largest < self.vocabulary, wanted)

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens `[start, start + count)` as int64. Raises UserError if a file is unreadable or shorter."""
        tokens = np.empty(count, self.dtype)
        self._fill(tokens, start)
        return tokens.astype(np.int64)

    def _fill(self, tokens: np.ndarray, start: int) -> None:
        # Not by a memory map: if a mapped file shrinks, SIGBUS ends the process without a message or checkpoint.
        while len(tokens):
            index = bisect_right(self.ends, start)
            first = self.ends[index - 1] if index else 0
            part = tokens[: self.ends[index] - start]
            path, offset = self.paths[index], self.offsets[index] + (start - first) * self.dtype.itemsize
            try:
                count = os.preadv(self._file(index).fileno(), [part.data], offset)
            except OSError as error:
                raise UserError(f"shard {path}: {error}") from error
            if count != part.nbytes:
                raise UserError(
                    f"shard {path}: expected {part.nbytes} bytes at {offset}, got {count}: it has become shorter"
                )
            tokens, start = tokens[len(part) :], start + len(part)

    def sequences(self, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Return input ids and labels, `[len(starts), length]` int64; labels are shifted by one token."""
        tokens = np.empty((len(starts), length + 1), self.dtype)
        for row, start in zip(tokens, starts.tolist(), strict=True):
            self._fill(row, start)
        self._check_ids(tokens, self.name)
        windows = torch.from_numpy(tokens.astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    def batch(self, seed: int, step: int, batch: int, length: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return `rows` of a batch drawn with replacement: input ids and labels, `[batch, length]` int64.

        Labels are shifted by one token. The positions are a function of (seed, step) alone.
        Raises UserError if the shard is shorter than one window, or cannot be read.
        """
        self.check_length(length)
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        return self.sequences(generator.integers(0, len(self) - length, size=batch)[rows], length)

    def windows(self, tokens: int, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first `tokens` tokens, or all if fewer, as consecutive windows, in batches as above."""
        self.check_length(length)
        starts = np.arange(0, min(tokens, len(self) - 1) - length + 1, length)
        for first in range(0, len(starts), batch):
            yield self.sequences(starts[first : first + batch], length)

    def check_length(self, length: int, remedy: str = "") -> None:
        """Raise UserError unless the shard holds a window of `length` tokens and the label of its last one."""
        check(f"shard {self.name}", len(self), len(self) > length, f"at least {length + 1} tokens per sequence{remedy}")


def _others(folder: Path, split: str) -> list[Path]:
    """List the .bin files of a split, as other projects name them: train.bin, fineweb_train_000001.bin."""
    if _has_index(folder) or any(_has_header(folder, split) for split in SPLITS):
        return []
    return sorted(p for p in folder.glob("*.bin") if split in re.split("[^a-z]+", p.stem.lower()))
