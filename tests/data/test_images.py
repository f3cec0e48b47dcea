import contextlib
import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from vlmoe.data.files import FileOptions, Parts, make_sample
from vlmoe.data.images import WITHOUT_PROFILE, decode_image
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


# --------------------------------------------------------------------------------------------------- colour profiles
SRGB = ((0.436066, 0.222488, 0.013916), (0.385147, 0.716873, 0.097076), (0.143066, 0.060608, 0.714096))  # XYZ at D50
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
WHITE = (0.9642, 1.0, 0.8249)


def icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 profile (ICC.1:2001-04) for a display: header, table of tags, tags."""
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(WHITE)[8:] + bytes(48)
    return header + table + body


def xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def rgb_profile(columns: tuple[tuple[float, ...], ...], exponent: float) -> bytes:
    tags = {b"wtpt": xyz(WHITE)}
    for letter, column in zip((b"r", b"g", b"b"), columns, strict=True):
        tags |= {letter + b"XYZ": xyz(column), letter + b"TRC": gamma(exponent)}
    return icc(b"RGB ", tags)


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, from shares of light to levels of 255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def by_hand(rgb: np.ndarray, columns: tuple[tuple[float, ...], ...], exponent: float) -> np.ndarray:
    to_xyz, to_srgb = np.array(columns).T, np.linalg.inv(np.array(SRGB).T)
    return srgb_levels((rgb / 255) ** exponent @ to_xyz.T @ to_srgb.T)


SWAPPED = (SRGB[1], SRGB[2], SRGB[0])  # red stands for green, green for blue, blue for red


@pytest.mark.parametrize(("columns", "exponent"), [(ADOBE, 2.19921875), (SWAPPED, 2.2)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_wide_or_odd_colour_space_becomes_srgb(
    columns: tuple[tuple[float, ...], ...], exponent: float, format: str
) -> None:
    lossless: dict[str, dict[str, object]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    array = np.asarray(noise(4, 4)).repeat(8, 0).repeat(8, 1)
    raw = encode(Image.fromarray(array), format, icc_profile=rgb_profile(columns, exponent), **lossless.get(format, {}))
    stored = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    notes: list[str] = []
    found = decode_image(raw, "k", 32, LIMIT, notes=notes)
    assert np.abs(found - by_hand(stored, columns, exponent)).max() < 2.5
    assert np.abs(found.astype(int) - stored).max() > 20  # without the profile it would not pass
    assert notes == []


def test_transparency_and_palettes_keep_their_profile() -> None:
    profile = rgb_profile(SWAPPED, 2.2)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    clear.paste((255, 0, 0, 0), (0, 0, 8, 16))
    found = decode(encode(clear, icc_profile=profile))
    assert np.abs(found[:, 12].astype(int) - (0, 255, 0)).max() < 3
    assert (found[:, 3] == 255).all()
    palette = Image.new("RGB", (16, 16), (0, 255, 0)).convert("P")
    assert np.abs(decode(encode(palette, icc_profile=profile)).astype(int) - (0, 0, 255)).max() < 3


def test_grey_profiles_and_grey_images_with_a_profile_for_colours() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    profile = icc(b"GRAY", {b"wtpt": xyz(WHITE), b"kTRC": gamma(1.5)})
    expected = srgb_levels((levels / 255) ** 1.5)[..., None].repeat(3, 2)
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.uint16) << 8)):
        found = decode(encode(image, icc_profile=profile))
        assert np.abs(found - expected).max() < 2.5
        assert np.abs(found.astype(int) - levels[..., None]).max() > 20
    found = decode(encode(Image.fromarray(levels), icc_profile=rgb_profile(SWAPPED, 1.5)))
    assert np.abs(found - expected).max() < 2.5


@functools.cache
def cmyk_profile() -> bytes:
    """A printer whose black ink prints nothing and whose cyan ink takes away green: a table of 2 x 2 x 2 x 2 corners
    (lut8Type) to Lab."""
    corners = np.array([[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)])
    rgb = np.stack([255 * (1 - corners[:, 1]), 255 * (1 - corners[:, 0]), 255 * (1 - corners[:, 2])], 1)
    image = Image.fromarray(rgb.astype(np.uint8)[None])
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    values = np.frombuffer(lab.tobytes(), np.uint8).reshape(-1, 3) ^ np.array([0, 128, 128], np.uint8)  # to unsigned
    line = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * int(i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + struct.pack(">BBBx", 4, 3, 2) + matrix + 4 * line + values.tobytes() + 3 * line
    raw = icc(b"CMYK", {b"wtpt": xyz(WHITE), b"A2B0": table})
    return raw[:12] + b"prtr" + raw[16:20] + b"Lab " + raw[24:]


def test_inks_are_read_by_their_profile() -> None:
    magenta, cyan, white = (255, 0, 255), (0, 255, 255), (255, 255, 255)
    for inks, expected in ((255, 0, 0, 0), magenta), ((0, 0, 0, 255), white), ((0, 255, 0, 0), cyan):
        image = Image.new("CMYK", (16, 16), inks)
        with_profile = decode(encode(image, "TIFF", icc_profile=cmyk_profile()))
        assert np.abs(with_profile.astype(int) - expected).max() < 6, inks
        plain = decode(encode(image, "TIFF"))
        assert (plain == np.asarray(image.convert("RGB"))).all()
        assert np.abs(plain.astype(int) - with_profile).max() > 200


def test_a_profile_of_srgb_changes_nothing() -> None:
    image = noise(16, 16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (decode(encode(image, icc_profile=profile)) == np.array(image)).all()


@pytest.mark.parametrize("wrong", [b"no profile", bytes(200), rgb_profile(ADOBE, 2.2)[:-90], b"", "grey"])
def test_an_unusable_profile_is_left_out_and_noted(wrong: bytes | str) -> None:
    image = noise(16, 16)
    profile = icc(b"GRAY", {b"wtpt": xyz(WHITE), b"kTRC": gamma(1.0)}) if isinstance(wrong, str) else wrong
    notes: list[str] = []
    raw = encode(image, "WEBP", lossless=True, icc_profile=profile)
    found = decode_image(raw, "k", 16, LIMIT, notes=notes)
    assert (found == np.array(image)).all()
    assert notes == ([WITHOUT_PROFILE] if wrong else [])
    assert make_sample(Parts(image=raw), "k", FileOptions("image", "x"), 0).taken == tuple(notes)
