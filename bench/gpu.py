"""The GPU kernels against float64, against the memory's speed and against torch: `python -m bench.gpu`.

Runs from a bare checkout: torch >= 2.11 and triton >= 3.6, no extension, no installation. Within eight
minutes; what has no time left is left out and named. Checks come first, shared out among processes, which
compile; what is wrong is not timed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from bench import results
from bench.gpu_forms import Form, forms
from bench.gpu_network import our_network, plain_network
from mnv2_fast import arch

if TYPE_CHECKING:
    import torch

DEVICE = "cuda"
OUTPUT = results.FOLDER / "gpu.csv"
BUDGET_S = 440
BATCHES = (256, 1)  # of torch's network, which takes long to compile
OUR_BATCHES = (1, 8, 32, 256, 1024)
CHECK_BATCH = 3
# Name, dtype, whole blocks in one launch.
NETWORKS = (
    ("fused", "float16", True),
    ("fused", "bfloat16", True),
    ("by layer", "float16", False),
    ("by layer", "float32", False),
)
ODD_SHAPES = ((1, 1, 1, 1), (3, 17, 15, 2), (2, 33, 7, 8), (1, 24, 1, 15))
COPY_BYTES = 2**30
# Elements of an activation that 32-bit offsets cannot reach.
FAR = 2**31
# Bytes of an fp16 element.
HALF = 2

Times = tuple[float, float, float]  # median, 20% and 80% quantile, ms


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0; 1 where the kernel's answers are wrong; 2 where it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="CSV file that the rows are added to (%(default)s)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all (%(default)s)")
    parser.add_argument(
        "--resources",
        action="store_true",
        help="only compile for sm_80 and sm_90: registers and spills",
    )
    parser.add_argument("--compiled", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, metavar=("K", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    started = time.monotonic()
    if reason := unavailable(needs_gpu=not options.resources):
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return 2
    if options.resources:
        print_resources()
        return 0
    if options.compiled:
        print(json.dumps(time_network(options.compiled, compiled=True)))
        return 0
    if options.share:
        print(json.dumps(list(check_forms(*options.share))))
        return 0
    print_versions()
    wrong = [*shared_out(options.budget / 3), *check_depthwise(check_shapes()), *filter(None, [check_far()])]
    wrong += check_networks()
    for line in wrong:
        print(f"WRONG {line}")
    verdict = "WRONG" if wrong else "within tolerance, NaN kept, every output written"
    print(f"all kernels against float64: {verdict}")
    rows = measure(lambda: options.budget - (time.monotonic() - started), wrong)
    results.save(options.output, rows, results.context())
    print(f"{len(rows)} rows added to {options.output}")
    return 1 if wrong else 0


def unavailable(needs_gpu: bool = True) -> str:
    """Why the benchmark cannot run here, in one line that names the cure; empty where it can."""
    for package, version in (("torch", "2.11"), ("triton", "3.6")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: install {package}>={version}"
    import torch

    if needs_gpu and not torch.cuda.is_available():
        return "torch finds no CUDA device: run it on a machine with an NVIDIA GPU (sm_80 or newer)"
    return ""


def print_versions() -> None:
    """One line on the software, one on the GPU."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    print(f"{results.versions()}; CUDA {torch.version.cuda}; cuDNN {torch.backends.cudnn.version()}")
    target, units, memory = f"sm_{gpu.major}{gpu.minor}", gpu.multi_processor_count, gpu.total_memory >> 30
    print(f"{gpu.name}, {target}, {units} SMs, {memory} GiB")


def depthwise_layers(size: int = 224) -> list[tuple[arch.Layer, int]]:
    """The network's distinct depthwise layers, each with how often it occurs."""
    counts: dict[tuple[int, int, int], int] = collections.Counter()
    distinct: dict[tuple[int, int, int], arch.Layer] = {}
    for layer in arch.layers(size=size):
        if layer.spec.kind == "depthwise":
            key = (layer.spec.cin, layer.spec.stride, layer.h)
            counts[key] += 1
            distinct[key] = layer
    return [(layer, counts[key]) for key, layer in distinct.items()]


