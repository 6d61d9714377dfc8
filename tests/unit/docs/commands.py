"""Command lines as the pages print them, checked against the real command lines without running anything."""

import importlib.util
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from harness.config import load_recipe
from harness.errors import UserError
from tests.unit.docs.pages import ROOT

# Programs that are not ours: taken as they are.
OTHERS = {
    *(".", "cat", "cd", "cp", "echo", "export", "git", "grep", "head", "hostname", "kill", "less", "ls", "mkdir", "mv"),
    *(
        "mlflow",
        "ray",
        "rm",
        "sbatch",
        "scontrol",
        "sinfo",
        "squeue",
        "ssh",
        "sudo",
        "tail",
        "tar",
        "torchrun",
        "unset",
    ),
}
_OURS = ("harness", "sweeps", "slurm")


class BadCommandError(Exception):
    """A command that would not do what the page says."""


def commands(script: str) -> list[list[str]]:
    """The simple commands of a shell script, without comments, redirections and assignments."""
    found: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        command: list[str] = []
        skip = False
        for word in lexer:
            if skip:
                skip = False
            elif set(word) <= set("|&;"):
                found.append(command)
                command = []
            elif set(word) <= set("<>&"):
                skip = True
                if command and command[-1].isdigit():
                    command.pop()
            else:
                command.append(word)
        found.append(command)
    return [trimmed for command in found if (trimmed := _without_assignments(command))]


def _without_assignments(command: list[str]) -> list[str]:
    while command and re.match(r"^[A-Z_]+=", command[0]):
        command = command[1:]
    return command


def check(command: Sequence[str]) -> list[str]:
    """Raise `BadCommandError` if the command cannot work; the command path of ours that it calls, else []."""
    program = Path(command[0]).name
    if program == "make":
        return _check_make(command[1:])
    if program not in OTHERS and not program.startswith("python"):
        raise BadCommandError(f"{program} is unknown here: is it a program that users have?")
    if program in ("ray", "ssh") and "--" in command:
        return check(command[command.index("--") + 1 :])
    if (program.startswith("python") or program == "torchrun") and "-m" in command:
        at = command.index("-m")
        return _check_module(command[at + 1], list(command[at + 2 :]))
    return []


def _check_make(words: Sequence[str]) -> list[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for word in words:
        if "=" not in word and word not in targets:
            raise BadCommandError(f"the Makefile has no target {word!r}")
    return []


def application(module: str) -> Any:
    """The command line of `python -m module`."""
    entry = importlib.import_module(f"{module}.__main__")
    return typer.main.get_command(entry.app)


def _check_module(module: str, words: list[str]) -> list[str]:
    if module not in _OURS:
        if importlib.util.find_spec(module) is None:
            raise BadCommandError(f"there is no module {module}")
        return []
    app = application(module)
    if module == "slurm" and "--" in words:
        at = words.index("--")
        check(words[at + 1 :])
    path, params = _parse(app, f"python -m {module}", words)
    if "--help" not in words:
        _check_values([module, *path], params)
    return [module, *path]


def _parse(app: Any, name: str, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The path of subcommands and the parameters of the last one."""
    path: list[str] = []
    command, context = app, None
    try:
        while True:
            context = command.make_context(path[-1] if path else name, list(words), parent=context)
            if not hasattr(command, "resolve_command"):
                return path, context.params
            words = [*getattr(context, "_protected_args", []), *context.args]
            found, command, words = command.resolve_command(context, words)
            path.append(str(found))
    except typer.Exit:  # --help
        return path, {}
    except Exception as error:
        if not hasattr(error, "format_message"):  # the command line library's own kind of error
            raise
        raise BadCommandError(f"{name} {' '.join(path)}: {error.format_message()}") from None


def called(command: Sequence[str]) -> list[str]:
    """The command path of ours that a command calls, its arguments right or wrong; [] for others."""
    words = list(command)
    if "-m" not in words or words[words.index("-m") + 1] not in _OURS:
        return []
    at = words.index("-m") + 1
    path, group = [words[at]], application(words[at])
    for word in words[at + 1 :]:
        inner = getattr(group, "commands", {})
        if word not in inner:
            break
        path, group = [*path, word], inner[word]
    return path


def _check_values(path: list[str], params: dict[str, Any]) -> None:
    """Named recipes, spaces and profiles exist and take the overrides."""
    try:
        if path[:2] == ["harness", "train"]:
            load_recipe(params["recipe"], params["overrides"])
        elif path[:2] == ["sweeps", "run"]:
            from sweeps.space import base_recipe, load_space

            base_recipe(load_space(params["space"], name=params["name"]), params["overrides"])
        elif path[:2] == ["slurm", "submit"]:
            from slurm.profile import load_profile

            load_profile(params["profile"], params["settings"] or [])
    except UserError as error:
        raise BadCommandError(str(error)) from None
