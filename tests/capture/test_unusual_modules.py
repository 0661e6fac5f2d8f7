"""Encoders as people have them: shared weights, autocast, torch.compile, wrappers, sizes read in every way Python has."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.capture.capture import capture
from sam3x.capture.program import run_program
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.errors import CaptureError, SourceError, SpecError
from sam3x.sources.encoder import module_source
from sam3x.spec import make_spec
from support.attention_styles import Matmul
from support.upstream import assert_equal_to_upstream, double, encoder_of

SIZES = Sizes(batch=4, tokens=18, prompt_length=7)
ONE_BRANCH: dict[str, Any] = {"dac": False, "pre_norm": "module"}
PLAIN: dict[str, Any] = {**ONE_BRANCH, "batch": SIZES.batch, "tokens": SIZES.tokens, "prompt_length": SIZES.prompt_length}
"""No flag and no dynamic size: traced in a third of the time."""


def captured_equals_upstream(encoder: nn.Module, reference: nn.Module, **options: Any) -> None:
    """The captured graph, and the eager definition in float64, against Meta's own layers."""
    spec = make_spec(**{**PLAIN, **options})
    captured = capture(encoder, spec)
    inputs = make_inputs(spec.inputs, spec, 32, SIZES, 1)
    flags = {name: torch.tensor(True) for name in ("dac", "pre_norm") if name in captured.input_names}
    branch: dict[str, Any] = {"dac": "dac" in flags, "pre_norm": True if "pre_norm" in flags else None}
    got = run_program(captured.program, {**inputs, **flags}, captured.output_names)["output"]
    assert_equal_to_upstream(got, reference.layers, inputs, **branch)
    exact = captured.eager({**double(inputs), **flags})["output"]
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), got, rtol=0, atol=2e-5)


# ---- weights that are shared


def of_two_layers(encoder: nn.Module) -> None:
    encoder.layers[1].linear1.weight = encoder.layers[0].linear1.weight


def of_two_attentions(encoder: nn.Module) -> None:
    for layer in encoder.layers:
        layer.cross_attn_image.out_proj.weight = layer.self_attn.out_proj.weight


def one_attention_twice(encoder: nn.Module) -> None:
    encoder.layers[0].cross_attn_image = encoder.layers[0].self_attn


def one_norm_twice(encoder: nn.Module) -> None:
    encoder.layers[0].norm2 = encoder.layers[0].norm1


def one_layer_twice(encoder: nn.Module) -> None:
    encoder.layers[1] = encoder.layers[0]


def the_same_memory(encoder: nn.Module) -> None:
    encoder.layers[1].linear1.weight = nn.Parameter(encoder.layers[0].linear1.weight.data)


def of_layer_and_encoder(encoder: nn.Module) -> None:
    encoder.register_parameter("also", encoder.layers[0].linear1.weight)


def one_rotary_module(encoder: nn.Module) -> None:
    for layer in encoder.layers:
        rotary = Rotary()
        layer.self_attn, layer.cross_attn_image = RotaryAttention(rotary), RotaryAttention(rotary)


