"""Trains the tiny recursive model on 6x6 Sudoku: python examples/train_puzzle.py"""

import dataclasses

from trm_fast.recipes.puzzle import PRESETS, build


def main() -> None:
    config = dataclasses.replace(PRESETS["sudoku"]["tiny"], out="runs/sudoku")
    summary = build(config).fit(overwrite=True)
    print(f"solved: {summary.metrics['exact_accuracy']:.1%} of the test puzzles")


if __name__ == "__main__":
    main()
