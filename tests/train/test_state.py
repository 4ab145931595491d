"""State to tensors and JSON and back: equal to the bit, and refused where that cannot be."""

import collections
import json
import math
import struct
from enum import Enum, IntEnum

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trm_fast.train.checkpoints.state import (
    DTYPES,
    MAX_DEPTH,
    dumps,
    flatten,
    from_safetensors,
    loads,
    to_safetensors,
    unflatten,
)

DTYPE_NAMES = {str(dtype): dtype for dtype in DTYPES}


def there_and_back(value):
    tensors, tree = flatten(value, "part")
    data = b"".join(to_safetensors(tensors))
    return unflatten(loads(dumps(tree), "tree"), from_safetensors(data))


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def same(a, b) -> bool:
    """Equal in kind, order and every bit."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return alike and bits(a) == bits(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        keys = [(type(key), key) for key in a] == [(type(key), key) for key in b]
        return keys and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@st.composite
def tensors(draw):
    dtype = DTYPE_NAMES[draw(st.sampled_from(sorted(DTYPE_NAMES)))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


KEYS = st.one_of(st.text(max_size=6), st.sampled_from(["$tensor", "a.b", "__metadata__", "a~"]))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 80), 1 << 80),
    st.floats(),
    st.text(max_size=8),
    tensors(),
)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(KEYS, st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(STATES)
def test_what_comes_back_is_equal_to_the_bit(value):
    assert same(there_and_back(value), value)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 1, 1.0, -0.0, math.inf, -math.inf, 1 << 63, -(1 << 63) - 1, 10**5000, "",
        "\ud800", "\x00", [], (), {}, [()], ({},), {0: "a", "0": "b"}, {"$int": "0x1"}, {-1: {}},
        struct.unpack("d", struct.pack("Q", 0x7FF8000000000ABC))[0],
        struct.unpack("d", struct.pack("Q", 0xFFF0000000000001))[0],
    ],
    ids=lambda value: repr(value)[:30] if type(value) is not int else hex(value)[:20],
)  # fmt: skip
def test_plain_values(value):
    assert same(there_and_back(value), value)


class Kind(IntEnum):
    ONE = 1


class Name(str, Enum):
    ONE = "one"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.1), 0.1), (np.float32(0.1), 0.10000000149011612), (np.float16(2), 2.0),
        (np.int64(-3), -3), (np.uint64(2**64 - 1), 2**64 - 1), (np.bool_(True), True),
        (np.str_("a"), "a"), (np.array(2.5), 2.5), (np.array(7, np.int8), 7), (Kind.ONE, 1),
        (Name.ONE, "one"), ({np.int64(3): np.float64(-0.0)}, {3: -0.0}),
        ({Name.ONE: np.float64("inf")}, {"one": math.inf}),
        ((np.int32(1), [np.float64(2.0)]), (1, [2.0])),
    ],
    ids=repr,
)  # fmt: skip
def test_scalars_come_back_as_the_plain_values_that_they_are(value, expected):
    assert same(there_and_back(value), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 1, 3)], ids=str)
def test_every_dtype_and_shape(dtype, shape):
    count = math.prod(shape) * dtype.itemsize
    data = torch.arange(count, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    tensor = data.view(dtype).reshape(shape)
    assert same(there_and_back({"a": tensor}), {"a": tensor})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_as_an_option(dtype):
    assert there_and_back({"options": [dtype, None]}) == {"options": [dtype, None]}


def test_a_state_dict_of_a_model_and_an_optimizer():
    model = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3).bfloat16()).sum().backward()
    optimizer.step()
    back = there_and_back({"model": model.state_dict(), "optim": optimizer.state_dict()})
    assert same(back["model"], dict(model.state_dict()))
    assert same(back["optim"], optimizer.state_dict())
    # An OrderedDict comes back as a dict and a Parameter as a tensor.
    assert type(there_and_back(collections.OrderedDict(a=1))) is dict
    assert type(there_and_back(model.weight)) is torch.Tensor


def test_a_tensor_met_twice_is_stored_once_and_comes_back_as_one():
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"embedding": weight, "head": weight.view(2, 3), "other": weight.clone()}
    tensors, _ = flatten(state, "part")
    assert list(tensors) == ["embedding", "other"]
    back = there_and_back(state)
    assert back["head"] is back["embedding"] and back["other"] is not back["embedding"]
    assert same(back, state)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[1:],
        lambda t: t[:, ::2],
        lambda t: t[0, 0].expand(5),
        lambda t: t.reshape(-1),
        lambda t: t.view(torch.int32),
        lambda t: torch.view_as_complex(t.reshape(2, 2, 2)).conj(),
        lambda t: torch.view_as_complex(t.reshape(2, 2, 2)).conj().imag,
    ],
    ids=["t", "rows", "strided", "expanded", "flat", "int32", "conj", "neg"],
)
def test_views_of_shared_memory_come_back_equal(view):
    base = torch.arange(8.0).reshape(2, 4)
    back = there_and_back({"base": base, "view": view(base)})
    assert same(back["base"], base)
    expected = view(base).resolve_conj().resolve_neg()
    assert same(back["view"], expected)


def test_what_is_loaded_has_memory_of_its_own():
    back = there_and_back([torch.zeros(2), torch.zeros(2)])
    back[0].fill_(7)
    assert back[1].tolist() == [0, 0]
    assert back[0].untyped_storage().nbytes() == 8


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({0: {"step": np.datetime64(1, "s")}}, "part.0.step must be .*; got datetime.datetime"),
        ({0: {"step": np.complex64(1)}}, "part.0.step must be .*; got builtins.complex"),
        ([1, np.zeros(2)], "part.1 must be .*; got numpy.ndarray"),
        ({"size": torch.Size([1])}, "part.size must be .*; got torch.Size"),
        ({"f": print}, "part.f must be .*; got builtins.builtin_function_or_method"),
        ({1.0: 2}, "part must have keys that are str or int; got 1.0 of builtins.float"),
        ({"a": {True: 2}}, "part.a must have keys that are str or int; got True of builtins.bool"),
        ([torch.eye(2).to_sparse()], "part.0 must be a dense tensor with data; got torch.sparse"),
        ([torch.empty(2, device="meta")], "part.0 must be a dense tensor with data; got .* meta"),
        ([torch.zeros(2, dtype=torch.complex128)], "part.0 must have a dtype that .*complex128"),
    ],
)
def test_what_is_no_state_is_named(value, message):
    with pytest.raises(TypeError, match=message):
        flatten(value, "part")


def test_a_cycle_ends():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(
        ValueError, match=f"part: state must be nested at most {MAX_DEPTH} deep; got 65"
    ):
        flatten(cycle, "part")


def test_the_deepest_state_comes_back():
    value = 1
    for _ in range(MAX_DEPTH):
        value = {0: value}
    assert same(there_and_back(value), value)


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: {"a": v}, lambda v: (v,), lambda v: {0: v}]
)
def test_a_state_that_could_not_be_saved_is_not_read(wrap):
    value = 1
    for _ in range(MAX_DEPTH):
        value = wrap(value)
    tensors, tree = flatten(value, "part")
    assert same(unflatten(tree, tensors), value)
    _, around = flatten(wrap(1), "part")
    deeper = json.loads(json.dumps(around).replace("1", json.dumps(tree)))
    with pytest.raises(ValueError, match="a tree must be nested at most 64 deep; got 65"):
        unflatten(deeper, tensors)


def test_the_json_is_compact_and_shows_plain_values_as_they_are():
    _, tree = flatten({"step": 3, "betas": (0.9, 0.99), "w": torch.ones(1)}, "trainer")
    expected = b'{"step":3,"betas":{"$tuple":[0.9,0.99]},"w":{"$tensor":"w"}}'
    assert dumps(tree) == expected


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "missing"}, {"$tensor": ["a"]}, {"$tuple": 3}, {"$tuple": {"a": 1}},
        {"$dict": [[1, 2, 3]]}, {"$dict": [[[], 2]]}, {"$dict": [[None, 2]]}, {"$dict": [1]},
        {"$int": "__import__('os')"}, {"$int": 3}, {"$int": "1_0"}, {"$float": "nan"},
        {"$float": "7ff0"}, {"$unknown": 1}, {"$tuple": [], "a": 1}, {"a": 1, "$b": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_tree_of_a_stranger_is_refused(tree):
    with pytest.raises(ValueError, match="a tree must"):
        unflatten(tree, {})


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner),
        st.dictionaries(
            st.sampled_from(["$tensor", "$tuple", "$dict", "$int", "$float", "a"]), inner
        ),
    ),
)


@given(JSON)
def test_any_tree_is_read_or_refused_in_declared_words(tree):
    try:
        unflatten(tree, {"a": torch.zeros(1)})
    except ValueError as error:
        assert str(error).startswith("a tree must")


@given(st.one_of(st.binary(), JSON.map(lambda tree: json.dumps(tree).encode())))
def test_any_bytes_are_json_or_a_value_error(data):
    try:
        loads(data, "tree")
    except ValueError:
        pass


@pytest.mark.parametrize(
    "data",
    [b"[" * 10**6, b'{"a":' * 10**6, b"1" * 10**6, b"NaN", b"[Infinity]", b"\xff", b"", b"[1] 2"],
    ids=["deep list", "deep dict", "huge int", "nan", "inf", "not ascii", "empty", "more"],
)
def test_json_goes_to_its_bounds_only(data):
    with pytest.raises(ValueError):
        loads(data, "tree")


def header(entry, data=b"", declared=None):
    text = json.dumps(entry).encode() if isinstance(entry, dict) else entry
    length = len(text) if declared is None else declared
    return length.to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80\x04K\x01.", b"\x80\x02]q\x00." * 20, b"PK\x03\x04" * 20,
        header({"a": one()}, b"\0" * 4, declared=1 << 40),
        header({"a": one()}, b"\0" * 4, declared=(1 << 64) - 1),
        header({"a": one(), "b": one()}, b"\0" * 4),
        header({"a": one(offsets=(0, 4)), "b": one(offsets=(2, 6))}, b"\0" * 6),
        header({"a": one(offsets=(4, 8))}, b"\0" * 8),
        header({"a": one(offsets=(0, 400))}, b"\0" * 4),
        header({"a": one(shape=[1 << 62, 4], offsets=(0, 4))}, b"\0" * 4),
        header({"a": one(shape=[0, (1 << 64) - 1], offsets=(0, 0))}),
        header({"a": one(shape=[0, 1 << 62, 8], offsets=(0, 0))}),
        header({"a": one(shape=[-1])}, b"\0" * 4),
        header({"a": one(dtype="F8_E8M0", offsets=(0, 1))}, b"\0"),
        header({"a": one(dtype="OBJECT")}, b"\0" * 4),
        header(b'{"a":' * 10**5), header(b"[]"), header({"a": one()}, b"\0" * 3),
    ],
    ids=[
        "empty", "pickle", "renamed pickle", "zip", "1 TB header", "2^64 header", "same offsets",
        "overlap", "gap", "beyond the end", "huge shape", "2^64 shape", "stride overflow",
        "negative shape", "unknown dtype", "no dtype", "deep", "list", "short",
    ],
)  # fmt: skip
def test_a_tensor_file_of_a_stranger_is_refused(data):
    with pytest.raises(ValueError, match="must be a safetensors file"):
        from_safetensors(data)


def test_the_library_writes_the_same_file():
    from safetensors.torch import save

    tensors = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int64), "c": torch.tensor(True)}
    ours = b"".join(to_safetensors(tensors))
    theirs = save(tensors)
    assert {name: t.tolist() for name, t in from_safetensors(theirs).items()} == {
        name: t.tolist() for name, t in from_safetensors(ours).items()
    }
    start = 8 + int.from_bytes(ours[:8], "little")
    assert start % 8 == 0 and len(ours) == len(theirs)