class Rotary(nn.Module):
    """Pairs of channels turned by the position, with a buffer that no state dict holds."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, 8, 2) / 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * self.inv_freq
        left, right = x.chunk(2, -1)
        return torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), -1)


class RotaryAttention(Matmul):
    def __init__(self, rotary: Rotary) -> None:
        super().__init__(32, 4)
        self.rotary = rotary

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        return super().attend(self.rotary(q), self.rotary(k), v, mask, hide)


SHARED = [
    of_two_layers,
    of_two_attentions,
    one_attention_twice,
    one_norm_twice,
    one_layer_twice,
    the_same_memory,
    of_layer_and_encoder,
    one_rotary_module,
]


@pytest.mark.parametrize("share", SHARED, ids=lambda share: share.__name__)
def test_shared_weights_are_captured(share: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    encoder = encoder_of(2)
    share(encoder)
    captured_equals_upstream(encoder, encoder)


def test_shared_weights_are_captured_in_branches_too() -> None:
    torch.manual_seed(0)
    encoder = encoder_of(2)
    for share in (of_two_layers, of_layer_and_encoder, one_rotary_module, one_norm_twice):
        share(encoder)
    captured_equals_upstream(encoder, encoder, dac="runtime", pre_norm="runtime", batch=(1, 8))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_shared_weight_is_exported_and_stored_once(precision: str, tmp_path: Path) -> None:
    apart, encoder = encoder_of(2, dim_feedforward=512), encoder_of(2, dim_feedforward=512)
    encoder.layers[1].linear1.weight = encoder.layers[0].linear1.weight
    before = {name: value.data_ptr() for name, value in encoder.named_parameters(remove_duplicate=False)}
    options: dict[str, Any] = {**PLAIN, "weights": precision, "verify": "final"}
    artifact = sam3x.export(encoder, output=tmp_path / "shared", **options)
    assert artifact.manifest.verified
    other = sam3x.export(apart, output=tmp_path / "apart", **{**options, "verify": "off"})
    saved = other.path.stat().st_size - artifact.path.stat().st_size
    weight = 512 * 32 * {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    assert saved > 0.95 * weight
    assert {name: value.data_ptr() for name, value in encoder.named_parameters(remove_duplicate=False)} == before


@pytest.mark.long
@pytest.mark.parametrize("target", ["pte", "trt"])
def test_a_shared_weight_is_exported_to_other_targets(target: str, tmp_path: Path) -> None:
    encoder = encoder_of(2)
    of_two_layers(encoder)
    of_two_attentions(encoder)
    own = {"trt": {"compute_capability": "sm89", "format": "plan-onnx"}}.get(target, {})
    ranges: dict[str, Any] = {"batch": (1, 2), "tokens": 64, "prompt_length": (1, 16)}
    assert sam3x.export(encoder, target=target, output=tmp_path / "out", **ONE_BRANCH, **ranges, **own).path.is_file()


def test_layers_in_a_list_of_pythons_own_keep_their_weights() -> None:
    reference, encoder = encoder_of(2), encoder_of(2)
    encoder.__dict__["layers"] = list(encoder._modules.pop("layers"))
    captured_equals_upstream(encoder, reference)
    assert module_source(encoder, "").weights_sha256 != module_source(encoder_of(2, seed=4), "").weights_sha256


# ---- what the caller has set


@contextlib.contextmanager
def default_dtype() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "default_dtype": default_dtype,
    "default_device": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sam3x.export(encoder_of(1), output=tmp_path_factory.mktemp("plain") / "out", **PLAIN).path.read_bytes()


@pytest.mark.parametrize("name", AMBIENT)
def test_the_callers_settings_change_nothing(name: str, plain_file: bytes, tmp_path: Path) -> None:
    encoder = encoder_of(1)
    spec = make_spec(**PLAIN)
    inputs = {name: value.numpy() for name, value in make_inputs(spec.inputs, spec, 32, SIZES, 1).items()}
    with AMBIENT[name]():
        before = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        artifact = sam3x.export(encoder, output=tmp_path / "out", **PLAIN)
        assert artifact.run(inputs)["output"].dtype == np.float32
        assert before == (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        assert (dtype, device) == (torch.get_default_dtype(), torch.get_default_device())
    assert artifact.manifest.verified and artifact.path.read_bytes() == plain_file


def test_parameters_made_under_inference_mode() -> None:
    with torch.inference_mode():
        encoder = encoder_of(1)
    assert next(encoder.parameters()).is_inference()
    captured_equals_upstream(encoder, encoder_of(1))
    assert next(encoder.parameters()).is_inference()


# ---- autocast inside


class Below(Matmul):
    """Attention in ``self.dtype``."""

    options: tuple[Any, ...] = ("cpu", torch.bfloat16)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        with torch.autocast(*self.options):  # the line that is named
            return super().attend(q, k, v, mask, hide).type_as(q)


class WithoutEffect(Below):
    options = ("cpu", torch.bfloat16, False)


class OfAnotherDevice(Below):
    options = ("cuda", torch.bfloat16)


class CastToBfloat16(Matmul):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        return super().attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, hide).float()


class GradientsInside(Matmul):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        with torch.enable_grad():
            q = q + 0
        with torch.inference_mode():
            return super().attend(q, k, v, mask, hide)


def with_attention(kind: Callable[[int, int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    encoder = encoder_of(1)
    for layer in encoder.layers:
        layer.self_attn = kind(32, 4)
    return encoder.eval()


def test_autocast_in_the_module_is_refused_by_its_line() -> None:
    with pytest.raises(
        CaptureError, match=r"torch\.autocast on line \d+ of .*test_unusual_modules\.py.*the line that is named"
    ):
        capture(with_attention(Below), make_spec(**PLAIN))


def test_a_cast_to_bfloat16_in_the_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"computes in torch\.bfloat16"):
        capture(with_attention(CastToBfloat16), make_spec(**PLAIN))


@pytest.mark.parametrize("kind", [WithoutEffect, OfAnotherDevice, GradientsInside], ids=lambda kind: kind.__name__)
def test_contexts_without_effect_leave_nothing_in_the_graph(kind: type[nn.Module]) -> None:
    encoder = with_attention(kind)
    captured_equals_upstream(encoder, encoder)


# ---- torch.compile, wrappers, hooks


def compiled_linear(encoder: nn.Module) -> nn.Module:
    encoder.layers[0].linear1.compile(backend="eager")
    return encoder


def compiled_attention(encoder: nn.Module) -> nn.Module:
    encoder.layers[0].self_attn.compile(backend="eager")
    return encoder


def compiled_layer(encoder: nn.Module) -> nn.Module:
    encoder.layers[0].compile(backend="eager")
    return encoder


def optimized_layer(encoder: nn.Module) -> nn.Module:
    encoder.layers[0] = torch.compile(encoder.layers[0], backend="eager")
    return encoder


def optimized_attention(encoder: nn.Module) -> nn.Module:
    encoder.layers[0].self_attn = torch.compile(encoder.layers[0].self_attn, backend="eager")
    return encoder


def optimized_encoder(encoder: nn.Module) -> nn.Module:
    return torch.compile(encoder, backend="eager")  # type: ignore[return-value]


def compiled_function(encoder: nn.Module) -> nn.Module:
    encoder.layers[0].activation = torch.compile(nn.functional.relu, backend="eager")
    return encoder


def data_parallel(encoder: nn.Module) -> nn.Module:
    return nn.DataParallel(encoder)


def averaged(encoder: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(encoder)


def weight_norm(encoder: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(encoder.layers[0].linear1)
    return encoder


def weight_norm_by_hook(encoder: nn.Module) -> nn.Module:
    nn.utils.weight_norm(encoder.layers[0].linear1)
    return encoder


WRAPPED = [
    compiled_linear,
    compiled_attention,
    compiled_layer,
    optimized_layer,
    optimized_attention,
    optimized_encoder,
    compiled_function,
    data_parallel,
    averaged,
    weight_norm,
    weight_norm_by_hook,
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", WRAPPED, ids=lambda wrap: wrap.__name__)
def test_what_is_wrapped_or_compiled_is_exported_as_the_original(wrap: Callable[[nn.Module], nn.Module]) -> None:
    reference, given = encoder_of(1), wrap(encoder_of(1))
    names = sorted(vars(given))
    captured_equals_upstream(given, reference)
    assert sorted(vars(given)) == names
    if wrap.__name__.startswith(("optimized", "data", "averaged")):
        assert module_source(given, "").weights_sha256 == module_source(reference, "").weights_sha256


def test_spectral_norm_is_what_it_is_in_eval_mode() -> None:
    encoder = encoder_of(1)
    nn.utils.parametrizations.spectral_norm(encoder.layers[0].linear1)
    captured_equals_upstream(encoder.eval(), encoder)


def test_a_hook_that_changes_an_output_is_part_of_the_module() -> None:
    encoder = encoder_of(1)
    encoder.layers[0].linear1.register_forward_hook(lambda module, args, output: output * 2)
    captured_equals_upstream(encoder, encoder)


def test_what_a_module_keeps_of_a_run_stays_out_of_the_trace_and_of_the_users_module() -> None:
    class Keeps(Matmul):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.tables: dict[str, Tensor] = {}

        def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
            self.last = torch.arange(k.shape[2], dtype=q.dtype) * 0.01
            self.tables["last"] = self.last
            return super().attend(q, k, v + self.last[:, None], mask, hide)

    encoder = with_attention(Keeps)
    captured_equals_upstream(encoder, encoder)
    attention: Any = encoder.layers[0].self_attn
    assert not hasattr(attention, "last") and attention.tables == {}


# ---- what cannot be exported is named


def quantized(encoder: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8)


def lazy(encoder: nn.Module) -> nn.Module:
    encoder.layers[0].linear1 = nn.LazyLinear(64)
    return encoder


def scripted(encoder: nn.Module) -> nn.Module:
    encoder.layers[0].linear1 = torch.jit.script(encoder.layers[0].linear1)
    return encoder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (quantized, r"'layers\.0\.linear1' is quantized .*--precision"),
        (lazy, r"'layers\.0\.linear1\.weight' has no shape yet"),
        (scripted, r"'layers\.0\.linear1' is scripted"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_module_without_plain_weights_is_named(change: Callable[[nn.Module], nn.Module], fact: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=fact):
        sam3x.export(change(encoder_of(1)), output=tmp_path / "out", **PLAIN)


# ---- sizes


class Sized(Matmul):
    """Shapes what comes out by the batch, as each of ``reads`` gets it of the queries."""

    reads: tuple[Callable[[Tensor], Any], ...] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        out = super().attend(q, k, v, mask, hide)
        for read in self.reads:
            out = out.reshape(read(q), self.num_heads, -1, self.head_dim)
        return out


def sized(*reads: Callable[[Tensor], Any]) -> nn.Module:
    return with_attention(type("Sized", (Sized,), {"reads": reads}))


SYMBOLIC: dict[str, Callable[[Tensor], Any]] = {
    "len": lambda q: len(q),
    "len_of_a_slice": lambda q: len(q[:, 0]),
    "int": lambda q: int(q.shape[0]),
    "int_of_a_quotient": lambda q: int(q.shape[0] * 2 / 2),
    "size_through_math": lambda q: math.floor(q.size(0) * 2 / 2),
    "product": lambda q: math.prod(q.shape[:1]),
    "isinstance": lambda q: int(q.shape[0]) if isinstance(3, int) and not isinstance(3.0, int) else 0,
}


def test_sizes_stay_dynamic_however_they_are_read() -> None:
    encoder = sized(*SYMBOLIC.values())
    captured_equals_upstream(encoder, encoder, batch=(1, 8))
    assert "len" not in globals() and "int" not in globals()


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "range": lambda q: q.shape[0] + sum(0 for _ in range(q.shape[0])),
    "a_loop_over_rows": lambda q: q.shape[0] + sum(0 for _ in q),
    "square_root": lambda q: int(math.sqrt(q.shape[0]) ** 2),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_size_that_becomes_a_number_is_refused_by_its_line(name: str) -> None:
    fact = r"'batch' must stay dynamic, and line \d+ of .*test_unusual_modules\.py \(.*\) makes a number of it, 6 .*--batch"
    with pytest.raises(CaptureError, match=fact):
        capture(sized(NUMBERS[name]), make_spec(**ONE_BRANCH))


def test_a_size_that_is_fixed_as_the_refusal_says_may_become_a_number() -> None:
    captured = capture(sized(*NUMBERS.values()), make_spec(**ONE_BRANCH, batch=4))
    assert captured.input_names[0] == "tgt"


def test_a_file_with_a_size_by_len_runs_at_every_size(tmp_path: Path) -> None:
    artifact = sam3x.export(sized(SYMBOLIC["len"]), output=tmp_path / "out", **ONE_BRANCH)
    assert artifact.manifest.verified and onnx.load(artifact.path).graph.input[0].type.tensor_type.shape.dim[0].dim_param


# ---- sequence first


def sequence_first(num_layers: int, *names: str) -> nn.Module:
    encoder = encoder_of(num_layers)
    for layer in encoder.layers:
        for name in names or ("self_attn", "cross_attn_image"):
            getattr(layer, name).batch_first = False
    return encoder


def test_attention_built_sequence_first_is_served_batch_first(tmp_path: Path) -> None:
    encoder = sequence_first(1)
    artifact = sam3x.export(encoder, output=tmp_path / "out", pre_norm="module", inputs="tgt,memory,memory_key_padding_mask")
    assert artifact.manifest.verified and artifact.manifest.spec["dac_dim"] == 1
    spec = make_spec(**artifact.manifest.spec)
    inputs = make_inputs(spec.inputs, spec, 32, SIZES, 1)
    turned = {name: value.transpose(0, 1) for name, value in inputs.items() if name in ("tgt", "memory")}
    mask = {"memory_key_padding_mask": inputs["memory_key_padding_mask"]}
    layer = encoder.layers[0]
    layer.pos_enc_at_attn = False  # no positions are given
    for dac in (False, True):
        with torch.no_grad():
            expected = layer(**turned, **mask, dac=dac).transpose(0, 1)  # upstream's own, which halves the sequence
        got = torch.as_tensor(artifact.run({**inputs, "dac": dac})["output"])
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert not layer.self_attn.batch_first and not layer.cross_attn_image.batch_first


@pytest.mark.parametrize("name", ["self_attn", "cross_attn_image"])
def test_batch_first_that_differs_within_a_layer_is_named(name: str) -> None:
    with pytest.raises(SourceError, match=rf"batch_first=False in {name} of .*, True in .*batch_first=True"):
        capture(sequence_first(1, name), make_spec(**PLAIN))


def test_batch_first_that_differs_between_layers_is_named() -> None:
    layers = [sequence_first(1).layers[0], encoder_of(1).layers[0]]
    with pytest.raises(SourceError, match="batch_first=False in some layers"):
        capture(layers, make_spec(**PLAIN))


def test_dac_over_the_batch_of_sequence_first_layers_is_refused() -> None:
    with pytest.raises(SpecError, match=r"batch_first=False.*--dac-dim 1"):
        capture(sequence_first(1), make_spec(dac_dim=0))
