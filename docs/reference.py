"""The API reference, read from the modules without importing them.

A parameter, a field and a returned value are documented by the comment behind them."""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Row = tuple[str, str, str, str]  # name, type, default, meaning


def comments(source: str) -> dict[int, tuple[str, bool]]:
    "{line: (text, True if nothing stands before it)} of all comments."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, alone = (
                token.string.lstrip("# ").strip(),
                not token.line[: token.start[1]].strip(),
            )
            found[token.start[0]] = text, alone
    return found


def comment_behind(line: int, notes: dict[int, tuple[str, bool]]) -> str:
    "The comment at the end of a line, and the lines of comment that follow it."
    text, alone = notes.get(line, ("", True))
    parts = [] if alone else [text]
    while parts and notes.get(line + 1, ("", False))[1]:
        line += 1
        parts.append(notes[line][0])
    return " ".join(parts)


# ---- functions


def arguments(node: Function) -> Iterator[tuple[str, ast.arg, ast.expr | None]]:
    "(name as shown, argument, default) of each parameter but `self` and `cls`."
    spec = node.args
    plain = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)
    pairs = list(zip(plain, defaults))
    if pairs and pairs[0][0].arg in ("self", "cls"):
        pairs = pairs[1:]
    yield from ((arg.arg, arg, default) for arg, default in pairs)
    if spec.vararg:
        yield f"*{spec.vararg.arg}", spec.vararg, None
    for arg, default in zip(spec.kwonlyargs, spec.kw_defaults):
        yield arg.arg, arg, default
    if spec.kwarg:
        yield f"**{spec.kwarg.arg}", spec.kwarg, None


def last_line(arg: ast.arg, default: ast.expr | None) -> int:
    "The line where a parameter ends."
    return (default or arg).end_lineno or arg.lineno


def parameter_rows(node: Function, notes: dict[int, tuple[str, bool]]) -> list[Row]:
    "A row for each parameter, and one for the returned value if a comment stands behind it."
    found = list(arguments(node))
    lines = [last_line(arg, default) for _, arg, default in found]
    rows = []
    for (name, arg, default), line in zip(found, lines):
        alone = lines.count(line) == 1 and line != node.lineno
        meaning = comment_behind(line, notes) if alone else ""
        rows.append((name, code(arg.annotation), code(default), meaning))
    end = node.returns.end_lineno if node.returns else None
    if end and (end == node.lineno or end not in lines) and comment_behind(end, notes):
        rows.append(("returns", code(node.returns), "", comment_behind(end, notes)))
    return rows


def signature(node: Function) -> str:
    "`(a, b=1, *, c=2)`, without types, which stand in the table."
    parts, starred = [], False
    only = {arg.arg for arg in node.args.kwonlyargs}
    for name, _, default in arguments(node):
        if name in only and not starred and not node.args.vararg:
            parts.append("*")
        starred = starred or name in only or name.startswith("*")
        parts.append(name if default is None else f"{name}={ast.unparse(default)}")
    return f"({', '.join(parts)})"


# ---- text


def code(node: ast.expr | None) -> str:
    "An expression as Python; '' for none. An annotation in quotes is shown without them."
    if node is None:
        return ""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if node.value.isidentifier() else repr(node.value)
    return ast.unparse(node)


