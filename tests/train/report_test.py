"""report.html: parses, needs nothing from outside, shows the numbers; hypercleaning's sections."""

import base64
import contextlib
import csv
import io
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bilevel_flax import cli
from bilevel_flax.train.metrics import JsonlWriter
from bilevel_flax.train.report.page import (
    Section,
    figure_section,
    gallery_section,
    table_section,
    write_report,
)
from bilevel_flax.train.report.plots import COLOURS, PERCENT, curve_figures, smooth
from examples.mnist_hypercleaning.report import (
    conclusion,
    load_learned,
    sections,
    write_suspicious_csv,
)
from examples.mnist_hypercleaning.task import HEADLINE

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest and keeps what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loaded, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loaded += [(tag, attrs[key]) for key in ("src", "href", "srcset") if key in attrs]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def make_run(workdir, corrupted=True):
    """A run's folder with made-up numbers."""
    rng = np.random.default_rng(0)
    with contextlib.closing(JsonlWriter(workdir / "metrics.jsonl")) as writer:
        for step in range(0, 400, 4):
            scalars = {
                "inner_loss": np.exp(-step / 100) * rng.lognormal(),
                "outer_loss": float("nan") if step == 8 else 1.0 + rng.random(),
                "inner_norm": rng.random(),
                "adjoint_residual": rng.random(),
                "seconds": 0.01 * step,
            }
            writer.write_scalars(step, scalars | ({"test_error": 0.2} if step % 80 == 0 else {}))
    summary = {
        "test_error": 0.15012,
        "test_error_no_weights": 0.17134,
        "test_error_clean": 0.118,
        "wrong_label_auc": 0.9712,
        "steps": 20000,
        "solver": "soba",
        "seed": 0,
        "versions": {"jax": "0.10.2"},
    }
    (workdir / "summary.json").write_text(json.dumps(summary))
    units = {name: "fraction" for name in summary if name.startswith("test_error")}
    (workdir / "units.json").write_text(json.dumps(units))
    config = {"name": "mnist_hypercleaning", "inner": {"learning_rate": 0.003}, "note": "<b>&</b>"}
    (workdir / "config.json").write_text(json.dumps(config))

    true = rng.integers(0, 10, 200)
    given = np.where(rng.random(200) < 0.5, rng.integers(0, 10, 200), true) if corrupted else true
    weights = (0.8 * (given == true) + 0.2 * rng.random(200)).astype(np.float32)
    index = np.argsort(weights, kind="stable")[:6]
    arrays = {
        "weights": weights,
        "is_wrong": given != true,
        "given_label": given,
        "true_label": true,
        "suspicious_index": index,
        "suspicious_images": rng.integers(0, 256, (6, 28, 28), dtype=np.uint8),
    }
    np.savez(workdir / "learned.npz", **arrays)
    return arrays


