"""When micro-batches will be through: arithmetic of stations in a row."""

import pytest
from mnemoc.runtime.scheduling.cost import Load
from mnemoc.runtime.scheduling.pipeline import Pipeline

STAGES = 3


class Cost:
    """A row takes a second in each stage."""

    def pace_s(self, load: Load) -> float:
        return float(load.T)

    def crossing_s(self, load: Load) -> float:
        return float(STAGES * load.T)

    def swap_s(self, pages: int) -> float:
        return 0.0


def test_one_alone_crosses_and_one_behind_it_follows_at_its_pace() -> None:
    pipeline = Pipeline(Cost(), kvp=1)
    assert pipeline.send({0: Load(T=4)}, now_s=10.0).through_s == 10.0 + 12.0
    assert pipeline.send({0: Load(T=2)}, now_s=10.0).through_s == 22.0 + 2.0
    assert pipeline.send({0: Load(T=5)}, now_s=23.0).through_s == 23.0 + 15.0


def test_who_is_late_makes_those_behind_it_late() -> None:
    pipeline = Pipeline(Cost(), kvp=1)
    first = pipeline.send({0: Load(T=4)}, now_s=0.0)
    pipeline.send({0: Load(T=4)}, now_s=4.0)
    pipeline.landed({0: Load(T=4)}, first, now_s=13.0)  # a second late
    assert pipeline.send({0: Load(T=1)}, now_s=13.0).through_s == pytest.approx(17.0 + 1.0)


def test_groups_wait_only_for_what_is_on_them() -> None:
    pipeline = Pipeline(Cost(), kvp=2)
    pipeline.send({0: Load(T=9)}, now_s=0.0)
    assert pipeline.send({1: Load(T=1)}, now_s=0.0).through_s == 3.0
    assert pipeline.send({0: Load(T=1), 1: Load(T=1)}, now_s=0.0).through_s == 28.0
    pipeline.clear()
    assert pipeline.send({0: Load(T=1)}, now_s=1.0).through_s == 4.0
