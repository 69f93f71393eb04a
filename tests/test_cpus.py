"""CPUs by affinity and by the control groups' quota, as containers set them: files of each layout, made up."""

import math
import os

import pytest
import torch

from tst_ext import _cpus
from tst_ext._cpus import available_cpus, cpu_quota, limit_threads


@pytest.fixture
def quota(tmp_path):
    """Write a process's groups and the files of their limits; return the quota that is read."""

    def read(groups, files):
        (tmp_path / "groups").write_text(groups)
        for name, content in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return cpu_quota(tmp_path / "mount", tmp_path / "groups")

    return read


class TestQuota:
    @pytest.mark.parametrize(
        ("groups", "files", "expected"),
        [
            ("0::/\n", {"cpu.max": "400000 100000"}, 4),  # version 2, a container with namespaces of its own
            ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
            ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
            ("0::/pod/app\n", {"pod/cpu.max": "150000 100000", "pod/app/cpu.max": "max 100000"}, 1.5),
            ("0::/pod/app\n", {"pod/cpu.max": "300000 100000", "pod/app/cpu.max": "200000 100000"}, 2),
            ("0::/docker/abc\n", {"cpu.max": "200000 100000"}, 2),  # the host's name of the group that is the root here
            (  # version 1
                "5:cpuset:/x\n3:cpuacct,cpu:/app\n0::/\n",
                {"cpu/app/cpu.cfs_quota_us": "250000", "cpu/app/cpu.cfs_period_us": "100000"},
                2.5,
            ),
            ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
            ("3:cpu:/\n", {}, math.inf),
            ("0::/\n", {"cpu.max": ""}, math.inf),
        ],
    )
    def test_of_the_groups(self, quota, groups, files, expected):
        assert quota(groups, files) == expected

    def test_without_control_groups(self, tmp_path):
        assert cpu_quota(tmp_path, tmp_path / "absent") == math.inf


class TestThreads:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        """Eight CPUs with a quota of 2.5; torch starts a thread for each CPU."""
        self.threads = 8
        monkeypatch.setattr(_cpus, "affinity_cpus", lambda: 8)
        monkeypatch.setattr(_cpus, "cpu_quota", lambda: 2.5)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(self, "threads", count))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize(("limit", "expected"), [(math.inf, 8), (100, 8), (8, 8), (2.5, 3), (2, 2), (0.1, 1)])
    def test_available(self, monkeypatch, limit, expected):
        monkeypatch.setattr(_cpus, "cpu_quota", lambda: limit)
        assert available_cpus() == expected
        limit_threads()
        assert self.threads == expected

    def test_the_environment_decides(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "6")
        limit_threads()
        assert self.threads == 8

    def test_fewer_stay(self):
        self.threads = 2
        limit_threads()
        assert self.threads == 2


def test_affinity():
    assert 1 <= _cpus.affinity_cpus() <= os.cpu_count()
