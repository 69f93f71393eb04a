"""tst sweep: what a file asks for, runs that end or are ended in every way, and the table."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess

import pytest

from helpers.runs import lines, tst, wait_for
from helpers.training import VOCABULARY, write_split
from tst_ext.__main__ import main
from tst_ext.lab import plots, subprocesses
from tst_ext.lab import sweep as module
from tst_ext.lab.sweep import cells, load_sweep, table
from tst_ext.train import plot
from tst_ext.train.config import load_config, save_config
from tst_ext.train.files import UserError, in_use


@pytest.fixture
def write(tmp_path, shards):
    """Writes a sweep's file: the run `tiny`, and `grids`."""

    def write(grids, steps=30):
        top = {"steps": steps, "batch": 4, "latent_tokens": 16, "eval_tokens": 1024}
        text = "\n".join(f"{key} = {value}" for key, value in top.items())
        path = tmp_path / "sweep.toml"
        path.write_text(f"""{text}
            [model]
            dim = 32
            layers = 2
            heads = 2
            kv_heads = 1
            ffn_dim = 64
            [data]
            data = ["{shards}"]
            [superposition]
            ratio = 0.4
            [run]
            device = "cpu"
            threads = 1
            log_every = 1
            eval_every = 10
            {grids}""")
        return path

    return write


class TestFile:
    def test_a_grid_is_the_product_of_its_options_cases_and_seeds_and_their_baselines(self, write):
        sweep = load_sweep(
            write('[[grid]]\nname="a"\nseeds=[0, 1]\ncases=[{dim=64, ffn_dim=96}, {}]\nratio=[0.4, 0.2]')
        )
        (grid,) = sweep.grids
        assert grid.options == ("ratio", "dim", "ffn_dim")
        assert len(grid.runs) == len(set(grid.runs)) == 2 * 2 * 3  # both ratios and their baseline
        assert set(grid.runs) == set(sweep.runs)
        config = sweep.runs["dim=64,ffn_dim=96,ratio=0.2,seed=1"]
        assert (config.seed, config.model.dim, config.model.ffn_dim, config.superposition.ratio) == (1, 64, 96, 0.2)
        baseline = sweep.runs[sweep.baselines["dim=64,ffn_dim=96,ratio=0.2,seed=1"]]
        assert (baseline.seed, baseline.model, baseline.superposition.ratio) == (1, config.model, 0.0)
        assert sweep.options["dim=64,ffn_dim=96,ratio=0.2,seed=1"] == {"dim": 64, "ffn_dim": 96, "ratio": 0.2}
        assert sweep.runs["seed=0"].superposition.ratio == 0.4  # the file's own options are not in the name

    def test_what_grids_share_is_one_run(self, write):
        sweep = load_sweep(write('[[grid]]\nname="a"\nbag_size=[1, 4]\n[[grid]]\nname="b"\nratio=[0.0, 0.4]'))
        assert [set(grid.runs) for grid in sweep.grids] == [{"seed=0", "ratio=0.0,seed=0"}] * 2
        assert len(sweep.runs) == 2
        assert sweep.baselines == {"seed=0": "ratio=0.0,seed=0", "ratio=0.0,seed=0": "ratio=0.0,seed=0"}

    def test_bags_of_one_that_lose_their_embedding_are_no_baseline(self, write):
        (grid,) = load_sweep(write("[[grid]]\nbag_size=[1]\nreinitialise=[false, true]")).grids
        assert grid.runs == ("ratio=0.0,seed=0", "bag_size=1,reinitialise=True,seed=0")
        (grid,) = load_sweep(write("[[grid]]\nratio=[0.0]\nreinitialise=[false, true]")).grids
        assert grid.runs == ("ratio=0.0,seed=0",)  # there is no switch

    def test_a_run_has_a_core_unless_the_file_says_more(self, write):
        path = write("[[grid]]\nratio=[0.4]")
        assert [config.run.threads for config in load_sweep(path).runs.values()] == [1, 1]
        path.write_text(path.read_text().replace("threads = 1", "threads = 0"))
        assert [config.run.threads for config in load_sweep(path).runs.values()] == [1, 1]
        path.write_text(path.read_text().replace("threads = 0", "threads = 3"))
        assert [config.run.threads for config in load_sweep(path).runs.values()] == [3, 3]

    @pytest.mark.parametrize(
        ("grids", "message"),
        [
            ("", "expected tables [[grid]], got None"),
            ("[grid]\nratio=[0.1]", "expected tables [[grid]], got {"),
            ("[[grid]]\nname='a'\nsize=[1]", "grid a: unknown option 'size'; known: dim"),
            ("[[grid]]\nthreads=[1]", "grid 0: unknown option 'threads'"),
            ("[[grid]]\ncases=[{bag=1}]", "grid 0: unknown option 'bag'"),
            ("[[grid]]\ncases=[{ratio=0.1}]\nratio=[0.2]", "options that the grid does not set itself, got ratio"),
            ("[[grid]]\ncases=[{seed=1}]", "unknown option 'seed'; known: dim"),
            ("[[grid]]\nseed=[1]", "unknown option 'seed'; known: dim"),
            (
                f"[[grid]]\nend_of_text=['{'x' * 200}']",
                "expected a shorter name of a run, as a folder has it, got end_of",
            ),
            ("[[grid]]\nseeds=[true]", "seed: expected a value of type int, got True"),
            ("[[grid]]\ncases=[1]", "cases: expected a list of tables, got [1]"),
            ("[[grid]]\nratio=0.1", "ratio: expected a list of values, got 0.1"),
            ("[[grid]]\nratio=[]", "ratio: expected a list of values, got []"),
            ("[[grid]]\nseeds=3", "seeds: expected a list of values, got 3"),
            (
                "[[grid]]\nratio=[1.5]",
                "grid 0: superposition: ratio: expected a number from 0 to 1, got 1.5",
            ),
            (
                "[[grid]]\nwarmup=[inf]",
                "grid 0: optimizer: warmup: expected a share below 1 or a number of steps, got inf",
            ),
            ("[[grid]]\nwarmup=[nan]", "warmup: expected a share below 1 or a number of steps, got nan"),
            (
                "[[grid]]\nfitted=[[1.0, 1.0, 3000.0]]\nposition_weights=['fitted']",
                "fitted: expected C0, a, k with weights >= 0, and the first above 0, got (1.0, 1.0, 3000.0)",
            ),
            ("[[grid]]\nratio=['a']", "ratio: expected a value of type float, got 'a'"),
            ("[[grid]]\nname='../a'\nratio=[0.1]", "name: expected up to 50 letters, digits, _ and -, got '../a'"),
            (f"[[grid]]\nname='{'a' * 51}'\nratio=[0.1]", "name: expected up to 50 letters, digits, _ and -, got 'a"),
            ("[[grid]]\nname='a'\nratio=[0.1]\n[[grid]]\nname='a'\nratio=[0.2]", "'a' is a grid already"),
            (f"[[grid]]\nratio={'[' * 5000}", "sweep.toml: "),
            ("[[grid", "sweep.toml: "),
        ],
    )
    def test_what_is_wrong_is_named(self, write, grids, message):
        with pytest.raises(UserError) as raised:
            load_sweep(write(grids))
        assert message in str(raised.value)


