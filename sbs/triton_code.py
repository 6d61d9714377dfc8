"""The kernels of `sbs.kernels` in Triton's language, one pass over memory each; `sbs.triton_kernels` launches them.

Memory is cut into tiles of ROWS x COLUMNS, columns next to each other. What rows and columns are is said by LAYOUT:
    FLAT     no channels matter: rows follow each other
    PIXELS   (pixels, channels): a row is a pixel, a program keeps to its block of channels
    PLANES   (images, channels, positions): a row is a channel, a program keeps to its channels and positions
Program (i, j, k) of the grid has the i-th block of channels and the k-th of positions, and every j-th tile of the rest.
So nothing is divided to find a channel. Sums of a program go to a table; a second kernel adds that up, in order.

Every product is rounded before it is added to (`enable_fp_fusion=False` at launch), as in eager code, or some codes
would be others; tl.fma stands where that cannot matter.
"""

import triton
import triton.language as tl

FLAT, PIXELS, PLANES = (tl.constexpr(i) for i in range(3))
NONE, BEFORE, AFTER, STATISTICS = (tl.constexpr(i) for i in range(4))
# added and taken away again, it leaves the nearest integer, ties to even: floats of 2**23 and more have no fraction
_ROUNDER = tl.constexpr(12582912.0)
_NAN = tl.constexpr(tl.PropagateNan.ALL)
FUSED = not triton.knobs.runtime.interpret
"""Whether `_quotient` may rely on fused multiply-adds, which the interpreter rounds twice."""
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
"""Of every launch."""
# what differs from layer to layer must not make variants of a kernel: sizes, and where among others a number lies
_SIZES = ["tiles", "rows", "extent"]
_SCALARS = ["gate_ptr", "shift_ptr", "scale_ptr", "levels_ptr", "grad_scale_ptr"]


@triton.jit
def _nearest(x):
    """`x` rounded to an integer, ties to even; |x| < 2**22."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _quotient(a, b, reciprocal, FUSED: tl.constexpr):
    """a / b, rounded once, for |a| <= b: two corrections of a * (1 / b), the last of which is exact (Markstein 1990).

    Half as many instructions as the general division, which looks after operands of every size.
    """
    if FUSED:
        q = a * reciprocal
        q = tl.fma(tl.fma(q, -b, a), reciprocal, q)
        return tl.fma(tl.fma(q, -b, a), reciprocal, q)
    else:
        return tl.div_rn(a, b + tl.zeros_like(a))


@triton.jit
def _feature(x, RELU: tl.constexpr, LIMIT: tl.constexpr):
    """x in float32, behind the ReLU that is the quantiser's: RELU is 0 without, 1 with one, 2 with one up to LIMIT."""
    x = x.to(tl.float32)
    if RELU > 0:
        x = tl.maximum(x, 0.0, propagate_nan=_NAN)
    if RELU == 2:
        x = tl.minimum(x, LIMIT, propagate_nan=_NAN)
    return x


@triton.jit
def _normalized(x, shift, scale, reciprocal, SIGNED: tl.constexpr, RELU: tl.constexpr, FUSED: tl.constexpr):
    """Clipped value (u or z), z in [0, 1], and whether x lies within the clip.

    Clipped before the division, which is monotonous and maps the ends to 1 and -1 or 0: so the value is the same.
    """
    if SIGNED:
        x = x - shift
        inside = tl.abs(x) <= scale
        clipped = tl.maximum(x, -scale, propagate_nan=_NAN)
    elif RELU > 0:
        inside = x <= scale
        clipped = x
    else:
        inside = (x >= 0) & (x <= scale)
        clipped = tl.maximum(x, 0.0, propagate_nan=_NAN)
    clipped = tl.minimum(clipped, scale, propagate_nan=_NAN)
    value = _quotient(clipped, scale, reciprocal, FUSED)
    if SIGNED:
        z = (value + 1.0) * 0.5
    else:
        z = value
    return value, z, inside


