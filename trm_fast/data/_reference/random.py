"""Random numbers of the generators, equal in Python and C++ on every machine.

SplitMix64: a counter that grows by the golden ratio of 2^64, each value scrambled by ``mix``. Every
attempt at every item has a stream of its own, which starts at

    mix(mix(mix(seed) + index) + attempt)        modulo 2^64

so what an item becomes depends on nothing but its index and the seed. A bounded draw is the high
half of a product, whose bias of n / 2^64 no data set can show.

Sources: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix);
Stafford's mix13 (the constants); Lemire 2019, arXiv:1805.10941 (the bounded draw); Fisher-Yates
(``shuffle``).
"""

from typing import Any

_MASK = 2**64 - 1


def mix(z: int) -> int:
    """Returns a 64-bit number scrambled, one to one."""
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
    return z ^ z >> 31


class Random:
    """The stream of one attempt at one item."""

    def __init__(self, seed: int, index: int, attempt: int) -> None:
        self._state = mix((mix((mix(seed) + index) & _MASK) + attempt) & _MASK)

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        return mix(self._state)

    def below(self, n: int) -> int:
        """Returns a whole number in [0, n)."""
        return self._next() * n >> 64

    def uniform(self) -> float:
        """Returns a number in [0, 1) with 53 random bits."""
        return (self._next() >> 11) * 2.0**-53

    def shuffle(self, items: list[Any]) -> None:
        """Puts ``items`` into a random order, in place."""
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
