"""Frozen values that passes exchange: sites, misses, edits, plans and layouts. None holds a tensor or a node."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch

Dim: TypeAlias = int | sympy.Expr
FULL = frozenset(("sae_full", "sae_log"))
"""Families of edits behind all others at a value."""
ROWS = "steer_rows"
SCALE = "steer_scale"
GAIN = "steer_gain"
DECODE = "steer_decode"
SLOT = "steer_slot"
CAPTURE = "steer_capture"
"""Buffer names in every instrumented graph: row of each token (T,) int32, scale of each row (R,) fp32, gain of the
dynamic tier for each token (T,) fp32 (0 in prefill), 1 for each token that is decoded and 0 in prefill (T,) fp32, the
line of a sequence's memory for its last token and 0 for others (T,) int32, and of packed captures the row that each
token goes to, -1 for none, beside its group (T, 2) int32."""


def bank_name(index: int) -> str:
    """Buffer name of a bank."""
    return f"steer_bank_{index}"


def slot_name(bank: int, index: int) -> str:
    """Buffer name of one site's part of a bank, where graphs take the parts one by one."""
    return f"{bank_name(bank)}_{index}"


@dataclass(frozen=True)
class HookSchema:
    """What one row of a hook is, whatever the graph: what is steered and captured of one token at one layer.

    Attributes:
        width: numbers of a row.
        logical_shape: the row's own shape, of ``width`` numbers: ``(H,)``, or ``(m, H)`` where m streams lie one after
            another.
    """

    hook: str
    layer: int
    width: int
    dtype: torch.dtype
    logical_shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.hook}"

    def text(self) -> str:
        """One line: ``layers.3.post_block : bf16[4096]``."""
        return f"{self.name} : {dtype_text(self.dtype)}[{', '.join(map(str, self.logical_shape))}]"


@dataclass(frozen=True)
class Site:
    """One value of the residual stream (or of a branch) in one graph.

    Attributes:
        node: name of the FX node that holds the value.
        width: size of the last dimension.
        shape: leading dimensions, ints or sympy expressions, last dimension excluded.
        layout: ``batch_first`` (B, T, H), ``time_first`` (T, B, H), ``flat`` (B*T, H) or ``streams`` (B, T, m, H) with
            width m*H.
        users: names of the nodes whose reads an edit redirects; ``None`` means every later read.
        skip_users: of these, the reads on the skip path (what ``placement="after_norm"`` redirects).
        row: shape of a row where it has more dimensions than one, such as (m, H) of parallel streams.
    """

    layer: int
    hook: str
    node: str
    width: int
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    layout: str
    users: tuple[str, ...] | None = None
    skip_users: tuple[str, ...] = ()
    row: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.hook}"

    @property
    def schema(self) -> HookSchema:
        """What a row of this site is."""
        return HookSchema(self.hook, self.layer, self.width, self.dtype, self.row or (self.width,))

    def text(self) -> str:
        """One line: ``layers.3.post_block = add_7 : bf16[s0, s1, 4096] batch_first``."""
        dims = ", ".join(str(d) for d in (*self.shape, self.width))
        return f"{self.name} = {self.node} : {dtype_text(self.dtype)}[{dims}] {self.layout}"


@dataclass(frozen=True)
class Miss:
    """Why a hook has no value. ``layer`` is None when the reason holds for the whole graph."""

    layer: int | None
    hook: str
    reason: str
    near: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"layers.{'*' if self.layer is None else self.layer}.{self.hook}"

    def text(self) -> str:
        near = f" (nearest: {', '.join(self.near)})" if self.near else ""
        return f"{self.name} : {self.reason}{near}"


