"""LiquidFlow: an attention-free image generator in one file, to be read from top to bottom.

The network is shown a mixture, (1 - t) * picture + t * noise, is told t, and answers with the
direction noise - picture; backwards along it, noise becomes a picture. Everything else serves that
network, or the walk that it makes possible. In use, with batches of pictures (B, 3, 32, 32):

    model, flow = create_model("patch", "nano", image_size=32), RectifiedFlow()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for pictures in batches:
        loss, _, _ = flow.loss(model, pictures)           # mix with noise, ask for the direction
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    new = euler_sample(model, flow, torch.randn(16, 3, 32, 32), steps=50)     # walk from noise

    §1  five small helpers                     §8   LiquidUNet
    §2  time embedding                         §9   LiquidPatch and LiquidMamba
    §3  AdaLN: how a condition steers          §10  variants, create_model
    §4  liquid networks (LTC, CfC)             §11  processes: from picture to noise
    §5  state-space duality, three ways        §12  physics-informed penalties
    §6  the Mamba-2 mixer                      §13  samplers: from noise to picture
    §7  scan orders (zigzag)                   §14  EMA and checkpoints
                                               §15  TAESD: pictures as small latents
                                               §16  the tour

The ideas are in §4, §5, §11 and §13. §1, §10, §15 and the second half of §14 are plumbing, which
may be skipped. `python liquidflow.py` is a tour: it computes examples of the text, and errors.
Not here: data and training (train.py), drawing (sample.py), tests (test_liquidflow.py), attention.

Conventions
    t in [0, 1]   0 is data, 1 is noise, everywhere. (Many papers count the other way.)
    pictures      (B, C, H, W): batch, channels, height, width; float, in [-1, 1].
    tokens        (b, l, d): batch, length, width of a token; small letters, as all of sequences.
    models        model(x, t, y=None) -> x's shape; x (B, C, H, W), t (B,), y labels (B,) or None.
    precision     autocast may run matrix products, and what mixes their results, in half
                  precision; what is accumulated or exponentiated (decays, carried states, sums in
                  norms, the time embedding, losses) stays float32. A float64 model stays float64.
    three times   t, flow time: how noisy the picture is (§2, §11, §13). dt, the step of a state-
                  space model: how far a token moves the state (§6). ts, liquid time: how long a
                  CfC relaxes (§4). (The formulas of papers in §4 and §5 have a t of their own.)

Five places to extend, each a dictionary from which the command line and the tests take their
choices: MIXERS (§6), SCANS (§7), PROCESSES (§11), PHYSICS (§12), SAMPLERS (§13).
"""

import copy
import hashlib
import http.client
import inspect
import io
import itertools
import math
import os
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------
# §1  Five small helpers
def full(x):
    """x in at least float32: half is widened, float64 stays (a plain .float() would narrow it)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

def per_picture(value, x):
    """One number for each picture, (B,), shaped to multiply x, (B, ...): (B, 1, ..., 1).

    Without it (B,) * (B, C, H, W) lines B up with W: an error or, where they agree, silently wrong.
    In x's precision; float32 for half.
    """
    return value.to(full(x).dtype).reshape(-1, *[1] * (x.dim() - 1))

def zeroed(layer):
    """The layer with every parameter at zero, for layers that should say nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer

def sides(image_size):
    """(height, width) of an image_size, which is one int or a pair; ValueError for other things."""
    pair = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise ValueError(f"image size {image_size!r}: give one positive whole number, or two")
    return pair

