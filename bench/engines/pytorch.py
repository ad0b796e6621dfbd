"""torch in its faster layout, channels_last: eager, or compiled with frozen weights (option "compile")."""

from __future__ import annotations

import shutil
from typing import Any

from .. import material
from . import Bind, Call, Case

WEIGHTS = "weights.safetensors"


def prepare(case: Case) -> None:
    """The weights are the file; what is compiled goes to Inductor's cache when it is first loaded."""
    shutil.copy(material.path(case.material, material.WEIGHTS), case.file(WEIGHTS))


def imports() -> None:
    """torchvision goes by the way that mends its wheel beside another build of torch."""
    from mnv2_fast._torchvision import torchvision

    torchvision()


def load(case: Case) -> Bind:
    """torchvision's model; option "vector_bits" limits the code that Inductor writes."""
    import torch

    torch.set_num_threads(case.threads)
    torch.set_grad_enabled(False)
    model: Any = material.torchvision_model(case.file(WEIGHTS))
    model.to(memory_format=torch.channels_last)
    if case.options.get("compile"):
        import torch._inductor.config as inductor

        # Freezing folds batch norm and packs the weights for oneDNN. The C++ wrapper saves the Python between
        # kernels: 9.7 ms -> 7.9 at batch 1 on one core of a Xeon; mode="max-autotune" loses there (12.9).
        inductor.freezing = True
        inductor.cpp_wrapper = True
        inductor.cpp.simdlen = case.options.get("vector_bits")
        model = torch.compile(model, dynamic=False)

    def bind(images: Any) -> Call:
        x = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)

        def autocast() -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return autocast if case.dtype == "bf16" else lambda: model(x)

    return bind


def note(case: Case) -> str:
    """bf16 without the instruction is emulated."""
    import torch

    lacking = case.dtype == "bf16" and not torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "emulated: the processor does not show avx512_bf16" if lacking else ""
