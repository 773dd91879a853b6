"""Helpers shared by tests and benchmarks: tiny models that are built from configurations, never downloaded."""
