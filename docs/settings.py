"""Writes docs/settings.md, the reference of all settings. Usage: python docs/settings.py"""

from __future__ import annotations

from pathlib import Path

from fedsb.cli.listing import settings

HEAD = """# Settings

Every key of a run's TOML. `fedsb ls settings` prints the same list. `--set section.key=value` overrides a key on the
command line. `none` unsets a key, unless `none` is one of its values. `fedsb check --verbose` shows the value of each
key in a run, and the reason for it. Keys of `[method]` are options of the method, whose defaults depend on the method.
"""


def reference() -> str:
    """Returns the page: a table for each section."""
    lines, last = [HEAD], None
    for row in settings():
        section, _, key = row["setting"].rpartition(".")
        if section != last:
            title = f"[{section}]" if section else "The run"
            lines.append(f"\n## {title}\n\n| key | value | default | what it does |\n|---|---|---|---|")
            last = section
        cells = [str(row[name]).replace("|", "\\|") for name in ("value", "default", "what")]
        lines.append(f"| `{key}` | {cells[0]} | `{cells[1]}` | {cells[2]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(reference())