def choose(what, name, table):
    """table[name], or a ValueError that lists the names that there are."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; there are: {', '.join(table)}")
    return table[name]

# ------------------------------------------------------------------------------------------------
# §2  Time embedding
#
# The network must be told the noise level t, and cannot do much with the bare number: weights times
# t, and then an activation, can only bend slowly along it. So t is shown on dim // 2 clock hands
# that turn at speeds from fast to slow, by the two coordinates of each:
#
#     sinusoidal(t) = [cos(scale * t * freq_k) | sin(scale * t * freq_k)],
#     freq_k = max_period^(-k / (dim // 2)),   k = 0 ... dim // 2 - 1
#
# The speeds were made for step numbers 0 ... 1000. With t in [0, 1] left as it is, the fastest
# hand turns one radian in all and the others hardly move: at dim 256 the first principal direction
# holds 99 % of the variance over t. Hence scale = 1000, with which it holds 13 %.
def sinusoidal(t, dim, max_period=10000, scale=1000):
    """Sinusoidal features of a time: t (B,) in [0, 1] -> (B, dim), at least float32.

    An odd dim gets a last column of zeros. Source: the position encoding of Vaswani et al. (2017),
    "Attention Is All You Need", as DDPM (Ho et al., 2020) uses it for time.
    """
    t = full(t if t.is_floating_point() else t.float())
    half = dim // 2
    k = torch.arange(half, device=t.device, dtype=t.dtype)
    angle = scale * t.reshape(-1, 1) * max_period ** (-k / half)             # (B, dim // 2)
    features = torch.cat([angle.cos(), angle.sin()], dim=1)
    return F.pad(features, (0, dim % 2))                                     # (B, dim)

class SinusoidalTimeEmbedding(nn.Module):
    """The features above, then a two-layer SiLU network: t (B,) in [0, 1] -> (B, dim)."""
    def __init__(self, dim, scale=1000):
        super().__init__()
        self.dim, self.scale = dim, scale
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):    # half would blur neighbouring times
            features = sinusoidal(t, self.dim, scale=self.scale)
            return self.mlp(features.to(self.mlp[0].weight.dtype))

# ------------------------------------------------------------------------------------------------
# §3  AdaLN: how a condition steers a layer
#
# The condition c (the time embedding, plus a label embedding where there are labels) is a vector
# that every layer listens to. It scales and shifts the layer's normalised features:
#
#     AdaLN(x, c) = norm(x) * (1 + scale(c)) + shift(c)
#
# scale and shift come from SiLU(c) through a linear layer that starts at zero. A new layer is
# therefore exactly the plain norm, and steering is learnt from there; random steering at the start
# would hand every block a different, meaningless distortion to undo first.
class AdaLN(nn.Module):
    """Adaptive normalisation: (B, dim, H, W) or (b, l, dim), with c (B, cond_dim) -> x's shape.

    Pictures are normalised by groups of channels (the largest number of groups up to 32 that
    divides dim), tokens over dim; no learned affine, eps 1e-6. Source: the adaLN-Zero of Peebles &
    Xie (2023), "Scalable Diffusion Models with Transformers", without its gate on the residual.
    """
    def __init__(self, dim, cond_dim):
        super().__init__()
        self.dim = dim
        self.groups = max(groups for groups in range(1, min(32, dim) + 1) if dim % groups == 0)
        self.modulation = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(cond_dim, 2 * dim)))

    def forward(self, x, c):
        scale, shift = self.modulation(c).chunk(2, dim=-1)                   # (B, dim) each
        if x.dim() == 4:
            normed = F.group_norm(full(x), self.groups, eps=1e-6)
            scale, shift = scale[:, :, None, None], shift[:, :, None, None]
        else:
            normed = F.layer_norm(full(x), (self.dim,), eps=1e-6)
            scale, shift = scale[:, None], shift[:, None]
        return normed.to(scale.dtype) * (1 + scale) + shift    # x's shape; half under autocast

# ------------------------------------------------------------------------------------------------
# §4  Liquid networks, in three steps
#
# A neuron with a state is a leaky bucket: input raises the level, the level leaks, and the size of
# the hole, its time constant, says how far back it remembers. In a liquid neuron the input widens
# the hole, too: strong input is followed at once, weak input is averaged over a long time.
#
# Step 1: the equation. The level x of a liquid time-constant (LTC) neuron leaks with time constant
# tau, while an input-dependent conductance f >= 0 pulls it towards A (t is liquid time here):
#
#     dx/dt = -(1/tau + f) * x + f * A
#
# f also multiplies x: it is what makes the time constant, 1 / (1/tau + f), depend on the input.
# A numerical solution is as accurate as one likes, but each step waits for the one before.
def ltc_ode(x0, f, A, tau, t, steps):
    """x(t) of the LTC equation from x(0) = x0, with f held constant, by `steps` Runge-Kutta steps.

    x0, f >= 0, A, tau > 0, t: tensors that broadcast to one shape, the shape of the result. Error ~
    1 / steps^4. Source: Hasani et al. (2021), "Liquid Time-constant Networks".
    """
    def slope(x):
        return -(1 / tau + f) * x + f * A
    x, step = x0, t / steps
    for _ in range(steps):
        k1 = slope(x)
        k2 = slope(x + step / 2 * k1)
        k3 = slope(x + step / 2 * k2)
        k4 = slope(x + step * k3)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x

# Step 2: the exact solution. For a constant input the equation is linear in x: an exponential
# approach, at rate 1/tau + f, to the point where leak and pull balance (where dx/dt is 0).
#
#     x(t) = x_inf + (x0 - x_inf) * exp(-(1/tau + f) * t),    x_inf = f * A / (1/tau + f)
def ltc_closed_form(x0, f, A, tau, t):
    """The exact x(t) of the LTC equation for constant f (variation of constants); as ltc_ode."""
    rate = 1 / tau + f
    x_inf = f * A / rate
    return x_inf + (x0 - x_inf) * torch.exp(-rate * t)

# Step 3: the learned gate. Inputs that change leave an integral without a closed form. The closed-
# form continuous-time cell (CfC) keeps the shape of step 2, a start that hands over to an end as
# time passes, and computes the parts from the input and the old state: the start g, the end h, the
# speed f of the change, and its offset b. f may have any sign now, and exp(-f t) could exceed 1, so
# a sigmoid takes its place:
#
#     gate = sigmoid(-(f * t + b)),    new state = gate * g + (1 - gate) * h
#
# It approximates, and does not solve: at t = 0 the state is not g but a mixture by sigmoid(-b). For
# certain it keeps the limits (where f > 0: h for t -> +inf, and formally g for t -> -inf), and a
# bound: g and h end in a tanh and are mixed, so no state leaves [-1, 1] and none can blow up.
class ScaledTanh(nn.Module):
    """height * tanh(slope * x)."""
    def __init__(self, height, slope):
        super().__init__()
        self.height, self.slope = height, slope

    def forward(self, x):
        return self.height * torch.tanh(self.slope * x)

class CfCCell(nn.Module):
    """One step of a closed-form continuous-time cell: cell(x, h, t) -> the new state (b, hidden).

    x (b, input_size); h (b, hidden_size), the old state, not the h above; t a number, (b,), (b, 1).
    |output| <= 1 for every finite input, weight and time, unless a sum inside overflows. Source:
    Hasani et al. (2022), "Closed-form continuous-time neural networks" (f: time_a, b: time_b).
    """
    def __init__(self, input_size, hidden_size, backbone_units=128, backbone_layers=1):
        super().__init__()
        layers, width = [], input_size + hidden_size
        for _ in range(backbone_layers):
            # LeCun's tanh (LeCun et al., 1998): takes 1 nearly to 1, -1 to -1, and has room beyond
            layers += [nn.Linear(width, backbone_units), ScaledTanh(1.7159, 0.666)]
            width = backbone_units
        self.backbone = nn.Sequential(*layers)
        self.g_head, self.h_head, self.time_a, self.time_b = (
            nn.Linear(width, hidden_size) for _ in range(4))

    def forward(self, x, h, t):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1)    # (1 or b, 1)
        features = self.backbone(torch.cat([x, h], dim=1))                       # (b, units)
        gate = torch.sigmoid(-(self.time_a(features) * t + self.time_b(features)))
        start, end = torch.tanh(self.g_head(features)), torch.tanh(self.h_head(features))
        return gate * start + (1 - gate) * end                                   # (b, hidden)

# The cell steps through a sequence. The models below need a layer for pictures, and borrow the gate
# of step 3 and the relaxation of step 2. Every feature of every pixel is a neuron, and its value x
# is the old state (nothing is carried from call to call). All take one step together, and the
# condition c, noise level and label, says how long it is: a liquid time ts(c) > 0 for each channel.
# A pixel and its surroundings propose f, g and h:
#
#     gate = sigmoid(-(f * ts + b(c))),    cfc = gate * g + (1 - gate) * h    step 3, but b from c
#     out  = alpha * x + (1 - alpha) * cfc,    alpha = exp(-lambda * ts)      step 2, from x to cfc
#
# In words: a gated convolution, and alpha, the share of x that is kept (not the alpha of §11). Both
# may follow the noise level: the noisier a picture is, the less a feature says by itself, and the
# more its surroundings do. ts and the rate lambda > 0 are learned for each channel, within a factor
# of 4 of where they start, 1 and log 2. With lambda at its start alpha = 0.5^ts:
#
#     ts       1/4     1      4
#     alpha    0.84   0.50   0.06      and never above 0.5^(1/16) = 0.96: cfc is never cut off
class ParallelCfC(nn.Module):
    """A CfC for every pixel: x (B, dim, H, W), c (B, cond_dim) -> (B, dim, H, W).

    f, g and h share one depthwise convolution (kernel_size, odd: ValueError if even) and one
    expansion to expand * dim channels. |cfc| <= 1, so |out| <= max(|x|, 1) everywhere. alpha
    "constant" is 0.993 at all t, as a source of ours had it. Source: Hasani et al. (2022).
    """
    def __init__(self, dim, cond_dim, kernel_size=5, expand=2, alpha="liquid"):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, to keep the sides, not {kernel_size}")
        self.backbone = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim),
            nn.Conv2d(dim, expand * dim, 1), nn.SiLU())
        self.f_head, self.g_head, self.h_head = (
            nn.Conv2d(expand * dim, dim, 1) for _ in range(3))
        # ts = 4^tanh(time(c)): small weights, bias 0 at first, so near 1, but not alike for all c
        self.time = zeroed(nn.Linear(cond_dim, dim))
        nn.init.normal_(self.time.weight, std=0.08 / math.sqrt(cond_dim))
        self.bias = zeroed(nn.Linear(cond_dim, dim))          # b(c)
        self.rho = nn.Parameter(torch.zeros(dim))             # lambda = log 2 * 4^tanh(rho)
        self.fixed_alpha = choose("alpha", alpha, {"liquid": None, "constant": 0.993})

    def liquid_time(self, c):
        """ts(c): (B, cond_dim) -> (B, dim), between 1/4 and 4."""
        return 4 ** torch.tanh(full(self.time(c)))

    def heads(self, x):
        """f, and g and h before their tanh, (B, dim, H, W) each: three convolutions in one."""
        heads = self.f_head, self.g_head, self.h_head
        weight, bias = (torch.cat(v) for v in zip(*((v.weight, v.bias) for v in heads)))
        return F.conv2d(self.backbone(x), weight, bias).chunk(3, dim=1)

    def gates(self, x, c, f=None):
        """gate (B, dim, H, W), alpha (B, dim, 1, 1), in (0, 1); f: heads(x)[0], if known."""
        f = self.heads(x)[0] if f is None else f                                # (B, dim, H, W)
        ts = self.liquid_time(c)                                                # (B, dim)
        alpha = torch.exp(-math.log(2) * 4 ** torch.tanh(self.rho) * ts)        # (B, dim)
        if self.fixed_alpha:
            alpha = self.fixed_alpha + 0 * alpha    # DistributedDataParallel needs rho's gradient
        slope, offset = (-v.to(f.dtype)[:, :, None, None] for v in (ts, self.bias(c)))
        gate = torch.sigmoid(f * slope + offset)      # -(f * ts + b), the small tensors negated
        return gate, alpha.to(x.dtype)[:, :, None, None]

    def forward(self, x, c):
        f, g, h = self.heads(x)
        gate, alpha = self.gates(x, c, f)
        g, h = torch.tanh(g), torch.tanh(h)
        cfc = h + gate * (g - h)             # gate * g + (1 - gate) * h, with one product less
        return alpha * x + (1 - alpha) * cfc

# ------------------------------------------------------------------------------------------------
# §5  State-space duality: one operator, three ways to compute it
#
# In a sequence of tokens each should know of those before it. Attention keeps all of them, and
# compares each with each. A state-space model keeps a summary of fixed size, the state S, which is
# a small matrix for each head. At every token t it fades, takes something in, and is read out:
#
#     S_t = exp(log_decay_t) * S_{t-1} + x_t (outer) Bm_t          (p, n)
#     y_t = S_t Cm_t                                               (p,)
#
# Think of n drawers: Bm_t says how much of x_t goes into each, Cm_t how much of each comes out. The
# decay, between 0 and 1, says how long they keep it. Its log is what is passed around: over many
# tokens decays multiply, to numbers that underflow; their logs add up.
#
# Unrolled from S_0 = 0, S_t is a sum over s <= t of x_s (outer) Bm_s, faded from s to t. Of that
# Cm_t reads x_s * (Bm_s . Cm_t): y is a weighted sum over a token and all earlier ones, y = M x,
#
#     M[t, s] = (Cm_t . Bm_s) * exp(log_decay_{s+1} + ... + log_decay_t)   for s <= t, else 0
#
# which is attention with queries Cm, keys Bm, values x, and a decay in place of the softmax. That
# is the duality: the same y by a loop or by a matrix. With x = (1, 2, 3), Bm = Cm = 1, decays 1/2:
#
#     loop     S = y = 1,    1/2 * 1 + 2 = 2.5,    1/2 * 2.5 + 3 = 4.25
#     matrix   M = [[1, 0, 0], [1/2, 1, 0], [1/4, 1/2, 1]],   y_3 = 1/4 * 1 + 1/2 * 2 + 1 * 3 = 4.25
#     chunks   of 2: [1, 2] by the matrix is 1, 2.5, and leaves S = 2.5. [3] by itself is 3; it also
#              reads 1/2 * 2.5 from the state that enters, which makes 4.25
#
# The loop takes l steps that wait for each other, the matrix costs l^2. Chunks of q tokens take the
# matrix inside, q^2 for each, and the loop between, l / q steps. All three have the same arguments
# and results (x is already multiplied by §6's dt):
#
#     x (b, l, h, p)         h heads, each p wide
#     log_decay (b, l, h)    <= 0, so a state may fade, but never explode
#     Bm, Cm (b, l, g, n)    the papers' B and C, for states of size n; each of the g groups serves
#                            r = h / g heads, head i is in group i // r
#     initial_state          (b, h, p, n), zero if None  ->  y (b, l, h, p), a final state likewise
#
# Source: Dao & Gu (2024), "Transformers are SSMs", the state space duality model.
def ssd_sequential(x, log_decay, Bm, Cm, initial_state=None):
    """The recurrence, token by token: slow, and the definition of what the other two compute."""
    h, dtype, decay = x.shape[2], x.dtype, full(log_decay).exp()
    Bm, Cm = (full(v).repeat_interleave(h // v.shape[2], 2) for v in (Bm, Cm))     # (b, l, h, n)
    write = full(x)[..., None] * Bm[..., None, :]                                  # (b, l, h, p, n)
    state = torch.zeros_like(write[:, 0]) if initial_state is None else full(initial_state)
    # unbind, not write[:, t], whose backward pass fills a tensor of l tokens with 0, l times
    steps, y = (decay[..., None, None], write, Cm[..., None]), []
    for decay_t, write_t, read_t in zip(*(v.unbind(1) for v in steps)):
        state = decay_t * state + write_t                                          # (b, h, p, n)
        y.append((state @ read_t).squeeze(-1))                                     # (b, h, p)
    return torch.stack(y, dim=1).to(dtype), state

# Chunks of q tokens. From the state E that enters one, with tokens 1 ... q and a for log_decay,
#
#     S_t = exp(a_1 + ... + a_t) * E + sum over s <= t of exp(a_{s+1} + ... + a_t) x_s (outer) Bm_s
#
# Cm_t reads from both terms, and at t = q they are what leaves the chunk:
#
#     1. inside         y = M x, the second term: as if E were 0      all chunks at once
#     2. leave behind   the second term at t = q                      all chunks at once
#     3. carry          E of the next = exp(a_1 + ... + a_q) * E + what was left behind
#     4. read           y + exp(a_1 + ... + a_t) * E Cm_t             all chunks at once
#
# A head holds q numbers for a token in M, and p n / q in states: least in all at q = sqrt(p n),
# where the derivative of their sum, 1 - p n / q^2, is 0.
class Between(torch.autograd.Function):
    """The decays between tokens: a (..., l), log decays, and a dtype -> (..., l, l) of that dtype.

        decay[t, s] = exp(a_{s+1} + ... + a_t) for s <= t, else 1: callers must mask that half

    Each column is a sum of its own. To subtract two entries of one running sum would lose digits:
    after a hundred logs of -60 it is near -6000, where float32 numbers are 5e-4 apart, and a log of
    -0.01 that follows becomes -0.0098. The gradient, by hand, keeps only `decay`, and may subtract,
    as its error is not exponentiated. a_j is in decay[t, s] for s < j <= t. With H = dL/d(decay) *
    decay, which is 0 for s > t because of the mask,

        dL/da_j = sum of H[t, s] over s < j <= t = sum over t >= j of (sum of row t - of column t)

    since what rows and columns from j on have in common, t and s >= j, cancels.
    """
    @staticmethod
    def forward(ctx, a, dtype):
        ones = torch.ones(a.shape[-1], a.shape[-1], dtype=a.dtype, device=a.device)
        a = a.clamp(min=-750)    # exp(-750) is 0 even in float64, and -inf * 0 would be nan
        column = a[..., None] * ones.tril(-1)                                # a_t, where t > s
        decay = column.cumsum_(column.dim() - 2).exp_().to(dtype)            # not -2, for Core ML
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    def backward(ctx, grad):
        H = grad * ctx.saved_tensors[0]
        rows, columns = (H.sum(axis, dtype=full(H).dtype) for axis in (-1, -2))
        return (rows - columns).flip(-1).cumsum(-1).flip(-1), None

def carry_states(states, log_decay, carried=None):
    """Step 3, the recurrence between chunks: what enters each, and what leaves the last.

        entering_{j+1} = exp(log_decay_j) * entering_j + states_j,   entering_0 = carried, or 0

    For k chunks: states (..., k, m), log_decay (..., k), carried (..., 1, m); results likewise, the
    last one at least float32. By a matrix, for 16 chunks at a time: cost linear in k.
    """
    entering = []
    for S, a in zip(states.split(16, -2), log_decay.split(16, -1)):
        # Shifted a row down, as a chunk receives only those before it: its row 0 is 0
        decay = F.pad(Between.apply(a, a.dtype).tril(), (0, 0, 1, -1))       # (..., 16, 16) or less
        with torch.autocast(S.device.type, enabled=False):    # accumulated: not in half precision
            S_in = decay @ full(S)                                           # (..., k, m)
            if carried is not None:
                S_in = S_in + F.pad(a, (1, -1)).cumsum(-1).exp()[..., None] @ carried
        carried = a[..., -1:, None].exp() * S_in[..., -1:, :] + S[..., -1:, :]
        entering.append(S_in.to(states.dtype))
    return torch.cat(entering, -2), carried

def ssd_chunked(x, log_decay, Bm, Cm, initial_state=None, chunk_size=None):
    """The fast form: matrices inside the chunks, states between them; cost linear in l.

    chunk_size >= 1 (else ValueError) changes the result by rounding only. None: uncut up to 64
    tokens, else a power of 2, from 16 up, near sqrt(p n).
    """
    b, l, h, p = x.shape
    g, n, dtype = *Bm.shape[2:], x.dtype
    default = l if l <= 64 else max(16, 2 ** round(math.log2(p * n) / 2))
    q = min(l, default if chunk_size is None else chunk_size)
    if q < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    def chunks(v):
        """(b, l, h, m) -> (b, g, r, k, q, m), k chunks; (b, l, g, m) likewise, with r = 1."""
        # Pad to whole chunks: decay 1 and input 0 leave a state as it is, so padding is exact
        v = F.pad(v, (0, 0, 0, 0, 0, -l % q)) if l % q else v
        v = v.unflatten(1, (-1, q)).unflatten(3, (g, -1)).permute(0, 3, 4, 1, 2, 5)
        return v.contiguous()                         # one copy here, not one in every product
    x, Bm, Cm = chunks(x), chunks(Bm), chunks(Cm)
    a = chunks(full(log_decay)[..., None]).squeeze(-1)              # (b, g, r, k, q)
    decay = Between.apply(a, dtype)                                 # (b, g, r, k, q, q)
    since, to_end = a.cumsum(-1).exp().to(dtype)[..., None], decay[..., -1, :, None]
    # 1. Every chunk by itself: M[t, s] = (Cm_t . Bm_s) * decay[t, s] for s <= t (tril), times x
    M = (Cm @ Bm.mT).tril() * decay                                 # (b, g, r, k, q, q)
    y = M @ x                                                       # (b, g, r, k, q, p)
    # 2. What it leaves behind: the sum over s of decay[end, s] * Bm_s (outer) x_s, here (n, p)
    states = (Bm * to_end).mT @ x                                   # (b, g, r, k, n, p)
    # 3. What enters each chunk
    if initial_state is not None:
        initial_state = full(initial_state).mT.reshape(b, g, -1, 1, n * p)
    entering, final = carry_states(states.flatten(-2), a.sum(-1), initial_state)
    # 4. What its tokens read from that: exp(a_1 + ... + a_t) * Cm_t . S, if there is anything
    if l > q or initial_state is not None:
        y = y + (Cm * since) @ entering.unflatten(-1, (n, p))
    y = y.permute(0, 3, 4, 1, 2, 5).reshape(b, -1, h, p)[:, :l]
    return y.to(dtype), final.view(b, h, n, p).mT

def ssd_quadratic(x, log_decay, Bm, Cm, initial_state=None):
    """The dual form: one chunk, so the masked (l, l) matrix M, times x. Cost l^2."""
    return ssd_chunked(x, log_decay, Bm, Cm, initial_state, chunk_size=x.shape[1])

# ------------------------------------------------------------------------------------------------
# §6  The Mamba-2 mixer
#
# The operator of §5 has no parameters. The mixer computes its arguments from the tokens u, so that
# the data decide what is written, what is read, and how fast the state fades:
#
#     z, x, Bm, Cm, dt = in_proj(u)
#     x, Bm, Cm        = SiLU(causal depthwise convolution of the three together)
#     dt               = softplus(dt + dt_bias) > 0                the step
#     log_decay        = dt * A,    A = -exp(A_log) < 0            one rate for each head
#     y                = ssd(dt * x, log_decay, Bm, Cm) + D * x    D: a skip
#     out              = out_proj(RMSNorm(y * SiLU(z)))            z: a gate on what leaves
#
# A large step both writes more and forgets more: dt is the gate of this recurrence. softplus and
# -exp keep the signs: a state can fade, but not explode.
class Mamba2(nn.Module):
    """The Mamba-2 token mixer: (b, l, d_model) -> (b, l, d_model), causal in the order of l.

    Parameter names, shapes and initial values are those of the official module (Dao & Gu, 2024;
    state-spaces/mamba), so its weights load here; but the norm is over all of d_inner. d_state is
    §5's n, headdim p, ngroups g. ValueError unless headdim divides expand * d_model, and g heads.
    """
    def __init__(self, d_model, d_state=64, d_conv=4, expand=2, headdim=64, ngroups=1,
                 chunk_size=None):
        super().__init__()
        d_inner = expand * d_model
        if d_inner % headdim:
            raise ValueError(f"expand * d_model = {d_inner} is no multiple of headdim = {headdim}")
        nheads = d_inner // headdim
        if nheads % ngroups:
            raise ValueError(f"ngroups = {ngroups} must divide the number of heads, {nheads}")
        self.headdim, self.ngroups, self.chunk_size = headdim, ngroups, chunk_size
        conv_dim = d_inner + 2 * ngroups * d_state                    # x, Bm and Cm side by side
        self.sizes = d_inner, ngroups * d_state, nheads, conv_dim
        self.in_proj = nn.Linear(d_model, d_inner + conv_dim + nheads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim)
        # Steps start log-uniform between 1e-3 and 1e-1: some heads remember long, some briefly.
        dt = torch.exp(torch.empty(nheads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))      # softplus(dt_bias) = dt
        self.A_log = nn.Parameter(torch.log(torch.empty(nheads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(nheads))
        self.norm = nn.RMSNorm(d_inner, eps=1e-5)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, u):
        d_inner, d_bc, nheads, conv_dim = self.sizes
        z, xBC, dt = self.in_proj(u).split([d_inner, conv_dim, nheads], dim=-1)    # (b, l, ...)
        # Padded by d_conv - 1 and cut on the right: causal. (On a CPU conv1d is slower.)
        xBC = F.conv2d(xBC.transpose(1, 2)[:, :, None], self.conv1d.weight[:, :, None],
                       self.conv1d.bias, padding=(0, self.conv1d.weight.shape[2] - 1),
                       groups=conv_dim)
        xBC = F.silu(xBC.squeeze(2)[..., :u.shape[1]].transpose(1, 2))              # (b, l, ...)
        x, Bm, Cm = xBC.split([d_inner, d_bc, d_bc], dim=-1)
        x = x.unflatten(-1, (nheads, self.headdim))                                 # (b, l, h, p)
        Bm, Cm = (v.unflatten(-1, (self.ngroups, -1)) for v in (Bm, Cm))            # (b, l, g, n)
        dt = F.softplus(full(dt) + self.dt_bias)                                    # (b, l, h)
        log_decay = -dt * torch.exp(full(self.A_log))                               # (b, l, h) <= 0
        # fp16 ends at 65,504, and y * SiLU(z) came to 221,446 in a trained nano. So y is a 64th of
        # the formula's from here on, which the norm divides out: its squares are taken times 64^2.
        dt, D = dt.to(x.dtype), (self.D / 64).to(x.dtype)
        y, _ = ssd_chunked(dt[..., None] * x, log_decay, Bm, Cm / 64, chunk_size=self.chunk_size)
        y = (D[:, None] * x + y).flatten(2) * F.silu(z)                             # (b, l, d_inner)
        # out_proj(64 y / root * weight), root = sqrt(mean((64 y)^2) + eps), one number a token: it
        # can as well divide what comes out, which is no larger; out_proj takes in the weight.
        squares = full(torch.linalg.vector_norm(y, dim=-1, keepdim=True)).square()   # (b, l, 1)
        scale = 64 * torch.rsqrt(squares * (64**2 / d_inner) + self.norm.eps)        # 64 / root
        return F.linear(y, self.norm.weight * self.out_proj.weight) * scale.to(y.dtype)

# What mixes the tokens of a model: name -> class, constructed as cls(dim, d_state=, expand=,
# headdim=), mapping (b, l, dim) to the same shape, each sequence by itself. "none": its input.
MIXERS = {"mamba2": Mamba2, "none": nn.Identity}

# ------------------------------------------------------------------------------------------------
# §7  Scan orders
#
# §5 reads a sequence, but a picture has none: some order must be chosen. Reading row after row, as
# a page, jumps from the end of each row to the start of the next. A zigzag turns round instead, so
# that consecutive tokens are always neighbours. Three of the eight, on the cells 0 1 2 / 3 4 5:
#
#     from the top left, by rows     by columns             from the top right, by columns
#          0 > 1 > 2                 0   1 > 2              0 < 1   2
#                  v                 v   ^   v              v   ^   v
#          3 < 4 < 5                 3 > 4   5              3   4 < 5
#     order [0, 1, 2, 5, 4, 3]       [0, 3, 4, 1, 2, 5]     [2, 5, 4, 1, 0, 3]
#
# A token hears only what came before it on its path: blocks take turns, or average two ways (§9).
#
# order[i] is the raster index of the cell that is visited i-th: tokens[:, order] lays the cells
# along the path. The other reading, "when is cell i visited", is its inverse: [4, 3, 0, 5, 2, 1]
# for the last one. They are easily swapped; the first two, their own inverses, would not tell.
def zigzag_orders(height, width):
    """The eight zigzags over a grid -> LongTensor (8, height * width) of raster indices.

    Corners top left, top right, bottom left, bottom right; from each, first the path along the
    rows, then the one along the columns. Source: Hu et al. (2024), "ZigMa".
    """
    grid = torch.arange(height * width).view(height, width)
    def snake(cells):                                   # every other row is walked backwards
        return torch.cat([row.flip(0) if i % 2 else row for i, row in enumerate(cells)])
    corners = grid, grid.flip(1), grid.flip(0), grid.flip(0, 1)
    return torch.stack([snake(view) for corner in corners for view in (corner, corner.T)])

def inverse_order(order):
    """(..., l) -> (..., l): when each cell is visited. tokens[:, order][:, inverse] == tokens."""
    return torch.argsort(order, dim=-1)

# name -> function(height, width), any grid -> LongTensor (paths, height * width); raster: as a page
SCANS = {"zigzag": zigzag_orders, "raster": lambda h, w: torch.arange(h * w)[None]}

class Scan(nn.Module):
    """Lets a mixer read a grid of tokens along several paths and averages what it says.

    (b, l, d) -> (b, l, d), both in raster order; orders (paths, l). Paths share the weights.
    """
    def __init__(self, mixer, orders):
        super().__init__()
        self.mixer = mixer
        self.paths = len(orders)
        self.register_buffer("order", orders.flatten(), persistent=False)
        inverse = inverse_order(orders) + torch.arange(self.paths)[:, None] * orders.shape[1]
        self.register_buffer("inverse", inverse.flatten(), persistent=False)

    def forward(self, u):
        b, l, d = u.shape
        sequences = u.index_select(1, self.order).view(b * self.paths, l, d)
        mixed = self.mixer(sequences).reshape(b, self.paths * l, d)
        mixed = mixed.index_select(1, self.inverse).view(b, self.paths, l, d)
        return mixed.mean(1) if self.paths > 1 else mixed.squeeze(1)          # a mean of one copies

# ------------------------------------------------------------------------------------------------
# §8  LiquidUNet: liquid blocks at several resolutions
#
# A U-Net looks at a picture through ever coarser grids and comes back up. Every grid on the way up
# also gets the features left there on the way down, so detail need not pass through the bottom:
#
#     x > stem > stage 0 ------------------- skip ----------------> fuse > stage 0 > norm, head
#                   v  half the sides, more channels                 ^  twice the sides
#                stage 1 ----------------- skip -------------> fuse > stage 1
#                   v                                           ^
#                stage 2 ------> bottom ------> stage 2 --------'
#
# A stage is a few blocks. In place of attention each block has three residual parts:
#
#     x = x + gain * CfC(AdaLN(x, c), c)      the liquid part of §4
#     x = x + SpatialMix(AdaLN(x, c))         a neighbourhood, and means over the whole picture
#     x = x + FeedForward(AdaLN(x, c))        channels among themselves
#
# Labels enter by the condition c, and there is one more than classes: "any", the null class. To
# draw a class more clearly §13 exaggerates what its label changes, and asks the network with it and
# without. One that always saw labels could not answer without: train.py shows "any" for one in ten.
class Condition(nn.Module):
    """c = time embedding + label embedding: t (B,), y (B,) or None -> (B, cond_dim).

    Labels are 0 ... num_classes - 1; num_classes itself is the null class, which y = None stands
    for. ValueError for labels given to a model without classes.
    """
    def __init__(self, cond_dim, num_classes, time_scale):
        super().__init__()
        self.num_classes = num_classes
        self.time = SinusoidalTimeEmbedding(cond_dim, time_scale)
        self.label = nn.Embedding(num_classes + 1, cond_dim) if num_classes else None

    def forward(self, t, y):
        if not self.num_classes and y is not None:
            raise ValueError("this model was made with num_classes=0: it takes no labels")
        y = torch.full(t.shape, self.num_classes, device=t.device) if y is None else y
        return self.time(t) + (self.label(y) if self.num_classes else 0)

class SpatialMix(nn.Module):
    """Local and global context without attention: (B, dim, H, W) -> (B, dim, H, W).

    AdaLN has taken away the mean of each group of channels, so `whole` sees only how the means
    within a group differ. With 32 channels or fewer each is its own group: then it sees only
    AdaLN's shift(c). The SiLU lets the result add much, and take away 0.28 at most.
    """
    def __init__(self, dim, kernel_size):
        super().__init__()
        self.local = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.whole = nn.Conv2d(dim, dim, 1)
        self.merge = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, x):
        mean = self.whole(x.mean((2, 3), keepdim=True)).expand_as(x)    # (B, dim, H, W)
        return F.silu(self.merge(torch.cat([self.local(x), mean], dim=1)))

class UNetBlock(nn.Module):
    """The three residual parts above: x (B, dim, H, W), c (B, cond_dim) -> (B, dim, H, W)."""
    def __init__(self, dim, cond_dim, kernel_size=5, expand=2, alpha="liquid"):
        super().__init__()
        self.norm_cfc, self.norm_mix, self.norm_ff = (AdaLN(dim, cond_dim) for _ in range(3))
        self.cfc = ParallelCfC(dim, cond_dim, kernel_size, expand, alpha)
        self.gain = nn.Parameter(torch.full((dim, 1, 1), 0.5))    # at 0 the CfC would start late
        self.mix = SpatialMix(dim, kernel_size)
        self.ff = nn.Sequential(
            nn.Conv2d(dim, expand * dim, 1), nn.SiLU(), nn.Conv2d(expand * dim, dim, 1))

    def forward(self, x, c):
        x = x + self.gain * self.cfc(self.norm_cfc(x, c), c)
        x = x + self.mix(self.norm_mix(x, c))
        return x + self.ff(self.norm_ff(x, c))

class SkipFusion(nn.Module):
    """x, on the way up, and skip, from the way down, (B, dim, H, W), joined by a gate of c."""
    def __init__(self, dim, cond_dim):
        super().__init__()
        self.merge = nn.Conv2d(2 * dim, dim, 1)
        self.gate = nn.Linear(cond_dim, dim)

    def forward(self, x, skip, c):
        gate = torch.sigmoid(self.gate(F.silu(c)))[:, :, None, None]         # (B, dim, 1, 1)
        return gate * self.merge(torch.cat([x, skip], dim=1)) + (1 - gate) * x

class LiquidUNet(nn.Module):
    """A U-Net of convolutional CfC blocks: x (B, C, H, W), t (B,), y (B,) or None -> x's shape.

    channels and blocks list the stages from fine to coarse, two extra blocks lie at the bottom.
    ValueError if one is longer, or unless 2^(stages - 1) divides each side. The output starts at 0.
    """
    block = UNetBlock
    def __init__(self, image_size, in_channels=3, num_classes=0, channels=(64, 128, 256),
                 blocks=(2, 2, 4), cond_dim=256, time_scale=1000, **block_options):
        super().__init__()
        if len(channels) != len(blocks):
            raise ValueError(f"channels {channels} and blocks {blocks} must have the same length")
        factor = 2 ** (len(channels) - 1)
        if any(side % factor or side == factor for side in sides(image_size)):
            raise ValueError(f"image size {image_size}: each side must be a larger multiple of "
                             f"{factor}, because the U-Net halves it {len(channels) - 1} times")

        def stage(dim, count):
            return nn.ModuleList(self.block(dim, cond_dim, **block_options) for _ in range(count))
        self.condition = Condition(cond_dim, num_classes, time_scale)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, padding=1), nn.SiLU(),
            nn.Conv2d(channels[0], channels[0], 3, padding=1))
        self.encoder = nn.ModuleList(map(stage, channels, blocks))
        pairs = list(itertools.pairwise(channels))                   # (fine, coarse)
        self.down = nn.ModuleList(nn.Conv2d(f, c, 3, stride=2, padding=1) for f, c in pairs)
        self.bottom = stage(channels[-1], 2)
        self.decoder = nn.ModuleList(map(stage, channels, blocks))    # numbered as the encoder
        self.up = nn.ModuleList(nn.Conv2d(c, f, 3, padding=1) for f, c in pairs)
        self.fuse = nn.ModuleList(SkipFusion(dim, cond_dim) for dim in channels[:-1])
        self.norm = AdaLN(channels[0], cond_dim)
        # Answer 0 at first: then the first loss is known (§11)
        self.head = zeroed(nn.Conv2d(channels[0], in_channels, 3, padding=1))
        # A share of x, set by c, as c_skip of Karras et al. (2022). §9 did worse with one (README)
        self.direct = zeroed(nn.Linear(cond_dim, in_channels))

    def forward(self, x, t, y=None):
        c = self.condition(t, y)                                      # (B, cond_dim)
        direct = self.direct(c)[:, :, None, None] * x                 # (B, C, H, W)
        x = self.stem(x)                                              # (B, channels[0], H, W)
        skips = []
        for stage, down in zip(self.encoder, self.down):              # all but the coarsest
            for block in stage:
                x = block(x, c)                   # (B, the stage's channels, ever smaller sides)
            skips.append(x)
            x = down(x)
        for block in (*self.encoder[-1], *self.bottom, *self.decoder[-1]):
            x = block(x, c)
        for i in reversed(range(len(self.up))):
            x = self.up[i](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = self.fuse[i](x, skips[i], c)
            for block in self.decoder[i]:
                x = block(x, c)
        return self.head(F.silu(self.norm(x, c))) + direct            # (B, C, H, W)

# ------------------------------------------------------------------------------------------------
# §9  LiquidPatch and LiquidMamba: one token model, two kinds of block
#
# The picture is cut into patches of P x P, each becomes a token, blocks work on the tokens, and the
# tokens become patches again. Halfway one layer looks at the whole picture. Blocks of the second
# half also get what one of the first half made, so that detail can go round the middle:
#
#     x > embed, rows, columns > block 0 > block 1 > overview > block 2 > block 3 > norm, head
#                                   |         '-------- skip ------^         ^
#                                   '----------------- skip -----------------'
def to_tokens(x):
    """(B, C, H, W) -> (b, l, d) in raster order, l = H * W, d = C."""
    return x.flatten(2).transpose(1, 2)

def to_grid(tokens, height, width):
    """(b, l, d) -> (B, C, H, W), C = d; the inverse of to_tokens."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))

