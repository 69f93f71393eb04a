"""The export, read by transformers itself."""

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import processors

from helpers.training import prepare_documents
from tst_ext.lab import export
from tst_ext.lab.export import export_hf
from tst_ext.lab.generate import generate
from tst_ext.train.config import DataConfig, ModelConfig, TrainConfig
from tst_ext.train.data import Shard, load_tokenizer
from tst_ext.train.files import UserError
from tst_ext.train.model import Transformer

# Grouped heads, a theta that is nobody's default, and sizes that differ, so that no transposition fits.
CONFIG = TrainConfig(
    model=ModelConfig(dim=64, layers=3, heads=4, kv_heads=2, ffn_dim=96, rope_theta=50000.0), latent_tokens=64
)
TEXTS = ["plain words", " leading space", "don't stop .", "tab\tline\r\n  é 中文 \U0001f600", "a<|endoftext|>b"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder with a byte-level BPE."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    prepare_documents([f"{i} the quick brown fox don't stop" for i in range(20)], DataConfig(vocabulary=300), folder)
    return folder


@pytest.fixture(scope="module")
def shard(data):
    return Shard(data, "train")


def make(config, vocabulary):
    """Gains and matrices large enough for every one of them to show in the logits, whose deviation is about 1. The
    embedding keeps its initial one, 0.02: beside a variance of 4e-4 the norm's eps of 1e-5 shows."""
    torch.manual_seed(0)
    model = Transformer(config.model, vocabulary, config.latent_tokens)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name != "embedding.weight":
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def model(shard):
    return make(CONFIG, shard.vocabulary)


@pytest.fixture(scope="module")
def exported(model, data, shard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    export_hf(model, CONFIG, data / "tokenizer.json", shard.end_of_text, folder)
    return folder


def load(folder, kind=transformers.LlamaForCausalLM, **options):
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **options
    )
    assert type(loaded) is kind
    assert not any(report.values()), report  # missing, unexpected and mismatched keys, errors
    return loaded


def copied(folder, to, **changes):
    """A copy of an export with entries of config.json replaced, or removed where None."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return to


@pytest.fixture
def ids(shard):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shard.vocabulary, (3, CONFIG.latent_tokens), generator=generator)


def error_of(model, ids):
    """A function of logits: the norm of their error, in units of the error of our own float32 ones."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids)
        unit = (model(ids) - exact).norm()
    return lambda logits: ((logits - exact).norm() / unit).item()


class TestLogits:
    @pytest.fixture
    def error(self, model, ids):
        return error_of(model, ids)

    # Both are float32 computations of one function with the same roundings in another order, so about 1. Theirs rounds
    # the angles of the rotary embedding as well, up to 63 * 50000**(-1/8) = 16 rad by 16 * 2**-24 = 1e-6 each, which
    # adds 0.4 of the unit in quadrature. Measured over four seeds: 0.97 to 1.04. The rest is for other orders of sums.
    LIMIT = 3

    @torch.no_grad()
    def test_equal_to_ours_over_all_positions(self, exported, ids, error):
        assert error(load(exported)(ids).logits) < self.LIMIT

    @pytest.mark.parametrize(
        "change",
        [{"rms_norm_eps": 1e-6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}],
        ids=["eps", "theta"],
    )
    @torch.no_grad()
    def test_comparison_sees_a_wrong_constant(self, exported, ids, error, tmp_path, change):
        assert error(load(copied(exported, tmp_path / "changed", **change))(ids).logits) > 100 * self.LIMIT

    def test_rope_theta_is_there_for_transformers_4(self, exported, tmp_path):
        # Version 4 knows no rope_parameters; 5 reads configurations of 4, so without that entry it reads theirs.
        old = transformers.AutoConfig.from_pretrained(copied(exported, tmp_path / "old", rope_parameters=None))
        assert old.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}


