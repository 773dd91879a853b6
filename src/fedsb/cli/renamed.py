"""The commands of version 0.1 under their new names. They work in this version only; then delete this module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsb.utils.errors import UserError

# An option that selected what the command does -> the command that replaces it. "" stands for none of them.
SERVE = {
    "--init": "federation create",
    "--add": "federation add",
    "--revoke": "federation revoke",
    "--renew": "federation renew",
    "--sign": "federation sign",
    "": "federation serve",
}
JOIN = {"--new": "site keygen", "--dry-run": "site check", "--directory": "site update", "": "site join"}
STATUS = {"": "federation status"}
RENAMED: Mapping[str, Mapping[str, str]] = {"serve": SERVE, "join": JOIN, "status": STATUS}
WITH_VALUE = ("--add", "--revoke", "--directory")  # their value is now the last argument


ONLY_NOW = "The old name works in this version only."


def new_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Returns the arguments with the new names, and a notice if any name was old.

    Raises UserError for several options that select what the command does.
    """
    if not arguments or arguments[0] not in RENAMED:
        new = _with_new_engine(arguments)
        return new, None if new == list(arguments) else f"--engine embedded was renamed to in_process. {ONLY_NOW}"
    old, commands = arguments[0], RENAMED[arguments[0]]
    rest, chosen, last = list[str](), list[str](), list[str]()
    given = iter(arguments[1:])
    for argument in given:
        option, equals, value = argument.partition("=")
        if option not in commands or not option:
            rest.append(argument)
            continue
        chosen.append(option)
        if option in WITH_VALUE:
            last += [value] if equals else [next(given, "")]
    if len(chosen) > 1:
        raise UserError(f"fedsb {old} accepts only one of {' and '.join(chosen)}. Run a command for each.")
    command = commands[chosen[0] if chosen else ""]
    named = "federation status` or `fedsb site status" if old == "status" else command
    notice = f"`{' '.join(['fedsb', old, *chosen])}` was renamed to `fedsb {named}`. {ONLY_NOW}"
    return [*command.split(), *rest, *last], notice


def _with_new_engine(arguments: Sequence[str]) -> list[str]:
    if arguments[:1] != ["run"]:
        return list(arguments)
    pairs = zip(["", *arguments[:-1]], arguments, strict=True)
    new = ["in_process" if pair == ("--engine", "embedded") else pair[1] for pair in pairs]
    return [argument.replace("--engine=embedded", "--engine=in_process") for argument in new]