def sweep(*arguments):
    return main(["sweep", *map(str, arguments)])


def results(out):
    return json.loads((out / "results.json").read_text())


class TestRuns:
    def test_one_that_fails_does_not_stop_the_others(self, write, tmp_path, forked_runs, capsys):
        path, out = write("[[grid]]\nname='rate'\nclip=[1e30]\nlearning_rate=[1e30, 1e-2]"), tmp_path / "out"
        assert sweep(path, "--out", out) == 1
        rows = {row["name"]: row for row in results(out)["runs"]}
        assert len(rows) == 4
        broken = [name for name in rows if "learning_rate=1e+30" in name]
        assert len(broken) == 2
        printed = capsys.readouterr()
        for name in broken:
            assert rows[name]["status"].startswith("failed with status 2 (log ") and "loss" in rows[name]["status"]
            assert f"tst sweep: {name} failed with status 2" in printed.err
        tst, baseline = (rows[f"{r}learning_rate=0.01,clip=1e+30,seed=0"] for r in ("", "ratio=0.0,"))
        assert tst["status"] == baseline["status"] == "done" and tst["baseline"] == baseline["name"]
        result = json.loads((out / "runs" / tst["name"] / "result.json").read_text())
        assert tst["val_loss"] == result["val_loss"]
        assert tst["difference"] == tst["val_loss"] - baseline["val_loss"]
        assert [step for step, *_ in tst["curve"]] == [10, 20, 30]
        assert tst["curve"][-1][1] == tst["data_tokens"] == 4 * 16 * (12 * 4 + 18)
        assert tst["options"] == {"ratio": 0.4, "learning_rate": 0.01, "clip": 1e30}
        head, *csv = (out / "results.csv").read_text().splitlines()
        assert head.startswith("name,grids,ratio,learning_rate,clip,seed,status,parameters,steps") and len(csv) == 4
        assert f"{tst['difference']:+.4f}" in printed.out  # the table
        assert (out / "rate.png").stat().st_size > 5000

        # What is done is not done again, what failed is; a choice of runs leaves the others' rows.
        stamps = {name: (out / "runs" / name / "metrics.jsonl").stat().st_mtime_ns for name in rows}
        assert sweep(path, "--out", out, "--only", broken[0]) == 1
        again = {row["name"]: row for row in results(out)["runs"]}
        assert again.keys() == rows.keys() and again[tst["name"]] == tst and again[broken[1]]["status"] == "to do"
        changed = [name for name in rows if (out / "runs" / name / "metrics.jsonl").stat().st_mtime_ns != stamps[name]]
        assert changed == [broken[0]]

        # Other options under a name that is there: refused before anything runs.
        assert sweep(write("[[grid]]\nclip=[1e30]\nlearning_rate=[1e-2]", steps=31), "--out", out) == 2
        assert "this run was made with other options" in capsys.readouterr().err
        assert results(out)["runs"] == list(again.values())

        # So is what a loss of power would spoil.
        path, run = write("[[grid]]\nname='rate'\nclip=[1e30]\nlearning_rate=[1e30, 1e-2]"), out / "runs" / tst["name"]
        for file, content, message in [
            ("environment.json", "{}", "metrics.jsonl is damaged (KeyError('tst_ext')); remove the folder"),
            ("environment.json", "", "environment.json, result.json or metrics.jsonl is damaged (JSONDecodeError"),
            ("result.json", "[]", "metrics.jsonl is damaged"),
            ("result.json", json.dumps({**result, "val_loss": None}), "metrics.jsonl is damaged"),
            ("metrics.jsonl", "5\n", "metrics.jsonl is damaged"),
            ("config.json", "{", "config.json: Expecting property name"),
            ("config.json", None, "it has a result.json but no config.json"),
        ]:
            before = (run / file).read_text()
            (run / file).unlink() if content is None else (run / file).write_text(content)
            assert sweep(path, "--out", out) == 2
            error = capsys.readouterr().err
            assert message in error and str(run) in error
            (run / file).write_text(before)
        assert results(out)["runs"] == list(again.values())

        # Other data: refused where there is something to do, and never subtracted.
        facts = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps({**facts, "data": "another"}))
        assert sweep(path, "--out", out) == 2
        assert (
            f"expected what {run} has read (sha256 another, held out {facts['held_out']}), got"
            in capsys.readouterr().err
        )
        shutil.rmtree(out / "runs" / broken[0])
        for name in broken:  # as if they had ended
            shutil.copytree(run, out / "runs" / name, dirs_exist_ok=True)
            save_config(load_sweep(path).runs[name], out / "runs" / name / "config.json")
        assert sweep(path, "--out", out) == 1
        (wrong,) = [row for row in results(out)["runs"] if row["status"] != "done"]
        assert wrong["name"] == tst["name"] and "difference" not in wrong
        assert f"{tst['name']} is done, but has read other data than {baseline['name']}" in capsys.readouterr().err

    def test_one_whose_data_has_moved_goes_on(self, write, shards, tiny_run, tmp_path, forked_runs, capsys):
        out, path = tmp_path / "out", write("[[grid]]\nratio=[0.4]")
        text = path.read_text(encoding="utf-8")

        def sweep_on(data):
            path.write_text(text.replace(str(shards), str(data)), encoding="utf-8")
            return sweep(path, "--out", out)

        here = shutil.copytree(shards, tmp_path / "here")
        path.write_text(text.replace(str(shards), str(here)), encoding="utf-8")
        assert sweep(path, "--out", out, "--only", "ratio=0.0,seed=0") == 0
        there = here.rename(tmp_path / "there")
        assert sweep_on(there) == 0
        done = results(out)["runs"]
        assert [row["status"] for row in done] == ["done", "done"]
        (tst,) = [row for row in done if row["name"] == "seed=0"]
        result = json.loads((tiny_run / "result.json").read_text(encoding="utf-8"))  # the same run on the same data
        assert tst["val_loss"] == result["val_loss"] and "difference" in tst

        # Other data in another place is refused, also if there is nothing left to do.
        other = shutil.copytree(there, tmp_path / "other")
        write_split(other, "val", [*range(VOCABULARY)] * 40)
        assert sweep_on(other) == 2
        assert f"data {other}: expected what " in capsys.readouterr().err
        assert sweep_on(there) == 0 and results(out)["runs"] == done
        path.write_text(path.read_text(encoding="utf-8").replace("steps = 30", "steps = 31"), encoding="utf-8")
        assert sweep(path, "--out", out) == 2
        assert "this run was made with other options: steps was 30, is 31; choose" in capsys.readouterr().err

    @pytest.mark.extended
    def test_an_interrupted_sweep_goes_on(self, write, tmp_path, forked_runs, monkeypatch):
        path, out = write("[[grid]]\nratio=[0.4]", steps=400), tmp_path / "out"
        runs = [out / "runs" / name for name in ("seed=0", "ratio=0.0,seed=0")]
        for number, steps in ((signal.SIGTERM, 50), (signal.SIGKILL, 200)):
            process = tst("sweep", path, "--out", out, "--jobs", "1", output=tmp_path / "sweep")
            wait_for(lambda: any(len(lines(run)) > steps for run in runs), process)  # noqa: B023
            process.send_signal(number)
            assert process.wait(timeout=60) == (128 + number if number == signal.SIGTERM else -number)
            # The run it had going ends with a checkpoint; of a sweep that was killed it goes on by itself.
            (begun,) = [run for run in runs if run.exists()]
            assert in_use(begun) is (number == signal.SIGKILL)
            assert len(lines(begun)) < 400 + 40 and not (begun / "result.json").exists()

        # It has a place among those that run at a time: the other one begins after its end.
        begins = []

        def start(config, folder, environment):
            begins.append((folder, (begun / "result.json").exists()))
            return subprocesses.start(config, folder, environment)

        monkeypatch.setattr(module, "start", start)
        assert sweep(path, "--out", out, "--jobs", "1") == 0
        assert begins == [(next(run for run in runs if run != begun), True)]
        assert [row["status"] for row in results(out)["runs"]] == ["done", "done"]
        # Each step is there once, the first ones from before the interruptions.
        for run in runs:
            assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 401))

    def test_a_run_is_known_to_go_from_its_start_and_ends_with_the_caller(self, write, tmp_path, monkeypatch):
        config, *_ = load_sweep(write("[[grid]]\nratio=[0.4]", steps=3000)).runs.values()
        process = subprocesses.start(config, tmp_path / "a")
        assert subprocesses.is_running(tmp_path / "a") and not (tmp_path / "a").exists()
        subprocesses.stop([process])
        assert not subprocesses.is_running(tmp_path / "a")

        begun = []

        def started(*_):
            begun.append(subprocess.Popen(["sleep", "60"]))
            signal.raise_signal(signal.SIGTERM)  # before the caller has the process
            return begun[0]

        monkeypatch.setattr(module, "start", started)
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit, match="143"):
                sweep(write("[[grid]]\nratio=[0.4]"), "--out", tmp_path / "b")
        finally:
            signal.signal(signal.SIGTERM, before)
        assert begun[0].returncode == -signal.SIGTERM

    def test_nothing_is_run_where_it_cannot_be(self, write, tmp_path, capsys, monkeypatch):
        path = write("[[grid]]\nname='a'\nratio=[0.4]")
        assert sweep(path, "--out", "/dev/null/x") == 2
        assert "out /dev/null/x" in capsys.readouterr().err
        assert sweep(path, "--out", tmp_path / "out", "--only", "b") == 2
        assert "only: expected a grid (a) or the name of a run (--list), got 'b'" in capsys.readouterr().err
        assert sweep(path, "--out", tmp_path / "out", "--only") == 2
        assert "name of a run (--list), got nothing" in capsys.readouterr().err
        assert sweep(path, "--out", tmp_path / "out", "--jobs", "-1") == 2
        monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
        path.write_text(path.read_text().replace('"cpu"', '"cdua"'))
        assert sweep(path, "--out", tmp_path / "out") == 2
        assert "device: expected auto, cpu or cuda, got 'cdua'" in capsys.readouterr().err
        missing = write("[[grid]]\nvocabulary=[300]\ndata=[['/nowhere']]")
        assert sweep(missing, "--out", tmp_path / "out") == 2
        assert "/nowhere" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        path = write("[[grid]]\nname='a'\nratio=[0.4]")
        assert sweep(path, "--list", "--only", "a") == 2
        assert sweep(path, "--list") == 0
        assert capsys.readouterr().out == "a:\n  seed=0\n  ratio=0.0,seed=0\n"


