"""What the HTML pages of ``sam3x bench`` and ``sam3x doctor`` share. May import nothing of sam3x."""