def test_the_page_parses_and_needs_nothing_from_outside(tmp_path):
    make_run(tmp_path)
    path = write_report(tmp_path, sections=sections(tmp_path))
    assert path == tmp_path / "report.html"
    text = path.read_text()
    assert "http://" not in text and "https://" not in text
    assert "@import" not in text and "<script" not in text and "<link" not in text
    page = Page(text)
    assert all(value.startswith(("data:image/png;base64,", "#")) for _, value in page.loaded)
    assert len(page.ids) == len(set(page.ids))
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]+)\)", text))
    assert all(value[1:] in page.ids for _, value in page.loaded if value.startswith("#"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "learned.npz",
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "units.json",
    ]


def test_numbers_are_shown_as_a_reader_wants_them_and_text_is_escaped(tmp_path):
    make_run(tmp_path)
    text = Page(write_report(tmp_path).read_text()).text
    for shown in ("15.01 %", "17.13 %", "0.9712", "20,000", "inner.learning_rate", "0.003"):
        assert shown in text
    assert "MNIST hypercleaning" in text
    assert "<b>&</b>" in text
    assert "<b>&</b>" not in (tmp_path / "report.html").read_text()


def test_units_are_declared_and_never_read_from_a_name(tmp_path):
    summary = {
        "headline": ["squared_error", "accuracy", "deep.error.a", "loss"],
        "squared_error": 0.3,
        "accuracy": 0.5,
        "deep": {"error": {"a": 0.25}},
        "loss": 1.25,
        "learning_time": 0.7,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))

    def cards():
        text = write_report(tmp_path).read_text()
        return re.findall(r'<div class="card[^>]*><b>(.*?)</b>', text)

    assert cards() == ["0.3", "0.5", "0.25", "1.25"]  # an old run stored no units
    units = {"accuracy": "fraction", "deep.error": "fraction", "loss": "nats"}
    (tmp_path / "units.json").write_text(json.dumps(units))
    assert cards() == ["0.3", "50.00 %", "25.00 %", "1.25 nats"]
    assert "0.7 s" not in Page(write_report(tmp_path).read_text()).text
    # The curves' axes follow them too.
    rows = [{"step": i, "squared_error": 0.1 * i, "accuracy": 0.1 * i} for i in range(1, 4)]
    figures = dict(curve_figures(rows, units))
    is_percent = {
        title: figure.axes[0].yaxis.get_major_formatter() is PERCENT
        for title, figure in figures.items()
    }
    assert is_percent == {"Squared error": False, "Accuracy": True}


HOSTILE = (
    "$x_{1$",  # no TeX
    "$\\frac$",
    "cost in $ and $",
    "<script>alert(1)</script>",
    "</style></svg><img src=x onerror=alert(1)>",
    "\"quoted' & more",
    "",
    " ",
    "_",
    "/",
    "a/",
    "a//$x_{1$",
    "mixture/$\\alpha",
    "mixture/<b>",
    "mixture/",
    "mixture/_hidden",
    "\ud800",
    "x" * 300,
)


def test_no_name_breaks_a_report_or_runs_in_it(tmp_path):
    lines = [
        json.dumps({"step": step, **{name: 0.1 * step + i for i, name in enumerate(HOSTILE)}})
        for step in range(1, 5)
    ]
    lines.append(json.dumps({"step": 4, "warning/<script>": "<script>alert(1)</script>"}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = {"headline": list(HOSTILE), "conclusion": "<script>", "solver": "<script>"}
    numbers = {name: 0.5 for name in HOSTILE}
    (tmp_path / "summary.json").write_text(json.dumps(summary | numbers))
    (tmp_path / "units.json").write_text(json.dumps(dict.fromkeys(HOSTILE, "<script>$x_{1$")))
    (tmp_path / "config.json").write_text(json.dumps({"name": "$x_{1$ <script>"} | numbers))
    figure = Figure()
    figure.add_subplot().set_xlabel("$x_{1$")
    own = [figure_section("<script>$x_{1$", figure, "<script>")]
    text = write_report(tmp_path, sections=own).read_text()
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.loaded}
    assert "<script" not in text
    assert "onerror" not in re.sub(r"&lt;img src=x onerror=", "", text)
    for shown in ("$x_{1$", "cost in $ and $", "(no name)"):
        assert shown in page.text


def test_a_report_of_the_same_files_is_the_same_file(tmp_path):
    make_run(tmp_path)
    first = write_report(tmp_path, sections=sections(tmp_path)).read_bytes()
    second = write_report(tmp_path, sections=sections(tmp_path), path=tmp_path / "b.html")
    assert second.read_bytes() == first


def test_images_decode_to_the_pixels_that_went_in():
    rng = np.random.default_rng(0)
    for shape in [(3, 8, 9), (3, 8, 9, 1), (3, 8, 9, 3)]:
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        page = Page(gallery_section("g", images, ["a", "b<", "c"], "d", [True, False, None]).html)
        assert "b<" in page.text
        for image, (_, source) in zip(images, page.loaded, strict=True):
            decoded = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
            np.testing.assert_array_equal(np.asarray(decoded), image.squeeze())


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (np.zeros((2, 4, 4)), ["a", "b"], "images: expected uint8"),
        (np.zeros((2, 4, 4, 2), np.uint8), ["a", "b"], "images: expected uint8"),
        (np.zeros((2, 4, 4), np.uint8), ["a"], "captions: 1 of them for 2 images"),
    ],
)
def test_a_gallery_that_does_not_fit_is_refused(images, captions, message):
    with pytest.raises(ValueError, match=message):
        gallery_section("g", images, captions)


