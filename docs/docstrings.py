# SPDX-License-Identifier: Apache-2.0
"""Docstrings of the package, plain text for `help()`, as reStructuredText for the reference.

Paragraphs stay paragraphs, indented items ("x: features [n, p] ...") become lists, `names` become code or links, and
formulas are set as far as plain text tells: x_i and |K|_F^2 with sub- and superscripts, tau as a Greek letter.
"""

import re

GREEK = dict(tau="τ", sigma="σ", lam="λ", alpha="α", beta="β", gamma="γ", mu="μ", eps="ε", rho="ρ", Phi="Φ", phi="φ")
# what an index or an exponent may stand on: a letter, a Greek name, a bracket or bar, and a few words
BASE = rf"(?<![\w.])(?:{'|'.join(GREEK)}|sum|mean|log|HSIC|[A-Za-z])~?'?|[)\]|]'?"
SCRIPT = r"_(?:[A-Za-z0-9]{1,3}'?(?!\w)|\([^()]+\)\w?)|\^(?:-?[A-Za-z0-9]+|\([^()]+\))"
FORMULA = re.compile(rf"({BASE})((?:{SCRIPT})+)")
ITEM = re.compile(r"((?:`[^`]+`|[\w.]+)(?:, (?:`[^`]+`|[\w.]+))*): ")
SECTIONS = ("Args:", "Returns:", "Raises:")


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_|])", r"\\\1", text)


def _greek(text: str) -> str:
    return re.sub(rf"(?<![\w.])({'|'.join(GREEK)})(?![\w=])", lambda found: GREEK[found[1]], text)


def _scripts(found: re.Match) -> str:
    base = found[1]
    base = f"*{base}*" if re.fullmatch("[A-Za-z]", base) else _escaped(_greek(base))
    for kind, body in re.findall(r"([_^])(\([^()]+\)\w?|-?\w+'?)", found[2]):
        body = body[1:-1] if re.fullmatch(r"\([^()]+\)", body) else body
        base += rf"\ :{'sub' if kind == '_' else 'sup'}:`{_greek(body)}`"
    return rf"{base}\ "


def _plain(text: str) -> str:
    parts, end = [], 0
    for found in FORMULA.finditer(text):
        before = text[end : found.start()]
        # markup needs a border to a letter or bracket before it
        parts += [_escaped(_greek(before)), r"\ " if before[-1:].strip() else "", _scripts(found)]
        end = found.end()
    return "".join(parts) + _escaped(_greek(text[end:]))


def _code(code: str) -> str:
    name = re.fullmatch(r"kd((?:\.\w+)+)(\(\))?", code)
    return f":py:obj:`{code} <kdkernels{name[1]}>`" if name else f"``{code}``"


def inline(text: str) -> str:
    pieces = re.split(r"`([^`]+)`", text)
    return "".join(_code(piece) if i % 2 else _plain(piece) for i, piece in enumerate(pieces))


def _items(lines: list[str]) -> list[str]:
    """The lines below "Args:", each item at an indentation of four and its continuation deeper."""
    items: list[str] = []
    for line in lines:
        if line.startswith("     ") and items:
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    found = []
    for item in items:
        name = ITEM.match(item)
        found.append(f"* **{_escaped(name[1])}**: {inline(item[name.end() :])}" if name else f"* {inline(item)}")
    return [*found, ""]


def _block(block: list[str]) -> list[str]:
    first = block[0]
    if first.startswith(">>>"):
        return [*block, ""]
    if first in SECTIONS:
        # what "Returns:" says is one text, not items
        body = _items(block[1:]) if first == "Args:" else [inline(" ".join(map(str.strip, block[1:]))), ""]
        return [f"**{first[:-1]}**", "", *body]
    if all(line.startswith("    ") for line in block):
        return ["::", "", *("    " + line for line in block), ""]
    if any(line.startswith("    ") for line in block):  # `method(...)`: and what it does, indented
        paragraphs = re.sub(r"\n(?! )", "\n\n", "\n".join(block)).split("\n\n")
        return [line for p in paragraphs for line in (f"* {inline(' '.join(p.split()))}", "")]
    return [inline(" ".join(block)), ""]


def restructured(lines: list[str]) -> list[str]:
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    return [line for block in blocks if block.strip() for line in _block(block.split("\n"))]


def _process(app, what, name, obj, options, lines):
    lines[:] = restructured(lines)


def setup(app):
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