class TestQwen3:
    """Models with normalised queries and keys, dense and with experts."""

    KINDS = {
        "dense": (transformers.Qwen3ForCausalLM, {"qk_norm": True}),
        "experts": (transformers.Qwen3MoeForCausalLM, {"qk_norm": True, "experts": 5, "experts_per_token": 2}),
    }

    @pytest.mark.parametrize("name", KINDS)
    @torch.no_grad()
    def test_logits_are_ours(self, shard, ids, tmp_path, name):
        kind, options = self.KINDS[name]
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **options))
        model = make(config, shard.vocabulary)
        export_hf(model, config, None, None, tmp_path / "hf")
        loaded = load(tmp_path / "hf", kind)
        error = error_of(model, ids)
        assert error(loaded(ids).logits) < TestLogits.LIMIT
        for wrong in ("rms_norm_eps", "norm_topk_prob"):  # the comparison sees a wrong constant
            if wrong in json.loads((tmp_path / "hf" / "config.json").read_text()):
                changed = copied(
                    tmp_path / "hf", tmp_path / wrong, **{wrong: 1e-6 if wrong == "rms_norm_eps" else False}
                )
                assert error(load(changed, kind)(ids).logits) > 100 * TestLogits.LIMIT

    def test_configuration(self, shard, tmp_path):
        model = dataclasses.replace(CONFIG.model, qk_norm=True, experts=5, experts_per_token=2, balance_rate=0.02)
        config = dataclasses.replace(CONFIG, model=model)
        export_hf(make(config, shard.vocabulary), config, None, None, tmp_path / "hf")
        loaded = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
        assert (loaded.num_experts, loaded.num_experts_per_tok) == (5, 2)
        assert (loaded.moe_intermediate_size, loaded.router_aux_loss_coef) == (CONFIG.model.ffn_dim, 0.02)
        assert loaded.norm_topk_prob and not loaded.mlp_only_layers and loaded.decoder_sparse_step == 1


class TestConfiguration:
    def test_lengths_and_special_tokens(self, exported, shard):
        config = transformers.AutoConfig.from_pretrained(exported)
        assert config.max_position_embeddings == CONFIG.latent_tokens
        assert not config.tie_word_embeddings
        generation = transformers.GenerationConfig.from_pretrained(exported)
        for ids in (config, generation):
            assert ids.bos_token_id == ids.eos_token_id == shard.end_of_text

    def test_without_end_of_text_and_tokenizer(self, model, tmp_path):
        export_hf(model, CONFIG, None, None, tmp_path / "hf")
        config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
        assert config.bos_token_id is None and config.eos_token_id is None, "not Llama's 1 and 2"
        files = {"config.json", "generation_config.json", "model.safetensors"}
        assert {p.name for p in (tmp_path / "hf").iterdir()} == files

    def test_files_are_for_every_user(self, exported):
        assert exported.stat().st_mode & 0o777 == 0o755
        assert all(p.stat().st_mode & 0o044 == 0o044 for p in exported.iterdir())


class TestWeights:
    def test_several_files(self, model, exported, tmp_path):
        limit = 100_000  # between the sizes of the smallest matrices and those of all: embedding and head are 76,800
        export_hf(model, CONFIG, None, None, tmp_path / "hf", file_bytes=limit)
        files = sorted((tmp_path / "hf").glob("*.safetensors"))
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
        held = [load_file(path) for path in files]
        sizes = [sum(t.nbytes for t in file.values()) for file in held]
        assert max(sizes) <= limit
        for size, following in zip(sizes, held[1:], strict=False):
            assert any(size + t.nbytes > limit for t in following.values()), "no file that was not needed"
        index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
        assert index["weight_map"] == {n: p.name for p, file in zip(files, held, strict=True) for n in file}
        whole, parts = load(exported).state_dict(), load(tmp_path / "hf").state_dict()
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_a_tensor_above_the_limit_has_a_file_of_its_own(self, model, tmp_path):
        export_hf(model, CONFIG, None, None, tmp_path / "hf", file_bytes=1)
        files = list((tmp_path / "hf").glob("*.safetensors"))
        assert len(files) == 3 + 9 * CONFIG.model.layers
        assert all(len(load_file(path)) == 1 for path in files)

    def test_bfloat16(self, model, exported, tmp_path):
        export_hf(model, CONFIG, None, None, tmp_path / "hf", dtype=torch.bfloat16)
        full, half = load(exported), load(tmp_path / "hf")
        assert half.dtype == torch.bfloat16
        for name, weight in full.state_dict().items():
            assert torch.equal(weight.bfloat16(), half.state_dict()[name]), name


