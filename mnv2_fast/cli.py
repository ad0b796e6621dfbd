"""The command `mnv2`.

What a user can cause is one line on stderr, `mnv2: error: ...`, and exit code 2. Modules that load torch are
imported inside the verbs, so that `mnv2 --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__, cli_compare, cli_train, env
from .errors import Interrupted, UserError
from .recipe import DEFAULT_WEIGHTS
from .terminal import (
    BAD_FILES,
    BROKEN_PIPE,
    INTERRUPTED,
    OK,
    USER_ERROR,
    Stages,
    count,
    one_line,
    share,
    whole,
)

if TYPE_CHECKING:
    from .engine import Engine
    from .model import MobileNetV2
    from .predict import Predictor
    from .quantize import Judgement


# A bar for fewer files would be gone before it is read.
_MANY = 8
_WEIGHTS = f"a weights file, or published weights ({DEFAULT_WEIGHTS})"


class _Parser(argparse.ArgumentParser):
    """One line for every error, as the rest of the command has."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"mnv2: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments; those of the process by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name need not fit the terminal's encoding
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _run(argv)
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (UserError, OSError, MemoryError) as error:
        print(f"mnv2: error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
        _settle_environment(args)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else INTERRUPTED
        with contextlib.suppress(KeyboardInterrupt), whole():
            sys.stdout.flush()
            if str(stop) or not isinstance(stop, Interrupted):  # of several processes, one speaks
                print(f"mnv2: interrupted{': ' if str(stop) else ''}{stop}", file=sys.stderr)
        return code


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    print(f"mnv2: warning: {one_line(message)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mnv2",
        description="MobileNetV2 on fast kernels of its own.",
        epilog="Exit codes: 0 done; 1 photos that could not be used (which finetune only names), or answers "
        "that differ (then quantize writes no file); 2 a mistake; 130 and 143 ended by Ctrl-C and SIGTERM.",
    )
    parser.add_argument("--version", action="version", version=f"mnv2-fast {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", dest="verb")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    predict = verb("predict", _predict, "say what is on photos")
    predict.add_argument("inputs", nargs="+", metavar="PHOTO", help="a file, a folder or a pattern ('*.jpg')")
    _add_model(predict, default=None)
    _add_engine(predict)
    _add_calibration(predict)
    predict.add_argument("--top-k", type=count, default=5, metavar="K", help="classes per photo (5)")
    predict.add_argument("--batch-size", type=count, default=8, metavar="N", help="photos per call (8)")
    predict.add_argument("--json", action="store_true", help="one JSON object per photo and line")

    cli_train.add_options(verb("finetune", cli_train.finetune, "train a classifier on a folder of photos"))

    bench = verb("bench", _bench, "time our engine beside torchvision's model")
    _add_model(
        bench,
        "of weights only class count and width matter; an engine file or flowers is timed as it is; seeded "
        "weights by default",
        default=None,
    )
    _add_engine(bench)
    _add_calibration(bench)
    bench.add_argument("--batch-size", type=count, default=1, metavar="N", help="images per call (1)")
    bench.add_argument("--size", type=count, default=224, metavar="PIXELS", help="height and width (224)")
    bench.add_argument("--json", action="store_true", help="all times as JSON")
    bench.add_argument("--blocks", action="store_true", help="time every form of every block instead")

    info = verb("info", _info, "print versions, processor, kernels and environment, or what a model takes")
    _add_model(info, "layers, sizes and memory of these weights, engine or flowers instead", default=None)
    _add_engine(info)
    info.add_argument("--batch", "--batch-size", type=count, metavar="N", help="images per call (1)")
    info.add_argument("--size", type=count, metavar="PIXELS", help="height and width (224)")
    info.add_argument("--json", action="store_true", help="as JSON")

    export = verb("export", _export, "write a model in another format")
    _add_model(export, _WEIGHTS)
    export.add_argument("--format", choices=("onnx",), default="onnx", help="onnx, the default")
    export.add_argument(
        "--size",
        type=count,
        metavar="PIXELS",
        help="height and width; by default what the weights' photos have",
    )
    export.add_argument("output", metavar="FILE", help="file to write")

    quantize = verb("quantize", _quantize, "write a model as an int8 engine, calibrated on photos")
    quantize.add_argument("--data", required=True, metavar="DIR", help="photos: half calibrate, half judge")
    quantize.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    _add_model(quantize, _WEIGHTS)
    quantize.add_argument(
        "--images", type=count, default=200, metavar="N", help="of the photos at most (200)"
    )
    quantize.add_argument(
        "--min-agreement",
        type=share,
        default=0.9,
        metavar="SHARE",
        help="same first class as the float network, 0 to 1: under it no file is written (0.9)",
    )
    quantize.add_argument("--per-layer", action="store_true", help="print each layer's SQNR in dB")
    quantize.add_argument("--threads", type=count, metavar="N", help="torch's number by default")

    _add_evaluation(verb("evaluate", _evaluate, "judge a model by labelled photos"))

    cli_compare.add_options(
        verb(
            "compare",
            cli_compare.run,
            "train LeNet-5 and MobileNetV2 on a folder, and compare them",
        )
    )

    demo = verb("demo", _demo, "classify a photo, check the answer against torchvision's and time both")
    demo.add_argument(
        "photo",
        nargs="?",
        metavar="PHOTO",
        help="a file; by default the cat of scikit-image, or a drawn daisy",
    )
    _add_model(demo, default=None)
    demo.add_argument("--threads", type=count, metavar="N", help="of the network; torch's number by default")
    return parser


def _add_model(
    parser: argparse.ArgumentParser,
    text: str = f"a weights or engine file, published weights ({DEFAULT_WEIGHTS}), or flowers, an engine in "
    "the package",
    default: str | None = DEFAULT_WEIGHTS,
) -> None:
    parser.add_argument("--weights", "--model", default=default, metavar="NAME|FILE", help=text)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=count, metavar="N", help="of the network; torch's number by default"
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="arithmetic of the network: fp32, bf16 or int8")
    parser.add_argument("--backend", choices=env.BACKENDS, help=f"instead of {env.BACKEND.name}")


