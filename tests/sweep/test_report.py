"""The report: its figures with their data, tables, sections by what a sweep tried."""

import csv
import json
import os
import re
import shutil

import matplotlib as mpl
import pytest
from matplotlib.text import Text
from scipy import stats
from support import Killed

from kdecs.artifact import content_checksum, read_manifest, verify_artifact, write_manifest
from kdecs.errors import ArtifactError, ConfigError
from kdecs.sweep.commands import is_report_of
from kdecs.sweep.report import figures, page
from kdecs.sweep.report.figures import figure_label
from kdecs.sweep.report.page import write_report
from kdecs.sweep.report.published import TABLE_5, UTTERANCES
from kdecs.sweep.report.study_figures import pooled_sd
from kdecs.sweep.report.tables import latex_escaped
from kdecs.sweep.selection.choose import print_selection, select_student
from kdecs.sweep.selection.on_test import score_settings
from kdecs.sweep.selection.pick import Pick
from kdecs.sweep.selection.record import rank_settings
from kdecs.sweep.status import read_results

pytestmark = pytest.mark.usefixtures("_coarse_figures")


@pytest.fixture(scope="module")
def reported(finished_once, tmp_path_factory):
    """A finished sweep with its report at its full size, before any selection; not to be changed."""
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


def test_ablation_has_significance(finish, make_labels, runs, undrawn):
    sweep = finish(
        teachers={"llama-tiny": str(make_labels(runs / "other" / "llama-tiny"))},
        variants={"KD-ECS": {}, "w/o KD": {"distillation.mode": "joint"}},
        space={"variant": {"grid": ["KD-ECS", "w/o KD"]}, "optimization.seed": {"grid": [0, 1, 2]}},
    )
    page = write_report(sweep).read_text()
    assert "What each part is worth (Table 5)" in page and "there once a student is selected" in page
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
    paper = {row["line"]: row["paper_positive_f1"] for row in rows if row["share"] == "1.0"}
    assert paper == {"KD": "58.62", "joint": "56.27"} and rows[0]["paper_positive_f1"] == ""
    assert rows[0]["test_positive_f1"] == "" and rows[0]["valid_positive_f1"]
    assert 'src="share.png"' in page and "What each part is worth" not in page
    assert "Dashed: the trivial rule j &gt;= i-1." in page


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without figures, for tests of their tables."""
    monkeypatch.setattr(page, "_figures", lambda *arguments: [])


def test_tables_of_the_paper_have_published_figures_rules_and_ours(finish, make_labels, runs, undrawn):
    sweep = finish(
        teachers={"llama-tiny": str(make_labels(runs / "other" / "llama-tiny"))},
        variants={
            "KD-ECS": {},
            "w/o KD": {"distillation.mode": "joint"},
            "given fine": {"model.given_emotions": "fine"},
            "given coarse": {"model.given_emotions": "coarse"},
        },
        baselines={"MRC": {"system": "mrc", "optimization.epochs": 1}},
        space={
            "variant": {"grid": ["KD-ECS", "w/o KD", "given fine", "given coarse", "MRC"]},
            "optimization.seed": {"grid": [0, 1]},
        },
    )
    report = sweep / "report"
    assert (
        "These are no test scores, because test was not opened for the winner"
        in write_report(sweep).read_text()
    )
    rows = {row["system"]: row for row in table_of(report / "table5.csv")}
    means = {"KD-ECS": 68.15, "w/o KD": 64.15}
    of_table_4 = {row["system"]: row for row in table_of(report / "table4.csv") if row["source"] == "ours"}
    for name, mean in means.items():
        assert float(rows[name]["ours, validation: macro_f1"]) == pytest.approx(mean)
        (label,) = (label for label in of_table_4 if label.startswith(name))
        assert float(of_table_4[label]["spans (ECSPE): macro_f1"]) == pytest.approx(mean)
    assert [float(rows["w/o KD"][f"paper: {key}"]) for key in TABLE_5["w/o KD"]] == [30.49, 56.27, 72.74]
    assert rows["j >= i-1"]["source"] == "trivial rule" and rows["given fine"]["paper: macro_f1"] == ""

    winner = select_student(sweep)
    assert (
        "was not opened for every setting: kdecs.launch.select_student --table"
        in write_report(sweep).read_text()
    )
    assert "ours, validation: macro_f1" in table_of(report / "table5.csv")[0], "never two splits in one table"
    score_settings(sweep)
    text = write_report(sweep).read_text()
    assert verify_artifact(report) == []
    assert "+0.00 <small>+0.00 to +0.00</small>" in text, "our students predict by the rule here"
    assert "Every setting on test, for tables" in text and "no test scores" not in text
    rows = {row["system"]: row for row in table_of(report / "table5.csv")}
    for name in means:
        assert float(rows[name]["ours, test: macro_f1"]) == pytest.approx(winner.test["macro_f1"])
    *_, ours, mrc = table_of(report / "table6.csv")
    assert mrc["system"] == "MRC (gold emotions) (test)" and mrc["coarse emotion given: positive_f1"] == ""
    assert float(mrc["fine emotion given: positive_f1"]) == pytest.approx(winner.test["positive_f1"])
    assert (ours["system"], ours["source"]) == ("small (test)", "ours")
    assert float(ours["coarse emotion given: positive_f1"]) == pytest.approx(winner.test["positive_f1"])
    settings = table_of(report / "settings.csv")
    assert {row["chosen_seed"] for row in settings} == {"1"} and all(row["test_macro_f1"] for row in settings)
    latex = (report / "table6.tex").read_text()
    assert "KD-ECS & 36.77 & 62.14 & 35.48 & 61.32" in latex
    assert "universe fold1, protocol reccon, 90 positive and 231 negative rows" in latex
    assert "one student of 2 seeds per setting, chosen on validation (seed 1, 1, 1)" in latex


def test_a_sweep_on_cause_utterances_fills_the_other_half_of_table_4(
    selected, finish, make_config, runs, undrawn
):
    student = {**make_config().student, "task": "ecpe"}
    ecpe = finish(output=str(runs / "ecpe"), student=student, space={"teacher": {"grid": ["llama-tiny"]}})
    select_student(ecpe)
    write_report(selected, [ecpe])
    rows = table_of(selected / "report" / "table4.csv")
    halves = "spans (ECSPE): macro_f1", "cause utterances (ECPE): utterance_macro_f1"
    by_name = {row["system"]: tuple(row[half] for half in halves) for row in rows}
    assert by_name["KD-ECS"] == ("74.16", "76.69") and by_name["UECA"] == ("", "73.92")
    assert by_name["SpanBERT"] == ("69.74", "")
    spans, utterances = by_name["llama-tiny α0.6 τ2 (test)"]
    assert by_name["j >= i-1 (test)"] == (spans, utterances), "our students predict by this rule here"
    assert spans and utterances and spans != utterances
    assert [row["source"] for row in rows] == ["paper"] * 10 + ["trivial rule"] * 4 + ["ours"]
    variants = finish(
        output=str(runs / "variants"),
        student=student,
        variants={"KD-ECS": {}, "w/o KD": {"distillation.mode": "joint"}},
        space={"teacher": {"grid": ["llama-tiny"]}, "variant": {"grid": ["KD-ECS", "w/o KD"]}},
    )
    text = write_report(variants).read_text()
    assert "<button>EM</button>" not in text and "(Table 5)" not in text, "no spans, no scores of spans"
    heads = table_of(variants / "report" / "settings.csv")[0].keys()
    assert {head for head in heads if head.startswith("valid_")} == {f"valid_{key}" for key in UTTERANCES}
    manifest = read_manifest(selected / "report", "report")
    assert manifest.inputs["beside.small"] == read_manifest(ecpe, "sweep").config_hash
    damaged = ecpe / "baselines.json"
    damaged.write_text("{}")
    with pytest.raises(ArtifactError, match=re.escape(str(damaged))):
        write_report(selected, [ecpe])


def test_figures_of_studies_show_test_beside_validation(selected):
    """Pos F1 as in the paper, and how the teachers were trained, as far as their labels lead to it."""
    score_settings(selected)
    write_report(selected)
    first, second = table_of(selected / "report" / "teachers.csv")
    assert float(first["valid_positive_f1"]) == pytest.approx(68.15 - 15)
    assert float(first["test_positive_f1"]) == float(second["test_positive_f1"]) > 0
    assert "learning_rate" not in first, "made-up labels lead to no teacher"


def test_each_budget_has_a_figure_of_shares(finish, make_labels, runs, monkeypatch):
    """Equal epochs, in which KD takes more steps, and equal steps.

    A setting whose epochs take the steps of the other budget (30 here) is trained once and stands in both figures; one
    that was trained for those steps has precedence. With 60 steps there is one share, and so no figure.
    """
    for name in ("leaderboard", "alpha_temperature", "teacher", "spread", "curves", "time"):
        monkeypatch.setattr(page, f"{name}_figure", lambda *arguments: None)
    sweep = finish(
        teachers={"llama-tiny": str(make_labels(runs / "other" / "llama-tiny"))},
        variants={"KD": {}, "joint": {"distillation.mode": "joint"}},
        space={
            "variant": {"grid": ["KD", "joint"]},
            "distillation.hard_share": {"grid": [0.1, 1.0]},
            "optimization.steps": {"grid": [None, 30, 60]},
            "optimization.seed": {"grid": [0]},
        },
        constraints=["optimization.steps is None or (variant != 'KD' and distillation.hard_share < 1)"],
    )
    text = write_report(sweep).read_text()
    assert not (sweep / "report" / "share-60-steps.csv").exists()
    tables = [table_of(sweep / "report" / name) for name in ("share.csv", "share-30-steps.csv")]
    for rows, has_steps in zip(tables, (False, True), strict=True):
        assert [(row["line"], float(row["share"])) for row in rows] == [
            (line, share) for line in ("KD", "joint") for share in (0.1, 1.0)
        ]
        assert ["steps=30" in row["setting"] for row in rows] == [False, False, has_steps, False]
    for words in (
        "Share of the gold labels (Figure 3), equal epochs",
        "(Figure 3), equal steps",
        "takes 30 steps",
    ):
        assert words in text


def test_recipes_of_teachers_are_those_that_made_the_labels(make_config, runs):
    """Full tuning and LoRA; a teacher that was trained again since then, or is gone, has no recipe."""
    values = {
        "optimization": {"learning_rate": 1e-5, "epochs": 3},
        "batches": {"global_batch_pairs": 16, "max_prompt_tokens": 512},
        "corpus": {"train_share": 1.0},
    }
    labels = {}
    for name, lora in {"full": None, "lora": {"rank": 16}, "anew": None, "gone": None}.items():
        teacher, labels[name] = runs / "teachers" / name, runs / "made" / name
        for directory in (teacher, labels[name]):
            directory.mkdir(parents=True)
        (teacher / "config.json").write_text(json.dumps(values | {"lora": lora}))
        write_manifest(teacher, "teacher", config_hash=name, inputs={}, files=["config.json"])
        (labels[name] / "config.json").write_text(json.dumps({"teacher": str(teacher)}))
        made_by = "0" * 64 if name == "anew" else content_checksum(teacher)
        files = ["config.json"]
        write_manifest(
            labels[name], "soft-labels", config_hash=name, inputs={"teacher": made_by}, files=files
        )
    shutil.rmtree(runs / "teachers" / "gone")
    config = make_config(
        teachers={name: str(path) for name, path in labels.items()}, space={"teacher": {"grid": list(labels)}}
    )
    found = page._recipes(config)
    assert {name: recipe["tuning"] for name, recipe in found.items()} == {
        "full": "all parameters",
        "lora": "LoRA rank 16",
    }
    assert found["full"]["length"] == "3 epochs"
    assert found["full"]["learning_rate"] == 1e-5 and found["full"]["max_prompt_tokens"] == 512


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


def test_emotions_that_a_winner_was_given_are_no_score_of_it(finish, make_labels, runs, undrawn):
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


def test_curves_of_a_generative_baseline_have_a_point_per_validation(finish, monkeypatch):
    sweep = finish(
        baselines={
            "LLaMA": {
                "system": "generative",
                "model.base": "tiny",
                "optimization.epochs": 1,
                "validate_per_epoch": 2,
            }
        },
        space={"variant": {"grid": ["LLaMA"]}, "teacher": {"grid": ["llama-tiny"]}},
    )
    for name in ("leaderboard", "alpha_temperature", "teacher", "spread", "time"):
        monkeypatch.setattr(page, f"{name}_figure", lambda *arguments: None)
    drawn = {}
    monkeypatch.setattr(
        page, "curves_figure", lambda settings, points, metric, target: drawn.update(points) or None
    )
    write_report(sweep)
    ((curve,),) = drawn.values()
    assert [(point["epoch"], point["macro_f1"]) for point in curve] == [(1, 72), (2, 74)]
    (result,) = read_results(sweep)
    assert (result.best_epoch, result.epoch, result.epochs) == (2, 2, 2)


def test_baselines_are_rows_beside_the_chosen_student(finish, runs, undrawn):
    sweep = finish(
        variants={"KD": {}},
        baselines={
            "KEC": {"system": "kec", "optimization.epochs": 2},
            "LLaMA": {"system": "generative", "model.base": "llama-tiny", "optimization.epochs": 1},
        },
        space={"variant": {"grid": ["KD", "KEC", "LLaMA"]}, "teacher": {"grid": ["llama-tiny"]}},
    )
    assert {entry.name for entry in sweep.parent.glob("students/*")} >= {
        result.config_hash for result in read_results(sweep)
    }
    record = select_student(sweep)
    assert record.settings[0].label == "KEC", "by its score it comes first"
    assert record.winner.label.startswith("KD") and record.runner_up.label == "KEC"
    write_report(sweep)
    rows = {
        row["system"]: row for row in table_of(sweep / "report" / "table4.csv") if row["source"] == "ours"
    }
    assert {"KEC (validation)", "LLaMA (validation)", f"{record.setting.label} (test)"} == set(rows)
    assert float(rows["KEC (validation)"]["spans (ECSPE): macro_f1"]) == pytest.approx(74.0)
    assert float(rows["LLaMA (validation)"]["spans (ECSPE): macro_f1"]) == pytest.approx(72.0)
    assert [row["variant"] for row in table_of(sweep / "report" / "ablation.csv")] == ["KD", "KEC", "LLaMA"]
    assert {row.label for row in score_settings(sweep).table} == {"KEC", "LLaMA", record.setting.label}
    write_report(sweep)
    systems = [row["system"] for row in table_of(sweep / "report" / "table4.csv")]
    assert systems[-3:] == [f"{record.setting.label} (test)", "KEC (test)", "LLaMA (test)"]
    shutil.copytree(sweep, runs / "again")
    (runs / "again" / "selection.json").unlink()
    with pytest.raises(ConfigError, match="is a baseline, and selection chooses and registers a student"):
        select_student(runs / "again", Pick("by hand", setting="KEC"))
