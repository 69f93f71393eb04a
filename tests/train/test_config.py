import dataclasses

import pytest

from tst_ext.train.config import TrainConfig, UserError, load_config, save_config


class TestFiles:
    def test_round_trip(self, tiny, tmp_path):
        save_config(tiny, tmp_path / "config.json")
        assert load_config(tmp_path / "config.json") == tiny

    def test_toml_overrides_defaults_only_where_it_speaks(self, tmp_path):
        (tmp_path / "c.toml").write_text("steps = 100\n[optimizer]\nlearning_rate = 1\n[data]\ndata = ['a.txt']\n")
        config = load_config(tmp_path / "c.toml")
        default = TrainConfig()
        assert config.steps == 100
        assert config.optimizer == dataclasses.replace(default.optimizer, learning_rate=1.0)
        assert [str(p) for p in config.data.data] == ["a.txt"]
        assert config.model == default.model

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("step = 1", "unknown key 'step'"),
            ("[model]\nwidth = 1", "model: unknown key 'width'"),
            ("steps = 'many'", "steps: expected a value of type int, got 'many'"),
            ("steps = true", "steps"),
            ("model = 3", "model: expected a table, got 3"),
            ("[data]\ndata = 'a.txt'", "data: expected a list of paths"),
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
        ("data", "vocabulary", 100),
        ("data", "holdout", 0.0),
        ("superposition", "bag_size", 0),
        ("superposition", "ratio", 1.5),
        ("superposition", "position_weights", "cubic"),
        ("optimizer", "learning_rate", 0.0),
        ("optimizer", "decay", 0.95),
        ("optimizer", "clip", float("nan")),
        (None, "steps", 0),
        (None, "seed", -1),
        (None, "eval_tokens", 10),
    ],
)
def test_values_out_of_range_are_named(section, field, value):
    config = TrainConfig()
    with pytest.raises(UserError, match=f"{field}: expected .* got {value!r}"):
        dataclasses.replace(getattr(config, section) if section else config, **{field: value})
