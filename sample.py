"""Draws pictures with a trained LiquidFlow model.

    python sample.py                                          newest run below runs/ -> samples.png
    python sample.py --n 16 --sampler heun --steps 25         fewer, better steps
    python sample.py --gif path.gif                           also the way from noise to picture
    python sample.py --label star --cfg 3                     what it is asked for, after --labels
    python sample.py --reconstruct a.jpg b.png                what an autoencoder does to pictures

The checkpoint holds the model's shape, its process, and the averaged weights, which are the ones
that are sampled from; a model of latents needs its autoencoder's files, too. Same seed, same
machine: same pictures.
"""

import math
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

from liquidflow import (PROCESSES, SAMPLERS, TAESD_FILES, create_model, load_checkpoint, sides,
                        write_whole)
from train import (CHECKPOINT_VERSION, SAMPLER_OF, Parser, Progress, decoded, duration, fit_picture,
                   guarded, load_taesd, number, pick_device, sampler_options, scaled)


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
    state = load_checkpoint(path)
    if not isinstance(state, dict) or "version" not in state:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    if state["version"] != CHECKPOINT_VERSION:
        raise ValueError(f"{path}: written by another version of train.py (its checkpoints are of "
                         f"version {state['version']}, this program reads {CHECKPOINT_VERSION})")
    try:
        model = create_model(**state["config"])
        model.load_state_dict(state["ema"])
        process = PROCESSES[state["process"]]()
        state["step"], state["latents"], state["args"]    # asked for later
        return model.to(device).eval(), process, state
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its contents do not fit together ({error})") from None


