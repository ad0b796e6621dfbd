"""Photos that are damaged or unusual: converted sensibly, or refused with one line that says the cure."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mnv2_fast import UserError, data
from mnv2_fast.weights import Preprocessing


def _ramp(width: int = 64, height: int = 48) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], 2)
    return Image.fromarray(values.astype(np.uint8))


def _read(path: Path) -> np.ndarray:
    return np.asarray(data.read_image(path)).astype(int)


def _refused(path: Path, match: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(data.ImageError, match=match) as caught:
            data.read_image(path)
    assert isinstance(caught.value, UserError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    _refused(tmp_path / "none.jpg", "no file .*none.jpg: check the path")
    with pytest.raises(FileNotFoundError):
        data.read_image(tmp_path / "none.jpg")


def test_folder(tmp_path: Path) -> None:
    _refused(tmp_path, "is a folder")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp", "gif"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    _ramp().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    _refused(path, "fetch it again|no image of a format read here")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.touch()
    _refused(path, "no image of a format read here")


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("this is no photo\n")
    _refused(path, "no image of a format read here")


def test_a_format_whose_decoder_runs_a_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    _ramp().save(path, "EPS")
    assert Image.open(path).format == "EPS"
    _refused(path, "no image of a format read here: give one of JPEG, PNG")


@pytest.mark.parametrize("name", data.FORMATS)
def test_every_format_is_read(tmp_path: Path, name: str) -> None:
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for suffix in data.FORMATS[name]:
        path = tmp_path / f"a{suffix}"
        _ramp().save(path, name)
        assert _read(path).shape == (48, 64, 3)


@pytest.mark.filterwarnings("ignore:Metadata Warning")
def test_damaged_bytes_never_escape_as_another_exception(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "tiff", "gif", "webp"):
        buffer = io.BytesIO()
        _ramp().save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        for _ in range(40):
            content = bytearray(buffer.getvalue())
            for at in rng.integers(0, len(content), 8):
                content[at] = rng.integers(0, 256)
            with contextlib.suppress(data.ImageError):
                assert data.read_image(bytes(content)).mode == "RGB"


def test_one_pixel(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (1, 1), (10, 20, 30)).save(path)
    seen = data.resize_and_crop(data.read_image(path), Preprocessing())
    assert seen.shape == (224, 224, 3)
    assert (seen == (10, 20, 30)).all()


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    _ramp().convert("CMYK").save(path, quality=95)
    assert Image.open(path).mode == "CMYK"
    assert np.abs(_read(path) - np.asarray(_ramp()).astype(int)).mean() < 6


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (200, 0, 0, 0))
    rgba.save(path)
    assert _read(path).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_opaque_alpha_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    _ramp().convert("RGBA").save(path)
    np.testing.assert_array_equal(_read(path), np.asarray(_ramp()))


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path: Path, transparent: bool) -> None:
    path = tmp_path / "a.png"
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(path, **({"transparency": 0} if transparent else {}))
    assert Image.open(path).mode == "P"
    assert _read(path).tolist() == [[[255] * 3 if transparent else [9, 8, 7], [200, 100, 50]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    source = _ramp().convert("RGB").convert("L" if mode in ("1", "LA") else "RGB")
    image = source.convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4))
    assert data.read_image(image).mode == "RGB"


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(path)
    assert Image.open(path).mode.startswith("I")
    assert _read(path)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(np.ones((2, 2), np.float32)).save(path)
    _refused(path, "32 bits.*convert it to 8 bits")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(path), "n_frames", 1) == 3
    red, green, blue = _read(path)[4, 4]
    assert (red, green, blue) == pytest.approx((250, 0, 0), abs=8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((6, 4, 3), np.uint8)
    upright[0, 0] = 255  # the corner shows where the top left has gone
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    stored.save(path, exif=exif)
    np.testing.assert_array_equal(_read(path), upright)
    assert Image.open(path).size == stored.size


def _png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 60_000], ids=["Pillow only warns", "Pillow refuses"])
def test_decompression_bomb(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_bomb(side, side))
    _refused(path, r"more than the [\d,]+ pixels allowed.*scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS")


def test_the_limit_on_pixels_is_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    _ramp(40, 30).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    _refused(path, "1,199 pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert _read(path).shape == (30, 40, 3)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    _ramp().save(path)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", denied)  # the superuser may read a file of any mode
    _refused(path, "check its permissions")
