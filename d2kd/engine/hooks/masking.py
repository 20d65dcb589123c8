"""Pictures of the patches that a masked teacher computes, while the student learns where to look."""

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from d2kd.data.loader import side_stream
from d2kd.files import replacing
from d2kd.modeling import DistilledModel, evaluation_mode
from d2kd.modeling.teacher_passes import MaskedTeacher
from d2kd.rng import preserve_rng_state
from d2kd.visualization import kept_picture, sheet
from detectron2.config import CfgNode
from detectron2.engine.train_loop import HookBase

#: Images that are drawn.
IMAGES = 6
#: Rows of the sheet that shows the whole training.
ROWS = 8


class MaskingPictures(HookBase):
    """Draws which patches of the same few training images the teacher would compute now, and in the end the progress.

    Nothing of the training changes: the student runs in evaluation mode, and random states are put back.
    """

    def __init__(self, cfg: CfgNode, model: DistilledModel, period: int) -> None:
        """
        Args:
            cfg: gives OUTPUT_DIR, and the channel order of the images.
            model: with a method whose teacher is masked.
            period: iterations between pictures.
        """
        self.model = model
        self.period = period
        self.directory = Path(cfg.OUTPUT_DIR) / "masking"
        self.rgb = cfg.INPUT.FORMAT == "RGB"
        self._batch: list[dict[str, Any]] = []

    def before_train(self) -> None:
        """Removes pictures of iterations that are yet to come, of an earlier run or of steps that are done again."""
        for path in self.directory.glob("[0-9]*.png"):
            if int(path.stem) > self.trainer.start_iter:
                path.unlink()

    def after_step(self) -> None:
        """Draws after the first iteration, where it is time, and at the end."""
        done = self.trainer.iter + 1
        if done == 1 or done % self.period == 0 or done == self.trainer.max_iter:
            self.draw(done)

    def after_train(self) -> None:
        """Puts some of the pictures below each other, from the first to the last."""
        files = sorted(self.directory.glob("[0-9]*.png"))
        chosen = np.unique(np.linspace(0, len(files) - 1, min(ROWS, len(files))).round().astype(int))
        rows: dict[str, Any] = {f"iteration {int(files[i].stem)}": cv2.imread(str(files[i])) for i in chosen}
        if rows:
            self._write("progress", sheet(rows))

    def draw(self, done: int) -> None:
        """Writes `masking/<iteration>.png`."""
        self._batch = self._batch or self._images()
        masked: Any = self.model.passes.others[MaskedTeacher.__name__]
        kept = kept_patches(self.model, masked, self._batch).cpu().numpy()
        tiles = []
        for record, chosen in zip(self._batch, kept):
            image = record["image"].clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
            tiles.append(
                kept_picture(np.ascontiguousarray(image[..., ::-1] if self.rgb else image), chosen, masked.patch)
            )
        self._write(f"{done:07d}", np.hstack(tiles))

    def _images(self) -> list[dict[str, Any]]:
        """Images of a stream of their own: the training sees all that it would have seen."""
        images: list[dict[str, Any]] = []
        for batch in side_stream(self.trainer.data_loader, self.period):
            images += batch
            if len(images) >= IMAGES:
                break
        return [{**x, "image": x["image"].to(self.model.device)} for x in images[:IMAGES]]

    def _write(self, name: str, picture: np.ndarray) -> None:
        with replacing(self.directory / f"{name}.png") as path:
            cv2.imwrite(str(path), picture)


def build_masking_pictures(cfg: CfgNode, model: DistilledModel | None) -> MaskingPictures | None:
    """Returns the hook that DISTILL.MASKED_TEACHER.VIS_PERIOD asks for; None without that or without such a teacher."""
    period = cfg.DISTILL.MASKED_TEACHER.VIS_PERIOD
    if model is None or not period or MaskedTeacher.__name__ not in model.passes.others:
        return None
    return MaskingPictures(cfg, model, period)


@torch.no_grad()
def kept_patches(model: DistilledModel, masked: MaskedTeacher, batch: list[dict[str, Any]]) -> Tensor:
    """Returns which patches the teacher would compute of some images now, (N, H, W) bool; changes no random state."""
    state = copy.deepcopy(masked.state_dict())
    with preserve_rng_state(model.device), evaluation_mode(model.student):
        with masked.watch() as guidance:
            model.student(batch)
        kept = masked.choose(batch, guidance)
    if state:
        masked.load_state_dict(state)
    return kept
