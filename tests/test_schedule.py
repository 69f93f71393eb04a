import pytest

from tst_ext import SuperpositionSchedule


class TestSuperpositionSchedule:
    def test_switch(self):
        schedule = SuperpositionSchedule(total_steps=8000, ratio=0.2, bag_size=4)
        assert schedule.switch_step == 1600
        assert [schedule.bag_size_at(step) for step in (0, 1599, 1600, 7999)] == [4, 4, 1, 1]

    def test_switch_is_rounded_not_truncated(self):
        assert SuperpositionSchedule(10, 0.29, 4).switch_step == 3  # 0.29 * 10 is 2.9

    def test_ratio_zero_and_one(self):
        assert SuperpositionSchedule(10, 0.0, 4).bag_size_at(0) == 1
        assert SuperpositionSchedule(10, 1.0, 4).bag_size_at(9) == 4

    @pytest.mark.parametrize(
        ("arguments", "name"), [((-1, 0.2, 4), "total_steps"), ((10, 1.1, 4), "ratio"), ((10, 0.2, 0), "bag_size")]
    )
    def test_bad_arguments(self, arguments, name):
        with pytest.raises(ValueError, match=name):
            SuperpositionSchedule(*arguments)

    def test_nan_ratio(self):
        with pytest.raises(ValueError, match="ratio"):
            SuperpositionSchedule(10, float("nan"), 4)
