"""`kdecs report` and `kdecs sweep …`, and the two functions that the driver shares with the report.

`kdecs sweep stop|resume|drop|add` change what is asked of a sweep (kdecs.sweep.control), whether it runs or not, and
`kdecs sweep compare` reads finished ones. What draws, and what reads a search space, is imported when it is needed.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdecs.artifact import check_sizes, read_manifest
from kdecs.config import CONFIG_NAME, load_config, value_of_text
from kdecs.errors import ArtifactError, ConfigError, DependencyError, printable
from kdecs.process import say
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import REPORT_FOLDER, SweepConfig
from kdecs.sweep.control import Wanted, changing_control
from kdecs.tables import figures_table, markdown_table, terminal

if TYPE_CHECKING:
    from kdecs.sweep.search import Search
    from kdecs.sweep.space import Point, Trial

_MAX_NAMES = 8  # that an error lists
_WHEN = "A running sweep follows within seconds; otherwise the next start of the sweep does."
_SHORTEST_ID = 4  # hex digits of a trial's id that may stand for it

app = typer.Typer(
    no_args_is_help=True,
    help="Change a sweep while it runs: stop, resume or drop trials, add settings; compare its settings afterwards.",
)
Sweep = Annotated[
    Path, typer.Argument(metavar="SWEEP_DIR", help="The output directory of an unfinished sweep.")
]
Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME…",
        help="A trial by its id or name ('llama-7b α0.6 τ2 s3'), or a setting by its name "
        "('llama-7b α0.6 τ2'), which stands for all of its seeds.",
    ),
]


def report(
    sweep_dir: Annotated[Path, typer.Argument(metavar="SWEEP_DIR", help="A finished sweep's directory.")],
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="SWEEP_DIR",
            help="A further finished sweep whose best student is a row of Table 4, such as one on cause utterances "
            "(task ecpe), which fills the other half; repeatable.",
        ),
    ] = None,
) -> None:
    """Write a sweep's report: a page that opens offline, with tables and figures (HTML + PNG)."""
    page = write_report_of(sweep_dir.absolute(), [other.absolute() for other in beside or []])
    say(f"report: {page}")


def write_report_of(sweep: Path, beside: Sequence[Path] = ()) -> Path:
    """Write a sweep's report and return its page. Raises DependencyError if a package for it is missing."""
    try:
        from kdecs.sweep.report.page import write_report
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"a report needs {error.name}, which is not installed; install it with: pip install 'kdecs[sweep]'"
        ) from None
    return write_report(sweep, beside)


def is_report_of(sweep: Path, digest: str) -> bool:
    """Whether the sweep's directory holds a complete report of its present state."""
    try:
        manifest = read_manifest(sweep / REPORT_FOLDER, "report")
        check_sizes(sweep / REPORT_FOLDER, manifest)
        return manifest.inputs.get("sweep") == digest
    # A damaged report counts as none, so that it is written again.
    except ArtifactError:
        return False


@app.command("stop")
def stop(sweep_dir: Sweep, names: Names) -> None:
    """Stop trials. Each saves its state, ends, and does not go on until you resume it.

    Example: kdecs sweep stop runs/sweeps/main 'llama-7b α0.6 τ2 s3'
    """
    _ask(sweep_dir, names, "stop")


@app.command("resume")
def resume(sweep_dir: Sweep, names: Names) -> None:
    """Let trials go on that were stopped, or take back trials that were dropped.

    Example: kdecs sweep resume runs/sweeps/main 'llama-7b α0.6 τ2 s3'
    """
    _ask(sweep_dir, names, None)


@app.command("drop")
def drop(sweep_dir: Sweep, names: Names) -> None:
    """Stop trials and leave them out of the comparison. Nothing is deleted.

    Example: kdecs sweep drop runs/sweeps/main 'llama-7b α0.2 τ1'
    """
    _ask(sweep_dir, names, "drop")


@app.command("add")
def add(
    sweep_dir: Sweep,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE…",
            help="A value for each key that the sweep varies, without the seed. Further keys of the student's config "
            "are allowed.",
        ),
    ],
) -> None:
    """Add one setting, which is trained with every seed of the sweep.

    Example: kdecs sweep add runs/sweeps/main teacher=llama-7b distillation.alpha=0.9 distillation.temperature=4
    """
    from kdecs.sweep.search import Search

    sweep = sweep_dir.absolute()
    with changing_control(sweep) as control:
        config = _config_of(sweep)
        search = Search(config)
        point = _point(search, values)
        wider = control.model_copy(update={"added": (*control.added, point)})
        known = search.trials()
        new = [trial for trial, _ in Search(config, control=wider).trials().values() if trial.id not in known]
        if not new:
            raise ConfigError(_why_nothing_is_new(search, point))
        wider.write(sweep)
    for trial in new:
        say(f"{trial.label} ({trial.id}): added")
    say(_WHEN)


