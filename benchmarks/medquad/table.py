"""Writes MedQuAD's questions and answers as the tables that the recipe medquad-smollm2 reads.

    git clone https://github.com/abachaa/MedQuAD
    python benchmarks/medquad/table.py MedQuAD        (half a minute; writes train.jsonl and test.jsonl)

MedQuAD: Ben Abacha and Demner-Fushman, "A Question-Entailment Approach to Question Answering", BMC Bioinformatics 2019.
Licence CC BY 4.0. Three of its twelve sources have no answers and are left out. Each of the other nine is a client.

Kept are answers of 40 to 3,000 characters, without exact repeats, and of each source whole topics up to about 1,000
pairs. A fifth of the topics are test rows. A topic is in one of the two tables only, whichever sources have it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

SHORTEST, LONGEST, PAIRS = 40, 3000, 1000
TEST_TOPICS = 0.2
Row = dict[str, str]


def pairs(folder: Path) -> Iterator[Row]:
    """Yields the answered questions of every source, document by document."""
    for path in sorted(folder.glob("*_QA*/*.xml")):
        document = ElementTree.parse(path).getroot()
        focus = tidy(document.findtext("Focus"))
        for pair in document.iter("QAPair"):
            question, answer = tidy(pair.findtext("Question")), tidy(pair.findtext("Answer"))
            if focus and question and SHORTEST <= len(answer) <= LONGEST:
                client = document.get("source", "")
                yield {"client": client, "query": question, "positive": answer, "focus": focus}


def tidy(text: str | None) -> str:
    """Joins the pieces of a line, and removes empty lines."""
    lines = (re.sub(r"\s+", " ", line).strip() for line in (text or "").splitlines())
    return "\n".join(line for line in lines if line)


def place(topic: str) -> float:
    """Returns a number in [0, 1) that depends on the topic only."""
    return int.from_bytes(hashlib.sha256(topic.lower().encode()).digest()[:6], "big") / 2**48


def select(rows: Iterator[Row]) -> list[Row]:
    """Returns whole topics, at most about PAIRS rows per client, in the order of `place`."""
    ordered = sorted(rows, key=lambda row: (row["client"], place(row["focus"] + row["client"]), row["focus"].lower()))
    seen, count, last = set[tuple[str, str]](), Counter[str](), dict[str, str]()
    kept = []
    for row in ordered:
        client, text = row["client"], (row["query"], row["positive"])
        full = count[client] >= PAIRS and last[client] != row["focus"].lower()
        if full or text in seen:
            continue
        seen.add(text)
        count[client] += 1
        last[client] = row["focus"].lower()
        kept.append(row)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the clone of MedQuAD")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the tables; default: the current one")
    asked = parser.parse_args()
    rows = select(pairs(asked.folder))
    if not rows:
        raise SystemExit(f"{asked.folder} contains no answers in *_QA*/*.xml. Name the clone of abachaa/MedQuAD.")
    asked.out.mkdir(parents=True, exist_ok=True)
    tables = {
        "train": [row for row in rows if place(row["focus"]) >= TEST_TOPICS],
        "test": [row for row in rows if place(row["focus"]) < TEST_TOPICS],
    }
    for name, table in tables.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        (asked.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(table):,} rows", dict(Counter(row["client"] for row in table)))


if __name__ == "__main__":
    main()
