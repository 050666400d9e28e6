"""Images, from files or drawn here, as rows {"image": uint8 (C, H, W), "label": int64 ()}.

    glyphs, glyphs:fonts and others     drawn here from matplotlib's fonts (data/glyphs.py)
    landscapes                          drawn here, in colour (data/landscapes.py)
    a folder of folders                 one for each class; or train/ and val/ (or test/) with such folders
    a folder of images                  images without classes
    a folder of published files         MNIST's *-idx3-ubyte, also .gz; CIFAR-10's and CIFAR-100's .bin

Every image gets 8 bits, C channels, H x W pixels: an image from a folder is scaled so that it covers H x W,
and its middle is cut out. Folders are decoded once, to a memory map below --cache, with a manifest. An image
is turned as its EXIF orientation says. Transparency becomes white, CMYK becomes RGB, 16 bits become 8, and of
an animation the first frame is used; each of these is counted and printed. An image that cannot be read, or
has more pixels than Pillow's limit (it may be made to fill the memory), is refused, or left out with
--bad-text skip.

    python -m data.images FOLDER      decode a folder, and print what is in it

Shapes: N images, C channels, H x W pixels.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data import glyphs, landscapes, published_images
from data.class_folders import Kind, Part, existing_folder, fingerprint, print_contents, read
from data.rows import Dataset, Row, Rows
from formats import command

# Pillow goes by the content of a file, and would start other programs for some formats, such as EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
KIND = Kind("image", SUFFIXES, "glyphs", np.uint8)
VERSION = 2  # of the decoding, part of a cache's name: raise it where the same file gives other pixels


class ImageRows(Rows):
    """Images as rows {"image": uint8 (C, H, W), "label": int64 (), "augment": bool ()}.

    label: -1 where there are no classes. augment: true for images to learn from.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, augment: bool):
        super().__init__(images)
        self.labels, self.augment = labels, np.array(augment)

    def __getitem__(self, i: int) -> Row:
        i %= len(self.rows)
        image = np.array(self.rows[i])  # a copy: a memory map cannot be written to
        return {"image": image, "label": np.array(self.labels[i], np.int64), "augment": self.augment}


def prepare(
    data: str,
    size: tuple[int, int],
    cache: Path,
    *,
    channels: int | None = None,
    val: str | None = None,
    bad_images: str = "refuse",
    notify: Callable[[str], None] = print,
) -> Dataset:
    """Return the images that `data` names in one of the header's forms, to learn from and held out.

    size: height and width. channels: 1 or 3; None: those that the set has, 3 in folders. val: a folder of
    images to hold out; by default it is the set's own test part, or a tenth of each class. bad_images: "skip"
    leaves out what cannot be read, "refuse" raises ValueError. notify is called with one line of what was
    converted or left out. Raises ValueError for everything that a user can mend.
    """
    if min(size) < 1:
        raise ValueError(f"images of {size[0]} x {size[1]} pixels: expected at least 1 both ways")
    # Glyphs and landscapes are drawn, and published files hold arrays: all have a held-out part of their own.
    if data == "landscapes" or data.partition(":")[0] == "glyphs":
        if val is not None:
            raise ValueError(f"--val {val}: {data} has a held-out part of its own; leave out --val")
        parts, labels = landscape_parts() if data == "landscapes" else glyph_parts(data)
    else:
        folder = existing_folder(data, "--data", KIND)
        published = published_images.read(folder)
        # Other folders hold files of images, which are decoded once.
        if published is None:
            shape = (channels or 3, *size)
            made_from = {"version": VERSION, "shape": list(shape)}

            def decoded(path: Path, notes: Counter) -> np.ndarray:
                return decode(path, shape, notes)

            skip = bad_images == "skip"
            return as_dataset(*read(folder, val, KIND, made_from, decoded, cache, skip, notify))
        if val is not None:
            raise ValueError(f"--val {val}: {data} has a test part of its own; leave out --val")
        *parts, labels = published

    # Arrays are brought to the size that is needed.
    parts = [Part(fitted(images, size, channels), numbers) for images, numbers, *_ in parts]
    return as_dataset(*parts, labels)


def as_dataset(train: Part, val: Part, labels: Sequence[str]) -> Dataset:
    """Return two parts as a Dataset. labels: the names of the classes; none: there are no classes.

    Raises ValueError for a part without images, and for a label beyond the classes.
    """
    name = fingerprint(train, val, labels, KIND)
    C, H, W = train.arrays.shape[1:]
    kind = "grey" if C == 1 else "colour"
    classes = f", {len(labels)} classes" if labels else ""
    summary = f"{len(train.arrays):,} {kind} images of {H} x {W} to learn from, {len(val.arrays):,} held out"
    rows = ImageRows(train.arrays, train.labels, True), ImageRows(val.arrays, val.labels, False)
    return Dataset(name, None, *rows, summary=summary + classes, unit="images", labels=tuple(labels))


def glyph_parts(name: str) -> tuple[list[Part], list[str]]:
    """Return both parts of a set of glyphs, and the characters that are its classes."""
    sides = glyphs.choose(name)
    characters = list(dict.fromkeys(glyph.character for side in sides for glyph in side))
    number = {character: i for i, character in enumerate(characters)}
    labels = [np.array([number[glyph.character] for glyph in side]) for side in sides]
    return [Part(glyphs.pictures(side), of) for side, of in zip(sides, labels, strict=True)], characters