@dataclass(frozen=True)
class SiteTable:
    """Every site of a graph and the reason for each hook without a value. ``layers`` are the block numbers."""

    sites: tuple[Site, ...] = ()
    misses: tuple[Miss, ...] = ()
    layers: tuple[int, ...] = ()
    partial: bool = False
    """Whether the graph is one of several of a model (a graph break cut it)."""
    unnumbered: bool = False
    """Whether the graph writes a stream whose layer numbers are unknown."""

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def find(self, hook: str, layer: int) -> Site | Miss:
        """The site, or the miss that says why there is none."""
        for site in self.sites:
            if site.hook == hook and site.layer == layer:
                return site
        for miss in self.misses:
            if miss.hook in (hook, "*") and miss.layer in (layer, None):
                return miss
        if layer not in self.layers:
            span = f"layers {self.layers[0]} to {self.layers[-1]}" if self.layers else "no layers"
            return Miss(layer, hook, f"the graph has {span}")
        if hook.startswith("mhc_") and not any(s.hook.startswith("mhc_") for s in self.sites):
            return Miss(layer, hook, "the model has one residual stream, and this hook is of parallel ones")
        have = sorted({s.hook for s in self.sites if s.layer == layer})
        return Miss(layer, hook, f"this block has no such value; it has {', '.join(have) or 'none'}")

    def schemas(self) -> tuple[HookSchema, ...]:
        """What a row of each site is."""
        return tuple(site.schema for site in self.sites)

    def where(self, keep: Callable[[Site], bool]) -> SiteTable:
        """The table with only the sites that ``keep`` accepts."""
        return SiteTable(tuple(s for s in self.sites if keep(s)), self.misses, self.layers, self.partial)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def text(self) -> str:
        """One line for each site, then one for each miss."""
        return "\n".join([*(s.text() for s in self.sites), *(m.text() for m in self.misses)])


@dataclass(frozen=True)
class Slot:
    """Place of a site in a backing tensor: kind and number of the bank, and index in it."""

    kind: str
    bank: int
    index: int

    def text(self) -> str:
        return f"{self.kind} {self.bank}[{self.index}]"


@dataclass(frozen=True)
class Bank:
    """One backing tensor ``(sites, length, width)``: all steered sites of a width and dtype, or one capture.

    ==========  =====================  =======================================================================
    kind        length x width         content
    ==========  =====================  =======================================================================
    table       R x H                  additive vector of each row
    capture     max_tokens x H         pristine value of each token
    packed      (N + 1) x H            pristine values of chosen tokens; the last row takes what is not chosen
    choice      G x 1, int32           1 for each group of tokens that is stored at the site
    tier        1 x H, fp32            vector of the dynamic tier
    probe       1 x H, fp32            direction of the site's monitor
    probe_set   1 x 8, fp32            the monitor's settings (`kernels/gates.py`)
    rowprobe    R x H, fp32            direction of each row's own monitor
    rowprobe_set  R x 8, fp32          settings of each row's monitor
    score       max_tokens x 2, fp32   scores of each token by the site's and by its row's monitor
    state       (S + 1) x 2, fp32      whether the step gates of each sequence are open, by site and row monitor
    mlp         M x H, fp32            input weights of the hidden units of the site's probe
    mlp_set     M x 2, fp32            bias and output weight of each of them
    patch       (P + 1) x H            rows that are put in place of values; line 0 is none
    patch_alpha  (P + 1) x H, fp32     their share in each dimension
    patch_slot  max_tokens x 1, int32  line of the site's patch for each token
    sae         2C x H                 encoder rows, then decoder rows of the site's features
    sae_set     C x 8, fp32            their settings (`kernels/sae_delta.py`)
    sae_clamp   R x 2C, fp32           codes, then values of each row's clamped features
    full_encoder, full_decoder  S * F x H  weights of the site's whole autoencoders, F features each
    full_set    S * F x 8, fp32        settings of their features
    full_bias   S x H, fp32            their decoders' biases
    full_sae    S x 4, fp32            number of features, and k of TopK
    full_row    R x 4, fp32            which autoencoder decodes a row's values, and how (`kernels/sae_full.py`)
    full_clamp  R x 3C, fp32           features, codes and values of its clamps
    full_log    max_tokens x 2L, fp32  the largest features of each token, and their activations
    clamp       R * K x H              unit directions, K for each row
    clamp_set   R * K x 3, fp32        lower bound, upper bound, strength (0: no clamp)
    ==========  =====================  =======================================================================
    """

    kind: str
    width: int
    dtype: torch.dtype
    sites: tuple[tuple[str, int], ...]
    length: int

    def text(self) -> str:
        return f"{self.kind}: {dtype_text(self.dtype)}[{len(self.sites)}, {self.length}, {self.width}]"


@dataclass(frozen=True)
class Norm:
    """A normalisation of one value's last dimension, as the graph writes it.

    Attributes:
        kind: ``rms``: normalise in fp32, round, times the weight. ``rms_wide``: times the weight in fp32, one rounding
            at the end. ``layer``: LayerNorm in fp32, one rounding at the end.
        node: name of the node that holds the result.
        value: name of the node that is normalised.
        inner: names of the nodes between them, which nothing else reads.
        weight, bias: names of the nodes (H,) or None.
        eps: added to the mean square or variance.
        offset: added to the weight (1.0 in Gemma).
        exact: the value is a sum, and what is normalised is the sum before its rounding.
    """

    kind: str
    node: str
    value: str
    inner: tuple[str, ...]
    weight: str | None
    bias: str | None
    eps: float
    offset: float = 0.0
    exact: bool = False

    def text(self) -> str:
        params = [name for name, node in (("weight", self.weight), ("bias", self.bias)) if node is not None]
        offset = [f"{self.offset!r} + weight"] if self.offset else []
        parts = [f"eps {self.eps!r}", *offset, *params[bool(offset) :], *(["before rounding"] if self.exact else [])]
        return f"{self.kind} {self.node} ({', '.join(parts)})"


