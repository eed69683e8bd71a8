"""`SAE`: a sparse autoencoder of one site, checked once and never changed, with its encoder and decoder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from steer_compile.errors import SAEError
from steer_compile.runtime.vectors import SiteKey, site_key
from steer_compile.sae.activation import Activation, Wide
from steer_compile.sae.checks import checked_tensor
from steer_compile.sae.normalise import LayerNorm, NoNorm, Normalisation


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder: ``f = activation(x W_enc, b_enc)`` and ``h' = restored(f W_dec + b_dec)``.

    ``x`` is the normalised row, less ``b_dec`` where ``subtract_b_dec`` is set. Tensors are copied to the CPU and keep
    their dtype (fp32, bf16, fp16; fp64 is rounded to fp32). Arithmetic is fp32, and fp64 for fp64 rows. Two
    autoencoders are equal where their content is.

    Attributes:
        W_enc, W_dec: (d_model, d_sae) and (d_sae, d_model).
        b_enc: (d_sae,); of a gated autoencoder the bias of its gates.
        b_dec: (d_model,).
        site: hook and layer whose rows it encodes, None where its file does not say.
        source: file that it was read from, for errors.
        digest: sha256 of what it computes and of its site, not of its name.

    Raises:
        SAEError: tensors that do not fit together, NaN or infinity, numbers that are out of range.
        SpecError: a site that is none.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation
    normalisation: Normalisation = NoNorm()
    subtract_b_dec: bool = False
    site: SiteKey | None = None
    name: str = "sae"
    source: str = ""
    digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        where = self.source or self.name
        if not isinstance(self.W_enc, Tensor) or self.W_enc.dim() != 2 or 0 in self.W_enc.shape:
            found = tuple(self.W_enc.shape) if isinstance(self.W_enc, Tensor) else type(self.W_enc).__name__
            raise SAEError(f"{where}: W_enc is {found}, not a matrix; give one of shape (d_model, d_sae)")
        width, count = self.W_enc.shape
        shapes = {"W_enc": (width, count), "b_enc": (count,), "W_dec": (count, width), "b_dec": (width,)}
        given = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        for name, shape in shapes.items():
            object.__setattr__(self, name, checked_tensor(where, name, given[name], shape))
        object.__setattr__(self, "activation", self.activation.checked(where, count))
        self.normalisation.check(where, width)
        if self.site is not None:
            object.__setattr__(self, "site", site_key(self.site))
        object.__setattr__(self, "digest", self._digest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SAE) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        kind = self.activation.kind
        return f"SAE({self.name!r}, {self.d_model} -> {self.d_sae} {kind}, site={self.site}, digest={self.digest[:12]})"

    @property
    def d_model(self) -> int:
        return self.W_enc.size(0)

    @property
    def d_sae(self) -> int:
        return self.W_enc.size(1)

    @property
    def key(self) -> str:
        """``layers.3.post_block``, the key of its site in captured rows; empty without a site."""
        return f"layers.{self.site[1]}.{self.site[0]}" if self.site else ""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, those of the activation included."""
        own = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return {**own, **self.activation.tensors()}

    def encode(self, h: Tensor) -> Tensor:
        """Features of rows.

        Args:
            h: (..., d_model) of any floating dtype, on the CPU.

        Returns:
            (..., d_sae) fp32, or fp64 for fp64 rows; nothing is negative, and NaN of a row is NaN in its features.

        Raises:
            SAEError: rows of another width or dtype.
        """
        x = self.normalisation.normalised(self.rows(h))
        if self.subtract_b_dec:
            x = x - self.b_dec.to(x.dtype)
        return self.activation.features(x @ self.W_enc.to(x.dtype), self.b_enc.to(x.dtype))

    def decode(self, f: Tensor, h: Tensor | None = None) -> Tensor:
        """Rows of features.

        Args:
            f: (..., d_sae) of any floating dtype.
            h: the rows that were encoded, which layer norm needs to be undone.

        Returns:
            (..., d_model) fp32, or fp64 for fp64 features.

        Raises:
            SAEError: features of another number, or ``h`` is missing.
        """
        f = self._wide(f, self.d_sae, "features")
        decoded = f @ self.W_dec.to(f.dtype) + self.b_dec.to(f.dtype)
        return self.normalisation.restored(decoded, None if h is None else self.rows(h))

    def reconstruct(self, h: Tensor, keep_error: bool = False) -> Tensor:
        """``decode(encode(h))`` in the dtype of ``h``, with one rounding at the end.

        Args:
            keep_error: add what the autoencoder misses, ``h - decode(encode(h))``, so that the rows come back up to
                rounding.
        """
        wide = self.rows(h)
        decoded = self.decode(self.encode(h), h)
        return (decoded + (wide - decoded) if keep_error else decoded).to(h.dtype)

    def rows(self, h: Tensor) -> Tensor:
        """Rows in the dtype of the arithmetic.

        Raises:
            SAEError: rows of another width or dtype.
        """
        return self._wide(h, self.d_model, "rows")

    def _wide(self, value: Tensor, width: int, what: str) -> Tensor:
        if value.dim() == 0 or value.size(-1) != width or not value.dtype.is_floating_point:
            found = f"{what} of shape {tuple(value.shape)} and dtype {value.dtype}"
            raise SAEError(f"{self.source or self.name}: {found}; it takes floating-point {what} of width {width}")
        return value if value.dtype in (torch.float32, torch.float64) else value.float()

    def header(self) -> dict[str, object]:
        """What is not in a tensor, as JSON has it."""
        return {
            "activation": {"kind": self.activation.kind, **self.activation.settings()},
            "normalisation": {"kind": self.normalisation.kind, **self.normalisation.settings()},
            "subtract_b_dec": self.subtract_b_dec,
            "site": self.key or None,
        }

    def _digest(self) -> str:
        found = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            found.update(tensor.view(torch.uint8).numpy().data)
        return found.hexdigest()


def reference_encode(sae: SAE, h: Tensor) -> Wide:
    """`SAE.encode` of rows (n, d_model) written out in NumPy and fp64, apart from the code above."""
    x = h.double().numpy()
    settings = sae.normalisation.settings()
    if isinstance(sae.normalisation, LayerNorm):
        x = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + settings["eps"])
    x = x * settings.get("factor", 1.0)
    x = x - float(sae.subtract_b_dec) * sae.b_dec.double().numpy()
    product = np.einsum("nd,df->nf", x, sae.W_enc.double().numpy())
    return sae.activation.reference(product, sae.b_enc.double().numpy())
