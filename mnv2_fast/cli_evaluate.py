"""The verb `mnv2 evaluate`."""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings

from . import __version__, files, flowers, photos, plots, report
from .evaluation import evaluate
from .predict import Predictor
from .terminal import BAD_FILES, OK, Stages, whole


def run(args: argparse.Namespace, predictor: Predictor) -> int:
    """Evaluate, print, and write a report where `args.out` names a folder."""
    data = flowers.fetch() if flowers.meant(args.data) else args.data
    if args.val_share is None:
        folder = photos.find_labelled(data)
    else:
        folder = photos.find(data, args.val_share, args.seed)
    folder.refuse_within(out=args.out)
    stages = Stages()
    with contextlib.ExitStack() as stack:
        out = None
        if args.out is not None:
            plots.check()
            out = stack.enter_context(files.output_folder(args.out))
        stack.enter_context(contextlib.closing(stages))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = stages.warn
        try:
            found = evaluate(
                predictor.engine,
                folder,
                batch_size=predictor.batch_size,
                progress=lambda done, of: stages.advance("photos evaluated", done, of),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{stages.done}, no report is written") from None
        stages.close()
        facts = {"model": str(args.weights), "dtype": predictor.engine.dtype, "data": str(args.data)}
        if out is not None:
            report.write(out, found, {**facts, "mnv2-fast": __version__})
        with whole():
            if args.json:
                print(json.dumps({**facts, **report.to_json(found)}, ensure_ascii=False))
            else:
                print(report.text(found))
                if out is not None:
                    print(f"\n{out / report.REPORT}")
    return BAD_FILES if found.skipped else OK
