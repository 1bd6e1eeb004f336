"""Files that were made to do harm, or that change while they are read: each is refused by its name, at once."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Net, compressed, fp8, net_tensors, scales, write
from safetensors.torch import save_file

from fp8gemm import CheckpointError, load_checkpoint
from fp8gemm.checkpoint import locate, open_checkpoint
from fp8gemm.checkpoint.inspection import inspect

ROWS = compressed("channel", "token")


def good(folder: Path, **config: Any) -> Path:
    tensors = {"m.weight": fp8(64, 64), "m.weight_scale": scales(64, 1)}
    return write(folder, tensors, {**ROWS, **config})


def refused(source: Path) -> str:
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source)
    assert time.perf_counter() - started < 10
    return str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_pipes_are_not_opened(name: str, tmp_path: Path) -> None:
    """Opening one waits for a writer that never comes."""
    folder = good(tmp_path)
    if not name.startswith("config"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is a pipe or a device, not a file" in refused(folder)
    if name != "config.json":
        assert f"{name} is a pipe or a device, not a file" in refused(folder / name)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs devices")
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_devices_are_not_opened(name: str, tmp_path: Path) -> None:
    """/dev/zero never ends."""
    folder = good(tmp_path)
    if not name.startswith("config"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")
    assert stat.S_ISCHR(os.stat(folder / name).st_mode)
    assert f"{name} is a pipe or a device, not a file" in refused(folder)


def test_a_shard_that_is_a_pipe(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("needs pipes")
    os.mkfifo(tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert "x.safetensors is a pipe or a device, not a file" in refused(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_is_limited(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "_LARGEST_JSON", 1000)
    good(tmp_path)
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(json.dumps({"a": "x" * 1000}))
    assert f"{name} has 1009 bytes; a JSON file may have 1000" in refused(tmp_path)


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    good(tmp_path)
    (tmp_path / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    assert "config.json" in refused(tmp_path)


@pytest.mark.parametrize("value", ["fp8", ["fp8"], 8])
@pytest.mark.parametrize("where", ["quantization_config", "text_config"])
def test_a_quantization_config_that_is_no_object(value: Any, where: str, tmp_path: Path) -> None:
    """It would be passed over, and the tensors read as if there were none."""
    good(tmp_path)
    config = {where: value} if where == "quantization_config" else {where: {"quantization_config": value}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = refused(tmp_path)
    assert "config.json" in text
    assert f"quantization_config must be an object, found {value!r}" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": [1]},
        {"config_groups": {"group_0": {"targets": 3, "weights": {"strategy": "channel"}}}},
        {"config_groups": {"group_0": {"targets": [3], "weights": {"strategy": "channel"}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": [1]}}},
        {"config_groups": {"group_0": {"targets": [], "weights": {"strategy": "group", "group_size": "x"}}}},
        {"ignore": 5},
        {"ignore": ["re:("]},
    ],
)
def test_values_of_the_wrong_kind(changes: dict[str, Any], tmp_path: Path) -> None:
    assert str(tmp_path) in refused(good(tmp_path, **changes)) or "config" in refused(tmp_path)


@pytest.mark.parametrize("pattern", ["re:(a+)+$", "re:(m|m.?|.m?)*!", "re:(.*)*(.*)*x"])
def test_no_regex_of_a_config_hangs(pattern: str, tmp_path: Path) -> None:
    name = "m" + "a" * 500
    tensors = {f"{name}.weight": fp8(64, 64), f"{name}.weight_scale": scales(64, 1)}
    config = {**ROWS, "ignore": [pattern]}
    config["config_groups"] = {"group_0": {**ROWS["config_groups"]["group_0"], "targets": [pattern, "Linear"]}}
    started = time.perf_counter()
    try:
        open_checkpoint(write(tmp_path, tensors, config))
    except CheckpointError as error:
        assert "takes too long to match" in str(error)  # noqa: PT017
    assert time.perf_counter() - started < 10


def test_names_are_limited(tmp_path: Path) -> None:
    save_file({"weight" * 10_000 + "!": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "model.safetensors: a name of 60001 letters, weightweight" in refused(tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**62, 4], [1] * 65])
def test_shapes_that_no_tensor_has(shape: list[int], tmp_path: Path) -> None:
    size = 0 if 0 in shape else 1
    header = json.dumps({"w": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    assert "model.safetensors" in refused(tmp_path)


def test_an_index_that_assigns_wrongly(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "the index says that b is in x.safetensors, which does not contain it: it is in y.safetensors" in refused(
        tmp_path
    )


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (None, "must map every key to the name of a file; a has None"),
        ({"x": 1}, "must map every key to the name of a file"),
        ("x" * 300, "1 of them missing"),
        ("../x.safetensors", "lists shards outside its folder"),
        ("/etc/passwd", "lists shards outside its folder"),
        ("..", "lists shards outside its folder"),
        ("a\0b", "lists shards outside its folder"),
    ],
)
def test_entries_of_an_index_that_are_no_shards(entry: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": entry}}))
    assert reason in refused(tmp_path)


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        (3, "must be the name of a file in its folder"),
        ("../model.safetensors", "must be the name of a file in its folder"),
        ("absent.safetensors", "which is not there"),
        ("model.bin", "only .safetensors files"),
    ],
)
def test_weights_that_a_config_cannot_name(named: Any, reason: str, tmp_path: Path) -> None:
    good(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
    text = refused(tmp_path)
    assert reason in text
    assert "config.json" in text


def test_weights_that_a_config_names(tmp_path: Path) -> None:
    """As in transformers: where model.safetensors holds something else."""
    good(tmp_path)
    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    assert set(open_checkpoint(tmp_path)) == {"other"}
    assert "describes other.safetensors, not model.safetensors; open the folder" in refused(
        tmp_path / "model.safetensors"
    )


def test_a_whole_file_comes_before_an_old_index(tmp_path: Path) -> None:
    """As in transformers, which looks for the whole file first."""
    good(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path)) == {"m.weight"}
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(tmp_path)) == {"m.weight"}


@pytest.mark.skipif(sys.platform == "win32", reason="mapped files cannot shrink there")
def test_a_file_that_shrinks(tmp_path: Path) -> None:
    """What is missing of a mapped file ends the process when it is touched."""
    folder = good(tmp_path)
    checkpoint = open_checkpoint(folder)
    size = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(
        CheckpointError, match=f"model.safetensors had {size} bytes when it was opened, and has 100 now"
    ):
        checkpoint["m.weight"]


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    folder = good(tmp_path)
    expected = open_checkpoint(folder).dequantize("m.weight")
    checkpoint = open_checkpoint(folder)
    save_file({"x": torch.ones(1)}, folder / "new")
    os.replace(folder / "new", folder / "model.safetensors")
    assert torch.equal(checkpoint.dequantize("m.weight"), expected)


@pytest.mark.parametrize(("value", "what"), [(0.0, "zero"), (-0.5, "negative")])
def test_scales_that_no_quantization_makes(value: float, what: str, tmp_path: Path) -> None:
    tensors = {**net_tensors(), "up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1)}
    tensors["up.weight_scale"][3:5] = value
    folder = write(tmp_path, tensors, ROWS)
    expected = (f"up.weight has 2 of 96 scales {what}",)
    assert inspect(open_checkpoint(folder)).suspicious == expected
    assert load_checkpoint(Net(), folder).suspicious == expected
