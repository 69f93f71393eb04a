"""Which files a corpus has, and their documents, whatever people keep them in."""

import builtins
import bz2
import csv
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tst_ext.train import corpus
from tst_ext.train.config import DataConfig
from tst_ext.train.corpus import KINDS, PIECE, documents, sources
from tst_ext.train.files import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def read(*paths, **options):
    return list(documents(DataConfig(data=tuple(paths), **options)))


def json_lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


TEXTS = [
    "one",
    'two\r\nlines, "quoted"',
    "NA",
    "2020-01-01",
    "12",
    "\u2028 \u2029 \x85 \x0b \x1c",
    "中文 \U0001f600",
    "null",
]


def write(path, kind, texts):
    if kind == "txt":
        path.write_bytes(texts[0].encode())
    elif kind == "jsonl":
        path.write_bytes(json_lines(*texts))
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    else:
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)


class TestKinds:
    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
    def test_texts_come_as_they_are(self, tmp_path, kind):
        write(tmp_path / f"a.{kind}", kind, TEXTS)
        assert read(tmp_path / f"a.{kind}") == TEXTS
        write(tmp_path / f"[b]*.{kind}", kind, TEXTS[:2])  # a name that could be a pattern
        assert read(tmp_path / f"[b]*.{kind}") == TEXTS[:2]

    def test_a_text_file_is_a_document(self, tmp_path):
        for i, text in enumerate(TEXTS):
            write(tmp_path / f"{i}.txt", "txt", [text])
        assert read(tmp_path) == TEXTS

    @pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
    @pytest.mark.parametrize(
        ("suffix", "compress"),
        [("gz", gzip.compress), ("zst", zstd.compress), ("xz", lzma.compress), ("bz2", bz2.compress)],
    )
    def test_compressed(self, tmp_path, kind, suffix, compress):
        write(tmp_path / "plain", kind, TEXTS[1:])
        whole = (tmp_path / "plain").read_bytes()
        path = tmp_path / f"a.{kind}.{suffix}"
        path.write_bytes(compress(whole[:20]) + compress(whole[20:]))  # parallel compressors write several frames
        assert read(path) == (TEXTS[1:2] if kind == "txt" else TEXTS[1:])
        path.write_bytes(compress(whole * 1000)[:-10])
        with pytest.raises(UserError, match=f"a.{kind}.{suffix}: "):
            read(path)

    @pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
    def test_byte_order_mark_is_no_text(self, tmp_path, kind):
        write(tmp_path / "plain", kind, ["one"])
        (tmp_path / f"a.{kind}").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "plain").read_bytes())
        assert read(tmp_path / f"a.{kind}") == ["one"]

    def test_metadata_may_vary_and_text_may_be_missing(self, tmp_path):
        rows = [{"text": "one", "meta": {"a": 1}}, {"text": "two", "meta": "none"}, {"text": None}, {"text": ""}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        assert read(tmp_path / "a.jsonl") == ["one", "two"]
        write(tmp_path / "a.parquet", "parquet", ["one", None, "", "two"])
        assert read(tmp_path / "a.parquet") == ["one", "two"]

    def test_tables_of_other_makes(self, tmp_path):
        table = pyarrow.table({"text": pyarrow.array(["one", "two", "one", None]).dictionary_encode()})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
        with pyarrow.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        large = pyarrow.table({"text": pyarrow.array(["x"] * 1000, pyarrow.large_string())})
        pyarrow.parquet.write_table(large, tmp_path / "c.parquet")
        assert read(tmp_path) == 2 * ["one", "two", "one"] + 1000 * ["x"]

    def test_long_fields_of_csv(self, tmp_path):
        write(tmp_path / "a.csv", "csv", ["x" * 1_000_000, "\0"])
        assert read(tmp_path / "a.csv") == ["x" * 1_000_000, "\0"]

    def test_odd_lines(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('\ufeff\n{"n": %s, "text": "one"}\n' % ("9" * 5000))
        assert read(tmp_path / "a.jsonl") == ["one"]

    def test_text_key(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"body": "one", "text": 1}\n')
        assert read(tmp_path / "a.jsonl", text_key="body") == ["one"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "a.jsonl",
                b'{"text": "one"}\n\n{"body": "two"}',
                r"a.jsonl, line 3: .*'text' \(--text-key\), got one with .*body",
            ),
            ("a.jsonl", b'{"text": "one"}\n[1]', "line 2: expected an object"),
            ("a.jsonl", b'[\n{"text": "one"}\n]', "line 1: expected one JSON object per line: Expecting value"),
            ("a.jsonl", b'{"text": [' + b"1, " * 9999 + b"1]}", "line 1: expected a string .{,300}$"),
            ("a.jsonl", b'{"text": "one"}\n{"text": 1}', r"line 2: expected a string 'text' \(--text-key\), got 1.0"),
            ("a.jsonl", b'{"text": "one"}\n{"text" "two"}', r"line 2: .*Expecting ':' delimiter \(column 9\)"),
            ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}', "line 2: .*utf-8"),
            ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud800"}', "line 2: .*surrogates"),
            ("a.jsonl", b'{"text": "one"}\n' + b"[" * 100_000, "line 2: maximum recursion"),
            ("a.jsonl", b'{"text": "one"}\n{"text": "' + b"x" * 1000, "line 2: expected .* got a line of 1,000 bytes"),
            ("a.csv", b"id,body\n1,one\n", r"a.csv, line 1: expected a column 'text' \(--text-key\), got id, body"),
            ("a.csv", b"", "a.csv, line 0: expected a column 'text' .*got none"),
            ("a.csv", b'id,text\n1,"one\n', "a.csv, line 2: unexpected end of data"),
            ("a.csv", b"id,text\n1,one\n\n2,two, three\n", "a.csv, line 4: expected 2 fields, got 3"),
            ("a.csv", b"id,text\n1\n", "a.csv, line 2: expected 2 fields, got 1"),
            ("a.csv", b"id,text\n1,\xff\n", "a.csv, line .: .*utf-8"),
            ("a.parquet", b"PAR1", "a.parquet: "),
            ("a.arrow", b"x", "a.arrow: "),
            ("a.txt", b"one\xff", "a.txt: .*utf-8"),
            ("a.txt.gz", b"one", "a.txt.gz: .*gzip"),
            ("a.tar", b"x", r"a.tar: expected .txt, .*\.json, also with .gz"),
            ("a.gz", b"x", "a.gz: expected .txt"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path, monkeypatch, name, content, message):
        monkeypatch.setattr(corpus, "LONGEST_LINE", 1000 if b"xxx" in content else corpus.LONGEST_LINE)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)

    def test_column_errors(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match="a.parquet: .*expected a column 'text'.*got body"):
            read(tmp_path / "a.parquet")
        with pyarrow.ipc.new_stream(tmp_path / "a.arrow", pyarrow.schema({"text": pyarrow.int64()})) as writer:
            writer.write_table(pyarrow.table({"text": [1]}))
        with pytest.raises(UserError, match="a.arrow: .*expected strings in column 'text'.*got int64"):
            read(tmp_path / "a.arrow")

    @pytest.mark.parametrize(
        ("name", "package"),
        [
            ("a.parquet", "pyarrow"),
            ("a.arrow", "pyarrow"),
            ("a.txt.zst", "backports.zstd"),
            ("a.csv.zst", "backports.zstd"),
        ],
    )
    def test_missing_packages_are_named(self, tmp_path, monkeypatch, name, package):
        (tmp_path / name).write_bytes(b"x")
        real = builtins.__import__

        def without(module, *arguments, **options):
            if module in ([package] if package == "pyarrow" else ["backports", "compression"]):
                raise ImportError(module)
            return real(module, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(UserError, match=rf"{name}: reading it needs {package}: pip install 'tst-ext\[data\]'"):
            read(tmp_path / name)


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "c" / "out.txt").mkdir(parents=True)  # a folder named like a file
        for i in range(4):
            (tmp_path / "c" / "out.txt" / f"part-{i}.txt").write_text(f"text {i}")
        (tmp_path / "c" / "a.TXT").write_text("upper case")
        return tmp_path / "c"

    def test_each_file_once(self, folder, tmp_path):
        texts = ["upper case", *(f"text {i}" for i in range(4))]
        assert read(folder) == texts
        (tmp_path / "link").symlink_to(folder)
        (folder / "loop").symlink_to(folder)
        (folder / "z.txt").symlink_to(folder / "a.TXT")
        assert read(folder, folder / "a.TXT", tmp_path / "link", Path(os.path.relpath(folder))) == texts
        assert read(folder / "out.txt", folder) == [*texts[1:], texts[0]]

    def test_linked_folders_are_read(self, folder, tmp_path):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "there").symlink_to(folder)
        assert len(read(tmp_path / "d")) == 5

    def test_what_is_ignored_is_counted(self, folder, capsys):
        for name in (
            "._a.txt",
            ".ipynb_checkpoints/a.txt",
            "SHA256SUMS.txt",
            "md5sums",
            "a.py",
            "b.py",
            "a.tar.gz",
            "README",
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
        (folder / "gone.txt").symlink_to(folder / "nowhere")
        assert len(read(folder)) == 5
        assert capsys.readouterr().err == (
            f"data {folder}: reads 5 files; ignores 2 .py, 1 .tar.gz, 1 broken links and devices, "
            "1 files without a suffix, 1 hidden files, 1 hidden folders, 2 lists of checksums\n"
        )

    def test_patterns(self, folder, capsys):
        (folder / "b.json").write_bytes(json_lines("json"))
        (folder / "README.md").write_text("x")
        assert read(folder / "*.json") == ["json"]
        assert read(folder / "**" / "part-*.txt") == [f"text {i}" for i in range(4)]
        assert len(read(folder / "*")) == 6
        assert "ignores 1 .md" in capsys.readouterr().err
        assert len(read(folder)) == 5, "in a folder a .json is as often no text"
        with pytest.raises(UserError, match=r"\*.csv: no such file"):
            read(folder / "*.csv")

    def test_errors(self, folder, tmp_path):
        with pytest.raises(UserError, match="absent: no such"):
            read(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="empty: expected files of .txt.*got none"):
            read(tmp_path / "empty")
        os.mkfifo(tmp_path / "pipe.txt")
        with pytest.raises(UserError, match="pipe.txt: expected files"):
            read(tmp_path / "pipe.txt")

    def test_default_corpus_is_the_standard_library(self):
        texts = list(documents(DataConfig()))
        assert sum(map(len, texts)) > 10_000_000
        assert any("class JSONDecoder" in text for text in texts)


class TestPieces:
    @pytest.mark.parametrize(
        "text", ["x" * (3 * PIECE + 5), "words and  more " * PIECE, "line\n" * PIECE, "x" * PIECE, " " * (2 * PIECE)]
    )
    def test_pieces_are_the_document(self, tmp_path, text):
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "a.jsonl").write_bytes(json_lines(text, "next"))
        (txt,), (lines,) = (sources(DataConfig(data=(tmp_path / name,))) for name in ("a.txt", "a.jsonl"))
        pieces = list(txt.pieces())
        assert "".join(piece for piece, _ in pieces) == text and max(len(piece) for piece, _ in pieces) <= PIECE
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
        assert list(lines.pieces()) == [*pieces, ("next", True)]

    def test_cut_where_tokenizers_divide(self, tmp_path):
        (tmp_path / "a.txt").write_text("a  b? c, word " * PIECE)
        (source,) = sources(DataConfig(data=(tmp_path / "a.txt",)))
        assert {piece[:2] for piece, _ in list(source.pieces())[1:]} <= {" b", " c", " w", " a"}
        assert all(piece[-1].isalnum() for piece, ends in source.pieces() if not ends)


