"""What a person sees: the table of settings, the live table of rounds, the summary at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from fedsb.adapters.serving import serving_lines
from fedsb.config.resolved import ResolvedSetting
from fedsb.data.card import WARNING, shown_lines
from fedsb.protocol.prices import bytes_line
from fedsb.utils.formatting import bytes_text, counts_text, epsilon_text, extra_metrics_text, score_text, seconds_text

PLAIN: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}  # tables without lines
COLUMNS = ("round", "loss", "score", "up", "down", "seconds", "left", "dropped")


COLUMNS_OF_PREDICTIONS = ("prediction", "probabilities", "ended")


class Terminal:
    """Watches a run: a table that grows by a row a round; on anything but a terminal, a line a round."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.console = plain_console(stderr=quiet)
        self.quiet, self.verbose = quiet, verbose
        self.rows: list[list[str]] = []
        self.live: Live | None = None
        self.seconds = 0.0  # of the rounds that were shown

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def settings(self, choices: Sequence[ResolvedSetting]) -> None:
        """Shows every resolved setting with its reason, those at their default together at the end.

        A later choice replaces an earlier one of the same name. Without `verbose` only those are shown that warn of
        something; all are in the manifest and in the report.
        """
        if self.quiet:
            return
        if not self.verbose:
            found = {choice.key: choice for choice in choices}
            if (tried := found.get("preflight")) is not None:
                name = Path(str(next(choice.value for choice in choices if choice.key == "model.name"))).name
                self.note(
                    f"{'model':<9}{name}, {found['model.target_modules'].value}; tried for {tried.value}: "
                    f"{tried.reason}"
                )
            for choice in found.values():
                setting = f"{choice.key} = {_setting(choice.value)}"
                given, no_effect, why = choice.reason.partition("; has no effect: ")
                if no_effect:
                    self.note(f"{WARNING} {setting} ({given}) has no effect: {why}.")
                elif choice.reason.startswith("warning: "):
                    self.note(f"{WARNING} {setting}: {choice.reason.removeprefix('warning: ')}.")
            return
        table = Table("setting", Column("value", overflow="fold"), "reason", **PLAIN)
        defaults: dict[str, list[str]] = {}
        for choice in {choice.key: choice for choice in choices}.values():
            if choice.reason != "default":
                table.add_row(choice.key, _setting(choice.value), choice.reason)
            elif choice.value is not None:
                section, _, key = choice.key.rpartition(".")
                defaults.setdefault(section, []).append(f"{key} {_setting(choice.value)}")
        self.console.print(table)
        self.console.print("\nBy default:")
        rest = Table(show_header=False, **PLAIN)
        for section, settings in defaults.items():
            rest.add_row(f"  {section}", ", ".join(settings))
        self.console.print(rest)
        self.console.print()

    def note(self, text: str) -> None:
        """Prints a line; a warning in yellow."""
        self.console.print(text, soft_wrap=True, style="yellow" if text.startswith(WARNING) else None)

    def round(self, row: Mapping[str, Any], rounds: int) -> None:
        self.seconds += row["seconds"]
        left = self.seconds / (len(self.rows) + 1) * (rounds - row["round"])
        metric = "" if row["score"] is None else f"{row['score']:.4f}{counts_text(row['extra_metrics'])}"
        cells = [
            f"{row['round']}/{rounds}",
            "" if row["loss"] is None else f"{row['loss']:.4f}",
            metric,
            bytes_text(row["up_bytes"]),
            bytes_text(row["down_bytes"]),
            f"{row['seconds']:.1f}",
            seconds_text(left),
            "; ".join(f"{drop['client']}: {drop['reason']}" for drop in row["dropped"]),
        ]
        self.rows.append(cells)
        if self.console.is_terminal:
            if self.live is None:
                self.live = Live(console=self.console, auto_refresh=False)
                self.live.start()
            self.live.update(self._table(), refresh=True)
        else:
            named = [f"{name} {cell}" for name, cell in zip(COLUMNS, cells, strict=True) if cell]
            self.console.print("  ".join(named), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(*COLUMNS, **PLAIN)
        for cells in self.rows[-self.console.height + 4 :]:
            table.add_row(*cells)
        return table


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of one shape on stdout: a table where it fits, else a paragraph a row."""
    console = plain_console()
    cells = [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(list(rows[0]), *cells, strict=True)]
    if sum(widths) <= console.width:
        table = Table(*rows[0], **PLAIN)
        for row in cells:
            table.add_row(*row)
        console.print(table)
        return
    for first, *others in cells:
        console.print(first)
        table = Table(show_header=False, **PLAIN)
        for name, cell in zip(list(rows[0])[1:], others, strict=True):
            table.add_row(f"  {name}", cell)
        console.print(table)


def print_predictions(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints predictions with the rows that they are of: a line each, or two where the model wrote."""
    console = plain_console()
    shown = [_cell(row["prediction"]) for row in rows]
    width, digits = max(map(len, shown)), len(str(len(rows)))
    for number, (row, prediction) in enumerate(zip(rows, shown, strict=True), start=1):
        of = " | ".join(
            " ".join(str(value).split()) for name, value in row.items() if name not in COLUMNS_OF_PREDICTIONS
        )
        start = f"{number:>{digits}}  "
        if "ended" in row:
            console.print(start + of, no_wrap=True, overflow="ellipsis")
            console.print(f"{' ' * len(start)}{prediction.strip()}{'' if row['ended'] else ' [cut]'}\n")
            continue
        share = f"{row['probabilities'][row['prediction']]:.3f}  " if "probabilities" in row else ""
        console.print(f"{start}{prediction:<{width}}  {share}{of}", no_wrap=True, overflow="ellipsis")


def print_scores(found: Mapping[str, Any]) -> None:
    """Several tables that one adapter was scored on, and the plain mean over them."""
    rows = [{key: value for key, value in of.items() if key not in ("run", "answers")} for of in found["tables"]]
    last = dict.fromkeys(rows[0], "") | {"data": "mean", found["metric"]: found["mean"]}
    print_table([*({**row, "data": Path(row["data"]).name} for row in rows), last])


def print_summary(folder: Path, found: Mapping[str, Any]) -> None:
    """The headline of a run: score, bytes, adapter."""
    from fedsb.reporting.run_directory import read_manifest, read_result

    console = plain_console(soft_wrap=True)
    manifest, result = read_manifest(folder), read_result(folder)
    show = score_text(found["metric"])
    state = "finished" if found["finished"] else f"{found['rounds']} of {found['rounds_planned']} rounds"
    console.print(f"\n{found['name']}: {state}")
    if found["score"] is not None:
        against = [f"before federation {show(found['before'])}"] if found["before"] is not None else []
        against += [f"majority class {show(found['majority'])}"] if found["majority"] is not None else []
        if found["majority_of_test"] not in (None, found["majority"]):
            against.append(f"best single class of the test {show(found['majority_of_test'])}")
        console.print(
            f"  {found['metric']:<16}{show(found['score'])}" + (f"  ({', '.join(against)})" if against else "")
        )
        plain = found["metric"] == "accuracy"  # which needs no other metric to be understood
        if text := counts_text(found["extra_metrics"], "") if plain else extra_metrics_text(found["extra_metrics"]):
            console.print(f"{'':<18}{text}")
    totals = found["bytes"]["federation"]["with_head"]
    console.print(
        f"  bytes sent      {bytes_text(totals['total'])} in all: one-off {bytes_text(totals['one_off'])}, "
        f"up {bytes_text(totals['up'])}, down {bytes_text(totals['down'])}"
    )
    for price in manifest.get("prices", []):
        if not price["this_run"] and price["label"].startswith(("fedit ", "flora ")) and totals["total"]:
            console.print(
                f"    {price['label']:<16} would have sent {bytes_text(price['total_bytes'])} for the planned rounds"
            )
    if found["epsilon"] is not None:
        console.print(f"  privacy         {found['privacy']}")
    for warning in found["warnings"]:
        console.print(f"  warning         {warning['text']}", style="bold red")
    if result:
        console.print(f"  adapter         {result['adapter']}")
    for text in found["data_warnings"]:
        console.print(f"  warning         {text}", style="yellow")
    if (folder / "report.html").exists():
        console.print(f"  report          {folder / 'report.html'}")
    for line in serving_lines((result or {}).get("serving", []), only_doubts=True):
        console.print(f"  elsewhere       {line}")
    if result:
        console.print(f"\nLoad it:\n\n{result['load']}\n")


def print_estimate(found: Mapping[str, Any], *, verbose: bool) -> None:
    """Prints what `fedsb check` found: data, bytes, memory, time, privacy, warnings; all settings with `verbose`."""
    console, terminal = plain_console(), Terminal(verbose=verbose)
    for line in shown_lines(found["data"]) if found["data"] else ():
        terminal.note(line)
    terminal.settings([ResolvedSetting(**choice) for choice in found["settings"]])
    if verbose:
        _print_prices(console, found)
    terminal.note(bytes_line(found["prices"]))
    one, sizes = found["values_a_client_a_round"], found["bytes_a_client_a_round"]
    terminal.note(
        f"{'':<9}per client and round {bytes_text(sizes['up'])} up, {bytes_text(sizes['down'])} down"
        + (f"; once {one['one_off']:,} values" if one["one_off"] else "")
    )
    if verbose:
        head = f"and the head's {one['head']:,} each way"
        terminal.note(f"{'':<9}per client and round {one['up']:,} values up, {one['down']:,} down, {head}")
    alone = f"a site that trains alone {bytes_text(found['client_memory_bytes'])}"
    terminal.note(f"{'memory':<9}about {bytes_text(found['memory_bytes'])}, an estimate; {alone}")
    if verbose:
        terminal.note(f"{'':<9}{found['memory_reason']}")
    about = "" if found["seconds"] is None else f"about {seconds_text(found['seconds'])} "
    reason = found["seconds_reason"]
    terminal.note(f"{'time':<9}{about}{f'({reason})' if about else reason}")
    if found["privacy"]:
        print_promise(console, found["privacy"])
    for line in found["warnings"]:
        terminal.note(f"{WARNING} {line}.")
    if found["unknown"]:
        console.print("\nNot known here:")
        for line in found["unknown"]:
            console.print(f"  - {line}")
    if not verbose:
        console.print("\n--verbose shows every setting with its reason, and what other methods would send.")


def _print_prices(console: Console, found: Mapping[str, Any]) -> None:
    table = Table(
        "method",
        "one-off",
        "up",
        "down",
        "total",
        "without head",
        **PLAIN,
    )
    for price in found["prices"]:
        label = f"{price['label']}  <- this run" if price["this_run"] else price["label"]
        keys = ("one_off_bytes", "up_bytes", "down_bytes", "total_bytes", "total_bytes_without_head")
        table.add_row(label, *(bytes_text(price[key]) for key in keys))
    console.print("Bytes, the whole federation, all rounds:")
    console.print(table)
    if found["compared"]:
        named = {price["label"]: price for price in found["prices"]}
        rivals = Table("a client, a round after the first", "values up", "values down", **PLAIN)
        for label in dict.fromkeys([found["prices"][0]["label"], *found["compared"]]):
            if label in named:
                rivals.add_row(label, f"{named[label]['up_values']:,}", f"{named[label]['down_values']:,}")
        console.print(rivals)
    console.print()


def print_promise(console: Console, promised: Mapping[str, Any]) -> None:
    """What `fedsb check` says of privacy: epsilon at the end and on the way, everyone's noise, what is not covered."""
    console.print(f"\nPrivacy: {promised['says']}")
    course = ", ".join(f"{epsilon_text(epsilon)} after {round}" for round, epsilon in promised["epsilon_after"].items())
    console.print(f"  epsilon by round: {course}; by RDP, a looser bound, {epsilon_text(promised['epsilon_rdp'])}")
    table = Table("who adds noise", "of", "sampled", "noise multiplier", "sums", "epsilon", "signal / noise", **PLAIN)
    for name, plan in promised["plans"].items():
        sums = plan["steps"] * plan["rounds"]
        cells = (f"{plan['q']:.2%}", f"{plan['sigma']:.4g}", str(sums), epsilon_text(plan["epsilon"]))
        table.add_row(name, str(plan["rows"]), *cells, f"{plan['signal_to_noise']:.3g}")
    console.print(table)
    console.print("  not covered: " + "; ".join(promised["not_covered"]) + "\n")


def print_audit(found: Mapping[str, Any]) -> None:
    """What `fedsb audit` prints: the stated epsilon, what the canaries showed, and what that means."""
    console = plain_console(soft_wrap=True)
    console.print(
        f"\n{found['name']}, {found['client']}: {found['steps']} noised sums of {found['rounds']} rounds, "
        f"{found['q']:.2%} sampled, noise multiplier {found['sigma']:.4g}, delta {found['delta']:.2g}"
    )
    console.print(
        f"  epsilon         at most {epsilon_text(found['epsilon'])} by the plan, "
        f"{epsilon_text(found['epsilon_ledger'])} by the ledger"
    )
    console.print(
        f"  audited         at least {found['epsilon_audited']:.3g}, with {found['confidence']:.0%} confidence "
        f"({found['correct']} of {found['guesses']} guesses right, {found['canaries']} canaries)"
    )
    console.print(f"  {found['says']}")
    console.print(f"  as data         {found['folder']}/audit.json")


def plain_console(**options: Any) -> Console:
    """Prints texts as they are: a client may be called "[/]" or ":smile:"."""
    return Console(highlight=False, markup=False, emoji=False, **options)


def _setting(value: Any) -> str:
    """As a TOML would have it."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
