"""What is done with runs of the trainer: to plan, compare and sweep them, and to use the models that come out.

Reading order: subprocesses.py (`tst train` in processes of its own), sweep.py (a grid of runs), compare.py (a sweep
over seeds), plots.py. By themselves: plan.py and fit_weights.py before a run; evaluate.py, generate.py and export.py
after it. Imports `tst_ext.train`, and is not imported by it. Needs the extra `train`.
"""
