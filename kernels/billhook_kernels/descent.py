"""Where numbers that fall and then rise are lowest."""

from collections.abc import Callable


def find_low(begin: int, count: int, measure: Callable[[int], float]) -> int:
    """The place, of `count`, to which numbers fall from `begin` on, up or else down; each is measured once, and none
    beyond the first that is no lower."""
    known = {begin: measure(begin)}

    def look(place: int) -> float:
        if place not in known:
            known[place] = measure(place)
        return known[place]

    place = begin
    for towards in (1, -1):
        while 0 <= place + towards < count and look(place + towards) < known[place]:
            place += towards
    return place
