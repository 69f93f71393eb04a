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

    def test_stages(self):
        schedule = SuperpositionSchedule(100, 0.2, 8, stages=((0.1, 4), (0.0, 3), (0.1, 2)))
        assert schedule.stage_ends == ((20, 8), (30, 4), (30, 3), (40, 2))
        assert schedule.switch_step == 40
        assert [schedule.bag_size_at(step) for step in (0, 19, 20, 29, 30, 39, 40, 99)] == [8, 8, 4, 4, 2, 2, 1, 1]

    def test_stages_may_fill_the_run(self):
        # 0.1 added up ten times is 0.9999999999999999, 0.7 + 0.2 + 0.1 is too.
        assert SuperpositionSchedule(1000, 0.1, 4, stages=((0.1, 4),) * 9).switch_step == 1000
        assert SuperpositionSchedule(1000, 0.7, 4, stages=((0.2, 3), (0.1, 2))).switch_step == 1000

    @pytest.mark.parametrize(
        ("stages", "message"),
        [
            (((0.9, 2),), "stages: expected ratios that add up to at most 1"),
            (((-0.1, 2),), r"stages\[0\], ratio: expected"),
            (((0.1, 2), (0.1, 0)), r"stages\[1\], bag_size: expected"),
        ],
    )
    def test_bad_stages(self, stages, message):
        with pytest.raises(ValueError, match=message):
            SuperpositionSchedule(100, 0.2, 4, stages=stages)

    @pytest.mark.parametrize(
        ("arguments", "name"), [((-1, 0.2, 4), "total_steps"), ((10, 1.1, 4), "ratio"), ((10, 0.2, 0), "bag_size")]
    )
    def test_bad_arguments(self, arguments, name):
        with pytest.raises(ValueError, match=name):
            SuperpositionSchedule(*arguments)

    def test_nan_ratio(self):
        with pytest.raises(ValueError, match="ratio"):
            SuperpositionSchedule(10, float("nan"), 4)
