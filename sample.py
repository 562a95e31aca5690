"""Draws pictures with a trained LiquidFlow model.

    python sample.py                                          newest run below runs/ -> samples.png
    python sample.py --n 16 --sampler heun --steps 25         fewer, better steps
    python sample.py --gif path.gif                           also the way from noise to picture
    python sample.py --label star --cfg 3                     what it is asked for, after --labels
    python sample.py --evaluate 512                           how far samples are from real pictures
    python sample.py --gates gates.png                        what the liquid layers do meanwhile
    python sample.py --reconstruct a.jpg b.png                what an autoencoder does to pictures
    python sample.py --export model.onnx                      the model, for other programs

The checkpoint holds the model's shape, its process, and the averaged weights, which are the ones
that are sampled from; a model of latents needs its autoencoder's files, too. Same seed, same
machine: same pictures.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import io
import math
import time
import warnings
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import liquidflow as lf
import train

EXPORT_GAP = 1e-3    # the largest error of an exported model that is let through

def trusted(path, state, args, name):
    """A folder that a checkpoint remembers is followed only inside its own one, or if typed."""
    remembered = state["args"].get(name)
    if remembered and getattr(args, name) is None:
        if not Path(remembered).resolve().is_relative_to(Path(path).resolve().parent):
            raise train.Refused(f"{path} was trained with --{name} {remembered}: give --{name}, "
                                "that folder if you trust it, or another one")
        setattr(args, name, remembered)

def newest_checkpoint(folder="runs"):
    """The ckpt.pt below a folder that was written last. FileNotFoundError if there is none."""
    found = sorted(Path(folder).rglob("ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"there is no checkpoint below {folder}/: run python train.py "
                                "first, or give --ckpt")
    return found[-1]

def load_model(path, device):
    """(model with the averaged weights, its process, the whole state) of a checkpoint.

    ValueError or FileNotFoundError, naming the file, where it is missing, damaged, of another
    version, or not a run's checkpoint at all.
    """
    state = train.load_state(path)
    train.check_fits(path, state)
    model = lf.create_model(**state["config"])
    model.load_state_dict(state["ema"])
    return model.to(device).eval(), lf.PROCESSES[state["process"]](), state

def draw_noise(n, shape, seed):
    """(n, *shape) normal noise; picture i gets the same noise however many are drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(n)])

def wanted(args, classes, data):
    """What to draw, (n,) numbers of classes, and how many of them make a row of the grid.

    A row of each --label, or of every class; None, where a square grid is better. For --evaluate
    as many of each class as there are among the held-out pictures of data. ValueError for a class
    that there is not.
    """
    if data:
        held_out = data.held_out[:args.evaluate]
        return data.labels[held_out.to(data.labels.device)], None
    numbers = {str(i): i for i in range(len(classes))}
    numbers.update({normalize("NFC", name): i for i, name in enumerate(classes)})    # go first
    args.label, classes = ([normalize("NFC", name) for name in names or []]
                           for names in (args.label, classes))
    for name in args.label:
        if name not in numbers:
            raise train.Refused(f"--label {name}: this model knows {', '.join(classes)}")
    rows = [numbers[name] for name in args.label or classes[:args.n]]
    each = math.ceil(args.n / len(rows))
    return torch.tensor(rows).repeat_interleave(each), each if min(len(rows), each) > 1 else None

def draw(model, process, sampler, noise, y, args, picture_of, watch):
    """The pictures (n, 3, H, W) that noise (n, C, h, w) leads to, --batch_size of them at a time.

    y: their labels (n,), or None; sampler: with its options, but for steps and labels; picture_of:
    makes pictures of what the model drew; watch(step, x_t, x0_hat): called in every step.
    """
    parts, pictures = noise.split(args.batch_size), []
    labels = [None] * len(parts) if y is None else y.split(args.batch_size)
    progress = train.Progress("step", args.steps * len(parts))
    # Picture i gets fresh noise of its own, other than draw_noise's, however many are drawn
    fresh = [torch.Generator().manual_seed(int(np.random.SeedSequence([args.seed, i])
                                               .generate_state(1)[0])) for i in range(len(noise))]
    for i, (part, told) in enumerate(zip(parts, labels)):
        def report(step, x_t, x0_hat, before=i * args.steps):
            progress(before + step + 1)
            watch(step, x_t, x0_hat)

        more = {"generator": fresh[i * args.batch_size:][:len(part)]} if args.eta else {}
        drawn = sampler(model, process, part, args.steps, told, callback=report, **more)
        pictures.append(picture_of(drawn))
    return torch.cat(pictures)

