"""A compressed network as one small file: packed integer codes, scales, norms, and the policy that shapes it.

Layout: the 8 bytes b"SBSNET01", the header's length and the CRC-32 of it and of all that follows (4 bytes each, little
endian), the header (zlib, JSON), the payload.
"""

import json
import math
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbs.convert import compress
from sbs.errors import SbsError
from sbs.layers import QuantizedLayer
from sbs.modules import unwrapped
from sbs.policy import LayerPolicy, Policy
from sbs.space import levels
from sbs.structure import structure
from sbs.supernet import SuperNet
from sbs.weights import moments, weight_codes

MAGIC = b"SBSNET01"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DTYPES = {str(t).removeprefix("torch."): t for t in (*_FLOATS, *_WHOLE)}


def pack(values: Tensor, bits: int) -> bytes:
    """Whole numbers 0 to 2**bits - 1 as a string of bits, lowest first, padded to whole bytes."""
    shifts = torch.arange(bits)
    flat = ((values.reshape(-1, 1).to(torch.int64) >> shifts) & 1).reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return bytes((flat << torch.arange(8)).sum(dim=1).to(torch.uint8).numpy())


def unpack(data: bytes, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: `count` whole numbers, int64."""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int64)
    flat = ((raw.unsqueeze(1) >> torch.arange(8)) & 1).reshape(-1)[: count * bits]
    return (flat.view(count, bits) << torch.arange(bits)).sum(dim=1)


@torch.no_grad()
def export(net: nn.Module, path: str | Path) -> None:
    """Write a compressed network (of `compress`) to `path`: codes at their bits, everything else as it is.

    The file is within a few per cent of cost(net).bytes. Raises SbsError if no layer of `net` is quantised.
    """
    net = unwrapped(net)
    layers = {name: m for name, m in net.named_modules() if isinstance(m, QuantizedLayer)}
    if not layers:
        raise SbsError(f"{type(net).__name__} has no quantised layer; export what sbs.compress() returned")
    if isinstance(net, SuperNet):
        raise SbsError("a super-network cannot be exported; freeze it and compress it first")
    entries: list[dict[str, Any]] = []
    payload = bytearray()
    for name, shape, bits, dtype, data in _tensors(net, layers):
        entries.append({"name": name, "shape": shape, "bits": bits, "dtype": dtype, "bytes": len(data)})
        payload += data
    header = {
        "model": type(net).__name__,
        "layers": _shapes(net, layers),
        "structure": _structure(net),
        "tensors": entries,
    }
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = packed + bytes(payload)
    length = len(packed).to_bytes(4, "little")
    Path(path).write_bytes(MAGIC + length + zlib.crc32(length + body).to_bytes(4, "little") + body)


def _tensors(
    net: nn.Module, layers: dict[str, QuantizedLayer]
) -> Iterator[tuple[str, list[int], int | None, str, bytes]]:
    """Name, shape, bits of a code (None: plain numbers), type and bytes of everything that is stored."""
    quantized = {f"{name}.weight": m for name, m in layers.items() if m.quantizes_weight}
    skipped = {f"{name}.{suffix}" for name in layers for suffix in ("weight_clip_floor", "activation_clip_floor")}
    skipped |= {f"{name}.weight_clip" for name in layers}
    for name, tensor in net.state_dict().items():
        if name in skipped or name.endswith("num_batches_tracked"):
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype not in _DTYPES.values():
            raise SbsError(f"{name} is {dtype}, which an exported file does not hold; known: {', '.join(_DTYPES)}")
        if name not in quantized:
            yield name, list(tensor.shape), None, dtype, _raw(tensor)
            continue
        layer = quantized[name]
        (bits,) = layer.settings.weight_bits
        scale, codes = codes_of(layer, bits)
        yield name, list(tensor.shape), bits, dtype, pack((codes.cpu() + levels(bits)) / 2, bits)
        yield f"{name}.scale", [], None, dtype, _raw(scale)


def codes_of(layer: QuantizedLayer, bits: int) -> tuple[Tensor, Tensor]:
    """Scale v_w * std and signed codes, as the layer computes them, from the file where it came from one."""
    given = layer.given_codes()
    if given is not None:
        return given.scale, given.codes.contiguous()
    selected = layer.weight.new_full((1,), float(levels(bits)))
    found = moments([layer.weight], [layer.kept])
    (made,) = weight_codes([layer.weight.contiguous()], [layer.weight_clip], selected, found)
    return made.scale, made.codes


def _raw(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _shapes(net: nn.Module, layers: dict[str, QuantizedLayer]) -> list[list[Any]]:
    """Every convolution and linear layer: name, weight bits, activation bits, output channels."""
    rows = []
    for name, m in net.named_modules():
        if not isinstance(m, nn.Conv2d | nn.Linear):
            continue
        bits = (32, 32)
        if name in layers:
            bits = (layers[name].settings.weight_bits[0], layers[name].settings.activation_bits[0])
        rows.append([name, *bits, m.weight.shape[0]])
    return rows


def _structure(net: nn.Module) -> str | None:
    """The digest, or None after a warning: a network must not be lost to what keeps it from being traced."""
    try:
        return structure(net)
    except Exception as error:  # noqa: BLE001 - of forward(), which may be anybody's
        warnings.warn(f"what {type(net).__name__} does around its layers goes unchecked: {error}", stacklevel=4)
        return None


@torch.no_grad()
def load_exported(path: str | Path, model: nn.Module, example_input: Tensor) -> nn.Module:
    """Rebuild an exported network for inference: `model` is a float network of the same kind, unpruned.

    Logits are those of the network that was exported. example_input: (N, C, H, W), its shape matters. Raises SbsError
    for a file that is not an export, is cut off, or belongs to another network.
    """
    header, payload = _read(Path(path))
    model = unwrapped(model)
    full = {name: m.weight.shape[0] for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    layers = tuple(
        LayerPolicy(name, wb, ab, None if count == full.get(name) else tuple(range(count)))
        for name, wb, ab, count in header["layers"]
    )
    policy = Policy(header["model"], tuple(example_input.shape[1:]), layers)
    net = compress(model, policy, example_input=example_input)
    known = header.get("structure")
    if known is not None and known != _structure(net):
        raise SbsError(
            f"{path}: the network that was exported computes something else around the same layers (activations, "
            f"strides, what is added to what): build {header['model']} as it was then"
        )
    tensors = {entry["name"]: _decode(entry, data) for entry, data in _chunks(header["tensors"], payload)}
    state, codes_of_layers = net.state_dict(), []
    for name, m in net.named_modules():
        if isinstance(m, QuantizedLayer) and m.quantizes_weight:
            (bits,) = m.settings.weight_bits
            codes, scale = 2 * tensors[f"{name}.weight"] - levels(bits), tensors.pop(f"{name}.weight.scale")
            tensors[f"{name}.weight"] = scale * codes / levels(bits)
            codes_of_layers.append((m, codes, scale))
    state.update(tensors)
    net.load_state_dict(state)
    for m, codes, scale in codes_of_layers:
        m.give_codes(codes, scale)
    return net.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SbsError(f"{path}: cannot be read: {error.strerror}") from None
    if data[:8] != MAGIC:
        raise SbsError(f"{path}: not an exported network; the file does not start with {MAGIC.decode()}")
    size = int.from_bytes(data[8:12], "little")
    if zlib.crc32(data[8:12] + data[16:]) != int.from_bytes(data[12:16], "little"):
        raise SbsError(f"{path}: the file is cut off or damaged (its checksum does not fit); export the network again")
    header: dict[str, Any] = json.loads(zlib.decompress(data[16 : 16 + size]))
    return header, data[16 + size :]


def _chunks(entries: list[dict[str, Any]], payload: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    start = 0
    for entry in entries:
        yield entry, payload[start : start + entry["bytes"]]
        start += entry["bytes"]


def _decode(entry: dict[str, Any], data: bytes) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    if entry["bits"] is not None:
        return unpack(data, entry["bits"], math.prod(shape)).to(dtype).view(shape)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