class TokenCfC(nn.Module):
    """gain * ParallelCfC: u (b, l, dim), c (b, cond_dim) -> (b, l, dim); expand 0: no CfC."""
    def __init__(self, dim, cond_dim, grid, kernel_size, expand, alpha):
        super().__init__()
        self.grid = grid
        self.cfc = ParallelCfC(dim, cond_dim, kernel_size, expand, alpha) if expand else None
        if expand:
            self.gain = nn.Parameter(torch.full((dim,), 0.5))     # at 0 the CfC would start late

    def forward(self, u, c):
        if self.cfc is None:
            return 0 * u    # DistributedDataParallel needs a gradient, if 0, of what made u
        return self.gain.to(u.dtype) * to_tokens(self.cfc(to_grid(u, *self.grid), c))

class PatchBlock(nn.Module):
    """Scan and CfC side by side, then a feed-forward: x (b, l, dim), c (b, cond_dim) -> x's shape.

        u = AdaLN(x, c);   x = x + Scan(u) + gain * CfC(u, c);   x = x + FeedForward(AdaLN(x, c))
    """
    def __init__(self, dim, cond_dim, grid, mixer, order, kernel_size=5, cfc_expand=1,
                 alpha="liquid", ff_expand=4):
        super().__init__()
        self.norm_mix, self.norm_ff = AdaLN(dim, cond_dim), AdaLN(dim, cond_dim)
        self.scan = Scan(mixer, order[None])
        self.cfc = TokenCfC(dim, cond_dim, grid, kernel_size, cfc_expand, alpha)
        self.ff = nn.Sequential(
            nn.Linear(dim, ff_expand * dim), nn.GELU(), nn.Linear(ff_expand * dim, dim))

    def forward(self, x, c):
        u = self.norm_mix(x, c)
        x = x + (self.scan(u) + self.cfc(u, c))
        return x + self.ff(self.norm_ff(x, c))

