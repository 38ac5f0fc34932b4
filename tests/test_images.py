"""Images as they come: every format against a reference worked out by hand, every kind of damage, and a decode copy that is never wrong."""
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageFile

import ctrlscam.images as images
from ctrlscam.config import Settings
from ctrlscam.data import DataError, data_root, load_table
from ctrlscam.images import decode_image, image_sizes, open_pictures, overlap, take_inventory, verify_copy

RNG = np.random.default_rng(0)


def noise(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


# Writers of their own, so that the references owe nothing to the library under test.

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(levels, colour, *extra):
    """A PNG of H×W×C levels; `colour` is 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(levels.dtype.newbyteorder(">")).tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, levels.dtype.itemsize * 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(levels, photometric, kind=1, claimed=None, planar=1):
    """A little-endian TIFF of H×W×C levels; `kind` is 1 unsigned, 2 signed, 3 float."""
    height, width, channels = levels.shape
    pixels, bits = levels.astype(levels.dtype.newbyteorder("<")).tobytes(), levels.dtype.itemsize * 8
    after = 8 + len(pixels)
    high, wide = claimed or (height, width)
    alpha = [(338, 3, 1, 2)] if channels == 4 and photometric == 2 else []
    tags = [(256, 4, 1, wide), (257, 4, 1, high), (258, 3, channels, bits if channels == 1 else after), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8),
            (277, 3, 1, channels), (278, 4, 1, high), (279, 4, 1, len(pixels)), (284, 3, 1, planar), *alpha, (339, 3, 1, kind)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", after + 2 * channels) + pixels + struct.pack(f"<{channels}H", *[bits] * channels) + directory


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def on_white(colour, alpha):
    return np.rint(colour * (alpha / 255.0) + 255.0 * (1 - alpha / 255.0))


# Fault 21: (content of the file, reference H×W×3, tolerance in grey levels)

def grey():
    levels = noise(6, 7, 1)
    return [(png(levels, 0), levels.repeat(3, 2), 0), (tiff(levels, 1), levels.repeat(3, 2), 0), (tiff(levels, 0), 255 - levels.repeat(3, 2), 0)]


def cmyk():
    inks = noise(6, 7, 4)
    reference = np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255)
    smooth = np.kron(noise(2, 2, 4), np.ones((16, 16, 1), dtype=np.uint8))
    adobe = saved(Image.frombytes("CMYK", (32, 32), smooth.tobytes()), "JPEG", quality=100)
    assert b"Adobe" in adobe  # which means that the inks are stored inverted
    return [(tiff(inks, 5), reference, 0), (adobe, np.rint((255.0 - smooth[..., :3]) * (255.0 - smooth[..., 3:]) / 255), 3)]


def rgba():
    levels, pair = noise(6, 7, 4), noise(6, 7, 2)
    return [(png(levels, 6), on_white(levels[..., :3], levels[..., 3:]), 0), (tiff(levels, 2), on_white(levels[..., :3], levels[..., 3:]), 0),
            (png(pair, 4), on_white(pair[..., :1], pair[..., 1:]).repeat(3, 2), 0),
            (png(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8), 2, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))), [[[255, 255, 255], [4, 5, 6]]], 0)]


def palette():
    colours, alpha, places = noise(4, 3), np.array([0, 100, 255], dtype=np.uint8), RNG.integers(0, 4, (6, 7, 1), dtype=np.uint8)
    plain, table = colours[places[..., 0]], chunk(b"PLTE", colours.tobytes())
    full = np.append(alpha, 255)[places[..., 0]][..., None]  # colours without an alpha are opaque
    return [(png(places, 3, table), plain, 0), (png(places, 3, table, chunk(b"tRNS", alpha.tobytes())), on_white(plain, full), 0)]


def sixteen_bits():
    one, three, four = (noise(6, 7, channels, dtype=np.uint16) for channels in (1, 3, 4))
    high = [levels // 256 for levels in (one, three, four)]
    clear = png(one, 0, chunk(b"tRNS", one[2, 3].astype(">u2").tobytes()))
    assert (one == one[2, 3]).sum() == 1
    without = np.where(one == one[2, 3], 255, high[0]).repeat(3, 2)
    return [(png(one, 0), high[0].repeat(3, 2), 0), (tiff(one, 1), high[0].repeat(3, 2), 0), (png(three, 2), high[1], 0), (tiff(three, 2), high[1], 0),
            (png(four, 6), on_white(high[2][..., :3], high[2][..., 3:]), 0), (tiff(four, 2), on_white(high[2][..., :3], high[2][..., 3:]), 0), (clear, without, 0)]


def one_by_one():
    return [(png(np.array([[[9, 8, 7]]], dtype=np.uint8), 2), [[[9, 8, 7]]], 0), (saved(Image.new("1", (1, 1), 1), "PNG"), [[[255] * 3]], 0)]


def turned():
    picture = noise(6, 8, 3)
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
            6: lambda a: a[::-1].swapaxes(0, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a[:, ::-1].swapaxes(0, 1)}
    cases = []
    for note, turn in undo.items():
        tag = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHHI", 0x0112, 3, 1, note, 0, 0)
        cases.append((png(picture, 2, chunk(b"eXIf", tag[6:])), turn(picture), 0))
        jpeg = saved(Image.fromarray(picture), "JPEG")
        marked = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag + jpeg[2:]
        cases.append((marked, turn(np.asarray(Image.open(io.BytesIO(jpeg)))), 0))
    deep = noise(6, 8, 1, dtype=np.uint16)
    return [*cases, (png(deep, 0, chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, 6, 0, 0))), (deep // 256)[::-1].swapaxes(0, 1).repeat(3, 2), 0)]


def animated():
    frames = [Image.fromarray(np.full((6, 7), level, dtype=np.uint8)) for level in (30, 200, 90)]
    return [(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options), np.full((6, 7, 3), 30), 0)
            for kind, options in (("GIF", {}), ("WEBP", dict(lossless=True)), ("PNG", {}), ("TIFF", {}))]


@pytest.mark.parametrize("cases", [grey, cmyk, rgba, palette, sixteen_bits, one_by_one, turned, animated], ids=lambda cases: cases.__name__)
def test_fault_21_formats(cases, tmp_path):
    file = tmp_path / "named as all are.jpg"
    for place, (content, reference, tolerance) in enumerate(cases()):
        file.write_bytes(content)
        picture = decode_image(file)
        assert picture.dtype == np.uint8 and picture.flags.writeable and picture.shape == np.shape(reference), place
        assert np.abs(picture.astype(float) - reference).max() <= tolerance, place


@pytest.mark.parametrize("content, reason", [
    (tiff(noise(4, 4, 1).astype(np.float32), 1, kind=3), "floating-point"), (tiff(noise(4, 4, 1).astype(np.int16), 1, kind=2), "32-bit or signed"),
    (tiff(noise(4, 4, 1).astype(np.uint32), 1), "32-bit or signed"), (tiff(noise(4, 4, 1, dtype=np.uint16), 0), "0 for white"),
    (tiff(noise(4, 4, 3, dtype=np.uint16), 2, planar=2), "plane by plane"),
    (png(noise(4, 4, 3, dtype=np.uint16), 2, chunk(b"tRNS", struct.pack(">HHH", 300, 2, 3))), "transparent colour of 16 bits"),
], ids=["float", "signed", "32 bits", "16 bits, white 0", "planes", "16-bit transparent colour"])
def test_fault_21_what_cannot_be_shown_is_refused(content, reason, tmp_path):
    file = tmp_path / "image.tif"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"image.tif cannot be decoded: .*{reason}"):
        decode_image(file)


PHOTO = Image.fromarray(np.kron(noise(12, 16, 3), np.ones((8, 8, 1), dtype=np.uint8)) // 2 + noise(96, 128, 3) // 2)
WHOLE = {"jpeg": saved(PHOTO, "JPEG", quality=90), "progressive jpeg": saved(PHOTO, "JPEG", progressive=True), "png": saved(PHOTO, "PNG"), "bmp": saved(PHOTO, "BMP"),
         "gif": saved(PHOTO.convert("P"), "GIF"), "tiff": saved(PHOTO, "TIFF"), "lzw tiff": saved(PHOTO, "TIFF", compression="tiff_lzw"),
         "webp": saved(PHOTO, "WEBP"), "cmyk jpeg": saved(PHOTO.convert("CMYK"), "JPEG")}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("name", WHOLE)
def test_fault_20_no_cut_file_gets_through(name, tmp_path, monkeypatch):
    """Cut anywhere, whatever another library has switched on. Only bytes after the picture's last may be missing."""
    file, whole = tmp_path / "cut.jpg", WHOLE[name]
    file.write_bytes(whole)
    complete = decode_image(file)
    cuts = {len(whole) - k for k in range(1, 13)} | set(range(0, len(whole), len(whole) // 25))
    let_through = []
    for cut in cuts:
        file.write_bytes(whole[:cut])
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        try:
            assert np.array_equal(decode_image(file), complete)
            let_through.append(len(whole) - cut)
        except DataError as error:
            assert "cut.jpg cannot be decoded: " in str(error)
    after_the_picture = {"gif": 2, "png": 4}.get(name, 0)  # a GIF's end mark, and the checksum of a PNG's
    assert max(let_through, default=0) <= after_the_picture


def toy_set(root, count=4):
    """Noise in the layout of a folder data set: two classes, `count` images a split and class."""
    for name in [f"{split}/{bird}/{k}.png" for split in ("train", "test") for bird in ("gull", "wren") for k in range(count)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(30, 40, 3)).save(root / name)
    return root


@pytest.fixture
def toy(tmp_path):
    """Settings and table of a small set of image files with a cache of its own."""
    config = Settings(dataset=f"folder:{toy_set(tmp_path / 'set')}", data_dir=str(tmp_path), image_size=32, validation_share=0.25, recipe="synthbirds")
    return config, load_table(config)


def cached(config, suffix):
    folder = data_root(config).parent / "cache"
    return sorted(file for file in folder.glob(f"*{suffix}") if not file.name.startswith(".")) if folder.is_dir() else []


def index_of(config):
    return next(file for file in cached(config, ".json") if not file.name.endswith(".inventory.json"))


DAMAGE = {"train/gull/0.png": (b"", "it is empty (0 bytes)"), "train/gull/1.png": (WHOLE["jpeg"][:900], "truncated"),
          "train/wren/2.png": (b"Not found\n", "it is a text file that begins with 'Not found'"),
          "test/gull/3.png": (b"\n<html><head><title>Sign in", "it is an HTML page, perhaps a login page"),
          "test/wren/0.png": (b"\xff\xfe\x00\x01" * 40, "it is none of JPEG, PNG"), "test/wren/1.png": (WHOLE["png"][:-30], "truncated")}


def test_fault_20_damaged_files_are_listed_and_refused(toy):
    config, table = toy
    for path, (content, _) in DAMAGE.items():
        (data_root(config) / path).write_bytes(content)
    inventory = take_inventory(data_root(config), table.path).set_index("path")
    assert set(inventory.index[inventory.error.notna()]) == set(DAMAGE)
    for path, (_, reason) in DAMAGE.items():
        assert reason.lower() in inventory.error[path].lower(), (path, inventory.error[path])
    for attempt in range(2):  # the second knows it from the notes
        for changed in (config, config.replace(cache_gigabytes=0)):
            with pytest.raises(DataError) as caught:
                open_pictures(table, changed)
            said = str(caught.value)
            assert "6 of 16 images cannot be decoded" in said and "leave_out" in said and "ctrlscam data check folder:" in said
            assert sum(path in said for path in DAMAGE) == 5 and "…" in said
    assert not cached(config, ".npy") and not cached(config, ".part")
    sound = table[~table.path.isin(DAMAGE)].reset_index(drop=True)
    assert len(open_pictures(sound, config)) == 10


BOMB = """
import sys, threading, time, warnings
from pathlib import Path
import psutil
from ctrlscam.data import DataError
from ctrlscam.images import decode_image, take_inventory
process, peak, done = psutil.Process(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)
files = sorted(Path(sys.argv[1]).iterdir())
start = process.memory_info().rss
threading.Thread(target=watch, daemon=True).start()
for strict in (False, True):
    warnings.simplefilter("error" if strict else "default")
    for file in files:
        try:
            decode_image(file)
            print("LET THROUGH", file.name)
        except DataError as error:
            assert file.name in str(error) and "more" in str(error) and "80,000,000" in str(error), str(error)
assert take_inventory(files[0].parent, [file.name for file in files], progress=False).error.notna().all()
done = True
print(len(files), "refused", round((peak - start) / 1e6), "MB")
"""


def huge(side=50_000):
    """By format, files of a few bytes whose headers claim side×side pixels."""
    small = png(noise(2, 2, 3), 2)
    header = b"IHDR" + struct.pack(">II", side, side) + small[24:29]
    jpeg = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place:place + 4] = struct.pack(">HH", side, side)
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * struct.pack("<I", min(side, 16_384) - 1)[:3]
    webp = b"WEBP" + canvas + saved(Image.new("RGB", (8, 8)), "WEBP")[12:]
    return {"png": small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:], "jpg": bytes(jpeg), "tif": tiff(noise(2, 2, 3), 2, claimed=(side, side)),
            "gif": b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x08\x01\0\0;",
            "bmp": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
            "webp": b"RIFF" + struct.pack("<I", len(webp)) + webp}


def test_fault_22_decompression_bombs(tmp_path):
    for side in (50_000, 9_500):  # 2.5 billion pixels, and 90 million: Pillow refuses the first and warns of the second
        for kind, content in huge(side).items():
            if side > 16_384 or kind != "webp":  # whose decoder refuses the smaller one for another reason
                (tmp_path / f"{side}.{kind}").write_bytes(content)
    result = subprocess.run([sys.executable, "-c", BOMB, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    count, _, growth, _ = result.stdout.split()[-4:]
    assert count == "11" and "LET THROUGH" not in result.stdout
    assert int(growth) < 200, result.stdout


def test_fault_22_the_limit_does_not_hang_on_pillows_switch(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(huge()["png"])
    with pytest.raises(DataError, match="claims 50,000×50,000 pixels, more than the limit"):
        decode_image(tmp_path / "a.png")


def test_fault_23_names_links_and_things_that_are_no_files(tmp_path):
    content = png(noise(4, 5, 3), 2)
    outside = tmp_path / "elsewhere" / "original.png"
    outside.parent.mkdir()
    outside.write_bytes(content)
    root = tmp_path / "set"
    root.mkdir()
    readable = ["käfer zwölf 鳥 \u202e.png", " leading and trailing ", "new\nline.png", "%s{}'\";.png", "x" * 251 + ".png", "no suffix"]
    for name in readable:
        (root / name).write_bytes(content)
    (root / "link.png").symlink_to(outside)  # a link out of the folder is followed: data sets often live elsewhere
    (root / "nowhere.png").symlink_to(tmp_path / "gone")
    (root / "circle.png").symlink_to(root / "circle.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    refused = {"nowhere.png": "a link that leads nowhere", "circle.png": "Too many levels", "pipe.png": "not a regular file", "folder.png": "not a regular file",
               "gone.png": "no such file", "y" * 300 + ".png": "File name too long", "a/" * 3000 + "b.png": "File name too long", "nul\0.png": "null"}
    start = time.monotonic()
    inventory = take_inventory(root, [*readable, "link.png", *refused], cache_dir=tmp_path / "cache").set_index("path").error
    assert all(inventory[name] is None for name in [*readable, "link.png"])
    for name, reason in refused.items():
        assert reason in inventory[name], (name[:20], inventory[name])
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_image(root / name)
    assert time.monotonic() - start < 5  # nobody waited at the pipe


def test_inventory_remembers(toy, monkeypatch):
    config, table = toy
    root, cache = data_root(config), data_root(config).parent / "cache"
    seen, examine = [], images._examine
    monkeypatch.setattr(images, "_examine", lambda root, path: seen.append(path) or examine(root, path))
    first = take_inventory(root, table.path, cache_dir=cache)
    assert sorted(seen) == sorted(table.path) and first.path.tolist() == table.path.tolist()
    assert (first.width.unique().tolist(), first.height.unique().tolist(), first.bytes.min() > 0) == ([40], [30], True)
    seen.clear()
    os.utime(root / table.path[2])  # touched, with the same content: hashed, not decoded
    again = take_inventory(root, table.path, cache_dir=cache)
    assert not seen and again.drop(columns="mtime_ns").equals(first.drop(columns="mtime_ns")) and again.mtime_ns[2] != first.mtime_ns[2]
    Image.new("RGB", (3, 3)).save(root / table.path[4])
    assert take_inventory(root, table.path, cache_dir=cache).width[4] == 3 and seen == [table.path[4]]
    seen.clear()
    notes = next(cache.iterdir())
    notes.write_text(notes.read_text()[:-50])  # cut short: not believed
    take_inventory(root, table.path[:3], cache_dir=cache)
    assert len(seen) == 3


def test_fault_27_images_in_train_and_test_are_counted(toy):
    config, table = toy
    root = data_root(config)
    for k in range(3):  # three copied files
        shutil.copy(root / f"train/gull/{k}.png", root / f"test/wren/{k}.png")
    PHOTO.save(root / "train/wren/0.png")  # and one picture saved anew: another format, size and contrast
    PHOTO.resize((100, 80)).point(lambda level: level * 3 // 4 + 30).save(root / "test/gull/0.png", "JPEG", quality=60)
    for split, kind in (("train", "PNG"), ("test", "BMP")):  # not counted: two pictures of one colour, two damaged files
        Image.new("RGB", (20, 20), "white").save(root / split / "gull/3.png", kind)
        (root / split / "wren/3.png").write_bytes(b"")
    pairs = overlap(table, take_inventory(root, table.path))
    assert pairs.kind.value_counts().to_dict() == {"same file": 3, "same picture": 1}
    assert pairs.values.tolist()[:2] == [["train/gull/0.png", "test/wren/0.png", "same file", 0], ["train/gull/1.png", "test/wren/1.png", "same file", 0]]
    assert pairs.iloc[3].tolist()[:2] == ["train/wren/0.png", "test/gull/0.png"] and 0 < pairs.bits[3] <= images.NEAR


def test_fault_27_fingerprints_of_different_pictures_are_far_apart():
    """Birds of the same species on other backgrounds, and small figures on an even one, are not the same picture."""
    from ctrlscam.synthetic import draw_bird
    birds = [images._fingerprint(Image.fromarray(draw_bird(0, "train", 25 * k, size=64).image)) for k in range(60)]
    i, j, _ = images._near_pairs(birds[:30], birds[30:])
    assert len(i) == 0
    plain = []
    for k in range(40):
        picture = np.full((64, 64, 3), 240, dtype=np.uint8)
        y, x = RNG.integers(0, 52, 2)
        picture[y:y + 12, x:x + 12] = noise(12, 12, 3)
        plain.append(images._fingerprint(Image.fromarray(picture)))
    i, j, _ = images._near_pairs(plain[:20], plain[20:])
    assert len(i) == 0
    assert images._near_pairs(plain[:5], plain[:5])[0].tolist() == [0, 1, 2, 3, 4]


def reference(config, path):
    return np.asarray(Image.open(data_root(config) / path).convert("RGB").resize((37, 37), Image.Resampling.BILINEAR))


def test_copy_equals_the_files_for_any_number_of_threads(toy, monkeypatch):
    config, table = toy
    contents = []
    for workers in (1, 4):
        monkeypatch.setattr(os, "cpu_count", lambda: workers)
        pictures = open_pictures(table, config)
        assert isinstance(pictures, np.memmap) and not pictures.flags.writeable
        contents.append(Path(pictures.filename).read_bytes())
        shutil.rmtree(data_root(config).parent / "cache")
    assert contents[0] == contents[1]
    for row, path in enumerate(table.path):
        assert np.array_equal(pictures[row], reference(config, path))
    bicubic = open_pictures(table, config.replace(augment="deit", resize_to=50))
    assert np.array_equal(bicubic[0], np.asarray(Image.open(data_root(config) / table.path[0]).resize((50, 50), Image.Resampling.BICUBIC)))
    index = json.loads(index_of(config).read_text())
    assert (index["side"], index["interpolation"], len(index["rows"])) == (50, "bicubic", 16)
    assert index["checksums"][0] == zlib.crc32(bicubic[0].tobytes()) and set(index["rows"][0]) == {"path", "bytes", "mtime_ns", "sha256"}


def test_copy_follows_its_sources(toy, monkeypatch):
    config, table = toy
    open_pictures(table, config)
    build, built = images._build_copy, []
    monkeypatch.setattr(images, "_build_copy", lambda copy, *rest: built.append(copy) or build(copy, *rest))
    before = cached(config, "")
    file = data_root(config) / table.path[6]
    os.utime(file, ns=(1, 1))  # another time, the same content
    open_pictures(table, config)
    open_pictures(table, config)
    assert not built and cached(config, "") == before
    facts = file.stat()
    Image.fromarray(noise(30, 40, 3)).save(file)
    assert np.array_equal(open_pictures(table, config)[6], reference(config, table.path[6])) and len(built) == 1
    Image.fromarray(noise(31, 40, 3)).save(file)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the old time, another size
    assert np.array_equal(open_pictures(table, config)[6], reference(config, table.path[6])) and len(built) == 2
    assert len(cached(config, ".npy")) == 1 and len(cached(config, "")) == len(before)  # older copies of the same rows are gone


def flip(file, place):
    with open(file, "r+b") as array:
        array.seek(place)
        byte = array.read(1)[0]
        array.seek(place)
        array.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("harm", ["cut", "longer", "emptied", "gone", "header", "sampled row"])
def test_harmed_copy_is_noticed_and_built_anew(harm, toy):
    config, table = toy
    pictures = open_pictures(table, config)
    file = Path(pictures.filename)
    whole = file.read_bytes()
    if harm == "gone":
        file.unlink()
    elif harm in ("header", "sampled row"):
        flip(file, 20 if harm == "header" else 128 + 5000)
    else:
        with open(file, "r+b") as array:
            array.truncate({"cut": len(whole) - 1, "longer": len(whole) + 1, "emptied": 0}[harm])
    with pytest.warns(UserWarning, match="missing, cut short or altered"):
        open_pictures(table, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Path(open_pictures(table, config).filename).read_bytes() == whole


def test_verify_finds_a_bit_that_the_sample_misses(tmp_path):
    config = Settings(dataset=f"folder:{toy_set(tmp_path / 'set', count=10)}", data_dir=str(tmp_path), image_size=32, validation_share=0.25, recipe="synthbirds")
    table = load_table(config)
    with pytest.raises(DataError, match="no copy"):
        verify_copy(table, config)
    pictures = open_pictures(table, config)
    assert len(table) > images.SAMPLE and verify_copy(table, config) == []
    missed = next(row for row in range(len(table)) if row not in np.linspace(0, len(table) - 1, images.SAMPLE, dtype=int))
    flip(pictures.filename, 128 + missed * 3 * 37**2 + 99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_pictures(table, config)  # not in the sample
    assert verify_copy(table, config) == [table.path[missed]]
    assert np.array_equal(open_pictures(table, config)[missed], reference(config, table.path[missed]))
    assert verify_copy(table, config) == []


def test_index_is_what_counts(toy):
    config, table = toy
    open_pictures(table, config)
    index = index_of(config)
    text = index.read_text()
    for spoilt in (text[:-20], "[]", text.replace('"side": 37', '"side": 38'), text.replace('"version": 1', '"version": 0'), text.replace('"pillow": "', '"pillow": "0.')):
        index.write_text(spoilt)
        assert np.array_equal(open_pictures(table, config)[3], reference(config, table.path[3]))
        assert index.read_text() == text
    header = cached(config, ".npy")[0].read_bytes()[:128]
    assert header.startswith(b"\x93NUMPY\x01\x00") and b"'descr': '|u1'" in header  # plain bytes, no pickled objects


SLOW = """
import sys, time
from ctrlscam import images
from ctrlscam.config import Settings
from ctrlscam.data import load_table
store = images._store
images._store = lambda *arguments: (time.sleep(float(sys.argv[3])), store(*arguments))[1]
config = Settings(dataset=f"folder:{sys.argv[1]}", data_dir=sys.argv[2], image_size=32, validation_share=0.25, recipe="synthbirds")
print("building", flush=True)
images.open_pictures(load_table(config), config)
"""


def building(config, pause):
    words = [sys.executable, "-c", SLOW, str(data_root(config)), str(data_root(config).parent), str(pause)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_killed_build_leaves_nothing_that_counts(toy):
    config, table = toy
    folder = data_root(config).parent / "cache"
    process, deadline = building(config, 0.3), time.monotonic() + 60
    while not [part for part in folder.glob(".*.part") if part.stat().st_size > 128]:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = list(folder.iterdir())
    assert len(left) == 1 and left[0].suffix == ".part"
    pictures = open_pictures(table, config)
    assert all(np.array_equal(pictures[row], reference(config, path)) for row, path in enumerate(table.path))
    assert left[0].exists()  # it might be that of a build under way
    os.utime(left[0], (0, 0))
    Image.fromarray(noise(30, 40, 3)).save(data_root(config) / table.path[0])
    open_pictures(table, config)
    assert not left[0].exists()


def test_two_builds_at_once(toy):
    config, table = toy
    processes = [building(config, 0.05) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda _: open_pictures(table, config), range(2)))
    for process in processes:
        said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert opened[0].filename == opened[1].filename
    for pictures in (*opened, open_pictures(table, config)):
        assert all(np.array_equal(pictures[row], reference(config, path)) for row, path in enumerate(table.path))
    assert len(cached(config, ".npy")) == 1 and not list((data_root(config).parent / "cache").glob(".*")) and verify_copy(table, config) == []


def test_full_disk(toy, monkeypatch):
    config, table = toy
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 65_000, 65_000))
        with pytest.raises(DataError, match="needs 65,840 bytes, 65,000 are free.*cache_gigabytes 0"):
            open_pictures(table, config)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # the disk fills up half-way
        patch.setattr(images, "_store", no_room)
        with pytest.raises(DataError, match="cannot be written: .*No space left.*cache_gigabytes 0"):
            open_pictures(table, config)
    assert not list((data_root(config).parent / "cache").iterdir())
    assert len(open_pictures(table, config.replace(cache_gigabytes=0))) == 16


def test_joint_set_and_sizes(tmp_path):
    """A joint set is read through paths that start with the part's folder."""
    import pandas as pd
    for name, shape in (("CUB_200_2011", (10, 20, 3)), ("stanford_dogs", (30, 10, 3))):
        (tmp_path / name).mkdir()
        Image.fromarray(noise(*shape)).save(tmp_path / name / "a.png")
    table = pd.DataFrame(dict(path=["CUB_200_2011/a.png", "stanford_dogs/a.png"]))
    config = Settings(dataset="cub200+standog", data_dir=str(tmp_path), image_size=32, recipe="small")
    pictures = open_pictures(table, config)
    assert np.array_equal(pictures[1], np.asarray(Image.open(tmp_path / table.path[1]).resize((37, 37), Image.Resampling.BILINEAR)))
    assert image_sizes(table, config).tolist() == [[20, 10], [10, 30]]


def test_grey_images_of_cub():
    """The two greyscale images among the first 50 classes of CUB-200-2011, on which the original code fails."""
    root = ROOT / "data" / "CUB_200_2011"
    names = ["009.Brewer_Blackbird/Brewer_Blackbird_0028_2682.jpg", "025.Pelagic_Cormorant/Pelagic_Cormorant_0022_23802.jpg"]
    if not all((root / "images" / name).is_file() for name in names):
        pytest.skip("data/CUB_200_2011 is not there; data/README.md says how to get it")
    for name in names:
        with Image.open(root / "images" / name) as image:
            assert image.mode == "L"
        picture = decode_image(root / "images" / name)
        assert picture.ndim == 3 and picture.shape[2] == 3 and (picture.max(2) == picture.min(2)).all() and picture.std() > 20
