"""What a GPU asks of the trainer, as far as a machine without one can tell."""

from types import SimpleNamespace

import pytest
import torch

from tst_ext.train import distributed
from tst_ext.train.distributed import Processes, choose_device
from tst_ext.train.files import UserError


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
