"""The reference trainer: one visible loop (`loop.py`) that runs both phases of Token-Superposition Training.

Reading order: config.py, data.py, batches.py, model.py, optimizer.py, loop.py. Then what the loop calls: distributed.py
(torchrun, FSDP2 and DDP), checkpoint.py, run_folder.py, metrics.py, flops.py, plot.py. Below them: files.py (whole
files, locks, UserError) and signals.py. presets.py has configurations by name. Nothing here imports `tst_ext.lab`.
Needs the extra `train`.
"""
