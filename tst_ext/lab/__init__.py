"""Plan, compare and sweep runs of the trainer, and use their models. Needs the extra `train`, which it imports.

Reading order: subprocesses.py, sweep.py, compare.py (a sweep over seeds), plots.py. By themselves: plan.py and
fit_weights.py before a run; evaluate.py, generate.py and export.py after it.
"""
