"""Assignment of predictions (anchors, proposals) to ground-truth boxes by thresholds on their overlap."""

import torch


class Matcher:
    """Assigns at most one ground-truth element to each prediction.

    Each prediction takes the ground truth that it overlaps most; the size of that overlap determines its label,
    e.g. 1 (foreground), 0 (background) or -1 (ignored).
    """

    def __init__(self, thresholds: list[float], labels: list[int], allow_low_quality_matches: bool = False) -> None:
        """
        Args:
            thresholds: increasing positive limits t_1 < ... < t_k that split the qualities into k + 1 intervals
                [-inf, t_1), [t_1, t_2), ..., [t_k, inf).
            labels: the label (-1, 0 or 1) of each interval; k + 1 of them.
            allow_low_quality_matches: also label 1 every prediction that no other prediction beats for some
                ground truth, however small the overlap (Faster R-CNN, arXiv 1506.01497, section 3.1.2, rule
                i).
        """
        assert len(labels) == len(thresholds) + 1, (
            f"{len(thresholds)} thresholds need {len(thresholds) + 1} labels, got {len(labels)}"
        )
        for label in labels:
            assert label in [-1, 0, 1], f"labels must be -1, 0 or 1, got {labels}"
        assert thresholds[0] > 0, f"thresholds must be positive, got {thresholds}"
        for i in range(len(thresholds) - 1):
            assert thresholds[i] <= thresholds[i + 1], f"thresholds must increase, got {thresholds}"
        self.thresholds = thresholds
        self.labels = labels
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            match_quality_matrix: (M, N) non-negative quality, usually IoU, of M ground truths and N
                predictions.

        Returns:
            matches: (N,) int64, the index in [0, M) of the best ground truth (0 where M is 0).
            match_labels: (N,) int8, the label of each prediction. Without ground truth, all have the label of
                the lowest interval.
        """
        assert match_quality_matrix.dim() == 2, (
            f"expected a (ground truth, prediction) matrix, got shape {list(match_quality_matrix.shape)}"
        )
        device = match_quality_matrix.device
        num_predictions = match_quality_matrix.size(1)
        if match_quality_matrix.size(0) == 0:
            matches = torch.zeros(num_predictions, dtype=torch.int64, device=device)
            labels = torch.full((num_predictions,), self.labels[0], dtype=torch.int8, device=device)
            return matches, labels

        quality, matches = match_quality_matrix.max(dim=0)
        labels = torch.full((num_predictions,), self.labels[0], dtype=torch.int8, device=device)
        for i in range(len(self.thresholds)):
            labels.masked_fill_(quality >= self.thresholds[i], self.labels[i + 1])
        if self.allow_low_quality_matches:
            # Compared for equality, so that all predictions that tie for the best overlap are labeled.
            best_of_ground_truth = match_quality_matrix.max(dim=1, keepdim=True)[0]
            labels.masked_fill_((match_quality_matrix == best_of_ground_truth).any(dim=0), 1)
        return matches, labels