class MambaBlock(nn.Module):
    """CfC, then a scan there and back, then CfC: x (b, l, dim), c (b, cond_dim) -> x's shape.

        x = x + gain * CfC(AdaLN(x, c), c);  x = x + Scan(AdaLN(x, c));  x = x + gain * CfC(...)

    The scan averages a path and the same path backwards, so each token hears from both sides.
    """
    def __init__(self, dim, cond_dim, grid, mixer, order, kernel_size=5, cfc_expand=1,
                 alpha="liquid"):
        super().__init__()
        self.norm_in, self.norm_mix, self.norm_out = (AdaLN(dim, cond_dim) for _ in range(3))
        self.cfc_in, self.cfc_out = (
            TokenCfC(dim, cond_dim, grid, kernel_size, cfc_expand, alpha) for _ in range(2))
        self.scan = Scan(mixer, torch.stack([order, order.flip(0)]))

    def forward(self, x, c):
        x = x + self.cfc_in(self.norm_in(x, c), c)
        x = x + self.scan(self.norm_mix(x, c))
        return x + self.cfc_out(self.norm_out(x, c), c)

class Overview(nn.Module):
    """One look at the whole picture: tokens (b, l, dim) in raster order -> the same shape.

        x = x + write(repeat(mix(v))),   v = average(read(norm(x))), 8 numbers in 8 x 8 cells

    States fade, a convolution reaches its neighbours: nothing else brings the far ends of a shape
    together in a small model. mix, of `units`, sees all 8 * 64 numbers. At first it adds 0.
    """
    features, cells = 8, 8
    def __init__(self, dim, grid, units):
        super().__init__()
        self.grid = grid
        # Which tokens lie in a cell: adaptive pooling as a matrix (MPS has not all sizes of it)
        rows, columns = (F.adaptive_avg_pool1d(torch.eye(side), self.cells).T > 0 for side in grid)
        inside = rows[:, None, :, None] & columns[None, :, None, :]              # (8, 8, H/P, W/P)
        self.register_buffer("inside", inside.flatten(2).flatten(0, 1), persistent=False)
        self.norm = nn.LayerNorm(dim)
        self.read = nn.Linear(dim, self.features)
        size = self.features * self.cells**2
        self.mix = nn.Sequential(nn.Linear(size, units), nn.GELU(), nn.Linear(units, size))
        self.write = zeroed(nn.Linear(self.features, dim))

    def forward(self, x):
        u = self.read(self.norm(x))                                              # (b, l, 8)
        inside = self.inside.to(u)
        v = inside @ u / inside.sum(1, keepdim=True)                             # (b, 64, 8)
        v = self.mix(v.mT.flatten(1)).unflatten(1, (self.features, self.cells, self.cells))
        return x + self.write(to_tokens(F.interpolate(v, self.grid)))            # (b, l, dim)

