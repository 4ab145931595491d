"""Data have a fingerprint by every bit of theirs, or none; none of them ends a run."""

import numpy as np
import pytest
import torch

from trm_fast.train import Checkpoints, Trainer, TrainerConfig
from trm_fast.train._fingerprint import fingerprint

COMPLEX = torch.complex(torch.arange(4.0), torch.ones(4))


class Raises:
    """Data that cannot be looked into."""

    @property
    def __class__(self):
        raise OSError("not now")


NONE = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    "meta": lambda: torch.ones(4, device="meta"),
    "objects": lambda: np.array([object()], dtype=object),
    "masked": lambda: np.ma.masked_array([1, 2], [True, False]),
    "raises": Raises,
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", NONE)
def test_what_cannot_be_hashed_has_no_fingerprint(kind):
    assert fingerprint([NONE[kind]()] * 2) is None


def test_a_list_in_itself_has_no_fingerprint():
    source: list = [1]
    source.append(source)
    assert fingerprint(source) is None


VALUES = {
    "conjugate": lambda: COMPLEX.conj(),
    "negative": lambda: COMPLEX.conj().imag,
    "half complex": lambda: COMPLEX.to(torch.complex32),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "bits": lambda: torch.tensor([True, False]),
    "scalar": lambda: torch.tensor(1.0),
    "empty": lambda: torch.ones(0, 3),
    "strided": lambda: torch.arange(12.0).view(3, 4).T,
    "no text": lambda: np.array(["", ""]),
    "date": lambda: np.array(["2020-01-01"], "M8[D]"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", VALUES)
def test_what_is_in_memory_has_one(kind):
    assert fingerprint([VALUES[kind]()]) is not None


def test_lazy_conjugates_are_hashed_as_what_they_are():
    assert fingerprint([COMPLEX.conj()]) != fingerprint([COMPLEX])
    assert fingerprint([COMPLEX.conj()]) == fingerprint([COMPLEX.conj().resolve_conj()])
    imaginary = COMPLEX.conj().imag
    assert fingerprint([imaginary]) == fingerprint([imaginary.resolve_neg()])


def test_the_last_bit_of_a_float64_counts():
    one = torch.ones(4, dtype=torch.float64)
    assert fingerprint([one]) != fingerprint([one + 2**-52])


def test_dtypes_of_equal_values_are_told_apart():
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32]
    found = {fingerprint([torch.ones(4).to(kind)]) for kind in kinds}
    assert len(found) == len(kinds)


def test_a_run_on_data_that_cannot_be_hashed_is_saved(tmp_path):
    model = torch.nn.Linear(4, 4)
    Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.eye(4).to_sparse()] * 4,
        lambda model, batch: model(batch.to_dense()).square().mean(), TrainerConfig(steps=2),
        out=tmp_path, device="cpu",
    ).fit()  # fmt: skip
    assert Checkpoints(tmp_path).load().step == 2
