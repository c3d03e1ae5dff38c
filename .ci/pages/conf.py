"Sphinx for the site: theme, maths from a file, names in backticks that lead to their page."
import json
import re
import sys
from importlib.metadata import files
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nbdev.config import get_config

cfg = get_config()
project = html_title = cfg.lib_name
author, copyright = cfg.author, cfg.copyright
extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the plumbing", "Hide the plumbing"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors, myst_heading_slug_func = 4, "notebooks.anchor"
root_doc = "index"
exclude_patterns = []
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90

html_theme = "furo"
html_static_path = [str(Path(__file__).with_name("own.css")), str(next(p for p in files("sphinx-mathjax-offline") if p.name == "tex-svg.js").locate())]
html_css_files = ["own.css"]
html_copy_source = html_show_sourcelink = False
OWN = ("brand-primary", "brand-content", "brand-visited", "api-name", "api-pre-name")
html_theme_options = dict(
    navigation_with_keys=True,
    light_css_variables={f"color-{part}": "#5a3d8c" for part in OWN},
    dark_css_variables={f"color-{part}": "#c3aef0" for part in OWN},
)
mathjax_path = "tex-svg.js"  # one file with its letters inside: nothing else is fetched
mathjax3_config = {"options": {"enableMenu": False}}


def lead_to_api(app, doctree, docname):
    "`evaluate` in prose becomes a link to its entry."
    known, entries = json.loads(Path(app.srcdir, "known.json").read_text()).get(docname, {}), app.env.get_domain("py").objects
    for node in list(doctree.findall(nodes.literal)):
        m = re.fullmatch(r"(\w+)(\.\w+)?(\(.*\))?", node.astext(), re.S)
        if not m or m[1] not in known or any(isinstance(a, (nodes.reference, nodes.title)) for a in parents(node)): continue
        full = f"{cfg.lib_name}.{known[m[1]]}.{m[1]}"
        entry = entries.get(full + (m[2] or "")) or entries.get(full)
        if not entry or (m[2] and full + m[2] not in entries and entries[full].objtype != "class"): continue
        uri = app.builder.get_relative_uri(docname, entry.docname) + "#" + entry.node_id
        node.replace_self(nodes.reference("", "", node.deepcopy(), internal=True, refuri=uri, reftitle=full, classes=["to-api"]))


def parents(node):
    while node.parent is not None:
        node = node.parent
        yield node


def describe(app, doctree, docname):
    "A picture that code drew says so to those who cannot see it."
    for image in doctree.findall(nodes.image):
        if not image.get("alt"): image["alt"] = "drawn by the code above"


def setup(app):
    app.connect("doctree-resolved", lead_to_api)
    app.connect("doctree-resolved", describe)
