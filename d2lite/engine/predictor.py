"""Runs a model of a config on single images."""

from typing import Any

import numpy as np
import torch

from d2lite.checkpoint import DetectionCheckpointer
from d2lite.config import CfgNode
from d2lite.data import MetadataCatalog
from d2lite.data import transforms as T
from d2lite.modeling import build_model


class DefaultPredictor:
    """Resizes an image, runs the model on it, and returns its result. One image at a time.

    Attributes:
        model: in eval mode.
        metadata: of the first test dataset; None if the config names none.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: names the model, `MODEL.WEIGHTS` and `INPUT.{FORMAT, MIN_SIZE_TEST, MAX_SIZE_TEST}`.

        Raises:
            ValueError: if `INPUT.FORMAT` is neither "BGR" nor "RGB".
        """
        if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
            raise ValueError(f"DefaultPredictor needs INPUT.FORMAT BGR or RGB, got '{cfg.INPUT.FORMAT}'.")
        self.cfg, self.input_format = cfg.clone(), cfg.INPUT.FORMAT
        self.model = build_model(self.cfg).eval()
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if len(cfg.DATASETS.TEST) else None
        DetectionCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.aug = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """
        Args:
            original_image: (H, W, 3) in BGR order, as OpenCV reads it.

        Returns:
            The model's result for the image, in its original size.
        """
        image = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        height, width = image.shape[:2]
        image = self.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
        return self.model([{"image": tensor.to(self.cfg.MODEL.DEVICE), "height": height, "width": width}])[0]
