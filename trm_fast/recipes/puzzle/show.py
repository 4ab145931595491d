"""Shows how a trained model solves a puzzle, one supervision step after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from trm_fast.data.puzzles import PuzzleSet, evaluation_batches
from trm_fast.nn import TinyRecursiveModel
from trm_fast.nn.evaluating import evaluating
from trm_fast.train.display import is_terminal

Draw = Callable[[Tensor, Tensor, Tensor], list[str]]

_CANDIDATES = 64
_GAP = "    "


@torch.no_grad()
def predictions(model: TinyRecursiveModel, batch: dict[str, Tensor]) -> Tensor:
    """Returns the answers after every supervision step, [steps, batch, seq_len], int64."""
    with evaluating(model):
        carry = model.initial_carry(batch)
        answers = []
        for _ in range(model.config.halt_max_steps):
            carry, outputs = model(carry, batch)
            answers.append(outputs.logits.argmax(-1))
    return torch.stack(answers)


def solve_aloud(model: TinyRecursiveModel, test: PuzzleSet, draw: Draw) -> list[str]:
    """Returns lines that show one puzzle: as it is given, and the answer after each step until it
    is right. Of the first puzzles it is one that takes most steps.

    Args:
        model: with the weights that shall be shown.
        test: puzzles, at least one.
        draw: turns tokens, inputs and labels [seq_len] into lines of one width.
    """
    device = model.lm_head.device
    batch = next(iter(evaluation_batches(test, min(_CANDIDATES, len(test)))))
    batch = {name: value.to(device) for name, value in batch.items()}
    answers = predictions(model, batch)
    right = (answers == batch["labels"]).all(dim=2)
    # Never right counts as nothing: what is shown should end well if anything does.
    first = torch.where(right.any(dim=0), right.int().argmax(dim=0), -1)
    chosen = int(first.argmax())
    last = int(first[chosen]) if bool(first[chosen] >= 0) else len(answers) - 1
    inputs, labels = batch["inputs"][chosen].cpu(), batch["labels"][chosen].cpu()
    panels = [("puzzle", draw(inputs, inputs, inputs))]
    for step in range(last + 1):
        title = f"after step {step + 1}"
        panels.append((title, draw(answers[step, chosen].cpu(), inputs, labels)))
    return _side_by_side(panels)


def _side_by_side(panels: list[tuple[str, list[str]]]) -> list[str]:
    width = max(max(map(_width, lines)) for _, lines in panels)
    width = max(width, *(len(title) for title, _ in panels))
    per_row = max(1, 96 // (width + len(_GAP)))
    lines = []
    for start in range(0, len(panels), per_row):
        row = panels[start : start + per_row]
        lines.append(_GAP.join(title.ljust(width) for title, _ in row).rstrip())
        for parts in zip(*(drawn for _, drawn in row), strict=True):
            padded = (part + " " * (width - _width(part)) for part in parts)
            lines.append(_GAP.join(padded).rstrip())
        lines.append("")
    return lines[:-1]


def _width(text: str) -> int:
    """Returns how many columns a text takes on a terminal."""
    for code in ("\x1b[1m", "\x1b[31m", "\x1b[0m"):
        text = text.replace(code, "")
    return len(text)


def draw_sudoku(tokens: Tensor, inputs: Tensor, labels: Tensor) -> list[str]:
    """Returns the rows of a grid. On a terminal clues are bold and wrong digits red; elsewhere a
    wrong digit has a star."""
    size = round(len(tokens) ** 0.5)
    rows, columns = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    lines = []
    for row in range(size):
        cells = [_cell(tokens, inputs, labels, row * size + column) for column in range(size)]
        boxes = [cells[start : start + columns] for start in range(0, size, columns)]
        lines.append(" |".join("".join(box) for box in boxes))
        if row % rows == rows - 1 and row < size - 1:
            lines.append("-+".join("--" * columns for _ in boxes))
    return lines


def sudoku_legend() -> str:
    """Returns a line that says what ``draw_sudoku`` shows."""
    if is_terminal():
        return "bold: given, red: wrong, .: empty"
    return "*: wrong (or still empty), .: empty"


def _cell(tokens: Tensor, inputs: Tensor, labels: Tensor, place: int) -> str:
    token, given = int(tokens[place]), int(inputs[place]) > 1
    text = str(token - 1) if token > 1 else "."
    wrong = token != int(labels[place])
    if not is_terminal():
        return f"{'*' if wrong else ' '}{text}"
    return f" \x1b[1m{text}\x1b[0m" if given else f" \x1b[31m{text}\x1b[0m" if wrong else f" {text}"


MAZE_LEGEND = "#: wall, S: start, G: goal, o: path, ?: wrong"


def draw_maze(width: int) -> Draw:
    """Returns a function that draws mazes of this width; wrong cells are shown as "?"."""

    def draw(tokens: Tensor, inputs: Tensor, labels: Tensor) -> list[str]:
        shown = [
            "?" if token != label else ".# SGo"[token]
            for token, label in zip(tokens.tolist(), labels.tolist(), strict=True)
        ]
        return ["".join(shown[i : i + width]) for i in range(0, len(shown), width)]

    return draw
