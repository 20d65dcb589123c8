"""Pictures of the masks while tokens are learned."""

import itertools
import os
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import torch

from d2kd.data.mapper import build_mapper, wrap_mapper
from d2kd.files import replacing
from d2kd.visualization.tokens import MaskRow, mask_picture
from detectron2.config import CfgNode
from detectron2.engine.train_loop import HookBase

#: A mask whose values vary by less over an image does not select places.
FLAT_RANGE = 0.1


class MaskPictures(HookBase):
    """Draws the masks over a few training images: as PNG files, and into the event storage (TensorBoard)."""

    def __init__(self, cfg: CfgNode, period: int, records: Iterable[dict[str, Any]], count: int) -> None:
        """
        Args:
            cfg: of the teacher; decides size and channel order of its input, and what an image that cannot be read is.
            period: iterations between pictures; there are some at the end in any case. 0 or less draws only those.
            records: the training images, in Detectron2's format.
            count: how many are drawn: the first ones that are not left out.

        Raises:
            DatasetError: (when drawing) an image cannot be read, and DATASETS.ON_BAD_IMAGE is error.
        """
        self.period = period
        self.directory = os.path.join(cfg.OUTPUT_DIR, "masks")
        self.image_format = cfg.INPUT.FORMAT
        self.records = records
        self.count = count
        self._range: dict[str, np.ndarray] = {}
        self.mapper = wrap_mapper(build_mapper(cfg, is_train=False), cfg.DATASETS.ON_BAD_IMAGE)

    def after_step(self) -> None:
        """Draws where it is time."""
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.draw("final")
        elif self.period > 0 and done % self.period == 0:
            self.draw(f"{done:07d}")

    def draw(self, name: str) -> None:
        """Writes `masks/<name>_<number of the image>.png`."""
        self._range.clear()
        inputs = (data for record in self.records if (data := self.mapper(record)) is not None)
        for number, data in enumerate(itertools.islice(inputs, self.count)):
            picture = mask_picture(_bgr(data["image"], self.image_format), self._rows(data))
            with replacing(os.path.join(self.directory, f"{name}_{number}.png")) as path:
                cv2.imwrite(str(path), picture)
            rgb = torch.from_numpy(np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1)))
            self.trainer.storage.put_image(f"masks/{number}", rgb)

    def _rows(self, data: dict[str, Any]) -> dict[str, MaskRow]:
        inputs = [{key: data[key] for key in ("image", "height", "width")}]
        rows = {}
        for tap, seen in self.trainer.learner.compute_masks(inputs).items():
            row = rows[tap] = MaskRow(seen.masks[0].cpu().numpy(), seen.gate[0].cpu().numpy(), seen.stride)
            if row.gate.size > 1:
                self._range[tap] = np.maximum(self._range.get(tap, 0.0), np.ptp(row.masks, axis=(1, 2)))
        return rows

    def flat_taps(self) -> list[str]:
        """Returns the taps (of more than one cell) of which most masks are flat in every image that was drawn last."""
        return [tap for tap, ranges in self._range.items() if (ranges < FLAT_RANGE).mean() > 0.5]


def _bgr(image: torch.Tensor, image_format: str) -> np.ndarray:
    array = image.byte().permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(array[..., ::-1] if image_format == "RGB" else array)
