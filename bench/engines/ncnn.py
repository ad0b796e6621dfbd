"""ncnn, converted by pnnx; one image at a time, for it knows no batch. bf16 is its storage type."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from .. import material
from . import Bind, Call, Case

NAME = "mobilenet_v2"


def prepare(case: Case) -> None:
    """The traced network through pnnx; `fp16=0` keeps the weights' digits."""
    import pnnx
    import torch

    model = material.torchvision_model(material.path(case.material, material.WEIGHTS))
    example = torch.from_numpy(material.photos(case.material, 1))
    torch.jit.trace(model, example).save(case.file(f"{NAME}.pt"))
    shape = str(list(example.shape)).replace(" ", "")
    subprocess.run(
        [pnnx.EXEC_PATH, f"{NAME}.pt", f"inputshape={shape}", "fp16=0"],
        cwd=case.files,
        check=True,
        capture_output=True,
    )
    for name in os.listdir(case.files):
        if not name.startswith(f"{NAME}.ncnn."):
            case.file(name).unlink()


def load(case: Case) -> Bind:
    """A network with ncnn's default options, but for the types it stores."""
    import ncnn

    network = ncnn.Net()
    network.opt.use_vulkan_compute = False
    network.opt.num_threads = case.threads
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
        setattr(network.opt, name, False)
    network.opt.use_bf16_storage = case.dtype == "bf16"
    network.load_param(str(case.file(f"{NAME}.ncnn.param")))
    network.load_model(str(case.file(f"{NAME}.ncnn.bin")))

    def bind(images: Any) -> Call:
        image = images[0]

        def call() -> Any:
            extractor = network.create_extractor()
            extractor.input("in0", ncnn.Mat(image))
            return extractor.extract("out0")[1]

        return call

    return bind
