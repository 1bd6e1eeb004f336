"""Files that are broken, ambiguous or something else: each is refused with its name and what would work."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, compressed, fp8, scales, write
from safetensors import safe_open
from safetensors.torch import save_file

from fp8gemm import CheckpointError
from fp8gemm.checkpoint import files, open_checkpoint
from fp8gemm.checkpoint.read import count_nan


def good(folder: Path) -> Path:
    return write(folder, {"m.weight": fp8(64, 64), "m.weight_scale": scales(64, 1)}, compressed("channel", "token"))


def refused(source: Path | str) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source)
    return str(error.value)


def sharded(folder: Path, weight_map: dict[str, str], shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


A, B = {"a": torch.ones(2)}, {"b": torch.zeros(3)}


def test_folder_file_and_index_are_the_same_checkpoint(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, {"x.safetensors": A, "y.safetensors": B})
    for source in (folder, str(folder), folder / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(source)
        assert set(checkpoint) == {"a", "b"}
        assert torch.equal(checkpoint.dequantize("b"), torch.zeros(3))
    assert set(open_checkpoint(folder / "x.safetensors")) == {"a"}


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_headers_whose_length_looks_like_a_pickle(length: int, tmp_path: Path) -> None:
    """Pickles begin with 80 02 to 80 05, as do headers of 640, 896, 1152 and 1408 bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + b"x")
    assert open_checkpoint(path).dequantize("a").tolist() == [ord("x")]


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A file of 40 GB, all of it a hole: nothing of it but the header can have been read in this time and memory."""
    size = 40 * 10**9
    header = json.dumps({"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    checkpoint = open_checkpoint(path)
    assert checkpoint.nbytes == size
    assert checkpoint.shape("big") == (size,)
    big = checkpoint["big"]
    assert isinstance(big, torch.Tensor)
    assert int(big[-1]) == 0


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated(keep: int, tmp_path: Path) -> None:
    path = good(tmp_path) / "model.safetensors"
    content = path.read_bytes()[:keep]
    path.write_bytes(content)
    text = refused(tmp_path)
    assert f"model.safetensors ({len(content)} bytes) is not a complete safetensors file" in text
    assert "downloaded or copied, try that again" in text


def test_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<html>not found</html>" * 100)
    assert "is not a complete safetensors file" in refused(path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    plain, renamed, zipped = tmp_path / "a.bin", tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    for path in (plain, renamed):
        path.write_bytes(pickle.dumps(Trap()))
    torch.save({"w": torch.ones(2)}, zipped)
    for path in (plain, renamed, zipped):
        text = refused(path)
        assert f"{path} is a pickle, which can run arbitrary code when opened" in text
        assert "safetensors.torch.save_file" in text
    assert not (tmp_path / "sprung").exists()


def test_a_folder_of_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "holds only pickles (pytorch_model.bin)" in refused(tmp_path)


def test_empty_and_absent(tmp_path: Path) -> None:
    assert "holds no .safetensors file; found nothing" in refused(tmp_path)
    assert "is neither a file, a folder nor an id on the Hub" in refused(tmp_path / "absent")


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, {"x.safetensors": A})
    assert "lists 2 shards, 1 of them missing: y.safetensors" in refused(folder)


def test_an_index_that_names_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"}, {"x.safetensors": A})
    assert "the index says that b is in x.safetensors, which does not contain it" in refused(folder)


def test_an_index_that_leaves_its_folder(tmp_path: Path) -> None:
    save_file(A, tmp_path / "x.safetensors")
    folder = sharded(tmp_path / "in", {"a": "../x.safetensors"}, {})
    assert "lists shards outside its folder: ../x.safetensors" in refused(folder)


def test_an_index_without_a_map(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    for text, reason in (("{", "is not JSON"), ("[]", "must hold a JSON object, found list"), ("{}", "no weight_map")):
        path.write_text(text)
        assert reason in refused(tmp_path)


def test_two_shards_with_one_tensor(tmp_path: Path) -> None:
    shards = {"x.safetensors": A, "y.safetensors": {**A, **B}}
    folder = sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, shards)
    assert "a is in two files, x.safetensors and y.safetensors" in refused(folder)


def test_shards_without_an_index(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model-00001-of-00002.safetensors")
    assert "has 1 of 2 shards and no index" in refused(tmp_path)
    save_file(B, tmp_path / "model-00002-of-00002.safetensors")
    assert set(open_checkpoint(tmp_path)) == {"a", "b"}


def test_several_checkpoints_in_a_folder(tmp_path: Path) -> None:
    save_file(A, tmp_path / "one.safetensors")
    save_file(B, tmp_path / "two.safetensors")
    assert "holds several checkpoints: one.safetensors, two.safetensors; pass the path of one" in refused(tmp_path)
    save_file(A, tmp_path / "consolidated.safetensors")
    save_file(B, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path)) == {"b"}, "the Hugging Face names come first"


@pytest.mark.parametrize("what", ["file", "folder", "config"])
def test_no_permission(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, since root may read everything: what the system would raise is raised for this path."""
    folder = good(tmp_path)
    original = {"file": Path.open, "folder": Path.iterdir, "config": Path.read_text}[what]
    name = {"file": "model.safetensors", "folder": "", "config": "config.json"}[what]

    def denied(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == folder / name:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, original.__name__, denied)
    text = refused(folder)
    assert f"cannot read {folder / name if name else folder}: Permission denied" in text


