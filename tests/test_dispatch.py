"""Which implementation runs, what is said when one cannot, and how a library is opened."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import trm_fast
from trm_fast import BackendError, _dispatch, _native, use_backend
from trm_fast._dispatch import OPS, Op, named_backend
from trm_fast.ops import Settings, adaptive_step_

ROOT = Path(__file__).parents[1]
BUILT = _native.path("cpp").exists()
needs_library = pytest.mark.skipif(not BUILT, reason="needs _cpu.so, made by `make build`")


def call(dtype: torch.dtype = torch.float32, backend: str | None = None) -> None:
    tensors = [[torch.ones(3, dtype=dtype)] for _ in range(4)]
    adaptive_step_(*tensors, [torch.zeros(())], settings=Settings(1e-3), backend=backend)


def found_by(program: str, folder: Path = ROOT, **variables: str) -> dict:
    """Runs ``program`` on the package in ``folder`` and returns its dict ``found``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRM_FAST", "TRITON"))}
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", f"import json\n{program}\nprint(json.dumps(found))"]
    env = kept | {"PYTHONPATH": path} | variables
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_use_backend_names_and_restores():
    before = named_backend()
    with use_backend("reference"):
        assert named_backend() == "reference"
    assert named_backend() == before


def test_use_backend_nests():
    with use_backend("cpp"):
        with use_backend("reference"):
            assert named_backend() == "reference"
        assert named_backend() == "cpp"


def test_use_backend_none_returns_to_the_order_of_preference():
    with use_backend("cpp"), use_backend(None):
        assert named_backend() is None


def test_use_backend_restores_after_an_exception():
    before = named_backend()
    with pytest.raises(KeyError), use_backend("reference"), use_backend("cpp"):
        raise KeyError
    assert named_backend() == before


def test_one_use_backend_may_be_entered_twice():
    twice, before = use_backend("reference"), named_backend()
    with twice, use_backend("cpp"):
        with twice:
            assert named_backend() == "reference"
        assert named_backend() == "cpp"
    assert named_backend() == before


def test_use_backend_changes_nothing_before_it_is_entered():
    before = named_backend()
    use_backend("reference")
    assert named_backend() == before


@pytest.mark.parametrize(
    ("name", "near"), [("tritn", "triton"), ("refrence", "reference"), ("cudaa", "cuda")]
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, near):
    with pytest.raises(
        BackendError,
        match=f"one of reference, cpp, cuda, triton; got '{name}'; did you mean '{near}'",
    ):
        use_backend(name)


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(BackendError, match=r"got 'xyzzy'$"):
        use_backend("xyzzy")


def test_the_backend_argument_goes_before_the_block():
    step = OPS["adaptive_step"]
    with use_backend("cuda"):
        assert step.choose("cpu", frozenset({torch.float32}), "reference").backend == "reference"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_named_backend_binds_on_the_wrong_device(device_type):
    name = {"cpu": "cuda", "cuda": "cpp"}[device_type]
    words = f"'{name}' cannot run: runs on .* tensors only; got {device_type}"
    with pytest.raises(BackendError, match=words):
        OPS["adaptive_step"].choose(device_type, frozenset({torch.float32}), name)


def test_cuda_named_for_cpu_tensors_is_refused_at_the_call():
    with pytest.raises(
        BackendError, match="adaptive_step: the named backend 'cuda' cannot run: runs on CUDA"
    ):
        call(backend="cuda")


def test_a_backend_named_by_a_block_binds_too():
    with use_backend("cuda"), pytest.raises(BackendError, match="'cuda' cannot run"):
        call()


def test_a_refused_call_is_refused_again():
    for _ in range(2):
        with pytest.raises(BackendError):
            call(backend="cuda")


@needs_library
def test_float64_runs_on_the_reference_and_is_listed():
    call(torch.float64)
    fallbacks = trm_fast.backends()["adaptive_step"]["fallbacks"]
    key = next(k for k in fallbacks if k.startswith("cpu") and "float64" in k)
    assert key.endswith("ran on reference")
    assert re.search(r"cpp: runs float32.*got float64", fallbacks[key])


def warnings_of(function, *arguments, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **options)
    told = [str(warning.message) for warning in caught]
    return [text for text in told if text.startswith("trm_fast")]  # torch has warnings of its own


