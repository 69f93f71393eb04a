"""The reference trainer: one visible loop (`loop.py`) that runs both phases of Token-Superposition Training.

Reading order: config.py, data.py, model.py, loop.py, compare.py. Needs the packages of the extra `train`.
"""
