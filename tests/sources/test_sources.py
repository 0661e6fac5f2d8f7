"""Sources: seeded defaults, live modules, factories; nothing global is touched and every refusal says what to do."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sam3.model.encoder import TransformerEncoderFusion
from sam3.model_builder import _create_transformer_encoder
from torch import nn

from sam3x.errors import SourceError
from sam3x.fusion.config import FusionConfig
from sam3x.sources.encoder import Source, build_encoder, default_source, factory_source, module_source, weights_hash
from sam3x.sources.image import random_image_source
from sam3x.spec import make_spec
from support.image_model import TINY, write_vocabulary

SMALL = FusionConfig(d_model=16, num_layers=2, dim_feedforward=24)


@pytest.fixture(scope="module")
def default() -> Source:
    return default_source(0)


def test_default_is_metas_own_encoder(default: Source) -> None:
    with torch.random.fork_rng(devices=[]):
        upstream = _create_transformer_encoder()
    encoder = default.module
    assert type(encoder) is TransformerEncoderFusion and default.config == FusionConfig()
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    assert shapes == {name: value.shape for name, value in upstream.state_dict().items()}
    assert sum(p.numel() for p in encoder.parameters()) == 9_472_512 == sum(p.numel() for p in upstream.parameters())
    plain = (int, float, bool, str, type(None))
    for (name, ours), theirs in zip(encoder.named_modules(), upstream.modules(), strict=True):
        assert type(ours) is type(theirs)
        own = {k: v for k, v in vars(ours).items() if isinstance(v, plain) and k != "training"}
        assert own == {k: v for k, v in vars(theirs).items() if isinstance(v, plain) and k != "training"}, name
    assert not any(child.training for child in encoder.modules())
    assert default.origin == "random weights, seed 0, SAM3 hyper-parameters"


def test_default_weights_differ_in_every_layer_and_are_of_unit_scale(default: Source) -> None:
    layers = [dict(layer.named_parameters()) for layer in default.module.layers]
    for one, other in itertools.combinations(layers, 2):
        assert not any(torch.equal(one[name], other[name]) for name in one)
    for name, value in default.module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert abs(float(value.mean()) - 1) < 0.05 and 0.05 < float(value.std()) < 0.2
        elif value.dim() == 2:
            assert float(value.std()) * value.shape[1] ** 0.5 == pytest.approx(1, rel=0.02)
        else:
            assert name.endswith("bias") and bool((value != 0).all()) and float(value.std()) < 0.2


def test_default_is_reproducible_and_leaves_global_state_alone(default: Source) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = default_source(0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert again.weights_sha256 == default.weights_sha256 == weights_hash(default.module)
    assert default_source(1).weights_sha256 != default.weights_sha256


def test_default_ignores_the_default_dtype(default: Source) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert default_source(0).weights_sha256 == default.weights_sha256
    finally:
        torch.set_default_dtype(torch.float32)


def test_first_import_of_upstream_is_silent() -> None:
    code = (
        "import random, numpy, torch\n"
        "before = (random.getstate(), numpy.random.get_state()[1].tobytes(), torch.random.get_rng_state().numpy().tobytes())\n"
        "from sam3x.sources.encoder import default_source\n"
        "default_source(0)\n"
        "after = (random.getstate(), numpy.random.get_state()[1].tobytes(), torch.random.get_rng_state().numpy().tobytes())\n"
        "raise SystemExit(0 if before == after else 7)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert "Warning" not in run.stderr


def test_config_needs_no_torch() -> None:
    code = "import sys, sam3x.fusion.config; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sam3.model.encoder", None)
    with pytest.raises(
        SourceError, match=r'^step 1/4 source: Meta\'s sam3 package .*Install it: pip install "sam3x\[sam3\]"\.$'
    ):
        build_encoder(SMALL)


def test_meta_device_allocates_nothing() -> None:
    encoder = build_encoder(FusionConfig(d_model=65536, num_layers=2, dim_feedforward=262144), device="meta")
    assert all(value.is_meta for value in encoder.state_dict().values())


def test_module_source_keeps_the_module_as_it_is() -> None:
    encoder = build_encoder(SMALL).train()
    source = module_source(encoder, "mine")
    assert source.module is encoder and encoder.training and source.config is None and source.origin == "mine"
    layers = list(encoder.layers)
    of_list = module_source(layers, "list of 2 layers")
    assert [a is b for a, b in zip(of_list.module, layers, strict=True)] == [True, True]


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.ModuleList(), nn.Sequential(nn.Linear(2, 2))])
def test_modules_that_are_no_fusion_encoder(module: nn.Module) -> None:
    with pytest.raises(SourceError, match=r"^step 1/4 source: "):
        module_source(module, "mine")


def test_hash_sees_names_dtypes_shapes_and_bytes() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        holder = nn.Module()
        for name, value in tensors.items():
            holder.register_buffer(name, value)
        return weights_hash(holder)

    x = torch.arange(6.0)
    variants = [dict(a=x), dict(b=x), dict(a=x.view(2, 3)), dict(a=x.double()), dict(a=x.view(torch.int32)), dict(a=x + 1)]
    assert len({digest(**variant) for variant in variants}) == len(variants)
    assert digest(a=x, b=x + 1) == digest(b=x + 1, a=x)
    assert digest(a=x.view(2, 3).t()) == digest(a=x.view(2, 3).t().contiguous()) != digest(a=x.view(3, 2))
    many = torch.randn(5_000_000)  # more than one chunk
    assert digest(a=many) == digest(a=many.clone()) != digest(a=torch.cat((many[:-1], many[:1])))
    kinds = (torch.float16, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn)
    assert len({digest(a=x.to(kind)) for kind in kinds} | {digest(a=torch.tensor(1.0)), digest(a=torch.empty(0, 3))}) == 7
    assert digest(a=x.to(torch.complex64).conj()) == digest(a=x.to(torch.complex64).conj().resolve_conj())


def test_hash_needs_values() -> None:
    with pytest.raises(SourceError, match=r"'layers\.0\..*' is on meta and has no values"):
        module_source(build_encoder(SMALL, device="meta"), "mine")


FACTORIES = """
import torch
from sam3x.fusion.config import FusionConfig
from sam3x.sources.encoder import build_encoder

