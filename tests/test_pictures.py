"""Pictures and labels as cameras and tools write them, read by data sets and by segment."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image

from opentrans_lab.data import IGNORE, load_dataset
from opentrans_lab.data.pictures import read_label
from opentrans_lab.errors import LabError
from opentrans_lab.evaluation import read_picture

TURNS = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
"""What a viewer does for EXIF's orientations."""

STAMP = np.zeros((5, 8), np.uint8)  # looks different in all eight orientations
STAMP[:2, :5] = 1
STAMP[4, 0] = 1

quick = settings(deadline=None, max_examples=40,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


def exif(turn: int) -> dict:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = turn
    return {"exif": tags} if turn else {}


def folder(
    root: Path, picture: Image.Image, label: np.ndarray = STAMP, classes: str = "0,a\n1,b\n",
    suffix: str = ".png", turns: tuple[int, int] = (0, 0),
) -> Path:  # fmt: skip
    """A data set of one picture and its label, each with an EXIF turn or none."""
    for part in ("images", "labels"):
        (root / part / "val").mkdir(parents=True, exist_ok=True)
    (root / "classes.csv").write_text("id,name\n" + classes)
    picture.save(root / f"images/val/x{suffix}", **exif(turns[0]))
    Image.fromarray(label).save(root / "labels/val/x.png", **exif(turns[1]))
    return root


def batch(root: Path) -> dict:
    return next(load_dataset("folder", "val", root).batches(1, train=False))


def number(value: int) -> bytes:
    return struct.pack(">I", value)


def png(values: np.ndarray, bits: int, colour: int = 0) -> bytes:
    """A PNG of one channel (H, W) in as many bits; Pillow writes no grey of 2 and 4."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + number(zlib.crc32(kind + data))

    lines = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row.tolist())
        text += "0" * (-len(text) % 8)
        lines += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))  # fmt: skip


# --- labels -------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@quick
@given(data=st.data(), bits=st.sampled_from([1, 2, 4, 8, 16]), palette=st.booleans())
def test_ids_of_any_depth_come_back(tmp_path, data, bits, palette):
    colour = 3 if palette and bits < 16 else 0
    ids = data.draw(arrays.arrays(np.uint16, SHAPES, elements=st.integers(0, 2**bits - 1)))
    (tmp_path / "x.png").write_bytes(png(ids, bits, colour))
    found = read_label(tmp_path / "x.png")
    assert found.dtype == (np.uint16 if bits == 16 else np.uint8) and np.array_equal(found, ids)


@quick
@given(
    ids=arrays.arrays(np.uint8, SHAPES, elements=st.integers(0, 1)),
    mode=st.sampled_from(["1", "L", "LA", "P", "I;16"]),
    turn=st.integers(0, 8),
)
def test_ids_of_any_mode_come_back_turned_as_the_file_says(tmp_path, ids, mode, turn):
    label = Image.fromarray(ids.astype(bool) if mode == "1" else ids)
    if mode == "P":
        label.putpalette([250, 3, 3, 9, 9, 240] + [77] * 762)
    elif mode == "I;16":
        label = Image.fromarray(ids.astype(np.uint16))
    elif mode == "LA":
        label = label.convert(mode)
    label.save(tmp_path / "x.png", **exif(turn))
    assert Image.open(tmp_path / "x.png").mode == mode
    assert np.array_equal(read_label(tmp_path / "x.png"), TURNS[turn or 1](ids))


def test_labels_that_say_nothing_clear_are_refused(tmp_path):
    grey, half = Image.fromarray(STAMP), Image.fromarray(STAMP * 255)
    path = tmp_path / "x.png"
    for label, said in (
        (Image.merge("LA", (grey, half)), "x.png is partly transparent.*save it without"),
        (Image.merge("RGB", (grey, grey, grey)), "x.png is a colour picture .RGB.*save it as grey"),
        (grey.convert("RGBA"), "x.png is a colour picture .RGBA"),
    ):
        label.save(path)
        with pytest.raises(LabError, match=said):
            read_label(path)
    grey.save(path, save_all=True, append_images=[half])
    with pytest.raises(LabError, match="x.png has 2 frames"):
        read_label(path)


@pytest.mark.parametrize(("kind", "last"), [(np.uint8, 255), (np.uint16, 65535)])
def test_a_class_cannot_have_the_value_that_means_ignored(tmp_path, kind, last):
    label, classes = STAMP.astype(kind), f"0,a\n1,b\n{last},house\n"
    root = folder(tmp_path, Image.new("RGB", (8, 5)), label, classes)
    assert set(batch(root)["labels"].unique().tolist()) == {0, 1}  # it does not occur
    label[0, 0] = last
    with pytest.raises(LabError, match=rf"x.png holds {last}.*'house'; give the class another id"):
        batch(folder(tmp_path, Image.new("RGB", (8, 5)), label, classes))
    assert batch(folder(tmp_path, Image.new("RGB", (8, 5)), label))["labels"][0, 0, 0] == IGNORE


# --- pictures -----------------------------------------------------------------------------------


def as_mode(mode: str, pixels: np.ndarray) -> Image.Image:
    """A picture of this mode from bytes (H, W, 4)."""
    if mode.startswith("I;16"):
        return Image.fromarray(pixels.view("<u2" if mode == "I;16" else ">u2")[..., 0].copy())
    if mode == "I":
        return Image.fromarray(pixels.view("<u2")[..., 0].astype(np.int32))
    picture = Image.fromarray(pixels)
    if mode == "P clear":
        picture = picture.convert("RGB").quantize(4)
        picture.info["transparency"] = 1
        return picture
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


MODES = {"1": ".png", "L": ".jpg", "LA": ".png", "P": ".gif", "P clear": ".png", "RGB": ".webp",
         "RGBA": ".png", "CMYK": ".jpg", "YCbCr": ".jpg", "I;16": ".png", "I;16B": ".tif",
         "I": ".tif"}  # fmt: skip


@quick
@given(
    pixels=arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(4))),
    mode=st.sampled_from(list(MODES)),
    turn=st.integers(0, 8),
)
def test_data_set_and_segment_see_the_same_picture(tmp_path, pixels, mode, turn):
    suffix = MODES[mode]
    turn = 0 if suffix == ".gif" else turn
    for old in (tmp_path / "d").glob("images/val/*"):
        old.unlink()
    label = np.zeros(TURNS[turn or 1](pixels).shape[:2], np.uint8)
    root = folder(tmp_path / "d", as_mode(mode, pixels), label, suffix=suffix, turns=(turn, 0))
    path = root / f"images/val/x{suffix}"
    seen = batch(root)["images"][0]
    assert torch.equal(seen, read_picture(path)) and seen.shape[1:] == label.shape
    if mode.startswith("I"):  # bright is bright, not cut off at 255
        deep = as_mode(mode, pixels)
        wide = np.asarray(deep).astype(float)
        full = 255 if mode == "I" and wide.max() <= 255 else 65535
        assert np.allclose(seen[0], TURNS[turn or 1](wide / full), atol=0.5 / 255)
        assert torch.equal(seen[0], seen[2])
    if mode == "RGBA":
        clear = TURNS[turn or 1](pixels)[..., 3] == 0
        assert (seen[:, clear] - 128 / 255).abs().sum() < 1e-6  # grey, whatever is beneath


@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
@pytest.mark.parametrize("turn", TURNS)
def test_turned_tiffs(tmp_path, turn, compression):
    """Pillow turns these itself, and by mapping them to memory wrongly."""
    for pixels in (STAMP * 200, STAMP.astype(np.uint16) * 40000):
        Image.fromarray(pixels).save(tmp_path / "x.tif", compression=compression, **exif(turn))
        bright = read_picture(tmp_path / "x.tif")[0].numpy() > 0.5
        assert np.array_equal(bright, TURNS[turn](STAMP))


@pytest.mark.parametrize("drawn", ["on the picture as stored", "upright", "with its own turn"])
@pytest.mark.parametrize("turn", TURNS)
def test_picture_and_label_agree_however_the_label_was_drawn(tmp_path, turn, drawn):
    label = TURNS[turn](STAMP).copy() if drawn == "upright" else STAMP
    own = turn if drawn == "with its own turn" else 0
    found = batch(folder(tmp_path, Image.fromarray(200 * STAMP), label, turns=(turn, own)))
    assert np.array_equal(found["images"][0, 0] > 0.5, TURNS[turn](STAMP))
    expected = TURNS[turn](STAMP)
    if drawn == "on the picture as stored" and turn in (2, 3, 4):
        expected = STAMP  # both would fit: then it counts as drawn on the upright picture
    assert np.array_equal(found["labels"][0], expected)


def test_a_square_label_counts_as_upright_and_a_stale_turn_is_refused(tmp_path):
    square = STAMP[:, :5].copy()
    found = batch(folder(tmp_path / "a", Image.fromarray(200 * square), square, turns=(6, 0)))
    assert np.array_equal(found["labels"][0], square)
    stale = np.rot90(STAMP, -1).copy()  # turned by a tool that left the tag in the file
    root = folder(tmp_path / "b", Image.fromarray(200 * STAMP), stale, turns=(6, 6))
    with pytest.raises(LabError, match="x.png and .*x.png differ in size .8x5 and 5x8."):
        batch(root)


def test_exif_that_means_nothing_is_passed_over(tmp_path):
    picture = Image.fromarray(200 * STAMP)
    picture.save(tmp_path / "plain.jpg")
    picture.save(tmp_path / "nine.jpg", **exif(9))
    picture.save(tmp_path / "broken.jpg", exif=b"Exif\0\0no such thing")
    for name in ("nine.jpg", "broken.jpg"):
        assert torch.equal(read_picture(tmp_path / name), read_picture(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("suffix", [".gif", ".png", ".tif"])
def test_of_several_frames_the_first_is_seen(tmp_path, suffix):
    frames = [Image.fromarray(np.roll(200 * STAMP, i, 1)) for i in range(3)]
    frames[0].save(tmp_path / f"one{suffix}")
    root = folder(tmp_path / "d", frames[0], STAMP, suffix=suffix)
    frames[0].save(root / f"images/val/x{suffix}", save_all=True, append_images=frames[1:])
    assert torch.equal(batch(root)["images"][0], read_picture(tmp_path / f"one{suffix}"))


def test_pictures_of_one_pixel(tmp_path):
    for shape in ((1, 1), (1, 40), (40, 1)):
        root = folder(tmp_path, Image.new("RGB", shape[::-1], (9, 8, 7)), np.zeros(shape, np.uint8))
        assert batch(root)["labels"].shape == (1, *shape)
        shown = next(load_dataset("folder", "val", root, size=16).batches(1))
        assert shown["labels"].shape == (1, 16, 16) and (shown["labels"] == 0).any()


def test_pictures_that_cannot_be_right_are_refused_by_name(tmp_path):
    path = tmp_path / "x.tif"
    for values, said in (
        (np.zeros((4, 5), np.float32), "x.tif is a picture of 32-bit floats.*save it in 8 or 16"),
        (np.full((4, 5), 70_000, np.int32), "x.tif is a picture of 32-bit integers"),
        (np.full((4, 5), -1, np.int32), "x.tif is a picture of 32-bit integers"),
    ):
        Image.fromarray(values).save(path)
        with pytest.raises(LabError, match=said):
            batch(folder(tmp_path / "d", Image.fromarray(values), np.zeros((4, 5), np.uint8),
                         suffix=".tif"))  # fmt: skip
        with pytest.raises(LabError, match=said):
            read_picture(path)
    dot = png(np.zeros((1, 1), int), 1)
    head = dot[12:16] + number(65535) * 2 + dot[24:29]  # which says that it is huge
    (tmp_path / "bomb.png").write_bytes(dot[:12] + head + number(zlib.crc32(head)) + dot[33:])
    for read in (read_picture, read_label):
        with pytest.raises(LabError, match="bomb.png is too large.*reduce or cut it"):
            read(tmp_path / "bomb.png")


def test_a_lossy_label_is_refused_whatever_its_name_says(tmp_path):
    ids = np.zeros((8, 8), np.uint8)
    ids[:, 4:] = 8
    Image.fromarray(ids).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(LabError, match="a.png is a JPEG, which blurs ids.*PNG"):
        read_label(tmp_path / "a.png")
    Image.fromarray(ids).convert("RGB").save(tmp_path / "w.png", format="WEBP", lossless=True)
    with pytest.raises(LabError, match="w.png is a colour picture"):  # a sound file
        read_label(tmp_path / "w.png")
