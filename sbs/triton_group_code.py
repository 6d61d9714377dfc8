"""Kernels over the weights of all layers at once, in Triton's language; `sbs.triton_groups` launches them.

A table says where each layer's weight lies: rows of int64, one column a layer. Program i works on the i-th tile of
BLOCK elements, of the layer whose tiles it falls among. Sums of a tile go to a table of partial sums, (sums, programs);
a second kernel adds them up, layer by layer and in order, in float64.
"""

import triton
import triton.language as tl

from sbs.triton_code import _ROUNDER, _codes, _normalized

WEIGHT, SIZE, FIRST, TILES, OFFSET, OUTER, INNER, CHANNELS, MASKS = (tl.constexpr(i) for i in range(9))
"""Rows of the table: address of the weight; its elements; first tile and how many; where its codes begin; elements of
an output channel, those of an input channel that lie together, input channels; and for each of two masks, whose product
says what counts, its address (0: none) and its strides."""
_NAN = tl.constexpr(tl.PropagateNan.ALL)
_LEAST_STD = tl.constexpr(1e-8)
_VECTORS = ["table_ptr", "shifts_ptr", "scales_ptr", "levels_ptr", "partials_ptr", "codes_ptr", "means_ptr", "stds_ptr"]


@triton.jit
def _layer(table_ptr, layers, LAYERS: tl.constexpr):
    """The layer that this program's tile belongs to."""
    index = tl.arange(0, LAYERS)
    first = tl.load(table_ptr + FIRST * layers + index, mask=index < layers, other=2**62)
    return tl.sum((first <= tl.program_id(0)).to(tl.int32), axis=0) - 1