@needs_library
def test_the_slow_path_is_told_once_with_its_reason():
    (told,) = warnings_of(call, torch.float64)
    assert "adaptive_step runs on the reference (the official filter" in told
    assert "docs/performance.md): cpp: runs float32" in told
    OPS["adaptive_step"].choices.clear()
    assert not warnings_of(call, torch.float64)


def test_nothing_is_told_where_the_reference_is_named():
    assert not warnings_of(call, torch.float64, backend="reference")
    with use_backend("reference"):
        assert not warnings_of(layer_by_layer)


def test_a_transform_is_told_as_the_reason():
    x = torch.ones(2, 8)
    (told,) = warnings_of(torch.func.jvp, trm_fast.ops.rms_norm_residual, (x,), (x,))
    assert "runs outside of torch.func" in told


def layer_by_layer(**options):
    x = torch.ones(1, 3, 32)
    net = trm_fast.nn.Blocks(32, 1, heads=2)
    return trm_fast.nn.Recursion(net, n=1, T=1, **options or {"detach": True})(x, x, x)


SLOW = {
    "option": (layer_by_layer, "detach is no option of the fused form"),
    "taps": (lambda: layer_by_layer(taps=[]), "there are taps"),
    "vectors": (
        lambda: trm_fast.nn.Recursion(trm_fast.nn.VectorNet(32), n=1, T=1)(*torch.ones(3, 2, 32)),
        "step_scale is not given as numbers",
    ),
}


@pytest.mark.parametrize("case", SLOW)
def test_layers_one_by_one_are_told_and_refused_by_strict_mode(monkeypatch, case):
    run, reason = SLOW[case]
    assert any("layer by layer" in told and reason in told for told in warnings_of(run))
    monkeypatch.setattr(_dispatch, "_strict", True)
    with pytest.raises(BackendError, match=f"TRM_FAST_STRICT=1 and .* layer by layer: {reason}"):
        run()


@needs_library
def test_the_library_goes_before_the_reference():
    with use_backend(None):
        chosen = OPS["adaptive_step"].choose("cpu", frozenset({torch.float32}))
        states = trm_fast.backends()["adaptive_step"]["cpu"]
    assert (chosen.backend, chosen.skipped, states["cpp"]) == ("cpp", (), "chosen")


def test_backends_shows_the_named_one_as_chosen():
    with use_backend("reference"):
        assert trm_fast.backends()["adaptive_step"]["cpu"]["reference"] == "chosen"


def test_backends_says_why_a_backend_cannot_run():
    states = trm_fast.backends()["adaptive_step"]
    assert states["cpu"]["cuda"] == "runs on CUDA tensors only; got cpu"
    assert states["cuda"]["cpp"] == "runs on CPU tensors only; got cuda"


def an_op(monkeypatch: pytest.MonkeyPatch, refuses, **implementations) -> Op:
    monkeypatch.setattr(_dispatch, "OPS", {})
    return Op("toy", implementations, refuses, lambda *_: {}, order={"cpu": tuple(implementations)})


def test_an_op_without_an_implementation_says_so(monkeypatch):
    op = an_op(monkeypatch, lambda *_: None, reference=print)
    with pytest.raises(BackendError, match="'cpp' cannot run: toy has no cpp implementation"):
        op.choose("cpu", frozenset(), "cpp")


def test_reasons_of_the_skipped_are_kept_in_order(monkeypatch):
    def refuses(backend, dtypes):
        return None if backend == "reference" else f"no {backend}"

    monkeypatch.setattr(_dispatch, "unusable", lambda *_: None)
    op = an_op(monkeypatch, refuses, cuda=print, cpp=print, reference=repr)
    choice = op.choose("cpu", frozenset())
    assert choice.run is repr
    assert choice.skipped == (("cuda", "no cuda"), ("cpp", "no cpp"))


def test_when_nothing_runs_every_reason_is_given(monkeypatch):
    op = an_op(monkeypatch, lambda backend, _: f"not {backend}", reference=print)
    with pytest.raises(BackendError, match=r"toy: no implementation runs on cpu: .*not reference"):
        op.choose("cpu", frozenset())


def test_an_implementation_named_by_module_is_imported_when_it_is_chosen(monkeypatch):
    sys.modules.pop("this", None)
    op = an_op(monkeypatch, lambda *_: None, reference="colorsys:rgb_to_hsv")
    assert op.choose("cpu", frozenset()).run.__name__ == "rgb_to_hsv"


