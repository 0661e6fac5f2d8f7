"""Image models' checkpoints as people have them: found, said, mended where that can be known, refused where it cannot.

``sam3x lint`` and ``sam3x export`` judge by one function; ``verdict`` asks both.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.sources.checkpoint import WRAPPERS, Checkpoint, read_checkpoint
from sam3x.sources.encoder import checkpoint_source
from sam3x.sources.image import checkpoint_image_source, load_judged
from sam3x.sources.lint import judge, lint
from sam3x.sources.names import COMPONENTS, DETECTOR
from sam3x.sources.report import LintReport
from sam3x.sources.state import INTERACTIVE, TRUNK, image_part
from sam3x.spec import ExportSpec

State = dict[str, Tensor]
FUSION = "transformer.encoder."


@pytest.fixture(scope="module")
def state(tiny_model: nn.Module) -> State:
    """The names of an image model without a head for clicks."""
    return without(dict(tiny_model.state_dict()), "inst_interactive_predictor.", "sam2_convs.")


@pytest.fixture(scope="module")
def clickable(tiny_model: nn.Module) -> State:
    """Those of one with the head, its tracker's memory left out."""
    memory = ("obj_ptr", "maskmem", "mask_downsample", "no_mem_pos", "no_obj")
    return without(dict(tiny_model.state_dict()), *(f"{INTERACTIVE}{name}" for name in memory))


@pytest.fixture(scope="module")
def released(state: State) -> State:
    """As Meta saves it: the image model under ``detector.``, a tracker beside it."""
    return {**prefixed("detector.", state), "tracker.no_mem_embed": torch.zeros(1, 1, 8)}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def without(state: State, *parts: str) -> State:
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def loaded(path: Path, key: str | None = None) -> tuple[State, LintReport]:
    judged = judge(read_checkpoint(path, key))
    return dict(load_judged(judged).state_dict()), judged.report


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def verdict(path: Path, key: str | None = None) -> LintReport:
    """The report; export takes the checkpoint exactly where lint says so, and names the same faults where it does not."""
    report = lint(path, key)
    if "image model" in report.exports:
        assert report.clean
        load_judged(judge(read_checkpoint(path, key)))
    else:
        with pytest.raises(SourceError) as caught:
            checkpoint_image_source(path, key)(ExportSpec())
        assert all(fault in str(caught.value) for fault in report.faults)
        assert report.kind == "fusion encoder" or not report.clean
    return report


# prefixes, places in the file (item 20)

