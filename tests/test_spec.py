"""``ExportSpec``: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam3x.errors import SpecError
from sam3x.spec import DEFAULT_FEATURE_MAP_INPUTS, DEFAULT_TOKENS_INPUTS, TOKENS_INPUTS, ExportSpec, make_spec

RANGES = ("batch", "tokens", "prompt_length")


def test_defaults_are_those_of_the_documentation() -> None:
    spec = make_spec()
    assert (spec.batch, spec.tokens, spec.prompt_length) == ((1, 8), (16, 9216), (1, 77))
    assert (spec.dac, spec.pre_norm, spec.dac_dim, spec.verify) == ("runtime", "runtime", 0, "final")
    assert spec.inputs == DEFAULT_TOKENS_INPUTS


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize(
    ("given", "expected"),
    [(4, (4, 4)), ((2, 6), (2, 6)), ([2, 6], (2, 6)), ("4", (4, 4)), ("2:6", (2, 6)), (" 2 : 6 ", (2, 6))],
)
def test_range_forms(name: str, given: object, expected: tuple[int, int]) -> None:
    assert getattr(make_spec(**{name: given}), name) == expected


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize(
    "given", ["8:1", (8, 1), 0, -2, "0:4", "a:b", "1:2:3", "", ":", "1:", 1.5, (1, 2.5), (1, 2, 3), (), True, None, "-1"]
)
def test_bad_ranges_are_refused_by_name(name: str, given: object) -> None:
    with pytest.raises(SpecError, match=rf"step 1/4 spec: {name}") as caught:
        make_spec(**{name: given})
    assert "\n" not in str(caught.value)


@given(
    low=st.integers(-5, 10_000),
    high=st.integers(-5, 10_000),
    name=st.sampled_from(RANGES),
    form=st.sampled_from(["tuple", "text"]),
)
def test_a_range_is_kept_exactly_or_refused(low: int, high: int, name: str, form: str) -> None:
    value = (low, high) if form == "tuple" else f"{low}:{high}"
    if 1 <= low <= high:
        assert getattr(make_spec(dac=False, **{name: value}), name) == (low, high)
    else:
        with pytest.raises(SpecError):
            make_spec(dac=False, **{name: value})


@given(
    low=st.integers(1, 99), high=st.integers(1, 99), dac=st.sampled_from(["runtime", True, False]), dim=st.sampled_from([0, 1])
)
def test_dac_is_refused_exactly_where_no_size_can_be_halved(low: int, high: int, dac: object, dim: int) -> None:
    low, high = sorted((low, high))
    has_even = high > low or low % 2 == 0
    dims = {"batch": (low, high)} if dim == 0 else {"tokens": (low, high)}
    if has_even or dac is not True:
        spec = make_spec(dac=dac, dac_dim=dim, **dims)
        off = not has_even and dac == "runtime"  # a flag that cannot be on is none, and the notes say so
        assert (spec.dac, len(spec.notes)) == (False if off else dac, int(off))
    else:
        with pytest.raises(SpecError, match="dac halves"):
            make_spec(dac=dac, dac_dim=dim, **dims)


def test_dac_with_post_norm_is_a_contradiction() -> None:
    with pytest.raises(SpecError, match="ignores dac"):
        make_spec(dac=True, pre_norm=False)


@given(st.permutations(TOKENS_INPUTS), st.sets(st.sampled_from(TOKENS_INPUTS[2:])))
def test_inputs_come_in_graph_order_whatever_was_typed(order: list[str], optional: set[str]) -> None:
    wanted = [name for name in order if name in optional or name in ("tgt", "memory")]
    expected = tuple(name for name in TOKENS_INPUTS if name in wanted)
    assert make_spec(inputs=wanted).inputs == expected
    assert make_spec(inputs=", ".join(wanted)).inputs == expected


@pytest.mark.parametrize(
    ("inputs", "fact"),
    [
        ("tgt,memory,colour", "'colour' is not an input"),
        ("tgt,memory,memory", "given twice"),
        ("tgt", "'memory' is required"),
        ("memory,pos", "'tgt' is required"),
        ("tgt,memory,src", "'src' is not an input of the tokens interface"),
    ],
)
def test_bad_inputs(inputs: str, fact: str) -> None:
    with pytest.raises(SpecError, match=fact):
        make_spec(inputs=inputs)


def test_feature_maps_have_their_own_inputs() -> None:
    assert make_spec(interface="feature_maps").inputs == DEFAULT_FEATURE_MAP_INPUTS
    with pytest.raises(SpecError, match="feature_maps interface"):
        make_spec(interface="feature_maps", inputs="tgt,memory")


@pytest.mark.parametrize(
    "options",
    [
        {"dac": "perhaps"},
        {"pre_norm": "perhaps"},
        {"dac_dim": 2},
        {"verify": "twice"},
        {"interface": "video"},
        {"mask_dtype": "float16"},
        {"seed": "x"},
        {"colour": 1},
        {"feature_sizes": "72"},
    ],
)
def test_unknown_values_and_options_name_themselves(options: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=f"step 1/4 spec: .*{next(iter(options))}"):
        make_spec(**options)


def test_a_spec_is_frozen_and_survives_json() -> None:
    spec = make_spec(batch=4, dac=False, inputs="memory,tgt", pre_norm="per-layer")
    assert ExportSpec(**spec.model_dump(mode="json")) == spec
    with pytest.raises(ValueError, match="frozen"):
        spec.batch = (1, 2)  # type: ignore[misc]


def test_feature_sizes_are_read_from_text() -> None:
    maps = ("src", "src_pos", "prompt")
    assert make_spec(interface="feature_maps", inputs=maps, feature_sizes="72x72, 36X36").feature_sizes == ((72, 72), (36, 36))
    with pytest.raises(SpecError, match="feature_sizes: expected HxW for each level"):
        make_spec(interface="feature_maps", inputs=maps, feature_sizes="72x0")
