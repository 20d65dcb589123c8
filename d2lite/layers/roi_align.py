"""RoIAlign as a module."""

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align


class ROIAlign(nn.Module):
    """RoIAlign (arXiv 1703.06870): average of bilinear samples in each cell of each region.

    Args:
        output_size: (height, width) of the result, or one number for both.
        spatial_scale: box coordinates are multiplied by this to become feature coordinates.
        sampling_ratio: samples per cell and axis; 0 takes as many as the cell has feature pixels.
        aligned: pixel centers lie at half-integers, so boxes are shifted by -0.5. False gives the
            original behavior, which is off by half a pixel.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pools (N, C, H, W) at `rois` (R, 5), rows of batch index and XYXY, into (R, C, *output_size)."""
        assert rois.dim() == 2 and rois.shape[1] == 5, f"rois must have shape (R, 5), got {list(rois.shape)}"
        # boxes in half precision would be pixels away
        dtype = torch.promote_types(input.dtype, rois.dtype)
        pooled = roi_align(
            input.to(dtype),
            rois.to(dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )
        return pooled.to(input.dtype)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
