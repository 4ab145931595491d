"""The synthetic classification task: its formula, its seeds, and that it is not linear."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from trm_fast.data.synthetic.vectors import SyntheticRecursiveDataset, task_states


def test_the_defaults_are_800_samples_of_128_features_and_10_classes():
    data = SyntheticRecursiveDataset()
    assert len(data) == 800
    features, label = data[799]
    assert features.shape == (128,) and features.dtype == torch.float32
    assert label.shape == () and label.dtype == torch.int64
    assert data.labels.unique().tolist() == list(range(10))


def test_states_follow_the_recurrence_of_an_orthogonal_matrix():
    first, second, third = task_states(8, 40, 3, task_seed=5).double()
    # Undo tanh: all states are images of those before under one matrix A, which 40 states define.
    a = torch.linalg.lstsq(first, torch.atanh(second)).solution.T
    # float32 rounds h to 6e-8; atanh multiplies that by up to 1 / (1 - h^2), and so does solving.
    slack = 1 / (1 - torch.stack((second, third)).square().max())
    bound = 100 * float(slack) * 6e-8
    torch.testing.assert_close(a @ a.T, 1.5**2 * torch.eye(8).double(), rtol=0, atol=bound)
    torch.testing.assert_close(torch.tanh(second @ a.T), third, rtol=0, atol=bound)


def test_samples_without_noise_are_states_with_a_sign():
    data = SyntheticRecursiveDataset(300, input_dim=8, num_classes=4, noise=0.0, seed=2)
    states = task_states(8, 4, 3, task_seed=0)
    met = set()
    for features, label in (data[i] for i in range(len(data))):
        found = [
            (depth, sign)
            for depth in range(3)
            for sign in (-1, 1)
            if torch.equal(features, sign * states[depth, label])
        ]
        assert len(found) == 1
        met |= {(*found[0], int(label))}
    # 24 kinds of 300 samples; each is missed with probability (23 / 24)^300 = 3e-6.
    assert len(met) == 24


def test_noise_has_the_standard_deviation_that_is_given():
    loud = SyntheticRecursiveDataset(500, noise=0.7, seed=3)
    quiet = SyntheticRecursiveDataset(500, noise=0.0, seed=3)
    errors = (loud.features - quiet.features).double()
    # The deviation of 64,000 draws is off by 0.7 / sqrt(2 * 64,000) = 0.002, five times of which
    # is never seen.
    assert errors.std().item() == pytest.approx(0.7, abs=0.01)
    assert errors.mean().item() == pytest.approx(0.0, abs=5 * 0.7 / 64_000**0.5)


def test_seeds_fix_samples_and_task_apart():
    first, again = SyntheticRecursiveDataset(seed=4), SyntheticRecursiveDataset(seed=4)
    other = SyntheticRecursiveDataset(seed=5)
    moved = SyntheticRecursiveDataset(seed=4, task_seed=1)
    assert torch.equal(first.features, again.features) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    assert torch.equal(first.labels, moved.labels)
    assert not torch.equal(first.features, moved.features)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    SyntheticRecursiveDataset(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_samples_at_once():
    data = SyntheticRecursiveDataset(10)
    features, labels = data[torch.tensor([7, 2])]
    assert torch.equal(features, torch.stack((data[7][0], data[2][0])))
    assert labels.tolist() == [data[7][1], data[2][1]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_linear_classifier_that_has_converged_is_near_chance(seed):
    train = SyntheticRecursiveDataset(800, seed=seed)
    val = SyntheticRecursiveDataset(1000, seed=seed + 100)
    weight = torch.zeros(128, 10, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        # The weak L2 term makes the minimum unique.
        loss = cross_entropy(train.features @ weight + bias, train.labels)
        loss = loss + 1e-5 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    right = (val.features @ weight + bias).argmax(1) == val.labels
    # Chance is 10 %; three standard deviations of 1,000 samples are 3 %.
    assert right.double().mean().item() <= 0.2


def test_no_linear_classifier_is_better_than_chance_on_mirrored_samples():
    """Its cross entropy is convex and even in the weights, so it is least where they are zero."""
    data = SyntheticRecursiveDataset(400, seed=6)
    features = torch.cat((data.features, -data.features)).double()
    labels = data.labels.repeat(2)
    weight = torch.zeros(128, 10, dtype=torch.float64, requires_grad=True)
    cross_entropy(features @ weight, labels).backward()
    # Every term meets its mirror image: 800 roundings of 2^-53 of sums below 800 * 4 / 800.
    assert weight.grad is not None
    assert weight.grad.abs().max().item() <= 800 * 2.0**-53 * 4


WRONG = {
    "samples": ({"num_samples": -1}, "num_samples must be a whole number >= 0; got -1"),
    "dim": ({"input_dim": 0}, "input_dim must be a whole number >= 1; got 0"),
    "classes": ({"num_classes": 2.0}, "num_classes must be a whole number >= 1; got 2.0"),
    "depths": ({"depths": True}, "depths must be a whole number >= 1; got True"),
    "noise": ({"noise": -0.1}, "noise must be finite and >= 0; got -0.1"),
    "nan": ({"noise": float("nan")}, "noise must be finite and >= 0; got nan"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError) as error:
        SyntheticRecursiveDataset(**options)
    assert str(error.value) == f"SyntheticRecursiveDataset: {message}"