CONSTANT = 3

def encoder():
    print("building")
    return build_encoder(FusionConfig(d_model=16, num_layers=2, dim_feedforward=24))

def layers():
    return tuple(encoder().layers)

class Zoo:
    @staticmethod
    def layer():
        return encoder().layers[0]

INSTANCE = encoder()

def raises():
    raise ValueError("no weights\\nhere")

def leaves():
    raise SystemExit(3)

def needs(path):
    return path

def number():
    return 3

def linear():
    return torch.nn.Linear(2, 2)

def empty():
    return []

def dependency():
    import no_such_dependency
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory with a module of factories; imports of it are forgotten afterwards."""
    (tmp_path / "zoo_models.py").write_text(FACTORIES)
    (tmp_path / "zoo_broken.py").write_text("import zoo_absent_dependency\n")
    (tmp_path / "zoo_syntax.py").write_text("def f(:\n")
    (tmp_path / "zoo_pkg").mkdir()
    (tmp_path / "zoo_pkg" / "__init__.py").write_text("")
    (tmp_path / "zoo_pkg" / "inner.py").write_text("from zoo_models import encoder\nfrom zoo_pkg import nothing_here\n")
    (tmp_path / "zoo_pkg" / "good.py").write_text("from zoo_models import encoder\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("zoo_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("zoo_models:encoder", 2),
        ("zoo_models:layers", 2),
        ("zoo_models:Zoo.layer", 1),
        ("zoo_models:INSTANCE", 2),
        ("zoo_pkg.good:encoder", 2),
    ],
)
def test_factories(here: Path, capsys: pytest.CaptureFixture[str], name: str, count: int) -> None:
    from sam3x.fusion.encoder import layers_of

    source = factory_source(name)
    assert len(layers_of(source.module)) == count and source.origin == f"module {name}" and source.config is None
    assert source.weights_sha256 == weights_hash(source.module)
    captured = capsys.readouterr()
    assert captured.out == "" and "building" in captured.err


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("zoo_models", "is not of the form package.module:factory"),
        ("zoo_models:", "is not of the form"),
        (":encoder", "is not of the form"),
        ("", "is not of the form"),
        ("zoo_models.py:encoder:x", "is not of the form"),
        ("./zoo_models.py:encoder", "is not of the form"),
        (".zoo_models:encoder", "is not of the form"),
        ("zoo_absent:encoder", "names no module: No module named 'zoo_absent'"),
        ("zoo_absent.sub:encoder", "names no module: No module named 'zoo_absent'"),
        ("zoo_pkg.absent:encoder", "names no module: No module named 'zoo_pkg.absent'"),
        ("zoo_models.py:encoder", "names no module: No module named 'zoo_models.py'"),
        ("zoo_broken:encoder", "was found, but zoo_broken imports something missing: No module named 'zoo_absent_dependency'"),
        (
            "zoo_pkg.inner:encoder",
            "was found, but importing zoo_pkg.inner raised ImportError: cannot import name 'nothing_here'",
        ),
        ("zoo_syntax:encoder", "was found, but importing zoo_syntax raised SyntaxError"),
        ("zoo_models:encodr", "has no 'encodr'. It has: FusionConfig, build_encoder, encoder"),
        ("zoo_models:CONSTANT", "is of type int, not a function"),
        ("zoo_models:raises", "raised ValueError: no weights when called with no arguments"),
        ("zoo_models:leaves", "raised SystemExit: 3"),
        ("zoo_models:needs", "raised TypeError: needs() missing 1 required positional argument: 'path'"),
        ("zoo_models:dependency", "raised ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("zoo_models:number", "returned int. Return an nn.Module or a list of layers"),
        ("zoo_models:linear", "Linear is no fusion encoder"),
        ("zoo_models:empty", "the encoder has no layers"),
    ],
)
def test_factory_refusals(here: Path, name: str, fact: str) -> None:
    with pytest.raises(SourceError) as caught:
        factory_source(name)
    message = str(caught.value)
    assert message.startswith("step 1/4 source: ") and "\n" not in message and message.endswith(".")
    assert fact in message


def test_the_vocabulary_of_the_installed_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has one, for a text encoder of its size; Meta's wheel has none."""
    import sam3

    whole = random_image_source(TINY.model_copy(update={"vocab_size": 49408}))
    assert whole(make_spec()).tokenizer is None
    (tmp_path / "assets").mkdir()
    vocabulary = write_vocabulary(tmp_path / "assets" / "bpe_simple_vocab_16e6.txt.gz")
    monkeypatch.setattr(sam3.__spec__, "submodule_search_locations", [str(tmp_path)])
    assert whole(make_spec()).tokenizer == vocabulary
    assert random_image_source(TINY)(make_spec()).tokenizer is None
