"""The trainer on a GPU, as far as a machine without one can tell."""

import dataclasses
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.training import VOCABULARY
from tst_ext.lab.evaluate import evaluate
from tst_ext.lab.generate import generate
from tst_ext.train import distributed
from tst_ext.train.config import SuperpositionConfig
from tst_ext.train.distributed import Processes, choose_device
from tst_ext.train.files import UserError
from tst_ext.train.loop import train
from tst_ext.train.metrics import read_metrics
from tst_ext.train.model import Transformer

aten = torch.ops.aten


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs, the second of them current, that answer as torch.cuda does. Yields the calls of set_device."""
    chosen = []

    def set_device(device):
        if device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        chosen.append(device)

    def zeros(*_, device):
        if device.type == "cuda" and device.index is not None and device.index >= 4:
            raise RuntimeError("CUDA error: invalid device ordinal")

    cuda = SimpleNamespace(is_available=lambda: True, current_device=lambda: 1, set_device=set_device)
    fake = SimpleNamespace(cuda=cuda, device=torch.device, zeros=zeros)
    monkeypatch.setattr(distributed, "torch", fake)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return chosen


class TestChoice:
    @pytest.mark.parametrize(
        ("name", "local_rank", "expected"),
        [
            ("auto", None, "cuda:1"),
            ("cuda", None, "cuda:1"),
            ("auto", "3", "cuda:3"),
            ("cuda", "0", "cuda:0"),
            ("cuda:2", None, "cuda:2"),
            ("cuda:2", "3", "cuda:2"),
        ],
    )
    def test_has_an_index(self, gpus, monkeypatch, name, local_rank, expected):
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert Processes(name).device == torch.device(expected)
        assert gpus == [torch.device(expected)]

    def test_cpu_has_none(self, gpus, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert Processes("cpu").device == torch.device("cpu")
        assert gpus == []

    def test_a_gpu_that_is_not_there(self, gpus, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "4")
        with pytest.raises(UserError, match="device: expected auto, cpu or cuda, got 'auto': CUDA error: invalid"):
            choose_device("auto")


class StandIn(TorchDispatchMode):
    """Let the device meta stand for a GPU: refuse what a GPU refuses, and count what its host waits for.

    Only numbers of the CPU may meet tensors of the device. Reading the device waits, and so does a copy to it that is
    not asked to be asynchronous. What is read is 1, or a tensor of zeros.
    """

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.is_meta or t.dim()}
        if name in (aten._to_copy, aten.copy_):
            source = args[-1] if name is aten._to_copy else args[1]
            target = torch.device(kwargs.get("device") or source.device) if name is aten._to_copy else args[0].device
            self.waits += source.device.type != target.type and not (
                target.type == "meta" and non_blocking(args, kwargs)
            )
            if source.is_meta and target.type == "cpu":
                if name is aten.copy_:
                    return args[0].zero_()
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        elif name is aten._local_scalar_dense and tensors[0].is_meta:
            self.waits += 1
            return torch.ones((), dtype=tensors[0].dtype).item()
        else:
            assert len(devices) < 2, f"{func} of tensors on {devices}"
        return func(*args, **kwargs)


def non_blocking(args, kwargs):  # of _to_copy and copy_
    return kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])


@pytest.fixture
def stand_in(monkeypatch):
    adamw = torch.optim.AdamW
    monkeypatch.setattr(distributed, "choose_device", lambda _: torch.device("meta"))
    # The fused kernels are not for meta. What they compute waits for no GPU.
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options))
    with StandIn() as mode:
        yield mode


class TestOnADevice:
    @pytest.mark.parametrize(
        "options",
        [{}, dict(straddle=False), dict(objective="mce_alt"), dict(sides="output"), dict(reinitialise=True)],
        ids=lambda options: "-".join(map(str, options)) or "default",
    )
    def test_a_step_waits_for_it_only_to_report(self, tiny, shards, tmp_path, stand_in, options):
        """In both phases, with micro-batches, validations and checkpoints. Fresh weights at the switch wait once."""
        for path in shards.glob("*.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "end_of_text": 0}))
        run = dataclasses.replace(tiny.run, micro_batch=2, log_every=3, eval_every=6, checkpoint_every=6)
        superposition = SuperpositionConfig(bag_size=4, ratio=1 / 3, **options)
        config = dataclasses.replace(tiny, run=run, superposition=superposition, steps=12)
        before = []
        train(config, tmp_path / "run", progress=False, on_step=lambda _: before.append(stand_in.waits))
        phases = [m["phase"] for m in read_metrics(tmp_path / "run") if "loss" in m]
        assert phases == ["superposition", *["recovery"] * 3]
        waited = {step for step, (a, b) in enumerate(pairwise(before)) if b > a}
        assert waited == {2, 5, 8} | ({4} if superposition.reinitialise else set())

    def test_evaluation_and_generation(self, tiny, stand_in):
        model = Transformer(tiny.model, VOCABULARY, tiny.latent_tokens).to("meta")
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<end>": 2}, merges=[]))
        options = dict(length=tiny.latent_tokens, batch=2, device="meta")
        assert evaluate(model, tokenizer, 2, ["ab" * 50], **options)["tokens"] == 101
        options = dict(temperature=1.0, seed=0, end_of_text=None, positions=tiny.latent_tokens)
        generate(model, tokenizer, "ab", max_tokens=20, **options)
