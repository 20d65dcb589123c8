"""Classes of student and teacher: matched by name where both are known, else by their place."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from d2kd.distillers import TapPair
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .architectures import ClassLayer, architecture_class

logger = logging.getLogger(__name__)

#: Names of classes in the order of a model's, by the field of a dataset's metadata: "thing_classes", "stuff_classes".
ClassNames = Mapping[str, Sequence[str]]

#: What tells the names of a registered dataset's classes, called with the dataset and the field; None where it cannot.
#: The metadata of many datasets have no names before they are loaded, so `d2kd.data.classes` reads their files here.
CLASS_NAME_READERS: list[Callable[[str, str], Sequence[str] | None]] = [
    lambda dataset, kind: MetadataCatalog.get(dataset).get(kind)
]


class Classes(NamedTuple):
    """The classes that a model predicts."""

    #: Configuration key with their number.
    key: str
    number: int
    #: In the model's order; None where nothing tells them.
    names: tuple[str, ...] | None

    def __str__(self) -> str:
        names = f" ({', '.join(self.names[:5])}{', ...' if self.number > 5 else ''})" if self.names else ""
        return f"{self.number} classes{names}"


class ClassMatch(NamedTuple):
    """The student's classes among the teacher's."""

    student: Classes
    teacher: Classes
    #: The teacher's class for each of the student's, None where it has none of that name; None for all where their
    #: numbers differ and names are not known.
    indices: tuple[int | None, ...] | None

    @property
    def known(self) -> tuple[int, ...] | None:
        """The teacher's class for each of the student's, where it has them all; else None."""
        indices = self.indices or (None,)
        return None if None in indices else tuple(i for i in indices if i is not None)

    @property
    def same(self) -> bool:
        """Whether both have the same classes in the same order."""
        return self.indices == tuple(range(self.teacher.number))


def classes_of(
    cfg: CfgNode, saved: ClassNames | None = None, datasets: Sequence[str] | None = None
) -> dict[str, Classes]:
    """Returns the classes of a configuration's model, by the kind that a dataset's metadata calls them.

    Args:
        cfg: of the model.
        saved: names that its checkpoint holds; else those of its training sets are taken, where they are registered and
            their metadata or files tell them.
        datasets: instead of the training sets.
    """
    classes = {}
    for count, number in architecture_class(cfg).class_counts(cfg):
        names = (saved or {}).get(count.metadata)
        if names is None:
            names = _names_of(datasets or cfg.DATASETS.TRAIN, count.metadata)
        names = None if names is None else tuple(map(str, names))
        # a list of another length is not that of this model's classes
        classes[count.metadata] = Classes(count.key, number, names if names and len(names) == number else None)
    return classes


def _names_of(datasets: Sequence[str], kind: str) -> Sequence[str] | None:
    read = (reader(name, kind) for name in datasets if name in DatasetCatalog for reader in CLASS_NAME_READERS)
    return next((names for names in read if names is not None), None)


def match_classes(student: Mapping[str, Classes], teacher: Mapping[str, Classes]) -> dict[str, ClassMatch]:
    """Returns the matches of the kinds of classes that both models have."""
    return {kind: _match(student[kind], teacher[kind]) for kind in student if kind in teacher}


def log_unknown(matches: Mapping[str, ClassMatch]) -> None:
    """Logs which classes are matched by their place, since names are not known: nothing else would tell."""
    for match in matches.values():
        unknown = [f"{who}'s" for who, of in (("student", match.student), ("teacher", match.teacher)) if not of.names]
        if unknown and match.indices is not None:
            logger.info(
                "Class k of the student is taken to be class k of the teacher, all %d: the names of the %s are not "
                "known (from class_names of a checkpoint, or the dataset in DATASETS.TRAIN of its YAML).",
                match.student.number,
                " and the ".join(unknown),
            )


def _match(ours: Classes, theirs: Classes) -> ClassMatch:
    if ours.names is not None and theirs.names is not None:
        places = {name: place for place, name in enumerate(theirs.names)}
        return ClassMatch(ours, theirs, tuple(places.get(name) for name in ours.names))
    return ClassMatch(ours, theirs, tuple(range(ours.number)) if ours.number == theirs.number else None)


def predicts_classes(layer: ClassLayer, match: ClassMatch, ours: int, theirs: int) -> bool:
    """Returns whether two layers, of some numbers of outputs, have the same for every class."""
    groups = layer.groups(ours, match.student.number)
    return groups is not None and groups == layer.groups(theirs, match.teacher.number)


def class_rows(layer: ClassLayer, match: ClassMatch, ours: int, theirs: int) -> tuple[list[int], list[int]] | None:
    """Returns which outputs of the student's layer stand for the same as which of the teacher's.

    Args:
        layer: what the outputs are.
        match: with known indices.
        ours, theirs: numbers of outputs of the two layers.

    Returns:
        The places in both; None where these numbers do not come from the numbers of classes, or it is unknown which
        classes are the same.
    """
    groups = layer.groups(ours, match.student.number)
    if groups is None or match.indices is None or not predicts_classes(layer, match, ours, theirs):
        return None
    pairs = [
        ((group * match.student.number + i) * layer.width + k, (group * match.teacher.number + j) * layer.width + k)
        for group in range(groups)
        for i, j in enumerate(match.indices)
        if j is not None
        for k in range(layer.width)
    ]
    if pairs and layer.has_background(ours, match.student.number):  # the last output
        pairs.append((ours - 1, theirs - 1))
    return [i for i, _ in pairs], [j for _, j in pairs]


def in_students_order(pair: TapPair, layer: ClassLayer, match: ClassMatch) -> TapPair:
    """Returns a pair of predictions whose teacher gives the student's classes, in the student's order.

    `match` must be of all of the student's classes.
    """
    rows = class_rows(layer, match, pair.student.channels, pair.teacher.channels)
    if match.same or rows is None:
        return pair
    order = tuple(rows[1])
    return pair._replace(teacher=pair.teacher._replace(channels=len(order), order=order))
