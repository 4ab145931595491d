"""The score of ARC: every augmentation of a task votes for an answer to each of its test inputs.

    votes(grid) = number of augmentations whose answer, turned back, is this grid
    rank by (votes, mean of sigmoid(q_halt) over these)
    pass@K: the right grid is among the first K
    score = mean over tasks of solved test inputs / test inputs

Source: SamsungSAILMontreal/TinyRecursiveModels at commit e7b6871, evaluators/arc.py. Declared
differences: no process group is needed; votes of earlier evaluations are kept only if asked for;
answers to an input that the task does not have are an error instead of lost; equal ranks are
ordered by the grid, so that the order of the votes does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from trm_fast.data.puzzles.arc_grids import crop, split_name, undo
from trm_fast.data.puzzles.puzzle_set import Array

# task -> test input -> answer -> [votes, sum of sigmoid(q_halt)]; grids are texts.
Votes = dict[str, dict[str, dict[str, list[float]]]]


class ArcVoting:
    """Collects answers to augmented test inputs and scores their vote.

    Args:
        identifiers: name of each puzzle identifier, 0 blank; see ``trm_fast.data.ArcData``.
        test_puzzles: the tasks to be judged, name -> {"test": [{"input", "output"}, ...]}. Tasks
            without a known output are left out of the score.
        attempts: answers per test input in a submission.
        ks: the K of pass@K.
        aggregate: whether ``begin`` keeps the votes of earlier evaluations, as the official code
            does by default (published scores add up all checkpoints of a run). By default a score
            belongs to one checkpoint.

    Raises:
        ValueError: ``attempts`` or one of ``ks`` is below 1, or there are no tasks.
    """

    def __init__(
        self,
        identifiers: Sequence[str],
        test_puzzles: Mapping[str, Any],
        *,
        attempts: int = 2,
        ks: Sequence[int] = (1, 2, 5, 10, 100, 1000),
        aggregate: bool = False,
    ) -> None:
        if attempts < 1 or not ks or min(ks) < 1:
            raise ValueError(f"ArcVoting: attempts and ks must be >= 1; got {attempts}, {[*ks]}")
        if not test_puzzles:
            raise ValueError("ArcVoting: at least one task is required; got none")
        self.identifiers, self.attempts, self.ks = identifiers, attempts, tuple(ks)
        self.aggregate = aggregate
        self._pairs = {
            name: [(_text(pair["input"]), _text(pair.get("output"))) for pair in task["test"]]
            for name, task in test_puzzles.items()
        }
        self._votes: Votes = {}

    def begin(self) -> None:
        """Starts an evaluation: forgets all votes, unless they are to be aggregated."""
        if not self.aggregate:
            self._votes = {}

    def update(
        self, inputs: Tensor, puzzle_identifiers: Tensor, predictions: Tensor, q_halt: Tensor
    ) -> None:
        """Takes the answers of one batch; rows with the blank identifier are left out.

        Args:
            inputs, predictions: tokens [batch, 900], integers, on any device.
            puzzle_identifiers: [batch], integers.
            q_halt: logit of halting, [batch].

        Raises:
            ValueError: an identifier has no name or one of a task that is not judged, or an input
                is none of its task.
        """
        ids = puzzle_identifiers.cpu().numpy()
        rows = np.flatnonzero(ids)
        if not len(rows):
            return
        trust = q_halt.double().sigmoid().cpu().numpy()[rows]
        asked = crop(inputs.cpu().numpy()[rows])
        answered = crop(predictions.cpu().numpy()[rows])
        for identifier, question, answer, q in zip(ids[rows], asked, answered, trust, strict=True):
            self._vote(int(identifier), question, answer, float(q))

    def _vote(self, identifier: int, question: Array, answer: Array, q: float) -> None:
        if not 0 <= identifier < len(self.identifiers):
            raise ValueError(
                f"ArcVoting: identifiers must be in [0, {len(self.identifiers)}); got {identifier}"
            )
        task, symmetry, colours = split_name(self.identifiers[identifier])
        if task not in self._pairs:
            raise ValueError(f"ArcVoting: {task} is none of the tasks to be judged")
        text = _text_of(undo(question, symmetry, colours))
        if all(text != known for known, _ in self._pairs[task]):
            name = self.identifiers[identifier]
            raise ValueError(f"ArcVoting: inputs of {name} must be those of {task}; got another")
        answers = self._votes.setdefault(task, {}).setdefault(text, {})
        _add(answers, _text_of(undo(answer, symmetry, colours)), 1, q)

    def scores(self) -> dict[str, float]:
        """The mean over tasks of the part of their test inputs that is solved within K answers.

        Returns:
            {"pass@1": ..., "tasks": number of tasks that count, as those with test inputs and all
            of their answers}; NaN if none does. An input without any vote is not solved.
        """
        judged = [name for name, own in self._pairs.items() if own and all(a for _, a in own)]
        found = {
            f"pass@{k}": float(np.mean([self._solved(name, k) for name in judged]))
            if judged
            else float("nan")
            for k in self.ks
        }
        return {**found, "tasks": float(len(judged))}

    def _solved(self, task: str, k: int) -> float:
        pairs = self._pairs[task]
        return sum(right in self._ranked(task, asked)[:k] for asked, right in pairs) / len(pairs)

    def _ranked(self, task: str, question: str) -> list[str]:
        answers = self._votes.get(task, {}).get(question, {})
        return sorted(answers, key=lambda a: (-answers[a][0], -answers[a][1] / answers[a][0], a))

    def submission(self) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The best answers in the form of ARC Prize: task -> one {"attempt_1": ...} per test input.

        With fewer grids than attempts the best one is repeated; without any it is [[0]].
        """
        return {
            task: [self._attempts(task, asked) for asked, _ in pairs]
            for task, pairs in self._pairs.items()
        }

    def _attempts(self, task: str, question: str) -> dict[str, list[list[int]]]:
        # An answer without a grid cannot be handed in.
        best = [text for text in self._ranked(task, question) if text][: self.attempts] or ["0"]
        best += best[:1] * (self.attempts - len(best))
        return {f"attempt_{i + 1}": _rows_of(text) for i, text in enumerate(best)}

    def state_dict(self) -> dict[str, Any]:
        """The votes as plain values that JSON can hold; those of all ranks go into ``merge``."""
        return {"votes": _copy(self._votes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over votes of ``state_dict``; those from before are forgotten.

        Raises:
            ValueError: the state has no votes.
        """
        self.merge([state])

    def merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Replaces the votes by the sum of the votes of all ranks.

        Args:
            states: the ``state_dict`` of each rank, this one's too.

        Raises:
            ValueError: a state has no votes.
        """
        if not all(isinstance(state.get("votes"), dict) for state in states):
            raise ValueError("ArcVoting: a state must have votes")
        total: Votes = {}
        for state in states:
            for task, questions in state["votes"].items():
                for question, answers in questions.items():
                    own = total.setdefault(task, {}).setdefault(question, {})
                    for answer, (votes, q) in answers.items():
                        _add(own, answer, votes, q)
        self._votes = total


def _add(answers: dict[str, list[float]], answer: str, votes: float, q: float) -> None:
    have = answers.setdefault(answer, [0, 0.0])
    have[0] += votes
    have[1] += q


def _copy(votes: Votes) -> Votes:
    return {
        task: {
            question: {answer: [*have] for answer, have in answers.items()}
            for question, answers in questions.items()
        }
        for task, questions in votes.items()
    }


def _text_of(grid: Array) -> str:
    """A grid as text, rows of digits divided by slashes; empty for an empty grid."""
    return "/".join("".join(map(str, row)) for row in grid.tolist())


def _text(rows: Any) -> str:
    """The text of a grid of lists; empty if there is none."""
    return "" if rows is None else "/".join("".join(map(str, row)) for row in rows)


def _rows_of(text: str) -> list[list[int]]:
    return [[int(digit) for digit in row] for row in text.split("/")]
