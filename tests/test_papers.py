"The papers' tables as data: whole, consistent with themselves and with each other, and the counts with the ledger."
import csv
from collections import Counter, defaultdict
from statistics import mean

import pytest

from barleria_nb import papers
from barleria_nb.core import asset
from barleria_nb.model import config, configurations, ledger
from barleria_nb.papers import PaperRow, author_rows, draw_papers, paper_counts, paper_rows, printings, show_papers
from common import line

SPLITS = {"refcoco": {"val", "testA", "testB", "average"}, "refcoco+": {"val", "testA", "testB", "average"}, "refcocog": {"val(u)", "test(u)", "val(g)", "average"}, "all": {"average"}}
TABLES = {("barleria", 1): (16, 132), ("barleria", 2): (7, 63), ("barleria", 3): (4, 36), ("barleria", 4): (6, 24), ("barleria", 5): (6, 59),
          ("dcris", 1): (25, 205), ("dcris", 2): (8, 32), ("dcris", 3): (4, 12), ("dcris", 5): (9, 27)}  # rows, cells (lost ones included)
LOST = {"CMPC+", "CGAN", "CGFormer", "LISA-7B", "MagNet", "UNINEXT-L"}
ODD = {("barleria", 1, "BRINet"), ("dcris", 1, "BRINet"), ("barleria", 2, "ETRIS"), ("barleria", 4, "BarLeRIa"), ("dcris", 1, "ReLA")}  # averages that do not follow from their cells: README


def printed_rows():
    "Cells by printed row."
    found = defaultdict(list)
    for r in paper_rows(): found[r.paper, r.table, r.row].append(r)
    return found


# ---------------------------------------------------------------- the files

def test_rows_and_tables_are_whole():
    rows = printed_rows()
    for (paper, table), (n, cells) in TABLES.items():
        assert sorted(row for p, t, row in rows if (p, t) == (paper, table)) == list(range(1, n + 1))
        assert len(paper_rows(paper, table)) == cells
    assert {k[:2] for k in rows} == set(TABLES)


def test_no_number_twice_and_one_identity_per_printed_row():
    keys = Counter((r.paper, r.table, r.row, r.dataset, r.split) for r in paper_rows())
    assert max(keys.values()) == 1
    for cells in printed_rows().values():
        assert len({(r.method, r.variant, r.block, r.backbone, r.mixed, r.extra, r.params, r.metric, r.metric_from) for r in cells}) == 1
    names = Counter((p, t, c[0].method, c[0].variant, c[0].mixed) for (p, t, _), c in printed_rows().items())
    assert max(names.values()) == 1
    assert max(Counter((r.method, r.metric, r.mixed, r.dataset, r.split) for r in author_rows()).values()) == 1


def test_values_and_words_are_known():
    for r in paper_rows() + author_rows():
        assert r.split in SPLITS[r.dataset] and (r.value is None or 0 < r.value < 100)
        assert (r.metric == "unknown") == (r.metric_from == "") or r.paper == "authors"
        assert r.metric_from in ("equal", "authors", "neighbours", "")
        assert r.block in ("full fine-tuning", "parameter-efficient", "mixed training", "ablation", "frozen") or r.paper == "authors"


def test_numbers_keep_the_digits_of_print():
    with open(asset("papers/results.csv"), encoding="utf-8", newline="") as f:
        for r in csv.DictReader(f):
            digits = len(r["value"].partition(".")[2])
            assert digits == (2 if (r["paper"], r["table"]) == ("dcris", "5") or r["value"] == "70.18" else 1) or r["how"] == "lost"


def test_lost_and_inferred_cells():
    lost = [r for r in paper_rows() if r.how == "lost"]
    inferred = [r for r in paper_rows() if r.how == "inferred"]
    assert {r.method for r in lost} == LOST and len(lost) == len(LOST)
    assert [(r.method, r.mixed, r.value) for r in inferred] == [("DCRIS-L", True, 81.0)]
    assert {(r.paper, r.table, r.dataset, r.split) for r in lost + inferred} == {("dcris", 1, "refcoco", "val")}


# ---------------------------------------------------------------- with themselves and each other

