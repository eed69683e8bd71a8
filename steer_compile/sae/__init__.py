"""Sparse autoencoders: values, files, features of captured rows, and the formulas of steering by features."""

from steer_compile.sae.activation import BatchTopK, Gated, JumpReLU, ReLU, TopK
from steer_compile.sae.features import FeatureRows, features, logged
from steer_compile.sae.files import load, load_all, save
from steer_compile.sae.model import SAE
from steer_compile.sae.monitor import feature_monitor
from steer_compile.sae.normalise import FactorNorm, LayerNorm, NoNorm
from steer_compile.sae.steer import FeatureClamp, steered_delta, steered_reconstruction

__all__ = [
    "SAE",
    "BatchTopK",
    "FeatureClamp",
    "FactorNorm",
    "FeatureRows",
    "Gated",
    "JumpReLU",
    "LayerNorm",
    "NoNorm",
    "ReLU",
    "TopK",
    "feature_monitor",
    "features",
    "load",
    "load_all",
    "logged",
    "save",
    "steered_delta",
    "steered_reconstruction",
]
