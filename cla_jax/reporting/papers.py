"""What the papers print, to stand beside what we measure.

CLA: Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention"
(arXiv 2405.12981), Tables 1 and 3 to 8. MLKV: Zuhri et al. 2024, "MLKV: Multi-Layer Key-Value
Heads for Memory Efficient Transformer Decoding" (arXiv 2406.09297), Tables 2, 3 and 4.
"""

import dataclasses

__all__ = [
    "CLA_TABLE_1",
    "CLA_TABLE_3",
    "CLA_TABLE_5",
    "CLA_TABLE_7",
    "DOWNSTREAM",
    "MLKV_160M",
    "MLKV_410M",
    "MLKV_LARGEST_BATCH",
    "DownstreamTable",
    "MLKVResult",
    "PaperResult",
    "variant_in_paper",
]


@dataclasses.dataclass(frozen=True)
class PaperResult:
    """A row of a table.

    Attributes:
        kv_bytes_per_token: of a 16-bit cache.
        learning_rate: peak; in Tables 3, 5 and 7 the best for the model.
        perplexity: on validation text; Table 7 prints none.
        wikitext: perplexity on Wikitext; Table 1 prints none.
    """

    kv_bytes_per_token: int
    learning_rate: float
    perplexity: float | None = None
    wikitext: float | None = None


CLA_TABLE_1: dict[str, PaperResult] = {
    variant: PaperResult(kv_bytes, 3e-4, perplexity)
    for variant, kv_bytes, perplexity in (
        ("H128-MHA", 163840, 13.15),
        ("H128-GQA4", 40960, 13.36),
        ("H128-GQA2", 20480, 13.52),
        ("H128-MQA", 10240, 13.54),
        ("H64-MQA", 5120, 13.81),
        ("H46-MQA", 3680, 13.96),
        ("H32-MQA", 2560, 14.37),
        ("H512-MQA-CLA2", 20480, 13.49),
        ("H256-MQA-CLA2", 10240, 13.51),
        ("H128-MQA-CLA2", 5120, 13.60),
        ("H90-MQA-CLA2", 3600, 13.73),
        ("H64-MQA-CLA2", 2560, 13.89),
        ("H256-GQA4-CLA2", 40960, 13.38),
        ("H128-GQA4-CLA2", 20480, 13.48),
        ("H128-GQA2-CLA2", 10240, 13.59),
        ("H128-MQA-CLA3", 3584, 13.77),
        ("H128-MQA-CLA4", 2560, 13.95),
        ("H128-MQA-CLA2-KeepEnds", 5632, 13.62),
        ("H128-MQA-CLA2-DenseFront", 5632, 13.75),
        ("H128-MQA-CLA2-DenseBack", 5632, 14.03),
    )
}
"""1B models, 30 B tokens, learning rate 3e-4: the design space."""

CLA_TABLE_3: dict[str, PaperResult] = {
    "H128-MQA": PaperResult(10240, 1.5e-3, 12.39, 19.30),
    "H128-MQA-CLA2": PaperResult(5120, 2.25e-3, 12.43, 19.29),
    "H64-MQA": PaperResult(5120, 2.25e-3, 12.74, 20.00),
}
"""1B models, 30 B tokens, at their best learning rates."""

CLA_TABLE_5: dict[str, PaperResult] = {
    "H128-MQA": PaperResult(16384, 6.75e-4, 9.52, 13.63),
    "H128-MQA-CLA2": PaperResult(8192, 2.25e-3, 9.34, 13.25),
    "H64-MQA": PaperResult(8192, 1.00e-3, 9.48, 13.49),
}
"""3B models, 100 B tokens, at their best learning rates: the first set."""

CLA_TABLE_7: dict[str, PaperResult] = {
    "H64-MQA": PaperResult(8192, 1.0e-3, None, 12.94),
    "H64-MQA-CLA2": PaperResult(4096, 1.0e-3, None, 12.99),
    "H32-MQA": PaperResult(4096, 1.0e-3, None, 13.34),
}
"""3B models, 100 B tokens, learning rate 1e-3: the second set."""


@dataclasses.dataclass(frozen=True)
class MLKVResult:
    """A Pythia model of the MLKV paper.

    Attributes:
        accuracy: average over ARC-e, LAMBADA, PIQA and SciQ, per cent (Tables 3 and 4).
        loss: at the end of uptraining, nats per token (Table 2); the 410M models' are not printed.
    """

    accuracy: float
    loss: float | None = None


MLKV_160M: dict[str, MLKVResult] = {
    "MHA": MLKVResult(52.79),
    "GQA-48": MLKVResult(50.17, 2.7082),
    "MLKV-48": MLKVResult(49.29, 2.7656),
    "MQA-12": MLKVResult(49.43, 2.7505),
    "MLKV-12": MLKVResult(48.78, 2.8014),
    "MLKV-6": MLKVResult(49.06, 2.8013),
    "MLKV-4": MLKVResult(47.31, 2.8261),
    "MLKV-2": MLKVResult(46.78, 2.8942),
    "MLKV-1": MLKVResult(41.12, 3.3934),
}
"""Pythia-160M, uptrained on 5 % of the Pile; MHA is the model that was converted."""

