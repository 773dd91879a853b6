"""Prints runs and their results in a terminal: settings, rounds, summaries, estimates and audits."""

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
from fedsb.reporting.prices import baseline_prices, bytes_line, total_text
from fedsb.utils.formatting import bytes_text, counts_text, epsilon_text, extra_metrics_text, score_text, seconds_text

PLAIN: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}  # tables without lines
COLUMNS = ("round", "loss", "score", "up", "down", "seconds", "left", "dropped")


PREDICTION_COLUMNS = ("prediction", "probabilities", "ended", "base_prediction", "base_ended")


class Terminal:
    """Shows a run as a live table with a row per round. Without a terminal, prints a line per round."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.console = plain_console(stderr=quiet)
        self.quiet, self.verbose = quiet, verbose
        self.rows: list[list[str]] = []
        self.live: Live | None = None
        self.seconds = 0.0  # of the rounds shown so far

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def settings(self, choices: Sequence[ResolvedSetting]) -> None:
        """Prints every resolved setting with its reason, the defaults together at the end.

        A later choice replaces an earlier one with the same key. Without `verbose`, prints only warnings; all settings
        are in the manifest and the report.
        """
        if self.quiet:
            return
        if not self.verbose:
            found = {choice.key: choice for choice in choices}
            if (preflight := found.get("preflight")) is not None:
                name = Path(str(next(choice.value for choice in choices if choice.key == "model.name"))).name
                self.note(
                    f"{'model':<9}{name}, {found['model.target_modules'].value}; preflight for {preflight.value}: "
                    f"{preflight.reason}"
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
        self.console.print("\nDefaults:")
        rest = Table(show_header=False, **PLAIN)
        for section, settings in defaults.items():
            rest.add_row(f"  {section}", ", ".join(settings))
        self.console.print(rest)
        self.console.print()

    def note(self, text: str) -> None:
        """Prints a line; a warning in yellow."""
        self.console.print(text, soft_wrap=True, style="yellow" if text.startswith(WARNING) else None)

    def round(self, row: Mapping[str, Any], rounds: int) -> None:
        """Shows a completed round."""
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
    """Prints rows with the same keys as a table if it fits, else a paragraph per row."""
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
        table = Table("", Column("", overflow="fold"), show_header=False, **PLAIN)
        for name, cell in zip(list(rows[0])[1:], others, strict=True):
            table.add_row(f"  {name}", cell)
        console.print(table)


def print_predictions(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints predictions with their rows: one line each, or two for generated text."""
    console = plain_console()
    shown = [_cell(row["prediction"]) for row in rows]
    width, digits = max(map(len, shown)), len(str(len(rows)))
    for number, (row, prediction) in enumerate(zip(rows, shown, strict=True), start=1):
        of = " | ".join(" ".join(str(value).split()) for name, value in row.items() if name not in PREDICTION_COLUMNS)
        start = f"{number:>{digits}}  "
        if "ended" in row:
            console.print(start + of, no_wrap=True, overflow="ellipsis")
            if "base_prediction" in row:
                before = " ".join(row["base_prediction"].split())
                console.print(f"{' ' * len(start)}base model: {before}{'' if row['base_ended'] else ' [cut]'}")
                prediction = f"with adapter: {prediction}"
            console.print(f"{' ' * len(start)}{prediction.strip()}{'' if row['ended'] else ' [cut]'}\n")
            continue
        share = f"{row['probabilities'][row['prediction']]:.3f}  " if "probabilities" in row else ""
        console.print(f"{start}{prediction:<{width}}  {share}{of}", no_wrap=True, overflow="ellipsis")


def print_scores(found: Mapping[str, Any]) -> None:
    """Prints the scores of several tables, and their mean."""
    rows = [{key: value for key, value in of.items() if key not in ("run", "answers")} for of in found["tables"]]
    last = dict.fromkeys(rows[0], "") | {"data": "mean", found["metric"]: found["mean"]}
    print_table([*({**row, "data": Path(row["data"]).name} for row in rows), last])


def print_summary(folder: Path, found: Mapping[str, Any]) -> None:
    """Prints the summary of a run: score, bytes, privacy and adapter."""
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
        plain = found["metric"] == "accuracy"  # other metrics add nothing to it
        if text := counts_text(found["extra_metrics"], "") if plain else extra_metrics_text(found["extra_metrics"]):
            console.print(f"{'':<18}{text}")
    totals = found["bytes"]["federation"]["with_head"]
    console.print(
        f"  bytes sent      {bytes_text(totals['total'])} in total: one-off {bytes_text(totals['one_off'])}, "
        f"up {bytes_text(totals['up'])}, down {bytes_text(totals['down'])}"
    )
    for price in baseline_prices(manifest.get("prices", [])) if totals["total"] else ():
        console.print(f"    {price['label']:<16} would have sent {total_text(price)} for the planned rounds")
    if found["epsilon"] is not None:
        console.print(f"  privacy         {found['privacy']}")
    for warning in found["warnings"]:
        console.print(f"  warning         {warning['text']}", style="bold red")
    if result:
        console.print(f"  adapter         {result['adapter']}")
    if result and (why := result.get("adapter_unchecked")):
        console.print(f"{'':<18}not checked: {why}", style="yellow")
    if (folder / "clients").is_dir():
        console.print(f"{'':<18}and each client's own one: {folder / 'clients'}")
    for text in found["data_warnings"]:
        console.print(f"  warning         {text}", style="yellow")
    if (folder / "report.html").exists():
        console.print(f"  report          {folder / 'report.html'}")
    for line in serving_lines((result or {}).get("serving", []), only_doubts=True):
        console.print(f"  serving         {line}")
    if result:
        console.print(f"\nLoad the adapter:\n\n{result['load']}\n")


