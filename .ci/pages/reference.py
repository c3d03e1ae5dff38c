"The public names of the library as pages: read from the modules' text, nothing is imported."
import ast
import io
import re
import sys
import tokenize
from functools import cache
from inspect import cleandoc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import notebooks as N

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FIELDS = {"dataclass", "NamedTuple"}


@cache
def tree(module): return ast.parse((N.LIB / f"{module}.py").read_text(encoding="utf-8"))


@cache
def comments(module):
    "{line: its comment}"
    text = (N.LIB / f"{module}.py").read_text(encoding="utf-8")
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}


def named(node):
    "The names that a statement of a module gives."
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]


@cache
def public(module):
    "{name: its statement} of a module's `__all__`, in the order of the code."
    body = tree(module).body
    listed = next((ast.literal_eval(n.value) for n in body if "__all__" in named(n)), [])
    return {name: n for n in body for name in named(n) if name in listed}


def known_in(code):
    "{name: module} for what Python code imports from the library."
    try: statements = ast.walk(ast.parse(code))
    except SyntaxError: return {}
    found = [n for n in statements if isinstance(n, ast.ImportFrom) and n.module]
    own = [(n.module.split(".")[-1], n) for n in found if n.level == 1 or n.module.startswith(f"{N.LIB.name}.")]
    return {a.name: module for module, n in own for a in n.names if (N.LIB / f"{module}.py").exists() and a.name in public(module)}


def known_on(path, module):
    "{name: module} on the pages of a chapter and its module: what is their own, and what they import or one module alone has where that is no plain word (`train` may be a split)."
    code = [N.source(c) for c in N.load(path)["cells"] if c["cell_type"] == "code"]
    if module: code.append((N.LIB / f"{module}.py").read_text(encoding="utf-8"))
    found = unmistakable()
    for text in code: found.update({name: m for name, m in known_in(text).items() if telling(name)})
    return found | ({name: module for name in public(module)} if module else {})


@cache
def unmistakable():
    "{name: module} for telling names that one module alone has."
    owners = {}
    for module in N.modules():
        for name in public(module): owners.setdefault(name, []).append(module)
    return {name: o[0] for name, o in owners.items() if len(o) == 1 and telling(name)}


def telling(name): return len(name) > 2 and bool(re.search("[A-Z_]", name))


# ---------------------------------------------------------------- pages

def page(module, chapter, home):
    "A module's page: its opening line, the way to its chapter, and every public name."
    places = sections(chapter)
    top = [f"# {N.LIB.name}.{module}", f"```{{py:module}} {N.LIB.name}.{module}\n```", f"> {ast.get_docstring(tree(module))}",
           f"```{{container}} lead\nChapter: [{N.title(chapter)}]({link(chapter)}) · [source]({home}/{N.rel(N.LIB)}/{module}.py)\n```"]
    return "\n\n".join(top + [entry(module, name, node, places.get(name)) for name, node in public(module).items()]) + "\n"


def overview(modules):
    rows = [f"| [`{m}`]({m}.md) | {cell(ast.get_docstring(tree(m)))} | [{N.title(p)}]({link(p)}) |" for m, p in modules]
    return "\n".join(["# All modules", "", "| module | what it holds | chapter |", "|---|---|---|", *rows, "", "```{toctree}", ":hidden:", "", *(f"{m} <{m}>" for m, _ in modules), "```", ""])


def link(chapter): return f"../{chapter.relative_to(N.NBS).as_posix()}"


def sections(chapter):
    "{name: (heading, link)} for what a chapter exports, by the heading above the cell."
    found, heading = {}, None
    for c in N.load(chapter)["cells"]:
        text = N.source(c)
        if c["cell_type"] == "markdown": heading = ([h for h in N.headings(text) if h] or [heading])[-1]
        elif N.directives(text).keys() & N.EXPORTS and heading:
            for node in ast.parse(text).body:
                for name in named(node): found.setdefault(name, (heading, f"{link(chapter)}#{N.anchor(heading)}"))
    return found


def entry(module, name, node, place):
    "One public name, in MyST."
    if isinstance(node, ast.ClassDef): return of_class(module, node, place)
    if isinstance(node, FUNCTIONS): return directive("function", signature(node), [words(node, place), table(parameters(module, node))])
    value = short(" ".join(ast.unparse(node.value).split())).replace("'", "''")
    return directive("data", name, [f"{plain(comments(module).get(node.end_lineno, ''))} {origin(place)}"], [f":value: '{value}'"])


