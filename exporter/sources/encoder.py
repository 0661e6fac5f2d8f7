"""Where an encoder comes from: SAM3's own hyper-parameters with seeded weights, a checkpoint, a live module or a factory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.errors import Sam3xError, SourceError
from sam3x.fusion.config import FusionConfig, make_config
from sam3x.fusion.encoder import FusionEncoder, fitted_spec, layers_of
from sam3x.fusion.shadow import check_module, shadow_of
from sam3x.sources.checkpoint import Checkpoint, read_checkpoint
from sam3x.sources.contract import Component, Expected, Model, Port, SourceFactory
from sam3x.sources.fusion_part import find_encoder, hyper_parameters, load_weights
from sam3x.sources.names import FUSION_ENCODER
from sam3x.spec import ExportSpec

_CHUNK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An encoder and where it came from.

    module: used as it is, never changed. origin: one readable phrase, kept in the manifest.
    config: None for a live module. weights_sha256: over the state dict, see ``weights_hash``.
    """

    module: nn.Module
    origin: str
    config: FusionConfig | None
    weights_sha256: str


def encoder_factory(encoder: Any) -> SourceFactory:
    """A fusion encoder by itself as a model of one component.

    Args:
        encoder: see ``source_for``.
    """

    def build(spec: ExportSpec, expected: Expected | None = None) -> Model:
        if encoder is None and expected is not None:
            expected.check(origin=_default_origin(spec.seed))
        source = source_for(encoder, spec.seed)
        if expected is not None:
            expected.check(weights_sha256=source.weights_sha256)
        spec = fitted_spec(source.module, spec)
        return Model(
            components=(encoder_component(FusionEncoder(source.module, spec)),),
            origin=source.origin,
            weights_sha256=source.weights_sha256,
            spec=spec,
        )

    return build


def encoder_component(encoder: FusionEncoder) -> Component:
    """``encoder`` between inputs and outputs of its own names, every flag that is an input open."""
    return Component(
        name=FUSION_ENCODER,
        module=encoder,
        inputs=tuple(Port(name=name, dims=encoder.dims(name)) for name in encoder.input_names),
        outputs=encoder.output_names,
        ranges=encoder.spec.ranges,
    )


def _default_origin(seed: int) -> str:
    return f"random weights, seed {seed}, SAM3 hyper-parameters"


def default_source(seed: int) -> Source:
    """SAM3's own encoder (Meta's classes) with random weights that differ in every layer; the same for the same seed.

    Raises:
        SourceError: Meta's sam3 package cannot be imported.
    """
    config = FusionConfig()
    encoder = build_encoder(config)
    draw_weights(encoder, seed)
    return Source(
        module=encoder.eval(),
        origin=_default_origin(seed),
        config=config,
        weights_sha256=weights_hash(encoder),
    )


def checkpoint_source(path: str | Path, weights_key: str | None = None, **overrides: Any) -> Source:
    """The fusion encoder in a SAM3 or EfficientSAM3 checkpoint.

    Args:
        weights_key: which weights of a file that has several, see ``read_checkpoint``.
        overrides: ``FusionConfig`` fields, for what shapes cannot tell (num_heads, pre_norm, activation, position flags).

    Raises:
        SourceError: the file, its keys or its weights are not those of a fusion encoder.
    """
    return encoder_in(read_checkpoint(path, weights_key), **overrides)


def encoder_in(checkpoint: Checkpoint, **overrides: Any) -> Source:
    """The fusion encoder in a checkpoint that has been read; see ``checkpoint_source``.

    Raises:
        SourceError: it has none, or its weights are missing, unexpected, mis-shaped or not finite.
    """
    subject = str(checkpoint.path)
    found = find_encoder(checkpoint.state, subject)
    checkpoint.check_bytes(f"{found.prefix}{name}" for name in found.state)
    given = {name: value for name, value in overrides.items() if value is not None}
    config = make_config(subject, **{**hyper_parameters(found, subject), **given})
    encoder = build_encoder(config, device="meta")
    converted = load_weights(encoder, found, subject)
    place = f"keys under '{found.prefix}'" if found.prefix else "keys without a prefix"
    origin = ", ".join([f"checkpoint {checkpoint.path.name}", *checkpoint.notes, place, *([converted] if converted else [])])
    return Source(module=encoder.eval(), origin=origin, config=config, weights_sha256=weights_hash(encoder))


