"""Pure functions between floating-point and scaled tensors: the definition that every kernel must match."""

from __future__ import annotations

import torch

from .scaled import ROW, Granularity, ScaledTensor, ScaleFormat

# The smallest normal float32, and the lower bound of scales: it keeps x / scale finite for every finite x, makes rows
# of zeros give zeros, and loses nothing, as a row with a smaller scale has no normal float32 products to lose.
SCALE_FLOOR = 2.0**-126


def quantize(
    x: torch.Tensor,
    granularity: Granularity = ROW,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: torch.Tensor | None = None,
    scale_format: ScaleFormat = "float32",
) -> ScaledTensor:
    """Rounds ``x [..., N, K]`` to FP8 so that ``x ≈ data * scale``, all in float32, by division, ties to even.

    ``scale = max(amax, 2**-126) / fp8_max`` over the *finite* elements of each block, at least ``2**-126``. Values
    beyond the FP8 range (possible with ``scale`` given) saturate. Non-finite elements of ``x`` become NaN in ``data``
    and affect no other element.

    Args:
        granularity: how many elements share a scale.
        dtype: ``torch.float8_e4m3fn`` (largest value 448) or ``torch.float8_e5m2`` (57344).
        scale: static scales, float32, any shape that broadcasts to ``granularity.scale_shape(x.shape)``.
        scale_format: ``"ue8m0"`` rounds scales *up* to a power of two (OCP MX: nothing overflows), at least 2**-126.

    Example:
        >>> scaled = quantize(torch.tensor([[1.0, -2.0, 0.1]]))
        >>> scaled.data.float(), scaled.scale
        (tensor([[ 224., -448.,   22.]]), tensor([[0.0045]]))
    """
    x32 = x.to(torch.float32)
    if scale is None:
        scale = block_scale(x32, granularity, dtype=dtype, scale_format=scale_format)
    else:
        scale = scale.to(torch.float32).broadcast_to(granularity.scale_shape(x.shape)).contiguous()
    largest = torch.finfo(dtype).max
    scaled = (x32 / expand_scale(scale, granularity, x.shape)).clamp_(-largest, largest)
    # Explicitly: casting infinity gives 448 in torch 2.13 and NaN in 2.11, and clamp_ has already made it 448 here.
    data = torch.where(torch.isfinite(x32), scaled, torch.nan).to(dtype)
    return ScaledTensor(data, scale, granularity)


def block_scale(
    x: torch.Tensor,
    granularity: Granularity,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "float32",
) -> torch.Tensor:
    """The scales, float32 ``granularity.scale_shape(x.shape)``, with which ``quantize`` rounds ``x [..., N, K]``."""
    magnitude = x.to(torch.float32).abs().nan_to_num_(nan=0.0, posinf=0.0)
    scale = (block_amax(magnitude, granularity) / torch.finfo(dtype).max).clamp(min=SCALE_FLOOR)
    return round_up_to_power_of_two(scale) if scale_format == "ue8m0" else scale


# Two binades of scales around amax's, the plain one first. An FP8 grid times two is the same grid but for its ends, so
# factors from 1 to 2 are all there are to choose from, unless values are lost below the smallest FP8 number: then
# smaller scales, which clip the largest values, may be better.
SCALE_FACTORS = (1.0, *(2.0 ** (step / 8) for step in (*range(1, 8), *range(-8, 0))))


