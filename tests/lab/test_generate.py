"""Generation: against a direct loop on a model, and on tables of logits that show what is read and drawn."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tst_ext.lab.generate import generate
from tst_ext.train.config import ModelConfig
from tst_ext.train.files import UserError
from tst_ext.train.model import Transformer

LETTERS = "abcdefgh"
END = len(LETTERS)
V = END + 1
DEFAULTS = {"max_tokens": 5, "temperature": 0.0, "seed": 0, "end_of_text": END, "positions": 4}


@pytest.fixture
def tokenizer():
    """One token a letter, one that ends a text, and a post-processor whose additions nobody wants."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<end>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", END)])
    return tokenizer


class Table(torch.nn.Module):
    """A model whose next logits are the row `logits` [V, V] of the last token; keeps what it was fed."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.fed = []

    def hidden(self, ids):
        self.fed.append(ids.tolist())
        return ids[..., None].float()  # [1, l, 1]

    def head(self, hidden):
        assert hidden.shape[:2] == (1, 1), "the head runs on one position"
        return self.logits[hidden[..., 0].long()]


def successor():
    """a is followed by b, ..., h by the end, and the end by a."""
    return Table(torch.eye(V).roll(1, dims=1))


class TestGreedy:
    def test_argmax_of_the_full_logits_beyond_the_positions(self, tokenizer):
        torch.manual_seed(0)
        positions = 8
        model = Transformer(ModelConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=32), V, positions)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)  # large, so that what follows depends on the whole window
        ids = [0, 1, 2]
        with torch.no_grad():
            for _ in range(20):
                ids.append(int(model(torch.tensor([ids[-positions:]]))[0, -1].argmax()))
        wanted = tokenizer.decode(ids[3:])
        options = {**DEFAULTS, "max_tokens": 20, "end_of_text": None}
        assert generate(model, tokenizer, "abc", **{**options, "positions": positions}) == wanted
        assert generate(model, tokenizer, "abc", **{**options, "positions": positions - 1}) != wanted

    def test_reads_the_last_positions(self, tokenizer):
        model = successor()
        assert generate(model, tokenizer, "abc", **{**DEFAULTS, "max_tokens": 3}) == "def"
        assert model.fed == [[[0, 1, 2]], [[0, 1, 2, 3]], [[1, 2, 3, 4]]]

    def test_stops_at_the_end_of_text(self, tokenizer):
        model = successor()
        assert generate(model, tokenizer, "f", **DEFAULTS) == "gh"
        assert len(model.fed) == 3

    def test_goes_on_where_the_data_has_no_end_of_text(self, tokenizer):
        # The special token is not shown.
        assert generate(successor(), tokenizer, "f", **{**DEFAULTS, "end_of_text": None}) == "ghab"

    def test_empty_prompt_starts_a_document(self, tokenizer):
        model = successor()
        assert generate(model, tokenizer, "", **DEFAULTS) == "abcde"
        assert model.fed[0] == [[END]]


class TestSampling:
    def drawn(self, tokenizer, logits, count=2000, **options):
        """How often each token follows, by rows of equal logits."""
        options = {**DEFAULTS, "max_tokens": count, "end_of_text": None, "positions": 1, **options}
        text = generate(Table(logits.expand(len(logits), -1)), tokenizer, "a", **options)
        return torch.tensor([text.count(letter) for letter in LETTERS])

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_frequencies(self, tokenizer, temperature):
        logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, -3.0, -torch.inf])
        p = (logits / temperature).softmax(0)[:END]
        n = 2000
        counts = self.drawn(tokenizer, logits, n, temperature=temperature)
        assert counts.sum() == n
        # Binomial: beyond 5 standard deviations once in 1.7 million; the 1 is the granularity of small counts.
        assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + (p > 0)).all()

    @pytest.mark.parametrize("temperature", [1e-300, 1e-3])
    def test_small_temperatures_approach_greedy(self, tokenizer, temperature):
        logits = torch.tensor([0.0, 80.0, 0, 0, 0, 0, 0, 0, 79.0])
        assert self.drawn(tokenizer, logits, 50, temperature=temperature)[1] == 50

    def test_the_seed_alone_decides(self, tokenizer):
        def text(seed):
            options = {**DEFAULTS, "max_tokens": 40, "temperature": 1.0, "seed": seed, "end_of_text": None}
            return generate(Table(torch.zeros(V, V)), tokenizer, "a", **options)

        state = torch.get_rng_state()
        first = text(0)
        assert torch.equal(torch.get_rng_state(), state), "draws nothing from torch's own generator"
        torch.rand(7)
        assert text(0) == first
        assert text(1) != first


def test_keeps_the_space_before_the_first_token():
    vocabulary = {"▁once": 0, "▁upon": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁once"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert tokenizer.decode([1]) == "upon", "such a decoder removes the space at the start of a text"
    model = Table(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    options = {**DEFAULTS, "max_tokens": 2, "end_of_text": None}
    assert generate(model, tokenizer, "once", **options) == " upon once"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a", {"temperature": -0.5}, "temperature: .*-0.5"),
        ("a", {"temperature": float("nan")}, "temperature: .*nan"),
        ("a", {"temperature": float("inf")}, "temperature: .*inf"),
        ("a", {"max_tokens": 0}, "max_tokens: expected a number >= 1, got 0"),
        ("", {"end_of_text": None}, "prompt: .*''.*no end-of-text token"),
    ],
)
def test_errors_name_the_argument(tokenizer, prompt, options, message):
    model = successor()
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, prompt, **{**DEFAULTS, **options})
    assert not model.fed