def reconstruct(args, device):
    """Encodes and decodes pictures: a grid of before and after, and how near they are.

    What an autoencoder loses here, no latent model can give back: the first thing to look at when
    its pictures look bad.
    """
    size = args.image_size or 128
    taesd = train.load_taesd(args.latents or "taesd", args.taesd_dir, device)
    rows, total = [], 0.0
    for path in args.reconstruct:
        try:
            picture = train.fit_picture(train.open_picture(Path(path).read_bytes()), size)
        except Exception as error:    # noqa: BLE001 - decoders fail in many ways
            raise train.Refused(f"{path}: not a picture that can be read ({error})") from None
        before = train.scaled(picture)[None]                                   # (1, 3, H, W)
        with torch.no_grad(), train.user_data():
            after = taesd.decode(taesd.encode(before.to(device))).cpu()
        psnr = -10 * math.log10(max((after - before).square().mean().item() / 4, 1e-10))
        train.say(f"{path}: PSNR {psnr:.1f} dB at {size}x{size}")
        rows, total = [*rows, before, after], total + psnr
    train.say(f"mean PSNR of {len(args.reconstruct)}: {total / len(args.reconstruct):.1f} dB")
    grid = train.grid_picture(torch.cat(rows), 2 * math.ceil(math.sqrt(len(args.reconstruct) / 2)))
    lf.write_whole(args.out, lambda file: grid.save(file, "PNG"))
    train.say(f"{args.out}: pairs of before and after")

# ------------------------------------------------------------------------------------------------
# Quality by numbers: how far samples are from pictures that were held out of the training. Each
# distance compares two sets of n pictures, (n, 3, H, W) from 0 to 255, and needs no network that
# was trained on anything. Two handfuls of one data set differ, too: what is to be expected of real
# pictures is measured beside it, with n training pictures in place of the samples.
# ------------------------------------------------------------------------------------------------