PREFIXES = ["module.", "_orig_mod.", "model.", "module.detector.", "model.module._orig_mod.detector.", "sam3."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_prefix_of_a_fine_tune_is_recognized_stripped_and_said(prefix: str, state: State, tmp_path: Path) -> None:
    path = saved(
        tmp_path / "c.pt", {"state_dict": prefixed(prefix, state), "epoch": 3, "optimizer": {"state": {0: {"step": 1}}}}
    )
    weights, report = loaded(path)
    assert same(weights, state) and verdict(path).clean
    assert any(prefix.replace("_orig_mod.", "") in note or "_orig_mod" in note for note in report.notes)


@pytest.mark.parametrize(
    ("prefix", "place"),
    [
        ("detector.", "tracker."),  # the release
        ("module.model.detector.", "module.model.tracker."),
        ("", "tracker."),
        ("", INTERACTIVE),  # a live model's
        ("model.", f"model.{INTERACTIVE}"),
    ],
)
def test_the_head_for_clicks_is_found_beside_the_detector(prefix: str, place: str, clickable: State, tmp_path: Path) -> None:
    content = {
        place + name.removeprefix(INTERACTIVE) if name.startswith(INTERACTIVE) else prefix + name: value
        for name, value in clickable.items()
    }
    memory = {f"{place}maskmem_backbone.out_proj.weight": torch.zeros(2), f"{place}no_obj_ptr": torch.zeros(1, 4)}
    path = saved(tmp_path / "c.pt", {"model": {**content, **memory}})
    weights, report = loaded(path)
    assert same(weights, clickable)
    assert verdict(path).exports == ("image model", "interactive head", "fusion encoder")
    assert any("left out, not part of the image model" in note and "(2)" in note for note in report.notes)
    cut = checkpoint_image_source(path)(ExportSpec())
    assert [item.name for item in cut.components] == list(COMPONENTS) and cut.clicks is not None


@pytest.mark.parametrize("absent", ["sam2_convs.", f"{INTERACTIVE}no_mem_embed", f"{INTERACTIVE}sam_mask_decoder."])
def test_a_head_for_clicks_that_lacks_a_part_is_left_out_and_said(absent: str, clickable: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", {"model": without(clickable, absent)})
    report = verdict(path)
    assert report.exports == ("image model", "fusion encoder")
    assert any("left out, not part of the image model" in note for note in report.notes)
    assert [item.name for item in checkpoint_image_source(path)(ExportSpec()).components] == list(DETECTOR)


def test_a_head_for_clicks_with_a_weight_missing_is_refused_by_name(clickable: State, tmp_path: Path) -> None:
    name = f"{INTERACTIVE}sam_mask_decoder.conv_s0.weight"
    report = verdict(saved(tmp_path / "c.pt", {"model": without(clickable, name)}))
    assert report.missing == (name,)


segments = st.sampled_from(["module", "_orig_mod", "model", "detector", "net", "_fsdp_wrapped_module", "sam3"])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    prefix=st.lists(segments, max_size=4),
    inner=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["_orig_mod", "_checkpoint_wrapped_module"])), max_size=2),
    wrappers=st.lists(st.sampled_from([*WRAPPERS, "net"]), max_size=3),
    tracker=st.booleans(),
)
def test_prefixes_and_wrappers_in_any_nesting(
    prefix: list[str], inner: list[tuple[int, str]], wrappers: list[str], tracker: bool, state: State, tmp_path: Path
) -> None:
    def name_of(name: str) -> str:
        parts = name.split(".")
        for place, segment in inner:
            parts.insert(min(place, len(parts) - 1), segment)
        return ".".join([*prefix, *parts])

    numbers = {name: torch.tensor(float(index)) for index, name in enumerate(state)}
    content: Any = {name_of(name): value for name, value in numbers.items()}
    content.update(prefixed("tracker.transformer.encoder.layers.0.", {"norm1.weight": torch.zeros(1)}) if tracker else {})
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 2, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    part = image_part(read_checkpoint(saved(tmp_path / "c.pt", content)).state)
    assert same(part.state, numbers) and part.left_out == ({"tracker.": 1} if tracker else {})


def test_weights_key_chooses_ema_beside_model_and_it_is_said(state: State, tmp_path: Path) -> None:
    ema = {name: value if value.is_complex() else value * 2 for name, value in state.items()}
    path = saved(tmp_path / "c.pt", {"model": prefixed("detector.", state), "ema": {"module": prefixed("detector.", ema)}})
    weights, report = loaded(path)
    assert same(weights, state) and "weights under 'model', not those under 'ema.module' (--weights-key)" in report.notes
    weights, report = loaded(path, "ema")
    assert same(weights, ema) and "weights under 'ema.module'" in report.notes
    encoder = checkpoint_source(path, weights_key="ema")
    assert "weights under 'ema.module'" in encoder.origin
    assert torch.equal(encoder.module.state_dict()["layers.0.norm1.bias"], ema[FUSION + "layers.0.norm1.bias"])
    with pytest.raises(SourceError, match=r"no weights under 'emma'\. --weights-key takes one of 'model', 'ema\.module', "):
        read_checkpoint(path, "emma")


def test_weights_key_chooses_by_the_beginning_of_names(state: State, tmp_path: Path) -> None:
    ema = {name: value if value.is_complex() else value * 2 for name, value in state.items()}
    path = saved(tmp_path / "c.pt", {"state_dict": {**prefixed("model.", state), **prefixed("ema_model.", ema)}})
    with pytest.raises(SourceError, match=r"has 2 image models, under 'ema_model\.', 'model\.'\. Choose one"):
        judge(read_checkpoint(path))
    assert same(loaded(path, "ema_model")[0], ema) and same(loaded(path, "model")[0], state)


