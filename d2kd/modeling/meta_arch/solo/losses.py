"""The losses of SOLO (arXiv 1912.04488, section 3.3.2): Dice on masks, focal on the classes of cells."""

from torch import Tensor

from d2kd.layers import sigmoid_focal_loss

#: Added to each of the two squared sums of the Dice coefficient.
DICE_EPS = 1e-3
#: Added to the number of cells that the focal loss is divided by.
COUNT_EPS = 2.0**-23


def dice_losses(masks: Tensor, targets: Tensor) -> Tensor:
    """Returns 1 - 2 <p, t> / (<p, p> + <t, t>) of each mask, (P,).

    Args:
        masks: (P, H, W) probabilities.
        targets: (P, H, W) bool.
    """
    p, t = masks.flatten(1), targets.flatten(1).to(masks.dtype)
    squares = p.square().sum(1) + t.sum(1) + 2 * DICE_EPS
    return 1 - 2 * (p * t).sum(1) / squares


def focal_loss_sum(logits: Tensor, classes: Tensor, alpha: float, gamma: float) -> Tensor:
    """Returns the sum of the focal loss (arXiv 1708.02002) over all cells and classes.

    Args:
        logits: (N, K, G, G).
        classes: (N, G, G); K is background.
        alpha, gamma: of the focal loss.
    """
    return sigmoid_focal_loss(logits.permute(0, 2, 3, 1), classes, alpha, gamma).sum()