def of_class(module, node, place):
    inside = [n for n in node.body if isinstance(n, FUNCTIONS)]
    init = next((n for n in inside if n.name == "__init__"), None)
    bases = [ast.unparse(b) for b in node.bases]
    given = parameters(module, init, True) if init else fields(module, node) if FIELDS & set(bases + [ast.unparse(d).split("(")[0] for d in node.decorator_list]) else []
    made = f"{node.name}{arguments(init, True)}" if init else node.name + (f"({', '.join(p[0] + ('=' + p[2] if p[2] else '') for p in given)})" if given else "")
    kin = f"A kind of {', '.join(f'`{b}`' for b in bases)}." if bases else ""
    methods = [method(module, n) for n in inside if not n.name.startswith("_") and (ast.get_docstring(n) or n.name == "forward")]
    return directive("class", made, [words(node, place), kin, table(given), *methods], fence=4)


def method(module, node):
    marks = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
    if marks & {"property", "cached_property"}: return directive("property", node.name, [words(node)])
    given = [p for p in parameters(module, node, "staticmethod" not in marks) if p[3]]
    kind = [f":{m}:" for m in ("classmethod", "staticmethod") if m in marks]
    return directive("method", node.name + arguments(node, "staticmethod" not in marks), [words(node), table(given)], kind)


def directive(kind, head, parts, options=(), fence=3):
    body = "\n\n".join(p for p in parts if p)
    return "\n".join([f"{'`' * fence}{{py:{kind}}} {head}", *options, "", body, "`" * fence])


def words(node, place=None):
    first, gap, rest = plain(cleandoc(ast.get_docstring(node) or "")).partition("\n\n")
    return f"{first} {origin(place)}".strip() + gap + rest


def origin(place): return f"[§\u00a0{plain(place[0])}]({place[1]})" if place else ""
def plain(text): return re.sub(r"(?<!\\)([<$])", r"\\\1", text) if "`" not in text else "".join(p if p.startswith("`") else plain(p) for p in re.split(r"(`[^`]*`)", text))
def cell(text): return plain(" ".join(text.split())).replace("|", "\\|")
def code(text): return f"`{text}`".replace("|", "\\|") if text else ""


def short(text, most=70): return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


def arguments(fn, method=False):
    "(a, b=1, *, c): names and defaults, without types."
    a = ast.parse(ast.unparse(fn)).body[0].args
    plain_ = a.posonlyargs or a.args
    if method: plain_.pop(0)
    for p in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]:
        if p: p.annotation = None
    a.defaults, a.kw_defaults = ([ast.Constant(...) if d and any(isinstance(n, (ast.GeneratorExp, ast.Lambda)) for n in ast.walk(d)) else d for d in ds] for ds in (a.defaults, a.kw_defaults))
    return f"({ast.unparse(a)})"


def signature(fn): return fn.name + arguments(fn)


def parameters(module, fn, method=False):
    "[(name, type, default, meaning)], the last one `returns` where that is said."
    a, notes = fn.args, comments(module)
    plain_ = a.posonlyargs + a.args
    defaults = dict(zip([p.arg for p in plain_[::-1]], a.defaults[::-1])) | {p.arg: v for p, v in zip(a.kwonlyargs, a.kw_defaults) if v}
    stars = {id(a.vararg): "*", id(a.kwarg): "**"}
    params = [p for p in [*plain_[bool(method):], a.vararg, *a.kwonlyargs, a.kwarg] if p]
    said = lambda x: ast.unparse(x) if x else ""
    rows = [(stars.get(id(p), "") + p.arg, said(p.annotation), said(defaults.get(p.arg)), notes.get(defaults.get(p.arg, p).end_lineno, "")) for p in params]
    if fn.returns and fn.name != "__init__": rows.append(("→", said(fn.returns), "", notes.get(fn.returns.end_lineno, "") if fn.returns.end_lineno != fn.lineno or not params else ""))
    return rows


def fields(module, node):
    return [(n.target.id, ast.unparse(n.annotation), default(n.value), comments(module).get(n.end_lineno, "")) for n in node.body if isinstance(n, ast.AnnAssign)]


def default(value):
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {k.arg: ast.unparse(k.value) for k in value.keywords}
        return given.get("default") or (f"{given['default_factory']}()" if "default_factory" in given else "")
    return ast.unparse(value) if value else ""


def table(rows):
    "Parameters as a table, without the columns that would be empty."
    if not rows: return ""
    shown = [("" , "type", "default", "meaning")] + [(code(n) if n != "→" else "*returns*", code(t), code(short(d)), cell(m)) for n, t, d, m in rows]
    kept = [k for k in range(4) if k == 0 or any(row[k] for row in shown[1:])]
    lines = ["| " + " | ".join(row[k] for k in kept) + " |" for row in shown]
    return "\n".join([lines[0], "|---" * len(kept) + "|", *lines[1:]])
