import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from tst_ext.train.config import (
    OptimizerConfig,
    SuperpositionConfig,
    TrainConfig,
    config_dict,
    config_from_dict,
    config_of_run,
    load_config,
    save_config,
)
from tst_ext.train.files import UserError
from tst_ext.train.optimizer import learning_rate


class TestFiles:
    def test_round_trip(self, tiny, tmp_path):
        save_config(tiny, tmp_path / "config.json")
        assert load_config(tmp_path / "config.json") == tiny

    def test_round_trip_of_lists_choices_and_paths(self, tiny, tmp_path):
        options = SuperpositionConfig(stages=((0.1, 8), (0.2, 2)), fitted=(1.0, 2.0, -0.5), objective="mce_alt")
        data = dataclasses.replace(tiny.data, tokenizer=Path("t.json"))
        config = dataclasses.replace(tiny, superposition=options, data=data)
        save_config(config, tmp_path / "config.json")
        assert load_config(tmp_path / "config.json") == config

    def test_toml_overrides_defaults_only_where_it_speaks(self, tmp_path):
        (tmp_path / "c.toml").write_text("steps = 100\n[optimizer]\nlearning_rate = 1\n[data]\ndata = ['a.txt']\n")
        config = load_config(tmp_path / "c.toml")
        default = TrainConfig()
        assert config.steps == 100
        assert config.optimizer == dataclasses.replace(default.optimizer, learning_rate=1.0)
        assert [str(p) for p in config.data.data] == ["a.txt"]
        assert config.model == default.model

    def test_a_run_from_before_a_field_has_its_default_but_drew_its_windows(self, tiny, tmp_path):
        values = config_dict(tiny)
        del values["order"], values["model"]["rope_theta"], values["run"]["keep"]
        (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        random = dataclasses.replace(tiny, order="random")
        assert load_config(tmp_path / "config.json") == config_of_run(values, "run") == random != tiny
        assert config_from_dict(values, "file") == tiny

    def test_toml_without_an_order_has_the_default(self, tmp_path):
        (tmp_path / "c.toml").write_text("steps = 100\n", encoding="utf-8")
        assert load_config(tmp_path / "c.toml").order == TrainConfig().order == "epoch"

    @pytest.mark.parametrize("values", [[], "run", None])
    def test_a_configuration_that_is_no_table(self, tmp_path, values):
        (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(UserError, match="config.json: expected a table, got"):
            load_config(tmp_path / "config.json")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("step = 1", "unknown key 'step'"),
            ("[model]\nwidth = 1", "model: unknown key 'width'"),
            ("steps = 'many'", "steps: expected a value of type int, got 'many'"),
            ("steps = true", "steps"),
            ("model = 3", "model: expected a table, got 3"),
            ("[data]\ndata = 'a.txt'", "data: expected a list, got 'a.txt'"),
            ("[superposition]\nfitted = [1.0]", "fitted: expected a list of 3, got"),
            ("[superposition]\nstages = [[0.1, 'x']]", "stages: expected a value of type int, got 'x'"),
            ("[superposition]\nsides = 'none'", "sides: expected one of both, input, output, got 'none'"),
            ("[data]\ntokenizer = 3", "tokenizer: expected a path, got 3"),
            ("steps =", "c.toml"),
        ],
    )
    def test_errors_name_the_key(self, tmp_path, text, message):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(tmp_path / "c.toml")

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="absent.toml"):
            load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "heads", 5),
        ("model", "kv_heads", 2),
        ("model", "layers", 0),
        ("data", "vocabulary", 0),
        ("data", "holdout", 0.0),
        ("superposition", "bag_size", 0),
        ("superposition", "ratio", 1.5),
        ("superposition", "position_weights", "cubic"),
        ("superposition", "stages", ((0.9, 2),)),
        ("superposition", "stages", ((0.1, 0),)),
        ("superposition", "sides", "neither"),
        ("optimizer", "learning_rate", math.inf),
        ("model", "rope_theta", 0.0),
        ("superposition", "objective", "hinge"),
        ("optimizer", "learning_rate", 0.0),
        ("optimizer", "warmup", 100.5),
        ("optimizer", "decay", 0.95),
        ("optimizer", "clip", float("nan")),
        ("run", "parallel", "tensor"),
        ("run", "keep", 0),
        ("run", "micro_batch", -1),
        (None, "dtype", "float16"),
        (None, "order", "sorted"),
        (None, "steps", 0),
        (None, "seed", -1),
        (None, "eval_tokens", 10),
    ],
)
def test_values_out_of_range_are_named(section, field, value):
    config = TrainConfig()
    with pytest.raises(UserError, match=f"{field}: expected .* got {re.escape(repr(value))}"):
        dataclasses.replace(getattr(config, section) if section else config, **{field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(superposition=SuperpositionConfig(scale="batch", bag_size=3)),
            "latent_tokens: .*multiple of the bag size 3",
        ),
        (
            dict(optimizer=OptimizerConfig(warmup=9000)),
            r"warmup, decay: expected at most steps = 8000 together, got 9000 and 800 \(decay = 0.1\)",
        ),
        (dict(optimizer=OptimizerConfig(warmup=60, decay=0.8), steps=100), "got 60 and 80"),
        (dict(optimizer=OptimizerConfig(warmup=60, decay=0.41), steps=100), "got 60 and 41"),
    ],
)
def test_what_does_not_go_together_is_named(change, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("warmup", "decay"), [(60.0, 0.4), (1.0, 0.99), (100.0, 0.0), (0.5, 0.5), (0.3, 0.7), (0.0, 1.0), (0.005, 0.995)]
)
def test_warmup_and_decay_that_fill_the_run_reach_the_peak(warmup, decay):
    for steps in (100, *(range(101, 300) if warmup < 1 else ())):
        config = TrainConfig(optimizer=OptimizerConfig(learning_rate=1.0, warmup=warmup, decay=decay), steps=steps)
        assert max(learning_rate(config.optimizer, steps, step) for step in range(steps)) == 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(position_weights="fitted", fitted=(0.0, 0.0, 0.0)), "fitted"),
        (dict(position_weights="fitted", fitted=(math.nan, 1.0, -1.0)), "fitted"),
        (dict(position_weights="fitted", fitted=(-0.5, 1.0, -1.0)), "fitted"),
        (dict(sides="output", scale="batch"), "scale"),
        (dict(objective="mce_alt", position_weights="first"), "position_weights"),
    ],
)
def test_superposition_options_that_exclude_each_other(change, name):
    with pytest.raises(UserError, match=f"{name}: expected"):
        SuperpositionConfig(**change)