class LiquidPatch(nn.Module):
    """The token model: x (B, C, H, W), t (B,), y (B,) or None -> x's shape.

    patch_size 0 means max(least_patch, shorter side // most_cells). ValueError unless the patch
    size divides every side, and for unknown names of scan or mixer. The output is zero at first.
    """
    block, least_patch, most_cells = PatchBlock, 2, 32
    def __init__(self, image_size, in_channels=3, num_classes=0, dim=256, depth=4, cond_dim=256,
                 patch_size=0, d_state=64, expand=2, headdim=64, scan="zigzag", mixer="mamba2",
                 overview=128, time_scale=1000, **block_options):
        super().__init__()
        size = sides(image_size)
        P = patch_size or max(self.least_patch, min(size) // self.most_cells)
        if any(side % P for side in size):
            raise ValueError(f"image size {image_size}: the patch size, {P}, must divide each side "
                             f"(multiples of {patch_size or self.most_cells} work)")
        self.patch_size, self.grid = P, (size[0] // P, size[1] // P)
        orders = choose("scan", scan, SCANS)(*self.grid)
        make_mixer = choose("mixer", mixer, MIXERS)
        self.condition = Condition(cond_dim, num_classes, time_scale)
        self.embed = nn.Conv2d(in_channels, dim, P, stride=P)
        # Where a token is: one vector for its row, one for its column
        self.rows = nn.Parameter(0.02 * torch.randn(dim, self.grid[0], 1))
        self.columns = nn.Parameter(0.02 * torch.randn(dim, 1, self.grid[1]))
        self.stem = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)     # patches see their neighbours
        # Each block reads along one path. In steps of 13, which visit all but of 13 n, they go
        # 0 5 2 7 4 1 6 3: the first four from four corners, rows and columns in turn.
        self.blocks = nn.ModuleList(
            self.block(dim, cond_dim, self.grid,
                       make_mixer(dim, d_state=d_state, expand=expand, headdim=headdim),
                       orders[13 * i % len(orders)], **block_options)
            for i in range(depth))
        self.overview = Overview(dim, self.grid, overview)            # used after half of them
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth // 2))
        self.norm = AdaLN(dim, cond_dim)
        self.refine = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)   # mends seams between patches
        self.head = zeroed(nn.Conv2d(dim, in_channels * P * P, 1))    # as in §8

    def forward(self, x, t, y=None):
        c = self.condition(t, y)                                      # (B, cond_dim)
        x = self.embed(x) + self.rows + self.columns                  # (B, d, H/P, W/P)
        x = to_tokens(x + self.stem(x))                               # (b, l, d), l = H/P * W/P
        blocks, half, skips = list(self.blocks), len(self.skips), []
        for block in blocks[:half]:
            x = block(x, c)
            skips.append(x)
        x = self.overview(x)
        for block in blocks[half:len(blocks) - half]:                 # one, if their number is odd
            x = block(x, c)
        for block, merge in zip(blocks[len(blocks) - half:], self.skips):
            x = block(full(merge(torch.cat([x, skips.pop()], dim=-1))), c)    # sums stay float32
        x = to_grid(self.norm(x, c), *self.grid)                      # (B, d, H/P, W/P)
        x = self.head(x + self.refine(x))                             # (B, C P P, H/P, W/P)
        return F.pixel_shuffle(x, self.patch_size)                    # (B, C, H, W)

class LiquidMamba(LiquidPatch):
    """The token model with CfC-scan-CfC blocks, made for latents: patches may be single cells."""
    block, least_patch, most_cells = MambaBlock, 1, 16

# ------------------------------------------------------------------------------------------------
# §10  Variants
#
# A table of shapes: arch -> variant -> options of its class (train.py has DEFAULTS for each name).
# From "tiny" up they follow the three documents that this project started from; "nano" is ours.
ARCHS = {"patch": LiquidPatch, "unet": LiquidUNet, "mamba": LiquidMamba}
VARIANTS = {
    "patch": {
        "nano": {"dim": 96, "depth": 3, "cond_dim": 64, "patch_size": 4, "d_state": 16, "expand": 1,
                 "headdim": 48, "kernel_size": 3, "ff_expand": 2, "overview": 256},
        "tiny": {"dim": 256, "depth": 4, "cond_dim": 128},
        "small": {"dim": 384, "depth": 4, "cond_dim": 192},
        "base": {"dim": 512, "depth": 6, "cond_dim": 256},
        "512": {"dim": 512, "depth": 6, "cond_dim": 256},    # base, for 512 pixels
    },
    "unet": {
        "nano": {"channels": (16, 48, 96), "blocks": (1, 1, 1), "cond_dim": 64, "kernel_size": 3,
                 "expand": 1},
        "tiny": {"channels": (64, 128, 256), "blocks": (2, 2, 4), "cond_dim": 256},
        "small": {"channels": (96, 192, 384), "blocks": (2, 3, 6), "cond_dim": 384},
        "base": {"channels": (128, 256, 512), "blocks": (2, 4, 8), "cond_dim": 512},
        "large": {"channels": (128, 256, 512, 768), "blocks": (2, 4, 8, 4), "cond_dim": 512},
    },
    "mamba": {
        "nano": {"dim": 96, "depth": 3, "cond_dim": 64, "d_state": 16, "expand": 1, "headdim": 48,
                 "kernel_size": 3, "overview": 256},
        "tiny": {"dim": 128, "depth": 4, "cond_dim": 128},
        "small": {"dim": 256, "depth": 6, "cond_dim": 128},
        "base": {"dim": 384, "depth": 9, "cond_dim": 256},
    },
}

def create_model(arch, variant, image_size, in_channels=3, num_classes=0, **overrides):
    """A model by name; model.config rebuilds it: create_model(**model.config).

    image_size: the side of x itself (of the latent, for latents), an int or (H, W). overrides:
    any keyword of its class or block. ValueError for names, values and sizes that cannot be.
    """
    model_class = choose("arch", arch, ARCHS)
    config = {"in_channels": in_channels, "num_classes": num_classes, **overrides}
    options = {**choose(f"variant of {arch}", variant, VARIANTS[arch]), **config}
    known = {name: parameter.default for part in (model_class, model_class.block)
             for name, parameter in inspect.signature(part).parameters.items()
             if parameter.default is not parameter.empty}
    for name, value in options.items():
        kind = type(choose(f"option of {arch}", name, known))
        least = 0 if name in ("patch_size", "cfc_expand", "num_classes") else 1
        values = [value] if kind is not tuple else value if type(value) in (tuple, list) else ()
        if not values or any(type(v) is not (str if kind is str else int) for v in values) or (
                kind is not str and min(values) < least):
            takes = {str: "a name", int: f"a whole number from {least} up",
                     tuple: "whole numbers from 1 up"}[kind]
            raise ValueError(f"option {name} takes {takes}, not {value!r}")
    model = model_class(image_size, **options)
    model.config = {"arch": arch, "variant": variant, "image_size": image_size, **config}
    return model

