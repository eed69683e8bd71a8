"""Stages of one site that the kernel benchmarks name."""

from __future__ import annotations

FAMILIES = {
    "add": ("branch", "add"),
    "monitor": ("branch", "add", "tier", "monitor"),
    "row_monitor": ("branch", "add", "row_monitor"),
    "clamp": ("branch", "add", "clamp"),
    "capture": ("branch", "add", "capture"),
    "all": ("branch", "capture", "add", "tier", "monitor", "row_monitor", "clamp"),
}
