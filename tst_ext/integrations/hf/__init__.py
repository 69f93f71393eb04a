"""TST for Hugging Face Transformers: any decoder whose output head is a plain linear layer, and a Trainer.

`superpose(model)` teaches a model to read bags; `SuperpositionTrainer` is a `transformers.Trainer` for both phases. The
model's class, parameters and files stay what they were. Needs the extra `hf`.
"""

from .data import fold_batch
from .model import restore, superpose
from .trainer import SuperpositionCallback, SuperpositionTrainer

__all__ = ["SuperpositionCallback", "SuperpositionTrainer", "fold_batch", "restore", "superpose"]