# ------------------------------------------------------------------------------------------------
# §11  Processes: how a picture turns into noise, and what the network learns from it
#
# A process mixes a picture x0 with Gaussian noise, more and more of it as t goes from 0 to 1:
#
#     x_t = alpha(t) * x0 + sigma(t) * noise
#
# The network sees x_t and t and answers with another mixture of x0 and noise; the two give both:
#
#     rectified flow   alpha = 1 - t, sigma = t             learns velocity = noise - x0 = dx_t/dt
#     VP diffusion     alpha^2 + sigma^2 = 1 (a table)      learns noise
#
# Why does a flow draw pictures? Many pairs (x0, noise) pass through the same x at the same t, each
# with its own velocity, and the network cannot know which of them it sees. The answer with the
# least squared error is their mean, the average velocity:
#
#     v(x, t) = E[noise - x0 | x_t = x]
#
# Now let a crowd Z start as pure noise at t = 1 and walk back, everyone by dZ/dt = v(Z, t). It ends
# as the data, for at every t it is spread as the x_t are. To see it, take any smooth function phi:
#
#     d/dt E[phi(x_t)] = E[grad phi(x_t) . (noise - x0)] = E[grad phi(x_t) . v(x_t, t)]
#
# by the chain rule, and then the mean over the pairs that meet at each x. For the crowd the chain
# rule says d/dt E[phi(Z)] = E[grad phi(Z) . v(Z, t)]: how both are spread obeys one linear equation
# (for every phi), from one start at t = 1, and so, v being smooth, has one solution. Nothing in it
# needs x0 and noise to be independent; §13 makes use of that.
#
# But they are, and so nobody walks straight: at t = 1 x is noise alone and tells nothing of x0, so
# v = x - E[x0]. All head for the mean of the data, and turn as x begins to tell. (Pairs go along
# lines that cross. Where they meet there is one v, so paths do not cross: to rewire lines so is to
# "rectify" them.) Steps are straight, so bends need many. For data N(0, 1/4) of one dimension all
# is Gaussian: v = x * covariance of noise - x0 and x_t / variance w of x_t. The covariance is w'/2:
#
#     v(x, t) = x * (t - (1-t)/4) / w,    w = (1-t)^2/4 + t^2,    so x(t) = x(1) * sqrt(w)
#
#     t                      1      3/4    1/2    1/4    0
#     the path of v          1.000  0.760  0.559  0.451  0.500
#     straight to its end    1.000  0.875  0.750  0.625  0.500
#     in one step along v    1.000  0.750  0.500  0.250  0.000
#
# What loss to expect? A new network answers 0, so its first velocity loss is the mean square of
# noise - x0, 1 + E[x0^2] (noise knows nothing of x0, so no cross term), and its first noise loss is
# 1. Neither falls to 0 while pairs meet: there it is how much their targets differ from their mean.
class Process:
    """What processes share. t is (B,) in [0, 1], x0, noise and x_t are (B, C, H, W).

    A subclass defines alpha_sigma(t), target(x0, noise, t), split(x_t, t, output) -> (x0_hat,
    noise_hat), and whether its network `predicts` "velocity" (exactly dx_t/dt) or "noise".
    """
    def times(self, steps):
        """(steps,): the t at which a sampler asks the network: 1, ..., 1 / steps."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]

    def interpolate(self, x0, noise, t):
        """x_t = alpha(t) * x0 + sigma(t) * noise."""
        alpha, sigma = self.alpha_sigma(t)
        return per_picture(alpha, x0) * x0 + per_picture(sigma, x0) * noise

    def loss(self, model, x0, y=None, t=None, noise=None, reduction="mean"):
        """(mean squared error of the network's answer, its guess x0_hat of x0, t).

        t uniform in [0, 1), noise standard normal unless given; reduction "none": one error each.
        """
        t = torch.rand(len(x0), device=x0.device, dtype=full(x0).dtype) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        x_t = self.interpolate(x0, noise, t)
        output = full(model(x_t, t, y))
        error = (output - self.target(x0, noise, t)).square().flatten(1).mean(1)    # (B,)
        x0_hat, _ = self.split(x_t, t, output)
        return (error.mean() if reduction == "mean" else error), x0_hat, t

class RectifiedFlow(Process):
    """The straight path x_t = (1 - t) * x0 + t * noise; the network predicts the velocity.

    Source: Liu et al. (2023), "Flow Straight and Fast" (there with t = 1 at the data).
    """
    predicts = "velocity"
    def alpha_sigma(self, t):
        """(1 - t, t), each (B,)."""
        return 1 - t, t

    def target(self, x0, noise, t):
        """The velocity dx_t/dt = noise - x0, the same at all t."""
        return noise - x0

    def split(self, x_t, t, output):
        """(x0_hat, noise_hat) from a velocity v: x_t - t * v and x_t + (1 - t) * v."""
        t = per_picture(t, x_t)
        return x_t - t * output, x_t + (1 - t) * output

class VPDiffusion(Process):
    """The variance-preserving process of DDPM; the network predicts the noise.

    Its steps, x -> sqrt(1 - beta) x + sqrt(beta) noise, keep a variance of 1; beta grows linearly.
    alpha(t)^2 is alpha_bar[round(t * (num_timesteps - 1))], the running product of 1 - beta, so t =
    0 is not quite data, t = 1 not quite noise. Source: Ho et al. (2020), "Denoising Diffusion ...".
    """
    predicts = "noise"
    def __init__(self, num_timesteps=1000, beta_start=1e-4, beta_end=0.02):
        beta = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        self.num_timesteps = num_timesteps
        self.alpha_bar = torch.cumprod(1 - beta, 0)    # in float64: a product of 1,000 factors
        self.tables = {}       # its roots, as each device and precision needs them

    def alpha_sigma(self, t):
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)) at t, each (B,)."""
        t = full(t)
        if (t.device, t.dtype) not in self.tables:    # kept: to move it would wait for the device
            roots = torch.stack([self.alpha_bar, 1 - self.alpha_bar]).sqrt()         # (2, T)
            self.tables[t.device, t.dtype] = roots.to(t.dtype).to(t.device)
        index = torch.round(t * (self.num_timesteps - 1)).long()
        return self.tables[t.device, t.dtype][:, index].unbind()

    def target(self, x0, noise, t):
        """The noise."""
        return noise

    def split(self, x_t, t, output):
        """(x0_hat, noise_hat) from predicted noise: x0_hat = (x_t - sigma * noise_hat) / alpha.

        At t = 1 alpha is 0.006: an error in the noise comes back 160 times larger in x0_hat.
        """
        alpha, sigma = (per_picture(v, x_t) for v in self.alpha_sigma(t))
        return (x_t - sigma * output) / alpha, output

    def times(self, steps):
        """(steps,): evenly spaced indices of the table, T - 1 first, as t; ValueError for > T."""
        T = self.num_timesteps
        if steps > T:
            raise ValueError(f"{steps} steps, but this process has only {T}: ask for at most {T}")
        indices = torch.tensor([round(T - i * T / steps) - 1 for i in range(steps)])
        return indices.double() / max(T - 1, 1)

# name -> class: the paths that a model can learn; t = 0 is data, t = 1 noise, ever more in between
PROCESSES = {"flow": RectifiedFlow, "diffusion": VPDiffusion}

# ------------------------------------------------------------------------------------------------
# §12  Physics-informed penalties
#
# The name promises too much: a physics-informed loss proper punishes the residual of an equation,
# and pictures obey none. These are image priors borrowed from physics: a smoothness energy, a
# conserved quantity, a spectrum. Each looks at x0_hat, the network's guess, in training only.
#
# They must stay weak. x0_hat is at best E[x0 | x_t], at high noise rightly a blur, and what is true
# of pictures (sharp edges) is not true of their mean (Jensen's gap). So every picture is weighted
# by alpha(t)^2, its power in x_t; and they start slowly, as x0_hat is no picture at first.
def picture_mean(x):
    """(B, ...) -> (B,): the mean over all but the first axis; 0 where there is nothing."""
    return full(x).flatten(1).sum(1) / max(x.shape[1:].numel(), 1)

def total_variation(x):
    """mean|dx| + mean|dy|: (B, C, H, W) -> (B,).

    Rewards flat areas with sharp edges between them. Bias: washes out texture and fine lines, and
    lowers contrast. Source: Rudin, Osher & Fatemi (1992); anisotropic: Esedoglu & Osher (2004).
    """
    dx, dy = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    return picture_mean(dx.abs()) + picture_mean(dy.abs())

def laplacian_energy(x):
    """Mean square of the 5-point Laplacian on the interior: (B, C, H, W) -> (B,).

    Rewards smooth shading (a linear ramp costs nothing). Bias: blurs edges, which cost it most.
    """
    inner = x[..., 1:-1, 1:-1]
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return picture_mean((around - 4 * inner).square())

def gradient_loss(p, q):
    """mean|dx p - dx q| + mean|dy p - dy q|: two (B, C, H, W) -> (B,).

    Rewards edges in the right place. Bias: blind to overall brightness; the best guess is a median,
    so where an edge is uncertain there is none, instead of a soft one.
    """
    return total_variation(p - q)

def intensity_loss(p, q):
    """(mean p - mean q)^2 for each channel, averaged: two (B, C, H, W) -> (B,).

    Rewards keeping the amount of light of each colour, the conserved quantity. Bias: none, as the
    best x0_hat has the right mean anyway.
    """
    return picture_mean((p.mean((2, 3)) - q.mean((2, 3))).square())

def spectral_loss(p, q):
    """Mean (log(P_p + 1e-4) - log(P_q + 1e-4))^2, P = |rfft2|^2 / (H W): two (B, C, H, W) -> (B,).

    Rewards as much detail at each scale as the original has. Bias: blind to where the detail is, so
    noise of the right strength satisfies it; and borders count, as to the transform the left one is
    the right one's neighbour. The 1e-4 keeps empty frequencies from dominating.
    """
    def log_power(x):
        return torch.log(torch.fft.rfft2(full(x)).abs().square() / x.shape[2:].numel() + 1e-4)
    return picture_mean((log_power(p) - log_power(q)).square())

# name -> term(x0_hat, x0) -> (B,), >= 0, any C, H, W; 0 where both are one plain grey
PHYSICS = {
    "tv": lambda p, q: total_variation(p), "laplacian": lambda p, q: laplacian_energy(p),
    "gradient": gradient_loss, "intensity": intensity_loss, "spectral": spectral_loss}

class PhysicsLoss:
    """The weighted sum of the penalties: (x0_hat, x0, signal, step) -> (total, parts).

        total = min(1, step / warmup_steps) * sum over terms of weight * mean(signal^2 * term)

    signal (B,) = alpha_sigma(t)[0]; parts: the plain batch mean of each term, a dict of scalars.
    weights: a dict of names in PHYSICS, ValueError for others. The idea of weighting by noise level
    is that of Bastek, Sun & Kochmann (2025), "Physics-Informed Diffusion Models".
    """
    DEFAULT = {"tv": 0.01, "spectral": 0.01, "gradient": 0.001, "intensity": 0.001,  # noqa: RUF012
               "laplacian": 0.0}    # 0: only watched

    def __init__(self, weights=None, warmup_steps=500):
        self.weights = dict(self.DEFAULT if weights is None else weights)
        self.terms = {name: choose("physics term", name, PHYSICS) for name in self.weights}
        self.warmup_steps = warmup_steps

    def __call__(self, x0_hat, x0, signal, step):
        p, q, signal = full(x0_hat), full(x0), full(signal)
        values = {name: term(p, q) for name, term in self.terms.items()}             # (B,) each
        total = p.new_zeros(())
        for name, value in values.items():
            if self.weights[name]:          # a term that is only watched stays out of the gradient
                total = total + self.weights[name] * (signal.square() * value).mean()
        warmup = min(1, step / self.warmup_steps) if self.warmup_steps else 1
        return warmup * total, {name: value.detach().mean() for name, value in values.items()}

# ------------------------------------------------------------------------------------------------
# §13  Samplers: from noise to picture
#
# Start from noise at t = 1 and walk to t = 0 in a few steps, each from a time t to the next time s.
# A velocity is the slope of the path (towards noise; s - t < 0 turns it round), so any method for
# ordinary differential equations will do:
#
#     Euler   x_s = x_t + (s - t) * v(x_t, t)                      error ~ 1 / steps
#     Heun    the mean of the slopes at both ends of that step     error ~ 1 / steps^2, 2 calls each
#
# Predicted noise is not a slope. DDIM takes the answer apart into x0_hat and noise_hat, and mixes
# them anew for time s (alpha_s is alpha(s)). The noise in x_s must have the variance sigma_s^2; a
# part of it, `variance`, may be fresh, and the rest is noise_hat. At eta = 1 that part is how far
# x_s is uncertain if x_t and x0 are known; the last factor is the noise that s to t brought in:
#
#     x_s = alpha_s * x0_hat + sqrt(sigma_s^2 - variance) * noise_hat + sqrt(variance) * fresh noise
#     variance = eta^2 * (sigma_s / sigma_t)^2 * (sigma_t^2 - (alpha_t / alpha_s)^2 * sigma_s^2)
#
# On the straight path with eta = 0 this IS the Euler step: (1 - s)(x - t v) + s(x + (1 - t) v)
# = x + (s - t) v. All three take (model, process, noise, steps, y, cfg_scale, callback) and call
# callback(i, x_t, x0_hat) once in every step before it is taken, i = 0 ... steps - 1.
def everywhere(t, x):
    """The time t, a number, for every picture of x: (B,), at least float32."""
    return torch.full((len(x),), t, device=x.device, dtype=full(x).dtype)

def guided(model, x, t, y, cfg_scale):
    """The network's answer for x (B, C, H, W) at t (B,), with classifier-free guidance.

    unconditional + cfg_scale * (conditional - unconditional): scale 1 is exactly the conditional
    model and 0 the unconditional one, one pass each; others run both (of a model, at once). Source:
    Ho & Salimans (2022), "Classifier-Free Diffusion Guidance"; their w is cfg_scale - 1.
    """
    if y is None or cfg_scale == 0:
        return model(x, t, None)
    if cfg_scale == 1:
        return model(x, t, y)
    if hasattr(model, "config"):
        null = torch.full_like(y, model.config["num_classes"])
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, y]))
        unconditional, conditional = both.chunk(2)
    else:                             # a plain function, whose null label is not known: two passes
        unconditional, conditional = model(x, t, None), model(x, t, y)
    return torch.lerp(unconditional, conditional, cfg_scale)    # the formula above