@dataclass(frozen=True)
class Fusion:
    """What a template takes over beside the edits: the add that makes the value, and the norm that reads it.

    Attributes:
        residual, branch: names of what is added, both None where the value is read as it is.
        norm: the norm whose result the template writes as well.
        branch_norm: the norm of the branch alone (post-norm), whose value is ``branch``.
        branch_scale: multiplier of the branch, behind its norm.
        operand: name of the add's operand that norm and multiplier end in; ``branch`` where there are none.
    """

    residual: str | None = None
    branch: str | None = None
    norm: Norm | None = None
    branch_norm: Norm | None = None
    branch_scale: float = 1.0
    operand: str | None = None

    def text(self) -> str:
        branch = f"{self.branch_norm.text()} of {self.branch}" if self.branch_norm else f"{self.branch}"
        branch = branch if self.branch_scale == 1 else f"{self.branch_scale!r} * {branch}"
        add = f"{self.residual} + {branch}" if self.branch else ""
        parts = [part for part in (add, self.norm.text() if self.norm else "") if part]
        return f"fused with {' and '.join(parts)}" if parts else "unfused"


@dataclass(frozen=True)
class Edit:
    """Operations at one site.

    Attributes:
        ops: ``capture``, or families of steering (``patch``, ``add``, ``tier``, ``monitor``, ``row_monitor``,
            ``clamp``, ``sae``), or both; or ``sae_full``, whose edits are their own.
        slots: where their data lies.
        lowering: ``compiler``: plain operators, which Inductor fuses. ``template``: one Triton kernel.
        fusion: what the template takes over.
        why: why this lowering was chosen.
        detects: its monitors open gates for the sites behind it, and it steers nothing.
        gated: it reads the gates of sites in front of it.
    """

    site: Site
    ops: tuple[str, ...]
    slots: tuple[Slot, ...]
    lowering: str = "compiler"
    fusion: Fusion = Fusion()
    why: str = ""
    detects: bool = False
    gated: bool = False

    @property
    def decodes(self) -> bool:
        """Whether it decodes values from features, behind all other edits at its value."""
        return bool(FULL & set(self.ops))

    def slot(self, kind: str) -> Slot:
        """The slot of a kind; KeyError where the edit has none."""
        for slot in self.slots:
            if slot.kind == kind:
                return slot
        raise KeyError(kind)

    def text(self) -> str:
        readers = "" if self.site.users is None else f" -> {', '.join(self.site.users)}"
        how = f" by template, {self.fusion.text()}" if self.lowering == "template" else ""
        slots = ", ".join(slot.text() for slot in self.slots)
        what = f"{'detect ' if self.detects else ''}{'+'.join(self.ops)}"
        return f"{what} {self.site.text()} <- {slots}{readers}{how}{' gated' if self.gated else ''}"


@dataclass(frozen=True)
class Plan:
    """Edits of one graph in the order in which they are spliced, and the banks that they use."""

    edits: tuple[Edit, ...]
    banks: tuple[Bank, ...]
    max_tokens: int
    clamps: int = 0
    """Clamp directions of each row."""
    sae_tokens: int = 0
    """Most tokens that are decoded from features."""

    def text(self) -> str:
        """Golden text, debug print and compile-cache key at once."""
        banks = [f"bank {i} {bank.text()}" for i, bank in enumerate(self.banks)]
        clamps = [f"clamps: {self.clamps}"] if any("clamp" in edit.ops for edit in self.edits) else []
        decoded = [f"decoded tokens: {self.sae_tokens}"] if any("sae_full" in e.ops for e in self.edits) else []
        return "\n".join(
            [f"tokens: {self.max_tokens}", *clamps, *decoded, *banks, *(edit.text() for edit in self.edits)]
        )

    def digest(self) -> str:
        """Hex digest of `text`."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


def dtype_text(dtype: torch.dtype) -> str:
    """Short dtype name: ``bf16``, ``f32``."""
    name = str(dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "f").replace("int", "i")
