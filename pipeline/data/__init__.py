"""Instruction data: sources, prompt templates, tokens and labels, splits."""

from pipeline.data.cache import cached_splits
from pipeline.data.load import load_rows
from pipeline.data.prompts import PromptTemplate
from pipeline.data.splits import Splits, load_splits
from pipeline.data.tokenise import LabelStatistics, label_statistics, tokenise

__all__ = [
    "LabelStatistics",
    "PromptTemplate",
    "Splits",
    "cached_splits",
    "label_statistics",
    "load_rows",
    "load_splits",
    "tokenise",
]