def _add_evaluation(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="a folder for each class, named after it; or val/ with them",
    )
    evaluate.add_argument("--out", metavar="DIR", help="folder to write a report with charts in")
    _add_model(evaluate)
    _add_engine(evaluate)
    _add_calibration(evaluate)
    evaluate.add_argument(
        "--val-share",
        type=share,
        metavar="SHARE",
        help="judge by this share of each class, the one that training with it and --split-seed left out; by "
        "all photos by default, which is worth little where the model was trained on some of them",
    )
    evaluate.add_argument(
        "--split-seed", "--seed", dest="seed", type=int, default=0, metavar="N", help="of that choice (0)"
    )
    evaluate.add_argument("--batch-size", type=count, default=32, metavar="N", help="photos per call (32)")
    evaluate.add_argument("--json", action="store_true", help="as JSON")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    # Given again for more, not several at once: those would take what follows for photos, too.
    parser.add_argument(
        "--calibration",
        action="append",
        metavar="PHOTOS",
        help="what --dtype int8 is fitted to: a folder, a pattern or a file, about 100 photos in all; may be "
        "given again",
    )


def _settle_environment(args: argparse.Namespace) -> None:
    """Take the backend asked for, and refuse values that make no sense before any verb starts its work."""
    if getattr(args, "backend", None):
        os.environ[env.BACKEND.name] = args.backend
    env.backend()
    env.strict()
    dtype = getattr(args, "dtype", None)
    if getattr(args, "calibration", None) and dtype != "int8":
        raise UserError("--calibration is for int8: add --dtype int8, or leave it out")


