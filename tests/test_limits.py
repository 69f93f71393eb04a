"""More than 2^31 elements in a tensor, within 24 GiB: `make test-slow`. Offsets of 32 bits would wrap."""

from pathlib import Path

import pytest
import torch

from helpers.cases import generator
from helpers.numerics import relative_error
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy, reference

EPS = torch.finfo(torch.float32).eps


def needs(gibibytes):
    """Skips where the machine has less to give."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        kibibytes = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
        if kibibytes < gibibytes * 2**20:
            pytest.skip(f"needs {gibibytes} GiB, {kibibytes / 2**20:.1f} GiB are free")


@pytest.mark.slow
class TestManyLogits:
    """N V = 70,000 x 32,768 = 2.29e9."""

    ROWS, VOCABULARY, DIM, BAG = 70_000, 32_768, 8, 3

    def case(self):
        g = generator()
        hidden = torch.randn(self.ROWS, self.DIM, generator=g)
        weight = torch.randn(self.VOCABULARY, self.DIM, generator=g)
        labels = torch.randint(self.VOCABULARY, (self.ROWS, self.BAG), generator=g)
        labels[-1] = self.VOCABULARY - 1
        return hidden, weight, labels

    @pytest.mark.parametrize("chunk_size", [None, ROWS])
    def test_linear(self, chunk_size):
        needs(12)
        hidden, weight, labels = self.case()
        hidden.requires_grad_(), weight.requires_grad_()
        loss = linear_multi_hot_cross_entropy(hidden, weight, labels, reduction="sum", chunk_size=chunk_size)
        loss.backward()
        mine = loss.detach(), hidden.grad, weight.grad
        # Beside it, parts of 10,000 rows, 3.3e8 logits, that other tests vouch for.
        total, dw, dh = torch.zeros((), dtype=torch.float64), torch.zeros_like(weight, dtype=torch.float64), []
        for part in range(0, self.ROWS, 10_000):
            h = hidden.detach()[part : part + 10_000].requires_grad_()
            w = weight.detach().requires_grad_()
            loss = linear_multi_hot_cross_entropy(h, w, labels[part : part + 10_000], reduction="sum")
            loss.backward()
            total, dw = total + loss.detach(), dw + w.grad
            dh.append(h.grad)
        assert relative_error(mine[0], total) < 1e-6
        assert relative_error(mine[1], torch.cat(dh)) < 4 * EPS
        assert relative_error(mine[2], dw) < 100 * EPS  # sums of 70,000 terms

    def test_existing_logits_in_place(self):
        needs(12)
        hidden, weight, labels = self.case()
        logits = (hidden.bfloat16() @ weight.bfloat16().T).requires_grad_()
        rows = torch.tensor([0, 2**31 // self.VOCABULARY - 1, 2**31 // self.VOCABULARY, self.ROWS - 1])
        some = logits.detach()[rows].float().requires_grad_()
        expected = reference.multi_hot_cross_entropy(some, labels[rows], reduction="none")
        (gradient,) = torch.autograd.grad(expected.sum(), some)
        held = logits.view_as(logits)  # not a leaf, the same memory
        loss = multi_hot_cross_entropy(held, labels, reduction="none", inplace=True)
        loss.sum().backward()
        assert relative_error(loss[rows], expected) < 8 * EPS
        assert logits.grad.data_ptr() == logits.data_ptr()
        for row, exact in zip(logits.grad[rows], gradient, strict=True):
            assert relative_error(row, exact) < torch.finfo(torch.bfloat16).eps


@pytest.mark.slow
class TestLargeTable:
    """V d = 270,000 x 8,192 = 2.21e9."""

    VOCABULARY, DIM = 270_000, 8192
    ROWS = torch.tensor([0, 2**31 // 8192 - 1, 2**31 // 8192, 269_999])  # around element 2^31, and the last

    def table(self):
        block = torch.randn(1000, self.DIM, generator=generator()) / self.DIM**0.5
        table = torch.empty(self.VOCABULARY, self.DIM)
        table.view(-1, 1000, self.DIM).copy_(block)
        table[self.ROWS] += torch.arange(1, 5)[:, None] / self.DIM  # rows of their own
        return table

    def test_embedding(self):
        needs(19)
        table = self.table().requires_grad_()
        ids = self.ROWS.repeat(3)[:, None].expand(12, 2)
        ids = torch.cat((ids, ids.roll(1, 0)), 1)
        out = bag_embedding(ids, table)
        assert relative_error(out, table.detach()[ids].double().mean(1)) < 4 * EPS
        grad = torch.randn(12, self.DIM, generator=generator(1))
        out.backward(grad)
        for row in (*self.ROWS.tolist(), 1, 269_998):
            hits = (ids == row).sum(1).double() / ids.shape[1]
            assert relative_error(table.grad[row], hits @ grad.double()) < 4 * EPS

    def test_linear(self):
        needs(19)
        table = self.table().requires_grad_()
        hidden = torch.randn(4, self.DIM, generator=generator(2)).requires_grad_()
        labels = torch.stack((self.ROWS, self.ROWS.roll(1)), 1)
        loss = linear_multi_hot_cross_entropy(hidden, table, labels)
        loss.backward()
        logits = torch.empty(4, self.VOCABULARY, dtype=torch.float64)
        for part in range(0, self.VOCABULARY, 10_000):  # float64 of the whole table would not fit
            block = table.detach()[part : part + 10_000].double()
            logits[:, part : part + 10_000] = hidden.detach().double() @ block.T
        exact = reference.multi_hot_cross_entropy(logits.requires_grad_(), labels)
        exact.backward()
        assert relative_error(loss, exact) < 4 * EPS
        for row in (*self.ROWS.tolist(), 1, 269_998):
            # A logit is a sum of 8,192 terms.
            assert relative_error(table.grad[row], logits.grad[:, row] @ hidden.detach().double()) < 100 * EPS
        gradient = torch.zeros(4, self.DIM, dtype=torch.float64)
        for part in range(0, self.VOCABULARY, 10_000):
            gradient += logits.grad[:, part : part + 10_000] @ table.detach()[part : part + 10_000].double()
        assert relative_error(hidden.grad, gradient) < 100 * EPS
