"""What reports know of tasks and their metrics: columns, words, and the files that hold predictions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: Ends of the names of a student's variants, see `d2kd.engine.evaluation.evaluate_variant`.
_VARIANTS = ("_EMA", "_TTA")


@dataclass(frozen=True)
class Metric:
    """A metric and the words for it."""

    name: str  # as in result.json
    heading: str  # of its column in a table
    unit: str  # what stands behind a value in a sentence, e.g. "AP" or "% top-1 accuracy"

    @property
    def title(self) -> str:
        """What a sentence calls it."""
        return self.unit.removeprefix("% ")

    @property
    def axis(self) -> str:
        """What an axis of values is called."""
        return self.title if self.title == self.unit else f"{self.title} (%)"


_WORDS = {
    "top1": Metric("top1", "top-1 (%)", "% top-1 accuracy"),
    "top5": Metric("top5", "top-5 (%)", "% top-5 accuracy"),
}


def metric_named(name: str) -> Metric:
    """The metric of that name; most are called what they are named."""
    return _WORDS.get(name) or Metric(name, name, name)


@dataclass(frozen=True)
class Task:
    """What a report shows of the results of a task."""

    columns: tuple[str, ...]  # metrics of the table; the first one is compared
    of_classes: str  # the metric of single classes: "AP" for "AP-person"
    predictions: str | None  # name of the file that the evaluator writes for pictures
    num_images: int  # to draw, unless it is said
    inherited: str = "neck and head"  # what a student that starts from its teacher has of it


TASKS = {
    "bbox": Task(("AP", "AP50", "AP75"), "AP", "coco_instances_results.json", 6),
    "segm": Task(("AP", "AP50", "AP75"), "AP", "coco_instances_results.json", 6),
    "sem_seg": Task(("mIoU", "pACC", "mACC", "fwIoU"), "IoU", "sem_seg_predictions.json", 6, "head"),
    "classification": Task(("top1", "top5"), "top1", "classification_predictions.json", 12, "head"),
}


def split_variant(task: str) -> tuple[str, str]:
    """Splits "bbox_EMA" into "bbox" and "_EMA"; the second part of most names is empty."""
    suffix = next((end for end in _VARIANTS if task.endswith(end)), "")
    return task.removesuffix(suffix), suffix


def task_named(name: str, metrics: Iterable[str] = ()) -> Task:
    """The task of that name, or of the variant of it; for one that d2kd does not know, three columns of its metrics."""
    known = TASKS.get(split_variant(name)[0])
    if known is not None:
        return known
    columns = tuple(metric for metric in metrics if "-" not in metric)[:3] or ("AP",)
    return Task(columns, columns[0], None, 0)


def first_task(results: Mapping[str, object]) -> str | None:
    """The task that a report takes unless it is told: "bbox" where there is one, else the next one of `TASKS`, ..."""
    tasks = [name for name in results if isinstance(results[name], Mapping)]
    return next((name for name in (*TASKS, *tasks) if name in tasks), None)