def print_resources() -> None:
    """What ptxas makes of every depthwise layer: registers, stack and local bytes (spills)."""
    import torch

    from kernels import aot, depthwise
    from kernels.common import tiles

    table = tiles("", "depthwise")
    print(f"{'layer':<10} {'dtype':<9} {'tile':<9} {'target':<6} {'registers':>9} {'stack':>5} {'local':>5}")
    for c, stride in sorted({(layer.spec.cin, layer.spec.stride) for layer, _ in depthwise_layers()}):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for tile in (f"large_s{stride}", f"small_s{stride}"):
                for sm in (80, 90):
                    arguments = depthwise.compile_arguments(c, stride, True, dtype, table[tile])
                    built = aot.compile_for(depthwise.depthwise_kernel, sm, arguments, table[tile]["warps"])
                    print(
                        f"{f'{c} s{stride}':<10} {str(dtype)[6:]:<9} {tile:<9} sm_{sm:<3} "
                        f"{built.registers:>9} {built.stack:>5} {built.local:>5}"
                    )


def depthwise_inputs(
    shape: Sequence[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x [N, C, H, W] (channels_last), weight and bias whose outputs reach below 0 and above 6."""
    import torch

    from kernels import depthwise

    generator = torch.Generator(DEVICE).manual_seed(0)
    n, c, h, w = shape
    x = torch.randn((n, h, w, c), generator=generator, device=DEVICE).mul_(2)
    weight = torch.randn((c, 1, 3, 3), generator=generator, device=DEVICE)
    bias = torch.randn(c, generator=generator, device=DEVICE) + 2
    return x.to(dtype).permute(0, 3, 1, 2), depthwise.pack_weight(weight.to(dtype)), bias.to(dtype)


def check_shapes() -> list[tuple[tuple[int, int, int, int], int]]:
    """(x's shape, stride) of the network's depthwise layers, and of some that no network has."""
    layers = [((2, layer.spec.cin, layer.h, layer.w), layer.spec.stride) for layer, _ in depthwise_layers()]
    return layers + [(shape, stride) for shape in ODD_SHAPES for stride in (1, 2)]


def check_depthwise(
    shapes: Iterable[tuple[tuple[int, int, int, int], int]], dtypes: Sequence[torch.dtype] | None = None
) -> Iterator[str]:
    """What is wrong with the Triton kernel's answers, one line each, for every shape, dtype and tile."""
    from kernels.common import DTYPES, tiles

    table = tiles(_device_name(), "depthwise")
    for (shape, stride), dtype, size in itertools.product(shapes, dtypes or DTYPES, ("large", "small")):
        tile = f"{size}_s{stride}"
        for planted in (None, float("nan"), float("inf")):
            if why := _wrong(shape, stride, dtype, table[tile], planted):
                yield f"{shape} stride {stride} {dtype} {tile}, {planted} planted: {why}"


def _wrong(
    shape: tuple[int, int, int, int],
    stride: int,
    dtype: torch.dtype,
    tile: Mapping[str, int],
    planted: float | None,
) -> str:
    import torch

    from kernels import depthwise

    x, weight, bias = depthwise_inputs(shape, dtype)
    if planted is not None:
        n, c, h, w = shape
        x[n - 1, c // 2, h // 2, w // 2] = planted
    want = depthwise.reference(x, weight, bias, stride, True)
    out = torch.full_like(want, torch.nan, dtype=dtype, memory_format=torch.channels_last)
    depthwise.depthwise(x, weight, bias, stride, True, out=out, tile=tile)
    if not torch.equal(out.isnan(), want.isnan()):
        return f"{int((out.isnan() != want.isnan()).sum())} NaN lost, made or left"
    excess = (out - want).abs() - depthwise.tolerance(x, weight, bias, stride, want)
    excess = excess[~want.isnan()]
    return f"{int((excess > 0).sum())} values beyond tolerance" if (excess > 0).any() else ""


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def check_far() -> str:
    """What is wrong with an image that begins past 2**31 elements: it must come out as it does alone."""
    import torch

    from kernels import depthwise

    if torch.cuda.mem_get_info()[0] < 5 * HALF * FAR:
        print("too little memory to check images past 2**31 elements")
        return ""
    image = (96, 112, 112)
    x, weight, bias = depthwise_inputs((1, *image), torch.float16)
    n = FAR // x.numel() + 2
    many = torch.zeros((n, 112, 112, 96), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    many[-1:] = x
    got = depthwise.depthwise(many, weight, bias, 1, True)[-1:]
    alone = depthwise.depthwise(x, weight, bias, 1, True)
    return (
        "" if torch.equal(got, alone) else f"image {n - 1} of {n}, past 2**31 elements, differs from itself"
    )


def _usable(form: Form) -> bool:
    """Whether this GPU has the kernel: whole blocks are for sm_90, and no interpreter runs them."""
    import torch

    return not form.whole_block or (DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0))


def check_forms(share: int = 0, of: int = 1, layers: Sequence[arch.Layer] | None = None) -> Iterator[str]:
    """What is wrong with every `of`-th kernel from `share` on, one line each: of random inputs, other ones at
    each run, in fp16, and in bf16 and fp32 on every third; results begin as NaN.
    """
    import torch

    chosen = [form for form in forms(layers) if _usable(form)]
    for i, form in list(enumerate(chosen))[share::of]:
        dtypes = [torch.float16] if i % 3 else [torch.float16, torch.bfloat16, torch.float32]
        for dtype in dtypes:
            if dtype == torch.float32 and form.whole_block:
                continue
            if why := _wrong_form(form, dtype):
                yield f"{form.name} {form.layer} at {form.size}, {dtype}: {why}"


def _wrong_form(form: Form, dtype: torch.dtype) -> str:
    try:
        probe = form.make(CHECK_BATCH, dtype, DEVICE)
        probe.run()
        want, allowed = probe.judge()
    except Exception as error:  # a kernel that does not compile must not hide what the others do
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
    if probe.out.isnan().any():
        return f"{int(probe.out.isnan().sum())} values not written, or NaN"
    beyond = ((probe.out - want).abs() > allowed).sum()
    return f"{int(beyond)} of {want.numel()} values beyond tolerance" if beyond else ""


def shared_out(limit: float) -> list[str]:
    """What `check_forms` finds in several processes, whose compiled kernels the cache on disk then has."""
    of = max(1, min(12, (os.cpu_count() or 1) - 1))
    command = [sys.executable, "-m", "bench.gpu", "--share"]
    processes = [
        subprocess.Popen(
            [*command, str(k), str(of)],
            cwd=results.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(of)
    ]
    wrong, until = [], time.monotonic() + limit
    for k, process in enumerate(processes):
        try:
            out, err = process.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            wrong.append(f"share {k} of {of}: not checked within {limit:.0f} s")
            continue
        if process.returncode:
            wrong.append(f"share {k} of {of}: {(err.strip().splitlines() or ['no message'])[-1]}")
        else:
            wrong += json.loads(out.strip().splitlines()[-1])
    return wrong


def check_networks() -> Iterator[str]:
    """What is wrong with the logits of whole networks, one line each, beside torch's own error."""
    import torch

    model = plain_network().eval().to(DEVICE)
    x = torch.randn(3, 3, 224, 224, device=DEVICE)
    with torch.no_grad():
        want = deepcopy(model).double()(x.double())
        for name, dtype, fuse in NETWORKS:
            if fuse and torch.cuda.get_device_capability() != (9, 0):
                continue
            kind = getattr(torch, dtype)
            try:
                error = (our_network(model, kind, DEVICE, fuse)(x.to(kind)) - want).abs().max()
            except Exception as problem:
                yield f"network {name} {dtype}: {type(problem).__name__}: {problem}"
                continue
            theirs = (deepcopy(model).to(kind)(x.to(kind)).double() - want).abs().max()
            if not error <= 2 * theirs:
                yield f"network {name} {dtype}: logits off by {error:.3g}, torch's by {theirs:.3g}"


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The same launches as one CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(seconds_left: Callable[[], float], wrong: Sequence[str] = ()) -> list[results.Row]:
    """Every measurement, printed as it is made; of kernels that `wrong` names there is none."""
    import torch

    device = torch.cuda.get_device_name()
    torch.backends.cudnn.benchmark = True
    copy = copy_bandwidth()
    print(f"\ncopy of {COPY_BYTES >> 20} MiB: {copy:.0f} GB/s read and written\n")
    rows = [*_form_rows(BATCHES[0], copy, device, wrong)]
    for batch in OUR_BATCHES:
        rows += _our_rows(batch, device, wrong)
    for batch in BATCHES:
        rows.append(_network_row(batch, "torch eager channels_last", time_network(batch), device))
    for i, batch in enumerate(BATCHES):
        # Autotuning may take long: a child that is stopped in time keeps the rest of the results.
        limit = seconds_left() / (len(BATCHES) - i)
        rows.append(_network_row(batch, "torch.compile max-autotune", _compiled_times(batch, limit), device))
    return rows


def timed(call: Callable[[], object]) -> Times:
    """Milliseconds on the GPU, its L2 flushed before each call."""
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and bytes written both counted."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timed(lambda: target.copy_(source))[0] / 1e6


def _form_rows(batch: int, copy: float, device: str, wrong: Sequence[str]) -> Iterator[results.Row]:
    """Every kernel beside torch's way to make the same."""
    import torch

    totals: dict[tuple[str, str], float] = collections.defaultdict(float)
    print(f"batch {batch}, fp16: ms median (20% - 80%), GB/s, share of the copy")
    for form in forms():
        named = f"{form.name} {form.layer}"
        if not _usable(form) or any(line.startswith(f"{named} at {form.size},") for line in wrong):
            continue
        probe = form.make(batch, torch.float16, DEVICE)
        for name, call in (("triton", probe.run), ("torch eager channels_last", probe.eager)):
            median, low, high = timed(call)
            totals[form.name, name] += form.count * median
            gbs = probe.bytes / 1e6 / median
            print(
                f"{named:<44} {form.size:>3} x{form.count}  {name:<26} "
                f"{median:7.3f} ({low:.3f} - {high:.3f})  {gbs:6.0f}  {gbs / copy:4.0%}"
            )
            yield results.Row(
                "gpu",
                named,
                name,
                dtype="fp16",
                device=device,
                size=str(form.size),
                batch=batch,
                form="kernel",
                ms=median,
                ms_p20=low,
                ms_p80=high,
                gmacs=batch * form.macs / median / 1e6,
                gbs=gbs,
                gbs_copy=copy,
                gbs_share=gbs / copy,
                note=f"occurs {form.count} times",
            )
    print()
    for (kind, name), total in totals.items():
        print(f"all of {kind}, {name}: {total:.3f} ms")
    print()


def _our_rows(batch: int, device: str, wrong: Sequence[str]) -> Iterator[results.Row]:
    """Our network as one CUDA graph, in each form that is right."""
    import torch

    model = plain_network().eval().to(DEVICE)
    for name, dtype, fuse in NETWORKS:
        if dtype != "float16" or any(line.startswith(f"network {name} {dtype}") for line in wrong):
            continue
        if fuse and torch.cuda.get_device_capability() != (9, 0):
            continue
        network = our_network(model, torch.float16, DEVICE, fuse)
        x = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=DEVICE)
        yield _network_row(batch, f"mnv2_fast {name}, graph", timed(replayed(lambda: network(x))), device)  # noqa: B023


def time_network(batch: int, compiled: bool = False) -> Times:
    """ms of plain torch's network in fp16 channels_last: eager, or compiled with its weights frozen."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = plain_network().eval().to(DEVICE, torch.float16)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    call: Callable[[torch.Tensor], object] = model
    if compiled:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        call = torch.compile(model, mode="max-autotune")
    with torch.no_grad():
        return timed(lambda: call(x))


def _compiled_times(batch: int, limit: float) -> Times | str:
    """The compiled network's times from a child process, or why there are none."""
    command = [sys.executable, "-m", "bench.gpu", "--compiled", str(batch)]
    try:
        child = subprocess.run(
            command, cwd=results.ROOT, capture_output=True, text=True, timeout=max(limit, 1), check=False
        )
    except subprocess.TimeoutExpired:
        return f"not compiled within {limit:.0f} s"
    if child.returncode != 0:
        return f"failed: {(child.stderr.strip().splitlines() or ['no message'])[-1]}"
    median, low, high = json.loads(child.stdout.strip().splitlines()[-1])
    return median, low, high


def _network_row(batch: int, contender: str, times: Times | str, device: str) -> results.Row:
    row = results.Row(
        "gpu", "network", contender, dtype="fp16", device=device, batch=batch, weights="seeded", form="call"
    )
    if isinstance(times, str):
        print(f"network, batch {batch:>3}, {contender:<26} {times}")
        return dataclasses.replace(row, note=times)
    median, low, high = times
    rate = batch / median * 1e3
    print(
        f"network, batch {batch:>3}, {contender:<26} "
        f"{median:7.3f} ms ({low:.3f} - {high:.3f}), {rate:.0f} images/s"
    )
    return dataclasses.replace(row, ms=median, ms_p20=low, ms_p80=high, images_per_s=rate)


if __name__ == "__main__":
    sys.exit(main())