def walk(process, steps, follows=("velocity", "noise")):
    """[(i, t, s), ...], from t = 1 to s = 0; ValueError unless steps >= 1 and it can follow."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if process.predicts not in follows:
        raise ValueError(f"this sampler follows a velocity, but {type(process).__name__} predicts "
                         f"{process.predicts}: use ddim")
    times = [*process.times(steps).tolist(), 0.0]
    return list(zip(range(steps), times, times[1:]))

@torch.no_grad()
def euler_sample(model, process, noise, steps, y=None, cfg_scale=1.0, callback=None):
    """noise (B, C, H, W) -> x0, by `steps` Euler steps (one call of the model each).

    ValueError for steps < 1 and for a process that does not predict velocity.
    """
    x = noise
    for i, t, s in walk(process, steps, euler_sample.follows):
        velocity = guided(model, x, everywhere(t, x), y, cfg_scale)
        if callback:
            callback(i, x, process.split(x, everywhere(t, x), velocity)[0])
        x = x + (s - t) * velocity
    return x

@torch.no_grad()
def heun_sample(model, process, noise, steps, y=None, cfg_scale=1.0, callback=None):
    """As euler_sample, but by Heun steps, the explicit trapezoidal rule (two calls each)."""
    x = noise
    for i, t, s in walk(process, steps, heun_sample.follows):
        velocity = guided(model, x, everywhere(t, x), y, cfg_scale)
        if callback:
            callback(i, x, process.split(x, everywhere(t, x), velocity)[0])
        x_s = x + (s - t) * velocity
        x = x + (s - t) * (velocity + guided(model, x_s, everywhere(s, x), y, cfg_scale)) / 2
    return x

@torch.no_grad()
def ddim_sample(model, process, noise, steps, y=None, cfg_scale=1.0, callback=None, eta=0.0,
                generator=None, clip=None):
    """noise (B, C, H, W) -> x0, by `steps` DDIM steps, for either process.

    eta 0: no new noise; eta 1: as much as DDPM's sampler draws, from `generator` (or a list, one a
    picture), seeded otherwise than noise. clip: larger values of |x0_hat| are cut to it; 1 for
    pictures. At small alpha a little error in the predicted noise is a huge one in x0_hat.
    ValueError for steps and eta. Source: Song et al. (2021), "Denoising Diffusion Implicit Models".
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 (no new noise) and 1 (DDPM), not {eta}")
    x, path = noise, walk(process, steps)
    alphas, sigmas = (v.tolist() for v in process.alpha_sigma(process.times(steps)))
    alphas, sigmas = alphas + [1.0], sigmas + [0.0]    # end at the picture, whatever t = 0 is
    for i, t, _ in path:
        (alpha_t, alpha_s), (sigma_t, sigma_s) = alphas[i:i + 2], sigmas[i:i + 2]
        output = guided(model, x, everywhere(t, x), y, cfg_scale)
        x0_hat, noise_hat = process.split(x, everywhere(t, x), output)
        if clip is not None:
            x0_hat = x0_hat.clamp(-clip, clip)
            noise_hat = (x - alpha_t * x0_hat) / sigma_t    # both must still add up to x
        if callback:
            callback(i, x, x0_hat)
        added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        variance = (eta * sigma_s / sigma_t) ** 2 * added
        x = alpha_s * x0_hat + math.sqrt(max(0.0, sigma_s**2 - variance)) * noise_hat
        if variance > 0:
            each = generator if isinstance(generator, list) else [generator]
            fresh = [torch.randn(len(x) // len(each), *x.shape[1:], generator=g, dtype=x.dtype,
                                 device=g.device if g else x.device) for g in each]
            x = x + math.sqrt(variance) * torch.cat(fresh).to(x.device)
    return x

# What the tests hold each to: order of convergence, calls of the model a step, what it can follow
euler_sample.order, euler_sample.calls, euler_sample.follows = 1, 1, ["velocity"]
heun_sample.order, heun_sample.calls, heun_sample.follows = 2, 2, ["velocity"]
ddim_sample.order, ddim_sample.calls, ddim_sample.follows = 1, 1, ["velocity", "noise"]
SAMPLERS = {"euler": euler_sample, "heun": heun_sample, "ddim": ddim_sample}  # by name

# Reflow: fewer steps. Paths bend because each noise was given a picture by chance (§11). But the
# flow leads every noise z1 to a picture z0 of its own, spread as the data (nearly), and a second
# flow is trained on the straight lines between them:
#
#     pairs by chance        the flow               its own pairs (train.py --reflow)
#     noise -.     .- x0     z1 -.   .- z0          z1 ----------- z0
#              > <                )=(
#     noise -'     '- x0     z1 -'   '- z0          z1 ----------- z0
#
# Why is one step enough then? z0 is a function of z1, so already at t = 1 the average velocity is
# z1 - z0 itself, where by chance it was z1 - E[x0]. Several steps end there, too, unless lines meet
# on the way, as in many dimensions some may. How much a flow bends is measured on its own path z_t
# from z1, which ends in z0, as the variance of v, whose mean is z1 - z0:
#
#     S = mean over t, noises and numbers of ((z1 - z0) - v(z_t, t))^2
@torch.no_grad()
def straightness(model, process, noise, steps, y=None):
    """S, () >= 0, along the Euler paths of `steps` steps from noise (B, C, H, W).

    0 if and only if the velocity is constant along each. ValueError for steps < 2, as one step is
    always straight, and unless process is a RectifiedFlow. Source: Liu et al. (2023), their S(Z).
    """
    if steps < 2 or not isinstance(process, RectifiedFlow):
        raise ValueError(f"straightness needs a RectifiedFlow and at least 2 steps, not {steps}")
    z, velocities = noise, []
    for _, t, s in walk(process, steps):
        velocities.append(full(model(z, everywhere(t, z), y)))
        z = z + (s - t) * velocities[-1]
    return torch.stack([(noise - z - v).square().mean() for v in velocities]).mean()

# ------------------------------------------------------------------------------------------------
# §14  EMA and checkpoints
class EMA:
    """An average of the weights over many steps: calmer than the latest; samples come from it.

        average = average + (1 - decay) * (weight - average)           after every step

    .update(model) does that, and .model is the average. After n updates the decay is min(decay,
    (1 + n) / (10 + n)): a fixed 0.9999 would remember the random start for 10,000 steps.
    """
    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model, finite=True):
        """The formula, for weights that are finite. `finite` False, a bool or (): no change.

        _foreach: for all weights at once, a few launches on a GPU instead of one for each.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, weights = list(self.model.parameters()), list(model.parameters())
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, (1 - decay) * finite)
        torch._foreach_add_(averages, change)
        for average, value in zip(self.model.buffers(), model.buffers()):
            average.copy_(value)

# From here on plumbing: files that are written whole and read safely, and an autoencoder.
def write_whole(path, fill):
    """fill(file), on a temporary file that is then renamed: all of the new file, or the old one."""
    path = Path(path).resolve()    # where a link leads to
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())    # on the disk, not only on its way, before it gets its name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def save_checkpoint(path, state):
    """Saves a state of tensors, numbers, strings, lists and dicts, whole or not at all."""
    whole = io.BytesIO()    # torch.save reports a full disk obscurely, a plain write plainly
    torch.save(state, whole)
    write_whole(path, lambda file: file.write(whole.getbuffer()))

def load_checkpoint(path):
    """The state that save_checkpoint (or torch.save) wrote, on the CPU.

    FileNotFoundError for a missing file; ValueError for one that is damaged or holds more than
    plain data: code in a checkpoint is refused, never executed.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        raise    # they say so themselves
    except Exception as error:    # noqa: BLE001 - torch reports damage as many different types
        raise ValueError(f"{path}: refused ({type(error).__name__}): it is damaged, cut short, or "
                         "holds more than the plain data that torch.save writes") from None

# ------------------------------------------------------------------------------------------------
# §15  TAESD: pictures as small latents
#
# A 512-pixel picture has 786,432 numbers; most of them can be guessed from the others. An
# autoencoder keeps an eighth of each side: the generator then works on latents of 64 x 64, and the
# decoder paints the detail back. TAESD is one that is small enough to read: 3x3 convolutions, 64
# wide, 2.4 to 2.7 million weights. Its own [0, 1] for pictures stays inside the class.

TAESD_URL = ("https://raw.githubusercontent.com/madebyollin/taesd/"
             "5cccb12dc72074a4be35680c3b108548a7c69978")
TAESD_FILES = {    # name -> git blob ids of its encoder and its decoder at that commit
    "taesd": "65f85afc58480128926e52086fbf0fdc61c2c9b5 5915a429fc08eba4adf62bf74f96705b8b0d5c1f",
    "taesdxl": "56dfb7ed13ac774bc28dcd981f072f26eb7c5e99 477bc7e9604f418029508e72ac8719bb9d048291",
    "taesd3": "9678667c0e3e4b648a36daaa8094b1732ae4fb67 7943be72a9151d0b330c5d8a4fbb885d889b60a1",
    "taef1": "d8ee13fa3a1ff9a92643669d718e4b0827daafa5 b772c9c4e6d3b79d06b277be59296389591783d3",
    "taef2": "8d738aba02f7ba9d156712489322dc5c43d5db1c f4da1ec48cb805b5ee8deb22cfad03f48fe52f64",
}

def conv(dim_in=64, dim_out=64, **options):
    """A 3x3 convolution that keeps the sides, but for stride 2."""
    return nn.Conv2d(dim_in, dim_out, 3, padding=1, **options)

class TAESDBlock(nn.Module):
    """x -> ReLU(three convolutions(x) + x), (B, 64, H, W); pooled (taef2): first x + pool(x)."""
    def __init__(self, pooled=False):
        super().__init__()
        self.conv = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
        self.pool = nn.Sequential(
            nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU(),
            nn.Conv2d(256, 64, 1, bias=False)) if pooled else None

    def forward(self, x):
        x = x + self.pool(x) if self.pool else x
        return F.relu(self.conv(x) + x)

