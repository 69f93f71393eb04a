"""Steps by the data tokens of a run."""

import dataclasses
import json

import pytest

from tst_ext import SuperpositionSchedule, commands
from tst_ext.__main__ import main
from tst_ext.train.config import SuperpositionConfig, TrainConfig, load_config, save_config
from tst_ext.train.files import UserError
from tst_ext.train.tokens import data_tokens, parse_tokens, with_tokens

SETTINGS = {
    "both": {},
    "input": {"sides": "input"},
    "output": {"sides": "output"},
    "batch": {"scale": "batch", "bag_size": 6},
    "baseline": {"ratio": 0.0},
    "superposition alone": {"ratio": 1.0},
    "stages": {"bag_size": 8, "ratio": 0.2, "stages": ((0.1, 4), (0.05, 2))},
    # One step more can read fewer tokens here: the first stage takes a step of the second.
    "larger bags later": {"bag_size": 2, "ratio": 0.35, "stages": ((0.3, 32),)},
}


def step_by_step(config, steps):
    """The same by another way: what each step reads."""
    options = config.superposition
    schedule = SuperpositionSchedule(steps, options.ratio, options.bag_size, options.stages)
    sizes = [schedule.bag_size_at(step) for step in range(steps)]
    return sum(1 if options.sides == "output" else s for s in sizes) * config.batch * config.latent_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("2B", 2_000_000_000),
        ("2b", 2_000_000_000),
        ("500M", 500_000_000),
        ("500m", 500_000_000),
        ("10k", 10_000),
        ("10K", 10_000),
        ("1T", 10**12),
        ("1000t", 10**15),
        ("1.5e9", 1_500_000_000),
        ("0.1B", 100_000_000),  # as decimals: floats of some such products fall short by one
        ("1.0005k", 1000),
        ("2_000_000", 2_000_000),
        ("7", 7),
    ],
)
def test_numbers(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "B", "two", "2BB", "2 million", "-1B", "0", "0.5", "nan", "snan", "inf", "1e999999999", "1001T"]
)
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(UserError, match="tokens: expected a number of tokens such as 2B, .*, at most 1000T, got "):
        parse_tokens(text)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_most_steps_that_read_so_many_tokens(setting):
    config = TrainConfig(batch=2, latent_tokens=12, superposition=SuperpositionConfig(**SETTINGS[setting]))
    read = [step_by_step(config, steps) for steps in range(400)]
    assert [data_tokens(config, steps) for steps in range(400)] == read
    for wanted in range(24 * 16, read[-1] - 24 * 64, 7):
        most = max(steps for steps, tokens in enumerate(read) if tokens <= wanted)
        assert with_tokens(config, str(wanted)).steps == most


def test_the_tokens_of_the_paper():
    # 20,000 steps of 2**21 positions, 6,000 of them in bags of 6.
    config = TrainConfig(
        batch=512, latent_tokens=4096, eval_tokens=2**21, superposition=SuperpositionConfig(bag_size=6, ratio=0.3)
    )
    assert with_tokens(config, str(50_000 * 2**21)).steps == 20_000
    assert with_tokens(config, str(50_000 * 2**21 - 1)).steps == 19_999
    assert with_tokens(config, "1000T").steps == 10**15 * 2 // (5 * 2**21)


@pytest.mark.parametrize(("ratio", "step"), [(0.2, 24), (0.6, 96)])  # a single step is of the phase that has more
def test_too_few_for_a_step(ratio, step):
    config = TrainConfig(batch=2, latent_tokens=12, superposition=SuperpositionConfig(bag_size=4, ratio=ratio))
    assert with_tokens(config, str(step)).steps == 1
    with pytest.raises(UserError, match=f"tokens: expected at least {step}, got '{step - 1}': one step reads that"):
        with_tokens(config, str(step - 1))


class TestCommands:
    # The run `tiny` has 12 steps of 256 tokens and 18 of 64.
    TOKENS = 12 * 256 + 18 * 64

    @pytest.fixture
    def config_file(self, tiny, tmp_path):
        save_config(dataclasses.replace(tiny, steps=7), tmp_path / "tiny.json")  # which --tokens overrides
        return str(tmp_path / "tiny.json")

    def test_train_and_resume(self, config_file, tmp_path, capsys):
        arguments = ["train", "--config", config_file, "--out", str(tmp_path / "run"), "--no-progress"]
        assert main([*arguments, "--tokens", f"{self.TOKENS / 1000}k"]) == 0
        assert load_config(tmp_path / "run" / "config.json").steps == 30
        result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
        assert (result["steps"], result["data_tokens"]) == (30, self.TOKENS)
        again = ["train", "--out", str(tmp_path / "run"), "--no-progress", f"--tokens={self.TOKENS}"]
        assert main(again) == 0 and "resumes from" in capsys.readouterr().err
        assert main([*again[:-1], f"--tokens={self.TOKENS + 64}"]) == 2
        assert "has steps = 30, this run 31" in capsys.readouterr().err

    def test_compare_has_the_steps_of_the_tst_run(self, config_file, tmp_path, monkeypatch):
        compared = []
        monkeypatch.setattr("tst_ext.lab.compare.compare", lambda *arguments: compared.append(arguments))
        monkeypatch.setattr(commands, "_report", lambda *_: 0)
        assert main(["compare", "--config", config_file, "--tokens", str(self.TOKENS), "--out", str(tmp_path)]) == 0
        assert [config.steps for config, *_ in compared] == [30]

    def test_plan(self, config_file, capsys):
        arguments = ["plan", config_file, "--gpus", "1", "--tokens-per-second-per-gpu", "100"]
        assert main([*arguments, "--tokens", str(self.TOKENS)]) == 0
        (total,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| total")]
        assert total.split()[3] == "30" and f"{self.TOKENS:,}" in total

    def test_a_warm_up_of_more_steps_than_the_default(self, monkeypatch):
        planned = []
        monkeypatch.setattr("tst_ext.lab.plan.plan", lambda config, **_: planned.append(config))
        monkeypatch.setattr("tst_ext.lab.plan.report", lambda _: "")
        arguments = ["plan", "--gpus", "1", "--tokens-per-second-per-gpu", "1", "--warmup", "9000", "--ratio", "0"]
        assert main([*arguments, "--tokens", str(10_000 * 512)]) == 0
        assert planned[0].steps == 10_000

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "--tokens", "1M", "--steps", "9"], "steps, tokens: expected one of them"),
            (["compare", "--tokens=1M", "--steps=9"], "steps, tokens: expected one of them"),
            (["train", "--tokens"], "--tokens: expected a value after it"),
            (["train", "--tokens", "None"], "tokens: expected a number of tokens such as"),
            (["train", "--tokens", "511"], "tokens: expected at least 512, got '511': one step reads that many"),
            (["train", "--tokens", "1M", "--warmup", "9000"], "warmup, decay: expected at most steps = 1221 together"),
        ],
    )
    def test_errors(self, arguments, message, tmp_path, capsys):
        assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
