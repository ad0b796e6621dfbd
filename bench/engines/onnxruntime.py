"""ONNX Runtime; int8 by its static quantization."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

from .. import material
from . import Bind, Call, Case

FILE = "mobilenet_v2.onnx"


def prepare(case: Case) -> None:
    """The ONNX file everyone has, or its quantized form.

    QDQ, u8 activations and s8 weights per channel, 99.999% percentiles: of its calibrations the one that
    agreed best with the float network (94% of 100 photos; min-max and entropy 92%; s8 activations 90% and
    half as fast).
    """
    source = material.path(case.material, material.ONNX)
    if case.dtype != "int8":
        shutil.copy(source, case.file(FILE))
        return
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            photos = material.calibration(case.material, case.calibration)
            self._feeds: Iterator[dict[str, Any]] = ({material.INPUT: x[None]} for x in photos)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    inferred = case.file("inferred.onnx")
    quant_pre_process(source, inferred)
    quantization.quantize_static(
        inferred,
        case.file(FILE),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.Percentile,
    )
    inferred.unlink()


def load(case: Case) -> Bind:
    """A session with every optimization and the batch known."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name(material.BATCH, case.batch)
    session = onnxruntime.InferenceSession(case.file(FILE), options, providers=["CPUExecutionProvider"])

    def bind(images: Any) -> Call:
        feed = {material.INPUT: images}
        return lambda: session.run(None, feed)[0]

    return bind
