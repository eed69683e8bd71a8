"""Compare what the finder says about a toy with what the toy says about itself."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from steer_compile.hooks import is_stream_hook
from steer_compile.ir import Miss, Site, SiteTable
from tests._toys_base import Key, Toy


@dataclass
class Verdict:
    """`found`: every stream hook of the truth has its site; `partial`: some; `refused`: none."""

    scheme: int
    found: list[Key] = field(default_factory=list)
    missed: list[Key] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        if self.wrong:
            return "WRONG"
        if not self.missed and self.found:
            return "found"
        return "partial" if self.found else "refused"


def canonical(value: Tensor, layout: str, batch: int) -> Tensor:
    """`value` as (B, T, H) in fp32."""
    if layout == "time_first":
        value = value.transpose(0, 1)
    elif layout == "flat":
        value = value.reshape(batch, -1, value.shape[-1])
    elif layout == "streams":
        value = value.flatten(2)
    elif layout == "channels_first":
        value = value.transpose(1, 2)
    return value.float()


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def _check_site(toy: Toy, site: Site, rights: list[Tensor], values: dict[str, Tensor]) -> str:
    """Empty, or what is wrong with the site."""
    value = values.get(site.node)
    if value is None:
        return f"no tensor node {site.node}"
    batch = toy.inputs()[0].shape[0]
    shown = canonical(value, site.layout, batch)
    layout = site.layout if site.layout == "streams" else toy.layout
    if not any(equal(shown, canonical(right, layout, batch)) for right in rights):
        return f"value of {site.node} is not the truth"
    if site.layout == "streams":
        value = value.flatten(2)
    if (site.width, site.dtype) != (value.shape[-1], value.dtype):
        return f"says width {site.width} {site.dtype}, is {tuple(value.shape)} {value.dtype}"
    numbers = [(said, real) for said, real in zip(site.shape, value.shape, strict=False) if isinstance(said, int)]
    if len(site.shape) != value.dim() - 1 or any(said != real for said, real in numbers):
        return f"says shape {site.shape}, is {tuple(value.shape)}"
    return ""


def _wrong_sites(toy: Toy, table: SiteTable, values: dict[str, Tensor], truth: dict[Key, Tensor]) -> list[str]:
    wrong = []
    for site in table.sites:
        key = (site.hook, site.layer)
        rights = ([truth[key]] if key in truth else []) + toy.tape.alternatives.get(key, [])
        if rights:
            problem = _check_site(toy, site, rights, values)
            wrong.extend([f"{site.name}: {problem}"] if problem else [])
        elif is_stream_hook(site.hook) or not truth:
            wrong.append(f"{site.name} = {site.node}: there is no such value")
    return wrong


def _judge_scheme(toy: Toy, table: SiteTable, values: dict[str, Tensor], scheme: int) -> Verdict:
    n_layers, truth = toy.schemes()[scheme]
    verdict = Verdict(scheme, wrong=_wrong_sites(toy, table, values, truth))
    for key in truth:
        answer = table.find(*key)
        if isinstance(answer, Miss) and not answer.reason.strip():
            verdict.wrong.append(f"{answer.name}: a miss without a reason")
        if is_stream_hook(key[0]):
            if isinstance(answer, Site):
                verdict.found.append(key)
            elif key not in toy.tape.optional:
                verdict.missed.append(key)
    if table.sites and table.n_layers != n_layers:
        verdict.wrong.append(f"{table.n_layers} layers instead of {n_layers}")
    if not table.sites and not any(miss.reason.strip() for miss in table.misses):
        verdict.wrong.append("no site and no reason")
    return verdict


def judge(toy: Toy, table: SiteTable, values: dict[str, Tensor]) -> Verdict:
    """The verdict under the scheme that fits best. `toy` ran eagerly before."""
    verdicts = [_judge_scheme(toy, table, values, i) for i in range(len(toy.schemes()))]
    best = min(verdicts, key=lambda v: (len(v.wrong), len(v.missed)))
    names = [site.hook + str(site.layer) for site in table.sites]
    if len(set(names)) != len(names):
        best.wrong.append("two sites of one name")
    return best
