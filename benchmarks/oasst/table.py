"""Writes OpenAssistant's messages as the table that the recipe pfl-oasst-private reads: one row per answer.

    python benchmarks/oasst/table.py 2023-11-05_oasst2_ready.messages.jsonl.gz        (writes oasst.jsonl)

The file is one of the dataset OpenAssistant/oasst2 on the Hub (Köpf et al., "OpenAssistant Conversations", NeurIPS
2023, arXiv 2304.07327; Apache-2.0). It has a message per line, with the message that it answers. A row is an answer
with the conversation before it, and belongs to the volunteer who wrote the answer.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SPEAKERS = {"prompter": "User", "assistant": "Assistant"}
Message = Mapping[str, Any]


def rows(messages: Iterable[Message], language: str) -> Iterator[dict[str, Any]]:
    """Yields the client, prompt and answer of every answer in this language whose conversation is complete."""
    known = {message["message_id"]: message for message in messages}
    for message in known.values():
        if message["role"] != "assistant" or message["lang"] != language:
            continue
        thread, parent = list[Message](), message["parent_id"]
        while parent in known:
            thread.insert(0, known[parent])
            parent = known[parent]["parent_id"]
        if parent is None:
            prompt = "\n\n".join(f"{SPEAKERS[said['role']]}: {said['text']}" for said in thread)
            yield {"client": message["user_id"], "prompt": prompt, "answer": message["text"]}


def read(path: Path) -> Iterator[Message]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    yield from map(json.loads, data.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("messages", type=Path)
    parser.add_argument("--out", type=Path, default=Path("oasst.jsonl"))
    parser.add_argument("--language", default="en")
    given = parser.parse_args()
    count, clients = 0, set()
    with given.out.open("w", encoding="utf-8") as table:
        for row in rows(read(given.messages), given.language):
            table.write(json.dumps(row, ensure_ascii=False) + "\n")
            count, clients = count + 1, clients | {row["client"]}
    print(f"{count:,} answers of {len(clients):,} people in {given.out}")


if __name__ == "__main__":
    main()
