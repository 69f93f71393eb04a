"""Evaluation: against full logits, and with losses that are known."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors

from helpers.training import prepare_documents
from tst_ext.lab import evaluate as module
from tst_ext.lab.evaluate import evaluate, evaluate_shard
from tst_ext.train.config import DataConfig, ModelConfig
from tst_ext.train.data import Shard, load_tokenizer
from tst_ext.train.files import UserError
from tst_ext.train.model import Transformer

POSITIONS = 16
TEXTS = [
    "one 中文 text",
    "two\n",
    "é",
    "the longest of these texts, longer than a window of sixteen tokens is \U0001f600",
]
OPTIONS = {"length": POSITIONS, "batch": 3, "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    """A prepared folder whose held-out half, 20 documents, is short and has letters of several bytes."""
    documents = [f"{i} {TEXTS[i % 4]}" for i in range(40)]
    prepare_documents(documents, DataConfig(vocabulary=300, holdout=0.5), tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def tokenizer(folder):
    """With a post-processor whose additions nobody wants."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.post_processor = template
    return tokenizer


@pytest.fixture
def shard(folder):
    return Shard(folder, "val")


@pytest.fixture
def model(shard):
    """In float64, in which two ways to the same sum differ by roundings of 1e-16 alone."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=32), shard.vocabulary, POSITIONS)
    torch.nn.init.normal_(model.head.weight)
    return model.double()


def stream_of(tokenizer, texts):
    return [i for text in texts for i in (*tokenizer.encode(text, add_special_tokens=False).ids, 0)]


class Stub:
    """A model whose loss is a given function of the label; keeps the pairs of token and label that it was fed."""

    cos = torch.zeros(1000, 1)

    def __init__(self, loss=lambda labels: torch.ones(labels.shape)):
        self.loss, self.pairs, self.shapes = loss, [], []

    def hidden(self, ids):
        self.shapes.append(tuple(ids.shape))
        return ids

    def head(self, ids, labels, reduction):
        assert reduction == "none"
        self.pairs += zip(ids.flatten().tolist(), labels.flatten().tolist(), strict=True)
        return self.loss(labels)


class TestLoss:
    @pytest.mark.parametrize("length", [1, 7, POSITIONS])
    def test_is_the_cross_entropy_of_the_full_logits(self, model, tokenizer, length):
        stream = torch.tensor([0, *stream_of(tokenizer, TEXTS)])
        ids, labels = stream[:-1], stream[1:]
        with torch.no_grad():
            logits = torch.cat([model(window[None])[0] for window in ids.split(length)])
        losses = F.cross_entropy(logits, labels, reduction="none")
        result = evaluate(model, tokenizer, 0, TEXTS, **{**OPTIONS, "length": length})
        # 100 sums of float64
        assert result["loss"] == pytest.approx(losses.mean().item(), rel=1e-13)
        assert result["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-12)
        bits = losses[labels != 0].sum().item() / math.log(2)
        assert result["bits_per_byte"] == pytest.approx(bits / len("".join(TEXTS).encode()), rel=1e-13)

    @pytest.mark.parametrize("batch", [1, 2, 1000])
    def test_batch_changes_nothing(self, model, tokenizer, batch):
        expected = evaluate(model, tokenizer, 0, TEXTS, **OPTIONS)
        assert evaluate(model, tokenizer, 0, TEXTS, **{**OPTIONS, "batch": batch}) == pytest.approx(expected, rel=1e-13)

    def test_float32(self, model, tokenizer):
        # 2**-24 of the logits, which the initial head of standard deviation 1 makes about sqrt(16) = 4, a token
        expected = evaluate(model, tokenizer, 0, TEXTS, **OPTIONS)
        assert evaluate(model.float(), tokenizer, 0, TEXTS, **OPTIONS) == pytest.approx(expected, rel=1e-6)

    def test_uniform_model(self, model, tokenizer, shard):
        torch.nn.init.zeros_(model.head.weight)
        result = evaluate(model, tokenizer, 0, TEXTS, **OPTIONS)
        assert result["loss"] == pytest.approx(math.log(shard.vocabulary), rel=1e-14)
        assert result["perplexity"] == pytest.approx(shard.vocabulary, rel=1e-12)
        text_tokens = result["tokens"] - len(TEXTS)
        bits = text_tokens * math.log2(shard.vocabulary)
        assert result["bits_per_byte"] == pytest.approx(bits / result["bytes"], rel=1e-14)


class TestTokens:
    @pytest.mark.parametrize(("length", "batch"), [(1, 1), (1, 7), (7, 1), (7, 3), (16, 4), (1000, 2)])
    def test_each_is_predicted_once_from_the_one_before(self, tokenizer, length, batch):
        model, stream = Stub(), stream_of(tokenizer, TEXTS)
        result = evaluate(model, tokenizer, 0, TEXTS, length=length, batch=batch, device="cpu")
        assert model.pairs == list(zip([0, *stream], stream, strict=False))
        assert result["tokens"] == len(stream)
        assert all(rows <= batch and width == length for rows, width in model.shapes[:-1])

    def test_stream_of_whole_windows(self, tokenizer):
        stream = stream_of(tokenizer, TEXTS)
        model = Stub()
        evaluate(model, tokenizer, 0, TEXTS, length=len(stream), batch=1, device="cpu")
        assert model.shapes == [(1, len(stream))]

    def test_ends_of_documents_count_for_the_loss_and_not_for_the_bits(self, tokenizer):
        n = len(stream_of(tokenizer, TEXTS)) - 4
        tenth = torch.tensor(0.1).item()  # sums of it are rounded in float32
        result = evaluate(Stub(lambda y: torch.where(y == 0, 10.0, 0.1)), tokenizer, 0, TEXTS, **OPTIONS)
        assert result["loss"] == pytest.approx((n * tenth + 40) / (n + 4), rel=1e-14)
        assert result["bytes"] == sum(len(text.encode()) for text in TEXTS)
        assert result["bits_per_byte"] == pytest.approx(n * tenth / math.log(2) / result["bytes"], rel=1e-14)

    def test_end_of_text_written_out_is_text(self, tokenizer):
        model, text = Stub(), "one<|endoftext|>two"
        result = evaluate(model, tokenizer, 0, [text], **OPTIONS)
        assert [label for _, label in model.pairs].count(0) == 1 and result["bytes"] == len(text)


class TestShard:
    def documents(self, shard, tokenizer):
        tokens = shard.read(0, len(shard))
        return [tokenizer.decode(d[:-1].tolist()) for d in np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]]

    @pytest.mark.parametrize("piece", [1, 10, 1 << 20])
    def test_equal_to_its_documents(self, model, shard, tokenizer, monkeypatch, piece):
        monkeypatch.setattr(module, "PIECE", piece)  # smaller than a document, and cutting letters
        documents = self.documents(shard, tokenizer)
        assert len(documents) == 20 and len(shard) > 3 * POSITIONS * OPTIONS["batch"]
        result = evaluate_shard(model, shard, tokenizer, **OPTIONS)
        assert result == evaluate(model, tokenizer, 0, documents, **OPTIONS)
        assert result["tokens"] == len(shard)

    def test_text_after_the_last_separator_counts(self, shard, tokenizer):
        whole = evaluate_shard(Stub(), shard, tokenizer, **OPTIONS)
        shard.length -= 1
        cut = evaluate_shard(Stub(), shard, tokenizer, **OPTIONS)
        assert cut == {**whole, "tokens": whole["tokens"] - 1}

    def test_header_without_end_of_text(self, folder, tokenizer):
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, "end_of_text": None}))
        with pytest.raises(UserError, match="val-00000.bin: its end-of-text token is not known"):
            evaluate_shard(Stub(), Shard(folder, "val"), tokenizer, **OPTIONS)


class TestErrors:
    @pytest.mark.parametrize("documents", [[], [""]])
    def test_no_text(self, tokenizer, documents):
        with pytest.raises(UserError, match="data: expected text"):
            evaluate(Stub(), tokenizer, 0, documents, **OPTIONS)

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("length", 0, "length: expected 1 to 16, .*got 0"),
            ("length", 17, "length: .*got 17"),
            ("batch", 0, "batch: .*got 0"),
        ],
    )
    def test_out_of_range(self, model, shard, tokenizer, option, value, message):
        for run in (
            lambda options: evaluate(model, tokenizer, 0, TEXTS, **options),
            lambda options: evaluate_shard(model, shard, tokenizer, **options),
        ):
            with pytest.raises(UserError, match=message):
                run({**OPTIONS, option: value})