@triton.jit
def _codes(z, levels, gate, SIGNED: tl.constexpr, MODE: tl.constexpr):
    codes = _nearest(z * levels)
    if SIGNED:
        codes = 2.0 * codes - levels
    if MODE == AFTER:
        codes = codes * gate
    return codes


@triton.jit
def _folded(x, FOLD: tl.constexpr):
    """Sums of FOLD neighbours, which one thread holds: (rows, columns) -> (rows, columns / FOLD)."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // FOLD, FOLD)), axis=2)


@triton.jit
def _places(tile, rows, extent, LAYOUT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where tile `tile` of this program begins; offsets of its elements from there; which of them there are.

    rows: pixels, or channels of PLANES. extent: elements of FLAT, channels of PIXELS, positions of PLANES, in UNITs:
    the product tells the compiler what vectors of UNIT elements are all there or not.
    """
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    if LAYOUT == FLAT:
        size: tl.constexpr = ROWS * COLUMNS
        start = tl.cast(tile, tl.int64) * size
        left = tl.minimum(extent - tl.cast(tile, tl.int64) * (size // UNIT), size // UNIT).to(tl.int32) * UNIT
        within = r * COLUMNS + c
        return start, within, within < left
    block = tl.program_id(0)
    width = extent * UNIT
    if LAYOUT == PIXELS:
        row = tile * ROWS
        start = tl.cast(row, tl.int64) * width + block * COLUMNS
        column = block * COLUMNS
    else:
        row = block * ROWS
        column = tl.program_id(2) * COLUMNS
        start = (tl.cast(tile, tl.int64) * rows + row) * width + column
    return start, r * width + c, (r < rows - row) & (c < width - column)


@triton.jit
def _gates(gate_ptr, rows, extent, LAYOUT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The gates of this program's channels, as a row or a column of the tile."""
    if LAYOUT == PIXELS:
        channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        return tl.load(gate_ptr + channel, mask=channel < extent * UNIT, other=0.0).to(tl.float32)[None, :]
    else:
        channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        return tl.load(gate_ptr + channel, mask=channel < rows, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT tiles of zeros."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return zeros


@triton.jit
def _store_sums(sums, partials_ptr, COUNT: tl.constexpr):
    """The sums of this program's tiles to its column of the table (COUNT, programs)."""
    width = tl.num_programs(0) * tl.num_programs(1)
    programs = width * tl.num_programs(2)
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1) + width * tl.program_id(2)
    for j in tl.static_range(COUNT):
        tl.store(partials_ptr + j * programs + program, tl.sum(sums[j]))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_SCALARS[:4])
def forward(
    x_ptr, gate_ptr, codes_ptr, partials_ptr, shift_ptr, scale_ptr, levels_ptr, tiles, rows, extent,
    SIGNED: tl.constexpr, MODE: tl.constexpr, RELU: tl.constexpr, LIMIT: tl.constexpr, STEPS: tl.constexpr,
    COUNT: tl.constexpr, CODES: tl.constexpr, CHECK: tl.constexpr, LAYOUT: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Codes, where CODES says so, and COUNT sums: of residuals to STEPS, or of what is not a number where CHECK is set.

    tiles: of the axis that programs (., j, .) share. Bytes an element: those of x and of its code.
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    reciprocal = tl.div_rn(1.0, scale)
    shift = 0.0
    levels = 0.0
    gate = 0.0
    if SIGNED:
        shift = tl.load(shift_ptr).to(tl.float32)
    if CODES:
        levels = tl.load(levels_ptr).to(tl.float32)
    if MODE != NONE:
        gate = _gates(gate_ptr, rows, extent, LAYOUT, UNIT, ROWS, COLUMNS)
    sums = _zeros(COUNT, ROWS, COLUMNS // FOLD)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        start, within, there = _places(tile, rows, extent, LAYOUT, UNIT, ROWS, COLUMNS)
        x = _feature(tl.load(x_ptr + start + within, mask=there, other=0.0), RELU, LIMIT)
        if MODE == BEFORE:
            x = x * gate
        _, z, _ = _normalized(x, shift, scale, reciprocal, SIGNED, RELU, FUSED)
        if CODES:
            codes = _codes(z, levels, gate, SIGNED, MODE)
            tl.store(codes_ptr + start + within, codes.to(codes_ptr.dtype.element_ty), mask=there)
        if COUNT > 0:
            if SIGNED:  # where what lies beside the tensor, read as zero, would leave something over
                z = tl.where(there, z, 0.0)
            if CHECK:
                sums = (sums[0] + _folded(z * 0.0, FOLD),)
            else:
                new = ()
                for j in tl.static_range(COUNT):
                    # negative, and fused: half-way between two integers both are as far away
                    nearest = tl.fma(z, -STEPS[j], -_ROUNDER) + _ROUNDER
                    residual = tl.fma(z, STEPS[j], nearest)
                    residual = residual * residual
                    if MODE == AFTER or MODE == STATISTICS:
                        residual = residual * gate
                    new = new + (sums[j] + _folded(residual, FOLD),)
                sums = new
    _store_sums(sums, partials_ptr, COUNT)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_SCALARS[:5])
def backward(
    x_ptr, gate_ptr, grad_ptr, dx_ptr, codes_ptr, partials_ptr, dgate_ptr, shift_ptr, scale_ptr, levels_ptr,
    grad_scale_ptr, tiles, rows, extent,
    SIGNED: tl.constexpr, MODE: tl.constexpr, RELU: tl.constexpr, LIMIT: tl.constexpr, STEPS: tl.constexpr,
    SHARES: tl.constexpr, COUNT: tl.constexpr, CODES: tl.constexpr, LAYOUT: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """dx, codes where CODES says so, and tables of sums: <g, v_q - v * 1[inside]>, <g, offset_j>, and per channel.

    STEPS, SHARES: n and 1 / n of the COUNT candidate bit-widths. Bytes an element: those of x, grad, dx and code.
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    reciprocal = tl.div_rn(1.0, scale)
    levels = tl.load(levels_ptr).to(tl.float32)
    share = tl.div_rn(1.0, levels)
    grad_scale = tl.load(grad_scale_ptr).to(tl.float32)
    shift = 0.0
    gate = 0.0
    if SIGNED:
        shift = tl.load(shift_ptr).to(tl.float32)
    if MODE != NONE:
        gate = _gates(gate_ptr, rows, extent, LAYOUT, UNIT, ROWS, COLUMNS)
    # pixels of a channel lie in as many threads as the tile has rows; positions of a plane side by side
    CHANNEL_FOLD: tl.constexpr = 1 if LAYOUT == PIXELS else FOLD
    dgate = tl.zeros((ROWS, COLUMNS // CHANNEL_FOLD), tl.float32)
    sums = _zeros(COUNT, ROWS, COLUMNS // FOLD)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        start, within, there = _places(tile, rows, extent, LAYOUT, UNIT, ROWS, COLUMNS)
        raw = tl.load(x_ptr + start + within, mask=there, other=0.0)
        g = tl.load(grad_ptr + start + within, mask=there, other=0.0).to(tl.float32) * grad_scale
        feature = _feature(raw, RELU, LIMIT)
        x = feature
        if MODE == BEFORE:
            x = x * gate
        value, z, inside = _normalized(x, shift, scale, reciprocal, SIGNED, RELU, FUSED)
        if CODES:
            codes = _codes(z, levels, gate, SIGNED, MODE)
            tl.store(codes_ptr + start + within, codes.to(codes_ptr.dtype.element_ty), mask=there)
        quantized = _nearest(z * levels) * share
        if SIGNED:
            quantized = 2.0 * quantized - 1.0
        if MODE == AFTER:
            product = g * quantized  # times the scale, in the end
            if CHANNEL_FOLD > 1:
                product = _folded(product, CHANNEL_FOLD)
            dgate += product
            g = g * gate
        dx = tl.where(inside, g, 0.0)
        new = (sums[0] + _folded(g * (quantized - tl.where(inside, value, 0.0)), FOLD),)
        coarse = _nearest(z * STEPS[0]) * SHARES[0]
        for j in tl.static_range(1, COUNT):
            fine = _nearest(z * STEPS[j]) * SHARES[j]
            new = new + (sums[j] + _folded(g * (fine - coarse), FOLD),)
            coarse = fine
        sums = new
        if MODE == BEFORE:
            product = dx * feature
            if CHANNEL_FOLD > 1:
                product = _folded(product, CHANNEL_FOLD)
            dgate += product
            dx = dx * gate
        if RELU > 0:
            passes = raw.to(tl.float32) > 0
            if RELU == 2:
                passes = passes & (raw.to(tl.float32) < LIMIT)
            dx = tl.where(passes, dx, 0.0)
        tl.store(dx_ptr + start + within, dx.to(dx_ptr.dtype.element_ty), mask=there)
    _store_sums(sums, partials_ptr, COUNT)
    if MODE == AFTER:
        dgate = dgate * scale
    if MODE == BEFORE or MODE == AFTER:
        row = tl.program_id(1) + tl.num_programs(1) * tl.program_id(2)
        if LAYOUT == PIXELS:
            channels = extent * UNIT
            channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
            tl.store(dgate_ptr + row * channels + channel, tl.sum(dgate, axis=0), mask=channel < channels)
        else:
            channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
            tl.store(dgate_ptr + row * rows + channel, tl.sum(dgate, axis=1), mask=channel < rows)


@triton.jit
def _total(partials_ptr, programs, BLOCK: tl.constexpr):
    """Sum of a row of the table of sums."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + index, mask=index < programs, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["programs"])
def add_sums(partials_ptr, sums_ptr, programs, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """FACTOR times the sum of row i of a table (rows, programs), by program i."""
    row = tl.program_id(0)
    tl.store(sums_ptr + row, _total(partials_ptr + row * programs, programs, BLOCK) * FACTOR)


@triton.jit(
    do_not_specialize=["programs", "rows", "channels"],
    do_not_specialize_on_alignment=["scale_ptr", "spread_ptr", "bit_gates_ptr"],
)
def add_gradients(
    partials_ptr, table_ptr, bit_gates_ptr, scale_ptr, spread_ptr, dscale_ptr, dbits_ptr, dgate_ptr, programs, rows,
    channels,
    SIGNED: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the scale and the bit gates by the first program, of a block of channel gates by every other.

    The nested gated sum's by Horner's scheme from the top, as in `sbs.kernels`.
    """
    if tl.program_id(0) == 0:
        dscale = _total(partials_ptr, programs, BLOCK)
        if spread_ptr is not None:
            dscale = dscale * tl.load(spread_ptr)
        tl.store(dscale_ptr, dscale.to(dscale_ptr.dtype.element_ty))
        if COUNT > 1:
            tail = tl.full((), 0.0, tl.float32)
            for j in tl.static_range(COUNT - 2, -1, -1):
                if j < COUNT - 2:
                    tail = tail * tl.load(bit_gates_ptr + j + 1).to(tl.float32)
                tail = tail + _total(partials_ptr + (j + 1) * programs, programs, BLOCK)
                product = tl.load(scale_ptr).to(tl.float32)
                if SIGNED:
                    product = 2.0 * product
                for lower in tl.static_range(j):
                    product = product * tl.load(bit_gates_ptr + lower).to(tl.float32)
                tl.store(dbits_ptr + j, (product * tail).to(dbits_ptr.dtype.element_ty))
    elif table_ptr is not None:
        channel = (tl.program_id(0) - 1) * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.arange(0, ROWS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, rows, ROWS):
            index = (start + row)[:, None]
            there = (index < rows) & (channel < channels)[None, :]
            total += tl.load(table_ptr + index * channels + channel[None, :], mask=there, other=0.0)
        tl.store(dgate_ptr + channel, tl.sum(total, axis=0), mask=channel < channels)