def test_a_lightning_checkpoint_is_read_whatever_its_callbacks_keep(state: State, tmp_path: Path) -> None:
    kept = {"best_k_models": {"/runs/a/epoch=3.ckpt": torch.tensor(0.5)}, "best_model_score": torch.tensor(0.5)}
    content = {"state_dict": prefixed("model.", state), "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": kept}, "epoch": 3}
    weights, report = loaded(saved(tmp_path / "last.ckpt", content))
    assert same(weights, state) and report.notes == ("keys under 'model.'",)


def test_sets_of_weights_of_unknown_names_ask_for_a_key(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", {"student": state, "teacher": state})
    with pytest.raises(SourceError, match=r"holds 2 sets of weights, under 'student', 'teacher'\. Choose"):
        read_checkpoint(path)
    assert same(loaded(path, "teacher")[0], state)


def test_numpy_scalars_and_arrays_beside_the_weights_are_no_obstacle(released: State, state: State, tmp_path: Path) -> None:
    beside = {"best": np.float64(0.5), "step": np.int64(3), "curve": np.arange(5.0), "when": np.datetime64("2026-11-29")}
    before = set(torch.serialization.get_safe_globals())
    assert same(loaded(saved(tmp_path / "c.pt", {"model": released, **beside}))[0], state)
    assert not {item for item in torch.serialization.get_safe_globals() if isinstance(item, tuple)} - before


def test_a_name_twice_behind_torchs_wrappers_is_refused(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", {**state, **prefixed("_orig_mod.", state)})
    with pytest.raises(SourceError, match=r"holds both _orig_mod\.\S+ and "):
        read_checkpoint(path)


# adapters (item 20)


def lora(
    state: State, match: str, end: str = ".default.weight", rank: int = 4, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name.removesuffix(".weight"): (
            torch.randn(rank, *value.shape[1:], generator=generator),
            torch.randn(len(value), rank, *[1] * (value.dim() - 2), generator=generator),
        )
        for name, value in state.items()
        if name.endswith(match)
    }


def adapted(state: State, pairs: dict[str, tuple[Tensor, Tensor]], alpha: float) -> State:
    """The definition, in float64: W + alpha / rank · B · A."""
    result = dict(state)
    for module, (first, second) in pairs.items():
        rank = len(first)
        product = (second.double().flatten(1) @ first.double().flatten(1)).reshape(state[f"{module}.weight"].shape)
        result[f"{module}.weight"] = (state[f"{module}.weight"].double() + alpha / rank * product).float()
    return result


def peft(state: State, pairs: dict[str, tuple[Tensor, Tensor]], adapter: str = ".default") -> State:
    """The names that peft's wrapped model saves."""
    keys = {}
    for name, value in state.items():
        module, _, end = name.rpartition(".")
        keys[f"base_model.model.{module}.base_layer.{end}" if module in pairs else f"base_model.model.{name}"] = value
    for module, (first, second) in pairs.items():
        keys[f"base_model.model.{module}.lora_A{adapter}.weight"] = first
        keys[f"base_model.model.{module}.lora_B{adapter}.weight"] = second
    return keys


@pytest.mark.parametrize("ends", ["linear1.weight", "qkv.weight", "convs.0.conv_3x3.weight", "out_proj.weight"])
def test_a_lora_adapter_beside_base_weights_is_merged_as_peft_does(ends: str, state: State, tmp_path: Path) -> None:
    pairs = lora(state, ends)
    assert pairs
    path = saved(tmp_path / "c.pt", {"model": peft(state, pairs), "peft_config": {"default": {"r": 4, "lora_alpha": 8}}})
    weights, report = loaded(path)
    for name, value in adapted(state, pairs, 8).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-5)
    said = f"a LoRA adapter merged into {len(pairs)} weight"
    assert any(note.startswith(said) and note.endswith("(alpha 8, rank 4)") for note in report.notes)


def test_lora_of_packed_projections_loralibs_names_and_alpha_beside_the_factors(state: State, tmp_path: Path) -> None:
    module = FUSION + "layers.0.self_attn"
    packed = state[f"{module}.in_proj_weight"]
    first, second = torch.randn(2, packed.shape[1]), torch.randn(len(packed), 2)
    keys = {f"{module}.lora_A": first, f"{module}.lora_B": second, f"{module}.alpha": torch.tensor(6.0)}
    weights, _ = loaded(saved(tmp_path / "c.pt", {**state, **keys}))
    torch.testing.assert_close(weights[f"{module}.in_proj_weight"], packed + 3 * second @ first)
    encoder = checkpoint_source(tmp_path / "c.pt")
    assert torch.equal(encoder.module.state_dict()["layers.0.self_attn.in_proj_weight"], weights[f"{module}.in_proj_weight"])
    assert "a LoRA adapter merged into 1 weight (alpha 6, rank 2)" in encoder.origin


def test_lora_takes_alpha_from_the_adapter_config_beside_the_file(state: State, tmp_path: Path) -> None:
    pairs = lora(state, "linear1.weight")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    save_file(without(peft(state, pairs), "freqs_cis"), tmp_path / "c.safetensors")
    weights = read_checkpoint(tmp_path / "c.safetensors").state
    for name, value in adapted(state, pairs, 16).items():  # rank-stabilized: alpha / √rank
        if name in weights:
            torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-5)