@app.command("compare")
def compare(
    sweep_dirs: Annotated[
        list[Path], typer.Argument(metavar="SWEEP_DIR…", help="Finished sweeps on the same validation split.")
    ],
    minus: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The setting that is subtracted from the others: its name, or its variant's."
        ),
    ],
    setting: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A setting to compare with it; repeatable. Default: all others."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare settings with one of them on validation: A minus B with a 95% interval and p, paired by dialogue.

    The predictions of all seeds are pooled. p (Holm) is corrected for all comparisons that are shown.

    Example: kdecs sweep compare runs/sweeps/table4 --minus 'w/o KD' --setting KD-ECS
    """
    from kdecs.sweep.selection.compare import contenders, differences, named, shown

    everyone = contenders([sweep.absolute() for sweep in sweep_dirs])
    reference = named(everyone, minus)
    others = [named(everyone, name) for name in setting or ()] or [
        each for each in everyone if each is not reference
    ]
    if not others or any(each is reference for each in others):
        raise ConfigError(f"{minus}: there is no other setting to compare it with")
    found = differences(reference, others)
    titles = shown(reference)
    if as_json:
        scores = [
            {"setting": each.name, "seeds": len(each.trials), **{score: each.mean(score) for score in titles}}
            for each in (*others, reference)
        ]
        rows = [
            {"setting": each.name, "score": each.score, "seeds": each.num_seeds, **asdict(each.compared)}
            | {"holm_p": each.holm_p}
            for each in found
        ]
        print(json.dumps({"minus": reference.name, "scores": scores, "differences": rows}, indent=2))
        return
    means = figures_table(
        "Validation: mean over seeds, percent", "setting", "seeds", *titles.values(), tight=True
    )
    for each in (*others, reference):
        cells = [each.mean(score) for score in titles]
        means.add_row(
            each.name, str(len(each.trials)), *("–" if cell is None else f"{cell:.2f}" for cell in cells)
        )
    columns = ("difference", "95% over dialogues", "p", "p (Holm)")
    if markdown:
        table = figures_table("", "setting", "score", *columns)
        for row in found:
            table.add_row(row.name, titles[row.score], *row.cells)
        print(f"{markdown_table(means)}\n\n{markdown_table(table)}")
        return
    console = terminal()
    console.print(means)
    for score, title in titles.items():
        table = figures_table(f"{title}, minus {reference.name}", "setting", *columns, tight=True)
        for row in found:
            if row.score == score:
                table.add_row(row.name, *row.cells)
        console.print(table)


def _ask(sweep_dir: Path, names: list[str], wanted: Wanted | None) -> None:
    """Ask something of the named trials, and say of each what follows. Raises ArtifactError if nothing can."""
    from kdecs.sweep.search import Search

    sweep = sweep_dir.absolute()
    with changing_control(sweep) as control:
        search = Search(_config_of(sweep))
        known = search.trials()
        asked, lines, refusals = dict(control.trials), [], []
        for trial in _named([trial for trial, _ in known.values()], names):
            result = search.result(trial, known[trial.id][1], is_live=True)
            before, name = control.wanted(trial.id), f"{trial.label} ({trial.id})"
            # A search may go on with a trial that it has pruned, but not before the survivors are known.
            is_over = result.status == "complete" or (result.status == "pruned" and result.stage == "search")
            if before == wanted:
                state = {"stop": "stopped", "drop": "dropped", None: "neither stopped nor dropped"}[wanted]
                lines.append(f"{name}: {state} already")
            elif wanted == "stop" and before == "drop":
                refusals.append(f"{name} is dropped; take it back with kdecs sweep resume")
            elif wanted == "stop" and is_over:
                state = "complete" if result.status == "complete" else "stopped by the search already"
                refusals.append(f"{name} is {state}; leave it out of the comparison with kdecs sweep drop")
            else:
                asked.pop(trial.id, None)
                asked |= {trial.id: wanted} if wanted else {}
                reached = f"epoch {result.epoch} of {result.epochs}"
                effect = {
                    "stop": f"stops at {reached} and stays out until it is resumed",
                    "drop": f"dropped at {reached}, left out of the comparison",
                    None: f"goes on from {reached}",
                }
                lines.append(f"{name}: {effect[wanted]}")
        if not lines:
            more = f" (and {len(refusals) - 1} more likewise)" if len(refusals) > 1 else ""
            raise ArtifactError(refusals[0] + more)
        if asked != control.trials:
            control.model_copy(update={"trials": asked}).write(sweep)
    for line in lines + refusals:
        say(line)
    if asked != control.trials:
        say(_WHEN)


def _config_of(sweep: Path) -> SweepConfig:
    # The directory may have been moved since its driver wrote the config.
    return load_config(SweepConfig, sweep / CONFIG_NAME).model_copy(update={"output": sweep})


def _named(trials: list["Trial"], names: Iterable[str]) -> list["Trial"]:
    """The trials that the names stand for, once each. Raises ArtifactError for a name that is nobody's or several's."""
    from kdecs.sweep.space import settings_key

    found: dict[str, Trial] = {}
    for name in names:
        text = " ".join(name.split())
        same = [t for t in trials if text in (t.id, t.label, t.config.name)]
        # The seeds of a setting, which is one, whatever the number of its trials.
        same = same or [t for t in trials if text in (t.setting_label, t.config.name.rpartition("-s")[0])]
        same = same or [t for t in trials if name == settings_key(t.settings)]
        if not same and len(text) >= _SHORTEST_ID:
            same = [t for t in trials if t.id.startswith(text)]
            if len(same) > 1:
                shown = _listed(f"{t.id} ({t.label})" for t in same)
                raise ArtifactError(
                    f"{printable(name)}: {len(same)} trials have such an id: {shown}; write more of it"
                )
        if not same:
            settings = _listed(dict.fromkeys(t.setting_label for t in trials))
            raise ArtifactError(
                f"{printable(name)}: no trial has this id or name, and no setting this name; the settings are "
                f"{settings}, and their trials end in a seed, such as {trials[0].label!r}"
            )
        found |= {trial.id: trial for trial in same}
    return list(found.values())


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
    return "; ".join(found[:_MAX_NAMES]) + more


def _point(search: "Search", values: Iterable[str]) -> "Point":
    """The point that KEY=VALUE texts name. A key that the space gives one value need not be given.

    Raises ConfigError for a key that is missing, a value that does not fit, and a setting that a constraint refuses.
    """
    from kdecs.sweep.space import SEED_KEY, TEACHER_KEY, VARIANT_KEY

    point: Point = {}
    for text in values:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"{text}: expected KEY=VALUE, such as distillation.alpha=0.9")
        if key == SEED_KEY:
            raise ConfigError(
                f"{key}: an added setting is trained with every seed of the sweep; leave the seed out"
            )
        is_word = key in (TEACHER_KEY, VARIANT_KEY)
        point[key] = value if is_word else value_of_text(StudentConfig, key, value, source=text)
    search.space.check_names(point)
    space = {key: dimension for key, dimension in search.config.space.items() if key != SEED_KEY}
    missing = []
    for key, dimension in space.items():
        if (
            key not in point
            and (dimension.is_drawn or len(dimension.values) > 1)
            and _matters(search, point, key)
        ):
            missing.append(key)
    if missing:
        raise ConfigError(f"{', '.join(missing)}: expected a value for each key that the sweep varies")
    point |= {key: dimension.values[0] for key, dimension in space.items() if key not in point}
    if search.space.trial_at({**point, SEED_KEY: search.space.seeds()[0]}) is None:
        refusing = _listed(search.config.constraints)
        raise ConfigError(f"the constraints of the sweep refuse this setting: {refusing}")
    return {key: point[key] for key in [*space, *(key for key in point if key not in space)]}


def _matters(search: "Search", point: "Point", key: str) -> bool:
    """Whether a key that is not given makes a difference. A joint student, for example, has no teacher."""
    from kdecs.sweep.space import SEED_KEY

    space = search.config.space
    others = {name: dimension.values[0] for name, dimension in space.items() if name != SEED_KEY} | point
    others[SEED_KEY] = search.space.seeds()[0]
    trials = [search.space.trial_at({**others, key: value}) for value in space[key].values]
    return None in trials or len({trial.id for trial in trials if trial}) > 1


def _why_nothing_is_new(search: "Search", point: "Point") -> str:
    from kdecs.sweep.space import SEED_KEY

    trial = search.space.trial_at({**point, SEED_KEY: search.space.seeds()[0]})
    assert trial is not None
    is_kept_out = search.control.wanted(trial.id) is not None
    advice = "; take it back with kdecs sweep resume" if is_kept_out else ""
    return f"{trial.setting_label}: the sweep has this setting already{advice}"