def test_a_choice_is_made_once(monkeypatch):
    asked = []
    op = an_op(monkeypatch, lambda *a: asked.append(a), reference=print)
    assert op.choose("cpu", frozenset()) is op.choose("cpu", frozenset())
    assert len(asked) == 1


def test_an_unknown_device_type_runs_on_the_reference():
    assert OPS["adaptive_step"].choose("xpu", frozenset({torch.float32})).backend == "reference"


ENVIRONMENT = """
import torch, trm_fast
from trm_fast.ops import Settings, adaptive_step_

def message(dtype):
    tensors = [[torch.ones(3, dtype=dtype)] for _ in range(4)]
    try:
        adaptive_step_(*tensors, [torch.zeros(())], settings=Settings(1e-3))
    except trm_fast.BackendError as error:
        return str(error)

found = {"named": message(torch.float32)}
with trm_fast.use_backend(None):
    found |= {"strict": message(torch.float64), "preferred": message(torch.float32)}
"""


@pytest.fixture(scope="module")
def environment() -> dict:
    """What calls say where the environment names a backend and is strict."""
    return found_by(ENVIRONMENT, TRM_FAST_BACKEND="cuda", TRM_FAST_STRICT="1")


def test_the_environment_names_a_backend(environment):
    words = "adaptive_step: the named backend 'cuda' cannot run: runs on CUDA tensors only"
    assert environment["named"].startswith(words)


@needs_library
def test_strict_refuses_what_would_fall_back(environment):
    words = "adaptive_step: TRM_FAST_STRICT=1 and cpp cannot run: runs float32"
    assert environment["strict"].startswith(words)


@needs_library
def test_strict_lets_the_preferred_backend_run(environment):
    assert environment["preferred"] is None


def test_strict_lets_a_named_backend_run(monkeypatch):
    monkeypatch.setattr(_dispatch, "_strict", True)
    call(torch.float64, backend="reference")


def test_an_unknown_name_in_the_environment_is_refused_by_its_variable(monkeypatch):
    monkeypatch.setenv("TRM_FAST_BACKEND", "trition")
    words = "TRM_FAST_BACKEND must be one of .*; got 'trition'; did you mean 'triton'?"
    with pytest.raises(BackendError, match=words):
        _dispatch._named_in_environment()


def test_triton_without_its_interpreter_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = _dispatch._triton_unusable.__wrapped__("cpu")
    assert reason.startswith("needs a CUDA tensor, or TRITON_INTERPRET=1")


def test_triton_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(_dispatch, "find_spec", lambda name: None)
    assert _dispatch._triton_unusable.__wrapped__("cuda") == "the package triton is not installed"


@pytest.mark.parametrize(
    ("available", "hip", "capability", "reason"),
    [
        (False, None, (9, 0), "torch finds no CUDA device"),
        (True, "6.2", (9, 0), "needs an NVIDIA GPU; this torch is built for ROCm"),
        (True, None, (7, 5), "needs compute capability 8.0 or higher; got 7.5"),
        (True, None, (8, 0), None),
        (True, None, (10, 0), None),
    ],
)
def test_a_gpu_that_is_missing_or_too_old_is_named(monkeypatch, available, hip, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "hip", hip)
    capabilities = {0: (9, 0), 1: capability}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert _dispatch._gpu_unusable.__wrapped__() == reason


@pytest.mark.parametrize(
    ("built_for", "capability", "usable"),
    [
        ("8.0_9.0_10.0+PTX", (8, 0), True),
        ("8.0_9.0_10.0+PTX", (8, 9), True),
        ("8.0_9.0_10.0+PTX", (9, 0), True),
        ("8.0_9.0_10.0+PTX", (12, 0), True),
        ("8.0_9.0", (10, 0), False),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("8.0+PTX", (9, 0), True),
        ("Hopper", (9, 0), True),
    ],
)
def test_cuda_is_usable_on_what_its_library_was_built_for(
    monkeypatch, built_for, capability, usable
):
    monkeypatch.setattr(torch.ops.trm_fast, "_cuda_architectures", lambda: built_for)
    reason = _native.gpu_unusable(capability)
    assert (reason is None) is usable
    got = f"{capability[0]}.{capability[1]}"
    assert usable or f"got {got}: rebuild it with TRM_FAST_CUDA=1" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_nothing_is_chosen_for_a_device_that_is_not_there():
    for states in (devices["cuda"] for devices in trm_fast.backends().values()):
        assert "chosen" not in states.values()
        assert states["reference"] == "torch finds no CUDA device"


