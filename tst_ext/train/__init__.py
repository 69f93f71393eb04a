"""Train models through both phases of Token-Superposition Training, in one visible loop. Needs the extra `train`.

Reading order: config.py, data.py, batches.py, model.py, optimizer.py, loop.py, and what the loop calls: distributed.py,
checkpoint.py, run_folder.py, metrics.py, flops.py, plot.py. Nothing here imports `tst_ext.lab`.
"""
