"""Measure how well a trained model predicts a text: loss per token, and bits per byte.

The loss of a token depends on what the tokenizer makes a token; bits per byte divide the same nats by the bytes of the
text instead, so that models with different vocabularies can be compared. The token that ends a document stands for no
byte: it counts for the loss, and not for the bits.

The text is one stream, every document followed by its end-of-text token, and one more of these in front, from which
the first token is predicted. The model reads it in consecutive windows, each without memory of the one before; so the
first tokens of a window have little to go by, and only figures of the same window length can be compared.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ..train.data import Shard
from ..train.files import UserError
from ..train.model import Transformer

PIECE = 1 << 20  # tokens of a shard in memory at a time; a document beyond it is put together from pieces


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    end_of_text: int,
    documents: list[str],
    *,
    length: int,
    batch: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """Compute the next-token loss of `documents`, every token predicted exactly once.

    Args:
        model: on `device`.
        tokenizer: the run's; no special tokens are added but `end_of_text` after each document.
        end_of_text: id of the token that ends a document.
        documents: texts, small enough to tokenise in memory; `evaluate_shard` reads larger ones. An end-of-text token
            written out in one divides it, and is no part of its bytes.
        length: tokens of a window, at most the positions of the model (`latent_tokens` of the run).
        batch: windows at a time; changes memory and time, not the result.
        device: where the model is.

    Returns:
        `loss`, nats a token, mean over all `tokens`, ends of documents among them; `perplexity`, exp(loss); `tokens`,
        how many were predicted; `bytes` of the text in UTF-8; `bits_per_byte`, the nats of all tokens but ends of
        documents / (ln 2 * bytes). Sums are float64.

    Raises:
        UserError: there is no text, or length or batch is out of range.
    """
    _check(model, length, batch)
    encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    stream = np.array([i for encoding in encodings for i in (*encoding.ids, end_of_text)], dtype=np.int64)
    written_out = np.count_nonzero(stream == end_of_text) - len(documents)
    separator = tokenizer.decode([end_of_text], skip_special_tokens=False)
    size = sum(len(text.encode()) for text in documents) - int(written_out) * len(separator.encode())

    def read(start: int, count: int) -> np.ndarray:
        return stream[start : start + count]

    return _evaluate(model, read, len(stream), size, end_of_text, length=length, batch=batch, device=device)


def evaluate_shard(
    model: Transformer, shard: Shard, tokenizer: Tokenizer, *, length: int, batch: int, device: torch.device | str
) -> dict[str, Any]:
    """Compute the next-token loss of a shard: as `evaluate` of the documents in it, in their order there.

    Their bytes are those of the tokens decoded, and so those of the text itself where the tokenizer loses nothing, as
    a byte-level one does. The shard is read piece by piece.

    Args and returns: as `evaluate`.

    Raises:
        UserError: as `evaluate`; the header names no end-of-text token; or the shard cannot be read.
    """
    if shard.end_of_text is None:
        raise UserError(f"shard {shard.path}: its header names no end_of_text, which bits per byte need")
    _check(model, length, batch)
    size = _text_size(shard, shard.end_of_text, tokenizer)
    return _evaluate(model, shard.read, len(shard), size, shard.end_of_text, length=length, batch=batch, device=device)


def _check(model: Transformer, length: int, batch: int) -> None:
    positions = len(model.cos)
    if not 1 <= length <= positions:
        raise UserError(f"length: expected 1 to {positions}, the positions of the model, got {length}")
    if batch < 1:
        raise UserError(f"batch: expected an integer >= 1, got {batch}")


def _text_size(shard: Shard, end_of_text: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the documents of a shard, decoded one by one: a cut elsewhere may go through a letter."""
    size, rest = 0, np.empty(0, np.int64)
    for start in range(0, len(shard), PIECE):
        tokens = np.concatenate((rest, shard.read(start, min(PIECE, len(shard) - start))))
        *documents, rest = np.split(tokens, np.flatnonzero(tokens == end_of_text) + 1)
        texts = tokenizer.decode_batch([d[:-1].tolist() for d in documents], skip_special_tokens=False)
        size += sum(len(text.encode()) for text in texts)
    return size + len(tokenizer.decode(rest.tolist(), skip_special_tokens=False).encode())


@torch.no_grad()
def _evaluate(
    model: Transformer,
    read: Callable[[int, int], np.ndarray],
    tokens: int,
    size: int,
    end_of_text: int,
    *,
    length: int,
    batch: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """The figures of a stream of `tokens` tokens that stand for `size` bytes; `read(start, count)` returns a part."""
    if size == 0:
        raise UserError("data: expected text to evaluate, got none")
    full = tokens // length
    parts = [(row * length, min(batch, full - row), length) for row in range(0, full, batch)]
    if tokens % length:
        parts.append((full * length, 1, tokens % length))
    before = torch.tensor([end_of_text])
    nats = torch.zeros(2, dtype=torch.float64)  # of all tokens, of those of the text
    for start, rows, width in parts:
        stream = torch.from_numpy(read(start, rows * width))
        ids, labels = torch.cat((before, stream[:-1])).view(rows, width), stream.view(rows, width)
        before = stream[-1:]
        losses = model.head(model.hidden(ids.to(device)), labels.to(device), reduction="none").cpu().double()
        nats += torch.stack((losses.sum(), losses[labels != end_of_text].sum()))
    loss = nats[0] / tokens
    return {
        "loss": loss.item(),
        "perplexity": loss.exp().item(),
        "tokens": tokens,
        "bytes": size,
        "bits_per_byte": nats[1].item() / (math.log(2) * size),
    }