MLKV_410M: dict[str, MLKVResult] = {
    "MHA": MLKVResult(63.36),
    "MQA-24": MLKVResult(54.76),
    "MLKV-12": MLKVResult(54.02),
    "MLKV-8": MLKVResult(53.21),
}
"""Pythia-410M."""

MLKV_LARGEST_BATCH: dict[str, int] = {"MHA": 48, "MLKV-2": 940, "MLKV-1": 1100}
"""Pythia-160M at 2048 tokens on a 12 GB GPU (section 5.2); the others are drawn, not printed."""


@dataclasses.dataclass(frozen=True)
class DownstreamTable:
    """A table of benchmark results, zero-shot.

    Attributes:
        title: paper and number.
        scales: of our models that stand beside it.
        tasks: its columns, by the harness's names; `wikitext` is a word perplexity, from the
            paper's own table of perplexities, all others are accuracies in per cent.
        rows: of each model.
        averages: of each model, as printed; the CLA paper prints none.
    """

    title: str
    scales: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]
    averages: dict[str, float] = dataclasses.field(default_factory=dict)


_CLA_TASKS = ("wikitext", "hellaswag", "piqa", "winogrande", "sciq", "openbookqa", "boolq",
              "arc_easy")  # fmt: skip
_MLKV_TASKS = ("arc_easy", "lambada_openai", "piqa", "sciq")

DOWNSTREAM: tuple[DownstreamTable, ...] = (
    DownstreamTable("CLA Table 4 (Wikitext: Table 3)", ("1B", "mini", "tiny"), _CLA_TASKS, {
        "H128-MQA": (19.30, 36.24, 69.15, 52.96, 82.9, 19.0, 57.40, 55.43),
        "H128-MQA-CLA2": (19.29, 36.01, 69.15, 51.93, 82.6, 21.4, 53.21, 53.87),
        "H64-MQA": (20.00, 35.22, 69.21, 50.75, 78.5, 19.4, 55.81, 51.68),
    }),
    DownstreamTable("CLA Table 6 (Wikitext: Table 5)", ("3B",), _CLA_TASKS, {
        "H128-MQA": (13.63, 45.73, 73.07, 60.46, 88.1, 25.4, 59.30, 64.90),
        "H128-MQA-CLA2": (13.25, 47.12, 74.32, 60.69, 89.2, 25.2, 58.62, 64.73),
        "H64-MQA": (13.49, 46.42, 74.05, 57.85, 88.1, 25.6, 59.88, 65.57),
    }),
    DownstreamTable("CLA Table 8 (Wikitext: Table 7)", ("3B",), _CLA_TASKS, {
        "H64-MQA": (12.94, 47.34, 74.54, 60.46, 88.9, 24.2, 57.25, 66.92),
        "H64-MQA-CLA2": (12.99, 47.32, 74.54, 57.46, 87.9, 25.2, 61.62, 65.53),
        "H32-MQA": (13.34, 46.05, 73.83, 60.06, 88.6, 25.6, 61.87, 65.24),
    }),
    DownstreamTable("MLKV Table 3", ("pythia-160m", "pythia-mini", "pythia-tiny"), _MLKV_TASKS, {
        "MHA": (43.94, 33.63, 61.37, 72.2),
        "GQA-48": (41.92, 29.38, 60.77, 68.6),
        "MLKV-48": (42.13, 26.18, 59.96, 68.9),
        "MQA-12": (40.19, 26.74, 61.10, 69.7),
        "MLKV-12": (41.08, 23.44, 60.28, 70.3),
        "MLKV-6": (41.41, 24.35, 60.55, 69.9),
        "MLKV-4": (40.03, 23.64, 60.17, 65.4),
        "MLKV-2": (40.91, 22.03, 59.47, 64.7),
        "MLKV-1": (38.26, 8.56, 59.25, 58.4),
    }, {variant: result.accuracy for variant, result in MLKV_160M.items()}),
    DownstreamTable("MLKV Table 4", ("pythia-410m",), _MLKV_TASKS, {
        "MHA": (51.6, 51.93, 67.19, 82.7),
        "MQA-24": (46.04, 34.06, 63.82, 75.1),
        "MLKV-12": (44.70, 33.11, 62.89, 75.4),
        "MLKV-8": (46.04, 31.28, 62.62, 72.9),
    }, {variant: result.accuracy for variant, result in MLKV_410M.items()}),
)  # fmt: skip
"""Tables 4, 6 and 8 of the CLA paper, 3 and 4 of the MLKV paper."""


def variant_in_paper(name: str) -> str:
    """The paper's model that one of ours stands for: a `tiny` model's heads are not in its name.

    Examples:
        >>> variant_in_paper("mini/H64-MQA"), variant_in_paper("tiny/MQA-CLA2")
        ('H64-MQA', 'H128-MQA-CLA2')
    """
    scale, _, variant = name.partition("/")
    return f"H128-{variant}" if scale == "tiny" else variant
