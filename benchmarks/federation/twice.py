"""A site's node that brings every answer twice (spoil.py)."""

from spoil import node_twice

if __name__ == "__main__":
    node_twice()
