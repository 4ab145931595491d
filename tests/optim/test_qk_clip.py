"""QKClip against the attention logits, written again head by head in float64."""

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast import GrokFastAdamW
from trm_fast.optim.attention_logits import max_logits
from trm_fast.optim.qk_clip import QKClip, QKRows

from .qk_checks import DIM, EPS, HEADS, randn, true_max

needs_gpu = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")
WIDTH = 10


# Clipping


class Attention(nn.Module):
    """Only what makes the logits; ``turn`` rotates pairs of dimensions, as rotary positions do."""

    def __init__(self, kv_heads: int = HEADS, bias: bool = True, turn: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM, bias=bias, dtype=torch.float64)
        self.k = nn.Linear(WIDTH, kv_heads * DIM, bias=bias, dtype=torch.float64)
        self.turn = turn
        self.report: Callable[[Tensor], None] | None = None
        for i, param in enumerate(self.parameters()):
            param.data = randn(*param.shape, seed=10 + i)

    def qk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (self.q, self.k))
        return (rotated(q), rotated(k)) if self.turn else (q, k)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x)
        if self.report is not None and self.training:
            self.report(max_logits(q, k))
        return q

    def true_max(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return true_max(*self.qk(x), DIM**-0.5)


def rotated(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / torch.arange(1, DIM // 2 + 1)
    first, second = x.chunk(2, -1)
    parts = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(parts, -1)


def watched(layer: Attention, threshold: float, **options: Any) -> QKClip:
    clip = QKClip(threshold)
    kv_heads = layer.k.out_features // DIM
    layer.report = clip.watch(layer.q, layer.k, heads=HEADS, kv_heads=kv_heads, **options)
    return clip


def between(largest: Tensor) -> float:
    """A threshold that clips half of the heads."""
    return float(largest.median() + largest.sort().values[len(largest) // 2]) / 2


# The maximum, gamma, its root and two scalings are each rounded to float32, so a logit of a clipped
# head is off by at most 5 half ulps, relative to itself.
TOLERANCE = 2.5 * EPS
X = randn(2, 8, WIDTH, seed=5)


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("turn", [False, True], ids=["plain", "rotary"])
def test_clipped_heads_reach_the_threshold_and_no_other_changes(
    kv_heads: int, bias: bool, turn: bool
) -> None:
    layer = Attention(kv_heads, bias, turn)
    before, largest = deepcopy(layer), layer.true_max(X)
    threshold = between(largest)
    clip = watched(layer, threshold)
    layer(X)
    clip.step()
    clipped = largest > threshold
    assert clipped.sum() == HEADS // 2
    after = layer.true_max(X)
    assert (after[clipped] / threshold - 1).abs().max() <= TOLERANCE
    rows = clipped.repeat_interleave(DIM)
    for name, param in layer.named_parameters():
        old = before.get_parameter(name)
        if name[0] == "q" or kv_heads == HEADS:
            assert torch.equal(param[~rows], old[~rows]) and not torch.equal(param, old)
        else:
            assert torch.equal(param, old)


def test_all_logits_of_a_clipped_head_shrink_by_one_factor() -> None:
    layer = Attention()
    q, k = (part.detach() for part in layer.qk(X))
    largest = layer.true_max(X)
    clip = watched(layer, 0.5 * largest.min().item())
    layer(X)
    clip.step()
    gamma = (clip.threshold / largest).view(1, -1, 1, 1)
    new_q, new_k = (part.detach() for part in layer.qk(X))
    wanted = q @ k.transpose(-1, -2) * gamma
    error = (new_q @ new_k.transpose(-1, -2) - wanted).abs()
    assert (error <= TOLERANCE * (q.abs() @ k.abs().transpose(-1, -2)) * gamma).all()


def test_parts_of_fused_projections_are_scaled_and_nothing_else() -> None:
    layer, fused = Attention(), nn.Linear(WIDTH, 3 * HEADS * DIM, dtype=torch.float64)
    rows = HEADS * DIM
    fused.weight.data = torch.cat([randn(rows, WIDTH), layer.k.weight.data, layer.q.weight.data])
    fused.bias.data = torch.cat([randn(rows), layer.k.bias.data, layer.q.bias.data])
    before = deepcopy(fused)
    threshold = between(layer.true_max(X))
    clips = [watched(layer, threshold), QKClip(threshold)]
    report = clips[1].watch(QKRows(fused, 2 * rows), QKRows(fused, rows, rows), heads=HEADS)
    report(max_logits(*layer.qk(X)))
    layer(X)
    for clip in clips:
        clip.step()
    for name in ("weight", "bias"):
        found, old = getattr(fused, name), getattr(before, name)
        assert torch.equal(found[:rows], old[:rows])
        assert torch.equal(found[rows : 2 * rows], getattr(layer.k, name))
        assert torch.equal(found[2 * rows :], getattr(layer.q, name))


def test_multihead_attention_of_torch_can_be_watched() -> None:
    layer = nn.MultiheadAttention(HEADS * DIM, HEADS)
    before = deepcopy(layer.in_proj_weight)
    clip, rows = QKClip(1.0), HEADS * DIM
    fused = (layer.in_proj_weight, layer.in_proj_bias)
    clip.watch(QKRows(fused, 0, rows), QKRows(fused, rows, rows), heads=HEADS)(
        torch.tensor([0.5, 4.0, 0.5, 0.5])
    )
    clip.step()
    head = [*range(DIM, 2 * DIM), *range(rows + DIM, rows + 2 * DIM)]
    before.data[head] *= 0.5  # the root of 1 / 4
    assert torch.equal(layer.in_proj_weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_rounded_once_to_their_dtype(dtype: torch.dtype) -> None:
    layer = nn.Linear(WIDTH, HEADS * DIM, dtype=dtype)
    other = deepcopy(layer)
    truth = layer.weight.double() * 3**-0.5
    clip = QKClip(1.0)
    clip.watch(layer, other, heads=HEADS)(torch.full((HEADS,), 3.0))
    clip.step()
    # The factor has three roundings in float32, the product one more and one in the own dtype.
    bound = (4 * EPS + torch.finfo(dtype).eps / 2) * truth.abs()
    assert ((layer.weight.double() - truth).abs() <= bound).all()


def test_largest_logit_of_all_passes_counts() -> None:
    first, second = Attention(), Attention()
    inputs = [X, 2 * X, 0.5 * X]
    largest = torch.stack([first.true_max(x) for x in inputs]).amax(0)
    clips = [watched(layer, between(largest)) for layer in (first, second)]
    for x in inputs:
        first(x)
    second.report(largest)
    for clip in clips:
        clip.step()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_layers_are_clipped_on_their_own() -> None:
    clip, layers = QKClip(1.0), [Attention(), Attention()]
    for layer, logit in zip(layers, (4.0, 0.5), strict=True):
        clip.watch(layer.q, layer.k, heads=HEADS)(torch.full((HEADS,), logit))
    clip.step()
    assert torch.equal(layers[0].q.weight, Attention().q.weight * 0.5)
    assert torch.equal(layers[1].q.weight, Attention().q.weight)


def test_each_step_starts_anew() -> None:
    layer = Attention()
    clip = watched(layer, between(layer.true_max(X)))
    layer(X)
    clip.step()
    before = deepcopy(layer)
    clip.step()
    layer.eval()(10 * X)  # does not report
    clip.step()
    for param, old in zip(layer.parameters(), before.parameters(), strict=True):
        assert torch.equal(param, old)


def test_reset_forgets_what_was_reported() -> None:
    layer = Attention()
    clip = watched(layer, 0.1)
    layer(X)
    clip.reset()
    clip.step()
    assert torch.equal(layer.q.weight, Attention().q.weight)


def test_keys_that_something_else_uses_are_left_alone() -> None:
    layers = [Attention(), Attention()]
    layers[1].k = layers[0].k
    clip = QKClip(1.0)
    for layer in layers:
        report = clip.watch(layer.q, layer.k, heads=HEADS, shared_keys=True)
        report(torch.full((HEADS,), 4.0))
    clip.step()
    assert torch.equal(layers[0].k.weight, Attention().k.weight)
    assert torch.equal(layers[1].q.weight, Attention().q.weight * 0.25)


def test_weights_are_looked_up_when_they_are_scaled() -> None:
    """fully_shard and others put new parameters into a module."""
    layer = Attention()
    clip = watched(layer, 1.0)
    layer.q.weight = nn.Parameter(layer.q.weight.detach().float())
    layer.report(torch.full((HEADS,), 4.0))
    clip.step()
    assert torch.equal(layer.q.weight, Attention().q.weight.float() * 0.5)


# Logits that say nothing


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_nonfinite_report_is_counted_and_hides_no_other(bad: float) -> None:
    layer = Attention()
    clip = watched(layer, 1.0)
    for second in (0.5, bad, 4.0, bad):
        layer.report(torch.tensor([0.5, second, 4.0, bad]))
    clip.step()
    factors = torch.tensor([1.0, 0.5, 0.5, 1.0]).repeat_interleave(DIM)[:, None]
    assert torch.equal(layer.q.weight, Attention().q.weight * factors)
    assert clip.nonfinite["attention0"].tolist() == [0, 2, 0, 4]


# With an optimizer


@pytest.mark.parametrize("found", [1.0, 2.0])
def test_skipped_step_clips_nothing_and_keeps_the_maximum(found: float) -> None:
    layer = Attention()
    clip = watched(layer, 1.0)
    layer.report(torch.full((HEADS,), 4.0))
    clip.step(torch.tensor(found))
    assert torch.equal(layer.q.weight, Attention().q.weight)
    assert not clip.clips["attention0"].any() and clip.last["attention0"].isneginf().all()
    clip.step(torch.tensor(0.0))
    assert torch.equal(layer.q.weight, Attention().q.weight * 0.5)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, GrokFastAdamW])
def test_attached_clip_follows_the_step(optimizer_type: Any, scaled: bool) -> None:
    """SGD is skipped by the scaler itself, GrokFastAdamW skips on found_inf."""
    layer, twin = Attention(), Attention()
    clip = watched(layer, 1.0)
    optimizers = [optimizer_type(model.parameters(), lr=0.1) for model in (layer, twin)]
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    handle = clip.attach(optimizers[0])
    for model, optimizer in zip((layer, twin), optimizers, strict=True):
        scaler.scale(model(X).sum()).backward()
        scaler.step(optimizer)
    for param, old in zip(layer.q.parameters(), twin.q.parameters(), strict=True):
        assert not torch.equal(param, old)
    clipped = clip.last["attention0"] > 1.0
    factor = torch.where(clipped, 1.0 / clip.last["attention0"], 1.0).sqrt()
    factor = factor.repeat_interleave(DIM)
    assert torch.equal(layer.q.weight, twin.q.weight * factor[:, None])
    assert torch.equal(layer.q.bias, twin.q.bias * factor)
    handle.remove()
    layer(X)
    optimizers[0].step()
    assert clip.clips["attention0"].max() == 1


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, GrokFastAdamW])
def test_attached_clip_is_skipped_with_the_step(optimizer_type: Any) -> None:
    layer = Attention()
    clip = watched(layer, 1.0)
    optimizer = optimizer_type(layer.parameters(), lr=0.1)
    clip.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(layer(X).sum() * torch.inf).backward()
    scaler.step(optimizer)
    assert torch.equal(layer.q.weight, Attention().q.weight)
    assert not clip.clips["attention0"].any()


# Logging and saving


def test_counts_and_last_maxima_are_listed_by_layer() -> None:
    clip, layers = QKClip(1.0), [Attention(), Attention()]
    reports = [
        clip.watch(layer.q, layer.k, heads=HEADS, name=name)
        for layer, name in zip(layers, ("first", "second"), strict=True)
    ]
    for logits in ([0.5, 2.0, 3.0, 0.5], [0.5, 4.0, 0.25, 0.5]):
        reports[0](torch.tensor(logits))
        clip.step()
    assert {name: counts.tolist() for name, counts in clip.clips.items()} == {
        "first": [0, 2, 1, 0],
        "second": [0, 0, 0, 0],
    }
    assert clip.last["first"].tolist() == [0.5, 4.0, 0.25, 0.5]
    assert clip.last["second"].isneginf().all()
    assert clip.clipped_heads.item() == 1


def test_saved_between_two_passes_and_resumed_equals_uninterrupted() -> None:
    models = [Attention(), Attention()]
    clips = [watched(model, 1.0) for model in models]
    models[0].report(torch.tensor([3.0, 0.5, 5.0, torch.nan]))
    buffer = io.BytesIO()
    torch.save(clips[0].state_dict(), buffer)
    clips[0].reset()  # what was saved is a copy
    clips[1].load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    models[1].report(torch.tensor([4.0, 0.5, 0.5, 0.5]))
    clips[1].step()
    assert clips[1].last["attention0"].tolist() == [4.0, 0.5, 5.0, 0.5]
    assert clips[1].nonfinite["attention0"].tolist() == [0, 0, 0, 1]


def test_saved_state_is_a_copy() -> None:
    layer = Attention()
    clip = watched(layer, 1.0)
    saved = clip.state_dict()
    before = deepcopy(saved)
    layer.report(torch.tensor([3.0, 0.5, 5.0, torch.nan]))
    clip.step()
    assert saved.keys() == before.keys() and saved["heads"] == before["heads"]
    assert all(torch.equal(saved[name], before[name]) for name in saved if name != "heads")


def test_state_of_other_layers_is_refused() -> None:
    clip = watched(Attention(), 1.0, name="first")
    other = watched(Attention(), 1.0, name="second")
    with pytest.raises(ValueError, match=r"state, \{'first': 4\}; got \{'second': 4\}"):
        other.load_state_dict(clip.state_dict())


def test_watching_more_layers_keeps_what_was_reported() -> None:
    layer, later = Attention(), Attention()
    clip = watched(layer, 1.0)
    layer.report(torch.full((HEADS,), 4.0))
    clip.watch(later.q, later.k, heads=HEADS)
    clip.step()
    assert torch.equal(layer.q.weight, Attention().q.weight * 0.5)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_model_reports_to_a_clip_of_its_own(copied: Callable[[Any], Any]) -> None:
    layer = Attention()
    clip = watched(layer, 1.0)
    twin = copied(layer)
    twin.report(torch.full((HEADS,), 4.0))
    clip.step()
    assert torch.equal(layer.q.weight, Attention().q.weight)
    twin.report.func.__self__.step()
    assert torch.equal(twin.q.weight, Attention().q.weight * 0.5)


def test_report_works_inside_a_compiled_module() -> None:
    layer, twin = Attention(), Attention()
    clips = [watched(model, between(layer.true_max(X))) for model in (layer, twin)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (X, 2 * X):
        compiled(x)
        twin(x)
    for clip in clips:
        clip.step()
    assert clips[0].clipped_heads > 0
    for param, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, expected)


# Refusals


@pytest.mark.parametrize("threshold", [0.0, -1.0, torch.nan, torch.inf], ids=str)
def test_wrong_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="QKClip: threshold must be finite and > 0; got"):
        QKClip(threshold)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 5}, "24 rows for 5 heads and 24 for 5"),
        ({"heads": 4, "kv_heads": 3}, "24 rows for 4 heads and 24 for 3"),
        ({"heads": 4, "kv_heads": 2}, "24 rows for 4 heads and 24 for 2"),
        ({"heads": 0}, "24 rows for 0 heads"),
        ({"heads": 4, "kv_heads": 2, "shared_keys": False}, "must be shared_keys"),
        ({"heads": 4, "name": "taken"}, "name must be new; got 'taken' again"),
    ],
    ids=str,
)
def test_wrong_heads_are_refused(options: dict[str, Any], text: str) -> None:
    clip = watched(Attention(), 1.0, name="taken")
    layer = Attention()
    with pytest.raises(ValueError, match=f"QKClip: .*{text}"):
        clip.watch(layer.q, layer.k, **options)
    assert list(clip.clips) == ["taken"]


