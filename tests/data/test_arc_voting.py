"""The vote on ARC answers, against counts made by hand."""

import json
import math

import numpy as np
import pytest
import torch

from trm_fast.data import ArcVoting
from trm_fast.data.puzzles.arc_grids import dihedral, draw

ASKED = [[1, 2, 3], [4, 5, 6]]
RIGHT, WRONG, OTHER = [[7, 8]], [[7], [8]], [[9]]
SECOND = [[5]]
# Task a has two test inputs, b one; identifiers 1 to 4 belong to a.
IDENTIFIERS = [
    "<blank>",
    "a",
    "a|||t1|||0213456789",
    "a|||t6|||0123456798",
    "a|||t7|||0987654321",
    "b",
]
TASKS = {
    "a": {"test": [{"input": ASKED, "output": RIGHT}, {"input": SECOND, "output": OTHER}]},
    "b": {"test": [{"input": ASKED, "output": WRONG}]},
}


def tokens(grid, identifier):
    """The canvas of a grid as a puzzle of this identifier shows it."""
    grid = np.array(grid, np.uint8)
    if "|||" in IDENTIFIERS[identifier]:
        _, symmetry, colours = IDENTIFIERS[identifier].split("|||")
        grid = dihedral(np.array([*map(int, colours)], np.uint8)[grid], int(symmetry[1:]))
    canvas = np.zeros((1, 30, 30), np.uint8)
    draw(canvas, grid[None], np.zeros(1, int), np.zeros(1, int))
    return torch.from_numpy(canvas.reshape(900).astype(np.int64))


def vote(voting, *votes):
    """Each vote: identifier, test input, answer, logit."""
    voting.update(
        torch.stack([tokens(asked, i) for i, asked, _, _ in votes]),
        torch.tensor([i for i, *_ in votes]),
        torch.stack([tokens(answer, i) for i, _, answer, _ in votes]),
        torch.tensor([q for *_, q in votes]),
    )


@pytest.fixture
def voting():
    return ArcVoting(IDENTIFIERS, TASKS)


def sigmoid(q):
    return 1 / (1 + math.exp(-q))


def test_augmentations_are_undone_and_equal_grids_are_one_answer(voting):
    vote(voting, *[(i, ASKED, RIGHT, 0.5 * i) for i in (1, 2, 3, 4)])
    # Sums of the logistic function, in the order of the votes, as the formula has them.
    expected = sum(sigmoid(0.5 * i) for i in (1, 2, 3, 4))
    [(question, answers)] = voting.state_dict()["votes"]["a"].items()
    assert question == "123/456"
    [(answer, (count, trust))] = answers.items()
    assert (answer, count) == ("78", 4)
    # Four additions of numbers below 1 in float64, twice rounded.
    assert abs(trust - expected) <= 8 * 4 * 2**-53


def test_votes_come_before_trust_and_trust_decides_ties(voting):
    vote(
        voting,
        *[(1, ASKED, WRONG, -9.0), (2, ASKED, WRONG, -9.0), (3, ASKED, RIGHT, 9.0)],
        *[(1, SECOND, WRONG, 0.0), (2, SECOND, OTHER, 0.1)],
    )
    scores = voting.scores()
    # a: its first input is solved by the second answer, its second by the first; b has no votes.
    assert scores["pass@1"] == (1 / 2 + 0) / 2
    assert scores["pass@2"] == scores["pass@1000"] == (1 + 0) / 2
    assert scores["tasks"] == 2
    assert [*scores] == [*(f"pass@{k}" for k in (1, 2, 5, 10, 100, 1000)), "tasks"]


def test_trust_is_that_of_all_votes_of_an_answer(voting):
    # Two votes each; 0.9 and 0.1 lose against 0.6 and 0.6, though the best of them is better.
    q = {p: math.log(p / (1 - p)) for p in (0.9, 0.1, 0.6)}
    vote(voting, (1, SECOND, WRONG, q[0.9]), (2, SECOND, WRONG, q[0.1]))
    vote(voting, (1, SECOND, OTHER, q[0.6]), (2, SECOND, OTHER, q[0.6]))
    assert voting.scores()["pass@1"] == (1 / 2) / 2


def test_equal_ranks_do_not_depend_on_the_order_of_the_votes(voting):
    votes = [(1, SECOND, WRONG, 0.0), (2, SECOND, OTHER, 0.0), (3, SECOND, RIGHT, 0.0)]
    found = []
    for order in (votes, votes[::-1]):
        voting.begin()
        vote(voting, *order)
        found.append(voting.submission()["a"][1])
    assert found[0] == found[1]


def test_every_k_counts_its_own_answers():
    voting = ArcVoting(IDENTIFIERS, TASKS, ks=(1, 2, 3))
    for count, answer in ((3, WRONG), (2, OTHER), (1, RIGHT)):
        vote(voting, *[(1, ASKED, answer, 0.0)] * count)
    scores = voting.scores()
    assert [scores[f"pass@{k}"] for k in (1, 2, 3)] == [0, 0, 1 / 4]


