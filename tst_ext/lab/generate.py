"""Generate text from a trained model, one token after the other, to look at samples.

Every token runs the whole window through the code of training. A cache of keys and values would be faster, but a second
attention that could be wrong in its own way. To serve a model, export it (`tst_ext.lab.export`).
"""

import math

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..train.files import UserError, check
from ..train.model import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    end_of_text: int | None,
    positions: int,
) -> str:
    """Continue `prompt` and return the continuation, without the prompt and without the end of text.

    Args:
        tokenizer: the run's; no special tokens are put around the prompt, as none were in training.
        prompt: text to continue. One that has no tokens starts from `end_of_text`, as a document does in training.
        max_tokens: most tokens to append.
        temperature: divides the logits; 0 takes the most probable token each time.
        seed: of the draws, which are made on the CPU from logits in float32.
        end_of_text: id of the token that ends the continuation, or None.
        positions: most tokens the model reads, the last ones of a longer text; `latent_tokens` of the run.

    Raises:
        UserError: an argument out of range, or nothing to start from; names the argument.
    """
    check("max_tokens", max_tokens, max_tokens >= 1, "a number >= 1")
    check("temperature", temperature, 0 <= temperature < math.inf, "a number >= 0")
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        if end_of_text is None:
            raise UserError(f"prompt: expected some text, got {prompt!r}, and the data names no end-of-text token")
        ids = [end_of_text]
    started = len(ids)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for _ in range(max_tokens):
        window = torch.tensor([ids[-positions:]], device=device)  # [1, l]
        logits = model.head(model.hidden(window)[:, -1:])[0, 0]  # [V], of the last position alone
        token = sample(logits.float().cpu(), temperature, generator)
        if token == end_of_text:
            break
        ids.append(token)
    # Not the new tokens alone: some tokenizers drop the space before the first token of a text.
    return tokenizer.decode(ids)[len(tokenizer.decode(ids[:started])) :]


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Draw an index of `logits` [V] with probability proportional to exp(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double() / temperature).softmax(0)  # float64: finite down to temperatures of 1e-300
    return int(torch.multinomial(probabilities, 1, generator=generator))