def reason_for(backend: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Opens ``library`` anew in the place of that of ``backend``."""
    monkeypatch.setattr(_native, "path", lambda _: library)
    return _native.unusable.__wrapped__(backend)


@pytest.mark.parametrize(("backend", "switch"), [("cpp", "CPU"), ("cuda", "CUDA")])
def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path, backend, switch):
    reason = reason_for(backend, tmp_path / "_x.so", monkeypatch)
    assert reason.startswith(f"_x.so is not built: build it with TRM_FAST_{switch}=1 pip install")


def test_a_broken_library_gives_a_reason(monkeypatch, tmp_path):
    (tmp_path / "_x.so").write_bytes(b"not a library")
    reason = reason_for("cpp", tmp_path / "_x.so", monkeypatch)
    assert reason.startswith("_x.so cannot be opened: ")


@needs_library
def test_a_library_of_another_revision_is_refused(monkeypatch):
    library, built_for = _native.path("cpp"), _native.REVISION
    monkeypatch.setattr(_native, "REVISION", 999)
    reason = reason_for("cpp", library, monkeypatch)
    expected = f"_cpu.so has revision {built_for}, this source needs 999: rebuild it with TRM_FAST"
    assert reason.startswith(expected)


WITHOUT_LIBRARY = """
import torch, trm_fast
from trm_fast.ops import Settings, adaptive_step_

tensors = [[torch.ones(3)] for _ in range(4)]
adaptive_step_(*tensors, [torch.zeros(())], settings=Settings(1e-3))
found = {"from": trm_fast.__file__, "states": trm_fast.backends()["adaptive_step"]}
"""


def test_without_a_library_the_reference_runs_and_is_listed(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "trm_fast", tmp_path / "trm_fast", ignore=ignored)
    found = found_by(WITHOUT_LIBRARY, tmp_path)
    assert found["from"].startswith(str(tmp_path))
    assert found["states"]["cpu"]["reference"] == "chosen"
    fallback = found["states"]["fallbacks"]["cpu float32 ran on reference"]
    assert fallback.startswith("cpp: _cpu.so is not built")


def test_the_header_and_the_source_have_one_revision():
    header = (ROOT / "csrc/common/revision.h").read_text()
    assert re.findall(r"kRevision = (\d+);", header) == [str(_native.REVISION)]


@needs_library
def test_the_built_library_reports_the_revision():
    assert _native.unusable("cpp") is None
    assert torch.ops.trm_fast._cpu_revision() == _native.REVISION


@pytest.mark.skipif(not _native.path("cuda").exists(), reason="needs _cuda.so")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_built_cuda_library_reports_the_revision():
    assert _native.unusable("cuda") is None
    assert torch.ops.trm_fast._cuda_revision() == _native.REVISION


@pytest.fixture
def conftest(request: pytest.FixtureRequest) -> ModuleType:
    return request.config.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py"))


def test_an_expected_backend_that_is_missing_fails_the_suite(monkeypatch, conftest):
    """Not a skip: the lane that promises a backend would otherwise pass without it."""
    monkeypatch.setattr(_dispatch, "unusable", lambda *_: "it is broken")
    monkeypatch.setattr(conftest, "EXPECTED", {"cpp"})
    with pytest.raises(pytest.fail.Exception, match="names cpp, but it cannot run: it is broken"):
        conftest.skip_unless_usable("cpp")


def test_another_backend_that_is_missing_skips_with_its_reason(monkeypatch, conftest):
    monkeypatch.setattr(_dispatch, "unusable", lambda *_: "it is broken")
    monkeypatch.setattr(conftest, "EXPECTED", {"cpp"})
    with pytest.raises(pytest.skip.Exception, match="triton: it is broken"):
        conftest.skip_unless_usable("triton")


def test_an_unknown_expected_backend_is_refused(monkeypatch, conftest, request):
    monkeypatch.setattr(conftest, "EXPECTED", {"cp"})
    with pytest.raises(pytest.UsageError, match=r"TRM_FAST_EXPECT must list reference.*; got cp"):
        conftest.pytest_configure(request.config)