def _predict(args: argparse.Namespace) -> int:
    from .data import iterate_inputs

    files = iterate_inputs(args.inputs)
    if args.weights is None:
        from .predict import default_model

        # Who asks for an arithmetic means a network that has it.
        args.weights = DEFAULT_WEIGHTS if args.dtype else default_model()
    predictor = _predictor(args, top_k=args.top_k)
    done = failed = 0
    try:
        with _progress(args.inputs) as (advance, say):
            for path, result in predictor.stream(files):
                with whole():
                    if isinstance(result, Exception):
                        failed += 1
                        say(f"mnv2: {one_line(result)}", sys.stderr)
                    else:
                        say(_answer(path, result, args.json), sys.stdout)
                    advance()
                    done += 1
    except KeyboardInterrupt:
        bad = f", {failed} of them could not be used" if failed else ""
        raise KeyboardInterrupt(f"{done} photos done{bad}") from None
    if failed:
        print(f"mnv2: {failed} of {done} files could not be used", file=sys.stderr)
    return BAD_FILES if failed else OK


def _predictor(args: argparse.Namespace, **more: Any) -> Predictor:
    """The model that the command line names, as it is to run."""
    from .predict import Predictor, load_model

    return Predictor(
        _calibrated(args, load_model(args.weights)) if args.calibration else args.weights,
        batch_size=args.batch_size,
        threads=args.threads,
        dtype=args.dtype,
        **more,
    )


def _answer(path: object, result: Sequence[Mapping[str, Any]], as_json: bool) -> str:
    if as_json:
        return json.dumps({"path": str(path), "predictions": result}, ensure_ascii=False)
    return "\n".join([str(path), *(f"  {row['score']:7.2%}  {row['label']}" for row in result)])


@contextlib.contextmanager
def _progress(inputs: Sequence[str]) -> Iterator[tuple[Callable[[], object], Callable[[str, Any], None]]]:
    """What to call after each file and how to print: beside a bar, for many files at a terminal."""

    def plain(text: str, stream: Any) -> None:
        print(text, file=stream)

    try:
        if not sys.stderr.isatty():
            raise ImportError
        from tqdm import tqdm

        from .data import iterate_inputs

        total = sum(1 for _ in iterate_inputs(inputs))
        if total < _MANY:
            raise ImportError
    except ImportError:
        yield (lambda: None), plain
        return
    with tqdm(total=total, unit="photo", file=sys.stderr, dynamic_ncols=True) as bar:
        yield bar.update, lambda text, stream: bar.write(text, file=stream)


def _bench(args: argparse.Namespace) -> int:
    import torch

    from . import _torchvision, demo
    from .engine import compile
    from .predict import Predictor, is_engine, load_model

    if args.weights is not None and is_engine(args.weights) and not args.calibration:
        engine = Predictor(args.weights, dtype=args.dtype, threads=args.threads).engine
        model = demo.seeded_like(engine)
    else:
        model = demo.seeded_model() if args.weights is None else load_model(args.weights)
        if args.calibration:
            engine = _calibrated(args, model)
        else:
            engine = compile(model, dtype=args.dtype or "fp32", threads=args.threads)
    if args.blocks:
        return _bench_blocks(args, engine, args.threads or torch.get_num_threads())
    x = torch.randn((args.batch_size, 3, args.size, args.size), generator=torch.Generator().manual_seed(0))
    reference = demo.torchvision_twin(model) if _torchvision.installed() else None
    times = demo.race(demo.contenders(engine, reference, x), args.threads)
    if args.json:
        print(json.dumps({"engine": repr(engine), "input": list(x.shape), "milliseconds": times}))
        return OK
    threads = args.threads or torch.get_num_threads()
    print(f"{engine.dtype} {list(x.shape)}, threads: {threads}, {engine.backend} {engine.isa}".rstrip())
    print(demo.table(times, args.batch_size))
    if reference is None:
        print("torchvision is not installed, nothing to compare with: pip install torchvision")
    return OK


def _bench_blocks(args: argparse.Namespace, engine: Engine, threads: int) -> int:
    from . import blocks

    if args.batch_size != 1:
        raise UserError("--blocks times one image: leave --batch-size out")
    found = blocks.measure(engine, args.size, threads)
    if args.json:
        rows = [{"block": b.name, "form": b.taken, "microseconds": b.times, "gain": b.gain} for b in found]
        print(json.dumps({"engine": repr(engine), "threads": threads, "blocks": rows}))
        return OK
    print(f"{engine.dtype} {args.size} x {args.size}, threads: {threads}, {engine.isa}")
    print(blocks.table(found))
    return OK


