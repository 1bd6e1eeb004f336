"""Damaged and malicious files: whatever a header, a config or an index says, a checkpoint is read or refused, soon.

A few hundred mutants by default; ``pytest tests/checkpoint/test_fuzz.py --fuzz-seconds 60`` makes further ones for a
minute, in the same order each time, and names the seed of one that fails.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, Net, compressed, e8m0, fp8, net_tensors, powers, scales, write
from safetensors import safe_open

from fp8gemm import CheckpointError, UnsupportedError
from fp8gemm.checkpoint import convert_checkpoint, load_checkpoint, open_checkpoint
from fp8gemm.checkpoint.inspection import inspect

DEFAULT = 300
LIMIT = 10.0  # seconds for one mutant, most of which take milliseconds

NET = net_tensors()
ROWS = {"up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1)}
EXPERTS = {
    f"experts.{index}.{part}.{end}": tensor
    for index in range(2)
    for part in ("gate_proj", "up_proj", "down_proj")
    for end, tensor in (("weight", fp8(32, 32, seed=index)), ("weight_scale", scales(32, 1)))
}


def bytes_of(value: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def sharded(folder: Path) -> None:
    halves = {k: v for k, v in NET.items() if k < "n"}, {k: v for k, v in {**NET, **ROWS}.items() if k >= "n"}
    halves[0]["down.weight_scale"] = halves[1].pop("down.weight_scale", ROWS["down.weight_scale"])
    index = {}
    for number, half in enumerate(halves):
        write(folder / "part", half)
        (folder / "part" / "model.safetensors").rename(folder / f"model-{number}.safetensors")
        index.update(dict.fromkeys(half, f"model-{number}.safetensors"))
    (folder / "part").rmdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": compressed("channel", "token")}))


def torchao() -> dict[str, Any]:
    told = {"_type": "Float8Tensor", "_data": {"block_size": [1, 160], "act_quant_kwargs": {"_data": {}}}}
    tensors = {"up._weight_qdata": fp8(96, 160), "up._weight_scale": scales(96, 1)}
    return {"tensors": tensors, "config": {"quant_method": "torchao"}, "metadata": {"up.weight": json.dumps(told)}}


def comfy() -> dict[str, Any]:
    layers = {"layers": {"up": {"format": "float8_e4m3fn"}, "down": {"format": "float8_e4m3fn_rowwise"}}}
    tensors = {**NET, "up.weight_scale": scales(), "down.weight_scale": scales(160)}
    return {"tensors": tensors, "metadata": {"_quantization_metadata": json.dumps(layers)}}


MX = {"up.weight_scale": e8m0(powers(96, 5)), "down.weight_scale": e8m0(powers(160, 3))}
GRID = {"up.weight_scale_inv": scales(1, 2), "down.weight_scale_inv": scales(2, 1)}
STATIC = {"up.weight_scale": scales(1), "down.weight_scale": scales(1), "up.input_scale": scales(1)}
MARKED = {"up.comfy_quant": bytes_of({"format": "float8_e4m3fn"}), "up.weight_scale": scales(), "scaled_fp8": fp8(1, 2)}
BASES: dict[str, Callable[[Path], Any]] = {
    "rows": lambda folder: write(folder, {**NET, **ROWS}, {**compressed("channel", "token"), "ignore": ["re:.*norm"]}),
    "static": lambda folder: write(folder, {**NET, **STATIC}, compressed("tensor", "tensor")),
    "blocks": lambda folder: write(folder, {**NET, **GRID}, BLOCKS),
    "mxfp8": lambda folder: write(folder, {**NET, **MX}, compressed("group", "group", group_size=32)),
    "experts": lambda folder: write(folder, EXPERTS, {"quant_method": "fp8"}),
    "modelopt": lambda folder: write(
        folder,
        {**NET, **STATIC, "k_proj.k_scale": scales(1)},
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["*norm*"]}},
    ),
    "fbgemm": lambda folder: write(folder, {**NET, **ROWS}, {"quant_method": "fbgemm_fp8"}),
    "torchao": lambda folder: write(folder, **torchao()),
    "comfy": lambda folder: write(folder, **comfy()),
    "comfy marked": lambda folder: write(folder, {"up.weight": NET["up.weight"], **MARKED}),
    "raw": lambda folder: write(folder, NET),
    "sharded": sharded,
}


def deep(levels: int) -> Any:
    value: Any = "x"
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def nasty(source: random.Random) -> Any:
    numbers = [0, -1, 1, 3, 128, 2**31, 2**63, 2**64, -(2**63), 10**400, 1.5, float("nan"), float("inf"), True, None]
    texts = ["", "re:(a+)+$", "re:(", "re:" + "(" * 3000, "x" * 5000, "\0", "\ud800", "../x", "fp8", "F8_E4M3", "I4"]
    lists = [[], [0, 0], [-1, 128], [128], ["a", 1], [[1]], [None], [2**40, 2**40], [1] * 100, deep(300)]
    objects: list[Any] = [{}, {"a": 1}, {"quant_method": 1}, deep(301)]
    return source.choice(source.choice([numbers, texts, lists, objects]))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value, with each of its keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, part in inside:
        found += [(value, key), *places(part)]
    return found


def mutate_json(value: Any, source: random.Random) -> Any:
    """The value with one to three places replaced, removed, renamed, doubled or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(source.randint(1, 3)):
        spots = places(value)
        if not spots:
            return nasty(source)
        holder, key = source.choice(spots)
        other, at = source.choice(spots)
        what = source.randrange(6)
        if what == 0 and isinstance(holder, dict):
            holder[str(nasty(source))[:2000]] = holder.pop(key)
        elif what == 1:
            del holder[key]
        elif what == 2:
            holder[key], other[at] = json.loads(json.dumps([other[at], holder[key]]))
        elif what == 3 and isinstance(holder[key], str):
            text = holder[key]
            cut = source.randrange(len(text) + 1)
            holder[key] = text[:cut] + source.choice(["", "\0", "9", '"', "{", "é"]) + text[cut + source.randrange(2) :]
        elif what == 4 and isinstance(holder[key], int):
            holder[key] += source.choice([-1, 1, 8, 2**32])
        else:
            holder[key] = nasty(source)
    return value


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_file(path: Path, source: random.Random) -> None:
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    what = source.randrange(5)
    if what < 3:  # the header, as JSON; or a JSON text within it
        header = json.loads(data[8 : 8 + size])
        metadata = header.get("__metadata__") or {}
        if what == 2 and metadata:
            key = source.choice(sorted(metadata))
            metadata[key] = json.dumps(mutate_json(json.loads(metadata[key]), source))
        else:
            header = mutate_json(header, source)
        text = dumped(header)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        return
    if what == 3:  # bytes anywhere, those of the header more often
        for _ in range(source.randint(1, 20)):
            data[source.randrange(len(data) if source.random() < 0.5 else 8 + size)] = source.randrange(256)
    else:
        del data[source.randrange(len(data)) :]
    path.write_bytes(data)