def fixed_normal(*shape):
    """Normal numbers that are the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(train.TEST_SEED))

def wasserstein(a, b):
    """How far the numbers of a must move to become those of b, on average: (n, d) each -> a number.

    The 1-D Wasserstein distance of each column, averaged: sorted, the i-th moves to the i-th.
    """
    return (a.sort(0).values - b.sort(0).values).abs().mean().item()

def sliced(a, b, directions=128):
    """The same for vectors, (n, d) each: as seen along fixed random directions, averaged."""
    along = F.normalize(fixed_normal(a.shape[1], directions), dim=0)                 # (d, 128)
    return wasserstein(a @ along, b @ along)

def spectrum(pictures):
    """The power of waves of k periods across the shorter side, in decibels: (n, 3, H, W) -> (K,).

    k = 1 ... K, half that side; a mean over all directions, colours and pictures.
    """
    height, width = pictures.shape[2:]
    power = sum(torch.fft.fft2(part).abs().square().sum((0, 1)) for part in pictures.split(64))
    power = power / pictures.numel() + 0.01    # (H, W); with less than what rounding to 8 bits adds
    k = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)) * min(
        height, width)
    return torch.stack([10 * power[k.round() == i].mean().log10()
                        for i in range(1, min(height, width) // 2 + 1)])

def random_features(pictures):
    """What a fixed network of random weights makes of pictures: (n, 3, H, W) -> (n, 224).

    Three layers of random filters; the first ones sum to 0, since brightness would outshine edges.
    The mean of each channel tells what there is and not where. That random filters know textures:
    Ustyuzhaninov et al. (2016), "Texture Synthesis Using Shallow Convolutional Networks ...".
    """
    each = torch.Generator().manual_seed(train.TEST_SEED)    # other numbers for every layer
    weights = [torch.randn(wide, narrow, 3, 3, generator=each) * math.sqrt(2 / (9 * narrow))
               for narrow, wide in ((3, 32), (32, 64), (64, 128))]
    weights[0] -= weights[0].mean((2, 3), keepdim=True)
    features = []
    for x in pictures.split(64):
        means = []
        for weight in weights:
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")    # 0 would make an edge at the border
            x = F.relu(F.conv2d(x, weight, stride=2))               # (64, 32, H/2, W/2) ...
            means.append(x.mean((2, 3)))
        features.append(torch.cat(means, 1))
    return torch.cat(features)

def variation(pictures):
    """The total variation of each picture: (n, 3, H, W) -> (n, 1)."""
    return torch.cat([lf.total_variation(part) for part in pictures.split(64)])[:, None]

# name -> (distance(p, q) -> a number, what it sees). One works on pictures, or on a channel, at a
# time, since both sets together are gigabytes: 512 pictures of 512 px take 1.6
DISTANCES = {
    "spectrum (dB)": (lambda p, q: (spectrum(p) - spectrum(q)).abs().mean().item(),
                      "how strong waves of each length are, in decibels"),
    "colours": (lambda p, q: sum(wasserstein(p[:, i].reshape(-1, 1), q[:, i].reshape(-1, 1))
                                 for i in range(3)) / 3,
                "how often there is each shade of red, green, blue"),
    "total variation": (lambda p, q: wasserstein(variation(p), variation(q)),
                        "how many pictures are smooth, how many busy"),
    "pixels, sliced": (lambda p, q: sliced(p.flatten(1), q.flatten(1)),
                       "where in a picture it is light or dark"),
    "features, sliced": (lambda p, q: sliced(random_features(p), random_features(q)),
                         "edges and textures, by random filters (its own unit)"),
}
DRAWS = 8           # sets of real pictures that are compared, to see how much that varies; fewer
NUMBERS = 2**26     # (but two) where they would have more numbers than this, as all are sorted

def nearest(pictures, data, indices):
    """How far pictures (n, 3, H, W) are from the nearest of data[indices], mirrored or not: (n,),
    root mean square.

    A batch of the data at a time. |x - y|^2 = |x|^2 + |y|^2 - 2 xy finds the nearest by a matrix
    product; as a difference of large numbers it is not exact, so the distance is computed anew.
    """
    x = pictures.flatten(1)                                                          # (n, d)
    order = indices.split(max(8, 2**21 // x.shape[1]))    # 8 MiB of pictures at a time
    best, which = x.new_full((len(x),), math.inf), torch.zeros(len(x), dtype=torch.long)
    progress, done = train.Progress("comparing", len(indices)), 0
    for part in order:
        upright = data[part]
        for y, index in (upright, part), (upright.flip(3), part + len(data)):
            y = y.flatten(1)                                                         # (B, d)
            values, places = (y.square().sum(1) - 2 * (x @ y.T)).min(1)              # (n,) each
            closer = values < best
            best = torch.where(closer, values, best)
            which = torch.where(closer.cpu(), index[places.cpu()], which)
        done += len(part)
        progress(done)
    return torch.cat([(some - data[i].flatten(1)).square().mean(1).sqrt()
                      for some, i in zip(x.split(64), which.split(64))])

def data_of(path, state, args, device):
    """The data set that the run of a checkpoint was trained on, from what that remembers.

    ValueError if it is not there any more, has changed, or has fewer than --evaluate held-out
    pictures.
    """
    old = argparse.Namespace(**{"max_images": None, "seed": 0, "split": "order", **state["args"]})
    old.image_size = state["config"]["image_size"] * (8 if state["latents"] else 1)
    held_out = len(train.split(torch.arange(state["pictures"]))[1])
    if args.evaluate > held_out:
        raise train.Refused(f"--evaluate {args.evaluate}: the run has {held_out} held-out pictures "
                            "to compare with, and as many samples are drawn")
    trusted(path, state, args, "data_dir")
    old.data_dir, old.out = args.data_dir, Path(path).parent
    if old.data_dir and not Path(old.data_dir).is_dir():
        raise train.Refused(f"there is no folder {old.data_dir}: tell with --data_dir where the "
                            "pictures lie that the run was trained on")
    data = train.DATASETS[old.dataset](old, device)
    train.check_same_pictures(state, data)
    return data

def draws_of_real(data, n, told, most=DRAWS):
    """(n held-out indices, [n training indices, ...], whether they have the same classes): `most`
    draws or fewer. Where a model was told labels each draw has as many of a class as the held-out
    pictures, whose labels its samples were asked for by, if there are so many.
    """
    held_out, training = data.held_out[:n], data.training
    kind = data.labels.cpu() if told else torch.zeros(len(data), dtype=torch.long)
    pools = [(training[kind[training] == k], (kind[held_out] == k).sum().item())
             for k in kind[held_out].unique()]
    draws = min([most] + [len(pool) // count for pool, count in pools])
    if not draws:
        return *draws_of_real(data, n, False, most)[:2], False
    return held_out, [torch.cat([pool[i * count:(i + 1) * count] for pool, count in pools])
                      for i in range(draws)], True

def evaluate(samples, data, device, told=False, coded=None):
    """Prints how far samples (n, 3, H, W) are from n held-out pictures, and how far as many real
    ones are. told: the model was told labels. coded: what its autoencoder makes of pictures, for a
    model of latents: what is lost before that begins.
    """
    most = min(DRAWS, max(2, NUMBERS // samples.numel()))
    held_out, draws, alike = draws_of_real(data, len(samples), told, most)

    def pictures(indices):
        return torch.cat([data[part].cpu() for part in indices.split(64)])

    def distances(some):
        """From the held-out ones; some becomes shades, in place, as it is large."""
        some.clamp_(-1, 1).add_(1).mul_(127.5)
        return [distance(some, real) for distance, _ in DISTANCES.values()]

    both = torch.cat([samples.clamp(-1, 1), pictures(held_out)])                 # (2 n, 3, H, W)
    near = nearest(both.to(device), data, data.training).view(2, -1) * 127.5
    real = both[len(samples):].add_(1).mul_(127.5)
    columns = {"samples": distances(both[:len(samples)])}
    if coded:
        columns["coded"] = distances(coded(pictures(draws[0])))
    others = torch.tensor([distances(pictures(draw)) for draw in draws])          # (draws, rows)
    columns["real"] = others.mean(0).tolist()
    drawn, spread = "one draw", [""] * len(DISTANCES)
    if len(draws) > 1:
        drawn = f"mean and deviation of {len(draws)} draws"
        spread = [f"± {deviation:.2f}" for deviation in others.std(0).tolist()]
    train.say(f"{len(real)} samples beside {len(real)} held-out pictures; real: as many training "
              f"pictures, {drawn}{'' if alike else ', of other classes'}\n{'in shades of 255':<18}"
              f"{''.join(f'{name:>9}' for name in columns)}{'':12}what it sees")
    for (name, (_, sees)), values, deviation in zip(
            DISTANCES.items(), zip(*columns.values()), spread, strict=True):
        train.say(f"{name:<18}{''.join(f'{v:9.2f}' for v in values)} {deviation:<8}   {sees}")
    gap = " " * 9 if coded else ""
    for name, share, sees in (
            ("nearest training", 0.5, "copies, mirrored or not, if far below real ones (held out)"),
            ("nearest, 1 in 20", 0.05, "the same, if only few are copies")):
        ours, theirs = near.quantile(share, 1).tolist()
        train.say(f"{name:<18}{ours:9.2f}{gap}{theirs:9.2f}{'':12}{sees}")

# ------------------------------------------------------------------------------------------------
# What the gates do
# ------------------------------------------------------------------------------------------------

class Gates:
    """While it is open, sees how far the CfC layers of a model open their gates as it draws.

    .layers  a short name -> each ParallelCfC, in the model's order
    .latest  name -> of the latest pass, the gate (B, H, W) and alpha (B,), means over channels, and
             the gate of the first 16 channels (B, 16), means over places
    .means   for each step, of each batch: the mean gate and alpha, (2, layers, B)
    .single  for each step, of each batch: for each layer those 16 channels (B, 16)
    .maps    for six steps or fewer: for each layer the gate (H, W) of the first picture
    .guesses for the same steps: x0_hat of that picture, (3, H, W)
    """

    def __init__(self, model, steps):
        self.layers = {}
        for name, module in model.named_modules():
            if isinstance(module, lf.ParallelCfC):    # blocks.0.cfc_in.cfc is called block 0 in
                name = name.replace("blocks", "block").replace(".cfc_", " ").replace(".cfc", "")
                self.layers[name.replace(".", " ", 1)] = module
        if not self.layers:
            raise train.Refused("--gates: this model has no CfC, and so no gates")
        self.moments = sorted({round(i * (steps - 1) / 5) for i in range(6)})
        self.latest, self.maps, self.guesses = {}, {}, {}
        self.means, self.single = ([[] for _ in range(steps)] for _ in range(2))

    def __enter__(self):
        self.hooks = [module.register_forward_pre_hook(functools.partial(self.look, name))
                      for name, module in self.layers.items()]
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def look(self, name, module, inputs):
        """The hook of a layer: called with its inputs (x, c) before every pass."""
        gate, alpha = module.gates(*inputs)
        self.latest[name] = gate.mean(1), alpha.mean((1, 2, 3)), gate[:, :16].mean((2, 3))

    def note(self, step, x0_hat, picture_of):
        """Keeps what the pass of this step showed.

        A guided pass has the pictures twice, without and with their labels: the latter count.
        """
        n = len(x0_hat)
        shown = [[value[-n:].cpu() for value in self.latest[name]] for name in self.layers]
        gates, alphas, single = zip(*shown)         # of each layer (n, H, W), (n,), (n, 16)
        gate = torch.stack([gate.mean((1, 2)) for gate in gates])                # (layers, n)
        self.means[step].append(torch.stack([gate, torch.stack(alphas)]))
        self.single[step].append(single)
        if step in self.moments and step not in self.maps:
            self.maps[step] = [gate[0].numpy() for gate in gates]
            self.guesses[step] = picture_of(x0_hat[:1])[0]

HEAT = [(13, 8, 65), (122, 28, 109), (237, 105, 37), (252, 255, 164)]    # from dark to bright
BLUE, PALE, SINGLE = "#1f6fb4", "#a9cbe6", "#98a6b0"
ORANGE, GREY, LIGHT = "#e07b28", "#555555", "#e4e4e4"

def heat(values):
    """(H, W) numbers from 0 to 1 -> the same as colours, a PIL picture."""
    colours = np.transpose([np.interp(values, np.linspace(0, 1, len(HEAT)), channel)
                            for channel in zip(*HEAT)], (1, 2, 0))
    return Image.fromarray(colours.round().astype(np.uint8))

def curves(times, means, single, marks, width, height):
    """One layer's chart, a PIL picture: the gate and alpha, from 0 to 1, over t from 1 to 0.

    times (steps,); means (2, steps, n), of the gate and alpha; single (steps, 16), the gate of
    single channels; marks: times that get an upright line.
    """
    chart = Image.new("RGB", (4 * width, 4 * height), "white")    # shrunk below: smooth lines
    pen = ImageDraw.Draw(chart)

    def at(t, value):
        return (1 - t) * chart.width, (1 - value) * chart.height

    def points(values):
        return [at(t, value) for t, value in zip(times, values.tolist())]

    (gate, alpha), spread = means.mean(2), means[0].std(1, correction=0)         # (steps,) each
    for t in marks:
        pen.line([at(t, 0), at(t, 1)], LIGHT, 4)
    for channel in single.T:
        pen.line(points(channel), SINGLE, 3)
    if len(times) > 1:
        pen.polygon(points(gate + spread) + points(gate - spread)[::-1], PALE)
    pen.line(points(alpha), ORANGE, 6)
    pen.line(points(gate), BLUE, 8)
    chart = chart.resize((width, height), Image.Resampling.BOX)
    ImageDraw.Draw(chart).rectangle((0, 0, width - 1, height - 1), outline=GREY)
    return chart

def gates_picture(gates, times):
    """What Gates saw in a run over times (steps,), as a PIL picture.

    A row for each layer: its curves, and maps of the gate over one picture, which stands above
    them as it was guessed at that time. Each layer has its own scale of colours.
    """
    tile, gap, left, wide = 96, 8, 90, 240    # 96: a multiple of the sides of most grids
    names, marks = list(gates.layers), [times[moment] for moment in gates.moments]
    top, right = 24 + tile + gap, left + wide + 3 * gap
    edge = right + len(marks) * (tile + gap)
    page = Image.new("RGB", (edge + 60, top + len(names) * (tile + gap) + 24), "white")
    pen = ImageDraw.Draw(page)

    def write(x, y, text, share=0.0):
        """Black text; share: of its width that is to the left of x."""
        pen.text((x - share * pen.textlength(text), y), text, "black")

    write(left, 8, "How far the gates of the liquid layers open")
    write(left, 24, "while noise becomes a picture")
    pen.rectangle((left, 46, left + 24, 56), PALE)
    pen.line((left, 51, left + 24, 51), BLUE, 2)
    write(left + 32, 45, "gate: mean and deviation over pictures")
    pen.line((left, 69, left + 24, 69), SINGLE)
    write(left + 32, 63, "gate of single channels")
    pen.line((left, 87, left + 24, 87), ORANGE, 2)
    write(left + 32, 81, "alpha: share of the input that is kept")
    write(left, 103, "Maps: where the gate is open in the picture above")
    for i, moment in enumerate(gates.moments):
        x = right + i * (tile + gap)
        guess = train.grid_picture(gates.guesses[moment][None])
        page.paste(guess.resize((tile, tile), Image.Resampling.BOX), (x, 24))
        write(x + tile / 2, 8, f"t = {times[moment]:.2f}", 0.5)

    means = [torch.cat(parts, 2) for parts in gates.means]              # steps times (2, layers, n)
    means = torch.stack(means, 2)                                       # (2, layers, steps, n)
    single = [[torch.cat(parts).mean(0) for parts in zip(*batches)] for batches in gates.single]
    for row, name in enumerate(names):
        y = top + row * (tile + gap)
        write(left - 20, y + tile / 2 - 6, name, 1)
        write(left - 6, y - 2, "1", 1)
        write(left - 6, y + tile - 10, "0", 1)
        channels = torch.stack([layers[row] for layers in single])              # (steps, 16)
        page.paste(curves(times, means[:, row], channels, marks, wide, tile), (left, y))
        maps = np.stack([gates.maps[moment][row] for moment in gates.moments])      # (6, H, W)
        low, high = maps.min(), maps.max()
        for i, values in enumerate((maps - low) / max(high - low, 1e-6)):
            shown = heat(values).resize((tile, tile), Image.Resampling.BOX)
            page.paste(shown, (right + i * (tile + gap), y))
        scale = heat(np.linspace(1, 0, tile)[:, None])                          # (96, 1)
        page.paste(scale.resize((10, tile)), (edge + 8, y))
        write(edge + 24, y - 2, f"{high:.3f}")
        write(edge + 24, y + tile - 10, f"{low:.3f}")
    for t, text in (1, "t = 1: noise"), (0.5, "0.5"), (0, "0: picture"):
        write(left + (1 - t) * wide, page.height - 22, text, 1 - t)
    return page

# ------------------------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------------------------

class Decoder(torch.nn.Module):
    """decoded() as a module: latents as a model draws them, (B, C, h, w) -> (B, 3, 8 h, 8 w)."""

    def __init__(self, taesd, latents):
        super().__init__()
        self.taesd = taesd
        self.register_buffer("mean", latents["mean"])                          # (C, 1, 1)
        self.register_buffer("std", latents["std"])

    def forward(self, x):
        return self.taesd.decode(x * self.std + self.mean)

def packed(model, inputs, suffix):
    """A model as the bytes of a .pt2 or .onnx file, for 1 to 65,536 pictures at once.

    inputs: name -> an example for two.
    """
    batch = {0: torch.export.Dim("batch", min=1, max=2**16)}
    program = torch.export.export(model, tuple(inputs.values()),
                                  dynamic_shapes=tuple(batch for _ in inputs))
    for part in program.graph_module.modules():
        for node in part.graph.nodes:
            node.meta.pop("stack_trace", None)    # paths and source lines of this machine
    if suffix == ".pt2":
        file = io.BytesIO()
        torch.export.save(program, file)
        return file.getvalue()
    return torch.onnx.export(program, dynamo=True, input_names=list(inputs), verbose=False,
                             output_names=["output"]).model_proto.SerializeToString()

def unpacked(data, suffix):
    """The model in the bytes of such a file: a function from named tensors to a tensor."""
    if suffix == ".pt2":
        program = torch.export.load(io.BytesIO(data)).module()
        return lambda inputs: program(*inputs.values())
    session = importlib.import_module("onnxruntime").InferenceSession(
        data, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

@torch.no_grad()
def export(path, model, process, taesd, state):
    """Writes a model, and beside it the decoder of its latents, for programs without this code.

    path ends in .onnx or .pt2; state: the model's checkpoint. Before a file is written, what will
    be in it is read back and must answer as the model does, for 1 and for 5 pictures. ValueError if
    it does not, if torch is too old to export the model, or if a package of .onnx is missing.
    """
    suffix = path.suffix.lower()
    try:
        for name in ("onnx", "onnxscript", "onnxruntime") if suffix == ".onnx" else ():
            importlib.import_module(name)
    except ImportError as error:
        raise train.Refused(f"--export {path}: {error}; pip install onnx onnxscript onnxruntime, "
                            "or export a .pt2, which needs none of them") from None
    latents, classes = state["latents"], model.config["num_classes"]
    shape = model.config["in_channels"], *lf.sides(model.config["image_size"])

    def example(n):
        """Inputs for n pictures: noise, times from 1 down, labels up to the null class."""
        y = {"y": torch.arange(n) % (classes + 1)} if classes else {}
        return {"x": draw_noise(n, shape, 0), "t": torch.arange(n, 0, -1) / n, **y}

    parts = [(path, model, list(example(1)), process.predicts)]
    if latents:
        taesd.encoder = None    # its weights have no place in the file
        beside = path.with_stem(f"{path.stem}-decoder")
        parts.append((beside, Decoder(taesd, latents), ["x"], "pictures"))
    made = []
    for target, module, names, output in parts:
        traced, *others = ({name: example(n)[name] for name in names} for n in (2, 1, 5))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")    # by torch of torch; what counts is compared
                data = packed(module, traced, suffix)
                again = unpacked(data, suffix)
                gaps = [(again(v) - module(*v.values())).abs().max() for v in others]
        except Exception as error:    # noqa: BLE001 - exporters fail in many ways
            reason = str(error).strip().split("\n")[0]
            raise train.Refused(f"{target}: torch {torch.__version__} cannot export this model "
                                f"({type(error).__name__}: {reason}); a newer one may") from None
        gap = torch.stack(gaps).max().item()    # nan if one of them is
        if not gap <= EXPORT_GAP:
            raise train.Refused(f"{target}: not written: its answers are up to {gap:.1e} from the "
                                f"model's, and {EXPORT_GAP:.0e} is allowed")
        halves = 2 * sum(value.numel() for value in module.state_dict().values())
        line = (f"{target}: {', '.join(names)} -> {output}; {len(data) / 2**20:.2f} MiB in fp32, "
                f"its weights in fp16 would take {halves / 2**20:.2f} MiB; largest difference from "
                f"the model {gap:.1e}")
        made.append((target, data, line))
    for target, data, line in made:
        lf.write_whole(target, lambda file, data=data: file.write(data))
        train.say(line)
    if classes:
        known = (f"{i} {name}" for i, name in enumerate((*state["classes"], "any")))
        train.say(f"y: {', '.join(known)}")
    if process.predicts == "noise":
        limit = train.sampler_options(train.SAMPLER_OF["noise"], latents)["clip"]
        train.say(f"for DDIM: the largest |x0| that is believed is {limit:.4f}")

def parse_arguments(argv=None):
    """The command line; sampler and steps depend on the checkpoint and are filled in by run()."""
    parser = train.Parser("Draw pictures with a trained LiquidFlow model.")
    add = parser.add_argument
    add("--ckpt", help="a checkpoint; the newest below runs/ if not given")
    add("--n", type=train.number(int, 1), default=36,
        help="how many pictures; with labels rounded up, to rows of the same length")
    add("--batch_size", type=train.number(int, 1), default=64, help="how many at once")
    add("--steps", type=train.number(int, 1), default=50, help="more is better and slower")
    add("--sampler", choices=lf.SAMPLERS, help="euler for flows, ddim for diffusion if not given")
    add("--label", nargs="+", metavar="CLASS", help="what to draw, by name or number: a row of "
        "each; every class, if not given. For models that were trained with --labels")
    add("--cfg", type=train.number(float, 0), help="guidance: 0 ignores the label, 1 is the plain "
        "model, more exaggerates the class; 2 if not given, 1 for --evaluate")
    add("--eta", type=train.number(float, 0, 1), default=0.0, help="for ddim: fresh noise, 0 to 1")
    add("--seed", type=train.number(int, 0, 2**63 - 1), default=0, help="same seed, same pictures")
    add("--out", default="samples.png", help="where the grid goes")
    add("--gif", help="also write the path from noise to picture, as a GIF of 100 frames at most")
    add("--gates", help="also draw how far the gates of the liquid layers open, as a PNG")
    add("--evaluate", type=train.number(int, 1), metavar="N",
        help="draw N samples instead, measure how far they are from N held-out pictures, and show "
             "the first --n")
    add("--data_dir", help="where the pictures lie that were trained on, for --evaluate")
    add("--taesd_dir", help="folder of the autoencoder's files; downloaded if not given")
    add("--reconstruct", nargs="+", metavar="PICTURE",
        help="no samples: what an autoencoder alone does to these pictures")
    add("--export", metavar="FILE", help="no samples: the model for other programs, as an .onnx or "
                                         ".pt2 file; a decoder of latents goes beside it")
    add("--latents", choices=lf.TAESD_FILES, help="which autoencoder is to --reconstruct; taesd if "
                                               "not given")
    add("--image_size", type=train.number(int, 8), help="at which size; 128 if not given")
    add("--amp", choices=["auto", "off", "fp16", "bf16"], default="auto",
        help="half precision for the model; auto: on a GPU, what it is good at")
    add("--device", default="auto", help="cpu, cuda, mps, or the fastest there is")
    args = parser.parse_args(argv)
    if not args.reconstruct and (args.latents or args.image_size):
        parser.error("--latents and --image_size are for --reconstruct; a checkpoint has its own")
    if args.reconstruct and args.export:
        parser.error("--export needs a model, and --reconstruct has none")
    for mode, used in (("reconstruct", {"latents", "image_size", "taesd_dir", "out", "device"}),
                       ("export", {"ckpt", "taesd_dir", "device"})):
        given = [f"--{name}" for name, value in vars(args).items()
                 if name not in {mode, *used} and value != parser.get_default(name)]
        if getattr(args, mode) and given:
            parser.error(f"--{mode} draws no samples: leave out {', '.join(given)}")
    if args.evaluate and args.label:
        parser.error("--evaluate compares with pictures of all classes: leave out --label")
    if args.data_dir and not args.evaluate:
        parser.error("--data_dir is for --evaluate")
    return args

def run(argv):
    """Loads, samples, writes; says what and where."""
    args = parse_arguments(argv)
    for path, *suffixes in ((args.out, ".png"), (args.gif, ".gif"), (args.gates, ".png"),
                            (args.export, ".onnx", ".pt2")):
        if path is not None and (Path(path).suffix.lower() not in suffixes or Path(path).is_dir()
                                 or not Path(path).parent.is_dir()):
            raise train.Refused(f"{path!r}: give a file ending in {' or '.join(suffixes)}, in a "
                                "folder that exists")
    if args.gates and Path(args.gates).resolve() == Path(args.out).resolve():
        raise train.Refused(f"--gates {args.gates}: is where --out goes; give it another name")
    # What is exported is traced on the CPU: the file would remember a GPU
    device = train.pick_device("cpu" if args.export else args.device)
    if args.reconstruct:
        return reconstruct(args, device)
    path = args.ckpt or newest_checkpoint()
    model, process, state = load_model(path, device)
    latents = state["latents"]
    if args.taesd_dir and not latents:
        raise train.Refused(f"--taesd_dir is for models of latents; {path} draws pixels")
    if latents:
        trusted(path, state, args, "taesd_dir")
    taesd = train.load_taesd(latents["name"], args.taesd_dir, device) if latents else None
    if args.export:
        return export(Path(args.export), model, process, taesd, state)

    # On a GPU half precision is quicker; few numbers move by more than a grey level (README)
    model.forward = train.Precision(args.amp, device).autocast()(model.forward)

    def picture_of(x):
        """What the model drew -> pictures (n, 3, H, W) on the CPU."""
        return train.decoded(x, taesd, latents).cpu()

    name = args.sampler or train.SAMPLER_OF[process.predicts]
    with train.user_data():    # before anything is drawn: can it follow this process so finely?
        lf.walk(process, args.steps, lf.SAMPLERS[name].follows)
    options = train.sampler_options(name, latents)
    if args.eta:
        noisy = [name for name, draws in lf.SAMPLERS.items()
                 if "eta" in inspect.signature(draws).parameters]
        if name not in noisy:
            raise train.Refused(f"--eta {args.eta}: only --sampler {' or '.join(noisy)} draws "
                                f"fresh noise, not {name}")
        options["eta"] = args.eta

    classes = model.config["num_classes"]
    if not classes and (args.label or args.cfg is not None):
        raise train.Refused(f"{path}: knows no classes; --label and --cfg need a model that was "
                            "trained with --labels")
    data = data_of(path, state, args, device) if args.evaluate else None
    count, columns, y = args.evaluate or args.n, None, None
    if classes:
        y, columns = wanted(args, state["classes"], data)
        y, count, default = y.to(device), len(y), 1.0 if args.evaluate else 2.0
        options["cfg_scale"] = default if args.cfg is None else args.cfg
    shown = min(args.n, count) if args.evaluate else count
    shape = model.config["in_channels"], *lf.sides(model.config["image_size"])
    noise = draw_noise(count, shape, args.seed).to(device)
    train.say(f"{path}: {model.config['arch']} {model.config['variant']}, step "
              f"{state['step']}; {count} pictures in {args.steps} {name} steps on {device}")
    start = time.monotonic()
    moments = {round(i * (args.steps - 1) / 99) for i in range(100)}    # all steps, of 100 or fewer
    frames = {step: [] for step in sorted(moments)} if args.gif else {}
    sampler = functools.partial(lf.SAMPLERS[name], **options)
    with Gates(model, args.steps) if args.gates else contextlib.nullcontext() as gates:
        def watch(step, x_t, x0_hat):
            if step in frames and (missing := shown - sum(map(len, frames[step]))) > 0:
                frames[step].append(train.shades(picture_of(x_t[:missing])))
            if args.gates:
                gates.note(step, x0_hat, picture_of)

        pictures = draw(model, process, sampler, noise, y, args, picture_of, watch)

    grid = train.grid_picture(pictures[:shown], columns)
    lf.write_whole(args.out, lambda file: grid.save(file, "PNG"))
    seconds = time.monotonic() - start
    rate = count / max(seconds, 1e-9)
    train.say(f"{args.out}: {count} pictures in {train.duration(seconds)} ({rate:.1f} a second)")
    if args.gif:
        images = [train.grid_picture(train.scaled(torch.cat(frame)), columns)
                  for frame in frames.values()] + [grid]
        times = [max(20, 3000 // len(frames))] * len(frames) + [2000]    # ms; rest on the last
        lf.write_whole(args.gif, lambda file: images[0].save(
            file, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0))
        train.say(f"{args.gif}: the path from noise to picture, {len(images)} frames")
    if args.gates:
        page = gates_picture(gates, process.times(args.steps).tolist())
        lf.write_whole(args.gates, lambda file: page.save(file, "PNG"))
        train.say(f"{args.gates}: the gates of {len(gates.layers)} liquid layers")
    if args.evaluate:
        evaluate(pictures, data, device, bool(classes), taesd and (
            lambda x: torch.cat([taesd.decode(taesd.encode(part.to(device))).cpu()
                                 for part in x.split(8)])))

def main(argv=None):
    """Runs the command line."""
    train.guarded(run, argv, "a smaller --batch_size needs less")

if __name__ == "__main__":
    main()
