"""Write the text of a corpus as token shards: streamed, on all cores, and resumed where a process was killed.

docs/data.md has the format of a prepared folder and what is promised of it.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import Tokenizer
from tqdm import tqdm

from .config import DataConfig
from .corpus import Source, sources
from .data import FORMAT, INDEX, SPLITS, end_of_text_id, has_tokens, load_tokenizer, vocabulary_size
from .files import Resumable, UserError, check, unfinished_folder, write_text

SHARD_TOKENS = 1 << 28  # of a file: 512 MiB in uint16
BATCH = 1 << 21  # characters tokenised at a time, in 16 pieces or more
OVERHEAD = 100  # bytes of memory of a document, counted as characters
COMMIT_SECONDS = 5.0  # between the points that a killed process resumes from
HASHED = 1 << 28  # bytes of a corpus that its key in the cache is taken from; of a larger one sizes and times are
SAMPLED_PARTS = 16  # of a dataset, for the tokenizer
# Bytes of different words that the BPE is trained on: the library takes up to 90 bytes of memory for each, so text
# without spaces would take 8 GB, not 0.1, for 32 M characters.
DISTINCT = 6_000_000
FAR = 5.0  # times more or less text than `holdout` asks for is not held out
JOURNAL, RECORDS = "journal.json", "documents.bin"  # of a folder that is being written
RECORD = np.dtype([("hash", "<u8"), ("tokens", "<u8")])
CHUNK = 1 << 20  # records or tokens in memory at a time
# GPT-2's pattern, with an end to each run: the library takes quadratic time for a word, 40 s for 160,000 dashes.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,1024}| ?\p{N}{1,1024}| ?[^\s\p{L}\p{N}]{1,1024}|\s{1,1024}(?!\S)|\s{1,1024}"


def cache_folder() -> Path:
    """Return where prepared text is kept between runs: `$XDG_CACHE_HOME/tst-ext`, by default `~/.cache/tst-ext`.

    Raises UserError if there is no home folder.
    """
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "tst-ext"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise UserError(f"cache: {error}; set XDG_CACHE_HOME to a folder that can be written to") from error
    return home / ".cache" / "tst-ext"


def prepared_folder(config: DataConfig, progress: bool = False) -> Path:
    """Return the folder of tokens that `config` names, else one in the cache, which is made unless it is there.

    The cache's key covers text, settings and the tokenizer library; the place of the text does not count.

    Args:
        progress: show a progress bar.

    Raises:
        UserError: as `sources` and `prepare`.
    """
    if len(config.data) == 1 and has_tokens(config.data[0]):
        return config.data[0]
    corpus = sources(config)
    folder = cache_folder() / _key(corpus, config)[:16]
    if not (folder / INDEX).exists():
        try:
            prepare(corpus, config, folder, progress)
        except OSError as error:
            place = "set XDG_CACHE_HOME to a folder that can be written to"
            raise UserError(f"cache {folder}: {error.strerror or error}; {place}") from error
    return folder


def _key(corpus: list[Source], config: DataConfig) -> str:
    settings = [config.vocabulary, config.tokenizer_sample, config.end_of_text, config.holdout, config.text_key]
    key = hashlib.sha256(repr([FORMAT, tokenizers.__version__, *settings]).encode())
    if config.tokenizer:
        key.update(load_tokenizer(config.tokenizer).to_str().encode())
    small = sum(source.size for source in corpus) <= HASHED
    for source in corpus:
        key.update(source.version(small).encode())
    return key.hexdigest()


class State(NamedTuple):
    """Hold how far a folder has come: what a process needs to resume it."""

    key: str  # of text and settings
    threshold: int  # documents whose hash is below it are held out
    source: int = 0  # the source being read
    pieces: int = 0  # of it that have been written
    open: tuple[int, int] | None = None  # hash and tokens so far of a document that has not ended
    documents: int = 0
    tokens: tuple[int, int] = (0, 0)  # written of each split
    text: int = 0  # bytes of text read
    chosen: bool = False  # whether held-out text was chosen after all was written, and "rest" replaces "train"


def prepare(corpus: list[Source], config: DataConfig, folder: Path, progress: bool = False) -> None:
    """Write `folder`, whole or not at all, in the tokens of `config.tokenizer` or of a byte-level BPE trained for it.

    A document is held out if a hash of its beginning says so, so equal documents are in one split. If that holds out
    none, a document of about the right size is, or the end of the longest one. A process that is killed leaves its work
    next to the folder, and the next one with the same text and settings resumes it. A second process waits.

    Args:
        corpus: of `sources`.
        folder: empty or new.
        progress: show a progress bar.

    Raises:
        UserError: no text, text that cannot be read, an unusable tokenizer or too small a vocabulary.
        OSError: the folder is not empty or cannot be written. What was written is removed.
    """
    check("data", len(corpus), len(corpus) > 0, "files with text")
    key = _key(corpus, config)
    try:
        with unfinished_folder(folder) as unfinished:
            _Preparation(corpus, config, unfinished, progress).run(key)
    except FileExistsError:
        if _made_of(folder) != key:  # else another process has made it meanwhile
            raise


def _made_of(folder: Path) -> str | None:
    """Return the key of the text and settings that a folder was prepared from."""
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))["corpus"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Preparation:
    def __init__(self, corpus: list[Source], config: DataConfig, folder: Path, progress: bool) -> None:
        self.corpus, self.config, self.folder, self.progress = corpus, config, folder, progress
        self.files: dict[tuple[str, int], IO[bytes]] = {}

    def run(self, key: str) -> None:
        if _made_of(self.folder) == key:  # it only has to be renamed
            return self._clear()
        state = self._resume(key) or self._begin(key)
        self.encoder = _Encoder(self.folder / "tokenizer.json", self.config)
        self.separator, self.dtype = self.encoder.separator, self.encoder.dtype
        with contextlib.closing(self):
            self._truncate(state)
            if not state.chosen:
                state = self._tokenise(state)
            self._finish(state)
        self._clear()

    def _clear(self) -> None:
        """Remove what only a preparation needs."""
        for path in (*self.folder.glob("held-*.bin"), self.folder / RECORDS, self.folder / JOURNAL):
            path.unlink(missing_ok=True)

    def _resume(self, key: str) -> State | None:
        """Return the state that a killed process has left, if it was of the same text and settings."""
        try:
            values = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            state = State(
                **{**values, "open": values["open"] and tuple(values["open"]), "tokens": tuple(values["tokens"])}
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if state.key != key:
            return None
        print(f"resumes after {state.documents:,} documents, {sum(state.tokens):,} tokens", file=sys.stderr)
        return state

    def _begin(self, key: str) -> State:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        sample, threshold = _sample(self.corpus, self.config)
        if self.config.tokenizer:
            tokenizer = load_tokenizer(self.config.tokenizer)
            end_of_text_id(tokenizer, self.config)  # raises if there is none
            tokenizer.add_special_tokens([self.config.end_of_text])  # else a text that holds the token would end there
        else:
            texts = [text for number, text in sample if number >= threshold]
            print(f"trains a tokenizer on {sum(map(len, texts)):,} characters", file=sys.stderr)
            tokenizer = _train_tokenizer(texts, self.config)
        write_text(self.folder / "tokenizer.json", tokenizer.to_str(pretty=True))
        state = State(key, threshold)
        self._commit(state)
        return state

    def _path(self, split: str, index: int) -> Path:
        return self.folder / f"{split}-{index:05}.bin"

    def _truncate(self, state: State) -> None:
        """Take back what was written after `state`."""
        for split, tokens in zip(("train", "held"), state.tokens, strict=True):
            last, rest = divmod(tokens, SHARD_TOKENS)
            for path in self.folder.glob(f"{split}-*.bin"):
                if int(path.stem[-5:]) >= last + (rest > 0):
                    path.unlink()
            if rest:
                _shorten(self._path(split, last), rest * self.dtype.itemsize)
        _shorten(self.folder / RECORDS, state.documents * RECORD.itemsize)

    def _append(self, split: str, written: int, ids: np.ndarray) -> None:
        """Write tokens after the `written` ones of a split."""
        while len(ids):
            index, used = divmod(written, SHARD_TOKENS)
            if (split, index) not in self.files:
                self.files[split, index] = open(self._path(split, index), "ab")
            part = ids[: SHARD_TOKENS - used]
            self.files[split, index].write(part.tobytes())
            ids, written = ids[len(part) :], written + len(part)

    def _commit(self, state: State) -> None:
        """Make `state` the one to resume from, after all that it counts is on the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        write_text(self.folder / JOURNAL, json.dumps(state._asdict()))

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _tokenise(self, state: State) -> State:
        committed, last = state, time.monotonic()
        try:
            with _Bar(self.corpus, state, self.progress) as bar:
                for batch in _encoded(self.encoder, _batches(self.corpus, state, self.encoder.in_pieces)):
                    state = self._write(state, batch)
                    bar.update(state)
                    if time.monotonic() - last > COMMIT_SECONDS:
                        self._commit(state)
                        committed, last = state, time.monotonic()
        except UserError as error:
            if committed.documents:
                done = f"{committed.documents:,} documents before it are done"
                raise Resumable(f"{error}; {done}: with the text as it is the same command resumes there") from error
            raise
        self._commit(state)
        return state

    def _write(self, state: State, batch: "list[Encoded]") -> State:
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        records, separator = [], np.array([self.separator], self.dtype)
        unfinished, text = state.open, state.text
        for piece in batch:
            number, tokens = unfinished or (piece.hash, 0)
            split = int(number < state.threshold)
            parts[split].append(piece.ids)
            tokens += len(piece.ids)
            unfinished = (number, tokens)
            text += piece.bytes
            if piece.ends:
                parts[split].append(separator)
                records.append((number, tokens + 1))
                unfinished = None
        written = list(state.tokens)
        for split, name in enumerate(("train", "held")):
            ids = np.concatenate(parts[split]) if parts[split] else np.empty(0, self.dtype)
            self._append(name, written[split], ids)
            written[split] += len(ids)
        if records:
            if ("documents", 0) not in self.files:
                self.files["documents", 0] = open(self.folder / RECORDS, "ab")
            self.files["documents", 0].write(np.array(records, RECORD).tobytes())
        return state._replace(
            source=batch[-1].source,
            pieces=batch[-1].number + 1,
            open=unfinished,
            documents=state.documents + len(records),
            tokens=(written[0], written[1]),
            text=text,
        )

    def _finish(self, state: State) -> None:
        """Make the held-out split, and the index. What it finds done when it comes again it does again."""
        check("data", state.documents, state.documents > 0, "text")
        check("holdout", self.config.holdout, state.tokens[0] > 0, "a smaller share: it leaves no document to train on")
        records = np.memmap(self.folder / RECORDS, RECORD, "r", shape=(state.documents,))
        copies = state.documents - _different(records["hash"])
        if not state.chosen:
            for path in (*self.folder.glob("val-*.bin"), *self.folder.glob("rest-*.bin")):
                path.unlink()
            if state.tokens[1]:
                self._write_held_out(records, state.threshold)
            else:
                state = self._choose_held_out(state, np.array(records))
        if state.chosen:
            for path in self.folder.glob("rest-*.bin"):
                path.replace(path.with_name(path.name.replace("rest", "train")))
            self._truncate(state)
        del records
        for path in self.folder.glob("*.bin"):
            if not path.stat().st_size:  # the one after a full file
                path.unlink()
        with ThreadPoolExecutor() as pool:
            splits = {
                split: list(pool.map(self._describe, sorted(self.folder.glob(f"{split}-*.bin")))) for split in SPLITS
            }
        training, held = (sum(file["tokens"] for file in splits[split]) for split in SPLITS)
        index = {
            "format": FORMAT,
            "dtype": f"uint{8 * self.dtype.itemsize}",
            "vocabulary": self.encoder.vocabulary,
            "end_of_text": self.separator,
            "corpus": state.key,
            "documents": state.documents,
            "duplicates": copies,
            "splits": splits,
        }
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        counts = f"{state.documents:,} documents, {training:,} tokens to train on, {held:,} held out"
        print(
            f"prepared {counts}" + (f"; {copies:,} documents are copies of others" if copies else ""), file=sys.stderr
        )

    def _write_held_out(self, records: np.ndarray, threshold: int) -> None:
        """Write the held-out documents in the order of their hashes: any part of them is then a sample of all."""
        held = np.concatenate([part[part["hash"] < threshold] for part in _chunks(records)])
        starts = np.cumsum(held["tokens"]) - held["tokens"]
        written = 0
        for i in np.argsort(held["hash"], kind="stable"):
            written = self._copy("held", int(starts[i]), int(held["tokens"][i]), "val", written)
        self.close()

    def _choose_held_out(self, state: State, records: np.ndarray) -> State:
        """Hold out a document with its copies, or the end of the longest one, where no hash was below the threshold."""
        hashes, group, copies = np.unique(records["hash"], return_inverse=True, return_counts=True)
        tokens = np.bincount(group, records["tokens"].astype(np.float64))
        starts = np.cumsum(records["tokens"]) - records["tokens"]
        total = state.tokens[0]
        wanted = max(1, round(self.config.holdout * total))
        ratio = np.where(tokens <= total / 2, np.maximum(tokens / wanted, wanted / tokens), np.inf)
        best = int(ratio.argmin())
        unique = np.where(copies[group] == 1, records["tokens"], 0)
        longest = int(unique.argmax())
        cut = ratio[best] > FAR and unique[longest] > wanted
        if cut:
            ranges = [(int(starts[longest] + unique[longest]) - wanted, wanted)]
            print(f"no document is held out, but the last {wanted:,} tokens of one (--holdout)", file=sys.stderr)
        elif ratio[best] < np.inf:
            ranges = [(int(starts[i]), int(records["tokens"][i])) for i in np.flatnonzero(group == best)]
        else:
            raise UserError("data: expected different documents or a longer one, to hold out a part, got copies of one")
        end = rest = held = 0
        for start, count in ranges:
            rest = self._copy("train", end, start - end, "rest", rest)
            if cut:
                self._append("rest", rest, np.array([self.separator], self.dtype))
                rest += 1
            held = self._copy("train", start, count, "val", held)
            end = start + count
        rest = self._copy("train", end, total - end, "rest", rest)
        state = state._replace(chosen=True, tokens=(rest, 0))
        self._commit(state)
        return state

    def _copy(self, source: str, start: int, count: int, target: str, written: int) -> int:
        """Copy `count` tokens of one stream to the end of another, which has `written`; return how many it has then."""
        while count:
            index, used = divmod(start, SHARD_TOKENS)
            part = min(count, SHARD_TOKENS - used, CHUNK)
            with open(self._path(source, index), "rb") as file:
                file.seek(used * self.dtype.itemsize)
                self._append(target, written, np.fromfile(file, self.dtype, part))
            start, count, written = start + part, count - part, written + part
        return written

    def _describe(self, path: Path) -> dict[str, Any]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": path.name, "tokens": path.stat().st_size // self.dtype.itemsize, "sha256": digest}


