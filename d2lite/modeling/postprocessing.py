"""Maps predictions from the resolution of the network input to the requested resolution."""

import torch
from torch.nn import functional as F

from d2lite.layers import paste_masks_in_image
from d2lite.structures import Instances


def detector_postprocess(
    results: Instances, output_height: int, output_width: int, mask_threshold: float = 0.5
) -> Instances:
    """Scales the boxes of one image to the output size, clips them, drops those that become empty, and pastes the
    masks.

    Args:
        results: raw detections, with `results.image_size` the (height, width) of the network input. Has
            `pred_boxes` or `proposal_boxes`, and maybe `pred_masks`: (N, 1, M, M) or ROIMasks, probabilities
            inside each box.
        output_height, output_width: the wanted resolution, in pixels.
        mask_threshold: probability above which a pixel belongs to a mask.

    Returns:
        New Instances of image size (output_height, output_width); `pred_masks` becomes (N, H, W) bool.
        `results` is not changed.
    """
    height, width = int(output_height), int(output_width)
    scale_x, scale_y = width / results.image_size[1], height / results.image_size[0]
    output = Instances((height, width), **results.get_fields())

    name = next((x for x in ("pred_boxes", "proposal_boxes") if output.has(x)), None)
    assert name is not None, "the predictions hold neither pred_boxes nor proposal_boxes"
    boxes = output.get(name).clone()
    boxes.scale(scale_x, scale_y)
    boxes.clip(output.image_size)
    output.set(name, boxes)
    output = output[boxes.nonempty()]

    if output.has("pred_masks"):
        masks = output.pred_masks
        masks = masks[:, 0] if isinstance(masks, torch.Tensor) else masks.tensor
        output.pred_masks = paste_masks_in_image(masks, output.get(name), output.image_size, threshold=mask_threshold)
    return output


def sem_seg_postprocess(
    result: torch.Tensor, img_size: tuple[int, int], output_height: int, output_width: int
) -> torch.Tensor:
    """Removes the padding from per-pixel predictions and resizes them to the output size.

    Args:
        result: (C, H, W) logits at the padded input resolution.
        img_size: (height, width) of the image without padding.
        output_height, output_width: the wanted resolution, in pixels.

    Returns:
        (C, output_height, output_width) logits.
    """
    result = result[None, :, : img_size[0], : img_size[1]]
    return F.interpolate(result, size=(output_height, output_width), mode="bilinear", align_corners=False)[0]
