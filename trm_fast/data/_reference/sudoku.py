"""Sudoku in Python; the meaning is in sudoku.py.

A set of cells is one whole number, with bit c for cell c in reading order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trm_fast.data._reference.random import Random


@dataclass
class Found:
    """What a search has found.

    Args:
        solutions: how many, up to the limit of the search.
        depth: the deepest nesting of guesses.
        guesses: all digits that were tried.
        first: the first solution.
    """

    solutions: int = 0
    depth: int = 0
    guesses: int = 0
    first: list[int] | None = None


class _Contradiction(Exception):
    """A cell has no digit left, or a digit no cell of a unit."""


class Board:
    """The cells, units (rows, columns, boxes) and peers of one size, and the search on them."""

    def __init__(self, box_rows: int, box_columns: int) -> None:
        size = self.size = box_rows * box_columns
        self.cells = size * size
        self._all = (1 << self.cells) - 1
        self._units = [0] * (3 * size)
        self._peers = [0] * self.cells
        units_of: list[tuple[int, ...]] = []
        for cell in range(self.cells):
            row, column = divmod(cell, size)
            box = row // box_rows * box_rows + column // box_columns
            units_of.append((row, size + column, 2 * size + box))
            for unit in units_of[cell]:
                self._units[unit] |= 1 << cell
        for cell, units in enumerate(units_of):
            for unit in units:
                self._peers[cell] |= self._units[unit]
            self._peers[cell] &= ~(1 << cell)

    def start(self, puzzle: Sequence[int]) -> list[int]:
        """Returns where each digit can stand when the clues have ruled out what they see."""
        seen, clues = [0] * self.size, [0] * self.size
        for cell, digit in enumerate(puzzle):
            if digit:
                seen[digit - 1] |= self._peers[cell]
                clues[digit - 1] |= 1 << cell
        empty = self._all & ~sum(clues)
        return [(empty | mine) & ~theirs for mine, theirs in zip(clues, seen, strict=True)]

    def solve(self, puzzle: Sequence[int]) -> Found:
        """Searches for two solutions."""
        found = Found()
        self._search(self.start(puzzle), 2, 0, found)
        return found

    def has_other(self, puzzle: Sequence[int], cell: int, digit: int) -> bool:
        """Returns whether a solution has another digit than this one in an empty cell."""
        places = self.start(puzzle)
        places[digit - 1] &= ~(1 << cell)
        found = Found()
        self._search(places, 1, 0, found)
        return found.solutions > 0

    def fill(self, places: list[int], random: Random) -> list[int] | None:
        """Returns a random solution."""
        try:
            cell = self._propagate(places)
        except _Contradiction:
            return None
        if cell is None:
            return self._grid(places)
        digits = self._digits(places, cell)
        random.shuffle(digits)
        for digit in digits:
            grid = self.fill(self._placed(places, cell, digit), random)
            if grid:
                return grid
        return None

    def _search(self, places: list[int], limit: int, depth: int, found: Found) -> None:
        try:
            cell = self._propagate(places)
        except _Contradiction:
            return
        if cell is None:
            found.solutions += 1
            found.first = found.first or self._grid(places)
            return
        found.depth = max(found.depth, depth + 1)
        for digit in self._digits(places, cell):
            if found.solutions < limit:
                found.guesses += 1
                self._search(self._placed(places, cell, digit), limit, depth + 1, found)

    def _propagate(self, places: list[int]) -> int | None:
        """Applies singles until there are none; returns the open cell with the fewest digits."""
        known = 0  # cells whose peers have lost their digit
        while True:
            once = twice = 0
            for cells in places:
                twice |= once & cells
                once |= cells
            if once != self._all:
                raise _Contradiction
            naked = once & ~twice & ~known
            if naked:
                self._exclude(places, naked)
                known |= naked
            elif not self._find_hidden(places):
                return self._most_constrained(places, twice) if twice else None

    def _exclude(self, places: list[int], naked: int) -> None:
        """Takes the digits of cells that have only one from their peers."""
        for digit in range(self.size):
            left = places[digit] & naked
            while left:
                cell = left.bit_length() - 1
                places[digit] &= ~self._peers[cell]
                left &= places[digit] & ~(1 << cell)

    def _find_hidden(self, places: list[int]) -> bool:
        """Leaves a digit alone in the only cell that a unit has for it; says if one was not."""
        found = False
        for digit in range(self.size):
            for unit in self._units:
                here = places[digit] & unit
                if not here:
                    raise _Contradiction
                if here & (here - 1):
                    continue
                for other in range(self.size):
                    if other != digit and places[other] & here:
                        places[other] &= ~here
                        found = True
        return found

    def _most_constrained(self, places: list[int], candidates: int) -> int:
        fewest = min(
            (sum(cells >> cell & 1 for cells in places), cell)
            for cell in range(self.cells)
            if candidates >> cell & 1
        )
        return fewest[1]

    def _digits(self, places: list[int], cell: int) -> list[int]:
        return [digit for digit in range(self.size) if places[digit] >> cell & 1]

    def _placed(self, places: list[int], cell: int, digit: int) -> list[int]:
        others = [cells & ~(1 << cell) for cells in places]
        others[digit] |= 1 << cell
        return others

    def _grid(self, places: list[int]) -> list[int]:
        return [1 + self._digits(places, cell)[0] for cell in range(self.cells)]


@dataclass(frozen=True)
class Wanted:
    """What a puzzle must have: clues and, unless None, depth, each from the first to the second."""

    clues: tuple[int, int]
    unique: bool
    depths: tuple[int, int] | None


def generate(board: Board, wanted: Wanted, random: Random) -> tuple[list[int], list[int]] | None:
    """Makes one attempt at a puzzle; returns it with its solution, or None."""
    fewest, most = wanted.clues
    target = fewest + random.below(most - fewest + 1)
    solution = board.fill(board.start([0] * board.cells), random)
    assert solution is not None  # an empty grid has solutions
    puzzle, order = list(solution), list(range(board.cells))
    random.shuffle(order)
    clues = board.cells
    for cell in order:
        if clues == target:
            break
        puzzle[cell] = 0
        if wanted.unique and board.has_other(puzzle, cell, solution[cell]):
            puzzle[cell] = solution[cell]
        else:
            clues -= 1
    if clues > most:
        return None
    if wanted.depths:
        least, deepest = wanted.depths
        if not least <= board.solve(puzzle).depth <= deepest:
            return None
    return puzzle, solution