def _chunks(records: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(records), CHUNK):
        yield np.array(records[start : start + CHUNK])


def _different(hashes: np.ndarray) -> int:
    """Count different numbers, a part of them at a time, so that memory is bounded."""
    passes = 1 + len(hashes) // (16 * CHUNK)
    parts = ([part[part % passes == number] for part in _chunks(hashes)] for number in range(passes))
    return sum(len(np.unique(np.concatenate(part))) for part in parts)


def _shorten(path: Path, size: int) -> None:
    with open(path, "ab") as file:
        if file.tell() < size:
            raise UserError(f"out {path}: expected {size} bytes of an interrupted preparation, got {file.tell()}")
        file.truncate(size)


class Piece(NamedTuple):
    source: int  # its number in the corpus
    number: int  # in the source, of the last one where it is a whole document
    text: str
    first: str  # the text that a document's hash is taken of, if it begins here
    ends: bool  # whether it ends here


class Encoded(NamedTuple):
    source: int
    number: int
    ends: bool
    ids: np.ndarray
    hash: int  # of the document, by its first piece; 0 of other pieces
    bytes: int  # of its text


def _batches(corpus: list[Source], state: State, in_pieces: bool = True) -> Iterator[list[Piece]]:
    """Yield what comes after `state`, about BATCH characters at a time; whole documents where not in pieces."""
    batch: list[Piece] = []
    parts: list[str] = []
    size, begins = 0, state.open is None
    for source in range(state.source, len(corpus)):
        for number, (text, ends) in enumerate(corpus[source].pieces()):
            if source == state.source and number < state.pieces:
                continue
            parts.append(text)
            if ends or in_pieces:
                batch.append(Piece(source, number, "".join(parts), parts[0] if begins else "", ends))
                size, begins = size + len(batch[-1].text) + OVERHEAD, ends
                parts.clear()
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encoded(encoder: "_Encoder", batches: Iterator[list[Piece]]) -> Iterator[list[Encoded]]:
    """Tokenise batches on all cores: while one is turned into arrays, the library's own threads work on the next."""
    with ThreadPoolExecutor(2) as pool:
        waiting: deque[Any] = deque()
        for batch in batches:
            waiting.append(pool.submit(encoder.encode, batch))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Encoder:
    """Turn pieces of text into ids, none of them the separator.

    Attributes:
        in_pieces: whether a text that is divided before a space has the ids of the whole. Some tokenizers begin every
            text with a space of their own: their documents are tokenised whole.
    """

    def __init__(self, path: Path, config: DataConfig) -> None:
        self.tokenizer = load_tokenizer(path)
        self.name, self.end_of_text = config.tokenizer or path, config.end_of_text
        self.vocabulary = vocabulary_size(self.tokenizer)
        self.separator = end_of_text_id(self.tokenizer, config)
        self.dtype = np.dtype("<u2" if self.vocabulary <= 2**16 else "<u4")
        whole, *parts = self._ids(["a word and another", "a word", " and another"])
        self.in_pieces = whole == parts[0] + parts[1]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        try:
            # _fast leaves out character offsets. Some tokenizers would begin every text with a special token.
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # such as a vocabulary without a token for what it does not know
            raise UserError(f"tokenizer {self.name}: {error}") from error

    def encode(self, batch: list[Piece]) -> list[Encoded]:
        results = []
        for piece, found in zip(batch, self._ids([piece.text for piece in batch]), strict=True):
            ids = np.array(found, self.dtype)
            if (ids == self.separator).any():
                ids = self._without_separator(piece.text)
            number = _hash(piece.first.encode()) if piece.first else 0
            results.append(Encoded(piece.source, piece.number, piece.ends, ids, number, len(piece.text.encode())))
        return results

    def _without_separator(self, text: str) -> np.ndarray:
        """Tokenise a text whose own words are the separator, as some models of tokenizers have it, in parts."""
        end = self.end_of_text
        between = text.split(end)
        parts = [end[1:] * (i > 0) + part + end[:1] * (i < len(between) - 1) for i, part in enumerate(between)]
        ids = np.array([i for part in self._ids(parts) for i in part], self.dtype)
        if (ids == self.separator).any():
            raise UserError(f"end_of_text: expected a token that no text has, got {end!r}; name another one")
        return ids


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class _Bar:
    """Show documents, tokens, MB/s of text and the time left, which the sizes of the files tell."""

    def __init__(self, corpus: list[Source], state: State, progress: bool) -> None:
        self.sizes = [source.size for source in corpus]
        self.source, self.text_before, self.size_before = state.source, state.text, sum(self.sizes[: state.source])
        total = sum(self.sizes) if corpus[0].path else None
        self.bar = tqdm(total=total, initial=state.text, unit="B", unit_scale=True, mininterval=1.0, dynamic_ncols=True,
                        disable=not progress)  # fmt: skip

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, state: State) -> None:
        if self.bar.total and state.source > self.source:  # files may be smaller than their text, or larger
            self.source, self.size_before = state.source, sum(self.sizes[: state.source])
            self.bar.total = max(state.text, round(state.text / self.size_before * sum(self.sizes)))
        shown = f"{state.documents:,} documents, {sum(state.tokens):,} tokens"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(state.text - self.bar.n)


