"""tst_ext.integrations.torchtitan beside the installed TorchTitan: its trainer on the CPU, in one process and in two.

TorchTitan does not run on a CPU by itself; titan_run.py says what it is given, and holds the checks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from helpers.processes import needs_gloo
from tst_ext import fold_labels

RUN = str(Path(__file__).with_name("titan_run.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and documents of unequal length in which the next word can be guessed."""
    folder = tmp_path_factory.mktemp("titan")
    words = "the cat sat on a mat and the dog ran far away from it".split()
    documents = [" ".join(words[(i + j) % len(words)] for j in range(20 + 13 * i % 50)) for i in range(60)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    (folder / "assets").mkdir()
    tokenizer.save(str(folder / "assets/tokenizer.json"))
    (folder / "assets/tokenizer_config.json").write_text(json.dumps(dict(bos_token=special[0], eos_token=special[1])))
    (folder / "data").mkdir()
    lines = [json.dumps(dict(text=document)) for document in documents]
    (folder / "data/data.json").write_text("\n".join(lines))
    return folder


def run(count, which, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", RUN]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, which, str(folder)], capture_output=True, text=True, timeout=400, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    return done.stdout.splitlines()


@pytest.mark.extended
@needs_gloo
def test_trainer(folder):
    """One process, then two, which start from a checkpoint of the one."""
    assert sum(line.startswith("passed: ") for line in run(1, "one", folder)) == 7
    assert sum(line.startswith("passed: ") for line in run(2, "two", folder)) == 2 * 3


class TestSuperpose:
    def test_fold_batch(self):
        from tst_ext.integrations.torchtitan import fold_batch

        ids = torch.arange(24).view(2, 12)
        positions = torch.tensor([[*range(12)], [*range(5), *range(7)]])
        inputs, labels = fold_batch(dict(input=ids, positions=positions), ids + 1, 3)
        assert torch.equal(inputs["input"], ids.view(2, 4, 3))
        assert torch.equal(labels, fold_labels(ids + 1, 3, shifted=True))
        assert labels[0, 0].tolist() == [3, 4, 5]  # the tokens of the next bag
        # The second document of row 1 begins in bag 1, which also holds the end of the first.
        assert inputs["positions"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
        with pytest.raises(ValueError, match=r"^dataloader: expected input and perhaps positions, got \['image'"):
            fold_batch(dict(input=ids, image=ids), ids, 3)

    @pytest.mark.parametrize("rows", [1, 3])  # for one row TorchTitan makes the mask in another way
    @pytest.mark.parametrize("bag_size", [2, 3, 6])
    def test_attention_masks_keep_documents_apart(self, rows, bag_size):
        """TorchTitan's own mask of the folded positions: a bag belongs to the last document that begins in it."""
        from torch.nn.attention.flex_attention import and_masks, create_mask
        from torchtitan.models.common.attention import (
            get_causal_mask_mod,
            get_efficient_causal_mask_mod_for_packed_document,
        )

        from tst_ext.integrations.torchtitan import fold_batch

        starts = torch.rand(rows, 24 * bag_size, generator=torch.Generator().manual_seed(0)) < 0.1
        starts[:, 0] = True
        number = torch.arange(starts.shape[1]).expand(starts.shape)
        positions = number - torch.where(starts, number, 0).cummax(-1).values
        bags = fold_batch(dict(input=number, positions=positions), number, bag_size)[0]["positions"]
        masks = and_masks(get_causal_mask_mod(), get_efficient_causal_mask_mod_for_packed_document(bags))
        document = starts.cumsum(-1)[:, bag_size - 1 :: bag_size]
        assert (document[:, -1] > 1).all()
        expected = (document[:, :, None] == document[:, None, :]).tril()
        assert torch.equal(create_mask(masks, rows, None, 24, 24, device="cpu")[:, 0], expected)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("parallelism.pipeline_parallel_degree", 2, "^parallelism.pipeline_parallel_degree: expected 1"),
            ("parallelism.context_parallel_degree", 2, "^parallelism.context_parallel_degree: expected 1"),
            ("parallelism.tensor_parallel_degree", 2, "^parallelism.spmd_backend: .*'spmd_types' with tensor_parallel"),
            ("parallelism.spmd_backend", "full_dtensor", "^parallelism.spmd_backend: .*got 'full_dtensor'"),
            ("training.disable_cuda_graphs", False, "^training.disable_cuda_graphs: expected True"),
            ("debug.spmd_typechecking", True, "^debug.spmd_typechecking: expected False"),
            ("superposition.ratio", 2.0, "^ratio: expected"),
            ("superposition.bag_size", 0, "^bag_size: expected"),
            ("loss", None, "^loss: expected SuperpositionLoss.Config"),
            ("dataloader.num_workers", 2, "^dataloader: expected .*with num_workers=2"),
            ("dataloader", None, "^dataloader: expected .*got NoneType"),
        ],
    )
    def test_what_cannot_work_is_refused_before_anything_is_built(self, field, value, message):
        from tst_ext.integrations import torchtitan

        config = torchtitan.llama3_debugmodel()
        *path, name = field.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, value)
        with pytest.raises(ValueError, match=message):
            torchtitan.SuperpositionTrainer(config)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(objective="mcee"), "^objective: expected"),
            (dict(position_weights="powerlaw"), "^position_weights: expected"),
            (dict(objective="mce_alt", position_weights="first"), "^position_weights: objective 'mce_alt'"),
            (dict(z_loss=-1.0), "^z_loss: expected"),
            (dict(chunk_size=0), "^chunk_size: expected"),
            (dict(mtp_scale=-0.1), "^mtp_scale: expected"),
        ],
    )
    def test_loss_options_are_checked_when_built(self, options, message):
        from tst_ext.integrations.torchtitan import SuperpositionLoss

        with pytest.raises(ValueError, match=message):
            SuperpositionLoss.Config(**options).build()

    def test_other_configs_are_named(self):
        from torchtitan.models.llama3.config_registry import llama3_debugmodel

        from tst_ext.integrations.torchtitan import BagEmbedding, LossHead, superpose

        config = llama3_debugmodel()
        superposed = superpose(config, bag_size=8, ratio=0.2, z_loss=1e-4)
        assert (superposed.superposition.bag_size, superposed.superposition.ratio) == (8, 0.2)
        model = superposed.model_spec.model
        assert type(model.lm_head) is LossHead.Config and type(model.tok_embeddings) is BagEmbedding.Config
        assert type(config.model_spec.model.lm_head) is not LossHead.Config  # what came is left as it was
        with pytest.raises(ValueError, match="^config: expected a Trainer.Config.*got SuperpositionTrainer.Config"):
            superpose(superposed)
        config.model_spec.model.lm_head = LossHead.Config(in_features=1, out_features=1)
        with pytest.raises(ValueError, match="^config: expected lm_head to be a Linear.Config, got LossHead.Config"):
            superpose(config)

    @pytest.mark.parametrize(
        "name",
        [
            "llama3_debugmodel",
            "llama3_8b",
            "qwen3_debugmodel",
            "qwen3_0_6b",
            "qwen3_moe_debug",
            "qwen3_30b_a3b",
            "deepseek_v3_debugmodel",
            "deepseek_v3_debugmodel_mtp",
            "deepseek_v3_16b",
            "deepseek_v3_671b",
        ],
    )
    def test_configs_are_found_by_name_and_take_options(self, name):
        from torchtitan.config import ConfigManager

        arguments = ["--module", "tst_ext.integrations.torchtitan", "--config", name]
        options = ["--superposition.bag_size", "3", "--superposition.ratio", "0.4", "--loss.position_weights", "first"]
        config = ConfigManager().parse_args([*arguments, *options])
        assert (config.superposition.bag_size, config.superposition.ratio) == (3, 0.4)
        assert config.loss.position_weights == "first"


