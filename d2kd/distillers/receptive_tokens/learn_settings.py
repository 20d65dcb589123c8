"""Settings of the first stage, learning tokens: the node DISTILL.RECEPTIVE_TOKENS.LEARN."""

from d2kd.settings import Configurable, setting


class LearnSettings(Configurable):
    """How tokens are learned on the teacher's own task, see `tools/learn_tokens.py`.

    The taps are those of the method's node, of the teacher: TEACHER_TAPS, or TAPS; [] takes all outputs of its
    backbone. Batch size, SGD's momentum, clipping and AMP are those of SOLVER.
    """

    num_tokens: int = setting(6, "Tokens of each tap.", at_least=1)
    weighting: bool = setting(True, "Learn a weight for each token and image; False adds the masks up.")
    iterations: int = setting(2000, "Length of the training.", at_least=1)
    optimizer: str = setting("Adam", "Adam | AdamW | SGD", choices=("Adam", "AdamW", "SGD"))
    base_lr: float = setting(
        0.01,
        "The published rate; too high where features are large (masks that are 0 or 1 all over, see OUTPUT_DIR/masks).",
        above=0,
    )
    schedule: str = setting(
        "cosine",
        "How the rate falls. cosine: to 1e-6 | poly: to 0, with SOLVER.POLY_LR_POWER, as published for segmentors.",
        choices=("cosine", "poly"),
    )
    weight_decay: float = setting(0.001, "Weight decay of tokens and weighting branches.", at_least=0)
    period: int = setting(500, "Iterations between checkpoints, and between pictures of the masks.", at_least=1)
    pictures: int = setting(4, "Images that the masks are drawn over.", at_least=0)
