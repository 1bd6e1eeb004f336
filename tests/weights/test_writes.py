"""Every torch operation that writes to a tensor either reaches an FP8 weight as it would a dense one, or raises."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from vocabulary import SHAPE, Write, names, overload_of, values, write

from fp8gemm import FP8GemmOptions
from fp8gemm.errors import UnsupportedError
from fp8gemm.scaled import ScaledTensor
from fp8gemm.weights import FP8Linear

# Why an operation is not run, by packet or overload.
NOT_RUN = {
    "the result is whole numbers or truth values": """
        __iand__ __ilshift__ __ior__ __irshift__ __ixor__ all any argmax argmin argsort bincount bitwise_and
        bitwise_and_ bitwise_left_shift bitwise_left_shift_ bitwise_not bitwise_not_ bitwise_or bitwise_or_
        bitwise_right_shift bitwise_right_shift_ bitwise_xor bitwise_xor_ bucketize count_nonzero gcd gcd_ hash_tensor
        isin isinf isnan isneginf isposinf lcm lcm_ multinomial nonzero nonzero_static repeat_interleave.Tensor_out
        searchsorted signbit tril_indices triu_indices unique_consecutive""",
    "the result is complex, or float64": """
        complex fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_ihfft2 fft_ihfftn fft_rfft
        fft_rfft2 fft_rfftn float_power float_power_ linalg_eig linalg_eigvals polar view_as_complex_copy""",
    "for sparse, quantized or nested tensors": """
        _coalesced_ ccol_indices_copy col_indices_copy crow_indices_copy dequantize empty_quantized hspmm indices_copy
        int_repr native_norm q_per_channel_scales q_per_channel_zero_points quantize_per_channel quantize_per_tensor
        quantize_per_tensor_dynamic quantized_batch_norm quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d
        fused_moving_avg_obs_fake_quant resize_as_sparse_ row_indices_copy sparse_coo_tensor sparse_resize_
        sparse_resize_and_clear_ sspaddmm values_copy""",
    "for other devices, or for packed weights": """
        _philox_normal_ _philox_uniform_ addmm.dtype_out baddbmm.dtype_out batch_norm_backward_elemt
        batch_norm_backward_reduce batch_norm_elemt batch_norm_gather_stats batch_norm_gather_stats_with_counts
        batch_norm_stats bmm.dtype_out conv_depthwise3d cudnn_affine_grid_generator cudnn_batch_norm cudnn_convolution
        cudnn_convolution_add_relu cudnn_convolution_relu cudnn_convolution_transpose cudnn_grid_sampler
        fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation miopen_batch_norm miopen_convolution
        miopen_convolution_transpose miopen_ctc_loss miopen_depthwise_convolution miopen_rnn mkldnn_adaptive_avg_pool2d
        mkldnn_convolution mkldnn_linear mkldnn_linear_backward_weights mkldnn_max_pool2d mkldnn_max_pool3d
        mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight mkldnn_rnn_layer mm.dtype_out record_stream""",
    "writes no values": "empty empty_like empty_permuted empty_strided retain_grad",
    "takes a storage; refused, see test_views": "set_.source_Storage set_.source_Storage_storage_offset",
    "takes several tensors that must fit each other, or crashes, or writes beyond its output": """
        binary_cross_entropy fractional_max_pool3d max_unpool2d max_unpool3d native_batch_norm rrelu_with_noise
        split_copy.Tensor_out""",
}
_REASONS = {name: reason for reason, listed in NOT_RUN.items() for name in listed.split()}


def reason(name: str) -> str | None:
    """Why an overload is not run; None if it is."""
    packet, overload = name.split(".")
    if "dimname" in overload.lower() or "names" in overload or packet == "rename_":
        return "for named tensors, which are gone from torch 2.13 on"
    return _REASONS.get(name, _REASONS.get(packet))


# Overloads in this list do not exist in every version of torch.
NOT_EVERYWHERE = {"_philox_normal_", "_philox_uniform_", "miopen_ctc_loss"}

# These transpose, or temporarily resize, the very tensor that they are given.
REFUSED = {"svd.U", "linalg_matrix_rank.out_tol_tensor"}
# nothing changes with the arguments used here
SAME_SHAPE = {"detach_.default", "resize_.default", "resize_as_.default"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Runs thousands of tiny operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(storage: str = "discard") -> FP8Linear:
    linear = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.float32)
    linear.weight.data = values(*SHAPE)
    return FP8Linear.convert(linear, FP8GemmOptions(fp16_weight_storage=storage))  # type: ignore[arg-type]


def exact(made: FP8Linear) -> torch.Tensor:
    """The values that a write changes."""
    original = made.original_weight
    return made.weight.dequantize() if original is None else original.detach()


def check_rounding(before: ScaledTensor, was: torch.Tensor, after: ScaledTensor, wanted: torch.Tensor) -> None:
    """Unchanged rows keep their bytes; the other values are the wanted ones, each rounded once to E4M3.

    With 3 mantissa bits the error is at most half a unit, 2**-4 of a value, or half of 2**-9 for the smallest numbers.
    """
    same = ((was == wanted) | (was.isnan() & wanted.isnan())).all(dim=1)
    assert before.data.view(torch.uint8)[same].equal(after.data.view(torch.uint8)[same])
    assert before.scale[same].equal(after.scale[same])
    found = after.data.to(torch.float32) * after.scale
    error = (found - wanted).abs()
    finite = wanted.isfinite() & (wanted.abs() < 1e30)
    assert (error <= wanted.abs() * 2**-4 * 1.0001 + after.scale * 2**-10)[finite].all()


def problem_of(one: Write, storage: str) -> str:
    """What is wrong after a write; empty if nothing is."""
    weights = [layer(storage), layer(storage)] if one.lists else [layer(storage)]
    twins = [exact(made).clone() for made in weights]
    start = [(made.scaled(), twin.clone()) for made, twin in zip(weights, twins, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if one.name in REFUSED or (torch.Tag.inplace_view in overload_of(one.name).tags and one.name not in SAME_SHAPE):
            with pytest.raises(UnsupportedError, match="keeps its shape"):
                one.run(one.targets(*[made.weight for made in weights]))
            return "" if exact(weights[0]).equal(twins[0]) else "changed by what was refused"
        one.run(one.targets(*twins))
        one.run(one.targets(*[made.weight for made in weights]))
        for made, twin, (before, was) in zip(weights, twins, start, strict=True):
            torch.testing.assert_close(exact(made), twin, rtol=1e-6, atol=1e-6, equal_nan=True)
            check_rounding(before, was, made.scaled(), twin)
    return ""


@pytest.fixture(scope="module")
def everything() -> list[str]:
    return [name for name in names() if reason(name) is None]


def test_whole_vocabulary(everything: list[str]) -> None:
    """Every operation that is not run has a reason in the list, so operations new in torch are noticed here."""
    without = {name: found for name in everything if isinstance(found := write(name), str)}
    assert not without, "add arguments to vocabulary.OWN, or a reason to NOT_RUN"
    assert len(everything) > 900
    listed = {name for group in NOT_RUN.values() for name in group.split()}
    found = set(names())
    there = found | {name.partition(".")[0] for name in found}
    assert listed - there <= NOT_EVERYWHERE


@pytest.mark.parametrize("storage", ["discard", "keep"])
def test_every_write(everything: list[str], storage: str) -> None:
    problems = {}
    for name in everything:
        one = write(name)
        assert isinstance(one, Write)
        try:
            if problem := problem_of(one, storage):
                problems[name] = problem
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"
    assert not problems
