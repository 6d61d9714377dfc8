"""The one compiled function of the FFCV backend: cut, decode, resize, colour, flip, normalise a range of a batch.

FFCV compiles a pipeline anew in every process (3-19 s each). This function is compiled once and then read from
numba's on-disk cache, for which it must not hold addresses: that of FFCV's decoder comes in as an argument. All of it
stands in one file, since that cache notices a change of this file alone. No fast-math: the same bytes on every
machine.
"""

# ruff: noqa: ARG001, PLR0917 - numba gives intrinsics and kernels their arguments by position

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
# Unsigned indices spare the check for negative ones, without which loops become vector code.
_U = np.uint64


@intrinsic
def _imdecode(typingctx: Any, function: Any, source: Any, size: Any, height: Any, width: Any, target: Any) -> Any:
    """libffcv's imdecode of a whole JPEG at full size; 0, or another number where turbojpeg complains."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, source, size, height, width, target = args
        height, width = builder.trunc(height, _I32), builder.trunc(width, _I32)
        crop, offset, scale, switches = [height, width], [_I32(0)] * 2, [_I32(1)] * 2, [_I32(0)] * 2
        kinds = [_I64, _I64, _I32, _I32, _I64] + [_I32] * 8
        function = builder.inttoptr(address, ir.FunctionType(_I32, kinds).as_pointer())
        result = builder.call(function, [source, size, height, width, target, *crop, *offset, *scale, *switches])
        return builder.sext(result, _I64)

    return types.int64(*[types.int64] * 6), codegen


@intrinsic
def _bytes_at(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), codegen


def _compile(function: Any) -> Any:
    """njit with the on-disk cache, or without it where no folder for it can be written."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)


@_compile
def _copy(source: Any, start: Any, count: Any, target: Any, to: Any) -> None:
    """Move bytes; assigning slices does the same and takes numba a second longer to compile, each time."""
    for k in range(count):
        target[_U(to + k)] = source[_U(start + k)]


@_compile
def _fill(target: Any, start: Any, end: Any, value: Any) -> None:
    for k in range(start, end):
        target[_U(k)] = value


@_compile
def _number(source: Any, at: Any) -> Any:
    """Two bytes, the high one first."""
    return (np.int64(source[at]) << 8) + np.int64(source[at + 1])


@_compile
def _read_header(source: Any) -> Any:
    """(end of the header, place of the frame, blocks between restarts) of a JPEG; zeros for one that cannot be cut."""
    at, frame, interval, marker = 2, 0, 0, 0
    while marker != 0xDA:
        if at + 20 > len(source) or source[at] != 0xFF:
            return 0, 0, 0
        marker = source[at + 1]
        if marker == 0xC0 and source[at + 9] == 3:
            frame = at
        elif marker == 0xDD:
            interval = _number(source, at + 4)
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4:
            return 0, 0, 0
        at += 2 + _number(source, at + 2)
    return (at, frame, interval) if frame and interval and at < len(source) else (0, 0, 0)


@_compile
def _cut_jpeg(source: Any, height: Any, width: Any, box: Any, out: Any) -> Any:
    """Write the JPEG of the part of `source` around a box (top, left, rows, columns), without decoding anything.

    `encode.restart_interval` leaves markers at which decoding may begin; between them stand independent runs of blocks.
    Those that the box touches are copied behind a header with the new sides. Two pixels more on each side keep the
    smoothing of colours at the border as it is in the whole. Returns (bytes, top, left, height, width) of the part; no
    bytes where little is to be saved or the file is of another kind.
    """
    nothing = (0, 0, 0, 0, 0)
    at, frame, interval = _read_header(source)
    if at == 0:
        return nothing
    block_rows, block_columns = 8 * np.int64(source[frame + 11] & 15), 8 * np.int64(source[frame + 11] >> 4)
    if not (8 <= block_rows <= 16 and 8 <= block_columns <= 16):
        return nothing
    if height != _number(source, frame + 5) or width != _number(source, frame + 7):
        return nothing
    blocks = (width + block_columns - 1) // block_columns
    if blocks % interval != 0:
        return nothing
    runs, run_columns = blocks // interval, interval * block_columns
    first, last = max(box[0] - 2, 0) // block_rows, (min(box[0] + box[2] + 2, height) - 1) // block_rows
    begin, end = max(box[1] - 2, 0) // run_columns, (min(box[1] + box[3] + 2, width) - 1) // run_columns
    top, left = first * block_rows, begin * run_columns
    new_height, new_width = min((last + 1) * block_rows, height) - top, min((end + 1) * run_columns, width) - left
    if 10 * new_height * new_width > 9 * height * width:
        return nothing
    _copy(source, 0, at, out, 0)
    out[frame + 5], out[frame + 6] = new_height >> 8, new_height & 255
    out[frame + 7], out[frame + 8] = new_width >> 8, new_width & 255
    size = _copy_runs(source, at, (first * runs, (last + 1) * runs), (begin, end, runs), out)
    return (size, top, left, new_height, new_width) if size else nothing