def landscape_parts() -> tuple[list[Part], list[str]]:
    """Return both parts of the landscapes, and the colours of their balls as classes."""
    counts = zip(landscapes.COUNTS, (False, True), strict=True)
    return [Part(*landscapes.pictures(n, held_out)) for n, held_out in counts], list(landscapes.BALLS)


# --- another size


def fitted(images: np.ndarray, size: tuple[int, int], channels: int | None) -> np.ndarray:
    """Return images, uint8 (N, C, H, W), brought to a size, (height, width), and a number of channels.

    Images that are smaller by at most a quarter of the new size get a border of zeros, as MNIST's of 28 x 28
    have in LeNet-5, which reads 32 x 32. Others are scaled to cover the size, and cut. Grey becomes colour by
    three equal channels. channels: 1, 3, or None for those that the images have.
    """
    C, H, W = images.shape[1:]
    missing = (size[0] - H, size[1] - W)
    if all(0 <= m <= s // 4 for m, s in zip(missing, size, strict=True)):
        around = [(m // 2, m - m // 2) for m in missing]
        images = np.pad(images, [(0, 0), (0, 0), *around]) if any(missing) else images
    else:
        images = np.stack([as_array(scaled(as_image(image), size)) for image in images])
    if channels is None or channels == C:
        return images
    if channels == 3:
        return images.repeat(3, axis=1)
    return np.stack([as_array(as_image(image).convert("L")) for image in images])


def as_image(array: np.ndarray):
    """Return an array, uint8 (1 or 3, H, W), as a Pillow image."""
    from PIL import Image

    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def as_array(image) -> np.ndarray:
    """Return a Pillow image, grey or colour, as an array uint8 (1 or 3, H, W)."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def scaled(image, size: tuple[int, int]):
    """Return the middle of a Pillow image that is scaled, without aliasing, to cover size (height, width)."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


def with_border(image, size: tuple[int, int]):
    """Return a Pillow image scaled to fit into size (height, width), with a border of its mean colour."""
    from PIL import Image, ImageOps, ImageStat

    mean = tuple(map(round, ImageStat.Stat(image).mean))
    return ImageOps.pad(image, (size[1], size[0]), Image.Resampling.BICUBIC, color=mean)


# --- decoding


def decode(path: Path, shape: tuple[int, int, int], notes: Counter, *, border: bool = False) -> np.ndarray:
    """Return an image file as uint8 (C, H, W), and count in notes what had to be converted.

    border: an image of another aspect ratio gets a border of its mean colour, instead of being cut.
    Raises ValueError for a file that is damaged, is no image, or has more pixels than Pillow's limit.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    # Above its limit Pillow warns, and above twice its limit it raises an error: here both end the reading.
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
                # An MPO is a camera's JPEG followed by its preview, not an animation.
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                    notes["animated (first frame used)"] += 1
                image.load()
                image = ImageOps.exif_transpose(image)
                image = converted(image, "L" if shape[0] == 1 else "RGB", notes)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise ValueError(f"{path}: cannot be opened ({error.strerror}); expected an image") from None
        except UnidentifiedImageError:
            raise ValueError(f"{path}: not an image; expected one of {', '.join(FORMATS)}") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            limit = f"at most {Image.MAX_IMAGE_PIXELS:,} are read, against files made to fill the memory"
            raise ValueError(f"{path}: {str(error).partition(',')[0]}: {limit}") from None
        except (OSError, SyntaxError, EOFError, ArithmeticError, LookupError) as error:
            raise ValueError(f"{path}: damaged or cut off ({error})") from None
        except ValueError as error:  # too much text beside the pixels, or a mode that Pillow cannot convert
            raise ValueError(f"{path}: {error}; save it anew, in RGB and without metadata") from None
    if image.height < shape[1] or image.width < shape[2]:
        notes[f"smaller than {shape[1]} x {shape[2]} (enlarged)"] += 1
    return as_array((with_border if border else scaled)(image, shape[1:])).copy()


def decode_all(paths: Sequence[Path], shape: tuple[int, int, int]) -> np.ndarray:
    """Return image files as uint8 (N, C, H, W), as `decode` does."""
    return np.stack([decode(path, shape, Counter()) for path in paths])


def converted(image, mode: str, notes: Counter):
    """Return a Pillow image of any mode as grey (mode "L") or "RGB", and count in notes what that took.

    Raises OSError for pixels that are no integers from 0 to 65535.
    """
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535 or image.mode == "F":
            raise OSError(f"pixels of mode {image.mode} between {values.min():g} and {values.max():g}")
        notes["of 16 bits (scaled to 8)"] += 1
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.has_transparency_data:
        notes["transparent (put on white)"] += 1
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    elif image.mode == "CMYK":
        notes["CMYK (converted)"] += 1
        image = image.convert("RGB")
    return image.convert(mode)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Decode images, and print what is in them.")
    add = parser.add_argument
    add("data", nargs="?", default="glyphs", help="images, as for train.py --data (default %(default)s)")
    add("--val", metavar="FOLDER", help="held-out images (default: a tenth of each class)")
    add("--size", type=int, default=32, help="height and width in pixels (default %(default)s)")
    add(
        "--cache",
        type=command.path,
        default=Path("cache"),
        help="folder for the pixels (default %(default)s)",
    )
    add(
        "--bad-text",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with a file that is no image (default %(default)s)",
    )
    args = parser.parse_args(argv)
    dataset = prepare(args.data, (args.size, args.size), args.cache, val=args.val, bad_images=args.bad_text)
    print_contents(dataset)


if __name__ == "__main__":
    command.run(main)
