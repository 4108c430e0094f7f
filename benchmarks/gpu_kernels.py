"""Times the products of one decode step on a GPU: all layers of a Llama-3.1-8B shape, in a CUDA graph.

    python benchmarks/gpu_kernels.py [--rows 1,16,32] [--layouts bf16,int4,...] [--layers 32]
    python benchmarks/gpu_kernels.py --deterministic [--rows 1,32,256,8192] [--tune]

Prints for each layout and number of rows: ms a step, the bytes of weights over that time, and their share of what the
card reads; for bf16 also torch's own product, for w8a8 with more than 16 rows torch's product of integers, without
scales, and for tiles the kernel whose rows do not depend on their company. More than 64 rows are not for bf16.

With --deterministic, for each weight in bf16: the product whose rows do not depend on their company beside torch's, and
whether the first row has the same bits for all numbers of rows. --tune times it with other tiles and cuts too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pelton.ops.cuda import few_rows, same_rows
from pelton.quant.codes import Codes
from pelton.quant.gpu import Int8, Tiled
from pelton.quant.tiled import make_tiles

Weight = Tensor | Tiled | Int8

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def codes(shape: tuple[int, int], bits: int, group: int, **options: object) -> Codes:
    num_out, num_in = shape
    u = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device="cuda")
    scales = (torch.rand(num_out, num_in // group, device="cuda") * 0.01).half().float()  # as files have them
    return Codes(bits, u, scales, **options)


def q4_k(shape: tuple[int, int]) -> Codes:
    num_out, num_in = shape
    u = torch.randint(0, 16, shape, dtype=torch.uint8, device="cuda")
    subs = [torch.randint(0, 64, (num_out, num_in // 32), dtype=torch.uint8, device="cuda") for _ in range(2)]
    supers = [torch.rand(num_out, num_in // 256, device="cuda").half().float() * 1e-3 for _ in range(2)]
    return Codes(4, u, *subs, supers=supers[0], super_mins=supers[1])


def float8(shape: tuple[int, int]) -> Codes:
    """With a scale for each 128 columns."""
    numbers = torch.randn(shape, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(shape[0], shape[1] // 128, device="cuda") * 0.01
    return Codes(8, numbers.view(torch.uint8), scales, float8=True)


def with_zeros(shape: tuple[int, int]) -> Codes:
    """Zero points, as in AWQ."""
    parts = codes(shape, 4, 128)
    return Codes(4, parts.codes, parts.scales, zeros=torch.randint_like(parts.scales, 0, 16))


def w8a8(shape: tuple[int, int]) -> Int8:
    numbers = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
    return Int8(numbers, torch.rand(shape[0], device="cuda") * 0.01, torch.bfloat16)


def tiled(parts: Codes) -> Tiled:
    return Tiled(make_tiles(parts), torch.bfloat16)


LAYOUTS: dict[str, Callable[[tuple[int, int]], Weight]] = {
    "bf16": lambda shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02,
    "int4": lambda shape: tiled(codes(shape, 4, 128, zero=8)),
    "int4z": lambda shape: tiled(with_zeros(shape)),
    "nf4": lambda shape: tiled(codes(shape, 4, 64, values=tuple(i / 8 - 1 for i in range(16)))),
    "q4_k": lambda shape: tiled(q4_k(shape)),
    "q6_k": lambda shape: tiled(codes(shape, 6, 16, zero=32)),
    "int8": lambda shape: tiled(codes(shape, 8, shape[1], zero=128)),
    "fp8": lambda shape: tiled(float8(shape)),
    "w8a8": w8a8,
}


def num_bytes(weight: Weight) -> int:
    if isinstance(weight, Tensor):
        tensors = [weight]
    elif isinstance(weight, Int8):
        tensors = [weight.weight, weight.scales]
    else:
        tiles = weight.tiles
        tensors = [tiles.codes, tiles.more, tiles.scales, tiles.supers]
    return sum(t.numel() * t.element_size() for t in tensors)


def time_graph(run: Callable[[], None], repeats: int = 20) -> float:
    """Milliseconds of one replay, the median of several."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def read_speed() -> float:
    """GB/s of reading memory."""
    x = torch.ones(4 << 30, dtype=torch.uint8, device="cuda").view(torch.float32)
    out = torch.empty((), device="cuda")
    return x.numel() * 4 / time_graph(lambda: torch.sum(x, dim=0, out=out)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    speed = read_speed()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: reads {speed:,.0f} GB/s", flush=True)
    if args.deterministic:
        for shape in SHAPES:
            compare(shape, [int(num) for num in (args.rows or "1,32,256,8192").split(",")], speed, args.tune)
        return
    for name in args.layouts.split(","):
        layers = [[LAYOUTS[name](shape) for shape in SHAPES] for _ in range(args.layers)]
        size = sum(num_bytes(weight) for layer in layers for weight in layer)
        for num_rows in map(int, (args.rows or "1,8,16,32").split(",")):
            report(name, num_rows, layers, size, speed)
        del layers


def report(name: str, num_rows: int, layers: Sequence[Sequence[Weight]], size: int, speed: float) -> None:
    inputs = {k: torch.randn(num_rows, k, device="cuda", dtype=torch.bfloat16) for _, k in SHAPES}
    outputs = {n: torch.empty(num_rows, n, device="cuda", dtype=torch.bfloat16) for n, _ in SHAPES}

    def ours(same: bool = False) -> None:
        for layer in layers:
            for weight in layer:
                x, out = inputs[weight.shape[1]], outputs[weight.shape[0]]
                if isinstance(weight, Tensor):
                    few_rows.multiply(x, weight, out)
                elif same:
                    same_rows.multiply(x, weight.tiles, out)
                else:
                    weight.write(x, out, None, accumulate=False)

    def torchs() -> None:
        for layer in layers:
            for weight in layer:
                x = inputs[weight.shape[1]]
                if isinstance(weight, Int8):
                    torch._int_mm(x.to(torch.int8), weight.weight.T)
                else:
                    torch.mm(x, weight.T, out=outputs[weight.shape[0]])

    ms = time_graph(ours)
    line = f"{name:6} {num_rows:3} rows  {ms:7.3f} ms  {size / ms / 1e6:6,.0f} GB/s  {size / ms / 1e6 / speed:4.0%}"
    if name == "bf16" or (name == "w8a8" and num_rows > 16):
        line += f"   torch {time_graph(torchs):7.3f} ms"
    elif name != "w8a8":
        line += f"   deterministic {time_graph(lambda: ours(same=True)):7.3f} ms"
    print(line, flush=True)


TILES = [
    same_rows.Tile(rows, outs, warps, stages)
    for rows, outs, warps in ((16, 64, 4), (16, 128, 4), (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 8),
                              (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 64, 4), (256, 64, 8),
                              (256, 128, 8), (256, 128, 16))
    for stages in (3, 4, 6, 8, 12)
    if 128 * stages * (rows + outs) <= 220 << 10  # bytes of shared memory
]  # fmt: skip


def compare(shape: tuple[int, int], rows: Sequence[int], speed: float, tune: bool) -> None:
    """Times the products of one weight, of which as many copies are read as the cache does not hold."""
    num_out, num_in = shape
    size = 2 * num_out * num_in
    weights = [LAYOUTS["bf16"](shape) for _ in range(max(2, (1 << 29) // size))]
    parts = same_rows.num_parts(*shape, same_rows.num_processors(weights[0].device))
    firsts = []
    for num_rows in rows:
        x = torch.randn(num_rows, num_in, device="cuda", dtype=torch.bfloat16)
        x[0] = torch.linspace(-1, 1, num_in)
        out = torch.empty(num_rows, num_out, device="cuda", dtype=torch.bfloat16)
        ms, theirs = time_products(x, weights, out, ours=True), time_products(x, weights, out, ours=False)
        same_rows.multiply(x, weights[0], out)
        firsts.append(out[0].clone())
        line = f"{num_out:6} x {num_in:5}  {num_rows:5} rows  {ms:7.4f} ms  torch {theirs:7.4f} ms  {theirs / ms:5.2f}"
        flops = 2e-9 * num_rows * num_out * num_in / ms
        print(f"{line}  {size / ms / 1e6 / speed:5.0%} of memory  {flops:6.1f} TFLOP/s  parts {parts}", flush=True)
        if tune:
            tune_tiles(x, weights, out, parts)
    is_same = all(torch.equal(first, firsts[0]) for first in firsts)
    print(f"{num_out:6} x {num_in:5}  the first row has {'the same bits' if is_same else 'OTHER BITS'}", flush=True)


def time_products(x: Tensor, weights: Sequence[Tensor], out: Tensor, ours: bool) -> float:
    """Milliseconds of one product."""
    some = weights if x.shape[0] <= 1024 else weights[:2]

    def run() -> None:
        for weight in some:
            if ours:
                same_rows.multiply(x, weight, out)
            else:
                torch.mm(x, weight.T, out=out)

    return time_graph(run) / len(some)


def tune_tiles(x: Tensor, weights: Sequence[Tensor], out: Tensor, parts: int) -> None:
    """Prints the fastest tiles for the number of parts that is chosen and for others."""
    num_rows = x.shape[0]
    tiles = [tile for tile in TILES if max(min(64, num_rows), num_rows // 64) <= tile.rows <= max(16, 2 * num_rows)]
    choose_tile, num_parts, accepts_parts = same_rows.choose_tile, same_rows.num_parts, few_rows.accepts_parts
    few_rows.accepts_parts = lambda *args: False  # what has no tiles
    for cut in sorted({1, 2, 4, parts}):
        found = []
        same_rows.num_parts = lambda *args, cut=cut: cut
        for tile in tiles:
            same_rows.choose_tile = lambda *args, tile=tile: tile
            found.append((time_products(x, weights, out, ours=True), tuple(tile)))
        best = "   ".join(f"{tile} {ms:.4f} ms" for ms, tile in sorted(found)[:3])
        print(f"      parts {cut}: {best}", flush=True)
    same_rows.choose_tile, same_rows.num_parts, few_rows.accepts_parts = choose_tile, num_parts, accepts_parts


if __name__ == "__main__":
    main()