def search_scale(
    x: torch.Tensor,
    granularity: Granularity,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "float32",
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales, float32 ``granularity.scale_shape(x.shape)``, with the least ``rounding_error`` among a few.

    They are the scales of ``block_scale`` times ``SCALE_FACTORS`` (``"ue8m0"``: 1 and 1/2, the others round alike), so
    the error of no block exceeds that of ``quantize(x)``. Blocks of zeros keep the scale that they have there.

    Args:
        importance: ``[..., K]``, not negative: how much an error in each column counts, such as the second moment of
            the activation that it is multiplied by. All columns count alike without it.

    Example:
        >>> w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        >>> scale = search_scale(w, ROW)
        >>> searched, plain = dequantize(quantize(w, scale=scale)), dequantize(quantize(w))
        >>> bool((searched - w).square().sum() < (plain - w).square().sum())
        True
    """
    plain = block_scale(x, granularity, dtype=dtype, scale_format=scale_format)
    best, least = plain, rounding_error(x, plain, granularity, dtype=dtype, importance=importance)
    for candidate in candidate_scales(plain, scale_format)[1:]:
        error = rounding_error(x, candidate, granularity, dtype=dtype, importance=importance)
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best


def candidate_scales(plain: torch.Tensor, scale_format: ScaleFormat = "float32") -> list[torch.Tensor]:
    """The scales among which ``search_scale`` chooses: ``plain``, those of ``block_scale``, and multiples of them."""
    factors = (1.0, 0.5) if scale_format == "ue8m0" else SCALE_FACTORS
    return [(plain * factor).clamp(min=SCALE_FLOOR) for factor in factors]


def rounding_error(
    x: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum_k importance_k (x_nk - q_nk)^2`` over the finite elements of each block of ``x [..., N, K]``.

    ``q`` is ``x`` quantized with ``scale``; the result is float64 ``granularity.scale_shape(x.shape)``.
    """
    x32 = x.to(torch.float32)
    largest = torch.finfo(dtype).max
    spread = expand_scale(scale, granularity, x.shape)
    rounded = nearest_value((x32 / spread).clamp_(-largest, largest), dtype).mul_(spread)
    error = rounded.sub_(x32).nan_to_num_(0.0, 0.0, 0.0).square_()
    if importance is not None:
        error = error.mul_(importance.to(torch.float32).unsqueeze(-2))
    if error.numel() == 0:
        return error.new_zeros(granularity.scale_shape(x.shape), dtype=torch.float64)
    return _blocks(error, granularity).sum(dim=(-3, -1), dtype=torch.float64)


def nearest_value(x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """``x.to(dtype).to(torch.float32)`` for float32 ``x`` within the range of ``dtype``, in a third of the time on a
    CPU.

    Normal numbers are split as Veltkamp does (Dekker 1971, https://doi.org/10.1007/BF01397083), and a constant whose
    last bit is the smallest step rounds those below.
    """
    info = torch.finfo(dtype)
    wide = x * (2.0**23 * info.eps + 1)
    shift = 1.5 * 2**23 * info.smallest_normal * info.eps
    return torch.where(x.abs() < info.smallest_normal, (x + shift) - shift, wide - (wide - x))


def dequantize(scaled: ScaledTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``data * scale [..., N, K]``, computed in float32 and rounded once to ``dtype``; exact if that is float64.

    Example:
        >>> dequantize(quantize(torch.tensor([[1.0, -2.0, 0.1]])))
        tensor([[ 1.0000, -2.0000,  0.0982]])
    """
    values = scaled.data.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return values.mul_(expand_scale(scaled.scale, scaled.granularity, scaled.shape)).to(dtype)


def expand_scale(scale: torch.Tensor, granularity: Granularity, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Scales repeated until they broadcast against a tensor of ``shape [..., N, K]``."""
    rows, cols = granularity.block(shape)
    n, k = shape[-2:]
    if scale.shape[-2] > 1 and rows > 1:
        scale = scale.repeat_interleave(rows, dim=-2)[..., :n, :]
    if scale.shape[-1] > 1 and cols > 1:
        scale = scale.repeat_interleave(cols, dim=-1)[..., :k]
    return scale


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is at least each positive, normal float32."""
    bits = scale.view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def encode_ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two as the bytes ``b`` of OCP MX's E8M0: ``scale = 2**(b - 127)``; uint8 of the same shape.

    Raises:
        ValueError: a scale is not a power of two that E8M0 can represent.
    """
    mantissa, exponent = torch.frexp(scale.to(torch.float32))
    byte = exponent + 126
    if not bool(((mantissa == 0.5) & (byte >= 0)).all()):  # no finite float32 is beyond the largest byte
        raise ValueError("UE8M0 holds powers of two from 2**-127 to 2**127 only; found other scales")
    return byte.to(torch.uint8)


def decode_ue8m0(byte: torch.Tensor) -> torch.Tensor:
    """``2**(b - 127)`` as float32 for E8M0 bytes given as uint8 or float8_e8m0fnu; 255 is NaN."""
    if byte.dtype == torch.float8_e8m0fnu:
        byte = byte.view(torch.uint8)
    # Written to float32's exponent field, which uses the same byte; 2**-127 is float32's subnormal with one bit set.
    bits = byte.to(torch.int32) << 23
    value = torch.where(byte == 0, 1 << 22, bits).view(torch.float32)
    return torch.where(byte == 255, torch.nan, value)


def nan_rows(data: torch.Tensor) -> torch.Tensor:
    """Which rows ``[N]`` of FP8 ``data [N, K]`` contain a NaN; in parts, so that no mask of the whole weight is
    made."""
    if data.dtype == torch.float8_e5m2:
        return data.to(torch.float16).isnan().any(dim=-1)
    code = data.view(torch.uint8)
    rows = max(1, 2**20 // max(code.shape[-1], 1))
    return torch.cat([((part & 0x7F) == 0x7F).any(dim=-1) for part in torch.split(code, rows)])


def block_amax(magnitude: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """The largest element of each block of a non-negative tensor ``[..., N, K]``."""
    if magnitude.numel() == 0:
        return magnitude.new_zeros(granularity.scale_shape(magnitude.shape))
    rows, cols = granularity.block(magnitude.shape)
    if cols == magnitude.shape[-1] and rows == 1:
        return magnitude.amax(dim=-1, keepdim=True)
    return _blocks(magnitude, granularity).amax(dim=(-3, -1))


def _blocks(values: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """``values [..., N, K]``, padded with zeros, as ``[..., N / rows, rows, K / cols, cols]``."""
    rows, cols = granularity.block(values.shape)
    n, k = values.shape[-2:]
    ragged_rows, ragged_cols = -n % rows, -k % cols
    if ragged_rows or ragged_cols:
        values = torch.nn.functional.pad(values, (0, ragged_cols, 0, ragged_rows))
    n, k = values.shape[-2:]
    return values.reshape(*values.shape[:-2], n // rows, rows, k // cols, cols)


def round_stochastically(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Rounds ``x`` to one of its two FP8 neighbors at random, the nearer one more often: the expectation is ``x``.

    Values beyond the range saturate, non-finite values become NaN, and zeros keep their sign.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = round_stochastically(torch.full((100_000,), 1.03), generator=generator)
        >>> round(x.float().mean().item(), 2)  # rounding to nearest would give 1.0
        1.03
    """
    info = torch.finfo(dtype)
    x32 = x.to(torch.float32).clamp(-info.max, info.max)
    _, exponent = torch.frexp(x32)
    smallest = 1 - (7 if dtype == torch.float8_e4m3fn else 15)  # the exponent of the smallest normal value
    power = ((exponent - 1).clamp(min=smallest) + 127) << 23  # as float32's exponent field: 2**n, exactly
    step = power.view(torch.float32) * info.eps
    noise = torch.rand(x32.shape, dtype=torch.float32, device=x32.device, generator=generator)
    rounded = (torch.floor(x32.abs() / step + noise) * step).clamp(max=info.max).copysign(x32)
    return torch.where(torch.isfinite(x.to(torch.float32)), rounded, torch.nan).to(dtype)
