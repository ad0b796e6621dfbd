"""XNNPACK, run by ExecuTorch; int8 by its PT2E quantizer.

The program is for one image: one for eight took longer an image (6.0 ms to 5.5 on one core), and one with a
dynamic batch takes minutes to lower.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from .. import material
from . import Bind, Call, Case

FILE = "mobilenet_v2.pte"


def prepare(case: Case) -> None:
    """The program with everything delegated to XNNPACK, quantized per channel for int8."""
    import torch

    logging.disable(logging.WARNING)  # of torch's and torchao's own internals
    warnings.simplefilter("ignore")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model: Any = material.torchvision_model(material.path(case.material, material.WEIGHTS))
    example = (torch.from_numpy(material.photos(case.material, 1)),)
    if case.dtype == "int8":
        model = _quantized(model, example, material.calibration(case.material, case.calibration))
    exported = torch.export.export(model, example)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    case.file(FILE).write_bytes(program.buffer)


def _quantized(model: Any, example: tuple[Any], photos: Any) -> Any:
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    observed = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    with torch.no_grad():
        for photo in photos:
            observed(torch.from_numpy(photo[None]))
    return convert_pt2e(observed)


def load(case: Case) -> Bind:
    """The program, on a thread pool of the size asked for."""
    import torch
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(case.threads)
    program = portable_lib._load_for_executorch(str(case.file(FILE)))

    def bind(images: Any) -> Call:
        inputs = (torch.from_numpy(images),)
        return lambda: program.forward(inputs)[0]

    return bind
