"""Spec + SiteTable -> Plan: which operation at which site over which slot of which backing tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias

import torch

from steer_compile.errors import LoweringError, SiteNotFound
from steer_compile.hooks import is_stream_hook
from steer_compile.ir import FULL, Bank, Edit, Miss, Plan, Site, SiteTable, Slot, dtype_text
from steer_compile.spec import CAPTURE_GROUPS, OP_FAMILIES, HookSelection, SteerSpec

DETECTING = frozenset(("monitor", "row_monitor", "score", "memory", "mlp"))
Wanted: TypeAlias = tuple[tuple[str, ...], Site]
STORED = ("capture", "packed", "score", "state", "full_log")
"""Kinds of banks that a graph writes."""
BankKey: TypeAlias = tuple[str, int, torch.dtype, int]
"""Kind, width, dtype and length of a bank."""


def resolve_layers(selection: HookSelection, table: SiteTable) -> tuple[int, ...]:
    """Layer numbers that a selection means in this graph; negative ones count from the last layer."""
    if selection.layers == "all":
        return table.layers
    if selection.hook == "mhc_streams_final":
        return table.layers[-1:]
    if table.partial and any(isinstance(n, int) and n < 0 for n in selection.layers):
        raise SiteNotFound(
            f"{selection.hook} at layers {selection.layers}: negative layers need the whole model in one graph, and "
            "this one has graph breaks; give the layers' numbers"
        )
    count = max(table.layers, default=-1) + 1
    return tuple(layer + count if layer < 0 else layer for layer in selection.layers if isinstance(layer, int))


def select_sites(selection: HookSelection, table: SiteTable) -> list[Site]:
    """Sites of one selection.

    Raises:
        SiteNotFound: a layer that was asked for by number has no such site, or no layer has one. Parts of a model
            (graph breaks) may lack layers: the runtime asks for them after the whole model ran.
    """
    found = [table.find(selection.hook, layer) for layer in resolve_layers(selection, table)]
    misses = [m for m in found if isinstance(m, Miss)]
    sites = [s for s in found if isinstance(s, Site)]
    if table.partial:
        return sites
    if (misses and selection.layers != "all") or not sites:
        raise SiteNotFound(_not_found(selection, misses, table))
    return sites


def _not_found(selection: HookSelection, misses: list[Miss], table: SiteTable) -> str:
    first = misses[0] if misses else table.find(selection.hook, 0)
    assert isinstance(first, Miss)
    have = sorted({s.hook for s in table.sites if not s.hook.startswith("write_")})
    span = f"{table.n_layers} layers with {', '.join(have)}" if table.sites else "no sites at all"
    cure = "choose one of these" if table.sites else "see `steer-compile sites` on this model"
    return f"no site {first.name}: {first.reason}; the graph has {span}; {cure}"


def plan_edits(spec: SteerSpec, table: SiteTable, banks: tuple[Bank, ...] = ()) -> Plan:
    """Plan one graph. ``banks`` are those of graphs planned before: sites that are in them keep their slots.

    Raises:
        SiteNotFound: a requested site has no value in this graph.
        LoweringError: the sites disagree about the number of tokens.
    """
    wanted: list[Wanted] = []
    for selection in spec.capture:
        wanted += [(("capture",), site) for site in select_sites(selection, table)]
    detecting: list[Wanted] = []
    for ops, site in _together([(s.ops, site) for s in spec.steer for site in select_sites(s, table)]):
        detects, steers = _split(ops, spec)
        detecting += [(detects, site)] if detects else []
        last = tuple(op for op in steers if op in FULL)
        steers = tuple(op for op in steers if op not in FULL)
        wanted += [(part, _placed(site, spec)) for part in (steers, last) if part]
    if detecting and table.partial:
        raise LoweringError(
            f"{detecting[0][1].name} has a monitor for the sites behind it, and graph breaks cut this model into "
            "several graphs; set cross_layer=False, or remove the breaks"
        )
    _check_tokens([site for _, site in (*wanted, *detecting)])
    banks = _grow(spec, (*wanted, *detecting), banks)
    edits = [Edit(site, ops, _slots(ops, site, spec, banks)) for ops, site in wanted]
    edits += [Edit(site, ops, _slots(ops, site, spec, banks), detects=True) for ops, site in detecting]
    return Plan(tuple(sorted(edits, key=_order)), banks, spec.max_tokens, spec.clamps, spec.sae_tokens)


def _together(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Each site once, with the families of all selections that name it."""
    found: dict[Site, set[str]] = {}
    for ops, site in wanted:
        found.setdefault(site, set()).update(ops)
    return [(tuple(op for op in OP_FAMILIES if op in ops), site) for site, ops in found.items()]