def row(name, loss, seed=0, baseline="b", grids=("g",), **options):
    found = {} if loss is None else {"val_loss": loss}
    if loss is not None and name != baseline:
        found["difference"] = -0.5
    return {"name": name, "grids": grids, "options": options, "seed": seed, "baseline": baseline, **found}


class TestTable:
    def test_mean_and_spread_over_seeds(self):
        rows = [row("x", 1.0, seed=0, s=2), row("y", 2.0, seed=1, s=2), row("z", 4.0, s=3), row("w", None, s=4)]
        del rows[1]["difference"], rows[2]["difference"]
        assert cells(rows) == [
            {"options": {"s": 2}, "seeds": [0, 1], "val_loss": (1.5, 0.5**0.5), "difference": (-0.5, None)},
            {"options": {"s": 3}, "seeds": [0], "val_loss": (4.0, None), "difference": (None, None)},
            {"options": {"s": 4}, "seeds": [], "val_loss": (None, None), "difference": (None, None)},
        ]
        assert table({"runs": rows}).splitlines() == [
            "| s | runs | held-out loss | less the baseline's |",
            "| --- | --- | --- | --- |",
            "| 2 | 2 | 1.5000 ± 0.7071 | -0.5000 |",
            "| 3 | 1 | 4.0000 |  |",
            "| 4 | 0 |  |  |",
        ]


