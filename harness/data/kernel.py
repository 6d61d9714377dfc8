"""The one compiled function of the FFCV backend: decode, crop, resize, colour, flip, normalise a range of a batch.

FFCV compiles a pipeline anew in every process (3-19 s each). This function is compiled once and then read from numba's
on-disk cache, for which it must not hold addresses: those of FFCV's C functions come in as arguments.
"""

# ruff: noqa: ARG001, PLR0917 - numba gives intrinsics and kernels their arguments by position

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)


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
def _area_resize(typingctx: Any, function: Any, source: Any, box: Any, target: Any, rows: Any, columns: Any) -> Any:
    """libffcv's resize (OpenCV's INTER_AREA); source is (address, height, width), box (top, bottom, left, right)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, source, box, target, rows, columns = args
        inputs = [builder.extract_value(source, i) for i in range(3)] + [
            builder.extract_value(box, i) for i in range(4)
        ]
        function = builder.inttoptr(address, ir.FunctionType(ir.VoidType(), [_I64] * 11).as_pointer())
        builder.call(function, [_I64(0), *inputs, target, rows, columns])
        return _I64(0)

    three, four = types.UniTuple(types.int64, 3), types.UniTuple(types.int64, 4)
    return types.int64(types.int64, three, four, types.int64, types.int64, types.int64), codegen


@intrinsic
def _bytes_at(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), codegen


def _compile(**options: Any) -> Any:
    """njit with the on-disk cache, or without it where no folder for it can be written."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:
            return njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


@_compile()
def _shift(address: Any, height: Any, width: Any, top: Any, left: Any, size: Any, out: Any) -> None:
    """Copy a box of size x size pixels that may reach over the image's border, where it is black."""
    image = carray(_bytes_at(address), (height * width * 3,), np.uint8)
    for row in range(size):
        for column in range(size):
            y, x = top + row, left + column
            here = 3 * (row * size + column)
            inside = 0 <= y < height and 0 <= x < width
            there = 3 * (y * width + x)
            for c in range(3):
                out[here + c] = image[there + c] if inside else np.uint8(0)


@_compile()
def _byte(value: Any) -> Any:
    return np.uint8(min(max(value + np.float32(0.5), np.float32(0)), np.float32(255)))


@_compile()
def _recolour(image: Any, pixels: Any, factors: Any) -> None:
    """Brightness, contrast, saturation in this order, each rounded to bytes, as torchvision does on PIL images."""
    brightness, contrast, saturation = factors[0], factors[1], factors[2]
    total = 0.0
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


@_compile()
def _grey(image: Any, i: Any) -> Any:
    """PIL's luma of one pixel."""
    red, green, blue = np.int64(image[i]), np.int64(image[i + 1]), np.int64(image[i + 2])
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@_compile()
def _finish(image: Any, size: Any, flip: Any, hole: Any, fill: Any, table: Any, out: Any) -> None:
    for row in range(size):
        in_rows = hole[0] <= row < hole[2]
        for column in range(size):
            here = 3 * (row * size + (size - 1 - column if flip else column))
            in_hole = in_rows and hole[1] <= column < hole[3]
            for c in range(3):
                out[row, column, c] = table[c, fill[c] if in_hole else image[here + c]]


@_compile()
def render(
    functions: Any, records: Any, boxes: Any, flips: Any, colours: Any, holes: Any, fill: Any, table: Any,
    scratch: Any, status: Any, out: Any, first: Any, last: Any,
) -> None:  # fmt: skip
    """Fill `out[first:last]`.

    functions: int64 (2,), addresses of imdecode and resize. records: int64 (n, 5), address, size, mode, height,
    width. boxes, flips, colours (no rows for none), holes: see `augment.Plan`. fill: uint8 (3,), colour of the holes.
    table: (3, 256), the output for each channel and byte. scratch: uint8 (3, bytes) of this caller alone. status:
    int64 (n,), 0 or the decoder's complaint. out: (n, size, size, 3) of the table's type.
    """
    size = out.shape[1]
    image, small, between = scratch[0], scratch[1], scratch[2]
    for k in range(first, last):
        address, height, width = records[k, 0], records[k, 3], records[k, 4]
        status[k] = 0
        if records[k, 2] == 0:
            status[k] = _imdecode(functions[0], address, records[k, 1], height, width, np.int64(image.ctypes.data))
            if status[k] != 0:
                continue
            address = np.int64(image.ctypes.data)
        top, left, rows, columns = (
            np.int64(boxes[k, 0]),
            np.int64(boxes[k, 1]),
            np.int64(boxes[k, 2]),
            np.int64(boxes[k, 3]),
        )
        if rows == size and columns == size:
            _shift(address, height, width, top, left, size, small)
        else:
            source, box = (address, height, width), (top, top + rows, left, left + columns)
            if (rows >= size) != (columns >= size):
                # OpenCV averages areas only where no side grows: shrink the one side, then stretch the other.
                rows, columns = min(rows, size), min(columns, size)
                between_at = np.int64(between.ctypes.data)
                _area_resize(functions[1], source, box, between_at, rows, columns)
                source, box = (between_at, rows, columns), (np.int64(0), rows, np.int64(0), columns)
            _area_resize(functions[1], source, box, np.int64(small.ctypes.data), size, size)
        if len(colours):
            _recolour(small, size * size, colours[k])
        _finish(small, size, flips[k], holes[k], fill, table, out[k])