def test_a_submission_repeats_the_best_answer_or_says_nothing(voting):
    vote(voting, (1, ASKED, RIGHT, 0.0), (2, ASKED, RIGHT, 0.0), (3, ASKED, WRONG, 0.0))
    vote(voting, (2, SECOND, OTHER, 0.0))
    assert voting.submission() == {
        "a": [
            {"attempt_1": RIGHT, "attempt_2": WRONG},
            {"attempt_1": OTHER, "attempt_2": OTHER},
        ],
        "b": [{"attempt_1": [[0]], "attempt_2": [[0]]}],
    }


def test_answers_without_a_grid_are_votes_too(voting):
    inputs, ids = tokens(ASKED, 5)[None], torch.tensor([5])
    voting.update(inputs, ids, torch.ones(1, 900, dtype=torch.int64), torch.zeros(1))
    assert voting.scores()["pass@1000"] == 0
    assert voting.submission()["b"] == [{"attempt_1": [[0]], "attempt_2": [[0]]}]


def test_blank_rows_are_left_out(voting):
    blank = torch.zeros(2, 900, dtype=torch.int64)
    voting.update(blank, torch.zeros(2, dtype=torch.int64), blank, torch.zeros(2))
    mixed = torch.stack([blank[0], tokens(ASKED, 5)])
    answers = torch.stack([blank[0], tokens(WRONG, 5)])
    voting.update(mixed, torch.tensor([0, 5]), answers, torch.tensor([9.0, 0.0]))
    assert voting.state_dict()["votes"] == {"b": {"123/456": {"7/8": [1, 0.5]}}}


@pytest.mark.parametrize("aggregate", [False, True])
def test_earlier_evaluations_count_only_if_asked_for(aggregate):
    voting = ArcVoting(IDENTIFIERS, TASKS, aggregate=aggregate)
    voting.begin()
    vote(voting, (5, ASKED, WRONG, 0.0), (5, ASKED, WRONG, 0.0))
    assert voting.scores()["pass@1"] == 1 / 2
    voting.begin()
    vote(voting, (5, ASKED, OTHER, 0.0))
    assert voting.scores()["pass@1"] == (1 / 2 if aggregate else 0)


def test_ranks_are_merged_by_plain_values(voting):
    votes = [
        (1, ASKED, RIGHT, 0.0),
        (2, ASKED, WRONG, 1.0),
        (3, ASKED, RIGHT, 2.0),
        (5, ASKED, WRONG, 0),
    ]
    vote(voting, *votes)
    ranks = [ArcVoting(IDENTIFIERS, TASKS) for _ in range(3)]
    vote(ranks[0], *votes[:1])
    vote(ranks[1], *votes[1:])
    states = json.loads(json.dumps([rank.state_dict() for rank in ranks]))
    ranks[2].merge(states)
    assert ranks[2].state_dict() == voting.state_dict()
    assert ranks[2].scores() == voting.scores()
    ranks[0].load_state_dict(json.loads(json.dumps(voting.state_dict())))
    assert ranks[0].state_dict() == voting.state_dict()


def test_a_state_is_a_copy(voting):
    vote(voting, (5, ASKED, WRONG, 0.0))
    state = voting.state_dict()
    vote(voting, (5, ASKED, WRONG, 0.0))
    assert state["votes"]["b"]["123/456"]["7/8"][0] == 1


def test_tasks_with_unknown_answers_are_left_out_of_the_score():
    tasks = {**TASKS, "b": {"test": [{"input": ASKED}]}}
    voting = ArcVoting(IDENTIFIERS, tasks)
    vote(voting, (1, ASKED, RIGHT, 0.0), (5, ASKED, WRONG, 0.0))
    assert (voting.scores()["pass@1"], voting.scores()["tasks"]) == (1 / 2, 1)
    assert voting.submission()["b"] == [{"attempt_1": WRONG, "attempt_2": WRONG}]
    unknown = ArcVoting(IDENTIFIERS, {"b": tasks["b"]}).scores()
    assert math.isnan(unknown["pass@1"])
    assert unknown["tasks"] == 0


def test_what_belongs_to_no_judged_task_is_an_error(voting):
    with pytest.raises(ValueError, match=r"identifiers must be in \[0, 6\); got 6"):
        voting.update(
            tokens(ASKED, 5)[None], torch.tensor([6]), tokens(WRONG, 5)[None], torch.zeros(1)
        )
    with pytest.raises(ValueError, match="inputs of b must be those of b; got another"):
        vote(voting, (5, SECOND, WRONG, 0.0))
    with pytest.raises(ValueError, match="b is none of the tasks to be judged"):
        vote(ArcVoting(IDENTIFIERS, {"a": TASKS["a"]}), (5, ASKED, WRONG, 0.0))
    with pytest.raises(ValueError, match="a state must have votes"):
        voting.merge([{}])


@pytest.mark.parametrize("arguments", [{"attempts": 0}, {"ks": ()}, {"ks": (0, 1)}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="attempts and ks must be >= 1"):
        ArcVoting(IDENTIFIERS, TASKS, **arguments)