class TestDataset:
    @pytest.fixture
    def folder(self, tmp_path):
        """A dataset as the Hub has them: a folder of Parquet files for each split."""
        (tmp_path / "hub" / "data").mkdir(parents=True)
        for i in range(3):
            write(tmp_path / "hub" / "data" / f"train-{i:05}.parquet", "parquet", [f"{i} {j}" for j in range(4)])
        write(tmp_path / "hub" / "data" / "test-00000.parquet", "parquet", ["test"])
        return tmp_path / "hub"

    def of(self, folder, **options):
        return list(documents(DataConfig(dataset=str(folder), **options)))

    def test_a_folder_of_the_hub(self, folder):
        assert self.of(folder) == [f"{i} {j}" for i in range(3) for j in range(4)]
        assert self.of(folder, split="test") == ["test"]
        assert len(sources(DataConfig(dataset=str(folder)))) == 3, "a part for each file"
        with pytest.raises(UserError, match="hub.*: expected a column 'body'"):
            self.of(folder, text_key="body")
        with pytest.raises(UserError, match="dataset .*hub: .*nosuch"):
            self.of(folder, split="nosuch")

    def test_saved_to_disk(self, tmp_path):
        saved = datasets.Dataset.from_dict({"text": [str(i) for i in range(100)]})
        saved.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "several")
        assert self.of(tmp_path / "one") == self.of(tmp_path / "several") == saved["text"][:]

    def test_texts_of_a_csv_are_texts(self, tmp_path):
        (tmp_path / "csv").mkdir()
        write(tmp_path / "csv" / "train.csv", "csv", ["NA", "null", "007", "one"])
        assert self.of(tmp_path / "csv") == ["NA", "null", "007", "one"]

    def test_options_without_a_dataset(self):
        for options in (dict(subset="x"), dict(split="test")):
            with pytest.raises(UserError, match="without dataset"):
                DataConfig(**options)

    def test_either_dataset_or_data(self):
        with pytest.raises(UserError, match="dataset: expected either dataset or data"):
            DataConfig(dataset="x", data=("y",))


def test_kinds_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{kind}`" in text for kind in KINDS)
