import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlmoe.data.images import decode_image
from vlmoe.data.sample import BadSample

LIMIT = 1_000_000


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def decode(raw: bytes, size: int = 16, limit: int = LIMIT) -> np.ndarray:
    return decode_image(raw, "the-key", size, limit)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def quarters(size: int = 64) -> Image.Image:
    """Red, green over blue, white: its orientation can be told."""
    array = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    array[:half, :half], array[:half, half:] = (255, 0, 0), (0, 255, 0)
    array[half:, :half], array[half:, half:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(array)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = noise(16, 16)
    assert (decode(encode(image)) == np.array(image)).all()


@pytest.mark.parametrize(("width", "height"), [(64, 16), (16, 64)])
def test_the_centre_square_is_taken(width: int, height: int) -> None:
    array = np.zeros((height, width, 3), np.uint8)
    array[height // 2 - 8 : height // 2 + 8, width // 2 - 8 : width // 2 + 8] = 200
    assert (decode(encode(Image.fromarray(array))) == 200).all()


def test_resizing_is_antialiased() -> None:
    array = np.zeros((64, 64, 3), np.uint8)
    array[::2] = 254  # lines one pixel thin average to grey; picking pixels would give black or white
    inner = decode(encode(Image.fromarray(array)))[2:-2]
    assert np.abs(inner.astype(int) - 127).max() < 12


def test_a_large_jpeg_is_close_to_resizing_it_whole() -> None:
    image = quarters(512)
    raw = encode(image, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(raw)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    assert np.abs(decode(raw).astype(int) - np.array(whole).astype(int)).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    back = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    upright = quarters()
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encode(stored, "JPEG", quality=95, exif=exif))
    assert np.abs(found.astype(int) - decode(encode(upright)).astype(int)).mean() < 6


def test_modes_are_converted() -> None:
    base = quarters(16)
    assert (decode(encode(base.convert("P"), "PNG")) == np.array(base)).all()
    assert (decode(encode(base.convert("L"))) == np.array(base.convert("L").convert("RGB"))).all()
    assert decode(encode(base.convert("1"))).shape == (16, 16, 3)
    cmyk = decode(encode(base.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - np.array(base).astype(int)).mean() < 12
    clear = base.convert("RGBA")
    clear.putalpha(0)
    assert (decode(encode(clear)) == 255).all()
    grey = Image.fromarray((np.arange(256, dtype=np.uint16) * 256).reshape(16, 16))
    assert (decode(encode(grey))[..., 0].ravel() == np.arange(256)).all()
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    animated = decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (animated == (255, 0, 0)).all()
    assert np.abs(decode(encode(base, "WEBP", lossless=True)).astype(int) - np.array(base)).max() == 0


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(2000, 1000), (12_000, 9_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(BadSample, match=r"more .*pixels"):
        decode(png_header(width, height))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty image file"),
        (b"hello world, no image", "not an image of a known format"),
        (encode(noise(64, 64), "JPEG")[:700], "broken image: .*truncated"),
        (encode(noise(64, 64))[:700], "broken image"),
        (encode(noise(64, 64), "PCX"), "not an image of a known format"),
        (png_header(0, 5), "broken image|not an image|pixels"),
        (png_header(50, 50), "broken image"),
    ],
)
def test_broken_images_are_bad_samples_with_key_and_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason) as error:
        decode(raw)
    assert error.value.key == "the-key"


def test_damage_anywhere_is_a_bad_sample_or_an_image_never_another_error() -> None:
    rng = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "GIF", "WEBP"):
        raw = encode(noise(24, 24), format)
        for _ in range(60):
            damaged = bytearray(raw)
            for at in rng.integers(0, len(raw), 4):
                damaged[at] = rng.integers(256)
            with contextlib.suppress(BadSample):
                assert decode(bytes(damaged)).shape == (16, 16, 3)