@pytest.mark.parametrize(
    ("dtype", "byte"),
    [
        (torch.float8_e4m3fn, 0x7F),
        (torch.float8_e4m3fn, 0xFF),
        (torch.float8_e5m2, 0x7D),
        (torch.float8_e5m2, 0xFF),
    ],
)
@pytest.mark.parametrize("where", [0, 3 * 2**18 + 5])
def test_nan_in_a_weight(dtype: torch.dtype, byte: int, where: int, tmp_path: Path) -> None:
    w = fp8(1024, 1024, dtype=dtype)
    w.view(torch.uint8).view(-1)[where] = byte
    folder = write(tmp_path, {"m.weight": w, "m.weight_scale": scales(1024, 1)}, compressed("channel", "token"))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"m\.weight holds 1 NaN bytes \(model\.safetensors\)"):
        checkpoint["m.weight"]


def test_only_nan_counts_as_nan() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        assert count_nan(every) == int(torch.isnan(every.float()).sum())
    assert count_nan(torch.empty(0, 4, dtype=torch.float8_e4m3fn)) == 0


def test_a_config_that_is_no_config(tmp_path: Path) -> None:
    folder = good(tmp_path)
    (folder / "config.json").write_text("not json")
    assert "config.json is not JSON" in refused(folder)


def test_a_nested_quantization_config(tmp_path: Path) -> None:
    tensors = {"m.weight": fp8(192, 192), "m.weight_scale_inv": scales(3, 3)}
    write(
        tmp_path,
        tensors,
        model_config={"text_config": {"quantization_config": {**BLOCKS, "weight_block_size": [64, 64]}}},
    )
    assert str(open_checkpoint(tmp_path).layers["m.weight"].granularity) == "64x64"


def test_a_mapping_says_the_same_in_all_ways(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(good(tmp_path))
    assert list(checkpoint) == ["m.weight"]
    assert len(checkpoint) == 1
    assert "m.weight" in checkpoint
    assert "m.weight_scale" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["m.weight_scale"]
    assert repr(checkpoint).endswith("format=compressed-tensors, 1 FP8 weights)")


def test_importing_needs_no_hub_library() -> None:
    """huggingface_hub is imported when an id is fetched."""
    code = "import sys, fp8gemm.checkpoint; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("when", ["before the library looks", "while it looks", "after it has looked"])
@pytest.mark.parametrize("other", [torch.zeros(2), torch.zeros(5), torch.zeros(2000)])
def test_a_file_that_is_replaced_while_it_is_opened(
    when: str, other: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header and its tensors are those of one file."""
    path, replacement = tmp_path / "model.safetensors", tmp_path / "other"
    save_file({"a": torch.ones(5)}, path)
    save_file({"b": other}, replacement)

    def look(*args: Any, **kwargs: Any) -> None:
        if when == "after it has looked":
            safe_open(*args, **kwargs)
        if replacement.exists():
            replacement.replace(path)
            if when == "while it looks":  # between its own reading of the file and torch's
                raise RuntimeError(f"file <{path}> size <80> is smaller than the required mapping size <96>")
        if when == "before the library looks":
            safe_open(*args, **kwargs)

    monkeypatch.setattr(files, "safe_open", look)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint) == ["b"]
    assert torch.equal(checkpoint["b"], other)


def test_a_file_that_is_replaced_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file(A, path)

    def look(*args: Any, **kwargs: Any) -> None:
        save_file(A, tmp_path / "other")
        (tmp_path / "other").replace(path)

    monkeypatch.setattr(files, "safe_open", look)
    assert "model.safetensors keeps changing while it is being opened" in refused(path)