def source_for(encoder: Any, seed: int) -> Source:
    """The source of whatever a caller may hand over: a ``Source``, a module, layers, or None for the seeded default.

    Raises:
        SourceError: it is none of these.
    """
    if encoder is None:
        return default_source(seed)
    if isinstance(encoder, Source):
        return encoder
    if isinstance(encoder, (list, tuple)) and all(isinstance(layer, nn.Module) for layer in encoder):
        return module_source(nn.ModuleList(encoder), f"list of {len(encoder)} layers")
    if isinstance(encoder, nn.Module):
        return module_source(encoder, f"{type(encoder).__module__}.{type(encoder).__qualname__}")
    raise SourceError(f"expected an nn.Module, a list of layers or a Source, got {type(encoder).__name__}")


def module_source(module: nn.Module | Sequence[nn.Module], origin: str) -> Source:
    """A live module, or a list of layers, as it is.

    Raises:
        SourceError: it is no fusion encoder, or its weights cannot be read.
    """
    try:
        layers = layers_of(module)
    except (TypeError, ValueError) as error:  # inspect.signature on a compiled or scripted forward
        fact = f"{type(module).__name__} does not tell what its forward takes ({reason_of(error)})"
        raise SourceError(fact, remedy="Pass the module before it was scripted.") from error
    whole = module if isinstance(module, nn.Module) else nn.ModuleList(layers)
    check_module(whole)
    shadow = shadow_of(whole)  # the same whatever wraps it
    registered = set(map(id, shadow.modules()))
    loose = [layer for layer in layers_of(shadow) if id(layer) not in registered]
    return Source(
        module=whole,
        origin=origin,
        config=None,
        weights_sha256=weights_hash(nn.ModuleList([shadow, *loose]) if loose else shadow),
    )


def factory_source(name: str) -> Source:
    """What ``package.module:factory`` returns when called with no arguments: a module or a list of layers.

    Raises:
        SourceError: the name, the import, the call or its result is wrong.
    """
    return module_source(call_factory(name), f"module {name}")


def call_factory(name: str) -> nn.Module:
    """Import and call ``package.module:factory``.

    The current directory is importable, as with ``python -m``. What the factory prints goes to stderr.

    Raises:
        SourceError: the name, the import, the call or its result is wrong.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute or not all(part.isidentifier() for part in f"{module_name}.{attribute}".split(".")):
        raise _factory_error(name, "is not of the form package.module:factory", "Give e.g. my_model:build_encoder.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    with contextlib.redirect_stdout(sys.stderr):
        factory = _import(name, module_name, attribute)
        result = _call(name, factory)
    if isinstance(result, (list, tuple)) and all(isinstance(layer, nn.Module) for layer in result):
        result = nn.ModuleList(result)
    if not isinstance(result, nn.Module):
        raise _factory_error(name, f"returned {type(result).__name__}", "Return an nn.Module or a list of layers.")
    return result


def _factory_error(name: str, fact: str, remedy: str) -> SourceError:
    return SourceError(f"--module {name} {fact}", remedy=remedy)


def reason_of(error: BaseException) -> str:
    """The kind of an error and its first line."""
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _import(name: str, module_name: str, attribute: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # only a prefix of what was asked for says that the module itself is missing
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise _factory_error(
                name, f"names no module: {error}", "Run from the folder that holds it, or install it."
            ) from error
        raise _factory_error(
            name, f"was found, but {module_name} imports something missing: {error}", "Install that."
        ) from error
    except Sam3xError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise _factory_error(
            name, f"was found, but importing {module_name} raised {reason_of(error)}", "Mend that module."
        ) from error
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        public = [item for item in vars(module) if callable(vars(module)[item]) and not item.startswith("_")]
        raise _factory_error(
            name, f"was found, but {module_name} has no '{attribute}'", f"It has: {', '.join(public[:8]) or 'no functions'}."
        ) from error


def _call(name: str, factory: Any) -> Any:
    if isinstance(factory, (nn.Module, list, tuple)):
        return factory
    if not callable(factory):
        raise _factory_error(
            name, f"is of type {type(factory).__name__}, not a function", "Name a function that returns the encoder."
        )
    try:
        return factory()
    except Sam3xError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise _factory_error(name, f"raised {reason_of(error)} when called with no arguments", "Mend the factory.") from error


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Neither the global random state, stdout nor the user's terminal shows that upstream is imported and built."""
    state = random.getstate()  # importing sam3 draws from it
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)


