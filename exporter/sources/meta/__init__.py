"""Components around the code of Meta's ``sam3``, which EfficientSAM3 shares."""
