"""Names and limits of an image model's components; imports nothing."""

FUSION_ENCODER = "fusion_encoder"
DETECTOR = ("vision_encoder", "text_encoder", "prompt_encoder", FUSION_ENCODER, "decoder", "mask_head")
"""What finds everything that words or examples describe, in the order in which it runs."""

INTERACTIVE_HEAD = "interactive_head"
COMPONENTS = (*DETECTOR, INTERACTIVE_HEAD)
"""All that an image model may have; not every source has the last."""

PADDING = -10
"""Label of a row of points that is not there for its object; transformers pads objects of fewer points with it, too."""

MAX_PROMPTS = 16
MAX_BOXES = 64
MAX_POINTS = 64
MAX_IMAGES = 8
