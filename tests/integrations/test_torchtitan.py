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
    assert sum(line.startswith("passed: ") for line in run(2, "two", folder)) == 2 * 2


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
            (dict(position_weights="powerlaw"), "^position weights: expected"),
            (dict(objective="mce_alt", position_weights="first"), "^position_weights: objective 'mce_alt'"),
            (dict(z_loss=-1.0), "^z_loss: expected"),
            (dict(chunk_size=0), "^chunk_size: expected"),
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
        from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3

        with pytest.raises(ValueError, match="^config: expected a model without multi-token prediction"):
            superpose(deepseek_v3.deepseek_v3_debugmodel_mtp())
        config.model_spec.model.lm_head = LossHead.Config(in_features=1, out_features=1)
        with pytest.raises(ValueError, match="^config: expected lm_head to be a Linear.Config, got LossHead.Config"):
            superpose(config)

    @pytest.mark.parametrize("name", ["llama3_debugmodel", "llama3_8b", "qwen3_debugmodel", "qwen3_0_6b"])
    def test_configs_are_found_by_name_and_take_options(self, name):
        from torchtitan.config import ConfigManager

        arguments = ["--module", "tst_ext.integrations.torchtitan", "--config", name]
        options = ["--superposition.bag_size", "3", "--superposition.ratio", "0.4", "--loss.position_weights", "first"]
        config = ConfigManager().parse_args([*arguments, *options])
        assert (config.superposition.bag_size, config.superposition.ratio) == (3, 0.4)
        assert config.loss.position_weights == "first"
