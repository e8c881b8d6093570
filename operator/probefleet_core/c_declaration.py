"""Reads the one C declaration that a ProbeMap's key or value is: ``u32 pid``, ``u64 slots[64]``, ``struct { … }``.

Pure.

Only declarations: no preprocessor, no attributes, no initialisers, no pointers. The text goes to a compiler in a
sandbox; that it can only be a declaration is held here, before, so that a ProbeMap cannot include files or define
macros. Sizes are the compiler's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_TOKENS = 2000
MAX_DEPTH = 8
_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<number>0x[0-9a-fA-F]+|[0-9]+)|(?P<mark>[{}\[\];*:,]))")
# Words that make something else than data out of a declaration.
_REFUSED = re.compile(
    "asm|__asm__|typedef|static|extern|register|inline|auto|volatile|return|goto|if|else|for|while|do|switch|case|"
    "sizeof|typeof|__typeof__|__attribute__|_Alignas|_Static_assert|_Pragma|__extension__"
)


@dataclass(frozen=True, slots=True)
class Declaration:
    """A declaration cut in three: ``type``, ``name`` (may be empty) and ``dimensions`` (``[4]``), as C text."""

    type: str
    name: str
    dimensions: str

    def typedef(self, name: str) -> str:
        """The type under another name."""
        return f"typedef {self.type} {name}{self.dimensions};"


def parse(text: str) -> Declaration:
    """Read a declaration; raises ``ValueError`` with the reason."""
    reader = _Reader(_tokens(text))
    type_text = reader.type(0)
    name, dimensions = reader.declarator()
    reader.maybe(";")
    if reader.more():
        raise ValueError(f"it goes on with “{reader.peek()}” where one declaration ends")
    return Declaration(type_text, name, dimensions)


def _tokens(text: str) -> list[str]:
    tokens, at, text = [], 0, text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise ValueError(f"“{text[at:].strip()[0]}” has no place in a declaration")
        tokens.append(found.group(found.lastgroup or 0))
        at = found.end()
        if len(tokens) > MAX_TOKENS:
            raise ValueError(f"it has more than {MAX_TOKENS} words")
    return tokens


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0

    def more(self) -> bool:
        return self._at < len(self._tokens)

    def peek(self) -> str:
        return self._tokens[self._at] if self.more() else ""

    def maybe(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self._at += 1
        return True

    def need(self, token: str) -> None:
        if not self.maybe(token):
            raise ValueError(f"“{token}” is missing " + (f"before “{self.peek()}”" if self.more() else "at the end"))

    def word(self) -> str:
        token = self.peek()
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", token):
            raise ValueError("a name is missing " + (f"before “{token}”" if token else "at the end"))
        if _REFUSED.fullmatch(token):
            raise ValueError(f"“{token}” has no place in the declaration of data")
        self._at += 1
        return token

    def type(self, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise ValueError(f"structs lie more than {MAX_DEPTH} deep")
        words = [self.word()]
        if words[0] in ("struct", "union", "enum"):
            return self._record(words[0], depth)
        # `unsigned long long x`: basic words follow one another; one other name is a type by itself.
        basic = ("const", "unsigned", "signed", "long", "short", "int", "char", "double", "float", "_Bool", "bool")
        while words[-1] in basic and (self.peek() in basic or words[-1] == "const"):
            words.append(self.word())
        return " ".join(words)

    def _record(self, keyword: str, depth: int) -> str:
        parts = [keyword]
        if self.peek() != "{":
            parts.append(self.word())
        if keyword == "enum" or not self.maybe("{"):
            return " ".join(parts)
        members = []
        while not self.maybe("}"):
            members.append(self._member(depth + 1))
        if not members:
            raise ValueError(f"the {keyword} has no members")
        return " ".join(parts) + " { " + " ".join(members) + " }"

    def _member(self, depth: int) -> str:
        type_text = self.type(depth)
        names = []
        while self.peek() != ";":
            name, dimensions = self.declarator()
            bits = f" : {self._number()}" if self.maybe(":") else ""
            names.append(f"{name}{dimensions}{bits}")
            if not self.maybe(","):
                break
        self.need(";")
        return f"{type_text} {', '.join(names)}".rstrip() + ";"

    def declarator(self) -> tuple[str, str]:
        if self.peek() == "*":
            raise ValueError("a pointer means nothing in a map that others read")
        name = self.word() if re.match(r"[A-Za-z_]", self.peek()) else ""
        dimensions = ""
        while self.maybe("["):
            dimensions += f"[{self._number()}]"
            self.need("]")
        return name, dimensions

    def _number(self) -> str:
        token = self.peek()
        if not re.fullmatch(r"0x[0-9a-fA-F]+|[0-9]+", token):
            raise ValueError("a number is missing" + (f" before “{token}”" if token else " at the end"))
        self._at += 1
        return token
