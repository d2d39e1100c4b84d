"""Llama 3.1 8B by hand: 32 layers of 4096, 8 of 32 heads for keys and values, 14336 within."""

from irdscale.memory.sizes import Shapes

LAYER = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
SHAPES = Shapes(
    parameters=8_030_261_248,
    item=2,
    scored={f"{layer}.{name}": shape for layer in range(32) for name, shape in LAYER.items()},
    dense=0,
    products=[*(shape for _ in range(32) for shape in LAYER.values()), (128_256, 4096)],
    largest=128_256 * 4096,
    layer=218_112_000,
    hidden=4096,
    layers=32,
    attention=4096,
    causal=True,
    positions=131_072,
)