def print_estimate(found: Mapping[str, Any], *, verbose: bool) -> None:
    """Prints the estimates of `fedsb check`. With `verbose`, also all settings and the bytes of other methods."""
    console, terminal = plain_console(), Terminal(verbose=verbose)
    for line in shown_lines(found["data"]) if found["data"] else ():
        terminal.note(line)
    terminal.settings([ResolvedSetting(**choice) for choice in found["settings"]])
    if verbose:
        _print_prices(console, found)
    terminal.note(bytes_line(found["prices"]))
    one, sizes = found["values_per_client_round"], found["bytes_per_client_round"]
    terminal.note(
        f"{'':<9}per client and round {bytes_text(sizes['up'])} up, {bytes_text(sizes['down'])} down"
        + (f"; once {one['one_off']:,} values" if one["one_off"] else "")
    )
    if verbose:
        head = f"and {one['head']:,} of the head each way"
        terminal.note(f"{'':<9}per client and round {one['up']:,} values up, {one['down']:,} down, {head}")
    alone = f"{bytes_text(found['client_memory_bytes'])} for one client alone"
    terminal.note(f"{'memory':<9}about {bytes_text(found['memory_bytes'])}, an estimate; {alone}")
    if verbose:
        terminal.note(f"{'':<9}{found['memory_reason']}")
        _print_phases(console, found["phases"])
    about = "" if found["seconds"] is None else f"about {seconds_text(found['seconds'])} "
    reason = found["seconds_reason"]
    terminal.note(f"{'time':<9}{about}{f'({reason})' if about else reason}")
    if found["privacy"]:
        _print_privacy(console, found["privacy"])
    for line in found["warnings"]:
        terminal.note(f"{WARNING} {line}.")
    if found["unknown"]:
        console.print("\nUnknown:")
        for line in found["unknown"]:
            console.print(f"  - {line}")
    if not verbose:
        console.print("\n--verbose shows every setting with its reason, and the bytes of other methods.")


def _print_phases(console: Console, phases: Mapping[str, Any]) -> None:
    table = Table("phase", "time", "memory", **PLAIN)
    for phase, cost in phases.items():
        table.add_row(
            phase, "" if cost["seconds"] is None else seconds_text(cost["seconds"]), bytes_text(cost["memory_bytes"])
        )
    console.print("Estimates of each phase:")
    console.print(table)
    console.print()


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
    console.print("Bytes of all clients and all rounds:")
    console.print(table)
    if found["compared"]:
        named = {price["label"]: price for price in found["prices"]}
        values = Table("per client and round after the first", "values up", "values down", **PLAIN)
        for label in dict.fromkeys([found["prices"][0]["label"], *found["compared"]]):
            if label in named:
                values.add_row(label, f"{named[label]['up_values']:,}", f"{named[label]['down_values']:,}")
        console.print(values)
    console.print()


def _print_privacy(console: Console, privacy: Mapping[str, Any]) -> None:
    """Prints the planned privacy: epsilon by round, the noise of every client, and what epsilon does not cover."""
    console.print(f"\nPrivacy: {privacy['says']}")
    by_round = ", ".join(
        f"{epsilon_text(epsilon)} after {round}" for round, epsilon in privacy["epsilon_after"].items()
    )
    console.print(f"  epsilon by round: {by_round}; by RDP, a looser bound, {epsilon_text(privacy['epsilon_rdp'])}")
    own = [] if privacy["own_epsilon"] is None else ["own share", "alone"]
    heads = ["noise added by", "rows", "sampled", "noise multiplier", "sums", "epsilon", "signal / noise", *own]
    table = Table(*heads, **PLAIN)
    for name, plan in privacy["plans"].items():
        sums = plan["steps"] * plan["rounds"]
        cells = (f"{plan['q']:.2%}", f"{plan['sigma']:.4g}", str(sums), epsilon_text(plan["epsilon"]))
        alone = [f"{plan['own_sigma']:.4g}", epsilon_text(plan["own_epsilon"])] if own else []
        table.add_row(name, str(plan["rows"]), *cells, f"{plan['signal_to_noise']:.3g}", *alone)
    console.print(table)
    if own:
        console.print("  alone: epsilon if all other clients collude, so that only the client's own share counts")
    for batch, ratio in privacy.get("larger_batches", {}).items():
        console.print(f"  with {batch} rows per step, the noise of a step's mean would be {ratio:.2f} times as large")
    console.print("  not covered: " + "; ".join(privacy["not_covered"]) + "\n")


def print_audit(found: Mapping[str, Any]) -> None:
    """Prints an audit: the stated epsilon, the epsilon that the canaries show, and the conclusion."""
    console = plain_console(soft_wrap=True)
    console.print(
        f"\n{found['name']}, {found['client']}: {found['steps']} noised sums in {found['rounds']} rounds, "
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
    console.print(f"  data            {found['folder']}/audit.json")


def plain_console(**options: Any) -> Console:
    """Returns a console that prints texts unchanged: the name of a client may be "[/]" or ":smile:"."""
    return Console(highlight=False, markup=False, emoji=False, **options)


def _setting(value: Any) -> str:
    """Returns a value as in a TOML file."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
