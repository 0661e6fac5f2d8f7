"""The words of an error, made of its fields in one place."""

from __future__ import annotations

import inspect
import pickle

import pytest

from sam3x import errors
from sam3x.errors import ArtifactError, LoweringError, Sam3xError, SpecError, Step, TargetError, did_you_mean

CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, Sam3xError)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SpecError("the batch is odd"), "step 1/4 spec: the batch is odd."),
        (SpecError("got 0", subject="--batch", step=Step.BENCH), "bench: --batch: got 0."),
        (
            LoweringError("no form for x", subject="trt", remedy="Use --target onnx."),
            "step 4/4 lower: trt: no form for x. Use --target onnx.",
        ),
        (TargetError("it says: 'stop.'"), "it says: 'stop.'."),
        (TargetError("the runtime says: stop."), "the runtime says: stop."),
        (ArtifactError("x is gone", remedy="Export it: sam3x export -o x"), "load: x is gone. Export it: sam3x export -o x"),
    ],
)
def test_step_subject_fact_and_remedy_become_one_message(error: Sam3xError, words: str) -> None:
    assert str(error) == words


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[Sam3xError]) -> None:
    error = kind("fact", subject="subject", remedy="Remedy.", step=Step.RUN)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) == "run: subject: fact. Remedy."
    assert (again.step, again.subject, again.fact, again.remedy) == (Step.RUN, "subject", "fact", "Remedy.")


def test_the_nearest_name_is_suggested_and_a_far_one_is_not() -> None:
    assert did_you_mean("onix", ("pte", "onnx")) == "Did you mean 'onnx'?"
    assert did_you_mean("coreml", ("pte", "onnx")) == ""
