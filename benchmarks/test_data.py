"""Tokenise a corpus, and read batches of tokens: next to the tokenizer alone, `datasets.map` and nanoGPT's loader."""

import importlib.util
import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch

from conftest import zipf_ids
from tst_ext._cpus import available_cpus
from tst_ext.train.batches import read_batch
from tst_ext.train.config import DataConfig, SuperpositionConfig, TrainConfig
from tst_ext.train.corpus import documents, sources
from tst_ext.train.data import INDEX, Shard, end_of_text_id, load_tokenizer
from tst_ext.train.prepare import prepare

WORDS = 50_000
ROWS = 1000  # documents tokenised at a time by the others, the default of datasets.map
BATCHES = 1000  # per call, so that its milliseconds are the microseconds of a batch
VOCABULARY = 32_768


def words(rng: random.Random) -> list[str]:
    """Make up different words, the frequent ones short: 7 bytes with the space in text."""
    onsets, vowels, codas = "b bl c d f g h l m n p r s sh st t th tr w".split(), "aeiou", ["", "", "n", "r", "s", "nd"]
    found: dict[str, None] = {}
    while len(found) < WORDS:
        syllables = len(str(len(found))) // 2 + rng.randrange(2) or 1
        found["".join(rng.choice(part) for _ in range(syllables) for part in (onsets, vowels, codas))] = None
    return list(found)


def text(rng: random.Random, vocabulary: list[str], weights: list[float]) -> str:
    """Write 1 to 8 paragraphs of 2 to 8 sentences of 5 to 25 words."""
    paragraphs = []
    for _ in range(rng.randint(1, 8)):
        sentences = []
        for _ in range(rng.randint(2, 8)):
            drawn = rng.choices(vocabulary, cum_weights=weights, k=rng.randint(5, 25))
            comma = rng.randrange(4, 25)
            sentences.append(f"{' '.join(drawn[:comma])}{', ' if drawn[comma:] else ''}{' '.join(drawn[comma:])}.")
        paragraphs.append(" ".join(sentence.capitalize() for sentence in sentences))
    return "\n\n".join(paragraphs)


@pytest.fixture
def corpus(request, tmp_path):
    """JSON Lines of made-up text, and the settings that prepare it with a BPE trained on it."""
    size, entries = (2_000_000, 8_000) if request.config.getoption("quick") else (20_000_000, 32_000)
    rng = random.Random(0)
    vocabulary, weights = words(rng), list(itertools.accumulate(1 / rank for rank in range(1, WORDS + 1)))
    path, written = tmp_path / "corpus.jsonl", 0
    with open(path, "w") as file:
        while written < size:
            written += file.write(json.dumps({"id": written, "text": text(rng, vocabulary, weights)}) + "\n")
    config = DataConfig(data=(path,), vocabulary=entries)
    prepare(sources(config), config, tmp_path / "first")
    return DataConfig(data=(path,), tokenizer=tmp_path / "first" / "tokenizer.json")


def test_prepare(race, corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer = load_tokenizer(corpus.tokenizer)
    separator, texts = end_of_text_id(tokenizer, corpus), list(documents(corpus))

    def fresh(name):
        """Return a new folder; to remove the one of the call before takes 0.1 % of a call."""
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return tmp_path / name

    def ours():
        folder = fresh("prepared")
        prepare(sources(corpus), corpus, folder)
        splits = json.loads((folder / INDEX).read_text())["splits"]
        return torch.tensor(sum(file["tokens"] for files in splits.values() for file in files))

    def tokenizer_alone():
        tokens = len(texts)  # of the separators
        for first in range(0, len(texts), ROWS):
            encodings = tokenizer.encode_batch_fast(texts[first : first + ROWS], add_special_tokens=False)
            tokens += sum(map(len, encodings))
        return torch.tensor(tokens)

    def encode(rows):
        encodings = tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, separator] for encoding in encodings]}

    def mapped():
        import datasets
        import pyarrow.compute

        datasets.disable_progress_bars()
        cache = str(fresh("cache"))
        dataset = datasets.load_dataset("json", data_files=str(corpus.data[0]), split="train", cache_dir=cache)
        options = {"batched": True, "batch_size": ROWS, "num_proc": available_cpus()}
        dataset = dataset.map(encode, remove_columns=dataset.column_names, **options)
        return torch.tensor(pyarrow.compute.sum(pyarrow.compute.list_value_length(dataset.data["ids"])).as_py())

    tokens = int(tokenizer_alone())
    size = corpus.data[0].stat().st_size / 1e6
    race(
        ours,
        {"datasets.map": mapped if importlib.util.find_spec("datasets") else "datasets is not installed"},
        {"encode_batch_fast": tokenizer_alone},
        rounds=5,
        tolerance=0.5 / tokens,  # all must give the same number
        work={"M tokens": tokens / 1e6},
        op="prepare",
        shape=f"{size:.0f} MB, {tokens / 1e6:.1f} M tokens, V {tokenizer.get_vocab_size()}",
        s=1,
        dtype="uint16",
    )


def pytest_generate_tests(metafunc):
    if "length" in metafunc.fixturenames:
        cases = [(8, 64, 1), (32, 1024, 1), (8, 64, 4), (32, 1024, 4)]
        cases = cases[:1] if metafunc.config.getoption("quick") else cases
        metafunc.parametrize(("batch", "length", "bag_size"), cases, ids=[f"{b}x{n}-s{s}" for b, n, s in cases])


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Token files of 256 MB, more than the caches hold, of which the operating system has all pages in memory."""
    folder = tmp_path_factory.mktemp("tokens")
    part = zipf_ids((1 << 20,), VOCABULARY).cpu().numpy().astype("<u2")
    (folder / "train.bin").write_bytes(part.tobytes() * (8 if request.config.getoption("quick") else 128))
    return folder


def test_loader(race, folder, batch, length, bag_size):
    shard = Shard(folder, "train", DataConfig(vocabulary=VOCABULARY, end_of_text="0"))

    def ours(order):
        superposition = SuperpositionConfig(bag_size=bag_size, ratio=float(bag_size > 1))
        config = TrainConfig(batch=batch, latent_tokens=length, superposition=superposition, order=order)
        steps = itertools.count()

        def read():
            for step in itertools.islice(steps, BATCHES):
                read_batch(shard, config, bag_size, step)

        return read

    def nanogpt():
        for _ in range(BATCHES):
            data = np.memmap(folder / "train.bin", np.uint16, "r")
            count = bag_size * length
            starts = torch.randint(len(data) - count, (batch,)).tolist()
            for shift in (0, 1):  # inputs and labels
                parts = [data[start + shift : start + shift + count] for start in starts]
                torch.stack([torch.from_numpy(part.astype(np.int64)) for part in parts])

    race(
        ours("epoch"),
        {"tst_ext, order random": ours("random"), "nanoGPT's get_batch": nanogpt},
        {},
        rounds=20,
        work={"M tokens": BATCHES * batch * length * bag_size / 1e6},
        op=f"{BATCHES} batches read",
        shape=f"{batch}x{length}{'' if bag_size == 1 else ' bags'}, {len(shard) / 1e6:.0f} M tokens",
        s=bag_size,
        dtype="uint16",
    )
