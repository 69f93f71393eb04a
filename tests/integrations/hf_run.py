"""A short run of SuperpositionTrainer in as many processes as there are: `hf_run.py RESULT.json BATCH_PER_PROCESS`."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.hf_cases import Rows, arguments, build  # noqa: E402
from helpers.processes import leave  # noqa: E402
from tst_ext.integrations.hf import SuperpositionTrainer  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    result = Path(sys.argv[1])
    options = dict(max_steps=6, per_device_train_batch_size=int(sys.argv[2]), learning_rate=1e-3)
    options |= dict(ddp_backend="gloo") if "WORLD_SIZE" in os.environ else {}
    trainer = SuperpositionTrainer(
        build("llama"), arguments(result.with_suffix(""), **options), train_dataset=Rows(), bag_size=3, ratio=0.5
    )
    trainer.train()
    if trainer.is_world_process_zero():
        result.write_text(json.dumps([entry for entry in trainer.state.log_history if "loss" in entry]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    leave()