def prose(text: str) -> str:
    "A docstring or comment as Markdown: what stands in backticks is code, the rest is no markup."
    parts = re.split(r"(`[^`]*`)", inspect.cleandoc(text))
    parts[::2] = [re.sub(r"([<*$\\\[\]|])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def cell(text: str) -> str:
    "Code in a cell of a table."
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`" if text else ""


def table(rows: list[Row], first: str) -> str:
    "Rows as a Markdown table; columns without entries are left out."
    head = (first, "type", "default", "meaning")
    lines = [(cell(n), cell(t), cell(d), prose(m).replace("\n", " ")) for n, t, d, m in rows]
    kept = [i for i in range(4) if any(line[i] for line in lines)]
    texts = [[line[i] for i in kept] for line in [head, ("---",) * 4, *lines]]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def directive(kind: str, heading: str, body: list[str], options: str = "", fence: int = 3) -> str:
    "A directive of Sphinx's Python domain in MyST."
    marks = ":" * fence
    text = "\n\n".join(part for part in body if part)
    return f"{marks}{{py:{kind}}} {heading}\n{options}\n{text}\n{marks}"


# ---- definitions


def function_entry(node: Function, notes: dict, kind: str = "function") -> str:
    "The reference of a function or a method."
    marks = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
    options = "".join(f":{m}:\n" for m in ("classmethod", "staticmethod") if m in marks)
    doc = prose(ast.get_docstring(node) or "")
    if marks & {"property", "cached_property", "functools.cached_property"}:
        options = f":type: {code(node.returns)}\n" if node.returns else ""
        return directive("property", node.name, [doc], options)
    rows = parameter_rows(node, notes)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    heading = f"{node.name}{signature(node)}{returns}"
    return directive(kind, heading, [doc, table(rows, "parameter") if rows else ""], options)


def class_entry(node: ast.ClassDef, notes: dict) -> str:
    "The reference of a class: what it is, its fields, its public methods."
    functions = [n for n in node.body if isinstance(n, Function)]
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    rows = [
        (ast.unparse(n.target), code(n.annotation), code(n.value), comment_behind(end, notes))
        for n in fields
        if (end := n.end_lineno) and not ast.unparse(n.target).startswith("_")
    ]
    first = "field"
    for n in functions:
        if n.name == "__init__":
            rows, first = parameter_rows(n, notes), "parameter"
    bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
    methods = [function_entry(n, notes, "method") for n in functions if not n.name.startswith("_")]
    body = [prose(ast.get_docstring(node) or ""), f"Bases: {bases}" if bases else ""]
    return directive(
        "class", node.name, [*body, table(rows, first) if rows else "", *methods], fence=4
    )


def data_entry(name: str, value: ast.expr | None, note: str) -> str:
    "The reference of a constant; its value if it is short."
    shown = ast.unparse(value) if value else ""
    options = f":value: {shown}\n" if 0 < len(shown) <= 80 and "\n" not in shown else ""
    return directive("data", name, [prose(note)], options)


def entries(tree: ast.Module, notes: dict) -> Iterator[tuple[str, str]]:
    "(name, reference) of each definition of a module."
    for node in tree.body:
        if isinstance(node, Function):
            yield node.name, function_entry(node, notes)
        elif isinstance(node, ast.ClassDef):
            yield node.name, class_entry(node, notes)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            note = comment_behind(node.end_lineno or 0, notes)
            pairs = list(assigned(targets, node.value))
            yield from ((name, data_entry(name, value, note)) for name, value in pairs)


def assigned(
    targets: list[ast.expr], value: ast.expr | None
) -> Iterator[tuple[str, ast.expr | None]]:
    "(name, value) of each name that a statement assigns."
    for target in targets:
        if isinstance(target, ast.Name):
            yield target.id, value
        elif isinstance(target, ast.Tuple):
            # without a tuple behind it, the text does not show the parts
            parts = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
            for name, part in zip(target.elts, parts):
                yield from assigned([name], part)


def public_names(tree: ast.Module) -> list[str]:
    "What `__all__` names."
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def module_page(path: Path, module: str, notebook: str = "") -> str:
    "The reference of the module at `path` as MyST; `notebook` is the page that it is made from."
    source = path.read_text(encoding="utf-8")
    tree, notes = ast.parse(source), comments(source)
    public = set(public_names(tree))
    parts = [f"# {module}", f"```{{py:module}} {module}\n```"]
    parts.append(prose((ast.get_docstring(tree) or "").rstrip(".") + "."))
    if notebook:
        parts.append(f"Examples and explanations: [the notebook of this module](/{notebook})")
    parts += [text for name, text in entries(tree, notes) if name in public]
    return "\n\n".join(parts) + "\n"