def build_encoder(config: FusionConfig, device: str = "cpu") -> nn.Module:
    """Meta's own ``TransformerEncoderFusion``, built as upstream's model builder does; ``device="meta"`` allocates nothing.

    Raises:
        SourceError: the sam3 package, or something it needs, is missing.
    """
    with untouched():
        try:
            from sam3.model.encoder import TransformerEncoderFusion, TransformerEncoderLayer
            from sam3.model.model_misc import MultiheadAttentionWrapper
        except Exception as error:  # forks of the package raise RuntimeError for a missing video reader
            fact = f"Meta's sam3 package cannot be imported ({reason_of(error)})"
            raise SourceError(fact, remedy='Install it: pip install "sam3x[sam3]".') from error
        with torch.device(device):
            attention = [
                MultiheadAttentionWrapper(
                    num_heads=config.num_heads, dropout=config.dropout, embed_dim=config.d_model, batch_first=True
                )
                for _ in range(2)
            ]
            layer = TransformerEncoderLayer(
                activation=config.activation,
                d_model=config.d_model,
                dim_feedforward=config.dim_feedforward,
                dropout=config.dropout,
                pos_enc_at_attn=config.pos_enc_at_attn,
                pos_enc_at_cross_attn_keys=config.pos_enc_at_cross_attn_keys,
                pos_enc_at_cross_attn_queries=config.pos_enc_at_cross_attn_queries,
                pre_norm=config.pre_norm,
                self_attention=attention[0],
                cross_attention=attention[1],
            )
            encoder = TransformerEncoderFusion(
                layer=layer,
                num_layers=config.num_layers,
                d_model=config.d_model,
                num_feature_levels=config.num_feature_levels,
                frozen=False,
                use_act_checkpoint=True,
                add_pooled_text_to_img_feat=config.add_pooled_text_to_img_feat,
                pool_text_with_mask=config.pool_text_with_mask,
            )
    return encoder.float()  # whatever torch.set_default_dtype says


def draw_weights(encoder: nn.Module, seed: int) -> None:
    """Unit-scale weights, drawn for each parameter in turn from a generator of their own.

    Matrices normal with std 1/√fan_in, norm weights around 1, biases small and not zero.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    norms = {f"{name}.weight" for name, child in encoder.named_modules() if isinstance(child, nn.LayerNorm)}
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            if name in norms:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.1 * noise)


def weights_hash(module: nn.Module) -> str:
    """sha256 over the state dict's names, dtypes, shapes and bytes, in the order of the names.

    Raises:
        SourceError: a weight has no bytes to read (meta device, sparse, quantized).
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict(keep_vars=True).items()):
        if not isinstance(value, Tensor):
            continue  # extra state that is no tensor
        try:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            for chunk in _bytes_of(value.detach()):
                digest.update(chunk)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            fact = f"the values of {name} cannot be read ({value.dtype}, {value.layout}, on {value.device})"
            raise SourceError(fact, remedy="Load the weights as plain tensors first.") from error
    return digest.hexdigest()


def _bytes_of(value: Tensor) -> Iterator[memoryview]:
    flat = value.reshape(-1)
    step = max(1, _CHUNK // value.element_size())
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step].contiguous().cpu().resolve_conj().resolve_neg()
        yield chunk.view(torch.uint8).numpy().data