def mutate(folder: Path, source: random.Random) -> None:
    path = source.choice(sorted(folder.iterdir()))
    if path.suffix == ".safetensors":
        mutate_file(path, source)
    elif source.random() < 0.9:
        path.write_bytes(dumped(mutate_json(json.loads(path.read_text()), source)))
    else:
        data = path.read_bytes()
        at = source.randrange(len(data))
        path.write_bytes(data[:at] + source.randbytes(source.randrange(4)) + data[at + source.randrange(4) :])


def use(folder: Path, target: Path) -> None:
    """Everything that one does with a checkpoint; each part may refuse it."""
    checkpoint = open_checkpoint(folder)
    operations: list[Callable[[], Any]] = [
        lambda: str(inspect(checkpoint, check=True)),
        lambda: str(load_checkpoint(Net(), folder, strict=False)),
        lambda: load_checkpoint(Net(), folder, dequantize=True, strict=False),
        lambda: checkpoint.kv_scales,
        lambda: convert_checkpoint(folder, target),
    ]
    operations += [lambda name=name: (checkpoint[name], checkpoint.input_scale(name)) for name in checkpoint]
    for operation in operations:
        with contextlib.suppress(CheckpointError, UnsupportedError):
            operation()
    same_as_safetensors(checkpoint)


def same_as_safetensors(checkpoint: Any) -> None:
    for name, key in checkpoint.layout.plain.items():
        path = next(path for path in checkpoint.source.files if path.name == checkpoint.file_of(key))
        with safe_open(path, "pt") as handle:
            expected = handle.get_tensor(key)
        found = checkpoint.read(key)
        assert found.shape == expected.shape, name
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


def run(seed: int, folder: Path) -> str:
    """Makes one mutant and uses it; what went wrong, or nothing."""
    source = random.Random(seed)
    base = source.choice(sorted(BASES))
    place = folder / str(seed)
    shutil.copytree(folder / base, place)
    mutate(place, source)
    if source.random() < 0.25:
        with contextlib.suppress(Exception):  # the first may have left nothing to parse
            mutate(place, source)
    started = time.perf_counter()
    failure = ""
    try:
        use(place, folder / f"{seed} converted")
    except (CheckpointError, UnsupportedError) as error:
        failure = "" if str(error) else "no message"
    except Exception:
        failure = traceback.format_exc(limit=-4)
    took = time.perf_counter() - started
    for made in (place, folder / f"{seed} converted"):
        shutil.rmtree(made, ignore_errors=True)
    return failure or (f"took {took:.1f} s" if took > LIMIT else "")


def test_mutants(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    seconds = float(request.config.getoption("--fuzz-seconds"))
    for name, make in BASES.items():
        make(tmp_path / name)
        use(tmp_path / name, tmp_path / "converted")
    first = DEFAULT if seconds else 0
    ends = time.monotonic() + seconds
    failures: dict[str, str] = {}
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by Python's regex engine, of what a pattern might have meant
        while count < DEFAULT if not seconds else time.monotonic() < ends:
            if failure := run(first + count, tmp_path):
                failures.setdefault(failure.strip().splitlines()[-1][:150], f"seed {first + count}: {failure}")
            count += 1
    assert not failures, f"{len(failures)} kinds of failure in {count} mutants\n" + "\n".join(failures.values())
    assert count >= DEFAULT or seconds
