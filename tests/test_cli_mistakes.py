"""Mistakes on the command line of `mnv2`: one line that names the cure, and exit code 2."""

# ruff: noqa: F811 (imported fixtures are arguments of tests)
from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import engine_file, environment, fails, photos, start  # noqa: F401 (some are fixtures)
from safetensors.torch import save_file

from mnv2_fast import MobileNetV2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["predict"], "the following arguments are required: PHOTO"),
        (["predict", "a.jpg", "--threads", "0"], "'0': give a whole number of at least 1"),
        (["predict", "a.jpg", "--threads", "-1"], "'-1': give a whole number of at least 1"),
        (["predict", "a.jpg", "--top-k", "many"], "'many': give a whole number of at least 1"),
        (["predict", "a.jpg", "--backend", "cuda"], "'auto', 'eager', 'cpu', 'triton'"),
        (["export", "--format", "tflite", "m.tflite"], "'onnx'"),
        (["foo"], "'export', 'quantize', 'evaluate', 'compare', 'demo'"),
        ([], "VERB"),
        (["predict", "nothing/*.jpg"], "no file matches 'nothing/*.jpg'"),
    ],
)
def test_a_wrong_command_line(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in fails(capsys, *args)


def test_an_unknown_dtype_lists_the_valid_ones(
    engine_file: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "use one of fp32, bf16" in fails(
        capsys, "predict", photos, "--weights", engine_file, "--dtype", "fp8"
    )
    assert "use one of fp32, bf16" in fails(capsys, "bench", "--dtype", "fp8")


def test_weights_that_are_not_to_be_had(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_text("not safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"fc.weight": torch.zeros(2)}, other)
    for name, words in (
        (tmp_path / "none.safetensors", "IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        (wrong, "fetch it again"),
        (other, "unknown fc.weight"),
        ("DEFAULT", "set MNV2_WEIGHTS"),
    ):
        assert words in fails(capsys, "predict", photos, "--weights", name)
        assert words in fails(capsys, "bench", "--weights", name)
        assert words in fails(capsys, "export", tmp_path / "m.onnx", "--weights", name)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("variable", ["MNV2_WEIGHTS", "MNV2_BACKEND", "MNV2_STRICT"])
def test_an_environment_variable_that_makes_no_sense(
    variable: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "nonsense")
    assert f"{variable}='nonsense'" in fails(capsys, "info")


@pytest.mark.parametrize("variable", ["MNV2_BACKEND", "MNV2_STRICT"])
def test_every_verb_refuses_an_environment_that_makes_no_sense(
    variable: str,
    engine_file: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, "yes")
    for args in (["predict", photos, "--weights", engine_file], ["bench"], ["demo"], ["export", "m.onnx"]):
        assert f"{variable}='yes'" in fails(capsys, *args)


def test_empty_arguments_are_not_the_current_folder(
    engine_file: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos)
    assert "'' names no photo" in fails(capsys, "predict", "", "--weights", engine_file)
    assert "'' names nothing: give a file" in fails(capsys, "predict", "a.png", "--weights", "")


def test_demo_does_not_forgive_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no weights file typo.safetensors" in fails(capsys, "demo", "--weights", "typo.safetensors")


def test_an_unknown_instruction_set_lists_the_valid_ones(photos: Path) -> None:
    changed = {**os.environ, "MNV2_FORCE_ISA": "neon"}  # read once in a process
    for args in (["info"], ["bench"]):
        process = start(args, env=changed)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert out == ""
        assert err.startswith("mnv2: error: MNV2_FORCE_ISA='neon'")
        assert "scalar" in err
        assert err.count("\n") == 1


def test_info_of_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no weights file typo.safetensors" in fails(capsys, "info", "--model", "typo.safetensors")
    assert "name it with --model" in fails(capsys, "info", "--batch", "3")


def test_export_without_onnx_names_the_cure(
    engine_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mnv2_fast import export

    path = tmp_path / "plain.safetensors"
    save_file(MobileNetV2(5, width_mult=0.35).state_dict(), path)
    assert "is an engine" in fails(capsys, "export", "--weights", engine_file, tmp_path / "m.onnx")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert "pip install onnx onnxscript" in fails(capsys, "export", "--weights", path, tmp_path / "m.onnx")


def test_a_folder_that_is_not_there_to_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain.safetensors"
    save_file(MobileNetV2(5, width_mult=0.35).state_dict(), path)
    said = fails(capsys, "export", "--weights", path, tmp_path / "nowhere" / "m.onnx")
    assert f"there is no folder {tmp_path / 'nowhere'} to save m.onnx in: make it first" in said
    assert "give the name of a file" in fails(capsys, "export", "--weights", path, tmp_path)


def test_more_threads_than_cores_are_a_warning_of_one_line(engine_file: str, photos: Path) -> None:
    process = start(["predict", "--weights", engine_file, "--threads", "1000", str(photos)])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.count(str(photos)) == 3
    assert err.startswith("mnv2: warning: threads=1000 is more than the ")
    assert err.count("\n") == 1


def test_help_and_mistakes_load_no_torch() -> None:
    code = (
        "import sys; from mnv2_fast import cli\n"
        "for args in (['--help'], ['predict', '--help'], ['predict', '--threads', '0'], ['--version']):\n"
        "    try: cli.main(args)\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert time.perf_counter() - start < 10