@triton.jit
def _tile(table_ptr, layers, layer, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of this program's tile, their places in the layer's memory, ones for those that count, zeros else."""
    column = table_ptr + layer
    tile = tl.program_id(0) - tl.load(column + FIRST * layers).to(tl.int32)
    index = tile * BLOCK + tl.arange(0, BLOCK)
    there = index < tl.load(column + SIZE * layers).to(tl.int32)
    w = tl.load(tl.load(column + WEIGHT * layers).to(tl.pointer_type(tl.float32)) + index, mask=there, other=0.0)
    kept = there.to(tl.float32)
    if MASKED:
        outputs = index // tl.load(column + OUTER * layers).to(tl.int32)
        inputs = index // tl.load(column + INNER * layers).to(tl.int32)
        inputs = inputs % tl.load(column + CHANNELS * layers).to(tl.int32)
        for mask in tl.static_range(MASKS, MASKS + 6, 3):
            address = tl.load(column + mask * layers)
            place = outputs * tl.load(column + (mask + 1) * layers).to(tl.int32)
            place += inputs * tl.load(column + (mask + 2) * layers).to(tl.int32)
            values = address.to(tl.pointer_type(tl.float32)) + place
            kept *= tl.load(values, mask=there & (address != 0), other=1.0)
    return w, index, there, kept


@triton.jit
def _total(partials_ptr, first, count, BLOCK: tl.constexpr):
    """Sum of the partial sums of a layer's tiles, float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + first + index, mask=index < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=_VECTORS)
def moments(table_ptr, partials_ptr, layers, LAYERS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Of each tile: how many elements count, their sum, and their squared distance from their own mean; float64."""
    layer = _layer(table_ptr, layers, LAYERS)
    w, _, _, kept = _tile(table_ptr, layers, layer, MASKED, BLOCK)
    wide = w.to(tl.float64)
    kept = kept.to(tl.float64)
    count = tl.sum(kept, axis=0)
    total = tl.sum(wide * kept, axis=0)
    apart = (wide - total / tl.maximum(count, 1.0)) * kept
    place = partials_ptr + tl.program_id(0)
    tl.store(place, count)
    tl.store(place + tl.num_programs(0), total)
    tl.store(place + 2 * tl.num_programs(0), tl.sum(apart * apart, axis=0))


@triton.jit(do_not_specialize=["layers", "programs"], do_not_specialize_on_alignment=_VECTORS)
def add_moments(table_ptr, partials_ptr, means_ptr, stds_ptr, layers, programs, BLOCK: tl.constexpr):
    """Mean and deviation of a layer from those of its tiles (Chan, Golub and LeVeque 1979), by program `layer`."""
    layer = tl.program_id(0)
    first = tl.load(table_ptr + FIRST * layers + layer)
    tiles = tl.load(table_ptr + TILES * layers + layer).to(tl.int32)
    count = _total(partials_ptr, first, tiles, BLOCK)
    mean = _total(partials_ptr + programs, first, tiles, BLOCK) / count
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        index = start + tl.arange(0, BLOCK)
        there = index < tiles
        place = partials_ptr + first + index
        elements = tl.load(place, mask=there, other=0.0)
        apart = tl.load(place + programs, mask=there, other=0.0) / tl.maximum(elements, 1.0) - mean
        within = tl.load(place + 2 * programs, mask=there, other=0.0)
        squares += within + tl.where(elements > 0, elements * apart * apart, 0.0)
    std = tl.sqrt(tl.sum(squares, axis=0)) / tl.sqrt(count)
    tl.store(means_ptr + layer, mean.to(tl.float32))
    tl.store(stds_ptr + layer, tl.maximum(std, _LEAST_STD, propagate_nan=_NAN).to(tl.float32))


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=["table_ptr", "means_ptr"])
def magnitudes(table_ptr, means_ptr, layers, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of |w| over an output channel, by a program each: here a tile is a channel."""
    layer = _layer(table_ptr, layers, LAYERS)
    column = table_ptr + layer
    size = tl.load(column + OUTER * layers).to(tl.int32)
    channel = tl.program_id(0) - tl.load(column + FIRST * layers).to(tl.int32)
    begin = tl.load(column + WEIGHT * layers).to(tl.pointer_type(tl.float32)) + tl.cast(channel, tl.int64) * size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.abs(tl.load(begin + index, mask=index < size, other=0.0))
    tl.store(means_ptr + tl.program_id(0), tl.sum(total, axis=0) / size)


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=_VECTORS)
def encode(
    table_ptr, shifts_ptr, scales_ptr, levels_ptr, codes_ptr, layers,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Signed codes of all weights, one layer's behind the other's."""
    layer = _layer(table_ptr, layers, LAYERS)
    w, index, there, _ = _tile(table_ptr, layers, layer, False, BLOCK)
    scale = tl.load(scales_ptr + layer)
    _, z, _ = _normalized(w, tl.load(shifts_ptr + layer), scale, tl.div_rn(1.0, scale), True, 0, FUSED)
    codes = _codes(z, tl.load(levels_ptr + layer), 0.0, True, 0)
    place = tl.load(table_ptr + OFFSET * layers + layer) + index
    tl.store(codes_ptr + place, codes.to(codes_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=_VECTORS)
def residuals(
    table_ptr, shifts_ptr, scales_ptr, partials_ptr, layers,
    STEPS: tl.constexpr, COUNT: tl.constexpr, LAYERS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Of each tile: how many elements count, and the sums of their residuals to COUNT grids."""
    layer = _layer(table_ptr, layers, LAYERS)
    w, _, _, kept = _tile(table_ptr, layers, layer, MASKED, BLOCK)
    scale = tl.load(scales_ptr + layer)
    _, z, _ = _normalized(w, tl.load(shifts_ptr + layer), scale, tl.div_rn(1.0, scale), True, 0, FUSED)
    place = partials_ptr + tl.program_id(0)
    tl.store(place, tl.sum(kept, axis=0))
    for j in tl.static_range(COUNT):
        nearest = tl.fma(z, -STEPS[j], -_ROUNDER) + _ROUNDER  # as in triton_code.forward
        residual = tl.fma(z, STEPS[j], nearest)
        tl.store(place + (j + 1) * tl.num_programs(0), tl.sum(residual * residual * kept, axis=0))


@triton.jit(do_not_specialize=["layers", "programs"], do_not_specialize_on_alignment=[*_VECTORS, "means_ptr"])
def add_residuals(table_ptr, partials_ptr, means_ptr, layers, programs, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """12 times the mean of a layer's residuals to COUNT grids, by program `layer`."""
    layer = tl.program_id(0)
    first = tl.load(table_ptr + FIRST * layers + layer)
    tiles = tl.load(table_ptr + TILES * layers + layer).to(tl.int32)
    count = _total(partials_ptr, first, tiles, BLOCK)
    for j in tl.static_range(COUNT):
        total = _total(partials_ptr + (j + 1) * programs, first, tiles, BLOCK)
        tl.store(means_ptr + layer * COUNT + j, (12.0 * total / count).to(tl.float32))