@_compile
def _copy_runs(source: Any, at: Any, rows: Any, columns: Any, out: Any) -> Any:
    """Copy runs rows[0] to rows[1] whose number modulo columns[2] lies in columns[0..1]; 0 if runs are missing."""
    size, start, kept = at, at, 0
    for run in range(rows[1]):
        # Inside a run, 0xFF is followed by 0.
        while at + 1 < len(source) and (source[at] != 0xFF or source[at + 1] == 0):
            at += 1
        if at + 1 >= len(source) or not 0xD0 <= source[at + 1] <= 0xD9:
            return 0
        if run >= rows[0] and columns[0] <= run % columns[2] <= columns[1]:
            if kept:
                out[size], out[size + 1] = 0xFF, 0xD0 + (kept - 1) % 8
                size += 2
            _copy(source, start, at - start, out, size)
            size += at - start
            kept += 1
        if source[at + 1] == 0xD9 and run + 1 < rows[1]:
            return 0
        at += 2
        start = at
    out[size], out[size + 1] = 0xFF, 0xD9
    return size + 2


@_compile
def _shift(image: Any, height: Any, width: Any, top: Any, left: Any, size: Any, out: Any) -> None:
    """Copy a box of size x size pixels that may reach over the image's border, where it is black."""
    begin, end = min(max(-left, 0), size), min(max(width - left, 0), size)
    for row in range(size):
        here, y = 3 * row * size, top + row
        if 0 <= y < height and begin < end:
            _fill(out, here, here + 3 * begin, np.uint8(0))
            _copy(image, 3 * (y * width + left + begin), 3 * (end - begin), out, here + 3 * begin)
            _fill(out, here + 3 * end, here + 3 * size, np.uint8(0))
        else:
            _fill(out, here, here + 3 * size, np.uint8(0))


@_compile
def _shares(length: Any, size: Any, first: Any, weights: Any) -> Any:
    """Which inputs each of `size` equal parts of `length` covers: the first, the weights; returns how many at most."""
    step = length / size
    taps = 0
    for k in range(size):
        first[k] = min(int(k * step + 1e-9), length - 1)
        taps = max(taps, min(int(np.ceil((k + 1) * step - 1e-9)), length) - first[k])
    for k in range(size):
        first[k] = min(first[k], length - taps)
        for tap in range(taps):
            here = first[k] + tap
            weights[tap, k] = max(0.0, min((k + 1) * step, here + 1.0) - max(k * step, np.float64(here))) / step
    return taps


@_compile
def _add(line: Any, row: Any, weight: Any) -> None:
    for k in range(len(row)):
        line[k] += weight * row[k]


@_compile
def _two_taps(line: Any, first: Any, weights: Any, out: Any) -> None:
    for k in range(len(first)):
        x, to, a, b = first[k], _U(3) * _U(k), weights[0, k], weights[1, k]
        for c in (_U(0), _U(1), _U(2)):
            out[to + c] = np.uint8(np.int32(a * line[x + c] + b * line[x + c + _U(3)] + np.float32(0.5)))


@_compile
def _three_taps(line: Any, first: Any, weights: Any, out: Any) -> None:
    for k in range(len(first)):
        x, to, a, b, d = first[k], _U(3) * _U(k), weights[0, k], weights[1, k], weights[2, k]
        for c in (_U(0), _U(1), _U(2)):
            mean = a * line[x + c] + b * line[x + c + _U(3)] + d * line[x + c + _U(6)]
            out[to + c] = np.uint8(np.int32(mean + np.float32(0.5)))


@_compile
def _any_taps(line: Any, first: Any, weights: Any, taps: Any, out: Any) -> None:
    for k in range(len(first)):
        x, to = first[k], _U(3) * _U(k)
        for c in (_U(0), _U(1), _U(2)):
            mean = np.float32(0.5)
            for tap in range(taps):
                mean += weights[tap, k] * line[x + _U(3) * _U(tap) + c]
            out[to + c] = np.uint8(np.int32(mean))


