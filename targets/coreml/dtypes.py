"""Element types of Core ML's inputs and outputs."""

from __future__ import annotations

DTYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}
"""``ArrayFeatureType.ArrayDataType`` of Core ML's FeatureTypes.proto → numpy's name."""

OUTPUT_DTYPES = "sam3x.output_dtypes"
"""Key of a package's own metadata: JSON of the outputs whose elements are no float32, as masks, which Core ML gives in it."""
