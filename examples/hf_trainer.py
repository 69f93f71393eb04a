"""Hugging Face Trainer with TST: a small Llama on the source of Python's standard library.

    pip install '.[hf,train]'
    python examples/hf_trainer.py                # half a minute on two cores

What differs from an ordinary script is the Trainer's class and its last two arguments.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments, set_seed

from tst_ext.integrations.hf import SuperpositionTrainer
from tst_ext.train.config import DataConfig
from tst_ext.train.data import Shard
from tst_ext.train.prepare import prepared_folder

LENGTH = 128  # tokens of a row, and bags of a sequence in the superposition phase

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--bag-size", type=int, default=4)
parser.add_argument("--ratio", type=float, default=0.2)
parser.add_argument("--out", default="runs/hf")
options = parser.parse_args()


def rows(split: str, most: int) -> list[dict[str, torch.Tensor]]:
    """Packed rows of LENGTH tokens; labels are the input ids, as Transformers has them."""
    count = min(most, len(shard := Shard(folder, split)))
    ids = torch.from_numpy(shard.read(0, count // LENGTH * LENGTH)).view(-1, LENGTH)
    return [dict(input_ids=row, labels=row) for row in ids]


set_seed(0)
folder = prepared_folder(DataConfig(vocabulary=1024))  # tokenised once, then found in the cache
config = LlamaConfig(
    vocab_size=Shard(folder, "train").vocabulary,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
)
trainer = SuperpositionTrainer(
    model=AutoModelForCausalLM.from_config(config),
    args=TrainingArguments(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=options.steps // 50,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        logging_steps=max(1, options.steps // 20),
        eval_strategy="steps",  # next-token in both phases
        eval_steps=max(1, options.steps // 5),
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=rows("train", 4_000_000),
    eval_dataset=rows("val", 256 * LENGTH),
    bag_size=options.bag_size,
    ratio=options.ratio,
)
trainer.train()
trainer.save_model()  # an ordinary Llama: AutoModelForCausalLM.from_pretrained(options.out) loads it
print(f"held-out next-token loss: {trainer.evaluate()['eval_loss']:.3f}")
