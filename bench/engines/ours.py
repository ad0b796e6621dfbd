"""mnv2_fast: the engine, or the model called as it stands (option "automatic")."""

from __future__ import annotations

import shutil

from .. import material
from . import Bind, Case

ENGINE, WEIGHTS = "engine.safetensors", "weights.safetensors"


def prepare(case: Case) -> None:
    """The engine's file; for the automatic path the weights are the file."""
    import torch

    from mnv2_fast import compile

    if case.options.get("automatic"):
        shutil.copy(material.path(case.material, material.WEIGHTS), case.file(WEIGHTS))
        return
    calibration = None
    if case.dtype == "int8":
        calibration = torch.from_numpy(material.calibration(case.material, case.calibration))
    compile(material.our_model(case.material), case.dtype, calibration=calibration).save(case.file(ENGINE))


def load(case: Case) -> Bind:
    """The engine from its file."""
    import torch

    import mnv2_fast

    network: object
    if case.options.get("automatic"):
        torch.set_num_threads(case.threads)
        torch.set_grad_enabled(False)
        network = mnv2_fast.mobilenet_v2(weights=case.file(WEIGHTS)).eval()
    else:
        network = mnv2_fast.load(case.file(ENGINE), threads=case.threads)
    assert callable(network)
    run = network

    def bind(images):  # type: ignore[no-untyped-def]
        x = torch.from_numpy(images)
        return lambda: run(x)

    return bind
