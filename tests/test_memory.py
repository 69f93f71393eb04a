"""Peak memory of one loss call, forward and backward, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from tst_ext import linear_multi_hot_cross_entropy

def status(key):  # KiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def plain(hidden, weight, labels):
    return torch.nn.functional.cross_entropy(hidden @ weight.T, labels[:, 0])

loss = {"fused": linear_multi_hot_cross_entropy, "plain": plain}[sys.argv[1]]
rows, vocabulary, dim, *chunk_size = map(int, sys.argv[3:])
options = {"chunk_size": chunk_size[0]} if chunk_size else {}

def call(rows, vocabulary, dim=256, bag_size=4):
    hidden = torch.randn(rows, dim, requires_grad=True)
    weight = torch.randn(vocabulary, dim).div_(dim**0.5).requires_grad_()
    labels = torch.randint(vocabulary, (rows, bag_size))
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak, VmHWM
    before = status("VmRSS")
    (loss(hidden, weight, labels, **options) * float(sys.argv[2])).backward()
    gradients = 4 * (hidden.grad.numel() + weight.grad.numel()) // 1024
    return (status("VmHWM") - before - gradients) / 1024

call(512, 4096)  # buffers that libraries keep from their first call on
print(call(rows, vocabulary, dim))
"""


def extra_mebibytes(loss: str, upstream: float, *chunk_size: int, shape: tuple[int, ...] = (2048, 65536, 128)) -> float:
    arguments = map(str, (loss, upstream, *shape, *chunk_size))
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return float(result.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
class TestPeakMemory:
    """N = 2048, d = 128, V = 65536, float32: the full logits are 512 MiB."""

    def test_beyond_inputs_and_gradients_it_is_an_eighth_of_the_logits(self):
        # 64 MiB for a chunk of logits; the rest is the GEMM's packing buffers.
        assert 32 < extra_mebibytes("fused", 1.0) < 80

    @pytest.mark.extended
    def test_with_a_scaled_loss(self):
        # Another factor than 1 multiplies the gradients in place.
        assert extra_mebibytes("fused", 0.5) < 80

    @pytest.mark.extended
    def test_logits_take_half_of_the_weights_gradient(self):
        # N = 128, V = 1 Mi, d = 64: of the gradient's 256 MiB; the full logits are 512 MiB.
        assert 96 < extra_mebibytes("fused", 1.0, shape=(128, 1 << 20, 64)) < 144

    @pytest.mark.extended
    def test_with_smaller_chunks(self):
        assert extra_mebibytes("fused", 1.0, 128) < 50  # 32 MiB of logits

    @pytest.mark.extended
    def test_the_measurement_sees_the_full_logits(self):
        assert extra_mebibytes("plain", 1.0) > 512