class TestTokenizer:
    def check(self, folder, tokenizer):
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            # By default the end of text written out is the token there, as chats need it.
            assert theirs(text, split_special_tokens=True).input_ids == ids
            assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        return theirs

    def test_encodes_and_decodes_as_ours(self, exported, data, shard):
        theirs = self.check(exported, load_tokenizer(data / "tokenizer.json"))
        assert theirs.eos_token == "<|endoftext|>" and theirs.eos_token_id == shard.end_of_text
        assert theirs.model_max_length == CONFIG.latent_tokens
        assert theirs.clean_up_tokenization_spaces is False, "which transformers 5 does not do to a BPE, but 4 does"

    def test_adds_nothing_that_training_did_not_see(self, model, data, tmp_path):
        tokenizer = load_tokenizer(data / "tokenizer.json")
        template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.post_processor = template
        assert tokenizer.encode("plain").ids[0] == 0
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        export_hf(model, CONFIG, tmp_path / "tokenizer.json", None, tmp_path / "hf")
        assert self.check(tmp_path / "hf", tokenizer).eos_token is None


def test_greedy_generation_is_ours(model, exported, data, shard):
    # Theirs keeps keys and values, which moves logits by 1e-5 of their deviation of 1: a tie within that in one of 50
    # steps has a probability of about 1e-3, once and for all, since nothing here is random.
    tokenizer = load_tokenizer(data / "tokenizer.json")
    prompt = torch.tensor([tokenizer.encode("the quick", add_special_tokens=False).ids])
    theirs = load(exported).generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, do_sample=False)
    assert prompt.shape[1] + 20 < theirs.shape[1] <= CONFIG.latent_tokens
    ours = generate(
        model,
        tokenizer,
        "the quick",
        max_tokens=50,
        temperature=0,
        seed=0,
        end_of_text=shard.end_of_text,
        positions=CONFIG.latent_tokens,
    )
    assert ours == tokenizer.decode(theirs[0, prompt.shape[1] :].tolist())


class TestWholeOrNotAtAll:
    def test_does_not_replace_a_folder(self, model, tmp_path):
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "precious").write_text("x")
        with pytest.raises(UserError, match="out .*hf: the folder is not empty"):
            export_hf(model, CONFIG, None, None, tmp_path / "hf")
        assert [p.name for p in tmp_path.rglob("*")] == ["hf", "precious"]

    def test_folders_that_are_empty_or_not_there(self, model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("empty").mkdir()
        Path("target").mkdir()
        Path("link").symlink_to("target")
        for folder in ("empty", "new/deep", "link"):
            export_hf(model, CONFIG, None, None, Path(folder))
            assert (tmp_path / folder / "config.json").exists()

    def test_folder_that_cannot_be_made(self, model):
        with pytest.raises(UserError, match="out /dev/null/hf"):
            export_hf(model, CONFIG, None, None, Path("/dev/null/hf"))

    def test_full_disk(self, model, tmp_path, monkeypatch):
        def fail(tensors, path, metadata):
            Path(path).write_bytes(b"half")
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(export, "save_file", fail)
        with pytest.raises(UserError, match="out .*hf: .*No space left"):
            export_hf(model, CONFIG, None, None, tmp_path / "hf")
        assert list(tmp_path.iterdir()) == []

    def test_missing_tokenizer(self, model, tmp_path):
        with pytest.raises(UserError, match="tokenizer .*absent.json"):
            export_hf(model, CONFIG, tmp_path / "absent.json", None, tmp_path / "hf")
        assert list(tmp_path.iterdir()) == []
