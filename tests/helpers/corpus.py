"""Generate text of any size, quickly."""

import itertools
import json
import random


def texts(size, seed=0):
    """Yield documents of made-up words with Zipf frequencies, each with a number, until they have `size` characters."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(50_000)]
    weights = list(itertools.accumulate(1 / i for i in range(1, len(words) + 1)))
    paragraphs = [" ".join(rng.choices(words, cum_weights=weights, k=120)) + ".\n" for _ in range(5000)]
    for number in itertools.count():
        text = f"{number} " + "".join(rng.choices(paragraphs, k=rng.randint(1, 8)))
        yield text
        size -= len(text)
        if size <= 0:
            return


def write_corpus(path, size, seed=0):
    """Write them as JSON Lines; return how many."""
    with open(path, "w", encoding="utf-8") as file:
        return sum(file.write(json.dumps({"text": text}) + "\n") > 0 for text in texts(size, seed))
