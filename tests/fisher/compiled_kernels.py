"""Compile the Triton kernel ahead of time, which needs no GPU, and print what each variant takes as JSON.

Run by test_kernels.py in a process of its own, with TRITON_INTERPRET=0. Arguments: cases as data type:capability:tile,
such as bfloat16:90:large.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from irdscale.fisher import kernels

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def compiled(dtype: str, capability: int, tile: kernels.Tile, aligned: bool) -> Any:
    """The kernel as a launch would compile it."""
    jitted = kernels._jitted(aligned)
    constants = kernels._constants(tile, aligned)
    signature, attributes, places = {}, {}, {}
    for place, parameter in enumerate(jitted.params):
        name = parameter.name
        if name in constants:
            signature[name], places[place,] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + (TYPES[dtype] if name in ("left_ptr", "right_ptr") else "fp32")
            if not parameter.do_not_specialize:
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type
            assert parameter.do_not_specialize
    source = ASTSource(fn=jitted, signature=signature, constexprs=places, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any) -> dict[str, int]:
    """Registers and bytes of stack of a thread, from the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", said)}


def main() -> None:
    for case in sys.argv[1:]:
        dtype, capability, kind = case.split(":")
        tiles = kernels._tiles_of(getattr(torch, dtype), (int(capability) // 10, int(capability) % 10))
        kernel = compiled(dtype, int(capability), getattr(tiles, kind), kind != "unaligned")
        ptx = kernel.asm["ptx"]
        found = resources(kernel) | {
            "case": case,
            "shared": kernel.metadata.shared,
            "wgmma": ptx.count("wgmma.mma_async"),
            "mma": len(re.findall(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
            "copies": len(re.findall(r"cp\.async\.c\w\.shared\.global", ptx)),
            "prefetch": ptx.count("prefetch.global.L2"),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
