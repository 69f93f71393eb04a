"""The reference trainer: one visible loop (`loop.py`) that runs both phases of Token-Superposition Training.

Reading order: config.py, data.py, batches.py, model.py, loop.py; then what it calls: processes.py (torchrun, FSDP2 and
DDP), checkpoint.py, folder.py, metrics.py, flops.py; then the other commands, a file each. Needs the extra `train`.
"""
