"""The project's Markdown pages as blocks, links and named paths; what a block's info string says of it.

GitHub shows the first word of a fence's info string and ignores the rest, so that is where a block says what it is:
    sh      run [status=N] | run-by=TEST | needs=cluster,gpu,imagenet,data,server
    python  run | run-by=TEST | needs=... | part (of the next that is none, and run in front of it)
    text    output [numbers=any] (of the block before) | recorded | source=FILE | layout
    toml    recipe | space | profile, [over=NAME] for a part of one, [file=NAME] to have it as a file from there on
    json, mermaid need nothing
"""

import ast
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NEEDS = {"cluster", "gpu", "imagenet", "data", "server"}
KINDS: dict[str, tuple[set[str], set[str]]] = {
    # language -> one of these, and any of those
    "sh": ({"run", "run-by", "needs"}, {"status"}),
    "python": ({"run", "run-by", "needs", "part"}, {"status"}),
    "text": ({"output", "recorded", "source", "layout"}, {"numbers"}),
    "toml": ({"recipe", "space", "profile"}, {"over", "file"}),
    "json": (set(), set()),
    "mermaid": (set(), set()),
}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)$")


@dataclass(frozen=True)
class Block:
    """One fenced block: `words` holds `run` as {"run": ""} and `status=2` as {"status": "2"}."""

    page: Path
    line: int
    language: str
    words: dict[str, str]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page that people read."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order."""
    found: list[Block] = []
    start: tuple[int, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, lines = (number, fence["info"], fence["indent"]), []
        elif fence and start is not None:
            begin, info, _ = start
            language, *words = info.split() or [""]
            pairs = (word.partition("=") for word in words)
            found.append(Block(page, begin, language, {k: v for k, _, v in pairs}, "\n".join(lines) + "\n"))
            start = None
        elif start is not None:
            lines.append(line.removeprefix(start[2]))
    assert start is None, f"{page}:{start[0] if start else 0}: this block has no end"
    return found


def programs(page: Path) -> list[Block]:
    """`blocks` with the parts of Python programs put together: a program stands where its last part does."""
    found: list[Block] = []
    parts = ""
    for block in blocks(page):
        if "part" in block.words:
            parts += block.text
        elif block.language == "python":
            found.append(replace(block, text=parts + block.text))
            parts = ""
        else:
            found.append(block)
    assert not parts, f"{page}: nothing runs the last part of a program"
    return found


def problem(block: Block) -> str:
    """What is wrong with a block's info string; empty if nothing is."""
    if block.language not in KINDS:
        return f"the language {block.language!r} is none of {', '.join(KINDS)}"
    kinds, more = KINDS[block.language]
    if kinds and len(kinds & block.words.keys()) != 1:
        return f"exactly one of {', '.join(sorted(kinds))} must say what this block is"
    if unknown := block.words.keys() - kinds - more:
        return f"unknown words: {', '.join(sorted(unknown))}"
    if unknown := set(filter(None, block.words.get("needs", "").split(","))) - NEEDS:
        return f"needs={','.join(unknown)}: known are {', '.join(sorted(NEEDS))}"
    if "needs" in block.words and not block.words["needs"]:
        return f"needs= what? Known are {', '.join(sorted(NEEDS))}"
    if "run-by" in block.words:
        return _missing_test(block.words["run-by"])
    if "source" in block.words and not (ROOT / block.words["source"]).is_file():
        return f"there is no file {block.words['source']}"
    return ""


def _missing_test(name: str) -> str:
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file():
        return f"run-by: there is no file {path}"
    if path.endswith(".py") and f"def {function}(" not in (ROOT / path).read_text(encoding="utf-8"):
        return f"run-by: {path} has no function {function!r}"
    return ""


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^( *)```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page that lead to files here, anchors included."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"https?://|mailto:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def named_paths(page: Path) -> list[str]:
    """Paths into the repository that a page's prose names in backticks."""
    rooms = "sbs|harness|sweeps|slurm|tests|docs|scripts"
    return [name.replace("NAME", "*") for name in re.findall(rf"`((?:{rooms})/[\w./*-]+)`", prose(page))]


def matches(expected: str, output: str, *, any_numbers: bool = False) -> bool:
    """Whether `output` holds the expected lines; `...` stands for anything, blanks at line ends do not count."""
    pattern = re.escape("\n".join(line.rstrip() for line in expected.strip("\n").splitlines()))
    if any_numbers:  # but those in names, such as top-1
        pattern = re.sub(r"(?<![\w-])\d+(?:(?:\\\.|,)\d+)*", r"\\d+(?:[.,]\\d+)*", pattern)
        pattern = re.sub(r"(?:\\ )+", r" +", pattern)
    pattern = re.sub(r"(?:\\?\s)*\\\.\\\.\\\.(?:\\?\s)*", ".*?", pattern)
    tidy = "\n".join(line.rstrip() for line in output.splitlines())
    return re.search(pattern, tidy, flags=re.DOTALL) is not None


@cache
def strings(source: Path) -> tuple[str, ...]:
    """All texts of a Python file; what an f-string fills in stands as `...`. Of another file: the whole."""
    if source.suffix != ".py":
        return (source.read_text(encoding="utf-8"),)
    found: list[str] = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return tuple(found)


def says(source: Path, message: str) -> bool:
    """Whether one text of the file holds the message's fixed parts in their order (`...`: what is filled in)."""
    pieces = [piece.strip() for piece in " ".join(message.split()).split("...")]
    pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
    long_enough = sum(map(len, pieces)) >= 12
    return long_enough and any(pattern.search(" ".join(text.split())) for text in strings(source))
