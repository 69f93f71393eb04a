"""Whether mutants still name text of the tree: a change of the code must take its mutants along."""

from pathlib import Path

import pytest

from mutants import CPP, CUDA_HOST, PYTHON

ROOT = Path(__file__).resolve().parent.parent
FILES = [(file, mutants) for table in (CPP, CUDA_HOST, PYTHON) for file, mutants in table.items()]


@pytest.mark.parametrize(("file", "mutants"), FILES, ids=[file for file, _ in FILES])
def test_each_replaces_one_place(file, mutants):
    text = (ROOT / file).read_text()
    assert [m.name for m in mutants if text.count(m.old) != 1 or m.old == m.new] == []


def test_names_are_different():
    names = [m.name for _, mutants in FILES for m in mutants]
    assert len(set(names)) == len(names)
