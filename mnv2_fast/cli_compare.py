"""The verb `mnv2 compare`."""

from __future__ import annotations

import argparse
import sys

from .recipe import DEFAULT_WEIGHTS, Recipe
from .terminal import BAD_FILES, OK, count, share


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="photos in one subfolder a class, or those in train/ and val/",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the report and the runs; done ones are kept"
    )
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
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="photos in a step (32)")
    parser.add_argument(
        "--image-size", type=count, metavar="PIXELS", help="of MobileNetV2's photos; by default the weights'"
    )
    parser.add_argument(
        "--val-share",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="of photos without train/ and val/ (0.2)",
    )
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="which ones those are (0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read photos")


def run(args: argparse.Namespace) -> int:
    """Compare, write the report, and print where it is."""
    from . import __version__, compare_report, files, info, photos, plots
    from .compare import compare
    from .contenders import choose

    contenders = choose(args.only or ())
    plots.check()
    folder = photos.find(args.data, args.val_share, args.split_seed)
    with files.output_folder(args.out) as out:
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
            out,
            found,
            {
                "machine": f"{machine['name']}, {machine['cores']} cores",
                "versions": f"mnv2-fast {__version__}, torch {versions['torch']}",
            },
        )
        print(out / compare_report.REPORT)
    return BAD_FILES if found.skipped else OK
