"""The text of `--check`: what would be trained, on what, from what, and for how long."""

import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from d2kd.distillers import TapPair
from d2kd.modeling import DistilledModel, InitializationReport, plan_student
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.classes import ClassMatch, classes_of, match_classes
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm

if TYPE_CHECKING:
    from .check import Level, Step

#: Names of modules that a line tells.
_NAMES = 6
#: Characters of a line.
_WIDTH = 120


def report(trainer: Any, step: "Step", note: str = "") -> str:
    """Returns the table of the methods and the lines about networks, data and the run.

    Args:
        trainer: a `DistillTrainer` that has made the step.
        step: what was seen in it.
        note: on OUTPUT_DIR, "" for nothing.
    """
    facts = [*_networks(trainer, step), *_weights(trainer), *_run(trainer, step)]
    if note:
        facts.append(("folder", note))
    width = max(len(name) for name, _ in facts)
    lines = [_wrapped(f"{name:{width}}  {text}", width + 2) for name, text in facts]
    end = "Checked: a training can start." if not note else "Checked: all fits, but for the folder."
    return "\n".join(["", *table(step), "", *lines, "", f"{end} Nothing was written."])


def _wrapped(line: str, indent: int) -> str:
    return textwrap.fill(line, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def table(step: "Step") -> list[str]:
    """Returns the lines of the table: a row for each level of each method, and one for each loss of the task."""
    header = ["method", "student tap", "teacher tap", "student", "teacher", "strides", "aligner", "loss", "gradient"]
    rows = [_row(level) for level in step.levels]
    task = [(name, loss) for name, loss in step.losses.items() if not name.startswith("distill/")]
    rows += [[f"task: {name}", "", "", "", "", "", "", f"{loss:.4g}", ""] for name, loss in task]
    if len(task) > 1 or step.task_share is not None:
        total = sum(loss for _, loss in task)
        rows.append(["task", "", "", "", "", "", "", f"{total:.4g}", _percent(step.task_share)])
    kept = [n for n, name in enumerate(header) if any(row[n] for row in rows)]
    header, rows = [header[n] for n in kept], [[row[n] for n in kept] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [header, *rows]]


def _row(level: "Level") -> list[str]:
    loss = "-" if level.loss is None else f"{level.loss:.4g}"
    if level.level is None:
        return [level.method, level.tap, "", "", "", "", "", loss, _percent(level.share)]
    pair = level.distiller.pairs[level.level]
    return [
        level.method,
        pair.student.name,
        pair.teacher.name,
        "x".join(map(str, level.student)),
        "x".join(map(str, level.teacher)),
        _strides(pair),
        level.distiller.describe_alignment(level.level),
        loss,
        _percent(level.share),
    ]


def _strides(pair: TapPair) -> str:
    return "-" if pair.student.is_vector else f"{pair.student.stride:g} / {pair.teacher.stride:g}"


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.3g} %"


def _networks(trainer: Any, step: "Step") -> Iterator[tuple[str, str]]:
    student, distilled, cfg = trainer.student, trainer.distilled, trainer.cfg
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    name = f"{cfg.MODEL.META_ARCHITECTURE}, {cfg.MODEL.BACKBONE.NAME}"
    yield (
        "model" if distilled is None else "student",
        f"{name}: {_size(student)}, {trained / 1e6:.4g} M trained",
    )
    yield "frozen", _frozen(student, cfg)
    if distilled is not None:
        teacher, file = distilled.teacher.model, os.path.basename(cfg.DISTILL.TEACHER.CONFIG_FILE)
        yield "teacher", f"{type(teacher).__name__} of {file}: {_size(teacher)}, all of them frozen"
        added = sum(p.numel() for p in distilled.distillers.parameters() if p.requires_grad)
        if added:
            yield (
                "methods",
                f"{added / 1e6:.4g} M parameters of their own, trained beside the student and not a part of it",
            )
        if distilled.recipe:
            yield "recipe", f"auto, which comes to {', '.join(f'{k} {v}' for k, v in distilled.recipe.items())}"
    idle = [f"{level.method} at {level.tap}" for level in step.levels if level.share == 0]
    if idle:
        yield "no effect", f"{', '.join(idle)}: the gradient of this batch is 0"
    if step.without_gradient:
        yield "no gradient", f"reached {_modules(step.without_gradient)} in this batch"