class TestFigure:
    @pytest.fixture
    def figure(self, monkeypatch, tmp_path):
        """Draws, and returns what was drawn: label -> [x, y] of each line."""
        kept = []
        monkeypatch.setattr(plot.plt, "close", kept.append)

        def draw(rows, *options):
            plots.plot_grid(rows, "g", options, tmp_path / "figure.png")
            if not kept:
                return None
            (axes,) = kept.pop().axes
            handles, labels = axes.get_legend_handles_labels()
            drawn = [handle if hasattr(handle, "get_xdata") else handle.lines[0] for handle in handles]
            assert len(labels) == len(set(labels))
            draw.styles = {label: d.get_linestyle() for label, d in zip(labels, drawn, strict=True)}
            return {label: (list(d.get_xdata()), list(d.get_ydata())) for label, d in zip(labels, drawn, strict=True)}

        return draw

    def test_a_line_for_each_other_option_and_one_baseline(self, figure):
        rows = [row("b", 3.0, r=0, s=4), row("b2", 5.0, seed=1, baseline="b2", r=0, s=4)]
        rows += [row(f"{s} {r} {seed}", s + r + seed, seed, "b2" if seed else "b", r=r, s=s)
                 for s in (4, 2) for r in (0.2, 0.1) for seed in (0, 1)]  # fmt: skip
        rows += [row("elsewhere", 9.0, grids=("h",), r=0.1, s=6), row("to do", None, r=0.1, s=8)]
        drawn = figure(rows, "s", "r")
        assert [label for label in drawn if label != "baseline"] == ["r 0.1", "r 0.2"]
        assert drawn["r 0.1"] == ([2, 4], [2.6, 4.6]) and drawn["r 0.2"] == ([2, 4], [2.7, 4.7])
        assert drawn["baseline"][1] == [4.0, 4.0]

    def test_a_baseline_at_each_place_and_options_that_go_together(self, figure):
        rows = [row(f"b{d}", d / 10, baseline=f"b{d}", d=d, layers=d // 2, r=0) for d in (2, 4)]
        rows += [row(f"x{d}", d / 20, baseline=f"b{d}", d=d, layers=d // 2, r=1) for d in (2, 4)]
        drawn = figure(rows, "d", "layers")
        assert drawn == {"superposed": ([2, 4], [0.1, 0.2]), "baseline": ([2, 4], [0.2, 0.4])}

    def test_a_baseline_at_each_place_for_all_lines_or_one_for_each_line(self, figure):
        rows = [row(f"b{n}", n / 10, baseline=f"b{n}", n=n, s=4, r=0) for n in (2, 4)]
        rows += [row(f"x{n}{s}", n / s, baseline=f"b{n}", n=n, s=s, r=1) for n in (2, 4) for s in (4, 8)]
        lines = {"s 4": ([2, 4], [0.5, 1.0]), "s 8": ([2, 4], [0.25, 0.5])}
        assert figure(rows, "n", "s") == {**lines, "baseline": ([2, 4], [0.2, 0.4])}
        drawn = figure(rows, "s", "n")
        assert set(drawn) == {"n 2", "n 4", "baseline n 2", "baseline n 4"}
        assert drawn["baseline n 2"][1] == [0.2, 0.2] and drawn["baseline n 4"][1] == [0.4, 0.4]

    def test_only_pairs_are_drawn(self, figure):
        rows = [row("b", 3.0, baseline="b", s=4, r=0), row("b2", 5.0, seed=1, baseline="b2", s=4, r=0)]
        rows += [row("b3", None, seed=2, baseline="b3", s=4, r=0)]
        rows += [row("x", 2.0, s=4, r=1), row("x2", None, 1, "b2", s=4, r=1), row("x3", 9.0, 2, "b3", s=4, r=1)]
        del rows[-1]["difference"]  # its baseline is not done
        drawn = figure(rows, "s")
        assert drawn["superposed"] == ([4], [2.0]) and drawn["baseline"][1] == [3.0, 3.0]
        assert figure([r for r in rows if r["name"] != "x"], "s") is None
        # One place with one seed, one with two: each has the baselines of its own seeds.
        rows += [row("y", 1.0, s=8, r=1), row("y2", 2.0, 1, "b2", s=8, r=1)]
        assert figure(rows, "s") == {"superposed": ([4, 8], [2.0, 1.5]), "baseline": ([4, 8], [3.0, 4.0])}

    def test_lines_that_share_baselines(self, figure):
        rows = [row(f"b{d}", d / 10, baseline=f"b{d}", d=d, s=4, r=0) for d in (2, 3)]
        rows += [
            row(f"{d}{s}{r}", d + s + r, baseline=f"b{d}", d=d, s=s, r=r)
            for d in (2, 3)
            for s in (4, 8)
            for r in (1, 2)
        ]
        drawn = figure(rows, "r", "s", "d")
        assert set(drawn) == {*(f"s {s}, d {d}" for s in (4, 8) for d in (2, 3)), "baseline d 2", "baseline d 3"}
        assert drawn["baseline d 3"][1] == [0.3, 0.3]

    def test_words_have_places_in_their_order_and_nothing_done_draws_nothing(self, figure):
        base = row("b", 3.0, w="u")
        assert figure([base, row("x", None, w="u")], "w") is None and figure([base, row("x", 1.0)]) is None
        drawn = figure([base, row("x", 1.0, w="u"), row("y", 2.0, w="$a$")], "w")
        assert drawn["superposed"] == ([0, 1], [1.0, 2.0])
        assert figure.styles == {"superposed": "None", "baseline": "--"}  # points, and one dash across
        other = row("c", 5.0, baseline="c", w="$a$")
        figure([base, other, row("x", 1.0, w="u"), row("y", 2.0, baseline="c", w="$a$")], "w")
        assert figure.styles == {"superposed": "None", "baseline": "None"}

    def test_a_grid_of_baselines(self, figure):
        assert figure([row(f"b{x}", x, baseline=f"b{x}", x=x) for x in (1, 2)], "x") == {"baseline": ([1, 2], [1, 2])}


def test_a_config_read_back_is_the_same_run(write, tmp_path):
    """What decides whether a run in a folder is the one wanted."""
    for config in load_sweep(write("[[grid]]\nstages=[[], [[0.1, 8]]]\nposition_weights=['fitted']")).runs.values():
        save_config(config, tmp_path / "config.json")
        assert load_config(tmp_path / "config.json") == config


def test_gpus_are_dealt_out(write, monkeypatch):
    (config, *_) = load_sweep(write("[[grid]]\nratio=[0.4]")).runs.values()
    monkeypatch.setattr(module, "on_cpu", lambda _: False)
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module._slots(config, 0) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "3,GPU-7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in module._slots(config, 3)] == ["3", "GPU-7", "3"]
    certain = dataclasses.replace(config, run=dataclasses.replace(config.run, device="cuda:1"))
    assert module._slots(certain, 0) == [{}]
