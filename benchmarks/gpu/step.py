"""A training step of the reference model next to the same model in other code, without torch.compile, in turns.

The trainer's default in float32, and the preset 270m in bfloat16 with 2 sequences of 4096 tokens. Also recorded: how
far the loss of the third step, which holds two updates, is from ours.
"""

import sys

from common import DEVICE, REHEARSE, ROOT, medians, record, recorded, zipf_ids

from tst_ext.train.config import ModelConfig
from tst_ext.train.presets import preset

sys.path.append(str(ROOT / "benchmarks"))
import steps  # noqa: E402

SHAPES = {
    "default": (*steps.SHAPES["default"], "float32"),
    "270m": (preset("270m").model, preset("270m").data.vocabulary, 2, 4096, "bfloat16"),
}
if REHEARSE:
    tiny = ModelConfig(dim=32, layers=1, heads=2, kv_heads=2, ffn_dim=48)
    SHAPES = {"default": (tiny, 130, 2, 16, "float32"), "270m": (tiny, 130, 2, 16, "bfloat16")}


def main() -> int:
    for shape, (model, vocabulary, batch, length, dtype) in SHAPES.items():
        facts = dict(shape=shape, dtype=dtype)
        with recorded(**facts):
            tokens = zipf_ids((batch, length + 1), vocabulary).to(DEVICE)
            ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            ours, peers = steps.contenders(model, ids, labels, vocabulary, dtype)
            runs = {"ours": ours} | {name: run for name, run in peers.items() if not isinstance(run, str)}
            losses = {name: [float(run()) for _ in range(3)][-1] for name, run in runs.items()}
            times = medians(runs)
            for name, run in peers.items():
                if isinstance(run, str):
                    record(**facts, peer=name, unavailable=run)
                    continue
                over = {"over_ours": times[name] / times["ours"], "loss_differs": losses[name] / losses["ours"] - 1}
                record(**facts, peer=name, ms=times[name] * 1e3, ours_ms=times["ours"] * 1e3, **over)
    return 0


if __name__ == "__main__":
    sys.exit(main())