def test_averages_follow_from_their_cells():
    odd, seen = set(), 0
    for (paper, table, _), rows in printed_rows().items():
        cells, sets = [r for r in rows if r.split != "average"], defaultdict(list)
        if not cells: cells = [r for r in rows if r.dataset != "all"]  # Table 4: means of sets
        printed = [r for r in rows if r not in cells]
        if not printed or any(r.value is None for r in cells): continue
        for r in cells: sets[r.dataset].append(r.value)
        kinds = mean(r.value for r in cells), mean(map(mean, sets.values()))
        seen += 1
        if all(abs(k - printed[0].value) > .0501 for k in kinds): odd.add((paper, table, rows[0].method))
    assert odd == ODD and seen > 50


def test_the_means_of_sets_in_barleria_table_4_follow_from_table_5():
    for rows in (paper_rows("barleria", 4, method=m) for m in dict.fromkeys(r.method for r in paper_rows("barleria", 4))):
        for r in rows:
            five = [x.value for x in paper_rows("barleria", 5, method=r.method) if x.dataset == r.dataset]
            assert abs(mean(five) - r.value) < .0501 and r.params == paper_rows("barleria", 5, method=r.method)[0].params


def test_both_papers_print_the_same_rows():
    "Rows that DCRIS copies are those of BarLeRIa, but for PolyFormer's exchanged columns."
    shared, differ = 0, set()
    theirs = {(r.method, r.mixed, r.dataset, r.split): r for r in paper_rows("barleria", (1, 2, 3)) if r.backbone != "EVA-CLIP"}
    for r in paper_rows("dcris", 1):
        other = theirs.get((r.method, r.mixed, r.dataset, r.split))
        if other is None: continue
        if r.value is None: assert str(other.value) in r.note
        elif r.value != other.value: differ.add((r.method, r.dataset, r.split))
        assert (r.metric, r.metric_from, r.extra) == (other.metric, other.metric_from, other.extra)
        shared += 1
    assert shared > 100 and differ == {("PolyFormer-L", "refcoco+", s) for s in ("testA", "testB")}
    assert all("exchanged" in theirs["PolyFormer-L", True, "refcoco+", s].note for s in ("testA", "testB"))


def test_dcris_tables_share_their_default_row():
    rows = [[r.value for r in paper_rows("dcris", t, "refcoco", ("val", "testA", "testB"), "DCRIS-B") if r.variant == v] for t, v in ((1, ""), (2, "default"), (3, "both adapters"), (5, "layers [1,3,5,7,9,11]"))]
    assert rows[0] == rows[1] == rows[2] and all(abs(a - b) <= .0501 for a, b in zip(rows[0], rows[3]))
    frozen = [[r.value for r in paper_rows("dcris", t, split=("val", "testA", "testB")) if v in (r.method, r.variant)] for t, v in ((2, "Fix Backbone"), (3, "neither adapter"))]
    assert frozen[0] == frozen[1]


def test_metrics_that_are_equal_to_published_ones():
    named = {(r.method, r.metric, r.mixed, r.dataset, r.split): r.value for r in author_rows()}
    seen, differ = set(), []
    for r in paper_rows():
        if r.metric_from != "equal" or r.split == "average" or r.value is None or "exchanged" in r.note: continue
        if abs(named[r.method, r.metric, r.mixed, r.dataset, r.split] - r.value) > .0501: differ.append((r.method, r.split, r.note))
        seen.add(r.method)
    assert differ == [("MagNet", "test(u)", "its authors publish 66.03")]
    assert seen == {"CRIS", "LAVT", "ReLA", "MagNet", "PolyFormer-B", "PolyFormer-L"}


# ---------------------------------------------------------------- the functions

def test_filters():
    assert paper_rows("dcris", 5) == paper_rows(["dcris"], {5}) and len(paper_rows(dataset="refcoco", split=("val", "testA"), method="LISA-7B", table=2)) == 2
    assert paper_rows("dcris", 1, method="SNF") == []