def _info(args: argparse.Namespace) -> int:
    from . import info

    if args.weights is None:
        if args.batch or args.size or args.threads or args.dtype:
            raise UserError("--batch, --size, --threads and --dtype are of a model: name it with --model")
        facts, text = info.collect(), info.text
    else:
        batch, size = args.batch or 1, args.size or 224
        facts = info.describe(args.weights, dtype=args.dtype, batch=batch, size=size, threads=args.threads)
        text = info.description
    print(json.dumps(facts, indent=2) if args.json else text(facts))
    return OK


def _export(args: argparse.Namespace) -> int:
    from .export import export_onnx
    from .predict import load_model

    difference = export_onnx(load_model(args.weights), args.output, args.size)
    checked = "not checked (pip install onnxruntime)"
    if difference is not None:
        checked = f"largest difference of onnxruntime's logits {difference:.2e}"
    print(f"{args.output}: {checked}")
    return OK


def _calibrated(args: argparse.Namespace, model: MobileNetV2) -> Engine:
    """The int8 engine of a model, calibrated on the photos that the command line names."""
    from . import calibration, data, quantize
    from .engine import check_threads

    check_threads(args.threads)  # before the work
    photos = calibration.spread(data.expand_inputs(args.calibration))
    with contextlib.closing(Stages()) as stages:
        engine = quantize.quantize(model, photos, stages.skip, stages.advance)
    stages.count(len(photos))
    return engine.with_threads(args.threads)


def _quantize(args: argparse.Namespace) -> int:
    import torch

    from . import quantize
    from .engine import check_threads
    from .predict import load_model
    from .weights import output_file

    output_file(args.out)  # before the work
    torch.set_num_threads(check_threads(args.threads) or torch.get_num_threads())
    calibrating, judging = quantize.split(args.data, args.images)
    stages = Stages()
    written = False
    try:
        with contextlib.closing(stages):
            model = load_model(args.weights)
            engine = quantize.quantize(model, calibrating, stages.skip, stages.advance)
            found = quantize.judge(
                model, engine, judging, stages.skip, stages.advance, per_layer=args.per_layer
            )
        of = len(calibrating) + len(judging)
        stages.count(of)
        with whole():
            print(_judgement(found, of - stages.unusable - found.photos))
            if found.agreement < args.min_agreement:
                print(
                    f"mnv2: agreement {found.agreement:.1%} is under --min-agreement {args.min_agreement:g}, "
                    f"{args.out} is not written: calibrate on more photos, or on ones like those in use",
                    file=sys.stderr,
                )
                return BAD_FILES
            engine.save(args.out)
            written = True
            print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB")
    except KeyboardInterrupt:
        end = "is written" if written else "is not written"
        raise KeyboardInterrupt(f"{stages.done}, {args.out} {end}") from None
    return OK


def _judgement(found: Judgement, calibrated: int) -> str:
    """What `mnv2 quantize` says of an engine."""
    lines = [f"  {name:32}{decibels:7.1f} dB" for name, decibels in found.layers]
    if lines:
        lines.insert(0, "SQNR of each layer's output, beside the float network's:")
    lines.append(f"calibrated on {calibrated} photos, judged on {found.photos} others")
    lines.append(f"agreement with the float network: {found.agreement:.1%}")
    if found.top1 is None:
        lines.append("top-1 not known: no photo is in a folder with the name of one of the model's classes")
    else:
        exact, quantized = found.top1
        lines.append(
            f"top-1 on the {found.labelled} photos in folders of classes: {quantized:.1%}, "
            f"float {exact:.1%}, drop {100 * (exact - quantized):.1f} points"
        )
    return "\n".join(lines)


def _evaluate(args: argparse.Namespace) -> int:
    from . import cli_evaluate

    return cli_evaluate.run(args, _predictor(args))


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    return demo.run(args.weights, args.photo, args.threads)