def _sample(corpus: list[Source], config: DataConfig) -> tuple[list[tuple[int, str]], int]:
    """Return texts to train the tokenizer on, each with its document's hash, and the hash below which one is held out.

    Files give text in proportion to their sizes, in random order. If that is all the text, the share of the documents
    is met as near as can be, and none is held out where that would be far too much text or too little.
    """
    order = list(range(len(corpus)))
    random.Random(0).shuffle(order)
    if corpus[0].path is None:  # parts that have to be fetched
        order = order[:SAMPLED_PARTS]
    total = sum(corpus[i].size for i in order)
    texts: list[tuple[int, str]] = []
    sizes: dict[int, int] = {}  # of documents, by their hashes
    words: set[str] = set()
    whole, taken, size = len(order) == len(corpus), 0, 0
    for i in order:
        limit, here, number = max(1, config.tokenizer_sample * corpus[i].size // max(1, total)), 0, 0
        begins = True
        for text, ends in corpus[i].pieces():
            if here >= limit or taken >= config.tokenizer_sample:
                whole = False
                break
            number = _hash(text.encode()) if begins else number
            cost = len(text) + OVERHEAD * begins
            here, taken, begins = here + cost, taken + cost, ends
            sizes[number] = sizes.get(number, 0) + len(text)
            if config.tokenizer is None and size < DISTINCT:
                texts.append((number, text))
                new = set(re.findall(r"\w+|[^\w\s]+", text)) - words
                words |= new
                size += sum(len(word.encode()) for word in new)
    if not (whole and sizes):
        return texts, round(config.holdout * 2**64)
    ordered = sorted(sizes)
    number = min(max(1, round(config.holdout * len(ordered))), len(ordered) - 1)
    held, wanted = sum(sizes[i] for i in ordered[:number]), config.holdout * sum(sizes.values())
    return texts, ordered[number] if wanted / FAR <= held <= min(wanted * FAR, sum(sizes.values()) / 2) else 0


def _train_tokenizer(texts: list[str], config: DataConfig) -> Tokenizer:
    """Train a byte-level BPE, which can write any text."""
    check("vocabulary", config.vocabulary, config.vocabulary >= 257, "257 (bytes and a separator) or more")
    steps = tokenizers.pre_tokenizers
    check("end_of_text", config.end_of_text, len(config.end_of_text) > 1, "a token of two characters or more")
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = steps.Sequence(
        [steps.Split(tokenizers.Regex(PATTERN), "isolated"), steps.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[config.end_of_text],
        initial_alphabet=steps.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
