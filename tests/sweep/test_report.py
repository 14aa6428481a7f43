"""The report: its figures with their data, tables, sections by what a sweep tried."""

import csv
import os
import re
import shutil

import matplotlib as mpl
import pytest
from matplotlib.text import Text
from scipy import stats
from support import Killed

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.errors import ArtifactError
from kdecs.sweep.commands import is_report_of
from kdecs.sweep.report import figures
from kdecs.sweep.report.figures import figure_label
from kdecs.sweep.report.page import write_report
from kdecs.sweep.report.study_figures import pooled_sd
from kdecs.sweep.report.tables import latex_escaped
from kdecs.sweep.selection.choose import print_selection, select_student
from kdecs.sweep.selection.record import rank_settings
from kdecs.sweep.status import read_results


@pytest.fixture(scope="module")
def reported(finished_once, tmp_path_factory):
    """A finished sweep with its report, before any selection; not to be changed."""
    sweep = shutil.copytree(finished_once / "sweep", tmp_path_factory.mktemp("reported") / "sweep")
    write_report(sweep)
    return sweep


def table_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_report_has_its_figures_and_scores(finished, reported):
    assert "Not opened yet" in (reported / "report" / "index.html").read_text()
    record = select_student(finished)
    page = write_report(finished).read_text()
    assert verify_artifact(finished / "report") == []
    for name in ("leaderboard", "alpha-temperature", "teachers", "spread", "curves", "time"):
        assert (finished / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'src="{name}.png"' in page and f'href="{name}.csv"' in page
    assert not (finished / "report" / "share.png").exists()
    assert f"{record.test['macro_f1']:.2f}" in page
    assert "j &gt;= i-1" in page and "majority emotion" in page
    assert "0.00 points above the best trivial rule, j &gt;= i-1" in page
    assert "http://" not in page and "https://" not in page
    for result in read_results(finished):
        assert result.label in page


def test_a_report_that_is_killed_amid_its_figures_is_unfinished_and_keeps_them_whole(
    reported, tmp_path, monkeypatch
):
    from kdecs.sweep.report import figures

    sweep = shutil.copytree(reported, tmp_path / "sweep")
    digest = read_manifest(sweep, "sweep").config_hash
    assert is_report_of(sweep, digest)
    drawn = figures.plt.Figure.savefig

    def die_amid_the_second(self, path, **options):
        if path.name.startswith(".alpha-temperature"):
            path.write_bytes(b"")
            raise Killed
        drawn(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(figures.plt.Figure, "savefig", die_amid_the_second)
        with pytest.raises(Killed):
            write_report(sweep)
    assert not is_report_of(sweep, digest)
    for figure in (sweep / "report").glob("*.png"):
        assert figure.read_bytes().endswith(b"IEND\xaeB`\x82")
    write_report(sweep)
    assert is_report_of(sweep, digest) and verify_artifact(sweep / "report") == []
    os.truncate(sweep / "report" / "time.png", 0)
    assert not is_report_of(sweep, digest)


def test_a_report_does_not_leave_its_sweep(reported, tmp_path):
    sweep = shutil.copytree(reported, tmp_path / "sweep")
    shutil.rmtree(sweep / "report")
    (tmp_path / "elsewhere").mkdir()
    (sweep / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="leaves the sweep"):
        write_report(sweep)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_figures_data_are_the_results(reported):
    results = {result.label: result for result in read_results(reported)}
    best = table_of(reported / "report" / "leaderboard.csv")[0]
    assert best["setting"] == "llama-tiny α0.6 τ2"
    seeds = [results[f"llama-tiny α0.6 τ2 s{seed}"].score for seed in (0, 1)]
    assert float(best["mean"]) == pytest.approx(sum(seeds) / 2)
    low, high = stats.t.interval(0.95, 1, loc=sum(seeds) / 2, scale=stats.sem(seeds))
    assert (float(best["low"]), float(best["high"])) == pytest.approx((low, high))
    teachers = table_of(reported / "report" / "teachers.csv")
    assert [row["teacher"] for row in teachers] == ["llama-tiny", "t5-tiny"]
    times = table_of(reported / "report" / "time.csv")
    for row in times:
        assert float(row["cpu_hours_a_trial"]) == pytest.approx(float(row["seconds_a_trial"]) / 3600)
    curve = table_of(reported / "report" / "curves.csv")
    assert len(curve) == 8 * 3


def test_spread_pools_variances(reported):
    ranked = rank_settings(read_results(reported))
    assert pooled_sd(ranked) == pytest.approx((sum(s.sd**2 for s in ranked) / 4) ** 0.5)


def test_latex_table_compiles_to_its_parts(reported):
    table = (reported / "report" / "table.tex").read_text()
    assert table.count("\\\\") == 1 + 4 + 4, "a head, four settings, four trivial rules"
    assert "llama-tiny $\\alpha$0.6 $\\tau$2 & \\textbf{68.15}" in table and "j $\\geq$ i-1" in table
    assert latex_escaped("50% & a_b") == "50\\% \\& a\\_b"
    assert latex_escaped("a~b^") == "a\\textasciitilde{}b\\textasciicircum{}"


def test_ablation_has_significance(finish, make_labels, runs):
    sweep = finish(
        teachers={"llama-tiny": str(make_labels(runs / "other" / "llama-tiny"))},
        variants={"KD-ECS": {}, "w/o KD": {"distillation.mode": "joint"}},
        space={"variant": {"grid": ["KD-ECS", "w/o KD"]}, "optimization.seed": {"grid": [0, 1, 2]}},
    )
    page = write_report(sweep).read_text()
    assert "What each part is worth" in page and "there once a student is selected" in page
    select_student(sweep)
    page = write_report(sweep).read_text()
    first, second = table_of(sweep / "report" / "ablation.csv")
    assert (first["variant"], second["variant"]) == ("KD-ECS", "w/o KD")
    assert float(second["difference"]) == pytest.approx(-4.0)  # two for the mode, two for the teacher
    assert float(second["p_dialogues"]) == 1.0, "all students predict the same here"
    assert second["p_seeds"] == "", "every seed differs by the same"
    assert "there once a student is selected" not in page


def test_shares_make_lines(finish, make_labels, runs):
    sweep = finish(
        teachers={"llama-tiny": str(make_labels(runs / "other" / "llama-tiny"))},
        variants={"KD": {}, "joint": {"distillation.mode": "joint"}},
        space={
            "variant": {"grid": ["KD", "joint"]},
            "distillation.hard_share": {"grid": [0.1, 0.5, 1.0]},
            "optimization.seed": {"grid": [0, 1]},
        },
    )
    page = write_report(sweep).read_text()
    rows = table_of(sweep / "report" / "share.csv")
    assert [(row["line"], float(row["share"])) for row in rows] == [
        (line, share) for line in ("KD", "joint") for share in (0.1, 0.5, 1.0)
    ]
    assert float(rows[2]["mean"]) - float(rows[0]["mean"]) == pytest.approx(3.6)
    assert 'src="share.png"' in page and "What each part is worth" not in page


HOSTILE = {
    "formula": "$\\frac{x_1$",  # two dollars, and no formula between them
    "hidden": "_hidden 教师",
    "markup": "[/bold] :smile: [red]",
    "terminal": "\x1b[31mred\n\u202eback",
    "long": "x" * 300,
}


def test_names_of_every_kind_are_names_in_figures_tables_and_on_the_terminal(
    finish, make_labels, runs, monkeypatch, capfd, recwarn
):
    monkeypatch.setitem(mpl.rcParams, "text.usetex", True)  # from a user's own matplotlibrc
    sweep = finish(
        teachers={"llama-tiny": str(make_labels(runs / "other" / "llama-tiny"))},
        variants={
            name: {"distillation.alpha": place / 10} for place, name in enumerate(HOSTILE.values(), start=1)
        },
        space={
            "variant": {"grid": list(HOSTILE.values())},
            "optimization.seed": {"grid": [0]},
        },
    )
    drawn = []
    draw = Text.draw

    def noted(text, renderer, *arguments, **options):
        drawn.append(text.get_text())
        return draw(text, renderer, *arguments, **options)

    monkeypatch.setattr(Text, "draw", noted)
    monkeypatch.setattr(figures, "_DPI", 40)  # faster, and what is drawn stays the same
    print_selection(sweep, select_student(sweep))
    page = write_report(sweep)
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err and "[/bold] :smile: [red]" in out and "\\x1b[31mred" in out
    assert [str(w.message) for w in recwarn if "matplotlib" in str(w.filename)] == []
    labels = {row["setting"] for row in table_of(page.parent / "leaderboard.csv")}
    assert any(HOSTILE["long"] in label for label in labels)
    texts = " ".join(drawn)
    assert HOSTILE["formula"] in texts and "_hidden" in texts and HOSTILE["long"] not in texts


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("llama-7b α0.6 τ2", "llama-7b α0.6 τ2"),
        ("_hidden", " _hidden"),
        ("two\nlines\x07", "two\\nlines\\x07"),
        ("\u202eback", "\\u202eback"),
        ("a" * 40 + "b" * 40, "a" * 24 + "…" + "b" * 23),
    ],
)
def test_a_label_is_one_short_line_that_no_legend_drops(name, shown):
    assert figure_label(name) == shown and len(shown) <= 48


def test_emotions_that_a_winner_was_given_are_no_score_of_it(finish, make_labels, runs):
    sweep = finish(
        teachers={"llama-tiny": str(make_labels(runs / "other" / "llama-tiny"))},
        variants={"given": {"model.given_emotions": "coarse"}},
        space={"variant": {"grid": ["given"]}, "optimization.seed": {"grid": [0, 1]}},
    )
    record = select_student(sweep)
    assert "emotion_accuracy" not in record.test
    page = write_report(sweep).read_text()
    cards = re.findall(r'class="card"><b>([^<]*)</b><span>([^<]*)<', page)
    assert "Emo Acc" not in [title for _, title in cards] and len(cards) == 5
    assert all(score != "–" for score, _ in cards)
