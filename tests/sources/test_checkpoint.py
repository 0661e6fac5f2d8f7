"""Checkpoints: found under every prefix, told apart from look-alikes, refused by name when they do not fit, never executed."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.fusion.config import FusionConfig
from sam3x.sources.checkpoint import read_checkpoint
from sam3x.sources.encoder import build_encoder, checkpoint_source, draw_weights, weights_hash
from sam3x.sources.fusion_part import find_encoder

SMALL = FusionConfig(d_model=32, num_layers=3, dim_feedforward=48)
META = "detector.transformer.encoder."


def small_encoder(config: FusionConfig = SMALL, seed: int = 3) -> nn.Module:
    encoder = build_encoder(config)
    draw_weights(encoder, seed)
    return encoder.eval()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def decoys(detector: str = "detector.", tracker: str = "tracker.") -> dict[str, Tensor]:
    """Neighbours of the encoder in Meta's sam3.pt, by their real key names."""
    keys: dict[str, tuple[int, ...]] = {}
    for i in range(2):
        decoder = f"{detector}transformer.decoder.layers.{i}."
        for name in ("self_attn", "cross_attn", "ca_text"):
            keys |= {f"{decoder}{name}.in_proj_weight": (96, 32), f"{decoder}{name}.out_proj.weight": (32, 32)}
        keys |= {f"{decoder}{name}.weight": (32,) for name in ("norm1", "norm2", "norm3", "catext_norm")}
        geometry = f"{detector}geometry_encoder.encode.{i}."
        for name in ("self_attn", "cross_attn_image"):
            keys |= {f"{geometry}{name}.in_proj_weight": (96, 32), f"{geometry}{name}.out_proj.weight": (32, 32)}
        memory = f"{tracker}transformer.encoder.layers.{i}."
        for name in ("self_attn", "cross_attn_image"):
            keys |= {f"{memory}{name}.{p}_proj.weight": (32, 32) for p in ("q", "k", "v", "out")}
        keys |= {f"{memory}norm1.weight": (32,), f"{memory}linear1.weight": (48, 32)}
        text = f"{detector}backbone.language_backbone.encoder.transformer.resblocks.{i}."
        keys |= {f"{text}attn.in_proj_weight": (96, 32), f"{text}ln_1.weight": (32,)}
    state = {name: torch.zeros(shape) for name, shape in keys.items()}
    for i in range(32):
        name = f"{detector}backbone.vision_backbone.trunk.blocks.{i}.attn.freqs_cis"
        state[name] = torch.zeros(4, 2, dtype=torch.complex64)
    return state


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return small_encoder()


@pytest.fixture
def state(encoder: nn.Module) -> dict[str, Tensor]:
    return dict(encoder.state_dict())


def refusal(path: Path, **overrides: Any) -> str:
    """The one-line message with which ``path`` is refused."""
    with pytest.raises(SourceError) as caught:
        checkpoint_source(path, **overrides)
    message = str(caught.value)
    assert message.startswith("step 1/4 source: ") and "\n" not in message and message.endswith(".")
    assert str(path) in message
    return message


