"""Registering third-party engines and formats, as the examples do."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import conformance
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fp8gemm import (
    SCHEMES,
    FP8GemmOptions,
    MatmulSpec,
    doctor,
    enable_fp8_gemm,
    load_checkpoint,
    probe,
    quantize,
    register_engine,
    register_format,
)
from fp8gemm.engines import AUTO, ENGINES
from fp8gemm.formats import FORMATS

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _tables() -> Iterator[None]:
    """Restores the tables afterwards."""
    engines, auto, formats = dict(ENGINES), dict(AUTO), list(FORMATS)
    yield
    for table, former in ((ENGINES, engines), (AUTO, auto)):
        table.clear()
        table.update(former)  # type: ignore[arg-type]
    FORMATS[:] = formats


def test_an_engine_of_ones_own_conforms_and_runs() -> None:
    engine = register_engine(example("own_engine").DenseEngine())
    device = torch.device("cpu")
    assert conformance.check(engine, probe(device), device) > 100
    model = enable_fp8_gemm(nn.Linear(64, 32), options=FP8GemmOptions(engine="dense"))
    x = torch.randn(3, 64)
    expected = x.double() @ model.weight.dequantize().double().T + model.bias.double()
    torch.testing.assert_close(model(x), expected.float())
    assert model.engine == "dense"
    with pytest.raises(ValueError, match="name that is not taken"):
        register_engine(engine)


def test_what_it_finds_belongs_to_a_machine_that_was_probed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """``probe`` runs once per device, ``doctor`` shows its result, and other machines pass it as a value."""
    before, module, asked = probe("cpu"), example("own_engine"), []
    find = module.DenseEngine.probe
    monkeypatch.setattr(
        module.DenseEngine, "probe", lambda self, device, machine: asked.append(device) or find(self, device, machine)
    )
    engine = register_engine(module.DenseEngine())
    machine = probe("cpu")
    assert probe(torch.device("cpu")) is machine
    assert asked == [torch.device("cpu")]
    memory = machine.facts("dense", module.Memory)
    assert memory is not None
    assert machine == replace(before, found={**before.found, "dense": memory})
    assert f"  found for dense: {memory}\n" in str(doctor.examine())
    spec = MatmulSpec(scheme=SCHEMES["row"], n=20_000, k=20_000)
    small, large = (replace(machine, found={"dense": module.Memory(size)}) for size in (10**9, 10**12))
    assert engine.rejects(spec, small) == ["needs 3.2 GB of memory, found 1.0 GB of memory"]
    assert engine.rejects(spec, large) == []
    del ENGINES["dense"]
    assert probe("cpu") == before


def test_auto_takes_it_first_where_it_is_told_to() -> None:
    register_engine(example("own_engine").DenseEngine(), auto=["native", "cpu"])
    assert enable_fp8_gemm(nn.Linear(64, 32)).engine == "dense"
    other = type("Other", (example("own_engine").DenseEngine,), {"name": "other"})()
    with pytest.raises(ValueError, match=r"kinds of device among native, cpu, cuda.*found tpu"):
        register_engine(other, auto=["tpu"])
    assert "other" not in ENGINES


def test_a_format_of_ones_own_is_read_exactly(tmp_path: Path) -> None:
    register_format(example("own_format").RowCodes())
    weight = quantize(torch.randn(32, 64))
    save_file({"0.codes": weight.data, "0.row_scales": weight.scale}, tmp_path / "model.safetensors")
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    assert load_checkpoint(model, tmp_path).format == "row-codes"
    assert model[0].scaled().data.view(torch.uint8).equal(weight.data.view(torch.uint8))
    assert model[0].scaled().scale.equal(weight.scale)
    with pytest.raises(ValueError, match="name that is not taken"):
        register_format(FORMATS[0])