REFUSED_ADAPTERS: dict[str, tuple[Callable[[State], Any], str]] = {
    "no alpha": (lambda s: peft(s, lora(s, "linear1.weight")), "no lora_alpha in the file"),
    "alone": (lambda s: prefixed("base_model.model.", _factors(s)), r"holds a LoRA adapter alone \(\d+ modules\)"),
    "half": (lambda s: {**s, FUSION + "layers.0.linear1.lora_A.weight": torch.ones(4, 32)}, "its lora_A and no lora_B"),
    "two": (
        lambda s: {**peft(s, lora(s, "linear1.weight")), **_other_adapter(s)},
        "holds 2 LoRA adapters, 'default', 'other'",
    ),
    "dora": (
        lambda s: {
            **peft(s, lora(s, "linear1.weight")),
            "base_model.model.a.lora_magnitude_vector.default.weight": torch.ones(2),
        },
        "of a kind that is not merged here",
    ),
    "peft's attention": (lambda s: _peft_attention(s), "whose out_proj some versions of peft change twice"),
    "shape": (
        lambda s: {
            **s,
            "a.linear1.lora_A.weight": torch.ones(4, 8),
            "a.linear1.lora_B.weight": torch.ones(8, 4),
            **_factors(s),
        },
        "has no weight of its shape",
    ),
}


def _peft_attention(state: State) -> State:
    name = FUSION + "layers.0.self_attn.out_proj"
    keys = peft(state, lora(state, "layers.0.self_attn.out_proj.weight"))
    return {key.replace(name, name.replace(".out_proj", ".base_layer.out_proj")): value for key, value in keys.items()}


def _factors(state: State) -> State:
    pairs = lora(state, "linear1.weight")
    return {
        f"{module}.lora_{side}.weight": value for module, pair in pairs.items() for side, value in zip("AB", pair, strict=True)
    }


def _other_adapter(state: State) -> State:
    return {name: value for name, value in peft(state, lora(state, "linear1.weight"), ".other").items() if "lora_" in name}


@pytest.mark.parametrize("name", REFUSED_ADAPTERS)
def test_an_adapter_that_cannot_be_merged_is_refused_by_name(name: str, state: State, tmp_path: Path) -> None:
    change, fact = REFUSED_ADAPTERS[name]
    path = saved(tmp_path / "c.pt", change(state))
    for read in (lint, checkpoint_source, lambda path: checkpoint_image_source(path)(ExportSpec())):
        with pytest.raises(SourceError, match=fact):
            read(path)


