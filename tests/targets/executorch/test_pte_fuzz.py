"""Random small encoders and requests through the ExecuTorch target, against Meta's own layers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sam3x
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.spec import make_spec
from support.upstream import assert_equal_to_upstream, encoder_of

CONFIGS = st.fixed_dictionaries(
    {
        "num_heads": st.sampled_from([1, 2, 4, 8]),
        "pos_enc_at_attn": st.booleans(),
        "pos_enc_at_cross_attn_queries": st.booleans(),
        "pos_enc_at_cross_attn_keys": st.booleans(),
        "activation": st.sampled_from(["relu", "gelu"]),
    }
)
REQUESTS = st.fixed_dictionaries(
    {
        "dac": st.sampled_from(["runtime", False]),
        "pre_norm": st.sampled_from(["runtime", True, False]),
        "inputs": st.sets(st.sampled_from(["memory_key_padding_mask", "query_pos", "pos", "memory_mask"])),
        "tokens": st.sampled_from([9, (4, 40)]),
        "prompt_length": st.sampled_from([5, (1, 12)]),
        "mask_dtype": st.sampled_from(["bool", "float32"]),
    }
)


@settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(config=CONFIGS, request=REQUESTS, batch=st.integers(1, 2), padding=st.sampled_from(["none", "some"]))
def test_any_encoder_and_request(config: dict[str, Any], request: dict[str, Any], batch: int, padding: str) -> None:
    encoder = encoder_of(1, **config)
    names = ("tgt", "memory", *sorted(request["inputs"]))
    with tempfile.TemporaryDirectory() as folder:
        artifact = sam3x.export(
            encoder, target="pte", output=Path(folder) / "out", **{**request, "inputs": names, "batch": (1, 2)}
        )
        assert artifact.manifest.verified and artifact.manifest.metadata["delegated_flops"] > 0.95
        spec = make_spec(**artifact.manifest.spec)
        sizes = Sizes(batch=batch, tokens=9, prompt_length=5, padding=padding)
        inputs = make_inputs(spec.inputs, spec, 32, sizes, seed=5)
        for dac in (False, True) if batch == 2 and request["dac"] == "runtime" else (False,):
            for pre_norm in (False, True) if request["pre_norm"] == "runtime" else (request["pre_norm"],):
                flags = {"dac": dac, "pre_norm": pre_norm}
                given_flags = {name: value for name, value in flags.items() if name in artifact.manifest.input_names}
                got = artifact.run({**inputs, **given_flags})["output"]
                assert_equal_to_upstream(got, encoder.layers, inputs, **flags)
