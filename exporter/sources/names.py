"""Names and limits of an image model's components; imports nothing."""

FUSION_ENCODER = "fusion_encoder"
COMPONENTS = ("vision_encoder", "text_encoder", "prompt_encoder", FUSION_ENCODER, "decoder", "mask_head")
"""In the order in which they run."""

MAX_PROMPTS = 16
MAX_BOXES = 64
MAX_IMAGES = 8
