"""The command `mnv2`: what it prints, where, and with which exit code."""

# ruff: noqa: F811 (imported fixtures are arguments of tests)
from __future__ import annotations

import builtins
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import LABELS, engine_file, environment, fails, photos, start  # noqa: F401 (some are fixtures)
from safetensors.torch import save_file

from mnv2_fast import MobileNetV2, Predictor, arch, blocks, cli, compile, demo, env, load, ops, weights


def test_predict_prints_each_file_with_its_classes(
    engine_file: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = str(photos / "[bc].png")
    assert (
        cli.main(["predict", "--weights", engine_file, "--top-k", "2", str(photos / "a.png"), pattern]) == 0
    )
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[::3] == [str(photos / name) for name in ("a.png", "b.png", "c.png")]
    assert all(line.strip().split()[1] in LABELS for line in lines[1::3] + lines[2::3])
    assert err == ""


def test_predict_as_json(engine_file: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--model", engine_file, "--json", str(photos)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == [str(photos / name) for name in ("a.png", "b.png", "c.png")]
    for row in rows:
        assert {best["label"] for best in row["predictions"]} == set(LABELS)
        assert sum(best["score"] for best in row["predictions"]) == pytest.approx(1)


def test_predict_goes_on_past_bad_files(
    engine_file: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bb.jpg").write_text("no photo")
    missing = photos / "missing.jpg"
    assert cli.main(["predict", "--weights", engine_file, "--json", str(missing), str(photos)]) == 1
    out, err = capsys.readouterr()
    assert [Path(json.loads(line)["path"]).name for line in out.splitlines()] == ["a.png", "b.png", "c.png"]
    first, second, count = err.splitlines()
    assert str(missing) in first
    assert str(photos / "bb.jpg") in second
    assert count == "mnv2: 2 of 5 files could not be used"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _predict_many(
    engine_file: str, photos: Path, monkeypatch: pytest.MonkeyPatch, terminal: io.StringIO
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    many = [str(photos / "a.png")] * 9
    assert cli.main(["predict", "--weights", engine_file, "--json", *many, str(photos / "none.png")]) == 1


def test_many_files_at_a_terminal_have_a_bar(
    engine_file: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    terminal = _Terminal()
    _predict_many(engine_file, photos, monkeypatch, terminal)
    assert "10/10" in terminal.getvalue()
    assert "none.png" in terminal.getvalue()
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 9


@pytest.mark.parametrize("kind", ["no terminal", "no tqdm"])
def test_without_a_terminal_or_tqdm_there_is_no_bar(
    engine_file: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    if kind == "no tqdm":
        real = builtins.__import__

        def without(name: str, *args: Any) -> Any:
            if name == "tqdm":
                raise ImportError
            return real(name, *args)

        monkeypatch.setattr(builtins, "__import__", without)
    stream = io.StringIO() if kind == "no terminal" else _Terminal()
    _predict_many(engine_file, photos, monkeypatch, stream)
    assert "10/10" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 2
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_a_backend_asked_for_is_used(
    engine_file: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["predict", "--weights", engine_file, "--json", str(photos)]
    assert cli.main(asked) == 0
    fast = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert cli.main([*asked, "--backend", "eager"]) == 0
    assert env.backend() == "eager"
    slow = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for ours, theirs in zip(fast, slow, strict=True):
        for a, b in zip(ours["predictions"], theirs["predictions"], strict=True):
            assert a["label"] == b["label"]
            assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_info_for_people_and_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNV2_STRICT", "1")
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(facts["backends"]["cpu"]) == {op.name for op in ops.OPS}
    assert facts["kernels"]["isa"] in facts["kernels"]["isas"]
    assert facts["processor"]["cores"] >= 1
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert set(facts["environment"]) == {variable.name for variable in env.VARIABLES}
    assert facts["environment"]["MNV2_STRICT"]["value"] == "1"
    assert set(facts["weights"]) == {row.name for row in (*weights.WEIGHTS, *weights.BOXED)}
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (
        "MNV2_STRICT = 1",
        facts["kernels"]["isa"],
        "openmp",
        "depthwise",
        "triton",
        torch.__version__,
    ):
        assert word in out


def test_info_of_a_model(engine_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["info", "--model", engine_file, "--batch", "6", "--size", "100", "--threads", "2"]
    assert cli.main([*asked, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    engine = compile(MobileNetV2(5, width_mult=0.35).eval(), threads=2)
    layers = arch.layers(size=100, specs=engine.layers)
    assert (facts["dtype"], facts["classes"], facts["threads"]) == ("fp32", 5, 2)
    assert facts["file_bytes"] == Path(engine_file).stat().st_size
    assert facts["macs"] == sum(layer.macs for layer in layers) == sum(x["macs"] for x in facts["layers"])
    assert facts["parameters"] == sum(weight.numel() + bias.numel() for weight, bias in engine._tensors)
    assert 4 * facts["parameters"] <= facts["packed_bytes"] < 8 * facts["parameters"]
    assert [x["name"] for x in facts["layers"]] == [layer.spec.conv for layer in layers]
    assert facts["layers"][-1]["output"] == [5, 1, 1]
    engine(torch.zeros(6, 3, 100, 100))
    assert facts["workspace_bytes"] == engine._network.kept()[1]  # as planned, so taken
    assert cli.main(asked) == 0
    out = capsys.readouterr().out
    for value in (facts["macs"], facts["parameters"], facts["packed_bytes"], facts["workspace_bytes"]):
        assert f"{value:,}" in out
    assert sum("depthwise" in line for line in out.splitlines()) == 17


def test_info_says_which_operators_fall_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "eager")
    assert cli.main(["info", "--json"]) == 0
    served = json.loads(capsys.readouterr().out)["backends"]["cpu"]
    assert all(backend.startswith("eager (MNV2_BACKEND=eager)") for backend in served.values())


def test_info_says_that_models_run_eager_under_triton_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    assert "triton" in (MobileNetV2(3, 0.35).eval().why_not(torch.zeros(1, 3, 32, 32)) or "")
    assert cli.main(["info", "--json"]) == 0
    served = json.loads(capsys.readouterr().out)["backends"]["cpu"]
    assert all(backend.startswith("eager (MNV2_BACKEND=triton") for backend in served.values())


def test_info_where_the_extension_is_built_for_another_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mnv2_fast.backends import cpu

    monkeypatch.setattr(cpu, "_load", lambda: (None, "built for another Python: reinstall mnv2-fast"))
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "reinstall" in facts["kernels"]["reason"]
    assert all("built for another Python" in backend for backend in facts["backends"]["cpu"].values())


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times a few calls only: what they take is not what these tests are about."""
    monkeypatch.setattr(demo, "race", partial(demo.race, turns=1, timed=3))


def test_bench_shows_every_form_of_every_block(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, photos: Path
) -> None:
    monkeypatch.setattr(blocks, "measure", partial(blocks.measure, rounds=2))
    for dtype in ("fp32", "bf16"):
        arguments = ["bench", "--blocks", "--size", "32", "--threads", "2", "--dtype", dtype, "--json"]
        assert cli.main(arguments) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["threads"] == 2
        assert len(facts["blocks"]) >= 18  # 17 blocks and the head
        for row in facts["blocks"]:
            assert all(time > 0 for time in row["microseconds"].values())
        # What did not run in a form has no time of it: a stem is no layer to share panels of.
        forms = {row["block"].partition(":")[0]: set(row["microseconds"]) for row in facts["blocks"]}
        assert "part-fused" not in forms["features.1"] | forms["classifier.1"]
        assert forms["features.2"] == forms["features.17"] == {"fused", "part-fused", "per-layer"}
        assert all(row["form"] in row["microseconds"] for row in facts["blocks"])
    arguments = ["bench", "--blocks", "--size", "32", "--threads", "2", "--dtype", "int8", "--json"]
    assert cli.main([*arguments[:-1], "--calibration", str(photos)]) == 0
    assert re.search(r"all: [\d.]+ us as the table has it, [\d.]+ by-rows, [\d.]+x", capsys.readouterr().out)
    assert cli.main([*arguments, "--calibration", str(photos)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["blocks"]) == 19  # 17 blocks, the head and the classifier
    forms = {row["block"].partition(":")[0]: set(row["microseconds"]) for row in facts["blocks"]}
    assert forms["features.1"] == forms["features.18"] == forms["classifier.1"] == {"by-rows"}
    assert forms["features.2"] == forms["features.17"] == {"by-rows", "by-channels"}
    assert {row["form"] for row in facts["blocks"]} == {"by-rows", "by-channels"}
    assert cli.main(["bench", "--blocks", "--size", "32", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "part-fused" in out
    assert "gain: over per-layer" in out
    assert "features.17: 160 -> 320, 1 x 1" in out
    assert "leave --batch-size out" in fails(capsys, "bench", "--blocks", "--batch-size", "2")
    assert "on the CPU kernels, not Engine(" in fails(capsys, "bench", "--blocks", "--backend", "eager")


@pytest.mark.usefixtures("hurried")
def test_bench_times_both_on_seeded_weights(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    assert cli.main(["bench", "--size", "32", "--threads", "1", "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "threads: 1" in out
    assert demo.ENGINE in out
    assert demo.TORCHVISION in out
    assert torch.get_num_threads() == before
    assert cli.main(["bench", "--size", "32", "--json", "--backend", "eager"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "eager" in facts["engine"]
    assert set(facts["milliseconds"]) == {demo.ENGINE, demo.TORCHVISION}
    assert all(len(times) == 3 for times in facts["milliseconds"].values())


@pytest.mark.usefixtures("hurried")
def test_demo_on_real_weights(
    weights_v1: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNV2_WEIGHTS", str(weights_v1.parent))
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "chelsea.png, model IMAGENET1K_V1:"
    assert "Egyptian cat" in lines[1]
    assert lines[1].strip().split("%")[0].replace(".", "").isdigit()
    assert demo.TORCHVISION in out
    assert "maximum difference of the logits" in out
    assert "seeded" not in out


@pytest.mark.usefixtures("hurried")
def test_demo_without_weights_is_of_the_flowers_and_says_what_is_seeded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("mnv2: warning: IMAGENET1K_V1 is not here")
    assert err.count("\n") == 1
    title, first, *rest = out.splitlines()
    assert title == "a drawn daisy, model flowers:"
    score, label = first.split("%")
    assert label.strip() == "daisy"
    assert float(score) > 80
    timed = [line.split("  ")[1] for line in rest if re.search(r"\d\.\d\dx$", line)]
    assert timed == [demo.ENGINE, demo.TORCHVISION, "flowers, int8"]
    assert "maximum difference of the logits" in out
    assert out.count("on seeded weights, not trained ones") == 2


@pytest.mark.usefixtures("hurried")
def test_demo_of_a_photo_and_an_engine_of_ones_own(
    engine_file: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", str(photos / "a.png"), "--model", engine_file]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"a.png, model {engine_file}:\n")
    assert out.count("on seeded weights, not trained ones") == 2


def test_a_drawn_daisy_is_one() -> None:
    """For the flowers, in any size and turned; it is drawn the same each time."""
    flower = demo.drawn_daisy()
    assert flower.tobytes() == demo.drawn_daisy().tobytes()
    predictor = Predictor("flowers")
    for seen in (flower, demo.drawn_daisy(300), flower.rotate(90)):
        best = predictor(seen, top_k=1)[0]
        assert best["label"] == "daisy"
        assert best["score"] > 0.5  # more than all others together


def test_predict_without_weights_takes_the_flowers_and_says_so(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.drawn_daisy().save(photos / "a.png")
    assert cli.main(["predict", str(photos / "a.png"), "--json", "--top-k", "1"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["predictions"][0]["label"] == "daisy"
    assert err.count("\n") == 1
    assert err.startswith("mnv2: warning: IMAGENET1K_V1 is not here")
    assert "set MNV2_WEIGHTS to it; until then flowers answers" in err
    assert "knows daisy, dandelion, roses, sunflowers and tulips" in err
    for asked in (["--model", "IMAGENET1K_V1"], ["--dtype", "fp32"]):
        assert "IMAGENET1K_V1 is not here" in fails(capsys, "predict", photos, *asked)
    assert "IMAGENET1K_V1 is not here" in fails(capsys, "demo", "--model", "IMAGENET1K_V1")
    folder = photos.parent / "weights"
    folder.mkdir()
    state = MobileNetV2().state_dict()
    save_file(state, folder / "mobilenet_v2-IMAGENET1K_V1.safetensors")
    monkeypatch.setenv("MNV2_WEIGHTS", str(folder))
    assert cli.main(["predict", str(photos / "a.png"), "--json", "--top-k", "1000"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["predictions"]) == 1000
    assert err == ""


def test_the_flowers_have_a_name(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine_file: str
) -> None:
    """In every verb that takes an engine; a file so called is given as a path."""
    monkeypatch.chdir(photos)
    shutil.copy(engine_file, "flowers")
    assert cli.main(["predict", "a.png", "--model", "flowers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert {best["label"] for best in found} == {"daisy", "dandelion", "roses", "sunflowers", "tulips"}
    assert cli.main(["predict", "a.png", "--model", "./flowers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert {best["label"] for best in found} == set(LABELS)
    assert load("flowers").labels != LABELS
    assert load(Path("flowers")).labels == load("./flowers").labels == LABELS
    assert cli.main(["info", "--model", "flowers", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dtype"], facts["classes"]) == ("int8", 5)
    assert facts["file"].endswith("flowers-int8.safetensors")
    (photos / "roses").mkdir()
    (photos / "a.png").rename(photos / "roses" / "a.png")
    assert cli.main(["evaluate", "--model", "flowers", "--data", str(photos), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["photos"] == 1
    for verb in (["export", "m.onnx"], ["quantize", "--data", ".", "--out", "m.safetensors"]):
        assert "flowers is an engine" in fails(capsys, *verb, "--model", "flowers")


def test_help_names_what_is_in_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("predict", "demo", "evaluate", "bench", "info"):
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert all(engine.name in out for engine in weights.BOXED), verb


@pytest.mark.usefixtures("hurried")
def test_bench_times_an_engine_beside_a_network_like_it(
    engine_file: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "--size", "32", "--threads", "1", "--json", "--model"]
    for model, dtype in ((engine_file, "fp32"), ("flowers", "int8")):
        assert cli.main([*asked, model]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert f"5 classes, {dtype}" in facts["engine"]
        assert set(facts["milliseconds"]) == {demo.ENGINE, demo.TORCHVISION}
    assert "is an engine, which has no model" in fails(
        capsys, "bench", "--model", "flowers", "--dtype", "int8", "--calibration", photos
    )
    setting = [[1, 16, 1, 1], [6, 24, 1, 2]]
    compile(MobileNetV2(5, inverted_residual_setting=setting).eval()).save(photos / "short.safetensors")
    assert "of a standard width" in fails(capsys, "bench", "--model", photos / "short.safetensors")


@pytest.mark.usefixtures("hurried")
def test_demo_fails_where_the_answers_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = demo.torchvision_twin

    def wrong(model: MobileNetV2) -> torch.nn.Module:
        twin = real(model)
        twin.features[3].conv[0][1].eps = 0.1
        return twin

    monkeypatch.setattr(demo, "torchvision_twin", wrong)
    assert cli.main(["demo"]) == 1
    assert "the answers differ" in capsys.readouterr().out


def test_export_to_onnx_is_checked_and_atomic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    from mnv2_fast import export

    model = MobileNetV2(5, width_mult=0.35)
    path = tmp_path / "plain.safetensors"
    save_file(model.state_dict(), path)
    target = tmp_path / "m.onnx"
    assert cli.main(["export", "--weights", str(path), "--size", "64", str(target)]) == 0
    assert "largest difference" in capsys.readouterr().out
    import onnxruntime

    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 64, 64)
    (logits,) = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model.eval()(x), atol=1e-4, rtol=1e-4)
    assert "batch" in str(session.get_inputs()[0].shape[0])

    seen = json.dumps(weights.Preprocessing(resize=48, crop=40).to_dict())
    save_file(model.state_dict(), path, {"preprocessing": seen})
    assert cli.main(["export", "--weights", str(path), str(target)]) == 0
    capsys.readouterr()
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[2:] == [40, 40]  # that of the photos it was trained on

    before = target.read_bytes()
    monkeypatch.setattr(export, "_AGREEMENT", -1.0)
    assert "no file is written" in fails(capsys, "export", "--weights", path, "--size", "64", target)
    assert target.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "plain.safetensors"]


def test_an_export_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    from mnv2_fast.export import export_onnx

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("half way")

    monkeypatch.setattr(torch.onnx, "export", fails)
    model = MobileNetV2(3, width_mult=0.35).train()
    with pytest.raises(RuntimeError, match="half way"):
        export_onnx(model, tmp_path / "m.onnx", size=32)
    assert model.training
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error(engine_file: str, photos: Path) -> None:
    process = start(["predict", "--weights", engine_file, *[str(photos)] * 400])
    assert process.stdout is not None
    assert process.stdout.readline() != ""
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert err == ""


@pytest.mark.parametrize("after", [1, 50, 300])
def test_interruption_leaves_whole_lines_and_says_what_was_done(
    engine_file: str, photos: Path, after: int
) -> None:
    process = start(["predict", "--json", "--weights", engine_file, *[str(photos)] * 4000])
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(after)]  # it is past its imports
    process.send_signal(signal.SIGINT)
    lines += list(process.stdout)
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(timeout=120) == 130
    process.stdout.close()
    process.stderr.close()
    assert err == f"mnv2: interrupted: {len(lines)} photos done\n"
    assert after <= len(lines) < 12000
    for line in lines:
        assert line.endswith("\n")
        assert set(json.loads(line)) == {"path", "predictions"}


def test_interruption_before_the_first_photo(photos: Path) -> None:
    code = (
        "import sys; from mnv2_fast import cli, predict\n"
        "def slow(*a, **k): raise KeyboardInterrupt\n"
        "predict.Predictor = slow\n"
        "sys.exit(cli.main(['predict', sys.argv[1], '--model', 'flowers']))"
    )
    command = [sys.executable, "-c", code, str(photos)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "mnv2: interrupted\n")


def test_a_file_name_that_the_terminal_cannot_show(engine_file: str, photos: Path) -> None:
    name = os.fsencode(photos) + b"/\xff\xfe.png"
    os.rename(photos / "a.png", name)
    changed = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = start(["predict", "--weights", engine_file, str(photos)], env=changed)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "\\udcff" in out


def test_the_module_is_the_command() -> None:
    process = start(["--version"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.startswith("mnv2-fast ")
    assert err == ""
