"""Documents to shards, shards to batches."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Tokenizer

from tst_ext.train.config import DataConfig
from tst_ext.train.data import Shard, prepare, prepared_folder, read_documents
from tst_ext.train.files import UserError

CONFIG = DataConfig(vocabulary=300, holdout=0.1)


class TestReadDocuments:
    def test_every_kind_of_file(self, tmp_path):
        (tmp_path / "b.txt").write_text("two\nlines")
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "three", "id": 3}\n')
        (tmp_path / "ignored.csv").write_text("x")
        assert read_documents(DataConfig(data=(tmp_path,))) == ["one", "three", "two\nlines"]
        assert read_documents(DataConfig(data=(tmp_path / "b.txt",))) == ["two\nlines"]

    def test_text_key(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
        assert read_documents(DataConfig(data=(tmp_path / "a.jsonl",), text_key="body")) == ["one"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"text": "one"}\n{"body": "two"}', "a.jsonl, line 2.*'text'"),
            ("a.jsonl", '{"text": "one"}\n[1]', "line 2"),
            ("a.jsonl", "{", "a.jsonl"),
            ("a.csv", "x", "a.csv: expected .txt"),
            ("a.txt", b"\xff", "a.txt.*utf-8"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=message):
            read_documents(DataConfig(data=(tmp_path / name,)))

    def test_missing_and_empty(self, tmp_path):
        with pytest.raises(UserError, match="absent: no such"):
            read_documents(DataConfig(data=(tmp_path / "absent",)))
        with pytest.raises(UserError, match="holds no .txt"):
            read_documents(DataConfig(data=(tmp_path,)))

    def test_default_corpus_is_the_standard_library(self):
        corpus = read_documents(DataConfig())
        assert sum(map(len, corpus)) > 10_000_000
        assert any("class JSONDecoder" in document for document in corpus)


class TestPrepare:
    def decoded(self, folder, split):
        """Documents of a split, decoded back from its tokens."""
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        shard = Shard(folder, split)
        tokens = shard.read(0, len(shard))
        separator = json.loads((folder / f"{split}.json").read_text())["end_of_text"]
        ends = np.flatnonzero(tokens == separator)
        assert ends[-1] == len(tokens) - 1
        starts = [0, *(ends[:-1] + 1)]
        return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]

    def test_round_trip_and_split_by_document(self, documents, tmp_path):
        prepare(documents, CONFIG, tmp_path / "out")
        training, held_out = self.decoded(tmp_path / "out", "train"), self.decoded(tmp_path / "out", "val")
        assert len(held_out) == 20
        assert not set(training) & set(held_out)
        assert sorted(training + held_out) == sorted(documents)
        assert held_out != sorted(documents)[:20], "held-out documents are drawn at random"

    def test_repeats_exactly_whatever_the_order_of_the_documents(self, documents, tmp_path):
        prepare(documents, CONFIG, tmp_path / "a")
        prepare(documents[::-1], CONFIG, tmp_path / "b")
        for name in ("train.bin", "val.bin", "train.json", "tokenizer.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_any_text_survives(self, documents, tmp_path):
        odd = ["tab\tnul\0 emoji \U0001f600 中文", "\r\n  spaces  ", *documents]
        prepare(odd, CONFIG, tmp_path / "out")
        assert set(odd) == set(self.decoded(tmp_path / "out", "train") + self.decoded(tmp_path / "out", "val"))

    def test_too_few_documents(self, tmp_path):
        with pytest.raises(UserError, match="at least 2 documents.*got 1"):
            prepare(["one"], CONFIG, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_folder_that_cannot_be_made(self, documents):
        with pytest.raises(UserError, match="/dev/null/out"):
            prepare(documents, CONFIG, Path("/dev/null/out"))

    def test_does_not_replace_a_folder(self, documents, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        with pytest.raises(UserError, match="not empty"):
            prepare(documents, CONFIG, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["out"]
        assert (tmp_path / "out" / "precious").read_text() == "x"


class TestGivenTokenizer:
    @pytest.fixture
    def tokenizer(self, tmp_path):
        """Words; begins every text with <s>, cuts it to 5 tokens and fills it up to 8; its ids have gaps."""
        words = ["bag", "token", "step", "loss", "head", "row", "mean", "phase", "switch", "label"]
        ids = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: 10 + i for i, word in enumerate(words)}}
        tokenizer = Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.enable_truncation(5)
        tokenizer.enable_padding(length=8, pad_id=0)
        tokenizer.save(str(tmp_path / "given.json"))
        return tmp_path / "given.json"

    def test_documents_whole_and_nothing_but_them(self, documents, tokenizer, tmp_path):
        config = DataConfig(tokenizer=tokenizer, end_of_text="</s>", holdout=0.1)
        prepare(documents, config, tmp_path / "out")
        shard = Shard(tmp_path / "out", "train")
        assert shard.vocabulary == 20 and shard.end_of_text == 2  # the largest id and one; not the number of entries
        texts = np.split(shard.read(0, len(shard)), np.flatnonzero(shard.read(0, len(shard)) == 2) + 1)[:-1]
        assert len(texts) == 180
        # A number, which it does not know, and 60 words.
        assert all(len(t) == 62 and t[0] == 0 and (t[1:-1] >= 10).all() for t in texts)

    def test_its_end_of_text_must_exist(self, documents, tokenizer, tmp_path):
        with pytest.raises(UserError, match="no token '<|endoftext|>'; name one by --end-of-text".replace("|", r"\|")):
            prepare(documents, DataConfig(tokenizer=tokenizer), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
    def test_malformed(self, documents, tmp_path, content):
        if content is not None:
            (tmp_path / "t.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer .*t\.json: "):
            prepare(documents, DataConfig(tokenizer=tmp_path / "t.json"), tmp_path / "out")

    def test_another_one_is_another_entry_of_the_cache(self, documents, tokenizer, tmp_path):
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        data = dict(data=(tmp_path / "text.jsonl",), vocabulary=300)
        own = prepared_folder(DataConfig(**data))
        given = prepared_folder(DataConfig(**data, tokenizer=tokenizer, end_of_text="</s>"))
        assert own != given and prepared_folder(DataConfig(**data, tokenizer=tokenizer, end_of_text="<s>")) != given


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match="t.jsonl: .*surrogates"):
        read_documents(DataConfig(data=(tmp_path / "t.jsonl",)))


def _prepared(data, queue):
    queue.put(prepared_folder(data))


class TestCache:
    @pytest.fixture
    def config(self, documents, tmp_path):
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return DataConfig(data=(path,), vocabulary=300)

    def test_second_use_finds_the_first(self, config, cache):
        folder = prepared_folder(config)
        assert folder.is_relative_to(cache)
        written = (folder / "train.bin").stat().st_mtime_ns
        assert prepared_folder(config) == folder
        assert (folder / "train.bin").stat().st_mtime_ns == written

    def test_changed_text_or_settings_are_another_entry(self, config):
        folder = prepared_folder(config)
        assert prepared_folder(DataConfig(data=config.data, vocabulary=301)) != folder
        with open(config.data[0], "a") as file:
            file.write('{"text": "new"}\n')
        assert prepared_folder(config) != folder

    def test_prepared_folder_is_used_as_it_is(self, shards):
        assert prepared_folder(DataConfig(data=(shards,))) == shards

    def test_two_processes_at_once(self, config, cache):
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        processes = [context.Process(target=_prepared, args=(config, queue)) for _ in range(2)]
        for process in processes:
            process.start()
        folders = {queue.get(timeout=60) for _ in processes}
        for process in processes:
            process.join()
            assert process.exitcode == 0
        (folder,) = folders
        assert len(Shard(folder, "train")) > 1000
        assert [p.name for p in (cache / "tst-ext").iterdir()] == [folder.name], "nothing unfinished is left"


class TestShard:
    def test_batches_are_windows_and_labels_are_shifted(self, shards):
        shard = Shard(shards, "train")
        ids, labels = shard.batch(seed=0, step=5, batch=8, length=10)
        assert ids.shape == labels.shape == (8, 10) and ids.dtype == torch.int64
        assert torch.equal(ids[:, 1:], labels[:, :-1])
        text = shard.read(0, len(shard))
        for row, label in zip(ids.numpy(), labels.numpy(), strict=True):
            window = np.append(row, label[-1])
            assert any(np.array_equal(text[i : i + 11], window) for i in range(len(text) - 10))

    def test_a_step_is_a_function_of_seed_and_step_alone(self, shards):
        first, second = Shard(shards, "train"), Shard(shards, "train")
        for step in range(3):
            first.batch(0, step, 8, 10)
        assert torch.equal(first.batch(0, 7, 8, 10)[0], second.batch(0, 7, 8, 10)[0])
        drawn = {tuple(first.batch(seed, step, 8, 10)[0].flatten().tolist()) for seed in (0, 1) for step in range(4)}
        assert len(drawn) == 8

    def test_every_position_can_be_drawn(self, tmp_path, shards):
        shard = Shard(shards, "val")
        shard.length = 12
        starts = {int(shard.batch(0, step, 8, 10)[0][:, 0].sum()) for step in range(20)}
        assert len(starts) > 1
        shard.length = 11  # exactly one window
        assert torch.equal(shard.batch(0, 0, 1, 10)[1][0], torch.from_numpy(shard.read(1, 10)))

    def test_validation_windows_are_consecutive(self, shards):
        shard = Shard(shards, "val")
        batches = list(shard.windows(tokens=105, batch=4, length=10))
        assert [len(ids) for ids, _ in batches] == [4, 4, 2]
        ids, labels = (torch.cat(t).flatten() for t in zip(*batches, strict=True))
        assert torch.equal(ids, torch.from_numpy(shard.read(0, 100)))
        assert torch.equal(labels, torch.from_numpy(shard.read(1, 100)))

    def test_too_short(self, shards):
        with pytest.raises(UserError, match="at least 30001 tokens.*got 20000"):
            Shard(shards, "train").batch(0, 0, 1, 30_000)

    def test_truncated(self, shards):
        path = shards / "train.bin"
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(UserError, match="train.bin: expected 40000 bytes.*got 39998"):
            Shard(shards, "train")

    def test_altered(self, shards):
        path = shards / "train.bin"
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match="train.bin: its checksum"):
            Shard(shards, "train")

    @pytest.mark.parametrize("header", ["{}", "{", '{"format": 2, "dtype": "uint16", "tokens": 1}'])
    def test_bad_header(self, shards, header):
        (shards / "train.json").write_text(header)
        with pytest.raises(UserError, match="shard"):
            Shard(shards, "train")

    @pytest.mark.parametrize(
        "change", [{"tokens": 2e4}, {"vocabulary": "64"}, {"vocabulary": -3}, {"end_of_text": "eot"}, {"sha256": None}]
    )
    def test_header_of_other_types(self, shards, change):
        header = json.loads((shards / "train.json").read_text())
        (shards / "train.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(UserError, match="not a header of format 1"):
            Shard(shards, "train")

    def test_ids_outside_the_vocabulary(self, shards):
        header = json.loads((shards / "train.json").read_text())
        (shards / "train.json").write_text(json.dumps({**header, "vocabulary": 63}))
        with pytest.raises(UserError, match="train.bin: expected ids below vocabulary = 63, got 63"):
            for step in range(100):
                Shard(shards, "train").batch(0, step, 8, 16)

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="train.json"):
            Shard(Path(tmp_path), "train")