def _split(ops: tuple[str, ...], spec: SteerSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The families that detect for the sites behind, and those that steer here."""
    detects = tuple(op for op in ops if op in DETECTING) if spec.cross_layer else ()
    return detects, tuple(op for op in ops if op not in detects)


def reserve_banks(spec: SteerSpec, sites: Iterable[Site], n_layers: int) -> tuple[Bank, ...]:
    """Banks of sites that a graph yet to come will have: `plan_edits` gives them the slots made here.

    Args:
        sites: values that the graph is expected to have.
        n_layers: layers of the whole model, from which negative layer numbers count.
    """
    known = tuple(sites)

    def chosen(selection: HookSelection) -> list[Site]:
        numbers = {n + n_layers if n < 0 else n for n in selection.layers if isinstance(n, int)}
        every = selection.layers == "all"
        return [s for s in known if s.hook == selection.hook and (every or s.layer in numbers)]

    wanted: list[Wanted] = [(("capture",), site) for selection in spec.capture for site in chosen(selection)]
    wanted += _together([(selection.ops, site) for selection in spec.steer for site in chosen(selection)])
    return _grow(spec, wanted, ())


def _placed(site: Site, spec: SteerSpec) -> Site:
    """The site with the readers that the placement redirects."""
    if spec.placement == "before_norm" or site.hook not in ("pre_attn", "post_attn") or not site.skip_users:
        return site
    return replace(site, users=site.skip_users)


def _check_tokens(sites: list[Site]) -> None:
    """All sites of a graph hold the same tokens, else one row index cannot serve them."""
    by_layout: dict[str, Site] = {}
    for site in sites:
        first = by_layout.setdefault(site.layout, site)
        if first.shape != site.shape:
            raise LoweringError(
                f"{site.name} has tokens {site.shape} but {first.name} has {first.shape}; one spec needs sites of "
                "equal token count: choose hooks of one kind"
            )


_RANKS = {"post_attn": 1, "post_block": 2, "pre_attn": 3}


def _order(edit: Edit) -> tuple[int, int, int]:
    """Order at one value: a block's exit before the next block's entry, capture before steering, decoding last."""
    hook = edit.site.hook
    rank = _RANKS.get(hook, 0) if is_stream_hook(hook) else 4
    return (
        edit.site.layer,
        rank,
        0 if "capture" in edit.ops else 1 if edit.detects else 3 if edit.decodes else 2,
    )


def _bank_keys(ops: tuple[str, ...], site: Site, spec: SteerSpec) -> list[BankKey]:
    """The banks that hold the data of ``ops`` at a site."""
    width, rows, table = site.width, spec.all_rows, spec.table_dtype(site.dtype)
    slots, features = spec.patches + 1, spec.features
    whole = spec.saes * spec.sae_features
    packed: list[BankKey] = [("packed", width, site.dtype, spec.capture_rows + 1)]
    packed += [("choice", 1, torch.int32, CAPTURE_GROUPS)]
    keys: dict[str, list[BankKey]] = {
        "capture": packed if spec.capture_rows else [("capture", width, site.dtype, spec.max_tokens)],
        "add": [("table", width, table, rows)],
        "patch": [
            ("patch", width, table, slots),
            ("patch_alpha", width, torch.float32, slots),
            ("patch_slot", 1, torch.int32, spec.max_tokens),
        ],
        "tier": [("tier", width, torch.float32, 1)],
        "monitor": [("probe", width, torch.float32, 1), ("probe_set", 8, torch.float32, 1)],
        "row_monitor": [("rowprobe", width, torch.float32, rows), ("rowprobe_set", 8, torch.float32, rows)],
        "score": [("score", 2, torch.float32, spec.max_tokens)],
        "memory": [("state", 2, torch.float32, spec.sequences + 1)],
        "mlp": [("mlp", width, torch.float32, spec.hidden), ("mlp_set", 2, torch.float32, spec.hidden)],
        "sae": [
            ("sae", width, table, 2 * features),
            ("sae_set", 8, torch.float32, features),
            ("sae_clamp", 2 * features, torch.float32, rows),
        ],
        "sae_full": [
            ("full_encoder", width, table, whole),
            ("full_decoder", width, table, whole),
            ("full_set", 8, torch.float32, whole),
            ("full_bias", width, torch.float32, spec.saes),
            ("full_sae", 4, torch.float32, spec.saes),
            ("full_row", 4, torch.float32, rows),
            ("full_clamp", 3 * features, torch.float32, rows),
        ],
        "sae_log": [("full_log", 2 * spec.top_features, torch.float32, spec.max_tokens)],
        "clamp": [("clamp", width, table, rows * spec.clamps), ("clamp_set", 3, torch.float32, rows * spec.clamps)],
    }
    return [key for op in ops for key in keys[op]]


def _grow(spec: SteerSpec, wanted: Iterable[Wanted], banks: tuple[Bank, ...]) -> tuple[Bank, ...]:
    """Existing banks, and new ones for the sites that have no slot yet.

    Steered sites of one width and dtype share a bank. What a graph writes has a bank for each site: Inductor would copy
    a whole bank for each store into a part of it.
    """
    new: dict[tuple[BankKey, object], list[tuple[str, int]]] = {}
    for ops, site in wanted:
        name = (site.hook, site.layer)
        for key in _bank_keys(ops, site, spec):
            group = (key, name if key[0] in STORED else None)
            if _find(banks, key, site) is None and name not in new.get(group, []):
                new.setdefault(group, []).append(name)
    made = [Bank(kind, width, dtype, tuple(at), length) for ((kind, width, dtype, length), _), at in new.items()]
    return (*banks, *made)


def _find(banks: tuple[Bank, ...], key: BankKey, site: Site) -> Slot | None:
    """The site's place in a bank of a key. A capture reserved in another dtype than the graph's takes rounded values:
    graphs that leave sums unrounded hold fp32 where the model's dtype is another one."""
    kind, width, dtype, length = key
    for i, bank in enumerate(banks):
        alike = (bank.kind, bank.width, bank.length) == (kind, width, length)
        if alike and (bank.dtype == dtype or kind in ("capture", "packed")) and (site.hook, site.layer) in bank.sites:
            return Slot(bank.kind, i, bank.sites.index((site.hook, site.layer)))
    return None


def _slots(ops: tuple[str, ...], site: Site, spec: SteerSpec, banks: tuple[Bank, ...]) -> tuple[Slot, ...]:
    found = []
    for key in _bank_keys(ops, site, spec):
        slot = _find(banks, key, site)
        if slot is None:
            raise LoweringError(f"{site.name} ({dtype_text(site.dtype)}, width {site.width}) has no slot for {key[0]}")
        found.append(slot)
    return tuple(found)