def _size(model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    return f"{count / 1e6:.4g} M parameters, {sum(t.numel() * t.element_size() for t in tensors) / 1e6:.4g} MB"


def _frozen(model: nn.Module, cfg: CfgNode) -> str:
    names, body = list(_frozen_modules(model, "")), architecture_of(model).bottom_up
    stages = [name for name in names if f"{name}.".startswith(f"{body}.")]
    others = [name for name in names if name not in stages]
    parts = [f"{_listed(stages)} (MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT})"] if stages else []
    why = " (DISTILL.INIT_FROM_TEACHER.FREEZE)" if cfg.DISTILL.INIT_FROM_TEACHER.FREEZE else ""
    parts += [f"{_listed(others)}{why}"] if others else []
    norms = sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    parts += [f"scales and statistics of {norms} batch norms (FrozenBN)"] if norms else []
    return "; ".join(parts) or "nothing"


def _frozen_modules(module: nn.Module, name: str) -> Iterator[str]:
    """The largest modules that have frozen parameters only."""
    parameters = list(module.parameters())
    if not any(not p.requires_grad for p in parameters):
        return
    if not any(p.requires_grad for p in parameters):
        yield name or "all of it"
        return
    yield from (f"{name}.{n}".lstrip(".") for n, p in module.named_parameters(recurse=False) if not p.requires_grad)
    for child_name, child in module.named_children():
        yield from _frozen_modules(child, f"{name}.{child_name}".lstrip("."))


def _weights(trainer: Any) -> Iterator[tuple[str, str]]:
    cfg, distilled = trainer.cfg, trainer.distilled
    start = f"iteration {trainer.start_iter} of OUTPUT_DIR" if trainer.start_iter else cfg.MODEL.WEIGHTS
    yield "starts from", start or "MODEL.WEIGHTS is empty: random weights, or the library's where the YAML says so"
    if distilled is None:
        return
    if not cfg.DISTILL.INIT_FROM_TEACHER.ENABLED:
        yield "inherited", "nothing: DISTILL.INIT_FROM_TEACHER.ENABLED is False"
        return
    if trainer.start_iter:
        yield "inherited", "nothing: the weights are those of the run that is continued"
        return
    yield from _inherited(cfg, distilled, plan_student(cfg, distilled))


def _inherited(cfg: CfgNode, model: DistilledModel, plan: InitializationReport) -> Iterator[tuple[str, str]]:
    by_name = [name for name, (places, _) in plan.by_class.items() if places]
    differ = [m for m in match_classes(classes_of(cfg), model.teacher.classes).values() if not m.same]
    partly = {name.rpartition(".")[0] for name, *_ in plan.other_shape}
    whole = [name for name in plan.copied if name.rpartition(".")[0] not in partly]
    biases = [name for name in plan.copied if name not in whole]
    layers = [_modules(whole)] if whole else []
    layers += [f"of {_modules(biases)} the bias alone"] if biases else []
    yield "inherited", f"{len(plan.copied)} tensors: {'; '.join(layers)}" if layers else "nothing fits"
    if layers and cfg.DISTILL.INIT_FROM_TEACHER.LR_FACTOR != 1:
        factor = f"{cfg.DISTILL.INIT_FROM_TEACHER.LR_FACTOR:g} of the learning rate"
        yield "inherited", f"what is trained of them, as a whole, at {factor} (DISTILL.INIT_FROM_TEACHER.LR_FACTOR)"
    if by_name:
        yield "inherited", f"class by class: {_modules(by_name)}, for {'; '.join(map(_classes, differ))}"
    others = list(_other_shapes(plan))
    for layer, ours, theirs in others[:_NAMES]:
        yield "not inherited", f"{layer} is {ours} here, {theirs} in the teacher"
    if len(others) > _NAMES:
        yield "not inherited", f"{len(others) - _NAMES} more layers of another shape: the log names them"
    unknown = [name for name, (places, _) in plan.by_class.items() if not places]
    if unknown:
        sides = "; ".join(f"{m.student} here, {m.teacher} in the teacher" for m in differ)
        yield "not inherited", f"{_modules(unknown)}: {sides}"
    if plan.absent:
        yield "not inherited", f"{_modules(plan.absent)}: the teacher has no such layer"
    yield from (("read otherwise", why) for why in plan.other_meaning.values())
    kept = [f"{architecture_of(model.student).bottom_up}: the student's own backbone"]
    kept += [f"{name}: DISTILL.INIT_FROM_TEACHER.EXCLUDE" for name in cfg.DISTILL.INIT_FROM_TEACHER.EXCLUDE]
    yield from (("not inherited", text) for text in kept)


def _classes(match: ClassMatch) -> str:
    """Which of the student's classes the teacher knows by their names."""
    named = list(zip(match.student.names or (), match.indices or ()))
    lists = [[name for name, index in named if (index is not None) == shared] for shared in (True, False)]
    shown = [", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "") for names in lists]
    kept = f"; not for {shown[1]}, unknown to it" if lists[1] else ""
    return f"{len(lists[0])} of {match.student.number} by their names ({shown[0]}){kept}"


def _other_shapes(plan: InitializationReport) -> Iterator[tuple[str, str, str]]:
    for name, ours, theirs in plan.other_shape:
        if not name.endswith(".bias"):  # it follows its weight
            yield name.removesuffix(".weight"), "x".join(map(str, ours)), "x".join(map(str, theirs))


def _run(trainer: Any, step: "Step") -> Iterator[tuple[str, str]]:
    cfg = trainer.cfg
    records = getattr(trainer.data_loader, "records", None)
    sizes = sorted(step.images)
    shown = " to ".join(dict.fromkeys(f"{w}x{h}" for h, w in (sizes[0], sizes[-1]))) if sizes else "none"
    count = "" if records is None else f", {len(records)} images"
    yield "data", f"{', '.join(cfg.DATASETS.TRAIN)}{count}; here {len(sizes)} of {shown} pixels"
    left = max(0, trainer.max_iter - trainer.start_iter)
    memory, whose = step.memory
    yield "memory", f"{memory / 1e9:.3g} GB at most, {whose}"
    each = step.seconds * cfg.SOLVER.ACCUMULATE
    batches = f" of {cfg.SOLVER.ACCUMULATE} batches" if cfg.SOLVER.ACCUMULATE > 1 else ""
    processes = f", in {comm.get_world_size()} processes" if comm.get_world_size() > 1 else ""
    yield (
        "time",
        f"about {_duration(left * each)} for {left} iterations{batches} of {each:.3g} s, timed here behind the first "
        f"one{processes}; evaluations come on top",
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} days {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _modules(names: Sequence[str]) -> str:
    return _listed(list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))) or "none"


def _listed(names: Sequence[str]) -> str:
    """The names, those that begin alike together, as `head.{a, b}`, and no more than some."""
    groups: dict[str, list[str]] = {}
    for name in names:
        before, _, last = name.rpartition(".")
        groups.setdefault(before, []).append(last)
    parts = [_group(before, lasts) for before, lasts in groups.items()]
    more = f", and {len(parts) - _NAMES} more" if len(parts) > _NAMES else ""
    return ", ".join(parts[:_NAMES]) + more


def _group(before: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{before}.{names[0]}".lstrip(".")
    inside = ", ".join(names)
    return f"{before}.{{{inside}}}" if before else inside
