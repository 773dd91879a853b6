"""The live state of a coordinator or a site, from what is on its disk: for the terminal, a page, Prometheus, a probe.

`state_of` only reads. Every view (show.py, web.py, metrics.py) is a function of what it gives back.
"""

from fedsb.status.state import state_of

__all__ = ["state_of"]
