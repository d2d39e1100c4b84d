"""Read a GGUF file's header and check that the file is complete; weights are not read.

Source: the GGUF specification of the ggml project, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from irdscale.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Value types of the specification -> their layouts.
_FIXED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file's header.

    Attributes:
        values: key -> value, without arrays.
        shapes: shape of each tensor, in torch's order.
        size: bytes of the complete file.
    """

    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    size: int

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as `llama`."""
        return str(self.values.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for shape in self.shapes.values())


def read_header(file: Path, path: str) -> GgufHeader:
    """Read a GGUF file's header, and check that the file is complete.

    Args:
        path: name of the file, for errors.

    Raises:
        InputError: the file is not a readable GGUF file, is truncated, or holds only a part of a model.
    """

    def refused(found: str, expected: str) -> InputError:
        return InputError(f"{path}: {found}", expected, key="model.path")

    size = file.stat().st_size
    if size < len(MAGIC):
        raise refused(f"found {size} bytes", "a GGUF file")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(MAGIC)] != MAGIC:
            raise refused(f"found no GGUF file (it begins with {data[:4]!r})", f"one that begins with {MAGIC!r}")
        cursor = _Cursor(data, len(MAGIC))
        try:
            version = cursor.number("<I")
            if version not in VERSIONS:
                known = " or ".join(map(str, VERSIONS))
                raise refused(f"found version {version} of the format", f"{known}, little-endian")
            header = _read(cursor)
        except (struct.error, EOFError):
            raise refused(f"found {size:,} bytes, which end inside the header", "the whole file") from None
        except KeyError as error:
            raise refused(f"found a damaged header (type {error})", "a whole file") from None
    if header.size > size:
        raise refused(f"found {size:,} bytes", f"the whole file of {header.size:,} bytes")
    if not header.architecture:
        raise refused("found no general.architecture", "a GGUF file of a model")
    parts = int(header.values.get("split.count", 1))
    if parts > 1:
        raise refused(f"found one of {parts} files of a model", "one whole file (llama-gguf-split --merge)")
    return header


class _Cursor:
    """Reads values in order."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data, self.place = data, place

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.place)
        self.skip(struct.calcsize(layout))
        return value

    def skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.data):
            raise EOFError

    def text(self) -> str:
        length = self.number("<Q")
        begin = self.place
        self.skip(length)
        return self.data[begin : self.place].decode(errors="replace")

    def value(self, kind: int) -> Any:
        """Read a value of a type; an array is skipped and gives None."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_FIXED[kind])
        inside, count = self.number("<I"), self.number("<Q")
        if inside in _FIXED:
            self.skip(count * struct.calcsize(_FIXED[inside]))
            return None
        for _ in range(count):
            if inside == _STRING:
                self.skip(self.number("<Q"))
            else:
                self.value(inside)
        return None


def _read(cursor: _Cursor) -> GgufHeader:
    """Read the header after the version.

    Raises:
        struct.error, EOFError: the file ends before the header does.
        KeyError: a type is unknown.
    """
    from gguf import GGML_QUANT_SIZES

    tensors, keys = cursor.number("<Q"), cursor.number("<Q")
    values = {}
    for _ in range(keys):
        key = cursor.text()
        values[key] = cursor.value(cursor.number("<I"))
    sizes = {int(key): found for key, found in GGML_QUANT_SIZES.items()}
    shapes, ends = {}, [0]
    for _ in range(tensors):
        name = cursor.text()
        shape = tuple(reversed([cursor.number("<Q") for _ in range(cursor.number("<I"))]))
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        block, taken = sizes[kind]
        shapes[name] = shape
        ends.append(offset + prod(shape) // block * taken)
    alignment = int(values.get("general.alignment") or _ALIGNMENT)
    begin = -(-cursor.place // alignment) * alignment
    return GgufHeader({k: v for k, v in values.items() if v is not None}, shapes, begin + max(ends))
