"""Random sampling of the labeled examples that enter a loss."""

import torch


def subsample_labels(
    labels: torch.Tensor, num_samples: int, positive_fraction: float, bg_label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples up to `num_samples` examples, of which at most `positive_fraction` are positive
    (Fast R-CNN, arXiv 1504.08083, section 2.3). Missing positives are replaced by negatives.

    Args:
        labels: (N,) integer labels: -1 is ignored, `bg_label` is negative, anything else is positive.
        num_samples: number of examples to sample in total.
        positive_fraction: maximum fraction of `num_samples` that may be positive, in [0, 1].
        bg_label: the label of the background.

    Returns:
        Indices (P,) and (Q,) of the sampled positives and negatives, P + Q <= num_samples.
    """
    positive = torch.nonzero((labels != -1) & (labels != bg_label)).squeeze(1)
    negative = torch.nonzero(labels == bg_label).squeeze(1)
    num_positive = min(positive.numel(), int(num_samples * positive_fraction))
    num_negative = min(negative.numel(), num_samples - num_positive)
    return _sample(positive, num_positive), _sample(negative, num_negative)


def _sample(indices: torch.Tensor, count: int) -> torch.Tensor:
    return indices[torch.randperm(indices.numel(), device=indices.device)[:count]]
