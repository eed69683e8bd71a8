"""Patch sweeps: which sites and positions carry what makes a model answer one prompt as it does and not another."""

from steer_compile.sweep.question import METRICS, Question
from steer_compile.sweep.result import SweepResult
from steer_compile.sweep.run import Sweeper, patch_sweep

__all__ = ["METRICS", "Question", "SweepResult", "Sweeper", "patch_sweep"]
