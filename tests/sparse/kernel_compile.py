"""Compiles the kernels for GPUs that need not be there, and prints what they take. Run by test_kernels.py."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from irdscale.sparse import dot_kernels, dots, kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"stream_ptr": "*i32", "pairs_ptr": "*i64", "partials_ptr": "*fp32", "values_ptr": "*fp32"} | dict.fromkeys(
    ("slots_ptr", "starts_ptr", "index_ptr", "order_ptr", "tiles_ptr"), "*i32"
)


def compile_for(
    architecture: int, kernel: Any, constants: dict[str, object], multiples: tuple[str, ...], warps: int, stages: int
) -> Any:
    """As for contiguous bfloat16; of the `multiples` it is known that 16 divides them, as of all pointers."""
    names = kernel.arg_names
    types = {name: POINTERS.get(name, "*bf16") if name.endswith("_ptr") else "i32" for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in names
            if name.endswith("_ptr") or name in multiples
        },
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def main() -> None:
    length, warps, stages = kernels.HALF_BLOCK
    tile = {"TILE": kernels.TILE, "ENTRIES": kernels.ENTRIES, "WIDEN": False, "BLOCK_T": length}
    tile |= {"left_p": 1, "right_q": 1}
    dot = {"PACKED": True, "WIDEN": False, "QUADS": 4, "WARPS": dots.WARPS, "ROW": dots.ROW}
    for architecture in (80, 89, 90):
        for name, kernel, *how in (
            ("dots", dot_kernels.dot_blocks, dot, (), dots.WARPS, 1),
            ("tiles", kernels._jitted(), tile, ("rows", "columns", "left_t", "right_t"), warps, stages),
        ):
            compiled = compile_for(architecture, kernel, *how)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
            ptx = compiled.asm["ptx"]
            row = {
                "kernel": name,
                "architecture": architecture,
                "stack": max(int(number) for number in re.findall(r"STACK:(\d+)", usage)),
                "shared": compiled.metadata.shared,
                "barriers": ptx.count("bar.sync"),
                "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
                "wide_copies": len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)),
                "products": ptx.count("mma.sync"),
            }
            print(json.dumps(row))


if __name__ == "__main__":
    main()
