"""Shards of tokens: windows of them, damage, and the formats of other projects."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.training import VOCABULARY, prepare_documents
from tst_ext.train import data
from tst_ext.train.config import DataConfig
from tst_ext.train.data import Shard, has_tokens
from tst_ext.train.files import UserError
from tst_ext.train.loop import train


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
        with pytest.raises(UserError, match="train.bin: expected 40000 bytes.*got 39998: it is not whole"):
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
        "change",
        [
            {"tokens": 2e4},
            {"tokens": -1},
            {"vocabulary": "64"},
            {"vocabulary": -3},
            {"end_of_text": "eot"},
            {"sha256": None},
            {"dtype": "int8"},
        ],
    )
    def test_header_of_other_types(self, shards, change):
        header = json.loads((shards / "train.json").read_text())
        (shards / "train.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(UserError, match="shard .*train.json: .*expected|train.bin: expected -2 bytes"):
            Shard(shards, "train")

    def test_ids_outside_the_vocabulary(self, shards):
        header = json.loads((shards / "train.json").read_text())
        (shards / "train.json").write_text(json.dumps({**header, "vocabulary": 63}))
        with pytest.raises(UserError, match="train.bin: expected ids below vocabulary = 63 .*, got 63"):
            for step in range(100):
                Shard(shards, "train").batch(0, step, 8, 16)

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="train.json"):
            Shard(Path(tmp_path), "train")


class TestIndex:
    @pytest.fixture
    def folder(self, documents, tmp_path):
        prepare_documents(documents, DataConfig(vocabulary=300), tmp_path / "out")
        return tmp_path / "out"

    def test_several_files_are_one_text(self, folder):
        whole = Shard(folder, "train")
        index = json.loads((folder / "index.json").read_text())
        content, files = (folder / "train-00000.bin").read_bytes(), []
        for i, start in enumerate(range(0, len(content), 3000)):
            part = content[start : start + 3000]
            (folder / f"part-{i}.bin").write_bytes(part)
            digest = hashlib.sha256(part).hexdigest()
            files.append({"file": f"part-{i}.bin", "tokens": len(part) // 2, "sha256": digest})
        index["splits"]["train"] = files
        (folder / "index.json").write_text(json.dumps(index))
        parts = Shard(folder, "train")
        assert len(parts) == len(whole) and parts.sha256 != whole.sha256
        assert np.array_equal(parts.read(1490, 3100), whole.read(1490, 3100))
        for a, b in zip(parts.batch(0, 1, 50, 100), whole.batch(0, 1, 50, 100), strict=True):
            assert torch.equal(a, b)
        (folder / "part-2.bin").write_bytes(b"x" * 3000)
        with pytest.raises(UserError, match="part-2.bin: its checksum"):
            Shard(folder, "train")

    @pytest.mark.parametrize(
        "change",
        [
            {"format": 3},
            {"splits": {}},
            {"splits": {"train": []}},
            {"splits": {"train": [{"file": "../train.bin", "tokens": 1, "sha256": "x"}]}},
            {"splits": {"train": [{"file": "train-00000.bin", "tokens": "1", "sha256": "x"}]}},
            {"splits": {"train": [{"file": "train-00000.bin", "tokens": -1, "sha256": "x"}]}},
            {"splits": [1]},
            {"dtype": "float16"},
            {"vocabulary": 0},
            {"end_of_text": True},
        ],
    )
    def test_hostile(self, folder, change):
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match="index.json: .*expected"):
            Shard(folder, "train")

    @pytest.mark.parametrize("content", ["[]", "[" * 100_000, "{", ""])
    def test_no_index(self, folder, content):
        (folder / "index.json").write_text(content)
        with pytest.raises(UserError, match="shard .*out"):
            Shard(folder, "train")


def llm_c(path, tokens, magic=20240520, version=1, count=None, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())


def nanogpt(path, tokens):
    np.asarray(tokens, "<u2").tofile(path)


class TestOthers:
    """Token files of other projects are trained on as they are, and not trusted."""

    GIVEN = DataConfig(vocabulary=VOCABULARY, end_of_text="5")

    @pytest.fixture
    def tokens(self, shared_shards):
        return {
            split: Shard(shared_shards, split).read(0, len(Shard(shared_shards, split))) for split in ("train", "val")
        }

    @pytest.fixture(params=["nanogpt", "modded-nanogpt", "llm.c", "llm.c, Llama 3"])
    def folder(self, request, tmp_path, tokens):
        folder = tmp_path / "theirs"
        folder.mkdir()
        if request.param == "nanogpt":
            for split in tokens:
                nanogpt(folder / f"{split}.bin", tokens[split])
            (folder / "input.txt").write_text("text")
            (folder / "meta.pkl").write_bytes(b"x")
        elif request.param == "modded-nanogpt":
            llm_c(folder / "fineweb_val_000000.bin", tokens["val"])
            for i in range(4):
                llm_c(folder / f"fineweb_train_{i + 1:06}.bin", tokens["train"][5000 * i : 5000 * (i + 1)])
        else:
            options = dict(magic=20240801, version=7, dtype="<u4") if "Llama" in request.param else {}
            for split in tokens:
                llm_c(folder / f"tiny_shakespeare_{split}.bin", tokens[split], **options)
        return folder

    def test_a_run_on_them_is_the_run_on_ours(self, folder, tiny, tiny_run, tokens, tmp_path):
        assert has_tokens(folder)
        for split in tokens:
            shard = Shard(folder, split, self.GIVEN)
            assert np.array_equal(shard.read(0, len(shard)), tokens[split])
            assert shard.vocabulary == VOCABULARY and shard.end_of_text == 5 and shard.tokenizer is None
        config = dataclasses.replace(tiny, data=dataclasses.replace(self.GIVEN, data=(folder,)))
        result = train(config, tmp_path / "run", progress=False)
        assert result["val_loss"] == json.loads((tiny_run / "result.json").read_text())["val_loss"]

    def test_ids_above_the_vocabulary(self, folder):
        with pytest.raises(UserError, match=r"theirs/.*train.*bin: expected ids below vocabulary = 63 .*, got 63"):
            Shard(folder, "train", DataConfig(vocabulary=63))

    def test_truncated(self, folder):
        path = sorted(folder.glob("*train*.bin"))[-1]
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match=f"{path.name}: expected"):
            Shard(folder, "train", self.GIVEN)

    def test_checksums_tell_them_apart(self, folder, monkeypatch):
        for limit in (data.CHECKSUM_LIMIT, 10):
            monkeypatch.setattr(data, "CHECKSUM_LIMIT", limit)
            before = Shard(folder, "train", self.GIVEN).sha256
            assert Shard(folder, "train", self.GIVEN).sha256 == before != Shard(folder, "val", self.GIVEN).sha256
            path = sorted(folder.glob("*train*.bin"))[0]
            content = bytearray(path.read_bytes())
            content[-4 if "tiny" in path.name else -2] ^= 1  # of the last token, in either dtype
            path.write_bytes(content)
            assert Shard(folder, "train", self.GIVEN).sha256 != before

    def test_a_tokenizer_gives_vocabulary_and_end(self, documents, tmp_path, tokens):
        prepare_documents(documents, DataConfig(vocabulary=300), tmp_path / "ours")
        (tmp_path / "theirs").mkdir()
        nanogpt(tmp_path / "theirs" / "train.bin", tokens["train"])
        shard = Shard(tmp_path / "theirs", "train", DataConfig(tokenizer=tmp_path / "ours" / "tokenizer.json"))
        assert shard.vocabulary == 300 and shard.end_of_text == 0
        assert shard.tokenizer == tmp_path / "ours" / "tokenizer.json"

    def test_many_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "OPEN_FILES", 2)
        for i in range(9):
            nanogpt(tmp_path / f"x_train_{i}.bin", range(10 * i, 10 * i + 10))
        shard = Shard(tmp_path, "train", DataConfig(vocabulary=100))
        assert shard.read(0, 90).tolist() == list(range(90)) and len(shard.opened) == 2

    def test_text_is_no_token(self, tmp_path):
        for name in ("index.json", "train.json", "val.json", "a.bin"):
            (tmp_path / name).write_text('{"text": 1}\n' * 2)
        assert has_tokens(tmp_path)  # index.json and a .bin
        (tmp_path / "a.bin").unlink()
        assert not has_tokens(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(version=2), "train.bin: version: expected 1, got 2"),
            (dict(count=-1), "train.bin: tokens of its header: expected an integer >= 0, got -1"),
            (dict(count=2**31 - 1), "train.bin: expected 4294968318 bytes by its header, got 1224"),
            (dict(count=99), "train.bin: expected 1222 bytes by its header, got 1224"),
            (dict(magic=20240801, version=7), "train.bin: expected 1424 bytes"),
        ],
    )
    def test_hostile_headers(self, tmp_path, options, message):
        llm_c(tmp_path / "train.bin", range(50, 150), **options)
        with pytest.raises(UserError, match=message):
            Shard(tmp_path, "train", DataConfig())

    def test_more_that_cannot_be(self, tmp_path):
        (tmp_path / "train_1.bin").write_bytes(b"xxx")
        with pytest.raises(UserError, match="train_1.bin: expected a whole number of uint16 tokens in bytes, got 3"):
            Shard(tmp_path, "train")
        with pytest.raises(UserError, match="expected .bin files with val in their names"):
            Shard(tmp_path, "val")
        llm_c(tmp_path / "train_1.bin", range(10), magic=20240801, version=7, dtype="<u4")
        nanogpt(tmp_path / "train_2.bin", range(10))
        with pytest.raises(UserError, match=r"expected files of one dtype, got \['uint16', 'uint32'\]"):
            Shard(tmp_path, "train")
        (tmp_path / "train_1.bin").unlink()
        with pytest.raises(UserError, match="end_of_text: expected an id below 4096, got 4096"):
            Shard(tmp_path, "train", DataConfig(end_of_text="4096"))
        (tmp_path / "train_2.bin").write_bytes(struct.pack("<2i", 20240520, 1))
        assert len(Shard(tmp_path, "train", DataConfig(vocabulary=2**16))) == 4, "too short for a header"
