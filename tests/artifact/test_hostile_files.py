"""Files made to harm, or harmed: each ends in one typed sentence, and nothing is executed, filled, followed or lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import save_file
from torch import Tensor, nn

import sam3x
from sam3x.artifact.files import sha256_of
from sam3x.errors import ArtifactError, Sam3xError, SourceError
from sam3x.pipeline import job
from sam3x.sources.encoder import checkpoint_source
from support.folders import contents, edit_manifest
from support.upstream import encoder_of

GRAPH = "fusion_encoder.onnx"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dict(encoder_of(2).state_dict())


@pytest.fixture
def checkpoint(state: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "sam3.pt"
    torch.save(state, path)
    return path


@pytest.fixture
def artifact(default_artifact: Path, tmp_path: Path) -> Path:
    """A copy of an exported folder, to be harmed."""
    return Path(shutil.copytree(default_artifact, tmp_path / "out"))


# ---- checkpoints


def test_a_zip_bomb(checkpoint: Path, tmp_path: Path) -> None:
    """Compressed a thousandfold; torch.load alone would unpack it."""
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(checkpoint) as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, b"\0" * 50_000_000 if name.endswith("data/0") else good.read(name))
    assert bomb.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError, match=r"bomb\.pt holds compressed records.*refused"):
        checkpoint_source(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


def test_records_that_overlap(checkpoint: Path) -> None:
    """Every entry of the directory points to the same bytes."""
    data = bytearray(checkpoint.read_bytes())
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    entry = data.find(b"PK\x01\x02")
    while entry != -1:
        data[entry + 20 : entry + 28] = struct.pack("<II", largest.file_size, largest.file_size)
        entry = data.find(b"PK\x01\x02", entry + 4)
    checkpoint.write_bytes(data)
    with pytest.raises(SourceError, match=r"records that overlap, a zip bomb: refused"):
        checkpoint_source(checkpoint)


def test_a_tensor_larger_than_its_bytes(state: dict[str, Tensor], tmp_path: Path) -> None:
    """A stride of 0 makes a terabyte of one number."""
    path = tmp_path / "c.pt"
    huge = {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}
    huge["layers.0.linear1.weight"] = torch.zeros(1).expand(10**9, 32)
    torch.save(huge, path)
    with pytest.raises(SourceError, match=r"has \d+ values and stores 4 bytes"):
        checkpoint_source(path)


def test_one_storage_as_the_weights_of_a_thousand_layers(state: dict[str, Tensor], tmp_path: Path) -> None:
    shared = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith("layers.0.")}
    path = tmp_path / "c.pt"
    torch.save({f"layers.{i}.{name}": value for i in range(1000) for name, value in shared.items()}, path)
    with pytest.raises(SourceError, match=r"describes weights of \d+ bytes in a file of \d+"):
        checkpoint_source(path)


def test_tied_layers_are_no_bomb(state: dict[str, Tensor], tmp_path: Path) -> None:
    shared = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith("layers.0.")}
    path = tmp_path / "c.pt"
    torch.save({f"layers.{i}.{name}": value for i in range(6) for name, value in shared.items()}, path)
    assert checkpoint_source(path, num_heads=4).config is not None


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_every_flipped_bit_of_a_header_and_some_of_the_rest(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    """A typed error, or (a byte nobody reads) the same weights; in a .pt never other weights."""
    path = tmp_path / ("c.pt" if form == "zip" else "c.safetensors")
    torch.save(state, path) if form == "zip" else save_file(state, path)
    whole = path.read_bytes()
    right = checkpoint_source(path, num_heads=4).weights_sha256
    header = 700 if form == "zip" else 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 23), *range(header, len(whole), len(whole) // 40)]
    refused = 0
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = checkpoint_source(path, num_heads=4).weights_sha256
        except SourceError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert found == right or (form == "safetensors" and place >= header), place
    assert refused > len(places) / 4


@pytest.mark.parametrize(
    "change",
    [
        lambda header: {**header, "level_embed": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}},
        lambda header: {n: {**v, "data_offsets": [v["data_offsets"][0], v["data_offsets"][1] + 4]} for n, v in header.items()},
        lambda header: {n: {**v, "data_offsets": [0, v["data_offsets"][1] - v["data_offsets"][0]]} for n, v in header.items()},
        lambda header: {n: {**v, "shape": [2, *v["shape"]]} for n, v in header.items()},
        lambda header: {n: {**v, "shape": [-1, *v["shape"]]} for n, v in header.items()},
        lambda header: {n: {**v, "dtype": "F128"} for n, v in header.items()},
        lambda header: {n: {**v, "dtype": "F16"} for n, v in header.items()},
        lambda header: [],
    ],
    ids=["terabytes", "past the end", "overlapping", "twice", "negative", "unknown dtype", "half", "no dict"],
)
def test_a_safetensors_header_that_lies(change: Callable[[Any], Any], state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.dumps(change(json.loads(whole[8:end]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    with pytest.raises(SourceError, match="damaged, cut short, or no safetensors file"):
        checkpoint_source(path)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_an_impossible_length(length: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(state, path)
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(SourceError, match=r"c\.safetensors"):
        checkpoint_source(path)


def test_a_refused_checkpoint_leaves_an_earlier_export_alone(checkpoint: Path, artifact: Path) -> None:
    from typer.testing import CliRunner

    from sam3x.cli.app import app

    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    before = contents(artifact)
    result = CliRunner().invoke(app, ["export", "--checkpoint", str(checkpoint), "-o", str(artifact), "-q"])
    assert result.exit_code == 2
    assert contents(artifact) == before


# ---- artifacts changed after the export


def test_an_edited_manifest_is_refused_by_name(artifact: Path) -> None:
    edit_manifest(artifact, seal=False, spec=lambda spec: {**spec, "batch": [1, 800]})
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed after the export"):
        sam3x.load(artifact)


def test_a_manifest_is_told_by_what_it_says_not_by_its_spaces(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert sam3x.load(artifact).manifest.verified


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "[" * 100_000, '{"schema_version": 2}', '{"schema_version": 1}', "\0", "{" + '"a":' * 50_000, "1e999"],
    ids=lambda text: text[:12],
)
def test_manifests_that_are_none(text: str, artifact: Path) -> None:
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        sam3x.load(artifact)


def test_every_flipped_bit_of_a_folder(artifact: Path) -> None:
    for path in sorted(artifact.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            if path.suffix == ".json" and whole[place : place + 1].isspace():
                continue
            with pytest.raises(Sam3xError, match=path.name):
                sam3x.load(artifact)
        path.write_bytes(whole)
    sam3x.load(artifact)


def test_a_manifest_that_names_no_graph(artifact: Path) -> None:
    """Else the graph would be run unchecked."""
    edit_manifest(artifact, seal=True, files=lambda _: {})
    with pytest.raises(ArtifactError, match=f"does not name {GRAPH}"):
        sam3x.load(artifact)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "way/secret", ""])
def test_a_manifest_that_names_files_elsewhere(name: str, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (artifact / "way").symlink_to(tmp_path)
    digest = sha256_of(tmp_path / "secret")
    edit_manifest(artifact, seal=True, files=lambda files: {**files, name: digest})
    with pytest.raises(ArtifactError, match="outside"):
        sam3x.load(artifact)


def test_nested_files_are_loaded_and_checked(artifact: Path) -> None:
    (artifact / "1").mkdir()
    plan = artifact / "1" / "model.plan"
    plan.write_text("plan")
    edit_manifest(artifact, seal=True, files=lambda files: {**files, "1/model.plan": sha256_of(plan)})
    assert sam3x.load(artifact).manifest.files["1/model.plan"] == sha256_of(plan)
    plan.write_text("other")
    with pytest.raises(ArtifactError, match=r"1/model\.plan was changed after the export"):
        sam3x.load(artifact)


def test_linked_files_are_refused(artifact: Path, tmp_path: Path) -> None:
    (artifact / GRAPH).rename(tmp_path / "elsewhere.onnx")
    (artifact / GRAPH).symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ArtifactError, match=rf"{GRAPH} is a symbolic link"):
        sam3x.load(artifact)


def test_what_is_no_regular_file(artifact: Path) -> None:
    """Reading a pipe would wait for ever."""
    for name in ("manifest.json", GRAPH):
        whole = (artifact / name).read_bytes()
        (artifact / name).unlink()
        os.mkfifo(artifact / name)
        with pytest.raises(ArtifactError, match=name):
            sam3x.load(artifact)
        (artifact / name).unlink()
        (artifact / name).write_bytes(whole)


@pytest.mark.parametrize("place", ["../secret.bin", "{absolute}", "link.bin", "a/../../secret.bin", "missing.bin"])
def test_external_data_outside_the_folder(place: str, artifact: Path, tmp_path: Path) -> None:
    """The graph names a file elsewhere as its weights, and the manifest was made to agree."""
    (tmp_path / "secret.bin").write_bytes(b"\1" * 4096)
    (artifact / "a").mkdir()
    (artifact / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(artifact / GRAPH)
    tensor = next(item for item in model.graph.initializer if len(item.raw_data) >= 128)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": place.format(absolute=tmp_path / "secret.bin"), "offset": "0", "length": str(size)}.items():
        tensor.external_data.add(key=key, value=value)
    (artifact / GRAPH).write_bytes(model.SerializeToString())
    edit_manifest(artifact, seal=True, files=lambda files: {**files, GRAPH: sha256_of(artifact / GRAPH)})
    with pytest.raises(ArtifactError, match=rf"{GRAPH} cannot be opened: .*External data path"):
        sam3x.load(artifact)._runner  # noqa: B018


@pytest.mark.parametrize("target", ["onnx", "pte"])
def test_a_graph_that_is_none(target: str, artifact: Path) -> None:
    name = f"fusion_encoder.{target}"
    (artifact / name).write_bytes(b"no graph " * 100)
    edit_manifest(
        artifact,
        seal=True,
        target=lambda _: target,
        components=lambda components: [{**components[0], "file": name}],
        files=lambda files: {**files, name: sha256_of(artifact / name)},
    )
    with pytest.raises(ArtifactError, match=rf"{name}"):
        sam3x.load(artifact)._runner  # noqa: B018


# ---- whole exports


def export(folder: Path, encoder: nn.Module | None = None) -> sam3x.Artifact:
    return sam3x.export(encoder or encoder_of(1), output=folder, dac=False, pre_norm=True, verify="off")


@pytest.mark.parametrize("step", ["lower to onnx", "verify"])
def test_a_disk_that_fills_up_at_every_step(step: str, artifact: Path) -> None:
    """No file may grow past 4 kB from that step on."""
    before = contents(artifact)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(name: str) -> None:
        if name == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(ArtifactError, match=r"cannot be written \(File too large\).*as it was.*Free space"):
            sam3x.export(encoder_of(1), output=artifact, dac=False, pre_norm=True, batch=1, tokens=20, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(artifact) == before
    sam3x.load(artifact)


KILLED = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import onnxruntime, onnxscript, sam3x.api, torch.onnx._internal.exporter._core
from support.upstream import encoder_of
encoder = encoder_of(1)
for moment in map(float, sys.argv[3:]):
    child = os.fork()
    if not child:
        threading.Thread(target=lambda: (time.sleep(moment), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
        sam3x.export(encoder, output=sys.argv[2], dac=False, pre_norm=True, verify="off")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    artifact = sam3x.load(sys.argv[2])
    print(moment, status, artifact.manifest.spec["dac"], sorted(os.listdir(sys.argv[2])), flush=True)
"""


@pytest.mark.long
def test_a_whole_export_killed_at_some_moments(artifact: Path) -> None:
    moments = [0.1, 0.6, 1.3]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(artifact), *map(str, moments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (len(lines) == len(moments) and "'runtime'" not in lines[-1]) or "runtime" in lines[0]
    assert export(artifact).manifest.spec["dac"] is False
    assert sorted(item.name for item in artifact.iterdir()) == [GRAPH, "manifest.json"]


def test_an_export_into_a_folder_that_another_export_holds(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(artifact)
    refusals = []

    def capture_meanwhile(*arguments: Any) -> Any:
        with pytest.raises(ArtifactError, match="another export is writing into"):
            sam3x.export(encoder_of(1), output=artifact)
        refusals.append(contents(artifact) == before)
        raise SourceError("the first one stops here")

    monkeypatch.setattr(job, "capture_component", capture_meanwhile)
    with pytest.raises(SourceError, match="stops here"):
        sam3x.export(encoder_of(1), output=artifact)
    assert refusals == [True] and contents(artifact) == before
