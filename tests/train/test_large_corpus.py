"""A corpus of 2 GB in below 1 GB of memory, on all cores: `make test-slow`, 10 to 20 minutes on 2 cores."""

import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from helpers.corpus import texts, write_corpus
from tst_ext.train.data import Shard, load_tokenizer


def write(corpus):
    """Write the corpus in a process of its own, because the peak of a child counts what its parent had."""
    documents = 1 + write_corpus(corpus / "a.jsonl", 1_000_000_000)
    with open(corpus / "b.txt", "w") as file:  # a single document
        for text in texts(700_000_000, seed=1):
            file.write(text.replace("\n", " "))
    table = pyarrow.table({"text": list(texts(300_000_000, seed=2))})
    pyarrow.parquet.write_table(table, corpus / "c.parquet", row_group_size=10**9)
    (corpus / "documents").write_text(str(documents + len(table)))


@pytest.mark.slow
def test_memory_of_2_gb(tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(corpus,))
    writer.start()
    writer.join()
    documents = int((corpus / "documents").read_text())
    command = [sys.executable, "-m", "tst_ext", "prepare", "--data", corpus, "--out", out, "--no-progress"]
    process = subprocess.Popen([*map(str, command), "--vocabulary", "8000"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    print(f"{usage.ru_maxrss / 1e6:.2f} GB of memory, {usage.ru_utime + usage.ru_stime:.0f} s of CPU")
    assert status == 0
    assert usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 1e9
    index = json.loads((out / "index.json").read_text())
    assert index["documents"] == documents and index["duplicates"] == 0
    assert len(index["splits"]["train"]) == 2
    tokenizer, ends, size = load_tokenizer(out / "tokenizer.json"), 0, 0
    for split in ("train", "val"):
        shard = Shard(out, split)
        for start in range(0, len(shard), 1 << 22):
            tokens = shard.read(start, min(1 << 22, len(shard) - start))
            ends += np.count_nonzero(tokens == shard.end_of_text)
            size += len(tokenizer.decode(tokens.tolist()))
    assert ends == documents and size > 2_000_000_000
