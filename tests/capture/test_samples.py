"""What an export is verified on has every branch in it, whatever the ranges."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from sam3x.capture.samples import samples_for, verification_sizes
from sam3x.spec import make_spec

SIZES = st.tuples(st.integers(1, 9), st.integers(0, 4)).map(lambda drawn: (drawn[0], drawn[0] + drawn[1]))


@given(batch=SIZES, tokens=SIZES, dac=st.sampled_from([True, "runtime"]), dac_dim=st.sampled_from([0, 1]))
@example(batch=(5, 8), tokens=(7, 7), dac=True, dac_dim=0)
@example(batch=(1, 4), tokens=(7, 7), dac=True, dac_dim=0)
@example(batch=(2, 2), tokens=(65, 66), dac="runtime", dac_dim=1)
def test_a_range_with_an_even_size_has_samples_of_dac(
    batch: tuple[int, int], tokens: tuple[int, int], dac: Any, dac_dim: int
) -> None:
    low, high = batch if dac_dim == 0 else tokens
    if low == high and low % 2:
        return  # dac is off, or refused
    spec = make_spec(batch=batch, tokens=tokens, dac=dac, dac_dim=dac_dim)
    flags = ("dac",) if dac == "runtime" else ()
    samples = samples_for(("tgt", "memory", *flags), flags, spec, 4, 1, verification_sizes(spec))
    found = {sample.branch for sample in samples}
    assert found == ({"dac=True", "dac=False"} if dac == "runtime" else {"fixed"})
    peaked = [size for size in verification_sizes(spec, peaked=True) if size.peaked]
    assert len(samples_for(("tgt", "memory", *flags), flags, spec, 4, 1, peaked)) >= 1
    for sample in samples:
        size = sample.inputs["tgt"].shape[dac_dim]
        assert low <= size <= high and (size % 2 == 0 or sample.branch == "dac=False")