@pytest.mark.parametrize("wrong, words", [(dict(paper="dcri"), ["Did you mean dcris"]), (dict(table=6), ["no table"]), (dict(dataset="refcocoplus"), ["Did you mean"]), (dict(split="testa"), ["Did you mean", "testA"]),
                                          (dict(method=["ETRIS", "Barleria"]), ["'Barleria'", "BarLeRIa"]), (dict(method="x" * 9000 + "\n"), ["no method"]), (dict(method=3.5), ["3.5"]), (dict(method=[None]), ["None"]),
                                          (dict(table="1"), ["no table '1'"]), (dict(table=1.5), ["no table 1.5 in"]), (dict(paper={}), ["no paper {}"]), (dict(split=b"val"), ["no split b'val'"]), (dict(dataset=[["refcoco"]]), ["no dataset"])])
def test_wrong_filters_are_one_line(wrong, words): line(lambda: paper_rows(**wrong), *words)


@pytest.mark.parametrize("wrong", [dict(metric="miou"), dict(value=101), dict(value=float("nan")), dict(value=True), dict(value=None), dict(how="lost"), dict(paper="elsewhere"),
                                   dict(method=3), dict(dataset=None), dict(split=["val"]), dict(table="1"), dict(mixed="yes"), dict(note=[])])
def test_wrong_numbers_are_one_line(wrong): line(lambda: PaperRow(**{**dict(method="m", dataset="refcoco", split="val", value=50., metric="mIoU"), **wrong}))


def test_a_damaged_file_is_one_line(tmp_path, monkeypatch):
    bad = tmp_path / "results.csv"
    monkeypatch.setattr(papers, "asset", lambda name: bad)
    head = "paper,method,dataset,split,value,metric\n"
    for body in ("dcris,m,refcoco,val,high,mIoU\n", "dcris,m,refcoco,val,1,mIoU,2\n", "dcris,m,refcoco,val\n", "dcris,m,refcoco,val,700,mIoU\n"):
        bad.write_text(head + body)
        papers._read.cache_clear()
        line(lambda: paper_rows(), "line 2", bad)
    papers._read.cache_clear()


def test_shown_and_drawn(capsys):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    show_papers(paper_rows("dcris", 1) + [PaperRow("mine", "refshapes", "val", 41., "mIoU")])
    text = capsys.readouterr().out
    assert "(81.0)" in text and "DCRIS-L*" in text and "?" in text and "refshapes" in text and "mine" in text
    show_papers([])
    assert capsys.readouterr().out == ""
    for rows in (None, paper_rows("barleria", 4), paper_rows(method="ETRIS") + [PaperRow("mine", "refcoco", "val", 41., "mIoU"), PaperRow("mine", "refshapes", "val", 12., "oIoU")]):
        draw_papers(rows)
    labels = {t.get_text(): t.get_fontweight() for t in plt.gcf().axes[0].get_yticklabels()}
    assert labels["mine"] == "bold" and sum(w == "bold" for w in labels.values()) == 1 and [a.get_title() for a in plt.gcf().axes][-1] == "refshapes"
    plt.close("all")
    line(lambda: draw_papers([]), "no number")


# ---------------------------------------------------------------- counts

COUNTS = paper_counts()


def test_each_print_follows_from_its_count_by_the_stated_rule():
    for c in COUNTS:
        texts = printings(c.counted, c.printed, c.of)
        rules = [rule for rule, text in texts.items() if text == c.printed]
        assert c.relation == ("both possible" if len(rules) == 2 else rules[0]), c
        assert (c.counted != c.exact) == (c.config == "full-b14")


def test_every_printed_count_of_the_tables_is_there():
    inside = {(c.paper, c.table, c.row, c.printed) for c in COUNTS if c.printed.endswith("M") and c.table != "text"}
    assert inside == {(r.paper, str(r.table), str(r.row), r.params) for r in paper_rows() if r.params and r.method != "ReSTR"}


@pytest.mark.parametrize("name", dict.fromkeys(c.config for c in COUNTS))
def test_ledger_gives_the_papers_counts(name):
    assert name in configurations(), f"no configuration {name} yet"
    assert {c.exact for c in COUNTS if c.config == name} == {ledger(config(name))["backbone"]}