class TestMultiTokenPrediction:
    def test_shift_bags(self):
        from tst_ext.integrations.torchtitan import shift_bags

        bags = torch.arange(12).view(1, 6, 2)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1]])  # two documents
        shifted, valid = shift_bags(bags, 1, positions, -100)
        assert shifted[0].tolist() == [[2, 3], [4, 5], [6, 7], [-100, -100], [10, 11], [-100, -100]]
        assert valid.tolist() == [[True, True, True, False, True, False]]
        shifted, valid = shift_bags(bags, 2, positions, 0)
        assert shifted[0].tolist() == [[4, 5], [6, 7], [0, 0], [0, 0], [0, 0], [0, 0]]
        assert valid.tolist() == [[True, True, False, False, False, False]]
        assert shift_bags(bags, 5, None, 0)[0][0].tolist() == [[10, 11]] + 5 * [[0, 0]]
        assert shift_bags(bags[..., 0], 1, positions, 0)[0].tolist() == [[2, 4, 6, 0, 10, 0]]

    def test_a_depth_reads_the_bag_before_the_one_it_predicts_and_no_later_one(self):
        from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
        from torchtitan.models.deepseek_v3 import config_registry, model_registry

        from tst_ext.integrations.torchtitan import MultiTokenModel, fold_batch, shift_bags, superpose

        plain = config_registry.deepseek_v3_debugmodel_mtp()
        plain.model_spec = model_registry("debugmodel", num_mtp_layers=2)
        config = superpose(plain)
        model_config = config.model_spec.model
        model_config.layers = model_config.layers[:1]
        for _, _, parent, name in list(model_config.traverse(FlexAttention.Config)):
            setattr(parent, name, ScaledDotProductAttention.Config())
        config.training.seq_len = 8
        model_config.update_from_config(config=config)
        model = model_config.build()
        assert type(model) is MultiTokenModel
        torch.manual_seed(0)
        model.init_states()

        stream = torch.arange(1, 26)[None]
        inputs, labels = fold_batch(dict(input=stream[:, :-1], positions=stream[:, :-1] - 1), stream[:, 1:], 3)
        positions = inputs["positions"]
        with torch.no_grad():
            outputs = model(inputs["input"], positions)
            assert [output.shape for output in outputs] == 3 * [(1, 8, 256)]
            for depth in range(3):
                predicted = shift_bags(labels, depth, positions, -100)[0] if depth else labels
                for bag in range(8 - depth - 2):
                    # It predicts the tokens of bag + depth + 1, and sees the tokens of bag + depth.
                    assert torch.equal(predicted[0, bag], inputs["input"][0, bag + depth + 1])
                    for changed, sees in ((bag + depth + 1, False), (bag + depth, True)):
                        other = inputs["input"].clone()
                        other[0, changed] += 100
                        moved = (model(other, positions)[depth] - outputs[depth])[0, bag].norm()
                        moved /= outputs[depth][0, bag].norm()
                        assert moved > 1e-2 if sees else moved < 1e-5, (depth, bag, moved)
                assert (predicted[0, 8 - depth :] == -100).all()
            model._skip_lm_head = True  # as the trainer sets it
            torch.testing.assert_close(model.eval()(inputs["input"], positions), outputs[0])

    def test_validation_is_of_the_next_token_alone(self):
        from tst_ext.integrations.torchtitan import SuperpositionLoss

        loss = SuperpositionLoss.Config(mtp_scale=0.5).build()
        loss.lm_head = lambda hidden, **options: (hidden, options)
        hidden, labels = [torch.zeros(1, 4, 2) + i for i in range(3)], torch.arange(4)[None]
        (first, options), _ = loss(hidden, labels)
        assert first is hidden[0] and "further" not in options
        (first, options), _ = loss(hidden, labels, torch.tensor(4))
        assert first is hidden[0] and options["further_scale"] == 0.25
        assert [h is hidden[i] for i, (h, _) in enumerate(options["further"], 1)] == [True, True]
        assert [y.tolist() for _, y in options["further"]] == [[[1, 2, 3, -100]], [[2, 3, -100, -100]]]

    def test_other_models_are_refused(self):
        from torchtitan.models.deepseek_v3 import MTPLoss, config_registry

        from tst_ext.integrations import torchtitan

        plain = config_registry.deepseek_v3_debugmodel_mtp()
        plain.loss = MTPLoss.Config(mtp_scale=0.1)
        config = torchtitan.superpose(plain)
        assert config.loss.mtp_scale == 0.1 and torchtitan.superpose(plain, mtp_scale=0.2).loss.mtp_scale == 0.2
        assert type(config.model_spec.model) is torchtitan.MultiTokenModel.Config
        config.model_spec = plain.model_spec
        with pytest.raises(ValueError, match="^model_spec.model: with mtp_layers, expected MultiTokenModel"):
            torchtitan.SuperpositionTrainer(config)
        fields = {name: getattr(plain.model_spec.model, name) for name in ("tok_embeddings", "lm_head", "mtp_layers")}
        plain.model_spec.model = torchtitan.superpose(plain).model_spec.model
        for name, value in fields.items():
            setattr(plain.model_spec.model, name, value)
        with pytest.raises(ValueError, match="^config: with mtp_layers, expected a DeepSeekV3Model.Config, got Multi"):
            torchtitan.superpose(plain)
