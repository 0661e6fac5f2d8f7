"""EfficientSAM3's checkpoints: the student they hold, told by names and shapes, and built by the installed package."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.sources import adaptations
from sam3x.sources.encoder import reason_of, untouched
from sam3x.sources.state import INTERACTIVE, TEXT, TRUNK, is_vit

INSTALL = 'Install EfficientSAM3\'s: pip install "sam3 @ git+https://github.com/SimonZeng7108/efficientsam3#subdirectory=sam3".'
_READER = "Install what it needs; EfficientSAM3's wants a video reader: pip install opencv-python-headless."
_WRAPPER = "student_trunk."
_PLACES = f"{TEXT}positional_embedding.pos_embed.pos_embed"
_TRUNKS: dict[str, tuple[str, str, dict[int, str]]] = {
    "RepViT": ("repvit", "features.", {384: "m0.9", 512: "m1.1", 640: "m2.3"}),
    "TinyViT": ("tinyvit", "patch_embed.", {320: "5m", 448: "11m", 576: "21m"}),
    "EfficientViT": ("efficientvit", "input_stem.", {128: "b0", 256: "b1", 384: "b2"}),
}
"""Name → the builder's ``backbone_type``, what a name in it begins with, channels of its last layer → ``model_name``."""
_TEXTS = {(512, 4): "MobileCLIP-S0", (512, 12): "MobileCLIP-S1", (768, 12): "MobileCLIP2-L"}
"""(width, attention layers) → ``text_encoder_type``; MobileCLIP-B has S1's shapes, and a causal mask that no release uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """The arguments of the package's builders.

    Attributes:
        trunk: name of its family; None for Meta's ViT (LiteText). backbone_type, model_name: of the trunk, for the builder.
        text: ``text_encoder_type``; None for Meta's text encoder. context_length: most tokens of a text.
        interactive: whether the checkpoint has the head for clicks.
    """

    trunk: str | None
    backbone_type: str | None
    model_name: str | None
    text: str | None
    context_length: int
    interactive: bool

    @property
    def metadata(self) -> dict[str, str]:
        """What ``sam3x lint`` tells of it."""
        text = f"{self.text}, {self.context_length} tokens" if self.text else "Meta's"
        return {"trunk": f"{self.trunk} {self.model_name}" if self.trunk else "Meta's ViT", "text encoder": text}

    @property
    def description(self) -> str:
        """One phrase for the manifest."""
        trunk = f"EfficientSAM3 {self.trunk} {self.model_name}" if self.trunk else "SAM3-LiteText"
        return f"{trunk}, {self.text or 'text encoder of SAM3'}{', interactive head' if self.interactive else ''}"


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the segment that training puts around a student's trunk."""
    return {name.replace(_WRAPPER, "") if name.startswith(TRUNK) else name: value for name, value in state.items()}


def student_of(state: Mapping[str, Tensor], file: str) -> Student:
    """Tell the student from its weights' names and shapes.

    Args:
        state: as ``unwrapped`` gives it.
        file: name of the checkpoint. LiteText's hold 77 positions, and ``ctx16`` in their names says how many were trained.

    Raises:
        SourceError: a trunk or a text encoder of no release.
    """
    trunk = None if is_vit(state) else _trunk(state)
    text, length = _text(state)
    named = re.search(r"ctx(\d+)", file)
    if text is not None and named:
        length = min(length, int(named[1]))
    backbone, name = (None, None) if trunk is None else (_TRUNKS[trunk[0]][0], trunk[1])
    return Student(
        trunk=None if trunk is None else trunk[0],
        backbone_type=backbone,
        model_name=name,
        text=text,
        context_length=length,
        interactive=any(key.startswith(INTERACTIVE) for key in state),
    )


def _trunk(state: Mapping[str, Tensor]) -> tuple[str, str]:
    body = f"{TRUNK}model.backbone.model."
    last = state.get(f"{TRUNK}model.head.0.weight")
    for family, (_, begins, names) in _TRUNKS.items():
        if any(key.startswith(body + begins) for key in state):
            width = 0 if last is None or last.dim() != 4 else int(last.shape[1])
            if width in names:
                return family, names[width]
            raise SourceError(f"a {family} trunk of {width or 'unknown'} channels, which no release of EfficientSAM3 has")
    raise SourceError("a trunk that is neither Meta's ViT nor RepViT, TinyViT or EfficientViT")


def _text(state: Mapping[str, Tensor]) -> tuple[str | None, int]:
    own = state.get(f"{TEXT}positional_embedding")
    if own is not None:
        return None, len(own)
    places = state.get(_PLACES)
    if places is None or places.dim() != 4:
        raise SourceError("a text encoder that is neither Meta's nor a MobileCLIP")
    found = (re.match(rf"{re.escape(TEXT)}transformer\.(\d+)\.pre_norm_mha\.", key) for key in state)
    layers = len({match[1] for match in found if match})
    width, length = int(places.shape[-1]), int(places.shape[-2])
    if (width, layers) not in _TEXTS:
        raise SourceError(f"a MobileCLIP of width {width} and {layers} attention layers, which no release of EfficientSAM3 has")
    return _TEXTS[width, layers], length


def fitted(state: Mapping[str, Tensor], student: Student) -> dict[str, Tensor]:
    """Return the weights with the positions that the package keeps of a longer table: the first ``context_length``."""
    places = {} if student.text is None else {_PLACES: state[_PLACES][:, :, : student.context_length]}
    return {**state, **places}


def build_student(student: Student) -> nn.Module:
    """Build the model, with weights of nobody's, by the installed ``sam3`` package.

    Raises:
        SourceError: the package is missing, is Meta's, or cannot build it.
    """
    missing = importlib.util.find_spec("sam3") is None
    with untouched(), adaptations.numbers_on_cpu():
        try:
            from sam3 import model_builder
        except Exception as error:  # without a video reader EfficientSAM3's package raises RuntimeError
            fact = f"the sam3 package, which builds {student.description}, cannot be imported ({reason_of(error)})"
            raise SourceError(fact, remedy=INSTALL if missing else _READER) from error
        name = "build_sam3_image_model" if student.trunk is None else "build_efficientsam3_image_model"
        build: Any = getattr(model_builder, name, None)
        if build is None or "text_encoder_type" not in inspect.signature(build).parameters:
            raise SourceError(f"the installed sam3 package is Meta's, which cannot build {student.description}", remedy=INSTALL)
        trunk = {"backbone_type": student.backbone_type, "model_name": student.model_name} if student.trunk else {}
        try:
            return build(
                device="cpu",
                eval_mode=True,
                load_from_HF=False,
                enable_inst_interactivity=student.interactive,
                text_encoder_type=student.text,
                text_encoder_context_length=student.context_length,
                **trunk,
            ).float()
        except Exception as error:  # whatever a package of others raises
            fact = f"the installed sam3 package cannot build {student.description} ({reason_of(error)})"
            raise SourceError(fact) from error
