"""OpenVINO; int8 by NNCF's post-training quantization."""

from __future__ import annotations

from typing import Any

from .. import material
from . import Bind, Call, Case

FILE = "mobilenet_v2.xml"
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


def prepare(case: Case) -> None:
    """The network in OpenVINO's own format, which it reads faster than ONNX.

    Quantized, the preset MIXED agrees better with the float network than PERFORMANCE (95% of 100 photos to
    93%) at the same speed; the slow bias correction gained nothing over the fast one.
    """
    import openvino

    model = openvino.Core().read_model(material.path(case.material, material.ONNX))
    if case.dtype == "int8":
        import nncf

        photos = material.calibration(case.material, case.calibration)
        model.reshape([1, *photos.shape[1:]])
        model = nncf.quantize(
            model,
            nncf.Dataset(range(len(photos)), lambda i: photos[i : i + 1]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(photos),
        )
    openvino.save_model(model, case.file(FILE), compress_to_fp16=False)


def load(case: Case) -> Bind:
    """A compiled model with the batch known."""
    import openvino

    core = openvino.Core()
    model = core.read_model(case.file(FILE))
    model.reshape([case.batch, *model.input(0).partial_shape[1:]])
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": HINTS[case.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": case.threads,
            "NUM_STREAMS": 1,
        },
    )

    def bind(images: Any) -> Call:
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
        logits = request.get_output_tensor()

        def call(keep: object = images) -> Any:  # the request reads the images without owning them
            request.infer()
            return logits.data

        return call

    return bind


def note(case: Case) -> str:
    """bf16 without the instruction is emulated."""
    import openvino

    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    lacking = case.dtype == "bf16" and "BF16" not in capabilities
    return "emulated: the processor does not show avx512_bf16" if lacking else ""
