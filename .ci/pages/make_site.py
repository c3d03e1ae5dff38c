"""Make the site in `_site/`: every chapter as it was last run, a page for every module, one search for all; nothing is executed, nothing fetched.

    python .ci/pages/make_site.py [FOLDER]

The pages work from a disk without a network. Links are checked before the folder is replaced.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import links
import reference
from nbdev.config import get_config
from reference import N

HERE = Path(__file__).resolve().parent
PARTS = [("The pieces", lambda p: p.stem < "14"), ("Using it", lambda p: p.parent == N.NBS), ("Training and results", lambda p: True)]
BESIDE = {p: f"{p.stem.lower()}.md" for p in sorted(N.ROOT.glob("*.md")) if p != N.README}  # pages that are no notebooks


def home(): return f"{get_config().git_url.rstrip('/')}/blob/{get_config().branch}"
def inside(path): return path.relative_to(N.NBS).as_posix()
def chapters(): return [p for p in N.reading_order() if p.stem != "index"]


def stage(top):
    "Everything that Sphinx reads, written below `top`."
    owned = {p: m for m, p in N.modules().items()}
    for p in N.notebooks():
        (top / inside(p)).parent.mkdir(parents=True, exist_ok=True)
        (top / inside(p)).write_text(N.json.dumps(prepared(p, owned.get(p))), encoding="utf-8")
    for p, page in BESIDE.items(): (top / page).write_text(relinked(p.read_text(encoding="utf-8"), p, ""), encoding="utf-8")
    (top / "api").mkdir()
    modules = [(owned[p], p) for p in chapters() if p in owned]
    for m, p in modules: (top / "api" / f"{m}.md").write_text(reference.page(m, p, home()), encoding="utf-8")
    (top / "api" / "index.md").write_text(reference.overview(modules), encoding="utf-8")
    known = {p: reference.known_on(p, owned.get(p)) for p in N.notebooks()}
    pages = {inside(p)[:-6]: k for p, k in known.items()} | {f"api/{m}": known[p] for m, p in modules} | {page[:-3]: reference.unmistakable() for page in BESIDE.values()}
    (top / "known.json").write_text(N.json.dumps(pages), encoding="utf-8")


def prepared(path, module):
    "A notebook as the site shows it: directives obeyed and gone, links that hold here."
    nb = N.load(path)
    up = "../" * inside(path).count("/")
    cells = [c for c in map(shown, nb["cells"]) if c]
    for c in cells:
        if c["cell_type"] == "markdown": c["source"] = relinked(led(N.source(c), path, module, up), path, up)
    if path.stem == "index": cells.append(dict(cell_type="markdown", id="contents", metadata={}, source=contents()))
    return nb | dict(cells=cells, metadata=dict(nb["metadata"], language_info=dict(name="python", pygments_lexer="ipython3")))


def shown(cell):
    "The cell without its directives, tagged for myst-nb; None where readers are not to see it."
    if cell["cell_type"] != "code": return cell
    text = N.source(cell)
    d = N.directives(text)
    text = re.sub(r"\A(\s*#\s*\|.*\n?)+", "", text).strip("\n")
    if "hide" in d or "nbdev_export(" in text or not text: return None
    off = lambda name: d.get(name, "").lower() == "false"
    tags = ["remove-input"] * off("echo") + ["remove-output"] * off("output") + ["hide-input"] * ("export" in d)
    return cell | dict(source=text, metadata=dict(cell["metadata"], tags=tags))


def led(text, path, module, up):
    "The line below a chapter's title: Colab, the notebook, the module; the neighbours are in the page's frame."
    blocks = text.split("\n\n")
    for i, b in enumerate(blocks):
        colab = re.search(rf"\]\((https://{re.escape(N.COLAB)}/github/[^)]+)\)", b)
        if not colab: continue
        ways = [f"[Open in Colab]({colab[1]})", f"[the notebook]({home()}/{N.rel(path)})"] + ([f"[`{N.LIB.name}.{module}`]({up}api/{module}.md)"] if module else [])
        blocks[i] = f"```{{container}} lead\n{' · '.join(ways)}\n```"
    return "\n\n".join(blocks)


def relinked(text, path, up):
    "Links to other pages as they lie in the site, to other files of the project as the repository shows them."
    pages = BESIDE | {N.README: "index.ipynb"} | {p: inside(p) for p in N.notebooks()}
    def new(m):
        target, mark, anchor = m[2].partition("#")
        there = Path(os.path.normpath(path.parent / target))
        if re.match(r"[a-z]+:", target) or not target or not there.exists() or N.ROOT not in there.parents: return m[0]
        return f"{m[1]}{up + pages[there] if there in pages else f'{home()}/{N.rel(there)}'}{mark}{anchor})"
    return re.sub(r"(\]\()([^)\s]+)\)", new, text)


def contents():
    "The sidebar: chapters by part in reading order, modules, how to take part."
    rest, blocks = chapters(), []
    for part, belongs in PARTS:
        mine = [p for p in rest if belongs(p)]
        rest = [p for p in rest if p not in mine]
        blocks.append((part, [f"{p.stem.split('_')[0]} {N.title(p)} <{inside(p)[:-6]}>" for p in mine]))
    blocks += [("Reference", ["api/index"]), ("The project", [page[:-3] for page in BESIDE.values()])]
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *lines, "```"]) for part, lines in blocks)


def build(out):
    "The site, whole, in `out`; what was there goes only when every link of the new one holds."
    out = Path(out).resolve()
    if out.exists() and not (out / ".nojekyll").exists(): sys.exit(f"{out}: exists and is no site; name another folder")
    with tempfile.TemporaryDirectory(prefix="barleria_site_") as tmp:
        top, new = Path(tmp) / "pages", Path(tmp) / "site"
        top.mkdir()
        stage(top)
        command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-c", HERE, "-d", Path(tmp) / "trees", top, new]
        if subprocess.run([str(c) for c in command], env={**os.environ, "PYTHONWARNINGS": "ignore"}).returncode: sys.exit("Sphinx stopped; the old site stays")
        (new / ".buildinfo").unlink(missing_ok=True)
        (new / ".nojekyll").touch()  # GitHub would hide folders that start with an underscore
        slips, outside = links.check(new)
        outside, slips = elsewhere(outside), slips + gone(outside)
        for s in slips: print(s)
        if slips: sys.exit(f"{len(slips)} to mend; the old site stays")
        beside = out.with_name(out.name + "_new")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(new, beside)
        shutil.rmtree(out, ignore_errors=True)
        beside.rename(out)
    return outside


def in_repository(url):
    "The file of this project that an address of the repository, or of Colab, shows; None for other addresses."
    m = re.fullmatch(rf"https://(?:{re.escape(N.COLAB)}/)?github(?:\.com)?/{re.escape('/'.join(get_config().git_url.rstrip('/').split('/')[-2:]))}/blob/{get_config().branch}/([^#]+)(#.*)?", url)
    return m and N.ROOT / m[1]


def gone(urls): return [f"{u}: no such file here" for u in urls if (p := in_repository(u)) and not p.exists()]
def elsewhere(urls): return [u for u in urls if not in_repository(u)]


if __name__ == "__main__":
    os.chdir(N.ROOT)
    start, out = time.time(), Path(sys.argv[1] if len(sys.argv) > 1 else N.ROOT / "_site").resolve()
    outside = build(out)
    for url in outside: print("leads outside, not fetched:", url)
    print(f"{out}: {len(list(out.rglob('*.html')))} pages, {sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.0f} MB, {time.time() - start:.0f} s")