class TAESD(nn.Module):
    """The tiny autoencoder: pictures (B, 3, H, W) <-> latents (B, latent_channels, H/8, W/8).

    taesd and taesdxl have 4 latent channels, taesd3 and taef1 16, taef2 32 and pooled blocks. The
    keys of encoder.state_dict() and decoder.state_dict() are those of the published files. Weights
    are frozen. Source: Ollin Boer Bohan, github.com/madebyollin/taesd.
    """
    def __init__(self, latent_channels=4, pooled=None):
        super().__init__()
        self.latent_channels = latent_channels
        pooled = latent_channels == 32 if pooled is None else pooled
        def blocks(pooled=False):
            return [TAESDBlock(pooled) for _ in range(3)]
        def half():
            return conv(stride=2, bias=False)
        def double():
            return [nn.Upsample(scale_factor=2), conv(bias=False)]
        self.encoder = nn.Sequential(
            conv(3), TAESDBlock(), half(), *blocks(), half(), *blocks(), half(), *blocks(pooled),
            conv(64, latent_channels))
        self.decoder = nn.Sequential(             # latents were within [-3, 3] in its training
            ScaledTanh(3, 1 / 3), conv(latent_channels), nn.ReLU(), *blocks(pooled), *double(),
            *blocks(), *double(), *blocks(), *double(), TAESDBlock(), conv(64, 3))
        self.requires_grad_(False)

    def encode(self, images):
        """Pictures in [-1, 1] -> latents. ValueError unless 8 divides both sides."""
        height, width = images.shape[2:]
        if height % 8 or width % 8:
            raise ValueError(f"{height}x{width} pictures have no latents: 8 must divide both sides")
        return self.encoder((images + 1) / 2)

    def decode(self, latents):
        """Latents -> pictures, clamped to [-1, 1]."""
        return self.decoder(latents).clamp(0, 1) * 2 - 1

    @classmethod
    def load(cls, encoder_path, decoder_path):
        """A TAESD from two published files, made as their weights say; float16 becomes float32.

        FileNotFoundError or ValueError, naming the file, for one that is missing, damaged or made
        for something else; nothing inside a file is ever executed.
        """
        encoder, decoder = load_checkpoint(encoder_path), load_checkpoint(decoder_path)
        last = encoder.get("14.weight") if isinstance(encoder, dict) else None
        if getattr(last, "ndim", 0) != 4:
            raise ValueError(f"{encoder_path}: not a TAESD's encoder (no convolution 14.weight)")
        taesd = cls(len(last), pooled=any(".pool." in str(key) for key in encoder))
        for path, weights, module in ((encoder_path, encoder, taesd.encoder),
                                      (decoder_path, decoder, taesd.decoder)):
            try:
                module.load_state_dict({key: value.float() for key, value in weights.items()})
            except (RuntimeError, AttributeError) as error:
                reason = str(error).splitlines()[-1].strip()
                raise ValueError(f"{path}: does not fit: {reason}") from None
        return taesd.eval()

    @classmethod
    def pretrained(cls, name="taesd", cache_dir=None):
        """Downloads the two files of a family member once, checks them, and loads them.

        cache_dir None: "liquidflow" in torch.hub's folder. ValueError for a wrong git blob id,
        ConnectionError where they cannot be fetched: naming files, addresses and the folder.
        """
        folder = Path(cache_dir or Path(torch.hub.get_dir()) / "liquidflow")
        blob_ids = choose("autoencoder", name, TAESD_FILES).split()
        paths = [folder / f"{name}_{part}.pth" for part in ("encoder", "decoder")]
        urls = [f"{TAESD_URL}/{path.name}" for path in paths]
        for path, url, blob_id in zip(paths, urls, blob_ids):
            try:
                data = path.read_bytes() if path.exists() else urllib.request.urlopen(
                    url, timeout=30).read()
            except (OSError, http.client.HTTPException) as error:
                raise ConnectionError(f"cannot get {name} ({error}); download {urls[0]} and "
                                      f"{urls[1]} and put them into {folder}") from None
            if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != blob_id:
                raise ValueError(f"{path if path.exists() else url}: not the published file (its "
                                 f"git blob id is not {blob_id}); remove it and try again")
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda file, data=data: file.write(data))
        return cls.load(*paths)

# ------------------------------------------------------------------------------------------------
# §16  The tour: python liquidflow.py
# CLAIMS: the sizes that our sources claim for each variant, and at how many pixels
CLAIMS = {
    "patch tiny": ("5.9M", 128), "patch small": ("13.7M", 128), "patch base": ("37.6M", 256),
    "patch 512": ("38.1M", 512), "unet tiny": ("8M, 23M", 256), "unet small": ("25M, 69M", 256),
    "unet base": ("65M, 154M", 512), "unet large": ("120M", 512), "mamba tiny": ("2M", 16),
    "mamba small": ("8M", 16), "mamba base": ("30M", 16)}

def tour():
    """Walks through the sections, and computes the examples that stand in their comments."""
    torch.manual_seed(0)
    def gap(a, b):
        return f"{(a - b).abs().max().item():.1e}"
    def row(values):
        return " ".join(f"{v:.3g}" for v in torch.as_tensor(values).flatten().tolist())
    x, c, t = torch.randn(4, 48, 8, 8), torch.randn(4, 64), torch.tensor([1.0, 0.501, 0.5, 0.0])
    print(f"§1  per_picture: {tuple(t.shape)} -> {tuple(per_picture(t, x).shape)}, to multiply x")
    print(f"§2  t = 0.5 and 0.501 as clock hands: {gap(*sinusoidal(t[1:3], 64))} apart, not 0.001")
    print(f"§3  new AdaLN - norm: {gap(AdaLN(48, 64)(x, c), F.group_norm(x, 24, eps=1e-6))}")
    neuron = torch.tensor([0, 1, 2, 1, 1], dtype=torch.float64)          # x0, f, A, tau and t
    errors = [gap(ltc_ode(*neuron, steps), ltc_closed_form(*neuron)) for steps in (4, 8, 16)]
    print(f"§4  LTC in 4, 8, 16 Runge-Kutta steps, error: {', '.join(errors)}, about a 16th each")
    state = CfCCell(3, 5)(1e6 * torch.randn(4, 3), torch.randn(4, 5), t)
    print(f"    CfC cell, inputs around 1e6: |state| up to {state.abs().max():.3f}, never above 1\n"
          f"    ts = 1/4, 1, 4 keep alpha = {row(0.5 ** torch.tensor([0.25, 1, 4]))} of x")
    x, ones = torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    three = x, torch.full((1, 3, 1), math.log(0.5)), ones, ones
    for name, y in (("loop", ssd_sequential(*three)), ("matrix", ssd_quadratic(*three)),
                    ("chunks", ssd_chunked(*three, chunk_size=2))):
        print(f"§5  x = 1 2 3, decay 1/2, by {name:<6}: y = {row(y[0])}")
    inputs = [torch.rand(2, 300, *s, dtype=torch.float64) for s in ((4, 8), (4,), (2, 16), (2, 16))]
    inputs[1] = -inputs[1]
    y = ssd_sequential(*inputs)[0]
    print(f"    300 random tokens: matrix - loop {gap(ssd_quadratic(*inputs)[0], y)}, "
          f"chunks - loop {gap(ssd_chunked(*inputs)[0], y)}, rounding")
    u, other, mixer = torch.randn(2, 50, 32), torch.randn(2, 50, 32), Mamba2(32, headdim=16)
    moved = gap(mixer(u)[:, :30], mixer(torch.cat([u[:, :30], other[:, 30:]], dim=1))[:, :30])
    print(f"§6  Mamba-2: a change from token 30 on moves those before by {moved}: it is causal")
    for name, order in zip(("top left, rows", "top left, columns", "top right, columns"),
                           zigzag_orders(2, 3)[[0, 1, 3]]):
        print(f"§7  2 x 3 from {name:<18}  order {row(order)}  inverse {row(inverse_order(order))}")
    pictures = torch.rand(64, 3, 32, 32) * 2 - 1
    for section, arch in ("§8 ", "unet"), ("§9 ", "patch"):
        model = create_model(arch, "nano", 32)
        flow, diffusion = (p().loss(model, pictures)[0] for p in (RectifiedFlow, VPDiffusion))
        print(f"{section} new {arch} nano, first losses: flow {flow:.3f} (§11: 1 + E[x0^2] = "
              f"{1 + pictures.square().mean():.3f}), diffusion {diffusion:.3f} (1)")
    # For data N(0, 1/4) the best velocity is known (§11), and paths end at noise / 2
    def velocity(x, t, y=None):
        t = per_picture(t, x)
        return x * (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2)
    flow, one, path = RectifiedFlow(), torch.ones(1, 1, 1, 1, dtype=torch.float64), []
    euler_sample(velocity, flow, one, 4000, callback=lambda i, x, _: path.append(x))
    print(f"§11 data N(0, 1/4): from 1 v leads over {row(torch.cat(path[1000::1000]))} to 0.5, a "
          f"curve; one step leads to {row(euler_sample(velocity, flow, one, 1))}, the mean")
    values = {name: row(term(pictures, 0 * pictures).mean()) for name, term in PHYSICS.items()}
    print(f"§12 penalties, random pixels for grey: {', '.join(map(' '.join, values.items()))}")
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for name, sampler in SAMPLERS.items():
        errors = [gap(sampler(velocity, flow, noise, steps), noise / 2) for steps in (16, 32, 64)]
        print(f"§13 {name:<5} 16, 32, 64 steps, error: {', '.join(errors)}: order {sampler.order}")
    # v before, and after, when z0 is z1 / 2, or z1's sign; for data -1 or 1 E[x0 | x_t] is a tanh
    for data, *flows in (
            ("N(0, 1/4)", velocity, lambda x, t, y: x / (1 + t[0])),
            ("-1 or 1", lambda x, t, y: (x - torch.tanh((1 - t[0]) * x / t[0] ** 2)) / t[0],
             lambda x, t, y: (x - x.sign()) / t[0])):
        before, after = (straightness(v, flow, one, 4000) for v in flows)
        print(f"    S from z1 = 1, data {data:<9}: {before:.3f}, of pairs (z1, z0) {after:.3f}")
    ema = EMA(mixer, 0.999)
    ema.update(zeroed(copy.deepcopy(mixer)))
    print(f"§14 the first average keeps {row((ema.model.D / mixer.D)[0])} of the random start")
    print(f"§15 TAESD: pictures (64, 3, 32, 32) -> latents {tuple(TAESD().encode(pictures).shape)}")
    print("\n§10 variant    size  parameters  claimed")
    for arch, variants in VARIANTS.items():
        for variant in variants:
            claim, size = CLAIMS.get(f"{arch} {variant}", ("new here", 32))
            with torch.device("meta"):               # shapes without memory: enough for counting
                model = create_model(arch, variant, size, 4 if arch == "mamba" else 3)
            count = sum(p.numel() for p in model.parameters())
            print(f"{arch + ' ' + variant:<13} {size:>5} {count:>11,}  {claim}")

if __name__ == "__main__":
    tour()
