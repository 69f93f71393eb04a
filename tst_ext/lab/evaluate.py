"""Measure how well a trained model predicts a text: loss per token, and bits per byte.

Bits per byte compare models with different tokenizers; ends of documents stand for no byte and do not count for them.
The text is one stream, every document followed by its end-of-text token, and begins with one more of these. The model
reads it in consecutive windows without memory of the one before: only figures of equal window length can be compared.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ..train.data import Shard
from ..train.files import UserError, check
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
        tokenizer: the run's; no special tokens are added but `end_of_text`, an id, after each document.
        documents: texts, small enough to tokenise in memory; `evaluate_shard` reads larger ones.
        length: tokens of a window, at most the positions of the model (`latent_tokens` of the run).
        batch: windows at a time; changes memory and time, not the result.

    Returns:
        `loss`, nats per token, mean over all `tokens`, with ends of documents; `perplexity`, exp(loss); `tokens`
        predicted; `bytes` of the text in UTF-8; `bits_per_byte`, nats of the text's tokens / (ln 2 * bytes).

    Raises:
        UserError: there is no text, or length or batch is out of range.
    """
    encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    stream = np.array([i for encoding in encodings for i in (*encoding.ids, end_of_text)], dtype=np.int64)
    size = sum(len(text.encode()) for text in documents)
    return _evaluate(
        model, lambda start, count: stream[start : start + count], len(stream), size, end_of_text, length, batch, device
    )


def evaluate_shard(
    model: Transformer, shard: Shard, tokenizer: Tokenizer, *, length: int, batch: int, device: torch.device | str
) -> dict[str, Any]:
    """Compute what `evaluate` does of the documents in a shard, which is read piece by piece.

    Bytes are those of the decoded tokens: those of the text itself if the tokenizer loses nothing, as a byte-level one.

    Raises:
        UserError: as `evaluate`; the header names no end-of-text token; or the shard cannot be read.
    """
    if shard.end_of_text is None:
        raise UserError(
            f"shard {shard.name}: its end-of-text token is not known (--end-of-text), which bits per byte need"
        )
    size, rest = 0, np.empty(0, np.int64)
    for start in range(0, len(shard), PIECE):
        tokens = np.concatenate((rest, shard.read(start, min(PIECE, len(shard) - start))))
        # Documents are decoded one by one: a cut elsewhere may go through a letter.
        *documents, rest = np.split(tokens, np.flatnonzero(tokens == shard.end_of_text) + 1)
        texts = tokenizer.decode_batch([d[:-1].tolist() for d in documents], skip_special_tokens=False)
        size += sum(len(text.encode()) for text in texts)
    size += len(tokenizer.decode(rest.tolist(), skip_special_tokens=False).encode())
    return _evaluate(model, shard.read, len(shard), size, shard.end_of_text, length, batch, device)


@torch.no_grad()
def _evaluate(
    model: Transformer,
    read: Callable[[int, int], np.ndarray],
    tokens: int,
    size: int,
    end_of_text: int,
    length: int,
    batch: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """Evaluate a stream of `tokens` tokens that stand for `size` bytes; `read(start, count)` returns a part."""
    positions = len(model.cos)
    check("length", length, 1 <= length <= positions, f"1 to {positions}, the positions of the model")
    check("batch", batch, batch >= 1, "an integer >= 1")
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