def test_a_table_shows_its_cells_and_refuses_a_short_row():
    section = table_section("t", ["solver", "gap"], [["so<ba", 0.5], ["saba", 1.25e-5]], "note")
    page = Page(section.html)
    for shown in ("so<ba", "0.5", "1.25e-05", "note"):
        assert shown in page.text
    assert section.html.count('class="number"') == 3
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table_section("t", ["a", "b"], [["x"]])
    Page(table_section("empty", ["a"], []).html)


def test_black_of_any_figure_follows_the_readers_theme():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#123456")
    axes.set_title("a & b")
    section = figure_section("title", figure, "caption")
    assert "#000000" not in section.html and "currentColor" in section.html
    assert "#123456" in section.html
    Page(section.html)


def test_an_unfinished_run_gets_a_report_that_says_so(tmp_path):
    make_run(tmp_path)
    for name in ("summary.json", "learned.npz", "config.json"):
        (tmp_path / name).unlink()
    assert sections(tmp_path) == []
    assert "not finished at step 396" in Page(write_report(tmp_path).read_text()).text
    (tmp_path / "metrics.jsonl").unlink()
    assert "nothing to draw" in Page(write_report(tmp_path).read_text()).text


def test_a_folder_that_is_none_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="workdir=.*none.*is not a folder"):
        write_report(tmp_path / "none")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not JSON"):
        write_report(tmp_path)


def test_curves_group_what_belongs_together_and_leave_out_what_stands_still():
    rows = [
        {
            "step": step,
            "inner_loss": 2.0**-step,
            "outer_loss": "NaN",
            "norm_inner": 1.0,
            "norm_adjoint": 2.0,
            "test_error": 0.5 / (step + 1),
            "time_to_event": 1.0 + step,
            "oracle_units": step,
            "constant": 1.0,
        }
        for step in range(10)
    ]
    figures = dict(curve_figures(rows, {"test_error": "fraction"}))
    assert list(figures) == ["Losses", "Norms of the directions", "Test error", "Time to event"]
    lines = {title: figure.axes[0].lines for title, figure in figures.items()}
    assert [len(drawn) for drawn in lines.values()] == [1, 2, 1, 1]
    np.testing.assert_array_equal(lines["Losses"][0].get_ydata(), 2.0 ** -np.arange(10))
    assert figures["Losses"].axes[0].get_yscale() == "log"
    assert figures["Test error"].axes[0].get_yscale() == "linear"
    named = {
        title: [t.get_text() for g in f.legends for t in g.texts] for title, f in figures.items()
    }
    assert named["Norms of the directions"] == ["norm inner", "norm adjoint"]
    assert figures["Losses"].axes[0].get_ylabel() == ""
    both = [{**row, "outer_loss": 1.0} for row in rows]
    losses = lambda units: dict(curve_figures(both, units))["Losses"].axes[0].get_ylabel()
    assert losses(dict.fromkeys(("inner_loss", "outer_loss"), "nats")) == "nats"
    assert losses({"outer_loss": "nats"}) == ""  # they have no unit in common
    assert named["Test error"] == []


def test_names_with_a_common_part_before_a_slash_share_a_panel():
    rows = [
        {"step": t, "mixture/code": t / 9, "mixture/prose": 1 - t / 9, "a/b": t} for t in range(9)
    ]
    figures = dict(curve_figures(rows))
    assert list(figures) == ["Mixture", "A b"]
    assert len(figures["Mixture"].axes[0].lines) == 2
    assert [t.get_text() for t in figures["Mixture"].legends[0].texts] == ["code", "prose"]