def saved(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


LAYOUTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "meta": (META, lambda s: {"model": {**decoys(), **prefixed(META, s)}}),
    "meta unwrapped": (META, lambda s: {**prefixed(META, s), **decoys()}),
    "efficientsam3": (
        META,
        lambda s: {
            "model": {
                "detector.backbone.vision_backbone.trunk.model.stem.weight": torch.ones(2),
                **prefixed(META, s),
                **decoys(),
            },
            "epoch": 4,
        },
    ),
    "image model": ("transformer.encoder.", lambda s: {**prefixed("transformer.encoder.", s), **decoys("", "inst.model.")}),
    "data parallel": ("module." + META, lambda s: {"state_dict": prefixed("module." + META, s)}),
    "lightning": ("model." + META, lambda s: {"state_dict": prefixed("model." + META, s), "global_step": 3}),
    "twice wrapped": ("transformer.encoder.", lambda s: {"model": {"model_state_dict": prefixed("transformer.encoder.", s)}}),
    "config beside": ("", lambda s: {"model": {"name": "sam3"}, "state_dict": s}),
    "module": ("module.", lambda s: prefixed("module.", s)),
    "bare": ("", lambda s: s),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_the_encoder_is_found_under_every_prefix(
    tmp_path: Path, encoder: nn.Module, state: dict[str, Tensor], layout: str, suffix: str
) -> None:
    prefix, wrap = LAYOUTS[layout]
    source = checkpoint_source(saved(tmp_path / f"sam3{suffix}", wrap(state)))
    assert source.weights_sha256 == weights_hash(encoder)
    assert source.config == SMALL
    assert source.origin == f"checkpoint sam3{suffix}, " + (f"keys under '{prefix}'" if prefix else "keys without a prefix")
    assert not source.module.training
    x, memory = torch.randn(2, 6, 32), torch.randn(2, 3, 32)
    for ours, theirs in zip(source.module.layers, encoder.layers, strict=True):
        torch.testing.assert_close(ours(x, memory, query_pos=x), theirs(x, memory, query_pos=x))


def test_safetensors(tmp_path: Path, encoder: nn.Module, state: dict[str, Tensor]) -> None:
    path = tmp_path / "Model.SafeTensors"
    save_file({**prefixed(META, state), **{k: v for k, v in decoys().items() if not v.is_complex()}}, path)
    assert checkpoint_source(path).weights_sha256 == weights_hash(encoder)


def test_files_from_before_zip_archives(tmp_path: Path, encoder: nn.Module, state: dict[str, Tensor]) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": prefixed(META, state)}, path, _use_new_zipfile_serialization=False)
    assert checkpoint_source(path).weights_sha256 == weights_hash(encoder)


def test_the_source_outlives_its_file(tmp_path: Path, encoder: nn.Module, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "sam3.pt", state)
    source = checkpoint_source(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # the same inode: a map of the file would see it
    assert weights_hash(source.module) == weights_hash(encoder)


def test_levels_and_pooled_text_are_read_from_shapes(tmp_path: Path) -> None:
    config = FusionConfig(d_model=16, num_layers=1, dim_feedforward=24, num_feature_levels=3, add_pooled_text_to_img_feat=True)
    encoder = small_encoder(config)
    source = checkpoint_source(saved(tmp_path / "c.pt", prefixed(META, encoder.state_dict())))
    assert source.config == config and source.weights_sha256 == weights_hash(encoder)
    assert not any(value.is_meta for value in source.module.state_dict().values())


def test_overrides_tell_what_shapes_cannot(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "c.pt", state)
    source = checkpoint_source(path, num_heads=4, pre_norm=False, activation="gelu", pos_enc_at_attn=None)
    assert source.config == SMALL.model_copy(update={"num_heads": 4, "pre_norm": False, "activation": "gelu"})
    layer = source.module.layers[2]
    assert (layer.self_attn.num_heads, layer.pre_norm, layer.activation_str) == (4, False, "gelu")
    assert "is not divisible by num_heads 5; give num_heads" in refusal(path, num_heads=5)
    assert "nun_heads: Extra inputs are not permitted" in refusal(path, nun_heads=4)
    assert "mis-shaped" in refusal(path, d_model=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_with_a_note(tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    lower = {name: value.to(dtype) for name, value in state.items()}
    source = checkpoint_source(saved(tmp_path / "c.pt", lower))
    assert source.origin.endswith(f", {str(dtype).removeprefix('torch.')} weights converted to float32")
    for name, value in source.module.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, lower[name].float())


def test_several_encoders(tmp_path: Path, state: dict[str, Tensor]) -> None:
    both = {**prefixed("student.", state), **prefixed("model.detector.transformer.encoder.", state)}
    assert find_encoder(both).prefix == "model.detector.transformer.encoder."
    message = refusal(saved(tmp_path / "c.pt", {**prefixed("a.", state), **prefixed("b.x.", state)}))
    assert "has 2 fusion encoders, under 'a.', 'b.x.'" in message


def test_keys_that_do_not_fit_are_named_with_their_prefix(tmp_path: Path, state: dict[str, Tensor]) -> None:
    broken = prefixed(META, state)
    del broken[META + "layers.1.norm2.bias"]
    broken[META + "layers.0.adapter.weight"] = torch.ones(2)
    broken[META + "layers.2.linear2.weight"] = torch.ones(32, 7)
    message = refusal(saved(tmp_path / "c.pt", broken))
    assert f"missing: {META}layers.1.norm2.bias;" in message
    assert f"unexpected: {META}layers.0.adapter.weight;" in message
    assert f"mis-shaped: {META}layers.2.linear2.weight (32, 7), not (32, 48)." in message


def test_long_lists_are_cut_and_counted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    only_attention = {name: value for name, value in state.items() if "attn" in name}
    message = refusal(saved(tmp_path / "c.pt", only_attention))
    assert "… (30 in all)" in message and message.count("layers.") == 8  # linear1, linear2 and three norms, of three layers


def test_gaps_between_layers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    gap = {name.replace("layers.1.", "layers.4000000000."): value for name, value in state.items()}
    message = refusal(saved(tmp_path / "c.pt", gap))
    assert "lacks layers in between: layers.1, layers.3," in message and "(3999999998 in all)" in message


def test_unknown_width(tmp_path: Path, state: dict[str, Tensor]) -> None:
    keys = {name: value.reshape(-1, 1, 1) for name, value in state.items()}
    assert "does not tell d_model" in refusal(saved(tmp_path / "c.pt", keys))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, state: dict[str, Tensor], value: float) -> None:
    bad = state["layers.1.linear1.weight"].clone()
    bad[0, :2] = value
    message = refusal(saved(tmp_path / "c.pt", {**prefixed(META, state), META + "layers.1.linear1.weight": bad}))
    assert f"2 NaN or infinite values among the 1536 of {META}layers.1.linear1.weight" in message


@pytest.mark.parametrize(
    ("convert", "kind"),
    [
        (lambda x: x.to(torch.int8), "int8"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: x.to_sparse(), "float32 without stored values or sparse"),
        (lambda x: x.to("meta"), "float32 without stored values or sparse"),
    ],
)
def test_weights_that_are_no_plain_numbers(tmp_path: Path, state: dict[str, Tensor], convert: Any, kind: str) -> None:
    state["layers.0.linear1.weight"] = convert(state["layers.0.linear1.weight"])
    assert f"holds layers.0.linear1.weight as {kind}, not plain" in refusal(saved(tmp_path / "c.pt", state))


def test_layouts_with_q_k_and_v_apart(tmp_path: Path) -> None:
    prefix = "detector_model.detr_encoder.layers.0."
    keys = {f"{prefix}{a}.{p}_proj.weight": torch.ones(2, 2) for a in ("self_attn", "cross_attn") for p in "qkvo"}
    message = refusal(saved(tmp_path / "transformers.pt", keys))
    assert "layout of transformers" in message and f"{prefix}self_attn.q_proj.weight" in message
    message = refusal(saved(tmp_path / "tracker.pt", {k: v for k, v in decoys().items() if k.startswith("tracker")}))
    assert "'tracker.transformer.encoder.', as the tracker's memory encoder does" in message


def test_no_encoder_at_all(tmp_path: Path) -> None:
    neighbours = {name: value for name, value in decoys().items() if not name.startswith("tracker")}
    message = refusal(saved(tmp_path / "c.pt", neighbours))
    assert "has no fusion encoder" in message and "detector.transformer.decoder.layers.0.self_attn.in_proj_weight" in message


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def _write(path: Path, payload: Any, form: str) -> Path:
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_code_in_a_pickle_is_refused_and_not_run(
    tmp_path: Path, state: dict[str, Tensor], form: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "executed"
    path = _write(tmp_path / f"evil{suffix}", {"model": prefixed(META, state), "extra": Code(mark)}, form)
    message = refusal(path)
    assert "refused, nothing in it was executed" in message and "torch.save(model.state_dict(), path)" in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(Code(mark)))  # it would have worked
    assert mark.exists()


def test_objects_in_a_pickle_are_named(tmp_path: Path) -> None:
    assert "(argparse.Namespace is no tensor)" in refusal(saved(tmp_path / "a.pt", {"args": argparse.Namespace(lr=1)}))
    assert "(torch.nn.modules.linear.Linear is no tensor)" in refusal(saved(tmp_path / "b.pt", nn.Linear(2, 2)))


def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    assert "TorchScript archive, which holds code: refused" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_truncated_files(tmp_path: Path, state: dict[str, Tensor], form: str, part: float) -> None:
    path = tmp_path / ("c.safetensors" if form == "safetensors" else "c.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        _write(path, state, form)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    assert "damaged" in refusal(path) or "refused" in refusal(path)


def test_bytes_that_are_no_checkpoint(tmp_path: Path) -> None:
    noise = bytes((i * 37 + 129) % 256 for i in range(4096))
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"c{suffix}"
        path.write_bytes(noise)
        assert "Download or save it again." in refusal(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "is an empty file"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, suffix: str, content: bytes, fact: str) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    assert fact in refusal(path)


def test_wrong_names(tmp_path: Path, state: dict[str, Tensor]) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.pt")
    assert "is a folder. Name the file in it: a .pt, .pth, .ckpt or .safetensors." in refusal(tmp_path)
    saved(tmp_path / "sam3.pt", state).rename(tmp_path / "named.safetensors")
    assert "is a PyTorch file named .safetensors" in refusal(tmp_path / "named.safetensors")
    save_file(state, tmp_path / "named.pth")
    assert "is a safetensors file named .pth" in refusal(tmp_path / "named.pth")
    assert "ends in '.bin'" in refusal(saved(tmp_path / "named.bin", state))
    assert "has no file name ending" in refusal(saved(tmp_path / "named", state))
    assert "Name the file in it: named.pth, named.safetensors." in refusal(tmp_path)
    assert "File name too long" in refusal(tmp_path / ("x" * 300 + ".pt"))
    os.mkfifo(tmp_path / "pipe.pt")
    assert "is not a regular file" in refusal(tmp_path / "pipe.pt")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ([torch.ones(2)], "holds a list, not named weights"),
        (torch.ones(2), "holds a Tensor, not named weights"),
        ({}, "holds no tensors (it is empty)"),
        ({"epoch": 3, "lr": 0.1}, "holds no tensors (epoch, lr)"),
    ],
)
def test_files_without_named_weights(tmp_path: Path, content: Any, fact: str) -> None:
    assert fact in refusal(saved(tmp_path / "c.pt", content))


def test_a_dict_that_contains_itself(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop.update(model=loop, state_dict=loop, model_state_dict=loop)
    with pytest.raises(SourceError, match="holds no tensors"):
        read_checkpoint(saved(tmp_path / "c.pt", loop))
