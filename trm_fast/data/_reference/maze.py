"""Mazes in Python; the meaning is in maze.py."""

from collections.abc import Sequence

from trm_fast.data._reference.random import Random

WALL, FREE, START, GOAL, PATH = 1, 2, 3, 4, 5


class Maze:
    """Open cells, start, goal, and how far each cell is from the start."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.free = [False] * (height * width)
        self.start = self.goal = 0
        self.distance: list[int] = []
        self.ways: list[int] = []
        self._steps = (-width, -1, 1, width)

    @classmethod
    def read(cls, tokens: Sequence[int], height: int, width: int) -> "Maze":
        """Returns the maze that ``tokens`` show, with its distances."""
        maze = cls(height, width)
        maze.free = [token >= FREE for token in tokens]
        maze.start, maze.goal = tokens.index(START), tokens.index(GOAL)
        maze._measure()
        return maze

    def carve(self, random: Random) -> None:
        """Makes a tree of corridors: a cell is opened if it touches one open cell."""
        row = 1 + random.below(self.height - 2)
        stack = [row * self.width + 1 + random.below(self.width - 2)]
        self.free[stack[0]] = True
        while stack:
            around = [stack[-1] + step for step in self._steps]
            options = [cell for cell in around if self._is_wall(cell) and self._open(cell) == 1]
            if options:
                stack.append(options[random.below(len(options))])
                self.free[stack[-1]] = True
            else:
                stack.pop()

    def open_walls(self, openings: int, random: Random) -> bool:
        """Opens walls between open cells; False if there are too few."""
        if openings == 0:
            return True
        cells = range(len(self.free))
        walls = [cell for cell in cells if self._is_wall(cell) and self._open(cell) >= 2]
        if len(walls) < openings:
            return False
        random.shuffle(walls)
        for cell in walls[:openings]:
            self.free[cell] = True
        return True

    def draw_ends(self, min_path: int, random: Random) -> bool:
        """Draws start and goal; False if no goal is far enough with one shortest path."""
        cells = range(len(self.free))
        options = [cell for cell in cells if self.free[cell]]
        self.start = options[random.below(len(options))]
        self._measure()
        options = [c for c in cells if self.distance[c] >= min_path and self.ways[c] == 1]
        if not options:
            return False
        self.goal = options[random.below(len(options))]
        return True

    def tokens(self) -> list[int]:
        """Returns the maze without a path."""
        tokens = [FREE if free else WALL for free in self.free]
        tokens[self.start], tokens[self.goal] = START, GOAL
        return tokens

    def solved(self, tokens: Sequence[int]) -> list[int]:
        """Returns ``tokens`` with a shortest path; from the goal: up, left, right, down."""
        tokens = list(tokens)
        cell = self.goal
        while self.distance[cell] > 1:
            before = self.distance[cell] - 1
            cell = next(near for near in self._near(cell) if self.distance[near] == before)
            tokens[cell] = PATH
        return tokens

    def _is_wall(self, cell: int) -> bool:
        """Whether it is a wall that may be opened: not one of the border."""
        row, column = divmod(cell, self.width)
        inside = 0 < row < self.height - 1 and 0 < column < self.width - 1
        return inside and not self.free[cell]

    def _open(self, cell: int) -> int:
        return sum(self.free[cell + step] for step in self._steps)

    def _near(self, cell: int) -> list[int]:
        """The open cells beside a cell, which may lie at the border."""
        column = cell % self.width
        near = [cell - self.width] if cell >= self.width else []
        if column > 0:
            near.append(cell - 1)
        if column < self.width - 1:
            near.append(cell + 1)
        if cell + self.width < len(self.free):
            near.append(cell + self.width)
        return [other for other in near if self.free[other]]

    def _measure(self) -> None:
        """Finds all distances (-1: none) and numbers of shortest paths, up to 2, breadth first."""
        self.distance = [-1] * len(self.free)
        self.ways = [0] * len(self.free)
        self.distance[self.start], self.ways[self.start] = 0, 1
        queue = [self.start]
        for cell in queue:
            for near in self._near(cell):
                if self.distance[near] < 0:
                    self.distance[near] = self.distance[cell] + 1
                    queue.append(near)
                if self.distance[near] == self.distance[cell] + 1:
                    self.ways[near] = min(2, self.ways[near] + self.ways[cell])


def generate(height: int, width: int, openings: int, min_path: int, random: Random) -> Maze | None:
    """Makes one attempt at a maze."""
    maze = Maze(height, width)
    maze.carve(random)
    wanted = maze.open_walls(openings, random) and maze.draw_ends(min_path, random)
    return maze if wanted else None