def test_a_folder_with_an_adapter_alone_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    from sam3x.sources.image import transformers_image_source

    for read in (lint, lambda path: transformers_image_source(path)(ExportSpec())):
        with pytest.raises(SourceError, match="holds a LoRA adapter alone"):
            read(tmp_path)


# missing, unexpected, non-finite; students and teachers (item 22)


def _student(state: State) -> State:
    stem = {TRUNK + "model.student_trunk.stem.weight": torch.zeros(4)}
    return {**without(state, TRUNK), **stem}


BROKEN: dict[str, tuple[Callable[[State], State], str, str]] = {
    "missing": (lambda s: without(s, "decoder.layers.1.linear2.bias"), "missing", "transformer.decoder.layers.1.linear2.bias"),
    "unexpected": (
        lambda s: {**s, "segmentation_head.extra.weight": torch.ones(2)},
        "unexpected",
        "segmentation_head.extra.weight",
    ),
    "geometry": (lambda s: without(s, "geometry_encoder."), "traps", "random weights"),
    "shape": (
        lambda s: {**s, "dot_prod_scoring.hs_proj.bias": torch.zeros(5)},
        "misshaped",
        "dot_prod_scoring.hs_proj.bias (5,), not (32,)",
    ),
    "nan": (
        lambda s: {**s, "dot_prod_scoring.hs_proj.bias": torch.full((32,), float("nan"))},
        "not_finite",
        "dot_prod_scoring.hs_proj.bias",
    ),
    "int8": (
        lambda s: {**s, "dot_prod_scoring.hs_proj.weight": s["dot_prod_scoring.hs_proj.weight"].to(torch.int8)},
        "mistyped",
        "dot_prod_scoring.hs_proj.weight int8, not floating point",
    ),
    "float8": (
        lambda s: {**s, "dot_prod_scoring.hs_proj.weight": s["dot_prod_scoring.hs_proj.weight"].to(torch.float8_e4m3fn)},
        "mistyped",
        "float8_e4m3fn, not floating point",
    ),
    "no decoder": (lambda s: without(s, "transformer.decoder."), "traps", "nothing under 'transformer.decoder.'"),
    "no encoder": (lambda s: without(s, "transformer.encoder."), "traps", "nothing under 'transformer.encoder.'"),
    "no pos_embed": (lambda s: without(s, "trunk.pos_embed"), "missing", TRUNK + "pos_embed"),
    "no positional_embedding": (
        lambda s: without(s, "encoder.positional_embedding"),
        "missing",
        "encoder.positional_embedding",
    ),
    "no patches": (lambda s: without(s, "patch_embed"), "missing", TRUNK + "patch_embed.proj.weight"),
    "flat pos_embed": (lambda s: {**s, TRUNK + "pos_embed": torch.zeros(3)}, "missing", TRUNK + "pos_embed"),
    "no trunk": (lambda s: without(s, "vision_backbone."), "traps", "nothing under 'backbone.vision_backbone.'"),
    "one table": (lambda s: without(s, "blocks.0.attn.freqs_cis"), "missing", TRUNK + "blocks.0.attn.freqs_cis"),
    "no table": (lambda s: without(s, "freqs_cis"), "missing", TRUNK + "blocks.0.attn.freqs_cis"),
    "teacher": (
        lambda s: {**s, TRUNK + "model.student_trunk.stem.weight": torch.zeros(4)},
        "traps",
        "both the teacher's ViT and a student's trunk",
    ),
    "student": (_student, "traps", "neither Meta's ViT nor RepViT"),
    "transformers": (
        lambda s: {"detector_model.detr_encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)},
        "traps",
        "layout",
    ),
    "unknown": (lambda s: {"a.b": torch.zeros(3)}, "kind", "unknown"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_lint_and_export_refuse_the_same_for_the_same_reason(name: str, state: State, tmp_path: Path) -> None:
    change, field, fact = BROKEN[name]
    path = saved(tmp_path / "c.pt", {"model": prefixed("detector.", change(state))} if name != "unknown" else change(state))
    report = verdict(path)
    assert fact in str(getattr(report, field)) and not report.clean


def test_a_students_checkpoint_still_gives_its_fusion_encoder(state: State, tmp_path: Path) -> None:
    report = verdict(saved(tmp_path / "c.pt", {"model": prefixed("detector.", _student(state))}))
    assert report.kind == "EfficientSAM3" and report.exports == ("fusion encoder",) and "--module" in report.remedy
    assert checkpoint_source(tmp_path / "c.pt").config is not None


def test_a_fusion_encoder_alone_is_known(state: State, tmp_path: Path) -> None:
    own = {name.removeprefix(FUSION): value for name, value in state.items() if name.startswith(FUSION)}
    report = verdict(saved(tmp_path / "c.pt", own))
    assert report.clean and (report.kind, report.exports) == ("fusion encoder", ("fusion encoder",))


def test_shards_are_read_together_and_an_absent_weight_is_missed(state: State, tmp_path: Path) -> None:
    plain = {name: value.clone() for name, value in state.items()}
    names = list(plain)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: plain[name].contiguous() for name in own}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    listed = {name: file for file, own in parts.items() for name in own}
    index.write_text(json.dumps({"weight_map": listed}))
    assert same(loaded(index)[0], state)
    index.write_text(json.dumps({"weight_map": {**listed, "more.weight": "a.safetensors"}}))
    with pytest.raises(SourceError, match=r"does not fit its shards; in no shard: more\.weight"):
        lint(index)
    part = tmp_path / "model-00001-of-00002.safetensors"
    (tmp_path / "a.safetensors").rename(part)
    report = verdict(part)
    assert report.missing and "give model.safetensors.index.json" in report.remedy
    for content in ("[]", '{"weight_map": {"a": "../../x.safetensors"}}', '{"weight_map": {"a": "c.safetensors"}}'):
        index.write_text(content)
        with pytest.raises(SourceError):
            lint(index)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damage_makes_an_untyped_error_or_a_silent_export(data: st.DataObject, state: State, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    if not path.exists():
        saved(path, state)
    damaged = dict(state)
    for name in data.draw(st.lists(st.sampled_from(sorted(damaged)), min_size=1, max_size=3, unique=True)):
        how = data.draw(st.sampled_from(["gone", "scalar", "flat", "empty", "rows", "int", "nan", "meta", "sparse", "renamed"]))
        value = damaged.pop(name)
        changes: dict[str, Callable[[], Tensor]] = {
            "scalar": lambda: torch.tensor(1.0),
            "flat": lambda value=value: value.flatten()[None],
            "empty": lambda value=value: value[:0] if value.dim() else value[None][:0],
            "rows": lambda value=value: torch.cat([value[:1], value]) if value.dim() else value[None],
            "int": lambda value=value: value.abs().to(torch.int32),
            "nan": lambda value=value: torch.full_like(value, float("nan")),
            "meta": lambda value=value: value.to("meta"),
            "sparse": lambda value=value: value.to_sparse() if value.dim() else value[None].to_sparse(),
            "renamed": lambda value=value: value,
        }
        if how in changes:
            damaged[f"{name}_old" if how == "renamed" else name] = changes[how]()
    checkpoint = Checkpoint(path=path, state=damaged, merged=frozenset(damaged))
    judged = judge(checkpoint)
    if judged.report.clean:  # only where the shapes still describe one model
        model = load_judged(judged)
        assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values() if not value.is_complex())
        assert model.state_dict().keys() == damaged.keys()
    else:
        with pytest.raises(SourceError):
            load_judged(judged)


# precision and rotary tables (item 23)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_tables_made_real_by_a_cast_are_rebuilt(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    cast = {name: (value.real if value.is_complex() else value).to(dtype) for name, value in state.items()}
    path = saved(tmp_path / "c.pt", {"model": prefixed("detector.", cast)})
    weights, report = loaded(path)
    for name, value in state.items():
        torch.testing.assert_close(weights[name], value if value.is_complex() else value.to(dtype).float(), rtol=0, atol=1e-5)
    kind = str(dtype).removeprefix("torch.")
    assert any("2 rotary tables rebuilt" in note for note in report.notes)
    assert f"{kind} weights, exported as float32" in report.notes and verdict(path).clean


def test_rebuilt_rotary_tables_equal_sound_ones(tiny_model: nn.Module, state: State, tmp_path: Path) -> None:
    tables = {name for name in state if name.endswith("freqs_cis")}
    assert len(tables) == 2
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "pairs of numbers": torch.view_as_real,
        "an imaginary part of zero": lambda value: torch.complex(
            value.real.to(torch.bfloat16).float(), torch.zeros_like(value.real)
        ),
        "complex128": lambda value: value.to(torch.complex128),
        "complex32": lambda value: value.to(torch.complex32),
    }
    for form in forms.values():
        changed = {name: form(value) if name in tables else value for name, value in state.items()}
        weights, _ = loaded(saved(tmp_path / "c.pt", changed))
        for name in tables:
            torch.testing.assert_close(weights[name], state[name], rtol=0, atol=1e-5)


def test_rotary_tables_of_other_angles_are_kept_and_those_of_no_angles_refused(state: State, tmp_path: Path) -> None:
    name = next(name for name in state if name.endswith("freqs_cis"))
    other = {**state, name: state[name] ** 2}
    weights, report = loaded(saved(tmp_path / "c.pt", other))
    assert torch.equal(weights[name], other[name]) and any("kept as stored" in note for note in report.notes)
    report = verdict(saved(tmp_path / "c.pt", {**state, name: (state[name] ** 2).real}))
    assert f"{name} is no rotary table" in str(report.traps)


# SAM 3.1 (item 24)


def _sam31(state: State) -> State:
    convs = {name: value for name, value in state.items() if ".convs.0." in name}
    heads = {
        name.replace(".convs.", f".{head}_convs."): value
        for head in ("interactive", "propagation")
        for name, value in convs.items()
    }
    tracker = {"tracker.model.interactive_sam_mask_decoder.iou_token.weight": torch.zeros(1, 4)}
    return {**prefixed("detector.", {**without(state, ".convs.3."), **heads}), **tracker}


def test_sam_3_1_is_told_by_name_and_its_detector_is_what_can_be_exported(
    tiny_model: nn.Module, state: State, tmp_path: Path
) -> None:
    path = saved(tmp_path / "c.pt", {"model": _sam31(state)})
    report = verdict(path)
    assert report.kind == "SAM 3.1" and report.exports == ("image model", "fusion encoder")
    assert any("'tracker.' (1)" in note and "interactive_convs" in note for note in report.notes)
    cut = checkpoint_image_source(path)(ExportSpec())
    assert "SAM 3.1's detector" in cut.origin
    image = torch.randn((1, 3, cut.image_size, cut.image_size), generator=torch.Generator().manual_seed(0))
    vision = cut.components[0]
    with torch.no_grad():
        maps = copy.deepcopy(tiny_model).backbone.forward_image(image)["backbone_fpn"]  # type: ignore[union-attr,operator]
    given = vision.eager({"image": image})
    assert len(maps) == 3  # the fourth, smallest level is made and dropped by SAM3, and absent in 3.1
    torch.testing.assert_close(given["fpn_0"], maps[0])
    torch.testing.assert_close(given["image_tokens"], maps[2].flatten(2).transpose(1, 2))


def test_sam_3_1_that_lacks_a_level_is_refused(state: State, tmp_path: Path) -> None:
    report = verdict(saved(tmp_path / "c.pt", {"model": without(_sam31(state), ".convs.1.")}))
    assert report.kind == "SAM 3.1" and "convs.1." in str(report.missing)
