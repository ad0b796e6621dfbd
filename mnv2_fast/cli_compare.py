"""The verb `mnv2 compare`."""

from __future__ import annotations

import argparse
import contextlib
import sys

from .recipe import DEFAULT_WEIGHTS, Recipe
from .terminal import BAD_FILES, OK, count, share


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="photos in one subfolder a class, or those in train/ and val/; flowers: fetch the flower photos "
        "(229 MB)",
    )
    parser.add_argument(
        "--out",
        default="comparison",
        metavar="DIR",
        help="folder for the report and the runs; done ones are kept (%(default)s)",
    )
    parser.add_argument("--report", metavar="DIR", help="another folder for the report")
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="runs of each contender (3)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--epochs", type=count, default=Recipe().epochs, metavar="N", help="of each run (%(default)s)"
    )
    budget.add_argument(
        "--seconds", type=count, metavar="N", help="of training each run, as many whole epochs as fit"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="a contender or a pattern ('lenet*'); may be given again",
    )
    parser.add_argument(
        "--weights",
        default=DEFAULT_WEIGHTS,
        metavar="NAME|FILE",
        help=f"that fine-tuning begins with ({DEFAULT_WEIGHTS})",
    )
    parser.add_argument(
        "--batch-size",
        type=count,
        default=Recipe().batch_size,
        metavar="N",
        help="photos in a step (%(default)s)",
    )
    parser.add_argument(
        "--image-size", type=count, metavar="PIXELS", help="of MobileNetV2's photos; by default the weights'"
    )
    parser.add_argument(
        "--val-share",
        type=share,
        default=Recipe().val_share,
        metavar="SHARE",
        help="of photos without train/ and val/ (%(default)s)",
    )
    parser.add_argument(
        "--split-seed",
        type=int,
        default=Recipe().split_seed,
        metavar="N",
        help="which ones those are (%(default)s)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read photos")


def run(args: argparse.Namespace) -> int:
    """Compare, write the report, and print where it is."""
    from . import __version__, compare_report, files, flowers, info, photos, plots
    from .compare import compare
    from .contenders import choose

    contenders = choose(args.only or ())
    plots.check()
    data = flowers.fetch() if flowers.meant(args.data) else args.data
    folder = photos.find(data, args.val_share, args.split_seed)
    folder.refuse_within(out=args.out, report=args.report)
    with contextlib.ExitStack() as stack:
        out = report = stack.enter_context(files.output_folder(args.out))
        if args.report is not None:
            report = stack.enter_context(files.output_folder(args.report))
        found = compare(
            folder,
            out,
            contenders=contenders,
            seeds=args.seeds,
            epochs=args.epochs,
            seconds=args.seconds,
            weights=args.weights,
            batch_size=args.batch_size,
            image_size=args.image_size,
            workers=args.workers,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        facts = info.collect()
        machine, versions = facts["processor"], facts["versions"]
        compare_report.write(
            report,
            found,
            {
                "machine": f"{machine['name']}, {machine['cores']} cores",
                "versions": f"mnv2-fast {__version__}, torch {versions['torch']}",
            },
        )
        print(report / compare_report.REPORT)
    return BAD_FILES if found.skipped else OK
