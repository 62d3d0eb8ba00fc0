"""Options (lines of their dict), sizes of batches, and inputs that overflow."""

from __future__ import annotations

from tests.fuzz.words.word import Word

DTYPES = (
    Word("float32", code='"dtype": "float32"', weight=5),
    Word(
        "float16",
        code='"loss_scale": fxpass.DynamicLossScale(init_scale=256.0, growth_interval=2)',
        likes=("rotated", "bce by hand"),
        weight=2,
    ),
    Word("float16, headroom", code='"loss_scale": fxpass.HeadroomLossScale(init_scale=256.0)'),
    Word("float16, static", code='"loss_scale": 256.0'),
    Word("bfloat16", code='"dtype": "bfloat16"', weight=1.5),
)

SCALES = (
    Word(
        "dynamic scale",
        code='"loss_scale": fxpass.DynamicLossScale(init_scale=1024.0, growth_interval=2)',
        clashes=("float16", "float16, static", "float16, headroom"),
        weight=2,
    ),
    Word(
        "static scale",
        code='"loss_scale": 128.0',
        clashes=("float16", "float16, static", "float16, headroom"),
    ),
)

CLIPS = (
    Word("max_norm", code='"max_norm": 0.1', clashes=("skip='tensor'",), weight=2),
    Word("max_norm, inf", code='"max_norm": 0.05, "norm_type": float("inf")', clashes=("skip='tensor'",)),
    Word("max_norm per group", code='"max_norm": 0.1, "clip_per": "group"', clashes=("skip='tensor'",)),
    Word(
        "max_norm per optimizer",
        code='"max_norm": 0.1, "clip_per": "optimizer"',
        clashes=("skip='tensor'",),
    ),
    Word("max_norm per parameter", code='"max_norm": 0.05, "clip_per": "parameter"'),
    Word("clip_value", code='"clip_value": 0.02'),
    Word("adaptive_clip", code='"adaptive_clip": 0.05'),
)

MODES = (
    Word(
        "skip='tensor'",
        code='"skip": "tensor"',
        likes=("diagonal of a weight", "unfolded weight", "one gradient overflows", "Neighbour"),
        weight=2,
    ),
    Word("release", code='"release": True', clashes=("skip='tensor'", "keeps gradients"), weight=2),
    Word("keeps gradients", code='"grads": "keep"', weight=2),
    Word("no activations kept", code='"memory_budget": 0.0'),
    Word("half of the activations", code='"memory_budget": 0.5'),
    Word("no outlining", code='"outline": "off"'),
    Word("head in float32", code='"keep_fp32": ("*head*",)'),
)

# Rows of each call's batch, over and over.
SIZES = (
    Word("a smaller last batch", code="[4, 4, 3]", weight=2),
    Word("every size", code="[3, 4, 5, 2, 6]"),
    Word("single row", code="[4, 1, 4]"),
    Word("single row first", code="[1, 4, 4]", clashes=("batch norm", "running mean")),
)

OVERFLOWS = (
    Word(
        "inf",
        code="""
            if call == 1:
                $poisoned[0, 0] = float("inf")
        """,
    ),
    Word(
        "inf at first",
        code="""
            if call == 0:
                $poisoned[0, 0] = float("inf")
        """,
    ),
    Word(
        "nan",
        code="""
            if call == 1:
                $poisoned[0, 0] = float("nan")
        """,
    ),
    Word(
        "huge",
        code="""
            if call == 2:
                $poisoned[0, 0] = 1e30
        """,
        clashes=(
            "layer norm",
            "group norm",
            "batch norm",
            "convolution and batch norm",
            "convolution and group norm",
            "normalised",
        ),
    ),
)