def test_the_tasks_headline_names_the_cards(tmp_path):
    summary = {"headline": ["nats.after", "absent"], "steps": 7, "nats": {"after": 1.25}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = write_report(tmp_path).read_text()
    first, second = re.findall(r'<div class="card[^>]*><b>(.*?)</b><span>(.*?)</span>', text)
    assert first == ("1.25", "nats after") and second == ("7", "steps")
    assert "<dt>headline" not in text


def test_smoothing_keeps_constants_and_lines():
    np.testing.assert_allclose(smooth(np.full(50, 3.0), 7), 3.0)
    line = np.arange(50.0)
    np.testing.assert_allclose(smooth(line, 7)[3:-3], line[3:-3])


def test_the_cleaning_sections_tell_the_story(tmp_path):
    arrays = make_run(tmp_path)
    made = {section.title: section.html for section in sections(tmp_path)}
    assert list(made) == [
        "Test error against the baselines",
        "Learned weights",
        "Finding the wrong labels",
        "Precision of the first examples",
        "Most suspicious examples",
    ]
    assert "17.13 %" in made["Test error against the baselines"]
    weights, wrong = arrays["weights"], arrays["is_wrong"]
    # The definition: the chance that a wrong label has a lower weight than a correct one.
    area = np.mean(weights[wrong][:, None] < weights[~wrong][None, :])
    assert f"AUC {area:.3f}" in made["Finding the wrong labels"]
    gallery = Page(made["Most suspicious examples"])
    assert len(gallery.loaded) == 6
    hits = wrong[arrays["suspicious_index"]].sum()
    assert made["Most suspicious examples"].count('class="hit"') == hits > 0


def errors(refit, validation_only, no_weights):
    return {
        "test_error_refit": refit,
        "test_error_validation_only": validation_only,
        "test_error_no_weights": no_weights,
    }


def test_the_conclusion_names_the_network_to_hand_over():
    good = conclusion(errors(0.08, 0.12, 0.18))
    assert good.startswith("The network trained on all data with the learned weights (refit)")
    assert good.index("8.00 %") < good.index("12.00 %") < good.index("18.00 %")
    for summary, better in (
        (errors(0.245, 0.173, 0.189), "the clean validation data alone did better"),
        (errors(0.245, 0.3, 0.189), "all labels as they are did better"),
        (errors(0.245, 0.245, 0.3), "the clean validation data alone did as well"),
    ):
        text = conclusion(summary)
        assert text.startswith("It did not pay here")
        assert better in text
        assert "24.50 %" in text
    assert conclusion(errors(0.3, 0.12, 0.18) | {"test_error_handover": 0.08}).startswith(
        "The network of recipes.clean (hand-over)"
    )
    assert HEADLINE[0] == "test_error_handover"


def test_without_wrong_labels_there_is_no_roc_curve(tmp_path):
    make_run(tmp_path, corrupted=False)
    assert "Finding the wrong labels" not in [section.title for section in sections(tmp_path)]


def test_class_names_are_used_where_there_are_some(tmp_path):
    arrays = make_run(tmp_path)
    names = np.array([f"class {letter}" for letter in "abcdefghij"])
    np.savez(tmp_path / "learned.npz", **arrays, class_names=names)
    gallery = sections(tmp_path)[-1]
    assert gallery.title == "Most suspicious examples" and "given class " in gallery.html


def test_a_learned_file_never_executes_code_and_names_what_it_lacks(tmp_path):
    arrays = make_run(tmp_path)
    path = tmp_path / "learned.npz"
    np.savez(path, weights=arrays["weights"])
    with pytest.raises(ValueError, match="lacks is_wrong, given_label"):
        load_learned(path)
    np.savez(path, **arrays | {"true_label": arrays["true_label"][:-1]})
    with pytest.raises(ValueError, match=r"true_label has shape \(199,\), not \(200,\)"):
        load_learned(path)
    np.savez(path, **arrays | {"given_label": np.array([object()])})
    with pytest.raises(ValueError, match="allow_pickle"):
        load_learned(path)


def test_the_csv_holds_every_example_once_in_rank_order(tmp_path):
    arrays = make_run(tmp_path)
    weights = arrays["weights"].copy()
    weights[[5, 3]] = 0.0
    path = write_suspicious_csv(tmp_path / "suspicious.csv", weights, arrays["given_label"])
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["index", "given_label", "weight", "rank"]
    assert [int(line["index"]) for line in lines[:2]] == [3, 5]
    assert [int(line["rank"]) for line in lines] == list(range(1, 201))
    index = np.array([int(line["index"]) for line in lines])
    np.testing.assert_array_equal(np.sort(index), np.arange(200))
    written = np.array([line["weight"] for line in lines], np.float32)
    np.testing.assert_array_equal(written, np.sort(weights))
    labels = [int(line["given_label"]) for line in lines]
    np.testing.assert_array_equal(labels, arrays["given_label"][index])
    ours = {"wrong_probability": weights[::-1], "suggested_label": arrays["true_label"]}
    with write_suspicious_csv(path, weights, arrays["given_label"], **ours).open() as file:
        first = next(csv.DictReader(file))
    assert int(first["index"]) == np.argmax(weights[::-1])
    assert list(first)[-2:] == ["wrong_probability", "suggested_label"]
    short = write_suspicious_csv(path, weights, arrays["given_label"], limit=7)
    assert len(short.read_text().splitlines()) == 8


def test_weights_without_an_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 NaN"):
        write_suspicious_csv(tmp_path / "a.csv", np.array([0.1, np.nan]), np.zeros(2, int))
    with pytest.raises(ValueError, match="must both be"):
        write_suspicious_csv(tmp_path / "a.csv", np.zeros(3), np.zeros(2, int))
    assert list(tmp_path.iterdir()) == []


def test_a_section_is_placed_after_the_curves_with_its_title_escaped(tmp_path):
    text = write_report(tmp_path, sections=[Section("A < B", "<p>body</p>")]).read_text()
    assert text.index("<h2>A &lt; B</h2><p>body</p>") < text.index("Curves")


FOREIGN = {
    "a step without end": {"metrics.jsonl": f'{{"step": {10**400}, "loss": 1}}\n'},
    "a list for a config": {"config.json": "[1]"},
    "a list for units": {"units.json": "[1]"},
}
ODD = {
    "a number that no float holds": {
        "metrics.jsonl": f'{{"step": 1, "loss": {10**400}}}\n{{"step": 2, "loss": 1}}\n'
    },
    "a headline that is none": {"summary.json": '{"headline": 5, "conclusion": {"a": 1}}'},
    "names that are none": {"summary.json": '{"headline": [[], 3, null], "steps": 3}'},
    "the project's own sections on files that are cut off": {
        "config.json": '{"report": "examples.mnist_hypercleaning.report:sections"}',
        "learned.npz": "PK",
    },
}


@pytest.mark.parametrize("name", FOREIGN | ODD)
def test_a_folder_from_anywhere_is_shown_or_refused_in_one_line(name, tmp_path, capsys):
    files = {"config.json": "{}"} | (FOREIGN | ODD)[name]
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    code = cli.main(["report", str(tmp_path)])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert (code, (tmp_path / "report.html").exists()) == (
        (2, False) if name in FOREIGN else (0, True)
    )
    assert code == 0 or len(error.strip().splitlines()) == 1


# Linear RGB as those see it whose eyes lack one kind of cone (Machado et al. 2009, severity 1).
EYES = {
    "all": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def cielab(colour: str, eyes: str) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.asarray(EYES[eyes]) @ linear, 0, 1) / (TO_XYZ @ np.ones(3))
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
def test_lines_of_one_style_are_told_apart_by_their_colours(eyes: str):
    for four in (COLOURS[:4], COLOURS[4:]):
        for one, other in itertools.combinations(four, 2):
            distance = np.linalg.norm(cielab(one, eyes) - cielab(other, eyes))
            assert distance > 20, (one, other)
    rows = [{"step": t, **{f"share/{k}": k + t for k in range(8)}} for t in range(3)]
    styles = [line.get_linestyle() for line in dict(curve_figures(rows))["Share"].axes[0].lines]
    assert styles == ["-"] * 4 + ["--"] * 4