def test_rows_outside_their_parameter_are_refused() -> None:
    layer = Attention()
    with pytest.raises(ValueError, match=r"rows must lie in \(24, 10\); got 6 to 30"):
        QKClip().watch(QKRows(layer.q, 6, 24), layer.k, heads=HEADS)


def test_rows_that_are_watched_already_are_refused() -> None:
    layer = Attention()
    clip = watched(layer, 1.0)
    with pytest.raises(ValueError, match="rows must be watched once; got 'attention1' with rows"):
        clip.watch(Attention().q, layer.k, heads=HEADS)


def test_queries_that_are_the_keys_are_refused() -> None:
    layer = Attention()
    with pytest.raises(ValueError, match="rows must be watched once; got 'attention0' with rows"):
        QKClip().watch(layer.q, layer.q, heads=HEADS)


def test_layers_may_be_different_rows_of_one_parameter() -> None:
    fused, rows = nn.Parameter(torch.ones(4 * DIM, 3)), DIM
    clip = QKClip(1.0)
    for i, logit in enumerate((4.0, 0.5)):
        q, k = QKRows(fused, 2 * i * rows, rows), QKRows(fused, (2 * i + 1) * rows, rows)
        clip.watch(q, k, heads=1)(torch.tensor([logit]))
    clip.step()
    assert fused[:, 0].tolist() == [0.5] * 2 * DIM + [1.0] * 2 * DIM


def test_computed_weights_are_refused() -> None:
    layer = Attention()
    nn.utils.parametrizations.weight_norm(layer.q)
    with pytest.raises(ValueError, match="must be parameters; got a computed Tensor"):
        QKClip().watch(layer.q, layer.k, heads=HEADS)


@pytest.mark.parametrize("shape", [(3,), (1, 4), ()], ids=str)
def test_report_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    layer = Attention()
    watched(layer, 1.0)
    with pytest.raises(ValueError, match=r"of 'attention0' must be of shape \(4,\); got"):
        layer.report(torch.ones(shape))


# On a GPU


@needs_gpu
def test_clip_follows_its_model_to_a_gpu_and_does_not_wait_for_it() -> None:
    layer = Attention()
    clip = watched(layer, 1.0)
    layer.cuda()
    layer(X.cuda())
    clip.step(torch.zeros((), device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.report(torch.full((HEADS,), 4.0, device="cuda"))
        clip.step(torch.zeros((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert clip.clipped_heads.item() == HEADS
