"""Hook points: the names under which values of the residual stream are addressed.

===========  =====================================================================
name         value
===========  =====================================================================
pre_attn     stream entering the block
post_attn    stream after the first mixer (attention, SSM, ...) branch is added
post_block   stream leaving the block: Hugging Face ``hidden_states[layer + 1]``
attn_in      input of the mixer branch, after its norm
attn_out     output of the mixer branch, as it is added to the stream
mlp_in       input of the MLP branch, after its norm
mlp_out      output of the MLP branch, as it is added to the stream
write_i      stream after the i-th write of the block (``write_0``, ``write_1``, ...)
===========  =====================================================================

Models with m parallel streams of H numbers (hyper-connections) have these, and no ``post_block`` and ``write_i``:

====================  ========================================================================================
name                  value
====================  ========================================================================================
mhc_streams_pre_attn  streams (m, H) that the attention's mixing reads, m*H wide
mhc_streams_pre_mlp   streams (m, H) that the MLP's mixing reads
mhc_streams_final     streams (m, H) behind the last block: a hook of the model, whatever layer is named
pre_attn, mlp_in      the one stream (H,) that is mixed for the branch, in front of its norm
attn_in               the same behind the norm
post_attn, attn_out   output (H,) of the mixer branch, in front of its placing on the streams
mlp_out               output (H,) of the MLP branch, in front of its placing
mhc_attn_post_mix     weight of the attention's output on each stream (m,); captured only, as the next three
mhc_attn_res_mix      map (m, m) of the streams beside the attention: stream k becomes ``sum_j map[j, k] * stream_j``
mhc_ffn_post_mix      the same of the MLP
mhc_ffn_res_mix       the same of the MLP
====================  ========================================================================================

TransformerLens names are accepted by `parse_hook` and mean the same values.
"""

from __future__ import annotations

import re
from functools import lru_cache

from steer_compile.errors import SpecError

STREAM_HOOKS = ("pre_attn", "post_attn", "post_block")
BRANCH_HOOKS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
MULTI_STREAM_HOOKS = ("mhc_streams_pre_attn", "mhc_streams_pre_mlp", "mhc_streams_final")
COEFFICIENT_HOOKS = ("mhc_attn_post_mix", "mhc_ffn_post_mix", "mhc_attn_res_mix", "mhc_ffn_res_mix")
"""Weights by which parallel streams are mixed: they can be captured, and are not steered."""
HOOKS = (*STREAM_HOOKS, *BRANCH_HOOKS, *MULTI_STREAM_HOOKS, *COEFFICIENT_HOOKS)

_ALIASES = {
    "resid_pre": "pre_attn",
    "resid_mid": "post_attn",
    "resid_post": "post_block",
    "hook_resid_pre": "pre_attn",
    "hook_resid_mid": "post_attn",
    "hook_resid_post": "post_block",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
}
_WRITE = re.compile(r"write_\d+")
_TL_SITE = re.compile(r"blocks\.(\d{1,9})\.(\w+)")
_SITE = re.compile(r"layers\.(-?\d{1,9})\.(\w+)")


def parse_hook(name: str) -> str:
    """Canonical hook name of ``name``.

    Raises:
        SpecError: the name is neither a hook nor a known alias.
    """
    hook = _ALIASES.get(name, name) if isinstance(name, str) else ""
    if hook in HOOKS or _WRITE.fullmatch(hook):
        return hook
    raise SpecError(f"unknown hook {name!r}; the hooks are {', '.join(HOOKS)} and write_0, write_1, ...")


@lru_cache(maxsize=4096)
def parse_site(text: str) -> tuple[str, int]:
    """``(hook, layer)`` of ``layers.3.post_block`` or TransformerLens' ``blocks.3.hook_resid_post``.

    Raises:
        SpecError: the text names no site.
    """
    match = _TL_SITE.fullmatch(text) or _SITE.fullmatch(text)
    if match is None:
        raise SpecError(f"{text!r} names no site; write it as layers.<n>.<hook>, for example layers.3.post_block")
    return parse_hook(match[2]), int(match[1])


def is_stream_hook(hook: str) -> bool:
    """Whether the hook is a value of the stream itself, not a branch's input or output."""
    return hook in STREAM_HOOKS or hook in MULTI_STREAM_HOOKS or _WRITE.fullmatch(hook) is not None
