"""Operations on FP8 bytes and scales give what they give on the values, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8gemm import BLOCK_128, GROUP_128, ROW, TENSOR, Granularity, ScaledTensor, UnsupportedError, dequantize
from fp8gemm.formats.rearrange import Tiled, interleaved, rearranged

GRANULARITIES = [TENSOR, ROW, BLOCK_128, GROUP_128, Granularity(32, 48)]


class Config:
    num_attention_heads = 4


class Model:
    """What the operations ask a model for."""

    config = Config()

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(*{"q": (128, 192), "k": (64, 192), "v": (64, 192), "t": (192, 256)}[name])


def weight(*shape: int, granularity: Granularity, seed: int = 0) -> ScaledTensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    return ScaledTensor(data, torch.rand(granularity.scale_shape(shape), generator=generator) + 0.1, granularity)


def operations() -> dict[str, tuple[Any, dict[str, int], list[str], tuple[int, ...], int]]:
    """Name -> operation, how many inputs for each pattern, target patterns, the shape and dimensions of an input."""
    loading = pytest.importorskip("transformers.core_model_loading")
    one, two = {"a": 1}, {"a": 1, "b": 1}
    return {
        "chunk": (loading.Chunk(0), one, ["q", "k"], (256, 192), 2),
        "chunk columns": (loading.Chunk(1), one, ["q", "k"], (256, 192), 2),
        "split": (loading.Split(0), one, ["q", "k", "v"], (256, 192), 2),
        "join": (loading.Concatenate(0), two, ["q"], (256, 192), 2),
        "join columns": (loading.Concatenate(1), two, ["q"], (256, 192), 2),
        "interleave": (loading.Interleave(0), one, ["q"], (256, 192), 2),
        "stack": (loading.MergeModulelist(0), {"a": 3}, ["q"], (256, 192), 2),
        "take apart": (loading.SplitModulelist(0), one, ["q.*."], (3, 256, 192), 3),
        "turn": (loading.Transpose(0, 1), one, ["q"], (256, 192), 2),
        "turn a stack": (loading.Transpose(1, 2), one, ["q"], (3, 256, 192), 3),
        "turn if needed": (loading.Transpose(0, 1, check_dims=True), one, ["t"], (256, 192), 2),
        "turn only if needed": (loading.Transpose(0, 1, check_dims=True), one, ["t"], (192, 256), 2),
        "permute": (loading.PermuteForRope(), one, ["q"], (256, 192), 2),
        "text and vision": (loading.ErnieFuseAndSplitTextVisionExperts(), {"a": 4, "b": 4}, ["q", "k"], (256, 192), 2),
    }


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", list(operations()))
def test_as_on_values(name: str, granularity: Granularity) -> None:
    operation, counts, targets, shape, _ = operations()[name]
    given = {
        pattern: [weight(*shape, granularity=granularity, seed=10 * index + ord(pattern)) for index in range(count)]
        for pattern, count in counts.items()
    }
    sources = list(given)

    def run(values: dict[str, Any]) -> Any:
        more = {"model": Model(), "config": Config(), "full_layer_name": targets[0], "missing_keys": None}
        return operation.convert(values, source_patterns=sources, target_patterns=targets, **more)

    right = run({pattern: [dequantize(one, torch.float32) for one in ones] for pattern, ones in given.items()})
    found = rearranged(operation, run, {pattern: [Tiled.of(one) for one in ones] for pattern, ones in given.items()})
    assert found.keys() == right.keys()
    for target, values in right.items():
        assert torch.equal(dequantize(found[target].weight(), torch.float32), values)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_there_and_back_is_the_same_granularity(granularity: Granularity) -> None:
    loading = pytest.importorskip("transformers.core_model_loading")
    given = weight(3, 256, 192, granularity=granularity)
    value = {"stack": [Tiled.of(given)]}
    for operation in (loading.Chunk(1), loading.SplitModulelist(0), loading.MergeModulelist(0), loading.Concatenate(1)):
        names = ["gate.*.", "up.*."] if not isinstance(operation, loading.Concatenate) else ["stack"]
        if isinstance(operation, loading.MergeModulelist):
            value = {name: [value[name.replace("*", str(index))] for index in range(3)] for name in names}
        value = rearranged(
            operation,
            lambda values, operation=operation, names=names: operation.convert(
                values, source_patterns=["gate.*.", "up.*."] if len(values) > 1 else ["stack"], target_patterns=names
            ),
            value,
        )
    again = value["stack"].weight()
    assert torch.equal(again.data.view(torch.uint8), given.data.view(torch.uint8))
    assert torch.equal(dequantize(again, torch.float32), dequantize(given, torch.float32))
    # Blocks of 128 rows of which 128 are gate and 128 up, and so on: as coarse as before.
    assert again.granularity == granularity
    assert torch.equal(again.scale, given.scale)


def test_rows_in_turn() -> None:
    given = weight(2, 8, 4, granularity=ROW)
    values = dequantize(given, torch.float32)
    found = dequantize(interleaved(given), torch.float32)
    assert torch.equal(found[:, 0::2], values[:, :4])
    assert torch.equal(found[:, 1::2], values[:, 4:])


def test_what_is_not_known_is_refused() -> None:
    class Double:
        pass

    with pytest.raises(UnsupportedError, match="Double"):
        rearranged(Double(), dict, {"a": [Tiled.of(weight(4, 4, granularity=ROW))]})
    dense = {"a": [torch.ones(2, 2)]}
    assert rearranged(Double(), dict, dense) == dense


def test_an_operation_that_drops_dimensions_of_size_one() -> None:
    """transformers 5.19 squeezes what it takes apart, and with it the dimensions of scales per tensor or row."""

    class SplitModulelist:
        dim = 0

    def run(given: dict[str, Any]) -> dict[str, Any]:
        return {f"q.{index}.": one.squeeze() for index, one in enumerate(given["a"])}

    for granularity in GRANULARITIES:
        stack = weight(3, 256, 192, granularity=granularity)
        made = rearranged(SplitModulelist(), run, {"a": Tiled.of(stack)})
        for index in range(3):
            assert torch.equal(dequantize(made[f"q.{index}."].weight()), dequantize(stack)[index])