def draw_noise(n, shape, seed):
    """(n, *shape) normal noise; picture i gets the same noise however many are drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(n)])


def labels_of(names, classes):
    """Numbers of the classes asked for, by name or number; of all, if names is None.

    ValueError for a class that there is not.
    """
    numbers = {str(i): i for i in range(len(classes))}
    numbers.update({name: i for i, name in enumerate(classes)})    # a name goes before a number
    for name in names or []:
        if name not in numbers:
            raise ValueError(f"--label {name}: this model knows {', '.join(classes)}")
    return [numbers[name] for name in names or classes]


def grid_picture(pictures, columns=None):
    """Pictures (n, 3, H, W) in [-1, 1] -> one PIL image, as square a grid as can be if None."""
    grid = make_grid(pictures, nrow=columns or math.ceil(math.sqrt(len(pictures))), normalize=True,
                     value_range=(-1, 1))
    return Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())


def reconstruct(args, device):
    """Encodes and decodes pictures: a grid of before and after, and how near they are.

    What an autoencoder loses here, no latent model can give back: the first thing to look at when
    its pictures look bad.
    """
    size = args.image_size or 128
    taesd = load_taesd(args.latents or "taesd", args.taesd_dir, device)
    rows, total = [], 0.0
    for path in args.reconstruct:
        try:
            with Image.open(path) as image:
                picture = fit_picture(image, size)
        except Exception as error:    # a damaged file can fail in any way its decoder likes
            raise ValueError(f"{path}: not a picture that can be read ({error})") from None
        before = scaled(picture)[None]                                         # (1, 3, H, W)
        with torch.no_grad():
            after = taesd.decode(taesd.encode(before.to(device))).cpu()
        psnr = -10 * math.log10(max((after - before).square().mean().item() / 4, 1e-10))
        print(f"{path}: PSNR {psnr:.1f} dB at {size}x{size}")
        rows, total = [*rows, before, after], total + psnr
    print(f"mean PSNR of {len(args.reconstruct)}: {total / len(args.reconstruct):.1f} dB")
    grid = grid_picture(torch.cat(rows), 2 * math.ceil(math.sqrt(len(args.reconstruct) / 2)))
    write_whole(args.out, lambda file: grid.save(file, "PNG"))
    print(f"{args.out}: pairs of before and after")


def parse_arguments(argv=None):
    """The command line; sampler and steps depend on the checkpoint and are filled in by run()."""
    parser = Parser(description="Draw pictures with a trained LiquidFlow model.")
    add = parser.add_argument
    add("--ckpt", help="a checkpoint; the newest below runs/ if not given")
    add("--n", type=number(int, 1), default=36, help="how many pictures")
    add("--batch_size", type=number(int, 1), default=64, help="how many at once")
    add("--steps", type=number(int, 1), default=50, help="more is better and slower")
    add("--sampler", choices=SAMPLERS, help="euler for flows and ddim for diffusion if not given")
    add("--label", nargs="+", metavar="CLASS", help="what to draw, by name or number: a row of "
        "each; every class, if not given. For models that were trained with --labels")
    add("--cfg", type=number(float, 0), help="guidance: how much more than the model would the "
        "pictures should look like their class; 1 not at all, 0 like any. 2 if not given")
    add("--eta", type=number(float, 0, 1), default=0.0, help="ddim only: fresh noise, 0 to 1")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed, same pictures")
    add("--out", default="samples.png", help="where the grid goes")
    add("--gif", help="also write the path from noise to picture, as an animated GIF")
    add("--taesd_dir", help="folder of the autoencoder's files; if not given, the one that was "
                            "trained with, or a download")
    add("--reconstruct", nargs="+", metavar="PICTURE",
        help="no samples: what an autoencoder alone does to these pictures")
    add("--latents", choices=TAESD_FILES, help="which autoencoder is to --reconstruct; taesd if "
                                               "not given")
    add("--image_size", type=number(int, 8), help="at which size; 128 if not given")
    add("--device", default="auto", help="cpu, cuda, mps, or the fastest there is")
    args = parser.parse_args(argv)
    if not args.reconstruct and (args.latents or args.image_size):
        parser.error("--latents and --image_size are for --reconstruct; a checkpoint has its own")
    return args


def run(args):
    """Loads, samples, writes; says what and where."""
    for path, suffix in (args.out, ".png"), (args.gif, ".gif"):
        if path is not None and (Path(path).suffix.lower() != suffix or Path(path).is_dir()
                                 or not Path(path).parent.is_dir()):
            raise ValueError(f"{path!r}: give a file ending in {suffix}, in a folder that exists")
    device = pick_device(args.device)
    if args.reconstruct:
        return reconstruct(args, device)
    path = args.ckpt or newest_checkpoint()
    model, process, state = load_model(path, device)
    latents = state["latents"]
    taesd = load_taesd(latents["name"], args.taesd_dir or state["args"].get("taesd_dir"),
                       device) if latents else None
    name = args.sampler or SAMPLER_OF[process.predicts]
    options = sampler_options(name, latents)
    if args.eta:
        if name != "ddim":
            raise ValueError(f"--eta {args.eta}: only --sampler ddim draws fresh noise, not {name}")
        options.update(eta=args.eta, generator=torch.Generator(device).manual_seed(args.seed))

    columns, y = None, None
    if model.config["num_classes"]:
        rows = labels_of(args.label, state["classes"])
        columns = math.ceil(args.n / len(rows)) if len(rows) > 1 else None
        y = torch.tensor(rows, device=device).repeat_interleave(columns or args.n)
        args.n = len(y)
        options["cfg_scale"] = 2.0 if args.cfg is None else args.cfg
    elif args.label or args.cfg is not None:
        raise ValueError(f"{path}: knows no classes; --label and --cfg need a model that was "
                         "trained with --labels")
    shape = model.config["in_channels"], *sides(model.config["image_size"])
    noise = draw_noise(args.n, shape, args.seed)
    print(f"{path}: {model.config['arch']} {model.config['variant']}, step "
          f"{state['step']}; {args.n} pictures in {args.steps} {name} steps on {device}")
    start, parts = time.time(), noise.split(args.batch_size)
    progress = Progress("step", args.steps * len(parts))
    pictures, frames = [], [[] for _ in range(args.steps)]
    for i, part in enumerate(parts):
        def watch(step, x_t, x0_hat, before=i * args.steps):
            progress(before + step + 1)
            if args.gif:
                frames[step].append(decoded(x_t, taesd, latents).cpu())

        sampler = SAMPLERS[name]
        wanted = None if y is None else y[i * args.batch_size:][:len(part)]
        drawn = sampler(model, process, part.to(device), args.steps, wanted, callback=watch,
                        **options)
        pictures.append(decoded(drawn, taesd, latents).cpu())
    progress.close()

    grid = grid_picture(torch.cat(pictures), columns)
    write_whole(args.out, lambda file: grid.save(file, "PNG"))
    seconds = time.time() - start
    print(f"{args.out}: {args.n} pictures in {duration(seconds)} ({args.n / seconds:.1f} a second)")
    if args.gif:
        images = [grid_picture(torch.cat(frame), columns) for frame in frames] + [grid]
        times = [max(20, 3000 // args.steps)] * args.steps + [2000]    # ms; rest on the last
        write_whole(args.gif, lambda file: images[0].save(
            file, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0))
        print(f"{args.gif}: the path from noise to picture, {len(images)} frames")


def main(argv=None):
    """Runs the command line."""
    guarded(run, parse_arguments(argv), "a smaller --batch_size needs less")


if __name__ == "__main__":
    main()
