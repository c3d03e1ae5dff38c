"What the built pages point at: files and anchors that exist, nothing loaded from elsewhere, no residue of notebooks."
import re
from functools import cache
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("audio", "src"), ("object", "data"), ("embed", "src"), ("use", "href")}
KINDS = {"stylesheet", "icon", "shortcut icon", "preload", "prefetch", "modulepreload", "apple-touch-icon", "preconnect", "dns-prefetch"}
IN_CELL = re.compile(r"\A\s*#\s*\|\s*\w+|^nbdev_export\(|google\.colab", re.M) # a directive opens a cell; below other lines it is the cell's subject
IN_WORDS = re.compile(r":::|```|\$\$|\{[.%#][\w-]+|\{target=|\]\(")


class Page(HTMLParser):
    "The ids of a page, what it loads, where it leads, its cells of code and its words outside code."
    def __init__(self, path):
        super().__init__()
        self.ids, self.loads, self.leads, self.cells, self.words, self.within, self.boxes = set(), [], [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        for name, value in a.items():
            if value and ((tag, name) in LOADS or (tag == "link" and name == "href" and (a.get("rel") or "").lower() in KINDS)): self.loads.append(value)
            if name == "srcset": self.loads += [part.split()[0] for part in (value or "").split(",") if part.strip()]
            if name == "style": self.loads += in_style(value or "")
        if tag == "a" and a.get("href") is not None: self.leads.append(a["href"])
        if tag == "div": self.boxes.append(a.get("class") or "")
        if tag == "pre": self.cells.append("")
        if tag in ("script", "style", "pre", "code") or "math" in (a.get("class") or "").split(): self.within.append(tag)

    def handle_endtag(self, tag):
        if self.within and self.within[-1] == tag: self.within.pop()
        if tag == "div" and self.boxes: self.boxes.pop()

    def handle_data(self, data):
        if not self.within: self.words.append(data)
        elif "pre" in self.within and any("cell_input" in b for b in self.boxes): self.cells[-1] += data


@cache
def read(path): return Page(path)


def in_style(text): return [u for pair in re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text) for u in pair if u]


def check(site):
    "(slips, one line each; the addresses outside that pages lead to)"
    slips, outside = [], set()
    for path in sorted(site.rglob("*.html")):
        page, name = read(path), path.relative_to(site).as_posix()
        slips += [f"{name}: loads {u}" for u in page.loads if not local(u)]
        slips += [f"{name}: {u}: {wrong}" for u in page.loads + page.leads if local(u) and (wrong := missing(path, u))]
        leads = {u for u in page.leads if not local(u)}
        slips += [f"{name}: {u}: not an https address" for u in leads if not (u.startswith("https://") and "." in urlsplit(u).netloc and not re.search(r"[\s<>\"]", u))]
        slips += [f"{name}: shows {m[0].strip()!r}" for residue, texts in ((IN_CELL, page.cells), (IN_WORDS, ["".join(page.words)])) for text in texts for m in residue.finditer(text)]
        outside |= leads
    for path in sorted(site.rglob("*.css")):
        for u in in_style(path.read_text(encoding="utf-8")):
            if not local(u): slips.append(f"{path.relative_to(site)}: loads {u}")
            elif wrong := missing(path, u): slips.append(f"{path.relative_to(site)}: {u}: {wrong}")
    return slips, sorted(outside)


def local(url): return url.startswith("data:") or not re.match(r"([a-zA-Z][\w+.-]*:|//)", url)


def missing(path, url):
    "What is wrong with a link inside the site, or None."
    if url.startswith("data:"): return None
    parts = urlsplit(url)
    there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if parts.path.startswith("/"): return "leads to the root of the host"
    if there.is_dir(): there = there / "index.html"
    if not there.is_file(): return "no such file"
    if parts.fragment and there.suffix == ".html" and unquote(parts.fragment) not in read(there).ids: return "no such anchor"
    return None
