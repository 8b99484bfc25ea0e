import pytest

from billhook_kernels.guard import find_low


@pytest.mark.parametrize(
    ("heights", "begin", "low", "asked"),
    [
        ([5.0, 3.0, 1.0, 2.0, 0.0], 0, 2, [0, 1, 2, 3]),
        ([5.0, 3.0, 1.0, 2.0, 4.0], 2, 2, [2, 3, 1]),
        ([1.0, 2.0, 3.0, 4.0], 2, 0, [2, 3, 1, 0]),
        ([4.0, 3.0, 2.0, 1.0], 2, 3, [2, 3]),
        ([1.0, 1.0, 1.0], 1, 1, [1, 2, 0]),
        ([float("inf"), float("inf"), 1.0], 0, 0, [0, 1]),
        ([7.0], 0, 0, [0]),
    ],
)
def test_each_place_on_the_way_down_is_measured_once(
    heights: list[float], begin: int, low: int, asked: list[int]
) -> None:
    seen = list[int]()

    def measure(place: int) -> float:
        seen.append(place)
        return heights[place]

    assert find_low(begin, len(heights), measure) == low
    assert seen == asked