@_compile
def _area_resize(image: Any, width: Any, box: Any, size: Any, out: Any) -> None:
    """Each output pixel is the mean of the area that it covers in the box, as in `pixels.area_resize` and OpenCV."""
    top, left, rows, columns = box
    first_row, first_column = np.empty(size, np.int64), np.empty(size, np.int64)
    row_weights = np.empty((rows // size + 2, size), np.float32)
    column_weights = np.empty((columns // size + 2, size), np.float32)
    row_taps = _shares(rows, size, first_row, row_weights)
    column_taps = _shares(columns, size, first_column, column_weights)
    place = np.empty(size, np.uint64)
    for k in range(size):
        place[k] = 3 * first_column[k]
    line = np.empty(3 * columns, np.float32)
    for k in range(size):
        _fill(line, 0, 3 * columns, np.float32(0))
        for tap in range(row_taps):
            start = 3 * ((top + first_row[k] + tap) * width + left)
            if row_weights[tap, k] != 0:
                _add(line, image[start : start + 3 * columns], row_weights[tap, k])
        target = out[3 * k * size : 3 * (k + 1) * size]
        if column_taps == 2:
            _two_taps(line, place, column_weights, target)
        elif column_taps == 3:
            _three_taps(line, place, column_weights, target)
        else:
            _any_taps(line, place, column_weights, column_taps, target)


@_compile
def _byte(value: Any) -> Any:
    return np.uint8(np.int32(min(max(value + np.float32(0.5), np.float32(0)), np.float32(255))))


@_compile
def _grey(image: Any, i: Any) -> Any:
    """PIL's luma of one pixel."""
    red, green, blue = np.int64(image[i]), np.int64(image[i + 1]), np.int64(image[i + 2])
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@_compile
def _recolour(image: Any, pixels: Any, factors: Any) -> None:
    """Brightness, contrast, saturation in this order, each rounded to bytes, as torchvision does on PIL images."""
    brightness, contrast, saturation = factors[0], factors[1], factors[2]
    total = 0
    for i in range(0, 3 * pixels, 3):
        for c in range(3):
            image[i + c] = _byte(image[i + c] * brightness)
        total += _grey(image, i)
    mean = np.float32(np.floor(total / pixels + 0.5))
    for i in range(0, 3 * pixels, 3):
        for c in range(3):
            image[i + c] = _byte(mean + (image[i + c] - mean) * contrast)
        grey = np.float32(_grey(image, i))
        for c in range(3):
            image[i + c] = _byte(grey + (image[i + c] - grey) * saturation)


@_compile
def _finish(image: Any, size: Any, flip: Any, hole: Any, fill: Any, table: Any, out: Any) -> None:
    for row in range(size):
        in_rows = hole[0] <= row < hole[2]
        for column in range(size):
            here = 3 * (row * size + (size - 1 - column if flip else column))
            in_hole = in_rows and hole[1] <= column < hole[3]
            for c in range(3):
                out[row, column, c] = table[c, fill[c] if in_hole else image[here + c]]


@_compile
def render(
    imdecode: Any, records: Any, boxes: Any, flips: Any, colours: Any, holes: Any, fill: Any, table: Any,
    scratch: Any, status: Any, out: Any, first: Any, last: Any,
) -> None:  # fmt: skip
    """Fill `out[first:last]`.

    imdecode: address of libffcv's decoder. records: int64 (n, 5), address, size, mode, height, width. boxes, flips,
    colours (no rows for none), holes: see `augment.Plan`. fill: uint8 (3,), colour of the holes. table: (3, 256), the
    output for each channel and byte. scratch: uint8 (3, bytes) of this caller alone. status: int64 (n,), 0 or the
    decoder's complaint. out: (n, size, size, 3) of the table's type.
    """
    size = out.shape[1]
    decoded, small, part = scratch[0], scratch[1], scratch[2]
    for k in range(first, last):
        height, width = records[k, 3], records[k, 4]
        stored = carray(_bytes_at(records[k, 0]), (records[k, 1],), np.uint8)
        top, left = np.int64(boxes[k, 0]), np.int64(boxes[k, 1])
        rows, columns = np.int64(boxes[k, 2]), np.int64(boxes[k, 3])
        status[k] = 0
        if records[k, 2] == 0:
            address, length = records[k, 0], records[k, 1]
            cut = _cut_jpeg(stored, height, width, (top, left, rows, columns), part)
            if cut[0]:
                address, length = np.int64(part.ctypes.data), cut[0]
                top, left, height, width = top - cut[1], left - cut[2], cut[3], cut[4]
            status[k] = _imdecode(imdecode, address, length, height, width, np.int64(decoded.ctypes.data))
            if status[k] != 0:
                continue
            image = decoded
        else:
            image = stored
        if rows == size and columns == size:
            _shift(image, height, width, top, left, size, small)
        else:
            _area_resize(image, width, (top, left, rows, columns), size, small)
        if len(colours):
            _recolour(small, size * size, colours[k])
        _finish(small, size, flips[k], holes[k], fill, table, out[k])
