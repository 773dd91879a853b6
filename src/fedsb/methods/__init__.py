"""Federated methods, one short file each. `base.py` defines what a method is, `config/registry.py` finds them."""

from __future__ import annotations

from fedsb.config.registry import GROUP, build_method, method_type, method_types

__all__ = ["GROUP", "build_method", "method_type", "method_types"]
