"""The boundary between a remote engine and what carries its messages; where it is written, no torch is loaded."""

from fedsb.channel import Channel, Handle, Lost

__all__ = ["Channel", "Handle", "Lost"]
