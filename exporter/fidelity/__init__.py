"""How right an exported pipeline is: its answers against annotated pictures, and against those of another precision."""
