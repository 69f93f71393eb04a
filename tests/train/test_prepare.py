"""Text to shards: what is in which split, the tokenizer, the cache, and what an interruption leaves."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Tokenizer

from helpers.training import prepare_documents
from tst_ext.__main__ import main
from tst_ext.train import corpus, prepare
from tst_ext.train.config import DataConfig
from tst_ext.train.corpus import PIECE, sources
from tst_ext.train.data import Shard, load_tokenizer
from tst_ext.train.files import UNFINISHED, UserError
from tst_ext.train.prepare import JOURNAL, cache_folder, prepared_folder

CONFIG = DataConfig(vocabulary=300, holdout=0.1)


def decoded(folder, split, separator=0):
    """The documents of a split, decoded back from its tokens."""
    tokenizer, shard = load_tokenizer(folder / "tokenizer.json"), Shard(folder, split)
    assert shard.end_of_text == separator
    tokens = shard.read(0, len(shard))
    assert tokens[-1] == separator
    return [
        tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False)
        for document in np.split(tokens, np.flatnonzero(tokens == separator) + 1)[:-1]
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def index(folder):
    return json.loads((folder / "index.json").read_text())


@pytest.fixture
def small_files(monkeypatch):
    """Files of 1000 tokens, batches of 500 characters, committed after each, copied 7 at a time."""
    for name, value in dict(SHARD_TOKENS=1000, BATCH=500, COMMIT_SECONDS=-1, CHUNK=7).items():
        monkeypatch.setattr(prepare, name, value)


class TestSplits:
    def test_round_trip_by_document(self, documents, tmp_path):
        prepare_documents(documents, CONFIG, tmp_path / "out")
        training, held_out = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
        assert len(held_out) == 20
        assert training == [d for d in documents if d not in held_out], "in the order of the files"
        assert sorted(training + held_out) == sorted(documents)
        assert sorted(held_out) != sorted(documents)[:20] and held_out != sorted(held_out), "at random, in random order"

    def test_order_and_copies_of_documents_change_no_split(self, documents, tmp_path):
        prepare_documents(documents, CONFIG, tmp_path / "a")
        prepare_documents(documents[::-1], CONFIG, tmp_path / "b")
        assert decoded(tmp_path / "b", "val") == decoded(tmp_path / "a", "val")
        prepare_documents(documents * 3, CONFIG, tmp_path / "c")
        assert set(decoded(tmp_path / "c", "val")) == set(decoded(tmp_path / "a", "val"))

    def test_equal_texts_are_in_one_split_and_counted(self, tmp_path, capsys):
        folder = tmp_path / "corpus" / "out.txt"
        folder.mkdir(parents=True)
        for i in range(40):
            (folder / f"part-{i:02}.txt").write_text(f"text {i % 30} " * 20)
        config = dataclasses.replace(CONFIG, data=(tmp_path / "corpus", folder), holdout=0.2)
        out = prepared_folder(config)
        training, held_out = decoded(out, "train"), decoded(out, "val")
        assert len(training) + len(held_out) == 40 and not set(training) & set(held_out) and len(set(held_out)) == 6
        assert index(out)["documents"] == 40 and index(out)["duplicates"] == 10
        assert "40 documents" in (err := capsys.readouterr().err) and "10 documents are copies of others" in err

    def test_a_share_of_a_corpus_larger_than_the_sample(self, documents, tmp_path):
        prepare_documents(documents, dataclasses.replace(CONFIG, tokenizer_sample=1000, holdout=0.5), tmp_path / "out")
        held_out = decoded(tmp_path / "out", "val")
        assert 70 < len(held_out) < 130
        prepare_documents(
            documents[50:], dataclasses.replace(CONFIG, tokenizer_sample=1000, holdout=0.5), tmp_path / "b"
        )
        assert set(decoded(tmp_path / "b", "val")) == set(held_out) & set(documents[50:]), "whatever else is there"

    @pytest.mark.parametrize("size", [100, 5 * PIECE])
    def test_the_end_of_a_single_document(self, tmp_path, capsys, small_files, size):
        text = "".join(random.Random(0).choices("abcdef ghi\n", k=size))
        (tmp_path / "input.txt").write_text(text)
        out = prepared_folder(dataclasses.replace(CONFIG, data=(tmp_path / "input.txt",)))
        (training,), (held_out,) = decoded(out, "train"), decoded(out, "val")
        assert training + held_out == text
        assert len(Shard(out, "val")) == round(0.1 * (len(Shard(out, "train")) - 1 + len(Shard(out, "val"))))
        assert "no document is held out, but the last" in capsys.readouterr().err

    @pytest.mark.parametrize("sizes", [(360_000, 7), (7, 360_000), (3000, 2, 2, 2)])
    def test_documents_of_very_different_sizes(self, tmp_path, sizes):
        """The share is of the text too."""
        rng = random.Random(0)
        texts = [f"{i} " + "".join(rng.choices("abcde ", k=size)) for i, size in enumerate(sizes)]
        prepare_documents(texts, CONFIG, tmp_path / "out")
        held, training = (len(Shard(tmp_path / "out", split)) for split in ("val", "train"))
        assert held == round(0.1 * (held + training - 1))
        documents = decoded(tmp_path / "out", "train")
        (end,) = decoded(tmp_path / "out", "val")
        assert [t if len(t) < 1000 else t.removesuffix(end) for t in texts] == documents

    @pytest.mark.parametrize("copies", [1, 2])
    def test_few_documents_of_a_large_corpus(self, tmp_path, copies, small_files):
        """None has a hash below the threshold, so one of about the right size is held out, and all copies of it."""
        texts = [f"{i} " + "some words " * (2 + i) for i in range(12)]
        config = dataclasses.replace(CONFIG, tokenizer_sample=10, holdout=0.01)
        prepare_documents(texts * copies, config, tmp_path / "out")
        training, held_out = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
        assert held_out == texts[:1] * copies and training == texts[1:] * copies

    def test_copies_of_one_document(self, tmp_path):
        with pytest.raises(UserError, match="expected different documents.* got copies of one"):
            prepare_documents(["one"] * 5, CONFIG, tmp_path / "out")

    def test_nothing_to_train_on(self, documents, tmp_path):
        with pytest.raises(UserError, match="holdout: expected a smaller share"):
            config = dataclasses.replace(CONFIG, tokenizer_sample=1, holdout=1 - 1e-15)
            prepare_documents(documents, config, tmp_path / "out")

    @pytest.mark.parametrize("documents", [[], [""]])
    def test_no_text(self, tmp_path, documents):
        with pytest.raises(UserError, match="data: expected text"):
            prepare_documents(documents, CONFIG, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]

    def test_too_short_a_held_out_text_names_holdout(self, tiny, tmp_path):
        (tmp_path / "input.txt").write_text("some words " * 300)
        data = DataConfig(data=(tmp_path / "input.txt",), vocabulary=300)
        with pytest.raises(UserError, match="val-00000.bin: expected at least 17 tokens.*--holdout"):
            from tst_ext.train.loop import train

            train(dataclasses.replace(tiny, data=data), tmp_path / "run", progress=False)


class TestTokens:
    def test_any_text_survives(self, documents, tmp_path):
        odd = ["tab\tnul\0 emoji \U0001f600 中文", "\r\n  spaces  ", "a<|endoftext|>b", *documents]
        prepare_documents(odd, CONFIG, tmp_path / "out")
        assert sorted(odd) == sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val"))

    def test_end_of_text_written_out_is_text(self, tmp_path):
        prepare_documents([f"{i} a<|endoftext|>b<|endoftext|>" for i in range(6)], CONFIG, tmp_path / "out")
        tokens = np.concatenate(
            [Shard(tmp_path / "out", split).read(0, len(Shard(tmp_path / "out", split))) for split in ("train", "val")]
        )
        assert np.count_nonzero(tokens == 0) == 6

    def test_several_files_and_batches_change_nothing(self, documents, tmp_path, monkeypatch):
        prepare_documents([*documents, "long " * PIECE], CONFIG, tmp_path / "a")
        for name, value in dict(SHARD_TOKENS=1000, BATCH=500, COMMIT_SECONDS=-1, CHUNK=7).items():
            monkeypatch.setattr(prepare, name, value)
        prepare_documents([*documents, "long " * PIECE], CONFIG, tmp_path / "b")
        assert len(index(tmp_path / "b")["splits"]["train"]) > 10 and len(index(tmp_path / "b")["splits"]["val"]) > 1
        for split in ("train", "val"):
            a, b = Shard(tmp_path / "a", split), Shard(tmp_path / "b", split)
            assert np.array_equal(a.read(0, len(a)), b.read(0, len(b)))

    def test_pieces_of_a_document_have_the_tokens_of_the_whole(self, tmp_path):
        words = random.Random(0).choices(["bag", "don't", "step.", "(row)", "x = 1", "中文", "\n", "  two"], k=PIECE)
        text = " ".join(words)
        prepare_documents([text, text[::-1]], dataclasses.replace(CONFIG, holdout=0.4), tmp_path / "out")
        tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
        shards = [Shard(tmp_path / "out", split) for split in ("train", "val")]
        found = [shard.read(0, len(shard))[:-1].tolist() for shard in shards]
        assert len(text) > 3 * PIECE and tokenizer.encode(text).ids in found

    @pytest.mark.parametrize("run", ["\n", " ", "\0", "-", "7", "中", "ACGT"])
    def test_an_unbroken_run_of_160000_characters(self, tmp_path, run):
        """Quadratic time would be minutes each; it is no test by the clock, but nobody would wait for it."""
        text = run * (160_000 // len(run))
        prepare_documents([text, text + run, "words"], CONFIG, tmp_path / "out")
        assert text in decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")

    def test_the_sample_of_text_without_spaces_is_bounded(self, monkeypatch, tmp_path):
        monkeypatch.setattr(prepare, "DISTINCT", 2000)
        trained = []
        real = prepare._train_tokenizer
        monkeypatch.setattr(
            prepare, "_train_tokenizer", lambda texts, config: trained.extend(texts) or real(texts, config)
        )
        rng = random.Random(0)
        prepare_documents(["".join(rng.choices("abcdefgh", k=500)) for _ in range(20)], CONFIG, tmp_path / "a")
        assert len(trained) in (3, 4)
        trained.clear()
        prepare_documents([f"{i} the same words" for i in range(20)], CONFIG, tmp_path / "b")
        assert len(trained) == 18

    def test_vocabulary_of_a_bpe(self, documents, tmp_path):
        with pytest.raises(UserError, match="vocabulary: expected 257"):
            prepare_documents(documents, dataclasses.replace(CONFIG, vocabulary=100), tmp_path / "out")


class TestOddTokenizers:
    def test_one_that_begins_every_text_with_a_space(self, tmp_path):
        ids = {"<unk>": 0, "</s>": 1, "\u2581": 2, **{c: i for i, c in enumerate("abcdefgh ", 3)}}
        tokenizer = Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
        steps = tokenizers.normalizers
        tokenizer.normalizer = steps.Sequence([steps.Prepend("\u2581"), steps.Replace(" ", "\u2581")])
        tokenizer.save(str(tmp_path / "given.json"))
        text = "abc def " * PIECE
        config = DataConfig(tokenizer=tmp_path / "given.json", end_of_text="</s>", holdout=0.5)
        prepare_documents([text, "h" + text], config, tmp_path / "out")
        found = [shard.read(0, len(shard)).tolist() for shard in (Shard(tmp_path / "out", s) for s in ("train", "val"))]
        assert sorted(found) == sorted([*tokenizer.encode(t).ids, 1] for t in (text, "h" + text))

    def test_one_whose_model_knows_the_end_of_text(self, tmp_path):
        pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "\u2581abcdefgh</s>0123456789")]
        tokenizer = Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
        tokenizer.save(str(tmp_path / "given.json"))
        config = DataConfig(tokenizer=tmp_path / "given.json", end_of_text="</s>", holdout=0.1)
        prepare_documents([f"{i}abc</s>def</s>" for i in range(10)], config, tmp_path / "out")
        assert decoded(tmp_path / "out", "train", 1) + decoded(tmp_path / "out", "val", 1)
        ends = [
            np.count_nonzero(Shard(tmp_path / "out", s).read(0, len(Shard(tmp_path / "out", s))) == 1)
            for s in ("train", "val")
        ]
        assert ends == [9, 1]

    def test_end_of_text_that_texts_have(self, documents, tmp_path):
        prepare_documents(documents, dataclasses.replace(CONFIG, end_of_text="bag"), tmp_path / "out")
        found = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")
        assert sorted(found) == sorted(documents)
        given = Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1}, unk_token="</s>"))
        given.save(str(tmp_path / "given.json"))
        config = DataConfig(tokenizer=tmp_path / "given.json", end_of_text="</s>")
        with pytest.raises(UserError, match="end_of_text: expected a token that no text has, got '</s>'"):
            prepare_documents(documents, config, tmp_path / "b")
        for end in ("", "a"):
            with pytest.raises(UserError, match="end_of_text: expected a token of two characters or more"):
                prepare_documents(documents, dataclasses.replace(CONFIG, end_of_text=end), tmp_path / "c")

    def test_one_that_fails(self, documents, tmp_path):
        Tokenizer(tokenizers.models.WordLevel({"</s>": 0}, unk_token="[UNK]")).save(str(tmp_path / "given.json"))
        config = DataConfig(tokenizer=tmp_path / "given.json", end_of_text="</s>")
        with pytest.raises(UserError, match=r"tokenizer .*given.json: WordLevel error: Missing \[UNK\]"):
            prepare_documents(documents, config, tmp_path / "out")


class TestGivenTokenizer:
    @pytest.fixture(params=[True, False], ids=["special", "not-special"])
    def tokenizer(self, request, tmp_path):
        """Words; begins every text with <s>, cuts it to 5 tokens and fills it up to 8; its ids have gaps."""
        words = ["bag", "token", "step", "loss", "head", "row", "mean", "phase", "switch", "label"]
        ids = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: 10 + i for i, word in enumerate(words)}}
        tokenizer = Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
        tokenizer.add_tokens([AddedToken("</s>", special=request.param)])
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.enable_truncation(5)
        tokenizer.enable_padding(length=8, pad_id=0)
        tokenizer.save(str(tmp_path / "given.json"))
        return tmp_path / "given.json"

    def test_documents_whole_and_nothing_but_them(self, documents, tokenizer, tmp_path):
        config = DataConfig(tokenizer=tokenizer, end_of_text="</s>", holdout=0.1)
        prepare_documents([f"{d} bag</s>row" for d in documents], config, tmp_path / "out")
        shard = Shard(tmp_path / "out", "train")
        # The largest id and one; not the number of entries.
        assert shard.vocabulary == 20 and shard.end_of_text == 2
        tokens = shard.read(0, len(shard))
        texts = np.split(tokens, np.flatnonzero(tokens == 2) + 1)[:-1]
        assert len(texts) == 180
        # A number, which it does not know, 60 words, and bag, </, s, >, row.
        assert all(len(t) == 67 and t[0] == 0 and (t[1:62] >= 10).all() for t in texts)

    def test_its_end_of_text_must_exist(self, documents, tokenizer, tmp_path):
        with pytest.raises(UserError, match=r"no token '<\|endoftext\|>'; name one by --end-of-text"):
            prepare_documents(documents, DataConfig(tokenizer=tokenizer), tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(f"{UNFINISHED}*"))

    @pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
    def test_malformed(self, documents, tmp_path, content):
        if content is not None:
            (tmp_path / "t.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer .*t\.json: "):
            prepare_documents(documents, DataConfig(tokenizer=tmp_path / "t.json"), tmp_path / "out")

    def test_another_one_is_another_entry_of_the_cache(self, documents, tokenizer, tmp_path):
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        data = dict(data=(tmp_path / "text.jsonl",), vocabulary=300)
        own = prepared_folder(DataConfig(**data))
        given = prepared_folder(DataConfig(**data, tokenizer=tokenizer, end_of_text="</s>"))
        assert own != given and prepared_folder(DataConfig(**data, tokenizer=tokenizer, end_of_text="<s>")) != given


@pytest.fixture
def config(documents, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return DataConfig(data=(path,), vocabulary=300)


def _prepared(data, queue):
    queue.put(prepared_folder(data))


class TestCache:
    def test_second_use_finds_the_first(self, config, cache):
        folder = prepared_folder(config)
        assert folder.is_relative_to(cache)
        written = contents(folder)
        assert prepared_folder(config) == folder and contents(folder) == written

    @pytest.mark.parametrize("hashed", [True, False])
    def test_text_and_settings_are_the_key_and_its_place_is_not(self, config, tmp_path, monkeypatch, hashed):
        if not hashed:
            monkeypatch.setattr(prepare, "HASHED", 100)
        (path,) = config.data
        folder = prepared_folder(config)
        assert prepared_folder(dataclasses.replace(config, vocabulary=301)) != folder
        assert prepared_folder(dataclasses.replace(config, holdout=0.3)) != folder
        (tmp_path / "moved").mkdir()
        path.rename(tmp_path / "moved" / "other.jsonl")
        assert prepared_folder(dataclasses.replace(config, data=(tmp_path / "moved",))) == folder
        (tmp_path / "moved" / "other.jsonl").rename(path)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"bag", b"gab", 1))  # of the same size
        os.utime(path, ns=(1, 1))
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


class TestPlaces:
    """One line for each place that cannot be used, and nothing left behind."""

    def run(self, config, tmp_path, capsys):
        arguments = [
            "--data",
            str(config.data[0]),
            "--vocabulary",
            "300",
            "--out",
            str(tmp_path / "run"),
            "--no-progress",
        ]
        assert main(["train", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len([line for line in error if not line.startswith("trains a tokenizer")]) == 1, error
        assert not (tmp_path / "run").exists()
        return error[-1]

    def test_no_home(self, config, tmp_path, capsys, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")

        def unknown(*_):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", unknown)
        assert "home directory" in (line := self.run(config, tmp_path, capsys)) and "set XDG_CACHE_HOME" in line

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
    def test_cache_that_cannot_be_written(self, config, cache, tmp_path, capsys, monkeypatch, code):
        real = prepare._Preparation._append

        def full(self, *arguments):
            real(self, *arguments)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(prepare._Preparation, "_append", full)
        line = self.run(config, tmp_path, capsys)
        assert os.strerror(code) in line and str(cache) in line and "set XDG_CACHE_HOME" in line
        assert not list((cache / "tst-ext").iterdir())

    def test_cache_that_is_a_file(self, config, cache, tmp_path, capsys):
        cache.write_text("x")
        assert str(cache) in self.run(config, tmp_path, capsys)

    def test_where_the_cache_is(self, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == tmp_path / ".cache" / "tst-ext"

    def test_out(self, config, tmp_path, capsys, documents):
        arguments = ["prepare", "--data", str(config.data[0]), "--vocabulary", "300", "--no-progress", "--out"]
        for out, message in (("/dev/null/out", "/dev/null"), (tmp_path / "text.jsonl", "is not a folder")):
            assert main([*arguments, str(out)]) == 2
            assert message in capsys.readouterr().err
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        assert main([*arguments, str(tmp_path / "out")]) == 2 and "not empty" in capsys.readouterr().err
        assert contents(tmp_path / "out") == {"precious": b"x"}
        with pytest.raises(OSError, match="not empty"):
            prepare.prepare(sources(config), config, tmp_path / "out")
        assert main([*arguments, str(tmp_path / "p")]) == 0
        assert main(["prepare", "--data", str(tmp_path / "p"), "--out", str(tmp_path / "q")]) == 2
        assert "got a folder of tokens" in capsys.readouterr().err


class TestInterrupted:
    """Kill it at every moment at which it writes, in turn: what comes out in the end is the same."""

    class Killed(BaseException):
        """As kill -9: no handler of ours catches it, and what it leaves is what a dead process leaves."""

    @pytest.fixture
    def whole(self, config, tmp_path, small_files):
        prepare.prepare(sources(config), config, tmp_path / "whole")
        return contents(tmp_path / "whole")

    @pytest.mark.parametrize("kind", ["jsonl", "txt"])
    @pytest.mark.parametrize("seed", range(2))
    def test_at_random_moments(self, config, tmp_path, monkeypatch, whole, seed, kind):
        out, rng, kills, left = tmp_path / "out", random.Random(seed), 0, 0
        if kind == "txt":  # one document, whose end is held out
            (path,) = config.data
            path = path.rename(path.with_suffix(".txt"))
            config = dataclasses.replace(config, data=(path,))
            prepare.prepare(sources(config), config, tmp_path / "whole.txt")
            whole = contents(tmp_path / "whole.txt")

        def fragile(function):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    raise self.Killed
                return function(*arguments, **options)

            return call

        monkeypatch.setattr(prepare, "write_text", fragile(prepare.write_text))
        for name in ("_append", "_clear", "_describe", "_truncate"):
            monkeypatch.setattr(prepare._Preparation, name, fragile(getattr(prepare._Preparation, name)))
        while not out.exists():
            left = rng.randrange(40) if kills < 20 else rng.randrange(5000)
            try:
                prepare.prepare(sources(config), config, out)
            except self.Killed:
                kills += 1
                unfinished = tmp_path / f"{UNFINISHED}out"
                journal = unfinished / JOURNAL
                if kills % 2 and journal.exists() and not json.loads(journal.read_text())["chosen"]:
                    # Data written after the last commit may be there, or not, in files that it knows or in new ones.
                    for name in ("train-00000", "held-00000", "val-00000", "documents"):
                        last = max(unfinished.glob(f"{name.split('-')[0]}*.bin"), default=unfinished / f"{name}.bin")
                        with open(last, "ab") as file:
                            file.write(b"garbage")
        assert kills >= 20 and contents(out) == whole

    def test_another_text_is_prepared_from_its_beginning(self, config, documents, tmp_path, monkeypatch, whole):
        def killed(*_):
            raise self.Killed

        with monkeypatch.context() as patch, pytest.raises(self.Killed):
            patch.setattr(prepare._Preparation, "_finish", killed)
            prepare.prepare(sources(config), config, tmp_path / "out")
        config.data[0].write_text('{"text": "another"}\n{"text": "text"}\n')
        prepare.prepare(sources(config), config, tmp_path / "out")
        assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == ["another", "text"]

    def test_a_text_that_cannot_be_read_keeps_what_was_done(self, config, tmp_path, monkeypatch, whole):
        """As a network that fails."""
        real, fails = corpus._json_text, True

        def flaky(line, text_key, where):
            if fails and where.endswith("line 150"):
                raise OSError("connection lost")
            return real(line, text_key, where)

        sample = prepare._sample(sources(config), config)
        monkeypatch.setattr(prepare, "_sample", lambda *_: sample)
        monkeypatch.setattr(corpus, "_json_text", flaky)
        with pytest.raises(
            UserError, match=r"text.jsonl: OSError: connection lost; 1\d\d documents before it are done: with the text"
        ):
            prepare.prepare(sources(config), config, tmp_path / "out")
        fails = False
        prepare.prepare(sources(config), config, tmp_path / "out")
        assert contents(tmp_path / "out") == whole

    def test_lost_tokens_are_noticed(self, config, tmp_path, monkeypatch, whole):
        def killed(*_):
            raise self.Killed

        with monkeypatch.context() as patch, pytest.raises(self.Killed):
            patch.setattr(prepare._Preparation, "_finish", killed)
            prepare.prepare(sources(config), config, tmp_path / "out")
        last = sorted((tmp_path / f"{UNFINISHED}out").glob("train-*.bin"))[-1]
        os.truncate(last, 10)
        with pytest.raises(UserError, match=f"{last.name}: expected .* bytes of an interrupted preparation, got 10"):
            prepare.prepare(sources(config), config, tmp_path / "out")


def test_bar_shows_documents_tokens_and_time_left(config, capsys, monkeypatch, small_files):
    monkeypatch.setattr(prepare.tqdm, "monitor_interval", 0)
    prepared_folder(config, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"9\d%.*B/s, 200 documents, [\d,]+ tokens", last), last
